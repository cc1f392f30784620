"""From a framework's tensors to rows and back: addresses, RoPE, means, casts, errors.

A cache's K, or V, is one address per layer; a token is at ``slots[t] · token_stride`` from there
and a head at ``h · head_stride``, in elements. That describes contiguous tensors, one tensor a
layer, and pages with a page table alike. A slot of -1 is nowhere: nothing is read or written.

Rows are binary16 [tokens, width]: without RoPE, less the mean.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from kvtc_stream.formats import DType
from kvtc_stream.gpu.intrinsics import (
    WARP,
    bf16_bits,
    f16_bits,
    f16_value,
    f32_at,
    f32_from_bits,
    f32p,
    f64p,
    i32,
    i32p,
    i64,
    i64p,
    shuffle_down,
    u8_at,
    u16_at,
    u16p,
    u32_at,
    u64,
    u64p,
)
from kvtc_stream.gpu.kernel import Kernel, kernel

#: Threads of a block; tokens of one.
THREADS = 256
TOKENS = 64

_I32, _I64, _U32, _F32 = np.int32, np.int64, np.uint32, np.float32


@kernel(i64p, f64p, i32p, f64p, i32, i32, i32, f32p, f32p)
def rotations(positions, frequencies, pairs, scales, tokens, most, sign, cosines, sines):  # type: ignore[no-untyped-def]
    """Cosines and sines of RoPE, float32 [tables, tokens, most pairs] each.

    ``sign`` is 1 to put RoPE on, -1 to take it off. Arithmetic as in the specification.
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


def _store_f32(address, i, value):  # type: ignore[no-untyped-def]
    f32_at(address)[i] = value


def _store_f16(address, i, value):  # type: ignore[no-untyped-def]
    u16_at(address)[i] = f16_bits(value)


def _store_bf16(address, i, value):  # type: ignore[no-untyped-def]
    u16_at(address)[i] = bf16_bits(value)


def _round_f32(value):  # type: ignore[no-untyped-def]
    return value


def _round_f16(value):  # type: ignore[no-untyped-def]
    return f16_value(f16_bits(value))


def _round_bf16(value):  # type: ignore[no-untyped-def]
    return f32_from_bits(_U32(bf16_bits(value)) << _U32(16))


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
}
_ROUNDS = {
    DType.FLOAT32: _device(_round_f32),
    DType.FLOAT16: _device(_round_f16),
    DType.BFLOAT16: _device(_round_bf16),
}


@_device
def _first_channel(unit, pairs, interleaved):  # type: ignore[no-untyped-def]
    """A unit is two channels: those of a pair of RoPE, behind them any two."""
    if unit < pairs and not interleaved:
        return unit
    if unit < pairs:
        return _I32(2) * unit
    return unit + pairs


@_device
def _second_channel(unit, pairs, interleaved, dim):  # type: ignore[no-untyped-def]
    """``dim`` where there is none."""
    if unit < pairs and not interleaved:
        return unit + pairs
    if unit < pairs:
        return _I32(2) * unit + _I32(1)
    return unit + pairs + (dim - _I32(2) * pairs + _I32(1)) // _I32(2)


