"""One block: a run of tokens of one section that decodes alone."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from kvtc_stream.errors import FormatError
from kvtc_stream.formats.block_errors import NO_ERRORS, BlockErrors, LayerErrors, Measure
from kvtc_stream.formats.coders import Coder, check_coded
from kvtc_stream.formats.features import NO_FEATURES, Feature
from kvtc_stream.formats.geometry import DType, Section
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.positions import (
    Positions,
    normal_axes,
    normal_positions,
    pack_axes,
    read_axes,
    read_positions,
)
from kvtc_stream.formats.wire import ByteReader, ByteWriter, known, located

#: What every block begins with, in the order of :meth:`Block.pack`. In one go, because readers
#: meet many blocks.
_FIELDS, _RESERVED = "IIQqBBBBBB2sQQQ4fII", bytes(2)
_HEAD = struct.Struct("<" + _FIELDS)
#: Bits that tell what else is in a block.
HAS_LAYER_ERRORS, _HAS_AXES = 1, 2


class Role(enum.IntEnum):
    """Role of a block's tokens in its section. The numbers are those of the stream."""

    DATA = 0
    SINKS = 1
    TAIL = 2


@dataclass(frozen=True, slots=True)
class Block:
    """Compressed tokens of one section, with what is needed to decode them.

    Parameters
    ----------
    section
        Index into the header's sections.
    role
        Sinks and tail are wholly verbatim.
    start
        Ordinal of the first token that was not cut, among all tokens of the section.
    tokens
        How many are stored, from 1.
    positions
        Their positions, rising, from 0 to 2**63 - 1. Neighbours become a ``range``.
    verbatim_tokens
        Indices in the block, rising, of tokens that are not coded.
    coder, coded, coded_size
        Symbols of the other tokens: compressed with ``coder``, their size before that; the number
        of symbols if it is ``RANS``.
    verbatim_coder, verbatim
        The verbatim values, K as [layers, kv_heads, n, k_dim] and then V as
        [layers, kv_heads, n, v_dim] in the header's dtype, in C order: their compressed byte
        planes, or with ``PLANES`` see :mod:`kvtc_stream.coding.verbatim`.
    errors
        What coding cost, over all tokens that are coded here.
    cut
        How many tokens at the front and at the end do not belong to the stream any more: they
        stay because the block decodes as a whole.
    layer_errors
        What coding cost each layer of the section, after the cast to the output dtype; ``None`` if
        nobody measured it. Only of blocks with coded tokens, in a stream whose header has
        ``Feature.LAYER_ERRORS``.
    axes
        Where the section's rotary tables have axes: the tokens' positions on each axis, which
        their keys were rotated by, from 0 to 2**63 - 1, in any order. An empty tuple says that
        they are the tokens' own on all axes, as those of text before any picture. Neighbours
        become a ``range``.
    """

    section: int
    role: Role
    start: int
    tokens: int
    positions: Positions
    verbatim_tokens: tuple[int, ...]
    coder: Coder
    coded: bytes | memoryview
    coded_size: int
    verbatim_coder: Coder
    verbatim: bytes | memoryview
    errors: BlockErrors = NO_ERRORS
    cut: tuple[int, int] = (0, 0)
    layer_errors: LayerErrors | None = None
    axes: tuple[Positions, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens < 1 or len(self.positions) != self.tokens:
            raise ValueError(
                f"a block needs tokens, and as many positions, "
                f"found {self.tokens} and {len(self.positions)}"
            )
        if self.section < 0 or self.start < 0:
            raise ValueError(
                f"section and start must not be negative, found {self.section}, {self.start}"
            )
        object.__setattr__(self, "positions", normal_positions(self.positions))
        if self.axes:
            object.__setattr__(self, "axes", normal_axes(self.axes, self.positions))
        coded, last = self.coded_tokens, -1
        for index in self.verbatim_tokens:
            if not last < index < self.tokens:
                raise ValueError(
                    f"verbatim tokens must rise from 0 to {self.tokens - 1}, "
                    f"found {index} after {last}"
                )
            last = index
        if self.cut != (0, 0) and (min(self.cut) < 0 or sum(self.cut) >= self.tokens):
            raise ValueError(f"{self.cut} of {self.tokens} tokens are cut, expected some to stay")
        if self.role is not Role.DATA and coded:
            raise ValueError(f"{self.role.name} must be verbatim, found {coded} coded")
        if self.layer_errors is not None and not coded:
            raise ValueError("no token is coded, yet there are errors by layer")
        if self.coded_size and not coded:
            raise ValueError(f"no token is coded, yet there are {self.coded_size} bytes of symbols")
        if self.coder is Coder.PLANES:
            raise ValueError("PLANES codes verbatim values, found it as the coder of symbols")
        if self.coder is not Coder.RANS:
            check_coded(self.coder, len(self.coded), self.coded_size, "symbols")
        elif not self.coded_size:
            raise ValueError("RANS codes at least one symbol, found none")

    @property
    def coded_tokens(self) -> int:
        """Tokens that are not verbatim."""
        return self.tokens - len(self.verbatim_tokens)

    @property
    def kept(self) -> range:
        """Indices of the tokens that were not cut."""
        return range(self.cut[0], self.tokens - self.cut[1])

    @property
    def features(self) -> Feature:
        """Required features that this block uses, besides those that follow from the header."""
        found = NO_FEATURES if self.layer_errors is None else Feature.LAYER_ERRORS
        return found | Feature.PLANES if self.verbatim_coder is Coder.PLANES else found

    def check(self, header: StreamHeader) -> None:
        """Raise ``ValueError`` unless the block fits the stream."""
        sections = len(header.geometry.sections)
        if self.section >= sections:
            raise ValueError(f"section {self.section} is not one of {sections}")
        if self.role is Role.DATA and self.tokens > header.block_tokens:
            raise ValueError(
                f"a data block may have {header.block_tokens} tokens, found {self.tokens}"
            )
        section = header.geometry.sections[self.section]
        if self.axes and len(self.axes) != section.axes:
            raise ValueError(
                f"the block has positions on {len(self.axes)} axes, the section's keys have "
                f"{section.axes}"
            )
        if self.layer_errors is not None and self.layer_errors.layers != len(section.layers):
            raise ValueError(
                f"the block has errors of {self.layer_errors.layers} layers, the section has "
                f"{len(section.layers)}"
            )
        if self.verbatim_coder is Coder.PLANES and header.dtype is not DType.BFLOAT16:
            raise ValueError(f"PLANES codes bfloat16, the stream has {header.dtype.label}")
        size = header.verbatim_size(self.section, len(self.verbatim_tokens))
        check_coded(self.verbatim_coder, len(self.verbatim), size, "verbatim values")

    def pack(self) -> list[bytes | memoryview]:
        """The payload of a block record, in pieces."""
        listed = not isinstance(self.positions, range)
        contents = _HAS_AXES if self.axes else 0
        if self.layer_errors is not None:
            contents |= HAS_LAYER_ERRORS
        fields = (
            self.tokens,
            len(self.verbatim_tokens),
            self.start,
            self.positions[0],
            self.role,
            listed,
            self.errors.measure,
            self.coder,
            self.verbatim_coder,
            contents,
            _RESERVED,
            self.coded_size,
            len(self.coded),
            len(self.verbatim),
            *self.errors.values,
            *self.cut,
        )
        try:
            head = _HEAD.pack(*fields)
        except struct.error as error:
            raise ValueError(f"{fields} do not fit their fields: {error}") from None
        partly = 0 < len(self.verbatim_tokens) < self.tokens
        if not (listed or partly or contents):  # as of most blocks
            return [head, self.coded, self.verbatim]
        writer = ByteWriter()
        writer.raw(head)
        if listed:
            writer.array("q", self.positions[1:])
        if partly:
            bitmap = bytearray(_bitmap_size(self.tokens))
            for index in self.verbatim_tokens:
                bitmap[index >> 3] |= 1 << (index & 7)
            writer.raw(bitmap)
        if self.axes:
            pack_axes(self.axes, self.positions, writer)
        if self.layer_errors is not None:
            writer.raw(self.layer_errors.codes)
        return [writer.getvalue(), self.coded, self.verbatim]

    @classmethod
    def unpack(
        cls,
        reader: ByteReader,
        section: int,
        header: StreamHeader,
        limits: Limits,
        features: Feature | None = None,
    ) -> Block:
        """Undo :meth:`pack`; raises ``FormatError`` for a payload that is not a block.

        The block's bytes are views of the reader's. ``features`` are the header's by default.
        """
        (
            tokens,
            count,
            start,
            first,
            role,
            listed,
            measure,
            coder,
            verbatim_coder,
            contents,
            reserved,
            coded_size,
            coded_length,
            verbatim_length,
            *errors,
            cut_front,
            cut_end,
        ) = reader.unpack(_FIELDS, "fields of a block")
        where = reader.where
        limits.check("max_block_tokens", tokens, f"{where}, tokens")
        limits.check("max_block_bytes", coded_size, f"{where}, size of symbols")
        if not tokens or count > tokens:
            raise FormatError(
                f"{where}: {count} of {tokens} tokens are verbatim: the writer is at fault"
            )
        role = known(Role, role, f"{where}, role")
        measure = known(Measure, measure, f"{where}, measure")
        coder = known(Coder, coder, f"{where}, coder")
        verbatim_coder = known(Coder, verbatim_coder, f"{where}, verbatim coder")
        features = header.features if features is None else features
        _check_contents(contents, reserved, verbatim_coder, features, where)
        if section >= len(header.geometry.sections):
            raise FormatError(
                f"{where}: section {section} is not one of {len(header.geometry.sections)}"
            )
        shape = header.geometry.sections[section]
        positions = read_positions(reader, listed, first, tokens)
        verbatim_tokens = _read_bitmap(reader, count, tokens)
        with located(where):
            axes, layer_errors = _read_contents(reader, contents, shape, positions)
        coded = reader.view(coded_length, "symbols")
        verbatim = reader.view(verbatim_length, "verbatim values")
        reader.expect_end()
        with located(where):
            block = cls(
                section=section,
                role=role,
                start=start,
                tokens=tokens,
                positions=positions,
                verbatim_tokens=verbatim_tokens,
                coder=coder,
                coded=coded,
                coded_size=coded_size,
                verbatim_coder=verbatim_coder,
                verbatim=verbatim,
                errors=BlockErrors(measure, *errors),
                cut=(cut_front, cut_end),
                layer_errors=layer_errors,
                axes=axes,
            )
            block.check(header)
        if listed and isinstance(block.positions, range):
            raise FormatError(f"{where}: contiguous positions are listed: the writer is at fault")
        size = header.verbatim_size(section, count)
        limits.check("max_block_bytes", size, f"{where}, size of verbatim values")
        return block


def _check_contents(
    contents: int, reserved: bytes, verbatim_coder: Coder, features: Feature, where: str
) -> None:
    """Raise unless a block has only what the stream's required features allow."""
    if verbatim_coder is Coder.PLANES and Feature.PLANES not in features:
        raise FormatError(
            f"{where}: verbatim values are coded as PLANES, which the required features have "
            "not: the writer is at fault"
        )
    allowed = HAS_LAYER_ERRORS if Feature.LAYER_ERRORS in features else 0
    allowed |= _HAS_AXES if Feature.AXES in features else 0
    if contents & ~allowed or reserved != _RESERVED:
        raise FormatError(
            f"{where}, contents are {contents:#x} where the required features allow "
            f"{allowed:#x}, and reserved {reserved.hex()} where they must be zero: the writer "
            "is at fault"
        )


def _read_contents(
    reader: ByteReader, contents: int, shape: Section, positions: Positions
) -> tuple[tuple[Positions, ...], LayerErrors | None]:
    """Positions on axes and errors by layer, where a block has them."""
    axes: tuple[Positions, ...] = ()
    layer_errors = None
    if contents & _HAS_AXES:
        axes = read_axes(reader, normal_positions(positions), shape.axes)
    if contents & HAS_LAYER_ERRORS:
        layer_errors = LayerErrors(reader.raw(4 * len(shape.layers), "errors by layer"))
    return axes, layer_errors


def _bitmap_size(tokens: int) -> int:
    return -(-tokens // 8)


def _read_bitmap(reader: ByteReader, count: int, tokens: int) -> tuple[int, ...]:
    if count in (0, tokens):
        return tuple(range(count))
    place = reader.place("verbatim tokens")
    bitmap = reader.raw(_bitmap_size(tokens), "verbatim tokens")
    found = tuple(i for i in range(8 * len(bitmap)) if bitmap[i >> 3] >> (i & 7) & 1)
    if len(found) != count or found[-1] >= tokens:
        raise FormatError(
            f"{place}: expected {count} bits among {tokens} set, found {len(found)}, "
            f"the last {found[-1] if found else None}: the writer is at fault"
        )
    return found
