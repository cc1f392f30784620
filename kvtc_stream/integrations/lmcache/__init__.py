"""LMCache, multiprocess mode: a serde ``kvtc``, so that its L2 adapters keep compressed chunks.

LMCache has no entry points. ``KvtcPlugin`` is named in ``--l2-adapter``: importing it registers the
serde, and it is whichever of LMCache's own adapters ``adapter_params`` name. LMCache is imported
when something of it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtc_stream.integrations.lmcache.serde import (
        KvtcDeserializer,
        KvtcPlugin,
        KvtcSerializer,
    )
    from kvtc_stream.integrations.lmcache.settings import SerdeSettings

__all__ = ["KvtcDeserializer", "KvtcPlugin", "KvtcSerializer", "SerdeSettings"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "settings" if name == "SerdeSettings" else "serde"
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
