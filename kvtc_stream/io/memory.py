"""Large pieces of host memory, on large pages where the system has them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtc_stream.io.threads import SHARE, Shared, copy, units_of

#: From this many bytes on, asking for large pages is worth it.
LARGE = 4 << 20
#: Maximum numbers of threads that map memory, beside others, and that fill it.
_MAPPING, _COPYING = 5, 8
#: Smaller pieces are joined before threads copy them.
_SMALL = 1 << 14


class Sealed(NamedTuple):
    """Pieces whose checksum comes behind them.

    That of ``pieces[first:last]``, XXH3 with ``seed``, takes the place of ``pieces[last]``, which
    is 8 bytes that can be written to.
    """

    first: int
    last: int
    seed: int


def joined(
    pieces: Sequence[bytes | memoryview], room: Room | None = None, sealed: Sequence[Sealed] = ()
) -> bytes:
    """Concatenate the pieces, like ``b"".join``, once checksums have taken their places.

    On Linux, threads copy large results into large pages: mapping small pages one after the other
    takes longer than copying; and they compute checksums of what they have copied just now.
    ``room`` is used if the pieces fit.
    """
    return Joining(pieces, room, sealed).finish()


class Joining:
    """:func:`joined` in steps: where bytes go is known before all of them are there.

    Views may be of memory that is yet to be filled, until :meth:`begin`.
    """

    def __init__(
        self,
        pieces: Sequence[bytes | memoryview],
        room: Room | None = None,
        sealed: Sequence[Sealed] = (),
    ) -> None:
        self._pieces = pieces
        #: Checksums that are not computed from what was copied.
        self._apart = list(sealed)
        self._out: bytes | None = None
        self._shared: Shared | None = None
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        size = int(sizes.sum())
        if size < LARGE or _advise() is None:
            return
        from kvtc_stream.io.xxh3 import LEAST

        out = (room if room is not None and size <= room.most else Room(size)).taken(size)
        begins = id(out) + _BYTES_HEAD + np.cumsum(sizes) - sizes
        edges = np.array([own[:2] for own in sealed], np.int64).reshape(-1, 2)
        spans = begins[edges]
        long = spans[:, 1] - spans[:, 0] >= LEAST
        self._apart = [own for own, found in zip(sealed, long.tolist(), strict=True) if not found]
        with_sums = np.zeros(len(pieces), np.bool_)
        for first, last in edges[long].tolist():
            with_sums[first : last + 1] = True
        copied = np.ones(len(pieces), np.bool_)
        copied[edges[long, 1]] = False
        addresses, self._held = _addresses(pieces, sizes, copied)
        copies = np.stack([addresses, begins, sizes], axis=1)
        units, rest = units_of(copies[~with_sums])
        units[:, :2] += len(copies)
        of_long = np.concatenate([edges, spans[:, :1], np.diff(spans)], axis=1)[long]
        seeds = np.zeros(len(of_long) + len(units), np.uint64)
        seeds[: len(of_long)] = np.array([own.seed for own in sealed], np.uint64)[long]
        self._out, self._size = out, size
        self._arguments = np.concatenate([of_long, units]), seeds, np.concatenate([copies, rest])

    def begin(self) -> None:
        """Let threads begin: all bytes are there."""
        while self._apart:
            _seal(self._pieces, self._apart.pop())
        if self._out is not None and self._shared is None:
            from kvtc_stream.io.assembly import assemble

            keeps = self._out, self._held
            units = len(self._arguments[0])
            self._shared = Shared(assemble, units, self._arguments, self._size, _COPYING, keeps)

    def finish(self) -> bytes:
        """Take part until all is done; the bytes, once."""
        self.begin()
        if self._shared is None or self._out is None:
            return b"".join(self._pieces)
        self._shared.finish()
        out, self._out = self._out, None
        return out


def _addresses(
    pieces: Sequence[bytes | memoryview], sizes: NDArray[np.int64], wanted: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], Any]:
    """Where the wanted pieces are, int64 [pieces], and what must be kept: small ones that cannot
    change any more are copied."""
    small = [x if type(x) is bytes and len(x) < _SMALL else b"" for x in pieces]
    together = b"".join(small)
    held = np.fromiter(map(len, small), np.int64, len(small))
    found = _address(together) + np.cumsum(held) - held
    for i in np.flatnonzero(wanted & (held < sizes)).tolist():
        found[i] = _address(pieces[i])
    return found, (together, pieces)


def _address(data: bytes | memoryview) -> int:
    where: int = np.frombuffer(data, np.uint8).ctypes.data if len(data) else 0
    return where


def _seal(pieces: Sequence[bytes | memoryview], sealed: Sealed) -> None:
    """Compute a checksum and put it in its place."""
    state = xxhash.xxh3_64(seed=sealed.seed)
    for piece in pieces[sealed.first : sealed.last]:
        state.update(piece)
    place = pieces[sealed.last]
    assert isinstance(place, memoryview)
    place[:] = state.intdigest().to_bytes(8, "little")


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
        data = self._made + _BYTES_HEAD
        first = -(-data // mmap.PAGESIZE) * mmap.PAGESIZE
        advise = _advise()
        if advise is not None and data + most > first:  # a hint: failure does no harm
            advise(first, data + most - first, mmap.MADV_HUGEPAGE)
        self._mapped: Shared | None = None
        if likely >= LARGE:
            from kvtc_stream.io.assembly import touch

            likely = min(likely, most)
            units = -(-likely // SHARE)
            self._mapped = Shared(touch, units, (data, likely, SHARE), likely, _MAPPING)

    def taken(self, size: int) -> bytes:
        """Bytes of this size with any contents; at most once."""
        self._settle()
        pointer, self._made = ctypes.c_void_p(self._made), None
        if size != self.most:
            _api("_PyBytes_Resize", ctypes.byref(pointer), ctypes.c_ssize_t(size))
        out: bytes = ctypes.cast(pointer, ctypes.py_object).value
        _api("Py_DecRef", pointer)
        return out

    def _settle(self) -> None:
        if self._mapped is not None:
            self._mapped.stop()  # what is not mapped yet is when it is written to
            self._mapped = None

    def __del__(self) -> None:
        if self._made is not None:
            self._settle()
            _api("Py_DecRef", ctypes.c_void_p(self._made))


#: Bytes of an empty ``bytes`` before its contents: those have a byte more, 0.
_BYTES_HEAD = bytes.__basicsize__ - 1


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
