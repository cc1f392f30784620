"""What uniform bands need before rANS: classes against the CPU's predictor, sizes against sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from launch import simulate

from kvtc_stream.calibration import importance
from kvtc_stream.coding.rans import MIDDLE
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
def test_classes(coded: tuple[int, ...], reads: tuple[int | None, ...], tokens: int) -> None:
    """Of parts without components, without a predictor, and with fewer than it reads."""
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
    classes = np.full((parts, STRIDE), 99, np.uint8)
    peaks = np.full((parts, STRIDE), -1, np.float32)
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
            classes,
            peaks,
        ),
    )
    for i, (first, count, p) in enumerate(zip(firsts, coded, predictors, strict=True)):
        own = coefficients[first : first + count, :tokens]
        sound = np.isfinite(own).all(axis=0)
        expected = (
            np.full(tokens, MIDDLE) if p is None else importance.classes_of(p.predict(own.T.copy()))
        )
        np.testing.assert_array_equal(classes[i, :tokens][sound], expected[sound])
        largest = np.where(sound, np.abs(own).max(axis=0, initial=0), np.inf)
        np.testing.assert_array_equal(peaks[i, :tokens], largest)
        assert (classes[i, tokens:] == 99).all()
        assert (peaks[i, tokens:] == -1).all()


@pytest.mark.parametrize("coded", [(uniform.MANY, uniform.MANY - 24), (3, 0, 300), (1030,)])
def test_sizes(coded: tuple[int, ...]) -> None:
    """Of parts whose components are all measured, beside those of which some are."""
    rng = np.random.default_rng(2)
    tokens, parts = 5, len(coded)
    firsts = np.cumsum([0, *coded])[:-1]
    coefficients = (3 * rng.standard_normal((sum(coded), STRIDE))).astype(np.float32)
    fields = np.array([(f, n, -1, 0, 0, 0) for f, n in zip(firsts, coded, strict=True)], np.int32)
    bits = rng.random((2 * parts, 256), np.float32)
    ids = rng.integers(0, 2, (sum(coded), 16), np.uint8)
    classes = rng.integers(7, 9, (parts, STRIDE), np.uint8)
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
                klass = classes[part, token]
                symbols = np.rint(coefficients[chosen, token] * own[klass]).astype(int)
                places = np.where(abs(symbols) <= 127, symbols + 127, 255)
                total += float(bits[2 * part + ids[chosen, klass], places].sum(dtype=np.float64))
            expected = total * count / max(len(chosen), 1)
            assert found[0, part, :, i].sum() == pytest.approx(expected, rel=1e-5)
