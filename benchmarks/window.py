"""Whether the latest tokens are worth their bytes: KL at equal size, by window, block and grading.

    python benchmarks/window.py --model SmolLM2-135M-Instruct.Q4_1.gguf \\
        --calibration CALIBRATION.safetensors --text TEXTS… [-o benchmarks/results/window.json]

The reference is a stream of a target ratio whose latest 128 tokens and more are verbatim. The
others take as many bytes in all: what they save on verbatim tokens is spread over coded ones, by a
lower target. The model then reads the text on from each cache. `graded` codes all tokens, the
latest with finer steps; it is made here alone. Writes a picture beside the result.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import matplotlib as mpl
import numpy as np
from _common import environment, write_result
from numpy.typing import NDArray
from rich.console import Console

import kvtc_stream as kvtc
from kvtc_stream.backends.cpu_payloads import UniformCoding
from kvtc_stream.coding.lattice import TokenGrids
from kvtc_stream.evaluation import quality
from kvtc_stream.formats import StreamFile
from kvtc_stream.io.dlpack import numpy_dtype
from kvtc_stream.stream.statistics import StreamStatistics

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
Cache = tuple[NDArray[Any], NDArray[Any]]
#: The first tokens after the context, which look back at the window most.
SOON = 32
#: Quarter octaves by which the latest tokens' steps are finer: up to which age, and by how many.
GRADES = {
    "graded 128 by 4": ((128, 4),),
    "graded 32, 128, 512 by 8, 4, 2": ((32, 8), (128, 4), (512, 2)),
}
#: Windows, and block sizes; the first is the reference.
WINDOWS = {
    "window 128": (128, 128),
    "window 32": (32, 128),
    "window 1": (1, 128),
    "window 0": (0, 128),
    "window 1, blocks of 64": (1, 64),
    "window 0, blocks of 64": (0, 64),
}


@contextmanager
def graded(grade: tuple[tuple[int, int], ...], tokens: int) -> Iterator[None]:
    """Let tokens have finer steps by their age."""
    original = UniformCoding.grids

    def grids(self: Any, coefficients: Any, positions: NDArray[np.int64]) -> list[TokenGrids]:
        finer = np.zeros(len(positions), np.float32)
        for age, by in reversed(grade):
            finer[tokens - positions <= age] = by
        found = original(self, coefficients, positions)
        return [TokenGrids(own.wishes - finer, own.grids) for own in found]

    with mock.patch.object(UniformCoding, "grids", grids):
        yield


class Judge:
    """A model, and what it predicts after the exact cache of a text."""

    def __init__(self, model: Any, ids: NDArray[np.int64], context: int) -> None:
        import torch

        self.model, self.ids, self.context = model, ids, context
        layers = quality.prefill(model, ids[:context], torch.bfloat16).layers
        bits = [
            torch.cat(x).view(torch.uint16).numpy()
            for x in ([y.keys for y in layers], [y.values for y in layers])
        ]
        dtype = numpy_dtype(kvtc.DType.BFLOAT16)
        self.cache: Any = tuple(x.view(dtype) for x in bits)
        self.exact = self.log_probabilities(self.cache)

    def log_probabilities(self, cache: Cache) -> Any:
        """Log-probabilities of the tokens that follow."""
        import torch
        from transformers.cache_utils import DynamicCache

        found = DynamicCache()
        for i in range(len(cache[0])):
            layer = (torch.from_numpy(x[i : i + 1].astype(np.float32)) for x in cache)
            found.update(*layer, layer_idx=i)
        return quality.next_token_log_probabilities(self.model, found, self.ids[self.context : -1])

    def of(self, data: bytes, calibration: kvtc.Calibration) -> dict[str, float]:
        """Size of a stream, and KL of the tokens that follow; means in nats."""
        found = self.log_probabilities(kvtc.decode(data, calibration))
        targets = self.ids[self.context + 1 :]
        judged = quality.judge(self.exact, found, targets)
        soon = quality.judge(self.exact[:SOON], found[:SOON], targets[:SOON])
        s = StreamStatistics.of(StreamFile(io.BytesIO(data)))
        return {
            "bytes": len(data),
            "verbatim_tokens": s.tokens - s.coded_tokens,
            "coded_ratio": s.coded_ratio,
            "kl": judged.kl_divergence,
            "kl_soon": soon.kl_divergence,
            "loss_rise": judged.loss_rise,
        }


def spread(judge: Judge, codec: kvtc.Codec, size: float) -> kvtc.Codec:
    """The codec at the ratio with which a stream takes ``size`` bytes."""
    tokens, raw = judge.context, sum(x.nbytes for x in judge.cache)
    tail = 0
    if codec.window:
        tail = codec.window + (tokens - codec.sinks - codec.window) % codec.block_tokens
    exact = codec.sinks + tail
    some = [x[:, :, tokens - max(tail, 1) :] for x in judge.cache]
    share = len(kvtc.encode(*some, codec=replace(codec, sinks=tokens))) / sum(
        x.nbytes for x in some
    )
    return replace(codec, ratio=raw * (1 - exact / tokens) / (size - share * raw * exact / tokens))


def at_size(judge: Judge, codec: kvtc.Codec, size: float, name: str) -> dict[str, float]:
    """Measure at ``size`` bytes, within two percent."""
    codec = spread(judge, codec, size)
    grade, before, slope = GRADES.get(name), None, -1.0
    for _ in range(5):
        own = codec
        if grade:  # rate control would take back from the latest tokens what they get
            own = replace(codec, ratio=None, fixed_plan=codec.plan)
        with graded(grade or (), judge.context):
            data = kvtc.encode(*judge.cache, codec=own)
        if abs(len(data) / size - 1) < 0.02:
            return judge.of(data, codec.calibration)
        assert codec.ratio is not None
        x, y = np.log(codec.ratio), np.log(len(data) / size)
        if before is not None and abs(x - before[0]) > 1e-3:
            slope = min((y - before[1]) / (x - before[0]), -0.2)
        before = x, y
        codec = replace(codec, ratio=float(np.exp(x - y / slope)))
    if abs(len(data) / size - 1) > 0.05:
        print(f"{name}: {len(data)} bytes where {size} were asked for", file=sys.stderr)
    return judge.of(data, codec.calibration)


def measure(judge: Judge, calibration: kvtc.Calibration, preset: str, ratio: float) -> Any:
    """All variants at the size of the first."""
    rows: dict[str, dict[str, float]] = {}
    names = [*WINDOWS, *GRADES] if preset == "default" else [*WINDOWS][:4]
    for name in names:
        window, block = WINDOWS.get(name, (0, 128))
        codec = kvtc.Codec(
            calibration, preset, ratio=ratio, window=window, block_tokens=block, measure=False
        )
        print(preset, ratio, name, file=sys.stderr, flush=True)
        if rows:
            rows[name] = at_size(judge, codec, rows[names[0]]["bytes"], name)
        else:
            rows[name] = judge.of(kvtc.encode(*judge.cache, codec=codec), calibration)
    return rows


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over texts and contexts; KL over that of the reference as a geometric mean."""
    out = []
    for preset, ratio in dict.fromkeys((r["preset"], r["ratio"]) for r in runs):
        own = [r["rows"] for r in runs if (r["preset"], r["ratio"]) == (preset, ratio)]
        reference = next(iter(own[0]))
        for name in own[0]:
            row: dict[str, Any] = {"preset": preset, "ratio": ratio, "name": name}
            for key in own[0][name]:
                row[key] = fmean(r[name][key] for r in own)
            for key in ("kl", "kl_soon"):
                logs = [np.log(r[name][key] / r[reference][key]) for r in own]
                row[f"{key}_over"] = float(np.exp(np.mean(logs)))
            row["better"] = sum(r[name]["kl"] < r[reference]["kl"] for r in own)
            row["of"] = len(own)
            out.append(row)
    return out


