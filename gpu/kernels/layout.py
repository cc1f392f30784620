"""From a framework's tensors to token vectors (rows) and back: RoPE, means, casts and errors.

An entry describes K or V of one layer. From its address, token ``t`` is ``slots[t] · TOKEN_STRIDE``
elements away, and head ``h`` another ``h · HEAD_STRIDE``. This covers one contiguous tensor, one
tensor per layer, and pages with a page table. A slot of -1 stands for no place: nothing is read or
written there.

Rows are binary16 [tokens, width], without RoPE and less the mean. An entry's channels begin at its
COLUMN.

Every kernel has two forms. The wide form moves 16 bytes at a time. It needs elements of two bytes,
strides and addresses that are multiples of 16 bytes, and RoPE that pairs the halves of a head.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from kvtc_stream.formats import DType
from kvtc_stream.gpu.kernels.elements import HALVES, LOADS, ROUNDS, STORES, high_f16, low_f16
from kvtc_stream.gpu.kernels.intrinsics import (
    WARP,
    f16_bits,
    f16_pair,
    f16_value,
    f32,
    f32_at,
    f32p,
    f64p,
    i32,
    i32p,
    i64,
    i64p,
    load_f32x4,
    load_u32x4,
    shuffle_down,
    store_u32x4,
    u8_at,
    u16_at,
    u32_at,
    u64,
)
from kvtc_stream.gpu.runtime.compile import Kernel, kernel
from kvtc_stream.gpu.runtime.dialect import cuda

#: Element types that the wide forms support.
WIDE = frozenset(HALVES)
#: Threads of a block; tokens of one.
THREADS = 256
TOKENS = 64
#: Fields of an entry, int64.
(
    ADDRESS,
    TOKEN_STRIDE,
    HEAD_STRIDE,
    HEADS,
    DIM,
    TABLE,  # of rotations, or -1
    COLUMN,
    ROW,  # the entry's among those of all layers: K of each, then V of each
) = range(8)
FIELDS = 8

_I32, _I64, _U32, _F32 = np.int32, np.int64, np.uint32, np.float32


@kernel(i64p, f64p, i32p, f64p, i32, i32, i32, f32p, f32p)
def rotations(positions, frequencies, pairs, scales, tokens, max_pairs, sign, cosines, sines):  # type: ignore[no-untyped-def]
    """Kernel: cosines and sines of RoPE, each float32 [tables, tokens, max pairs].

    ``sign`` 1 applies RoPE, -1 removes it. Arithmetic as in the specification.
    """
    table = _I32(cuda.blockIdx.y)
    i = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    if i >= tokens * max_pairs:
        return
    token, pair = i // max_pairs, i % max_pairs
    if pair >= pairs[table]:
        return
    angle = np.float64(positions[token]) * frequencies[table * max_pairs + pair]
    scale = scales[table]
    if sign < 0:
        scale = 1.0 / scale
    at = _I64(table) * tokens * max_pairs + i
    cosines[at] = _F32(math.cos(angle) * scale)
    sines[at] = _F32(math.sin(angle) * (scale * sign))


# --- what every kernel asks -----------------------------------------------------------------------

#: The leading arguments of every kernel that goes between tensors and rows.
_COMMON = (
    i64p,  # entries [entries, FIELDS]
    i64p,  # slots [tokens]
    i32,  # tokens
    u64,  # address of cosines
    u64,  # and of sines, float32 [tables, table tokens, max pairs]
    i32p,  # pairs of each table
    i32p,  # interleaved
    i32,  # max pairs
    i32,  # table tokens
    i64,  # where the first token is among them
)


@cuda.jit(device=True)
def _entry(entries):  # type: ignore[no-untyped-def]
    """The block's entry: where its fields begin, and its DIM, HEADS and TABLE."""
    entry = _I32(cuda.blockIdx.y) * _I32(FIELDS)
    return (
        entry,
        _I32(entries[entry + DIM]),
        _I32(entries[entry + HEADS]),
        entries[entry + TABLE],
    )


