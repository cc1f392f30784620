"""The symbols of a block, for golden streams."""

from __future__ import annotations

import numpy as np

import kvtc_stream as kvtc
from kvtc_stream.coding import rans
from kvtc_stream.coding.payload import UniformPayload, nibbles, tiles, unpack_classes
from kvtc_stream.coding.uniform import UniformBands
from kvtc_stream.formats import Block, StreamHeader, decompress


def block_symbols(header: StreamHeader, block: Block, calibration: kvtc.Calibration) -> bytes:
    """See ``tests/golden/make.py``."""
    plan = header.plan.sections[block.section]
    if not block.coded_tokens:
        return b""
    if not plan.uniform:
        return decompress(block.coder, block.coded, block.coded_size)
    parts = calibration.sections[block.section].parts(plan)
    bands = []
    for part, dealt in zip(parts, plan.parts, strict=True):
        assert part.uniform is not None
        families = rans.Families(part.uniform.families.frequencies)
        bands.append(UniformBands(dealt.bands, families, part.uniform.families.ids))
    payload = UniformPayload.parse(block, [len(b.components) for b in bands])
    at, number, out = payload.tiles, 0, b""
    for i, band in enumerate(bands):
        n = block.coded_tokens
        first = payload.classes + i * nibbles(n)
        classes = unpack_classes(block.coded[first : first + nibbles(n)], n)
        ids = band.ids(payload.level)
        symbols = np.zeros((n, len(band.components)), "<i4")
        for span in tiles(len(band.components), payload.tile_components):
            size = int(payload.lengths[number])
            own = np.ascontiguousarray(ids[:, span])
            symbols[:, span] = rans.decode(block.coded[at : at + size], classes, own, band.families)
            at, number = at + size, number + 1
        out += symbols.tobytes() + classes.tobytes()
    return out
