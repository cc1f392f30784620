"""What some ideas would save of the coded bits, on real caches; none of them is in the format.

For the preset ``default`` at some ratios, beside what its symbols take by the tables' ideal
lengths:

- *context*: a family for each component, step class and size of the 16 symbols before in the same
  token, relative to what is usual there; chosen on the caches that calibrate;
- *block*: families of a level that suits the block, of nine around its own, 4 bits a block;
- *previous token*: each coefficient less what is best foreseen, linearly, from the same one of
  the token before, as decoded; families chosen anew for what is left.

    python benchmarks/ideas.py --calibration CAL --cache FILES... --judge FILES...

Files are as for `benchmarks/bases.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment, write_result
from bases import Source
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.calibration.families import STEPS_PER_OCTAVE
from kvtc_stream.calibration.importance import classes_of
from kvtc_stream.coding.rans import CLASSES, ESCAPE, ZERO, Families
from kvtc_stream.coding.uniform import UniformBands, steps

Symbols = NDArray[np.int32]

BEFORE = 16
#: Sizes of the symbols before, relative to the usual, between which contexts change.
EDGES = (0.6, 0.9, 1.2, 1.7)
#: The choice for a key counts this many symbols as those of its parent are, besides its own.
LEANING = 32
BLOCK, LEVELS = 128, range(-4, 5)


class Coding:
    """Symbols of the preset at a ratio, and what they take.

    Parameters
    ----------
    source
        Of weighted rows.
    ratio
        16 bits a value over the plan's expected bits.
    """

    def __init__(self, calibration: kvtc.Calibration, source: Source, ratio: float) -> None:
        [part] = calibration.sections[0].basis("joint")
        codec = kvtc.Codec(calibration, ratio=ratio, window=0)
        [dealt] = codec.plan.sections[0].parts
        assert part.uniform is not None
        assert part.uniform.importance is not None
        self.uniform, self.importance = part.uniform, part.uniform.importance
        self.families = Families(part.uniform.families.frequencies)
        self.bands = UniformBands(dealt.bands, self.families, part.uniform.families.ids)
        self.components = part.components.matrix()[self.bands.components].astype(np.float32)
        self.whole = part.components.matrix().astype(np.float32)
        self.deltas = steps(part.uniform.unit)
        self.source, self.width = source, part.width

    def coefficients(self, path: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Those that are coded [tokens, components], and classes [tokens]."""
        found = self.source.rows(path) @ self.whole.T
        return found[:, self.bands.components], classes_of(self.importance.predict(found))

    def step(self, classes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[tokens, components]."""
        found: NDArray[np.float32] = self.deltas[self.bands.base[None] + classes[:, None]]
        return found

    def columns(self, symbols: Symbols) -> NDArray[np.intp]:
        """The columns of a family that symbols have."""
        inside = abs(symbols) <= ZERO
        return np.where(inside, symbols + ZERO, ESCAPE)

    def cost(self, ids: NDArray[np.intp], symbols: Symbols) -> float:
        """Bits with a family for each symbol."""
        return float(self.families.bits[ids, self.columns(symbols)].sum(dtype=np.float64))


class Choice:
    """Families for keys, learnt from symbols: the cheapest for each, leaning on its parent's."""

    def __init__(self, coding: Coding, keys: int, parents: int) -> None:
        self._coding, self._ratio = coding, keys // parents
        self._counts = np.zeros((keys, 256), np.uint32)

    def learn(self, keys: NDArray[np.intp], symbols: Symbols) -> None:
        """Count symbols under their keys; the parent of a key is ``key // (keys / parents)``."""
        flat = keys.ravel() * 256 + self._coding.columns(symbols).ravel()
        self._counts += np.bincount(flat, minlength=self._counts.size).astype(np.uint32).reshape(
            self._counts.shape
        )  # fmt: skip

    def ids(self) -> NDArray[np.intp]:
        """The family of each key."""
        bits = self._coding.families.bits.T
        costs = self._counts.astype(np.float32) @ bits
        together = costs.reshape(-1, self._ratio, costs.shape[1]).sum(axis=1)
        symbols = self._counts.sum(axis=1).reshape(-1, self._ratio).sum(axis=1)
        leaning = LEANING * together / np.maximum(symbols, 1)[:, None]
        return np.argmin(costs + np.repeat(leaning, self._ratio, axis=0), axis=1)


def contexts(symbols: Symbols, usual: NDArray[np.float32]) -> NDArray[np.intp]:
    """[tokens, components] of 0…len(EDGES); ``usual`` is the mean size, likewise."""

    def before(x: NDArray[np.float32]) -> NDArray[np.float32]:
        total = np.cumsum(np.pad(x, ((0, 0), (1, 0))), axis=1, dtype=np.float64)
        first = np.maximum(np.arange(x.shape[1]) - BEFORE, 0)
        return (total[:, :-1] - total[:, first]).astype(np.float32)

    sizes = np.minimum(abs(symbols), 64).astype(np.float32)
    return np.searchsorted(EDGES, (before(sizes) + 0.5) / (before(usual) + 0.5))


def judge(coding: Coding, learnt: list[str], judged: list[str]) -> dict[str, float]:
    """Bits a token of each idea, and of none."""
    count, most = len(coding.bands.components), len(EDGES) + 1
    place = np.arange(count)[None]
    sums, tokens = np.zeros((CLASSES, count)), np.zeros(CLASSES)
    lag, own = np.zeros(count), np.zeros(count)
    data = [coding.coefficients(path) for path in learnt]
    for x, classes in data:
        symbols = np.rint(x / coding.step(classes)).astype(np.int32)
        np.add.at(sums, classes, np.minimum(abs(symbols), 64))
        np.add.at(tokens, classes, 1)
        decoded = symbols * coding.step(classes)
        lag += (x[1:] * decoded[:-1]).sum(axis=0)
        own += np.square(decoded[:-1]).sum(axis=0)
    usual = ((sums + sums.mean(axis=0)) / (tokens[:, None] + tokens.mean())).astype(np.float32)
    rho = np.where(own > 0, lag / np.maximum(own, 1e-30), 0).astype(np.float32)

    def residual(x: NDArray[np.float32], classes: NDArray[np.uint8]) -> Symbols:
        step = coding.step(classes)
        decoded = np.rint(x / step) * step  # about what a decoder would have of the token before
        foreseen = np.concatenate([np.zeros((1, count), np.float32), rho * decoded[:-1]])
        return np.rint((x - foreseen) / step).astype(np.int32)

    plain = Choice(coding, count * CLASSES, count)
    context = Choice(coding, count * CLASSES * most, count * CLASSES)
    previous = Choice(coding, count * CLASSES, count)
    for x, classes in data:
        symbols = np.rint(x / coding.step(classes)).astype(np.int32)
        key = place * CLASSES + classes[:, None]
        plain.learn(key, symbols)
        context.learn(key * most + contexts(symbols, usual[classes]), symbols)
        previous.learn(key, residual(x, classes))
    chosen = plain.ids(), context.ids(), previous.ids()
    bits = dict.fromkeys(("now", "chosen anew", "context", "block", "previous token"), 0.0)
    total = 0
    for path in judged:
        x, classes = coding.coefficients(path)
        total += len(x)
        symbols = np.rint(x / coding.step(classes)).astype(np.int32)
        key = place * CLASSES + classes[:, None]
        columns = coding.columns(symbols)
        of_levels = []
        for level in LEVELS:
            ids = coding.bands.ids(level)[classes]
            of_levels.append(coding.families.bits[ids, columns].sum(axis=1, dtype=np.float64))
        bits["now"] += float(of_levels[LEVELS.index(0)].sum())
        for first in range(0, len(x), BLOCK):
            bits["block"] += min(float(b[first : first + BLOCK].sum()) for b in of_levels) + 4
        bits["chosen anew"] += coding.cost(chosen[0][key], symbols)
        ids = chosen[1][key * most + contexts(symbols, usual[classes])]
        bits["context"] += coding.cost(ids, symbols)
        bits["previous token"] += coding.cost(chosen[2][key], residual(x, classes))
    return {name: value / total for name, value in bits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", required=True, metavar="FILE", help="of the caches' model")
    parser.add_argument("--cache", nargs="+", required=True, metavar="FILE", help="to learn from")
    parser.add_argument("--judge", nargs="+", required=True, metavar="FILE", help="other caches")
    parser.add_argument("--ratios", nargs="+", type=float, default=[16.0, 48.0, 96.0])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "ideas.json"
    )
    args = parser.parse_args()
    assert STEPS_PER_OCTAVE == 4
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    result: dict[str, Any] = environment() | {"bits_per_token": {}}
    calibration = kvtc.Calibration.load(args.calibration)
    source = Source(calibration)
    table = Table("ratio", "now", "chosen anew", "context", "block", "previous token")
    for ratio in args.ratios:
        found = judge(Coding(calibration, source, ratio), args.cache, args.judge)
        result["bits_per_token"][f"{ratio:g}"] = found
        own = found["now"]
        table.add_row(
            f"{ratio:g}", f"{own:,.0f}", *(f"{x / own - 1:+.1%}" for x in list(found.values())[1:])
        )
    console.print(table)
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
