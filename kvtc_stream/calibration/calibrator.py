"""Calibration: collects moments and a sample of token vectors, then solves for the bases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.arrays import Array, HostArrays, get_arrays
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.moments import BATCH, SectionMoments, basis_columns
from kvtc_stream.calibration.principal import (
    in_full,
    joint_rank,
    local_rank,
)
from kvtc_stream.calibration.weights import (
    Pair,
    SectionWeights,
    importance_matrices,
    scaling_matrices,
)
from kvtc_stream.coding.values import scale_grid
from kvtc_stream.errors import warn
from kvtc_stream.formats import Geometry, ModelIdentity, Section
from kvtc_stream.io.dlpack import BackendName, check_positions
from kvtc_stream.progress import Progress

#: Element types that bases are stored in.
BasisDType: TypeAlias = Literal["float16", "float8_e4m3"]
#: Tokens processed at a time, to bound the memory of an update.
CHUNK = 512


class Calibrator:
    """Learns the statistics of a model's KV cache from documents, in one pass.

    A token vector is the K and V of one token in all layers of a section.

    Memory: a float64 covariance matrix for each part of a basis (that of a joint basis serves
    separate ones too), ``sample_rows`` token vectors in float32, and a few thousand more while
    they are processed. :meth:`finish` needs about 12 bytes more for each value of the largest
    covariance matrix. With ``backend="cuda"`` this is memory of the device.

    Not thread-safe. To calibrate in parallel, use one calibrator per thread and :meth:`merge`.

    Parameters
    ----------
    geometry
        The cache. Sections whose ``rope`` is set take keys after RoPE.
    bases
        ``"separate"``: one basis for K and one for V, as published; for the preset ``paper``.
        ``"joint"``: one basis for both, with channels weighted by importance; for the preset
        ``default``.
    layer_groups
        Cut each section's layers into this many groups of neighbours with a basis each. The
        transform becomes cheaper, and streams larger. 1 is the published method.
    second_level
        Transform this many of the strongest coefficients of all groups of the joint basis once
        more, together. Streams are nearly as small as with one basis, for about half of its
        multiply-adds. A quarter to three eighths of the values of a token vector serve well. The
        groups then form one part, so layers of such a stream cannot be cut. 0: no second level.
    rank
        Keep at most this many components of each part (the paper keeps 10,000). ``None`` keeps

        - of a separate basis: all;
        - of a joint basis: two fifths of its columns, at least 3,072 and at most 4,608;
        - of a joint basis with a second level: three fifths, at least 3,072.

        Components beyond these are rarely worth their bits.
    basis_dtype
        What the bases are stored in. ``"float8_e4m3"`` makes the file little more than half as
        large. At equal error streams take about 1 % more bits at a ratio of 16, 0.3 % at 32 and
        0.1 % at 64. The first use of an encoder takes a little longer.
    sinks
        Tokens at positions below this are not learnt from (KVTC, arXiv 2511.01815, section 3).
    sample_rows
        Tokens that are kept to measure quantisation errors on.
    weights
        How much an error matters to the model, as a pair of arrays for K (before RoPE) and V of
        each section (the pair itself, if there is one section):

        - [layers, kv_heads]: weight of the squared error of a head;
        - [layers, kv_heads, head_dim]: weight of the squared error of each channel;
        - [layers, kv_heads, head_dim, head_dim]: quadratic form of the error, symmetric and
          positive semidefinite.

        Only proportions count, including those between K and V. ``None``: learnt from
        :meth:`update_gradients`; without gradients, all channels weigh the same.
    model
        Identity to record in the calibration, see :class:`ModelIdentity`.
    backend
        ``"cpu"``, ``"cuda"``, or ``"auto"``: CUDA where it can run. All backends can use the
        calibration. Moments agree to rounding. Each backend samples other tokens, because its hash
        differs; which ones does not depend on the order of documents, nor on :meth:`merge`. On a
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
        basis_dtype: BasisDType = "float16",
        sinks: int = 4,
        sample_rows: int = 4096,
        weights: SectionWeights | Sequence[SectionWeights] | None = None,
        model: ModelIdentity | None = None,
        backend: BackendName = "cpu",
    ) -> None:
        unknown = set(bases) - {"separate", "joint"}
        if unknown or not bases:
            raise ValueError(f"bases must be among 'separate' and 'joint', found {list(bases)}")
        for name, value, minimum in (
            ("layer_groups", layer_groups, 1),
            ("second_level", second_level, 0),
            ("rank", 1 if rank is None else rank, 1),
            ("sinks", sinks, 0),
            ("sample_rows", sample_rows, 1),
        ):
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, found {value}")
        if basis_dtype not in get_args(BasisDType):
            raise ValueError(
                f"basis_dtype must be one of {', '.join(get_args(BasisDType))}, found "
                f"{basis_dtype!r}"
            )
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
            "basis_dtype": basis_dtype,
            "sinks": sinks,
            "sample_rows": sample_rows,
            "model": model or ModelIdentity(),
        }
        self._check_size(geometry)
        self._weights = None
        if weights is not None:
            self._weights = importance_matrices(weights, geometry.sections)
        self._sections = [
            SectionMoments(
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
        """Raise ``ValueError`` now for what would not fit in :meth:`finish`."""
        options = self._options
        rank, groups, widest = options["rank"], options["layer_groups"], self._arrays.widest
        second = options["second_level"]
        covariances = largest = rows = 0
        for s in geometry.sections:
            kept = "joint" if "joint" in options["bases"] else "separate"
            widths = [c.width(s) for c in basis_columns(kept, s, 1 if second else groups)]
            covariances += sum(width * width for width in widths)
            if second:
                widths = [c.width(s) for c in basis_columns("joint", s, groups)]
            largest = max(largest, *(width * width for width in widths), 2 * second * second)
            rows += (s.k_width + s.v_width) * (3 * options["sample_rows"] + 4 * BATCH)
            for name in options["bases"]:
                for width in (c.width(s) for c in basis_columns(name, s, groups)):
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
        # Covariances in float64; float32 copies of the largest; rows in float32.
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
        """Learn from a document, or from a piece of one. Tokens with NaN or Inf are left out.

        Parameters
        ----------
        k, v
            As for :meth:`kvtc_stream.Encoder.encode`: [layers, kv_heads, tokens, head_dim]. With
            ``backend="cuda"``, in host memory or on the current device: CuPy arrays, or any with
            ``__dlpack__``.
        positions
            int64 [tokens], ascending. By default each call is a new document that starts at
            position 0; for later pieces of a document, give their positions.
        section
            Which section of the geometry.
        k_scale, v_scale
            For fp8 caches: a scalar, [layers] or [layers, kv_heads]; value = fp8 × scale.
        """
        moments = self._section(section)
        k_layers, v_layers, where = self._document(moments.section, k, v, positions)
        for rows in self._rows(moments.section, k_layers, v_layers, where, k_scale, v_scale):
            moments.add(*finite_rows(self._arrays, rows))
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
        """Learn from a document which errors matter to the model.

        Second moments of gradients over tokens become the weights of channels; with labels drawn
        from the model, they are the Fisher information. Norms of gradients teach which tokens
        matter. A few dozen documents suffice. Give documents to :meth:`update` as well: the
        covariances that bases are solved from come from there only.

        Parameters
        ----------
        k, v, positions, section, k_scale, v_scale
            As for :meth:`update`.
        grad_k, grad_v
            float32 or narrower, in the shapes of ``k`` and ``v``: gradients of a loss with respect
            to K *before* RoPE, and to V.

        Raises
        ------
        ValueError
            The calibrator was given ``weights``, or shapes do not fit.
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
            sound, of_sound = finite_rows(self._arrays, rows, gradients)
            moments.importance.add(sound, of_sound, spoilt=len(rows) - len(sound))
        self._arrays.settle()

    def _section(self, index: int) -> SectionMoments:
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
        """Yield token vectors [tokens, k_width + v_width], in chunks, without sinks."""
        grids = [
            None if scale is None else scale_grid(scale, name, len(s.layers), s.kv_heads)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        ]
        for start in range(int(np.searchsorted(where, self._options["sinks"])), len(where), CHUNK):
            stop = min(start + CHUNK, len(where))
            k, v = ([x[:, start:stop] for x in held] for held in (k_layers, v_layers))
            yield self._arrays.rows(s, (k, v), where[start:stop], grids)

    def merge(self, other: Calibrator) -> None:
        """Add what ``other`` learnt, as if this calibrator had seen its documents too.

        Compared with one pass, moments agree to rounding, and the same tokens are sampled.
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

        The calibrator stays usable: more documents, then another ``finish``, are fine.

        Raises
        ------
        ValueError
            A section has no tokens besides sinks.
        """
        steps = sum(len(m.parts) for m in self._sections)
        for complaint in dict.fromkeys(m.importance.complaint() for m in self._sections):
            if complaint:
                warn(complaint)
        given = self._weights or [m.importance.matrices() for m in self._sections]
        scaling: Sequence[Pair | None] = scaling_matrices(given) or [None] * len(given)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, steps)

        options = self._options
        eight_bits = options["basis_dtype"] != "float16"
        sections = tuple(
            m.solve(options["rank"], pair, advance, eight_bits=eight_bits)
            for m, pair in zip(self._sections, scaling, strict=True)
        )
        return Calibration(options["geometry"], sections, options["sinks"], options["model"])


def finite_rows(arrays: HostArrays, *of_tokens: Array) -> list[Array]:
    """The rows of each array [tokens, width] that are finite in all of them."""
    xp = arrays.xp
    sound = np.all([arrays.get(xp.isfinite(x).all(axis=1)) for x in of_tokens], axis=0)
    if sound.all():
        return list(of_tokens)
    rows = arrays.put(np.flatnonzero(sound))
    return [x[rows] for x in of_tokens]


def _same_weights(a: Sequence[Pair] | None, b: Sequence[Pair] | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(x, y) for x, y in zip(sum(a, ()), sum(b, ()), strict=True))
