"""The plan: which components are coded, and how.

A *basis* turns a section's row (one token) into coefficients. It is a list of *parts*, each a set
of K layers and V layers coded with one orthonormal matrix: two parts (all of K, all of V) in the
published method, one part in a joint basis, more with layer groups. The plan deals out *bands*,
runs of consecutive components of a part with one quantiser: in a section, either quantisers with a
scale per token, or the uniform one, whose steps suit an entropy coder.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from kvtc_stream.errors import FormatError, VersionError
from kvtc_stream.formats.geometry import Geometry, Section, binary32
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.wire import ByteReader, ByteWriter, located

_MAGIC = b"KVTP"
_VERSION = 2


class Quantiser(enum.IntEnum):
    """Quantisers of bands. The numbers are those of the stream."""

    NONE = 0
    INT2 = 1
    INT4 = 2
    FP8 = 3
    UNIFORM = 4

    @property
    def bits(self) -> int:
        """Bits of one symbol before entropy coding; 0 for ``UNIFORM``, known only after coding."""
        return (0, 2, 4, 8, 0)[self.value]


#: Scale and shift of a coded band, binary16 each, per token.
BAND_PARAMETER_BITS = 32


@dataclass(frozen=True, slots=True)
class Band:
    """``size`` consecutive components with one quantiser.

    ``step``, of ``UNIFORM`` alone, 0…255, is the base step in quarter octaves.
    """

    size: int
    quantiser: Quantiser
    step: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a band needs at least one component, found {self.size}")
        if not 0 <= self.step <= (255 if self.quantiser is Quantiser.UNIFORM else 0):
            raise ValueError(
                f"a band's step must be from 0 to 255, and 0 unless it is UNIFORM, found "
                f"{self.step} of {self.quantiser.name}"
            )

    @property
    def bits(self) -> int:
        """Bits per token before entropy coding; 0 for ``UNIFORM`` bands."""
        if self.quantiser in (Quantiser.NONE, Quantiser.UNIFORM):
            return 0
        return self.size * self.quantiser.bits + BAND_PARAMETER_BITS


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One part of the basis: which layers (indices into the section's layers) and which bands.

    Bands start at component 0; components after the last band are not coded.
    """

    k_layers: tuple[int, ...]
    v_layers: tuple[int, ...]
    bands: tuple[Band, ...]

    def width(self, section: Section) -> int:
        """Values per token that the part covers, which is also its number of components."""
        k = len(self.k_layers) * section.k_dim
        v = len(self.v_layers) * section.v_dim
        return section.kv_heads * (k + v)

    @property
    def components(self) -> int:
        """Leading components that the bands cover."""
        return sum(b.size for b in self.bands)

    @property
    def bits(self) -> int:
        """Bits per token before entropy coding."""
        return sum(b.bits for b in self.bands)


