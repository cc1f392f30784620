"""Bands with a scale per token: tensors to payloads and back. Bytes are compressed on the host.

The kernels are in :mod:`kvtc_stream.gpu.kernels.bands`. Bytes are compressed and decompressed on
threads of the host, many blocks at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.coding.bands import segment_sizes
from kvtc_stream.errors import FormatError
from kvtc_stream.formats import BlockTable, Coder, Section
from kvtc_stream.formats.coders import compress_beside, decompress
from kvtc_stream.gpu.coder.analysis import (
    Analyser,
    BatchPayloads,
    BlockSums,
    layer_codes_of,
    stride_of,
)
from kvtc_stream.gpu.coder.decoding import Batch, BatchDecoder, BlockLoad, CodedBlocks
from kvtc_stream.gpu.coder.plan import BandPlan
from kvtc_stream.gpu.kernels import bands
from kvtc_stream.gpu.runtime.tensors import Tensors
from kvtc_stream.io.threads import threads

#: Tokens of a batch. Fewer than for uniform bands: coefficients of all components are float32.
BATCH_TOKENS = 4096


class BandDecoder(BatchDecoder):
    """Decodes blocks of bands with a scale and a shift per token."""

    def __init__(
        self, section: Section, plan: BandPlan, scales: NDArray[np.float32] | None = None
    ) -> None:
        super().__init__(section, plan, scales)
        self._plan = plan

    def _most_tokens(self) -> int:
        return BATCH_TOKENS

    def load(
        self, table: BlockTable, slots: NDArray[np.int64], *, tiles: bool = False
    ) -> BlockLoad:
        """See :meth:`kvtc_stream.gpu.coder.decoding.BatchDecoder.load`. The payloads stay on the
        host, which decompresses them."""
        table.verify()
        found = CodedBlocks.of(table, slots)
        rows = found.table.rows
        for row, count in enumerate(found.coded_tokens.tolist()):
            coder, size = Coder(rows["coder"][row]), int(rows["coded_size"][row])
            needed = bands.payload_size(count, self._plan.bands)
            if coder is Coder.RANS or size != needed:
                raise FormatError(
                    f"block at token {rows['start'][row]}: {coder.name} payload of {size} bytes, "
                    f"the plan needs {needed} of a byte coder for {count} tokens"
                )
        return BlockLoad(found, lambda: lambda: None, None, np.full(len(table), -1))

    def symbols(self, blocks: CodedBlocks) -> Batch:
        """See :meth:`kvtc_stream.gpu.coder.decoding.BatchDecoder.symbols`."""
        payloads = b"".join(threads().map(partial(_decompressed, blocks.table), range(len(blocks))))
        positions, slots = self.staging.arrays(blocks.positions, blocks.slots)
        found = _unpacked(
            self._plan,
            blocks.coded_tokens.tolist(),
            blocks.columns(self.staging),
            cupy.asarray(np.frombuffer(payloads, np.uint8)),
            len(blocks.positions),
        )
        return self._batch(blocks, *found, positions, slots)


def _decompressed(table: BlockTable, row: int) -> bytes:
    own = table.rows[row]
    data = table.bytes_of(row, "coded", "coded_length")
    return decompress(Coder(own["coder"]), data, int(own["coded_size"]))


def _starts(plan: BandPlan, counts: Sequence[int]) -> list[int]:
    """Offsets of the payloads of blocks with so many coded tokens, and the end of the last."""
    return [0, *accumulate(bands.payload_size(count, plan.bands) for count in counts)]


def _unpacked(
    plan: BandPlan, counts: Sequence[int], columns: Any, payloads: Any, tokens: int
) -> tuple[Any, Any, int, Any]:
    """Unpack payloads on the device: symbols, scales, stride and faults, as in :class:`Batch`.

    ``counts`` are the coded tokens of each block; ``columns`` are their places among all
    ``tokens``.
    """
    stride = -(-tokens // 64) * 64
    coefficients = cupy.zeros((plan.components, stride), np.float32)
    faults = cupy.zeros(len(counts) + 1, np.int32)
    if plan.components:
        bands.unpack(
            bands.grid(max(counts), len(plan.cut), len(counts)),
            bands.THREADS,
            (
                cupy.asarray(bands.tasks(counts, plan.bands, _starts(plan, counts))),
                len(plan.parts),
                plan.cut,
                columns,
                payloads,
                coefficients,
                stride,
                faults,
            ),
        )
    symbols = cupy.empty((plan.components, stride), np.uint16)
    scales = cupy.empty((len(plan.parts), stride), np.float32)
    bands.normalise(
        (-(-tokens // bands.THREADS), len(plan.parts)),
        bands.THREADS,
        (plan.fields, coefficients, stride, tokens, symbols, scales),
    )
    return symbols, scales, stride, faults


class BandEncoder(Analyser):
    """Encodes blocks of bands with a scale per token. One thread and one CUDA stream at a time.

    Parameters are those of :class:`kvtc_stream.gpu.coder.analysis.Analyser`, and the byte
    ``coder``.
    """

    batch_tokens = BATCH_TOKENS
    _plan: BandPlan

    def __init__(
        self, section: Section, plan: BandPlan, *args: Any, coder: Coder, **options: Any
    ) -> None:
        super().__init__(section, plan, *args, **options)
        self._coder = coder

    def encode(
        self,
        k: Tensors,
        v: Tensors,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        starts: NDArray[np.int64],
    ) -> BatchPayloads:
        """Encode a batch of blocks, and wait for the result.

        Parameters are those of :meth:`kvtc_stream.gpu.coder.encoding.BatchEncoder.prepare`.
        """
        plan, tokens = self._plan, len(positions)
        stride = stride_of(tokens)
        source = self._source(k, v, slots, positions)
        coefficients = self._coefficients(source, stride)
        of_bands = sum(band.quantiser.bits != 0 for part in plan.bands for band in part)
        parameters = cupy.zeros((max(of_bands, 1), 2, stride), np.uint16)
        unfit = cupy.zeros(stride, np.uint8)
        if of_bands:
            bands.measure(
                bands.grid(tokens, len(plan.whole)),
                bands.THREADS,
                (plan.whole, coefficients, stride, tokens, parameters, unfit),
            )
        verbatim = cupy.asnumpy(unfit)[:tokens] != 0
        errors = by_layer = None
        if self._measure:
            # What would be restored for each token.
            counts = np.diff(starts).tolist()
            columns = cupy.asarray(np.arange(tokens, dtype=np.int32))
            packed = self._pack(counts, columns, coefficients, parameters, stride)
            symbols, scales, width, _ = _unpacked(plan, counts, columns, packed, tokens)
            measured = self._compare(source, symbols, scales, width)
            errors = cupy.asnumpy(measured[:, 0])[:, :tokens]
            limiting = cupy.asnumpy(self._limiting(measured))[:, :tokens]
            with np.errstate(invalid="ignore"):
                verbatim |= ~(limiting <= self._bound).all(axis=0)
            left_out = cupy.asarray(verbatim.astype(np.uint8))
            sums = BlockSums.of(measured[:, 1:], left_out, starts)
            coded = np.add.reduceat(~verbatim, starts[:-1], dtype=np.int64)
            by_layer = layer_codes_of(cupy.asnumpy(sums.amounts), coded)
        kept = [np.flatnonzero(~own) for own in np.split(verbatim, starts[1:-1])]
        counts = list(map(len, kept))
        columns = np.flatnonzero(~verbatim).astype(np.int32)
        packed = cupy.asnumpy(
            self._pack(counts, cupy.asarray(columns), coefficients, parameters, stride)
        )
        places = _starts(plan, counts)
        found = threads().map(
            self._compressed, counts, np.split(packed, places[1:-1]) if counts else []
        )
        coders, payloads = zip(*found, strict=True)
        lengths = np.array(list(map(len, payloads)), np.int64)
        return BatchPayloads(
            memoryview(b"".join(payloads)),
            np.stack([np.cumsum(lengths) - lengths, lengths], axis=1),
            np.array(coders, np.uint8),
            np.diff(places),
            verbatim,
            np.zeros(len(counts), np.int32),
            errors=errors,
            layer_codes=by_layer,
        )

    def _pack(
        self, counts: Sequence[int], columns: Any, coefficients: Any, parameters: Any, stride: int
    ) -> Any:
        """Payloads of blocks with so many coded tokens, before compression."""
        plan, starts = self._plan, _starts(self._plan, counts)
        packed = cupy.empty(starts[-1], np.uint8)
        if starts[-1]:
            bands.pack(
                bands.grid(max(counts), len(plan.cut), len(counts)),
                bands.THREADS,
                (
                    cupy.asarray(bands.tasks(counts, plan.bands, starts)),
                    len(plan.parts),
                    plan.cut,
                    columns,
                    coefficients,
                    parameters,
                    stride,
                    packed,
                ),
            )
        return packed

    def _compressed(self, tokens: int, packed: NDArray[np.uint8]) -> tuple[Coder, bytes]:
        sizes = np.sum([segment_sizes(tokens, part) for part in self._plan.bands], axis=0)
        segments = np.split(packed, np.cumsum(sizes)[:-1])
        return compress_beside(self._coder, *(x.data for x in segments))
