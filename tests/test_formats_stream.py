"""Streams: written, cut, read from a pipe and from a file, damaged."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import second_reader
from formats_samples import (
    PREAMBLE,
    RECORD_HEADER,
    TRAILER,
    later_stream,
    make_block,
    patched,
    records,
    reseal,
    small_header,
    small_stream,
    streams,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc_stream.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    StateError,
    TruncatedError,
    VersionError,
)
from kvtc_stream.formats import (
    Block,
    BlockRun,
    Coder,
    Feature,
    LayerErrors,
    Limits,
    Measure,
    Role,
    StreamFile,
    StreamHeader,
    StreamParser,
    StreamWriter,
)
from kvtc_stream.formats.wire import ByteReader
from kvtc_stream.io.memory import joined
from kvtc_stream.io.sources import open_source

STREAM, HEADER, BLOCKS = small_stream()


def parse(data: bytes, limits: Limits | None = None) -> list[StreamHeader | Block]:
    """What a pipe's reader gets; raises what it raises."""
    parser = StreamParser(limits)
    found = parser.feed(data)
    parser.close()
    return found


def read(data: bytes, limits: Limits | None = None) -> list[StreamHeader | Block]:
    """What a file's reader gets; raises what it raises."""
    file = StreamFile(io.BytesIO(data), limits)
    return [file.header, *map(file.read_block, file.index)]


READERS = pytest.mark.parametrize("reader", [parse, read])


@given(streams(), st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip_however_the_bytes_are_cut(stream, data):
    header, blocks = stream
    encoded = write(header, blocks)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=8)))
    parser = StreamParser()
    found = []
    for a, b in zip([0, *cuts], [*cuts, len(encoded)], strict=True):
        assert parser.eof == (a == len(encoded))
        found += parser.feed(encoded[a:b])
    parser.close()
    assert parser.eof
    assert found == [header, *blocks]
    assert read(encoded) == [header, *blocks]


def test_byte_by_byte():
    parser = StreamParser()
    found = [item for byte in STREAM for item in parser.feed(bytes([byte]))]
    assert found == [HEADER, *BLOCKS]
    assert parser.eof


def test_bytes_after_the_trailer_are_kept_apart():
    parser = StreamParser()
    assert parser.feed(STREAM + b"next") == [HEADER, *BLOCKS]
    assert parser.feed(b" one") == []
    assert parser.unused_data == b"next one"
    parser.close()
    with pytest.raises(TruncatedError, match=r"no trailer.*recover=True"):
        read(STREAM + b"next")


def test_a_stream_without_blocks():
    data = write(HEADER, [])
    assert parse(data) == read(data) == [HEADER]


def test_the_file_says_where_everything_is():
    file = StreamFile(io.BytesIO(STREAM))
    assert [e.offset for e in file.index] == records(STREAM)[:-1]
    assert file.sizes.total == len(STREAM)
    assert file.sizes.header == file.index[0].offset
    assert file.sizes.index == len(STREAM) - file.index[-1].offset - file.index[-1].length
    for entry, block in zip(file.index, BLOCKS, strict=True):
        assert (entry.section, entry.role, entry.start) == (block.section, block.role, block.start)
        assert (entry.first_position, entry.last_position) == (
            block.positions[0],
            block.positions[-1],
        )
        assert (entry.coded_bytes, entry.verbatim_bytes) == (
            len(block.coded),
            len(block.verbatim),
        )
        assert (entry.tokens, entry.verbatim_tokens) == (block.tokens, len(block.verbatim_tokens))
        assert entry.errors == block.errors
    assert file.read_block(file.index[2]) == BLOCKS[2]
    assert file.fault is None


def test_opening_reads_no_blocks():
    class Counting(io.BytesIO):
        calls = 0
        bytes_read = 0

        def read(self, size=-1, /):
            data = super().read(size)
            self.calls += 1
            self.bytes_read += len(data)
            return data

    block = make_block(HEADER, 0, range(4), symbols=bytes(range(256)) * 99)
    counting = Counting(write(HEADER, [block]))
    sizes = StreamFile(counting).sizes
    assert counting.bytes_read == sizes.header + sizes.index
    assert counting.calls <= 4


def test_a_file_that_reads_short():
    class Short(io.BytesIO):
        def read(self, size=-1, /):
            return super().read(min(size, 7))

    file = StreamFile(Short(STREAM))
    assert [file.read_block(e) for e in file.index] == BLOCKS


def test_a_file_that_shrinks_while_it_is_read():
    buffer = io.BytesIO(STREAM)
    file = StreamFile(buffer)
    buffer.truncate(file.index[1].offset + 5)
    assert file.read_block(file.index[0]) == BLOCKS[0]
    with pytest.raises(TruncatedError, match="somebody is changing it"):
        file.read_block(file.index[1])


