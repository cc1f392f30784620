"""The published quantiser on the CPU: coefficients to symbols, symbols to packed bytes, and back.

Every token has a scale and a shift, binary16 each, for every coded band (KVTC, arXiv 2511.01815,
section 3). With ``lo`` and ``hi`` the minimum and maximum coefficient of the token in the band:

====  ======  ============================  =============================================
band  shift   scale                         code
====  ======  ============================  =============================================
INT2  ``lo``  ``(hi - lo) / 3``             ``rint((x - shift) / scale)``, clamped to 0…3
INT4  ``lo``  ``(hi - lo) / 15``            ``rint((x - shift) / scale)``, clamped to 0…15
FP8   0       ``max(|lo|, |hi|) / 448``     ``(x - shift) / scale`` in E4M3, saturating
====  ======  ============================  =============================================

The value is ``shift + code · scale``. All arithmetic is binary32, one rounding per operation;
scale and shift are rounded to binary16, to nearest even, before the codes are found. A scale of 0
makes all codes 0. Nothing here changes when a compiler contracts to fused multiply-adds
(``code · scale`` is exact), so every backend that divides correctly finds the same codes and
values.

A cache that was restored lies on such grids already, but for the cast to its dtype, which moves
``lo`` and ``hi`` each time it is stored. So where the distances of a band's coefficients from the
grid are not those of any numbers, scale and shift are those that fit all codes best (least
squares): then nothing more is lost than what binary16 and the mean of many casts leave. Those close
to 0 do not count: of fresh coefficients too many are. A grid that ends before one of them is none.

FP8 has a shift because the published format has one. It is always 0, which compresses away.
Centring the range would move the code's small steps away from where most coefficients are: up to
ten times the squared error on wide bands.

The packed symbols of a part are five segments, each of similar bytes. The byte coder starts anew in
each (:func:`kvtc_stream.formats.compress`), so that its statistics fit. Together with byte planes
and component-major codes, this saves 3 to 6 % of the size, compared with a single segment.

1. the low bytes of all scales, [coded bands, tokens], then of all shifts,
2. their high bytes, likewise,
3. the codes of INT2 bands, band by band and component by component: for each component, codes of
   the tokens in order, 4 to a byte, the first in the lowest bits, the last byte padded with zeros,
4. the codes of INT4 bands, likewise, 2 to a byte,
5. the codes of FP8 bands, likewise, 1 to a byte.

Scales and shifts are finite, and no FP8 code is a NaN.

The kernels release the GIL and keep no state: all functions may run on many threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from kvtc_stream.errors import FormatError
from kvtc_stream.formats import Block
from kvtc_stream.formats.coders import decompress
from kvtc_stream.formats.plan import Band, Quantiser

_INT2 = Quantiser.INT2.bits
_FP8 = Quantiser.FP8.bits

#: Distances from grids are counted in parts of a step: sums of whole numbers are the same in
#: whatever order, on every backend.
PARTS = 256
#: Most of the squared distances of any numbers that those of a grid's may be; and the least
#: logarithm of how much likelier the grid makes them, in nats.
MOST_RATIO, LEAST_EVIDENCE = 1 / 8, 16.0

_F32 = np.float32
_I32 = np.int32
_I64 = np.int64

#: A number whose type Numba infers.
_Scalar: TypeAlias = Any

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@dataclass(frozen=True, slots=True, eq=False)
class Symbols:
    """The quantised coefficients of some tokens.

    Attributes
    ----------
    codes
        uint8 [tokens, coded components]: INT2 0…3, INT4 0…15, FP8 the E4M3 byte. Components of
        ``NONE`` bands have no column.
    scale, shift
        float16 [coded bands, tokens], finite.
    representable
        bool [tokens]. ``False`` if a coefficient of a coded band is NaN or infinite, or if a scale
        or shift overflows binary16; codes, scales and shifts of the token are then 0.
    """

    codes: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float16]
    shift: npt.NDArray[np.float16]
    representable: npt.NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.codes)


def quantise(coefficients: npt.NDArray[np.float32], bands: tuple[Band, ...]) -> Symbols:
    """Quantise each token's coefficients band by band.

    Parameters
    ----------
    coefficients
        float32 [tokens, components], C-contiguous; the bands cover all components.
    bands
        The bands of one part of a plan.
    """
    layout = _layout(bands)
    _check_coefficients(coefficients, layout)
    tokens = coefficients.shape[0]
    codes = np.empty((tokens, layout.coded_components), np.uint8)
    scale = np.empty((layout.coded_bands, tokens), np.float32)
    shift = np.empty((layout.coded_bands, tokens), np.float32)
    representable = np.empty(tokens, np.bool_)
    _quantise_tokens(coefficients, layout.table, codes, scale, shift, representable)
    return Symbols(codes, scale.astype(np.float16), shift.astype(np.float16), representable)


def dequantise(
    symbols: Symbols,
    bands: tuple[Band, ...],
    out: npt.NDArray[np.float32],
    rows: npt.NDArray[np.intp] | None = None,
) -> None:
    """Write the dequantised values of the symbols into rows of ``out``.

    Parameters
    ----------
    symbols
        Returned by :func:`quantise` or :func:`unpack` for the same bands.
    bands
        The bands of one part of a plan.
    out
        float32 [rows, components], C-contiguous. ``NONE`` bands become 0. Rows without a token
        are not changed.
    rows
        intp [tokens]: the row of each token; token ``i`` goes to row ``i`` by default.
    """
    layout = _layout(bands)
    _check_coefficients(out, layout)
    _check_symbols(symbols, layout)
    rows = _indices(rows, symbols.tokens, out.shape[0], "rows")
    if rows.size != symbols.tokens:
        raise ValueError(f"expected a row for each of {symbols.tokens} tokens, found {rows.size}")
    scale = symbols.scale.astype(np.float32)
    shift = symbols.shift.astype(np.float32)
    _dequantise_tokens(symbols.codes, scale, shift, layout.table, rows, out)


def segment_sizes(tokens: int, bands: tuple[Band, ...]) -> tuple[int, ...]:
    """Size in bytes of each segment that :func:`pack` makes for this many tokens."""
    layout = _layout(bands)
    planes = 2 * layout.coded_bands * tokens
    codes = (
        int(table[:, 1].sum()) * _bytes_of(tokens, bits) for bits, table in layout.by_bits.items()
    )
    return (planes, planes, *codes)


def pack(
    symbols: Symbols, bands: tuple[Band, ...], tokens: npt.NDArray[np.intp] | None = None
) -> list[npt.NDArray[np.uint8]]:
    """Pack the symbols into the five segments that the module describes.

    Parameters
    ----------
    symbols
        Returned by :func:`quantise` for the same bands.
    bands
        The bands of one part of a plan.
    tokens
        intp: which tokens to pack, in this order; all by default.
    """
    layout = _layout(bands)
    _check_symbols(symbols, layout)
    tokens = _indices(tokens, symbols.tokens, symbols.tokens, "tokens")
    parameters = np.stack([symbols.scale[:, tokens], symbols.shift[:, tokens]]).view(np.uint16)
    segments = [np.empty(size, np.uint8) for size in segment_sizes(tokens.size, bands)]
    segments[0][:] = (parameters & 0xFF).ravel()
    segments[1][:] = (parameters >> 8).ravel()
    for table, segment in zip(layout.by_bits.values(), segments[2:], strict=True):
        _pack_codes(symbols.codes, table, tokens, segment)
    return segments


def unpack(
    segments: Sequence[bytes | memoryview | npt.NDArray[np.uint8]],
    tokens: int,
    bands: tuple[Band, ...],
) -> Symbols:
    """The inverse of :func:`pack`; all tokens are representable.

    Raises
    ------
    FormatError
        A segment has not the size that this many tokens of these bands take, or has bytes that
        :func:`pack` never makes.
    """
    layout = _layout(bands)
    packed = [np.frombuffer(segment, np.uint8) for segment in segments]
    found, expected = tuple(p.size for p in packed), segment_sizes(tokens, bands)
    if found != expected:
        raise FormatError(
            f"coded payload has segments of {found} bytes, but {tokens} tokens of its plan take "
            f"{expected}; the stream is damaged or its plan is another"
        )
    parameters = packed[0] | packed[1].astype(np.uint16) << 8
    scale, shift = parameters.view(np.float16).reshape(2, layout.coded_bands, tokens)
    codes = np.empty((tokens, layout.coded_components), np.uint8)
    valid = [
        _unpack_codes(segment, table, codes)
        for table, segment in zip(layout.by_bits.values(), packed[2:], strict=True)
    ]
    if not (all(valid) and np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise FormatError(
            "coded payload has a scale, a shift or a code that is not finite, or bits after the "
            "last code; its writer does not follow the format"
        )
    return Symbols(codes, scale, shift, np.ones(tokens, np.bool_))


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """The bands as a table for the kernels.

    ``table`` is int64 [coded bands, 4]: first component, size, bits of a code, first column of
    codes.
    """

    table: npt.NDArray[np.int64]
    components: int
    coded_components: int
    #: The rows of the table for each width of a code.
    by_bits: dict[int, npt.NDArray[np.int64]]

    @property
    def coded_bands(self) -> int:
        return len(self.table)


@lru_cache(maxsize=64)
def _layout(bands: tuple[Band, ...]) -> _Layout:
    entries = []
    component = column = 0
    for band in bands:
        if band.quantiser is not Quantiser.NONE:
            entries.append((component, band.size, band.quantiser.bits, column))
            column += band.size
        component += band.size
    table = np.array(entries, np.int64).reshape(len(entries), 4)
    table.flags.writeable = False
    by_bits = {
        q.bits: np.ascontiguousarray(table[table[:, 2] == q.bits])
        for q in (Quantiser.INT2, Quantiser.INT4, Quantiser.FP8)
    }
    return _Layout(table, component, column, by_bits)


def _check_coefficients(array: npt.NDArray[np.float32], layout: _Layout) -> None:
    if array.ndim != 2 or array.shape[1] != layout.components:
        raise ValueError(
            f"coefficients must be [tokens, {layout.components}], found {list(array.shape)}"
        )
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        raise ValueError(f"coefficients must be C-contiguous float32, found {array.dtype}")


def _check_symbols(symbols: Symbols, layout: _Layout) -> None:
    codes = (symbols.tokens, layout.coded_components)
    parameters = (layout.coded_bands, symbols.tokens)
    if not (
        symbols.codes.shape == codes
        and symbols.scale.shape == symbols.shift.shape == parameters
        and symbols.codes.flags.c_contiguous
    ):
        raise ValueError(
            f"the symbols are of other bands: expected codes {list(codes)} and scales and shifts "
            f"{list(parameters)}, found {list(symbols.codes.shape)} and {list(symbols.scale.shape)}"
        )


def _indices(
    indices: npt.NDArray[np.intp] | None, default: int, limit: int, name: str
) -> npt.NDArray[np.intp]:
    if indices is None:
        indices = np.arange(default, dtype=np.intp)
    else:
        indices = np.ascontiguousarray(indices, np.intp)
    if indices.ndim != 1 or (indices.size and not (indices.min() >= 0 and indices.max() < limit)):
        raise ValueError(f"{name} must be a vector of numbers in 0…{limit - 1}")
    return indices


# --- arithmetic, shared with the planner's error tables -----------------------------------------


@_jit
def _bits(x: _Scalar) -> _Scalar:
    return _F32(x).view(_I32)


@_jit
def _from_bits(bits: _Scalar) -> _Scalar:
    return _I32(bits).view(_F32)


@_jit
def round_to_binary16(x: _Scalar) -> _Scalar:
    """Binary32 to the nearest binary16 (ties to even), kept as binary32; overflow is infinite."""
    magnitude = _bits(x) & 0x7FFFFFFF
    # Normal range: round away 13 bits of the significand; a carry moves into the exponent.
    rounded = (magnitude + 0x0FFF + ((magnitude >> 13) & 1)) & ~0x1FFF
    if rounded >= 0x47800000:  # 65536
        rounded = 0x7F800000
    value = _from_bits(rounded)
    if magnitude < 0x38800000:  # 2⁻¹⁴: subnormal, steps of 2⁻²⁴, the last place of 0.5…1
        value = (_from_bits(magnitude) + _F32(0.5)) - _F32(0.5)
    return np.copysign(value, _F32(x))


@_jit
def affine_code(x: _Scalar, shift: _Scalar, divisor: _Scalar, levels: _Scalar) -> _Scalar:
    """The integer code as binary32; ``divisor`` is the scale, or infinity for a scale of 0."""
    code = np.rint((x - shift) / divisor)
    return min(max(code, _F32(0.0)), levels)


@_jit
def e4m3_encode(y: _Scalar) -> _Scalar:
    """E4M3 byte (OCP 8-bit floating point, finite variant) of a finite binary32, as int32.

    To nearest, ties to even; magnitudes above 448 become 448.
    """
    # Every step is cast: Numba would widen to int64 and halve the vector code.
    bits = _bits(y)
    magnitude = _I32(bits & 0x7FFFFFFF)
    rounded = _I32(_I32(magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20)
    code = min(_I32(rounded - (120 << 3)), _I32(0x7E))
    # Subnormals have steps of 2⁻⁹, the last place of 2¹⁴.
    subnormal = _I32(_bits(_from_bits(magnitude) + _F32(16384.0)) - 0x46800000)
    code = subnormal if magnitude < 0x3C800000 else code  # 2⁻⁶
    return _I32(code | ((bits >> 24) & 0x80))


@_jit
def e4m3_decode(code: _Scalar) -> _Scalar:
    """Binary32 value of an E4M3 byte; 0x7F and 0xFF are NaN."""
    magnitude = _I32(code & 0x7F)
    value = _from_bits((magnitude << 20) + 0x3C000000)
    value = _F32(magnitude) * _F32(2.0**-9) if magnitude < 8 else value
    value = _F32(np.nan) if magnitude == 0x7F else value
    return -value if code & 0x80 else value


@_jit
def band_parameters(lo: _Scalar, hi: _Scalar, bits: _Scalar) -> tuple[_Scalar, _Scalar]:
    """Scale and shift of a band from its minimum and maximum: binary16 values, kept as binary32."""
    if bits == _FP8:
        return round_to_binary16(max(abs(lo), abs(hi)) / _F32(448.0)), _F32(0.0)
    levels = _F32(3.0) if bits == _INT2 else _F32(15.0)
    return round_to_binary16((hi - lo) / levels), round_to_binary16(lo)


@_jit
def refit(
    size: _Scalar, c: _Scalar, cc: _Scalar, r: _Scalar, rc: _Scalar, rr: _Scalar
) -> tuple[_Scalar, _Scalar]:
    """How far a grid is to be moved, and by how much to be stretched, in steps; both binary64.

    0 where the coefficients do not lie on it. Of those of half a step at least, ``size`` is
    the number; the others are sums, int64, of codes, their squares, distances in ``PARTS``,
    distances times codes, and their squares.
    """
    spread = size * cc - c * c
    if spread > 0:
        move, stretch = r * cc - c * rc, size * rc - c * r
        explained = (move * np.float64(r) + stretch * np.float64(rc)) / spread
        # At least what counting in parts leaves.
        distance = max(rr - explained, size / 12) / PARTS**2
        usual = (size - 2) / 12
        evidence = 6 * usual * np.log(max(usual, 1e-9) / distance)
        if distance <= MOST_RATIO * usual and evidence >= LEAST_EVIDENCE:
            whole = np.float64(spread) * PARTS
            return move / whole, stretch / whole
    return 0.0, 0.0


@_jit
def reaches(lo: _Scalar, hi: _Scalar, shift: _Scalar, scale: _Scalar, levels: _Scalar) -> _Scalar:
    """Whether a grid has a value for all coefficients, and none is cut off; all of them binary32,
    scale and shift binary16, so that no backend rounds differently."""
    half = _F32(0.5) * scale
    return lo >= shift - half and hi <= shift + (levels * scale + half)


# --- kernels ------------------------------------------------------------------------------------


@_jit
def _order_key(bits: _Scalar) -> _Scalar:
    """Map binary32 bits to an int32 that sorts like the number; its own inverse.

    NaN sorts beyond the infinities.
    """
    return _I32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@_jit
def _quantise_tokens(coefficients, table, codes, scale, shift, representable):  # type: ignore[no-untyped-def]
    infinity = _F32(np.inf)
    negative_infinity_key = _order_key(_bits(-infinity))
    for t in range(coefficients.shape[0]):
        row = coefficients[t]
        row_bits = row.view(_I32)
        row_codes = codes[t]
        fits = True
        for g in range(table.shape[0]):
            start, size, bits, column = table[g]
            x = row[start : start + size]
            # Minimum and maximum as integers: vector code, and a NaN is not lost.
            least = _I32(0x7FFFFFFF)
            greatest = _I32(-0x80000000)
            for x_bits in row_bits[start : start + size]:
                key = _order_key(x_bits)
                least = min(least, key)
                greatest = max(greatest, key)
            if least <= negative_infinity_key or greatest >= _bits(infinity):
                fits = False
                break
            lo = _from_bits(_order_key(least))
            hi = _from_bits(_order_key(greatest))
            band_scale, band_shift = band_parameters(lo, hi, bits)
            if band_scale == infinity or abs(band_shift) == infinity:
                fits = False
                break
            scale[g, t] = band_scale
            shift[g, t] = band_shift
            out = row_codes[column : column + size]
            if band_scale == 0:
                out[:] = 0
            elif bits == _FP8:
                for j in range(size):
                    out[j] = e4m3_encode((x[j] - band_shift) / band_scale)
            else:
                levels = _F32(3.0) if bits == _INT2 else _F32(15.0)
                move, stretch = _affine_codes(x, band_shift, band_scale, levels, out)
                if move != 0 or stretch != 0:
                    new_shift = round_to_binary16(band_shift + move * band_scale)
                    new_scale = round_to_binary16(band_scale + stretch * band_scale)
                    if (
                        new_scale > 0
                        and new_scale < infinity
                        and abs(new_shift) < infinity
                        and reaches(lo, hi, new_shift, new_scale, levels)
                    ):
                        scale[g, t] = new_scale
                        shift[g, t] = new_shift
                        _affine_codes(x, new_shift, new_scale, levels, out)
        representable[t] = fits
        if not fits:
            row_codes[:] = 0
            scale[:, t] = 0
            shift[:, t] = 0


@_jit
def _affine_codes(x, shift, scale, levels, codes):  # type: ignore[no-untyped-def]
    """Fill in a band's codes; return what :func:`refit` says of them."""
    n, c, cc, r, rc, rr = _I32(0), _I32(0), _I32(0), _I32(0), _I32(0), _I32(0)
    for j in range(x.size):
        y = (x[j] - shift) / scale
        code = min(max(np.rint(y), _F32(0.0)), levels)
        away = min(max(y - code, _F32(-0.5)), _F32(0.5))
        of_code, parts = _I32(code), _I32(np.rint(away * _F32(PARTS)))
        codes[j] = of_code
        # Many fresh ones may be close to 0, and so to one another, which is no grid.
        counts = _I32(_F32(2.0) * abs(x[j]) >= scale)
        of_code, parts = _I32(of_code * counts), _I32(parts * counts)
        n = _I32(n + counts)
        c = _I32(c + of_code)
        cc = _I32(cc + _I32(of_code * of_code))
        r = _I32(r + parts)
        rc = _I32(rc + _I32(parts * of_code))
        rr = _I32(rr + _I32(parts * parts))
    return refit(_I64(n), _I64(c), _I64(cc), _I64(r), _I64(rc), _I64(rr))


