"""LMCache's L2 interface: its own where it is installed, else what stands in for it.

The stand-in has what ``KvtcAdapter`` inherits and calls, and nothing that it would test.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from real_sample import RealSample

_ROOT = "lmcache.v1"
_ADAPTER = "kvtc_stream.integrations.lmcache.adapter"


def lmcache_is_there() -> bool:
    try:
        __import__(f"{_ROOT}.distributed.l2_adapters.base")
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class _ObjectKey:
    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int = 0
    cache_salt: str = ""


@dataclass(frozen=True)
class _Layout:
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]


class _StoreResult(int):
    def __new__(cls, success: bool, bytes_transferred: int) -> _StoreResult:
        return super().__new__(cls, bytes_transferred if success else -1)

    def is_successful(self) -> bool:
        return self >= 0

    def bytes_transferred(self) -> int:
        return max(self, 0)


class _Bitmap:
    def __init__(self, size: int) -> None:
        self._bits = [False] * size

    def set(self, i: int) -> None:
        self._bits[i] = True

    def test(self, i: int) -> bool:
        return self._bits[i]


class _Notifier:
    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def notify(self) -> None:
        os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        os.close(self._fd)


class _Interface(ABC):
    """The base class of L2 adapters, as far as it is used."""

    def __init__(self) -> None:
        self._listeners: list[Any] = []
        self._bytes: Counter[str] = Counter()

    def register_listener(self, listener: Any) -> None:
        self._listeners.append(listener)

    def _notify_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self._count(keys, sizes, 1)
        for listener in self._listeners:
            listener.on_l2_keys_stored(keys, sizes)

    def _notify_keys_deleted(self, keys: list[Any], sizes: list[int]) -> None:
        self._count(keys, sizes, -1)
        for listener in self._listeners:
            listener.on_l2_keys_deleted(keys)

    def _notify_keys_accessed(self, keys: list[Any]) -> None:
        for listener in self._listeners:
            listener.on_l2_keys_accessed(keys)

    def _count(self, keys: list[Any], sizes: list[int], sign: int) -> None:
        for key, size in zip(keys, sizes, strict=True):
            self._bytes[key.cache_salt] += sign * size

    def get_usage(self) -> Any:
        used = {salt: size for salt, size in self._bytes.items() if size}
        return SimpleNamespace(bytes_by_cache_salt=used, total_bytes_used=sum(used.values()))

    @abstractmethod
    def get_store_event_fd(self) -> int: ...

    @abstractmethod
    def get_lookup_and_lock_event_fd(self) -> int: ...

    @abstractmethod
    def get_load_event_fd(self) -> int: ...

    @abstractmethod
    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int: ...

    @abstractmethod
    def pop_completed_store_tasks(self) -> dict[int, Any]: ...

    @abstractmethod
    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: Any) -> int: ...

    @abstractmethod
    def query_lookup_and_lock_result(self, task_id: int) -> Any: ...

    @abstractmethod
    def submit_unlock(self, keys: list[Any]) -> None: ...

    @abstractmethod
    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int: ...

    @abstractmethod
    def query_load_result(self, task_id: int) -> Any: ...

    @abstractmethod
    def close(self) -> None: ...


_STAND_INS: Mapping[str, Mapping[str, Any]] = {
    "lmcache.lmcache_native": {"Bitmap": _Bitmap},
    f"{_ROOT}.distributed.api": {"ObjectKey": _ObjectKey, "MemoryLayoutDesc": _Layout},
    f"{_ROOT}.distributed.internal_api": {"L2StoreResult": _StoreResult},
    f"{_ROOT}.distributed.l2_adapters.base": {"L2AdapterInterface": _Interface},
    f"{_ROOT}.memory_management": {"MemoryObj": object},
    f"{_ROOT}.platform": {"create_event_notifier": _Notifier},
}


@contextmanager
def lmcache_host() -> Iterator[Any]:
    """``KvtcAdapter``, ``ObjectKey`` and ``MemoryLayoutDesc``, on LMCache or what stands in."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not lmcache_is_there():
            for name, names in _STAND_INS.items():
                parts = name.split(".")
                for i in range(1, len(parts) + 1):
                    module = ModuleType(".".join(parts[:i]))
                    module.__path__ = []
                    if module.__name__ not in sys.modules:
                        monkeypatch.setitem(sys.modules, module.__name__, module)
                vars(sys.modules[name]).update(names)
            monkeypatch.delitem(sys.modules, _ADAPTER, raising=False)
        api = importlib.import_module(f"{_ROOT}.distributed.api")
        yield SimpleNamespace(
            KvtcAdapter=importlib.import_module(_ADAPTER).KvtcAdapter,
            ObjectKey=api.ObjectKey,
            MemoryLayoutDesc=api.MemoryLayoutDesc,
        )
        if not lmcache_is_there():
            del sys.modules[_ADAPTER]


