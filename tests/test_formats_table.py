"""Blocks as columns: the same as the parser of single blocks finds, or its error."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from damage import mutate
from formats_samples import later_stream, records, reseal, small_stream, streams, write
from hypothesis import given
from hypothesis import strategies as st

import kvtc_stream as kvtc
from kvtc_stream.formats import Block, BlockTable, StreamFile, StreamHeader, file_reader
from kvtc_stream.formats.columns import ROW
from kvtc_stream.formats.table import fill, is_special
from kvtc_stream.formats.usual import usual_entries

SEEDS = st.integers(0, 2**32 - 1)


@contextmanager
def without_columns() -> Iterator[None]:
    """The index is read entry by entry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamFile, "_usual_index", lambda *_: None)
        yield


def outcome(data: bytes, *, one_by_one: bool) -> Any:
    """All that is in a stream, or the class and the message of the error."""
    try:
        file = StreamFile(io.BytesIO(data))
        found = []
        for section in range(len(file.header.geometry.sections)):
            if one_by_one:
                found.append(list(file.read_blocks(e for e in file.index if e.section == section)))
                continue
            live = file.live
            table = file.read_table(live[file.entries["section"][live] == section])
            table.verify()
            found.append([table.block(i, verified=True) for i in range(len(table))])
            check_columns(table, found[-1])
        return file.header, file.index, file.records, found
    except kvtc.KVTCError as error:
        return type(error), str(error)


