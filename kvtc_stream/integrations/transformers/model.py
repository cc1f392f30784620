"""Running a transformers model: the part that fills the cache, and how."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvtc_stream.errors import UnsupportedError

SUPPORTED_CACHES = (
    "supported is a DynamicCache of one sequence whose layers are full or sliding-window attention"
)


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