@cuda.jit(device=True)
def _tile(tokens):  # type: ignore[no-untyped-def]
    """The block's first token, and the one after its last."""
    first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
    return first, min(first + _I32(TOKENS), tokens)


@cuda.jit(device=True)
def _angle_at(table, table_tokens, table_token, token, max_pairs):  # type: ignore[no-untyped-def]
    """Where the angles of a token begin among cosines and sines."""
    return (table * table_tokens + table_token + token) * max_pairs


# --- the wide form: a thread takes 8 channels of a head's first half, and their partners ----------
#
# Channels are in words of 32 bits, two in each. ``a`` is of the first half, ``b`` of the second.


@cuda.jit(device=True)
def _wide_share(dim):  # type: ignore[no-untyped-def]
    """A thread's unit of 2 · 8 channels, its first token in the tile, and tokens side by side."""
    units, thread = dim // _I32(16), _I32(cuda.threadIdx.x)
    return thread % units, thread // units, _I32(THREADS) // units


@cuda.jit(device=True)
def _wide_place(entries, entry, slot, unit):  # type: ignore[no-untyped-def]
    """The address of a unit of the first head in a slot, and its column."""
    channel = unit * _I32(8)
    x = slot * entries[entry + TOKEN_STRIDE] + channel
    return entries[entry + ADDRESS] + 2 * x, entries[entry + COLUMN] + channel


@cuda.jit(device=True)
def _by_word(a0, a1, b0, b1):  # type: ignore[no-untyped-def]
    """Eight values and eight more, four each: for each word two of the first, two of the others."""
    return (
        (a0[0], a0[1], b0[0], b0[1]),
        (a0[2], a0[3], b0[2], b0[3]),
        (a1[0], a1[1], b1[0], b1[1]),
        (a1[2], a1[3], b1[2], b1[3]),
    )


@cuda.jit(device=True)
def _wide_means(mean, column, dim):  # type: ignore[no-untyped-def]
    """Means of a unit: for each word two of the first half, two of the second."""
    a = mean + 4 * column
    b = a + 2 * dim
    return _by_word(load_f32x4(a), load_f32x4(a + 16), load_f32x4(b), load_f32x4(b + 16))


@cuda.jit(device=True)
def _four(there, address, otherwise):  # type: ignore[no-untyped-def]
    """Four binary32 at an address, or four of one value. One return: branches join numbers here,
    because numba-cuda-mlir cannot join tuples."""
    a, b, c, d = otherwise, otherwise, otherwise, otherwise
    if there:
        x = load_f32x4(address)
        a, b, c, d = x[0], x[1], x[2], x[3]
    return a, b, c, d


@cuda.jit(device=True)
def _wide_angles(table, at, cosines, sines):  # type: ignore[no-untyped-def]
    """For each word two cosines, two sines: 1 and 0 without RoPE."""
    turned, c, s = table >= 0, cosines + 4 * at, sines + 4 * at
    return _by_word(
        _four(turned, c, _F32(1)),
        _four(turned, c + 16, _F32(1)),
        _four(turned, s, _F32(0)),
        _four(turned, s + 16, _F32(0)),
    )


@cuda.jit(device=True)
def _turn(a0, a1, b0, b1, angles):  # type: ignore[no-untyped-def]
    """Turn the pairs (a0, b0) and (a1, b1)."""
    c0, c1, s0, s1 = angles
    return a0 * c0 - b0 * s0, a1 * c1 - b1 * s1, b0 * c0 + a0 * s0, b1 * c1 + a1 * s1


@cuda.jit(device=True)
def _restore(a, b, step, mean, angles):  # type: ignore[no-untyped-def]
    """Two values of each half from words of a row."""
    a0, a1 = low_f16(a) * step + mean[0], high_f16(a) * step + mean[1]
    b0, b1 = low_f16(b) * step + mean[2], high_f16(b) * step + mean[3]
    return _turn(a0, a1, b0, b1, angles)


