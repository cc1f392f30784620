"""Rate control: the step that meets a target on this stream, not only on the calibration's text.

One step for the whole stream would serve it best: errors of equal size wherever they cost the same
bits. But which one meets the target is known only at the end. So every block takes the step that
would have met it on the blocks before, unless that leaves the sum so far outside a corridor around
the target; then the nearest step that does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats import Block, StreamHeader

#: Half the width of the corridor, as a part of the target. Users are promised 2 %.
_CORRIDOR = 0.015
#: How much finer than the finest base step, and coarser than the plan's, in quarter octaves. The
#: former is beyond what a basis in binary16 resolves, and leaves room below the largest symbol.
_FINER, _COARSER = 16.0, 100.0
_EVALUATIONS = 8
#: How near the search for a step that fits a size comes to the finest one, in quarter octaves.
_RESOLUTION = 1 / 16
#: Estimated bytes of a block's record without its payload and verbatim values.
_RECORD_BYTES = 120
#: Restored tokens give up their grids if they take more than exp(_SURELY + few / (few + tokens))
#: times the bytes that they should. Fewer than ``_FEW`` other tokens have no step of their own.
_SURELY, _FEW = 0.15, 32
#: An estimate of up to so many times a page's budget may still fit, as sizes are estimates. Tables
#: for a page of restored tokens are searched so many quarter octaves around those tokens' step.
_PERHAPS, _NEAR = 1.1, 8
#: Errors of tokens count up to here; such tokens end up verbatim.
_MOST_ERROR = 2.0

_Amounts: TypeAlias = NDArray[np.float64] | float
_Measured: TypeAlias = Callable[[float], Any]


@dataclass(frozen=True)
class Target:
    """What a stream with uniform bands keeps to, in each section by itself.

    Attributes
    ----------
    name
        ``"ratio"``, ``"bits_per_token"`` or ``"mean_error"``, of the tokens that are coded.
    value
        The ratio, bits, or relative error wanted.
    """

    name: str
    value: float

    def control(self, header: StreamHeader, section: int) -> SectionControl:
        """Start the rate control of one section of a new stream."""
        least = _least_offset(header, section)
        if self.name == "mean_error":
            return SectionControl(RateControl(self.value, 0.14, least), of_errors=True)
        sizes = [s.k_width + s.v_width for s in header.geometry.sections]
        share = self.value / 8 * sizes[section] / sum(sizes)
        if self.name == "ratio":
            share = header.verbatim_size(section, 1) / self.value
        return SectionControl(RateControl(share, -0.08, least), of_errors=False)


class Controls(Protocol):
    """Makes the rate control of each section of a stream: from a target, or from stored state."""

    def control(self, header: StreamHeader, section: int) -> SectionControl:
        """The rate control of a section, given by its index."""
        ...


class SectionControl:
    """Rate control of a section's bytes or errors, one block after the other.

    Tokens that were restored from a stream lie on the grids they were quantised to. Coding them on
    the same grids again loses nothing, so they keep them, unless they would take clearly more bytes
    than the target allows (which happens if the new target is smaller than the old one). The target
    applies to the other tokens alone: they are coded as if there were no restored ones.
    """

    def __init__(self, control: RateControl, *, of_errors: bool) -> None:
        self._control, self.of_errors = control, of_errors
        self._kept = RateControl(control.target, -1.0, 0.0)

    @property
    def likely(self) -> tuple[float, ...]:
        """Offsets at about which sizes will be asked for next; they need not be known yet."""
        best = self._control.best()
        return () if self.of_errors else (best - 1.0, best + 1.0)

    def keeps(self, tokens: int, size: float, least: float) -> bool:
        """Whether a block's restored tokens keep their grids, on which they take ``size`` bytes.

        Whatever their grids, they take ``least``. Where that is more than the target allows, they
        are measured by it: coarser grids would not meet the target either.
        """
        if self.of_errors:
            return True
        size -= max(least - self._kept.target * tokens, 0.0)
        # Blocks may begin elsewhere than those that they were in: a few tokens say little.
        excess = self._kept.excess(tokens, size)
        few = _FEW / (_FEW + self._kept.tokens + tokens)
        if excess > _SURELY + few:
            return False
        self._kept.record(0.0, tokens, size)
        return True

    def counted(self, fits: NDArray[np.bool_], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which tokens the target applies to, bool [tokens].

        ``fits``: tokens that can be coded; ``known``: restored tokens that keep their grid.
        """
        return fits & ~known

    def choose(self, tokens: int, measured: _Measured, *, restored: float | None = None) -> float:
        """Choose a block's offset to the plan's step, in quarter octaves.

        Parameters
        ----------
        tokens
            How many tokens the target applies to.
        measured
            Bytes of their payload at an offset; if :attr:`of_errors`, their relative errors
            [2, tokens] of K and V.
        restored
            Mean offset of the block's tokens that keep their grids, if there are any. If all do, it
            is the result; beside them, a few other tokens take the mean offset so far.
        """
        return self._chosen(tokens, measured, restored)[0]

    def take(self, tokens: int, measured: _Measured, *, restored: float | None = None) -> float:
        """As :meth:`choose`, and count the block by its estimates, instead of by what it took
        (:meth:`record`).

        Encoders that choose offsets for many blocks before they code any need this.
        """
        offset, amounts = self._chosen(tokens, measured, restored)
        self._control.record(offset, tokens, amounts)
        return offset

    def _chosen(
        self, tokens: int, measured: _Measured, restored: float | None
    ) -> tuple[float, _Amounts]:
        """The offset, and the sums of the block's amounts at it."""

        def amounts(offset: float) -> _Amounts:
            found = measured(offset)
            if not self.of_errors:
                size: float = found + _RECORD_BYTES
                return size
            return np.array(
                [np.nan_to_num(x, nan=_MOST_ERROR).clip(max=_MOST_ERROR).sum() for x in found]
            )

        control = self._control
        if not tokens:
            return control.mean if restored is None else restored, 0.0
        if restored is not None and control.tokens + tokens < _FEW:
            return control.mean, amounts(control.mean)
        return control.choose(tokens, amounts)

    def record(self, offset: float, block: Block) -> None:
        """Count a block that was coded with an offset."""
        tokens, errors = block.coded_tokens, block.errors
        means = np.array([errors.k_mean, errors.v_mean])
        amounts = means * tokens if self.of_errors else float(len(block.coded) + _RECORD_BYTES)
        self._control.record(offset, tokens, amounts)

    def state(self) -> dict[str, Any]:
        """What was learnt from the blocks so far, for JSON."""
        return self._control.state()

    def restore(self, state: Any) -> None:
        """Continue from a :meth:`state`; ``ValueError`` if no rate control can have had it."""
        self._control.restore(state, 2 if self.of_errors else 1)


