"""Checksums: XXH3, 64 bits, with a seed."""

from __future__ import annotations

import enum

import xxhash

from kvtc_stream.errors import ChecksumError


class Checksum(enum.IntEnum):
    """Checksum algorithms. The numbers are those of the stream."""

    XXH3_64 = 1


def checksum(*pieces: bytes | bytearray | memoryview, seed: int = 0) -> int:
    """XXH3-64 of the bytes of ``pieces``, an unsigned 64-bit integer."""
    if len(pieces) == 1:
        return xxhash.xxh3_64_intdigest(pieces[0], seed)
    state = xxhash.xxh3_64(seed=seed)
    for piece in pieces:
        state.update(piece)
    return state.intdigest()


def verify(found: int, data: bytes | bytearray | memoryview, seed: int, what: str) -> None:
    """Raise ``ChecksumError`` unless ``found`` is the checksum of ``data``."""
    compare(found, checksum(data, seed=seed), what)


def compare(found: int, expected: int, what: str) -> None:
    """Raise ``ChecksumError`` unless the stored checksum ``found`` is the computed ``expected``."""
    if found != expected:
        raise ChecksumError(
            f"{what}: the stored checksum is {found:#018x}, the bytes give {expected:#018x}; "
            "they were changed after they were written, or belong to another stream: "
            "fetch them again"
        )
