"""Layers of a cache that are on their way, and waited for when somebody reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import starmap
from typing import Any, NamedTuple

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


@dataclass(frozen=True, eq=False, repr=False)
class Room:
    """Memory of some layers, and views of it, which take less time for all layers at once.

    Attributes
    ----------
    k, v
        [layers, rows, heads, room, dim].
    tokens
        How many tokens come: the first ones in it. Nobody else has seen what is behind them.
    """

    k: Tensor
    v: Tensor
    tokens: int
    _longer: dict[tuple[int, bool], list[tuple[Sequence[Tensor], list[Tensor]]]] = field(
        default_factory=dict
    )

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V [rows, heads, tokens, dim] of a layer, with a version counter of its own: to
        write to one must not count as a change of all."""
        return self.k[index, ..., : self.tokens, :].data, self.v[index, ..., : self.tokens, :].data

    def longer(
        self, index: int, key_states: Tensor, value_states: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """As :meth:`layer`, with more tokens behind, if there is room for what they are."""
        if (found := self._places(key_states.shape[-2])) is None:
            return None
        (k_places, k), (v_places, v) = found
        pairs = (key_states, k_places[index]), (value_states, v_places[index])
        if not all(starmap(_fits, pairs)):
            return None
        for x, place in pairs:
            place.copy_(x)
        return k[index], v[index]

    def _places(self, more: int) -> list[tuple[Sequence[Tensor], list[Tensor]]] | None:
        """Of K and of V, for each layer, where so many more tokens go, and all with these; ``None``
        if there is no room."""
        last = self.tokens + more
        if last > self.k.shape[-2]:
            return None
        # What is made in inference mode is of no use to autograd.
        key = more, torch.is_inference_mode_enabled()
        if key not in self._longer:
            self._longer[key] = [
                (
                    x.narrow(-2, self.tokens, more).unbind(),
                    [own.data for own in x.narrow(-2, 0, last).unbind()],
                )
                for x in (self.k, self.v)
            ]
        return self._longer[key]


def _fits(states: Tensor, place: Tensor) -> bool:
    """Whether states can be copied there; those with gradients are for autograd to copy."""
    return (
        states.shape == place.shape
        and states.dtype == place.dtype
        and states.device == place.device
        and not (states.requires_grad and torch.is_grad_enabled())
        and (torch.is_inference_mode_enabled() or not place.is_inference())
    )


class Coming(NamedTuple):
    """What a layer will hold: which layer of a room, what waits for it, how the layer holds it (on
    its device, in its type), and whether that is as it comes."""

    room: Room
    layer: int
    wait: Callable[[], None]
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
            coming.wait()
            found = map(coming.moved, coming.room.layer(coming.layer))
            for name, x in [*zip(("keys", "values"), found, strict=True)]:
                own.setdefault(name, x)
        del own["_coming"]
        self.__class__ = self._kind
        return self


_NAMES = frozenset(("keys", "values"))


def _get_seq_length(self: Any) -> int:
    """See ``DynamicLayer``; does not wait."""
    if not _NAMES & vars(self).keys():
        return self._coming.room.tokens  # type: ignore[no-any-return]
    return self.settle().get_seq_length()  # type: ignore[no-any-return]


def _update(
    self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """See ``DynamicLayer``, which copies all tokens. Where there is room in memory, new ones follow
    those that have come; it is used once."""
    own, coming, found = vars(self), self._coming, None
    if coming.stays and not _NAMES & own.keys():
        coming.wait()
        found = coming.room.longer(coming.layer, key_states, value_states)
    if found is None:
        found = self.settle().update(key_states, value_states, *args, **kwargs)
        return found  # type: ignore[no-any-return]
    own["keys"], own["values"] = found
    self.settle()
    return found  # type: ignore[no-any-return]


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
