"""Streams that become the rows of a batch on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats import BlockTable
from kvtc_stream.io.steps import Steps
from kvtc_stream.stream.batch import about, kind_of
from kvtc_stream.stream.decoder import BlockDecoder
from kvtc_stream.stream.reader import LARGE, Reader, large_piece

#: Blocks of streams of one kind, what decodes them, and the slot of each of their tokens.
_Portion = tuple[BlockDecoder, BlockTable, NDArray[np.int64]]


@dataclass(frozen=True)
class Rows:
    """The latest tokens of a section of some streams, and where they go.

    Parameters
    ----------
    reader
        That of a row; asked for one after the other, while a device decodes those before.
    count
        How many there are.
    section, tokens
        Index of the section, and how many tokens.
    out
        K and V of the first row, in pieces of some layers each [layers, heads, tokens, dim]; nobody
        sees them yet.
    step
        Slots from a row to the next.
    """

    reader: Callable[[int], Reader]
    count: int
    section: int
    tokens: int
    out: tuple[Any, Any]
    step: int

    def restoring(self) -> Steps[None]:
        """Decode all of them."""
        k, v = self._memory()
        first = self.reader(0)
        layers = range(len(first.header.geometry.sections[self.section].layers))

        def decoding(
            blocks: BlockDecoder, table: BlockTable, slots: NDArray[np.int64]
        ) -> Iterator[None]:
            with blocks.lent(self.section) as coder:
                yield from coder.decoding(table, slots, layers, k, v, unseen=True)

        backend = first.block_decoder.backend
        yield from backend.interleaving(decoding(*portion) for portion in self._portions())

    def arriving(self, groups: Sequence[Sequence[int]]) -> Steps[None]:
        """Decode groups of layers, indices into the section's, one after the other, beside what
        else the device does: see :meth:`kvtc_stream.backends.base.SectionCoder.arriving`."""
        tasks: list[Steps[None]] = []
        with ExitStack() as opened:
            for blocks, alike in groupby(self._portions(large=True), itemgetter(0)):
                coder = opened.enter_context(blocks.lent(self.section))
                portions = ((table, slots) for _, table, slots in alike)
                tasks.append(coder.arriving(portions, self._early(), groups, self._memory))
                # The device is done before anything that it reads or writes can go.
                opened.callback(tasks[-1].close)
                next(tasks[-1])
                if len(tasks) == 1:
                    yield
                next(tasks[-1])
            yield
            for _ in range(1 + len(groups)):
                for task in tasks:
                    next(task)
                yield

    def _early(self) -> int:
        """Portions that are decoded while others are on their way: to an H200 these take half as
        long as to be decoded, and their symbols half of that time. Of more, a layer would wait for
        all."""
        first = self.reader(0)
        section = first.header.geometry.sections[self.section]
        most = first.block_decoder.backend.batch_tokens(section)
        quarter = self.count * self.tokens / most / 4  # in batches; the first portion is of one
        return int((quarter - 1) / LARGE + 1)

    def _memory(self) -> tuple[Any, Any]:
        k, v = map(self.reader(0).block_decoder.backend.layers_in, self.out)
        return k, v

    def _portions(self, *, large: bool = False) -> Iterator[_Portion]:
        """A batch or more at a time; of many, half a one at first: a device has nothing to do until
        it is there. Or a batch, and then ``large`` ones."""
        kinds: dict[Any, BlockDecoder] = {}
        waiting: list[_Portion] = []
        begun, later = False, self.count * self.tokens
        for i in range(self.count):
            reader = self.reader(i)
            blocks = kinds.setdefault(kind_of(reader.header), reader.block_decoder)
            if waiting and waiting[0][0] is not blocks:
                yield _joined(waiting)
                waiting = []
            batch = blocks.backend.batch_tokens(reader.header.geometry.sections[self.section])
            held = reader.tokens(self.section)
            named = partial(about, "streams", i, self.count) if self.count > 1 else nullcontext
            begin = i * self.step
            pieces = reader._portions(self.section, held - self.tokens, held, begin, large=large)
            while True:
                with named():
                    found = next(pieces, None)
                if found is None:
                    break
                table, slots = found
                size = sum(len(own) for _, _, own in waiting) + len(slots)
                if waiting and large and size > 1.1 * LARGE * batch:
                    yield _joined(waiting)
                    waiting, begun, size = [], True, len(slots)
                later -= len(slots)
                waiting.append((blocks, table.within(named), slots))
                most: float = batch
                if large and begun:
                    most = large_piece(size + later, batch)
                elif not large and not begun and self.count * self.tokens > 2 * batch:
                    most = batch / 2
                if size >= most - batch / 4:
                    yield _joined(waiting)
                    waiting, begun = [], True
        if waiting:
            yield _joined(waiting)


def _joined(portions: Sequence[_Portion]) -> _Portion:
    blocks, tables, slots = zip(*portions, strict=True)
    return blocks[0], BlockTable.concat(tables), np.concatenate(slots)
