"""``kvtc bench quality``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean, harmonic_mean
from typing import Any

from rich.progress import Progress
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.cli import bench, terminal
from kvtc_stream.evaluation import quality

#: What other presets are compared with, unless another one is named first.
_BASELINE = "paper"


def run(args: Namespace) -> int:
    """Measure; see ``kvtc bench quality --help``."""
    bench.check_positive(args, "following")
    presets = bench.check(
        args, sorted(kvtc.PRESETS, key=lambda name: name != _BASELINE), [args.context]
    )
    return bench.report(args, lambda bars: _measure(args, presets, bars), draw, _tables)


# Measuring.


def _measure(args: Namespace, presets: Sequence[str], bars: Progress) -> Iterator[dict[str, Any]]:
    """What is known after each text, for those who stop before the last one."""
    from kvtc_stream.integrations.transformers.geometry import check_length

    to_learn, to_judge = bench.texts(args)
    model, tokenizer, name = bench.load(args, bars)
    prompts, needed = {}, args.context + args.following + 1
    check_length(model, needed - 1)
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
    calibration = bench.calibrated(args, model, tokenizer, to_learn, name, bars)
    codecs = bench.planned(args, calibration, presets, bars)
    points: list[dict[str, Any]] = [
        {"preset": codec.preset, "target_ratio": codec.ratio, "texts": []} for codec in codecs
    ]
    described, texts = bench.described(args, model, name, calibration), []
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
        yield (
            ({"texts_to_come": to_come} if to_come else {})
            | described
            | {
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
        )


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


# Results.


def _tables(result: dict[str, Any]) -> Iterable[Table]:
    judged, points = result["judged"], result["points"]
    exact, retrieval = judged["mean"], "facts_found" in judged["mean"]
    yield bench.about(
        result,
        f"{', '.join(text['text'] for text in judged['texts'])}: {judged['context']:,} tokens of "
        f"context, {judged['sinks']} sinks and a window of {judged['window']} kept; the next "
        f"{judged['following']} tokens predicted",
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
