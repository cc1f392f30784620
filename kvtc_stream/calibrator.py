"""Calibration: running moments and a bounded sample of rows, then bases and error tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.arrays import HOST, Array, HostArrays
from kvtc_stream.backend import BackendName, get_arrays
from kvtc_stream.calibration import Calibration, Part, SectionCalibration
from kvtc_stream.components import Components, columns_of_layers
from kvtc_stream.cpu.values import scale_grid
from kvtc_stream.errors import KVTCWarning
from kvtc_stream.formats import Geometry, ModelIdentity, Section
from kvtc_stream.interop import check_positions
from kvtc_stream.planning.tables import error_tables
from kvtc_stream.planning.uniform import uniform_tables, unit_of
from kvtc_stream.principal import (
    Moments,
    in_full,
    joint_rank,
    local_rank,
    one_level,
    separate,
    two_levels,
)
from kvtc_stream.weights import (
    Pair,
    SectionWeights,
    importance_matrices,
    scaling_matrices,
)

#: Called with work done and work in all, in any unit.
Progress = Callable[[int, int], None]

#: Tokens gathered at a time: bounds the memory of an update.
_CHUNK = 512
#: Rows per update of the moments: large enough for a fast matrix product.
_BATCH = 2048
#: Below this many tokens per column the trailing components are noise.
_TOKENS_PER_COLUMN = 2
#: Sampled rows that tables of bands are measured on.
_BAND_ROWS = 2048
#: Most rows with gradients that are kept, and about the most memory for them.
_GRADIENT_ROWS, _GRADIENT_BYTES = 16_384, 1 << 30
_BINARY16_MAX = 65504.0


class Calibrator:
    """Learns a model's cache from documents, in one pass.

    Memory: a float64 covariance per part of every basis (K and V of a joint one serve separate
    ones too), ``sample_rows`` rows in float32, and a few thousand rows in flight; :meth:`finish`
    takes about 12 bytes for each value of the widest covariance besides. With ``backend="cuda"``
    that is memory of the device. Not thread-safe; calibrate in parallel with one calibrator each
    and :meth:`merge`.

    Parameters
    ----------
    geometry
        The cache. Sections whose ``rope`` is set take keys after RoPE.
    bases
        ``"separate"`` (K and V apart, as published, for the preset ``paper``) and ``"joint"`` (one
        basis for both, of weighted rows, for the preset ``default``).
    layer_groups
        Cut each section's layers into this many runs with a basis each: a cheaper transform that
        needs more bits. 1 is the published method.
    second_level
        Transform so many of the groups' coefficients of the joint basis once more, the strongest,
        those of all groups together: nearly the bits of one basis for about half of its
        multiply-adds. A quarter to three eighths of a row's values serve well. The groups are one
        part then: layers of such a stream cannot be cut. 0: groups stay apart.
    rank
        Keep at most this many components of each part (the paper keeps 10,000). ``None``: all of
        a separate basis, of a joint one two fifths of its columns, but 3,072 to 4,608, or with a
        second level three fifths, but at least 3,072; those behind are rarely worth their bits.
    sinks
        Tokens at positions below this are left out (KVTC, arXiv 2511.01815, section 3).
    sample_rows
        Tokens kept to measure quantisation error on.
    weights
        How much an error matters to the model in each channel of each head: per section a pair
        for K (before RoPE) and V, of arrays [layers, kv_heads], [layers, kv_heads, head_dim] for
        squared errors of channels, or [layers, kv_heads, head_dim, head_dim] for quadratic forms:
        symmetric, positive semidefinite. Only proportions count, those between K and V too. One
        pair suffices for one section. ``None``: from :meth:`update_gradients`, else all alike.
    model
        Identity to record, see :class:`ModelIdentity`.
    backend
        ``"cpu"``, ``"cuda"``, or ``"auto"``: CUDA where it can run. The calibration serves all
        backends. Moments agree to rounding. The rows that are sampled are others on each, because
        each has its hash, but do not depend on the order of documents nor on :meth:`merge`. On a
        device, work goes to CuPy's current device and stream, and each call waits for it.

    Raises
    ------
    BackendUnavailableError
        ``"cuda"`` was asked for and cannot run here; the message says what is missing.
    ValueError
        Arguments are not as above, or the device has not enough memory for the covariances.

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
        bases: Sequence[str] = ("separate", "joint"),
        layer_groups: int = 1,
        second_level: int = 0,
        rank: int | None = None,
        sinks: int = 4,
        sample_rows: int = 4096,
        weights: SectionWeights | Sequence[SectionWeights] | None = None,
        model: ModelIdentity | None = None,
        backend: BackendName = "cpu",
    ) -> None:
        unknown = set(bases) - {"separate", "joint"}
        if unknown or not bases:
            raise ValueError(f"bases must be among 'separate' and 'joint', found {list(bases)}")
        for name, value, least in (
            ("layer_groups", layer_groups, 1),
            ("second_level", second_level, 0),
            ("rank", 1 if rank is None else rank, 1),
            ("sinks", sinks, 0),
            ("sample_rows", sample_rows, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        if second_level and (layer_groups == 1 or "joint" not in bases):
            raise ValueError(
                f"second_level={second_level} is of a joint basis in layer_groups of 2 or more, "
                f"found bases {list(bases)} and layer_groups={layer_groups}"
            )
        self._arrays = get_arrays(backend)
        self._options: dict[str, Any] = {
            "backend": self._arrays.name,
            "geometry": geometry,
            "bases": tuple(dict.fromkeys(bases)),
            "layer_groups": layer_groups,
            "second_level": second_level,
            "rank": rank,
            "sinks": sinks,
            "sample_rows": sample_rows,
            "model": model or ModelIdentity(),
        }
        self._check_size(geometry)
        self._weights = None
        if weights is not None:
            self._weights = importance_matrices(weights, geometry.sections)
        self._sections = [
            _SectionMoments(
                section,
                self._options["bases"],
                layer_groups,
                second_level,
                sample_rows,
                self._arrays,
            )
            for section in geometry.sections
        ]

    @property
    def backend(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self._arrays.name

    def _check_size(self, geometry: Geometry) -> None:
        """Raise ``ValueError`` now for what would not fit after all documents were read."""
        options = self._options
        rank, groups, widest = options["rank"], options["layer_groups"], self._arrays.widest
        second = options["second_level"]
        covariances = largest = rows = 0
        for s in geometry.sections:
            kept = "joint" if "joint" in options["bases"] else "separate"
            widths = [c.width(s) for c in _basis_columns(kept, s, 1 if second else groups)]
            covariances += sum(width * width for width in widths)
            if second:
                widths = [c.width(s) for c in _basis_columns("joint", s, groups)]
            largest = max(largest, *(width * width for width in widths), 2 * second * second)
            rows += (s.k_width + s.v_width) * (3 * options["sample_rows"] + 4 * _BATCH)
            for name in options["bases"]:
                for width in (c.width(s) for c in _basis_columns(name, s, groups)):
                    wanted = min(rank or (joint_rank(width) if name == "joint" else width), width)
                    if name == "joint" and second:
                        wanted = local_rank(width, rank)
                    if widest is not None and width > widest and in_full(width, wanted):
                        raise ValueError(
                            f"a {name} basis of {wanted} components for {width} columns needs all "
                            f"eigenvectors, for which this backend takes up to {widest} columns: "
                            f"choose rank={width // 2} or less, more layer_groups, or "
                            f"backend='cpu'"
                        )
        if widest is not None and second > widest:
            raise ValueError(
                f"second_level={second} needs all eigenvectors of so many columns, for which this "
                f"backend takes up to {widest}: choose that or less"
            )
        # In float64; with them copies of the largest, and rows, in float32.
        self._arrays.check_memory(8 * covariances + 12 * largest + 4 * rows)

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
            As for :meth:`kvtc_stream.Encoder.encode`: [layers, kv_heads, tokens, head_dim]. With
            ``backend="cuda"`` in host memory or on the current device: of CuPy, or of anything
            with ``__dlpack__``.
        positions
            int64 [tokens], rising. By default each call is a document of its own that starts at
            position 0; give the positions of later pieces.
        section
            Which section of the geometry.
        k_scale, v_scale
            For fp8 caches: a scalar, [layers] or [layers, kv_heads]; value = fp8 × scale.

        Tokens with NaN or Inf are left out.
        """
        moments = self._section(section)
        k_layers, v_layers, where = self._document(moments.section, k, v, positions)
        for rows in self._rows(moments.section, k_layers, v_layers, where, k_scale, v_scale):
            moments.add(*self._finite(rows))
        self._arrays.settle()

    def update_gradients(
        self,
        k: Any,
        v: Any,
        grad_k: Any,
        grad_v: Any,
        *,
        positions: Any = None,
        section: int = 0,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> None:
        """Learn from one document what matters to the model.

        The second moments of gradients over tokens are importance weights: with labels drawn from
        the model, the Fisher information. Norms of gradients teach which tokens matter. A few
        dozen documents suffice. The bases' moments are not touched: :meth:`update` takes those.

        Parameters
        ----------
        k, v, positions, section, k_scale, v_scale
            As for :meth:`update`.
        grad_k, grad_v
            float32 or narrower, of the shapes of ``k`` and ``v``: gradients of a loss with respect
            to K *before* RoPE, and V.

        Raises
        ------
        ValueError
            The calibrator was given ``weights``; or wrong shapes.
        """
        if self._weights is not None:
            raise ValueError("weights were given, gradients would be others: use one of them")
        moments = self._section(section)
        s = moments.section
        k_layers, v_layers, where = self._document(s, k, v, positions)
        grads = self._layers(s, grad_k, grad_v, "grad_k", "grad_v")
        if grads[0][0].shape[1] != len(where):
            raise ValueError(f"found {len(where)} tokens, gradients of {grads[0][0].shape[1]}")
        straight = replace(s, rope=())
        for rows, gradients in zip(
            self._rows(s, k_layers, v_layers, where, k_scale, v_scale),
            self._rows(straight, *grads, where, None, None),
            strict=True,
        ):
            moments.importance.add(*self._finite(rows, gradients))
        self._arrays.settle()

    def _finite(self, *arrays: Array) -> list[Array]:
        """Those rows of each that are finite in all of them."""
        xp = self._arrays.xp
        sound = np.all([self._arrays.get(xp.isfinite(x).all(axis=1)) for x in arrays], axis=0)
        if sound.all():
            return list(arrays)
        rows = self._arrays.put(np.flatnonzero(sound))
        return [x[rows] for x in arrays]

    def _section(self, index: int) -> _SectionMoments:
        if not 0 <= index < len(self._sections):
            raise ValueError(f"section must be from 0 to {len(self._sections) - 1}, found {index}")
        return self._sections[index]

    def _document(
        self, s: Section, k: Any, v: Any, positions: Any
    ) -> tuple[list[Array], list[Array], NDArray[np.int64]]:
        k_layers, v_layers = self._layers(s, k, v, "k", "v")
        return k_layers, v_layers, check_positions(positions, k_layers[0].shape[1], -1)

    def _layers(
        self, s: Section, k: Any, v: Any, k_name: str, v_name: str
    ) -> tuple[list[Array], list[Array]]:
        k_layers = self._arrays.layers(k, k_name, len(s.layers), s.kv_heads, s.k_dim)
        v_layers = self._arrays.layers(v, v_name, len(s.layers), s.kv_heads, s.v_dim)
        tokens = k_layers[0].shape[1], v_layers[0].shape[1]
        if tokens[0] != tokens[1]:
            raise ValueError(f"{k_name} has {tokens[0]} tokens, {v_name} has {tokens[1]}")
        return k_layers, v_layers

    def _rows(
        self,
        s: Section,
        k_layers: list[Array],
        v_layers: list[Array],
        where: NDArray[np.int64],
        k_scale: Any,
        v_scale: Any,
    ) -> Iterator[Array]:
        """Rows [tokens, k_width + v_width] of all tokens but sinks, a chunk at a time."""
        grids = [
            None if scale is None else scale_grid(scale, name, len(s.layers), s.kv_heads)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        ]
        for start in range(int(np.searchsorted(where, self._options["sinks"])), len(where), _CHUNK):
            stop = min(start + _CHUNK, len(where))
            k, v = ([x[:, start:stop] for x in held] for held in (k_layers, v_layers))
            yield self._arrays.rows(s, (k, v), where[start:stop], grids)

    def merge(self, other: Calibrator) -> None:
        """Take in what ``other`` learnt, as if this calibrator had seen its documents too.

        Moments agree with one pass to rounding; the row sample is the same.
        """
        if self._options != other._options:
            differing = [k for k, v in self._options.items() if other._options[k] != v]
            raise ValueError(f"calibrators differ in {', '.join(differing)}: cannot merge them")
        if not _same_weights(self._weights, other._weights):
            raise ValueError("calibrators differ in weights: cannot merge them")
        for mine, theirs in zip(self._sections, other._sections, strict=True):
            mine.merge(theirs)
        self._arrays.settle()

    def finish(self, progress: Progress | None = None) -> Calibration:
        """Solve for the bases and measure the error tables.

        The calibrator stays usable: more documents and another ``finish`` are fine.

        Raises
        ------
        ValueError
            A section saw no tokens but sinks.
        """
        steps = sum(len(m.parts) for m in self._sections)
        given = self._weights or [m.importance.matrices() for m in self._sections]
        scaling: Sequence[Pair | None] = scaling_matrices(given) or [None] * len(given)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, steps)

        rank = self._options["rank"]
        sections = tuple(
            m.solve(rank, pair, advance) for m, pair in zip(self._sections, scaling, strict=True)
        )
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

    def take(self, section: Section, rows: Array, xp: Any) -> Array:
        """The part's columns of section rows [tokens, k_width + v_width]."""
        k, v = section.kv_heads * section.k_dim, section.kv_heads * section.v_dim
        spans = [(i * k, (i + 1) * k) for i in self.k_layers]
        spans += [(section.k_width + i * v, section.k_width + (i + 1) * v) for i in self.v_layers]
        if all(a[1] == b[0] for a, b in pairwise(spans)):
            return rows[:, spans[0][0] : spans[-1][1]]
        return xp.concatenate([rows[:, a:b] for a, b in spans], axis=1)


def _basis_columns(name: str, section: Section, groups: int) -> Iterable[_Columns]:
    layers = [tuple(map(int, g)) for g in np.array_split(np.arange(len(section.layers)), groups)]
    layers = [g for g in layers if g]
    if name == "joint":
        return [_Columns(g, g) for g in layers]
    return [_Columns(g, ()) for g in layers] + [_Columns((), g) for g in layers]


class _SectionMoments:
    """What one section has learnt."""

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
            for columns in _basis_columns(
                name, section, of_joint if name == "joint" else layer_groups
            )
        ]
        # The moments of K and of V apart are blocks of those of both.
        kept = "joint" if "joint" in bases else "separate"
        self.moments = {
            columns: Moments(columns.width(section), arrays)
            for columns in _basis_columns(kept, section, of_joint)
        }
        self.sample = _RowSample(sample_rows, arrays)
        self.importance = _Importance(section, arrays)
        self._pending: list[Array] = []

    def add(self, rows: Array) -> None:
        if not len(rows):
            return
        self.sample.add(rows)
        self._pending.append(rows)
        if sum(map(len, self._pending)) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            xp = self._arrays.xp
            rows = xp.concatenate(self._pending)
            self._pending.clear()
            for columns, moments in self.moments.items():
                moments.add(columns.take(self.section, rows, xp))

    def merge(self, other: _SectionMoments) -> None:
        self._flush()
        other._flush()
        for columns, moments in self.moments.items():
            moments.merge(other.moments[columns])
        self.sample.merge(other.sample)
        self.importance.merge(other.importance)

    def _moments_of(self, columns: _Columns) -> Moments:
        if columns in self.moments:
            return self.moments[columns]
        for both, moments in self.moments.items():
            k, v = (
                own.width(self.section)
                for own in (_Columns(both.k_layers, ()), _Columns((), both.v_layers))
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

    def _column_groups(self, columns: _Columns) -> tuple[tuple[slice, ...], ...]:
        """Columns of each group of layers."""
        section = self.section
        groups = np.array_split(np.array(columns.k_layers), self._groups)
        layers = [len(group) for group in groups if len(group)]
        return columns_of_layers(
            layers, *(section.kv_heads * d for d in (section.k_dim, section.v_dim))
        )

    def solve(
        self, rank: int | None, scaling: Pair | None, advance: Callable[[], None]
    ) -> SectionCalibration:
        self._flush()
        tokens = next(iter(self.moments.values())).count
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
                part = _weighted_part(columns, moments, weights, *solved, arrays)
            else:
                part = _separate_part(columns, moments, rows[:_BAND_ROWS], rank, arrays)
                advance()
            bases.setdefault(name, []).append(part)
            arrays.settle()
        if "joint" in bases:
            unit = unit_of(bases["joint"])
            for i, part in enumerate(bases["joint"]):
                columns = _Columns(part.k_layers, part.v_layers)
                rows = columns.take(self.section, self.sample.rows, arrays.xp)
                pairs = self.importance.pairs(columns)
                split = _Columns(part.k_layers, ()).width(self.section)
                uniform = uniform_tables(part, rows, unit, split, pairs, arrays)
                bases["joint"][i] = replace(part, uniform=uniform)
                advance()
        return SectionCalibration({name: tuple(parts) for name, parts in bases.items()}, tokens)


def _separate_part(
    columns: _Columns, moments: Moments, sample: Array, rank: int | None, arrays: HostArrays
) -> Part:
    """Principal components from the covariance, and error tables from the sampled rows."""
    components, variance, total = separate(moments, rank, arrays)
    mean = moments.mean.astype(np.float32)
    coefficients = (sample - mean) @ components.T.astype(np.float32)
    return Part(
        columns.k_layers,
        columns.v_layers,
        arrays.get(mean),
        Components.dense(arrays.get(components)),
        variance.clip(0).astype(np.float32),
        total + float(moments.mean @ moments.mean),
        errors=error_tables(
            np.ascontiguousarray(arrays.get(coefficients)),
            dropped=max(total - float(variance.sum()), 0.0),
        ),
    )


def _weighted_part(
    columns: _Columns,
    moments: Moments,
    weights: Pair | None,
    components: Components,
    variance: NDArray[np.floating[Any]],
    arrays: HostArrays,
) -> Part:
    """A part of weighted rows; tables are still lacking."""
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


class _Importance:
    """Second moments of gradients per layer and head, and a sample of rows with gradients."""

    def __init__(self, section: Section, arrays: HostArrays) -> None:
        shape = (len(section.layers), section.kv_heads)
        self._section = section
        self._tokens = 0
        self._arrays = arrays
        self._k = arrays.xp.zeros((*shape, section.k_dim, section.k_dim))
        self._v = arrays.xp.zeros((*shape, section.v_dim, section.v_dim))
        bytes_per_row = 4 * (section.k_width + section.v_width)
        rows = min(_GRADIENT_ROWS, max(512, _GRADIENT_BYTES // bytes_per_row))
        self._sample = _RowSample(rows, arrays)

    def add(self, rows: Array, gradients: Array) -> None:
        xp = self._arrays.xp
        if not len(rows):
            return
        self._tokens += len(rows)
        for part, total in self._split(gradients):
            by_head = part.transpose(1, 2, 0, 3).astype(np.float64)
            total += by_head.swapaxes(2, 3) @ by_head
        # In half the memory: gradients are tiny, so each row has an exponent.
        _, exponents = xp.frexp(xp.abs(gradients).max(axis=1))
        scaled = xp.ldexp(gradients, -exponents[:, None])
        pairs = [rows.clip(-_BINARY16_MAX, _BINARY16_MAX), scaled, exponents[:, None]]
        self._sample.add(xp.concatenate([x.astype(np.float16) for x in pairs], axis=1))

    def _split(self, rows: Array) -> Iterator[tuple[Array, Array]]:
        split = self._section.k_width
        for part, total in ((rows[:, :split], self._k), (rows[:, split:], self._v)):
            yield part.reshape(len(rows), *total.shape[:3]), total

    def merge(self, other: _Importance) -> None:
        self._tokens += other._tokens
        self._k += other._k
        self._v += other._v
        self._sample.merge(other._sample)

    def matrices(self) -> Pair:
        """Of K and V, in host memory; per token, so that sections compare however many gradients
        each was given."""
        tokens = max(self._tokens, 1)
        return self._arrays.get(self._k) / tokens, self._arrays.get(self._v) / tokens

    def pairs(self, columns: _Columns) -> tuple[Array, Array] | None:
        """Rows and gradients [rows, width] of the columns; ``None`` without gradients."""
        sample, xp = self._sample.rows, self._arrays.xp
        if not len(sample):
            return None
        width = self._section.k_width + self._section.v_width
        rows, gradients = (
            columns.take(self._section, sample[:, first : first + width], xp).astype(np.float32)
            for first in (0, width)
        )
        return rows, xp.ldexp(gradients, sample[:, -1:].astype(np.int32))


def _same_weights(a: Sequence[Pair] | None, b: Sequence[Pair] | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(x, y) for x, y in zip(sum(a, ()), sum(b, ()), strict=True))


class _RowSample:
    """The ``capacity`` rows with the smallest hashes: the same set in whatever order they came."""

    def __init__(self, capacity: int, arrays: HostArrays = HOST) -> None:
        self.capacity = capacity
        self._arrays = arrays
        self.hashes: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self.rows: Array = arrays.xp.zeros((0, 0), np.float32)

    def add(self, rows: Array) -> None:
        self._take(self._arrays.hashes(rows), rows)

    def merge(self, other: _RowSample) -> None:
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
