"""``kvtc encode``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import kvtc_stream as kvtc
from kvtc_stream.cli import paths, report, terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.formats import StreamFile
from kvtc_stream.io import plain

#: Tokens handed to the encoder at a time.
_CHUNK = 512


def run(args: Namespace) -> int:
    """Compress a plain cache; see ``kvtc encode --help``."""
    target = paths.output(args)
    paths.check_output(args.output, paths.STREAM, [args.input, args.calibration])
    if args.base is not None:
        if args.append:
            raise UsageError("--base is for new streams: one that is continued keeps its blocks")
        with paths.open_input(args.base, seekable=True) as base, paths.about(args.base):
            StreamFile(base)  # refused before the work
    with terminal.progress() as bars:
        calibration = paths.load_calibration(args.calibration)
        reading = bars.add_task(f"Reading {args.input}", total=None)
        sections = plain.read(paths.plain_input(args.input), args.format)
        _check_shapes(args.input, sections, calibration.geometry)
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
            options |= {"metadata": args.metadata, "base": args.base}
        elif args.metadata:
            raise UsageError("--metadata is for new streams: it is in the header")
        mode: Any = "ab" if args.append else "wb"
        with (
            paths.about(args.output if args.append else args.input),
            kvtc.open(target, mode, codec=codec, **options) as writer,
        ):
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
        terminal.show(tables, stderr=args.output == paths.STANDARD)
    return 0


def _check_shapes(
    name: str, sections: tuple[plain.PlainSection, ...], geometry: kvtc.Geometry
) -> None:
    """Whether the calibration is for such a cache; what is refused later is named in pieces."""
    if len(sections) != len(geometry.sections):
        raise ValueError(
            f"{name} has {len(sections)} sections, the calibration is for {len(geometry.sections)}"
        )
    for found, section in zip(sections, geometry.sections, strict=True):
        expected = section.k_shape(found.tokens), section.v_shape(found.tokens)
        if (found.k.shape, found.v.shape) != expected:
            raise ValueError(
                f"{name} has k {list(found.k.shape)} and v {list(found.v.shape)}, the calibration "
                f"is for {list(expected[0])} and {list(expected[1])}: is it that of this model?"
            )


def _scales(sections: tuple[plain.PlainSection, ...]) -> dict[str, Any]:
    """The encoder's ``k_scale`` and ``v_scale``: a list if there are several sections."""
    scales: dict[str, Any] = {}
    for name in ("k_scale", "v_scale"):
        values = [getattr(section, name) for section in sections]
        if any(value is not None for value in values):
            scales[name] = values if len(values) > 1 else values[0]
    return scales
