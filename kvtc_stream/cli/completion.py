"""``kvtc completion``."""

from __future__ import annotations

import argparse
from argparse import Namespace

import shtab

from kvtc_stream.cli.arguments import make_parser

#: What arguments call files.
_FILES = {"IN", "OUT", "BACK", "CAL", "FILE", "PATH", "JSON", "PNG", "MODEL"}


def run(args: Namespace) -> int:
    """Print a completion script; see ``kvtc completion --help``."""
    parser = make_parser()
    _complete_files(parser)
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.metavar in _FILES and action.dest != "metadata":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
