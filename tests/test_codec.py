"""Targets, options, and what an encoder or decoder does when it is misused."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import HOSTILE, calibrate, geometries

import kvtc_stream as kvtc
from kvtc_stream.calibration.parts import Part
from kvtc_stream.formats import Band, PartPlan, Quantiser, Role, SectionPlan
from kvtc_stream.io.dlpack import numpy_dtype
from kvtc_stream.planning.dynamic import allocate
from kvtc_stream.planning.targets import make_plan
from kvtc_stream.stream import codec as codec_module

Array = NDArray[Any]
Cache = tuple[Array, Array]

# Short drawn streams gain little, hostile ones are unlike the calibration: both say so.
poor = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
unlike = pytest.mark.filterwarnings("ignore:section .* the mean error:kvtc_stream.KVTCWarning")


def bits(codec: kvtc.Codec) -> int:
    return sum(section.bits for section in codec.plan.sections)


def predicted(codec: kvtc.Codec) -> list[float]:
    """Relative error of every part, from the calibration's tables."""
    errors = []
    for section, learnt in zip(codec.plan.sections, codec.calibration.sections, strict=True):
        for plan, part in zip(section.parts, learnt.basis(section.basis), strict=True):
            tables, first, error = part.errors, 0, part.errors.dropped
            for band in plan.bands:
                if band.quantiser is Quantiser.NONE:
                    error += tables.energy[first : first + band.size].sum()
                else:
                    size, kind = tables.sizes.index(band.size), tables.types.index(band.quantiser)
                    error += float(tables.errors[first, size, kind])
                first += band.size
            errors.append(np.sqrt((error + tables.energy[first:].sum()) / part.energy))
    return errors


# --- targets ---


@given(geometries(), st.floats(0.5, 200))
def test_budgets_are_kept(geometry: kvtc.Geometry, ratio: float) -> None:
    calibration = calibrate(geometry)
    codec = kvtc.Codec(calibration, "paper", ratio=ratio)
    for plan, section in zip(codec.plan.sections, geometry.sections, strict=True):
        for part in plan.parts:
            assert part.bits <= 16 * part.width(section) / ratio
    budget = sum(16 * (s.k_width + s.v_width) for s in geometry.sections) / ratio
    assert bits(kvtc.Codec(calibration, "paper", bits_per_token=budget)) <= budget


@given(geometries(), st.lists(st.floats(1, 100), min_size=2, max_size=4))
def test_more_bits_never_cost_accuracy(geometry: kvtc.Geometry, ratios: list[float]) -> None:
    calibration = calibrate(geometry)
    errors = [
        predicted(kvtc.Codec(calibration, "paper", ratio=ratio))
        for ratio in sorted(ratios, reverse=True)
    ]
    for more, less in itertools.pairwise(errors):
        assert all(a >= b - 1e-9 for a, b in zip(more, less, strict=True))


@given(geometries(), st.floats(0.02, 0.9))
def test_error_targets_are_predicted(geometry: kvtc.Geometry, error: float) -> None:
    """With the fewest bits: less would not do. What 16 bits per value cannot do is refused."""
    calibration = calibrate(geometry)
    parts = [part for s in calibration.sections for part in s.basis("separate")]
    try:
        codec = kvtc.Codec(calibration, "paper", mean_error=error)
        codec.make_plan()
    except kvtc.UnsupportedError:
        assert max(least_error(part, 16 * part.width) for part in parts) > error
        return
    assert max(predicted(codec)) <= error * (1 + 1e-6)
    plans = [plan for s in codec.plan.sections for plan in s.parts]
    for part, plan in zip(parts, plans, strict=True):
        if plan.bits:
            assert least_error(part, plan.bits - 2) > error


def test_error_targets_leave_little_unused(calibration: kvtc.Calibration) -> None:
    """Predictions stay below their targets, and over many targets come close to them."""
    targets = np.linspace(0.05, 0.9, 60)
    reached = [max(predicted(kvtc.Codec(calibration, "paper", mean_error=e))) for e in targets]
    used = np.array(reached) / targets
    assert used.max() <= 1 + 1e-6
    assert used.mean() > 0.8


def least_error(part: Part, budget: int) -> float:
    """Relative error of the best plan within a budget."""
    return float(np.sqrt(allocate(part.errors, budget).error / part.energy))