def check_columns(table: BlockTable, blocks: list[Block]) -> None:
    """Each column says what the blocks say."""
    for i, block in enumerate(blocks):
        expected = np.zeros((), ROW)
        fill(expected, block)
        for name in ("start", "tokens", "first", "front", "end", "verbatim"):
            assert table.rows[name][i] == expected[name]
        for name in ("coder", "coded_size", "verbatim_coder"):
            assert table.rows[name][i] == expected[name]
        assert table.bytes_of(i, "coded", "coded_length") == block.coded
        assert table.bytes_of(i, "exact", "exact_length") == block.verbatim
        assert (i in table.special) == is_special(block)
    joined = [x for b in blocks for x in b.positions]
    assert table.positions().tolist() == joined
    verbatim = [i in b.verbatim_tokens for b in blocks for i in range(b.tokens)]
    assert table.verbatim().tolist() == verbatim
    rows = np.arange(0, len(blocks), 2)
    kept = [x for i, b in enumerate(blocks) for x in b.positions if i % 2 == 0]
    assert table.chosen(table.positions(), rows).tolist() == kept
    ordinals = [
        b.start + i - b.kept.start if i in b.kept else -1 for b in blocks for i in range(b.tokens)
    ]
    assert table.ordinals().tolist() == ordinals
    first, last = (n * (1 + max(ordinals, default=-1)) // 3 for n in (1, 2))
    expected = [7 + x - first if first <= x < last else -1 for x in ordinals]
    assert table.span_slots(first, last, 7).tolist() == expected
    of_section = np.arange(1 + max(ordinals, default=-1)) * 3 + 5
    assert table.slots(of_section).tolist() == [-1 if x < 0 else 3 * x + 5 for x in ordinals]
    if len(of_section):
        with pytest.raises(IndexError, match="beyond the"):
            table.slots(of_section[:-1])


def moved(changed: bytearray, data: bytes, starts: list[int]) -> bool:
    """Whether checksums could not be made right again: records are not where they were."""
    return any(
        changed[s : s + 4] != b"KVTR" or changed[s + 16 : s + 24] != data[s + 16 : s + 24]
        for s in starts
    )


@given(streams())
def test_any_stream(drawn: tuple[StreamHeader, list[Block]]) -> None:
    data = write(*drawn)
    found = outcome(data, one_by_one=False)
    assert [b for own in found[3] for b in own] == sorted(drawn[1], key=lambda b: b.section)
    with without_columns():
        assert outcome(data, one_by_one=True) == found
    check_columns(BlockTable.of(found[3][0]), found[3][0])
    tables = [BlockTable.of(own) for own in found[3]]
    check_columns(BlockTable.concat(tables), [b for own in found[3] for b in own])


@given(streams(), SEEDS, st.booleans())
def test_damage_and_lies(drawn: tuple[StreamHeader, list[Block]], seed: int, lies: bool) -> None:
    """Bytes that were changed, and the same behind right checksums: the very same errors."""
    rng = random.Random(seed)
    data = write(*drawn)
    changed = bytearray(data)
    if lies:
        starts = records(data)
        for _ in range(rng.choice((1, 1, 2))):
            begin = rng.choice(starts)
            at = min(begin + rng.randrange(4, 150), len(data) - 1)
            changed[at] = rng.choice((0, 1, 2, 3, 127, 128, 255, rng.randrange(256)))
        if moved(changed, data, starts):
            return
        changed = bytearray(reseal(changed))
    else:
        changed = bytearray(mutate(data, rng))
    with without_columns():
        expected = outcome(bytes(changed), one_by_one=True)
    assert outcome(bytes(changed), one_by_one=False) == expected


@pytest.mark.parametrize("make", [small_stream, later_stream])
def test_every_byte_of_a_small_stream(make: Any) -> None:
    """Behind right checksums, each byte set to 255 or to the next number."""
    data, *_ = make()
    starts = records(data)
    for at in range(starts[0], len(data) - 40):
        changed = bytearray(data)
        changed[at] = 255 if at % 2 else (data[at] + 1) % 256
        if moved(changed, data, starts):
            continue
        lie = reseal(changed)
        with without_columns():
            expected = outcome(lie, one_by_one=True)
        assert outcome(lie, one_by_one=False) == expected, at


def test_usual_streams_need_no_parser(
    codec: kvtc.Codec, stream: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the encoder writes is read as columns: no block and no entry becomes an object."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an object was made")

    monkeypatch.setattr(Block, "unpack", refuse)
    monkeypatch.setattr(file_reader, "unpack_index", refuse)
    file = StreamFile(io.BytesIO(stream))
    table = file.read_table(file.live)
    table.verify()
    assert len(table) == len(file.live) > 3
    assert not table.special


def test_tables_of_which_some_are_verified(stream: bytes) -> None:
    file = StreamFile(io.BytesIO(stream))
    fresh = file.read_table(file.live)
    blocks = [fresh.block(i) for i in range(len(fresh))]
    assert BlockTable.concat([fresh, fresh]).unverified
    both = BlockTable.concat([BlockTable.of(blocks), fresh])
    assert not both.unverified
    check_columns(both, blocks + blocks)
    assert [both.block(i) for i in range(len(both))] == blocks + blocks

    damaged = bytearray(stream)
    at = int(fresh.rows["coded"][2] + file.entries["offset"][file.live[0]])
    damaged[at + 3] ^= 1
    file = StreamFile(io.BytesIO(damaged))
    broken = file.read_table(file.live)
    entry = file.index[2]
    lost = f"tokens {entry.start} to {entry.start + entry.tokens - 1}.*: record 2 "
    for use in (
        broken.verify,
        lambda: BlockTable.concat([BlockTable.of(blocks), broken]),
        lambda: broken.block(2),
    ):
        with pytest.raises(kvtc.ChecksumError, match=lost):
            use()
    assert broken.block(1) == blocks[1]


def test_nothing_but_whole_entries() -> None:
    data, header, _ = small_stream()
    file = StreamFile(io.BytesIO(data))
    packed = file.entries[:-1].tobytes()
    start = file.sizes.header
    assert usual_entries(packed, header, start, kvtc.Limits()) is not None
    assert usual_entries(packed[:-1], header, start, kvtc.Limits()) is None
    assert usual_entries(packed, header, start + 1, kvtc.Limits()) is None
    assert usual_entries(packed[88:], header, start, kvtc.Limits()) is None
