"""What a transformers model caches, and who it is; the public names are in ``transformers``."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvtc_stream.cpu.layout import Rotations, gather
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import Geometry, ModelIdentity, Rope, Section

#: Positions at which keys are compared; later ones would show the model's binary32 angles.
_PROBE_POSITIONS = (0, 1, 2, 5, 17, 61, 251, 1021)
#: Values of a parameter that enter the fingerprint.
_FINGERPRINT_SAMPLES = 64
SUPPORTED_CACHES = (
    "supported is a DynamicCache of one sequence whose layers are full or sliding-window attention"
)

#: Configuration entries that enter the fingerprint.
FINGERPRINT_CONFIG = (
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "model_type",
    "no_rope_layers",
    "norm_eps",
    "norm_epsilon",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "vocab_size",
)

_geometries: weakref.WeakKeyDictionary[PreTrainedModel, Geometry] = weakref.WeakKeyDictionary()


def geometry_of(model: PreTrainedModel) -> Geometry:
    """What a model caches: its sections, and the rotary table of every layer, proven by a run.

    The decoder runs once on eight sequences of one equal token at different positions. A layer's
    keys then differ by RoPE alone, so taking off the right table makes them equal, and its values
    must not differ. Candidates are the model's own ``inv_freq`` buffers (scaling is already in
    them) with their attention scaling factor, half-split and interleaved, and no RoPE. The proof
    covers frequencies, pairing, rotary dimension and which layer uses which table; a scaling
    factor is taken from the model as it is.

    Layers with different windows or shapes become different sections, in order of their first
    layer; layers that read another layer's cache are in none. The result is kept for as long as
    the model lives.

    Raises
    ------
    UnsupportedError
        The cache is not attention keys and values in token order (encoder-decoder, recurrent,
        compressed), the rotary tables change with length (``dynamic``, ``longrope``), or no table
        explains the keys.
    """
    if model not in _geometries:
        _geometries[model] = _probe(model)
    return _geometries[model]


def model_identity(
    model: PreTrainedModel, *, name: str | None = None, revision: str | None = None
) -> ModelIdentity:
    """Name, revision and fingerprint of what determines a model's cache.

    ``name`` and ``revision`` default to what the model was loaded from (of a local folder, its
    last part) and to the commit it was loaded at, if known.

    The fingerprint is the SHA-256 of, in this order:

    1. The configuration as UTF-8 JSON: an object of those entries of the text decoder's
       configuration that are named in ``FINGERPRINT_CONFIG`` and are not null (entries of
       objects within too), keys sorted, no white space, non-ASCII characters escaped; a number
       that is whole as an integer, any other as the string that Python's ``float.hex`` gives.
       A line feed.
    2. For each parameter of the text decoder (without the output head, under its name in the
       decoder, a shared one once, under its first), in order of the names' UTF-8 bytes: the line
       ``NAME [DIM,DIM,...]`` and a line feed, then its sample. Of a parameter with ``n`` values,
       ``m = min(n, 64)`` are sampled, at row-major indices ``i * (n - 1) // (m - 1)`` for ``i``
       from 0 (index 0 if ``m`` is 1). Each is rounded to bfloat16, ties to even, and written as
       two bytes, little-endian; a parameter of integers (quantised weights) as int64, eight bytes.

    Hence the fingerprint does not depend on whether weights are loaded as float32, bfloat16 or
    their own dtype (loading as float16 rounds them first, and may change it), on their device, or
    on the head. It changes with training and with quantisation.

    Raises
    ------
    UnsupportedError
        Some weights are not loaded (meta device).
    """
    decoder = decoder_of(model)
    source = getattr(model.config, "_name_or_path", None) or ""
    if name is None:
        name = os.path.basename(os.path.abspath(source)) if os.path.isdir(source) else source
    if revision is None:
        revision = getattr(model.config, "_commit_hash", None) or ""
    return ModelIdentity(name, revision, _fingerprint(decoder))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that fills the cache: without head, without vision tower."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {type(model)}")
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder model, supported are causal decoders"
        )
    decoder: PreTrainedModel = model.get_decoder()  # type: ignore[no-untyped-call]
    return decoder


@contextmanager
def inference(module: torch.nn.Module) -> Iterator[None]:
    """Without gradients and dropout."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in modes:
            part.training = training


