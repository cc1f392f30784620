"""Layout of a cache in device memory: one contiguous tensor, one tensor per layer, or pages.

Nothing is copied, except host tensors to the device. DLPack goes through CuPy; the stream is CuPy's
current one, as every producer is asked to make its data ready there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats import DType
from kvtc_stream.gpu.coder.rope import DeviceRopes
from kvtc_stream.gpu.kernels import layout
from kvtc_stream.io.dlpack import as_bits, dtype_of, on_cuda, to_numpy

#: Elements are held as unsigned integers of the same size.
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Tensors:
    """K, or V, of the layers of a section.

    Attributes
    ----------
    addresses
        Device address of each layer.
    token_stride, head_stride
        In elements. Channels of a head lie side by side.
    heads, dim
        KV heads, and channels of one.
    slots
        Number of tokens that a layer has room for.
    dtype
        Element type.
    """

    addresses: tuple[int, ...]
    token_stride: int
    head_stride: int
    heads: int
    dim: int
    slots: int
    dtype: DType
    _owners: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of_layers(cls, arrays: Any, dtype: DType, *, paged: bool = False) -> Tensors:
        """From CuPy arrays a layer, or one of all: [heads, tokens, dim], or
        [pages, page size, heads, dim]."""
        first, size = arrays[0], dtype.itemsize
        strides = [s // size for s in first.strides]
        stacked = isinstance(arrays, cupy.ndarray)
        for array in () if stacked else arrays:
            if array.strides != first.strides or array.shape != first.shape:
                raise ValueError(
                    f"layers differ: shapes {list(first.shape)} and {list(array.shape)}, strides "
                    f"{list(first.strides)} and {list(array.strides)}: they must be alike"
                )
        if paged:
            pages, page, heads, dim = first.shape
            _, token_stride, head_stride, channel = strides
            slots = pages * page
            if pages > 1 and strides[0] != page * token_stride:
                raise ValueError(
                    f"pages of {page} tokens are {strides[0]} elements apart, tokens "
                    f"{token_stride}: pages must follow one another without a gap"
                )
        else:
            heads, slots, dim = first.shape
            head_stride, token_stride, channel = strides
        if first.size and dim > 1 and channel != 1:
            raise ValueError(f"channels are {channel} elements apart: they must lie side by side")
        if stacked:
            begin, step = first.data.ptr, arrays.strides[0]
            addresses, owners = tuple(begin + i * step for i in range(len(arrays))), (arrays,)
        else:
            addresses, owners = tuple(a.data.ptr for a in arrays), tuple(arrays)
        return cls(addresses, token_stride, head_stride, heads, dim, slots, dtype, owners)

    @classmethod
    def of_pieces(cls, pieces: Sequence[Any], dtype: DType) -> Tensors:
        """From CuPy arrays of some layers each, [layers, heads, tokens, dim]."""
        first, *others = (cls.of_layers(x, dtype) for x in pieces)
        for x in others:
            if replace(x, addresses=first.addresses) != first:
                raise ValueError(f"pieces of layers differ, {x} and {first}: they must be alike")
        addresses = chain(first.addresses, *(x.addresses for x in others))
        return replace(first, addresses=tuple(addresses), _owners=tuple(pieces))

    @property
    def wide(self) -> bool:
        """Whether kernels may move 16 bytes at a time."""
        strides = (self.token_stride, self.head_stride, self.dim // 2)
        return (
            self.dtype in layout.WIDE
            and self.dim % 16 == 0
            and not any(a % 16 for a in self.addresses)
            and not any(s % 8 for s in strides)
        )


#: A layer's K (0) or V (1), and where its channels begin in a part's rows.
Column = tuple[int, int, int]


def every_column(layers: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """:data:`Column` of layers, of K and then of V, each from its first channel on."""
    found = np.zeros((2, len(layers), 3), np.int64)
    found[1, :, 0], found[:, :, 1] = 1, layers
    return found.reshape(-1, 3)


def entries(
    k: Tensors | None,
    v: Tensors | None,
    columns: Sequence[Column] | NDArray[np.int64],
    ropes: DeviceRopes,
) -> NDArray[np.int64]:
    """int64 [columns, layout.FIELDS] of (kind, layer, column); layers are the section's indices."""
    kinds, layers, begins = np.asarray(columns, np.int64).reshape(-1, 3).T
    rows = np.empty((len(kinds), layout.FIELDS), np.int64)
    count, facts = len(ropes.tables), np.zeros((2, 4), np.int64)
    addresses = np.zeros((2, count), np.int64)
    for kind, t in enumerate((k, v)):
        if t is not None:
            addresses[kind] = t.addresses
            facts[kind] = t.token_stride, t.head_stride, t.heads, t.dim
    rows[:, 0], rows[:, 1:5] = addresses[kinds, layers], facts[kinds]
    rows[:, 5] = np.where(kinds, -1, ropes.tables[layers])
    rows[:, 6], rows[:, 7] = begins, kinds * count + layers
    return rows


def taker() -> Callable[[Any, str], tuple[Any, DType]]:
    """:func:`to_device` for the tensors of one call: the stream waits once for all of a kind."""
    seen: set[type] = set()

    def take(x: Any, name: str) -> tuple[Any, DType]:
        found = to_device(x, name, ordered=type(x) in seen)
        seen.add(type(x))
        return found

    return take


def to_device(x: Any, name: str, *, ordered: bool = False) -> tuple[Any, DType]:
    """The bits of a tensor as a CuPy array, and its element type.

    Shares a CUDA tensor's memory; copies a host tensor. Raises as
    :func:`kvtc_stream.io.dlpack.to_numpy`, and ``BufferError`` for a tensor of another device. With
    ``ordered``, the current stream waits already for what made ``x``.
    """
    if not on_cuda(x):
        host = to_numpy(x, name)
        dtype = dtype_of(host.dtype, name)
        return cupy.asarray(np.ascontiguousarray(host).view(BITS[dtype.itemsize])), dtype
    device, current = int(x.__dlpack_device__()[1]), cupy.cuda.runtime.getDevice()
    if device != current:
        raise BufferError(
            f"{name} is on CUDA device {device}, the current one is {current}: make its device "
            f"current"
        )
    if isinstance(x, cupy.ndarray):
        dtype = dtype_of(np.dtype(x.dtype), name)
        return x.view(BITS[dtype.itemsize]), dtype
    # DLPack calls the legacy default stream 1, and none at all -1, which spares PyTorch some tens
    # of microseconds; others need not know it.
    if ordered and type(x).__module__.partition(".")[0] == "torch":
        stream = -1
    else:
        stream = cupy.cuda.get_current_stream().ptr or 1
    bits, dtype = as_bits(x, name, stream)
    try:
        return cupy.from_dlpack(bits), dtype
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise BufferError(
            f"{name}: CuPy cannot read this {type(x).__name__} ({error}); pass a dense, detached "
            f"tensor"
        ) from error
