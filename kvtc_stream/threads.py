"""Work on bytes by several threads: copying, checksums, coders, which all leave Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

R = TypeVar("R")

#: Bytes for which it is worth waking a thread.
SHARE = 2 << 20
#: Calls that are begun before the first result is taken.
_AHEAD = 16


@cache
def threads() -> ThreadPoolExecutor:
    """The process's threads for such work."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kvtc-bytes")


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


def copy(sources: Sequence[NDArray[Any]], targets: Sequence[NDArray[Any]]) -> None:
    """Each to each, on several threads if they are large."""
    pieces = [
        (source[at : at + SHARE], target[at : at + SHARE])
        for source, target in zip(sources, targets, strict=True)
        for at in range(0, len(source), SHARE)
    ]
    total = sum(map(len, sources))
    shares = min(total // SHARE, len(pieces), os.cpu_count() or 1)
    if shares < 2:
        _copy(pieces)
    else:
        list(threads().map(_copy, [pieces[i::shares] for i in range(shares)]))


def _copy(pieces: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> None:
    for source, target in pieces:
        np.copyto(target, source)
