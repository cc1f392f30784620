"""A cache that was restored, has grown or forked, and is stored again: what was coded stays so."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import FEWER, Case, cases

import kvtc_stream as kvtc
from kvtc_stream.formats import Role, StreamFile

Cache = tuple[NDArray[Any], NDArray[Any]]
pytestmark = pytest.mark.filterwarnings("ignore:the stream is only", "ignore:section ")


def records(data: bytes) -> list[Any]:
    """The blocks of a stream, with their bytes, but for the tail."""
    file = StreamFile(io.BytesIO(data))
    return [b for b in map(file.read_block, file.index) if b.role is not Role.TAIL]


def records_at(data: bytes) -> int:
    """Where the second block is."""
    return StreamFile(io.BytesIO(data)).index[1].offset


def grown(data: bytes, calibration: kvtc.Calibration, cache: Cache, tokens: int) -> Cache:
    """What a stream decodes to, and then the cache's own tokens up to ``tokens``."""
    restored = kvtc.decode(data, calibration)
    done = restored[0].shape[2]
    return tuple(
        np.concatenate([np.asarray(x), y[:, :, done:tokens]], axis=2)
        for x, y in zip(restored, cache, strict=True)
    )


def equal(a: Any, b: Any) -> bool:
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True)
    )


def test_generations_lose_nothing_more(codec: kvtc.Codec) -> None:
    """Each stores what was restored and some tokens more; the result is that of appending."""
    calibration = codec.calibration
    cache = kvtc.testing.drawn_cache(calibration.geometry, 500)
    data = kvtc.encode(*(x[:, :, :90] for x in cache), codec)
    appended = io.BytesIO(data)
    first = kvtc.decode(data, calibration)
    for done, tokens in ((90, 101), (101, 250), (250, 250), (250, 500)):
        with kvtc.open(appended, "ab", codec=codec) as writer:
            writer.write(*(x[:, :, done:tokens] for x in cache))
        before = records(data)
        data = kvtc.encode(*grown(data, calibration, cache, tokens), codec, base=data)
        after = records(data)
        assert after[: len(before)] == before
        assert after == records(appended.getvalue())
        assert equal(kvtc.decode(data, calibration), kvtc.decode(appended.getvalue(), calibration))
    restored = kvtc.decode(data, calibration)
    coded = slice(0, 52)  # 4 sinks and the blocks that a window of 24 leaves of 90 tokens
    assert equal(*([x[:, :, coded] for x in c] for c in (restored, first)))


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
@FEWER
@given(cases(), st.data())
def test_any_cache_is_that_of_its_base_as_far_as_it_goes(case: Case, data: st.DataObject) -> None:
    """In every dtype, section, cut of the input, with hostile values: what was copied decodes to
    the same bits, and the rest to what it would without a base."""
    codec = (
        case.codec if case.dtype == case.codec.out_dtype else replace(case.codec, out_dtype=None)
    )
    calibration = codec.calibration
    base = kvtc.Encoder(codec, **case.options)
    stream = b""
    for i, tokens in enumerate(case.sections):
        stream += base.encode(tokens.k, tokens.v, positions=tokens.positions, section=i)
    stream += base.finish()
    reader = kvtc.open(stream, calibration=calibration)
    if reader.header.dtype is not reader.header.out_dtype:
        return
    encoder = kvtc.Encoder(codec, **case.options, base=stream)
    again = b""
    caches = []
    for i, tokens in enumerate(case.sections):
        k, v = (np.array(x) for x in reader.read(section=i))
        fork = data.draw(st.integers(0, tokens.count))
        if fork < tokens.count:  # another value from here on
            bits = k.view(f"u{k.dtype.itemsize}")
            bits[-1, -1, fork:, -1] ^= 1
        caches.append((k, v, fork))
        for piece in tokens.pieces:
            where = None if tokens.positions is None else tokens.positions[piece]
            again += encoder.encode(k[:, :, piece], v[:, :, piece], positions=where, section=i)
    again += encoder.finish()
    assert encoder.statistics.stream_bytes == len(again)
    found = kvtc.open(again, calibration=calibration)
    for i, (k, v, fork) in enumerate(caches):
        assert found.tokens(i) == k.shape[2]
        whole = [e for e in StreamFile(io.BytesIO(stream)).index if e.section == i]
        whole = [e for e in whole if e.role is not Role.TAIL and e.start + e.tokens <= fork]
        copied = max((e.start + e.tokens for e in whole), default=0)
        assert equal(
            [x[:, :, :copied] for x in found.read(section=i)], (k[:, :, :copied], v[:, :, :copied])
        )
        blocks = [e for e in StreamFile(io.BytesIO(again)).index if e.section == i]
        assert [e.tokens for e in blocks[: len(whole)]] == [e.tokens for e in whole]


