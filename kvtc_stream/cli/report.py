"""What streams and calibrations are, as JSON values and as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from rich.table import Table

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.parts import Part
from kvtc_stream.cli import terminal
from kvtc_stream.formats import (
    TRAILER_SIZE,
    Band,
    IndexEntry,
    ModelIdentity,
    PartPlan,
    RecordType,
    Role,
    Rope,
    Section,
    StreamFile,
    StreamHeader,
)
from kvtc_stream.stream.statistics import StreamStatistics

#: Bits per value that a plan's ratio is relative to, as published.
_RATIO_BITS = 16


# JSON values.


def statistics_json(s: StreamStatistics) -> dict[str, Any]:
    """Sizes, ratios and errors of a stream."""
    return {
        "tokens": s.tokens,
        "coded_tokens": s.coded_tokens,
        "cache_bytes": s.cache_bytes,
        "stream_bytes": s.stream_bytes,
        "ratio": s.ratio,
        "coded_ratio": s.coded_ratio,
        "errors": {
            "measure": s.measure.name.lower(),
            "k_mean": s.k_error_mean,
            "k_worst": s.k_error_worst,
            "v_mean": s.v_error_mean,
            "v_worst": s.v_error_worst,
        },
        "sizes": dict(_sizes(s)),
    }


#: What is said of a calibration that was given.
_FITS = {None: "", True: " (the one given)", False: " (not the one given)"}


def stream_json(stream: StreamFile) -> dict[str, Any]:
    """Everything that a stream tells without its calibration."""
    header, statistics = stream.header, StreamStatistics.of(stream)
    live = {entry.sequence for entry in stream.index}
    return {
        "kind": "stream",
        "records": [
            {
                "type": _type_name(entry),
                "offset": entry.offset,
                "bytes": entry.length,
                **(
                    {
                        "section": entry.section,
                        "role": entry.role.name.lower(),
                        "start": entry.start,
                        "tokens": entry.tokens,
                        "superseded": entry.sequence not in live,
                        "errors": {
                            name: getattr(entry.errors, name)
                            for name in ("k_mean", "k_worst", "v_mean", "v_worst")
                        },
                    }
                    if entry.is_block
                    else {}
                ),
            }
            for entry in stream.records
        ],
        "format_version": ".".join(map(str, header.version)),
        "model": model_json(header.model),
        "calibration": header.calibration.hex(),
        "token_digest": header.token_digest.hex(),
        "metadata": json.loads(header.metadata),
        "dtype": header.dtype.label,
        "out_dtype": header.out_dtype.label,
        "coder": header.coder.name.lower(),
        "sinks": header.sinks,
        "window": header.window,
        "block_tokens": header.block_tokens,
        "sections": [
            {**section_json(section), **_token_range(stream, i)}
            for i, section in enumerate(header.geometry.sections)
        ],
        "plan": plan_json(header),
        **statistics_json(statistics),
        "warnings": statistics.surprises(header.plan),
    }


def model_json(model: ModelIdentity) -> dict[str, str]:
    """Which model."""
    return {
        "name": model.name,
        "revision": model.revision,
        "fingerprint": model.fingerprint.hex(),
    }


def section_json(section: Section) -> dict[str, Any]:
    """One section of a geometry."""
    return {
        "layers": list(section.layers),
        "kv_heads": section.kv_heads,
        "k_dim": section.k_dim,
        "v_dim": section.v_dim,
        "rope": [
            {
                "layers": layers,
                "rotary_dim": rope.rotary_dim,
                "interleaved": rope.interleaved,
                "scale": rope.scale,
                "inv_freq": list(rope.inv_freq),
                "axes": list(rope.axes),
            }
            for rope, layers in _ropes(section)
            if rope is not None
        ],
    }


def plan_json(header: StreamHeader) -> dict[str, Any]:
    """The plan, band by band."""
    return {
        "preset": header.plan.preset,
        "digest": header.plan.digest.hex(),
        "sections": [
            {
                "basis": plan.basis,
                "bits_per_token": plan.bits,
                "expected_errors": {"k": plan.expected_k_error, "v": plan.expected_v_error},
                "ratio": _plan_ratio(section.k_width + section.v_width, plan.bits),
                "parts": [
                    {
                        "k_layers": list(part.k_layers),
                        "v_layers": list(part.v_layers),
                        "width": part.width(section),
                        "components": part.components,
                        "bits_per_token": part.bits,
                        "bands": [
                            {"size": b.size, "quantiser": b.quantiser.name.lower()}
                            for b in part.bands
                        ],
                    }
                    for part in plan.parts
                ],
            }
            for plan, section in zip(header.plan.sections, header.geometry.sections, strict=True)
        ],
    }


def calibration_json(calibration: Calibration) -> dict[str, Any]:
    """Everything about a calibration but its arrays."""
    return {
        "kind": "calibration",
        "digest": calibration.digest.hex(),
        "model": model_json(calibration.model),
        "sinks": calibration.sinks,
        "sections": [
            {
                **section_json(section),
                "tokens": learnt.tokens,
                "heads": learnt.heads and dict(zip(("first", "of"), learnt.heads, strict=True)),
                "bases": {
                    name: [
                        {
                            "k_layers": list(part.k_layers),
                            "v_layers": list(part.v_layers),
                            "width": part.width,
                            "rank": part.rank,
                            "groups": len(part.components.groups),
                            "second_level": sum(part.components.leading),
                            "dtype": "float8_e4m3" if part.eight_bits else "float16",
                            "weighted": part.weighted,
                            "token_importance": bool(part.uniform and part.uniform.importance),
                            "components_for_90_percent": _components_for(part, 0.9),
                            "components_for_99_percent": _components_for(part, 0.99),
                        }
                        for part in parts
                    ]
                    for name, parts in learnt.bases.items()
                },
            }
            for section, learnt in zip(
                calibration.geometry.sections, calibration.sections, strict=True
            )
        ],
    }


# Tables.


def stream_tables(name: str, stream: StreamFile, fits: bool | None = None) -> Iterator[Table]:
    """What ``kvtc info`` shows of a stream; ``fits``: whether a calibration that was given is the
    stream's."""
    header = stream.header
    dtype = header.dtype.label
    if header.out_dtype is not header.dtype:
        dtype += f", decodes to {header.out_dtype.label}"
    yield terminal.facts(
        [
            ("stream", f"{name}, format {'.'.join(map(str, header.version))}"),
            ("model", describe_model(header.model)),
            ("calibration", header.calibration.hex() + _FITS[fits]),
            ("token digest", header.token_digest.hex()),
            ("cache", dtype),
            *(
                (f"section {i}", _describe_tokens(section, **_token_range(stream, i)))
                for i, section in enumerate(header.geometry.sections)
            ),
            (
                "plan",
                f"{header.plan.preset}, {' + '.join(str(p.bits) for p in header.plan.sections)} "
                f"bits per token, {header.plan.digest.hex()}",
            ),
            ("verbatim", f"sinks {header.sinks}, window {header.window}"),
            ("blocks", f"{header.block_tokens} tokens, {header.coder.name.lower()}"),
            ("metadata", "" if header.metadata == "{}" else header.metadata),
        ]
    )
    yield from plan_tables(header)
    yield structure_table(stream)
    statistics = StreamStatistics.of(stream)
    yield from statistics_tables(statistics)
    yield terminal.facts(("warning", text) for text in statistics.surprises(header.plan))


