"""The kernels of bands with a scale per token against the CPU: the same bytes, the same values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from launch import simulate

from kvtc_stream.coding import bands as cpu
from kvtc_stream.errors import FormatError
from kvtc_stream.formats.plan import Band, Quantiser
from kvtc_stream.gpu.kernels import bands

Array = npt.NDArray[Any]

PARTS = (
    (
        Band(2, Quantiser.INT4),
        Band(3, Quantiser.NONE),
        Band(3, Quantiser.INT4),
        Band(1, Quantiser.FP8),
        Band(3, Quantiser.INT2),
        Band(12, Quantiser.INT4),
        Band(12, Quantiser.INT2),
    ),
    (Band(4, Quantiser.FP8), Band(1, Quantiser.INT2), Band(1, Quantiser.NONE)),
)
SIZES = [sum(band.size for band in part) for part in PARTS]
CODED = sum(band.quantiser is not Quantiser.NONE for part in PARTS for band in part)
#: What is not to be written has this.
CANARY = 0xAA


@dataclass
class Case:
    """Blocks of some tokens each, of which other tokens lie between."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        rng = np.random.default_rng(len(self.tokens))
        self.kept = sum(self.tokens)
        self.stride = self.kept + 3
        self.columns = np.sort(rng.permutation(self.stride)[: self.kept]).astype(np.int32)
        # Two bytes between payloads.
        sizes = [bands.payload_size(count, PARTS) for count in self.tokens]
        self.starts = np.cumsum([2, *[size + 2 for size in sizes]]).tolist()
        self.ends = [start + size for start, size in zip(self.starts, sizes, strict=False)]
        self.tasks = bands.tasks(self.tokens, PARTS, self.starts)

    def parts_of(self, coefficients: Array, block: int) -> list[Array]:
        """float32 [tokens, components] of each part."""
        start = sum(self.tokens[:block])
        columns = self.columns[start : start + self.tokens[block]]
        split = np.split(coefficients[:, columns], np.cumsum(SIZES)[:-1])
        return [np.ascontiguousarray(part.T) for part in split]

    def payload(self, coefficients: Array, block: int) -> bytes:
        """The CPU's."""
        packed = [
            cpu.pack(cpu.quantise(part, of_part), of_part)
            for part, of_part in zip(self.parts_of(coefficients, block), PARTS, strict=True)
        ]
        return b"".join(segment.tobytes() for kind in zip(*packed, strict=True) for segment in kind)

    def values(self, payload: bytes, block: int) -> Array:
        """The CPU's, [components, tokens]; ``FormatError`` if it refuses."""
        tokens = self.tokens[block]
        sizes = np.array([cpu.segment_sizes(tokens, part) for part in PARTS])
        cut = np.split(np.frombuffer(payload, np.uint8), np.cumsum(sizes.T.ravel())[:-1])
        found = []
        for i, (part, size) in enumerate(zip(PARTS, SIZES, strict=True)):
            out = np.empty((tokens, size), np.float32)
            cpu.dequantise(cpu.unpack(cut[i :: len(PARTS)], tokens, part), part, out)
            found.append(out.T)
        return np.concatenate(found)


def _measure(case: Case, coefficients: Array) -> tuple[Array, Array]:
    strips = bands.strips(PARTS, None)
    parameters = np.zeros((CODED, 2, case.stride), np.uint16)
    unfit = np.zeros(case.stride, np.uint8)
    arguments = [strips, coefficients, case.stride, case.stride, parameters, unfit]
    simulate(bands.measure, bands.grid(case.stride, len(strips)), bands.THREADS, arguments)
    return parameters, unfit


def _pack(case: Case, coefficients: Array, parameters: Array) -> Array:
    strips = bands.strips(PARTS, 2)
    payloads = np.full(case.ends[-1] + 2, CANARY, np.uint8)
    arguments = [case.tasks, len(PARTS), strips, case.columns, coefficients, parameters]
    grid = bands.grid(max(case.tokens), len(strips), len(case.tokens))
    simulate(bands.pack, grid, bands.THREADS, [*arguments, case.stride, payloads])
    return payloads


def _unpack(case: Case, payloads: Array) -> tuple[Array, Array]:
    strips = bands.strips(PARTS, 2)
    out = np.full((sum(SIZES), case.stride), np.nan, np.float32)
    faults = np.zeros(len(case.tokens), np.int32)
    arguments = [case.tasks, len(PARTS), strips, case.columns, payloads, out, case.stride, faults]
    grid = bands.grid(max(case.tokens), len(strips), len(case.tokens))
    simulate(bands.unpack, grid, bands.THREADS, arguments)
    return out, faults


def _coefficients(case: Case) -> Array:
    rng = np.random.default_rng(7)
    shape = (sum(SIZES), case.stride)
    drawn = rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 8, case.stride)
    # Bands that are flat, zero with either sign, and smaller than binary16.
    drawn[:, :4] = [0.0, -0.0, 3.7, 1e-9]
    drawn[::2, 1] = 0
    # Two bands of some tokens that lie on grids, but for what a cast did.
    for at, levels in ((12, 16), (24, 4)):
        codes = rng.integers(0, levels, (12, case.stride - 10))
        drawn[at : at + 12, 10:] = 0.3 * codes - 0.5 + 0.005 * rng.standard_normal(codes.shape)
    return drawn.astype(np.float32)


