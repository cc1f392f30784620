"""``kvtc demo``."""

from __future__ import annotations

from argparse import Namespace

from kvtc_stream.evaluation import demo


def run(args: Namespace) -> int:
    """Run the demonstration; see ``kvtc demo --help``."""
    chosen = {name: getattr(args, name) for name in ("ratio", "tokens", "context")}
    demo.run(json=args.json, **{k: v for k, v in chosen.items() if v is not None})
    return 0
