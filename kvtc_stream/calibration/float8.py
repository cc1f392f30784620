"""Matrices in 8 bits: e4m3 with a factor a row and a column, and two terms for a few rows.

Rounded to e4m3, a principal direction loses about 2.6 % of its length, whatever its variance. Two
things keep this from costing bits. The first rows, which most of the variance lies along, have a
second term: what rounding lost, in e4m3 again. And coefficients are found with a dual of the
rounded matrix, so that what one direction lost is made up for by the others, as far as they can. On
SmolLM2-135M either alone leaves most of the cost, see ``benchmarks/bases.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
#: What a residual's element is multiplied by: rounding loses a sixteenth at most.
RESIDUAL = np.float32(1 / 16)
#: A row's elements are scaled to at most this; e4m3 ends at 448.
_LARGEST = 256.0
#: One row of so many has two terms.
_ROWS_PER_RESIDUAL = 16


@dataclass(frozen=True, eq=False)
class Float8Matrix:
    """A matrix whose element is ``(codes + residuals / 16) · rows · columns``. Immutable.

    Attributes
    ----------
    codes
        e4m3 [rows, columns].
    residuals
        e4m3 [at most rows, columns]: second terms of the first rows; 0 in the others.
    rows, columns
        float32 [rows] and [columns]: factors.
    """

    codes: NDArray[Any]
    residuals: NDArray[Any]
    rows: NDArray[np.float32]
    columns: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.codes.shape

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in (self.codes, self.residuals, self.rows, self.columns))

    @classmethod
    def of(cls, matrix: NDArray[np.floating[Any]]) -> Float8Matrix:
        """Round a matrix [rows, columns] whose first rows are the ones that matter most."""
        whole = np.asarray(matrix, np.float32)
        peaks = np.abs(whole).max(axis=1, initial=0)
        # Powers of two: nothing is lost by them, and they can be moved to coefficients.
        rows = np.exp2(np.ceil(np.log2(np.where(peaks > 0, peaks, 1) / _LARGEST)))
        scaled = whole / rows[:, None]
        codes = scaled.astype(E4M3)
        some = -(-len(whole) // _ROWS_PER_RESIDUAL)
        lost = scaled[:some] - codes[:some].astype(np.float32)
        residuals = (lost / RESIDUAL).astype(E4M3)
        columns = np.ones(whole.shape[1], np.float32)
        return cls(codes, residuals, rows.astype(np.float32), columns)

    def values(self, put: Callable[[NDArray[Any]], Any] = lambda x: x) -> Any:
        """The elements, float32 [rows, columns]; ``put`` copies NumPy arrays to another module."""
        table = put(np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32))
        out = table[put(self.codes.view(np.uint8))]
        out[: len(self.residuals)] += table[put(self.residuals.view(np.uint8))] * RESIDUAL
        out *= put(self.rows)[:, None]
        out *= put(self.columns)
        return out


def dual(matrix: Any) -> Any:
    """What rows are projected with where ``matrix`` [rows, columns] expands coefficients.

    The transposed pseudo-inverse of a matrix with nearly orthonormal rows, to first order: a step
    of the iteration of G. Schulz (ZAMM 13(1), 1933) from the matrix itself.
    """
    return 2 * matrix - (matrix @ matrix.T) @ matrix