# --- the general form: a thread takes units of two channels, ``a`` and ``b``, or of one ----------


@cuda.jit(device=True)
def _pairing(table, pairs, interleaved):  # type: ignore[no-untyped-def]
    """How many channels RoPE pairs, and whether neighbours rather than halves."""
    if table < 0:
        return _I32(0), False
    return pairs[table], interleaved[table] != 0


@cuda.jit(device=True)
def _channels(unit, pairs, interleaved, dim):  # type: ignore[no-untyped-def]
    """Channels of a unit: two that RoPE pairs, or two without it; ``dim`` for a second it lacks."""
    if unit < pairs and not interleaved:
        return unit, unit + pairs
    if unit < pairs:
        return _I32(2) * unit, _I32(2) * unit + _I32(1)
    return unit + pairs, unit + pairs + (dim - _I32(2) * pairs + _I32(1)) // _I32(2)


@cuda.jit(device=True)
def _element(entries, entry, slot, head):  # type: ignore[no-untyped-def]
    """Where a head begins in a slot, in elements."""
    return slot * entries[entry + TOKEN_STRIDE] + head * entries[entry + HEAD_STRIDE]


@cuda.jit(device=True)
def _turn_unit(x, y, unit, pairs, at, cosines, sines):  # type: ignore[no-untyped-def]
    """Turn a unit's two values, if RoPE pairs them."""
    if unit < pairs:
        c, s = f32_at(cosines)[at + unit], f32_at(sines)[at + unit]
        x, y = x * c - y * s, y * c + x * s
    return x, y


@cuda.jit(device=True)
def _row_unit(rows, row, means, column, a, b, dim, step):  # type: ignore[no-untyped-def]
    """A unit's two values from a row, with their means; 0 for a second that there is not."""
    x = f16_value(rows[row + a]) * step + means[column + a]
    y = _F32(0)
    if b < dim:
        y = f16_value(rows[row + b]) * step + means[column + b]
    return x, y


# --- the kernels ----------------------------------------------------------------------------------


@cache
def gather(dtype: DType, wide: bool) -> Kernel:
    """Make the kernel from tensors of ``dtype`` to rows; grid [⌈tokens / TOKENS⌉, entries].

    ``rows[t, (h, d)] = unrotate(x[h, t, d] · scale) - mean[(h, d)]``. ``values`` are those of fp8
    codes, float32 [256]; ``scales`` float32 [entries, heads]. ``mean`` and ``rows`` are addresses.
    """
    return (_wide_gather if wide else _any_gather)(dtype)


def _wide_gather(dtype: DType) -> Kernel:
    low, high, _ = HALVES[dtype]

    @cuda.jit(device=True)
    def center(a, b, mean, angles):  # type: ignore[no-untyped-def]
        a0, a1, b0, b1 = _turn(low(a), high(a), low(b), high(b), angles)
        return f16_pair(a0 - mean[0], a1 - mean[1]), f16_pair(b0 - mean[2], b1 - mean[3])

    @kernel(*_COMMON, f32p, f32p, u64, u64, i64)
    def gather(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, _pairs, _interleaved, max_pairs, table_tokens,
        table_token, _values, _scales, mean, rows, width,
    ):  # fmt: skip
        entry, dim, heads, table = _entry(entries)
        unit, offset, together = _wide_share(dim)
        first, last = _tile(tokens)
        if offset >= together:
            return
        for token in range(first + offset, last, together):
            slot = slots[token]
            if slot < 0:
                continue
            at = _angle_at(table, table_tokens, table_token, token, max_pairs) + unit * _I32(8)
            angles = _wide_angles(table, at, cosines, sines)
            x, column = _wide_place(entries, entry, slot, unit)
            for _ in range(heads):
                a, b = load_u32x4(x), load_u32x4(x + dim)
                means = _wide_means(mean, column, dim)
                a0, b0 = center(a[0], b[0], means[0], angles[0])
                a1, b1 = center(a[1], b[1], means[1], angles[1])
                a2, b2 = center(a[2], b[2], means[2], angles[2])
                a3, b3 = center(a[3], b[3], means[3], angles[3])
                row = rows + 2 * (token * width + column)
                store_u32x4(row, a0, a1, a2, a3)
                store_u32x4(row + dim, b0, b1, b2, b3)
                x += 2 * entries[entry + HEAD_STRIDE]
                column += dim

    return gather  # type: ignore[no-any-return]


