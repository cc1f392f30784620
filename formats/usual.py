"""Indexes and blocks as columns, read by compiled code if they are as usual.

What is checked is what :class:`~kvtc_stream.formats.index.IndexEntry`, ``RecordHeader`` and
``Block`` check one by one. Compiled code says only whether all is as usual; who meets something
else asks the parser of single blocks, which reads it or raises the error. Importing this takes
Numba: where nobody has imported that, an index is read entry by entry.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats.block import Role
from kvtc_stream.formats.block_errors import Measure
from kvtc_stream.formats.coders import Coder
from kvtc_stream.formats.columns import BLOCK_SIZE, ENTRY, HEAD
from kvtc_stream.formats.features import Feature
from kvtc_stream.formats.geometry import DType
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.record import (
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_OVERHEAD,
    RecordType,
)
from kvtc_stream.io.xxh3 import jit, short, word_at

#: No size in memory comes near it. Below, numbers of either sign are the same.
_HUGE = 1 << 62
#: Bits of binary32 from which on a number is not finite, or negative.
_INFINITE = 0x7F800000
_MAGIC = int.from_bytes(RECORD_MAGIC, "little")
_WIDTH, _COVERED = HEAD.itemsize, RECORD_HEADER_SIZE - 8
#: Bytes of a record after its payload.
_BEHIND = RECORD_OVERHEAD - RECORD_HEADER_SIZE
_BLOCK, _INDEX, _SUPERSEDE = map(int, (RecordType.BLOCK, RecordType.INDEX, RecordType.SUPERSEDE))
_DATA, _SINKS, _TAIL = map(int, (Role.DATA, Role.SINKS, Role.TAIL))
_STORED, _DEFLATE, _LZ4 = map(int, (Coder.STORED, Coder.DEFLATE, Coder.LZ4))
_RANS, _PLANES = int(Coder.RANS), int(Coder.PLANES)
_ROLES, _MEASURES = int(max(Role)), int(max(Measure))
_LAYER_ERRORS, _TILES = int(Feature.LAYER_ERRORS), int(Feature.PLANES)


class Facts(NamedTuple):
    """What a stream's header and the limits say of its blocks; of sections int64 [sections]."""

    layers: NDArray[np.int64]
    token_bytes: NDArray[np.int64]  # of a verbatim token
    block_tokens: int
    features: int
    bfloat16: bool
    most_records: int
    most_record_bytes: int
    most_tokens: int
    most_bytes: int

    @classmethod
    def of(cls, header: StreamHeader, limits: Limits) -> Facts:
        """Of a header."""
        most = (
            limits.max_records,
            limits.max_record_bytes,
            limits.max_block_tokens,
            limits.max_block_bytes,
        )
        return cls(
            *header.section_sizes,
            header.block_tokens,
            int(header.features),
            header.dtype is DType.BFLOAT16,
            *(min(x, _HUGE) for x in most),
        )


def usual_entries(
    packed: bytes | memoryview, header: StreamHeader, start: int, limits: Limits
) -> NDArray[Any] | None:
    """The entries of an index, :data:`ENTRY`, of a stream that was written in one go and whose
    first record is at ``start``; ``None`` if they are anything else."""
    if len(packed) % ENTRY.itemsize:
        return None
    found = np.frombuffer(packed, ENTRY)
    return found if _entries(found, start, Facts.of(header, limits)) else None


def usual_blocks(
    heads: NDArray[Any], section: int, header: StreamHeader, limits: Limits
) -> NDArray[np.bool_]:
    """Which pages of a section begin with a block that has no positions and no bitmap of its own,
    and can be, but for its errors by layer; heads with fields as :func:`block_fields`, ``size``,
    the bytes of the payload, and ``features``."""
    found: NDArray[np.bool_] = _blocks(heads, section, Facts.of(header, limits))
    return found


# --- compiled -----------------------------------------------------------------------------------
# An index without a sign needs no look at whether it counts from the end: long loops take a fourth
# of the time.


