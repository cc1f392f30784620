"""Seconds of calibrating a large model's cache on a GPU, beside the matrix products it needs.

    python benchmarks/gpu_calibrate.py                       # layer groups, for the preset default
    python benchmarks/gpu_calibrate.py --bases separate --layer-groups 1 --rank 10000     # paper
    python benchmarks/gpu_calibrate.py --layer-groups 6 --second-level 16384 --rank 0

The geometry is Mistral-NeMo-12B's. Caches are drawn on the device, a document at a time, with what
real ones have: a spectrum that falls like a power law, shared between K and V and most by
neighbouring layers; tokens that resemble those before them (autoregressive, 0.95 to 0 from the
strongest directions on); noise of every channel; channels of different scale, in K some eight times
the others, with a mean; RoPE. Drawing them is not counted. Gradients, which teach weights and the
importance of tokens, are drawn too: noise with a scale of each channel and of each token, which
follows the strongest direction.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
from _common import environment, write_result
from rich.console import Console
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.calibration import moments as section_moments
from kvtc_stream.calibration import principal
from kvtc_stream.calibration import uniform_tables as uniform
from kvtc_stream.calibration.arrays import get_arrays
from kvtc_stream.calibration.calibrator import CHUNK, finite_rows
from kvtc_stream.calibration.moments import BATCH, SectionMoments
from kvtc_stream.coding.rope import Rotations
from kvtc_stream.gpu.arrays import DeviceArrays

#: Targets in seconds: in all, and of the plan.
SECONDS, PLAN_SECONDS = 60.0, 20.0
#: Token vectors that a calibrator samples, by default.
SAMPLE_ROWS = 4096


def main() -> None:
    args = parse()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    warnings.simplefilter("ignore", kvtc.KVTCWarning)  # small runs have few tokens
    machine = Machine(args.backend)
    geometry = kvtc.Geometry.uniform(
        layers=args.layers,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        rope=kvtc.Rope.from_theta(1e6, args.head_dim),
    )
    result: dict[str, Any] = environment()
    result["device"]["gpu"] = machine.describe()
    result["versions"]["cupy"] = getattr(machine.xp, "__version__", None)
    result["cache"] = vars(args) | {"output": str(args.output)}

    caches = Caches(geometry, machine, args.document_tokens)
    with machine.timed(result.setdefault("seconds", {}), "first_calls"):
        small = kvtc.Geometry.uniform(layers=2, kv_heads=2, head_dim=64)
        of_small = Caches(small, machine, 256)
        found = calibrate(of_small, args, 512, machine, {}, groups=1, second_level=0, rank=None)
        for preset, of in kvtc.PRESETS.items():
            if of.basis in args.bases:
                kvtc.Codec(found, preset, ratio=args.ratio).make_plan()
    machine.peaks.clear()

    seconds: dict[str, float] = {}
    calibration = calibrate(
        caches,
        args,
        args.tokens,
        machine,
        seconds,
        groups=args.layer_groups,
        second_level=args.second_level,
        rank=args.rank or None,
    )
    result["peak_device_bytes"] = machine.peaks
    codecs = {}
    for preset, of in kvtc.PRESETS.items():
        if of.basis in args.bases:
            with machine.timed(seconds, f"plan_{preset}"):
                codecs[preset] = kvtc.Codec(calibration, preset, ratio=args.ratio, window=0)
                codecs[preset].make_plan()
    seconds["plan"] = sum(s for name, s in seconds.items() if name.startswith("plan_"))
    counted = ("update", "update_gradients", "finish", "plan")
    seconds["total"] = sum(seconds.get(name, 0.0) for name in counted)
    with tempfile.TemporaryDirectory() as folder, machine.timed(seconds, "save"):
        path = Path(folder) / "calibration.safetensors"
        calibration.save(path)
        result["calibration_bytes"] = path.stat().st_size
    result["seconds"] |= seconds
    result["calibrated_tokens"] = calibration.tokens
    result["parts"] = {
        name: [len(parts), parts[0].rank, parts[0].width]
        for name, parts in calibration.sections[0].bases.items()
    }
    if not args.second_level:
        result["pieces_of_an_update"] = pieces(args, caches, machine)
        result["moments_error"] = moments_error(args, caches, machine)
    machine.free()
    if not args.second_level:
        result["ceilings"] = ceilings(result, calibration, machine)
        result["orthonormality"] = orthonormality(calibration, machine)
    if args.check_tokens:
        result["check"] = check(codecs, caches, args.check_tokens)
    show(result, console)
    write_result(args.output, result, console)


class Machine:
    """The device, its clock and its memory; or the CPU."""

    def __init__(self, backend: str) -> None:
        self.arrays = get_arrays(backend)  # type: ignore[arg-type]
        self.xp = self.arrays.xp
        self.cuda = self.arrays.name == "cuda"
        #: Bytes that CuPy's pool took from the device while documents were read, and after.
        self.peaks: list[int] = []
        #: For what only device arrays can do; with NumPy's on the CPU.
        self.device = self.arrays if isinstance(self.arrays, DeviceArrays) else DeviceArrays(np)

    def describe(self) -> dict[str, Any] | None:
        if not self.cuda:
            return None
        runtime = self.xp.cuda.runtime
        properties = runtime.getDeviceProperties(self.xp.cuda.Device().id)
        return {
            "name": properties["name"].decode(),
            "memory_bytes": int(properties["totalGlobalMem"]),
            "driver": runtime.driverGetVersion(),
            "runtime": runtime.runtimeGetVersion(),
        }

    @contextmanager
    def timed(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        """Add the time of a block, and of the work it starts, to ``seconds[name]``."""
        self.arrays.settle()
        start = time.perf_counter()
        yield
        self.arrays.settle()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def median(self, task: Callable[[], Any], repeats: int = 5) -> float:
        """Median seconds of a task, after one more."""
        times: list[float] = []
        for _ in range(repeats + 1):
            of_one: dict[str, float] = {}
            with self.timed(of_one, "task"):
                task()
            times.append(of_one["task"])
        return statistics.median(times[1:])

    def note_peak(self) -> None:
        """Note what CuPy's pool holds, in use or not, and give back what is not."""
        if self.cuda:
            self.peaks.append(int(self.xp.get_default_memory_pool().total_bytes()))
        self.free()

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            self.xp.get_default_memory_pool().free_all_blocks()


