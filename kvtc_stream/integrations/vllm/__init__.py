"""vLLM: pages of its KV cache, compressed, in a store that servers share.

``KvtcConnector`` is named in ``--kv-transfer-config``; vLLM makes it. vLLM is imported when the
connector is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtc_stream.integrations.vllm.connector import KvtcConnector
    from kvtc_stream.integrations.vllm.settings import Settings

__all__ = ["KvtcConnector", "Settings"]

_HOME = {"KvtcConnector": "connector", "Settings": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
