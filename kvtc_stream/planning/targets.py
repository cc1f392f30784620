"""From a target (ratio, bits, error) to a plan."""

from __future__ import annotations

import math
from dataclasses import replace

from kvtc_stream.calibration import Calibration, Part
from kvtc_stream.calibrator import Progress
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import Band, PartPlan, Plan, Quantiser, SectionPlan
from kvtc_stream.planning.dynamic import allocate, allocate_for_error

#: Bits per value that a ratio is relative to, whatever the cache's dtype (as published).
RATIO_BITS = 16


def make_plan(
    calibration: Calibration,
    preset: str,
    basis: str,
    target: str,
    value: float,
    progress: Progress | None = None,
) -> Plan:
    """Deal out bits to every part of every section.

    ``target`` is ``"ratio"``, ``"bits_per_token"`` (shared among parts by their width, so that K
    and V get the same ratio, as published) or ``"max_relative_error"`` (met by every part).
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{target} must be positive and finite, found {value}")
    bases = [section.basis(basis) for section in calibration.sections]
    width = sum(part.width for parts in bases for part in parts)

    def bands(part: Part) -> tuple[Band, ...]:
        if target == "max_relative_error":
            return _bands_for_error(part, value, progress)
        bits = RATIO_BITS * part.width / value if target == "ratio" else value * part.width / width
        most = part.rank * Band(1, Quantiser.FP8).bits  # no plan can spend more
        return allocate(part.tables, int(min(bits, most)), progress=progress).bands

    return Plan(
        preset,
        tuple(
            _expecting(
                parts,
                SectionPlan(
                    basis, tuple(PartPlan(p.k_layers, p.v_layers, bands(p)) for p in parts)
                ),
            )
            for parts in bases
        ),
    )


def _bands_for_error(
    part: Part, relative_error: float, progress: Progress | None
) -> tuple[Band, ...]:
    """The cheapest bands whose predicted error stays below the target."""
    allowed = relative_error**2 * part.energy
    try:
        return allocate_for_error(
            part.tables, allowed, RATIO_BITS * part.width, progress=progress
        ).bands
    except ValueError as error:
        raise UnsupportedError(
            f"max_relative_error={relative_error} cannot be met within {RATIO_BITS} bits per "
            f"value ({error}): ask for a larger error, or calibrate with a higher rank"
        ) from None


def _expecting(parts: tuple[Part, ...], plan: SectionPlan) -> SectionPlan:
    """The plan with the errors that the parts' tables predict for it."""
    error, energy = {"k": 0.0, "v": 0.0}, {"k": 0.0, "v": 0.0}
    for part, dealt in zip(parts, plan.parts, strict=True):
        if part.k_layers and part.v_layers:
            return plan  # the tables do not tell K and V apart
        kind = "k" if part.k_layers else "v"
        error[kind] += part.tables.error(dealt.bands)
        energy[kind] += part.energy
    expected = {n: math.sqrt(error[n] / energy[n]) if energy[n] else 0.0 for n in error}
    return replace(plan, expected_k_error=expected["k"], expected_v_error=expected["v"])