def structure_table(stream: StreamFile) -> Table:
    """Where everything is; alike records that follow one another are taken together."""
    live = {entry.sequence for entry in stream.index}

    def kind(entry: IndexEntry) -> str:
        if not entry.is_block:
            return _type_name(entry)
        role = entry.role.name.lower()
        superseded = "" if entry.sequence in live else ", superseded"
        several = len(stream.header.geometry.sections) > 1
        return f"{role}{f' of section {entry.section}' if several else ''}{superseded}"

    rows = [("preamble and header", "0", f"{stream.sizes.header:,}", "", "")]
    for name, run in groupby(stream.records, kind):
        entries = list(run)
        tokens = f"{entries[0].start}–{entries[-1].start + entries[-1].tokens - 1}"
        rows.append(
            (
                name,
                f"{entries[0].offset:,}",
                f"{sum(e.length for e in entries):,}",
                str(len(entries)),
                tokens if entries[0].is_block else "",
            )
        )
        if name == "index":
            end = entries[0].offset + entries[0].length
            rows.append(("trailer", f"{end:,}", str(TRAILER_SIZE), "", ""))
    return terminal.table("Structure", ("part", "at byte", "bytes", "records", "tokens"), rows)


def _type_name(entry: IndexEntry) -> str:
    known = RecordType._value2member_map_.get(entry.type)
    return f"type {entry.type}" if known is None else str(known.name).lower()


