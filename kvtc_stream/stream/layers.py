"""Streams with some of the layers, and streams put together by layers, without decoding them.

That goes where the basis has groups of layers (``Calibrator(layer_groups=…)``) and no second level:
what was coded of one group is apart from the others. Values that are stored as they are can be
taken by layer always; KV heads cannot be taken apart, because every basis mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvtc_stream.coding import payload
from kvtc_stream.coding.bands import segment_sizes, split_segments
from kvtc_stream.coding.values import code_verbatim, verbatim_values
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import (
    Block,
    BlockErrors,
    Coder,
    Geometry,
    LayerErrors,
    PartPlan,
    Plan,
    Quantiser,
    Section,
    SectionPlan,
    SectionScales,
    StreamHeader,
)
from kvtc_stream.formats.coders import compress_beside


@dataclass(frozen=True)
class _Chosen:
    """What is taken of a section: its place among those of the result, and indices."""

    place: int
    layers: tuple[int, ...]
    parts: tuple[int, ...]


class Selection:
    """Some layers of a stream.

    Parameters
    ----------
    header
        Of the stream.
    layers
        Which to take, by the model's numbers: a slice of step 1 or any, negative from the end.

    Attributes
    ----------
    header
        Of the result.

    Raises
    ------
    UnsupportedError
        Some of the layers are coded together with others.
    """

    def __init__(self, header: StreamHeader, layers: slice) -> None:
        self._of = header
        last = max(n for s in header.geometry.sections for n in s.layers)
        wanted = range(last + 1)[layers]
        self._chosen: dict[int, _Chosen] = {}
        sections: list[Section] = []
        plans, scales = [], []
        for i, (section, plan) in enumerate(
            zip(header.geometry.sections, header.plan.sections, strict=True)
        ):
            own = tuple(j for j, n in enumerate(section.layers) if n in wanted)
            if not own:
                continue
            parts = _parts(section, plan, own)
            self._chosen[i] = _Chosen(len(sections), own, parts)
            numbers = tuple(section.layers[j] for j in own)
            rope = tuple(section.rope[j] for j in own) if section.rope else ()
            sections.append(replace(section, layers=numbers, rope=rope))
            dealt = [_renumbered(plan.parts[j], own.index) for j in parts]
            plans.append(SectionPlan(plan.basis, tuple(dealt)))
            if header.scales:
                heads = section.kv_heads
                kept = [j * heads + head for j in own for head in range(heads)]
                k_scale, v_scale = header.scales[i].k_scale, header.scales[i].v_scale
                scales.append(
                    SectionScales(tuple(k_scale[j] for j in kept), tuple(v_scale[j] for j in kept))
                )
        if not sections:
            raise ValueError(f"no layer of the stream is among {wanted}, it has up to {last}")
        self.header = replace(
            header,
            geometry=Geometry(tuple(sections)),
            plan=Plan(header.plan.preset, tuple(plans)),
            scales=tuple(scales),
        )

    def block(self, block: Block) -> Block | None:
        """A block of the stream with these layers; ``None`` of a section that has none of them."""
        if (chosen := self._chosen.get(block.section)) is None:
            return None
        header = self._of
        verbatim = [x[list(chosen.layers)] for x in verbatim_values(block, header)]
        pieces = _pieces(header.plan.sections[block.section], block)
        kept = replace(pieces, parts=[pieces.parts[i] for i in chosen.parts])
        plan = self.header.plan.sections[chosen.place]
        errors = block.layer_errors
        if errors is not None:
            errors = LayerErrors.gathered([(errors, layer) for layer in chosen.layers])
        chosen_block = replace(block, section=chosen.place, layer_errors=errors)
        return _assembled(chosen_block, header, plan, verbatim, kept)


class Union:
    """Streams of the same tokens with different layers, as one.

    Parameters
    ----------
    headers
        Of the streams.

    Attributes
    ----------
    header
        Of the result; the first's, but for layers, plan and scales.

    Raises
    ------
    UnsupportedError
        The streams do not go together.
    """

    #: What may differ, and is made of all.
    MADE = ("geometry", "plan", "scales")

    def __init__(self, headers: Sequence[StreamHeader]) -> None:
        self._of = headers
        counts = {len(h.geometry.sections) for h in headers}
        if len(counts) > 1:
            raise UnsupportedError(
                f"the streams have {', '.join(map(str, sorted(counts)))} sections: layers of "
                "every section must be in each of them"
            )
        # For every section of the result, where each of its layers and parts comes from: (stream,
        # index there).
        self._layers: list[list[tuple[int, int]]] = []
        self._parts: list[list[tuple[int, int]]] = []
        sections, plans, scales = [], [], []
        for i in range(counts.pop()):
            sections.append(self._section(i, [h.geometry.sections[i] for h in headers]))
            plans.append(self._plan([h.plan.sections[i] for h in headers]))
            if headers[0].scales:
                scales.append(self._scales(i, sections[-1].kv_heads))
        self.header = replace(
            headers[0],
            geometry=Geometry(tuple(sections)),
            plan=Plan(headers[0].plan.preset, tuple(plans)),
            scales=tuple(scales),
        )

    def _section(self, index: int, own: Sequence[Section]) -> Section:
        layers = sorted((n, j, k) for j, s in enumerate(own) for k, n in enumerate(s.layers))
        numbers = tuple(n for n, _, _ in layers)
        if len(set(numbers)) < len(numbers):
            raise UnsupportedError(
                f"section {index} of the streams has layers {list(numbers)}: expected every layer "
                "once"
            )
        shapes = {(s.kv_heads, s.k_dim, s.v_dim, bool(s.rope)) for s in own}
        if len(shapes) > 1:
            raise UnsupportedError(
                f"layers of section {index} have KV heads, dims of K and V, and RoPE "
                f"{sorted(shapes)}: expected the same in all streams"
            )
        order = [(j, k) for _, j, k in layers]
        self._layers.append(order)
        rope = tuple(own[j].rope[k] for j, k in order) if own[0].rope else ()
        return replace(own[0], layers=numbers, rope=rope)

    def _plan(self, own: Sequence[SectionPlan]) -> SectionPlan:
        """The plan of the section that :meth:`_section` made last, from the streams' plans."""
        if len(bases := {plan.basis for plan in own}) > 1:
            raise UnsupportedError(f"the streams have bases {sorted(bases)}: expected one")
        order = self._layers[-1]
        placed = []
        for j, plan in enumerate(own):
            # Where the stream's own layers, which rise, are among all.
            numbers = [place for place, (stream, _) in enumerate(order) if stream == j]
            for k, part in enumerate(plan.parts):
                placed.append((_renumbered(part, numbers.__getitem__), j, k))
        # As the calibration has them: parts with K first, then by layer.
        placed.sort(key=lambda p: (not p[0].k_layers, min(p[0].k_layers + p[0].v_layers)))
        self._parts.append([(j, k) for _, j, k in placed])
        return SectionPlan(bases.pop(), tuple(part for part, _, _ in placed))

    def _scales(self, index: int, heads: int) -> SectionScales:
        """The fp8 scales of the section that :meth:`_section` made last."""
        own = [h.scales[index] for h in self._of]
        spans = [(j, slice(k * heads, (k + 1) * heads)) for j, k in self._layers[-1]]
        return SectionScales(
            tuple(x for j, span in spans for x in own[j].k_scale[span]),
            tuple(x for j, span in spans for x in own[j].v_scale[span]),
        )

    def block(self, blocks: Sequence[Block]) -> Block:
        """The block that those of all streams are layers of."""
        first = blocks[0]
        for name in (
            "section",
            "role",
            "start",
            "tokens",
            "positions",
            "verbatim_tokens",
            "cut",
            "axes",
        ):
            if len({str(getattr(block, name)) for block in blocks}) > 1:
                raise UnsupportedError(
                    f"the blocks at token {first.start} differ in {name.replace('_', ' ')}: only "
                    "layers of one stream can be joined; decode, and encode together"
                )
        plans = [h.plan.sections[first.section] for h in self._of]
        found = [_pieces(plan, block) for plan, block in zip(plans, blocks, strict=True)]
        heads = {x.head for x in found if x.parts and x.uniform}
        if len(heads) > 1:
            raise UnsupportedError(
                f"the blocks at token {first.start} have other steps: only layers of one stream "
                "can be joined; decode, and encode together"
            )
        like = next((x for x in found if x.uniform), found[0])
        kept = replace(like, parts=[found[j].parts[k] for j, k in self._parts[first.section]])
        exact = [verbatim_values(block, h) for h, block in zip(self._of, blocks, strict=True)]
        order = self._layers[first.section]
        verbatim = [np.stack([exact[j][kind][k] for j, k in order]) for kind in (0, 1)]
        plan = self.header.plan.sections[first.section]
        errors = [block.layer_errors for block in blocks]
        known = [e for e in errors if e is not None]
        if len(known) == len(errors):
            first = replace(
                first, layer_errors=LayerErrors.gathered([(known[j], k) for j, k in order])
            )
        else:
            first = replace(first, layer_errors=None)
        return _assembled(first, self.header, plan, verbatim, kept)


