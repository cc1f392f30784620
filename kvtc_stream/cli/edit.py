"""``kvtc cat``, ``slice``, ``split``, ``join``, ``truncate`` and ``repair``."""

from __future__ import annotations

from argparse import Namespace
from itertools import zip_longest
from typing import Any

import kvtc_stream as kvtc
from kvtc_stream.cli import terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import StreamFile
from kvtc_stream.io.sources import open_source


def run(args: Namespace) -> int:
    """Make a stream of others without decoding them; see ``kvtc cat --help`` and so on."""
    if args.command == "split":
        return _split(args)
    target = terminal.output(args)
    fault = None
    match args.command:
        case "cat":
            kvtc.concat(args.inputs, target)
        case "slice":
            if args.heads is not None:
                raise UnsupportedError(
                    "KV heads cannot be cut out: the components of a block mix all heads of a "
                    "layer; decode, and take the heads of the arrays"
                )
            if args.layers is not None:
                kvtc.split_layers(args.input, target, args.layers)
            else:
                kvtc.cut(args.input, target, tokens=args.tokens, positions=args.positions)
        case "join":
            kvtc.merge_layers(args.inputs, target)
        case "truncate":
            if args.tokens < 0:
                raise UsageError(f"--tokens must be at least 0, found {args.tokens}")
            kvtc.truncate(args.input, args.tokens, target)
        case "repair":
            with open_source(args.input) as file:
                fault = StreamFile(file, recover=True).fault
            kvtc.compact(args.input, target, recover=True)
    result = {"output": args.output}
    if args.output != terminal.STANDARD:
        result |= _facts(args.output)
    if args.command == "repair":
        result["fault"] = str(fault or "")
    if args.json:
        terminal.print_json(result)
    elif args.output != terminal.STANDARD:
        rows = [
            (args.output, f"{result['tokens']:,} tokens, {result['bytes']:,} bytes"),
            ("fault", result.get("fault", "")),
        ]
        terminal.show([terminal.facts(rows)])
    return 0


def _split(args: Namespace) -> int:
    if args.output.count("{}") != 1:
        raise UsageError(f"--output must have {{}} once, for a number, found {args.output!r}")
    edges = sorted({0, *args.at})
    if edges[0] < 0:
        raise UsageError(f"--at must be layers from 1, found {edges[0]}")
    results = []
    for i, (first, last) in enumerate(zip_longest(edges, edges[1:])):
        path = args.output.replace("{}", str(i))
        kvtc.split_layers(args.input, path, slice(first, last))
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
    layers = [n for section in stream.header.geometry.sections for n in section.layers]
    return {
        "blocks": len(stream.index),
        "tokens": sum(e.tokens for e in stream.index),
        "bytes": stream.sizes.total,
        "layers": f"{min(layers)} to {max(layers)}",
    }
