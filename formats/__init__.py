"""The container: values, bytes, readers and writers. SPEC.md is normative."""

from kvtc_stream.formats.block import Block, Role
from kvtc_stream.formats.block_errors import BlockErrors, LayerErrors, Measure
from kvtc_stream.formats.checksum import Checksum
from kvtc_stream.formats.coders import Coder, compress, decompress
from kvtc_stream.formats.features import Feature
from kvtc_stream.formats.geometry import DType, Geometry, Rope, Section
from kvtc_stream.formats.header import ModelIdentity, SectionScales, StreamHeader
from kvtc_stream.formats.index import TRAILER_SIZE, IndexEntry
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.plan import (
    BAND_PARAMETER_BITS,
    Band,
    PartPlan,
    Plan,
    Quantiser,
    SectionPlan,
)
from kvtc_stream.formats.preamble import FORMAT_VERSION, MAGIC
from kvtc_stream.formats.reader import StreamFile, StreamParser, StreamSizes
from kvtc_stream.formats.record import RecordType
from kvtc_stream.formats.writer import StreamWriter

__all__ = [
    "BAND_PARAMETER_BITS",
    "FORMAT_VERSION",
    "MAGIC",
    "TRAILER_SIZE",
    "Band",
    "Block",
    "BlockErrors",
    "Checksum",
    "Coder",
    "DType",
    "Feature",
    "Geometry",
    "IndexEntry",
    "LayerErrors",
    "Limits",
    "Measure",
    "ModelIdentity",
    "PartPlan",
    "Plan",
    "Quantiser",
    "RecordType",
    "Role",
    "Rope",
    "Section",
    "SectionPlan",
    "SectionScales",
    "StreamFile",
    "StreamHeader",
    "StreamParser",
    "StreamSizes",
    "StreamWriter",
    "compress",
    "decompress",
]
