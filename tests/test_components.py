"""Components in one level and in two: what they do is what their one matrix does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import kvtc_stream as kvtc
from kvtc_stream.calibration.components import Components, columns_of_layers, refinement
from kvtc_stream.calibration.weights import apply_blocks
from kvtc_stream.formats import StreamParser


def multiply_adds(components: Components) -> int:
    """Multiply-adds from a token vector to its coefficients."""
    second = () if components.second is None else (components.second,)
    return sum(matrix.size for matrix in (*components.local, *second))


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    q, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    return q.T.astype(np.float32)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Components, list[NDArray[np.float32]]]:
    """Components of K and V of some layers, and weights of their heads."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    heads, k_dim, v_dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = columns_of_layers(layers, heads * k_dim, heads * v_dim)
    widths = [sum(s.stop - s.start for s in spans) for spans in groups]
    weights = []
    for dim in (k_dim, v_dim):
        x = rng.standard_normal((sum(layers), heads, dim, dim))
        weights.append((x @ x.swapaxes(2, 3) + np.eye(dim)).astype(np.float32))
    if draw(st.booleans()):
        rank = draw(st.integers(1, sum(widths)))
        return Components.dense(orthonormal(rng, rank, sum(widths))), weights
    ranks = [draw(st.integers(1, width)) for width in widths]
    leading = [draw(st.integers(0, rank)) for rank in ranks]
    second = draw(st.integers(0, sum(leading)))
    rank = second + sum(ranks) - sum(leading)
    found = Components(
        groups,
        tuple(orthonormal(rng, r, w) for r, w in zip(ranks, widths, strict=True)),
        tuple(leading),
        orthonormal(rng, second, sum(leading)),
        rng.permutation(rank).astype(np.int32),
    )
    return found, weights


def close(a: NDArray[Any], b: NDArray[Any]) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@given(drawn(), st.data())
def test_products_are_those_of_the_matrix(drawn: Any, data: st.DataObject) -> None:
    components, weights = drawn
    matrix, rank = components.matrix(), components.rank
    assert matrix.shape == (rank, components.width)
    close(matrix @ matrix.T, np.eye(rank))
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, components.width)).astype(np.float32)
    coefficients = rng.standard_normal((4, rank)).astype(np.float32)
    factors = rng.uniform(0.5, 2, rank).astype(np.float32)
    which = np.array(data.draw(st.permutations(range(rank))), np.int64)
    which = which[: data.draw(st.integers(0, rank))]
    cuts = sorted(data.draw(st.lists(st.integers(0, components.width), max_size=3)))
    spans = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, components.width], strict=True)]
    close(components.project(rows), rows @ matrix.T)
    out = np.empty((4, rank), np.float32)
    components.project(rows, out)
    close(out, rows @ matrix.T)
    for found, span in zip(components.expand(coefficients, spans), spans, strict=True):
        close(found, coefficients @ matrix[:, span])
    close(components.taken(which).matrix(), matrix[which])
    close(components.first(len(which)).matrix(), matrix[: len(which)])
    close(components.scaled(factors).matrix(), matrix * factors[:, None])
    for inverse in (False, True):
        weighted = components.weighted(weights, inverse=inverse)
        close(weighted.matrix(), apply_blocks(matrix, weights, inverse=inverse))
    padded = components.aligned(4)
    assert not any(n % 4 for n in padded.leading)
    close(padded.matrix(), matrix)
    close(padded.project(rows), rows @ matrix.T)
    assert multiply_adds(components.taken(which)) <= multiply_adds(components)


@pytest.fixture(scope="module")
def cache() -> tuple[NDArray[Any], NDArray[Any]]:
    """Layers that have much in common, neighbours the most."""
    rng = np.random.default_rng(5)
    common = rng.standard_normal((6, 4000)) * np.array([2, 1, 0.7, 0.5, 0.4, 0.3])[:, None]
    x = np.empty((2, 6, 2, 4000, 8), np.float32)
    mixing = rng.standard_normal((2, 2, 8, 6))
    for layer in range(6):
        mixing = mixing + 0.3 * rng.standard_normal(mixing.shape)
        x[:, layer] = np.einsum("khdc,ct->khtd", mixing, common)
    x += 0.2 * rng.standard_normal(x.shape)
    return x[0], x[1]


def calibrated(cache: Any, **options: Any) -> kvtc.Calibration:
    geometry = kvtc.Geometry.uniform(layers=6, kv_heads=2, head_dim=8)
    calibrator = kvtc.Calibrator(geometry, bases=("joint",), sinks=0, **options)
    calibrator.update(*(x[:, :, :3000] for x in cache))
    return calibrator.finish()


