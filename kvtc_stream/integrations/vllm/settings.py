"""What ``kv_connector_extra_config`` says, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kvtc_stream.integrations.hosts.settings import PageSettings


@dataclass(frozen=True)
class Settings(PageSettings):
    """``kv_connector_extra_config`` of :class:`kvtc_stream.integrations.vllm.KvtcConnector`.

    As :class:`kvtc_stream.integrations.hosts.PageSettings`, and:

    With ``--tensor-parallel-size`` N, calibrations are those of the parts of the KV heads, beside
    the path that is given: of ``model.safetensors``, ``model.tpN-0.safetensors`` and so on.

    Attributes
    ----------
    page_tokens
        Tokens of a page: a multiple of vLLM's block size; 128 or, if they are larger, a block.
    timeout
        Seconds after which a load that has not come is given up, and its tokens are computed.
    queue_pages
        The most pages that wait to be stored; those beyond are not stored.
    calibrate
        Path of a calibration to write: the connector then stores nothing, and learns from the pages
        that the server computes.
    calibrate_tokens
        How many tokens that takes.
    calibrate_options
        Keywords of :class:`kvtc_stream.Calibrator`, such as ``{"second_level": 64}``.
    """

    reader: ClassVar[str] = "KvtcConnector"
    place: ClassVar[str] = "kv_connector_extra_config"

    page_tokens: int | None = None
    timeout: float = 10.0
    queue_pages: int = 4096
    calibrate: str | None = None
    calibrate_tokens: int = 160_000
    calibrate_options: Mapping[str, Any] | None = None

    def required(self) -> tuple[str, ...]:
        """Who learns a calibration has none, and stores nothing."""
        return self.needed if self.calibrate is None else ()

    def instead(self) -> str:
        """See :meth:`kvtc_stream.integrations.hosts.settings.PageSettings.instead`."""
        return ", or calibrate to make a calibration"


@dataclass(frozen=True)
class TierSettings(PageSettings):
    """The entry of :class:`kvtc_stream.integrations.vllm.KvtcTier` in ``secondary_tiers``.

    As :class:`kvtc_stream.integrations.hosts.PageSettings`, and those below. Pages are vLLM's
    chunks, as large as ``block_size`` of the offloading connector says.

    Attributes
    ----------
    timeout, queue_pages
        As for :class:`kvtc_stream.integrations.vllm.Settings`.
    threads
        Pages that are coded at a time: 4, or fewer if there are fewer cores.
    locality
        ``"LOCAL"`` or ``"REMOTE"``, what requests that choose tiers go by.
    """

    reader: ClassVar[str] = "KvtcTier"
    place: ClassVar[str] = "the secondary tier"

    timeout: float = 10.0
    queue_pages: int = 4096
    threads: int | None = None
    locality: str | None = None
