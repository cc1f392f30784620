"""Work that pauses where it would wait for a device, so that one thread can drive several."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias, TypeVar

R = TypeVar("R")

#: Yields where what comes next waits for what a device was asked to do; returns its result.
Steps: TypeAlias = Generator[None, None, R]


def run(steps: Steps[R]) -> R:
    """All steps, one after the other."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: R = end.value
            return result


def begun(steps: Steps[R], count: int = 1) -> Steps[R]:
    """Take the first steps now; what is returned takes the others."""
    try:
        for _ in range(count):
            next(steps)
    except StopIteration as end:
        return _ended(end.value)
    return _rest(steps)


def _ended(result: R) -> Steps[R]:
    return result
    yield


def _rest(steps: Steps[R]) -> Steps[R]:
    yield
    return (yield from steps)


def together(several: Sequence[Steps[Any]]) -> Steps[list[Any]]:
    """A step of each after the other, until all have ended; their results."""
    results: list[Any] = [None] * len(several)
    going = list(range(len(several)))
    while going:
        for i in list(going):
            try:
                next(several[i])
            except StopIteration as end:
                results[i] = end.value
                going.remove(i)
        if going:
            yield
    return results
