"""``kvtc info --plot``: what a stream is made of, drawn."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.parts import CalibratedBases
from kvtc_stream.formats import PartPlan, Quantiser, Role, StreamFile
from kvtc_stream.stream.decoder import check_calibration
from kvtc_stream.stream.statistics import StreamStatistics


def draw(path: str, stream: StreamFile, calibration: Calibration | None) -> None:
    """Bits per component, error per token, bytes per part, into a PNG.

    The bits of uniform bands are those that the calibration expects at the plan's step; without
    it, the bands' steps are drawn.
    """
    bases = None if calibration is None else check_calibration(stream.header, calibration)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    components, errors, sizes = figure.subplots(1, 3)
    _components(components, stream, bases)
    _errors(errors, stream)
    _sizes(sizes, stream)
    figure.savefig(path, dpi=150)


def _components(axes: Axes, stream: StreamFile, bases: CalibratedBases | None) -> None:
    steps = False
    for i, plan in enumerate(stream.header.plan.sections):
        for j, part in enumerate(plan.parts):
            kinds = " and ".join(
                name for name, layers in (("K", part.k_layers), ("V", part.v_layers)) if layers
            )
            rate = None
            if plan.uniform and bases is not None:
                uniform = bases.sections[i].parts(plan)[j].uniform
                rate = None if uniform is None else uniform.families.rate
            steps |= plan.uniform and rate is None
            axes.plot(_heights(part, rate), label=f"section {i}: {kinds}", linewidth=1)
    axes.set(xlabel="component", ylabel="step, quarter octaves" if steps else "bits a token")
    axes.legend(frameon=False)


def _heights(part: PartPlan, rate: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """Bits of each coded component, or its band's step."""
    heights = np.zeros(part.components)
    first = 0
    for band in part.bands:
        span = slice(first, first + band.size)
        if band.quantiser is Quantiser.UNIFORM:
            heights[span] = band.step if rate is None else rate[band.step, span]
        else:
            heights[span] = band.quantiser.bits
        first += band.size
    return heights


def _errors(axes: Axes, stream: StreamFile) -> None:
    for i in range(len(stream.header.geometry.sections)):
        entries = [e for e in stream.index if e.section == i and e.role is Role.DATA]
        if not entries:
            continue
        edges = [entries[0].start, *(e.start + e.tokens for e in entries)]
        for name, color in (("k", f"C{2 * i}"), ("v", f"C{2 * i + 1}")):
            for kind, style in (("mean", "-"), ("worst", ":")):
                values = [getattr(e.errors, f"{name}_{kind}") for e in entries]
                label = f"{name.upper()}, {kind}"
                axes.stairs(values, edges, color=color, linestyle=style, label=label, baseline=None)
    axes.set(xlabel="token", ylabel="relative error of its block")
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _sizes(axes: Axes, stream: StreamFile) -> None:
    statistics = StreamStatistics.of(stream)
    parts = {
        "header": statistics.header_bytes,
        "index": statistics.index_bytes,
        "other": statistics.other_bytes,
        **{role.name.lower(): s.stream_bytes for role, s in statistics.roles.items()},
    }
    found = axes.barh(list(parts), list(parts.values()), color="C0")
    axes.bar_label(found, [f"{size:,}" for size in parts.values()], padding=3)
    axes.set(xlabel="bytes")
    axes.set_xlim(right=1.25 * max(parts.values()))
