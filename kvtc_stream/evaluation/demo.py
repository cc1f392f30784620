"""The main job on a real model: calibrate, compress a cache, restore it, and ask both.

:func:`run` is ``kvtc demo``. Needs the ``demo`` extra; PyTorch is imported when first used.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import kvtc_stream as kvtc
from kvtc_stream.evaluation import smollm2
from kvtc_stream.evaluation.quality import (
    DOCUMENT_TOKENS,
    Judgement,
    cast_cache,
    continue_greedily,
    judge,
    next_token_log_probabilities,
    prefill,
    spread_documents,
    token_ids,
)
from kvtc_stream.formats import StreamFile
from kvtc_stream.integrations.transformers import load_model
from kvtc_stream.progress import Progress
from kvtc_stream.stream.statistics import StreamStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

#: Asked about the text that is judged, whose first part has the answers.
QUESTIONS = (
    "When was the lighthouse built?",
    "What is the prize of the festival?",
)
#: Standard library modules whose sources are read for calibration, and their share of the tokens.
_MODULES = ("argparse", "difflib", "doctest", "inspect", "statistics", "subprocess")
_MODULES_SHARE = 0.25
#: Documents that importance is learnt from: fewer than :func:`calibrate` takes, to be quicker.
_IMPORTANCE_DOCUMENTS = 4
#: Groups of layers with a basis each, and the share of their coefficients that a second level
#: transforms once more: nearly as small as one basis over all layers, in a fraction of the time.
_LAYER_GROUPS, _SECOND_LEVEL = 6, 3 / 8
#: Tokens of the cache by default: sinks, 14 whole blocks and the window.
_CONTEXT = 4 + 14 * 128 + 1
#: Tokens after the context that judge the caches.
_FOLLOWING = 384
#: Tokens of an answer at most.
_ANSWER_TOKENS = 48


def run(
    show: Callable[[str], AbstractContextManager[Progress]],
    *,
    ratio: float = 16.0,
    tokens: int = 12_288,
    context: int = _CONTEXT,
    model: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Demonstrate the main job on SmolLM2-135M.

    Parameters
    ----------
    show
        Called with what is done next; while its block runs, with work done and work in all.
    ratio
        Target of the codec, see :class:`kvtc_stream.Codec`.
    tokens
        Tokens to calibrate on, from Python's help and modules; below twice the width of a row
        (11,520) calibration warns.
    context
        Tokens of the cache that is compressed.
    model
        Another model: a folder or ``.gguf`` file that transformers reads.

    Returns
    -------
    dict
        What :func:`demonstrate` returns.

    Raises
    ------
    KVTCError
        The model could not be fetched, or the ``demo`` extra is not installed.
    ValueError
        The text is shorter than ``context`` asks for.
    """
    steps = Steps(show)
    if model is None:
        with steps.step("Fetching SmolLM2-135M") as advance:
            model = smollm2.model_file(advance)
    with steps.step(f"Loading {Path(model).stem}"):
        loaded, tokenizer = load_model(model, dtype="float32")
    prose, code, judged = texts()
    from_code = round(tokens * _MODULES_SHARE)
    return demonstrate(
        loaded,
        tokenizer,
        [
            *spread_documents(token_ids(tokenizer, prose), tokens - from_code, DOCUMENT_TOKENS),
            *spread_documents(token_ids(tokenizer, code), from_code, DOCUMENT_TOKENS),
        ],
        judged,
        ratio=ratio,
        context=context,
        name=Path(model).stem,
        steps=steps,
    )


def demonstrate(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Sequence[NDArray[np.int64]],
    text: str,
    *,
    ratio: float,
    context: int,
    steps: Steps,
    following: int = _FOLLOWING,
    questions: Sequence[str] = QUESTIONS,
    name: str | None = None,
) -> dict[str, Any]:
    """Calibrate on ``documents``, then compress, restore and judge the cache of ``text``.

    The cache is taken in bfloat16, as most models are served: ratios are relative to that, and the
    restored cache is compared with that.

    Parameters
    ----------
    model, tokenizer
        A causal model; its tokenizer, with a chat template if it has one.
    documents
        Token ids [tokens] each, to calibrate on.
    text
        What the user of the chat says: ``context`` tokens whose cache is compressed, then
        ``following`` + 1 that judge.
    ratio
        Target of the codec.
    steps
        Shows progress and takes times.
    questions
        To ask after the ``context`` tokens.
    name
        Of the model, to record.

    Returns
    -------
    dict
        JSON values: what was done, sizes in bytes, ratios with every byte counted (``coded``:
        without sinks and window), relative errors, loss in nats per token, mean KL divergence of
        the next-token distributions in nats, answers from both caches, seconds per step.
    """
    import torch

    before, after = _chat(tokenizer)
    ids = np.concatenate([_ids(tokenizer, before), _ids(tokenizer, text)])
    if len(ids) < context + following + 1:
        raise ValueError(
            f"the text has {len(ids)} tokens, expected at least {context + following + 1} for a "
            f"context of {context}: ask for a shorter one"
        )
    codec = _calibrated(model, documents, ratio, name, steps)
    with steps.step(f"Reading {context:,} tokens of other text"):
        cache = prefill(model, ids[:context], torch.bfloat16)
    restored, statistics = _round_trip(model, cache, codec, ids[:context], steps)
    cache = cast_cache(cache, model.dtype)
    with steps.step(f"Predicting the next {following} tokens from both"):
        seen, targets = ids[context:][:following], ids[context + 1 :][:following]
        exact, coded = (next_token_log_probabilities(model, c, seen) for c in (cache, restored))
        judgement = judge(exact, coded, targets)
    with steps.step(f"Asking both {len(questions)} questions"):
        answers = [
            {
                "question": question,
                "answer": _answer(model, tokenizer, cache, question + after),
                "restored_answer": _answer(model, tokenizer, restored, question + after),
            }
            for question in questions
        ]
    return {
        **_figures(codec, statistics, judgement),
        "judged_tokens": following,
        "answers": answers,
        "seconds": {name: round(seconds, 2) for name, seconds in steps.seconds.items()},
    }


