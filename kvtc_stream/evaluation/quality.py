"""Quality of a compressed cache: its size, and what a model predicts and retrieves from it.

``kvtc bench quality`` and ``kvtc demo`` use these functions. The original cache is in bfloat16, as
most models are served: ratios and errors of the restored cache are relative to it. Caches go
through real streams. Needs the ``transformers`` extra; PyTorch is imported when first used. Use a
model in one call at a time.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.parts import SectionCalibration
from kvtc_stream.coding.rope import Rotations, gather
from kvtc_stream.formats import IndexEntry, Role, Section, StreamFile
from kvtc_stream.stream.codec import Codec
from kvtc_stream.stream.statistics import StreamStatistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

#: Maximum number of tokens of a document for calibration.
DOCUMENT_TOKENS = 2048
#: Where facts are planted, as fractions of the context.
FACT_DEPTHS = (0.1, 0.3, 0.5, 0.7)

Ids = NDArray[np.int64]


# Text.


def token_ids(tokenizer: Any, text: str) -> Ids:
    """Token ids [tokens] of a text of any length."""
    # verbose=False: no warning of texts longer than the model's context, since they will be cut.
    return np.array(tokenizer(text, verbose=False)["input_ids"], np.int64)


def spread_documents(ids: Ids, tokens: int, longest: int) -> list[Ids]:
    """Cut documents from ``ids``, evenly spread: ``tokens`` in all, at most ``longest`` in each."""
    tokens = min(tokens, len(ids))
    count = -(-tokens // longest)
    sizes = np.diff(np.arange(count + 1) * tokens // max(count, 1))
    starts = np.arange(count) * len(ids) // max(count, 1)
    return [ids[a : a + n] for a, n in zip(starts, sizes, strict=True)]


def calibration_documents(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[Ids]:
    """Documents to calibrate on: about ``tokens`` tokens, spread evenly over all texts.

    Every document begins with the BOS token if the tokenizer adds it to texts.
    """
    documents = []
    for i, text in enumerate(texts):
        ids = token_ids(tokenizer, text)
        bos = ids[: int(len(ids) > 0 and ids[0] == getattr(tokenizer, "bos_token_id", None))]
        share = tokens * (i + 1) // len(texts) - tokens * i // len(texts)
        pieces = spread_documents(ids[len(bos) :], share, DOCUMENT_TOKENS - len(bos))
        documents += [np.concatenate([bos, piece]) for piece in pieces]
    return documents


# Models and caches.


def prefill(model: PreTrainedModel, ids: Ids, dtype: torch.dtype | None = None) -> DynamicCache:
    """Let a model read ``ids`` [tokens]; return its cache, in ``dtype`` or the model's dtype.

    ``ValueError`` if the model has no such token, or has learned fewer positions.
    """
    from transformers.cache_utils import DynamicCache

    from kvtc_stream.integrations.transformers.geometry import check_document
    from kvtc_stream.integrations.transformers.model import decoder_of, growing, inference

    check_document(model, ids)
    cache, decoder = DynamicCache(config=model.config), decoder_of(model)
    with inference(decoder):
        decoder(input_ids=_row(model, ids), **growing(decoder, cache))
    return cache if dtype is None else cast_cache(cache, dtype)


def cast_cache(cache: DynamicCache, dtype: torch.dtype) -> DynamicCache:
    """A copy of a cache in another dtype."""
    cast = branch(cache)
    layer: Any
    for layer in cast.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
            layer.dtype = dtype
    return cast


def next_token_log_probabilities(model: PreTrainedModel, cache: DynamicCache, ids: Ids) -> Tensor:
    """Log-probabilities of the next token after each of ``ids`` [tokens], which follow the cache.

    Float32 [tokens, vocabulary] on the model's device, in nats. The cache is not changed.
    """
    import torch

    from kvtc_stream.integrations.transformers.model import growing

    with torch.inference_mode():
        output = model(input_ids=_row(model, ids), **growing(model, branch(cache)))
        log_probabilities: Tensor = output.logits[0].float().log_softmax(-1)
    return log_probabilities


def continue_greedily(
    model: PreTrainedModel, cache: DynamicCache, ids: Ids, count: int, *, stop: int | None = None
) -> Ids:
    """Generate up to ``count`` tokens greedily after ``ids`` [tokens], which follow the cache.

    Ends early with the token ``stop``, which is not in the result, int64 [tokens]. The cache is not
    changed.
    """
    import torch

    from kvtc_stream.integrations.transformers.model import growing

    grown, given, found = branch(cache), _row(model, ids), []
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=given, **growing(model, grown)).logits
            given = logits[:, -1:].argmax(-1)
            if int(given) == stop:
                break
            found.append(int(given))
    return np.array(found, np.int64)


def _row(model: PreTrainedModel, ids: Ids) -> Tensor:
    import torch

    return torch.from_numpy(ids)[None].to(model.device)


def branch(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow without changing the given one.

    Tensors are shared: layers replace them, and never write into them.
    """
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


