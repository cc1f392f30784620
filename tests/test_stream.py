"""Round trips: what goes in comes out, however it is cut, and the recorded errors are true."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from real_sample import RealSample
from strategies import (
    Array,
    Case,
    calibrate,
    cases,
    cuts,
    dtypes,
    encode,
    geometries,
    section_tokens,
)

import kvtc_stream as kvtc
from kvtc_stream.formats import Measure, Role
from kvtc_stream.io.dlpack import numpy_dtype
from kvtc_stream.stream.reader import LARGE, _cuts

# Short drawn streams gain nothing, hostile ones are unlike the calibration: both say so.
pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")


@given(st.integers(1, 5000), st.integers(1, 300), st.booleans())
def test_pieces_that_are_decoded_together(blocks: int, most: int, large: bool) -> None:
    cuts = [0, *_cuts(blocks, most, large=large).astype(int).tolist(), blocks]
    sizes = np.diff(cuts)
    assert (sizes >= 0).all()
    if large and blocks > most:
        assert sizes[0] == most
        assert sizes.max() <= 1.1 * LARGE * most + 1
        assert sizes[-1] <= 2 * most
        assert len(sizes) <= 3 + (blocks - most) / (LARGE * most)
    else:
        assert sizes.max() <= max(1.5 * most, 2)


def joined(blocks: Sequence[kvtc.KVBlock], section: int) -> list[kvtc.KVBlock]:
    """A section's blocks, which must follow one another."""
    own = [b for b in blocks if b.section == section]
    starts = np.cumsum([0, *(b.tokens for b in own)])
    assert [b.start for b in own] == starts[:-1].tolist()
    return own


def exact_values(x: Array, scale: Any) -> np.ndarray:
    """The cache's values in float64."""
    values = x.astype(np.float64)
    if scale is not None:
        scale = np.asarray(scale, np.float32).astype(np.float64)
        if scale.ndim == 1:
            scale = scale[:, None]
        values *= np.broadcast_to(scale, values.shape[:2])[:, :, None, None]
    return values