def test_bytes_and_values_are_those_of_the_cpu() -> None:
    case = Case((37, 1, 6))
    coefficients = _coefficients(case)
    parameters, unfit = _measure(case, coefficients)
    assert not unfit.any()
    payloads = _pack(case, coefficients, parameters)
    filled = np.zeros(payloads.size, bool)
    out, faults = _unpack(case, payloads)
    assert not faults.any()
    for block, (start, end) in enumerate(zip(case.starts, case.ends, strict=False)):
        payload = payloads[start:end].tobytes()
        assert payload == case.payload(coefficients, block)
        filled[start:end] = True
        expected = case.values(payload, block)
        first = sum(case.tokens[:block])
        found = out[:, case.columns[first : first + case.tokens[block]]]
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert (payloads[~filled] == CANARY).all()
    assert np.isnan(np.delete(out, case.columns, axis=1)).all()


def test_unfit_tokens_are_those_that_the_cpu_refuses() -> None:
    case = Case((14,))
    coefficients = _coefficients(case)
    hostile = [np.nan, np.inf, -np.inf, -np.nan, 3e38, 65519, 65520, -65520, 448 * 65520]
    rows = [8, 0, 1, 9, 10, 9, 9, 9, 8]  # 8: FP8; 0, 1: INT4; 9, 10: INT2
    for column, (row, value) in enumerate(zip(rows, hostile, strict=True)):
        coefficients[row, column] = value
    coefficients[2, 9] = np.nan  # of a NONE band
    _, unfit = _measure(case, coefficients)
    parts = np.split(coefficients, np.cumsum(SIZES)[:-1])
    fits = [
        cpu.quantise(np.ascontiguousarray(part.T), of_part).representable
        for part, of_part in zip(parts, PARTS, strict=True)
    ]
    np.testing.assert_array_equal(unfit == 0, np.logical_and.reduce(fits))
    assert unfit.sum() == 7


def test_fp8_codes_are_those_of_the_cpu() -> None:
    """Quotients of every size: one token's greatest coefficient is far above its others."""
    rng = np.random.default_rng(3)
    y = np.concatenate([448 * 2.0 ** -rng.uniform(0, 20, 500), np.arange(1, 200) / 2**10])
    y = y.astype(np.float32) * rng.choice([-1, 1], y.size).astype(np.float32)
    band = (Band(y.size + 1, Quantiser.FP8),)
    coefficients = np.append(y, np.float32(448))[:, None]
    parameters = np.zeros((1, 2, 1), np.uint16)
    strips = bands.strips([band], None)
    unfit = np.zeros(1, np.uint8)
    simulate(bands.measure, (1, 1, 1), 32, [strips, coefficients, 1, 1, parameters, unfit])
    payload = np.zeros(bands.payload_size(1, [band]), np.uint8)
    tasks, columns = bands.tasks([1], [band], [0]), np.zeros(1, np.int32)
    arguments = [tasks, 1, strips, columns, coefficients, parameters, 1, payload]
    simulate(bands.pack, (1, 1, 1), 32, arguments)
    symbols = cpu.quantise(np.ascontiguousarray(coefficients.T), band)
    assert payload.tobytes() == b"".join(s.tobytes() for s in cpu.pack(symbols, band))


#: Damage to the payload of 5 tokens: where a byte is, and what it becomes.
TOKENS = 5
_SCALES = 2 * TOKENS * CODED
_INT2_END = _SCALES * 2 + 3 * 2
DAMAGE = {
    "scale infinite": (_SCALES, 0x7C),
    "scale NaN": (_SCALES + 1, 0xFE),
    "last shift infinite": (2 * _SCALES - 1, 0xFC),
    "INT2 bits after the last": (_INT2_END - 1, 0x04),
    "INT4 bits after the last": (2 * _SCALES + 16 * 2 + 2, 0x10),
    "FP8 NaN": (-1, 0x7F),
    "FP8 NaN, negative": (-TOKENS, 0xFF),
    "none": (-1, 0x7E),
    "scale greatest": (_SCALES, 0x7B),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_refusals_are_faults(kind: str) -> None:
    case = Case((TOKENS, TOKENS))
    coefficients = _coefficients(case)
    payloads = np.full(case.ends[-1] + 2, CANARY, np.uint8)
    for block, (start, end) in enumerate(zip(case.starts, case.ends, strict=False)):
        payloads[start:end] = np.frombuffer(case.payload(coefficients, block), np.uint8)
    place, byte = DAMAGE[kind]
    start, end = case.starts[1], case.ends[1]
    payloads[start:end][place] = byte
    _, faults = _unpack(case, payloads)
    refused = False
    try:
        case.values(payloads[start:end].tobytes(), 1)
    except FormatError:
        refused = True
    assert refused == (kind not in ("none", "scale greatest"))
    assert faults.tolist() == [0, int(refused)]
