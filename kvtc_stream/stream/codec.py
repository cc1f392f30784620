"""The codec: a calibration, a plan and the choices of a stream, as one immutable value."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import KW_ONLY, InitVar, dataclass

from kvtc_stream.backends.base import Measure
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.formats import Coder, DType, Limits, Plan
from kvtc_stream.io.dlpack import BackendName
from kvtc_stream.planning.rate_control import Target
from kvtc_stream.planning.targets import make_plan
from kvtc_stream.progress import Progress


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


@dataclass(frozen=True)
class Codec:
    """How to code a stream. Immutable; safe to share between threads and streams.

    Parameters
    ----------
    calibration
        What was learnt about the model's cache.
    preset
        A name from :data:`PRESETS`.
    ratio, bits_per_token, max_relative_error
        The target, at most one; 16 times if none is given.

        With ``default`` it is one for what each stream really takes, of the tokens that are coded
        and in every section, met within 2 %: the encoder adapts its step from block to block.
        ``ratio``: bytes of the cache, in its dtype, over bytes of the stream.
        ``bits_per_token``: of all sections together. ``max_relative_error``: the mean over tokens
        of ‖x̂−x‖/‖x‖, the larger of K's and V's.

        With ``paper`` it is one for the plan. ``ratio``: 16 bits per value over the plan's bits
        before entropy coding, as published. ``bits_per_token``: the plan's bits for one token of
        all sections. ``max_relative_error``: the cheapest plan whose *predicted* error (root mean
        square over calibration rows) stays below it, K and V each.
    max_error
        A bound, not a target: a token whose measured relative error in K or in V would exceed it
        is stored verbatim. Implies ``measure="full"``. Without it the bound is 2: what lies beyond
        is no reconstruction at all.
    sinks
        Tokens at positions below this travel verbatim (attention sinks).
    window
        The latest tokens of a finished stream that travel verbatim.
    block_tokens
        Tokens per block: the unit of random access and of memory.
    coder
        Entropy coder: a name of :class:`Coder`, lower case; the preset's by default. ``default``
        has no other than ``"rans"``.
    out_dtype
        Element type of the decoded cache; by default as encoded, bfloat16 for fp8 input.
    measure
        ``"full"``: errors are measured on the reconstruction, after the final cast.
        ``"coefficients"``: on the coefficients, which saves the encoder the second product.
        ``"none"``: not at all.
    backend
        ``"cpu"``, ``"cuda"``, or ``"auto"``: CUDA for tensors on a CUDA device, else the CPU.
    plan
        A plan made before, instead of a target: steps then stay as planned.
        ``dataclasses.replace`` with a new target takes ``plan=None`` as well.
    progress
        Called with rows of the dynamic program done and in all, while planning.

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
    max_relative_error: float | None = None
    max_error: float | None = None
    sinks: int = 4
    window: int = 128
    block_tokens: int = 128
    coder: str | None = None
    out_dtype: str | None = None
    measure: Measure = "full"
    backend: BackendName = "auto"
    plan: Plan = None  # type: ignore[assignment]  # made from the target unless given
    progress: InitVar[Progress | None] = None

    def __post_init__(self, progress: Progress | None) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, found {self.preset!r}")
        preset = PRESETS[self.preset]
        for name, value, accepted in (
            ("coder", self.coder, [c.name.lower() for c in Coder]),
            ("out_dtype", self.out_dtype, [d.label for d in DType]),
            ("measure", self.measure, ["full", "coefficients", "none"]),
            ("backend", self.backend, ["auto", "cpu", "cuda"]),
        ):
            if value is not None and value not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, found {value!r}")
        if self.max_error is not None and not self.max_error >= 0:
            raise ValueError(f"max_error must be at least 0, found {self.max_error}")
        if self.max_error is not None and self.measure != "full":
            raise ValueError("max_error bounds the measured error: it needs measure='full'")
        for name, count, least, most in (
            ("sinks", self.sinks, 0, 2**32 - 1),
            ("window", self.window, 0, 2**32 - 1),
            ("block_tokens", self.block_tokens, 1, Limits().max_block_tokens),
        ):
            if not least <= operator.index(count) <= most:
                raise ValueError(f"{name} must be from {least} to {most}, found {count}")
        if self.coder is None:
            object.__setattr__(self, "coder", preset.coder.name.lower())
        if preset.uniform != (self.coder == "rans"):
            raise ValueError(
                f"preset {self.preset!r} codes with {preset.coder.name.lower()}, found "
                f"coder={self.coder!r}: rans is for uniform bands, which need it"
            )
        targets = {
            "ratio": self.ratio,
            "bits_per_token": self.bits_per_token,
            "max_relative_error": self.max_relative_error,
        }
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"give one target, found {' and '.join(given)}")
        if self.plan is None and not given:
            given = {"ratio": 16.0}
            object.__setattr__(self, "ratio", 16.0)
        for target, goal in given.items():
            plan = self.calibration.memo(
                ("plan", self.preset, target, goal),
                lambda t=target, g=goal: make_plan(
                    self.calibration,
                    self.preset,
                    preset.basis,
                    t,
                    g,
                    uniform=preset.uniform,
                    progress=progress,
                ),
            )
            # Both are there when ``dataclasses.replace`` changes another option.
            if self.plan not in (None, plan):
                raise ValueError(f"the plan is not the one for {target}={goal}: give one of them")
            object.__setattr__(self, "plan", plan)
        self.plan.check(self.calibration.geometry)
        for dealt in self.plan.sections:
            if dealt.uniform != preset.uniform and any(p.bands for p in dealt.parts):
                raise ValueError(
                    f"the plan {'has' if dealt.uniform else 'lacks'} uniform bands, it is not for "
                    f"preset {self.preset!r}: choose the preset that it was made with"
                )
        for section, dealt in zip(self.calibration.sections, self.plan.sections, strict=True):
            section.parts(dealt)

    @property
    def target(self) -> Target | None:
        """What encoders adapt to; ``None`` if bands are not uniform, or the plan was given."""
        if PRESETS[self.preset].uniform:
            for name in ("ratio", "bits_per_token", "max_relative_error"):
                if (value := getattr(self, name)) is not None:
                    return Target(name, value)
        return None
