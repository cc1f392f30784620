"""Caches that are stored, restored and stored again: coding is a projection."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import FEWER

import kvtc_stream as kvtc
from kvtc_stream.coding import lattice
from kvtc_stream.io.dlpack import numpy_dtype

Cache = tuple[NDArray[Any], NDArray[Any]]

pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")

#: The most that the error of later generations may be, relative to the first one's.
MOST = 1.02


@lru_cache
def calibration(layers: int, heads: int, dim: int, importance: bool) -> kvtc.Calibration:
    geometry = kvtc.Geometry.uniform(
        layers=layers, kv_heads=heads, head_dim=dim, rope=kvtc.Rope.from_theta(1e4, dim)
    )
    calibrator = kvtc.Calibrator(geometry)
    k, v = kvtc.testing.drawn_cache(geometry, 1500, seed=9)
    calibrator.update(k, v)
    if importance:
        # Tokens with a large first channel matter most.
        scale = np.exp(k[:1, :1, :, :1] - k[:1, :1, :, :1].mean())
        rng = np.random.default_rng(3)
        grad_k, grad_v = ((scale * rng.standard_normal(x.shape)).astype(np.float32) for x in (k, v))
        calibrator.update_gradients(k, v, grad_k, grad_v)
    return calibrator.finish()


def drawn(calibration: kvtc.Calibration, dtype: str, tokens: int, seed: int) -> Cache:
    kind = kvtc.DType[dtype.upper()]
    k, v = kvtc.testing.drawn_cache(calibration.geometry, tokens, seed=seed)
    return k.astype(numpy_dtype(kind)), v.astype(numpy_dtype(kind))


def again(cache: Cache, codec: kvtc.Codec) -> Cache:
    k, v = kvtc.decode(kvtc.encode(*cache, codec), codec.calibration)
    return k, v


def lost(cache: Cache, restored: Cache) -> list[NDArray[np.float64]]:
    """Squared distances of K and of V by token."""
    return [
        np.square(a.astype(np.float64) - b.astype(np.float64)).sum(axis=(0, 1, 3))
        for a, b in zip(cache, restored, strict=True)
    ]


def once(first: NDArray[np.float64], original: Cache, restored: Cache) -> NDArray[np.float64]:
    """What is lost now; into ``first`` what it was when tokens were first coded: 0 until then."""
    count = restored[0].shape[2]
    now = np.array(lost((original[0][:, :, :count], original[1][:, :, :count]), restored))
    own = first[:, :count]
    own[own == 0] = now[own == 0]
    return now


def check(first: Any, last: Any, most: float = MOST) -> None:
    for before, after in zip(first, last, strict=True):
        assert np.sqrt(after.sum()) <= most * np.sqrt(before.sum())


codings = st.fixed_dictionaries(
    {
        "preset": st.sampled_from(["default", "paper"]),
        "ratio": st.sampled_from([4, 8, 16, 64, 128]),
        "window": st.sampled_from([0, 24]),
    }
)
#: What calibrations are made of.
models = st.tuples(st.integers(1, 3), st.integers(1, 2), st.sampled_from([8, 16]), st.booleans())
dtypes = st.sampled_from(["bfloat16", "float16", "float32"])
sizes = st.sampled_from([16, 50, 128])


@FEWER
@given(models, dtypes, codings, st.lists(sizes, min_size=10, max_size=10))
def test_nothing_more_is_lost(
    model: tuple[int, int, int, bool], dtype: str, coding: dict[str, Any], blocks: list[int]
) -> None:
    """In ten generations, whatever the blocks."""
    c = calibration(*model)

    original = drawn(c, dtype, 150, 1)
    cache, first = original, np.zeros((2, 150))
    for size in blocks:
        cache = again(cache, kvtc.Codec(c, **coding, block_tokens=size))
        now = once(first, original, cache)
    check(first, now)


@FEWER
@given(
    models,
    dtypes,
    codings,
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30), sizes), min_size=3, max_size=6),
)
def test_conversations_grow(
    model: tuple[int, int, int, bool],
    dtype: str,
    coding: dict[str, Any],
    turns: list[tuple[int, int, int]],
) -> None:
    """Each token is as it was when it was first coded; turns may be taken back."""
    c = calibration(*model)

    original = drawn(c, dtype, sum(new for new, _, _ in turns), 2)
    k, v = (x[:, :, :0] for x in original)
    first = np.zeros((2, original[0].shape[2]))
    for new, back, size in turns:
        done = max(k.shape[2] - back, 0)
        k, v = (
            np.concatenate([x[:, :, :done], o[:, :, done : done + new]], axis=2)
            for x, o in zip((k, v), original, strict=True)
        )
        first[:, done:] = 0
        k, v = again((k, v), kvtc.Codec(c, **coding, block_tokens=size))
        now = once(first, original, (k, v))
    check(first[:, : k.shape[2]], now)


@FEWER
@given(models, dtypes, codings, st.sampled_from([None, 300, 600]), st.lists(sizes, min_size=4))
def test_pages(
    model: tuple[int, int, int, bool],
    dtype: str,
    coding: dict[str, Any],
    most: int | None,
    tokens: list[int],
) -> None:
    """A page that fitted fits again, and has the same in it."""
    c = calibration(*model)

    original = drawn(c, dtype, 16, 3)
    # With more bytes than a quarter, errors are close to those of the cast.
    assume(most is None or 4 * most <= sum(x.nbytes for x in original))
    codec = kvtc.Codec(c, **{**coding, "window": 0}, block_tokens=16)
    pages = kvtc.PageCodec(codec, dtype=dtype, max_bytes=most)
    cache, losses = original, []
    for _ in tokens[:5]:
        try:
            page = pages.encode(*cache, positions=32)
        except kvtc.UnsupportedError:
            assert not losses
            assert most is not None
            return
        k, v = pages.decode(page)[:2]
        cache = k, v
        losses.append(lost(original, cache))
    # Of tokens that lose as much in so few bytes, steps are not seen for sure.
    energy = lost(original, (original[0] * 0, original[1] * 0))
    assume(all(a.sum() <= 0.25 * b.sum() for a, b in zip(losses[0], energy, strict=True)))
    check(losses[0], losses[-1])


@pytest.mark.parametrize(
    ("model", "dtype", "ratio", "most", "tokens", "seed"),
    [
        # By the estimates, other tables than those that it fitted with took the least.
        ((2, 1, 8, True), "float32", 4, 450, 16, 425),
        ((3, 1, 8, True), "float16", 128, 600, 32, 913),
        # Steps much finer than those of the codec's ratio.
        ((1, 2, 8, True), "float32", 64, 450, 16, 539),
        ((3, 1, 8, True), "float32", 64, 600, 16, 278),
    ],
)
def test_pages_that_nearly_fill_their_size(
    model: tuple[int, int, int, bool], dtype: str, ratio: int, most: int, tokens: int, seed: int
) -> None:
    c = calibration(*model)
    codec = kvtc.Codec(c, ratio=ratio, window=0, block_tokens=tokens)
    pages = kvtc.PageCodec(codec, dtype=dtype, max_bytes=most)
    first = pages.encode(*drawn(c, dtype, tokens, seed), positions=32)
    second = pages.encode(*pages.decode(first), positions=32)
    for a, b in zip(pages.decode(first), pages.decode(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_symbols_are_the_same(importance: bool, dtype: str) -> None:
    """From the second generation on to the byte, and in the first to 1 %: families may differ."""
    c = calibration(2, 2, 16, importance)
    codec = kvtc.Codec(c, ratio=16, window=0)
    streams, cache = [], drawn(c, dtype, 400, 4)
    for _ in range(4):
        streams.append(kvtc.encode(*cache, codec))
        k, v = kvtc.decode(streams[-1], c)
        cache = k, v
    assert len(streams[1]) == pytest.approx(len(streams[0]), rel=0.01)
    assert len(set(streams[2:])) == 1


@pytest.mark.parametrize(
    "levels", [{}, {"layer_groups": 2, "second_level": 24}, {"basis_dtype": "float8_e4m3"}]
)
def test_one_component_is_much_stronger_than_all_others(levels: dict[str, Any]) -> None:
    """What rounding of the basis moves of it is many of the others' steps."""
    geometry = kvtc.Geometry.uniform(
        layers=2, kv_heads=2, head_dim=16, rope=kvtc.Rope.from_theta(1e4, 16)
    )
    rng = np.random.default_rng(4)
    direction = rng.standard_normal((2, 2, 1, 16)) ** 3

    def cache(tokens: int, seed: int) -> Cache:
        k, v = kvtc.testing.drawn_cache(geometry, tokens, seed=seed)
        return k, (v + 1000 * rng.standard_normal((tokens, 1)) * direction).astype(np.float32)

    calibrator = kvtc.Calibrator(geometry, **levels)
    calibrator.update(*cache(2000, 1))
    codec = kvtc.Codec(calibrator.finish(), ratio=4, window=0, measure=False)
    original = cache(128, 2)
    restored = again(original, codec)
    found = restored
    for _ in range(4):
        found = again(found, codec)
    check(lost(original, restored), lost(original, found))