def _any_gather(dtype: DType) -> Kernel:
    load = LOADS[dtype]

    @kernel(*_COMMON, f32p, f32p, u64, u64, i64)
    def gather(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, table_pairs, table_interleaved, max_pairs,
        table_tokens, table_token, values, scales, mean, rows, width,
    ):  # fmt: skip
        entry, dim, heads, table = _entry(entries)
        pairs, interleaved = _pairing(table, table_pairs, table_interleaved)
        units = (dim + _I32(1)) // _I32(2)
        first, last = _tile(tokens)
        means, out = f32_at(mean), u16_at(rows)
        for i in range(_I32(cuda.threadIdx.x), (last - first) * units * heads, _I32(THREADS)):
            unit, rest = _I32(i) % units, _I32(i) // units
            token, head = first + rest // heads, rest % heads
            slot = slots[token]
            if slot < 0:
                continue
            scale = scales[entries[entry + ROW] * heads + head]
            column = entries[entry + COLUMN] + head * dim
            row = token * width + column
            a, b = _channels(unit, pairs, interleaved, dim)
            address, at = entries[entry + ADDRESS], _element(entries, entry, slot, head)
            x = load(address, at + a, values) * scale
            y = _F32(0)
            if b < dim:
                y = load(address, at + b, values) * scale
            angle = _angle_at(table, table_tokens, table_token, token, max_pairs)
            x, y = _turn_unit(x, y, unit, pairs, angle, cosines, sines)
            out[row + a] = f16_bits(x - means[column + a])
            if b < dim:
                out[row + b] = f16_bits(y - means[column + b])

    return gather  # type: ignore[no-any-return]


@cache
def scatter(dtype: DType, wide: bool) -> Kernel:
    """Make the inverse kernel, from rows to tensors of ``dtype``; grid as for :func:`gather`.

    ``x[h, t, d] = rotate(rows[t, (h, d)] · steps[t] · scale + mean[(h, d)])``; ``steps`` float32
    [tokens]. ``overflow`` int32 [1] becomes 1 if a row is not finite. ``scales`` float32 [entries,
    heads]: fp8 is divided by them, and saturates.
    """
    return (_wide_scatter if wide else _any_scatter)(dtype)


@cuda.jit(device=True)
def _infinite(words):  # type: ignore[no-untyped-def]
    """Whether a binary16 in four words is infinite or NaN."""
    bad = False
    for word in words:
        bad |= (word & _U32(0x7C00)) == _U32(0x7C00)
        bad |= (word & _U32(0x7C000000)) == _U32(0x7C000000)
    return bad


