"""Streams in files, in memory and in pipes."""

from __future__ import annotations

import functools
import gc
import io
import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import kvtc_stream as kvtc

Array = NDArray[Any]
Cache = tuple[Array, Array]


def files(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def test_write_and_read(tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    path = tmp_path / "a.kvtc"
    k, v = cache
    with kvtc.open(path, "wb", codec=codec) as writer:
        assert writer.write(k[:, :, :90], v[:, :, :90]) > 0
        assert not path.exists()
        writer.write(k[:, :, 90:], v[:, :, 90:])
    assert path.read_bytes() == stream
    assert files(tmp_path) == {"a.kvtc"}
    assert writer.statistics.stream_bytes == len(stream)
    writer.close()
    with pytest.raises(kvtc.StateError, match="the writer is closed"):
        writer.write(k, v)
    for file in (path, str(path), io.BytesIO(stream)):
        with kvtc.open(file, calibration=codec.calibration) as reader:
            assert reader.tokens() == 200
            assert sum(b.tokens for b in reader) == 200
            back = reader.read()
        for x, y in zip(back, kvtc.decode(stream, codec.calibration), strict=True):
            np.testing.assert_array_equal(x, y)


def test_links_and_special_files_stay(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    link, pipe = tmp_path / "link.kvtc", tmp_path / "pipe"
    link.symlink_to(tmp_path / "real.kvtc")
    with kvtc.open(link, "wb", codec=codec) as writer:
        writer.write(*cache)
    assert link.is_symlink()
    assert (tmp_path / "real.kvtc").read_bytes() == stream
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    with kvtc.open(pipe, "wb", codec=codec) as writer:
        writer.write(*cache)
    reader.join(10)
    assert found == [stream]
    assert pipe.is_fifo()
    assert files(tmp_path) == {"link.kvtc", "real.kvtc", "pipe"}


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are Unix's")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_permissions_stay_when_a_file_is_replaced(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes, mode: int
) -> None:
    path = tmp_path / "a.kvtc"

    def rewrite() -> None:
        with kvtc.open(path, "wb", codec=codec) as writer:
            writer.write(*cache)
            (partial,) = tmp_path.glob(".*")
            assert not stat.S_IMODE(partial.stat().st_mode) & 0o077

    for change in (rewrite, lambda: kvtc.cut(path, path, tokens=slice(None, 100))):
        path.unlink(missing_ok=True)
        path.write_bytes(stream)
        path.chmod(mode)
        change()
        assert stat.S_IMODE(path.stat().st_mode) == mode
    if mode & 0o200:
        with kvtc.open(path, "ab", codec=codec) as writer:
            writer.write(*cache)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    calibration = tmp_path / "calibration.safetensors"
    calibration.touch()
    calibration.chmod(mode)
    codec.calibration.save(calibration)
    assert stat.S_IMODE(calibration.stat().st_mode) == mode


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are Unix's")
def test_new_files_follow_the_umask(tmp_path: Path, codec: kvtc.Codec) -> None:
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            with kvtc.open(tmp_path / f"{mask}", "wb", codec=codec):
                pass
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{mask}").stat().st_mode) == 0o666 & ~mask


def test_names_as_long_as_file_systems_take(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    """Two that differ in their last letter are two files; letters may take several bytes."""
    for letter in ("x", "é"):
        names = [letter * (254 // len(letter.encode())) + end for end in "ab"]
        first, second = (tmp_path / name for name in names)
        with kvtc.open(first, "wb", codec=codec) as writer:
            with kvtc.open(second, "wb", codec=codec) as other:
                other.write(*cache)
            with pytest.raises(kvtc.StateError, match=f"another writer is writing '{names[0]}'"):
                kvtc.open(first, "wb", codec=codec)
            writer.write(*cache)
        assert first.read_bytes() == second.read_bytes() == stream
        with kvtc.open(first, "ab", codec=codec) as writer:
            writer.write(*cache)
        assert files(tmp_path) == set(names)
        first.unlink()
        second.unlink()


def test_open_wants_the_right_arguments(tmp_path: Path, codec: kvtc.Codec, stream: bytes) -> None:
    path = tmp_path / "a"
    open_anyhow: Any = kvtc.open
    with pytest.raises(ValueError, match="mode must be 'rb', 'wb' or 'ab', found 'r'"):
        open_anyhow(path, "r", calibration=codec.calibration)
    with pytest.raises(TypeError, match="writing takes codec="):
        open_anyhow(path, "wb")
    with pytest.raises(TypeError, match="reading takes calibration="):
        open_anyhow(io.BytesIO(stream))
    with pytest.raises(TypeError, match="metadata"):
        open_anyhow(io.BytesIO(stream), calibration=codec.calibration, metadata={})
    for option in ({"calibration": codec.calibration}, {"backend": "cpu"}, {"limits": object()}):
        with pytest.raises(TypeError, match=next(iter(option))):
            open_anyhow(path, "wb", codec=codec, **option)
    with pytest.raises(TypeError, match="unexpected keyword"):
        open_anyhow(path, "wb", codec=codec, colour="red")
    with pytest.raises(FileNotFoundError, match="no directory"):
        kvtc.open(tmp_path / "none" / "a", "wb", codec=codec)
    with pytest.raises(IsADirectoryError, match="is a directory: name a file in it"):
        kvtc.open(tmp_path, "wb", codec=codec)
    with pytest.raises(FileNotFoundError):
        kvtc.open(path, calibration=codec.calibration)
    assert files(tmp_path) == set()


def test_an_exception_leaves_the_old_file(tmp_path: Path, codec: kvtc.Codec, cache: Cache) -> None:
    path = tmp_path / "a.kvtc"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="mine"), kvtc.open(path, "wb", codec=codec) as writer:  # noqa: PT012
        writer.write(*cache)
        assert files(tmp_path) == {"a.kvtc", ".a.kvtc.partial"}
        raise RuntimeError("mine")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == {"a.kvtc"}
    with pytest.raises(kvtc.StateError, match="the writer is closed"):
        writer.write(*cache)


def test_a_failed_encoder_leaves_the_old_file(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.kvtc"
    path.write_bytes(b"old")
    writer = kvtc.open(path, "wb", codec=codec)
    with monkeypatch.context() as patch:
        patch.setattr("kvtc_stream.backends.cpu_payloads.UniformCoding.quantise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.write(*cache)
    with pytest.raises(kvtc.StateError, match="failed by an earlier exception"):
        writer.close()
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == {"a.kvtc"}
    writer.close()


def test_a_wrong_chunk_does_not_fail_the_writer(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    path = tmp_path / "a.kvtc"
    with kvtc.open(path, "wb", codec=codec) as writer:
        with pytest.raises(ValueError, match="shape"):
            writer.write(cache[0][:1], cache[1])
        writer.write(*cache)
    assert path.read_bytes() == stream


def test_a_forgotten_writer(tmp_path: Path, codec: kvtc.Codec, cache: Cache) -> None:
    """Nothing is left behind, and the place is free."""
    path, buffer = tmp_path / "a.kvtc", io.BytesIO()
    for file in (path, buffer):
        writer = kvtc.open(file, "wb", codec=codec)
        writer.write(*cache)
        del writer
        gc.collect()
        with kvtc.open(file, "wb", codec=codec) as writer:
            writer.write(*cache)
    assert files(tmp_path) == {"a.kvtc"}


def test_two_writers(tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes) -> None:
    path = tmp_path / "a.kvtc"
    with kvtc.open(path, "wb", codec=codec) as writer:
        writer.write(*cache)
        for same in (path, tmp_path / "." / "a.kvtc"):
            with pytest.raises(kvtc.StateError, match=r"another writer is writing 'a\.kvtc'"):
                kvtc.open(same, "wb", codec=codec)
        with kvtc.open(tmp_path / "b.kvtc", "wb", codec=codec) as other:
            other.write(*cache)
    assert path.read_bytes() == (tmp_path / "b.kvtc").read_bytes() == stream
    buffer = io.BytesIO()
    with kvtc.open(buffer, "wb", codec=codec) as writer:
        with pytest.raises(kvtc.StateError, match="another writer is writing to this file object"):
            kvtc.open(buffer, "wb", codec=codec)
        writer.write(*cache)
    assert buffer.getvalue() == stream
    with kvtc.open(buffer, "wb", codec=codec) as writer:  # one after the other is fine
        writer.write(*cache)
    assert buffer.getvalue() == 2 * stream


def test_a_partial_file_of_a_crash_is_overwritten(
    tmp_path: Path, codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    (tmp_path / ".a.kvtc.partial").write_bytes(b"x" * 10**6)
    with kvtc.open(tmp_path / "a.kvtc", "wb", codec=codec) as writer:
        writer.write(*cache)
    assert (tmp_path / "a.kvtc").read_bytes() == stream
    assert files(tmp_path) == {"a.kvtc"}


class Sink:
    """A file object of a user's own, that says nothing or little of what it took."""

    def __init__(self, most: int | None) -> None:
        self.data, self.most = bytearray(), most

    def write(self, data: Any) -> int | None:
        taken = bytes(data[: self.most])
        self.data += taken
        return len(taken) if self.most else None

    def flush(self) -> None: ...


def test_a_raw_file_that_would_block_loses_nothing(codec: kvtc.Codec, cache: Cache) -> None:
    class Blocking(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, _: Any) -> None:
            return None

    writer = kvtc.open(Blocking(), "wb", codec=codec)
    with pytest.raises(BlockingIOError, match="took nothing: give a blocking one"):
        writer.write(*cache)


@pytest.mark.parametrize("most", [None, 7])
def test_file_objects_of_other_makes(
    codec: kvtc.Codec, cache: Cache, stream: bytes, most: int | None
) -> None:
    sink: Any = Sink(most)
    with kvtc.open(sink, "wb", codec=codec) as writer:
        writer.write(*cache)
    assert sink.data == stream


def test_a_full_disk(codec: kvtc.Codec, cache: Cache) -> None:
    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    writer = kvtc.open(io.BufferedWriter(Full(), 1), "wb", codec=codec)
    with pytest.raises(OSError, match="No space left"):
        writer.write(*cache)
    with pytest.raises(kvtc.StateError, match="the writer is failed by an earlier exception"):
        writer.write(*cache)
    with pytest.raises(kvtc.StateError, match="cannot close"):
        writer.close()


# --- pipes ---


def test_blocks_come_through_a_pipe_while_it_is_written(
    codec: kvtc.Codec, cache: Cache, stream: bytes
) -> None:
    """A reader gets a block when the block has been written, not when much has."""
    source, target = os.pipe()
    k, v = cache
    got = threading.Event()
    seen: list[int] = []

    def read() -> None:
        with (
            os.fdopen(source, "rb") as file,
            kvtc.open(file, calibration=codec.calibration) as reader,
        ):
            for block in reader:
                seen.append(block.tokens)
                got.set()

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(target, "wb") as file, kvtc.open(file, "wb", codec=codec) as writer:
        writer.write(k[:, :, :100], v[:, :, :100])
        file.flush()
        in_time = got.wait(10)
        writer.write(k[:, :, 100:], v[:, :, 100:])
    thread.join()
    assert in_time
    assert sum(seen) == 200


class Pipe(io.RawIOBase):
    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._data.readinto(buffer)


def test_pipes_have_no_random_access(codec: kvtc.Codec, stream: bytes) -> None:
    reader = kvtc.open(Pipe(stream), calibration=codec.calibration)
    for use in (reader.read, reader.tokens):
        with pytest.raises(kvtc.UnsupportedError, match="a pipe has no random access"):
            use()
    blocks = list(reader.blocks(slice(50, 120), slice(1, 2)))
    k, _ = kvtc.decode(stream, codec.calibration)
    joined = np.concatenate([b.k for b in blocks], axis=2)
    np.testing.assert_allclose(joined, k[1:, :, 50:120], atol=1e-5)
    reader = kvtc.open(Pipe(stream), calibration=codec.calibration)
    with pytest.raises(kvtc.UnsupportedError, match="count from the end"):
        list(reader.blocks(slice(-5, None)))


@pytest.mark.parametrize("size", [0, 10, 300, -1])
def test_truncated_pipes_and_files(codec: kvtc.Codec, stream: bytes, size: int) -> None:
    for file in (Pipe(stream[:size]), io.BytesIO(stream[:size])):
        with pytest.raises(kvtc.TruncatedError):
            list(kvtc.open(file, calibration=codec.calibration))


# --- random access ---


def slices(size: int) -> st.SearchStrategy[slice]:
    """With ends before, in and after ``size`` things, from either side."""
    end = st.none() | st.integers(-size - 3, size + 3)
    return st.builds(slice, end, end, st.sampled_from([None, 1]))


@given(slices(200), slices(2))
def test_slices_are_pythons(tokens: slice, layers: slice) -> None:
    stream, calibration, (k, v) = whole_stream()
    with kvtc.open(io.BytesIO(stream), calibration=calibration) as reader:
        part = reader.read(tokens, layers)
    for x, y in zip((k, v), part, strict=True):
        expected = x[layers][:, :, tokens]
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, atol=1e-5)


@functools.cache
def whole_stream() -> tuple[bytes, kvtc.Calibration, tuple[Array, Array]]:
    calibration = kvtc.testing.tiny_calibration()
    codec = kvtc.Codec(calibration, ratio=4, window=24, block_tokens=16)
    stream = kvtc.encode(*kvtc.testing.drawn_cache(calibration.geometry, 200), codec=codec)
    k, v = kvtc.decode(stream, calibration)
    return stream, calibration, (np.asarray(k), np.asarray(v))


def test_wrong_slices(codec: kvtc.Codec, stream: bytes) -> None:
    with kvtc.open(io.BytesIO(stream), calibration=codec.calibration) as reader:
        with pytest.raises(ValueError, match="tokens must be a slice of step 1, found step 2"):
            reader.read(slice(0, 10, 2))
        with pytest.raises(TypeError, match="layers must be a slice, found int"):
            reader.read(None, 1)  # type: ignore[arg-type]
        for section in (1, -1):
            for use in (reader.read, reader.blocks, reader.tokens):
                with pytest.raises(ValueError, match="section must be from 0 to 0"):
                    use(section=section)


def test_wrong_sections_of_an_empty_stream(codec: kvtc.Codec) -> None:
    data = kvtc.Encoder(codec).finish()
    with kvtc.open(io.BytesIO(data), calibration=codec.calibration) as reader:
        assert reader.tokens() == 0
        with pytest.raises(ValueError, match="section must be from 0 to 0"):
            reader.tokens(1)


def test_only_what_is_needed_is_read(codec: kvtc.Codec, stream: bytes) -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.taken += len(data)
            return data

    file = Counting(stream)
    with kvtc.open(file, calibration=codec.calibration) as reader:
        file.taken = 0
        reader.read(slice(100, 110))
        assert 0 < file.taken < len(stream) / 4


def test_a_closed_reader(tmp_path: Path, codec: kvtc.Codec, stream: bytes) -> None:
    path = tmp_path / "a.kvtc"
    path.write_bytes(stream)
    with kvtc.open(path, calibration=codec.calibration) as reader:
        pass
    reader.close()
    for use in (reader.read, lambda: list(reader), lambda: list(reader.blocks())):
        with pytest.raises(kvtc.StateError, match="the reader is closed"):
            use()


def test_refused_streams_close_their_file(tmp_path: Path, codec: kvtc.Codec) -> None:
    """An unclosed file would be a ResourceWarning, which is an error here."""
    path = tmp_path / "a.kvtc"
    path.write_bytes(b"no stream at all" * 10)
    with pytest.raises(kvtc.FormatError):
        kvtc.open(path, calibration=codec.calibration)
    gc.collect()


def test_readers_in_threads(codec: kvtc.Codec, stream: bytes) -> None:
    from concurrent.futures import ThreadPoolExecutor

    k, _ = kvtc.decode(stream, codec.calibration)
    with kvtc.open(io.BytesIO(stream), calibration=codec.calibration) as reader:

        def check(first: int) -> bool:
            return np.array_equal(
                reader.read(slice(first, first + 40))[0], k[:, :, first : first + 40]
            )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(check, range(0, 160, 7)))


def test_a_stream_that_was_cut_off_gives_its_whole_blocks(
    calibration: kvtc.Calibration, stream: bytes
) -> None:
    k, v = kvtc.decode(stream, calibration)
    cut = io.BytesIO(stream[: len(stream) * 2 // 3])
    with pytest.raises(kvtc.TruncatedError):
        kvtc.open(cut, calibration=calibration)
    with kvtc.open(cut, calibration=calibration, recover=True) as reader:
        assert isinstance(reader.fault, kvtc.TruncatedError)
        count = reader.tokens()
        assert 0 < count < k.shape[2]
        for whole, part in zip((k, v), reader.read(), strict=True):
            np.testing.assert_array_equal(part, whole[:, :, :count])
    with kvtc.open(io.BytesIO(stream), calibration=calibration, recover=True) as reader:
        assert reader.fault is None
        assert reader.tokens() == k.shape[2]
