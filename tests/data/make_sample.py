"""Make ``smollm2_135m.npz``: a piece of the KV cache of SmolLM2-135M over a public text.

Needs the ``demo`` extra. Run ``python tests/data/make_sample.py``; the result is the same each
time on the same versions of torch and transformers, and to bfloat16 rounding on others.

The file holds the bit patterns (uint16) of bfloat16 ``k`` (after RoPE) and ``v``, each
[layers, kv_heads, tokens, head_dim], and ``rope_theta``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvtc_stream.evaluation.smollm2 import model_file

LAYERS = (10, 20)
HEADS = (1,)
TOKENS = 520


def text() -> str:
    """The Apache licence of this repository: real English prose, and always at hand."""
    return (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")


def main() -> None:
    """Run the model over the text and keep a few layers and heads."""
    gguf = model_file()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    torch.set_num_threads(1)  # one order of summation
    ids = tokenizer(text(), return_tensors="pt")["input_ids"][:, :TOKENS]
    cache = DynamicCache()
    with torch.inference_mode():
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)

    def bits(name: str) -> np.ndarray:
        kept = [getattr(cache.layers[i], name)[0, list(HEADS)] for i in LAYERS]
        return torch.stack(kept).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    np.savez_compressed(
        Path(__file__).with_name("smollm2_135m.npz"),
        k=bits("keys"),
        v=bits("values"),
        rope_theta=np.float64(model.config.rope_parameters["rope_theta"]),
    )


if __name__ == "__main__":
    main()