def draw(result: dict[str, Any], output: Path) -> None:
    """Save the picture."""
    rows = result["summary"]
    groups = list(dict.fromkeys((r["preset"], r["ratio"]) for r in rows))
    names = list(dict.fromkeys(r["name"] for r in rows))[::-1]
    figure, axes = plt.subplots(
        1, len(groups), figsize=(2.2 + 1.9 * len(groups), 3.6), sharey=True, squeeze=False
    )
    for axis, group in zip(axes[0], groups, strict=True):
        for row in (r for r in rows if (r["preset"], r["ratio"]) == group):
            y = names.index(row["name"])
            axis.plot(row["kl_over"], y, "o", color="#b2182b", ms=5)
            axis.plot(row["kl_soon_over"], y, "|", color="#2166ac", ms=9)
        axis.axvline(1, color="#999999", lw=0.8)
        axis.set(title=f"{group[0]}, {group[1]:g}", xlabel="KL, of the first row's")
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].plot([], [], "o", color="#b2182b", label="all tokens that follow")
    axes[0][0].plot([], [], "|", color="#2166ac", label=f"the first {SOON}")
    figure.legend(frameon=False, loc="outside upper right", ncols=2, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(output, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--skip", type=float, default=0.8, help="share of each text")
    # What does not fill a block is 22 and 64 tokens.
    parser.add_argument("--contexts", type=int, nargs="+", default=[1050, 2116])
    parser.add_argument("--following", type=int, default=128)
    parser.add_argument("--presets", nargs="+", default=["default", "paper"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[16, 64])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "window.json")
    args = parser.parse_args()
    from kvtc_stream.integrations.transformers.loading import load_model

    console = Console(file=sys.stderr)
    model, tokenizer = load_model(args.model, dtype="float32")
    calibration = kvtc.Calibration.load(args.calibration)
    result: dict[str, Any] = {**environment(), "following": args.following, "runs": []}
    for context in args.contexts:
        for path in args.text:
            text = path.read_text(encoding="utf-8")
            ids = quality.token_ids(tokenizer, text[int(len(text) * args.skip) :][:40_000])
            judge = Judge(model, ids[: context + args.following + 1], context)
            for preset in args.presets:
                for ratio in args.ratios:
                    about = {"preset": preset, "ratio": ratio, "context": context}
                    rows = measure(judge, calibration, preset, ratio)
                    result["runs"].append({**about, "text": path.stem, "rows": rows})
                    kls = {name: round(row["kl"], 5) for name, row in rows.items()}
                    console.print(json.dumps({**about, "text": path.stem, "kl": kls}))
            write_result(args.output, result, console)
            result["summary"] = summary(result["runs"])
    write_result(args.output, result, console)
    draw(result, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
