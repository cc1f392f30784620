"""Time and memory of calibration, encoding and decoding, on real caches and a few CPU cores.

Encoding and decoding are compared with the matrix products they cannot do without, in the same
process, alternating with them: what the rest of the codec costs is the quotient. Every measurement
has a process of its own.

    python benchmarks/speed.py --calibration CAL --cache FILES...
    python benchmarks/speed.py --model PATH --text FILES...

Files are as `kvtc encode` takes them. The first is encoded and decoded; all of them calibrate.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _common import capture_caches, environment, load_cache, write_result
from rich.console import Console
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.calibration import moments
from kvtc_stream.cli import terminal
from kvtc_stream.evaluation import demo, quality
from kvtc_stream.integrations.transformers import load_model

MEASUREMENTS = ("codec", "memory", "calibration")
#: Targets: time over that of the products; bytes; seconds.
SLOWDOWN = {
    "paper": {"encode": 1.5, "decode": 1.5},
    "default": {"encode": 1.6, "decode": 1.6},
}
EXTRA_BYTES, CALIBRATION_SECONDS = 200e6, 180.0
#: Documents that gradients are learnt from, see kvtc_stream.integrations.transformers.calibrate.
_IMPORTANCE_DOCUMENTS = 24


def main() -> None:
    args = _parse()
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)  # processes that start from here on inherit it
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    result: dict[str, Any] = environment()
    steps = demo.Steps(terminal.step)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.model:
            args.calibration, args.cache = _capture(args, folder, steps)
        result["inputs"] = {
            "calibration": kvtc.Calibration.load(args.calibration).digest.hex(),
            "caches": len(args.cache),
        }
        for measurement in args.only:
            with steps.step(f"Measuring: {measurement}"):
                result[measurement] = globals()[f"measure_{measurement}"](args, folder)
    _show(result, console)
    write_result(args.output, result, console)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of this module in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


# Encoding and decoding beside their matrix products.


def measure_codec(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Times of encoding, decoding, planning, and of the matrix products alone, by preset."""
    return {
        preset: apart(_codec, args.calibration, args.cache[0], preset, args.ratio, args.repeats)
        for preset in args.presets
    }


def _codec(
    calibration_path: str, cache_path: str, preset: str, ratio: float, repeats: int
) -> dict[str, Any]:
    from threadpoolctl import threadpool_info

    k, v = load_cache(cache_path)
    kvtc.Codec(kvtc.testing.tiny_calibration(), preset, ratio=4)  # compiles the kernels
    calibration = kvtc.Calibration.load(calibration_path)
    start = time.perf_counter()
    codec = kvtc.Codec(calibration, preset, ratio=ratio, window=0)
    planning = time.perf_counter() - start
    data = kvtc.encode(k, v, codec=codec)
    project, reconstruct, shapes = _products(codec, k.shape[2])
    tasks: dict[str, Callable[[], Any]] = {
        "encode": lambda: kvtc.encode(k, v, codec=codec),
        "encode_products": lambda: (project(), reconstruct()),
        "decode": lambda: kvtc.decode(data, calibration),
        "decode_products": reconstruct,
    }
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
    seconds = {
        name: {"best": min(series[1:]), "median": statistics.median(series[1:])}
        for name, series in times.items()
    }
    return {
        "tokens": k.shape[2],
        "dtype": str(k.dtype),
        "cache_bytes": k.nbytes + v.nbytes,
        "stream_bytes": len(data),
        "ratio": ratio,
        "measure": codec.measure,
        "block_tokens": codec.block_tokens,
        "products": shapes,
        "products_counted": {
            "encode": "projection and reconstruction of every block of every part",
            "decode": "reconstruction of every block of every part",
        },
        "repeats": repeats,
        "seconds": seconds,
        "planning_seconds": planning,
        # Of neighbours: what else the machine does slows both.
        "median_of_ratios": {
            name: statistics.median(np.divide(times[name], times[f"{name}_products"])[1:].tolist())
            for name in ("encode", "decode")
        },
        "encode_over_products": seconds["encode"]["best"] / seconds["encode_products"]["best"],
        "decode_over_products": seconds["decode"]["best"] / seconds["decode_products"]["best"],
        "blas_threads": [pool["num_threads"] for pool in threadpool_info()],
    }


