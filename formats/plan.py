"""The plan: which components are coded, and how.

A *basis* turns a section's row (one token) into coefficients. It is a list of *parts*, each a set
of K layers and V layers coded with one orthonormal matrix: two parts (all of K, all of V) in the
published method, one part in a joint basis, more with layer groups. The plan deals out *bands*,
runs of consecutive components of a part with one quantiser.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Quantiser(enum.IntEnum):
    """Kinds of band. The numbers are those of the stream."""

    NONE = 0
    INT2 = 1
    INT4 = 2
    FP8 = 3

    @property
    def bits(self) -> int:
        """Bits of one symbol before entropy coding."""
        return (0, 2, 4, 8)[self.value]


#: Scale and shift of a coded band, binary16 each, per token.
BAND_PARAMETER_BITS = 32


@dataclass(frozen=True, slots=True)
class Band:
    """``size`` consecutive components with one quantiser."""

    size: int
    quantiser: Quantiser

    @property
    def bits(self) -> int:
        """Bits per token before entropy coding."""
        if self.quantiser is Quantiser.NONE:
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
    """The plan of one section: the name of a basis in the calibration, and a plan per part."""

    basis: str
    parts: tuple[PartPlan, ...]

    @property
    def bits(self) -> int:
        """Bits per token before entropy coding."""
        return sum(p.bits for p in self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a stream is coded: the preset's name and a plan per section."""

    preset: str
    sections: tuple[SectionPlan, ...]
