"""``kvtc decode``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

import kvtc_stream as kvtc
from kvtc_stream.cli import paths, terminal
from kvtc_stream.formats import StreamHeader
from kvtc_stream.io import plain
from kvtc_stream.io.dlpack import numpy_dtype, to_host


def run(args: Namespace) -> int:
    """Restore a plain cache, or some of it; see ``kvtc decode --help``."""
    target = paths.output(args)
    format = plain.format_of(target, args.format)  # before the work, not after it
    kind = ("a plain cache", f".{format}") if args.format else paths.CACHE
    paths.check_output(args.output, kind, [args.input, args.calibration])
    with terminal.progress() as bars:
        sections = _read(args, bars)
        bars.add_task(f"Writing {args.output}", total=None)
        plain.write(target, sections, format)
    if args.json:
        terminal.print_json(
            {
                "output": args.output,
                "dtype": sections[0].dtype.label,
                "sections": [
                    {"k_shape": list(s.k.shape), "v_shape": list(s.v.shape)} for s in sections
                ],
            }
        )
    elif args.output != paths.STANDARD:
        rows = [
            (args.output, f"k {list(s.k.shape)}, v {list(s.v.shape)}, {s.dtype.label}")
            for s in sections
        ]
        terminal.show([terminal.facts(rows)])
    return 0


def _read(args: Namespace, bars: Progress) -> list[plain.PlainSection]:
    """The sections asked for, block by block, so that a pipe will do."""
    calibration = paths.load_calibration(args.calibration)
    with (
        paths.open_input(args.input) as file,
        paths.about(args.input),
        kvtc.open(file, calibration=calibration, backend=args.backend) as reader,
    ):
        blocks = reader.blocks(args.tokens, args.layers, args.section)
        chosen = (
            range(len(reader.header.geometry.sections)) if args.section is None else [args.section]
        )
        total = None
        for i in chosen:
            count = len(reader.header.geometry.sections[i].layers)
            paths.check_range("--layers", args.layers, count, "layers")
        if file.seekable():
            for i in chosen:
                paths.check_range("--tokens", args.tokens, reader.tokens(i), "tokens")
            tokens = args.tokens or slice(None)
            total = sum(len(range(*tokens.indices(reader.tokens(i)))) for i in chosen)
        task = bars.add_task("Decoding", total=total)
        found: dict[int, list[kvtc.KVBlock]] = {i: [] for i in chosen}
        for block in blocks:
            found[block.section].append(block)
            bars.advance(task, block.tokens)
        for i in chosen:
            _check_count(args.tokens, sum(block.tokens for block in found[i]))
        layers = args.layers or slice(None)
        return [_join(found[i], reader.header, i, layers) for i in chosen]


def _check_count(tokens: slice | None, found: int) -> None:
    """Whether a pipe had the tokens asked for, which it does not tell before its end."""
    if tokens is None or tokens == slice(None):
        return
    start, stop = tokens.start or 0, tokens.stop
    if start >= 0 and (not found or (stop is not None and 0 <= stop - start != found)):
        raise ValueError(
            f"--tokens {paths.range_text(tokens)} goes beyond the end of the stream: found "
            f"{found:,} tokens in it"
        )


def _join(
    blocks: Sequence[kvtc.KVBlock], header: StreamHeader, index: int, layers: slice
) -> plain.PlainSection:
    section = header.geometry.sections[index]
    dtype = numpy_dtype(header.out_dtype)
    # No tokens have a shape too.
    k = np.empty(section.k_shape(0), dtype)[layers]
    v = np.empty(section.v_shape(0), dtype)[layers]
    positions = np.empty(0, np.int64)
    k_scale = v_scale = None
    if header.out_dtype.is_fp8:
        k_scale, v_scale = (
            _grid(scale, len(section.layers))[layers]
            for scale in (header.scales[index].k_scale, header.scales[index].v_scale)
        )
    return plain.PlainSection(
        np.concatenate([k, *(to_host(b.k) for b in blocks)], axis=2),
        np.concatenate([v, *(to_host(b.v) for b in blocks)], axis=2),
        np.concatenate([positions, *(b.positions for b in blocks)]),
        k_scale,
        v_scale,
    )


def _grid(scale: Sequence[float], layers: int) -> NDArray[np.float32]:
    return np.array(scale, np.float32).reshape(layers, -1)
