"""Makes a plan that meets a target: a ratio, bits per token, or an error."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from kvtc_stream.calibration.band_tables import ErrorTables
from kvtc_stream.calibration.families import FamilyTables
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.parts import Part
from kvtc_stream.coding.rans import CLASS_BITS
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import Band, PartPlan, Plan, Quantiser, SectionPlan
from kvtc_stream.planning.dynamic import allocate, allocate_for_error
from kvtc_stream.progress import Progress

#: Ratios are relative to this many bits per value, whatever the cache's dtype (as published).
RATIO_BITS = 16

#: What leaving a component out of a uniform band costs, relative to its energy: its squared error,
#: and half of that again because all tokens lack it (see ``FamilyTables``). With 2.0, half as many
#: components more would be coded at high ratios (SmolLM2-135M at ratio 64: 4,607 instead of 3,045),
#: which takes time and does not improve predictions (benchmarks/results/two_levels.json).
LEFT_OUT = 1.5


def make_plan(
    calibration: Calibration,
    preset: str,
    basis: str,
    target: str,
    value: float,
    *,
    uniform: bool,
    progress: Progress | None = None,
) -> Plan:
    """Allocate bits to every part of every section.

    ``target`` is ``"ratio"``, ``"bits_per_token"`` or ``"mean_error"``. Bits are shared among parts
    by their width, so that K and V get the same ratio, as published; with uniform bands, among
    sections. An error is met by every part.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{target} must be positive and finite, found {value}")
    bases = [section.basis(basis) for section in calibration.sections]
    width = sum(part.width for parts in bases for part in parts)
    if uniform:
        return Plan(preset, tuple(_uniform_section(basis, p, target, value, width) for p in bases))

    def bands(part: Part) -> tuple[Band, ...]:
        if target == "mean_error":
            return _bands_for_error(part, value, progress)
        bits = RATIO_BITS * part.width / value if target == "ratio" else value * part.width / width
        maximum = part.rank * Band(1, Quantiser.FP8).bits  # no plan can spend more
        return allocate(_tables(part), int(min(bits, maximum)), progress=progress).bands

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


def _tables(part: Part) -> ErrorTables:
    if part.errors is None:
        raise UnsupportedError(
            "this basis of the calibration has no tables of bands, only of uniform ones: choose "
            "the preset that it is made for"
        )
    return part.errors


def _uniform_section(
    basis: str, parts: tuple[Part, ...], target: str, value: float, width: int
) -> SectionPlan:
    """Choose one base step for a section, and how many components of each part to code with it.

    The cost of a component does not depend on its neighbours, so no dynamic program is needed: a
    component is coded if the error that this saves is worth its bits, at the price at which the
    next smaller step would save as much. Components descend in variance, so the coded ones come
    first. (Different steps for different bands were tried, and gained nothing.) To meet an error,
    all components are coded: a cache unlike the calibration's may need any of them.
    """
    tables = [p.uniform for p in parts]
    families = [t.families for t in tables if t is not None]
    if len(families) < len(parts):
        raise UnsupportedError(
            f"basis {basis!r} of the calibration has no tables of uniform bands: choose the preset "
            f"that it is made for, or calibrate again"
        )
    steps = families[0].rate.shape[0]
    gained, spent = (
        np.gradient(sum(costs.sum(axis=1, dtype=np.float64) for costs in of_parts))
        for of_parts in ([f.distortion for f in families], [f.rate for f in families])
    )
    price = np.divide(-gained, spent, out=np.zeros(steps), where=spent < 0).clip(0)

    def coded(family: FamilyTables, j: int) -> int:
        saved = LEFT_OUT * family.energy - family.distortion[j] - price[j] * family.rate[j]
        return int(np.cumsum(saved).argmax()) + 1 if target != "mean_error" else len(saved)

    def bits(j: int) -> float:
        return sum(
            float(f.rate[j, : coded(f, j)].sum(dtype=np.float64)) + CLASS_BITS for f in families
        )

    errors = np.array(
        [[e[j] for j in range(steps)] for t in tables if t for e in (t.k_errors, t.v_errors)]
    )
    if target == "mean_error":
        met = np.flatnonzero(errors.max(axis=0) <= value)
        if not met.size:
            raise UnsupportedError(
                f"mean_error={value} cannot be met: the finest step is expected to lose "
                f"{errors[:, 0].max():.3g}; ask for a larger error, or calibrate with a higher rank"
            )
        step = int(met[-1])
    else:
        own = sum(p.width for p in parts)
        goal = RATIO_BITS * own / value if target == "ratio" else value * own / width
        step = int(np.argmin([abs(math.log(max(bits(j), 1e-9) / goal)) for j in range(steps)]))
    return SectionPlan(
        basis,
        tuple(
            PartPlan(p.k_layers, p.v_layers, (Band(coded(f, step), Quantiser.UNIFORM, step),))
            for p, f in zip(parts, families, strict=True)
        ),
        float(errors[::2, step].max()),
        float(errors[1::2, step].max()),
        bits(step),
    )


def _bands_for_error(
    part: Part, relative_error: float, progress: Progress | None
) -> tuple[Band, ...]:
    """The bands with the fewest bits whose predicted error stays below the target."""
    allowed = relative_error**2 * part.energy
    try:
        return allocate_for_error(
            _tables(part), allowed, RATIO_BITS * part.width, progress=progress
        ).bands
    except ValueError as error:
        raise UnsupportedError(
            f"mean_error={relative_error} cannot be met within {RATIO_BITS} bits per "
            f"value ({error}): ask for a larger error, or calibrate with a higher rank"
        ) from None


def _expecting(parts: tuple[Part, ...], plan: SectionPlan) -> SectionPlan:
    """The plan with the errors of K and V that the parts' tables predict."""
    error, energy = {"k": 0.0, "v": 0.0}, {"k": 0.0, "v": 0.0}
    for part, dealt in zip(parts, plan.parts, strict=True):
        if part.k_layers and part.v_layers:
            return plan  # tables of a joint part do not tell K and V apart
        side = "k" if part.k_layers else "v"
        error[side] += _tables(part).error(dealt.bands)
        energy[side] += part.energy
    expected = {n: math.sqrt(error[n] / energy[n]) if energy[n] else 0.0 for n in error}
    return replace(plan, expected_k_error=expected["k"], expected_v_error=expected["v"])
