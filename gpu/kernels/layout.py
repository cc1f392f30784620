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
from typing import Any

import numpy as np
from numba import cuda

from kvtc_stream.formats import DType
from kvtc_stream.gpu.kernels.fp8 import e4m3_code, e4m3_value, e5m2_code, e5m2_value
from kvtc_stream.gpu.kernels.intrinsics import (
    WARP,
    bf16_bits,
    bf16_pair,
    f16_bits,
    f16_pair,
    f16_value,
    f32,
    f32_at,
    f32_from_bits,
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
    u8,
    u8_at,
    u16_at,
    u32_at,
    u64,
)
from kvtc_stream.gpu.runtime.compile import Kernel, kernel

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
def rotations(positions, frequencies, pairs, scales, tokens, most, sign, cosines, sines):  # type: ignore[no-untyped-def]
    """Kernel: cosines and sines of RoPE, each float32 [tables, tokens, max pairs].

    ``sign`` 1 applies RoPE, -1 removes it. Arithmetic as in the specification.
    """
    table = _I32(cuda.blockIdx.y)
    i = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    if i >= tokens * most:
        return
    token, pair = i // most, i % most
    if pair >= pairs[table]:
        return
    angle = np.float64(positions[token]) * frequencies[table * most + pair]
    scale = scales[table]
    if sign < 0:
        scale = 1.0 / scale
    at = _I64(table) * tokens * most + i
    cosines[at] = _F32(math.cos(angle) * scale)
    sines[at] = _F32(math.sin(angle) * (scale * sign))


def _load_f32(address, i, _table):  # type: ignore[no-untyped-def]
    return f32_at(address)[i]


def _load_f16(address, i, _table):  # type: ignore[no-untyped-def]
    return f16_value(u16_at(address)[i])


def _load_bf16(address, i, _table):  # type: ignore[no-untyped-def]
    return f32_from_bits(_U32(u16_at(address)[i]) << _U32(16))


def _load_fp8(address, i, table):  # type: ignore[no-untyped-def]
    return table[u8_at(address)[i]]


def _store_f32(address, i, value, _scale):  # type: ignore[no-untyped-def]
    f32_at(address)[i] = value


def _store_f16(address, i, value, _scale):  # type: ignore[no-untyped-def]
    u16_at(address)[i] = f16_bits(value)


def _store_bf16(address, i, value, _scale):  # type: ignore[no-untyped-def]
    u16_at(address)[i] = bf16_bits(value)


def _store_e4m3(address, i, value, scale):  # type: ignore[no-untyped-def]
    u8_at(address)[i] = u8(e4m3_code(value / scale))


def _store_e5m2(address, i, value, scale):  # type: ignore[no-untyped-def]
    u8_at(address)[i] = u8(e5m2_code(value / scale))


def _round_f32(value, _scale):  # type: ignore[no-untyped-def]
    return value


def _round_f16(value, _scale):  # type: ignore[no-untyped-def]
    return f16_value(f16_bits(value))


def _round_bf16(value, _scale):  # type: ignore[no-untyped-def]
    return f32_from_bits(_U32(bf16_bits(value)) << _U32(16))


def _round_e4m3(value, scale):  # type: ignore[no-untyped-def]
    return e4m3_value(e4m3_code(value / scale)) * scale


def _round_e5m2(value, scale):  # type: ignore[no-untyped-def]
    return e5m2_value(e5m2_code(value / scale)) * scale


def _device(function: Any) -> Any:
    return cuda.jit(device=True)(function)