@jit
def _entries(e, start, facts):  # type: ignore[no-untyped-def]
    """Whether :func:`usual_entries` are that."""
    sections = len(facts.layers)
    ordinals, stages = np.zeros(sections, np.int64), np.zeros(sections, np.int64)
    lasts = np.full(sections, -1)
    for i in range(len(e)):
        own = e[i]
        if own["offset"] != np.uint64(start) or own["length"] >= np.uint64(_HUGE):
            return False
        length, kind, section = np.int64(own["length"]), own["type"], own["section"]
        start += length
        if length < RECORD_OVERHEAD or length > facts.most_record_bytes + RECORD_OVERHEAD:
            return False
        if own["reserved"] or own["reserved_too"]:
            return False
        if kind != _BLOCK:
            empty = own["role"] | own["measure"] | own["tokens"] | own["verbatim_tokens"] | section
            empty |= own["errors"][0] | own["errors"][1] | own["errors"][2] | own["errors"][3]
            long = own["start"] | own["coded_bytes"] | own["verbatim_bytes"]
            if empty or long or own["first_position"] or own["last_position"]:
                return False
            if kind in (0, _INDEX, _SUPERSEDE):
                return False
            continue
        tokens, first, last = np.int64(own["tokens"]), own["first_position"], own["last_position"]
        if section >= sections or own["role"] > _ROLES or not errors_can_be(own):
            return False
        if not 0 < tokens <= facts.most_tokens or own["verbatim_tokens"] > own["tokens"]:
            return False
        if own["start"] != np.uint64(ordinals[section]) or first <= lasts[section]:
            return False
        stage = 0 if own["role"] == _SINKS else 2 if own["role"] == _TAIL else 1
        # What overflows shows as negative.
        if last - first < tokens - 1 or stage < stages[section]:
            return False
        if own["role"] == _DATA and tokens > facts.block_tokens:
            return False
        ordinals[section] += tokens
        lasts[section], stages[section] = last, stage
        if ordinals[section] >= _HUGE:
            return False
    return True


@jit
def errors_can_be(x):  # type: ignore[no-untyped-def]
    """Whether ``measure`` and ``errors``, bits, can be those of a block."""
    found = x["measure"] <= _MEASURES
    for i in range(4):
        found &= x["errors"][i] < _INFINITE and (x["measure"] != 0 or x["errors"][i] == 0)
    return found


@jit
def all_errors_can_be(heads):  # type: ignore[no-untyped-def]
    """:func:`errors_can_be` of all."""
    for i in range(len(heads)):  # noqa: SIM110
        if not errors_can_be(heads[i]):
            return False
    return True


@jit
def records(data, begins, e, sequences, seed, facts, head, room, rows):  # type: ignore[no-untyped-def]
    """Which records are usual blocks, and those that the index lists; fills their rows.

    Parameters
    ----------
    data, begins
        uint8, and int64 [blocks]: where each record begins in it. All of each is there.
    e, sequences
        What the index says of them, and their numbers in the stream, int64.
    seed, facts
        The stream's seed, uint64, and :class:`Facts`.
    head, room
        :data:`~kvtc_stream.formats.columns.HEAD` [1], and its bytes: what a record begins with is
        copied there.
    rows
        :data:`~kvtc_stream.formats.columns.ROW` [blocks], 0 at first.
    """
    # Views and slices are made by who calls: here they take seconds to compile.
    usual = np.zeros(len(begins), np.bool_)
    address, own = data.ctypes.data, room.ctypes.data
    h = head[0]
    for i in range(len(begins)):
        begin, length = begins[i], np.int64(e[i]["length"])
        if length < _WIDTH + _BEHIND:
            continue
        for j in range(_WIDTH):
            room[j] = data[np.uint64(begin + j)]
        section = np.int64(h["section"])
        usual[i] = (
            h["seed"] == short(own, _COVERED, seed)
            and _is_listed(h, e[i], sequences[i], facts)
            and _block(h, section, facts.features, facts)
            and (h["contents"] == 0 or layers_can_be(data, begin + _WIDTH, facts.layers[section]))
        )
        if usual[i]:
            _fill(rows[i], h, begin + RECORD_HEADER_SIZE)
            rows[i]["checksum"] = word_at(address + begin + length - _BEHIND)
    return usual


