"""Draw what a quicker basis costs: bits more than one basis for everything, and speed.

    python benchmarks/frontier.py [benchmarks/results/frontier.json] [-o PICTURE.png]

The result is one of `python benchmarks/gpu.py --frontier`. The knee is the point of the frontier
that is farthest from the line between its ends, both axes from 0 to 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

INK, APART, LEVELS, GREY = "#222222", "#2166ac", "#b2182b", "#999999"
RESULTS = Path(__file__).parent / "results"
Point = dict[str, Any]


def complete(result: dict[str, Any]) -> list[float]:
    """Ratios at which one basis for everything was measured too."""
    return sorted({p["ratio"] for p in result["points"] if p["basis"] == "one"})


def pareto(points: list[Point]) -> list[Point]:
    """Those that no other beats in bits and speed, from the fewest bits on."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p["bits"], -p["decode_gbps"])):
        if not best or p["decode_gbps"] > best[-1]["decode_gbps"]:
            best.append(p)
    return best


def knee(points: list[Point]) -> Point:
    """See above; of a frontier."""
    first, last = points[0], points[-1]

    def above(p: Point) -> float:
        x, y = (
            (p[name] - first[name]) / max(last[name] - first[name], 1e-9)
            for name in ("bits", "decode_gbps")
        )
        return y - x

    return max(points, key=above)


def draw(result: dict[str, Any], output: Path) -> None:
    """Save the picture."""
    ratios = complete(result)
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    size = (2.6 + 4.2 * len(ratios), 4.2)
    figure, [axes] = plt.subplots(1, len(ratios), figsize=size, sharey=True, squeeze=False)
    for axis, ratio in zip(axes, ratios, strict=True):
        points = [p for p in result["points"] if p["ratio"] == ratio]
        best = pareto(points)
        axis.plot(
            [100 * p["bits"] - 100 for p in best], [p["decode_gbps"] for p in best],
            color=GREY, lw=1, zorder=0,
        )  # fmt: skip
        for p in points:
            two = "then" in p["basis"]
            x, y = 100 * p["bits"] - 100, p["decode_gbps"]
            axis.plot(x, y, "o", color=LEVELS if two else APART, ms=5)
            name = p["basis"].replace(" groups", "").replace(", then ", " → ")
            left = two and not 3 < x < 10  # where no other name is
            place = {"xytext": (-6, 4), "ha": "right"} if left else {"xytext": (6, -9)}
            axis.annotate(name, (x, y), textcoords="offset points", fontsize=6.5, **place)
        found = knee(best)
        axis.plot(100 * found["bits"] - 100, found["decode_gbps"], "o", ms=12, mfc="none", mec=INK)
        axis.axvspan(-22, 5, color=GREY, alpha=0.15, lw=0)
        axis.axhline(result["ceilings"]["pinned_copy_gbps"], color=GREY, ls=":", lw=1)
        most = max(100 * p["bits"] - 100 for p in points)
        axis.set(xlim=(-22, 1.12 * most), yscale="log", title=f"{ratio:g} times smaller")
        axis.yaxis.set_major_locator(FixedLocator([20, 30, 40, 60, 80, 100, 150, 200, 300]))
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set(xlabel="% more bits than one basis")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="decode, GB of K and V a second")
    for colour, name in ((APART, "groups of layers"), (LEVELS, "groups, then a second level")):
        axes[0].plot([], [], "o", color=colour, label=name)
    axes[0].plot([], [], ":", color=GREY, label="copy of the raw cache, pinned")
    axes[0].plot([], [], "o", ms=9, mfc="none", mec=INK, label="knee")
    axes[0].legend(frameon=False, fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "frontier.json")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "frontier.png")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    draw(result, args.output)
    for ratio in complete(result):
        found = knee(pareto([p for p in result["points"] if p["ratio"] == ratio]))
        print(f"{ratio:g}: knee at {found['basis']}, {found['decode_gbps']:.0f} GB/s")
    for p in result["points"]:
        flops = 2 * p["multiply_adds_per_token"] * p["stage_tokens"]
        spent = p["stages_s"]["second level"] + p["stages_s"]["synthesis and scatter"]
        print(f"{p['ratio']:g}, {p['basis']}: {flops / spent / 1e12:.0f} TFLOP/s, scatter included")
    print(args.output)


if __name__ == "__main__":
    main()
