"""How attention reads a cache, on tiny models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_transformers import MODELS, SIZES, VOCABULARY, drawn_ids, gpt2, gpt_neox, llama  # noqa: E402
from test_transformers_gradients import made, state  # noqa: E402
from transformers import AttentionInterface  # noqa: E402

import kvtc_stream as kvtc  # noqa: E402
from kvtc_stream.integrations.transformers import capture, geometry_of  # noqa: E402
from kvtc_stream.integrations.transformers.calibration import _query_weights  # noqa: E402
from kvtc_stream.integrations.transformers.queries import (  # noqa: E402
    output_norms,
    query_second_moments,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 40


def falcon() -> Any:
    """Its attention is its own."""
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.FalconForCausalLM(config)


def bitnet() -> Any:
    """A norm stands before its output projection."""
    return transformers.BitNetForCausalLM(transformers.BitNetConfig(**SIZES))


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def queries_before_rope(model: Any, ids: np.ndarray[Any, Any]) -> list[Any]:
    """Per layer [heads, tokens, k_dim], as the model itself computes them."""
    found: dict[int, Any] = {}
    with ExitStack() as hooks, torch.no_grad():
        for i, attention in enumerate(attentions(model)):
            module = getattr(attention, "q_norm", attention.q_proj)

            def keep(_module: Any, _inputs: Any, output: Any, i: int = i) -> None:
                found[i] = output[0]

            hooks.enter_context(module.register_forward_hook(keep))
        model(input_ids=torch.from_numpy(ids)[None])
    out = []
    for i, attention in enumerate(attentions(model)):
        x = found[i]
        # q_proj gives [tokens, heads * dim], a norm per head before or after transposing
        if x.shape[0] != len(ids):
            x = x.transpose(0, 1)
        out.append(x.reshape(len(ids), -1, attention.head_dim).transpose(0, 1))
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_of_the_models_own_queries(name: str, attention: str) -> None:
    model = made(MODELS[name])
    model.set_attn_implementation(attention)
    ids = drawn_ids(TOKENS)
    moments = query_second_moments(model, ids)
    queries = queries_before_rope(model, ids)
    for section, ours in zip(geometry_of(model).sections, moments, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == (*section.k_shape(0)[:2], section.k_dim, section.k_dim)
        for row, layer in enumerate(section.layers):
            rope = section.rope[row]
            # Before RoPE the score at distance zero is of both, each times the scaling factor.
            rotated = 0 if rope is None else rope.rotary_dim
            scale = torch.full((section.k_dim,), attentions(model)[layer].scaling).double()
            scale[:rotated] *= 1 if rope is None else rope.scale**2
            q = scale * queries[layer]
            group = len(q) // section.kv_heads
            assert group > 1
            for head in range(section.kv_heads):
                rows = q[head * group : (head + 1) * group].reshape(-1, section.k_dim)
                expected = (rows.T @ rows / len(rows)).numpy()
                np.testing.assert_allclose(
                    ours[row, head], expected, rtol=0, atol=1e-5 * expected.max()
                )


@pytest.mark.parametrize("make", [gpt_neox, gpt2])
def test_moments_of_models_that_project_all_at_once(make: Callable[[], Any]) -> None:
    model = made(make)
    ids = drawn_ids(TOKENS)
    found: list[Any] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        found.append(output[0])

    with ExitStack() as hooks, torch.no_grad():
        for key, part in model.named_modules():
            if key.endswith(("query_key_value", "attn.c_attn")):
                hooks.enter_context(part.register_forward_hook(keep))
        model(input_ids=torch.from_numpy(ids)[None])
    [section] = geometry_of(model).sections
    [moments] = query_second_moments(model, ids)
    heads, dim = section.kv_heads, section.k_dim
    for x, ours in zip(found, moments, strict=True):
        if make is gpt_neox:  # queries, keys and values of a head are together
            q = x.reshape(TOKENS, heads, 3, dim)[:, :, 0]
        else:
            q = x.reshape(TOKENS, 3, heads, dim)[:, 0]
        q = q.transpose(0, 1) / dim**0.5
        expected = (q.transpose(1, 2) @ q / TOKENS).numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * expected.max())


@pytest.mark.parametrize("make", [*MODELS.values(), gpt_neox, gpt2])
def test_output_norms_are_those_of_the_projections(make: Callable[[], Any]) -> None:
    model = made(make)
    for key, parameter in model.named_parameters():
        if "bias" in key:
            torch.nn.init.normal_(parameter)
    weights = [
        parameter.detach()
        for key, parameter in model.named_parameters()
        if key.endswith(("o_proj.weight", "attention.dense.weight", "attn.c_proj.weight"))
    ]
    for section, norms in zip(geometry_of(model).sections, output_norms(model), strict=True):
        assert norms.dtype == np.float32
        assert norms.shape == (*section.v_shape(0)[:2], section.v_dim, section.v_dim)
        group = model.config.num_attention_heads // section.kv_heads
        for row, layer in enumerate(section.layers):
            w = weights[layer].T if make is gpt2 else weights[layer]  # [hidden, heads * v_dim]
            for head in range(section.kv_heads):
                blocks = [
                    w[:, j * section.v_dim : (j + 1) * section.v_dim]
                    for j in range(head * group, (head + 1) * group)
                ]
                expected = sum(block.T @ block for block in blocks).numpy()
                np.testing.assert_allclose(
                    norms[row, head], expected, rtol=0, atol=1e-5 * expected.max()
                )


def test_lookups_and_model_are_left_as_they_were() -> None:
    model = made(llama).train()
    lookup = AttentionInterface.__dict__["get_interface"]
    before = (state(model), [len(part._forward_pre_hooks) for part in model.modules()])

    def check() -> None:
        assert AttentionInterface.__dict__["get_interface"] is lookup
        assert (
            state(model),
            [len(part._forward_pre_hooks) for part in model.modules()],
        ) == before

    query_second_moments(model, drawn_ids(9))
    output_norms(model)
    check()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    for run in (lambda: query_second_moments(model, drawn_ids(9)), lambda: output_norms(model)):
        with (
            model.model.layers[2].mlp.register_forward_hook(fail),
            pytest.raises(RuntimeError, match="in the middle"),
        ):
            run()
        check()


def test_another_model_at_the_same_time_is_not_recorded() -> None:
    model, other = made(llama), made(MODELS["qwen3"])
    ids = drawn_ids(9)
    expected = query_second_moments(model, ids)

    def run_other(*_: Any) -> None:
        other(input_ids=torch.from_numpy(ids)[None])

    with model.model.layers[1].register_forward_hook(run_other):
        found = query_second_moments(model, ids)
    np.testing.assert_array_equal(found[0], expected[0])


def test_attention_that_cannot_be_seen() -> None:
    model = made(falcon)
    for run in (lambda: query_second_moments(model, drawn_ids(9)), lambda: output_norms(model)):
        with pytest.raises(
            kvtc.UnsupportedError,
            match=r"FalconForCausalLM: the attention of layers \[0, 1\] .* another importance",
        ):
            run()


def test_a_norm_before_the_output_projection() -> None:
    model = made(bitnet)
    query_second_moments(model, drawn_ids(9))
    with pytest.raises(kvtc.UnsupportedError, match="BitNetAttention's attention to layer 0 "):
        output_norms(model)


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        query_second_moments(made(llama), [])


def test_a_layer_that_adds_little_is_not_lost() -> None:
    """Its weights are raised to what most layers' are worth; those of others stay."""
    model = made(llama)
    layers = len(attentions(model))
    ids = [drawn_ids(300, seed) for seed in range(2)]

    def worth() -> np.ndarray[Any, Any]:
        """[layers]: what all of a layer's values are worth by its weights."""
        [(_, v_weights)] = _query_weights(model, ids, lambda _: None)
        [(_, _, v)] = capture(model, ids[0])
        values = np.stack([x[0].double().numpy() for x in v])
        centred = values - values.mean(axis=2, keepdims=True)
        return np.einsum("lhti,lhij,lhtj->l", centred, v_weights, centred)

    before = worth()
    with torch.no_grad():
        attentions(model)[0].v_proj.weight.mul_(0.01)
    after = worth()
    assert after[0] > 0.3 * np.median(after)
    assert before[0] > 0.3 * np.median(before)
    assert layers > 1
