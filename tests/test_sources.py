"""Memory, mapped files, URLs, growing files; several readers at a time."""

from __future__ import annotations

import contextlib
import http.server
import io
import mmap
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import kvtc_stream as kvtc
from kvtc_stream.formats import StreamFile
from kvtc_stream.io import sources, threads
from kvtc_stream.io.sources import open_source

Cache = tuple[NDArray[Any], NDArray[Any]]


class Counted(MemoryFileSystem):
    """A store that notes every request."""

    protocol = "counted"
    requests: list[tuple[str, int, int]] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("counted://", "memory://"))

    def info(self, path: str, **options: Any) -> Any:
        self.requests.append(("info", 0, 0))
        return super().info(path, **options)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self.requests.append(("read", start, end))
        with super().open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


@pytest.fixture(scope="module", autouse=True)
def store() -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)


@pytest.fixture(scope="module")
def long_stream(codec: kvtc.Codec) -> tuple[bytes, Cache]:
    """6,000 tokens in blocks of 8: bigger than what opening fetches."""
    cache = kvtc.testing.drawn_cache(codec.calibration.geometry, 6000)
    data = kvtc.encode(*cache, codec=replace(codec, block_tokens=8))
    return data, tuple(map(np.asarray, kvtc.decode(data, codec.calibration)))


def equal(found: Any, expected: Cache, tokens: slice) -> bool:
    return all(np.array_equal(x, y[:, :, tokens]) for x, y in zip(found, expected, strict=True))


