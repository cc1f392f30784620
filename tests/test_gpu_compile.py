"""Every CUDA kernel becomes machine code that keeps its values in registers. Needs no GPU.

numba-cuda compiles; where numba-cuda-mlir is installed too, it does so as well, in a process of its
own (``KVTC_CUDA_COMPILER=numba-cuda-mlir``).
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from kvtc_stream.formats import DType
from kvtc_stream.gpu import kernels
from kvtc_stream.gpu.runtime import dialect


def _missing() -> str:
    """What compiling needs and is not installed."""
    if dialect.compiler() is None:
        return "numba-cuda"
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    missing = []
    for library in ("nvrtc", "nvvm", "nvJitLink"):
        try:
            load_nvidia_dynamic_lib(library)
        except DynamicLibNotFoundError:
            missing.append(library)
    return " and ".join(missing)


if missing := _missing():
    pytest.skip(f"{missing} not installed", allow_module_level=True)

#: Ampere, Hopper, Blackwell.
CAPABILITIES = [(8, 0), (9, 0), (10, 0)]


def _kernels() -> Iterator[tuple[str, Any]]:
    """Every kernel of the package, and those that its factories can make, by name."""
    from kvtc_stream.gpu.kernels import layout
    from kvtc_stream.gpu.runtime.compile import Kernel

    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        own = [value for value in vars(module).values() if isinstance(value, Kernel)]
        for i, kernel in enumerate([*own, *(_layout_kernels() if module is layout else [])]):
            if kernel.function.__module__ == module.__name__:
                yield f"{found.name}.{kernel.__name__}.{i}", kernel


def _layout_kernels() -> Iterator[Any]:
    """Every kernel that the functions of :mod:`kvtc_stream.gpu.kernels.layout` can make."""
    from kvtc_stream.gpu.kernels import layout

    for dtype in DType:
        for wide in {False, dtype in layout.WIDE}:
            yield layout.gather(dtype, wide)
            yield layout.scatter(dtype, wide)
            for out in DType:
                if not (wide and out.is_fp8):
                    yield layout.errors(dtype, out, wide)
    for size in (1, 2, 4):
        for back in (False, True):
            yield layout.move(size, back=back)


KERNELS = dict(_kernels())


def _assemble(ptx: str, capability: tuple[int, int]) -> str:
    """What the assembler says of registers, spills and stack."""
    from cuda.bindings import nvjitlink

    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose"]
    link = nvjitlink.create(len(options), options)
    try:
        code = ptx.encode()
        nvjitlink.add_data(link, nvjitlink.InputType.PTX, code, len(code), "kernel")
        nvjitlink.complete(link)
        log = bytearray(nvjitlink.get_info_log_size(link))
        nvjitlink.get_info_log(link, log)
        return log.decode()
    finally:
        nvjitlink.destroy(link)


@pytest.fixture
def _device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Functions that kernels call are compiled for the device there is: here, for this one."""
    if dialect.MLIR:
        from numba_cuda_mlir import tools

        monkeypatch.setattr(tools, "_cached_cc", capability)
        return
    from numba.cuda import dispatcher

    class Device:
        compute_capability = capability

    monkeypatch.setattr(dispatcher, "get_current_device", Device)


@pytest.mark.usefixtures("_device")
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_without_spills(name: str, capability: tuple[int, int]) -> None:
    log = _assemble(KERNELS[name].ptx(capability), capability)
    spilled = re.findall(r"(\d+) bytes spill", log)
    assert spilled
    # numba-cuda-mlir calls a function that numba-cuda puts in its place.
    assert max(map(int, spilled)) <= (32 if dialect.MLIR else 0), log
    # Functions of the mathematical library may have a stack.
    entry = re.search(r"Compiling entry function.*\n.*\n\D*(\d+) bytes stack", log)
    assert entry, log
    # numba-cuda-mlir keeps a few variables that branches assign there.
    assert int(entry[1]) <= (64 if dialect.MLIR else 0), log


@pytest.mark.skipif(find_spec("numba_cuda_mlir") is None, reason="numba-cuda-mlir not installed")
@pytest.mark.skipif(dialect.MLIR, reason="this is that process")
def test_the_successor_compiles_kernels_too() -> None:
    chosen = "test_kernel_compiles and sm_90 and not errors and not move"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__],
        env=os.environ | {"KVTC_CUDA_COMPILER": "numba-cuda-mlir"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_there_are_kernels() -> None:
    assert {name.split(".")[0] for name in KERNELS} >= {"rans", "uniform", "layout", "bands"}