@pytest.mark.parametrize("ahead", [1, 1 << 20])
@pytest.mark.parametrize("shrunk", [False, True])
def test_a_fault_comes_after_the_blocks_before_it(monkeypatch, ahead, shrunk):
    """Though the next blocks are read, and their checksums begun with, while one is looked at."""
    monkeypatch.setattr("kvtc_stream.formats.file_reader._READ_AHEAD", ahead)
    buffer = io.BytesIO(STREAM)
    file = StreamFile(buffer)
    last = file.index[-1]
    if shrunk:
        buffer.truncate(last.offset + 5)
    else:
        buffer.getbuffer()[last.offset + last.length - 1] ^= 1
    found = file.read_blocks(file.index)
    if ahead == 1 or not shrunk:  # what is read in one go lacks all of it
        assert [next(found) for _ in BLOCKS[:-1]] == BLOCKS[:-1]
    with pytest.raises(FormatError):
        next(found)


def test_an_interrupted_parser_does_not_go_on(monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    parser = StreamParser()
    with monkeypatch.context() as patch:
        patch.setattr(Block, "unpack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            parser.feed(STREAM)
    for call in (parser.close, lambda: parser.feed(b"")):
        with pytest.raises(StateError, match="interrupted"):
            call()


def test_user_records_travel_beside_the_blocks():
    writer = StreamWriter(HEADER)
    data = writer.start() + writer.user(b"first") + writer.block(BLOCKS[0])
    data += writer.user(b"") + writer.finish()
    assert writer.offset == len(data)
    assert parse(data) == read(data) == [HEADER, BLOCKS[0]]
    assert list(StreamFile(io.BytesIO(data)).user_records()) == [b"first", b""]
    recovered = StreamFile(io.BytesIO(data[:-1]), recover=True)
    assert list(recovered.user_records()) == [b"first", b""]


def test_overhead_is_small():
    header = replace(HEADER, block_tokens=128)
    blocks = [
        make_block(header, 128 * i, range(128 * i, 128 * i + 128), symbols=bytes(187_500))
        for i in range(32)
    ]
    data = write(header, blocks)
    payload = sum(len(b.coded) for b in blocks)
    assert (len(data) - payload) / payload <= 0.002


@READERS
def test_after_superseding_it_goes_on_as_if_there_had_been_no_tail(reader):
    """Sinks may follow, where only sinks came before the tail."""
    writer = StreamWriter(HEADER)
    data = writer.start() + writer.block(BLOCKS[0])
    data += writer.block(replace(BLOCKS[2], start=1)) + writer.finish()
    writer = StreamFile(io.BytesIO(data)).continued()
    sinks = replace(BLOCKS[0], start=1, positions=range(1, 2))
    rest = [sinks, replace(BLOCKS[1], start=2, positions=array("q", (2, 3, 5)))]
    data += writer.start() + b"".join(map(writer.block, rest)) + writer.finish()
    found = [b for b in reader(data) if isinstance(b, Block) and b.role is not Role.TAIL]
    assert found == [BLOCKS[0], *rest]
    second_reader.read_stream(data)


# Damage


def every_bit_flip(stream):
    for i in range(len(stream)):
        for bit in range(8):
            data = bytearray(stream)
            data[i] ^= 1 << bit
            yield i, bytes(data)


SAMPLES = pytest.mark.parametrize("sample", [small_stream, later_stream])


@SAMPLES
def test_every_flipped_bit_is_an_error_in_a_pipe(sample):
    stream, header, blocks = sample()
    for place, data in every_bit_flip(stream):
        parser = StreamParser()
        found = []
        with contextlib.suppress(FormatError):
            found = parser.feed(data)
        assert found == [header, *blocks][: len(found)], place
        with pytest.raises(FormatError):
            parser.close()


@SAMPLES
def test_every_flipped_bit_is_an_error_in_a_file(sample):
    for _, data in every_bit_flip(sample()[0]):
        with pytest.raises(FormatError):
            read(data)


def test_every_missing_end_is_found_and_what_is_whole_is_recovered():
    ends = records(STREAM)[1:]
    for size in range(len(STREAM)):
        data = STREAM[:size]
        whole = sum(end <= size for end in ends)
        parser = StreamParser()
        found = parser.feed(data)
        assert found[1:] == BLOCKS[:whole]
        with pytest.raises(TruncatedError, match=f"ends after {size} bytes"):
            parser.close()
        with pytest.raises(TruncatedError):
            read(data)
        if size >= records(STREAM)[0]:
            file = StreamFile(io.BytesIO(data), recover=True)
            assert [file.read_block(e) for e in file.index] == BLOCKS[:whole]
            assert isinstance(file.fault, TruncatedError)


def test_a_fault_among_large_blocks_comes_after_those_before_it(tmp_path):
    """Large blocks are read together, and verified on several threads."""
    header = small_header()
    large = bytes(range(256)) * (3 << 10)  # 768 KiB
    blocks = [make_block(header, 2 * i, range(2 * i, 2 * i + 2), symbols=large) for i in range(6)]
    stream = write(header, blocks)
    (tmp_path / "large").write_bytes(stream)
    for source in (tmp_path / "large", io.BytesIO(stream), stream, bytearray(stream)):
        with open_source(source) as opened:
            file = StreamFile(opened)
            assert list(file.read_blocks(file.index)) == blocks
    for at, (first, last) in enumerate(itertools.pairwise(records(stream)[:7])):
        for place in (first + 5, (first + last) // 2, last - 1):
            data = bytearray(stream)
            data[place] ^= 4
            file = StreamFile(io.BytesIO(data))
            found = file.read_blocks(file.index)
            assert list(itertools.islice(found, at)) == blocks[:at]
            with pytest.raises(FormatError, match=f"record {at} "):
                next(found)


def test_recovery_stops_at_the_first_fault():
    data = bytearray(STREAM)
    data[records(STREAM)[1] + RECORD_HEADER] ^= 1
    file = StreamFile(io.BytesIO(bytes(data[:-1])), recover=True)
    assert [file.read_block(e) for e in file.index] == BLOCKS[:1]
    assert isinstance(file.fault, ChecksumError)


def test_recovery_of_a_stream_with_bytes_added():
    file = StreamFile(io.BytesIO(STREAM + b"\0"), recover=True)
    assert [file.read_block(e) for e in file.index] == BLOCKS
    assert isinstance(file.fault, TruncatedError)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_a_format_error_or_none_at_all(data):
    stream = bytearray(STREAM)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(stream) - 1))
        size = data.draw(st.integers(0, 8))
        stream[at : at + size] = data.draw(st.binary(max_size=8))
    for reader in (parse, read):
        try:
            found = reader(bytes(stream))
        except FormatError:
            continue
        assert isinstance(found[0], StreamHeader)
        assert all(isinstance(block, Block) for block in found[1:])


@pytest.mark.parametrize("sample", [small_stream, later_stream])
@given(where=st.integers(0, 10**9), value=st.binary(min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_nonsense_with_right_checksums(sample, where, value):
    """Behind right checksums no bytes whatsoever raise anything but ``FormatError``."""
    stream = sample()[0]
    starts = records(stream)
    keep = {*range(24, 40)} | {o + i for o in starts for i in range(16, 24)}
    at = where % (len(stream) - TRAILER)
    data = bytearray(stream)
    for i, byte in enumerate(value, at):
        if i < len(data) and i not in keep:
            data[i] = byte
    if any(data[o : o + 4] != b"KVTR" for o in starts):
        return  # the helper could not find the records either
    stream = reseal(data)
    for reader in (parse, read):
        try:
            found = reader(stream)
        except FormatError:
            continue
        assert isinstance(found[0], StreamHeader)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_random_bytes(data):
    for prefix in (b"", STREAM[:8], STREAM[:40], STREAM[: records(STREAM)[0]]):
        with pytest.raises(FormatError):
            parse(prefix + data)
        with pytest.raises(FormatError):
            read(prefix + data)


def test_a_failed_parser_stays_failed():
    data = bytearray(STREAM)
    data[records(STREAM)[1] + RECORD_HEADER] ^= 1
    parser = StreamParser()
    assert parser.feed(bytes(data)) == [HEADER, BLOCKS[0]]
    with pytest.raises(ChecksumError) as first:
        parser.feed(b"")
    with pytest.raises(ChecksumError) as second:
        parser.close()
    assert first.value is second.value
    assert not parser.eof


def test_what_is_no_bytes_is_a_type_error_and_harmless():
    parser = StreamParser()
    with pytest.raises(TypeError):
        parser.feed("text")
    assert parser.feed(STREAM) == [HEADER, *BLOCKS]


@READERS
def test_a_block_of_another_stream_is_rejected(reader):
    other = replace(HEADER, metadata='{"other": 1}')
    a, b = records(STREAM)[1:3]
    foreign = write(other, BLOCKS)
    c, d = records(foreign)[1:3]
    assert b - a == d - c
    with pytest.raises(ChecksumError, match="belong to another stream"):
        reader(STREAM[:a] + foreign[c:d] + STREAM[b:])


@READERS
def test_equal_blocks_cannot_change_places(reader):
    blocks = [make_block(HEADER, i, range(i, i + 1), symbols=b"ab") for i in range(2)]
    data = write(HEADER, blocks)
    a, b, c = records(data)
    with pytest.raises(FormatError, match="missing, repeated or out of order"):
        reader(data[:a] + data[b:c] + data[a:b] + data[c:])
    payload = slice(a + RECORD_HEADER, b), slice(b + RECORD_HEADER, c)
    swapped = bytearray(data)
    swapped[payload[0]], swapped[payload[1]] = data[payload[1]], data[payload[0]]
    with pytest.raises(ChecksumError, match="payload"):
        reader(bytes(swapped))


@READERS
def test_a_missing_block_is_found(reader):
    a, b = records(STREAM)[1:3]
    with pytest.raises(FormatError):
        reader(STREAM[:a] + STREAM[b:])


# One field changed, checksums right

FIRST, DATA, TAIL, INDEX = records(STREAM)
PAYLOAD = DATA + RECORD_HEADER
ENTRIES = INDEX + RECORD_HEADER + 4
END = len(STREAM) - TRAILER
PATCHES = {
    "magic": (0, "B", 0x0B, FormatError, "no kvtc stream"),
    "line ends": (4, "4s", b"\n\x1a\n\0", FormatError, "copied as text"),
    "major version": (8, "H", 2, VersionError, r"is 2\.0, this reader knows 1\.x; .* newer"),
    "old version": (8, "HH", 0, 3, VersionError, r"is 0\.3, this reader knows 1\.x; .* wrote it"),
    "feature": (12, "I", 4, VersionError, "features at byte 12 are 0x4.* not ROTARY_TABLES"),
    "features": (10, "HI", 9, 1 << 31 | 32, VersionError, "not UNKNOWN_POSITIONS and 0x8.*newer"),
    "features of 1.0": (12, "I", 1, VersionError, r"0x1, but version 1\.0 has none"),
    "no axes": (10, "HI", 1, 2, FormatError, "header has no rotary tables with axes"),
    "checksum algorithm": (20, "I", 2, VersionError, "checksum algorithm at byte 20 is 2"),
    "dtype": (PREAMBLE, "B", 77, VersionError, r"header, dtype at byte 40 is 77"),
    "coder": (PREAMBLE + 2, "B", 6, VersionError, r"coder at byte 42 is 6.*5 \(PLANES\)"),
    "coder of values": (PREAMBLE + 2, "B", 5, FormatError, "PLANES codes verbatim values"),
    "header reserved": (PREAMBLE + 3, "B", 1, FormatError, "reserved at byte 43 must be zero"),
    "block tokens": (PREAMBLE + 12, "I", 0, FormatError, "block_tokens must be from 1"),
    "many block tokens": (PREAMBLE + 12, "I", 1 << 20, LimitError, "max_block_tokens=1048576"),
    "record magic": (DATA, "4s", b"KVTX", FormatError, "expected b'KVTR'"),
    "unknown record": (DATA + 4, "B", 9, VersionError, "unknown type 9 and may not be skipped"),
    "record flags": (DATA + 5, "B", 2, FormatError, "flags, reserved and section are 2, 0, 0"),
    "section": (DATA + 6, "H", 1, FormatError, "section 1 is not one of 1"),
    "sequence": (DATA + 8, "I", 7, FormatError, "record 1 at byte .* is numbered 7"),
    "record reserved": (DATA + 12, "I", 1, FormatError, "expected 0, 0, 0"),
    "tokens": (PAYLOAD, "I", 2, FormatError, "expected|found|needs"),
    "no tokens": (PAYLOAD, "II", 0, 0, FormatError, "0 of 0 tokens are verbatim"),
    "many tokens": (PAYLOAD, "I", 1 << 20, LimitError, "at byte .*, tokens is .*max_block_tokens"),
    "verbatim count": (PAYLOAD + 4, "I", 9, FormatError, "9 of 3 tokens are verbatim"),
    "start": (
        PAYLOAD + 8,
        "Q",
        2,
        FormatError,
        "starts at token 2, expected 1|start is 2, expected 1",
    ),
    "first position": (
        PAYLOAD + 16,
        "q",
        0,
        FormatError,
        "position 0, expected one|first_position is 0",
    ),
    "negative position": (PAYLOAD + 16, "q", -1, FormatError, "must rise from 0"),
    "positions": (PAYLOAD + 80, "q", 1, FormatError, "positions must rise"),
    "contiguous listed": (PAYLOAD + 88, "q", 3, FormatError, "contiguous positions are listed"),
    "role": (PAYLOAD + 24, "B", 2, FormatError, "TAIL must be verbatim, found 2 coded"),
    "unknown role": (PAYLOAD + 24, "B", 3, VersionError, "at byte .*, role is 3"),
    "kind of positions": (PAYLOAD + 25, "B", 2, FormatError, "must be 0 or 1, found 2"),
    "measure": (PAYLOAD + 26, "B", 0, FormatError, "not measured must be 0"),
    "block coder": (PAYLOAD + 27, "B", 1, FormatError, "DEFLATE needs fewer than 2 bytes"),
    "block coder of values": (PAYLOAD + 27, "B", 5, FormatError, "PLANES codes verbatim values"),
    "verbatim coder": (PAYLOAD + 28, "B", 2, FormatError, "ZSTD needs fewer than 8 bytes"),
    "planes": (PAYLOAD + 28, "B", 5, FormatError, "PLANES, which the required features have not"),
    "contents": (PAYLOAD + 29, "B", 1, FormatError, "contents are 0x1 .* features allow 0x0"),
    "block reserved": (PAYLOAD + 31, "B", 1, FormatError, "reserved 0001 .* must be zero"),
    "symbols' size": (PAYLOAD + 32, "Q", 3, FormatError, "exactly 3 bytes, found 2"),
    "large symbols": (PAYLOAD + 32, "Q", 1 << 40, LimitError, "max_block_bytes"),
    "coded length": (PAYLOAD + 40, "Q", 1 << 60, FormatError, "symbols at byte .* needs"),
    "verbatim length": (PAYLOAD + 48, "Q", 7, FormatError, "no more bytes, found 1"),
    "error": (PAYLOAD + 56, "f", float("nan"), FormatError, "k_mean must be finite"),
    "negative error": (PAYLOAD + 68, "f", -1.0, FormatError, "v_worst must be finite"),
    "cut": (PAYLOAD + 72, "II", 2, 1, FormatError, r"\(2, 1\) of 3 tokens are cut"),
    "bitmap": (PAYLOAD + 96, "B", 3, FormatError, "expected 1 bits among 3 set, found 2"),
    "bitmap padding": (PAYLOAD + 96, "B", 8, FormatError, "expected 1 bits among 3 set"),
    "index count": (INDEX + RECORD_HEADER, "I", 2, FormatError, "list the 3 records|need 180"),
    "index offset": (ENTRIES, "Q", 0, FormatError, "list the|does not follow"),
    "index tokens": (
        ENTRIES + 24,
        "I",
        9,
        FormatError,
        "list the|9 tokens cannot have positions 0 to 0",
    ),
    "trailer offset": (END, "Q", 0, FormatError, "trailer"),
    "trailer total": (END + 8, "Q", 5, FormatError, "total_size=5"),
    "trailer records": (END + 16, "I", 9, FormatError, "records=9|is numbered 3"),
    "trailer reserved": (END + 20, "I", 1, FormatError, "trailer.*reserved"),
}


@READERS
@pytest.mark.parametrize("name", PATCHES)
def test_patched_field(reader, name):
    offset, layout, *values, kind, message = PATCHES[name]
    with pytest.raises(kind, match=message) as caught:
        reader(patched(STREAM, offset, layout, *values))
    assert caught.type is kind


# The same with what format 1.1 added

LATER, LATER_HEADER, LATER_BLOCKS = later_stream()
TABLE = LATER.index(struct.pack("<HBf", 2, 2, 1.0))
LATER_PAYLOADS = [offset + RECORD_HEADER for offset in records(LATER)]
#: Where the parts of the block with everything begin, after positions and bitmap.
LISTED = LATER_PAYLOADS[1] + 80 + 16 + 1
SHIFTED = LATER_PAYLOADS[2] + 80
LATER_PATCHES = {
    "version": (10, "H", 0, VersionError, r"0x3, but version 1\.0 has none"),
    "reserved features": (12, "I", 0x63, VersionError, "not UNKNOWN_POSITIONS and SEALED_PAGES"),
    "axes without the feature": (12, "I", 1, FormatError, "header has rotary tables with axes"),
    "errors without the feature": (12, "I", 2, FormatError, "contents are 0x3 .* allow 0x2"),
    "flags of a table": (TABLE + 2, "B", 6, FormatError, "rotary table 0 at byte .*flags are 0x6"),
    "axis": (TABLE + 16, "B", 8, FormatError, "rotary table 0 at byte .*axes must be from 0 to 7"),
    "axes in vain": (TABLE + 16, "B", 0, FormatError, "the same as a shorter"),
    "contents": (LATER_PAYLOADS[1] + 29, "B", 7, FormatError, "contents are 0x7 .* allow 0x3"),
    "rotary variant": (LATER_PAYLOADS[1] + 30, "B", 1, FormatError, "reserved 0100"),
    "kind of axes": (LISTED, "B", 6, VersionError, r"kind is 6, .* 5 \(LISTED64\)"),
    "kind of no axes": (SHIFTED, "B", 0, VersionError, "kind is 0"),
    "another kind": (LISTED, "B", 3, FormatError, "needs|found|expected"),
    "number of axes": (LISTED + 1, "B", 3, FormatError, "on 3 axes, the section's keys have 2"),
    "negative axis": (LISTED + 2, "q", -1, FormatError, "from 0 to .*, found -1 to -1"),
    "negative step": (LISTED + 18, "b", -2, FormatError, "from 0 to .*, found -1 to 1"),
    "beyond the last": (LISTED + 10, "q", 2**63 - 1, FormatError, f"found .* to {2**63}"),
    "shift of nothing": (SHIFTED + 2, "q", 0, FormatError, "say what leaving them out says"),
    "negative shift": (SHIFTED + 2, "q", -8, FormatError, "found -1 to 0"),
    "large shift": (SHIFTED + 2, "q", 2**63 - 8, FormatError, f"found .* to {2**63}"),
    "mean above the worst": (LISTED + 22, "B", 255, FormatError, "mean error of K of layer 0"),
    "errors of no token": (LATER_PAYLOADS[3] + 29, "B", 3, FormatError, "needs|no more|no token"),
}


@READERS
@pytest.mark.parametrize("name", LATER_PATCHES)
def test_patched_field_of_a_later_stream(reader, name):
    offset, layout, *values, kind, message = LATER_PATCHES[name]
    data = patched(LATER, offset, layout, *values)
    with pytest.raises(kind, match=message) as caught:
        reader(data)
    assert caught.type is kind
    with pytest.raises(second_reader.ReadError) as second:
        second_reader.read_stream(data)
    assert second.value.kind == ("version" if kind is VersionError else "format")


def spliced(block: Block, start: int, end: int, value: bytes) -> bytes:
    """The block's payload with other bytes."""
    payload = b"".join(block.pack())
    return payload[:start] + value + payload[end:]


@pytest.mark.parametrize(
    ("number", "start", "end", "value", "message"),
    [
        # Positions 8, 8 and 9, 9 less 4 are shifted, and fit narrower steps.
        (2, 80, 90, struct.pack("<BBqq4b", 2, 2, 3, 3, 1, 1, 0, 0)[:20], "what SHIFTED says"),
        (2, 80, 90, struct.pack("<BBqqhh", 3, 2, 3, 4, 1, 1), "what LISTED8 says"),
        (2, 80, 90, struct.pack("<BBqqii", 4, 2, 3, 4, 1, 128), "what LISTED16 says"),
        (2, 80, 90, struct.pack("<BBqqqq", 5, 2, 3, 4, 1, -(2**31)), "what LISTED32 says|from 0"),
        (1, 97, 119, struct.pack("<BBqqqqqq", 5, 2, 1, 1, 2**40, 0, 0, 1 - 2**31), "from 0 to"),
        (1, 119, 123, b"", "mean error of K of layer 0 exceeds"),
        (3, 29, 30, b"\1", "mean error of K of layer 0 exceeds"),
        (3, 29, 30, b"\3", "errors by layer at byte .* needs|mean error|found"),
    ],
)
def test_another_encoding_of_the_same(number, start, end, value, message):
    payload = spliced(LATER_BLOCKS[number], start, end, value)
    with pytest.raises(FormatError, match=message):
        Block.unpack(ByteReader(payload, "block"), 0, LATER_HEADER, Limits())
    header = second_reader.read_header(LATER_HEADER.pack(), LATER_HEADER.features)
    with pytest.raises(second_reader.ReadError):
        second_reader.read_block(payload, 0, header, LATER_HEADER.features)


@pytest.mark.parametrize(
    ("axes", "kind", "size"),
    [
        ((range(5, 9), range(5, 9)), 1, 8),
        ((array("q", (0, 127, 0, 0)), array("q", (0, 0, 128, 0))), 3, 16 + 12),
        ((array("q", (0, 127, 0, 0)), array("q", (0, 0, 127, 0))), 2, 16 + 6),
        ((array("q", (0, 0, 128, 0)), range(0, 4)), 3, 16 + 12),
        ((array("q", (129, 1, 1, 1)), range(0, 4)), 2, 16 + 6),
        ((array("q", (2**15, 0, 0, 0)), range(0, 4)), 3, 16 + 12),
        ((array("q", (2**15 + 1, 0, 0, 0)), range(0, 4)), 4, 16 + 24),
        ((array("q", (0, 2**31, 0, 0)), range(0, 4)), 5, 16 + 48),
        ((array("q", (2**63 - 1, 0, 2**63 - 1, 0)), range(0, 4)), 5, 16 + 48),
    ],
)
def test_positions_on_axes_take_few_bytes(axes, kind, size):
    block = make_block(LATER_HEADER, 0, range(1, 5), symbols=b"a", axes=axes)
    payload = b"".join(block.pack())
    assert payload[80] == kind
    assert len(payload) == 80 + 2 + size + 1
    assert Block.unpack(ByteReader(payload, "block"), 0, LATER_HEADER, Limits()) == block


def test_positions_on_axes_that_are_the_tokens_own_take_none():
    block = make_block(LATER_HEADER, 0, range(1, 5), symbols=b"a")
    assert replace(block, axes=(range(1, 5), array("q", (1, 2, 3, 4)))) == block
    assert block.features == Feature(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": (range(3), range(4))}, "a position for each of 3 tokens, found 4"),
        ({"axes": (range(3), range(-1, 2))}, "from 0 to .*, found -1 to 1"),
        ({"axes": (range(3), array("q", (0, 1, -1)))}, "from 0 to .*, found -1 to 1"),
        ({"verbatim_tokens": (0, 1, 2), "coded": b"", "coded_size": 0}, "no token is coded, yet"),
    ],
)
def test_later_blocks_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        replace(LATER_BLOCKS[1], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": (range(3),) * 3}, "on 3 axes, the section's keys have 2"),
        ({"layer_errors": LayerErrors(bytes(8))}, "errors of 2 layers, the section has 1"),
    ],
)
def test_later_blocks_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        replace(LATER_BLOCKS[1], **change).check(LATER_HEADER)


def test_a_writer_is_told_of_features_before_it_begins():
    writer = StreamWriter(replace(LATER_HEADER, features=Feature(0)))
    start = writer.start()
    assert struct.unpack_from("<HHI", start, 8) == (1, 1, Feature.AXES)
    writer.block(LATER_BLOCKS[0])
    with pytest.raises(ValueError, match="the block needs LAYER_ERRORS"):
        writer.block(LATER_BLOCKS[1])


def test_what_needs_no_feature_is_as_a_writer_of_1_0_would_have_it():
    assert struct.unpack_from("<HHI", STREAM, 8) == (1, 0, 0)
    later = write(replace(HEADER, features=Feature.LAYER_ERRORS), BLOCKS)
    assert patched(later, 10, "HI", 0, 0) == STREAM


@given(streams())
@settings(max_examples=40, deadline=None)
def test_the_second_reader_reads_the_same(stream):
    header, blocks = stream
    found = second_reader.read_stream(write(header, blocks)).blocks
    for block, other in zip(blocks, found, strict=True):
        assert list(block.positions) == other.positions.tolist()
        assert list(block.verbatim_tokens) == other.verbatim.tolist()
        assert (block.coded, block.verbatim) == (other.coded, other.verbatim_bytes)
        count = header.geometry.sections[block.section].axes
        axes = block.axes or (block.positions,) * count
        assert [list(x) for x in axes] == other.axes.T.tolist()
        errors = block.layer_errors
        assert (errors is None) is (other.layer_errors is None)
        if errors is not None:
            stored = (errors.k_mean, errors.k_worst, errors.v_mean, errors.v_worst)
            assert [list(x) for x in stored] == other.layer_errors.tolist()


@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [(18, "B", 1), (8, "Q", 60), (56, "Q", 1), (20, "H", 1), (40, "q", 6), (72, "f", 0.5)],
)
def test_a_block_that_differs_from_the_index(offset, layout, value):
    """The index may lie consistently: each block shows it."""
    data = patched(STREAM, ENTRIES + 88 + offset, layout, value)
    with pytest.raises(FormatError):
        read(data)
    with pytest.raises(FormatError, match="does not list the 3 records before it"):
        parse(data)


