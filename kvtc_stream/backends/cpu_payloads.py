"""From coefficients of a block to its coded payload and back: by bands, or uniform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.parts import Part
from kvtc_stream.coding import bands as quantise
from kvtc_stream.coding import lattice, payload, rans
from kvtc_stream.coding.bands import split_segments
from kvtc_stream.coding.lattice import TokenGrids
from kvtc_stream.coding.rans import MIDDLE
from kvtc_stream.coding.uniform import UniformBands
from kvtc_stream.errors import FormatError
from kvtc_stream.formats import Block, Coder, PartPlan
from kvtc_stream.formats.coders import compress_beside
from kvtc_stream.io.threads import beside

Float = NDArray[np.float32]


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
        self._coder = coder
        #: No coefficient needs to be refined: scales are a token's own.
        self.strong = [0] * len(plans)

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
        return *compress_beside(self._coder, *segments), sum(map(len, segments))

    def unpack(self, block: Block, kept: NDArray[np.int64], out: Sequence[Float]) -> None:
        """Values of a block's tokens into rows ``kept`` of ``out``; ``FormatError`` if damaged."""
        sizes = [quantise.segment_sizes(len(kept), bands) for bands in self._bands]
        needed = sum(map(sum, sizes))
        if block.coder is Coder.RANS or block.coded_size != needed:
            raise FormatError(
                f"block at token {block.start}: {block.coder.name} payload of {block.coded_size} "
                f"bytes, the plan needs {needed} of a byte coder for {len(kept)} tokens"
            )
        segments = split_segments(block, sizes)
        for bands, segment, array in zip(self._bands, segments, out, strict=True):
            quantise.dequantise(quantise.unpack(segment, len(kept), bands), bands, array, kept)


