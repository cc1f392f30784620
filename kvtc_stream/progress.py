"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

#: Called with work done and work in all, in any unit.
Progress = Callable[[int, int], None]
