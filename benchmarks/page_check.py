"""How long a load waits for its pages to be checked beside an engine that is busy in Python.

    python benchmarks/page_check.py

The pages of a prompt lie in a store in the memory of the process. A load is begun as the connector
for vLLM begins it, while the main thread does what an engine does: it ``rests``; or is ``busy``,
0.7 ms in Python and then 2 ms at rest, as vLLM is while it has nothing to compute; or it ``spins``
and gives Python's lock away only when it is made to. Two ways to check: ``each``, where threads
take page after page, and hash and parse it alone; and ``together``, what the connector does. Time
is from the beginning of the load until its last page is known to be whole; nothing is decoded.

Pages are drawn bytes behind the right fields, sealed. Repeats of the two ways take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, write_result
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.formats import Block, BlockTable, Coder, Role
from kvtc_stream.formats.page import pack_page
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.hosts.store import MemoryStore
from kvtc_stream.integrations.vllm import blocks, counts, transfer
from kvtc_stream.integrations.vllm.scheduling import PageJob

RESULT = Path(__file__).parent / "results" / "page_check.json"
TOKENS, KEY = 128, bytes(range(32))
#: Seconds in Python, and at rest, in turn.
ENGINES = {"rests": (0.0, 0.002), "busy": (0.0007, 0.002), "spins": (0.0005, 0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=int, default=63)
    parser.add_argument("--bytes", type=int, nargs="*", default=[1_066_288, 50_000])
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = environment()
    result |= {name: getattr(arguments, name) for name in ("pages", "threads", "repeats")}
    result["seconds"] = {}
    table = Table("bytes of a page", "engine", "way", "median, ms", "quickest", "slowest")
    for size in arguments.bytes:
        own = result["seconds"][str(size)] = {}
        pages = Pages(arguments.pages, size)
        own["one thread, at rest"] = pages.alone(arguments.repeats)
        ways = {
            "each": pages.each(arguments.threads),
            "together": pages.together(arguments.threads),
        }
        for engine, (work, rest) in ENGINES.items():
            found: dict[str, list[float]] = {name: [] for name in ways}
            for i in range(arguments.repeats + 3):
                for name, load in ways.items():
                    seconds = beside(load, work, rest)
                    if i >= 3:
                        found[name].append(seconds)
            own[engine] = {name: figures(x) for name, x in found.items()}
            for name, x in found.items():
                numbers = [f"{1e3 * y:.1f}" for y in (statistics.median(x), min(x), max(x))]
                table.add_row(str(size), engine, name, *numbers)
    console.print(table)
    write_result(arguments.output, result, console)


def figures(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def beside(load: Callable[[Callable[[], None]], None], work: float, rest: float) -> float:
    """Seconds that a load takes beside an engine; ``load`` is told what to call at its end."""
    ends: list[float] = []
    condition = threading.Condition()
    begin = time.perf_counter()
    load(lambda: ends.append(time.perf_counter()))
    while not ends:
        until = time.perf_counter() + work
        while time.perf_counter() < until:
            pass
        if rest:
            with condition:
                condition.wait(rest)
    return ends[0] - begin


class Pages:
    """Pages in a store, and ways to check them."""

    def __init__(self, count: int, size: int) -> None:
        calibration = kvtc.testing.tiny_calibration()
        codec = kvtc.Codec(calibration, ratio=4, block_tokens=TOKENS, backend="cpu")
        self._codec = kvtc.PageCodec(codec, dtype="bfloat16", key=KEY)
        keys = Namespace({}).chain(None, TOKENS).extend(list(range(count * TOKENS)))
        self._jobs = [PageJob("request", key, [i]) for i, key in enumerate(keys)]
        self._store = MemoryStore()
        rng = np.random.default_rng(0)
        for key in keys:
            block = Block(
                section=0,
                role=Role.DATA,
                start=0,
                tokens=TOKENS,
                positions=range(key.position, key.position + TOKENS),
                verbatim_tokens=(),
                coder=Coder.RANS,
                coded=rng.bytes(size),
                coded_size=1,
                verbatim_coder=Coder.STORED,
                verbatim=b"",
            )
            page = pack_page(block, self._codec._header, key=KEY, identity=key.identity)
            self._store.put(key.name, page)

    def alone(self, repeats: int) -> dict[str, float]:
        """All pages on this thread, one by one."""
        found = []
        for _ in range(repeats):
            begin = time.perf_counter()
            for job in self._jobs:
                self._check(job)
            found.append(time.perf_counter() - begin)
        return figures(found)

    def _check(self, job: PageJob) -> Block:
        page = self._store.get(job.key.name)
        assert page is not None
        return self._codec.checked(page, identity=job.key.identity)

    def each(self, threads: int) -> Callable[[Callable[[], None]], None]:
        """Page after page on threads."""
        loader, checkers = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)

        def load(end: Callable[[], None]) -> None:
            for found in [checkers.submit(self._check, job) for job in self._jobs]:
                found.result()
            end()

        return lambda end: loader.submit(load, end) and None

    def together(self, threads: int) -> Callable[[Callable[[], None]], None]:
        """By the connector's own transfer, whose codec decodes nothing."""
        codec = _Watched(self._codec, self._jobs)
        os.environ["KVTC_THREADS"] = str(threads)
        own = transfer.PageTransfer(
            _Blocks(),  # type: ignore[arg-type]
            _Sink(),  # type: ignore[arg-type]
            self._store,
            [codec],  # type: ignore[list-item]
            counts.Counter(),
            timeout=60,
            queue_pages=8,
        )
        own._alone = True  # as on a device

        def load(end: Callable[[], None]) -> None:
            while own._loads:  # of the load before
                own.results()
            codec.begin(end)
            own.load(self._jobs)

        return load


class _Watched:
    """A codec that decodes nothing, and tells when all pages came to it."""

    def __init__(self, codec: kvtc.PageCodec, jobs: list[PageJob]) -> None:
        self.checked_many = codec.checked_many
        self._all = len(jobs)

    def begin(self, end: Callable[[], None]) -> None:
        self._end, self._found = end, 0

    def decoding(self, table: BlockTable, *given: Any) -> Iterator[None]:
        self._found += len(table)
        if self._found == self._all:
            self._end()
        yield


class _Blocks:
    """An engine's, as on a CUDA device, where 32 pages are decoded at once."""

    device, tokens, token_bytes, target = torch.device("cpu"), TOKENS, 1, (None, None)
    together, stored_together = blocks.TOGETHER, 1

    def slots(self, blocks: list[int]) -> NDArray[np.int64]:
        return (np.array(blocks)[:, None] * TOKENS + np.arange(TOKENS)).reshape(-1)


class _Sink:
    """Nothing is stored."""


if __name__ == "__main__":
    main()