@dataclass(frozen=True, slots=True)
class SectionPlan:
    """The plan of one section: the name of a basis in the calibration, and a plan per part.

    The expected errors are what the planner predicts for a cache like the calibration's, as the
    blocks measure them: ‖x̂−x‖/‖x‖ of K and of V, rounded to binary32; 0 where it cannot tell.
    The expected bits are those of a token after entropy coding, 0 where bands tell them before.
    """

    basis: str
    parts: tuple[PartPlan, ...]
    expected_k_error: float = 0.0
    expected_v_error: float = 0.0
    expected_bits: float = 0.0

    def __post_init__(self) -> None:
        for name in ("expected_k_error", "expected_v_error", "expected_bits"):
            value = binary32(getattr(self, name))
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, found {value}")
            object.__setattr__(self, name, value)

    @property
    def expected(self) -> tuple[float, float, float]:
        """Expected error of K, of V, and bits, in the order of the stream."""
        return self.expected_k_error, self.expected_v_error, self.expected_bits

    @property
    def uniform(self) -> bool:
        """Whether the section uses the uniform quantiser, with step classes and rANS."""
        return any(b.quantiser is Quantiser.UNIFORM for p in self.parts for b in p.bands)

    @property
    def bits(self) -> int:
        """Bits per token before entropy coding; with uniform bands, those expected after it."""
        return round(self.expected_bits) if self.uniform else sum(p.bits for p in self.parts)

    def check(self, section: Section) -> None:
        """Raise ``ValueError`` unless the parts cover K and V of every layer once."""
        for name in ("K", "V"):
            dealt = [p.k_layers if name == "K" else p.v_layers for p in self.parts]
            layers = sorted(n for numbers in dealt for n in numbers)
            if layers != list(range(len(section.layers))):
                raise ValueError(
                    f"the parts must hold the {name} of each of {len(section.layers)} layers "
                    f"once, found that of layers {layers}"
                )
            for numbers in dealt:
                if list(numbers) != sorted(numbers):
                    raise ValueError(f"the {name} layers of a part must rise, found {numbers}")
        for part in self.parts:
            width = part.width(section)
            if not width or part.components > width:
                raise ValueError(
                    f"bands cover {part.components} components of a part that has {width}"
                )
        quantisers = {b.quantiser for p in self.parts for b in p.bands} - {Quantiser.NONE}
        if Quantiser.UNIFORM in quantisers and len(quantisers) > 1:
            raise ValueError(
                f"UNIFORM bands cannot stand beside others in a section, found "
                f"{', '.join(q.name for q in sorted(quantisers))}"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a stream is coded: the preset's name and a plan per section."""

    preset: str
    sections: tuple[SectionPlan, ...]
    #: What :meth:`to_bytes` gives, once it is known.
    _bytes: bytes = field(default=b"", init=False, repr=False, compare=False)
    _digest: bytes = field(default=b"", init=False, repr=False, compare=False)

    def check(self, geometry: Geometry) -> None:
        """Raise ``ValueError`` unless the plan fits the geometry, section by section."""
        if len(self.sections) != len(geometry.sections):
            raise ValueError(
                f"the plan has {len(self.sections)} sections, "
                f"the geometry has {len(geometry.sections)}"
            )
        for plan, section in zip(self.sections, geometry.sections, strict=True):
            plan.check(section)

    @property
    def digest(self) -> bytes:
        """SHA-256 of :meth:`to_bytes`, 32 bytes."""
        if not self._digest:
            object.__setattr__(self, "_digest", hashlib.sha256(self.to_bytes()).digest())
        return self._digest

    def to_bytes(self) -> bytes:
        """Encode the plan; the bytes are the same in a stream and in a file."""
        if self._bytes:
            return self._bytes
        writer = ByteWriter()
        writer.raw(_MAGIC)
        writer.pack("H", _VERSION)
        writer.text(self.preset)
        writer.pack("H", len(self.sections))
        for section in self.sections:
            writer.text(section.basis)
            writer.pack("fff", *section.expected)
            writer.pack("H", len(section.parts))
            for part in section.parts:
                _write_layers(writer, part.k_layers)
                _write_layers(writer, part.v_layers)
                writer.pack("I", len(part.bands))
                for band in part.bands:
                    writer.pack("IB", band.size, band.quantiser)
                    if band.quantiser is Quantiser.UNIFORM:
                        writer.pack("B", band.step)
        object.__setattr__(self, "_bytes", writer.getvalue())
        return self._bytes

    @classmethod
    def from_bytes(cls, data: bytes, limits: Limits | None = None, *, offset: int = 0) -> Plan:
        """Undo :meth:`to_bytes`.

        Parameters
        ----------
        limits
            ``max_sections``, ``max_layers`` and ``max_bands`` apply.
        offset
            Where ``data`` lies in its file, for messages.

        Raises
        ------
        FormatError
            The bytes are not a plan.
        """
        read = _read_plan if len(data) <= _SMALL else _read_plan.__wrapped__
        return read(bytes(data), limits or Limits(), offset)


#: Larger plans, in bytes, are not kept.
_SMALL = 1 << 16


@lru_cache(maxsize=32)  # streams of one codec have one plan
def _read_plan(data: bytes, limits: Limits, offset: int) -> Plan:
    reader = ByteReader(data, "plan", offset)
    place, found = reader.place("magic"), reader.raw(len(_MAGIC), "magic")
    if found != _MAGIC:
        raise FormatError(f"{place} is {found!r}, expected {_MAGIC!r}: this is no plan")
    place, version = reader.place("version"), reader.integer("H", "version")
    if version != _VERSION:
        raise VersionError(
            f"{place} is {version}, this reader knows {_VERSION}; read with a newer kvtc-stream"
        )
    preset = reader.text("preset")
    count = reader.integer("H", "section count")
    limits.check("max_sections", count, reader.place("section count"))
    budget = _Budget(limits)
    sections = tuple(_read_section(reader, budget) for _ in range(count))
    reader.expect_end()
    return Plan(preset, sections)


class _Budget:
    """Counts layers and bands of the whole plan against the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._spent = {"max_layers": 0, "max_bands": 0}

    def spend(self, name: str, count: int, what: str) -> None:
        self._spent[name] += count
        # K and V of a layer may lie in different parts: each counts for half.
        spent = -(-self._spent[name] // 2) if name == "max_layers" else self._spent[name]
        self._limits.check(name, spent, what)


def _read_section(reader: ByteReader, budget: _Budget) -> SectionPlan:
    basis = reader.text("basis")
    place, expected = reader.place("expectations"), reader.unpack("fff", "expectations")
    count = reader.integer("H", "part count")
    budget.spend("max_bands", count, reader.place("parts"))
    parts = tuple(_read_part(reader, budget) for _ in range(count))
    with located(place):
        return SectionPlan(basis, parts, *expected)


def _read_part(reader: ByteReader, budget: _Budget) -> PartPlan:
    k_layers = _read_layers(reader, "K layers", budget)
    v_layers = _read_layers(reader, "V layers", budget)
    count = reader.integer("I", "band count")
    budget.spend("max_bands", count, reader.place("bands"))
    return PartPlan(k_layers, v_layers, tuple(_read_band(reader) for _ in range(count)))


def _read_band(reader: ByteReader) -> Band:
    size = reader.integer("I", "band size")
    quantiser = reader.enum(Quantiser, "quantiser")
    step = reader.integer("B", "step") if quantiser is Quantiser.UNIFORM else 0
    with located(reader.place("band")):
        return Band(size, quantiser, step)


def _write_layers(writer: ByteWriter, layers: Iterable[int]) -> None:
    layers = tuple(layers)
    writer.pack("H", len(layers))
    writer.array("H", layers)


def _read_layers(reader: ByteReader, field: str, budget: _Budget) -> tuple[int, ...]:
    count = reader.integer("H", f"{field} count")
    budget.spend("max_layers", count, reader.place(f"{field} count"))
    return reader.array("H", count, field)
