"""The stream header: everything that holds for all blocks."""

from __future__ import annotations

import hashlib
import json
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.errors import FormatError
from kvtc_stream.formats.coders import Coder
from kvtc_stream.formats.features import NO_FEATURES, STREAM_FEATURES, Feature, names, version_for
from kvtc_stream.formats.geometry import (
    DType,
    Geometry,
    Section,
    binary32,
    read_geometry,
    write_geometry,
)
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.plan import Plan
from kvtc_stream.formats.wire import ByteReader, ByteWriter, located

_U32 = 1 << 32
_DIGEST = 32
#: Where the length of the token digest is, a byte: after types, sizes and the calibration's digest.
_TOKENS = 4 + 12 + _DIGEST


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model a cache belongs to.

    Parameters
    ----------
    name, revision
        For people; may be empty.
    fingerprint
        32 bytes that SPEC.md defines, or empty when unknown.
    """

    name: str = ""
    revision: str = ""
    fingerprint: bytes = b""

    def __post_init__(self) -> None:
        for text in (self.name, self.revision):
            if len(text.encode()) > 0xFFFF:
                raise ValueError("a model's name and revision may have 65,535 bytes each")
        _check_digest(self.fingerprint, "the model fingerprint", optional=True)


@dataclass(frozen=True, slots=True)
class SectionScales:
    """What the values of an fp8 cache are multiplied with, one factor per layer and KV head.

    Both have ``layers * kv_heads`` entries in C order, rounded to binary32.
    """

    k_scale: tuple[float, ...]
    v_scale: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("k_scale", "v_scale"):
            scale = tuple(binary32(s) for s in getattr(self, name))
            wrong = [s for s in scale if not 0 < s < float("inf")]
            if wrong:
                raise ValueError(f"{name} must be positive and finite, found {wrong[0]}")
            object.__setattr__(self, name, scale)

    def check(self, section: Section) -> None:
        """Raise ``ValueError`` unless there is a factor for each layer and head."""
        expected = len(section.layers) * section.kv_heads
        if not len(self.k_scale) == len(self.v_scale) == expected:
            raise ValueError(
                f"scales need layers * kv_heads = {expected} entries, "
                f"found {len(self.k_scale)} for K and {len(self.v_scale)} for V"
            )


@dataclass(frozen=True)
class StreamHeader:
    """What a reader must know before the first block.

    Parameters
    ----------
    geometry
        Sections, layers, heads, RoPE.
    dtype
        Element type of the cache, and of verbatim values.
    out_dtype
        Element type to decode to; fp8 only when ``dtype`` is the same.
    scales
        One entry a section for fp8, empty otherwise.
    sinks, window
        Tokens at either end of each section that the encoder kept verbatim.
    block_tokens
        Most tokens of a data block, from 1.
    plan
        Which components are coded, and how.
    coder
        The coder that blocks prefer; each block names its own.
    calibration
        SHA-256 of the calibration's content, 32 bytes.
    model
        The model that made the cache.
    token_digest
        Digest of the token ids, 32 bytes, or empty when unknown.
    metadata
        The user's, the text of a JSON object.
    features
        What blocks may have that format 1.0 has not; ``Feature.LAYER_ERRORS`` lets them have
        ``layer_errors``. ``Feature.AXES`` is set by the geometry. Not in the header's bytes: a
        stream's preamble says it for all blocks, a page for its own.
    """

    geometry: Geometry
    dtype: DType
    out_dtype: DType
    sinks: int
    window: int
    block_tokens: int
    plan: Plan
    coder: Coder
    calibration: bytes
    scales: tuple[SectionScales, ...] = ()
    model: ModelIdentity = field(default_factory=ModelIdentity)
    token_digest: bytes = b""
    metadata: str = "{}"
    features: Feature = NO_FEATURES

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 0), ("block_tokens", 1)):
            value = getattr(self, name)
            if not least <= value < _U32:
                raise ValueError(f"{name} must be from {least} to {_U32 - 1}, found {value}")
        if self.out_dtype.is_fp8 and self.out_dtype is not self.dtype:
            raise ValueError(
                f"out_dtype {self.out_dtype.label} needs a cache of that type, "
                f"found {self.dtype.label}"
            )
        expected = len(self.geometry.sections) if self.dtype.is_fp8 else 0
        if len(self.scales) != expected:
            raise ValueError(
                f"a {self.dtype.label} cache of {len(self.geometry.sections)} sections needs "
                f"{expected} scales, found {len(self.scales)}"
            )
        for scales, section in zip(self.scales, self.geometry.sections, strict=False):
            scales.check(section)
        self.plan.check(self.geometry)
        _check_digest(self.calibration, "the calibration's digest")
        _check_digest(self.token_digest, "the token digest", optional=True)
        _check_json(self.metadata)
        if self.coder is Coder.PLANES:
            raise ValueError("PLANES codes verbatim values, found it as the preferred coder")
        if reserved := self.features & ~STREAM_FEATURES:
            raise ValueError(f"features {names(reserved)} are reserved, and not written yet")
        object.__setattr__(self, "features", self.features & ~Feature.AXES | self._implied)

    @property
    def version(self) -> tuple[int, int]:
        """The version of the format that the stream needs."""
        return version_for(self.features)

    @property
    def _implied(self) -> Feature:
        return Feature.AXES if any(s.axes for s in self.geometry.sections) else NO_FEATURES

    @cached_property
    def section_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Layers, and bytes of a verbatim token, of each section."""
        count = len(self.geometry.sections)
        layers = [len(section.layers) for section in self.geometry.sections]
        sizes = [self.verbatim_size(i, 1) for i in range(count)]
        return np.array(layers, np.int64), np.array(sizes, np.int64)

    def verbatim_size(self, section: int, tokens: int) -> int:
        """Bytes of K and V of ``tokens`` verbatim tokens before compression."""
        s = self.geometry.sections[section]
        return tokens * (s.k_width + s.v_width) * self.dtype.itemsize

    def pack(self) -> bytes:
        """The header's only encoding, without the preamble."""
        writer = ByteWriter()
        writer.pack("BBBB", self.dtype, self.out_dtype, self.coder, 0)
        writer.pack("III", self.sinks, self.window, self.block_tokens)
        writer.raw(self.calibration)
        writer.digest(self.token_digest)
        writer.text(self.model.name)
        writer.text(self.model.revision)
        writer.digest(self.model.fingerprint)
        write_geometry(self.geometry, writer)
        plan = self.plan.to_bytes()
        writer.pack("I", len(plan))
        writer.raw(plan)
        for scales in self.scales:
            writer.array("f", scales.k_scale)
            writer.array("f", scales.v_scale)
        metadata = self.metadata.encode()
        writer.pack("I", len(metadata))
        writer.raw(metadata)
        return writer.getvalue()

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of :meth:`pack`."""
        return hashlib.sha256(self.pack()).digest()

    @staticmethod
    def split(data: bytes) -> tuple[bytes, bytes]:
        """The bytes of a header with zeros for the token digest, and that, empty if it has none."""
        begin, end = _TOKENS + 1, _TOKENS + 1 + _DIGEST
        if data[_TOKENS:begin] != bytes([_DIGEST]) or len(data) < end:
            return data, b""
        return data[:begin] + bytes(_DIGEST) + data[end:], data[begin:end]

    def of_tokens(self, digest: bytes) -> StreamHeader:
        """The same header with a digest that :meth:`split` gave."""
        if not digest:
            return self
        found = copy(self)
        found.__dict__.pop("digest", None)
        object.__setattr__(found, "token_digest", digest)
        return found

    @classmethod
    def unpack(
        cls, data: bytes, limits: Limits, *, features: Feature | None = None, offset: int = 0
    ) -> StreamHeader:
        """Undo :meth:`pack`.

        Parameters
        ----------
        features
            What the preamble says; what the header itself needs if there is none.
        offset
            Where ``data`` lies, for messages.

        Raises
        ------
        FormatError
            The bytes are not a header, or say what cannot be.
        """
        reader = ByteReader(data, "header", offset)
        dtype = reader.enum(DType, "dtype")
        out_dtype = reader.enum(DType, "output dtype")
        coder = reader.enum(Coder, "coder")
        reader.zero(1, "reserved")
        sinks, window, block_tokens = reader.unpack("III", "sinks, window and block tokens")
        limits.check("max_block_tokens", block_tokens, reader.place("block tokens"))
        calibration = reader.raw(_DIGEST, "calibration digest")
        token_digest = reader.digest("token digest")
        name, revision = reader.text("model name"), reader.text("model revision")
        fingerprint = reader.digest("model fingerprint")
        geometry = read_geometry(reader, limits)
        size = reader.integer("I", "plan length")
        start = reader.position
        plan = Plan.from_bytes(reader.raw(size, "plan"), limits, offset=start)
        sections = geometry.sections if dtype.is_fp8 else ()
        scales = tuple(_read_scales(reader, section) for section in sections)
        size = reader.integer("I", "metadata length")
        limits.check("max_metadata_bytes", size, reader.place("metadata length"))
        metadata = reader.raw(size, "metadata")
        reader.expect_end()
        with located("header"):
            header = cls(
                geometry=geometry,
                dtype=dtype,
                out_dtype=out_dtype,
                sinks=sinks,
                window=window,
                block_tokens=block_tokens,
                plan=plan,
                coder=coder,
                calibration=calibration,
                scales=scales,
                model=ModelIdentity(name, revision, fingerprint),
                token_digest=token_digest,
                metadata=metadata.decode(),
                features=features or NO_FEATURES,
            )
        if header.pack() != data:
            raise FormatError(
                "header: it says the same as a shorter or differently ordered header "
                "(a rotary table repeated, unused or out of order): the writer is at fault"
            )
        if features is not None and features != header.features:
            raise FormatError(
                f"the header {'has' if header._implied else 'has no'} rotary tables with axes, the "
                f"required features are {features:#x}: the writer is at fault"
            )
        return header


def _read_scales(reader: ByteReader, section: Section) -> SectionScales:
    count = len(section.layers) * section.kv_heads
    k_scale = reader.array("f", count, "K scales")
    v_scale = reader.array("f", count, "V scales")
    with located(reader.place("scales")):
        return SectionScales(k_scale, v_scale)


def _check_digest(value: bytes, what: str, *, optional: bool = False) -> None:
    if len(value) != _DIGEST and not (optional and not value):
        raise ValueError(
            f"{what} must have {_DIGEST} bytes{' or none' if optional else ''}, found {len(value)}"
        )


def _check_json(text: str) -> None:
    try:
        text.encode()
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be the text of a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"metadata must be a JSON object, found a {type(value).__name__}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
