"""Verbatim bfloat16 values on the GPU: a thread block for each tile, a thread for 32 values.

The bytes are those of :mod:`kvtc_stream.coding.verbatim` and of the specification. A thread finds
the digits of its 32 values on all levels, by how many values before them go on; then threads put
together eight values at a time, side by side in memory.

A task is a row of int64 for each tile.
"""

from __future__ import annotations

import numpy as np

from kvtc_stream.coding.verbatim import ENTRIES, HEAD, TABLE, TILE
from kvtc_stream.gpu.kernels.intrinsics import (
    WARP,
    ballot,
    i32,
    i32p,
    i64,
    i64p,
    popc,
    shuffle,
    store_u32x4,
    u8,
    u8p,
    u16_at,
    u16p,
    u32,
    u32p,
)
from kvtc_stream.gpu.runtime.compile import kernel
from kvtc_stream.gpu.runtime.dialect import cuda

#: Threads of a block: one for each 32 values of a tile.
THREADS = TILE // WARP
#: Fields of a task.
(
    VALUES,  # the tile's first among all
    COUNT,  # of its values
    PLACE,  # of its head, in bytes
    DIGITS,  # first word
    REST,  # first byte of signs and mantissas
    OTHERS,  # first byte of exponents that the table lacks
    BLOCK,
) = range(7)
FIELDS = 7

_WARPS = THREADS // WARP
#: Words of a level's digits, at most.
_WORDS = 2 * THREADS
#: Of three levels, a word for each 32 values; and of two levels.
_LEVEL_WORDS, _EXPONENTS = 3 * THREADS, 2 * TILE
_U8, _U16, _U32, _I32, _I64 = np.uint8, np.uint16, np.uint32, np.int32, np.int64


def _device(function):  # type: ignore[no-untyped-def]
    return cuda.jit(device=True)(function)


@_device
def _before(count, sums):  # type: ignore[no-untyped-def]
    """The sum of ``count`` over the threads before this one, and over all. All must take part."""
    thread = _I32(cuda.threadIdx.x)
    lane, warp = thread & _I32(WARP - 1), thread >> _I32(5)
    own = _I32(count)
    for by in (1, 2, 4, 8, 16):
        other = shuffle(own, max(lane - _I32(by), _I32(0)))
        if lane >= by:
            own = _I32(own + other)
    cuda.syncthreads()
    if lane == WARP - 1:
        sums[warp] = own
    cuda.syncthreads()
    before, total = _I32(own - _I32(count)), _I32(0)
    for i in range(_WARPS):
        if i < warp:
            before = _I32(before + sums[i])
        total = _I32(total + sums[i])
    return before, total


@_device
def _below(count):  # type: ignore[no-untyped-def]
    """As many low bits, 0 to 32."""
    if count >= 32:
        return _U32(0xFFFFFFFF)
    return _U32((_U32(1) << _U32(count)) - _U32(1))


@_device
def _digit(low, high, i):  # type: ignore[no-untyped-def]
    return _U32(_U32(_U32(low >> i) & _U32(1)) | _U32(_U32(_U32(high >> i) & _U32(1)) << _U32(1)))


@_device
def _value(byte, exponent):  # type: ignore[no-untyped-def]
    """Bits of a value from sign and mantissa, and exponent."""
    return _U32((byte & _U32(0x7F)) | (byte & _U32(0x80)) << _U32(8) | exponent << _U32(7))


@_device
def _pair(two, first, second):  # type: ignore[no-untyped-def]
    """Bits of two values from two bytes side by side, and two exponents."""
    spread = (two & _U32(0x7F)) | (two & _U32(0x7F80)) << _U32(8) | (two & _U32(0x8000)) << _U32(16)
    return _U32(spread | first << _U32(7) | second << _U32(23))


@_device
def _exponent(low, high, i, zero, one, two, exponents, further):  # type: ignore[no-untyped-def]
    """Exponent of value ``i`` by its digit, and the place of the next that goes on."""
    bit = _U32(_U32(1) << _U32(i))
    is_low, is_high = _U32(low & bit) != _U32(0), _U32(high & bit) != _U32(0)
    own = _U32(exponents[further])
    exponent = one if is_low else zero
    if is_high:
        exponent = own if is_low else two
    after = _U32(further + _U32(1)) if is_low and is_high else further
    return exponent, after


@_device
def _table(data, head, level):  # type: ignore[no-untyped-def]
    """A level's three exponents, one a byte."""
    at = head + TABLE + 3 * level
    return _U32(_U32(data[at]) | _U32(data[at + 1]) << _U32(8) | _U32(data[at + 2]) << _U32(16))


