"""Measures the tables of a part's uniform quantiser on sampled rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.arrays import HOST, Array, HostArrays
from kvtc_stream.calibration.band_tables import TOO_LARGE
from kvtc_stream.calibration.components import Components
from kvtc_stream.calibration.families import STEPS_PER_OCTAVE, fit_families
from kvtc_stream.calibration.importance import TokenImportance, classes_of, fit
from kvtc_stream.calibration.parts import Part, UniformTables
from kvtc_stream.coding.rans import MIDDLE

#: Number of base steps. In the middle step class, the largest step is ``_COARSEST`` times the
#: standard deviation of the strongest component.
STEPS = 56
_COARSEST = 2.0
#: Errors of K and V are measured on so many rows, at every fourth base step.
_ERROR_ROWS, _ERROR_STEPS = 256, 4
#: A token's importance is summed over so many components; the others are hardly ever coded.
_IMPORTANT = 1500
_WEIGHT_LOG = 4.0


def unit_of(parts: Sequence[Part]) -> float:
    """The step size at base step 0 and step class 0, the same for all parts of a section."""
    deviation = float(np.sqrt(max(float(part.spectrum[0]) for part in parts)))
    octaves = (STEPS - 1 + MIDDLE) / STEPS_PER_OCTAVE
    # Clipped to a range that all step sizes are finite in; if nothing varies, any unit will do.
    return float(np.clip(_COARSEST * deviation, 1e-20, 1e20)) / 2**octaves


def uniform_tables(
    part: Part,
    rows: Array,
    unit: float,
    split: int,
    pairs: tuple[Array, Array] | None,
    arrays: HostArrays = HOST,
) -> UniformTables:
    """Measure the tables of a part.

    Parameters
    ----------
    part
        A part with its components, and weights if there are any.
    rows
        float32 [rows, width] of ``arrays``: sampled token vectors, mean included.
    unit
        See :func:`unit_of`.
    split
        Columns before this are K, the others V.
    pairs
        Token vectors [n, width], and gradients of a loss with respect to them, if there are any.
    arrays
        The array module that does the work.
    """
    xp = arrays.xp
    mean = arrays.put(part.mean)
    analysis, synthesis = part.transforms(arrays.put, xp)
    with np.errstate(over="ignore", invalid="ignore"):
        projected = analysis.project(rows - mean)
        sound = xp.isfinite(projected).all(axis=1)
    rows, measured = rows[sound], xp.ascontiguousarray(projected[sound], np.float32)
    if len(sound) and not len(rows):
        raise ValueError(TOO_LARGE)
    coefficients = arrays.get(measured)
    importance = None
    if pairs is not None:
        importance = _importance(part, mean, analysis, synthesis, *pairs, arrays)
    weights_of_rows = None
    classes = np.full(len(rows), MIDDLE, np.uint8)
    if importance is not None:
        logarithm = importance.predict(coefficients)
        classes = classes_of(logarithm)
        weights_of_rows = np.exp(logarithm.clip(-_WEIGHT_LOG, _WEIGHT_LOG))
        weights_of_rows /= weights_of_rows.mean()
    families = fit_families(
        coefficients,
        classes,
        unit=unit,
        steps=STEPS,
        weights=weights_of_rows,
        counter=arrays.counter,
    )
    few = slice(0, _ERROR_ROWS)
    errors = _errors(rows[few], mean, measured[few], classes[few], synthesis, unit, split, arrays)
    return UniformTables(unit, families, *errors, importance)


def _importance(
    part: Part,
    mean: Array,
    analysis: Components,
    synthesis: Components,
    rows: Array,
    gradients: Array,
    arrays: HostArrays,
) -> TokenImportance | None:
    """Fit a predictor of importance to rows with gradients."""
    xp = arrays.xp
    # The gradient with respect to a coefficient is that along its direction in the synthesis.
    with np.errstate(over="ignore", invalid="ignore"):
        important = synthesis.first(min(_IMPORTANT, synthesis.rank))
        norms = xp.square(important.project(gradients), dtype=np.float64).sum(axis=1)
        coefficients = analysis.project(rows - mean)
        sound = xp.isfinite(norms) & xp.isfinite(coefficients).all(axis=1)
    return fit(arrays.get(coefficients[sound]), part.spectrum, arrays.get(norms[sound]))


def _errors(
    rows: Array,
    mean: Array,
    coefficients: Array,
    classes: NDArray[np.uint8],
    synthesis: Components,
    unit: float,
    split: int,
    arrays: HostArrays,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Relative errors of K and of V at every base step: measured at some, interpolated between."""
    xp = arrays.xp
    measured = np.unique(np.append(np.arange(0, STEPS, _ERROR_STEPS), STEPS - 1))
    exact = rows - mean
    energy = xp.square(rows, dtype=np.float64)
    of_class = arrays.put(classes[:, None].astype(np.float64))
    found = np.zeros((2, len(measured)))
    for i, j in enumerate(measured.tolist()):
        steps = unit * xp.exp2((j + of_class) / STEPS_PER_OCTAVE)
        values = (xp.rint(coefficients / steps) * steps).astype(np.float32)
        [decoded] = synthesis.expand(values, [slice(0, synthesis.width)])
        difference = xp.square(decoded - exact, dtype=np.float64)
        for side, columns in enumerate((slice(0, split), slice(split, None))):
            lost, of = (arrays.get(x[:, columns].sum(axis=1)) for x in (difference, energy))
            found[side, i] = np.sqrt(lost[of > 0] / of[of > 0]).sum() / max(len(rows), 1)
    found = np.maximum.accumulate(np.nan_to_num(found), axis=1)
    k, v = (np.interp(np.arange(STEPS), measured, errors).astype(np.float32) for errors in found)
    return k, v
