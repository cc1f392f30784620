"""What uniform bands need before rANS, against the CPU: grids and steps of tokens, and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from launch import simulate

from kvtc_stream.calibration import importance
from kvtc_stream.coding import lattice
from kvtc_stream.coding.rans import MIDDLE
from kvtc_stream.coding.uniform import steps
from kvtc_stream.gpu.kernels import uniform

Array = npt.NDArray[Any]

STRIDE = 64


def drawn_predictor(rng: np.random.Generator, read: int) -> importance.TokenImportance:
    features = 2 * min(read, 300) + len(importance.group_edges(read)) - 1
    weights = rng.standard_normal(features + 1) / np.sqrt(features)
    arrays = (
        rng.random(read) + 0.5,
        weights,
        0.1 * rng.standard_normal(features),
        rng.random(features) + 0.5,
    )
    return importance.TokenImportance(*(x.astype(np.float32) for x in arrays))


@pytest.mark.parametrize(
    ("coded", "reads", "tokens"),
    [((400, 0, 10, 3), (400, 8, 70, None), 45), ((0,), (8,), 3), ((330, 100), (300, 257), 33)],
)
def test_wishes(coded: tuple[int, ...], reads: tuple[int | None, ...], tokens: int) -> None:
    """Parts without components, without a predictor, and with fewer components than it reads."""
    rng = np.random.default_rng(1)
    predictors = [None if n is None else drawn_predictor(rng, n) for n in reads]
    total, parts = sum(coded), len(coded)
    firsts = np.cumsum([0, *coded])[:-1]
    coefficients = rng.standard_normal((max(total, 1), STRIDE)).astype(np.float32)
    if total:
        coefficients[0, 1], coefficients[-1, 2] = np.nan, -np.inf
    fields, groups = np.zeros((parts, 6), np.int32), np.zeros((parts, 8), np.int32)
    scale = np.zeros(max(total, 1), np.float32)
    weights: list[Array] = []
    for i, (first, count, p) in enumerate(zip(firsts, coded, predictors, strict=True)):
        fields[i] = first, count, -1, 0, 0, 0
        if p is None:
            continue
        edges, read = importance.group_edges(len(p.scale)), min(count, len(p.scale))
        leading = (len(p.centre) - len(edges) + 1) // 2
        fields[i, 2:] = read, leading, len(edges) - 1, sum(map(len, weights))
        groups[i, : len(edges)] = edges
        scale[first : first + read] = p.scale[:read]
        weights += [p.weights[-1:], p.weights[:-1], p.centre, p.spread]
    positions = (1 << 40) + 7 * np.arange(tokens)
    wishes, peaks = np.full((2, parts, STRIDE), -1, np.float32)
    simulate(
        uniform.classify,
        (-(-tokens // 32), parts),
        uniform.CLASSIFY_THREADS,
        (
            coefficients,
            STRIDE,
            tokens,
            fields,
            scale,
            np.concatenate([*weights, np.zeros(1, np.float32)]),
            groups,
            float(-4 * importance.ALPHA / np.log(2)),
            positions,
            wishes,
            peaks,
        ),
    )
    for i, (first, count, p) in enumerate(zip(firsts, coded, predictors, strict=True)):
        own = coefficients[first : first + count, :tokens]
        sound = np.isfinite(own).all(axis=0)
        expected = lattice.spread(positions) + MIDDLE if p is None else p.wishes(own.T.copy())
        np.testing.assert_allclose(wishes[i, :tokens][sound], expected[sound], atol=1e-4)
        assert ((wishes[i, :tokens] >= 0) & (wishes[i, :tokens] <= 15)).all()
        largest = np.where(sound, np.abs(own).max(axis=0, initial=0), np.inf)
        np.testing.assert_array_equal(peaks[i, :tokens], largest)
        assert (wishes[i, tokens:] == -1).all()
        assert (peaks[i, tokens:] == -1).all()


def test_grids() -> None:
    """Of tokens on grids but for what a cast did, on none, without a value that counts, and with
    values that are no numbers; in two parts, one of them empty."""
    rng = np.random.default_rng(4)
    tokens, count, unit = 40, 70, 0.3
    exponents = rng.integers(0, 16, tokens)
    x = np.rint(
        rng.standard_normal((count, tokens)) * 9 / np.sqrt(np.arange(1, count + 1))[:, None]
    )
    x = (x + 0.02 * rng.standard_normal(x.shape)) * 2.0 ** (exponents / 4)
    x[:, 30:] = rng.standard_normal((count, 10)) * 9
    x[:, 33], x[:, 34], x[3, 35], x[4, 36] = 0, 1e-3, np.nan, np.inf
    coefficients = np.zeros((count, STRIDE), np.float32)
    coefficients[:, :tokens] = x * unit
    wishes = rng.uniform(5, 11, (2, STRIDE)).astype(np.float32)
    peaks = np.zeros((2, STRIDE), np.float32)
    magnitudes = np.abs(coefficients[:, :tokens])
    peaks[0, :tokens] = np.where(np.isfinite(magnitudes), magnitudes, np.inf).max(axis=0)
    grids = np.full((2, STRIDE), 77, np.int32)
    simulate(
        uniform.recognise,
        (2, 2, 1),
        uniform.CLASSIFY_THREADS,
        (
            coefficients,
            STRIDE,
            np.array([0, tokens], np.int32),
            np.array([[0, count, -1, 0, 0, 0], [count, 0, -1, 0, 0, 0]], np.int32),
            unit,
            wishes,
            peaks,
            grids,
        ),
    )
    scale = np.full(count, 1 / unit, np.float32)
    for part, size in enumerate((count, 0)):
        expected = lattice.recognise(
            coefficients[:size, :tokens].T.copy(), scale[:size], wishes[part, :tokens]
        ).grids
        np.testing.assert_array_equal(grids[part, :tokens], expected)
        assert (grids[part, tokens:] == 77).all()
    assert (grids[0, :30] == exponents[:30]).mean() > 0.9
    assert set(grids[0, [30, 31, 32, 35, 36, 37]]) == {lattice.NO_GRID}


def test_grids_do_not_depend_on_other_blocks() -> None:
    """One token has a grid that is seen at a glance, one a grid that a second look finds: in a
    block of its own nobody looks again, whatever is beside it."""
    rng = np.random.default_rng(6)
    count = 4 * uniform.GLANCE
    coefficients = np.zeros((count, STRIDE), np.float32)
    coefficients[:, :2] = 2 * np.rint(4 * rng.standard_normal((count, 2)))
    coefficients[::4, 1] = 8 * rng.standard_normal(uniform.GLANCE)  # those at which a glance ends
    wishes = np.full((1, STRIDE), 6, np.float32)
    peaks = np.abs(coefficients).max(axis=0, keepdims=True)
    parts = np.array([[0, count, -1, 0, 0, 0]], np.int32)
    found = []
    for starts in ([0, 1, 2], [0, 2]):
        grids = np.full((1, STRIDE), 77, np.int32)
        simulate(
            uniform.recognise,
            (1, 1, len(starts) - 1),
            uniform.CLASSIFY_THREADS,
            (
                coefficients, STRIDE, np.array(starts, np.int32), parts, 1.0, wishes, peaks, grids,
            ),
        )  # fmt: skip
        assert (grids[0, 2:] == 77).all()
        found.append(grids[0, :2].tolist())
    scale = np.ones(count, np.float32)
    both = lattice.recognise(coefficients[:, :2].T.copy(), scale, wishes[0, :2]).grids.tolist()
    assert found == [[both[0], lattice.NO_GRID], both]
    assert lattice.NO_GRID not in both


def test_levels_classes_and_steps() -> None:
    """Of blocks at some offsets, where exponents are more than classes have room for too."""
    rng = np.random.default_rng(5)
    starts, parts, unit = np.array([0, 3, 20, 21], np.int32), 2, 0.37
    offsets = np.array([[0.3, -7.25], [2.5, 30.0], [-0.5, 99.9]])
    blocks, number = offsets.shape
    wishes = rng.uniform(0, 15, (parts, STRIDE)).astype(np.float32)
    grids = np.full((parts, STRIDE), lattice.NO_GRID, np.int32)
    grids[:, 5:14] = rng.integers(-20, 40, (parts, 9))
    grids[:, 20] = 150
    classes = np.full((number, parts, STRIDE), 99, np.uint8)
    block_steps, factors = np.zeros((2, blocks, number, 16), np.float32)
    levels, indices = np.zeros((2, blocks, number), np.int32)
    heads = np.zeros((blocks, number), np.float32)
    simulate(
        uniform.settle,
        (blocks, number),
        uniform.THREADS,
        (
            starts, parts, STRIDE, wishes, grids, offsets.ravel(), unit, -4, 60,
            classes, block_steps, factors, levels, indices, heads,
        ),
    )  # fmt: skip
    found = [lattice.TokenGrids(*x) for x in zip(wishes, grids.astype(np.int16), strict=True)]
    for b in range(blocks):
        own = slice(starts[b], starts[b + 1])
        for i, offset in enumerate(offsets[b]):
            exponents = [x.exponents(offset)[own] for x in found]
            level, expected = lattice.settle(exponents, offset)
            assert levels[b, i] == level
            assert indices[b, i] == min(max(level, -4), 60) + 4
            np.testing.assert_array_equal(classes[i, :, own], expected)
            assert heads[b, i] == np.float32(unit * 2 ** (level / 4))
            np.testing.assert_array_equal(block_steps[b, i], steps(float(heads[b, i]))[:16])
            np.testing.assert_allclose(factors[b, i], 1 / block_steps[b, i], rtol=1e-6)


@pytest.mark.parametrize("coded", [(uniform.MANY, uniform.MANY - 24), (3, 0, 300), (1030,)])
def test_sizes(coded: tuple[int, ...]) -> None:
    """Parts whose components are all measured, beside those of which some are."""
    rng = np.random.default_rng(2)
    tokens, parts = 5, len(coded)
    firsts = np.cumsum([0, *coded])[:-1]
    coefficients = (3 * rng.standard_normal((sum(coded), STRIDE))).astype(np.float32)
    fields = np.array([(f, n, -1, 0, 0, 0) for f, n in zip(firsts, coded, strict=True)], np.int32)
    bits = rng.random((2 * parts, 256), np.float32)
    ids = rng.integers(0, 2, (sum(coded), 16), np.uint8)
    classes = rng.integers(7, 9, (uniform.SIZES, parts, STRIDE), np.uint8)
    peaks = np.ones((parts, STRIDE), np.float32)
    peaks[:, 2] = np.inf  # a token that will be verbatim
    factors = rng.random((uniform.SIZES, 16), np.float32) + 0.5
    chunks = uniform.chunks(coded)
    found = np.full((1, parts, chunks, uniform.SIZES), np.nan, np.float32)
    simulate(
        uniform.sizes,
        (1, parts, chunks),
        uniform.THREADS,
        (
            coefficients,
            STRIDE,
            fields,
            np.append(ids.ravel(), np.zeros(64, np.uint8)),
            sum(coded),
            classes,
            peaks,
            factors,
            np.zeros(uniform.SIZES, np.int32),
            bits,
            2 * np.arange(parts + 1, dtype=np.int32),
            found,
            np.array([0, tokens], np.int32),
        ),
        shared=1024 * 2,
    )
    for part, (first, count) in enumerate(zip(firsts, coded, strict=True)):
        every = uniform.SAMPLED if count >= uniform.MANY else 1
        chosen = np.minimum(np.arange(0, count, every) + every // 2, count - 1) + first
        for i, own in enumerate(factors):
            total = 0.0
            for token in np.delete(np.arange(tokens), 2):
                klass = classes[i, part, token]
                symbols = np.rint(coefficients[chosen, token] * own[klass]).astype(int)
                places = np.where(abs(symbols) <= 127, symbols + 127, 255)
                total += float(bits[2 * part + ids[chosen, klass], places].sum(dtype=np.float64))
            expected = total * count / max(len(chosen), 1)
            assert found[0, part, :, i].sum() == pytest.approx(expected, rel=1e-5)


def test_tokens_are_judged() -> None:
    """As the CPU does: which the plan's steps can code, and which lie on a grid in every part."""
    rng = np.random.default_rng(4)
    parts, tokens, unit = 2, 300, 0.01
    wishes = rng.uniform(-3, 20, (parts, STRIDE * 5)).astype(np.float32)
    peaks = (2.0 ** rng.uniform(10, 25, wishes.shape)).astype(np.float32)
    peaks[0, 3] = np.inf
    grids = rng.integers(-5, 30, wishes.shape).astype(np.int32)
    grids[rng.random(wishes.shape) < 0.5] = lattice.NO_GRID
    flags = np.full(tokens, 9, np.uint8)
    arguments = tokens, parts, wishes.shape[1], unit, wishes, peaks, grids, flags
    simulate(uniform.judge, -(-tokens // uniform.THREADS), uniform.THREADS, arguments)
    found = [
        lattice.TokenGrids(w[:tokens], g[:tokens].astype(np.int16))
        for w, g in zip(wishes, grids, strict=True)
    ]
    steps = unit * np.exp2(np.stack([own.exponents(0.0) for own in found]) / 4)
    fits = (peaks[:, :tokens] < uniform.CODED * steps).all(axis=0)
    known = fits & found[0].known & found[1].known
    assert 0 < known.sum() < fits.sum() < tokens
    np.testing.assert_array_equal(flags, fits + 2 * known)
