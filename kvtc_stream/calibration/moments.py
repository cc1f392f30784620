"""What a section has learnt so far: moments, a sample of token vectors, and importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.arrays import HOST, Array, HostArrays
from kvtc_stream.calibration.band_tables import error_tables
from kvtc_stream.calibration.components import Components, columns_of_layers
from kvtc_stream.calibration.float8 import Float8Matrix
from kvtc_stream.calibration.parts import Part, SectionCalibration
from kvtc_stream.calibration.principal import Moments, one_level, separate, two_levels
from kvtc_stream.calibration.uniform_tables import uniform_tables, unit_of
from kvtc_stream.calibration.weights import Pair
from kvtc_stream.errors import warn
from kvtc_stream.formats import Section

#: Rows per update of the moments: large enough for a fast matrix product.
BATCH = 2048
#: With fewer tokens per column, the trailing components are noise.
_TOKENS_PER_COLUMN = 2
#: A layer whose variance is at most this fraction of its mean square holds one vector repeated.
_CONSTANT = 1e-6
#: Sampled rows that error tables of bands are measured on.
_BAND_ROWS = 2048
#: Maximum number of rows with gradients that are kept, and about the maximum memory for them.
_GRADIENT_ROWS, _GRADIENT_BYTES = 16_384, 1 << 30
_BINARY16_MAX = 65504.0


@dataclass(frozen=True)
class Columns:
    """The layers of a section whose K and V a part has."""

    k_layers: tuple[int, ...]
    v_layers: tuple[int, ...]

    def width(self, section: Section) -> int:
        """Number of columns of the part."""
        k, v = section.kv_heads * section.k_dim, section.kv_heads * section.v_dim
        return len(self.k_layers) * k + len(self.v_layers) * v

    def take(self, section: Section, rows: Array, xp: Any) -> Array:
        """The part's columns of token vectors [tokens, k_width + v_width]."""
        k, v = section.kv_heads * section.k_dim, section.kv_heads * section.v_dim
        spans = [(i * k, (i + 1) * k) for i in self.k_layers]
        spans += [(section.k_width + i * v, section.k_width + (i + 1) * v) for i in self.v_layers]
        if all(a[1] == b[0] for a, b in pairwise(spans)):
            return rows[:, spans[0][0] : spans[-1][1]]
        return xp.concatenate([rows[:, a:b] for a, b in spans], axis=1)


def basis_columns(name: str, section: Section, groups: int) -> Iterable[Columns]:
    """The columns of each part of a basis whose layers are cut into so many groups."""
    layers = [tuple(map(int, g)) for g in np.array_split(np.arange(len(section.layers)), groups)]
    layers = [g for g in layers if g]
    if name == "joint":
        return [Columns(g, g) for g in layers]
    return [Columns(g, ()) for g in layers] + [Columns((), g) for g in layers]


