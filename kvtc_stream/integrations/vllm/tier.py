"""A secondary tier of vLLM's tiering offload: rows of its host memory, coded, in a store.

vLLM's offloading copies blocks between the device and rows of host memory, and asks secondary tiers
to keep these and to bring them back, all from the scheduler's process. A process of our own does
that (``tier_worker``); the calls only take notes (``tier_link``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingMetricMetadata,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import Section
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.vllm import support
from kvtc_stream.integrations.vllm.blocks import proven_layout
from kvtc_stream.integrations.vllm.connector import show_log
from kvtc_stream.integrations.vllm.metrics import HELP
from kvtc_stream.integrations.vllm.rotary import check_rope, served_rope
from kvtc_stream.integrations.vllm.settings import TierSettings
from kvtc_stream.integrations.vllm.tier_link import TierLink
from kvtc_stream.integrations.vllm.tier_worker import Rows, WorkerConfig
from kvtc_stream.stream.codec import Codec

_log = logging.getLogger(__name__)

#: The first version of vLLM whose tiers are as this one is.
FIRST_VERSION = 0, 32
#: Pages that are coded at a time, if there are so many cores and nothing else is said.
_THREADS = 4
#: Pages of fewer tokens compress badly.
_FEW_TOKENS = 64
#: Element types of blocks.
_DTYPES = ("bfloat16", "float16", "float32")
_WHO = "KvtcTier"


class KvtcTier(SecondaryTierManager):  # type: ignore[misc]
    """Keeps rows of vLLM's host memory, compressed, in a store.

    vLLM makes it, from ``secondary_tiers`` of its ``TieringOffloadingSpec``; settings are beside
    ``type`` and ``module_path`` there, see
    :class:`kvtc_stream.integrations.vllm.TierSettings`. A page that is missing, damaged or
    another's is computed, and never an error of a request.

    Raises
    ------
    UnsupportedError
        vLLM's configuration is not served; the message names what, all of it.
    CalibrationMismatchError
        The calibration is for another model.
    ValueError
        Settings are unknown, missing or wrong.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        show_log()
        support.check_version(vllm.__version__, FIRST_VERSION, _WHO)
        own = TierSettings.read(settings)
        assert own.calibration is not None
        if own.locality is not None:
            self.locality = Locality(own.locality)
        vllm_config, cache_config = _engine()
        support.refuse(
            support.refusals(vllm_config, cache_config) + refusals(vllm_config, offloading_spec),
            _WHO,
        )
        section = support.served_section(vllm_config, cache_config)
        calibration = Calibration.load(own.calibration)
        support.check_calibration(calibration, section)
        rope = served_rope(section.k_dim)
        for expected in dict.fromkeys(calibration.geometry.sections[0].rope or (None,)):
            check_rope(rope, expected)
        rows = rows_of(vllm_config, cache_config, offloading_spec, primary_kv_view, section)
        Codec(calibration, block_tokens=rows.tokens, **own.codec_options())
        namespace = support.namespace_of(
            f"vllm tier, {vllm_config.cache_config.prefix_caching_hash_algo}",
            support.model_facts(vllm_config),
            rows.dtype,
            rows.tokens,
            [calibration],
            own.page_options(),
        )
        cores = os.cpu_count() or 1
        config = WorkerConfig(
            own,
            calibration.digest,
            rows,
            namespace,
            max(1, own.threads or min(_THREADS, cores)),
            # The engine pins itself to some of them.
            frozenset(range(cores)) if current_platform.is_cpu() else None,
        )
        # Rows that wait to be stored cannot be used for others.
        most = min(own.queue_pages, max(1, rows.count // 2))
        self._page_tokens, self._row_bytes = rows.tokens, rows.row_bytes
        self._link = TierLink(config, offloading_spec._scheduler_mmap.fd, most)
        _log.info("tier: pages of %d tokens, layout %s", rows.tokens, rows.layout.name)
        if rows.tokens < _FEW_TOKENS:
            _log.warning(
                "tier: pages of %d tokens compress badly: set block_size to 128 in "
                "kv_connector_extra_config",
                rows.tokens,
            )

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """A request comes; its chunks are stored as they are computed."""
        self._link.begin(req_context.req_id)
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        """Whether the store has a page; asked again while that is being looked up."""
        found = self._link.lookup(req_context.req_id, key)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: Any) -> None:
        """Send the step's lookups."""
        self._link.flush()

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Begin to code and store rows."""
        self._submit("store", job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Begin to load pages into rows."""
        self._submit("load", job_metadata)

    def _submit(self, kind: str, job: TransferJob) -> None:
        self._link.submit(
            kind,
            job.job_id,
            job.req_context.req_id,
            list(job.keys),
            job.chunk_ids,
            partial(self._position, job.req_context),
        )

    def _position(self, req_context: Any, key: bytes) -> int | None:
        end = req_context.get_offload_key_position(key)
        return None if end is None else end - self._page_tokens

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Jobs that have ended since the last call."""
        return [
            JobResult(
                job_id=job.job,
                success=job.whole,
                successful_keys=job.keys or None,
                transfer_time=job.seconds,
                transfer_bytes=len(job.keys) * self._row_bytes,
            )
            for job in self._link.finished()
        ]

    def on_request_finished(self, req_context: Any) -> None:
        """Forget what was looked up for a request."""
        self._link.end(req_context.req_id)

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        """Nothing: pages are used when they are loaded."""

    def drain_jobs(self) -> None:
        """Wait until no row is read or written; what has not begun to be stored is not.

        vLLM calls this when it resets its caches, as it does when weights were changed in place. It
        does not say whether they were, so pages from before are not used any more, nor those from
        now on by others.
        """
        self._link.drain()
        self._link.rename(Namespace({"reset": os.urandom(16).hex()}))
        _log.info(
            "tier: vLLM has reset its caches: pages from before are not used until it restarts"
        )

    def shutdown(self) -> None:
        """Store what waits, and end the process."""
        self._link.close()

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """Counters ``vllm:kvtc_tier_…`` for Prometheus."""
        return {
            f"vllm:kvtc_tier_{name}": OffloadingCounterMetadata(documentation=text)
            for name, text in HELP.items()
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What happened since the last call."""
        counts = {name: count for name, count in self._link.counts().items() if count}
        for kind in ("loaded", "stored"):
            if pages := counts.get(f"{kind}_pages"):
                counts[f"{kind}_cache_bytes"] = pages * self._row_bytes
        if not counts:
            return None
        stats = OffloadingConnectorStats()
        for name, count in counts.items():
            stats.increase_counter(f"vllm:kvtc_tier_{name}", count)
        return stats


def refusals(vllm_config: Any, spec: Any) -> list[str]:
    """What of vLLM's configuration the tier does not serve beside what the connector does not."""
    found = []
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1:
        found.append(
            f"tensor_parallel_size is {ranks}, and a row of host memory has all ranks' heads: use "
            f"KvtcConnector"
        )
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if not str(algorithm).startswith("sha256"):
        found.append(
            f"prefix_caching_hash_algo is {algorithm!r}, by which others may find a prompt that "
            f"has the same hash: use sha256"
        )
    if vllm_config.lora_config is not None:
        found.append(
            "LoRA is on, and tiers are not told whether the files of an adapter have changed: use "
            "KvtcConnector"
        )
    if spec.config.canonical_layout:
        found.append("canonical_layout is on: leave it off")
    if getattr(getattr(spec, "_scheduler_mmap", None), "fd", None) is None:
        found.append("vLLM's host memory is no file that another process can open")
    return found


def _engine() -> tuple[Any, Any]:
    """The configuration of the engine, and of its cache: those of the worker's connector."""
    if not has_kv_transfer_group():
        raise UnsupportedError(
            f"{_WHO} serves engines whose scheduler and worker are one process: leave "
            f"--distributed-executor-backend at its default, with one GPU for each engine"
        )
    group = get_kv_transfer_group()
    return group._vllm_config, group._kv_cache_config


def rows_of(
    vllm_config: Any, cache_config: Any, spec: Any, memory: memoryview, section: Section
) -> Rows:
    """Where K and V lie in rows: as in the engine's own blocks, in which its kernel is watched.

    Raises
    ------
    UnsupportedError
        The blocks are in no layout that we know, or rows are not made of such blocks.
    """
    group = cache_config.kv_cache_groups[0]
    layers = vllm_config.compilation_config.static_forward_context
    names = list(group.layer_names)
    caches = [_cache(layers[name]) for name in names]
    first, count = caches[0], cache_config.num_blocks
    tokens = int(group.kv_cache_spec.block_size)
    sizes = {"H": section.kv_heads, "N": tokens, "D": section.k_dim}
    layer = layers[names[0]]
    write = partial(layer.impl.do_kv_cache_update, layer)
    layout = proven_layout(write, first, count, sizes)
    memory_shape = memory.shape
    assert memory_shape is not None
    block = first[0].numel() * first.element_size()
    dense = first[0].numel() == 1 + sum(
        (size - 1) * stride for size, stride in zip(first[0].shape, first[0].stride(), strict=True)
    )
    dtype = support.dtype_label(first.dtype)
    reasons = []
    if dtype not in _DTYPES:
        reasons.append(f"blocks hold {dtype}, expected one of {', '.join(_DTYPES)}")
    if not layout.axes.startswith("B") or not dense:
        reasons.append(f"blocks of layout {layout.name} are in pieces")
    if any((x.shape, x.stride()) != (first.shape, first.stride()) for x in caches):
        reasons.append("layers have blocks of different shapes")
    if len({x.data_ptr() for x in caches}) != len(caches):
        reasons.append("layers share blocks")
    if first.stride(0) * first.element_size() != block:
        reasons.append("blocks of several layers lie among one another")
    blocks = int(spec.blocks_per_chunk)
    expected = blocks * block * len(names)
    if spec.cpu_page_size_per_worker != expected or memory_shape[1] < expected:
        reasons.append(
            f"a row has {spec.cpu_page_size_per_worker} bytes, expected {expected}: {blocks} "
            f"blocks of {block} bytes for each of {len(names)} layers"
        )
    support.refuse(reasons, _WHO)
    return Rows(
        layout,
        tuple(first[0].shape),
        tuple(first[0].stride()),
        dtype,
        section.kv_heads,
        section.k_dim,
        tokens,
        blocks,
        tuple(names.index(name) for name in support.ordered_layers(cache_config)),
        memory_shape[1],
        memory_shape[0],
    )


def _cache(layer: Any) -> torch.Tensor:
    """The blocks of a layer."""
    found: torch.Tensor | list[torch.Tensor] = layer.kv_cache
    return found if isinstance(found, torch.Tensor) else found[0]
