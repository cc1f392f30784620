"""What ``--l2-adapter`` says of the adapter and of the serde, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtc_stream.integrations.hosts.settings import PageSettings


@dataclass(frozen=True)
class ChunkSettings(PageSettings):
    """What the adapter and the serde have in common."""

    max_tokens: int = 32_768
    cpu_block_tokens: int | None = None


@dataclass(frozen=True)
class AdapterSettings(ChunkSettings):
    """``adapter_params`` of :class:`kvtc_stream.integrations.lmcache.KvtcAdapter`.

    As :class:`kvtc_stream.integrations.hosts.PageSettings`, and:

    Attributes
    ----------
    max_tokens
        LMCache does not tell where in a prompt a chunk begins. It is looked for before this
        position; later chunks are not stored.
    cpu_block_tokens
        Tokens of vLLM's blocks, if vLLM runs on CPUs: 128 unless ``--block-size`` says otherwise.
        That backend keeps K transposed, and chunks do not show it.
    timeout
        Seconds after which a chunk that waits to be stored is not stored, and one that waits to be
        loaded is missed. Less than LMCache keeps a chunk in its place for that:
        ``--l1-read-ttl-seconds``, 300 unless given.
    """

    reader: ClassVar[str] = "KvtcAdapter"
    place: ClassVar[str] = "adapter_params"

    timeout: float = 60.0


@dataclass(frozen=True)
class SerdeSettings(ChunkSettings):
    """``serde`` of an L2 adapter of LMCache, ``{"type": "kvtc", …}``.

    As :class:`kvtc_stream.integrations.hosts.PageSettings`, but for ``store`` and ``budget_gb``,
    because the adapter keeps chunks; ``ratio`` is needed, and no other target; and:

    Attributes
    ----------
    max_tokens, cpu_block_tokens
        As for :class:`kvtc_stream.integrations.lmcache.AdapterSettings`.
    max_bytes
        What every chunk takes: adapters read as many bytes as were estimated. A tenth more than
        ``ratio`` says unless given, for tokens that are kept bit for bit.
    max_workers
        Chunks that are coded at a time.
    """

    reader: ClassVar[str] = "the serde kvtc"
    place: ClassVar[str] = "serde"
    without: ClassVar[frozenset[str]] = frozenset(
        {"store", "budget_gb", "bits_per_token", "mean_error"}
    )
    needed: ClassVar[tuple[str, ...]] = ("calibration", "ratio")

    max_bytes: int | None = None
    max_workers: int = 1