def _wide_scatter(dtype: DType) -> Kernel:
    _, _, pair = HALVES[dtype]

    @cuda.jit(device=True)
    def restore(a, b, step, mean, angles):  # type: ignore[no-untyped-def]
        a0, a1, b0, b1 = _restore(a, b, step, mean, angles)
        return pair(a0, a1), pair(b0, b1)

    @kernel(*_COMMON, f32p, f32, u64, u64, i64, i32p, f32p)
    def scatter(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, _pairs, _interleaved, max_pairs, table_tokens,
        table_token, steps, scale, mean, rows, width, overflow, _scales,
    ):  # fmt: skip
        entry, dim, heads, table = _entry(entries)
        unit, offset, together = _wide_share(dim)
        first, last = _tile(tokens)
        if offset >= together:
            return
        bad = False
        for token in range(first + offset, last, together):
            slot = slots[token]
            if slot < 0:
                continue
            at = _angle_at(table, table_tokens, table_token, token, max_pairs) + unit * _I32(8)
            angles = _wide_angles(table, at, cosines, sines)
            x, column = _wide_place(entries, entry, slot, unit)
            step = steps[token] * scale
            for _ in range(heads):
                row = rows + 2 * (token * width + column)
                a, b = load_u32x4(row), load_u32x4(row + dim)
                bad |= _infinite(a) or _infinite(b)
                means = _wide_means(mean, column, dim)
                a0, b0 = restore(a[0], b[0], step, means[0], angles[0])
                a1, b1 = restore(a[1], b[1], step, means[1], angles[1])
                a2, b2 = restore(a[2], b[2], step, means[2], angles[2])
                a3, b3 = restore(a[3], b[3], step, means[3], angles[3])
                store_u32x4(x, a0, a1, a2, a3)
                store_u32x4(x + dim, b0, b1, b2, b3)
                x += 2 * entries[entry + HEAD_STRIDE]
                column += dim
        if bad:
            overflow[0] = _I32(1)

    return scatter  # type: ignore[no-any-return]


def _any_scatter(dtype: DType) -> Kernel:
    store = STORES[dtype]

    @kernel(*_COMMON, f32p, f32, u64, u64, i64, i32p, f32p)
    def scatter(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, table_pairs, table_interleaved, max_pairs,
        table_tokens, table_token, steps, scale, mean, rows, width, overflow, scales,
    ):  # fmt: skip
        entry, dim, heads, table = _entry(entries)
        pairs, interleaved = _pairing(table, table_pairs, table_interleaved)
        units = (dim + _I32(1)) // _I32(2)
        first, last = _tile(tokens)
        means, source = f32_at(mean), u16_at(rows)
        for i in range(_I32(cuda.threadIdx.x), (last - first) * units * heads, _I32(THREADS)):
            unit, rest = _I32(i) % units, _I32(i) // units
            token, head = first + rest // heads, rest % heads
            slot = slots[token]
            if slot < 0:
                continue
            a, b = _channels(unit, pairs, interleaved, dim)
            column = entries[entry + COLUMN] + head * dim
            row, step = token * width + column, steps[token] * scale
            x, y = _row_unit(source, row, means, column, a, b, dim, step)
            angle = _angle_at(table, table_tokens, table_token, token, max_pairs)
            x, y = _turn_unit(x, y, unit, pairs, angle, cosines, sines)
            if not (math.isfinite(x) and math.isfinite(y)):
                overflow[0] = _I32(1)
            address, at = entries[entry + ADDRESS], _element(entries, entry, slot, head)
            head_scale = scales[entries[entry + ROW] * heads + head]
            store(address, at + a, x, head_scale)
            if b < dim:
                store(address, at + b, y, head_scale)

    return scatter  # type: ignore[no-any-return]


@cache
def errors(dtype: DType, out_dtype: DType, wide: bool) -> Kernel:
    """Make the kernel that compares rows with original tensors; grid as for :func:`gather`.

    It writes Σ(x̂ − x)² and Σx² of each entry, float32 [entries, stride], where x̂ is what
    :func:`scatter` would write. The wide form needs heads of 16, 32, 64, … channels.
    """
    return (_wide_errors if wide else _any_errors)(dtype, out_dtype)