def plan_tables(header: StreamHeader) -> Iterator[Table]:
    """Bands, runs of one quantiser taken together."""
    several = len(header.plan.sections) > 1
    rows = []
    for i, (plan, section) in enumerate(
        zip(header.plan.sections, header.geometry.sections, strict=True)
    ):
        for part in plan.parts:
            name = f"{i}: {_part_name(part)}" if several else _part_name(part)
            width = part.width(section)
            first = 1
            for run in _runs(part.bands):
                size, bits = sum(b.size for b in run), sum(b.bits for b in run)
                span = f"{first}–{first + size - 1}" if size > 1 else str(first)
                rows.append(
                    (name, run[0].quantiser.name.lower(), span, str(len(run)), str(bits), "")
                )
                name = ""
                first += size
            if first <= width:
                rows.append((name, "none", f"{first}–{width}", "", "0", ""))
            # Steps follow the data: such a part takes what its symbols take, not bits of a plan.
            ratio = f"{_plan_ratio(width, part.bits):.2f}×" if part.bits else ""
            rows.append(("", "", f"{part.components} of {width}", "", str(part.bits), ratio))
    yield terminal.table(
        "Plan",
        ("part", "quantiser", "components", "bands", "bits/token", "ratio"),
        rows,
    )


def statistics_tables(s: StreamStatistics) -> Iterator[Table]:
    """Sizes, ratios and errors."""
    total = s.stream_bytes or 1
    yield terminal.table(
        "Sizes",
        ("part", "tokens", "bytes", "share"),
        [
            (
                name,
                str(size.get("tokens", "")),
                f"{size['bytes']:,}",
                f"{size['bytes'] / total:.1%}",
            )
            for name, size in _sizes(s)
        ],
    )
    errors = ""
    if s.coded_tokens:
        errors = (
            f"K {s.k_error_mean:.4f} mean, {s.k_error_worst:.4f} worst; "
            f"V {s.v_error_mean:.4f} mean, {s.v_error_worst:.4f} worst "
            f"(relative, measured on the {s.measure.name.lower()})"
        )
    yield terminal.facts(
        [
            ("tokens", f"{s.tokens:,}, of which {s.coded_tokens:,} coded"),
            ("cache", f"{s.cache_bytes:,} bytes"),
            ("stream", f"{s.stream_bytes:,} bytes, every one counted"),
            (
                "ratio",
                f"{s.ratio:.2f}× in all, {s.coded_ratio:.2f}× without sinks and window "
                f"(data blocks alone)",
            ),
            ("errors", errors),
        ]
    )


def calibration_tables(name: str, calibration: Calibration) -> Iterator[Table]:
    """What ``kvtc info`` shows of a calibration."""
    several = len(calibration.sections) > 1
    sections = list(zip(calibration.geometry.sections, calibration.sections, strict=True))
    yield terminal.facts(
        [
            ("calibration", name),
            ("digest", calibration.digest.hex()),
            ("model", describe_model(calibration.model)),
            *(
                (
                    f"section {i}",
                    f"{learnt.tokens} tokens; {describe_section(section)}"
                    f"{_describe_heads(section, learnt.heads)}",
                )
                for i, (section, learnt) in enumerate(sections)
            ),
            ("left out", f"positions below {calibration.sinks}"),
        ]
    )
    yield terminal.table(
        "Bases",
        ("part", "values", "components", "in", "for 90% of variance", "for 99%", "weighted"),
        [
            (
                f"{f'{i}: ' if several else ''}{basis}, {_part_name(part)}",
                str(part.width),
                _rank(part),
                "e4m3" if part.eight_bits else "binary16",
                str(_components_for(part, 0.9)),
                str(_components_for(part, 0.99)),
                _weighted(part),
            )
            for i, (_, learnt) in enumerate(sections)
            for basis, parts in learnt.bases.items()
            for part in parts
        ],
    )


def _describe_heads(section: Section, heads: tuple[int, int] | None) -> str:
    """Which of the model's they are, if not all."""
    if heads is None:
        return ""
    first, of = heads
    return f"; KV heads {_describe_numbers(range(first, first + section.kv_heads))} of {of}"


def _rank(part: Part) -> str:
    components = part.components
    if components.second is None:
        return str(part.rank)
    return f"{part.rank}, of {len(components.groups)} groups, then {sum(components.leading)}"


