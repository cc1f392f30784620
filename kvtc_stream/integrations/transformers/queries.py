"""How attention reads a model's cache: what importance weights are made of without gradients.

An error ``e`` of a key changes the score of a query ``q`` by ``qᵀ e``, so scores lose
``eᵀ E[q qᵀ] e`` on average. An error of a value enters the residual stream as ``W_O e`` times the
attention's probability, so outputs lose in proportion to ``eᵀ W_Oᵀ W_O e``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import Section
from kvtc_stream.integrations.transformers.geometry import geometry_of
from kvtc_stream.integrations.transformers.gradients import onto_unrotated
from kvtc_stream.integrations.transformers.identity import TokenIds
from kvtc_stream.integrations.transformers.model import decoder_of, growing, inference

#: Tokens of the short run that shows which modules are output projections.
_PROBE_TOKENS = 4

#: Held while transformers' attention interface is replaced.
_lock = threading.Lock()


@dataclass(frozen=True)
class _Read:
    """One call of an attention function."""

    module: torch.nn.Module
    layer: int  #: whose cache is read
    queries: Tensor  #: [1, heads, tokens, k_dim], after RoPE
    scale: float  #: of scores
    output: Tensor  #: [1, tokens, heads, v_dim]


def query_second_moments(model: PreTrainedModel, token_ids: TokenIds) -> list[NDArray[np.float32]]:
    """Second moments of the queries that attend to each KV head, over one document.

    Queries are scaled as attention scales them (softcapping is left out), and brought to the frame
    of K *before* RoPE as if each stood at the position of the key: its product with such a key is
    their score at distance zero. That is close for channels that RoPE turns slowly; of fast ones,
    scores at other distances depend on other directions of the same pair.

    Parameters
    ----------
    model
        A causal decoder; its head is not run. It is left as it was.
    token_ids
        [tokens], from position 0.

    Returns
    -------
    list of float32 [layers, kv_heads, k_dim, k_dim]
        Per section of :func:`geometry_of`, ``E[q qᵀ]``: the mean over tokens and over the query
        heads that share a KV head.

    Raises
    ------
    ValueError
        There are no tokens.
    UnsupportedError
        :func:`geometry_of` does not support the model, or its attention does not go through
        transformers' ``AttentionInterface``, where queries are seen.
    """
    geometry = geometry_of(model)
    places = _places(geometry.sections)
    sums = [np.zeros((*s.k_shape(0)[:2], s.k_dim, s.k_dim), np.float64) for s in geometry.sections]
    counts = [np.zeros((len(s.layers), 1, 1, 1)) for s in geometry.sections]

    def add(read: _Read) -> None:
        i, row, section = places[read.layer]
        # The score's gradient with respect to a key at the query's own position.
        q = onto_unrotated(section, [read.scale * read.queries.float()])
        q = q.reshape(section.kv_heads, -1, section.k_dim)
        sums[i][row] += q.transpose(0, 2, 1) @ q
        counts[i][row] += q.shape[1]

    ids = torch.as_tensor(token_ids)
    if not len(ids):
        raise ValueError("token_ids must hold at least one token, found none")
    _run(model, ids, add)
    return [(x / n).astype(np.float32) for x, n in zip(sums, counts, strict=True)]


def output_norms(model: PreTrainedModel) -> list[NDArray[np.float32]]:
    """How long each KV head's values are behind the output projection of the attention.

    The projection is the linear layer that the attention's output enters; the model runs over a
    few tokens to see which.

    Returns
    -------
    list of float32 [layers, kv_heads, v_dim, v_dim]
        Per section of :func:`geometry_of`: the sum of ``W_Oᵀ W_O`` over the query heads that share
        a KV head, of each one's columns of ``W_O``.

    Raises
    ------
    UnsupportedError
        As of :func:`query_second_moments`, or something stands between the attention and its
        output projection, as a gate or a norm.
    """
    geometry = geometry_of(model)
    reads: list[_Read] = []
    projections: dict[torch.nn.Module, torch.nn.Module] = {}

    def compare(part: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if not reads or not inputs:
            return
        x, output = inputs[0], reads[-1].output.flatten(2)
        if isinstance(x, Tensor) and x.dtype == output.dtype and torch.equal(x, output):
            projections.setdefault(reads[-1].module, part)

    decoder = decoder_of(model)
    linear = [x for x in decoder.modules() if getattr(getattr(x, "weight", 0), "ndim", 0) == 2]
    hooks = [part.register_forward_pre_hook(compare) for part in linear]
    try:
        _run(model, torch.arange(_PROBE_TOKENS), reads.append)
    finally:
        for hook in hooks:
            hook.remove()

    places = _places(geometry.sections)
    norms = [np.zeros((*s.v_shape(0)[:2], s.v_dim, s.v_dim), np.float32) for s in geometry.sections]
    for read in reads:
        if read.module not in projections:
            raise UnsupportedError(
                f"{type(model).__name__}: no linear layer takes the output of "
                f"{type(read.module).__name__}'s attention to layer {read.layer} as it is, so its "
                f"output projection is unknown; choose another importance"
            )
        i, row, section = places[read.layer]
        # Whatever its class and however it stores weights, a linear layer maps the unit vectors
        # to them, plus its bias.
        unit = torch.eye(read.output.shape[2:].numel()).to(read.output)
        with inference(model):
            projection = projections[read.module]
            w = (projection(unit) - projection(torch.zeros_like(unit[:1]))).float().cpu().numpy()
        # [heads * v_dim, hidden], the transpose of W_O
        w = w.reshape(section.kv_heads, -1, section.v_dim, w.shape[1])
        norms[i][row] += (w @ w.transpose(0, 1, 3, 2)).sum(axis=1)
    return norms


def _places(sections: tuple[Section, ...]) -> dict[int, tuple[int, int, Section]]:
    """For each layer its section's index, its place there, and a section of this layer only."""
    return {
        layer: (i, row, replace(section, layers=(layer,), rope=section.rope[row : row + 1]))
        for i, section in enumerate(sections)
        for row, layer in enumerate(section.layers)
    }


