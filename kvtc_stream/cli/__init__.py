"""The command line, ``kvtc``.

Exit status: 0 success, 1 failure (one line on standard error says which), 2 wrong use.
"""

from __future__ import annotations

import codecs
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvtc_stream.cli.arguments import UsageError, parse
from kvtc_stream.errors import KVTCError, KVTCWarning

#: As argparse has it.
_WRONG_USE = 2
#: A signal ends a command with 128 + its number, as shells have it.
_SIGNALLED = 128
#: What asks a process to end; SIGHUP is Unix's.
_ENDING = [s for s in signal.Signals if s.name in ("SIGTERM", "SIGHUP")]
#: Modules that are not always there, and the extra that brings them.
_EXTRAS = {
    "accelerate": "transformers",
    "aiohttp": "serve",
    "fsspec": "remote",
    "gguf": "transformers",
    "matplotlib": "plot",
    "psutil": "serve",
    "rich": "cli",
    "shtab": "cli",
    "torch": "transformers",
    "transformers": "transformers",
}
#: What we print beyond ASCII, for terminals and logs that have no more.
_ASCII = {"×": "x", "–": "-", "−": "-", "→": "->", "≤": "<=", "…": "...", "‖": "||"}


class _EndedError(BaseException):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Raises
    ------
    SystemExit
        From argparse: after ``--help`` and ``--version``, and for arguments it refuses.
    """
    with _printable_anywhere(), warnings.catch_warnings():
        args = parse(sys.argv[1:] if argv is None else argv)
        _show_warnings_in_one_line()
        try:
            with _ended_by_signals():
                # Commands are loaded when run: they import numpy, Numba, perhaps PyTorch.
                command = importlib.import_module(f"kvtc_stream.cli.{args.module}")
                status: int = command.run(args)
                if sys.stdout is not None:
                    sys.stdout.flush()
                return status
        except _EndedError as ended:
            return _fail(f"ended by {ended.signal.name}", _SIGNALLED + ended.signal)
        except UsageError as error:
            args.parser.print_usage(sys.stderr)
            return _fail(str(error), _WRONG_USE)
        except KeyboardInterrupt:
            return _fail("interrupted", _SIGNALLED + signal.SIGINT)
        except BrokenPipeError:
            # Whoever read our output has left; keep the interpreter from flushing into nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get(str(error.name).partition(".")[0])
            if args.debug or extra is None:
                raise
            return _fail(f"{error.name} is not installed: pip install 'kvtc-stream[{extra}]'")
        except (KVTCError, ValueError, OSError, MemoryError) as error:
            if args.debug:
                raise
            return _fail(_message(error))


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or "not enough memory"


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Signals that ask the process to end raise, so that partial files are removed.

    Those that whoever started the command ignores, as ``nohup`` does, stay ignored.
    """

    def end(number: int, _: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # what is left to do is short
        raise _EndedError(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: h for s in _ENDING if (h := signal.getsignal(s)) is signal.SIG_DFL}
    for each in before:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _fail(message: str, status: int = 1) -> int:
    print(f"kvtc: error: {' '.join(message.split())}", file=sys.stderr)
    return status


@contextmanager
def _printable_anywhere() -> Iterator[None]:
    """Print what an output's encoding lacks as something alike, rather than fail."""
    codecs.register_error("kvtc", _replace)
    before = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            before.append((stream, stream.errors))
            stream.reconfigure(errors="kvtc")
    try:
        yield
    finally:
        for stream, errors in before:
            if not stream.closed:
                stream.reconfigure(errors=errors)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in found), error.end


def _show_warnings_in_one_line() -> None:
    show = warnings.showwarning

    def show_ours(message, category, *args, **kwargs):  # type: ignore[no-untyped-def]
        if issubclass(category, KVTCWarning):
            print(f"kvtc: warning: {message}", file=sys.stderr)
        else:
            show(message, category, *args, **kwargs)

    warnings.simplefilter("always", KVTCWarning)
    warnings.showwarning = show_ours
