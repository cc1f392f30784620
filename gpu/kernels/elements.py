"""Elements of tensors, by their type: load as binary32, store from binary32, round to the type.

Elements of fp8 come with a scale that they are divided by. Types of two bytes can also be taken
from, and put into, words of 32 bits, two at a time.
"""

from __future__ import annotations

import numpy as np

from kvtc_stream.formats import DType
from kvtc_stream.gpu.kernels.fp8 import e4m3_code, e4m3_value, e5m2_code, e5m2_value
from kvtc_stream.gpu.kernels.intrinsics import (
    bf16_bits,
    bf16_pair,
    f16_bits,
    f16_pair,
    f16_value,
    f32_at,
    f32_from_bits,
    u8,
    u8_at,
    u16_at,
)
from kvtc_stream.gpu.runtime.dialect import cuda

_U32 = np.uint32


# --- one element: number ``i`` from an address --------------------------------------------------


@cuda.jit(device=True)
def _load_f32(address, i, _table):  # type: ignore[no-untyped-def]
    return f32_at(address)[i]


@cuda.jit(device=True)
def _load_f16(address, i, _table):  # type: ignore[no-untyped-def]
    return f16_value(u16_at(address)[i])


@cuda.jit(device=True)
def _load_bf16(address, i, _table):  # type: ignore[no-untyped-def]
    return f32_from_bits(_U32(u16_at(address)[i]) << _U32(16))


@cuda.jit(device=True)
def _load_fp8(address, i, table):  # type: ignore[no-untyped-def]
    return table[u8_at(address)[i]]


@cuda.jit(device=True)
def _store_f32(address, i, value, _scale):  # type: ignore[no-untyped-def]
    f32_at(address)[i] = value


@cuda.jit(device=True)
def _store_f16(address, i, value, _scale):  # type: ignore[no-untyped-def]
    u16_at(address)[i] = f16_bits(value)


@cuda.jit(device=True)
def _store_bf16(address, i, value, _scale):  # type: ignore[no-untyped-def]
    u16_at(address)[i] = bf16_bits(value)


@cuda.jit(device=True)
def _store_e4m3(address, i, value, scale):  # type: ignore[no-untyped-def]
    u8_at(address)[i] = u8(e4m3_code(value / scale))


@cuda.jit(device=True)
def _store_e5m2(address, i, value, scale):  # type: ignore[no-untyped-def]
    u8_at(address)[i] = u8(e5m2_code(value / scale))


@cuda.jit(device=True)
def _round_f32(value, _scale):  # type: ignore[no-untyped-def]
    return value


@cuda.jit(device=True)
def _round_f16(value, _scale):  # type: ignore[no-untyped-def]
    return f16_value(f16_bits(value))


@cuda.jit(device=True)
def _round_bf16(value, _scale):  # type: ignore[no-untyped-def]
    return f32_from_bits(_U32(bf16_bits(value)) << _U32(16))


@cuda.jit(device=True)
def _round_e4m3(value, scale):  # type: ignore[no-untyped-def]
    return e4m3_value(e4m3_code(value / scale)) * scale


@cuda.jit(device=True)
def _round_e5m2(value, scale):  # type: ignore[no-untyped-def]
    return e5m2_value(e5m2_code(value / scale)) * scale


#: ``(address, i, values) -> float32``; ``values`` float32 [256] of fp8's codes, without scale.
LOADS = {
    DType.FLOAT32: _load_f32,
    DType.FLOAT16: _load_f16,
    DType.BFLOAT16: _load_bf16,
    DType.FLOAT8_E4M3FN: _load_fp8,
    DType.FLOAT8_E5M2: _load_fp8,
}
#: ``(address, i, value, scale)``.
STORES = {
    DType.FLOAT32: _store_f32,
    DType.FLOAT16: _store_f16,
    DType.BFLOAT16: _store_bf16,
    DType.FLOAT8_E4M3FN: _store_e4m3,
    DType.FLOAT8_E5M2: _store_e5m2,
}
#: ``(value, scale) -> float32``: what a load gives after a store.
ROUNDS = {
    DType.FLOAT32: _round_f32,
    DType.FLOAT16: _round_f16,
    DType.BFLOAT16: _round_bf16,
    DType.FLOAT8_E4M3FN: _round_e4m3,
    DType.FLOAT8_E5M2: _round_e5m2,
}


# --- two elements in a word of 32 bits ----------------------------------------------------------


@cuda.jit(device=True)
def low_f16(word):  # type: ignore[no-untyped-def]
    return f16_value(np.uint16(word & _U32(0xFFFF)))


@cuda.jit(device=True)
def high_f16(word):  # type: ignore[no-untyped-def]
    return f16_value(np.uint16(word >> _U32(16)))


@cuda.jit(device=True)
def _low_bf16(word):  # type: ignore[no-untyped-def]
    return f32_from_bits(_U32(word << _U32(16)))


@cuda.jit(device=True)
def _high_bf16(word):  # type: ignore[no-untyped-def]
    return f32_from_bits(_U32(word & _U32(0xFFFF0000)))


#: ``low(word) -> float32``, ``high(word) -> float32``, ``pair(low, high) -> word``.
HALVES = {
    DType.FLOAT16: (low_f16, high_f16, f16_pair),
    DType.BFLOAT16: (_low_bf16, _high_bf16, bf16_pair),
}