@READERS
def test_zeros_with_another_sign_are_another_index(reader):
    """Equal as numbers, but not the bytes that the block's errors are."""
    with pytest.raises(FormatError, match=r"k_mean=0\.0.*k_mean=-0\.0|does not list"):
        reader(patched(STREAM, ENTRIES + 72, "f", -0.0))


@READERS
def test_the_end_magic_is_the_mark_of_a_whole_stream(reader):
    with pytest.raises(FormatError, match=r"KVTEND|no trailer"):
        reader(STREAM[:-1] + b"\r")


@READERS
def test_unknown_skippable_records_are_skipped(reader):
    writer = StreamWriter(HEADER)
    data = writer.start()
    user = len(data)
    data += writer.user(b"new") + writer.block(BLOCKS[0])
    data += writer.finish()
    index = records(data)[2]
    changed = bytearray(data)
    changed[user + 4] = changed[index + RECORD_HEADER + 4 + 16] = 99
    assert reader(reseal(changed)) == [HEADER, BLOCKS[0]]


def test_a_later_minor_version_is_read():
    assert parse(patched(STREAM, 10, "H", 9)) == [HEADER, *BLOCKS]


def test_features_that_may_be_ignored_are():
    assert parse(patched(STREAM, 16, "I", 0xFFFF_FFFF)) == [HEADER, *BLOCKS]


