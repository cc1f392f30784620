"""What ``serde`` of an L2 adapter says, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtc_stream.integrations.hosts.settings import PageSettings


@dataclass(frozen=True)
class SerdeSettings(PageSettings):
    """``serde`` of an L2 adapter of LMCache, ``{"type": "kvtc", …}``.

    As :class:`kvtc_stream.integrations.hosts.PageSettings`, but for ``store`` and ``budget_gb``,
    because the adapter keeps chunks; ``ratio`` is needed, and no other target; and:

    Attributes
    ----------
    max_bytes
        What every chunk takes: adapters read as many bytes as were estimated. A tenth more than
        ``ratio`` says unless given, for tokens that are kept bit for bit.
    max_tokens
        LMCache does not tell where in a prompt a chunk begins. It is looked for before this
        position; later chunks are not stored.
    cpu_block_tokens
        Tokens of vLLM's blocks, if vLLM runs on CPUs: 128 unless ``--block-size`` says otherwise.
        That backend keeps K transposed, and chunks do not show it.
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
    max_tokens: int = 32_768
    cpu_block_tokens: int | None = None
    max_workers: int = 1
