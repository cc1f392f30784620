"""Many blocks at a time, as columns instead of an object each.

What is checked is what :class:`~kvtc_stream.formats.index.IndexEntry`, ``RecordHeader`` and
``Block`` check one by one. These functions say only whether all is as usual; who meets something
else asks the parser of single blocks, which reads it or raises the error.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtc_stream.formats.block import Block, Role
from kvtc_stream.formats.block_errors import Measure
from kvtc_stream.formats.coders import Coder
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
from kvtc_stream.io.threads import begin


def layout(itemsize: int, /, **fields: tuple[int, Any]) -> np.dtype[Any]:
    """A structured dtype of ``itemsize`` bytes, from offset and type of each field."""
    return np.dtype(
        {
            "names": list(fields),
            "offsets": [offset for offset, _ in fields.values()],
            "formats": [form for _, form in fields.values()],
            "itemsize": itemsize,
        }
    )


#: An entry of the index. Errors are compared as bits.
ENTRY = layout(
    88,
    offset=(0, "<u8"),
    length=(8, "<u8"),
    type=(16, "u1"),
    role=(17, "u1"),
    measure=(18, "u1"),
    reserved=(19, "u1"),
    section=(20, "<u2"),
    reserved_too=(22, "<u2"),
    tokens=(24, "<u4"),
    verbatim_tokens=(28, "<u4"),
    start=(32, "<u8"),
    first_position=(40, "<i8"),
    last_position=(48, "<i8"),
    coded_bytes=(56, "<u8"),
    verbatim_bytes=(64, "<u8"),
    errors=(72, ("<u4", (4,))),
)
#: Bytes of a block's fields.
BLOCK_SIZE = 80


def block_fields(at: int) -> dict[str, tuple[int, Any]]:
    """The fields that every block begins with, ``at`` bytes from where a head does."""
    return {
        "tokens": (at, "<u4"),
        "verbatim": (at + 4, "<u4"),
        "start": (at + 8, "<u8"),
        "first": (at + 16, "<i8"),
        "role": (at + 24, "u1"),
        "listed": (at + 25, "u1"),
        "measure": (at + 26, "u1"),
        "coder": (at + 27, "u1"),
        "verbatim_coder": (at + 28, "u1"),
        "contents": (at + 29, "u1"),
        "reserved_too": (at + 30, "<u2"),
        "coded_size": (at + 32, "<u8"),
        "coded_length": (at + 40, "<u8"),
        "verbatim_length": (at + 48, "<u8"),
        "errors": (at + 56, ("<u4", (4,))),
        "cut": (at + 72, "<u8"),
    }


#: What a block's record begins with: the record's header, and the fields of the block.
HEAD = layout(
    RECORD_HEADER_SIZE + BLOCK_SIZE,
    magic=(0, "S4"),
    type=(4, "u1"),
    flags=(5, "u1"),
    section=(6, "<u2"),
    sequence=(8, "<u4"),
    reserved=(12, "<u4"),
    size=(16, "<u8"),
    seed=(24, "<u8"),
    **block_fields(RECORD_HEADER_SIZE),
)
#: A row of :class:`BlockTable`.
ROW = np.dtype(
    [
        (name, np.int64)
        for name in (
            "piece",  # which of the buffers holds the block
            "start",  # ordinal of the first token that was not cut
            "tokens",
            "first",  # position of the first token
            "front",  # tokens that are cut at the front
            "end",  # and at the end
            "verbatim",  # how many tokens are verbatim
            "coder",
            "coded",  # where the symbols begin
            "coded_length",
            "coded_size",
            "verbatim_coder",
            "exact",  # where the verbatim values begin
            "exact_length",
            "payload",  # where what the checksum covers begins
            "size",  # and its bytes
        )
    ]
    + [("seed", np.uint64), ("checksum", np.uint64)]
)
#: Bits of binary32 from which on a number is not finite, or negative.
_INFINITE = 0x7F800000
#: No size in memory comes near it.
_HUGE = np.uint64(1 << 62)
# Plain integers: to look up a member of a registry takes longer than to compare a column.
_DATA, _SINKS, _TAIL = int(Role.DATA), int(Role.SINKS), int(Role.TAIL)
_STORED, _DEFLATE, _LZ4 = int(Coder.STORED), int(Coder.DEFLATE), int(Coder.LZ4)
_RANS, _PLANES = int(Coder.RANS), int(Coder.PLANES)
_ROLES, _MEASURES = int(max(Role)), int(max(Measure))
_LAYER_ERRORS, _PLANES_FEATURE = np.uint32(Feature.LAYER_ERRORS), np.uint32(Feature.PLANES)
_STAGES = np.array([1, 0, 2])  # DATA, SINKS, TAIL
#: Which types a record before the index does not have.
_NOT_BETWEEN = np.zeros(256, np.bool_)
_NOT_BETWEEN[[0, RecordType.INDEX, RecordType.SUPERSEDE]] = True


def usual_entries(
    packed: bytes | memoryview, header: StreamHeader, start: int, limits: Limits
) -> NDArray[Any] | None:
    """The entries of an index, :data:`ENTRY`, of a stream that was written in one go and whose
    first record is at ``start``; ``None`` if they are anything else."""
    if len(packed) % ENTRY.itemsize:
        return None
    e = np.frombuffer(packed, ENTRY)
    block = e["type"] == RecordType.BLOCK
    other = e[~block]
    if len(other):
        zeros = other.copy()
        for name in ("offset", "length", "type"):
            zeros[name] = 0
        if any(zeros.tobytes()) or _NOT_BETWEEN[other["type"]].any():
            return None
    if not _sound(e, block, limits) or not _follow(e, start):
        return None
    for section in np.unique(e["section"][block]).tolist():
        if section >= len(header.geometry.sections):
            return None
        if not _in_order(e[block & (e["section"] == section)], header.block_tokens):
            return None
    return e


def _sound(e: NDArray[Any], block: NDArray[np.bool_], limits: Limits) -> bool:
    """Whether each entry by itself can be."""
    least, most = RECORD_OVERHEAD, limits.max_record_bytes + RECORD_OVERHEAD
    own = e[block]
    return bool(
        ((e["length"] >= least) & (e["length"] <= most)).all()
        and not e["reserved"].any()
        and not e["reserved_too"].any()
        and (own["role"] <= _ROLES).all()
        and errors_can_be(own).all()
        and (own["tokens"] <= limits.max_block_tokens).all()
        and (own["tokens"] > 0).all()
        and (own["verbatim_tokens"] <= own["tokens"]).all()
        and (own["start"] < _HUGE).all()
    )


def errors_can_be(x: NDArray[Any]) -> NDArray[np.bool_]:
    """Which errors can be those of a block, of fields ``measure`` and ``errors``."""
    known = (x["measure"] <= _MEASURES) & ((x["measure"] != 0) | ~x["errors"].any(axis=1))
    can_be: NDArray[np.bool_] = known & (x["errors"] < _INFINITE).all(axis=1)
    return can_be


def _follow(e: NDArray[Any], start: int) -> bool:
    """Whether records lie one after the other."""
    if not len(e):
        return True
    ends = start + np.cumsum(e["length"])
    return bool(e["offset"][0] == start and (e["offset"][1:] == ends[:-1]).all())


def _in_order(e: NDArray[Any], block_tokens: int) -> bool:
    """Whether blocks of one section hold its tokens in order."""
    ends = np.cumsum(e["tokens"], dtype=np.uint64)
    span = e["last_position"] - e["first_position"]  # overflow shows as negative
    stages = _STAGES[e["role"]]
    return bool(
        e["start"][0] == 0
        and (e["start"][1:] == ends[:-1]).all()
        and (e["first_position"] >= 0).all()
        and (e["first_position"][1:] > e["last_position"][:-1]).all()
        and (span >= e["tokens"].astype(np.int64) - 1).all()
        and (e["tokens"][e["role"] == Role.DATA] <= block_tokens).all()
        and (stages[1:] >= stages[:-1]).all()
    )


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Blocks of one section.

    Attributes
    ----------
    pieces
        The buffers that hold the blocks. Offsets of rows count in their piece.
    rows
        [blocks] of :data:`ROW`.
    special
        Blocks about which columns do not tell all, by row: with listed positions or some verbatim
        tokens.
    unverified
        Whether payloads were not compared with their checksums yet: see :meth:`verify`.
    """

    pieces: tuple[memoryview, ...]
    rows: NDArray[Any]
    special: Mapping[int, Block]
    unverified: bool
    _parse: Callable[[int, int | None], Block]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> BlockTable:
        """A table of blocks that were parsed, and verified, already."""
        rows = np.zeros(len(blocks), ROW)
        pieces: list[memoryview] = []
        special = {}
        for i, block in enumerate(blocks):
            fill(rows[i], block)
            rows[i]["piece"] = len(pieces)
            if len(block.verbatim) and len(block.coded):
                pieces.append(memoryview(b"".join((block.coded, block.verbatim))))
                rows[i]["exact"] = len(block.coded)
            else:
                pieces.append(memoryview(block.coded if len(block.coded) else block.verbatim))
            if is_special(block):
                special[i] = block
        return cls(tuple(pieces), rows, special, False, lambda i, _: blocks[i])

    @classmethod
    def concat(cls, tables: Sequence[BlockTable]) -> BlockTable:
        """The blocks of several tables. Where some are verified, the others are now."""
        if len(tables) == 1:
            return tables[0]
        unverified = all(t.unverified for t in tables)
        for table in tables if not unverified else ():
            table.verify()
        rows = np.frombuffer(bytearray(b"".join(t.rows.tobytes() for t in tables)), ROW)
        firsts = [0]
        pieces: list[memoryview] = []
        special: dict[int, Block] = {}
        for table in tables:
            rows["piece"][firsts[-1] : firsts[-1] + len(table)] += len(pieces)
            pieces += table.pieces
            special |= {firsts[-1] + i: block for i, block in table.special.items()}
            firsts.append(firsts[-1] + len(table))

        def parse(row: int, found: int | None) -> Block:
            owner = bisect_right(firsts, row) - 1
            return tables[owner]._parse(row - firsts[owner], found)

        return cls(tuple(pieces), rows, special, unverified, parse)

    def within(self, context: Callable[[], AbstractContextManager[None]]) -> BlockTable:
        """The same blocks, whose errors are raised in a context."""

        def parse(row: int, found: int | None) -> Block:
            with context():
                return self._parse(row, found)

        return replace(self, _parse=parse)

    def block(self, row: int, *, verified: bool = False) -> Block:
        """One block; its payload is compared with its checksum unless it was ``verified``."""
        if row in self.special:
            return self.special[row]
        return self._parse(row, int(self.rows["checksum"][row]) if verified else None)

    def bytes_of(self, row: int, begin: str, length: str) -> memoryview:
        """Some bytes of a block, by the names of the columns that say where they are."""
        own = self.rows[row]
        at = int(own[begin])
        return self.pieces[int(own["piece"])][at : at + int(own[length])]

    def gathered(self, offsets: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        """uint8 [blocks, size]: bytes of each block's piece from ``offsets`` on; where that ends
        before, its last byte again."""
        if len(self.pieces) > 1:  # often a piece a block
            starts, owners = offsets.tolist(), self.rows["piece"].tolist()
            parts = [self.pieces[p][a : a + size] for p, a in zip(owners, starts, strict=True)]
            if all(len(part) == size for part in parts):
                return np.frombuffer(b"".join(parts), np.uint8).reshape(len(self), size)
        out = np.empty((len(self), size), np.uint8)
        columns = np.arange(size)
        for piece in np.unique(self.rows["piece"]).tolist():
            own = np.flatnonzero(self.rows["piece"] == piece)
            data = np.frombuffer(self.pieces[piece], np.uint8)
            out[own] = data[np.minimum(offsets[own, None] + columns, len(data) - 1)]
        return out

    def taken(self, which: NDArray[np.int64]) -> BlockTable:
        """Some of the blocks, by row."""
        places = {row: i for i, row in enumerate(which.tolist())} if self.special else {}
        special = {places[i]: block for i, block in self.special.items() if i in places}
        return BlockTable(
            self.pieces,
            self.rows[which],
            special,
            self.unverified,
            lambda row, found: self._parse(int(which[row]), found),
        )

    def verify(self) -> None:
        """Compare payloads with their checksums; ``ChecksumError`` if one differs."""
        self.verifying()()

    def verifying(self) -> Callable[[], None]:
        """Begin :meth:`verify` on threads; what is returned waits for them."""
        if not self.unverified:
            return lambda: None
        rows = self.rows
        seeds = rows["seed"].tolist()
        payloads = [(self.bytes_of(i, "payload", "size"), seed) for i, seed in enumerate(seeds)]
        found = begin(xxhash.xxh3_64_intdigest, payloads, int(rows["size"].sum()))
        return lambda: self.compare(np.array(found(), np.uint64))

    def compare(self, found: NDArray[np.uint64]) -> None:
        """Raise ``ChecksumError`` unless these are the checksums of the payloads."""
        for row in np.flatnonzero(found != self.rows["checksum"]).tolist():
            self._parse(row, int(found[row]))
            raise AssertionError(f"row {row} has another checksum, and no error")

    def of_tokens(self, values: NDArray[Any]) -> NDArray[Any]:
        """Repeat a value of each block for its tokens."""
        return np.repeat(values, self.rows["tokens"])

    def places(self) -> NDArray[np.int64]:
        """int64 [tokens]: the index of each token in its block."""
        tokens: NDArray[np.int64] = self.rows["tokens"]
        found: NDArray[np.int64] = np.arange(int(tokens.sum()))
        found -= self.of_tokens(np.cumsum(tokens) - tokens)
        return found

    def positions(self) -> NDArray[np.int64]:
        """int64 [tokens]: the position of each token, those that are cut included."""
        out = self.of_tokens(self.rows["first"]) + self.places()
        for row, own in self._special_tokens():
            out[own] = np.array(self.special[row].positions, np.int64)
        return out

    def verbatim(self) -> NDArray[np.bool_]:
        """bool [tokens]: whether each token is verbatim."""
        out = self.of_tokens(self.rows["verbatim"] == self.rows["tokens"])
        for row, own in self._special_tokens():
            out[own.start + np.array(self.special[row].verbatim_tokens, np.int64)] = True
        return out

    def ordinals(self) -> NDArray[np.int64]:
        """int64 [tokens]: the ordinal of each token in the section, -1 of those that are cut."""
        rows, places = self.rows, self.places()
        out = self.of_tokens(rows["start"] - rows["front"]) + places
        if rows["front"].any() or rows["end"].any():
            kept = places >= self.of_tokens(rows["front"])
            out[~kept | (places >= self.of_tokens(rows["tokens"] - rows["end"]))] = -1
        return out

    def _special_tokens(self) -> list[tuple[int, slice]]:
        ends = np.cumsum(self.rows["tokens"]).tolist()
        return [(i, slice(ends[i] - b.tokens, ends[i])) for i, b in self.special.items()]


def is_special(block: Block) -> bool:
    """Whether columns do not tell all about a block."""
    return bool(block.axes) or (
        not isinstance(block.positions, range) or 0 < len(block.verbatim_tokens) < block.tokens
    )


def fill(row: Any, block: Block) -> None:
    """Columns of a row that a block tells."""
    row["start"], row["tokens"], row["first"] = block.start, block.tokens, block.positions[0]
    row["front"], row["end"] = block.cut
    row["verbatim"] = len(block.verbatim_tokens)
    row["coder"], row["verbatim_coder"] = block.coder, block.verbatim_coder
    row["coded_size"] = block.coded_size
    row["coded_length"], row["exact_length"] = len(block.coded), len(block.verbatim)


def read_table(
    data: memoryview,
    begins: NDArray[np.int64],
    entries: NDArray[Any],
    sequences: NDArray[np.int64],
    parse: Callable[[int, int | None], Block],
    *,
    header: StreamHeader,
    seed: int,
    limits: Limits,
) -> BlockTable:
    """The blocks of a section whose records begin at ``begins``, unverified.

    Parameters
    ----------
    data
        Bytes that hold the records.
    entries, sequences
        What the index says of them, :data:`ENTRY`, and their numbers in the stream.
    parse
        Parses the record of a row, given its payload's checksum if it is known; raises the error
        of a record that is not as it should be.
    """
    lengths = entries["length"].astype(np.int64)
    width = HEAD.itemsize
    bytes_ = np.frombuffer(data, np.uint8)
    whole = lengths >= width + RECORD_OVERHEAD - RECORD_HEADER_SIZE
    at = np.minimum(begins[:, None] + np.arange(width), len(bytes_) - 1)
    heads = bytes_[at].view(HEAD)[:, 0]
    fields = heads.tobytes()
    seeds = [
        xxhash.xxh3_64_intdigest(fields[i : i + RECORD_HEADER_SIZE - 8], seed)
        for i in range(0, len(fields), width)
    ]
    usual = whole & (heads["seed"] == np.array(seeds, np.uint64))
    usual &= _usual_records(heads, entries, sequences, limits)
    usual &= _usual_blocks(heads, entries, header, limits)
    usual &= _usual_layers(bytes_, begins, heads, usual, header)
    ends = begins + lengths - (RECORD_OVERHEAD - RECORD_HEADER_SIZE)

    rows = rows_of(heads)
    rows["payload"], rows["size"] = begins + RECORD_HEADER_SIZE, lengths - RECORD_OVERHEAD
    special = {}
    for i in np.flatnonzero(~usual).tolist():
        block = parse(i, None)
        fill(rows[i], block)
        if is_special(block):
            special[i] = block
    rows["exact"] = ends - rows["exact_length"]
    rows["coded"] = rows["exact"] - rows["coded_length"]
    rows["checksum"] = bytes_[ends[:, None] + np.arange(8)].view("<u8")[:, 0]
    return BlockTable((data,), rows, special, True, parse)


def rows_of(heads: NDArray[Any]) -> NDArray[Any]:
    """:data:`ROW` with what the fields of blocks, :func:`block_fields`, and their seeds tell."""
    rows = np.zeros(len(heads), ROW)
    for name, source in (
        ("start", "start"),
        ("tokens", "tokens"),
        ("first", "first"),
        ("verbatim", "verbatim"),
        ("coder", "coder"),
        ("coded_size", "coded_size"),
        ("coded_length", "coded_length"),
        ("verbatim_coder", "verbatim_coder"),
        ("exact_length", "verbatim_length"),
        ("seed", "seed"),
    ):
        rows[name] = heads[source]
    return rows


def _usual_records(
    heads: NDArray[Any], entries: NDArray[Any], sequences: NDArray[np.int64], limits: Limits
) -> NDArray[np.bool_]:
    """Which records' headers are those of the blocks that the index lists."""
    found: NDArray[np.bool_] = (
        (heads["magic"] == RECORD_MAGIC)
        & (heads["type"] == RecordType.BLOCK)
        & (heads["flags"] == 0)
        & (heads["reserved"] == 0)
        & (heads["section"] == entries["section"])
        & (heads["sequence"] == sequences)
        & (sequences < limits.max_records)
        & (heads["size"] == entries["length"] - np.uint64(RECORD_OVERHEAD))
    )
    return found


def _usual_blocks(
    heads: NDArray[Any], entries: NDArray[Any], header: StreamHeader, limits: Limits
) -> NDArray[np.bool_]:
    """Which blocks are those that the index lists, and as :func:`usual_fields` says."""
    h, e = heads, entries
    features = np.full(len(h), int(header.features), np.uint32)
    usual = usual_fields(h, e["section"], features, header, limits)
    last = h["first"] + (h["tokens"].astype(np.int64) - 1)
    for mine, listed in (
        (h["role"], "role"),
        (h["measure"], "measure"),
        (h["tokens"], "tokens"),
        (h["verbatim"], "verbatim_tokens"),
        (h["start"], "start"),
        (h["first"], "first_position"),
        (last, "last_position"),
        (h["coded_length"], "coded_bytes"),
        (h["verbatim_length"], "verbatim_bytes"),
    ):
        usual &= mine == e[listed]
    usual &= (h["errors"] == e["errors"]).all(axis=1)
    return usual


def usual_fields(
    h: NDArray[Any],
    section: NDArray[np.uint16],
    features: NDArray[np.uint32],
    header: StreamHeader,
    limits: Limits,
) -> NDArray[np.bool_]:
    """Which blocks have no positions and no bitmap of their own, and can be.

    Parameters
    ----------
    h
        [blocks] with the fields of :func:`block_fields`, and ``size``, the bytes of the payload.
    section, features
        [blocks]: their sections, and the required features of what holds them.
    """
    allowed = features & _LAYER_ERRORS
    tokens, verbatim = h["tokens"].astype(np.int64), h["verbatim"].astype(np.int64)
    exact = verbatim == tokens
    layers = np.array([len(s.layers) for s in header.geometry.sections])[section]
    per_token = np.array([header.verbatim_size(i, 1) for i in range(len(header.geometry.sections))])
    values = verbatim * per_token[section]
    sizes = [h[name] for name in ("coded_size", "coded_length", "verbatim_length")]
    usual: NDArray[np.bool_] = (h["start"] < _HUGE) & np.logical_and.reduce(
        [x < _HUGE for x in sizes]
    )
    coded_size, coded, exact_bytes = (x.astype(np.int64) for x in sizes)
    last = h["first"] + (tokens - 1)  # overflow shows as negative
    usual &= (tokens > 0) & (tokens <= limits.max_block_tokens)
    usual &= (coded_size <= limits.max_block_bytes) & (values <= limits.max_block_bytes)
    usual &= exact | (verbatim == 0)
    usual &= (h["role"] <= _ROLES) & ((h["role"] == _DATA) | exact)
    usual &= (h["role"] != _DATA) | (tokens <= header.block_tokens)
    usual &= (h["listed"] == 0) & (h["reserved_too"] == 0) & (h["cut"] == 0)
    usual &= (h["contents"] <= allowed) & ((h["contents"] == 0) | ~exact)
    usual &= (h["first"] >= 0) & (last >= 0) & errors_can_be(h)
    usual &= ~exact | (coded_size == 0)
    symbols = (h["coder"] == _RANS) & (coded_size > 0)
    usual &= symbols | _bytes_can_be(h["coder"], coded, coded_size)
    tiles = (features & _PLANES_FEATURE != 0) & (header.dtype is DType.BFLOAT16)
    usual &= _bytes_can_be(h["verbatim_coder"], exact_bytes, values) | (
        (h["verbatim_coder"] == _PLANES) & (exact_bytes < values) & tiles
    )
    size = BLOCK_SIZE + 4 * layers * h["contents"] + coded + exact_bytes
    usual &= size == h["size"].astype(np.int64)
    return usual


def _bytes_can_be(
    coder: NDArray[np.uint8], coded: NDArray[np.int64], size: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """See :func:`kvtc_stream.formats.coders.check_coded`."""
    found: NDArray[np.bool_] = (coder >= _DEFLATE) & (coder <= _LZ4) & (coded < size)
    found |= (coder == _STORED) & (coded == size)
    return found


def _usual_layers(
    data: NDArray[np.uint8],
    begins: NDArray[np.int64],
    heads: NDArray[Any],
    usual: NDArray[np.bool_],
    header: StreamHeader,
) -> NDArray[np.bool_]:
    """Which blocks have no errors by layer, or such that can be; of those that are usual so far."""
    found = usual.copy()
    own = np.flatnonzero(usual & (heads["contents"] == 1))
    if len(own):
        layers = len(header.geometry.sections[int(heads["section"][own[0]])].layers)
        at = begins[own, None] + (HEAD.itemsize + np.arange(4 * layers))
        found[own] = layers_can_be(data[at])
    return found


def layers_can_be(codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which errors by layer, [blocks, 4 · layers], can be."""
    own = codes.reshape(len(codes), 2, 2, -1)  # of K and of V, mean and worst
    found: NDArray[np.bool_] = np.all(own[:, :, 0] <= own[:, :, 1], axis=(1, 2))
    return found
