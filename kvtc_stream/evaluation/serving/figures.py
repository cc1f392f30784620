"""What the answers of a server say: percentiles, throughput, goodput, hit rates.

Everything here is a function of what was observed; nothing reads a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvtc_stream.evaluation.serving.trace import Request

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Outcome:
    """What became of a request; times are seconds of one clock.

    Attributes
    ----------
    request
        What was asked.
    due
        When it was to be sent: waiting for a busy client counts, too.
    times
        When each piece of the answer came, the first one first; a piece is a token, unless the
        server sends several at a time.
    tokens
        Tokens of the answer.
    cached
        Tokens of the prompt that the server did not compute, if it says so.
    error
        Why there is no answer; empty if there is.
    """

    request: Request
    due: float
    times: tuple[float, ...] = ()
    tokens: int = 0
    cached: int | None = None
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return np.diff(self.times).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Slo:
    """What a request must keep to count for goodput.

    Attributes
    ----------
    ttft
        Most seconds to the first token.
    itl
        Most seconds between tokens, on average over the answer.
    """

    ttft: float
    itl: float

    def met(self, outcome: Outcome) -> bool:
        """Whether a request was answered within both."""
        if outcome.error or not outcome.times:
            return False
        gaps = outcome.gaps
        return outcome.ttft <= self.ttft and (not gaps or float(np.mean(gaps)) <= self.itl)


@dataclass(frozen=True)
class Spread:
    """Percentiles of seconds, interpolated between neighbours; ``None`` where nothing was seen."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of what was observed."""
        if not seconds:
            return cls(0, None, None, None, None)
        return cls(
            len(seconds),
            float(np.mean(seconds)),
            *(float(np.percentile(seconds, p)) for p in PERCENTILES),
        )


def summarise(outcomes: Sequence[Outcome], slo: Slo) -> dict[str, Any]:
    """All figures of one run, for JSON.

    ``requests_per_s``, ``tokens_per_s`` and ``goodput_per_s`` are over the time from when the first
    request was due until the last answer ended. ``hit_rate`` is the share of all prompts' tokens
    that was not computed (``None`` if the server does not say), and ``possible_hit_rate`` that
    which had been sent before.
    """
    answered = [x for x in outcomes if not x.error and x.times]
    seconds = max((x.times[-1] for x in answered), default=0.0)
    seconds -= min((x.due for x in outcomes), default=0.0)
    kept = sum(map(slo.met, outcomes))
    prompts = sum(len(x.request.prompt) for x in answered)
    told = bool(answered) and all(x.cached is not None for x in answered)
    groups = {
        "all": answered,
        "returning": [x for x in answered if x.request.returning],
        "fresh": [x for x in answered if not x.request.returning],
    }
    per_second = 1 / seconds if answered and seconds > 0 else 0.0
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(answered),
        "seconds": max(seconds, 0.0),
        "requests_per_s": len(answered) * per_second,
        "tokens_per_s": sum(x.tokens for x in answered) * per_second,
        "goodput_per_s": kept * per_second,
        "slo_met": kept / len(outcomes) if outcomes else 0.0,
        "hit_rate": sum(x.cached or 0 for x in answered) / prompts if told and prompts else None,
        "possible_hit_rate": sum(x.request.reusable for x in answered) / prompts
        if prompts
        else 0.0,
    } | {
        name: {
            "ttft": asdict(Spread.of([x.ttft for x in group])),
            "itl": asdict(Spread.of([gap for x in group for gap in x.gaps])),
        }
        for name, group in groups.items()
    }


def saturated(figures: dict[str, Any], rate: float) -> bool:
    """Whether a ladder of rates ends here: half misses the limits, or is not served in time."""
    return bool(figures["slo_met"] < 0.5 or figures["requests_per_s"] < rate / 2)
