"""Checksums of payloads: XXH3-64 with a seed, of more than 240 bytes, in two kernels.

The method is that of the reference implementation (XXH3, long inputs). Within 1,024 bytes eight
accumulators only add, in any order, so that all of these are summed at once; what mixes the
accumulators between them is a chain, but a short one. The host finishes with a few products.
"""

from __future__ import annotations

import numpy as np

from kvtc_stream.gpu.kernels.intrinsics import WARP, i32, i64, i64p, shuffle, shuffle_down
from kvtc_stream.gpu.runtime.compile import kernel
from kvtc_stream.gpu.runtime.dialect import cuda
from kvtc_stream.io import xxh3

#: Bytes that are added before the accumulators are mixed; threads of a block of :func:`add`.
BLOCK, THREADS = 1024, 256
#: Bytes of a payload: shorter ones have another method, longer ones a grid that no device has.
LEAST, MOST = 241, 65_535 * (THREADS // WARP) * BLOCK
#: Fields of a task: the index of the first 8 bytes, bytes, the first row of sums, and the seed.
WORD, SIZE, FIRST, SEED = range(4)
FIELDS = 4

#: XXH3's secret, int64 [24], and what the accumulators begin with, int64 [8].
SECRET, INITIAL = xxh3.SECRET.view(np.int64), xxh3.INITIAL.view(np.int64)

_I64 = np.int64
_LOW = np.int64(0xFFFFFFFF)
_PRIME = np.int64(xxh3.PRIMES[0])


@kernel(i64p, i64p, i64p, i64p)
def add(tasks, data, secret, sums):  # type: ignore[no-untyped-def]
    """Kernel: what is added to the accumulators for each 1,024 bytes of each payload, and, last,
    for the rest of it.

    Parameters
    ----------
    tasks
        int64 [payloads, FIELDS]; the grid is (payloads, blocks of 8 times 1,024 bytes).
    data
        What holds the payloads, each at a multiple of 8 bytes, with at least 8 bytes after it.
    secret
        :data:`SECRET`.
    sums
        int64 [rows, 8], which are written.
    """
    task = _I64(cuda.blockIdx.x) * FIELDS
    thread = i32(cuda.threadIdx.x)
    lane = i32(thread & i32(WARP - 1))
    size, seed = tasks[task + SIZE], tasks[task + SEED]
    whole = (size - _I64(1)) >> _I64(10)
    at = _I64(cuda.blockIdx.y) * _I64(THREADS // WARP) + _I64(thread >> i32(5))
    if at > whole:
        return
    column, group = i32(lane & i32(7)), i32(lane >> i32(3))
    stripes = i32(16)
    if at == whole:
        stripes = i32((size - _I64(1) - (whole << _I64(10))) >> _I64(6))
    if column & i32(1):
        seed = -seed
    word = tasks[task + WORD]
    products, values = _I64(0), _I64(0)
    source = word + (at << _I64(7)) + _I64(column)
    for stripe in range(group, stripes, i32(4)):
        value = data[source + (_I64(stripe) << _I64(3))]
        # Seeds are added to even words of the secret, and taken from odd ones.
        own = seed
        if stripe & i32(1):
            own = -seed
        key = value ^ (secret[i32(stripe) + column] + own)
        products += (key & _LOW) * ((key >> _I64(32)) & _LOW)
        values += value
    if at == whole and group == i32(0):
        # The last 64 bytes, wherever they begin; the secret's bytes from 121 on.
        begin = size - _I64(64) + (_I64(column) << _I64(3))
        shift = (begin & _I64(7)) << _I64(3)
        value = data[word + (begin >> _I64(3))]
        if shift:
            value = (value >> shift) & ((_I64(1) << (_I64(64) - shift)) - _I64(1))
            value |= data[word + (begin >> _I64(3)) + _I64(1)] << (_I64(64) - shift)
        low = secret[i32(15) + column] - seed
        high = secret[i32(16) + column] + seed
        key = value ^ (((low >> _I64(8)) & _I64((1 << 56) - 1)) | (high << _I64(56)))
        products += (key & _LOW) * ((key >> _I64(32)) & _LOW)
        values += value
    products += shuffle_down(products, 16)
    products += shuffle_down(products, 8)
    values += shuffle_down(values, 16)
    values += shuffle_down(values, 8)
    # A value is added to the neighbour's accumulator.
    values = shuffle(values, i32(lane ^ i32(1)))
    if lane < i32(8):
        sums[((tasks[task + FIRST] + at) << _I64(3)) + _I64(lane)] = products + values


@kernel(i64p, i64, i64p, i64p, i64p, i64p)
def mix(tasks, payloads, secret, initial, sums, out):  # type: ignore[no-untyped-def]
    """Kernel: the accumulators after all sums of each payload; a thread for each of eight.

    Parameters
    ----------
    tasks, secret, sums
        As for :func:`add`.
    payloads
        Number of tasks.
    initial
        :data:`INITIAL`.
    out
        int64 [payloads, 8], which are written.
    """
    thread = _I64(cuda.blockIdx.x) * _I64(cuda.blockDim.x) + _I64(cuda.threadIdx.x)
    payload, lane = thread >> _I64(3), thread & _I64(7)
    if payload >= payloads:
        return
    task = payload * FIELDS
    seed = tasks[task + SEED]
    if lane & _I64(1):
        seed = -seed
    key = secret[_I64(16) + lane] + seed
    whole = (tasks[task + SIZE] - _I64(1)) >> _I64(10)
    first = (tasks[task + FIRST] << _I64(3)) + lane
    last = first + (whole << _I64(3))
    state = initial[lane]
    # Loaded four steps ahead: nothing else hides the latency of memory.
    x_1, x_2 = sums[first], sums[min(first + _I64(8), last)]
    x_3, x_4 = sums[min(first + _I64(16), last)], sums[min(first + _I64(24), last)]
    for i in range(whole):
        x, x_1, x_2, x_3 = x_1, x_2, x_3, x_4
        x_4 = sums[min(first + (_I64(i) << _I64(3)) + _I64(32), last)]
        state += x
        state ^= (state >> _I64(47)) & _I64((1 << 17) - 1)
        state = (state ^ key) * _PRIME
    out[thread] = state + x_1
