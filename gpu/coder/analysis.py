"""Tensors to coefficients, and the error of what is decoded; whatever bands code them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats import DType, Section
from kvtc_stream.formats.block_errors import layer_codes
from kvtc_stream.gpu.coder.decoding import device_scales, kept, piece_tokens
from kvtc_stream.gpu.coder.plan import Basis, Leaf
from kvtc_stream.gpu.coder.products import (
    R_16F,
    Analysis,
    analyse_leading,
    analyses,
    refine,
    synthesis,
)
from kvtc_stream.gpu.coder.rope import DeviceRotations, ropes_of
from kvtc_stream.gpu.kernels import layout
from kvtc_stream.gpu.runtime.driver import in_turn
from kvtc_stream.gpu.runtime.staging import Staging
from kvtc_stream.gpu.runtime.tensors import Column, Tensors, entries
from kvtc_stream.io.dlpack import numpy_dtype

#: Most bytes of the gathered rows of a part.
ROW_BYTES = 128 << 20
#: Tokens of a product are a multiple of this. cuBLAS sums fewer in another order, and a block's
#: bytes shall not depend on how many blocks come together.
_MULTIPLE = 512


def stride_of(tokens: int) -> int:
    """Elements from one component's coefficients to the next one's, for so many tokens."""
    return -(-tokens // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class BatchPayloads:
    """What became of a batch of blocks; on the host.

    Attributes
    ----------
    data, places
        All payloads, and int64 [blocks, 2]: where each begins, and its bytes.
    coders, coded_sizes
        uint8 and int64 [blocks]: entropy coders, and sizes once decoded (bytes, or symbols with
        rANS).
    verbatim
        bool [tokens].
    faults
        [blocks], not 0 where the device could not.
    ready
        Waits until the payloads' bytes are there.
    errors
        float32 [2, tokens] of K and V, or ``None`` if they were not measured.
    layer_codes
        uint8 [blocks, 4 · layers], see :func:`layer_codes_of`; likewise.
    """

    data: memoryview
    places: NDArray[np.int64]
    coders: NDArray[np.uint8]
    coded_sizes: NDArray[np.int64]
    verbatim: NDArray[np.bool_]
    faults: NDArray[np.int32]
    ready: Callable[[], Any] = lambda: None
    errors: NDArray[np.float32] | None = None
    layer_codes: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Source:
    """The tensors of a batch, as kernels read them.

    Attributes
    ----------
    entries
        int64 [entries, layout.FIELDS] on the device, K and V of every layer of every part.
    slots, positions
        int64 [tokens] on the device.
    parts
        First entry, and number of entries, of each part.
    tokens, dtype
        Number of tokens, and element type.
    wide
        Whether the wide kernels can be used.
    """

    entries: Any
    slots: Any
    positions: Any
    parts: list[tuple[int, int]]
    tokens: int
    dtype: DType
    wide: bool


class _Common(NamedTuple):
    """Leading arguments of the kernels that read tensors. They are addresses: who has this keeps
    what they are of."""

    entries: list[int]
    slots: int
    tables: tuple[int, ...]
    values: tuple[int, int]

    def of(self, part: int, at: int, tokens: int) -> tuple[int, ...]:
        """For ``tokens`` tokens of a part from ``at`` on."""
        return (
            self.entries[part], self.slots + 8 * at, tokens, *self.tables, at, *self.values,
        )  # fmt: skip


class _Rows:
    """Rows of tokens between two kernels, binary16: room that parts of a width share. What follows
    the last token up to a multiple of _MULTIPLE is 0."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], Any] = {}

    def of(self, tokens: int, width: int) -> int:
        """The address of room for so many tokens."""
        found = self._made.get((tokens, width))
        if found is None:
            found = self._made[tokens, width] = cupy.empty((stride_of(tokens), width), np.uint16)
            found[tokens:] = 0
        address: int = found.data.ptr
        return address


def _piece(part: Leaf, tokens: int) -> int:
    return int(piece_tokens(part.width, part.count, tokens))


