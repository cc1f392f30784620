"""What ``--hicache-storage-backend-extra-config`` says, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtc_stream.integrations.hosts.settings import PageSettings

#: SGLang's own settings in the same place, some of which it takes out.
SGLANG_SETTINGS = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "hicache_storage_pass_prefix_keys",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "tp_lcm_size",
    }
)


@dataclass(frozen=True)
class StorageSettings(PageSettings):
    """Settings of :class:`kvtc_stream.integrations.sglang.KvtcStorage`.

    As :class:`kvtc_stream.integrations.hosts.PageSettings`, and:

    Attributes
    ----------
    max_tokens
        Where SGLang does not tell where in a prompt a page begins, it is looked for before this
        position; later pages are kept bit for bit.
    """

    reader: ClassVar[str] = "KvtcStorage"
    place: ClassVar[str] = "hicache-storage-backend-extra-config"

    max_tokens: int = 32_768
