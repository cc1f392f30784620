"""Work on bytes by several threads: copying, checksums and coders, which release the GIL."""

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

from kvtc_stream.io import environment

R = TypeVar("R")

#: A thread is given at least this many bytes.
SHARE = 2 << 20
#: Calls that are submitted before the first result is taken.
_AHEAD = 16
#: Maximum number of threads that share the calls of one task.
_MAX_SHARES = 16
#: Copies of fewer bytes are not given to a thread.
_SMALL = 1 << 16


@cache
def threads() -> ThreadPoolExecutor:
    """The process's thread pool for work on bytes."""
    return ThreadPoolExecutor(environment.threads(), thread_name_prefix="kvtc-bytes")


# A forked process has none of its parent's threads: it makes its own pool.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads.cache_clear)


def in_turn(function: Callable[..., R], arguments: Iterable[tuple[Any, ...]]) -> Iterator[R]:
    """Like ``itertools.starmap``, on threads, a few calls at a time.

    The first calls start at once, before a result is asked for. Results come in order.
    """
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
    """Start all calls of ``itertools.starmap``; return a function that waits for their results.

    ``size`` is the number of bytes that all calls work on. If it is small, no thread is used, and
    the returned function makes the calls. For calls that release the GIL most of the time.
    """
    shares = min(size // SHARE, len(arguments), _MAX_SHARES, environment.threads())
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
    """Like :func:`begin`, but wait for the results and return them."""
    return begin(function, arguments, size)()


def copy(sources: Sequence[NDArray[Any]], targets: Sequence[NDArray[Any]]) -> None:
    """Copy each source to its target; large ones on several threads."""
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
    # Small ones stay here: threads would wait for the GIL, and for each other to map pages.
    for target, source in small:
        target[:] = source
