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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from kvtc_stream.errors import KVTCError, UnsupportedError
from kvtc_stream.integrations.hosts.layouts import VLLM_LAYOUTS, Layout
from kvtc_stream.integrations.hosts.store import Store
from kvtc_stream.integrations.vllm.scheduling import PageJob
from kvtc_stream.stream.pages import PageCodec

_log = logging.getLogger(__name__)

#: Pages that are fetched from a store beside one another.
_FETCHES = 4


class Blocks:
    """The engine's blocks, all layers.

    Parameters
    ----------
    layers
        Views of K and V of each layer, [blocks, kv_heads, tokens, head_dim].
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._layers = layers
        self.device = layers[0][0].device
        self.tokens = int(layers[0][0].shape[2])

    def read(self, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """K and V [layers, kv_heads, tokens, head_dim] of some blocks, in order; copies."""
        index = torch.tensor(blocks, device=self.device)
        pairs = [
            [x.index_select(0, index).transpose(0, 1).flatten(1, 2) for x in pair]
            for pair in self._layers
        ]
        k, v = (torch.stack(layers) for layers in zip(*pairs, strict=True))
        return k, v

    def write(self, blocks: Sequence[int], k: Tensor, v: Tensor) -> None:
        """The contrary of :meth:`read`."""
        index = torch.tensor(blocks, device=self.device)
        for pair, new in zip(self._layers, zip(k, v, strict=True), strict=True):
            for x, values in zip(pair, new, strict=True):
                own = values.unflatten(1, (len(blocks), self.tokens)).transpose(0, 1)
                x[index] = own.to(self.device)


def proven_layout(
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    cache: Tensor,
    num_blocks: int,
    sizes: dict[str, int],
) -> Layout:
    """The layout in which the engine itself writes to its blocks.

    Keys and values are drawn, written by the engine's own kernel into a cache of two blocks, and
    looked for.

    Parameters
    ----------
    write
        Called with keys and values [tokens, kv_heads, head_dim], a cache, and int64 [tokens], the
        places in it.
    cache
        The cache of a layer, of which the shape and dtype are taken.
    num_blocks
        Its blocks.
    sizes
        As for :meth:`kvtc_stream.integrations.hosts.Layout.views`.

    Raises
    ------
    UnsupportedError
        No known layout explains what was written.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = 2 * sizes["N"]
    k, v = (
        torch.randn(tokens, sizes["H"], sizes["D"], generator=generator)
        .to(cache.dtype)
        .to(cache.device)
        for _ in range(2)
    )
    places = torch.arange(tokens, device=cache.device)
    for layout in VLLM_LAYOUTS:
        axis = layout.axes.index("B")  # brackets come later
        if cache.ndim <= axis or cache.shape[axis] != num_blocks:
            continue
        scratch = _scratch(cache, axis)
        try:
            found = layout.views(scratch, sizes)
        except UnsupportedError:
            continue
        write(k, v, scratch, places)
        if all(
            torch.equal(view.transpose(1, 2).flatten(0, 1), x)
            for view, x in zip(found, (k, v), strict=True)
        ):
            return layout
    raise UnsupportedError(
        f"the engine's blocks have shape {list(cache.shape)}, strides {list(cache.stride())}, and "
        f"no layout that KvtcConnector knows explains what its attention writes there "
        f"({', '.join(layout.name for layout in VLLM_LAYOUTS)}): choose another attention backend"
    )


def _scratch(cache: Tensor, axis: int) -> Tensor:
    """Two blocks of zeros whose axes lie in memory in the order of the cache's."""
    shape = list(cache.shape)
    shape[axis] = 2
    order = sorted(range(cache.ndim), key=lambda i: (-int(cache.stride()[i]), i))
    order.remove(axis)
    order.insert(0, axis)  # blocks of one layer may lie among those of others
    dense = cache.new_zeros([shape[i] for i in order])
    return dense.permute([order.index(i) for i in range(cache.ndim)])


class PageSink(Protocol):
    """What becomes of pages that the engine has computed."""

    def wanted(self, job: PageJob) -> bool:
        """Whether :meth:`take` is to be called."""
        ...

    def take(self, job: PageJob, k: Tensor, v: Tensor, valid: Callable[[], bool]) -> None:
        """A page, K and V [layers, kv_heads, tokens, head_dim]; ``valid`` tells whether the engine
        has kept it until now."""
        ...