@pytest.mark.parametrize("ratio", [2.1, 2.3, 2.5])
def test_steps_not_much_larger_than_what_the_cast_does(ratio: float) -> None:
    """All tokens keep their grid, so that none takes another."""
    geometry = kvtc.Geometry.uniform(
        layers=6, kv_heads=2, head_dim=32, rope=kvtc.Rope.from_theta(1e4, 32)
    )
    calibrator = kvtc.Calibrator(geometry)
    calibrator.update(*kvtc.testing.drawn_cache(geometry, 2000, seed=9))
    codec = kvtc.Codec(calibrator.finish(), ratio=ratio, window=0, measure=False)
    original = drawn(codec.calibration, "bfloat16", 200, 5)
    cache = restored = again(original, codec)
    for _ in range(9):
        cache = again(cache, codec)
    check(lost(original, restored), lost(original, cache))


def test_parts_of_streams_joined() -> None:
    c = calibration(2, 2, 16, True)
    codec = kvtc.Codec(c, ratio=16, window=0, block_tokens=32)
    original = drawn(c, "bfloat16", 192, 5)
    first = kvtc.encode(*original, codec)
    k, v = kvtc.decode(first, c)
    joined, at = io.BytesIO(), np.arange(192)
    kvtc.concat(
        [
            kvtc.encode(k[:, :, own], v[:, :, own], codec, positions=at[own])
            for own in (slice(0, 50), slice(50, 192))
        ],
        joined,
    )
    check(lost(original, (k, v)), lost(original, kvtc.decode(joined.getvalue(), c)))