@jit
def _is_listed(h, e, sequence, facts):  # type: ignore[no-untyped-def]
    """Whether a record's head is that of the block of an entry."""
    record = (
        h["magic"] == _MAGIC
        and h["type"] == _BLOCK
        and h["flags"] == 0
        and h["reserved"] == 0
        and h["section"] == e["section"]
        and h["sequence"] == sequence
        and sequence < facts.most_records
        and h["size"] == e["length"] - np.uint64(RECORD_OVERHEAD)
    )
    if not record:
        return False
    for i in range(4):
        if h["errors"][i] != e["errors"][i]:
            return False
    return (
        h["role"] == e["role"]
        and h["measure"] == e["measure"]
        and h["tokens"] == e["tokens"]
        and h["verbatim"] == e["verbatim_tokens"]
        and h["start"] == e["start"]
        and h["first"] == e["first_position"]
        and h["first"] + (np.int64(h["tokens"]) - 1) == e["last_position"]
        and h["coded_length"] == e["coded_bytes"]
        and h["verbatim_length"] == e["verbatim_bytes"]
    )


@jit
def _blocks(heads, section, facts):  # type: ignore[no-untyped-def]
    """See :func:`usual_blocks`."""
    found = np.empty(len(heads), np.bool_)
    for i in range(len(heads)):
        found[i] = _block(heads[i], section, np.int64(heads[i]["features"]), facts)
    return found


@jit
def _block(h, section, features, facts):  # type: ignore[no-untyped-def]
    """Whether a block has no positions and no bitmap of its own, and can be.

    ``h`` has the fields of :func:`~kvtc_stream.formats.columns.block_fields`, and ``size``, the
    bytes of the payload; ``features`` are those that are required of what holds the block.
    """
    most = np.uint64(_HUGE)
    if h["start"] >= most or h["coded_size"] >= most or h["size"] >= most:
        return False
    if h["coded_length"] >= most or h["verbatim_length"] >= most:
        return False
    tokens, verbatim = np.int64(h["tokens"]), np.int64(h["verbatim"])
    coded_size, coded = np.int64(h["coded_size"]), np.int64(h["coded_length"])
    exact_bytes, values = np.int64(h["verbatim_length"]), verbatim * facts.token_bytes[section]
    exact = verbatim == tokens
    if not 0 < tokens <= facts.most_tokens or not (exact or verbatim == 0):
        return False
    if coded_size > facts.most_bytes or values > facts.most_bytes:
        return False
    if h["role"] > _ROLES or (h["role"] != _DATA and not exact):
        return False
    if h["role"] == _DATA and tokens > facts.block_tokens:
        return False
    if h["listed"] or h["reserved_too"] or h["cut"] or (exact and (h["contents"] or coded_size)):
        return False
    # What overflows shows as negative.
    if h["first"] < 0 or h["first"] + (tokens - 1) < 0 or not errors_can_be(h):
        return False
    if h["contents"] > (features & _LAYER_ERRORS):
        return False
    symbols = h["coder"] == _RANS and coded_size > 0
    if not (symbols or _bytes_can_be(h["coder"], coded, coded_size)):
        return False
    tiles = features & _TILES != 0 and facts.bfloat16
    tiles = tiles and h["verbatim_coder"] == _PLANES and exact_bytes < values
    if not (tiles or _bytes_can_be(h["verbatim_coder"], exact_bytes, values)):
        return False
    size = BLOCK_SIZE + 4 * facts.layers[section] * np.int64(h["contents"]) + coded + exact_bytes
    return size == np.int64(h["size"])