class SectionMoments:
    """What one section has learnt: moments per part, sampled rows, and importance."""

    def __init__(
        self,
        section: Section,
        bases: Sequence[str],
        layer_groups: int,
        second_level: int,
        sample_rows: int,
        arrays: HostArrays,
    ) -> None:
        self.section = section
        self._arrays = arrays
        self._groups, self._second_level = layer_groups, second_level
        of_joint = 1 if second_level else layer_groups
        self.parts = [
            (name, columns)
            for name in bases
            for columns in basis_columns(
                name, section, of_joint if name == "joint" else layer_groups
            )
        ]
        # The moments of K alone and of V alone are blocks of the moments of both.
        kept = "joint" if "joint" in bases else "separate"
        self.moments = {
            columns: Moments(columns.width(section), arrays)
            for columns in basis_columns(kept, section, of_joint)
        }
        self.sample = RowSample(sample_rows, arrays)
        self.importance = Importance(section, arrays)
        self._pending: list[Array] = []

    def add(self, rows: Array) -> None:
        if not len(rows):
            return
        self.sample.add(rows)
        self._pending.append(rows)
        if sum(map(len, self._pending)) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            xp = self._arrays.xp
            rows = xp.concatenate(self._pending)
            self._pending.clear()
            for columns, moments in self.moments.items():
                moments.add(columns.take(self.section, rows, xp))

    def merge(self, other: SectionMoments) -> None:
        self._flush()
        other._flush()
        for columns, moments in self.moments.items():
            moments.merge(other.moments[columns])
        self.sample.merge(other.sample)
        self.importance.merge(other.importance)

    def _moments_of(self, columns: Columns) -> Moments:
        """The moments of a part: its own, or a block of those of a joint part."""
        if columns in self.moments:
            return self.moments[columns]
        for both, moments in self.moments.items():
            k, v = (
                own.width(self.section)
                for own in (Columns(both.k_layers, ()), Columns((), both.v_layers))
            )
            for own, of, first, width in (
                (columns.k_layers, both.k_layers, 0, k),
                (columns.v_layers, both.v_layers, k, v),
            ):
                if own and {*own} <= {*of}:
                    each = width // len(of)
                    begin = first + of.index(own[0]) * each
                    return moments.block(slice(begin, begin + len(own) * each))
        raise AssertionError(columns)

    def _column_groups(self, columns: Columns) -> tuple[tuple[slice, ...], ...]:
        """Columns of each group of layers, for a basis in two levels."""
        section = self.section
        groups = np.array_split(np.array(columns.k_layers), self._groups)
        layers = [len(group) for group in groups if len(group)]
        return columns_of_layers(
            layers, *(section.kv_heads * d for d in (section.k_dim, section.v_dim))
        )

    def _constant_layers(self) -> list[str]:
        """Layers with hardly any variance, by the model's numbers, e.g. ``V of layers 0, 1``."""
        found: dict[str, list[int]] = {"K": [], "V": []}
        for columns, moments in self.moments.items():
            variance = self._arrays.get(moments.scatter.diagonal()) / moments.count
            energy = variance + self._arrays.get(moments.mean) ** 2
            at = 0
            for name, layers in (("K", columns.k_layers), ("V", columns.v_layers)):
                for layer in layers:
                    one = Columns((layer,), ()) if name == "K" else Columns((), (layer,))
                    own = slice(at, at := at + one.width(self.section))
                    if variance[own].sum() <= _CONSTANT * energy[own].sum():
                        found[name].append(self.section.layers[layer])
        return [
            f"{name} of layer{'s' * (len(layers) > 1)} {', '.join(map(str, sorted(layers)))}"
            for name, layers in found.items()
            if layers
        ]

    def solve(
        self,
        rank: int | None,
        scaling: Pair | None,
        advance: Callable[[], None],
        *,
        eight_bits: bool = False,
    ) -> SectionCalibration:
        """Solve for the bases and measure their tables; calls ``advance`` after each part."""
        self._flush()
        tokens = next(iter(self.moments.values())).count
        width = max(self.section.k_width, self.section.v_width)
        if tokens == 0:
            raise ValueError(
                "no tokens to calibrate on: tokens at sink positions and tokens with NaN or Inf "
                "do not count; give more text"
            )
        if tokens < _TOKENS_PER_COLUMN * width:
            warn(
                f"calibrated on {tokens} tokens for rows of {width} values: below "
                f"{_TOKENS_PER_COLUMN * width} tokens the basis fits noise and unseen text codes "
                f"worse; give more text"
            )
        elif constant := self._constant_layers():
            warn(
                f"calibrated on tokens that are all the same in {', '.join(constant)}: zeros, or "
                f"one token repeated, say nothing about other text, which will come back with "
                f"errors of its own size; give real text"
            )
        arrays = self._arrays
        bases: dict[str, list[Part]] = {}
        for name, columns in self.parts:
            moments = self._moments_of(columns)
            rows = columns.take(self.section, self.sample.rows, arrays.xp)
            if name == "joint":
                weights = None
                if scaling is not None:
                    k, v = scaling
                    weights = k[list(columns.k_layers)], v[list(columns.v_layers)]
                if self._second_level:
                    groups = self._column_groups(columns)
                    solved = two_levels(moments, weights, groups, self._second_level, rank, arrays)
                else:
                    solved = one_level(moments, weights, rank, arrays)
                components, variance = solved
                if eight_bits:
                    components = components.mapped(Float8Matrix.of)
                part = _weighted_part(columns, moments, weights, components, variance, arrays)
            else:
                sample = rows[:_BAND_ROWS]
                part = _separate_part(columns, moments, sample, rank, arrays, eight_bits)
                advance()
            bases.setdefault(name, []).append(part)
            arrays.settle()
        if "joint" in bases:
            unit = unit_of(bases["joint"])
            for i, part in enumerate(bases["joint"]):
                columns = Columns(part.k_layers, part.v_layers)
                rows = columns.take(self.section, self.sample.rows, arrays.xp)
                pairs = self.importance.pairs(columns)
                split = Columns(part.k_layers, ()).width(self.section)
                uniform = uniform_tables(part, rows, unit, split, pairs, arrays)
                bases["joint"][i] = replace(part, uniform=uniform)
                advance()
        return SectionCalibration({name: tuple(parts) for name, parts in bases.items()}, tokens)


