"""The index of all records, and the trailer, which gives its offset."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.errors import FormatError
from kvtc_stream.formats.block import Block, Role
from kvtc_stream.formats.block_errors import NO_ERRORS, BlockErrors, Measure
from kvtc_stream.formats.checksum import checksum, verify
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.record import RECORD_OVERHEAD, RecordType
from kvtc_stream.formats.wire import ByteReader

_COUNT = struct.Struct("<I")
_ENTRY = struct.Struct("<QQBBBxHxxIIQqqQQ4f")

_TRAILER = struct.Struct("<QQII")
_TRAILER_END = struct.Struct("<Q8s")
_END_MAGIC = b"KVTEND\r\n"
TRAILER_SIZE = _TRAILER.size + _TRAILER_END.size


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """Where a record is and, for a block, what it holds; all zero for other records.

    Parameters
    ----------
    sequence
        Number of the record.
    offset, length
        The whole record in the stream, in bytes.
    type
        A :class:`RecordType`, or the number of a skippable record that this reader does not know.
    section, role, start
        As in :class:`~kvtc_stream.formats.Block`.
    tokens
        How many were not cut; the following three are about them.
    first_position, last_position
        Positions of the first and the last token.
    verbatim_tokens
        How many tokens are verbatim.
    coded_bytes, verbatim_bytes
        Compressed sizes.
    errors
        As in the block.
    """

    sequence: int
    offset: int
    length: int
    type: int
    section: int = 0
    role: Role = Role.DATA
    start: int = 0
    tokens: int = 0
    first_position: int = 0
    last_position: int = 0
    verbatim_tokens: int = 0
    coded_bytes: int = 0
    verbatim_bytes: int = 0
    errors: BlockErrors = NO_ERRORS

    @property
    def is_block(self) -> bool:
        """Whether the record is a block."""
        return self.type == RecordType.BLOCK

    @classmethod
    def of(
        cls, sequence: int, offset: int, length: int, record_type: int, block: Block | None
    ) -> IndexEntry:
        """The entry of a record, a block when ``block`` is given."""
        if block is None:
            return cls(sequence, offset, length, record_type)
        kept, exact = block.kept, len(block.verbatim_tokens)
        if len(kept) < block.tokens:
            exact = sum(i in kept for i in block.verbatim_tokens)
        return cls(
            sequence,
            offset,
            length,
            record_type,
            section=block.section,
            role=block.role,
            start=block.start,
            tokens=len(kept),
            first_position=block.positions[kept[0]],
            last_position=block.positions[kept[-1]],
            verbatim_tokens=exact,
            coded_bytes=len(block.coded),
            verbatim_bytes=len(block.verbatim),
            errors=block.errors,
        )

    def differences(self, expected: IndexEntry) -> str:
        """Name the fields that differ from ``expected``, for messages."""
        return ", ".join(
            f"{f.name} is {getattr(self, f.name)}, expected {getattr(expected, f.name)}"
            for f in fields(self)
            if repr(getattr(self, f.name)) != repr(getattr(expected, f.name))
        )

    def pack(self) -> bytes:
        """The entry's bytes; its sequence number is its place in the index."""
        return _ENTRY.pack(
            self.offset,
            self.length,
            self.type,
            self.role,
            self.errors.measure,
            self.section,
            self.tokens,
            self.verbatim_tokens,
            self.start,
            self.first_position,
            self.last_position,
            self.coded_bytes,
            self.verbatim_bytes,
            *self.errors.values,
        )

    @classmethod
    def unpack(cls, found: tuple[Any, ...], sequence: int) -> IndexEntry:
        """Make an entry of an unpacked struct; raises ``ValueError``."""
        (
            offset,
            length,
            record_type,
            role,
            measure,
            section,
            tokens,
            verbatim_tokens,
            start,
            first,
            last,
            coded_bytes,
            verbatim_bytes,
            *errors,
        ) = found
        return cls(
            sequence,
            offset,
            length,
            record_type,
            section=section,
            role=Role(role),
            start=start,
            tokens=tokens,
            first_position=first,
            last_position=last,
            verbatim_tokens=verbatim_tokens,
            coded_bytes=coded_bytes,
            verbatim_bytes=verbatim_bytes,
            errors=BlockErrors(Measure(measure), *errors),
        )


