"""The one place that knows which Numba compiles the kernels: numba-cuda or numba-cuda-mlir.

numba-cuda gets security fixes only; numba-cuda-mlir is its successor. Kernels are the same for
both, but machine instructions that Python lacks are put into LLVM IR by the one and into MLIR by
the other. Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``), which runs kernels in Python, is
numba-cuda's alone.

The environment variable ``KVTC_CUDA_COMPILER`` (``numba-cuda`` or ``numba-cuda-mlir``) chooses;
otherwise the first of the two that is installed compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from numba import config

from kvtc_stream.io import environment

_PACKAGES = {"numba-cuda": "numba_cuda", "numba-cuda-mlir": "numba_cuda_mlir"}

SIMULATED = bool(config.ENABLE_CUDASIM)  # type: ignore[attr-defined]


def compiler() -> str | None:
    """The package that compiles kernels here: the one asked for, or the first that is installed."""
    asked = environment.cuda_compiler()
    names = _PACKAGES if asked is None else [asked]
    return next((name for name in names if environment.installed(_PACKAGES[name])), None)


MLIR = not SIMULATED and compiler() == "numba-cuda-mlir"

_NUMBA = "numba_cuda_mlir" if MLIR else "numba"
cuda: Any = import_module(f"{_NUMBA}.cuda")
types: Any = import_module(f"{_NUMBA}.types")

__all__ = ["MLIR", "SIMULATED", "compiler", "cuda", "instruction", "pointer_at", "types"]


def instruction(
    code: str, constraints: str, results: Sequence[Any], arguments: Sequence[Any]
) -> Callable[..., Any]:
    """A device function of one PTX instruction.

    Parameters
    ----------
    code
        PTX; ``$0``, ``$1``, … are its results, then its arguments.
    constraints
        Kinds of registers as LLVM writes them, ``"=h,f"`` for instance. One that clobbers memory
        (``~{memory}``) has side effects.
    results
        Numba types: none, one, or several of one type, which come back as a tuple.
    arguments
        Numba types that the arguments are converted to.
    """
    of_all = types.none
    if results:
        of_all = results[0] if len(results) == 1 else types.UniTuple(results[0], len(results))
    generate = _in_mlir if MLIR else _in_llvm
    return _intrinsic(
        len(arguments), of_all, generate(code, constraints, tuple(results), tuple(arguments))
    )


def pointer_at(pointer: Any) -> Callable[..., Any]:
    """A device function that makes a pointer of this type of an address."""
    return _intrinsic(1, pointer, _pointer_in_mlir if MLIR else _pointer_in_llvm)


def _intrinsic(count: int, result: Any, generate: Callable[..., Any]) -> Callable[..., Any]:
    """Numba asks a function of as many names as there are arguments for its types."""
    extending: Any = import_module(f"{_NUMBA}.extending" if MLIR else "numba.cuda.extending")

    def one(_context, a):  # type: ignore[no-untyped-def]
        return result(a), generate

    def two(_context, a, b):  # type: ignore[no-untyped-def]
        return result(a, b), generate

    def five(_context, a, b, c, d, e):  # type: ignore[no-untyped-def]
        return result(a, b, c, d, e), generate

    made: Callable[..., Any] = extending.intrinsic({1: one, 2: two, 5: five}[count])
    return made


def _in_llvm(
    code: str, constraints: str, results: tuple[Any, ...], kinds: tuple[Any, ...]
) -> Callable[..., Any]:
    from llvmlite import ir

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = [
            context.cast(builder, value, of, kind)
            for value, of, kind in zip(arguments, signature.args, kinds, strict=True)
        ]
        outs = [context.get_value_type(kind) for kind in results]
        out = ir.LiteralStructType(outs) if len(outs) > 1 else (outs or [ir.VoidType()])[0]
        line = ir.InlineAsm(
            ir.FunctionType(out, [v.type for v in values]),
            code,
            constraints,
            side_effect="~{memory}" in constraints,
        )
        found = builder.call(line, values)
        if not outs:
            return context.get_dummy_value()
        if len(outs) == 1:
            return found
        parts = [builder.extract_value(found, i) for i in range(len(outs))]
        return context.make_tuple(builder, signature.return_type, parts)

    return generate


def _pointer_in_llvm(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    value = context.cast(builder, arguments[0], signature.args[0], types.uint64)
    return builder.inttoptr(value, context.get_value_type(signature.return_type))


def _in_mlir(
    code: str, constraints: str, results: tuple[Any, ...], kinds: tuple[Any, ...]
) -> Callable[..., Any]:
    llvm: Any = import_module("numba_cuda_mlir._mlir.dialects.llvm")

    def generate(builder: Any, target: Any, arguments: Any, _keywords: Any) -> None:
        values = [
            builder.mlir_convert(builder.load_var(argument), builder.get_mlir_type(kind))
            for argument, kind in zip(arguments, kinds, strict=True)
        ]
        outs = [builder.get_mlir_type(kind) for kind in results]
        out = llvm.StructType.get_literal(outs) if len(outs) > 1 else (outs or [None])[0]
        found = llvm.inline_asm(
            out, values, code, constraints, has_side_effects="~{memory}" in constraints
        )
        if len(outs) > 1:
            parts = [llvm.extractvalue(kind, found, [i]) for i, kind in enumerate(outs)]
            builder.store_var(target, tuple(parts))
        else:
            builder.store_var(target, found if outs else None)

    return generate


def _pointer_in_mlir(builder: Any, target: Any, arguments: Any, _keywords: Any) -> None:
    llvm: Any = import_module("numba_cuda_mlir._mlir.dialects.llvm")
    value = builder.mlir_convert(
        builder.load_var(arguments[0]), builder.get_mlir_type(types.uint64)
    )
    builder.store_var(target, llvm.inttoptr(res=llvm.PointerType.get(), arg=value))
