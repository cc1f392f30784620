"""Matrix products of the decoder in e4m3 beside binary16: what 8 bits could gain.

    python benchmarks/products.py [-o benchmarks/results/products.json]

The shapes are those of Mistral-NeMo-12B with six groups of layers and a second level, at 64 times.
Binary16 is multiplied as the decoder does it; e4m3 by cuBLASLt, in the one layout that it has for
it on Hopper, with sums in binary32 and the quickest of its eight first algorithms.

e4m3 holds integers to 16 exactly, and other numbers to four bits. So what is multiplied must often
be in two terms, which makes products longer. ``LONGER`` is for a stream of SmolLM2-135M at 64
times: 7 % of the components have symbols beyond 16 in more than one of 10,000 tokens with the
middle step; 40 % of the first level's rows need a second term, lest rounding adds more than a
thousandth to the squared error; and one row of sixteen has a second term in the basis.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from functools import partial
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
from _common import write_result
from rich.console import Console

from gpu import device_result, seconds
from kvtc_stream.gpu.coder.products import R_16F, R_32F, synthesise, synthesise_leading

#: Columns, tokens at a time, and components.
SHAPES = {
    "second level": (20_480, 8192, 11_184),
    "first level": (14_336, 1152, 3424),
    "first level, all tokens": (14_336, 8192, 3424),
    "groups of two layers": (4096, 4096, 1024),
}
#: Of the two levels, how much longer products in two terms are.
LONGER = {"second level": 1.13, "first level": 1.46}
_E4M3, _COMPUTE_32F, _TRANSA, _WORKSPACE = 28, 68, 3, 64 << 20
#: cuBLASLt's attribute of a preference: bytes of workspace.
_MAX_WORKSPACE = 1
_ALGORITHMS = 8


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Products:
    """``out[n, m] = b[n, k] · a[m, k]ᵀ``, row-major, by cuBLASLt; e4m3 in and binary16 out."""

    def __init__(self, m: int, n: int, k: int) -> None:
        cp.matmul(*[cp.ones((8, 8), np.float16)] * 2)  # loads the library
        self._library = ctypes.CDLL("libcublasLt.so.13")
        self._handle = self._made("Create")
        self._operation = self._made("MatmulDescCreate", _COMPUTE_32F, R_32F)
        self._set("MatmulDescSetAttribute", self._operation, _TRANSA, ctypes.c_int(1))
        self._layouts = [
            self._made("MatrixLayoutCreate", kind, ctypes.c_uint64(rows), ctypes.c_uint64(columns),
                       ctypes.c_int64(rows))
            for kind, rows, columns in ((_E4M3, k, m), (_E4M3, k, n), (R_16F, m, n), (R_16F, m, n))
        ]  # fmt: skip
        preference = self._made("MatmulPreferenceCreate")
        size = ctypes.c_size_t(_WORKSPACE)
        self._set("MatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, size)
        self._found = (_Heuristic * _ALGORITHMS)()
        count = ctypes.c_int()
        self._call(
            "MatmulAlgoGetHeuristic", self._handle, self._operation, *self._layouts, preference,
            _ALGORITHMS, self._found, ctypes.byref(count),
        )  # fmt: skip
        self.algorithms = range(count.value)
        self._workspace = cp.empty(_WORKSPACE, np.uint8)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, "cublasLt" + name)(*arguments):
            raise RuntimeError(f"cublasLt{name} says {status}")

    def _made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        self._call(name, ctypes.byref(found), *arguments)
        return found

    def _set(self, name: str, target: ctypes.c_void_p, which: int, value: Any) -> None:
        self._call(name, target, which, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))

    def __call__(self, a: Any, b: Any, out: Any, algorithm: int = 0) -> None:
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        pointers = [ctypes.c_void_p(x.data.ptr) for x in (a, b, out, out)]
        of_a, of_b, of_c, of_d = zip(pointers, self._layouts, strict=True)
        self._call(
            "Matmul", self._handle, self._operation, ctypes.byref(one), *of_a, *of_b,
            ctypes.byref(zero), *of_c, *of_d, ctypes.byref(self._found[algorithm]),
            ctypes.c_void_p(self._workspace.data.ptr), ctypes.c_size_t(_WORKSPACE),
            ctypes.c_void_p(cp.cuda.get_current_stream().ptr),
        )  # fmt: skip


def measure(name: str, m: int, n: int, k: int) -> dict[str, Any]:
    """TFLOP/s, and the error of e4m3's sums: root mean square, relative to their own."""
    values = np.arange(256, dtype=np.uint8)
    values[(values & 0x78) > 0x50] = 0  # below 8, and no NaN
    rng = cp.random.default_rng(0)
    basis = cp.asarray(values)[rng.integers(0, 256, (m, k), dtype=np.int64)]
    # Integers to 8: their codes.
    small = cp.asarray([0, 0x38, 0x40, 0x44, 0x48, 0x4A, 0x4C, 0x4E, 0x50], np.uint8)
    symbols = small[rng.integers(0, 9, (n, k), dtype=np.int64)]
    symbols |= cp.where(rng.random((n, k)) < 0.5, 0x80, 0).astype(np.uint8)
    out = cp.empty((n, m), np.float16)
    products = Products(m, n, k)
    times = [seconds(partial(products, basis, symbols, out, i))[0] for i in products.algorithms]
    products(basis, symbols, out)
    exact = _values(symbols[:64]) @ _values(basis).T
    lost = float(cp.sqrt(cp.square(out[:64] - exact).mean() / cp.square(exact).mean()))
    flops = 2 * m * n * k / 1e12
    del basis, symbols, exact

    synthesis = cp.zeros((k, m), np.uint16)
    rows = cp.zeros((k, n), np.uint16)
    half = cp.empty((n, m), np.uint16)
    if name == "second level":  # as the decoder has it: components by tokens, in and out

        def multiply() -> None:
            synthesise_leading(rows.data.ptr, n, synthesis, slice(0, m), half.data.ptr)
    else:

        def multiply() -> None:
            synthesise(rows.data.ptr, n, synthesis, slice(0, m), n, half.data.ptr, m)

    rng16 = cp.random.default_rng(1)
    for x in (synthesis, rows):  # power depends on the numbers
        x[...] = rng16.standard_normal(x.shape, dtype=np.float32).astype(np.float16).view(np.uint16)
    return {
        "columns": m,
        "tokens": n,
        "components": k,
        "binary16_tflops": flops / seconds(multiply)[0],
        "e4m3_tflops": flops / min(times),
        "e4m3_rms_error": lost,
    }


