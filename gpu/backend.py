"""The CUDA backend: device tensors in and out, the kernels in between.

Everything runs on CuPy's current device and stream. Methods return when the host knows sizes;
values may still be on their way, as the stream's order tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import Coded, R, SectionCoder, T, block_errors
from kvtc_stream.backends.cpu import CpuBackend, CpuSectionCoder
from kvtc_stream.calibration.parts import CalibratedBases
from kvtc_stream.coding.values import (
    code_verbatim,
    codes_planes,
    section_scales,
    stored_positions,
    verbatim_output,
    verbatim_planes,
)
from kvtc_stream.errors import FormatError
from kvtc_stream.formats import (
    Block,
    BlockTable,
    Coder,
    DType,
    LayerErrors,
    Role,
    SectionPlan,
    StreamHeader,
)
from kvtc_stream.formats.coders import decompress
from kvtc_stream.gpu.coder import verbatim
from kvtc_stream.gpu.coder.analysis import Payload
from kvtc_stream.gpu.coder.band_coding import BandDecoder, BandEncoder
from kvtc_stream.gpu.coder.decoding import (
    BATCH_TOKENS,
    BatchDecoder,
    BlockLoad,
    RunningBatch,
    UniformDecoder,
    faulty,
)
from kvtc_stream.gpu.coder.encoding import BatchEncoder, EncoderBatch
from kvtc_stream.gpu.coder.plan import BandPlan, DevicePlan
from kvtc_stream.gpu.coder.rope import ropes_of
from kvtc_stream.gpu.kernels import layout
from kvtc_stream.gpu.runtime.staging import Staging, pinned
from kvtc_stream.gpu.runtime.streams import interleave, side_by_side
from kvtc_stream.gpu.runtime.tensors import BITS, Tensors, entries, to_device
from kvtc_stream.io.dlpack import BackendName, layer_list, numpy_dtype, on_cuda
from kvtc_stream.io.threads import threads
from kvtc_stream.planning.rate_control import SectionControl

#: About the most bytes of verbatim tokens that wait to be uploaded.
_VERBATIM_BYTES = 64 << 20


class _Exact(NamedTuple):
    """Verbatim tokens of a block: its row and first ordinal, the tokens' slots, and their byte
    planes; or, if the device decodes them, their payload."""

    row: int
    start: int
    slots: NDArray[np.int64]
    planes: bytes | None
    payload: memoryview


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

        def convert(tensor: Any, own: str) -> Any:
            array, dtype = to_device(tensor, own)
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
                return [partial(_given, Coder.PLANES, x.data) for x in coded]
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
        arrays, dtypes = zip(*(to_device(x, "pages") for x in tensors), strict=True)
        return Tensors.of_layers(arrays, dtypes[0], paged=True)

    def held(self, x: Any) -> Any:
        """See :meth:`kvtc_stream.backends.base.Backend.held`.

        CuPy's, in the current stream: only on the caller's thread do frameworks know what streams
        their tensors are used in.
        """
        if isinstance(x, list | tuple):
            return [self.held(layer) for layer in x]
        if not on_cuda(x):
            return x
        bits, dtype = to_device(x, "a cache's tensor")
        return bits.view(numpy_dtype(dtype))

    def room(self, size: int) -> memoryview:
        """See :meth:`kvtc_stream.backends.base.Backend.room`: pinned memory."""
        return pinned(size)

    batch_tokens = BATCH_TOKENS

    def side_by_side(self, function: Callable[[T], R], arguments: Sequence[T]) -> list[R]:
        """See :func:`kvtc_stream.gpu.runtime.streams.side_by_side`."""
        return side_by_side(function, arguments)

    def interleave(self, tasks: Iterable[Iterator[None]]) -> None:
        """See :func:`kvtc_stream.gpu.runtime.streams.interleave`."""
        interleave(tasks)

    def output(self, x: Any, dtype: DType) -> Any:
        """See :meth:`kvtc_stream.backends.base.Backend.output`."""
        return x.view(numpy_dtype(dtype))


def _given(coder: Coder, payload: memoryview) -> tuple[Coder, memoryview]:
    return coder, payload


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
        self._decoder: BatchDecoder = (UniformDecoder if plan.uniform else BandDecoder)(
            self._section, self._plan, self._scales
        )
        self._encoder: BatchEncoder | BandEncoder | None = None
        self._unchecked: list[tuple[list[int], Any]] = []
        self._host: CpuSectionCoder | None = None

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

    def encode(self, k: Any, v: Any, positions: NDArray[np.int64], start: int) -> list[Block]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.encode`."""
        tensors = [Tensors.of_layers(list(x), self._header.dtype) for x in (k, v)]
        size, tokens = self._header.block_tokens, len(positions)
        encoder = self._encoder = self._encoder or self._new_encoder()
        together = max(1, encoder.batch_tokens // size) * size
        blocks: list[Block] = []
        for first in range(0, tokens, together):
            last = min(first + together, tokens)
            edges = np.append(np.arange(first, last, size), last)
            blocks += self._batch(encoder, tensors, positions, start, edges)
        return blocks

    def _batch(
        self,
        encoder: BatchEncoder | BandEncoder,
        tensors: list[Tensors],
        positions: NDArray[np.int64],
        start: int,
        edges: NDArray[np.int64],
    ) -> list[Block]:
        first, last = int(edges[0]), int(edges[-1])
        own_positions, starts = positions[first:last], edges - first
        inputs = tensors[0], tensors[1], np.arange(first, last), own_positions, starts
        offsets = np.zeros(len(edges) - 1)
        if isinstance(encoder, BandEncoder):
            found = encoder.encode(*inputs)
        else:
            batch = encoder.prepare(*inputs)
            if self._control is not None:
                batch, offsets = self._choose(self._control, encoder, batch)
            found = encoder.encode(batch, offsets)
        blocks = []
        for i, (begin, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            own = slice(begin - first, end - first)
            where = positions[begin:end], start + begin
            payload, left_out = found.payloads[i], np.flatnonzero(found.verbatim[own])
            which = np.arange(begin, end) if payload is None else begin + left_out
            k_host, v_host = self._picked(tensors, which)
            if payload is None:
                blocks += self._cpu.encode(k_host, v_host, *where)
            else:
                errors = None if found.errors is None else found.errors[:, own]
                by_layer = found.layer_errors[i] if self._by_layer and found.layer_errors else None
                blocks.append(
                    self._block(k_host, v_host, *where, payload, left_out, errors, by_layer)
                )
        return blocks

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
        self, control: SectionControl, encoder: BatchEncoder, batch: EncoderBatch
    ) -> tuple[EncoderBatch, NDArray[np.float64]]:
        """Choose the steps of a batch's blocks.

        Returns the batch, without the grids of restored tokens that are not kept, and the blocks'
        offsets to the plan's step, float64 [blocks].

        The rate control counts the estimated sizes or errors, not the real ones, so that a block's
        bytes do not depend on which blocks were in a batch with it.
        """
        blocks = [slice(a, b) for a, b in pairwise(batch.starts.tolist())]
        grids, fits = encoder.grids(batch)
        known = fits & np.logical_and.reduce([own.known for own in grids])
        restored: list[float | None] = [None] * len(blocks)
        if known.any():
            sizes, forgotten = encoder.sizes(batch, known), np.zeros_like(known)
            least = encoder.overhead(batch, known)
            for i, own in enumerate(blocks):
                if known[own].any():
                    offset = float(np.mean([x[own].offset for x in grids]))
                    count = int(np.count_nonzero(known[own]))
                    if control.keeps(count, float(sizes.at(i, offset)), float(least[i])):
                        restored[i] = offset
                    else:
                        forgotten[own] = True
            if forgotten.any():
                batch, known = encoder.forgotten(batch, forgotten), known & ~forgotten
        errors = encoder.errors(batch)
        counted, measured = np.zeros((2, len(known)), np.bool_)
        for own in blocks:
            counted[own] = control.counted(fits[own], known[own])
            if control.of_errors:
                # Tokens that will be verbatim have none.
                found = errors.at((slice(None), own), 0.0)
                counted[own] &= (found <= self._bound).all(axis=0)
            measured[own] = counted[own] if counted[own].any() else known[own]
        sizes = encoder.sizes(batch, measured)
        offsets = np.zeros(len(blocks))
        for i, own in enumerate(blocks):
            which = own.start + np.flatnonzero(counted[own])
            if not len(which) and restored[i] is None:
                continue

            def size(x: float, i: int = i) -> float:
                return float(sizes.at(i, x))

            def error(x: float, which: NDArray[np.int64] = which) -> tuple[Any, Any]:
                return errors.at((0, which), x), errors.at((1, which), x)

            offsets[i] = control.choose(len(which), size, error, restored=restored[i])
            control.expect(float(offsets[i]), len(which), size, error)
        return batch, offsets

    def reads(self, k: list[Any], v: list[Any]) -> bool:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.reads`."""
        try:
            for x in (k, v):
                Tensors.of_layers(x, self._header.dtype)
        except ValueError:  # of some kind that kernels do not read
            return False
        return True

    def _picked(self, tensors: Sequence[Tensors], slots: NDArray[np.int64]) -> list[NDArray[Any]]:
        """K and V [layers, heads, tokens, dim] of some tokens, on the host."""
        s, dtype = self._section, self._header.dtype
        shapes = s.k_shape(len(slots)), s.v_shape(len(slots))
        if not len(slots):
            return [np.empty(shape, numpy_dtype(dtype)) for shape in shapes]
        held = [cupy.empty(shape, BITS[dtype.itemsize]) for shape in shapes]
        layers = range(len(s.layers))
        dense = [x[i].data.ptr for x in held for i in layers]
        self._move(slots, dense, self._columns(layers, *tensors), dtype, back=True)
        return [cupy.asnumpy(x).view(numpy_dtype(dtype)) for x in held]

    def _block(
        self,
        k: NDArray[Any],
        v: NDArray[Any],
        positions: NDArray[np.int64],
        start: int,
        payload: Payload,
        left_out: NDArray[np.int64],
        errors: NDArray[np.float32] | None,
        by_layer: LayerErrors | None,
    ) -> Block:
        """Make the record of a payload.

        ``k`` and ``v`` [layers, kv_heads, tokens, head_dim] are the tokens at the indices
        ``left_out``, which are stored verbatim; ``errors`` is float32 [2, tokens] of K and V.
        """
        verbatim_coder, data, kept = Coder.STORED, b"", np.arange(len(positions))
        if len(left_out):
            verbatim_coder, data = code_verbatim(self._header, k, v)
            kept = np.delete(kept, left_out)
        return Block(
            section=self._index,
            role=Role.DATA,
            start=start,
            tokens=len(positions),
            positions=stored_positions(positions),
            verbatim_tokens=tuple(left_out.tolist()),
            coder=payload.coder,
            coded=payload.data,
            coded_size=payload.coded_size,
            verbatim_coder=verbatim_coder,
            verbatim=data,
            errors=block_errors(errors, kept),
            layer_errors=by_layer if len(kept) else None,
        )

    # Decoding.

    def decode(self, block: Block, layers: Sequence[int]) -> tuple[Any, Any]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decode`."""
        s, chosen = self._section, list(layers)
        dtype = self._header.out_dtype
        shape = (len(chosen), s.kv_heads, block.tokens)
        k, v = (cupy.empty((*shape, d), BITS[dtype.itemsize]) for d in (s.k_dim, s.v_dim))
        self.decode_into(BlockTable.of([block]), np.arange(block.tokens), chosen, k, v)
        return k.view(numpy_dtype(dtype)), v.view(numpy_dtype(dtype))

    def decode_into(
        self,
        table: BlockTable,
        slots: NDArray[np.int64],
        layers: Sequence[int],
        k: Any,
        v: Any,
    ) -> None:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decode_into`."""
        for _ in self.decoding(table, slots, layers, k, v):
            pass

    def decoding(
        self,
        table: BlockTable,
        slots: NDArray[np.int64],
        layers: Sequence[int],
        k: Any,
        v: Any,
    ) -> Iterator[None]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decoding`: payloads to symbols, then to
        values, then whatever the device found wrong."""
        dtype = self._header.out_dtype
        outputs = [
            x if isinstance(x, Tensors) else Tensors.of_layers(list(x), dtype) for x in (k, v)
        ]
        k_out, v_out = (self._spread(x, layers) for x in outputs)
        self._unchecked.clear()  # of a call that failed
        loaded = self._decoder.load(table, slots, tiles=self._tiles)
        batches = self._decoder.batches(loaded.blocks)
        first = list(islice(batches, 1))
        yield
        loaded.whole()
        exact = self._exact(table, slots)
        started = self._decoder.start(chain(first, batches), layers, k_out, v_out)
        columns = self._columns(layers, k_out, v_out)
        for found in exact:  # beside what the device does
            for own, values in self._uploaded(found, loaded):
                self._place_exact(own, values, layers, columns)
        yield
        for block, own in faulty(started):
            self._place(own, *self._cpu.decode(block, layers), columns)
        self._check_exact()
        # Callers may go on in streams of their own.
        cupy.cuda.get_current_stream().synchronize()

    @property
    def _tiles(self) -> bool:
        """Whether the device decodes tiles of verbatim values: they are of the output's type."""
        return self._header.dtype is self._header.out_dtype

    def _exact(self, table: BlockTable, slots: NDArray[np.int64]) -> Iterator[Sequence[_Exact]]:
        """The verbatim tokens, of some blocks at a time; threads begin with those that the device
        does not decode at once. The blocks are known to be whole."""
        rows, verbatim = table.rows, table.verbatim()
        edges = np.concatenate([[0], np.cumsum(rows["tokens"])]).tolist()
        header, waiting = self._header, 0

        def planes(row: int) -> bytes:
            if not self._tiles:
                block = table.block(row, verified=True)
                return b"".join(verbatim_planes(*verbatim_output(block, header)))
            data = table.bytes_of(row, "exact", "exact_length")
            size = header.verbatim_size(self._index, int(rows["verbatim"][row]))
            return decompress(Coder(rows["verbatim_coder"][row]), data, size)

        groups: list[list[tuple[int, NDArray[np.int64], Future[bytes] | None]]] = []
        for row in np.flatnonzero(rows["verbatim"]).tolist():
            own = slice(edges[row], edges[row + 1])
            if not groups or waiting > _VERBATIM_BYTES:
                groups.append([])
                waiting = 0
            tiles = self._tiles and rows["verbatim_coder"][row] == Coder.PLANES
            found = None if tiles else threads().submit(planes, row)
            groups[-1].append((row, slots[own][verbatim[own]], found))
            waiting += header.verbatim_size(self._index, int(rows["verbatim"][row]))

        def result(row: int, own: NDArray[np.int64], found: Future[bytes] | None) -> _Exact:
            payload = table.bytes_of(row, "exact", "exact_length")
            start = int(rows["start"][row])
            return _Exact(row, start, own, None if found is None else found.result(), payload)

        return ([result(*one) for one in group] for group in groups)

    def _uploaded(
        self, found: Sequence[_Exact], loaded: BlockLoad
    ) -> list[tuple[NDArray[np.int64], Any]]:
        """Slots, and values on the device; see :meth:`_check_exact`."""
        size = self._header.out_dtype.itemsize
        there = [x for x in found if x.planes is None and loaded.exact[x.row] >= 0]
        rest = [x for x in found if x.planes is None and loaded.exact[x.row] < 0]
        plain = [x for x in found if x.planes is not None]
        out = []
        data, begins = self._decoder.staging.upload([x.planes for x in plain])
        for x, at in zip(plain, begins.tolist(), strict=True):
            assert x.planes is not None
            planes = data[at : at + len(x.planes)].reshape(size, -1)
            out.append((x.slots, cupy.ascontiguousarray(planes.T)))
        if rest:
            data, begins = self._decoder.staging.upload([x.payload for x in rest])
            out += self._tiled(rest, data, begins)
        if there:
            own = np.array([loaded.exact[x.row] for x in there])
            out += self._tiled(there, loaded.data, own)
        return out

    def _tiled(
        self, found: Sequence[_Exact], data: Any, begins: NDArray[np.int64]
    ) -> list[tuple[NDArray[np.int64], Any]]:
        """As :meth:`_uploaded`, of payloads that the device decodes and that begin there."""
        itemsize = self._header.out_dtype.itemsize
        sizes = [self._header.verbatim_size(self._index, len(x.slots)) // itemsize for x in found]
        values, faults = verbatim.decode([x.payload for x in found], sizes, data, begins)
        self._unchecked.append(([x.start for x in found], faults))
        return [(x.slots, own) for x, own in zip(found, values, strict=True)]

    def _check_exact(self) -> None:
        """Wait for verbatim values that the device decodes; ``FormatError`` if one is damaged."""
        unchecked, self._unchecked = self._unchecked, []
        for starts, faults in unchecked:
            for i in np.flatnonzero(cupy.asnumpy(faults)).tolist():
                raise FormatError(f"block at token {starts[i]}: its verbatim values are damaged")

    def _place_exact(
        self, slots: NDArray[np.int64], values: Any, layers: Sequence[int], columns: Any
    ) -> None:
        """Write ``layers`` of ``values`` to slots: on the device, all of K [layers, heads, tokens,
        dim] and then of V."""
        s, size = self._section, self._header.out_dtype.itemsize * len(slots)
        k_size, v_size = size * s.kv_heads * s.k_dim, size * s.kv_heads * s.v_dim
        v_first = values.data.ptr + len(s.layers) * k_size
        dense = [values.data.ptr + i * k_size for i in layers]
        dense += [v_first + i * v_size for i in layers]
        self._move(slots, dense, columns, self._header.out_dtype, back=False)

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
        self._move(slots, dense, columns, self._header.out_dtype, back=False)

    def _columns(self, layers: Sequence[int], k: Tensors, v: Tensors) -> Any:
        """Entries of layers, K's and then V's, int64 [2 · layers, layout.FIELDS] on the device."""
        columns = [(kind, layer, 0) for kind in (0, 1) for layer in layers]
        return cupy.asarray(entries(k, v, columns, self._ropes))

    def _move(
        self,
        slots: NDArray[np.int64],
        dense: Sequence[int],
        columns: Any,
        dtype: DType,
        *,
        back: bool,
    ) -> None:
        """Copy values at the addresses ``dense``, one an entry of ``columns``, to slots; or from
        them with ``back``."""
        layout.move(dtype.itemsize, back=back)(
            (len(slots), len(columns)),
            128,
            (
                columns,
                cupy.asarray(slots),
                len(slots),
                cupy.asarray(np.array(dense, np.int64)),
            ),
        )

    def decode_layers(self, block: Block) -> Callable[[int], tuple[Any, Any]]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decode_layers`."""
        return self.layers_of(BlockTable.of([block]), np.arange(block.tokens), block.tokens)

    def layers_of(
        self, table: BlockTable, slots: NDArray[np.int64], tokens: int
    ) -> Callable[[int], tuple[Any, Any]]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.layers_of`."""
        s, dtype = self._section, self._header.out_dtype
        self._unchecked.clear()
        loaded = self._decoder.load(table, slots, tiles=self._tiles)
        found = [
            (some, self._decoder.symbols(some))
            for some in loaded.blocks.batches(self._decoder.batch_tokens)
        ]
        loaded.whole()
        verbatim = self._exact(table, slots)
        none = cupy.zeros(1, np.int32)
        slow = list(faulty(RunningBatch(some, batch.faults, none) for some, batch in found))
        on_host = [(own, self._cpu.decode_layers(block)) for block, own in slow]
        exact = [own for some in verbatim for own in self._uploaded(some, loaded)]
        self._check_exact()

        def layer(index: int) -> tuple[Any, Any]:
            shape = (1, s.kv_heads, tokens)
            k, v = (cupy.empty((*shape, d), BITS[dtype.itemsize]) for d in (s.k_dim, s.v_dim))
            k_out, v_out = (
                self._spread(Tensors.of_layers(list(x), dtype), [index]) for x in (k, v)
            )
            if found:
                destination = self._decoder.destination([index], k_out, v_out)
                for _, batch in found:
                    self._decoder.values(batch, destination)
            decoded = list(on_host)
            for some, batch in found:
                if int(batch.overflow[0]):
                    beyond = faulty([RunningBatch(some, batch.faults, batch.overflow)])
                    decoded += [(own, self._cpu.decode_layers(block)) for block, own in beyond]
            columns = self._columns([index], k_out, v_out)
            for own, of_layer in decoded:
                self._place(own, *of_layer(index), columns)
            for own, values in exact:
                self._place_exact(own, values, [index], columns)
            return k.view(numpy_dtype(dtype)), v.view(numpy_dtype(dtype))

        return layer