_LOADS = {
    DType.FLOAT32: _device(_load_f32),
    DType.FLOAT16: _device(_load_f16),
    DType.BFLOAT16: _device(_load_bf16),
    DType.FLOAT8_E4M3FN: _device(_load_fp8),
    DType.FLOAT8_E5M2: _device(_load_fp8),
}
_STORES = {
    DType.FLOAT32: _device(_store_f32),
    DType.FLOAT16: _device(_store_f16),
    DType.BFLOAT16: _device(_store_bf16),
    DType.FLOAT8_E4M3FN: _device(_store_e4m3),
    DType.FLOAT8_E5M2: _device(_store_e5m2),
}
_ROUNDS = {
    DType.FLOAT32: _device(_round_f32),
    DType.FLOAT16: _device(_round_f16),
    DType.BFLOAT16: _device(_round_bf16),
    DType.FLOAT8_E4M3FN: _device(_round_e4m3),
    DType.FLOAT8_E5M2: _device(_round_e5m2),
}


@_device
def _first_channel(unit, pairs, interleaved):  # type: ignore[no-untyped-def]
    """First channel of a unit: two channels that RoPE pairs, or two without RoPE."""
    if unit < pairs and not interleaved:
        return unit
    if unit < pairs:
        return _I32(2) * unit
    return unit + pairs


@_device
def _second_channel(unit, pairs, interleaved, dim):  # type: ignore[no-untyped-def]
    """Second channel of a unit, or ``dim`` if it has only one."""
    if unit < pairs and not interleaved:
        return unit + pairs
    if unit < pairs:
        return _I32(2) * unit + _I32(1)
    return unit + pairs + (dim - _I32(2) * pairs + _I32(1)) // _I32(2)


@_device
def _low_f16(word):  # type: ignore[no-untyped-def]
    return f16_value(np.uint16(word & _U32(0xFFFF)))


@_device
def _high_f16(word):  # type: ignore[no-untyped-def]
    return f16_value(np.uint16(word >> _U32(16)))


@_device
def _low_bf16(word):  # type: ignore[no-untyped-def]
    return f32_from_bits(_U32(word << _U32(16)))


@_device
def _high_bf16(word):  # type: ignore[no-untyped-def]
    return f32_from_bits(_U32(word & _U32(0xFFFF0000)))


_HALVES = {
    DType.FLOAT16: (_low_f16, _high_f16, f16_pair),
    DType.BFLOAT16: (_low_bf16, _high_bf16, bf16_pair),
}
#: Element types that the wide forms support.
WIDE = frozenset(_HALVES)


@_device
def _eight(address):  # type: ignore[no-untyped-def]
    """Load eight binary32 from an address."""
    return load_f32x4(address), load_f32x4(address + 16)


@_device
def _turns(table, cosines, sines, at):  # type: ignore[no-untyped-def]
    """Cosines and sines of eight pairs; 1 and 0 without RoPE."""
    if table < 0:
        one, zero = (_F32(1), _F32(1), _F32(1), _F32(1)), (_F32(0), _F32(0), _F32(0), _F32(0))
        return one, one, zero, zero
    c, s = cosines + 4 * at, sines + 4 * at
    return load_f32x4(c), load_f32x4(c + 16), load_f32x4(s), load_f32x4(s + 16)


_COMMON = (
    i64p,  # entries [entries, FIELDS]
    i64p,  # slots [tokens]
    i32,  # tokens
    u64,  # address of cosines
    u64,  # and of sines, float32 [tables, table tokens, most]
    i32p,  # pairs of each table
    i32p,  # interleaved
    i32,  # most pairs
    i32,  # table tokens
    i64,  # where the first token is among them
)


@cache
def gather(dtype: DType, wide: bool) -> Kernel:
    """Make the kernel from tensors of ``dtype`` to rows; grid [⌈tokens / TOKENS⌉, entries].

    ``rows[t, (h, d)] = unrotate(x[h, t, d] · scale) - mean[(h, d)]``. ``values`` are those of fp8
    codes, float32 [256]; ``scales`` float32 [entries, heads]. ``mean`` and ``rows`` are addresses.
    """
    return (_wide_gather if wide else _any_gather)(dtype)


