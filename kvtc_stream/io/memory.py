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
    return joining(pieces, room, sealed)()


def joining(
    pieces: Sequence[bytes | memoryview], room: Room | None = None, sealed: Sequence[Sealed] = ()
) -> Callable[[], bytes]:
    """:func:`joined` that threads begin with; what is returned takes part until all is done."""
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    size = int(sizes.sum())
    if size < LARGE or _advise() is None:
        for own in sealed:
            _seal(pieces, own)
        return lambda: b"".join(pieces)
    from kvtc_stream.io.assembly import assemble
    from kvtc_stream.io.xxh3 import LEAST

    out = (room if room is not None and size <= room.most else Room(size)).taken(size)
    begins = _contents(id(out), size).ctypes.data + np.cumsum(sizes) - sizes
    units, seeds = np.zeros((len(sealed), 4), np.int64), np.zeros(len(sealed), np.uint64)
    apart = np.ones(len(pieces), np.bool_)
    for i, (first, last, seed) in enumerate(sealed):
        begin, end = int(begins[first]), int(begins[last])
        if end - begin < LEAST:
            _seal(pieces, sealed[i])
            continue
        units[i], seeds[i] = (first, last, begin, end - begin), seed
        apart[first : last + 1] = False
    addresses, held = _addresses(pieces, sizes)
    copies = np.stack([addresses, begins, sizes], axis=1)
    of_rest, rest = units_of(copies[apart])
    of_rest[:, :2] += len(copies)
    arguments = (
        np.concatenate([units, of_rest]),
        np.concatenate([seeds, np.zeros(len(of_rest), np.uint64)]),
        np.concatenate([copies, rest]),
    )
    shared = Shared(assemble, arguments, size, _COPYING, keeps=(out, held))

    def finish() -> bytes:
        shared.finish()
        return out

    return finish


def _addresses(
    pieces: Sequence[bytes | memoryview], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[Any]]:
    """Where the bytes of each piece are, and what holds them: small ones are copied first."""
    small = sizes < _SMALL
    together = b"".join(pieces[i] for i in np.flatnonzero(small).tolist())
    found = np.zeros(len(pieces), np.int64)
    found[small] = _address(together) + np.cumsum(sizes[small]) - sizes[small]
    large = np.flatnonzero(~small).tolist()
    found[large] = [_address(pieces[i]) for i in large]
    return found, [together, pieces]


def _address(data: bytes | memoryview) -> int:
    where: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0] if data else 0
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
        target = _contents(self._made, most)
        data = target.ctypes.data
        first = -(-data // mmap.PAGESIZE) * mmap.PAGESIZE
        advise = _advise()
        if advise is not None and data + most > first:  # a hint: failure does no harm
            advise(first, data + most - first, mmap.MADV_HUGEPAGE)
        self._mapped: Shared | None = None
        if likely >= LARGE:
            from kvtc_stream.io.assembly import touch

            likely = min(likely, most)
            self._mapped = Shared(touch, (data, likely, SHARE), likely, _MAPPING)

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


def _contents(address: int, size: int) -> NDArray[np.uint8]:
    """The bytes of a ``bytes`` object at an address, to be written."""
    memory = (ctypes.c_uint8 * size).from_address(address + _BYTES_HEAD)
    return np.ctypeslib.as_array(memory)


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