def _parts(section: Section, plan: SectionPlan, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the parts that have these layers, and no others."""
    chosen, found = set(layers), []
    for i, part in enumerate(plan.parts):
        own = {*part.k_layers, *part.v_layers}
        if own <= chosen:
            found.append(i)
        elif own & chosen:
            groups = sorted({tuple(sorted({*p.k_layers, *p.v_layers})) for p in plan.parts})
            named = ", ".join(f"{section.layers[g[0]]} to {section.layers[g[-1]]}" for g in groups)
            raise UnsupportedError(
                f"layers are coded in groups ({named}), and groups cannot be cut: choose whole "
                "ones, or decode the layers (`kvtc decode --layers`); a calibration with "
                "layer_groups and without second_level has more of them"
            )
    return tuple(found)


def _renumbered(part: PartPlan, number: Callable[[int], int]) -> PartPlan:
    return replace(
        part,
        k_layers=tuple(map(number, part.k_layers)),
        v_layers=tuple(map(number, part.v_layers)),
    )


@dataclass(frozen=True)
class _Pieces:
    """A block's coded symbols, part by part.

    With uniform bands each part is a run of tiles and there is a head; with other bands each part
    is its segments.
    """

    uniform: payload.UniformPayload | None
    parts: list[Any]

    @property
    def head(self) -> tuple[float, int, int] | None:
        """Step, level and size of tiles."""
        if (found := self.uniform) is None:
            return None
        return found.step, found.level, found.tile_components


def _coded(plan: SectionPlan) -> list[int]:
    """Components of each part that have symbols of the uniform quantiser."""
    kind = Quantiser.UNIFORM
    return [sum(b.size for b in part.bands if b.quantiser is kind) for part in plan.parts]


def _pieces(plan: SectionPlan, block: Block) -> _Pieces:
    if block.coder is Coder.RANS:
        return _Pieces(*payload.split_parts(block, _coded(plan)))
    sizes = [segment_sizes(block.coded_tokens, part.bands) for part in plan.parts]
    return _Pieces(None, split_segments(block, sizes))


def _assembled(
    block: Block, header: StreamHeader, plan: SectionPlan, verbatim: Sequence[Any], pieces: _Pieces
) -> Block:
    """The block with other values and symbols, of ``plan``; its errors over all layers are not
    known."""
    verbatim_coder, exact = code_verbatim(header, *verbatim)
    symbols = sum(_coded(plan)) * block.coded_tokens
    if pieces.uniform is None or not symbols:
        parts = pieces.parts if pieces.uniform is None else []
        segments = [b"".join(kind) for kind in zip(*parts, strict=True)]
        coder, coded = compress_beside(header.coder, *segments)
        symbols = sum(map(len, segments))
    else:
        coder, coded = Coder.RANS, payload.join_parts(pieces.uniform, pieces.parts)
    return replace(
        block,
        coder=coder,
        coded=coded,
        coded_size=symbols,
        verbatim_coder=verbatim_coder,
        verbatim=exact,
        errors=BlockErrors(),
    )
