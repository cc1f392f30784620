"""The intrinsics of kernels in Python, for Numba's simulator.

Numba runs kernels in Python where ``NUMBA_ENABLE_CUDASIM=1`` is set before it is imported; every
value is one of NumPy's. Kernels then import their intrinsics from here; ``tests/simulated``
launches them (``launch.py``) and runs their threads (``lanes.py``). Pointers are :class:`Memory`,
which keeps bounds that the GPU would not.

NumPy keeps integers of 32 bits where Numba widens them to 64, and refuses Python's integers beyond
a type. A kernel is right in both if

* a sum or product that must wrap is cast (``np.uint32(a + b)``), and one that must not, but exceeds
  32 bits, has an operand of 64,
* constants have the type of what they meet (``np.uint32(0xFFFF)``, no ``-1`` beside a uint32),
* uint64 is for addresses alone; they are int64 here, because NumPy makes a float64 of a sum of
  both,
* all lanes of a warp come to every :func:`ballot` and :func:`shuffle_down`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

#: Size in bytes given to memory at an address, whose end only the kernel knows.
_UNKNOWN = 1 << 40


class Memory:
    """A pointer: a one-dimensional array that raises an error for an index out of bounds."""

    __slots__ = ("array",)

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    def __getitem__(self, index: Any) -> Any:
        return self.array[self._inside(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.array[self._inside(index)] = value

    def _inside(self, index: Any) -> int:
        if not 0 <= index < self.array.size:
            raise IndexError(f"{index} is outside an array of {self.array.size}")
        return int(index)


# --- what the lanes of a warp share -------------------------------------------------------------


def exchange(value: Any) -> tuple[int, list[Any]]:
    """The lane, and the values of all lanes of its warp; set by what runs the lanes."""
    raise NotImplementedError("nothing runs lanes here: see tests/simulated/lanes.py")


def ballot(predicate: Any) -> np.uint32:
    """uint32: bit ``j`` is whether lane ``j`` says yes. All lanes take part."""
    _, values = exchange(bool(predicate))
    return np.uint32(sum(1 << j for j, value in enumerate(values) if value))


def popc(mask: Any) -> np.uint32:
    """Number of bits set."""
    return np.uint32(int(mask).bit_count())


def shuffle_down(value: Any, by: Any) -> Any:
    """The value of the lane ``by`` further on, its own where there is none. All lanes take part."""
    lane, values = exchange(value)
    return values[lane + int(by)] if lane + int(by) < len(values) else value


def shuffle(value: Any, lane: Any) -> Any:
    """The value of a lane. All lanes take part."""
    return exchange(value)[1][int(lane)]


# --- conversions --------------------------------------------------------------------------------


def f16_bits(x: Any) -> np.uint16:
    """Bits of a binary32 as binary16, to nearest even."""
    return np.float32(x).astype(np.float16).view(np.uint16)


def f16_value(bits: Any) -> np.float32:
    """A binary16 as binary32."""
    return np.float32(np.uint16(bits).view(np.float16))


def bf16_bits(x: Any) -> np.uint16:
    """Bits of a binary32 as bfloat16, to nearest even."""
    bits: np.uint16 = np.float32(x).astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits


def f16_pair(low: Any, high: Any) -> np.uint32:
    """Two binary32 as two binary16 in 32 bits."""
    return np.uint32(int(f16_bits(low)) | int(f16_bits(high)) << 16)


def bf16_pair(low: Any, high: Any) -> np.uint32:
    """Two binary32 as two bfloat16 in 32 bits."""
    return np.uint32(int(bf16_bits(low)) | int(bf16_bits(high)) << 16)


def f32_from_bits(bits: Any) -> np.float32:
    """A binary32 from its bits."""
    return np.uint32(bits).view(np.float32)


def f32_bits(x: Any) -> np.uint32:
    """Bits of a binary32."""
    return np.float32(x).view(np.uint32)


def round_to_int(x: Any) -> np.int32:
    """The nearest integer, ties to even; saturates, and is 0 for NaN."""
    if np.isnan(x):
        return np.int32(0)
    return np.int32(int(min(max(np.rint(np.float64(x)), -(2.0**31)), 2.0**31 - 1)))


# --- pointers from addresses --------------------------------------------------------------------


def memory_at(address: Any, dtype: npt.DTypeLike) -> Memory:
    """A pointer of an element type from an address."""
    kind = np.ctypeslib.as_ctypes_type(dtype) * (_UNKNOWN // np.dtype(dtype).itemsize)
    return Memory(np.ctypeslib.as_array(kind.from_address(int(address))))


def u8_at(address: Any) -> Memory:
    """A pointer from an address."""
    return memory_at(address, np.uint8)


def u16_at(address: Any) -> Memory:
    """A pointer from an address."""
    return memory_at(address, np.uint16)


def u32_at(address: Any) -> Memory:
    """A pointer from an address."""
    return memory_at(address, np.uint32)


def f32_at(address: Any) -> Memory:
    """A pointer from an address."""
    return memory_at(address, np.float32)


def _four_at(address: Any, dtype: type) -> npt.NDArray[Any]:
    if int(address) % 16:
        raise ValueError(f"address {int(address)} is no multiple of 16")
    return memory_at(address, dtype).array[:4]


def load_u32x4(address: Any) -> tuple[Any, ...]:
    """Sixteen bytes at an address that is a multiple of 16."""
    return tuple(_four_at(address, np.uint32))


def load_f32x4(address: Any) -> tuple[Any, ...]:
    """Sixteen bytes at an address that is a multiple of 16."""
    return tuple(_four_at(address, np.float32))


def store_u32x4(address: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Sixteen bytes to an address that is a multiple of 16."""
    _four_at(address, np.uint32)[:] = a, b, c, d
