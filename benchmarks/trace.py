"""Where the public functions of the CUDA backend spend their time: device and host, side by side.

    python benchmarks/trace.py [-o FILE.json] [--log FILE.txt] [--no-adapter]

The same shape, caches and functions as ``public.py``, errors unmeasured unless a name says so. The
JSON has what each takes; the log what the device does when, by PyTorch's profiler, and what the
host does, by Python's, which slows it down. Profiles of Python 3.12 are of all threads.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cupy as cp
import ml_dtypes
from _common import write_result
from public import MANY, NAME, TOKENS, adapter, adapter_tasks, pinned, rows_of, timed
from rich.console import Console

import kvtc_stream as kvtc
from gpu import GEOMETRIES, RATIO, Model, device_result

RESULTS = Path(__file__).parent / "results"
#: Functions whose events are listed one by one, and rows of a table.
LISTED, ROWS = ("decode", "encode"), 45
#: Ends of the names of functions of several caches.
SEVERAL = ("many", "batch")


def tasks_of(model: Model) -> tuple[dict[str, Callable[[], Any]], int]:
    """What is measured, and bytes of K and V of one cache."""
    caches = [
        tuple(x.view(ml_dtypes.bfloat16) for x in model.cache(TOKENS, seed)) for seed in range(MANY)
    ]
    k, v = caches[0]
    measured = kvtc.Codec(model.calibration, ratio=RATIO, backend="cuda")
    codec = replace(measured, measure=False)
    data = pinned(kvtc.encode(k, v, codec))
    streams = [pinned(x) for x in kvtc.encode_many(caches, codec)]
    out = cp.empty_like(k), cp.empty_like(v)
    batch = list(zip(rows_of(k, MANY), rows_of(v, MANY), strict=True))
    decode_many = partial(kvtc.decode_many, streams, model.calibration, backend="cuda")
    decode = partial(kvtc.decode, calibration=model.calibration, out=out, backend="cuda")
    tasks: dict[str, Callable[[], Any]] = {
        "decode": partial(decode, data),
        "encode": partial(kvtc.encode, k, v, codec),
        "decode_many": decode_many,
        "decode_batch": partial(decode_many, out=batch),
        "encode_many": partial(kvtc.encode_many, caches, codec),
        "encode_measured": partial(kvtc.encode, k, v, measured),
    }
    return tasks, k.nbytes + v.nbytes


def on_device(name: str, task: Callable[[], Any]) -> str:
    """Totals by kernel, and for some functions every event, in microseconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        task()
        cp.cuda.Device().synchronize()
    events = [e for e in found.events() if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    begin, end, busy = events[0].time_range.start, 0.0, 0.0
    totals: dict[str, list[float]] = {}
    for event in events:
        first, last = event.time_range.start, event.time_range.end
        busy += max(last - max(first, end), 0)
        end = max(end, last)
        own = totals.setdefault(event.name[:60], [0, 0.0])
        own[0] += 1
        own[1] += last - first
    lines = [f"=== {name}, device: {end - begin:.0f} from first to last, busy {busy:.0f}"]
    for kernel, (count, total) in sorted(totals.items(), key=lambda x: -x[1][1])[:ROWS]:
        lines.append(f"{total:9.0f} {count:5.0f} {kernel}")
    for event in events if name in LISTED else ():
        first, last = event.time_range.start, event.time_range.end
        lines.append(f"{first - begin:9.0f} + {last - first:6.0f} {event.name[:50]}")
    return "\n".join([*lines, ""])


def on_host(name: str, task: Callable[[], Any], repeats: int) -> str:
    """Python's profile, by own and by cumulated time."""
    profiler, text = cProfile.Profile(), io.StringIO()
    profiler.enable()
    for _ in range(repeats):
        task()
    profiler.disable()
    for order in ("tottime", "cumtime"):
        pstats.Stats(profiler, stream=text).strip_dirs().sort_stats(order).print_stats(ROWS)
    return f"=== {name}, host, {repeats} calls\n{text.getvalue()}\n"


def trace(tasks: dict[str, Callable[[], Any]], log: Path, mode: str) -> None:
    """What tasks do on the device, and on the host, to a file."""
    with log.open(mode, encoding="utf-8") as file:
        for name, task in tasks.items():
            file.write(on_device(name, task))
        for name, task in tasks.items():
            file.write(on_host(name, task, 2 if name.endswith(SEVERAL) else 10))


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "trace_h200.json")
    parser.add_argument("--log", type=Path, default=Path("trace.txt"))
    parser.add_argument("--no-adapter", action="store_true", help="without transformers")
    args = parser.parse_args()
    console = Console(highlight=False)
    model = Model(*GEOMETRIES[NAME])
    result = device_result() | {"geometry": NAME, "tokens": TOKENS, "many": MANY, "functions": {}}
    tasks, size = tasks_of(model)
    for name, task in tasks.items():
        count = MANY if name.endswith(SEVERAL) else 1
        _, elapsed, cpu = timed(task, 7)
        found = {"s": elapsed, "gbps": count * size / elapsed / 1e9, "cpu_s": cpu}
        result["functions"][name] = found
        console.print(name, found)
    trace(tasks, args.log, "w")
    del tasks, task
    cp.get_default_memory_pool().free_all_blocks()
    if not args.no_adapter:
        tasks, ratio = adapter_tasks(model)
        result["adapter"] = adapter(tasks, ratio)
        console.print(result["adapter"])
        del tasks["prefill"]
        trace(tasks, args.log, "a")
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
