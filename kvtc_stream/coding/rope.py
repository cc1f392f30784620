"""Token vectors: from the cache's layout to one row per token and back, without and with RoPE.

The arithmetic of RoPE (SPEC, "RoPE"): angles are ``position * inv_freq`` in binary64. Their cosine
and sine are multiplied or divided by the attention scaling factor, then rounded to binary32. The
rotation is two products and a sum in binary32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats.geometry import Rope, Section

Float = NDArray[np.float32]
#: float32 or bfloat16.
Values = NDArray[Any]

_U32 = np.uint32


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


def gather(
    x: Values,
    layers: NDArray[np.int64],
    rotations: Rotations,
    rows: Float,
    mean: Float | None = None,
) -> None:
    """Gather token vectors: ``rows[t, (l, h, d)] = rotate(x[layers[l], h, t, d])``, less the mean.

    ``x`` is float32 or bfloat16 [layers, heads, tokens, dim]; ``rows`` float32 [≥ tokens, ≥ width],
    of which the first ``tokens`` rows and ``len(layers) * heads * dim`` columns are written, and
    ``mean`` float32 of so many.
    """
    r, shape = rotations, (len(layers), *x.shape[1:])
    bits, steps = _flat(x)
    target, (row, _) = _flat(rows)
    turns = r.cos, r.sin, r.table, r.pairs, r.interleaved
    _gather(bits, steps, shape, layers, *turns, _mean(mean, shape), target.view(np.float32), row)


def scatter(rows: Float, rotations: Rotations, out: Values, mean: Float | None = None) -> None:
    """The inverse of :func:`gather`: ``out[l, h, t, d] = rotate(rows[t, (l, h, d)] + mean[…])``.

    ``rotations`` are those of ``out``'s layers; values of a head lie side by side in ``out``. They
    are rounded to nearest, ties to even.
    """
    r, shape = rotations, out.shape
    bits, steps = _flat(out)
    source, (row, _) = _flat(rows)
    turns = r.cos, r.sin, r.table, r.pairs, r.interleaved
    _scatter(source.view(np.float32), row, *turns, _mean(mean, shape), bits, steps, shape)


def squared_errors(
    x: Values,
    y: Values,
    error: NDArray[np.float64] | None = None,
    energy: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Σ(y−x)² and Σx² per layer and token: float64 [layers, tokens], those that are given or new.

    ``x`` and ``y`` are float32 or bfloat16 [layers, heads, tokens, dim]. Where a value is not
    finite, a sum is not finite.
    """
    shape = x.shape[0], x.shape[2]
    error = np.empty(shape) if error is None else error
    energy = np.empty(shape) if energy is None else energy
    _squared_errors(*_flat(x), *_flat(y), x.shape, error, energy)
    return error, energy


def _mean(mean: Float | None, shape: tuple[int, ...]) -> Float:
    return np.zeros(shape[0] * shape[1] * shape[3], np.float32) if mean is None else mean


def _flat(x: Values) -> tuple[NDArray[np.unsignedinteger[Any]], tuple[int, ...]]:
    """The bits of an array as one of one dimension, and how far its indices are apart there.

    So kernels need no versions for other layouts, and see that values lie side by side.
    """
    if x.strides[-1] != x.itemsize or min(x.strides) < 0:
        x = np.ascontiguousarray(x)
    bits = x.view(np.uint32 if x.dtype == np.float32 else np.uint16)
    steps = tuple(stride // x.itemsize for stride in x.strides)
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, steps, strict=True))
    return as_strided(bits, (size if x.size else 0,), (x.itemsize,)), steps


@numba.njit(cache=True, nogil=True)
def _wide(bits, size):  # type: ignore[no-untyped-def]
    """Bits of float32 or bfloat16, that have so many bytes, to float32."""
    return _U32(_U32(bits) << _U32(32 - 8 * size)).view(np.float32)


@numba.njit(cache=True, nogil=True)
def _narrow(x, out):  # type: ignore[no-untyped-def]
    """float32 to the bits of float32 or bfloat16."""
    bits = x.view(np.uint32)
    if out.itemsize == 4:
        for i in range(out.size):
            out[i] = bits[i]
        return
    for i in range(out.size):
        b = bits[i]
        rounded = _U32(b + _U32(0x7FFF) + (b >> _U32(16) & _U32(1)))
        # Rounding could make an infinity of a NaN.
        quiet = _U32(b & _U32(0x80000000)) | _U32(0x7FC00000)
        chosen = quiet if b & _U32(0x7FFFFFFF) > _U32(0x7F800000) else rounded
        out[i] = chosen >> _U32(16)


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
def _gather(x, steps, shape, layers, cos, sin, table, pairs, interleaved, mean, rows, row):  # type: ignore[no-untyped-def]
    count, heads, tokens, dim = shape
    plain, turned = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for i in range(count):
        layer = layers[i]
        k = table[layer]
        for h in range(heads):
            column = (i * heads + h) * dim
            centre = mean[column : column + dim]
            for t in range(tokens):
                first = layer * steps[0] + h * steps[1] + t * steps[2]
                source = x[first : first + dim]
                for d in range(dim):
                    plain[d] = _wide(source[d], x.itemsize)
                out = rows[t * row + column : t * row + column + dim]
                if k < 0:
                    for d in range(dim):
                        out[d] = plain[d] - centre[d]
                else:
                    _rotate(plain, cos[k, t], sin[k, t], pairs[k], interleaved[k], turned)
                    for d in range(dim):
                        out[d] = turned[d] - centre[d]


@numba.njit(cache=True, nogil=True)
def _scatter(rows, row, cos, sin, table, pairs, interleaved, mean, out, steps, shape):  # type: ignore[no-untyped-def]
    layers, heads, tokens, dim = shape
    plain, turned = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for layer in range(layers):
        k = table[layer]
        for h in range(heads):
            column = (layer * heads + h) * dim
            centre = mean[column : column + dim]
            for t in range(tokens):
                x = rows[t * row + column : t * row + column + dim]
                for d in range(dim):
                    plain[d] = x[d] + centre[d]
                first = layer * steps[0] + h * steps[1] + t * steps[2]
                target = out[first : first + dim]
                if k < 0:
                    _narrow(plain, target)
                else:
                    _rotate(plain, cos[k, t], sin[k, t], pairs[k], interleaved[k], turned)
                    _narrow(turned, target)


@numba.njit(cache=True, nogil=True)
def _squared_errors(x, x_steps, y, y_steps, shape, error, energy):  # type: ignore[no-untyped-def]
    layers, heads, tokens, dim = shape
    error[:] = 0
    energy[:] = 0
    for layer in range(layers):
        for h in range(heads):
            for t in range(tokens):
                of_x = layer * x_steps[0] + h * x_steps[1] + t * x_steps[2]
                of_y = layer * y_steps[0] + h * y_steps[1] + t * y_steps[2]
                a, b = x[of_x : of_x + dim], y[of_y : of_y + dim]
                e = 0.0
                n = 0.0
                for d in range(dim):
                    value = np.float64(_wide(a[d], x.itemsize))
                    delta = np.float64(_wide(b[d], y.itemsize)) - value
                    e += delta * delta
                    n += value * value
                error[layer, t] += e
                energy[layer, t] += n
