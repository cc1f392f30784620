"""``kvtc cat``, ``slice``, ``truncate`` and ``repair``."""

from __future__ import annotations

from argparse import Namespace

import kvtc_stream as kvtc
from kvtc_stream.cli import terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import StreamFile
from kvtc_stream.sources import open_source


def run(args: Namespace) -> int:
    """Make a stream of others without decoding them; see ``kvtc cat --help`` and so on."""
    target = terminal.output(args)
    fault = None
    match args.command:
        case "cat":
            kvtc.cat(args.inputs, target)
        case "slice":
            if args.layers is not None:
                raise UnsupportedError(
                    "layers cannot be cut out: the components of a block span all layers of a "
                    "section; decode the layers with `kvtc decode --layers`"
                )
            kvtc.cut(args.input, target, tokens=args.tokens, positions=args.positions)
        case "truncate":
            if args.tokens < 0:
                raise UsageError(f"--tokens must be at least 0, found {args.tokens}")
            kvtc.cut(args.input, target, tokens=slice(None, args.tokens))
        case "repair":
            with open_source(args.input) as file:
                fault = StreamFile(file, recover=True).fault
            kvtc.cat([args.input], target, recover=True)
    result = {"output": args.output}
    if args.output != terminal.STANDARD:
        with open(args.output, "rb") as file:
            stream = StreamFile(file)
        result |= {
            "blocks": len(stream.index),
            "tokens": sum(e.tokens for e in stream.index),
            "bytes": stream.sizes.total,
        }
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
