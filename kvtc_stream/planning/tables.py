"""Error tables: what every possible band would cost in accuracy.

The planner needs, for each component, the squared error of a band of each size and type that
starts there. The tables are measured on sampled rows of coefficients with the arithmetic of
:mod:`kvtc_stream.cpu.quantise`, so they hold for the coder that follows the plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from kvtc_stream.cpu.quantise import (
    affine_code,
    band_parameters,
    e4m3_decode,
    e4m3_encode,
)
from kvtc_stream.formats.plan import Quantiser

#: Sizes and types of coded bands (KVTC, arXiv 2511.01815, section 3).
BAND_SIZES = (1, 16, 64, 256, 1024)
BAND_TYPES = (Quantiser.INT2, Quantiser.INT4, Quantiser.FP8)

#: Rows that go through the kernel together; they fill vector registers and stay in cache.
_LANES = 64

_BINARY16_MAX = 65504.0

_F32 = np.float32

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@dataclass(frozen=True, slots=True, eq=False)
class ErrorTables:
    """Mean squared errors per token of everything a plan can do with a part's components.

    Attributes
    ----------
    errors
        float32 [components, sizes, types]: error of a band that starts at the component, summed
        over the band; infinite where the band would not fit.
    energy
        float64 [components]: error of not coding the component.
    dropped
        Error outside the components (a basis of capped rank), which no plan can reduce.
    rows
        Rows of coefficients that were measured.
    sizes, types
        What the second and third axis of ``errors`` stand for; sizes rise.
    """

    errors: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float64]
    dropped: float
    rows: int
    sizes: tuple[int, ...] = BAND_SIZES
    types: tuple[Quantiser, ...] = BAND_TYPES

    def __post_init__(self) -> None:
        if self.errors.shape != (self.components, len(self.sizes), len(self.types)):
            raise ValueError(
                f"errors must be [components, sizes, types] = [{self.components}, "
                f"{len(self.sizes)}, {len(self.types)}], found {list(self.errors.shape)}"
            )

    @property
    def components(self) -> int:
        """Number of components."""
        return self.energy.shape[0]


def sampled_rows(size: int, rows: int) -> int:
    """How many of ``rows`` sampled rows a table for bands of this size measures.

    A wide band costs more to measure and already averages over its components.
    """
    return min(rows, max(128, 2**15 // size))


def error_tables(
    coefficients: npt.NDArray[np.float32],
    *,
    dropped: float = 0.0,
    sizes: tuple[int, ...] = BAND_SIZES,
    types: tuple[Quantiser, ...] = BAND_TYPES,
    progress: Callable[[int, int], None] | None = None,
) -> ErrorTables:
    """Measure the tables on sampled rows.

    Parameters
    ----------
    coefficients
        float32 [rows, components]. Rows that the quantiser could not represent (NaN, infinite, or
        beyond binary16) are left out: such tokens are stored verbatim.
    dropped
        Mean squared norm per token of what lies outside the components.
    sizes, types
        Bands to measure.
    progress
        Called with work done and work in all, in arbitrary units.

    Raises
    ------
    ValueError
        If no row can be represented.

    Notes
    -----
    Bands of ``size`` components are measured on :func:`sampled_rows` rows, spread over the
    sample, and scaled by the energy of all rows over the energy of those. Runs on all CPUs.
    """
    if coefficients.ndim != 2 or coefficients.dtype != np.float32:
        raise ValueError(
            f"coefficients must be float32 [rows, components], found {coefficients.dtype} "
            f"{list(coefficients.shape)}"
        )
    usable = (np.abs(coefficients) <= _BINARY16_MAX).all(axis=1)
    rows = int(usable.sum())
    if not rows:
        raise ValueError("no row of coefficients is finite and within binary16")
    by_component = np.ascontiguousarray(coefficients[usable].T)
    components = by_component.shape[0]
    energy = _row_sums(by_component) / rows
    errors = np.full((components, len(sizes), len(types)), np.inf, np.float32)
    bits = np.array([t.bits for t in types], np.int64)

    tasks = []
    for s, size in enumerate(sizes):
        if size > components:
            continue
        chosen = np.arange(sampled_rows(size, rows)) * rows // sampled_rows(size, rows)
        tasks += [(s, size, chosen[i : i + _LANES]) for i in range(0, chosen.size, _LANES)]
    work = sum(size * lanes.size for _, size, lanes in tasks)

    def measure(task: tuple[int, int, npt.NDArray[np.intp]]) -> npt.NDArray[np.float64]:
        _, size, lanes = task
        table = np.empty((components - size + 1, len(types) + 1))
        _measure_bands(np.ascontiguousarray(by_component[:, lanes]), size, bits, table)
        return table

    done = 0
    sums = [np.zeros((max(components - size + 1, 0), len(types) + 1)) for size in sizes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (s, size, lanes), table in zip(tasks, pool.map(measure, tasks), strict=True):
            sums[s] += table
            done += size * lanes.size
            if progress is not None:
                progress(done, work)
    cumulative = np.concatenate([[0.0], np.cumsum(energy)])
    for s, size in enumerate(sizes):
        band_energy = cumulative[size:] - cumulative[:-size]
        measured = sums[s][:, -1:]
        scale = np.divide(
            band_energy[:, None], measured, out=np.zeros_like(measured), where=measured > 0
        )
        errors[: sums[s].shape[0], s] = sums[s][:, :-1] * scale
    return ErrorTables(errors, energy, float(dropped), rows, sizes, types)


@_jit
def _row_sums(x):  # type: ignore[no-untyped-def]
    """Sum of squares along the last axis, in float64."""
    sums = np.zeros(x.shape[0])
    for c in range(x.shape[0]):
        for value in x[c]:
            sums[c] += np.float64(value) ** 2
    return sums


@_jit
def _measure_bands(x, size, bits, table):  # type: ignore[no-untyped-def]
    """Error and energy of every band of one size, summed over the lanes of ``x``.

    ``x`` is float32 [components, lanes]; ``table`` float64 [bands, types + 1], energy last. All
    inner loops run over the lanes: vector code whose sums do not depend on the vector's width.
    """
    lanes = x.shape[1]
    lo = np.empty(lanes, _F32)
    hi = np.empty(lanes, _F32)
    shift = np.empty(lanes, _F32)
    scale = np.empty(lanes, _F32)
    divisor = np.empty(lanes, _F32)
    error = np.empty(lanes, _F32)
    energy = np.empty(lanes, _F32)
    for start in range(table.shape[0]):
        lo[:] = x[start]
        hi[:] = x[start]
        energy[:] = 0
        for c in range(start, start + size):
            component = x[c]
            for r in range(lanes):
                value = component[r]
                lo[r] = value if value < lo[r] else lo[r]
                hi[r] = value if value > hi[r] else hi[r]
                energy[r] += value * value
        table[start, -1] = energy.astype(np.float64).sum()
        for k in range(bits.size):
            for r in range(lanes):
                scale[r], shift[r] = band_parameters(lo[r], hi[r], bits[k])
                divisor[r] = scale[r] if scale[r] > 0 else _F32(np.inf)
            error[:] = 0
            if bits[k] == 8:
                for c in range(start, start + size):
                    component = x[c]
                    for r in range(lanes):
                        code = e4m3_encode((component[r] - shift[r]) / divisor[r])
                        difference = component[r] - (shift[r] + e4m3_decode(code) * scale[r])
                        error[r] += difference * difference
            else:
                levels = _F32((1 << bits[k]) - 1)
                for c in range(start, start + size):
                    component = x[c]
                    for r in range(lanes):
                        code = affine_code(component[r], shift[r], divisor[r], levels)
                        difference = component[r] - (shift[r] + code * scale[r])
                        error[r] += difference * difference
            table[start, k] = error.astype(np.float64).sum()
