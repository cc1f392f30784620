"""Small drawn caches and calibrations, for doctests and for the tests of those who build on us."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.calibrator import Calibrator
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.formats import DType, Geometry, Rope
from kvtc_stream.io.dlpack import numpy_dtype


def drawn_cache(
    geometry: Geometry,
    tokens: int,
    *,
    seed: int = 0,
    section: int = 0,
    dtype: DType = DType.FLOAT32,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """K and V [layers, kv_heads, tokens, head_dim] of low rank plus noise, with a mean.

    The directions depend on the geometry alone, so that a calibration on one seed fits another.
    """
    shape = geometry.sections[section]
    rng = np.random.default_rng(seed)
    arrays = []
    for i, (width, dims) in enumerate(
        ((shape.k_width, shape.k_shape(tokens)), (shape.v_width, shape.v_shape(tokens)))
    ):
        fixed = np.random.default_rng((i, section))
        rank = max(1, width // 4)
        directions = fixed.standard_normal((rank, width)) / np.sqrt(np.arange(1, rank + 1))[:, None]
        rows = rng.standard_normal((tokens, rank)) @ directions + fixed.standard_normal(width)
        rows += 0.05 * rng.standard_normal(rows.shape)
        layers, heads, _, dim = dims
        array = rows.reshape(tokens, layers, heads, dim).transpose(1, 2, 0, 3)
        arrays.append(np.ascontiguousarray(array.astype(np.float32).astype(numpy_dtype(dtype))))
    return arrays[0], arrays[1]


def tiny_calibration() -> Calibration:
    """A calibration of 2 layers with 2 heads of 8 channels, keys after RoPE."""
    geometry = Geometry.uniform(layers=2, kv_heads=2, head_dim=8, rope=Rope.from_theta(1e4, 8))
    calibrator = Calibrator(geometry)
    calibrator.update(*drawn_cache(geometry, 512, seed=1))
    return calibrator.finish()
