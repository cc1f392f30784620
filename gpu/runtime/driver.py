"""Calls of CUDA's libraries one after the other from compiled code: without Python between them,
and without its lock.

A call through CuPy takes tens of microseconds of the host; here it takes what the library takes.
The functions take CuPy's current stream, and are asynchronous.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import cgutils
from numba.core import types as numba_types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kvtc_stream.gpu.runtime.compile import Kernel
from kvtc_stream.gpu.runtime.dialect import SIMULATED

_jit = numba.njit(cache=True, nogil=True)
#: CuPy loads one of these.
_CUBLAS = ("libcublas.so.13", "libcublas.so.12", "libcublas.so")
#: Streams up to this address are the default ones.
_PER_THREAD = 2
#: CUmemcpyAttributes: sources are read in the stream's order, from places that addresses tell; and
#: the first of the copies that have these.
_ATTRIBUTES, _OF_ALL = np.array([1, 0, 0, 0, 0, 0], np.int32), np.zeros(1, np.uint64)


class _Functions(NamedTuple):
    """Addresses of functions of CUDA's libraries."""

    copy: int  # cuMemcpyHtoDAsync
    copies: int  # cuMemcpyBatchAsync, 0 before CUDA 13
    launch: int  # cuLaunchKernel
    gemm: int  # cublasGemmEx
    stream: int  # cublasSetStream


@cache
def _functions() -> _Functions | None:
    """``None`` where they cannot be found: CuPy is asked then."""
    if SIMULATED:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        found = (
            driver.cuMemcpyHtoDAsync_v2,
            getattr(driver, "cuMemcpyBatchAsync_v2", None),
            driver.cuLaunchKernel,
            _cublas().cublasGemmEx,
            _cublas().cublasSetStream_v2,
        )
    except (OSError, AttributeError):
        return None
    addresses = [0 if x is None else ctypes.cast(x, ctypes.c_void_p).value or 0 for x in found]
    return _Functions(*addresses)


def _cublas() -> Any:
    from cupy.cuda import device

    device.get_cublas_handle()  # loads it
    for name in _CUBLAS:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"none of {', '.join(_CUBLAS)} is there")


