"""Large pieces of host memory, on large pages where the system has them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from kvtc_stream.io.threads import copy

#: From this many bytes on, asking for large pages is worth it.
LARGE = 4 << 20


def joined(pieces: Sequence[bytes | memoryview]) -> bytes:
    """Concatenate the pieces, like ``b"".join``.

    On Linux, threads copy large results into large pages: mapping small pages one after the other
    takes longer than copying.
    """
    size = sum(map(len, pieces))
    advise = _advise()
    if size < LARGE or advise is None:
        return b"".join(pieces)
    # CPython's own way to make bytes: they are filled before anything else refers to them.
    make = ctypes.pythonapi.PyBytes_FromStringAndSize
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
    out: bytes = make(None, size)
    data = ctypes.cast(ctypes.c_char_p(out), ctypes.c_void_p).value
    assert data is not None
    first = -(-data // mmap.PAGESIZE) * mmap.PAGESIZE
    advise(first, data + size - first, mmap.MADV_HUGEPAGE)  # a hint: failure does no harm
    target = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(data))
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    sources = [np.frombuffer(piece, np.uint8) for piece in pieces]
    copy(sources, [target[end - len(x) : end] for x, end in zip(sources, ends, strict=True)])
    return out


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
