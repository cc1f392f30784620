"""What a transformers model caches: its sections, and the rotary table of every layer."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from kvtc_stream.coding.rope import Rotations, gather
from kvtc_stream.errors import CalibrationMismatchError, UnsupportedError
from kvtc_stream.formats import Geometry, Rope, Section
from kvtc_stream.integrations.transformers.model import (
    attention_layers,
    decoder_of,
    growing,
    inference,
)

#: Positions at which keys are compared; later ones would show the model's binary32 angles.
_PROBE_POSITIONS = (0, 1, 2, 5, 17, 61, 251, 1021)

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


def check_geometry(found: Geometry, expected: Geometry) -> None:
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
