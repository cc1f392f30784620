"""Large pieces of host memory, on large pages where the system has them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtc_stream.io.threads import SHARE, Shared, copy, units_of

#: From this many bytes on, asking for large pages is worth it.
LARGE = 4 << 20
#: Maximum numbers of threads that map memory, beside others, and that fill it.
_MAPPING, _COPYING = 5, 8
#: Bytes of a checksum.
_SUM = 8


class Sealed(NamedTuple):
    """Pieces, and behind them the checksum of all but the first: 8 bytes, XXH3 with ``seed``."""

    pieces: list[bytes | memoryview]
    seed: int

    @property
    def size(self) -> int:
        """All bytes, with the checksum."""
        return sum(map(len, self.pieces)) + _SUM

    @property
    def covered(self) -> int:
        """Bytes that the checksum is of."""
        return sum(map(len, self.pieces[1:]))

    def checksum(self) -> bytes:
        """What comes behind the pieces."""
        state = xxhash.xxh3_64(seed=self.seed)
        for piece in self.pieces[1:]:
            state.update(piece)
        return state.intdigest().to_bytes(_SUM, "little")

    def each(self) -> Iterator[Sealed]:
        """It alone."""
        yield self

    def copied(self, at: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
        """The copies that put it at an address, its unit among them, and the seed; as
        :func:`kvtc_stream.io.assembly.assemble` takes them."""
        copies = np.array(_placed(self.pieces, at), np.int64)
        unit = np.array([[0, len(copies), at + len(self.pieces[0]), self.covered]], np.int64)
        return copies, unit, np.array([self.seed], np.uint64)


class SealedRows(NamedTuple):
    """Many of :class:`Sealed`, one after the other: a row of an array and a part of a buffer each.

    Attributes
    ----------
    rows, apart
        uint8 [count, bytes], contiguous; and of how many bytes of a row the checksum is not.
    data, places
        A buffer, and int64 [count, 2]: where each part begins in it, and its bytes.
    seeds
        uint64 [count].
    """

    rows: NDArray[np.uint8]
    apart: int
    data: memoryview
    places: NDArray[np.int64]
    seeds: NDArray[np.uint64]

    @property
    def size(self) -> int:
        """All bytes, with the checksums."""
        return self.rows.size + int(self.places[:, 1].sum()) + _SUM * len(self.rows)

    @property
    def covered(self) -> int:
        """Fewest bytes that a checksum is of."""
        fewest: int = self.places[:, 1].min() + self.rows.shape[1] - self.apart
        return fewest

    def each(self) -> Iterator[Sealed]:
        """One by one."""
        width, rows = self.rows.shape[1], self.rows.tobytes()
        for i, (at, size) in enumerate(self.places.tolist()):
            row = rows[i * width : (i + 1) * width]
            head, rest = row[: self.apart], row[self.apart :]
            yield Sealed([head, rest, self.data[at : at + size]], int(self.seeds[i]))

    def copied(self, at: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
        """See :meth:`Sealed.copied`."""
        (count, width), sizes = self.rows.shape, self.places[:, 1]
        lengths, each = width + sizes + _SUM, np.arange(count)
        to = at + np.cumsum(lengths) - lengths
        sources = self.rows.ctypes.data + width * each, _address(self.data) + self.places[:, 0]
        copies = np.stack([sources[0], to, np.full(count, width), sources[1], to + width, sizes], 1)
        units = np.stack([2 * each, 2 * each + 2, to + self.apart, lengths - self.apart - _SUM], 1)
        return copies.reshape(-1, 3), units, self.seeds


Piece: TypeAlias = bytes | memoryview | Sealed | SealedRows


def joined(pieces: Sequence[Piece], room: Room | None = None) -> bytes:
    """Concatenate the pieces, like ``b"".join``, and put checksums in their places.

    On Linux, threads copy large results into large pages: mapping small pages one after the other
    takes longer than copying; and they compute checksums of what they have copied just now.
    ``room`` is used if the pieces fit.
    """
    return Joining(pieces, room).finish()


class Joining:
    """:func:`joined` in steps: where bytes go is known before all of them are there.

    Views may be of memory that is yet to be filled, until :meth:`begin`.
    """

    def __init__(self, pieces: Sequence[Piece], room: Room | None = None) -> None:
        self._pieces = pieces
        #: Those with checksums that are not computed from what was copied, and what becomes these.
        self._short: list[tuple[Sealed, bytearray]] = []
        self._out: bytes | None = None
        self._shared: Shared | None = None
        size = sum(x.size if isinstance(x, Sealed | SealedRows) else len(x) for x in pieces)
        if size < LARGE or _advise() is None:
            return
        out = (room if room is not None and size <= room.most else Room(size)).taken(size)
        self._out, self._size = out, size
        self._arguments = self._copied(id(out) + _BYTES_HEAD)

    def _copied(self, at: int) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]:
        """What :func:`kvtc_stream.io.assembly.assemble` takes to put the pieces at an address."""
        from kvtc_stream.io.xxh3 import LEAST

        units, seeds, copies = [], [], []
        plain: list[tuple[int, int, int]] = []
        first = 0
        for piece in self._pieces:
            if isinstance(piece, bytes | memoryview):
                plain += _placed([piece], at)
                at += len(piece)
            elif piece.covered >= LEAST:
                own, unit, seed = piece.copied(at)
                unit[:, :2] += first
                units.append(unit)
                seeds.append(seed)
                copies.append(own)
                first += len(own)
                at += piece.size
            else:
                for one in piece.each():
                    self._short.append((one, bytearray(_SUM)))
                    plain += _placed([*one.pieces, memoryview(self._short[-1][1])], at)
                    at += one.size
        of_plain, rest = units_of(np.array(plain, np.int64).reshape(-1, 3))
        of_plain[:, :2] += first
        return (
            np.concatenate([*units, of_plain]),
            np.concatenate([*seeds, np.zeros(len(of_plain), np.uint64)]),
            np.concatenate([*copies, rest]),
        )

    def begin(self) -> None:
        """Let threads begin: all bytes are there."""
        if self._out is not None and self._shared is None:
            from kvtc_stream.io.assembly import assemble

            for sealed, place in self._short:
                place[:] = sealed.checksum()
            keeps = self._out, self._pieces, self._short
            units = len(self._arguments[0])
            self._shared = Shared(assemble, units, self._arguments, self._size, _COPYING, keeps)

    def finish(self) -> bytes:
        """Take part until all is done; the bytes, once."""
        self.begin()
        if self._shared is None or self._out is None:
            return b"".join(_flat(self._pieces))
        self._shared.finish()
        out, self._out = self._out, None
        return out


def singly(pieces: Iterable[Piece]) -> Iterator[bytes | memoryview | Sealed]:
    """The pieces, rows one by one."""
    for piece in pieces:
        if isinstance(piece, SealedRows):
            yield from piece.each()
        else:
            yield piece


def _flat(pieces: Iterable[Piece]) -> Iterator[bytes | memoryview]:
    """All bytes, with the checksums."""
    for piece in singly(pieces):
        if isinstance(piece, Sealed):
            yield from piece.pieces
            yield piece.checksum()
        else:
            yield piece


def _placed(pieces: Iterable[bytes | memoryview], at: int) -> list[tuple[int, int, int]]:
    """Copies of pieces to an address: where each is, where it goes, its bytes."""
    found = []
    for piece in pieces:
        if len(piece):
            found.append((_address(piece), at, len(piece)))
            at += len(piece)
    return found


def _address(data: bytes | memoryview) -> int:
    where: int = np.frombuffer(data, np.uint8).ctypes.data if len(data) else 0
    return where


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
