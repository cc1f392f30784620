"""What users set for a whole process, in environment variables."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_BACKENDS = ("auto", "cpu", "cuda")
_CUDA_COMPILERS = ("numba-cuda", "numba-cuda-mlir")


def threads() -> int:
    """How many threads work on bytes and tables: ``KVTC_THREADS``, or the CPUs we may use.

    Raises
    ------
    ValueError
        The variable is no positive whole number.
    """
    text = os.environ.get("KVTC_THREADS", "")
    if not text:
        return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"KVTC_THREADS must be a positive whole number, found {text!r}")
    return int(text)


def backend() -> str:
    """What ``backend="auto"`` means: ``KVTC_BACKEND``, or ``"auto"``, which goes by the inputs.

    Raises
    ------
    ValueError
        The variable is not ``auto``, ``cpu`` or ``cuda``.
    """
    name = os.environ.get("KVTC_BACKEND") or "auto"
    if name not in _BACKENDS:
        raise ValueError(f"KVTC_BACKEND must be one of {', '.join(_BACKENDS)}, found {name!r}")
    return name


def cuda_compiler() -> str | None:
    """Which package compiles CUDA kernels: ``KVTC_CUDA_COMPILER``, ``None`` if it is not set.

    Raises
    ------
    ValueError
        The variable is not ``numba-cuda`` or ``numba-cuda-mlir``.
    """
    name = os.environ.get("KVTC_CUDA_COMPILER") or None
    if name is not None and name not in _CUDA_COMPILERS:
        raise ValueError(
            f"KVTC_CUDA_COMPILER must be one of {', '.join(_CUDA_COMPILERS)}, found {name!r}"
        )
    return name


def cache_folder() -> Path:
    """Where files are kept that can be fetched again: ``KVTC_CACHE``, or the system's place."""
    if given := os.environ.get("KVTC_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kvtc-stream"


@cache
def installed(package: str) -> bool:
    """Whether a package can be imported; it is looked for once."""
    return find_spec(package) is not None
