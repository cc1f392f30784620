"""Codes rows of vLLM's host memory, in a process beside the scheduler's; see ``tier``.

The scheduler's process and this one share the rows and talk over a pipe. Nothing here imports vLLM.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from queue import PriorityQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.errors import CalibrationMismatchError, KVTCError
from kvtc_stream.formats import DType
from kvtc_stream.integrations.hosts.keys import Namespace, PageKey
from kvtc_stream.integrations.hosts.layouts import Layout
from kvtc_stream.integrations.hosts.store import Store, open_store
from kvtc_stream.integrations.vllm.settings import TierSettings
from kvtc_stream.io.dlpack import numpy_dtype
from kvtc_stream.stream.codec import Codec
from kvtc_stream.stream.pages import PageCodec

_log = logging.getLogger(__name__)

#: Pages that are fetched, and groups of names that are looked up, beside one another.
_FETCHES, _LOOKUPS = 4, 4
#: Seconds between looks at what does not come.
_TICK = 0.1
#: Niceness of this process beside the scheduler's: where cores are few, the scheduler goes first.
_NICENESS = 10
#: Order of work: somebody waits for what is loaded, nobody for what is stored.
_LOAD, _STORE, _END = range(3)


@dataclass(frozen=True)
class Rows:
    """Where K and V lie in rows of host memory: the blocks of the first layer, of the next, ...

    Attributes
    ----------
    layout
        Of one layer's blocks; its first axis is that of blocks.
    shape, strides
        Of one block, without the axis of blocks; strides in elements.
    dtype
        Element type.
    kv_heads, head_dim, block_tokens
        Of a block.
    blocks
        Of each layer in a row.
    order
        The place in a row of each layer, in the model's order.
    row_bytes, count
        From one row to the next, and how many there are.
    """

    layout: Layout
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    kv_heads: int
    head_dim: int
    block_tokens: int
    blocks: int
    order: tuple[int, ...]
    row_bytes: int
    count: int

    @property
    def tokens(self) -> int:
        """Of a row."""
        return self.blocks * self.block_tokens

    def read(self, memory: Any, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """K and V [layers, kv_heads, tokens, head_dim] of a row; copies."""
        size = self.kv_heads, self.tokens, self.head_dim
        pairs = [
            [x.swapaxes(0, 1).reshape(size) for x in pair] for pair in self._views(memory, row)
        ]
        k, v = (np.stack(layers) for layers in zip(*pairs, strict=True))
        return k, v

    def write(self, memory: Any, row: int, k: NDArray[Any], v: NDArray[Any]) -> None:
        """The contrary of :meth:`read`."""
        size = self.kv_heads, self.blocks, self.block_tokens, self.head_dim
        for pair, *new in zip(self._views(memory, row), k, v, strict=True):
            for view, values in zip(pair, new, strict=True):
                view[:] = values.reshape(size).swapaxes(0, 1)

    def _views(self, memory: Any, row: int) -> list[tuple[Any, Any]]:
        """K and V [blocks, kv_heads, block_tokens, head_dim] of each layer."""
        if not 0 <= row < self.count:
            raise IndexError(f"row {row} of {self.count}")
        dtype = numpy_dtype(DType[self.dtype.upper()])
        block = int(np.prod(self.shape)) * dtype.itemsize
        sizes = {"H": self.kv_heads, "N": self.block_tokens, "D": self.head_dim}
        found = []
        for place in self.order:
            layer = np.ndarray(
                (self.blocks, *self.shape),
                dtype,
                memory,
                row * self.row_bytes + place * self.blocks * block,
                (block, *(n * dtype.itemsize for n in self.strides)),
            )
            found.append(self.layout.views(layer, sizes))
        return found


@dataclass(frozen=True)
class WorkerConfig:
    """What the worker is told when it starts.

    Attributes
    ----------
    settings
        Of the tier.
    digest
        Of the calibration that its file must have.
    rows, namespace
        Of the pages.
    threads
        Pages that are coded at a time.
    cores
        Which this process may use; ``None``: those of its parent.
    """

    settings: TierSettings
    digest: bytes
    rows: Rows
    namespace: Namespace
    threads: int
    cores: frozenset[int] | None = None


class _Waiting:
    """What is asked of the store, and whether it takes too long.

    What has begun is given up by its own time; what waits for a thread, when nothing else came for
    as long. Whoever takes something away may answer for it, nobody else.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout, self._lock = timeout, threading.Lock()
        self._waiting: dict[Any, tuple[float, bool, tuple[Any, ...]]] = {}
        self._came = 0.0

    def add(self, what: Any, if_late: tuple[Any, ...]) -> None:
        with self._lock:
            self._waiting[what] = time.monotonic(), False, if_late

    def begin(self, what: Any) -> bool:
        """Whether it is still wanted."""
        with self._lock:
            if what not in self._waiting:
                return False
            self._waiting[what] = time.monotonic(), True, self._waiting[what][2]
            return True

    def take(self, what: Any) -> bool:
        """Whether it is still wanted; after this it is not."""
        with self._lock:
            self._came = time.monotonic()
            return self._waiting.pop(what, None) is not None

    def late(self) -> list[tuple[Any, ...]]:
        """What was given up."""
        now = time.monotonic()
        with self._lock:
            late = [
                what
                for what, (since, begun, _) in self._waiting.items()
                if now - (since if begun else max(since, self._came)) > self._timeout
            ]
            return [self._waiting.pop(what)[2] for what in late]


