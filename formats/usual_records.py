"""Records of many blocks at once, where these are as most are: coded as a whole, with positions
that follow one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from kvtc_stream.formats.block import HAS_LAYER_ERRORS, Block, Role
from kvtc_stream.formats.coders import Coder
from kvtc_stream.formats.features import Feature
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.index import Order
from kvtc_stream.formats.record import (
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_OVERHEAD,
    RecordType,
)
from kvtc_stream.formats.table import BLOCK_SIZE, ENTRY, HEAD

#: What the checksum of a record's header is of.
_COVERED = RECORD_HEADER_SIZE - 8
#: Larger numbers go another way.
_MOST = 1 << 32


class UsualRecords(NamedTuple):
    """Headers of records, the seeds of what comes after them, the payloads in pieces, and the
    entries of the index, one after the other."""

    heads: list[bytes]
    seeds: list[int]
    payloads: list[list[bytes | memoryview]]
    entries: bytes


def usual(block: Block) -> bool:
    """Whether a block may be one of :func:`usual_records`."""
    return (
        block.role is Role.DATA
        and not block.verbatim_tokens
        and not block.axes
        and block.cut == (0, 0)
        and type(block.positions) is range
    )


def usual_records(
    blocks: Sequence[Block], header: StreamHeader, order: Order, seed: int
) -> UsualRecords | None:
    """What writing each of the :func:`usual` blocks gives, which ``order`` then has counted;
    ``None``, and nothing was counted, if one is not as it should be, or unusual after all."""
    first, count = blocks[0], len(blocks)
    section, layers = first.section, first.layer_errors
    by_layer = 0 if layers is None else layers.layers
    if section >= len(header.geometry.sections):
        return None
    expected = len(header.geometry.sections[section].layers)
    if by_layer and (by_layer != expected or Feature.LAYER_ERRORS not in header.features):
        return None
    codes = [b"" if b.layer_errors is None else b.layer_errors.codes for b in blocks]
    if any(
        b.section != section
        or len(own) != 4 * by_layer
        or b.verbatim_coder is not Coder.STORED
        or len(b.verbatim)
        or max(b.start, b.positions[-1], b.coded_size) >= _MOST
        for b, own in zip(blocks, codes, strict=True)
    ):
        return None
    starts = np.array([b.start for b in blocks], np.int64)
    tokens = np.array([b.tokens for b in blocks], np.int64)
    firsts = np.array([b.positions[0] for b in blocks], np.int64)
    coded = np.array([len(b.coded) for b in blocks], np.int64)
    errors = np.array([b.errors.values for b in blocks], np.float32).view(np.uint32)
    measures = [b.errors.measure for b in blocks]
    sizes = BLOCK_SIZE + 4 * by_layer + coded
    offsets = order.offset + np.cumsum(sizes + RECORD_OVERHEAD) - sizes - RECORD_OVERHEAD
    sequence = order.sequence
    if not order.accept_data(section, starts, tokens, firsts, sizes + RECORD_OVERHEAD):
        return None
    head = np.zeros(count, HEAD)
    head["magic"], head["type"], head["section"] = RECORD_MAGIC, RecordType.BLOCK, section
    head["sequence"], head["size"] = sequence + np.arange(count), sizes
    head["tokens"], head["start"], head["first"] = tokens, starts, firsts
    head["measure"], head["coder"] = measures, [b.coder for b in blocks]
    head["verbatim_coder"] = Coder.STORED
    head["contents"] = HAS_LAYER_ERRORS if by_layer else 0
    head["coded_size"], head["coded_length"] = [b.coded_size for b in blocks], coded
    head["errors"] = errors
    packed = head.view((np.uint8, HEAD.itemsize))
    seeds = [xxhash.xxh3_64_intdigest(own, seed) for own in packed[:, :_COVERED].copy()]
    head["seed"] = np.array(seeds, np.uint64)
    rows = [row.tobytes() for row in packed]
    entry = np.zeros(count, ENTRY)
    entry["offset"], entry["length"] = offsets, sizes + RECORD_OVERHEAD
    entry["type"], entry["section"], entry["measure"] = RecordType.BLOCK, section, measures
    entry["tokens"], entry["start"] = tokens, starts
    entry["first_position"], entry["last_position"] = firsts, firsts + tokens - 1
    entry["coded_bytes"], entry["errors"] = coded, errors
    return UsualRecords(
        [row[:RECORD_HEADER_SIZE] for row in rows],
        seeds,
        [
            [row[RECORD_HEADER_SIZE:] + own, b.coded, b.verbatim]
            for row, own, b in zip(rows, codes, blocks, strict=True)
        ],
        entry.tobytes(),
    )