@_jit
def _dequantise_tokens(codes, scale, shift, table, rows, out):  # type: ignore[no-untyped-def]
    for t in range(codes.shape[0]):
        row = out[rows[t]]
        row_codes = codes[t]
        done = 0
        for g in range(table.shape[0]):
            start, size, bits, column = table[g]
            row[done:start] = 0
            done = start + size
            values = row[start:done]
            band_codes = row_codes[column : column + size]
            band_scale = scale[g, t]
            band_shift = shift[g, t]
            if bits == _FP8:
                for j in range(size):
                    values[j] = band_shift + e4m3_decode(band_codes[j]) * band_scale
            else:
                for j in range(size):
                    values[j] = band_shift + _F32(band_codes[j]) * band_scale
        row[done:] = 0


@_jit
def _bytes_of(tokens: int, bits: int) -> int:
    """Bytes that the codes of one component take."""
    return (tokens * bits + 7) // 8


@_jit
def _pack_codes(codes, table, tokens, out):  # type: ignore[no-untyped-def]
    # A byte's tokens are merged for all components at once, in vector code, then spread.
    merged = np.empty(codes.shape[1], np.uint8)
    position = 0
    for g in range(table.shape[0]):
        _, size, bits, column = table[g]
        stride = _bytes_of(tokens.size, bits)
        band = out[position : position + size * stride].reshape(size, stride)
        position += band.size
        per_byte = 8 // bits
        for i in range(stride):
            first = i * per_byte
            merged[:size] = 0
            for k in range(min(per_byte, tokens.size - first)):
                token_codes = codes[tokens[first + k], column : column + size]
                for j in range(size):
                    merged[j] |= token_codes[j] << np.uint8(bits * k)
            for j in range(size):
                band[j, i] = merged[j]


