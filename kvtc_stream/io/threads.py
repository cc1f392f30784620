"""Work on bytes by several threads: copying, checksums and coders, which release the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import islice, starmap
from threading import Event
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.io import environment

R = TypeVar("R")

#: A thread is given at least this many bytes.
SHARE = 2 << 20
#: Or so many values to compute: a fifth of a millisecond of work at the least.
_VALUES = 1 << 16
#: Spans that rows are cut into: so that threads are done at about the same time.
_SPANS = 8
#: Calls that are submitted before the first result is taken.
_AHEAD = 16
#: Maximum number of threads that share the calls of one task.
_MAX_SHARES = 16
#: More than any work has units.
_NO_MORE = 1 << 40
#: Looks at whether others are done: some milliseconds of them.
_POLLS = 1 << 17
#: Set by :func:`stay_alone`.
_alone = Event()


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


def stay_alone() -> None:
    """Let :func:`beside` use the caller's thread only, from now on: for processes in which as many
    threads call it as there are cores."""
    _alone.set()


def beside(tasks: Sequence[Callable[[], R]], values: int) -> list[R]:
    """Make all calls, which release the GIL most of the time, on threads and on the caller's.

    All are over when it returns their results, or raises what the first that failed raised.
    ``values`` are how many all of them compute: a few are no work for a thread.
    """
    count = min(values // _VALUES, len(tasks), environment.threads()) - 1
    if count < 1 or _alone.is_set():
        return [task() for task in tasks]
    rest, found = iter(range(len(tasks))), dict[int, R]()
    errors: dict[int, BaseException] = {}

    def take() -> None:
        for i in rest:
            try:
                found[i] = tasks[i]()
            except BaseException as error:
                errors[i] = error

    helpers = [threads().submit(take) for _ in range(count)]
    take()
    for helper in helpers:
        if not helper.cancel():  # it came to it in time
            helper.result()
    if errors:
        raise errors[min(errors)]
    return [found[i] for i in range(len(tasks))]


def in_spans(function: Callable[[slice], Any], rows: int, values: int) -> None:
    """Call a function for slices that make up so many rows, see :func:`beside`."""
    size = max(-(-rows // _SPANS) if values >= 2 * _VALUES else rows, 1)
    beside([partial(function, slice(i, i + size)) for i in range(0, rows, size)], values)


class Shared:
    """Compiled work that threads share, and begin with at once; dropping it stops it.

    Parameters
    ----------
    work
        Takes int64 [2], 0 at first: units of the work that were begun with, and those done; how
        often to look, at the most, whether others are done with theirs; and the arguments. Each
        call takes units, as many as it adds to the numbers, until none is left. It has the GIL only
        to begin and to end.
    units
        How many units there are.
    arguments
        What else ``work`` takes.
    size
        Bytes that all of it is about.
    most
        Maximum number of threads, with the one that calls :meth:`finish`.
    keeps
        What must be kept until the work is done: that which ``arguments`` have addresses of.
    """

    def __init__(
        self,
        work: Callable[..., None],
        units: int,
        arguments: Sequence[Any],
        size: int,
        most: int,
        keeps: Any = None,
    ) -> None:
        self._keeps, self._units = keeps, units
        self._counts = np.zeros(2, np.int64)
        self._work, self._arguments = work, arguments
        count = min(size // SHARE, units, most, environment.threads()) - 1
        self._helpers = [threads().submit(work, self._counts, 0, *arguments) for _ in range(count)]

    def finish(self) -> None:
        """Take part until all is done."""
        # To wait for others in Python would be to wait for its lock, which each of them takes
        # when it is done.
        self._work(self._counts, _POLLS, *self._arguments)
        if self._counts[1] < self._units:
            self._wait()
        else:
            for helper in self._helpers:  # they have nothing to do any more
                helper.cancel()
            self._helpers.clear()

    def stop(self) -> None:
        """Leave undone what nobody has begun with."""
        self._counts[0] = _NO_MORE
        self._wait()

    def _wait(self) -> None:
        while self._helpers:
            helper = self._helpers.pop()
            if not helper.cancel():  # it came to it in time
                helper.result()

    def __del__(self) -> None:
        self.stop()


def copy(sources: Sequence[NDArray[Any]], targets: Sequence[NDArray[Any]]) -> None:
    """Copy each source, contiguous bytes, to its target; many bytes on several threads."""
    size = sum(map(len, sources))
    if size < 2 * SHARE:
        for source, target in zip(sources, targets, strict=True):
            target[:] = source
        return
    from kvtc_stream.io.assembly import assemble

    pieces = np.array(
        [(s.ctypes.data, t.ctypes.data, len(s)) for s, t in zip(sources, targets, strict=True)]
    )
    units, pieces = units_of(pieces)
    arguments = units, np.zeros(len(units), np.uint64), pieces
    Shared(assemble, len(units), arguments, size, _MAX_SHARES).finish()


def units_of(pieces: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Units of copies without checksums, and the copies in pieces of SHARE at most; as
    :func:`kvtc_stream.io.assembly.assemble` takes them. Small neighbours share a unit."""
    parts = -(-pieces[:, 2] // SHARE)
    rows = np.repeat(np.arange(len(pieces)), parts)
    first = np.cumsum(parts) - parts
    before = (np.arange(len(rows)) - first[rows]) * SHARE
    cut = pieces[rows]
    cut[:, :2] += before[:, None]
    cut[:, 2] = np.minimum(cut[:, 2] - before, SHARE)
    which = (np.cumsum(cut[:, 2]) - 1) // SHARE
    edges = np.concatenate([[0], np.flatnonzero(np.diff(which)) + 1, [len(cut)]])
    units = np.zeros((len(edges) - 1, 4), np.int64)
    units[:, 0], units[:, 1] = edges[:-1], edges[1:]
    return units, cut
