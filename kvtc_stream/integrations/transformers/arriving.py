"""Layers of a cache that are on their way, and waited for when somebody reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class Arrivals:
    """Groups of layers that come one after the other; for any threads.

    Parameters
    ----------
    steps
        With each a group is there. What one raises is raised to all who wait for that group or a
        later one. Dropping them waits until nothing is written any more.
    """

    def __init__(self, steps: Iterator[None]) -> None:
        self._steps, self._there = steps, 0
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def wait(self, group: int) -> None:
        """Until a group is there."""
        if self._there > group:
            return
        with self._lock:
            while self._there <= group:
                if self._failure is not None:
                    raise self._failure
                try:
                    next(self._steps)
                except BaseException as error:
                    self._failure = error
                    raise
                self._there += 1


@dataclass(frozen=True)
class Coming:
    """What a layer will hold.

    Attributes
    ----------
    rooms
        Waits for it, and returns memory for K and V [rows, heads, room, dim], which nobody else
        has. The tokens that come are the first ones in it.
    tokens
        How many come.
    moved
        Such tokens as the layer holds them: on its device, in its type.
    stays
        Whether that is as they are.
    """

    rooms: Callable[[], tuple[Tensor, Tensor]]
    tokens: int
    moved: Callable[[Tensor], Tensor]
    stays: bool


class ArrivingLayer:
    """A layer without keys and values, which come when one of them is asked for: the layer is then
    what it was before. Copies and pickles are of that."""

    __slots__ = ()  # so that a layer can change its class
    _kind: type
    _coming: Coming

    def __getattr__(self, name: str) -> Any:
        if name not in _NAMES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.settle()
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.settle().__reduce_ex__(protocol)

    def settle(self) -> Any:
        """The layer, once keys and values are there that others have not taken the places of."""
        own, coming = vars(self), self._coming
        if not own.keys() >= _NAMES:
            found = [coming.moved(room[..., : coming.tokens, :]) for room in coming.rooms()]
            for name, x in zip(("keys", "values"), found, strict=True):
                own.setdefault(name, x)
        del own["_coming"]
        self.__class__ = self._kind
        return self


_NAMES = frozenset(("keys", "values"))


def _get_seq_length(self: Any) -> int:
    """See ``DynamicLayer``; does not wait."""
    if not _NAMES & vars(self).keys():
        return self._coming.tokens  # type: ignore[no-any-return]
    return self.settle().get_seq_length()  # type: ignore[no-any-return]


def _update(
    self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """See ``DynamicLayer``, which copies all tokens. Where there is room in memory, new ones follow
    those that have come: nobody has seen that room, and it is used once."""
    own, coming, states = vars(self), self._coming, (key_states, value_states)
    first, last = coming.tokens, coming.tokens + key_states.shape[-2]
    rooms = coming.rooms() if coming.stays and not _NAMES & own.keys() else ()
    if not rooms or not all(map(_fits, states, rooms, repeat(first), repeat(last))):
        found: tuple[Tensor, Tensor] = self.settle().update(*states, *args, **kwargs)
        return found
    for name, x, room in zip(("keys", "values"), states, rooms, strict=True):
        room[..., first:last, :] = x
        own[name] = room[..., :last, :]
    self.settle()
    return own["keys"], own["values"]


def _fits(states: Tensor, room: Tensor, first: int, last: int) -> bool:
    """Whether states can be in some slots of a room; those with gradients are for autograd to
    copy."""
    return (
        last <= room.shape[-2]
        and states.shape == (*room.shape[:-2], last - first, room.shape[-1])
        and (states.dtype, states.device) == (room.dtype, room.device)
        and not (states.requires_grad and torch.is_grad_enabled())
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )


@cache
def _arriving(kind: type) -> type:
    """The class of such layers; transformers registers those that have a ``_layer_type``."""
    members: dict[str, Any] = {"_kind": kind, "_layer_type": None}
    if kind is DynamicLayer:  # it holds all tokens
        members |= {"get_seq_length": _get_seq_length, "update": _update}
    return type(f"Arriving{kind.__name__}", (kind, ArrivingLayer), members)


def expect(layer: Any, coming: Coming) -> None:
    """Let a layer have what is coming, which is waited for, when it is first read."""
    del layer.keys, layer.values
    layer._coming = coming
    kind: type = type(layer)
    layer.__class__ = _arriving(kind)
