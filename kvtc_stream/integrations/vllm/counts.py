"""What is counted of loads and stores."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass
class Counts:
    """What happened since the last look; bytes of the cache are those of the engine's dtype."""

    loaded_pages: int = 0
    loaded_bytes: int = 0
    loaded_cache_bytes: int = 0
    load_seconds: float = 0.0
    stored_pages: int = 0
    stored_bytes: int = 0
    stored_cache_bytes: int = 0
    store_seconds: float = 0.0
    known_pages: int = 0
    missing_pages: int = 0
    damaged_pages: int = 0
    failed_pages: int = 0
    dropped_pages: int = 0


class Counter:
    """Counts of several threads."""

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), Counts()

    def add(self, **counts: float) -> None:
        """Add to some counts."""
        with self._lock:
            for name, value in counts.items():
                setattr(self._counts, name, getattr(self._counts, name) + value)

    def take(self) -> Counts:
        """What was counted since the last call."""
        with self._lock:
            found, self._counts = self._counts, Counts()
        return found
