"""vLLM: pages of its KV cache, compressed, in a store that servers share.

``KvtcConnector`` is named in ``--kv-transfer-config``, ``KvtcTier`` in ``secondary_tiers`` of
vLLM's own tiering offload; vLLM makes them. vLLM is imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtc_stream.integrations import lazy

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

__getattr__ = lazy(__name__, _HOME)
