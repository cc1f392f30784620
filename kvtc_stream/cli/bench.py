"""``kvtc bench``."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.cli import paths, terminal
from kvtc_stream.cli.arguments import UsageError, importance_options
from kvtc_stream.evaluation import quality
from kvtc_stream.integrations.transformers import load_model
from kvtc_stream.io.storage import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Shares of a text, where it both calibrates and is judged.
CALIBRATED_UNTIL, JUDGED_FROM = 0.7, 0.8
#: What other presets are compared with, unless another one is named first.
_BASELINE = "paper"
_TOKENS = 160_000
_PACKAGES = ("kvtc-stream", "numpy", "numba", "torch", "transformers")


def run(args: Namespace) -> int:
    """Measure; see ``kvtc bench quality --help``."""
    presets = _check(args)
    result: dict[str, Any] = {}
    with terminal.progress() as bars:
        for result in _measure(args, presets, bars):
            if args.output:
                text = json.dumps(result, indent=2, allow_nan=False) + "\n"
                with atomic_write(args.output) as file:
                    file.write(text.encode())
    if args.plot:
        draw(result, args.plot)
    if args.json:
        terminal.print_json(result)
    else:
        terminal.show(_tables(result))
    return 0


def _check(args: Namespace) -> list[str]:
    """What would only fail late; returns the presets."""
    if not (args.text or args.judge_text):
        raise UsageError("give --text FILE...: what shall the model read?")
    if not (args.text or args.calibration):
        raise UsageError("--judge-text needs --text to calibrate on, or --calibration")
    learning = [args.tokens, args.importance, args.importance_documents]
    if args.calibration and (learning != [None] * 3 or (args.text and args.judge_text)):
        raise UsageError(
            "--calibration is made already: leave out --tokens, --importance, "
            "--importance-documents, and the texts for it"
        )
    importance_options(args)
    presets = args.presets or sorted(kvtc.PRESETS, key=lambda name: name != _BASELINE)
    if unknown := [name for name in presets if name not in kvtc.PRESETS]:
        raise UsageError(f"--presets must be among {', '.join(kvtc.PRESETS)}, found {unknown[0]}")
    if not all(ratio > 0 for ratio in args.ratios):
        raise UsageError("--ratios must be positive")
    for name in ("following", "tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, found {getattr(args, name)}")
    if args.context < (least := kvtc.Codec.sinks + args.window + kvtc.Codec.block_tokens):
        raise UsageError(
            f"--context must be at least {least}, sinks, window and a block, found {args.context}"
        )
    sources = [*args.text, *args.judge_text, args.model, args.calibration]
    paths.check_output(args.output, paths.FIGURES, sources)
    paths.check_output(args.plot, paths.PICTURE, sources)
    paths.check_output(args.save_calibration, paths.CALIBRATION, sources)
    if args.plot:
        importlib.import_module("matplotlib")
    return presets


# Texts.


def _texts(args: Namespace) -> tuple[list[str], dict[str, str]]:
    """Texts to calibrate on, and texts to judge by name."""
    learnt, judged = paths.read_texts(args.text), paths.read_texts(args.judge_text)
    if known := [path for path, text in judged.items() if text in learnt.values()]:
        raise UsageError(
            f"{known[0]} is among the texts to calibrate on: judge on a text that is not, or leave "
            f"out --judge-text to judge on the last part of each"
        )
    if not judged:
        judged = {path: text[int(len(text) * JUDGED_FROM) :] for path, text in learnt.items()}
        learnt = {path: text[: int(len(text) * CALIBRATED_UNTIL)] for path, text in learnt.items()}
    names = [path.name for path in judged]
    if len(set(names)) < len(names):
        root = os.path.commonpath([path.parent for path in judged])
        names = [path.relative_to(root).as_posix() for path in judged]
    return list(learnt.values()), dict(zip(names, judged.values(), strict=True))


# Measuring.


def _measure(args: Namespace, presets: Sequence[str], bars: Progress) -> Iterator[dict[str, Any]]:
    """What is known after each text, for those who stop before the last one."""
    to_learn, to_judge = _texts(args)
    model, tokenizer, name = _load(args, bars)
    prompts, needed = {}, args.context + args.following + 1
    for number, (title, text) in enumerate(to_judge.items()):
        ids = quality.token_ids(tokenizer, text)
        if len(ids) < needed:
            raise ValueError(
                f"{title} has {len(ids)} tokens to judge on, expected {needed}: give a longer one, "
                f"or ask for a shorter --context"
            )
        planted = None
        if args.retrieval:
            planted = quality.plant_facts(tokenizer, ids[: args.context], seed=[args.seed, number])
        prompts[title] = (ids[:needed], planted)
    calibration = _calibration(args, model, tokenizer, to_learn, name, bars)
    codecs = [
        kvtc.Codec(
            calibration,
            preset,
            ratio=ratio,
            window=args.window,
        )
        for preset in presets
        for ratio in args.ratios
    ]
    for codec in codecs:
        codec.make_plan(terminal.bar(bars, f"Planning {codec.preset} for {codec.ratio:g}×"))
    points: list[dict[str, Any]] = [
        {"preset": codec.preset, "target_ratio": codec.ratio, "texts": []} for codec in codecs
    ]
    texts = []
    task = bars.add_task("Judging", total=len(prompts) * len(codecs))
    for title, (ids, planted) in prompts.items():
        exact: dict[str, Any] = {"text": title}
        answers = None
        if planted:
            answers = quality.measure_retrieval(model, *planted, codecs)
            exact |= asdict(next(answers))
        for point, measured in zip(
            points, quality.measure(model, ids, codecs, context=args.context), strict=True
        ):
            row = {"text": title, **_row(measured)}
            exact["loss"] = row.pop("loss")
            if answers:
                row |= asdict(next(answers))
            point["texts"].append(row)
            bars.advance(task)
        texts.append(exact)
        for point in points:
            point["mean"] = _mean(point["texts"])
        to_come = list(prompts)[len(texts) :]
        yield ({"texts_to_come": to_come} if to_come else {}) | {
            "command": _command(args),
            "device": _device(model),
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in _PACKAGES},
            "model": {"name": name, "dtype": args.dtype},
            "calibration": {"tokens": calibration.tokens, "digest": calibration.digest.hex()},
            "judged": {
                "context": args.context,
                "following": args.following,
                "sinks": codecs[0].sinks,
                "window": args.window,
                "cache_dtype": "bfloat16",
                "texts": texts,
                "mean": _mean(texts),
            },
            "points": points,
            "at_equal_kl": [
                row for of in ("coded_ratio", "ratio") for row in at_equal_kl(points, of)
            ],
        }


def _load(args: Namespace, bars: Progress) -> tuple[PreTrainedModel, Any, str]:
    source = args.model
    if source is None:
        from kvtc_stream.evaluation.smollm2 import model_file

        source = model_file(terminal.bar(bars, "Fetching SmolLM2-135M"))
    task = bars.add_task("Loading the model", total=None)
    model, tokenizer = load_model(source, dtype=args.dtype)
    import torch

    if torch.cuda.is_available():
        model = model.to("cuda")  # type: ignore[arg-type]
    bars.remove_task(task)
    path = Path(source)
    name = path.stem if path.suffix == ".gguf" else path.name if path.is_dir() else str(source)
    return model, tokenizer, name


def _calibration(
    args: Namespace,
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    name: str,
    bars: Progress,
) -> kvtc.Calibration:
    if args.calibration:
        return paths.load_calibration(args.calibration)
    from kvtc_stream.integrations.transformers import calibrate

    documents = quality.calibration_documents(tokenizer, texts, args.tokens or _TOKENS)
    made = calibrate(
        model,
        documents,
        tokenizer=tokenizer,
        tokens=max(sum(map(len, documents)), 1),
        progress=terminal.bar(bars, "Calibrating"),
        name=name,
        **importance_options(args),
    )
    if args.save_calibration:
        made.save(args.save_calibration)
    return made


def _row(measured: quality.Measurement) -> dict[str, Any]:
    s, judgement = measured.statistics, measured.judgement
    return {
        "cache_bytes": s.cache_bytes,
        "stream_bytes": s.stream_bytes,
        "ratio": s.ratio,
        "coded_ratio": s.coded_ratio,
        "k_error": s.k_error_mean,
        "v_error": s.v_error_mean,
        "k_centred": measured.k_centred,
        "v_centred": measured.v_centred,
        **asdict(judgement),
        "loss_rise": judgement.loss_rise,
    }


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over texts. They are equally long: the harmonic mean of ratios is that of summed bytes."""
    means: dict[str, Callable[[list[float]], float]] = {
        "ratio": harmonic_mean,
        "coded_ratio": harmonic_mean,
        "kl_worst": max,
    }
    return {
        name: means.get(name, fmean)([row[name] for row in rows])
        for name in rows[0]
        if name != "text"
    }


