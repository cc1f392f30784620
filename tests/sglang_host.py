"""SGLang's base class and host pool: its own where it is installed, else what stands in for them.

The stand-in has what ``KvtcStorage`` inherits and calls, and nothing that it would test.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

MODULE = "sglang.srt.mem_cache.hicache_storage"


def sglang_is_there() -> bool:
    try:
        __import__(MODULE)
    except ImportError:
        return False
    return True


class StandIn(ABC):
    """The base class of SGLang's storage backends, as far as it is used."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    @abstractmethod
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any: ...

    @abstractmethod
    def batch_get(
        self, keys: Any, target_locations: Any = None, target_sizes: Any = None
    ) -> Any: ...

    @abstractmethod
    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool: ...

    @abstractmethod
    def batch_set(
        self, keys: Any, values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool: ...

    @abstractmethod
    def exists(self, key: str) -> bool: ...

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        found = [self.exists(key) for key in keys]
        return found.index(False) if False in found else len(found)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where SGLang would be, until the test ends."""
    parts = MODULE.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules[MODULE].HiCacheStorage = StandIn  # type: ignore[attr-defined]
    name = "kvtc_stream.integrations.sglang"
    for own in (name, f"{name}.storage"):
        monkeypatch.delitem(sys.modules, own, raising=False)


@dataclass
class Config:
    """What the factory gives to a backend: SGLang's ``HiCacheStorageConfig``."""

    extra_config: dict[str, Any]
    model_name: str = "a-model"
    tp_size: int = 1
    pp_size: int = 1
    attn_cp_size: int = 1
    dcp_size: int = 1
    is_mla_model: bool = False
    should_split_heads: bool = False


class Pool:
    """A host pool without a device: pages in one of SGLang's layouts."""

    def __init__(self, layout: str, shape: tuple[int, int, int, int, int]) -> None:
        self.layout, self.dtype = layout, torch.bfloat16
        pages, self.layer_num, self.head_num, self.page_size, self.head_dim = shape
        layers, heads, size, dim = shape[1:]
        dims = {
            "layer_first": (2, layers, pages * size, heads, dim),
            "page_first": (2, pages * size, layers, heads, dim),
            "page_first_direct": (2, pages, layers, size, heads, dim),
            "page_head": (2, pages, heads, size, layers, dim),
        }[layout]
        self.kv_buffer = torch.zeros(dims, dtype=self.dtype)

    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        first, last, page = index, index + self.page_size, index // self.page_size
        if self.layout == "layer_first":
            found = self.kv_buffer[:, :, first:last]
        elif self.layout == "page_first":
            found = self.kv_buffer[:, first:last]
        else:
            found = self.kv_buffer[:, page : page + 1]
        return found.flatten() if flat else found

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self.get_data_page(0))

    def fill(self, page: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K and V [layers, kv_heads, tokens, head_dim], value by value."""
        for half, x in enumerate((k, v)):
            own = self.get_data_page(page * self.page_size, flat=False)[half]
            order = {
                "layer_first": (0, 2, 1, 3),
                "page_first": (2, 0, 1, 3),
                "page_first_direct": (0, 2, 1, 3),
                "page_head": (1, 2, 0, 3),
            }[self.layout]
            own.copy_(x.permute(order).reshape(own.shape))
