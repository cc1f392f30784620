"""What a stream can be read from, as file objects: memory, mapped files, URLs, growing files."""

from __future__ import annotations

import io
import mmap
import os
import stat
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np

from kvtc_stream.errors import TruncatedError, UnsupportedError
from kvtc_stream.io.memory import copied
from kvtc_stream.io.threads import copy, spread

#: What a stream can be read from.
Source = str | os.PathLike[str] | BinaryIO | bytes | bytearray | memoryview | mmap.mmap

#: Bytes at the front and at the end of a remote file that are fetched when it is opened: header,
#: trailer and index are in there, unless there are more than some thousand blocks.
_FRONT, _BACK = 1 << 16, 1 << 18
#: Bytes of a remote file that may come whole, from a server that does not know ranges.
_WHOLE = 64 << 20
#: Bytes of a file that a thread reads at a time.
_PIECE = 4 << 20
#: Bytes from which on a copy is worth avoiding.
_LARGE = 1 << 16
#: Bytes of blocks in constant memory that are looked at together.
_READ_AHEAD = 256 << 20
#: Seconds between looks at a growing file.
_POLL = 0.02


@contextmanager
def open_source(source: Source, *, mapped: bool = False) -> Iterator[BinaryIO]:
    """A binary file object of a source; closed at the end unless it was one.

    ``mapped``: a path is mapped into memory, not read. Nobody may shorten the file meanwhile.
    """
    if isinstance(source, str | os.PathLike):
        if "://" in os.fspath(source):
            with _Ranges.open(os.fspath(source)) as remote:
                yield cast(BinaryIO, remote)
            return
        with open(source, "rb") as file:
            status = os.fstat(file.fileno())
            if not mapped or not status.st_size:
                with _File(file.fileno(), closefd=False) as own:
                    yield cast(BinaryIO, own if stat.S_ISREG(status.st_mode) else file)
                return
            with (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole,
                memoryview(whole) as view,
                _Buffer(view) as buffer,
            ):
                yield cast(BinaryIO, buffer)
    elif isinstance(source, bytes | bytearray | memoryview | mmap.mmap):
        with (
            memoryview(source) as view,
            view.cast("B") as data,
            _Buffer(data, constant=_is_constant(view)) as buffer,
        ):
            yield cast(BinaryIO, buffer)
    elif not hasattr(source, "read"):
        raise TypeError(
            f"a stream is read from a path, a binary file or bytes, found {type(source).__name__}: "
            f"pass memoryview(…) of what holds bytes"
        )
    else:
        yield source


