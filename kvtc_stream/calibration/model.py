"""The calibration: what was learnt about a model's cache, for all presets and ratios.

Its identity is a SHA-256 of its content (SPEC, "Calibration file"). A stream names the calibration
that it was written with, and readers refuse any other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from kvtc_stream.calibration import file
from kvtc_stream.calibration.parts import CalibratedBases, SectionCalibration
from kvtc_stream.errors import FormatError
from kvtc_stream.formats import Geometry, Plan


@dataclass(frozen=True, eq=False)
class Calibration(CalibratedBases):
    """Everything a codec needs to know about a model's cache. Immutable; safe across threads."""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the content, 32 bytes."""
        return file.digest_of(self)

    @property
    def tokens(self) -> int:
        """Number of tokens that the first section learnt from."""
        return self.sections[0].tokens

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Calibration, (self.geometry, self.sections, self.sinks, self.model)

    def __repr__(self) -> str:
        model = self.model.name or "unnamed"
        return f"Calibration(model={model!r}, tokens={self.tokens}, digest={self.digest.hex()!r})"

    def for_stream(self, geometry: Geometry, plan: Plan) -> CalibratedBases:
        """The bases that a stream needs; the calibration itself if the stream has all layers.

        Sections of the result have the layers of ``geometry``, and the parts that ``plan`` uses, in
        its order.

        Raises
        ------
        FormatError
            The plan has a part that the calibration lacks.
        """
        key = plan.digest, tuple(section.layers for section in geometry.sections)
        if self.memo(("all", *key), lambda: self._has_all(geometry, plan)):
            return self
        return self.memo(("layers", *key), lambda: self._select(geometry, plan))  # type: ignore[no-any-return]

    def _has_all(self, geometry: Geometry, plan: Plan) -> bool:
        """Whether a stream has all layers, and all parts of a basis in their order."""
        mine = [section.layers for section in self.geometry.sections]
        if [section.layers for section in geometry.sections] != mine:
            return False
        orders = [
            [[(p.k_layers, p.v_layers) for p in x] for x in (s.bases.get(d.basis, ()), d.parts)]
            for s, d in zip(self.sections, plan.sections, strict=True)
        ]
        # Parts that differ in more than their order are refused by SectionCalibration.parts.
        return not any(a != b and sorted(a) == sorted(b) for a, b in orders)

    def _select(self, geometry: Geometry, plan: Plan) -> CalibratedBases:
        shapes, sections = [], []
        for section, dealt in zip(geometry.sections, plan.sections, strict=True):
            found = [
                i for i, s in enumerate(self.geometry.sections) if {*section.layers} <= {*s.layers}
            ]
            if not found:
                raise FormatError(
                    f"the stream has a section of layers {list(section.layers)}, the calibration "
                    f"that it names has none with all of them: the writer is at fault"
                )
            whole, stored = self.geometry.sections[found[0]], self.sections[found[0]]
            by_layers = {(p.k_layers, p.v_layers): p for p in stored.basis(dealt.basis)}
            parts = []
            for part in dealt.parts:
                numbers = [
                    tuple(whole.layers.index(section.layers[i]) for i in layers)
                    for layers in (part.k_layers, part.v_layers)
                ]
                own = by_layers.get((numbers[0], numbers[1]))
                if own is None:
                    raise FormatError(
                        f"the plan has a part of the K of layers {numbers[0]} and the V of "
                        f"{numbers[1]}, the calibration's basis {dealt.basis!r} has none: the "
                        "writer is at fault"
                    )
                parts.append(replace(own, k_layers=part.k_layers, v_layers=part.v_layers))
            rope = tuple(whole.rope[whole.layers.index(n)] for n in section.layers if whole.rope)
            shapes.append(replace(whole, layers=section.layers, rope=rope))
            sections.append(SectionCalibration({dealt.basis: tuple(parts)}, stored.tokens))
        return CalibratedBases(Geometry(tuple(shapes)), tuple(sections), self.sinks, self.model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. A write that fails leaves no partial file."""
        file.save(self, self.digest, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that :meth:`save` wrote, and check its digest.

        Raises
        ------
        FormatError
            Not a calibration file; :class:`VersionError` or :class:`ChecksumError` if it is one
            of another version, or was changed.
        """
        content = file.load(path)
        return cls(content.geometry, content.sections, content.sinks, content.model)
