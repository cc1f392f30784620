"""Reading a stream from a file, a pipe, memory or a URL."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.errors import (
    FormatError,
    KVTCError,
    LimitError,
    StateError,
    UnsupportedError,
)
from kvtc_stream.formats import (
    Block,
    BlockTable,
    IndexEntry,
    Limits,
    Role,
    StreamFile,
    StreamHeader,
    StreamParser,
)
from kvtc_stream.io.dlpack import BackendName, as_kv_array
from kvtc_stream.io.sources import Growing, Source, open_source
from kvtc_stream.io.steps import Steps, run
from kvtc_stream.stream.decoder import BlockDecoder, KVBlock

#: About the most blocks that are decoded together.
_BLOCKS_AT_A_TIME = 256
#: Batches of large pieces, for who launches all of them before he waits: with fewer ones the host
#: is done sooner.
LARGE = 3


#: Bytes asked of a pipe at a time.
_READ_SIZE = 1 << 20


class Reader:
    """Reads a stream; a context manager and an iterator of blocks. Make one with :func:`open`.

    From a seekable file any tokens of any layers can be read, by several threads in turn; from a
    pipe the blocks come once, in order, and those of the tail when the pipe ends: until then
    something may follow that supersedes them.
    """

    def __init__(
        self,
        file: Source,
        calibration: Calibration,
        *,
        backend: BackendName = "auto",
        limits: Limits | None = None,
        recover: bool = False,
        mmap: bool = False,
        follow: float | None = None,
        key: bytes = b"",
    ) -> None:
        limits = limits or Limits()
        self._lock = threading.Lock()
        self._closed = False
        self._stream: StreamFile | None = None
        self._pipe: _PipeBlocks | None = None
        self._sections: dict[int, _Records] = {}
        with ExitStack() as cleanup:  # closes the file if the stream is refused
            opened = cleanup.enter_context(open_source(file, mapped=mmap))
            if key and (follow is not None or not opened.seekable()):
                raise UnsupportedError(
                    "only the end of a stream tells whether it was written with the key: read it "
                    "from a file that can seek"
                )
            if follow is not None:
                self._pipe = _PipeBlocks(Growing(opened, follow), limits)
                self._header = self._pipe.header
            elif opened.seekable():
                self._stream = StreamFile(opened, limits, recover=recover, key=key)
                self._header = self._stream.header
            else:
                self._pipe = _PipeBlocks(opened, limits)
                self._header = self._pipe.header
            self._blocks = BlockDecoder(self._header, calibration, backend)
            self._cleanup = cleanup.pop_all()

    @property
    def header(self) -> StreamHeader:
        """The stream's header."""
        return self._header

    @property
    def fault(self) -> KVTCError | None:
        """With ``recover``, what was met after the last whole block; ``None`` if nothing was."""
        return self._stream.fault if self._stream else None

    def tokens(self, section: int = 0) -> int:
        """Tokens of a section. Seekable files only."""
        self._numbers(section)
        return self._sections[section].tokens

    def positions(self, section: int = 0) -> NDArray[np.int64]:
        """Positions of a section's tokens, int64 [tokens]. Seekable files only."""
        stream, numbers = self._numbers(section)
        if len(numbers):
            first = int(stream.entries["first_position"][numbers[0]])
            end = int(stream.entries["last_position"][numbers[-1]]) + 1
            if end - first == self.tokens(section):
                return np.arange(first, end)
        entries = stream.entries.take(numbers)
        counts, firsts = entries["tokens"].astype(np.int64), entries["first_position"]
        if (entries["last_position"] - firsts + 1 == counts).all():
            return np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        table = self.stored(section)
        found: NDArray[np.int64] = table.positions()[table.ordinals() >= 0]
        return found

    @property
    def block_decoder(self) -> BlockDecoder:
        """What decodes the stream's blocks."""
        return self._blocks

    def stored(self, section: int, tokens: slice | None = None) -> BlockTable:
        """The blocks of a section, or those that hold some tokens, as they are stored.

        Their payloads are not compared with their checksums yet. Seekable files only.
        """
        stream, numbers = self._numbers(section)
        first, last = _span(tokens, self.tokens(section), "tokens")
        with self._lock:
            self._check_open()
            if (first, last) != (0, self.tokens(section)):
                numbers = numbers[_holding(stream.entries.take(numbers), first, last)]
            return stream.read_table(numbers, self._blocks.room)

    def __iter__(self) -> Iterator[KVBlock]:
        """Blocks in token order, verbatim tokens included."""
        self._check_open()
        if self._pipe is not None:
            yield from map(self._blocks.decode, self._pipe)
        elif self._stream is not None:
            yield from self._decoded(self._stream.index, None)

    def read(
        self,
        tokens: slice | None = None,
        layers: slice | None = None,
        section: int = 0,
        *,
        out: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """K and V of some tokens (ordinals) and layers (indices), [layers, heads, tokens, dim].

        Only the blocks that hold the tokens are read, and only the layers' columns of the basis
        take part. Slices have step 1 and follow Python's rules.

        ``out`` are tensors that take K and V instead, and are returned as they are: of that shape,
        or lists of one a layer, or of several layers each, in the stream's ``out_dtype``; of any
        framework, writable, in the backend's memory. A damaged stream leaves them alone: the
        checksums of all blocks are verified before the first value is written. After an error of
        another kind (a writer's fault that its checksums cover, a device that fails) their content
        is undefined.
        """
        return run(self._reading(tokens, layers, section, out=out))

    def _reading(
        self,
        tokens: slice | None = None,
        layers: slice | None = None,
        section: int = 0,
        *,
        out: tuple[Any, Any] | None = None,
        unseen: bool = False,
    ) -> Steps[tuple[Any, Any]]:
        """:meth:`read`, for those who do something else while a device works. Nobody else reads
        between two steps. What is ``unseen`` of ``out`` is dropped if this fails."""
        first, last = _span(tokens, self.tokens(section), "tokens")
        geometry = self._header.geometry.sections[section]
        chosen = range(*_span(layers, len(geometry.layers), "layers"))
        if out is not None and not chosen:
            return out
        if out is not None:
            k, v = self._blocks.buffers(section, len(chosen), last - first, out)
        else:
            try:
                k, v = self._blocks.empty(section, len(chosen), last - first)
            except (MemoryError, ValueError):
                raise LimitError(
                    f"the index lists {last - first} tokens, for which there is no memory: read "
                    "fewer at a time"
                ) from None
        unseen = unseen or out is None

        def decoding(piece: NDArray[np.intp]) -> Iterator[None]:
            table, slots = self._located(piece, first, last)
            with self._blocks.lent(section) as coder:
                yield from coder.decoding(table, slots, chosen, k, v, unseen=unseen)

        # What somebody sees is written once all blocks are known to be whole.
        pieces = self._pieces(section, first, last, together=not unseen)
        with self._lock:
            self._check_open()
            yield from self._blocks.backend.interleaving(list(map(decoding, pieces)))
        return (self._blocks.output(k), self._blocks.output(v)) if out is None else out

    def _portions(
        self, section: int, first: int, last: int, begin: int = 0, *, large: bool = False
    ) -> Iterator[tuple[BlockTable, NDArray[np.int64]]]:
        """The blocks that hold some tokens, as :meth:`stored`, as many at a time as are decoded
        together; and the slots of their tokens, see :meth:`BlockTable.span_slots`."""
        for piece in self._pieces(section, first, last, large=large):
            yield self._located(piece, first, last, begin)

    def _pieces(
        self, section: int, first: int, last: int, *, together: bool = False, large: bool = False
    ) -> list[NDArray[np.intp]]:
        """Records to decode together, the next of which are on their way meanwhile; or ``large``
        ones, see :data:`LARGE`."""
        stream, numbers = self._numbers(section)
        if (first, last) != (0, self.tokens(section)):
            numbers = numbers[_holding(stream.entries.take(numbers), first, last)]
        most = self._blocks.backend.batch_tokens(self._header.geometry.sections[section])
        most = min(max(most // self._header.block_tokens, 1), _BLOCKS_AT_A_TIME)
        cuts = [] if together else _cuts(len(numbers), most, large=large).astype(int).tolist()
        spans = pairwise([0, *cuts, len(numbers)])
        return [numbers[begin:end] for begin, end in spans if begin < end]

    def _located(
        self, piece: NDArray[np.intp], first: int, last: int, begin: int = 0
    ) -> tuple[BlockTable, NDArray[np.int64]]:
        assert self._stream is not None
        table = self._stream.read_table(piece, self._blocks.room)
        return table, table.span_slots(first, last, begin)

    def blocks(
        self,
        tokens: slice | None = None,
        layers: slice | None = None,
        section: int | None = None,
    ) -> Iterator[KVBlock]:
        """The blocks of some tokens and layers of one or of every section, cut to them, in order.

        As :meth:`read`, piece by piece and with positions. A pipe works too: it is read to its
        end, and token slices may not count from there. ``errors`` are those of the whole blocks.
        """
        self._check_open()
        sections = self._header.geometry.sections
        chosen = range(len(sections)) if section is None else [self._checked(section)]
        spans = {
            i: _span(tokens, None if self._stream is None else self.tokens(i), "tokens")
            for i in chosen
        }
        indices = {i: range(*_span(layers, len(sections[i].layers), "layers")) for i in chosen}

        def wanted(item: Block | IndexEntry) -> bool:
            first, last = spans.get(item.section, (0, 0))
            tokens = item.tokens if isinstance(item, IndexEntry) else len(item.kept)
            return item.start < last and first < item.start + tokens

        blocks: Iterator[KVBlock]
        if self._pipe is not None:
            blocks = (self._blocks.decode(b, indices[b.section]) for b in self._pipe if wanted(b))
        else:
            assert self._stream is not None
            blocks = self._decoded(filter(wanted, self._stream.index), indices)
        return (_some_tokens(b, *spans[b.section]) for b in blocks)

    def close(self) -> None:
        """End the reader, and close the file if a path was opened. Again does nothing."""
        self._closed = True
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decoded(
        self, entries: Iterable[IndexEntry], layers: Mapping[int, Sequence[int]] | None
    ) -> Iterator[KVBlock]:
        """Blocks with all layers, or those of their section; threads take turns."""
        assert self._stream is not None
        blocks = self._stream.read_blocks(entries)
        while True:
            with self._lock:
                self._check_open()
                block = next(blocks, None)
                if block is None:
                    return
                chosen = None if layers is None else layers[block.section]
                decoded = self._blocks.decode(block, chosen)
            yield decoded

    def _numbers(self, section: int) -> tuple[StreamFile, NDArray[np.int64]]:
        """The stream, and the numbers of the section's records."""
        if self._stream is None:
            raise UnsupportedError("a pipe has no random access: iterate, or read from a file")
        if (found := self._sections.get(section)) is None:
            live, entries = self._stream.live, self._stream.entries
            numbers = live[entries["section"][live] == self._checked(section)]
            found = _Records(numbers, int(entries["tokens"][numbers].sum()))
            self._sections[section] = found
        return self._stream, found.numbers

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the reader is closed: open the stream again")

    def _checked(self, section: int) -> int:
        sections = len(self._header.geometry.sections)
        if not 0 <= section < sections:
            raise ValueError(f"section must be from 0 to {sections - 1}, found {section}")
        return section


def _cuts(blocks: int, most: int, *, large: bool) -> NDArray[Any]:
    """Where to divide blocks into pieces of about ``most``, or :data:`LARGE` ones."""
    if large:
        cuts = [min(most, blocks)]
        while cuts[-1] < blocks:
            cuts.append(cuts[-1] + large_piece(blocks - cuts[-1], most))
        return np.array(cuts[:-1])
    count = max(round(blocks / most), 1)
    # Of many, few at first: a device has nothing to do until they are there.
    return np.arange(0.5 if count > 2 else 1, count) * blocks / count


def large_piece(left: int, most: int) -> int:
    """How large the next piece is, see :data:`LARGE`, of what is left of pieces of ``most``. The
    last one is small: it is there last, and layers wait until its symbols are decoded."""
    return left if left <= 2 * most else min(LARGE * most, left - most)


class _Records(NamedTuple):
    """Numbers of a section's records, and the tokens in them."""

    numbers: NDArray[np.int64]
    tokens: int


class _PipeBlocks:
    """Blocks from a file object that cannot seek; reads up to the header at once.

    Tails wait for the end of the input, because something may follow that supersedes them.
    """

    def __init__(self, file: BinaryIO | Growing, limits: Limits) -> None:
        # What has arrived, rather than wait for as much as was asked for.
        self._read: Callable[[int], bytes] = getattr(file, "read1", file.read)
        self._follows = isinstance(file, Growing)
        self._parser = StreamParser(limits)
        self._ready: list[StreamHeader | Block] = []
        while not self._ready:
            self._more()
        header = self._ready.pop(0)
        assert isinstance(header, StreamHeader)
        self.header = header

    def __iter__(self) -> Iterator[Block]:
        tail: list[Block] = []
        more = True
        while more:
            ready, self._ready = self._ready, []
            for item in ready:
                if isinstance(item, StreamHeader):
                    tail.clear()
                elif item.role is Role.TAIL:
                    tail.append(item)
                else:
                    yield item
            more = self._more()
        yield from tail

    def _more(self) -> bool:
        """Take what has arrived; whether there was something."""
        if self._follows and self._parser.eof:
            return False  # who follows a stream does not wait for what may be appended later
        data = self._read(_READ_SIZE)
        if data:
            self._ready += self._parser.feed(data)
            return True
        self._parser.close()
        if rest := self._parser.unused_data:
            raise FormatError(
                f"at least {len(rest)} bytes follow the stream: the write of a continuation was "
                "cut off, or they are not of the stream; read it from a file with recover=True"
            )
        return False


def _span(chosen: slice | None, count: int | None, name: str) -> tuple[int, int]:
    """First and last of a slice of ``count`` things, or of as many as a pipe may hold."""
    if chosen is None:
        chosen = slice(None)
    if not isinstance(chosen, slice):
        one = f": slice({chosen}, {chosen + 1}) for one" if type(chosen) is int else ""
        raise TypeError(f"{name} must be a slice, found {type(chosen).__name__}{one}")
    if count is None:
        if min(chosen.start or 0, chosen.stop or 0) < 0:
            raise UnsupportedError(
                f"{name} {chosen.start}:{chosen.stop} count from the end, which a pipe does not "
                f"tell: count from the front, or read from a file"
            )
        count = sys.maxsize
    start, stop, step = chosen.indices(count)
    if step != 1:
        raise ValueError(f"{name} must be a slice of step 1, found step {step}")
    return start, max(start, stop)


def _holding(entries: NDArray[Any], first: int, last: int) -> NDArray[np.bool_]:
    """Which blocks hold tokens of a span, by the index."""
    starts = entries["start"].astype(np.int64)
    found: NDArray[np.bool_] = (starts < last) & (first < starts + entries["tokens"])
    return found


def _some_tokens(block: KVBlock, first: int, last: int) -> KVBlock:
    """The part of a block between two ordinals of the section."""
    keep = slice(max(first - block.start, 0), last - block.start)
    if keep.start == 0 and keep.stop >= block.tokens:
        return block
    return replace(
        block,
        start=block.start + keep.start,
        positions=block.positions[keep],
        k=as_kv_array(block.k[:, :, keep]),
        v=as_kv_array(block.v[:, :, keep]),
    )
