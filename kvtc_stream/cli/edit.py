"""``kvtc cat``, ``slice``, ``split``, ``join``, ``truncate``, ``compact`` and ``repair``."""

from __future__ import annotations

from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import zip_longest
from typing import Any

import kvtc_stream as kvtc
from kvtc_stream.cli import paths, terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.errors import FormatError, UnsupportedError
from kvtc_stream.formats import StreamFile


def run(args: Namespace) -> int:
    """Make a stream of others without decoding them; see ``kvtc cat --help`` and so on."""
    if args.command == "split":
        return _split(args)
    if args.command == "compact" and args.output is None:
        args.output = args.input
    target = paths.output(args)
    names = args.inputs if "inputs" in args else [args.input]
    paths.check_output(args.output, paths.STREAM, names, replaces_input=True)
    result: dict[str, Any] = {"output": args.output}
    with ExitStack() as stack:
        files = [stack.enter_context(paths.open_input(name, seekable=True)) for name in names]
        streams = []
        for name, file in zip(names, files, strict=True):
            with paths.about(name):
                streams.append(StreamFile(file, recover=args.command == "repair"))
        stack.enter_context(_about(names, streams))
        match args.command:
            case "cat":
                kvtc.concat(files, target)
            case "slice":
                _check_slice(args, streams[0])
                if args.layers is not None:
                    kvtc.split_layers(files[0], target, args.layers)
                else:
                    kvtc.cut(files[0], target, tokens=args.tokens, positions=args.positions)
            case "compact":
                kvtc.compact(files[0], target)
            case "join":
                kvtc.merge_layers(files, target)
            case "truncate":
                if args.tokens < 0:
                    raise UsageError(f"--tokens must be at least 0, found {args.tokens}")
                if args.tokens > (count := _tokens(streams[0])):
                    raise ValueError(f"there are {count:,} tokens, fewer than {args.tokens:,}")
                kvtc.truncate(files[0], args.tokens, target)
            case "repair":
                kvtc.compact(files[0], target, recover=True)
                result["fault"] = str(streams[0].fault or "")
    if paths.can_be_read_again(args.output):
        result |= _facts(args.output)
    if args.json:
        terminal.print_json(result)
    elif "tokens" in result:
        rows = [
            (args.output, f"{result['tokens']:,} tokens, {result['bytes']:,} bytes"),
            ("fault", result.get("fault", "")),
        ]
        terminal.show([terminal.facts(rows)])
    return 0


@contextmanager
def _about(names: Sequence[str], streams: Sequence[StreamFile]) -> Iterator[None]:
    """Errors name the stream that they are about; of several, the first that is damaged."""
    with paths.about(names[0]) if len(names) == 1 else nullcontext():
        try:
            yield
        except FormatError:
            for name, stream in zip(names, streams, strict=True):
                with paths.about(name):
                    deque(stream.read_blocks(stream.index), maxlen=0)
            raise


def _check_slice(args: Namespace, stream: StreamFile) -> None:
    if args.heads is not None:
        raise UnsupportedError(
            "KV heads cannot be cut out: the components of a block mix all heads of a "
            "layer; decode, and take the heads of the arrays"
        )
    paths.check_range("--tokens", args.tokens, _tokens(stream), "tokens")
    paths.check_range("--layers", args.layers, _layers(stream)[-1] + 1, "layers")
    if args.positions is not None and not _holds(stream, args.positions):
        raise ValueError(
            f"no token has a position in --positions {paths.range_text(args.positions)}: they "
            f"are at {min((e.first_position for e in stream.index), default=0)} to "
            f"{max((e.last_position for e in stream.index), default=-1)}"
        )


def _holds(stream: StreamFile, positions: slice) -> bool:
    """Whether a token has such a position; none is negative."""
    first = positions.start or 0
    last = 2**63 - 1 if positions.stop is None else positions.stop - 1
    if first < 0:
        return False
    for entry in stream.index:
        if entry.first_position <= last and entry.last_position >= first:
            block = stream.read_block(entry)
            kept = block.positions[block.kept.start : block.kept.stop]
            if any(first <= position <= last for position in kept):
                return True
    return False


def _split(args: Namespace) -> int:
    if args.output.count("{}") != 1:
        raise UsageError(f"--output must have {{}} once, for a number, found {args.output!r}")
    edges = sorted({0, *args.at})
    if edges[0] < 0:
        raise UsageError(f"--at must be layers from 1, found {edges[0]}")
    outputs = [args.output.replace("{}", str(i)) for i in range(len(edges))]
    for path in outputs:
        paths.check_output(path, paths.STREAM, [args.input])
    results = []
    with paths.open_input(args.input, seekable=True) as file, paths.about(args.input):
        layers = _layers(StreamFile(file))
        if not layers[0] < edges[-1] <= layers[-1]:
            raise ValueError(
                f"--at {edges[-1]} is no place to cut: layers are {layers[0]} to {layers[-1]}"
            )
        for path, first, last in zip_longest(outputs, edges, edges[1:]):
            kvtc.split_layers(file, path, slice(first, last))
            results.append({"output": path, **_facts(path)})
    if args.json:
        terminal.print_json({"streams": results})
    else:
        rows = [
            (r["output"], f"layers {r['layers']}, {r['tokens']:,} tokens, {r['bytes']:,} bytes")
            for r in results
        ]
        terminal.show([terminal.facts(rows)])
    return 0


def _facts(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        stream = StreamFile(file)
    layers = _layers(stream)
    return {
        "blocks": len(stream.index),
        "tokens": sum(e.tokens for e in stream.index),
        "bytes": stream.sizes.total,
        "layers": f"{layers[0]} to {layers[-1]}",
    }


def _layers(stream: StreamFile) -> list[int]:
    return sorted(n for section in stream.header.geometry.sections for n in section.layers)


def _tokens(stream: StreamFile) -> int:
    """Number of tokens of the longest section: if others have fewer, ranges go by positions."""
    counts = [0] * len(stream.header.geometry.sections)
    for entry in stream.index:
        counts[entry.section] += entry.tokens
    return max(counts)
