"""A plan and its calibration on the device, in the form that kernels need. Immutable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration import importance
from kvtc_stream.calibration.components import Components, refinement
from kvtc_stream.calibration.parts import CalibratedBases, Part
from kvtc_stream.coding.rans import CLASSES, Families
from kvtc_stream.coding.uniform import UniformBands
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import SectionPlan
from kvtc_stream.gpu.coder import tables
from kvtc_stream.gpu.coder.products import synthesise_leading
from kvtc_stream.gpu.kernels.bands import strips

#: Rows of binary16 are scaled so that so many deviations of the widest channel, at the step of
#: offset 0 and class 0, have this size. Binary16 ends at 65,504.
_DEVIATIONS, _SIZE = 64.0, 8192.0
#: Symbols' deviation, in class 0 at offset 0, up to which they are kept as they are.
_USUAL = 256.0


@dataclass(frozen=True, eq=False)
class Leaf:
    """Columns of a part that share a matrix: all, or those of a group of the first level.

    Attributes
    ----------
    part
        The part's index.
    k_layers, v_layers
        Indices into the section's layers.
    width
        Number of columns.
    first, count, leading
        Its rows of symbols, as :meth:`Basis.stacked` arranges them: ``count`` rows from ``first``.
        The first ``leading`` of them come from the second level.
    inner
        Index of its first coefficient that has no second level, among those of all parts, before
        :meth:`Basis.ordered`.
    mean
        float32 [width].
    analysis, synthesis
        Bits of binary16 [count, width]: the matrices that rows and symbols are multiplied by,
        times powers of two.
    analysis_scale, synthesis_scale
        Factors of the products.
    leading_scale
        Factor that brings leading coefficients into the range of binary16.
    """

    part: int
    k_layers: tuple[int, ...]
    v_layers: tuple[int, ...]
    width: int
    first: int
    count: int
    leading: int
    inner: int
    mean: Any
    analysis: Any
    synthesis: Any
    analysis_scale: float
    synthesis_scale: float
    leading_scale: float


@dataclass(frozen=True, eq=False)
class SecondLevel:
    """The second level of a part: a matrix for its leading coefficients.

    Attributes
    ----------
    leaves
        The leaves of the part, in order.
    first, count
        Its rows of the stacked symbols: ``count`` rows from ``first``.
    inner
        As for :class:`Leaf`.
    analysis, synthesis
        Bits of binary16 [count, leading of all leaves].
    analysis_scale
        Factor of the products.
    """

    leaves: tuple[Leaf, ...]
    first: int
    count: int
    inner: int
    analysis: Any
    synthesis: Any
    analysis_scale: float


class Basis:
    """The matrices of a section's plan, for any kind of bands.

    Attributes
    ----------
    parts
        For each part of the basis, the components that have a row of coefficients.
    components
        Number of components of all parts.
    leaves, seconds
        The matrices of the first and second level.
    rows
        Number of rows of the stacked symbols.
    places
        int64 [components] on the device: the row of each component.
    spans
        See :class:`kvtc_stream.gpu.coder.decoding.Spans`.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.parts = [range(b - a, b) for a, b in zip(counts, accumulate(counts), strict=True)]
        self.components = sum(counts)
        self.leaves: list[Leaf] = []
        self.seconds: list[SecondLevel] = []
        self.rows = 0
        self.spans: dict[tuple[int, ...], Any] = {}
        # The row of each component: of the stacked symbols, and of coefficients before
        # :meth:`ordered`.
        self._rows: list[NDArray[np.int64]] = []
        self._inner: list[NDArray[np.int64]] = []
        # Of each part: its components without matrices.
        self._structures: list[Components] = []

    def add(
        self,
        part: Part,
        analysis: Components,
        synthesis: Components,
        sizes: Sizes,
        k_size: int,
    ) -> None:
        """Append the next part of the basis.

        ``analysis`` and ``synthesis`` are the matrices of its coded components, float32, with the
        factors that these have on the device. ``k_size`` is the number of channels of a layer's K,
        ``kv_heads · k_dim``.
        """
        # Tensor cores read 16 bytes at a time.
        analysis, synthesis = analysis.aligned(8), synthesis.aligned(8)
        self._structures.append(replace(analysis, local=(), second=None))
        index = len(self._rows)
        first, inner = self.rows, self.parts[index].start
        begins = [inner + x for x in analysis.inner]
        two = analysis.order is not None
        leading_up = _power_of_two(sizes.leading)
        leaves = []
        layers = 0
        groups = zip(
            analysis.groups, analysis.local, synthesis.local, analysis.leading, sizes.rows,
            begins[1:], strict=False,
        )  # fmt: skip
        for spans, a, s, leading, size, begin in groups:
            k_layers, v_layers = part.k_layers, part.v_layers
            if two:
                count = (spans[0].stop - spans[0].start) // k_size
                k_layers = v_layers = part.k_layers[layers : layers + count]
                layers += count
            # A leaf at a time is rounded on the device: NumPy takes seconds for a large model.
            a, s = cupy.asarray(a), cupy.asarray(s)
            up, down = _power_of_two(_largest(a)), _power_of_two(size)
            s = s / np.float32(down)
            s[:leading] *= np.float32(leading_up)
            leaves.append(
                Leaf(
                    index,
                    k_layers,
                    v_layers,
                    a.shape[1],
                    self.rows,
                    len(a),
                    leading,
                    begin,
                    cupy.asarray(np.concatenate([part.mean[span] for span in spans])),
                    _half(a / np.float32(up)),
                    _half(s),
                    up,
                    down,
                    1 / sizes.leading_scale,
                )
            )
            self.rows += len(a)
        self.leaves += leaves
        order = np.arange(analysis.rank) if analysis.order is None else analysis.order
        places = [first + np.arange(len(analysis.local[0]))]
        if analysis.second is not None and synthesis.second is not None:
            a, s = cupy.asarray(analysis.second), cupy.asarray(synthesis.second)
            up = _power_of_two(_largest(a))
            self.seconds.append(
                SecondLevel(
                    tuple(leaves),
                    self.rows,
                    len(analysis.second),
                    inner,
                    _half(a / np.float32(up)),
                    _half(s / np.float32(leading_up)),
                    up * sizes.leading_scale,
                )
            )
            places = [self.rows + np.arange(len(analysis.second))]
            places += [leaf.first + np.arange(leaf.leading, leaf.count) for leaf in leaves]
            self.rows += len(analysis.second)
        self._rows.append(np.concatenate(places)[order])
        self._inner.append(inner + order.astype(np.int64))

    @property
    def refinements(self) -> Sequence[tuple[int, Any]]:
        """Of parts that need one, the first component, and float32 [strong, components of the part]
        on the device: see :func:`kvtc_stream.calibration.components.refinement`."""
        return ()

    def finish(self) -> None:
        """Make what depends on all parts; call it after the last :meth:`add`."""
        self.places, self._from_inner = (
            cupy.asarray(np.concatenate([np.zeros(0, np.int64), *x]))
            for x in (self._rows, self._inner)
        )

    def stacked(self, symbols: Any) -> Any:
        """Arrange symbols [components, stride] as the leaves' products read them.

        Bits of binary16; ``stride`` must be a multiple of 64. Returns [rows, stride], in which the
        leading coefficients are computed from the second level. Without one, the symbols as given.
        """
        if not self.seconds:
            return symbols
        stride = symbols.shape[1]
        stack = cupy.empty((self.rows, stride), np.uint16)
        if any(second.count == 0 for second in self.seconds):
            stack[...] = 0  # no product writes leading coefficients
        # Sixteen bytes at a time.
        stack.view(np.complex128)[self.places] = symbols.view(np.complex128)
        for second in self.seconds:
            column = 0
            for leaf in second.leaves:
                columns = slice(column, column + leaf.leading)
                synthesise_leading(
                    stack.data.ptr + 2 * second.first * stride,
                    stride,
                    second.synthesis,
                    columns,
                    stack.data.ptr + 2 * leaf.first * stride,
                )
                column = columns.stop
        return stack

    def ordered(self, coefficients: Any) -> Any:
        """Put coefficients, float32 [components, stride], from the products' order in the
        components'; ``stride`` must be a multiple of 64."""
        if not self.seconds:
            return coefficients
        # Sixteen bytes at a time.
        return coefficients.view(np.complex128)[self._from_inner].view(np.float32)


