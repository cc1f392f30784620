"""Where a cache's values are on the device: contiguous tensors, one a layer, or pages.

Nothing here copies. DLPack goes through CuPy; the caller's stream is CuPy's current one, as every
producer is asked to make its data ready there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cupy
import numpy as np

from kvtc_stream.formats import DType
from kvtc_stream.interop import dtype_of


@dataclass(frozen=True)
class Tensors:
    """K, or V, of the layers of a section.

    Attributes
    ----------
    addresses
        uint64 [layers] on the device: of each layer.
    token_stride, head_stride
        In elements. Channels of a head lie side by side.
    heads, dim
        KV heads, and channels of one.
    slots
        How many tokens a layer has room for.
    dtype
        Element type.
    device
        Number of the CUDA device.
    """

    addresses: Any
    token_stride: int
    head_stride: int
    heads: int
    dim: int
    slots: int
    dtype: DType
    device: int
    _owners: tuple[Any, ...] = field(default=(), repr=False)

    @classmethod
    def of_layers(cls, arrays: Sequence[Any], dtype: DType, paged: bool = False) -> Tensors:
        """From CuPy arrays [heads, tokens, dim] a layer, or [pages, page size, heads, dim]."""
        first = arrays[0]
        size = dtype.itemsize
        if paged:
            pages, page, heads, dim = first.shape
            page_stride, token_stride, head_stride, channel = (s // size for s in first.strides)
            slots = pages * page
            if pages > 1 and page_stride != page * token_stride:
                raise ValueError(
                    f"pages of {page} tokens are {page_stride} elements apart, tokens "
                    f"{token_stride}: pages must follow one another without a gap"
                )
        else:
            heads, slots, dim = first.shape
            head_stride, token_stride, channel = (s // size for s in first.strides)
        if dim > 1 and channel != 1:
            raise ValueError(f"channels are {channel} elements apart: they must lie side by side")
        for array in arrays:
            if array.strides != first.strides or array.shape != first.shape:
                raise ValueError(
                    f"layers differ: shapes {list(first.shape)} and {list(array.shape)}, strides "
                    f"{list(first.strides)} and {list(array.strides)}"
                )
        addresses = cupy.asarray(np.array([a.data.ptr for a in arrays], np.uint64))
        return cls(
            addresses, token_stride, head_stride, heads, dim, slots, dtype,
            first.device.id, tuple(arrays),
        )  # fmt: skip


def empty(shape: tuple[int, ...], dtype: DType) -> Any:
    """An uninitialised CuPy array; bfloat16 has the dtype of ``ml_dtypes``."""
    from kvtc_stream.interop import numpy_dtype

    return cupy.empty(shape, numpy_dtype(dtype))


def is_on_device(x: Any) -> bool:
    """Whether a tensor says through DLPack that it is in CUDA memory."""
    if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack_device__"):
        return False
    return int(x.__dlpack_device__()[0]) == _CUDA


_CUDA = 2


def to_cupy(x: Any, name: str = "k") -> Any:
    """A CuPy array of a tensor: shares a CUDA tensor's memory, copies a host tensor.

    Raises
    ------
    TypeError, BufferError
        As :func:`kvtc_stream.interop.to_numpy`.
    """
    if isinstance(x, cupy.ndarray):
        return x
    if is_on_device(x):
        array = _from_dlpack(x, name)
        if array.device.id != cupy.cuda.runtime.getDevice():
            raise BufferError(
                f"{name} is on CUDA device {array.device.id}, the current one is "
                f"{cupy.cuda.runtime.getDevice()}: make its device current"
            )
        return array
    from kvtc_stream.interop import to_numpy

    return cupy.asarray(np.ascontiguousarray(to_numpy(x, name)))


def _from_dlpack(x: Any, name: str) -> Any:
    try:
        return cupy.from_dlpack(x)
    except (BufferError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise BufferError(
            f"{name}: CuPy cannot read this {type(x).__name__} ({error}); pass a dense, detached "
            f"tensor"
        ) from error


def dtype_on_device(array: Any, name: str) -> DType:
    """The cache dtype of a CuPy array."""
    return dtype_of(np.dtype(array.dtype), name)
