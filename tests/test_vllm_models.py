"""Kinds of models in a real vLLM, on the CPU: ``pytest -m vllm tests/test_vllm_models.py``.

Small ones with drawn weights. Each makes a calibration of what it serves, stores pages and loads
them again, or is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_vllm import BLOCK, PAGE, VOCABULARY, divergence, prompt, rows, serve

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="needs vLLM, in an environment of its own"
    ),
]

PAGES, SCORED = 10, 60
ENGINE = {
    "block_size": BLOCK,
    "max_model_len": 1536,
    "max_num_batched_tokens": 512,
    "max_logprobs": VOCABULARY,
}
#: One group of layers, whose blocks are kept for all tokens, also where layers have windows.
ONE_GROUP = {"disable_hybrid_kv_cache_manager": True}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 32}
WINDOW = HEADS | {"sliding_window": 128}


def rotary(kind: str, **more: Any) -> dict[str, Any]:
    return HEADS | {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0} | more}


#: Class of the model, its configuration, and keywords of the engine.
SERVED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("Qwen2", GROUPED, {}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 64}, {}),
    "phi3": ("Phi3", GROUPED, {}),
    "gpt-neox": ("GPTNeoX", COMMON | {"rotary_pct": 0.25}, {}),
    "opt": (
        "OPT",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "init_std": 0.15,
        },
        {},
    ),
    "cohere": ("Cohere", GROUPED, {}),
    "falcon": ("Falcon", COMMON | {"multi_query": True, "bias": False}, {}),
    "llama, RoPE of Llama 3": (
        "Llama",
        rotary(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=512,
        ),
        {},
    ),
    "llama, YaRN": (
        "Llama",
        rotary("yarn", factor=4.0, original_max_position_embeddings=512),
        {},
    ),
    "llama, dynamic NTK": ("Llama", rotary("dynamic", factor=4.0), {}),
    "gemma2": ("Gemma2", WINDOW, ONE_GROUP),
    "gpt-oss": (
        "GptOss",
        WINDOW | {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        ONE_GROUP,
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "mistral, windows": ("Mistral", WINDOW, {}, "1 groups of layers (SlidingWindowSpec)"),
    "gemma2": ("Gemma2", WINDOW, {}, "--disable-hybrid-kv-cache-manager makes one group"),
    "gemma3": (
        "Gemma3",
        WINDOW | {"num_hidden_layers": 6},
        ONE_GROUP,
        "the model has 2 rotary tables",
    ),
    "deepseek2": (
        "DeepseekV2",
        COMMON
        | {
            "num_key_value_heads": 4,
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        {},
        "MLAAttentionSpec",
    ),
}


def save_model(folder: Path, kind: str, config: dict[str, Any]) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    model: Callable[..., Any] = getattr(transformers, f"{kind}ForCausalLM")
    model(getattr(transformers, name)(**config)).to(torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize("name", SERVED)
def test_a_prefix_is_restored(tmp_path: Path, name: str) -> None:
    kind, config, keywords = SERVED[name]
    save_model(tmp_path / "model", kind, config)
    (tmp_path / "learnt").mkdir()
    calibration = tmp_path / "learnt" / "calibration.safetensors"
    serve(
        tmp_path,
        "learn",
        engine=ENGINE | keywords,
        connector={"calibrate": str(calibration), "calibrate_tokens": 4000},
        requests=[{"ids": [prompt(100 + i, 800) for i in range(7)]}],
        folder=str(tmp_path / "learnt"),
        pages=1,
    )
    store = tmp_path / "store"
    store.mkdir()
    request = {"ids": [prompt(1, PAGES * PAGE + SCORED + 1)], "score": VOCABULARY}
    exact, restored = serve(
        tmp_path,
        "restore",
        engine=ENGINE | keywords,
        connector={
            "calibration": str(calibration),
            "store": str(store),
            "ratio": 4,
            "error_bound": None,
            "page_tokens": PAGE,
        },
        requests=[request | {"pages": PAGES}, request | {"forget": True}],
        folder=str(store),
    )
    assert exact["cached"] == 0
    assert restored["cached"] == PAGES * PAGE
    found = [rows(x["logprobs"], SCORED) for x in (exact, restored)]
    entropy = float(-(np.exp(found[0]) * found[0]).sum(axis=1).mean())
    assert divergence(*found) < 0.1 * entropy


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_named(tmp_path: Path, name: str) -> None:
    kind, config, keywords, message = REFUSED[name]
    save_model(tmp_path / "model", kind, config)
    with pytest.raises(AssertionError) as refused:
        serve(
            tmp_path,
            "refused",
            engine=ENGINE | keywords,
            connector={"calibrate": str(tmp_path / "c.safetensors"), "calibrate_tokens": 4000},
            requests=[{"ids": [[1]]}],
        )
    log = (tmp_path / "refused.log").read_text()
    assert message in log, refused.value