def copy_to_device(
    to: NDArray[np.int64], sources: NDArray[np.int64], sizes: NDArray[np.int64]
) -> None:
    """Copy ``sizes`` bytes each from addresses in pinned memory to addresses on the device."""
    import cupy

    runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream().ptr
    functions = _functions()
    if functions is None:
        for a, b, size in zip(to.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            if size:
                runtime.memcpyAsync(a, b, size, runtime.memcpyHostToDevice, stream)
        return
    error = -1
    # One call takes less of the host, and small pieces as quickly as large ones; it refuses the
    # default stream, and pieces without bytes.
    if functions.copies and stream > _PER_THREAD and sizes.all():
        error = _copy_all(functions.copies, to, sources, sizes, _ATTRIBUTES, _OF_ALL, stream)
    if error:
        error = _copy(functions.copy, to, sources, sizes, stream)
    if error:
        raise RuntimeError(f"copying to the device failed: CUDA error {error}")


#: Fields of a matrix product: the arguments of :func:`kvtc_stream.gpu.coder.products.gemm`, with
#: addresses of the factors.
PRODUCT = (
    "a_op", "b_op", "m", "n", "k", "scale", "a", "a_kind", "a_stride", "b", "b_kind", "b_stride",
    "beta", "c", "c_kind", "c_stride", "compute", "algorithm",
)  # fmt: skip


def in_turn(
    products: NDArray[np.int64],
    kernel: Kernel,
    grids: NDArray[np.int64],
    block: int,
    arguments: NDArray[np.int64],
    *,
    kernel_first: bool = False,
    other: Any = None,
) -> None:
    """A matrix product and a launch of a kernel, and so on; or first the kernel.

    With an ``other`` stream every second pair is there, so that the kernels of one are beside the
    products of the other; in the end the current stream waits for it.

    Parameters
    ----------
    products
        int64 [number, 18]: arguments of cublasGemmEx after the handle, see :data:`PRODUCT`. One
        that has no elements is left out.
    grids, block
        int64 [number, 2], and threads of a block.
    arguments
        int64 [number, arguments of the kernel]: their bits.
    """
    import cupy
    from cupy_backends.cuda.libs import cublas

    handle = cupy.cuda.device.get_cublas_handle()
    functions = _functions()
    if functions is None:
        for product, grid, own in zip(products.tolist(), grids.tolist(), arguments, strict=True):
            if kernel_first:
                kernel(tuple(grid), block, kernel.numbers(own))
            if all(product[2:5]):
                cublas.gemmEx(handle, *product)
            if not kernel_first:
                kernel(tuple(grid), block, kernel.numbers(own))
        return
    current, event = cupy.cuda.get_current_stream(), cupy.cuda.Event(disable_timing=True)
    streams = np.array([current.ptr, (other or current).ptr])
    if other is not None:
        event.record()
        other.wait_event(event)
    arguments = np.ascontiguousarray(arguments)
    places = arguments.ctypes.data + 8 * np.arange(arguments.size).reshape(arguments.shape)
    error = _in_turn(
        functions.gemm,
        functions.stream,
        handle,
        products,
        functions.launch,
        kernel.handle,
        grids,
        block,
        streams,
        places,
        kernel_first,
    )
    if other is not None:
        event.record(other)
        current.wait_event(event)
    if error:
        what = "a matrix product: cuBLAS" if error < 0 else f"kernel {kernel.__name__}: CUDA"
        raise RuntimeError(f"{what} error {abs(error)}")


# --- compiled -----------------------------------------------------------------------------------


def _foreign(*narrow: int) -> Any:
    """A function that calls the C function at an address with a tuple of int64, and returns its
    int; the arguments at the places ``narrow`` are ints of 32 bits."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        address, packed = arguments
        values = cgutils.unpack_tuple(builder, packed)
        int32 = ir.IntType(32)
        values = [builder.trunc(v, int32) if i in narrow else v for i, v in enumerate(values)]
        function = ir.FunctionType(int32, [v.type for v in values])
        return builder.call(builder.inttoptr(address, function.as_pointer()), values)

    @intrinsic
    def call(_context, address, values):  # type: ignore[no-untyped-def]
        return numba_types.int32(numba_types.int64, values), codegen

    return call


_call_copy = _call_copies = _call_stream = _foreign()
_call_gemm = _foreign(1, 2, 3, 4, 5, 8, 9, 11, 12, 15, 16, 17, 18)
_call_launch = _foreign(1, 2, 3, 4, 5, 6, 7)


@_jit
def _copy(function, to, sources, sizes, stream):  # type: ignore[no-untyped-def]
    for i in range(to.size):
        if sizes[i]:
            error = _call_copy(function, (to[i], sources[i], sizes[i], stream))
            if error:
                return error
    return 0


@_jit
def _copy_all(function, to, sources, sizes, attributes, first, stream):  # type: ignore[no-untyped-def]
    if not to.size:
        return 0
    return _call_copies(
        function,
        (
            to.ctypes.data, sources.ctypes.data, sizes.ctypes.data, np.int64(to.size),
            attributes.ctypes.data, first.ctypes.data, np.int64(1), stream,
        ),
    )  # fmt: skip


@_jit
def _in_turn(  # type: ignore[no-untyped-def]
    gemm, set_stream, handle, products, launch, kernel, grids, block, streams, places, kernel_first
):
    """0, or the error of the driver, or minus that of cuBLAS."""
    one, none = np.int64(1), np.int64(0)
    for i in range(2 * len(products)):
        stream = streams[i // 2 % 2]
        if (i % 2 == 0) == kernel_first:
            x, y = grids[i // 2]
            if x and y:
                error = _call_launch(
                    launch,
                    (
                        kernel, x, y, one, block, one, one, none, stream,
                        places[i // 2:].ctypes.data, none,
                    ),
                )  # fmt: skip
                if error:
                    return error
        else:
            p = products[i // 2]
            if p[2] and p[3] and p[4]:
                error = _call_stream(set_stream, (handle, stream)) or _call_gemm(
                    gemm,
                    (
                        handle, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10],
                        p[11], p[12], p[13], p[14], p[15], p[16], p[17],
                    ),
                )  # fmt: skip
                if error:
                    return -error
    return 0
