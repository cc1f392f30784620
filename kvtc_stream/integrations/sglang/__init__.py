"""SGLang: pages of its hierarchical cache, compressed, in a store that servers share.

``KvtcStorage`` is named in ``--hicache-storage-backend-extra-config``; SGLang makes it. SGLang is
imported when the class is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtc_stream.integrations.sglang.settings import StorageSettings
    from kvtc_stream.integrations.sglang.storage import KvtcStorage

__all__ = ["KvtcStorage", "StorageSettings"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "settings" if name == "StorageSettings" else "storage"
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
