"""Measuring what compressed caches do to a model, on a tiny one with random weights."""

from __future__ import annotations

import json
import re
import shutil
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
from kvtc_stream.cli import bench_quality, main  # noqa: E402
from kvtc_stream.evaluation import quality  # noqa: E402
from kvtc_stream.integrations.transformers import (  # noqa: E402
    calibrate,
    encode_cache,
    load_model,
)
from kvtc_stream.stream.codec import PRESETS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 500
TEXT = "".join(f"Line {i} has {i * i} things, {i % 7} of them good.\n" for i in range(300))


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(model_folder, dtype="float32")


@pytest.fixture(scope="module")
def learnt(loaded: tuple[Any, Any]) -> kvtc.Calibration:
    model, tokenizer = loaded
    return calibrate(model, [TEXT[5000:]], tokenizer=tokenizer, tokens=1000)


def ids_of(loaded: tuple[Any, Any], text: str = TEXT) -> np.ndarray:
    return quality.token_ids(loaded[1], text)


# Text.


@given(
    length=st.integers(0, 500),
    tokens=st.integers(0, 600),
    longest=st.integers(1, 100),
)
def test_documents_are_spread_without_overlap(length: int, tokens: int, longest: int) -> None:
    documents = quality.spread_documents(np.arange(length), tokens, longest)

    read = np.concatenate([np.zeros(0, np.int64), *documents])
    assert len(read) == min(tokens, length)
    assert (np.diff(read) > 0).all()
    assert all(1 <= len(document) <= longest for document in documents)


class _Bytes:
    """A tokenizer that begins texts with BOS."""

    bos_token_id = 256

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        return {"input_ids": [256] * add_special_tokens + list(text.encode())}


def test_every_text_gives_its_share_to_calibration_and_every_document_begins_with_bos() -> None:
    documents = quality.calibration_documents(_Bytes(), ["a" * 9000, "b" * 9000], 5000)

    assert all(document[0] == 256 and len(document) <= 2048 for document in documents)
    read = np.concatenate([document[1:] for document in documents])
    assert [int((read == ord(c)).sum()) for c in "ab"] == [2500, 2500]


# Caches and predictions.


def test_predictions_from_a_cache_are_those_of_the_whole_text(loaded: tuple[Any, Any]) -> None:
    model, ids = loaded[0], ids_of(loaded)[:50]
    cache = quality.prefill(model, ids[:20])

    found = quality.next_token_log_probabilities(model, cache, ids[20:])

    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(ids)[None]).logits[0, 20:].log_softmax(-1)
    torch.testing.assert_close(found, expected)
    assert cache.get_seq_length() == 20


def test_greedy_continuation_is_that_of_the_whole_text(loaded: tuple[Any, Any]) -> None:
    model, ids = loaded[0], ids_of(loaded)[:50]
    cache = quality.prefill(model, ids[:40])

    found = quality.continue_greedily(model, cache, ids[40:], 12)
    ended = quality.continue_greedily(model, cache, ids[40:], 12, stop=int(found[5]))
    np.testing.assert_array_equal(ended, found[: found.tolist().index(found[5])])

    expected = ids
    with torch.inference_mode():
        for _ in range(12):
            likely = model(input_ids=torch.from_numpy(expected)[None]).logits[0, -1].argmax()
            expected = np.append(expected, int(likely))
    np.testing.assert_array_equal(found, expected[50:])
    assert cache.get_seq_length() == 40


