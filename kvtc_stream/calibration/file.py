"""The calibration file: a JSON description, arrays, and a digest of both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.band_tables import BAND_SIZES, BAND_TYPES, ErrorTables
from kvtc_stream.calibration.components import Components, columns_of_layers
from kvtc_stream.calibration.families import FamilyTables
from kvtc_stream.calibration.float8 import E4M3, Float8Matrix
from kvtc_stream.calibration.importance import TokenImportance
from kvtc_stream.calibration.parts import CalibratedBases, Part, SectionCalibration, UniformTables
from kvtc_stream.coding.rans import CLASSES, Families
from kvtc_stream.errors import ChecksumError, FormatError, VersionError
from kvtc_stream.formats import Geometry, ModelIdentity, Rope, Section
from kvtc_stream.formats.preamble import MAGIC
from kvtc_stream.io.storage import atomic_write

#: Versions of the file: 3; 4, with components in two levels; 5, with rotary axes or components in
#: 8 bits; 6, of a part of the model's KV heads.
CALIBRATION_VERSIONS = (3, 4, 5, 6)

_FLOAT8 = "float8_e4m3fn"
_METADATA_KEY = "kvtc_calibration"
_DIGEST_KEY = "sha256"


def save(content: CalibratedBases, digest: bytes, path: str | os.PathLike[str]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.numpy import save as packed

    metadata = {_METADATA_KEY: description(content), _DIGEST_KEY: digest.hex()}
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays_of(content)}
    with atomic_write(path) as file:
        file.write(packed(arrays, metadata))


def load(path: str | os.PathLike[str]) -> CalibratedBases:
    """Read a file that :func:`save` wrote, and check its digest; see ``Calibration.load``."""
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no calibration file at {name}")
    try:
        with safe_open(name, framework="np") as file:
            metadata = file.metadata() or {}
            types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            small = [key for key, dtype in types.items() if dtype == "F8_E4M3"]
            arrays = {key: file.get_tensor(key) for key in types if key not in small}
        arrays |= _float8_arrays(name, small)
    except (SafetensorError, TypeError, AttributeError) as error:
        with open(name, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                raise FormatError(f"{name} is a kvtc stream, where a calibration belongs") from None
        raise FormatError(
            f"{name} is not a readable safetensors file, as calibrations are: {error}; "
            f"make one with `kvtc calibrate`"
        ) from None
    if _METADATA_KEY not in metadata:
        raise FormatError(
            f"{name} is a safetensors file but not a calibration (its metadata lacks "
            f"{_METADATA_KEY!r}): make one with `kvtc calibrate`"
        )
    try:
        content = _parse(json.loads(metadata[_METADATA_KEY]), arrays)
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
    found, expected = digest_of(content).hex(), metadata.get(_DIGEST_KEY)
    if found != expected:
        raise ChecksumError(
            f"{name}: content has SHA-256 {found}, expected {expected}: the file was changed "
            f"after it was written; fetch or make it again"
        )
    return content


def _float8_arrays(name: str, keys: list[str]) -> dict[str, NDArray[Any]]:
    """Arrays of a sound safetensors file that its NumPy reader has no type for."""
    if not keys:
        return {}
    found = {}
    with open(name, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for key in keys:
            begin, end = header[key]["data_offsets"]
            file.seek(8 + length + begin)
            array = np.fromfile(file, np.uint8, end - begin).view(E4M3)
            found[key] = array.reshape(header[key]["shape"])
    return found


def _version(content: CalibratedBases) -> int:
    """The lowest version of the file that can hold ``content``."""
    if any(section.heads for section in content.sections):
        return 6
    parts = [p for s in content.sections for basis in s.bases.values() for p in basis]
    axes = any(section.axes for section in content.geometry.sections)
    if axes or any(part.eight_bits for part in parts):
        return 5
    return 4 if any(part.components.second is not None for part in parts) else 3


def _shape(section: Section) -> dict[str, Any]:
    """A section's fields; only rotary tables with axes have the key ``axes``."""
    shape = asdict(section)
    for rope in shape["rope"]:
        if rope is not None and not rope["axes"]:
            del rope["axes"]
    return shape