@dataclass(frozen=True)
class Sizes:
    """How large intermediate values become, relative to the range of binary16.

    Attributes
    ----------
    rows
        Size of each leaf's rows when decoding.
    leading
        Size of the leading coefficients when decoding.
    leading_scale
        Factor of leading coefficients when encoding, a power of two.
    """

    rows: list[float]
    leading: float = 0.0
    leading_scale: float = 1.0


class BandPlan(Basis):
    """A section's plan with bands that have a scale and a shift per token.

    Attributes
    ----------
    bands
        The bands of each part.
    whole, cut
        Tables of strips: whole bands, and pieces of them, see
        :func:`kvtc_stream.gpu.kernels.bands.strips`.
    fields
        int32 [parts, 2]: first component, and components.
    """

    def __init__(self, calibration: CalibratedBases, section: int, plan: SectionPlan) -> None:
        stored = calibration.sections[section].parts(plan)
        self.bands = [part.bands for part in plan.parts]
        counts = [part.components for part in plan.parts]
        super().__init__(counts)
        for i, (part, count) in enumerate(zip(stored, counts, strict=True)):
            analysis, synthesis = (
                Components.dense(x.first(count).matrix())
                for x in _transforms(calibration, section, plan.basis, i, count)
            )
            # Coefficients are 1 at most on the device; so are rows, but for their number's root.
            _, [deviations] = synthesis.deviations(np.ones(count, np.float32))
            self.add(part, analysis, synthesis, Sizes([float(deviations.max(initial=0))]), 0)
        self.finish()
        firsts = [own.start for own in self.parts]
        self.whole = cupy.asarray(strips(self.bands, None))
        self.cut = cupy.asarray(strips(self.bands))
        self.fields = cupy.asarray(np.array([firsts, counts], np.int32).T.copy())


