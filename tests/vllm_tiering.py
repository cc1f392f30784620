"""vLLM's tiering offload on a CPU, where its own copies between device and host refuse to run."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuCopies(OffloadingWorker):
    """Copies blocks to rows and back, at once."""

    def __init__(
        self, caches: CanonicalKVCaches, region: SharedOffloadRegion, per_chunk: int
    ) -> None:
        self._region, self._per_chunk = region, per_chunk
        self._pairs = [
            (x.tensor, region.create_next_worker_view(x.page_size_bytes * per_chunk))
            for x in caches.tensors
        ]
        self._done: list[TransferResult] = []

    def _copy(self, job: int, blocks: Any, chunks: Any, store: bool) -> bool:
        size = 0
        for tensor, rows in self._pairs:
            page = tensor.shape[1]
            for i, block in enumerate(blocks.block_ids, start=blocks.block_indices[0]):
                place = i - blocks.block_indices[0] // self._per_chunk * self._per_chunk
                row = rows[chunks.block_ids[place // self._per_chunk]]
                part = row[(i % self._per_chunk) * page :][:page]
                if store:
                    part.copy_(tensor[block])
                else:
                    tensor[block].copy_(part)
                size += page
        self._done.append(TransferResult(job, True, size, 0.001))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec, src_spec, False)

    def get_finished(self) -> list[TransferResult]:
        found, self._done = self._done, []
        return found

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._pairs.clear()
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    """vLLM's own, but for the copies."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                self._engine_id,
                self.num_chunks,
                0,
                self.kv_bytes_per_chunk,
                self.cpu_page_size_per_worker,
            )
            self._worker = CpuCopies(kv_caches, region, self.blocks_per_chunk)
        return self._worker