def _wide_gather(dtype: DType) -> Kernel:
    low, high, _ = _HALVES[dtype]

    @_device
    def turn(a, b, c0, c1, s0, s1, ma0, ma1, mb0, mb1):  # type: ignore[no-untyped-def]
        a0, a1, b0, b1 = low(a), high(a), low(b), high(b)
        return (
            f16_pair(a0 * c0 - b0 * s0 - ma0, a1 * c1 - b1 * s1 - ma1),
            f16_pair(b0 * c0 + a0 * s0 - mb0, b1 * c1 + a1 * s1 - mb1),
        )

    @kernel(*_COMMON, f32p, f32p, u64, u64, i64)
    def gather(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, _pairs, _interleaved, most, table_tokens,
        table_token, _values, _scales, mean, rows, width,
    ):  # fmt: skip
        entry = _I32(cuda.blockIdx.y) * _I32(FIELDS)
        dim, heads = _I32(entries[entry + DIM]), _I32(entries[entry + HEADS])
        table = entries[entry + TABLE]
        units = dim // _I32(16)
        thread = _I32(cuda.threadIdx.x)
        unit, offset, together = thread % units, thread // units, _I32(THREADS) // units
        first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
        last = min(first + _I32(TOKENS), tokens)
        if offset >= together:
            return
        for token in range(first + offset, last, together):
            slot = slots[token]
            if slot < 0:
                continue
            at = (table * table_tokens + table_token + token) * most + unit * _I32(8)
            c, d, s, r = _turns(table, cosines, sines, at)
            x = entries[entry + ADDRESS] + 2 * (
                slot * entries[entry + TOKEN_STRIDE] + unit * _I32(8)
            )
            column = entries[entry + COLUMN] + unit * _I32(8)
            for _ in range(heads):
                a, b = load_u32x4(x), load_u32x4(x + dim)
                m = mean + 4 * column
                m0, m1 = _eight(m)
                n0, n1 = _eight(m + 2 * dim)
                a0, b0 = turn(a[0], b[0], c[0], c[1], s[0], s[1], m0[0], m0[1], n0[0], n0[1])
                a1, b1 = turn(a[1], b[1], c[2], c[3], s[2], s[3], m0[2], m0[3], n0[2], n0[3])
                a2, b2 = turn(a[2], b[2], d[0], d[1], r[0], r[1], m1[0], m1[1], n1[0], n1[1])
                a3, b3 = turn(a[3], b[3], d[2], d[3], r[2], r[3], m1[2], m1[3], n1[2], n1[3])
                to = rows + 2 * (token * width + column)
                store_u32x4(to, a0, a1, a2, a3)
                store_u32x4(to + dim, b0, b1, b2, b3)
                x += 2 * entries[entry + HEAD_STRIDE]
                column += dim

    return gather  # type: ignore[no-any-return]


def _any_gather(dtype: DType) -> Kernel:
    load = _LOADS[dtype]

    @kernel(*_COMMON, f32p, f32p, u64, u64, i64)
    def gather(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, pairs, interleaved, most, table_tokens,
        table_token, values, scales, mean, rows, width,
    ):  # fmt: skip
        entry = _I32(cuda.blockIdx.y) * _I32(FIELDS)
        dim, heads = _I32(entries[entry + DIM]), _I32(entries[entry + HEADS])
        table = entries[entry + TABLE]
        paired, woven = _I32(0), False
        if table >= 0:
            paired, woven = pairs[table], interleaved[table] != 0
        units = (dim + _I32(1)) // _I32(2)
        first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
        last = min(first + _I32(TOKENS), tokens)
        means, out = f32_at(mean), u16_at(rows)
        for i in range(_I32(cuda.threadIdx.x), (last - first) * units * heads, _I32(THREADS)):
            unit, rest = _I32(i) % units, _I32(i) // units
            token, head = first + rest // heads, rest % heads
            slot = slots[token]
            if slot < 0:
                continue
            scale = scales[entries[entry + ROW] * heads + head]
            a = _first_channel(unit, paired, woven)
            b = _second_channel(unit, paired, woven, dim)
            at = slot * entries[entry + TOKEN_STRIDE] + head * entries[entry + HEAD_STRIDE]
            x = load(entries[entry + ADDRESS], at + a, values) * scale
            y = _F32(0)
            if b < dim:
                y = load(entries[entry + ADDRESS], at + b, values) * scale
            if unit < paired:
                r = (table * table_tokens + table_token + token) * most + unit
                c, s = f32_at(cosines)[r], f32_at(sines)[r]
                x, y = x * c - y * s, y * c + x * s
            column = entries[entry + COLUMN] + head * dim
            to = token * width + column
            out[to + a] = f16_bits(x - means[column + a])
            if b < dim:
                out[to + b] = f16_bits(y - means[column + b])

    return gather  # type: ignore[no-any-return]


