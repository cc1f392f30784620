"""The CUDA backend: device tensors in and out, the kernels in between.

Everything runs on CuPy's current device and stream. Methods return when the host knows sizes;
values may still be on their way, as the stream's order tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, islice, pairwise, product
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import Coded, Given, SectionCoder, block_errors, errors_of_alike
from kvtc_stream.backends.cpu import CpuBackend, CpuSectionCoder
from kvtc_stream.calibration.parts import CalibratedBases
from kvtc_stream.coding.lattice import NO_GRID
from kvtc_stream.coding.values import (
    code_verbatim,
    codes_planes,
    section_scales,
    stored_positions,
)
from kvtc_stream.errors import FormatError
from kvtc_stream.formats import (
    Block,
    BlockRun,
    BlockTable,
    Coder,
    DType,
    LayerErrors,
    Measure,
    Role,
    Section,
    SectionPlan,
    StreamHeader,
)
from kvtc_stream.formats.block_errors import NO_ERRORS
from kvtc_stream.gpu.coder import verbatim
from kvtc_stream.gpu.coder.analysis import BatchPayloads
from kvtc_stream.gpu.coder.band_coding import BandDecoder, BandEncoder
from kvtc_stream.gpu.coder.decoding import (
    Batch,
    BatchDecoder,
    BlockLoad,
    CodedBlocks,
    Destination,
    RunningBatch,
    UniformDecoder,
    batch_tokens,
    faulty,
)
from kvtc_stream.gpu.coder.encoding import BatchEncoder, EncoderBatch, OffsetCurve
from kvtc_stream.gpu.coder.exact import MOST_JOINED, Exact, ExactTokens, move
from kvtc_stream.gpu.coder.plan import BandPlan, DevicePlan
from kvtc_stream.gpu.coder.rope import ropes_of
from kvtc_stream.gpu.runtime.staging import Staging, pinned, recorded, sending
from kvtc_stream.gpu.runtime.streams import CHECKING, UPLOADING, apart, beside, interleaving
from kvtc_stream.gpu.runtime.tensors import BITS, Tensors, entries, every_column, taker
from kvtc_stream.io.dlpack import BackendName, layer_list, numpy_dtype, on_cuda
from kvtc_stream.io.steps import Steps, begun, run
from kvtc_stream.planning.rate_control import SectionControl

#: Batches that are decoded at once where the host has more to do than the device, a quarter more at
#: the most.
_TOGETHER = 3


class _Target(NamedTuple):
    """Tensors that are written, and as the device knows them: entries of all layers, and where
    values of all layers go, and those of each group."""

    tensors: tuple[Tensors, Tensors]
    columns: Any
    whole: Destination
    groups: list[Destination]


class CudaBackend:
    """See :class:`kvtc_stream.backends.base.Backend`."""

    name: BackendName = "cuda"

    @property
    def section_coder(self) -> type[CudaSectionCoder]:
        """See :attr:`kvtc_stream.backends.base.Backend.section_coder`."""
        return CudaSectionCoder

    def layer_list(
        self, x: Any, name: str, layers: int, kv_heads: int, head_dim: int
    ) -> tuple[list[Any], DType]:
        """See :meth:`kvtc_stream.backends.base.Backend.layer_list`."""
        dtypes: list[DType] = []
        take = taker()

        def convert(tensor: Any, own: str) -> Any:
            array, dtype = take(tensor, own)
            dtypes.append(dtype)
            return array

        found = layer_list(
            x, name, layers, kv_heads, head_dim, convert=convert, kind=lambda *_: dtypes[0]
        )
        for i, dtype in enumerate(dtypes):
            if dtype is not dtypes[0]:
                raise TypeError(
                    f"{name}[{i}] has dtype {dtype.label}, {name}[0] has {dtypes[0].label}; "
                    "expected one dtype for all layers: convert them first"
                )
        return found

    def array(self, x: NDArray[Any]) -> Any:
        """See :meth:`kvtc_stream.backends.base.Backend.array`."""
        return cupy.asarray(np.ascontiguousarray(x).view(BITS[x.itemsize]))

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Any:
        """See :meth:`kvtc_stream.backends.base.Backend.empty`."""
        return cupy.empty(shape, BITS[dtype.itemsize])

    def verbatim(self, header: StreamHeader, pieces: Sequence[tuple[Any, Any]]) -> list[Coded]:
        """See :meth:`kvtc_stream.backends.base.Backend.verbatim`."""
        sizes = [k.nbytes + v.nbytes for k, v in pieces]
        if all(codes_planes(header, size) for size in sizes):
            coded = verbatim.encode(pieces)
            if all(len(x) < size for x, size in zip(coded, sizes, strict=True)):
                return [Given(Coder.PLANES, x.data) for x in coded]
        arrays = [x for piece in pieces for x in piece]
        flat = cupy.concatenate([x.reshape(-1) for x in arrays]).view(np.uint8)
        ends = np.cumsum([x.nbytes for x in arrays])
        found = [
            own.view(x.dtype).reshape(x.shape)
            for own, x in zip(np.split(Staging().fetch(flat), ends[:-1]), arrays, strict=True)
        ]
        return [
            partial(code_verbatim, header, k, v)
            for k, v in zip(found[::2], found[1::2], strict=True)
        ]

    def pool(self, tensors: Sequence[Any]) -> Tensors:
        """See :meth:`kvtc_stream.backends.base.Backend.pool`."""
        take = taker()
        arrays, dtypes = zip(*(take(x, "pages") for x in tensors), strict=True)
        return Tensors.of_layers(arrays, dtypes[0], paged=True)

    def layers_in(self, pieces: Sequence[Any]) -> Tensors:
        """See :meth:`kvtc_stream.backends.base.Backend.layers_in`."""
        take = taker()
        arrays, dtypes = zip(*(take(x, "memory") for x in pieces), strict=True)
        return Tensors.of_pieces(arrays, dtypes[0])

    def held(self, x: Any) -> Any:
        """See :meth:`kvtc_stream.backends.base.Backend.held`.

        CuPy's, in the current stream: only on the caller's thread do frameworks know what streams
        their tensors are used in.
        """
        take = taker()

        def one(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return [one(layer) for layer in x]
            if not on_cuda(x):
                return x
            bits, dtype = take(x, "a cache's tensor")
            return bits.view(numpy_dtype(dtype))

        return one(x)

    def room(self, size: int) -> memoryview:
        """See :meth:`kvtc_stream.backends.base.Backend.room`: pinned memory."""
        return pinned(size)

    def sending(self, streams: Iterable[Any]) -> AbstractContextManager[None]:
        """See :meth:`kvtc_stream.backends.base.Backend.sending`."""
        return sending(streams)

    def batch_tokens(self, section: Section) -> int:
        """See :meth:`kvtc_stream.backends.base.Backend.batch_tokens`."""
        return batch_tokens(section)

    def alike(self, k: Sequence[Any], v: Sequence[Any]) -> tuple[Hashable, int] | None:
        """See :meth:`kvtc_stream.backends.base.Backend.alike`."""
        kind: list[Hashable] = []
        slots = []
        for arrays in (k, v):
            strides, begin = arrays[0].strides, arrays[0].data.ptr
            if strides[1] <= 0 or any(x.strides != strides for x in arrays):
                return None
            slot, rest = divmod(begin, strides[1])
            slots.append(slot)
            kind += [strides, rest, *(x.data.ptr - begin for x in arrays)]
        return (*kind, slots[1] - slots[0]), slots[0]

    def interleaving(self, tasks: Iterable[Iterator[None]]) -> Steps[None]:
        """See :func:`kvtc_stream.gpu.runtime.streams.interleaving`."""
        return interleaving(tasks)

    def output(self, x: Any, dtype: DType) -> Any:
        """See :meth:`kvtc_stream.backends.base.Backend.output`."""
        return x.view(numpy_dtype(dtype))


def _errors_at(
    errors: OffsetCurve, counted: NDArray[np.bool_], own: slice, offset: float
) -> tuple[Any, Any]:
    """Errors of K and V of the counted tokens of a block at an offset."""
    which = own.start + np.flatnonzero(counted[own])
    return errors.at((0, which), offset), errors.at((1, which), offset)


def _device_plan(
    calibration: CalibratedBases, section: int, plan: SectionPlan
) -> DevicePlan | BandPlan:
    made = (DevicePlan if plan.uniform else BandPlan)(calibration, section, plan)
    # Others use it in streams of their own.
    cupy.cuda.get_current_stream().synchronize()
    return made


class CudaSectionCoder(SectionCoder):
    """See :class:`kvtc_stream.backends.base.SectionCoder`."""

    def __init__(
        self, header: StreamHeader, section: int, calibration: CalibratedBases, **options: Any
    ) -> None:
        super().__init__(header, section, calibration, **options)
        plan = header.plan.sections[section]
        self._ropes = ropes_of(self._section)
        self._uniform = plan.uniform
        key = ("cuda", cupy.cuda.runtime.getDevice(), section, header.plan.digest)
        self._plan: Any = calibration.memo(key, lambda: _device_plan(calibration, section, plan))
        k_scale, v_scale = section_scales(header, section)
        self._scales: NDArray[np.float32] | None = None
        if k_scale is not None and v_scale is not None:
            self._scales = np.concatenate([k_scale, v_scale])
        self._encoder: BatchEncoder | BandEncoder | None = None
        self._arriving: list[Callable[[], Any]] = []
        self._host: CpuSectionCoder | None = None

    @cached_property
    def _decoder(self) -> BatchDecoder:
        kind = UniformDecoder if self._uniform else BandDecoder
        return kind(self._section, self._plan, self._scales)

    @property
    def _cpu(self) -> CpuSectionCoder:
        """A CPU coder, for blocks that the device cannot code."""
        if self._host is None:
            self._host = CpuBackend().section_coder(
                self._header,
                self._index,
                self._calibration,
                error_bound=self._bound,
                layer_error_bound=self._layer_bound,
                measure=self._measure,
            )
        return self._host

    # Encoding.

    def encode(
        self, k: Any, v: Any, positions: NDArray[np.int64], start: int
    ) -> Sequence[Block | BlockRun]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.encode`."""
        tensors = self._tensors(k, v)
        blocks = run(self.encode_from(tensors, slice(0, len(positions)), positions, start))
        self.arrived()
        return blocks

    def arrived(self) -> None:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.arrived`."""
        while self._arriving:
            self._arriving.pop()()

    def source(self, k: list[Any], v: list[Any]) -> list[Tensors] | None:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.source`."""
        try:
            return self._tensors(k, v)
        except ValueError:  # of some kind that kernels do not read
            return None

    def _tensors(self, k: Any, v: Any) -> list[Tensors]:
        return [Tensors.of_layers(x, self._header.dtype) for x in (k, v)]

    def encode_from(
        self, source: list[Tensors], span: slice, positions: NDArray[np.int64], start: int
    ) -> Steps[Sequence[Block | BlockRun]]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.encode_from`."""
        size = self._header.block_tokens
        encoder = self._encoder = self._encoder or self._new_encoder()
        together = max(1, encoder.batch_tokens // size) * size
        blocks: list[Block | BlockRun] = []
        before: Steps[list[Block | BlockRun]] | None = None
        for first in range(span.start, span.stop, together):
            last = min(first + together, span.stop)
            edges = np.append(np.arange(first, last, size), last)
            where = positions[first - span.start : last - span.start]
            # The device goes on with a batch while the host ends the one before.
            now = begun(self._batch(encoder, source, edges, where, start + first - span.start))
            if before is not None:
                blocks += yield from before
            before = now
        if before is not None:
            blocks += yield from before
        return blocks

    def verbatim_from(self, source: list[Tensors], spans: Sequence[slice]) -> Steps[list[Coded]]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.verbatim_from`."""
        s, dtype = self._section, self._header.dtype
        counts = [span.stop - span.start for span in spans]
        sizes = [self._header.verbatim_size(self._index, n) for n in counts]
        firsts = verbatim.starts(sizes)
        values = cupy.empty(int(firsts[-1]), np.uint8)
        staging = Staging()
        self._collect(staging, source, spans, firsts, values)
        if all(codes_planes(self._header, size) for size in sizes):
            bits = [size // 2 for size in sizes]
            coded = yield from verbatim.encode_values(staging, values.view(np.uint16), bits)
            if all(len(x) < size for x, size in zip(coded, sizes, strict=True)):
                return [Given(Coder.PLANES, x.data) for x in coded]
        memory, ready = staging.begin_large(values)
        yield
        ready()
        host = np.frombuffer(memory, np.uint8)
        found: list[Coded] = []
        for n, first, size in zip(counts, firsts.tolist(), sizes, strict=False):
            own = host[first : first + size].view(numpy_dtype(dtype))
            k, v = np.split(own, [math.prod(s.k_shape(n))])
            k, v = k.reshape(s.k_shape(n)), v.reshape(s.v_shape(n))
            found.append(partial(code_verbatim, self._header, k, v))
        return found

    def _collect(
        self,
        staging: Staging,
        source: list[Tensors],
        spans: Sequence[slice],
        firsts: NDArray[np.int64],
        values: Any,
    ) -> None:
        """Copy K and then V [layers, heads, tokens, dim] of each span, from the byte that is its
        first in ``values`` on."""
        s, itemsize = self._section, self._header.dtype.itemsize
        layers = np.arange(len(s.layers))
        columns = every_column(layers)
        moves = []
        for span, first in zip(spans, firsts.tolist(), strict=False):
            size = itemsize * s.kv_heads * (span.stop - span.start)
            dense = [layers * size * s.k_dim, (layers * s.v_dim + len(layers) * s.k_dim) * size]
            at = values.data.ptr + first + np.concatenate(dense)
            moves.append((np.arange(span.start, span.stop), at))
        [columns_d] = staging.arrays(entries(source[0], source[1], columns, self._ropes))
        move(staging, moves, columns_d, itemsize, back=True)

    def _batch(
        self,
        encoder: BatchEncoder | BandEncoder,
        tensors: list[Tensors],
        edges: NDArray[np.int64],
        positions: NDArray[np.int64],
        start: int,
    ) -> Steps[list[Block | BlockRun]]:
        """Blocks of the tokens between ``edges``, whose ``positions`` these are, and the first of
        which is ``start``."""
        first, starts = int(edges[0]), edges - edges[0]
        inputs = tensors[0], tensors[1], first + np.arange(len(positions)), positions, starts
        if isinstance(encoder, BandEncoder):
            found = encoder.encode(*inputs)
        else:
            batch, offsets = encoder.prepare(*inputs), np.zeros(len(starts) - 1)
            control = self._control
            near = () if control is None else control.likely
            sizes = encoder.sizes(batch, near=near)
            yield
            if control is not None:
                batch, offsets = self._choose(control, encoder, batch, sizes)
            found = yield from encoder.encode(batch, offsets)
        self._arriving.append(found.ready)
        sizes, left_out = np.diff(starts), np.add.reduceat(found.verbatim, starts[:-1], dtype=int)
        unusual = (found.faults != 0) | (left_out > 0) | (sizes != self._header.block_tokens)
        unusual |= positions[starts[1:] - 1] - positions[starts[:-1]] >= sizes
        blocks: list[Block | BlockRun] = []
        ends = np.flatnonzero(np.diff(unusual)) + 1
        for begin, end in pairwise([0, *ends.tolist(), len(sizes)]):
            if not unusual[begin]:
                blocks.append(self._run(found, slice(begin, end), starts, positions, start))
                continue
            for i in range(begin, end):
                own = slice(*starts[i : i + 2].tolist())
                blocks += self._unusual(found, i, own, tensors, first, positions[own], start)
        return blocks

    def _run(
        self,
        found: BatchPayloads,
        some: slice,
        starts: NDArray[np.int64],
        positions: NDArray[np.int64],
        start: int,
    ) -> BlockRun:
        """Some blocks of :meth:`_batch`, usual ones."""
        size, begins = self._header.block_tokens, starts[some]
        count = len(begins)
        measure, errors = Measure.NONE, np.zeros((count, 4), np.float32)
        if found.errors is not None:
            measure, own = Measure.RECONSTRUCTION, slice(begins[0], begins[-1] + size)
            errors = errors_of_alike(found.errors[:, own], size)
        codes = found.layer_codes if self._by_layer else None
        return BlockRun(
            section=self._index,
            start=start + int(begins[0]),
            tokens=size,
            firsts=positions[begins],
            coders=found.coders[some],
            coded_sizes=found.coded_sizes[some],
            data=found.data,
            places=found.places[some],
            measure=measure,
            errors=errors,
            layer_codes=np.empty((count, 0), np.uint8) if codes is None else codes[some],
        )

    def _unusual(
        self,
        found: BatchPayloads,
        i: int,
        own: slice,
        tensors: list[Tensors],
        first: int,
        positions: NDArray[np.int64],
        start: int,
    ) -> Sequence[Block | BlockRun]:
        """Block ``i`` of :meth:`_batch`, of the tokens ``own``, whose ``positions`` these are."""
        slots, start = np.arange(first + own.start, first + own.stop), start + own.start
        if found.faults[i]:
            k, v = self._picked(tensors, slots)
            return self._cpu.encode(k, v, positions, start)
        verbatim = found.verbatim[own]
        left_out, kept = np.flatnonzero(verbatim), np.flatnonzero(~verbatim)
        verbatim_coder, values = Coder.STORED, b""
        if len(left_out):
            picked = self._picked(tensors, slots[left_out])
            verbatim_coder, values = code_verbatim(self._header, *picked)
        errors, by_layer = NO_ERRORS, None
        if found.errors is not None:
            errors = block_errors(found.errors[:, own], kept)
        if self._by_layer and found.layer_codes is not None and len(kept):
            by_layer = LayerErrors(found.layer_codes[i].tobytes())
        begin, size = found.places[i].tolist()
        return [
            Block(
                section=self._index,
                role=Role.DATA,
                start=start,
                tokens=len(positions),
                positions=stored_positions(positions),
                verbatim_tokens=tuple(left_out.tolist()),
                coder=Coder(found.coders[i]),
                coded=found.data[begin : begin + size],
                coded_size=int(found.coded_sizes[i]),
                verbatim_coder=verbatim_coder,
                verbatim=values,
                errors=errors,
                layer_errors=by_layer,
            )
        ]

    def _new_encoder(self) -> BatchEncoder | BandEncoder:
        arguments = self._section, self._plan, self._header.out_dtype, self._scales
        options: dict[str, Any] = {
            "measure": self._measure,
            "bound": self._bound,
            "layer_bound": self._layer_bound,
        }
        if self._uniform:
            return BatchEncoder(*arguments, **options)
        return BandEncoder(*arguments, coder=self._header.coder, **options)

    def _choose(
        self,
        control: SectionControl,
        encoder: BatchEncoder,
        batch: EncoderBatch,
        sizes: OffsetCurve,
    ) -> tuple[EncoderBatch, NDArray[np.float64]]:
        """Choose the steps of a batch's blocks; ``sizes`` are those of all of its tokens.

        Returns the batch, with the grids that restored tokens keep, and the blocks' offsets to the
        plan's step, float64 [blocks].

        The rate control counts the estimated sizes or errors, not the real ones, so that a block's
        bytes do not depend on which blocks were in a batch with it.
        """
        fits, known = encoder.judged(batch)
        restored: list[float | None] = [None] * len(batch.blocks)
        if known.any():
            batch, restored = self._kept_grids(control, encoder, batch, fits, known)
            sizes = encoder.sizes(batch)
        errors = encoder.errors(batch)
        counted, measured = fits & ~known, fits
        if known.any():
            measured = np.zeros_like(fits)
            for own in batch.blocks:
                counted[own] = control.counted(fits[own], known[own])
                measured[own] = counted[own] if counted[own].any() else known[own]
        if control.of_errors:
            # Tokens that will be verbatim have none.
            found = errors.at((slice(None), slice(None)), 0.0)
            counted &= (found <= self._bound).all(axis=0)
        elif not measured.all():
            sizes = encoder.sizes(batch, measured)
        counts = np.add.reduceat(counted, batch.starts[:-1], dtype=np.int64).tolist()
        offsets = np.zeros(len(counts))
        for i, (own, count) in enumerate(zip(batch.blocks, counts, strict=True)):
            if count or restored[i] is not None:
                at: Callable[[float], Any] = partial(sizes.of, i)
                if control.of_errors:
                    at = partial(_errors_at, errors, counted, own)
                offsets[i] = control.take(count, at, restored=restored[i])
        return batch, offsets

    def _kept_grids(
        self,
        control: SectionControl,
        encoder: BatchEncoder,
        batch: EncoderBatch,
        fits: NDArray[np.bool_],
        known: NDArray[np.bool_],
    ) -> tuple[EncoderBatch, list[float | None]]:
        """The batch with the grids that restored tokens keep, and the offset at which each block
        has such tokens. Sets ``known``, which of those that fit have such grids, bool [tokens]."""
        grids, changed = encoder.grids(batch), False
        for own, part in product(batch.blocks, grids):
            completed = part[own].completed().grids
            changed |= bool((completed != part.grids[own]).any())
            part.grids[own] = completed
        if changed:
            known[:] = fits & np.logical_and.reduce([own.known for own in grids])
            batch, changed = encoder.with_grids(batch, grids), False
        sizes, least = encoder.sizes(batch, known), encoder.overhead(batch, known)
        restored: list[float | None] = [None] * len(batch.blocks)
        for i, own in enumerate(batch.blocks):
            if known[own].any():
                offset = float(np.mean([x[own].offset for x in grids]))
                count = int(np.count_nonzero(known[own]))
                if control.keeps(count, sizes.of(i, offset), float(least[i])):
                    restored[i] = offset
                else:
                    known[own], changed = False, True
                    for part in grids:
                        part.grids[own] = NO_GRID
        return encoder.with_grids(batch, grids) if changed else batch, restored

    def _picked(self, tensors: Sequence[Tensors], slots: NDArray[np.int64]) -> list[NDArray[Any]]:
        """K and V [layers, heads, tokens, dim] of some tokens, on the host."""
        s, dtype = self._section, self._header.dtype
        shapes = s.k_shape(len(slots)), s.v_shape(len(slots))
        if not len(slots):
            return [np.empty(shape, numpy_dtype(dtype)) for shape in shapes]
        held = [cupy.empty(shape, BITS[dtype.itemsize]) for shape in shapes]
        layers = range(len(s.layers))
        dense = [x[i].data.ptr for x in held for i in layers]
        columns = self._columns(layers, *tensors)
        move(self._decoder.staging, [(slots, dense)], columns, dtype.itemsize, back=True)
        return [cupy.asnumpy(x).view(numpy_dtype(dtype)) for x in held]

    # Decoding.

    def decode(self, block: Block, layers: Sequence[int]) -> tuple[Any, Any]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decode`."""
        s, chosen = self._section, list(layers)
        dtype = self._header.out_dtype
        shape = (len(chosen), s.kv_heads, block.tokens)
        k, v = (cupy.empty((*shape, d), BITS[dtype.itemsize]) for d in (s.k_dim, s.v_dim))
        self.decode_into(BlockTable.of([block]), np.arange(block.tokens), chosen, k, v)
        return k.view(numpy_dtype(dtype)), v.view(numpy_dtype(dtype))

    def decoding(
        self,
        table: BlockTable,
        slots: NDArray[np.int64],
        layers: Sequence[int],
        k: Any,
        v: Any,
        *,
        unseen: bool = False,
    ) -> Iterator[None]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decoding`: payloads to symbols, then to
        values, then whatever the device found wrong."""
        dtype = self._header.out_dtype
        outputs = [x if isinstance(x, Tensors) else Tensors.of_layers(x, dtype) for x in (k, v)]
        k_out, v_out = (self._spread(x, layers) for x in outputs)
        exact = self._exact()
        loaded = self._decoder.load(table, slots, tiles=exact.tiles)
        batches = self._decoder.batches(loaded.blocks)
        first = list(islice(batches, 1))
        destination = self._decoder.destination(layers, k_out, v_out)
        values = partial(self._decoder.start, chain(first, batches), destination)
        try:
            started = values() if unseen else []
            if started:
                yield  # what follows can wait until the device has the next blocks, too
            whole = loaded.verifying()
            columns = self._columns(layers, k_out, v_out)
            there = exact.there(table, slots, loaded)
            try:
                early = exact.uploaded(there)
            except FormatError:
                whole()  # says more of a payload that is damaged
                raise
            rest = exact.of(table, slots, loaded, {x.row for x in there})
            yield
            whole()
            exact.place(early, layers, columns)
            started = started or values()
            for some in rest:  # beside what the device does
                exact.place(exact.uploaded(some), layers, columns)
            yield
            for block, own in faulty(started):
                self._place(own, *self._cpu.decode(block, layers), columns)
            exact.check()
        finally:  # callers may go on in streams of their own, or give the memory back
            cupy.cuda.get_current_stream().synchronize()

    @apart
    def arriving(
        self,
        portions: Iterable[tuple[BlockTable, NDArray[np.int64]]],
        early: int,
        groups: Sequence[Sequence[int]],
        out: Callable[[], tuple[Any, Any]],
    ) -> Steps[None]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.arriving`. The device gets all of its
        work at once."""
        yield from _Arrival(self, early, groups, out).steps(portions)

    def _exact(self) -> ExactTokens:
        return ExactTokens(self._header, self._index, self._decoder.staging)

    def _spread(self, out: Tensors, layers: Sequence[int]) -> Tensors:
        """The same tensors with an address for every layer of the section, 0 if not wanted."""
        addresses = [0] * len(self._section.layers)
        for layer, address in zip(layers, out.addresses, strict=True):
            addresses[layer] = address
        return replace(out, addresses=tuple(addresses))

    def _place(
        self,
        slots: NDArray[np.int64],
        k: NDArray[Any],
        v: NDArray[Any],
        columns: Any,
    ) -> None:
        """Copy K and V [layers, heads, tokens, dim] from the host to slots."""
        values = [np.ascontiguousarray(x).view(np.uint8) for x in (k, v)]
        held, begins = self._decoder.staging.upload([x.reshape(-1) for x in values])
        dense = [
            held.data.ptr + begin + i * x[0].nbytes
            for x, begin in zip(values, begins.tolist(), strict=True)
            for i in range(len(x))
        ]
        itemsize = self._header.out_dtype.itemsize
        move(self._decoder.staging, [(slots, dense)], columns, itemsize, back=False)

    def _columns(self, layers: Sequence[int], k: Tensors, v: Tensors) -> Any:
        """Entries of layers, K's and then V's, int64 [2 · layers, layout.FIELDS] on the device."""
        own = entries(k, v, every_column(layers), self._ropes)
        [found] = self._decoder.staging.arrays(own)
        return found

    def decode_layers(self, block: Block) -> Callable[[int], tuple[Any, Any]]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decode_layers`."""
        return self.layers_of(BlockTable.of([block]), np.arange(block.tokens), block.tokens)

    def layers_of(
        self, table: BlockTable, slots: NDArray[np.int64], tokens: int
    ) -> Callable[[int], tuple[Any, Any]]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.layers_of`."""
        s, dtype = self._section, self._header.out_dtype
        exact = self._exact()
        loaded = self._decoder.load(table, slots, tiles=exact.tiles)
        found = [
            (some, self._decoder.symbols(some))
            for some in loaded.blocks.batches(self._decoder.batch_tokens)
        ]
        loaded.verifying()()
        verbatim = exact.of(table, slots, loaded)
        fetch = self._decoder.staging.begin_fetch
        slow = list(faulty(RunningBatch(some, fetch(batch.faults)) for some, batch in found))
        on_host = [(own, self._cpu.decode_layers(block)) for block, own in slow]
        values = [own for some in verbatim for own in exact.uploaded(some)]
        exact.check()

        def layer(index: int) -> tuple[Any, Any]:
            shape = (1, s.kv_heads, tokens)
            k, v = (cupy.empty((*shape, d), BITS[dtype.itemsize]) for d in (s.k_dim, s.v_dim))
            k_out, v_out = (self._spread(Tensors.of_layers(x, dtype), [index]) for x in (k, v))
            if found:
                destination = self._decoder.destination([index], k_out, v_out)
                for _, batch in found:
                    self._decoder.values(batch, destination)
            decoded = list(on_host)
            for some, batch in found:
                if int(batch.faults[-1]):
                    beyond = faulty([RunningBatch(some, fetch(batch.faults))])
                    decoded += [(own, self._cpu.decode_layers(block)) for block, own in beyond]
            columns = self._columns([index], k_out, v_out)
            for own, of_layer in decoded:
                self._place(own, *of_layer(index), columns)
            exact.place(values, [index], columns)
            return k.view(numpy_dtype(dtype)), v.view(numpy_dtype(dtype))

        return layer


class _Arrival:
    """What :meth:`CudaSectionCoder.arriving` does, for one call of it."""

    def __init__(
        self,
        coder: CudaSectionCoder,
        early: int,
        groups: Sequence[Sequence[int]],
        out: Callable[[], tuple[Any, Any]],
    ) -> None:
        self._coder, self._decoder = coder, coder._decoder
        self._early, self._groups, self._out = early, groups, out
        self._stream, self._ready = cupy.cuda.get_current_stream(), recorded()
        self._loads: list[BlockLoad] = []
        self._exact = coder._exact()
        self._verbatim: list[Iterator[Sequence[Exact]]] = []
        self._batches: list[tuple[CodedBlocks, Batch]] = []
        self._first: list[RunningBatch] = []
        self._verifying: list[Callable[[], None]] = []

    def steps(self, portions: Iterable[tuple[BlockTable, NDArray[np.int64]]]) -> Steps[None]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.arriving`."""
        try:
            try:
                yield from self._sending(portions)
                started = [
                    (self._decoder.start(self._batches, each), recorded())
                    for each in self._target.groups
                ]
            except FormatError:
                for load in self._loads:
                    load.verifying()()  # says more of a payload that is damaged
                raise
            yield
            for whole in self._verifying:
                whole()
        finally:  # what is read may change now, and what is written be given back
            for number in UPLOADING, CHECKING:
                with beside(self._ready, number):
                    cupy.cuda.get_current_stream().synchronize()
        self._exact.check()
        yield
        slow = list(faulty(self._first))
        for (running, done), own in zip(started, self._groups, strict=True):
            for block, where in chain(slow, faulty(running)):
                k, v = self._coder._cpu.decode(block, own)
                columns = self._coder._columns(own, *self._target.tensors)
                self._coder._place(where, k, v, columns)
                done = recorded()
            done.synchronize()
            yield

    def _sending(self, portions: Iterable[tuple[BlockTable, NDArray[np.int64]]]) -> Steps[None]:
        """Payloads to symbols, and those of early portions to values. A step is made when the first
        portion has been launched."""
        uploaded, held = self._ready, 0
        for i, (table, slots) in enumerate(portions):
            with beside(self._ready, UPLOADING):
                loaded = self._decoder.load(table, slots, tiles=self._exact.tiles)
                uploaded = recorded()
            self._loads.append(loaded)
            self._verbatim.append(self._exact.of(table, slots, loaded))
            if len(loaded.blocks):
                self._stream.wait_event(uploaded)
                self._launch(loaded.blocks, i < self._early)
            if not i:
                yield
            self._target  # noqa: B018  # groups of layers wait for it, not for checksums
            self._verifying.append(loaded.verifying())
            held += self._exact.size(int(table.rows["verbatim"].sum()))
            if held > MOST_JOINED:  # threads have begun with all of them
                self._place(uploaded)
                held = 0
        self._place(uploaded)

    def _launch(self, blocks: CodedBlocks, early: bool) -> None:
        for some in blocks.batches(_TOGETHER * self._decoder.batch_tokens):
            batch = self._decoder.symbols(some)
            if early:
                self._first += self._decoder.start([(some, batch)], self._target.whole)
            else:
                self._batches.append((some, batch))

    def _place(self, uploaded: Any) -> None:
        """What is exact and waits to its place."""
        layers, waiting = range(len(self._coder._section.layers)), self._verbatim
        self._verbatim = []
        with beside(uploaded):
            for some in self._exact.joined(chain.from_iterable(waiting)):
                self._exact.place(self._exact.uploaded(some), layers, self._target.columns)

    @cached_property
    def _target(self) -> _Target:
        layers = range(len(self._coder._section.layers))
        with beside(self._ready):
            k, v = self._out()
            columns = self._coder._columns(layers, k, v)
            whole, *groups = self._decoder.destinations([layers, *self._groups], k, v)
            self._stream.wait_event(recorded())
        return _Target((k, v), columns, whole, groups)
