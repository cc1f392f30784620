"""The transformers adapter, on tiny models with random weights."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.cache_utils import (  # noqa: E402
    DynamicCache,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticCache,
)

import kvtc_stream as kvtc  # noqa: E402
from kvtc_stream.coding.rope import Rotations, gather  # noqa: E402
from kvtc_stream.formats import Geometry, Role  # noqa: E402
from kvtc_stream.integrations.transformers import cache as cache_module  # noqa: E402
from kvtc_stream.integrations.transformers import (  # noqa: E402
    calibrate,
    capture,
    decode_batch,
    decode_cache,
    encode_cache,
    geometry_of,
    model_identity,
    token_digest,
)
from kvtc_stream.io.dlpack import numpy_dtype  # noqa: E402
from kvtc_stream.stream.decoder import BlockDecoder  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 97
WINDOW = 24
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**SIZES, "rope_parameters": LLAMA3, **changes})
    return transformers.LlamaForCausalLM(config)


def yarn() -> Any:
    return llama(rope_parameters=YARN)


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16))


def stablelm() -> Any:
    config = transformers.StableLmConfig(
        **SIZES, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}
    )
    return transformers.StableLmForCausalLM(config)


def cohere() -> Any:
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES))


def smollm3() -> Any:
    config = transformers.SmolLM3Config(**SIZES, no_rope_layer_interval=4)
    return transformers.SmolLM3ForCausalLM(config)


def gemma3_config() -> Any:
    changes = {"num_key_value_heads": 1, "head_dim": 8}
    return transformers.Gemma3TextConfig(
        **{**SIZES, **changes}, sliding_window=WINDOW, layer_types=LAYER_TYPES
    )


def gemma3() -> Any:
    return transformers.Gemma3ForCausalLM(gemma3_config())


MODELS = {make.__name__: make for make in (llama, yarn, qwen3, stablelm, cohere, smollm3, gemma3)}


@pytest.fixture(scope="module")
def built() -> Callable[[str], Any]:
    """Models by name, made once."""
    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in models:
            torch.manual_seed(sum(name.encode()))
            model = MODELS[name]().eval()
            with torch.no_grad():  # norms at their initial weight hide mistakes about them
                for key, parameter in model.named_parameters():
                    if "norm" in key:
                        parameter.add_(0.3 * torch.rand_like(parameter))
            models[name] = model
        return models[name]

    return get


@pytest.fixture(scope="module")
def calibrated(built: Callable[[str], Any]) -> Callable[[str], kvtc.Calibration]:
    """Calibrations by model name, made once."""
    made: dict[str, kvtc.Calibration] = {}

    def get(name: str) -> kvtc.Calibration:
        if name not in made:
            texts = [drawn_ids(160, seed) for seed in range(2, 5)]
            made[name] = calibrate(built(name), texts, tokens=400)
        return made[name]

    return get


def drawn_ids(tokens: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(2, VOCABULARY, tokens)


def prefill(model: Any, ids: np.ndarray[Any, Any]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True)
    return cache


def generate(model: Any, ids: np.ndarray[Any, Any], cache: DynamicCache) -> Any:
    """Greedy continuation and its scores."""
    inputs = torch.from_numpy(ids)[None]
    return model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def verbatim(calibration: kvtc.Calibration) -> kvtc.Codec:
    """A codec that loses nothing on short prompts."""
    return kvtc.Codec(calibration, ratio=4, window=1024)


def unrotated(section: kvtc.Section, rope: Any, x: Any) -> np.ndarray[Any, Any]:
    """Rows [tokens, layers * heads * dim] of keys from position 0, without RoPE."""
    layers, heads, tokens, dim = x.shape
    rows = np.empty((tokens, layers * heads * dim), np.float32)
    rotations = Rotations.of(replace(section, rope=rope), np.arange(tokens), inverse=True)
    gather(np.ascontiguousarray(x), np.arange(layers), rotations, rows)
    return rows


# --- Geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_keys_without_rope_are_the_models_own(name: str, built: Callable[[str], Any]) -> None:
    model = built(name)
    before: dict[int, np.ndarray[Any, Any]] = {}

    def hook(layer: int) -> Callable[..., None]:
        def take(_module: Any, _inputs: Any, output: Any) -> None:
            before[layer] = output.detach().numpy()

        return take

    attentions = [layer.self_attn for layer in model.model.layers]
    handles = [
        getattr(a, "k_norm", a.k_proj).register_forward_hook(hook(i))
        for i, a in enumerate(attentions)
    ]
    captured = capture(model, drawn_ids(60))
    for handle in handles:
        handle.remove()

    sections = geometry_of(model).sections
    assert [index for index, _, _ in captured] == list(range(len(sections)))
    for section, (_, k, _) in zip(sections, captured, strict=True):
        rows = unrotated(section, section.rope, torch.cat(k).numpy())
        ours = rows.reshape(60, len(k), section.kv_heads, section.k_dim)
        for i, layer in enumerate(section.layers):
            # k_proj gives [1, tokens, heads * dim]; norms per head before or after the transpose.
            expected = before[layer][0]
            if expected.shape[:1] != (60,):
                expected = expected.swapaxes(0, 1)
            expected = expected.reshape(60, section.kv_heads, section.k_dim)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(ours[:, i], expected, rtol=0, atol=3e-6 * scale)


def test_geometry_of_each_family(built: Callable[[str], Any]) -> None:
    [section] = geometry_of(built("llama")).sections
    assert (section.layers, section.kv_heads, section.k_dim, section.v_dim) == (
        (0, 1, 2, 3),
        2,
        8,
        8,
    )
    assert len(set(section.rope)) == 1
    assert section.rope[0] != kvtc.Rope.from_theta(5e5, 8)  # llama3 scaling is in the table

    [section] = geometry_of(built("yarn")).sections
    assert section.rope[0].scale == pytest.approx(0.1 * np.log(4) + 1)

    [section] = geometry_of(built("stablelm")).sections
    assert section.rope[0].rotary_dim == 4

    [section] = geometry_of(built("cohere")).sections
    assert section.rope[0].interleaved

    [section] = geometry_of(built("smollm3")).sections
    assert section.rope[:3] == (section.rope[0],) * 3
    assert section.rope[0] is not None
    assert section.rope[3] is None

    sliding, full = geometry_of(built("gemma3")).sections
    assert (sliding.layers, full.layers) == ((0, 1, 3), (2,))
    assert sliding.rope[0].inv_freq[1] == pytest.approx(1e4 ** (-2 / 8))
    assert full.rope[0].inv_freq[1] == pytest.approx(1e6 ** (-2 / 8))


def modernbert_decoder() -> Any:
    """Whose output head is called "decoder"."""
    ids = {"cls_token_id": 1, "sep_token_id": 2}
    config = transformers.ModernBertDecoderConfig(
        **{**SIZES, "num_key_value_heads": 4}, **ids, layer_types=LAYER_TYPES
    )
    return transformers.ModernBertDecoderForCausalLM(config)


def bert_decoder() -> Any:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=True))


def test_geometry_of_decoders_by_other_names() -> None:
    for make, count in ((modernbert_decoder, 2), (bert_decoder, 1)):
        sections = geometry_of(make()).sections
        assert len(sections) == count
        assert {section.k_dim for section in sections} == {8}


def test_the_probe_uses_no_padding() -> None:
    """Whose embedding is zero, so that all positions look alike."""
    assert geometry_of(llama(pad_token_id=VOCABULARY // 2)) == geometry_of(llama())


def test_geometry_follows_the_configuration() -> None:
    model = gemma3()
    assert [s.layers for s in geometry_of(model).sections] == [(0, 1, 3), (2,)]
    model.config.layer_types = LAYER_TYPES[::-1]
    model.config.sliding_window = WINDOW + 1
    assert [s.layers for s in geometry_of(model).sections] == [(0, 2, 3), (1,)]


def test_geometry_is_kept_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtc_stream.integrations.transformers import geometry

    model = llama()
    rotary, first = model.model.rotary_emb, geometry_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "_rotary_tables", lambda *_: pytest.fail("found again"))
        assert geometry_of(model) is first
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)  # as training does
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "_probe", lambda *_: pytest.fail("the model ran again"))
        assert geometry_of(model) is first
    rotary.attention_scaling = 1.5
    scaled = geometry_of(model).sections[0].rope[0]
    assert scaled == replace(first.sections[0].rope[0], scale=1.5)
    rotary.inv_freq.data.mul_(0.5)
    assert geometry_of(model).sections[0].rope[0].inv_freq[0] == 0.5


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_models(built: Callable[[str], Any]) -> None:
    model = built("llama")
    compiled = torch.compile(model)
    assert geometry_of(compiled) == geometry_of(model)
    assert model_identity(compiled) == model_identity(model)
    calibration = calibrate(compiled, [drawn_ids(300)], importance="none")
    cache = prefill(model, drawn_ids(300))
    data = encode_cache(cache, kvtc.Codec(calibration, window=16), model=compiled)
    assert decode_cache(data, calibration, model=compiled).get_seq_length() == 300
    parts = llama()
    parts.load_state_dict(model.state_dict())
    parts.model.layers[1] = torch.compile(parts.model.layers[1])
    parts.model = torch.compile(parts.model)
    assert model_identity(parts).fingerprint == model_identity(model).fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_geometry_in_half_precision(dtype: Any, built: Callable[[str], Any]) -> None:
    model = gemma3().to(dtype)
    assert [s.layers for s in geometry_of(model).sections] == [(0, 1, 3), (2,)]


def test_geometry_of_a_multimodal_wrapper(built: Callable[[str], Any]) -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=gemma3_config().to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    wrapper = transformers.Gemma3ForConditionalGeneration(config)
    text = built("gemma3")
    wrapper.model.language_model.load_state_dict(text.model.state_dict())
    assert geometry_of(wrapper) == geometry_of(text)
    assert model_identity(wrapper).fingerprint == model_identity(text).fingerprint


def test_learned_positions_are_no_rope() -> None:
    [section] = geometry_of(gpt2()).sections
    assert section.rope == ()


def longrope() -> Any:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 512,
    }
    return llama(rope_parameters=parameters)


def gptj() -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPTJConfig(
        n_embd=16, n_layer=2, n_head=2, rotary_dim=4, vocab_size=VOCABULARY, **ids
    )
    return transformers.GPTJForCausalLM(config)


def t5() -> Any:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, vocab_size=VOCABULARY)
    return transformers.T5ForConditionalGeneration(config)


def mamba() -> Any:
    config = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=VOCABULARY, state_size=4
    )
    return transformers.MambaForCausalLM(config)


def deepseek3() -> Any:
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=4,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def bert_encoder() -> Any:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return transformers.BertModel(transformers.BertConfig(**sizes))


def openai_gpt() -> Any:
    config = transformers.OpenAIGPTConfig(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY)
    return transformers.OpenAIGPTLMHeadModel(config)


def rwkv() -> Any:
    config = transformers.RwkvConfig(
        hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY
    )
    return transformers.RwkvForCausalLM(config)


def xlm() -> Any:
    config = transformers.XLMConfig(emb_dim=32, n_layers=2, n_heads=2, vocab_size=VOCABULARY)
    return transformers.XLMWithLMHeadModel(config)


def roformer() -> Any:
    """Rotates keys, but takes no positions and has no table of frequencies."""
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    config = transformers.RoFormerConfig(**sizes, is_decoder=True, embedding_size=32)
    return transformers.RoFormerForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert_encoder, "BertModel: what layer 1 caches of a token depends on later tokens"),
        (openai_gpt, "OpenAIGPTModel takes no cache"),
        (rwkv, "RwkvModel takes no cache"),
        (xlm, "XLMWithLMHeadModel"),
        (roformer, "RoFormerForCausalLM: no rotary table of the model explains the keys of layer"),
        (deepseek3, "DeepseekV3ForCausalLM: the values of layer 0 depend on the position"),
        (longrope, "LlamaForCausalLM uses 'longrope' RoPE"),
        (gptj, "GPTJForCausalLM: no rotary table of the model explains the keys of layer 0"),
        (t5, "T5ForConditionalGeneration is an encoder-decoder"),
        (mamba, "layer 0 of MambaForCausalLM is a LinearAttentionLayer"),
    ],
)
def test_unsupported_models(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(kvtc.UnsupportedError, match=message):
        geometry_of(make())


def test_positions_that_are_not_heeded() -> None:
    """Then the places of a sequence show the table."""
    model = llama()
    expected = geometry_of(llama())
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    assert geometry_of(model) == expected


def test_a_module_is_not_a_model() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel"):
        geometry_of(torch.nn.Linear(2, 2))


def test_training_mode_is_kept() -> None:
    model = llama().train()
    geometry_of(model)
    assert model.training
    assert model.model.training


# --- Identity ------------------------------------------------------------------------------------


def recipe(
    tensors: dict[str, Any], config: dict[str, Any], *, version: str, after: bytes = b""
) -> bytes:
    """The documented fingerprint, the slow way."""
    data = version.encode() + json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    data += b"\n"
    for name, tensor in sorted(tensors.items(), key=lambda p: p[0].encode()):
        shape = ",".join(str(n) for n in tensor.shape)
        data += f"{name} [{shape}]\n".encode()
        values = tensor.detach().reshape(-1)
        n = len(values)
        m = min(n, 64)
        for i in range(m):
            value = values[i * (n - 1) // (m - 1) if m > 1 else 0]
            if value.is_floating_point():
                bits = value.bfloat16().view(torch.int16)
                data += int(bits).to_bytes(2, "little", signed=True)
            else:
                data += int(value).to_bytes(8, "little", signed=True)
    return hashlib.sha256(data + after).digest()


#: What :func:`llama` had in the first version of the fingerprint.
FIRST_CONFIG: dict[str, Any] = {
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": (1e-6).hex(),
    "rope_parameters": {
        "factor": 8,
        "high_freq_factor": 4,
        "low_freq_factor": 1,
        "original_max_position_embeddings": 512,
        "rope_theta": 500000,
        "rope_type": "llama3",
    },
    "vocab_size": VOCABULARY,
}


def test_fingerprint_follows_its_recipe() -> None:
    model = llama(attention_dropout=0.5, use_cache=False)
    model.model.layers[1].register_buffer("stored", torch.arange(-3, 4))
    model.model.layers[1].register_buffer("computed", torch.ones(3), persistent=False)
    more = {"chunk_size_feed_forward": 0, "max_position_embeddings": 4096, "pretraining_tp": 1}
    config = {**FIRST_CONFIG, **more}
    tensors = {
        **dict(model.model.named_parameters()),
        "layers.1.stored": model.model.layers[1].stored,
    }
    found = model_identity(model).fingerprint
    assert found == recipe(tensors, config, version="kvtc fingerprint 2\n")


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_calibrations_with_the_first_fingerprint_are_still_taken(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model = built("llama")
    first = recipe(dict(model.model.named_parameters()), FIRST_CONFIG, version="")
    calibrator = kvtc.Calibrator(geometry_of(model), model=kvtc.ModelIdentity("", "", first))
    for i, k, v in capture(model, drawn_ids(150)):
        calibrator.update(k, v, section=i)
    old = calibrator.finish()
    ids = drawn_ids(40)
    cache = prefill(model, ids)
    with pytest.warns(kvtc.KVTCWarning, match="calibrate again"):
        data = encode_cache(cache, kvtc.Codec(old, ratio=4, window=1024), model=model)
    with pytest.warns(kvtc.KVTCWarning, match="calibrate again"):
        decoded = decode_cache(data, old, model=model)
    assert torch.equal(decoded.layers[2].keys, cache.layers[2].keys)

    other = llama(rms_norm_eps=1e-5)
    other.load_state_dict(model.state_dict())
    with pytest.raises(kvtc.CalibrationMismatchError, match="calibrate this one"):
        decode_cache(data, old, model=other)


def gpt2(**changes: Any) -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 100}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids, **changes))


def gpt_neox(**changes: Any) -> Any:
    parameters = {"rope_type": "default", "partial_rotary_factor": 0.25}
    config = transformers.GPTNeoXConfig(**SIZES, rope_parameters=parameters, **changes)
    return transformers.GPTNeoXForCausalLM(config)


def qwen3_moe(**changes: Any) -> Any:
    sizes = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(**SIZES, **sizes, **changes)
    return transformers.Qwen3MoeForCausalLM(config)


def granite(**changes: Any) -> Any:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, **changes))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (gpt_neox, {"use_parallel_residual": False}),
        (gpt2, {"activation_function": "relu"}),
        (gpt2, {"scale_attn_by_inverse_layer_idx": True}),
        (gpt2, {"scale_attn_weights": False}),
        (gpt2, {"reorder_and_upcast_attn": True}),
        (qwen3_moe, {"norm_topk_prob": True}),
        (qwen3_moe, {"decoder_sparse_step": 2}),
        (granite, {"embedding_multiplier": 2.0}),
        (llama, {"max_position_embeddings": 8192}),
    ],
)
def test_fingerprint_sees_every_option(make: Callable[..., Any], change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    same, other = make(), make(**change)
    other.load_state_dict(model.state_dict(), strict=False)
    same.load_state_dict(model.state_dict())
    assert model_identity(same).fingerprint == model_identity(model).fingerprint
    assert model_identity(other).fingerprint != model_identity(model).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token_id": 3},
        {"eos_token_id": [4, 5]},
        {"attention_dropout": 0.1},
        {"use_cache": False},
        {"output_hidden_states": True},
        {"initializer_range": 0.5},
        {"an_option_of_a_later_release": False},
        {"another": None},
    ],
)
def test_fingerprint_is_not_of_what_cannot_matter(change: dict[str, Any]) -> None:
    model = llama()
    before = model_identity(model).fingerprint
    for name, value in change.items():
        setattr(model.config, name, value)
    assert model_identity(model).fingerprint == before


def test_fingerprint_survives_saving_and_dtype(tmp_path: Any, built: Callable[[str], Any]) -> None:
    model = built("gemma3")
    folder = tmp_path / "tiny-gemma"
    model.save_pretrained(folder)
    expected = model_identity(model).fingerprint
    for dtype in (torch.float32, torch.bfloat16):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        identity = model_identity(loaded)
        assert identity == kvtc.ModelIdentity("tiny-gemma", "", expected)
    body = transformers.AutoModel.from_pretrained(folder)
    assert model_identity(body, name="x", revision="y") == kvtc.ModelIdentity("x", "y", expected)


def test_fingerprint_is_kept_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtc_stream.integrations.transformers import identity

    model = llama()
    found = {model_identity(model).fingerprint}
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_compute_fingerprints", lambda _: pytest.fail("found again"))
        found.add(model_identity(model).fingerprint)
    assert len(found) == 1
    projection = model.model.layers[1].self_attn.q_proj
    for change in (
        lambda: projection.weight.data.mul_(1.5),  # which PyTorch does not count
        lambda: setattr(projection, "weight", torch.nn.Parameter(projection.weight * 2)),
        lambda: projection.weight.requires_grad_(False).mul_(2),
        lambda: setattr(model.config, "rms_norm_eps", 1e-3),
    ):
        change()
        found.add(model_identity(model).fingerprint)
    assert len(found) == 5


def test_fingerprint_changes_with_weights_and_configuration() -> None:
    model = llama()
    state = model.state_dict()
    first = model_identity(model).fingerprint
    # The head does not take part in the cache.
    model.lm_head.weight.data.mul_(2)
    assert model_identity(model).fingerprint == first
    for parameter in (model.model.norm.weight, model.model.layers[3].self_attn.k_proj.weight):
        parameter.data.mul_(1.5)
        assert model_identity(model).fingerprint != first
        parameter.data.div_(1.5)
    assert model_identity(model).fingerprint == first
    for change in ({"rope_parameters": YARN}, {"rms_norm_eps": 1e-5}):
        other = llama(**change)
        other.load_state_dict(state)
        assert model_identity(other).fingerprint != first


class Adapted(torch.nn.Linear):
    """A layer with two adapters, as PEFT makes them."""

    def __init__(self, base: Any) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.lora_a = torch.nn.ParameterDict({n: torch.ones(2, 2) for n in ("one", "two")})
        self.scaling = {"one": 1.0, "two": 0.5}
        self.active_adapters = ["one"]
        self.disable_adapters = False


def test_fingerprint_sees_which_adapters_are_on() -> None:
    model = llama()
    seen = {model_identity(model).fingerprint}
    attention = model.model.layers[1].self_attn
    attention.v_proj = adapted = Adapted(attention.v_proj)
    for change in (
        {},
        {"active_adapters": ["two"]},
        {"active_adapters": ["one", "two"]},
        {"scaling": {"one": 2.0, "two": 0.5}},
        {"disable_adapters": True},
    ):
        for name, value in change.items():
            setattr(adapted, name, value)
        seen.add(model_identity(model).fingerprint)
    assert len(seen) == 6
    adapted.disable_adapters, adapted.active_adapters = False, ["one"]
    adapted.scaling = {"one": 1.0, "two": 0.5}
    found = model_identity(model).fingerprint
    state = dict(model.model.named_parameters())
    more = {"chunk_size_feed_forward": 0, "max_position_embeddings": 4096, "pretraining_tp": 1}
    version = "kvtc fingerprint 2\n"
    after = b'{"layers.1.self_attn.v_proj":[["one",1]]}'
    assert found == recipe(state, {**FIRST_CONFIG, **more}, version=version, after=after)


def test_modules_are_those_that_the_model_has_now() -> None:
    gone = weakref.ref(_changed_model())
    gc.collect()
    assert gone() is None


def _changed_model() -> Any:
    from kvtc_stream.integrations.transformers.model import modules_of

    model = llama()
    first, second = model.model.layers[:2]
    for change in (
        lambda: None,
        lambda: setattr(first, "more", torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU())),
        lambda: setattr(first.mlp, "up_proj", torch.nn.Identity()),
        lambda: setattr(second, "self_attn", first.self_attn),  # twice in the model
        lambda: setattr(second, "self_attn", None),
        lambda: delattr(first, "more"),
        lambda: model.model.layers.pop(-1),
    ):
        change()
        for _ in range(2):  # walked through, and known
            found = modules_of(model)
            assert found[0] is model
            assert len(found) == len(list(model.modules()))
            assert set(found) == set(model.modules())
    return model


def test_layers_on_several_devices() -> None:
    from kvtc_stream.integrations.transformers.model import layer_devices

    model = llama()
    assert layer_devices(model) == {}
    model.model.layers[2:].to("meta")
    assert [layer_devices(model)[n].type for n in range(4)] == ["cpu", "cpu", "meta", "meta"]


def test_fingerprint_needs_weights() -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(kvtc.UnsupportedError, match="not loaded"):
        model_identity(model)


def test_token_digest() -> None:
    expected = hashlib.sha256(b"".join(n.to_bytes(8, "little") for n in (3, 1, 70000))).digest()
    for ids in ([3, 1, 70000], np.array([[3, 1, 70000]], np.int32), torch.tensor([3, 1, 70000])):
        assert token_digest(ids) == expected
    for bad in ([0.5], np.zeros((2, 3), np.int64)):
        with pytest.raises(ValueError, match="token_ids must be integers"):
            token_digest(bad)


# --- Calibration ---------------------------------------------------------------------------------


def test_capture_keeps_all_tokens_of_sliding_layers(built: Callable[[str], Any]) -> None:
    model = built("gemma3")
    ids = drawn_ids(3 * WINDOW)
    cache = prefill(model, ids)
    for section, (_, k, v) in zip(geometry_of(model).sections, capture(model, ids), strict=True):
        for i, layer in enumerate(section.layers):
            held = cache.layers[layer].keys.shape[2]
            assert k[i].shape == v[i].shape == (1, 1, 3 * WINDOW, 8)
            torch.testing.assert_close(k[i][:, :, -held:], cache.layers[layer].keys)
            torch.testing.assert_close(v[i][:, :, -held:], cache.layers[layer].values)


class Letters:
    """A tokenizer: BOS, then a token per letter."""

    bos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1] + [2 + ord(c) % 90 for c in text]}


def test_calibrate_cuts_texts_into_documents(
    built: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built("llama")
    from kvtc_stream.integrations.transformers import calibration as module

    seen: list[list[int]] = []

    def record(model: Any, document: np.ndarray[Any, Any]) -> Any:
        seen.append(document.tolist())
        return capture(model, document)

    monkeypatch.setattr(module, "capture", record)
    steps: list[tuple[int, int]] = []
    calibration = calibrate(
        model,
        ["ab" * 100, "", "c" * 300],
        tokenizer=Letters(),
        tokens=300,
        document_tokens=120,
        progress=lambda done, total: steps.append((done, total)),
        sinks=2,
    )
    # One of each text in turn. Each is read for importance too.
    assert [len(document) for document in seen] == [120, 120, 60]
    assert all(document[0] == 1 for document in seen)
    assert seen[0][1:3] == [2 + ord("a") % 90, 2 + ord("b") % 90]
    assert seen[1][1:] == [2 + ord("c") % 90] * 119
    assert seen[2][1:] == [2 + ord(c) % 90 for c in ("ab" * 100)[119:178]]
    assert steps == [(n, 600) for n in (120, 240, 300, 420, 540, 600)]
    assert calibration.geometry == geometry_of(model)
    assert calibration.model == model_identity(model)
    assert calibration.tokens == 300 - 3 * 2


def test_calibrate_refuses(built: Callable[[str], Any]) -> None:
    model = built("llama")
    with pytest.raises(TypeError, match="pass the model's tokenizer"):
        calibrate(model, ["text"])
    with pytest.raises(TypeError, match="found one string"):
        calibrate(model, "text", tokenizer=Letters())
    with pytest.raises(ValueError, match="document_tokens at least 2"):
        calibrate(model, [[1, 2]], document_tokens=1)
    with pytest.raises(ValueError, match="importance_documents must be at least 1, found 0"):
        calibrate(model, [[1, 2]], importance_documents=0)
    with pytest.raises(ValueError, match="found 'loss'"):
        calibrate(model, [[1, 2]], importance="loss")  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", ["gradients", "queries", "none"])
def test_calibrate_reads_no_more_than_learned_positions(importance: Any) -> None:
    """Documents of GPT-2, which has no position beyond its table, are as long as that."""
    model = gpt2().eval()
    calibration = calibrate(model, [drawn_ids(250)], tokens=230, importance=importance)
    assert calibration.tokens == 230 - 3 * 4
    with pytest.raises(ValueError, match="reads 100 tokens at most, found 101"):
        capture(model, drawn_ids(101))


@pytest.mark.parametrize("importance", ["gradients", "queries", "none"])
def test_calibrate_refuses_tokens_of_another_vocabulary(
    importance: Any, built: Callable[[str], Any]
) -> None:
    """On a CUDA device such a look-up stops the process."""
    for wrong in (VOCABULARY, -1):
        ids = np.append(drawn_ids(50), wrong)
        message = rf"token ids from 0 to {VOCABULARY - 1}, found {wrong}"
        with pytest.raises(ValueError, match=message):
            calibrate(built("llama"), [ids], importance=importance)
        with pytest.raises(ValueError, match=message):
            capture(built("llama"), ids)


@pytest.mark.parametrize("importance", ["gradients", "queries"])
def test_calibrations_of_ranks_are_of_their_heads(importance: Any) -> None:
    """In one pass, and in order; weights of all heads are cut as they are."""
    torch.manual_seed(0)
    model, texts = llama().eval(), [drawn_ids(160, seed) for seed in range(2, 5)]
    given = {"tokens": 400, "importance": importance, "bases": ("separate", "joint")}
    whole = calibrate(model, texts, **given)
    parts = calibrate(model, texts, tensor_parallel=2, **given)
    heads = whole.geometry.sections[0].kv_heads
    assert [part.sections[0].heads for part in parts] == [(0, heads), (heads // 2, heads)]
    layers, dim = len(whole.geometry.sections[0].layers), whole.geometry.sections[0].k_dim
    of_k = whole.sections[0].bases["separate"][0].mean.reshape(layers, heads, dim)
    for i, part in enumerate(parts):
        [section] = part.sections
        assert part.model == whole.model
        own = slice(i * heads // 2, (i + 1) * heads // 2)
        found = section.bases["separate"][0].mean.reshape(layers, heads // 2, dim)
        np.testing.assert_allclose(found, of_k[:, own], rtol=1e-4, atol=1e-6)
        assert section.bases["joint"][0].weighted
    with pytest.raises(ValueError, match=f"{heads} KV heads cannot be split into 5"):
        calibrate(model, texts, tensor_parallel=5, **given)


@pytest.mark.parametrize("name", ["stablelm", "gemma3"])
def test_calibration_is_of_keys_before_rope(name: str, built: Callable[[str], Any]) -> None:
    model = built(name)
    documents = [drawn_ids(150, seed) for seed in (7, 8)]
    calibration = calibrate(model, documents)
    for index, section in enumerate(geometry_of(model).sections):
        rows = []
        for document in documents:
            _, k, v = capture(model, document)[index]
            for x, part, rope in ((k, 0, section.rope), (v, 1, ())):
                rows.append((part, unrotated(section, rope, torch.cat(x).numpy())[4:]))
        for part, calibrated_part in enumerate(calibration.sections[index].basis("separate")):
            expected = np.concatenate([r for p, r in rows if p == part]).mean(axis=0)
            np.testing.assert_allclose(calibrated_part.mean, expected, rtol=0, atol=1e-5)


# --- Caches --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
@pytest.mark.parametrize("name", ["llama", "qwen3", "stablelm", "cohere", "gemma3"])
def test_verbatim_cache_continues_identically(
    name: str, built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built(name), calibrated(name)
    ids = drawn_ids(3 * WINDOW, seed=1)
    prompt = ids[:-5]  # the rest is prefilled after decoding
    cache = prefill(model, prompt)
    data = encode_cache(cache, verbatim(calibration), model=model, token_ids=prompt)
    assert data is not None
    decoded = decode_cache(data, calibration, model=model, token_ids=ids)

    assert [type(layer) for layer in decoded.layers] == [type(layer) for layer in cache.layers]
    for mine, theirs in zip(decoded.layers, cache.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length() == len(prompt)
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    mine, theirs = generate(model, ids, decoded), generate(model, ids, cache)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert all(map(torch.equal, mine.logits, theirs.logits))


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verbatim_cache_in_half_precision(
    dtype: Any, built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built("gemma3"), calibrated("gemma3")
    cache = DynamicCache(config=model.config)
    for number in range(4):
        shape = (1, 1, 40, 8)
        cache.update(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), number)
    data = encode_cache(cache, verbatim(calibration))
    decoded = decode_cache(data, calibration, model=model, dtype=dtype)
    for mine, theirs in zip(decoded.layers, cache.layers, strict=True):
        assert mine.keys.dtype == dtype
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    wide = decode_cache(data, calibration, model=model)
    assert wide.layers[0].keys.dtype == torch.float32


def coded_tokens(data: bytes, calibration: kvtc.Calibration) -> dict[tuple[int, int], Any]:
    """K of every token that is coded, by section and position."""
    with kvtc.open(data, calibration=calibration) as reader:
        return {
            (block.section, int(position)): np.asarray(block.k)[:, :, i]
            for block in reader
            if block.role is Role.DATA
            for i, position in enumerate(block.positions)
        }


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
@pytest.mark.filterwarnings("ignore:section :kvtc_stream.errors.KVTCWarning")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_restored_cache_that_grew_takes_over_its_blocks(
    name: str, built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built(name), calibrated(name)
    codec = kvtc.Codec(calibration, ratio=4, window=8, block_tokens=16)
    ids = drawn_ids(100, seed=1)
    data = encode_cache(prefill(model, ids[:60]), codec, model=model)
    assert data is not None
    first = coded_tokens(data, calibration)
    for end in (61, 75):
        decoded = decode_cache(data, calibration, model=model)
        held = decoded.get_seq_length()
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(ids[held:end])[None], past_key_values=decoded)
        data = encode_cache(decoded, codec, model=model, base=data)
        assert data is not None
        again = coded_tokens(data, calibration)
        assert len(again.keys() & first.keys()) > (30 if name == "llama" else 2)
        for token in again.keys() & first.keys():
            np.testing.assert_array_equal(again[token], first[token])


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_coded_cache_is_as_close_as_the_stream_says(
    name: str, built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built(name), calibrated(name)
    ids = drawn_ids(300, seed=1)
    cache = DynamicCache() if name == "llama" else DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids)[None], past_key_values=cache)
    codec = kvtc.Codec(calibration, ratio=4, window=8, block_tokens=16)
    data = encode_cache(cache, codec, model=model)
    assert data is not None
    decoded = decode_cache(data, calibration, model=model)

    coded = 0
    with kvtc.open(io.BytesIO(data), calibration=calibration) as reader:
        for block in reader:
            section = calibration.geometry.sections[block.section]
            first = len(ids) - cache.layers[section.layers[0]].keys.shape[2]
            span = slice(int(block.positions[0]) - first, int(block.positions[-1]) + 1 - first)
            for kind, worst in (("keys", block.errors.k_worst), ("values", block.errors.v_worst)):
                theirs, mine = (
                    torch.cat([getattr(c.layers[n], kind)[:, :, span] for n in section.layers])
                    .transpose(0, 2)
                    .flatten(1)
                    for c in (cache, decoded)
                )
                errors = (mine - theirs).norm(dim=1) / theirs.norm(dim=1)
                assert torch.isfinite(mine).all()
                assert errors.max() <= worst * (1 + 1e-4)
                if block.role is Role.DATA:
                    coded += block.tokens
                    assert errors.max() > 0
    assert coded > 0
    assert torch.isfinite(torch.stack(generate(model, np.append(ids, 5), decoded).logits)).all()


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_files_pipes_and_metadata(
    tmp_path: Any,
    built: Callable[[str], Any],
    calibrated: Callable[[str], kvtc.Calibration],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calibration = built("llama"), calibrated("llama")
    cache = prefill(model, drawn_ids(40))
    codec = verbatim(calibration)
    path = tmp_path / "prompt.kvtc"
    assert encode_cache(cache, codec, path, metadata={"user": 7}) is None
    data = path.read_bytes()
    monkeypatch.setattr(cache_module, "_CHUNK", 17)
    assert data == encode_cache(cache, codec, metadata={"user": 7})
    with kvtc.open(path, calibration=calibration) as reader:
        assert json.loads(reader.header.metadata) == {"user": 7}
        assert reader.header.model == model_identity(model)

    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        for source in (path, pipe, io.BytesIO(data)):
            decoded = decode_cache(source, calibration)
            assert torch.equal(decoded.layers[3].keys, cache.layers[3].keys)


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_without_a_model_the_layers_are_plain(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, codec = built("gemma3"), verbatim(calibrated("gemma3"))
    ids = drawn_ids(3 * WINDOW)
    full = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids[:-1])[None], past_key_values=full)
    decoded = decode_cache(encode_cache(full, codec), codec.calibration)
    assert not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in decoded.layers)
    mine, theirs = generate(model, ids, decoded), generate(model, ids, full)
    torch.testing.assert_close(mine.logits, theirs.logits)

    # How long the window is that the others had left is not in the stream.
    data = encode_cache(prefill(model, ids), codec)
    with pytest.raises(
        kvtc.UnsupportedError, match=r"tokens from 49 to 71 of layer 0, .* pass model="
    ):
        decode_cache(data, codec.calibration)


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
def test_sliding_windows_cut_back(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    """All tokens that the layers need to go on, or none."""
    model, calibration = built("gemma3"), calibrated("gemma3")
    codec = kvtc.Codec(calibration, ratio=4, window=0, sinks=0, block_tokens=16)
    ids = drawn_ids(3 * WINDOW)
    full, sliding = DynamicCache(), prefill(model, ids)
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids)[None], past_key_values=full)

    def cut(cache: DynamicCache, kept: slice) -> DynamicCache:
        file = io.BytesIO()
        data = encode_cache(cache, codec, model=model)
        kvtc.cut(io.BytesIO(data), file, positions=kept)
        return decode_cache(file.getvalue(), calibration, model=model)

    for stop in (5, WINDOW, 60, len(ids)):
        decoded = cut(full, slice(stop))
        assert decoded.get_seq_length() == stop
        for layer in (0, 1, 3):
            mine, theirs = decoded.layers[layer].keys, full.layers[layer].keys[:, :, :stop]
            assert mine.shape[2] == min(stop, WINDOW - 1)
            assert (mine - theirs[:, :, -mine.shape[2] :]).norm() < 0.5 * mine.norm()
        if stop < len(ids):
            out = generate(model, ids[: stop + 1], decoded)
            assert torch.isfinite(torch.stack(out.logits)).all()
    missing = r"tokens from 49 to 59 of layer 0, which needs those from 37 on for its window of 24"
    with pytest.raises(kvtc.UnsupportedError, match=missing):
        cut(sliding, slice(60))
    with pytest.raises(kvtc.UnsupportedError, match="12 tokens, at positions up to 71"):
        cut(sliding, slice(60, None))


def padded(model: Any, ids: np.ndarray[Any, Any], pads: int) -> tuple[DynamicCache, Any]:
    """The cache of a batch: longer ids, and ``ids`` with padding on their left; and its mask."""
    longer = drawn_ids(len(ids) + pads, seed=9)
    batch = torch.from_numpy(np.stack([longer, np.concatenate([np.zeros(pads, np.int64), ids])]))
    mask = torch.ones_like(batch)
    mask[1, :pads] = 0
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        model(input_ids=batch, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache, mask


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
@pytest.mark.parametrize("pads", [1, WINDOW + 3])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_of_a_padded_batch(
    name: str, pads: int, built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built(name), calibrated(name)
    ids = drawn_ids(2 * WINDOW)
    cache, mask = padded(model, ids, pads)
    data = encode_cache(
        cache, verbatim(calibration), model=model, token_ids=ids, sequence=1, attention_mask=mask
    )
    decoded = decode_cache(data, calibration, model=model, token_ids=ids)
    for mine, theirs in zip(decoded.layers, prefill(model, ids).layers, strict=True):
        assert mine.get_seq_length() == len(ids)
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)
    mine = generate(model, np.append(ids, 5), decoded)
    theirs = generate(model, np.append(ids, 5), DynamicCache(config=model.config))
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-3, atol=1e-3)
    first = decode_cache(
        encode_cache(cache, verbatim(calibration), sequence=0), calibration, model=model
    )
    assert torch.equal(first.layers[2].keys[0], cache.layers[2].keys[0])


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_streams_become_the_rows_of_a_cache(
    tmp_path: Path,
    name: str,
    built: Callable[[str], Any],
    calibrated: Callable[[str], kvtc.Calibration],
) -> None:
    """Of files and bytes; the model goes on from them as from a batch that it has read."""
    model, calibration = built(name), calibrated(name)
    ids = np.stack([drawn_ids(2 * WINDOW, seed=seed) for seed in range(3)])
    codec = verbatim(calibration)
    streams: list[Any] = [
        encode_cache(prefill(model, row), codec, model=model, token_ids=row) for row in ids
    ]
    path = tmp_path / "second.kvtc"
    path.write_bytes(streams[1])
    longer = np.pad(ids, ((0, 0), (0, 1)), constant_values=5)
    cache = decode_batch([streams[0], path, streams[2]], calibration, model=model, token_ids=longer)
    for row, stream in enumerate(streams):
        alone = decode_cache(stream, calibration, model=model)
        for mine, theirs in zip(cache.layers, alone.layers, strict=True):
            assert mine.get_seq_length() == theirs.get_seq_length()
            assert torch.equal(mine.keys[row], theirs.keys[0])
            assert torch.equal(mine.values[row], theirs.values[0])
    new = torch.full((3, 1), 5)
    read = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids), past_key_values=read)
        mine, theirs = (model(input_ids=new, past_key_values=x).logits for x in (cache, read))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_rows_whose_windows_hold_less_than_they_have_seen() -> None:
    """Where all layers slide, prompts of other lengths leave equally many tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)).eval()
    calibrator = kvtc.Calibrator(geometry_of(model), model=model_identity(model))
    calibrator.update(*kvtc.testing.drawn_cache(geometry_of(model), 300, seed=1))
    calibration = calibrator.finish()
    codec = verbatim(calibration)

    def stored(tokens: int, **options: Any) -> bytes | None:
        cache, ids = DynamicCache(**options), torch.from_numpy(drawn_ids(tokens))[None]
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=cache)
        return encode_cache(cache, codec, model=model)

    short, long = (stored(tokens, config=model.config) for tokens in (40, 90))
    with pytest.raises(ValueError, match="a cache of 90 tokens, the first stream's is of 40"):
        decode_batch([short, long], calibration, model=model)
    whole = stored(90)  # what may be cut back holds all tokens
    rows = decode_batch([whole, whole], calibration, model=model)
    alone = decode_cache(whole, calibration, model=model)
    for mine, theirs in zip(rows.layers, alone.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length() == 90
        assert torch.equal(mine.keys, theirs.keys.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="holds 23 tokens of layer 0, the first 90"):
        decode_batch([whole, long], calibration, model=model)


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_on_a_cpu_caches_are_waited_for(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built("llama"), calibrated("llama")
    data = encode_cache(prefill(model, drawn_ids(40)), verbatim(calibration))
    assert data is not None
    found = decode_cache(data, calibration, model=model, wait=False)
    assert all("keys" in vars(layer) for layer in found.layers)


def test_what_a_cache_is_restored_with_is_given_back_at_once(
    monkeypatch: pytest.MonkeyPatch,
    built: Callable[[str], Any],
    calibrated: Callable[[str], kvtc.Calibration],
) -> None:
    """Not when garbage is looked for: pinned buffers would be allocated again and again."""
    model, calibration = built("llama"), calibrated("llama")
    data = encode_cache(prefill(model, drawn_ids(300)), kvtc.Codec(calibration, ratio=4))
    made: list[weakref.ref[BlockDecoder]] = []
    init = BlockDecoder.__init__

    def noted(self: BlockDecoder, *given: Any) -> None:
        init(self, *given)
        made.append(weakref.ref(self))

    monkeypatch.setattr(BlockDecoder, "__init__", noted)
    gc.disable()
    try:
        caches = [
            decode_cache(data, calibration, model=model),
            decode_batch([data, data], calibration, model=model),
            kvtc.decode(data, calibration),
            kvtc.decode_many([data, data], calibration),
        ]
        assert len(made) == 6
        assert not any(block() for block in made)
    finally:
        gc.enable()
    assert len(caches) == 4


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_streams_that_cannot_be_rows_of_a_cache(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built("llama"), calibrated("llama")
    one, short = drawn_ids(40, seed=1), drawn_ids(30, seed=2)
    codec = verbatim(calibration)
    whole, other = (encode_cache(prefill(model, x), codec, token_ids=x) for x in (one, short))
    assert whole is not None
    assert other is not None
    with pytest.raises(TypeError, match="found one bytes: decode_cache restores that"):
        decode_batch(whole, calibration, model=model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no streams"):
        decode_batch([], calibration, model=model)
    with pytest.raises(
        ValueError, match="a cache of 30 tokens, the first stream's is of 40"
    ) as wrong:
        decode_batch([whole, other], calibration, model=model)
    assert wrong.value.__notes__ == ["streams[1] of 2"]
    with pytest.raises(ValueError, match=r"\[2, tokens\], a row for each stream, found \[1, 40\]"):
        decode_batch([whole, whole], calibration, token_ids=one[None])
    with pytest.raises(kvtc.CalibrationMismatchError, match="another prompt") as mismatch:
        decode_batch([whole, whole], calibration, token_ids=np.stack([one, one[::-1]]))
    assert mismatch.value.index == 1
    changed = bytearray(whole)
    changed[len(changed) // 2] ^= 1
    with pytest.raises(kvtc.FormatError) as damaged:
        decode_batch([whole, whole, bytes(changed)], calibration, model=model)
    assert damaged.value.index == 2


def test_a_padded_row_costs_no_more_than_its_prompt(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    """Its keys stand at the positions that they were computed at."""
    model, calibration = built("llama"), calibrated("llama")
    codec = kvtc.Codec(calibration, ratio=4, sinks=0, window=0, block_tokens=32)
    ids = drawn_ids(320)
    cache, mask = padded(model, ids, 50)
    plain, row = (
        encode_cache(prefill(model, ids), codec),
        encode_cache(cache, codec, sequence=1, attention_mask=mask),
    )
    assert abs(len(row) - len(plain)) < 0.01 * len(plain)


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_padding_within_a_window_is_refused(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    ids = drawn_ids(3 * WINDOW)
    mask = np.ones(len(ids), np.int64)
    mask[-4:] = 0
    for name in ("llama", "gemma3"):
        codec, cache = verbatim(calibrated(name)), prefill(built(name), ids)
        if name == "llama":
            data = encode_cache(cache, codec, attention_mask=mask, token_ids=ids)
            decoded = decode_cache(data, codec.calibration, token_ids=ids[:-4])
            assert torch.equal(decoded.layers[0].keys, cache.layers[0].keys[:, :, :-4])
        else:
            with pytest.raises(kvtc.UnsupportedError, match="4 of the 23 tokens that layer 0"):
                encode_cache(cache, codec, attention_mask=mask)


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
@pytest.mark.parametrize("kept", [np.r_[0:4, 30:80], np.arange(0, 80, 2), np.arange(20, 80)])
def test_evicted_caches(
    kept: Any, built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built("llama"), calibrated("llama")
    ids = drawn_ids(80)
    whole, cache = prefill(model, ids), DynamicCache(config=model.config)
    for n, layer in enumerate(whole.layers):
        cache.update(layer.keys[:, :, kept], layer.values[:, :, kept], n)
    data = encode_cache(
        cache, verbatim(calibration), model=model, positions=kept, token_ids=ids[kept]
    )
    with pytest.raises(kvtc.UnsupportedError, match=f"position_ids from {kept[-1] + 1} "):
        decode_cache(data, calibration, model=model)
    decoded, positions = decode_cache(
        data, calibration, model=model, token_ids=ids[kept], return_positions=True
    )
    np.testing.assert_array_equal(positions, kept)
    mine, theirs = (
        model(
            input_ids=torch.tensor([[5]]),
            position_ids=torch.tensor([[positions[-1] + 1]]),
            past_key_values=c,
        ).logits
        for c in (decoded, cache)
    )
    assert torch.equal(mine, theirs)


def test_masks_and_positions_are_checked(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    codec = verbatim(calibrated("llama"))
    cache = prefill(built("llama"), drawn_ids(9))
    for mask in (np.ones(8), np.zeros(9), np.full(9, 2)):
        with pytest.raises(ValueError, match="each of the 9 tokens"):
            encode_cache(cache, codec, attention_mask=mask)
    for positions in (np.arange(8), np.arange(9)[::-1], np.zeros(9, np.int64), np.arange(-1, 8)):
        with pytest.raises(ValueError, match="as many as the 9 tokens"):
            encode_cache(cache, codec, positions=positions)
    with pytest.raises(ValueError, match="sequence must be from 0 to 0"):
        encode_cache(cache, codec, sequence=1)
    with pytest.raises(ValueError, match=r"token ids from 0 to 96, found 97"):
        encode_cache(cache, codec, model=built("llama"), token_ids=np.append(drawn_ids(8), 97))


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_masks_of_other_batches_are_refused(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    """Of a row that was taken out of its batch, the mask's first row is that of another prompt."""
    codec = verbatim(calibrated("llama"))
    cache, mask = padded(built("llama"), drawn_ids(9), 2)
    taken = copy.deepcopy(cache)
    taken.batch_select_indices(torch.tensor([1]))
    for held, sequence in ((taken, None), (taken, 0)):
        with pytest.raises(ValueError, match=r"of 1 sequence, found \[2, 11\]"):
            encode_cache(held, codec, sequence=sequence, attention_mask=mask)
    for rows in (np.ones((3, 11)), np.ones((0, 11))):
        with pytest.raises(ValueError, match="of 2 sequences, found"):
            encode_cache(cache, codec, sequence=1, attention_mask=rows)
    alone = encode_cache(taken, codec, attention_mask=mask[1])
    assert alone == encode_cache(cache, codec, sequence=1, attention_mask=mask)


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
@pytest.mark.parametrize("name", ["llama", "gemma3", "stablelm", "cohere"])
def test_tokens_and_positions_are_those_of_the_keys(
    name: str, built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, codec = built(name), verbatim(calibrated(name))
    ids = drawn_ids(2 * WINDOW)
    cache, mask = padded(model, ids, 3)
    whole = np.concatenate([np.zeros(3, np.int64), ids])
    right = {"model": model, "sequence": 1, "attention_mask": mask, "token_ids": whole}
    encode_cache(cache, codec, **right)
    for wrong in (
        {"attention_mask": None},
        {"token_ids": np.roll(whole, 1)},
        {"sequence": 0},
        {"positions": np.arange(10, 10 + len(ids))},
    ):
        with pytest.raises(kvtc.CalibrationMismatchError, match="keys of layer 0 are not those"):
            encode_cache(cache, codec, **{**right, **wrong})
    for dtype in (torch.float16, torch.bfloat16):
        half = prefill(model, ids)
        for layer in half.layers:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        encode_cache(half, codec, model=model, token_ids=ids)


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
def test_tokens_that_differ_in_a_part_of_the_prompt(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built("llama"), calibrated("llama")
    ids = drawn_ids(200)
    cache = prefill(model, ids)
    codec = kvtc.Codec(calibration, ratio=8, window=0, sinks=0, block_tokens=64)
    restored = decode_cache(encode_cache(cache, codec), calibration, model=model)
    for changed in (1, 50):
        wrong = ids.copy()
        wrong[10 : 10 + changed] = 2 + (wrong[10 : 10 + changed] + 7) % (VOCABULARY - 2)
        with pytest.raises(kvtc.CalibrationMismatchError, match="keys of layer 0 are not those"):
            encode_cache(cache, codec, model=model, token_ids=wrong)
    encode_cache(restored, codec, model=model, token_ids=ids)
    with pytest.raises(kvtc.CalibrationMismatchError, match="keys of layer 0 are not those"):
        encode_cache(restored, codec, model=model, token_ids=ids[::-1].copy())


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
def test_a_cache_is_of_the_type_that_its_model_computes_in() -> None:
    """Attention of bfloat16 takes no keys of float32."""
    model = llama()
    calibration = calibrate(model, [drawn_ids(300, s) for s in range(2)], tokens=400)
    ids = drawn_ids(40)
    data = encode_cache(prefill(model, ids), verbatim(calibration))
    assert data is not None
    torch.manual_seed(0)
    served = transformers.LlamaForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    served.load_state_dict(model.state_dict())
    cache = decode_cache(data, calibration, model=served.eval())
    assert cache.layers[0].keys.dtype is torch.bfloat16
    with torch.inference_mode():
        served(torch.tensor([[5]]), cache=cache)
    assert decode_cache(data, calibration).layers[0].keys.dtype is torch.float32
    kept = decode_cache(data, calibration, model=served, dtype=torch.float32)
    assert kept.layers[0].keys.dtype is torch.float32


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
def test_few_keys_elsewhere_and_keys_that_are_no_numbers(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    """One of those that are looked at suffices, and what cannot be looked at says nothing."""
    model, codec = built("llama"), verbatim(calibrated("llama"))
    ids = drawn_ids(45)
    where = torch.cat([torch.arange(40), torch.arange(1, 6)])  # as of a batch padded on the right
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(
            input_ids=torch.from_numpy(ids)[None], position_ids=where[None], past_key_values=cache
        )
    with pytest.raises(kvtc.CalibrationMismatchError, match="keys of layer 0 are not those"):
        encode_cache(cache, codec, model=model, token_ids=ids)
    cache = prefill(model, ids)
    with torch.inference_mode():
        cache.layers[0].keys[0, 0, 0, 0] = np.nan
    encode_cache(cache, codec, model=model, token_ids=ids)
    with torch.inference_mode():
        cache.layers[0].keys[0, 0, :, 0] = np.nan
    with pytest.raises(kvtc.CalibrationMismatchError, match="keys of layer 0 are not those"):
        encode_cache(cache, codec, model=model, token_ids=ids[::-1].copy())


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_that_a_dtype_has_no_room_for(
    dtype: Any, built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    """They came back as infinities, or cut off."""
    model, calibration = built("llama"), calibrated("llama")
    cache = prefill(model, drawn_ids(40))
    data = encode_cache(cache, verbatim(calibration))
    assert data is not None
    assert decode_cache(data, calibration, dtype=dtype).layers[1].keys.dtype is dtype
    with torch.inference_mode():
        cache.layers[1].keys[0, 0, -3, 0] = 1e6
        cache.layers[1].keys[0, 0, -4, 0] = np.inf
    data = encode_cache(cache, verbatim(calibration))
    assert data is not None
    with pytest.raises(kvtc.UnsupportedError, match=r"values beyond \d+.*choose another dtype"):
        decode_cache(data, calibration, dtype=dtype)
    decode_cache(data, calibration, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
def test_fp8_that_another_fp8_has_no_room_for() -> None:
    calibration = kvtc.testing.tiny_calibration()
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 40)
    k[0, 0, 3, 0] = 2**14
    small = kvtc.DType.FLOAT8_E5M2
    codec = kvtc.Codec(calibration, ratio=2, window=1024, out_dtype=small.label)
    data = kvtc.encode(*(x.astype(numpy_dtype(small)) for x in (k, v)), codec)
    assert decode_cache(data, calibration).layers[0].keys.dtype is torch.float8_e5m2
    with pytest.raises(kvtc.UnsupportedError, match="values beyond 448"):
        decode_cache(data, calibration, dtype=torch.float8_e4m3fn)


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
def test_a_cache_that_has_lost_much_is_still_of_its_tokens(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built("llama"), calibrated("llama")
    ids = drawn_ids(300)
    codec = kvtc.Codec(calibration, ratio=14, window=0, sinks=0, block_tokens=64)
    data = encode_cache(prefill(model, ids), codec, model=model, token_ids=ids)
    restored = decode_cache(data, calibration, model=model)
    exact = prefill(model, ids).layers[0].keys
    error = (restored.layers[0].keys - exact).norm() / exact.norm()
    assert error > 0.1
    encode_cache(restored, codec, model=model, token_ids=ids)
    # Kept tokens of a restored cache, taken for a whole one.
    for layer in restored.layers:
        layer.keys, layer.values = layer.keys[:, :, 40:], layer.values[:, :, 40:]
    with pytest.raises(kvtc.CalibrationMismatchError, match="likeliest are"):
        encode_cache(restored, codec, model=model, token_ids=ids[40:])


def test_wrong_positions_are_noticed() -> None:
    """Keys with a large mean, as some models' are."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias = torch.nn.Parameter(6 * torch.randn(16))
    calibration = calibrate(model, [drawn_ids(400, s) for s in range(3)], importance="none")
    codec = kvtc.Codec(calibration, ratio=8, window=0, sinks=0, block_tokens=64)
    cache, mask = padded(model, drawn_ids(400), 40)
    with pytest.warns(kvtc.KVTCWarning, match="keys are at other positions than was said"):
        encode_cache(cache, codec, sequence=1)
    encode_cache(cache, codec, sequence=1, attention_mask=mask)


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_prompts_with_images_of_a_model_with_mrope() -> None:
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=10, video_token_id=11,
        vision_start_token_id=12, vision_end_token_id=13,
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    calibration = calibrate(model, [drawn_ids(300) % 80 + 14], importance="none")
    codec = verbatim(calibration)
    words, ids = drawn_ids(40) % 80 + 14, np.r_[20:30, 12, [10] * 16, 13, 30:40]

    def read(ids: np.ndarray[Any, Any], **more: Any) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(ids)[None], past_key_values=cache, **more)
        return cache

    image = read(
        ids,
        pixel_values=torch.randn(64, 96),
        image_grid_thw=torch.tensor([[1, 8, 8]]),
        mm_token_type_ids=torch.from_numpy((ids == 10).astype(np.int64))[None],
    )
    assert model.model.rope_deltas is not None
    with pytest.raises(kvtc.UnsupportedError, match="only prompts of text"):
        encode_cache(image, codec, model=model, token_ids=ids)
    with pytest.raises(kvtc.UnsupportedError, match="pass token_ids"):
        encode_cache(image, codec, model=model)

    # A prompt of text goes on as without the image that was read before.
    cache = read(words[:-1])
    data = encode_cache(cache, codec, model=model, token_ids=words[:-1])
    decoded = decode_cache(data, calibration, model=model, token_ids=words)
    mine = generate(model, words, decoded)
    theirs = generate(model, words, DynamicCache(config=model.config))
    torch.testing.assert_close(mine.logits, theirs.logits)
    model.model.rope_deltas = None
    assert encode_cache(cache, codec, model=model) is not None


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_a_full_cache_is_cut_to_the_models_window(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built("gemma3"), calibrated("gemma3")
    ids = drawn_ids(2 * WINDOW)
    full = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids)[None], past_key_values=full)
    data = encode_cache(full, verbatim(calibration))
    decoded = decode_cache(data, calibration, model=model)
    for mine, theirs in zip(decoded.layers, prefill(model, ids).layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        assert mine.get_seq_length() == len(ids)


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_wrong_prompt_model_or_window(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    model, calibration = built("gemma3"), calibrated("gemma3")
    codec = verbatim(calibration)
    ids = drawn_ids(40)
    cache = prefill(model, ids)
    data = encode_cache(cache, codec, token_ids=ids)
    with pytest.raises(ValueError, match="holds 40 tokens, found 39 token_ids"):
        encode_cache(cache, codec, token_ids=ids[:-1])

    wrong = ids.copy()
    wrong[7] += 1
    with pytest.raises(kvtc.CalibrationMismatchError, match="another prompt"):
        decode_cache(data, calibration, model=model, token_ids=wrong)
    with pytest.raises(kvtc.CalibrationMismatchError, match="found only 39"):
        decode_cache(data, calibration, model=model, token_ids=ids[:-1])

    stranger = gemma3()
    for call in (
        lambda: encode_cache(cache, codec, model=stranger),
        lambda: decode_cache(data, calibration, model=stranger),
    ):
        with pytest.raises(kvtc.CalibrationMismatchError) as caught:
            call()
        for identity in (model_identity(stranger), calibration.model):
            assert identity.fingerprint.hex()[:16] in str(caught.value)
    with pytest.raises(kvtc.CalibrationMismatchError, match="written with calibration"):
        decode_cache(data, calibrated("llama"))

    layers = DynamicCache(config=model.config)
    for layer in layers.layers[:2] + layers.layers[3:]:
        layer.sliding_window = WINDOW // 2
    for number in range(4):
        layers.update(cache.layers[2].keys, cache.layers[2].values, number)
    with pytest.raises(kvtc.UnsupportedError, match="needs those from 17 on for its window of 24"):
        decode_cache(encode_cache(layers, codec), calibration, model=model)


def test_geometry_is_compared_when_the_calibration_has_no_fingerprint(
    built: Callable[[str], Any],
) -> None:
    model = built("llama")
    [section] = geometry_of(model).sections
    other = Geometry.uniform(layers=4, kv_heads=2, head_dim=8, rope=kvtc.Rope.from_theta(1e4, 8))
    calibrations = []
    for geometry in (other, Geometry((section,))):
        calibrator = kvtc.Calibrator(geometry)
        for index, k, v in capture(model, drawn_ids(200)):
            calibrator.update(k, v, section=index)
        calibrations.append(calibrator.finish())
    cache = prefill(model, drawn_ids(300))
    with pytest.raises(kvtc.CalibrationMismatchError, match=r"half-split RoPE over 8 channels"):
        encode_cache(cache, kvtc.Codec(calibrations[0], window=16), model=model)
    assert encode_cache(cache, kvtc.Codec(calibrations[1], window=16), model=model)


def static(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=64)


def encoder_decoder(model: Any) -> Any:
    return EncoderDecoderCache(prefill(model, drawn_ids(9)), DynamicCache())


def offloaded(model: Any) -> Any:
    cache = prefill(model, drawn_ids(9))
    cache.offloading = True
    return cache


def recurrent(model: Any) -> Any:
    return DynamicCache(config=mamba().config)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (static, "StaticCache"),
        (encoder_decoder, "EncoderDecoderCache"),
        (offloaded, "offloaded"),
        (recurrent, "LinearAttentionLayer"),
    ],
)
def test_unsupported_caches(
    make: Callable[[Any], Any],
    found: str,
    built: Callable[[str], Any],
    calibrated: Callable[[str], kvtc.Calibration],
) -> None:
    cache = make(built("llama"))
    with pytest.raises(kvtc.UnsupportedError, match=rf"{found}.*supported is a DynamicCache"):
        encode_cache(cache, kvtc.Codec(calibrated("llama")))


def test_mismatched_caches(
    built: Callable[[str], Any], calibrated: Callable[[str], kvtc.Calibration]
) -> None:
    codec = kvtc.Codec(calibrated("llama"))
    with pytest.raises(ValueError, match="no tokens"):
        encode_cache(DynamicCache(), codec)
    with pytest.raises(kvtc.CalibrationMismatchError, match=r"K \[1, 1, 9, 8\]"):
        encode_cache(prefill(built("gemma3"), drawn_ids(9)), codec)
    two = prefill(built("llama"), drawn_ids(9))
    two.batch_repeat_interleave(2)
    with pytest.raises(kvtc.UnsupportedError, match=r"2 sequences.*sequence="):
        encode_cache(two, codec)
    short = prefill(built("llama"), drawn_ids(9))
    short.layers.pop()
    with pytest.raises(kvtc.CalibrationMismatchError, match=r"layers \[0, 1, 2\]"):
        encode_cache(short, codec)
    uneven = prefill(built("llama"), drawn_ids(9))
    uneven.layers[2].crop(-3)
    with pytest.raises(kvtc.CalibrationMismatchError, match="layer 2 of the cache"):
        encode_cache(uneven, codec)


def test_streams_that_no_dynamic_cache_can_hold(
    calibrated: Callable[[str], kvtc.Calibration],
) -> None:
    calibration = calibrated("gemma3")
    sections = calibration.geometry.sections

    def stream(*positions: np.ndarray[Any, Any]) -> bytes:
        encoder = kvtc.Encoder(verbatim(calibration))
        data = b""
        for i, (section, where) in enumerate(zip(sections, positions, strict=False)):
            k = np.ones(section.k_shape(len(where)), np.float32)
            data += encoder.encode(k, k, positions=where, section=i)
        return data + encoder.finish()

    with pytest.warns(kvtc.KVTCWarning):
        gap, uneven, missing = (
            stream(np.array([0, 1, 5]), np.array([0, 1, 5])),
            stream(np.arange(5), np.arange(6)),
            stream(np.arange(5)),
        )
    with pytest.raises(kvtc.UnsupportedError, match="3 tokens, at positions up to 5"):
        decode_cache(gap, calibration)
    for options in ({}, {"return_positions": True}):
        with pytest.raises(kvtc.UnsupportedError, match="the stream holds no tokens"):
            decode_cache(kvtc.Encoder(verbatim(calibration)).finish(), calibration, **options)
    for data in (uneven, missing):
        with pytest.raises(kvtc.UnsupportedError, match="expected all to end at the same"):
            decode_cache(data, calibration)


@pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.errors.KVTCWarning")
def test_a_cache_is_of_floating_point(calibrated: Callable[[str], kvtc.Calibration]) -> None:
    """Integers would keep next to nothing of keys and values."""
    calibration = calibrated("llama")
    cache = kvtc.testing.drawn_cache(calibration.geometry, 9)
    data = kvtc.encode(*cache, verbatim(calibration))
    for dtype in (torch.int8, torch.bool, torch.complex64, "bfloat16"):
        with pytest.raises(TypeError, match="must be a floating-point"):
            decode_cache(data, calibration, dtype=dtype)


def test_a_stream_of_some_layers_is_no_cache() -> None:
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=2, head_dim=8)
    calibrator = kvtc.Calibrator(geometry, layer_groups=2)
    calibrator.update(*kvtc.testing.drawn_cache(geometry, 400))
    calibration = calibrator.finish()
    cache = kvtc.testing.drawn_cache(geometry, 60, seed=1)
    data = kvtc.encode(*cache, kvtc.Codec(calibration, ratio=4, window=0))
    part = io.BytesIO()
    kvtc.split_layers(data, part, slice(1, 2))
    assert len(decode_cache(data, calibration).layers) == 2
    with pytest.raises(kvtc.UnsupportedError, match=r"holds layers \[1\] only: join"):
        decode_cache(part.getvalue(), calibration)
