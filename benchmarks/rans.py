"""Speed and size of the rANS coder on one core, beside the byte coders on the same symbols.

    python benchmarks/rans.py [-o benchmarks/results/rans.json]

A tile has Laplace distributed coefficients, from a fixed seed, rounded to integers. Deviations
fall along the components like the spectrum of a cache, so that entropies fall from 4 bits to 0.02,
and change with the class of the token. The families are Laplace distributions too. The byte coders
get the symbols as bytes, component by component, without the classes. Calls alternate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import environment, write_result
from rich.console import Console
from rich.table import Table

from kvtc_stream.coding import rans
from kvtc_stream.formats import Coder, compress, decompress

TOKENS, COMPONENTS, FAMILIES = 128, 4000, 64
#: Symbols a second.
TARGETS = {"encode": 50e6, "decode": 100e6}

Float = npt.NDArray[np.float64]


def probabilities(deviations: Float) -> Float:
    """[deviations, 256]: Laplace distributions rounded to -127…127, and an escape."""
    edges = np.arange(0.5, 128)
    beyond = np.exp(-edges * np.sqrt(2) / deviations[:, None]) / 2
    half = -np.diff(beyond, axis=1)
    return np.hstack([half[:, ::-1], 1 - 2 * beyond[:, :1], half, 2 * beyond[:, -1:]])


def families(deviations: Float) -> rans.Families:
    """Frequencies nearest to the probabilities; 0 takes the rest."""
    frequencies = np.rint(probabilities(deviations) * rans.TOTAL).astype(int)
    frequencies[:, rans.ESCAPE] += frequencies[:, rans.ESCAPE] == 0
    frequencies[:, rans.ZERO] += rans.TOTAL - frequencies.sum(axis=1)
    return rans.Families(frequencies.astype(np.uint16))


def draw_tile() -> tuple[Any, ...]:
    """Symbols, classes, ids and families; and the entropy of each component."""
    rng = np.random.default_rng(0)
    classes = rng.binomial(15, 0.5, TOKENS).astype(np.uint8)
    spectrum = 4.2 * (1 + np.arange(COMPONENTS) / 480) ** -1.6
    deviations = np.geomspace(0.7, 1.4, 16)[:, None] * spectrum
    symbols = np.rint(rng.laplace(scale=deviations[classes] / np.sqrt(2))).astype(np.int32)
    ladder = np.geomspace(deviations.min(), deviations.max(), FAMILIES)
    step = np.log(ladder[1] / ladder[0])
    ids = np.rint(np.log(deviations / ladder[0]) / step).astype(np.uint8)
    p = probabilities(spectrum)
    entropies = -(p * np.log2(np.where(p > 0, p, 1))).sum(axis=1)
    return symbols, classes, ids, families(ladder), entropies


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/rans.json"))
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    console = Console(highlight=False)

    symbols, classes, ids, tables, entropies = draw_tile()
    data = rans.encode(symbols, classes, ids, tables)
    assert np.array_equal(rans.decode(data, classes, ids, tables), symbols)
    out = np.empty_like(symbols)
    sizes = {"rans": len(data)}
    tasks: dict[str, dict[str, Callable[[], Any]]] = {
        "rans": {
            "encode": lambda: rans.encode(symbols, classes, ids, tables),
            "decode": lambda: rans.decode(data, classes, ids, tables, out),
        }
    }
    raw = symbols.T.astype(np.int8).tobytes()
    for coder in (Coder.DEFLATE, Coder.ZSTD):
        name, coded = coder.name.lower(), compress(coder, raw)[1]
        sizes[name] = len(coded)
        tasks[name] = {
            "encode": lambda coder=coder: compress(coder, raw),
            "decode": lambda coder=coder, coded=coded: decompress(coder, coded, len(raw)),
        }
    times: dict[str, dict[str, list[float]]] = {
        name: {"encode": [], "decode": []} for name in tasks
    }
    for _ in range(args.repeats):
        for name, directions in tasks.items():
            for direction, task in directions.items():
                start = time.perf_counter()
                task()
                times[name][direction].append(time.perf_counter() - start)

    columns = np.where(abs(symbols) > rans.ZERO, rans.ESCAPE, symbols + rans.ZERO)
    ideal = tables.bits[ids[classes], columns].sum(dtype=np.float64)
    ideal += 32 * np.count_nonzero(abs(symbols) > 0x7FFF)
    result = environment() | {
        "tokens": TOKENS,
        "components": COMPONENTS,
        "entropy_bits": {
            "first": round(entropies[0], 4),
            "last": round(entropies[-1], 4),
            "mean": round(entropies.mean(), 4),
        },
        "ideal_bits_per_symbol": round(ideal / symbols.size, 4),
        "targets": {f"{name}_symbols_per_second": target for name, target in TARGETS.items()},
        "coders": {
            name: {
                "bytes": sizes[name],
                "size_over_ideal": round(8 * sizes[name] / ideal, 5),
                "symbols_per_second": {
                    direction: {
                        "best": round(symbols.size / min(series)),
                        "median": round(symbols.size / statistics.median(series)),
                    }
                    for direction, series in directions.items()
                },
            }
            for name, directions in times.items()
        },
    }
    table = Table("coder", "size / ideal", "encode, M symbols/s", "decode, M symbols/s")
    for name, row in result["coders"].items():
        speed = row["symbols_per_second"]
        cells = (
            f"{speed[d]['median'] / 1e6:.0f} (best {speed[d]['best'] / 1e6:.0f})" for d in speed
        )
        table.add_row(name, f"{row['size_over_ideal']:.4f}", *cells)
    console.print(table)
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