class Analyser:
    """Tensors to coefficients, and how far what is decoded from them is from the tensors.

    Parameters
    ----------
    section, plan
        The section, and its plan on the device.
    out_dtype
        Element type of decoded tensors: errors are measured after the cast to it.
    scales
        Scales of fp8 tensors, float32 [2 · layers, heads], K's and then V's; ``None``: 1.
    measure
        Whether to measure the errors of what would be restored, of every token.
    bound, layer_bound
        Tokens are left out whose relative error over all layers, or in one, is larger.
    """

    #: Tokens of a batch.
    batch_tokens: int

    def __init__(
        self,
        section: Section,
        plan: Basis,
        out_dtype: DType,
        scales: NDArray[np.float32] | None,
        *,
        measure: bool,
        bound: float,
        layer_bound: float | None = None,
    ) -> None:
        self._section, self._plan, self._out_dtype = section, plan, out_dtype
        self._measure, self._bound, self._layer_bound = measure, bound, layer_bound
        self._scales = device_scales(section, scales)
        self._ropes = ropes_of(section)
        self._staging = Staging()

    def _source(
        self, k: Tensors, v: Tensors, slots: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> Source:
        s = self._section
        k_size, v_size = s.kv_heads * s.k_dim, s.kv_heads * s.v_dim
        parts: list[tuple[int, int]] = []
        rows: list[Column] = []
        for part in self._plan.leaves:
            columns: list[Column] = [(0, x, i * k_size) for i, x in enumerate(part.k_layers)]
            split = len(columns) * k_size
            columns += [(1, x, split + i * v_size) for i, x in enumerate(part.v_layers)]
            parts.append((len(rows), len(columns)))
            rows += columns
        own = entries(k, v, rows, self._ropes)
        entries_d, slots_d, positions_d = self._staging.arrays(own, slots, positions)
        wide = k.wide and v.wide and self._ropes.halves
        return Source(entries_d, slots_d, positions_d, parts, len(positions), k.dtype, wide)

    def _common(self, source: Source, rotations: DeviceRotations) -> _Common:
        r, ropes = rotations, self._ropes
        entry = source.entries.data.ptr
        values = _fp8(cupy.cuda.runtime.getDevice(), source.dtype)
        tables = r.cosines, r.sines, ropes.pairs, ropes.interleaved
        return _Common(
            [entry + 8 * layout.FIELDS * first for first, _ in source.parts],
            source.slots.data.ptr,
            (*(x.data.ptr for x in tables), ropes.most, r.tokens),
            (values.data.ptr, self._scales.data.ptr),
        )

    def _coefficients(self, source: Source, stride: int) -> Any:
        """Coefficients of a batch, float32 [components, stride]; see :func:`stride_of`."""
        plan, tokens = self._plan, source.tokens
        rotations = self._ropes.at(source.positions, sign=-1)
        common = self._common(source, rotations)
        out = cupy.empty((max(plan.components, 1), stride), np.float32)
        leading = cupy.empty((sum(leaf.leading for leaf in plan.leaves), stride), np.float16)
        to_leading, rows = leading.data.ptr, _Rows()
        products: list[Analysis] = []
        grids: list[tuple[int, int]] = []
        arguments: list[Sequence[int]] = []
        for i, leaf in enumerate(plan.leaves):
            width, matrix = leaf.width, leaf.analysis.data.ptr
            step = max(1, ROW_BYTES // (2 * width * _MULTIPLE)) * _MULTIPLE
            for at in range(0, tokens, step):
                count = min(step, tokens - at)
                own = rows.of(count, width)
                grids.append((-(-count // layout.TOKENS), source.parts[i][1]))
                arguments.append((*common.of(i, at, count), leaf.mean.data.ptr, own, width))
                if leaf.leading:
                    scale, to = leaf.analysis_scale * leaf.leading_scale, to_leading + 2 * at
                    shape = stride_of(count), leaf.leading, width
                    products.append(Analysis(shape, scale, own, matrix, to, stride, R_16F))
                    grids.append((0, 0))  # the same rows once more
                    arguments.append(arguments[-1])
                shape = stride_of(count), len(leaf.analysis) - leaf.leading, width
                to = out.data.ptr + 4 * (leaf.inner * stride + at)
                rest = matrix + 2 * leaf.leading * width
                products.append(Analysis(shape, leaf.analysis_scale, own, rest, to, stride))
            to_leading += 2 * leaf.leading * stride
        if products:
            of_all, _held = analyses(products)
            in_turn(
                of_all,
                layout.gather(source.dtype, source.wide),
                np.array(grids, np.int64),
                layout.THREADS,
                np.array(arguments, np.int64),
                kernel_first=True,
            )
        first = 0
        for second in plan.seconds:
            count = sum(leaf.leading for leaf in second.leaves)
            own = leading[first : first + count]
            to = out.data.ptr + 4 * second.inner * stride
            analyse_leading(own, second.analysis, second.analysis_scale, to)
            first += count
        out = plan.ordered(out)
        for begin, missing in plan.refinements:
            refine(out, begin, missing)
        return out

    def _compare(self, source: Source, symbols: Any, scales: Any, stride: int) -> Any:
        """Relative errors of what would be decoded, after the cast to ``out_dtype``.

        Parameters
        ----------
        symbols, scales
            Bits of binary16 [components, stride], and float32 [parts, stride] that they are times.

        Returns
        -------
        Array
            float32 [2, 1 + layers, stride]: each token's K and V, over all layers and in each.
        """
        s, plan, tokens = self._section, self._plan, source.tokens
        rotations = self._ropes.at(source.positions, sign=1)
        common = self._common(source, rotations)
        dims = s.k_dim // 16, s.v_dim // 16
        wide = (
            source.wide
            and not self._out_dtype.is_fp8
            and all(d <= 32 and d & (d - 1) == 0 for d in dims)
        )
        kernel = layout.errors(source.dtype, self._out_dtype, wide)
        lost, energy = cupy.zeros((2, 2 * len(s.layers), stride), np.float32)
        stack = plan.stacked(symbols)
        symbol, step = stack.data.ptr, scales.data.ptr
        sources, matrices, grids = [], [], []
        shapes: list[tuple[int, int, int]] = []
        arguments: list[Sequence[int]] = []
        rows = cupy.empty(max(_piece(x, tokens) * x.width for x in plan.leaves), np.uint16)
        zeros = None
        for i, part in enumerate(plan.leaves):
            piece, own = _piece(part, tokens), rows
            if part.count == 0:
                own = zeros = cupy.zeros(rows.shape, np.uint16) if zeros is None else zeros
            scale = int(np.float32(part.synthesis_scale).view(np.int32))
            for at in range(0, tokens, piece):
                count = min(piece, tokens - at)
                sources.append(symbol + 2 * (part.first * stride + at))
                matrices.append(part.synthesis.data.ptr)
                shapes.append((part.width, count, part.count))
                grids.append((-(-count // layout.TOKENS), source.parts[i][1]))
                arguments.append(
                    (
                        *common.of(i, at, count),
                        step + 4 * (part.part * stride + at),
                        scale,
                        part.mean.data.ptr,
                        own.data.ptr,
                        part.width,
                        lost.data.ptr + 4 * at,
                        energy.data.ptr + 4 * at,
                        stride,
                    )
                )
        widths, counts, components = np.array(shapes, np.int64).T
        products = synthesis(
            np.array(sources, np.int64),
            stride,
            np.array(matrices, np.int64),
            widths,
            (widths, counts, components),
            rows.data.ptr,
        )
        of_kernel = np.array(arguments, np.int64)
        in_turn(products, kernel, np.array(grids, np.int64), layout.THREADS, of_kernel)
        layers = len(s.layers)
        out = cupy.zeros((2, 1 + layers, stride), np.float32)
        for kind in range(2):
            own = slice(kind * layers, (kind + 1) * layers)
            layout.relative_errors(
                -(-tokens // layout.THREADS),
                layout.THREADS,
                (lost[own], energy[own], layers, stride, tokens, out[kind]),
            )
        shape = (2, layers, stride)
        with np.errstate(divide="ignore", invalid="ignore"):  # where arrays are NumPy's
            ratios = cupy.sqrt(lost / energy).reshape(shape)
        out[:, 1:] = cupy.where(lost.reshape(shape) == 0, np.float32(0), ratios)
        return out

    def _limiting(self, errors: Any) -> Any:
        """Errors to compare with ``bound``, float32 [2, stride], from those of :meth:`_compare`.

        That over all layers or, if larger, that of the worst layer · ``bound / layer_bound``.
        """
        whole = errors[:, 0]
        if self._layer_bound is None or self._layer_bound == math.inf:
            return cupy.ascontiguousarray(whole)
        # A bound of 0 allows what is exact.
        scale = np.float32(self._bound / max(self._layer_bound, 1e-30))
        return cupy.maximum(whole, errors[:, 1:].max(axis=1) * scale)


@cache
def _fp8(device: int, dtype: DType) -> Any:
    """float32 [256] on a device, for all streams of it: the values of an fp8 type."""
    bits = np.arange(256, dtype=np.uint8)
    return kept((bits.view(numpy_dtype(dtype)) if dtype.is_fp8 else bits).astype(np.float32))


@dataclass(frozen=True)
class BlockSums:
    """Errors of layers over the coded tokens of blocks.

    Attributes
    ----------
    amounts
        float32 [2, 2, layers, blocks] on the device: sums, and the worst, in K and V.
    """

    amounts: Any

    @classmethod
    def of(cls, errors: Any, verbatim: Any, starts: NDArray[np.int64]) -> BlockSums:
        """Of float32 [2, layers, ≥ tokens], but for tokens that are ``verbatim``, not 0 in uint8
        [tokens]; both on the device."""
        blocks, tokens, size = len(starts) - 1, int(starts[-1]), int(np.diff(starts).max(initial=1))
        kept, own = verbatim == 0, errors[:, :, :tokens]
        if tokens < blocks * size:
            padded = cupy.zeros((*errors.shape[:2], blocks * size), np.float32)
            padded[:, :, :tokens] = own
            of_all = cupy.zeros(blocks * size, np.bool_)
            of_all[:tokens] = kept
            kept, own = of_all, padded
        own = cupy.where(kept, own, np.float32(0)).reshape(*errors.shape[:2], blocks, size)
        return cls(cupy.stack([own.sum(axis=3), own.max(axis=3)]))


def layer_codes_of(
    amounts: NDArray[np.float32], counts: NDArray[np.integer[Any]]
) -> NDArray[np.uint8]:
    """Codes of the errors of each layer over the coded tokens of each block, see
    :func:`kvtc_stream.formats.block_errors.layer_codes`; from :attr:`BlockSums.amounts` and how
    many these tokens are."""
    sums, worst = amounts
    return layer_codes(sums / np.maximum(counts, 1), worst)
