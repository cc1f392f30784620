"""Where hosts keep pages: host memory, a folder, or whatever fsspec reaches.

A store maps names to bytes. It has a budget; what was used longest ago goes first. Names are hex
digits, with slashes between them. Of what is of use only as a whole each part has a name that ends
with a dot and a number; all parts go at once. Stores may be used by many threads, and those that
lie outside the process by many processes.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtc_stream.errors import UnsupportedError

_NAME = re.compile(r"[0-9a-f]{2,}(/[0-9a-f]{2,})*(\.[0-9]+)?")
#: What eviction leaves of a budget, so that not every write evicts.
_KEPT = 0.9
#: Object stores, where a write is whole or not at all.
_WHOLE_WRITES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"})
#: A partial file that is older, in seconds, was left by a crash.
_ABANDONED = 3600.0


@dataclass(frozen=True)
class Entry:
    """What a store has under a name.

    Attributes
    ----------
    name
        The name.
    size
        Bytes.
    used
        When it was last written or read, seconds since 1970; a store behind a URL knows of reads
        by this process only.
    """

    name: str
    size: int
    used: float


class Store(ABC):
    """Named bytes, within a budget.

    Parameters
    ----------
    budget
        The most bytes; no limit if ``None``.
    writers
        Processes that write as much as this one into the same store, as the ranks of an engine do:
        so their bytes are counted without looking.

    Attributes
    ----------
    watchers
        Are called with the name of each entry that this store evicts, in the thread of a ``put``.
    """

    #: Whether what is there comes at once, so that nobody needs threads to wait for it.
    at_once = False

    def __init__(self, budget: int | None, writers: int = 1) -> None:
        if budget is not None and budget < 1:
            raise ValueError(f"the budget of a store must be at least 1 byte, found {budget}")
        self._budget, self._writers = budget, writers
        self._filled: int | None = None  #: bytes, as far as this process knows
        self._lock = threading.Lock()
        self._evicting = threading.Lock()
        self._holds: Counter[str] = Counter()
        self.watchers: list[Callable[[str], None]] = []

    def get(self, name: str) -> bytes | None:
        """The bytes under a name, or ``None``."""
        return self._get(_checked(name))

    def put(self, name: str, data: bytes) -> bool:
        """Store bytes under a name, in place of others; evicts what the budget has no room for.

        Readers see all of it or nothing. ``False`` if it is more than the whole budget: then
        nothing is stored.
        """
        if self._budget is not None and len(data) > self._budget:
            return False
        self._put(_checked(name), data)
        if self._budget is not None:
            self._account(len(data) * self._writers)
        return True

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is something under a name."""

    def hold(self, name: str) -> bool:
        """Whether there is something under a name. If so it counts as used, and until it was
        released as often as held, this process evicts it only when the rest is gone."""
        with self._lock:  # before looking, so that it does not go in between
            self._holds[_checked(name)] += 1
        found = False
        try:
            found = self.exists(name)
            if found:
                self._touch(name)
        finally:
            if not found:
                self.release(name)
        return found

    def release(self, name: str) -> None:
        """Undo one :meth:`hold`; nothing happens if there is none."""
        with self._lock:
            if self._holds[name] <= 1:
                del self._holds[name]
            else:
                self._holds[name] -= 1

    def held(self, name: str) -> bool:
        """Whether somebody in this process holds a name."""
        return name in self._holds

    @abstractmethod
    def delete(self, name: str) -> None:
        """Forget a name; nothing happens if there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """What there is under names that begin with a part, in no order."""

    @abstractmethod
    def _get(self, name: str) -> bytes | None: ...

    @abstractmethod
    def _put(self, name: str, data: bytes) -> None: ...

    @abstractmethod
    def _touch(self, name: str) -> None: ...

    def _account(self, added: int) -> None:
        """Add to what is known; look again, and evict, when that is beyond the budget."""
        assert self._budget is not None
        with self._lock:
            if self._filled is not None:
                self._filled += added
            if self._filled is not None and self._filled <= self._budget:
                return
        with self._evicting:  # one at a time; others have nothing left to do
            if self._filled is not None and self._filled <= self._budget:
                return
            wholes: dict[str, list[Entry]] = {}
            for entry in self.list():
                wholes.setdefault(entry.name.partition(".")[0], []).append(entry)
            order = sorted(
                (
                    any(self.held(part.name) for part in parts),
                    max(part.used for part in parts),
                    name,
                )
                for name, parts in wholes.items()
            )
            filled = sum(entry.size for parts in wholes.values() for entry in parts)
            if filled > self._budget:
                for held, _, name in order:
                    if filled <= self._budget * (1 if held else _KEPT):
                        break
                    for entry in wholes[name]:
                        self.delete(entry.name)
                        filled -= entry.size
                        for watcher in self.watchers:
                            watcher(entry.name)
            with self._lock:
                self._filled = filled


class MemoryStore(Store):
    """In the memory of this process.

    Parameters
    ----------
    budget, writers
        As for :class:`Store`.
    """

    at_once = True

    def __init__(self, budget: int | None = None, writers: int = 1) -> None:
        super().__init__(budget, writers)
        self._entries: dict[str, tuple[bytes, float]] = {}

    def _get(self, name: str) -> bytes | None:
        with self._lock:
            found = self._entries.get(name)
            if found is None:
                return None
            self._entries[name] = (found[0], time.time())
            return found[0]

    def _touch(self, name: str) -> None:
        self._get(name)

    def _put(self, name: str, data: bytes) -> None:
        with self._lock:
            old = self._entries.pop(name, None)
            self._entries[name] = (bytes(data), time.time())
            if old is not None and self._filled is not None:
                self._filled -= len(old[0])

    def exists(self, name: str) -> bool:
        """See :meth:`Store.exists`."""
        return _checked(name) in self._entries

    def delete(self, name: str) -> None:
        """See :meth:`Store.delete`."""
        with self._lock:
            self._entries.pop(_checked(name), None)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :meth:`Store.list`."""
        with self._lock:
            entries = list(self._entries.items())
        for name, (data, used) in entries:
            if name.startswith(prefix):
                yield Entry(name, len(data), used)


