"""Checksums of payloads that are on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.gpu.kernels import checksum
from kvtc_stream.gpu.runtime.staging import Staging
from kvtc_stream.io.xxh3 import found_in


def checksums(
    staging: Staging,
    data: Any,
    begins: NDArray[np.int64],
    sizes: NDArray[np.int64],
    seeds: NDArray[np.uint64],
) -> Callable[[], NDArray[np.uint64]]:
    """Begin to compute the checksums of payloads; return what waits for them.

    Parameters
    ----------
    data
        uint8 on the device, in which payloads begin at multiples of 8, with room for 8 bytes more
        after each.
    begins, sizes, seeds
        [payloads], of :data:`kvtc_stream.gpu.kernels.checksum.LEAST` to ``MOST`` bytes each.
    """
    count = len(sizes)
    if not count:
        return lambda: np.zeros(0, np.uint64)
    blocks = (sizes - 1) // checksum.BLOCK + 1
    tasks = np.empty((count, checksum.FIELDS), np.int64)
    tasks[:, checksum.WORD] = begins // 8
    tasks[:, checksum.SIZE] = sizes
    tasks[:, checksum.FIRST] = np.cumsum(blocks) - blocks
    tasks[:, checksum.SEED] = seeds.view(np.int64)
    tasks_d, secret, initial = staging.arrays(tasks, checksum.SECRET, checksum.INITIAL)
    sums = cupy.empty((int(blocks.sum()), 8), np.int64)
    warps = checksum.THREADS // 32
    checksum.add(
        (count, -(-int(blocks.max()) // warps)), checksum.THREADS, (tasks_d, data, secret, sums)
    )
    out = cupy.empty((count, 8), np.int64)
    checksum.mix(-(-8 * count // 64), 64, (tasks_d, count, secret, initial, sums, out))
    found = staging.begin_fetch(out.reshape(-1))
    return lambda: found_in(found().view(np.uint64), sizes, seeds)
