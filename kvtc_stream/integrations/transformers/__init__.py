"""Hugging Face transformers: calibrate a model, and move a ``DynamicCache`` into a stream and back.

Needs the ``transformers`` extra. What a model caches is found by running it, not by knowing its
class: :func:`geometry_of` reads shapes from a small cache and accepts a rotary table only when it
explains the model's keys. Causal decoders of any family work whose cache is attention keys and
values: grouped heads, K norms, sliding windows, several rotary tables, layers without RoPE.

    calibration = calibrate(model, texts, tokenizer=tokenizer)
    codec = kvtc_stream.Codec(calibration, ratio=16)
    encode_cache(cache, codec, "prompt.kvtc", model=model, token_ids=prompt)

    cache = decode_cache("prompt.kvtc", calibration, model=model, token_ids=prompt)
    model.generate(prompt_and_question, cache=cache)

Functions may run in several threads on different models; one model serves one call at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtc_stream.integrations import lazy

if TYPE_CHECKING:
    from kvtc_stream.integrations.transformers.cache import decode_batch, decode_cache, encode_cache
    from kvtc_stream.integrations.transformers.calibration import calibrate, capture
    from kvtc_stream.integrations.transformers.geometry import geometry_of
    from kvtc_stream.integrations.transformers.identity import model_identity, token_digest
    from kvtc_stream.integrations.transformers.loading import load_model

_HOME = {
    "calibrate": "calibration",
    "capture": "calibration",
    "decode_batch": "cache",
    "decode_cache": "cache",
    "encode_cache": "cache",
    "geometry_of": "geometry",
    "model_identity": "identity",
    "token_digest": "identity",
    "load_model": "loading",
}

__all__ = [
    "calibrate",
    "capture",
    "decode_batch",
    "decode_cache",
    "encode_cache",
    "geometry_of",
    "load_model",
    "model_identity",
    "token_digest",
]

# ``load_model`` says so if PyTorch is missing.
__getattr__ = lazy(__name__, _HOME)