class UniformCoding:
    """Uniform bands, a step class per token, and rANS (SPEC, "Uniform bands")."""

    def __init__(self, parts: Sequence[Part], plans: Sequence[PartPlan]) -> None:
        self._bands: list[UniformBands] = []
        self._importances = []
        #: Of each part: see :meth:`kvtc_stream.calibration.parts.Part.strong`.
        self.strong: list[int] = []
        for part, plan in zip(parts, plans, strict=True):
            if part.uniform is None:
                raise FormatError(
                    "the plan has uniform bands, the calibration no tables for them: make a plan "
                    "from this calibration"
                )
            families = part.uniform.families
            self._bands.append(UniformBands(plan.bands, families.coder, families.ids))
            self._importances.append(part.uniform.importance)
            self.strong.append(part.strong(self._bands[-1]))
            self._unit = part.uniform.unit

    def grids(
        self, coefficients: Sequence[Float], positions: NDArray[np.int64]
    ) -> list[TokenGrids]:
        """What decides the steps of tokens, a part."""
        found = []
        for array, bands, importance in zip(
            coefficients, self._bands, self._importances, strict=True
        ):
            wishes = (
                lattice.spread(positions) + np.float32(MIDDLE)
                if importance is None
                else importance.wishes(array)
            )
            found.append(bands.grids(array, self._unit, wishes))
        return found

    def _steps(
        self, grids: Sequence[TokenGrids], offset: float
    ) -> tuple[float, int, list[NDArray[np.uint8]]]:
        """A block's step and level, and classes of its tokens."""
        exponents = [own.exponents(offset) for own in grids]
        level, classes = lattice.settle(exponents, offset)
        return float(np.float32(self._unit * 2 ** (level / 4))), level, classes

    def quantise(
        self,
        coefficients: Sequence[Float],
        grids: Sequence[TokenGrids],
        offset: float = 0.0,
    ) -> Quantised:
        """Symbols at ``offset`` quarter octaves above the plan's steps."""
        step, level, classes = self._steps(grids, offset)
        found = [
            bands.quantise(array, own, step)
            for bands, array, own in zip(self._bands, coefficients, classes, strict=True)
        ]
        fits = np.logical_and.reduce([representable for _, representable in found])
        return Quantised([symbols for symbols, _ in found], fits, classes, step, level)

    def size(
        self,
        coefficients: Sequence[Float],
        grids: Sequence[TokenGrids],
        offset: float,
        among: int,
    ) -> float:
        """About how much of the payload of ``among`` tokens these would be; other arguments as for
        :meth:`quantise`."""
        step, level, classes = self._steps(grids, offset)
        bits = sum(
            bands.bits(array, own, step, level)
            for bands, array, own in zip(self._bands, coefficients, classes, strict=True)
        )
        return bits / 8 + self.overhead(len(classes[0]), among)

    def overhead(self, tokens: int, among: int) -> float:
        """Bytes of the payload of ``among`` tokens besides their symbols: the share of some."""
        coded = self._coded
        size = payload.tile_size(coded)
        tiles = sum(len(payload.tiles(count, size)) for count in coded)
        # The lanes' final states take 4 bytes, and say 1 byte on average.
        lanes = min(rans.LANES, among)
        every = 8 + tiles * (4 + 3 * lanes) + len(self._bands) * payload.nibbles(among)
        return every * tokens / among

    def dequantise(self, quantised: Quantised, out: Sequence[Float]) -> None:
        """Their values, into float32 [tokens, components] a part; 0 of those without."""
        rows = np.flatnonzero(quantised.representable)
        for bands, symbols, classes, array in zip(
            self._bands, quantised.symbols, quantised.classes, out, strict=True
        ):
            if len(rows) < len(array):
                array[:] = 0
                symbols, classes = symbols[rows], classes[rows]
            bands.dequantise(symbols, classes, quantised.step, array, rows)

    def pack(self, quantised: Quantised, kept: NDArray[np.int64]) -> tuple[Coder, bytes, int]:
        """Coder, payload and coded size (the number of symbols) of the ``kept`` tokens."""
        if not len(kept):
            return Coder.STORED, b"", 0
        tasks, size = [], payload.tile_size(self._coded)
        for bands, symbols, classes in zip(
            self._bands, quantised.symbols, quantised.classes, strict=True
        ):
            own, ids = classes[kept], bands.ids(quantised.level)
            for tile in payload.tiles(ids.shape[1], size):
                of_tile = symbols[:, tile], kept, own, ids[:, tile]
                tasks.append(partial(_pack_tile, *of_tile, bands.families))
        tiles = beside(tasks, len(kept) * sum(self._coded))
        pieces = [
            payload.head(quantised.step, quantised.level, list(map(len, tiles)), size),
            *tiles,
            *(payload.pack_classes(classes[kept]) for classes in quantised.classes),
        ]
        return Coder.RANS, b"".join(pieces), len(kept) * sum(self._coded)

    @property
    def _coded(self) -> list[int]:
        """Components that are coded, of each part."""
        return [len(bands.components) for bands in self._bands]

    def unpack(self, block: Block, kept: NDArray[np.int64], out: Sequence[Float]) -> None:
        """Values of a block's tokens into rows ``kept`` of ``out``; ``FormatError`` if damaged."""
        found = payload.UniformPayload.parse(block, self._coded)
        data, tokens, first = memoryview(block.coded), len(kept), found.tiles
        edges = pairwise([first, *(first + np.cumsum(found.lengths, dtype=np.int64)).tolist()])
        tasks = []
        for i, (bands, array) in enumerate(zip(self._bands, out, strict=True)):
            of_part = found.classes + i * payload.nibbles(tokens)
            classes = payload.unpack_classes(
                data[of_part : of_part + payload.nibbles(tokens)], tokens
            )
            ids = bands.ids(found.level)
            for tile in payload.tiles(ids.shape[1], found.tile_components):
                coded = data[slice(*next(edges))], classes, np.ascontiguousarray(ids[:, tile])
                tasks.append(partial(_unpack_tile, bands, tile, coded, found.step, array, kept))
        beside(tasks, tokens * sum(self._coded))


def _pack_tile(
    symbols: NDArray[np.int32],
    rows: NDArray[np.int64],
    classes: NDArray[np.uint8],
    ids: NDArray[np.uint8],
    families: rans.Families,
) -> bytes:
    """A tile of some rows of symbols; see :func:`kvtc_stream.coding.rans.encode`."""
    return rans.encode(symbols[rows], classes, np.ascontiguousarray(ids), families)


def _unpack_tile(
    bands: UniformBands,
    tile: slice,
    coded: tuple[memoryview, NDArray[np.uint8], NDArray[np.uint8]],
    step: float,
    out: Float,
    rows: NDArray[np.int64],
) -> None:
    """Values of a tile while its symbols are still in a cache; ``coded`` is it, the classes of its
    tokens, and the families of its components."""
    symbols = rans.decode(*coded, bands.families)
    bands.dequantise(symbols, coded[1], step, out, rows, tile)
