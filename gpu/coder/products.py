"""Matrix products of binary16 with sums in binary32, on tensor cores: cuBLAS through CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.gpu.runtime.driver import PRODUCT

R_16F, R_32F, _COMPUTE_32F = 2, 0, 68
_NONE, _TRANSPOSED = 0, 1
_DEFAULT = -1


@lru_cache(256)
def _number(value: float) -> tuple[int, Any]:
    """The address of a binary32, and what owns it."""
    owner = np.array(value, np.float32)
    return owner.ctypes.data, owner


def gemm(
    a_op: int, b_op: int, m: int, n: int, k: int, scale: float,
    a: int, a_stride: int, b: int, b_stride: int, c: int, c_type: int, c_stride: int,
    *, kind: int = R_16F, beta: float = 0.0,
) -> None:  # fmt: skip
    """``c = scale · a · b + beta · c`` as in BLAS: [m, n], [m, k] and [k, n], column-major.

    ``kind`` is the type of ``a`` and ``b``.
    """
    from cupy.cuda import device
    from cupy_backends.cuda.libs import cublas

    if not (m and n and k):
        return
    (alpha, _), (added, _) = _number(scale), _number(beta)
    cublas.gemmEx(
        device.get_cublas_handle(), a_op, b_op, m, n, k,
        alpha, a, kind, a_stride, b, kind, b_stride,
        added, c, c_type, c_stride, _COMPUTE_32F, _DEFAULT,
    )  # fmt: skip


class Analysis(NamedTuple):
    """Arguments of :func:`analyse`, with addresses: tokens, components and width; the scale; rows
    and analysis; where it goes, elements from one component to the next there, and their type."""

    shape: tuple[int, int, int]
    scale: float
    rows: int
    analysis: int
    out: int
    stride: int
    kind: int = R_32F


def analyse(
    rows: Any, analysis: Any, scale: float, out: int, stride: int, kind: int = R_32F
) -> None:
    """``out[c, t] = scale · Σ rows[t, i] · analysis[c, i]``: float32 or, if ``kind`` says so,
    binary16, at an address, ``stride`` elements from component to component. ``rows`` and
    ``analysis`` are binary16."""
    (tokens, width), count = rows.shape, len(analysis)
    gemm(
        _TRANSPOSED, _NONE, tokens, count, width, scale,
        rows.data.ptr, width, analysis.data.ptr, width, out, kind, stride,
    )  # fmt: skip


def analyses(products: Sequence[Analysis]) -> tuple[NDArray[np.int64], Any]:
    """:func:`analyse` of several for :func:`kvtc_stream.gpu.runtime.driver.in_turn`, int64
    [products, fields]; and what must be kept until then."""
    shapes, scales, rows, matrices, outs, strides, kinds = zip(*products, strict=True)
    tokens, count, width = np.array(shapes, np.int64).T
    numbers = np.array([*scales, 0.0], np.float32)
    addresses = numbers.ctypes.data + 4 * np.arange(len(numbers))
    found = np.empty((len(products), len(PRODUCT)), np.int64)
    for i, values in enumerate(
        (
            _TRANSPOSED, _NONE, tokens, count, width, addresses[:-1], rows, R_16F, width,
            matrices, R_16F, width, addresses[-1], outs, kinds, strides, _COMPUTE_32F, _DEFAULT,
        )
    ):  # fmt: skip
        found[:, i] = values
    return found, numbers


def refine(coefficients: Any, first: int, missing: Any) -> None:
    """Add a part's leading coefficients times ``missing``, float32 [strong, components].

    ``coefficients`` is float32 [≥ components, tokens], the part's from ``first`` on. In binary32:
    what is added is what rounding to binary16 took.
    """
    (strong, count), tokens = missing.shape, coefficients.shape[1]
    own = coefficients[first : first + strong].copy()
    gemm(
        _NONE, _TRANSPOSED, tokens, count, strong, 1.0,
        own.data.ptr, tokens, missing.data.ptr, count,
        coefficients.data.ptr + 4 * first * tokens, R_32F, tokens, kind=R_32F, beta=1.0,
    )  # fmt: skip


def synthesis(
    symbols: NDArray[np.int64],
    stride: int,
    matrices: NDArray[np.int64],
    strides: NDArray[np.int64],
    shapes: tuple[Any, Any, Any],
    out: NDArray[np.int64] | int,
) -> NDArray[np.int64]:
    """Products for :func:`kvtc_stream.gpu.runtime.driver.in_turn`, int64 [products, fields]:
    ``out[t, i] = Σ symbols[c, t] · matrix[c, i]``, binary16.

    Parameters
    ----------
    symbols, matrices, out
        int64 [products]: addresses.
    stride, strides
        Elements from one component to the next, of symbols and of each matrix.
    shapes
        int64 [products] each: columns, tokens, and components of each product.
    """
    (one, _), (zero, _) = _number(1.0), _number(0.0)
    columns, tokens, count = shapes
    rows = np.empty((len(symbols), len(PRODUCT)), np.int64)
    for i, values in enumerate(
        (
            _NONE, _TRANSPOSED, columns, tokens, count, one, matrices, R_16F, strides,
            symbols, R_16F, stride, zero, out, R_16F, columns, _COMPUTE_32F, _DEFAULT,
        )
    ):  # fmt: skip
        rows[:, i] = values
    return rows


def synthesise(
    symbols: int, stride: int, synthesis: Any, columns: slice, tokens: int, out: int, width: int
) -> None:
    """``out[t, i] = Σ symbols[c, t] · synthesis[c, columns][i]``: binary16 at an address.

    ``symbols`` is the address of binary16 [components, stride]; ``width`` elements lie from token
    to token of ``out``.
    """
    count, of_basis = synthesis.shape
    gemm(
        _NONE, _TRANSPOSED, columns.stop - columns.start, tokens, count, 1.0,
        synthesis.data.ptr + 2 * columns.start, of_basis, symbols, stride, out, R_16F, width,
    )  # fmt: skip


def synthesise_leading(symbols: int, stride: int, synthesis: Any, columns: slice, out: int) -> None:
    """``out[i, t] = Σ symbols[c, t] · synthesis[c, columns][i]``: binary16 at addresses, like
    ``symbols`` with ``stride`` elements from row to row, of which all are computed."""
    count, of_basis = synthesis.shape
    gemm(
        _NONE, _TRANSPOSED, stride, columns.stop - columns.start, count, 1.0,
        symbols, stride, synthesis.data.ptr + 2 * columns.start, of_basis, out, R_16F, stride,
    )  # fmt: skip


def analyse_leading(leading: Any, analysis: Any, scale: float, out: int) -> None:
    """``out[c, t] = scale · Σ leading[i, t] · analysis[c, i]``: float32 at an address; binary16
    [leading, tokens] and [components, leading]."""
    width, tokens = leading.shape
    gemm(
        _NONE, _NONE, tokens, len(analysis), width, scale,
        leading.data.ptr, tokens, analysis.data.ptr, width, out, R_32F, tokens,
    )  # fmt: skip
