"""The connector that vLLM makes: one in the scheduler, one in the worker."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import vllm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.split import part_path
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import BlockTable, Geometry, ModelIdentity
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.hosts.layouts import Layout
from kvtc_stream.integrations.hosts.store import MemoryStore, Store, open_store
from kvtc_stream.integrations.vllm import support
from kvtc_stream.integrations.vllm.blocks import Blocks, proven_layout
from kvtc_stream.integrations.vllm.counts import Counter
from kvtc_stream.integrations.vllm.learning import LearnSink, calibrator_of
from kvtc_stream.integrations.vllm.metrics import KvtcPromMetrics, KvtcStats
from kvtc_stream.integrations.vllm.rotary import check_rope, served_rope
from kvtc_stream.integrations.vllm.scheduling import (
    PageJob,
    PageScheduler,
    StepPlan,
    own_jobs,
)
from kvtc_stream.integrations.vllm.settings import Settings
from kvtc_stream.integrations.vllm.sink import PageSink, StoreSink
from kvtc_stream.integrations.vllm.transfer import (
    IN_TURN,
    PageTransfer,
    one_blas_thread,
)
from kvtc_stream.stream.codec import Codec
from kvtc_stream.stream.pages import PageCodec

_log = logging.getLogger(__name__)

#: Tokens of a page, if nothing else is said and a block is not larger.
_PAGE_TOKENS = 128
#: Pages that are decoded at a time on a CPU, if it has so many cores.
_DECODERS = 8
#: Seconds that an engine which has nothing to compute waits for pages, at a time.
_REST = 0.002


@dataclass
class KvtcMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler's connector tells the worker's."""

    plan: StepPlan = field(default_factory=StepPlan)
    idle: bool = False


class KvtcConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Keeps the pages of vLLM's KV cache, compressed, in a store.

    vLLM makes it, from ``--kv-transfer-config``; settings are in ``kv_connector_extra_config``, see
    :class:`kvtc_stream.integrations.vllm.Settings`. Prompts whose beginning is in the
    store are loaded, not computed: any whole number of pages. A page that is missing, damaged or
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

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        show_log()
        support.check_version(vllm.__version__)
        support.check_supported(vllm_config, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        # What cannot be loaded is computed; vLLM reads this after it has made the connector.
        transfer.kv_load_failure_policy = "recompute"
        self._settings = settings = Settings.read(transfer.kv_connector_extra_config)
        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self._block_tokens = int(spec.block_size)
        self._page_tokens = settings.page_tokens or max(_PAGE_TOKENS, self._block_tokens)
        if self._page_tokens % self._block_tokens:
            raise ValueError(
                f"page_tokens is {self._page_tokens}, expected a multiple of vLLM's block size "
                f"{self._block_tokens}"
            )
        self._dtype = support.dtype_label(spec.dtype)
        self._section = support.served_section(vllm_config, kv_cache_config)
        self._facts = support.model_facts(vllm_config)
        self._parts = parts = support.head_parts_of(vllm_config, self._section)
        self._rank = 0
        if role is KVConnectorRole.WORKER and parts.ranks > 1:
            self._rank = get_tensor_model_parallel_rank()
        self._part = parts.of(self._rank)
        self._codec: Codec | None = None
        self._store: Store | None = None
        calibrations: list[Calibration] = []
        if settings.calibrate is None:
            assert settings.calibration is not None
            assert settings.store is not None
            # Pages have names that depend on all parts, and the scheduler names them.
            own = [self._part] if role is KVConnectorRole.WORKER else range(parts.count)
            for part in own:
                calibrations.append(parts.calibration(settings.calibration, part))
                support.check_calibration(calibrations[-1], self._section, parts.heads(part))
            self._codec = Codec(
                calibrations[0], block_tokens=self._page_tokens, **settings.codec_options()
            )
            self._store = open_store(settings.store, settings.budget, parts.count)
            self._check_processes()
        loads = transfer.is_kv_consumer and self._store is not None
        stores = transfer.is_kv_producer or settings.calibrate is not None
        self._loading = loads
        self._scheduler: PageScheduler | None = None
        self._transfer: PageTransfer | None = None
        self._counter = Counter()
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = PageScheduler(
                self._namespace(calibrations),
                self._store if loads else None,
                self._page_tokens,
                self._block_tokens,
                stores=stores,
                parts=parts.count,
            )

    def _check_processes(self) -> None:
        """A store in this process is of use only where scheduler and worker are one process."""
        backend = self._vllm_config.parallel_config.distributed_executor_backend
        if isinstance(self._store, MemoryStore) and (
            self._parts.ranks > 1 or backend not in (None, "uni")
        ):
            raise UnsupportedError(
                f"{self._settings.store} is the memory of one process, and vLLM runs workers in "
                f"others (distributed_executor_backend is {backend!r}): use shm://NAME, the memory "
                "of this machine"
            )

    def _namespace(self, calibrations: Sequence[Calibration] = ()) -> Namespace:
        """What pages depend on beside tokens, adapter and tenant."""
        return support.namespace_of(
            "vllm",
            self._facts,
            self._dtype,
            self._page_tokens,
            calibrations,
            self._settings.page_options(),
            self._parts.ranks,
        )

    # The worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find K and V in the engine's blocks, and make ready to code them."""
        layers = self._vllm_config.compilation_config.static_forward_context
        names = support.ordered_layers(self._kv_cache_config)
        section = self._section
        sizes = {"H": section.kv_heads, "N": self._block_tokens, "D": section.k_dim}
        layout: Layout | None = None
        found = []
        for name in names:
            cache, layer = kv_caches[name], layers[name]
            if layout is None:
                write = partial(layer.impl.do_kv_cache_update, layer)
                layout = proven_layout(write, cache, self._kv_cache_config.num_blocks, sizes)
            found.append(layout.views(cache, sizes))
        assert layout is not None
        blocks = Blocks(found)
        rope = served_rope(section.k_dim)
        sink, codecs = self._sink(blocks, rope)
        self._transfer = PageTransfer(
            blocks,
            sink,
            self._store,
            codecs,
            self._counter,
            timeout=self._settings.timeout,
            queue_pages=self._settings.queue_pages,
        )
        if isinstance(sink, StoreSink):
            self._warm_up(self._transfer, sink.codec, blocks.device)
        first, of = self._parts.heads(self._part)
        _log.info(
            "pages of %d tokens, layout %s, KV heads %d to %d of %d",
            self._page_tokens,
            layout.name,
            first,
            first + section.kv_heads - 1,
            of,
        )

    def _sink(self, blocks: Blocks, rope: Any) -> tuple[PageSink, list[PageCodec]]:
        """What becomes of computed pages; and the codecs of those that are loaded."""
        settings, section = self._settings, self._section
        if self._codec is None:
            assert settings.calibrate is not None
            geometry = Geometry((replace(section, rope=(rope,) * len(section.layers)),))
            namespace = self._namespace()
            model = self._vllm_config.model_config.model.rstrip("/").rpartition("/")[2]
            identity = ModelIdentity(model, "", namespace.digest)
            calibrator = calibrator_of(geometry, identity, settings.calibrate_options)
            path = part_path(settings.calibrate, self._part, self._parts.count)
            heads = self._parts.heads(self._part)
            return LearnSink(calibrator, str(path), settings.calibrate_tokens, heads), []
        assert self._store is not None
        calibration = self._codec.calibration
        expected = calibration.geometry.sections[0].rope or (None,)
        for own in dict.fromkeys(expected):
            check_rope(rope, own)
        key = settings.key(calibration.digest)
        on_device = blocks.device.type == "cuda"
        if not on_device:
            one_blas_thread()
        codec = replace(self._codec, backend="cuda" if on_device else "cpu")
        cores = (os.cpu_count() or 1) // self._parts.ranks
        count = IN_TURN if on_device else max(1, min(_DECODERS, cores))
        codecs = [PageCodec(codec, dtype=self._dtype, key=key) for _ in range(1 + count)]
        others = None
        if settings.bounded == "first":
            others = PageCodec(replace(codec, error_bound=None), dtype=self._dtype, key=key)
        return StoreSink(self._store, codecs[0], self._counter, others), codecs[1:]

    def _warm_up(self, transfer: PageTransfer, codec: PageCodec, device: torch.device) -> None:
        """Compile kernels, make plans and take memory before the first request.

        The page is noise, as large as the cache, which the ``codec`` of stores keeps bit for bit;
        one that does not measure errors codes it all the same.
        """
        assert self._codec is not None
        section, calibration = self._section, self._codec.calibration
        free = _free_memory(device)
        parts = calibration.sections[0].parts(self._codec.plan.sections[0])
        size = np.float32(math.sqrt(sum(x.energy for x in parts) / sum(x.width for x in parts)))
        rng = np.random.default_rng(0)
        k, v = (
            torch.from_numpy(size * rng.standard_normal(shape, dtype=np.float32))
            .to(getattr(torch, self._dtype))
            .to(device)
            for shape in (section.k_shape(self._page_tokens), section.v_shape(self._page_tokens))
        )
        plain = replace(codec.codec, error_bound=None, measure=False)
        loose, identity = PageCodec(plain, dtype=self._dtype), b"warm-up"

        def code() -> list[BlockTable]:
            noise = codec.encode(k, v, positions=0, identity=identity)
            coded = loose.encode(k, v, positions=0)
            found = [
                codec.checked_many([noise], identities=[identity]),
                loose.checked_many([coded]),
            ]
            for _, error in found:
                if error is not None:
                    raise error
            return [table for table, _ in found]

        transfer.warm_up(code)
        if free:
            taken = free - _free_memory(k.device)
            _log.info("the codec takes %.0f MB of device memory", taken / 1e6)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the step's loads, which are waited for in no step."""
        assert self._transfer is not None
        self._transfer.load(self._own(self._metadata().plan.loads))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: requests wait for their pages before they are scheduled."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: pages are stored whole, after the step."""

    def wait_for_save(self) -> None:
        """Nothing: vLLM 0.25 leaves it out in steps that compute nothing, see
        :meth:`get_finished`."""

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Give up pages whose blocks are about to be written to."""
        if self._transfer is not None and isinstance(kv_connector_metadata, KvtcMetadata):
            self._transfer.preempted(kv_connector_metadata.plan.preempted)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Begin to store the step's pages; requests whose pages are stored, and are loaded."""
        assert self._transfer is not None
        metadata = self._metadata()
        if self._parts.writes(self._rank):
            self._transfer.store(self._own(metadata.plan.stores))
        self._transfer.hold(metadata.plan.held)
        if metadata.idle:
            self._transfer.rest(_REST)
        stored, loaded = self._transfer.results()
        return stored or None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that are to be computed after all."""
        assert self._transfer is not None
        return self._transfer.errors()

    def get_kv_connector_stats(self) -> KvtcStats | None:
        """What happened since the last step."""
        stats = KvtcStats.of(self._counter.take())
        return None if stats.is_empty() else stats

    def shutdown(self) -> None:
        """Store what waits, and end all threads."""
        if self._transfer is not None:
            self._transfer.close()
        if self._scheduler is not None:
            self._scheduler.close()

    def _own(self, jobs: Sequence[PageJob]) -> Sequence[PageJob]:
        """What jobs are for this rank."""
        return own_jobs(jobs, self._part, self._parts.count)

    def _metadata(self) -> KvtcMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KvtcMetadata)
        return metadata

    # The scheduler.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that the store has; ``None`` while that is being looked up."""
        assert self._scheduler is not None
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember where pages are to be loaded to."""
        assert self._scheduler is not None
        own = blocks.get_block_ids()[0] if num_external_tokens else []
        self._scheduler.allocated(request, own, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KvtcMetadata:
        """What the worker does in this step."""
        assert self._scheduler is not None
        idle = not scheduler_output.total_num_scheduled_tokens
        return KvtcMetadata(self._scheduler.step(scheduler_output), idle)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep blocks until their pages are stored."""
        assert self._scheduler is not None
        return self._scheduler.finished(request, block_ids[0]), None

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As :meth:`request_finished_all_groups`, without the hybrid memory allocator."""
        return self.request_finished_all_groups(request, (block_ids,))

    @property
    def requires_kv_delivery(self) -> bool:
        """No: a page that was not stored is computed again."""
        return False

    # What both, or none, are asked.

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvtcStats:
        """Counts that came from a worker."""
        return KvtcStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvtcPromMetrics:
        """Counters for Prometheus."""
        return KvtcPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def show_log() -> None:
    """What these modules tell goes where vLLM's own log goes."""
    own, host = logging.getLogger("kvtc_stream.integrations"), logging.getLogger("vllm")
    own.setLevel(host.getEffectiveLevel())
    for handler in host.handlers:
        own.addHandler(handler)  # once: a handler is not added again


def _free_memory(device: torch.device) -> int:
    """Bytes that a CUDA device has left; 0 for others."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
