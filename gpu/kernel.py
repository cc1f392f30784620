"""Kernels: Python compiled by Numba to PTX, loaded and launched by CuPy.

Numba's own launches cost tens of microseconds of host time, most of it for array arguments. Kernels
here take pointers and numbers, so CuPy's few microseconds do.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

_ENTRY = re.compile(r"\.visible \.entry (\w+)")
#: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES; and what needs no permission.
_MAX_SHARED, _FREE_SHARED = 8, 48 * 1024


class Kernel:
    """A kernel, compiled for a device at its first launch there. Safe across threads.

    Parameters
    ----------
    function
        Python that Numba-CUDA compiles.
    signature
        Numba types of its arguments: numbers and pointers.
    """

    def __init__(self, function: Callable[..., None], signature: Sequence[Any]) -> None:
        self.function, self.signature = function, tuple(signature)
        self._loaded: dict[int, Any] = {}
        self._lock = threading.Lock()
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def ptx(self, capability: tuple[int, int]) -> str:
        """PTX for a compute capability. Needs no device."""
        from numba import cuda, types

        code, _ = cuda.compile_ptx(self.function, types.void(*self.signature), cc=capability)
        return str(code)

    def __call__(
        self, grid: int | tuple[int, ...], block: int, arguments: Sequence[Any], shared: int = 0
    ) -> None:
        """Launch on the current device and CuPy's current stream.

        ``arguments`` are CuPy arrays, whose memory must be contiguous, addresses for pointers, and
        numbers. ``shared`` is bytes of dynamic shared memory. Nothing is launched on an empty grid.
        """
        import cupy

        grid = (grid,) if isinstance(grid, int) else grid
        if min(grid) == 0:
            return
        device = cupy.cuda.runtime.getDevice()
        with self._lock:
            if device not in self._loaded:
                self._loaded[device] = self._load()
            function, granted = self._loaded[device]
            if shared > granted:
                cupy.cuda.driver.funcSetAttribute(function.ptr, _MAX_SHARED, shared)
                self._loaded[device] = function, shared
        typed = [
            x if isinstance(x, cupy.ndarray) else _scalar(t, x)
            for t, x in zip(self.signature, arguments, strict=True)
        ]
        function((*grid, 1, 1)[:3], (block, 1, 1), typed, shared_mem=shared)

    def _load(self) -> tuple[Any, int]:
        import cupy

        capability = cupy.cuda.Device().compute_capability
        code = self.ptx((int(capability[:-1]), int(capability[-1])))
        module = cupy.cuda.function.Module()
        module.load(code.encode())
        [name] = _ENTRY.findall(code)
        return module.get_function(name), _FREE_SHARED


def _scalar(kind: Any, value: Any) -> Any:
    import numpy as np
    from numba import types

    if isinstance(kind, types.CPointer):
        return np.uint64(value)
    return getattr(np, str(kind))(value)


def kernel(*signature: Any) -> Callable[[Callable[..., None]], Any]:
    """Make a :class:`Kernel` of a function with arguments of these types."""
    return lambda function: Kernel(function, signature)
