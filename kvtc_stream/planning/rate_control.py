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
#: Of a step that has to fit a size, in quarter octaves.
_RESOLUTION = 1 / 16
#: Of a block's record, besides payload and verbatim values.
_RECORD_BYTES = 120
#: Logarithm of how many times the bytes that restored tokens should take is too much; more by
#: ``few / (few + tokens)``. And so many others have no step of their own.
_SURELY, _FEW = 0.15, 32
#: Times a page's budget at which it may yet fit; and how far from the families of restored tokens'
#: steps others may take less.
_PERHAPS, _NEAR = 1.1, 3
#: Errors of tokens count up to here; such tokens end up verbatim.
_MOST_ERROR = 2.0

_Amounts: TypeAlias = NDArray[np.float64] | float
_Errors: TypeAlias = NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Target:
    """What a stream with uniform bands keeps to: ``ratio``, ``bits_per_token`` or
    ``mean_error``, of the tokens that are coded, in each section by itself."""

    name: str
    value: float

    def control(self, header: StreamHeader, section: int) -> SectionControl:
        """Of one section of a new stream."""
        least = _least_offset(header, section)
        if self.name == "mean_error":
            return SectionControl(RateControl(self.value, 0.14, least), of_errors=True)
        sizes = [s.k_width + s.v_width for s in header.geometry.sections]
        share = self.value / 8 * sizes[section] / sum(sizes)
        if self.name == "ratio":
            share = header.verbatim_size(section, 1) / self.value
        return SectionControl(RateControl(share, -0.08, least), of_errors=False)


class Controls(Protocol):
    """What gives the sections of a stream their rate control: a target, or ones made before."""

    def control(self, header: StreamHeader, section: int) -> SectionControl:
        """Of one section."""
        ...


