"""Gradients with respect to what a model caches, on tiny models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_transformers import MODELS, WINDOW, drawn_ids, gpt2, gpt_neox, llama  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

import kvtc_stream as kvtc  # noqa: E402
from kvtc_stream.coding.rope import Rotations, gather  # noqa: E402
from kvtc_stream.integrations.transformers import capture, geometry_of  # noqa: E402
from kvtc_stream.integrations.transformers.gradients import (  # noqa: E402
    _loss_gradient,
    capture_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 3 * WINDOW
AFTER = TOKENS - WINDOW // 2  # the first tokens have left the window


def made(make: Callable[[], Any]) -> Any:
    """A model in float64 whose attention is far from uniform and whose norms are not 1."""
    torch.manual_seed(7)
    model = make().eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.rand_like(parameter))
            else:
                parameter.mul_(5)
    return model


def prefix(model: Any, ids: np.ndarray[Any, Any]) -> DynamicCache:
    """The cache of the tokens before ``AFTER``, in full."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids[:AFTER])[None], past_key_values=cache)
    return cache


def drawn_labels(model: Any, ids: np.ndarray[Any, Any], seed: int) -> Any:
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, AFTER:]
    return _loss_gradient(logits, seed).argmin(dim=-1)  # the only negative one of a token


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_models_own_keys_and_values(name: str, attention: str) -> None:
    model = made(MODELS[name])
    model.set_attn_implementation(attention)
    ids = drawn_ids(TOKENS)
    captured = capture_gradients(model, ids, after=AFTER, seed=3)

    # Autograd through the model's own RoPE, to what enters it, and to the values.
    before: dict[tuple[str, int], Any] = {}

    def keep(kind: str, layer: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            output.retain_grad()
            before[kind, layer] = output

        return hook

    def cut(_module: Any, _inputs: Any, output: Any) -> Any:
        """What earlier tokens themselves attend to has no part in it."""
        return torch.cat([output[:, :AFTER].detach(), output[:, AFTER:]], dim=1)

    labels = drawn_labels(model, ids, seed=3)
    with ExitStack() as hooks:
        for i, layer in enumerate(model.model.layers):
            attention_module = layer.self_attn
            keys = getattr(attention_module, "k_norm", attention_module.k_proj)
            hooks.enter_context(keys.register_forward_hook(keep("k", i)))
            hooks.enter_context(attention_module.v_proj.register_forward_hook(keep("v", i)))
            hooks.enter_context(attention_module.o_proj.register_forward_hook(cut))
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, AFTER:]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()

    sections = geometry_of(model).sections
    assert [entry[0] for entry in captured] == list(range(len(sections)))
    for section, (_, _, _, grad_k, grad_v) in zip(sections, captured, strict=True):
        for i, layer in enumerate(section.layers):
            for kind, ours in (("k", grad_k[i]), ("v", grad_v[i])):
                assert ours.dtype == torch.float32
                # v_proj gives [1, tokens, heads * dim], a norm per head before or after transposing
                expected = before[kind, layer].grad[0]
                if expected.shape[0] != TOKENS:
                    expected = expected.transpose(0, 1)
                expected = expected.reshape(TOKENS, section.kv_heads, -1).transpose(0, 1)[:, :AFTER]
                scale = float(expected.abs().max())
                assert scale > 1e-3
                torch.testing.assert_close(ours[0].double(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("make", [llama, MODELS["yarn"], MODELS["gemma3"], gpt_neox, gpt2])
def test_gradients_predict_what_a_changed_prefix_does_to_the_loss(make: Callable[[], Any]) -> None:
    model = made(make)
    ids = drawn_ids(TOKENS)
    rng = np.random.default_rng(1)
    labels = drawn_labels(model, ids, seed=5)

    def loss(layer: int, delta_k: Any, delta_v: Any) -> float:
        cache = prefix(model, ids)
        cache.layers[layer].keys += delta_k
        cache.layers[layer].values += delta_v
        with torch.no_grad():
            rest = model(input_ids=torch.from_numpy(ids[AFTER:])[None], past_key_values=cache)
        return float(torch.nn.functional.cross_entropy(rest.logits[0], labels, reduction="sum"))

    geometry = geometry_of(model)
    for index, _, _, grad_k, grad_v in capture_gradients(model, ids, after=AFTER, seed=5):
        section = geometry.sections[index]
        x = rng.standard_normal(section.k_shape(AFTER)).astype(np.float32)
        rows = np.empty((AFTER, section.k_width), np.float32)
        put_on = Rotations.of(section, np.arange(AFTER), inverse=False)
        gather(x, np.arange(len(x)), put_on, rows)
        rotated = rows.reshape(AFTER, *x.shape[:2], -1).transpose(1, 2, 0, 3)
        y = rng.standard_normal(section.v_shape(AFTER)).astype(np.float32)
        for i, layer in enumerate(section.layers):
            for kind, gradient, change in (("k", grad_k, x), ("v", grad_v, y)):
                delta = 1e-3 * torch.from_numpy((rotated if kind == "k" else y)[i].copy()).double()
                up, down = (
                    loss(layer, *((s * delta, 0) if kind == "k" else (0, s * delta)))
                    for s in (1, -1)
                )
                expected = float((gradient[i][0] * torch.from_numpy(change[i])).sum())
                typical = float(gradient[i].norm())  # of a random direction's slope
                assert typical > 1e-2
                # Norms compute in float32, even in a float64 model.
                assert (up - down) / 2e-3 == pytest.approx(expected, abs=5e-3 * typical + 2e-4)


def test_cache_is_that_of_the_first_tokens() -> None:
    model = made(MODELS["gemma3"])
    ids = drawn_ids(TOKENS)
    for (i, k, v), (j, *ours, _, _) in zip(
        capture(model, ids[:AFTER]), capture_gradients(model, ids, after=AFTER, seed=0), strict=True
    ):
        assert i == j
        for mine, theirs in zip(ours, (k, v), strict=True):
            assert not any(x.requires_grad for x in mine)
            torch.testing.assert_close(mine, theirs)


def test_tokens_out_of_the_window_have_no_gradient() -> None:
    model = made(MODELS["gemma3"])
    for section, (_, _, _, grad_k, grad_v) in zip(
        geometry_of(model).sections,
        capture_gradients(model, drawn_ids(TOKENS), after=AFTER, seed=0),
        strict=True,
    ):
        for layer, *gradients in zip(section.layers, grad_k, grad_v, strict=True):
            for x in gradients:
                seen = x[0].abs().amax(dim=(0, 2)) > 0
                first = AFTER - WINDOW + 1 if layer != 2 else 0
                assert seen[first:].all()
                assert not seen[:first].any()


@pytest.mark.parametrize("tokens", [2, 9])
def test_half_of_the_document_by_default(tokens: int) -> None:
    model = made(llama)
    ids = drawn_ids(tokens)
    [(_, _, _, grad_k, grad_v)] = capture_gradients(model, ids, seed=1)
    [(_, _, _, expected_k, expected_v)] = capture_gradients(model, ids, after=tokens // 2, seed=1)
    assert grad_k[0].shape == (1, 2, tokens // 2, 8)
    for mine, theirs in zip(grad_k + grad_v, expected_k + expected_v, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("tokens", "after"), [(9, 0), (9, -1), (9, 9), (9, 10), (1, None)])
def test_nothing_before_or_after(tokens: int, after: int | None) -> None:
    with pytest.raises(ValueError, match=rf"after must be from 1 to tokens - 1, .* of {tokens} "):
        capture_gradients(made(llama), drawn_ids(tokens), after=after, seed=0)


def test_labels_follow_the_models_distribution() -> None:
    torch.manual_seed(0)
    one = 2 * torch.randn(12)
    tokens = 20_000
    p = one.softmax(0)
    residual = _loss_gradient(one.expand(tokens, -1), 11) - p
    labels = residual.argmin(dim=-1)
    assert torch.equal(-residual.round(), torch.nn.functional.one_hot(labels, 12).float())
    counts = torch.bincount(labels, minlength=12)
    assert float(((counts - tokens * p) ** 2 / (tokens * p)).sum()) < 32  # χ² of 11, p < 0.001
    assert torch.equal(residual, _loss_gradient(one.expand(tokens, -1), 11) - p)
    assert not torch.equal(residual, _loss_gradient(one.expand(tokens, -1), 12) - p)


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_same_seed_same_gradients_whatever_surrounds(surrounding: Callable[[], Any]) -> None:
    model = made(llama)
    ids = drawn_ids(9)
    expected = capture_gradients(model, ids, seed=1)
    with surrounding():
        found = capture_gradients(model, ids.tolist(), seed=1)
    assert torch.equal(found[0][3][0], expected[0][3][0])
    assert not torch.equal(capture_gradients(model, ids, seed=2)[0][3][0], expected[0][3][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_in_the_models_dtype(dtype: Any) -> None:
    model = made(llama)
    ids = drawn_ids(40)
    exact = capture_gradients(model, ids, seed=1)
    rounded = capture_gradients(model.to(dtype), ids, seed=1)
    for mine, theirs in zip(rounded[0][3] + rounded[0][4], exact[0][3] + exact[0][4], strict=True):
        assert mine.dtype == torch.float32
        # Rounded logits may draw another label.
        assert float((mine - theirs).norm() / theirs.norm()) < (0.5 if dtype.itemsize < 4 else 1e-3)


def state(model: Any) -> Any:
    return (
        [part.training for part in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [len(part._forward_hooks) for part in model.modules()],
    )


def test_model_is_left_as_it_was() -> None:
    model = made(llama).train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    capture_gradients(model, drawn_ids(9), seed=0)
    assert state(model) == before

    def fail(*_: Any) -> None:
        raise RuntimeError("in the head")

    with (
        model.lm_head.register_forward_hook(fail),
        pytest.raises(RuntimeError, match="in the head"),
    ):
        capture_gradients(model, drawn_ids(9), seed=0)
    assert state(model) == before


def test_a_model_without_a_head() -> None:
    with pytest.raises(kvtc.UnsupportedError, match="LlamaModel has no language model head"):
        capture_gradients(made(llama).model, drawn_ids(9), seed=0)


@pytest.mark.parametrize("hidden", ["layers.0", "norm"])
def test_a_model_that_cuts_gradients_off(hidden: str) -> None:
    """As those do that run their layers again and again and learn from the last run only."""
    model = made(llama)
    part = model.model.get_submodule(hidden)
    part.register_forward_hook(lambda _, __, output: output.detach())
    with pytest.raises(kvtc.UnsupportedError, match="LlamaForCausalLM cuts gradients off"):
        capture_gradients(model, drawn_ids(9), seed=0)