def _run(model: PreTrainedModel, ids: Tensor, see: Callable[[_Read], None]) -> None:
    """Run a model's decoder over one document, and ``see`` every call of an attention function."""
    decoder = decoder_of(model)
    modules = set(decoder.modules())
    places = _places(geometry_of(model).sections)
    unseen = set(places)
    cache = DynamicCache()

    def attend(
        function: Callable[..., Any],
        module: torch.nn.Module,
        queries: Tensor,
        keys: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = function(module, queries, keys, *args, **kwargs)
        if module not in modules:  # of a model in another thread
            return result
        # By the tensor, not by the module's number: a layer may read another one's cache.
        layer = next(
            (n for n, x in enumerate(cache.layers) if getattr(x, "keys", None) is keys), -1
        )
        section = places[layer][2] if layer in places else None
        heads = queries.shape[1]
        if (
            section is None
            or heads % section.kv_heads
            or queries.shape != (1, heads, len(ids), section.k_dim)
            or result[0].shape != (1, len(ids), heads, section.v_dim)
        ):
            raise UnsupportedError(
                f"{type(model).__name__}: a {type(module).__name__} attends with queries "
                f"{list(queries.shape)} to keys {list(keys.shape)}, giving "
                f"{list(result[0].shape)}; supported are queries [1, heads, tokens, k_dim] to the "
                f"cache's own keys of a divisor of the heads: give importance weights of another "
                f"kind"
            )
        unseen.discard(layer)
        scale = kwargs.get("scaling")
        scale = queries.shape[3] ** -0.5 if scale is None else float(scale)
        see(_Read(module, layer, queries, scale, result[0]))
        return result

    with _lock:
        original = AttentionInterface.get_interface

        def get_interface(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return partial(attend, original(*args, **kwargs))

        # Every implementation is looked up here at each call, a model's own eager one too.
        setattr(AttentionInterface, "get_interface", get_interface)  # noqa: B010
        try:
            with inference(decoder):
                decoder(input_ids=ids[None].to(decoder.device), **growing(decoder, cache))
        finally:
            setattr(AttentionInterface, "get_interface", original)  # noqa: B010
    if unseen:
        raise UnsupportedError(
            f"{type(model).__name__}: the attention of layers {sorted(unseen)} does not go through "
            f"transformers' AttentionInterface, where queries are seen: choose another "
            f"importance"
        )
