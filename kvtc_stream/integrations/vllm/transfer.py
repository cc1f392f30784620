"""Pages between the engine's blocks and the store: what the connector does beside the model.

Loads go before stores. Each page is coded in a thread, from and into the engine's own blocks; none
of this waits for the model, nor the model for it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtc_stream.backends.select import get_backend
from kvtc_stream.errors import KVTCError
from kvtc_stream.formats import BlockTable
from kvtc_stream.integrations.hosts.store import Store
from kvtc_stream.integrations.vllm.blocks import Blocks
from kvtc_stream.integrations.vllm.counts import Counter
from kvtc_stream.integrations.vllm.scheduling import PageJob
from kvtc_stream.integrations.vllm.sink import PageSink
from kvtc_stream.io.steps import run
from kvtc_stream.io.threads import stay_alone
from kvtc_stream.stream.pages import PageCodec

_log = logging.getLogger(__name__)

#: Pages that are fetched from a store beside one another: at least, and at most if there are so
#: many cores.
_FETCHES = 4, 16
#: Codecs that a thread needs which takes groups of pages in turn on a CUDA device, each with
#: scratch of its own: as many as :meth:`kvtc_stream.backends.base.Backend.interleaving` begins.
IN_TURN = 3


@dataclass
class _Load:
    """The pages of one request on their way into blocks."""

    jobs: list[PageJob]
    deadline: float
    lock: threading.Condition = field(default_factory=threading.Condition)
    done: bool = False
    writing: int = 0  #: threads that write to blocks: until they are done the load is not
    useful: float = math.inf  #: pages at later positions are of no use: one before them is missing
    failed: set[int] = field(default_factory=set)
    event: Any = None

    def begin(self, position: int) -> bool:
        """Whether a page at ``position`` may be written now; if so, :meth:`end` must follow."""
        with self.lock:
            if self.done or position > self.useful:
                return False
            self.writing += 1
            return True

    def end(self) -> None:
        """A thread does not write any more."""
        with self.lock:
            self.writing -= 1
            self.lock.notify_all()

    def stop(self, job: PageJob) -> None:
        """What comes after this page is of no use."""
        with self.lock:
            self.useful = min(self.useful, job.key.position)


@dataclass
class _Group:
    """Pages of a load that are decoded at once; ``done`` of them, the first ones, are in their
    blocks. ``table`` and ``sizes`` are of those that are whole, up to the first that is not."""

    jobs: Sequence[PageJob]
    fetched: Sequence[Future[bytes | None]] = ()
    table: BlockTable | None = None
    sizes: Sequence[int] = ()
    done: int = 0
    thread: Future[None] | None = None


class PageTransfer:
    """Moves pages in threads.

    Parameters
    ----------
    blocks
        The engine's.
    sink
        What becomes of computed pages.
    store
        Where pages are loaded from; ``None`` to load none.
    codecs
        Of the pages that are loaded: as many are decoded at a time on a CPU, and :data:`IN_TURN`
        are needed on a CUDA device. They are others than the sink's, so that no load waits for a
        page that is being stored.
    counter
        What counts.
    timeout
        Seconds that a load may take.
    queue_pages
        The most pages that wait to be stored.
    """

    def __init__(
        self,
        blocks: Blocks,
        sink: PageSink,
        store: Store | None,
        codecs: Sequence[PageCodec],
        counter: Counter,
        *,
        timeout: float,
        queue_pages: int,
    ) -> None:
        self._blocks, self._sink, self._store = blocks, sink, store
        self._checker = codecs[0] if codecs else None
        self._codecs: SimpleQueue[PageCodec] = SimpleQueue()
        for codec in codecs:
            self._codecs.put(codec)
        self._counter, self._timeout, self._most = counter, timeout, queue_pages
        self._cpus = _allowed_cpus(blocks.device)
        self._loader = ThreadPoolExecutor(2, "kvtc-load", initializer=self._spread)
        fetches = min(max(_FETCHES[0], os.cpu_count() or 1), _FETCHES[1])
        self._fetcher = ThreadPoolExecutor(fetches, "kvtc-fetch", initializer=self._spread)
        self._backend = get_backend("cuda" if blocks.device.type == "cuda" else "cpu")
        self._count = len(codecs)
        threads = 1 if blocks.device.type == "cuda" else max(1, len(codecs))
        self._decoder = ThreadPoolExecutor(threads, "kvtc-decode", initializer=self._spread)
        #: Whether the thread that decodes does all of a load.
        self._alone = blocks.device.type == "cuda" and store is not None and store.at_once
        #: Of loads, and of stores. They stay the same: CuPy keeps memory for every stream that it
        #: meets.
        self._streams: list[Any] = [None, None]
        if blocks.device.type == "cuda":
            self._streams = [torch.cuda.Stream(blocks.device) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._loads: dict[str, _Load] = {}
        self._errors: set[int] = set()
        self._changed = threading.Condition()
        self._queue: deque[tuple[PageJob, Any]] = deque()
        self._storing: dict[str, int] = {}  # jobs that are not done, by request
        self._valid: dict[int, bool] = {}
        self._held: set[str] = set()
        self._closing = False
        self._saver = threading.Thread(target=self._save, name="kvtc-store", daemon=True)
        self._saver.start()

    # Called by the engine.

    def warm_up(self, code: Callable[[], Sequence[BlockTable]]) -> None:
        """Before the first request: ``code`` pages as those are that are stored, a table of each,
        and decode them to nowhere as those are that are loaded, as many at once; so that kernels
        are compiled, and the threads' and streams' memory is there."""
        with _on(self._streams[1], self._event()):
            pages = code()
        together, last = self._blocks.together, pages[-1]
        own = [BlockTable.concat([*pages, *[last] * together][:together]), last]

        def decode(event: Any) -> None:
            codecs = [self._codecs.get() for _ in range(self._count)]
            try:
                with _on(self._streams[0], event):
                    for some in own:
                        nowhere = np.full(int(some.rows["tokens"].sum()), -1)
                        target = self._blocks.target
                        tasks = [codec.decoding(some, nowhere, *target) for codec in codecs]
                        run(self._backend.interleaving(tasks))
            finally:
                for codec in codecs:
                    self._codecs.put(codec)

        self._decoder.submit(decode, self._event()).result()

    def load(self, jobs: Sequence[PageJob]) -> None:
        """Begin to load pages, those of a request together and in order."""
        by_request: dict[str, list[PageJob]] = {}
        for job in jobs:
            by_request.setdefault(job.request, []).append(job)
        for request, own in by_request.items():
            load = _Load(own, time.monotonic() + self._timeout, event=self._event())
            with self._changed:
                self._loads[request] = load
            (self._decoder if self._alone else self._loader).submit(self._load, load)

    def store(self, jobs: Sequence[PageJob]) -> None:
        """Begin to store pages whose computation is on its way."""
        if not jobs:
            return
        event = self._event()
        with self._changed:
            room = max(0, self._most - len(self._queue))
            for job in jobs[:room]:
                self._queue.append((job, event))
                self._valid[id(job)] = True
                self._storing[job.request] = self._storing.get(job.request, 0) + 1
            self._changed.notify_all()
        if len(jobs) > room:
            self._counter.add(dropped_pages=len(jobs) - room)

    def preempted(self, requests: set[str]) -> None:
        """Blocks of these requests are about to be written to: what is read of them is void."""
        if not requests:
            return
        with self._changed:
            for job, _ in self._queue:
                if job.request in requests:
                    self._valid[id(job)] = False
            for job in self._current:
                if job.request in requests:
                    self._valid[id(job)] = False

    def hold(self, requests: set[str]) -> None:
        """Finished requests whose blocks stay until :meth:`results` names them."""
        self._held |= requests

    def results(self) -> tuple[set[str], set[str]]:
        """Requests that are stored, of those held, and that are loaded, well or not."""
        now = time.monotonic()
        with self._changed:
            stored = {request for request in self._held if not self._storing.get(request)}
            self._held -= stored
            pending = list(self._loads.items())
        loaded = set()
        for request, load in pending:
            if not load.done:
                if now <= load.deadline:
                    continue
                with load.lock:
                    if load.writing:
                        continue  # a moment more
                    if not load.done:
                        # Whoever works on it sees this before it writes again.
                        load.done = True
                        load.failed |= {block for job in load.jobs for block in job.blocks}
                        self._counter.add(failed_pages=len(load.jobs))
                        _log.warning(
                            "loading %d pages took more than %g s: their tokens are computed",
                            len(load.jobs),
                            self._timeout,
                        )
            loaded.add(request)
            self._errors |= load.failed
            with self._changed:
                del self._loads[request]
        return stored, loaded

    def errors(self) -> set[int]:
        """Blocks that could not be loaded, since the last call; requests that they belong to have
        been named by :meth:`results`."""
        found, self._errors = self._errors, set()
        return found

    def rest(self, seconds: float) -> None:
        """Wait a moment if there is work, for an engine that has nothing else to do."""
        with self._changed:
            if self._loads or self._held:
                self._changed.wait(seconds)

    def close(self, seconds: float = 30.0) -> None:
        """Store what waits, for so long at the most, and end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._saver.join(seconds)
        with self._changed:
            self._queue.clear()
        for threads in (self._loader, self._fetcher, self._decoder):
            threads.shutdown(wait=False, cancel_futures=True)

    # In threads.

    _current: Sequence[PageJob] = ()

    def _spread(self) -> None:
        """Let a thread run on all cores: it inherits the one that the engine pins itself to."""
        if self._cpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._cpus)

    def _still(self, job: PageJob) -> bool:
        return self._valid[id(job)]

    def _event(self) -> Any:
        """What the device is to reach before blocks are touched; ``None`` on a CPU."""
        if self._blocks.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._blocks.device))
        return event

    def _load(self, load: _Load) -> None:
        started, done = time.perf_counter(), 0
        try:
            groups = self._fetching(load)
            # One thread takes those of a device in turn: several would wait for one another's
            # interpreter. If nothing is to be waited for either, it is this one.
            on_device = self._blocks.device.type == "cuda"
            if self._alone:
                self._load_groups(load, groups)
            else:
                for some in [groups] if on_device else [[group] for group in groups]:
                    threads = self._decoder.submit(self._load_groups, load, some)
                    for group in some:
                        group.thread = threads
            for group in groups:
                if group.thread is not None:
                    group.thread.result()
                done += group.done
                if group.done < len(group.jobs):
                    break
        except Exception:
            _log.exception("loading a page failed: its tokens are computed")
            self._counter.add(failed_pages=1)
        finally:
            with load.lock:
                if not load.done:
                    # What comes after a page that is missing is of no use. Who sees that it is
                    # done does not lock: what failed is there before.
                    load.useful = -1
                    load.lock.wait_for(lambda: not load.writing)
                    load.failed |= {b for job in load.jobs[done:] for b in job.blocks}
                    load.done = True
            self._counter.add(load_seconds=time.perf_counter() - started)
            with self._changed:
                self._changed.notify_all()

    def _fetching(self, load: _Load) -> list[_Group]:
        """The pages of a load, which threads begin to fetch where that takes time."""
        assert self._store is not None
        size = self._blocks.together
        groups = [_Group(load.jobs[i : i + size]) for i in range(0, len(load.jobs), size)]
        for group in groups if not self._store.at_once else ():
            group.fetched = [self._fetcher.submit(self._fetch, load, job) for job in group.jobs]
        return groups

    def _fetch(self, load: _Load, job: PageJob) -> bytes | None:
        """A page, if it is there."""
        assert self._store is not None
        if load.done or job.key.position > load.useful:
            return None
        page = self._store.get(job.key.name)
        if page is None:
            self._counter.add(missing_pages=1)
            load.stop(job)
        return page

    def _spoilt(self, load: _Load, job: PageJob, error: KVTCError) -> None:
        assert self._store is not None
        load.stop(job)
        self._counter.add(damaged_pages=1)
        _log.warning("page %s is of no use and is deleted: %s", job.key.name, error)
        self._store.delete(job.key.name)

    def _load_groups(self, load: _Load, groups: Sequence[_Group]) -> None:
        """Decode groups of pages into their blocks."""
        self._run(load, [self._loading(load, group) for group in groups])
        for group in groups:
            # If one of its pages is none: those before it are good.
            for i in range(group.done, len(group.sizes)):
                assert group.table is not None
                one = _Group(group.jobs[i : i + 1])
                one.table, one.sizes = group.table.taken(np.array([i])), group.sizes[i : i + 1]
                self._run(load, [self._decoding(load, one)])
                if not one.done:
                    break
                group.done += 1

    def _run(self, load: _Load, tasks: Sequence[Generator[None]]) -> None:
        """Take tasks to their ends, on the thread's stream."""
        try:
            with _on(self._streams[0], load.event):
                run(self._backend.interleaving(tasks))
        finally:
            for task in tasks:  # what one of them raises ends all
                task.close()

    def _loading(self, load: _Load, group: _Group) -> Generator[None]:
        """A task: pages of a group, when they are there and whole."""
        assert self._checker is not None
        wait(group.fetched)  # once, not for each of them
        found = (
            (future.result() for future in group.fetched)
            if group.fetched
            else (self._fetch(load, job) for job in group.jobs)
        )
        pages: list[bytes] = []
        for page in found:
            if page is None:
                break
            pages.append(page)
        names = [job.key.identity for job in group.jobs[: len(pages)]]
        group.table, error = self._checker.checked_many(pages, identities=names)
        group.sizes = [len(page) for page in pages[: len(group.table)]]
        if error is not None:
            self._spoilt(load, group.jobs[len(group.table)], error)
        if group.sizes:
            yield from self._decoding(load, group)

    def _decoding(self, load: _Load, group: _Group) -> Generator[None]:
        """A task: pages that are whole into their blocks; a page that cannot be decoded leaves the
        others of its group for another try."""
        assert group.table is not None
        jobs = group.jobs[: len(group.sizes)]
        if not load.begin(jobs[0].key.position):
            group.sizes = ()
            return
        codec = self._codecs.get()
        try:
            slots = self._slots(jobs, group.table)
            yield from codec.decoding(group.table, slots, *self._blocks.target)
        except KVTCError as error:
            if len(jobs) == 1:
                self._spoilt(load, jobs[0], error)
                group.sizes = ()
            return
        finally:
            self._codecs.put(codec)
            load.end()
        group.done = len(jobs)
        tokens = sum(len(job.blocks) for job in jobs) * self._blocks.tokens
        self._counter.add(
            loaded_pages=len(jobs),
            loaded_bytes=sum(group.sizes),
            loaded_cache_bytes=tokens * self._blocks.token_bytes,
        )

    def _slots(self, jobs: Sequence[PageJob], table: BlockTable) -> NDArray[np.int64]:
        """Where the tokens of pages go: not all of them, if the engine has the first already."""
        own = self._blocks.slots([block for job in jobs for block in job.blocks])
        size, tokens = self._blocks.tokens, table.rows["tokens"]
        if all(not job.first for job in jobs) and len(own) == tokens.sum():
            counts = np.array([len(job.blocks) for job in jobs], np.int64)
            if (counts * size == tokens).all():
                return own
        slots = np.full(int(tokens.sum()), -1, np.int64)
        page = done = 0
        for job, count in zip(jobs, tokens.tolist(), strict=True):
            first, many = job.first * size, len(job.blocks) * size
            if first + many > count:
                raise ValueError(f"{first + many} tokens of a page that has {count}")
            slots[page + first : page + first + many] = own[done : done + many]
            page, done = page + count, done + many
        return slots

    def _save(self) -> None:
        self._spread()
        while True:
            with self._changed:
                # Somebody waits for what is loaded, nobody for what is stored.
                while (not self._queue and not self._closing) or (
                    any(not x.done for x in self._loads.values()) and not self._closing
                ):
                    self._changed.wait(1.0)
                if not self._queue:
                    return
                count = min(self._blocks.stored_together, len(self._queue))
                taken = [self._queue.popleft() for _ in range(count)]
                self._current = jobs = [job for job, _ in taken]
            try:
                self._store_pages(jobs, taken[-1][1])
            except Exception:
                _log.exception("storing pages failed: they are left out")
                self._counter.add(dropped_pages=len(jobs))
            with self._changed:
                self._current = ()
                for job in jobs:
                    del self._valid[id(job)]
                    self._storing[job.request] -= 1
                    if not self._storing[job.request]:
                        del self._storing[job.request]
                self._changed.notify_all()

    def _store_pages(self, jobs: Sequence[PageJob], event: Any) -> None:
        """Hand pages that are wanted to the sink, each once."""
        wanted = {job.key.name: job for job in jobs if self._still(job) and self._sink.wanted(job)}
        if not wanted:
            return
        own = list(wanted.values())
        with _on(self._streams[1], event):
            k, v = self._blocks.read([block for job in own for block in job.blocks])
            self._sink.take(own, k, v, self._still)


