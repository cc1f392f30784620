"""E4M3 and E5M2 in integer arithmetic: not every device has instructions for them."""

from __future__ import annotations

import numpy as np

from kvtc_stream.gpu.kernels.intrinsics import f16_value, f32_bits, f32_from_bits
from kvtc_stream.gpu.runtime.dialect import cuda

_I32, _U32, _I64, _F32 = np.int32, np.uint32, np.int64, np.float32


@cuda.jit(device=True)
def e4m3_code(y):  # type: ignore[no-untyped-def]
    """See :func:`kvtc_stream.coding.bands.e4m3_encode`."""
    bits = _I32(f32_bits(y))
    magnitude = _I32(bits & _I32(0x7FFFFFFF))
    if magnitude < _I32(0x3C800000):  # 2⁻⁶: steps of 2⁻⁹, the last place of 2¹⁴
        code = _I32(f32_bits(f32_from_bits(_U32(magnitude)) + _F32(16384.0))) - _I32(0x46800000)
    else:
        rounded = _I64(magnitude) + _I64(0x7FFFF) + _I64((magnitude >> _I32(20)) & _I32(1))
        code = _I32(min((rounded >> _I64(20)) - _I64(120 << 3), _I64(0x7E)))
    return _I32(code | ((bits >> _I32(24)) & _I32(0x80)))


@cuda.jit(device=True)
def e4m3_value(code):  # type: ignore[no-untyped-def]
    """The value of an E4M3 code, which must not be NaN."""
    # A binary16 has the same subnormals, and exponents that are 8 more.
    half = (code & _I32(0x80)) << _I32(8) | (code & _I32(0x7F)) << _I32(7)
    return f16_value(np.uint16(half)) * _F32(256.0)


@cuda.jit(device=True)
def e5m2_code(y):  # type: ignore[no-untyped-def]
    """The E5M2 code of a finite binary32: nearest, ties to even, saturating at ±57,344."""
    bits = _I32(f32_bits(y))
    magnitude = _I32(bits & _I32(0x7FFFFFFF))
    if magnitude < _I32(0x38800000):  # 2⁻¹⁴: steps of 2⁻¹⁶, the last place of 2⁷
        code = _I32(f32_bits(f32_from_bits(_U32(magnitude)) + _F32(128.0))) - _I32(0x43000000)
    else:
        rounded = _I64(magnitude) + _I64(0xFFFFF) + _I64((magnitude >> _I32(21)) & _I32(1))
        code = _I32(min((rounded >> _I64(21)) - _I64(112 << 2), _I64(0x7B)))
    return _I32(code | ((bits >> _I32(24)) & _I32(0x80)))


@cuda.jit(device=True)
def e5m2_value(code):  # type: ignore[no-untyped-def]
    """The value of a finite E5M2 code, which is the upper half of a binary16."""
    return f16_value(np.uint16(code << _I32(8)))
