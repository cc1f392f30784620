"""Hugging Face transformers: calibrate a model, and move a ``DynamicCache`` into a stream and back.

Needs the ``transformers`` extra. What a model caches is found by running it, not by knowing its
class: :func:`geometry_of` reads shapes from a small cache and accepts a rotary table only when it
explains the model's keys. Causal decoders of any family work whose cache is attention keys and
values: grouped heads, K norms, sliding windows, several rotary tables, layers without RoPE.

    calibration = calibrate(model, texts, tokenizer=tokenizer)
    codec = kvtc_stream.Codec(calibration, ratio=16)
    encode_cache(cache, codec, "prompt.kvtc", model=model, token_ids=prompt)

    cache = decode_cache("prompt.kvtc", calibration, model=model, token_ids=prompt)
    model.generate(prompt_and_question, past_key_values=cache)

Functions may run in several threads on different models; one model serves one call at a time.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

import kvtc_stream as kvtc
from kvtc_stream.backend import BackendName, cuda_runs
from kvtc_stream.errors import CalibrationMismatchError, UnsupportedError
from kvtc_stream.formats import Geometry, ModelIdentity, Rope, Section
from kvtc_stream.integrations._transformers_gradients import capture_gradients
from kvtc_stream.integrations._transformers_model import (
    SUPPORTED_CACHES,
    attention_layers,
    decoder_of,
    geometry_of,
    growing,
    inference,
    model_identity,
)
from kvtc_stream.integrations._transformers_queries import output_norms, query_second_moments

__all__ = [
    "calibrate",
    "capture",
    "decode_cache",
    "encode_cache",
    "geometry_of",
    "model_identity",
    "token_digest",
]

TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]] | Tensor"
Source: TypeAlias = "str | os.PathLike[str] | BinaryIO | bytes | bytearray | memoryview"

#: Tokens per piece handed to the encoder: bounds the copies from the model's device.
_CHUNK = 1024


def token_digest(token_ids: TokenIds) -> bytes:
    """SHA-256 of token ids, each as eight bytes, little-endian: which prompt a cache is of.

    ``token_ids`` is [tokens] or [1, tokens].
    """
    return hashlib.sha256(_ids(token_ids).astype("<i8").tobytes()).digest()


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
    """
    geometry = geometry_of(model)
    decoder = decoder_of(model)
    # Without a configuration the cache keeps every token of sliding layers; masks still slide.
    cache = DynamicCache()
    ids = torch.from_numpy(_ids(token_ids)).to(decoder.device)
    with inference(decoder):
        decoder(input_ids=ids[None], **growing(decoder, cache))
    layers = attention_layers(cache, "the cache")
    return [
        (i, [layers[n].keys for n in section.layers], [layers[n].values for n in section.layers])
        for i, section in enumerate(geometry.sections)
    ]


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
    **options: Any,
) -> kvtc.Calibration:
    """Run a model over texts and learn its cache.

    Parameters
    ----------
    model
        A causal decoder that :func:`geometry_of` supports.
    texts
        Strings, or token ids [tokens]. Each is cut into documents, which start at position 0
        (and with the text's first token, if that is the tokenizer's BOS).
    tokenizer
        The model's tokenizer; needed for strings.
    tokens
        Stop after this many. The published method uses 160,000.
    document_tokens
        Longest document: what the model sees at once.
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
        Called with tokens done and tokens in all, those read again for importance included.
    name, revision
        As for :func:`model_identity`.
    options
        Of :class:`kvtc_stream.Calibrator`: ``bases``, ``backend``, ...

    Raises
    ------
    ValueError
        The texts hold no tokens but sinks.
    UnsupportedError
        The model has no head for gradients, or hides the queries: choose another ``importance``.
    """
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
    identity = model_identity(model, name=name, revision=revision)
    documents = list(_first(_documents(texts, tokenizer, document_tokens), tokens))
    # A loss needs a token after those that it is run back into.
    judged = [d for d in documents if len(d) > 1] if importance != "none" else []
    count = min(importance_documents, len(judged))
    judged = [judged[i * len(judged) // count] for i in range(count)]
    total, done = sum(map(len, documents)) + sum(map(len, judged)), 0

    def advance(document: NDArray[np.int64]) -> None:
        nonlocal done
        done += len(document)
        if progress is not None:
            progress(done, total)

    if importance == "queries" and judged:
        options["weights"] = _query_weights(model, judged, advance)
    calibrator = kvtc.Calibrator(geometry_of(model), model=identity, **options)

    def readable(layers: Sequence[Tensor]) -> list[Tensor]:
        return [x if calibrator.backend == "cuda" else x.cpu() for x in layers]

    if importance == "gradients":
        for i, document in enumerate(judged):
            for section, *tensors in capture_gradients(model, document, seed=seed + i):
                k, v, grad_k, grad_v = map(readable, tensors)
                calibrator.update_gradients(k, v, grad_k, grad_v, section=section)
            advance(document)
    for document in documents:
        for section, k, v in capture(model, document):
            calibrator.update(readable(k), readable(v), section=section)
        advance(document)
    return calibrator.finish()


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
    head's values contribute, and those of V, ``W_Oᵀ W_O``, are in the same unit.
    """
    norms = [x.astype(np.float64) for x in output_norms(model)]
    moments = [np.zeros(1)] * len(norms)
    variances = [np.zeros(1)] * len(norms)
    for document in documents:
        for i, moment in enumerate(query_second_moments(model, document)):
            moments[i] = moments[i] + moment / len(documents)
        for i, _, v in capture(model, document):
            values = torch.cat(v).double().cpu().numpy()
            centred = values - values.mean(axis=2, keepdims=True)
            covariance = centred.swapaxes(2, 3) @ centred / values.shape[2]
            spread = np.einsum("lhij,lhij->lh", norms[i], covariance)
            variances[i] = variances[i] + spread / len(documents)
        advance(document)
    return [
        (moment * variance[..., None, None], norm)
        for moment, variance, norm in zip(moments, variances, norms, strict=True)
    ]


def encode_cache(
    cache: DynamicCache,
    codec: kvtc.Codec,
    file: str | os.PathLike[str] | BinaryIO | None = None,
    *,
    model: PreTrainedModel | None = None,
    token_ids: TokenIds | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bytes | None:
    """Write a cache as a stream.

    The cache is only read. Sliding-window layers are written as they are held: the latest tokens,
    with their positions.

    Parameters
    ----------
    cache
        A ``DynamicCache`` of one sequence that starts at position 0.
    codec
        Made from a calibration of the cache's model.
    file
        Path or binary file to write; ``None`` returns the bytes.
    model
        The cache's model: its geometry and fingerprint are checked against the calibration.
    token_ids
        The ids of the cached tokens, [tokens] or [1, tokens]; their digest is recorded, and
        :func:`decode_cache` can refuse another prompt. After ``generate`` the cache lacks the
        last token of the returned sequence.
    metadata
        The user's, recorded in the stream.

    Raises
    ------
    UnsupportedError
        Another kind of cache or layer, several sequences, or an offloaded cache.
    CalibrationMismatchError
        The cache or the model is not what was calibrated.
    ValueError
        The cache is empty, or ``token_ids`` are not as many as it holds.
    """
    calibration = codec.calibration
    if model is not None:
        _check_model(model, calibration)
    layers, total = _check_cache(cache, calibration.geometry)
    digest = b""
    if token_ids is not None:
        ids = _ids(token_ids)
        if len(ids) != total:
            raise ValueError(
                f"the cache holds {total} tokens, found {len(ids)} token_ids: pass the ids of the "
                f"cached tokens"
            )
        digest = token_digest(ids)
    buffer = io.BytesIO()
    with kvtc.open(
        buffer if file is None else file,
        "wb",
        codec=codec,
        metadata=metadata,
        token_digest=digest,
    ) as writer:
        on_device = codec.backend == "cuda" or (codec.backend == "auto" and cuda_runs())

        def readable(x: Tensor) -> Tensor:
            return x.detach() if on_device else x.detach().cpu()

        for i, section in enumerate(calibration.geometry.sections):
            chosen = [layers[number] for number in section.layers]
            held = chosen[0].keys.shape[2]
            for start in range(0, held, _CHUNK):
                stop = min(start + _CHUNK, held)
                writer.write(
                    [readable(layer.keys[:, :, start:stop]) for layer in chosen],
                    [readable(layer.values[:, :, start:stop]) for layer in chosen],
                    positions=np.arange(total - held + start, total - held + stop),
                    section=i,
                )
    return buffer.getvalue() if file is None else None


def decode_cache(
    source: Source,
    calibration: kvtc.Calibration,
    *,
    model: PreTrainedModel | None = None,
    token_ids: TokenIds | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
) -> DynamicCache:
    """Read a stream as a cache that ``model.generate(input_ids, past_key_values=...)`` continues.

    ``input_ids`` are those of the cached tokens and at least one more.

    Parameters
    ----------
    source
        Path, binary file (a pipe too) or the bytes.
    calibration
        The stream's.
    model
        The model that will continue: it is checked against the calibration, and the cache gets
        the layers its configuration asks for. Without it, layers that were held in full are plain
        and grow in full.
    token_ids
        Ids that begin with those of the cached tokens, as a prompt does; checked against the
        digest if the stream has one.
    device
        The model's by default, else CPU.
    dtype
        That of the stream by default.
    backend
        ``"auto"`` is CUDA where the cache goes to a CUDA device and the backend can run there.

    Raises
    ------
    CalibrationMismatchError
        Stream, calibration, model or token ids do not belong together.
    UnsupportedError
        The stream's tokens have gaps, which a ``DynamicCache`` cannot hold.
    FormatError
        The bytes are not a stream, or damaged.
    """
    if model is not None:
        _check_model(model, calibration)
        device = model.device if device is None else device
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    sections = calibration.geometry.sections
    blocks: list[list[Any]] = [[] for _ in sections]
    if backend == "auto":
        goes_there = device is not None and torch.device(device).type == "cuda"
        backend = "cuda" if goes_there and cuda_runs() else "cpu"
    with kvtc.open(source, calibration=calibration, backend=backend) as reader:
        recorded = reader.header.token_digest
        held_layers = [s.layers for s in reader.header.geometry.sections]
        if held_layers != [s.layers for s in sections]:
            raise UnsupportedError(
                f"the stream holds layers {sorted(n for s in held_layers for n in s)} only: join "
                "it with the others (kvtc join), or read it with kvtc_stream.open"
            )
        for block in reader:
            blocks[block.section].append(block)
    spans = [_span(np.concatenate([b.positions for b in held])) for held in blocks if held]
    if len(spans) < len(sections) or len({total for _, total in spans}) != 1:
        raise UnsupportedError(
            f"the sections hold tokens {spans}, expected all to end at the same one: "
            f"read the stream with kvtc_stream.open"
        )
    total = spans[0][1]
    if token_ids is not None:
        _check_tokens(_ids(token_ids), total, recorded)

    if model is None:
        cache = DynamicCache()
        cache.layers.extend(_plain_layers(sections, spans))
    else:
        cache = DynamicCache(config=decoder_of(model).config)
    layers = attention_layers(cache, "the model")
    for section, held, (start, _) in zip(sections, blocks, spans, strict=True):
        for i, number in enumerate(section.layers):
            k, v = (
                torch.cat([from_dlpack(a)[i] for a in arrays], dim=1)[None].to(device, dtype)
                for arrays in ([b.k for b in held], [b.v for b in held])
            )
            _fill(layers[number], number, k, v, start)
    return cache


def _ids(token_ids: TokenIds) -> NDArray[np.int64]:
    ids = token_ids.cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(
            f"token_ids must be integers [tokens] or [1, tokens], found {ids.dtype} "
            f"{list(ids.shape)}"
        )
    return ids.astype(np.int64)


def _documents(
    texts: Iterable[str | TokenIds], tokenizer: Callable[..., Any] | None, longest: int
) -> Iterator[NDArray[np.int64]]:
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of texts, found one string: pass [text]")
    for text in texts:
        if not isinstance(text, str):
            ids = _ids(text)
        elif tokenizer is None:
            raise TypeError("texts holds strings: pass the model's tokenizer, or token ids")
        else:
            ids = _ids(tokenizer(text)["input_ids"])
        bos = getattr(tokenizer, "bos_token_id", None)
        first = ids[: int(len(ids) > 0 and ids[0] == bos)]
        body, room = ids[len(first) :], longest - len(first)
        for start in range(0, len(body), room):
            yield np.concatenate([first, body[start : start + room]])


def _check_model(model: PreTrainedModel, calibration: kvtc.Calibration) -> None:
    expected = calibration.model
    found = model_identity(model)
    if expected.fingerprint and found.fingerprint != expected.fingerprint:
        raise CalibrationMismatchError(
            f"the model is {_label(found)}, the calibration was made with {_label(expected)}: use "
            f"the model it was made with, or calibrate this one"
        )
    _check_geometry(geometry_of(model), calibration.geometry)


def _label(identity: ModelIdentity) -> str:
    name = f"{identity.name or 'unnamed'}{'@' if identity.revision else ''}{identity.revision}"
    return f"{name} (fingerprint {identity.fingerprint.hex()[:16]}…)"


def _check_geometry(found: Geometry, expected: Geometry) -> None:
    alike = len(found.sections) == len(expected.sections) and all(
        replace(a, rope=()) == replace(b, rope=())
        and len(a.rope) == len(b.rope)
        and all(map(_same_rope, a.rope, b.rope))
        for a, b in zip(found.sections, expected.sections, strict=True)
    )
    if not alike:
        raise CalibrationMismatchError(
            f"the model's cache has {_describe(found)}; the calibration is for "
            f"{_describe(expected)}: calibrate this model"
        )


def _describe(geometry: Geometry) -> str:
    return "; ".join(
        f"layers {','.join(map(str, s.layers))} of {s.kv_heads} KV heads with {s.k_dim} and "
        f"{s.v_dim} channels, {' and '.join(map(_describe_rope, dict.fromkeys(s.rope or (None,))))}"
        for s in geometry.sections
    )


def _describe_rope(rope: Rope | None) -> str:
    if rope is None:
        return "no RoPE"
    pairs = "interleaved" if rope.interleaved else "half-split"
    return (
        f"{pairs} RoPE over {rope.rotary_dim} channels (frequencies {rope.inv_freq[0]:.4g} to "
        f"{rope.inv_freq[-1]:.4g}, scale {rope.scale:.4g})"
    )


def _same_rope(a: Rope | None, b: Rope | None) -> bool:
    """Alike up to rounding: devices compute frequencies with different last bits."""
    if a is None or b is None:
        return a is b
    return (
        a.interleaved == b.interleaved
        and a.rotary_dim == b.rotary_dim
        and np.allclose([*a.inv_freq, a.scale], [*b.inv_freq, b.scale], rtol=1e-5, atol=0)
    )


def _check_cache(cache: DynamicCache, geometry: Geometry) -> tuple[dict[int, Any], int]:
    """The layers of a cache that can be encoded, and the number of tokens they have seen."""
    if type(cache) is not DynamicCache:
        raise UnsupportedError(f"found a {type(cache).__name__}; {SUPPORTED_CACHES}")
    if cache.offloading:
        raise UnsupportedError(f"found an offloaded DynamicCache; {SUPPORTED_CACHES}")
    layers = {n: x for n, x in attention_layers(cache, "the cache").items() if x.is_initialized}
    total: int = max((layer.get_seq_length() for layer in layers.values()), default=0)
    if total == 0:
        raise ValueError("the cache holds no tokens")
    expected = {number for section in geometry.sections for number in section.layers}
    if layers.keys() != expected:
        raise CalibrationMismatchError(
            f"the cache has layers {sorted(layers)}, the calibration is for {sorted(expected)}"
        )
    for section in geometry.sections:
        held = layers[section.layers[0]].keys.shape[2]
        wanted = (
            [1, section.kv_heads, held, section.k_dim],
            [1, section.kv_heads, held, section.v_dim],
            total,
        )
        for number in section.layers:
            layer = layers[number]
            found = (list(layer.keys.shape), list(layer.values.shape), layer.get_seq_length())
            if found[0][0] != 1:
                raise UnsupportedError(
                    f"the cache holds {found[0][0]} sequences; {SUPPORTED_CACHES}: encode a copy "
                    f"per sequence, reduced with batch_select_indices"
                )
            if found != wanted:
                raise CalibrationMismatchError(
                    f"layer {number} of the cache has K {found[0]} and V {found[1]} after "
                    f"{found[2]} tokens, the calibration is for {wanted[0]} and {wanted[1]}, "
                    f"and other layers have seen {total} tokens"
                )
    return layers, total


def _check_tokens(ids: NDArray[np.int64], total: int, recorded: bytes) -> None:
    if len(ids) < total:
        raise CalibrationMismatchError(
            f"the cache is of {total} tokens, found only {len(ids)} token_ids: pass the prompt "
            f"that begins with them"
        )
    digest = token_digest(ids[:total])
    if recorded and digest != recorded:
        raise CalibrationMismatchError(
            f"the first {total} token_ids have digest {digest.hex()[:16]}…, the stream's tokens "
            f"have {recorded.hex()[:16]}…: this is the cache of another prompt"
        )


def _span(positions: NDArray[np.int64]) -> tuple[int, int]:
    start, stop = int(positions[0]), int(positions[-1]) + 1
    if stop - start != len(positions):
        raise UnsupportedError(
            f"the stream holds {len(positions)} of the tokens {start} to {stop - 1}; a "
            f"DynamicCache has no gaps: read it with kvtc_stream.open"
        )
    return start, stop


def _plain_layers(sections: Sequence[Section], spans: Sequence[tuple[int, int]]) -> list[Any]:
    """Layers as far as the stream tells: a section that lost its first tokens had a window."""
    last = max(section.layers[-1] for section in sections)
    layers: list[Any] = [DummyLayer() for _ in range(last + 1)]  # type: ignore[no-untyped-call]
    for section, (start, stop) in zip(sections, spans, strict=True):
        for number in section.layers:
            # A sliding layer keeps one token less than its window: the next one completes it.
            layers[number] = (
                DynamicSlidingWindowLayer(stop - start + 1) if start else DynamicLayer()  # type: ignore[no-untyped-call]
            )
    return layers


def _fill(layer: Any, number: int, k: Tensor, v: Tensor, start: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        needed = layer.sliding_window - 1
        layer.cumulative_length = start
    else:
        needed = start + k.shape[2]
    if start and k.shape[2] < needed:
        raise CalibrationMismatchError(
            f"the stream holds the latest {k.shape[2]} of {start + k.shape[2]} tokens of layer "
            f"{number}, the model needs {needed}: it was written with another window"
        )
    layer.update(k, v)