def _weighted(part: Part) -> str:
    by = ["channels"] * part.weighted
    by += ["tokens"] * bool(part.uniform and part.uniform.importance)
    return ", ".join(by) or "no"


def describe_model(model: ModelIdentity) -> str:
    """Name, revision and fingerprint, as far as they are known."""
    parts = [model.name or "unnamed", model.revision and f"at {model.revision}"]
    if model.fingerprint:
        parts.append(f"fingerprint {model.fingerprint.hex()}")
    return ", ".join(part for part in parts if part)


def describe_section(section: Section) -> str:
    """Layers, heads, channels and RoPE."""
    channels = (
        str(section.k_dim)
        if section.k_dim == section.v_dim
        else (f"{section.k_dim} (K) and {section.v_dim} (V)")
    )
    ropes = _ropes(section)
    rope = "; ".join(
        _describe_rope(rope) + (f" in layers {_describe_numbers(layers)}" if ropes[1:] else "")
        for rope, layers in ropes
    )
    return (
        f"layers {_describe_numbers(section.layers)}, {section.kv_heads} KV heads of {channels} "
        f"channels, {rope}"
    )


# Details.


def _sizes(s: StreamStatistics) -> Iterator[tuple[str, dict[str, int]]]:
    yield "header", {"bytes": s.header_bytes}
    for role in (Role.SINKS, Role.DATA, Role.TAIL):
        r = s.roles[role]
        yield (
            role.name.lower(),
            {
                "bytes": r.stream_bytes,
                "blocks": r.blocks,
                "tokens": r.tokens,
                "verbatim_tokens": r.verbatim_tokens,
            },
        )
    yield "index", {"bytes": s.index_bytes}
    if s.other_bytes:
        yield "other records", {"bytes": s.other_bytes}


def _token_range(stream: StreamFile, section: int) -> dict[str, Any]:
    entries = [e for e in stream.index if e.section == section]
    positions = [entries[0].first_position, entries[-1].last_position] if entries else []
    return {"tokens": sum(e.tokens for e in entries), "positions": positions}


def _describe_tokens(section: Section, tokens: int, positions: Sequence[int]) -> str:
    where = f" at positions {positions[0]} to {positions[1]}" if positions else ""
    return f"{tokens} tokens{where}; {describe_section(section)}"


def _ropes(section: Section) -> list[tuple[Rope | None, list[int]]]:
    """Distinct rotary tables, each with its layers."""
    layers: dict[Rope | None, list[int]] = {}
    for number, rope in zip(
        section.layers, section.rope or (None,) * len(section.layers), strict=True
    ):
        layers.setdefault(rope, []).append(number)
    return list(layers.items())


def _describe_rope(rope: Rope | None) -> str:
    if rope is None:
        return "keys without RoPE"
    pairs = "interleaved" if rope.interleaved else "half-split"
    scale = "" if rope.scale == 1 else f", scale {rope.scale:.4g}"
    axes = ""
    if rope.axes:
        shares = np.bincount(rope.axes).tolist()
        axes = f", {len(shares)} axes with {_describe_list(shares)} pairs"
    return (
        f"RoPE over {rope.rotary_dim} channels ({pairs}, frequencies {rope.inv_freq[0]:.4g} to "
        f"{rope.inv_freq[-1]:.4g}{scale}{axes})"
    )


def _describe_list(numbers: Sequence[int]) -> str:
    *leading, last = map(str, numbers)
    return f"{', '.join(leading)} and {last}" if leading else last


def _describe_numbers(numbers: Sequence[int]) -> str:
    """Rising numbers, runs as first–last."""
    runs = [
        [n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda x: x[1] - x[0])
    ]
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _components_for(part: Part, share: float) -> int:
    """Leading components that hold a share of the variance that the basis covers."""
    total = np.cumsum(part.spectrum, dtype=np.float64)
    return int(np.searchsorted(total, share * total[-1])) + 1


def _part_name(part: PartPlan | Part) -> str:
    """K, V or both, and which of the section's layers if not all belong to it alone."""
    kinds = "+".join(
        f"{kind} {_describe_numbers(layers)}"
        for kind, layers in (("K", part.k_layers), ("V", part.v_layers))
        if layers
    )
    return kinds


def _runs(bands: Sequence[Band]) -> list[list[Band]]:
    return [list(run) for _, run in groupby(bands, key=lambda b: b.quantiser)]


def _plan_ratio(width: int, bits: int) -> float:
    return _RATIO_BITS * width / bits if bits else 0.0
