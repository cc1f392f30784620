"""What adapters of serving hosts share: layouts of pages, whose they are, settings, and stores."""

from __future__ import annotations

from kvtc_stream.integrations.hosts.keys import Chain, Namespace, PageKey
from kvtc_stream.integrations.hosts.layouts import Layout, kv_views
from kvtc_stream.integrations.hosts.positions import FoundPosition, PositionFinder
from kvtc_stream.integrations.hosts.settings import PageSettings
from kvtc_stream.integrations.hosts.store import (
    Entry,
    FileStore,
    MemoryStore,
    RemoteStore,
    Store,
    open_store,
)

__all__ = [
    "Chain",
    "Entry",
    "FileStore",
    "FoundPosition",
    "Layout",
    "MemoryStore",
    "Namespace",
    "PageKey",
    "PageSettings",
    "PositionFinder",
    "RemoteStore",
    "Store",
    "kv_views",
    "open_store",
]
