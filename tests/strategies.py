"""Hypothesis strategies: geometries, caches with hostile values, and ways to cut a stream."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import kvtc_stream as kvtc
from kvtc_stream.io.dlpack import numpy_dtype

Array = NDArray[Any]

dtypes = st.sampled_from(list(kvtc.DType))


@st.composite
def ropes(draw: st.DrawFn, k_dim: int) -> kvtc.Rope | None:
    """No RoPE, or one on all or some channels, in either pairing, unscaled or with a scale."""
    pairs = draw(st.integers(0, k_dim // 2))
    if pairs == 0:
        return None
    theta = draw(st.sampled_from([1e2, 1e4, 5e5]))
    table = kvtc.Rope.from_theta(theta, 2 * pairs).inv_freq
    # A model's scaling rule changes the table and perhaps the amplitude.
    stretch = draw(st.sampled_from([1.0, 1 / 8]))
    scale = draw(st.sampled_from([1.0, 0.5, 1.2]))
    return kvtc.Rope(tuple(f * stretch for f in table), draw(st.booleans()), scale)


@st.composite
def sections(draw: st.DrawFn, numbers: Sequence[int]) -> kvtc.Section:
    """A section of these layers."""
    k_dim = draw(st.integers(1, 8))
    shared = draw(st.one_of(st.none(), ropes(k_dim)))
    per_layer = st.one_of(st.just(shared), ropes(k_dim))
    return kvtc.Section(
        tuple(numbers),
        draw(st.integers(1, 3)),
        k_dim,
        draw(st.integers(1, 8)),
        tuple(draw(per_layer) for _ in numbers),
    )


@st.composite
def geometries(draw: st.DrawFn, max_sections: int = 2) -> kvtc.Geometry:
    """One section or more, whose layers may alternate."""
    count = draw(st.integers(1, max_sections))
    owners = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
    numbers = [[i for i, owner in enumerate(owners) if owner == s] for s in range(count)]
    return kvtc.Geometry(tuple(draw(sections(n)) for n in numbers if n))


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[slice]:
    """``size`` things in consecutive pieces, some of them empty."""
    inner = draw(st.lists(st.integers(0, size), max_size=8))
    bounds = [0, *sorted(inner), size]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


@st.composite
def positions(draw: st.DrawFn, tokens: int) -> NDArray[np.int64] | None:
    """Contiguous from 0, or with gaps, or from far away."""
    kind = draw(st.sampled_from(["default", "gaps", "far"]))
    if kind == "default":
        return None
    gaps = draw(st.lists(st.integers(1, 5), min_size=tokens, max_size=tokens))
    first = draw(st.integers(-1, 3)) if kind == "gaps" else draw(st.integers(0, 10**6))
    return first + np.cumsum(np.array(gaps, np.int64))


#: What a token's values may become; of float32, before the cast to the cache's dtype.
HOSTILE = {
    "zero": 0.0,
    "constant": 3.0,
    "tiny": 1e-30,
    "denormal": 1e-44,
    "half denormal": 6e-8,
    "large": 3e4,
    "huge": 3e38,
    "nan": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
}


@dataclass(frozen=True)
class Edit:
    """Spoils one token's K, V or both: one channel or all."""

    token: int
    value: str
    where: str
    channel: int | None

    def apply(self, k: Array, v: Array) -> None:
        for name, x in (("k", k), ("v", v)):
            if name in self.where:
                if self.channel is None:
                    x[:, :, self.token] = HOSTILE[self.value]
                else:
                    x[0, 0, self.token, self.channel % x.shape[-1]] = HOSTILE[self.value]


def edits(tokens: int) -> st.SearchStrategy[list[Edit]]:
    """A few spoilt tokens."""
    if tokens == 0:
        return st.just([])
    return st.lists(
        st.builds(
            Edit,
            token=st.integers(0, tokens - 1),
            value=st.sampled_from(sorted(HOSTILE)),
            where=st.sampled_from(["k", "v", "kv"]),
            channel=st.none() | st.integers(0, 7),
        ),
        max_size=4,
    )


@dataclass(frozen=True)
class Tokens:
    """What goes into one section: the cache in its dtype, its positions, the pieces it comes in."""

    k: Array = field(repr=False)
    v: Array = field(repr=False)
    positions: NDArray[np.int64] | None
    pieces: list[slice]
    edits: list[Edit]

    @property
    def count(self) -> int:
        return int(self.k.shape[2])

    @property
    def known_positions(self) -> NDArray[np.int64]:
        return np.arange(self.count) if self.positions is None else self.positions