class TierWorker:
    """Looks up, loads and stores what it is told, in threads.

    Parameters
    ----------
    connection
        To the scheduler's process.
    memory
        The rows.
    rows, namespace, store
        Of the pages.
    codecs
        A thread for each.
    timeout
        Seconds that the store may take for a page.
    others
        What each of ``codecs`` leaves pages to that are not a prompt's first; by default nothing.
    """

    def __init__(
        self,
        connection: Connection,
        memory: Any,
        rows: Rows,
        namespace: Namespace,
        store: Store,
        codecs: Sequence[PageCodec],
        timeout: float,
        others: Sequence[PageCodec] | None = None,
    ) -> None:
        self._connection, self._sending = connection, threading.Lock()
        self._memory, self._rows = memory, rows
        self._namespace, self._store = namespace, store
        self._waiting = _Waiting(timeout)
        self._work: PriorityQueue[tuple[int, int, Callable[[PageCodec], None] | None]]
        self._work = PriorityQueue()
        self._others = dict(zip(codecs, others or codecs, strict=True))
        self._numbers = itertools.count()
        self._cancelled = -1
        self._lookups = ThreadPoolExecutor(_LOOKUPS, "kvtc-lookup")
        self._fetches = ThreadPoolExecutor(_FETCHES, "kvtc-fetch")
        self._coders = [
            threading.Thread(target=self._code, args=(codec,), name="kvtc-code", daemon=True)
            for codec in codecs
        ]
        for thread in self._coders:
            thread.start()

    def serve(self) -> bool:
        """Do what is told; ``True`` when told to end, ``False`` when there is nobody to tell."""
        take: dict[str, Callable[..., None]] = {
            "look": self._look,
            "load": self._load,
            "store": self._store_pages,
            "cancel": self._cancel,
            "rename": self._rename,
        }
        looked = 0.0
        while True:
            if self._connection.poll(_TICK):
                try:
                    kind, *rest = self._connection.recv()
                except (EOFError, OSError):
                    return False
                if kind == "close":
                    return True
                take[kind](*rest)
            if time.monotonic() - looked > _TICK:
                looked = time.monotonic()
                late = self._waiting.late()
                if late:
                    _log.warning("the store took too long: %d answers are given up", len(late))
                for answer in late:
                    self._send(*answer)

    def close(self) -> None:
        """Finish what was told."""
        for _ in self._coders:
            self._put(_END, None)
        for thread in self._coders:
            thread.join()

    def _send(self, *message: Any) -> None:
        # Nobody listens: this process is about to end.
        with contextlib.suppress(OSError), self._sending:
            self._connection.send(message)

    def _put(self, order: int, work: Callable[[PageCodec], None] | None) -> None:
        self._work.put((order, next(self._numbers), work))

    def _code(self, codec: PageCodec) -> None:
        while (work := self._work.get()[2]) is not None:
            work(codec)

    def _moved(
        self, page: tuple[int, int], outcome: str, size: int = 0, started: float | None = None
    ) -> None:
        seconds = 0.0 if started is None else time.perf_counter() - started
        self._send("moved", *page, outcome, size, seconds)

    # Lookups.

    def _look(self, number: int, keys: list[bytes]) -> None:
        self._waiting.add(number, ("found", number, [False] * len(keys)))
        self._lookups.submit(self._look_up, number, keys)

    def _look_up(self, number: int, keys: list[bytes]) -> None:
        found = [False] * len(keys)
        if not self._waiting.begin(number):
            return
        try:
            for i, key in enumerate(keys):
                found[i] = self._store.exists(self._namespace.page(key, 0).name)
        except Exception:
            _log.exception("looking up pages failed: they count as missing")
        if self._waiting.take(number):
            self._send("found", number, found)

    # Loads.

    def _load(self, job: int, pages: list[tuple[int, bytes, int, int]]) -> None:
        for index, key, position, row in pages:
            page = job, index
            self._waiting.add(page, ("moved", job, index, "failed", 0, 0.0))
            self._fetches.submit(self._fetch, page, self._namespace.page(key, position), row)

    def _fetch(self, page: tuple[int, int], key: PageKey, row: int) -> None:
        if not self._waiting.begin(page):
            return
        started, outcome, data = time.perf_counter(), "missing", None
        try:
            data = self._store.get(key.name)
        except Exception:
            _log.exception("fetching a page failed: its tokens are computed")
            outcome = "failed"
        if not self._waiting.take(page):
            return  # its row may be another's by now
        if data is None:
            self._moved(page, outcome, started=started)
        else:
            self._put(_LOAD, partial(self._decode, page, key, row, data, started))

    def _decode(
        self,
        page: tuple[int, int],
        key: PageKey,
        row: int,
        data: bytes,
        started: float,
        codec: PageCodec,
    ) -> None:
        try:
            k, v = codec.decode(data, identity=key.identity)
            self._rows.write(self._memory, row, k, v)
            outcome = "loaded"
        except KVTCError as error:
            _log.warning("page %s is of no use and is deleted: %s", key.name, error)
            outcome = "damaged"
            with contextlib.suppress(Exception):
                self._store.delete(key.name)
        except Exception:
            _log.exception("decoding a page failed: its tokens are computed")
            outcome = "failed"
        self._moved(page, outcome, len(data), started)

    # Stores.

    def _store_pages(self, job: int, pages: list[tuple[int, bytes, int, int]]) -> None:
        for index, key, position, row in pages:
            number = next(self._numbers)
            work = partial(
                self._encode, (job, index), number, self._namespace.page(key, position), row
            )
            self._work.put((_STORE, number, work))

    def _cancel(self) -> None:
        """What has not begun is not stored."""
        self._cancelled = next(self._numbers)

    def _rename(self, namespace: Namespace) -> None:
        """Pages are others from now on; those before are not found any more."""
        self._namespace = namespace

    def _encode(
        self, page: tuple[int, int], number: int, key: PageKey, row: int, codec: PageCodec
    ) -> None:
        started, size, outcome = time.perf_counter(), 0, "dropped"
        try:
            if number < self._cancelled:
                pass
            elif self._store.exists(key.name):
                outcome = "known"
            else:
                k, v = self._rows.read(self._memory, row)
                own = self._others[codec] if key.position else codec
                data = own.encode(k, v, positions=key.position, identity=key.identity)
                size = len(data)
                if self._store.put(key.name, data):
                    outcome = "stored"
        except Exception:
            _log.exception("storing a page failed: it is left out")
        self._moved(page, outcome, size, started)