# Limits

LIMITS = {
    "max_header_bytes": (32, "header length at byte 24"),
    "max_metadata_bytes": (1, "metadata length"),
    "max_record_bytes": (60, "payload length"),
    "max_block_bytes": (1, "size of"),
    "max_block_tokens": (3, "block tokens"),
    "max_records": (2, "number of records"),
    "max_sections": (0, "section count"),
    "max_layers": (0, "count"),
    "max_width": (3, "width"),
    "max_bands": (1, "parts"),
}


def test_every_limit_is_tested():
    assert set(LIMITS) == set(Limits.__dataclass_fields__)


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    limit, what = LIMITS[name]
    message = f"{what}.*the limit is {limit}; .*{name}="
    with pytest.raises(LimitError, match=message):
        parse(STREAM, Limits(**{name: limit}))
    with pytest.raises(LimitError, match=f"the limit is {limit}; .*{name}="):
        read(STREAM, Limits(**{name: limit}))


def test_the_parser_keeps_no_more_than_a_record():
    block = make_block(HEADER, 0, range(4), symbols=bytes(10_000))
    parser = StreamParser()
    data = write(HEADER, [block])
    largest = 0
    for i in range(0, len(data), 100):
        parser.feed(data[i : i + 100])
        largest = max(largest, len(parser._buffer))
    assert largest < 10_000 + 300
    assert not parser._buffer