class _File(io.FileIO):
    """A file that threads read large pieces of: one copies about 4 GB/s from the system's cache."""

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what is next; how many bytes that are."""
        view = memoryview(buffer).cast("B")
        if len(view) < 2 * _PIECE or not hasattr(os, "preadv"):
            return super().readinto(view)
        at = self.tell()

        def read(first: int) -> int:
            return os.preadv(self.fileno(), [view[first : first + _PIECE]], at + first)

        firsts = range(0, len(view), _PIECE)
        counts = spread(read, [(first,) for first in firsts], len(view))
        expected = [min(_PIECE, len(view) - first) for first in firsts]
        # What comes after a piece that was not filled is read again.
        whole = next((i for i, n in enumerate(counts) if n < expected[i]), len(counts) - 1)
        return self.seek(at + sum(counts[: whole + 1])) - at


class _Ranged(io.RawIOBase):
    """A file object over something of known size that gives ranges of bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._position = 0

    @abstractmethod
    def _range(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``, both inside."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start = min(self._position, self._size)
        stop = self._size if size is None or size < 0 else min(start + size, self._size)
        data = self._range(start, stop) if stop > start else b""
        self._position = start + len(data)
        return data


def _is_constant(view: memoryview) -> bool:
    """Whether nobody changes the memory meanwhile: read-only, and no map, whose file others may
    change."""
    owner: Any = view
    while owner is not None:
        if isinstance(owner, mmap.mmap):
            return False
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    return view.readonly


class _Buffer(_Ranged):
    """Memory, without a copy of all of it.

    What is read from memory that may change is a copy, so that checksums are of what is decoded.
    Large ranges of ``constant`` memory are not.
    """

    def __init__(self, view: memoryview, *, constant: bool = False) -> None:
        super().__init__(len(view))
        self._view, self._constant = view, constant
        if constant:
            self.read_ahead = _READ_AHEAD
        self.fills = not constant  # a buffer that is given, with readinto

    def _range(self, start: int, stop: int) -> bytes:
        part = self._view[start:stop]
        if len(part) < _LARGE:
            return bytes(part)
        return cast(bytes, part if self._constant else copied(part))

    def readinto(self, buffer: Any) -> int:
        """Copy what is next, on threads; how many bytes."""
        part = self._view[self._position : self._position + len(buffer)]
        copy([np.frombuffer(part, np.uint8)], [np.frombuffer(buffer, np.uint8)[: len(part)]])
        self._position += len(part)
        return len(part)


class _Ranges(_Ranged):
    """A file behind a URL, by requests for ranges of it; both its ends come with opening.

    All of a small file does where the server answers with that.
    """

    def __init__(self, filesystem: Any, path: str, size: int) -> None:
        super().__init__(size)
        self._filesystem, self._path = filesystem, path
        self._kept: list[tuple[int, bytes]] = []
        back = max(0, size - _BACK)
        # One request where the ends meet.
        for start, stop in (back, size), (0, min(_FRONT, back)):
            if stop > start:
                self._kept.append((start, self._range(start, stop)))

    @classmethod
    def open(cls, url: str) -> _Ranges:
        """With fsspec, which knows S3, GCS, HTTP and more."""
        try:
            import fsspec
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "reading a URL needs fsspec: pip install 'kvtc-stream[remote]'", name="fsspec"
            ) from None
        try:
            filesystem, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UnsupportedError(
                f"{url}: {error}; 'kvtc-stream[remote]' has what http and https need"
            ) from error
        size = filesystem.info(path).get("size")
        if size is None:
            raise io.UnsupportedOperation(f"{url} does not tell its size: download it first")
        if (
            size > _WHOLE
            and isinstance(filesystem.protocol, tuple)
            and "http" in filesystem.protocol
        ):
            # Unlike cat_file, an open file reads no more of the answer than the range.
            with filesystem.open(path, "rb", cache_type="none") as file:
                try:
                    file.seek(size - 1)
                    file.read(1)
                except (ValueError, OSError) as error:
                    raise io.UnsupportedOperation(
                        f"{url} has {size} bytes, and the server gives no ranges of them: download "
                        "it first"
                    ) from error
        return cls(filesystem, path, size)

    def _fetch(self, start: int, stop: int) -> bytes:
        data: bytes = self._filesystem.cat_file(self._path, start=start, end=stop)
        if len(data) == self._size > stop - start:
            self._kept = [(0, data)]
            return data[start:stop]
        if len(data) != stop - start:
            raise TruncatedError(
                f"{self._path}: a request for bytes {start} to {stop} gave {len(data)}: somebody "
                "is changing it: open it again"
            )
        return data

    def _range(self, start: int, stop: int) -> bytes:
        for first, data in self._kept:
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        return self._fetch(start, stop)


class Growing:
    """A file that somebody is writing to, as a pipe: its end is one when nothing came for long."""

    def __init__(self, file: BinaryIO, patience: float) -> None:
        self._file, self._patience = file, patience

    def seekable(self) -> bool:
        """No: it is read from the front."""
        return False

    def read(self, size: int) -> bytes:
        """What has been written meanwhile; empty when that is nothing for too long."""
        deadline = time.monotonic() + self._patience
        while not (data := self._file.read(size)) and time.monotonic() < deadline:
            time.sleep(_POLL)
        return data