@_jit
def _unpack_codes(packed, table, codes):  # type: ignore[no-untyped-def]
    """Fill ``codes``; return whether none is a NaN and all padding bits are zero."""
    tokens = codes.shape[0]
    merged = np.empty(codes.shape[1], np.uint8)
    nan_codes = np.uint8(0)
    stray_bits = np.uint8(0)
    position = 0
    for g in range(table.shape[0]):
        _, size, bits, column = table[g]
        mask = np.uint8((1 << bits) - 1)
        stride = _bytes_of(tokens, bits)
        band = packed[position : position + size * stride].reshape(size, stride)
        position += band.size
        per_byte = 8 // bits
        for i in range(stride):
            first = i * per_byte
            for j in range(size):
                merged[j] = band[j, i]
            for k in range(per_byte):
                if first + k < tokens:
                    token_codes = codes[first + k, column : column + size]
                    for j in range(size):
                        token_codes[j] = (merged[j] >> np.uint8(bits * k)) & mask
                else:
                    for j in range(size):
                        stray_bits |= (merged[j] >> np.uint8(bits * k)) & mask
            if bits == _FP8:
                for j in range(size):
                    nan_codes |= np.uint8((merged[j] & 0x7F) == 0x7F)
    return nan_codes == 0 and stray_bits == 0


def split_segments(block: Block, sizes: Sequence[Sequence[int]]) -> list[list[memoryview]]:
    """Split a block's payload of bands into the segments of each part.

    ``sizes`` has the size of each segment, by part.
    """
    data = memoryview(decompress(block.coder, block.coded, block.coded_size))
    segments: list[list[memoryview]] = [[] for _ in sizes]
    for same_segment in zip(*sizes, strict=True):
        for segment, size in zip(segments, same_segment, strict=True):
            segment.append(data[:size])
            data = data[size:]
    return segments