@_device
def _put(words, at, count, low, high):  # type: ignore[no-untyped-def]
    """Put bits at bit ``at`` of every second of some shared words, which were 0."""
    if count == 0:
        return
    word, shift = 2 * (at >> 5), _U32(at & 31)
    cuda.atomic.or_(words, word, _U32(low << shift))
    cuda.atomic.or_(words, word + 1, _U32(high << shift))
    if shift + _U32(count) > _U32(32):
        cuda.atomic.or_(words, word + 2, _U32(low >> _U32(_U32(32) - shift)))
        cuda.atomic.or_(words, word + 3, _U32(high >> _U32(_U32(32) - shift)))


@kernel(i64p, u8p, u32p, i64, i32p)
def decode(tasks, data, words, out, faults):  # type: ignore[no-untyped-def]
    """Kernel: decode tiles to values. Nothing beyond a tile's own bytes is read.

    Parameters
    ----------
    tasks
        int64 [tiles, FIELDS]; places are multiples of what is read there: VALUES of 8, REST of 4.
    data, words
        The payloads, as bytes and as words of 32 bits.
    out
        Address of the values, a multiple of 16.
    faults
        int32 [blocks], 0 before: 1 is written where no encoder wrote the tile.
    """
    lows = cuda.shared.array(_LEVEL_WORDS, u32)
    highs = cuda.shared.array(_LEVEL_WORDS, u32)
    firsts = cuda.shared.array(_LEVEL_WORDS, i32)
    exponents = cuda.shared.array(_EXPONENTS, u8)  # of level 2, and then of level 3
    sums = cuda.shared.array(_WARPS, i32)
    thread = _I32(cuda.threadIdx.x)
    task = _I64(cuda.blockIdx.x) * FIELDS
    count = _I32(tasks[task + COUNT])
    head = tasks[task + PLACE]
    block = tasks[task + BLOCK]
    first = tasks[task + DIGITS]
    other = tasks[task + OTHERS]
    fault = False
    # Digits of 32 values of each level, and how many of them go on.
    size = count
    packed, last = _I32(0), _I32(0)
    for level in range(3):
        left = _I32(size - _I32(WARP) * thread)
        low, high = _U32(0), _U32(0)
        if left > 0:
            low, high = words[first + 2 * thread], words[first + 2 * thread + 1]
            if left < WARP:
                fault |= _U32(low | high) >> _U32(left) != _U32(0)
        at = level * THREADS + thread
        lows[at], highs[at] = low, high
        go_on = _I32(popc(_U32(low & high)))
        if level < 2:
            packed = _I32(packed | go_on << _I32(16 * level))
        else:
            last = go_on
        first += 2 * ((size + 31) >> 5)
        size = _I32(data[head + 2 * level]) | _I32(data[head + 2 * level + 1]) << _I32(8)
    # At most 8192 go on from a level: two sums fit in 32 bits.
    before, totals = _before(packed, sums)
    firsts[thread] = before & _I32(0xFFFF)
    firsts[THREADS + thread] = before >> _I32(16)
    before, total = _before(last, sums)
    firsts[2 * THREADS + thread] = before
    second = _I32(data[head]) | _I32(data[head + 1]) << _I32(8)
    third = _I32(data[head + 2]) | _I32(data[head + 3]) << _I32(8)
    # The same for all threads.
    if (totals & _I32(0xFFFF)) != second or totals >> _I32(16) != third or total != size:
        if thread == 0:
            faults[block] = 1
        return
    cuda.syncthreads()

    table = _table(data, head, 2)
    for i in range(thread, third, THREADS):
        at, bit = 2 * THREADS + (i >> 5), _U32(i & 31)
        low, high = lows[at], highs[at]
        digit = _digit(low, high, bit)
        exponent = _U32(table >> _U32(8 * digit) & _U32(0xFF))
        if digit == _U32(3):
            exponent = _U32(data[other + firsts[at] + popc(_U32(low & high & _below(bit)))])
            for j in range(ENTRIES):
                fault |= _U32(data[head + TABLE + j]) == exponent
        exponents[TILE + i] = _U8(exponent)
    cuda.syncthreads()
    table = _table(data, head, 1)
    for i in range(thread, second, THREADS):
        at, bit = THREADS + (i >> 5), _U32(i & 31)
        low, high = lows[at], highs[at]
        digit = _digit(low, high, bit)
        exponent = _U32(table >> _U32(8 * digit) & _U32(0xFF))
        if digit == _U32(3):
            further = _U32(_U32(firsts[at]) + popc(_U32(low & high & _below(bit))))
            exponent = _U32(exponents[_U32(_U32(TILE) + further)])
        exponents[i] = _U8(exponent)
    cuda.syncthreads()

    zero, one = _U32(data[head + TABLE]), _U32(data[head + TABLE + 1])
    two = _U32(data[head + TABLE + 2])
    rest = tasks[task + REST]
    values = tasks[task + VALUES]
    for at in range(_I32(8) * thread, count, 8 * THREADS):
        group, bit = at >> 5, _U32(at & 31)
        low, high = lows[group], highs[group]
        further = _U32(_U32(firsts[group]) + popc(_U32(low & high & _below(bit))))
        low, high = _U32(low >> bit), _U32(high >> bit)
        if at + 8 <= count:
            word = (rest + at) >> 2
            two_0, two_2 = words[word], words[word + 1]
            two_1, two_3 = _U32(two_0 >> _U32(16)), _U32(two_2 >> _U32(16))
            e_0, further = _exponent(low, high, 0, zero, one, two, exponents, further)
            e_1, further = _exponent(low, high, 1, zero, one, two, exponents, further)
            pair_0 = _pair(two_0, e_0, e_1)
            e_0, further = _exponent(low, high, 2, zero, one, two, exponents, further)
            e_1, further = _exponent(low, high, 3, zero, one, two, exponents, further)
            pair_1 = _pair(two_1, e_0, e_1)
            e_0, further = _exponent(low, high, 4, zero, one, two, exponents, further)
            e_1, further = _exponent(low, high, 5, zero, one, two, exponents, further)
            pair_2 = _pair(two_2, e_0, e_1)
            e_0, further = _exponent(low, high, 6, zero, one, two, exponents, further)
            e_1, further = _exponent(low, high, 7, zero, one, two, exponents, further)
            pair_3 = _pair(two_3, e_0, e_1)
            store_u32x4(out + 2 * (values + at), pair_0, pair_1, pair_2, pair_3)
        else:
            for i in range(count - at):
                exponent, further = _exponent(low, high, i, zero, one, two, exponents, further)
                byte = _U32(data[rest + at + i])
                u16_at(out)[values + at + i] = _U16(_value(byte, exponent))
    if fault:
        faults[block] = 1