class Order:
    """The order that every stream keeps: no holes between records, none between tokens.

    Writer and readers show each record's entry to :meth:`accept`, which raises ``ValueError``
    and changes nothing when the record cannot come next.

    Attributes
    ----------
    offset, sequence
        Of the next record.
    tokens
        Tokens of each section so far.
    ended
        Whether index and trailer were the last: then only a ``SUPERSEDE`` record can come.
    """

    def __init__(self, header: StreamHeader, offset: int) -> None:
        sections = len(header.geometry.sections)
        self._block_tokens = header.block_tokens
        self.offset = offset
        self.sequence = 0
        self.tokens = [0] * sections
        self.ended = False
        self._position = [-1] * sections
        self._stage = [0] * sections
        # Tokens, position and stage before the tail, of sections that have one.
        self._before_tail: dict[int, tuple[int, int, int]] = {}

    def accept(self, entry: IndexEntry) -> None:
        """Check that a record may come next and count it; a trailer follows an index record."""
        if (entry.sequence, entry.offset) != (self.sequence, self.offset):
            raise ValueError(
                f"record {entry.sequence} at byte {entry.offset} does not follow: "
                f"expected record {self.sequence} at byte {self.offset}"
            )
        if self.ended != (entry.type == RecordType.SUPERSEDE):
            raise ValueError(
                f"record {entry.sequence} has type {entry.type}: SUPERSEDE "
                f"({RecordType.SUPERSEDE.value}) follows an index and its trailer, and nothing else"
            )
        if entry.is_block:
            self._accept_block(entry)
        if entry.type == RecordType.SUPERSEDE:
            for section, (tokens, position, stage) in self._before_tail.items():
                self.tokens[section], self._position[section] = tokens, position
                self._stage[section] = stage
            self._before_tail.clear()
        self.ended = entry.type == RecordType.INDEX
        self.offset += entry.length + (TRAILER_SIZE if self.ended else 0)
        self.sequence += 1

    def accept_data(
        self,
        section: int,
        starts: NDArray[np.int64],
        tokens: NDArray[np.int64],
        firsts: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> bool:
        """Count records of data blocks of a section, which are so long, and whose tokens have the
        positions from ``firsts`` on; or none of them, if one cannot come next."""
        ends, stage = firsts + tokens, _STAGES[Role.DATA]
        edges = self.tokens[section] + np.cumsum(tokens) - tokens
        before = np.concatenate([[self._position[section]], ends[:-1] - 1])
        if (
            self.ended
            or (starts != edges).any()
            or (tokens > self._block_tokens).any()
            or (firsts <= before).any()
            or self._stage[section] > stage
        ):
            return False
        self.tokens[section] += int(tokens.sum())
        self._position[section], self._stage[section] = int(ends[-1]) - 1, stage
        self.offset += int(lengths.sum())
        self.sequence += len(starts)
        return True

    def _accept_block(self, entry: IndexEntry) -> None:
        section = entry.section
        if section >= len(self.tokens):
            raise ValueError(f"section {section} is not one of {len(self.tokens)}")
        if entry.start != self.tokens[section]:
            raise ValueError(
                f"block of section {section} starts at token {entry.start}, "
                f"expected {self.tokens[section]}"
            )
        if entry.role is Role.DATA and entry.tokens > self._block_tokens:
            raise ValueError(
                f"a data block may have {self._block_tokens} tokens, found {entry.tokens}"
            )
        if entry.first_position <= self._position[section]:
            raise ValueError(
                f"block of section {section} starts at position {entry.first_position}, "
                f"expected one after {self._position[section]}"
            )
        if entry.last_position - entry.first_position < entry.tokens - 1:
            raise ValueError(
                f"{entry.tokens} tokens cannot have positions {entry.first_position} "
                f"to {entry.last_position}"
            )
        stage = _STAGES[entry.role]
        if stage < self._stage[section]:
            raise ValueError(
                f"{entry.role.name} of section {section} comes too late: "
                "sinks, then data, then tail"
            )
        if entry.role is Role.TAIL:
            before = self.tokens[section], self._position[section], self._stage[section]
            self._before_tail.setdefault(section, before)
        self.tokens[section] += entry.tokens
        self._position[section] = entry.last_position
        self._stage[section] = stage


_STAGES = {Role.SINKS: 0, Role.DATA: 1, Role.TAIL: 2}


def live_blocks(entries: Iterable[IndexEntry]) -> list[IndexEntry]:
    """The blocks that hold a stream's tokens, without tails superseded by later records."""
    live: list[IndexEntry] = []
    for entry in entries:
        if entry.type == RecordType.SUPERSEDE:
            live = [e for e in live if e.role is not Role.TAIL]
        elif entry.is_block:
            live.append(entry)
    return live


def pack_index(count: int, entries: bytes | bytearray) -> bytes:
    """The payload of the index record from packed entries."""
    return _COUNT.pack(count) + entries


def unpack_entries(packed: bytes) -> tuple[IndexEntry, ...]:
    """Undo :meth:`IndexEntry.pack` of one entry after the other, which were checked before."""
    return tuple(IndexEntry.unpack(x, i) for i, x in enumerate(_ENTRY.iter_unpack(packed)))


def unpack_index(
    payload: bytes | memoryview, where: str, offset: int, limits: Limits
) -> list[IndexEntry]:
    """Undo :func:`pack_index`."""
    reader = ByteReader(payload, where, offset)
    count = reader.integer("I", "entry count")
    limits.check("max_records", count, reader.place("entry count"))
    expected = _COUNT.size + count * _ENTRY.size
    if len(payload) != expected:
        raise FormatError(
            f"{where}: {count} entries need {expected} bytes, found {len(payload)}: "
            "the writer is at fault"
        )
    entries: list[IndexEntry] = []
    try:
        for i, found in enumerate(_ENTRY.iter_unpack(memoryview(payload)[_COUNT.size :])):
            entries.append(IndexEntry.unpack(found, i))
    except ValueError as error:
        i = len(entries)
        place = f"{where}, entry {i} at byte {reader.position + i * _ENTRY.size}"
        raise FormatError(f"{place}: {error}") from error
    for e in entries:
        limits.check("max_record_bytes", e.length - RECORD_OVERHEAD, f"{where}, record length")
        limits.check("max_block_tokens", e.tokens, f"{where}, tokens")
        if e.is_block:
            sound = 0 <= e.verbatim_tokens <= e.tokens > 0
        else:
            sound = e == IndexEntry(e.sequence, e.offset, e.length, e.type)
        if e.length < RECORD_OVERHEAD or not sound:
            raise FormatError(f"{where}: {e} cannot be: the writer is at fault")
    if pack_index(count, b"".join(e.pack() for e in entries)) != payload:
        raise FormatError(f"{where}: reserved bytes must be zero: the writer is at fault")
    return entries


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last bytes of a stream: offset of the index, length of the stream, number of records."""

    index_offset: int
    total_size: int
    records: int

    def pack(self, seed: int) -> bytes:
        """The last ``TRAILER_SIZE`` bytes of a stream."""
        body = _TRAILER.pack(self.index_offset, self.total_size, self.records, 0)
        return body + _TRAILER_END.pack(checksum(body, seed=seed), _END_MAGIC)

    @staticmethod
    def is_present(data: bytes) -> bool:
        """Whether ``data`` ends with the end magic."""
        return data.endswith(_END_MAGIC)

    @classmethod
    def told(cls, data: bytes | memoryview) -> Trailer:
        """What ``TRAILER_SIZE`` bytes say, of which nothing is checked."""
        return cls(*_TRAILER.unpack_from(data)[:3])

    @classmethod
    def unpack(cls, data: bytes, seed: int, offset: int) -> Trailer:
        """Undo :meth:`pack`."""
        where = f"trailer at byte {offset}"
        stored, magic = _TRAILER_END.unpack_from(data, _TRAILER.size)
        if magic != _END_MAGIC:
            raise FormatError(
                f"{where}: expected it to end in {_END_MAGIC!r}, found {magic!r}: "
                "fetch the stream again"
            )
        verify(stored, data[: _TRAILER.size], seed, where)
        index_offset, total_size, records, reserved = _TRAILER.unpack_from(data)
        if reserved:
            raise FormatError(f"{where}: reserved bytes must be zero: the writer is at fault")
        return cls(index_offset, total_size, records)
