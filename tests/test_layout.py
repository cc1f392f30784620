"""Rows and RoPE, against complex arithmetic in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import sections

import kvtc_stream as kvtc
from kvtc_stream.coding.rope import Rotations, gather, scatter, squared_errors

Float = NDArray[np.float64]
Keys = tuple[kvtc.Section, NDArray[np.float32], NDArray[np.int64]]


def rotated(x: NDArray[Any], rope: kvtc.Rope | None, positions: NDArray[np.int64]) -> Float:
    """RoPE put on x [heads, tokens, dim], each pair a complex number."""
    y = x.astype(np.float64)
    if rope is None:
        return y
    half = len(rope.inv_freq)
    turn = rope.scale * np.exp(1j * np.outer(positions.astype(np.float64), rope.inv_freq))
    a, b = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if rope.interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    pairs = (y[..., a] + 1j * y[..., b]) * turn
    y[..., a], y[..., b] = pairs.real, pairs.imag
    return y


def rows_of(section: kvtc.Section, x: NDArray[Any], rotations: Rotations) -> NDArray[np.float32]:
    rows = np.full((x.shape[2], section.k_width), np.nan, np.float32)
    gather(x, np.arange(len(section.layers)), rotations, rows)
    return rows


@st.composite
def keys(draw: st.DrawFn) -> Keys:
    section = draw(sections(range(draw(st.integers(1, 4)))))
    tokens = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    steps = draw(st.lists(st.integers(1, 10**6), min_size=tokens, max_size=tokens))
    x = rng.standard_normal(section.k_shape(tokens), np.float32)
    return section, x, np.cumsum(np.array(steps, np.int64))


def ropes_of(section: kvtc.Section) -> tuple[kvtc.Rope | None, ...]:
    return section.rope or (None,) * len(section.layers)


@given(keys())
def test_rope_put_on(case: Keys) -> None:
    section, x, positions = case
    plain = Rotations.none(len(section.layers))
    out = np.full_like(x, np.nan)
    put_on = Rotations.of(section, positions, inverse=False)
    scatter(rows_of(section, x, plain), put_on, out)
    for layer, rope in enumerate(ropes_of(section)):
        np.testing.assert_allclose(out[layer], rotated(x[layer], rope, positions), atol=2e-6)


@given(keys())
def test_rope_taken_off(case: Keys) -> None:
    section, x, positions = case
    turned = np.stack(
        [rotated(x[i], rope, positions) for i, rope in enumerate(ropes_of(section))]
    ).astype(np.float32)
    rows = rows_of(section, turned, Rotations.of(section, positions, inverse=True))
    expected = x.transpose(2, 0, 1, 3).reshape(len(positions), section.k_width)
    np.testing.assert_allclose(rows, expected, atol=2e-6)


@given(keys(), st.data())
def test_some_layers(case: Keys, data: st.DataObject) -> None:
    """A choice of layers gives exactly what all layers give there."""
    section, x, positions = case
    count = len(section.layers)
    layers = data.draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1).map(sorted))
    width = section.kv_heads * section.k_dim
    take_off = Rotations.of(section, positions, inverse=True)
    whole = rows_of(section, x, take_off)
    some = np.empty((len(positions), len(layers) * width), np.float32)
    gather(x, np.array(layers), take_off, some)
    columns = [c for i in layers for c in range(i * width, (i + 1) * width)]
    np.testing.assert_array_equal(some, whole[:, columns])
    put_on = Rotations.of(section, positions, inverse=False)
    back, part = np.empty_like(x), np.empty_like(x[layers])
    scatter(whole, put_on, back)
    scatter(some, put_on.select(layers), part)
    np.testing.assert_array_equal(part, back[layers])


def test_gather_leaves_other_cells_alone() -> None:
    section = kvtc.Section((0, 1), 1, 2, 2)
    x = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    rows = np.full((3, 5), -1, np.float32)
    gather(x, np.array([1, 0]), Rotations.none(2), rows)
    assert rows.tolist() == [[4, 5, 0, 1, -1], [6, 7, 2, 3, -1], [-1] * 5]
    assert section.k_width == 4


@given(keys(), st.sampled_from([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 3.4e38, 1e-40, 1.0]))
def test_bfloat16_is_the_cast_of_float32(case: Keys, hostile: float) -> None:
    """Read, rounded and compared in place, in any layout."""
    section, x, positions = case
    x.reshape(-1)[:1] = hostile
    with np.errstate(over="ignore"):
        narrow = x.astype(ml_dtypes.bfloat16)
    layers, mean = np.arange(len(x)), np.arange(section.k_width, dtype=np.float32) / 7
    put_on, take_off = Rotations.both(section, positions)
    rows, wide = (np.zeros((x.shape[2], section.k_width), np.float32) for _ in range(2))
    apart = np.zeros((*x.shape[:2], 2 * x.shape[2], x.shape[3]), narrow.dtype)[:, :, ::2]
    apart[:] = narrow
    with np.errstate(invalid="ignore"):
        gather(apart, layers, take_off, rows, mean)
        gather(narrow.astype(np.float32), layers, take_off, wide)
        np.testing.assert_array_equal(rows, wide - mean)
        out = np.empty_like(x)
        scatter(wide, put_on, apart, mean)
        scatter(wide + mean, put_on, out)
    np.testing.assert_array_equal(apart.view(np.uint16), out.astype(narrow.dtype).view(np.uint16))
    found = squared_errors(narrow, apart)
    for own, other in zip(
        found, squared_errors(*(a.astype(np.float32) for a in (narrow, apart))), strict=True
    ):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("position", [2**24 + 1, 2**40, 2**52])
def test_far_positions_keep_their_angle(position: int) -> None:
    """Angles are binary64: a binary32 angle would be off by whole turns."""
    section = kvtc.Section((0,), 1, 2, 2, (kvtc.Rope((1.0,)),))
    x = np.array([1.0, 0.0], np.float32).reshape(1, 1, 1, 2)
    rotations = Rotations.of(section, np.array([position]), inverse=False)
    out = np.empty_like(x)
    scatter(x.reshape(1, 2), rotations, out)
    expected = [np.cos(float(position)), np.sin(float(position))]
    np.testing.assert_allclose(out.ravel(), expected, atol=1e-7)


def test_against_transformers() -> None:
    """Llama's own rotation of keys."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    embedding = LlamaRotaryEmbedding(config)
    rope = kvtc.Rope(tuple(embedding.inv_freq.tolist()), scale=embedding.attention_scaling)
    k = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 50, 8), np.float32))
    positions = torch.arange(100, 150)
    cos, sin = embedding(k, positions[None])
    expected = apply_rotary_pos_emb(k, k, cos, sin)[1].numpy()
    section = kvtc.Section((0,), 2, 8, 8, (rope,))
    rows = rows_of(section, k.numpy(), Rotations.none(1))
    out = np.empty_like(expected)
    scatter(rows, Rotations.of(section, positions.numpy(), inverse=False), out)
    np.testing.assert_allclose(out, expected, atol=2e-5)
