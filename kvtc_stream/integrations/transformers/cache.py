"""A ``DynamicCache`` into a stream and back."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, TypeAlias

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
from kvtc_stream.backends.select import cuda_runs
from kvtc_stream.errors import CalibrationMismatchError, UnsupportedError
from kvtc_stream.formats import Geometry, Section
from kvtc_stream.integrations.transformers.geometry import check_geometry, geometry_of
from kvtc_stream.integrations.transformers.identity import (
    TokenIds,
    as_ids,
    check_fingerprint,
    token_digest,
)
from kvtc_stream.integrations.transformers.model import (
    SUPPORTED_CACHES,
    attention_layers,
    decoder_of,
)
from kvtc_stream.io.dlpack import BackendName

Source: TypeAlias = "str | os.PathLike[str] | BinaryIO | bytes | bytearray | memoryview"

#: Tokens per piece handed to the encoder: bounds the copies from the model's device.
_CHUNK = 1024


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
        check_fingerprint(model, calibration)
        check_geometry(geometry_of(model), calibration.geometry)
    layers, total = _check_cache(cache, calibration.geometry)
    digest = b""
    if token_ids is not None:
        ids = as_ids(token_ids)
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
        check_fingerprint(model, calibration)
        check_geometry(geometry_of(model), calibration.geometry)
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
        _check_tokens(as_ids(token_ids), total, recorded)

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