def _products(
    codec: kvtc.Codec, tokens: int
) -> tuple[Callable[[], None], Callable[[], None], list[list[int]]]:
    """Projection and reconstruction of as many blocks as the codec multiplies, and their shapes."""
    rng = np.random.default_rng(0)
    size = codec.block_tokens
    blocks = -(-(tokens - codec.sinks) // size)
    operands = []
    for section, plan in enumerate(codec.plan.sections):
        for i, part in enumerate(plan.parts):
            count = part.components
            basis = codec.calibration.transforms(section, plan.basis, i, count).analysis.first(
                count
            )
            rows = rng.standard_normal((size, basis.width), np.float32)
            operands.append((rows, basis, rng.standard_normal((size, count), np.float32)))
    # Into memory that is there already, like the codec's.
    outputs = [(np.empty_like(c), np.empty_like(rows)) for rows, _, c in operands]

    def project() -> None:
        for _ in range(blocks):
            for (rows, basis, _), (out, _) in zip(operands, outputs, strict=True):
                basis.project(rows, out)

    def reconstruct() -> None:
        for _ in range(blocks):
            for (_, basis, coefficients), (_, out) in zip(operands, outputs, strict=True):
                basis.expand(coefficients, [slice(0, basis.width)], [out])

    shapes = [[blocks, size, basis.width, basis.rank] for _, basis, _ in operands]
    return project, reconstruct, shapes


# Memory.


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak memory beyond input, basis and code, for a cache and for one several times as long."""
    runs = []
    for preset, times in itertools.product(args.presets, (1, args.longer)):
        stream = str(folder / f"{preset}-{times}.kvtc")
        common = (args.calibration, stream)
        tokens, encode = apart(_encode_memory, *common, args.cache[0], preset, args.ratio, times)
        run = {"preset": preset, "tokens": tokens, "encode_bytes": encode}
        runs.append(run | {"decode_bytes": apart(_decode_memory, *common)})
    return {
        "ratio": args.ratio,
        "counted": "peak resident memory of a run less that before it, when cache (encode), "
        "calibration, basis in binary32 and compiled code are in memory; streams are files",
        "runs": runs,
    }


def _encode_memory(
    calibration_path: str, stream: str, cache_path: str, preset: str, ratio: float, times: int
) -> tuple[int, int]:
    k, v = load_cache(cache_path)
    codec = kvtc.Codec(kvtc.Calibration.load(calibration_path), preset, ratio=ratio)

    # Keys that come again carry the RoPE of their first positions; memory does not mind.
    warnings.filterwarnings("ignore", "section .* the mean error", kvtc.KVTCWarning)

    def encode(path: str, tokens: int, times: int) -> None:
        with kvtc.open(path, "wb", codec=codec) as writer:
            for _ in range(times):
                writer.write(k[:, :, :tokens], v[:, :, :tokens])

    with tempfile.NamedTemporaryFile() as short:
        encode(short.name, 8 * codec.block_tokens, 1)
    return k.shape[2] * times, _extra_memory(lambda: encode(stream, k.shape[2], times))


def _decode_memory(calibration_path: str, stream: str) -> int:
    calibration = kvtc.Calibration.load(calibration_path)

    def decode(blocks: int | None) -> None:
        with kvtc.open(stream, calibration=calibration) as reader:
            for _ in itertools.islice(reader, blocks):
                pass

    decode(3)
    return _extra_memory(lambda: decode(None))


def _extra_memory(task: Callable[[], None]) -> int:
    """Bytes by which the resident memory rises at most during a task (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up left over would hide a need
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status("VmRSS")
    task()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# Calibration.


def measure_calibration(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Times of a calibration on all caches, without the model's and without reading files.

    For one preset's basis at a time. The halves of some documents stand in for gradients too:
    what these are does not change the work.
    """
    return {
        preset: apart(_calibration, args.calibration, args.cache, kvtc.PRESETS[preset].basis)
        for preset in args.presets
    }


def _calibration(calibration_path: str, cache_paths: list[str], basis: str) -> dict[str, Any]:
    kvtc.testing.tiny_calibration()  # compiles the kernels
    geometry = kvtc.Calibration.load(calibration_path).geometry
    learning = kvtc.Calibrator(geometry, bases=(basis,))
    seconds = {"moments": 0.0, "gradients": 0.0, "bases": 0.0, "tables": 0.0}

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            made = function(*arguments, **options)
            seconds[what] += time.perf_counter() - start
            return made

        return call

    for i, path in enumerate(cache_paths):
        k, v = load_cache(path)
        timed("moments", learning.update)(k, v)
        if basis == "joint" and i < _IMPORTANCE_DOCUMENTS:
            halves = [x[:, :, : k.shape[2] // 2].astype(np.float32) for x in (k, v)]
            timed("gradients", learning.update_gradients)(*halves, *halves)
    with (
        mock.patch.object(moments, "error_tables", timed("tables", moments.error_tables)),
        mock.patch.object(moments, "uniform_tables", timed("tables", moments.uniform_tables)),
    ):
        calibration = timed("bases", learning.finish)()
    seconds["bases"] -= seconds["tables"]
    return {
        "tokens": calibration.tokens,
        "widths": [[s.k_width, s.v_width] for s in geometry.sections],
        "basis": basis,
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


# Inputs and results.


def _capture(args: argparse.Namespace, folder: Path, steps: demo.Steps) -> tuple[str, list[str]]:
    """Run a model over texts: a calibration, and caches in bfloat16 in files."""
    from kvtc_stream.integrations.transformers import calibrate

    with steps.step("Loading the model"):
        model, tokenizer = load_model(args.model, dtype="float32")
    documents = [
        document
        for name in args.text
        for document in quality.spread_documents(
            quality.token_ids(tokenizer, Path(name).read_text(encoding="utf-8")),
            args.tokens // len(args.text),
            quality.DOCUMENT_TOKENS,
        )
    ]
    calibration = folder / "calibration.safetensors"
    total = sum(map(len, documents))
    with steps.step(f"Calibrating on {total:,} tokens") as advance:
        calibrate(model, documents, tokens=total, progress=advance).save(calibration)
    with steps.step("Capturing caches") as advance:
        return str(calibration), capture_caches(model, documents, folder, "cache", advance)


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("what", "measured", "of it", "target"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for preset, codec in result.get("codec", {}).items():
        for what in ("encode", "decode"):
            seconds, products = (codec["seconds"][n]["best"] for n in (what, f"{what}_products"))
            table.add_row(
                f"{preset}: {what} {codec['tokens']:,} tokens",
                f"{seconds:.3f} s",
                f"products {products:.3f} s: {codec[f'{what}_over_products']:.2f}×",
                f"≤ {SLOWDOWN[preset][what]:g}×",
            )
        table.add_row(f"{preset}: plan", f"{codec['planning_seconds']:.1f} s")
    for run in result.get("memory", {}).get("runs", ()):
        for what in ("encode", "decode"):
            table.add_row(
                f"{run['preset']}: memory to {what} {run['tokens']:,} tokens",
                f"{run[f'{what}_bytes'] / 1e6:.0f} MB",
                "",
                f"< {EXTRA_BYTES / 1e6:.0f} MB",
            )
    for preset, calibration in result.get("calibration", {}).items():
        seconds = dict(calibration["seconds"])
        total = seconds.pop("total")
        table.add_row(
            f"{preset}: calibrate on {calibration['tokens']:,} tokens",
            f"{total:.1f} s",
            ", ".join(f"{name} {took:.1f}" for name, took in seconds.items() if took),
            f"< {CALIBRATION_SECONDS:g} s",
        )
    console.print("", table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    files = parser.add_argument_group("caches in files")
    files.add_argument("--calibration", metavar="FILE", help="of the caches' model")
    files.add_argument("--cache", nargs="+", metavar="FILE", help=".safetensors or .npz")
    model = parser.add_argument_group("or caches of a model")
    model.add_argument("--model", metavar="PATH", help="folder or .gguf")
    model.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 texts for it to read")
    model.add_argument("--tokens", type=int, default=61_440, help="to read")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument(
        "--presets", nargs="+", choices=list(kvtc.PRESETS), default=["paper", "default"]
    )
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--longer", type=int, default=4, help="length of the long cache, in caches")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores to use")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "speed.json"
    )
    args = parser.parse_args()
    if bool(args.model and args.text) == bool(args.calibration and args.cache):
        parser.error("give --calibration and --cache, or --model and --text")
    return args


if __name__ == "__main__":
    main()
