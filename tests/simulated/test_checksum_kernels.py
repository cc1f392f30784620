"""Checksums on the device are those of the host."""

from __future__ import annotations

import cupy
import numpy as np
import pytest
import xxhash

from kvtc_stream.gpu.coder.checksums import checksums
from kvtc_stream.gpu.runtime.staging import Staging


@pytest.mark.parametrize(
    "sizes",
    [
        [241, 256, 1023],  # less than what accumulators are mixed after
        [1024, 1025, 1088, 1089, 2049, 5 * 1024 + 77],
        [9 * 1024 + 64 * 16 - 1],  # more than a block of threads takes
    ],
)
def test_checksums(sizes: list[int]) -> None:
    rng = np.random.default_rng(len(sizes))
    seeds = rng.integers(0, 1 << 64, len(sizes), np.uint64)
    begins = np.cumsum([0, *(size // 8 * 8 + 16 for size in sizes)])
    data = rng.integers(0, 256, begins[-1], np.uint8)
    # Sums of large words carry beyond 63 bits.
    data[begins[0] : begins[0] + 256] = 255
    waiting = checksums(
        Staging(), cupy.asarray(data), begins[:-1], np.array(sizes, np.int64), seeds
    )
    expected = [
        xxhash.xxh3_64_intdigest(data[begin : begin + size].tobytes(), int(seed))
        for begin, size, seed in zip(begins[:-1], sizes, seeds, strict=True)
    ]
    assert waiting().tolist() == expected


def test_nothing_to_sum() -> None:
    none = np.zeros(0, np.int64)
    assert not len(checksums(Staging(), None, none, none, none.view(np.uint64))())
