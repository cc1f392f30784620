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
#: Errors of tokens count up to here; such tokens end up verbatim.
_MOST_ERROR = 2.0

_Amounts: TypeAlias = NDArray[np.float64] | float
_Errors: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]


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
    """Rate control of a section's bytes or errors, one block after the other."""

    def __init__(self, control: RateControl, *, of_errors: bool) -> None:
        self._control, self.of_errors = control, of_errors

    def choose(
        self,
        tokens: int,
        bytes_at: Callable[[float], float],
        errors_at: Callable[[float], _Errors],
    ) -> float:
        """The offset for a block; the functions give its payload and its tokens' errors at one."""

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
        self.of_errors = target.control(header, section).of_errors

    def choose(
        self,
        tokens: int,
        bytes_at: Callable[[float], float],
        errors_at: Callable[[float], _Errors],
    ) -> float:
        """See :meth:`SectionControl.choose`."""
        control = self._target.control(self._header, self._section)
        return control.choose(tokens, bytes_at, errors_at)


class FittingControl(_Memoryless):
    """The finest step at which a block's payload fits ``budget``, in bytes.

    ``fits`` tells whether there was one for the last block.
    """

    def __init__(self, header: StreamHeader, section: int) -> None:
        self.budget = 0.0
        self.fits = True
        self._least = _least_offset(header, section)

    def choose(
        self,
        tokens: int,
        bytes_at: Callable[[float], float],
        errors_at: Callable[[float], _Errors],
    ) -> float:
        """See :meth:`SectionControl.choose`; the coarsest step if none fits."""
        low, high = self._least, _COARSER
        self.fits = bytes_at(high) <= self.budget
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
    """

    def __init__(self, target: float, slope: float, least: float) -> None:
        self._target, self._least = target, least
        self._slope = slope
        self._tokens = 0
        self._amounts: _Amounts = 0.0
        self._mean = 0.0

    def choose(self, tokens: int, amounts: Callable[[float], _Amounts]) -> float:
        """The offset for a block, in quarter octaves; ``amounts`` are the block's at an offset."""

        def excess(x: float) -> float:
            """Logarithm of how far the sum would be above the target."""
            total = float(np.max(self._amounts + amounts(x)))
            return math.log(max(total, 1e-300) / (self._target * (self._tokens + tokens)))

        x = self._best()
        found = excess(x)
        if abs(found) <= _CORRIDOR:
            return x
        # Regula falsi towards just inside the corridor; a share of the block in the sum makes the
        # slope smaller than that of the block alone.
        aim = math.copysign(0.75 * _CORRIDOR, found)
        share = tokens / (self._tokens + tokens)
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
        if not self._tokens:
            return 0.0
        total = float(np.max(self._amounts))
        excess = math.log(max(total, 1e-300) / (self._target * self._tokens))
        return min(max(self._mean - excess / self._slope, self._least), _COARSER)

    def record(self, x: float, tokens: int, amounts: _Amounts) -> None:
        """What a block of ``tokens`` coded tokens took in the end."""
        if tokens:
            self._tokens += tokens
            self._amounts = self._amounts + amounts
            self._mean += (x - self._mean) * tokens / self._tokens

    def state(self) -> dict[str, Any]:
        """See :meth:`SectionControl.state`."""
        return {
            "tokens": self._tokens,
            "amounts": np.atleast_1d(self._amounts).tolist(),
            "mean": self._mean,
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
        self._tokens, self._mean, self._slope = tokens, float(mean), float(slope)
        self._amounts = float(sums[0]) if amounts == 1 else np.array(sums, np.float64)
