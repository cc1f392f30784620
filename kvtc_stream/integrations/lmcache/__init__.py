"""LMCache, multiprocess mode: a serde ``kvtc``, so that its L2 adapters keep compressed chunks.

LMCache has no entry points. ``KvtcPlugin`` is named in ``--l2-adapter``: importing it registers the
serde, and it is whichever of LMCache's own adapters ``adapter_params`` name. LMCache is imported
when something of it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtc_stream.integrations import lazy

if TYPE_CHECKING:
    from kvtc_stream.integrations.lmcache.serde import (
        KvtcDeserializer,
        KvtcPlugin,
        KvtcSerializer,
    )
    from kvtc_stream.integrations.lmcache.settings import SerdeSettings

__all__ = ["KvtcDeserializer", "KvtcPlugin", "KvtcSerializer", "SerdeSettings"]

__getattr__ = lazy(__name__, dict.fromkeys(__all__, "serde") | {"SerdeSettings": "settings"})
