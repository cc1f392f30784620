"""From coefficients of a block to its coded payload and back: by bands, or uniform."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration import Part
from kvtc_stream.cpu import quantise, rans
from kvtc_stream.cpu.uniform import UniformBands
from kvtc_stream.errors import FormatError
from kvtc_stream.formats import Block, Coder, PartPlan
from kvtc_stream.formats.coders import compress, decompress

Float = NDArray[np.float32]
#: Class of a token where nothing predicts it.
_MIDDLE = 8
#: What begins the payload of uniform bands: the step, the level, a reserved byte, and components
#: of a tile.
_HEAD = struct.Struct("<fbBH")
#: Components of a tile: its lanes' final states are 0.1 to 0.4 % of it, and a GPU decodes as many
#: tiles at a time as there are.
_TILE_COMPONENTS = 1024


@dataclass(frozen=True)
class Quantised:
    """Symbols of a block's tokens, by part; and what uniform steps are made of."""

    symbols: list[Any]
    representable: NDArray[np.bool_]
    classes: Sequence[NDArray[np.uint8]] = ()
    step: float = 0.0
    level: int = 0


class BandCoding:
    """Bands with a scale and shift per token, and a coder of bytes (SPEC, "Bands")."""

    def __init__(self, plans: Sequence[PartPlan], coder: Coder) -> None:
        self._bands = [plan.bands for plan in plans]
        self._coder = coder.of_bytes

    def quantise(self, coefficients: Sequence[Float]) -> Quantised:
        """Symbols of float32 [tokens, components] a part."""
        symbols = list(map(quantise.quantise, coefficients, self._bands))
        return Quantised(symbols, np.logical_and.reduce([s.representable for s in symbols]))

    def dequantise(self, quantised: Quantised, out: Sequence[Float]) -> None:
        """Their values, into float32 [tokens, components] a part."""
        for symbols, bands, array in zip(quantised.symbols, self._bands, out, strict=True):
            quantise.dequantise(symbols, bands, array)

    def pack(self, quantised: Quantised, kept: NDArray[np.int64]) -> tuple[Coder, bytes, int]:
        """Coder, payload and coded size of the ``kept`` tokens."""
        packed = [
            quantise.pack(symbols, bands, kept)
            for symbols, bands in zip(quantised.symbols, self._bands, strict=True)
        ]
        # Segments of a kind lie side by side, so that the coder sees them as one.
        segments = [b"".join(kind) for kind in zip(*packed, strict=True)]
        return *compress(self._coder, *segments), sum(map(len, segments))

    def unpack(self, block: Block, kept: NDArray[np.int64], out: Sequence[Float]) -> None:
        """Values of a block's tokens into rows ``kept`` of ``out``; ``FormatError`` if damaged."""
        sizes = [quantise.segment_sizes(len(kept), bands) for bands in self._bands]
        needed = sum(map(sum, sizes))
        if block.coder is Coder.RANS or block.coded_size != needed:
            raise FormatError(
                f"block at token {block.start}: {block.coder.name} payload of {block.coded_size} "
                f"bytes, the plan needs {needed} of a byte coder for {len(kept)} tokens"
            )
        data = memoryview(decompress(block.coder, block.coded, block.coded_size))
        segments: list[list[memoryview]] = [[] for _ in self._bands]
        for kind in zip(*sizes, strict=True):
            for segment, size in zip(segments, kind, strict=True):
                segment.append(data[:size])
                data = data[size:]
        for bands, segment, array in zip(self._bands, segments, out, strict=True):
            quantise.dequantise(quantise.unpack(segment, len(kept), bands), bands, array, kept)