@cache
def scatter(dtype: DType, wide: bool) -> Kernel:
    """Make the inverse kernel, from rows to tensors of ``dtype``; grid as for :func:`gather`.

    ``x[h, t, d] = rotate(rows[t, (h, d)] · steps[t] · scale + mean[(h, d)])``; ``steps`` float32
    [tokens]. ``overflow`` int32 [1] becomes 1 if a row is not finite. ``scales`` float32 [entries,
    heads]: fp8 is divided by them, and saturates.
    """
    return (_wide_scatter if wide else _any_scatter)(dtype)


def _wide_scatter(dtype: DType) -> Kernel:
    _, _, pair = _HALVES[dtype]

    @_device
    def turn(a, b, c0, c1, s0, s1, ma0, ma1, mb0, mb1, step):  # type: ignore[no-untyped-def]
        a0, a1 = _low_f16(a) * step + ma0, _high_f16(a) * step + ma1
        b0, b1 = _low_f16(b) * step + mb0, _high_f16(b) * step + mb1
        return (
            pair(a0 * c0 - b0 * s0, a1 * c1 - b1 * s1),
            pair(b0 * c0 + a0 * s0, b1 * c1 + a1 * s1),
        )

    @_device
    def infinite(words):  # type: ignore[no-untyped-def]
        bad = False
        for word in words:
            bad |= (word & _U32(0x7C00)) == _U32(0x7C00)
            bad |= (word & _U32(0x7C000000)) == _U32(0x7C000000)
        return bad

    @kernel(*_COMMON, f32p, f32, u64, u64, i64, i32p, f32p)
    def scatter(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, _pairs, _interleaved, most, table_tokens,
        table_token, steps, scale, mean, rows, width, overflow, _scales,
    ):  # fmt: skip
        entry = _I32(cuda.blockIdx.y) * _I32(FIELDS)
        dim, heads = _I32(entries[entry + DIM]), _I32(entries[entry + HEADS])
        table = entries[entry + TABLE]
        units = dim // _I32(16)
        thread = _I32(cuda.threadIdx.x)
        unit, offset, together = thread % units, thread // units, _I32(THREADS) // units
        first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
        last = min(first + _I32(TOKENS), tokens)
        if offset >= together:
            return
        bad = False
        for token in range(first + offset, last, together):
            slot = slots[token]
            if slot < 0:
                continue
            at = (table * table_tokens + table_token + token) * most + unit * _I32(8)
            c, d, s, r = _turns(table, cosines, sines, at)
            x = entries[entry + ADDRESS] + 2 * (
                slot * entries[entry + TOKEN_STRIDE] + unit * _I32(8)
            )
            column = entries[entry + COLUMN] + unit * _I32(8)
            step = steps[token] * scale
            for _ in range(heads):
                source = rows + 2 * (token * width + column)
                a, b = load_u32x4(source), load_u32x4(source + dim)
                bad |= infinite(a) or infinite(b)
                m = mean + 4 * column
                m0, m1 = _eight(m)
                n0, n1 = _eight(m + 2 * dim)
                a0, b0 = turn(a[0], b[0], c[0], c[1], s[0], s[1], m0[0], m0[1], n0[0], n0[1], step)
                a1, b1 = turn(a[1], b[1], c[2], c[3], s[2], s[3], m0[2], m0[3], n0[2], n0[3], step)
                a2, b2 = turn(a[2], b[2], d[0], d[1], r[0], r[1], m1[0], m1[1], n1[0], n1[1], step)
                a3, b3 = turn(a[3], b[3], d[2], d[3], r[2], r[3], m1[2], m1[3], n1[2], n1[3], step)
                store_u32x4(x, a0, a1, a2, a3)
                store_u32x4(x + dim, b0, b1, b2, b3)
                x += 2 * entries[entry + HEAD_STRIDE]
                column += dim
        if bad:
            overflow[0] = _I32(1)

    return scatter  # type: ignore[no-any-return]


