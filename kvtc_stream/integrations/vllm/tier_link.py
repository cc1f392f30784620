"""What vLLM's scheduler knows of the tier, and the process that does its work; see ``tier``.

Calls only take notes, whose number does not depend on how large pages are or how long a store
takes. Threads carry them to the worker and bring back its answers. Nothing here imports vLLM.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from kvtc_stream.errors import UnsupportedError
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.vllm.tier_worker import WorkerConfig

_log = logging.getLogger(__name__)

_WORKER = "kvtc_stream.integrations.vllm.tier_worker"
#: Keys of one lookup, and pages of one message: other threads have a turn in between.
_GROUP, _PAGES = 16, 64
#: Outcomes of a page that is where it was to go.
_GOOD = frozenset({"loaded", "stored", "known"})


@dataclass(frozen=True)
class Finished:
    """A job that has ended.

    Attributes
    ----------
    job
        Its number.
    keys
        Those that were moved.
    whole
        Whether these are all.
    seconds
        Since it was submitted.
    """

    job: int
    keys: tuple[bytes, ...]
    whole: bool
    seconds: float


@dataclass
class _Job:
    """A job on its way."""

    kind: str
    keys: list[bytes]
    left: int
    record: dict[bytes, bool | None]
    good: list[bytes] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


class TierLink:
    """The worker's process and what was asked of it; one caller, the scheduler.

    Parameters
    ----------
    config
        For the worker.
    memory_file
        Descriptor of the file of the rows.
    most
        The most pages that wait to be stored; those beyond are not stored.

    Raises
    ------
    UnsupportedError
        The worker does not start; the message says why.
    """

    def __init__(self, config: WorkerConfig, memory_file: int, most: int) -> None:
        self._most, self._storing = most, 0
        self._requests: dict[str, dict[bytes, bool | None]] = {}
        self._new: list[tuple[dict[bytes, bool | None], bytes]] = []
        self._asked: dict[int, list[tuple[dict[bytes, bool | None], bytes]]] = {}
        self._jobs: dict[int, _Job] = {}
        self._finished: list[Finished] = []
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._gone = self._closing = False
        self._outbox: SimpleQueue[Callable[[], Iterable[tuple[Any, ...]]] | None] = SimpleQueue()
        self._process, self._connection = _start(config, memory_file)
        self._threads = [
            threading.Thread(target=work, name=f"kvtc-tier-{name}", daemon=True)
            for name, work in (("send", self._send), ("receive", self._receive))
        ]
        for thread in self._threads:
            thread.start()

    # Called by the scheduler.

    def begin(self, request: str) -> None:
        """A request comes: nothing is known of its pages."""
        self._requests[request] = {}

    def end(self, request: str) -> None:
        """A request has ended: forget what is known of its pages."""
        self._requests.pop(request, None)

    def lookup(self, request: str, key: bytes) -> bool | None:
        """Whether the store has a page; ``None`` while that is being looked up.

        The answer is kept until the request ends. A page that could not be loaded counts as missing
        from then on.
        """
        if self._gone:
            return False
        record = self._requests.setdefault(request, {})
        if key not in record:
            record[key] = None
            self._new.append((record, key))
        return record[key]

    def flush(self) -> None:
        """Send what was newly looked up."""
        if self._new:
            new, self._new = self._new, []
            self._outbox.put(lambda: self._look(new))

    def submit(
        self,
        kind: str,
        job: int,
        request: str,
        keys: Sequence[bytes],
        rows: Sequence[int],
        position: Callable[[bytes], int | None],
    ) -> None:
        """Begin to load pages into rows (``kind`` is ``"load"``), or to store rows (``"store"``).

        Parameters
        ----------
        position
            Called in a thread: where the page of a key begins; a page of which that is not known is
            not moved.
        """
        own, places = list(keys), list(rows)
        record = self._requests.get(request, {})
        with self._changed:
            took = len(own)
            if self._gone:
                took = 0
            elif kind == "store":
                took = max(0, min(took, self._most - self._storing))
                self._storing += took
            self._counts["dropped_pages"] += (len(own) - took) * (kind == "store")
            entry = self._jobs[job] = _Job(kind, own, took, record)
            if not took:
                self._ended(job, entry)
                return
        self._outbox.put(lambda: self._pages(kind, job, own[:took], places, position))

    def finished(self) -> list[Finished]:
        """Jobs that have ended since the last call."""
        with self._changed:
            found, self._finished = self._finished, []
        return found

    def counts(self) -> dict[str, float]:
        """What was counted since the last call."""
        with self._changed:
            found, self._counts = self._counts, defaultdict(float)
        return found

    def drain(self) -> None:
        """Wait until no job is left; what has not begun to be stored is not."""
        self._outbox.put(lambda: [("cancel",)])
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def rename(self, namespace: Namespace) -> None:
        """Pages are those of another namespace from now on."""
        self._outbox.put(lambda: [("rename", namespace)])

    def close(self, seconds: float = 30.0) -> None:
        """Store what waits, for so long at the most, and end the process."""
        self._closing = True
        self._outbox.put(lambda: [("close",)])
        self._outbox.put(None)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            _log.warning("pages that are not stored after %g s are left out", seconds)
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(1.0)

    # In threads.

    def _look(self, new: list[tuple[dict[bytes, bool | None], bytes]]) -> Iterable[tuple[Any, ...]]:
        for first in range(0, len(new), _GROUP):
            number, group = next(self._numbers), new[first : first + _GROUP]
            with self._changed:
                self._asked[number] = group
                gone = self._gone
            if gone:
                self._answered(number, [False] * len(group))
            else:
                yield "look", number, [key for _, key in group]

    def _pages(
        self,
        kind: str,
        job: int,
        keys: list[bytes],
        rows: list[int],
        position: Callable[[bytes], int | None],
    ) -> Iterable[tuple[Any, ...]]:
        for first in range(0, len(keys), _PAGES):
            pages = []
            for i in range(first, min(first + _PAGES, len(keys))):
                where = position(keys[i])
                if where is None:
                    self._moved(job, i, "dropped" if kind == "store" else "failed", 0, 0.0)
                else:
                    pages.append((i, keys[i], where, int(rows[i])))
            yield kind, job, pages

    def _send(self) -> None:
        while (messages := self._outbox.get()) is not None:
            try:
                for message in messages():
                    self._connection.send(message)
                    time.sleep(0)  # the scheduler may want its turn
            except OSError:
                pass  # the process is gone, and who receives will notice

    def _receive(self) -> None:
        take: dict[str, Callable[..., None]] = {"found": self._answered, "moved": self._moved}
        while True:
            try:
                kind, *rest = self._connection.recv()
            except (EOFError, OSError):
                break
            take[kind](*rest)
        self._lost()

    def _answered(self, number: int, found: list[bool]) -> None:
        with self._changed:
            for (record, key), own in zip(self._asked.pop(number), found, strict=True):
                record[key] = own

    def _moved(self, job: int, index: int, outcome: str, size: int, seconds: float) -> None:
        with self._changed:
            entry = self._jobs.get(job)
            if entry is None:
                return  # it was given up with the process
            key = entry.keys[index]
            self._counts[f"{outcome}_pages"] += 1
            if outcome in ("loaded", "stored"):
                self._counts[f"{outcome}_bytes"] += size
                self._counts[f"{entry.kind}_seconds"] += seconds
            if outcome in _GOOD:
                entry.good.append(key)
            elif entry.kind == "load":
                entry.record[key] = False
            entry.left -= 1
            self._storing -= entry.kind == "store"
            if not entry.left:
                self._ended(job, entry)

    def _ended(self, job: int, entry: _Job) -> None:
        del self._jobs[job]
        whole = len(entry.good) == len(entry.keys)
        seconds = time.monotonic() - entry.since
        self._finished.append(Finished(job, tuple(entry.good), whole, seconds))
        self._changed.notify_all()

    def _lost(self) -> None:
        """The process has ended: it writes nowhere any more, and whatever was asked fails."""
        code = self._process.wait()
        if not self._closing:
            _log.error(
                "the process of the tier has ended (%s): nothing is loaded or stored until vLLM "
                "starts again",
                f"signal {-code}" if code < 0 else f"exit status {code}",
            )
        with self._changed:
            self._gone = True
            for number in list(self._asked):
                for record, key in self._asked.pop(number):
                    record[key] = False
            for job, entry in list(self._jobs.items()):
                for key in entry.keys if entry.kind == "load" else ():
                    if key not in entry.good:
                        entry.record[key] = False
                self._storing -= entry.left if entry.kind == "store" else 0
                self._ended(job, entry)


def _start(config: WorkerConfig, memory_file: int) -> tuple[subprocess.Popen[bytes], Connection]:
    """The worker's process, when it is ready, and a pipe to it."""
    ours, theirs = socket.socketpair()
    # This process's own modules, and no more threads than there are cores.
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    cores = len(config.cores or os.sched_getaffinity(0))
    environment.setdefault("OPENBLAS_NUM_THREADS", str(max(1, cores // config.threads)))
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER, str(theirs.fileno()), str(memory_file)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), memory_file),
            env=environment,
        )
    connection = Connection(ours.detach())
    try:
        connection.send(config)
        answer = connection.recv()
    except (EOFError, OSError):
        answer = ("refused", f"it ended with status {process.wait()}; its log says why")
    if answer[0] != "ready":
        connection.close()
        process.wait()
        raise UnsupportedError(f"the process of the tier does not start: {answer[1]}")
    return process, connection