class UniformCoding:
    """Uniform bands, a step class per token, and rANS (SPEC, "Uniform bands")."""

    def __init__(self, parts: Sequence[Part], plans: Sequence[PartPlan]) -> None:
        self._bands: list[UniformBands] = []
        self._importances = []
        for part, plan in zip(parts, plans, strict=True):
            if part.uniform is None:
                raise FormatError(
                    "the plan has uniform bands, the calibration no tables for them: make a plan "
                    "from this calibration"
                )
            families = part.uniform.families
            coder = rans.Families(families.frequencies)
            self._bands.append(UniformBands(plan.bands, coder, families.ids))
            self._importances.append(part.uniform.importance)
            self._unit = part.uniform.unit

    def classify(self, coefficients: Sequence[Float]) -> list[NDArray[np.uint8]]:
        """uint8 [tokens] a part: the class of each token's step."""
        return [
            np.full(len(array), _MIDDLE, np.uint8)
            if importance is None
            else importance.classes(array)
            for array, importance in zip(coefficients, self._importances, strict=True)
        ]

    def _step(self, offset: float) -> tuple[float, int]:
        return float(np.float32(self._unit * 2 ** (offset / 4))), round(offset)

    def quantise(
        self,
        coefficients: Sequence[Float],
        classes: list[NDArray[np.uint8]],
        offset: float = 0.0,
    ) -> Quantised:
        """Symbols at ``offset`` quarter octaves above the plan's steps."""
        step, level = self._step(offset)
        found = [
            bands.quantise(array, own, step)
            for bands, array, own in zip(self._bands, coefficients, classes, strict=True)
        ]
        fits = np.logical_and.reduce([representable for _, representable in found])
        return Quantised([symbols for symbols, _ in found], fits, classes, step, level)

    def size(
        self, coefficients: Sequence[Float], classes: list[NDArray[np.uint8]], offset: float
    ) -> float:
        """About how long the payload would be."""
        step, level = self._step(offset)
        bits = sum(
            bands.bits(array, own, step, level)
            for bands, array, own in zip(self._bands, coefficients, classes, strict=True)
        )
        tokens = len(classes[0])
        tiles = sum(len(_tiles(bands, _TILE_COMPONENTS)) for bands in self._bands)
        # The lanes' final states say about half of what they take.
        lanes = min(rans.LANES, tokens)
        overhead = _HEAD.size + tiles * (4 + 2 * lanes) + len(self._bands) * _nibbles(tokens)
        return bits / 8 + overhead

    def dequantise(self, quantised: Quantised, out: Sequence[Float]) -> None:
        """Their values, into float32 [tokens, components] a part; 0 of those without."""
        rows = np.flatnonzero(quantised.representable)
        for bands, symbols, classes, array in zip(
            self._bands, quantised.symbols, quantised.classes, out, strict=True
        ):
            array[:] = 0
            bands.dequantise(symbols[rows], classes[rows], quantised.step, array, rows)

    def pack(self, quantised: Quantised, kept: NDArray[np.int64]) -> tuple[Coder, bytes, int]:
        """Coder, payload and coded size (the number of symbols) of the ``kept`` tokens."""
        if not len(kept):
            return Coder.STORED, b"", 0
        tiles = []
        for bands, symbols, classes in zip(
            self._bands, quantised.symbols, quantised.classes, strict=True
        ):
            chosen, ids = symbols[kept], bands.ids(quantised.level)
            for tile in _tiles(bands, _TILE_COMPONENTS):
                own = np.ascontiguousarray(chosen[:, tile]), np.ascontiguousarray(ids[:, tile])
                tiles.append(rans.encode(own[0], classes[kept], own[1], bands.families))
        payload = [
            _HEAD.pack(quantised.step, quantised.level, 0, _TILE_COMPONENTS),
            np.array([len(tile) for tile in tiles], "<u4").tobytes(),
            *tiles,
            *(_pack_classes(classes[kept]) for classes in quantised.classes),
        ]
        return Coder.RANS, b"".join(payload), len(kept) * self._symbols

    @property
    def _symbols(self) -> int:
        """Of one token."""
        return sum(len(bands.components) for bands in self._bands)

    def unpack(self, block: Block, kept: NDArray[np.int64], out: Sequence[Float]) -> None:
        """Values of a block's tokens into rows ``kept`` of ``out``; ``FormatError`` if damaged."""
        where = f"block at token {block.start}"
        needed = len(kept) * self._symbols
        if block.coder is not Coder.RANS or block.coded_size != needed:
            raise FormatError(
                f"{where}: {block.coder.name} payload of {block.coded_size} symbols, the plan "
                f"needs {needed} of RANS for {len(kept)} tokens"
            )
        data = memoryview(block.coded)
        if len(data) < _HEAD.size:
            raise FormatError(f"{where}: a payload of {len(data)} bytes, expected {_HEAD.size}")
        step, level, reserved, per_tile = _HEAD.unpack_from(data)
        if not (math.isfinite(step) and step > 0) or reserved or not per_tile:
            raise FormatError(
                f"{where}: step {step}, reserved byte {reserved}, {per_tile} components a tile; "
                f"expected a positive number, 0, and 1 at least: the writer is at fault"
            )
        tiles = [_tiles(bands, per_tile) for bands in self._bands]
        count = sum(map(len, tiles))
        head = _HEAD.size + 4 * count
        tail = len(self._bands) * _nibbles(len(kept))
        if len(data) < head + tail:
            raise FormatError(
                f"{where}: a payload of {len(data)} bytes, expected {head + tail} at least for "
                f"{count} tiles"
            )
        lengths = np.frombuffer(data[_HEAD.size : head], "<u4").tolist()
        if head + sum(lengths) + tail != len(data):
            raise FormatError(
                f"{where}: tiles of {sum(lengths)} bytes in a payload that has "
                f"{len(data) - head - tail} for them"
            )
        class_data = data[len(data) - tail :]
        first, ends = head, iter(np.cumsum([head, *lengths])[1:].tolist())
        for i, (bands, array) in enumerate(zip(self._bands, out, strict=True)):
            of_part = class_data[i * _nibbles(len(kept)) : (i + 1) * _nibbles(len(kept))]
            classes, ids = _unpack_classes(of_part, len(kept), where), bands.ids(level)
            symbols = np.empty((len(kept), ids.shape[1]), np.int32)
            for tile in tiles[i]:
                end = next(ends)
                own = np.ascontiguousarray(ids[:, tile])
                symbols[:, tile] = rans.decode(data[first:end], classes, own, bands.families)
                first = end
            bands.dequantise(symbols, classes, step, array, kept)


def _tiles(bands: UniformBands, per_tile: int) -> list[slice]:
    """The components of each tile, among those that are coded."""
    coded = len(bands.components)
    return [slice(i, min(i + per_tile, coded)) for i in range(0, coded, per_tile)]


def _nibbles(tokens: int) -> int:
    """Bytes of the classes of so many tokens."""
    return (tokens + 1) // 2


def _pack_classes(classes: NDArray[np.uint8]) -> bytes:
    padded = np.zeros(2 * _nibbles(len(classes)), np.uint8)
    padded[: len(classes)] = classes
    return (padded[::2] | padded[1::2] << 4).tobytes()


def _unpack_classes(data: memoryview, tokens: int, where: str) -> NDArray[np.uint8]:
    packed = np.frombuffer(data, np.uint8)
    classes = np.stack([packed & 15, packed >> 4], axis=1).ravel()
    if classes[tokens:].any():
        raise FormatError(f"{where}: the bits after its last class are not 0")
    return classes[:tokens]