@pytest.mark.parametrize("error", [0.05, 0.2, 0.5])
def test_error_targets_are_measured(calibration: kvtc.Calibration, error: float) -> None:
    """On a cache like the calibration's, root mean square over tokens."""
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 1000, seed=5)
    codec = kvtc.Codec(calibration, "paper", mean_error=error, sinks=0, window=0)
    back = kvtc.decode(kvtc.encode(k, v, codec=codec), calibration)
    for x, y, promised in zip((k, v), back, predicted(codec), strict=True):
        measured = np.linalg.norm(x - np.asarray(y)) / np.linalg.norm(x)
        assert measured == pytest.approx(promised, rel=0.1)
        assert measured < error * 1.1


def test_unreachable_error(calibration: kvtc.Calibration) -> None:
    with pytest.raises(kvtc.UnsupportedError, match=r"mean_error=1e-09 cannot be met"):
        kvtc.Codec(calibration, "paper", mean_error=1e-9).make_plan()
    calibrator = kvtc.Calibrator(calibration.geometry, rank=1)
    calibrator.update(*kvtc.testing.drawn_cache(calibration.geometry, 400))
    with pytest.raises(kvtc.UnsupportedError, match="higher rank"):
        kvtc.Codec(calibrator.finish(), mean_error=0.1).make_plan()


