"""Settings that adapters of all hosts have, checked: how pages are coded, sealed and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

#: Settings that go to the codec as they are.
CODEC_SETTINGS = ("preset", "ratio", "bits_per_token", "mean_error", "error_bound")


@dataclass(frozen=True)
class PageSettings:
    """How an adapter codes, seals and keeps pages.

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
    bounded
        Whose tokens ``error_bound`` holds for: ``"all"``, or ``"first"`` for those of the first
        page of a prompt, which are the most unlike the calibration's. At 16 times pages are then a
        fifth smaller at nearly the same divergence.
    key_file
        A file with the secret that pages are sealed with. Without it the calibration's digest is
        taken, which keeps pages apart but not from somebody who has the calibration.
    """

    #: Whose settings they are, and where they are given.
    reader: ClassVar[str]
    place: ClassVar[str]
    #: Settings that have no meaning there, and that cannot be left out.
    without: ClassVar[frozenset[str]] = frozenset()
    needed: ClassVar[tuple[str, ...]] = ("calibration", "store")

    calibration: str | None = None
    store: str | None = None
    budget_gb: float | None = None
    preset: str = "default"
    ratio: float | None = None
    bits_per_token: float | None = None
    mean_error: float | None = None
    error_bound: float | None = 0.5
    bounded: str = "all"
    key_file: str | None = None

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
        found.check()
        return found

    def check(self) -> None:
        """Raise ``ValueError`` if something is missing, or none of what it may be."""
        if self.bounded not in ("all", "first"):
            raise ValueError(f"bounded must be 'all' or 'first', found {self.bounded!r}")
        for name in self.required():
            if getattr(self, name) is None:
                way = f"; give it {' and '.join(self.required())}{self.instead()}"
                raise ValueError(f"{self.place} lacks {name!r}{way}")

    def required(self) -> tuple[str, ...]:
        """Settings that cannot be left out."""
        return self.needed

    def instead(self) -> str:
        """What else could be given in place of what is needed."""
        return ""

    @property
    def budget(self) -> int | None:
        """Bytes that the store may hold."""
        return None if self.budget_gb is None else int(self.budget_gb * 1e9)

    def codec_options(self) -> dict[str, Any]:
        """Keywords of :class:`kvtc_stream.Codec` that were given."""
        given = {name: getattr(self, name) for name in CODEC_SETTINGS}
        return {name: value for name, value in given.items() if value is not None}

    def page_options(self) -> dict[str, Any]:
        """What pages depend on: the codec's options, and whose tokens are bounded."""
        own = {} if self.bounded == "all" else {"bounded": self.bounded}
        return self.codec_options() | own

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
