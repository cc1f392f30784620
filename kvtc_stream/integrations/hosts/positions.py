"""Where in its prompt a page begins, from the page itself, for hosts that do not say.

Keys carry RoPE. Taken off for the right position, their mean over a page is close to the mean that
the calibration saw; for a wrong one it is turned away from it, each pair of channels by another
angle. Pages begin at multiples of their size, so there are few candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import Rope
from kvtc_stream.io.dlpack import to_numpy

#: How many times farther than the best candidate the second must be to be sure of the first.
#: ``benchmarks/results/positions.json``: all of 10,416 pages of SmolLM2 were found, all but 20 of
#: them surely; 15,414 whose position was no candidate had 1.20 at the most, and 1.23 under other
#: rotary tables.
MARGIN = 2.0
#: How far from the calibration's mean the best may be, of the mean's own length.
DISTANCE = 0.7
#: The slowest pairs turn by less than this from one candidate to the next and tell nothing.
_LEAST_TURN = 0.05


@dataclass(frozen=True)
class FoundPosition:
    """Where a page seems to begin.

    Attributes
    ----------
    position
        Of the first token, of the best candidate.
    distance
        How far mean keys are from the calibration's there: the norm of the difference over that of
        the mean, in channels that turn.
    margin
        Distance of the second-best candidate over that of the best.
    """

    position: int
    distance: float
    margin: float

    @property
    def sure(self) -> bool:
        """Whether to rely on it. Otherwise the page is to be stored bit for bit."""
        return self.margin >= MARGIN and self.distance <= DISTANCE


class PositionFinder:
    """Finds positions of pages of one section.

    Parameters
    ----------
    calibration
        Of the model.
    page_tokens
        Tokens of a page: pages begin at multiples of it.
    most
        No page begins at this position or later.
    section
        Which section the pages are of.

    Raises
    ------
    UnsupportedError
        The layers have no RoPE, or not all the same: then pages do not tell.
    """

    def __init__(
        self, calibration: Calibration, page_tokens: int, most: int, *, section: int = 0
    ) -> None:
        shape = calibration.geometry.sections[section]
        tables = set(shape.rope or (None,))
        rope = tables.pop()
        if tables or rope is None or rope.axes:
            raise UnsupportedError(
                "positions are found by RoPE, of which this section's layers have none, or not all "
                "the same: take a host that tells positions"
            )
        layers, heads = len(shape.layers), shape.kv_heads
        mean = np.empty((layers, heads * shape.k_dim), np.float32)
        for part in next(iter(calibration.sections[section].bases.values())):
            of_k = part.mean[: len(part.k_layers) * mean.shape[1]]
            mean[list(part.k_layers)] = of_k.reshape(-1, mean.shape[1])
        self._shape, self._rope = shape, rope
        self._starts = np.arange(0, most, page_tokens)
        frequencies = np.array(rope.inv_freq)
        self._turning = frequencies * page_tokens >= _LEAST_TURN
        self._frequencies = frequencies[self._turning]
        expected = _pairs(mean.reshape(layers, heads, -1), rope)[..., self._turning]
        self._expected = expected.reshape(-1, len(self._frequencies)) * rope.scale
        #: [candidates, pairs]
        self._turns = np.exp(-1j * np.outer(self._starts, self._frequencies))

    def find(self, k: Any) -> FoundPosition:
        """Where a page with keys [layers, kv_heads, tokens, head_dim], in host memory, begins.

        The last page of a prompt may have fewer tokens than others.
        """
        keys = to_numpy(k, "k").astype(np.float32)
        pairs = _pairs(keys, self._rope)[..., self._turning]
        # Tokens go back to the place of the first; then a page's mean turns as one.
        within = np.exp(-1j * np.outer(np.arange(pairs.shape[2]), self._frequencies))
        mean = (pairs * within).mean(axis=2).reshape(-1, len(self._frequencies))
        # |turned − expected|² of every candidate, by one product over pairs.
        energy = float((np.abs(mean) ** 2).sum() + (np.abs(self._expected) ** 2).sum())
        along = (self._turns @ (mean * self._expected.conj()).sum(axis=0)).real
        norm = float(np.sqrt((np.abs(self._expected) ** 2).sum()))
        distances = np.sqrt(np.maximum(energy - 2 * along, 0)) / max(norm, 1e-30)
        if not np.isfinite(distances).all():
            return FoundPosition(0, np.inf, 0.0)
        order = np.argsort(distances)
        best = float(distances[order[0]])
        second = float(distances[order[1]]) if len(order) > 1 else np.inf
        return FoundPosition(int(self._starts[order[0]]), best, second / max(best, 1e-30))


def _pairs(x: NDArray[np.float32], rope: Rope) -> NDArray[np.complex64]:
    """The channels that RoPE turns together, as complex numbers."""
    turned, half = x[..., : rope.rotary_dim], rope.rotary_dim // 2
    if rope.interleaved:
        return turned[..., 0::2] + 1j * turned[..., 1::2]
    return turned[..., :half] + 1j * turned[..., half:]
