"""Calibration: running moments and a bounded sample of rows, then bases and error tables."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtc_stream.calibration import Calibration, Part, SectionCalibration
from kvtc_stream.cpu.layout import Rotations, gather
from kvtc_stream.cpu.values import scale_grid, to_float32
from kvtc_stream.errors import KVTCWarning
from kvtc_stream.formats import Geometry, ModelIdentity, Section
from kvtc_stream.interop import check_positions, layer_list
from kvtc_stream.planning.tables import error_tables

#: Called with work done and work in all, in any unit.
Progress = Callable[[int, int], None]

#: Tokens gathered at a time: bounds the memory of an update.
_CHUNK = 512
#: Rows per update of the moments: large enough for a fast matrix product.
_BATCH = 2048
#: Below this many tokens per column the trailing components are noise.
_TOKENS_PER_COLUMN = 2


class Calibrator:
    """Learns a model's cache from documents, in one pass.

    Memory: a float64 covariance per part of every basis, ``sample_rows`` rows in float32, and a
    few thousand rows in flight. Not thread-safe; calibrate in parallel with one calibrator each
    and :meth:`merge`.

    Parameters
    ----------
    geometry
        The cache. Sections whose ``rope`` is set take keys after RoPE.
    bases
        ``"separate"`` (K and V apart, as published) and ``"joint"`` (one basis for both).
    layer_groups
        Cut each section's layers into this many runs with a basis each: a cheaper transform that
        needs more bits. 1 is the published method.
    rank
        Keep at most this many components of each part (the paper keeps 10,000). ``None``: all.
    sinks
        Tokens at positions below this are left out (KVTC, arXiv 2511.01815, section 3).
    sample_rows
        Tokens kept to measure quantisation error on.
    model
        Identity to record, see :class:`ModelIdentity`.

    Examples
    --------
    >>> import numpy as np, kvtc_stream as kvtc
    >>> geometry = kvtc.Geometry.uniform(layers=2, kv_heads=1, head_dim=4)
    >>> calibrator = kvtc.Calibrator(geometry)
    >>> rng = np.random.default_rng(0)
    >>> for _ in range(4):
    ...     k, v = rng.standard_normal((2, 2, 1, 64, 4), dtype=np.float32)
    ...     calibrator.update(k, v)
    >>> calibrator.finish().tokens
    240
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        bases: Sequence[str] = ("separate",),
        layer_groups: int = 1,
        rank: int | None = None,
        sinks: int = 4,
        sample_rows: int = 2048,
        model: ModelIdentity | None = None,
    ) -> None:
        unknown = set(bases) - {"separate", "joint"}
        if unknown or not bases:
            raise ValueError(f"bases must be among 'separate' and 'joint', found {list(bases)}")
        for name, value, least in (
            ("layer_groups", layer_groups, 1),
            ("rank", 1 if rank is None else rank, 1),
            ("sinks", sinks, 0),
            ("sample_rows", sample_rows, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        self._options: dict[str, Any] = {
            "geometry": geometry,
            "bases": tuple(dict.fromkeys(bases)),
            "layer_groups": layer_groups,
            "rank": rank,
            "sinks": sinks,
            "sample_rows": sample_rows,
            "model": model or ModelIdentity(),
        }
        self._sections = [
            _SectionMoments(section, self._options["bases"], layer_groups, sample_rows)
            for section in geometry.sections
        ]

    def update(
        self,
        k: Any,
        v: Any,
        *,
        positions: Any = None,
        section: int = 0,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> None:
        """Learn from one document, or a piece of one.

        Parameters
        ----------
        k, v
            As for :meth:`kvtc_stream.Encoder.encode`: [layers, kv_heads, tokens, head_dim].
        positions
            int64 [tokens], rising. By default each call is a document of its own that starts at
            position 0; give the positions of later pieces.
        section
            Which section of the geometry.
        k_scale, v_scale
            For fp8 caches: a scalar, [layers] or [layers, kv_heads]; value = fp8 × scale.

        Tokens with NaN or Inf are left out.
        """
        if not 0 <= section < len(self._sections):
            raise ValueError(
                f"section must be from 0 to {len(self._sections) - 1}, found {section}"
            )
        moments = self._sections[section]
        s = moments.section
        k_layers, _ = layer_list(k, "k", len(s.layers), s.kv_heads, s.k_dim)
        v_layers, _ = layer_list(v, "v", len(s.layers), s.kv_heads, s.v_dim)
        tokens = k_layers[0].shape[1]
        if v_layers[0].shape[1] != tokens:
            raise ValueError(f"k has {tokens} tokens, v has {v_layers[0].shape[1]}")
        where = check_positions(positions, tokens, -1)
        first = int(np.searchsorted(where, self._options["sinks"]))
        grids = [
            None if scale is None else scale_grid(scale, name, len(s.layers), s.kv_heads)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        ]
        for start in range(first, tokens, _CHUNK):
            stop = min(start + _CHUNK, tokens)
            k_rows, v_rows = (
                to_float32(np.stack([x[:, start:stop] for x in layers]), grid)
                for layers, grid in zip((k_layers, v_layers), grids, strict=True)
            )
            moments.add(k_rows, v_rows, where[start:stop])

    def merge(self, other: Calibrator) -> None:
        """Take in what ``other`` learnt, as if this calibrator had seen its documents too.

        Moments agree with one pass to rounding; the row sample is the same.
        """
        if self._options != other._options:
            differing = [k for k, v in self._options.items() if other._options[k] != v]
            raise ValueError(f"calibrators differ in {', '.join(differing)}: cannot merge them")
        for mine, theirs in zip(self._sections, other._sections, strict=True):
            mine.merge(theirs)

    def finish(self, progress: Progress | None = None) -> Calibration:
        """Solve for the bases and measure the error tables.

        The calibrator stays usable: more documents and another ``finish`` are fine.

        Raises
        ------
        ValueError
            A section saw no tokens but sinks.
        """
        steps = sum(len(m.parts) for m in self._sections)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, steps)

        sections = tuple(m.solve(self._options["rank"], advance) for m in self._sections)
        options = self._options
        return Calibration(options["geometry"], sections, options["sinks"], options["model"])


@dataclass(frozen=True)
class _Columns:
    """Which layers a part takes from a section."""

    k_layers: tuple[int, ...]
    v_layers: tuple[int, ...]

    def width(self, section: Section) -> int:
        """Columns of the part."""
        k, v = section.kv_heads * section.k_dim, section.kv_heads * section.v_dim
        return len(self.k_layers) * k + len(self.v_layers) * v

    def take(self, section: Section, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The part's columns of section rows [tokens, k_width + v_width]."""
        k, v = section.kv_heads * section.k_dim, section.kv_heads * section.v_dim
        spans = [(i * k, (i + 1) * k) for i in self.k_layers]
        spans += [(section.k_width + i * v, section.k_width + (i + 1) * v) for i in self.v_layers]
        if all(a[1] == b[0] for a, b in pairwise(spans)):
            return rows[:, spans[0][0] : spans[-1][1]]
        return np.concatenate([rows[:, a:b] for a, b in spans], axis=1)


def _basis_columns(name: str, section: Section, groups: int) -> Iterable[_Columns]:
    layers = [tuple(map(int, g)) for g in np.array_split(np.arange(len(section.layers)), groups)]
    layers = [g for g in layers if g]
    if name == "joint":
        return [_Columns(g, g) for g in layers]
    return [_Columns(g, ()) for g in layers] + [_Columns((), g) for g in layers]


class _SectionMoments:
    """What one section has learnt."""

    def __init__(
        self, section: Section, bases: Sequence[str], layer_groups: int, sample_rows: int
    ) -> None:
        self.section = section
        self.parts = {
            (name, columns): _Moments(columns.width(section))
            for name in bases
            for columns in _basis_columns(name, section, layer_groups)
        }
        self.sample = _RowSample(sample_rows)
        self._pending: list[NDArray[np.float32]] = []

    def add(
        self, k: NDArray[np.float32], v: NDArray[np.float32], positions: NDArray[np.int64]
    ) -> None:
        section = self.section
        rows = np.empty((k.shape[2], section.k_width + section.v_width), np.float32)
        layers = np.arange(len(section.layers))
        gather(k, layers, Rotations.of(section, positions, inverse=True), rows)
        gather(v, layers, Rotations.none(len(layers)), rows[:, section.k_width :])
        rows = rows[np.isfinite(rows).all(axis=1)]
        self.sample.add(rows)
        self._pending.append(rows)
        if sum(map(len, self._pending)) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            rows = np.concatenate(self._pending)
            self._pending.clear()
            for (_, columns), moments in self.parts.items():
                moments.add(columns.take(self.section, rows))

    def merge(self, other: _SectionMoments) -> None:
        self._flush()
        other._flush()
        for key, moments in self.parts.items():
            moments.merge(other.parts[key])
        self.sample.merge(other.sample)

    def solve(self, rank: int | None, advance: Callable[[], None]) -> SectionCalibration:
        self._flush()
        bases: dict[str, list[Part]] = {}
        tokens = next(iter(self.parts.values())).count
        width = max(self.section.k_width, self.section.v_width)
        if tokens == 0:
            raise ValueError(
                "no tokens to calibrate on: tokens at sink positions and tokens with NaN or Inf "
                "do not count; give more text"
            )
        if tokens < _TOKENS_PER_COLUMN * width:
            warnings.warn(
                f"calibrated on {tokens} tokens for rows of {width} values: below "
                f"{_TOKENS_PER_COLUMN * width} tokens the basis fits noise and unseen text codes "
                f"worse; give more text",
                KVTCWarning,
                stacklevel=3,
            )
        for (name, columns), moments in self.parts.items():
            rows = columns.take(self.section, self.sample.rows)
            bases.setdefault(name, []).append(_solve(columns, moments, rows, rank))
            advance()
        return SectionCalibration({name: tuple(parts) for name, parts in bases.items()}, tokens)


def _solve(
    columns: _Columns, moments: _Moments, sample: NDArray[np.float32], rank: int | None
) -> Part:
    """Principal components from the covariance, and error tables from the sampled rows."""
    covariance = moments.scatter / moments.count
    variance, vectors = np.linalg.eigh(covariance)
    del covariance
    variance, vectors = variance[::-1], vectors[:, ::-1]
    # Directions that calibration never saw have no variance but rounding noise.
    floor = variance[0] * len(variance) * np.finfo(np.float64).eps
    keep = max(1, min(int((variance > floor).sum()), rank or len(variance)))
    components = vectors[:, :keep].T
    # An eigenvector's sign is arbitrary: fix it, so that merged calibrations compare.
    strongest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(keep), strongest])[:, None]
    stored = np.ascontiguousarray(components, np.float16)
    mean = moments.mean.astype(np.float32)
    coefficients = (sample - mean) @ stored.T.astype(np.float32)
    total = max(float(variance.sum()), 0.0)
    return Part(
        columns.k_layers,
        columns.v_layers,
        mean,
        stored,
        variance[:keep].clip(0).astype(np.float32),
        total + float(moments.mean @ moments.mean),
        error_tables(
            np.ascontiguousarray(coefficients),
            dropped=max(total - float(variance[:keep].sum()), 0.0),
        ),
    )


class _Moments:
    """Count, mean and scatter matrix about the mean, in float64.

    A batch is centred on its own mean, so that a binary32 product suffices, and combined by the
    pairwise update of Chan, Golub and LeVeque (1979), whose rank-1 term rides along as a row.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))

    def add(self, rows: NDArray[np.float32]) -> None:
        count, width = rows.shape
        if count == 0:
            return
        mean = rows.mean(axis=0, dtype=np.float64)
        # Where it costs little, the product too is float64.
        centred = np.empty((count + 1, width), np.float64 if width <= _CHUNK else np.float32)
        np.subtract(rows, mean.astype(centred.dtype), out=centred[:-1])
        centred[-1] = self._combine(count, mean)
        self.scatter += centred.T @ centred

    def merge(self, other: _Moments) -> None:
        if other.count == 0:
            return
        self.scatter += other.scatter
        delta = self._combine(other.count, other.mean)
        for i, row in enumerate(self.scatter):
            row += delta[i] * delta

    def _combine(self, count: int, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take in a count and mean; return the vector whose outer product the scatter lacks."""
        total = self.count + count
        delta = mean - self.mean
        weight = math.sqrt(self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total
        return delta * weight


class _RowSample:
    """The ``capacity`` rows with the smallest hashes: the same set in whatever order they came."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hashes: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self.rows: NDArray[np.float32] = np.zeros((0, 0), np.float32)

    def add(self, rows: NDArray[np.float32]) -> None:
        hashes = np.array([xxhash.xxh3_64_intdigest(row) for row in rows], np.uint64)
        self._take(hashes, rows)

    def merge(self, other: _RowSample) -> None:
        self._take(other.hashes, other.rows)

    def _take(self, hashes: NDArray[np.uint64], rows: NDArray[np.float32]) -> None:
        if len(self.hashes) == self.capacity:
            candidates = hashes < self.hashes[-1]
            hashes, rows = hashes[candidates], rows[candidates]
        if len(hashes) == 0:
            return
        if len(self.hashes):
            hashes = np.concatenate([self.hashes, hashes])
            rows = np.concatenate([self.rows, rows])
        self.hashes, first = np.unique(hashes, return_index=True)
        self.hashes, first = self.hashes[: self.capacity], first[: self.capacity]
        self.rows = rows[first]