@kernel(i64p, u16p, u8p)
def survey(tasks, values, heads):  # type: ignore[no-untyped-def]
    """Kernel: the heads of tiles.

    Parameters
    ----------
    tasks
        int64 [tiles, FIELDS]; VALUES and COUNT are read.
    values
        Bits of bfloat16.
    heads
        uint8 [tiles, HEAD].
    """
    counts = cuda.shared.array(256, i32)
    keys = cuda.shared.array(256, i32)
    used = cuda.shared.array(1, i32)
    thread = _I32(cuda.threadIdx.x)
    task = _I64(cuda.blockIdx.x) * FIELDS
    first, count = tasks[task + VALUES], _I32(tasks[task + COUNT])
    counts[thread] = 0
    if thread == 0:
        used[0] = 0
    cuda.syncthreads()
    for i in range(thread, count, THREADS):
        cuda.atomic.add(counts, _I32(values[first + i]) >> _I32(7) & _I32(0xFF), _I32(1))
    cuda.syncthreads()
    # More often is first, of equally frequent ones the lower exponent.
    own = _I32(counts[thread] << 8 | (255 - thread))
    if counts[thread] > 0:
        keys[cuda.atomic.add(used, 0, _I32(1))] = own
    cuda.syncthreads()
    rank = _I32(ENTRIES)
    if counts[thread] > 0:
        rank = _I32(0)
        for i in range(used[0]):
            rank += _I32(keys[i] > own)
    elif used[0] < ENTRIES:  # the lowest of those that do not occur fill the table
        rank = _I32(used[0])
        for i in range(thread):
            rank += _I32(counts[i] == 0)
    cuda.syncthreads()
    head = _I64(cuda.blockIdx.x) * HEAD
    if rank < ENTRIES:
        heads[head + TABLE + rank] = _U8(thread)
        counts[rank] = own >> 8  # nobody reads the others any more
    cuda.syncthreads()
    if thread == 0:
        for level in range(3):
            for i in range(3):
                count = _I32(count - counts[3 * level + i])
            heads[head + 2 * level] = _U8(count & _I32(0xFF))
            heads[head + 2 * level + 1] = _U8(count >> _I32(8))
        heads[head + HEAD - 1] = _U8(0)


