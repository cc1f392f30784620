"""Many blocks at a time, as columns instead of an object each; :mod:`.usual` reads them."""

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
    magic=(0, "<u4"),
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
        if 2 * len(self.pieces) > len(self):  # an address takes longer than a slice
            starts, owners = offsets.tolist(), self.rows["piece"].tolist()
            parts = [self.pieces[p][a : a + size] for p, a in zip(owners, starts, strict=True)]
            if all(len(part) == size for part in parts):
                return np.frombuffer(b"".join(parts), np.uint8).reshape(len(self), size)
        from kvtc_stream.formats.usual import gathered

        out = np.empty((len(self), size), np.uint8)
        pieces = [np.frombuffer(piece, np.uint8) for piece in self.pieces]
        addresses = np.array([x.ctypes.data for x in pieces], np.int64)
        lasts = np.array([len(x) - 1 for x in pieces], np.int64)
        gathered(addresses, lasts, self.rows["piece"], offsets, out)
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

    def positions(self) -> NDArray[np.int64]:
        """int64 [tokens]: the position of each token, those that are cut included."""
        from kvtc_stream.formats.usual import positions

        out: NDArray[np.int64] = positions(self.rows)
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
        from kvtc_stream.formats.usual import ordinals

        found: NDArray[np.int64] = ordinals(self.rows)
        return found

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