def _values(codes: Any) -> Any:
    """Values of e4m3, float32, without its NaN."""
    sign = cp.where(codes & 0x80, -1.0, 1.0).astype(np.float32)
    exponent, fraction = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    normal = cp.ldexp(1 + fraction / 8, exponent.astype(np.int32) - 7)
    return sign * cp.where(exponent > 0, normal, fraction * np.float32(2.0**-9))


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("-o", "--output", type=Path, default=results / "products.json")
    args = parser.parse_args()
    console = Console(highlight=False)
    result = device_result() | {"longer": LONGER, "shapes": {}}
    for name, shape in SHAPES.items():
        result["shapes"][name] = found = measure(name, *shape)
        console.print(name, found)
        cp.get_default_memory_pool().free_all_blocks()
    [point] = [
        p
        for p in json.loads((results / "frontier.json").read_text())["points"]
        if p["basis"] == "6 groups, then 2,880"
    ]
    # Seconds for each token: all stages, less products in binary16, and those in e4m3.
    spent = point["stages_s"]["symbols"] + point["stages_s"]["synthesis and scatter"]
    per_token, fastest = spent / point["stage_tokens"], 0.0
    for name, groups in (("second level", 1), ("first level", 6)):
        of = result["shapes"][name]
        flops = 2 * of["columns"] * of["components"] * groups / 1e12
        per_token -= flops / of["binary16_tflops"]
        fastest += flops / of["e4m3_tflops"]
        result.setdefault("estimate_s", {})[name] = {
            "binary16": flops / of["binary16_tflops"],
            "e4m3": flops / of["e4m3_tflops"],
            "e4m3_in_terms": flops / of["e4m3_tflops"] * LONGER[name],
        }
    longer = sum(x["e4m3_in_terms"] for x in result["estimate_s"].values())
    size = 4 * 40 * 8 * 128  # bytes of a token's K and V
    result["decode_gbps"] = {
        "binary16": point["decode_gbps"],
        "e4m3, one term, not exact": size / (per_token + fastest) / 1e9,
        "e4m3 in terms": size / (per_token + longer) / 1e9,
    }
    console.print(result["decode_gbps"])
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
