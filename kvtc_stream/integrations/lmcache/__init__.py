"""LMCache, multiprocess mode: an L2 adapter that keeps compressed chunks in a store, and a serde
``kvtc`` for LMCache's own L2 adapters.

LMCache has no entry points: ``KvtcAdapter`` is named in ``--l2-adapter``. So is ``KvtcPlugin``:
importing it registers the serde, and it is whichever of LMCache's own adapters ``adapter_params``
name. LMCache is imported when something of it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtc_stream.integrations import lazy

if TYPE_CHECKING:
    from kvtc_stream.integrations.lmcache.adapter import KvtcAdapter
    from kvtc_stream.integrations.lmcache.serde import (
        KvtcDeserializer,
        KvtcPlugin,
        KvtcSerializer,
    )
    from kvtc_stream.integrations.lmcache.settings import AdapterSettings, SerdeSettings

__all__ = [
    "AdapterSettings",
    "KvtcAdapter",
    "KvtcDeserializer",
    "KvtcPlugin",
    "KvtcSerializer",
    "SerdeSettings",
]

__getattr__ = lazy(
    __name__,
    dict.fromkeys(__all__, "serde")
    | {"AdapterSettings": "settings", "KvtcAdapter": "adapter", "SerdeSettings": "settings"},
)
