"""How long the tier's calls keep vLLM's scheduler, while its process codes pages on all cores.

    python benchmarks/vllm_tier.py --calibration m.safetensors

Calls are those that vLLM makes for requests of many pages, in its order, with the pauses that it
makes when it has nothing to compute. Of each call the time on the wall and the thread's own time on
a core: the wall's includes waits for a core that others have. A call that does nothing is timed as
often as ``lookup``: what it waits for, a machine makes wait. Needs no vLLM.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import tempfile
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment, write_result
from rich.console import Console
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.integrations.hosts import Namespace
from kvtc_stream.integrations.hosts.layouts import VLLM_LAYOUTS
from kvtc_stream.integrations.vllm import TierSettings
from kvtc_stream.integrations.vllm.tier_link import TierLink
from kvtc_stream.integrations.vllm.tier_worker import Rows, WorkerConfig

RESULT = Path(__file__).parent / "results" / "vllm_tier.json"
BLOCK, BLOCKS = 16, 8
#: Seconds that vLLM sleeps when a step computes nothing.
PAUSE = 0.001
LIMIT = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--pages", type=int, default=1024, help="of a request")
    parser.add_argument("--rows", type=int, default=64, help="that are stored or loaded at a time")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    console = Console()
    result = environment()
    with tempfile.TemporaryDirectory(prefix="kvtc-tier-") as folder:
        calls = Scheduler(arguments, folder).run()
    table = Table("call", "calls", "median µs", "99.9 % µs", "longest ms", "on a core ms", "> 2 ms")
    result |= {"pages": arguments.pages, "rows": arguments.rows, "calls": {}}
    for name, times in calls.items():
        wall, core = np.array(times).reshape(-1, 2).T
        own = {
            "count": len(wall),
            "median_s": float(np.median(wall)),
            "p999_s": float(np.quantile(wall, 0.999)),
            "longest_s": float(wall.max()),
            "longest_core_s": float(core.max()),
            "above_2_ms": int((wall > LIMIT).sum()),
        }
        result["calls"][name] = own
        table.add_row(
            name,
            str(own["count"]),
            *(f"{own[x] * 1e6:.1f}" for x in ("median_s", "p999_s")),
            *(f"{own[x] * 1e3:.2f}" for x in ("longest_s", "longest_core_s")),
            str(own["above_2_ms"]),
        )
    console.print(table)
    write_result(arguments.output, result, console)


class Scheduler:
    """Requests one after the other: some pages are loaded, as many are stored."""

    def __init__(self, arguments: argparse.Namespace, folder: str) -> None:
        self._pages, self._rows = arguments.pages, arguments.rows
        self._requests = arguments.requests
        settings = TierSettings.read(
            {"calibration": arguments.calibration, "store": folder, "ratio": 8}
        )
        calibration = kvtc.Calibration.load(arguments.calibration)
        [section] = calibration.geometry.sections
        heads, dim, layers = section.kv_heads, section.k_dim, len(section.layers)
        row_bytes = 2 * 2 * BLOCK * BLOCKS * heads * dim * layers
        rows = Rows(
            VLLM_LAYOUTS[0],
            (heads, BLOCK, 2 * dim),
            (BLOCK * 2 * dim, 2 * dim, 1),
            "bfloat16",
            heads,
            dim,
            BLOCK,
            BLOCKS,
            tuple(range(layers)),
            row_bytes,
            2 * self._rows,
        )
        file = os.memfd_create("rows")
        os.ftruncate(file, rows.count * row_bytes)
        memory = np.frombuffer(mmap.mmap(file, 0), np.uint8).reshape(rows.count, -1)
        drawn = kvtc.testing.drawn_cache(
            calibration.geometry, rows.tokens, dtype=kvtc.DType.BFLOAT16
        )
        for row in range(rows.count):
            rows.write(memory, row, *drawn)
        threads = min(4, os.cpu_count() or 1)
        config = WorkerConfig(
            settings, calibration.digest, rows, Namespace({"benchmark": 1}), threads
        )
        self._link = TierLink(config, file, most=1 << 20)
        #: Seconds on the wall and on a core in turn; arrays, which Python's collector leaves alone.
        self._calls: dict[str, array[float]] = defaultdict(lambda: array("d"))
        self._jobs = 0
        self._done: set[int] = set()

    def _timed(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        core, wall = time.thread_time(), time.perf_counter()
        found = call(*arguments)
        self._calls[name].extend((time.perf_counter() - wall, time.thread_time() - core))
        return found

    def run(self) -> dict[str, array[float]]:
        """Wall and core seconds of each call."""
        loaded = [self._key(0, i) for i in range(self._rows)]
        self._submit("store", loaded, range(self._rows))
        self._until(lambda: not self._open())
        self._calls.clear()
        gc.freeze()  # as vLLM does
        for number in range(1, self._requests + 1):
            request = str(number)
            keys = loaded + [self._key(number, i) for i in range(self._pages - len(loaded))]
            self._timed("on_new_request", self._link.begin, request)
            self._until(lambda: self._looked_up(request, keys))  # noqa: B023
            self._submit("load", loaded, range(self._rows), request)
            own = [self._key(-number, i) for i in range(self._rows)]
            self._submit("store", own, range(self._rows, 2 * self._rows), request)
            self._timed("on_request_finished", self._link.end, request)
            # The next request comes while these pages are on their way.
            self._until(lambda: self._open() <= 2)
        self._until(lambda: not self._open())
        self._link.close()
        return self._calls

    def _key(self, request: int, page: int) -> bytes:
        return request.to_bytes(16, "big", signed=True) + page.to_bytes(16, "big") + bytes(4)

    def _open(self) -> int:
        return self._jobs - len(self._done)

    def _looked_up(self, request: str, keys: Sequence[bytes]) -> bool:
        answers = []
        for key in keys:
            answers.append(self._timed("lookup", self._link.lookup, request, key))
            self._timed("nothing", lambda: None)
        self._timed("on_schedule_end", self._link.flush)
        return None not in answers

    def _submit(
        self, kind: str, keys: Sequence[bytes], rows: Sequence[int], request: str = ""
    ) -> None:
        self._jobs += 1
        arguments = kind, self._jobs, request, keys, rows, lambda key: 128
        self._timed(f"submit_{kind}", self._link.submit, *arguments)

    def _until(self, condition: Callable[[], bool]) -> None:
        while True:
            found = self._timed("get_finished_jobs", self._link.finished)
            self._done |= {job.job for job in found}
            if condition():
                return
            time.sleep(PAUSE)


if __name__ == "__main__":
    main()
