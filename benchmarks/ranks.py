"""What splitting KV heads over ranks costs: pages of one calibration, beside those of one for each.

    python benchmarks/ranks.py --model SmolLM2-135M-Instruct.Q4_1.gguf \\
        --text TEXTS… --judge-text OTHER TEXTS… [--parts 3]

In tensor parallelism each rank codes its own KV heads with a calibration of its own, which does
not know what heads have in common. The model reads the texts once, and all calibrations learn from
that. Caches of the other texts are kept in pages of 128 tokens, sealed and with ``error_bound`` as
servers keep them: whole, and of each part, and the model reads on from what comes back. Every byte
counts.
Divergence at equal bytes is interpolated in logarithms between the targets of whole pages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment, write_result
from pages import geometric
from rich.console import Console
from rich.table import Table
from window import Judge

import kvtc_stream as kvtc
from kvtc_stream.evaluation import quality
from kvtc_stream.integrations.transformers.calibration import capture
from kvtc_stream.integrations.transformers.geometry import geometry_of
from kvtc_stream.integrations.transformers.gradients import capture_gradients
from kvtc_stream.integrations.transformers.loading import load_model

RESULT = Path(__file__).parent / "results" / "ranks.json"
PAGE = 128


def learnt(
    model: Any,
    documents: Sequence[Any],
    args: argparse.Namespace,
    parts: Sequence[int],
    console: Console,
) -> dict[int, list[kvtc.Calibration]]:
    """Calibrations of each number of parts, by this number, from the same tokens and gradients."""
    geometry = geometry_of(model)
    own = {
        count: kvtc.SplitCalibrator(
            geometry, count, bases=("joint",), layer_groups=args.layer_groups
        )
        for count in parts
    }
    for i in range(args.gradients):
        document = documents[i * len(documents) // args.gradients]
        for _, *tensors in capture_gradients(model, document, seed=i):
            for calibrator in own.values():
                calibrator.update_gradients(*tensors)
    for document in documents:
        for _, k, v in capture(model, document):
            for calibrator in own.values():
                calibrator.update(k, v)
    found = {}
    for count, calibrator in own.items():
        started = time.process_time()
        found[count] = calibrator.finish()
        console.print(f"{count} parts: solved in {time.process_time() - started:.0f} s")
    return found


def in_pages(
    judge: Judge, calibrations: Sequence[kvtc.Calibration], target: float, bound: float
) -> dict[str, Any]:
    """One cache, its heads spread over calibrations: bytes of each, and the divergence."""
    restored, sizes = [], []
    heads = judge.cache[0].shape[1] // len(calibrations)
    for i, calibration in enumerate(calibrations):
        codec = kvtc.Codec(
            calibration, ratio=target, block_tokens=PAGE, error_bound=bound, backend="cpu"
        )
        coder = kvtc.PageCodec(codec, dtype="bfloat16", key=calibration.digest)
        k, v = (x[:, i * heads : (i + 1) * heads] for x in judge.cache)
        pages = [
            coder.encode(k[:, :, j : j + PAGE], v[:, :, j : j + PAGE], positions=j, identity=b"")
            for j in range(0, judge.context, PAGE)
        ]
        decoded = [coder.decode(page, identity=b"") for page in pages]
        restored.append([np.concatenate([x[which] for x in decoded], axis=2) for which in range(2)])
        sizes.append(sum(map(len, pages)))
    cache = tuple(np.concatenate([x[which] for x in restored], axis=1) for which in range(2))
    judged = quality.judge(
        judge.exact, judge.log_probabilities(cache), judge.ids[judge.context + 1 :]
    )
    raw = sum(x.nbytes for x in judge.cache)
    errors = [
        float(np.linalg.norm(x - y) / np.linalg.norm(y))
        for x, y in (
            (a.astype(np.float32), b.astype(np.float32))
            for a, b in zip(cache, judge.cache, strict=True)
        )
    ]
    return {
        "parts": len(calibrations),
        "target": target,
        "ratio": raw / sum(sizes),
        "bytes_of_parts": sizes,
        "kl": judged.kl_divergence,
        "loss_rise": judged.loss_rise,
        "k_error": errors[0],
        "v_error": errors[1],
    }


def summary(runs: list[dict[str, Any]], parts: Sequence[int]) -> list[dict[str, Any]]:
    """Geometric means over texts; beside whole pages of as many bytes."""
    found = []
    for target in sorted({x["target"] for x in runs[0]["pages"]}):
        for count in parts:
            rows = []
            for run in runs:
                whole = sorted(
                    (x["ratio"], x["kl"]) for x in run["pages"] if x["parts"] == parts[0]
                )
                x, y = np.log(whole).T
                [own] = [p for p in run["pages"] if (p["target"], p["parts"]) == (target, count)]
                kl = float(np.exp(np.interp(np.log(own["ratio"]), x, y)))
                ratio = float(np.exp(np.interp(np.log(own["kl"]), y, x)))
                outside = not x[0] <= np.log(own["ratio"]) <= x[-1]
                rows.append(own | {"kl_over": own["kl"] / kl, "bytes_over": ratio / own["ratio"]})
                rows[-1]["outside"] = outside or not y[0] <= np.log(own["kl"]) <= y[-1]
            means = {
                name: geometric([row[name] for row in rows])
                for name in ("ratio", "kl", "k_error", "v_error", "kl_over", "bytes_over")
            }
            if any(row["outside"] for row in rows):  # where nothing is measured, nothing is said
                means |= {"kl_over": None, "bytes_over": None}
            found.append({"target": target, "parts": count, **means})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or .gguf")
    parser.add_argument("--text", nargs="+", required=True, help="to calibrate on")
    parser.add_argument("--judge-text", nargs="+", required=True, help="others")
    parser.add_argument("--parts", nargs="+", type=int, default=[3], help="of the KV heads")
    parser.add_argument("--tokens", type=int, default=24_576, help="to calibrate on")
    parser.add_argument("--gradients", type=int, default=8, help="documents")
    parser.add_argument("--layer-groups", type=int, default=1, help="with a basis each")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a judged cache")
    parser.add_argument("--following", type=int, default=256, help="tokens that are predicted")
    parser.add_argument(
        "--targets", type=float, nargs="+", default=[6.0, 8.0, 11.0, 16.0, 22.0, 32.0]
    )
    parser.add_argument("--error-bound", type=float, default=0.5)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    args = parser.parse_args()
    console, result = Console(), environment()
    model, tokenizer = load_model(args.model)
    texts = [Path(name).read_text(encoding="utf-8") for name in args.text]
    documents = quality.calibration_documents(tokenizer, texts, args.tokens)
    parts = [1, *args.parts]
    calibrations = learnt(model, documents, args, parts, console)
    runs = []
    for path in args.judge_text:
        ids = quality.token_ids(tokenizer, Path(path).read_text(encoding="utf-8"))
        start = len(ids) // 2
        judge = Judge(model, ids[start : start + args.context + args.following + 1], args.context)
        pages = [
            in_pages(judge, calibrations[count], target, args.error_bound)
            for count in parts
            for target in args.targets
        ]
        runs.append({"text": Path(path).name, "pages": pages})
        console.print(runs[-1])
    rows = summary(runs, parts)
    result |= {
        "calibration_tokens": calibrations[1][0].tokens,
        "gradient_documents": args.gradients,
        "layer_groups": args.layer_groups,
        "context": args.context,
        "following": args.following,
        "error_bound": args.error_bound,
        "page_tokens": PAGE,
        "runs": runs,
        "summary": rows,
    }
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("target", "parts", "ratio", "KL", "KL at equal bytes", "bytes at equal KL"):
        table.add_column(column, justify="right")
    for row in rows:
        over = ["" if row[x] is None else f"{row[x]:.3f}" for x in ("kl_over", "bytes_over")]
        table.add_row(
            f"{row['target']:g}",
            str(row["parts"]),
            f"{row['ratio']:.2f}",
            f"{row['kl']:.5f}",
            *over,
        )
    console.print(table)
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
