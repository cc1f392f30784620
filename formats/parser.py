"""Bytes to blocks: a stream read front to back, cut anywhere. No files here."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import xxhash

from kvtc_stream.errors import FormatError, KVTCError, StateError, TruncatedError
from kvtc_stream.formats.block import Block
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.index import TRAILER_SIZE, IndexEntry, Order, Trailer, pack_index
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.preamble import PREAMBLE_SIZE, Preamble, check_magic
from kvtc_stream.formats.record import (
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RecordHeader,
    RecordType,
)
from kvtc_stream.formats.wire import ByteReader, located

#: The header and no entry, or a record's block, if it is one, and its index entry.
ParsedItem = tuple[StreamHeader | Block | None, IndexEntry | None]


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
        self._ready: list[ParsedItem] = []
        self._offset = 0
        self._eof = self._done = False
        self._error: KVTCError | None = None
        self._steps = self._parse()
        self._needed = next(self._steps)

    @property
    def eof(self) -> bool:
        """Whether the stream is complete: the trailer was read, all before it is valid."""
        return self._eof

    @property
    def error(self) -> KVTCError | None:
        """The first fault, even if it has not been raised yet."""
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
        return [item for item, _ in self.feed_records(data) if item is not None]

    def close(self) -> None:
        """End the input; raises ``TruncatedError`` when the stream is not complete."""
        if self._error is None and not self._eof:
            found = self._offset + len(self._buffer)
            self._error = TruncatedError(
                f"the stream ends after {found} bytes, at least "
                f"{self._offset + self._needed} were expected: fetch the rest, or open it with "
                "recover=True (kvtc repair) for its whole blocks"
            )
        if self._error is not None:
            raise self._error

    def feed_records(self, data: bytes | bytearray | memoryview) -> list[ParsedItem]:
        """Parse more bytes, as :meth:`feed`; with the index entry of every record."""
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
        """Parse the stream; yields how many bytes are needed next, and is sent them."""
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
            item, entry = open_record(record, rest, order.offset, header, limits)
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
                check_trailer(trailer, order, self._offset)
                self._eof = True
            with located(f"record {order.sequence} at byte {order.offset}"):
                order.accept(entry)
            entries.update(entry.pack())
            self._ready.append((item, entry))


def open_record(
    record: RecordHeader,
    data: bytes | memoryview,
    offset: int,
    header: StreamHeader,
    limits: Limits,
    expected: int | None = None,
) -> tuple[Block | StreamHeader | None, IndexEntry]:
    """Verify and parse what follows a record's header; returns its content and index entry.

    The content is a block, the stream's new header for a SUPERSEDE record, or ``None``.
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


def check_trailer(trailer: Trailer, order: Order, total: int) -> None:
    """Raise ``FormatError`` unless the trailer describes the records before it."""
    expected = Trailer(order.offset, total, order.sequence + 1)
    if trailer != expected:
        raise FormatError(
            f"the trailer is {trailer}, expected {expected}: bytes are missing or added; "
            "fetch the stream again"
        )