def _any_scatter(dtype: DType) -> Kernel:
    store = _STORES[dtype]

    @kernel(*_COMMON, f32p, f32, u64, u64, i64, i32p, f32p)
    def scatter(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, pairs, interleaved, most, table_tokens,
        table_token, steps, scale, mean, rows, width, overflow, scales,
    ):  # fmt: skip
        entry = _I32(cuda.blockIdx.y) * _I32(FIELDS)
        dim, heads = _I32(entries[entry + DIM]), _I32(entries[entry + HEADS])
        table = entries[entry + TABLE]
        paired, woven = _I32(0), False
        if table >= 0:
            paired, woven = pairs[table], interleaved[table] != 0
        units = (dim + _I32(1)) // _I32(2)
        first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
        last = min(first + _I32(TOKENS), tokens)
        means, source = f32_at(mean), u16_at(rows)
        for i in range(_I32(cuda.threadIdx.x), (last - first) * units * heads, _I32(THREADS)):
            unit, rest = _I32(i) % units, _I32(i) // units
            token, head = first + rest // heads, rest % heads
            slot = slots[token]
            if slot < 0:
                continue
            a = _first_channel(unit, paired, woven)
            b = _second_channel(unit, paired, woven, dim)
            column = entries[entry + COLUMN] + head * dim
            begin = token * width + column
            step = steps[token] * scale
            x = f16_value(source[begin + a]) * step + means[column + a]
            y = _F32(0)
            if b < dim:
                y = f16_value(source[begin + b]) * step + means[column + b]
            if unit < paired:
                r = (table * table_tokens + table_token + token) * most + unit
                c, s = f32_at(cosines)[r], f32_at(sines)[r]
                x, y = x * c - y * s, y * c + x * s
            if not (math.isfinite(x) and math.isfinite(y)):
                overflow[0] = _I32(1)
            at = slot * entries[entry + TOKEN_STRIDE] + head * entries[entry + HEAD_STRIDE]
            of_head = scales[entries[entry + ROW] * heads + head]
            store(entries[entry + ADDRESS], at + a, x, of_head)
            if b < dim:
                store(entries[entry + ADDRESS], at + b, y, of_head)

    return scatter  # type: ignore[no-any-return]


@cache
def errors(dtype: DType, out_dtype: DType, wide: bool) -> Kernel:
    """Make the kernel that compares rows with original tensors; grid as for :func:`gather`.

    It writes Σ(x̂ − x)² and Σx² of each entry, float32 [entries, stride], where x̂ is what
    :func:`scatter` would write. The wide form needs heads of 16, 32, 64, … channels.
    """
    return (_wide_errors if wide else _any_errors)(dtype, out_dtype)


