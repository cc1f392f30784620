"""Token vectors: from the cache's layout to one row per token and back, without and with RoPE.

The arithmetic of RoPE (SPEC, "RoPE"): angles are ``position * inv_freq`` in binary64. Their cosine
and sine are multiplied or divided by the attention scaling factor, then rounded to binary32. The
rotation is two products and a sum in binary32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats.geometry import Rope, Section

Float = NDArray[np.float32]


def check_axes(section: Section) -> None:
    """Raise ``UnsupportedError`` if keys are rotated by positions on several axes (M-RoPE)."""
    if section.axes:
        raise UnsupportedError(
            f"keys with positions on {section.axes} axes (M-RoPE) cannot be coded yet: write them "
            "verbatim, or before RoPE with a section that has no rotary tables"
        )


@dataclass(frozen=True)
class Rotations:
    """The rotations of some tokens, for :func:`gather` and :func:`scatter`.

    ``cos`` and ``sin`` are [tables, tokens, pairs], one table per distinct :class:`Rope`. ``table``
    has the table of each layer (-1: no rotation). ``pairs`` and ``interleaved`` are per table.
    """

    cos: Float
    sin: Float
    table: NDArray[np.int64]
    pairs: NDArray[np.int64]
    interleaved: NDArray[np.bool_]

    @classmethod
    def of(cls, section: Section, positions: NDArray[np.int64], *, inverse: bool) -> Rotations:
        """Rotations that apply RoPE, or with ``inverse`` remove it."""
        return cls._each(section, positions, [inverse])[0]

    @classmethod
    def both(cls, section: Section, positions: NDArray[np.int64]) -> list[Rotations]:
        """Rotations that apply RoPE, and those that remove it: sooner than one after the other."""
        return cls._each(section, positions, [False, True])

    @classmethod
    def _each(
        cls, section: Section, positions: NDArray[np.int64], inverses: Sequence[bool]
    ) -> list[Rotations]:
        check_axes(section)
        ropes: list[Rope] = list(dict.fromkeys(r for r in section.rope if r is not None))
        per_layer: Sequence[Rope | None] = section.rope or (None,) * len(section.layers)
        table = np.array([-1 if r is None else ropes.index(r) for r in per_layer], np.int64)
        pairs = np.array([len(r.inv_freq) for r in ropes], np.int64)
        interleaved = np.array([r.interleaved for r in ropes], np.bool_)
        shape = (len(ropes), len(positions), int(pairs.max(initial=0)))
        found = [
            cls(np.zeros(shape, np.float32), np.zeros(shape, np.float32), table, pairs, interleaved)
            for _ in inverses
        ]
        for i, rope in enumerate(ropes):
            angles = np.multiply.outer(
                positions.astype(np.float64), np.array(rope.inv_freq, np.float64)
            )
            cosines, sines = np.cos(angles), np.sin(angles)
            for rotations, inverse in zip(found, inverses, strict=True):
                scale = 1 / rope.scale if inverse else rope.scale
                rotations.cos[i, :, : pairs[i]] = cosines * scale
                rotations.sin[i, :, : pairs[i]] = sines * (-scale if inverse else scale)
        return found

    @classmethod
    def none(cls, layers: int) -> Rotations:
        """No rotation: for V, and for keys without RoPE."""
        empty = np.zeros((0, 0, 0), np.float32)
        return cls(empty, empty, np.full(layers, -1), np.zeros(0, np.int64), np.zeros(0, np.bool_))

    def select(self, layers: Sequence[int]) -> Rotations:
        """The rotations of some layers only."""
        return Rotations(self.cos, self.sin, self.table[list(layers)], self.pairs, self.interleaved)


def gather(x: Float, layers: NDArray[np.int64], rotations: Rotations, rows: Float) -> None:
    """Gather token vectors: ``rows[t, (l, h, d)] = rotate(x[layers[l], h, t, d])``.

    ``x`` is float32 [layers, heads, tokens, dim]; ``rows`` float32 [≥ tokens, ≥ width], of which
    the first ``tokens`` rows and ``len(layers) * heads * dim`` columns are written.
    """
    r = rotations
    _gather(x, layers, r.cos, r.sin, r.table, r.pairs, r.interleaved, rows)


def scatter(rows: Float, rotations: Rotations, out: Float) -> None:
    """The inverse of :func:`gather`: ``out[l, h, t, d] = rotate(rows[t, (l, h, d)])``.

    ``rotations`` are those of ``out``'s layers.
    """
    r = rotations
    _scatter(rows, r.cos, r.sin, r.table, r.pairs, r.interleaved, out)


@numba.njit(cache=True, nogil=True)
def _rotate(x, cos, sin, pairs, interleaved, out):  # type: ignore[no-untyped-def]
    dim = x.shape[0]
    if interleaved:
        for i in range(pairs):
            a, b = x[2 * i], x[2 * i + 1]
            out[2 * i] = a * cos[i] - b * sin[i]
            out[2 * i + 1] = b * cos[i] + a * sin[i]
    else:
        for i in range(pairs):
            a, b = x[i], x[i + pairs]
            out[i] = a * cos[i] - b * sin[i]
            out[i + pairs] = b * cos[i] + a * sin[i]
    for i in range(2 * pairs, dim):
        out[i] = x[i]


@numba.njit(cache=True, nogil=True)
def _gather(x, layers, cos, sin, table, pairs, interleaved, rows):  # type: ignore[no-untyped-def]
    _, heads, tokens, dim = x.shape
    for i in range(layers.shape[0]):
        layer = layers[i]
        k = table[layer]
        for h in range(heads):
            column = (i * heads + h) * dim
            for t in range(tokens):
                out = rows[t, column : column + dim]
                if k < 0:
                    for d in range(dim):
                        out[d] = x[layer, h, t, d]
                else:
                    _rotate(x[layer, h, t], cos[k, t], sin[k, t], pairs[k], interleaved[k], out)


@numba.njit(cache=True, nogil=True)
def _scatter(rows, cos, sin, table, pairs, interleaved, out):  # type: ignore[no-untyped-def]
    layers, heads, tokens, dim = out.shape
    for layer in range(layers):
        k = table[layer]
        for h in range(heads):
            column = (layer * heads + h) * dim
            for t in range(tokens):
                x = rows[t, column : column + dim]
                if k < 0:
                    for d in range(dim):
                        out[layer, h, t, d] = x[d]
                else:
                    _rotate(x, cos[k, t], sin[k, t], pairs[k], interleaved[k], out[layer, h, t])


@numba.njit(cache=True, nogil=True)
def squared_errors(x, y):  # type: ignore[no-untyped-def]
    """Σ(y−x)² and Σx² per layer and token: float64 [layers, tokens].

    ``x`` and ``y`` are float32 [layers, heads, tokens, dim]. Where a value is not finite, a sum is
    not finite.
    """
    layers, heads, tokens, dim = x.shape
    error = np.zeros((layers, tokens), np.float64)
    energy = np.zeros((layers, tokens), np.float64)
    for layer in range(layers):
        for h in range(heads):
            for t in range(tokens):
                e = 0.0
                n = 0.0
                for d in range(dim):
                    a = np.float64(x[layer, h, t, d])
                    delta = np.float64(y[layer, h, t, d]) - a
                    e += delta * delta
                    n += a * a
                error[layer, t] += e
                energy[layer, t] += n
    return error, energy
