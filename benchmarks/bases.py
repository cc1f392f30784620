"""What a basis is worth: bits at equal error, error at equal bits, and multiply-adds per token.

The rows are those of the preset `default`: K before RoPE and V of all layers, less the mean, times
the importance weights of a calibration. One basis for all is compared with one for K and one for V,
with one for each group of layers, and with two levels: one for each group of layers, and then
another one for the leading coefficients of all groups. All are principal components of the same
rows, with one step for all components, and tables fitted to rows that made the basis. Bits and
error are of other caches, where every token has the middle step class; bits are the tables' ideal
lengths, without a block's head. The error is the root of the weighted squared error over that of
leaving everything out.

    python benchmarks/bases.py --calibration CAL --cache FILES... --judge FILES...
    python benchmarks/bases.py --model PATH --text FILES...

Files are as `kvtc encode` takes them, of one section; mean and weights are those of CAL's joint
basis. With --model the first 70 % of each text calibrate, and from 80 % on it is judged.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import capture_caches, environment, load_cache, write_result
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.calibration.arrays import HOST
from kvtc_stream.calibration.components import Components, columns_of_layers
from kvtc_stream.calibration.families import STEPS_PER_OCTAVE, fit_families
from kvtc_stream.calibration.principal import Moments, leading_eigenvectors, one_level, two_levels
from kvtc_stream.calibration.weights import apply_blocks
from kvtc_stream.cli import terminal
from kvtc_stream.cli.bench import CALIBRATED_UNTIL, JUDGED_FROM
from kvtc_stream.coding.rans import MIDDLE, Families
from kvtc_stream.coding.rope import Rotations, gather
from kvtc_stream.coding.uniform import UniformBands
from kvtc_stream.coding.values import to_float32
from kvtc_stream.evaluation import demo, quality
from kvtc_stream.formats import Band, Quantiser, Section
from kvtc_stream.integrations.transformers import load_model
from kvtc_stream.planning.targets import LEFT_OUT

Rows = NDArray[np.float32]

#: Rows that tables are fitted to, and rows of each judged cache.
FITTED, JUDGED = 4096, 1024
#: Base steps; the coarsest is twice the strongest component's deviation.
STEPS = 48
#: Groups of layers, alone; and with a second level over so many coefficients of all.
RUNS = (2, 3, 6, 10, 15, 30)
TWO_LEVELS = ((3, 4320), (6, 4320), (6, 2880), (6, 1440), (10, 4320), (10, 2880), (10, 1440))


def bases(section: Section, covariance: Rows) -> Iterator[tuple[str, Components]]:
    """All that are compared; the first is what the others are compared with."""
    moments = Moments(0)
    moments.count, moments.mean, moments.scatter = 1, np.zeros(len(covariance)), covariance
    yield "one", _float32(one_level(moments, None, len(covariance), HOST)[0])
    everything, split = len(covariance), section.k_width
    yield "K and V apart", _one_level(moments, ((slice(0, split),), (slice(split, everything),)))
    for count in sorted({*RUNS, *(count for count, _ in TWO_LEVELS)}):
        if count > len(section.layers):
            continue
        runs = list(map(len, np.array_split(np.arange(len(section.layers)), count)))
        sizes = (section.kv_heads * dim for dim in (section.k_dim, section.v_dim))
        groups = columns_of_layers(runs, *sizes)
        if count in RUNS:
            yield f"{count} groups", _one_level(moments, groups)
        for leading in (leading for of, leading in TWO_LEVELS if of == count):
            found, _ = two_levels(moments, None, groups, leading, everything, HOST)
            yield f"{count} groups, then {leading:,}", _float32(found)


def _float32(components: Components) -> Components:
    return components.mapped(lambda x: x.astype(np.float32))


def _one_level(moments: Moments, groups: tuple[tuple[slice, ...], ...]) -> Components:
    """Each group by itself."""
    local = []
    for spans in groups:
        block = moments.covariance(np.float32, spans, spans)
        local.append(leading_eigenvectors(block, len(block))[1].T.astype(np.float32))
    order = np.arange(len(moments.mean), dtype=np.int32)
    nothing = np.zeros((0, 0), np.float32)
    return Components(groups, tuple(local), (0,) * len(groups), nothing, order)


# Rows.


class Source:
    """Weighted rows of caches."""

    def __init__(self, calibration: kvtc.Calibration) -> None:
        [self.section] = calibration.geometry.sections
        [self.part] = calibration.sections[0].basis("joint")
        self.sinks = calibration.sinks

    def rows(self, path: str) -> Rows:
        """[tokens, K and V], without sinks."""
        k, v = (to_float32(x[:, :, self.sinks :], None) for x in load_cache(path))
        tokens, part = k.shape[2], self.part
        rows = np.empty((tokens, part.width), np.float32)
        positions = np.arange(self.sinks, self.sinks + tokens)
        take_off = Rotations.of(self.section, positions, inverse=True)
        layers = np.arange(len(self.section.layers))
        gather(k, layers, take_off, rows)
        gather(v, layers, Rotations.none(len(layers)), rows[:, self.section.k_width :])
        rows -= part.mean
        if part.k_weights is not None and part.v_weights is not None:
            rows = apply_blocks(rows, (part.k_weights, part.v_weights))
        return rows


def spread(rows: Rows, count: int) -> Rows:
    """``count`` rows, evenly."""
    return rows[np.arange(min(count, len(rows))) * len(rows) // min(count, len(rows))]


# Measuring.


def measure(name: str, basis: Components, fitted: Rows, judged: Rows) -> list[dict[str, float]]:
    """Bits, error, and work at every step of interest."""
    own = basis.project(fitted)
    order = np.argsort(-np.square(own).mean(axis=0), kind="stable")
    own = np.ascontiguousarray(own[:, order])
    coefficients = basis.project(judged)[:, order]
    energy = float(np.square(judged, dtype=np.float64).sum())
    behind = energy - float(np.square(coefficients, dtype=np.float64).sum())
    if behind < -1e-4 * energy:
        raise AssertionError(f"{name} is not orthonormal: {behind / energy:.2e} too much")

    unit = 2 * float(own[:, 0].std()) / 2 ** ((STEPS - 1 + MIDDLE) / STEPS_PER_OCTAVE)
    classes = np.full(len(own), MIDDLE, np.uint8)
    tables = fit_families(own, classes, unit=unit, steps=STEPS)
    coder = Families(tables.frequencies)
    lost, spent = (np.gradient(x.sum(axis=1)) for x in (tables.distortion, tables.rate))
    price = np.divide(-lost, spent, out=np.zeros(STEPS), where=spent < 0).clip(0)
    classes = np.full(len(judged), MIDDLE, np.uint8)
    points = []
    for j in range(STEPS):
        saved = LEFT_OUT * tables.energy - tables.distortion[j] - price[j] * tables.rate[j]
        count = int(np.cumsum(saved).argmax()) + 1
        if not 4 < 16 * judged.shape[1] / tables.rate[j, :count].sum() < 100:
            continue
        bands = UniformBands((Band(count, Quantiser.UNIFORM, j),), coder, tables.ids)
        step = unit * 2 ** ((j + MIDDLE) / STEPS_PER_OCTAVE)
        kept = coefficients[:, :count]
        lost = np.square(kept - np.rint(kept / step) * step, dtype=np.float64).sum()
        lost += np.square(coefficients[:, count:], dtype=np.float64).sum()
        coded = basis.taken(order[:count])
        points.append(
            {
                "bits": bands.bits(coefficients, classes, unit, 0) / len(judged),
                "error": math.sqrt((lost + max(behind, 0)) / energy),
                "components": count,
                "of_second_level": 0 if coded.second is None else len(coded.second),
                "multiply_adds": sum(m.size for m in (*coded.local, coded.second) if m is not None),
            }
        )
    return points


def at(points: list[dict[str, float]], name: str, value: float) -> dict[str, float] | None:
    """The point where ``name`` has a value, between logarithms; ``None`` outside of all points."""
    curve = sorted(points, key=lambda point: point[name])
    if not curve[0][name] <= value <= curve[-1][name]:
        return None
    logs = [math.log(point[name]) for point in curve]
    return {
        other: float(
            np.expm1(np.interp(math.log(value), logs, [math.log1p(p[other]) for p in curve]))
        )
        for other in curve[0]
    }


def compare(
    measured: dict[str, list[dict[str, float]]], width: int, ratios: Sequence[float]
) -> list[dict[str, Any]]:
    """A row per ratio and basis: beside the first basis, whose ratio it is."""
    rows = []
    reference = next(iter(measured.values()))
    for ratio in ratios:
        bits = 16 * width / ratio
        if (expected := at(reference, "bits", bits)) is None:
            raise ValueError(f"no step of the first basis comes near a ratio of {ratio:g}")
        for name, points in measured.items():
            same_bits = at(points, "bits", bits)
            row: dict[str, Any] = {"ratio": ratio, "basis": name, "bits": bits}
            row["error"] = same_bits and same_bits["error"]
            if (same := at(points, "error", expected["error"])) is not None:
                row |= {
                    "bits_at_equal_error": same["bits"],
                    "ratio_at_equal_error": 16 * width / same["bits"],
                    "components": round(same["components"]),
                    "of_second_level": round(same["of_second_level"]),
                    "multiply_adds": round(same["multiply_adds"]),
                }
            rows.append(row)
    return rows


def main() -> None:
    args = _parse()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    result: dict[str, Any] = environment()
    steps = demo.Steps(terminal.step)
    with tempfile.TemporaryDirectory() as name:
        if args.model:
            args.calibration, args.cache, args.judge = _capture(args, Path(name), steps)
        calibration = kvtc.Calibration.load(args.calibration)
        source = Source(calibration)
        with steps.step(f"Reading {len(args.cache)} caches") as advance:
            covariance, fitted, tokens = np.zeros((source.part.width,) * 2, np.float32), [], 0
            for i, path in enumerate(args.cache):
                rows = source.rows(path)
                covariance += rows.T @ rows
                tokens += len(rows)
                fitted.append(spread(rows, -(-FITTED // len(args.cache))))
                advance(i + 1, len(args.cache))
            covariance /= tokens
        judged = np.concatenate([spread(source.rows(path), JUDGED) for path in args.judge])
    measured = {}
    fitted_rows = np.concatenate(fitted)
    shapes = {}
    for name, basis in bases(source.section, covariance):
        shapes[name] = {"groups": len(basis.groups), "leading": sum(basis.leading)}
        with steps.step(f"Measuring: {name}"):
            measured[name] = measure(name, basis, fitted_rows, judged)
    result |= {
        "calibration": calibration.digest.hex(),
        "tokens": tokens,
        "fitted_rows": len(fitted_rows),
        "judged_rows": len(judged),
        "width": source.part.width,
        "bases": shapes,
        "rows": compare(measured, source.part.width, args.ratios),
        "points": measured,
    }
    _show(result, console)
    write_result(args.output, result, console)


# Inputs and results.


def _capture(
    args: argparse.Namespace, folder: Path, steps: demo.Steps
) -> tuple[str, list[str], list[str]]:
    """Run a model over texts: a calibration, caches that make bases, and caches to judge."""
    from kvtc_stream.integrations.transformers import calibrate

    with steps.step("Loading the model"):
        model, tokenizer = load_model(args.model, dtype="float32")
    texts = [Path(name).read_text(encoding="utf-8") for name in args.text]
    documents = quality.calibration_documents(
        tokenizer, [text[: int(len(text) * CALIBRATED_UNTIL)] for text in texts], args.tokens
    )
    judged = [
        quality.token_ids(tokenizer, text[int(len(text) * JUDGED_FROM) :])[: args.context]
        for text in texts
    ]
    path, total = str(folder / "calibration.safetensors"), sum(map(len, documents))
    with steps.step(f"Calibrating on {total:,} tokens") as advance:
        calibrate(model, documents, tokens=total, bases=("joint",), progress=advance).save(path)
    with steps.step("Capturing caches") as advance:
        caches = capture_caches(model, documents, folder, "learnt", advance)
        return path, caches, capture_caches(model, judged, folder, "judged")


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = (
        "ratio",
        "basis",
        "error",
        "bits at equal error",
        "ratio",
        "components",
        "M mult-adds",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "basis" else "right")
    for row in result["rows"]:
        cells = ["", "not reached", "", "", ""]
        if row["error"] is not None:
            cells[0] = f"{row['error']:.4f}"
        if "multiply_adds" in row:
            cells[1:] = [
                f"{row['bits_at_equal_error']:,.0f}",
                f"{row['ratio_at_equal_error']:.1f}",
                f"{row['components']:,}",
                f"{row['multiply_adds'] / 1e6:.1f}",
            ]
        table.add_row(f"{row['ratio']:g}", row["basis"], *cells)
    console.print("", table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    files = parser.add_argument_group("caches in files")
    files.add_argument("--calibration", metavar="FILE", help="of the caches' model")
    files.add_argument("--cache", nargs="+", metavar="FILE", help=".safetensors or .npz")
    files.add_argument("--judge", nargs="+", metavar="FILE", help="other caches")
    model = parser.add_argument_group("or caches of a model")
    model.add_argument("--model", metavar="PATH", help="folder or .gguf")
    model.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 texts for it to read")
    model.add_argument("--tokens", type=int, default=61_440, help="to read")
    model.add_argument("--context", type=int, default=3584, help="tokens of each judged cache")
    parser.add_argument(
        "--ratios", nargs="+", type=float, default=[16.0, 32.0, 64.0], help="of the first basis"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "bases.json"
    )
    args = parser.parse_args()
    if bool(args.model and args.text) == bool(args.calibration and args.cache and args.judge):
        parser.error("give --calibration, --cache and --judge, or --model and --text")
    return args


if __name__ == "__main__":
    main()
