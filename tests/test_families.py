"""Fitted families against the coder, against entropies, and against a quantiser in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvtc_stream.calibration.families import FamilyTables, fit_families
from kvtc_stream.coding.rans import CLASSES, ESCAPE, TOTAL, ZERO, Families, decode, encode

Rows = npt.NDArray[np.float32]
Classes = npt.NDArray[np.uint8]


def _symbols(x: Rows, classes: Classes, unit: float, j: int) -> npt.NDArray[np.float64]:
    """Symbols and what they decode to."""
    delta = unit * 2 ** ((j + classes[:, None].astype(np.float64)) / 4)
    symbols = np.clip(np.rint(x / delta), -(2.0**31) + 1, 2.0**31 - 1)
    return np.stack([symbols, symbols * delta])


def _coded_bits(
    x: Rows, classes: Classes, unit: float, tables: FamilyTables, j: int
) -> tuple[int, int]:
    """Bits of the rows at a base step, in one tile, which must decode; bits of its states."""
    families = Families(tables.frequencies)
    symbols = _symbols(x, classes, unit, j)[0].astype(np.int32)
    data = encode(symbols, classes, tables.ids[j], families)
    assert np.array_equal(decode(data, classes, tables.ids[j], families), symbols)
    return 8 * len(data), 32 * min(32, len(x))


def _laplacian(rows: int, scales: npt.NDArray[np.float64], seed: int = 0) -> tuple[Rows, Classes]:
    rng = np.random.default_rng(seed)
    x = rng.laplace(size=(rows, scales.size)) * scales / np.sqrt(2)
    return x.astype(np.float32), rng.integers(0, 4, rows, np.uint8)


@st.composite
def _samples(draw: st.DrawFn) -> tuple[Rows, Classes, Rows]:
    rows, components = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    values = st.floats(-1e4, 1e4, width=32) | st.floats(-3, 3, width=32) | st.just(0.0)
    x = draw(hnp.arrays(np.float32, (rows, components), elements=values))
    classes = draw(hnp.arrays(np.uint8, rows, elements=st.integers(0, 15)))
    weights = draw(hnp.arrays(np.float32, rows, elements=st.floats(0, 8, width=32)))
    return x, classes, weights


@given(_samples(), st.integers(1, 9), st.integers(2, 64), st.sampled_from([1e-3, 0.5, 40.0]))
def test_tables_are_valid_and_as_measured(
    sample: tuple[Rows, Classes, Rows], steps: int, families: int, unit: float
) -> None:
    x, classes, weights = sample
    tables = fit_families(x, classes, unit=unit, steps=steps, families=families, weights=weights)
    coder = Families(tables.frequencies)
    assert len(tables.frequencies) <= families
    assert tables.frequencies[:, [ZERO, ESCAPE]].all()
    assert tables.frequencies[0, ZERO] == TOTAL - 1
    assert tables.ids.shape == (steps, CLASSES, x.shape[1])
    assert tables.ids.max() < len(tables.frequencies)

    w = weights[:, None].astype(np.float64)
    energy = np.mean(w * x.astype(np.float64) ** 2, axis=0)
    np.testing.assert_allclose(tables.energy, energy, rtol=1e-9)
    for j in range(steps):
        symbols, decoded = _symbols(x, classes, unit, j)
        columns = np.where(abs(symbols) > ZERO, ESCAPE, symbols + ZERO).astype(np.intp)
        wide = (symbols < -32767) | (symbols > 32767)
        bits = coder.bits[tables.ids[j][classes], columns] + 32.0 * wide
        np.testing.assert_allclose(tables.rate[j], bits.mean(axis=0), rtol=1e-4, atol=1e-6)
        gain = np.divide(
            np.mean(w * x * decoded, axis=0), energy, out=np.ones_like(energy), where=energy > 0
        )
        expected = np.mean(w * (x - decoded) ** 2, axis=0) + (1 - gain) ** 2 * energy
        np.testing.assert_allclose(tables.distortion[j], expected, rtol=1e-4, atol=1e-30)
    _coded_bits(x, classes, unit, tables, steps - 1)


def test_the_rate_is_that_of_the_coder() -> None:
    scales = np.geomspace(1e-2, 300, 24)
    x, classes = _laplacian(2000, scales)
    tables = fit_families(x, classes, unit=0.2, steps=12)
    symbols = _symbols(x, classes, 0.2, 0)[0]
    assert np.mean(abs(symbols[:, -1]) > ZERO) > 0.5  # escapes are a part of this
    for j in (0, 5, 11):
        coded, states = _coded_bits(x, classes, 0.2, tables, j)
        rate = len(x) * tables.rate[j].sum(dtype=np.float64)
        assert abs(coded - states - rate) < 0.02 * rate + 32 * 16
        assert coded - states > 0.99 * rate - 32 * 16


def test_families_lose_little_over_the_entropy_of_each_component() -> None:
    scales = np.geomspace(1e-2, 30, 48)
    x, _ = _laplacian(4000, scales)
    classes = np.full(len(x), 3, np.uint8)
    tables = fit_families(x, classes, unit=0.2, steps=12)
    entropy = np.empty((12, scales.size))
    for j in range(12):
        symbols = _symbols(x, classes, 0.2, j)[0]
        columns = np.where(abs(symbols) > ZERO, ESCAPE, symbols + ZERO).astype(np.intp)
        for c in range(scales.size):
            p = np.bincount(columns[:, c], minlength=256) / len(x)
            entropy[j, c] = 16 * p[ESCAPE] - np.sum(p[p > 0] * np.log2(p[p > 0]))
    # The frequencies are multiples of 1 / 4096, so no component of zeros takes 0 bits.
    assert (tables.rate > entropy - 1e-4).all()
    assert tables.rate.sum() < 1.03 * entropy.sum()
    few = fit_families(x, classes, unit=0.2, steps=12, families=4)
    assert len(few.frequencies) <= 4
    assert few.rate.sum() > 1.03 * entropy.sum()


def test_a_class_with_few_rows_borrows_from_all_rows() -> None:
    x, classes = _laplacian(1500, np.geomspace(0.1, 10, 8))
    classes[:] = 5
    x[0], classes[0] = 0, 2  # the only row of its class, and all zero
    tables = fit_families(x, classes, unit=0.5, steps=4)
    fresh, _ = _laplacian(1500, np.geomspace(0.1, 10, 8), seed=1)
    coder = Families(tables.frequencies)

    def bits(klass: int, j: int) -> float:
        """The fresh rows at the step of base step 3 and class 2."""
        columns = np.rint(fresh / (0.5 * 2 ** (5 / 4))).astype(np.intp).clip(-127, 128) + ZERO
        return float(coder.bits[tables.ids[j, klass], columns].mean())

    usual = bits(5, 0)
    assert bits(2, 3) < 1.1 * usual  # seen once
    assert bits(4, 1) < 1.02 * usual  # never seen


def test_equal_arguments_give_equal_tables() -> None:
    x, classes = _laplacian(300, np.geomspace(0.1, 10, 100))
    one = fit_families(x, classes, unit=0.3, steps=5)
    two = fit_families(x.copy(order="F"), classes, unit=0.3, steps=5, weights=np.ones(300, "f4"))
    for name in ("frequencies", "ids", "rate", "distortion", "energy"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


def test_components_of_zeros_are_nearly_free() -> None:
    x, classes = _laplacian(400, np.array([2.0, 0.0, 1.0, 0.0]))
    tables = fit_families(x, classes, unit=0.3, steps=3)
    least = -np.log2((TOTAL - 1) / TOTAL)
    np.testing.assert_allclose(tables.rate[:, [1, 3]], least, rtol=1e-3)
    assert not tables.distortion[:, [1, 3]].any()
    assert (tables.rate[:, [0, 2]] > 1).all()


def test_a_component_quantised_to_zero_costs_twice_its_energy() -> None:
    x, classes = _laplacian(200, np.array([1.0, 2.0]))
    weights = np.linspace(0, 3, 200, dtype=np.float32)
    tables = fit_families(x, classes, unit=1e3, steps=2, weights=weights)
    np.testing.assert_allclose(tables.distortion, np.tile(2 * tables.energy, (2, 1)), rtol=1e-6)


def test_steps_that_escape_everything_have_their_rate() -> None:
    x = np.array([[1e3, 1e9, 3e38]], np.float32)
    tables = fit_families(x, np.zeros(1, np.uint8), unit=1.0, steps=1)
    assert (tables.rate[0] >= [16, 48, 48]).all()
    assert (tables.rate[0] < [17, 49, 49]).all()
    assert np.isinf(tables.distortion[0, 2])  # it saturates, and float32 holds no such square


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_rejected(bad: float) -> None:
    x, classes = _laplacian(6, np.ones(3))
    x[4, 1] = bad
    with pytest.raises(ValueError, match="first is row 4"):
        fit_families(x, classes, unit=1.0, steps=2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"coefficients": np.zeros((3, 2))}, "float64"),
        ({"coefficients": np.zeros((0, 2), "f4"), "classes": np.zeros(0, "u1")}, "at least one"),
        ({"classes": np.full(3, 16, "u1")}, "greatest 16"),
        ({"classes": np.zeros(2, "u1")}, r"uint8 \[3\]"),
        ({"weights": np.ones(2, "f4")}, r"float32 \[3\]"),
        ({"weights": np.array([1, -1, 1], "f4")}, "not negative"),
        ({"unit": 0.0}, "unit 0.0"),
        ({"unit": np.inf}, "unit inf"),
        ({"steps": 0}, "0 steps"),
        ({"families": 1}, "1 families"),
        ({"families": 257}, "257 families"),
    ],
)
def test_unusable_arguments_are_rejected(change: dict, match: str) -> None:
    arguments = {
        "coefficients": np.zeros((3, 2), "f4"),
        "classes": np.zeros(3, "u1"),
        "unit": 1.0,
        "steps": 2,
    }
    with pytest.raises(ValueError, match=match):
        fit_families(**arguments | change)
