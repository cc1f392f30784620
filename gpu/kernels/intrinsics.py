"""Intrinsics of kernels: pointers, conversions, and communication between lanes of a warp.

Kernels get memory as pointers, indexed like arrays, without bounds checks.
In Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``) a pointer is a one-dimensional array.
"""

from __future__ import annotations

import numpy as np

from kvtc_stream.gpu.runtime.dialect import SIMULATED, cuda, instruction, pointer_at, types

u8p = types.CPointer(types.uint8)
u16p = types.CPointer(types.uint16)
u32p = types.CPointer(types.uint32)
i32p = types.CPointer(types.int32)
i64p = types.CPointer(types.int64)
f32p = types.CPointer(types.float32)
f64p = types.CPointer(types.float64)
i32, i64, u32, u64 = types.int32, types.int64, types.uint32, types.uint64
u8, u16 = types.uint8, types.uint16
f32, f64 = types.float32, types.float64

WARP = 32

if SIMULATED:
    from kvtc_stream.gpu.runtime.simulator import (
        ballot,
        bf16_bits,
        bf16_pair,
        f16_bits,
        f16_pair,
        f16_value,
        f32_at,
        f32_bits,
        f32_from_bits,
        load_f32x4,
        load_u32x4,
        popc,
        round_to_int,
        shuffle,
        shuffle_down,
        store_u32x4,
        u8_at,
        u16_at,
        u32_at,
    )
else:
    #: Binary32 to the bits of binary16, rounded to nearest even; and back.
    f16_bits = instruction("cvt.rn.f16.f32 $0, $1;", "=h,f", [u16], [f32])
    f16_value = instruction("cvt.f32.f16 $0, $1;", "=f,h", [f32], [u16])
    #: Binary32 to the bits of bfloat16, rounded to nearest even.
    bf16_bits = instruction("cvt.rn.bf16.f32 $0, $1;", "=h,f", [u16], [f32])
    #: Reinterpret 32 bits as binary32; bfloat16 are its upper half.
    f32_from_bits = instruction("mov.b32 $0, $1;", "=f,r", [f32], [u32])
    f32_bits = instruction("mov.b32 $0, $1;", "=r,f", [u32], [f32])
    #: The nearest integer, ties to even; saturates, and is 0 for NaN.
    round_to_int = instruction("cvt.rni.s32.f32 $0, $1;", "=r,f", [i32], [f32])
    #: Two binary32 as two binary16, or two bfloat16, in 32 bits, the first in the low half.
    f16_pair = instruction("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [u32], [f32, f32])
    bf16_pair = instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [u32], [f32, f32])
    #: A pointer from an address.
    u8_at, u16_at, u32_at, f32_at = map(pointer_at, (u8p, u16p, u32p, f32p))
    #: Sixteen bytes at an address that is a multiple of 16, as uint32 or binary32.
    load_u32x4 = instruction(
        "ld.global.v4.u32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [u32] * 4, [u64]
    )
    load_f32x4 = instruction(
        "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [f32] * 4, [u64]
    )
    #: Store sixteen bytes at an address that is a multiple of 16.
    store_u32x4 = instruction(
        "st.global.v4.u32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r,~{memory}", [], [u64] + [u32] * 4
    )

    @cuda.jit(device=True)
    def shuffle(value, lane):  # type: ignore[no-untyped-def]
        """The value of another lane, int32. All lanes must take part."""
        return cuda.shfl_sync(np.uint32(0xFFFFFFFF), value, lane)

    @cuda.jit(device=True)
    def ballot(predicate):  # type: ignore[no-untyped-def]
        """Votes of all lanes, uint32: bit ``j`` is lane ``j``'s. All lanes must take part."""
        return np.uint32(cuda.ballot_sync(np.uint32(0xFFFFFFFF), predicate))

    @cuda.jit(device=True)
    def popc(mask):  # type: ignore[no-untyped-def]
        """Number of set bits."""
        return np.uint32(cuda.popc(mask))

    @cuda.jit(device=True)
    def shuffle_down(value, by):  # type: ignore[no-untyped-def]
        """The value of the lane whose number is ``by`` higher. All lanes must take part."""
        return cuda.shfl_down_sync(np.uint32(0xFFFFFFFF), value, by)