def gain(part: Any) -> float:
    """Bits that the leading 30 components' variances take, up to a constant."""
    return float(np.log2(part.spectrum[:30]).sum())


def test_a_second_level_finds_what_groups_have_in_common(cache: Any) -> None:
    one, apart, two, all_of_it = (
        calibrated(cache, **options)
        for options in (
            {},
            {"layer_groups": 3},
            {"layer_groups": 3, "second_level": 30},
            {"layer_groups": 3, "second_level": 192},
        )
    )
    [whole], groups, [levels], [same] = (
        c.sections[0].bases["joint"] for c in (one, apart, two, all_of_it)
    )
    assert len(groups) == 3
    assert sum(levels.components.leading) == 30
    assert multiply_adds(levels.components) < 0.5 * multiply_adds(whole.components)
    np.testing.assert_allclose(same.spectrum, whole.spectrum, rtol=1e-3, atol=1e-6)
    rows = np.concatenate([x.transpose(2, 0, 1, 3).reshape(4000, -1) for x in cache], axis=1)
    analysis, _ = levels.transforms()
    found = analysis.project(rows[:3000] - levels.mean)
    np.testing.assert_allclose(found.var(axis=0), levels.spectrum, rtol=2e-2, atol=1e-4)
    assert (np.diff(levels.spectrum) <= 0).all()
    tested = [x[:, :, 3000:] for x in cache]
    sizes, lost = [], []
    for calibration in (one, apart, two):
        codec = kvtc.Codec(calibration, ratio=12, window=0, sinks=0)
        data = kvtc.encode(*tested, codec)
        sizes.append(len(data))
        back = kvtc.decode(data, calibration)
        lost.append(sum(np.square(a - b).sum() for a, b in zip(back, tested, strict=True)))
    assert max(sizes) < 1.03 * min(sizes)
    assert lost[2] < 1.1 * lost[0]
    assert lost[2] < 0.8 * lost[1]


def test_streams_of_two_levels(cache: Any) -> None:
    """Parts of tokens and layers, layers one by one, and pages; but layers are not cut."""
    calibration = calibrated(cache, layer_groups=3, second_level=40)
    k, v = (x[:, :, 3000:3300] for x in cache)
    data = kvtc.encode(k, v, kvtc.Codec(calibration, ratio=8, window=20, block_tokens=32))
    whole = kvtc.decode(data, calibration)
    with kvtc.open(data, calibration=calibration) as reader:
        part = reader.read(tokens=slice(40, 200), layers=slice(1, 4))
    for found, expected in zip(part, whole, strict=True):
        np.testing.assert_allclose(found, expected[1:4, :, 40:200], atol=1e-4)
    for layer, (a, b) in enumerate(kvtc.decode_layers(data, calibration)):
        np.testing.assert_allclose(a, whole[0][layer], atol=1e-4)
        np.testing.assert_allclose(b, whole[1][layer], atol=1e-4)
    header, *_ = StreamParser().feed(data)
    assert len(header.plan.sections[0].parts) == 1
    with pytest.raises(kvtc.UnsupportedError, match="layer_groups"):
        kvtc.split_layers(data, "unused", slice(0, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_level": 5}, "layer_groups of 2 or more"),
        ({"second_level": -1, "layer_groups": 2}, "second_level must be at least 0"),
        ({"second_level": 5, "layer_groups": 2, "bases": ("separate",)}, "a joint basis"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    geometry = kvtc.Geometry.uniform(layers=6, kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=message):
        kvtc.Calibrator(geometry, **options)


@given(drawn(), st.integers(0, 5))
def test_strong_coefficients_are_found_again(
    found: tuple[Components, list[NDArray[np.float32]]], strong: int
) -> None:
    """Of a rounded basis, to second order of what rounding did."""
    components, weights = found
    strong = min(strong, components.rank)
    stored = components.mapped(lambda x: x.astype(np.float16).astype(np.float32))
    analysis, synthesis = (stored.weighted(weights, inverse=x) for x in (False, True))
    unit = np.zeros((strong, components.rank), np.float32)
    np.fill_diagonal(unit, 1)
    [rows] = synthesis.expand(unit, [slice(0, components.width)])
    once = analysis.project(rows)
    refined = once + once[:, :strong] @ refinement(analysis, synthesis, strong)
    off = np.linalg.norm(once - unit)
    assert np.linalg.norm(refined - unit) <= max(2 * off**2, 1e-4 * off + 2e-5)
