"""Grids of tokens: which step each one takes, and which one it lies on already.

All coefficients of a token of a part are integer multiples of one step, times that of their band.
Tokens' steps are whole quarter octaves above the calibration's unit, their exponents, so that
all streams of a calibration share one lattice. What comes back from a stream lies on it, but for
the cast to the cache's dtype. Stored again with the step that it has, it loses nothing more.

So each token is looked at first. Were it on the grid of an exponent ``e``, the distances ``r`` of
its coefficients from multiples of the step would be those of the cast; else they would be as of any
number, a twelfth of a squared step on average, or the coefficient itself where that is less than
half a step. The grid with the least ratio of the two sums of squares, if that says the former, is
the token's own: of those that contain one another it is the coarsest. Where that is not certain,
as of tokens of which little was coded, it is kept only if a finer step that the token is to have
would not tell the difference.

The kernel releases the GIL and keeps no state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from kvtc_stream.coding.rans import CLASSES
from kvtc_stream.io.threads import in_spans

#: Stands for the grid of a token that lies on none.
NO_GRID = -(1 << 15)
#: Of blocks: what payloads have room for.
HIGHEST_LEVEL = 127
#: Leading components that are looked at, about how many of them at a time; the part of the squared
#: distances of any number at which to give up; and exponents below that of the largest coefficient.
LEADING, AT_ONCE, GIVE_UP, RANGE = 1024, 64, 0.9, 80
#: The largest coefficient of a token of which nothing was coded, in steps that are wanted.
EMPTY = 1 / 32
#: Most of the squared distances of any number that those of a grid's may be; and the least
#: logarithm of how much likelier the grid makes them, in nats: so much, and more by the square of
#: that part, since one in some grids is as near by chance.
MOST_RATIO, LEAST_EVIDENCE, PER_SQUARE = 0.8, 4.0, 40.0
#: A grid that is finer than what is wanted costs bits, and one token that seems to have one makes
#: its whole block's finer. So it must be as unlikely by chance as this, in nats: the second number
#: for each quarter octave, as what it costs grows with them, up to the third; twice that beyond so
#: many of them as the first says, which are four bits a coefficient. Of n distances of any number
#: the chance to be a part p of their usual size is about
#: exp(−n/2 · max(ln 1/p − UNIFORM, 5/4 · (1 − p)²)): by the volume of a ball where p is small, by
#: the variance where it is near 1.
FINEST, BY_STEP, BY_CHANCE, UNIFORM = 16, 2.0, 16.0, 0.353
#: Logarithms of what the cast may have lost at most, as a part of what a finer step would lose, and
#: of how much more squared distances are a quarter octave up; where it is not so likely as this.
LOG_LOSS, LOG_HALF_OCTAVE, CERTAIN = math.log(4), math.log(2) / 2, 32.0
#: Known tokens, and their part of those with coarse steps, from which on a block is taken for one
#: that was restored.
FEWEST, ALMOST_ALL = 16, 0.9

#: Grids that a token is compared with, about.
_TRIES = 4

_F32 = np.float32
_jit = numba.njit(cache=True, nogil=True, error_model="numpy")
#: Sums in any order: in vector code.
_sum = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})


@dataclass(frozen=True)
class TokenGrids:
    """What decides the exponents of a part's tokens.

    Attributes
    ----------
    wishes
        float32 [tokens]: the exponent that each should have at offset 0, before it is rounded.
    grids
        int16 [tokens]: the exponent that each has already, or ``NO_GRID``.
    """

    wishes: npt.NDArray[np.float32]
    grids: npt.NDArray[np.int16]

    def __getitem__(self, which: npt.NDArray[np.bool_] | slice) -> TokenGrids:
        """Those of some tokens."""
        return TokenGrids(self.wishes[which], self.grids[which])

    def exponents(self, offset: float) -> npt.NDArray[np.int16]:
        """int16 [tokens] at an offset in quarter octaves."""
        wanted = np.floor(self.wishes + np.float32(offset + 0.5)).astype(np.int16)
        return np.where(self.known, self.grids, wanted)

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """bool [tokens]: which have a grid."""
        found: npt.NDArray[np.bool_] = self.grids != NO_GRID
        return found

    @property
    def offset(self) -> float:
        """That at which tokens that have a grid would have it, on average."""
        known = self.known
        return float((self.grids[known] - self.wishes[known]).mean()) if known.any() else 0.0

    def completed(self) -> TokenGrids:
        """With grids of tokens that were restored too, but whose steps are too fine to be seen.

        If almost all tokens that would have coarser steps at :attr:`offset` than most known ones
        are known, the others that would have finer ones are of the same stream.
        """
        known = self.known
        if np.count_nonzero(known) < FEWEST:
            return self
        wanted = np.floor(self.wishes + np.float32(self.offset + 0.5)).astype(np.int16)
        middle = np.median(self.grids[known])
        coarse = wanted >= middle
        if np.count_nonzero(known & coarse) < ALMOST_ALL * np.count_nonzero(coarse):
            return self
        return TokenGrids(self.wishes, np.where(known | coarse, self.grids, wanted))

    def forgotten(self) -> TokenGrids:
        """As if none had a grid."""
        return TokenGrids(self.wishes, np.full_like(self.grids, NO_GRID))


def spread(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """float32 [tokens], −½…½: what exponents of tokens without a predictor are rounded with.

    Any run of positions has them evenly (H. Weyl, "Über die Gleichverteilung von Zahlen mod. Eins",
    1916), so that an offset between two exponents is met by some tokens of each.
    """
    turns = positions.astype(np.uint32) * np.uint32(0x9E3779B9)
    return (turns.astype(np.int32) * 2.0**-32).astype(np.float32)


def settle(
    exponents: Sequence[npt.NDArray[np.int16]], offset: float
) -> tuple[int, list[npt.NDArray[np.uint8]]]:
    """A block's level, and uint8 [tokens] a part: the classes that make up exponents with it.

    The level is that of the offset if classes have room. Beyond the last class a grid that is finer
    by whole octaves takes the place of the one that is asked for, and contains it.
    """
    level = int(np.floor(offset + 0.5))
    lowest = min((int(e.min()) for e in exponents if len(e)), default=level)
    highest = max((int(e.max()) for e in exponents if len(e)), default=level)
    level = min(max(level, highest - (CLASSES - 1)), lowest, HIGHEST_LEVEL)
    if highest - level < CLASSES:  # as of most blocks, and quicker
        return level, [(e - level).astype(np.uint8) for e in exponents]
    classes = [(e - level).astype(np.int64) for e in exponents]
    over = [((c - (CLASSES - 1) + 3) // 4).clip(0) for c in classes]
    return level, [(c - 4 * o).astype(np.uint8) for c, o in zip(classes, over, strict=True)]


def recognise(
    coefficients: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    wishes: npt.NDArray[np.float32],
) -> TokenGrids:
    """Look at float32 [tokens, components] of a part.

    ``scale`` is float32 [components]: one over the step of exponent 0.
    """
    grids = np.empty(len(coefficients), np.int16)
    leading = min(LEADING, len(scale))
    shared = scale[:leading]

    def some(own: slice) -> None:
        _recognise(coefficients[own, :leading], shared, wishes[own], grids[own])

    in_spans(some, len(coefficients), len(coefficients) * leading * _TRIES)
    return TokenGrids(wishes, grids)


@_jit
def _recognise(x, scale, wishes, grids):  # type: ignore[no-untyped-def]
    # Each over all of them: the cast may have moved the strongest much more than others.
    sweeps = max(scale.size // AT_ONCE, 1)
    y = np.zeros((sweeps, -(-scale.size // sweeps)), np.float32)
    for t in range(len(x)):
        grids[t] = NO_GRID
        peak = _largest(x[t], scale)
        if not peak < _F32(1e30):
            continue
        if peak <= _F32(EMPTY * 2.0 ** (wishes[t] / 4)):
            grids[t] = np.int64(np.floor(wishes[t] + _F32(0.5)))
            continue
        best = _F32(np.inf)
        gathered = 0
        # From the coarsest grid on where the largest coefficient is not 0.
        top = np.int64(np.floor(4 * np.log2(2 * np.float64(peak))))
        for e in range(top, top - RANGE, -1):
            factor = _F32(2.0 ** (-e / 4))
            distance, usual = _F32(0), _F32(0)
            for begin in range(sweeps):
                if begin == gathered:
                    for k, i in enumerate(range(begin, scale.size, sweeps)):
                        y[begin, k] = x[t, i] * scale[i]
                    gathered += 1
                further, more = _distances(y[begin], factor)
                distance += further
                usual += more
                if usual > _F32(1 / 12) and distance > _F32(GIVE_UP) * usual:
                    break
            if distance < best * usual and accepted(distance, usual, _F32(e) - wishes[t]):
                best = distance / usual
                grids[t] = e


@_sum
def _largest(row, scale):  # type: ignore[no-untyped-def]
    """The largest magnitude, in steps of exponent 0; NaN where one is no number."""
    peak = np.int32(0)
    for i in range(scale.size):
        # Bits of magnitudes sort like the numbers; those of NaN are the largest.
        bits = _F32(row[i] * scale[i]).view(np.int32)
        peak = max(peak, np.int32(bits & np.int32(0x7FFFFFFF)))
    return np.int32(peak).view(np.float32)


@_sum
def _distances(y, factor):  # type: ignore[no-untyped-def]
    """Squared distances of coefficients from multiples of one over ``factor``, in its squares;
    and those of any numbers."""
    distance, usual = _F32(0), _F32(0)
    for i in range(y.size):
        z = y[i] * factor
        r = z - np.rint(z)
        distance += r * r
        usual += min(z * z, _F32(1 / 12))
    return distance, usual


@_jit
def accepted(distance, usual, coarser):  # type: ignore[no-untyped-def]
    """Whether squared distances from a grid are not those of any number; ``coarser``: quarter
    octaves by which it is so than what is wanted."""
    distance = max(distance, _F32(1e-12) * usual)
    if not distance <= _F32(MOST_RATIO) * usual:
        return False
    part = distance / usual
    likelier = np.log(usual / distance)
    evidence = _F32(6) * usual * likelier
    if evidence < _F32(LEAST_EVIDENCE) + _F32(PER_SQUARE) * part * part:
        return False
    if coarser < 0:
        chance = max(likelier - _F32(UNIFORM), _F32(1.25) * (_F32(1) - part) * (_F32(1) - part))
        least = min(_F32(BY_CHANCE), _F32(-BY_STEP) * coarser)
        if coarser < _F32(-FINEST):
            least = _F32(2 * BY_CHANCE)
        return _F32(6) * usual * chance >= least
    finer = likelier - _F32(LOG_LOSS) < coarser * _F32(LOG_HALF_OCTAVE)
    return not finer or evidence >= _F32(CERTAIN)
