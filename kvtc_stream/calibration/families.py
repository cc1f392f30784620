"""Families: the frequency tables of a uniform quantiser, and what each of its steps would cost.

Component ``c`` of a token of class ``k`` at base step ``j`` has the step
``unit · 2^((j + k) / 4)`` and codes the nearest integer of ``x / step``. The symbols of every
``(j, k, c)`` have a distribution of their own. A stream can hold few tables, so distributions of
similar shape share one, a family: vector quantisation with the code length as the distortion
(P. A. Chou, T. Lookabaugh and R. M. Gray, IEEE Trans. ASSP 37(1), 1989), by Lloyd's algorithm.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from kvtc_stream import environment
from kvtc_stream.coding.rans import CLASSES, ESCAPE, TOTAL, ZERO, Families

#: Steps in an octave.
STEPS_PER_OCTAVE = 4

#: Rows that the histogram of all classes counts for in the histogram of one.
_PRIOR = 16.0
#: Most components whose histograms the families are fitted to.
_FITTED = 64
_ITERATIONS = 12
#: Most histograms that the families are fitted to, spread over components, steps and classes.
_HISTOGRAMS = 8192
#: A column below this frequency escapes. Its escapes take 16 bits more than frequency 1 would,
#: while a frequency costs all other symbols 1 / (4096 · ln 2) bits.
_LEAST = 1 / (16 * np.log(2))

_F32 = np.float32

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@dataclass(frozen=True, slots=True, eq=False)
class FamilyTables:
    """Families, and mean costs per token and component of every base step.

    Attributes
    ----------
    frequencies
        uint16 [families, 256]: of the columns of :class:`~kvtc_stream.coding.rans.Families`. All
        families code 0, and all escape; the first is that of components that are always 0.
    ids
        uint8 [steps, 16, components]: the family of each base step, class and component.
    rate
        float32 [steps, components]: bits, escapes with all their words.
    distortion
        float32 [steps, components]: weighted squared error plus ``(1 - g)² · energy``, where
        ``g = E[w x x̂] / E[w x²]``. The error that is left when ``x̂`` is scaled averages out over
        many tokens; an attenuation that they share adds up.
    energy
        float64 [components]: ``E[w x²]``. Leaving a component out costs twice this.
    """

    frequencies: npt.NDArray[np.uint16]
    ids: npt.NDArray[np.uint8]
    rate: npt.NDArray[np.float32]
    distortion: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float64]


class SymbolCounter:
    """Counts symbols on the CPU. Has no state; safe across threads.

    Attributes
    ----------
    xp
        The array module of the counts, and of what is computed from them.
    components
        That are measured together; they need 1 MiB each with 48 steps and 16 classes.
    workers
        Threads that measure at the same time.
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
        """Histograms of all steps and classes, and sums of base steps over all rows.

        Parameters
        ----------
        x, weights
            float32 [rows, components] and float64 [rows], rows by class.
        deltas
            float64 [steps + 15]: of each sum of base step and class.
        present, bounds
            Class ``present[i]`` has rows ``bounds[i]`` to ``bounds[i + 1]``.
        steps
            Base steps.

        Returns
        -------
        counts
            float32 [components, steps + 15, present classes, 256], of ``xp``.
        sums
            float64 [components, steps, 3]: of the squared error, of ``x x̂``, and of values that
            take more than 16 bits.
        """
        by_component = np.ascontiguousarray(x.T)
        counts = np.zeros((len(by_component), deltas.size, present.size, 256), np.float32)
        sums = np.zeros((len(by_component), steps, 3))
        _measure(by_component, weights, deltas, present, bounds, counts, sums)
        return counts, sums

    def get(self, x: Any) -> npt.NDArray[Any]:
        """A NumPy array with the values of one of ``xp``."""
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
    """Fit families to sampled rows, and measure what they cost.

    Parameters
    ----------
    coefficients
        float32 [rows, components].
    classes
        uint8 [rows]: the class of each row, 0…15.
    unit
        The step of base step 0 and class 0, 1e-30…1e30.
    steps
        Number of base steps, 1…256.
    families
        Most families, 2…256.
    weights
        float32 [rows]: importance of each row's error, not negative; 1 by default.
    counter
        Where symbols are counted: on the CPU by default.

    Raises
    ------
    ValueError
        If an argument is not as above, or a row has a NaN or an infinity.

    Notes
    -----
    The histogram of a class counts all rows, quantised alike, as 16 more of its own, so that a
    class with few rows, or none, has usable families. Symbols are rounded in float64, ties to
    even, and saturate at ±(2³¹ - 1). Runs on all CPUs, or where ``counter`` does; on one machine
    equal arguments give equal tables.
    """
    counter = counter or SymbolCounter()
    xp = counter.xp
    importance = _checked(coefficients, classes, weights)
    if not (1e-30 <= unit <= 1e30 and 1 <= steps <= 256 and 2 <= families <= 256):
        raise ValueError(
            "expected a unit of 1e-30…1e30, 1…256 steps and 2…256 families; found unit "
            f"{unit}, {steps} steps, {families} families"
        )
    rows, components = coefficients.shape
    order = np.argsort(classes, kind="stable")
    class_rows = np.bincount(classes, minlength=CLASSES)
    present = np.flatnonzero(class_rows)
    bounds = np.append(0, np.cumsum(class_rows[present]))
    deltas = unit * np.exp2(np.arange(steps + CLASSES - 1) / STEPS_PER_OCTAVE)

    by_class, of_rows = coefficients[order], importance[order]

    def measure(chosen: npt.NDArray[np.intp]) -> tuple[Any, npt.NDArray[np.float64]]:
        return counter(by_class[:, chosen], of_rows, deltas, present, bounds, steps)

    # Denser at the front: the first components, of most variance, differ most and cost most.
    fitted = min(components, _FITTED)
    counts, _ = measure(np.unique(np.arange(fitted) ** 2 * components // fitted**2))
    histograms = _of_classes(counts, present, steps, rows, xp)
    histograms = histograms[:, :, xp.asarray(present)].reshape(-1, 256)
    histograms = counter.get(histograms[:: -(-len(histograms) // _HISTOGRAMS)])
    frequencies = _fit(histograms, families)
    bits = xp.asarray(Families(frequencies).bits.T.copy())

    ids = np.empty((steps, CLASSES, components), np.uint8)
    rate = np.empty((steps, components), np.float32)
    sums = np.empty((components, steps, 3))

    def assign(first: int) -> None:
        chosen = np.arange(first, min(first + counter.components, components))
        counts, sums[chosen] = measure(chosen)
        costs = (counts.reshape(-1, 256) @ bits).reshape(*counts.shape[:-1], -1)
        # The cost is linear in the histogram, so costs are smoothed as histograms are.
        best = _of_classes(costs, present, steps, rows, xp).argmin(axis=-1)
        ids[:, :, chosen] = counter.get(best.astype(np.uint8)).transpose(1, 2, 0)
        total = 32 * sums[chosen, :, 2]  # values beyond 16 bits
        for i, k in enumerate(present.tolist()):
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
    energy = np.array([importance @ np.square(c, dtype=np.float64) for c in coefficients.T]) / rows
    gain = np.divide(
        sums[..., 1] / rows, energy[:, None], out=np.ones(sums.shape[:2]), where=energy[:, None] > 0
    )
    distortion = sums[..., 0] / rows + np.square(1 - gain) * energy[:, None]
    with np.errstate(over="ignore"):
        distortion = distortion.T.astype(np.float32)
    return FamilyTables(frequencies, ids, rate, distortion, energy)


def _checked(
    coefficients: npt.NDArray[np.float32],
    classes: npt.NDArray[np.uint8],
    weights: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float64]:
    """The weights."""
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


def _of_classes(values: Any, present: npt.NDArray[np.intp], steps: int, rows: int, xp: Any) -> Any:
    """[components, steps, 16, n] of base steps and classes, smoothed towards that of all rows.

    ``values`` is [components, steps + 15, present classes, n] sums over the rows of a class.
    """
    prior = values.sum(axis=2) * _F32(_PRIOR / rows)
    out = xp.empty((len(values), steps, CLASSES, values.shape[-1]), np.float32)
    for k in range(CLASSES):
        out[:, :, k] = prior[:, k : k + steps]
    for i, k in enumerate(present.tolist()):
        out[:, :, k] += values[:, k : k + steps, i]
    return out


def _fit(histograms: npt.NDArray[np.float32], families: int) -> npt.NDArray[np.uint16]:
    """Lloyd's algorithm with integer tables; the first family stays that of nothing but 0."""
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
    """Frequencies of histograms [n, 256]; rare columns become escapes."""
    p = counts / counts.sum(axis=1, keepdims=True, dtype=np.float64)
    kept = p * TOTAL >= _LEAST
    kept[:, [ZERO, ESCAPE]] = True
    p[:, ESCAPE] += np.where(kept, 0, p).sum(axis=1)
    rows = [_normalise(*row) for row in zip(p, kept, strict=True)]
    return np.array(rows, np.uint16).reshape(-1, 256)


def _normalise(
    weights: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint16]:
    """Frequencies of 4096: at least 1 where kept, the rest by largest remainders; else 0."""
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
    """Histograms of all steps and classes, and sums of base steps over all rows.

    ``x`` is float32 [components, rows], rows by class; class ``present[i]`` ends before row
    ``bounds[i + 1]``. ``sums`` are of the squared error, of ``x x̂``, and of values that take
    more than 16 bits.
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
                    # Rounds to the nearest integer, ties to even: no bits are left for a fraction.
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
