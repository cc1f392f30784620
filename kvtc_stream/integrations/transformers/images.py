"""Prompts with images, whose tokens some models place in three dimensions (M-RoPE)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kvtc_stream.errors import UnsupportedError
from kvtc_stream.integrations.transformers.model import decoder_of, modules_of, plain_model

_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")


def check_no_images(model: PreTrainedModel, token_ids: NDArray[np.int64] | None) -> None:
    """Refuse a prompt with images, or one that may have some, of a model with M-RoPE.

    Their keys are at positions in three dimensions, of which a stream has one, and the model goes
    on from them at positions that it keeps for itself (``rope_deltas``).
    """
    if not _has_mrope(model):
        return
    name = type(plain_model(model)).__name__
    if token_ids is None:
        if any(deltas is not None and bool(deltas.any()) for _, deltas in _rope_deltas(model)):
            raise UnsupportedError(
                f"{name} has read images, to which it gives positions in three dimensions; a "
                f"stream has one: pass token_ids, which show whether this prompt has any"
            )
        return
    if np.isin(token_ids, list(placeholders(model))).any():
        raise UnsupportedError(
            f"the prompt has images, to which {name} gives positions in three dimensions; a stream "
            f"has one: only prompts of text can be stored"
        )


def placeholders(model: PreTrainedModel) -> set[int]:
    """Ids of tokens that stand for images, video and sound."""
    return {
        value
        for key, value in plain_model(model).config.to_dict().items()
        if _PLACEHOLDER.fullmatch(key) and isinstance(value, int)
    }


def forget_images(model: PreTrainedModel) -> None:
    """As a model does that reads a prompt without images."""
    for module, _ in _rope_deltas(model):
        module.rope_deltas = None


def _rope_deltas(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    # Modules look for what they lack in three places, and then raise an error.
    own = [x for x in modules_of(plain_model(model)) if "rope_deltas" in vars(x)]
    return [(x, x.rope_deltas) for x in own]


def _has_mrope(model: PreTrainedModel) -> bool:
    parameters = getattr(decoder_of(model).config, "rope_parameters", None) or {}
    return bool(_rope_deltas(model)) or "mrope_section" in str(parameters)
