"""The container: values, bytes, readers and writers. SPEC.md is normative.

``parser`` turns bytes into blocks, ``file_reader`` reads them from files, ``writer`` makes streams,
``page`` single pages. The other modules are a structure each: ``preamble``, ``header`` (with
``geometry`` and ``plan``), ``record``, ``block`` (with ``positions`` and ``block_errors``),
``index``; ``table`` and ``block_run`` have many blocks at a time, as ``columns``, and ``usual`` is
the compiled code that checks them. Below them are ``wire`` (fields), ``coders``, ``checksum``,
``auth``, ``features`` and ``limits``.
"""

from kvtc_stream.formats.block import Block, Role
from kvtc_stream.formats.block_errors import BlockErrors, LayerErrors, Measure
from kvtc_stream.formats.block_run import BlockRun
from kvtc_stream.formats.checksum import Checksum
from kvtc_stream.formats.coders import Coder, compress, decompress
from kvtc_stream.formats.features import Feature
from kvtc_stream.formats.file_reader import StreamFile, StreamSizes
from kvtc_stream.formats.geometry import DType, Geometry, Rope, Section
from kvtc_stream.formats.header import ModelIdentity, SectionScales, StreamHeader
from kvtc_stream.formats.index import TRAILER_SIZE, IndexEntry
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.parser import StreamParser
from kvtc_stream.formats.plan import (
    BAND_PARAMETER_BITS,
    Band,
    PartPlan,
    Plan,
    Quantiser,
    SectionPlan,
)
from kvtc_stream.formats.preamble import FORMAT_VERSION, MAGIC
from kvtc_stream.formats.record import RecordType
from kvtc_stream.formats.table import BlockTable
from kvtc_stream.formats.writer import StreamWriter

__all__ = [
    "BAND_PARAMETER_BITS",
    "FORMAT_VERSION",
    "MAGIC",
    "TRAILER_SIZE",
    "Band",
    "Block",
    "BlockErrors",
    "BlockRun",
    "BlockTable",
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