# The writer


def test_the_writer_keeps_the_order():
    writer = StreamWriter(HEADER)
    expected = writer.start() + writer.block(BLOCKS[0]) + writer.block(BLOCKS[1])
    for block, message in [
        (BLOCKS[1], "starts at token 1, expected 4"),
        (replace(BLOCKS[1], start=4), "position 1, expected one after 5"),
        (replace(BLOCKS[0], start=4, positions=range(8, 9)), "SINKS of section 0 comes too late"),
        (replace(BLOCKS[2], section=1), "section 1 is not one of 1"),
        (make_block(HEADER, 4, range(7, 12)), "may have 4 tokens, found 5"),
        (replace(BLOCKS[2], verbatim=bytes(15)), "exactly 16 bytes, found 15"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            writer.block(block)
        assert not isinstance(caught.value, FormatError)
    assert expected + writer.block(BLOCKS[2]) + writer.finish() == STREAM


def test_the_writer_says_what_may_be_called_when():
    writer = StreamWriter(HEADER)
    for call in (lambda: writer.block(BLOCKS[0]), lambda: writer.user(b""), writer.finish):
        with pytest.raises(StateError, match="not started"):
            call()
    writer.start()
    with pytest.raises(StateError, match="has been started"):
        writer.start()
    writer.finish()
    with pytest.raises(StateError, match="finished"):
        writer.finish()


def test_entries_that_are_no_blocks_cannot_be_read_as_one():
    file = StreamFile(io.BytesIO(STREAM))
    with pytest.raises(ValueError, match="is no block"):
        file.read_block(replace(file.index[0], type=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0, "positions": range(0)}, "needs tokens"),
        ({"tokens": 2}, "as many positions"),
        ({"start": -1}, "must not be negative"),
        ({"positions": range(0, 6, 2)}, "rising by one in a range"),
        ({"positions": array("q", (1, 1, 2))}, "any step in a list"),
        ({"positions": range(-1, 2)}, "rise from 0"),
        ({"positions": range(2**63 - 2, 2**63 + 1)}, "rise from 0"),
        ({"verbatim_tokens": (1, 1)}, "found 1 after 1"),
        ({"verbatim_tokens": (3,)}, "rise from 0 to 2, found 3"),
        ({"role": Role.SINKS}, "SINKS must be verbatim"),
        ({"verbatim_tokens": (0, 1, 2)}, "no token is coded"),
        ({"coded": b""}, "exactly 2 bytes, found 0"),
    ],
)
def test_blocks_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BLOCKS[1], **change)


