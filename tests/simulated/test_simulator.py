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


def test_a_lane_that_has_left_is_told() -> None:
    with pytest.raises(RuntimeError, match="wait for 1 of 32 that do not come"):
        simulate(rotate, 1, 32, [np.zeros(32, np.int32), 31])


@kernel(types.CPointer(types.int32), types.int32)
def reverse(out, lanes):  # type: ignore[no-untyped-def]
    """Lanes below ``lanes`` meet at barriers and read what others have written."""
    lane = np.int32(cuda.threadIdx.x)
    if lane < lanes:
        for i in range(3):
            out[lane] = lane + i
            cuda.syncthreads()
            other = out[lanes - 1 - lane]
            if cuda.syncthreads_or(lane == i):
                out[lane] = other


def test_lanes_meet_at_barriers() -> None:
    out = np.zeros(70, np.int32)
    simulate(reverse, 1, 80, [out, 70])
    assert out.tolist() == [69 - lane + 2 for lane in range(70)]


def test_a_lane_at_a_barrier_is_told_from_one_that_exchanges() -> None:
    @kernel(types.CPointer(types.int32))
    def half(out):  # type: ignore[no-untyped-def]
        if cuda.threadIdx.x < 16:
            cuda.syncthreads()
        else:
            simulator.shuffle(out[0], 0)

    with pytest.raises(RuntimeError, match="wait for 16 of 32 that do not come"):
        simulate(half, 1, 32, [np.zeros(1, np.int32)])
