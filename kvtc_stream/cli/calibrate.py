"""``kvtc calibrate``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from rich.progress import Progress

import kvtc_stream as kvtc
from kvtc_stream.calibration.split import part_path
from kvtc_stream.cli import paths, report, terminal
from kvtc_stream.cli.arguments import UsageError, importance_options
from kvtc_stream.integrations.transformers import load_model
from kvtc_stream.io import plain

#: Tokens handed to the calibrator at a time.
_CHUNK = 512


def run(args: Namespace) -> int:
    """Learn a model's cache; see ``kvtc calibrate --help``."""
    _check(args)
    sources = [*args.inputs, *(args.text or ()), args.model]
    parts = args.tensor_parallel
    outputs = [str(part_path(args.output, i, parts)) for i in range(parts)]
    for output in outputs:
        paths.check_output(output, paths.CALIBRATION, sources)
    options = {
        "sinks": args.sinks,
        "layer_groups": args.layer_groups,
        "second_level": args.second_level,
        "rank": args.rank,
        "basis_dtype": args.basis_dtype,
        "backend": args.backend,
    }
    with terminal.progress() as bars:
        learn = _from_model if args.model else _from_files
        found = dict(zip(outputs, learn(args, options, bars), strict=True))
        for output, calibration in found.items():
            bars.add_task(f"Writing {output}", total=None)
            calibration.save(output)
    if args.json:
        told = [{"output": name, **report.calibration_json(x)} for name, x in found.items()]
        terminal.print_json(told[0] if parts == 1 else {"tensor_parallel": parts, "parts": told})
    else:
        for output, calibration in found.items():
            terminal.show(report.calibration_tables(output, calibration))
    return 0


def _check(args: Namespace) -> None:
    if args.tensor_parallel < 1:
        raise UsageError(f"--tensor-parallel must be at least 1, found {args.tensor_parallel}")
    rope = {
        "--rope-theta": args.rope_theta is not None,
        "--rope": args.rope is not None,
        "--rope-interleaved": args.rope_interleaved,
        "--rotary-dim": args.rotary_dim is not None,
    }
    reading = {
        "--text": args.text is not None,
        "--tokens": args.tokens is not None,
        "--document-tokens": args.document_tokens is not None,
        "--importance": args.importance is not None,
        "--importance-documents": args.importance_documents is not None,
        "--dtype": args.dtype is not None,
        "--device-map": args.device_map is not None,
    }
    if args.model:
        unfit = [name for name, given in rope.items() if given]
        if args.inputs or unfit:
            raise UsageError(
                f"--model runs the model to get its cache and finds its RoPE: leave out "
                f"{', '.join([*args.inputs[:1], *unfit])}"
            )
        if not args.text:
            raise UsageError("--model needs --text FILE...: what shall the model read?")
        importance_options(args)
        return
    if unfit := [name for name, given in reading.items() if given]:
        raise UsageError(f"{', '.join(unfit)} goes with --model")
    if not args.inputs:
        raise UsageError("give plain caches IN..., or --model and --text")
    if rope["--rope-theta"] == rope["--rope"]:
        raise UsageError(
            "say what the keys in IN carry: --rope-theta THETA if they were captured after RoPE "
            "of that base (rope_theta in the model's config.json; caches of most frameworks), "
            "--rope none if before it or if the model has none. Scaled RoPE: use --model, or the "
            "library"
        )
    if args.rope and (args.rope_interleaved or args.rotary_dim is not None):
        raise UsageError("--rope-interleaved and --rotary-dim go with --rope-theta")


def _from_files(args: Namespace, options: dict[str, Any], bars: Progress) -> list[kvtc.Calibration]:
    calibrator: kvtc.SplitCalibrator | None = None
    reading = bars.add_task("Reading", total=len(args.inputs))
    for name in args.inputs:
        sections = plain.read(name)
        if len(sections) != 1:
            raise ValueError(
                f"{name} has {len(sections)} sections, expected one, with arrays k and v: "
                f"calibrate with --model, or with the library"
            )
        [section] = sections
        if calibrator is None:
            model = kvtc.ModelIdentity(args.name or "")
            calibrator = kvtc.SplitCalibrator(
                _geometry(args, section), args.tensor_parallel, model=model, **options
            )
        with paths.about(name):
            for start in range(0, section.tokens, _CHUNK):
                tokens = range(start, min(start + _CHUNK, section.tokens))
                _update(calibrator, section, tokens)
                bars.advance(reading, len(tokens) / section.tokens)
    assert calibrator is not None
    return calibrator.finish(terminal.bar(bars, "Solving"))


def _geometry(args: Namespace, section: plain.PlainSection) -> kvtc.Geometry:
    layers, kv_heads, _, head_dim = section.k.shape
    rope = None
    if args.rope_theta is not None:
        rotary_dim = head_dim if args.rotary_dim is None else args.rotary_dim
        rope = kvtc.Rope.from_theta(args.rope_theta, rotary_dim, interleaved=args.rope_interleaved)
    return kvtc.Geometry.uniform(
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=section.v.shape[3],
        rope=rope,
    )


def _update(calibrator: kvtc.SplitCalibrator, section: plain.PlainSection, tokens: range) -> None:
    span = slice(tokens.start, tokens.stop)
    calibrator.update(
        section.k[:, :, span],
        section.v[:, :, span],
        positions=tokens if section.positions is None else section.positions[span],
        k_scale=section.k_scale,
        v_scale=section.v_scale,
    )


def _from_model(args: Namespace, options: dict[str, Any], bars: Progress) -> list[kvtc.Calibration]:
    loading = bars.add_task(f"Loading {args.model}", total=None)
    texts = list(paths.read_texts(args.text).values())
    given = {"dtype": args.dtype, "device_map": args.device_map}
    model, tokenizer = load_model(
        args.model, **{name: value for name, value in given.items() if value is not None}
    )
    import torch

    from kvtc_stream.integrations.transformers import calibrate

    if args.device_map is None and torch.cuda.is_available():
        model = model.to("cuda")  # type: ignore[arg-type]
    bars.remove_task(loading)
    limits = {"tokens": args.tokens, "document_tokens": args.document_tokens}
    options |= {name: value for name, value in limits.items() if value is not None}
    found: list[kvtc.Calibration] = calibrate(
        model,
        texts,
        tokenizer=tokenizer,
        progress=terminal.bar(bars, "Reading", then="Solving"),
        name=args.name,
        tensor_parallel=args.tensor_parallel,
        **importance_options(args),
        **options,
    )
    return found
