"""Bands with a scale per token on the GPU: coefficients to packed bytes and back.

The arithmetic and the segments are those of :mod:`kvtc_stream.coding.bands` and of the
specification: equal coefficients give equal bytes, and equal bytes give bit-identical values.

Bands are cut into strips, rows of an int32 table: see :func:`strips`. A thread has a token and a
strip. A task is a row of int64, one a block of the stream: see :func:`tasks`. Kernels get their
grid from :func:`grid`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from kvtc_stream.coding.bands import LEAST_EVIDENCE, MOST_RATIO, PARTS, segment_sizes
from kvtc_stream.formats.plan import Band, Quantiser
from kvtc_stream.gpu.kernels.fp8 import e4m3_code, e4m3_value
from kvtc_stream.gpu.kernels.intrinsics import (
    WARP,
    f16_bits,
    f16_value,
    f32_bits,
    f32_from_bits,
    f32p,
    i32,
    i32p,
    i64,
    i64p,
    round_to_int,
    shuffle_down,
    u8p,
    u16p,
)
from kvtc_stream.gpu.kernels.rans import DAMAGED
from kvtc_stream.gpu.runtime.compile import kernel
from kvtc_stream.gpu.runtime.dialect import cuda

#: Threads of a block, a multiple of the warp.
THREADS = 128
#: Components of a strip when packing and unpacking.
STRIP = 16

#: Fields of a strip.
(
    PART,
    BITS,  # of a code; 0: NONE
    ROW,  # of the first component among the coefficients
    SIZE,  # components
    CODE,  # place of the first component among those of these bits in the part
    BAND,  # place of the band among the part's coded ones
    BANDS,  # coded ones of the part
    PARAMETER,  # place of the band among the coded ones of all parts
    FIRST,  # 1 for the first strip of a band
) = range(9)
STRIP_FIELDS = 9

#: Fields of a task; after them, for each part, where each of its segments begins in the payloads.
(
    TOKENS,  # coded tokens of the block
    TOKEN,  # the block's first one among all
) = range(2)
TASK_FIELDS = 2
SEGMENTS = 5

_I32, _U32, _I64, _F32, _F64 = np.int32, np.uint32, np.int64, np.float32, np.float64
_INFINITE = np.int32(0x7F800000)
_INT2, _INT4, _FP8 = np.int32(2), np.int32(4), np.int32(8)


def strips(parts: Sequence[tuple[Band, ...]], size: int | None = STRIP) -> npt.NDArray[np.int32]:
    """Strips of bands: cut to at most ``size`` components, or whole; int32 [strips, STRIP_FIELDS].

    The components of all parts are rows of the coefficients in order, those of ``NONE`` too.
    """
    found: list[list[int]] = []
    row = parameter = 0
    for part, bands in enumerate(parts):
        coded = sum(band.quantiser is not Quantiser.NONE for band in bands)
        codes = dict.fromkeys(Quantiser, 0)
        number = 0
        for band in bands:
            quantiser = band.quantiser
            for first in range(0, band.size, size or band.size):
                count = min(size or band.size, band.size - first)
                place = codes[quantiser] + first
                of_band = [number, coded, parameter, int(first == 0)]
                found.append([part, quantiser.bits, row + first, count, place, *of_band])
            row += band.size
            codes[quantiser] += band.size
            number += quantiser is not Quantiser.NONE
            parameter += quantiser is not Quantiser.NONE
    return np.array(found, np.int32).reshape(-1, STRIP_FIELDS)


def payload_size(tokens: int, parts: Sequence[tuple[Band, ...]]) -> int:
    """Bytes of the payload of a block with so many coded tokens, before compression."""
    return sum(sum(segment_sizes(tokens, bands)) for bands in parts)


def tasks(
    tokens: Sequence[int], parts: Sequence[tuple[Band, ...]], starts: Sequence[int]
) -> npt.NDArray[np.int64]:
    """int64 [blocks, TASK_FIELDS + SEGMENTS · parts].

    Parameters
    ----------
    tokens
        Coded tokens of each block.
    parts
        The bands of each part.
    starts
        Where each block's payload begins, in bytes.
    """
    found = []
    firsts = accumulate(tokens, initial=0)
    for count, first, start in zip(tokens, firsts, starts, strict=False):
        sizes = np.array([segment_sizes(count, bands) for bands in parts], np.int64)
        # All parts' first segments, then all their second ones, and so on.
        places = start + np.cumsum(sizes.T.ravel()) - sizes.T.ravel()
        found.append([count, first, *places.reshape(SEGMENTS, len(parts)).T.ravel()])
    return np.array(found, np.int64).reshape(-1, TASK_FIELDS + SEGMENTS * len(parts))


def grid(tokens: int, strips: int, blocks: int = 1) -> tuple[int, int, int]:
    """The launch grid; ``tokens`` is the maximum number of a stream block's coded tokens."""
    return -(-tokens // THREADS), strips, blocks


@kernel(i32p, f32p, i64, i32, u16p, u8p)
def measure(strips, coefficients, stride, tokens, parameters, unfit):  # type: ignore[no-untyped-def]
    """Kernel: measure scale and shift of each token and band; of restored ones those they had, see
    :mod:`kvtc_stream.coding.bands`.

    Parameters
    ----------
    strips
        int32 [bands, STRIP_FIELDS]: whole bands.
    coefficients
        float32 [components, stride].
    tokens
        The first of them are measured: as many columns of the coefficients.
    parameters
        uint16 [coded bands of all parts, 2, stride]: become the bits of scale and shift, binary16.
    unfit
        uint8 [stride]: becomes 1 where a coefficient of a coded band is not finite, or scale or
        shift exceed binary16; 0 before. The token is not to be packed.
    """
    column = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    strip = _I32(cuda.blockIdx.y) * _I32(STRIP_FIELDS)
    bits = strips[strip + BITS]
    if column >= tokens or bits == 0:
        return
    # Compared as integers of the same order, so that a NaN is not lost.
    least = _I32(0x7FFFFFFF)
    greatest = _I32(-0x80000000)
    source = _I64(strips[strip + ROW]) * stride + column
    for _ in range(_I32(0), strips[strip + SIZE]):
        x = _I32(f32_bits(coefficients[source]))
        key = _I32(x ^ ((x >> _I32(31)) & _I32(0x7FFFFFFF)))
        least = min(least, key)
        greatest = max(greatest, key)
        source += stride
    # -infinity has the key 0x807FFFFF.
    if least <= _I32(-0x7F800001) or greatest >= _INFINITE:
        unfit[column] = 1
        return
    lo = f32_from_bits(_U32(least ^ ((least >> _I32(31)) & _I32(0x7FFFFFFF))))
    hi = f32_from_bits(_U32(greatest ^ ((greatest >> _I32(31)) & _I32(0x7FFFFFFF))))
    if bits == _FP8:
        scale = f16_bits(max(abs(lo), abs(hi)) / _F32(448.0))
        shift = f16_bits(_F32(0.0))
    else:
        levels = _F32(3.0) if bits == _INT2 else _F32(15.0)
        scale = f16_bits((hi - lo) / levels)
        shift = f16_bits(lo)
    if (_I32(scale) & _I32(0x7C00)) == _I32(0x7C00) or (_I32(shift) & _I32(0x7C00)) == _I32(0x7C00):
        unfit[column] = 1
    elif bits != _FP8 and scale != 0:
        source = _I64(strips[strip + ROW]) * stride + column
        size, step, begin = strips[strip + SIZE], f16_value(scale), f16_value(shift)
        move, stretch = _fitted(coefficients, source, stride, size, begin, step, bits)
        if move != 0.0 or stretch != 0.0:
            new_shift = f16_bits(_F32(_F64(begin) + move * _F64(step)))
            new_scale = f16_bits(_F32(_F64(step) + stretch * _F64(step)))
            exponent = _I32(new_shift) & _I32(0x7C00)
            begin, step = f16_value(new_shift), f16_value(new_scale)
            half = _F32(0.5) * step
            # A positive scale, and both finite; no coefficient beyond the grid.
            if (
                _I32(0) < _I32(new_scale) < _I32(0x7C00)
                and exponent != _I32(0x7C00)
                and lo >= begin - half
                and hi <= begin + (levels * step + half)
            ):
                scale, shift = new_scale, new_shift
    target = _I64(strips[strip + PARAMETER]) * 2 * stride + column
    parameters[target] = scale
    parameters[target + stride] = shift


@cuda.jit(device=True)
def _fitted(coefficients, source, stride, size, shift, scale, bits):  # type: ignore[no-untyped-def]
    """See :func:`kvtc_stream.coding.bands.refit`: of a token's coefficients in a band."""
    levels = _F32(3.0) if bits == _INT2 else _F32(15.0)
    n, c, cc, r, rc, rr = _I64(0), _I64(0), _I64(0), _I64(0), _I64(0), _I64(0)
    for _ in range(_I32(0), size):
        x = coefficients[source]
        y = (x - shift) / scale
        code = min(max(round_to_int(y), _I32(0)), _I32(levels))
        away = min(max(y - _F32(code), _F32(-0.5)), _F32(0.5))
        parts = round_to_int(away * _F32(PARTS))
        if _F32(2.0) * abs(x) >= scale:
            n += _I64(1)
            c += code
            cc += code * code
            r += parts
            rc += parts * code
            rr += parts * parts
        source += stride
    spread = n * cc - c * c
    if spread > 0:
        move, stretch = r * cc - c * rc, n * rc - c * r
        explained = (move * _F64(r) + stretch * _F64(rc)) / _F64(spread)
        distance = max(_F64(rr) - explained, _F64(n) / 12.0) / _F64(PARTS**2)
        usual = _F64(n - _I32(2)) / 12.0
        evidence = 6.0 * usual * math.log(max(usual, 1e-9) / distance)
        if distance <= MOST_RATIO * usual and evidence >= LEAST_EVIDENCE:
            whole = _F64(spread) * _F64(PARTS)
            return _F64(move) / whole, _F64(stretch) / whole
    return 0.0, 0.0


@kernel(i64p, i32, i32p, i32p, f32p, u16p, i64, u8p)
def pack(  # type: ignore[no-untyped-def]
    tasks, parts, strips, columns, coefficients, parameters, stride, payloads
):
    """Coefficients to segments.

    Parameters
    ----------
    tasks, parts
        int64 [blocks, TASK_FIELDS + SEGMENTS · parts].
    strips
        int32 [strips, STRIP_FIELDS].
    columns
        int32 [tokens]: where each token is.
    coefficients
        float32 [components, stride].
    parameters
        As written by :func:`measure`.
    payloads
        The blocks' payloads are written here, before compression.
    """
    task = _I32(cuda.blockIdx.z) * (_I32(TASK_FIELDS) + _I32(SEGMENTS) * parts)
    strip = _I32(cuda.blockIdx.y) * _I32(STRIP_FIELDS)
    token = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    tokens = _I32(tasks[task + TOKENS])
    bits = strips[strip + BITS]
    # A whole warp, or none of it.
    if bits == 0 or token - (token & _I32(WARP - 1)) >= tokens:
        return
    active = token < tokens
    scale = _F32(0.0)
    shift = _F32(0.0)
    source = _I64(0)
    segment = task + _I32(TASK_FIELDS) + _I32(SEGMENTS) * strips[strip + PART]
    if active:
        column = _I64(columns[tasks[task + TOKEN] + token])
        place = _I64(strips[strip + PARAMETER]) * 2 * stride + column
        scale_bits = _I32(parameters[place])
        shift_bits = _I32(parameters[place + stride])
        scale = f16_value(parameters[place])
        shift = f16_value(parameters[place + stride])
        if strips[strip + FIRST]:
            place = _I64(strips[strip + BAND]) * tokens + token
            further = _I64(strips[strip + BANDS]) * tokens
            low = tasks[segment] + place
            high = tasks[segment + 1] + place
            payloads[low] = np.uint8(scale_bits & _I32(0xFF))
            payloads[high] = np.uint8(scale_bits >> _I32(8))
            payloads[low + further] = np.uint8(shift_bits & _I32(0xFF))
            payloads[high + further] = np.uint8(shift_bits >> _I32(8))
        source = _I64(strips[strip + ROW]) * stride + column
    row_bytes = _I64((tokens * bits + _I32(7)) >> _I32(3))
    kind = _I32(2)
    if bits == _INT4:
        kind = _I32(3)
    elif bits == _FP8:
        kind = _I32(4)
    position = token * bits
    target = tasks[segment + kind] + strips[strip + CODE] * row_bytes + (position >> _I32(3))
    writes = active and (position & _I32(7)) == 0
    levels = _I32(3) if bits == _INT2 else _I32(15)
    for _ in range(_I32(0), strips[strip + SIZE]):
        code = _I32(0)
        if active and scale != _F32(0.0):
            y = (coefficients[source] - shift) / scale
            code = e4m3_code(y) if bits == _FP8 else min(max(round_to_int(y), _I32(0)), levels)
        # Lanes without a token have the code 0.
        if bits == _INT2:
            code = _I32(code | (shuffle_down(code, 1) << _I32(2)))
            code = _I32(code | (shuffle_down(code, 2) << _I32(4)))
        elif bits == _INT4:
            code = _I32(code | (shuffle_down(code, 1) << _I32(4)))
        if writes:
            payloads[target] = np.uint8(code & _I32(0xFF))
        source += stride
        target += row_bytes


@kernel(i64p, i32, i32p, i32p, u8p, f32p, i64, i32p)
def unpack(  # type: ignore[no-untyped-def]
    tasks, parts, strips, columns, payloads, out, stride, faults
):
    """Segments to coefficients; 0 of ``NONE`` bands.

    Parameters
    ----------
    tasks, parts, strips, columns
        As for :func:`pack`.
    payloads
        The blocks' payloads, decompressed.
    out
        float32 [components, stride]: becomes the coefficients.
    faults
        int32 [blocks]: becomes DAMAGED where a scale, a shift or a code is not finite, or a bit
        after the last code is 1; 0 before.
    """
    block = _I32(cuda.blockIdx.z)
    task = block * (_I32(TASK_FIELDS) + _I32(SEGMENTS) * parts)
    strip = _I32(cuda.blockIdx.y) * _I32(STRIP_FIELDS)
    token = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    tokens = _I32(tasks[task + TOKENS])
    if token >= tokens:
        return
    size = strips[strip + SIZE]
    bits = strips[strip + BITS]
    target = _I64(strips[strip + ROW]) * stride + _I64(columns[tasks[task + TOKEN] + token])
    if bits == 0:
        for _ in range(_I32(0), size):
            out[target] = _F32(0.0)
            target += stride
        return
    segment = task + _I32(TASK_FIELDS) + _I32(SEGMENTS) * strips[strip + PART]
    place = _I64(strips[strip + BAND]) * tokens + token
    further = _I64(strips[strip + BANDS]) * tokens
    low = tasks[segment] + place
    high = tasks[segment + 1] + place
    scale_bits = _I32(payloads[low]) | _I32(payloads[high]) << _I32(8)
    shift_bits = _I32(payloads[low + further]) | _I32(payloads[high + further]) << _I32(8)
    fault = (scale_bits & _I32(0x7C00)) == _I32(0x7C00) or (shift_bits & _I32(0x7C00)) == _I32(
        0x7C00
    )
    scale = f16_value(np.uint16(scale_bits))
    shift = f16_value(np.uint16(shift_bits))
    row_bytes = _I64((tokens * bits + _I32(7)) >> _I32(3))
    kind = _I32(2)
    if bits == _INT4:
        kind = _I32(3)
    elif bits == _FP8:
        kind = _I32(4)
    position = token * bits
    source = tasks[segment + kind] + strips[strip + CODE] * row_bytes + (position >> _I32(3))
    offset = position & _I32(7)
    mask = (_I32(1) << bits) - _I32(1)
    last = token == tokens - _I32(1)
    for _ in range(_I32(0), size):
        byte = _I32(payloads[source]) >> offset
        if last:
            fault |= (byte >> bits) != 0
        code = _I32(byte & mask)
        if bits == _FP8:
            fault |= (code & _I32(0x7F)) == _I32(0x7F)
            value = e4m3_value(code)
        else:
            value = _F32(code)
        out[target] = shift + value * scale
        source += row_bytes
        target += stride
    if fault:
        faults[block] = DAMAGED


@kernel(i32p, f32p, i64, i32, u16p, f32p)
def normalise(fields, coefficients, stride, tokens, out, scales):  # type: ignore[no-untyped-def]
    """Coefficients to binary16 times a power of two of the token, for the matrix product.

    Parameters
    ----------
    fields
        int32 [parts, 2]: first component of a part, and components.
    coefficients
        float32 [components, stride], finite.
    tokens
        The first of them are taken: as many columns of the coefficients.
    out
        uint16 [components, stride]: become bits of binary16, 1 at most.
    scales
        float32 [parts, stride]: become the powers of two.
    """
    column = _I32(cuda.blockIdx.x) * _I32(THREADS) + _I32(cuda.threadIdx.x)
    part = _I32(cuda.blockIdx.y)
    if column >= tokens:
        return
    first = _I64(fields[_I32(2) * part]) * stride + column
    count = fields[_I32(2) * part + _I32(1)]
    greatest = _I32(0)
    place = first
    for _ in range(_I32(0), count):
        greatest = max(greatest, _I32(_I32(f32_bits(coefficients[place])) & _I32(0x7FFFFFFF)))
        place += stride
    # The power of two above the greatest; its inverse has an exponent too.
    exponent = min(max(_I32((greatest >> _I32(23)) + _I32(1)), _I32(1)), _I32(253))
    down = f32_from_bits(_U32((_I32(254) - exponent) << _I32(23)))
    scales[_I64(part) * stride + column] = f32_from_bits(_U32(exponent << _I32(23)))
    place = first
    for _ in range(_I32(0), count):
        out[place] = f16_bits(coefficients[place] * down)
        place += stride
