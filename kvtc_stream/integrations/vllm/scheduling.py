"""Which pages to load and to store: what the connector does beside vLLM's scheduler.

Nothing here waits: names of pages are made and looked up in a thread, and a request whose answer
is not there yet is asked for again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from kvtc_stream.integrations.hosts.keys import Chain, Namespace, PageKey
from kvtc_stream.integrations.hosts.store import Store
from kvtc_stream.integrations.vllm.support import adapter_facts

_log = logging.getLogger(__name__)

#: Seconds that a scheduler's call waits for an answer that is about to come.
_PATIENCE = 0.001
#: Pages that are named before other threads have a turn.
_TURN = 64
#: Requests that are looked up at a time.
_LOOKUPS = 4


@dataclass
class PageJob:
    """A page to load or to store.

    Attributes
    ----------
    request
        The id of the request.
    key
        The page's key.
    blocks
        The engine's blocks that hold it, or the part of it that is to be loaded.
    first
        Which block of the page ``blocks`` begin with.
    """

    request: str
    key: PageKey
    blocks: list[int]
    first: int = 0


def own_jobs(jobs: Sequence[PageJob], part: int, parts: int) -> Sequence[PageJob]:
    """What jobs are for a rank that has a part of each page."""
    if parts == 1:
        return jobs
    return [replace(job, key=job.key.part(part, parts)) for job in jobs]


@dataclass
class StepPlan:
    """What a worker does in one step.

    Attributes
    ----------
    loads, stores
        Pages, in order.
    preempted
        Requests whose blocks are about to be written to by others.
    held
        Finished requests whose blocks stay until their pages are stored.
    """

    loads: list[PageJob] = field(default_factory=list)
    stores: list[PageJob] = field(default_factory=list)
    preempted: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)


@dataclass
class _Record:
    """What is known of a request.

    ``chain`` is ``None`` if its pages are not to be stored.
    """

    request: Any
    chain: Chain | None
    blocks: list[int] = field(default_factory=list)
    lookup: Future[int] | None = None
    computed: int = 0  #: tokens that the engine had when it asked for more
    loading: bool = False  #: blocks do not hold yet what the engine counts as computed
    stored: int = 0  #: pages that were handed out to be stored
    submitted: bool = False


class PageScheduler:
    """Decides by page; one thread, that of the scheduler.

    Parameters
    ----------
    namespace
        Of the pages.
    store
        Where they are looked up; ``None`` to look up none.
    page_tokens, block_tokens
        Tokens of a page, and of a block of the engine, of which a page has a whole number.
    stores
        Whether pages are stored.
    parts
        How many a page has in the store, each written by a rank of its own. A page is there if all
        of them are.
    """

    def __init__(
        self,
        namespace: Namespace,
        store: Store | None,
        page_tokens: int,
        block_tokens: int,
        *,
        stores: bool = True,
        parts: int = 1,
    ) -> None:
        self._namespace, self._store, self._stores = namespace, store, stores
        self._page, self._block = page_tokens, block_tokens
        self._records: dict[str, _Record] = {}
        self._plan = StepPlan()
        self._parts = parts
        self._threads = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="kvtc-lookup")
        self._of_parts = ThreadPoolExecutor(_LOOKUPS * parts, thread_name_prefix="kvtc-lookup-part")

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """How many tokens after ``computed`` the store has; see
        ``KVConnectorBase_V1.get_num_new_matched_tokens``."""
        record = self._record(request)
        most = (request.num_tokens - 1) // self._page  # one token at least is left to compute
        if record.chain is None or most * self._page <= computed:
            return 0, False
        if record.lookup is None:
            record.computed = computed
            first = computed // self._page
            record.lookup = self._threads.submit(self._look_up, request, record.chain, first)
        try:
            found = record.lookup.result(timeout=_PATIENCE)
        except TimeoutError:
            if not record.lookup.done():
                return None, False
            found = 0
        except Exception:
            _log.exception("looking up pages failed: the prompt is computed")
            found = 0
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        record.computed = computed
        tokens = min(found, most) * self._page - computed
        return (tokens, True) if tokens > 0 else (0, False)

    def allocated(self, request: Any, blocks: list[int], external: int) -> None:
        """The engine has given a request blocks; ``external`` tokens are to come from the store."""
        record = self._record(request)
        record.lookup = None
        if external <= 0 or record.chain is None:
            return
        record.loading = True
        start, end = record.computed, record.computed + external
        for page in range(start // self._page, -(-end // self._page)):
            first = page * self._page
            parts = slice(
                max(start, first) // self._block, min(end, first + self._page) // self._block
            )
            self._plan.loads.append(
                PageJob(
                    request.request_id,
                    record.chain.keys[page],
                    blocks[parts],
                    parts.start - first // self._block,
                )
            )

    def step(self, output: Any) -> StepPlan:
        """The plan of a step that vLLM has scheduled (a ``SchedulerOutput``)."""
        plan, self._plan = self._plan, StepPlan()
        for identifier in output.preempted_req_ids or ():
            plan.preempted.add(identifier)
            if identifier in self._records:
                record = self._records[identifier]
                record.blocks, record.stored, record.lookup = [], 0, None
                record.loading = False
        for new in output.scheduled_new_reqs:
            if new.req_id in self._records:
                self._records[new.req_id].blocks = list(new.block_ids[0])
                self._grown(plan, new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for i, identifier in enumerate(cached.req_ids):
            if identifier not in self._records:
                continue
            record, blocks = self._records[identifier], cached.new_block_ids[i]
            if identifier in cached.resumed_req_ids:
                record.blocks = list(blocks[0]) if blocks else []
            elif blocks:
                record.blocks += blocks[0]
            self._grown(plan, identifier, cached.num_computed_tokens[i], output)
        return plan

    def finished(self, request: Any, blocks: list[int]) -> bool:
        """A request has ended; whether its blocks must stay until its pages are stored."""
        record = self._records.pop(request.request_id, None)
        if record is None:
            return False
        record.blocks = list(blocks)
        if not record.loading:
            known = min(request.num_computed_tokens, request.num_tokens)
            self._store_until(self._plan, record, known)
        if record.submitted:
            self._plan.held.add(request.request_id)
        return record.submitted

    def close(self) -> None:
        """End the threads."""
        for threads in (self._threads, self._of_parts):
            threads.shutdown(wait=False, cancel_futures=True)

    def _record(self, request: Any) -> _Record:
        record = self._records.get(request.request_id)
        if record is None or record.request is not request:
            record = _Record(request, self._chain(request))
            self._records[request.request_id] = record
        return record

    def _chain(self, request: Any) -> Chain | None:
        if getattr(request, "prompt_embeds", None) is not None:
            return None  # its tokens do not say what it is
        root = [adapter_facts(request.lora_request), getattr(request, "cache_salt", None)]
        return self._namespace.chain(root, self._page)

    def _look_up(self, request: Any, chain: Chain, first: int) -> int:
        """Name the pages of a request; how many are there from the first on, with those before
        ``first``, which the engine has."""
        tokens = request.num_tokens
        known = 0
        while (known + 1) * self._page <= tokens:
            known = min(known + _TURN, tokens // self._page)
            self._extend(request, chain, known * self._page)
            time.sleep(0)
        if self._store is None:
            return 0
        return self._present(self._store, chain.keys, first)

    def _present(self, store: Store, keys: Sequence[PageKey], first: int) -> int:
        """How many pages are there from ``first`` on, with those before: all parts of each."""
        known = [len(keys)]

        def look(part: int) -> int:
            found = first
            # Where a part of another rank is missing, no more need be looked up.
            while found < known[-1] and store.exists(keys[found].part(part, self._parts).name):
                found += 1
            known.append(found)
            return found

        if self._parts == 1:
            return look(0)
        # Side by side, because a store may be far away.
        looking = [self._of_parts.submit(look, part) for part in range(self._parts)]
        return min(done.result() for done in looking)

    @staticmethod
    def _extend(request: Any, chain: Chain, tokens: int) -> None:
        extras = [
            (
                feature.mm_position.offset,
                feature.mm_position.offset + feature.mm_position.length,
                str(feature.identifier),
            )
            for feature in getattr(request, "mm_features", None) or ()
        ]
        chain.extend(request.all_token_ids, extras, tokens)

    def _grown(self, plan: StepPlan, identifier: str, computed: int, output: Any) -> None:
        record = self._records[identifier]
        record.loading = False
        after = computed + output.num_scheduled_tokens.get(identifier, 0)
        # Tokens that are being computed may not be known here yet.
        self._store_until(plan, record, min(after, record.request.num_tokens))

    def _store_until(self, plan: StepPlan, record: _Record, tokens: int) -> None:
        """Hand out the pages that are whole with so many tokens."""
        if not self._stores or record.chain is None:
            return
        size = self._page // self._block
        end = min(tokens // self._page, len(record.blocks) // size)
        if end > len(record.chain.keys):
            self._extend(record.request, record.chain, end * self._page)
        for page in range(record.stored, end):
            blocks = record.blocks[page * size : (page + 1) * size]
            plan.stores.append(PageJob(record.request.request_id, record.chain.keys[page], blocks))
            record.submitted = True
        record.stored = max(record.stored, end)