def at_equal_kl(points: Sequence[dict[str, Any]], of: str) -> list[dict[str, Any]]:
    """Ratios, ``of`` a kind, that other presets reach at the mean KL of the first one's points."""
    baseline = points[0]["preset"]
    rows = []
    for preset in dict.fromkeys(p["preset"] for p in points if p["preset"] != baseline):
        curve = [
            (p["mean"][of], p["mean"]["kl_divergence"]) for p in points if p["preset"] == preset
        ]
        for mean in (p["mean"] for p in points if p["preset"] == baseline):
            found = quality.ratio_at_kl(curve, mean["kl_divergence"])
            rows.append(
                {
                    "preset": preset,
                    "of": of,
                    "kl_divergence": mean["kl_divergence"],
                    "baseline_ratio": mean[of],
                    "ratio": found,
                    "gain": None if isinstance(found, str) else found / mean[of],
                }
            )
    return rows


def _command(args: Namespace) -> str:
    """As it was given; files by name, wherever they are."""
    words = [
        Path(word).name if os.path.exists(word) or os.path.isabs(word) else word
        for word in args.words
    ]
    return shlex.join(["kvtc", *words])


def _device(model: PreTrainedModel) -> str:
    if model.device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(model.device)
    return f"CPU, {platform.machine()}"


