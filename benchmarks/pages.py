"""What pages cost: divergence and bytes of pages of 16 to 256 tokens, beside streams of such bytes.

    python benchmarks/pages.py --model SmolLM2-135M-Instruct.Q4_1.gguf \\
        --calibration CALIBRATION.safetensors --text TEXTS… [-o benchmarks/results/pages.json]

A cache of each text is kept as one stream, at several ratios, and in pages, sealed and with
``error_bound`` as servers keep them, at the targets. Streams have no window, since pages have none,
and their first 4 tokens are exact. The model reads the text on from each.
Every byte counts: the divergence of pages is compared with that of a stream of as many bytes,
interpolated in logarithms. Processor time is that of one thread if OMP_NUM_THREADS is 1. Texts
should be others than those of the calibration. Writes a picture beside the result.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from _common import environment, write_result
from rich.console import Console
from window import Judge

import kvtc_stream as kvtc
from kvtc_stream.evaluation import quality
from kvtc_stream.integrations.transformers.loading import load_model

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULT = Path(__file__).parent / "results" / "pages.json"
SIZES = (16, 32, 64, 128, 256)
#: Of streams, around those that pages reach.
RATIOS = (4.0, 6.0, 8.0, 11.0, 16.0, 22.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a cache")
    parser.add_argument("--following", type=int, default=256, help="tokens that are predicted")
    parser.add_argument("--targets", type=float, nargs="+", default=[8.0, 16.0])
    parser.add_argument("--error-bound", type=float, default=0.5, help="of pages")
    parser.add_argument(
        "--first-only", action="store_true", help="bound the first page's errors, no other's"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="tokens")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = environment()
    calibration = kvtc.Calibration.load(arguments.calibration)
    model, tokenizer = load_model(arguments.model)
    runs = []
    for path in arguments.text:
        ids = quality.token_ids(tokenizer, Path(path).read_text(encoding="utf-8"))
        start = len(ids) // 2
        own = ids[start : start + arguments.context + arguments.following + 1]
        judge = Judge(model, own, arguments.context)
        run = {"text": Path(path).name, **measured(judge, calibration, arguments)}
        runs.append(run)
        console.print(run)
    result |= {
        "context": arguments.context,
        "following": arguments.following,
        "error_bound": arguments.error_bound,
        "calibration_tokens": calibration.tokens,
        "runs": runs,
        "first_only": arguments.first_only,
        "summary": summary(runs, arguments),
    }
    console.print(result["summary"])
    write_result(arguments.output, result, console)
    draw(result, arguments.output.with_suffix(".png"))


def measured(
    judge: Judge, calibration: kvtc.Calibration, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Streams of several ratios, and pages of several sizes and targets."""
    raw = sum(x.nbytes for x in judge.cache)
    streams = []
    for ratio in RATIOS:
        codec = kvtc.Codec(calibration, ratio=ratio, window=0)
        found = judge.of(kvtc.encode(*judge.cache, codec=codec), calibration)
        streams.append({"target": ratio, "ratio": raw / found["bytes"], "kl": found["kl"]})
    bounds = [arguments.error_bound, None if arguments.first_only else arguments.error_bound]
    pages = [
        in_pages(judge, calibration, target, size, bounds)
        for target in arguments.targets
        for size in arguments.sizes
    ]
    return {"streams": streams, "pages": pages}


def in_pages(
    judge: Judge,
    calibration: kvtc.Calibration,
    target: float,
    size: int,
    bounds: list[float | None],
) -> dict[str, float]:
    """One cache in pages of some tokens; error bounds of the first one, and of the others."""
    coders = []
    for bound in bounds:
        codec = kvtc.Codec(
            calibration, ratio=target, block_tokens=size, error_bound=bound, backend="cpu"
        )
        coders.append(kvtc.PageCodec(codec, dtype="bfloat16", key=calibration.digest))
    k, v = judge.cache
    for coder in coders:
        first = coder.encode(k[:, :, :size], v[:, :, :size], positions=0, identity=b"")
        coder.decode(first, identity=b"")  # compiles
    started = time.process_time()
    pages = [
        coders[i > 0].encode(
            k[:, :, i : i + size], v[:, :, i : i + size], positions=i, identity=b""
        )
        for i in range(0, judge.context, size)
    ]
    coded = time.process_time()
    decoded = [coders[0].decode(page, identity=b"") for page in pages]
    ended = time.process_time()
    restored = tuple(np.concatenate([pair[i] for pair in decoded], axis=2) for i in range(2))
    judged = quality.judge(
        judge.exact, judge.log_probabilities(restored), judge.ids[judge.context + 1 :]
    )
    total = sum(map(len, pages))
    return {
        "target": target,
        "tokens": size,
        "ratio": (k.nbytes + v.nbytes) / total,
        "page_bytes": total / len(pages),
        "kl": judged.kl_divergence,
        "loss_rise": judged.loss_rise,
        "encode_cpu_ms_per_token": (coded - started) / judge.context * 1e3,
        "decode_cpu_ms_per_token": (ended - coded) / judge.context * 1e3,
    }


def stream_kl(streams: list[dict[str, float]], ratio: float) -> float:
    """That of a stream of a ratio, interpolated in logarithms, or beyond the ends as there."""
    x, y = (np.log([s[name] for s in streams]) for name in ("ratio", "kl"))
    return float(np.exp(np.interp(np.log(ratio), x, y)))


def summary(runs: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Geometric means over texts."""
    found = []
    for target in arguments.targets:
        for size in arguments.sizes:
            own = [
                (run["streams"], page)
                for run in runs
                for page in run["pages"]
                if (page["target"], page["tokens"]) == (target, size)
            ]
            row: dict[str, float] = {"target": target, "tokens": size}
            for name in own[0][1]:
                if name not in ("target", "tokens", "loss_rise"):
                    row[name] = geometric([page[name] for _, page in own])
            row["loss_rise"] = float(np.mean([page["loss_rise"] for _, page in own]))
            row["kl_over_stream"] = geometric(
                [page["kl"] / stream_kl(streams, page["ratio"]) for streams, page in own]
            )
            found.append(row)
    return found


def geometric(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def draw(result: dict[str, Any], output: Path) -> None:
    """KL over ratio: a line for streams, a point for each size of pages."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    streams = [
        (
            geometric([run["streams"][i]["ratio"] for run in result["runs"]]),
            geometric([run["streams"][i]["kl"] for run in result["runs"]]),
        )
        for i in range(len(RATIOS))
    ]
    axes.plot(*zip(*streams, strict=True), "o-", color="0.35", markersize=4, label="one stream")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(SIZES)))
    for size, colour in zip(SIZES, colours, strict=True):
        if not any(x["tokens"] == size for x in result["summary"]):
            continue
        own = [(x["ratio"], x["kl"]) for x in result["summary"] if x["tokens"] == size]
        label = f"pages of {size} tokens"
        axes.plot(*zip(*own, strict=True), "s--", color=colour, linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="ratio, every byte counted", ylabel="KL, nats")
    ticks = [4, 6, 8, 11, 16, 22]
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
