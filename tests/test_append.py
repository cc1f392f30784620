"""Streams that are continued: the blocks of one uninterrupted run, and nothing lost on the way."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
from kvtc_stream.formats import RecordType, Role, StreamFile, StreamParser

Cache = tuple[NDArray[Any], NDArray[Any]]
pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")


def blocks(data: bytes, *, data_only: bool = False) -> list[Any]:
    file = StreamFile(io.BytesIO(data))
    found = [file.read_block(e) for e in file.index]
    return [b for b in found if b.role is Role.DATA] if data_only else found


def append(file: io.BytesIO, codec: kvtc.Codec, k: Any, v: Any, **options: Any) -> None:
    with kvtc.open(file, "ab", codec=codec) as writer:
        writer.write(k, v, **options)
    assert writer.statistics.stream_bytes == len(file.getvalue())


@FEWER
@given(cases(), st.data())
def test_the_blocks_are_those_of_one_run(case: Case, data: st.DataObject) -> None:
    """However many times the stream is ended and continued, in every section and dtype."""
    encoder = kvtc.Encoder(case.codec, **case.options)
    whole, file, begun = b"", io.BytesIO(), False
    for i, tokens in enumerate(case.sections):
        for piece in tokens.pieces:
            chunk = tokens.k[:, :, piece], tokens.v[:, :, piece]
            where = None if tokens.positions is None else tokens.positions[piece]
            whole += encoder.encode(*chunk, positions=where, section=i)
            if not begun:
                writer = kvtc.open(file, "wb", codec=case.codec, **case.options)
            elif writer is None:
                writer = kvtc.open(file, "ab", codec=case.codec)
            writer.write(*chunk, positions=where, section=i)
            begun = True
            if data.draw(st.booleans()):
                before = file.getvalue()
                writer.close()
                assert file.getvalue().startswith(before)
                writer = None
    whole += encoder.finish()
    if writer is not None:
        writer.close()
    if case.codec.window:
        assert blocks(file.getvalue(), data_only=True) == blocks(whole, data_only=True)
    for i, tokens in enumerate(case.sections):
        with kvtc.open(file, calibration=case.codec.calibration) as reader:
            assert reader.tokens(i) == tokens.count
    ends = [e for e in StreamFile(file).records if e.type == RecordType.INDEX]
    parser = StreamParser()
    seen = parser.feed(file.getvalue())
    parser.close()
    assert sum(isinstance(x, kvtc.formats.StreamHeader) for x in seen) == len(ends)


def test_a_conversation(tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    """Turn after turn in one file; what is there stays; a pipe gives the same."""
    path = tmp_path / "a.kvtc"
    k, v = cache
    for start in range(0, 200, 40):
        before = path.read_bytes() if path.exists() else b""
        with kvtc.open(path, "ab", codec=codec) as writer:
            writer.write(k[:, :, start : start + 40], v[:, :, start : start + 40])
            assert writer.write(k[:, :, :0], v[:, :, :0]) == 0
        assert path.read_bytes().startswith(before)
        with kvtc.open(path, calibration=codec.calibration) as reader:
            assert reader.tokens() == start + 40
    assert list(tmp_path.iterdir()) == [path]
    data = path.read_bytes()
    assert blocks(data) == blocks(stream)
    expected = kvtc.decode(stream, codec.calibration)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        with kvtc.open(cat.stdout, calibration=codec.calibration) as reader:
            piped = list(reader)
    for i, x in enumerate(expected):
        found = np.concatenate([(b.k, b.v)[i] for b in piped], axis=2)
        np.testing.assert_array_equal(found, x)
    with pytest.raises(kvtc.UnsupportedError, match="was appended to, and what follows supersedes"):
        kvtc.Decoder(codec.calibration).decode(data)


def test_what_is_appended_to_must_fit(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    path = tmp_path / "a.kvtc"
    path.write_bytes(stream)
    for change, message in (
        ({"window": 25}, "written with 24, not 25, window"),
        ({"sinks": 5}, "written with 4, not 5, sinks"),
        ({"block_tokens": 8}, "written with 16, not 8, block_tokens"),
        ({"ratio": 8}, "written with another plan"),
        ({"out_dtype": "float16"}, "written with 'float32', not 'float16', out_dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            kvtc.open(path, "ab", codec=replace(codec, **change))
    other = kvtc.Calibrator(codec.calibration.geometry)
    other.update(*kvtc.testing.drawn_cache(codec.calibration.geometry, 512, seed=5))
    with pytest.raises(kvtc.CalibrationMismatchError, match="found"):
        kvtc.open(path, "ab", codec=kvtc.Codec(other.finish(), ratio=4))
    with pytest.raises(TypeError, match="in the stream already"):
        kvtc.open(path, "ab", codec=codec, metadata={})  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="another RoPE"):
        kvtc.open(path, "ab", codec=codec, rope=kvtc.Rope.from_theta(5e5, 8))
    with pytest.raises(ValueError, match="other k_scale and v_scale"):
        kvtc.open(path, "ab", codec=codec, k_scale=2.0)
    with (
        kvtc.open(path, "ab", codec=codec) as writer,
        pytest.raises(TypeError, match="expected float32 as the stream so far"),
    ):
        writer.write(*(x.astype(np.float16) for x in cache))
    for data in (stream[:-1], stream + b"x", b"nothing at all"):
        path.write_bytes(data)
        with pytest.raises(kvtc.FormatError):
            kvtc.open(path, "ab", codec=codec)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("key", [b"", b"secret"])
def test_a_stream_without_tokens_goes_on_in_any_dtype(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, key: bytes
) -> None:
    """The result is the stream that was written at once, and an exception leaves the old one."""
    path, buffer = tmp_path / "a.kvtc", io.BytesIO()
    rope, halves = kvtc.Rope.from_theta(500, 8), tuple(x.astype(np.float16) for x in cache)
    options: dict[str, Any] = {"metadata": {"a": 1}, "rope": rope, "key": key}
    for file, content in ((path, path.read_bytes), (buffer, buffer.getvalue)):
        with kvtc.open(file, "wb", codec=codec, **options):
            pass
        empty = content()
        with kvtc.open(file, "ab", codec=codec, key=key):
            pass
        assert content() == empty
        with pytest.raises(RuntimeError), kvtc.open(file, "ab", codec=codec, key=key) as writer:  # noqa: PT012
            writer.write(*halves)
            raise RuntimeError
        assert content() == empty
        with pytest.raises(ValueError, match="window"):
            kvtc.open(file, "ab", codec=replace(codec, window=8), key=key)
        with kvtc.open(file, "ab", codec=codec, key=key) as writer:
            writer.write(*halves)
        assert content() == kvtc.encode(*halves, codec, **options)
        assert writer.statistics.stream_bytes == len(content())


def test_scales_of_an_fp8_stream(codec: kvtc.Codec) -> None:
    shape = codec.calibration.geometry
    k, v = kvtc.testing.drawn_cache(shape, 60, dtype=kvtc.DType.FLOAT8_E4M3FN)
    file = io.BytesIO(kvtc.encode(k, v, codec, k_scale=0.5, v_scale=2.0))
    with kvtc.open(file, "ab", codec=codec, k_scale=0.5, v_scale=2.0) as writer:
        writer.write(k, v)
    with kvtc.open(file, calibration=codec.calibration) as reader:
        np.testing.assert_array_equal(reader.read(slice(0, 4))[0], reader.read(slice(0, 4))[0])
        assert reader.tokens() == 120
        tail = reader.read(slice(-5, None))[1]
    np.testing.assert_array_equal(
        np.asarray(tail).astype(np.float32), 2 * v[:, :, -5:].astype(np.float32)
    )
    with pytest.raises(ValueError, match="other k_scale and v_scale"):
        kvtc.open(file, "ab", codec=codec, k_scale=0.25)


def test_an_exception_cuts_off_what_was_added(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    path = tmp_path / "a.kvtc"
    path.write_bytes(stream)
    buffer = io.BytesIO(stream)
    for file, content in ((path, path.read_bytes), (buffer, buffer.getvalue)):
        with pytest.raises(RuntimeError), kvtc.open(file, "ab", codec=codec) as writer:  # noqa: PT012
            writer.write(*cache, positions=np.arange(200, 400))
            raise RuntimeError
        assert content() == stream
    with kvtc.open(path, "ab", codec=codec):
        for mode in ("wb", "ab"):
            with pytest.raises(kvtc.StateError, match=r"another writer is writing 'a\.kvtc'"):
                kvtc.open(path, mode, codec=codec)
    assert path.read_bytes() == stream  # nothing was written, nothing was added


def test_a_failure_after_recovery_leaves_what_was_recovered(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    path = tmp_path / "a.kvtc"
    buffer = io.BytesIO(stream[: len(stream) // 2])
    path.write_bytes(buffer.getvalue())
    end = StreamFile(io.BytesIO(buffer.getvalue()), recover=True).end
    assert 0 < end < len(buffer.getvalue())
    for file, content in ((path, path.read_bytes), (buffer, buffer.getvalue)):
        with (  # noqa: PT012
            pytest.raises(RuntimeError),
            kvtc.open(file, "ab", codec=codec, recover=True) as writer,
        ):
            writer.write(*cache, positions=np.arange(200, 400))
            raise RuntimeError
        assert content() == stream[:end]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="limits of file sizes are Unix's")
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    import resource

    path = tmp_path / "a.kvtc"
    path.write_bytes(stream)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(stream) + 3000, before[1]))
        with (
            pytest.raises(OSError, match="File too large"),
            kvtc.open(path, "ab", codec=codec) as writer,
        ):
            writer.write(*cache, positions=np.arange(200, 400))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == stream


def test_readers_beside_a_writer_that_appends(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    """One that is open reads what it had; one that comes is told what to do, and can."""
    path, calibration = tmp_path / "a.kvtc", codec.calibration
    path.write_bytes(stream)
    before = kvtc.decode(stream, calibration)
    with kvtc.open(path, calibration=calibration) as early:
        with kvtc.open(path, "ab", codec=codec) as writer:
            kvtc.open(path, calibration=calibration).close()  # nothing is written yet
            seen = [200]
            for start in range(0, 200, 40):
                some = slice(start, start + 40)
                writer.write(*(x[:, :, some] for x in cache))
                with pytest.raises(kvtc.TruncatedError, match=r"somebody is appending.*recover="):
                    kvtc.open(path, calibration=calibration)
                with kvtc.open(path, calibration=calibration, recover=True) as late:
                    seen.append(late.tokens())
                    old = late.read(slice(164))[0]  # the rest is coded meanwhile
                np.testing.assert_array_equal(old, before[0][:, :, :164])
        assert seen == sorted(seen)
        assert seen[-1] > 300
        assert early.tokens() == 200
        for x, y in zip(early.read(), before, strict=True):
            np.testing.assert_array_equal(x, y)
    with kvtc.open(path, calibration=calibration) as late:
        assert late.tokens() == 400


def test_the_token_digest_follows(codec: kvtc.Codec, cache: Cache) -> None:
    k, v = cache
    file = io.BytesIO(kvtc.encode(k[:, :, :90], v[:, :, :90], codec, token_digest=bytes(32)))
    with kvtc.open(file, "ab", codec=codec, token_digest=b"\1" * 32) as writer:
        writer.write(k[:, :, 90:], v[:, :, 90:])
    assert kvtc.open(file, calibration=codec.calibration).header.token_digest == b"\1" * 32
    append(file, codec, k[:, :, :1], v[:, :, :1])
    assert kvtc.open(file, calibration=codec.calibration).header.token_digest == b""


def cut_off(codec: kvtc.Codec, cache: Cache) -> tuple[bytes, int]:
    """A stream of 90 tokens continued to 200, and where the first ends."""
    k, v = cache
    file = io.BytesIO(kvtc.encode(k[:, :, :90], v[:, :, :90], codec))
    first = len(file.getvalue())
    append(file, codec, k[:, :, 90:], v[:, :, 90:])
    return file.getvalue(), first


def test_a_continuation_that_was_cut_off_anywhere(codec: kvtc.Codec, cache: Cache) -> None:
    """No token of the first end is ever lost, and what counts grows with what is there."""
    data, first = cut_off(codec, cache)
    whole = kvtc.decode(data, codec.calibration)[0]
    before = kvtc.decode(data[:first], codec.calibration)[0]
    reached = 90
    records = [e.offset for e in StreamFile(io.BytesIO(data)).records if e.offset >= first]
    near = {e + i for e in records for i in (-1, 0, 1, 40)}
    for size in sorted({*range(first, len(data), 211), *near} - {first - 1}):
        file = io.BytesIO(data[:size])
        if size > first:
            with pytest.raises(kvtc.TruncatedError):
                StreamFile(file)
        recovered = StreamFile(file, recover=True)
        tokens = sum(e.tokens for e in recovered.index)
        assert tokens >= reached
        if tokens > reached or size == first:
            with kvtc.open(file, calibration=codec.calibration, recover=True) as reader:
                k = reader.read()[0]
            expected = before if tokens == 90 else whole
            np.testing.assert_array_equal(k, expected[:, :, :tokens])
        reached = tokens
    assert reached == 200


def test_continue_what_was_cut_off(codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    k, v = cache
    data, first = cut_off(codec, cache)
    for size in (first + 10, first + 5000, len(data) - 1, len(stream) // 2):
        file = io.BytesIO((stream if size == len(stream) // 2 else data)[:size])
        with kvtc.open(file, calibration=codec.calibration, recover=True) as reader:
            tokens = reader.tokens()
            expected = reader.read()[0]
        with kvtc.open(file, "ab", codec=codec, recover=True) as writer:
            writer.write(k[:, :, tokens:], v[:, :, tokens:])
        with kvtc.open(file, calibration=codec.calibration) as reader:
            assert reader.tokens() == 200
            coded = [b for b in reader.blocks(slice(0, tokens)) if b.role is Role.DATA]
        for block in coded:
            if block.start + block.tokens <= tokens - 24:
                span = slice(block.start, block.start + block.tokens)
                np.testing.assert_array_equal(block.k, expected[:, :, span])


def with_state(stream: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The stream with another ENCODER record."""
    file = StreamFile(io.BytesIO(stream))
    writer = kvtc.formats.StreamWriter(file.header)
    data = writer.start() + b"".join(writer.block(file.read_block(e)) for e in file.index)
    state = json.loads(file.encoder_state())
    return data + writer.encoder(json.dumps(change(state)).encode()) + writer.finish()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: [],
        lambda s: {**s, "control": []},
        lambda s: {**s, "control": [{}]},
        lambda s: {**s, "control": [{**s["control"][0], "slope": 0}]},
        lambda s: {**s, "control": [{**s["control"][0], "slope": 1e999}]},
        lambda s: {**s, "control": [{**s["control"][0], "tokens": -1}]},
        lambda s: {**s, "control": [{**s["control"][0], "tokens": "1"}]},
        lambda s: {**s, "control": [{**s["control"][0], "amounts": [1.0, 2.0]}]},
        lambda s: {**s, "control": [{**s["control"][0], "amounts": None}]},
        lambda s: {**s, "control": [{**s["control"][0], "mean": 1e9}]},
    ],
)
def test_states_that_no_encoder_left(
    codec: kvtc.Codec, stream: bytes, change: Callable[[dict[str, Any]], Any]
) -> None:
    with pytest.raises(kvtc.FormatError, match="ENCODER record"):
        kvtc.open(io.BytesIO(with_state(stream, change)), "ab", codec=codec)


