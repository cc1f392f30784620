"""The principal components of a part: one matrix, or a product of smaller ones in two levels.

Two levels are a hierarchical Karhunen-Loève transform: each group of columns has its own
components, and the leading coefficients of all groups are transformed once more, together. This
needs fewer multiply-adds than one matrix for all columns, and compacts energy nearly as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.weights import apply_blocks, blocks_of

#: A NumPy array, or one of a module like it.
Array = Any


@dataclass(frozen=True, eq=False)
class Components:
    """A matrix [rank, width] with orthonormal rows, before weights are applied to it.

    Methods take and return arrays of ``xp``, like the matrices. Immutable. As calibrations hold
    them, matrices may be :class:`~kvtc_stream.calibration.float8.Float8Matrix`; these can be
    :meth:`mapped` only.

    Attributes
    ----------
    groups
        The columns of each group, as ascending slices. With one level, one group has all columns.
    local
        For each group, its matrix [rank, columns].
    leading
        For each group, how many of its first coefficients go to the second level.
    second
        [rank, sum of ``leading``], or ``None`` with one level.
    order
        int32 [rank]: where each component is found among the rows of ``second``, followed by the
        rows of each group that do not go to the second level. ``None`` with one level.
    xp
        The array module. ``None``: NumPy (a module itself cannot be pickled).
    """

    groups: tuple[tuple[slice, ...], ...]
    local: tuple[Array, ...]
    leading: tuple[int, ...] = (0,)
    second: Array | None = None
    order: NDArray[np.int32] | None = None
    xp: Any = None

    @classmethod
    def dense(cls, matrix: Array) -> Components:
        """Components in one level."""
        return cls(((slice(0, matrix.shape[1]),),), (matrix,))

    @property
    def width(self) -> int:
        """Number of columns."""
        return max(int(span.stop) for group in self.groups for span in group)

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.local[0]) if self.order is None else len(self.order)

    @property
    def inner(self) -> list[int]:
        """Bounds of the runs that ``order`` counts through: the rows of the second level, then
        those rows of each group that do not go to it."""
        counts = [0 if self.second is None else len(self.second)]
        counts += [len(m) - n for m, n in zip(self.local, self.leading, strict=True)]
        return list(accumulate(counts, initial=0))

    def mapped(self, function: Callable[[Array], Array], xp: Any = None) -> Components:
        """A copy with ``function`` applied to each matrix; its results are arrays of ``xp``."""
        second = None if self.second is None else function(self.second)
        return replace(self, local=tuple(map(function, self.local)), second=second, xp=xp)

    def weighted(self, blocks: Sequence[NDArray[np.float32]], *, inverse: bool) -> Components:
        """The matrix times the block-diagonal matrix of ``blocks``, see :func:`apply_blocks`."""
        local = [
            apply_blocks(m, blocks_of(blocks, spans), inverse=inverse, xp=self.xp or np)
            for m, spans in zip(self.local, self.groups, strict=True)
        ]
        return replace(self, local=tuple(local))

    def scaled(self, factors: NDArray[np.floating[Any]]) -> Components:
        """A copy with each component multiplied by its factor; ``factors`` is [rank]."""
        if self.order is None:
            return replace(self, local=(self.local[0] * factors[:, None],))
        assert self.second is not None
        inner = np.empty_like(factors)
        inner[self.order] = factors
        local = [
            np.concatenate([m[:n], m[n:] * inner[others, None]])
            for (_, m, _, others), n in zip(self._of_groups(), self.leading, strict=True)
        ]
        second = self.second * inner[: len(self.second), None]
        return replace(self, local=tuple(local), second=second)

    def aligned(self, multiple: int) -> Components:
        """The same matrix, padded with rows and columns of zeros until each group's number of
        leading coefficients is a multiple of ``multiple``."""
        if self.second is None or not any(n % multiple for n in self.leading):
            return self
        xp = self.xp or np
        local, pieces = [], []
        for (_, m, leading, _), n in zip(self._of_groups(), self.leading, strict=True):
            more = -n % multiple
            local.append(xp.concatenate([m[:n], xp.zeros((more, m.shape[1]), m.dtype), m[n:]]))
            own = self.second[:, leading]
            pieces += [own, xp.zeros((len(own), more), own.dtype)]
        counts = tuple(n + -n % multiple for n in self.leading)
        second = xp.concatenate(pieces, axis=1)
        return replace(self, local=tuple(local), leading=counts, second=second)

    def taken(self, which: NDArray[np.integer[Any]]) -> Components:
        """The components ``which``, in this order."""
        if self.order is None:
            prefix = bool((which == np.arange(len(which))).all())  # then nothing is copied
            own = self.local[0][: len(which)] if prefix else self.local[0][which]
            return replace(self, local=(own,))
        assert self.second is not None
        wanted = self.order[which]
        kept = np.unique(wanted)
        begins = self.inner
        rows = [kept[(a <= kept) & (kept < b)] - a for a, b in pairwise(begins)]
        local = [
            m[np.concatenate([np.arange(n), n + own])]
            for m, n, own in zip(self.local, self.leading, rows[1:], strict=True)
        ]
        order = np.searchsorted(kept, wanted).astype(np.int32)
        return replace(self, local=tuple(local), second=self.second[rows[0]], order=order)

    def first(self, count: int) -> Components:
        """The first ``count`` components."""
        return self if count == self.rank else self.taken(np.arange(count))

    def project(self, rows: Array, out: Array | None = None) -> Array:
        """Coefficients [n, rank]: ``rows`` [n, width] times the transposed matrix."""
        xp = self.xp or np
        if self.order is None:
            return xp.matmul(rows, self.local[0].T, out=out)
        assert self.second is not None
        leading, others = [], []
        for spans, m, n in zip(self.groups, self.local, self.leading, strict=True):
            found = xp.concatenate([rows[:, span] for span in spans], axis=1) @ m.T
            leading.append(found[:, :n])
            others.append(found[:, n:])
        inner = xp.concatenate([xp.concatenate(leading, axis=1) @ self.second.T, *others], axis=1)
        return xp.take(inner, xp.asarray(self.order), axis=1, out=out)

    def expand(
        self, coefficients: Array, wanted: Sequence[slice], out: Sequence[Array] | None = None
    ) -> Sequence[Array]:
        """``coefficients`` [n, rank] times the matrix: an array for each of ``wanted``, those of
        ``out`` if they are given."""
        xp, count = self.xp or np, len(coefficients)
        if out is None:
            out = [xp.empty((count, s.stop - s.start), coefficients.dtype) for s in wanted]
        if self.order is None:
            for span, target in zip(wanted, out, strict=True):
                xp.matmul(coefficients, self.local[0][:, span], out=target)
            return out
        assert self.second is not None
        inner = xp.take(coefficients, xp.asarray(self.order.argsort()), axis=1)
        second = inner[:, : len(self.second)]
        for spans, matrix, leading, others in self._of_groups():
            targets = _overlaps(spans, wanted, out)
            if targets:
                strongest = second @ self.second[:, leading]
                own = xp.concatenate([strongest, inner[:, others]], axis=1)
                for columns, target in targets:
                    target[...] = own @ matrix[:, columns]
        return out

    def matrix(self) -> Array:
        """The product of both levels as one matrix, [rank, width]."""
        if self.order is None:
            return self.local[0]
        unit = (self.xp or np).eye(self.rank, dtype=self.local[0].dtype)
        return self.expand(unit, [slice(0, self.width)])[0]

    def deviations(
        self, variance: NDArray[np.floating[Any]]
    ) -> tuple[list[NDArray[np.floating[Any]]], list[NDArray[np.floating[Any]]]]:
        """Standard deviations after the inverse transform of coefficients with these variances.

        Returned are those of each group's leading coefficients (none with one level), and those of
        each group's columns. Leading coefficients of a group are taken to be uncorrelated, which
        calibration makes them.
        """
        if self.order is None:
            return [], [np.sqrt(variance @ np.square(self.local[0]))]
        assert self.second is not None
        inner = np.empty_like(variance)
        inner[self.order] = variance
        strongest = inner[: len(self.second)] @ np.square(self.second)
        of_leading, of_columns = [], []
        for _, m, leading, others in self._of_groups():
            own = np.concatenate([strongest[leading], inner[others]])
            of_leading.append(np.sqrt(strongest[leading]))
            of_columns.append(np.sqrt(own @ np.square(m)))
        return of_leading, of_columns

    def _of_groups(self) -> Iterator[tuple[tuple[slice, ...], Array, slice, slice]]:
        """Yield (columns, matrix, second-level slice, remaining slice) of each group.

        The first slice selects from all groups' leading coefficients; the second selects the
        group's other components, in the numbering of ``order``.
        """
        firsts = accumulate(self.leading, initial=0)
        for spans, m, n, first, (begin, end) in zip(
            self.groups, self.local, self.leading, firsts, pairwise(self.inner[1:]), strict=False
        ):
            yield spans, m, slice(first, first + n), slice(begin, end)


def refinement(analysis: Components, synthesis: Components, strong: int) -> NDArray[np.float32]:
    """What ``analysis`` does not find again of the first ``strong`` components.

    Returns
    -------
    array
        float32 [strong, rank]: unit vectors, less the coefficients of what ``synthesis`` expands
        them to. Coefficients plus the first ``strong`` of them times this are those that
        ``synthesis`` expands to the same rows, to second order of what the two are off: a step of
        iterative refinement (J. H. Wilkinson, "Rounding Errors in Algebraic Processes", 1963).

    Both have matrices of NumPy.
    """
    found = analysis.project(synthesis.first(strong).matrix())
    missing: NDArray[np.float32] = np.eye(strong, analysis.rank, dtype=np.float32) - found
    return missing


def columns_of_layers(
    layers: Sequence[int], k_size: int, v_size: int
) -> tuple[tuple[slice, ...], ...]:
    """The columns of consecutive groups of ``layers`` layers, where V follows all K.

    ``k_size`` and ``v_size`` are the columns of one layer.
    """
    found, first = [], 0
    for count in layers:
        last, split = first + count, sum(layers) * k_size
        values = slice(split + first * v_size, split + last * v_size)
        found.append((slice(first * k_size, last * k_size), values))
        first = last
    return tuple(found)


def _overlaps(
    spans: Sequence[slice], wanted: Sequence[slice], out: Sequence[Array]
) -> list[tuple[slice, Array]]:
    """Pairs of a slice of a group's columns and the piece of ``out`` that they are written to.

    ``spans`` are the group's columns in the matrix; ``out`` has an array for each of ``wanted``.
    """
    found, at = [], 0
    for span in spans:
        for other, array in zip(wanted, out, strict=True):
            start, stop = max(span.start, other.start), min(span.stop, other.stop)
            if start < stop:
                own = slice(at + start - span.start, at + stop - span.start)
                found.append((own, array[:, start - other.start : stop - other.start]))
        at += span.stop - span.start
    return found
