"""Bit allocation by dynamic programming (KVTC, arXiv 2511.01815, section 3).

The plan of a part is a sequence of bands. A coded band costs ``size · bits + 32`` bits per token,
and its error is in the tables. A component outside bands costs no bits; its error is its energy.
With ``gain(band) = energy of its components - its error``,

    best[i][b] = max( best[i - 1][b],
                      max over bands of i - size … i:  best[i - size][b - cost] + gain(band) )

is the largest reduction of the error by a plan of the first ``i`` components within ``b`` bits.
Gains are summed instead of errors because a component that is left out then adds nothing, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from kvtc_stream.calibration.band_tables import ErrorTables
from kvtc_stream.formats.plan import Band, Quantiser
from kvtc_stream.io import environment

#: Components that one task processes, and budgets that stay in cache during one pass.
_ROWS = 128
_CELLS = 2048

_jit = numba.njit(cache=True, nogil=True)


@dataclass(frozen=True, slots=True)
class Allocation:
    """A plan of one part, with its cost and predicted error.

    Attributes
    ----------
    bands
        From component 0; components after the last band are not coded.
    bits
        Bits per token that the bands take before entropy coding.
    error
        Mean squared error per token by the tables, including what lies outside the basis.
    """

    bands: tuple[Band, ...]
    bits: int
    error: float


class Frontier:
    """The optimal plans of one part for every budget up to a limit; made by :func:`frontier`.

    Attributes
    ----------
    unit
        Budgets are multiples of this many bits, the greatest common divisor of all bands' costs.
    errors
        float64 [max_bits // unit + 1]: minimum error within ``i · unit`` bits; never ascends.
    """

    def __init__(
        self,
        tables: ErrorTables,
        unit: int,
        errors: npt.NDArray[np.float64],
        choices: npt.NDArray[np.uint8],
    ) -> None:
        self.unit = unit
        self.errors = errors
        self._tables = tables
        self._choices = choices

    @property
    def max_bits(self) -> int:
        """The largest budget."""
        return (self.errors.size - 1) * self.unit

    def allocation(self, bits: int) -> Allocation:
        """The optimal plan within this many bits per token."""
        if not 0 <= bits < self.max_bits + self.unit:
            raise ValueError(f"bits must be in 0…{self.max_bits}, found {bits}")
        tables = self._tables
        options = _options(tables)
        left = bits // self.unit
        position = tables.components
        bands: list[Band] = []
        error = 0.0
        while position:
            choice = int(self._choices[position - 1, left // 2]) >> (4 * (left % 2)) & 15
            if choice == 0:
                position -= 1
                error += float(tables.energy[position])
                if bands and bands[-1].quantiser is Quantiser.NONE:
                    bands[-1] = Band(bands[-1].size + 1, Quantiser.NONE)
                elif bands:
                    bands.append(Band(1, Quantiser.NONE))
            else:
                band = options[choice - 1]
                position -= band.size
                left -= band.bits // self.unit
                size, type_ = divmod(choice - 1, len(tables.types))
                error += float(tables.errors[position, size, type_])
                bands.append(band)
        bands.reverse()
        return Allocation(tuple(bands), sum(b.bits for b in bands), tables.dropped + error)

    def allocation_for_error(self, error: float) -> Allocation:
        """The optimal plan with the fewest bits whose error is at most ``error``.

        Raises
        ------
        ValueError
            ``max_bits`` bits are not enough.
        """
        enough = np.flatnonzero(self.errors <= error)
        if not enough.size:
            raise ValueError(
                f"an error of {error:g} needs more than {self.max_bits} bits per token, which "
                f"reach {self.errors[-1]:g}; allow a greater error or more bits"
            )
        return self.allocation(int(enough[0]) * self.unit)


def frontier(
    tables: ErrorTables,
    max_bits: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Frontier:
    """Find the optimal plan for every budget of 0…``max_bits`` bits per token.

    Parameters
    ----------
    tables
        Error tables with at most 15 combinations of size and type.
    max_bits
        Maximum budget per token, before entropy coding.
    progress
        Called with the number of components done, and of all components.

    Notes
    -----
    Optimal for the tables' sizes and types, up to the rounding of float64 sums.

    Memory: the result keeps half a byte per component and unit of the budget (2 bits). While it
    runs, it needs 8 bytes per unit for each component of the longest band. For 40,960 components
    and bits, these are 420 MB and 250 MB. Runs on all CPUs.
    """
    options = _options(tables)
    if len(options) > 15:
        raise ValueError(f"at most 15 kinds of bands can be planned, found {len(options)}")
    if max_bits < 0:
        raise ValueError(f"max_bits must not be negative, found {max_bits}")
    unit = math.gcd(*(band.bits for band in options))
    sizes = np.array([band.size for band in options])
    costs = np.array([band.bits // unit for band in options])
    components = tables.components
    cells = max_bits // unit + 1
    cumulative = np.concatenate([[0.0], np.cumsum(tables.energy)])
    gains = _gains(tables, sizes, cumulative)

    # A cell depends only on earlier rows of the same and of smaller budgets. So budgets are cut
    # into one range per CPU, and each range is one block of rows behind the range below it.
    workers = max(1, min(environment.threads(), cells // _CELLS))
    cuts = np.linspace(0, cells // 2, workers + 1).astype(int) * 2
    cuts[-1] = cells
    blocks = -(-components // _ROWS)
    longest = int(sizes.max())
    best = np.zeros((min(components, longest + workers * _ROWS) + 1, cells))
    choices = np.zeros((components, (cells + 1) // 2), np.uint8)

    def advance(block: int, worker: int) -> None:
        rows = block * _ROWS, min(components, (block + 1) * _ROWS)
        _advance(best, choices, gains, sizes, costs, *rows, cuts[worker], cuts[worker + 1])

    with ThreadPoolExecutor(workers) as pool:
        for step in range(blocks + workers - 1):
            running = [
                pool.submit(advance, step - w, w) for w in range(workers) if 0 <= step - w < blocks
            ]
            for future in running:
                future.result()
            if progress is not None:
                progress(max(0, min(components, (step - workers + 2) * _ROWS)), components)
    errors = tables.dropped + cumulative[-1] - best[components % best.shape[0]]
    return Frontier(tables, unit, errors, choices)


def _gains(
    tables: ErrorTables, sizes: npt.NDArray[np.int64], cumulative: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Gain of each option's band from each component on: [components, options].

    ``-inf`` where the band would reach beyond the last component.
    """
    gains = np.full((tables.components, len(sizes)), -np.inf)
    for k, size in enumerate(sizes):
        if size <= tables.components:
            energy = cumulative[size:] - cumulative[:-size]
            gains[: energy.size, k] = (
                energy - tables.errors[: energy.size].reshape(energy.size, -1)[:, k]
            )
    return gains


def allocate(
    tables: ErrorTables,
    bits: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Allocation:
    """The optimal plan within ``bits`` bits per token; see :func:`frontier` for the cost."""
    return frontier(tables, bits, progress=progress).allocation(bits)


def allocate_for_error(
    tables: ErrorTables,
    error: float,
    max_bits: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Allocation:
    """The optimal plan with the fewest bits per token whose error is at most ``error``.

    Tries budgets from 1/16 of ``max_bits`` up, doubling each time, so that a large error takes
    little time.

    Raises
    ------
    ValueError
        ``max_bits`` bits are not enough.
    """
    bits = max_bits // 16
    while True:
        plans = frontier(tables, bits, progress=progress)
        if bits == max_bits or plans.errors[-1] <= error:
            return plans.allocation_for_error(error)
        bits = min(max(2 * bits, 1), max_bits)


def _options(tables: ErrorTables) -> list[Band]:
    """The bands that may be chosen, in the order of the tables' axes.

    Choice 0 leaves a component out; choice ``k + 1`` is option ``k``.
    """
    return [Band(size, quantiser) for size in tables.sizes for quantiser in tables.types]


@_jit
def _advance(best, choices, gains, sizes, costs, first, last, low, high):  # type: ignore[no-untyped-def]
    """Fill rows ``first + 1 … last`` of ``best``, a ring buffer, for budgets ``low … high - 1``.

    ``low`` is even. Row ``i - 1`` of ``choices`` has the choices of row ``i``, two in a byte.
    """
    ring = best.shape[0]
    choice = np.empty(_CELLS, np.uint8)
    for i in range(first + 1, last + 1):
        for start in range(low, high, _CELLS):
            stop = min(start + _CELLS, high)
            choice[:] = 0
            row = best[i % ring]
            row[start:stop] = best[(i - 1) % ring, start:stop]
            for k in range(sizes.size):
                origin = i - sizes[k]
                if origin < 0 or gains[origin, k] <= 0:
                    continue
                _improve(
                    row, best[origin % ring], choice, gains[origin, k], costs[k], k + 1, start, stop
                )
            packed = choices[i - 1, start // 2 : (stop + 1) // 2]
            for j in range(packed.size):
                packed[j] = choice[2 * j] | (choice[2 * j + 1] << 4)


@_jit
def _improve(row, origin, choice, gain, cost, number, start, stop):  # type: ignore[no-untyped-def]
    """Choose the band for all budgets where it gains more, in one loop without branches."""
    first = max(start, cost)
    if first >= stop:
        return
    target = row[first:stop]
    source = origin[first - cost : stop - cost]
    mark = choice[first - start : stop - start]
    for j in range(target.size):
        candidate = source[j] + gain
        better = candidate > target[j]
        target[j] = candidate if better else target[j]
        mark[j] = number if better else mark[j]
