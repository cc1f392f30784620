"""What is lost when a cache is stored, restored and stored again: errors and KL by generation.

    python benchmarks/generations.py --model SmolLM2-135M-Instruct.Q4_1.gguf \\
        --calibration CALIBRATION.safetensors --text TEXT.txt [TEXT.txt ...] \\
        [--backend cpu|cuda|alternate] [--device cuda]

Writes a result as JSON and a picture beside it. Conversations grow with each generation: their
errors are of each token since it was first coded. ``fresh`` is the KL of caches that were never
stored, with encoders that look for restored tokens and with those that do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment, write_result
from numpy.typing import NDArray
from rich.console import Console

import kvtc_stream as kvtc
from kvtc_stream.coding import bands, lattice
from kvtc_stream.evaluation import quality
from kvtc_stream.io.dlpack import numpy_dtype

RESULTS = Path(__file__).parent / "results"
COLOURS = {"default": "#b2182b", "paper": "#2166ac"}
#: Who encodes and who decodes, in turn.
TURNS = {
    "cpu": [("cpu", "cpu")],
    "cuda": [("cuda", "cuda")],
    "alternate": [("cpu", "cpu"), ("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")],
}
#: Tokens of a page.
PAGE = 64
Cache = tuple[NDArray[Any], NDArray[Any]]


class Judge:
    """A model, the cache of some tokens, and what it predicts next."""

    def __init__(self, model: Any, ids: NDArray[np.int64], context: int) -> None:
        import torch

        self.model, self.ids, self.context = model, ids, context
        layers = quality.prefill(model, ids[:context]).layers
        self.cache = tuple(
            torch.cat(x).cpu().numpy()
            for x in ([y.keys for y in layers], [y.values for y in layers])
        )

    def of(self, dtype: str) -> Cache:
        """The cache in a type."""
        k, v = (x.astype(numpy_dtype(kvtc.DType[dtype.upper()])) for x in self.cache)
        return k, v

    def log_probabilities(self, cache: Cache) -> Any:
        """Log-probabilities of the tokens that follow."""
        import torch
        from transformers.cache_utils import DynamicCache

        found = DynamicCache()
        for i in range(len(cache[0])):
            pair = (torch.from_numpy(x[i : i + 1].astype(np.float32)) for x in cache)
            found.update(*(x.to(self.model.device) for x in pair), layer_idx=i)
        return quality.next_token_log_probabilities(self.model, found, self.ids[self.context : -1])

    def divergence(self, exact: Any, cache: Cache) -> float:
        """KL of the next token, nats."""
        targets = self.ids[self.context + 1 :]
        return quality.judge(exact, self.log_probabilities(cache), targets).kl_divergence


def on_host(x: Any) -> NDArray[Any]:
    """NumPy's of an array of either backend."""
    if isinstance(x, np.ndarray):
        return x
    import cupy

    bits = {2: np.uint16, 4: np.uint32}[x.itemsize]
    found: NDArray[Any] = cupy.asnumpy(x.view(bits)).view(x.dtype)
    return found


def again(cache: Cache, codec: kvtc.Codec, backend: str, turn: int) -> tuple[Cache, int]:
    """Store and restore."""
    turns: Any = TURNS[backend]
    encodes, decodes = turns[turn % len(turns)]
    data = kvtc.encode(*cache, codec=replace(codec, backend=encodes))
    k, v = kvtc.decode(data, codec.calibration, backend=decodes)
    return (on_host(k), on_host(v)), len(data)


def errors(original: Cache, cache: Cache) -> list[float]:
    """Relative errors of K and of V."""
    found = []
    for a, b in zip(original, cache, strict=True):
        x, y = a[:, :, : b.shape[2]].astype(np.float32), b.astype(np.float32)
        found.append(float(np.linalg.norm(x - y) / np.linalg.norm(x)))
    return found


def measure(judge: Judge, codec: kvtc.Codec, dtype: str, args: Any) -> dict[str, Any]:
    """Generation by generation."""
    original = judge.of(dtype)
    exact = judge.log_probabilities(original)
    cache: Any = original
    rows, sizes, divergences = [], [], {}
    for turn in range(args.generations):
        cache, size = again(cache, codec, args.backend, turn)
        rows.append(errors(original, cache))
        sizes.append(size)
        if turn in (0, args.generations - 1):
            divergences[turn + 1] = judge.divergence(exact, cache)
    return {"errors": rows, "bytes": sizes, "kl": divergences}


def converse(judge: Judge, codec: kvtc.Codec, args: Any) -> dict[str, Any]:
    """A conversation that grows by a share of its text each turn, in the first of the types."""
    original = judge.of(args.dtypes[0])
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


def paged(judge: Judge, codec: kvtc.Codec, args: Any) -> dict[str, Any]:
    """Pages, in the first of the types."""
    original = judge.of(args.dtypes[0])
    turns: Any = TURNS[args.backend]
    codec = replace(codec, block_tokens=PAGE)
    coders = {
        backend: kvtc.PageCodec(replace(codec, backend=backend), dtype=args.dtypes[0])
        for backend in {x for turn in turns for x in turn}
    }
    cache, rows = original, []
    for turn in range(args.generations):
        encodes, decodes = (coders[x] for x in turns[turn % len(turns)])
        pages = [
            decodes.decode(encodes.encode(*(x[:, :, i : i + PAGE] for x in cache), positions=i))
            for i in range(0, original[0].shape[2], PAGE)
        ]
        k, v = (np.concatenate(list(map(on_host, x)), axis=2) for x in zip(*pages, strict=True))
        cache = k, v
        rows.append(errors(original, cache))
    return {"errors": rows}


