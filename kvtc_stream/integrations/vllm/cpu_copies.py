"""vLLM's offloading to host memory, on a CPU: there its own copies of blocks refuse to run.

All but the copies is vLLM's. vLLM imports this module by name; nothing here does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostCopies(OffloadingWorker):  # type: ignore[misc]
    """Copies blocks to rows and back, at once."""

    def __init__(self, caches: CanonicalKVCaches, rows: int) -> None:
        self._pairs = [
            (x.tensor, torch.empty_like(x.tensor[:1]).repeat(rows, 1)) for x in caches.tensors
        ]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Blocks to rows."""
        return self._copy(job_id, self._pairs, src_spec, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Rows to blocks."""
        pairs = [(rows, blocks) for blocks, rows in self._pairs]
        return self._copy(job_id, pairs, src_spec, dst_spec)

    def _copy(self, job_id: int, pairs: Sequence[Any], src_spec: Any, dst_spec: Any) -> bool:
        begin, size = time.perf_counter(), 0
        for source, target in pairs:
            found = source[torch.from_numpy(src_spec.block_ids)]
            target[torch.from_numpy(dst_spec.block_ids)] = found
            size += found.nbytes
        self._done.append(TransferResult(job_id, True, size, time.perf_counter() - begin))
        return True

    def get_finished(self) -> list[TransferResult]:
        """What was copied since the last call."""
        found, self._done = self._done, []
        return found

    def wait(self, job_ids: set[int]) -> None:
        """Nothing: copies are done when they are submitted."""


class HostCopiesSpec(CPUOffloadingSpec):  # type: ignore[misc]
    """vLLM's own, but for the copies."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The one that copies.

        Raises
        ------
        ValueError
            ``block_size`` asks for rows of several blocks.
        """
        if self.blocks_per_chunk != 1:
            raise ValueError(
                f"a row of host memory holds one block here, found {self.blocks_per_chunk}: leave "
                f"out block_size"
            )
        return HostCopies(kv_caches, self.num_chunks)