def _separate_part(
    columns: Columns,
    moments: Moments,
    sample: Array,
    rank: int | None,
    arrays: HostArrays,
    eight_bits: bool,
) -> Part:
    """Principal components from the covariance, and error tables from the sampled rows."""
    found, variance, total = separate(moments, rank, arrays)
    components = Components.dense(arrays.get(found))
    if eight_bits:
        components = components.mapped(Float8Matrix.of)
    mean = moments.mean.astype(np.float32)
    part = Part(
        columns.k_layers,
        columns.v_layers,
        arrays.get(mean),
        components,
        variance.clip(0).astype(np.float32),
        total + float(moments.mean @ moments.mean),
    )
    analysis, _ = part.transforms(arrays.put, arrays.xp)
    coefficients = np.ascontiguousarray(arrays.get(analysis.project(sample - mean)))
    dropped = max(total - float(variance.sum()), 0.0)
    return replace(part, errors=error_tables(coefficients, dropped=dropped))


def _weighted_part(
    columns: Columns,
    moments: Moments,
    weights: Pair | None,
    components: Components,
    variance: NDArray[np.floating[Any]],
    arrays: HostArrays,
) -> Part:
    """A part of weighted rows, still without its tables."""
    total = float(arrays.xp.trace(moments.scatter)) / moments.count
    k_weights, v_weights = weights or (None, None)
    return Part(
        columns.k_layers,
        columns.v_layers,
        arrays.get(moments.mean.astype(np.float32)),
        components,
        variance.clip(0).astype(np.float32),
        total + float(moments.mean @ moments.mean),
        k_weights=k_weights,
        v_weights=v_weights,
    )