def test_cast_cache_leaves_the_original(loaded: tuple[Any, Any]) -> None:
    cache = quality.prefill(loaded[0], ids_of(loaded)[:10])

    cast = quality.cast_cache(cache, torch.bfloat16)

    assert isinstance(cast, DynamicCache)
    for before, after in zip(cache.layers, cast.layers, strict=True):
        assert before.keys.dtype == torch.float32
        torch.testing.assert_close(after.keys, before.keys.bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(after.values, before.values.bfloat16(), rtol=0, atol=0)


def test_judge_by_hand() -> None:
    original = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    restored = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()

    judgement = quality.judge(original, restored, np.array([0, 1]))

    assert judgement.loss == pytest.approx(-(np.log(0.5) + np.log(0.8)) / 2)
    assert judgement.restored_loss == pytest.approx(-(np.log(0.25) + np.log(0.8)) / 2)
    assert judgement.loss_rise == pytest.approx(np.log(2) / 2)
    assert judgement.kl_worst == pytest.approx((0.5 - 0.25) * np.log(2))
    assert judgement.kl_divergence == pytest.approx(judgement.kl_worst / 2)
    assert judgement.same_top_token == 0.5


@given(st.integers(0, 2**32 - 1))
def test_rounding_leaves_no_negative_divergence(seed: int) -> None:
    a = torch.randn(8, 500, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    b = a + 1e-7

    judgement = quality.judge(a, b, np.zeros(8, np.int64))

    assert 0 <= judgement.kl_divergence <= judgement.kl_worst < 1e-5


def test_an_exact_copy_diverges_by_nothing(
    loaded: tuple[Any, Any], learnt: kvtc.Calibration
) -> None:
    # A bound that no coded token meets: all of them travel verbatim.
    codec = kvtc.Codec(learnt, "paper", ratio=8, error_bound=0, block_tokens=16, window=100)
    model, ids = loaded[0], ids_of(loaded)[:200]
    cache = quality.prefill(model, ids[:150], torch.bfloat16)

    with pytest.warns(kvtc.KVTCWarning, match="150 of 150 tokens are verbatim"):
        restored, _ = quality.round_trip(model, cache, codec, ids[:150])

    exact = quality.cast_cache(cache, model.dtype)
    a, b = (quality.next_token_log_probabilities(model, c, ids[150:199]) for c in (exact, restored))
    judgement = quality.judge(a, b, ids[151:])
    assert judgement.kl_divergence == judgement.kl_worst == judgement.loss_rise == 0
    assert judgement.same_top_token == 1


# One text through one codec.


def test_measurement_counts_every_byte_and_measures_coded_tokens(
    loaded: tuple[Any, Any], learnt: kvtc.Calibration
) -> None:
    model, ids = loaded[0], ids_of(loaded)[: CONTEXT + 41]
    codecs = [
        kvtc.Codec(learnt, "paper", ratio=ratio, window=32, block_tokens=64) for ratio in (4, 16)
    ]

    fine, coarse = quality.measure(model, ids, codecs, context=CONTEXT)

    cache = quality.prefill(model, ids[:CONTEXT], torch.bfloat16)
    stream = encode_cache(cache, codecs[1], model=model, token_ids=ids[:CONTEXT])
    assert coarse.statistics.stream_bytes == len(stream)
    assert coarse.statistics.cache_bytes == CONTEXT * 2 * 2 * 2 * 8 * 2
    assert 0 < fine.k_centred < coarse.k_centred
    assert 0 < fine.v_centred < coarse.v_centred
    assert fine.statistics.coded_ratio < coarse.statistics.coded_ratio
    assert 0 < fine.judgement.kl_divergence < coarse.judgement.kl_divergence
    assert fine.judgement.loss == coarse.judgement.loss


def test_sliding_layers_are_measured_by_what_they_hold() -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=100,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model, ids = transformers.Gemma3ForCausalLM(config).eval(), np.frombuffer(TEXT.encode(), "u1")
    learnt = calibrate(model, [ids[5000:7000].astype(np.int64)])
    codecs = [kvtc.Codec(learnt, "paper", ratio=r, window=0, block_tokens=64) for r in (3, 6)]

    fine, coarse = quality.measure(model, ids[:241].astype(np.int64), codecs, context=200)

    # Layers with K and V of 2 heads of 8 channels in bfloat16; the next token sees 99 before it.
    assert fine.statistics.cache_bytes == (99 + 200) * 2 * 2 * 8 * 2
    assert 0 < fine.k_centred < coarse.k_centred < 1
    assert 0 < fine.v_centred < coarse.v_centred < 1
    assert fine.judgement.kl_divergence > 0


def test_errors_are_centred_before_rope(loaded: tuple[Any, Any], learnt: kvtc.Calibration) -> None:
    model, ids = loaded[0], ids_of(loaded)[:196]
    cache = quality.prefill(model, ids, torch.bfloat16)
    codec = kvtc.Codec(learnt, "paper", ratio=8, window=0, block_tokens=32)
    restored, stream = quality.round_trip(model, cache, codec, ids)

    centred = dict(zip("kv", quality.centred_errors(cache, restored, stream, learnt), strict=True))

    angles = torch.outer(torch.arange(4, 196), 10_000 ** -(torch.arange(4) / 4)).double()
    for kind, name, angle in (("k", "keys", angles), ("v", "values", angles * 0)):
        x, y = (
            torch.stack([getattr(layer, name)[0, :, 4:].double() for layer in c.layers])
            for c in (cache, restored)
        )
        a, b = x[..., :4], x[..., 4:]
        straight = torch.cat(
            [a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1
        )
        [part] = [p for p in learnt.sections[0].basis("separate") if getattr(p, f"{kind}_layers")]
        mean = torch.from_numpy(part.mean).reshape(2, 2, 1, 8)
        expected = float((y - x).norm() / (straight - mean).norm())
        assert centred[kind] == pytest.approx(expected, rel=1e-4)


def test_too_short_texts_say_so(loaded: tuple[Any, Any], learnt: kvtc.Calibration) -> None:
    model, ids = loaded[0], ids_of(loaded)
    codec = kvtc.Codec(learnt, "paper", ratio=8)

    with pytest.raises(ValueError, match="found 101 tokens, expected 100 and at least two more"):
        next(quality.measure(model, ids[:101], [codec], context=100))
    with (
        pytest.warns(kvtc.KVTCWarning, match="too short to gain"),
        pytest.raises(ValueError, match="leaves nothing to code beside 4 sinks"),
    ):
        next(quality.measure(model, ids[:110], [codec], context=100))


# Retrieval.


@given(seed=st.integers(0, 2**32), length=st.integers(600, 2000), first=st.floats(0, 0.2))
def test_facts_are_where_they_were_asked_for(seed: int, length: int, first: float) -> None:
    depths = (first, 0.5, 0.8)
    ids = np.arange(1000, 1000 + length)  # unlike any byte

    planted, facts = quality.plant_facts(_Bytes(), ids, seed=seed, depths=depths)

    expected = ids.copy()
    for depth, fact in zip(depths, facts, strict=True):
        told = bytes([*fact.question, *fact.answer, *b".\n\n"])
        assert re.fullmatch(rb"\n\nThe secret number of [A-Z][a-z]{7} is \d{5}\.\n\n", told)
        assert len(fact.answer) == 6
        expected[round(depth * length) :][: len(told)] = list(told)
    np.testing.assert_array_equal(planted, expected)


def test_facts_depend_on_the_seed_alone() -> None:
    def planted(seed: int) -> list[int]:
        return quality.plant_facts(_Bytes(), np.zeros(900, int), seed=seed)[0].tolist()

    assert planted(1) == planted(1) != planted(2)


def test_facts_need_room() -> None:
    with pytest.raises(ValueError, match=r"does not fit at 0\.3 of a text of 100 tokens"):
        quality.plant_facts(_Bytes(), np.zeros(100, np.int64), seed=0)


def test_an_answer_counts_when_greedy_decoding_gives_it(loaded: tuple[Any, Any]) -> None:
    model, ids = loaded[0], ids_of(loaded)[:300]
    question = ids_of(loaded, "The number is")
    cache = quality.prefill(model, ids)
    greedy = quality.continue_greedily(model, cache, question, 6)
    off = greedy.copy()
    off[3] ^= 1

    found = quality.retrieve(model, cache, [quality.Fact(question, x) for x in (greedy, off)])

    assert found.facts_found == 0.5
    expected = []
    for answer in (greedy, off):
        whole = torch.from_numpy(np.concatenate([ids, question, answer]))
        with torch.inference_mode():
            logits = model(input_ids=whole[None]).logits[0, -7:-1].log_softmax(-1)
        expected.append(float(logits.gather(1, torch.from_numpy(answer)[:, None]).sum()))
    assert found.fact_log_probability == pytest.approx(np.mean(expected), rel=1e-4)


# Comparison.


def test_ratio_is_interpolated_between_logarithms() -> None:
    curve = [(10.0, 0.01), (40.0, 0.16), (20.0, 0.04)]  # KL goes with the ratio squared

    assert quality.ratio_at_kl(curve, 0.01) == pytest.approx(10)
    assert quality.ratio_at_kl(curve, 0.02) == pytest.approx(10 * np.sqrt(2))
    assert quality.ratio_at_kl(curve, 0.09) == pytest.approx(30)
    assert quality.ratio_at_kl(curve, 0.16) == pytest.approx(40)


def test_nothing_is_extrapolated() -> None:
    curve = [(10.0, 0.01), (20.0, 0.04)]

    assert quality.ratio_at_kl(curve, 0.009) == "below range"
    assert quality.ratio_at_kl(curve, 0.041) == "above range"
    assert quality.ratio_at_kl([(10.0, 0.01)], 0.01) == 10
    assert quality.ratio_at_kl([(10.0, 0.01)], 0.02) == "above range"


def test_points_without_divergence_have_no_logarithm() -> None:
    curve = [(5.0, 0.0), (10.0, 0.01), (20.0, 0.04), (2.0, -1e-9)]

    assert quality.ratio_at_kl(curve, 0.02) == pytest.approx(10 * np.sqrt(2))
    assert quality.ratio_at_kl(curve, 0.005) == "below range"
    assert quality.ratio_at_kl(curve, 0.0) == quality.ratio_at_kl(curve, -1e-9) == "below range"
    assert quality.ratio_at_kl([(5.0, 0.0)], 0.01) == "above range"


def test_divergences_of_equal_logarithms_give_the_lower_ratio() -> None:
    above = float(np.nextafter(1e-5, 1))
    assert np.log(above) == np.log(1e-5)

    assert quality.ratio_at_kl([(5.0, 1e-5), (9.0, above)], above) == 5
    assert quality.ratio_at_kl([(5.0, 5e-324), (9.0, 1.0)], 1.0) == pytest.approx(9)


@given(
    st.lists(st.tuples(st.floats(1, 100), st.floats(-1e-6, 1)), min_size=1, max_size=6),
    st.floats(-1e-6, 1),
)
def test_a_found_ratio_is_within_the_measured_ones(
    curve: list[tuple[float, float]], kl: float
) -> None:
    found = quality.ratio_at_kl(curve, kl)

    if not isinstance(found, str):
        ratios = [ratio for ratio, _ in curve]
        assert min(ratios) * (1 - 1e-9) <= found <= max(ratios) * (1 + 1e-9)


def test_of_several_ratios_with_the_same_divergence_the_lowest_counts() -> None:
    curve = [(10.0, 0.01), (20.0, 0.04), (40.0, 0.02), (80.0, 0.08)]

    assert quality.ratio_at_kl(curve, 0.04) == 20


def _point(preset: str, target: float, ratio: float, kl: float) -> dict[str, Any]:
    return {
        "preset": preset,
        "target_ratio": target,
        "mean": {"ratio": ratio, "kl_divergence": kl},
    }


def test_presets_are_compared_at_the_divergence_of_the_first() -> None:
    points = [
        _point("first", 8, 10, 0.04),
        _point("first", 16, 20, 0.3),
        _point("other", 8, 15, 0.01),
        _point("other", 16, 30, 0.04),
    ]

    inside, above = bench_quality.at_equal_kl(points, "ratio")

    assert (inside["preset"], inside["kl_divergence"]) == ("other", 0.04)
    assert (inside["baseline_ratio"], inside["ratio"]) == (10, pytest.approx(30))
    assert inside["gain"] == pytest.approx(3)
    assert (above["ratio"], above["gain"]) == ("above range", None)
    assert bench_quality.at_equal_kl(points[:2], "ratio") == []


# The command.


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    names = [str(tmp_path / "some.txt"), str(tmp_path / "other.txt")]
    Path(names[0]).write_text(TEXT, encoding="utf-8")
    Path(names[1]).write_text(TEXT.upper(), encoding="utf-8")
    return names


SMALL = ["--ratios", "4,16", "--context", "800", "--following", "60", "--tokens", "1500"]


def test_command_end_to_end(
    model_folder: Path,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kvtc, "PRESETS", PRESETS | {"twin": PRESETS["paper"]}, raising=False)
    monkeypatch.setattr("kvtc_stream.stream.codec.PRESETS", kvtc.PRESETS)
    output, plot = tmp_path / "q.json", tmp_path / "q.png"

    status = main(
        [
            *("bench", "quality", "--model", str(model_folder), "--text", *texts, *SMALL, "--json"),
            *("--presets", "paper,twin", "--output", str(output), "--plot", str(plot)),
        ]
    )

    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    result = json.loads(printed.out)
    assert result == json.loads(output.read_text(encoding="utf-8"))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in printed.out
    assert str(model_folder) not in printed.out
    assert result["command"] == (
        f"kvtc bench quality --model {model_folder.name} --text some.txt other.txt --ratios 4,16 "
        "--context 800 --following 60 --tokens 1500 --json --presets paper,twin --output q.json "
        "--plot q.png"
    )
    assert [(p["preset"], p["target_ratio"]) for p in result["points"]] == [
        ("paper", 4),
        ("paper", 16),
        ("twin", 4),
        ("twin", 16),
    ]
    for point in result["points"]:
        assert [text["text"] for text in point["texts"]] == ["some.txt", "other.txt"]
        mean = point["mean"]
        sizes = [(t["cache_bytes"], t["stream_bytes"]) for t in point["texts"]]
        assert mean["ratio"] == pytest.approx(sum(c for c, _ in sizes) / sum(s for _, s in sizes))
        kls = [t["kl_divergence"] for t in point["texts"]]
        assert mean["kl_divergence"] == pytest.approx(sum(kls) / 2)
        assert mean["kl_worst"] == max(t["kl_worst"] for t in point["texts"])
        assert mean["kl_worst"] > mean["kl_divergence"] > 0
        assert mean["coded_ratio"] > mean["ratio"]
        assert 0 <= mean["facts_found"] <= 1
        assert mean["fact_log_probability"] < 0
    fine, coarse = (p["mean"]["kl_divergence"] for p in result["points"][:2])
    assert coarse > fine
    # A preset against itself; but for the name in the header.
    assert [row["gain"] for row in result["at_equal_kl"]] == pytest.approx([1] * 4, rel=1e-3)


def test_what_was_measured_is_kept(
    model_folder: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour is not lost to what happens in its last minute."""
    measured = quality.measure
    calls: list[Any] = []

    def measure(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*arguments, **options)

    monkeypatch.setattr(quality, "measure", measure)
    output = tmp_path / "q.json"
    command = ("bench", "quality", "--model", str(model_folder), "--text", *texts, *SMALL)
    status = main([*command, "--presets", "paper", "--no-retrieval", "--output", str(output)])
    assert status != 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["texts_to_come"] == ["other.txt"]
    assert [t["text"] for t in result["points"][0]["texts"]] == ["some.txt"]


def test_command_prints_tables_of_other_judged_texts(
    model_folder: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "cal.safetensors"
    command = [
        "bench",
        "quality",
        "--model",
        str(model_folder),
        "--judge-text",
        texts[1],
        "--ratios",
        "4",
    ]
    command += ["--context", "400", "--following", "30", "--no-retrieval", "--presets", "paper"]

    status = main(
        [*command, "--text", texts[0], "--tokens", "1000", "--save-calibration", str(saved)]
    )
    first = capsys.readouterr()
    again = main([*command, "--calibration", str(saved)])
    second = capsys.readouterr()

    assert (status, first.err, again, second.err) == (0, "", 0, "")
    assert "other.txt: 400 tokens of context, 4 sinks and a window of 1" in first.out
    assert "some.txt" not in first.out
    assert "found" not in first.out
    # The calibration is the same, so all figures are.
    assert second.out == first.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text FILE"),
        (["--judge-text", "a"], "needs --text to calibrate on"),
        (["--text", "a", "--presets", "no-such"], "--presets must be among paper"),
        (["--text", "a", "--ratios", "8,0"], "--ratios must be positive"),
        (["--text", "a", "--ratios", "8,inf"], "--ratios must be positive and finite"),
        (["--text", "a", "--context", "132"], "--context must be at least 133, sinks, window"),
        (["--text", "a", "--following", "0"], "--following must be at least 1"),
        (["--text", "a", "--calibration", "c", "--tokens", "9"], "leave out --tokens"),
        (["--judge-text", "a", "--calibration", "c", "--importance", "none"], "--importance, "),
        (["--text", "a", "--importance-documents", "0"], "--importance-documents must be at least"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_texts_of_one_name_are_told_apart(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("a", TEXT), ("b", TEXT.upper()), (".hidden", "x")):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "same.txt").write_text(text, encoding="utf-8")

    status = main(
        [
            *("bench", "quality", "--model", str(model_folder), "--text", str(tmp_path / "texts")),
            *(*SMALL, "--ratios", "8", "--no-retrieval", "--json"),
        ]
    )

    result = json.loads(capsys.readouterr().out)
    names = ["a/same.txt", "b/same.txt"]
    assert status == 0
    assert [text["text"] for text in result["judged"]["texts"]] == names
    a, b = result["points"][0]["texts"]
    assert [a["text"], b["text"]] == names
    assert a["kl_divergence"] != b["kl_divergence"]


@pytest.mark.parametrize("copied", [False, True])
def test_nothing_is_judged_that_calibrates(
    texts: list[str], tmp_path: Path, copied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = tmp_path / "copy.txt" if copied else Path(texts[1])
    if copied:
        judged.write_bytes(Path(texts[1]).read_bytes())

    status = main(["bench", "quality", "--text", str(tmp_path), "--judge-text", str(judged)])

    assert status == 2
    assert f"{judged.name} is among the texts to calibrate on" in capsys.readouterr().err


def test_what_is_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture").write_bytes(b"\x89PNG")

    assert main(["bench", "quality", "--text", str(tmp_path / "empty")]) == 1
    assert "empty is a folder without files" in capsys.readouterr().err
    assert main(["bench", "quality", "--text", str(tmp_path / "picture")]) == 1
    assert "picture is no UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["quality", "tasks"])
def test_contexts_beyond_learned_positions_fail_before_calibration(
    model_folder: Path,
    texts: list[str],
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "gpt2")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 256, "n_positions": 803}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for context in ("800", "1000"):  # what is asked after 800 does not fit
        arguments = ["--model", str(folder), "--text", *texts, "--context", context]
        assert main(["bench", kind, *arguments]) == 1
        message = capsys.readouterr().err
        assert "kvtc: error: GPT2LMHeadModel reads 803 tokens at most, found" in message


def test_short_texts_fail_before_calibration(
    model_folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["bench", "quality", "--model", str(model_folder), "--text", *texts])

    assert status == 1
    message = capsys.readouterr().err
    assert re.search(r"some\.txt has \d+ tokens to judge on, expected 3585", message)
