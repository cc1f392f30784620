"""``kvtc decode``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

import kvtc_stream as kvtc
from kvtc_stream.cli import terminal
from kvtc_stream.formats import StreamHeader
from kvtc_stream.io import plain
from kvtc_stream.io.dlpack import numpy_dtype, to_host


def run(args: Namespace) -> int:
    """Restore a plain cache, or some of it; see ``kvtc decode --help``."""
    target = terminal.output(args)
    plain.format_of(target, args.format)  # before the work, not after it
    with terminal.progress() as bars:
        sections = _read(args, bars)
        bars.add_task(f"Writing {args.output}", total=None)
        plain.write(target, sections, args.format)
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
    elif args.output != terminal.STANDARD:
        rows = [
            (args.output, f"k {list(s.k.shape)}, v {list(s.v.shape)}, {s.dtype.label}")
            for s in sections
        ]
        terminal.show([terminal.facts(rows)])
    return 0


def _read(args: Namespace, bars: Progress) -> list[plain.PlainSection]:
    """The sections asked for, block by block, so that a pipe will do."""
    calibration = kvtc.Calibration.load(args.calibration)
    with (
        terminal.open_input(args.input) as file,
        kvtc.open(file, calibration=calibration, backend=args.backend) as reader,
    ):
        blocks = reader.blocks(args.tokens, args.layers, args.section)
        chosen = (
            range(len(reader.header.geometry.sections)) if args.section is None else [args.section]
        )
        total = None
        if file.seekable():
            tokens = args.tokens or slice(None)
            total = sum(len(range(*tokens.indices(reader.tokens(i)))) for i in chosen)
        task = bars.add_task("Decoding", total=total)
        found: dict[int, list[kvtc.KVBlock]] = {i: [] for i in chosen}
        for block in blocks:
            found[block.section].append(block)
            bars.advance(task, block.tokens)
        layers = args.layers or slice(None)
        return [_join(found[i], reader.header, i, layers) for i in chosen]


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