def round_trip(
    model: PreTrainedModel, cache: DynamicCache, codec: Codec, ids: Ids
) -> tuple[DynamicCache, StreamFile]:
    """Write a cache as a stream, and read it back in the model's dtype.

    Parameters
    ----------
    cache
        The cache of ``ids`` [tokens], in the dtype that ratios are relative to.

    Returns
    -------
    DynamicCache, StreamFile
        The restored cache and the stream, in memory.
    """
    from kvtc_stream.integrations.transformers import decode_cache, encode_cache

    file = io.BytesIO()
    encode_cache(cache, codec, file, model=model, token_ids=ids)
    file.seek(0)
    restored = decode_cache(
        file,
        codec.calibration,
        model=model,
        token_ids=ids,
        dtype=model.dtype,
        backend=codec.backend,
    )
    return restored, StreamFile(file)


# Predictions.


@dataclass(frozen=True)
class Judgement:
    """Effect of a restored cache on a model's predictions; means over tokens.

    Attributes
    ----------
    loss, restored_loss
        Negative log-likelihood of the text, from the original and from the restored cache; nats per
        token.
    kl_divergence, kl_worst
        KL divergence of the next-token distribution from the restored cache, relative to that from
        the original: the mean, and the maximum; nats.
    same_top_token
        Fraction of tokens for which both caches predict the same most likely token.
    """

    loss: float
    restored_loss: float
    kl_divergence: float
    kl_worst: float
    same_top_token: float

    @property
    def loss_rise(self) -> float:
        """Increase of the loss by compression, nats per token."""
        return self.restored_loss - self.loss


def judge(original: Tensor, restored: Tensor, targets: Ids) -> Judgement:
    """Compare log-probabilities [tokens, vocabulary]; ``targets`` [tokens] are actual tokens."""
    import torch

    chosen = torch.from_numpy(targets).to(original.device)[:, None]
    losses = [-float(p.gather(1, chosen).mean(dtype=torch.float64)) for p in (original, restored)]
    divergences = torch.nn.functional.kl_div(
        restored, original, reduction="none", log_target=True
    ).sum(-1)
    divergences = divergences.clamp_min(0)  # rounding may leave negative values
    return Judgement(
        loss=losses[0],
        restored_loss=losses[1],
        kl_divergence=float(divergences.mean(dtype=torch.float64)),
        kl_worst=float(divergences.max()),
        same_top_token=float((original.argmax(-1) == restored.argmax(-1)).double().mean()),
    )


@dataclass(frozen=True)
class Measurement:
    """Result of one text with one codec.

    Attributes
    ----------
    statistics
        Statistics of the stream; sizes count every byte.
    k_centred, v_centred
        √(Σ‖x̂−x‖² / Σ‖x−mean‖²) over coded tokens, with K before RoPE and the calibration's mean.
        (Errors in ``statistics`` are relative to ‖x‖.)
    judgement
        Predictions of the tokens that follow the context.
    """

    statistics: StreamStatistics
    k_centred: float
    v_centred: float
    judgement: Judgement


