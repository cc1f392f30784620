"""Files: any block of a stream in a seekable file, whose bytes :mod:`.parser` understands."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.errors import (
    AuthenticationError,
    ChecksumError,
    FormatError,
    KVTCError,
    TruncatedError,
    UnsupportedError,
)
from kvtc_stream.formats.auth import check_digest, digest, open_auth
from kvtc_stream.formats.block import Block
from kvtc_stream.formats.columns import ENTRY
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.index import (
    TRAILER_SIZE,
    IndexEntry,
    Order,
    Trailer,
    live_blocks,
    pack_index,
    unpack_entries,
    unpack_index,
)
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.parser import StreamParser, check_trailer, open_record
from kvtc_stream.formats.preamble import PREAMBLE_SIZE, Preamble, check_magic
from kvtc_stream.formats.record import (
    CHECKSUM_SIZE,
    RECORD_HEADER_SIZE,
    RECORD_OVERHEAD,
    RecordHeader,
    RecordType,
    record_end,
    record_head,
)
from kvtc_stream.formats.table import BlockTable, read_table
from kvtc_stream.formats.wire import located
from kvtc_stream.formats.writer import StreamWriter
from kvtc_stream.io.memory import LARGE, empty
from kvtc_stream.io.threads import begin

_RECOVERY_CHUNK = 1 << 20
_BLOCK, _SUPERSEDE = int(RecordType.BLOCK), int(RecordType.SUPERSEDE)
#: Read at most this many bytes of neighbouring blocks at a time.
_READ_AHEAD = 8 << 20


class SeekableFile(Protocol):
    """The methods of a binary file that :class:`StreamFile` uses."""

    def read(self, size: int, /) -> bytes | None: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...


@dataclass(frozen=True, slots=True)
class StreamSizes:
    """Sizes in bytes: preamble and header, index and trailer, the whole stream."""

    header: int
    index: int
    total: int


class StreamFile:
    """Random access to the blocks of a stream in a seekable binary file.

    Opening reads the header, the trailer and the index, not the blocks. Not thread-safe: reading
    moves the file's position.

    Parameters
    ----------
    file
        A binary file; the stream is all of it. It is not closed.
    limits
        What to refuse.
    recover
        When the trailer is missing or wrong, as after a crash, read the file from the front and
        index the whole blocks before the first fault.
    key
        Refuse what was not written with this key. Not with ``recover``.

    Attributes
    ----------
    header
        The stream's header.
    entries, live
        One entry a record, superseded ones too, :data:`~kvtc_stream.formats.table.ENTRY`; and the
        numbers of those that :attr:`index` lists.
    sizes
        Bytes of the stream's parts.
    fault
        What recovery met after the last whole block, ``None`` for a whole stream.

    Raises
    ------
    FormatError
        The file is not one whole stream; ``TruncatedError`` when its end is missing.
    AuthenticationError
        The stream was not written with the key.
    """

    def __init__(
        self,
        file: SeekableFile,
        limits: Limits | None = None,
        *,
        recover: bool = False,
        key: bytes = b"",
    ) -> None:
        if key and recover:
            raise UnsupportedError("what was cut off cannot be authenticated: recover without key=")
        self._file = file
        self._key, self._digests = key, b""
        self._limits = limits or Limits()
        self.fault: KVTCError | None = None
        total = file.seek(0, io.SEEK_END)
        opening = self._read(0, min(PREAMBLE_SIZE, total))
        check_magic(opening)
        if len(opening) < PREAMBLE_SIZE:
            raise _truncated(total, PREAMBLE_SIZE, "its preamble")
        preamble = Preamble.unpack(opening, self._limits)
        start = PREAMBLE_SIZE + preamble.header_size
        if total < start:
            raise _truncated(total, start, "its header")
        body = self._read(PREAMBLE_SIZE, preamble.header_size)
        self.header, self._seed = preamble.open(body, self._limits)
        try:
            found = self._usual_index(start, total)
            self.entries, index_size = self._read_index(start, total) if found is None else found
        except FormatError as error:
            if not recover:
                raise
            self.fault = error
            self.entries, index_size = _packed(self._scan(start)), 0
        self._opening_digest = digest(opening + body) if key else b""
        if key:
            self._digests = self._authenticate()
        self.sizes = StreamSizes(start, index_size, total)
        kinds = self.entries["type"].copy()
        if (kinds == _SUPERSEDE).any():
            self.live = np.array([e.sequence for e in live_blocks(self.records)], np.int64)
            superseding = [e for e in self.records if e.type == RecordType.SUPERSEDE]
            record, data = self._read_record(superseding[-1])
            offset = superseding[-1].offset
            header, _ = open_record(record, data, offset, self.header, self._limits)
            assert isinstance(header, StreamHeader)
            self.header = header
        else:
            self.live = np.flatnonzero(kinds == _BLOCK)

    @cached_property
    def records(self) -> tuple[IndexEntry, ...]:
        """One entry a record, superseded ones too."""
        return unpack_entries(self.entries.tobytes())

    @cached_property
    def index(self) -> tuple[IndexEntry, ...]:
        """One entry a block, in the order of the stream, without superseded ones."""
        return tuple(self.records[i] for i in self.live.tolist())

    def read_block(self, entry: IndexEntry) -> Block:
        """Read one block that :attr:`index` lists.

        Raises
        ------
        FormatError
            The block is damaged, or not what the index says.
        """
        if not entry.is_block:
            raise ValueError(f"entry {entry.sequence} is no block")
        return self._block(entry, *self._read_record(entry))

    def read_blocks(self, entries: Iterable[IndexEntry]) -> Iterator[Block]:
        """Read blocks that :attr:`index` lists; neighbours are read together.

        Raises as :meth:`read_block`.
        """
        # The next run is read while threads compute the checksums of one.
        ahead: Iterator[Block] = iter(())
        for run in self._runs(entries):
            blocks, ahead = ahead, self._begun(run)
            yield from blocks
        yield from ahead

    def read_table(
        self, sequences: NDArray[np.int64], room: Callable[[int], memoryview] = empty
    ) -> BlockTable:
        """Read blocks of one section, given the numbers of their records, rising.

        All is checked but the checksums of payloads: see :meth:`BlockTable.verify`. Bytes that
        must be copied are copied to what ``room`` gives for their number.

        Raises as :meth:`read_block`, of the first block that is damaged or not what the index says.
        """
        if self._digests or not len(sequences):
            return BlockTable.of(list(self.read_blocks(self.records[i] for i in sequences)))
        entries = self.entries.take(sequences)  # an index copies fields one by one
        offsets, lengths = (entries[name].astype(np.int64) for name in ("offset", "length"))
        begins = offsets - offsets[0]
        size = int(begins[-1] + lengths[-1])
        # Bytes between the blocks, of other sections, come along unless they are most.
        if size > 2 * int(lengths.sum()):
            return BlockTable.of(list(self.read_blocks(self.records[i] for i in sequences)))
        data = memoryview(self._read(int(offsets[0]), size, room))

        def parse(row: int, found: int | None) -> Block:
            entry = self.records[sequences[row]]
            own = data[begins[row] : begins[row] + lengths[row]]
            return self._block(entry, *self._open(entry, own), found)

        return read_table(
            data,
            begins,
            entries,
            sequences,
            parse,
            header=self.header,
            seed=self._seed,
            limits=self._limits,
        )

    def _runs(self, entries: Iterable[IndexEntry]) -> Iterator[list[IndexEntry]]:
        """Group entries of neighbouring blocks, up to a number of bytes."""
        # Where nothing is copied, more may be looked at together.
        most = getattr(self._file, "read_ahead", _READ_AHEAD)
        run: list[IndexEntry] = []
        size = 0
        for entry in entries:
            follows = run and entry.offset == run[-1].offset + run[-1].length
            if run and not (follows and size + entry.length <= most):
                yield run
                run, size = [], 0
            run.append(entry)
            size += entry.length
        if run:
            yield run

    def _begun(self, entries: list[IndexEntry]) -> Iterator[Block]:
        """Read neighbouring blocks and start computing their checksums on several threads.

        A fault is raised in its turn, after the blocks before it.
        """
        start, size = entries[0].offset, sum(entry.length for entry in entries)
        records: list[tuple[RecordHeader, memoryview]] = []
        fault: Exception | None = None
        try:
            data = memoryview(self._read(start, size))
            for entry in entries:
                at = entry.offset - start
                records.append(self._open(entry, data[at : at + entry.length]))
        except Exception as error:  # whatever a file raises, too
            fault = error
        sums = begin(RecordHeader.checksum, records, size)

        def blocks() -> Iterator[Block]:
            for entry, record, found in zip(entries, records, sums(), strict=False):
                yield self._block(entry, *record, found)
            if fault is not None:
                raise fault

        return blocks()

    def _block(
        self, entry: IndexEntry, record: RecordHeader, rest: memoryview, expected: int | None = None
    ) -> Block:
        try:
            block, found = open_record(
                record, rest, entry.offset, self.header, self._limits, expected
            )
        except ChecksumError as error:
            several = len(self.header.geometry.sections) > 1
            of = f" of section {entry.section}" if several else ""
            last = entry.start + entry.tokens - 1
            raise ChecksumError(f"tokens {entry.start} to {last}{of}: {error}") from None
        # Bytes, because zeros with either sign are equal.
        if not isinstance(block, Block) or found.pack() != entry.pack():
            raise FormatError(
                f"record {entry.sequence} at byte {entry.offset} differs from the index: "
                f"{found.differences(entry)}: the writer is at fault"
            )
        return block

    def user_records(self) -> Iterator[bytes]:
        """The payloads of USER records, in the order of the stream."""
        for entry in self.records:
            if entry.type == RecordType.USER:
                record, data = self._read_record(entry)
                yield bytes(record.open(data, entry.offset))

    def encoder_state(self) -> bytes:
        """The payload of the ENCODER record at the end; empty if there is none."""
        end = [e for e in self.records[-3:] if e.type != RecordType.AUTH][-2:]
        if [e.type for e in end] != [RecordType.ENCODER, RecordType.INDEX]:
            return b""
        record, data = self._read_record(end[0])
        return bytes(record.open(data, end[0].offset))

    def _authenticate(self) -> bytes:
        """Check the AUTH record; returns the digests of the records before it."""
        if len(self.records) < 2 or self.records[-2].type != RecordType.AUTH:
            raise AuthenticationError(
                "the stream was written without a key: do not use it if it should have one"
            )
        auth = self.records[-2]
        record, data = self._read_record(auth)
        entries = b"".join(entry.pack() for entry in self.records[:-2])
        payload = bytes(record.open(data, auth.offset))
        return open_auth(payload, self._key, self._opening_digest, entries)

    @property
    def end(self) -> int:
        """Offset of the end of the stream; after recovery, bytes beyond it are not part of it."""
        if not self.records:
            return self.sizes.header
        last = self.records[-1]
        trailer = TRAILER_SIZE if last.type == RecordType.INDEX else 0
        return last.offset + last.length + trailer

    def continued(self, token_digest: bytes = b"") -> StreamWriter:
        """A writer that goes on at :attr:`end`, superseding tail, index and trailer."""
        order = Order(self.header, self.sizes.header)
        for entry in self.records:
            order.accept(entry)
        entries = b"".join(entry.pack() for entry in self.records)
        writer = StreamWriter(replace(self.header, token_digest=token_digest), self._key)
        digests = self._digests
        if self._key:  # the AUTH record and the index do not have their own
            digests += b"".join(digest(self._read(e.offset, e.length)) for e in self.records[-2:])
        writer.resume(order, entries, self._seed, self._opening_digest, digests)
        return writer

    def _read(self, offset: int, size: int, room: Callable[[int], memoryview] = empty) -> bytes:
        """Read bytes: a ``bytes`` object, or a view of memory that is not written to any more."""
        file, read = self._file, 0
        file.seek(offset)
        fills = isinstance(file, io.BufferedReader | io.FileIO) or getattr(file, "fills", False)
        fill = getattr(file, "readinto", None) if fills and size >= LARGE else None
        if fill is not None:
            buffer = room(size)
            while count := fill(buffer[read:]):
                read += count
            data = cast(bytes, buffer[:read].toreadonly())
        else:
            pieces = []
            while read < size and (piece := file.read(size - read)):
                pieces.append(piece)
                read += len(piece)
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if read < size:
            raise TruncatedError(
                f"the file ends {size - read} bytes before byte {offset + size}, which it had when "
                "it was opened: somebody is changing it"
            )
        return data

    def _read_record(self, entry: IndexEntry) -> tuple[RecordHeader, memoryview]:
        return self._open(entry, self._read(entry.offset, entry.length))

    def _open(self, entry: IndexEntry, data: bytes | memoryview) -> tuple[RecordHeader, memoryview]:
        if self._digests:
            check_digest(self._digests, entry.sequence, data)
        record = RecordHeader.unpack(
            bytes(data[:RECORD_HEADER_SIZE]),
            sequence=entry.sequence,
            seed=self._seed,
            offset=entry.offset,
            limits=self._limits,
        )
        if (record.type, record.length) != (entry.type, entry.length):
            raise FormatError(
                f"record {entry.sequence} at byte {entry.offset} has type {record.type} and "
                f"{record.length} bytes, expected type {entry.type} and {entry.length} bytes"
            )
        return record, memoryview(data)[RECORD_HEADER_SIZE:]

    def _usual_index(self, start: int, total: int) -> tuple[NDArray[Any], int] | None:
        """:meth:`_read_index`, if the stream was written in one go and its end is what its writer
        would write; everything else is for that to read, or to refuse. So is all where nobody has
        imported Numba, which takes longer than to go without."""
        if "numba" not in sys.modules:
            return None
        from kvtc_stream.formats.usual import usual_entries

        limits, end = self._limits, total - TRAILER_SIZE
        if end < start + RECORD_OVERHEAD:
            return None
        found = self._read(end, TRAILER_SIZE)
        trailer = Trailer.told(found)
        begin, sequence = trailer.index_offset, trailer.records - 1
        size = end - begin - RECORD_OVERHEAD
        if not (0 <= size <= limits.max_record_bytes and 0 <= sequence < limits.max_records):
            return None
        if begin < start or trailer.total_size != total or found != trailer.pack(self._seed):
            return None
        record = memoryview(self._read(begin, end - begin))
        head, seed = record_head(RecordType.INDEX, size, sequence=sequence, seed=self._seed)
        payload, prefix = record[RECORD_HEADER_SIZE:-CHECKSUM_SIZE], pack_index(sequence, b"")
        last = record_end([payload], seed)
        if record[: len(head)] != head or record[-len(last) :] != last:
            return None
        entries = payload[len(prefix) :]
        usual = usual_entries(entries, self.header, start, limits)
        if usual is None or len(usual) != sequence or payload[: len(prefix)] != prefix:
            return None
        if start + int(usual["length"].sum()) != begin:
            return None
        where = IndexEntry(sequence, begin, end - begin, RecordType.INDEX)
        return np.frombuffer(bytes(entries) + where.pack(), ENTRY), total - begin

    def _read_index(self, start: int, total: int) -> tuple[NDArray[Any], int]:
        """Read the index; returns all entries, :data:`ENTRY`, and the size of index and trailer.

        The first record is at ``start``, the file has ``total`` bytes.
        """
        end = total - TRAILER_SIZE
        if end < start + RECORD_OVERHEAD:
            raise _truncated(total, start + RECORD_OVERHEAD + TRAILER_SIZE, "its index")
        data = self._read(end, TRAILER_SIZE)
        if not Trailer.is_present(data):
            raise TruncatedError(
                f"no trailer in the last {TRAILER_SIZE} of {total} bytes: somebody is appending, "
                "the write was cut off, or bytes were added; open it again when who appends is "
                "done, fetch it again, or read its whole blocks with recover=True or `kvtc repair`"
            )
        trailer = Trailer.unpack(data, self._seed, end)
        size = end - trailer.index_offset
        if not (start <= trailer.index_offset and size >= RECORD_OVERHEAD and trailer.records):
            raise FormatError(
                f"trailer at byte {end}: {trailer} cannot be, expected an index between "
                f"bytes {start} and {end}: bytes are missing or added; fetch the stream again"
            )
        limits = self._limits
        limits.check("max_record_bytes", size - RECORD_OVERHEAD, "the index's payload length")
        sequence = trailer.records - 1
        where = IndexEntry(sequence, trailer.index_offset, size, RecordType.INDEX)
        record, rest = self._read_record(where)
        payload = record.open(rest, where.offset)
        order = Order(self.header, start)
        entries = unpack_index(payload, "index", where.offset + RECORD_HEADER_SIZE, limits)
        with located("index"):
            for entry in entries:
                order.accept(entry)
            check_trailer(trailer, order, total)
            order.accept(where)
        return _packed([*entries, where]), total - trailer.index_offset

    def _scan(self, start: int) -> list[IndexEntry]:
        """Find the complete records before the first fault; returns their entries.

        Records after a trailer count once they hold as many tokens as they superseded.
        """
        parser = StreamParser(self._limits)
        entries: list[IndexEntry] = []
        self._file.seek(0)
        try:
            while not parser.eof and (data := self._file.read(_RECOVERY_CHUNK)):
                entries += [entry for _, entry in parser.feed_records(data) if entry is not None]
            parser.close()
        except FormatError as error:
            self.fault = error
        order = Order(self.header, start)
        ended, tokens = len(entries), [0] * len(order.tokens)
        for i, entry in enumerate(entries):
            order.accept(entry)
            if order.ended:
                ended, tokens = i + 1, list(order.tokens)
        lost = any(a < b for a, b in zip(order.tokens, tokens, strict=True))
        return entries[:ended] if lost else entries


def _packed(entries: Sequence[IndexEntry]) -> NDArray[Any]:
    return np.frombuffer(b"".join(entry.pack() for entry in entries), ENTRY)


def _truncated(found: int, expected: int, what: str) -> TruncatedError:
    return TruncatedError(
        f"the stream ends after {found} bytes within {what}, at least {expected} were expected: "
        "fetch it again"
    )
