"""Copies between pageable host memory and the device, through pinned memory.

The driver copies to and from pageable memory on one thread, synchronously. Copies from pinned
memory are asynchronous and as fast as the bus. Copies between pageable and pinned memory use
several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.io.threads import SHARE, copy

#: Pieces begin at multiples of this on the device.
_ALIGNMENT = 16
#: cudaMemoryTypeHost
_PINNED = 1


class Staging:
    """Copies through two pinned buffers in turn, which grow to the largest copy.

    One thread and one CUDA stream at a time.
    """

    def __init__(self) -> None:
        empty: tuple[NDArray[np.uint8], Any] = np.empty(0, np.uint8), None
        self._buffers = [empty, empty]

    def __del__(self) -> None:
        # The pool gives the memory to the next one, which must not write what is still read.
        for _, event in self._buffers:
            if event is not None:
                event.synchronize()

    def upload(self, pieces: Sequence[Any]) -> tuple[Any, NDArray[np.int64]]:
        """Upload buffers of bytes to one uint8 array; return it and the offset of each buffer.

        The copy is asynchronous, in the order of the current stream. Pieces in pinned memory must
        not change until it is done.
        """
        sources = [np.frombuffer(piece, np.uint8) for piece in pieces]
        sizes = np.array([x.size for x in sources], np.int64)
        ends = np.cumsum(-(-sizes // _ALIGNMENT) * _ALIGNMENT)
        begins = np.concatenate([[0], ends])[:-1]
        total = int(ends[-1]) if len(ends) else 0
        data = cupy.empty(total, np.uint8)
        places = begins.tolist()
        if _are_pinned(pieces, sources):
            runtime, to = cupy.cuda.runtime, data.data.ptr
            copy_async, kind = runtime.memcpyAsync, runtime.memcpyHostToDevice
            stream = cupy.cuda.get_current_stream().ptr
            for source, begin in zip(sources, places, strict=True):
                if source.size:
                    copy_async(to + begin, source.ctypes.data, source.size, kind, stream)
        else:
            buffer = self._next(total)
            copy(sources, [buffer[b : b + s.size] for s, b in zip(sources, places, strict=True)])
            _copy(data.data.ptr, buffer, total, "HostToDevice")
            self._used(buffer)
        return data, begins

    def arrays(self, *arrays: NDArray[Any]) -> list[Any]:
        """Upload small arrays in one copy, which is asynchronous."""
        sources = [np.ascontiguousarray(x) for x in arrays]
        data, begins = self.upload([x.view(np.uint8).reshape(-1) for x in sources])
        return [
            data[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
            for x, at in zip(sources, begins.tolist(), strict=True)
        ]

    def begin_fetch(self, data: Any) -> Callable[[], NDArray[Any]]:
        """Begin to copy a small contiguous array from the device; return what waits for it."""
        memory = cupy.cuda.alloc_pinned_memory(data.nbytes)
        host = np.frombuffer(memory, data.dtype, data.size).reshape(data.shape)
        _copy(host, data.data.ptr, data.nbytes, "DeviceToHost")
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        return _Fetch(host, event)

    def begin_large(self, data: Any) -> tuple[memoryview, Callable[[], Any]]:
        """Begin to copy a contiguous uint8 array from the device; return pinned memory, and what
        waits until the bytes are there."""
        memory = pinned(data.size)
        out = np.frombuffer(memory, np.uint8)
        _copy(out, data.data.ptr, data.size, "DeviceToHost")
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        return memory, _Fetch(out, event)

    def fetch(self, data: Any) -> NDArray[np.uint8]:
        """Copy a contiguous uint8 array from the device to the host, and wait."""
        if data.size < SHARE:
            found: NDArray[np.uint8] = cupy.asnumpy(data)
            return found
        memory, ready = self.begin_large(data)
        ready()
        return np.frombuffer(memory, np.uint8)

    def _next(self, size: int) -> NDArray[np.uint8]:
        """Wait for the next buffer to be free, and return it with room for ``size`` bytes."""
        buffer, event = self._buffers.pop(0)
        if event is not None:
            event.synchronize()
        if len(buffer) < size:
            size = 1 << (size - 1).bit_length()
            buffer = np.frombuffer(pinned(size), np.uint8)
        self._buffers.append((buffer, None))
        return buffer

    def _used(self, buffer: NDArray[np.uint8]) -> None:
        """Record that the buffer is in use until the stream's current work is done."""
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        self._buffers[-1] = buffer, event


class _Fetch:
    """A copy to the host that is under way. Who drops it waits for it too: the pool gives the
    memory to the next one, which the copy must not write into."""

    def __init__(self, host: NDArray[Any], event: Any) -> None:
        self._host, self._event = host, event

    def __call__(self) -> NDArray[Any]:
        self._event.synchronize()
        return self._host

    def __del__(self) -> None:
        self._event.synchronize()


def pinned(size: int) -> memoryview:
    """Pinned memory, which its pool takes back when nobody refers to it any more."""
    # Powers of two, so that the pool finds one that was used before.
    memory = cupy.cuda.alloc_pinned_memory(1 << max(size - 1, 1).bit_length())
    return np.frombuffer(memory, np.uint8, size).data


def _are_pinned(pieces: Sequence[Any], sources: Sequence[NDArray[np.uint8]]) -> bool:
    """Whether all pieces are in pinned memory; those of one owner are asked for once."""
    owners = {
        id(piece.obj) if isinstance(piece, memoryview) else id(piece): source
        for piece, source in zip(pieces, sources, strict=True)
        if source.size
    }
    attributes = cupy.cuda.runtime.pointerGetAttributes
    return all(attributes(x.ctypes.data).type == _PINNED for x in owners.values())


def _copy(to: Any, source: Any, size: int, kind: str) -> None:
    """Copy asynchronously between pinned memory and a device address."""
    runtime = cupy.cuda.runtime
    if size:
        to, source = (x.ctypes.data if isinstance(x, np.ndarray) else x for x in (to, source))
        stream = cupy.cuda.get_current_stream().ptr
        runtime.memcpyAsync(to, source, size, getattr(runtime, f"memcpy{kind}"), stream)
