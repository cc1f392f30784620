"""The piece of a real model's cache in ``tests/data``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import kvtc_stream as kvtc

SAMPLE = Path(__file__).parent / "data" / "smollm2_135m.npz"


@dataclass(frozen=True)
class RealSample:
    """Keys after RoPE and values, bfloat16 [layers, kv_heads, tokens, head_dim]."""

    geometry: kvtc.Geometry
    k: NDArray[Any]
    v: NDArray[Any]


def load_real_sample() -> RealSample:
    """Read what ``data/make_sample.py`` wrote."""
    with np.load(SAMPLE) as file:
        k, v = (file[name].view(ml_dtypes.bfloat16) for name in ("k", "v"))
        theta = float(file["rope_theta"])
    layers, heads, _, dim = k.shape
    rope = kvtc.Rope.from_theta(theta, dim)
    geometry = kvtc.Geometry.uniform(layers=layers, kv_heads=heads, head_dim=dim, rope=rope)
    return RealSample(geometry, k, v)
