"""What is asked of a server, drawn from a seed: the same of every server.

Some requests *return*: their prompt begins with one that was sent before, so that a cache could
have it. The others are *fresh*: short, and not like any other. Answers are not taken into the next
turn: it carries tokens from the source instead, so that all servers read the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes
    ----------
    prompt
        Token ids [tokens].
    answer
        Tokens to generate.
    reusable
        Leading tokens of the prompt that were sent before; 0 for a fresh request.
    """

    prompt: Ids
    answer: int
    reusable: int = 0

    @property
    def returning(self) -> bool:
        """Whether a cache could have its beginning."""
        return self.reusable > 0


@dataclass(frozen=True)
class Shape:
    """Sizes of what is asked, in tokens, and how often.

    Attributes
    ----------
    context
        Tokens that a conversation begins with.
    question, answer
        Tokens that every turn adds to the prompt, and tokens that it generates.
    turns
        Turns after which a conversation starts from its context again; with 1 every request is
        another question about the context.
    fresh
        Share of requests that are fresh.
    fresh_tokens
        Tokens of their prompts.
    zipf
        Conversation n comes back in proportion to ``1 / n ** zipf``; ``None``: each in its turn.
    """

    context: int = 1024
    question: int = 32
    answer: int = 16
    turns: int = 1
    fresh: float = 0.25
    fresh_tokens: int = 64
    zipf: float | None = 1.0

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        grown = self.context + self.turns * (self.question + self.answer)
        return max(grown, self.fresh_tokens + self.answer)


def conversations_of(size: int, token_bytes: int, context: int) -> int:
    """How many contexts have ``size`` bytes of uncompressed cache; 1 or more."""
    return max(1, round(size / (token_bytes * context)))


@dataclass
class Trace:
    """Conversations that come back, and fresh requests between them.

    Parameters
    ----------
    source
        Token ids that prompts are cut from [tokens]: of a text, or drawn.
    shape
        Sizes.
    conversations
        How many there are.
    seed
        Of all that is drawn.

    Raises
    ------
    ValueError
        The source is too short for so many different beginnings.
    """

    source: Ids
    shape: Shape
    conversations: int
    seed: int = 0
    _rng: np.random.Generator = field(init=False, repr=False)
    _starts: Ids = field(init=False, repr=False)
    _asked: Ids = field(init=False, repr=False)
    _last: Ids = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        room = len(self.source) - max(self.shape.context, self.shape.fresh_tokens)
        if room < self.conversations:
            raise ValueError(
                f"{len(self.source):,} tokens of text are too few for {self.conversations:,} "
                f"conversations of {self.shape.context:,}: give more text"
            )
        self._starts = self._rng.choice(room, self.conversations, replace=False)
        self._asked = np.zeros(self.conversations, np.int64)
        self._last = np.full(self.conversations, self.shape.context)  #: tokens sent of each
        self._history = [self._context(c) for c in range(self.conversations)]

    def _context(self, conversation: int) -> Ids:
        start = self._starts[conversation]
        return self.source[start : start + self.shape.context]

    def fill(self) -> Iterator[Request]:
        """Every context once, for a cache to keep."""
        for conversation in range(self.conversations):
            yield Request(self._context(conversation), 1)

    def requests(self, number: int) -> Iterator[Request]:
        """The next requests, after :meth:`fill`; goes on where it stopped."""
        for which in self._order(number):
            yield self._fresh() if which is None else self._turn(which)

    def _order(self, number: int) -> Iterator[int | None]:
        weights = 1 / np.arange(1, self.conversations + 1) ** (self.shape.zipf or 0.0)
        weights /= weights.sum()
        turn = count(int(self._asked.sum()))
        for _ in range(number):
            if self._rng.random() < self.shape.fresh:
                yield None
            elif self.shape.zipf is None:
                yield next(turn) % self.conversations
            else:
                yield int(self._rng.choice(self.conversations, p=weights))

    def _drawn(self, tokens: int) -> Ids:
        """A run of the source whose tokens are in another order: unlike any other."""
        start = self._rng.integers(0, len(self.source) - tokens + 1)
        return self._rng.permutation(self.source[start : start + tokens])

    def _fresh(self) -> Request:
        return Request(self._drawn(self.shape.fresh_tokens), self.shape.answer)

    def _turn(self, conversation: int) -> Request:
        shape = self.shape
        if self._asked[conversation] % shape.turns == 0:
            self._history[conversation] = self._context(conversation)
            self._last[conversation] = shape.context
        prompt = np.concatenate([self._history[conversation], self._drawn(shape.question)])
        found = Request(prompt, shape.answer, int(self._last[conversation]))
        self._last[conversation] = len(prompt)
        self._history[conversation] = np.concatenate([prompt, self._drawn(shape.answer)])
        self._asked[conversation] += 1
        return found


def poisson_arrivals(rate: float, number: int, seed: int) -> NDArray[np.float64]:
    """Seconds after the start at which requests of a Poisson process arrive, rising [number]."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / rate, number))