def test_fewer_bytes_are_to_be_had() -> None:
    """A restored cache that is stored with another target meets it, or is smaller still."""
    c = calibration(2, 2, 16, True)
    original = drawn(c, "bfloat16", 600, 6)
    size = {r: len(kvtc.encode(*original, kvtc.Codec(c, ratio=r, window=0))) for r in (8, 16, 32)}
    restored = again(original, kvtc.Codec(c, ratio=16, window=0))
    coarser = kvtc.encode(*restored, kvtc.Codec(c, ratio=32, window=0))
    assert len(coarser) == pytest.approx(size[32], rel=0.03)
    finer = kvtc.encode(*restored, kvtc.Codec(c, ratio=8, window=0))
    assert len(finer) < 1.02 * size[16]
    check(lost(original, restored), lost(original, kvtc.decode(finer, c)))


def test_fresh_tokens_beside_restored_ones() -> None:
    """They get what they would get alone, though the others are small, and have no errors."""
    c = calibration(2, 2, 16, True)
    cache = drawn(c, "bfloat16", 512, 7)
    for target in ({"ratio": 8.0}, {"mean_error": 0.2}):
        codec = kvtc.Codec(c, **target, window=0, block_tokens=64)  # type: ignore[arg-type]
        old = again(tuple(x[:, :, :256] for x in cache), kvtc.Codec(c, ratio=32, window=0))  # type: ignore[arg-type]
        both = tuple(
            np.concatenate([o, x[:, :, 256:]], axis=2) for o, x in zip(old, cache, strict=True)
        )
        mixed = again(both, codec)  # type: ignore[arg-type]
        alone = again(tuple(x[:, :, 256:] for x in cache), codec)  # type: ignore[arg-type]
        own = tuple(x[:, :, 256:] for x in cache)
        found, expected = (
            np.sqrt([x.sum() for x in lost(own, of)])  # type: ignore[arg-type]
            for of in (tuple(x[:, :, 256:] for x in mixed), alone)
        )
        np.testing.assert_allclose(found, expected, rtol=0.1)


# Recognition.


def lattice_tokens(rng: np.random.Generator, exponents: NDArray[np.int64]) -> NDArray[np.float32]:
    symbols = np.rint(rng.standard_normal((len(exponents), 200)) * 20 / np.arange(1, 201))
    symbols[:, :2] = 13, -7  # on no coarser grid
    return (symbols * 2.0 ** (exponents[:, None] / 4)).astype(np.float32)


def test_grids_are_recognised() -> None:
    rng = np.random.default_rng(1)
    exponents = rng.integers(-20, 40, 100)
    x = lattice_tokens(rng, exponents)
    one = np.ones(200, np.float32)
    for noise in (0, 1e-3, 3e-2):
        moved = x + noise * 2.0 ** (exponents[:, None] / 4) * rng.standard_normal(x.shape)
        found = lattice.recognise(moved.astype(np.float32), one, exponents.astype(np.float32))
        np.testing.assert_array_equal(found.grids, exponents)


