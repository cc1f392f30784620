"""vLLM: pages of its KV cache, compressed, in a store that servers share.

``KvtcConnector`` is named in ``--kv-transfer-config``, ``KvtcTier`` in ``secondary_tiers`` of
vLLM's own tiering offload; vLLM makes them. vLLM is imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtc_stream.integrations.vllm.connector import KvtcConnector
    from kvtc_stream.integrations.vllm.settings import Settings, TierSettings
    from kvtc_stream.integrations.vllm.tier import KvtcTier

__all__ = ["KvtcConnector", "KvtcTier", "Settings", "TierSettings"]

_HOME = {
    "KvtcConnector": "connector",
    "KvtcTier": "tier",
    "Settings": "settings",
    "TierSettings": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