def measure(
    model: PreTrainedModel, ids: Ids, codecs: Iterable[Codec], *, context: int
) -> Iterator[Measurement]:
    """Compress the cache of a text with each codec, and predict the rest of the text from it.

    Parameters
    ----------
    ids
        Token ids: ``context`` tokens whose cache is compressed, then at least two tokens, which
        are predicted from the exact cache and from every restored one.
    codecs
        One :class:`Measurement` is yielded for each.

    Raises
    ------
    ValueError
        The text is too short, or longer than the positions that the model has learned; or the
        context is so short that sinks and window leave nothing to code.
    """
    import torch

    from kvtc_stream.integrations.transformers.geometry import check_length

    if len(ids) < context + 2:
        raise ValueError(f"found {len(ids)} tokens, expected {context} and at least two more")
    check_length(model, len(ids) - 1)
    read, following, targets = ids[:context], ids[context:-1], ids[context + 1 :]
    cache = prefill(model, read, torch.bfloat16)
    exact = next_token_log_probabilities(model, cast_cache(cache, model.dtype), following)
    for codec in codecs:
        restored, stream = round_trip(model, cache, codec, read)
        statistics = StreamStatistics.of(stream)
        if not statistics.coded_tokens:
            raise ValueError(
                f"a context of {context} tokens leaves nothing to code beside {codec.sinks} sinks "
                f"and a window of {codec.window}: ask for a longer one"
            )
        centred = centred_errors(cache, restored, stream, codec.calibration)
        found = next_token_log_probabilities(model, restored, following)
        yield Measurement(statistics, *centred, judge(exact, found, targets))


def centred_errors(
    cache: DynamicCache, restored: DynamicCache, stream: StreamFile, calibration: Calibration
) -> tuple[float, float]:
    """``k_centred`` and ``v_centred`` of :class:`Measurement`."""
    error, spread = np.zeros(2), np.zeros(2)
    for entry in stream.index:
        if entry.role is Role.DATA:
            section = calibration.geometry.sections[entry.section]
            means = _means(section, calibration.sections[entry.section])
            before, after = (_rows(c, section, entry) for c in (cache, restored))
            for i in range(2):
                error[i] += np.square(after[i] - before[i], dtype=np.float64).sum()
                spread[i] += np.square(before[i] - means[i], dtype=np.float64).sum()
    k, v = np.sqrt(error / spread)
    return float(k), float(v)


