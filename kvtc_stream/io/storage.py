"""Files that appear whole or not at all, with one writer at a time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from kvtc_stream.errors import StateError

#: What can be opened: a path or a binary file object.
File = str | os.PathLike[str] | BinaryIO

#: Longer names, in bytes, are shortened in that of the partial file: file systems take 143 to 255.
_LONG_NAME = 120


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes ``path``'s place when the block ends without an exception.

    Until then the bytes are in ``.NAME.partial`` beside it (NAME shortened if it is long), locked:
    a second writer of the same path, in this or another process, gets ``StateError``. A partial
    file left by a crash is overwritten. A file that is there keeps its permissions, and only its
    owner reads the partial one; a new file has those that the umask leaves. Where a link stands,
    what it points to is replaced; a device or a named pipe is written as it is.
    """
    # Not what a link points to: /dev/fd/3 leads to a name that nobody can open.
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        with open(path, "wb") as special:
            yield special
        return
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no directory {Path(path).parent} to write {target.name} into")
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name a file in it")
    partial = _partial(target)
    with _open_locked(partial, target.name) as file:
        try:
            file.truncate()
            if target.exists():
                _keep_private(file)
            yield file
            file.flush()
            with contextlib.suppress(FileNotFoundError):
                _take_over(file, target.stat())
            os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def append_to(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An existing file, open to read and write without a buffer.

    Meanwhile every other writer of the path gets ``StateError``, as with :func:`atomic_write`.
    """
    target = Path(os.path.realpath(path))
    partial = _partial(target)
    with open(target, "r+b", buffering=0) as file, _open_locked(partial, target.name) as claim:
        try:
            yield cast(BinaryIO, file)
            os.fsync(file.fileno())
        finally:
            if not os.fstat(claim.fileno()).st_size:  # what a crash left there stays
                partial.unlink(missing_ok=True)


#: File objects that are being written, by their ids.
_claimed: set[int] = set()


@contextlib.contextmanager
def claimed(file: BinaryIO) -> Iterator[BinaryIO]:
    """A file object that is there already: meanwhile every other writer gets ``StateError``."""
    if id(file) in _claimed:
        raise StateError("another writer is writing to this file object: close it first")
    _claimed.add(id(file))
    try:
        yield file
    finally:
        _claimed.discard(id(file))


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write everything; a raw file may take less than it is given at a time.

    Raises
    ------
    BlockingIOError
        The file does not block, and took nothing.
    """
    rest = memoryview(data)
    while rest:
        taken: int | None = file.write(rest)
        if taken is None:
            if isinstance(file, io.RawIOBase):
                raise BlockingIOError(
                    "the file does not block and took nothing: give a blocking one"
                )
            taken = len(rest)  # file objects of other makes do not say
        rest = rest[taken:]


@contextlib.contextmanager
def put_back_on_failure(file: BinaryIO, size: int, rest: bytes = b"") -> Iterator[None]:
    """Give a file object its first ``size`` bytes, then ``rest``, if the block raises."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what cannot be written is cut off all the same
            file.flush()
        file.truncate(size)
        file.seek(size)
        write_all(file, rest)
        raise


def _partial(target: Path) -> Path:
    name = os.fsencode(target.name)
    if len(name) <= _LONG_NAME:
        return target.with_name(f".{target.name}.partial")
    front = name[: _LONG_NAME // 2].decode(errors="ignore")
    return target.with_name(f".{front}.{hashlib.sha256(name).hexdigest()[:32]}.partial")


def _open_locked(path: Path, name: str) -> BinaryIO:
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            _lock(file)
        except OSError:
            file.close()
            raise StateError(
                f"another writer is writing {name!r}: wait for it, or write elsewhere"
            ) from None
        # A writer that finished between our open and our lock has renamed this very file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

    def _keep_private(file: BinaryIO) -> None:
        """Nothing: permissions are those of the folder."""

    def _take_over(file: BinaryIO, replaced: os.stat_result) -> None:
        """Nothing, as above."""
else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _keep_private(file: BinaryIO) -> None:
        """Let nobody but the owner read a file that is to replace one."""
        with contextlib.suppress(PermissionError):  # file systems that know no permissions
            os.fchmod(file.fileno(), stat.S_IRUSR | stat.S_IWUSR)

    def _take_over(file: BinaryIO, replaced: os.stat_result) -> None:
        """Give a file the permissions of the one that it will replace, and its owner if we may."""
        mode = stat.S_IMODE(replaced.st_mode)
        try:
            os.fchown(file.fileno(), replaced.st_uid, replaced.st_gid)
        except PermissionError:
            own = os.fstat(file.fileno())
            if own.st_gid != replaced.st_gid:
                mode &= ~stat.S_IRWXG  # bits of one group are not for another
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        with contextlib.suppress(PermissionError):
            os.fchmod(file.fileno(), mode)
