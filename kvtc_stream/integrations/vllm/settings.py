"""What ``kv_connector_extra_config`` says, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

#: Settings that go to the codec as they are.
CODEC_SETTINGS = ("preset", "ratio", "bits_per_token", "mean_error", "error_bound")


@dataclass(frozen=True)
class Settings:
    """``kv_connector_extra_config`` of :class:`kvtc_stream.integrations.vllm.KvtcConnector`.

    Attributes
    ----------
    calibration
        Path of the calibration file.
    store
        Where pages are kept: a URL for :func:`kvtc_stream.integrations.hosts.open_store`.
    budget_gb
        The most that the store holds, in 10⁹ bytes; no limit if ``None``.
    preset, ratio, bits_per_token, mean_error
        As for :class:`kvtc_stream.Codec`.
    error_bound
        As for :class:`kvtc_stream.Codec`, 0.5 unless given. Pages have no sinks: the first token of
        a prompt, to which all others attend, is unlike those that the calibration saw, and is
        kept bit for bit because it would lose more.
    page_tokens
        Tokens of a page: a multiple of vLLM's block size; 128 or, if they are larger, a block.
    key_file
        A file with the secret that pages are sealed with. Without it the calibration's digest is
        taken, which keeps pages apart but not from somebody who has the calibration.
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

    #: Whose settings they are, and where they are given.
    reader: ClassVar[str] = "KvtcConnector"
    place: ClassVar[str] = "kv_connector_extra_config"
    #: Settings that have no meaning there.
    without: ClassVar[frozenset[str]] = frozenset()

    calibration: str | None = None
    store: str | None = None
    budget_gb: float | None = None
    preset: str = "default"
    ratio: float | None = None
    bits_per_token: float | None = None
    mean_error: float | None = None
    error_bound: float | None = 0.5
    page_tokens: int | None = None
    key_file: str | None = None
    timeout: float = 10.0
    queue_pages: int = 4096
    calibrate: str | None = None
    calibrate_tokens: int = 160_000
    calibrate_options: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Settings from JSON.

        Raises
        ------
        ValueError
            A setting is unknown, missing or of the wrong kind.
        """
        known = [field for field in fields(cls) if field.name not in cls.without]
        kinds = {field.name: str(field.type) for field in known}
        for name, value in config.items():
            if name not in kinds:
                raise ValueError(f"{cls.place} has {name!r}; {cls.reader} knows {', '.join(kinds)}")
            kind = kinds[name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = (
                (value is None and "None" in kind)
                or ("str" in kind and "Mapping" not in kind and isinstance(value, str))
                or ("float" in kind and number)
                or ("int" in kind and number and value == int(value))
                or ("Mapping" in kind and isinstance(value, Mapping))
            )
            if not fits:
                raise ValueError(f"{cls.place}: {name} is {value!r}, expected {kind}")
        found = cls(**config)
        if found.calibrate is not None:
            return found
        for name in ("calibration", "store"):
            if getattr(found, name) is None:
                way = "" if "calibrate" in cls.without else ", or calibrate to make a calibration"
                raise ValueError(f"{cls.place} lacks {name!r}; give it calibration and store{way}")
        return found

    @property
    def budget(self) -> int | None:
        """Bytes that the store may hold."""
        return None if self.budget_gb is None else int(self.budget_gb * 1e9)

    def codec_options(self) -> dict[str, Any]:
        """Keywords of :class:`kvtc_stream.Codec` that were given."""
        given = {name: getattr(self, name) for name in CODEC_SETTINGS}
        return {name: value for name, value in given.items() if value is not None}

    def key(self, digest: bytes) -> bytes:
        """The secret; ``digest`` is the calibration's.

        Raises
        ------
        ValueError
            The key file holds next to nothing.
        """
        if self.key_file is None:
            return digest
        secret = Path(self.key_file).read_bytes().strip()
        if len(secret) < 16:
            raise ValueError(
                f"{self.key_file} holds {len(secret)} bytes, expected 16 or more: write a secret "
                f"into it, for example with openssl rand -hex 32"
            )
        return secret


@dataclass(frozen=True)
class TierSettings(Settings):
    """The entry of :class:`kvtc_stream.integrations.vllm.KvtcTier` in ``secondary_tiers``.

    As :class:`kvtc_stream.integrations.vllm.Settings`, without those that make a calibration and
    without ``page_tokens``: pages are vLLM's chunks, as large as ``block_size`` of the offloading
    connector says.

    Attributes
    ----------
    threads
        Pages that are coded at a time: 4, or fewer if there are fewer cores.
    locality
        ``"LOCAL"`` or ``"REMOTE"``, what requests that choose tiers go by.
    """

    reader: ClassVar[str] = "KvtcTier"
    place: ClassVar[str] = "the secondary tier"
    without: ClassVar[frozenset[str]] = frozenset(
        {"page_tokens", "calibrate", "calibrate_tokens", "calibrate_options"}
    )

    threads: int | None = None
    locality: str | None = None
