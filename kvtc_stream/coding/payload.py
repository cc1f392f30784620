"""The payload of uniform bands: step, level, tiles and classes (SPEC, "Uniform bands")."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.errors import FormatError
from kvtc_stream.formats import Block, Coder

#: Components of a tile: its lanes' final states are 0.1 to 0.4 % of it, and a GPU decodes as many
#: tiles at a time as there are.
TILE_COMPONENTS = 1024
#: The step, the level, a reserved byte, components of a tile.
_HEAD = struct.Struct("<fbBH")


@dataclass(frozen=True)
class UniformPayload:
    """Where things are in a payload.

    Attributes
    ----------
    step, level
        See the specification.
    tile_components
        Most components of a tile.
    lengths
        Bytes of each tile.
    tiles, classes
        Where the first tile begins, and the classes of the first part.
    """

    step: float
    level: int
    tile_components: int
    lengths: NDArray[np.uint32]
    tiles: int
    classes: int

    @classmethod
    def parse(cls, block: Block, coded: Sequence[int]) -> UniformPayload:
        """Parse a block's payload; ``coded[i]`` is the number of coded components of part i.

        Raises
        ------
        FormatError
            If there is anything that no writer makes, tiles and classes themselves apart.
        """
        where, tokens = f"block at token {block.start}", block.coded_tokens
        needed = tokens * sum(coded)
        if block.coder is not Coder.RANS or block.coded_size != needed:
            raise FormatError(
                f"{where}: {block.coder.name} payload of {block.coded_size} symbols, the plan "
                f"needs {needed} of RANS for {tokens} tokens"
            )
        size = len(block.coded)
        if size < _HEAD.size:
            raise FormatError(f"{where}: a payload of {size} bytes, expected {_HEAD.size} at least")
        step, level, reserved, per_tile = _HEAD.unpack_from(block.coded)
        if not (math.isfinite(step) and step > 0) or reserved or not per_tile:
            raise FormatError(
                f"{where}: step {step}, reserved byte {reserved}, {per_tile} components a tile; "
                f"expected a positive number, 0, and 1 at least: the writer is at fault"
            )
        count = sum(-(-c // per_tile) for c in coded)
        head, tail = _HEAD.size + 4 * count, len(coded) * nibbles(tokens)
        if size < head + tail:
            raise FormatError(
                f"{where}: a payload of {size} bytes, expected {head + tail} at least for {count} "
                f"tiles"
            )
        # A copy, so that what is checked is what counts whoever changes the memory.
        lengths = np.frombuffer(block.coded, "<u4", count, _HEAD.size).copy()
        total = int(lengths.sum(dtype=np.uint64))
        if (lengths % 2).any():
            raise FormatError(f"{where}: a tile of an odd number of bytes: the writer is at fault")
        if head + total + tail != size:
            raise FormatError(
                f"{where}: tiles of {total} bytes in a payload that has {size - head - tail} for "
                f"them"
            )
        last = memoryview(block.coded)[size - tail :][nibbles(tokens) - 1 :: nibbles(tokens)]
        if tokens % 2 and any(byte >> 4 for byte in last):
            raise FormatError(
                f"{where}: the bits after a part's last class are not 0: the writer is at fault"
            )
        return cls(step, level, per_tile, lengths, head, size - tail)


@dataclass(frozen=True)
class PartPayload:
    """What a payload holds of one part: lengths of its tiles, the tiles, and its classes."""

    lengths: NDArray[np.uint32]
    tiles: bytes
    classes: bytes


def split_parts(block: Block, coded: Sequence[int]) -> tuple[UniformPayload, list[PartPayload]]:
    """What a block's payload holds of each part; raises as :meth:`UniformPayload.parse`."""
    found = UniformPayload.parse(block, coded)
    edges = np.cumsum([0, *(len(tiles(count, found.tile_components)) for count in coded)])
    places = np.concatenate([[0], np.cumsum(found.lengths, dtype=np.int64)]) + found.tiles
    size = nibbles(block.coded_tokens)
    return found, [
        PartPayload(
            found.lengths[first:last],
            bytes(block.coded[places[first] : places[last]]),
            bytes(block.coded[found.classes + i * size : found.classes + (i + 1) * size]),
        )
        for i, (first, last) in enumerate(pairwise(edges.tolist()))
    ]


def join_parts(like: UniformPayload, parts: Sequence[PartPayload]) -> bytes:
    """A payload of some parts, with the step and the tiles' size of another one."""
    lengths = [length for part in parts for length in part.lengths.tolist()]
    pieces = [part.tiles for part in parts] + [part.classes for part in parts]
    return head(like.step, like.level, lengths, like.tile_components) + b"".join(pieces)


def head(
    step: float, level: int, lengths: Sequence[int], tile_components: int = TILE_COMPONENTS
) -> bytes:
    """What a payload begins with, before its tiles."""
    return _HEAD.pack(step, level, 0, tile_components) + np.array(lengths, "<u4").tobytes()


def tiles(coded: int, tile_components: int) -> list[slice]:
    """The components of each tile of a part, among those that are coded."""
    edges = range(0, coded, tile_components)
    return [slice(i, min(i + tile_components, coded)) for i in edges]


def nibbles(tokens: int) -> int:
    """Bytes of the classes of so many tokens."""
    return (tokens + 1) // 2


def pack_classes(classes: NDArray[np.uint8]) -> bytes:
    """Classes 0…15 of tokens, two to a byte."""
    padded = np.zeros(2 * nibbles(len(classes)), np.uint8)
    padded[: len(classes)] = classes
    return (padded[::2] | padded[1::2] << 4).tobytes()


def unpack_classes(data: bytes | memoryview, tokens: int) -> NDArray[np.uint8]:
    """Undo :func:`pack_classes`."""
    packed = np.frombuffer(data, np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=1).ravel()[:tokens]