def true_errors(x: np.ndarray, y: Array) -> np.ndarray:
    """‖y−x‖/‖x‖ per token, in float64."""
    difference = np.square(y.astype(np.float64) - x).sum(axis=(0, 1, 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.sqrt(difference / np.square(x).sum(axis=(0, 1, 3)))
    return np.where(difference == 0, 0.0, errors)


def same_bits(x: Array, y: Array) -> bool:
    """Equal shapes, dtypes and bit patterns; NaN equals itself."""
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def stored_as(case: Case, x: Array, scale: Any) -> Array:
    """A verbatim token in the output dtype."""
    if not case.dtype.is_fp8:
        return x
    return exact_values(x, scale).astype(np.float32).astype(numpy_dtype(kvtc.DType.BFLOAT16))


@given(cases())
def test_round_trip(case: Case) -> None:
    decoder = kvtc.Decoder(case.codec.calibration)
    blocks = decoder.decode(encode(case))
    assert decoder.eof
    assert not decoder.unused_data
    codec = case.codec
    for i, (tokens, section) in enumerate(
        zip(case.sections, codec.calibration.geometry.sections, strict=True)
    ):
        own = joined(blocks, i)
        positions = tokens.known_positions
        assert sum(b.tokens for b in own) == tokens.count
        sinks = int((positions < codec.sinks).sum())
        coded = tokens.count - sinks
        tail = 0
        if codec.window:
            full = max(0, coded - codec.window) // codec.block_tokens
            tail = coded - full * codec.block_tokens
        assert sum(b.tokens for b in own if b.role is Role.SINKS) == sinks
        assert sum(b.tokens for b in own if b.role is Role.TAIL) == tail
        for block in own:
            span = slice(block.start, block.start + block.tokens)
            k, v = tokens.k[:, :, span], tokens.v[:, :, span]
            np.testing.assert_array_equal(block.positions, positions[span])
            assert block.k.shape == section.k_shape(block.tokens)
            assert block.v.shape == section.v_shape(block.tokens)
            if block.role is Role.DATA:
                check_data_block(case, block, k, v)
            else:
                assert same_bits(block.k, stored_as(case, k, case.options.get("k_scale")))
                assert same_bits(block.v, stored_as(case, v, case.options.get("v_scale")))


def check_data_block(case: Case, block: kvtc.KVBlock, k: Array, v: Array) -> None:
    """Errors are as recorded, and tokens that cannot be coded are exact."""
    exact = np.ones(block.tokens, bool)
    errors = {}
    for name, x, y in (("k", k, block.k), ("v", v, block.v)):
        scale = case.options.get(f"{name}_scale")
        stored = stored_as(case, x, scale)
        assert y.dtype == stored.dtype
        same = [same_bits(stored[:, :, t], np.asarray(y[:, :, t])) for t in range(block.tokens)]
        exact &= same
        values = exact_values(x, scale)
        finite = np.isfinite(values).all(axis=(0, 1, 3))
        assert np.array(same)[~finite].all()
        errors[name] = true_errors(values[:, :, finite], y[:, :, finite])
        assert np.isfinite(y[:, :, finite].astype(np.float32)).all()
    recorded = block.errors
    assert recorded.measure is Measure.RECONSTRUCTION
    # The encoder's measure counts tokens that it coded; verbatim ones were exact but for the
    # rounding of scaled fp8 to bfloat16.
    rounding = 2**-8 if case.dtype.is_fp8 else 0.0
    for name, worst, mean in (
        ("k", recorded.k_worst, recorded.k_mean),
        ("v", recorded.v_worst, recorded.v_mean),
    ):
        true = errors[name]
        bound = worst * (1 + 1e-5) + 1e-12
        assert true.max(initial=0.0) <= max(bound, rounding)
        assert mean <= bound
        if exact.sum() == 0:
            assert true.max() == pytest.approx(worst, rel=1e-5, abs=1e-12)
            assert true.mean() == pytest.approx(mean, rel=1e-5, abs=1e-12)
        if case.codec.error_bound is not None:
            limit = np.float32(case.codec.error_bound)
            assert worst <= limit * (1 + 1e-6)


@given(cases())
def test_cutting_the_input_does_not_show(case: Case) -> None:
    assert encode(case) == encode(case, whole=True)


@pytest.mark.parametrize("size", [1, 3, 16, 23, 199])
@pytest.mark.parametrize("sinks", [0, 4, 40])
def test_regular_pieces(
    calibration: kvtc.Calibration, cache: tuple[Array, Array], size: int, sinks: int
) -> None:
    """One token at a time, as a model generates them, and more."""
    codec = kvtc.Codec(calibration, ratio=4, sinks=sinks, window=24, block_tokens=16)
    encoder = kvtc.Encoder(codec)
    data = b""
    for start in range(0, 200, size):
        data += encoder.encode(*(x[:, :, start : start + size] for x in cache))
    assert data + encoder.finish() == kvtc.encode(*cache, codec=codec)


@given(cases(), st.data())
def test_cutting_the_bytes_does_not_show(case: Case, data: st.DataObject) -> None:
    stream = encode(case)
    expected = kvtc.Decoder(case.codec.calibration).decode(stream)
    decoder = kvtc.Decoder(case.codec.calibration)
    blocks = []
    for piece in data.draw(cuts(len(stream) + 3)):
        blocks += decoder.decode((stream + b"end")[piece])
    assert decoder.eof
    assert decoder.unused_data == b"end"
    check_same_blocks(blocks, expected)


def check_same_blocks(blocks: Sequence[kvtc.KVBlock], expected: Sequence[kvtc.KVBlock]) -> None:
    assert len(blocks) == len(expected)
    for a, b in zip(blocks, expected, strict=True):
        assert (a.section, a.role, a.start, a.errors) == (b.section, b.role, b.start, b.errors)
        np.testing.assert_array_equal(a.positions, b.positions)
        assert same_bits(a.k, b.k)
        assert same_bits(a.v, b.v)


class Pipe(io.RawIOBase):
    """Bytes that come once, a few at a time."""

    def __init__(self, data: bytes, most: int) -> None:
        self._data, self._most = io.BytesIO(data), most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._data.read(min(len(buffer), self._most))
        buffer[: len(data)] = data
        return len(data)


@given(cases(), st.data())
def test_all_ways_to_read_agree(case: Case, data: st.DataObject) -> None:
    stream = encode(case)
    calibration = case.codec.calibration
    expected = kvtc.Decoder(calibration).decode(stream)
    with kvtc.open(Pipe(stream, data.draw(st.integers(1, 5000))), calibration=calibration) as pipe:
        # Tails come at the end, when nothing can supersede them any more.
        check_same_blocks(list(pipe), sorted(expected, key=lambda b: b.role is Role.TAIL))
    section = data.draw(st.integers(0, len(case.sections) - 1))
    k, v = case.sections[section].k, case.sections[section].v
    tokens = slice(*sorted(data.draw(st.tuples(*[st.integers(0, k.shape[2])] * 2))))
    layers = slice(*sorted(data.draw(st.tuples(*[st.integers(0, k.shape[0])] * 2))))
    with kvtc.open(io.BytesIO(stream), calibration=calibration) as reader:
        check_same_blocks(list(reader), expected)
        assert reader.tokens(section) == k.shape[2]
        whole = reader.read(section=section)
        part = reader.read(tokens, layers, section)
        blocks = list(reader.blocks(tokens, layers, section))
    once = kvtc.decode(stream, calibration, section=section)
    own = [b for b in expected if b.section == section]
    for i, (x, y, z) in enumerate(zip(whole, once, part, strict=True)):
        assert x.shape == (k, v)[i].shape
        if own:
            assert same_bits(x, np.concatenate([(b.k, b.v)[i] for b in own], axis=2))
        assert same_bits(x, y)
        # Fewer layers are another matrix product: the same sums, in another order.
        some = x[layers, :, tokens]
        assert z.shape == some.shape
        close_to_rounding(z, some, whole=x[:, :, tokens])
        got = [np.asarray((b.k, b.v)[i]) for b in blocks]
        if some.size:
            assert same_bits(np.concatenate(got, axis=2), z)
    got_positions = [p for b in blocks for p in b.positions]
    if layers.start < layers.stop:
        assert got_positions == case.sections[section].known_positions[tokens].tolist()


def close_to_rounding(x: Array, y: Array, whole: Array) -> None:
    """Equal to a few units in the last place of each token's largest value."""
    info = {4: 2.0**-20, 2: 2.0**-7}[x.dtype.itemsize]
    a, b, w = (np.asarray(z).astype(np.float64) for z in (x, y, whole))
    special = ~np.isfinite(b)
    np.testing.assert_array_equal(a[special], b[special])
    largest = np.abs(np.where(np.isfinite(w), w, 0)).max(axis=(0, 1, 3), initial=0)
    difference = np.abs(np.where(special, 0, a) - np.where(special, 0, b))
    assert (difference <= largest[None, None, :, None] * info + 1e-37).all()


TO_TORCH = {
    kvtc.DType.FLOAT32: torch.float32,
    kvtc.DType.FLOAT16: torch.float16,
    kvtc.DType.BFLOAT16: torch.bfloat16,
    kvtc.DType.FLOAT8_E4M3FN: torch.float8_e4m3fn,
    kvtc.DType.FLOAT8_E5M2: torch.float8_e5m2,
}


def as_torch(x: Array) -> torch.Tensor:
    raw = torch.from_numpy(x.view({1: np.uint8, 2: np.int16, 4: np.int32}[x.dtype.itemsize]))
    return raw.view(TO_TORCH[kvtc.DType[x.dtype.name.upper()]])


@pytest.mark.parametrize("dtype", list(kvtc.DType))
def test_frameworks_and_layouts_give_the_same_bytes(
    codec: kvtc.Codec, cache: tuple[Array, Array], dtype: kvtc.DType
) -> None:
    k, v = (x.astype(numpy_dtype(dtype)) for x in cache)

    def strided(x: Array) -> Array:
        # Tokens before heads, as models compute them, and every second of a longer buffer.
        buffer = np.zeros((x.shape[0], 2 * x.shape[2], *x.shape[1::2]), x.dtype)
        buffer[:, ::2] = x.transpose(0, 2, 1, 3)
        return buffer[:, ::2].transpose(0, 2, 1, 3)

    expected = kvtc.encode(k, v, codec=codec)
    forms: list[Callable[[Array], Any]] = [
        strided,
        list,
        lambda x: x[:, None],
        lambda x: [layer[None] for layer in x],
        as_torch,
        lambda x: as_torch(x).transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: list(as_torch(x)),
        lambda x: tuple(as_torch(x)[:, None]),
    ]
    for form in forms:
        assert kvtc.encode(form(k), form(v), codec=codec) == expected


@given(geometries(), dtypes, st.data())
def test_fp8_and_wider_output_types(
    geometry: kvtc.Geometry, dtype: kvtc.DType, data: st.DataObject
) -> None:
    """Errors are measured after the cast to whatever ``out_dtype`` was asked for."""
    out_dtype = data.draw(st.sampled_from([d for d in kvtc.DType if d is dtype or not d.is_fp8]))
    codec = kvtc.Codec(
        calibrate(geometry), ratio=2, window=0, sinks=2, block_tokens=16, out_dtype=out_dtype.label
    )
    tokens = data.draw(section_tokens(geometry, 0, dtype, max_tokens=40, hostile=False))
    encoder = kvtc.Encoder(codec)
    stream = encoder.encode(tokens.k, tokens.v, positions=tokens.positions) + encoder.finish()
    for block in kvtc.Decoder(codec.calibration).decode(stream):
        span = slice(block.start, block.start + block.tokens)
        for x, y, worst in (
            (tokens.k, block.k, block.errors.k_worst),
            (tokens.v, block.v, block.errors.v_worst),
        ):
            assert y.dtype == numpy_dtype(out_dtype)
            wanted = x[:, :, span].astype(np.float64)
            if block.role is Role.DATA:
                verbatim = true_errors(
                    wanted, wanted.astype(np.float32).astype(numpy_dtype(out_dtype))
                ).max()
                assert true_errors(wanted, y).max() <= max(worst, verbatim) * (1 + 1e-5)
            else:
                assert same_bits(y, wanted.astype(np.float32).astype(y.dtype))


def test_stated_error_shrinks_with_the_ratio(
    calibration: kvtc.Calibration, cache: tuple[Array, Array]
) -> None:
    errors = []
    for ratio in (1.5, 3, 6, 12, 10**6):
        encoder = kvtc.Encoder(kvtc.Codec(calibration, ratio=ratio, window=0, block_tokens=64))
        encoder.encode(*cache)
        encoder.finish()
        errors.append(encoder.statistics.k_error_mean)
    assert errors == sorted(errors)
    assert errors[0] < 0.05
    # Without bits the mean is left.
    assert errors[-1] > 0.3


def test_rope_comes_off_and_goes_on() -> None:
    """Keys after RoPE cost what the same keys cost before it."""
    rope = kvtc.Rope.from_theta(1e4, 8)
    before = kvtc.Geometry.uniform(layers=2, kv_heads=1, head_dim=8)
    after = kvtc.Geometry.uniform(layers=2, kv_heads=1, head_dim=8, rope=rope)
    train, test = (kvtc.testing.drawn_cache(before, 600, seed=s) for s in (1, 2))

    def rotated(k: Array) -> Array:
        angles = np.outer(np.arange(k.shape[2]), rope.inv_freq)
        turn = np.exp(1j * angles)
        pairs = (k[..., :4] + 1j * k[..., 4:]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=-1).astype(np.float32)

    results = {}
    for geometry, turn in ((before, np.asarray), (after, rotated)):
        calibrator = kvtc.Calibrator(geometry)
        calibrator.update(turn(train[0]), train[1])
        calibration = calibrator.finish()
        codec = kvtc.Codec(calibration, ratio=2, sinks=0, window=0)
        encoder = kvtc.Encoder(codec)
        data = encoder.encode(turn(test[0]), test[1]) + encoder.finish()
        k, v = kvtc.decode(data, calibration)
        results[geometry] = (calibration, encoder.statistics, np.asarray(k), np.asarray(v))
    (a, a_stats, ak, av), (b, b_stats, bk, bv) = results[before], results[after]
    assert a_stats.k_error_mean < 0.3
    assert b_stats.k_error_mean == pytest.approx(a_stats.k_error_mean, rel=0.02)
    np.testing.assert_allclose(bv, av, atol=1e-2)
    assert np.abs(bk - rotated(ak)).mean() < 0.02
    mine, theirs = (c.sections[0].basis("separate")[0] for c in (a, b))
    np.testing.assert_allclose(mine.mean, theirs.mean, atol=1e-5)
    np.testing.assert_allclose(mine.spectrum, theirs.spectrum, rtol=1e-4)
    a32, b32 = (part.transforms().analysis.matrix() for part in (mine, theirs))
    np.testing.assert_allclose(a32, b32, atol=2e-3)


@pytest.mark.filterwarnings("ignore:section .* the mean error:kvtc_stream.KVTCWarning")
def test_a_stream_may_name_its_own_rope(calibration: kvtc.Calibration) -> None:
    """Keys captured before RoPE, coded with a calibration of keys after it."""
    geometry = calibration.geometry
    plain = kvtc.Geometry((replace(geometry.sections[0], rope=()),))
    k, v = kvtc.testing.drawn_cache(plain, 100)
    # ``drawn_cache`` is the same with and without RoPE, so this calibration is of other keys.
    calibrator = kvtc.Calibrator(plain)
    calibrator.update(*kvtc.testing.drawn_cache(plain, 500, seed=1))
    fitting = calibrator.finish()
    rope = kvtc.Rope.from_theta(500.0, 8)
    codec = kvtc.Codec(fitting, ratio=4, window=0)
    encoder = kvtc.Encoder(codec, rope=rope)
    data = encoder.encode(k, v) + encoder.finish()
    decoder = kvtc.Decoder(codec.calibration)
    blocks = decoder.decode(data)
    assert decoder.header is not None
    assert decoder.header.geometry.sections[0].rope == (rope, rope)
    got = np.concatenate([np.asarray(b.k) for b in blocks], axis=2)
    errors = true_errors(k.astype(np.float64), got)
    assert errors.max() <= encoder.statistics.k_error_worst * (1 + 1e-5)
    for ropes in ((), (None, None)):
        encoder = kvtc.Encoder(kvtc.Codec(calibration, ratio=4, window=0), rope=ropes)
        decoder = kvtc.Decoder(calibration)
        decoder.decode(encoder.encode(k, v) + encoder.finish())
        assert decoder.header is not None
        assert decoder.header.geometry == plain
    with pytest.raises(ValueError, match="entry for each of 2 layers, found 3"):
        kvtc.Encoder(codec, rope=[rope] * 3)


def test_memory_does_not_grow_with_the_stream(codec: kvtc.Codec) -> None:
    """Six times the tokens take no more memory, for encoder and decoder alike."""
    k, v = kvtc.testing.drawn_cache(codec.calibration.geometry, 64, dtype=kvtc.DType.FLOAT16)

    def peak(chunks: int) -> int:
        encoder, decoder = kvtc.Encoder(codec), kvtc.Decoder(codec.calibration)
        tracemalloc.start()
        try:
            for _ in range(chunks):
                decoder.decode(encoder.encode(k, v))
            decoder.decode(encoder.finish())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(4)  # whatever is made once
    # Of two: Python's table of interned strings, to which each ``as_strided`` of NumPy adds, grows
    # by a megabyte in whichever run comes to its limit. What a stream holds, both hold.
    short, long = min(peak(8), peak(8)), min(peak(48), peak(48))
    # The index and the trailer grow: an entry per block.
    blocks = 64 * 40 // codec.block_tokens
    assert long < short + 1000 * blocks


def test_streams_of_nothing(codec: kvtc.Codec) -> None:
    section = codec.calibration.geometry.sections[0]
    empty = np.zeros(section.k_shape(0), np.float16), np.zeros(section.v_shape(0), np.float16)
    for data, dtype in (
        (kvtc.encode(*empty, codec=codec), np.float16),
        (kvtc.Encoder(codec).finish(), numpy_dtype(kvtc.DType.BFLOAT16)),
    ):
        k, v = kvtc.decode(data, codec.calibration)
        assert (k.shape, v.shape) == (section.k_shape(0), section.v_shape(0))
        assert k.dtype == v.dtype == dtype


def test_real_cache(real_sample: RealSample) -> None:
    """Ratio and errors on a real model's cache stay where they are."""
    train, test = slice(0, 320), slice(320, 520)
    calibrator = kvtc.Calibrator(real_sample.geometry)
    calibrator.update(real_sample.k[:, :, train], real_sample.v[:, :, train])
    calibration = calibrator.finish()
    k, v = real_sample.k[:, :, test], real_sample.v[:, :, test]
    for ratio, least_coded, most_k, most_v in REAL_BOUNDS:
        encoder = kvtc.Encoder(
            kvtc.Codec(calibration, "paper", ratio=ratio, window=0, block_tokens=100)
        )
        data = encoder.encode(k, v, positions=np.arange(320, 520)) + encoder.finish()
        s = encoder.statistics
        assert s.stream_bytes == len(data)
        assert s.coded_ratio > least_coded
        assert s.k_error_mean < most_k
        assert s.v_error_mean < most_v
        decoded = kvtc.decode(data, calibration)
        for x, y, mean in ((k, decoded[0], s.k_error_mean), (v, decoded[1], s.v_error_mean)):
            assert true_errors(x.astype(np.float64), y).mean() == pytest.approx(mean, rel=1e-5)


#: Ratio asked for; least ratio of the coded blocks, most error of K and of V.
REAL_BOUNDS = [(2, 2.38, 0.0125, 0.0285), (4, 4.3, 0.068, 0.171), (8, 8.2, 0.165, 0.456)]
