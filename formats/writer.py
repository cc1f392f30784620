"""Writing a stream front to back."""

from __future__ import annotations

from collections.abc import Iterable

from kvtc_stream.errors import StateError
from kvtc_stream.formats.auth import digest, pack_auth
from kvtc_stream.formats.block import Block
from kvtc_stream.formats.block_run import BlockRun, records_of
from kvtc_stream.formats.features import names
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.index import IndexEntry, Order, Trailer, pack_index
from kvtc_stream.formats.preamble import pack_opening
from kvtc_stream.formats.record import (
    RECORD_OVERHEAD,
    RecordType,
    record_end,
    record_head,
)
from kvtc_stream.formats.wire import ByteWriter
from kvtc_stream.io.memory import Piece, Sealed, SealedRows, singly
from kvtc_stream.io.threads import spread


class StreamWriter:
    """Turns a header and blocks into bytes, to be written one after the other.

    Call :meth:`start` once, then :meth:`block` and :meth:`user` in any number, then
    :meth:`finish`. One from :meth:`StreamFile.continued` writes what follows a stream. A call
    that raises ``ValueError`` leaves the stream as it was. Keeps 88 bytes per record. Not
    thread-safe. With a ``key``, readers that have it can authenticate the stream.
    """

    def __init__(self, header: StreamHeader, key: bytes = b"") -> None:
        self._header, self._key = header, key
        self._seed, self._opening_digest = 0, b""
        self._digests = bytearray()
        self._order: Order | None = None
        self._entries = bytearray()
        self._started = self._finished = False

    @property
    def offset(self) -> int:
        """Bytes produced so far."""
        return self._order.offset if self._order else 0

    def resume(
        self, order: Order, entries: bytes, seed: int, opening_digest: bytes, digests: bytes
    ) -> None:
        """Go on after the records that ``order``, ``entries`` and ``digests`` tell of."""
        self._order, self._seed = order, seed
        self._opening_digest = opening_digest
        self._entries[:], self._digests[:] = entries, digests

    @property
    def tokens(self) -> list[int]:
        """Tokens of each section so far."""
        return self._running().tokens

    def start(self) -> bytes:
        """Preamble and header; for a continued stream, a SUPERSEDE record."""
        if self._started:
            raise StateError("the stream has been started; use a new StreamWriter")
        self._started = True
        if self._order is None:
            opening, self._seed = pack_opening(self._header)
            self._opening_digest = digest(opening) if self._key else b""
            self._order = Order(self._header, len(opening))
            return opening
        # What was recovered gets an end first: its tail may be all that holds some tokens.
        end = b"" if self._order.ended else self._end()
        payload = ByteWriter()
        payload.digest(self._header.token_digest)
        return end + self._record(RecordType.SUPERSEDE, payload.getvalue())

    def block(self, block: Block) -> bytes:
        """Pack a block, which must follow the tokens of its section so far."""
        return b"".join(self.sealed(self.begin_blocks(block)))

    def begin_blocks(self, blocks: Block | BlockRun) -> list[Sealed | SealedRows]:
        """As :meth:`block`, of blocks whose payloads may not have come yet, and whose bytes are not
        copied.

        With a key :meth:`sealed` must be called of all such records, in order.
        """
        if isinstance(blocks, Block):
            return [self._begin_block(blocks)]
        many = records_of(blocks, self._header, self._running(), self._seed)
        if many is None:
            return [self._begin_block(block) for block in blocks]
        self._entries += many[1]
        return [many[0]]

    def sealed(self, pieces: Iterable[Piece]) -> list[bytes | memoryview]:
        """All bytes of pieces, records among them, whose payloads have come."""
        each = list(singly(pieces))
        records = [x for x in each if isinstance(x, Sealed)]
        checksums = iter(
            spread(Sealed.checksum, [(x,) for x in records], sum(x.size for x in records))
        )
        out: list[bytes | memoryview] = []
        for piece in each:
            if not isinstance(piece, Sealed):
                out.append(piece)
                continue
            record = [*piece.pieces, next(checksums)]
            out += record
            if self._key:
                self._digests += digest(*record)
        return out

    def user(self, data: bytes) -> bytes:
        """Pack a USER record, which readers of blocks skip."""
        return self._record(RecordType.USER, bytes(data))

    def encoder(self, state: bytes) -> bytes:
        """Pack an ENCODER record, for who continues the stream; :meth:`finish` comes next."""
        return self._record(RecordType.ENCODER, state)

    def finish(self) -> bytes:
        """Index and trailer; nothing can follow."""
        end = self._end()
        self._finished = True
        return end

    def _end(self) -> bytes:
        order = self._running()
        auth = b""
        if self._key:
            parts = self._opening_digest, bytes(self._entries), bytes(self._digests)
            auth = self._record(RecordType.AUTH, pack_auth(self._key, *parts))
        start, records = order.offset, order.sequence + 1
        index = self._record(RecordType.INDEX, pack_index(order.sequence, self._entries))
        return auth + index + Trailer(start, order.offset, records).pack(self._seed)

    def _record(self, record_type: RecordType, payload: bytes) -> bytes:
        head, seed = self._begin(record_type, len(payload), None)
        record = b"".join((head, payload, record_end([payload], seed)))
        if self._key:
            self._digests += digest(record)
        return record

    def _begin_block(self, block: Block) -> Sealed:
        block.check(self._header)
        if missing := block.features & ~self._header.features:
            raise ValueError(
                f"the block needs {names(missing)}, which the header's features have not: "
                "a stream's first bytes say what its blocks may have"
            )
        payload = block.pack()
        head, seed = self._begin(RecordType.BLOCK, sum(map(len, payload)), block)
        return Sealed([head, *payload], seed)

    def _begin(self, record_type: RecordType, size: int, block: Block | None) -> tuple[bytes, int]:
        """Count a record; returns its packed header and the seed of its payload's checksum."""
        order = self._running()
        section = block.section if block else 0
        head, seed = record_head(
            record_type, size, sequence=order.sequence, seed=self._seed, section=section
        )
        length = RECORD_OVERHEAD + size
        entry = IndexEntry.of(order.sequence, order.offset, length, record_type, block)
        order.accept(entry)
        self._entries += entry.pack()
        return head, seed

    def _running(self) -> Order:
        if self._order is None or not self._started or self._finished:
            state = "finished" if self._finished else "not started"
            raise StateError(f"the stream is {state}; call start(), blocks, finish() once each")
        return self._order