def fresh(judges: list[Judge], codec: kvtc.Codec, args: Any) -> list[float]:
    """KL of each context's cache, stored once, in bfloat16."""
    found = []
    for judge in judges:
        original = judge.of("bfloat16")
        exact = judge.log_probabilities(original)
        found.append(judge.divergence(exact, again(original, codec, args.backend, 0)[0]))
    return found


def all_fresh(judges: list[Judge], calibration: kvtc.Calibration, args: Any) -> list[list[float]]:
    """Of every preset and ratio."""
    return [
        fresh(judges, kvtc.Codec(calibration, p, ratio=r, window=0, measure=False), args)
        for p in args.presets
        for r in args.ratios
    ]


def draw(result: dict[str, Any], output: Path) -> None:
    """Save the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    runs = [
        r for r in result["runs"] if r["dtype"] == result["runs"][0]["dtype"] and not r["window"]
    ]
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


def documents(tokenizer: Any, args: Any) -> list[NDArray[np.int64]]:
    """Some tokens of the last part of every text, which no calibration has read."""
    size = args.context + args.following + 1
    found = []
    for path in args.text:
        text = path.read_text(encoding="utf-8")
        ids = quality.token_ids(tokenizer, text[int(0.8 * len(text)) :])
        starts = np.linspace(0, len(ids) - size, args.fresh).astype(int)
        found += [ids[i : i + size] for i in dict.fromkeys(starts.tolist()) if i >= 0]
    return found


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--following", type=int, default=192)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--presets", nargs="+", default=["default", "paper"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float16", "float32"], help="of the cache"
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 128])
    parser.add_argument("--backend", choices=TURNS, default="cpu")
    parser.add_argument("--device", default="cpu", help="of the model")
    parser.add_argument("--fresh", type=int, default=0, help="contexts of each text")
    parser.add_argument("--blind", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "generations.json")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    from kvtc_stream.integrations.transformers.loading import load_model

    args = arguments()
    warnings.simplefilter("ignore", kvtc.KVTCWarning)  # short contexts gain little
    console = Console(file=sys.stderr, width=200)
    if args.blind:  # before kernels are compiled
        lattice.LEAST_EVIDENCE = bands.LEAST_EVIDENCE = 1e30
    blind = None
    if args.fresh and not args.blind:
        command = [sys.executable, *sys.argv, "--blind"]
        # Compiled code has constants in it.
        own_cache = os.environ | {"NUMBA_CACHE_DIR": tempfile.mkdtemp()}
        blind = subprocess.Popen(command, stdout=subprocess.PIPE, env=own_cache)
    model, tokenizer = load_model(args.model, dtype="float32")
    model = model.to(args.device)
    calibration = kvtc.Calibration.load(args.calibration)
    some = documents(tokenizer, args) if args.fresh else []
    judges = [Judge(model, ids, args.context) for ids in some]
    once = all_fresh(judges, calibration, args)
    if args.blind:
        print(json.dumps(once))
        return
    args.fresh = max(args.fresh, 1)
    judge = Judge(model, documents(tokenizer, args)[0], args.context)
    result: dict[str, Any] = {**environment(), "backend": args.backend, "context": args.context}
    result["runs"], result["conversations"], result["pages"] = [], [], []
    for preset in args.presets:
        for ratio in args.ratios:
            of = {"preset": preset, "ratio": ratio}
            for window in args.windows:
                codec = kvtc.Codec(calibration, preset, ratio=ratio, window=window, measure=False)
                for dtype in args.dtypes:
                    if window and dtype != args.dtypes[0]:
                        continue  # a window has no dtype of its own
                    found = measure(judge, codec, dtype, args)
                    result["runs"].append({**of, "dtype": dtype, "window": window, **found})
                    growth = np.divide(found["errors"][-1], found["errors"][0]).round(4)
                    console.print(of, dtype, window, growth, found["kl"])
            codec = kvtc.Codec(calibration, preset, ratio=ratio, measure=False)
            grown = converse(judge, codec, args)
            result["conversations"].append({**of, **grown})
            pages = paged(judge, codec, args)
            result["pages"].append({**of, **pages})
            growth = np.divide(pages["errors"][-1], pages["errors"][0]).round(4)
            console.print(of, "growing", grown["errors_over_first"][-1], "pages", growth)
            write_result(args.output, result, console)
    if blind is not None:
        unseen = json.loads(blind.communicate()[0])
        pairs = [(p, r) for p in args.presets for r in args.ratios]
        result["fresh"] = [
            {"preset": p, "ratio": r, "kl": seen, "kl_of_blind_encoders": other}
            for (p, r), seen, other in zip(pairs, once, unseen, strict=True)
        ]
        write_result(args.output, result, console)
    draw(result, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
