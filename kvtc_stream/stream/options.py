"""Keywords that travel: said once here, explained where they arrive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from kvtc_stream.formats import Limits, Rope
from kvtc_stream.io.dlpack import BackendName
from kvtc_stream.io.sources import Source


class EncoderOptions(TypedDict, total=False):
    """What is said about a stream when it is written; see :class:`kvtc_stream.Encoder`."""

    rope: Sequence[Rope | None] | Rope | None
    k_scale: Any
    v_scale: Any
    metadata: Mapping[str, Any] | None
    token_digest: bytes
    base: Source | None
    key: bytes


class ReaderOptions(TypedDict, total=False):
    """How a stream is read; see :func:`kvtc_stream.open`."""

    backend: BackendName
    limits: Limits | None
    recover: bool
    mmap: bool
    follow: float | None
    key: bytes


class SourceOptions(TypedDict, total=False):
    """How streams are read that are not decoded."""

    limits: Limits | None
    recover: bool
    key: bytes
