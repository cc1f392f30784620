"""The payload of uniform bands: step size, level, tiles, step classes (SPEC, "Uniform bands")."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.errors import FormatError
from kvtc_stream.formats import Block, BlockTable, Coder
from kvtc_stream.io.xxh3 import byte_at, jit, word_at

#: Most components of a tile. Larger tiles compress better: the states of lanes are 0.1 to 0.4 % of
#: one of this size. Smaller tiles keep more of a GPU busy: it decodes all tiles at the same time.
TILE_COMPONENTS = 1024
#: Step size, level, a reserved byte, components of a tile.
_HEAD = struct.Struct("<fbBH")
#: For compiled code: its size, the coder, and bits of binary32 from which on it is not finite.
_HEAD_SIZE, _RANS, _INFINITE = _HEAD.size, int(Coder.RANS), 0x7F800000


@dataclass(frozen=True)
class UniformPayload:
    """The fields of a payload, and where its tiles and classes begin.

    Attributes
    ----------
    step, level
        See the specification.
    tile_components
        Maximum number of components in a tile.
    lengths
        Bytes of each tile.
    tiles, classes
        Offsets in bytes of the first tile, and of the first part's step classes.
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
            The payload is not valid. The contents of tiles and classes are not checked.
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
        # A copy: the memory may change after the checks.
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
class UniformPayloads:
    """The fields of many payloads, as columns; see :class:`UniformPayload`.

    Attributes
    ----------
    steps
        float32 [blocks].
    levels, sizes
        int64 [blocks]: levels, and maximum number of components in a tile.
    lengths
        int64 [blocks, tiles]; 0 after a block's last tile.
    tiles, classes
        int64 [blocks], from where the payload begins.
    """

    steps: NDArray[np.float32]
    levels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    lengths: NDArray[np.int64]
    tiles: NDArray[np.int64]
    classes: NDArray[np.int64]

    @classmethod
    def parse(cls, table: BlockTable, coded: Sequence[int]) -> UniformPayloads:
        """Parse the payloads of blocks with coded tokens; as :meth:`UniformPayload.parse`."""
        rows, count = table.rows, len(table)
        places = table.addresses()[rows["piece"]] + rows["coded"]
        parts, steps = np.array(coded, np.int64), np.zeros(count, np.uint32)
        levels, sizes, counts, tiles, classes = np.zeros((5, count), np.int64)
        _parse_heads(places, rows, parts, steps, levels, sizes, counts)
        lengths = np.zeros((count, int(counts.max(initial=0))), np.int64)
        row = _parse_tiles(places, rows, parts, sizes, counts, lengths, tiles, classes)
        if row >= 0:
            UniformPayload.parse(table.block(row), coded)
            raise AssertionError("what a payload is not has an error")
        return cls(steps.view(np.float32), levels, sizes, lengths, tiles, classes)

    def __getitem__(self, some: slice) -> UniformPayloads:
        """Those of some blocks."""
        return UniformPayloads(
            self.steps[some],
            self.levels[some],
            self.sizes[some],
            self.lengths[some],
            self.tiles[some],
            self.classes[some],
        )


@jit
def _parse_heads(places, rows, parts, steps, levels, sizes, counts):  # type: ignore[no-untyped-def]
    """Fields of payloads at addresses; ``steps`` are bits, and ``counts`` [payloads] of tiles,
    which are 0 where something is not as it should be."""
    symbols = parts.sum()
    for i in range(len(rows)):
        tokens = rows[i]["tokens"] - rows[i]["verbatim"]
        if rows[i]["coder"] != _RANS or rows[i]["coded_size"] != tokens * symbols:
            continue
        length = rows[i]["coded_length"]
        if length < _HEAD_SIZE:
            continue
        word = word_at(places[i])
        steps[i] = word & np.uint64(0xFFFFFFFF)
        levels[i] = np.int8(word >> np.uint64(32) & np.uint64(0xFF))
        sizes[i] = size = np.int64(word >> np.uint64(48))
        if not 0 < steps[i] < _INFINITE or size == 0 or word >> np.uint64(40) & np.uint64(0xFF):
            continue
        count = 0
        for part in parts:
            count += (part + size - 1) // size
        if length >= _HEAD_SIZE + 4 * count + len(parts) * ((tokens + 1) // 2):
            counts[i] = count


@jit
def _parse_tiles(places, rows, parts, sizes, counts, lengths, tiles, classes):  # type: ignore[no-untyped-def]
    """The lengths of tiles, and where these and classes begin; returns the first row in which
    something is not as it should be, or -1."""
    for i in range(len(rows)):
        if not counts[i]:
            return i
        tokens = rows[i]["tokens"] - rows[i]["verbatim"]
        each = (tokens + 1) // 2
        tiles[i] = _HEAD_SIZE + 4 * counts[i]
        classes[i] = rows[i]["coded_length"] - len(parts) * each
        end = tiles[i]
        for tile in range(counts[i]):
            length = np.int64(word_at(places[i] + _HEAD_SIZE + 4 * tile - 4) >> np.uint64(32))
            if length % 2:
                return i
            lengths[i, tile] = length
            end += length
        if end != classes[i]:
            return i
        if tokens % 2:
            for part in range(1, len(parts) + 1):
                if byte_at(places[i] + classes[i] + part * each - 1) >> 4:
                    return i
    return -1


@dataclass(frozen=True)
class PartPayload:
    """One part's share of a payload: lengths of its tiles, the tiles, and its step classes."""

    lengths: NDArray[np.uint32]
    tiles: bytes
    classes: bytes


def split_parts(block: Block, coded: Sequence[int]) -> tuple[UniformPayload, list[PartPayload]]:
    """Split a block's payload by part; raises like :meth:`UniformPayload.parse`."""
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
    """Make a payload of some parts, with step size, level and tile size of ``like``."""
    lengths = [length for part in parts for length in part.lengths.tolist()]
    pieces = [part.tiles for part in parts] + [part.classes for part in parts]
    return head(like.step, like.level, lengths, like.tile_components) + b"".join(pieces)


def tile_size(coded: Sequence[int]) -> int:
    """How many components encoders put into a tile, given those of each part that are coded: as few
    as make no tile more. A device is done with a batch when it is with its largest tile."""
    if max(coded, default=0) <= TILE_COMPONENTS:
        return TILE_COMPONENTS
    return max(-(-count // -(-count // TILE_COMPONENTS)) for count in coded if count)


def head(step: float, level: int, lengths: Sequence[int], tile_components: int) -> bytes:
    """The bytes of a payload before its tiles."""
    return _HEAD.pack(step, level, 0, tile_components) + np.array(lengths, "<u4").tobytes()


def tiles(coded: int, tile_components: int) -> list[slice]:
    """For each tile of a part, the slice of the part's coded components that it holds."""
    edges = range(0, coded, tile_components)
    return [slice(i, min(i + tile_components, coded)) for i in edges]


def nibbles(tokens: int) -> int:
    """Number of bytes that the step classes of so many tokens take."""
    return (tokens + 1) // 2


def pack_classes(classes: NDArray[np.uint8]) -> bytes:
    """Pack the step classes of tokens, 0…15, two to a byte."""
    padded = np.zeros(2 * nibbles(len(classes)), np.uint8)
    padded[: len(classes)] = classes
    return (padded[::2] | padded[1::2] << 4).tobytes()


def unpack_classes(data: bytes | memoryview, tokens: int) -> NDArray[np.uint8]:
    """The inverse of :func:`pack_classes`."""
    packed = np.frombuffer(data, np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=1).ravel()[:tokens]
