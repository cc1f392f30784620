"""Tensors to blocks with uniform bands, many at a time.

A batch of blocks is gathered, projected and classified; which tokens are restored ones is found;
sizes, or errors, are measured at some steps, from which the rate control chooses; tokens that
cannot be coded are left out; the rest becomes tiles and then payloads. The host waits three times:
for grids and sizes, to choose steps; for sizes of payloads, and for these. Sizes are measured in
advance where the steps are expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.coding.lattice import NO_GRID, TokenGrids
from kvtc_stream.coding.payload import tile_size
from kvtc_stream.coding.rans import CLASSES
from kvtc_stream.formats import Coder, Section
from kvtc_stream.gpu.coder.analysis import (
    Analyser,
    BatchPayloads,
    BlockSums,
    Source,
    layer_codes_of,
    stride_of,
)
from kvtc_stream.gpu.coder.decoding import tile_tasks
from kvtc_stream.gpu.coder.plan import DevicePlan
from kvtc_stream.gpu.kernels import rans, uniform
from kvtc_stream.gpu.kernels.intrinsics import WARP
from kvtc_stream.gpu.runtime.tensors import Tensors
from kvtc_stream.io.steps import Steps

#: Tokens of a batch.
BATCH_TOKENS = 8192
#: Room for a tile: three quarters of a word for each symbol, which holds everything but escapes;
#: two words in a part's first tile, where those are; and what a step may need.
_SLACK = 1024
#: Quarter octaves over which sizes and errors are measured at once.
_SPAN = 2.0
#: Bits of what :func:`kvtc_stream.gpu.kernels.uniform.judge` says of a token.
_FITS, _KNOWN = 1, 2
#: Layouts of tiles that a plan keeps.
_ROOMS = 8


@dataclass(frozen=True)
class OnDevice:
    """An encoded batch on the device, which may still be at work on it.

    Attributes
    ----------
    payloads
        uint8: all payloads, one after the other.
    blocks
        How many.
    outcome
        uint8, what the host must know, as :meth:`parts` takes it apart.
    errors
        float32 [2, 1 + layers, stride] as of :meth:`Analyser._compare`, or ``None``.
    sums
        Those errors over the coded tokens of blocks, or ``None``.
    """

    payloads: Any
    blocks: int
    outcome: Any
    errors: Any
    sums: BlockSums | None

    @staticmethod
    def parts(outcome: Any, blocks: int) -> tuple[Any, Any, Any, Any]:
        """Places, faults, kept and verbatim: views of what has :meth:`room` for so many.

        int64 [blocks, 2] where each payload begins, and its bytes; int32 [blocks], not 0 where the
        payload did not fit into its room; int32 [blocks], coded tokens; and uint8 [tokens], 1 for
        the others.
        """
        places = outcome[: 16 * blocks].view(np.int64).reshape(blocks, 2)
        faults, kept = outcome[16 * blocks : 24 * blocks].view(np.int32).reshape(2, blocks)
        return places, faults, kept, outcome[24 * blocks :]

    @property
    def places(self) -> Any:
        """int64 [blocks, 2] on the device, see :meth:`parts`."""
        return self.parts(self.outcome, self.blocks)[0]

    @staticmethod
    def room(blocks: int, tokens: int) -> int:
        """Bytes of :attr:`outcome`."""
        return 24 * blocks + tokens


@dataclass(frozen=True)
class _Room:
    """Where the tiles of some blocks are encoded to, and by whom; does not change.

    Attributes
    ----------
    tasks, of_blocks
        On the device: int64 [tasks, rans.FIELDS], and int32 [blocks · tiles], each tile's task.
    count, words, together
        Number of tasks, 16-bit words of room in all, and how many tiles share a block of threads.
    starts
        int32 [blocks + 1] on the device.
    of_tokens
        int32 [tokens] on the device: the block of each token.
    """

    tasks: Any
    of_blocks: Any
    count: int
    words: int
    together: int
    starts: Any
    of_tokens: Any


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
    starts
        int64 [blocks + 1], first tokens of blocks and the end.
    room
        The layout of their tiles.
    flags
        Waits for uint8 [tokens], see :func:`kvtc_stream.gpu.kernels.uniform.judge`.
    """

    source: Source
    coefficients: Any
    stride: int
    wishes: Any
    peaks: Any
    grids: Any
    starts: NDArray[np.int64]
    room: _Room
    flags: Callable[[], NDArray[np.uint8]]

    @property
    def starts_d(self) -> Any:
        """:attr:`starts` on the device, int32."""
        return self.room.starts

    @property
    def blocks(self) -> list[slice]:
        """The tokens of each block."""
        return [slice(a, b) for a, b in pairwise(self.starts.tolist())]


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
        Begins to measure amounts [..., offsets] at some offsets; what it returns waits for them.
    near
        Offsets that will probably be asked for: measuring begins at once.
    """

    def __init__(
        self,
        measure: Callable[[NDArray[np.float64]], Callable[[], NDArray[np.floating[Any]]]],
        near: Sequence[float] = (),
    ) -> None:
        self._measure = measure
        self._begun = {span: self._begin(span) for span in sorted(map(_span, near))}
        self._spans: dict[int, NDArray[np.float64]] = {}
        self._rows: dict[int, list[list[float]]] = {}

    def _begin(self, span: int) -> Callable[[], NDArray[np.floating[Any]]]:
        return self._measure(_SPAN * (span + np.array([0, 0.5, 1])))

    def _logarithms(self, span: int) -> NDArray[np.float64]:
        if span not in self._spans:
            begun = self._begun.pop(span, None) or self._begin(span)
            self._spans[span] = np.log(np.maximum(begun(), 1e-30, dtype=np.float64))
        return self._spans[span]

    def at(self, index: Any, offset: float) -> Any:
        """Elements at an offset."""
        span = _span(offset)
        own = self._logarithms(span)[index]
        low, middle, high = own[..., 0], own[..., 1], own[..., 2]
        x = 2 * (offset / _SPAN - span) - 1
        with np.errstate(over="ignore", invalid="ignore"):
            return np.exp(middle + x * (high - low) / 2 + x * x * ((low + high) / 2 - middle))

    def of(self, row: int, offset: float) -> float:
        """As :meth:`at` of one of [blocks], and quick: in numbers of Python."""
        span = _span(offset)
        if span not in self._rows:
            self._rows[span] = self._logarithms(span).tolist()
        low, middle, high = self._rows[span][row]
        x = 2 * (offset / _SPAN - span) - 1
        return float(np.exp(middle + x * (high - low) / 2 + x * x * ((low + high) / 2 - middle)))


def _span(offset: float) -> int:
    return math.floor(offset / _SPAN)


class BatchEncoder(Analyser):
    """Encodes blocks with uniform bands. One thread and one CUDA stream at a time."""

    batch_tokens = BATCH_TOKENS
    _plan: DevicePlan

    def __init__(self, section: Section, plan: DevicePlan, *args: Any, **options: Any) -> None:
        plan.check_encodable()
        super().__init__(section, plan, *args, **options)
        self._tasks = tile_tasks(plan)
        self._tile_size = tile_size(plan.coded)
        self._tiles = len(self._tasks.template(self._tile_size)[0])

    def prepare(
        self,
        k: Tensors,
        v: Tensors,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        starts: NDArray[np.int64],
    ) -> EncoderBatch:
        """Coefficients and grids of a batch. Does not wait for the device.

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
        room = self._room(starts)
        source = self._source(k, v, slots, positions)
        c = self._coefficients(source, stride)
        wishes, peaks = cupy.empty((2, parts, stride), np.float32)
        grids = cupy.empty((parts, stride), np.int32)
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
            (c, stride, room.starts, plan.fields, plan.unit, wishes, peaks, grids),
        )
        flags = cupy.empty(tokens, np.uint8)
        uniform.judge(
            -(-tokens // uniform.THREADS),
            uniform.THREADS,
            (tokens, parts, stride, plan.unit, wishes, peaks, grids, flags),
        )
        fetch = self._staging.begin_fetch(flags)
        return EncoderBatch(source, c, stride, wishes, peaks, grids, starts, room, fetch)

    def judged(self, batch: EncoderBatch) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which tokens the plan's steps can code, and which of these lie on a grid in every part:
        bool [tokens]. Waits for the device."""
        flags = batch.flags()
        return flags & _FITS != 0, flags & _KNOWN != 0

    def grids(self, batch: EncoderBatch) -> list[TokenGrids]:
        """What decides the steps of tokens, a part. Waits for the device."""
        tokens = int(batch.starts[-1])
        grids = cupy.asnumpy(batch.grids)[:, :tokens].astype(np.int16)
        return list(map(TokenGrids, cupy.asnumpy(batch.wishes)[:, :tokens], grids))

    def with_grids(self, batch: EncoderBatch, grids: list[TokenGrids]) -> EncoderBatch:
        """With other grids of tokens, a part."""
        found = np.full(batch.grids.shape, NO_GRID, np.int32)
        for row, own in zip(found, grids, strict=True):
            row[: len(own.grids)] = own.grids
        return replace(batch, grids=cupy.asarray(found))

    def _steps(self, batch: EncoderBatch, offsets: NDArray[np.float64]) -> _Steps:
        """At offsets [blocks, any number]."""
        plan, parts = self._plan, len(self._plan.parts)
        blocks, number = offsets.shape
        classes = cupy.empty((number, parts, batch.stride), np.uint8)
        block_steps, factors = cupy.empty((2, blocks, number, CLASSES), np.float32)
        levels, indices = cupy.empty((2, blocks, number), np.int32)
        heads = cupy.empty((blocks, number), np.float32)
        [offsets_d] = self._staging.arrays(offsets.ravel())
        uniform.settle(
            (blocks, number),
            uniform.THREADS,
            (
                batch.starts_d,
                parts,
                batch.stride,
                batch.wishes,
                batch.grids,
                offsets_d,
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

    def sizes(
        self,
        batch: EncoderBatch,
        which: NDArray[np.bool_] | None = None,
        near: Sequence[float] = (),
    ) -> OffsetCurve:
        """Bytes of the blocks' payloads [blocks] over offsets.

        ``which``, bool [tokens]: only the share of these tokens, about; by default all. ``near``
        is that of :class:`OffsetCurve`.
        """
        overhead = self.overhead(batch, which)
        peaks = batch.peaks
        if which is not None and not which.all():
            # To the kernel they are as tokens that will be verbatim.
            none = cupy.asarray(np.where(which, np.float32(0), np.float32(np.inf)))
            peaks = peaks.copy()
            peaks[:, : len(which)] = cupy.maximum(peaks[:, : len(which)], none)

        def measure(offsets: NDArray[np.float64]) -> Callable[[], NDArray[np.float64]]:
            bits = self._staging.begin_fetch(self._bits(batch, peaks, offsets))
            return lambda: bits().sum(axis=1, dtype=np.float64) / 8 + overhead[:, None]

        return OffsetCurve(measure, near)

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

    def _bits(self, batch: EncoderBatch, peaks: Any, offsets: NDArray[np.float64]) -> Any:
        """Bits of the blocks' symbols and escapes, float32 [blocks, shares, offsets] on the
        device."""
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
        return bits

    def errors(self, batch: EncoderBatch) -> OffsetCurve:
        """Errors of K and V [2, tokens] over offsets; waits for the device."""
        blocks, tokens = len(batch.starts) - 1, int(batch.starts[-1])

        def measure(offsets: NDArray[np.float64]) -> Callable[[], NDArray[np.float32]]:
            steps = (self._steps(batch, np.full((blocks, 1), offset)) for offset in offsets)
            found = [cupy.asnumpy(self._errors(batch, x)[:, 0])[:, :tokens] for x in steps]
            return lambda: np.stack(found, axis=-1)

        return OffsetCurve(measure)

    def encode(self, batch: EncoderBatch, offsets: NDArray[np.float64]) -> Steps[BatchPayloads]:
        """Encode a batch at an offset to the plan's step for each block.

        The payloads' bytes are still on their way.
        """
        blocks, tokens = len(offsets), int(batch.starts[-1])
        found = self.encode_on_device(batch, offsets)
        outcome = self._staging.begin_fetch(found.outcome)
        errors = sums = None
        if found.sums is not None:
            errors = self._staging.begin_fetch(cupy.ascontiguousarray(found.errors[:, 0, :tokens]))
            sums = self._staging.begin_fetch(found.sums.amounts)
        yield
        places, faults, kept, left_out = found.parts(outcome(), blocks)
        used = int(places.sum(axis=1).max(initial=0))
        host, ready = self._staging.begin_large(found.payloads[:used])
        return BatchPayloads(
            host.toreadonly(),
            places,
            np.where(kept, Coder.RANS, Coder.STORED).astype(np.uint8),
            kept.astype(np.int64) * self._plan.components,
            left_out.astype(np.bool_),
            faults,
            ready,
            errors and errors(),
            sums and layer_codes_of(sums(), kept),
        )

    def encode_on_device(self, batch: EncoderBatch, offsets: NDArray[np.float64]) -> OnDevice:
        """As :meth:`encode` without waiting. The batch's coefficients are gone."""
        plan, c, stride, starts = self._plan, batch.coefficients, batch.stride, batch.starts
        blocks, tokens, parts = len(starts) - 1, int(starts[-1]), len(plan.parts)
        steps = self._steps(batch, offsets[:, None])
        errors = self._errors(batch, steps) if self._measure else None
        outcome = cupy.empty(OnDevice.room(blocks, tokens), np.uint8)
        places, faults, kept, verbatim = OnDevice.parts(outcome, blocks)
        faults[...] = 0
        columns = self._keep(batch, steps, errors, kept, verbatim)
        of_room = batch.room
        room = cupy.empty(max(of_room.words, 1), np.uint16)
        lengths = cupy.zeros(max(of_room.count, 1), np.int32)
        rans.encode(
            of_room.count // of_room.together,
            of_room.together * 32,
            (
                of_room.tasks,
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
        uniform.lay_out(
            1, 1, (blocks, self._tiles, parts, kept, lengths, of_room.of_blocks, places, 0)
        )
        # The coefficients are done with, and as a rule larger than what they became.
        bound = 2 * of_room.words + blocks * (24 + 4 * self._tiles) + parts * tokens
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
                of_room.tasks,
                of_room.of_blocks,
                columns,
                stride,
                steps.classes,
                room,
                self._tiles,
                parts,
                self._tile_size,
                out.size,
                out,
                out,
            ),
        )
        sums = None if errors is None else BlockSums.of(errors[:, 1:], verbatim, starts)
        return OnDevice(out, blocks, outcome, errors, sums)

    def _keep(
        self, batch: EncoderBatch, steps: _Steps, errors: Any, kept: Any, verbatim: Any
    ) -> Any:
        """Which tokens are coded: int32 [tokens] columns; fills int32 [blocks] how many, and uint8
        [tokens] those that are not; see :func:`kvtc_stream.gpu.kernels.uniform.keep`."""
        stride, parts = batch.stride, len(self._plan.parts)
        columns = cupy.empty(len(verbatim), np.int32)
        uniform.keep(
            len(kept),
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
        return columns

    def _errors(self, batch: EncoderBatch, steps: _Steps) -> Any:
        """See :meth:`_compare`."""
        plan, stride, tokens = self._plan, batch.stride, batch.source.tokens
        symbols = cupy.empty((plan.components, stride), np.uint16)
        if tokens < stride:
            symbols[:, tokens:] = 0
        scales = cupy.zeros((len(plan.parts), stride), np.float32)
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
                batch.room.of_tokens,
                steps.classes,
                steps.factors,
                steps.block_steps,
                plan.down,
                symbols,
                scales,
            ),
        )
        return self._compare(batch.source, symbols, scales, stride)

    def _room(self, starts: NDArray[np.int64]) -> _Room:
        """Lay out the tiles of blocks; a plan keeps the last layouts."""
        kept, key = self._plan.rooms, starts.tobytes()
        found: _Room | None = kept.get(key)
        if found is None:
            found = self._new_room(starts)
            # Others use it in streams of their own.
            cupy.cuda.get_current_stream().synchronize()
            if len(kept) >= _ROOMS:
                kept.clear()
            kept[key] = found
        return found

    def _new_room(self, starts: NDArray[np.int64]) -> _Room:
        blocks, tokens = len(starts) - 1, np.diff(starts)
        template, leading = self._tasks.template(self._tile_size)
        counts = template[:, rans.COUNT]
        words = tokens[:, None] * np.where(leading, 2 * counts, 3 * counts // 4) + _SLACK
        task = np.tile(template, (blocks, 1, 1))
        task[:, :, rans.TOKENS] = tokens[:, None]
        task[:, :, rans.TOKEN] = starts[:-1, None]
        task[:, :, rans.BLOCK] = np.arange(blocks)[:, None]
        task[:, :, rans.WORDS] = np.cumsum(words.ravel()).reshape(words.shape)
        task[:, :, rans.LENGTH] = words
        together = self._tasks.together(blocks * self._tiles)
        order = self._tasks.order(self._tile_size, blocks, together)
        of_blocks = np.empty(blocks * self._tiles, np.int32)
        real = np.flatnonzero(order >= 0)
        of_blocks[order[real]] = real
        tasks = self._tasks.arranged(task, self._tile_size, blocks, together)
        of_tokens = np.repeat(np.arange(blocks), tokens)
        return _Room(
            cupy.asarray(tasks),
            cupy.asarray(of_blocks),
            len(tasks),
            int(words.sum()) if words.size else 0,
            together,
            cupy.asarray(starts.astype(np.int32)),
            cupy.asarray(of_tokens.astype(np.int32)),
        )