@st.composite
def section_tokens(
    draw: st.DrawFn,
    geometry: kvtc.Geometry,
    section: int,
    dtype: kvtc.DType,
    *,
    max_tokens: int = 70,
    hostile: bool = True,
) -> Tokens:
    """A cache of one section."""
    count = draw(st.integers(2, max_tokens) | st.integers(0, max_tokens))
    k, v = kvtc.testing.drawn_cache(geometry, count, seed=count, section=section)
    spoilt = draw(edits(count)) if hostile else []
    for edit in spoilt:
        edit.apply(k, v)
    with np.errstate(over="ignore", invalid="ignore"):
        k, v = (x.astype(numpy_dtype(dtype)) for x in (k, v))
    return Tokens(k, v, draw(positions(count)), draw(cuts(count)), spoilt)


@dataclass(frozen=True)
class Case:
    """A codec, and what to encode with it."""

    codec: kvtc.Codec
    dtype: kvtc.DType
    #: Arguments of ``codec.encoder``.
    options: dict[str, Any]
    sections: list[Tokens]


@lru_cache(maxsize=256)
def calibrate(geometry: kvtc.Geometry, **options: Any) -> kvtc.Calibration:
    """A calibration on drawn caches, long enough not to warn."""
    calibrator = kvtc.Calibrator(geometry, **options)
    for section in range(len(geometry.sections)):
        calibrator.update(
            *kvtc.testing.drawn_cache(geometry, 420, seed=99, section=section), section=section
        )
    return calibrator.finish()


def scales(section: kvtc.Section) -> st.SearchStrategy[Any]:
    """A scale of an fp8 cache: none, one, or one a layer or head."""
    layers, heads = len(section.layers), section.kv_heads
    value = st.sampled_from([0.01, 0.5, 1.0, 3.0])
    return st.one_of(
        st.none(),
        value,
        st.lists(value, min_size=layers, max_size=layers).map(np.array),
        st.lists(value, min_size=layers * heads, max_size=layers * heads).map(
            lambda x: np.array(x).reshape(layers, heads)
        ),
    )


#: For tests whose examples are long: a third as many.
FEWER = settings(max_examples=max(8, settings.default.max_examples // 3))

BYTE_CODERS = ("deflate", "zstd", "lz4", "stored")


@st.composite
def cases(draw: st.DrawFn, *, hostile: bool = True) -> Case:
    """Everything that a stream depends on."""
    geometry = draw(geometries())
    dtype = draw(dtypes)
    options: dict[str, Any] = {}
    if dtype.is_fp8 and len(geometry.sections) == 1:
        options = {name: draw(scales(geometry.sections[0])) for name in ("k_scale", "v_scale")}
    preset, coder = draw(
        st.sampled_from([("default", "rans"), *(("paper", c) for c in BYTE_CODERS)])
    )
    levels = draw(st.sampled_from([{}, {"layer_groups": 2, "second_level": 6}]))
    codec = kvtc.Codec(
        calibrate(geometry, **levels),
        preset,
        ratio=draw(st.sampled_from([1.5, 3, 8, 1000])),
        sinks=draw(st.integers(0, 20)),
        window=draw(st.sampled_from([0, 1, 20])),
        block_tokens=draw(st.sampled_from([1, 7, 16])),
        coder=coder,
        error_bound=draw(st.sampled_from([None, None, 0.0, 0.05, 0.5])),
    )
    tokens = [
        draw(section_tokens(geometry, i, dtype, hostile=hostile))
        for i in range(len(geometry.sections))
    ]
    return Case(codec, dtype, options, tokens)


def encode(case: Case, *, whole: bool = False) -> bytes:
    """The stream of a case; ``whole``: each section in one piece."""
    encoder = kvtc.Encoder(case.codec, **case.options)
    data = b""
    for i, tokens in enumerate(case.sections):
        # Give the dtype even where a section has no tokens.
        for piece in [slice(None)] if whole else tokens.pieces:
            data += encoder.encode(
                tokens.k[:, :, piece],
                tokens.v[:, :, piece],
                positions=None if tokens.positions is None else tokens.positions[piece],
                section=i,
            )
    return data + encoder.finish()
