"""The CPU backend: NumPy products, Numba kernels, byte coders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import Coded, SectionCoder, block_errors, layer_errors
from kvtc_stream.backends.cpu_payloads import BandCoding, Quantised, UniformCoding
from kvtc_stream.calibration.components import Components
from kvtc_stream.calibration.parts import CalibratedBases, Part, Transforms
from kvtc_stream.coding.rope import Rotations, gather, scatter, squared_errors
from kvtc_stream.coding.values import (
    code_verbatim,
    from_float32,
    section_scales,
    stored_positions,
    to_float32,
    verbatim_output,
)
from kvtc_stream.formats import Block, BlockTable, DType, PartPlan, Role, StreamHeader
from kvtc_stream.io.dlpack import BackendName, as_kv_array, layer_list, numpy_dtype, to_numpy
from kvtc_stream.io.memory import empty

Float = NDArray[np.float32]
#: float64 [2, tokens]: of K and of V.
_Errors = NDArray[np.float64]
_Count = Callable[[Block], None]


class PagedLayer:
    """A layer's pages as an array [kv_heads, slots, head_dim] that can be written to."""

    def __init__(self, pages: NDArray[Any]) -> None:
        self._pages = pages

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

    def held(self, x: Any) -> Any:
        """See :meth:`kvtc_stream.backends.base.Backend.held`."""
        return x

    #: All at once: a core's time is all there is to share.
    batch_tokens = 1 << 62

    def interleave(self, tasks: Iterable[Iterator[None]]) -> None:
        """See :meth:`kvtc_stream.backends.base.Backend.interleave`."""
        for task in tasks:
            for _ in task:
                pass

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
        self.mean = part.mean
        self._transforms, self._count = transforms, plan.components
        self._refinement = refinement
        self.synthesis = transforms.synthesis.first(self._count)
        # One fixed shape for every product: however the input is cut, the sums are the same.
        self.rows = np.zeros((block_tokens, part.width), np.float32)
        self.coefficients = np.zeros((block_tokens, plan.components), np.float32)

    @cached_property
    def analysis(self) -> Components:
        """Only encoders need it, and with components in 8 bits it takes a while."""
        return self._transforms.analysis.first(self._count)

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
        k32, v32 = to_float32(k, self._k_scale), to_float32(v, self._v_scale)
        put_on, take_off = Rotations.both(self._section, positions)
        coefficients = self._analyse(k32, v32, take_off)

        def full(quantised: Quantised) -> _Errors:
            self._coding.dequantise(quantised, coefficients)
            return self._reconstruction_errors(k32, v32, put_on)[0]

        count: _Count | None = None
        if isinstance(self._coding, UniformCoding):
            quantised, count = self._uniform(coefficients, positions, full)
        else:
            quantised = self._coding.quantise(coefficients)
        errors = by_layer = None
        codable = quantised.representable.copy()
        if not self._measure:  # what components there are need not feel every value
            codable &= np.isfinite(k32).all(axis=(0, 1, 3)) & np.isfinite(v32).all(axis=(0, 1, 3))
        else:
            self._coding.dequantise(quantised, coefficients)
            errors, by_layer = self._reconstruction_errors(k32, v32, put_on)
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
        exact = [array.copy() for array in coefficients]  # measuring errors overwrites them
        grids = [own.completed() for own in coding.grids(exact, positions)]
        if control is None:
            return coding.quantise(exact, grids), None
        # Those that will be verbatim take nothing, however fine the step.
        fits = coding.quantise(exact, grids).representable
        known = fits & np.logical_and.reduce([own.known for own in grids])

        def size(which: NDArray[np.bool_], offset: float) -> float:
            if which.all():
                return coding.size(exact, grids, offset, len(which))
            some = [x[which] for x in exact], [x[which] for x in grids]
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
            return errors(coding.quantise(exact, grids, offset))[:, counted]

        asked = tokens, size_of_counted, errors_of_counted
        offset = control.choose(*asked, restored=restored)

        def count(block: Block) -> None:
            if restored is not None:
                control.expect(offset, *asked)
            else:
                control.record(offset, block)

        return coding.quantise(exact, grids, offset), count

    def _analyse(self, k: Float, v: Float, take_off: Rotations) -> list[Float]:
        """Coefficients [tokens, components] a part, views of what the parts hold."""
        tokens = k.shape[2]
        straight = Rotations.none(len(self._section.layers))
        for part, strong in zip(self._parts, self._coding.strong, strict=True):
            split = len(part.k_layers) * self._section.kv_heads * self._section.k_dim
            gather(k, part.k_layers, take_off, part.rows[:, :split])
            gather(v, part.v_layers, straight, part.rows[:, split:])
            with np.errstate(over="ignore", invalid="ignore"):
                part.rows[:tokens] -= part.mean
                part.rows[tokens:] = 0
                part.analyse(strong)
        return [part.coefficients[:tokens] for part in self._parts]

    def _reconstruction_errors(
        self, k: Float, v: Float, put_on: Rotations
    ) -> tuple[_Errors, NDArray[np.float64]]:
        """Errors of K and V from the parts' coefficients, decoded; and [2, layers, tokens]."""
        for part in self._parts:
            part.coefficients[k.shape[2] :] = 0
        layers = range(len(self._section.layers))
        k_out, v_out = self._synthesise(k.shape[2], put_on, layers)
        pairs = [
            squared_errors(k, to_float32(k_out, self._out_scale(self._k_scale))),
            squared_errors(v, to_float32(v_out, self._out_scale(self._v_scale))),
        ]
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
        exact = self._unpack(block)
        return self._join(block, exact, list(layers))

    def decoding(
        self,
        table: BlockTable,
        slots: NDArray[np.int64],
        layers: Sequence[int],
        k: NDArray[Any],
        v: NDArray[Any],
    ) -> Iterator[None]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decoding`."""
        for block, own in _each(table, slots):
            wanted = np.flatnonzero(own >= 0)
            for found, out in zip(self.decode(block, layers), (k, v), strict=True):
                for of_layer, array in zip(found, out, strict=True):
                    array[:, own[wanted]] = of_layer[:, wanted]
        yield

    def decode_layers(self, block: Block) -> Callable[[int], tuple[Any, Any]]:
        """See :meth:`kvtc_stream.backends.base.SectionCoder.decode_layers`."""
        exact = self._unpack(block)
        saved = [part.coefficients.copy() for part in self._parts]

        def layer(index: int) -> tuple[Any, Any]:
            for part, coefficients in zip(self._parts, saved, strict=True):
                if index in part.k_layers or index in part.v_layers:
                    part.coefficients[:] = coefficients
            return self._join(block, exact, [index])

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
            for part in self._parts:
                part.coefficients[:] = 0
            self._coding.unpack(block, kept, [part.coefficients for part in self._parts])
        return verbatim_output(block, self._header) if len(verbatim) else None

    def _join(
        self, block: Block, exact: tuple[NDArray[Any], NDArray[Any]] | None, layers: list[int]
    ) -> tuple[Any, Any]:
        """K and V of some layers, once the block is unpacked."""
        if block.coded_tokens:
            positions = np.array(block.positions, np.int64)
            put_on = Rotations.of(self._section, positions, inverse=False)
            k, v = self._synthesise(block.tokens, put_on, layers)
        else:
            k, v = self._empty(block.tokens, len(layers))
        if exact is not None:
            verbatim = np.array(block.verbatim_tokens, np.int64)
            k[:, :, verbatim] = exact[0][layers]
            v[:, :, verbatim] = exact[1][layers]
        return as_kv_array(k), as_kv_array(v)

    def _synthesise(
        self, tokens: int, put_on: Rotations, layers: Sequence[int]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """K and V of ``layers`` from the parts' coefficients, in the output dtype."""
        straight = Rotations.none(len(self._section.layers))
        s = self._section
        k = np.empty((len(layers), s.kv_heads, tokens, s.k_dim), np.float32)
        v = np.empty((len(layers), s.kv_heads, tokens, s.v_dim), np.float32)
        for part in self._parts:
            split = len(part.k_layers) * s.kv_heads * s.k_dim
            wanted, targets = [], []
            for out, rotations, own, first, width in (
                (k, put_on, part.k_layers, 0, s.kv_heads * s.k_dim),
                (v, straight, part.v_layers, split, s.kv_heads * s.v_dim),
            ):
                for source, target, count in _runs(own, layers):
                    begin = first + source * width
                    wanted.append(slice(begin, begin + count * width))
                    targets.append((out, rotations, slice(target, target + count)))
            with np.errstate(over="ignore", invalid="ignore"):
                found = part.synthesis.expand(part.coefficients, wanted)
            for rows, columns, (out, rotations, place) in zip(found, wanted, targets, strict=True):
                with np.errstate(over="ignore", invalid="ignore"):
                    rows += part.mean[columns]
                scatter(rows, rotations.select(layers[place]), out[place])
        dtype = self._header.out_dtype
        return (
            from_float32(k, dtype, _of_layers(self._out_scale(self._k_scale), layers)),
            from_float32(v, dtype, _of_layers(self._out_scale(self._v_scale), layers)),
        )

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
