"""Kernels: Python compiled by Numba to PTX, loaded by CuPy, launched through the driver.

Numba's own launches cost tens of microseconds of host time, most of it for array arguments. Kernels
here take pointers and numbers, packed in one go.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.gpu.runtime.dialect import cuda, types

_ENTRY = re.compile(r"\.visible \.entry (\w+)")
#: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES; and the size that is always allowed.
_MAX_SHARED, _FREE_SHARED = 8, 48 * 1024
#: How an argument lies in 8 bytes of its own.
_FORMATS = {
    types.int32: "i4x",
    types.uint32: "I4x",
    types.int64: "q",
    types.uint64: "Q",
    types.float32: "f4x",
    types.float64: "d",
}

_NUMBERS = int, float  # quicker to compare with than a union


class Kernel:
    """A kernel, compiled for each device at its first launch there. Safe across threads.

    Parameters
    ----------
    function
        Python that Numba-CUDA compiles.
    signature
        Numba types of its arguments: numbers and pointers.
    """

    def __init__(self, function: Callable[..., None], signature: Sequence[Any]) -> None:
        self.function, self.signature = function, tuple(signature)
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self._format = struct.Struct(
            "=" + "".join("Q" if isinstance(t, types.CPointer) else _FORMATS[t] for t in signature)
        )
        self._loaded: dict[int, _Module] = {}
        self._lock = threading.Lock()
        self._own = threading.local()

    def ptx(self, capability: tuple[int, int]) -> str:
        """Compile to PTX for a compute capability. Needs no device."""
        code, _ = cuda.compile_ptx(self.function, types.void(*self.signature), cc=capability)
        return str(code)

    def __call__(
        self, grid: int | tuple[int, ...], block: int, arguments: Sequence[Any], shared: int = 0
    ) -> None:
        """Launch on the current device and CuPy's current stream.

        ``arguments`` are numbers; for pointers CuPy arrays, whose memory must be contiguous, or
        addresses. ``shared`` is bytes of dynamic shared memory. Nothing is launched on an empty
        grid.
        """
        import cupy

        x, y, z = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
        if not (x and y and z):
            return
        loaded = self._module()
        if shared > loaded.granted:
            with self._lock:
                if shared > loaded.granted:
                    loaded.grant(shared)
        values = [v if isinstance(v, _NUMBERS) else v.data.ptr for v in arguments]
        if (room := getattr(self._own, "room", None)) is None:
            buffer = ctypes.create_string_buffer(self._format.size)
            first = ctypes.addressof(buffer)
            places = [first + 8 * i for i in range(len(self.signature))]
            pointers = (ctypes.c_void_p * len(places))(*places)
            room = self._own.room = buffer, pointers, ctypes.addressof(pointers)
        buffer, _, where = room
        self._format.pack_into(buffer, 0, *values)
        stream = cupy.cuda.get_current_stream().ptr
        loaded.launch(x, y, z, block, shared, stream, where)

    @property
    def handle(self) -> int:
        """The driver's handle of the kernel on the current device, for who launches it himself."""
        return self._module().handle

    def numbers(self, bits: NDArray[np.int64]) -> list[int | float]:
        """Arguments from their bits, int64 [arguments]; a number of 32 has the lower ones."""
        return list(self._format.unpack(bits.tobytes()))

    def _module(self) -> _Module:
        import cupy

        device = cupy.cuda.runtime.getDevice()
        loaded = self._loaded.get(device)
        if loaded is None:
            with self._lock:
                loaded = self._loaded.setdefault(device, _Module(self))
        return loaded


class _Module:
    """A kernel loaded on a device."""

    def __init__(self, kernel: Kernel) -> None:
        import cupy

        capability = cupy.cuda.Device().compute_capability
        code = kernel.ptx((int(capability[:-1]), int(capability[-1])))
        self._module = cupy.cuda.function.Module()  # unloads when it is freed
        self._module.load(code.encode())
        [name] = _ENTRY.findall(code)
        self._name = kernel.__name__
        self._function = self._module.get_function(name)
        self.handle = int(self._function.ptr)
        self._driver = cupy.cuda.driver
        self.granted = _FREE_SHARED

    def grant(self, shared: int) -> None:
        """Allow more shared memory than kernels have by default."""
        import cupy

        cupy.cuda.driver.funcSetAttribute(self._function.ptr, _MAX_SHARED, shared)
        self.granted = shared

    def launch(
        self, x: int, y: int, z: int, block: int, shared: int, stream: int, pointers: int
    ) -> None:
        try:
            self._driver.launchKernel(
                self.handle, x, y, z, block, 1, 1, shared, stream, pointers, 0
            )
        except self._driver.CUDADriverError as error:
            raise RuntimeError(
                f"kernel {self._name}: launching {x} × {y} × {z} blocks of {block} threads with "
                f"{shared} bytes of shared memory failed: {error}"
            ) from None


def kernel(*signature: Any) -> Callable[[Callable[..., None]], Any]:
    """Decorator: make a :class:`Kernel` of a function with arguments of these types."""
    return lambda function: Kernel(function, signature)
