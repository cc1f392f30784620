"""What vLLM's log and its ``/metrics`` tell of pages."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvtc_stream.integrations.vllm.counts import Counts

HELP = {
    "loaded_pages": "Pages decoded into the engine's blocks.",
    "loaded_bytes": "Bytes of the pages that were decoded.",
    "loaded_cache_bytes": "Bytes of KV cache that they became.",
    "load_seconds": "Seconds that loads took, of all requests together.",
    "stored_pages": "Pages that were coded and stored.",
    "stored_bytes": "Bytes of the pages that were stored.",
    "stored_cache_bytes": "Bytes of KV cache that they were made of.",
    "store_seconds": "Seconds that coding and storing took.",
    "known_pages": "Computed pages that the store had already.",
    "missing_pages": "Pages that were gone when they were loaded.",
    "damaged_pages": "Pages that were damaged or another's, and were deleted.",
    "failed_pages": "Pages whose load failed or took too long.",
    "dropped_pages": "Pages that were not stored.",
}


class KvtcStats(KVConnectorStats):  # type: ignore[misc]
    """Counts of one interval; see :class:`kvtc_stream.integrations.vllm.counts.Counts`."""

    @classmethod
    def of(cls, counts: Counts) -> KvtcStats:
        """From a worker's counts; those that are 0 are left out."""
        return cls(data={name: value for name, value in asdict(counts).items() if value})

    def reset(self) -> None:
        """Forget all counts."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another's counts."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Counts, and what they say: ratios, and seconds a page."""
        found: dict[str, int | float] = dict(self.data)
        for kind in ("loaded", "stored"):
            if found.get(f"{kind}_bytes"):
                ratio = found[f"{kind}_cache_bytes"] / found[f"{kind}_bytes"]
                found[f"{kind}_ratio"] = round(ratio, 2)
        return found

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class KvtcPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters ``vllm:kvtc_…`` for Prometheus."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {}
        for name, text in HELP.items():
            counter = self._counter_cls(
                name=f"vllm:kvtc_{name}", documentation=text, labelnames=labelnames
            )
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count one interval."""
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)
