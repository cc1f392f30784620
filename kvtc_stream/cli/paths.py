"""What the arguments name: files, folders, pipes and standard streams."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import kvtc_stream as kvtc
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.errors import KVTCError
from kvtc_stream.io.sources import open_source

STANDARD = "-"

#: Kinds of output, and the suffixes that say so.
STREAM = ("a stream", ".kvtc")
CACHE = ("a plain cache", ".npz", ".safetensors")
CALIBRATION = ("a calibration", ".safetensors")
PICTURE = ("a picture", ".png", ".svg", ".pdf")
FIGURES = ("figures", ".json")
_SUFFIXES = {suffix for kind in (STREAM, CACHE, CALIBRATION, PICTURE, FIGURES) for suffix in kind}
_SUFFIXES |= {".gguf", ".npy", ".pt", ".txt"}


# Input.


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Errors of ours that the block raises name the file that they are about."""
    try:
        yield
    except (KVTCError, ValueError) as error:
        if name not in str(error) and not isinstance(error, UnicodeError):
            error.args = (f"{name}: {error}",)
        raise


@contextlib.contextmanager
def open_input(name: str, *, seekable: bool = False) -> Iterator[BinaryIO]:
    """A file, or standard input; what cannot seek and must is copied to a temporary file."""
    with contextlib.ExitStack() as stack:
        file = _standard_input() if name == STANDARD else stack.enter_context(open_source(name))
        if seekable and not file.seekable():
            copy = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))
            shutil.copyfileobj(file, copy)
            copy.seek(0)
            file = copy
        yield file


def plain_input(name: str) -> str | BinaryIO:
    """What ``plain.read`` takes."""
    return _standard_input() if name == STANDARD else name


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise UsageError("standard input is closed: name a file, or pipe something in")
    return sys.stdin.buffer


def load_calibration(name: str, opened: BinaryIO | None = None) -> kvtc.Calibration:
    """A calibration from a file, or from a pipe, which may be ``opened`` already."""
    if name != STANDARD and not _is_special(name):
        return kvtc.Calibration.load(name)
    with (
        contextlib.nullcontext(opened) if opened else open_input(name) as pipe,
        tempfile.NamedTemporaryFile() as copy,
    ):
        shutil.copyfileobj(pipe, copy)
        copy.flush()
        try:
            return kvtc.Calibration.load(copy.name)
        except KVTCError as error:
            error.args = (str(error).replace(copy.name, name),)
            raise


def read_texts(names: Iterable[str]) -> dict[Path, str]:
    """UTF-8 texts by path; those in a folder, at any depth, but for what is hidden."""
    texts = {}
    for path in map(Path, names):
        files = [path]
        if path.is_dir():
            inside = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
            files = [path / x for x in inside if not any(p.startswith(".") for p in x.parts)]
            if not files:
                raise ValueError(f"{path} is a folder without files")
        for file in files:
            try:
                texts[file.resolve()] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is no UTF-8 text: {error}") from error
    return texts


def check_range(option: str, chosen: slice | None, count: int, what: str) -> None:
    """Refuse a range that is empty or leaves what there is.

    Raises
    ------
    ValueError
        Says how many there are.
    """
    if chosen is None or chosen == slice(None):
        return
    start, stop = (
        default if end is None else end + count if end < 0 else end
        for end, default in ((chosen.start, 0), (chosen.stop, count))
    )
    if not 0 <= start < stop <= count:
        why = "holds none" if start >= stop else "goes beyond them"
        raise ValueError(
            f"there are {count:,} {what}, and {option} {range_text(chosen)} {why}: give a range "
            f"inside 0:{count}"
        )


def range_text(chosen: slice) -> str:
    """As it is given on the command line."""
    return ":".join("" if end is None else str(end) for end in (chosen.start, chosen.stop))


# Output.


def output(args: Any) -> str | BinaryIO:
    """``args.output`` as ``kvtc_stream.open`` and ``plain.write`` take it."""
    if args.output != STANDARD:
        return str(args.output)
    if args.json:
        raise UsageError("--json and -o - both want standard output")
    if sys.stdout is None:
        raise UsageError("standard output is closed: redirect it, or name a file")
    if sys.stdout.isatty():
        raise UsageError("standard output is a terminal: redirect it, or name a file")
    return sys.stdout.buffer


def check_output(
    path: str | None,
    kind: tuple[str, ...],
    inputs: Iterable[str | None] = (),
    *,
    replaces_input: bool = False,
) -> None:
    """Refuse, before the work, an output that could not or should not be written after it.

    Parameters
    ----------
    path
        ``None`` passes, and so does ``-`` for streams and plain caches.
    kind
        What it will hold, and its suffixes; a suffix of something else is refused.
    inputs
        What is read meanwhile. None of them may be the output.
    replaces_input
        Whether a file may be read and then replaced.
    """
    if path is None:
        return
    what, *suffixes = kind
    if path == STANDARD:
        if what in (CALIBRATION[0], PICTURE[0], FIGURES[0]):
            raise UsageError(
                f"standard output cannot take {what}: name a file ending in {suffixes[0]}"
            )
        return
    suffix = Path(path).suffix.lower()
    if suffix in _SUFFIXES and suffix not in suffixes:
        raise UsageError(
            f"{path} would be {what}, and its name says something else: call it "
            f"{Path(path).stem}{suffixes[0]}"
        )
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a directory: name a file in it")
    folder = Path(os.path.realpath(path)).parent
    if not _is_special(path):
        if not folder.is_dir():
            raise FileNotFoundError(f"no directory {Path(path).parent} for {path}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is a directory that you may not write to")
    for name in inputs:
        if name is None or (replaces_input and not _is_special(path)):
            continue
        with contextlib.suppress(OSError):
            if os.path.samefile(name, path):
                raise UsageError(f"{path} is read and written: name another file for the output")


def can_be_read_again(path: str) -> bool:
    """Whether what was written there is a file, not a pipe or a device."""
    return path != STANDARD and not _is_special(path)


def _is_special(path: str) -> bool:
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