def _wide_errors(dtype: DType, out_dtype: DType) -> Kernel:
    round_to = _ROUNDS[out_dtype]
    low, high, _ = _HALVES[dtype]

    @_device
    def compare(a, b, xa, xb, c0, c1, s0, s1, ma0, ma1, mb0, mb1, step):  # type: ignore[no-untyped-def]
        a0, a1 = _low_f16(a) * step + ma0, _high_f16(a) * step + ma1
        b0, b1 = _low_f16(b) * step + mb0, _high_f16(b) * step + mb1
        d0 = round_to(a0 * c0 - b0 * s0, _F32(1)) - low(xa)
        d1 = round_to(a1 * c1 - b1 * s1, _F32(1)) - high(xa)
        e0 = round_to(b0 * c0 + a0 * s0, _F32(1)) - low(xb)
        e1 = round_to(b1 * c1 + a1 * s1, _F32(1)) - high(xb)
        return (
            d0 * d0 + d1 * d1 + e0 * e0 + e1 * e1,
            low(xa) * low(xa) + high(xa) * high(xa) + low(xb) * low(xb) + high(xb) * high(xb),
        )

    @kernel(*_COMMON, f32p, f32p, f32p, f32, u64, u64, i64, f32p, f32p, i64)
    def errors(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, _pairs, _interleaved, most, table_tokens,
        table_token, _values, _scales, steps, step_scale, mean, rows, width, lost, energy,
        stride,
    ):  # fmt: skip
        entry = _I32(cuda.blockIdx.y) * _I32(FIELDS)
        dim, heads = _I32(entries[entry + DIM]), _I32(entries[entry + HEADS])
        table = entries[entry + TABLE]
        units = dim // _I32(16)
        thread = _I32(cuda.threadIdx.x)
        unit, offset, together = thread % units, thread // units, _I32(THREADS) // units
        first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
        for begin in range(first, first + _I32(TOKENS), together):
            token = min(_I32(begin) + offset, tokens - _I32(1))
            slot = max(slots[token], _I64(0))
            at = (table * table_tokens + table_token + token) * most + unit * _I32(8)
            c, d, s, r = _turns(table, cosines, sines, at)
            x = entries[entry + ADDRESS] + 2 * (
                slot * entries[entry + TOKEN_STRIDE] + unit * _I32(8)
            )
            column = entries[entry + COLUMN] + unit * _I32(8)
            step = steps[token] * step_scale
            difference, total = _F32(0), _F32(0)
            for _ in range(heads):
                source = rows + 2 * (token * width + column)
                a, b = load_u32x4(source), load_u32x4(source + dim)
                xa, xb = load_u32x4(x), load_u32x4(x + dim)
                m = mean + 4 * column
                m0, m1 = _eight(m)
                n0, n1 = _eight(m + 2 * dim)
                e, n = compare(
                    a[0], b[0], xa[0], xb[0], c[0], c[1], s[0], s[1],
                    m0[0], m0[1], n0[0], n0[1], step,
                )  # fmt: skip
                difference += e
                total += n
                e, n = compare(
                    a[1], b[1], xa[1], xb[1], c[2], c[3], s[2], s[3],
                    m0[2], m0[3], n0[2], n0[3], step,
                )  # fmt: skip
                difference += e
                total += n
                e, n = compare(
                    a[2], b[2], xa[2], xb[2], d[0], d[1], r[0], r[1],
                    m1[0], m1[1], n1[0], n1[1], step,
                )  # fmt: skip
                difference += e
                total += n
                e, n = compare(
                    a[3], b[3], xa[3], xb[3], d[2], d[3], r[2], r[3],
                    m1[2], m1[3], n1[2], n1[3], step,
                )  # fmt: skip
                difference += e
                total += n
                x += 2 * entries[entry + HEAD_STRIDE]
                column += dim
            by = units >> _I32(1)
            while by > 0:
                difference += shuffle_down(difference, by)
                total += shuffle_down(total, by)
                by >>= _I32(1)
            if unit == 0 and _I32(begin) + offset < min(first + _I32(TOKENS), tokens):
                to = entries[entry + ROW] * stride + token
                lost[to] = difference
                energy[to] = total

    return errors  # type: ignore[no-any-return]