@dataclass
class Counts:
    """What happened since the last look; bytes of the cache are those of the engine's dtype."""

    loaded_pages: int = 0
    loaded_bytes: int = 0
    loaded_cache_bytes: int = 0
    load_seconds: float = 0.0
    stored_pages: int = 0
    stored_bytes: int = 0
    stored_cache_bytes: int = 0
    store_seconds: float = 0.0
    known_pages: int = 0
    missing_pages: int = 0
    damaged_pages: int = 0
    failed_pages: int = 0
    dropped_pages: int = 0


class Counter:
    """Counts of several threads."""

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), Counts()

    def add(self, **counts: float) -> None:
        """Add to some counts."""
        with self._lock:
            for name, value in counts.items():
                setattr(self._counts, name, getattr(self._counts, name) + value)

    def take(self) -> Counts:
        """What was counted since the last call."""
        with self._lock:
            found, self._counts = self._counts, Counts()
        return found


class StoreSink:
    """Codes pages and stores them."""

    def __init__(self, store: Store, codec: PageCodec, counter: Counter) -> None:
        self._store, self._codec, self._counter = store, codec, counter

    def wanted(self, job: PageJob) -> bool:
        """Whether the store lacks the page."""
        if not self._store.exists(job.key.name):
            return True
        self._counter.add(known_pages=1)
        return False

    def take(self, job: PageJob, k: Tensor, v: Tensor, valid: Callable[[], bool]) -> None:
        """See :meth:`PageSink.take`."""
        started = time.perf_counter()
        page = self._codec.encode(k, v, positions=job.key.position, identity=job.key.identity)
        if not valid() or not self._store.put(job.key.name, page):
            self._counter.add(dropped_pages=1)
            return
        self._counter.add(
            stored_pages=1,
            stored_bytes=len(page),
            stored_cache_bytes=k.nbytes + v.nbytes,
            store_seconds=time.perf_counter() - started,
        )


