"""Principal components: moments of rows, and the bases solved from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.arrays import HOST, Array, HostArrays
from kvtc_stream.calibration.components import Components
from kvtc_stream.calibration.weights import Pair, apply_blocks, blocks_of

#: By default, a joint basis keeps two fifths of its columns as components, within these bounds. On
#: SmolLM2-135M (11,520 columns), 4,608 components instead of 3,072 halve the KL divergence at a
#: ratio of 16.
_MIN_RANK, _MAX_RANK = 3072, 4608
#: Up to this size, matrices are solved for all eigenvectors.
_DENSE = 2048
OVERSAMPLING, _POWER_ITERATIONS = 128, 3
#: As published (KVTC, section 3): for separate bases that are solved for leading eigenvectors only.
_SEPARATE_POWER_ITERATIONS = 8
#: Rows of a covariance matrix that are processed at a time, to avoid a copy of the whole matrix.
_SLAB = 1024
#: With more columns than ``_WIDE``, a batch updates ``_TALL`` rows of the scatter at a time, and
#: only what is on and above the diagonal.
_WIDE, _TALL = 16_384, 4096
#: Up to so many columns, a batch's product is computed in float64, which costs little there.
_EXACT = 512

#: Components, and their variances in descending order.
Solved: TypeAlias = tuple[Components, NDArray[np.floating[Any]]]


class Moments:
    """Count, mean and scatter matrix about the mean, in float64.

    A batch is centred on its own mean, so that a product in float32 suffices. It is added with the
    pairwise update of Chan, Golub and LeVeque (1979), whose rank-1 term is one more row of the
    batch.
    """

    def __init__(self, width: int, arrays: HostArrays = HOST) -> None:
        self._arrays = arrays
        self.count = 0
        self.mean = arrays.xp.zeros(width)
        self._scatter = arrays.xp.zeros((width, width))
        self._mirrored = True  # if not, values below the diagonal are out of date

    @property
    def scatter(self) -> Array:
        """The scatter matrix, float64 [width, width]."""
        if not self._mirrored:
            xp = self._arrays.xp
            for first in range(0, len(self._scatter), _SLAB):
                slab, behind = slice(first, first + _SLAB), slice(first + _SLAB, None)
                self._scatter[behind, slab] = self._scatter[slab, behind].T
                # Not every BLAS gives both halves of a product with itself the same rounding.
                own = self._scatter[slab, slab]
                own[...] = xp.triu(own) + xp.triu(own, 1).T
            self._mirrored = True
        return self._scatter

    @scatter.setter
    def scatter(self, value: Array) -> None:
        self._scatter, self._mirrored = value, True

    def add(self, rows: Array) -> None:
        xp = self._arrays.xp
        count, width = rows.shape
        if count == 0:
            return
        mean = rows.mean(axis=0, dtype=np.float64)
        centred = xp.empty((count + 1, width), np.float64 if width <= _EXACT else np.float32)
        xp.subtract(rows, mean.astype(centred.dtype), out=centred[:-1])
        centred[-1] = self._combine(count, mean)
        if width <= _WIDE:
            self._scatter += centred.T @ centred
            return
        self._mirrored = False
        for first in range(0, width, _TALL):
            slab = slice(first, first + _TALL)
            own = self._scatter[slab, first:]
            own += centred[:, slab].T @ centred[:, first:]

    def covariance(
        self,
        dtype: type[np.floating],
        rows: Sequence[slice] = (slice(None),),
        columns: Sequence[slice] = (slice(None),),
    ) -> Array:
        """A copy of the covariance matrix, or of some of its rows and columns."""
        scatter, size = self.scatter, len(self.mean)
        heights, widths = ([len(range(size)[s]) for s in own] for own in (rows, columns))
        out = self._arrays.xp.empty((sum(heights), sum(widths)), dtype)
        top = 0
        for own, height in zip(rows, heights, strict=True):
            for first in range(0, height, _SLAB):
                count, left = min(_SLAB, height - first), 0
                begin = range(size)[own].start + first
                for other, width in zip(columns, widths, strict=True):
                    piece = scatter[begin : begin + count, other]
                    out[top : top + count, left : left + width] = piece / self.count
                    left += width
                top += count
        return out

    def block(self, columns: slice) -> Moments:
        """The moments of some columns; shares memory with these."""
        moments = Moments(0, self._arrays)
        moments.count, moments.mean = self.count, self.mean[columns]
        moments.scatter = self.scatter[columns, columns]
        return moments

    def merge(self, other: Moments) -> None:
        if other.count == 0:
            return
        scatter = self.scatter
        scatter += other.scatter
        delta = self._combine(other.count, other.mean)
        for first in range(0, len(delta), _SLAB):
            slab = slice(first, first + _SLAB)
            scatter[slab] += delta[slab, None] * delta

    def _combine(self, count: int, mean: Array) -> Array:
        """Update count and mean; return the vector whose outer product must be added to scatter."""
        total = self.count + count
        delta = mean - self.mean
        weight = math.sqrt(self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total
        return delta * weight


def separate(
    moments: Moments, rank: int | None, arrays: HostArrays
) -> tuple[Array, NDArray[np.floating[Any]], float]:
    """Leading principal components, their variances, and the total variance.

    Components are float16 [rank, width] in ``arrays``; variances descend.
    """
    xp, width = arrays.xp, len(moments.mean)
    wanted = min(rank or width, width)
    if not arrays.leading or in_full(width, wanted):
        values, vectors = xp.linalg.eigh(moments.covariance(np.float64))
        variance, vectors = arrays.get(values)[::-1], vectors[:, ::-1]
        total = max(float(variance.sum()), 0.0)
    else:
        values, vectors = leading_eigenvectors(
            moments.covariance(np.float32), wanted, arrays, iterations=_SEPARATE_POWER_ITERATIONS
        )
        variance = arrays.get(values)
        total = max(float(xp.trace(moments.scatter)) / moments.count, 0.0)
    keep = _rank_of(variance, width, wanted)
    return _oriented(vectors[:, :keep], xp), variance[:keep], total


def one_level(
    moments: Moments, weights: Pair | None, rank: int | None, arrays: HostArrays
) -> Solved:
    """Leading principal components of weighted rows."""
    width = len(moments.mean)
    everything = (slice(0, width),)
    covariance = _weighted_block(moments, weights, everything, everything, arrays.xp)
    wanted = min(rank or joint_rank(width), width)
    values, vectors = leading_eigenvectors(covariance, wanted, arrays)
    variance = arrays.get(values)
    keep = _rank_of(variance, width, len(variance))
    stored = arrays.get(_oriented(vectors[:, :keep], arrays.xp))
    return Components.dense(stored), variance[:keep]


def two_levels(
    moments: Moments,
    weights: Pair | None,
    groups: tuple[tuple[slice, ...], ...],
    second_level: int,
    rank: int | None,
    arrays: HostArrays,
) -> Solved:
    """Components of each group of weighted rows, then of their ``second_level`` strongest."""
    xp, width = arrays.xp, len(moments.mean)
    local, variances = [], []
    for spans in groups:
        block = _weighted_block(moments, weights, spans, spans, xp)
        count = local_rank(len(block), rank)
        values, vectors = leading_eigenvectors(block, count, arrays)
        local.append(_oriented(vectors, xp))
        variances.append(arrays.get(values))
    together = np.sort(np.concatenate(variances))[::-1]
    smallest = together[min(second_level, len(together)) - 1]
    leading = tuple(int((own >= smallest).sum()) for own in variances)
    # As they will be stored, with their signs and rounding.
    strongest = [x[:n].astype(np.float32) for x, n in zip(local, leading, strict=True)]
    products: list[list[Array]] = [[] for _ in groups]
    for i, own in enumerate(groups):
        for j, other in enumerate(groups):
            if j < i:
                products[i].append(products[j][i].T)
            else:
                block = _weighted_block(moments, weights, own, other, xp)
                products[i].append(strongest[i] @ (block @ strongest[j].T))
    inner = xp.concatenate([xp.concatenate(row, axis=1) for row in products])
    values, vectors = leading_eigenvectors(inner, len(inner), arrays)
    variance = np.concatenate(
        [arrays.get(values), *(own[n:] for own, n in zip(variances, leading, strict=True))]
    )
    order = np.argsort(-variance, kind="stable")
    keep = _rank_of(variance[order], width, min(rank or max(_MIN_RANK, 3 * width // 5), len(order)))
    components = Components(
        groups,
        tuple(map(arrays.get, local)),
        leading,
        arrays.get(_oriented(vectors, xp)),
        order.astype(np.int32),
    )
    return components.taken(np.arange(keep)), variance[order[:keep]]


def _weighted_block(
    moments: Moments,
    weights: Pair | None,
    rows: Sequence[slice],
    columns: Sequence[slice],
    xp: Any,
) -> Array:
    """Rows and columns of the covariance matrix of weighted rows, float32."""
    block = moments.covariance(np.float32, rows, columns)
    if weights is None:
        return block
    block = apply_blocks(block, blocks_of(weights, columns), xp=xp)
    block = xp.ascontiguousarray(block.T)
    return apply_blocks(block, blocks_of(weights, rows), xp=xp).T


def joint_rank(width: int) -> int:
    """How many components a joint basis in one level keeps by default."""
    return max(_MIN_RANK, min(2 * width // 5, _MAX_RANK))


def local_rank(width: int, rank: int | None) -> int:
    """How many components a group below a second level has."""
    return min(rank or (width if width <= _DENSE else width // 2), width)


def in_full(size: int, count: int) -> bool:
    """Whether a matrix is solved for all its eigenvectors when ``count`` are wanted."""
    return size <= _DENSE or 2 * count > size


def leading_eigenvectors(
    matrix: Array, count: int, arrays: HostArrays = HOST, *, iterations: int = _POWER_ITERATIONS
) -> tuple[Array, Array]:
    """The largest eigenvalues of a covariance matrix, descending, and their vectors [n, count].

    A few eigenvectors of a large matrix are found by randomised subspace iteration (N. Halko,
    P.-G. Martinsson and J. A. Tropp, SIAM Review 53(2), 2011, algorithm 4.4). The last of them are
    mixed with their neighbours, which have almost the same variance.

    ``matrix`` is a float32 array of ``arrays``; results are float32 or float64.
    """
    xp, size = arrays.xp, len(matrix)
    if in_full(size, count):
        values, vectors = xp.linalg.eigh(matrix.astype(np.float64))
        return values[::-1][:count], vectors[:, ::-1][:, :count]
    rng = xp.random.default_rng(0)
    basis = rng.standard_normal((size, min(count + OVERSAMPLING, size)), dtype=np.float32)
    for _ in range(iterations):
        basis = arrays.orthonormal(matrix @ basis)
    values, rotation = xp.linalg.eigh(basis.T @ (matrix @ basis))
    return values[::-1][:count], basis @ rotation[:, ::-1][:, :count]


def _oriented(vectors: Array, xp: Any) -> Array:
    """Eigenvectors as float16 rows, with fixed signs, so that calibrations can be compared."""
    components = vectors.T
    strongest = xp.abs(components).argmax(axis=1)
    signs = xp.sign(components[xp.arange(len(components)), strongest])
    return xp.ascontiguousarray(components * signs[:, None], np.float16)


def _rank_of(variance: NDArray[np.floating], width: int, maximum: int) -> int:
    """How many components have more variance than rounding noise, 1 to ``maximum``."""
    floor = variance[0] * width * np.finfo(np.float64).eps
    return max(1, min(int((variance > floor).sum()), maximum))