class _Memoryless(SectionControl):
    """Rate control in which blocks do not depend on one another: it keeps no state."""

    of_errors = False

    def __init__(self) -> None:
        """There is nothing to remember."""

    def take(self, tokens: int, measured: _Measured, *, restored: float | None = None) -> float:
        """As :meth:`choose`."""
        return self.choose(tokens, measured, restored=restored)

    def record(self, offset: float, block: Block) -> None:
        """Does nothing."""

    def state(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def restore(self, state: Any) -> None:
        """Does nothing."""


class IndependentControl(_Memoryless):
    """Keeps to a target in each block by itself."""

    def __init__(self, target: Target, header: StreamHeader, section: int) -> None:
        self._target, self._header, self._section = target, header, section
        self.of_errors = self._new().of_errors

    def _new(self) -> SectionControl:
        return self._target.control(self._header, self._section)

    @property
    def likely(self) -> tuple[float, ...]:
        """See :attr:`SectionControl.likely`."""
        return self._new().likely

    def keeps(self, tokens: int, size: float, least: float) -> bool:
        """See :meth:`SectionControl.keeps`."""
        return self._new().keeps(tokens, size, least)

    def choose(self, tokens: int, measured: _Measured, *, restored: float | None = None) -> float:
        """See :meth:`SectionControl.choose`."""
        return self._new().choose(tokens, measured, restored=restored)


class FittingControl(_Memoryless):
    """The finest step at which a block's payload fits a budget.

    Sizes are estimates: a block that takes more is to be coded again, see :meth:`exceeded`. Of one
    that is all restored tokens, which fitted once, the tables are sought with which it did.

    Attributes
    ----------
    fits
        Whether there was a step for the last block.
    """

    def __init__(self, header: StreamHeader, section: int) -> None:
        self._least = _least_offset(header, section)
        self.start(0.0)

    def start(self, budget: float) -> None:
        """Begin with another block, that is to have at most ``budget`` bytes."""
        self.fits, self._failed, self._budget, self._whole = True, False, budget, budget
        self._untried: list[float] = []
        self._keeping = self._renounced = False

    def exceeded(self, excess: int) -> None:
        """The block took so many bytes more than its budget."""
        self._untried = self._untried[1:]
        if not self._untried:
            self._budget -= excess + 4
            self._failed = True

    @property
    def likely(self) -> tuple[float, ...]:
        """Any may be."""
        return ()

    def keeps(self, tokens: int, size: float, least: float) -> bool:
        """Whether they may fit. A page that fitted fits again, though its estimate be larger."""
        most = self._budget * (1 if self._failed else _PERHAPS)
        self._keeping = not self._renounced and size <= most
        return self._keeping

    def goes_on(self) -> bool:
        """Whether the block may fit once restored tokens, if they have kept theirs, have no grids,
        where no step did."""
        self._renounced, self._budget = self._keeping, self._whole
        return self._keeping

    def counted(self, fits: NDArray[np.bool_], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """All tokens that fit, since they share the page's budget; none if all are restored."""
        return fits & (fits & ~known).any()

    def choose(self, tokens: int, measured: _Measured, *, restored: float | None = None) -> float:
        """See :meth:`SectionControl.choose`; the coarsest step if none fits."""
        low, high = self._least, _COARSER
        if not tokens:
            self.fits = True
            if restored is None:
                return 0.0
            if not self._untried:
                # Offsets of the same tables have the same size.
                offsets = (np.arange(-_NEAR, _NEAR + 1) + restored).tolist()
                self._untried = [x for _, x in sorted({measured(x): x for x in offsets}.items())]
            return self._untried[0]
        self.fits = measured(high) <= self._budget * (1 if restored is None else _PERHAPS)
        if measured(low) <= self._budget:
            return low
        while high - low > _RESOLUTION:
            middle = (low + high) / 2
            if measured(middle) <= self._budget:
                high = middle
            else:
                low = middle
        return high


def _least_offset(header: StreamHeader, section: int) -> float:
    bands = [b for p in header.plan.sections[section].parts for b in p.bands]
    return -_FINER - min((b.step for b in bands), default=0)


def _largest(amounts: _Amounts) -> float:
    return amounts if isinstance(amounts, float) else float(np.max(amounts))


class RateControl:
    """Chooses the offset to the plan's step for the blocks of a section, one after the other.

    Parameters
    ----------
    target
        What the largest amount per token should be: bytes, or errors of K and of V.
    slope
        By how much the logarithm of an amount changes from one quarter octave of the step to the
        next: negative for bytes, positive for errors. A first guess.
    least
        The finest offset.

    Attributes
    ----------
    target
        As given.
    tokens, mean
        Number of tokens recorded, and the mean of their offsets.
    """

    def __init__(self, target: float, slope: float, least: float) -> None:
        self.target, self._least = target, least
        self._slope = slope
        self.tokens = 0
        self._amounts: _Amounts = 0.0
        self.mean = 0.0

    def excess(self, tokens: int, amounts: _Amounts) -> float:
        """Logarithm of how far the sum would be above the target with such a block."""
        total = _largest(self._amounts + amounts)
        return math.log(max(total, 1e-300) / (self.target * (self.tokens + tokens)))

    def choose(self, tokens: int, measured: Callable[[float], _Amounts]) -> tuple[float, _Amounts]:
        """The offset for a block, in quarter octaves, and the block's amounts, which are
        ``measured`` at offsets."""
        x = self.best()
        amounts = measured(x)
        found = self.excess(tokens, amounts)
        if abs(found) <= _CORRIDOR:
            return x, amounts
        # Regula falsi towards just inside the corridor; a share of the block in the sum makes the
        # slope smaller than that of the block alone.
        aim = math.copysign(0.75 * _CORRIDOR, found)
        share = tokens / (self.tokens + tokens)
        slope = self._slope * share
        low, high = self._least, _COARSER
        for _ in range(_EVALUATIONS):
            if (found > aim) == (self._slope > 0):
                high = x
            else:
                low = x
            new = x - (found - aim) / slope
            if not low < new < high:
                new = (low + high) / 2 if high - low < 40 else min(max(new, low), high)
            if new == x:
                break
            before, x_before = found, x
            x = new
            amounts = measured(x)
            found = self.excess(tokens, amounts)
            if abs(found - aim) <= 0.25 * _CORRIDOR:
                break
            own = (found - before) / (x - x_before)
            if own * self._slope > 0:
                slope = own
        if 0.2 < slope / share / self._slope < 5:
            self._slope += 0.25 * (slope / share - self._slope)
        return x, amounts

    def best(self) -> float:
        """The offset that would have met the target on all blocks so far."""
        if not self.tokens:
            return 0.0
        total = _largest(self._amounts)
        excess = math.log(max(total, 1e-300) / (self.target * self.tokens))
        return min(max(self.mean - excess / self._slope, self._least), _COARSER)

    def record(self, x: float, tokens: int, amounts: _Amounts) -> None:
        """Add a block of ``tokens`` coded tokens at offset ``x``, and the sums of its amounts."""
        if tokens:
            self.tokens += tokens
            self._amounts = self._amounts + amounts
            self.mean += (x - self.mean) * tokens / self.tokens

    def state(self) -> dict[str, Any]:
        """See :meth:`SectionControl.state`."""
        return {
            "tokens": self.tokens,
            "amounts": np.atleast_1d(self._amounts).tolist(),
            "mean": self.mean,
            "slope": self._slope,
        }

    def restore(self, state: Any, amounts: int) -> None:
        """See :meth:`SectionControl.restore`; ``amounts`` is how many there are."""
        if not isinstance(state, dict) or state.keys() != self.state().keys():
            raise ValueError(f"expected an object of {', '.join(self.state())}, found {state!r}")
        tokens, sums, mean, slope = state.values()
        numbers = [mean, slope, *(sums if isinstance(sums, list) else [None])]
        if (
            type(tokens) is not int
            or tokens < 0
            or len(numbers) - 2 not in ({1, amounts} if tokens == 0 else {amounts})
            or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
            or not all(x >= 0 for x in sums)
            or not slope * self._slope > 0
            or not self._least <= mean <= _COARSER
        ):
            raise ValueError(f"no rate control can have been in {state!r}")
        self.tokens, self.mean, self._slope = tokens, float(mean), float(slope)
        self._amounts = float(sums[0]) if amounts == 1 else np.array(sums, np.float64)
