"""Records: numbered units after the header, each with two checksums."""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvtc_stream.errors import FormatError, VersionError
from kvtc_stream.formats.checksum import checksum, compare, verify
from kvtc_stream.formats.limits import Limits

#: What a record begins with.
RECORD_MAGIC = b"KVTR"
_FIELDS = struct.Struct("<4sBBHIIQ")
_CHECKSUM = struct.Struct("<Q")
CHECKSUM_SIZE = _CHECKSUM.size
RECORD_HEADER_SIZE = _FIELDS.size + CHECKSUM_SIZE
#: Bytes of a record beside its payload.
RECORD_OVERHEAD = RECORD_HEADER_SIZE + CHECKSUM_SIZE

_SKIPPABLE = 1


class RecordType(enum.IntEnum):
    """Record types. The numbers are those of the stream."""

    BLOCK = 1
    INDEX = 2
    SUPERSEDE = 4
    USER = 64
    ENCODER = 65
    AUTH = 66

    @property
    def skippable(self) -> bool:
        """Whether readers that do not know it may skip it."""
        return self >= RecordType.USER


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """The fixed part before a payload; ``seed`` is the seed of the payload's checksum."""

    type: int
    section: int
    sequence: int
    size: int
    seed: int

    @property
    def length(self) -> int:
        """Bytes of the whole record."""
        return RECORD_OVERHEAD + self.size

    @property
    def label(self) -> str:
        """The name of the type, for messages."""
        known = RecordType._value2member_map_.get(self.type)
        return f"type {self.type}" if known is None else str(known.name)

    @classmethod
    def unpack(
        cls, data: bytes, *, sequence: int, seed: int, offset: int, limits: Limits
    ) -> RecordHeader:
        """Read ``RECORD_HEADER_SIZE`` bytes at ``offset``, which must be record ``sequence``.

        Raises
        ------
        FormatError
            This is not that record; ``VersionError`` when a newer reader would understand it.
        """
        where = f"record {sequence} at byte {offset}"
        magic, record_type, flags, section, found, reserved, size = _FIELDS.unpack_from(data)
        if magic != RECORD_MAGIC:
            raise FormatError(
                f"{where}: expected {RECORD_MAGIC!r}, found {magic!r}: bytes are missing, added or "
                "changed; fetch the stream again"
            )
        (stored,) = _CHECKSUM.unpack_from(data, _FIELDS.size)
        verify(stored, data[: _FIELDS.size], seed, f"{where}, header")
        if found != sequence:
            raise FormatError(
                f"{where} is numbered {found}: records are missing, repeated or out of order; "
                "fetch the stream again"
            )
        record = cls(record_type, section, sequence, size, stored)
        if record_type not in RecordType._value2member_map_ and not flags & _SKIPPABLE:
            raise VersionError(
                f"{where} has the unknown type {record_type} and may not be skipped; "
                "read with a newer kvtc-stream"
            )
        known = RecordType._value2member_map_.get(record_type)
        expected = 0 if isinstance(known, RecordType) and not known.skippable else _SKIPPABLE
        if flags != expected or reserved or (section and record_type != RecordType.BLOCK):
            raise FormatError(
                f"{where} ({record.label}): flags, reserved and section are {flags}, {reserved}, "
                f"{section}, expected {expected}, 0, 0: the writer is at fault"
            )
        limits.check("max_record_bytes", size, f"{where}, payload length")
        limits.check("max_records", sequence + 1, f"{where}, number of records")
        return record

    def checksum(self, data: bytes | memoryview) -> int:
        """Compute the checksum of the payload, which is at the start of ``data``."""
        return checksum(memoryview(data)[: self.size], seed=self.seed)

    def open(
        self, data: bytes | memoryview, offset: int, expected: int | None = None
    ) -> memoryview:
        """Check what follows the header, the payload and its checksum; returns the payload.

        ``expected`` is :meth:`checksum` if somebody computed it already.
        """
        (found,) = _CHECKSUM.unpack_from(data, self.size)
        where = f"record {self.sequence} ({self.label}) at byte {offset}, payload"
        compare(found, self.checksum(data) if expected is None else expected, where)
        return memoryview(data)[: self.size]


def record_head(
    record_type: RecordType, size: int, *, sequence: int, seed: int, section: int = 0
) -> tuple[bytes, int]:
    """Pack a record's header, for ``size`` bytes of payload; returns it and the payload's seed."""
    flags = _SKIPPABLE if record_type.skippable else 0
    fields = _FIELDS.pack(RECORD_MAGIC, record_type, flags, section, sequence, 0, size)
    own = checksum(fields, seed=seed)
    return fields + _CHECKSUM.pack(own), own


def record_end(payload: Sequence[bytes | memoryview], seed: int) -> bytes:
    """Pack the checksum that follows a payload, given in pieces."""
    return _CHECKSUM.pack(checksum(*payload, seed=seed))
