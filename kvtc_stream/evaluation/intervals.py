"""How sure rates and their differences are, from answers that come in groups.

Answers about one context are not independent. Where they vary more from group to group than
independent ones would, intervals are as wide as the groups make them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Of the normal distribution, for intervals of 95 %.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A rate, or a difference of rates, with its interval of 95 %."""

    value: float
    low: float
    high: float


def rate(right: NDArray[np.bool_], groups: NDArray[np.int64]) -> Estimate:
    """The share of right answers, with Wilson's interval.

    Parameters
    ----------
    right
        Whether each answer is right [answers].
    groups
        Which group each belongs to [answers].

    Notes
    -----
    The number of answers is the effective one: that of independent answers whose mean varies as
    much as these (Korn and Graubard, 1998).
    """
    p, n = float(right.mean()), float(len(right))
    if grouped := _variance_of_mean(right.astype(np.float64), groups):
        n = min(n, p * (1 - p) / grouped)
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    return Estimate(p, max(centre - half, 0.0), min(centre + half, 1.0))


def difference(
    before: NDArray[np.bool_], after: NDArray[np.bool_], groups: NDArray[np.int64]
) -> Estimate:
    """How far the share of right answers went up, for the same questions asked twice.

    Parameters
    ----------
    before, after
        Whether each question was answered rightly [questions].
    groups
        Which group each belongs to [questions].

    Notes
    -----
    The adjusted Wald interval for paired rates (Bonett and Price, 2012) adds one answer to those
    lost and one to those won: it has a width even where there are none. Its centre is a little
    nearer to zero than the difference.
    """
    change = after.astype(np.float64) - before
    n = len(change) + 2
    won, lost = ((float((change == sign).sum()) + 1) / n for sign in (1, -1))
    variance = max((won + lost - (won - lost) ** 2) / n, _variance_of_mean(change, groups))
    half = _Z * math.sqrt(variance)
    return Estimate(float(change.mean()), max(won - lost - half, -1.0), min(won - lost + half, 1.0))


def _variance_of_mean(values: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """Variance of the mean, from how it varies between groups; 0 for a single one."""
    _, which = np.unique(groups, return_inverse=True)
    deviations = np.bincount(which, values - values.mean())
    count = len(deviations)
    return float(np.square(deviations).sum() / len(values) ** 2 * count / max(count - 1, 1))
