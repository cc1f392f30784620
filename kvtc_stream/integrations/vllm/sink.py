"""What becomes of pages that the engine has computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvtc_stream.integrations.hosts.store import Store
from kvtc_stream.integrations.vllm.counts import Counter
from kvtc_stream.integrations.vllm.scheduling import PageJob
from kvtc_stream.stream.pages import PageCodec


class PageSink(Protocol):
    """What becomes of pages that the engine has computed."""

    def wanted(self, job: PageJob) -> bool:
        """Whether :meth:`take` is to be called."""
        ...

    def take(
        self, jobs: Sequence[PageJob], k: Tensor, v: Tensor, valid: Callable[[PageJob], bool]
    ) -> None:
        """Pages one after the other, K and V [layers, kv_heads, tokens, head_dim]; ``valid`` tells
        whether the engine has kept a page until now."""
        ...


class StoreSink:
    """Codes pages and stores them.

    Parameters
    ----------
    store
        Where.
    codec
        What codes them.
    counter
        What counts.
    others
        What codes pages that are not a prompt's first; by default ``codec`` too.
    """

    def __init__(
        self,
        store: Store,
        codec: PageCodec,
        counter: Counter,
        others: PageCodec | None = None,
    ) -> None:
        self._store, self.codec, self._counter = store, codec, counter
        self._others = others or codec

    def wanted(self, job: PageJob) -> bool:
        """Whether the store lacks the page."""
        if not self._store.exists(job.key.name):
            return True
        self._counter.add(known_pages=1)
        return False

    def take(
        self, jobs: Sequence[PageJob], k: Tensor, v: Tensor, valid: Callable[[PageJob], bool]
    ) -> None:
        """See :meth:`PageSink.take`."""
        started = time.perf_counter()
        pages: dict[str, bytes] = {}
        tokens = k.shape[2] // len(jobs)
        for codec, own in self._by_codec(jobs):
            parts = [
                torch.cat([x[:, :, i * tokens : (i + 1) * tokens] for i in own], 2) if own else x
                for x in (k, v)
            ]
            some = jobs if not own else [jobs[i] for i in own]
            coded = codec.encode_many(
                *parts,
                positions=[job.key.position for job in some],
                identities=[job.key.identity for job in some],
            )
            pages |= {job.key.name: page for job, page in zip(some, coded, strict=True)}
        stored = [
            len(pages[job.key.name])
            for job in jobs
            if valid(job) and self._store.put(job.key.name, pages[job.key.name])
        ]
        self._counter.add(
            stored_pages=len(stored),
            stored_bytes=sum(stored),
            stored_cache_bytes=(k.nbytes + v.nbytes) // len(jobs) * len(stored),
            store_seconds=time.perf_counter() - started,
            dropped_pages=len(jobs) - len(stored),
        )

    def _by_codec(self, jobs: Sequence[PageJob]) -> list[tuple[PageCodec, list[int]]]:
        """Codecs, and the indices of the pages that each is for; none where it is for all."""
        first = [i for i, job in enumerate(jobs) if job.key.position == 0]
        rest = [i for i, job in enumerate(jobs) if job.key.position != 0]
        if self._others is self.codec or not first or not rest:
            return [(self.codec if first else self._others, [])]
        return [(self.codec, first), (self._others, rest)]
