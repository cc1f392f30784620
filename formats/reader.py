"""Reading a stream: front to back from a pipe, or any block from a file."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, cast

import xxhash

from kvtc_stream.errors import (
    AuthenticationError,
    FormatError,
    KVTCError,
    StateError,
    TruncatedError,
    UnsupportedError,
)
from kvtc_stream.formats.auth import check_digest, digest, open_auth
from kvtc_stream.formats.block import Block
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.index import (
    TRAILER_SIZE,
    IndexEntry,
    Order,
    Trailer,
    live_blocks,
    pack_index,
    unpack_index,
)
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.preamble import PREAMBLE_SIZE, Preamble, check_magic
from kvtc_stream.formats.record import (
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_OVERHEAD,
    RecordHeader,
    RecordType,
)
from kvtc_stream.formats.wire import ByteReader, located
from kvtc_stream.formats.writer import StreamWriter
from kvtc_stream.io.memory import LARGE, empty
from kvtc_stream.io.threads import begin

_RECOVERY_CHUNK = 1 << 20
#: Most bytes of neighbouring blocks that are read at a time.
_READ_AHEAD = 8 << 20


# What the parser found: the header, or a record's entry with its block, if it is one.
_Item = tuple[StreamHeader | Block | None, IndexEntry | None]


class SeekableFile(Protocol):
    """What :class:`StreamFile` needs of a binary file."""

    def read(self, size: int, /) -> bytes | None: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...


class StreamParser:
    """Turns the bytes of a stream, cut anywhere, into its header and blocks.

    Every checksum, the order of records and tokens, and the index and trailer are checked. Memory
    is one record and what was fed beyond it. Not thread-safe.

    The first fault makes the parser fail for good. What lies whole before it is still returned,
    so that the result does not depend on how the bytes were cut: when the call that meets the
    fault has something to return, the next call (:meth:`feed` or :meth:`close`) raises. Bytes are
    a whole stream only after :attr:`eof` is true or :meth:`close` returned.

    A stream that was appended to goes on after its first trailer: then :attr:`eof` becomes false
    again, and the header comes again. Blocks with role ``TAIL`` that came before are superseded.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._buffer = bytearray()
        self._ready: list[_Item] = []
        self._offset = 0
        self._eof = self._done = False
        self._error: KVTCError | None = None
        self._steps = self._parse()
        self._needed = next(self._steps)

    @property
    def eof(self) -> bool:
        """Whether the trailer was read and everything before it is right."""
        return self._eof

    @property
    def error(self) -> KVTCError | None:
        """The fault that was met, even if it is yet to be raised."""
        return self._error

    @property
    def unused_data(self) -> bytes:
        """Bytes that follow the trailer; empty before :attr:`eof`."""
        return bytes(self._buffer) if self._eof else b""

    def feed(self, data: bytes | bytearray | memoryview) -> list[StreamHeader | Block]:
        """Parse more bytes.

        Returns
        -------
        list
            What became whole: the header first, then blocks in the order of the stream; a header
            again where the stream was appended to.

        Raises
        ------
        FormatError
            The bytes so far are no stream; see the class for when.
        """
        return [item for item, _ in self._feed(data) if item is not None]

    def close(self) -> None:
        """Say that no bytes follow; raises ``TruncatedError`` when the stream is not whole."""
        if self._error is None and not self._eof:
            found = self._offset + len(self._buffer)
            self._error = TruncatedError(
                f"the stream ends after {found} bytes, at least "
                f"{self._offset + self._needed} were expected: fetch the rest, or open the file "
                "for recovery to read the whole blocks"
            )
        if self._error is not None:
            raise self._error

    def _feed(self, data: bytes | bytearray | memoryview) -> list[_Item]:
        if self._error is not None:
            raise self._error
        self._buffer += memoryview(data)
        try:
            if self._offset == 0:
                check_magic(self._buffer)
            while not self._done and len(self._buffer) >= self._needed:
                if self._eof and not self._buffer.startswith(RECORD_MAGIC):
                    self._done = True  # what follows is not of this stream
                    break
                self._eof = False
                piece = bytes(memoryview(self._buffer)[: self._needed])
                del self._buffer[: self._needed]
                self._offset += self._needed
                self._needed = self._steps.send(piece)
        except KVTCError as error:
            self._error = error
            self._buffer.clear()
        except BaseException:
            self._error = StateError("an earlier call was interrupted; use a new StreamParser")
            raise
        ready, self._ready = self._ready, []
        if self._error is not None and not ready:
            raise self._error
        return ready

    def _parse(self) -> Generator[int, bytes, None]:
        """Yields how many bytes it needs next and is sent them."""
        limits = self._limits
        preamble = Preamble.unpack((yield PREAMBLE_SIZE), limits)
        header, seed = preamble.open((yield preamble.header_size), limits)
        self._ready.append((header, None))
        order = Order(header, self._offset)
        # The index is compared by digest, so that memory does not grow with the stream.
        entries = xxhash.xxh3_128()
        while True:
            record = RecordHeader.unpack(
                (yield RECORD_HEADER_SIZE),
                sequence=order.sequence,
                seed=seed,
                offset=order.offset,
                limits=limits,
            )
            rest = yield record.length - RECORD_HEADER_SIZE
            item, entry = _open_record(record, rest, order.offset, header, limits)
            if record.type == RecordType.INDEX:
                payload = record.open(rest, order.offset)
                start = len(pack_index(0, b""))
                expected = pack_index(order.sequence, b"")
                digest = xxhash.xxh3_128_digest(payload[start:])
                if payload[:start] != expected or digest != entries.digest():
                    raise FormatError(
                        f"record {order.sequence} (INDEX) at byte {order.offset} does not list the "
                        f"{order.sequence} records before it: the writer is at fault"
                    )
                trailer = Trailer.unpack((yield TRAILER_SIZE), seed, self._offset - TRAILER_SIZE)
                _check_trailer(trailer, order, self._offset)
                self._eof = True
            with located(f"record {order.sequence} at byte {order.offset}"):
                order.accept(entry)
            entries.update(entry.pack())
            self._ready.append((item, entry))


