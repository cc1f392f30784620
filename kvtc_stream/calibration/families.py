"""Families: the frequency tables of the uniform quantiser, and the cost of each step size.

Component ``c`` of a token with step class ``k`` at base step ``j`` has the step size
``unit · 2^((j + k) / 4)``, and codes ``x / step`` rounded to an integer, its symbol. Symbols of
each ``(j, k, c)`` have their own distribution. A stream can hold few frequency tables, so similar
distributions share one, called a family: vector quantisation with the code length as distortion
(P. A. Chou, T. Lookabaugh and R. M. Gray, IEEE Trans. ASSP 37(1), 1989), by Lloyd's algorithm.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from kvtc_stream.coding.rans import CLASSES, ESCAPE, TOTAL, ZERO, Families
from kvtc_stream.io import environment

#: Base steps in an octave of step sizes.
STEPS_PER_OCTAVE = 4

#: The histogram of a step class is smoothed with that of all classes, scaled to so many rows.
_PRIOR = 16.0
#: Tables are fitted to histograms of at most so many components.
_FITTED = 64
_ITERATIONS = 12
#: At most so many histograms are fitted to, spread over components, steps and classes.
_HISTOGRAMS = 8192
#: A symbol whose frequency would be below this escapes. An escape takes 16 bits more than
#: frequency 1 would, while frequency 1 costs every other symbol 1 / (4096 · ln 2) bits.
_MIN_FREQUENCY = 1 / (16 * np.log(2))

_F32 = np.float32

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@dataclass(frozen=True, eq=False)
class FamilyTables:
    """Frequency tables, and mean costs per token and component at every base step.

    Attributes
    ----------
    frequencies
        uint16 [families, 256], see :class:`~kvtc_stream.coding.rans.Families`. Every table has
        the symbol 0 and the escape; the first is for components that are always 0.
    ids
        uint8 [steps, 16, components]: the table for each base step, step class and component.
    rate
        float32 [steps, components]: bits, including those of escaped values.
    distortion
        float32 [steps, components]: weighted squared error plus ``(1 - g)² · energy``, where
        ``g = E[w x x̂] / E[w x²]`` is the gain of the quantiser. The second term counts attenuation
        twice: all tokens share it, so it adds up over them, while other errors average out.
    energy
        float64 [components]: ``E[w x²]``. Not coding a component costs twice this.
    """

    frequencies: npt.NDArray[np.uint16]
    ids: npt.NDArray[np.uint8]
    rate: npt.NDArray[np.float32]
    distortion: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float64]

    @cached_property
    def coder(self) -> Families:
        """What codes with the tables: looking symbols up takes larger ones, which are kept."""
        return Families(self.frequencies)


class SymbolCounter:
    """Counts symbols on the CPU. Has no state; safe across threads.

    Attributes
    ----------
    xp
        The array module of the counts, and of results computed from them.
    components
        How many are measured together; each needs 1 MiB with 48 steps and 16 step classes.
    workers
        How many threads measure at the same time.
    """

    xp: Any = np
    components = 16
    workers = environment.threads()

    def __call__(
        self,
        x: npt.NDArray[np.float32],
        weights: npt.NDArray[np.float64],
        deltas: npt.NDArray[np.float64],
        present: npt.NDArray[np.intp],
        bounds: npt.NDArray[np.intp],
        steps: int,
    ) -> tuple[Any, npt.NDArray[np.float64]]:
        """Histograms for all steps and step classes, and sums over all rows for each base step.

        Parameters
        ----------
        x, weights
            float32 [rows, components] and float64 [rows], sorted by step class.
        deltas
            float64 [steps + 15]: the step size for each sum of base step and step class.
        present, bounds
            Step class ``present[i]`` has rows ``bounds[i]`` to ``bounds[i + 1]``.
        steps
            Number of base steps.

        Returns
        -------
        counts
            float32 [components, steps + 15, present classes, 256], of ``xp``.
        sums
            float64 [components, steps, 3]: squared error, ``x x̂``, and the number of symbols beyond
            16 bits.
        """
        by_component = np.ascontiguousarray(x.T)
        counts = np.zeros((len(by_component), deltas.size, present.size, 256), np.float32)
        sums = np.zeros((len(by_component), steps, 3))
        _measure(by_component, weights, deltas, present, bounds, counts, sums)
        return counts, sums

    def get(self, x: Any) -> npt.NDArray[Any]:
        """Copy an array of ``xp`` to a NumPy array."""
        return x  # type: ignore[no-any-return]


def fit_families(
    coefficients: npt.NDArray[np.float32],
    classes: npt.NDArray[np.uint8],
    *,
    unit: float,
    steps: int,
    families: int = 64,
    weights: npt.NDArray[np.float32] | None = None,
    counter: SymbolCounter | None = None,
) -> FamilyTables:
    """Fit frequency tables to sampled rows, and measure the costs of coding with them.

    Parameters
    ----------
    coefficients
        float32 [rows, components].
    classes
        uint8 [rows]: the step class of each row, 0…15.
    unit
        The step size at base step 0 and step class 0, 1e-30…1e30.
    steps
        Number of base steps, 1…256.
    families
        Maximum number of tables, 2…256.
    weights
        float32 [rows]: importance of each row's error, not negative; 1 by default.
    counter
        Counts the symbols; on the CPU by default.

    Raises
    ------
    ValueError
        An argument is not as above, or a row has a NaN or an infinity.

    Notes
    -----
    The histogram of a step class is smoothed with that of all rows, which counts as 16 rows more,
    so that a class with few rows, or none, has a usable table. Symbols are rounded in float64, ties
    to even, and saturate at ±(2³¹ - 1). Runs on all CPUs, or where ``counter`` does. On one
    machine, equal arguments give equal tables.
    """
    importance = _checked(coefficients, classes, weights)
    if not (1e-30 <= unit <= 1e30 and 1 <= steps <= 256 and 2 <= families <= 256):
        raise ValueError(
            "expected a unit of 1e-30…1e30, 1…256 steps and 2…256 families; found unit "
            f"{unit}, {steps} steps, {families} families"
        )
    sample = _Sample.of(coefficients, classes, importance, unit, steps, counter or SymbolCounter())
    frequencies = _fit(sample.histograms(), families)
    ids, rate, sums = sample.assigned(frequencies)
    rows = len(coefficients)
    energy = np.array([importance @ np.square(c, dtype=np.float64) for c in coefficients.T]) / rows
    gain = np.divide(
        sums[..., 1] / rows, energy[:, None], out=np.ones(sums.shape[:2]), where=energy[:, None] > 0
    )
    distortion = sums[..., 0] / rows + np.square(1 - gain) * energy[:, None]
    with np.errstate(over="ignore"):
        distortion = distortion.T.astype(np.float32)
    return FamilyTables(frequencies, ids, rate, distortion, energy)


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """Sampled rows sorted by step class, and how their symbols are counted.

    Fields are the arguments of :class:`SymbolCounter`; ``rows`` and ``weights`` its ``x, weights``.
    """

    rows: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float64]
    deltas: npt.NDArray[np.float64]
    present: npt.NDArray[np.intp]
    bounds: npt.NDArray[np.intp]
    steps: int
    counter: SymbolCounter

    @classmethod
    def of(
        cls,
        coefficients: npt.NDArray[np.float32],
        classes: npt.NDArray[np.uint8],
        importance: npt.NDArray[np.float64],
        unit: float,
        steps: int,
        counter: SymbolCounter,
    ) -> _Sample:
        order = np.argsort(classes, kind="stable")
        class_rows = np.bincount(classes, minlength=CLASSES)
        present = np.flatnonzero(class_rows)
        bounds = np.append(0, np.cumsum(class_rows[present]))
        deltas = unit * np.exp2(np.arange(steps + CLASSES - 1) / STEPS_PER_OCTAVE)
        return cls(coefficients[order], importance[order], deltas, present, bounds, steps, counter)

    def count(self, chosen: npt.NDArray[np.intp]) -> tuple[Any, npt.NDArray[np.float64]]:
        """Counts and sums of the ``chosen`` components, see :class:`SymbolCounter`."""
        x = self.rows[:, chosen]
        return self.counter(x, self.weights, self.deltas, self.present, self.bounds, self.steps)

    def smoothed(self, values: Any) -> Any:
        """[components, steps, 16, n] for base steps and classes, smoothed towards all rows.

        ``values`` is [components, steps + 15, present classes, n], sums over the rows of a class.
        """
        xp, steps = self.counter.xp, self.steps
        prior = values.sum(axis=2) * _F32(_PRIOR / len(self.rows))
        out = xp.empty((len(values), steps, CLASSES, values.shape[-1]), np.float32)
        for k in range(CLASSES):
            out[:, :, k] = prior[:, k : k + steps]
        for i, k in enumerate(self.present.tolist()):
            out[:, :, k] += values[:, k : k + steps, i]
        return out

    def histograms(self) -> npt.NDArray[np.float32]:
        """Some of the smoothed histograms [n, 256], to fit tables to."""
        components = self.rows.shape[1]
        # Denser at the front: the first components, of most variance, differ most and cost most.
        fitted = min(components, _FITTED)
        counts, _ = self.count(np.unique(np.arange(fitted) ** 2 * components // fitted**2))
        histograms = self.smoothed(counts)[:, :, self.counter.xp.asarray(self.present)]
        histograms = histograms.reshape(-1, 256)
        return self.counter.get(histograms[:: -(-len(histograms) // _HISTOGRAMS)])

    def assigned(
        self, frequencies: npt.NDArray[np.uint16]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """The cheapest table for each step, class and component: ids, rate, and the sums of
        :class:`SymbolCounter`."""
        counter, xp, steps = self.counter, self.counter.xp, self.steps
        rows, components = self.rows.shape
        bits = xp.asarray(Families(frequencies).bits.T.copy())
        ids = np.empty((steps, CLASSES, components), np.uint8)
        rate = np.empty((steps, components), np.float32)
        sums = np.empty((components, steps, 3))

        def assign(first: int) -> None:
            chosen = np.arange(first, min(first + counter.components, components))
            counts, sums[chosen] = self.count(chosen)
            costs = (counts.reshape(-1, 256) @ bits).reshape(*counts.shape[:-1], -1)
            # The cost is linear in the histogram, so costs are smoothed as histograms are.
            best = self.smoothed(costs).argmin(axis=-1)
            ids[:, :, chosen] = counter.get(best.astype(np.uint8)).transpose(1, 2, 0)
            total = 32 * sums[chosen, :, 2]  # symbols beyond 16 bits
            for i, k in enumerate(self.present.tolist()):
                of_class = costs[:, k : k + steps, i]
                total += counter.get(xp.take_along_axis(of_class, best[:, :, k, None], -1)[..., 0])
            rate[:, chosen] = total.T / rows

        firsts = range(0, components, counter.components)
        if counter.workers == 1:
            for first in firsts:
                assign(first)
        else:
            with ThreadPoolExecutor(counter.workers) as pool:
                for _ in pool.map(assign, firsts):
                    pass
        return ids, rate, sums


def _checked(
    coefficients: npt.NDArray[np.float32],
    classes: npt.NDArray[np.uint8],
    weights: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float64]:
    """Check the arguments of :func:`fit_families`; return the weights as float64."""
    if coefficients.ndim != 2 or coefficients.dtype != np.float32 or not coefficients.size:
        raise ValueError(
            "coefficients must be float32 [rows, components], at least one of each, found "
            f"{coefficients.dtype} {list(coefficients.shape)}"
        )
    rows = len(coefficients)
    if classes.dtype != np.uint8 or classes.shape != (rows,) or (classes >= CLASSES).any():
        raise ValueError(
            f"classes must be uint8 [{rows}] of 0…{CLASSES - 1}, found {classes.dtype} "
            f"{list(classes.shape)}, greatest {classes.max(initial=0)}"
        )
    bad = np.flatnonzero(~np.isfinite(coefficients).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{bad.size} rows have a NaN or an infinity, the first is row {bad[0]}; leave them out"
        )
    if weights is None:
        weights = np.ones(rows, np.float32)
    if weights.dtype != np.float32 or weights.shape != (rows,):
        raise ValueError(
            f"weights must be float32 [{rows}], found {weights.dtype} {list(weights.shape)}"
        )
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("weights must be finite and not negative; found others")
    return weights.astype(np.float64)


def _fit(histograms: npt.NDArray[np.float32], families: int) -> npt.NDArray[np.uint16]:
    """Lloyd's algorithm with integer tables; the first is kept for components that are always 0."""
    zero = _tables(np.eye(1, 256, ZERO))
    p = histograms / histograms.sum(axis=1, keepdims=True)
    lengths = 16 * p[:, ESCAPE] - np.sum(p * np.log2(p, where=p > 0, out=np.zeros_like(p)), axis=1)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    count = min(order.size, families - 1)
    seeds = order[np.arange(count) * order.size // max(count, 1)]
    tables = np.concatenate([zero, _tables(histograms[seeds])])
    for _ in range(_ITERATIONS):
        family = (histograms @ Families(tables).bits.T).argmin(axis=1)
        members = (np.arange(1, len(tables))[:, None] == family).astype(np.float32)
        members = members[members.any(axis=1)]
        tables = np.concatenate([zero, _tables(members @ histograms)])
    return tables


def _tables(counts: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """Frequency tables of histograms [n, 256]; rare symbols become escapes."""
    p = counts / counts.sum(axis=1, keepdims=True, dtype=np.float64)
    kept = p * TOTAL >= _MIN_FREQUENCY
    kept[:, [ZERO, ESCAPE]] = True
    p[:, ESCAPE] += np.where(kept, 0, p).sum(axis=1)
    rows = [_normalise(*row) for row in zip(p, kept, strict=True)]
    return np.array(rows, np.uint16).reshape(-1, 256)


def _normalise(
    weights: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint16]:
    """Integer frequencies that add up to 4096: at least 1 where ``kept``, else 0.

    What is left over goes to the largest remainders.
    """
    left = TOTAL - np.count_nonzero(kept)
    share = np.where(kept, weights, 0)
    share = np.maximum(share * (TOTAL / share.sum()) - 1, 0)
    share *= left / share.sum()
    floors = np.floor(share)
    short = left - int(floors.sum())
    floors[np.argsort(floors - share, kind="stable")[:short]] += 1
    frequencies: npt.NDArray[np.uint16] = (floors + kept).astype(np.uint16)
    return frequencies


@_jit
def _measure(x, weights, deltas, present, bounds, counts, sums):  # type: ignore[no-untyped-def]
    """Fill ``counts`` and ``sums`` as :class:`SymbolCounter` says.

    ``x`` is float32 [components, rows], rows sorted by step class.
    """
    steps = sums.shape[1]
    for c in range(x.shape[0]):
        for s in range(deltas.size):
            delta = deltas[s]
            for i in range(present.size):
                histogram = counts[c, s, i]
                error = 0.0
                product = 0.0
                wide = 0
                for r in range(bounds[i], bounds[i + 1]):
                    value = np.float64(x[c, r])
                    symbol = min(max(value / delta, -2147483647.0), 2147483647.0)
                    # Round to the nearest integer, ties to even: adding 1.5 · 2⁵² leaves no bits
                    # for a fraction.
                    symbol = (symbol + 6755399441055744.0) - 6755399441055744.0
                    column = min(np.uint64(np.int64(symbol) + ZERO), np.uint64(ESCAPE))
                    if column == ESCAPE:
                        wide += symbol > 32767 or symbol < -32767
                    histogram[column] += _F32(1)
                    decoded = symbol * delta
                    error += weights[r] * (value - decoded) ** 2
                    product += weights[r] * value * decoded
                j = s - present[i]
                if 0 <= j < steps:
                    sums[c, j, 0] += error
                    sums[c, j, 1] += product
                    sums[c, j, 2] += wide
