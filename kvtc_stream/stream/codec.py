"""The codec: a calibration, a plan and the choices of a stream, as one immutable value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Integral, Real
from typing import Any

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.formats import Coder, DType, Limits, Plan
from kvtc_stream.formats.coders import BYTE_CODERS
from kvtc_stream.io.dlpack import BackendName
from kvtc_stream.planning.rate_control import Target
from kvtc_stream.planning.targets import make_plan
from kvtc_stream.progress import Progress


def expect_calibration(found: Any) -> None:
    """``TypeError`` for a path or a codec in a calibration's place."""
    if not isinstance(found, Calibration):
        raise TypeError(
            f"calibration must be a Calibration, found {type(found).__name__}: load one with "
            f"Calibration.load(path)"
        )


def expect_codec(found: Any) -> None:
    """``TypeError`` for a calibration in a codec's place."""
    if not isinstance(found, Codec):
        raise TypeError(
            f"codec must be a Codec, found {type(found).__name__}: make one with "
            f"Codec(calibration, ratio=16)"
        )


@dataclass(frozen=True)
class Preset:
    """A named way to code: a basis, and an entropy coder; with ``RANS`` bands are uniform."""

    basis: str
    coder: Coder

    @property
    def uniform(self) -> bool:
        """Whether bands are uniform, and a target is one for the coded size of each stream."""
        return self.coder is Coder.RANS


#: ``paper`` is the published KVTC (arXiv 2511.01815); it departs from it only where SPEC says so.
#: ``default`` codes K and V together, weighted by what errors cost the model, with uniform bands.
PRESETS: Mapping[str, Preset] = {
    "paper": Preset(basis="separate", coder=Coder.DEFLATE),
    "default": Preset(basis="joint", coder=Coder.RANS),
}


#: Names of the targets, of which a codec has one.
TARGETS = ("ratio", "bits_per_token", "mean_error")


#: How many times ``error_bound`` one layer of a token may lose, if nothing else is said.
LAYER_FACTOR = 5.0


