"""What a cache looks like: dtypes, rotary tables, sections.

These are plain values (hashable, comparable), written into every stream header and every
calibration file.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtc_stream.errors import FormatError
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.wire import ByteReader, ByteWriter, located

# In place of the number of a rotary table: the layer's keys carry none.
_NO_ROPE = 0xFFFF
# Flags of a rotary table.
_INTERLEAVED, _HAS_AXES = 1, 2
# Axes that a token can have positions on.
_MAX_AXES = 8


class DType(enum.IntEnum):
    """Element types of a cache. The numbers are those of the stream."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    FLOAT8_E4M3FN = 4
    FLOAT8_E5M2 = 5

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return (0, 4, 2, 2, 1, 1)[self]

    @property
    def label(self) -> str:
        """The name that numpy and ml_dtypes know, e.g. ``"bfloat16"``."""
        return self.name.lower()

    @property
    def is_fp8(self) -> bool:
        """Whether values travel with a scale."""
        return self.itemsize == 1


@dataclass(frozen=True, slots=True)
class Rope:
    """One rotary position embedding (RoFormer, arXiv 2104.09864).

    A key's first ``rotary_dim`` channels are rotated by ``position * inv_freq``, the rest pass
    through; cosine and sine are multiplied by ``scale``. With several axes (M-RoPE), a token has a
    position on each, and each pair of channels turns with its axis' position.

    Parameters
    ----------
    inv_freq
        Inverse frequencies in radians per position, ``rotary_dim / 2`` of them, rounded to
        binary32 (what models compute with). Any scaling rule (linear, dynamic, YaRN, llama3) is
        already in the table.
    interleaved
        ``False``: channel ``i`` pairs with ``i + rotary_dim / 2`` (Llama). ``True``: channel
        ``2i`` pairs with ``2i + 1`` (GPT-J).
    scale
        Attention scaling factor (YaRN); 1 for most models.
    axes
        The axis of each pair of channels, 0 to 7, as many as inverse frequencies; empty: there is
        one. Qwen2-VL's section split of 16, 24, 24 is ``(0,) * 16 + (1,) * 24 + (2,) * 24``.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool = False
    scale: float = 1.0
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.inv_freq:
            raise ValueError("a Rope needs at least one inverse frequency; use None for no RoPE")
        table = tuple(binary32(f) for f in self.inv_freq)
        if not all(abs(f) < float("inf") for f in table):
            raise ValueError("inverse frequencies must be finite")
        scale = binary32(self.scale)
        if not 0 < scale < float("inf"):
            raise ValueError(f"RoPE scale must be positive and finite, found {self.scale}")
        object.__setattr__(self, "inv_freq", table)
        object.__setattr__(self, "scale", scale)
        if self.axes and len(self.axes) != len(table):
            raise ValueError(
                f"axes must have an entry for each of {len(table)} pairs, found {len(self.axes)}"
            )
        if not all(0 <= axis < _MAX_AXES for axis in self.axes):
            raise ValueError(f"axes must be from 0 to {_MAX_AXES - 1}, found {self.axes}")
        if not any(self.axes):
            object.__setattr__(self, "axes", ())

    @property
    def rotary_dim(self) -> int:
        """Channels that rotate."""
        return 2 * len(self.inv_freq)

    @property
    def axis_count(self) -> int:
        """Positions that a token has: 1, or with ``axes`` as many as there are up to the last."""
        return max(self.axes, default=0) + 1

    @classmethod
    def from_theta(cls, theta: float, rotary_dim: int, *, interleaved: bool = False) -> Rope:
        """The unscaled table ``theta ** (-2i / rotary_dim)``."""
        if theta <= 0 or rotary_dim <= 0 or rotary_dim % 2:
            raise ValueError(
                f"theta must be positive and rotary_dim even and positive, "
                f"found theta={theta}, rotary_dim={rotary_dim}"
            )
        table = tuple(theta ** (-i / rotary_dim) for i in range(0, rotary_dim, 2))
        return cls(table, interleaved)


@dataclass(frozen=True, slots=True)
class Section:
    """Layers that hold the same tokens and are coded together, one row per token.

    Layers that keep other tokens (sliding windows beside full attention) are a section of their
    own in the same stream.

    Parameters
    ----------
    layers
        The model's numbers of these layers, rising.
    kv_heads, k_dim, v_dim
        Heads per layer and channels per head of K and of V.
    rope
        One entry a layer: the rotary table its keys carry, or ``None``. Empty: no layer's keys
        carry RoPE (they were captured before it, or the model has none).
    """

    layers: tuple[int, ...]
    kv_heads: int
    k_dim: int
    v_dim: int
    rope: tuple[Rope | None, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Section):
            return NotImplemented
        # Tables are long, and mostly one for all layers: each pair of them is compared once.
        pairs = zip(map(id, self.rope), map(id, other.rope), strict=False)
        tables = dict(zip(pairs, zip(self.rope, other.rope, strict=False), strict=False))
        return (
            self._sizes == other._sizes
            and len(self.rope) == len(other.rope)
            and all(own == others for own, others in tables.values())
        )

    def __hash__(self) -> int:
        return hash(self._sizes)  # few sections differ in their tables alone

    @property
    def _sizes(self) -> tuple[Any, ...]:
        return self.layers, self.kv_heads, self.k_dim, self.v_dim

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or self.layers[0] < 0 or not rising:
            raise ValueError(f"layers must be rising numbers from 0, found {self.layers}")
        if min(self.kv_heads, self.k_dim, self.v_dim) < 1:
            raise ValueError(
                f"kv_heads, k_dim and v_dim must be positive, found "
                f"{self.kv_heads}, {self.k_dim}, {self.v_dim}"
            )
        if self.rope and len(self.rope) != len(self.layers):
            raise ValueError(
                f"rope must have an entry for each of {len(self.layers)} layers, "
                f"found {len(self.rope)}"
            )
        if not any(self.rope):
            object.__setattr__(self, "rope", ())
        for rope in self.rope:
            if rope is not None and rope.rotary_dim > self.k_dim:
                raise ValueError(
                    f"rotary dimension {rope.rotary_dim} exceeds the keys' {self.k_dim} channels"
                )
        counts = {rope.axis_count for rope in self.rope if rope is not None and rope.axes}
        if len(counts) > 1:
            raise ValueError(
                f"rotary tables of a section have {' and '.join(map(str, sorted(counts)))} axes: "
                "expected one number"
            )

    @property
    def axes(self) -> int:
        """Axes that the keys' positions have: 0 if all that counts is a token's position."""
        return next((r.axis_count for r in self.rope if r is not None and r.axes), 0)

    @property
    def k_width(self) -> int:
        """Values of K per token."""
        return len(self.layers) * self.kv_heads * self.k_dim

    @property
    def v_width(self) -> int:
        """Values of V per token."""
        return len(self.layers) * self.kv_heads * self.v_dim

    def k_shape(self, tokens: int) -> tuple[int, int, int, int]:
        """Shape of K: [layers, kv_heads, tokens, k_dim]."""
        return (len(self.layers), self.kv_heads, tokens, self.k_dim)

    def v_shape(self, tokens: int) -> tuple[int, int, int, int]:
        """Shape of V: [layers, kv_heads, tokens, v_dim]."""
        return (len(self.layers), self.kv_heads, tokens, self.v_dim)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sections of a cache; most models have one."""

    sections: tuple[Section, ...]

    def __post_init__(self) -> None:
        if not self.sections:
            raise ValueError("a geometry needs at least one section")
        layers = [layer for s in self.sections for layer in s.layers]
        if len(set(layers)) != len(layers):
            raise ValueError("a layer may be in one section only")

    @classmethod
    def uniform(
        cls,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        rope: Rope | Sequence[Rope | None] | None = None,
    ) -> Geometry:
        """One section of alike layers, numbered from 0.

        ``rope`` is one table for all layers, one entry a layer, or ``None`` for keys without
        RoPE. ``v_head_dim`` defaults to ``head_dim``.
        """
        tables = (rope,) * layers if rope is None or isinstance(rope, Rope) else tuple(rope)
        v_dim = head_dim if v_head_dim is None else v_head_dim
        return cls((Section(tuple(range(layers)), kv_heads, head_dim, v_dim, tables),))


