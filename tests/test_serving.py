"""``kvtc bench serve``: what is asked, how it is asked, and what the answers say."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_stand_in import BROKEN, FIRST, NEXT, StandIn

from kvtc_stream.cli import bench_serve, main
from kvtc_stream.evaluation.serving import servers
from kvtc_stream.evaluation.serving.figures import Outcome, Slo, Spread, saturated, summarise
from kvtc_stream.evaluation.serving.load import Client
from kvtc_stream.evaluation.serving.trace import (
    Request,
    Shape,
    Trace,
    conversations_of,
    poisson_arrivals,
)

SOURCE = np.random.default_rng(0).integers(0, 1000, 5000)
STAND_IN = Path(__file__).with_name("serving_stand_in.py")
VLLM = shlex.join([sys.executable, str(STAND_IN), "--model"])


# What is asked.


@given(
    turns=st.integers(1, 4),
    fresh=st.sampled_from([0.0, 0.3]),
    zipf=st.sampled_from([None, 0.0, 1.5]),
    conversations=st.integers(1, 7),
    seed=st.integers(0, 100),
)
def test_what_is_reusable_was_sent(
    turns: int, fresh: float, zipf: float | None, conversations: int, seed: int
) -> None:
    shape = Shape(50, 7, 3, turns=turns, fresh=fresh, fresh_tokens=11, zipf=zipf)
    trace = Trace(SOURCE, shape, conversations, seed)
    sent = [request.prompt.tolist() for request in trace.fill()]
    assert len({tuple(x) for x in sent}) == conversations
    for request in trace.requests(30):
        prompt = request.prompt.tolist()
        assert len(prompt) + request.answer <= shape.longest
        if request.returning:
            assert any(prompt[: request.reusable] == x[: request.reusable] for x in sent)
            assert shape.context <= request.reusable < len(prompt)
        else:
            assert len(prompt) == 11
        sent.append(prompt)


def test_a_seed_gives_the_same_trace_however_it_is_cut() -> None:
    def prompts(*numbers: int, seed: int = 3) -> list[list[int]]:
        trace = Trace(SOURCE, Shape(50, turns=3), 5, seed)
        return [x.prompt.tolist() for n in numbers for x in trace.requests(n)]

    assert prompts(20) == prompts(5, 15)
    assert prompts(20) != prompts(20, seed=4)


def test_round_robin_takes_turns() -> None:
    trace = Trace(SOURCE, Shape(50, fresh=0, zipf=None), 3)
    begun = [x.prompt[:50].tolist() for n in (4, 5) for x in trace.requests(n)]
    assert begun[:3] == begun[3:6] == begun[6:]
    assert len({tuple(x) for x in begun}) == 3


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match=r"100 tokens of text are too few for 60 conversations"):
        Trace(SOURCE[:100], Shape(50), 60)


@given(st.integers(10**6, 10**12), st.integers(1, 10**6), st.integers(1, 10**5))
def test_working_sets_are_as_large_as_asked(size: int, token_bytes: int, context: int) -> None:
    found = conversations_of(size, token_bytes, context)
    assert found >= 1
    assert found == 1 or abs(found * token_bytes * context - size) <= 0.51 * token_bytes * context


def test_arrivals_are_poisson() -> None:
    gaps = np.diff(poisson_arrivals(4.0, 20_000, 0))
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.05)  # as an exponential distribution has it


# What answers say.


@st.composite
def observed(draw: st.DrawFn) -> list[Outcome]:
    found = []
    for _ in range(draw(st.integers(1, 12))):
        reusable = draw(st.sampled_from([0, 5]))
        request = Request(np.arange(10), 3, reusable)
        due = draw(st.floats(0, 100))
        if draw(st.integers(0, 4)) == 0:
            found.append(Outcome(request, due, error="gone"))
            continue
        gaps = draw(st.lists(st.floats(1e-4, 5), min_size=1, max_size=5))
        times = tuple(due + np.cumsum(gaps))
        found.append(Outcome(request, due, times, len(times), draw(st.integers(0, 10))))
    return found


@given(observed(), st.floats(0.01, 10), st.floats(0.01, 10))
def test_figures_hang_together(outcomes: list[Outcome], ttft: float, itl: float) -> None:
    figures = summarise(outcomes, Slo(ttft, itl))
    assert figures["requests"] == len(outcomes)
    assert figures["failed"] == sum(bool(x.error) for x in outcomes)
    assert 0 <= figures["goodput_per_s"] <= figures["requests_per_s"] + 1e-12
    counts = {name: figures[name]["ttft"]["count"] for name in ("all", "returning", "fresh")}
    assert counts["all"] == counts["returning"] + counts["fresh"]
    assert counts["all"] == figures["requests"] - figures["failed"]
    looser = summarise(outcomes, Slo(2 * ttft, 2 * itl))
    assert looser["slo_met"] >= figures["slo_met"]
    if figures["hit_rate"] is not None:
        assert 0 <= figures["hit_rate"] <= 1
    json.dumps(figures, allow_nan=False)


@given(observed(), st.floats(-50, 50))
def test_when_it_begins_does_not_matter(outcomes: list[Outcome], shift: float) -> None:
    later = [
        replace(x, due=x.due + shift, times=tuple(t + shift for t in x.times)) for x in outcomes
    ]
    ours, theirs = (summarise(x, Slo(1e9, 1e9)) for x in (outcomes, later))
    assert ours["seconds"] == pytest.approx(theirs["seconds"], abs=1e-6)
    assert ours["all"]["ttft"]["count"] == theirs["all"]["ttft"]["count"]
    if ours["all"]["ttft"]["count"]:
        assert ours["all"]["ttft"]["p90"] == pytest.approx(theirs["all"]["ttft"]["p90"], abs=1e-6)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_rise(seconds: list[float]) -> None:
    found = Spread.of(seconds)
    assert found.p50 is not None
    assert found.p90 is not None
    assert found.p99 is not None
    assert min(seconds) <= found.p50 <= found.p90 <= found.p99 <= max(seconds)


def test_figures_of_a_run_that_is_known() -> None:
    old, new = Request(np.arange(100), 2, 60), Request(np.arange(20), 2)
    outcomes = [
        Outcome(old, 10.0, (11.0, 11.5), 2, 50),
        Outcome(new, 11.0, (11.25, 14.0), 2, 0),  # its second token comes late
        Outcome(old, 12.0, error="refused"),
    ]
    figures = summarise(outcomes, Slo(1.0, 0.5))
    assert figures["seconds"] == 4.0
    assert figures["requests_per_s"] == 0.5
    assert figures["tokens_per_s"] == 1.0
    assert figures["goodput_per_s"] == 0.25
    assert figures["hit_rate"] == pytest.approx(50 / 120)
    assert figures["possible_hit_rate"] == pytest.approx(60 / 120)
    assert figures["fresh"]["itl"]["p50"] == 2.75
    assert figures["returning"]["ttft"]["p50"] == 1.0
    assert saturated(figures, 0.5)  # one of three is in time
    assert not saturated(summarise(outcomes[:1], Slo(1.0, 0.5)), 0.5)


# How it is asked.


@pytest.fixture
def server() -> Iterator[tuple[str, StandIn]]:
    """A server in a thread: its URL, and what it keeps."""
    loop, stand_in, ready = asyncio.new_event_loop(), StandIn(), threading.Event()
    found: list[str] = []
    runner = web.AppRunner(stand_in.application())

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    yield found[0], stand_in
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_open_loop(server: tuple[str, StandIn]) -> None:
    url, stand_in = server
    requests = [Request(np.arange(n), 3) for n in (20, 40, BROKEN)]
    seen: list[tuple[int, int]] = []
    found = Client(url, "stand-in").open_loop(
        requests, [0.0, 0.05, 0.1], lambda done, total: seen.append((done, total))
    )
    assert [x.request for x in found] == requests
    assert found[2].error.startswith("status 400")
    for outcome in found[:2]:
        assert outcome.tokens == len(outcome.times) == 3
        # A server that waits so long is never earlier; how much later is the machine's affair.
        assert outcome.ttft >= FIRST
        assert outcome.times[-1] - outcome.due >= FIRST + 2 * NEXT
    assert found[1].due - found[0].due == pytest.approx(0.05)
    assert found[1].cached == 20
    assert len(stand_in.prompts) == 2
    assert seen[-1] == (3, 3)


def test_waiting_for_the_client_counts(server: tuple[str, StandIn]) -> None:
    """A request that is sent late has been due all the while."""

    async def too_long(seconds: float) -> None:
        await asyncio.sleep(seconds + 0.2)

    client = Client(server[0], "stand-in", sleep=too_long)
    [outcome] = client.open_loop([Request(np.arange(20), 1)], [0.0])
    assert outcome.ttft >= 0.2 + FIRST


def test_closed_loop_asks_no_more_than_its_users(server: tuple[str, StandIn]) -> None:
    url, stand_in = server
    requests = [Request(np.arange(100 * i, 100 * i + 30), 2) for i in range(5)]
    found = Client(url, "stand-in").closed_loop(requests, 1)
    assert [x.request for x in found] == requests
    assert stand_in.prompts == [x.prompt.tolist() for x in requests]
    for before, after in pairwise(found):
        assert after.due >= before.times[-1]


def test_no_server() -> None:
    [outcome] = Client("http://127.0.0.1:9", "x").closed_loop([Request(np.arange(5), 1)], 1)
    assert outcome.error


def test_tokens_of_text(server: tuple[str, StandIn]) -> None:
    found = Client(server[0], "stand-in").tokenise(["a" * 3000, "never read"], 2500)
    assert found == [97] * 3000


# Servers.


def test_counters() -> None:
    text = (
        '# HELP vllm:kvtc_loaded_pages x\nvllm:kvtc_loaded_pages_total{engine="0"} 3.0\n'
        'vllm:kvtc_loaded_pages_total{engine="1"} 4.0\nvllm:kvtc_loaded_pages_created 1e9\n'
        "other_total 7\n"
    )
    assert dict(servers.read_counters(text, ["vllm:kvtc_"])) == {"vllm:kvtc_loaded_pages": 7.0}


def test_arms_have_the_same_memory(tmp_path: Path) -> None:
    for gpu in (False, True):
        raw, fp8, ours = (
            servers.make_arm(name, 10**9, gpu=gpu, calibration="c", ratio=8, folder=tmp_path)
            for name in ("raw", "fp8", "kvtc")
        )
        configs = [
            json.loads(arm.words[1])["kv_connector_extra_config"] for arm in (raw, fp8, ours)
        ]
        assert configs[0]["cpu_bytes_to_use"] == configs[1]["cpu_bytes_to_use"] == 10**9
        assert configs[2]["budget_gb"] == 1
        assert ("spec_name" in configs[0]) is not gpu
        assert fp8.words[2:] == ("--kv-cache-dtype", "fp8")


def test_more_settings_of_the_connector(tmp_path: Path) -> None:
    settings = {"page_tokens": 256, "error_bound": None}
    arm = servers.make_arm(
        "kvtc", 10**9, gpu=True, calibration="c", ratio=8, settings=settings, folder=tmp_path
    )
    config = json.loads(arm.words[1])["kv_connector_extra_config"]
    assert config.items() >= settings.items()
    assert config["ratio"] == 8
    assert "page_tokens 256, error_bound null" in arm.about


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    arm = servers.Arm("recompute", "")
    with (
        open(tmp_path / "log", "wb") as log,
        pytest.raises(OSError, match="the server of recompute ended with 3"),
        servers.started(VLLM, "model", arm, ["--fail"], log),
    ):
        pass


# The command.

SMALL = [
    *("--token-bytes", "1000", "--budget-gb", "0.0001", "--context", "50", "--requests", "6"),
    *("--users", "2", "--rates", "20,40", "--slo-ttft", "60", "--slo-itl", "60"),
]


def command(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["bench", "serve", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_servers_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "x.json", tmp_path / "x.png"
    words = ["--model", "m", "--vllm", VLLM, "--arms", "recompute,raw", "--working-sets", "1,2"]
    files = ["--output", str(output), "--plot", str(plot)]
    found = command(capsys, *words, *SMALL, *files)
    assert json.loads(output.read_text()) == found
    assert plot.stat().st_size > 10_000
    assert [arm["name"] for arm in found["arms"]] == ["recompute", "raw"]
    for arm in found["arms"]:
        assert arm["version"] == "1.2.3"
        assert [case["conversations"] for case in arm["cases"]] == [2, 4]
        for case in arm["cases"]:
            for step in [*case["open_loop"], case["closed_loop"]]:
                assert step["failed"] == 0
                assert step["slo_met"] == 1
                # The stand-in has read what was sent before, and chance may make more of it alike.
                assert step["hit_rate"] >= step["possible_hit_rate"]
                assert step["cpu_seconds"] >= 0
                assert step["counters"]["prefix_cache_queries"] > 0
        assert arm["cases"][0]["held_bytes"] == (100_000 if arm["name"] == "raw" else 0)


def test_an_arm_that_cannot_run_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "m", "--vllm", VLLM, "--working-sets", "1", *SMALL]
    found = command(capsys, *words, "--arms", "fp8,recompute", "--plot", str(tmp_path / "x.png"))
    fp8, recompute = found["arms"]
    assert "the server of fp8 ended with 3" in fp8["left_out"]
    assert recompute["cases"][0]["open_loop"]
    assert main(["bench", "serve", *words, "--arms", "fp8,recompute"]) == 0
    assert "the server of fp8 ended with 3" in capsys.readouterr().out.replace("\n", " ")
    assert main(["bench", "serve", *words, "--arms", "fp8"]) == 1
    assert "no arm could be measured: the server of fp8 ended" in capsys.readouterr().err


def test_servers_by_url(
    server: tuple[str, StandIn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Every boat carries a log. " * 40)
    words = ["--url", f"one={server[0]}", "--text", str(text), "--working-sets", "1"]
    assert main(["bench", "serve", *words, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "Arriving at random" in shown
    assert "Users who wait" in shown


def test_gpus_are_named(
    server: tuple[str, StandIn],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    words = ["--url", f"one={server[0]}", "--working-sets", "1", *SMALL, "--requests", "1"]
    for script, expected in (("echo NVIDIA H200", ["NVIDIA H200"]), ("echo no driver; exit 9", [])):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        *gpus, _, cores = command(capsys, *words)["device"].split(", ")
        assert gpus == expected
        assert cores == f"{os.cpu_count()} cores"


def test_rates_are_found(server: tuple[str, StandIn], capsys: pytest.CaptureFixture[str]) -> None:
    """From half of what one user gets, doubled until half miss the limit."""
    small = [*SMALL, "--slo-ttft", "0.02", "--users", "0", "--working-sets", "1"]
    small[small.index("--rates") : small.index("--rates") + 2] = []
    found = command(capsys, "--url", f"one={server[0]}", *small)
    [case] = found["arms"][0]["cases"]
    assert len(case["open_loop"]) == 1  # no first token comes within 20 ms
    assert case["open_loop"][0]["slo_met"] == 0
    assert case["closed_loop"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m"], "give --calibration, or --token-bytes"),
        (["--model", "m", "--token-bytes", "1"], "the arm kvtc needs --calibration"),
        (["--model", "m", "--token-bytes", "1", "--arms", "x"], "arms are recompute, raw"),
        (["--url", "http://x", "--token-bytes", "1"], "--url takes NAME=URL"),
        (["--url", "a=http://x", "--token-bytes", "1", "--rates", "2,1"], "--rates must rise"),
        (["--url", "a=http://x", "--token-bytes", "1", "--fresh", "1"], "--fresh must be"),
        (["--url", "a=http://x", "--token-bytes", "1", "--turns", "0"], "--turns must be"),
    ],
)
def test_wrong_use(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *words]) in (1, 2)
    assert message in capsys.readouterr().err


@settings(max_examples=5)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=4))
def test_the_best_step(goodput: list[float]) -> None:
    case = {"open_loop": [{"goodput_per_s": x} for x in goodput]}
    assert bench_serve.best(case)["goodput_per_s"] == max(goodput)
