"""Cache values to binary32 and back: casts, fp8 scales, and the bytes of verbatim tokens."""

from __future__ import annotations

from array import array
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats import Block, DType, StreamHeader
from kvtc_stream.formats.coders import decompress, join_planes, split_planes
from kvtc_stream.interop import numpy_dtype

Array = NDArray[Any]
Float = NDArray[np.float32]


def to_float32(x: Array, scale: Float | None) -> Float:
    """``x`` [layers, heads, tokens, dim] as binary32; fp8 times its scale [layers, heads]."""
    values = x.astype(np.float32)
    if scale is not None:
        values *= scale[:, :, None, None]
    return values


def from_float32(x: Float, dtype: DType, scale: Float | None) -> Array:
    """The inverse: round to ``dtype``, nearest even; fp8 is divided by its scale and saturates."""
    if dtype.is_fp8:
        if scale is None:
            raise ValueError(f"{dtype.label} needs a scale")
        limit = float(ml_dtypes.finfo(numpy_dtype(dtype)).max)  # type: ignore[no-untyped-call]
        x = np.clip(x / scale[:, :, None, None], -limit, limit)
    with np.errstate(over="ignore", invalid="ignore"):
        cast: Array = x.astype(numpy_dtype(dtype), copy=False)
    return cast


def convert(x: Array, dtype: DType, scale: Float | None) -> Array:
    """Verbatim values in the output dtype: as they are, or fp8 dequantised."""
    if x.dtype == numpy_dtype(dtype):
        return x
    return from_float32(to_float32(x, scale), dtype, scale)


def scale_grid(scale: Any, name: str, layers: int, kv_heads: int) -> Float:
    """fp8 scales, given as a scalar, [layers] or [layers, kv_heads], as [layers, kv_heads]."""
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


def verbatim_planes(k: Array, v: Array) -> list[bytes]:
    """K then V, each [layers, heads, tokens, dim] in C order, as byte planes, low bytes first.

    Planes put the bytes with sign and exponent together, where a byte coder finds redundancy.
    """
    return split_planes(k.tobytes() + v.tobytes(), k.dtype.itemsize)


def verbatim_arrays(
    data: bytes, k_shape: tuple[int, ...], v_shape: tuple[int, ...], dtype: DType
) -> tuple[Array, Array]:
    """What :func:`verbatim_planes` was given."""
    values = np.frombuffer(join_planes(data, dtype.itemsize), numpy_dtype(dtype))
    count = int(np.prod(k_shape))
    return values[:count].reshape(k_shape), values[count:].reshape(v_shape)


def verbatim_values(block: Block, header: StreamHeader) -> tuple[Array, Array]:
    """K and V of a block's verbatim tokens, as the cache held them."""
    section, count = header.geometry.sections[block.section], len(block.verbatim_tokens)
    size = header.verbatim_size(block.section, count)
    data = decompress(block.verbatim_coder, block.verbatim, size)
    return verbatim_arrays(data, section.k_shape(count), section.v_shape(count), header.dtype)


def verbatim_tokens(block: Block, header: StreamHeader) -> tuple[Array, Array, NDArray[np.int64]]:
    """K, V and positions of a block that is all verbatim, as the cache held them, uncut tokens."""
    k, v = verbatim_values(block, header)
    kept = slice(block.kept.start, block.kept.stop)
    return k[:, :, kept], v[:, :, kept], np.array(block.positions, np.int64)[kept]


def stored_positions(positions: NDArray[np.int64]) -> range | array[int]:
    """Positions as a block holds them: a range where they are contiguous."""
    first = int(positions[0])
    if int(positions[-1]) - first == len(positions) - 1:
        return range(first, first + len(positions))
    return array("q", positions.tolist())
