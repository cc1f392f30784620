"""Error tables against the quantiser, the dynamic programming against brute force."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc_stream.calibration.band_tables import (
    BAND_SIZES,
    BAND_TYPES,
    ErrorTables,
    error_tables,
    sampled_rows,
)
from kvtc_stream.coding.bands import dequantise, quantise
from kvtc_stream.formats.plan import Band, Quantiser
from kvtc_stream.planning.dynamic import allocate, allocate_for_error, frontier

Float = npt.NDArray[np.float32]


def _coefficients(rows: int, components: int, seed: int = 0) -> Float:
    rng = np.random.default_rng(seed)
    deviations = 30 * np.arange(1, components + 1) ** -0.6
    return (rng.laplace(size=(rows, components)) * deviations).astype(np.float32)


def _tables(
    energy: npt.NDArray[np.float64],
    relative: npt.NDArray[np.float64],
    sizes: tuple[int, ...],
    types: tuple[Quantiser, ...],
    dropped: float = 0.0,
) -> ErrorTables:
    """Tables in which a band's error is a drawn share of its energy."""
    errors = np.full((energy.size, len(sizes), len(types)), np.inf, np.float32)
    for s, size in enumerate(sizes):
        for start in range(energy.size - size + 1):
            errors[start, s] = energy[start : start + size].sum() * relative[start, s]
    return ErrorTables(errors, energy, dropped, 1, sizes, types)


def _cost(tables: ErrorTables, bands: tuple[Band, ...]) -> tuple[int, float]:
    """Bits and error of a plan, straight from the tables."""
    bits, error, start = 0, tables.dropped, 0
    for band in bands:
        bits += band.bits
        if band.quantiser is Quantiser.NONE:
            error += tables.energy[start : start + band.size].sum()
        else:
            error += tables.errors[
                start, tables.sizes.index(band.size), tables.types.index(band.quantiser)
            ]
        start += band.size
    return bits, error + tables.energy[start:].sum()


def _brute_force(tables: ErrorTables) -> list[tuple[int, float]]:
    """Bits and error of every plan there is."""

    @cache
    def plans(start: int) -> list[tuple[int, float]]:
        if start == tables.components:
            return [(0, 0.0)]
        found = [(bits, error + float(tables.energy[start])) for bits, error in plans(start + 1)]
        for s, size in enumerate(tables.sizes):
            if start + size > tables.components:
                continue
            for k, kind in enumerate(tables.types):
                cost, lost = Band(size, kind).bits, float(tables.errors[start, s, k])
                found += [(bits + cost, error + lost) for bits, error in plans(start + size)]
        return found

    return [(bits, error + tables.dropped) for bits, error in plans(0)]


@st.composite
def small_tables(draw: st.DrawFn) -> ErrorTables:
    """Any tables, also such that no real quantiser would give: errors above the energy, ties."""
    sizes = draw(st.sampled_from([(1,), (2,), (1, 3), (2, 3), (1, 2, 4), (1, 16)]))
    types = draw(st.sampled_from([BAND_TYPES, BAND_TYPES[:1], BAND_TYPES[1:]]))
    components = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    energy = np.sort(rng.integers(0, 50, components))[::-1].astype(np.float64)
    relative = rng.choice([0, 0.01, 0.1, 0.5, 1.5], (components, len(sizes), len(types)))
    return _tables(energy, relative, sizes, types, draw(st.sampled_from([0.0, 2.5])))


