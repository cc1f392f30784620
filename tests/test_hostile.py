"""Streams that lie behind right checksums: each lie is named, and none takes memory."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from damage import restore
from formats_samples import PREAMBLE, RECORD_HEADER, TRAILER, patched, records, reseal

import kvtc_stream as kvtc
from kvtc_stream.formats import Band, Block, Plan, Quantiser, Role, StreamFile, StreamWriter

pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")


@pytest.fixture(scope="module")
def short(codec: kvtc.Codec) -> bytes:
    """40 tokens: sinks, a block of data, the tail."""
    cache = kvtc.testing.drawn_cache(codec.calibration.geometry, 41)
    data = kvtc.encode(*cache, codec=replace(codec, window=20))
    assert [e.role for e in StreamFile(io.BytesIO(data)).index] == [
        Role.SINKS,
        Role.DATA,
        Role.TAIL,
        Role.TAIL,
    ]
    return data


def rewritten(
    data: bytes,
    block: Callable[[Block], Block] = lambda b: b,
    header: Callable[[Any], Any] = lambda h: h,
) -> bytes:
    """The stream as another writer would have made it."""
    file = StreamFile(io.BytesIO(data))
    writer = StreamWriter(header(file.header))
    blocks = [block(file.read_block(e)) for e in file.index]
    return writer.start() + b"".join(map(writer.block, blocks)) + writer.finish()


def payload(change: Callable[[bytearray], None]) -> Callable[[bytes], bytes]:
    """With another payload in the data block."""

    def make(data: bytes) -> bytes:
        def spoil(block: Block) -> Block:
            if block.role is not Role.DATA:
                return block
            coded = bytearray(block.coded)
            change(coded)
            return replace(block, coded=bytes(coded))

        return rewritten(data, spoil)

    return make


def field(offset: int, layout: str, *values: float) -> Callable[[bytes], bytes]:
    return payload(lambda coded: struct.pack_into("<" + layout, coded, offset, *values))


def entry(number: int, offset: int, layout: str, *values: int) -> Callable[[bytes], bytes]:
    """With another field in an index entry."""

    def make(data: bytes) -> bytes:
        at = records(data)[-1] + RECORD_HEADER + 4 + 88 * number + offset
        return patched(data, at, layout, *values)

    return make


def plan(change: Callable[[Plan], Plan]) -> Callable[[bytes], bytes]:
    return lambda data: rewritten(data, header=lambda h: replace(h, plan=change(h.plan)))


def bands(*found: Band) -> Callable[[bytes], bytes]:
    def change(old: Plan) -> Plan:
        part = replace(old.sections[0].parts[0], bands=found)
        return replace(old, sections=(replace(old.sections[0], parts=(part,)),))

    return plan(change)


def repeated(data: bytes) -> bytes:
    """A record twice, in the index too, with numbers that follow."""
    starts = records(data)
    index = starts[-1]
    twice = data[starts[1] : starts[2]]
    out = bytearray(data[:index] + twice + data[index:])
    struct.pack_into("<I", out, index + 8, len(starts) - 1)
    return recounted(bytes(out), [*range(len(starts) - 1), 1])


def missing(data: bytes) -> bytes:
    """Without a record, in the index neither, with numbers that follow."""
    starts = records(data)
    out = bytearray(data[: starts[1]] + data[starts[2] :])
    return recounted(bytes(out), [0, *range(2, len(starts) - 1)])


def recounted(data: bytes, kept: list[int]) -> bytes:
    """Sequence numbers, offsets, index and trailer as if the records had been written so."""
    starts = records(data)
    old = data[starts[-1] + RECORD_HEADER + 4 : -TRAILER - 8]
    entries = b""
    out = bytearray(data[: starts[-1]])
    for number, (start, source) in enumerate(zip(starts, kept, strict=False)):
        struct.pack_into("<I", out, start + 8, number)
        own = bytearray(old[88 * source : 88 * source + 88])
        struct.pack_into("<Q", own, 0, start)
        entries += own
    body = struct.pack("<I", len(kept)) + entries
    out += struct.pack("<4sBBHIIQQ", b"KVTR", 2, 0, 0, len(kept), 0, len(body), 0)
    out += body + bytes(8)
    total = len(out) + TRAILER
    out += struct.pack("<QQIIQ8s", starts[-1], total, len(kept) + 1, 0, 0, b"KVTEND\r\n")
    return reseal(out)


def superseding(data: bytes) -> bytes:
    """With a record that supersedes an end where there is none."""
    file = StreamFile(io.BytesIO(data))
    writer = StreamWriter(file.header)
    out = writer.start()
    at = len(out)
    out += writer.user(b"\0") + b"".join(writer.block(file.read_block(e)) for e in file.index)
    out += writer.finish()
    changed = bytearray(out)
    changed[at + 4 : at + 6] = b"\x04\0"
    changed[records(out)[-1] + RECORD_HEADER + 4 + 16] = 4
    return reseal(changed)


LIES: dict[str, tuple[Callable[[bytes], bytes], type[Exception], str]] = {
    # Payloads of uniform bands.
    "step is no number": (field(0, "f", float("nan")), kvtc.FormatError, "step nan"),
    "step is zero": (field(0, "f", 0.0), kvtc.FormatError, "step 0.0"),
    "step is infinite": (field(0, "f", float("inf")), kvtc.FormatError, "step inf"),
    "values overflow": (field(0, "f", 3e38), kvtc.FormatError, "not finite"),
    "reserved byte": (field(5, "B", 1), kvtc.FormatError, "reserved byte 1"),
    "no components a tile": (field(6, "H", 0), kvtc.FormatError, "0 components a tile"),
    "many tiles": (
        field(6, "H", 1),
        kvtc.FormatError,
        "a tile of an odd number|tiles of .* in a payload that has",
    ),
    "lengths beyond": (field(8, "I", 0xFFFF_FFFE), kvtc.FormatError, "tiles of 4294967294 bytes"),
    "a tile is too short": (
        payload(lambda c: c.__delitem__(slice(40, 42))),
        kvtc.FormatError,
        "tiles of .* bytes in a payload that has",
    ),
    "alignment": (
        payload(lambda c: (c.insert(20, 0), struct.pack_into("<I", c, 8, len(c) - 20))),
        kvtc.FormatError,
        "a tile of an odd number of bytes",
    ),
    "a state below the least": (field(12, "I", 1), kvtc.FormatError, "its lanes do not begin with"),
    "padding of classes": (
        payload(lambda c: c.__setitem__(-1, c[-1] | 0xF0)),
        kvtc.FormatError,
        "after a part's last class",
    ),
    # The plan.
    "another basis": (
        plan(lambda p: replace(p, sections=(replace(p.sections[0], basis="none"),))),
        kvtc.KVTCError,
        "none",
    ),
    "another part": (
        plan(
            lambda p: replace(
                p,
                sections=(
                    replace(
                        p.sections[0],
                        parts=(
                            replace(p.sections[0].parts[0], v_layers=(), bands=()),
                            replace(p.sections[0].parts[0], k_layers=(), bands=()),
                        ),
                    ),
                ),
            )
        ),
        kvtc.FormatError,
        "does not fit the calibration's basis",
    ),
    "other bands": (bands(Band(3, Quantiser.UNIFORM, 9)), kvtc.FormatError, "the plan needs"),
    "bands of another kind": (bands(Band(3, Quantiser.INT4)), kvtc.FormatError, "the plan needs"),
    # The index.
    "many tokens": (entry(1, 24, "I", 60_000), kvtc.FormatError, "may have 16 tokens, found 60000"),
    "no tokens": (entry(1, 24, "I", 0), kvtc.FormatError, "cannot be: the writer is at fault"),
    "more verbatim than all": (entry(1, 28, "I", 17), kvtc.FormatError, "cannot be"),
    "overlap": (entry(1, 0, "Q", 300), kvtc.FormatError, "does not follow: expected record 1"),
    "a gap": (entry(1, 8, "Q", 10_000), kvtc.FormatError, "does not follow: expected record 2"),
    "an endless record": (entry(1, 8, "Q", 1 << 62), kvtc.LimitError, "record length"),
    "an end within": (entry(2, 16, "B", 2), kvtc.FormatError, "cannot be"),
    "superseding nothing": (
        superseding,
        kvtc.FormatError,
        r"SUPERSEDE \(4\) follows an index and its trailer, and nothing else",
    ),
    "a block twice": (repeated, kvtc.FormatError, "starts at token 4, expected 41"),
    "a block is missing": (missing, kvtc.FormatError, "starts at token 20, expected 4"),
    # The header.
    "another geometry": (
        lambda d: patched(d, d.index(struct.pack("<HIII", 2, 2, 8, 8)), "HIII", 2, 1, 16, 16),
        kvtc.FormatError,
        "has layers, heads and channels|bands cover",
    ),
    "a wide geometry": (
        lambda d: patched(d, d.index(struct.pack("<HIII", 2, 2, 8, 8)) + 2, "I", 1 << 31),
        kvtc.LimitError,
        "max_width=",
    ),
    "many rotary tables": (
        lambda d: patched(d, PREAMBLE + 48 + 1 + 2 + 2 + 1, "H", 60_000),
        kvtc.LimitError,
        "rotary table count",
    ),
}


@contextlib.contextmanager
def frugal() -> Iterator[None]:
    """Fails when the block takes more than 20 MB."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_named(codec: kvtc.Codec, short: bytes, name: str) -> None:
    """From a file and from a pipe; nothing is allocated for what is only claimed."""
    make, kind, message = LIES[name]
    if name == "padding of classes":
        cache = kvtc.testing.drawn_cache(codec.calibration.geometry, 9)
        short = kvtc.encode(*cache, codec=replace(codec, window=0))
    data = make(short)
    assert data != short
    for pipe in (False, True):
        with (
            frugal(),
            pytest.raises(
                kvtc.KVTCError if pipe else kind, match=None if pipe else message
            ) as caught,
        ):
            restore(data, codec.calibration, pipe=pipe)
        assert isinstance(caught.value, kvtc.KVTCError)