def _any_errors(dtype: DType, out_dtype: DType) -> Kernel:
    round_to = _ROUNDS[out_dtype]
    load = _LOADS[dtype]

    @kernel(*_COMMON, f32p, f32p, f32p, f32, u64, u64, i64, f32p, f32p, i64)
    def errors(  # type: ignore[no-untyped-def]
        entries, slots, tokens, cosines, sines, pairs, interleaved, most, table_tokens,
        table_token, values, scales, steps, step_scale, mean, rows, width, lost, energy, stride,
    ):  # fmt: skip
        entry = _I32(cuda.blockIdx.y) * _I32(FIELDS)
        dim, heads = _I32(entries[entry + DIM]), _I32(entries[entry + HEADS])
        table = entries[entry + TABLE]
        paired, woven = _I32(0), False
        if table >= 0:
            paired, woven = pairs[table], interleaved[table] != 0
        units = (dim + _I32(1)) // _I32(2)
        lane = _I32(cuda.threadIdx.x) % _I32(WARP)
        first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
        last = min(first + _I32(TOKENS), tokens)
        means, source = f32_at(mean), u16_at(rows)
        begin = first + _I32(cuda.threadIdx.x) // _I32(WARP)
        for token in range(begin, last, _I32(THREADS // WARP)):
            slot = slots[token]
            difference, total = _F32(0), _F32(0)
            step = steps[token] * step_scale
            if slot >= 0:
                for i in range(lane, units * heads, _I32(WARP)):
                    unit, head = _I32(i) % units, _I32(i) // units
                    scale = scales[entries[entry + ROW] * heads + head]
                    at = slot * entries[entry + TOKEN_STRIDE] + head * entries[entry + HEAD_STRIDE]
                    column = entries[entry + COLUMN] + head * dim
                    row = token * width + column
                    a = _first_channel(unit, paired, woven)
                    b = _second_channel(unit, paired, woven, dim)
                    x = f16_value(source[row + a]) * step + means[column + a]
                    y = _F32(0)
                    if b < dim:
                        y = f16_value(source[row + b]) * step + means[column + b]
                    if unit < paired:
                        r = (table * table_tokens + table_token + token) * most + unit
                        c, s = f32_at(cosines)[r], f32_at(sines)[r]
                        x, y = x * c - y * s, y * c + x * s
                    exact = load(entries[entry + ADDRESS], at + a, values) * scale
                    delta = round_to(x, scale) - exact
                    difference += delta * delta
                    total += exact * exact
                    if b < dim:
                        exact = load(entries[entry + ADDRESS], at + b, values) * scale
                        delta = round_to(y, scale) - exact
                        difference += delta * delta
                        total += exact * exact
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

    Its grid is [tokens, entries]; ``dense`` int64 [entries] has the address of each entry's
    contiguous [heads, tokens, dim].
    """
    at = {1: u8_at, 2: u16_at, 4: u32_at}[size]

    @kernel(i64p, i64p, i32, i64p)
    def move(entries, slots, tokens, dense):  # type: ignore[no-untyped-def]
        entry = _I32(cuda.blockIdx.y) * _I32(FIELDS)
        dim, heads = _I32(entries[entry + DIM]), _I32(entries[entry + HEADS])
        token = _I32(cuda.blockIdx.x)
        slot = slots[token]
        if slot < 0:
            return
        for i in range(_I32(cuda.threadIdx.x), heads * dim, _I32(cuda.blockDim.x)):
            head, channel = _I32(i) // dim, _I32(i) % dim
            there = slot * entries[entry + TOKEN_STRIDE] + head * entries[entry + HEAD_STRIDE]
            here = (head * tokens + token) * dim + channel
            tensor, own = at(entries[entry + ADDRESS]), at(dense[_I32(cuda.blockIdx.y)])
            if back:
                own[here] = tensor[there + channel]
            else:
                tensor[there + channel] = own[here]

    return move  # type: ignore[no-any-return]