@jit
def _bytes_can_be(coder, coded, size):  # type: ignore[no-untyped-def]
    """See :func:`kvtc_stream.formats.coders.check_coded`."""
    return (_DEFLATE <= coder <= _LZ4 and coded < size) or (coder == _STORED and coded == size)


@jit
def layers_can_be(data, at, count):  # type: ignore[no-untyped-def]
    """Whether the errors by layer that begin at a byte, of K and of V, mean and worst, can be."""
    wrong = False
    for kind in range(2):
        mean = at + 2 * kind * count
        for i in range(mean, mean + count):
            wrong |= data[np.uint64(i)] > data[np.uint64(i + count)]
    return not wrong


@jit
def _fill(row, h, payload):  # type: ignore[no-untyped-def]
    """What the fields of a usual block tell a row, whose payload begins at a byte of its piece."""
    row["start"], row["tokens"], row["first"] = h["start"], h["tokens"], h["first"]
    row["verbatim"], row["coder"] = h["verbatim"], h["coder"]
    row["coded_size"], row["coded_length"] = h["coded_size"], h["coded_length"]
    row["verbatim_coder"], row["exact_length"] = h["verbatim_coder"], h["verbatim_length"]
    row["seed"], row["payload"], row["size"] = h["seed"], payload, h["size"]
    row["exact"] = payload + row["size"] - row["exact_length"]
    row["coded"] = row["exact"] - row["coded_length"]


@jit
def fill_rows(rows, heads, payload):  # type: ignore[no-untyped-def]
    """``_fill`` of each."""
    for i in range(len(heads)):
        _fill(rows[i], heads[i], payload)


@jit
def span_slots(rows, first, last, begin, out):  # type: ignore[no-untyped-def]
    """See :meth:`~kvtc_stream.formats.table.BlockTable.span_slots`."""
    at = 0
    for i in range(len(rows)):
        front, tokens = rows[i]["front"], rows[i]["tokens"]
        start, end = rows[i]["start"] - front, tokens - rows[i]["end"]
        if last < start + end:  # which is no overflow, as a difference can be
            end = last - start
        for j in range(tokens):
            out[np.uint64(at + j)] = -1
        for j in range(max(front, first - start), end):
            out[np.uint64(at + j)] = begin + start + j - first
        at += tokens


@jit
def slots(rows, of_section, out):  # type: ignore[no-untyped-def]
    """See :meth:`~kvtc_stream.formats.table.BlockTable.slots`; whether all ordinals have one."""
    at, found = 0, True
    for i in range(len(rows)):
        front, tokens = rows[i]["front"], rows[i]["tokens"]
        begin, end = rows[i]["start"] - front, tokens - rows[i]["end"]
        there = min(end, len(of_section) - begin)
        found &= there == end or front >= end
        for j in range(tokens):
            out[np.uint64(at + j)] = -1
        for j in range(front, there):
            out[np.uint64(at + j)] = of_section[np.uint64(begin + j)]
        at += tokens
    return found


@jit
def chosen(rows, values, some, out):  # type: ignore[no-untyped-def]
    """See :meth:`~kvtc_stream.formats.table.BlockTable.chosen`."""
    at, begin, row = 0, 0, 0
    for i in some:
        while row < i:
            begin += rows[row]["tokens"]
            row += 1
        tokens = rows[i]["tokens"]
        for j in range(tokens):
            out[np.uint64(at + j)] = values[np.uint64(begin + j)]
        at += tokens


@jit
def positions(rows, out):  # type: ignore[no-untyped-def]
    """Positions of tokens, int64, of blocks that do not list them."""
    at = 0
    for i in range(len(rows)):
        first, tokens = rows[i]["first"] - at, rows[i]["tokens"]
        for j in range(at, at + tokens):
            out[np.uint64(j)] = first + j
        at += tokens
