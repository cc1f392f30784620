"""An L2 adapter of LMCache: chunks as pages, in a store."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from kvtc_stream.errors import KVTCError, UnsupportedError
from kvtc_stream.integrations.hosts.store import open_store
from kvtc_stream.integrations.lmcache.chunks import Chunks, chunk_name
from kvtc_stream.integrations.lmcache.settings import AdapterSettings
from kvtc_stream.integrations.lmcache.tasks import Tasks

_log = logging.getLogger(__name__)
#: Chunks that are looked up, and fetched, at a time; they are decoded in turn.
_LOOKUPS, _LOADS = 4, 4


class KvtcAdapter(L2AdapterInterface):  # type: ignore[misc]
    """Keeps chunks of LMCache's memory, compressed, in a store.

    LMCache makes it, from ``--l2-adapter``; settings are in ``adapter_params``, see
    :class:`kvtc_stream.integrations.lmcache.AdapterSettings`. A chunk that is missing, damaged or
    another's is missed, and never an error of a request.

    Raises
    ------
    UnsupportedError
        The calibration has several kinds of layers.
    ValueError
        Settings are unknown, missing or wrong.
    """

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()
        self._settings = AdapterSettings.read(params)
        self._chunks = Chunks(self._settings)
        assert self._settings.store is not None
        self._store = open_store(self._settings.store, self._settings.budget)
        #: Chunks that this adapter has stored and told of, by name, and their sizes.
        self._told: dict[str, tuple[ObjectKey, int]] = {}
        self._evicted: deque[str] = deque()
        self._store.watchers.append(self._evicted.append)
        self._telling = threading.Lock()
        self._left_out: Counter[str] = Counter()
        self._closing = False
        self._numbers = itertools.count()
        # One thread stores: chunks are coded in turn, and what was evicted is told after what came.
        self._stores: Tasks[L2StoreResult] = Tasks("store", 1, create_event_notifier())
        self._lookups: Tasks[Bitmap] = Tasks("lookup", _LOOKUPS, create_event_notifier())
        self._loads: Tasks[Bitmap] = Tasks("load", _LOADS, create_event_notifier())

    def get_store_event_fd(self) -> int:
        """A descriptor that is readable when a store task has ended."""
        return self._stores.fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        """A descriptor that is readable when a lookup has ended."""
        return self._lookups.fileno()

    def get_load_event_fd(self) -> int:
        """A descriptor that is readable when a load has ended."""
        return self._loads.fileno()

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Begin to code and store chunks.

        The task succeeds unless the store fails: a chunk that does not tell its position surely,
        waits too long, or is larger than the budget is left out, counted and logged.
        """
        began = time.monotonic()
        parts = [(key, obj, began) for key, obj in zip(keys, objects, strict=True)]
        return self._begin(self._stores, self._store_chunk, parts, _stored)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Store tasks that have ended, once, and the bytes that they wrote."""
        return self._stores.take_all()

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Begin to look chunks up; those that are found are evicted last until they are unlocked.

        Chunks of a group whose layout is not told are missed.
        """
        parts = [(key, group_layout_descs.get(key.object_group_id)) for key in keys]
        return self._begin(self._lookups, self._hold_chunk, parts, _bitmap)

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Which chunks were found, once; ``None`` if the lookup has not ended."""
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Undo the lock of one lookup."""
        for name in self._names(keys):
            self._store.release(name)

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Begin to load chunks. Those that are missing, damaged, another's or late are missed, and
        their memory is as it was; the damaged ones are deleted, and will be stored again."""
        began = time.monotonic()
        parts = [(key, obj, began) for key, obj in zip(keys, objects, strict=True)]
        return self._begin(self._loads, self._load_chunk, parts, self._loaded(keys))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Which chunks were loaded, once; ``None`` if the load has not ended."""
        return self._loads.take(task_id)

    def delete(self, keys: list[ObjectKey]) -> None:
        """Delete chunks, but those that are locked; only of layouts that this server has met."""
        for name in self._names(keys):
            if not self._store.held(name):
                self._store.delete(name)
                self._tell_gone(name)

    def report_status(self) -> dict[str, Any]:
        """What became of chunks until now."""
        return {
            "is_healthy": True,
            "type": type(self).__name__,
            "store": self._settings.store,
            **asdict(self._chunks.counts),
            **{f"left_out_{why}": count for why, count in self._left_out.copy().items()},
        }

    def close(self) -> None:
        """Wait for the chunks that are being coded; what waits is left out."""
        self._closing = True  # LMCache keeps no memory in place any more
        self._stores.close()
        self._lookups.close()
        self._loads.close()
        self._store.watchers.remove(self._evicted.append)
        _log.info("%s", self.report_status())

    def _begin(
        self,
        tasks: Tasks[Any],
        function: Callable[..., Any],
        parts: Sequence[tuple[Any, ...]],
        end: Callable[[list[Any]], Any],
    ) -> int:
        number = next(self._numbers)
        tasks.begin(number, function, parts, end)
        return number

    def _names(self, keys: list[ObjectKey]) -> list[str]:
        """Names that chunks may have in the store: one for each layout that was met."""
        return [chunk_name(pages, key) for key in keys for pages in self._chunks.kinds]

    # Each of these does its work for one chunk, in a thread.

    def _store_chunk(self, key: ObjectKey, obj: MemoryObj, began: float) -> int:
        """Bytes that were written."""
        pages = self._chunks.pages_of(obj)
        name = chunk_name(pages, key)
        if self._store.exists(name) or self._late(name, began):
            return 0
        k, v = self._chunks.read(obj)
        position = pages.find(k)
        if position is None:  # also a layout that we do not know: what it holds is not K and V
            return self._leave_out(
                "unsure",
                f"{name} does not tell its position before max_tokens; if vLLM runs on CPUs, set "
                f"cpu_block_tokens",
            )
        page = pages.encode(name, k, v, position)
        if self._late(name, began):  # its memory may have been another's meanwhile
            return 0
        self._tell_gone(name)
        if not self._store.put(name, page):
            return self._leave_out("large", f"{name} takes {len(page)} bytes, more than the budget")
        with self._telling:
            self._told[name] = key, len(page)
            self._notify_keys_stored([key], [len(page)])
        while self._evicted:
            self._tell_gone(self._evicted.popleft())
        return len(page)

    def _hold_chunk(self, key: ObjectKey, layout: MemoryLayoutDesc | None) -> bool:
        if layout is None:
            return False
        try:
            name = chunk_name(self._chunks.pages(layout.shapes, layout.dtypes), key)
        except UnsupportedError:
            return False  # none is ever stored, which the log says
        if self._store.hold(name):
            return True
        self._tell_gone(name)
        return False

    def _load_chunk(self, key: ObjectKey, obj: MemoryObj, began: float) -> bool:
        name, write = chunk_name(self._chunks.pages_of(obj), key), self._chunks.writer(obj)
        page = self._store.get(name)
        if page is None:
            self._tell_gone(name)
        if page is None or self._late(name, began):
            return False
        try:
            write(name, page)
        except KVTCError as error:
            _log.warning("chunk %s is of no use and is deleted: %s", name, error)
            self._store.delete(name)
            self._tell_gone(name)
            return False
        return True

    def _loaded(self, keys: list[ObjectKey]) -> Callable[[list[bool | None]], Bitmap]:
        def end(outcomes: list[bool | None]) -> Bitmap:
            if used := [key for key, came in zip(keys, outcomes, strict=True) if came]:
                self._notify_keys_accessed(used)
            return _bitmap(outcomes)

        return end

    def _late(self, name: str, began: float) -> bool:
        late = self._closing or time.monotonic() - began > self._settings.timeout
        if late:
            self._leave_out("late", f"{name} comes after timeout, {self._settings.timeout} s")
        return late

    def _leave_out(self, why: str, what: str) -> int:
        self._left_out[why] += 1
        level = logging.WARNING if self._left_out[why] == 1 else logging.INFO
        _log.log(level, "left out: chunk %s", what)
        return 0

    def _tell_gone(self, name: str) -> None:
        """Tell LMCache that a chunk is not in the store any more, if it was told that it is."""
        with self._telling:
            if (told := self._told.pop(name, None)) is not None:
                self._notify_keys_deleted([told[0]], [told[1]])


def _stored(outcomes: list[int | None]) -> L2StoreResult:
    return L2StoreResult(None not in outcomes, sum(size or 0 for size in outcomes))


def _bitmap(outcomes: list[bool | None]) -> Bitmap:
    found = Bitmap(len(outcomes))
    for i, outcome in enumerate(outcomes):
        if outcome:
            found.set(i)
    return found
