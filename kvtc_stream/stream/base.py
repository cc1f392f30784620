"""Blocks of an earlier stream of the same cache, taken over instead of coded again."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import Backend
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.formats import (
    Block,
    BlockRun,
    BlockTable,
    IndexEntry,
    Role,
    StreamFile,
    StreamHeader,
)
from kvtc_stream.io.sources import Source, open_source
from kvtc_stream.stream.decoder import BlockDecoder
from kvtc_stream.stream.edit import differences
from kvtc_stream.stream.pending import Chunk, SectionState

#: Blocks that are decoded, and compared, together.
_BLOCKS_AT_A_TIME = 64


class Base:
    """A stream whose blocks stand for tokens that are, bit for bit, what they decode to.

    In each section blocks are taken over from the first token that comes, up to one that differs.
    """

    def __init__(self, source: Source, key: bytes) -> None:
        with ExitStack() as cleanup:
            file = cleanup.enter_context(open_source(source))
            self.stream = StreamFile(file, key=key)
            self._cleanup = cleanup.pop_all()
        self._sections: dict[int, _SectionBase] = {}
        self._different: list[str] = []

    def begin(self, header: StreamHeader, calibration: Calibration, backend: Backend) -> bool:
        """Be ready for the tokens of a stream; whether blocks of this one can be in it."""
        own = self.stream.header
        self._different = differences(own, header)
        if own.dtype is not own.out_dtype and not self._different:
            self._different = ["dtype, once decoded,"]
        if self._different:
            self.close()
            return False
        decoder = BlockDecoder(own, calibration, backend.name)
        for i in range(len(own.geometry.sections)):
            entries = [e for e in self.stream.index if e.section == i and e.role is not Role.TAIL]
            self._sections[i] = _SectionBase(self.stream, i, entries, decoder)
        return True

    def take(
        self, section: int, chunk: Chunk, state: SectionState
    ) -> Generator[Block | BlockRun, None, Chunk]:
        """Blocks for some tokens, which ``state`` has then seen; what is left is to be coded."""
        if section not in self._sections:
            return chunk
        return (yield from self._sections[section].take(chunk, state))

    def end(self, section: int, state: SectionState) -> Iterator[Block | BlockRun]:
        """No tokens follow: hand on those of a block that did not come whole."""
        if section in self._sections:
            yield from self._sections[section].give_up(state)

    def used(self, section: int) -> bool:
        """Whether every block of a section was taken over, so that its last state goes on."""
        return section in self._sections and self._sections[section].used

    def close(self) -> None:
        """End reading."""
        self._cleanup.close()

    def complaint(self) -> str | None:
        """Why nothing was taken over, if there was something."""
        if self._different:
            why = f"the stream has another {', '.join(self._different)}"
        else:
            sections = self._sections.values()
            coded = sum(s.coded() for s in sections)
            if coded == 0 or sum(s.coded(s.taken) for s in sections) < coded:
                return None
            why = "the cache begins with other tokens than the stream decodes to, bit for bit"
        return f"no block of base could be taken over, all tokens are coded anew: {why}"


class _SectionBase:
    """The blocks of one section, compared with the tokens that come."""

    def __init__(
        self, stream: StreamFile, section: int, entries: list[IndexEntry], decoder: BlockDecoder
    ) -> None:
        self.entries, self.taken = entries, 0
        self._stream, self._section, self._decoder = stream, section, decoder
        self._blocks: Iterator[Block] | None = None
        self._ongoing = True
        # Blocks that were decoded and not taken over yet, their tokens, and how many of these are
        # known to be equal, from ``_first`` on.
        self._group: deque[Block] = deque()
        self._positions = np.empty(0, np.int64)
        self._k: Any = None
        self._v: Any = None
        self._first = self._equal = 0

    def coded(self, first: int = 0) -> int:
        """How many blocks there are from one on, but for sinks, which may be those of any cache."""
        return sum(entry.role is Role.DATA for entry in self.entries[first:])

    @property
    def used(self) -> bool:
        """Whether every block was taken over."""
        return 0 < self.taken == len(self.entries)

    def take(self, chunk: Chunk, state: SectionState) -> Generator[Block | BlockRun, None, Chunk]:
        """See :meth:`Base.take`."""
        k, v, positions = chunk
        at = 0
        if self._blocks is None and len(positions):
            self._blocks = self._begin(int(positions[0]))
        while self._ongoing and at < len(positions):
            if self._equal == len(self._positions) and not self._decode(len(positions) - at):
                break
            count = min(len(positions) - at, len(self._positions) - self._equal)
            same = self._compare(k, v, positions, at, count)
            at, self._equal = at + same, self._equal + same
            while self._group and self._first + len(self._group[0].kept) <= self._equal:
                block = self._group.popleft()
                self._first += len(block.kept)
                last_position = int(self._positions[self._first - 1])
                state.coded_before(block.role, len(block.kept), last_position)
                self.taken += 1
                yield block
            if same:
                state.last_position = int(positions[at - 1])
            if same < count:
                yield from self.give_up(state)
        rest = slice(at, None)
        return [x[:, rest] for x in k], [x[:, rest] for x in v], positions[rest]

    def _begin(self, first: int) -> Iterator[Block]:
        """The blocks from a position on: a sliding window has left behind those before it."""
        self.entries = [e for e in self.entries if e.last_position >= first]
        start = 0
        for block in self._stream.read_blocks(self.entries):
            early = int(np.searchsorted(_positions(block), first))
            front, end = block.cut
            yield replace(block, start=start, cut=(front + early, end))
            start += len(block.kept) - early

    def give_up(self, state: SectionState) -> Iterator[Block | BlockRun]:
        """Take over no more; equal tokens of a block that was not whole are coded anew."""
        self._ongoing = False
        some = slice(self._first, self._equal)
        if some.stop > some.start:
            k, v = ([x[:, some] for x in layers] for layers in (self._k, self._v))
            yield from state.take(k, v, self._positions[some])
        self._group.clear()
        self._first = self._equal

    def _decode(self, tokens: int) -> bool:
        """Decode the blocks of about so many tokens, at least one; whether there was one."""
        found: list[Block] = []
        count = 0
        for block in islice(self._blocks or (), _BLOCKS_AT_A_TIME):
            found.append(block)
            count += len(block.kept)
            if count >= tokens:
                break
        if not found:
            self._ongoing = False
            return False
        layers = range(len(self._decoder.header.geometry.sections[self._section].layers))
        self._k, self._v = self._decoder.empty(self._section, len(layers), count)
        table = BlockTable.of(found)
        ordinals = table.ordinals()
        slots = np.where(ordinals < 0, -1, ordinals - found[0].start)
        self._decoder.coder(self._section).decode_into(table, slots, layers, self._k, self._v)
        self._positions = np.concatenate([_positions(block) for block in found])
        self._group.extend(found)
        self._first = self._equal = 0
        return True

    def _compare(
        self, k: list[Any], v: list[Any], positions: NDArray[np.int64], at: int, count: int
    ) -> int:
        """How many of the next ``count`` tokens are those decoded, from the first on."""
        here, there = slice(at, at + count), slice(self._equal, self._equal + count)
        same: Any = None
        for layers, decoded in ((k, self._k), (v, self._v)):
            for layer, own in zip(layers, decoded, strict=True):
                equal = (_bits(layer[:, here]) == _bits(own[:, there])).all(axis=(0, 2))
                same = equal if same is None else same & equal
        if hasattr(same, "get"):  # CuPy's
            same = same.get()
        same = same & (positions[here] == self._positions[there])
        return count if same.all() else int(np.argmin(same))


def _positions(block: Block) -> NDArray[np.int64]:
    return np.array(block.positions, np.int64)[block.kept.start : block.kept.stop]


def _bits(x: Any) -> Any:
    """Values as integers: NaN is itself, and zeros have signs."""
    return x.view(f"u{x.dtype.itemsize}")
