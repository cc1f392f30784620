"""Importance weights: what is accepted, what they do to a basis, and what files hold of them."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from strategies import cuts

import kvtc_stream as kvtc
from kvtc_stream.calibration import file, principal
from kvtc_stream.calibration import moments as module
from kvtc_stream.calibration.parts import Part
from kvtc_stream.calibration.principal import leading_eigenvectors
from kvtc_stream.calibration.weights import apply_blocks, importance_matrices, scaling_matrices
from kvtc_stream.formats import Geometry, Rope, Section

Array = NDArray[Any]

GEOMETRY = Geometry.uniform(layers=2, kv_heads=2, head_dim=4, rope=Rope.from_theta(1e4, 4))
few_tokens = pytest.mark.filterwarnings("ignore:calibrated on:kvtc_stream.KVTCWarning")


def gradients(k: Array, v: Array, seed: int = 0) -> tuple[Array, Array]:
    """Tiny, of unequal channels, and larger at tokens where the first value is positive."""
    rng = np.random.default_rng(seed)
    size = 1e-9 * np.exp(1.5 * (v[:1, :1, :, :1] > 0))
    channels = np.exp(np.random.default_rng(1).standard_normal((2, *k.shape[:2], 1, k.shape[3])))
    found = [rng.standard_normal(x.shape) * size * c for x, c in zip((k, v), channels, strict=True)]
    return found[0].astype(np.float32), found[1].astype(np.float32)


@lru_cache
def learnt() -> kvtc.Calibration:
    """Weighted, with a predictor of importance."""
    calibrator = kvtc.Calibrator(GEOMETRY)
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 2000, seed=1)
    calibrator.update(k, v)
    calibrator.update_gradients(k, v, *gradients(k, v))
    return calibrator.finish()


def joint(calibration: kvtc.Calibration, section: int = 0) -> Part:
    [part] = calibration.sections[section].basis("joint")
    return part


# What is accepted.


@given(st.integers(0, 2**32 - 1))
def test_shapes_of_equal_meaning_are_equal(seed: int) -> None:
    heads = np.random.default_rng(seed).exponential(size=(2, 2, 2)).astype(np.float32)
    channels = np.repeat(heads[..., None], 4, axis=-1)
    forms = (heads, channels, channels[..., None] * np.eye(4, dtype=np.float32))
    [expected] = importance_matrices((heads[0], heads[1]), GEOMETRY.sections)
    for k, v in itertools.product(forms, repeat=2):
        for pair in ((k[0], v[1]), [(k[0].tolist(), v[1])]):
            [found] = importance_matrices(pair, GEOMETRY.sections)
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == np.float64
                assert a.shape == (2, 2, 4, 4)
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(), (2,), (4, 2), (2, 2, 1), (2, 2, 4, 1), (2, 2, 4, 4, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weights of v must be \[layers, kv_heads\] = \[2, 2\]"):
        importance_matrices((np.ones((2, 2)), np.ones(shape)), GEOMETRY.sections)


def test_every_section_has_a_pair() -> None:
    sections = (Section((0,), 1, 2, 3), Section((1,), 1, 4, 1))
    one = np.ones((1, 1))
    k, v = importance_matrices([(one, one), (one, one)], sections)[1]
    assert (k.shape, v.shape) == ((1, 1, 4, 4), (1, 1, 1, 1))
    for wrong in ([(one, one)], [(one, one)] * 3, [(one, one), (one,)]):
        with pytest.raises(ValueError, match="pair"):
            importance_matrices(wrong, sections)


@given(st.sampled_from([5e-324, 1e-300, 1e-20, 1.0, 1e300, 1e308]), st.integers(0, 3))
def test_only_proportions_count(scale: float, dead: int) -> None:
    """Whatever the unit, and with a head that has no importance."""
    heads = np.ones((2, 2))
    heads.flat[dead] = 0
    forms = heads, heads[..., None, None] * np.eye(4)
    given_weights, plain = (
        scaling_matrices(importance_matrices((forms[0] * s, forms[1] * s), GEOMETRY.sections))
        for s in (scale, 1.0)
    )
    assert given_weights is not None
    assert plain is not None
    for a, b in zip(given_weights[0], plain[0], strict=True):
        assert (np.linalg.eigvalsh(a) > 0.01).all()
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_sections_share_a_scale() -> None:
    sections = (Section((0,), 1, 2, 2), Section((1,), 1, 2, 2))
    one = np.ones((1, 1))
    scaled = scaling_matrices(importance_matrices([(one, one), (9 * one, 9 * one)], sections))
    assert scaled is not None
    diagonals = [float(k[0, 0, 0, 0]) for k, _ in scaled]
    assert sum(diagonals) / 2 == pytest.approx(1, rel=1e-6)
    assert diagonals[1] / diagonals[0] == pytest.approx(9**0.35, rel=1e-2)


def test_sections_weigh_by_token_however_many_gave_gradients() -> None:
    geometry = Geometry((Section((0,), 1, 4, 4), Section((1,), 1, 4, 4)))
    calibrator = kvtc.Calibrator(geometry, bases=("joint",))
    rng = np.random.default_rng(0)
    for section, tokens in enumerate((4000, 1000)):
        k, v, *grads = rng.standard_normal((4, 1, 1, tokens, 4), np.float32)
        calibrator.update(k, v, section=section)
        calibrator.update_gradients(k, v, *grads, section=section)
    calibration = calibrator.finish()
    for i in range(2):
        weights = joint(calibration, i).k_weights
        assert weights is not None
        assert np.trace(weights[0, 0]) / 4 == pytest.approx(1, rel=0.05)


# What they do.


def test_a_weighted_basis_loses_less_of_what_matters() -> None:
    """Weighted error that the leading components leave, relative to the unweighted basis."""
    rng = np.random.default_rng(0)
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 3000, seed=1)
    weights = tuple(np.exp(3 * rng.standard_normal((2, 2, 4))) for _ in "kv")
    parts = []
    for w in (None, weights):
        calibrator = kvtc.Calibrator(GEOMETRY, weights=w, bases=("joint",))
        calibrator.update(k, v)
        calibration = calibrator.finish()
        parts.append((calibration, joint(calibration)))
    stored = parts[1][1]
    assert stored.k_weights is not None
    assert stored.v_weights is not None
    rows = kvtc.testing.drawn_cache(Geometry.uniform(layers=2, kv_heads=2, head_dim=4), 500, seed=1)
    flat = np.concatenate([x.transpose(2, 0, 1, 3).reshape(500, -1) for x in rows], axis=1)
    lost = []
    for calibration, part in parts:
        transforms = calibration.transforms(0, "joint", 0, part.rank)
        analysis, synthesis = (x.first(6).matrix() for x in transforms)
        left = flat - part.mean
        left = left - left @ analysis.T @ synthesis
        lost.append(np.square(apply_blocks(left, (stored.k_weights, stored.v_weights))).sum())
    assert lost[1] < 0.8 * lost[0]


def test_zero_gradients_weigh_nothing() -> None:
    plain, zero = kvtc.Calibrator(GEOMETRY), kvtc.Calibrator(GEOMETRY)
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 300)
    for calibrator in (plain, zero):
        calibrator.update(k, v)
    zero.update_gradients(k, v, 0 * k, 0 * v)
    assert zero.finish() == plain.finish()
    assert joint(zero.finish()).k_weights is None


def test_sinks_and_spoilt_tokens_have_no_gradients() -> None:
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 50)
    a, b = gradients(k, v)
    spoilt = b.copy()
    spoilt[0, 0, 20, 0] = np.nan
    spoilt[:, :, :4] = 1e30
    one, two = kvtc.Calibrator(GEOMETRY), kvtc.Calibrator(GEOMETRY)
    one.update_gradients(k, v, a, spoilt)
    where = np.delete(np.arange(50), [0, 1, 2, 3, 20])
    two.update_gradients(*(x[:, :, where] for x in (k, v, a, b)), positions=where)
    assert_same_gradients(one, two)


def assert_same_gradients(one: kvtc.Calibrator, two: kvtc.Calibrator) -> None:
    a, b = (c._sections[0].importance for c in (one, two))
    for x, y in zip(a.matrices(), b.matrices(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9 * np.abs(y).max(initial=0))
    whole = module.Columns((0, 1), (0, 1))
    for x, y in zip(a.pairs(whole) or (), b.pairs(whole) or (), strict=True):
        np.testing.assert_array_equal(x, y)


@given(st.data())
def test_gradients_in_any_order_and_pieces(data: st.DataObject) -> None:
    """The same importance to rounding, and the same sample."""
    documents = [kvtc.testing.drawn_cache(GEOMETRY, 40 + 9 * i, seed=i) for i in range(3)]
    texts = [(k, v, *gradients(k, v, i)) for i, (k, v) in enumerate(documents)]
    whole = kvtc.Calibrator(GEOMETRY)
    for text in texts:
        whole.update_gradients(*text)
    parts = [kvtc.Calibrator(GEOMETRY) for _ in range(2)]
    for text in data.draw(st.permutations(texts)):
        where = np.arange(text[0].shape[2])
        for piece in data.draw(cuts(len(where))):
            parts[data.draw(st.integers(0, 1))].update_gradients(
                *(x[:, :, piece] for x in text), positions=where[piece]
            )
    first, second = data.draw(st.permutations(parts))
    first.merge(second)
    assert_same_gradients(first, whole)


def test_the_sample_keeps_tiny_gradients() -> None:
    """To binary16's precision of each row, from 1e-30 to 1e10."""
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 60)
    a, b = gradients(k, v)
    for scale in (1e-21, 1e19):
        calibrator = kvtc.Calibrator(GEOMETRY, sinks=0)
        calibrator.update_gradients(k, v, a * np.float32(scale), b * np.float32(scale))
        pairs = calibrator._sections[0].importance.pairs(module.Columns((0, 1), (0, 1)))
        assert pairs is not None
        found = np.sort(np.linalg.norm(pairs[1].astype(np.float64), axis=1))
        flat = np.concatenate([x.transpose(2, 0, 1, 3).reshape(60, -1) for x in (a, b)], axis=1)
        exact = np.sort(np.linalg.norm(flat.astype(np.float64) * scale, axis=1))
        np.testing.assert_allclose(found, exact, rtol=1e-3)