class SectionControl:
    """Rate control of a section's bytes or errors, one block after the other.

    Tokens that were restored from a stream lie on grids already. Those are kept, unless they take
    clearly more bytes than they should: then fewer are asked for than when they were stored. They
    lose nothing, so that sizes and errors count of the others alone, which get what they would get
    if there were no restored ones.
    """

    def __init__(self, control: RateControl, *, of_errors: bool) -> None:
        self._control, self.of_errors = control, of_errors
        self._kept = RateControl(control.target, -1.0, 0.0)

    def keeps(self, tokens: int, size: float) -> bool:
        """Whether restored tokens of a block keep their grids, with which they take ``size``."""
        if self.of_errors:
            return True
        # Blocks may begin elsewhere than those that they were in: a few tokens say little.
        excess = self._kept.excess(tokens, size)
        few = _FEW / (_FEW + self._kept.tokens + tokens)
        if excess > _SURELY + few:
            return False
        self._kept.record(0.0, tokens, size)
        return True

    def counted(self, fits: NDArray[np.bool_], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool [tokens]: which are to be told of, of those that fit and those that keep a grid."""
        return fits & ~known

    def choose(
        self,
        tokens: int,
        bytes_at: Callable[[float], float],
        errors_at: Callable[[float], _Errors],
        *,
        restored: float | None = None,
    ) -> float:
        """The offset for a block; the functions give its payload and its tokens' errors at one.

        ``restored``: that of tokens in the block that keep their grids. Beside such, a few have the
        step of all so far. Where there are no others, it is what their families are chosen by.
        """
        if restored is not None and not tokens:
            return restored
        if not tokens or (restored is not None and self._control.tokens + tokens < _FEW):
            return self._control.mean
        return self._control.choose(tokens, self._amounts(bytes_at, errors_at))

    def expect(
        self,
        offset: float,
        tokens: int,
        bytes_at: Callable[[float], float],
        errors_at: Callable[[float], _Errors],
    ) -> None:
        """Count a block before it is coded, by what it should take; arguments as before.

        For those who choose for many blocks at a time, instead of :meth:`record`.
        """
        self._control.record(offset, tokens, self._amounts(bytes_at, errors_at)(offset))

    def _amounts(
        self, bytes_at: Callable[[float], float], errors_at: Callable[[float], _Errors]
    ) -> Callable[[float], _Amounts]:
        def errors(offset: float) -> _Amounts:
            found = errors_at(offset)
            return np.array(
                [np.nan_to_num(x, nan=_MOST_ERROR).clip(max=_MOST_ERROR).sum() for x in found]
            )

        def size(offset: float) -> _Amounts:
            return bytes_at(offset) + _RECORD_BYTES

        return errors if self.of_errors else size

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
        """Go on where another was in :meth:`state`; ``ValueError`` if it cannot have been."""
        self._control.restore(state, 2 if self.of_errors else 1)


class _Memoryless(SectionControl):
    """Blocks do not depend on one another."""

    of_errors = False

    def __init__(self) -> None:
        """There is nothing to remember."""

    def expect(self, *_: Any) -> None:
        """Nothing."""

    def record(self, offset: float, block: Block) -> None:
        """Nothing."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: Any) -> None:
        """Nothing."""


class IndependentControl(_Memoryless):
    """Keeps to a target in each block by itself."""

    def __init__(self, target: Target, header: StreamHeader, section: int) -> None:
        self._target, self._header, self._section = target, header, section
        self.of_errors = self._new().of_errors

    def _new(self) -> SectionControl:
        return self._target.control(self._header, self._section)

    def keeps(self, tokens: int, size: float) -> bool:
        """See :meth:`SectionControl.keeps`."""
        return self._new().keeps(tokens, size)

    def choose(
        self,
        tokens: int,
        bytes_at: Callable[[float], float],
        errors_at: Callable[[float], _Errors],
        *,
        restored: float | None = None,
    ) -> float:
        """See :meth:`SectionControl.choose`."""
        return self._new().choose(tokens, bytes_at, errors_at, restored=restored)


class FittingControl(_Memoryless):
    """The finest step at which a block's payload fits ``budget``, in bytes.

    ``fits`` tells whether there was one for the last block; ``failed`` is to be told if it took
    more than the budget nevertheless.
    """

    def __init__(self, header: StreamHeader, section: int) -> None:
        self.budget = 0.0
        self.fits, self.failed = True, False
        self._least = _least_offset(header, section)

    def keeps(self, tokens: int, size: float) -> bool:
        """If they may fit: a page that fitted fits again, and sizes are estimates."""
        return size <= self.budget * (1 if self.failed else _PERHAPS)

    def counted(self, fits: NDArray[np.bool_], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """All, if not all are restored: what those take is not there for others."""
        return fits & (fits & ~known).any()

    def choose(
        self,
        tokens: int,
        bytes_at: Callable[[float], float],
        errors_at: Callable[[float], _Errors],
        *,
        restored: float | None = None,
    ) -> float:
        """See :meth:`SectionControl.choose`; the coarsest step if none fits."""
        low, high = self._least, _COARSER
        if not tokens:
            self.fits = True
            offsets = np.arange(-_NEAR, _NEAR + 1) + (restored or 0.0)
            return float(min(offsets, key=bytes_at)) if restored is not None else 0.0
        self.fits = bytes_at(high) <= self.budget * (1 if restored is None else _PERHAPS)
        if bytes_at(low) <= self.budget:
            return low
        while high - low > _RESOLUTION:
            middle = (low + high) / 2
            if bytes_at(middle) <= self.budget:
                high = middle
            else:
                low = middle
        return high


def _least_offset(header: StreamHeader, section: int) -> float:
    bands = [b for p in header.plan.sections[section].parts for b in p.bands]
    return -_FINER - min((b.step for b in bands), default=0)


class RateControl:
    """Chooses the offset to the plan's step for the blocks of a section, one after the other.

    Parameters
    ----------
    target
        Of the amounts per token: none may exceed it, and one should reach it.
    slope
        By how much the logarithm of an amount changes from one quarter octave of the step to the
        next: negative for bytes, positive for errors. A first guess.
    least
        The finest offset.

    Attributes
    ----------
    target
        See above.
    tokens, mean
        That were recorded, and the mean of their offsets.
    """

    def __init__(self, target: float, slope: float, least: float) -> None:
        self.target, self._least = target, least
        self._slope = slope
        self.tokens = 0
        self._amounts: _Amounts = 0.0
        self.mean = 0.0

    def excess(self, tokens: int, amounts: _Amounts) -> float:
        """Logarithm of how far the sum would be above the target with such a block."""
        total = float(np.max(self._amounts + amounts))
        return math.log(max(total, 1e-300) / (self.target * (self.tokens + tokens)))

    def choose(self, tokens: int, amounts: Callable[[float], _Amounts]) -> float:
        """The offset for a block, in quarter octaves; ``amounts`` are the block's at an offset."""

        def excess(x: float) -> float:
            return self.excess(tokens, amounts(x))

        x = self._best()
        found = excess(x)
        if abs(found) <= _CORRIDOR:
            return x
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
            found = excess(x)
            if abs(found - aim) <= 0.25 * _CORRIDOR:
                break
            measured = (found - before) / (x - x_before)
            if measured * self._slope > 0:
                slope = measured
        if 0.2 < slope / share / self._slope < 5:
            self._slope += 0.25 * (slope / share - self._slope)
        return x

    def _best(self) -> float:
        """The offset that would have met the target on all blocks so far."""
        if not self.tokens:
            return 0.0
        total = float(np.max(self._amounts))
        excess = math.log(max(total, 1e-300) / (self.target * self.tokens))
        return min(max(self.mean - excess / self._slope, self._least), _COARSER)

    def record(self, x: float, tokens: int, amounts: _Amounts) -> None:
        """What a block of ``tokens`` coded tokens took in the end."""
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