class Memory:
    """Memory of one chunk, as far as adapters see it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def get_shapes(self) -> list[torch.Size]:
        return [self.tensor.shape]

    def get_dtypes(self) -> list[torch.dtype]:
        return [self.tensor.dtype]


def filled(
    sample: RealSample,
    start: int,
    size: int,
    *,
    fused: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Memory:
    """The chunk of some tokens, value by value."""
    k, v = (
        torch.from_numpy(x[:, :, start : start + size].astype(np.float32)).to(dtype)
        for x in (sample.k, sample.v)
    )
    layers, heads, tokens, dim = k.shape
    if fused:
        both = torch.cat([k, v], dim=-1).permute(0, 2, 1, 3)
        return Memory(both.reshape(layers, tokens, heads * 2 * dim).contiguous())
    return Memory(
        torch.stack([x.permute(0, 2, 1, 3).reshape(layers, tokens, heads * dim) for x in (k, v)])
    )


class Driver:
    """An adapter, asked as LMCache's controllers ask it: by tasks, and woken by descriptors."""

    def __init__(self, host: Any, params: Mapping[str, Any]) -> None:
        self._host = host
        self.adapter = host.KvtcAdapter(dict(params))

    def store(self, keys: Sequence[Any], objects: Sequence[Memory]) -> Any:
        """The result of a task."""
        task = self.adapter.submit_store_task(list(keys), list(objects))
        woken(self.adapter.get_store_event_fd())
        found = self.adapter.pop_completed_store_tasks()
        assert list(found) == [task]
        assert self.adapter.pop_completed_store_tasks() == {}
        return found[task]

    def lookup(self, keys: Sequence[Any], like: Memory) -> list[bool]:
        """Which chunks were found, and locked."""
        layout = self._host.MemoryLayoutDesc(like.get_shapes(), like.get_dtypes())
        groups = {key.object_group_id: layout for key in keys}
        task = self.adapter.submit_lookup_and_lock_task(list(keys), groups)
        woken(self.adapter.get_lookup_and_lock_event_fd())
        found = self.adapter.query_lookup_and_lock_result(task)
        assert self.adapter.query_lookup_and_lock_result(task) is None
        return [found.test(i) for i in range(len(keys))]

    def load(self, keys: Sequence[Any], objects: Sequence[Memory]) -> list[bool]:
        """Which chunks were loaded."""
        task = self.adapter.submit_load_task(list(keys), list(objects))
        woken(self.adapter.get_load_event_fd())
        found = self.adapter.query_load_result(task)
        assert self.adapter.query_load_result(task) is None
        return [found.test(i) for i in range(len(keys))]

    def find(self, keys: Sequence[Any], like: Memory) -> list[bool]:
        """Which chunks are there; none is locked afterwards."""
        found = self.lookup(keys, like)
        self.adapter.submit_unlock([key for key, hit in zip(keys, found, strict=True) if hit])
        return found


def woken(descriptor: int, seconds: float = 60) -> None:
    """Wait until a descriptor is readable, and take the sign that it gives."""
    assert select.select([descriptor], [], [], seconds)[0], "nobody was woken"
    os.eventfd_read(descriptor)