# Results.


def _tables(result: dict[str, Any]) -> Iterable[Table]:
    judged, points = result["judged"], result["points"]
    exact, retrieval = judged["mean"], "facts_found" in judged["mean"]
    yield terminal.facts(
        [
            (
                "model",
                f"{result['model']['name']} in {result['model']['dtype']}, calibrated on "
                f"{result['calibration']['tokens']:,} tokens",
            ),
            (
                "judged on",
                f"{', '.join(text['text'] for text in judged['texts'])}: {judged['context']:,} "
                f"tokens of context, {judged['sinks']} sinks and a window of {judged['window']} "
                f"kept; the next {judged['following']} tokens predicted",
            ),
        ]
    )
    heads = ["preset", "target", "coded", "stream", "KL", "worst", "loss", "same top"]
    heads += ["K error", "V error", "K centred", "V centred"]
    heads += ["found", "log p"] * retrieval
    rows = [["exact", *[""] * 5, f"{exact['loss']:.4f}", *[""] * 5]]
    rows += [
        [
            point["preset"],
            f"{point['target_ratio']:g}",
            *(f"{mean[name]:.2f}×" for name in ("coded_ratio", "ratio")),
            *(f"{mean[name]:.3g}" for name in ("kl_divergence", "kl_worst")),
            f"{mean['loss_rise']:+.4f}",
            f"{mean['same_top_token']:.1%}",
            *(f"{mean[f'{kind}_{name}']:.4f}" for name in ("error", "centred") for kind in "kv"),
        ]
        for point, mean in ((point, point["mean"]) for point in points)
    ]
    if retrieval:
        for row, mean in zip(rows, [exact, *(point["mean"] for point in points)], strict=True):
            row += [f"{mean['facts_found']:.0%}", f"{mean['fact_log_probability']:.2f}"]
    yield terminal.table("Means over texts; nats", heads, rows)
    if result["at_equal_kl"]:
        yield terminal.table(
            f"Ratio at the KL divergence of {points[0]['preset']}",
            ["preset", "ratio of", "KL", points[0]["preset"], "ratio", "gain"],
            [
                [
                    row["preset"],
                    "coded tokens" if row["of"] == "coded_ratio" else "stream",
                    f"{row['kl_divergence']:.3g}",
                    f"{row['baseline_ratio']:.2f}×",
                    *(
                        [row["ratio"], ""]
                        if row["gain"] is None
                        else [f"{row['ratio']:.2f}×", f"{row['gain'] - 1:+.1%}"]
                    ),
                ]
                for row in result["at_equal_kl"]
            ],
        )


def draw(result: dict[str, Any], path: str) -> None:
    """Plot KL divergence over ratio, a colour per preset."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for i, preset in enumerate(dict.fromkeys(point["preset"] for point in result["points"])):
        means = [point["mean"] for point in result["points"] if point["preset"] == preset]
        for of, style, what in (("coded_ratio", "o-", "coded tokens"), ("ratio", "o:", "stream")):
            line = sorted((mean[of], mean["kl_divergence"]) for mean in means)
            axis.loglog(*zip(*line, strict=True), style, color=f"C{i}", label=f"{preset}, {what}")
    axis.set(
        title=f"{result['model']['name']}, {result['judged']['context']:,} tokens of context",
        xlabel="ratio to bfloat16, every byte counted",
        ylabel="KL divergence of the next token, nats",
    )
    for side in (axis.xaxis, axis.yaxis):
        side.set(
            major_locator=LogLocator(subs=(1, 2, 5)),
            major_formatter=StrMethodFormatter("{x:g}"),
            minor_locator=NullLocator(),
        )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