def test_a_url_takes_few_requests(codec: kvtc.Codec, long_stream: tuple[bytes, Cache]) -> None:
    """Three to open, one for a range of tokens; and no more bytes than the blocks have."""
    data, expected = long_stream
    fsspec.filesystem("memory").pipe_file("/a.kvtc", data)
    Counted.requests.clear()
    with kvtc.open("counted://a.kvtc", calibration=codec.calibration) as reader:
        assert [kind for kind, *_ in Counted.requests] == ["info", "read", "read"]
        Counted.requests.clear()
        assert equal(reader.read(slice(1000, 1128)), expected, slice(1000, 1128))
        ((_, start, end),) = Counted.requests
        blocks = [e for e in StreamFile(io.BytesIO(data)).index if e.start + e.tokens > 1000]
        blocks = [e for e in blocks if e.start < 1128]
        assert (start, end) == (blocks[0].offset, blocks[-1].offset + blocks[-1].length)
        Counted.requests.clear()
        reader.read(slice(-10, None))
        assert Counted.requests == []  # the tail came with the index
    fsspec.filesystem("memory").pipe_file("/b.kvtc", data[: len(data) // 2])
    with pytest.raises(kvtc.TruncatedError):
        kvtc.open("memory://b.kvtc", calibration=codec.calibration)
    with kvtc.open("memory://b.kvtc", calibration=codec.calibration, recover=True) as reader:
        assert 0 < reader.tokens() < 6000
    out = io.BytesIO()
    kvtc.cut("memory://a.kvtc", out, tokens=slice(40))
    assert kvtc.open(out, calibration=codec.calibration).tokens() == 40
    with pytest.raises(FileNotFoundError):
        kvtc.open("memory://none.kvtc", calibration=codec.calibration)


def test_a_small_remote_stream_takes_two_requests(codec: kvtc.Codec, stream: bytes) -> None:
    fsspec.filesystem("memory").pipe_file("/small.kvtc", stream)
    Counted.requests.clear()
    with kvtc.open("counted://small.kvtc", calibration=codec.calibration) as reader:
        reader.read()
    assert [kind for kind, *_ in Counted.requests] == ["info", "read"]


def test_a_server_that_gives_less(codec: kvtc.Codec, long_stream: tuple[bytes, Cache]) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/c.kvtc", long_stream[0])
    with kvtc.open("counted://c.kvtc", calibration=codec.calibration) as reader:
        fs.pipe_file("/c.kvtc", long_stream[0][:9000])
        with pytest.raises(kvtc.TruncatedError, match="somebody is changing it"):
            reader.read(slice(1000, 1100))


class Quiet(http.server.BaseHTTPRequestHandler):
    """Serves the server's ``files``; ``knows_ranges`` or answers with everything."""

    server: Any

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        data, status = self.server.files.get(self.path), 200
        wanted = self.headers["Range"] if self.server.knows_ranges else None
        if data is None:
            return self.send_error(404)
        if wanted:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            data, status = data[first : last + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.server.sent += 1
            with contextlib.suppress(ConnectionError):  # who asked may have heard enough
                self.wfile.write(data)


@pytest.fixture
def web() -> Iterator[Any]:
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        server.files, server.knows_ranges, server.sent = {}, True, 0  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_http(
    codec: kvtc.Codec,
    long_stream: tuple[bytes, Cache],
    web: Any,
    knows_ranges: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that ignores ranges sends a small file once; a large one is refused."""
    data, expected = long_stream
    address = f"http://127.0.0.1:{web.server_port}"
    web.files["/a.kvtc"], web.knows_ranges = data, knows_ranges
    with kvtc.open(f"{address}/a.kvtc", calibration=codec.calibration) as reader:
        assert equal(reader.read(slice(1000, 1128)), expected, slice(1000, 1128))
    assert web.sent == (3 if knows_ranges else 1)
    with pytest.raises(FileNotFoundError, match="none"):
        kvtc.open(f"{address}/none.kvtc", calibration=codec.calibration)
    monkeypatch.setattr("kvtc_stream.io.sources._WHOLE", len(data) - 1)
    if knows_ranges:
        with kvtc.open(f"{address}/a.kvtc", calibration=codec.calibration) as reader:
            assert equal(reader.read(slice(-9, None)), expected, slice(-9, None))
    else:
        with pytest.raises(io.UnsupportedOperation, match=r"gives no ranges.*download it first"):
            kvtc.open(f"{address}/a.kvtc", calibration=codec.calibration)


def test_a_url_that_needs_what_is_not_installed(
    codec: kvtc.Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refused)
    with pytest.raises(kvtc.UnsupportedError, match="s3://a: Install s3fs to access S3"):
        kvtc.open("s3://a", calibration=codec.calibration)


def test_only_memory_that_may_change_is_copied(
    tmp_path: Path, codec: kvtc.Codec, long_stream: tuple[bytes, Cache]
) -> None:
    """So that checksums are of what is decoded."""
    data, _ = long_stream
    path = tmp_path / "a.kvtc"
    path.write_bytes(data)
    writable = bytearray(data)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for source, shared in (
            (data, True),
            (memoryview(writable).toreadonly(), True),
            (writable, False),
            (memoryview(writable), False),
            (mapped, False),
            (memoryview(mapped), False),
            (memoryview(np.frombuffer(mapped, np.uint8)), False),
            (memoryview(np.memmap(path, np.uint8, "r")), False),
        ):
            with kvtc.open(source, calibration=codec.calibration) as reader:
                block = reader.stored(0).block(1)
                own, whole = (np.frombuffer(x, np.uint8) for x in (block.coded, source))
                assert np.shares_memory(own, whole) is shared
                del own, whole, block, source


def test_memory_and_mapped_files(
    tmp_path: Path, codec: kvtc.Codec, stream: bytes, long_stream: tuple[bytes, Cache]
) -> None:
    data, expected = long_stream
    path = tmp_path / "a.kvtc"
    path.write_bytes(data)
    sources: list[Any] = [data, bytearray(data), memoryview(data), memoryview(data).cast("c")]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for source in [*sources, mapped]:
            with kvtc.open(source, calibration=codec.calibration) as reader:
                assert equal(reader.read(slice(50, 90)), expected, slice(50, 90))
    with kvtc.open(path, calibration=codec.calibration, mmap=True) as reader:
        assert equal(reader.read(), expected, slice(None))
    path.write_bytes(b"")
    for file in (path, b""):
        with pytest.raises(kvtc.TruncatedError):
            kvtc.open(file, calibration=codec.calibration, mmap=True)
    for option in ({"mmap": True}, {"follow": 1}):
        with pytest.raises(TypeError, match="only for reading"):
            kvtc.open(path, "wb", codec=codec, **option)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="takes a path or a file object, found bytes"):
        kvtc.open(b"", "wb", codec=codec)  # type: ignore[call-overload]


def test_random_access_touches_what_it_needs(codec: kvtc.Codec) -> None:
    """Header, trailer, index and the blocks: those bytes, and no others."""

    class Noting(io.BytesIO):
        seen: set[int] = set()  # noqa: RUF012

        def read(self, size: int | None = -1, /) -> bytes:
            start = self.tell()
            data = super().read(size)
            self.seen.update(range(start, start + len(data)))
            return data

    cache = kvtc.testing.drawn_cache(codec.calibration.geometry, 1000)
    data = kvtc.encode(*cache, codec=codec)
    file = Noting(data)
    with kvtc.open(file, calibration=codec.calibration) as reader:
        reader.read(slice(500, 532))
    whole = StreamFile(io.BytesIO(data))
    blocks = [e for e in whole.index if e.start < 532 and e.start + e.tokens > 500]
    expected = whole.sizes.header + whole.sizes.index + sum(e.length for e in blocks)
    assert len(file.seen) == expected


# --- growing streams ---


def test_follow_a_growing_stream(tmp_path: Path, codec: kvtc.Codec, cache: Cache) -> None:
    """A reader gets a block soon after it was written, and ends with the stream."""
    path = tmp_path / "a.kvtc"
    got = threading.Event()
    found: list[kvtc.KVBlock] = []

    def follow() -> None:
        with kvtc.open(path, calibration=codec.calibration, follow=20) as reader:
            for block in reader:
                found.append(block)
                got.set()

    k, v = cache
    with path.open("wb") as file, kvtc.open(file, "wb", codec=codec) as writer:
        thread = threading.Thread(target=follow)
        thread.start()
        writer.write(k[:, :, :100], v[:, :, :100])
        file.flush()
        assert got.wait(10)
        writer.write(k[:, :, 100:], v[:, :, 100:])
    began = time.monotonic()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - began < 5
    expected, _ = kvtc.decode(path.read_bytes(), codec.calibration)
    np.testing.assert_array_equal(np.concatenate([b.k for b in found], axis=2), expected)


def test_patience_ends(tmp_path: Path, codec: kvtc.Codec, stream: bytes) -> None:
    path = tmp_path / "a.kvtc"
    path.write_bytes(stream[:-1])
    with (
        kvtc.open(path, calibration=codec.calibration, follow=0.05) as reader,
        pytest.raises(kvtc.TruncatedError),
    ):
        list(reader)


# --- several at a time ---


def read_part(path: str, saved: str, first: int) -> bytes:
    calibration = kvtc.Calibration.load(saved)
    with kvtc.open(path, calibration=calibration) as reader:
        return reader.read(slice(first, first + 50))[0].tobytes()


def test_threads_and_processes_read_one_file(
    tmp_path: Path, codec: kvtc.Codec, long_stream: tuple[bytes, Cache]
) -> None:
    data, (k, v) = long_stream
    path, saved = tmp_path / "a.kvtc", tmp_path / "cal.safetensors"
    path.write_bytes(data)
    codec.calibration.save(saved)
    starts = range(0, 2900, 290)
    with kvtc.open(path, calibration=codec.calibration) as reader:

        def check(first: int) -> bool:
            span = slice(first, first + 70)
            streamed = np.concatenate([b.v for b in reader.blocks(span)], axis=2)
            return equal(reader.read(span), (k, v), span) and np.array_equal(
                streamed, v[:, :, span]
            )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(check, starts))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as processes:
        found = list(
            processes.map(
                read_part, [str(path)] * len(starts), [str(saved)] * len(starts), list(starts)
            )
        )
    for first, part in zip(starts, found, strict=True):
        assert part == np.ascontiguousarray(k[:, :, first : first + 50]).tobytes()


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
def test_readers_beside_a_writer(tmp_path: Path, codec: kvtc.Codec, cache: Cache) -> None:
    """A reader keeps what it opened; one that comes while something is appended is told so."""
    path = tmp_path / "a.kvtc"
    k, v = cache
    path.write_bytes(kvtc.encode(k[:, :, :120], v[:, :, :120], codec))
    expected = tuple(map(np.asarray, kvtc.decode(path.read_bytes(), codec.calibration)))
    with kvtc.open(path, calibration=codec.calibration) as before:
        with kvtc.open(path, "ab", codec=codec) as writer:
            writer.write(k[:, :, 120:], v[:, :, 120:])
            writer._file.flush()
            assert equal(before.read(), expected, slice(None))
            with pytest.raises(kvtc.TruncatedError, match="somebody is appending"):
                kvtc.open(path, calibration=codec.calibration)
            with kvtc.open(path, calibration=codec.calibration, recover=True) as during:
                assert during.tokens() >= 120
                whole = slice(0, 84)  # what was not in the tail
                assert equal(during.read(whole), expected, whole)
        assert equal(before.read(), expected, slice(None))
        with kvtc.open(path, calibration=codec.calibration) as after:
            assert after.tokens() == 200


@given(size=st.integers(0, 400), at=st.integers(0, 420), wanted=st.integers(0, 420))
def test_files_are_read_by_threads(size: int, at: int, wanted: int) -> None:
    """Large pieces of them; what is asked for beyond the end is not there."""
    data = np.random.default_rng(size).bytes(size)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_PIECE", 32)
        patch.setattr(threads, "SHARE", 16)
        patch.setattr(threads.environment, "threads", lambda: 3)
        path = Path(folder, "file")
        path.write_bytes(data)
        with open_source(path) as file:
            file.seek(at)
            found = bytearray(wanted)
            count = file.readinto(found)  # type: ignore[attr-defined]
            assert file.tell() == at + count
        assert found[:count] == data[at : at + wanted]
        assert count == max(min(wanted, size - at), 0)
