"""Streams cut and joined without decoding them."""

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
from strategies import FEWER, Case, cases, encode

import kvtc_stream as kvtc
from kvtc_stream.formats import Role, StreamFile

Cache = tuple[NDArray[Any], NDArray[Any]]
pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")


def cut(data: bytes, **options: Any) -> bytes:
    out = io.BytesIO()
    kvtc.cut(io.BytesIO(data), out, **options)
    return out.getvalue()


def cat(*pieces: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    kvtc.concat([io.BytesIO(p) if isinstance(p, bytes) else p for p in pieces], out, **options)
    return out.getvalue()


def decoded(data: bytes, calibration: kvtc.Calibration) -> tuple[Any, Any, Any]:
    with kvtc.open(io.BytesIO(data), calibration=calibration) as reader:
        found = list(reader)
    return tuple(
        np.concatenate(x, axis)
        for x, axis in (
            ([b.k for b in found], 2),
            ([b.v for b in found], 2),
            ([b.positions for b in found], 0),
        )
    )


def same(found: Any, expected: Any, tokens: slice) -> bool:
    k, v, positions = expected
    parts = k[:, :, tokens], v[:, :, tokens], positions[tokens]
    return all(np.array_equal(x, y) for x, y in zip(found, parts, strict=True))


@given(st.data())
def test_cutting_decodes_to_the_tokens(codec, stream, data: st.DataObject) -> None:
    """Anywhere, again and again, and joined together again."""
    expected = decoded(stream, codec.calibration)
    a, b = sorted((data.draw(st.integers(0, 199)), data.draw(st.integers(1, 200))))
    b = max(b, a + 1)
    part = cut(stream, tokens=slice(a, b))
    assert same(decoded(part, codec.calibration), expected, slice(a, b))
    inner = cut(part, tokens=slice(1, None)) if b - a > 1 else part
    assert same(decoded(inner, codec.calibration), expected, slice(a + (b - a > 1), b))
    assert same(
        decoded(cut(stream, positions=slice(a, b)), codec.calibration), expected, slice(a, b)
    )
    pieces = [
        kvtc.Piece(io.BytesIO(stream), slice(0, a)),
        kvtc.Piece(io.BytesIO(stream), slice(a, b)),
        kvtc.Piece(io.BytesIO(stream), slice(b, None)),
    ]
    joined = cat(*pieces)
    assert same(decoded(joined, codec.calibration), expected, slice(None))
    decoder = kvtc.Decoder(codec.calibration)
    assert sum(block.tokens for block in decoder.decode(joined)) == 200
    with kvtc.open(io.BytesIO(part), calibration=codec.calibration) as reader:
        k, _ = reader.read(slice(0, 1), slice(0, 1))
        np.testing.assert_allclose(k, expected[0][:1, :, a : a + 1], atol=1e-5)


@FEWER
@given(cases(), st.integers(0, 90))
def test_truncating_any_stream(case: Case, count: int) -> None:
    """Every dtype, section and gap in the positions."""
    data = encode(case)
    if len({t.count for t in case.sections}) > 1:
        with pytest.raises(kvtc.UnsupportedError, match="by positions"):
            cut(data, tokens=slice(None, count))
    short = cut(data, positions=slice(None, count))
    calibration = case.codec.calibration
    with (
        kvtc.open(io.BytesIO(data), calibration=calibration) as whole,
        kvtc.open(io.BytesIO(short), calibration=calibration) as reader,
    ):
        for i, tokens in enumerate(case.sections):
            kept = int((tokens.known_positions < count).sum())
            assert reader.tokens(i) == kept
            for x, y in zip(reader.read(section=i), whole.read(section=i), strict=True):
                assert x.tobytes() == np.ascontiguousarray(y[:, :, :kept]).tobytes()


def test_a_fork_goes_on(codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    """Truncated inside a block, then continued with other tokens."""
    expected = decoded(stream, codec.calibration)
    file = io.BytesIO(cut(stream, tokens=slice(None, 73)))
    with kvtc.open(file, "ab", codec=codec) as writer:
        writer.write(*cache)
    found = decoded(file.getvalue(), codec.calibration)
    assert found[0].shape[2] == 273
    assert same([x[:, :, :73] if x.ndim > 1 else x[:73] for x in found], expected, slice(0, 73))
    assert same(
        decoded(cut(stream, tokens=slice(0, 190)), codec.calibration), expected, slice(0, 190)
    )
    file = io.BytesIO(cut(stream, tokens=slice(None, 190)))  # inside the tail: it goes back in
    with kvtc.open(file, "ab", codec=codec) as writer:
        writer.write(*(x[:, :, 190:] for x in cache))
    whole = StreamFile(io.BytesIO(stream))
    again = StreamFile(file)
    tail = sum(e.role is Role.TAIL for e in whole.index)
    for a, b in zip(whole.index[:-tail], again.index[:-tail], strict=True):
        assert whole.read_block(a) == again.read_block(b)


@pytest.mark.parametrize("sinks", [3, 0])
def test_joined_sinks_go_on(codec: kvtc.Codec, cache: Cache, sinks: int) -> None:
    """Sinks stay sinks; what another stream has coded among them stays coded."""
    few = replace(codec, sinks=3, window=0)
    k, v = cache
    other = replace(few, sinks=sinks)
    second = kvtc.encode(k[:, :, 1:2], v[:, :, 1:2], other, positions=[1])
    file = io.BytesIO(cat(kvtc.encode(k[:, :, :1], v[:, :, :1], few), second))
    with kvtc.open(file, "ab", codec=few) as writer:
        writer.write(k[:, :, 2:9], v[:, :, 2:9])
    found = decoded(file.getvalue(), codec.calibration)
    assert found[2].tolist() == list(range(9))
    roles = [(e.role, e.tokens) for e in StreamFile(file).index]
    assert roles == (
        [(Role.SINKS, 1), (Role.SINKS, 1), (Role.SINKS, 1), (Role.DATA, 6)]
        if sinks
        else [(Role.SINKS, 1), (Role.DATA, 1), (Role.DATA, 7)]
    )


def test_compaction(codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    """What appending superseded goes; what is left can be continued exactly."""
    k, v = cache
    file = io.BytesIO()
    for start in range(0, 180, 60):
        with kvtc.open(file, "ab" if start else "wb", codec=codec) as writer:
            writer.write(k[:, :, start : start + 60], v[:, :, start : start + 60])
    compact = cat(file.getvalue())
    assert len(compact) < len(file.getvalue())
    assert compact == cat(compact)
    assert compact == kvtc.encode(k[:, :, :180], v[:, :, :180], codec)
    file = io.BytesIO(compact)
    with kvtc.open(file, "ab", codec=codec) as writer:
        writer.write(k[:, :, 180:], v[:, :, 180:])
    assert cat(file.getvalue()) == stream


def test_the_digest_is_of_the_whole(codec: kvtc.Codec, cache: Cache) -> None:
    data = kvtc.encode(*cache, codec, token_digest=b"\1" * 32, metadata={"a": 1})
    for found, digest in (
        (cat(data), b"\1" * 32),
        (cut(data, tokens=slice(9)), b""),
        (cut(data, tokens=slice(9), token_digest=b"\2" * 32), b"\2" * 32),
    ):
        header = StreamFile(io.BytesIO(found)).header
        assert (header.token_digest, header.metadata) == (digest, '{"a":1}')


def test_what_does_not_go_together(codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    other = kvtc.encode(*cache, codec=replace(codec, ratio=8))
    with pytest.raises(kvtc.UnsupportedError, match="differ in plan: decode one"):
        cat(stream, other)
    half = kvtc.encode(*(x.astype(np.float16) for x in cache), codec=codec)
    with pytest.raises(kvtc.UnsupportedError, match="differ in dtype, out_dtype"):
        cat(stream, half)
    with pytest.raises(kvtc.UnsupportedError, match=r"stream 2 cannot.*position 0, expected"):
        cat(stream, stream)
    with pytest.raises(ValueError, match="at least one stream"):
        cat()
    with pytest.raises(ValueError, match="step 1, found step 2"):
        cut(stream, tokens=slice(0, 9, 2))
    with pytest.raises(ValueError, match="tokens or positions"):
        cut(stream, tokens=slice(9), positions=slice(9))
    with pytest.raises(TypeError, match="must be a slice, found int"):
        cut(stream, tokens=9)
    with pytest.raises(kvtc.TruncatedError):
        cat(stream[:-1])
    damaged = bytearray(stream)
    damaged[len(stream) // 2] ^= 1
    with pytest.raises(kvtc.ChecksumError):
        cut(bytes(damaged), tokens=slice(None))


@pytest.mark.parametrize("positions", [slice(-5, None), slice(None, -5), slice(-9, -5)])
def test_positions_do_not_count_from_the_end(stream: bytes, positions: slice) -> None:
    """They would name none, or all."""
    with pytest.raises(ValueError, match="must be from 0, found -"):
        cut(stream, positions=positions)


@pytest.mark.parametrize("edit", [kvtc.compact, lambda a, b: kvtc.merge_layers([a], b)])
def test_what_is_read_is_not_written(tmp_path: Path, stream: bytes, edit: Any) -> None:
    """A file object; a path is replaced when all is done."""
    file, path = io.BytesIO(stream), tmp_path / "a.kvtc"
    path.write_bytes(stream)
    with pytest.raises(ValueError, match="the target is one of the sources"):
        edit(file, file)
    with open(path, "r+b") as opened:
        for source in (path, opened):
            with pytest.raises(ValueError, match="the target is one of the sources"):
                edit(source, opened)
    assert file.getvalue() == path.read_bytes() == stream
    with open(path, "rb") as opened:
        edit(opened, path)
    assert sum(e.tokens for e in StreamFile(io.BytesIO(path.read_bytes())).index) == 200


def test_repair(tmp_path: Path, codec: kvtc.Codec, stream: bytes) -> None:
    path = tmp_path / "a.kvtc"
    path.write_bytes(stream[: len(stream) * 2 // 3])
    expected = decoded(stream, codec.calibration)
    kvtc.compact(path, recover=True)
    found = decoded(path.read_bytes(), codec.calibration)
    assert 0 < found[0].shape[2] < 200
    assert same(found, expected, slice(found[0].shape[2]))
    assert list(tmp_path.iterdir()) == [path]


def test_user_records_stay(codec: kvtc.Codec, stream: bytes) -> None:
    file = StreamFile(io.BytesIO(stream))
    writer = kvtc.formats.StreamWriter(file.header)
    data = writer.start() + writer.user(b"mine")
    data += b"".join(writer.block(file.read_block(e)) for e in file.index) + writer.finish()
    assert list(StreamFile(io.BytesIO(cut(data, tokens=slice(5)))).user_records()) == [b"mine"]


def test_tokens_that_left_the_cache_are_not_counted(codec: kvtc.Codec, cache: Cache) -> None:
    """A stream begins later, and more tokens than it has are asked for by mistake."""
    k, v = (x[:, :, 50:90] for x in cache)
    data = kvtc.encode(k, v, codec, positions=np.arange(50, 90))
    with pytest.raises(kvtc.UnsupportedError, match="holds 40, at positions 50 to 89"):
        kvtc.truncate(io.BytesIO(data), 60, io.BytesIO())
    out = io.BytesIO()
    kvtc.cut(io.BytesIO(data), out, positions=slice(None, 60))
    assert kvtc.decode(out.getvalue(), codec.calibration)[0].shape[2] == 10
    kvtc.truncate(io.BytesIO(data), 10, again := io.BytesIO())
    assert again.getvalue() == out.getvalue()
