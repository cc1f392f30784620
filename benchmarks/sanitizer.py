"""The tests of the CUDA backend under compute-sanitizer: kernels on valid and on damaged streams.

    python benchmarks/sanitizer.py [--tools memcheck racecheck …] [-k EXPRESSION] [-o FILE]

Every array is an allocation of its own there (no pool), so that an access one byte beyond an array
is seen. API calls that fail are not counted: libraries probe for functions that a driver lacks.
For ``initcheck``, copies to the host are not counted: they take gaps between payloads along. It
does not see what cuBLAS writes: before a product, what that must write is set to a NaN.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _common import environment, write_result
from rich.console import Console

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = Path(__file__).parents[1] / "tests" / "test_cuda.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("-k", default="", help="only tests whose names match, as pytest takes it")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a tool")
    parser.add_argument("--logs", type=Path, help="folder that keeps what the tools wrote")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parent / "results" / "sanitizer.json"
    )
    parser.add_argument("--tests-only", metavar="TOOL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tests_only:
        return _tests(args.tests_only, args.k)
    console = Console(highlight=False)
    result = environment()
    tools: dict[str, Any] = {}
    result["tools"] = tools
    for tool in args.tools:
        tools[tool] = found = _run(tool, args)
        console.print(tool, found)
        write_result(args.output, result, console)
    clean = all(found["errors"] == 0 and found["tests_passed"] for found in tools.values())
    return 0 if clean else 1


def _run(tool: str, args: argparse.Namespace) -> dict[str, Any]:
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no"]
    if tool == "initcheck":
        command += ["--check-api-memory-access", "no"]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, sys.executable, __file__, "--tests-only", tool, "-k", args.k],
            capture_output=True,
            text=True,
            timeout=args.timeout,
        )
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as stopped:
        output = "".join(x.decode() for x in (stopped.stdout, stopped.stderr) if x)
        status = -1
    if args.logs:
        (args.logs / f"{tool}.log").write_text(output, encoding="utf-8")
    passed = re.search(r"(\d+) passed", output)
    counts = [int(x) for x in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)]
    return {
        "tests": int(passed[1]) if passed else 0,
        "tests_passed": status == 0 and passed is not None,
        "errors": sum(counts) if counts else None,
        "seconds": time.perf_counter() - began,
    }


def _tests(tool: str, expression: str) -> int:
    import cupy
    import pytest

    from kvtc_stream.gpu.coder import products

    cupy.cuda.set_allocator(None)
    if tool == "initcheck":
        product = products.gemm

        def seen(*args: Any) -> None:
            *_, rows, columns, _, _, _, _, _, _, out, kind, stride = args
            dtype = {products.R_16F: cupy.float16, products.R_32F: cupy.float32}[kind]
            size = (columns - 1) * stride + rows
            memory = cupy.cuda.UnownedMemory(out, size * dtype().itemsize, None)
            written = cupy.ndarray(
                (columns, rows), dtype, cupy.cuda.MemoryPointer(memory, 0),
                strides=(stride * dtype().itemsize, dtype().itemsize),
            )  # fmt: skip
            written.fill(cupy.nan)
            product(*args)

        products.gemm = seen
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "gpu", "-k", expression]
    return int(pytest.main([*options, str(TESTS)]))


if __name__ == "__main__":
    sys.exit(main())