def _means(section: Section, learnt: SectionCalibration) -> list[NDArray[np.float32]]:
    """Means of K before RoPE and of V, [layers * kv_heads * head_dim]; equal in all bases."""
    layers = len(section.layers)
    k, v = (
        np.empty((layers, width // layers), np.float32)
        for width in (section.k_width, section.v_width)
    )
    for part in next(iter(learnt.bases.values())):
        of_k, of_v = np.split(part.mean, [len(part.k_layers) * k.shape[1]])
        k[list(part.k_layers)] = of_k.reshape(-1, k.shape[1])
        v[list(part.v_layers)] = of_v.reshape(-1, v.shape[1])
    return [k.ravel(), v.ravel()]


def _rows(cache: DynamicCache, section: Section, entry: IndexEntry) -> list[NDArray[np.float32]]:
    """K before RoPE and V of a block, each [tokens, layers * kv_heads * head_dim]."""
    import torch

    tokens = slice(entry.start, entry.start + entry.tokens)
    layers = [cache.layers[number] for number in section.layers]
    positions = np.arange(entry.first_position, entry.last_position + 1)
    found = []
    for name, width, turns in (
        ("keys", section.k_width, Rotations.of(section, positions, inverse=True)),
        ("values", section.v_width, Rotations.none(len(layers))),
    ):
        x = torch.cat([getattr(layer, name)[:, :, tokens] for layer in layers])
        found.append(np.empty((entry.tokens, width), np.float32))
        gather(x.float().cpu().numpy(), np.arange(len(layers)), turns, found[-1])
    return found


# Retrieval.


@dataclass(frozen=True)
class Fact:
    """Token ids of a question that a text answers, and of the answer, which follows it."""

    question: Ids
    answer: Ids


def plant_facts(
    tokenizer: Any, ids: Ids, *, seed: int | Sequence[int], depths: Sequence[float] = FACT_DEPTHS
) -> tuple[Ids, list[Fact]]:
    """Replace tokens of a text by facts: five-digit numbers of made-up names.

    Parameters
    ----------
    tokenizer
        A tokenizer of transformers.
    ids
        Token ids [tokens].
    seed
        Seed of the random names and numbers.
    depths
        Where facts begin, as ascending fractions of the text, 0 to 1.

    Raises
    ------
    ValueError
        The text is too short for the facts.
    """
    rng = np.random.default_rng(seed)
    planted, facts, free = ids.copy(), [], 0
    for depth in depths:
        question = f"\n\nThe secret number of {made_up_name(rng)} is"
        # Each piece is tokenised alone, so that its tokens are the same in text and question.
        told = [
            np.array(tokenizer(piece, add_special_tokens=False)["input_ids"], np.int64)
            for piece in (question, f" {rng.integers(10_000, 100_000)}", ".\n\n")
        ]
        start, length = round(depth * len(ids)), sum(map(len, told))
        if not free <= start <= len(ids) - length:
            raise ValueError(
                f"a fact of {length} tokens does not fit at {depth:g} of a text of {len(ids)} "
                f"tokens, of which {free} are taken: use a longer context"
            )
        free = start + length
        planted[start:free] = np.concatenate(told)
        facts.append(Fact(*told[:2]))
    return planted, facts


def made_up_name(rng: np.random.Generator) -> str:
    """A name of four syllables that no text has."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    return "".join(rng.choice([*letters]) for letters in (consonants, vowels) * 4).capitalize()


@dataclass(frozen=True)
class Retrieval:
    """How well a model answers questions about facts from a cache.

    Attributes
    ----------
    facts_found
        Fraction of facts for which every token of the answer is the model's most likely token.
    fact_log_probability
        Log-probability of the whole right answer; mean over facts, nats.
    """

    facts_found: float
    fact_log_probability: float


def retrieve(model: PreTrainedModel, cache: DynamicCache, facts: Sequence[Fact]) -> Retrieval:
    """Ask for each fact separately, from a cache in the model's dtype, which is not changed."""
    found, log_probabilities = [], []
    for fact in facts:
        asked = np.concatenate([fact.question, fact.answer[:-1]])
        rows = next_token_log_probabilities(model, cache, asked)[len(fact.question) - 1 :].cpu()
        found.append(bool((rows.argmax(-1).numpy() == fact.answer).all()))
        log_probabilities.append(rows.numpy()[np.arange(len(rows)), fact.answer].sum())
    return Retrieval(float(np.mean(found)), float(np.mean(log_probabilities)))


def measure_retrieval(
    model: PreTrainedModel, ids: Ids, facts: Sequence[Fact], codecs: Iterable[Codec]
) -> Iterator[Retrieval]:
    """Ask for facts in a text: from its exact cache, then from the one that each codec restores."""
    import torch

    cache = prefill(model, ids, torch.bfloat16)
    yield retrieve(model, cast_cache(cache, model.dtype), facts)
    for codec in codecs:
        yield retrieve(model, round_trip(model, cache, codec, ids)[0], facts)


# Comparison.


def ratio_at_kl(
    points: Iterable[tuple[float, float]], kl: float
) -> float | Literal["below range", "above range"]:
    """The ratio at which a curve reaches a KL divergence, interpolated in logarithms.

    Parameters
    ----------
    points
        Pairs (ratio, KL divergence), in any order. Those with divergence 0 are ignored: it has no
        logarithm.
    kl
        The KL divergence, in nats.

    Returns
    -------
    float or str
        The lowest ratio with this divergence. Nothing is extrapolated: the result is
        ``"below range"`` if all points diverge more, ``"above range"`` if all diverge less.
    """
    curve = sorted((ratio, found) for ratio, found in points if found > 0)
    if kl <= 0 or kl < min((found for _, found in curve), default=0):
        return "below range"
    for (r0, k0), (r1, k1) in pairwise([*curve[:1], *curve]):
        if min(k0, k1) <= kl <= max(k0, k1):
            rise = np.log(k1) - np.log(k0)
            share = (np.log(kl) - np.log(k0)) / rise if rise else 0.0
            return float(r0 * (r1 / r0) ** share)
    return "above range"