@kernel(i64p, u16p, u8p, u8p, u32p)
def encode(tasks, values, heads, data, words):  # type: ignore[no-untyped-def]
    """Kernel: encode tiles.

    Parameters
    ----------
    tasks
        int64 [tiles, FIELDS].
    values, heads
        As for :func:`survey`.
    data, words
        Space for the payloads, as bytes and as words of 32 bits.
    """
    ranks = cuda.shared.array(256, u8)
    of_values = cuda.shared.array(TILE, u8)
    lows = cuda.shared.array(THREADS, u32)
    highs = cuda.shared.array(THREADS, u32)
    second = cuda.shared.array(_WORDS, u32)
    third = cuda.shared.array(_WORDS, u32)
    sums = cuda.shared.array(_WARPS, i32)
    thread = _I32(cuda.threadIdx.x)
    lane = thread & _I32(WARP - 1)
    task = _I64(cuda.blockIdx.x) * FIELDS
    head = _I64(cuda.blockIdx.x) * HEAD
    start, count = tasks[task + VALUES], _I32(tasks[task + COUNT])
    first, rest = tasks[task + DIGITS], tasks[task + REST]
    ranks[thread] = _U8(ENTRIES)
    for i in range(thread, _WORDS, THREADS):
        second[i], third[i] = _U32(0), _U32(0)
    cuda.syncthreads()
    if thread < ENTRIES:
        ranks[heads[head + TABLE + thread]] = _U8(thread)
    if thread < HEAD:
        data[tasks[task + PLACE] + thread] = heads[head + thread]
    cuda.syncthreads()
    for begin in range(thread - lane, count, THREADS):
        i = begin + lane
        digit = _I32(0)
        if i < count:
            value = _U32(values[start + i])
            rank = _I32(ranks[value >> _U32(7) & _U32(0xFF)])
            of_values[i] = _U8(rank)
            data[rest + i] = _U8((value & _U32(0x7F)) | (value >> _U32(8) & _U32(0x80)))
            digit = min(rank, _I32(3))
        low, high = ballot((digit & _I32(1)) != 0), ballot((digit & _I32(2)) != 0)
        if lane == 0:
            group = begin >> 5
            lows[group], highs[group] = low, high
            words[first + 2 * group], words[first + 2 * group + 1] = low, high
    cuda.syncthreads()

    # This thread's 32: those that go on, in order.
    begin = _I32(thread * WARP)
    go_on = _U32(0)
    if begin < count:
        go_on = _U32(lows[thread] & highs[thread])
    low_1, high_1, low_2, high_2 = _U32(0), _U32(0), _U32(0), _U32(0)
    of_second, of_third, of_others = _I32(0), _I32(0), _I32(0)
    left = go_on
    while left != _U32(0):
        i = _I32(popc(_U32((left & _U32(~left + _U32(1))) - _U32(1))))
        left = _U32(left & _U32(left - _U32(1)))
        rank = _I32(of_values[begin + i])
        digit = _U32(min(rank - _I32(3), _I32(3)))
        low_1 = _U32(low_1 | (digit & _U32(1)) << _U32(of_second))
        high_1 = _U32(high_1 | (digit >> _U32(1)) << _U32(of_second))
        of_second += 1
        if rank >= 6:
            digit = _U32(min(rank - _I32(6), _I32(3)))
            low_2 = _U32(low_2 | (digit & _U32(1)) << _U32(of_third))
            high_2 = _U32(high_2 | (digit >> _U32(1)) << _U32(of_third))
            of_third += 1
            if rank >= ENTRIES:
                of_others += 1
    at, size_1 = _before(of_second, sums)
    _put(second, at, of_second, low_1, high_1)
    at, size_2 = _before(of_third, sums)
    _put(third, at, of_third, low_2, high_2)
    at, _ = _before(of_others, sums)
    other = tasks[task + OTHERS] + at
    if of_others:
        left = go_on
        while left != _U32(0):
            i = _I32(popc(_U32((left & _U32(~left + _U32(1))) - _U32(1))))
            left = _U32(left & _U32(left - _U32(1)))
            if of_values[begin + i] >= ENTRIES:
                data[other] = _U8(_U32(values[start + begin + i]) >> _U32(7) & _U32(0xFF))
                other += 1
    cuda.syncthreads()
    first += 2 * ((count + 31) >> 5)
    for i in range(thread, 2 * ((size_1 + 31) >> 5), THREADS):
        words[first + i] = second[i]
    first += 2 * ((size_1 + 31) >> 5)
    for i in range(thread, 2 * ((size_2 + 31) >> 5), THREADS):
        words[first + i] = third[i]
