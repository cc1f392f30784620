"""The published quantiser: arithmetic against numpy and ml_dtypes, bytes, bounds, bad tokens."""

from __future__ import annotations

import ml_dtypes
import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kvtc_stream.coding import bands as cpu
from kvtc_stream.errors import FormatError
from kvtc_stream.formats.plan import Band, Quantiser

Float = npt.NDArray[np.float32]

BANDS = (
    Band(1, Quantiser.INT4),
    Band(16, Quantiser.FP8),
    Band(3, Quantiser.NONE),
    Band(16, Quantiser.INT4),
    Band(5, Quantiser.INT2),
)
WIDTH = 41

band_lists = st.lists(
    st.builds(Band, st.integers(1, 20), st.sampled_from(list(Quantiser)[:4])), max_size=6
).map(tuple)


def _each(kernel, values, dtype):
    @numba.njit(error_model="numpy")
    def run(values, out):
        for i in range(values.size):
            out[i] = kernel(values[i])

    out = np.empty(values.size, dtype)
    run(values, out)
    return out


def _round_trip(coefficients: Float, bands: tuple[Band, ...]) -> Float:
    out = np.full_like(coefficients, np.nan)
    cpu.dequantise(cpu.quantise(coefficients, bands), bands, out)
    return out


def _oracle(coefficients: Float, bands: tuple[Band, ...]) -> Float:
    """The definition, written with numpy's and ml_dtypes' own conversions."""
    out = np.zeros_like(coefficients)
    start = 0
    for band in bands:
        x = coefficients[:, start : start + band.size]
        value = out[:, start : start + band.size]
        start += band.size
        if band.quantiser is Quantiser.NONE:
            continue
        lo, hi = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        if band.quantiser is Quantiser.FP8:
            scale = (np.maximum(abs(lo), abs(hi)) / np.float32(448)).astype(np.float16)
            shift = np.zeros_like(scale)
        else:
            levels = np.float32(2**band.quantiser.bits - 1)
            scale, shift = ((hi - lo) / levels).astype(np.float16), lo.astype(np.float16)
        s, z = scale.astype(np.float32), shift.astype(np.float32)
        y = np.divide(x - z, s, out=np.zeros_like(x), where=s > 0)
        if band.quantiser is Quantiser.FP8:
            code = y.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        else:
            code = np.rint(y).clip(0, levels)
        value[:] = z + code * s
    return out


