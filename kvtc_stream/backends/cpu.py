"""The CPU backend: NumPy products, Numba kernels, byte coders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import Coded, SectionCoder, block_errors, layer_errors
from kvtc_stream.backends.cpu_payloads import BandCoding, Quantised, UniformCoding
from kvtc_stream.calibration.components import Components
from kvtc_stream.calibration.parts import CalibratedBases, Part, Transforms
from kvtc_stream.coding.rope import Rotations, Values, gather, scatter, squared_errors
from kvtc_stream.coding.values import (
    code_verbatim,
    from_float32,
    section_scales,
    stored_positions,
    verbatim_output,
    widened,
)
from kvtc_stream.formats import Block, BlockTable, DType, PartPlan, Role, Section, StreamHeader
from kvtc_stream.io.dlpack import BackendName, as_kv_array, layer_list, numpy_dtype, to_numpy
from kvtc_stream.io.memory import empty
from kvtc_stream.io.steps import Steps
from kvtc_stream.io.threads import beside

Float = NDArray[np.float32]
#: float64 [2, tokens]: of K and of V.
_Errors = NDArray[np.float64]
_Count = Callable[[Block], None]

#: Layers that a thread takes at a time between their cache layout and rows.
_LAYERS_AT_A_TIME = 8
#: Short blocks are decoded with a multiple of so many rows: a few more take no more time.
_ROWS = 16


class PagedLayer:
    """A layer's pages as an array [kv_heads, slots, head_dim] that can be written to."""

    def __init__(self, pages: NDArray[Any]) -> None:
        self._pages = pages
        self.slots = pages.shape[0] * pages.shape[1]

    def __setitem__(self, index: tuple[slice, NDArray[np.int64]], values: NDArray[Any]) -> None:
        page, place = np.divmod(index[1], self._pages.shape[1])
        self._pages[page, place] = values.swapaxes(0, 1)


