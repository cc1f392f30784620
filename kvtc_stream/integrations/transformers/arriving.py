"""Layers of a cache that are on their way, and waited for when somebody reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import Tensor


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


class ArrivingLayer:
    """A layer without keys and values, which come when one of them is asked for: the layer is then
    what it was before. Copies and pickles are of that."""

    __slots__ = ()  # so that a layer can change its class
    _kind: type
    _coming: Callable[[], tuple[Tensor, Tensor]]

    def __getattr__(self, name: str) -> Any:
        if name not in ("keys", "values"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.settle()
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.settle().__reduce_ex__(protocol)

    def settle(self) -> Any:
        """The layer, once keys and values are there that others have not taken the places of."""
        own = vars(self)
        if "keys" not in own or "values" not in own:
            for name, tensor in zip(("keys", "values"), self._coming(), strict=True):
                own.setdefault(name, tensor)
        del own["_coming"]
        self.__class__ = self._kind
        return self


@cache
def _arriving(kind: type) -> type:
    """The class of such layers; transformers registers those that have a ``_layer_type``."""
    members = {"_kind": kind, "_layer_type": None}
    return type(f"Arriving{kind.__name__}", (kind, ArrivingLayer), members)


def expect(layer: Any, coming: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Let a layer have what ``coming`` returns, which waits for it, when it is first read."""
    del layer.keys, layer.values
    layer._coming = coming
    kind: type = type(layer)
    layer.__class__ = _arriving(kind)
