"""What workers of ``vllm_gpu.py``'s engines have beside their own; vLLM imports this in each."""

from __future__ import annotations

from typing import Any

from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm_gpu import Check, draw_weights, part_of, served_shape

from kvtc_stream.integrations.vllm import connector

CHECK = Check()
CHECK.watch()
MEMORY = {"device_bytes": 0}

_load, _register = DummyModelLoader.load_weights, connector.KvtcConnector.register_kv_caches


def load_weights(loader: Any, model: Any, config: Any) -> None:
    _load(loader, model, config)
    part = part_of(served_shape(config.hf_config), get_tensor_model_parallel_world_size())
    draw_weights(model, part, get_tensor_model_parallel_rank())


def register(this: Any, caches: dict[str, Any]) -> None:
    device = next(iter(caches.values())).device
    free = connector._free_memory(device)
    _register(this, caches)
    MEMORY["device_bytes"] = free - connector._free_memory(device)


DummyModelLoader.load_weights = load_weights
connector.KvtcConnector.register_kv_caches = register  # type: ignore[method-assign]


class Extension:
    """Methods of each worker, by ``worker_extension_cls``."""

    def check_restored(self, on: bool) -> None:
        """Whether restored pages are compared with those that were stored."""
        CHECK.on = on

    def restored_errors(self) -> dict[str, float]:
        """Of K and V, the largest relative error of a page."""
        return CHECK.errors

    def codec_bytes(self) -> dict[str, int]:
        """What the codec takes of this worker's device."""
        return MEMORY
