"""How quickly bytes of a file come to a CUDA device, by what reads them.

    python benchmarks/files.py [--folder DIR]

A file of as many bytes as eight streams of 8,192 tokens of Mistral-NeMo-12B at 16 times have, on
the disk where ``--folder`` is, is read into pinned memory, and by kvikio
(https://docs.rapids.ai/api/kvikio, GPUDirect Storage where a machine has it) into the device's:
from the system's cache, and after the file was dropped from it. ``kvtc`` is what reads a path that
:func:`kvtc_stream.open` is given.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
from _common import write_result
from rich.console import Console

from gpu import device_result
from kvtc_stream.gpu.runtime.staging import pinned
from kvtc_stream.io.sources import open_source

SIZE = 776 << 20
REPEATS = 3


def ways(path: Path) -> tuple[dict[str, Callable[[], int]], dict[str, Any]]:
    """What reads the file, and says how many bytes; and what is known of kvikio."""
    memory, device = pinned(SIZE), cp.empty(SIZE, np.uint8)

    def ours() -> int:
        with open_source(path) as file:
            return file.readinto(memory)  # type: ignore[attr-defined, no-any-return]

    def one_thread() -> int:
        with open(path, "rb", buffering=0) as file:
            done = 0
            while count := file.readinto(memory[done:]):
                done += count
            return done

    found: dict[str, Callable[[], int]] = {"kvtc": ours, "one thread": one_thread}
    try:
        import kvikio
        import kvikio.defaults
    except ImportError as error:
        return found, {"missing": str(error)}

    def by_kvikio(target: Any, threads: int) -> Callable[[], int]:
        def read() -> int:
            kvikio.defaults.set({"num_threads": threads})
            with kvikio.CuFile(path, "r") as file:
                return int(file.read(target))

        return read

    host = np.frombuffer(memory, np.uint8)
    for threads in (8, 16):
        found[f"kvikio, pinned, {threads} threads"] = by_kvikio(host, threads)
        found[f"kvikio, device, {threads} threads"] = by_kvikio(device, threads)
    direct = not kvikio.defaults.is_compat_mode_preferred()
    return found, {"version": kvikio.__version__, "gpu_direct_storage": direct}


def drop(path: Path) -> None:
    """From the system's cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to read from")
    results = Path(__file__).parent / "results"
    parser.add_argument("-o", "--output", type=Path, default=results / "files_h200.json")
    args = parser.parse_args()
    console = Console(highlight=False)
    result = device_result() | {"bytes": SIZE, "gbps": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "file")
        with open(path, "wb") as file:
            file.write(np.random.default_rng(0).bytes(SIZE))
            os.fsync(file.fileno())
        tasks, result["kvikio"] = ways(path)
        for name, task in tasks.items():
            times: dict[str, list[float]] = {"cached": [], "dropped": []}
            for case in [case for _ in range(REPEATS) for case in times]:
                drop(path) if case == "dropped" else task()
                begin = time.perf_counter()
                if task() != SIZE:
                    raise AssertionError(f"{name} read another number of bytes")
                cp.cuda.Device().synchronize()
                times[case].append(time.perf_counter() - begin)
            result["gbps"][name] = {
                case: SIZE / sorted(own)[REPEATS // 2] / 1e9 for case, own in times.items()
            }
            console.print(name, result["gbps"][name])
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
