"""Verbatim bfloat16 values in tiles that a block of GPU threads codes alone.

Sign and mantissa of a value hold little to be found; they are a byte as it is. Exponents are few:
the nine that a tile has most often, in its table, have digits of two bits, in up to three levels.
Digits 0, 1 and 2 of a level stand for exponents of the table, 3 says that the value goes on to the
next level, and from the third level on to a byte, its exponent itself.

No code has a length of its own, so nothing needs to be decoded before something else, but for the
numbers of values that go on: how many before a value do is a sum over bits, which threads of a warp
find together.

A payload of ``n`` values, in the order of SPEC, is

1. a head of 16 bytes for each tile of 8192 values: how many go on to the second and third level and
   to a byte, as u16, the table, and a reserved byte,
2. for each tile, its digits, level by level: for each 32 values of the level two u32, the lower and
   the higher bits of their digits, those of the first value in bit 0; what is beyond the last value
   is 0,
3. a byte for each value, sign and mantissa,
4. a byte for each value that no table has, its exponent.

With a table given a tile has one encoding. The kernels release the GIL and keep no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba.cpython.unsafe.numbers import trailing_zeros

from kvtc_stream.errors import FormatError

#: Values of a tile, and bytes of its head.
TILE, HEAD = 8192, 16
#: Levels, entries of a table, and where it begins in a head.
LEVELS, ENTRIES, TABLE = 3, 9, 6

_U16, _U32, _U64 = np.uint16, np.uint32, np.uint64

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")

_FAULTS = {
    1: "its tiles have other numbers of values that go on than their digits say",
    2: "bits are set beyond the last value of a level",
    3: "a value has an exponent of its own that the table has",
}


class Places(NamedTuple):
    """Where the tiles' things are in payloads.

    Attributes
    ----------
    digits
        int64 [tiles of all payloads]: first word of each, from the beginning of its payload.
    others
        int64 [tiles of all payloads]: first of each one's bytes for exponents that its table lacks.
    rests
        int64 [payloads]: first byte of signs and mantissas.
    lengths
        int64 [payloads]: bytes; -1 of heads that no encoder writes.
    """

    digits: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    rests: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def encode(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """The payload of the bits of bfloat16 values [n]: uint8, which may be more than they were."""
    n = len(values)
    heads = np.zeros((-(-n // TILE), HEAD), np.uint8)
    _survey(values, heads)
    begin, length = (int(x[0]) for x in places(heads, [n])[2:])
    out = np.empty(length, np.uint8)
    out[: heads.size] = heads.reshape(-1)
    words = out[heads.size : begin].view("<u4").astype(np.uint32, copy=False)
    rest, others = out[begin : begin + n], out[begin + n :]
    _encode(values, heads, words, rest, others)
    return out


def places(heads: npt.NDArray[np.uint8], sizes: Sequence[int]) -> Places:
    """Where things are, by the heads [tiles of all payloads, HEAD] of so many values each."""
    found = Places(*np.empty((2, len(heads)), np.int64), *np.empty((2, len(sizes)), np.int64))
    _places(np.ascontiguousarray(heads), np.array(sizes, np.int64), *found)
    return found


def split(
    data: bytes | memoryview | npt.NDArray[np.uint8], n: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], int]:
    """A payload's bytes, its heads, and where signs and mantissas begin; of ``n`` values.

    Raises
    ------
    FormatError
        The payload is shorter or longer than its heads say, or they are damaged.
    """
    packed, tiles = np.frombuffer(data, np.uint8), -(-n // TILE)
    if packed.size < tiles * HEAD:
        raise FormatError(
            f"verbatim values: {packed.size} bytes, expected {tiles * HEAD} for the heads of tiles "
            f"alone"
        )
    heads = packed[: tiles * HEAD].reshape(tiles, HEAD)
    _, _, [rest], [length] = places(heads, [n])
    if length < 0:
        raise FormatError(
            "verbatim values: the head of a tile is damaged: more values go on than there are, "
            "its table has an exponent twice, or its reserved byte is not 0"
        )
    if packed.size != length:
        raise FormatError(
            f"verbatim values: {packed.size} bytes, expected {length} by the heads of tiles"
        )
    return packed, heads, int(rest)


def decode(data: bytes | memoryview | npt.NDArray[np.uint8], n: int) -> npt.NDArray[np.uint16]:
    """The inverse of :func:`encode`: the bits of ``n`` values.

    Raises
    ------
    FormatError
        No encoder writes these bytes.
    """
    packed, heads, begin = split(data, n)
    # Digits as words of their own: the payload may begin anywhere in memory.
    words = packed[heads.size : begin].copy().view("<u4").astype(np.uint32, copy=False)
    out = np.empty(n, np.uint16)
    rest, others = packed[begin : begin + n], packed[begin + n :]
    fault = _decode(heads, words, rest, others, out)
    if fault:
        raise FormatError(f"verbatim values are damaged: {_FAULTS[fault]}")
    return out


# --- kernels ------------------------------------------------------------------------------------


@_jit
def _places(heads, sizes, digits, others, rests, lengths):  # type: ignore[no-untyped-def]
    """Fill what :class:`Places` holds."""
    first = 0
    for payload in range(len(sizes)):
        n = sizes[payload]
        tiles = (n + TILE - 1) // TILE
        place, spare, whole = tiles * HEAD // 4, 0, True
        for tile in range(first, first + tiles):
            digits[tile], others[tile] = place, spare
            level = min(n - TILE * (tile - first), TILE)
            for i in range(LEVELS):
                place += 2 * ((level + 31) // 32)
                following = np.int64(heads[tile, 2 * i]) | np.int64(heads[tile, 2 * i + 1]) << 8
                whole &= following <= level
                level = following
            spare += level
            for i in range(TABLE, TABLE + ENTRIES):
                for j in range(TABLE, i):
                    whole &= heads[tile, i] != heads[tile, j]
            for i in range(TABLE + ENTRIES, HEAD):
                whole &= heads[tile, i] == 0
        rest = 4 * place
        for tile in range(first, first + tiles):
            others[tile] += rest + n
        rests[payload], lengths[payload] = rest, rest + n + spare if whole else -1
        first += tiles


@_jit
def _survey(values, heads):  # type: ignore[no-untyped-def]
    """Fill heads, which are 0."""
    counts = np.empty((4, 256), np.uint32)
    ranked = np.empty(256, np.bool_)
    for tile in range(len(heads)):
        own = values[tile * TILE : min(tile * TILE + TILE, values.size)]
        counts[:] = 0
        for i in range(own.size // 4):
            for j in range(4):
                counts[j, (own[4 * i + j] >> 7) & 0xFF] += 1
        for i in range(own.size // 4 * 4, own.size):
            counts[0, (own[i] >> 7) & 0xFF] += 1
        for i in range(256):
            counts[0, i] += counts[1, i] + counts[2, i] + counts[3, i]
        ranked[:] = False
        left = np.int64(own.size)
        for rank in range(ENTRIES):
            best, most = 0, np.int64(-1)
            for i in range(256):
                if not ranked[i] and np.int64(counts[0, i]) > most:
                    best, most = i, np.int64(counts[0, i])
            ranked[best] = True
            heads[tile, TABLE + rank] = best
            left -= most
            if rank % 3 == 2:
                heads[tile, rank // 3 * 2] = left & 0xFF
                heads[tile, rank // 3 * 2 + 1] = left >> 8


@_jit
def _encode(values, heads, words, rest, others):  # type: ignore[no-untyped-def]
    """Fill the other parts of a payload."""
    at, spare = _U64(0), _U64(0)
    ranks = np.empty(256, np.uint8)
    # Ranks, and those that go on: everything is written, and only counted if it does.
    first, second = np.empty(TILE, np.uint8), np.empty(TILE + 1, np.uint8)
    third = np.empty(TILE + 1, np.uint8)
    for tile in range(len(heads)):
        own = values[tile * TILE : min(tile * TILE + TILE, values.size)]
        size = own.size
        bytes_of = rest[tile * TILE : tile * TILE + size]
        ranks[:] = ENTRIES
        for rank in range(ENTRIES):
            ranks[heads[tile, TABLE + rank]] = rank
        for i in range(size):
            bytes_of[i] = (own[i] & 0x7F) | ((own[i] >> 8) & 0x80)
            first[i] = ranks[(own[i] >> 7) & 0xFF]
        at = _digits(first, size, words, at)
        of_second, of_third = _U64(0), _U64(0)
        for i in range(size):
            second[of_second] = first[i] - 3
            of_second += _U64(first[i] >= 3)
        at = _digits(second, of_second, words, at)
        for i in range(of_second):
            third[of_third] = second[i] - 3
            of_third += _U64(second[i] >= 3)
        at = _digits(third, of_third, words, at)
        for i in range(size):
            if first[i] == ENTRIES:  # rare
                others[spare] = (own[i] >> 7) & 0xFF
                spare += _U64(1)


@_jit
def _digits(ranks, count, words, at):  # type: ignore[no-untyped-def]
    """Write the digits of a level; return where the next begins."""
    for begin in range(0, np.int64(count), 32):
        low, high = _U32(0), _U32(0)
        some = ranks[begin : min(begin + 32, np.int64(count))]
        for i in range(some.size):
            low |= _U32((some[i] == 1) | (some[i] >= 3)) << _U32(i)
            high |= _U32(some[i] >= 2) << _U32(i)
        words[at], words[at + _U64(1)] = low, high
        at += _U64(2)
    return at


@_jit
def _decode(heads, words, rest, others, out):  # type: ignore[no-untyped-def]
    """Fill ``out``; return 0, or a key of ``_FAULTS``."""
    n = out.size
    at, spare = _U64(0), _U64(0)
    found = np.empty((LEVELS, TILE), np.uint8)
    table = np.zeros(ENTRIES + 1, np.uint8)  # there is no fourth digit's
    for tile in range(len(heads)):
        head = heads[tile]
        table[:ENTRIES] = head[TABLE : TABLE + ENTRIES]
        sizes = (
            np.int64(min(TILE, n - tile * TILE)),
            np.int64(head[0]) | np.int64(head[1]) << 8,
            np.int64(head[2]) | np.int64(head[3]) << 8,
            np.int64(head[4]) | np.int64(head[5]) << 8,
        )
        firsts = (
            at,
            at + _U64(2) * _U64((sizes[0] + 31) // 32),
            at + _U64(2) * _U64((sizes[0] + 31) // 32 + (sizes[1] + 31) // 32),
        )
        at = firsts[2] + _U64(2) * _U64((sizes[2] + 31) // 32)
        own = others[spare : spare + _U64(sizes[3])]
        spare += _U64(sizes[3])
        for i in range(own.size):
            for j in range(ENTRIES):
                if own[i] == table[j]:
                    return 3
        for level in range(LEVELS):
            size = sizes[level]
            if size % 32:
                last = firsts[level] + _U64(2) * _U64(size // 32)
                if (words[last] | words[last + _U64(1)]) >> _U32(size % 32):
                    return 2
        further = own
        for level in range(LEVELS - 1, -1, -1):
            exponents = found[level, : sizes[level]]
            if _level(words, firsts[level], table[3 * level :], further, exponents):
                return 1
            further = exponents
        begin = tile * TILE
        for i in range(sizes[0]):
            byte = _U16(rest[begin + i])
            out[begin + i] = (
                (byte & _U16(0x7F)) | (byte & _U16(0x80)) << _U16(8) | _U16(further[i]) << _U16(7)
            )
    return 0


@_jit
def _level(words, first, table, further, out):  # type: ignore[no-untyped-def]
    """Exponents of the values of a level; ``further`` are of those that go on.

    Returns whether another number goes on.
    """
    # Of four values at a time, by their digits' lower bits and higher bits; any for those that go
    # on.
    lookup = np.empty((256, 4), np.uint8)
    for bits in range(256):
        for i in range(4):
            lookup[bits, i] = table[(bits >> i & 1) | (bits >> (4 + i) & 1) << 1]
    fours = lookup.view(np.uint32)[:, 0]
    whole = out[: out.size // 32 * 32].view(np.uint32)
    taken = _U64(0)
    for begin in range(0, out.size, 32):
        low, high = words[first], words[first + _U64(1)]
        first += _U64(2)
        if begin + 32 <= out.size:
            for i in range(8):
                digits = low >> _U32(4 * i) & _U32(0xF)
                digits |= (high >> _U32(4 * i) & _U32(0xF)) << _U32(4)
                whole[_U64(begin // 4 + i)] = fours[digits]
        else:
            for i in range(out.size - begin):
                digits = (low >> _U32(i) & _U32(1)) | (high >> _U32(i) & _U32(1)) << _U32(4)
                out[begin + i] = lookup[digits, 0]
        go_on = low & high
        while go_on:
            if taken >= further.size:
                return True
            place: int = trailing_zeros(go_on)  # type: ignore[call-arg]  # an intrinsic
            out[_U64(begin) + _U64(place)] = further[taken]
            go_on &= go_on - _U64(1)
            taken += _U64(1)
    return taken != further.size
