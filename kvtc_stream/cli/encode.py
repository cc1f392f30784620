"""``kvtc encode``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import kvtc_stream as kvtc
from kvtc_stream.cli import report, terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.io import plain

#: Tokens handed to the encoder at a time.
_CHUNK = 512


def run(args: Namespace) -> int:
    """Compress a plain cache; see ``kvtc encode --help``."""
    target = terminal.output(args)
    with terminal.progress() as bars:
        calibration = kvtc.Calibration.load(args.calibration)
        reading = bars.add_task(f"Reading {args.input}", total=None)
        sections = plain.read(terminal.plain_input(args.input), args.format)
        expected = len(calibration.geometry.sections)
        if len(sections) != expected:
            raise ValueError(
                f"{args.input} has {len(sections)} sections, the calibration is for {expected}"
            )
        bars.remove_task(reading)
        codec = kvtc.Codec(
            calibration,
            args.preset,
            ratio=args.ratio,
            bits_per_token=args.bits_per_token,
            mean_error=args.mean_error,
            error_bound=args.error_bound,
            sinks=args.sinks,
            window=args.window,
            block_tokens=args.block_tokens,
            coder=args.coder,
            backend=args.backend,
        )
        codec.make_plan(terminal.bar(bars, "Planning"))
        total, done = sum(s.tokens for s in sections), 0
        encoding = terminal.bar(bars, "Encoding")
        options: dict[str, Any] = _scales(sections)
        if not args.append:
            options["metadata"] = args.metadata
        elif args.metadata:
            raise UsageError("--metadata is for new streams: it is in the header")
        with kvtc.open(target, "ab" if args.append else "wb", codec=codec, **options) as writer:
            for i, section in enumerate(sections):
                for start in range(0, section.tokens, _CHUNK):
                    span = slice(start, start + _CHUNK)
                    writer.write(
                        section.k[:, :, span],
                        section.v[:, :, span],
                        positions=None if section.positions is None else section.positions[span],
                        section=i,
                    )
                    done += min(_CHUNK, section.tokens - start)
                    encoding(done, total)
    if args.json:
        terminal.print_json({"output": args.output, **report.statistics_json(writer.statistics)})
    else:
        tables = report.statistics_tables(writer.statistics)
        terminal.show(tables, stderr=args.output == terminal.STANDARD)
    return 0


def _scales(sections: tuple[plain.PlainSection, ...]) -> dict[str, Any]:
    """The encoder's ``k_scale`` and ``v_scale``: a list if there are several sections."""
    scales: dict[str, Any] = {}
    for name in ("k_scale", "v_scale"):
        values = [getattr(section, name) for section in sections]
        if any(value is not None for value in values):
            scales[name] = values if len(values) > 1 else values[0]
    return scales