class CpuBackend:
    """See :class:`kvtc_stream.backends.base.Backend`."""

    name: BackendName = "cpu"

    @property
    def section_coder(self) -> type[CpuSectionCoder]:
        """See :attr:`kvtc_stream.backends.base.Backend.section_coder`."""
        return CpuSectionCoder

    def layer_list(
        self, x: Any, name: str, layers: int, kv_heads: int, head_dim: int
    ) -> tuple[list[Any], DType]:
        """See :meth:`kvtc_stream.backends.base.Backend.layer_list`."""
        return layer_list(x, name, layers, kv_heads, head_dim)

    def array(self, x: NDArray[Any]) -> NDArray[Any]:
        """See :meth:`kvtc_stream.backends.base.Backend.array`."""
        return x

    def empty(self, shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
        """See :meth:`kvtc_stream.backends.base.Backend.empty`."""
        return np.empty(shape, numpy_dtype(dtype))

    def verbatim(self, header: StreamHeader, pieces: Sequence[tuple[Any, Any]]) -> list[Coded]:
        """See :meth:`kvtc_stream.backends.base.Backend.verbatim`."""
        return [partial(code_verbatim, header, k, v) for k, v in pieces]

    def room(self, size: int) -> memoryview:
        """See :meth:`kvtc_stream.backends.base.Backend.room`."""
        return empty(size)

    def pool(self, tensors: Sequence[Any]) -> list[PagedLayer]:
        """See :meth:`kvtc_stream.backends.base.Backend.pool`."""
        return [PagedLayer(to_numpy(x, "pages")) for x in tensors]

    def layers_in(self, pieces: Sequence[Any]) -> list[NDArray[Any]]:
        """See :meth:`kvtc_stream.backends.base.Backend.layers_in`."""
        return [own for x in pieces for own in to_numpy(x, "memory")]

    def held(self, x: Any) -> Any:
        """See :meth:`kvtc_stream.backends.base.Backend.held`."""
        return x

    def sending(self, streams: Iterable[Any]) -> AbstractContextManager[None]:
        """See :meth:`kvtc_stream.backends.base.Backend.sending`: they are there."""
        return nullcontext()

    def batch_tokens(self, section: Section) -> int:
        """See :meth:`kvtc_stream.backends.base.Backend.batch_tokens`: a core's time is all there is
        to share."""
        return 1 << 62

    def alike(self, k: Sequence[Any], v: Sequence[Any]) -> None:
        """See :meth:`kvtc_stream.backends.base.Backend.alike`: there are no launches to share."""

    def interleaving(self, tasks: Iterable[Iterator[None]]) -> Steps[None]:
        """See :meth:`kvtc_stream.backends.base.Backend.interleaving`."""
        for task in tasks:
            yield from task

    def output(self, x: NDArray[Any], dtype: DType) -> Any:
        """See :meth:`kvtc_stream.backends.base.Backend.output`."""
        return as_kv_array(x)


class _Part:
    """A part of the basis, ready for products."""

    def __init__(
        self,
        part: Part,
        plan: PartPlan,
        transforms: Transforms,
        refinement: Callable[[int], Float],
        block_tokens: int,
    ) -> None:
        self.k_layers = np.array(part.k_layers, np.int64)
        self.v_layers = np.array(part.v_layers, np.int64)
        self.mean = np.array(part.mean)
        self._transforms, self._count = transforms, plan.components
        self._refinement = refinement
        self.synthesis = transforms.synthesis.first(self._count)
        # One fixed shape for every product: however the input is cut, the sums are the same.
        self.rows = np.zeros((block_tokens, part.width), np.float32)
        self.coefficients = np.zeros((block_tokens, plan.components), np.float32)
        #: What is left of them.
        self.restored = np.zeros_like(self.coefficients)

    @cached_property
    def analysis(self) -> Components:
        """Only encoders need it, and with components in 8 bits it takes a while."""
        return self._transforms.analysis.first(self._count)

    def expand(self, count: int, wanted: Sequence[slice]) -> Sequence[Float]:
        """``count`` rows of restored coefficients to the ``wanted`` columns, where ``rows`` are."""
        room = self.rows.reshape(-1)
        edges = np.cumsum([0, *(count * (own.stop - own.start) for own in wanted)]).tolist()
        out = [room[first:last].reshape(count, -1) for first, last in pairwise(edges)]
        return self.synthesis.expand(self.restored[:count], wanted, out)

    def analyse(self, strong: int) -> None:
        """Rows to coefficients, refined by the ``strong`` ones."""
        self.analysis.project(self.rows, self.coefficients)
        if strong:
            self.coefficients += self.coefficients[:, :strong] @ self._refinement(strong)


class CpuSectionCoder(SectionCoder):
    """See :class:`kvtc_stream.backends.base.SectionCoder`."""

    def __init__(
        self, header: StreamHeader, section: int, calibration: CalibratedBases, **options: Any
    ) -> None:
        super().__init__(header, section, calibration, **options)
        self._k_scale, self._v_scale = section_scales(header, section)
        plan = header.plan.sections[section]
        basis = calibration.sections[section].parts(plan)
        self._parts = [
            _Part(
                part,
                part_plan,
                calibration.transforms(section, plan.basis, i, part_plan.components),
                partial(calibration.refinement, section, plan.basis, i, part_plan.components),
                header.block_tokens,
            )
            for i, (part, part_plan) in enumerate(zip(basis, plan.parts, strict=True))
        ]
        self._coding: BandCoding | UniformCoding = BandCoding(plan.parts, header.coder)
        if plan.uniform:
            self._coding = UniformCoding(basis, plan.parts)

    def encode(
        self, k: NDArray[Any], v: NDArray[Any], positions: NDArray[np.int64], start: int
    ) -> list[Block]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.encode`."""
        size = self._header.block_tokens
        return [
            self._encode(
                k[:, :, i : i + size], v[:, :, i : i + size], positions[i : i + size], start + i
            )
            for i in range(0, len(positions), size)
        ]

    def arrived(self) -> None:
        """They are: see :meth:`kvtc_stream.backends.base.SectionCoder.arrived`."""

    def _encode(
        self, k: NDArray[Any], v: NDArray[Any], positions: NDArray[np.int64], start: int
    ) -> Block:
        k_in, v_in = widened(k, self._k_scale), widened(v, self._v_scale)
        put_on, take_off = Rotations.both(self._section, positions)
        coefficients = self._analyse(k_in, v_in, take_off)

        def full(quantised: Quantised) -> _Errors:
            self._coding.dequantise(quantised, self._restored(k.shape[2]))
            return self._reconstruction_errors(k_in, v_in, put_on)[0]

        count: _Count | None = None
        if isinstance(self._coding, UniformCoding):
            quantised, count = self._uniform(coefficients, positions, full)
        else:
            quantised = self._coding.quantise(coefficients)
        errors = by_layer = None
        codable = quantised.representable.copy()
        if not self._measure:  # what components there are need not feel every value
            codable &= np.isfinite(k_in).all(axis=(0, 1, 3)) & np.isfinite(v_in).all(axis=(0, 1, 3))
        else:
            self._coding.dequantise(quantised, self._restored(k.shape[2]))
            errors, by_layer = self._reconstruction_errors(k_in, v_in, put_on)
            # Comparisons are false for tokens that are not finite or have no relative error.
            with np.errstate(invalid="ignore"):
                codable &= (errors <= self._bound).all(axis=0)
                if self._layer_bound < math.inf:
                    codable &= (by_layer <= self._layer_bound).all(axis=(0, 1))
        block = self._block(
            k, v, positions, start, quantised, np.flatnonzero(codable), errors, by_layer
        )
        if count is not None:
            count(block)
        return block

    def _uniform(
        self,
        coefficients: list[Float],
        positions: NDArray[np.int64],
        errors: Callable[[Quantised], _Errors],
    ) -> tuple[Quantised, _Count | None]:
        """Symbols at the offset to the plan's step that the target asks for; and what tells the
        target of the block that they become."""
        coding, control = self._coding, self._control
        assert isinstance(coding, UniformCoding)
        grids = [own.completed() for own in coding.grids(coefficients, positions)]
        if control is None:
            return coding.quantise(coefficients, grids), None
        # Those that will be verbatim take nothing, however fine the step.
        fits = coding.quantise(coefficients, grids).representable
        known = fits & np.logical_and.reduce([own.known for own in grids])

        def size(which: NDArray[np.bool_], offset: float) -> float:
            if which.all():
                return coding.size(coefficients, grids, offset, len(which))
            some = [x[which] for x in coefficients], [x[which] for x in grids]
            return coding.size(*some, offset, len(which))

        restored = float(np.mean([own.offset for own in grids])) if known.any() else None
        if restored is not None:
            count_known = int(np.count_nonzero(known))
            least = coding.overhead(count_known, len(known))
            if not control.keeps(count_known, size(known, restored), least):
                grids = [own.forgotten() for own in grids]
                known[:], restored = False, None
        counted = control.counted(fits, known)
        tokens = int(np.count_nonzero(counted))

        def size_of_counted(offset: float) -> float:
            return size(counted if tokens else known, offset)

        def errors_of_counted(offset: float) -> _Errors:
            return errors(coding.quantise(coefficients, grids, offset))[:, counted]

        measured = errors_of_counted if control.of_errors else size_of_counted
        if restored is not None:
            offset = control.take(tokens, measured, restored=restored)
            return coding.quantise(coefficients, grids, offset), None
        offset = control.choose(tokens, measured)
        return coding.quantise(coefficients, grids, offset), partial(control.record, offset)

    def _analyse(self, k: Values, v: Values, take_off: Rotations) -> list[Float]:
        """Coefficients [tokens, components] a part, views of what the parts hold."""
        tokens, s = k.shape[2], self._section
        straight = Rotations.none(len(s.layers))
        tasks = []
        for part in self._parts:
            part.rows[tokens:] = 0
            split = len(part.k_layers) * s.kv_heads * s.k_dim
            for x, turns, layers, first in (
                (k, take_off, part.k_layers, 0),
                (v, straight, part.v_layers, split),
            ):
                for some, columns in _pieces(slice(0, len(layers)), first, x):
                    rows, mean = part.rows[:, columns], part.mean[columns]
                    tasks.append(partial(gather, x, layers[some], turns, rows, mean))
        beside(tasks, k.size + v.size)
        for part, strong in zip(self._parts, self._coding.strong, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                part.analyse(strong)
        return [part.coefficients[:tokens] for part in self._parts]

    def _restored(self, tokens: int) -> list[Float]:
        """Where the parts take coefficients [tokens, components] from; those of others are 0."""
        for part in self._parts:
            part.restored[tokens:] = 0
        return [part.restored[:tokens] for part in self._parts]

    def _reconstruction_errors(
        self, k: Values, v: Values, put_on: Rotations
    ) -> tuple[_Errors, NDArray[np.float64]]:
        """Errors of K and V from the parts' coefficients, decoded; and [2, layers, tokens]."""
        layers = range(len(self._section.layers))
        empty = self._empty(k.shape[2], len(layers))
        restored = self._synthesise(self._header.block_tokens, put_on, layers, *empty)
        pairs = []
        for x, y, scale in zip((k, v), restored, (self._k_scale, self._v_scale), strict=True):
            y = widened(y, self._out_scale(scale))
            lost, energy = (np.empty((len(layers), k.shape[2])) for _ in range(2))
            beside(
                [
                    partial(squared_errors, x[some], y[some], lost[some], energy[some])
                    for some, _ in _pieces(slice(0, len(layers)), 0, x)
                ],
                x.size,
            )
            pairs.append((lost, energy))
        return (
            np.stack([_relative(lost.sum(axis=0), energy.sum(axis=0)) for lost, energy in pairs]),
            np.stack([_relative(*pair) for pair in pairs]),
        )

    def _block(
        self,
        k: NDArray[Any],
        v: NDArray[Any],
        positions: NDArray[np.int64],
        start: int,
        quantised: Quantised,
        kept: NDArray[np.int64],
        errors: NDArray[np.float64] | None,
        by_layer: NDArray[np.float64] | None,
    ) -> Block:
        verbatim = np.delete(np.arange(len(positions)), kept)
        coder, coded, coded_size = self._coding.pack(quantised, kept)
        verbatim_coder, verbatim_coded = code_verbatim(
            self._header, k[:, :, verbatim], v[:, :, verbatim]
        )
        return Block(
            section=self._index,
            role=Role.DATA,
            start=start,
            tokens=len(positions),
            positions=stored_positions(positions),
            verbatim_tokens=tuple(verbatim.tolist()),
            coder=coder,
            coded=coded,
            coded_size=coded_size,
            verbatim_coder=verbatim_coder,
            verbatim=verbatim_coded,
            errors=block_errors(errors, kept),
            layer_errors=(
                layer_errors(by_layer, kept) if self._by_layer and by_layer is not None else None
            ),
        )

    def decode(self, block: Block, layers: Sequence[int]) -> tuple[Any, Any]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decode`."""
        k, v = self._empty(block.tokens, len(layers))
        self._join(block, self._unpack(block), list(layers), k, v)
        return as_kv_array(k), as_kv_array(v)

    def decoding(
        self,
        table: BlockTable,
        slots: NDArray[np.int64],
        layers: Sequence[int],
        k: NDArray[Any],
        v: NDArray[Any],
        *,
        unseen: bool = False,
    ) -> Iterator[None]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decoding`."""
        for block, own in _each(table, slots):
            exact, chosen = self._unpack(block), list(layers)
            if isinstance(k, np.ndarray) and own[0] >= 0 and (np.diff(own) == 1).all():
                place = slice(int(own[0]), int(own[-1]) + 1)
                self._join(block, exact, chosen, k[:, :, place], v[:, :, place])
                continue
            found = self._empty(block.tokens, len(layers))
            self._join(block, exact, chosen, *found)
            wanted = np.flatnonzero(own >= 0)
            for values, out in zip(found, (k, v), strict=True):
                for of_layer, array in zip(values, out, strict=True):
                    array[:, own[wanted]] = of_layer[:, wanted]
        yield

    def decode_layers(self, block: Block) -> Callable[[int], tuple[Any, Any]]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decode_layers`."""
        exact = self._unpack(block)
        saved = [part.restored.copy() for part in self._parts]

        def layer(index: int) -> tuple[Any, Any]:
            for part, coefficients in zip(self._parts, saved, strict=True):
                if index in part.k_layers or index in part.v_layers:
                    part.restored[:] = coefficients
            k, v = self._empty(block.tokens, 1)
            self._join(block, exact, [index], k, v)
            return as_kv_array(k), as_kv_array(v)

        return layer

    def layers_of(
        self, table: BlockTable, slots: NDArray[np.int64], tokens: int
    ) -> Callable[[int], tuple[Any, Any]]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.layers_of`."""
        decoded = [(self.decode_layers(block), own) for block, own in _each(table, slots)]

        def layer(index: int) -> tuple[Any, Any]:
            k, v = self._empty(tokens, 1)
            for of_block, own in decoded:
                wanted = np.flatnonzero(own >= 0)
                for found, out in zip(of_block(index), (k, v), strict=True):
                    out[:, :, own[wanted]] = found[:, :, wanted]
            return as_kv_array(k), as_kv_array(v)

        return layer

    def _unpack(self, block: Block) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """The parts' coefficients of a block's coded tokens; returns its verbatim tokens."""
        verbatim = np.array(block.verbatim_tokens, np.int64)
        if len(verbatim) < block.tokens:
            kept = np.delete(np.arange(block.tokens), verbatim)
            # Tokens stay at their row, so that the product sums as the encoder's did.
            restored = self._restored(block.tokens)
            for array in restored:
                array[verbatim] = 0
            self._coding.unpack(block, kept, restored)
        return verbatim_output(block, self._header) if len(verbatim) else None

    def _join(
        self,
        block: Block,
        exact: tuple[NDArray[Any], NDArray[Any]] | None,
        layers: list[int],
        k: NDArray[Any],
        v: NDArray[Any],
    ) -> None:
        """Fill in K and V of some layers, once the block is unpacked."""
        if block.coded_tokens:
            positions = np.array(block.positions, np.int64)
            put_on = Rotations.of(self._section, positions, inverse=False)
            # Fewer where a block is short, the same ones however it is read.
            rows = min(-(-block.tokens // _ROWS) * _ROWS, self._header.block_tokens)
            self._synthesise(rows, put_on, layers, k, v)
        if exact is not None:
            verbatim = np.array(block.verbatim_tokens, np.int64)
            k[:, :, verbatim] = exact[0][layers]
            v[:, :, verbatim] = exact[1][layers]

    def _synthesise(
        self,
        rows: int,
        put_on: Rotations,
        layers: Sequence[int],
        k: NDArray[Any],
        v: NDArray[Any],
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Fill in K and V of ``layers``, in the output dtype, from the parts' coefficients; of
        ``rows`` of them, those of the tokens and more."""
        straight = Rotations.none(len(self._section.layers))
        s, dtype = self._section, self._header.out_dtype
        # Kernels write these two; others are cast.
        direct = dtype in (DType.FLOAT32, DType.BFLOAT16)
        values = (k, v) if direct else tuple(np.empty(x.shape, np.float32) for x in (k, v))
        for part in self._parts:
            split = len(part.k_layers) * s.kv_heads * s.k_dim
            wanted, targets = [], []
            for out, rotations, own, first in (
                (values[0], put_on, part.k_layers, 0),
                (values[1], straight, part.v_layers, split),
            ):
                width = out.shape[1] * out.shape[3]
                for source, target, count in _runs(own, layers):
                    begin = first + source * width
                    wanted.append(slice(begin, begin + count * width))
                    targets.append((out, rotations, slice(target, target + count)))
            with np.errstate(over="ignore", invalid="ignore"):
                found = part.expand(rows, wanted)
            tasks = []
            for x, columns, (out, rotations, place) in zip(found, wanted, targets, strict=True):
                mean = part.mean[columns]
                for some, piece in _pieces(place, 0, out):
                    turns = rotations.select(layers[some])
                    tasks.append(partial(scatter, x[:, piece], turns, out[some], mean[piece]))
            beside(tasks, k.size + v.size)
        if not direct:
            scales = (
                _of_layers(self._out_scale(x), layers) for x in (self._k_scale, self._v_scale)
            )
            k[...], v[...] = (
                from_float32(x, dtype, scale) for x, scale in zip(values, scales, strict=True)
            )
        return k, v

    def _empty(self, tokens: int, layers: int) -> tuple[NDArray[Any], NDArray[Any]]:
        s, dtype = self._section, numpy_dtype(self._header.out_dtype)
        return (
            np.empty((layers, s.kv_heads, tokens, s.k_dim), dtype),
            np.empty((layers, s.kv_heads, tokens, s.v_dim), dtype),
        )

    def _out_scale(self, scale: Float | None) -> Float | None:
        return scale if self._header.out_dtype.is_fp8 else None


def _each(table: BlockTable, slots: NDArray[np.int64]) -> Iterator[tuple[Block, NDArray[np.int64]]]:
    """The blocks of a table, all of them verified, and where the tokens of each go."""
    table.verify()
    edges = [0, *np.cumsum(table.rows["tokens"]).tolist()]
    for row, (first, last) in enumerate(pairwise(edges)):
        yield table.block(row, verified=True), slots[first:last]


def _of_layers(scale: Float | None, layers: Sequence[int]) -> Float | None:
    return None if scale is None else scale[list(layers)]


def _pieces(layers: slice, first: int, x: NDArray[Any]) -> list[tuple[slice, slice]]:
    """Layers of ``x``, some for a thread at a time, and their columns, the first at ``first``."""
    width, found = x.shape[1] * x.shape[3], []
    for begin in range(layers.start, layers.stop, _LAYERS_AT_A_TIME):
        some = slice(begin, min(begin + _LAYERS_AT_A_TIME, layers.stop))
        end = first + (some.stop - begin) * width
        found.append((some, slice(first, end)))
        first = end
    return found


def _runs(own: NDArray[np.int64], wanted: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of ``wanted`` layers that lie side by side in a part: (index in part, in wanted, n)."""
    place = {int(layer): i for i, layer in enumerate(own)}
    runs: list[tuple[int, int, int]] = []
    for target, layer in enumerate(wanted):
        if layer in place:
            source = place[layer]
            if runs and runs[-1][0] + runs[-1][2] == source and sum(runs[-1][1:]) == target:
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((source, target, 1))
    return runs


def _relative(error: NDArray[np.float64], energy: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖x̂−x‖/‖x‖ per token; 0 where nothing was lost, else infinite where ‖x‖ is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, np.sqrt(error / energy))
