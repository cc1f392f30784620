"""Many blocks at once, as columns: those that an encoder makes as a rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtc_stream.formats.block import HAS_LAYER_ERRORS, Block, Role
from kvtc_stream.formats.block_errors import BlockErrors, LayerErrors, Measure
from kvtc_stream.formats.coders import Coder
from kvtc_stream.formats.columns import BLOCK_SIZE, ENTRY, HEAD
from kvtc_stream.formats.features import Feature
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.index import Order
from kvtc_stream.formats.record import (
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_OVERHEAD,
    RecordType,
)
from kvtc_stream.io.memory import SealedRows

#: What the checksum of a record's header is of.
_COVERED = RECORD_HEADER_SIZE - 8
#: Larger numbers go another way.
_MOST = 1 << 32


@dataclass(frozen=True, eq=False)
class BlockRun:
    """Data blocks of a section, one after the other: equally long, wholly coded, and each at
    positions that follow one another.

    Attributes
    ----------
    section, start, tokens
        The section, the ordinal of the first token, and the number of tokens of each block.
    firsts
        int64 [blocks]: positions of first tokens.
    coders, coded_sizes
        uint8 and int64 [blocks], see :class:`Block`.
    data, places
        What holds the symbols, and int64 [blocks, 2]: where they begin in it, and their bytes.
    measure, errors
        How errors were measured, and float32 [blocks, 4] in the order of the stream.
    layer_codes
        uint8 [blocks, 4 · layers], codes of :class:`LayerErrors`, or [blocks, 0].
    """

    section: int
    start: int
    tokens: int
    firsts: NDArray[np.int64]
    coders: NDArray[np.uint8]
    coded_sizes: NDArray[np.int64]
    data: memoryview
    places: NDArray[np.int64]
    measure: Measure
    errors: NDArray[np.float32]
    layer_codes: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self) -> Iterator[Block]:
        for i, (first, (at, size)) in enumerate(
            zip(self.firsts.tolist(), self.places.tolist(), strict=True)
        ):
            codes = self.layer_codes[i].tobytes()
            yield Block(
                section=self.section,
                role=Role.DATA,
                start=self.start + i * self.tokens,
                tokens=self.tokens,
                positions=range(first, first + self.tokens),
                verbatim_tokens=(),
                coder=Coder(self.coders[i]),
                coded=self.data[at : at + size],
                coded_size=int(self.coded_sizes[i]),
                verbatim_coder=Coder.STORED,
                verbatim=b"",
                errors=BlockErrors(self.measure, *self.errors[i].tolist()),
                layer_errors=LayerErrors(codes) if codes else None,
            )


def each_block(blocks: Iterable[Block | BlockRun]) -> Iterator[Block]:
    """Blocks one by one."""
    for block in blocks:
        if isinstance(block, BlockRun):
            yield from block
        else:
            yield block


def records_of(
    run: BlockRun, header: StreamHeader, order: Order, seed: int
) -> tuple[SealedRows, bytes] | None:
    """What writing each of the blocks gives, and the entries of the index, which ``order`` then has
    counted; ``None``, and nothing was counted, if a block is not as it should be, or unusual."""
    from kvtc_stream.formats.usual import all_errors_can_be

    count, layers = len(run), run.layer_codes.shape[1] // 4
    starts = run.start + run.tokens * np.arange(count)
    if (
        run.section >= len(header.geometry.sections)
        or (layers and layers != len(header.geometry.sections[run.section].layers))
        or (layers and Feature.LAYER_ERRORS not in header.features)
        or max(int(starts[-1]), int(run.firsts.max()), int(run.coded_sizes.max())) >= _MOST
        or int(run.coded_sizes.min()) < 1
    ):
        return None
    coded = run.places[:, 1]
    sizes = BLOCK_SIZE + 4 * layers + coded
    lengths = sizes + RECORD_OVERHEAD
    head = np.zeros(count, HEAD)
    head["measure"], head["errors"] = run.measure, run.errors.view(np.uint32)
    if not all_errors_can_be(head):
        return None
    offsets, sequence = order.offset + np.cumsum(lengths) - lengths, order.sequence
    tokens = np.full(count, run.tokens)
    if not order.accept_data(run.section, starts, tokens, run.firsts, lengths):
        return None
    head["magic"] = int.from_bytes(RECORD_MAGIC, "little")
    head["type"], head["section"] = RecordType.BLOCK, run.section
    head["sequence"], head["size"] = sequence + np.arange(count), sizes
    head["tokens"], head["start"], head["first"] = run.tokens, starts, run.firsts
    head["coder"], head["verbatim_coder"] = run.coders, Coder.STORED
    head["contents"] = HAS_LAYER_ERRORS if layers else 0
    head["coded_size"], head["coded_length"] = run.coded_sizes, coded
    fields = head.tobytes()
    seeds = [
        xxhash.xxh3_64_intdigest(fields[i : i + _COVERED], seed)
        for i in range(0, len(fields), HEAD.itemsize)
    ]
    head["seed"] = seeds
    rows = np.concatenate([head.view((np.uint8, HEAD.itemsize)), run.layer_codes], axis=1)
    entry = np.zeros(count, ENTRY)
    entry["offset"], entry["length"] = offsets, lengths
    entry["type"], entry["section"], entry["measure"] = RecordType.BLOCK, run.section, run.measure
    entry["tokens"], entry["start"] = run.tokens, starts
    entry["first_position"], entry["last_position"] = run.firsts, run.firsts + (run.tokens - 1)
    entry["coded_bytes"], entry["errors"] = coded, head["errors"]
    sealed = SealedRows(rows, RECORD_HEADER_SIZE, run.data, run.places, head["seed"].copy())
    return sealed, entry.tobytes()