def test_a_somewhat_finer_grid_is_seen_by_few_coefficients() -> None:
    """Of many fresh tokens few seem to have one: the finer it is, the fewer."""
    one = np.ones(40, np.float32)
    x = np.zeros((2, 40), np.float32)
    x[0, :2], x[1, 3] = (1.001, -2.001), 1.0005
    for finer in (0.2, 2.9):
        found = lattice.recognise(x, one, np.full(2, finer, np.float32))
        assert found.grids.tolist() == [0, 0]
    assert not lattice.recognise(x[1:], one, np.full(1, 12, np.float32)).known.any()
    fresh = np.random.default_rng(3).standard_normal((20_000, 40)) * 3 / np.arange(1, 41)
    seen = lattice.recognise(fresh.astype(np.float32), one, np.full(20_000, 3, np.float32))
    assert seen.known.mean() < 0.001


def test_tokens_keep_grids_that_no_coarser_ones_would_serve() -> None:
    """Few restored ones, of which a target allows less than a block takes without symbols."""
    c = calibration(2, 1, 16, True)
    original, size = drawn(c, "bfloat16", 84, 2), 16
    k, v = (x[:, :, :0] for x in original)
    first = np.zeros((2, 84))
    for new, back in ((37, 20), (17, 17), (47, 10)):
        done = max(k.shape[2] - back, 0)
        k, v = (
            np.concatenate([x[:, :, :done], o[:, :, done : done + new]], axis=2)
            for x, o in zip((k, v), original, strict=True)
        )
        first[:, done:] = 0
        codec = kvtc.Codec(c, ratio=64, window=0, block_tokens=128 if new == 17 else size)
        k, v = again((k, v), codec)
        now = once(first, original, (k, v))
    check(first[:, : k.shape[2]], now)


def test_steps_too_fine_to_be_seen() -> None:
    """Those of a block that was restored are what its other tokens' say; beside fresh ones not."""
    rng = np.random.default_rng(5)
    wishes = rng.uniform(0, 14, 128).astype(np.float32)
    grids = lattice.TokenGrids(wishes, np.full(128, lattice.NO_GRID, np.int16)).exponents(-3.2)
    seen = np.where(wishes > 6, grids, lattice.NO_GRID).astype(np.int16)
    found = lattice.TokenGrids(wishes, seen).completed()
    assert (np.abs(found.grids - grids) <= 1).all()
    np.testing.assert_array_equal(found.grids[wishes > 6], grids[wishes > 6])
    assert (found.grids == grids).mean() > 0.8
    some = np.where(np.arange(128) % 4, seen, lattice.NO_GRID).astype(np.int16)
    few = np.where(wishes > 13.5, grids, lattice.NO_GRID).astype(np.int16)
    for mixed in (some, few):
        left = lattice.TokenGrids(wishes, mixed).completed()
        np.testing.assert_array_equal(left.grids, mixed)


def test_no_grid_is_seen_where_none_is() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2000, 300)) * 30 / np.arange(1, 301)
    one, wishes = np.ones(300, np.float32), np.zeros(2000, np.float32)
    assert lattice.recognise(x.astype(np.float32), one, wishes).known.mean() < 0.002
    hostile = np.zeros((4, 300), np.float32)
    hostile[1:, 0] = np.nan, np.inf, 1e-40
    # Nothing was coded of one that is 0.
    grids = lattice.recognise(hostile, one, wishes[:4]).grids
    assert grids.tolist() == [0, lattice.NO_GRID, lattice.NO_GRID, 0]


@given(
    st.lists(st.integers(-90, 160), min_size=1, max_size=20),
    st.floats(-70, 100),
)
def test_classes_make_up_exponents(exponents: list[int], offset: float) -> None:
    """Or those of grids finer by whole octaves."""
    e = np.array(exponents, np.int16)
    level, [classes] = lattice.settle([e], offset)
    assert (classes < 16).all()
    assert -128 <= level <= 127
    found = level + classes.astype(np.int64)
    assert ((e - found) % 4 == 0).all()
    assert (found <= e).all()
    if e.max() - e.min() < 16 and e.max() <= 127 + 15:
        np.testing.assert_array_equal(found, e)


@given(st.integers(0, 10**12), st.integers(1, 400))
def test_an_offset_between_two_exponents_is_shared_out(first: int, tokens: int) -> None:
    spread = lattice.spread(first + np.arange(tokens))
    assert spread.dtype == np.float32
    assert (abs(spread) <= 0.5).all()
    for offset in (0.25, 0.5, 0.75):
        upper = np.floor(spread + np.float32(offset + 0.5)).sum()
        assert abs(upper - offset * tokens) <= 5