def one_blas_thread() -> None:
    """Let matrix products, and all else of a page, run on the thread that asks for them: pages have
    a thread each already, and threads of OpenBLAS spin while they wait for cores that the model
    has."""
    stay_alone()
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        _log.warning(
            "pages take several times the processor time if products of several threads compete "
            "for cores: pip install 'kvtc-stream[vllm]' (threadpoolctl), or set "
            "OPENBLAS_NUM_THREADS=1"
        )
        return
    threadpool_limits(1, "blas")


@contextlib.contextmanager
def _on(stream: Any, event: Any) -> Any:
    """Work on a stream, if there is one, behind ``event``; it is done when this ends.

    The codec's work is on it too: so it does not wait for the model's, and none of its memory is
    given to another page that is still read here.
    """
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream), _of_cupy(stream):
        stream.wait_event(event)
        yield
        stream.synchronize()


def _of_cupy(stream: Any) -> Any:
    """A stream as CuPy's current one; nothing where pages are coded without CuPy."""
    try:
        from kvtc_stream.gpu.runtime.streams import of_pointer
    except ImportError:
        return contextlib.nullcontext()
    return of_pointer(stream.cuda_stream, stream.device.index)


def _allowed_cpus(device: torch.device) -> set[int]:
    """The cores that this process may use, whichever its main thread is pinned to."""
    if device.type != "cpu" or not hasattr(os, "sched_setaffinity"):
        return set()
    return set(range(os.cpu_count() or 1))