class Caches:
    """Documents of drawn caches, bfloat16 [layers, kv_heads, tokens, head_dim] on the device."""

    def __init__(self, geometry: kvtc.Geometry, machine: Machine, tokens: int) -> None:
        self.geometry, self.tokens = geometry, tokens
        self.machine, self._section = machine, geometry.sections[0]
        xp, s = machine.xp, self._section
        rng = xp.random.default_rng(1)
        layers, width = len(s.layers), s.k_width + s.v_width
        rank = min(2048, width // 2)
        # Each direction is spread around one layer of K and of V, the strongest over all of them.
        directions = rng.standard_normal((rank, 2, layers, width // 2 // layers), dtype=np.float32)
        order = xp.arange(rank, dtype=np.float32)
        centre = (order * 0.618034 % 1 * layers)[:, None]
        spread = (layers / (1 + order / 32)).clip(2, None)[:, None]
        near = xp.exp(-0.5 * xp.square((xp.arange(layers, dtype=np.float32) - centre) / spread))
        directions *= near[:, None, :, None]
        directions = directions.reshape(rank, width)
        directions *= ((1 + order / 4) ** -0.6)[:, None]
        scale = xp.exp(0.5 * rng.standard_normal(width, dtype=np.float32))
        outliers = (rng.random(width) < 0.02) & (xp.arange(width) < s.k_width)
        scale *= 1 + 7 * outliers.astype(np.float32)
        self._directions = directions * scale
        self._scale = scale
        self._mean = rng.standard_normal(width, dtype=np.float32) * scale * (1 + 3 * outliers)
        self._mean = self._mean.astype(np.float32)
        # Autoregressive from token to token, with a coefficient for each quarter of directions.
        distance = xp.arange(tokens)[:, None] - xp.arange(tokens)
        self._past = [
            xp.where(
                distance >= 0,
                c ** distance.clip(0, None).astype(np.float32)
                * xp.where(xp.arange(tokens) > 0, (1 - c * c) ** 0.5, 1.0),
                0.0,
            ).astype(np.float32)
            for c in (0.95, 0.8, 0.5, 0.0)
        ]

    def document(self, seed: int) -> tuple[Any, Any]:
        """K after RoPE, and V."""
        k, v = self._split(self._rows(seed)[0])
        positions = np.arange(self.tokens)
        rotations = Rotations.of(self._section, positions, inverse=False)
        self.machine.device.rotate(k, rotations)
        return self._narrow(k), self._narrow(v)

    def gradients(self, seed: int) -> tuple[Any, Any]:
        """Gradients of a loss with respect to K before RoPE, and V."""
        xp = self.machine.xp
        _, latent = self._rows(seed)
        rng = xp.random.default_rng(10_000 + seed)
        noise = rng.standard_normal((self.tokens, len(self._mean)), dtype=np.float32)
        of_token = xp.exp(latent[:, :1] + 0.5 * rng.standard_normal((self.tokens, 1)))
        noise *= (1e-5 * of_token).astype(np.float32)
        noise /= self._scale
        k, v = self._split(noise)
        return self._narrow(k), self._narrow(v)

    def _rows(self, seed: int) -> tuple[Any, Any]:
        xp = self.machine.xp
        rng = xp.random.default_rng(100 + seed)
        rank, width = self._directions.shape
        latent = rng.standard_normal((self.tokens, rank), dtype=np.float32)
        cuts = np.linspace(0, rank, 5).astype(int).tolist()
        for past, (first, last) in zip(self._past, pairwise(cuts), strict=True):
            latent[:, first:last] = past @ latent[:, first:last]
        rows = latent @ self._directions
        noise = rng.standard_normal((self.tokens, width), dtype=np.float32)
        noise *= 0.15 * self._scale
        rows += noise
        rows += self._mean
        return rows, latent

    def _split(self, rows: Any) -> tuple[Any, Any]:
        s = self._section
        halves = (rows[:, : s.k_width], s.k_dim), (rows[:, s.k_width :], s.v_dim)
        k, v = (
            self.machine.xp.ascontiguousarray(
                x.reshape(self.tokens, len(s.layers), s.kv_heads, dim).transpose(1, 2, 0, 3)
            )
            for x, dim in halves
        )
        return k, v

    def _narrow(self, x: Any) -> Any:
        """bfloat16, rounded to nearest even."""
        bits = x.view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (bits >> np.uint32(16)).astype(np.uint16).view(ml_dtypes.bfloat16)


def calibrate(
    caches: Caches,
    args: argparse.Namespace,
    tokens: int,
    machine: Machine,
    seconds: dict[str, float],
    *,
    groups: int,
    second_level: int,
    rank: int | None,
) -> kvtc.Calibration:
    """Calibrate on drawn documents; only what the calibrator does is counted."""
    calibrator = kvtc.Calibrator(
        caches.geometry,
        bases=args.bases,
        layer_groups=groups,
        second_level=second_level,
        rank=rank,
        backend="cuda" if machine.cuda else "cpu",
    )
    for seed in range(-(-tokens // caches.tokens)):
        k, v = caches.document(seed)
        with machine.timed(seconds, "update"):
            calibrator.update(k, v)
        if seed < args.gradient_documents:
            grads = caches.gradients(seed)
            with machine.timed(seconds, "update_gradients"):
                calibrator.update_gradients(k, v, *grads)
            del grads
        del k, v
    machine.note_peak()
    with ExitStack() as stack:
        for owner, function, name in (
            (section_moments, "one_level", "finish_joint_bases"),
            (section_moments, "two_levels", "finish_joint_bases"),
            (principal, "leading_eigenvectors", "finish_eigenvectors"),
            (section_moments, "separate", "finish_separate_bases"),
            (section_moments, "error_tables", "finish_band_tables"),
            (section_moments, "uniform_tables", "finish_uniform_tables"),
            (uniform, "fit_families", "finish_families"),
        ):
            stack.enter_context(
                mock.patch.object(
                    owner, function, timing(getattr(owner, function), machine, seconds, name)
                )
            )
        with machine.timed(seconds, "finish"):
            calibration = calibrator.finish()
    machine.note_peak()
    return calibration


def timing(
    function: Callable[..., Any], machine: Machine, seconds: dict[str, float], name: str
) -> Callable[..., Any]:
    """``function``, whose time is added to ``seconds[name]``."""

    def timed(*arguments: Any, **named: Any) -> Any:
        with machine.timed(seconds, name):
            return function(*arguments, **named)

    return timed


def token_vectors(caches: Caches, machine: Machine, seed: int) -> Iterator[Any]:
    """Rows of a document, in chunks, as ``update`` makes them."""
    s, arrays = caches.geometry.sections[0], machine.arrays
    k, v = caches.document(seed)
    layers = (
        arrays.layers(k, "k", len(s.layers), s.kv_heads, s.k_dim),
        arrays.layers(v, "v", len(s.layers), s.kv_heads, s.v_dim),
    )
    positions = np.arange(caches.tokens)
    for first in range(0, caches.tokens, CHUNK):
        own = slice(first, first + CHUNK)
        k, v = ([x[:, own] for x in of_layers] for of_layers in layers)
        yield arrays.rows(s, (k, v), positions[own], [None, None])


def pieces(args: argparse.Namespace, caches: Caches, machine: Machine) -> dict[str, float]:
    """Seconds of the pieces of ``update`` for one document, each waited for."""
    seconds: dict[str, float] = {}
    section, arrays, xp = caches.geometry.sections[0], machine.arrays, machine.xp
    moments = SectionMoments(section, args.bases, args.layer_groups, 0, SAMPLE_ROWS, arrays)
    rows = token_vectors(caches, machine, 10**6)
    pending = []
    while True:
        with machine.timed(seconds, "rows"):
            found = next(rows, None)
        if found is None:
            break
        with machine.timed(seconds, "finite"):
            [found] = finite_rows(arrays, found)
        with machine.timed(seconds, "hashes"):
            arrays.hashes(found)
        with machine.timed(seconds, "sample_with_hashes"):
            moments.sample.add(found)
        pending.append(found)
    for first in range(0, len(pending), BATCH // CHUNK):
        with machine.timed(seconds, "moments"):
            batch = xp.concatenate(pending[first : first + BATCH // CHUNK])
            for columns, of_part in moments.moments.items():
                of_part.add(columns.take(section, batch, xp))
    return seconds


def moments_error(args: argparse.Namespace, caches: Caches, machine: Machine) -> dict[str, Any]:
    """Error of the scatter of a document's rows in the first part, against float64.

    Relative to the standard deviations of row and column.
    """
    section, xp = caches.geometry.sections[0], machine.xp
    name = "joint" if "joint" in args.bases else "separate"
    columns = next(iter(section_moments.basis_columns(name, section, args.layer_groups)))
    taken = [columns.take(section, rows, xp) for rows in token_vectors(caches, machine, 10**6 + 1)]
    width = min(8192, taken[0].shape[1])
    taken = [x[:, :width] for x in taken]
    found = principal.Moments(width, machine.arrays)
    for first in range(0, len(taken), BATCH // CHUNK):
        found.add(xp.concatenate(taken[first : first + BATCH // CHUNK]))
    exact = xp.concatenate(taken).astype(np.float64)
    exact -= exact.mean(axis=0)
    expected = exact.T @ exact
    deviation = xp.sqrt(xp.diagonal(expected))
    difference = xp.abs(found.scatter - expected) / deviation / deviation[:, None]
    return {
        "columns": width,
        "tokens": len(exact),
        "greatest": float(difference.max()),
        "mean": float(difference.mean()),
    }


def ceilings(
    result: dict[str, Any], calibration: kvtc.Calibration, machine: Machine
) -> dict[str, Any]:
    """Seconds of the matrix products and decompositions that calibration cannot do without."""
    xp, found = machine.xp, {}
    rng = xp.random.default_rng(0)
    size = 2**28 if machine.cuda else 2**24
    x, y = (xp.ones(size, np.float32) for _ in range(2))
    found["copy_bytes_per_second"] = 8 * size / machine.median(lambda x=x, y=y: xp.copyto(y, x))
    del x, y
    batches = result["calibrated_tokens"] / BATCH
    moments = 0.0
    parts = calibration.sections[0].bases
    for part in parts["joint"] if "joint" in parts else parts["separate"]:
        name = f"moments_{BATCH}x{part.width}"
        if name + "_seconds" not in found:
            a = rng.standard_normal((BATCH, part.width), dtype=np.float32)
            seconds = machine.median(lambda a=a: a.T @ a, 3)
            found[name + "_seconds"] = seconds
            found[name + "_tflops"] = 2e-12 * BATCH * part.width**2 / seconds
            if part.width <= 8192:
                a = a.astype(np.float64)
                seconds = machine.median(lambda a=a: a.T @ a, 3)
                found[name + "_float64_tflops"] = 2e-12 * BATCH * part.width**2 / seconds
            del a
        moments += batches * found[name + "_seconds"]
    found["moments_seconds"] = moments
    part = next(iter(parts.values()))[0]
    wide = part.rank + principal.OVERSAMPLING
    if principal.in_full(part.width, part.rank):
        a = rng.standard_normal((part.width, part.width), dtype=np.float64)
        a += a.T
        found[f"eigh_float64_{part.width}_seconds"] = machine.median(lambda: xp.linalg.eigh(a), 1)
    else:
        a = rng.standard_normal((part.width, part.width), dtype=np.float32)
        b = rng.standard_normal((part.width, wide), dtype=np.float32)
        product = machine.median(lambda: a @ b, 2)
        found[f"product_{part.width}x{part.width}x{wide}_seconds"] = product
        for name, task in (
            ("householder", xp.linalg.qr),
            ("orthonormal", machine.device.orthonormal),
        ):
            seconds = machine.median(lambda task=task: task(b), 1)
            found[f"{name}_{part.width}x{wide}_seconds"] = seconds
        c = b[:wide] + b[:wide].T
        found[f"eigh_float32_{wide}_seconds"] = machine.median(lambda: xp.linalg.eigh(c), 1)
    return found


def orthonormality(calibration: kvtc.Calibration, machine: Machine) -> float:
    """The greatest entry of C Cᵀ - I of the first part's components, in binary16 as stored."""
    part = next(iter(calibration.sections[0].bases.values()))[0]
    c = machine.arrays.put(part.components.matrix()).astype(np.float32)
    return float(machine.xp.abs(c @ c.T - machine.xp.eye(len(c), dtype=np.float32)).max())


def check(codecs: dict[str, kvtc.Codec], caches: Caches, tokens: int) -> dict[str, Any]:
    """Ratio and errors of a document that calibration has not seen, coded on the CPU."""
    found = {}
    k, v = (
        np.array(caches.machine.arrays.get(x[:, :, :tokens].view(np.uint16))).view(
            ml_dtypes.bfloat16
        )
        for x in caches.document(10**6 + 2)
    )
    for preset, codec in codecs.items():
        data = kvtc.encode(k, v, codec=codec)
        decoded = kvtc.decode(data, codec.calibration)
        errors = [
            float(np.linalg.norm(x.astype(np.float32) - y) / np.linalg.norm(y))
            for x, y in zip(decoded, (k.astype(np.float32), v.astype(np.float32)), strict=True)
        ]
        found[preset] = {
            "tokens": tokens,
            "ratio_of_the_stream": (k.nbytes + v.nbytes) / len(data),
            "k_error": errors[0],
            "v_error": errors[1],
            "components": [p.components for p in codec.plan.sections[0].parts],
        }
    return found


def show(result: dict[str, Any], console: Console) -> None:
    table = Table("what", "value", title="Calibration")
    for group in ("seconds", "pieces_of_an_update", "ceilings", "moments_error"):
        table.add_section()
        for name, value in result.get(group, {}).items():
            table.add_row(f"{group} {name}", f"{value:.4g}")
    table.add_section()
    for name in ("calibrated_tokens", "parts", "peak_device_bytes", "orthonormality", "check"):
        table.add_row(name, str(result.get(name)))
    console.print(table)
    seconds = result["seconds"]
    for name, most in (("total", SECONDS), ("plan", PLAN_SECONDS)):
        console.print(f"{name}: {seconds[name]:.1f} s, target {most:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=163_840)
    parser.add_argument("--document-tokens", type=int, default=4096)
    parser.add_argument("--gradient-documents", type=int, default=4)
    parser.add_argument("--bases", nargs="+", choices=["joint", "separate"], default=["joint"])
    parser.add_argument("--layer-groups", type=int, default=10)
    parser.add_argument("--second-level", type=int, default=0)
    parser.add_argument("--rank", type=int, default=3072, help="0: as many as by default")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--check-tokens", type=int, default=512, help="0: no check")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(__file__).parent / "results" / "gpu_calibrate.json",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
