"""What a transformers model caches: its sections, and the rotary table of every layer."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from kvtc_stream.coding.rope import Rotations, gather
from kvtc_stream.errors import CalibrationMismatchError, UnsupportedError
from kvtc_stream.formats import Geometry, Rope, Section
from kvtc_stream.integrations.transformers.identity import config_text, found_of
from kvtc_stream.integrations.transformers.model import (
    SUPPORTED_CACHES,
    StopRun,
    attention_layers,
    decoder_of,
    filled_layers,
    found_once,
    modules_of,
    plain_model,
    probe_tokens,
    run,
)

#: Positions at which keys are compared; later ones would show the model's binary32 angles.
_PROBE_POSITIONS = (0, 1, 2, 5, 17, 61, 251, 1021)
#: Places in a sequence at which they are, where the model takes no positions.
_PROBE_PLACES = 64

#: Per decoder, what its geometry was found with, and the geometry.
_geometries: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, Geometry]] = (
    weakref.WeakKeyDictionary()
)


def geometry_of(model: PreTrainedModel) -> Geometry:
    """What a model caches: its sections, and the rotary table of every layer, proven by a run.

    The decoder runs once on eight sequences of one equal token at different positions. A layer's
    keys then differ by RoPE alone, so taking off the right table makes them equal, and its values
    must not differ. Candidates are the model's own ``inv_freq`` buffers (scaling is already in
    them) with their attention scaling factor, half-split and interleaved, and no RoPE. The proof
    covers frequencies, pairing, rotary dimension and which layer uses which table; a scaling
    factor is taken from the model as it is. Where the model takes no ``position_ids``, or seems to
    have no RoPE, the tokens stand in one sequence, and keys at its places are compared.

    Another run shows that the model fills a ``DynamicCache``, goes on from it, and is causal.

    Layers with different windows or shapes become different sections, in order of their first
    layer; layers that read another layer's cache are in none. The result is kept for as long as
    the model lives and neither its configuration nor its rotary tables change.

    Raises
    ------
    UnsupportedError
        The cache is not attention keys and values in token order (encoders, encoder-decoder,
        recurrent, compressed), there is none, the rotary tables change with length (``dynamic``,
        ``longrope``), or no table explains the keys.
    """
    return _geometry(model)


@found_once
def _geometry(model: PreTrainedModel) -> Geometry:
    decoder, name = decoder_of(model), type(plain_model(model)).__name__
    found = found_of(decoder)
    if "geometry" not in found:
        found["geometry"] = _found(decoder, name)
    geometry: Geometry = found["geometry"]
    return geometry


def _found(decoder: PreTrainedModel, name: str) -> Geometry:
    """The geometry, without a run where only weights have changed, as training does."""
    tables = _rotary_tables(decoder, name)
    found_with = (config_text(decoder.config), tables)
    known = _geometries.get(decoder)
    if known is None or known[0] != found_with:
        known = _geometries[decoder] = (found_with, _probe(decoder, tables, name))
    return known[1]


@dataclass(frozen=True)
class _EqualTokens:
    """Keys and values [heads, positions, dim] of one token at many positions, by layer."""

    positions: NDArray[np.int64]
    keys: dict[int, NDArray[np.float32]]
    values: dict[int, NDArray[np.float32]]
    tolerance: float
    absolute: bool  #: positions are added to the embeddings: keys differ without any RoPE


def _probe(decoder: PreTrainedModel, tables: list[Rope], name: str) -> Geometry:
    kinds = attention_layers(DynamicCache(config=decoder.config), name)
    _check_causal(decoder, name)
    by_id = "position_ids" in inspect.signature(decoder.forward).parameters
    probe = _equal_tokens(decoder, by_id, bool(tables), name)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, layer in kinds.items():
        if number in probe.keys:
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else 0
            (heads, _, k_dim), v_dim = probe.keys[number].shape, probe.values[number].shape[2]
            groups.setdefault((window, heads, k_dim, v_dim), []).append(number)
    sections = [
        Section(tuple(numbers), heads, k_dim, v_dim)
        for (_, heads, k_dim, v_dim), numbers in groups.items()
    ]
    if probe.absolute:
        return Geometry(tuple(sections))
    explained = [_explained(section, probe, tables, name) for section in sections]
    if by_id and not any(any(section.rope) for section in explained):
        # Positions that the model does not heed would look like no RoPE.
        probe = _equal_tokens(decoder, False, bool(tables), name)
        explained = [_explained(section, probe, tables, name) for section in sections]
    return Geometry(tuple(explained))


def _check_causal(decoder: PreTrainedModel, name: str) -> None:
    """A token's keys and values depend on no later token, and the cache grows by new ones."""
    first, *others, last = probe_tokens(decoder, 4)
    rows = torch.tensor([[first, *[token] * 3] for token in others])
    cache = DynamicCache()
    run(decoder, cache, name, input_ids=rows)
    held = {n: (x.keys, x.values) for n, x in filled_layers(cache, name).items()}
    for number, pair in held.items():
        for x in pair:
            if x.shape[0] != 2 or x.ndim != 4 or x.shape[2] != 4:
                raise UnsupportedError(
                    f"layer {number} of {name} caches {list(x.shape)} of 2 sequences of 4 tokens; "
                    f"{SUPPORTED_CACHES}"
                )
            one, other = x[:, :, 0].float()
            if not (one - other).norm() <= _tolerance(x) * one.norm():
                raise UnsupportedError(
                    f"{name}: what layer {number} caches of a token depends on later tokens, as in "
                    f"an encoder; supported are causal decoders"
                )
    run(decoder, cache, name, input_ids=torch.tensor([[last], [last]]))
    for number, layer in filled_layers(cache, name).items():
        for x, before in zip((layer.keys, layer.values), held[number], strict=True):
            if x.shape[2] != 5 or not torch.equal(x[:, :, :4], before):
                raise UnsupportedError(
                    f"{name} does not go on from its cache: of 4 tokens and 1 more, layer {number} "
                    f"caches {x.shape[2]}, or others than before; {SUPPORTED_CACHES}"
                )


