"""Batches of blocks through the kernels, with NumPy for CuPy: against the CPU backend."""

from __future__ import annotations

import gc
import io
from dataclasses import replace
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import kvtc_stream as kvtc
from kvtc_stream.calibration.parts import Part
from kvtc_stream.coding.payload import UniformPayload
from kvtc_stream.formats import Geometry, Limits, Rope, StreamFile, StreamParser
from kvtc_stream.gpu.coder.plan import DevicePlan
from kvtc_stream.gpu.coder.products import refine
from kvtc_stream.io.dlpack import BackendName
from kvtc_stream.stream.rows import Rows

Array = npt.NDArray[Any]

# Few tokens gain little, and one is unlike the calibration: the encoder says so.
pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")

GEOMETRY = Geometry.uniform(layers=2, kv_heads=1, head_dim=16, rope=Rope.from_theta(1e4, 16))
FLOAT16 = kvtc.DType.FLOAT16
TOKENS, BLOCK, RATIO = 35, 24, 4.0
#: A token that no quantiser takes.
HOSTILE = 30


in_two_levels_too = pytest.mark.parametrize(
    "calibration",
    [
        {},
        {"layer_groups": 2, "second_level": 10},
        {"layer_groups": 2, "second_level": 10, "basis_dtype": "float8_e4m3"},
    ],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module")
def calibration(request: pytest.FixtureRequest) -> kvtc.Calibration:
    """With gradients, so that tokens have classes; with options of the calibrator."""
    calibrator = kvtc.Calibrator(GEOMETRY, **getattr(request, "param", {}))
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 1500, seed=1)
    calibrator.update(k, v)
    rng = np.random.default_rng(3)
    size = np.where(v[:1, :1, :, :1] > 0, 3.0, 0.3) * 1e-4
    of_both = [(rng.standard_normal(x.shape) * size).astype(np.float32) for x in (k, v)]
    calibrator.update_gradients(k, v, *of_both)
    return calibrator.finish()


@pytest.fixture(scope="module")
def cache() -> tuple[Array, Array]:
    k, v = kvtc.testing.drawn_cache(GEOMETRY, TOKENS, seed=5, dtype=FLOAT16)
    k[0, 0, HOSTILE, 0] = np.nan
    return k, v


@pytest.fixture(scope="module")
def stream(calibration: kvtc.Calibration, cache: tuple[Array, Array]) -> bytes:
    """What the CPU backend makes."""
    codec = kvtc.Codec(calibration, ratio=RATIO, sinks=0, window=0, block_tokens=BLOCK)
    return kvtc.encode(*cache, codec=codec)


@pytest.fixture(scope="module")
def cuda() -> BackendName:
    """The backend's name, where it can run: here NumPy takes the place of CuPy."""
    return "cuda"


@in_two_levels_too
def test_values_are_those_of_the_cpu(
    calibration: kvtc.Calibration, stream: bytes, cuda: BackendName
) -> None:
    expected = kvtc.decode(stream, calibration)
    found = kvtc.decode(stream, calibration, backend=cuda)
    for a, b in zip(found, expected, strict=True):
        ours, exact = (np.array(x, np.float32) for x in (a, b))
        np.testing.assert_array_equal(ours[:, :, HOSTILE], exact[:, :, HOSTILE])
        ours[:, :, HOSTILE] = exact[:, :, HOSTILE] = 0
        np.testing.assert_allclose(ours, exact, atol=2e-3 * np.abs(exact).max())


@pytest.mark.parametrize("least", [1, 1 << 30])
def test_streams_in_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
    calibration: kvtc.Calibration,
    stream: bytes,
    cuda: BackendName,
    least: int,
) -> None:
    """They are copied from where they are, and large ones before they are looked at; those of
    ordinary memory beside them are not."""
    monkeypatch.setattr("kvtc_stream.gpu.runtime.staging._LEAST_AHEAD", least)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(len(stream)), np.uint8)
    pinned[:] = np.frombuffer(stream, np.uint8)
    held = pinned.data.toreadonly()
    expected = kvtc.decode(stream, calibration, backend=cuda)
    many = kvtc.decode_many([held, stream], calibration, backend=cuda)
    for found in (kvtc.decode(held, calibration, backend=cuda), *many):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(*(np.array(x, np.float32) for x in (a, b)))


