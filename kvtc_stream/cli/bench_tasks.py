"""``kvtc bench tasks``."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.cli import bench, terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.errors import KVTCWarning
from kvtc_stream.evaluation import quality, tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Verdicts of a codec that a task tells no loss of.
_KEPT = ("within 1 point", "in the interval", "gain")


def run(args: Namespace) -> int:
    """Measure; see ``kvtc bench tasks --help``."""
    bench.check_positive(args, "questions")
    names = args.tasks or list(tasks.TASKS)
    if unknown := [name for name in names if name not in tasks.TASKS]:
        raise UsageError(f"--tasks must be among {', '.join(tasks.TASKS)}, found {unknown[0]}")
    presets = bench.check(args, sorted(kvtc.PRESETS), args.context)
    return bench.report(args, lambda bars: _measure(args, names, presets, bars), draw, _tables)


def _measure(
    args: Namespace, names: Sequence[str], presets: Sequence[str], bars: Progress
) -> Iterator[dict[str, Any]]:
    """What is known after each context, for those who stop before the last one."""
    from kvtc_stream.integrations.transformers.geometry import check_length

    to_learn, to_judge = bench.texts(args)
    model, tokenizer, name = bench.load(args, bars)
    ids = [quality.token_ids(tokenizer, text) for text in to_judge.values()]
    wanted = [(task, context) for context in args.context for task in names]
    for task, context in wanted:  # what does not fit is found before calibrating
        for text in ids:
            problem = next(tasks.write_problems(tokenizer, [text], task, context, 1))
            check_length(model, problem.tokens)
    calibration = bench.calibrated(args, model, tokenizer, to_learn, name, bars)
    codecs = bench.planned(args, calibration, presets, bars)
    described = bench.described(args, model, name, calibration)
    bar = bars.add_task("Asking", total=args.questions * len(wanted))
    done: list[dict[str, Any]] = []
    for number, (task, context) in enumerate(wanted):
        bars.update(bar, description=f"{task}, {context:,} tokens")
        row: dict[str, Any] = {}
        for row in _ask(args, model, tokenizer, ids, task, context, codecs):
            asked = min(row["questions"], args.questions)
            bars.update(bar, completed=args.questions * number + asked)
            ended = row["questions"] >= args.questions
            to_come = [f"{task}, {context}" for task, context in wanted[number + ended :]]
            yield (
                ({"tasks_to_come": to_come} if to_come else {})
                | described
                | {
                    "judged": {
                        "texts": list(to_judge),
                        "sinks": codecs[0].sinks,
                        "window": args.window,
                        "cache_dtype": "bfloat16",
                        "seed": args.seed,
                    },
                    "tasks": [*done, row],
                }
            )
        done.append(row)


def _ask(
    args: Namespace,
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[quality.Ids],
    task: str,
    context: int,
    codecs: Sequence[kvtc.Codec],
) -> Iterator[dict[str, Any]]:
    """The figures of a task, after each of its contexts."""
    exact, outcomes, complaints = [], [], []
    for problem in tasks.write_problems(tokenizer, texts, task, context, args.questions, args.seed):
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", category=KVTCWarning)
            right, restored = tasks.measure(model, problem, codecs)
        complaints += [str(warning.message) for warning in caught]
        exact.append(right)
        outcomes.append(restored)
        score = tasks.exact_score(exact)
        yield {
            "task": task,
            "context": context,
            "contexts": len(exact),
            "questions": sum(map(len, exact)),
            "options": len(problem.questions[0].options),
            "exact": asdict(score),
            "can_do": tasks.can_do(score),
            "points": [
                {"preset": codec.preset, "target_ratio": codec.ratio}
                | asdict(tasks.score(exact, of_codec))
                for codec, of_codec in zip(codecs, zip(*outcomes, strict=True), strict=True)
            ],
        }
    if complaints:  # one line for all
        warnings.warn(
            f"{task}, {context:,} tokens: {len(complaints)} warnings like: {complaints[0]}",
            KVTCWarning,
            stacklevel=1,
        )


# Results.


def _tables(result: dict[str, Any]) -> Iterable[Table]:
    judged, rows = result["judged"], result["tasks"]
    yield bench.about(
        result,
        f"contexts in {', '.join(judged['texts'])}; {judged['sinks']} sinks and a window of "
        f"{judged['window']} kept",
    )
    yield terminal.table(
        "Right answers from exact and restored caches, percent, with intervals of 95 %",
        [
            *("task", "context", "asked", "exact", "preset", "target", "stream", "KL"),
            *("restored", "difference", "verdict"),
        ],
        [
            [
                *(row["task"], f"{row['context']:,}", str(row["questions"])),
                _percent(row["exact"]),
                point["preset"],
                f"{point['target_ratio']:g}",
                f"{point['ratio']:.2f}×",
                f"{point['kl_divergence']:.3g}",
                f"{100 * point['score']['value']:.1f}",
                _difference(point["difference"]),
                point["verdict"],
            ]
            for row in rows
            for point in row["points"]
        ],
    )
    yield terminal.facts(_summary(rows))


def _summary(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    able = [row for row in rows if row["can_do"]]
    for points in zip(*(row["points"] for row in able), strict=True):
        kept = sum(point["verdict"] in _KEPT for point in points)
        yield (
            f"{points[0]['preset']} at {points[0]['target_ratio']:g}",
            f"within 1 point or in the interval on {kept} of {len(able)} tasks that the model can "
            f"do",
        )
    if silent := [row["task"] for row in rows if not row["can_do"]]:
        yield (
            "says nothing",
            f"{', '.join(dict.fromkeys(silent))}: below {tasks.CAN_DO:.0%} from the exact cache",
        )


def _percent(estimate: dict[str, float]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _difference(estimate: dict[str, float]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def draw(result: dict[str, Any], path: str) -> None:
    """Plot the difference of each task's scores with its interval, a colour per codec."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted(result["tasks"], key=lambda row: not row["can_do"])
    several = len({row["context"] for row in rows}) > 1
    codecs = [(point["preset"], point["target_ratio"]) for point in rows[0]["points"]]
    figure, axis = plt.subplots(
        figsize=(8, 1.6 + len(rows) * (0.22 + 0.14 * len(codecs))), layout="constrained"
    )
    axis.axvspan(-1, 1, color="0.92", label="within 1 point")
    axis.axvline(0, color="0.5", linewidth=0.8)
    for i, (preset, ratio) in enumerate(codecs):
        offset = 0.7 * ((i + 0.5) / len(codecs) - 0.5)
        for j, row in enumerate(rows):
            change = row["points"][i]["difference"]
            value, low, high = (100 * change[name] for name in ("value", "low", "high"))
            axis.errorbar(
                value,
                j + offset,
                xerr=[[value - low], [high - value]],
                fmt="o",
                markersize=4,
                color=f"C{i}",
                alpha=1 if row["can_do"] else 0.25,
                label=None if j else f"{preset} at {ratio:g} times",
            )
    names = [
        row["task"]
        + (f", {row['context']:,}" if several else "")
        + f": {row['exact']['value']:.0%}"
        + ("" if row["can_do"] else ", says nothing")
        for row in rows
    ]
    axis.set_yticks(range(len(rows)), names)
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color("black" if row["can_do"] else "0.6")
    axis.invert_yaxis()
    # Above the figure: the axis alone is narrower than such a title.
    figure.suptitle(f"{result['model']['name']}: right answers, restored less exact cache")
    axis.set(
        xlabel="points, with intervals of 95 %; beside each task, the score of the exact cache"
    )
    axis.grid(alpha=0.3, axis="x")
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)
