"""kvtc-stream: a streaming codec for the key/value caches of language models.

Names are loaded when first used, so that ``import kvtc_stream`` is quick and needs no CUDA.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from importlib.machinery import ModuleSpec
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
    from kvtc_stream.calibration.calibrator import Calibrator
    from kvtc_stream.calibration.model import Calibration
    from kvtc_stream.calibration.split import SplitCalibrator
    from kvtc_stream.formats import DType, Geometry, Limits, ModelIdentity, Plan, Rope, Section
    from kvtc_stream.io.dlpack import KVArray
    from kvtc_stream.io.paged import PagedCache
    from kvtc_stream.stream.batch import decode_layers, decode_many, encode_many
    from kvtc_stream.stream.codec import PRESETS, Codec
    from kvtc_stream.stream.decoder import Decoder, KVBlock
    from kvtc_stream.stream.edit import (
        Piece,
        compact,
        concat,
        cut,
        merge_layers,
        split_layers,
        truncate,
    )
    from kvtc_stream.stream.encoder import Encoder
    from kvtc_stream.stream.opening import decode, encode, open
    from kvtc_stream.stream.pages import PageCodec
    from kvtc_stream.stream.reader import Reader
    from kvtc_stream.stream.statistics import StreamStatistics
    from kvtc_stream.stream.writer import Writer

__version__ = "0.1.0"

# Whoever wants our log lines says where they go.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOME = {
    "PRESETS": "stream.codec",
    "Calibration": "calibration.model",
    "Calibrator": "calibration.calibrator",
    "Codec": "stream.codec",
    "DType": "formats",
    "Decoder": "stream.decoder",
    "Encoder": "stream.encoder",
    "Geometry": "formats",
    "KVArray": "io.dlpack",
    "KVBlock": "stream.decoder",
    "Limits": "formats",
    "ModelIdentity": "formats",
    "PageCodec": "stream.pages",
    "PagedCache": "io.paged",
    "Piece": "stream.edit",
    "Plan": "formats",
    "Reader": "stream.reader",
    "Rope": "formats",
    "Section": "formats",
    "SplitCalibrator": "calibration.split",
    "StreamStatistics": "stream.statistics",
    "Writer": "stream.writer",
    "compact": "stream.edit",
    "concat": "stream.edit",
    "cut": "stream.edit",
    "decode": "stream.opening",
    "decode_layers": "stream.batch",
    "decode_many": "stream.batch",
    "encode": "stream.opening",
    "encode_many": "stream.batch",
    "merge_layers": "stream.edit",
    "open": "stream.opening",
    "split_layers": "stream.edit",
    "truncate": "stream.edit",
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
    "SplitCalibrator",
    "StateError",
    "StreamStatistics",
    "TruncatedError",
    "UnsupportedError",
    "VersionError",
    "Writer",
    "compact",
    "concat",
    "cut",
    "decode",
    "decode_layers",
    "decode_many",
    "encode",
    "encode_many",
    "merge_layers",
    "open",
    "split_layers",
    "testing",
    "truncate",
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


class _BesidePackage:
    """Finds ``formats`` and ``gpu`` in a checkout, where they lie beside this folder.

    An install, editable or not, has them in their place. But Python that is started in a checkout
    finds this folder before the installed package.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in (f"{__name__}.formats", f"{__name__}.gpu"):
            return None
        root = os.path.dirname(os.path.dirname(__file__))
        file = os.path.join(root, name.rpartition(".")[2], "__init__.py")
        return importlib.util.spec_from_file_location(name, file) if os.path.isfile(file) else None


if not os.path.isdir(os.path.join(os.path.dirname(__file__), "formats")):
    sys.meta_path.append(_BesidePackage)