def test_neighbouring_positions_become_a_range():
    header = small_header()
    listed = make_block(header, 0, array("q", (5, 6, 7)), symbols=b"x")
    assert listed == make_block(header, 0, range(5, 8), symbols=b"x")
    assert isinstance(listed.positions, range)


def sinks(header: StreamHeader) -> Block:
    return make_block(header, 0, range(1), role=Role.SINKS, verbatim_tokens=(0,))


def run_of_blocks(header: StreamHeader, count: int = 9) -> BlockRun:
    """Behind one token; with a gap between positions."""
    layers = len(header.geometry.sections[0].layers) * (Feature.LAYER_ERRORS in header.features)
    rng = np.random.default_rng(count)
    sizes = rng.integers(1, 300, count)
    codes = np.sort(rng.integers(0, 255, (count, 2, 2, layers), np.uint8), axis=2)
    return BlockRun(
        section=0,
        start=1,
        tokens=3,
        firsts=1 + 3 * np.arange(count) + 7 * (np.arange(count) > 2),
        coders=np.full(count, Coder.STORED, np.uint8),
        coded_sizes=sizes,
        data=memoryview(rng.bytes(int(sizes.sum()) + 5)),
        places=np.stack([5 + np.cumsum(sizes) - sizes, sizes], axis=1),
        measure=Measure.RECONSTRUCTION,
        errors=rng.random((count, 4), np.float32),
        layer_codes=codes.reshape(count, -1),
    )