def _equal_tokens(decoder: PreTrainedModel, by_id: bool, rotary: bool, name: str) -> _EqualTokens:
    """By the ids of positions, one sequence for each, or by their places in one sequence."""
    [token] = probe_tokens(decoder, 1)
    limit = getattr(decoder.config, "max_position_embeddings", None) or max(_PROBE_POSITIONS) + 1
    if by_id:
        # One token attends to itself only, so what enters a layer does not depend on position.
        positions = np.array([p for p in _PROBE_POSITIONS if p < limit], np.int64)
        inputs = {
            "input_ids": torch.full((len(positions), 1), token),
            "position_ids": torch.from_numpy(positions)[:, None],
        }
    else:
        # Equal values have themselves as their mean, whatever attention makes of the keys.
        positions = np.arange(min(_PROBE_PLACES, limit))
        inputs = {"input_ids": torch.full((1, len(positions)), token)}
    cache = DynamicCache()
    output = run(decoder, cache, name, output_hidden_states=not rotary, **inputs)
    absolute = False
    if not rotary:
        embeddings = output.hidden_states[0].flatten(0, 1)
        absolute = bool((embeddings != embeddings[:1]).any())
    layers = filled_layers(cache, name)
    # [sequences, heads, tokens, dim], where there is one sequence or one token.
    keys, values = (
        {
            n: getattr(layer, kind).transpose(0, 1).flatten(1, 2).float().cpu().numpy()
            for n, layer in layers.items()
        }
        for kind in ("keys", "values")
    )
    return _EqualTokens(
        positions,
        keys,
        values,
        max(_tolerance(layer.keys) for layer in layers.values()),
        absolute,
    )


def _tolerance(x: Tensor) -> float:
    """Models round angles to binary32, and cosines, sines and keys to their own dtype."""
    return float(1e-3 + 8 * torch.finfo(x.dtype).eps)


