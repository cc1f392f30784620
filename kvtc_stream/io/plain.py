"""Uncompressed caches in files: ``.npz`` and ``.safetensors`` with arrays ``k`` and ``v``.

============== ================================================ =================================
name           array                                            meaning
============== ================================================ =================================
k, v           [layers, kv_heads, tokens, head_dim]             the cache; head_dim may differ
positions      integers [tokens], rising, optional              0, 1, 2, ... without it
k_scale,       [], [layers] or [layers, kv_heads], optional     what fp8 values are multiplied
v_scale                                                         with; 1 without it
dtype          one string, ``.npz`` only, optional              the element type of k and v, where
                                                                numpy has none
============== ================================================ =================================

A cache of several sections has ``k.0``, ``v.0``, ..., ``k.1``, ``v.1``, ... instead. Arrays of
other names are left alone.

numpy has no bfloat16, and an ``.npz`` file only what numpy has. So bfloat16 is written to it as
float32, which holds the same values and which every reader of the file understands, beside
``dtype = "bfloat16"``; :func:`read` gives bfloat16 back, bit for bit. What others wrote may hold
the bits instead (uint16 for bfloat16, uint8 for fp8), with the same entry. Safetensors files hold
every element type as it is.

No file can run code (nothing is unpickled) and sizes are checked against the file's.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.errors import FormatError
from kvtc_stream.formats import DType
from kvtc_stream.io.dlpack import dtype_of, numpy_dtype
from kvtc_stream.io.storage import atomic_write

Format: TypeAlias = Literal["npz", "safetensors"]
File: TypeAlias = "str | os.PathLike[str] | BinaryIO"

#: Names of element types in safetensors (https://github.com/huggingface/safetensors, "Format").
_SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "F32": numpy_dtype(DType.FLOAT32),
    "F16": numpy_dtype(DType.FLOAT16),
    "BF16": numpy_dtype(DType.BFLOAT16),
    "F8_E4M3": numpy_dtype(DType.FLOAT8_E4M3FN),
    "F8_E5M2": numpy_dtype(DType.FLOAT8_E5M2),
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
_ENTRY = re.compile(r"(k|v|positions|k_scale|v_scale)(?:\.(\d{1,5}))?")

#: Names of all arrays of a file, and the arrays of a cache among them.
_Found: TypeAlias = "tuple[list[str], dict[str, NDArray[Any]]]"


@dataclass(frozen=True, eq=False)
class PlainSection:
    """One section of an uncompressed cache.

    Attributes
    ----------
    k, v
        [layers, kv_heads, tokens, head_dim] in one cache dtype; read-only where a file is mapped.
    positions
        int64 [tokens], or ``None``: contiguous from 0.
    k_scale, v_scale
        float32 [layers, kv_heads] for fp8, or ``None``.
    """

    k: NDArray[Any]
    v: NDArray[Any]
    positions: NDArray[np.int64] | None = None
    k_scale: NDArray[np.float32] | None = None
    v_scale: NDArray[np.float32] | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.k.shape[2])

    @property
    def dtype(self) -> DType:
        """Element type of K and V."""
        return dtype_of(self.k.dtype)


def format_of(file: File, format: str | None = None) -> Format:
    """``format`` if given, else what the file's suffix says.

    Raises
    ------
    ValueError
        Neither names a format.
    """
    name = format
    if name is None and isinstance(file, str | os.PathLike):
        name = Path(file).suffix[1:].lower()
    for known in get_args(Format):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(
        f"{label(file)}: the format must be one of {', '.join(get_args(Format))}, found "
        f"{name or 'none'!r}: name the file accordingly, or give the format"
    )


def read(file: File, format: str | None = None) -> tuple[PlainSection, ...]:
    """Read a cache, one entry a section.

    Safetensors files that are given by path are mapped, not read.

    Parameters
    ----------
    file
        A path, or a binary file object, which is read to its end (a pipe will do).
    format
        ``"npz"`` or ``"safetensors"``; by default what the path's suffix says.

    Raises
    ------
    FormatError
        The file is damaged, or not of the format.
    ValueError
        It holds no cache: arrays are missing, or of a wrong shape or type.
    """
    load = {"npz": _read_npz, "safetensors": _read_safetensors}[format_of(file, format)]
    name = label(file)
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as source:
            found, arrays = load(source, name)
    else:
        found, arrays = load(file, name)
    numbers: dict[int | None, dict[str, NDArray[Any]]] = {}
    for entry, array in arrays.items():
        if match := _ENTRY.fullmatch(entry):
            number = None if match[2] is None else int(match[2])
            numbers.setdefault(number, {})[match[1]] = array
    if None in numbers and len(numbers) > 1:
        raise ValueError(f"{name} has both k and k.0: one section has k, several have k.0, k.1, …")
    if (None not in numbers and set(numbers) != set(range(len(numbers)))) or not numbers:
        raise ValueError(
            f"{name} holds no cache: expected arrays k and v (or k.0, v.0, k.1, v.1, …), found "
            f"{', '.join(sorted(found)[:20]) or 'nothing'}"
        )
    keys: list[int | None] = sorted(numbers, key=lambda n: -1 if n is None else n)
    return tuple(_section(numbers[n], name, "" if n is None else f".{n}") for n in keys)


def write(file: File, sections: Sequence[PlainSection], format: str | None = None) -> None:
    """Write a cache that :func:`read` gives back; a path appears whole or not at all.

    Raises
    ------
    ValueError
        An fp8 cache cannot go to ``.npz``; or the sections differ in dtype.
    """
    chosen = format_of(file, format)
    if len({section.dtype for section in sections}) != 1:
        raise ValueError("a cache needs sections, all of one dtype")
    arrays: dict[str, NDArray[Any]] = {}
    for i, section in enumerate(sections):
        suffix = f".{i}" if len(sections) > 1 else ""
        for entry in ("k", "v", "positions", "k_scale", "v_scale"):
            array = getattr(section, entry)
            if array is not None:
                arrays[entry + suffix] = array
    if chosen == "npz":
        arrays = _for_numpy(arrays, sections[0].dtype)
    save = _write_npz if chosen == "npz" else _write_safetensors
    if isinstance(file, str | os.PathLike):
        with atomic_write(file) as target:
            save(target, arrays)
    else:
        save(file, arrays)
        file.flush()


def label(file: File) -> str:
    """What messages call a file."""
    if isinstance(file, str | os.PathLike):
        return os.fspath(file)
    return str(getattr(file, "name", "the input"))


# Sections.


def _section(arrays: Mapping[str, NDArray[Any]], name: str, suffix: str) -> PlainSection:
    missing = [entry + suffix for entry in ("k", "v") if entry not in arrays]
    if missing:
        raise ValueError(f"{name} lacks the array {missing[0]}: a cache has k and v")
    k, v = (_cache_array(arrays[entry], f"{name}: {entry}{suffix}") for entry in ("k", "v"))
    if k.dtype != v.dtype or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{name}: k{suffix} is {k.dtype} {list(k.shape)} and v{suffix} is {v.dtype} "
            f"{list(v.shape)}: expected one dtype and the same layers, kv_heads and tokens"
        )
    positions = arrays.get("positions")
    if positions is not None:
        if positions.dtype.kind not in "iu" or positions.shape != (k.shape[2],):
            raise ValueError(
                f"{name}: positions{suffix} is {positions.dtype} {list(positions.shape)}, "
                f"expected integers [{k.shape[2]}], one for each token"
            )
        largest = np.iinfo(np.int64).max
        if positions.dtype.kind == "u" and positions.size and int(positions.max()) > largest:
            raise ValueError(
                f"{name}: positions{suffix} go up to {positions.max()}, expected at most {largest}"
            )
        positions = positions.astype(np.int64)
    scales = [
        _scale(arrays.get(entry), k, f"{name}: {entry}{suffix}") for entry in ("k_scale", "v_scale")
    ]
    return PlainSection(k, v, positions, *scales)


def _cache_array(array: NDArray[Any], name: str) -> NDArray[Any]:
    shape = list(array.shape)
    if array.ndim == 5 and shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 4 or not all((*array.shape[:2], array.shape[3])):
        raise ValueError(
            f"{name} has shape {shape}; expected [layers, kv_heads, tokens, head_dim] "
            f"(or [layers, 1, kv_heads, tokens, head_dim])"
        )
    try:
        dtype_of(array.dtype, name)
    except TypeError as error:
        hint = (
            "; a two-byte type without a name is what numpy makes of bfloat16: write float32 "
            "values and an entry dtype='bfloat16', or a .safetensors file"
            if array.dtype.kind == "V"
            else ""
        )
        raise ValueError(f"{error}{hint}") from None
    return array


def _scale(scale: NDArray[Any] | None, k: NDArray[Any], name: str) -> NDArray[np.float32] | None:
    if scale is None:
        return None
    layers, heads = k.shape[:2]
    if not dtype_of(k.dtype).is_fp8:
        raise ValueError(f"{name} is for fp8 caches, found k of {k.dtype}: multiply it in")
    if scale.dtype.kind != "f" or scale.shape not in ((), (layers,), (layers, heads)):
        raise ValueError(
            f"{name} is {scale.dtype} {list(scale.shape)}, expected floats [], [{layers}] or "
            f"[{layers}, {heads}]"
        )
    column = scale[:, None] if scale.ndim == 1 else scale
    return np.broadcast_to(column, (layers, heads)).astype(np.float32)


# npz.


def _read_npz(file: BinaryIO, name: str) -> _Found:
    # A zip archive is read from its end: a pipe has to be taken in whole.
    source = file if file.seekable() else io.BytesIO(file.read())
    start = source.tell()
    opening = source.read(2)
    source.seek(start)
    if opening != b"PK":
        raise FormatError(f"{name} is not a readable .npz file: it does not begin as zip files do")
    try:
        with np.load(source, allow_pickle=False) as archive:
            names = archive.files
            # An archive is read from its end, so one before it would be lost silently.
            if min((x.header_offset for x in archive.zip.infolist()), default=start) > start:
                raise ValueError(
                    "more is before its archive, as by joining files with cat; pass them one by one"
                )
            wanted = [entry for entry in names if entry == "dtype" or _ENTRY.fullmatch(entry)]
            arrays = {entry: np.asarray(archive[entry]) for entry in wanted}
    except ValueError as error:
        # numpy advises to unpickle what it refuses; nobody should.
        reason = "it holds Python objects" if "pickle" in str(error) else error
        raise FormatError(f"{name} is not a readable .npz file: {reason}") from None
    except Exception as error:  # zipfile, zlib and numpy name no closed list for damaged bytes
        raise FormatError(f"{name} is not a readable .npz file: {error}") from None
    return names, _restore(arrays, name) if "dtype" in arrays else arrays


def _write_npz(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle


def _for_numpy(arrays: Mapping[str, NDArray[Any]], dtype: DType) -> dict[str, NDArray[Any]]:
    """Arrays as numpy knows them, and the name of what it does not know."""
    if dtype.is_fp8:
        raise ValueError(f"an .npz file cannot hold {dtype.label}: write .safetensors")
    if dtype is not DType.BFLOAT16:
        return dict(arrays)
    widened = {
        entry: (np.asarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if array.dtype == numpy_dtype(dtype)
        else array
        for entry, array in arrays.items()
    }
    return {**widened, "dtype": np.array(dtype.label)}


def _restore(arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    """Undo :func:`_for_numpy`; bits in place of values will do too."""
    entry = arrays["dtype"]
    try:
        dtype = DType[str(entry).upper()]
    except KeyError:
        raise ValueError(
            f"{name}: dtype is {str(entry)[:40]!r}, expected one of "
            f"{', '.join(d.label for d in DType)}"
        ) from None
    return {
        key: _as_dtype(array, dtype, f"{name}: {key}")
        if (match := _ENTRY.fullmatch(key)) and match[1] in ("k", "v")
        else array
        for key, array in arrays.items()
    }


def _as_dtype(array: NDArray[Any], dtype: DType, name: str) -> NDArray[Any]:
    wanted = numpy_dtype(dtype)
    if array.dtype == wanted:
        return array
    if array.dtype.kind in "uV" and array.dtype.itemsize == wanted.itemsize:
        return np.ascontiguousarray(array).view(wanted)
    if dtype is DType.BFLOAT16 and array.dtype == np.float32:
        bits = np.ascontiguousarray(array).view(np.uint32)
        if not (bits & 0xFFFF).any():
            return (bits >> 16).astype(np.uint16).view(wanted)
        raise ValueError(
            f"{name}: the file says bfloat16, but some float32 values are not: round them to "
            f"bfloat16, or drop the entry dtype"
        )
    raise ValueError(f"{name} is {array.dtype}, but the file says {dtype.label}")


# safetensors: the length of a JSON header as uint64, the header, the arrays. Read here rather than
# with the package, whose numpy side lacks fp8 and which copies what can be mapped.


def _read_safetensors(file: BinaryIO, name: str) -> _Found:
    data = _bytes_of(file)
    try:
        (length,) = _LENGTH.unpack_from(data)
        begin = _LENGTH.size + length
        if length > _MAX_HEADER_BYTES or begin > len(data):
            raise ValueError(f"its header would have {length} bytes, the file has {len(data)}")
        entries = json.loads(data[_LENGTH.size : begin])
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
        values = np.frombuffer(data, np.uint8)[begin:]
        _check_end(len(values), entries)
        arrays = {
            entry: _tensor(values, description, entry)
            for entry, description in entries.items()
            if _ENTRY.fullmatch(entry)
        }
    except (ValueError, struct.error, RecursionError) as error:
        raise FormatError(f"{name} is not a readable .safetensors file: {error}") from None
    return list(entries), arrays


def _check_end(length: int, entries: Mapping[str, Any]) -> None:
    """A file that goes on behind its arrays may be two: what follows would be lost silently."""
    places = [x.get("data_offsets") for x in entries.values() if isinstance(x, dict)]
    ends = [x[1] for x in places if isinstance(x, list) and len(x) == 2 and type(x[1]) is int]
    if max(ends, default=0) < length:
        raise ValueError(
            f"its arrays end after {max(ends, default=0)} of {length} bytes: more was appended, as "
            f"by joining files with cat; pass them one by one"
        )


def _bytes_of(file: BinaryIO) -> bytes | mmap.mmap:
    """What is left of the file; mapped if that is all of a regular file."""
    with contextlib.suppress(OSError, ValueError):
        if file.tell() == 0:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return file.read()


def _tensor(data: NDArray[np.uint8], description: Any, entry: str) -> NDArray[Any]:
    try:
        dtype = _SAFETENSORS_DTYPES[description["dtype"]]
        shape, (begin, end) = description["shape"], description["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{entry} is {description}, expected a shape, data_offsets and a dtype among "
            f"{', '.join(_SAFETENSORS_DTYPES)}"
        ) from None
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not whole or end > len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{entry} of shape {shape} lies at bytes {begin} to {end} of {len(data)}, expected "
            f"as many bytes as its {dtype.name} values take"
        )
    return data[begin:end].view(dtype).reshape(shape)


def _write_safetensors(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    entries: dict[str, Any] = {}
    offset = 0
    # Wide elements first, so that all are aligned when the file is mapped.
    names = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    for name in names:
        array = arrays[name]
        entries[name] = {
            "dtype": _SAFETENSORS_NAMES[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(_LENGTH.pack(len(header)) + header)
    for name in names:
        little_endian = arrays[name].dtype.newbyteorder("<")
        file.write(np.ascontiguousarray(arrays[name], little_endian).view(np.uint8).data)