@dataclass(frozen=True)
class Codec:
    """How to code a stream. Immutable; safe to share between threads and streams.

    Making a codec makes no plan: :attr:`plan` does when it is first asked for, or the first encoder
    that starts.

    Parameters
    ----------
    calibration
        What was learnt about the model's cache.
    preset
        A name from :data:`PRESETS`.
    ratio, bits_per_token, mean_error
        The target, at most one; 16 times if none is given.

        With ``default`` it is one for what each stream really takes, of the tokens that are coded
        and in every section, met within 2 %: the encoder adapts its step from block to block.
        ``ratio``: bytes of the cache, in its dtype, over bytes of the stream.
        ``bits_per_token``: of all sections together. ``mean_error``: the mean over tokens
        of ‖x̂−x‖/‖x‖, the larger of K's and V's.

        With ``paper`` it is one for the plan. ``ratio``: 16 bits per value over the plan's bits
        before entropy coding, as published. ``bits_per_token``: the plan's bits for one token of
        all sections. ``mean_error``: the cheapest plan whose *predicted* error (root mean
        square over calibration rows) stays below it, K and V each.
    error_bound
        A bound, not a target: a token whose measured relative error in K or in V would exceed it
        is stored verbatim. Needs ``measure=True``. Without it the bound is 2: what lies beyond
        is no reconstruction at all.
    layer_error_bound
        The same in each layer by itself: errors over all layers say little of a layer whose keys or
        values are small beside others'. Five times ``error_bound`` unless given; ``math.inf``
        leaves layers alone.
    sinks
        Tokens at positions below this travel verbatim (attention sinks).
    window
        At least so many of the latest tokens of a finished stream travel verbatim. Those that do
        not fill a block join them, so that a stream can be continued as if it had not ended: with
        the default of 1 they are 1 to ``block_tokens``. With 0 the last block may be short, and
        what is appended begins another.
    block_tokens
        Tokens per block: the unit of random access and of memory.
    coder
        Entropy coder: a name of :class:`Coder`, lower case; the preset's by default. ``default``
        has no other than ``"rans"``.
    out_dtype
        Element type of the decoded cache; by default as encoded, bfloat16 for fp8 input.
    measure
        Whether errors are measured on the reconstruction, after the final cast, and recorded.
        Without, the encoder saves the second matrix product, and streams tell no errors.
    backend
        ``"cpu"``, ``"cuda"``, or ``"auto"``: CUDA for tensors on a CUDA device, else the CPU.
    fixed_plan
        A plan made before (:attr:`plan` of another codec, or one that was saved), instead of a
        target: steps then stay as planned.

    Examples
    --------
    >>> import kvtc_stream as kvtc
    >>> calibration = kvtc.testing.tiny_calibration()
    >>> codec = kvtc.Codec(calibration, ratio=8, window=32)
    >>> codec.target
    Target(name='ratio', value=8)
    """

    calibration: Calibration
    preset: str = "default"
    _: KW_ONLY
    ratio: float | None = None
    bits_per_token: float | None = None
    mean_error: float | None = None
    error_bound: float | None = None
    layer_error_bound: float | None = None
    sinks: int = 4
    window: int = 1
    block_tokens: int = 128
    coder: str | None = None
    out_dtype: str | None = None
    measure: bool = True
    backend: BackendName = "auto"
    fixed_plan: Plan | None = None

    def __post_init__(self) -> None:
        expect_calibration(self.calibration)
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, found {self.preset!r}")
        preset = PRESETS[self.preset]
        for name, value, accepted in (
            ("coder", self.coder, [c.name.lower() for c in (*BYTE_CODERS, Coder.RANS)]),
            ("out_dtype", self.out_dtype, [d.label for d in DType]),
            ("measure", self.measure, [True, False]),
            ("backend", self.backend, ["auto", "cpu", "cuda"]),
        ):
            if value is not None and value not in accepted:
                shown = ", ".join(map(str, accepted))
                raise ValueError(f"{name} must be one of {shown}, found {value!r}")
        for name in (*TARGETS, "error_bound", "layer_error_bound"):
            number = getattr(self, name)
            if number is not None and not isinstance(number, Real):
                raise TypeError(f"{name} must be a number, found {number!r}")
        for name, bound in (
            ("error_bound", self.error_bound),
            ("layer_error_bound", self.layer_error_bound),
        ):
            if bound is not None and not bound >= 0:
                raise ValueError(f"{name} must be at least 0, found {bound}")
            if bound is not None and not self.measure:
                raise ValueError(f"{name} bounds the measured error: it needs measure=True")
        for name, count, least, most in (
            ("sinks", self.sinks, 0, 2**32 - 1),
            ("window", self.window, 0, 2**32 - 1),
            ("block_tokens", self.block_tokens, 1, Limits().max_block_tokens),
        ):
            if not isinstance(count, Integral):
                raise TypeError(f"{name} must be an integer, found {count!r}")
            if not least <= count <= most:
                raise ValueError(f"{name} must be from {least} to {most}, found {count}")
        if preset.uniform != (self.byte_coder is Coder.RANS):
            raise ValueError(
                f"preset {self.preset!r} codes with {preset.coder.name.lower()}, found "
                f"coder={self.coder!r}: rans is for uniform bands, which need it"
            )
        if len(self._targets) > 1:
            raise ValueError(f"give one target, found {' and '.join(self._targets)}")
        for name, goal in self._targets.items():
            if not (math.isfinite(goal) and goal > 0):
                raise ValueError(f"{name} must be positive and finite, found {goal}")
        for section in self.calibration.sections:
            section.basis(preset.basis)
        if self.fixed_plan is not None:
            if self._targets:
                raise ValueError(
                    f"fixed_plan leaves nothing to choose: leave out {', '.join(self._targets)}"
                )
            self._check(self.fixed_plan)

    def __repr__(self) -> str:
        """The target, and what is not as by default."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}
        if self.target is not None:
            shown[self.target.name] = self.target.value
        return f"Codec({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def _targets(self) -> dict[str, float]:
        """The targets that were given."""
        values = {name: getattr(self, name) for name in TARGETS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def target(self) -> Target | None:
        """What the codec aims at; ``None`` with a fixed plan."""
        if self.fixed_plan is not None:
            return None
        return Target(*next(iter(self._targets.items()), ("ratio", 16.0)))

    @property
    def adapts(self) -> Target | None:
        """What encoders adapt their steps to; ``None`` if bands are not uniform, or the plan is
        fixed."""
        return self.target if PRESETS[self.preset].uniform else None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The error bound of a token, over all layers and in each."""
        by_layer = self.layer_error_bound
        if by_layer is None and self.error_bound is not None:
            by_layer = LAYER_FACTOR * self.error_bound
        return self.error_bound, by_layer

    @property
    def byte_coder(self) -> Coder:
        """The entropy coder."""
        return PRESETS[self.preset].coder if self.coder is None else Coder[self.coder.upper()]

    @property
    def plan(self) -> Plan:
        """How bits are dealt out; see :meth:`make_plan`."""
        return self.make_plan()

    def make_plan(self, progress: Progress | None = None) -> Plan:
        """The fixed plan, or the one for the target: made once, and kept with the calibration.

        ``progress`` is called with rows of the dynamic program done and in all: seconds, for large
        models. Safe across threads, which wait for the one that plans.
        """
        if self.target is None:
            assert self.fixed_plan is not None
            return self.fixed_plan
        preset, target = PRESETS[self.preset], self.target
        plan: Plan = self.calibration.memo(
            ("plan", self.preset, target),
            lambda: make_plan(
                self.calibration,
                self.preset,
                preset.basis,
                target.name,
                target.value,
                uniform=preset.uniform,
                progress=progress,
            ),
        )
        return plan

    def _check(self, plan: Plan) -> None:
        """Raise unless the plan is one for this calibration and preset."""
        plan.check(self.calibration.geometry)
        uniform = PRESETS[self.preset].uniform
        for dealt in plan.sections:
            if dealt.uniform != uniform and any(p.bands for p in dealt.parts):
                raise ValueError(
                    f"the plan {'has' if dealt.uniform else 'lacks'} uniform bands, it is not for "
                    f"preset {self.preset!r}: choose the preset that it was made with"
                )
        for section, dealt in zip(self.calibration.sections, plan.sections, strict=True):
            section.parts(dealt)
