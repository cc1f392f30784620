"""Cache values to binary32 and back: casts, fp8 scales, and the bytes of verbatim tokens."""

from __future__ import annotations

import math
from array import array
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.coding import verbatim
from kvtc_stream.formats import Block, Coder, DType, Feature, StreamHeader
from kvtc_stream.formats.coders import compress_beside, decompress
from kvtc_stream.io.dlpack import numpy_dtype

Array = NDArray[Any]
Float = NDArray[np.float32]

#: Bytes of verbatim values from which on they are coded with ``Coder.PLANES``.
PLANES_FROM = 1 << 15


def to_float32(x: Array, scale: Float | None) -> Float:
    """``x`` [layers, heads, tokens, dim] as float32; fp8 times its ``scale`` [layers, heads]."""
    values = x.astype(np.float32)
    if scale is not None:
        values *= scale[:, :, None, None]
    return values


def widened(x: Array, scale: Float | None) -> Array:
    """``x`` as bfloat16, if it is, else as :func:`to_float32`: what the kernels of rows read."""
    return x if x.dtype == ml_dtypes.bfloat16 else to_float32(x, scale)


def from_float32(x: Float, dtype: DType, scale: Float | None) -> Array:
    """The inverse: round to ``dtype``, ties to even; fp8 is divided by its scale and saturates."""
    if dtype.is_fp8:
        if scale is None:
            raise ValueError(f"{dtype.label} needs a scale")
        limit = float(ml_dtypes.finfo(numpy_dtype(dtype)).max)  # type: ignore[no-untyped-call]
        x = np.clip(x / scale[:, :, None, None], -limit, limit)
    with np.errstate(over="ignore", invalid="ignore"):
        cast: Array = x.astype(numpy_dtype(dtype), copy=False)
    return cast


def convert(x: Array, dtype: DType, scale: Float | None) -> Array:
    """Verbatim values in the output dtype ``dtype``: unchanged, or dequantised from fp8."""
    if x.dtype == numpy_dtype(dtype):
        return x
    return from_float32(to_float32(x, scale), dtype, scale)


def section_scales(header: StreamHeader, section: int) -> tuple[Float | None, Float | None]:
    """fp8 scales of K and of V [layers, kv_heads], or ``None`` for other dtypes."""
    if not header.scales:
        return None, None
    of, shape = header.scales[section], (-1, header.geometry.sections[section].kv_heads)
    k, v = (np.array(x, np.float32).reshape(shape) for x in (of.k_scale, of.v_scale))
    return k, v


def scale_grid(scale: Any, name: str, layers: int, kv_heads: int) -> Float:
    """Expand fp8 scales from a scalar, [layers] or [layers, kv_heads] to [layers, kv_heads]."""
    grid = np.asarray(1.0 if scale is None else scale, np.float32)
    if grid.ndim == 1:
        grid = grid[:, None]
    try:
        grid = np.broadcast_to(grid, (layers, kv_heads))
    except ValueError:
        raise ValueError(
            f"{name} must be a scalar, [layers] or [layers, kv_heads] with [layers, kv_heads] = "
            f"[{layers}, {kv_heads}], found {list(grid.shape)}"
        ) from None
    if not (np.isfinite(grid) & (grid > 0)).all():
        raise ValueError(f"{name} must be positive and finite")
    return grid


def verbatim_planes(k: Array, v: Array) -> list[memoryview]:
    """The byte planes of K then V, each [layers, heads, tokens, dim] in C order, low bytes first.

    Planes bring bytes with sign and exponent together, where a byte coder finds redundancy.
    """
    planes = np.empty((k.dtype.itemsize, k.size + v.size), np.uint8)
    for x, own in ((k, planes[:, : k.size]), (v, planes[:, k.size :])):
        items = np.ascontiguousarray(x).view(np.uint8).reshape(-1, x.dtype.itemsize)
        for place, plane in enumerate(own):
            plane[:] = items[:, place]
    return [plane.data for plane in planes]


def verbatim_arrays(
    data: bytes, k_shape: tuple[int, ...], v_shape: tuple[int, ...], dtype: DType
) -> tuple[Array, Array]:
    """The inverse of :func:`verbatim_planes`: K and V."""
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    items = np.empty(planes.shape[::-1], np.uint8)
    for place, plane in enumerate(planes):  # quicker than one transposed copy
        items[:, place] = plane
    return _parted(items.reshape(-1).view(numpy_dtype(dtype)), k_shape, v_shape)


def _parted(
    values: Array, k_shape: tuple[int, ...], v_shape: tuple[int, ...]
) -> tuple[Array, Array]:
    count = math.prod(k_shape)
    return values[:count].reshape(k_shape), values[count:].reshape(v_shape)


def codes_planes(header: StreamHeader, size: int) -> bool:
    """Whether a writer codes so many bytes of verbatim values with ``Coder.PLANES``.

    Few values take less space with a byte coder (benchmarks/verbatim.py), but a device cannot
    decode that.
    """
    return size >= PLANES_FROM and Feature.PLANES in header.features


def code_verbatim(header: StreamHeader, k: Array, v: Array) -> tuple[Coder, bytes]:
    """Coder and payload of a block's verbatim values, [layers, heads, tokens, dim]."""
    if codes_planes(header, k.nbytes + v.nbytes):
        bits = np.concatenate([x.reshape(-1).view(np.uint16) for x in (k, v)])
        coded = verbatim.encode(bits)
        if coded.size < bits.nbytes:
            return Coder.PLANES, coded.tobytes()
    return compress_beside(header.coder, *verbatim_planes(k, v))


def verbatim_bytes(block: Block, header: StreamHeader) -> bytes:
    """The decompressed byte planes of a block's verbatim tokens, one after the other.

    Of a byte coder.
    """
    size = header.verbatim_size(block.section, len(block.verbatim_tokens))
    return decompress(block.verbatim_coder, block.verbatim, size)


def verbatim_values(block: Block, header: StreamHeader) -> tuple[Array, Array]:
    """K and V of a block's verbatim tokens, in the cache's dtype."""
    section, count = header.geometry.sections[block.section], len(block.verbatim_tokens)
    shapes = section.k_shape(count), section.v_shape(count)
    if block.verbatim_coder is Coder.PLANES:
        bits = verbatim.decode(block.verbatim, math.prod(shapes[0]) + math.prod(shapes[1]))
        return _parted(bits.view(numpy_dtype(header.dtype)), *shapes)
    return verbatim_arrays(verbatim_bytes(block, header), *shapes, header.dtype)


def verbatim_output(block: Block, header: StreamHeader) -> tuple[Array, Array]:
    """K and V of a block's verbatim tokens in the output dtype: [layers, kv_heads, n, head_dim]."""
    k, v = verbatim_values(block, header)
    k_scale, v_scale = section_scales(header, block.section)
    return convert(k, header.out_dtype, k_scale), convert(v, header.out_dtype, v_scale)


def verbatim_tokens(block: Block, header: StreamHeader) -> tuple[Array, Array, NDArray[np.int64]]:
    """K, V (in the cache's dtype) and positions of a block that is entirely verbatim.

    Tokens that were cut from the block are left out.
    """
    k, v = verbatim_values(block, header)
    kept = slice(block.kept.start, block.kept.stop)
    return k[:, :, kept], v[:, :, kept], np.array(block.positions, np.int64)[kept]


def stored_positions(positions: NDArray[np.int64]) -> range | array[int]:
    """Positions as a block stores them: a range if they are contiguous."""
    first = int(positions[0])
    if int(positions[-1]) - first == len(positions) - 1:
        return range(first, first + len(positions))
    return array("q", positions.tolist())
