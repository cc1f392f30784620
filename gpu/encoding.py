"""Tensors to blocks with uniform bands, many at a time.

A batch of blocks is gathered, projected, classified; the rate control of each stream chooses its
blocks' steps on the device, from sizes measured at some of them; tokens that cannot be coded are
left out; the rest becomes tiles and then payloads. The host waits once, for sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.control import Target
from kvtc_stream.formats import DType, Section
from kvtc_stream.gpu import layout, rans, uniform
from kvtc_stream.gpu.decoding import PIECE_BYTES, by_part
from kvtc_stream.gpu.plan import DevicePlan
from kvtc_stream.gpu.products import analyse, synthesise
from kvtc_stream.gpu.rope import DeviceRopes
from kvtc_stream.gpu.tensors import Tensors
from kvtc_stream.interop import numpy_dtype
from kvtc_stream.payload import TILE_COMPONENTS, tiles

#: Tokens of a batch, and most bytes of its gathered rows of one part.
BATCH_TOKENS, ROW_BYTES = 8192, 128 << 20
#: Room for a tile: three quarters of a word for each symbol, which holds everything but escapes,
#: a word more for those of the first components, and what a step may need.
_ESCAPING, _SLACK = 64, 1024
#: Bytes of a block's record besides its payload, see :mod:`kvtc_stream.control`.
RECORD_BYTES = 112


@dataclass(frozen=True)
class Encoded:
    """What became of a batch of blocks; on the host.

    Attributes
    ----------
    payloads
        One a block, empty where no token is coded; ``None`` where a tile had no room.
    verbatim
        bool [tokens].
    errors
        float32 [2, tokens] of K and V, or ``None`` if they were not measured.
    """

    payloads: list[bytes | None]
    verbatim: NDArray[np.bool_]
    errors: NDArray[np.float32] | None


class RateStates:
    """Rate control of some streams, on the device."""

    def __init__(self, streams: int, target: Target | None, share: float, least: float) -> None:
        self.share = share if target is not None else 0.0
        self.least = least
        state = np.tile(np.array([0, 0, 0, -0.08]), (streams, 1))
        self.states = cupy.asarray(state)


class BatchEncoder:
    """Encodes blocks of one kind of stream. One thread and one CUDA stream at a time."""

    def __init__(
        self,
        section: Section,
        plan: DevicePlan,
        out_dtype: DType,
        scales: tuple[Any, Any] | None,
        *,
        measure: bool,
        bound: float,
    ) -> None:
        plan.check_encodable()
        self._section, self._plan, self._out_dtype = section, plan, out_dtype
        self._measure, self._bound = measure, bound
        layers, heads = len(section.layers), section.kv_heads
        ones = cupy.ones((layers, heads), np.float32)
        self._scales = scales or (ones, ones)
        self._of_parts = [tiles(count, TILE_COMPONENTS) for count in plan.coded]
        self._tiles = sum(map(len, self._of_parts))
        self._values: dict[DType, Any] = {}

    def coefficients(
        self, k: Tensors, v: Tensors, slots: Any, ropes: DeviceRopes, tokens: int, stride: int
    ) -> Any:
        """float32 [components, stride] of some tokens."""
        s, plan = self._section, self._plan
        out = cupy.empty((max(plan.components, 1), stride), np.float32)
        for part in plan.parts:
            piece = max(64, min(tokens, ROW_BYTES // (2 * part.width) // 64 * 64))
            rows = cupy.empty((piece, part.width), np.uint16)
            split = len(part.k_layers) * s.kv_heads * s.k_dim
            for at in range(0, tokens, piece):
                count = min(piece, tokens - at)
                for t, layers, tables, scales, first in (
                    (k, part.k_index, ropes.tables, self._scales[0], 0),
                    (v, part.v_index, ropes.none, self._scales[1], split),
                ):
                    layout.gather(t.dtype)(
                        (-(-count // layout.TOKENS), len(layers) * t.heads),
                        layout.THREADS,
                        (
                            *self._source(t, layers, slots, count, ropes, tables, at),
                            self._fp8(t.dtype),
                            scales,
                            part.mean.data.ptr + 4 * first,
                            rows.data.ptr + 2 * first,
                            part.width,
                        ),
                    )
                analyse(
                    rows[:count],
                    part.analysis,
                    part.analysis_scale,
                    out.data.ptr + 4 * (part.first * stride + at),
                    stride,
                )
        return out

    def _source(
        self,
        t: Tensors,
        layers: Any,
        slots: Any,
        count: int,
        ropes: DeviceRopes,
        tables: Any,
        at: int,
    ) -> tuple[Any, ...]:
        """What kernels that read tensors have in common: ``count`` tokens from ``at`` on."""
        return (
            t.addresses,
            layers,
            t.heads,
            slots.data.ptr + 8 * at,
            t.token_stride,
            t.head_stride,
            t.dim,
            count,
            ropes.most,
            ropes.cosines,
            ropes.sines,
            tables,
            ropes.pairs,
            ropes.interleaved,
            ropes.tokens,
            at,
        )

    def _fp8(self, dtype: DType) -> Any:
        """float32 [256]: the values of an fp8 type."""
        if dtype not in self._values:
            bits = np.arange(256, dtype=np.uint8)
            values = bits.view(numpy_dtype(dtype)) if dtype.is_fp8 else bits
            self._values[dtype] = cupy.asarray(values.astype(np.float32))
        return self._values[dtype]

    def encode(
        self,
        k: Tensors,
        v: Tensors,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        starts: NDArray[np.int64],
        first_blocks: NDArray[np.int64],
        states: RateStates,
    ) -> Encoded:
        """Encode a batch, and wait for it.

        Parameters
        ----------
        k, v
            The cache.
        slots, positions
            int64 [tokens].
        starts
            int64 [blocks + 1]: first tokens of blocks.
        first_blocks
            int64 [streams + 1]: first blocks of streams.
        states
            Of the streams.
        """
        data, places, verbatim, faults, errors = self.encode_on_device(
            k, v, slots, positions, starts, first_blocks, states
        )
        host_places = cupy.asnumpy(places)
        host = cupy.asnumpy(data[: int((host_places[:, 0] + host_places[:, 1]).max(initial=0))])
        full = cupy.asnumpy(faults) != 0
        payloads = [
            None if bad or begin + size > data.size else host[begin : begin + size].tobytes()
            for (begin, size), bad in zip(host_places.tolist(), full, strict=True)
        ]
        return Encoded(
            payloads,
            cupy.asnumpy(verbatim).astype(np.bool_),
            None if errors is None else cupy.asnumpy(errors),
        )

    def encode_on_device(
        self,
        k: Tensors,
        v: Tensors,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        starts: NDArray[np.int64],
        first_blocks: NDArray[np.int64],
        states: RateStates,
        out: Any = None,
    ) -> tuple[Any, Any, Any, Any, Any]:
        """As :meth:`encode` without waiting.

        Returns payloads uint8, their places int64 [blocks, 2], ``verbatim`` uint8 [tokens], faults
        int32 [blocks], and errors float32 [2, tokens] or ``None``. ``out`` takes the payloads.
        """
        plan = self._plan
        blocks, tokens = len(starts) - 1, len(positions)
        stride = -(-tokens // 64) * 64
        parts = len(plan.parts)
        on_device = cupy.asarray(np.asarray(slots, np.int64))
        ropes = DeviceRopes(self._section, positions, sign=-1)
        c = self.coefficients(k, v, on_device, ropes, tokens, stride)

        classes = cupy.empty((parts, stride), np.uint8)
        peaks = cupy.empty((parts, stride), np.float32)
        uniform.classify(
            (-(-tokens // uniform.THREADS), parts),
            uniform.THREADS,
            (
                c,
                stride,
                tokens,
                plan.fields,
                plan.scale,
                plan.weights,
                plan.groups,
                plan.base_factors,
                plan.per_class,
                classes,
                peaks,
            ),
        )
        starts_d = cupy.asarray(starts.astype(np.int32))
        firsts_d = cupy.asarray(first_blocks.astype(np.int32))
        counts = np.diff(first_blocks)
        offsets, levels = self._offsets(c, stride, classes, starts_d, firsts_d, counts, states)

        block_steps = cupy.empty((blocks, 16), np.float32)
        factors = cupy.empty((blocks, uniform.STEPS), np.float32)
        heads = cupy.empty(blocks, np.float32)
        uniform.steps(
            -(-blocks * uniform.STEPS // uniform.THREADS),
            uniform.THREADS,
            (blocks, offsets, plan.unit, block_steps, factors, levels, heads),
        )
        errors = None
        if self._measure:
            errors = self._errors(
                k, v, on_device, positions, c, stride, classes, factors, block_steps, starts
            )
        columns = cupy.empty(tokens, np.int32)
        kept = cupy.empty(blocks, np.int32)
        verbatim = cupy.empty(tokens, np.uint8)
        uniform.keep(
            blocks,
            32,
            (
                starts_d,
                parts,
                stride,
                classes,
                peaks,
                factors,
                peaks if errors is None else errors,
                self._bound if errors is not None else -1.0,
                columns,
                kept,
                verbatim,
            ),
        )
        tasks, of_blocks, words = self._room(starts)
        tasks_d, of_blocks_d = cupy.asarray(tasks), cupy.asarray(of_blocks)
        room = cupy.empty(max(words, 1), np.uint16)
        lengths = cupy.zeros(max(len(tasks), 1), np.int32)
        faults = cupy.zeros(blocks, np.int32)
        rans.encode(
            len(tasks) // rans.TILES,
            rans.TILES * 32,
            (
                tasks_d,
                plan.codes,
                plan.families,
                plan.ids,
                plan.base,
                plan.rows,
                plan.components,
                columns,
                factors,
                c,
                stride,
                levels,
                classes,
                kept,
                room,
                lengths,
                faults,
            ),
            shared=plan.most_families * 1024,
        )
        places = cupy.empty((blocks, 2), np.int64)
        uniform.lay_out(1, 1, (blocks, self._tiles, parts, kept, lengths, of_blocks_d, places, 0))
        if out is None:
            bound = 2 * words + blocks * (24 + 4 * self._tiles) + parts * tokens
            out = cupy.empty(bound, np.uint8)
        uniform.assemble(
            (blocks, self._tiles + 1),
            uniform.THREADS,
            (
                starts_d,
                kept,
                levels,
                lengths,
                heads,
                places,
                tasks_d,
                of_blocks_d,
                columns,
                stride,
                classes,
                room,
                self._tiles,
                parts,
                TILE_COMPONENTS,
                out.size,
                out,
                out,
            ),
        )
        streams = len(first_blocks) - 1
        uniform.record(
            1, streams, (firsts_d, kept, places, offsets, float(RECORD_BYTES), states.states)
        )
        return out, places, verbatim, faults, errors

    def _offsets(
        self, c: Any, stride: int, classes: Any, starts: Any, firsts: Any,
        counts: NDArray[np.int64], states: RateStates,
    ) -> tuple[Any, Any]:  # fmt: skip
        """float64 [blocks]: offsets to the plan's step; room for the levels."""
        plan = self._plan
        blocks, parts, streams = int(counts.sum()), len(plan.parts), len(counts)
        levels = cupy.empty(blocks, np.int32)
        offsets = cupy.zeros(blocks, np.float64)
        if states.share <= 0:
            return offsets, levels
        of_blocks = cupy.asarray(np.repeat(np.arange(streams), counts).astype(np.int32))
        factors = cupy.empty((blocks, uniform.SIZES, uniform.STEPS), np.float32)
        at_levels = cupy.empty((blocks, uniform.SIZES), np.int32)
        uniform.offset_factors(
            -(-factors.size // uniform.THREADS),
            uniform.THREADS,
            (
                of_blocks,
                blocks,
                states.states,
                cupy.asarray(np.array(uniform.OFFSETS)),
                plan.unit,
                factors,
                at_levels,
            ),
        )
        sizes = cupy.empty((blocks, parts, uniform.SIZES), np.float32)
        uniform.sizes(
            (blocks, parts),
            uniform.THREADS,
            (
                c,
                stride,
                plan.fields,
                plan.ids,
                plan.base,
                plan.rows,
                plan.components,
                classes,
                factors,
                at_levels,
                plan.bits,
                plan.families,
                sizes,
                starts,
            ),
            shared=max(plan.most_families * 1024, 1024),
        )
        uniform.control(
            1,
            streams,
            (
                firsts,
                starts,
                sizes,
                at_levels,
                parts,
                self._tiles,
                float(RECORD_BYTES + 8),
                states.share,
                states.least,
                states.states,
                offsets,
            ),
        )
        return offsets, levels

    def _errors(
        self, k: Tensors, v: Tensors, slots: Any, positions: NDArray[np.int64], c: Any,
        stride: int, classes: Any, factors: Any, block_steps: Any, starts: NDArray[np.int64],
    ) -> Any:  # fmt: skip
        """float32 [2, stride]: of each token's K and V, after the cast to the output's dtype."""
        s, plan = self._section, self._plan
        tokens, parts = len(positions), len(plan.parts)
        symbols = cupy.empty((plan.components, stride), np.uint16)
        scales = cupy.zeros((parts, stride), np.float32)
        of_tokens = np.repeat(np.arange(len(starts) - 1), np.diff(starts)).astype(np.int32)
        uniform.quantise(
            (-(-tokens // uniform.THREADS), plan.components),
            uniform.THREADS,
            (
                c,
                stride,
                tokens,
                plan.fields,
                cupy.asarray(of_tokens),
                parts,
                plan.base,
                classes,
                factors,
                block_steps,
                symbols,
                scales,
            ),
        )
        ropes = DeviceRopes(s, positions, sign=1)
        out = cupy.zeros((2, stride), np.float32)
        shape = (2, len(s.layers) * s.kv_heads, stride)
        of_kinds = [cupy.zeros(shape, np.float32) for _ in range(2)]
        for index, part in enumerate(plan.parts):
            piece = min(max(64, PIECE_BYTES // (2 * part.width) // 64 * 64), tokens)
            rows = cupy.empty((piece, part.width), np.uint16)
            if part.count == 0:
                rows[...] = 0
            split = len(part.k_layers) * s.kv_heads * s.k_dim
            for at in range(0, tokens, piece):
                count = min(piece, tokens - at)
                synthesise(
                    symbols.data.ptr + 2 * (part.first * stride + at),
                    stride,
                    part.synthesis,
                    slice(0, part.width),
                    count,
                    rows.data.ptr,
                    part.width,
                )
                for t, layers, tables, of_scales, first, (lost, energy) in (
                    (k, part.k_index, ropes.tables, self._scales[0], 0, of_kinds[0]),
                    (v, part.v_index, ropes.none, self._scales[1], split, of_kinds[1]),
                ):
                    layout.errors(t.dtype, self._out_dtype)(
                        (-(-count // layout.TOKENS), len(layers) * t.heads),
                        layout.THREADS,
                        (
                            *self._source(t, layers, slots, count, ropes, tables, at),
                            self._fp8(t.dtype),
                            of_scales,
                            scales.data.ptr + 4 * (index * stride + at),
                            part.synthesis_scale,
                            part.mean.data.ptr + 4 * first,
                            rows.data.ptr + 2 * first,
                            part.width,
                            lost.data.ptr + 4 * at,
                            energy.data.ptr + 4 * at,
                            stride,
                        ),
                    )
        for kind, (lost, energy) in enumerate(of_kinds):
            layout.relative_errors(
                -(-tokens // layout.THREADS),
                layout.THREADS,
                (lost, energy, len(lost), stride, tokens, out[kind]),
            )
        return out

    def _room(self, starts: NDArray[np.int64]) -> tuple[Any, Any, int]:
        """Tasks, int32 [blocks, tiles] where each tile's is, and words of room in all."""
        plan, blocks = self._plan, len(starts) - 1
        tokens = np.diff(starts)
        counts = np.array([t.stop - t.start for ts in self._of_parts for t in ts], np.int64)
        first = [plan.parts[i].first + t.start for i, ts in enumerate(self._of_parts) for t in ts]
        parts = np.repeat(np.arange(len(plan.parts)), list(map(len, self._of_parts)))
        escaping = np.minimum(counts, _ESCAPING)
        words = tokens[:, None] * (3 * counts // 4 + escaping) + _SLACK
        ends = np.cumsum(words.ravel()).reshape(words.shape)
        task = np.zeros((blocks, self._tiles, rans.FIELDS), np.int64)
        task[:, :, rans.PART] = parts
        task[:, :, rans.TOKENS] = tokens[:, None]
        task[:, :, rans.TOKEN] = starts[:-1, None]
        task[:, :, rans.FIRST] = first
        task[:, :, rans.COUNT] = counts
        task[:, :, rans.BLOCK] = np.arange(blocks)[:, None]
        task[:, :, rans.WORDS] = ends
        task[:, :, rans.LENGTH] = words
        task[:, :, rans.CLASSES] = np.arange(blocks * self._tiles).reshape(blocks, -1)
        tasks = by_part(task.reshape(-1, rans.FIELDS), len(plan.parts))
        of_blocks = np.empty(blocks * self._tiles, np.int32)
        real = np.flatnonzero(tasks[:, rans.TOKENS])
        of_blocks[tasks[real, rans.CLASSES]] = real
        return tasks, of_blocks, int(ends[-1, -1]) if ends.size else 0