def _interesting_binary32() -> Float:
    """Random bits, and every binary16 with the midpoints beside it and their neighbours."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[1:] + halves[:-1]) / 2
    around = [np.nextafter(middles, np.float32(side)) for side in (0, np.inf)]
    limits = np.array([65504, 65519.996, 65520, 65536, 1e38], np.float32)
    positive = np.concatenate([halves, middles, *around, limits])
    values = np.concatenate([bits.view(np.float32), positive, -positive])
    return values[np.isfinite(values)]


def test_binary16_rounding_equals_numpy() -> None:
    values = _interesting_binary32()
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    found = _each(cpu.round_to_binary16, values, np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_e4m3_decoding_equals_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    found = _each(cpu.e4m3_decode, codes, np.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found[[0, 128]]), [False, True])


def test_e4m3_encoding_equals_ml_dtypes_and_saturates() -> None:
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (codes[1:] + codes[:-1]) / 2
    around = [np.nextafter(middles, np.float32(side)) for side in (0, np.inf)]
    positive = np.concatenate([middles, *around])
    values = np.concatenate([_interesting_binary32(), positive, -positive])
    found = _each(cpu.e4m3_encode, values, np.uint8)
    expected = values.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(found, expected)


def _beyond_a_grid() -> Float:
    """All but one coefficient of a band lie on a grid that ends before that one."""
    x = np.full((1, WIDTH), -2, np.float32)
    x[0, 20:22] = 0, -1
    return x


@settings(max_examples=100, deadline=None)
@example(_beyond_a_grid())
@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(0, 9), st.just(WIDTH)),
        elements=st.floats(-65504, 65504, width=32),
        fill=st.floats(-8, 8, width=32),
    )
)
def test_round_trip_is_the_definition_or_as_close(coefficients: Float) -> None:
    """The latter where coefficients lie on a grid already, as those of hypothesis often do; but for
    what scale and shift are rounded by."""
    found, expected = _round_trip(coefficients, BANDS), _oracle(coefficients, BANDS)
    start = 0
    for band in BANDS:
        own = slice(start, start + band.size)
        start += band.size
        for x, ours, theirs in zip(
            coefficients[:, own].astype(np.float64), found[:, own], expected[:, own], strict=True
        ):
            if not np.array_equal(ours, theirs):
                assert band.size > 2
                rounding = np.sqrt(band.size) * 2.0**-10 * max(np.abs(x).max(), 2.0**-14)
                assert np.linalg.norm(ours - x) <= np.linalg.norm(theirs - x) + rounding


def test_fresh_coefficients_are_coded_as_published() -> None:
    x = np.random.default_rng(5).laplace(size=(20_000, WIDTH)).astype(np.float32)
    same = (_round_trip(x, BANDS) == _oracle(x, BANDS)).all(axis=1)
    assert same.mean() > 0.99  # a band of five may look as if it were on a grid
    wide = (Band(16, Quantiser.INT4), Band(25, Quantiser.INT2))
    np.testing.assert_array_equal(_round_trip(x, wide), _oracle(x, wide))


@pytest.mark.parametrize("size", [16, 64, 256])
def test_restored_coefficients_keep_their_grid(size: int) -> None:
    """But for what a cast did, again and again: scales and shifts do not follow it."""
    rng = np.random.default_rng(size)
    bands = (Band(size, Quantiser.INT4),)
    first = cpu.quantise(rng.laplace(size=(500, size)).astype(np.float32), bands)
    restored = np.empty((500, size), np.float32)
    cpu.dequantise(first, bands, restored)
    x, step = restored, first.scale.astype(np.float32).T
    for _ in range(10):
        moved = x + 0.03 * step * rng.standard_normal(x.shape)
        again = cpu.quantise(moved.astype(np.float32), bands)
        np.testing.assert_array_equal(again.codes, first.codes)
        x = np.empty_like(x)
        cpu.dequantise(again, bands, x)
    away = np.sqrt(np.square((x - restored) / step).mean())
    # A step's share of what ten estimates of two numbers may be off, each from so many.
    assert away < 3 * 0.03 * np.sqrt(10 * 2 / size)


@pytest.mark.parametrize("exponent", [-40, -24, -14, 0, 14])
@pytest.mark.parametrize("kind", [Quantiser.INT2, Quantiser.INT4, Quantiser.FP8])
def test_error_is_bounded_at_every_magnitude(kind: Quantiser, exponent: int) -> None:
    rng = np.random.default_rng(exponent + 50)
    bands = (Band(24, kind),)
    x = rng.uniform(-(2.0**exponent), 2.0**exponent, (64, 24)).astype(np.float32)
    # Half a step; binary16 rounding of scale and shift; binary16's least steps.
    step = {Quantiser.INT2: 1 / 3, Quantiser.INT4: 1 / 15, Quantiser.FP8: 1 / 28}[kind]
    bound = 2.0**exponent * (step + 2.0**-10) + 2.0**-24 * 448
    assert np.abs(_round_trip(x, bands) - x).max() <= bound


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.3, 6e4, 1e-30])
def test_constant_bands(value: float) -> None:
    x = np.full((2, WIDTH), value, np.float32)
    bands = (Band(20, Quantiser.INT2), Band(21, Quantiser.INT4))
    symbols = cpu.quantise(x, bands)
    assert not symbols.codes.any()
    assert not symbols.scale.any()
    np.testing.assert_array_equal(_round_trip(x, bands), x.astype(np.float16))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, -65520.0])
@pytest.mark.parametrize("component", [0, 5, 25, 40])
def test_a_token_that_cannot_be_coded_is_reported_alone(bad: float, component: int) -> None:
    rng = np.random.default_rng(2)
    good = rng.standard_normal((5, WIDTH)).astype(np.float32)
    x = good.copy()
    x[2, component] = bad
    symbols, expected = cpu.quantise(x, BANDS), cpu.quantise(good, BANDS)
    fp8_holds_it = component == 5 and bad == -65520.0
    np.testing.assert_array_equal(symbols.representable, [True, True, fp8_holds_it, True, True])
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(symbols.codes[others], expected.codes[others])
    np.testing.assert_array_equal(symbols.scale[:, others], expected.scale[:, others])
    if not fp8_holds_it:
        assert not symbols.codes[2].any()
        assert not symbols.scale[:, 2].any()
        assert not symbols.shift[:, 2].any()


@settings(max_examples=100, deadline=None)
@given(band_lists, st.integers(0, 9), st.data())
def test_packing_is_lossless_for_any_choice_of_tokens(
    bands: tuple[Band, ...], tokens: int, data: st.DataObject
) -> None:
    width = sum(band.size for band in bands)
    rng = np.random.default_rng(tokens)
    symbols = cpu.quantise(rng.standard_normal((tokens, width)).astype(np.float32), bands)
    kept = np.flatnonzero(data.draw(npst.arrays(np.bool_, tokens)))
    packed = cpu.pack(symbols, bands, kept)
    assert tuple(map(len, packed)) == cpu.segment_sizes(kept.size, bands)
    back = cpu.unpack(packed, kept.size, bands)
    np.testing.assert_array_equal(back.codes, symbols.codes[kept])
    np.testing.assert_array_equal(back.scale, symbols.scale[:, kept])
    np.testing.assert_array_equal(back.shift, symbols.shift[:, kept])
    assert back.representable.all()

    everything, some = np.full((2, tokens, width), 7, np.float32)
    cpu.dequantise(symbols, bands, everything)
    cpu.dequantise(back, bands, some, kept)
    np.testing.assert_array_equal(some[kept], everything[kept])
    assert (np.delete(some, kept, axis=0) == 7).all()


def test_layout_of_the_bytes() -> None:
    bands = (
        Band(1, Quantiser.INT4),
        Band(2, Quantiser.INT2),
        Band(1, Quantiser.NONE),
        Band(1, Quantiser.FP8),
    )
    codes = [[9, 0, 3, 0x38], [8, 1, 2, 0x81], [7, 2, 1, 0], [6, 3, 0, 1], [5, 1, 1, 2]]
    symbols = cpu.Symbols(
        codes=np.array(codes, np.uint8),
        scale=np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [0] * 5], np.uint16).view(np.float16),
        shift=np.array([[0x0102] * 5, [0x0304] * 5, [0] * 5], np.uint16).view(np.float16),
        representable=np.ones(5, np.bool_),
    )
    assert [segment.tolist() for segment in cpu.pack(symbols, bands)] == [
        [*range(1, 11), *[0] * 5, *[2] * 5, *[4] * 5, *[0] * 5],
        [*[0] * 15, *[1] * 5, *[3] * 5, *[0] * 5],
        [0b11100100, 0b01, 0b00011011, 0b01],
        [0x89, 0x67, 0x05],
        [0x38, 0x81, 0, 1, 2],
    ]


@pytest.mark.parametrize(
    ("segment", "position", "byte"),
    [(1, 3, 0x7C), (1, 7, 0xFC), (2, 1, 0b01000000), (4, 0, 0x7F), (4, 1, 0xFF)],
    ids=["scale", "shift", "filling", "code", "negative code"],
)
def test_bytes_that_pack_never_makes_are_refused(segment: int, position: int, byte: int) -> None:
    bands = (Band(2, Quantiser.INT2), Band(1, Quantiser.FP8))
    packed = [bytearray(size) for size in cpu.segment_sizes(2, bands)]
    cpu.unpack(packed, 2, bands)
    packed[segment][position] = byte
    with pytest.raises(FormatError, match="does not follow the format"):
        cpu.unpack(packed, 2, bands)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("segment", range(5))
def test_a_payload_of_another_size_is_refused(segment: int, change: int) -> None:
    sizes = list(cpu.segment_sizes(3, BANDS))
    sizes[segment] += change
    with pytest.raises(FormatError, match=r"segments of .* bytes, but 3 tokens of its plan take"):
        cpu.unpack([bytes(size) for size in sizes], 3, BANDS)


def test_wrong_arguments_are_refused_before_a_kernel_runs() -> None:
    x = np.zeros((3, WIDTH), np.float32)
    symbols = cpu.quantise(x, BANDS)
    with pytest.raises(ValueError, match=r"\[tokens, 41\], found \[3, 40\]"):
        cpu.quantise(np.zeros((3, WIDTH - 1), np.float32), BANDS)
    with pytest.raises(ValueError, match="C-contiguous float32"):
        cpu.quantise(np.zeros((WIDTH, 3), np.float32).T, BANDS)
    with pytest.raises(ValueError, match="C-contiguous float32, found float64"):
        cpu.dequantise(symbols, BANDS, x.astype(np.float64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other bands"):
        cpu.pack(symbols, BANDS[1:])
    with pytest.raises(ValueError, match="tokens must be"):
        cpu.pack(symbols, BANDS, np.array([3]))
    with pytest.raises(ValueError, match="rows must be"):
        cpu.dequantise(symbols, BANDS, x, np.array([0, 1, -1]))
    with pytest.raises(ValueError, match="a row for each of 3 tokens"):
        cpu.dequantise(symbols, BANDS, x, np.array([0, 1]))