def _calibrated(
    model: PreTrainedModel,
    documents: Sequence[NDArray[np.int64]],
    ratio: float,
    name: str | None,
    steps: Steps,
) -> kvtc.Codec:
    """A codec with its plan, calibrated on ``documents``."""
    from kvtc_stream.integrations.transformers import calibrate

    total = sum(map(len, documents))
    with steps.step(f"Calibrating on {total:,} tokens") as advance:
        calibration = calibrate(
            model,
            documents,
            tokens=total,
            importance_documents=_IMPORTANCE_DOCUMENTS,
            bases=("joint",),
            **_levels(model),
            progress=advance,
            name=name,
        )
    with steps.step(f"Planning for {ratio:g}×") as advance:
        codec = kvtc.Codec(calibration, ratio=ratio)
        codec.make_plan(advance)
    return codec


def _levels(model: PreTrainedModel) -> dict[str, Any]:
    """Options of the calibrator for a basis in two levels, where there are enough layers."""
    from kvtc_stream.integrations.transformers import geometry_of

    sections = geometry_of(model).sections
    if min(len(s.layers) for s in sections) < 2 * _LAYER_GROUPS:
        return {}
    width = min(s.k_width + s.v_width for s in sections)
    return {"layer_groups": _LAYER_GROUPS, "second_level": round(_SECOND_LEVEL * width)}


def _round_trip(
    model: PreTrainedModel,
    cache: DynamicCache,
    codec: kvtc.Codec,
    ids: NDArray[np.int64],
    steps: Steps,
) -> tuple[DynamicCache, StreamStatistics]:
    """What comes back from a file, in the model's dtype, and what the file took."""
    from kvtc_stream.integrations.transformers import decode_cache, encode_cache

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache.kvtc")
        with steps.step("Compressing the cache to a file"):
            encode_cache(cache, codec, path, model=model, token_ids=ids)
        with open(path, "rb") as file:
            statistics = StreamStatistics.of(StreamFile(file))
        with steps.step("Restoring it"):
            restored = decode_cache(
                path, codec.calibration, model=model, token_ids=ids, dtype=model.dtype
            )
    return restored, statistics


def _figures(codec: kvtc.Codec, s: StreamStatistics, judgement: Judgement) -> dict[str, Any]:
    calibration = codec.calibration
    return {
        "model": calibration.model.name,
        "calibration": {"tokens": calibration.tokens, "digest": calibration.digest.hex()},
        "codec": {
            "preset": codec.preset,
            "ratio": codec.ratio,
            "sinks": codec.sinks,
            "window": codec.window,
        },
        "tokens": s.tokens,
        "coded_tokens": s.coded_tokens,
        "cache_dtype": "bfloat16",
        "cache_bytes": s.cache_bytes,
        "stream_bytes": s.stream_bytes,
        "ratio": s.ratio,
        "coded_ratio": s.coded_ratio,
        "errors": {
            "k_mean": s.k_error_mean,
            "k_worst": s.k_error_worst,
            "v_mean": s.v_error_mean,
            "v_worst": s.v_error_worst,
        },
        "loss": judgement.loss,
        "restored_loss": judgement.restored_loss,
        "loss_rise": judgement.loss_rise,
        "kl_divergence": judgement.kl_divergence,
        "same_top_token": judgement.same_top_token,
    }


@dataclass
class Steps:
    """The steps of a long job, shown and timed.

    Attributes
    ----------
    seconds
        How long each step took, by its description.
    """

    show: Callable[[str], AbstractContextManager[Progress]]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, description: str) -> Iterator[Progress]:
        """Show and time a step; gives a function to call with work done and work in all."""
        start = time.perf_counter()
        with self.show(description) as advance:
            yield advance
        self.seconds[description] = time.perf_counter() - start


# Text and questions.


def texts() -> tuple[str, str, str]:
    """Prose and code that every Python has, to calibrate on, and a text of ours to judge."""
    from pydoc_data.topics import topics

    code = "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in _MODULES)
    island = resources.files("kvtc_stream.evaluation").joinpath("island.txt")
    return "\n\n".join(topics.values()), code, island.read_text(encoding="utf-8")


def _chat(tokenizer: Any) -> tuple[str, str]:
    """What comes before a user's words, and after them, up to the answer."""
    if not getattr(tokenizer, "chat_template", None):
        return "", "\n"
    marker = "(here)"
    message = [{"role": "user", "content": marker}]
    whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = whole.partition(marker)
    return before, after


def _ids(tokenizer: Any, text: str) -> NDArray[np.int64]:
    # verbose=False: a text longer than the model's context is no mistake, it will be cut.
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array(found, np.int64)


def _answer(model: PreTrainedModel, tokenizer: Any, cache: DynamicCache, question: str) -> str:
    """The first sentence of the likeliest answer; so small a model has no more to say."""
    ids = _ids(tokenizer, f"\n\n{question}")
    found = continue_greedily(model, cache, ids, _ANSWER_TOKENS, stop=tokenizer.eos_token_id)
    text = tokenizer.decode(found).strip()
    return re.split(r"(?<=[.!?])\s|\n", text, maxsplit=1)[0]
