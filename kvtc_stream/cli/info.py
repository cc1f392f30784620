"""``kvtc info``."""

from __future__ import annotations

from argparse import Namespace
from typing import BinaryIO

from kvtc_stream.cli import paths, report, terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.formats import MAGIC, StreamFile


def run(args: Namespace) -> int:
    """Describe a stream or a calibration; see ``kvtc info --help``."""
    paths.check_output(args.plot, paths.PICTURE, [args.input, args.calibration])
    with paths.open_input(args.input, seekable=True) as file, paths.about(args.input):
        if _is_calibration(file):
            if args.plot or args.calibration:
                raise UsageError("--plot and --calibration are for a stream, this is a calibration")
            calibration = paths.load_calibration(args.input, file)
            description = report.calibration_json(calibration)
            tables = report.calibration_tables(args.input, calibration)
        else:
            stream = StreamFile(file)
            learnt = paths.load_calibration(args.calibration) if args.calibration else None
            fits = None if learnt is None else learnt.digest == stream.header.calibration
            description = report.stream_json(stream)
            if fits is not None:
                description["calibration_fits"] = fits
            tables = report.stream_tables(args.input, stream, fits)
            if args.plot:
                from kvtc_stream.cli import picture

                picture.draw(args.plot, stream, learnt)
    if args.json:
        terminal.print_json({"file": args.input, **description})
    else:
        terminal.show(tables)
    return 0


def _is_calibration(file: BinaryIO) -> bool:
    """Whether it begins as safetensors files do: a length, and a JSON object."""
    opening = file.read(9)
    file.seek(0)
    return not opening.startswith(MAGIC) and opening[8:] == b"{"
