"""Large pieces of host memory, on large pages where the system has them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.io.threads import SHARE, begin, copy

#: From this many bytes on, asking for large pages is worth it.
LARGE = 4 << 20


def joined(pieces: Sequence[bytes | memoryview], room: Room | None = None) -> bytes:
    """Concatenate the pieces, like ``b"".join``.

    On Linux, threads copy large results into large pages: mapping small pages one after the other
    takes longer than copying. ``room`` is used if the pieces fit.
    """
    size = sum(map(len, pieces))
    if size < LARGE or _advise() is None:
        return b"".join(pieces)
    out = (room if room is not None and size <= room.most else Room(size)).taken(size)
    target = _contents(id(out), size)
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    sources = [np.frombuffer(piece, np.uint8) for piece in pieces]
    copy(sources, [target[end - len(x) : end] for x, end in zip(sources, ends, strict=True)])
    return out


class Room:
    """Memory for a large ``bytes``, on large pages where the system has them.

    Parameters
    ----------
    most
        Bytes that there is room for. Memory that is never written to is not taken.
    likely
        So many of them threads begin to map now: it takes longer than copying, and can be done
        before the bytes are known.
    """

    def __init__(self, most: int, likely: int = 0) -> None:
        self.most = most
        # CPython's own way to make bytes: they are filled before anything else refers to them.
        self._made = _api("PyBytes_FromStringAndSize", None, ctypes.c_ssize_t(most))
        target = _contents(self._made, most)
        data = target.ctypes.data
        first = -(-data // mmap.PAGESIZE) * mmap.PAGESIZE
        advise = _advise()
        if advise is not None and data + most > first:  # a hint: failure does no harm
            advise(first, data + most - first, mmap.MADV_HUGEPAGE)
        pieces = [(target[at : at + SHARE],) for at in range(0, min(likely, most), SHARE)]
        self._mapped = begin(_touch, pieces, len(pieces) * SHARE) if likely >= LARGE else None

    def taken(self, size: int) -> bytes:
        """Bytes of this size with any contents; at most once."""
        self._wait()
        pointer, self._made = ctypes.c_void_p(self._made), None
        if size != self.most:
            _api("_PyBytes_Resize", ctypes.byref(pointer), ctypes.c_ssize_t(size))
        out: bytes = ctypes.cast(pointer, ctypes.py_object).value
        _api("Py_DecRef", pointer)
        return out

    def _wait(self) -> None:
        if self._mapped is not None:
            self._mapped()
            self._mapped = None

    def __del__(self) -> None:
        if self._made is not None:
            self._wait()
            _api("Py_DecRef", ctypes.c_void_p(self._made))


#: Bytes of an empty ``bytes`` before its contents: those have a byte more, 0.
_BYTES_HEAD = bytes.__basicsize__ - 1


def _contents(address: int, size: int) -> NDArray[np.uint8]:
    """The bytes of a ``bytes`` object at an address, to be written."""
    memory = (ctypes.c_uint8 * size).from_address(address + _BYTES_HEAD)
    return np.ctypeslib.as_array(memory)


def _touch(memory: NDArray[np.uint8]) -> None:
    memory[:: mmap.PAGESIZE] = 0


def _api(name: str, *arguments: Any) -> Any:
    """Call CPython; addresses go in and out, which nobody counts."""
    function = ctypes.pythonapi[name]
    function.restype = ctypes.c_void_p
    return function(*arguments)


def copied(data: memoryview) -> memoryview:
    """A read-only copy, on large pages if it is large."""
    out = empty(len(data))
    copy([np.frombuffer(data, np.uint8)], [np.frombuffer(out, np.uint8)])
    return out.toreadonly()


def empty(size: int) -> memoryview:
    """Uninitialised memory; NumPy asks for large pages if it is large."""
    return np.empty(size, np.uint8).data


@cache
def _advise() -> Callable[..., Any] | None:
    """The C library's ``madvise``, or ``None`` if the system has no large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