class _FirstKeys(DynamicCache):
    """Keeps the keys of the layer that comes first, and stops the model there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Any:
        raise StopRun(layer_idx, key_states)


def key_errors(
    model: PreTrainedModel,
    layer: int,
    token_ids: NDArray[np.int64],
    keys: Tensor,
    positions: NDArray[np.int64],
) -> NDArray[np.float64] | None:
    """How far ``keys`` are from those of the tokens at each position, in the first layer.

    There nothing counts but token and position. ``keys`` is [heads, tokens, dim], the result
    [tokens, positions], relative. ``None`` where that is not known: without RoPE, positions may be
    counted in other ways.
    """
    ropes = [
        rope
        for section in geometry_of(model).sections
        for n, rope in zip(section.layers, section.rope, strict=False)
        if n == layer
    ]
    decoder = decoder_of(model)
    by_id = "position_ids" in inspect.signature(decoder.forward).parameters
    if not ropes or ropes[0] is None or not by_id:
        return None
    ids = torch.from_numpy(token_ids.copy())[:, None]
    cache = _FirstKeys(config=decoder.config)
    name = type(plain_model(model)).__name__
    try:
        run(decoder, cache, name, input_ids=ids, position_ids=torch.zeros_like(ids))
        return None
    except StopRun as reached:
        number, first = reached.args
    if number != layer or first.shape[2] != 1:
        return None
    # [tokens, heads, dim]; a key at position p is that at 0, each pair turned by p times its
    # frequency, so one product for each pair gives the distance to all positions.
    own = keys.transpose(0, 1).double().cpu().numpy()
    at_zero = first[:, :, 0].double().cpu().numpy()
    a, b = (_pairs(x, ropes[0]) for x in (own, at_zero))
    products = (a * b.conj()).sum(axis=1)  # [tokens, pairs]
    turns = np.exp(-1j * np.outer(np.array(ropes[0].inv_freq), positions))
    rest = slice(ropes[0].rotary_dim, None)
    along = (products @ turns).real + (own * at_zero)[:, :, rest].sum(axis=(1, 2))[:, None]
    norms = (at_zero**2).sum(axis=(1, 2))[:, None]
    squares = (own**2).sum(axis=(1, 2))[:, None] + norms - 2 * along
    # Keys are zero where embeddings are, as those of padding.
    errors: NDArray[np.float64] = np.sqrt(
        np.maximum(squares, 0) / np.maximum(norms, np.finfo(np.float32).tiny)
    )
    return errors


def longest_document(model: PreTrainedModel) -> int | None:
    """Most tokens that a model reads at once, where it has learned positions; ``None`` if any.

    RoPE turns keys at all positions; how far it serves is the caller's to know.
    """
    if any(rope is not None for section in geometry_of(model).sections for rope in section.rope):
        return None
    longest: int | None = getattr(decoder_of(model).config, "max_position_embeddings", None)
    return longest


def check_document(model: PreTrainedModel, token_ids: NDArray[np.int64]) -> None:
    """``ValueError`` if a model cannot look up the ids, or has no position for some.

    On a CUDA device the look-up itself leaves the process unable to use the device.
    """
    check_vocabulary(model, token_ids)
    check_length(model, len(token_ids))


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """``ValueError`` if a model has learned fewer positions."""
    longest = longest_document(model)
    if longest is not None and tokens > longest:
        raise ValueError(
            f"{type(plain_model(model)).__name__} reads {longest} tokens at most, found {tokens}: "
            f"ask for fewer"
        )


def check_vocabulary(model: PreTrainedModel, token_ids: NDArray[np.int64]) -> None:
    embeddings: Any = decoder_of(model).get_input_embeddings()
    known = len(embeddings.weight)
    wrong = token_ids[(token_ids < 0) | (token_ids >= known)]
    if len(wrong):
        raise ValueError(
            f"{type(plain_model(model)).__name__} has token ids from 0 to {known - 1}, found "
            f"{wrong[0]}: use the model's own tokenizer"
        )


def _pairs(x: NDArray[np.float64], rope: Rope) -> NDArray[np.complex128]:
    """The channels that RoPE turns together, as complex numbers."""
    turned = x[..., : rope.rotary_dim]
    half = rope.rotary_dim // 2
    if rope.interleaved:
        return turned[..., 0::2] + 1j * turned[..., 1::2]
    return turned[..., :half] + 1j * turned[..., half:]


def _rotary_tables(decoder: PreTrainedModel, name: str) -> list[Rope]:
    """Every table of the model's rotary embeddings, half-split and interleaved."""
    ropes = []
    for module in modules_of(decoder):
        for buffer, table in module._buffers.items():
            if table is None:
                continue
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


