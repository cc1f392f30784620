"""The CPU backend: NumPy products, Numba kernels, byte coders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backend import Measure
from kvtc_stream.calibration import Calibration, Part
from kvtc_stream.cpu import quantise
from kvtc_stream.cpu.layout import Rotations, gather, scatter, squared_errors
from kvtc_stream.cpu.values import (
    convert,
    from_float32,
    stored_positions,
    to_float32,
    verbatim_arrays,
    verbatim_planes,
)
from kvtc_stream.errors import FormatError, UnsupportedError
from kvtc_stream.formats import Block, BlockErrors, PartPlan, Role, StreamHeader
from kvtc_stream.formats import Measure as MeasureId
from kvtc_stream.formats.coders import compress, decompress
from kvtc_stream.interop import as_kv_array, numpy_dtype

Float = NDArray[np.float32]

#: A token whose relative error is beyond this is stored verbatim whatever was asked for: what
#: would come back has nothing to do with it (a vanishing token, say, would become the mean).
_HOPELESS = 2.0


class CpuBackend:
    """See :class:`kvtc_stream.backend.Backend`."""

    name = "cpu"

    def section_coder(
        self,
        header: StreamHeader,
        section: int,
        calibration: Calibration,
        *,
        max_error: float | None = None,
        measure: Measure = "full",
    ) -> CpuSectionCoder:
        """See :meth:`kvtc_stream.backend.Backend.section_coder`."""
        return CpuSectionCoder(header, section, calibration, max_error, measure)


class _Part:
    """A part of the basis, ready for products: its components in binary32."""

    def __init__(self, part: Part, plan: PartPlan, components: Float, block_tokens: int) -> None:
        self.k_layers = np.array(part.k_layers, np.int64)
        self.v_layers = np.array(part.v_layers, np.int64)
        self.mean = part.mean
        self.bands = plan.bands
        self.components = components[: plan.components]
        # One fixed shape for every product: however the input is cut, the sums are the same.
        self.rows = np.zeros((block_tokens, part.width), np.float32)
        self.coefficients = np.zeros((block_tokens, plan.components), np.float32)


class CpuSectionCoder:
    """See :class:`kvtc_stream.backend.SectionCoder`."""

    def __init__(
        self,
        header: StreamHeader,
        section: int,
        calibration: Calibration,
        max_error: float | None,
        measure: Measure,
    ) -> None:
        self._header = header
        self._index = section
        self._section = header.geometry.sections[section]
        self._max_error = max_error
        self._measure = measure
        self._k_scale = self._v_scale = None
        if header.scales:
            shape = (len(self._section.layers), self._section.kv_heads)
            self._k_scale = np.array(header.scales[section].k_scale, np.float32).reshape(shape)
            self._v_scale = np.array(header.scales[section].v_scale, np.float32).reshape(shape)
        plan = header.plan.sections[section]
        basis = calibration.sections[section].parts(plan)
        self._parts = [
            _Part(
                part,
                part_plan,
                calibration.components32(section, plan.basis, i, part_plan.components),
                header.block_tokens,
            )
            for i, (part, part_plan) in enumerate(zip(basis, plan.parts, strict=True))
        ]
        if measure == "coefficients" and any(p.k_layers and p.v_layers for p in basis):
            raise UnsupportedError(
                f"basis {plan.basis!r} codes K and V together, so the coefficients' error cannot "
                f"be told apart for K and V: use measure='full'"
            )

    def encode(
        self, k: NDArray[Any], v: NDArray[Any], positions: NDArray[np.int64], start: int
    ) -> Block:
        """See :meth:`kvtc_stream.backend.SectionCoder.encode`."""
        k32, v32 = to_float32(k, self._k_scale), to_float32(v, self._v_scale)
        symbols = self._analyse(k32, v32, positions)
        codable = np.logical_and.reduce([s.representable for s in symbols])
        if self._measure == "full":
            k_error, v_error = self._reconstruction_errors(k32, v32, positions, symbols)
        else:
            k_error, v_error = self._coefficient_errors(symbols)
        # Comparisons are false for tokens that are not finite or have no relative error.
        bound = _HOPELESS if self._max_error is None else min(_HOPELESS, self._max_error)
        with np.errstate(invalid="ignore"):
            codable &= (k_error <= bound) & (v_error <= bound)
        return self._block(k, v, positions, start, symbols, codable, k_error, v_error)

    def _analyse(self, k: Float, v: Float, positions: NDArray[np.int64]) -> list[quantise.Symbols]:
        tokens = k.shape[2]
        take_off = Rotations.of(self._section, positions, inverse=True)
        straight = Rotations.none(len(self._section.layers))
        symbols = []
        for part in self._parts:
            split = len(part.k_layers) * self._section.kv_heads * self._section.k_dim
            gather(k, part.k_layers, take_off, part.rows[:, :split])
            gather(v, part.v_layers, straight, part.rows[:, split:])
            with np.errstate(over="ignore", invalid="ignore"):
                part.rows[:tokens] -= part.mean
                part.rows[tokens:] = 0
                np.matmul(part.rows, part.components.T, out=part.coefficients)
            symbols.append(quantise.quantise(part.coefficients[:tokens], part.bands))
        return symbols

    def _reconstruction_errors(
        self, k: Float, v: Float, positions: NDArray[np.int64], symbols: list[quantise.Symbols]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        tokens = k.shape[2]
        for part, symbol in zip(self._parts, symbols, strict=True):
            quantise.dequantise(symbol, part.bands, part.coefficients[:tokens])
            part.coefficients[tokens:] = 0
        layers = range(len(self._section.layers))
        k_out, v_out = self._synthesise(positions, layers)
        return (
            _relative(*squared_errors(k, to_float32(k_out, self._out_scale(self._k_scale)))),
            _relative(*squared_errors(v, to_float32(v_out, self._out_scale(self._v_scale)))),
        )

    def _coefficient_errors(
        self, symbols: list[quantise.Symbols]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Error from the coefficients: what quantisation lost plus what the basis leaves out."""
        tokens = len(symbols[0].codes)
        # Relative to the rows, which like the coefficients have no RoPE and none of its scale.
        lost = {"k": np.zeros(tokens), "v": np.zeros(tokens)}
        energy = {"k": np.zeros(tokens), "v": np.zeros(tokens)}
        for part, symbol in zip(self._parts, symbols, strict=True):
            kind = "k" if len(part.k_layers) else "v"
            rows, exact = part.rows[:tokens], part.coefficients[:tokens].astype(np.float64)
            with np.errstate(invalid="ignore"):
                left_out = np.square(rows, dtype=np.float64).sum(axis=1) - np.square(exact).sum(1)
                quantise.dequantise(symbol, part.bands, part.coefficients[:tokens])
                exact -= part.coefficients[:tokens]
                lost[kind] += left_out.clip(0) + np.square(exact).sum(axis=1)
                energy[kind] += np.square(rows + part.mean, dtype=np.float64).sum(axis=1)
        return _relative(lost["k"], energy["k"]), _relative(lost["v"], energy["v"])

    def _block(
        self,
        k: NDArray[Any],
        v: NDArray[Any],
        positions: NDArray[np.int64],
        start: int,
        symbols: list[quantise.Symbols],
        codable: NDArray[np.bool_],
        k_error: NDArray[np.float64],
        v_error: NDArray[np.float64],
    ) -> Block:
        kept, verbatim = np.flatnonzero(codable), np.flatnonzero(~codable)
        packed = [
            quantise.pack(symbol, part.bands, kept)
            for part, symbol in zip(self._parts, symbols, strict=True)
        ]
        # Segments of a kind lie side by side, so that the coder sees them as one.
        segments = [b"".join(kind) for kind in zip(*packed, strict=True)]
        coder, coded = compress(self._header.coder, *segments)
        verbatim_coder, verbatim_coded = compress(
            self._header.coder, *verbatim_planes(k[:, :, verbatim], v[:, :, verbatim])
        )
        errors = BlockErrors(
            MeasureId.RECONSTRUCTION if self._measure == "full" else MeasureId.COEFFICIENTS,
            *(_statistics(k_error[kept]) + _statistics(v_error[kept])),
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
            coded_size=sum(map(len, segments)),
            verbatim_coder=verbatim_coder,
            verbatim=verbatim_coded,
            errors=errors,
        )

    def decode(self, block: Block, layers: Sequence[int]) -> tuple[Any, Any]:
        """See :meth:`kvtc_stream.backend.SectionCoder.decode`."""
        verbatim = np.array(block.verbatim_tokens, np.int64)
        positions = np.array(block.positions, np.int64)
        chosen = list(layers)
        if len(verbatim) < block.tokens:
            self._unpack(block, np.delete(np.arange(block.tokens), verbatim))
            k, v = self._synthesise(positions, chosen)
        else:
            k, v = self._empty(block.tokens, len(chosen))
        if len(verbatim):
            k_raw, v_raw = self._verbatim(block)
            k[:, :, verbatim] = convert(k_raw, self._header.out_dtype, self._k_scale)[chosen]
            v[:, :, verbatim] = convert(v_raw, self._header.out_dtype, self._v_scale)[chosen]
        return as_kv_array(k), as_kv_array(v)

    def _unpack(self, block: Block, kept: NDArray[np.int64]) -> None:
        sizes = [quantise.segment_sizes(len(kept), part.bands) for part in self._parts]
        needed = sum(map(sum, sizes))
        if block.coded_size != needed:
            raise FormatError(
                f"block at token {block.start}: coded payload of {block.coded_size} bytes, the "
                f"plan needs {needed} for {len(kept)} tokens"
            )
        data = memoryview(decompress(block.coder, block.coded, block.coded_size))
        segments: list[list[memoryview]] = [[] for _ in self._parts]
        for kind in zip(*sizes, strict=True):
            for segment, size in zip(segments, kind, strict=True):
                segment.append(data[:size])
                data = data[size:]
        for part, segment in zip(self._parts, segments, strict=True):
            symbols = quantise.unpack(segment, len(kept), part.bands)
            # Tokens stay at their row, so that the product sums as the encoder's did.
            part.coefficients[:] = 0
            quantise.dequantise(symbols, part.bands, part.coefficients, kept)

    def _synthesise(
        self, positions: NDArray[np.int64], layers: Sequence[int]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """K and V of ``layers`` from the parts' coefficients, in the output dtype."""
        tokens = len(positions)
        put_on = Rotations.of(self._section, positions, inverse=False)
        straight = Rotations.none(len(self._section.layers))
        s = self._section
        k = np.empty((len(layers), s.kv_heads, tokens, s.k_dim), np.float32)
        v = np.empty((len(layers), s.kv_heads, tokens, s.v_dim), np.float32)
        for part in self._parts:
            split = len(part.k_layers) * s.kv_heads * s.k_dim
            for out, rotations, own, first, width in (
                (k, put_on, part.k_layers, 0, s.kv_heads * s.k_dim),
                (v, straight, part.v_layers, split, s.kv_heads * s.v_dim),
            ):
                for source, target, count in _runs(own, layers):
                    columns = slice(first + source * width, first + (source + count) * width)
                    with np.errstate(over="ignore", invalid="ignore"):
                        rows = np.matmul(part.coefficients, part.components[:, columns])
                        rows += part.mean[columns]
                    wanted = layers[target : target + count]
                    scatter(rows, rotations.select(wanted), out[target : target + count])
        dtype = self._header.out_dtype
        return (
            from_float32(k, dtype, _of_layers(self._out_scale(self._k_scale), layers)),
            from_float32(v, dtype, _of_layers(self._out_scale(self._v_scale), layers)),
        )

    def _verbatim(self, block: Block) -> tuple[NDArray[Any], NDArray[Any]]:
        count = len(block.verbatim_tokens)
        s, dtype = self._section, self._header.dtype
        size = count * (s.k_width + s.v_width) * dtype.itemsize
        data = decompress(block.verbatim_coder, block.verbatim, size)
        return verbatim_arrays(data, s.k_shape(count), s.v_shape(count), dtype)

    def _empty(self, tokens: int, layers: int) -> tuple[NDArray[Any], NDArray[Any]]:
        s, dtype = self._section, numpy_dtype(self._header.out_dtype)
        return (
            np.empty((layers, s.kv_heads, tokens, s.k_dim), dtype),
            np.empty((layers, s.kv_heads, tokens, s.v_dim), dtype),
        )

    def _out_scale(self, scale: Float | None) -> Float | None:
        return scale if self._header.out_dtype.is_fp8 else None


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


def _statistics(errors: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and worst, rounded up to binary32 so that the record stays a bound."""
    if len(errors) == 0:
        return 0.0, 0.0
    return _round_up(float(errors.mean())), _round_up(float(errors.max()))


def _round_up(value: float) -> float:
    rounded = np.float32(value)
    if float(rounded) < value:
        rounded = np.nextafter(rounded, np.float32(math.inf))
    return float(rounded)
