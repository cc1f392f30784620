"""Tasks with right answers: what is written, how it is scored, how sure the scores are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.cache_utils import DynamicCache  # noqa: E402

import kvtc_stream as kvtc  # noqa: E402
from kvtc_stream.cli import main  # noqa: E402
from kvtc_stream.evaluation import intervals, quality, tasks  # noqa: E402
from kvtc_stream.integrations.transformers import calibrate, load_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

#: A token is a byte, so that contexts are longer than a real model's.
CONTEXT = 1500
TEXT = "".join(f"Line {i} has {i * i} things, {i % 7} of them good.\n" for i in range(300))
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(model_folder, dtype="float32")


@pytest.fixture(params=[None, CHAT, NO_SYSTEM], ids=["plain", "chat", "no system prompts"])
def tokenizer(request: pytest.FixtureRequest, loaded: tuple[Any, Any]) -> Any:
    loaded[1].chat_template = request.param
    yield loaded[1]
    loaded[1].chat_template = None


def write(tokenizer: Any, task: str, *, seed: int = 0, context: int = CONTEXT) -> tasks.Problem:
    text = quality.token_ids(tokenizer, TEXT)
    return next(tasks.write_problems(tokenizer, [text], task, context, 1, seed))


# What is written.


@pytest.mark.parametrize("task", tasks.TASKS)
def test_contexts_are_as_long_as_asked_for_and_seeds_make_them_again(
    tokenizer: Any, task: str
) -> None:
    first, again, other = (write(tokenizer, task, seed=seed) for seed in (1, 1, 2))

    assert len(first.context) == len(other.context) == CONTEXT
    assert (first.context == again.context).all()
    assert (first.context != other.context).any()
    assert first.questions
    for question, same in zip(first.questions, again.questions, strict=True):
        assert (question.prompt == same.prompt).all()
        assert len(question.prompt) > 0
        for option, its in zip(question.options, same.options, strict=True):
            assert (option == its).all()
        spelt = [option.tobytes() for option in question.options]
        assert len(set(spelt)) == len(spelt)
        assert len(question.options[0]) > 0


@pytest.mark.parametrize(
    "task", ["single-key", "multi-key", "similar-keys", "multi-value", "system-prompt"]
)
def test_contexts_tell_each_answer_once(tokenizer: Any, task: str) -> None:
    problem = write(tokenizer, task)

    context = tokenizer.decode(problem.context)
    for question in problem.questions:
        options = [tokenizer.decode(option) for option in question.options]
        assert [context.count(option) for option in options] == [1] * len(options)


def test_facts_are_told_as_they_are_asked_for(tokenizer: Any) -> None:
    problem = write(tokenizer, "multi-key")

    context = tokenizer.decode(problem.context)
    for question in problem.questions:
        start = tokenizer.decode(question.prompt[-len("The secret number of Babababa is") :])
        assert context.count(start + tokenizer.decode(question.options[0])) == 1


def test_names_that_look_alike_differ_in_the_last_syllable(tokenizer: Any) -> None:
    problem = write(tokenizer, "similar-keys")

    names = [tokenizer.decode(q.prompt[-len("Bababa__ is") :]) for q in problem.questions]
    assert len(set(names)) == 8
    assert len({name[:6] for name in names}) == 2


def test_variables_lead_to_the_numbers_they_were_set_to(tokenizer: Any) -> None:
    problem = write(tokenizer, "variable-tracking")

    words = tokenizer.decode(problem.context).replace(".", "").split()
    told = {
        words[i + 1]: words[i + 4 if words[i + 3] == "VAR" else i + 3]
        for i, word in enumerate(words)
        if word == "VAR" and words[i + 2] == "="
    }
    for question in problem.questions:
        value = tokenizer.decode(question.prompt).split()[-2]
        while value in told:
            value = told[value]
        assert value == tokenizer.decode(question.options[0]).strip()


@pytest.mark.parametrize(("task", "asked"), [("common-words", 8), ("frequent-words", 6)])
def test_right_words_are_more_frequent_than_the_others(
    tokenizer: Any, task: str, asked: int
) -> None:
    problem = write(tokenizer, task, context=4000)

    words = tokenizer.decode(problem.context).split()
    assert len(problem.questions) == asked
    for question in problem.questions:
        right, *others = (words.count(tokenizer.decode(x).strip()) for x in question.options)
        assert right > max(others) >= 1


def test_copies_and_continuations_are_of_the_text(tokenizer: Any) -> None:
    copying, continuation = (write(tokenizer, task) for task in ("copying", "continuation"))

    for question in copying.questions:
        passage = np.concatenate([question.prompt[-24:], question.options[0]])
        assert tokenizer.decode(passage) in tokenizer.decode(copying.context)
        assert tokenizer.decode(passage) in TEXT
    whole = np.concatenate([continuation.context, continuation.questions[-1].prompt])
    for question in continuation.questions:
        right = np.concatenate([continuation.context, question.prompt, question.options[0]])
        assert tokenizer.decode(right) in TEXT
        assert (right[: len(whole)] == whole[: len(right)]).all()


def test_problems_are_written_around_texts_in_turn_until_enough_is_asked(
    loaded: tuple[Any, Any],
) -> None:
    texts = [quality.token_ids(loaded[1], letter * 3000) for letter in "ab"]

    written = list(tasks.write_problems(loaded[1], texts, "multi-key", CONTEXT, 17))

    assert [len(problem.questions) for problem in written] == [8, 8, 8]
    filled = [loaded[1].decode(problem.context) for problem in written]
    assert ["a" * 50 in text for text in filled] == [True, False, True]
    assert ["b" * 50 in text for text in filled] == [False, True, False]


def test_too_little_text_or_context_is_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="ask for a longer context"):
        write(loaded[1], "multi-key", context=300)
    with pytest.raises(ValueError, match="give a longer one"):
        write(loaded[1], "copying", context=len(TEXT) + 100)


# Answers.


def right_by_hand(model: Any, cache: DynamicCache, question: tasks.Question) -> bool:
    """One row at a time, and greedily where there are no options."""
    if len(question.options) == 1:
        found = quality.continue_greedily(model, cache, question.prompt, len(question.options[0]))
        return bool((found == question.options[0]).all())
    scores = []
    for option in question.options:
        ids = np.concatenate([question.prompt, option[:-1]])
        rows = quality.next_token_log_probabilities(model, cache, ids)[len(question.prompt) - 1 :]
        scores.append(float(rows.gather(1, torch.from_numpy(option)[:, None]).sum()))
    return scores.index(max(scores)) == 0


@pytest.mark.parametrize("together", [1, 1 << 30])
def test_questions_asked_together_are_answered_as_alone(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(tasks, "_TOGETHER", together)
    model, tokenizer = loaded
    problem = write(tokenizer, "common-words")
    cache = quality.prefill(model, problem.context)
    # What the model says by itself, so that some of the answers are right.
    said = quality.continue_greedily(model, cache, problem.questions[0].prompt, 3)
    wrong = tasks.Question(problem.questions[0].prompt, ((said + 1) % 256,))
    questions = [
        *problem.questions,
        tasks.Question(wrong.prompt, (said,)),
        wrong,
        replace(wrong, options=(said, *wrong.options)),
        replace(wrong, options=(*wrong.options, said)),
    ]

    found = tasks.answer(model, cache, questions)

    assert found.right.tolist() == [right_by_hand(model, cache, q) for q in questions]
    assert found.right.tolist()[-4:] == [True, False, True, False]
    assert len(found.log_probabilities) == len(questions)
    for question, p in zip(questions, found.log_probabilities, strict=True):
        ids = np.concatenate([question.prompt, question.options[0][:-1]])
        alone = quality.next_token_log_probabilities(model, cache, ids)
        torch.testing.assert_close(p, alone[len(question.prompt) - 1 :], rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == CONTEXT


def test_a_cache_that_is_restored_well_gives_the_same_answers(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    learnt = calibrate(model, [TEXT[5000:]], tokenizer=tokenizer, tokens=1000)
    problem = write(tokenizer, "similar-keys")
    codecs = [kvtc.Codec(learnt, ratio=ratio, window=0) for ratio in (2.5, 40)]

    with warnings.catch_warnings(action="ignore", category=kvtc.KVTCWarning):  # unlike texts
        exact, (fine, coarse) = tasks.measure(model, problem, codecs)

    assert exact.shape == fine.right.shape == (8,)
    assert 0 < fine.kl_divergence < coarse.kl_divergence / 3
    assert fine.statistics.ratio < coarse.statistics.ratio
    assert fine.statistics.coded_ratio == pytest.approx(2.5, rel=0.05)


# Scores.


def of(right: Sequence[bool], ratio: float = 8.0) -> Any:
    """An outcome, of which only answers and sizes are asked for."""
    sizes = type("Sizes", (), {"ratio": ratio, "coded_ratio": 2 * ratio})()
    return tasks.Outcome(np.array(right), 0.25, sizes)


def test_a_score_tells_what_was_lost_and_won() -> None:
    exact = [np.array([True, True, True, False]), np.array([True, True, True, True])]

    made = tasks.score(exact, [of([False, True, True, True], 6.0), of([True] * 4, 12.0)])

    assert (made.lost, made.won, made.difference.value) == (1, 1, 0)
    assert made.score.value == 7 / 8
    assert (made.ratio, made.coded_ratio) == pytest.approx((8, 16))  # of all bytes together
    assert made.kl_divergence == 0.25
    assert made.verdict == "within 1 point"


@pytest.mark.parametrize(
    ("exact", "restored", "verdict"),
    [
        (59, 20, "says nothing"),
        (60, 59, "within 1 point"),
        (60, 58, "in the interval"),
        (90, 60, "loss"),
        (60, 90, "gain"),
    ],
)
def test_verdicts(exact: int, restored: int, verdict: str) -> None:
    before, after = (np.arange(100) < right for right in (exact, restored))

    made = tasks.score([*before[:, None]], [of(x) for x in after[:, None]])

    assert made.verdict == verdict


# Intervals.


def test_intervals_of_rates_are_wilsons() -> None:
    found = intervals.rate(np.arange(200) < 180, np.arange(200))

    assert found.value == 0.9
    assert (found.low, found.high) == pytest.approx((0.8506, 0.9343), abs=3e-4)


def test_intervals_of_differences_have_a_width_where_nothing_changed() -> None:
    same = np.ones(200, bool)

    found = intervals.difference(same, same, np.arange(200))

    assert found.value == 0
    assert found.high == -found.low == pytest.approx(1.96 * np.sqrt(2 / 202 / 202), abs=1e-4)


@given(
    rates=st.tuples(st.floats(0.1, 0.5), st.floats(0.1, 0.5)),
    alike=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_groups_that_agree_widen_intervals_as_a_bootstrap_does(
    rates: tuple[float, float], alike: int, seed: int
) -> None:
    """Answers of a context that are all the same say no more than one of them."""
    rng = np.random.default_rng(seed)
    contexts = 300
    before, after = (np.repeat(rng.random(contexts) > rate, alike) for rate in rates)
    groups = np.repeat(np.arange(contexts), alike)
    change = (after.astype(float) - before).reshape(contexts, alike).mean(1)
    means = change[rng.integers(0, contexts, (2000, contexts))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])

    found = intervals.difference(before, after, groups)

    assert found.high - found.low == pytest.approx(high - low, rel=0.15)
    assert found.low <= found.value <= found.high
    widths = [
        interval.high - interval.low
        for interval in (
            intervals.rate(before, groups),
            intervals.rate(before[::alike], np.arange(contexts)),
        )
    ]
    assert widths[0] == pytest.approx(widths[1], rel=0.02)


@given(right=st.lists(st.booleans(), min_size=1, max_size=40), groups=st.integers(1, 5))
def test_intervals_are_within_bounds_and_hold_the_value(right: list[bool], groups: int) -> None:
    answers, which = np.array(right), np.arange(len(right)) % groups

    found = intervals.rate(answers, which)
    assert 0 <= found.low <= found.value <= found.high <= 1
    change = intervals.difference(answers, ~answers, which)
    assert -1 <= change.low <= change.high <= 1


# The command.


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "some.txt"
    path.write_text(TEXT * 2, encoding="utf-8")
    return str(path)


SMALL = ("--context", "900,1500", "--questions", "9", "--window", "0", "--tokens", "1500")


def test_command_end_to_end(
    model_folder: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "t.json", tmp_path / "t.png"
    command = ("bench", "tasks", "--model", str(model_folder), "--text", text, *SMALL)
    some = ("--tasks", "copying,frequent-words", "--ratios", "4,16", "--presets", "default")

    status = main([*command, *some, "--output", str(output), "--plot", str(plot)])

    printed = capsys.readouterr()
    assert status == 0
    # Short contexts are unlike the texts: one line for each task and length.
    assert printed.err.count("kvtc: warning: ") <= 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = json.loads(output.read_text(encoding="utf-8"))
    assert "tasks_to_come" not in result
    assert result["command"].startswith(f"kvtc bench tasks --model {model_folder.name} --text some")
    assert [(r["task"], r["context"], r["questions"], r["contexts"]) for r in result["tasks"]] == [
        ("copying", 900, 16, 2),
        ("frequent-words", 900, 12, 2),
        ("copying", 1500, 16, 2),
        ("frequent-words", 1500, 12, 2),
    ]
    for row in result["tasks"]:
        fine, coarse = row["points"]
        assert (fine["preset"], fine["target_ratio"], coarse["target_ratio"]) == ("default", 4, 16)
        assert 0 < fine["kl_divergence"] < coarse["kl_divergence"]
        assert fine["ratio"] < coarse["ratio"]
        for point in row["points"]:
            change = point["won"] - point["lost"]
            assert point["difference"]["value"] == pytest.approx(change / row["questions"])
            restored = row["exact"]["value"] + point["difference"]["value"]
            assert point["score"]["value"] == pytest.approx(restored)
            assert row["can_do"] == (row["exact"]["value"] >= 0.6)
            assert (point["verdict"] == "says nothing") == (not row["can_do"])
    assert all(f"{row['context']:,}" in printed.out for row in result["tasks"])
    assert "frequent-words" in printed.out
    assert "default at 16" in printed.out or not any(row["can_do"] for row in result["tasks"])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--tasks", "chess"], 2, "--tasks must be among single-key, "),
        (["--questions", "0"], 2, "--questions must be at least 1, found 0"),
        (["--context", "900,100"], 2, "--context must be at least "),
        (["--context", "90000"], 1, "the text has"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    model_folder: Path,
    text: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    command = ["bench", "tasks", "--model", str(model_folder), "--text", text, *arguments]

    assert main(command) == status
    assert message in capsys.readouterr().err