class Importance:
    """Second moments of gradients per layer and head, and a sample of rows with gradients."""

    def __init__(self, section: Section, arrays: HostArrays) -> None:
        shape = (len(section.layers), section.kv_heads)
        self._section = section
        self._tokens = self._spoilt = 0
        self._arrays = arrays
        self._k = arrays.xp.zeros((*shape, section.k_dim, section.k_dim))
        self._v = arrays.xp.zeros((*shape, section.v_dim, section.v_dim))
        bytes_per_row = 4 * (section.k_width + section.v_width)
        rows = min(_GRADIENT_ROWS, max(512, _GRADIENT_BYTES // bytes_per_row))
        self._sample = RowSample(rows, arrays)

    def add(self, rows: Array, gradients: Array, spoilt: int = 0) -> None:
        """Rows and their gradients; ``spoilt`` more were left out, as not finite."""
        xp = self._arrays.xp
        self._spoilt += spoilt
        if not len(rows):
            return
        self._tokens += len(rows)
        for part, total in self._split(gradients):
            by_head = part.transpose(1, 2, 0, 3).astype(np.float64)
            total += by_head.swapaxes(2, 3) @ by_head
        # Kept as float16, to halve the memory. Gradients are tiny: each row has its own exponent.
        _, exponents = xp.frexp(xp.abs(gradients).max(axis=1))
        scaled = xp.ldexp(gradients, -exponents[:, None])
        pairs = [rows.clip(-_BINARY16_MAX, _BINARY16_MAX), scaled, exponents[:, None]]
        self._sample.add(xp.concatenate([x.astype(np.float16) for x in pairs], axis=1))

    def _split(self, rows: Array) -> Iterator[tuple[Array, Array]]:
        """K and V of rows, [tokens, layers, kv_heads, dim], each with its sum of second moments."""
        split = self._section.k_width
        for part, total in ((rows[:, :split], self._k), (rows[:, split:], self._v)):
            yield part.reshape(len(rows), *total.shape[:3]), total

    def merge(self, other: Importance) -> None:
        self._tokens += other._tokens
        self._spoilt += other._spoilt
        self._k += other._k
        self._v += other._v
        self._sample.merge(other._sample)

    def complaint(self) -> str:
        """What to warn of: where most gradients are no numbers, the others may say little."""
        if self._spoilt <= self._tokens:
            return ""
        return (
            f"the gradients of {self._spoilt} of {self._spoilt + self._tokens} tokens have NaN or "
            f"Inf and are left out, so that importance is learnt from the others only: compute "
            f"them in float32 or bfloat16"
        )

    def matrices(self) -> Pair:
        """Mean second moments of gradients of K and of V, in host memory.

        A mean per token, so that sections with different numbers of gradients compare.
        """
        tokens = max(self._tokens, 1)
        return self._arrays.get(self._k) / tokens, self._arrays.get(self._v) / tokens

    def pairs(self, columns: Columns) -> tuple[Array, Array] | None:
        """Sampled rows and their gradients, both [rows, width]; ``None`` without gradients."""
        sample, xp = self._sample.rows, self._arrays.xp
        if not len(sample):
            return None
        width = self._section.k_width + self._section.v_width
        rows, gradients = (
            columns.take(self._section, sample[:, first : first + width], xp).astype(np.float32)
            for first in (0, width)
        )
        return rows, xp.ldexp(gradients, sample[:, -1:].astype(np.int32))


class RowSample:
    """The ``capacity`` rows with the smallest hashes: the same rows in whatever order they came."""

    def __init__(self, capacity: int, arrays: HostArrays = HOST) -> None:
        self.capacity = capacity
        self._arrays = arrays
        self.hashes: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self.rows: Array = arrays.xp.zeros((0, 0), np.float32)

    def add(self, rows: Array) -> None:
        self._take(self._arrays.hashes(rows), rows)

    def merge(self, other: RowSample) -> None:
        self._take(other.hashes, other.rows)

    def _take(self, hashes: NDArray[np.uint64], rows: Array) -> None:
        if len(self.hashes) == self.capacity:
            candidates = np.flatnonzero(hashes < self.hashes[-1])
            hashes, rows = hashes[candidates], rows[self._arrays.put(candidates)]
        if len(hashes) == 0:
            return
        if len(self.hashes):
            hashes = np.concatenate([self.hashes, hashes])
            rows = self._arrays.xp.concatenate([self.rows, rows])
        self.hashes, first = np.unique(hashes, return_index=True)
        self.hashes, first = self.hashes[: self.capacity], first[: self.capacity]
        self.rows = rows[self._arrays.put(first)]