def test_an_index_that_promises_more_than_memory(
    codec: kvtc.Codec, short: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError

    with kvtc.open(io.BytesIO(short), calibration=codec.calibration) as reader:
        monkeypatch.setattr(np, "empty", fail)
        with pytest.raises(kvtc.LimitError, match="lists 41 tokens, for which there is no memory"):
            reader.read()


@pytest.mark.parametrize("coder", ["deflate", "zstd", "lz4"])
def test_bombs(codec: kvtc.Codec, coder: str) -> None:
    """A few bytes that would become many take no more than the plan needs."""
    paper = kvtc.Codec(codec.calibration, "paper", ratio=4, window=0, block_tokens=16, coder=coder)
    data = kvtc.encode(*kvtc.testing.drawn_cache(codec.calibration.geometry, 20), codec=paper)
    _, bomb = kvtc.formats.compress(kvtc.formats.Coder[coder.upper()], bytes(50_000_000))

    def spoil(block: Block) -> Block:
        if not block.coded_size or len(bomb) >= block.coded_size * 1000:
            return block
        found = kvtc.formats.Coder[coder.upper()]
        return replace(block, coder=found, coded=bomb, coded_size=50_000_000)

    for size in (50_000_000, None):
        changed = rewritten(data, spoil)
        if size is None:
            limits = kvtc.Limits(max_block_bytes=1 << 20)
            with pytest.raises(kvtc.LimitError, match="max_block_bytes"):
                kvtc.open(io.BytesIO(changed), calibration=codec.calibration, limits=limits).read()
            continue
        with frugal(), pytest.raises(kvtc.FormatError, match="the plan needs"):
            restore(changed, codec.calibration)