@settings(max_examples=150, deadline=None)
@given(small_tables(), st.integers(0, 400))
def test_every_budget_gets_the_optimum(tables: ErrorTables, max_bits: int) -> None:
    plans = _brute_force(tables)
    found = frontier(tables, max_bits)
    assert found.max_bits <= max_bits < found.max_bits + found.unit
    for bits in range(0, max_bits + 1, 7):
        optimum = min(error for cost, error in plans if cost <= bits)
        allocation = found.allocation(bits)
        assert allocation.error == pytest.approx(optimum, rel=1e-6, abs=1e-9)
        assert found.errors[bits // found.unit] == pytest.approx(optimum, rel=1e-6, abs=1e-9)
        assert allocation.bits <= bits
        assert (allocation.bits, pytest.approx(allocation.error)) == _cost(tables, allocation.bands)


@settings(max_examples=100, deadline=None)
@given(small_tables(), st.floats(0, 1))
def test_an_error_is_met_with_the_fewest_bits(tables: ErrorTables, share: float) -> None:
    plans = _brute_force(tables)
    most = max(bits for bits, _ in plans)
    target = share * float(tables.energy.sum()) + tables.dropped + 1e-6
    enough = [bits for bits, error in plans if error <= target]
    if not enough:
        with pytest.raises(ValueError, match="needs more than"):
            allocate_for_error(tables, target, most)
        return
    allocation = allocate_for_error(tables, target, most)
    assert allocation.error <= target
    assert allocation.bits <= min(enough)


@settings(max_examples=100, deadline=None)
@given(small_tables(), st.integers(0, 400))
def test_bands_are_in_their_shortest_form(tables: ErrorTables, bits: int) -> None:
    kinds = [band.quantiser for band in allocate(tables, bits).bands]
    assert not kinds or kinds[-1] is not Quantiser.NONE
    none = [kind is Quantiser.NONE for kind in kinds]
    assert not any(a and b for a, b in pairwise(none))


def test_many_budgets_and_components_cross_every_range_of_the_kernel() -> None:
    """Longer than a block of rows, wider than a pass and a thread's range of the budget."""
    rng = np.random.default_rng(5)
    components, bits = 700, 12_000
    energy = np.sort(rng.exponential(size=components) ** 3)[::-1].copy()
    relative = rng.uniform(0.5, 1, (components, 3, 3)) * [0.1, 0.01, 0.001]
    tables = _tables(energy, relative, (1, 16, 64), BAND_TYPES)
    options = [
        (s, k, Band(size, kind).bits)
        for s, size in enumerate(tables.sizes)
        for k, kind in enumerate(BAND_TYPES)
    ]
    best = np.zeros((components + 1, bits + 1))
    for i in range(1, components + 1):
        best[i] = best[i - 1] + energy[i - 1]
        for s, k, cost in options:
            start = i - tables.sizes[s]
            if start >= 0:
                candidate = best[start, : bits + 1 - cost] + tables.errors[start, s, k]
                best[i, cost:] = np.minimum(best[i, cost:], candidate)
    found = frontier(tables, bits)
    assert found.unit == 2
    np.testing.assert_allclose(found.errors, best[-1, ::2], rtol=1e-9)
    for budget in (0, 33, 34, 5_001, 8_190, 8_192, bits):
        allocation = found.allocation(budget)
        assert allocation.error == pytest.approx(best[-1, budget], rel=1e-9)
        assert _cost(tables, allocation.bands) == (
            allocation.bits,
            pytest.approx(allocation.error),
        )


def test_tables_equal_the_quantiser_where_every_row_is_measured() -> None:
    x = _coefficients(100, 70)
    tables = error_tables(x, dropped=1.5)
    assert (tables.rows, tables.dropped) == (100, 1.5)
    assert (tables.sizes, tables.types) == (BAND_SIZES, BAND_TYPES)
    np.testing.assert_allclose(tables.energy, np.square(x, dtype=np.float64).mean(axis=0))
    for s, size in enumerate(BAND_SIZES):
        for k, kind in enumerate(BAND_TYPES):
            assert np.isinf(tables.errors[max(0, 71 - size) :, s, k]).all()
            for start in range(0, 71 - size, 9):
                part = np.ascontiguousarray(x[:, start : start + size])
                out = np.empty_like(part)
                dequantise(quantise(part, (Band(size, kind),)), (Band(size, kind),), out)
                expected = np.square(part - out, dtype=np.float64).sum(axis=1).mean()
                assert tables.errors[start, s, k] == pytest.approx(expected, rel=1e-5)


def test_wide_bands_are_estimated_from_fewer_rows() -> None:
    assert [sampled_rows(size, 1024) for size in BAND_SIZES] == [1024, 1024, 1024, 256, 128]
    assert sampled_rows(1024, 50) == 50
    x = _coefficients(1024, 300)
    exact = np.zeros(3)
    for k, kind in enumerate(BAND_TYPES):
        out = np.empty((1024, 256), np.float32)
        part = np.ascontiguousarray(x[:, :256])
        dequantise(quantise(part, (Band(256, kind),)), (Band(256, kind),), out)
        exact[k] = np.square(part - out, dtype=np.float64).sum(axis=1).mean()
    np.testing.assert_allclose(error_tables(x).errors[0, 3], exact, rtol=0.1)


def test_rows_that_cannot_be_coded_do_not_count() -> None:
    x = _coefficients(10, 40)
    bad = np.concatenate([x[:4], np.full((3, 40), [[np.nan], [np.inf], [-7e4]], np.float32), x[4:]])
    expected, found = error_tables(x), error_tables(bad)
    assert found.rows == 10
    np.testing.assert_array_equal(found.errors, expected.errors)
    with pytest.raises(ValueError, match="too large to be coded"):
        error_tables(bad[4:7])


def test_components_without_energy() -> None:
    x = _coefficients(10, 40)
    x[:, 20:] = 0
    tables = error_tables(x)
    assert not tables.errors[20:, 0].any()
    assert not np.isnan(tables.errors).any()
    assert allocate(tables, 100_000).error <= 1e-3 * float(tables.energy.sum())


def test_the_plan_keeps_its_promise_on_the_rows_it_was_made_from() -> None:
    x = _coefficients(128, 200)
    tables = error_tables(x)
    allocation = allocate(tables, 800)
    covered = sum(band.size for band in allocation.bands)
    part = np.ascontiguousarray(x[:, :covered])
    out = np.empty_like(part)
    dequantise(quantise(part, allocation.bands), allocation.bands, out)
    left = np.square(x[:, covered:], dtype=np.float64).sum(axis=1).mean()
    lost = np.square(part - out, dtype=np.float64).sum(axis=1).mean()
    assert lost + left == pytest.approx(allocation.error, rel=1e-4)


def test_progress_rises_to_the_end() -> None:
    calls: list[tuple[int, int]] = []
    tables = error_tables(
        _coefficients(64, 300), progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1][0] == calls[-1][1] > 0
    assert calls == sorted(calls)
    calls.clear()
    allocate(tables, 20_000, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (300, 300)
    assert calls == sorted(calls)


def test_wrong_arguments() -> None:
    tables = error_tables(_coefficients(8, 20))
    with pytest.raises(ValueError, match="not be negative"):
        allocate(tables, -1)
    with pytest.raises(ValueError, match="bits must be in 0…100"):
        frontier(tables, 100).allocation(102)
    with pytest.raises(ValueError, match="float32"):
        error_tables(np.zeros((3, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[20, 5, 3\]"):
        ErrorTables(tables.errors[:, :4], tables.energy, 0.0, 8)
    many = _tables(np.ones(3), np.ones((3, 6, 3)), (1, 2, 3, 4, 5, 6), BAND_TYPES)
    with pytest.raises(ValueError, match="at most 15"):
        allocate(many, 100)
    with pytest.raises(ValueError, match="needs more than 100 bits"):
        allocate_for_error(tables, math.ulp(0), 100)