def test_wrong_gradients_are_named() -> None:
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 20)
    calibrator = kvtc.Calibrator(GEOMETRY)
    with pytest.raises(ValueError, match="20 tokens, gradients of 19"):
        calibrator.update_gradients(k, v, k[:, :, 1:], v[:, :, 1:])
    with pytest.raises(ValueError, match="grad_k has 20 tokens, grad_v has 19"):
        calibrator.update_gradients(k, v, k, v[:, :, 1:])
    with pytest.raises(ValueError, match="grad_v has shape"):
        calibrator.update_gradients(k, v, k, v[:1])
    with pytest.raises(TypeError, match="grad_k has dtype float64"):
        calibrator.update_gradients(k, v, k.astype(np.float64), v)


# Eigenvectors.


def decaying(size: int) -> Array:
    """A covariance whose variances fall as those of a cache: a power law, then noise."""
    rng = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(rng.standard_normal((size, size)))
    variance = 1 / np.arange(1, size + 1) ** 1.3 + 1e-5
    return ((vectors * variance) @ vectors.T).astype(np.float32)


@pytest.mark.parametrize("count", [1, 60, 150])
def test_subspace_iteration_captures_what_dense_does(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    matrix = decaying(600)
    exact = np.linalg.eigvalsh(matrix.astype(np.float64))[::-1][:count]
    monkeypatch.setattr(principal, "_DENSE", 0)
    variance, vectors = leading_eigenvectors(matrix, count)
    assert vectors.shape == (600, count)
    assert (np.diff(variance) <= 0).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-5)
    captured = np.einsum("ij,ij->j", vectors, matrix @ vectors)
    np.testing.assert_allclose(captured, variance, rtol=1e-3)
    assert exact.sum() * 0.999 < captured.sum() < exact.sum() * 1.00001
    again = leading_eigenvectors(matrix, count)
    np.testing.assert_array_equal(again[1], vectors)