def description(content: CalibratedBases) -> str:
    """Canonical JSON: everything but the arrays."""
    return json.dumps(
        {
            "version": _version(content),
            "sinks": content.sinks,
            "model": {**asdict(content.model), "fingerprint": content.model.fingerprint.hex()},
            "sections": [
                {
                    **_shape(section),
                    "tokens": calibrated.tokens,
                    **({"heads": calibrated.heads} if calibrated.heads else {}),
                    "bases": {
                        name: [
                            {
                                "k_layers": part.k_layers,
                                "v_layers": part.v_layers,
                                "energy": part.energy,
                                "weighted": part.weighted,
                                **_levels(section, part.components),
                                **({"component_type": _FLOAT8} if part.eight_bits else {}),
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
                    content.geometry.sections, content.sections, strict=True
                )
            ],
        },
        sort_keys=True,
        separators=(",", ":"),
    )


def arrays_of(content: CalibratedBases) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of a file, by name."""
    for i, section in enumerate(content.sections):
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


def digest_of(content: CalibratedBases) -> bytes:
    """SHA-256 of the content (SPEC, "Calibration file"), 32 bytes."""
    digest = hashlib.sha256(description(content).encode())
    for name, array in sorted(arrays_of(content)):
        little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"\n{name} {array.dtype.name} {list(array.shape)}\n".encode())
        digest.update(little_endian.view(np.uint8).data)
    return digest.digest()


def _parse(description: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> CalibratedBases:
    if description["version"] not in CALIBRATION_VERSIONS:
        known = " or ".join(map(str, CALIBRATION_VERSIONS))
        raise VersionError(
            f"calibration file of version {description['version']}, expected {known}: use the "
            f"package version that wrote it, or calibrate again"
        )
    geometry, sections = [], []
    tables: dict[Rope, Rope] = {}
    for i, entry in enumerate(description["sections"]):
        section = Section(
            layers=_layers(entry["layers"]),
            kv_heads=_count(entry["kv_heads"]),
            k_dim=_count(entry["k_dim"]),
            v_dim=_count(entry["v_dim"]),
            rope=tuple(None if x is None else _parse_rope(x, tables) for x in entry["rope"]),
        )
        bases = {
            name: tuple(
                _parse_part(section, part, arrays, f"{i}.{name}.{j}.")
                for j, part in enumerate(parts)
            )
            for name, parts in entry["bases"].items()
        }
        geometry.append(section)
        heads = _heads(entry["heads"], section) if "heads" in entry else None
        sections.append(SectionCalibration(bases, _count(entry["tokens"]), heads))
    if arrays:
        raise FormatError(f"unexpected arrays {sorted(arrays)}")
    model = description["model"]
    return CalibratedBases(
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


def _heads(value: Any, section: Section) -> tuple[int, int]:
    first, of = map(_count, value)
    if first + section.kv_heads > of:
        raise FormatError(f"{section.kv_heads} heads from {first} on, of {of}")
    return first, of


def _layers(values: list[Any]) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


def _parse_rope(entry: dict[str, Any], known: dict[Rope, Rope]) -> Rope:
    """A table; the one that is known, of many layers."""
    if type(entry["interleaved"]) is not bool:
        raise FormatError(f"interleaved must be true or false, found {entry['interleaved']!r}")
    axes = _layers(entry.get("axes", []))
    rope = Rope(tuple(entry["inv_freq"]), entry["interleaved"], entry["scale"], axes)
    return known.setdefault(rope, rope)


class _PartArrays:
    """The arrays of a part, by names that follow its prefix, each checked as it is taken."""

    def __init__(self, arrays: dict[str, NDArray[Any]], prefix: str, component_type: Any) -> None:
        if component_type not in (None, _FLOAT8):
            raise FormatError(
                f"{prefix}: components of type {component_type!r}, expected {_FLOAT8!r}, or "
                f"no type for binary16"
            )
        self.arrays, self.prefix, self._float8 = arrays, prefix, component_type is not None

    def take(
        self,
        name: str,
        dtype: type[np.generic],
        *shape: int | None,
        minimum: float = -np.inf,
        finite: bool = True,
    ) -> NDArray[Any]:
        """An array of this type and shape, in which ``None`` stands for any length."""
        name = self.prefix + name
        array = self.arrays.pop(name)
        expected = [n if m is None else m for n, m in zip(array.shape, shape, strict=False)]
        if array.dtype != dtype or list(array.shape) != expected or array.ndim != len(shape):
            raise FormatError(
                f"{name}: found {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}"
            )
        # Minimum and maximum are NaN if any value is; types of 8 bits may have no infinity.
        least, most = float(array.min()), float(array.max())
        if not least >= minimum or (finite and not np.isfinite([least, most]).all()):
            raise FormatError(f"{name} has values that no calibration makes")
        array.setflags(write=False)
        return array

    def matrix(self, name: str, rows: int | None, columns: int) -> Any:
        """A matrix of components, as binary16 or :class:`Float8Matrix`."""
        if not self._float8:
            return self.take(name, np.float16, rows, columns)
        codes = self.take(name, E4M3.type, rows, columns)
        residuals = self.take(f"{name}.residuals", E4M3.type, None, columns)
        if len(residuals) > len(codes):
            raise FormatError(
                f"{self.prefix}{name}: {len(residuals)} residuals of {len(codes)} rows"
            )
        of_rows = self.take(f"{name}.rows", np.float32, len(codes))
        of_columns = self.take(f"{name}.columns", np.float32, columns)
        return Float8Matrix(codes, residuals, of_rows, of_columns)


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
    own = _PartArrays(arrays, prefix, entry.get("component_type"))
    if "levels" not in entry:
        components = Components.dense(own.matrix("components", rank, width))
    elif k_layers == v_layers:
        components = _parse_components(section, entry["levels"], len(k_layers), rank, own)
    else:
        raise FormatError(f"{prefix}: two levels of K of {k_layers} and V of {v_layers}")
    errors = uniform = None
    if entry["errors"] is not None:
        errors = _parse_errors(entry["errors"], rank, own)
    if entry["uniform"] is not None:
        uniform = _parse_uniform(entry["uniform"], rank, own)
    if type(entry["weighted"]) is not bool:
        raise FormatError(f"weighted must be true or false, found {entry['weighted']!r}")
    weights = {}
    if entry["weighted"]:
        for name, layers, dim in (
            ("k_weights", k_layers, section.k_dim),
            ("v_weights", v_layers, section.v_dim),
        ):
            weights[name] = own.take(name, np.float32, len(layers), section.kv_heads, dim, dim)
            _check_invertible(prefix + name, weights[name])
    return Part(
        k_layers,
        v_layers,
        own.take("mean", np.float32, width),
        components,
        own.take("spectrum", np.float32, rank, minimum=0),
        _energy(entry["energy"]),
        errors,
        uniform,
        **weights,
    )


def _parse_errors(entry: dict[str, Any], rank: int, own: _PartArrays) -> ErrorTables:
    shape = (rank, len(BAND_SIZES), len(BAND_TYPES))
    return ErrorTables(
        errors=own.take("errors", np.float32, *shape, minimum=0, finite=False),
        energy=own.take("drop_errors", np.float64, rank, minimum=0),
        dropped=_energy(entry["dropped"]),
        rows=_count(entry["rows"]),
    )


def _levels(section: Section, components: Components) -> dict[str, Any]:
    """The description's entry for two levels: layers and leading coefficients of each group."""
    if components.second is None:
        return {}
    k_size = section.kv_heads * section.k_dim
    layers = [(k.stop - k.start) // k_size for k, _ in components.groups]
    return {"levels": {"layers": layers, "leading": components.leading}}


def _component_arrays(components: Components) -> dict[str, NDArray[Any]]:
    if components.second is None or components.order is None:
        return _matrix_arrays({"components": components.local[0]})
    local = {f"local.{i}": matrix for i, matrix in enumerate(components.local)}
    return {
        **_matrix_arrays({**local, "second": components.second}),
        "order": components.order,
    }


def _matrix_arrays(matrices: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Arrays of matrices by name."""
    found: dict[str, NDArray[Any]] = {}
    for name, matrix in matrices.items():
        if not isinstance(matrix, Float8Matrix):
            found[name] = matrix
            continue
        found |= {
            name: matrix.codes,
            f"{name}.residuals": matrix.residuals,
            f"{name}.rows": matrix.rows,
            f"{name}.columns": matrix.columns,
        }
    return found


def _parse_components(
    section: Section,
    entry: Any,
    layers: int,
    rank: int,
    own: _PartArrays,
) -> Components:
    k_size, v_size = section.kv_heads * section.k_dim, section.kv_heads * section.v_dim
    runs, leading = _layers(entry["layers"]), _layers(entry["leading"])
    if sum(runs) != layers or 0 in runs or len(leading) != len(runs) or sum(leading) == 0:
        raise FormatError(f"groups of {runs} layers with {leading} leading, of {layers} layers")
    groups = columns_of_layers(runs, k_size, v_size)
    local = tuple(
        own.matrix(f"local.{i}", None, sum(s.stop - s.start for s in spans))
        for i, spans in enumerate(groups)
    )
    second = own.matrix("second", None, sum(leading))
    order = own.take("order", np.int32, rank)
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


def _parse_uniform(entry: dict[str, Any], rank: int, own: _PartArrays) -> UniformTables:
    arrays, prefix = own.arrays, own.prefix + "uniform."
    count = arrays[prefix + "frequencies"].shape[0]
    steps = arrays[prefix + "ids"].shape[0]
    if not 2 <= steps <= 256 or not _energy(entry["unit"]) > 0:
        raise FormatError(f"{prefix}: found {steps} steps of unit {entry['unit']!r}")
    if type(entry["importance"]) is not bool:
        raise FormatError(f"importance must be true or false, found {entry['importance']!r}")

    def costs(name: str, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
        return own.take("uniform." + name, dtype, *shape, minimum=0)

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
