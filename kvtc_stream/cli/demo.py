"""``kvtc demo``."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from kvtc_stream.cli import terminal
from kvtc_stream.cli.arguments import UsageError
from kvtc_stream.evaluation import demo


def run(args: Namespace) -> int:
    """Run the demonstration; see ``kvtc demo --help``."""
    if args.ratio is not None and not 0 < args.ratio < math.inf:
        raise UsageError(f"--ratio must be positive and finite, found {args.ratio}")
    chosen = {name: getattr(args, name) for name in ("ratio", "tokens", "context", "model")}
    result = demo.run(terminal.step, **{k: v for k, v in chosen.items() if v is not None})
    if args.json:
        terminal.print_json(result)
    else:
        terminal.show(_tables(result))
    return 0


def _tables(r: dict[str, Any]) -> Iterable[Table]:
    errors = r["errors"]
    yield terminal.facts(
        [
            ("model", f"{r['model']}, calibrated on {r['calibration']['tokens']:,} tokens"),
            (
                "cache",
                f"{r['tokens']:,} tokens, {r['cache_bytes'] / 1e6:.2f} MB in {r['cache_dtype']}",
            ),
            ("file", f"{r['stream_bytes'] / 1e6:.2f} MB, every byte counted"),
            (
                "ratio",
                f"{r['ratio']:.2f}× with {r['tokens'] - r['coded_tokens']} tokens kept exactly; "
                f"{r['coded_ratio']:.2f}× for the {r['coded_tokens']:,} coded tokens",
            ),
            (
                "relative error",
                f"K {errors['k_mean']:.4f}, V {errors['v_mean']:.4f} mean; "
                f"K {errors['k_worst']:.4f}, V {errors['v_worst']:.4f} worst token",
            ),
            (
                "loss",
                f"{r['loss']:.4f} → {r['restored_loss']:.4f} nats per token "
                f"({r['loss_rise']:+.4f}) on the next {r['judged_tokens']} tokens",
            ),
            (
                "next token",
                f"KL divergence {r['kl_divergence']:.4f} nats; the same top choice for "
                f"{r['same_top_token']:.1%}",
            ),
            ("time", f"{sum(r['seconds'].values()):.0f} s in all"),
        ]
    )
    yield terminal.facts(
        row
        for each in r["answers"]
        for row in (
            ("question", each["question"]),
            ("model's own cache", each["answer"]),
            ("restored cache", each["restored_answer"]),
        )
    )
