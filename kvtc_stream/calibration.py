"""The calibration artefact: what was learnt about a model's cache, once for all presets and ratios.

A file is safetensors: arrays, and a JSON description in the metadata. Its identity is a SHA-256
over both (SPEC, "Calibration file"); streams name it, and readers refuse any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.components import Components, columns_of_layers
from kvtc_stream.cpu.rans import CLASSES, Families
from kvtc_stream.errors import ChecksumError, FormatError, UnsupportedError, VersionError
from kvtc_stream.formats import Geometry, ModelIdentity, Plan, Rope, Section, SectionPlan
from kvtc_stream.importance import TokenImportance
from kvtc_stream.planning.families import FamilyTables
from kvtc_stream.planning.tables import BAND_SIZES, BAND_TYPES, ErrorTables
from kvtc_stream.storage import atomic_write

#: Versions of the calibration file's layout: without components in two levels, and with.
CALIBRATION_VERSIONS = (3, 4)
_METADATA_KEY = "kvtc_calibration"
#: Views of some layers that are kept.
_VIEWS = 8
_DIGEST_KEY = "sha256"


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
class Calibration:
    """Everything a codec needs to know about a model's cache. Immutable; safe across threads."""

    geometry: Geometry
    sections: tuple[SectionCalibration, ...]
    sinks: int
    model: ModelIdentity = field(default_factory=ModelIdentity)
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content, 32 bytes."""
        return self.cached("digest", self._digest)  # type: ignore[no-any-return]

    @property
    def tokens(self) -> int:
        """Tokens that the first section learnt from."""
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

    def cached(self, key: Any, make: Any, *, most: int | None = None) -> Any:
        """A value derived from this calibration, made once (plans, binary32 bases).

        ``most``: only so many, those used last, are kept of tuples that begin like ``key``; for
        what depends on streams, of which somebody may send any number.
        """
        with self._lock:
            value = self._cache.pop(key) if key in self._cache else make()
            self._cache[key] = value
            if most is not None:
                alike = [k for k in self._cache if isinstance(k, tuple) and k[:1] == key[:1]]
                for old in alike[:-most]:
                    del self._cache[old]
            return value

    def of_layers(self, geometry: Geometry, plan: Plan) -> Calibration:
        """What a stream that holds some of the layers needs; itself where it holds all.

        Sections have the layers of ``geometry``, and the parts of the bases that ``plan`` uses, in
        its order. It is the same calibration to those who ask for its digest.

        Raises
        ------
        FormatError
            There is no part for one of the plan.
        """
        mine = [section.layers for section in self.geometry.sections]
        if [section.layers for section in geometry.sections] == mine:
            orders = [
                [[(p.k_layers, p.v_layers) for p in x] for x in (s.bases.get(d.basis, ()), d.parts)]
                for s, d in zip(self.sections, plan.sections, strict=True)
            ]
            # Other parts are found out by SectionCalibration.parts.
            if not any(a != b and sorted(a) == sorted(b) for a, b in orders):
                return self
        key = ("layers", plan.digest, tuple(section.layers for section in geometry.sections))
        found = self.cached(key, lambda: self._of_layers(geometry, plan), most=_VIEWS)
        return found  # type: ignore[no-any-return]

    def _of_layers(self, geometry: Geometry, plan: Plan) -> Calibration:
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
        some = Calibration(Geometry(tuple(shapes)), tuple(sections), self.sinks, self.model)
        some._cache["digest"] = self.digest
        return some

    def transforms(
        self, section: int, basis: str, part: int, count: int
    ) -> tuple[Components, Components]:
        """See :meth:`Part.transforms`: of at least ``count`` components, made once."""
        key = ("transforms", section, basis, part)
        with self._lock:
            if key not in self._cache or self._cache[key][0].rank < count:
                stored = self.sections[section].basis(basis)[part]
                some = replace(stored, components=stored.components.first(count))
                self._cache[key] = some.transforms()
            return self._cache[key]  # type: ignore[no-any-return]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.numpy import save

        metadata = {_METADATA_KEY: self._description(), _DIGEST_KEY: self.digest.hex()}
        arrays = {name: np.ascontiguousarray(a) for name, a in self._arrays()}
        with atomic_write(path) as file:
            file.write(save(arrays, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that :meth:`save` wrote, and check its digest.

        Raises
        ------
        FormatError
            Not a calibration file; :class:`VersionError` or :class:`ChecksumError` if it is one
            of another version, or was changed.
        """
        from safetensors import SafetensorError, safe_open

        name = os.fspath(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"no calibration file at {name}")
        try:
            with safe_open(name, framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, TypeError, AttributeError) as error:
            raise FormatError(f"{name} is not a readable safetensors file: {error}") from None
        if _METADATA_KEY not in metadata:
            raise FormatError(
                f"{name} is a safetensors file but not a calibration (its metadata lacks "
                f"{_METADATA_KEY!r}): make one with `kvtc calibrate`"
            )
        try:
            calibration = _parse(json.loads(metadata[_METADATA_KEY]), arrays)
        except VersionError:
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            RecursionError,
        ) as error:
            raise FormatError(f"{name}: malformed calibration: {error!r}") from None
        found, expected = calibration.digest.hex(), metadata.get(_DIGEST_KEY)
        if found != expected:
            raise ChecksumError(
                f"{name}: content has SHA-256 {found}, expected {expected}: the file was changed "
                f"after it was written; fetch or make it again"
            )
        return calibration

    @property
    def _two_levels(self) -> bool:
        parts = [p for s in self.sections for basis in s.bases.values() for p in basis]
        return any(part.components.second is not None for part in parts)

    def _description(self) -> str:
        """Canonical JSON: everything but the arrays."""
        return json.dumps(
            {
                "version": CALIBRATION_VERSIONS[self._two_levels],
                "sinks": self.sinks,
                "model": {**asdict(self.model), "fingerprint": self.model.fingerprint.hex()},
                "sections": [
                    {
                        **asdict(section),
                        "tokens": calibrated.tokens,
                        "bases": {
                            name: [
                                {
                                    "k_layers": part.k_layers,
                                    "v_layers": part.v_layers,
                                    "energy": part.energy,
                                    "weighted": part.weighted,
                                    **_levels(section, part.components),
                                    "errors": part.errors
                                    and {
                                        "dropped": part.errors.dropped,
                                        "rows": part.errors.rows,
                                    },
                                    "uniform": part.uniform
                                    and {
                                        "unit": part.uniform.unit,
                                        "importance": part.uniform.importance is not None,
                                    },
                                }
                                for part in parts
                            ]
                            for name, parts in calibrated.bases.items()
                        },
                    }
                    for section, calibrated in zip(
                        self.geometry.sections, self.sections, strict=True
                    )
                ],
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    def _arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for i, section in enumerate(self.sections):
            for name, parts in section.bases.items():
                for j, part in enumerate(parts):
                    prefix = f"{i}.{name}.{j}."
                    yield prefix + "mean", part.mean
                    for array, value in _component_arrays(part.components).items():
                        yield prefix + array, value
                    yield prefix + "spectrum", part.spectrum
                    if part.errors is not None:
                        yield prefix + "errors", part.errors.errors
                        yield prefix + "drop_errors", part.errors.energy
                    if part.uniform is not None:
                        for array, value in _uniform_arrays(part.uniform).items():
                            yield f"{prefix}uniform.{array}", value
                    if part.k_weights is not None and part.v_weights is not None:
                        yield prefix + "k_weights", part.k_weights
                        yield prefix + "v_weights", part.v_weights

    def _digest(self) -> bytes:
        digest = hashlib.sha256(self._description().encode())
        for name, array in sorted(self._arrays()):
            little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            digest.update(f"\n{name} {array.dtype.name} {list(array.shape)}\n".encode())
            digest.update(little_endian.data)
        return digest.digest()


def _parse(description: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Calibration:
    if description["version"] not in CALIBRATION_VERSIONS:
        known = " or ".join(map(str, CALIBRATION_VERSIONS))
        raise VersionError(
            f"calibration file of version {description['version']}, expected {known}: use the "
            f"package version that wrote it, or calibrate again"
        )
    geometry, sections = [], []
    for i, entry in enumerate(description["sections"]):
        section = Section(
            layers=_layers(entry["layers"]),
            kv_heads=_count(entry["kv_heads"]),
            k_dim=_count(entry["k_dim"]),
            v_dim=_count(entry["v_dim"]),
            rope=tuple(None if rope is None else _parse_rope(rope) for rope in entry["rope"]),
        )
        bases = {
            name: tuple(
                _parse_part(section, part, arrays, f"{i}.{name}.{j}.")
                for j, part in enumerate(parts)
            )
            for name, parts in entry["bases"].items()
        }
        geometry.append(section)
        sections.append(SectionCalibration(bases, _count(entry["tokens"])))
    if arrays:
        raise FormatError(f"unexpected arrays {sorted(arrays)}")
    model = description["model"]
    return Calibration(
        Geometry(tuple(geometry)),
        tuple(sections),
        _count(description["sinks"]),
        ModelIdentity(model["name"], model["revision"], bytes.fromhex(model["fingerprint"])),
    )


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise FormatError(f"expected a number from 0, found {value!r}")
    return value


def _energy(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise FormatError(f"expected a finite energy from 0, found {value!r}")
    return float(value)


def _layers(values: list[Any]) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


def _parse_rope(entry: dict[str, Any]) -> Rope:
    if type(entry["interleaved"]) is not bool:
        raise FormatError(f"interleaved must be true or false, found {entry['interleaved']!r}")
    return Rope(tuple(entry["inv_freq"]), entry["interleaved"], entry["scale"])


def _parse_part(
    section: Section, entry: dict[str, Any], arrays: dict[str, NDArray[Any]], prefix: str
) -> Part:
    k_layers, v_layers = _layers(entry["k_layers"]), _layers(entry["v_layers"])
    count = len(section.layers)
    for layers in (k_layers, v_layers):
        if list(layers) != sorted(set(layers)) or not all(i < count for i in layers):
            raise FormatError(f"{prefix}: layers {layers} of a section of {count}")
    width = section.kv_heads * (len(k_layers) * section.k_dim + len(v_layers) * section.v_dim)
    rank = arrays[prefix + "spectrum"].shape[0]

    def take(
        name: str,
        dtype: type[np.generic],
        *shape: int | None,
        least: float = -np.inf,
        finite: bool = True,
    ) -> NDArray[Any]:
        array = arrays.pop(prefix + name)
        # None stands for any number.
        expected = [n if m is None else m for n, m in zip(array.shape, shape, strict=False)]
        if array.dtype != dtype or list(array.shape) != expected or array.ndim != len(shape):
            raise FormatError(
                f"{prefix}{name}: found {array.dtype} {array.shape}, expected "
                f"{np.dtype(dtype)} {shape}"
            )
        # Extremes are NaN where anything is.
        if not array.min() >= least or (
            finite and not np.isfinite([array.min(), array.max()]).all()
        ):
            raise FormatError(f"{prefix}{name} has values that no calibration makes")
        array.setflags(write=False)
        return array

    if "levels" not in entry:
        components = Components.dense(take("components", np.float16, rank, width))
    elif k_layers == v_layers:
        components = _parse_components(section, entry["levels"], len(k_layers), rank, take)
    else:
        raise FormatError(f"{prefix}: two levels of K of {k_layers} and V of {v_layers}")
    errors = uniform = None
    if entry["errors"] is not None:
        errors = ErrorTables(
            errors=take(
                "errors", np.float32, rank, len(BAND_SIZES), len(BAND_TYPES), least=0, finite=False
            ),
            energy=take("drop_errors", np.float64, rank, least=0),
            dropped=_energy(entry["errors"]["dropped"]),
            rows=_count(entry["errors"]["rows"]),
        )
    if entry["uniform"] is not None:
        uniform = _parse_uniform(entry["uniform"], arrays, prefix + "uniform.", rank, take)
    if type(entry["weighted"]) is not bool:
        raise FormatError(f"weighted must be true or false, found {entry['weighted']!r}")
    weights = {}
    if entry["weighted"]:
        for name, layers, dim in (
            ("k_weights", k_layers, section.k_dim),
            ("v_weights", v_layers, section.v_dim),
        ):
            weights[name] = take(name, np.float32, len(layers), section.kv_heads, dim, dim)
            _check_invertible(prefix + name, weights[name])
    return Part(
        k_layers,
        v_layers,
        take("mean", np.float32, width),
        components,
        take("spectrum", np.float32, rank, least=0),
        _energy(entry["energy"]),
        errors,
        uniform,
        **weights,
    )


def _levels(section: Section, components: Components) -> dict[str, Any]:
    """What the description says of two levels: layers of each group, and leading coefficients."""
    if components.second is None:
        return {}
    k_size = section.kv_heads * section.k_dim
    layers = [(k.stop - k.start) // k_size for k, _ in components.groups]
    return {"levels": {"layers": layers, "leading": components.leading}}


def _component_arrays(components: Components) -> dict[str, NDArray[Any]]:
    if components.second is None or components.order is None:
        return {"components": components.local[0]}
    local = {f"local.{i}": matrix for i, matrix in enumerate(components.local)}
    return {**local, "second": components.second, "order": components.order}


def _parse_components(
    section: Section, entry: Any, layers: int, rank: int, take: Callable[..., NDArray[Any]]
) -> Components:
    k_size, v_size = section.kv_heads * section.k_dim, section.kv_heads * section.v_dim
    runs, leading = _layers(entry["layers"]), _layers(entry["leading"])
    if sum(runs) != layers or 0 in runs or len(leading) != len(runs) or sum(leading) == 0:
        raise FormatError(f"groups of {runs} layers with {leading} leading, of {layers} layers")
    groups = columns_of_layers(runs, k_size, v_size)
    local = tuple(
        take(f"local.{i}", np.float16, None, sum(s.stop - s.start for s in spans))
        for i, spans in enumerate(groups)
    )
    second = take("second", np.float16, None, sum(leading))
    order = take("order", np.int32, rank)
    if any(n > len(m) for n, m in zip(leading, local, strict=True)):
        raise FormatError(f"{leading} leading of {list(map(len, local))} components")
    components = Components(groups, local, leading, second, order)
    if components.inner[-1] != rank or (np.sort(order) != np.arange(rank)).any():
        raise FormatError(f"the order of {rank} components has others or some twice")
    return components


def _uniform_arrays(uniform: UniformTables) -> dict[str, NDArray[Any]]:
    families = uniform.families
    arrays: dict[str, NDArray[Any]] = {
        "frequencies": families.frequencies,
        "ids": families.ids,
        "rate": families.rate,
        "distortion": families.distortion,
        "energy": families.energy,
        "k_errors": uniform.k_errors,
        "v_errors": uniform.v_errors,
    }
    if uniform.importance is not None:
        named = uniform.importance.arrays().items()
        arrays |= {f"importance.{name}": array for name, array in named}
    return arrays


def _parse_uniform(
    entry: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    prefix: str,
    rank: int,
    take: Callable[..., NDArray[Any]],
) -> UniformTables:
    count = arrays[prefix + "frequencies"].shape[0]
    steps = arrays[prefix + "ids"].shape[0]
    if not 2 <= steps <= 256 or not _energy(entry["unit"]) > 0:
        raise FormatError(f"{prefix}: found {steps} steps of unit {entry['unit']!r}")
    if type(entry["importance"]) is not bool:
        raise FormatError(f"importance must be true or false, found {entry['importance']!r}")

    def costs(name: str, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
        return take("uniform." + name, dtype, *shape, least=0)

    families = FamilyTables(
        frequencies=costs("frequencies", np.uint16, count, 256),
        ids=costs("ids", np.uint8, steps, CLASSES, rank),
        rate=costs("rate", np.float32, steps, rank),
        distortion=costs("distortion", np.float32, steps, rank),
        energy=costs("energy", np.float64, rank),
    )
    Families(families.frequencies)  # raises ValueError where they are none
    if families.ids.max() >= count:
        raise FormatError(f"{prefix}ids has family {families.ids.max()} of {count}")
    importance = None
    if entry["importance"]:
        start = prefix + "importance."
        names = [name for name in arrays if name.startswith(start)]
        found = {name.removeprefix(start): arrays.pop(name) for name in names}
        importance = TokenImportance.from_arrays(found)
    return UniformTables(
        _energy(entry["unit"]),
        families,
        costs("k_errors", np.float32, steps),
        costs("v_errors", np.float32, steps),
        importance,
    )


def _check_invertible(name: str, weights: NDArray[np.float32]) -> None:
    symmetric = (weights == weights.swapaxes(2, 3)).all()
    if not symmetric or (np.linalg.eigvalsh(weights.astype(np.float64)) <= 0).any():
        raise FormatError(f"{name} has matrices that are not symmetric and positive definite")
