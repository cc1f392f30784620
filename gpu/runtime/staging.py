"""Copies between pageable host memory and the device, through pinned memory.

The driver copies to and from pageable memory on one thread, synchronously. Copies from pinned
memory are asynchronous and as fast as the bus. Copies between pageable and pinned memory use
several threads.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.gpu.kernels.pull import BEYOND, THREADS, UNITS, align, pull
from kvtc_stream.gpu.runtime.dialect import SIMULATED
from kvtc_stream.gpu.runtime.driver import copy_to_device
from kvtc_stream.gpu.runtime.streams import SENDING, stream
from kvtc_stream.io.threads import SHARE, copy

#: Pieces begin at multiples of this on the device.
_ALIGNMENT = 16
#: cudaMemoryTypeHost
_PINNED = 1
#: Bytes of a small copy, and how many buffers there are for these.
_SMALL, _SMALL_BUFFERS = 1 << 20, 16
#: Bytes that small copies to the host share: to ask the pool for each takes tens of microseconds.
_FETCHED = 1 << 16
#: Fewer bytes are not worth sending ahead; more are not at a time, because they are on the device
#: twice until they are used; and how many are known to be there together.
_LEAST_AHEAD, _MOST_AHEAD, _TOGETHER = 32 << 20, 1 << 30, 32 << 20


class Staging:
    """Copies through pinned buffers in turn: two that grow to the largest copy, and more for small
    ones, so that nobody waits for these.

    One thread and one CUDA stream at a time.
    """

    def __init__(self) -> None:
        self._large: deque[_Buffer] = deque()
        self._small: deque[_Buffer] = deque()
        #: What is left for small copies to the host.
        self._fetched = np.empty(0, np.uint8)
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
        room = -(-(ends - begins) // _ALIGNMENT) * _ALIGNMENT
        places, total = np.cumsum(room) - room, int(room.sum())
        addresses = [x.ctypes.data for x in sources]
        held = list(zip(addresses, (x.size for x in sources), strict=True))
        sent = [_Sent.of(*x) for x in held]
        if len(owners) and None not in sent:
            return self._aligned(sent, addresses, owners, begins, ends, places), places
        if not all(_is_pinned(*x) for x in held):
            spans = zip(owners.tolist(), begins.tolist(), ends.tolist(), strict=True)
            parts = [sources[i][a:b] for i, a, b in spans]
            return self._packed(parts, places.tolist(), total), places
        data = cupy.empty(total, np.uint8)
        copy_to_device(
            data.data.ptr + places, np.array(addresses, np.int64)[owners] + begins, ends - begins
        )
        return data, places

    def _aligned(
        self,
        sent: Sequence[Any],
        addresses: Sequence[int],
        owners: NDArray[np.int64],
        begins: NDArray[np.int64],
        ends: NDArray[np.int64],
        places: NDArray[np.int64],
    ) -> Any:
        """Take bytes from what was sent ahead to ``places``; ``addresses`` are the buffers'."""
        units = -(-(ends - begins) // _ALIGNMENT)
        data = cupy.empty(_ALIGNMENT * int(units.sum()), np.uint8)
        firsts = np.array(addresses) - np.array([x.begin for x in sent])
        there = np.array([x.data.data.ptr for x in sent]) + firsts
        tasks = [there[owners] + begins, data.data.ptr + places, units]
        [tasks_d] = self.arrays(np.stack(tasks, axis=1))
        current = cupy.cuda.get_current_stream()
        for i in np.unique(owners).tolist():
            current.wait_event(sent[i].until(int(ends[owners == i].max() + firsts[i])))
        grid = len(owners), -(-int(units.max()) // (THREADS * UNITS))
        align(grid, THREADS, (tasks_d,))
        return data

    def arrays(self, *arrays: NDArray[Any]) -> list[Any]:
        """Upload small arrays in one copy, which is asynchronous."""
        places, total = [], 0
        for x in arrays:
            places.append(total)
            total += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
        sources = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in arrays]
        data = self._packed(sources, places, total)
        return [
            cupy.ndarray(x.shape, x.dtype, data.data + at)
            for x, at in zip(arrays, places, strict=True)
        ]

    def _packed(
        self, sources: Sequence[NDArray[np.uint8]], places: Sequence[int], total: int
    ) -> Any:
        """Upload buffers to ``places`` in an array of ``total`` bytes, a multiple of 16, through
        pinned memory."""
        data = cupy.empty(total, np.uint8)
        if not total:
            return data
        kept, buffer = self._next(total)
        targets = [buffer.memory[at : at + x.size] for at, x in zip(places, sources, strict=True)]
        if kept is self._small:
            for target, x in zip(targets, sources, strict=True):
                target[:] = x
        else:  # all at once: in pieces, as the device takes them, it takes longer
            copy(sources, targets)
        if kept is self._small and not SIMULATED:
            units = total // _ALIGNMENT
            pull(-(-units // (THREADS * UNITS)), THREADS, (buffer.address, data, units))
        else:
            _copy(data.data.ptr, buffer.address, total, cupy.cuda.runtime.memcpyHostToDevice)
        buffer.event.record()
        kept.append(buffer)
        return data

    def begin_fetch(self, data: Any) -> Callable[[], NDArray[Any]]:
        """Begin to copy a small contiguous array from the device; return what waits for it."""
        if data.nbytes > _FETCHED // 16:
            memory = np.frombuffer(pinned(data.nbytes), np.uint8)
        else:
            if self._fetched.size < data.nbytes:
                self._fetched = np.frombuffer(pinned(_FETCHED), np.uint8)
            memory, room = self._fetched, -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
            self._fetched = memory[room:]
        host = memory[: data.nbytes].view(data.dtype).reshape(data.shape)
        _copy_back(host, data)
        return _Fetch(host, recorded())

    def begin_large(self, data: Any) -> tuple[memoryview, Callable[[], Any]]:
        """Begin to copy a contiguous uint8 array from the device; return pinned memory, and what
        waits until the bytes are there."""
        memory = pinned(data.size)
        out = np.frombuffer(memory, np.uint8)
        _copy_back(out, data)
        return memory, _Fetch(out, recorded())

    def fetch(self, data: Any) -> NDArray[np.uint8]:
        """Copy a contiguous uint8 array from the device to the host, and wait."""
        if data.size < SHARE:
            found: NDArray[np.uint8] = cupy.asnumpy(data)
            return found
        memory, ready = self.begin_large(data)
        ready()
        return np.frombuffer(memory, np.uint8)

    def _next(self, size: int) -> tuple[deque[_Buffer], _Buffer]:
        """A buffer with room for ``size`` bytes that is not in use, and where it belongs when the
        copy from it has begun; waits for the oldest if there are enough."""
        kept, most = (self._small, _SMALL_BUFFERS) if size <= _SMALL else (self._large, 2)
        # Copies of several streams do not end in the order in which they begin.
        found = next((i for i, buffer in enumerate(kept) if buffer.event.done), None)
        if found is None and len(kept) == most:
            found = 0
        if found is not None:
            buffer = kept[found]
            del kept[found]
            buffer.event.synchronize()
            if len(buffer.memory) >= size:
                return kept, buffer
        memory = np.frombuffer(
            pinned(_SMALL if size <= _SMALL else 1 << (size - 1).bit_length()), np.uint8
        )
        return kept, _Buffer(memory, memory.ctypes.data, cupy.cuda.Event(disable_timing=True))


class _Sent:
    """Bytes of pinned memory that are on the current device, or on their way there."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.begin, self.size = memory.ctypes.data, memory.size
        self._events = []
        with stream(SENDING):
            self.data = cupy.empty(self.size + BEYOND, np.uint8)
            for first in range(0, self.size, _TOGETHER):
                size, to = min(_TOGETHER, self.size - first), self.data.data.ptr + first
                _copy(to, self.begin + first, size, cupy.cuda.runtime.memcpyHostToDevice)
                self._events.append(recorded())

    @staticmethod
    def of(begin: int, size: int) -> _Sent | None:
        """What was sent of bytes that so many from an address on are part of."""
        device = cupy.cuda.runtime.getDevice()
        for x in _sent():
            if x.data.device.id == device and 0 <= begin - x.begin <= x.size - size:
                return x
        return None

    def until(self, end: int | None = None) -> Any:
        """The event from which on the bytes before ``end``, or all of them, are there."""
        return self._events[-1 if end is None else max(end - 1, 0) // _TOGETHER]


@contextmanager
def sending(streams: Iterable[Any]) -> Iterator[None]:
    """See :meth:`kvtc_stream.backends.base.Backend.sending`: as long, uploads of this thread take
    their parts from what is there."""
    kept, own = _sent(), list[_Sent]()
    try:
        for data in streams:
            if not isinstance(data, memoryview) or not data.contiguous:
                continue
            if not _LEAST_AHEAD <= data.nbytes <= _MOST_AHEAD - sum(x.size for x in kept):
                continue
            memory = np.frombuffer(data, np.uint8)
            if not _is_pinned(memory.ctypes.data, memory.size):
                continue
            try:
                own.append(_Sent(memory))
            except cupy.cuda.memory.OutOfMemoryError:
                break
            kept.append(own[-1])
        yield
    finally:
        for x in own:
            kept.remove(x)
            x.until().synchronize()


_own = threading.local()


def _sent() -> list[_Sent]:
    """What this thread has sent."""
    found: list[_Sent] = _own.__dict__.setdefault("sent", [])
    return found


class _Buffer(NamedTuple):
    """Pinned memory, its address, and the event until which it is in use."""

    memory: NDArray[np.uint8]
    address: int
    event: Any


def _drain(*kept: deque[_Buffer]) -> None:
    for buffer in chain(*kept):
        buffer.event.synchronize()


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


def _is_pinned(address: int, size: int) -> bool:
    attributes = cupy.cuda.runtime.pointerGetAttributes
    return not size or attributes(address).type == _PINNED


def _copy_back(host: NDArray[Any], data: Any) -> None:
    """Copy a contiguous array asynchronously to pinned memory."""
    _copy(host.ctypes.data, data.data.ptr, data.nbytes, cupy.cuda.runtime.memcpyDeviceToHost)


def _copy(to: int, source: int, size: int, kind: int) -> None:
    """Copy asynchronously between addresses in pinned memory and on the device."""
    if size:
        stream = cupy.cuda.get_current_stream().ptr
        cupy.cuda.runtime.memcpyAsync(to, source, size, kind, stream)