@pytest.mark.parametrize("target", ["ratio", "bits_per_token", "mean_error"])
@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_targets_are_positive(calibration: kvtc.Calibration, target: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{target} must be positive and finite"):
        kvtc.Codec(calibration, "paper", **{target: value})


def test_generous_budgets_cost_nothing(calibration: kvtc.Calibration) -> None:
    """A budget beyond what the best plan takes is not paid for in memory."""
    best = kvtc.Codec(calibration, "paper", ratio=1e-12)
    assert predicted(best) == predicted(kvtc.Codec(calibration, "paper", bits_per_token=1e15))
    assert max(predicted(best)) < 0.01


def test_two_targets(calibration: kvtc.Calibration) -> None:
    with pytest.raises(ValueError, match="give one target, found ratio and bits_per_token"):
        kvtc.Codec(calibration, "paper", ratio=8, bits_per_token=30)
    plan = kvtc.Codec(calibration, "paper", ratio=8).plan
    with pytest.raises(ValueError, match="leaves nothing to choose: leave out ratio"):
        kvtc.Codec(calibration, "paper", ratio=4, fixed_plan=plan)
    with pytest.raises(TypeError, match=r"window must be an integer, found 1\.5"):
        kvtc.Codec(calibration, "paper", window=1.5)  # type: ignore[arg-type]


# --- the codec is a value ---


def test_making_a_codec_makes_no_plan(
    calibration: kvtc.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning takes seconds for large models; it is done once, when the plan is needed."""
    made = []

    def plan(*args: Any, **options: Any) -> kvtc.Plan:
        made.append(args)
        return make_plan(*args, **options)

    monkeypatch.setattr(codec_module, "make_plan", plan)
    codec = kvtc.Codec(calibration, ratio=7.25)
    kvtc.Encoder(codec)
    kvtc.PageCodec(codec, dtype="float32")
    assert not made
    assert codec.plan is codec.plan is kvtc.Codec(calibration, ratio=7.25, window=0).plan
    assert len(made) == 1


def test_codecs_are_values(calibration: kvtc.Calibration) -> None:
    a, b = (kvtc.Codec(calibration, "paper", ratio=8, window=32) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != kvtc.Codec(calibration, "paper", ratio=8)
    assert kvtc.Codec(calibration).target == kvtc.Codec(calibration, ratio=16).target
    with pytest.raises(FrozenInstanceError):
        a.window = 3  # type: ignore[misc]
    assert len(repr(a)) < 5000
    assert replace(a, window=0) == kvtc.Codec(calibration, "paper", ratio=8, window=0)
    assert replace(a, ratio=4) == kvtc.Codec(calibration, "paper", ratio=4, window=32)
    assert pickle.loads(pickle.dumps(a)) == copy.deepcopy(a) == a


def test_a_codec_shows_what_it_aims_at(calibration: kvtc.Calibration) -> None:
    begin = f"Codec(calibration={calibration!r}, "
    assert repr(kvtc.Codec(calibration)) == f"{begin}ratio=16.0)"
    codec = kvtc.Codec(calibration, "paper", mean_error=0.1, window=0)
    assert repr(codec) == f"{begin}preset='paper', mean_error=0.1, window=0)"
    fixed = kvtc.Codec(calibration, fixed_plan=kvtc.Codec(calibration).plan)
    assert repr(fixed) == f"{begin}fixed_plan={fixed.plan!r})"


def test_plans_are_values(calibration: kvtc.Calibration, cache: Cache) -> None:
    codec = kvtc.Codec(calibration, "paper", ratio=4, window=24, block_tokens=16)
    plan = kvtc.Plan.from_bytes(codec.plan.to_bytes())
    assert plan == codec.plan
    again = kvtc.Codec(calibration, "paper", fixed_plan=plan, window=24, block_tokens=16)
    assert kvtc.encode(*cache, codec=again) == kvtc.encode(*cache, codec=codec)
    with pytest.raises(ValueError, match="not for preset 'default'"):
        kvtc.Codec(calibration, "default", fixed_plan=plan)


def test_plans_of_other_calibrations(calibration: kvtc.Calibration) -> None:
    other = calibrate(kvtc.Geometry.uniform(layers=3, kv_heads=2, head_dim=8))
    plan = kvtc.Codec(other, "paper", ratio=8).plan
    with pytest.raises(ValueError, match="layers"):
        kvtc.Codec(calibration, "paper", fixed_plan=plan)
    low = kvtc.Calibrator(calibration.geometry, rank=2)
    low.update(*kvtc.testing.drawn_cache(calibration.geometry, 400))
    with pytest.raises(ValueError, match="does not fit the calibration"):
        kvtc.Codec(low.finish(), "paper", fixed_plan=kvtc.Codec(calibration, "paper", ratio=2).plan)
    parts = (PartPlan((0, 1), (0, 1), (Band(1, Quantiser.FP8),)),)
    with pytest.raises(kvtc.UnsupportedError, match="no basis 'other'"):
        kvtc.Codec(
            calibration, "paper", fixed_plan=kvtc.Plan("paper", (SectionPlan("other", parts),))
        )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("preset", "best", "preset must be one of paper, default"),
        ("coder", "gzip", "coder must be one of"),
        ("out_dtype", "float64", "out_dtype must be one of"),
        ("measure", "some", "measure must be one of"),
        ("backend", "tpu", "backend must be one of"),
        ("error_bound", -0.1, "error_bound must be at least 0"),
        ("error_bound", np.nan, "error_bound must be at least 0"),
        ("sinks", -1, "sinks must be from 0"),
        ("window", -1, "window must be from 0"),
        ("block_tokens", 0, "block_tokens must be from 1"),
        ("block_tokens", 2**40, "block_tokens must be from 1"),
    ],
)
def test_wrong_options(
    calibration: kvtc.Calibration, option: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kvtc.Codec(calibration, **{"preset": "paper", option: value})


@pytest.mark.parametrize("option", ["ratio", "mean_error", "error_bound", "window", "block_tokens"])
def test_options_that_are_no_numbers(calibration: kvtc.Calibration, option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} must be an? (number|integer), found '16'"):
        kvtc.Codec(calibration, **{option: "16"})  # type: ignore[arg-type]


def test_a_codec_is_no_calibration(
    calibration: kvtc.Calibration, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    """Nor a path: what was passed in the place of which is said at once."""
    makes: list[Callable[..., Any]] = [
        kvtc.Encoder,
        partial(kvtc.encode, *cache),
        partial(kvtc.PageCodec, dtype="float32"),
        lambda codec: kvtc.open(io.BytesIO(), "wb", codec=codec),
    ]
    for make in makes:
        with pytest.raises(TypeError, match="codec must be a Codec, found Calibration: make one"):
            make(calibration)
    takes: list[Callable[..., Any]] = [
        kvtc.Codec,
        kvtc.Decoder,
        partial(kvtc.decode, stream),
        lambda calibration: kvtc.open(stream, calibration=calibration),
    ]
    for take in takes:
        for wrong in ("calibration.safetensors", codec):
            with pytest.raises(TypeError, match="calibration must be a Calibration, found"):
                take(wrong)
    with pytest.raises(TypeError, match="from a path, a binary file or bytes, found ndarray"):
        kvtc.decode(np.frombuffer(stream, np.uint8), calibration)


def test_error_bound_needs_the_full_measure(calibration: kvtc.Calibration) -> None:
    with pytest.raises(ValueError, match="needs measure=True"):
        kvtc.Codec(calibration, "paper", error_bound=0.1, measure=False)


# --- hostile values ---


@poor
@unlike
@pytest.mark.parametrize("dtype", list(kvtc.DType))
@pytest.mark.parametrize("ratio", [2, 10**6])
@pytest.mark.parametrize("measure", [True, False])
def test_hostile_tokens(
    calibration: kvtc.Calibration, dtype: kvtc.DType, ratio: float, measure: bool
) -> None:
    """Each hostile value in a token of its own, in K, in V, and in one channel."""
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 4 * len(HOSTILE))
    for i, value in enumerate(HOSTILE.values()):
        k[:, :, 4 * i] = value
        v[:, :, 4 * i + 1] = value
        k[0, 0, 4 * i + 2, 0] = value
    with np.errstate(over="ignore", invalid="ignore"):
        k, v = (x.astype(numpy_dtype(dtype)) for x in (k, v))
    codec = kvtc.Codec(
        calibration, "paper", ratio=ratio, sinks=0, window=0, block_tokens=16, measure=measure
    )
    encoder = kvtc.Encoder(codec)
    back = kvtc.decode(encoder.encode(k, v) + encoder.finish(), calibration)
    for x, y in ((k, back[0]), (v, back[1])):
        wide, got = x.astype(np.float32), np.asarray(y).astype(np.float32)
        finite = np.isfinite(wide).all(axis=(0, 1, 3))
        np.testing.assert_array_equal(got[:, :, ~finite], wide[:, :, ~finite])
        if measure:
            assert np.isfinite(got[:, :, finite]).all()


@unlike
def test_error_bound_is_a_bound(calibration: kvtc.Calibration) -> None:
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 400)
    v[:, :, 100:120] = kvtc.testing.drawn_cache(calibration.geometry, 20, seed=3)[0][:, ::-1]
    loose = kvtc.Codec(calibration, "paper", ratio=4, window=0)
    back = kvtc.decode(kvtc.encode(k, v, codec=loose), calibration)
    assert errors(v, back[1]).max() > 0.6
    encoder = kvtc.Encoder(kvtc.Codec(calibration, "paper", ratio=4, window=0, error_bound=0.6))
    back = kvtc.decode(encoder.encode(k, v) + encoder.finish(), calibration)
    assert max(errors(k, back[0]).max(), errors(v, back[1]).max()) <= 0.6
    data = encoder.statistics.roles[Role.DATA]
    assert 0 < data.verbatim_tokens < data.tokens / 2


def errors(x: Array, y: Any) -> NDArray[np.float64]:
    difference = np.square(np.asarray(y, np.float64) - x).sum(axis=(0, 1, 3))
    return np.sqrt(difference / np.square(x.astype(np.float64)).sum(axis=(0, 1, 3)))


# --- the encoder's rules ---


def wrong_chunks(k: Array, v: Array) -> Iterator[tuple[type[Exception], str, Any, Any, dict]]:
    """Chunks that do not fit a stream of float32 tokens 0 to 99, and what is said of them."""
    yield ValueError, "k has shape", k[:, :1], v, {}
    yield ValueError, "v has shape", k, v[..., :3], {}
    yield ValueError, "transpose those two axes", k.transpose(0, 2, 1, 3), v, {}
    yield ValueError, "a list of 1 tensors", [k[0]], v, {}
    yield ValueError, "k has 50 tokens, v has 49", k, v[:, :, 1:], {}
    yield TypeError, "k is float16, expected float32", k.astype(np.float16), v, {}
    yield TypeError, "v is float16, expected float32", k, v.astype(np.float16), {}
    yield TypeError, "float64", k.astype(np.float64), v.astype(np.float64), {}
    yield ValueError, "positions start at 99", k, v, {"positions": np.arange(99, 149)}
    yield ValueError, "strictly rising", k, v, {"positions": np.full(50, 200)}
    yield ValueError, "positions have shape", k, v, {"positions": np.arange(100, 149)}
    yield ValueError, "expected integers", k, v, {"positions": np.arange(100.0, 150)}
    yield ValueError, "section must be from 0 to 0", k, v, {"section": 1}
    yield ValueError, "section must be from 0 to 0", k, v, {"section": -1}
    yield TypeError, "k", None, v, {}


def test_wrong_chunks_leave_the_stream_valid(codec: kvtc.Codec, cache: Cache) -> None:
    k, v = cache
    expected = kvtc.encode(k[:, :, :150], v[:, :, :150], codec=codec)
    encoder = kvtc.Encoder(codec)
    with pytest.raises(TypeError, match="v is float16, expected float32 as the k beside it"):
        encoder.encode(k, v.astype(np.float16))
    data = encoder.encode(k[:, :, :100], v[:, :, :100])
    for error, message, bad_k, bad_v, options in wrong_chunks(k[:, :, 100:150], v[:, :, 100:150]):
        with pytest.raises(error, match=message):
            encoder.encode(bad_k, bad_v, **options)
    data += encoder.encode(k[:, :, 100:150], v[:, :, 100:150])
    assert data + encoder.finish() == expected


@poor
def test_a_refused_output_type_leaves_the_stream_valid(
    calibration: kvtc.Calibration, cache: Cache
) -> None:
    codec = kvtc.Codec(calibration, "paper", ratio=4, window=0, out_dtype="float8_e4m3fn")
    encoder = kvtc.Encoder(codec)
    with pytest.raises(TypeError, match="needs fp8 input, found float32"):
        encoder.encode(*cache)
    k, v = (x.astype(numpy_dtype(kvtc.DType.FLOAT8_E4M3FN)) for x in cache)
    data = encoder.encode(k, v) + encoder.finish()
    assert kvtc.decode(data, calibration)[0].dtype == k.dtype


@poor
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_float16_has_no_room_for_is_refused(
    calibration: kvtc.Calibration, cache: Cache, dtype: str
) -> None:
    """It would be restored as infinity. What is not finite already is as it was."""
    codec = kvtc.Codec(calibration, ratio=4, window=8, out_dtype="float16")
    k, v = (x.astype(numpy_dtype(kvtc.DType[dtype.upper()])) for x in cache)
    k[0, 0, 3, :3] = np.inf, -np.inf, np.nan
    k[0, 0, 4, 0] = 65280
    found = kvtc.decode(kvtc.encode(k, v, codec), calibration)[0].astype(np.float32)
    np.testing.assert_array_equal(found[0, 0, 3, :3], k[0, 0, 3, :3].astype(np.float32))
    assert np.isfinite(found[0, 0, 4]).all()
    pages = kvtc.PageCodec(codec, dtype=dtype)
    v[1, 1, 5, 2] = -65536
    with pytest.raises(kvtc.UnsupportedError, match="v of layer 1 has values beyond 65504"):
        kvtc.encode(k, v, codec)
    with pytest.raises(kvtc.UnsupportedError, match="v of layer 1 has values beyond 65504"):
        pages.encode(k[:, :, :16], v[:, :, :16], positions=0)
    kvtc.encode(k, v, kvtc.Codec(calibration, ratio=4, window=8))


def test_scales_are_for_fp8(codec: kvtc.Codec, cache: Cache) -> None:
    with pytest.raises(TypeError, match="are for fp8 caches, found float32"):
        kvtc.Encoder(codec, k_scale=2.0).encode(*cache)
    for scale in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="v_scale must be positive and finite"):
            kvtc.Encoder(codec, v_scale=scale)
    with pytest.raises(ValueError, match=r"k_scale must be a scalar.*found \[3, 1\]"):
        kvtc.Encoder(codec, k_scale=np.ones(3))


def test_metadata(codec: kvtc.Codec) -> None:
    encoder = kvtc.Encoder(
        codec, metadata={"prompt": "größer", "n": [1, None]}, token_digest=b"\1" * 32
    )
    decoder = kvtc.Decoder(codec.calibration)
    decoder.decode(encoder.finish())
    header = decoder.header
    assert header is not None
    assert header.metadata == '{"prompt":"gr\\u00f6\\u00dfer","n":[1,null]}'
    assert header.token_digest == b"\1" * 32
    with pytest.raises(ValueError, match="JSON compliant"):
        kvtc.Encoder(codec, metadata={"a": float("nan")})
    with pytest.raises(TypeError, match="not JSON serializable"):
        kvtc.Encoder(codec, metadata={"a": b""})


def test_use_after_finish(codec: kvtc.Codec, cache: Cache) -> None:
    encoder = kvtc.Encoder(codec)
    encoder.encode(*cache)
    encoder.finish()
    with pytest.raises(kvtc.StateError, match="cannot encode: the encoder is finished"):
        encoder.encode(*cache)
    with pytest.raises(kvtc.StateError, match="cannot finish: the encoder is finished"):
        encoder.finish()


def test_finish_after_a_failure(
    codec: kvtc.Codec, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = kvtc.Encoder(codec)
    encoder.encode(*cache)
    with monkeypatch.context() as patch:
        patch.setattr("kvtc_stream.backends.cpu_payloads.UniformCoding.quantise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoder.encode(*cache)
    for use in (lambda: encoder.encode(*cache), encoder.finish):
        with pytest.raises(kvtc.StateError, match="failed by an earlier exception; make a new one"):
            use()


class Slow:
    """Positions that take their time: whoever reads them holds the encoder."""

    def __init__(self, positions: Array) -> None:
        self.positions = positions
        self.reading, self.go_on = threading.Event(), threading.Event()

    def __array__(self, *_: Any, **__: Any) -> Array:
        self.reading.set()
        assert self.go_on.wait(10)
        return self.positions


def test_two_threads(codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    encoder, slow, results = kvtc.Encoder(codec), Slow(np.arange(200)), []
    thread = threading.Thread(target=lambda: results.append(encoder.encode(*cache, positions=slow)))
    thread.start()
    assert slow.reading.wait(10)
    try:
        for use in (lambda: encoder.encode(*cache), encoder.finish):
            with pytest.raises(kvtc.StateError, match="another thread is using this encoder"):
                use()
    finally:
        slow.go_on.set()
        thread.join()
    assert results[0] + encoder.finish() == stream


def test_many_threads_with_an_encoder_each(codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def there_and_back(_: int) -> bool:
        data = kvtc.encode(*cache, codec=codec)
        k, _v = kvtc.decode(data, codec.calibration)
        return data == stream and np.array_equal(k, expected)

    expected = kvtc.decode(stream, codec.calibration)[0]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(there_and_back, range(12)))


# --- the decoder's rules ---


def test_a_damaged_stream_fails_the_decoder(codec: kvtc.Codec, stream: bytes) -> None:
    whole = kvtc.Decoder(codec.calibration).decode(stream)
    damaged = bytearray(stream)
    damaged[len(stream) // 2] ^= 1
    decoder, blocks = kvtc.Decoder(codec.calibration), []
    with pytest.raises(kvtc.ChecksumError):  # noqa: PT012
        for i in range(0, len(stream), 50):
            blocks += decoder.decode(damaged[i : i + 50])
    assert 0 < len(blocks) < len(whole)
    for block, expected in zip(blocks, whole, strict=False):
        np.testing.assert_array_equal(block.k, expected.k)
    with pytest.raises(kvtc.StateError, match="failed before"):
        decoder.decode(stream)


def test_the_end_of_the_input(codec: kvtc.Codec, stream: bytes) -> None:
    decoder = kvtc.Decoder(codec.calibration)
    with pytest.raises(kvtc.TruncatedError):
        decoder.close()
    decoder = kvtc.Decoder(codec.calibration)
    decoder.decode(stream[:-1])
    assert not decoder.eof
    with pytest.raises(kvtc.TruncatedError):
        decoder.close()
    decoder = kvtc.Decoder(codec.calibration)
    decoder.decode(memoryview(stream))
    decoder.close()
    assert decoder.eof
    assert decoder.decode(b"more") == []
    assert decoder.unused_data == b"more"


def test_decoder_limits(calibration: kvtc.Calibration, stream: bytes) -> None:
    with pytest.raises(kvtc.LimitError, match="max_layers"):
        kvtc.Decoder(calibration, limits=kvtc.Limits(max_layers=1)).decode(stream)


# --- statistics and warnings ---


def test_statistics_count_every_byte(codec: kvtc.Codec, cache: Cache) -> None:
    encoder = kvtc.Encoder(codec)
    data = encoder.encode(*cache)
    assert encoder.statistics.stream_bytes == len(data)
    data += encoder.finish()
    s = encoder.statistics
    assert s.stream_bytes == len(data)
    assert s.cache_bytes == sum(x.nbytes for x in cache)
    assert s.ratio == s.cache_bytes / len(data)
    assert s.tokens == 200
    assert s.roles[Role.SINKS].tokens == 4
    assert s.roles[Role.DATA].tokens == s.coded_tokens == 160
    assert s.roles[Role.TAIL].tokens == 36
    assert s.coded_ratio > s.ratio


def test_a_poor_ratio_warns(codec: kvtc.Codec, cache: Cache) -> None:
    k, v = (x[:, :, :20] for x in cache)
    with pytest.warns(kvtc.KVTCWarning, match=r"only 0\.9\d times smaller.*20 of 20 tokens") as w:
        kvtc.encode(k, v, codec=codec)
    assert len(w) == 1


def test_a_ratio_that_cannot_be_met_warns(codec: kvtc.Codec, cache: Cache) -> None:
    """By that, not as a cache unlike the calibration; one below 2 that was asked for does not."""
    with pytest.warns(kvtc.KVTCWarning, match=r"times smaller, and ratio=1000 was asked") as w:
        kvtc.encode(*cache, kvtc.Codec(codec.calibration, ratio=1000))
    assert len(w) == 1
    encoder = kvtc.Encoder(kvtc.Codec(codec.calibration, ratio=1.5, window=0, sinks=0))
    encoder.encode(*cache)
    encoder.finish()
    assert 1 < encoder.statistics.ratio < 2


def test_a_cache_unlike_the_calibration_warns(codec: kvtc.Codec, cache: Cache) -> None:
    codec = kvtc.Codec(codec.calibration, "paper", ratio=4, window=24, block_tokens=16)
    expected = codec.plan.sections[0]
    encoder = kvtc.Encoder(codec)
    encoder.encode(*cache)
    encoder.finish()
    s = encoder.statistics
    assert 0.7 < s.k_error_mean / expected.expected_k_error < 1.3
    assert 0.7 < s.v_error_mean / expected.expected_v_error < 1.3
    assert s.surprises(codec.plan) == []
    k, v = cache
    with pytest.warns(
        kvtc.KVTCWarning, match=r"mean error of V is \d\.\d+ where .* expects 0\.\d+"
    ):
        kvtc.encode(k, v[:, ::-1], codec=codec)


@pytest.mark.parametrize("small", ["K", "V"])
def test_keys_or_values_that_are_nothing_beside_the_others_warn(
    calibration: kvtc.Calibration, cache: Cache, small: str
) -> None:
    """Without weights of what matters to the model, all bits go to the others, as expected."""
    scales = (1e-4, 1) if small == "K" else (1, 1e-4)
    calibrator = kvtc.Calibrator(calibration.geometry)
    drawn = kvtc.testing.drawn_cache(calibration.geometry, 600, seed=4)
    calibrator.update(*(x * np.float32(s) for x, s in zip(drawn, scales, strict=True)))
    codec = kvtc.Codec(calibrator.finish(), ratio=8)
    with pytest.warns(kvtc.KVTCWarning, match=rf"{small} loses \d\.\d+ of its norm, . 0\.0"):
        kvtc.encode(*(x * np.float32(s) for x, s in zip(cache, scales, strict=True)), codec)


def test_a_window_that_never_fills_costs_no_memory(
    calibration: kvtc.Calibration, cache: Cache
) -> None:
    codec = kvtc.Codec(calibration, "paper", window=2**32 - 1, block_tokens=16)
    encoder = kvtc.Encoder(codec)
    k, v = cache
    data = b"".join(
        encoder.encode(k[:, :, i : i + 7], v[:, :, i : i + 7]) for i in range(0, 200, 7)
    )
    with pytest.warns(kvtc.KVTCWarning, match="200 of 200 tokens are verbatim"):
        data += encoder.finish()
    for before, after in zip(cache, kvtc.decode(data, calibration), strict=True):
        np.testing.assert_array_equal(after, before)


def test_damage_is_an_error_of_the_call_that_meets_it(
    calibration: kvtc.Calibration, stream: bytes
) -> None:
    damaged = bytearray(stream)
    damaged[-200] ^= 1
    with pytest.raises(kvtc.FormatError):
        kvtc.Decoder(calibration).decode(damaged)


def test_warnings_name_the_line_of_the_caller() -> None:
    """Not one inside the package, which is the same for all callers."""
    calibration = kvtc.testing.tiny_calibration()
    k, v = kvtc.testing.drawn_cache(calibration.geometry, tokens=8)
    with pytest.warns(kvtc.KVTCWarning, match="the stream is only") as told:
        kvtc.encode(k, v, kvtc.Codec(calibration, ratio=8))
    assert {w.filename for w in told} == {__file__}
    calibrator = kvtc.Calibrator(calibration.geometry)
    calibrator.update(k, v)
    with pytest.warns(kvtc.KVTCWarning, match="calibrated on 4 tokens") as told:
        calibrator.finish()
    assert {w.filename for w in told} == {__file__}
