"""``kvtc info``."""

from __future__ import annotations

from argparse import Namespace
from typing import BinaryIO

import kvtc_stream as kvtc
from kvtc_stream.cli import report, terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.formats import MAGIC, StreamFile


def run(args: Namespace) -> int:
    """Describe a stream or a calibration; see ``kvtc info --help``."""
    with terminal.open_input(args.input, seekable=True) as file:
        if _is_calibration(args.input, file):
            if args.plot:
                raise UsageError("--plot draws a stream")
            calibration = kvtc.Calibration.load(args.input)
            description = report.calibration_json(calibration)
            tables = report.calibration_tables(args.input, calibration)
        else:
            stream = StreamFile(file)
            description = report.stream_json(stream)
            tables = report.stream_tables(args.input, stream)
            if args.plot:
                from kvtc_stream.cli import picture

                learnt = kvtc.Calibration.load(args.calibration) if args.calibration else None
                picture.draw(args.plot, stream, learnt)
    if args.json:
        terminal.print_json({"file": args.input, **description})
    else:
        terminal.show(tables)
    return 0


def _is_calibration(name: str, file: BinaryIO) -> bool:
    """By its name; a stream that is called so is still a stream."""
    opening = file.read(len(MAGIC))
    return name.endswith(".safetensors") and opening != MAGIC