def growing(module: torch.nn.Module, cache: DynamicCache) -> dict[str, Any]:
    """Arguments with which a model goes on from a cache; transformers 5.24 renamed one."""
    renamed = "cache" in inspect.signature(module.forward).parameters
    return {"cache" if renamed else "past_key_values": cache, "use_cache": True}


def attention_layers(cache: DynamicCache, owner: str) -> dict[int, Any]:
    """The layers that hold keys and values, by number; refuses kinds that cannot be encoded."""
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise UnsupportedError(
                f"layer {number} of {owner} is a {type(layer).__name__}; {SUPPORTED_CACHES}"
            )
    return {n: layer for n, layer in enumerate(cache.layers) if type(layer) is not DummyLayer}


def _probe(model: PreTrainedModel) -> Geometry:
    decoder = decoder_of(model)
    name = type(model).__name__
    ropes = _rotary_tables(decoder, name)
    limit = getattr(decoder.config, "max_position_embeddings", None) or max(_PROBE_POSITIONS) + 1
    positions = np.array([p for p in _PROBE_POSITIONS if p < limit], np.int64)
    # One token alone attends to itself only, so what enters a layer does not depend on position.
    inputs = {"input_ids": torch.full((len(positions), 1), decoder.config.vocab_size // 2)}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        inputs["position_ids"] = torch.from_numpy(positions)[:, None]
    cache = DynamicCache(config=decoder.config)
    layers = attention_layers(cache, name)
    with inference(decoder):
        output = decoder(
            **{key: x.to(decoder.device) for key, x in inputs.items()},
            **growing(decoder, cache),
            output_hidden_states=not ropes,
        )
    # Learned positions are added to the embeddings: then keys differ without any RoPE.
    absolute = not ropes and bool((output.hidden_states[0] != output.hidden_states[0][:1]).any())

    groups: dict[tuple[int, ...], list[int]] = {}
    for number, layer in layers.items():
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else 0
        shape = (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        groups.setdefault((window, *shape), []).append(number)
    sections = []
    for (_, kv_heads, k_dim, v_dim), numbers in groups.items():
        section = Section(tuple(numbers), kv_heads, k_dim, v_dim)
        if not absolute:
            # The model rounds angles to binary32, and cosines, sines and keys to its own dtype.
            tolerance = 1e-3 + 8 * torch.finfo(layers[numbers[0]].keys.dtype).eps
            keys = _stack([layers[n].keys for n in numbers])
            _check_values(section, _stack([layers[n].values for n in numbers]), tolerance, name)
            rope = _explain(section, keys, positions, ropes, tolerance, name)
            section = replace(section, rope=rope)
        sections.append(section)
    return Geometry(tuple(sections))


def _rotary_tables(decoder: PreTrainedModel, name: str) -> list[Rope]:
    """Every table of the model's rotary embeddings, half-split and interleaved."""
    ropes = []
    for module in decoder.modules():
        for buffer, table in module.named_buffers(recurse=False):
            prefix = buffer.removesuffix("inv_freq")
            if prefix == buffer or prefix.endswith("original_"):
                continue
            kind = getattr(module, "rope_type", "default")
            if isinstance(kind, dict):
                kind = kind[prefix.removesuffix("_")]
            if "dynamic" in kind or kind == "longrope":
                raise UnsupportedError(
                    f"{name} uses {kind!r} RoPE, whose table changes with the length of the "
                    f"sequence; supported are tables that stay (default, linear, yarn, llama3, ...)"
                )
            scale = float(getattr(module, f"{prefix}attention_scaling", 1.0))
            frequencies = tuple(table.float().flatten().tolist())
            ropes += [Rope(frequencies, interleaved, scale) for interleaved in (False, True)]
    return list(dict.fromkeys(ropes))


def _stack(tensors: list[Tensor]) -> NDArray[np.float32]:
    """[sequences, heads, 1, dim] of every layer as [layers, heads, sequences, dim]."""
    return np.stack([x[:, :, 0].transpose(0, 1).float().cpu().numpy() for x in tensors])


def _check_values(
    section: Section, values: NDArray[np.float32], tolerance: float, name: str
) -> None:
    rows = np.empty((values.shape[2], section.v_width), np.float32)
    layers = len(section.layers)
    gather(values, np.arange(layers), Rotations.none(layers), rows)
    for layer, error in zip(section.layers, _differences(rows, layers), strict=True):
        if not error <= tolerance:
            raise UnsupportedError(
                f"{name}: the values of layer {layer} depend on the position (by {error:.2g}, "
                f"relative), so they are not plain attention values; supported are caches of one "
                f"key and one value per head, not compressed ones"
            )


def _explain(
    section: Section,
    keys: NDArray[np.float32],
    positions: NDArray[np.int64],
    ropes: list[Rope],
    tolerance: float,
    name: str,
) -> tuple[Rope | None, ...]:
    """The table of each layer that makes ``keys`` [layers, heads, positions, dim] equal."""
    layers = len(keys)
    candidates = [None, *(r for r in ropes if r.rotary_dim <= section.k_dim)]
    errors = np.empty((len(candidates), layers))
    rows = np.empty((len(positions), section.k_width), np.float32)
    for i, rope in enumerate(candidates):
        rotated = replace(section, rope=(rope,) * layers)
        gather(keys, np.arange(layers), Rotations.of(rotated, positions, inverse=True), rows)
        errors[i] = _differences(rows, layers)
    for layer, error in zip(section.layers, errors.min(axis=0), strict=True):
        if not error <= tolerance:
            raise UnsupportedError(
                f"{name}: no rotary table of the model explains the keys of layer {layer} (the "
                f"best leaves a relative difference of {error:.2g} between positions, expected at "
                f"most {tolerance:.2g}); supported are RoPE over the leading channels of a key, "
                f"half-split or interleaved, and no RoPE"
            )
    return tuple(candidates[i] for i in errors.argmin(axis=0))


def _differences(rows: NDArray[np.float32], layers: int) -> NDArray[np.float32]:
    """Per layer of ``rows`` [positions, layers * width], how much positions differ, relative."""
    x = rows.reshape(len(rows), layers, -1)
    spread = np.linalg.norm(x - x[:1], axis=2).max(axis=0)
    with np.errstate(invalid="ignore"):  # zeros explain nothing: NaN
        return np.asarray(spread / np.linalg.norm(x[0], axis=1), np.float32)


def _fingerprint(decoder: PreTrainedModel) -> bytes:
    config = decoder.config.to_dict()
    entries = {k: _canonical(config[k]) for k in FINGERPRINT_CONFIG if config.get(k) is not None}
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())
    digest.update(b"\n")
    for name, sample in sorted(_samples(decoder).items(), key=lambda item: item[0].encode()):
        digest.update(name.encode() + b"\n" + sample)
    return digest.digest()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else value.hex()
    return value


def _samples(decoder: PreTrainedModel) -> dict[str, bytes]:
    """Per ``NAME [DIM,...]`` the sampled values, in one transfer per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, parameter in decoder.named_parameters():
        if parameter.is_meta:
            raise UnsupportedError(
                f"parameter {name} is not loaded (meta device): load the model without offloading"
            )
        n = parameter.numel()
        m = min(n, _FINGERPRINT_SAMPLES)
        index = torch.arange(m, device=parameter.device) * (n - 1) // max(m - 1, 1)
        values = parameter.detach().flatten()[index]
        dtype = torch.bfloat16 if values.is_floating_point() else torch.int64
        title = f"{name} [{','.join(map(str, parameter.shape))}]"
        groups.setdefault((values.device, dtype), []).append((title, values.to(dtype)))
    samples = {}
    for group in groups.values():
        flat = torch.cat([values for _, values in group]).cpu()
        raw = flat.view(torch.int16 if flat.dtype == torch.bfloat16 else torch.int64).numpy()
        pieces = np.split(raw, np.cumsum([len(values) for _, values in group])[:-1])
        for (title, _), piece in zip(group, pieces, strict=True):
            samples[title] = piece.astype(piece.dtype.newbyteorder("<")).tobytes()
    return samples