class FileStore(Store):
    """A folder, which processes of one machine may share; files appear whole.

    The time of a file's last change is that of its last use.

    Parameters
    ----------
    folder
        Made if it is not there, for its owner alone.
    budget, writers
        As for :class:`Store`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], budget: int | None = None, writers: int = 1
    ) -> None:
        super().__init__(budget, writers)
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _get(self, name: str) -> bytes | None:
        path = self._folder / name
        try:
            with open(path, "rb") as file:
                data = file.read()
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return data

    def _touch(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._folder / name)

    def _put(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two writers of a page have equal bytes, and neither waits.
        handle, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise

    def exists(self, name: str) -> bool:
        """See :meth:`Store.exists`."""
        return (self._folder / _checked(name)).is_file()

    def delete(self, name: str) -> None:
        """See :meth:`Store.delete`."""
        with contextlib.suppress(FileNotFoundError):
            (self._folder / _checked(name)).unlink()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :meth:`Store.list`; what crashed writers left is removed."""
        pending = [str(self._folder)]
        while pending:
            try:
                entries = list(os.scandir(pending.pop()))
            except FileNotFoundError:
                continue
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                        continue
                    status = entry.stat()
                    if entry.name.startswith("."):
                        if time.time() - status.st_mtime > _ABANDONED:
                            os.unlink(entry.path)
                        continue
                except FileNotFoundError:
                    continue
                name = os.path.relpath(entry.path, self._folder).replace(os.sep, "/")
                if name.startswith(prefix) and _NAME.fullmatch(name):
                    yield Entry(name, status.st_size, status.st_mtime)


class RemoteStore(Store):
    """Whatever fsspec reaches by a URL: S3, GCS, Azure, SFTP, ... Needs ``kvtc-stream[remote]``.

    Parameters
    ----------
    url
        Of a folder, or of a bucket and the beginning of names.
    budget, writers
        As for :class:`Store`. Only what this process knows of last uses counts.
    """

    def __init__(self, url: str, budget: int | None = None, writers: int = 1) -> None:
        super().__init__(budget, writers)
        try:
            import fsspec
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "a store behind a URL needs fsspec: pip install 'kvtc-stream[remote]'",
                name="fsspec",
            ) from None
        try:
            self._filesystem, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UnsupportedError(f"{url}: {error}") from error
        self._root = root.rstrip("/")
        protocol = self._filesystem.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self._whole = bool(names & _WHOLE_WRITES)
        self._used: dict[str, float] = {}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _get(self, name: str) -> bytes | None:
        try:
            data: bytes = self._filesystem.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        self._touch(name)
        return data

    def _touch(self, name: str) -> None:
        self._used[name] = time.time()

    def _put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        if not self._whole:
            self._filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            partial = f"{path}.{os.getpid()}.{threading.get_ident()}.partial"
            self._filesystem.pipe_file(partial, data)
            self._filesystem.mv(partial, path)
        else:
            self._filesystem.pipe_file(path, data)
        self._touch(name)

    def exists(self, name: str) -> bool:
        """See :meth:`Store.exists`."""
        self._filesystem.invalidate_cache()
        return bool(self._filesystem.isfile(self._path(_checked(name))))

    def delete(self, name: str) -> None:
        """See :meth:`Store.delete`."""
        self._used.pop(name, None)
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path(_checked(name)))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :meth:`Store.list`."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.find(self._root, detail=True)
        except FileNotFoundError:
            return
        for path, info in found.items():
            name = path[len(self._root) + 1 :]
            if name.startswith(prefix) and _NAME.fullmatch(name):
                used = self._used.get(name, _seconds(info))
                yield Entry(name, int(info.get("size") or 0), used)


def _seconds(info: dict[str, Any]) -> float:
    """When fsspec says that a file was written; 0 if it does not."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        found = info.get(key)
        if isinstance(found, int | float):
            return float(found)
        if found is not None and hasattr(found, "timestamp"):
            return float(found.timestamp())
    return 0.0


#: Stores in memory, which all of a process share, by their names.
_memory: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()

_SCHEMES: dict[str, Callable[[str], Path]] = {
    "file": Path,
    "shm": lambda name: Path("/dev/shm") / f"kvtc-{os.getuid()}" / name,
}


def open_store(url: str, budget: int | None = None, writers: int = 1) -> Store:
    """The store that a URL names.

    Parameters
    ----------
    url
        ``memory://NAME``: of this process, one for each name. ``shm://NAME``: in the host's
        memory, shared by processes and kept when they end (a folder in ``/dev/shm``).
        ``file:///FOLDER``, or a path: a folder. Any other: by fsspec.
    budget, writers
        As for :class:`Store`.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FileStore(os.path.expanduser(url), budget, writers)
    if scheme == "memory":
        with _memory_lock:
            return _memory.setdefault(rest, MemoryStore(budget, writers))
    if scheme in _SCHEMES:
        if not rest.strip("/") or ".." in rest.split("/"):
            raise ValueError(f"a store at {url!r} needs a name after ://")
        return FileStore(_SCHEMES[scheme](rest), budget, writers)
    return RemoteStore(url, budget, writers)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"names in a store are hex digits and slashes, and may end with a dot and a number, "
            f"found {name!r}"
        )
    return name