def test_a_state_of_another_target_is_left_alone(
    codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    file = io.BytesIO(with_state(stream, lambda s: {**s, "target": ["ratio", 5]}))
    append(file, codec, *cache)
    assert kvtc.open(file, calibration=codec.calibration).tokens() == 400


#: Forks a process that writes to a path until it is killed, for each line it is given.
_FORKER = """
import os, sys, kvtc_stream as kvtc
codec = kvtc.Codec(kvtc.Calibration.load(sys.argv[1]), ratio=4, window=24, block_tokens=16)
k, v = kvtc.testing.drawn_cache(codec.calibration.geometry, tokens=200)
kvtc.encode(k, v, codec)
for line in sys.stdin:
    mode, path = line.rstrip().split(" ", 1)
    child = os.fork()
    if not child:
        while True:
            with kvtc.open(path, mode, codec=codec) as writer:
                for start in range(0, 200, 10):
                    writer.write(k[:, :, start:start + 10], v[:, :, start:start + 10])
                    writer._file.flush()
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_killed_writers_leave_what_can_be_recovered(
    tmp_path: Path, calibration: kvtc.Calibration
) -> None:
    """A real process, killed while it writes and while it appends (KVTC_KILLS tells how often)."""
    saved, path = tmp_path / "cal.safetensors", tmp_path / "a.kvtc"
    calibration.save(saved)
    codec = kvtc.Codec(calibration, ratio=4, window=24, block_tokens=16)
    cache = kvtc.testing.drawn_cache(calibration.geometry, 200)
    exact = kvtc.decode(kvtc.encode(*cache, codec), calibration)[0]
    rng = random.Random(0)
    recovered = 0
    with subprocess.Popen(
        [sys.executable, "-c", _FORKER, str(saved)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    ) as forker:
        assert forker.stdin is not None
        assert forker.stdout is not None
        for i in range(int(os.environ.get("KVTC_KILLS", "30"))):
            path.write_bytes(kvtc.encode(cache[0][:, :, :90], cache[1][:, :, :90], codec))
            before = path.read_bytes()
            mode = "wb" if i % 3 == 0 else "ab"
            forker.stdin.write(f"{mode} {path}\n")
            forker.stdin.flush()
            child = int(forker.stdout.readline())
            time.sleep(rng.uniform(0, 0.15))
            os.kill(child, signal.SIGKILL)
            assert forker.stdout.readline() == "dead\n"
            if mode == "wb":  # the file is an old or a new one, and whole
                with kvtc.open(path, calibration=calibration) as reader:
                    assert reader.tokens() in (90, 200)
                partial = path.with_name(".a.kvtc.partial")
                if partial.exists() and partial.stat().st_size >= 1000:
                    with kvtc.open(partial, calibration=calibration, recover=True) as reader:
                        tokens = reader.tokens()
                        ends = [e.offset + e.length for e in reader._stream.index]
                        found = reader.read()[0]
                    coded = min(tokens, 164)
                    np.testing.assert_array_equal(found[:, :, :coded], exact[:, :, :coded])
                    recovered += 1
                    assert partial.stat().st_size - max(ends, default=0) >= 0
            else:
                assert path.read_bytes().startswith(before)
                with kvtc.open(path, calibration=calibration, recover=True) as reader:
                    tokens = reader.tokens()
                    assert tokens >= 90
                    assert sum(b.tokens for b in reader) == tokens
                with kvtc.open(path, "ab", codec=codec, recover=True) as writer:
                    writer.write(cache[0][:, :, :1], cache[1][:, :, :1])
                with kvtc.open(path, calibration=calibration) as reader:
                    assert reader.tokens() == tokens + 1
                recovered += tokens > 90
        forker.stdin.close()
    assert recovered
