"""Running a model over texts to learn its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import kvtc_stream as kvtc
from kvtc_stream.integrations.transformers.geometry import (
    check_document,
    geometry_of,
    longest_document,
)
from kvtc_stream.integrations.transformers.gradients import capture_gradients
from kvtc_stream.integrations.transformers.identity import TokenIds, as_ids, model_identity
from kvtc_stream.integrations.transformers.model import (
    attention_layers,
    decoder_of,
    growing,
    inference,
    plain_model,
)
from kvtc_stream.integrations.transformers.queries import output_norms, query_second_moments


def capture(
    model: PreTrainedModel, token_ids: TokenIds
) -> list[tuple[int, list[Tensor], list[Tensor]]]:
    """Run a model over one document and return what it caches, sliding layers in full.

    Parameters
    ----------
    model
        A causal decoder; its head is not run.
    token_ids
        [tokens] or [1, tokens], from position 0.

    Returns
    -------
    list of (section, k, v)
        Per section of :func:`geometry_of`: its index, and a tensor [1, kv_heads, tokens, head_dim]
        per layer of K (after RoPE) and of V, on the model's device and in its dtype.

    Raises
    ------
    ValueError
        The model has no such token, or reads fewer at once.
    """
    geometry = geometry_of(model)
    decoder = decoder_of(model)
    document = as_ids(token_ids)
    check_document(model, document)
    # Without a configuration the cache keeps every token of sliding layers; masks still slide.
    cache = DynamicCache()
    ids = torch.from_numpy(document).to(decoder.device)
    with inference(decoder):
        decoder(input_ids=ids[None], **growing(decoder, cache))
    layers = attention_layers(cache, "the cache")
    return [
        (i, [layers[n].keys for n in section.layers], [layers[n].values for n in section.layers])
        for i, section in enumerate(geometry.sections)
    ]


@overload
def calibrate(
    model: PreTrainedModel,
    texts: Iterable[str | TokenIds],
    *,
    tensor_parallel: None = None,
    **options: Any,
) -> kvtc.Calibration: ...


@overload
def calibrate(
    model: PreTrainedModel,
    texts: Iterable[str | TokenIds],
    *,
    tensor_parallel: int,
    **options: Any,
) -> list[kvtc.Calibration]: ...


def calibrate(
    model: PreTrainedModel,
    texts: Iterable[str | TokenIds],
    *,
    tokenizer: Callable[..., Any] | None = None,
    tokens: int = 160_000,
    document_tokens: int = 2048,
    importance: Literal["gradients", "queries", "none"] = "gradients",
    importance_documents: int = 24,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    name: str | None = None,
    revision: str | None = None,
    tensor_parallel: int | None = None,
    **options: Any,
) -> kvtc.Calibration | list[kvtc.Calibration]:
    """Run a model over texts and learn its cache.

    Parameters
    ----------
    model
        A causal decoder that :func:`geometry_of` supports.
    texts
        Strings, or token ids [tokens]. Each is cut into documents, which start at position 0
        (and with the text's first token, if that is the tokenizer's BOS). They are read in turn,
        one of each text.
    tokenizer
        The model's tokenizer; needed for strings.
    tokens
        Stop after this many. The published method uses 160,000.
    document_tokens
        Longest document: what the model sees at once. No longer than the model's learned
        positions, where it has those in place of RoPE.
    importance
        Where importance weights come from, which say what an error costs the model.
        ``"gradients"``: the model's loss is run back into its cache, with labels drawn from the
        model; takes memory for a backward pass, and several times as long as reading. ``"queries"``
        needs none: the second moments of queries for K, and norms behind the output projection for
        V. ``"none"``: errors of all channels count alike.
    importance_documents
        How many documents importance is learnt from, spread over all.
    seed
        Of the labels.
    progress
        Called with tokens done and tokens in all, those read again for importance included. After
        the last call bases are solved for, which takes minutes where rows are wide.
    name, revision
        As for :func:`model_identity`.
    tensor_parallel
        Make a calibration for each of so many parts of the KV heads, for engines that spread them
        over as many processes; the texts are read once. The result is then a list. See
        :class:`kvtc_stream.SplitCalibrator`.
    options
        Of :class:`kvtc_stream.Calibrator`: ``bases``, ``backend``, ...

    Raises
    ------
    ValueError
        The texts hold no tokens but sinks, or tokens that the model does not have, or the KV heads
        cannot be dealt to so many.
    UnsupportedError
        The model has no head for gradients, or hides the queries: choose another ``importance``.
    """
    _check_options(importance, tokens, document_tokens, importance_documents)
    model = plain_model(model)
    identity = model_identity(model, name=name, revision=revision)
    longest = min(document_tokens, longest_document(model) or document_tokens)
    documents = list(_first(_documents(texts, tokenizer, longest), tokens))
    for document in documents:
        check_document(model, document)
    judged = _spread(documents, importance_documents) if importance != "none" else []
    total, done = sum(map(len, documents)) + sum(map(len, judged)), 0

    def advance(document: NDArray[np.int64]) -> None:
        nonlocal done
        done += len(document)
        if progress is not None:
            progress(done, total)

    if importance == "queries" and judged:
        options["weights"] = _query_weights(model, judged, advance)
    calibrator: kvtc.Calibrator | kvtc.SplitCalibrator
    if tensor_parallel is None:
        calibrator = kvtc.Calibrator(geometry_of(model), model=identity, **options)
    else:
        options["model"] = identity
        calibrator = kvtc.SplitCalibrator(geometry_of(model), tensor_parallel, **options)
    for i, document in enumerate(judged if importance == "gradients" else []):
        for section, *tensors in capture_gradients(model, document, seed=seed + i):
            k, v, grad_k, grad_v = (_readable(calibrator, x) for x in tensors)
            calibrator.update_gradients(k, v, grad_k, grad_v, section=section)
        advance(document)
    for document in documents:
        for section, k, v in capture(model, document):
            calibrator.update(_readable(calibrator, k), _readable(calibrator, v), section=section)
        advance(document)
    return calibrator.finish()


def _readable(
    calibrator: kvtc.Calibrator | kvtc.SplitCalibrator, layers: Sequence[Tensor]
) -> list[Tensor]:
    """Tensors where the calibrator can read them."""
    # Layers of a model may be on several devices, a calibrator is on one.
    return [x.to(calibrator.backend) for x in layers]


def _check_options(
    importance: str, tokens: int, document_tokens: int, importance_documents: int
) -> None:
    if importance not in ("gradients", "queries", "none"):
        raise ValueError(
            f"importance must be 'gradients', 'queries' or 'none', found {importance!r}"
        )
    if tokens < 1 or document_tokens < 2:
        raise ValueError(
            f"tokens must be at least 1 and document_tokens at least 2, found {tokens} and "
            f"{document_tokens}"
        )
    if importance_documents < 1:
        raise ValueError(f"importance_documents must be at least 1, found {importance_documents}")


def _spread(documents: Sequence[NDArray[np.int64]], count: int) -> list[NDArray[np.int64]]:
    """So many of the documents, spread over all."""
    # A loss needs a token after those that it is run back into.
    judged = [d for d in documents if len(d) > 1]
    count = min(count, len(judged))
    return [judged[i * len(judged) // count] for i in range(count)]


def _first(documents: Iterable[NDArray[np.int64]], tokens: int) -> Iterator[NDArray[np.int64]]:
    """Documents up to so many tokens, the last one cut."""
    for document in documents:
        yield document[:tokens]
        tokens -= len(document)
        if tokens <= 0:
            return


def _query_weights(
    model: PreTrainedModel,
    documents: Sequence[NDArray[np.int64]],
    advance: Callable[[NDArray[np.int64]], None],
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Importance of K and V by section, without gradients.

    A score that is off moves attention between tokens, and what enters the residual stream by
    their difference in value: so the weights of K are ``E[q qᵀ]`` times the variance of what the
    head's values contribute, and those of V, ``W_Oᵀ W_O``, are in the same unit. Layers that add
    less to the stream than most are raised to what most add.
    """
    norms = [x.astype(np.float64) for x in output_norms(model)]
    moments = [np.zeros(1)] * len(norms)
    variances = [np.zeros(1)] * len(norms)
    for document in documents:
        for i, moment in enumerate(query_second_moments(model, document)):
            moments[i] = moments[i] + moment / len(documents)
        for i, _, v in capture(model, document):
            values = torch.cat([x.cpu() for x in v]).double().numpy()
            centred = values - values.mean(axis=2, keepdims=True)
            covariance = centred.swapaxes(2, 3) @ centred / values.shape[2]
            spread = np.einsum("lhij,lhij->lh", norms[i], covariance)
            variances[i] = variances[i] + spread / len(documents)
        advance(document)
    # What each layer adds to the residual stream. Later layers often add more, but read it through
    # norms: a layer that adds little is not one whose errors do not matter.
    added = [variance.sum(axis=1) for variance in variances]
    usual = np.median(np.concatenate(added))
    raised = [usual / np.clip(x, 1e-30, usual)[:, None, None, None] for x in added]
    return [
        (moment * variance[..., None, None] * factor, norm * factor)
        for moment, variance, norm, factor in zip(moments, variances, norms, raised, strict=True)
    ]


def _documents(
    texts: Iterable[str | TokenIds], tokenizer: Callable[..., Any] | None, longest: int
) -> Iterator[NDArray[np.int64]]:
    """One of each text in turn, so that the first texts leave room for the others."""
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of texts, found one string: pass [text]")
    waiting: Iterable[Iterator[NDArray[np.int64]]]
    waiting = (_documents_of(text, tokenizer, longest) for text in texts)
    while waiting:
        started = []
        for documents in waiting:
            for document in islice(documents, 1):
                yield document
                started.append(documents)
        waiting = started


def _documents_of(
    text: str | TokenIds, tokenizer: Callable[..., Any] | None, longest: int
) -> Iterator[NDArray[np.int64]]:
    if not isinstance(text, str):
        ids = as_ids(text)
    elif tokenizer is None:
        raise TypeError("texts holds strings: pass the model's tokenizer, or token ids")
    else:
        ids = as_ids(tokenizer(text)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    first = ids[: int(len(ids) > 0 and ids[0] == bos)]
    body, room = ids[len(first) :], longest - len(first)
    for start in range(0, len(body), room):
        yield np.concatenate([first, body[start : start + room]])
