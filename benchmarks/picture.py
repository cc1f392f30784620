"""Draw how a plan deals out bits, and what a stream is made of.

    python benchmarks/picture.py CALIBRATION.safetensors CACHE.safetensors [-o PICTURE.png]

CACHE holds arrays k and v as for `kvtc encode`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

import kvtc_stream as kvtc
from kvtc_stream.formats import BAND_PARAMETER_BITS, Role
from kvtc_stream.io.plain import read

INK, K_COLOUR, V_COLOUR, GREY = "#222222", "#2166ac", "#b2182b", "#999999"


def draw(calibration: kvtc.Calibration, k: object, v: object, ratio: float, output: Path) -> None:
    """Save the picture."""
    codec = kvtc.Codec(calibration, ratio=ratio)
    encoder = kvtc.Encoder(codec)
    encoder.encode(k, v)
    encoder.finish()
    plan = codec.plan.sections[0]
    parts = calibration.sections[0].basis(plan.basis)

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), width_ratios=(3, 3, 2.6))
    for axis, part, bands, name, colour in zip(
        axes, parts, plan.parts, ("keys", "values"), (K_COLOUR, V_COLOUR), strict=False
    ):
        axis.loglog(np.arange(1, part.rank + 1), part.spectrum, color=INK, lw=1.2)
        axis.set(
            title=f"{name}: {bands.components:,} of {part.width:,} components coded",
            xlabel="component",
            ylabel="variance",
        )
        axis.set(xlim=(1, part.rank), ylim=(part.spectrum[0] / 1e6, part.spectrum[0] * 2))
        bits = axis.twinx()
        first = 0
        for band in bands.bands:
            if band.bits:
                height = band.quantiser.bits + BAND_PARAMETER_BITS / band.size
                bits.axvspan(
                    first + 1,
                    first + band.size + 1,
                    ymax=height / 16,
                    color=colour,
                    alpha=0.35,
                    lw=0.5,
                    ec="white",
                )
            first += band.size
        bits.set(ylim=(0, 16), ylabel="bits per value")
        bits.yaxis.label.set_color(colour)

    s = encoder.statistics
    sizes = [
        ("cache", s.cache_bytes, GREY),
        ("stream", s.stream_bytes, INK),
        ("  coded blocks", s.roles[Role.DATA].stream_bytes, K_COLOUR),
        ("  window", s.roles[Role.TAIL].stream_bytes, V_COLOUR),
        ("  sinks", s.roles[Role.SINKS].stream_bytes, V_COLOUR),
        ("  header, index", s.header_bytes + s.index_bytes, GREY),
    ]
    axis = axes[2]
    axis.barh(
        [n for n, _, _ in sizes], [b / 1e6 for _, b, _ in sizes], color=[c for _, _, c in sizes]
    )
    for i, (_, size, _) in enumerate(sizes):
        axis.text(size / 1e6, i, f" {size / 1e6:.2f} MB", va="center", fontsize=8, color=INK)
    axis.invert_yaxis()
    axis.set_xlim(0, s.cache_bytes / 1e6 * 1.35)
    axis.set(title=f"{s.tokens:,} tokens, {s.ratio:.1f} times smaller", xlabel="MB")
    for axis in figure.axes:
        axis.spines[["top"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/plan.png"))
    arguments = parser.parse_args()
    cache = read(str(arguments.cache))[0]
    draw(
        kvtc.Calibration.load(arguments.calibration),
        cache.k,
        cache.v,
        arguments.ratio,
        arguments.output,
    )
    print(arguments.output)


if __name__ == "__main__":
    main()
