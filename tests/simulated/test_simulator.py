"""What Numba's simulator lacks: lanes of a warp that exchange values."""

from __future__ import annotations

import numpy as np
import pytest
from launch import simulate

from kvtc_stream.gpu.runtime import simulator
from kvtc_stream.gpu.runtime.compile import kernel
from kvtc_stream.gpu.runtime.dialect import cuda, types


@kernel(types.CPointer(types.int32), types.int32)
def rotate(out, lanes):  # type: ignore[no-untyped-def]
    """Each lane hands on its number; lanes from ``lanes`` on leave before that."""
    lane = np.int32(cuda.threadIdx.x)
    if lane < lanes:
        for _ in range(5):
            lane = simulator.shuffle(lane, (np.int32(cuda.threadIdx.x) + 1) % 32)
        out[cuda.threadIdx.x] = lane


def test_lanes_exchange_values() -> None:
    out = np.zeros(32, np.int32)
    simulate(rotate, 1, 32, [out, 32])
    assert out.tolist() == [(lane + 5) % 32 for lane in range(32)]


def test_a_lane_that_has_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "_PAUSE", 1e-3)
    with pytest.raises(RuntimeError, match="waited for 1 of 32 lanes"):
        simulate(rotate, 1, 32, [np.zeros(32, np.int32), 31])