class DevicePlan(Basis):
    """A section's plan with uniform bands.

    Attributes
    ----------
    coded
        Number of coded components of each part.
    unit
        The step size at base step 0, step class 0 and offset 0.
    ids, families, buckets, symbols, codes, bits
        Tables of the coder, see :mod:`kvtc_stream.gpu.kernels.rans`; ``codes`` are the encoder's
        entries.
    down
        float32 [components]: powers of two that symbols are multiplied by on the device, so that
        those of the strongest components fit into binary16.
    decode_shared, encode_shared
        Bytes of shared memory for the tables.
    lowest, highest
        Range of levels that ``ids`` has rows for; other levels use the first or the last row.
    fields, scale, weights, groups, per_class
        The predictor of importance, see :func:`kvtc_stream.gpu.kernels.uniform.classify`.
    """

    #: See :func:`kvtc_stream.gpu.coder.decoding.tile_tasks`.
    tile_tasks: Any = None

    @cached_property
    def rooms(self) -> dict[bytes, Any]:
        """See :meth:`kvtc_stream.gpu.coder.encoding.BatchEncoder._room`."""
        return {}

    def __init__(self, calibration: CalibratedBases, section: int, plan: SectionPlan) -> None:
        parts = calibration.sections[section].parts(plan)
        bands = []
        for part, dealt in zip(parts, plan.parts, strict=True):
            assert part.uniform is not None
            families = part.uniform.families
            coder = Families(families.frequencies)
            bands.append(UniformBands(dealt.bands, coder, families.ids))
            self.unit = part.uniform.unit
        self.coded = [len(b.components) for b in bands]
        super().__init__(self.coded)
        self.leading = all((b.components == np.arange(len(b.components))).all() for b in bands)
        shape = calibration.geometry.sections[section]
        downs: list[Any] = []
        self._strong: list[int] = []
        for i, (part, dealt, own) in enumerate(zip(parts, plan.parts, bands, strict=True)):
            analysis, synthesis = (
                x.taken(own.components)
                for x in _transforms(calibration, section, plan.basis, i, dealt.components)
            )
            variance = part.spectrum[own.components]
            leading, rows = (
                [float(d.max(initial=0)) * (_DEVIATIONS / _SIZE) for d in found]
                for found in synthesis.deviations(variance)
            )
            # Coefficients on the device are without the factors of base steps.
            factors = np.exp2(own.base / np.float32(4))
            downs.append(_down(np.sqrt(variance) / (factors * self.unit)))
            self._strong.append(part.strong(own))
            sizes = Sizes(
                [max(d, 1e-30) / self.unit for d in rows],
                max(leading, default=0) / self.unit,
                _power_of_two(max(leading, default=0)),
            )
            self.add(
                part,
                analysis.scaled(1 / factors),
                synthesis.scaled(factors / downs[-1]),
                sizes,
                shape.kv_heads * shape.k_dim,
            )
        self.finish()
        firsts = [own.start for own in self.parts]
        self.down = cupy.asarray(np.concatenate(downs).astype(np.float32))
        self._coder_tables(bands)
        self._importance(parts, bands, firsts)

    @cached_property
    def refinements(self) -> Sequence[tuple[int, Any]]:
        """See :class:`Basis`; of the matrices as they are on the device. For encoders only."""
        found = []
        for i, (own, strong) in enumerate(zip(self.parts, self._strong, strict=True)):
            if strong:
                down = cupy.asnumpy(self.down[own.start : own.stop])
                analysis, synthesis = self._on_device(i)
                missing = refinement(analysis, synthesis.scaled(down), strong)
                found.append((own.start, cupy.asarray(missing)))
        return found

    def _on_device(self, part: int) -> tuple[Components, Components]:
        """Analysis and synthesis of a part as the device has them, float32 in host memory."""

        def values(matrix: Any, scale: float) -> NDArray[np.float32]:
            found: NDArray[np.float32] = cupy.asnumpy(matrix).astype(np.float32)
            return found * np.float32(scale)

        leaves = [leaf for leaf in self.leaves if leaf.part == part]
        seconds = [x for x in self.seconds if x.leaves[0].part == part]
        analysis, synthesis = (
            replace(
                self._structures[part],
                local=tuple(local),
                second=next(iter(second), None),
            )
            for local, second in (
                (
                    [values(x.analysis, x.analysis_scale) for x in leaves],
                    [
                        values(x.analysis, x.analysis_scale * leaves[0].leading_scale)
                        for x in seconds
                    ],
                ),
                (
                    [values(x.synthesis, x.synthesis_scale) for x in leaves],
                    [values(x.synthesis, 1) for x in seconds],
                ),
            )
        )
        return analysis, synthesis

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
        """Raise ``UnsupportedError`` if the predictor of importance needs components not coded."""
        if not self.leading:
            raise UnsupportedError(
                "the CUDA backend encodes plans whose coded components come first, this plan has "
                "bands without bits before them: use backend='cpu'"
            )


def _transforms(
    calibration: CalibratedBases, section: int, basis: str, part: int, count: int
) -> Iterable[Components]:
    """Analysis and synthesis, in host memory. Of components in 8 bits they are made on the device:
    that takes products as large as calibrating does."""
    stored = calibration.sections[section].basis(basis)[part]
    if not stored.eight_bits:
        return calibration.transforms(section, basis, part, count)
    return [x.mapped(cupy.asnumpy) for x in stored.transforms(cupy.asarray, cupy, count)]


def _down(deviations: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Powers of two, at most 1, that bring a deviation to at most ``_USUAL``."""
    return np.exp2(-np.ceil(np.log2(np.maximum(deviations / _USUAL, 1))))


def _power_of_two(x: float) -> float:
    return float(np.exp2(np.round(np.log2(x)))) if x > 0 else 1.0


def _largest(x: Any) -> float:
    return float(abs(x).max()) if x.size else 0.0


def _half(x: Any) -> Any:
    return cupy.ascontiguousarray(x.astype(np.float16))
