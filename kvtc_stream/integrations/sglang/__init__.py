"""SGLang: pages of its hierarchical cache, compressed, in a store that servers share.

``KvtcStorage`` is named in ``--hicache-storage-backend-extra-config``; SGLang makes it. SGLang is
imported when the class is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtc_stream.integrations import lazy

if TYPE_CHECKING:
    from kvtc_stream.integrations.sglang.settings import StorageSettings
    from kvtc_stream.integrations.sglang.storage import KvtcStorage

__all__ = ["KvtcStorage", "StorageSettings"]

__getattr__ = lazy(__name__, dict.fromkeys(__all__, "storage") | {"StorageSettings": "settings"})
