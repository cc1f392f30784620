"""Many blocks at a time, as columns instead of an object each.

Compiled code, :mod:`.usual`, reads what is as usual; the parser of single blocks anything else.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtc_stream.formats.block import Block
from kvtc_stream.formats.columns import HEAD, ROW
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.record import RECORD_HEADER_SIZE, RECORD_OVERHEAD
from kvtc_stream.io.threads import begin


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

    def addresses(self) -> NDArray[np.int64]:
        """Where the pieces are in memory, int64 [pieces]."""
        held = [np.frombuffer(piece, np.uint8).ctypes.data for piece in self.pieces]
        return np.array(held, np.int64)

    def taken(self, which: NDArray[np.int64]) -> BlockTable:
        """Some of the blocks, by row."""
        places = {row: i for i, row in enumerate(which.tolist())} if self.special else {}
        special = {places[i]: block for i, block in self.special.items() if i in places}
        return BlockTable(
            self.pieces,
            self.rows.take(which),
            special,
            self.unverified,
            lambda row, found: self._parse(int(which[row]), found),
        )

    def verify(self) -> None:
        """Compare payloads with their checksums; ``ChecksumError`` if one differs."""
        self.verifying()()

    def verifying(self, some: NDArray[np.int64] | None = None) -> Callable[[], None]:
        """Begin :meth:`verify`, of all blocks or of those at some rows, on threads; what is
        returned waits for them."""
        if some is None:
            some = np.arange(len(self))
        if not self.unverified or not len(some):
            return lambda: None
        own = self.rows.take(some)
        seeds = zip(some.tolist(), own["seed"].tolist(), strict=True)
        payloads = [(self.bytes_of(i, "payload", "size"), seed) for i, seed in seeds]
        found = begin(xxhash.xxh3_64_intdigest, payloads, int(own["size"].sum()))
        return lambda: self.compare(np.array(found(), np.uint64), some)

    def compare(self, found: NDArray[np.uint64], some: NDArray[np.int64]) -> None:
        """Raise ``ChecksumError`` unless these are the checksums of the payloads at some rows."""
        for i in np.flatnonzero(found != self.rows["checksum"][some]).tolist():
            self._parse(int(some[i]), int(found[i]))
            raise AssertionError(f"row {some[i]} has another checksum, and no error")

    def of_tokens(self, values: NDArray[Any]) -> NDArray[Any]:
        """Repeat a value of each block for its tokens."""
        return np.repeat(values, self.rows["tokens"])

    def chosen(self, values: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of values of all tokens, int64 [tokens], those of the tokens of some blocks, by row."""
        from kvtc_stream.formats.usual import chosen

        out = np.empty(int(self.rows["tokens"][rows].sum()), np.int64)
        chosen(self.rows, values, rows, out)
        return out

    def positions(self) -> NDArray[np.int64]:
        """int64 [tokens]: the position of each token, those that are cut included."""
        from kvtc_stream.formats.usual import positions

        out = np.empty(int(self.rows["tokens"].sum()), np.int64)
        positions(self.rows, out)
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
        return self.span_slots(0, sys.maxsize)

    def span_slots(self, first: int, last: int, begin: int = 0) -> NDArray[np.int64]:
        """int64 [tokens]: the slot of each token, if those of a span of ordinals have slots that
        follow one another from ``begin`` on; -1 of others."""
        from kvtc_stream.formats.usual import span_slots

        out = np.empty(int(self.rows["tokens"].sum()), np.int64)
        span_slots(self.rows, first, last, begin, out)
        return out

    def slots(self, of_section: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [tokens]: the slot of each token, -1 of those that are cut, given that for each
        ordinal of the section."""
        from kvtc_stream.formats.usual import slots

        out = np.empty(int(self.rows["tokens"].sum()), np.int64)
        if not slots(self.rows, of_section, out):
            raise IndexError(f"blocks have tokens beyond the {len(of_section)} of the section")
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
    from kvtc_stream.formats.usual import Facts, records

    rows, bytes_ = np.zeros(len(begins), ROW), np.frombuffer(data, np.uint8)
    head, facts = np.empty(1, HEAD), Facts.of(header, limits)
    usual = records(
        bytes_,
        begins,
        entries,
        sequences,
        np.uint64(seed),
        facts,
        head,
        head.view(np.uint8),
        rows,
    )
    special = {}
    for i in np.flatnonzero(~usual).tolist():
        row, block = rows[i], parse(i, None)
        fill(row, block)
        if is_special(block):
            special[i] = block
        size = int(entries["length"][i]) - RECORD_OVERHEAD
        end = int(begins[i]) + RECORD_HEADER_SIZE + size
        row["payload"], row["size"], row["exact"] = end - size, size, end - row["exact_length"]
        row["coded"] = row["exact"] - row["coded_length"]
        row["seed"], row["checksum"] = (
            bytes_[at : at + 8].view("<u8")[0] for at in (end - size - 8, end)
        )
    return BlockTable((data,), rows, special, True, parse)
