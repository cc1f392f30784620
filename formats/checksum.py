"""The checksum of format 0.1: XXH3, 64 bits, with a seed."""

from __future__ import annotations

import enum

import xxhash

from kvtc_stream.errors import ChecksumError


class Checksum(enum.IntEnum):
    """Checksum algorithms. The numbers are those of the stream."""

    XXH3_64 = 1


def checksum(data: bytes | bytearray | memoryview, seed: int = 0) -> int:
    """XXH3-64 of ``data``, an unsigned 64-bit integer."""
    return xxhash.xxh3_64_intdigest(data, seed)


def verify(found: int, data: bytes | bytearray | memoryview, seed: int, what: str) -> None:
    """Raise ``ChecksumError`` unless ``found`` is the checksum of ``data``."""
    expected = checksum(data, seed)
    if found != expected:
        raise ChecksumError(
            f"{what}: the stored checksum is {found:#018x}, the bytes give {expected:#018x}; "
            "they were changed after they were written, or belong to another stream: "
            "fetch them again"
        )
