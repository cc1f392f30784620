"""Copies made by threads of the device: small ones from pinned memory, and to multiples of 16.

A copy engine takes one copy after the other: what a kernel waits for would come behind payloads
that nobody needs yet.
"""

from __future__ import annotations

import numpy as np

from kvtc_stream.gpu.kernels.intrinsics import i32, i64p, load_u32x4, store_u32x4, u32_at, u64
from kvtc_stream.gpu.runtime.compile import kernel
from kvtc_stream.gpu.runtime.dialect import cuda

#: Threads of a block, and units of 16 bytes that each copies.
THREADS, UNITS = 256, 4

#: Fields of a task of :func:`align`: addresses, and units of 16 bytes.
SOURCE, OUT, COUNT = range(3)
FIELDS = 3
#: Bytes after a source that may be read.
BEYOND = 32

_I32, _I64, _U32, _U64 = np.int32, np.int64, np.uint32, np.uint64


@kernel(u64, u64, i32)
def pull(source, out, units):  # type: ignore[no-untyped-def]
    """Kernel: copy units of 16 bytes between addresses that are multiples of 16; the grid is
    ⌈units / (THREADS · UNITS)⌉."""
    first = _I32(cuda.blockIdx.x) * _I32(THREADS * UNITS) + _I32(cuda.threadIdx.x)
    last = min(first + _I32(THREADS * UNITS), units)
    for unit in range(first, last, _I32(THREADS)):
        x = load_u32x4(source + 16 * unit)
        store_u32x4(out + 16 * unit, x[0], x[1], x[2], x[3])


@cuda.jit(device=True)
def _joined(low, high, shift):  # type: ignore[no-untyped-def]
    """The 32 bits from ``shift`` on of two words."""
    return _U32(((_U64(high) << _U64(32)) | _U64(low)) >> shift)


@kernel(i64p)
def align(tasks):  # type: ignore[no-untyped-def]
    """Kernel: copy bytes from any addresses to multiples of 16; the grid is tasks, and as for
    :func:`pull` of the longest.

    ``tasks`` int64 [tasks, FIELDS].
    """
    task = _I32(cuda.blockIdx.x) * _I32(FIELDS)
    source, out, units = tasks[task + SOURCE], tasks[task + OUT], _I32(tasks[task + COUNT])
    odd = source & _I64(3)
    shift = _U64(8 * odd)
    first = _I32(cuda.blockIdx.y) * _I32(THREADS * UNITS) + _I32(cuda.threadIdx.x)
    last = min(first + _I32(THREADS * UNITS), units)
    for unit in range(first, last, _I32(THREADS)):
        words = u32_at(_U64(source - odd + 16 * _I64(unit)))
        a, b, c, d, e = words[0], words[1], words[2], words[3], words[4]
        store_u32x4(
            _U64(out + 16 * _I64(unit)),
            _joined(a, b, shift),
            _joined(b, c, shift),
            _joined(c, d, shift),
            _joined(d, e, shift),
        )