@pytest.mark.parametrize("features", [Feature(0), Feature.LAYER_ERRORS])
@pytest.mark.parametrize("size", [None, 0])
@pytest.mark.parametrize("key", [b"", b"secret"])
def test_a_run_of_blocks_is_written_as_one_by_one(
    features: Feature, size: int | None, key: bytes
) -> None:
    """Also one with a block that is not as the others."""
    header = replace(HEADER, features=features)
    run = run_of_blocks(header)
    if size is not None:
        run.coded_sizes[4] = run.places[4, 1] = size
    before = sinks(header)
    after = make_block(header, 28, range(90, 92), role=Role.TAIL, verbatim_tokens=(0, 1))
    writer, other = StreamWriter(header, key), StreamWriter(header, key)
    found = writer.start() + writer.block(before)
    records = writer.begin_blocks(run)
    plain = b"".join(writer.sealed(records))
    assert sum(record.size for record in records) == len(plain)
    assert joined(records) == plain
    found += plain + writer.block(after) + writer.finish()
    expected = [other.start(), *map(other.block, [before, *run, after]), other.finish()]
    assert found == b"".join(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 2},
        {"firsts": np.array([1, 4, 6])},
        {"firsts": np.array([0, 4, 7])},
        {"firsts": np.array([1, 2**63 - 2, 7])},
        {"section": 1},
        {"layer_codes": np.zeros((3, 4), np.uint8)},
        {"layer_codes": np.zeros((3, 8), np.uint8)},
        {"tokens": 5},
        {"errors": np.full((3, 4), np.inf, np.float32)},
        {"measure": Measure.NONE},
    ],
)
def test_a_run_of_blocks_is_refused_as_they_are_alone(changes: dict[str, Any]) -> None:
    run = replace(run_of_blocks(HEADER, 3), **changes)
    writer, other = StreamWriter(HEADER), StreamWriter(HEADER)
    for own in (writer, other):
        own.start()
        own.block(sinks(HEADER))
    with pytest.raises(ValueError, match=r"^.") as expected:
        [*map(other.block, run)]
    with pytest.raises(ValueError, match=r"^.") as found:
        writer.begin_blocks(run)
    assert str(found.value) == str(expected.value)


def test_headers_of_one_kind_are_read_once(monkeypatch: pytest.MonkeyPatch):
    """Whatever tokens they are of; what is wrong with one is told as of one that is read alone."""
    headers = [replace(HEADER, token_digest=bytes([i]) * 32) for i in range(3)]
    own = [write(header, BLOCKS) for header in [*headers, HEADER]]
    assert read(own[0])[0] == headers[0]
    with monkeypatch.context() as patch:
        patch.setattr(StreamHeader, "unpack", lambda *_, **__: pytest.fail("read again"))
        found = [StreamFile(io.BytesIO(data)).header for data in own[:3]]
    assert found == headers
    assert [header.digest for header in found] == [header.digest for header in headers]
    assert len({header.digest for header in found}) == 3
    assert all(header.geometry is found[0].geometry for header in found)
    assert read(own[3])[0] == HEADER

    at = PREAMBLE + 48  # where the digest's length is
    assert own[0][at] == 32
    with pytest.raises(FormatError, match=r"header, .* at byte \d+"):
        read(patched(own[0], at, "B", 31))
