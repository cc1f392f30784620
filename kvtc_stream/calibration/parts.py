"""What calibration learnt about a section: its bases, and the tables that quantisers need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.band_tables import ErrorTables
from kvtc_stream.calibration.components import Components, refinement
from kvtc_stream.calibration.families import FamilyTables
from kvtc_stream.calibration.float8 import Float8Matrix, dual
from kvtc_stream.calibration.importance import TokenImportance
from kvtc_stream.coding.uniform import UniformBands
from kvtc_stream.errors import FormatError, UnsupportedError
from kvtc_stream.formats import Geometry, ModelIdentity, SectionPlan

#: How many derived values of each kind are kept.
_KEPT = 8
#: A component is strong if so small a part of its deviation, which is about what the rounding of
#: the basis may put into another one, is more than so much of the finest step; and the most of
#: them, as each costs time.
_ROUNDING, _OF_A_STEP, _MOST_STRONG = 2.0**-11, 0.5, 512


@dataclass(frozen=True, eq=False)
class UniformTables:
    """The tables of a part's uniform quantiser.

    Attributes
    ----------
    unit
        The step size at base step 0 and step class 0, the same in all parts of a section.
    families
        Frequency tables, and the costs at every base step.
    k_errors, v_errors
        float32 [steps]: the relative error ‖x̂−x‖/‖x‖ of the part's K, and of its V, when every
        component is coded at a base step; mean over sampled tokens. 0 if the part has no K, or V.
    importance
        Predicts the step class of each token; without it, all tokens have the middle class.
    """

    unit: float
    families: FamilyTables
    k_errors: NDArray[np.float32]
    v_errors: NDArray[np.float32]
    importance: TokenImportance | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """Columns of a section's token vectors that are transformed together.

    Attributes
    ----------
    k_layers, v_layers
        Indices into the section's layers. The part's token vector has the K of ``k_layers``, each
        [kv_heads, k_dim], followed by the V of ``v_layers``.
    mean
        float32 [width].
    components
        [rank, width]: the leading principal directions, strongest first; orthonormal but for
        rounding. With weights, those of weighted token vectors. Its matrices are float16, or all
        :class:`Float8Matrix`.
    spectrum
        float32 [rank]: variance along each component.
    energy
        Mean squared norm of a token vector (mean included), which errors are divided by.
    errors
        Errors of bands with a scale per token; ``None`` in a basis that is not coded so.
    uniform
        Tables of the uniform quantiser; ``None`` in a basis that is not coded so.
    k_weights, v_weights
        float32 [layers, kv_heads, dim, dim] for ``k_layers`` and ``v_layers``, or ``None``: the
        symmetric matrices that a token vector less the mean is multiplied by first.
    """

    k_layers: tuple[int, ...]
    v_layers: tuple[int, ...]
    mean: NDArray[np.float32]
    components: Components
    spectrum: NDArray[np.float32]
    energy: float
    errors: ErrorTables | None = None
    uniform: UniformTables | None = None
    k_weights: NDArray[np.float32] | None = None
    v_weights: NDArray[np.float32] | None = None

    @property
    def weighted(self) -> bool:
        """Whether channels have weights; errors of coefficients then are not those of values."""
        return self.k_weights is not None

    @property
    def width(self) -> int:
        """Values of a token vector."""
        return self.components.width

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.components.rank

    @property
    def eight_bits(self) -> bool:
        """Whether the components are in 8 bits."""
        return isinstance(self.components.local[0], Float8Matrix)

    def strong(self, bands: UniformBands) -> int:
        """How many leading components of ``bands`` are so much larger than their steps that
        coefficients need a :func:`refinement`: else what comes from a stream would move each time
        that it is stored again."""
        if self.uniform is None or not len(bands.base):
            return 0
        finest = self.uniform.unit * 2.0 ** (int(bands.base.min()) / 4)
        deviations = np.sqrt(self.spectrum[bands.components])
        count = np.count_nonzero(_ROUNDING * deviations > _OF_A_STEP * finest)
        return min(int(count), _MOST_STRONG)

    def transforms(
        self,
        put: Callable[[NDArray[Any]], Any] = lambda x: x,
        xp: Any = None,
        count: int | None = None,
    ) -> Transforms:
        """Analysis and synthesis of the first ``count`` components, or of all.

        ``put`` copies a NumPy array to the array module ``xp``.
        """
        return Transforms(self, put, xp, self.rank if count is None else count)


class Transforms:
    """What projects a token vector less the mean to coefficients, and what expands these again.

    Both are float32, and are made when they are first asked for. With components in 16 bits and
    without weights, they are the same.
    """

    def __init__(self, part: Part, put: Callable[[NDArray[Any]], Any], xp: Any, count: int) -> None:
        self._part, self._put, self._xp, self.count = part, put, xp, count

    def __iter__(self) -> Iterator[Components]:
        return iter((self.analysis, self.synthesis))

    @cached_property
    def synthesis(self) -> Components:
        """Coefficients times this are a token vector less the mean."""
        return self._weighted(self._stored().first(self.count), inverse=True)

    @cached_property
    def analysis(self) -> Components:
        """A token vector less the mean, times this transposed, is coefficients."""
        if self._part.eight_bits:
            # All components have a part in each one's dual.
            dual_ones = self._stored().mapped(dual, self._xp)
            return self._weighted(dual_ones.first(self.count), inverse=False)
        if not self._part.weighted:
            return self.synthesis
        return self._weighted(self._stored(), inverse=False)

    def _stored(self) -> Components:
        """The components, in float32: all of them in 8 bits, else those that are wanted."""
        if self._part.eight_bits:
            return self._part.components.mapped(lambda x: x.values(self._put), self._xp)
        some = self._part.components.first(self.count)
        return some.mapped(lambda x: self._put(x).astype(np.float32), self._xp)

    def _weighted(self, components: Components, *, inverse: bool) -> Components:
        if self._part.k_weights is None or self._part.v_weights is None:
            return components
        weights = self._part.k_weights, self._part.v_weights
        return components.weighted(weights, inverse=inverse)


@dataclass(frozen=True, eq=False)
class SectionCalibration:
    """Calibration of one section.

    Attributes
    ----------
    bases
        By name, each a tuple of parts.
    tokens
        How many it learnt from.
    heads
        Of a part of the model's KV heads: the first one, and how many the model has. ``None`` for
        all of them.
    """

    bases: Mapping[str, tuple[Part, ...]]
    tokens: int
    heads: tuple[int, int] | None = None

    def basis(self, name: str) -> tuple[Part, ...]:
        """The parts of a basis; ``UnsupportedError`` if the calibration has no such basis."""
        try:
            return self.bases[name]
        except KeyError:
            raise UnsupportedError(
                f"the calibration has no basis {name!r}, only {', '.join(sorted(self.bases))}: "
                f"choose a preset that uses one of these, or calibrate again"
            ) from None

    def parts(self, plan: SectionPlan) -> tuple[Part, ...]:
        """The parts that a plan describes; ``FormatError`` if the plan is for other parts."""
        parts = self.basis(plan.basis)
        layers = [(p.k_layers, p.v_layers) for p in parts]
        if layers != [(p.k_layers, p.v_layers) for p in plan.parts] or any(
            part.rank < dealt.components for part, dealt in zip(parts, plan.parts, strict=True)
        ):
            raise FormatError(
                f"the plan does not fit the calibration's basis {plan.basis!r}: its layers or "
                f"components are others; make a plan from this calibration"
            )
        return parts


@dataclass(frozen=True, eq=False)
class CalibratedBases:
    """The bases of every section, and values derived from them. Immutable; safe across threads."""

    geometry: Geometry
    sections: tuple[SectionCalibration, ...]
    sinks: int
    model: ModelIdentity = field(default_factory=ModelIdentity)
    _memo: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def memo(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A value derived from these bases and cached: a plan, or its arrays on a device.

        The first entry of ``key`` is the kind of value. Only the most recently used values of each
        kind are kept, because plans come with streams, whose number has no limit.
        """
        with self._lock:
            if key in self._memo:
                value = self._memo[key] = self._memo.pop(key)
                return value
            value = self._memo[key] = make()
            alike = [k for k in self._memo if k[0] == key[0]]
            for old in alike[:-_KEPT]:
                del self._memo[old]
            return value

    def transforms(self, section: int, basis: str, part: int, count: int) -> Transforms:
        """Cached :meth:`Part.transforms` with at least the first ``count`` components."""
        key = (f"transforms of {basis} {section}.{part}",)
        with self._lock:
            if key not in self._memo or self._memo[key].count < count:
                stored = self.sections[section].basis(basis)[part]
                self._memo[key] = stored.transforms(count=count)
            return self._memo[key]  # type: ignore[no-any-return]

    def refinement(
        self, section: int, basis: str, part: int, count: int, strong: int
    ) -> NDArray[np.float32]:
        """Cached :func:`refinement` of the first ``count`` components, in host memory."""
        both = self.transforms(section, basis, part, count)
        key = (f"refinement of {basis} {section}.{part}", count, strong)
        return self.memo(  # type: ignore[no-any-return]
            key, lambda: refinement(both.analysis.first(count), both.synthesis, strong)
        )