def _explained(section: Section, probe: _EqualTokens, tables: list[Rope], name: str) -> Section:
    """The section with the table of each layer that makes the keys of all positions equal."""
    layers = len(section.layers)
    values = np.stack([probe.values[n] for n in section.layers])
    rows = np.empty((len(probe.positions), section.v_width), np.float32)
    gather(values, np.arange(layers), Rotations.none(layers), rows)
    for layer, error in zip(section.layers, _differences(rows, layers), strict=True):
        if not error <= probe.tolerance:
            raise UnsupportedError(
                f"{name}: the values of layer {layer} depend on the position (by {error:.2g}, "
                f"relative), so they are not plain attention values; supported are caches of one "
                f"key and one value per head, not compressed ones"
            )
    keys = np.stack([probe.keys[n] for n in section.layers])
    if not np.isfinite(keys).all() or not keys.any(axis=(1, 2, 3)).all():
        raise UnsupportedError(
            f"{name}: some keys of layers {list(section.layers)} are not numbers, or all of them "
            f"zero, so that no RoPE can be found: load the model's weights"
        )
    candidates = [None, *(r for r in tables if r.rotary_dim <= section.k_dim)]
    errors = np.empty((len(candidates), layers))
    rows = np.empty((len(probe.positions), section.k_width), np.float32)
    for i, rope in enumerate(candidates):
        rotated = replace(section, rope=(rope,) * layers)
        rotations = Rotations.of(rotated, probe.positions, inverse=True)
        gather(keys, np.arange(layers), rotations, rows)
        errors[i] = _differences(rows, layers)
    for layer, error in zip(section.layers, errors.min(axis=0), strict=True):
        if not error <= probe.tolerance:
            raise UnsupportedError(
                f"{name}: no rotary table of the model explains the keys of layer {layer} (the "
                f"best leaves a relative difference of {error:.2g} between positions, expected at "
                f"most {probe.tolerance:.2g}); supported are RoPE over the leading channels of a "
                f"key, half-split or interleaved, and no RoPE"
            )
    return replace(section, rope=tuple(candidates[i] for i in errors.argmin(axis=0)))


def _differences(rows: NDArray[np.float32], layers: int) -> NDArray[np.float32]:
    """Per layer of ``rows`` [positions, layers * width], how much positions differ, relative."""
    x = rows.reshape(len(rows), layers, -1)
    spread = np.linalg.norm(x - x[:1], axis=2).max(axis=0)
    norm = np.linalg.norm(x[0], axis=1)
    return np.where(spread == 0, 0, spread / np.maximum(norm, np.finfo(np.float32).tiny))


def check_geometry(found: Geometry, expected: Geometry) -> None:
    alike = found == expected or (
        len(found.sections) == len(expected.sections)
        and all(
            replace(a, rope=()) == replace(b, rope=())
            and len(a.rope) == len(b.rope)
            and all(_same_rope(*pair) for pair in set(zip(a.rope, b.rope, strict=True)))
            for a, b in zip(found.sections, expected.sections, strict=True)
        )
    )
    if not alike:
        raise CalibrationMismatchError(
            f"the model's cache has {_describe(found)}; the calibration is for "
            f"{_describe(expected)}: calibrate this model, or load it with dtype= if it was cast "
            "by .to() or .half(), which rounds its rotary tables"
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