@dataclass
class _Load:
    """The pages of one request on their way into blocks."""

    jobs: list[PageJob]
    deadline: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False
    useful: float = math.inf  #: pages at later positions are of no use: one before them is missing
    failed: set[int] = field(default_factory=set)
    event: Any = None


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
        Of the pages that are loaded: as many are decoded at a time. They are others than the
        sink's, so that no load waits for a page that is being stored.
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
        self._codecs: SimpleQueue[PageCodec] = SimpleQueue()
        for codec in codecs:
            self._codecs.put(codec)
        self._counter, self._timeout, self._most = counter, timeout, queue_pages
        self._cpus = _allowed_cpus(blocks.device)
        self._loader = ThreadPoolExecutor(2, "kvtc-load", initializer=self._spread)
        self._fetcher = ThreadPoolExecutor(_FETCHES, "kvtc-fetch", initializer=self._spread)
        count = max(1, len(codecs))
        self._decoder = ThreadPoolExecutor(count, "kvtc-decode", initializer=self._spread)
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

    def load(self, jobs: Sequence[PageJob]) -> None:
        """Begin to load pages, those of a request together and in order."""
        by_request: dict[str, list[PageJob]] = {}
        for job in jobs:
            by_request.setdefault(job.request, []).append(job)
        for request, own in by_request.items():
            load = _Load(own, time.monotonic() + self._timeout, event=self._event())
            with self._changed:
                self._loads[request] = load
            self._loader.submit(self._load, load)

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
            current = self._current
            if current is not None and current.request in requests:
                self._valid[id(current)] = False

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

    _current: PageJob | None = None

    def _spread(self) -> None:
        """Let a thread run on all cores: it inherits the one that the engine pins itself to."""
        if self._cpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._cpus)

    def _still(self, job: PageJob) -> Callable[[], bool]:
        return lambda: self._valid[id(job)]

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
            fetched = [self._fetcher.submit(self._fetch, job) for job in load.jobs]
            loaded = [
                self._decoder.submit(self._load_page, load, job, page)
                for job, page in zip(load.jobs, fetched, strict=True)
            ]
            for page in loaded:
                if not page.result():
                    break
                done += 1
        except Exception:
            _log.exception("loading a page failed: its tokens are computed")
            self._counter.add(failed_pages=1)
        finally:
            with load.lock:
                if not load.done:
                    # What comes after a page that is missing is of no use. Who sees that it is
                    # done does not lock: what failed is there before.
                    load.failed |= {b for job in load.jobs[done:] for b in job.blocks}
                    load.done = True
            self._counter.add(load_seconds=time.perf_counter() - started)
            with self._changed:
                self._changed.notify_all()

    def _fetch(self, job: PageJob) -> bytes | None:
        assert self._store is not None
        return self._store.get(job.key.name)

    def _load_page(self, load: _Load, job: PageJob, fetched: Future[bytes | None]) -> bool:
        """Whether the page is in its blocks now."""
        assert self._store is not None
        if load.done or job.key.position > load.useful:
            return False
        page = fetched.result()
        if page is None:
            self._counter.add(missing_pages=1)
            self._end(load, job)
            return False
        codec = self._codecs.get()
        try:
            with _stream(self._blocks.device, load.event):
                return self._decode(load, job, page, codec)
        except KVTCError as error:
            self._end(load, job)
            self._counter.add(damaged_pages=1)
            _log.warning("page %s is of no use and is deleted: %s", job.key.name, error)
            self._store.delete(job.key.name)
            return False
        finally:
            self._codecs.put(codec)

    @staticmethod
    def _end(load: _Load, job: PageJob) -> None:
        with load.lock:
            load.useful = min(load.useful, job.key.position)

    def _decode(self, load: _Load, job: PageJob, page: bytes, codec: PageCodec) -> bool:
        k, v = codec.decode(page, identity=job.key.identity)
        size = self._blocks.tokens
        own = slice(job.first * size, (job.first + len(job.blocks)) * size)
        tensors = [from_dlpack(x)[:, :, own] for x in (k, v)]
        with load.lock:
            if load.done or job.key.position > load.useful:
                return False
            self._blocks.write(job.blocks, *tensors)
        self._counter.add(
            loaded_pages=1,
            loaded_bytes=len(page),
            loaded_cache_bytes=sum(x.nbytes for x in tensors),
        )
        return True

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
                job, event = self._queue.popleft()
                self._current = job
            try:
                if self._valid[id(job)] and self._sink.wanted(job):
                    with _stream(self._blocks.device, event):
                        k, v = self._blocks.read(job.blocks)
                        self._sink.take(job, k, v, self._still(job))
            except Exception:
                _log.exception("storing a page failed: it is left out")
                self._counter.add(dropped_pages=1)
            with self._changed:
                self._current = None
                del self._valid[id(job)]
                self._storing[job.request] -= 1
                if not self._storing[job.request]:
                    del self._storing[job.request]
                self._changed.notify_all()


#: Has each thread's stream. It stays the same: CuPy keeps memory for every stream that it meets.
_own = threading.local()


def one_blas_thread() -> None:
    """Let matrix products run on the thread that asks for them: pages have a thread each already,
    and threads of OpenBLAS spin while they wait for cores that the model has."""
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
def _stream(device: torch.device, event: Any) -> Any:
    """The thread's own stream, behind ``event``; work on it is done when this ends.

    The codec's work is on it too: so it does not wait for the model's, and none of its memory is
    given to another page that is still read here.
    """
    if device.type != "cuda":
        yield
        return
    if not hasattr(_own, "stream"):
        _own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream = _own.stream
    with torch.cuda.device(device), torch.cuda.stream(stream), _of_cupy(stream.cuda_stream):
        stream.wait_event(event)
        yield
        stream.synchronize()


def _of_cupy(pointer: int) -> Any:
    """A stream as CuPy's current one; nothing where pages are coded without CuPy."""
    try:
        from kvtc_stream.gpu.runtime.streams import of_pointer
    except ImportError:
        return contextlib.nullcontext()
    return of_pointer(pointer)


def _allowed_cpus(device: torch.device) -> set[int]:
    """The cores that this process may use, whichever its main thread is pinned to."""
    if device.type != "cpu" or not hasattr(os, "sched_setaffinity"):
        return set()
    return set(range(os.cpu_count() or 1))
