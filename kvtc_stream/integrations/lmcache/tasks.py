"""Work that a host hands over, asks for by number, and is told of by a descriptor."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Notifier(Protocol):
    """What makes a descriptor readable."""

    def fileno(self) -> int:
        """The descriptor."""

    def notify(self) -> None:
        """Make it readable."""

    def close(self) -> None:
        """Close it."""


class Tasks(Generic[T]):
    """Tasks of one kind, each of several parts. Safe to use from several threads.

    Every task that begins ends, in the order in which they began, unless they are closed.

    Parameters
    ----------
    kind
        For the names of threads.
    threads
        Parts that are done at a time.
    notifier
        Is notified when a task has ended, and closed with them.
    """

    def __init__(self, kind: str, threads: int, notifier: Notifier) -> None:
        self._parts = ThreadPoolExecutor(threads, f"kvtc-{kind}")
        self._ends = ThreadPoolExecutor(1, f"kvtc-{kind}-end")
        self._notifier = notifier
        self._ended: dict[int, T] = {}
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor that is readable when a task has ended."""
        return self._notifier.fileno()

    def begin(
        self,
        task: int,
        function: Callable[..., Any],
        parts: Sequence[tuple[Any, ...]],
        end: Callable[[list[Any]], T],
    ) -> None:
        """Begin a task.

        Parameters
        ----------
        task
            Its number.
        function
            Is called with each of ``parts``, in any thread.
        end
            Makes the task's result of what ``function`` gave: ``None`` where it raised, which is
            logged.
        """
        futures = [self._parts.submit(function, *part) for part in parts]
        self._ends.submit(self._end, task, futures, end)

    def take(self, task: int) -> T | None:
        """The result of a task that has ended, once."""
        with self._lock:
            return self._ended.pop(task, None)

    def take_all(self) -> dict[int, T]:
        """Results of all that have ended, once."""
        with self._lock:
            found, self._ended = self._ended, {}
        return found

    def close(self) -> None:
        """Wait for the parts that are being done; others are not, and no task ends any more."""
        self._parts.shutdown(cancel_futures=True)
        self._ends.shutdown(cancel_futures=True)
        self._notifier.close()

    def _end(self, task: int, futures: list[Future[Any]], end: Callable[[list[Any]], T]) -> None:
        try:
            errors = [future.exception() for future in futures]
        except CancelledError:
            return
        if failed := [error for error in errors if error is not None]:
            _log.warning("%d of %d chunks failed", len(failed), len(errors), exc_info=failed[0])
        result = end([None if future.exception() else future.result() for future in futures])
        with self._lock:
            self._ended[task] = result
        self._notifier.notify()