def _wide_errors(dtype: DType, out_dtype: DType) -> Kernel:
    round_to = ROUNDS[out_dtype]
    low, high, _ = HALVES[dtype]

    @cuda.jit(device=True)
    def compare(a, b, xa, xb, step, mean, angles):  # type: ignore[no-untyped-def]
        a0, a1, b0, b1 = _restore(a, b, step, mean, angles)
        d0 = round_to(a0, _F32(1)) - low(xa)
        d1 = round_to(a1, _F32(1)) - high(xa)
        e0 = round_to(b0, _F32(1)) - low(xb)
        e1 = round_to(b1, _F32(1)) - high(xb)
        return (
            d0 * d0 + d1 * d1 + e0 * e0 + e1 * e1,
            low(xa) * low(xa) + high(xa) * high(xa) + low(xb) * low(xb) + high(xb) * high(xb),
        )

    @kernel(*_COMMON, f32p, f32p, f32p, f32, u64, u64, i64, f32p, f32p, i64)
    def errors(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, _pairs, _interleaved, max_pairs, table_tokens,
        table_token, _values, _scales, steps, step_scale, mean, rows, width, lost, energy,
        stride,
    ):  # fmt: skip
        entry, dim, heads, table = _entry(entries)
        unit, offset, together = _wide_share(dim)
        first, last = _tile(tokens)
        # Lanes add up their sums together: those without a token of their own take another's.
        for begin in range(first, first + _I32(TOKENS), together):
            token = min(_I32(begin) + offset, tokens - _I32(1))
            slot = max(slots[token], _I64(0))
            at = _angle_at(table, table_tokens, table_token, token, max_pairs) + unit * _I32(8)
            angles = _wide_angles(table, at, cosines, sines)
            x, column = _wide_place(entries, entry, slot, unit)
            step = steps[token] * step_scale
            difference, total = _F32(0), _F32(0)
            for _ in range(heads):
                row = rows + 2 * (token * width + column)
                a, b = load_u32x4(row), load_u32x4(row + dim)
                xa, xb = load_u32x4(x), load_u32x4(x + dim)
                means = _wide_means(mean, column, dim)
                e0, n0 = compare(a[0], b[0], xa[0], xb[0], step, means[0], angles[0])
                e1, n1 = compare(a[1], b[1], xa[1], xb[1], step, means[1], angles[1])
                e2, n2 = compare(a[2], b[2], xa[2], xb[2], step, means[2], angles[2])
                e3, n3 = compare(a[3], b[3], xa[3], xb[3], step, means[3], angles[3])
                difference = difference + e0 + e1 + e2 + e3
                total = total + n0 + n1 + n2 + n3
                x += 2 * entries[entry + HEAD_STRIDE]
                column += dim
            by = dim // _I32(32)
            while by > 0:
                difference += shuffle_down(difference, by)
                total += shuffle_down(total, by)
                by >>= _I32(1)
            if unit == 0 and _I32(begin) + offset < last:
                to = entries[entry + ROW] * stride + token
                lost[to] = difference
                energy[to] = total

    return errors  # type: ignore[no-any-return]


