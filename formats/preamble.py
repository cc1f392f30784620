"""The preamble: magic, version, required features and length of the header."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

from kvtc_stream.errors import FormatError, VersionError
from kvtc_stream.formats.checksum import Checksum, checksum, verify
from kvtc_stream.formats.features import STREAM_FEATURES, Feature, read_features
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.limits import Limits

#: The latest version of the format that this package reads and writes; not the package's own.
FORMAT_VERSION = (1, 1)

# As in PNG: a byte above 127 that is no UTF-8, and line ends that text modes would change.
MAGIC = b"\x8bKVT\r\n\x1a\n"

_FIELDS = struct.Struct("<8sHHIIIQ")
_CHECKSUM = struct.Struct("<Q")
PREAMBLE_SIZE = _FIELDS.size + _CHECKSUM.size
#: Headers of so many bytes are kept, the latest few.
_KEPT = 1 << 16


@dataclass(frozen=True, slots=True)
class Preamble:
    """The fixed part before the header; all but its checksum is checked."""

    data: bytes
    header_size: int
    features: Feature

    @classmethod
    def unpack(cls, data: bytes, limits: Limits) -> Preamble:
        """Read the first ``PREAMBLE_SIZE`` bytes of a stream.

        Raises
        ------
        FormatError
            This is no stream; ``VersionError`` when it needs another reader.
        """
        magic, major, minor, must, _may, algorithm, size = _FIELDS.unpack_from(data)
        check_magic(magic)
        check_version(major, minor, "preamble")
        features = read_features(must, (major, minor), STREAM_FEATURES, "preamble")
        if algorithm != Checksum.XXH3_64:
            raise VersionError(
                f"preamble, checksum algorithm at byte 20 is {algorithm}, this reader knows "
                f"{Checksum.XXH3_64.value} (XXH3_64); read with a newer kvtc-stream"
            )
        limits.check("max_header_bytes", size, "preamble, header length at byte 24")
        return cls(data, size, features)

    def open(self, header: bytes, limits: Limits) -> tuple[StreamHeader, int]:
        """Verify and read the header; returns it and the seed of all other checksums."""
        (found,) = _CHECKSUM.unpack_from(self.data, _FIELDS.size)
        verify(found, self.data[: _FIELDS.size] + header, 0, "preamble and header")
        if len(header) > _KEPT:
            return _header.__wrapped__(header, limits, self.features), found
        alike, digest = StreamHeader.split(bytes(header))
        return _header(alike, limits, self.features).of_tokens(digest), found


@lru_cache(maxsize=16)
def _header(data: bytes, limits: Limits, features: Feature) -> StreamHeader:
    """Those of a codec's streams are mostly alike but for tokens, and hold nothing that changes."""
    return StreamHeader.unpack(data, limits, features=features, offset=PREAMBLE_SIZE)


def check_version(major: int, minor: int, where: str) -> None:
    """Raise ``VersionError`` unless this reader knows the major version."""
    if major != FORMAT_VERSION[0]:
        raise VersionError(
            f"{where}, version at byte 8 is {major}.{minor}, this reader knows "
            f"{FORMAT_VERSION[0]}.x; read with "
            + ("the kvtc-stream that wrote it" if major == 0 else "a newer kvtc-stream")
        )


def check_magic(data: bytes | bytearray) -> None:
    """Raise ``FormatError`` unless ``data``, which may be short, begins with the magic."""
    if not MAGIC.startswith(data[: len(MAGIC)]):
        raise FormatError(
            f"byte 0: expected {MAGIC!r}, found {bytes(data[: len(MAGIC)])!r}: this is no kvtc "
            "stream, or it was copied as text"
        )


def pack_opening(header: StreamHeader) -> tuple[bytes, int]:
    """Pack preamble and header; returns them and the seed of all other checksums."""
    body = header.pack()
    must = header.features
    fields = _FIELDS.pack(MAGIC, *header.version, must, 0, Checksum.XXH3_64, len(body))
    seed = checksum(fields + body)
    return fields + _CHECKSUM.pack(seed) + body, seed
