"""Required features: bits of a stream or page that a reader must understand to read it."""

from __future__ import annotations

import enum

from kvtc_stream.errors import VersionError


class Feature(enum.IntFlag):
    """What format 1.1 adds to 1.0. The bits are those of the stream."""

    LAYER_ERRORS = 1 << 0
    AXES = 1 << 1
    ROTARY_TABLES = 1 << 2
    SECTION_KINDS = 1 << 3
    PLANES = 1 << 4
    UNKNOWN_POSITIONS = 1 << 5
    SEALED_PAGES = 1 << 6


NO_FEATURES = Feature(0)
#: What this package reads and writes; the other bits are reserved, and refused.
STREAM_FEATURES = Feature.LAYER_ERRORS | Feature.AXES | Feature.PLANES
#: What pages may have besides.
PAGE_FEATURES = STREAM_FEATURES | Feature.SEALED_PAGES


def version_for(features: Feature) -> tuple[int, int]:
    """The lowest version of the format that has these features: the one that writers state."""
    return (1, 1) if features else (1, 0)


def names(bits: int) -> str:
    """The features for people: ``"AXES and PLANES"``."""
    found = [1 << i for i in range(32) if bits >> i & 1]
    return " and ".join(Feature(bit).name or f"{bit:#x}" for bit in found)


def read_features(bits: int, version: tuple[int, int], known: Feature, where: str) -> Feature:
    """The features that ``bits`` stand for.

    Raises
    ------
    VersionError
        This reader does not know all of them, or that version of the format has none.
    """
    place = f"{where}, required features at byte 12 are {bits:#x}"
    if unknown := bits & ~int(known):  # of a flag, the complement has only bits with a name
        raise VersionError(
            f"{place}, this reader knows {known:#x} and not {names(unknown)}; "
            "read with a newer kvtc-stream"
        )
    if version < version_for(Feature(bits)):
        raise VersionError(
            f"{place}, but version {version[0]}.{version[1]} has none: the writer is at fault"
        )
    return Feature(bits)