def test_streams_into_the_rows_of_a_batch(
    monkeypatch: pytest.MonkeyPatch,
    calibration: kvtc.Calibration,
    stream: bytes,
    cuda: BackendName,
) -> None:
    """They share launches; of a long stream the pieces take turns."""
    monkeypatch.setattr("kvtc_stream.stream.decoder.check_memory", lambda *_: None)
    monkeypatch.setattr(
        "kvtc_stream.gpu.backend.taker", lambda: lambda x, _: (x.view(np.uint16), FLOAT16)
    )
    expected = kvtc.decode(stream, calibration, backend=cuda)
    shape = 2, 2, 1, TOKENS, 16  # layers, rows
    batch = [cupy.empty(shape, np.float16) for _ in "kv"]
    out = [tuple([x[row] for x in tensors] for tensors in batch) for row in (1, 0)]
    kvtc.decode_many([stream, stream], calibration, out=out, backend=cuda)
    monkeypatch.setattr("kvtc_stream.stream.reader._BLOCKS_AT_A_TIME", 1)
    again = kvtc.decode(stream, calibration, backend=cuda)
    for found in (*out, again):
        for a, b in zip(found, expected, strict=True):
            ours = np.stack([np.array(x, np.float32) for x in a])
            np.testing.assert_array_equal(ours, np.array(b, np.float32))