@cache
def gather(dtype: DType) -> Kernel:
    """A kernel from tensors of ``dtype`` to rows; blocks [⌈tokens / TOKENS⌉, layers · heads]."""
    load = _LOADS[dtype]

    @kernel(
        u64p, i32, i64p, i64, i64, i32, i32, i32, f32p, f32p,
        i32p, i32p, i32p, i32, i64, f32p, f32p, f32p, u16p, i64,
    )  # fmt: skip
    def gather(  # type: ignore[no-untyped-def]
        addresses,
        heads,
        slots,
        token_stride,
        head_stride,
        dim,
        tokens,
        most,
        cosines,
        sines,
        tables,
        pairs,
        interleaved,
        table_tokens,
        table_token,
        values,
        scales,
        mean,
        rows,
        width,
    ):
        """``rows[t, (l, h, d)] = unrotate(x[l, h, t, d]) - mean[(l, h, d)]``.

        ``tables`` int32 [layers]: the layer's rotations, or -1; these begin at token
        ``table_token`` of ``table_tokens``. ``values`` float32 [256]: of fp8. ``scales`` float32
        [layers, heads].
        """
        layer = _I32(cuda.blockIdx.y) // heads
        head = _I32(cuda.blockIdx.y) % heads
        table = tables[layer]
        paired, woven = _I32(0), False
        if table >= 0:
            paired, woven = pairs[table], interleaved[table] != 0
        units = (dim + _I32(1)) // _I32(2)
        thread = _I32(cuda.threadIdx.x)
        first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
        last = min(first + _I32(TOKENS), tokens)
        scale = scales[_I32(cuda.blockIdx.y)]
        column = _I64(cuda.blockIdx.y) * dim
        for i in range(thread, (last - first) * units, _I32(THREADS)):
            token, unit = first + _I32(i) // units, _I32(i) % units
            slot = slots[token]
            if slot < 0:
                continue
            a = _first_channel(unit, paired, woven)
            b = _second_channel(unit, paired, woven, dim)
            at = slot * token_stride + head * head_stride
            x = load(addresses[layer], at + a, values) * scale
            y = _F32(0)
            if b < dim:
                y = load(addresses[layer], at + b, values) * scale
            if unit < paired:
                r = (_I64(table) * table_tokens + table_token + token) * most + unit
                x, y = x * cosines[r] - y * sines[r], y * cosines[r] + x * sines[r]
            to = token * width + column
            rows[to + a] = f16_bits(x - mean[column + a])
            if b < dim:
                rows[to + b] = f16_bits(y - mean[column + b])

    return gather  # type: ignore[no-any-return]


@cache
def scatter(dtype: DType) -> Kernel:
    """The inverse kernel, to tensors of ``dtype``; blocks as for :func:`gather`."""
    store = _STORES[dtype]

    @kernel(
        u64p, i32, i64p, i64, i64, i32, i32, i32, f32p, f32p,
        i32p, i32p, i32p, i32, i64, i32p, f32p, f32p, u16p, i64, i32p,
    )  # fmt: skip
    def scatter(  # type: ignore[no-untyped-def]
        addresses,
        heads,
        slots,
        token_stride,
        head_stride,
        dim,
        tokens,
        most,
        cosines,
        sines,
        tables,
        pairs,
        interleaved,
        table_tokens,
        table_token,
        columns,
        steps,
        mean,
        rows,
        width,
        overflow,
    ):
        """``x[l, h, t, d] = rotate(rows[t, (l, h, d)] · steps[t] + mean[(l, h, d)])``.

        ``columns`` int32 [layers]: where a layer's channels begin in rows and mean. ``steps`` is
        float32 [tokens]. ``overflow`` int32 [1] becomes 1 where a row is not finite.
        """
        layer = _I32(cuda.blockIdx.y) // heads
        head = _I32(cuda.blockIdx.y) % heads
        table = tables[layer]
        paired, woven = _I32(0), False
        if table >= 0:
            paired, woven = pairs[table], interleaved[table] != 0
        units = (dim + _I32(1)) // _I32(2)
        thread = _I32(cuda.threadIdx.x)
        first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
        last = min(first + _I32(TOKENS), tokens)
        column = _I64(columns[layer] + head * dim)
        for i in range(thread, (last - first) * units, _I32(THREADS)):
            token, unit = first + _I32(i) // units, _I32(i) % units
            slot = slots[token]
            if slot < 0:
                continue
            a = _first_channel(unit, paired, woven)
            b = _second_channel(unit, paired, woven, dim)
            source = token * width + column
            step = steps[token]
            x = f16_value(rows[source + a]) * step + mean[column + a]
            y = _F32(0)
            if b < dim:
                y = f16_value(rows[source + b]) * step + mean[column + b]
            if unit < paired:
                r = (_I64(table) * table_tokens + table_token + token) * most + unit
                x, y = x * cosines[r] - y * sines[r], y * cosines[r] + x * sines[r]
            if not (math.isfinite(x) and math.isfinite(y)):
                overflow[0] = _I32(1)
            at = slot * token_stride + head * head_stride
            store(addresses[layer], at + a, x)
            if b < dim:
                store(addresses[layer], at + b, y)

    return scatter  # type: ignore[no-any-return]


