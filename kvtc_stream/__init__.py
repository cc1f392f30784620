"""kvtc-stream: a streaming codec for the key/value caches of language models.

Names are loaded when first used, so that ``import kvtc_stream`` is quick and needs no CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvtc_stream.errors import (
    AuthenticationError,
    BackendUnavailableError,
    CalibrationMismatchError,
    ChecksumError,
    FormatError,
    KVTCError,
    KVTCWarning,
    LimitError,
    StateError,
    TruncatedError,
    UnsupportedError,
    VersionError,
)

if TYPE_CHECKING:
    from kvtc_stream import testing
    from kvtc_stream.calibration import Calibration
    from kvtc_stream.calibrator import Calibrator
    from kvtc_stream.codec import PRESETS, Codec
    from kvtc_stream.decoder import Decoder, KVBlock
    from kvtc_stream.edit import Piece, cat, cut, join
    from kvtc_stream.encoder import Encoder
    from kvtc_stream.files import Reader, Writer, decode, encode, open
    from kvtc_stream.formats import DType, Geometry, Limits, ModelIdentity, Plan, Rope, Section
    from kvtc_stream.interop import KVArray
    from kvtc_stream.many import PagedCache, decode_layers, decode_many, encode_many
    from kvtc_stream.pages import PageCodec
    from kvtc_stream.statistics import StreamStatistics

__version__ = "0.1.0"

_HOME = {
    "PRESETS": "codec",
    "Calibration": "calibration",
    "Calibrator": "calibrator",
    "Codec": "codec",
    "DType": "formats",
    "Decoder": "decoder",
    "Encoder": "encoder",
    "Geometry": "formats",
    "KVArray": "interop",
    "KVBlock": "decoder",
    "Limits": "formats",
    "ModelIdentity": "formats",
    "PageCodec": "pages",
    "PagedCache": "many",
    "Piece": "edit",
    "Plan": "formats",
    "Reader": "files",
    "Rope": "formats",
    "Section": "formats",
    "StreamStatistics": "statistics",
    "Writer": "files",
    "cat": "edit",
    "cut": "edit",
    "decode": "files",
    "decode_layers": "many",
    "decode_many": "many",
    "encode": "files",
    "encode_many": "many",
    "join": "edit",
    "open": "files",
}

__all__ = [
    "PRESETS",
    "AuthenticationError",
    "BackendUnavailableError",
    "Calibration",
    "CalibrationMismatchError",
    "Calibrator",
    "ChecksumError",
    "Codec",
    "DType",
    "Decoder",
    "Encoder",
    "FormatError",
    "Geometry",
    "KVArray",
    "KVBlock",
    "KVTCError",
    "KVTCWarning",
    "LimitError",
    "Limits",
    "ModelIdentity",
    "PageCodec",
    "PagedCache",
    "Piece",
    "Plan",
    "Reader",
    "Rope",
    "Section",
    "StateError",
    "StreamStatistics",
    "TruncatedError",
    "UnsupportedError",
    "VersionError",
    "Writer",
    "cat",
    "cut",
    "decode",
    "decode_layers",
    "decode_many",
    "encode",
    "encode_many",
    "join",
    "open",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("kvtc_stream.testing")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kvtc_stream.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