def binary32(value: float) -> float:
    """``value`` rounded to binary32; infinite when it is too large."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf")


#: Geometries that were read last, by limits and bytes: the streams of a model have one.
_met: dict[tuple[Limits, bytes], Geometry] = {}
_MOST_MET = 8


def write_geometry(geometry: Geometry, writer: ByteWriter) -> None:
    """Append the rotary tables, each once in order of first use, and the sections."""
    for (_, data), known in list(_met.items()):
        if known is geometry:
            writer.raw(data)
            return
    _write(geometry, writer)


def read_geometry(reader: ByteReader, limits: Limits) -> Geometry:
    """Read what :func:`write_geometry` wrote."""
    for (of_limits, data), known in list(_met.items()):
        if of_limits == limits and reader.skip(data):
            return known
    start = reader.position
    geometry = _read(reader, limits)
    writer = ByteWriter()
    _write(geometry, writer)
    if len(data := writer.getvalue()) == reader.position - start:
        for key in list(_met)[: 1 - _MOST_MET]:
            _met.pop(key, None)
        _met[limits, data] = geometry
    return geometry


def _write(geometry: Geometry, writer: ByteWriter) -> None:
    # Tables are long to hash, and those of many layers are one object.
    objects = {id(r): r for s in geometry.sections for r in s.rope if r is not None}
    tables = list(dict.fromkeys(objects.values()))
    numbers = {key: tables.index(rope) for key, rope in objects.items()} | {id(None): _NO_ROPE}
    writer.pack("H", len(tables))
    for rope in tables:
        flags = _INTERLEAVED * rope.interleaved | _HAS_AXES * bool(rope.axes)
        writer.pack("HBf", len(rope.inv_freq), flags, rope.scale)
        writer.array("f", rope.inv_freq)
        writer.array("B", rope.axes)
    writer.pack("H", len(geometry.sections))
    for s in geometry.sections:
        writer.pack("HIII", len(s.layers), s.kv_heads, s.k_dim, s.v_dim)
        writer.array("I", s.layers)
        writer.array("H", (numbers[id(r)] for r in s.rope or (None,) * len(s.layers)))


def _read(reader: ByteReader, limits: Limits) -> Geometry:
    tables: dict[int, Rope | None] = {_NO_ROPE: None}
    count = reader.integer("H", "rotary table count")
    limits.check("max_layers", count, reader.place("rotary table count"))
    for i in range(count):
        place = reader.place(f"rotary table {i}")
        pairs, flags, scale = reader.unpack("HBf", f"rotary table {i}")
        if flags & ~(_INTERLEAVED | _HAS_AXES):
            raise FormatError(f"{place}: flags are {flags:#x}, expected 0 to 3")
        frequencies = reader.array("f", pairs, f"rotary table {i}")
        axes = reader.array("B", pairs, f"axes of {i}") if flags & _HAS_AXES else ()
        with located(place):
            tables[i] = Rope(frequencies, bool(flags & _INTERLEAVED), scale, axes)
    count = reader.integer("H", "section count")
    limits.check("max_sections", count, reader.place("section count"))
    sections = []
    layers = 0
    for i in range(count):
        field = f"section {i}"
        n, kv_heads, k_dim, v_dim = reader.unpack("HIII", field)
        layers += n
        limits.check("max_layers", layers, reader.place(f"{field} layer count"))
        limits.check("max_width", n * kv_heads * (k_dim + v_dim), reader.place(f"{field} width"))
        numbers = reader.array("I", n, f"{field} layers")
        references = reader.array("H", n, f"{field} rotary tables")
        with located(reader.place(field)):
            if not tables.keys() >= set(references):
                raise ValueError(
                    f"it refers to rotary table {max(set(references) - tables.keys())} "
                    f"of {len(tables) - 1}"
                )
            rope = tuple(tables[r] for r in references)
            sections.append(Section(numbers, kv_heads, k_dim, v_dim, rope))
    with located(reader.place("sections")):
        return Geometry(tuple(sections))