@cache
def errors(dtype: DType, out_dtype: DType) -> Kernel:
    """A kernel that compares rows with the tensors that they should become; blocks as before."""
    load, round_to = _LOADS[dtype], _ROUNDS[out_dtype]

    @kernel(
        u64p, i32, i64p, i64, i64, i32, i32, i32, f32p, f32p,
        i32p, i32p, i32p, i32, i64, f32p, f32p, f32p, f32p, u16p, i64, f32p, f32p, i64,
    )  # fmt: skip
    def errors(  # type: ignore[no-untyped-def]
        addresses,
        heads,
        slots,
        token_stride,
        head_stride,
        dim,
        tokens,
        most,
        cosines,
        sines,
        tables,
        pairs,
        interleaved,
        table_tokens,
        table_token,
        values,
        scales,
        steps,
        mean,
        rows,
        width,
        lost,
        energy,
        stride,
    ):
        """Σ(x̂ − x)² and Σx² of each layer and head, float32 [layers · heads, stride].

        x̂ is what :func:`scatter` would write; a warp sums up a token.
        """
        layer = _I32(cuda.blockIdx.y) // heads
        head = _I32(cuda.blockIdx.y) % heads
        table = tables[layer]
        paired, woven = _I32(0), False
        if table >= 0:
            paired, woven = pairs[table], interleaved[table] != 0
        units = (dim + _I32(1)) // _I32(2)
        lane = _I32(cuda.threadIdx.x) % _I32(WARP)
        first = _I32(cuda.blockIdx.x) * _I32(TOKENS)
        last = min(first + _I32(TOKENS), tokens)
        column = _I64(cuda.blockIdx.y) * dim
        scale = scales[_I32(cuda.blockIdx.y)]
        begin = first + _I32(cuda.threadIdx.x) // _I32(WARP)
        for token in range(begin, last, _I32(THREADS // WARP)):
            slot = slots[token]
            difference, total = _F32(0), _F32(0)
            step = steps[token]
            at = slot * token_stride + head * head_stride
            source = token * width + column
            if slot >= 0:
                for unit in range(lane, units, _I32(WARP)):
                    a = _first_channel(_I32(unit), paired, woven)
                    b = _second_channel(_I32(unit), paired, woven, dim)
                    x = f16_value(rows[source + a]) * step + mean[column + a]
                    y = _F32(0)
                    if b < dim:
                        y = f16_value(rows[source + b]) * step + mean[column + b]
                    if unit < paired:
                        r = (_I64(table) * table_tokens + table_token + token) * most + unit
                        x, y = x * cosines[r] - y * sines[r], y * cosines[r] + x * sines[r]
                    exact = load(addresses[layer], at + a, values) * scale
                    delta = round_to(x) - exact
                    difference += delta * delta
                    total += exact * exact
                    if b < dim:
                        exact = load(addresses[layer], at + b, values) * scale
                        delta = round_to(y) - exact
                        difference += delta * delta
                        total += exact * exact
            for by in (16, 8, 4, 2, 1):
                difference += shuffle_down(difference, _I32(by))
                total += shuffle_down(total, _I32(by))
            if lane == 0:
                to = _I64(cuda.blockIdx.y) * stride + token
                lost[to] = difference
                energy[to] = total

    return errors  # type: ignore[no-any-return]


@kernel(f32p, f32p, i32, i64, i32, f32p)
def relative_errors(lost, energy, count, stride, tokens, out):  # type: ignore[no-untyped-def]
    """‖x̂ − x‖ / ‖x‖ of each token, float32 [tokens], from [count, stride]; summed in order."""
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
def place(size: int) -> Kernel:
    """A kernel that copies [layers, heads, tokens, dim] of elements of ``size`` bytes to slots."""
    at = {1: u8_at, 2: u16_at, 4: u32_at}[size]

    @kernel(u64p, i32, i64p, i64, i64, i32, i32, u64)
    def place(addresses, heads, slots, token_stride, head_stride, dim, tokens, source):  # type: ignore[no-untyped-def]
        """Blocks [tokens, layers · heads]."""
        layer = _I32(cuda.blockIdx.y) // heads
        head = _I32(cuda.blockIdx.y) % heads
        token = _I32(cuda.blockIdx.x)
        slot = slots[token]
        if slot < 0:
            return
        to = slot * token_stride + head * head_stride
        begin = (_I64(cuda.blockIdx.y) * tokens + token) * dim
        for i in range(_I32(cuda.threadIdx.x), dim, _I32(cuda.blockDim.x)):
            at(addresses[layer])[to + i] = at(source)[begin + i]

    return place  # type: ignore[no-any-return]


def variants() -> list[Kernel]:
    """Every kernel that a factory here can make."""
    return [
        *map(gather, _LOADS),
        *map(scatter, _STORES),
        *(errors(a, b) for a in _LOADS for b in _STORES),
        *map(place, (1, 2, 4)),
    ]
