"""Kernels run on NumPy arrays in Numba's simulator; see ``kvtc_stream.gpu.runtime.simulator``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvtc_stream.gpu.runtime.compile import Kernel
from kvtc_stream.gpu.runtime.dialect import cuda, types
from kvtc_stream.gpu.runtime.simulator import Memory, memory_at

#: Bytes of shared memory of a block of threads, at most: Ampere has the least.
_MOST_SHARED = 163 << 10


def simulate(
    kernel: Kernel,
    grid: int | tuple[int, ...],
    block: int,
    arguments: Sequence[Any],
    shared: int = 0,
) -> None:
    """Run a kernel on C-contiguous NumPy arrays or addresses; arguments are those of a launch.

    Takes some 0.01 ms per thread, and more for each :func:`ballot`. One call at a time.
    """
    grid = (grid,) if isinstance(grid, int) else grid
    if min(grid) == 0:
        return
    typed = [_typed(t, x) for t, x in zip(kernel.signature, arguments, strict=True)]
    launch = cuda.jit(kernel.function)[grid, block, 0, shared]
    with warnings.catch_warnings():
        # Integers wrap.
        warnings.simplefilter("ignore", RuntimeWarning)
        launch(*typed)


def launch(
    kernel: Kernel,
    grid: int | tuple[int, ...],
    block: int,
    arguments: Sequence[Any],
    shared: int = 0,
) -> None:
    """As :func:`simulate`, of what a device takes: numbers of Python, and memory that it has."""
    x, *others = (grid,) if isinstance(grid, int) else grid
    if x >= 1 << 31 or max(others, default=0) >= 1 << 16 or block > 1024 or shared > _MOST_SHARED:
        raise ValueError(f"{kernel.__name__}: no device has {grid} × {block} threads, {shared} B")
    numbers = [v if isinstance(v, int | float) else v.data.ptr for v in arguments]
    kernel._format.pack(*numbers)
    simulate(kernel, grid, block, arguments, shared)


def _typed(kind: Any, value: Any) -> Any:
    dtype = np.dtype(str(getattr(kind, "dtype", kind)))
    if not isinstance(kind, types.CPointer):
        # Addresses are signed in the simulator.
        return np.int64(value) if dtype == np.uint64 else dtype.type(value)
    if not isinstance(value, np.ndarray):
        return memory_at(value, dtype)
    flat = np.asarray(value).reshape(-1, copy=False)
    if value.dtype == np.uint8:  # bytes, to be read as anything
        flat = flat[: flat.size // dtype.itemsize * dtype.itemsize].view(dtype)
    if flat.dtype != dtype:
        raise TypeError(f"expected {dtype}, found {value.dtype}")
    return Memory(flat)
