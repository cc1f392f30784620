"""Copies between pageable host memory and the device, through pinned memory.

The driver copies to and from pageable memory on one thread, synchronously. Copies from pinned
memory are asynchronous and as fast as the bus. Copies between pageable and pinned memory use
several threads.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.gpu.runtime.driver import copy_to_device
from kvtc_stream.io.threads import SHARE, copy

#: Pieces begin at multiples of this on the device.
_ALIGNMENT = 16
#: cudaMemoryTypeHost
_PINNED = 1
#: Bytes of a small copy, and how many buffers there are for these.
_SMALL, _SMALL_BUFFERS = 1 << 19, 8


class Staging:
    """Copies through pinned buffers in turn: two that grow to the largest copy, and more for small
    ones, so that nobody waits for these.

    One thread and one CUDA stream at a time.
    """

    def __init__(self) -> None:
        self._large: deque[_Buffer] = deque()
        self._small: deque[_Buffer] = deque()
        # The pool gives the memory to the next one, which must not write what is still read.
        _when_dropped(self, _drain, self._large, self._small)

    def upload(self, pieces: Sequence[Any]) -> tuple[Any, NDArray[np.int64]]:
        """Upload buffers of bytes to one uint8 array; return it and the offset of each buffer.

        The copy is asynchronous, in the order of the current stream. Pieces in pinned memory must
        not change until it is done.
        """
        sizes = np.array([memoryview(x).nbytes for x in pieces], np.int64)
        return self.upload_parts(
            pieces, np.arange(len(pieces)), np.zeros(len(pieces), np.int64), sizes
        )

    def upload_parts(
        self,
        buffers: Sequence[Any],
        owners: NDArray[np.int64],
        begins: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> tuple[Any, NDArray[np.int64]]:
        """As :meth:`upload`, of bytes ``begins`` to ``ends`` of buffers, whose indices ``owners``
        are."""
        sources = [np.frombuffer(x, np.uint8) for x in buffers]
        if not all(_is_pinned(x) for x in sources):
            spans = zip(owners.tolist(), begins.tolist(), ends.tolist(), strict=True)
            return self._packed([sources[i][a:b] for i, a, b in spans])
        places, total = _places(ends - begins)
        data = cupy.empty(total, np.uint8)
        addresses = np.array([x.ctypes.data for x in sources], np.int64)
        copy_to_device(data.data.ptr + places, addresses[owners] + begins, ends - begins)
        return data, places

    def arrays(self, *arrays: NDArray[Any]) -> list[Any]:
        """Upload small arrays in one copy, which is asynchronous."""
        sources = [np.ascontiguousarray(x) for x in arrays]
        data, begins = self._packed([x.reshape(-1).view(np.uint8) for x in sources])
        return [
            data[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
            for x, at in zip(sources, begins.tolist(), strict=True)
        ]

    def _packed(self, sources: Sequence[NDArray[np.uint8]]) -> tuple[Any, NDArray[np.int64]]:
        """As :meth:`upload`, through a buffer."""
        places, total = _places(np.array([x.size for x in sources], np.int64))
        data = cupy.empty(total, np.uint8)
        if total:
            kept, buffer = self._next(total)
            spans = zip(places.tolist(), sources, strict=True)
            targets = [buffer[at : at + x.size] for at, x in spans]
            if kept is self._small:
                for target, x in zip(targets, sources, strict=True):
                    target[:] = x
            else:  # all at once: in pieces, as the device takes them, it takes longer
                copy(sources, targets)
            _copy(data.data.ptr, buffer, total, "HostToDevice")
            kept.append(_Buffer(buffer, recorded()))
        return data, places

    def begin_fetch(self, data: Any) -> Callable[[], NDArray[Any]]:
        """Begin to copy a small contiguous array from the device; return what waits for it."""
        memory = cupy.cuda.alloc_pinned_memory(data.nbytes)
        host = np.frombuffer(memory, data.dtype, data.size).reshape(data.shape)
        _copy(host, data.data.ptr, data.nbytes, "DeviceToHost")
        return _Fetch(host, recorded())

    def begin_large(self, data: Any) -> tuple[memoryview, Callable[[], Any]]:
        """Begin to copy a contiguous uint8 array from the device; return pinned memory, and what
        waits until the bytes are there."""
        memory = pinned(data.size)
        out = np.frombuffer(memory, np.uint8)
        _copy(out, data.data.ptr, data.size, "DeviceToHost")
        return memory, _Fetch(out, recorded())

    def fetch(self, data: Any) -> NDArray[np.uint8]:
        """Copy a contiguous uint8 array from the device to the host, and wait."""
        if data.size < SHARE:
            found: NDArray[np.uint8] = cupy.asnumpy(data)
            return found
        memory, ready = self.begin_large(data)
        ready()
        return np.frombuffer(memory, np.uint8)

    def _next(self, size: int) -> tuple[deque[_Buffer], NDArray[np.uint8]]:
        """A buffer with room for ``size`` bytes that is not in use, and where it belongs when the
        copy from it has begun; waits for the oldest if there are enough."""
        kept, most = (self._small, _SMALL_BUFFERS) if size <= _SMALL else (self._large, 2)
        if kept and (len(kept) == most or kept[0].event.done):
            buffer, event = kept.popleft()
            event.synchronize()
            if len(buffer) >= size:
                return kept, buffer
        size = _SMALL if size <= _SMALL else 1 << (size - 1).bit_length()
        return kept, np.frombuffer(pinned(size), np.uint8)


class _Buffer(NamedTuple):
    """Pinned memory, in use until the event has come."""

    memory: NDArray[np.uint8]
    event: Any


def _places(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Where pieces of so many bytes begin on the device, one after the other, and the end."""
    room = -(-sizes // _ALIGNMENT) * _ALIGNMENT
    return np.cumsum(room) - room, int(room.sum())


def _drain(*kept: deque[_Buffer]) -> None:
    for _, event in chain(*kept):
        event.synchronize()


def _when_dropped(owner: Any, call: Callable[..., object], *arguments: Any) -> None:
    """Call a function when ``owner`` is gone, while what it needs is there for certain.

    A ``__del__`` may come too late: of objects that refer to each other, as those that a traceback
    keeps do, an event may have been destroyed before. At exit nobody takes the memory.
    """
    weakref.finalize(owner, call, *arguments).atexit = False


def recorded() -> Any:
    """An event after the current stream's work so far."""
    event = cupy.cuda.Event(disable_timing=True)
    event.record()
    return event


class _Fetch:
    """A copy to the host that is under way. Who drops it waits for it too: the pool gives the
    memory to the next one, which the copy must not write into."""

    def __init__(self, host: NDArray[Any], event: Any) -> None:
        self._host, self._event = host, event
        _when_dropped(self, event.synchronize)

    def __call__(self) -> NDArray[Any]:
        self._event.synchronize()
        return self._host


def pinned(size: int) -> memoryview:
    """Pinned memory, which its pool takes back when nobody refers to it any more."""
    # Powers of two, so that the pool finds one that was used before.
    memory = cupy.cuda.alloc_pinned_memory(1 << max(size - 1, 1).bit_length())
    return np.frombuffer(memory, np.uint8, size).data


def _is_pinned(memory: NDArray[np.uint8]) -> bool:
    attributes = cupy.cuda.runtime.pointerGetAttributes
    return not memory.size or attributes(memory.ctypes.data).type == _PINNED


def _copy(to: Any, source: Any, size: int, kind: str) -> None:
    """Copy asynchronously between pinned memory and a device address."""
    runtime = cupy.cuda.runtime
    if size:
        to, source = (x.ctypes.data if isinstance(x, np.ndarray) else x for x in (to, source))
        stream = cupy.cuda.get_current_stream().ptr
        runtime.memcpyAsync(to, source, size, getattr(runtime, f"memcpy{kind}"), stream)
