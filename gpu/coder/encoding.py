"""Tensors to blocks with uniform bands, many at a time.

A batch of blocks is gathered, projected and classified; which tokens are restored ones is found;
sizes, or errors, are measured at some steps, from which the rate control chooses; tokens that
cannot be coded are left out; the rest becomes tiles and then payloads. The host waits three times:
for grids and for sizes, to choose steps, and to fetch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.coding.lattice import NO_GRID, TokenGrids
from kvtc_stream.coding.payload import TILE_COMPONENTS
from kvtc_stream.coding.rans import CLASSES
from kvtc_stream.formats import Coder, Section
from kvtc_stream.gpu.coder.analysis import (
    Analyser,
    BatchPayloads,
    Payload,
    Source,
    errors_by_layer,
    stride_of,
)
from kvtc_stream.gpu.coder.decoding import tile_tasks
from kvtc_stream.gpu.coder.plan import DevicePlan
from kvtc_stream.gpu.kernels import rans, uniform
from kvtc_stream.gpu.kernels.intrinsics import WARP
from kvtc_stream.gpu.runtime.staging import Staging
from kvtc_stream.gpu.runtime.tensors import Tensors

#: Tokens of a batch.
BATCH_TOKENS = 8192
#: Room for a tile: three quarters of a word for each symbol, which holds everything but escapes;
#: two words in a part's first tile, where those are; and what a step may need.
_SLACK = 1024
#: Quarter octaves over which sizes and errors are measured at once.
_SPAN = 2.0


@dataclass(frozen=True)
class OnDevice:
    """An encoded batch on the device, which may still be at work on it.

    Attributes
    ----------
    payloads
        uint8: all payloads, one after the other.
    places
        int64 [blocks, 2]: where each payload begins, and its bytes.
    verbatim
        uint8 [tokens]: 1 for tokens that are not coded.
    faults
        int32 [blocks]: not 0 where the payload did not fit into its room.
    errors
        float32 [2, 1 + layers, stride] as of :meth:`Analyser._compare`, or ``None``.
    """

    payloads: Any
    places: Any
    verbatim: Any
    faults: Any
    errors: Any


@dataclass(frozen=True)
class EncoderBatch:
    """A batch of blocks after analysis, on the device, ready to be encoded at any step.

    Attributes
    ----------
    source
        The tensors it came from.
    coefficients, stride
        float32 [components, stride], with at least as many columns as tokens.
    wishes, peaks
        float32 [parts, stride]: the step exponent that each token should have, and its largest
        coefficient; see :func:`kvtc_stream.gpu.kernels.uniform.classify`.
    grids
        int32 [parts, stride]: the grid that a restored token lies on, see
        :func:`kvtc_stream.gpu.kernels.uniform.recognise`.
    starts, starts_d
        [blocks + 1], first tokens of blocks and the end: int64 on the host, int32 on the device.
    """

    source: Source
    coefficients: Any
    stride: int
    wishes: Any
    peaks: Any
    grids: Any
    starts: NDArray[np.int64]
    starts_d: Any


@dataclass(frozen=True)
class _Steps:
    """See :func:`kvtc_stream.gpu.kernels.uniform.settle`."""

    classes: Any
    block_steps: Any
    factors: Any
    levels: Any
    indices: Any
    heads: Any


class OffsetCurve:
    """Sizes or errors of many blocks as functions of the offset to the plan's step.

    Offsets are divided into spans of ``_SPAN``. The first time that an offset in a span is asked
    for, amounts are measured at its ends and in its middle; between these, their logarithms are
    interpolated quadratically. A block's amounts do not depend on the blocks beside it.

    Parameters
    ----------
    measure
        Amounts [..., offsets] at some offsets.
    """

    def __init__(self, measure: Callable[[NDArray[np.float64]], NDArray[np.floating[Any]]]) -> None:
        self._measure = measure
        self._spans: dict[int, NDArray[np.float64]] = {}

    def at(self, index: Any, offset: float) -> Any:
        """Elements at an offset."""
        span = math.floor(offset / _SPAN)
        if span not in self._spans:
            found = self._measure(_SPAN * (span + np.array([0, 0.5, 1])))
            self._spans[span] = np.log(np.maximum(found, 1e-30, dtype=np.float64))
        own = self._spans[span][index]
        low, middle, high = own[..., 0], own[..., 1], own[..., 2]
        x = 2 * (offset / _SPAN - span) - 1
        with np.errstate(over="ignore", invalid="ignore"):
            return np.exp(middle + x * (high - low) / 2 + x * x * ((low + high) / 2 - middle))


class BatchEncoder(Analyser):
    """Encodes blocks with uniform bands. One thread and one CUDA stream at a time."""

    batch_tokens = BATCH_TOKENS
    _plan: DevicePlan

    def __init__(self, section: Section, plan: DevicePlan, *args: Any, **options: Any) -> None:
        plan.check_encodable()
        super().__init__(section, plan, *args, **options)
        self._tasks = tile_tasks(plan)
        self._staging = Staging()
        self._tiles = len(self._tasks.template(TILE_COMPONENTS)[0])

    def prepare(
        self,
        k: Tensors,
        v: Tensors,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        starts: NDArray[np.int64],
    ) -> EncoderBatch:
        """Coefficients and grids of a batch.

        Parameters
        ----------
        k, v
            The cache.
        slots, positions
            int64 [tokens].
        starts
            int64 [blocks + 1]: first tokens of blocks.
        """
        plan = self._plan
        tokens, parts = len(positions), len(plan.parts)
        stride = stride_of(tokens)
        source = self._source(k, v, slots, positions)
        c = self._coefficients(source, stride)
        wishes, peaks = cupy.empty((2, parts, stride), np.float32)
        grids = cupy.empty((parts, stride), np.int32)
        starts_d = cupy.asarray(starts.astype(np.int32))
        uniform.classify(
            (-(-tokens // WARP), parts),
            uniform.CLASSIFY_THREADS,
            (
                c,
                stride,
                tokens,
                plan.fields,
                plan.scale,
                plan.weights,
                plan.groups,
                plan.per_class,
                source.positions,
                wishes,
                peaks,
            ),
        )
        longest = int(np.diff(starts).max())
        uniform.recognise(
            (-(-longest // WARP), parts, len(starts) - 1),
            uniform.CLASSIFY_THREADS,
            (c, stride, starts_d, plan.fields, plan.unit, wishes, peaks, grids),
        )
        return EncoderBatch(source, c, stride, wishes, peaks, grids, starts, starts_d)

    def grids(self, batch: EncoderBatch) -> tuple[list[TokenGrids], NDArray[np.bool_]]:
        """What decides the steps of tokens, a part; and which tokens, bool, the plan's steps can
        code. Waits for the device."""
        tokens = int(batch.starts[-1])
        grids = cupy.asnumpy(batch.grids)[:, :tokens].astype(np.int16)
        wishes, peaks = (cupy.asnumpy(x)[:, :tokens] for x in (batch.wishes, batch.peaks))
        found = list(map(TokenGrids, wishes, grids))
        steps = self._plan.unit * np.exp2(np.stack([own.exponents(0.0) for own in found]) / 4)
        return found, (peaks < uniform.CODED * steps).all(axis=0)

    def forgotten(self, batch: EncoderBatch, which: NDArray[np.bool_]) -> EncoderBatch:
        """As if some tokens, bool [tokens], had no grids."""
        grids = batch.grids.copy()
        grids[:, : len(which)][:, cupy.asarray(which)] = NO_GRID
        return replace(batch, grids=grids)

    def _steps(self, batch: EncoderBatch, offsets: NDArray[np.float64]) -> _Steps:
        """At offsets [blocks, any number]."""
        plan, parts = self._plan, len(self._plan.parts)
        blocks, number = offsets.shape
        classes = cupy.empty((number, parts, batch.stride), np.uint8)
        block_steps, factors = cupy.empty((2, blocks, number, CLASSES), np.float32)
        levels, indices = cupy.empty((2, blocks, number), np.int32)
        heads = cupy.empty((blocks, number), np.float32)
        uniform.settle(
            (blocks, number),
            uniform.THREADS,
            (
                batch.starts_d,
                parts,
                batch.stride,
                batch.wishes,
                batch.grids,
                cupy.asarray(offsets.ravel()),
                plan.unit,
                plan.lowest,
                plan.highest,
                classes,
                block_steps,
                factors,
                levels,
                indices,
                heads,
            ),
        )
        return _Steps(classes, block_steps, factors, levels, indices, heads)

    def sizes(self, batch: EncoderBatch, which: NDArray[np.bool_] | None = None) -> OffsetCurve:
        """Bytes of the blocks' payloads [blocks] over offsets; waits for the device.

        ``which``, bool [tokens]: only the share of these tokens, about; by default all.
        """
        overhead = self.overhead(batch, which)
        peaks = batch.peaks
        if which is not None and not which.all():
            # To the kernel they are as tokens that will be verbatim.
            none = cupy.asarray(np.where(which, np.float32(0), np.float32(np.inf)))
            peaks = peaks.copy()
            peaks[:, : len(which)] = cupy.maximum(peaks[:, : len(which)], none)

        def measure(offsets: NDArray[np.float64]) -> NDArray[np.float64]:
            found: NDArray[np.float64] = self._bits(batch, peaks, offsets) / 8 + overhead[:, None]
            return found

        return OffsetCurve(measure)

    def overhead(
        self, batch: EncoderBatch, which: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float64]:
        """Of those :meth:`sizes`, what takes no symbols, float64 [blocks]."""
        tokens, parts = np.diff(batch.starts), len(self._plan.parts)
        every = 8 + self._tiles * (4 + 3 * np.minimum(tokens, 32)) + parts * ((tokens + 1) // 2)
        own = tokens
        if which is not None:
            own = np.add.reduceat(which, batch.starts[:-1], dtype=np.int64)
        share: NDArray[np.float64] = every * (own / tokens)
        return share

    def _bits(
        self, batch: EncoderBatch, peaks: Any, offsets: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Bits of the blocks' symbols and escapes, float64 [blocks, offsets]."""
        plan = self._plan
        blocks, parts = len(batch.starts) - 1, len(plan.parts)
        steps = self._steps(batch, np.tile(offsets, (blocks, 1)))
        chunks = uniform.chunks(plan.coded)
        bits = cupy.empty((blocks, parts * chunks, uniform.SIZES), np.float32)
        uniform.sizes(
            (blocks, parts, chunks),
            uniform.THREADS,
            (
                batch.coefficients,
                batch.stride,
                plan.fields,
                plan.ids,
                plan.components,
                steps.classes,
                peaks,
                steps.factors,
                steps.indices,
                plan.bits,
                plan.families,
                bits,
                batch.starts_d,
            ),
            shared=max(plan.encode_shared, 1024),
        )
        found: NDArray[np.float64] = cupy.asnumpy(bits).sum(axis=1, dtype=np.float64)
        return found

    def errors(self, batch: EncoderBatch) -> OffsetCurve:
        """Errors of K and V [2, tokens] over offsets; waits for the device."""
        blocks, tokens = len(batch.starts) - 1, int(batch.starts[-1])

        def measure(offsets: NDArray[np.float64]) -> NDArray[np.float32]:
            steps = (self._steps(batch, np.full((blocks, 1), offset)) for offset in offsets)
            found = [cupy.asnumpy(self._errors(batch, x)[:, 0])[:, :tokens] for x in steps]
            return np.stack(found, axis=-1)

        return OffsetCurve(measure)

    def encode(self, batch: EncoderBatch, offsets: NDArray[np.float64]) -> BatchPayloads:
        """Encode a batch at an offset to the plan's step for each block, and wait for it."""
        found = self.encode_on_device(batch, offsets)
        places, full = cupy.asnumpy(found.places), cupy.asnumpy(found.faults) != 0
        used = int(places.sum(axis=1).max(initial=0))
        data = self._staging.fetch(found.payloads[:used]).data.toreadonly()
        verbatim = cupy.asnumpy(found.verbatim).astype(np.bool_)
        kept = [
            int(np.count_nonzero(~own)) for own in np.split(verbatim, batch.starts[1:-1].tolist())
        ]
        payloads = [
            None
            if bad
            else Payload(
                Coder.RANS if tokens else Coder.STORED,
                data[begin : begin + size],
                tokens * self._plan.components,
            )
            for (begin, size), bad, tokens in zip(places.tolist(), full, kept, strict=True)
        ]
        if found.errors is None:
            return BatchPayloads(payloads, verbatim)
        errors = cupy.asnumpy(found.errors[:, 0])[:, : int(batch.starts[-1])]
        by_layer = errors_by_layer(found.errors[:, 1:], verbatim, batch.starts)
        return BatchPayloads(payloads, verbatim, errors, by_layer)

    def encode_on_device(self, batch: EncoderBatch, offsets: NDArray[np.float64]) -> OnDevice:
        """As :meth:`encode` without waiting. The batch's coefficients are gone."""
        plan, c, stride, starts = self._plan, batch.coefficients, batch.stride, batch.starts
        blocks, tokens, parts = len(starts) - 1, int(starts[-1]), len(plan.parts)
        steps = self._steps(batch, offsets[:, None])
        errors = self._errors(batch, steps) if self._measure else None
        columns, kept, verbatim = self._keep(batch, steps, errors)
        tasks, of_blocks, words, together = self._room(starts)
        tasks_d, of_blocks_d = cupy.asarray(tasks), cupy.asarray(of_blocks)
        room = cupy.empty(max(words, 1), np.uint16)
        lengths = cupy.zeros(max(len(tasks), 1), np.int32)
        faults = cupy.zeros(blocks, np.int32)
        rans.encode(
            len(tasks) // together,
            together * 32,
            (
                tasks_d,
                plan.codes,
                plan.families,
                plan.ids,
                plan.components,
                columns,
                steps.factors,
                c,
                stride,
                steps.indices,
                steps.classes,
                kept,
                room,
                lengths,
                faults,
            ),
            shared=plan.encode_shared,
        )
        places = cupy.empty((blocks, 2), np.int64)
        uniform.lay_out(1, 1, (blocks, self._tiles, parts, kept, lengths, of_blocks_d, places, 0))
        # The coefficients are done with, and as a rule larger than what they became.
        bound = 2 * words + blocks * (24 + 4 * self._tiles) + parts * tokens
        data = c.view(np.uint8).ravel()
        out = data if data.size >= bound else cupy.empty(bound, np.uint8)
        uniform.assemble(
            (blocks, self._tiles + 1),
            uniform.THREADS,
            (
                batch.starts_d,
                kept,
                steps.levels,
                lengths,
                steps.heads,
                places,
                tasks_d,
                of_blocks_d,
                columns,
                stride,
                steps.classes,
                room,
                self._tiles,
                parts,
                TILE_COMPONENTS,
                out.size,
                out,
                out,
            ),
        )
        return OnDevice(out, places, verbatim, faults, errors)

    def _keep(self, batch: EncoderBatch, steps: _Steps, errors: Any) -> tuple[Any, Any, Any]:
        """Which tokens are coded: int32 [tokens] columns, int32 [blocks] how many, and uint8
        [tokens] those that are not; see :func:`kvtc_stream.gpu.kernels.uniform.keep`."""
        stride, starts = batch.stride, batch.starts
        blocks, tokens, parts = len(starts) - 1, int(starts[-1]), len(self._plan.parts)
        columns = cupy.empty(tokens, np.int32)
        kept = cupy.empty(blocks, np.int32)
        verbatim = cupy.empty(tokens, np.uint8)
        uniform.keep(
            blocks,
            32,
            (
                batch.starts_d,
                parts,
                stride,
                steps.classes,
                batch.peaks,
                steps.factors,
                batch.peaks if errors is None else self._limiting(errors),
                -1.0 if errors is None else self._bound,
                columns,
                kept,
                verbatim,
            ),
        )
        return columns, kept, verbatim

    def _errors(self, batch: EncoderBatch, steps: _Steps) -> Any:
        """See :meth:`_compare`."""
        plan, stride, starts = self._plan, batch.stride, batch.starts
        tokens = batch.source.tokens
        symbols = (cupy.empty if tokens == stride else cupy.zeros)(
            (plan.components, stride), np.uint16
        )
        scales = cupy.zeros((len(plan.parts), stride), np.float32)
        of_tokens = np.repeat(np.arange(len(starts) - 1), np.diff(starts)).astype(np.int32)
        uniform.quantise(
            (
                -(-tokens // uniform.THREADS),
                -(-max(plan.coded, default=0) // uniform.TOGETHER),
                len(plan.parts),
            ),
            uniform.THREADS,
            (
                batch.coefficients,
                stride,
                tokens,
                plan.fields,
                cupy.asarray(of_tokens),
                steps.classes,
                steps.factors,
                steps.block_steps,
                plan.down,
                symbols,
                scales,
            ),
        )
        return self._compare(batch.source, symbols, scales, stride)

    def _room(
        self, starts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], int, int]:
        """Lay out the tiles of blocks: where each is encoded to, and by whom.

        Returns
        -------
        tuple
            Tasks int64 [tasks, rans.FIELDS]; int32 [blocks · tiles], each tile's task; 16-bit words
            of room in all; and how many tiles share a block of threads.
        """
        blocks, tokens = len(starts) - 1, np.diff(starts)
        template, leading = self._tasks.template(TILE_COMPONENTS)
        counts = template[:, rans.COUNT]
        words = tokens[:, None] * np.where(leading, 2 * counts, 3 * counts // 4) + _SLACK
        task = np.tile(template, (blocks, 1, 1))
        task[:, :, rans.TOKENS] = tokens[:, None]
        task[:, :, rans.TOKEN] = starts[:-1, None]
        task[:, :, rans.BLOCK] = np.arange(blocks)[:, None]
        task[:, :, rans.WORDS] = np.cumsum(words.ravel()).reshape(words.shape)
        task[:, :, rans.LENGTH] = words
        together = self._tasks.together(blocks * self._tiles)
        order = self._tasks.order(TILE_COMPONENTS, blocks, together)
        of_blocks = np.empty(blocks * self._tiles, np.int32)
        real = np.flatnonzero(order >= 0)
        of_blocks[order[real]] = real
        return (
            self._tasks.arranged(task, TILE_COMPONENTS, blocks, together),
            of_blocks,
            int(words.sum()) if words.size else 0,
            together,
        )