@pytest.mark.parametrize("step", [1, 7, 400])
def test_the_cut_of_the_input_does_not_show(codec: kvtc.Codec, step: int) -> None:
    cache = kvtc.testing.drawn_cache(codec.calibration.geometry, 300)
    data = kvtc.encode(*(x[:, :, :200] for x in cache), codec)
    cache = tuple(x.copy() for x in grown(data, codec.calibration, cache, 300))
    cache[1][:, :, 99] += 1  # within a block
    encoder = kvtc.Encoder(codec, base=data)
    again = b"".join(
        encoder.encode(*(x[:, :, i : i + step] for x in cache)) for i in range(0, 300, step)
    )
    again += encoder.finish()
    assert again == kvtc.encode(*cache, codec, base=data)
    assert records(again)[:6] == records(data)[:6]
    assert records(again)[6] != records(data)[6]


def test_a_sliding_window_leaves_blocks_behind(codec: kvtc.Codec) -> None:
    """What is held begins within a block, which is kept as long as one of its tokens is."""
    calibration, held = codec.calibration, 70
    cache = kvtc.testing.drawn_cache(calibration.geometry, 300)
    data = kvtc.encode(*(x[:, :, :held] for x in cache), codec)
    known = {i: [np.asarray(x)[:, :, i] for x in kvtc.decode(data, calibration)] for i in range(36)}
    for end in (75, 76, 100, 115, 300):
        with kvtc.open(data, calibration=calibration) as reader:
            positions = np.concatenate([b.positions for b in reader])
            restored = reader.read()
        before = end - held
        kept = np.flatnonzero(positions >= before)
        done = int(positions[-1]) + 1
        new = [
            np.concatenate([np.asarray(x)[:, :, kept], y[:, :, max(done, before) : end]], axis=2)
            for x, y in zip(restored, cache, strict=True)
        ]
        data = kvtc.encode(*new, codec, base=data, positions=np.arange(before, end))
        again = kvtc.decode(data, calibration)
        assert again[0].shape[2] == held
        for position in range(before, 36):
            assert equal([x[:, :, position - before] for x in again], known[position])


def test_a_fork_meets_its_target_by_itself(codec: kvtc.Codec) -> None:
    """Other tokens from the middle of the base on: its rate control is not that of the base."""
    calibration = codec.calibration
    cache = kvtc.testing.drawn_cache(calibration.geometry, 4000)
    other = kvtc.testing.drawn_cache(calibration.geometry, 4000, seed=5)
    data = kvtc.encode(*(x[:, :, :2000] for x in cache), codec)
    restored = kvtc.decode(data, calibration)
    fork = [
        np.concatenate([np.asarray(x)[:, :, :1000], y[:, :, 1000:]], axis=2)
        for x, y in zip(restored, other, strict=True)
    ]
    again = kvtc.encode(*fork, codec, base=data)
    assert records(again)[:63] == records(data)[:63]
    coded = [b for b in records(again)[63:] if b.role is Role.DATA]
    size = sum(len(b.coded) + 120 for b in coded) / sum(b.tokens for b in coded)
    assert size == pytest.approx(2 * 2 * 16 * 4 / 4, rel=0.02)


def test_a_base_in_a_file_that_is_replaced(tmp_path: Path, codec: kvtc.Codec, cache: Cache) -> None:
    path, calibration = tmp_path / "a.kvtc", codec.calibration
    key = {"key": b"secret"}
    with kvtc.open(path, "wb", codec=codec, **key) as writer:
        writer.write(*(x[:, :, :150] for x in cache))
    before = path.read_bytes()
    more = grown(before, calibration, cache, 200)
    with kvtc.open(path, "wb", codec=codec, base=path, metadata={"turn": 2}, **key) as writer:
        writer.write(*more)
    assert records(path.read_bytes())[: len(records(before))] == records(before)
    with kvtc.open(path, calibration=calibration, **key) as reader:
        assert reader.header.metadata == '{"turn":2}'
        assert reader.tokens() == 200
    damaged = bytearray(before)
    damaged[records_at(before) + 100] ^= 1
    with pytest.raises(kvtc.ChecksumError):
        kvtc.encode(*more, codec, base=bytes(damaged))
    with pytest.raises(kvtc.AuthenticationError):
        kvtc.Encoder(codec, base=before, key=b"another")
    with pytest.raises(TypeError, match="base= is for new streams"):
        kvtc.open(path, "ab", codec=codec, base=path)


def test_why_nothing_was_taken_over(codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    """The stream is then the one without a base."""
    restored = kvtc.decode(stream, codec.calibration)
    halves = tuple(np.asarray(x).astype(np.float16) for x in restored)
    other = kvtc.Codec(codec.calibration, ratio=8, block_tokens=16)
    for given_cache, own, why in (
        (cache, codec, "begins with other tokens"),
        (halves, codec, "another dtype"),
        (restored, other, "another plan"),
        (restored, replace(codec, block_tokens=32), "another block_tokens"),
    ):
        with pytest.warns(kvtc.KVTCWarning, match=f"no block of base.*{why}"):
            data = kvtc.encode(*given_cache, own, base=stream)
        assert data == kvtc.encode(*given_cache, own)
