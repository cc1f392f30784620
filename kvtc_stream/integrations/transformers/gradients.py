"""How much a model's output depends on its cache: what importance weights are made of.

:func:`capture_gradients` samples the Fisher information: with labels drawn from the model's own
distribution, the second moment of the gradients is the curvature of the Kullback-Leibler
divergence between the outputs of the exact and of a changed cache (Martens, "New insights and
perspectives on the natural gradient method", JMLR 21, 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvtc_stream.coding.rope import Rotations, gather
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import Section
from kvtc_stream.integrations.transformers.geometry import geometry_of
from kvtc_stream.integrations.transformers.identity import TokenIds
from kvtc_stream.integrations.transformers.model import (
    attention_layers,
    decoder_of,
    growing,
    inference,
    plain_model,
)

#: Tokens whose probabilities are in memory at once, in float32.
_CHUNK = 128


def capture_gradients(
    model: PreTrainedModel, token_ids: TokenIds, *, after: int | None = None, seed: int
) -> list[tuple[int, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]]:
    """Run a causal language model over one document, and its loss back into a part of its cache.

    The cache is of the tokens before ``after``, and the loss the sum over the others of
    ``-log p(label | tokens so far)``, with a label for each token drawn from the model's own
    distribution. This is how a restored cache is used: later tokens attend to it, its own tokens
    are not computed again. Hence a change of one layer's keys changes no other layer's, and
    outputs at the cache's own tokens do not count: a weight made of them would spend bits on what
    nobody reads.

    Parameters get no gradients, and the model is left as it was.

    Parameters
    ----------
    model
        With its head. Gradients are computed in its dtype; beside what its layers keep for them,
        logits and their gradient, [tokens - after, vocabulary] each, are in memory.
    token_ids
        [tokens], from position 0.
    after
        From 1 to ``tokens - 1``; half of the document's tokens by default.
    seed
        Of the labels; documents of one calibration should have different ones.

    Returns
    -------
    list of (section, k, v, grad_k, grad_v)
        ``section``, ``k`` and ``v`` as :func:`~kvtc_stream.integrations.transformers.capture`
        gives them, but of the tokens before ``after`` only. ``grad_k`` and ``grad_v`` are per
        layer the gradients of the loss with respect to K *before* RoPE and V: [1, kv_heads,
        after, head_dim], float32, on the CPU.

    Raises
    ------
    ValueError
        No token is before ``after``, or none from there on.
    UnsupportedError
        The model has no head, or hides a part of its cache from gradients, or :func:`geometry_of`
        does not support it.
    """
    geometry = geometry_of(model)
    if not model.can_generate():
        raise UnsupportedError(
            f"{type(model).__name__} has no language model head, which gradients start from: load "
            f"the model with AutoModelForCausalLM, or choose another importance"
        )
    ids = torch.as_tensor(token_ids, device=model.device)
    if after is None:
        after = len(ids) // 2
    if not 1 <= after < len(ids):
        raise ValueError(
            f"after must be from 1 to tokens - 1, found {after} of {len(ids)} tokens: gradients "
            f"are of tokens before it, the loss is of those from it on"
        )
    # Without a configuration the cache keeps every token of sliding layers; masks still slide.
    cache = DynamicCache()
    with _frozen(model):
        with torch.no_grad():
            decoder = decoder_of(model)
            decoder(input_ids=ids[None, :after], **growing(decoder, cache))
        layers = attention_layers(cache, "the cache")
        cached = {n: (layer.keys, layer.values) for n, layer in layers.items()}
        leaves = [x.requires_grad_() for pair in cached.values() for x in pair]
        logits = model(input_ids=ids[None, after:], **growing(model, cache)).logits[0]
        flat = _gradients(logits, leaves, seed, type(plain_model(model)).__name__)
    gradients = dict(zip(layers, zip(flat[::2], flat[1::2], strict=True), strict=True))
    captured = []
    for i, section in enumerate(geometry.sections):
        grad_k = onto_unrotated(section, [gradients[n][0] for n in section.layers])
        captured.append(
            (
                i,
                [cached[n][0].detach() for n in section.layers],
                [cached[n][1].detach() for n in section.layers],
                [torch.from_numpy(x[None]) for x in grad_k],
                [gradients[n][1].float().cpu() for n in section.layers],
            )
        )
    return captured


def _gradients(logits: Tensor, leaves: list[Tensor], seed: int, name: str) -> list[Tensor]:
    """The loss run back into ``leaves``; ``UnsupportedError`` if it does not reach all of them."""
    found: tuple[Tensor | None, ...] = (None,)
    if logits.requires_grad:
        loss = _loss_gradient(logits.detach(), seed)
        found = torch.autograd.grad(logits, leaves, loss, allow_unused=True)
    reached = [x for x in found if x is not None]
    if len(reached) < len(found):
        raise UnsupportedError(
            f"{name} cuts gradients off before they reach all layers, as models do that run their "
            f"layers several times and learn from the last: choose another importance"
        )
    return reached


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode, with gradients of activations and none of parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        # Of inference, only the evaluation mode stays.
        with inference(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _loss_gradient(logits: Tensor, seed: int) -> Tensor:
    """The loss' gradient with respect to ``logits`` [tokens, vocabulary]: softmax − one-hot."""
    tokens, vocabulary = logits.shape
    # Numbers of the CPU's generator make labels the same on every device, but for rounding.
    uniform = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed)).to(logits.device)
    gradient = torch.empty_like(logits)
    for start in range(0, tokens, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        p = logits[chunk].float().softmax(dim=-1)
        # By the inverse distribution function: torch.multinomial draws a number per entry.
        below = p.cumsum(dim=-1)
        labels = torch.searchsorted(below, uniform[chunk] * below[:, -1:], right=True)
        labels.clamp_(max=vocabulary - 1)  # where logits are NaN
        gradient[chunk] = p.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=p.dtype))
    return gradient


def onto_unrotated(section: Section, x: Sequence[Tensor]) -> NDArray[np.float32]:
    """Gradients with respect to K as cached, brought to K before RoPE.

    ``x`` is [1, heads, tokens, k_dim] a layer, of any heads; the result [layers, heads, tokens,
    k_dim]. A key is cached as ``R k``, so its gradient is multiplied by the transpose of ``R``:
    the rotation by the negative angle, times (not divided by) the scale.
    """
    keys = torch.cat([layer.float().cpu() for layer in x]).numpy()
    layers, heads, tokens, dim = keys.shape
    rows = np.empty((tokens, layers * heads * dim), np.float32)
    transposed = Rotations.of(section, -np.arange(tokens), inverse=False)
    gather(np.ascontiguousarray(keys), np.arange(layers), transposed, rows)
    return rows.reshape(tokens, layers, heads, dim).transpose(1, 2, 0, 3)