def test_subspace_iteration_of_a_matrix_of_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens than components: no more than there are, or nothing but noise."""
    monkeypatch.setattr(principal, "_DENSE", 0)
    rows = np.random.default_rng(0).standard_normal((5, 400)).astype(np.float32)
    variance, vectors = leading_eigenvectors(rows.T @ rows, 40)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(40), atol=1e-5)
    assert np.abs(variance[5:]).max() < 1e-5 * variance[0]


# Degenerate caches.


@few_tokens
@pytest.mark.parametrize("importance", ["none", "weights", "gradients"])
@pytest.mark.parametrize(("layers", "dim", "tokens"), [(1, 1, 1), (1, 1, 40), (2, 8, 3)])
@pytest.mark.parametrize("constant", [False, True])
def test_degenerate_caches_calibrate(
    importance: str, layers: int, dim: int, tokens: int, constant: bool, tmp_path: Path
) -> None:
    """Width 1, fewer tokens than components, rows that never vary; a dead layer."""
    geometry = Geometry.uniform(layers=layers, kv_heads=1, head_dim=dim)
    k, v = kvtc.testing.drawn_cache(geometry, tokens)
    if constant:
        k, v = np.full_like(k, 2.5), np.zeros_like(v)
    alive = np.ones((layers, 1), np.float32)
    alive[1:] = 0
    weights = (alive, alive) if importance == "weights" else None
    calibrator = kvtc.Calibrator(geometry, sinks=0, weights=weights)
    calibrator.update(k, v)
    if importance == "gradients":
        calibrator.update_gradients(k, v, *(x * alive[..., None, None] for x in gradients32(k, v)))
    calibration = calibrator.finish()
    part = joint(calibration)
    assert part.weighted is (importance != "none")
    for x in calibration.transforms(0, "joint", 0, part.rank):
        assert np.isfinite(x.matrix()).all()
    assert part.uniform is not None
    for errors in (part.uniform.k_errors, part.uniform.v_errors):
        assert (np.diff(errors) >= 0).all()
    if constant:
        assert part.uniform.k_errors.max() < 1e-5
        assert part.uniform.v_errors.max() == 0
    calibration.save(tmp_path / "c")
    assert kvtc.Calibration.load(tmp_path / "c") == calibration


def gradients32(k: Array, v: Array) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(x.shape, np.float32) for x in (k, v)]


# Files.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "weighted.safetensors"
    learnt().save(path)
    return path


def test_every_array_comes_back(saved: Path) -> None:
    loaded = kvtc.Calibration.load(saved)
    assert loaded == learnt()
    ours, theirs = dict(file.arrays_of(learnt())), dict(file.arrays_of(loaded))
    assert ours.keys() == theirs.keys()
    assert {"0.joint.0.k_weights", "0.joint.0.uniform.importance.weights"} < ours.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name])
    part = joint(learnt())
    a, b = (c.transforms(0, "joint", 0, part.rank) for c in (learnt(), loaded))
    for mine, theirs in zip(a, b, strict=True):
        np.testing.assert_array_equal(mine.matrix(), theirs.matrix())
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 100)
    codecs = [kvtc.Codec(c, ratio=4, window=0) for c in (learnt(), loaded)]
    assert codecs[0] == codecs[1]
    streams = [kvtc.encode(k, v, codec=codec) for codec in codecs]
    assert streams[0] == streams[1]


def rewrite(path: Path, arrays: dict[str, Array]) -> None:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file(arrays, path, metadata)


@pytest.mark.parametrize("name", sorted(dict(file.arrays_of(learnt()))))
def test_spoilt_arrays_are_refused(saved: Path, name: str) -> None:
    """Weights of another shape or type, absent, or with numbers that no calibration makes."""
    good = load_file(saved)
    array = good[name]
    spoilt = [array[..., None], array[:0], np.zeros(array.shape, np.int16)]
    if array.dtype.kind == "f":
        spoilt.append(np.full_like(array, np.nan))
        spoilt.append(array.astype(np.float16 if array.dtype != np.float16 else np.float32))
    for changed in [{name: x} for x in spoilt] + [{}]:
        rest = {key: value for key, value in good.items() if key != name}
        rewrite(saved, rest | changed)
        with pytest.raises(kvtc.FormatError) as refusal:
            kvtc.Calibration.load(saved)
        assert not isinstance(refusal.value, kvtc.ChecksumError), refusal.value


@pytest.mark.parametrize("change", ["singular", "negative", "not symmetric"])
def test_weights_that_cannot_be_undone_are_refused(saved: Path, change: str) -> None:
    arrays = load_file(saved)
    weights = arrays["0.joint.0.v_weights"]
    if change == "not symmetric":
        weights[1, 0, 0, 1] += 1
    else:
        weights[1, 0] *= 0 if change == "singular" else -1
    rewrite(saved, arrays)
    with pytest.raises(kvtc.FormatError, match="symmetric and positive definite"):
        kvtc.Calibration.load(saved)
