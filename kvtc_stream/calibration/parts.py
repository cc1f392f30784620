"""What calibration learnt of a section: bases, each a tuple of parts with what quantisers need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.band_tables import ErrorTables
from kvtc_stream.calibration.components import Components
from kvtc_stream.calibration.families import FamilyTables
from kvtc_stream.calibration.importance import TokenImportance
from kvtc_stream.errors import FormatError, UnsupportedError
from kvtc_stream.formats import Geometry, ModelIdentity, SectionPlan

#: Values of a kind that are kept.
_KEPT = 8


@dataclass(frozen=True, eq=False)
class UniformTables:
    """What the uniform quantiser of a part needs.

    Attributes
    ----------
    unit
        The step of base step 0 and class 0, the same in all parts of a section.
    families
        Frequency tables, and costs of every base step.
    k_errors, v_errors
        float32 [steps]: mean over sampled tokens of ‖x̂−x‖/‖x‖ of the part's K, and of its V, when
        every component is coded with a base step; 0 where the part has none.
    importance
        Predicts the step class of a token; without it all are of the middle one.
    """

    unit: float
    families: FamilyTables
    k_errors: NDArray[np.float32]
    v_errors: NDArray[np.float32]
    importance: TokenImportance | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """Columns of a section's row that share one orthonormal matrix.

    Attributes
    ----------
    k_layers, v_layers
        Indices into the section's layers. A row of the part is the K of ``k_layers``, each
        [kv_heads, k_dim], followed by the V of ``v_layers``.
    mean
        float32 [width].
    components
        float16, [rank, width]: the leading principal directions, strongest first. Orthonormal; of
        weighted rows, where there are weights.
    spectrum
        float32 [rank]: variance along each.
    energy
        Mean squared norm of a row, mean included: what a relative error is relative to.
    errors
        What bands with a scale per token would lose; ``None`` in a basis not made for them.
    uniform
        What the uniform quantiser needs; ``None`` in a basis not made for it.
    k_weights, v_weights
        float32 [layers, kv_heads, dim, dim] for ``k_layers`` and ``v_layers``, or ``None``: the
        symmetric matrices that a row less its mean is multiplied by before the components.
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
        """Whether channels count differently: then errors of coefficients are not those of rows."""
        return self.k_weights is not None

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.components.width

    @property
    def rank(self) -> int:
        """Components kept."""
        return self.components.rank

    def transforms(
        self, put: Callable[[NDArray[Any]], Any] = lambda x: x, xp: Any = None
    ) -> tuple[Components, Components]:
        """Analysis and synthesis, float32, of the array module ``xp``, which ``put`` gives arrays.

        A row less its mean projected by the analysis gives coefficients; these expanded by the
        synthesis give the row less its mean. Without weights they are the same.
        """
        components = self.components.mapped(lambda x: put(x).astype(np.float32), xp)
        if self.k_weights is None or self.v_weights is None:
            return components, components
        weights = (self.k_weights, self.v_weights)
        return (
            components.weighted(weights, inverse=False),
            components.weighted(weights, inverse=True),
        )


@dataclass(frozen=True, eq=False)
class SectionCalibration:
    """One section: named bases, each a tuple of parts."""

    bases: Mapping[str, tuple[Part, ...]]
    tokens: int

    def basis(self, name: str) -> tuple[Part, ...]:
        """The parts of a basis, or ``UnsupportedError`` when calibration did not make it."""
        try:
            return self.bases[name]
        except KeyError:
            raise UnsupportedError(
                f"the calibration has no basis {name!r}, only {', '.join(sorted(self.bases))}: "
                f"choose a preset that uses one of these, or calibrate again"
            ) from None

    def parts(self, plan: SectionPlan) -> tuple[Part, ...]:
        """The parts that a plan deals with, or ``FormatError`` when it was made for others."""
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
    """The bases of every section, and what is made of them once. Immutable; safe across threads."""

    geometry: Geometry
    sections: tuple[SectionCalibration, ...]
    sinks: int
    model: ModelIdentity = field(default_factory=ModelIdentity)
    _memo: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def memo(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """A value derived from these bases, made once: a plan, its arrays on a device.

        Of each kind, the first entry of ``key``, those used last are kept: plans come with streams,
        of which somebody may send any number.
        """
        with self._lock:
            value = self._memo.pop(key) if key in self._memo else make()
            self._memo[key] = value
            alike = [k for k in self._memo if k[0] == key[0]]
            for old in alike[:-_KEPT]:
                del self._memo[old]
            return value

    def transforms(
        self, section: int, basis: str, part: int, count: int
    ) -> tuple[Components, Components]:
        """See :meth:`Part.transforms`: of at least ``count`` components, made once."""
        key = (f"transforms of {basis} {section}.{part}",)
        with self._lock:
            if key not in self._memo or self._memo[key][0].rank < count:
                stored = self.sections[section].basis(basis)[part]
                some = replace(stored, components=stored.components.first(count))
                self._memo[key] = some.transforms()
            return self._memo[key]  # type: ignore[no-any-return]
