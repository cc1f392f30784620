"""Intrinsics of kernels: pointers, conversions, and communication between lanes of a warp.

Kernels get memory as pointers, indexed like arrays, without bounds checks.
In Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``) a pointer is a one-dimensional array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config, types

u8p = types.CPointer(types.uint8)
u16p = types.CPointer(types.uint16)
u32p = types.CPointer(types.uint32)
i32p = types.CPointer(types.int32)
i64p = types.CPointer(types.int64)
f32p = types.CPointer(types.float32)
f64p = types.CPointer(types.float64)
i32, i64, u32, u64 = types.int32, types.int64, types.uint32, types.uint64
u8 = types.uint8
f32, f64 = types.float32, types.float64

WARP = 32

if config.ENABLE_CUDASIM:  # type: ignore[attr-defined]
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
    from llvmlite import ir
    from numba import cuda
    from numba.cuda.extending import intrinsic

    def _assembly(name: str, code: str, constraints: str, result: Any, argument: Any) -> Any:
        """Make a device function of one value from one line of PTX."""

        def typer(_context: Any, x: Any) -> Any:
            def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
                value = context.cast(builder, arguments[0], x, argument)
                of_result = context.get_value_type(result)
                of_argument = context.get_value_type(argument)
                line = ir.InlineAsm(ir.FunctionType(of_result, [of_argument]), code, constraints)
                return builder.call(line, [value])

            return result(x), generate

        typer.__name__ = name
        return intrinsic(typer)

    #: Binary32 to the bits of binary16, rounded to nearest even; and back.
    f16_bits = _assembly("f16_bits", "cvt.rn.f16.f32 $0, $1;", "=h,f", types.uint16, f32)
    f16_value = _assembly("f16_value", "cvt.f32.f16 $0, $1;", "=f,h", f32, types.uint16)
    #: Binary32 to the bits of bfloat16, rounded to nearest even.
    bf16_bits = _assembly("bf16_bits", "cvt.rn.bf16.f32 $0, $1;", "=h,f", types.uint16, f32)
    #: Reinterpret 32 bits as binary32; bfloat16 are its upper half.
    f32_from_bits = _assembly("f32_from_bits", "mov.b32 $0, $1;", "=f,r", f32, u32)
    f32_bits = _assembly("f32_bits", "mov.b32 $0, $1;", "=r,f", u32, f32)
    #: The nearest integer, ties to even; saturates, and is 0 for NaN.
    round_to_int = _assembly("round_to_int", "cvt.rni.s32.f32 $0, $1;", "=r,f", i32, f32)

    def _pointer_at(name: str, pointer: Any) -> Any:
        def typer(_context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
                value = context.cast(builder, arguments[0], address, u64)
                return builder.inttoptr(value, context.get_value_type(pointer))

            return pointer(address), generate

        typer.__name__ = name
        return intrinsic(typer)

    #: A pointer from an address.
    u8_at = _pointer_at("u8_at", u8p)
    u16_at = _pointer_at("u16_at", u16p)
    u32_at = _pointer_at("u32_at", u32p)
    f32_at = _pointer_at("f32_at", f32p)

    def _pair(name: str, code: str) -> Any:
        """Make a device function that packs two binary32 in 32 bits, the first in the low half."""

        def typer(_context: Any, low: Any, high: Any) -> Any:
            def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
                values = [
                    context.cast(builder, a, t, f32)
                    for a, t in zip(arguments, (low, high), strict=True)
                ]
                kinds = [v.type for v in values]
                line = ir.InlineAsm(ir.FunctionType(ir.IntType(32), kinds), code, "=r,f,f")
                return builder.call(line, values)

            return u32(low, high), generate

        typer.__name__ = name
        return intrinsic(typer)

    #: Two binary32 as two binary16, or two bfloat16, in 32 bits.
    f16_pair = _pair("f16_pair", "cvt.rn.f16x2.f32 $0, $2, $1;")
    bf16_pair = _pair("bf16_pair", "cvt.rn.bf16x2.f32 $0, $2, $1;")

    def _load_four(name: str, element: Any, code: str, constraint: str) -> Any:
        def typer(_context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                value = context.cast(builder, arguments[0], address, u64)
                kind = context.get_value_type(element)
                line = ir.InlineAsm(
                    ir.FunctionType(ir.LiteralStructType([kind] * 4), [value.type]),
                    code,
                    ",".join([f"={constraint}"] * 4 + ["l"]),
                )
                found = builder.call(line, [value])
                parts = [builder.extract_value(found, i) for i in range(4)]
                return context.make_tuple(builder, signature.return_type, parts)

            return types.UniTuple(element, 4)(address), generate

        typer.__name__ = name
        return intrinsic(typer)

    #: Sixteen bytes at an address that is a multiple of 16, as uint32 or binary32.
    load_u32x4 = _load_four("load_u32x4", u32, "ld.global.v4.u32 {$0, $1, $2, $3}, [$4];", "r")
    load_f32x4 = _load_four("load_f32x4", f32, "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", "f")

    @intrinsic
    def store_u32x4(_context, address, a, b, c, d):  # type: ignore[no-untyped-def]
        """Store sixteen bytes at an address that is a multiple of 16."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            to = context.cast(builder, arguments[0], address, u64)
            values = [
                context.cast(builder, x, t, u32)
                for x, t in zip(arguments[1:], (a, b, c, d), strict=True)
            ]
            kinds = [to.type, *(v.type for v in values)]
            line = ir.InlineAsm(
                ir.FunctionType(ir.VoidType(), kinds),
                "st.global.v4.u32 [$0], {$1, $2, $3, $4};",
                "l,r,r,r,r,~{memory}",
                side_effect=True,
            )
            builder.call(line, [to, *values])
            return context.get_dummy_value()

        return types.none(address, a, b, c, d), generate

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
