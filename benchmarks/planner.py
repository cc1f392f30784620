"""Time and memory of the planner: tables, then bit allocation at a ratio of 16.

Bands with parameters of their own (preset `paper`) and uniform bands (preset `default`).

    python benchmarks/planner.py [COEFFICIENTS.npz] [-o benchmarks/results/planner.json]

``COEFFICIENTS.npz`` holds ``coefficients``, float32 [rows, components] of real rows in a
calibrated basis. Their spectrum, stretched to the widths measured, shapes the rows that are
measured; without the file it is a power law. Rows are Laplace distributed, from a fixed seed.
Peak memory is what the step allocates, without the rows that it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvtc_stream.calibration.band_tables import error_tables
from kvtc_stream.calibration.families import fit_families
from kvtc_stream.calibration.parts import Part, SectionCalibration, UniformTables
from kvtc_stream.calibration.uniform_tables import STEPS, unit_of
from kvtc_stream.coding.rans import MIDDLE
from kvtc_stream.planning.dynamic import frontier
from kvtc_stream.planning.targets import make_plan

WIDTHS = (5_760, 40_960)
ROWS = 1024
RATIO = 16

T = TypeVar("T")


def spectrum(path: Path | None, width: int) -> tuple[npt.NDArray[np.float64], str]:
    """Mean square of each component, and where it is from."""
    if path is None:
        return 1e5 * np.arange(1, width + 1) ** -1.2, "power law, exponent -1.2"
    with np.load(path) as file:
        real = np.square(file["coefficients"], dtype=np.float64).mean(axis=0)
    place = np.linspace(0, real.size - 1, width)
    log = np.interp(place, np.arange(real.size), np.log(np.maximum(real, 1e-12)))
    return np.exp(log), f"{path.name}, {real.size} components stretched to {width}"


def measure(path: Path | None, width: int) -> dict[str, Any]:
    """One width; the compiled kernels are loaded before the clock starts."""
    variance, source = spectrum(path, width)
    rng = np.random.default_rng(0)
    rows = rng.laplace(size=(ROWS, width)).astype(np.float32)
    rows *= np.sqrt(variance / 2).astype(np.float32)
    common = {
        "components": width,
        "spectrum": source,
        "rows": ROWS,
        "bits_per_token": 16 * width // RATIO,
    }
    return {**common, "paper": _bands(rows), "default": _uniform(rows, variance)}


def _bands(rows: npt.NDArray[np.float32]) -> dict[str, Any]:
    width = rows.shape[1]
    frontier(error_tables(rows[:2, :20].copy()), 100).allocation(100)

    tables, tables_cost = _measured(lambda: error_tables(rows))
    bits = 16 * width // RATIO
    plans, allocation_cost = _measured(lambda: frontier(tables, bits))
    allocation = plans.allocation(bits)
    return {
        "tables": tables_cost,
        "allocation": allocation_cost,
        "bands": len(allocation.bands),
        "coded_components": sum(band.size for band in allocation.bands),
        "relative_error": round((allocation.error / float(tables.energy.sum())) ** 0.5, 4),
    }


def _uniform(rows: npt.NDArray[np.float32], variance: npt.NDArray[np.float64]) -> dict[str, Any]:
    """A joint basis that keeps all of its components; tokens have classes around the middle one."""
    width = rows.shape[1]
    # The planner looks at tables only: one row stands for the matrix of components.
    part = Part(
        (0,),
        (0,),
        np.zeros(width, np.float32),
        np.broadcast_to(np.float16(0), (width, width)),
        variance.astype(np.float32),
        float(variance.sum()),
    )
    classes = np.random.default_rng(0).normal(MIDDLE, 2, ROWS).round().clip(0, 15).astype(np.uint8)
    unit = unit_of([part])
    fit_families(rows[:20, :20].copy(), classes[:20], unit=unit, steps=STEPS)
    families, tables_cost = _measured(lambda: fit_families(rows, classes, unit=unit, steps=STEPS))
    errors = np.linspace(0, 1, STEPS, dtype=np.float32)
    part = replace(part, uniform=UniformTables(unit, families, errors, errors))
    section = SectionCalibration({"joint": (part,)}, ROWS)
    plan, allocation_cost = _measured(
        lambda: make_plan(
            SimpleNamespace(sections=(section,)),  # a digest would read the whole matrix
            "default",
            "joint",
            "ratio",
            RATIO,
            uniform=True,
        )
    )
    [band] = plan.sections[0].parts[0].bands
    return {
        "tables": tables_cost,
        "allocation": allocation_cost,
        "coded_components": band.size,
        "expected_bits": round(plan.sections[0].expected_bits),
    }


def _measured(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    tracemalloc.start()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, {
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_megabytes": round(peak / 1e6),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def main() -> None:
    """Measure every width and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("coefficients", type=Path, nargs="?")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/planner.json")
    )
    arguments = parser.parse_args()
    results = []
    for width in WIDTHS:
        results.append(measure(arguments.coefficients, width))
        print(json.dumps(results[-1], indent=2))
    report = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("kvtc-stream", "numba", "numpy")},
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
