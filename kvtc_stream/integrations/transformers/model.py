"""Running a transformers model: the part that fills the cache, and how."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, wraps
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvtc_stream.errors import KVTCError, UnsupportedError
from kvtc_stream.integrations.transformers.arriving import ArrivingLayer

T = TypeVar("T")
R = TypeVar("R")

SUPPORTED_CACHES = (
    "supported is a DynamicCache of one sequence whose layers are full or sliding-window attention"
)


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, where ``torch.compile`` has wrapped it."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, found {type(model)}")
    return model


#: Fields of a module: what it has.
_MODULES, _PARAMETERS, _BUFFERS = map(attrgetter, ("_modules", "_parameters", "_buffers"))
#: What has been found out about models, while :func:`one_walk` keeps it.
_kept: ContextVar[dict[tuple[str, int], tuple[Any, Any]] | None] = ContextVar("kept", default=None)


@contextmanager
def one_walk() -> Iterator[None]:
    """Models do not change meanwhile: what is to be :func:`found_once` is."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def found_once(function: Callable[[T], R]) -> Callable[[T], R]:
    """A function of a model, or of its configuration, whose result nobody changes."""

    @wraps(function)
    def find(subject: T) -> R:
        kept = _kept.get()
        if kept is None:
            return function(subject)
        key = function.__name__, id(subject)
        if key not in kept:
            kept[key] = subject, function(subject)
        found: R = kept[key][1]
        return found

    return find


@found_once
def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that fills the cache: without head, without vision tower."""
    model = plain_model(model)
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder model, supported are causal decoders"
        )
    # Where an output head is called "decoder", get_decoder gives that.
    for part in (model.get_decoder(), model.base_model):  # type: ignore[no-untyped-call]
        part = getattr(part, "_orig_mod", part)
        if isinstance(part, PreTrainedModel):
            return part
    raise UnsupportedError(
        f"{type(model).__name__} has no part that is a model of its own and fills the cache"
    )


def ahead_of_what_comes(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Contexts whose work on a CUDA device is after that of the current stream until now, and
    goes ahead of what follows there: small things that the host waits for while large ones run."""
    if device.type != "cuda":
        return nullcontext
    now = torch.cuda.current_stream(device).record_event()

    def context() -> AbstractContextManager[Any]:
        stream = _urgent(device)
        stream.wait_event(now)
        return torch.cuda.stream(stream)

    return context


@cache
def _urgent(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


#: What :func:`modules_of` found last, by model.
_walked = weakref.WeakKeyDictionary[torch.nn.Module, list[weakref.ref[Any]]]()


@found_once
def modules_of(model: torch.nn.Module) -> list[Any]:
    """Those of ``model.modules()``, nearer ones first. A model is walked through for each cache:
    that takes less than half of the time, and a fifth where all modules have the children that they
    had."""
    known = [own() for own in _walked.get(model, ())]
    if known and None not in known and _below(known) == known[1:]:
        return known
    found, level = dict[Any, None](), dict[Any, None]({model: None})
    while level:
        found |= level
        level = {x: None for x in _below(level) if x not in found}
    _walked[model] = list(map(weakref.ref, found))
    return list(found)


def _below(modules: Iterable[Any]) -> list[Any]:
    """The children of modules, one module after the other."""
    children = chain.from_iterable(x.values() for x in map(_MODULES, modules) if x)
    return [x for x in children if x is not None]


@found_once
def tensors_of(model: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers; those that are shared, as often as they are."""
    modules = modules_of(model)
    held = chain(map(_PARAMETERS, modules), map(_BUFFERS, modules))
    return [x for own in held if own for x in own.values() if x is not None]


def layer_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Where the layers of a model that is spread over several devices are; empty if it is not."""
    decoder = decoder_of(model)
    if len({x.device for x in tensors_of(decoder)}) < 2:
        return {}
    lists = [x for x in decoder.children() if isinstance(x, torch.nn.ModuleList)]
    layers = max(lists, key=len, default=torch.nn.ModuleList())
    return {n: next(layer.parameters()).device for n, layer in enumerate(layers)}


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
    parameters = inspect.signature(module.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return {name: cache, "use_cache": True}
    raise UnsupportedError(f"{type(module).__name__} takes no cache; {SUPPORTED_CACHES}")


class StopRun(Exception):  # noqa: N818
    """A run has reached what it was for."""


def run(decoder: PreTrainedModel, cache: DynamicCache, name: str, **inputs: Any) -> Any:
    """A decoder's output for inputs of our own choice, which a model may not be made for."""
    try:
        moved = {k: x.to(decoder.device) if isinstance(x, Tensor) else x for k, x in inputs.items()}
        with inference(decoder):
            return decoder(**moved, **growing(decoder, cache))
    except (KVTCError, StopRun, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{name} cannot be run on token ids with a DynamicCache ({type(error).__name__}: "
            f"{error}); {SUPPORTED_CACHES}"
        ) from error


def probe_tokens(decoder: PreTrainedModel, count: int) -> list[int]:
    """Tokens that mean something: none that fills, begins or ends, none whose embedding is zero."""
    weight: Any = decoder.get_input_embeddings().weight
    special = (getattr(decoder.config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos"))
    left_out = {x for ids in special for x in (ids if isinstance(ids, list) else [ids])}
    near = list(range(len(weight) // 2, len(weight)))[: 16 * count]
    # Where a vocabulary is tiny, tokens come again.
    usable = [i for i in near if i not in left_out and bool(weight[i].any())] or near
    return [usable[i % len(usable)] for i in range(count)]


def filled_layers(cache: DynamicCache, name: str) -> dict[int, Any]:
    """The :func:`attention_layers` that hold tokens; ``UnsupportedError`` if none does."""
    layers = {n: x for n, x in attention_layers(cache, name).items() if x.is_initialized}
    if not layers:
        raise UnsupportedError(f"{name} left its cache empty; {SUPPORTED_CACHES}")
    return layers


def attention_layers(cache: DynamicCache, owner: str) -> dict[int, Any]:
    """The layers that hold keys and values, by number; refuses kinds that cannot be encoded."""
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, ArrivingLayer):
            layer.settle()
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise UnsupportedError(
                f"layer {number} of {owner} is a {type(layer).__name__}; {SUPPORTED_CACHES}"
            )
    return {n: layer for n, layer in enumerate(cache.layers) if type(layer) is not DummyLayer}
