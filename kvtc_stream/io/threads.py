"""Work on bytes by several threads: copying, checksums, coders, which all leave Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice, starmap
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvtc_stream import environment

R = TypeVar("R")

#: Bytes for which it is worth waking a thread.
SHARE = 2 << 20
#: Calls that are begun before the first result is taken.
_AHEAD = 16
#: Threads that share the calls of one task.
_MOST_SHARES = 16
#: Bytes below which a copy is not worth handing over.
_SMALL = 1 << 16


@cache
def threads() -> ThreadPoolExecutor:
    """The process's threads for such work."""
    return ThreadPoolExecutor(environment.threads(), thread_name_prefix="kvtc-bytes")


# A fork has none of them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads.cache_clear)


def in_turn(function: Callable[..., R], arguments: Iterable[tuple[Any, ...]]) -> Iterator[R]:
    """As ``itertools.starmap``, on threads, a few at a time; the first ones begin at once."""
    rest = iter(arguments)
    pending = deque(threads().submit(function, *x) for x in islice(rest, _AHEAD))

    def results() -> Iterator[R]:
        while pending:
            found = pending.popleft().result()
            pending.extend(threads().submit(function, *x) for x in islice(rest, 1))
            yield found

    return results()


def begin(
    function: Callable[..., R], arguments: Sequence[tuple[Any, ...]], size: int
) -> Callable[[], list[R]]:
    """Begin with all of ``itertools.starmap``; the result waits for it.

    On threads if it is about many bytes, ``size`` in all; otherwise the result does it. For calls
    that leave Python's lock for most of their time.
    """
    shares = min(size // SHARE, len(arguments), _MOST_SHARES, environment.threads())
    if shares < 2:
        return lambda: list(starmap(function, arguments))
    parts = [slice(i, None, shares) for i in range(shares)]
    found = [
        threads().submit(lambda own: list(starmap(function, own)), arguments[part])
        for part in parts
    ]

    def result() -> list[R]:
        out: list[Any] = [None] * len(arguments)
        for part, own in zip(parts, found, strict=True):
            out[part] = own.result()
        return out

    return result


def spread(function: Callable[..., R], arguments: Sequence[tuple[Any, ...]], size: int) -> list[R]:
    """As :func:`begin`, and wait."""
    return begin(function, arguments, size)()


def copy(sources: Sequence[NDArray[Any]], targets: Sequence[NDArray[Any]]) -> None:
    """Each to each; large ones on several threads."""
    small, large = [], []
    for source, target in zip(sources, targets, strict=True):
        if len(source) < _SMALL:
            small.append((target, source))
        else:
            large += [
                (target[at : at + SHARE], source[at : at + SHARE])
                for at in range(0, len(source), SHARE)
            ]
    spread(np.copyto, large, sum(len(x) for x, _ in large))
    # Threads would wait for each other's lock; and whoever comes first maps the page.
    for target, source in small:
        target[:] = source
