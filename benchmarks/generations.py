"""What is lost when a cache is stored, restored and stored again: errors and KL by generation.

    python benchmarks/generations.py --model SmolLM2-135M-Instruct.Q4_1.gguf \\
        --calibration CALIBRATION.safetensors --text TEXT.txt [--backend cpu|cuda|alternate]

Writes a result as JSON and a picture beside it. The last row of each preset is a conversation that
grows with each generation: its errors are of each token since it was first coded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from _common import environment, write_result
from numpy.typing import NDArray
from rich.console import Console

import kvtc_stream as kvtc
from kvtc_stream.evaluation import quality
from kvtc_stream.io.dlpack import numpy_dtype

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
COLOURS = {"default": "#b2182b", "paper": "#2166ac"}
Cache = tuple[NDArray[Any], NDArray[Any]]


class Judge:
    """A model, the cache of a text, and what it predicts next."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from kvtc_stream.integrations.transformers.loading import load_model

        self.model, tokenizer = load_model(args.model, dtype="float32")
        ids = quality.token_ids(tokenizer, args.text.read_text(encoding="utf-8")[args.skip :])
        last = args.context + args.following + 1
        self.ids, self.context = ids[:last], args.context
        layers = quality.prefill(self.model, ids[: args.context]).layers
        self.cache = tuple(
            torch.cat(x).numpy() for x in ([y.keys for y in layers], [y.values for y in layers])
        )

    def log_probabilities(self, cache: Cache) -> Any:
        """Log-probabilities of the tokens that follow."""
        import torch
        from transformers.cache_utils import DynamicCache

        found = DynamicCache()
        for i in range(len(cache[0])):
            found.update(
                *(torch.from_numpy(x[i : i + 1].astype(np.float32)) for x in cache), layer_idx=i
            )
        return quality.next_token_log_probabilities(self.model, found, self.ids[self.context : -1])

    def divergence(self, exact: Any, cache: Cache) -> float:
        """KL of the next token, nats."""
        targets = self.ids[self.context + 1 :]
        return quality.judge(exact, self.log_probabilities(cache), targets).kl_divergence


def again(cache: Cache, codec: kvtc.Codec, backend: str, turn: int) -> tuple[Cache, int]:
    """Store and restore; "alternate" takes the CPU and the GPU in turn."""
    if backend == "cuda" or (backend == "alternate" and turn % 2):
        from dataclasses import replace

        import cupy

        data = kvtc.encode(*map(cupy.asarray, cache), codec=replace(codec, backend="cuda"))
    else:
        data = kvtc.encode(*cache, codec=codec)
    k, v = kvtc.decode(data, codec.calibration)
    return (np.asarray(k), np.asarray(v)), len(data)


def errors(original: Cache, cache: Cache) -> list[float]:
    """Relative errors of K and of V."""
    found = []
    for a, b in zip(original, cache, strict=True):
        x, y = a[:, :, : b.shape[2]].astype(np.float32), b.astype(np.float32)
        found.append(float(np.linalg.norm(x - y) / np.linalg.norm(x)))
    return found


def measure(judge: Judge, codec: kvtc.Codec, dtype: str, args: Any) -> dict[str, Any]:
    """Generation by generation."""
    original = tuple(x.astype(numpy_dtype(kvtc.DType[dtype.upper()])) for x in judge.cache)
    exact = judge.log_probabilities(original)  # type: ignore[arg-type]
    cache: Any = original
    rows, sizes, divergences = [], [], {}
    for turn in range(args.generations):
        cache, size = again(cache, codec, args.backend, turn)
        rows.append(errors(original, cache))  # type: ignore[arg-type]
        sizes.append(size)
        if turn in (0, args.generations - 1):
            divergences[turn + 1] = judge.divergence(exact, cache)
    return {"errors": rows, "bytes": sizes, "kl": divergences}


def converse(judge: Judge, codec: kvtc.Codec, args: Any) -> dict[str, Any]:
    """A conversation in bfloat16 that grows by a share of its text each turn."""
    original = tuple(x.astype(numpy_dtype(kvtc.DType.BFLOAT16)) for x in judge.cache)
    edges = np.linspace(0, original[0].shape[2], args.generations + 1).astype(int)[1:]
    cache: Any = tuple(x[:, :, :0] for x in original)
    first = np.zeros((2, edges[-1]))
    rows = []
    for turn, end in enumerate(edges.tolist()):
        joined: Any = tuple(
            np.concatenate([x, o[:, :, x.shape[2] : end]], axis=2)
            for x, o in zip(cache, original, strict=True)
        )
        cache, _ = again(joined, codec, args.backend, turn)
        now = np.array(
            [
                np.square(o[:, :, :end].astype(np.float32) - x.astype(np.float32)).sum((0, 1, 3))
                for x, o in zip(cache, original, strict=True)
            ]
        )
        own = first[:, :end]
        own[own == 0] = now[own == 0]
        rows.append(np.sqrt(now.sum(axis=1) / np.maximum(own.sum(axis=1), 1e-30)).tolist())
    return {"errors_over_first": rows}


def draw(result: dict[str, Any], output: Path) -> None:
    """Save the picture."""
    runs = [r for r in result["runs"] if r["dtype"] == "bfloat16" and not r["window"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for kind, axis in enumerate(axes):
        for run in runs:
            values = np.array(run["errors"])[:, kind]
            x = np.arange(1, len(values) + 1)
            axis.plot(x, values / values[0], "o-", ms=3, lw=1, color=COLOURS[run["preset"]])
            axis.annotate(
                f"{run['ratio']:g}", (x[-1], values[-1] / values[0]), fontsize=7,
                xytext=(4, -3), textcoords="offset points",
            )  # fmt: skip
        axis.axhline(1.02, color="#999999", ls=":", lw=1)
        axis.set(xlabel="generation", title=("K", "V")[kind])
        axis.spines[["top", "right"]].set_visible(False)
    for preset, colour in COLOURS.items():
        axes[0].plot([], [], color=colour, label=preset)
    axes[0].set(ylabel="error, of that of the first")
    axes[0].set_ylim(0.99, max(1.05, axes[0].get_ylim()[1]))
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, help="characters of the text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--following", type=int, default=192)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--presets", nargs="+", default=["default", "paper"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 16, 64, 128])
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float16", "float32"], help="of the cache"
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 128])
    parser.add_argument("--backend", choices=["cpu", "cuda", "alternate"], default="cpu")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "generations.json")
    args = parser.parse_args()
    console = Console(file=sys.stderr)
    judge = Judge(args)
    calibration = kvtc.Calibration.load(args.calibration)
    result: dict[str, Any] = {**environment(), "backend": args.backend, "context": args.context}
    result["runs"], result["conversations"] = [], []
    for preset in args.presets:
        for ratio in args.ratios:
            for window in args.windows:
                codec = kvtc.Codec(calibration, preset, ratio=ratio, window=window, measure=False)
                for dtype in args.dtypes:
                    if window and dtype != args.dtypes[0]:
                        continue  # a window has no dtype of its own
                    about = {"preset": preset, "ratio": ratio, "dtype": dtype, "window": window}
                    found = measure(judge, codec, dtype, args)
                    result["runs"].append({**about, **found})
                    console.print(json.dumps({**about, "kl": found["kl"]}), found["errors"][-1])
            codec = kvtc.Codec(calibration, preset, ratio=ratio, measure=False)
            found = converse(judge, codec, args)
            result["conversations"].append({"preset": preset, "ratio": ratio, **found})
            console.print(preset, ratio, "growing", found["errors_over_first"][-1])
            write_result(args.output, result, console)
    draw(result, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
