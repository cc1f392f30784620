"""What the kernels need of a plan and a calibration, on the device. Made once, immutable."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import cupy
import numpy as np

from kvtc_stream import importance
from kvtc_stream.calibration import Calibration, Part
from kvtc_stream.cpu.rans import CLASSES, Families
from kvtc_stream.cpu.uniform import UniformBands
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import SectionPlan
from kvtc_stream.gpu import tables
from kvtc_stream.gpu.bands import strips

#: Rows of binary16 are scaled so that so many deviations of the widest channel, at the step of
#: offset 0 and class 0, have this size. Binary16 ends at 65,504.
_DEVIATIONS, _SIZE = 64.0, 8192.0
#: Symbols' deviation, in class 0 at offset 0, up to which they are kept as they are.
_USUAL = 256.0


@dataclass(frozen=True, eq=False)
class DevicePart:
    """A part of the basis.

    Attributes
    ----------
    k_layers, v_layers
        Indices into the section's layers.
    width
        Values of a row.
    first, count
        Its coded components among those of all parts.
    mean
        float32 [width].
    analysis, synthesis
        Bits of binary16 [count, width]: what rows are multiplied by, and what symbols are, times
        powers of two.
    analysis_scale, synthesis_scale
        What products are multiplied by.
    """

    k_layers: tuple[int, ...]
    v_layers: tuple[int, ...]
    width: int
    first: int
    count: int
    mean: Any
    analysis: Any
    synthesis: Any
    analysis_scale: float
    synthesis_scale: float


class Basis:
    """What analysis and synthesis need of a section's plan, whatever its bands.

    Attributes
    ----------
    parts
        Of the basis.
    components
        Of all parts together that have a row of coefficients.
    """

    parts: list[DevicePart]
    components: int


class BandPlan(Basis):
    """A section's plan whose bands have a scale and a shift per token.

    Attributes
    ----------
    bands
        Of each part.
    whole, cut
        Tables of strips: whole bands, and pieces of them, see :func:`kvtc_stream.gpu.bands.strips`.
    fields
        int32 [parts, 2]: first component, and components.
    """

    def __init__(self, calibration: Calibration, section: int, plan: SectionPlan) -> None:
        stored = calibration.sections[section].parts(plan)
        self.bands = [part.bands for part in plan.parts]
        counts = [part.components for part in plan.parts]
        self.components = sum(counts)
        firsts = [0, *accumulate(counts)]
        self.parts = []
        for i, (part, first, count) in enumerate(zip(stored, firsts, counts, strict=False)):
            analysis, synthesis = calibration.transforms(section, plan.basis, i, count)
            analysis, synthesis = analysis[:count], synthesis[:count]
            up = _power_of_two(float(np.abs(analysis).max(initial=0)))
            # Coefficients are 1 at most on the device; so are rows, but for their number's root.
            down = _power_of_two(float(np.sqrt((synthesis**2).sum(axis=0).max(initial=0))))
            self.parts.append(_part(part, first, analysis / up, synthesis / down, up, down))
        self.whole = cupy.asarray(strips(self.bands, None))
        self.cut = cupy.asarray(strips(self.bands))
        self.fields = cupy.asarray(np.array([firsts[:-1], counts], np.int32).T.copy())


class DevicePlan(Basis):
    """A section's plan with uniform bands.

    Attributes
    ----------
    coded
        Components that are coded, of each part.
    unit
        The step of base step 0 and class 0 at offset 0.
    ids, families, buckets, symbols, codes, bits
        Tables of the coder, see :mod:`kvtc_stream.gpu.rans`; ``codes`` are the encoder's entries.
    down
        float32 [components]: powers of two that symbols are multiplied by on the device, so that
        binary16 has room for those of the strongest components.
    decode_shared, encode_shared
        Bytes of shared memory for them.
    lowest, highest
        Levels that ``ids`` has rows for, those below and above share the first and the last.
    fields, scale, weights, groups, per_class
        Of the predictor of importance, see :func:`kvtc_stream.gpu.uniform.classify`.
    """

    def __init__(self, calibration: Calibration, section: int, plan: SectionPlan) -> None:
        parts = calibration.sections[section].parts(plan)
        bands = []
        for part, dealt in zip(parts, plan.parts, strict=True):
            assert part.uniform is not None
            families = part.uniform.families
            coder = Families(families.frequencies)
            bands.append(UniformBands(dealt.bands, coder, families.ids))
            self.unit = part.uniform.unit
        self.coded = [len(b.components) for b in bands]
        self.components = sum(self.coded)
        self.leading = all((b.components == np.arange(len(b.components))).all() for b in bands)
        firsts = np.concatenate([[0], np.cumsum(self.coded)]).tolist()
        self.parts = []
        downs: list[Any] = []
        for i, (part, dealt, own) in enumerate(zip(parts, plan.parts, bands, strict=True)):
            analysis, synthesis = calibration.transforms(section, plan.basis, i, dealt.components)
            analysis, synthesis = analysis[own.components], synthesis[own.components]
            deviation = float(
                np.sqrt(
                    (part.spectrum[own.components, None] * synthesis**2).sum(axis=0).max(initial=0)
                )
            )
            # Coefficients on the device are without the factors of base steps.
            factors = np.exp2(own.base[:, None] / np.float32(4))
            analysis, synthesis = analysis / factors, synthesis * factors
            deviations = np.sqrt(part.spectrum[own.components]) / (factors[:, 0] * self.unit)
            downs.append(_down(deviations))
            synthesis = synthesis / downs[-1][:, None]
            size = _DEVIATIONS * max(deviation, 1e-30) / self.unit
            down = _power_of_two(size / _SIZE)
            up = _power_of_two(float(np.abs(analysis).max(initial=0)))
            self.parts.append(_part(part, firsts[i], analysis / up, synthesis / down, up, down))
        self.down = cupy.asarray(np.concatenate(downs).astype(np.float32))
        self._coder_tables(bands)
        self._importance(parts, bands, firsts)

    def _coder_tables(self, bands: list[UniformBands]) -> None:
        base = np.concatenate([b.base for b in bands]).astype(np.int64)
        self.steps = 2.0 ** (base / 4)
        most = max(len(b._ids) for b in bands)
        self.lowest = -int(base.max(initial=0))
        self.highest = most - 1 - int(base.min(initial=0))
        levels = range(self.lowest, self.highest + 1)
        ids = np.zeros((len(levels) * self.components + 4) * CLASSES, np.uint8)
        shaped = ids[: len(levels) * self.components * CLASSES].reshape(
            len(levels), self.components, CLASSES
        )
        for i, level in enumerate(levels):
            shaped[i] = np.concatenate([b.ids(level) for b in bands], axis=1).T
        self.ids = cupy.asarray(ids)
        frequencies = [b.families.frequencies for b in bands]
        found = [tables.decode_tables(f) for f in frequencies]
        counts = [[len(f) for f in frequencies], [len(symbols) for _, symbols in found]]
        begins = np.concatenate([np.zeros((2, 1), np.int64), np.cumsum(counts, axis=1)], axis=1)
        self.families = cupy.asarray(begins.astype(np.int32))
        self.buckets = cupy.asarray(np.concatenate([buckets for buckets, _ in found]))
        self.symbols = cupy.asarray(np.concatenate([symbols for _, symbols in found]))
        self.codes = cupy.asarray(tables.encode_entries(np.concatenate(frequencies)))
        self.decode_shared = 4 * max(256 * f + s for f, s in zip(*counts, strict=True))
        self.encode_shared = 1024 * max(counts[0])
        self.bits = cupy.asarray(np.concatenate([b.families.bits for b in bands]))

    def _importance(self, parts: Any, bands: list[UniformBands], firsts: list[int]) -> None:
        fields = np.zeros((len(parts), 6), np.int32)
        groups = np.zeros((len(parts), 8), np.int32)
        scale = np.zeros(max(self.components, 1), np.float32)
        weights: list[np.ndarray[Any, Any]] = []
        at = 0
        for i, part in enumerate(parts):
            predictor = part.uniform.importance
            fields[i] = firsts[i], self.coded[i], -1, 0, 0, 0
            if predictor is None:
                continue
            read = min(self.coded[i], len(predictor.scale))
            edges = importance.group_edges(len(predictor.scale))
            features = len(predictor.centre)
            leading = (features - len(edges) + 1) // 2
            fields[i] = firsts[i], self.coded[i], read, leading, len(edges) - 1, at
            groups[i, : len(edges)] = edges
            own = slice(firsts[i], firsts[i] + read)
            scale[own] = predictor.scale[:read] * self.steps[own]
            weights += [
                predictor.weights[-1:], predictor.weights[:-1], predictor.centre, predictor.spread,
            ]  # fmt: skip
            at += 1 + 3 * features
        self.fields, self.groups = cupy.asarray(fields), cupy.asarray(groups)
        self.scale = cupy.asarray(scale)
        self.weights = cupy.asarray(np.concatenate([*weights, np.zeros(1, np.float32)]))
        self.per_class = -4 * importance.ALPHA / np.log(2)

    def check_encodable(self) -> None:
        """Raise ``UnsupportedError`` where the encoder's predictor would lack components."""
        if not self.leading:
            raise UnsupportedError(
                "the CUDA backend encodes plans whose coded components come first, this plan has "
                "bands without bits before them: use backend='cpu'"
            )


def _part(
    part: Part,
    first: int,
    analysis: np.ndarray[Any, Any],
    synthesis: np.ndarray[Any, Any],
    up: float,
    down: float,
) -> DevicePart:
    return DevicePart(
        part.k_layers,
        part.v_layers,
        part.width,
        first,
        len(analysis),
        cupy.asarray(part.mean),
        _half(analysis),
        _half(synthesis),
        up,
        down,
    )


def _down(deviations: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Powers of two, 1 at most, that bring a deviation to ``_USUAL`` at most."""
    return np.exp2(-np.ceil(np.log2(np.maximum(deviations / _USUAL, 1))))


def _power_of_two(x: float) -> float:
    return float(np.exp2(np.round(np.log2(x)))) if x > 0 else 1.0


def _half(x: np.ndarray[Any, Any]) -> Any:
    return cupy.asarray(np.ascontiguousarray(x, np.float16))
