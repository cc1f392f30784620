"""What the benchmarks of ``kvtc bench`` share: arguments, texts, model, codecs, output."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.cli import paths, terminal
from kvtc_stream.cli.arguments import UsageError, importance_options
from kvtc_stream.evaluation import quality
from kvtc_stream.io.storage import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Shares of a text, where it both calibrates and is judged.
CALIBRATED_UNTIL, JUDGED_FROM = 0.7, 0.8
_TOKENS = 160_000
_PACKAGES = ("kvtc-stream", "numpy", "numba", "torch", "transformers")


def check(args: Namespace, presets: Sequence[str], contexts: Sequence[int]) -> list[str]:
    """Refuse what would only fail late. Returns the presets: those asked for, or ``presets``."""
    if not (args.text or args.judge_text):
        raise UsageError("give --text FILE...: what shall the model read?")
    if not (args.text or args.calibration):
        raise UsageError("--judge-text needs --text to calibrate on, or --calibration")
    learning = [args.tokens, args.importance, args.importance_documents]
    if args.calibration and (learning != [None] * 3 or (args.text and args.judge_text)):
        raise UsageError(
            "--calibration is made already: leave out --tokens, --importance, "
            "--importance-documents, and the texts for it"
        )
    importance_options(args)
    chosen: list[str] = args.presets or [*presets]
    if unknown := [name for name in chosen if name not in kvtc.PRESETS]:
        raise UsageError(f"--presets must be among {', '.join(kvtc.PRESETS)}, found {unknown[0]}")
    if not all(0 < ratio < math.inf for ratio in args.ratios):
        raise UsageError("--ratios must be positive and finite")
    check_positive(args, "tokens")
    least = kvtc.Codec.sinks + args.window + kvtc.Codec.block_tokens
    if short := [context for context in contexts if context < least]:
        raise UsageError(
            f"--context must be at least {least}, sinks, window and a block, found {short[0]}"
        )
    sources = [*args.text, *args.judge_text, args.model, args.calibration]
    paths.check_output(args.output, paths.FIGURES, sources)
    paths.check_output(args.plot, paths.PICTURE, sources)
    paths.check_output(args.save_calibration, paths.CALIBRATION, sources)
    if args.plot:
        importlib.import_module("matplotlib")
    return chosen


def check_positive(args: Namespace, *names: str) -> None:
    """Refuse options below 1."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, found {getattr(args, name)}")


def texts(args: Namespace) -> tuple[list[str], dict[str, str]]:
    """Texts to calibrate on, and texts to judge by name."""
    learnt, judged = paths.read_texts(args.text), paths.read_texts(args.judge_text)
    if known := [path for path, text in judged.items() if text in learnt.values()]:
        raise UsageError(
            f"{known[0]} is among the texts to calibrate on: judge on a text that is not, or leave "
            f"out --judge-text to judge on the last part of each"
        )
    if not judged:
        judged = {path: text[int(len(text) * JUDGED_FROM) :] for path, text in learnt.items()}
        learnt = {path: text[: int(len(text) * CALIBRATED_UNTIL)] for path, text in learnt.items()}
    names = [path.name for path in judged]
    if len(set(names)) < len(names):
        root = os.path.commonpath([path.parent for path in judged])
        names = [path.relative_to(root).as_posix() for path in judged]
    return list(learnt.values()), dict(zip(names, judged.values(), strict=True))


def load(args: Namespace, bars: Progress) -> tuple[PreTrainedModel, Any, str]:
    """The model, on a GPU if there is one; its tokenizer; its name."""
    # It wants another version of transformers than vLLM, beside which servers are measured.
    from kvtc_stream.integrations.transformers import load_model

    source = args.model
    if source is None:
        from kvtc_stream.evaluation.smollm2 import model_file

        source = model_file(terminal.bar(bars, "Fetching SmolLM2-135M"))
    task = bars.add_task("Loading the model", total=None)
    model, tokenizer = load_model(source, dtype=args.dtype)
    import torch

    if torch.cuda.is_available():
        model = model.to("cuda")  # type: ignore[arg-type]
    bars.remove_task(task)
    path = Path(source)
    name = path.stem if path.suffix == ".gguf" else path.name if path.is_dir() else str(source)
    return model, tokenizer, name


def calibrated(
    args: Namespace,
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    name: str,
    bars: Progress,
) -> kvtc.Calibration:
    """The calibration that was asked for, or one made of these texts."""
    if args.calibration:
        return paths.load_calibration(args.calibration)
    from kvtc_stream.integrations.transformers import calibrate

    documents = quality.calibration_documents(tokenizer, texts, args.tokens or _TOKENS)
    made: kvtc.Calibration = calibrate(
        model,
        documents,
        tokenizer=tokenizer,
        tokens=max(sum(map(len, documents)), 1),
        progress=terminal.bar(bars, "Calibrating"),
        name=name,
        backend="auto" if model.device.type == "cuda" else "cpu",
        **importance_options(args),
    )
    if args.save_calibration:
        made.save(args.save_calibration)
    return made


def planned(
    args: Namespace, calibration: kvtc.Calibration, presets: Sequence[str], bars: Progress
) -> list[kvtc.Codec]:
    """A codec of each preset and ratio, with its plan."""
    codecs = [
        kvtc.Codec(calibration, preset, ratio=ratio, window=args.window)
        for preset in presets
        for ratio in args.ratios
    ]
    for codec in codecs:
        codec.make_plan(terminal.bar(bars, f"Planning {codec.preset} for {codec.ratio:g}×"))
    return codecs


def described(
    args: Namespace, model: PreTrainedModel, name: str, calibration: kvtc.Calibration
) -> dict[str, Any]:
    """What a result begins with: what was run, on what."""
    return {
        "command": command(args),
        "device": _device(model),
        "versions": versions(_PACKAGES),
        "model": {"name": name, "dtype": args.dtype},
        "calibration": {"tokens": calibration.tokens, "digest": calibration.digest.hex()},
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of packages, those that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def command(args: Namespace) -> str:
    """As it was given; files by name, wherever they are."""
    words = [
        Path(word).name if os.path.exists(word) or os.path.isabs(word) else word
        for word in args.words
    ]
    return shlex.join(["kvtc", *words])


def _device(model: PreTrainedModel) -> str:
    if model.device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(model.device)
    return f"CPU, {platform.machine()}"


def report(
    args: Namespace,
    measure: Callable[[Progress], Iterator[dict[str, Any]]],
    draw: Callable[[dict[str, Any], str], None],
    tables: Callable[[dict[str, Any]], Iterable[Table]],
) -> int:
    """Measure, writing the result to the output while it grows; draw and show the last."""
    result: dict[str, Any] = {}
    with terminal.progress() as bars:
        for result in measure(bars):
            if args.output:
                text = json.dumps(result, indent=2, allow_nan=False) + "\n"
                with atomic_write(args.output) as file:
                    file.write(text.encode())
    if args.plot:
        draw(result, args.plot)
    if args.json:
        terminal.print_json(result)
    else:
        terminal.show(tables(result))
    return 0


def about(result: dict[str, Any], judged: str) -> Table:
    """The model, and what was judged."""
    return terminal.facts(
        [
            (
                "model",
                f"{result['model']['name']} in {result['model']['dtype']}, calibrated on "
                f"{result['calibration']['tokens']:,} tokens",
            ),
            ("judged on", judged),
        ]
    )
