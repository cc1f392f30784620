"""What a basis in 8 bits costs: bits at equal error, by how it is rounded and projected with.

    python benchmarks/rounding.py [-o benchmarks/results/rounding.json]

Rows are drawn: Laplacian coefficients with the variances of SmolLM2-135M's joint basis and a scale
for each token, along random orthonormal directions, a fifth of the model's columns and as many
components in proportion. Bits are the entropies of each component's symbols; the error is that of
the rows, what is left out included. Real caches differ in that their directions are no random ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment, write_result
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kvtc_stream.calibration.float8 import Float8Matrix, dual

Matrix = NDArray[np.float32]

#: Columns and components of SmolLM2-135M's joint basis, and of the drawn one.
OF_MODEL = 11_520, 4608
COLUMNS, COMPONENTS = 2304, 922
#: Logarithms of the model's variances, relative to the first, at its components.
SPECTRUM = {
    1: 1.0, 3: 0.4619, 6: 0.2194, 12: 0.1489, 25: 0.07965, 49: 0.03714, 92: 0.01594,
    184: 0.006331, 307: 0.002899, 461: 0.001469, 614: 0.0008685, 922: 0.0003969, 1229: 0.0002208,
    1536: 0.0001357, 1843: 8.874e-05, 2150: 6.091e-05, 2458: 4.301e-05, 2765: 3.074e-05,
    3072: 2.114e-05, 11_520: 6.3e-07,
}  # fmt: skip
TOKENS, TOKEN_SCALE = 3000, 0.3
#: Squared steps, in units of the first variance: ratios of about 16, 32 and 64.
SQUARED_STEPS = (5.5e-5, 4e-4, 1.8e-3)


def variants(basis: Matrix) -> Iterator[tuple[str, Matrix, Matrix]]:
    """Names, and what projects and expands; the first is what the others are compared with."""
    yield "binary16", basis, basis
    found = Float8Matrix.of(basis)
    nothing = np.zeros((0, basis.shape[1]), found.codes.dtype)
    one = Float8Matrix(found.codes, nothing, found.rows, found.columns).values()
    two = found.values()
    yield "rounded", one, one
    yield "rounded, dual", dual(one), one
    yield "second terms", two, two
    yield "second terms, dual", dual(two), two


def cost(rows: Matrix, analysis: Matrix, synthesis: Matrix, step: float) -> tuple[float, float]:
    """Bits for each token, and the relative error of all rows."""
    symbols = np.rint(rows @ analysis.T / step)
    lost = rows - (symbols * step).astype(np.float32) @ synthesis
    bits = 0.0
    for of_component in symbols.T:
        _, counts = np.unique(of_component, return_counts=True)
        shares = counts / len(rows)
        bits -= float((shares * np.log2(shares)).sum())
    squares = [float(np.square(x, dtype=np.float64).sum()) for x in (lost, rows)]
    return bits, (squares[0] / squares[1]) ** 0.5


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("-o", "--output", type=Path, default=results / "rounding.json")
    args = parser.parse_args()
    console = Console(highlight=False, width=120)
    rng = np.random.default_rng(0)
    places = np.arange(1, COLUMNS + 1) * (OF_MODEL[0] / COLUMNS)
    variance = np.exp(np.interp(places, list(SPECTRUM), np.log(list(SPECTRUM.values()))))
    directions = np.linalg.qr(rng.standard_normal((COLUMNS, COLUMNS)))[0].T.astype(np.float32)
    coefficients = rng.laplace(size=(TOKENS, COLUMNS)) * np.sqrt(variance / 2)
    coefficients *= np.exp(TOKEN_SCALE * rng.standard_normal((TOKENS, 1)))
    rows = coefficients.astype(np.float32) @ directions
    basis = directions[:COMPONENTS].astype(np.float16).astype(np.float32)
    result: dict[str, Any] = environment() | {"points": []}
    table = Table("ratio", "basis", "error", "bits", "bits at equal error")
    for squared in SQUARED_STEPS:
        step = squared**0.5
        (bits, error), finer = (cost(rows, basis, basis, x) for x in (step, step / 1.05))
        slope = np.log(finer[0] / bits) / np.log(finer[1] / error)
        for name, analysis, synthesis in variants(basis):
            found = cost(rows, analysis, synthesis, step)
            equal = float(found[0] / bits * (found[1] / error) ** -slope)
            point = {
                "ratio": 16 * COLUMNS / bits,
                "basis": name,
                "bits": found[0],
                "error": found[1],
                "bits_at_equal_error": equal,
            }
            result["points"].append(point)
            table.add_row(
                f"{point['ratio']:.1f}", name, f"{found[1]:.4f}", f"{found[0] / bits - 1:+.2%}",
                f"{equal - 1:+.2%}",
            )  # fmt: skip
    console.print(table)
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