@dataclass(frozen=True, slots=True)
class StreamSizes:
    """Bytes of a stream: preamble and header, index and trailer, everything."""

    header: int
    index: int
    total: int


class StreamFile:
    """Any block of a stream in a seekable binary file.

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
    index
        One entry a block, in the order of the stream, without superseded ones.
    records
        One entry a record, superseded ones too.
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
            entries, index_size = self._read_index(start, total)
        except FormatError as error:
            if not recover:
                raise
            self.fault = error
            entries, index_size = self._scan(start), 0
        self.records = tuple(entries)
        self._opening_digest = digest(opening + body) if key else b""
        if key:
            self._digests = self._authenticate()
        self.index = tuple(live_blocks(entries))
        self.sizes = StreamSizes(start, index_size, total)
        superseding = [e for e in entries if e.type == RecordType.SUPERSEDE]
        if superseding:
            record, data = self._read_record(superseding[-1])
            offset = superseding[-1].offset
            header, _ = _open_record(record, data, offset, self.header, self._limits)
            assert isinstance(header, StreamHeader)
            self.header = header

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
        """Read blocks that :attr:`index` lists; those that lie side by side, in one go.

        Raises as :meth:`read_block`.
        """
        # The next run is read while threads compute the checksums of one.
        ahead: Iterator[Block] = iter(())
        for run in self._runs(entries):
            blocks, ahead = ahead, self._begun(run)
            yield from blocks
        yield from ahead

    def _runs(self, entries: Iterable[IndexEntry]) -> Iterator[list[IndexEntry]]:
        """Entries of blocks that lie side by side, some bytes of them."""
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
        """Blocks side by side, whose checksums several threads begin with; a fault comes in its
        turn."""
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
        block, found = _open_record(record, rest, entry.offset, self.header, self._limits, expected)
        if not isinstance(block, Block) or found != entry:
            raise FormatError(
                f"record {entry.sequence} at byte {entry.offset} differs from the index: "
                f"{found.differences(entry)}: the writer is at fault"
            )
        return block

    def user_records(self) -> Iterator[bytes]:
        """What the user wrote beside the blocks, in the order of the stream."""
        for entry in self.records:
            if entry.type == RecordType.USER:
                record, data = self._read_record(entry)
                yield bytes(record.open(data, entry.offset))

    def encoder_state(self) -> bytes:
        """What the encoder that wrote the end left for one that continues; empty if nothing."""
        end = [e for e in self.records[-3:] if e.type != RecordType.AUTH][-2:]
        if [e.type for e in end] != [RecordType.ENCODER, RecordType.INDEX]:
            return b""
        record, data = self._read_record(end[0])
        return bytes(record.open(data, end[0].offset))

    def _authenticate(self) -> bytes:
        """The digests of the records before the AUTH record; it must be there."""
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
        """Where the stream ends; after recovery, what lies behind is no part of it."""
        if not self.records:
            return self.sizes.header
        last = self.records[-1]
        trailer = TRAILER_SIZE if last.type == RecordType.INDEX else 0
        return last.offset + last.length + trailer

    def continued(self, token_digest: bytes = b"") -> StreamWriter:
        """A writer of what follows at :attr:`end` and supersedes tail, index and trailer."""
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

    def _read(self, offset: int, size: int) -> bytes:
        """Bytes, or a view of memory that nobody writes to, which does for them."""
        file, read = self._file, 0
        file.seek(offset)
        if size >= LARGE and isinstance(file, io.BufferedReader | io.FileIO):
            buffer = empty(size)
            while count := file.readinto(buffer[read:]):
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

    def _read_index(self, start: int, total: int) -> tuple[list[IndexEntry], int]:
        """Entries, and bytes of index and trailer, of a stream whose records begin at start."""
        end = total - TRAILER_SIZE
        if end < start + RECORD_OVERHEAD:
            raise _truncated(total, start + RECORD_OVERHEAD + TRAILER_SIZE, "its index")
        data = self._read(end, TRAILER_SIZE)
        if not Trailer.is_present(data):
            raise TruncatedError(
                f"no trailer in the last {TRAILER_SIZE} of {total} bytes: the write was cut off, "
                "somebody is appending, or bytes were added; fetch the stream again, or read its "
                "whole blocks with recover=True or `kvtc repair`"
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
        entries = unpack_index(payload, "index", where.offset + RECORD_HEADER_SIZE, limits)
        order = Order(self.header, start)
        with located("index"):
            for entry in entries:
                order.accept(entry)
            _check_trailer(trailer, order, total)
            order.accept(where)
        return [*entries, where], total - trailer.index_offset

    def _scan(self, start: int) -> list[IndexEntry]:
        """Entries of the whole records before the first fault.

        Records after a trailer count once they hold as many tokens as they superseded.
        """
        parser = StreamParser(self._limits)
        entries: list[IndexEntry] = []
        self._file.seek(0)
        try:
            while not parser.eof and (data := self._file.read(_RECOVERY_CHUNK)):
                entries += [entry for _, entry in parser._feed(data) if entry is not None]
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


def _open_record(
    record: RecordHeader,
    data: bytes | memoryview,
    offset: int,
    header: StreamHeader,
    limits: Limits,
    expected: int | None = None,
) -> tuple[Block | StreamHeader | None, IndexEntry]:
    """Check what follows a record's header; returns what it holds, and its entry.

    A block, the header as it is from here on where the end was superseded, or nothing.
    ``expected`` is as for :meth:`RecordHeader.open`.
    """
    payload = record.open(data, offset, expected)
    where = f"record {record.sequence} ({record.label}) at byte {offset}"
    reader = ByteReader(payload, where, offset + RECORD_HEADER_SIZE)
    if record.type == RecordType.BLOCK:
        block = Block.unpack(reader, record.section, header, limits)
        return block, IndexEntry.of(record.sequence, offset, record.length, record.type, block)
    entry = IndexEntry.of(record.sequence, offset, record.length, record.type, None)
    if record.type != RecordType.SUPERSEDE:
        return None, entry
    digest = reader.digest("token digest")
    reader.expect_end()
    with located(where):
        return replace(header, token_digest=digest), entry


def _check_trailer(trailer: Trailer, order: Order, total: int) -> None:
    expected = Trailer(order.offset, total, order.sequence + 1)
    if trailer != expected:
        raise FormatError(
            f"the trailer is {trailer}, expected {expected}: bytes are missing or added; "
            "fetch the stream again"
        )


def _truncated(found: int, expected: int, what: str) -> TruncatedError:
    return TruncatedError(
        f"the stream ends after {found} bytes within {what}, at least {expected} were expected: "
        "fetch it again"
    )