@in_two_levels_too
def test_rows_that_arrive_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch,
    calibration: kvtc.Calibration,
    cache: tuple[Array, Array],
    stream: bytes,
    cuda: BackendName,
) -> None:
    """The latest tokens of streams of two kinds: after each step another layer is there; what is
    behind them in memory stays."""
    monkeypatch.setattr(
        "kvtc_stream.gpu.backend.taker", lambda: lambda x, _: (x.view(np.uint16), FLOAT16)
    )
    codec = kvtc.Codec(calibration, ratio=2, sinks=2, window=8, block_tokens=BLOCK)
    streams = [stream, stream, kvtc.encode(*cache, codec)]
    tokens = TOKENS - 3
    expected = [kvtc.decode(data, calibration, backend=cuda) for data in streams]

    def rows(*of: bytes) -> tuple[Rows, list[Array]]:
        readers = [kvtc.open(data, calibration=calibration, backend=cuda) for data in of]
        batch = [cupy.full((2, len(of), 1, tokens + 5, 16), 7, np.float16) for _ in "kv"]
        out = tuple([x[:1, 0, :, :tokens], x[1:, 0, :, :tokens]] for x in batch)
        return Rows(readers.__getitem__, len(of), 0, tokens, out, tokens + 5), batch

    def same(batch: list[Array], layers: slice) -> None:
        for row, pair in enumerate(expected):
            for a, b in zip(batch, pair, strict=True):
                ours, exact = np.array(a[layers, row]), np.array(b[layers, :, -tokens:])
                found = np.ascontiguousarray(ours[:, :, :tokens])
                np.testing.assert_array_equal(found.view(np.uint16), exact.view(np.uint16))
                assert (ours[:, :, tokens:] == 7).all()

    for most, together in ((1, 1), (1, 12), (256, 1 << 14)):
        monkeypatch.setattr("kvtc_stream.stream.reader._BLOCKS_AT_A_TIME", most)
        monkeypatch.setattr("kvtc_stream.gpu.backend.batch_tokens", lambda _, n=together: n)
        for module in ("backend", "coder.exact"):
            monkeypatch.setattr(f"kvtc_stream.gpu.{module}.MOST_JOINED", together)
        some, batch = rows(*streams)
        steps = some.arriving([[0], [1]])
        for _ in range(3):
            next(steps)
        for layer in range(2):
            next(steps)
            same(batch, slice(layer + 1))
        assert not list(steps)
        some, batch = rows(*streams)
        assert not [None for step in some.restoring() if step is not None]
        same(batch, slice(None))
    damaged = bytearray(stream)
    damaged[len(stream) // 2] ^= 1
    some, _ = rows(stream, bytes(damaged))
    steps = some.arriving([[0], [1]])
    for _ in range(2):
        next(steps)
    with pytest.raises(kvtc.ChecksumError) as raised:
        next(steps)
    assert raised.value.index == 1


def test_layers_one_by_one(calibration: kvtc.Calibration, stream: bytes, cuda: BackendName) -> None:
    expected = kvtc.decode(stream, calibration)
    for layer, pair in enumerate(kvtc.decode_layers(stream, calibration, backend=cuda)):
        for a, b in zip(pair, expected, strict=True):
            exact = np.array(b[layer], np.float32)
            scale = np.nanmax(np.abs(exact))
            np.testing.assert_allclose(np.array(a, np.float32), exact, atol=2e-3 * scale)


@in_two_levels_too
def test_streams_are_what_the_cpu_reads(
    calibration: kvtc.Calibration, cache: tuple[Array, Array], cuda: BackendName
) -> None:
    codec = kvtc.Codec(
        calibration, ratio=RATIO, sinks=0, window=0, block_tokens=BLOCK, backend=cuda
    )
    data = kvtc.encode(*cache, codec=codec)
    file = StreamFile(io.BytesIO(data))
    found = kvtc.decode(data, calibration, backend="cpu")
    coded = 0
    for entry in file.index:
        block = file.read_block(entry)
        coded += len(block.coded)
        span = slice(block.start, block.start + block.tokens)
        fits = np.delete(np.arange(block.tokens), block.verbatim_tokens)
        assert [block.start + i for i in block.verbatim_tokens] == (
            [HOSTILE] if span.start <= HOSTILE < span.stop else []
        )
        by_layer = block.layer_errors
        assert by_layer is not None
        for values, exact, mean, worst, of_layers in (
            (found[0], cache[0], block.errors.k_mean, block.errors.k_worst, by_layer.k_mean),
            (found[1], cache[1], block.errors.v_mean, block.errors.v_worst, by_layer.v_mean),
        ):
            expected = exact[:, :, span][:, :, fits].astype(np.float32)
            lost = np.array(values[:, :, span])[:, :, fits].astype(np.float32) - expected
            errors = np.sqrt((lost**2).sum((0, 1, 3)) / (expected**2).sum((0, 1, 3)))
            assert errors.mean() == pytest.approx(mean, rel=0.02)
            assert errors.max() == pytest.approx(worst, rel=0.02)
            assert mean < 0.3
            own = np.sqrt((lost**2).sum((1, 3)) / (expected**2).sum((1, 3))).mean(axis=1)
            np.testing.assert_allclose(of_layers, own, rtol=0.08)
    assert coded == pytest.approx(TOKENS * file.header.verbatim_size(0, 1) / RATIO, rel=0.25)


def test_streams_with_tiles_of_several_sizes(
    monkeypatch: pytest.MonkeyPatch,
    calibration: kvtc.Calibration,
    cache: tuple[Array, Array],
    stream: bytes,
    cuda: BackendName,
) -> None:
    """Both backends cut a part in tiles of about a size, and decode those of others together."""
    monkeypatch.setattr("kvtc_stream.coding.payload.TILE_COMPONENTS", 7)
    codec = kvtc.Codec(calibration, ratio=RATIO, sinks=0, window=0, block_tokens=BLOCK)
    streams = [
        stream,
        kvtc.encode(*cache, codec),
        kvtc.encode(*cache, replace(codec, backend=cuda)),
    ]
    counts, sizes = [], []
    for data in streams:
        file = StreamFile(io.BytesIO(data))
        [part] = codec.plan.sections[0].parts
        for entry in file.index:
            found = UniformPayload.parse(file.read_block(entry), [part.components])
            counts.append(len(found.lengths))
            sizes.append(found.tile_components)
    few, many = -(-part.components // 1024), -(-part.components // 7)
    blocks = len(sizes) // 3
    assert counts == [few] * blocks + [many] * 2 * blocks
    assert sizes == [1024] * blocks + [-(-part.components // many)] * 2 * blocks
    expected = [kvtc.decode(data, calibration) for data in streams]
    found_of = kvtc.decode_many(streams, calibration, backend=cuda)
    for found, exact in zip(found_of, expected, strict=True):
        for a, b in zip(found, exact, strict=True):
            ours, theirs = (np.nan_to_num(np.array(x, np.float32)) for x in (a, b))
            np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())


def test_a_base_is_taken_over(
    calibration: kvtc.Calibration, stream: bytes, cache: tuple[Array, Array], cuda: BackendName
) -> None:
    """Blocks for tokens that the device has decoded are those of the base; others are coded."""
    codec = kvtc.Codec(
        calibration, ratio=RATIO, sinks=0, window=0, block_tokens=BLOCK, backend=cuda
    )
    back = kvtc.decode(stream, calibration, backend=cuda)
    grown = [
        np.concatenate([np.array(x), y[:, :, :9]], axis=2) for x, y in zip(back, cache, strict=True)
    ]
    data = kvtc.encode(*grown, codec, base=stream)
    before, after = (
        [file.read_block(entry) for entry in file.index]
        for file in (StreamFile(io.BytesIO(x)) for x in (stream, data))
    )
    assert after[: len(before)] == before
    assert [block.tokens for block in after] == [24, 11, 9]


def test_restored_tokens_are_coded_as_they_were(
    calibration: kvtc.Calibration, stream: bytes, cache: tuple[Array, Array], cuda: BackendName
) -> None:
    """Whichever backend decodes and encodes, with fresh tokens behind them."""
    codec = kvtc.Codec(calibration, ratio=RATIO, sinks=0, window=0, block_tokens=BLOCK)
    expected = kvtc.decode(stream, calibration)
    back = kvtc.decode(stream, calibration, backend=cuda)
    grown = [
        np.concatenate([np.array(x), y[:, :, :9]], axis=2) for x, y in zip(back, cache, strict=True)
    ]
    second = kvtc.decode(kvtc.encode(*grown, codec=replace(codec, backend=cuda)), calibration)
    third = kvtc.decode(kvtc.encode(*second, codec=codec), calibration)
    for a, b, c, exact in zip(expected, second, third, cache, strict=True):
        found, again, first, exact = (
            np.nan_to_num(np.array(x, np.float32)) for x in (b, c, a, exact)
        )
        assert (found[:, :, :TOKENS] != first).mean() < 0.002  # where rounding is another
        assert (again != found).mean() < 0.002
        lost = np.linalg.norm(found[:, :, TOKENS:] - exact[:, :, :9])
        assert lost < 0.3 * np.linalg.norm(exact[:, :, :9])


@pytest.mark.parametrize("window", [0, 5])
def test_a_whole_cache_is_read_where_it_is(
    calibration: kvtc.Calibration, cache: tuple[Array, Array], cuda: BackendName, window: int
) -> None:
    """The bytes are those of an encoder to which it comes in chunks; of many caches too."""
    codec = kvtc.Codec(
        calibration, ratio=RATIO, sinks=3, window=window, block_tokens=8, backend=cuda
    )
    k, v = (x[:, :, :30].astype(ml_dtypes.bfloat16) for x in cache)
    encoder = kvtc.Encoder(codec)
    expected = encoder.encode(k[:, :, :13], v[:, :, :13]) + encoder.encode(
        k[:, :, 13:], v[:, :, 13:]
    )
    expected += encoder.finish()
    assert kvtc.encode_many([(k, v), (k, v)], codec) == [expected, expected]


@in_two_levels_too
def test_coefficients_are_refined(
    calibration: kvtc.Calibration,
    cache: tuple[Array, Array],
    cuda: BackendName,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that those of what the device's matrices expand are what these were expanded from."""
    strong = 5
    monkeypatch.setattr(Part, "strong", lambda *_: strong)
    codec = kvtc.Codec(calibration, ratio=RATIO, sinks=0, window=0, block_tokens=BLOCK)
    plan = DevicePlan(calibration, 0, codec.plan.sections[0])
    [(first, missing)] = plan.refinements
    analysis, synthesis = plan._on_device(0)
    rows = synthesis.scaled(cupy.asnumpy(plan.down)).first(strong).matrix()
    found = analysis.project(rows).T
    unit = np.eye(*found.shape)
    off = np.abs(found - unit).max()
    assert 1e-5 < off < 2e-2
    refined = cupy.asarray(np.ascontiguousarray(found))
    refine(refined, first, missing)
    assert np.abs(cupy.asnumpy(refined) - unit).max() < 0.05 * off
    # The same where it is used.
    expected = kvtc.decode(kvtc.encode(*cache, codec=codec), calibration)
    found = kvtc.decode(kvtc.encode(*cache, codec=replace(codec, backend=cuda)), calibration)
    for a, b, exact in zip(found, expected, cache, strict=True):
        ours, theirs, whole = (np.nan_to_num(np.array(x, np.float32)) for x in (a, b, exact))
        assert np.linalg.norm(ours - whole) < 1.05 * np.linalg.norm(theirs - whole)


def test_the_published_method(
    calibration: kvtc.Calibration, cache: tuple[Array, Array], cuda: BackendName
) -> None:
    """Both ways, with a token that no band takes."""
    options: Any = {"ratio": RATIO, "sinks": 2, "window": 3, "block_tokens": 8}
    codecs = [kvtc.Codec(calibration, "paper", backend=b, **options) for b in ("cpu", cuda)]
    data, there = (kvtc.encode(*cache, codec=codec) for codec in codecs)
    streams = [StreamFile(io.BytesIO(x)) for x in (data, there)]
    both = [[s.read_block(entry) for entry in s.index] for s in streams]
    for theirs, ours in zip(*both, strict=True):
        assert ours.coded_size == theirs.coded_size
        assert ours.verbatim_tokens == theirs.verbatim_tokens
        assert ours.verbatim == theirs.verbatim
        assert ours.errors.k_mean == pytest.approx(theirs.errors.k_mean, rel=0.01)
        assert ours.errors.v_worst == pytest.approx(theirs.errors.v_worst, rel=0.01)
    found = [kvtc.decode(x, calibration, backend=b) for x in (data, there) for b in ("cpu", cuda)]
    for expected, ours in (found[:2], found[2:]):
        for a, b in zip(ours, expected, strict=True):
            a, b = (np.nan_to_num(np.array(x, np.float32)) for x in (a, b))
            np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(b).max())


def test_damage_of_the_published_method_is_the_same_error(
    calibration: kvtc.Calibration, cache: tuple[Array, Array], cuda: BackendName
) -> None:
    from kvtc_stream.formats import Coder
    from kvtc_stream.stream.decoder import BlockDecoder

    codec = kvtc.Codec(calibration, "paper", ratio=RATIO, sinks=0, window=0, block_tokens=24)
    codec = replace(codec, coder="stored")
    header, *blocks = StreamParser(Limits()).feed(kvtc.encode(*cache, codec=codec))
    block = blocks[0]
    decoders = [BlockDecoder(header, calibration, name) for name in ("cpu", cuda)]
    bad = bytearray(block.coded)
    bad[len(bad) // 4] = 0xFF  # among the parameters' high bytes: not finite
    hostile = {
        "FormatError": replace(block, coded=bytes(bad)),
        "payload of": replace(
            block, coded=bytes(block.coded) + b"0", coded_size=block.coded_size + 1
        ),
        "corrupt": replace(block, coder=Coder.DEFLATE, coded=b"abc"),
    }
    for changed in hostile.values():
        messages = []
        for decoder in decoders:
            with pytest.raises(kvtc.FormatError) as caught:
                decoder.decode(changed)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_pinned_memory_stays_until_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever drops it may have work on the stream before the copy, and the pool gives it away."""
    import cupy

    from kvtc_stream.gpu.runtime.staging import _SMALL, Staging

    waited = []

    class Event:
        done = False

        def __init__(self, **_: Any) -> None:
            self.recorded = False

        def record(self) -> None:
            self.recorded = True

        def synchronize(self) -> None:
            waited.append(self.recorded)

    monkeypatch.setattr(cupy.cuda, "Event", Event)
    staging = Staging()
    for _ in range(3):
        staging.upload([bytes(_SMALL + 1)])
    assert waited == [True]  # before a buffer is used again
    del staging
    assert waited == [True] * 3


def test_what_is_dropped_with_a_cycle_waits_while_its_event_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The collector may destroy events first: CuPy's do so in ``__del__``."""
    import cupy

    from kvtc_stream.gpu.runtime.staging import Staging

    waited = []

    class Event:
        there = done = True

        def __init__(self, **_: Any) -> None:
            self.record = lambda: None

        def synchronize(self) -> None:
            waited.append(self.there)

        def __del__(self) -> None:
            self.there = False

    monkeypatch.setattr(cupy.cuda, "Event", Event)
    staging = Staging()
    staging.upload([bytes(100)])
    events = [buffer.event for buffer in staging._small]
    cycle: list[Any] = [*events, staging, staging.begin_fetch(cupy.zeros(8, np.uint8))]
    cycle.append(cycle)
    del cycle, events, staging
    gc.collect()
    assert waited == [True, True]