def _any_errors(dtype: DType, out_dtype: DType) -> Kernel:
    round_to = ROUNDS[out_dtype]
    load = LOADS[dtype]

    @cuda.jit(device=True)
    def compare(x, address, at, values, scale):  # type: ignore[no-untyped-def]
        exact = load(address, at, values) * scale
        delta = round_to(x, scale) - exact
        return delta * delta, exact * exact

    @kernel(*_COMMON, f32p, f32p, f32p, f32, u64, u64, i64, f32p, f32p, i64)
    def errors(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, table_pairs, table_interleaved, max_pairs,
        table_tokens, table_token, values, scales, steps, step_scale, mean, rows, width, lost,
        energy, stride,
    ):  # fmt: skip
        entry, dim, heads, table = _entry(entries)
        pairs, interleaved = _pairing(table, table_pairs, table_interleaved)
        units = (dim + _I32(1)) // _I32(2)
        first, last = _tile(tokens)
        means, source = f32_at(mean), u16_at(rows)
        lane = _I32(cuda.threadIdx.x) % _I32(WARP)
        begin = first + _I32(cuda.threadIdx.x) // _I32(WARP)
        for token in range(begin, last, _I32(THREADS // WARP)):
            slot = slots[token]
            difference, total = _F32(0), _F32(0)
            step = steps[token] * step_scale
            if slot >= 0:
                for i in range(lane, units * heads, _I32(WARP)):
                    unit, head = _I32(i) % units, _I32(i) // units
                    a, b = _channels(unit, pairs, interleaved, dim)
                    column = entries[entry + COLUMN] + head * dim
                    row = token * width + column
                    x, y = _row_unit(source, row, means, column, a, b, dim, step)
                    angle = _angle_at(table, table_tokens, table_token, token, max_pairs)
                    x, y = _turn_unit(x, y, unit, pairs, angle, cosines, sines)
                    address, at = entries[entry + ADDRESS], _element(entries, entry, slot, head)
                    scale = scales[entries[entry + ROW] * heads + head]
                    e, n = compare(x, address, at + a, values, scale)
                    difference += e
                    total += n
                    if b < dim:
                        e, n = compare(y, address, at + b, values, scale)
                        difference += e
                        total += n
            for by in (16, 8, 4, 2, 1):
                difference += shuffle_down(difference, _I32(by))
                total += shuffle_down(total, _I32(by))
            if lane == 0:
                to = entries[entry + ROW] * stride + token
                lost[to] = difference
                energy[to] = total

    return errors  # type: ignore[no-any-return]


@kernel(f32p, f32p, i32, i64, i32, f32p)
def relative_errors(lost, energy, count, stride, tokens, out):  # type: ignore[no-untyped-def]
    """Relative error ‖x̂ − x‖ / ‖x‖ of each token, float32 [tokens], from sums [count, stride].

    Sums are added in order, so that the result is always the same.
    """
    token = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    if token >= tokens:
        return
    above, below = 0.0, 0.0
    for i in range(count):
        above += np.float64(lost[i * stride + token])
        below += np.float64(energy[i * stride + token])
    ratio = math.sqrt(above / below) if below > 0 else math.inf
    if above == 0 and below == 0:
        ratio = 0.0
    out[token] = _F32(ratio)


@cache
def move(size: int, *, back: bool) -> Kernel:
    """Make the kernel that copies elements of ``size`` bytes to slots, or ``back`` from them.

    Its grid is [tokens of all runs, entries]. ``runs`` int64 [tokens] are those of tokens,
    ``firsts`` int64 [runs + 1] their first tokens, and ``dense`` int64 [runs, entries] has the
    address of each run's and entry's contiguous [heads, tokens, dim].
    """
    at = {1: u8_at, 2: u16_at, 4: u32_at}[size]

    @kernel(i64p, i64p, i64p, i64p, i64p)
    def move(entries, slots, runs, firsts, dense):  # type: ignore[no-untyped-def]
        entry, dim, heads, _ = _entry(entries)
        slot = slots[_I32(cuda.blockIdx.x)]
        if slot < 0:
            return
        run = runs[_I32(cuda.blockIdx.x)]
        token, tokens = _I32(cuda.blockIdx.x) - firsts[run], firsts[run + 1] - firsts[run]
        from_or_to = dense[run * _I32(cuda.gridDim.y) + _I32(cuda.blockIdx.y)]
        begin = slot * entries[entry + TOKEN_STRIDE]
        for i in range(_I32(cuda.threadIdx.x), heads * dim, _I32(cuda.blockDim.x)):
            head, channel = _I32(i) // dim, _I32(i) % dim
            there = begin + head * entries[entry + HEAD_STRIDE]
            here = (head * tokens + token) * dim + channel
            tensor, own = at(entries[entry + ADDRESS]), at(from_or_to)
            if back:
                own[here] = tensor[there + channel]
            else:
                tensor[there + channel] = own[here]

    return move  # type: ignore[no-any-return]