def worker_of(config: WorkerConfig, connection: Connection, memory_file: int) -> TierWorker:
    """A worker that is ready: kernels are compiled, and plans are made.

    Raises
    ------
    CalibrationMismatchError
        The file of the calibration has changed.
    """
    if config.cores is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, config.cores)
    settings, rows = config.settings, config.rows
    assert settings.calibration is not None
    assert settings.store is not None
    calibration = Calibration.load(settings.calibration)
    if calibration.digest != config.digest:
        raise CalibrationMismatchError(f"{settings.calibration} changed while vLLM started")
    codec = Codec(calibration, block_tokens=rows.tokens, backend="cpu", **settings.codec_options())
    key = settings.key(calibration.digest)
    codecs = [PageCodec(codec, dtype=rows.dtype, key=key) for _ in range(config.threads)]
    others = codecs
    if settings.bounded == "first":
        loose = replace(codec, error_bound=None)
        others = [PageCodec(loose, dtype=rows.dtype, key=key) for _ in codecs]
    section = calibration.geometry.sections[0]
    rng = np.random.default_rng(0)
    k, v = (
        rng.standard_normal(shape, dtype=np.float32).astype(numpy_dtype(DType[rows.dtype.upper()]))
        for shape in (section.k_shape(rows.tokens), section.v_shape(rows.tokens))
    )
    for own in {*codecs, *others}:
        own.decode(own.encode(k, v, positions=0, identity=b""), identity=b"")
    memory = mmap.mmap(memory_file, rows.count * rows.row_bytes)
    store = open_store(settings.store, settings.budget)
    return TierWorker(
        connection, memory, rows, config.namespace, store, codecs, settings.timeout, others
    )


def main(pipe: int, memory_file: int) -> None:
    """Serve until told to end, or until the scheduler's process is gone."""
    logging.basicConfig(format="kvtc tier: %(message)s", level=logging.WARNING)
    connection = Connection(pipe)
    os.nice(_NICENESS)
    try:
        worker = worker_of(connection.recv(), connection, memory_file)
    except Exception as error:
        connection.send(("refused", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready",))
    if worker.serve():
        worker.close()
    # Threads may wait for a store that does not answer.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
