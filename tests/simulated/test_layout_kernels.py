"""The layout kernels against the CPU's: slots of each dtype, with RoPE of several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from launch import simulate

import kvtc_stream as kvtc
from kvtc_stream.coding import rope as cpu
from kvtc_stream.coding.values import from_float32
from kvtc_stream.gpu.kernels import layout
from kvtc_stream.io.dlpack import numpy_dtype

Array = npt.NDArray[Any]
DType = kvtc.DType

HEADS, SLOTS = 2, 9
#: Where tokens are; one of them is nowhere.
PLACES = np.array([7, 0, -1, 3, 8], np.int64)
TOKENS, GONE = len(PLACES), 2
POSITIONS = np.array([0, 3, 100, 7000, 7001], np.int64)


def _section(wide: bool) -> kvtc.Section:
    """3 layers; of the wide kernels, all RoPE pairs the halves of whole keys."""
    dim = 32 if wide else 7
    halves = kvtc.Rope.from_theta(1e4, dim if wide else 4)
    other = kvtc.Rope(tuple(f / 8 for f in halves.inv_freq), not wide, 1.2)
    return kvtc.Section((0, 1, 2), HEADS, dim, dim, (halves, other, None))


@dataclass
class Case:
    """Slots of a layer each, and what all kernels are told of them."""

    wide: bool
    dtype: DType
    sign: int

    def __post_init__(self) -> None:
        self.section = _section(self.wide)
        self.dim = self.section.k_dim
        self.shape = (3, HEADS, TOKENS, self.dim)
        self.width = 3 * HEADS * self.dim
        self.slots = np.ones((3, SLOTS, HEADS, self.dim), numpy_dtype(self.dtype))
        self.entries = np.array(
            [
                [of_layer.ctypes.data, HEADS * self.dim, self.dim, HEADS, self.dim, table, at, row]
                for row, (of_layer, table, at) in enumerate(
                    zip(self.slots, (0, 1, -1), range(0, self.width, HEADS * self.dim), strict=True)
                )
            ],
            np.int64,
        )
        self.rotations = cpu.Rotations.of(self.section, POSITIONS, inverse=self.sign < 0)
        self.cosines, self.sines = _rotations(self.section, self.sign)
        np.testing.assert_array_equal(self.cosines, self.rotations.cos)
        np.testing.assert_array_equal(self.sines, self.rotations.sin)

    @property
    def common(self) -> list[Any]:
        """The leading arguments."""
        rotations = [self.rotations.pairs.astype(np.int32), np.array([0, not self.wide], np.int32)]
        most = self.cosines.shape[2]
        addresses = [self.cosines.ctypes.data, self.sines.ctypes.data]
        return [self.entries, PLACES, TOKENS, *addresses, *rotations, most, TOKENS, 0]

    def fill(self, x: Array) -> None:
        """[layers, heads, tokens, dim] to their slots."""
        there = PLACES >= 0
        self.slots[:, PLACES[there]] = x[:, :, there].transpose(0, 2, 1, 3)

    def run(self, kernel: Any, arguments: list[Any]) -> None:
        simulate(kernel, (1, 3), layout.THREADS, [*self.common, *arguments])


def _rotations(section: kvtc.Section, sign: int) -> tuple[Array, Array]:
    ropes = [r for r in section.rope if r is not None]
    pairs = np.array([len(r.inv_freq) for r in ropes], np.int32)
    frequencies = np.zeros((len(ropes), pairs.max()))
    for row, rope in zip(frequencies, ropes, strict=True):
        row[: len(rope.inv_freq)] = rope.inv_freq
    cosines, sines = np.zeros((2, len(ropes), TOKENS, pairs.max()), np.float32)
    scales = np.array([r.scale for r in ropes])
    arguments = [POSITIONS, frequencies, pairs, scales, TOKENS, pairs.max(), sign, cosines, sines]
    simulate(layout.rotations, (1, len(ropes)), layout.THREADS, arguments)
    return cosines, sines


FP8 = [DType.FLOAT8_E4M3FN, DType.FLOAT8_E5M2]
NARROW = [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, *FP8]
WIDE = [DType.FLOAT16, DType.BFLOAT16]
KINDS = [*((d, False) for d in NARROW), *((d, True) for d in WIDE)]


@pytest.mark.parametrize(("dtype", "wide"), KINDS)
def test_rows_are_those_of_the_cpu(dtype: DType, wide: bool) -> None:
    case = Case(wide, dtype, -1)
    rng = np.random.default_rng(5)
    x = rng.standard_normal(case.shape).astype(numpy_dtype(dtype))
    case.fill(x)
    values = np.zeros(256, np.float32)
    if dtype.is_fp8:
        values = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
    scales = np.ones((3, HEADS), np.float32)
    if not wide:
        scales[:] = rng.uniform(0.5, 2, scales.shape)
    mean = rng.standard_normal(case.width).astype(np.float32)
    rows = np.full((TOKENS, case.width), np.nan, np.float16)
    arguments = [values, scales, mean.ctypes.data, rows.ctypes.data, case.width]
    case.run(layout.gather(dtype, wide), arguments)

    expected = np.empty((TOKENS, case.width), np.float32)
    scaled = x.astype(np.float32) * scales[:, :, None, None]
    cpu.gather(scaled, np.arange(3), case.rotations, expected)
    assert np.isnan(rows[GONE]).all()
    found, exact = (
        np.delete(y, GONE, 0).astype(np.float32) for y in (rows, (expected - mean).astype("f2"))
    )
    np.testing.assert_allclose(found, exact, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize(("dtype", "wide"), KINDS)
def test_tensors_are_those_of_the_cpu(dtype: DType, wide: bool) -> None:
    case = Case(wide, dtype, 1)
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((TOKENS, case.width)).astype(np.float16)
    mean = rng.standard_normal(case.width).astype(np.float32)
    steps = rng.uniform(0.5, 2, TOKENS).astype(np.float32)
    overflow = np.zeros(1, np.int32)
    scales = np.ones((3, HEADS), np.float32)
    if dtype.is_fp8:  # subnormals, and values that saturate
        scales[:] = [[1, 100], [1e3, 1e-2], [1e-3, 3e-5]]
    arguments = [steps, 0.5, mean.ctypes.data, rows.ctypes.data, case.width, overflow, scales]
    case.run(layout.scatter(dtype, wide), arguments)

    out = np.empty(case.shape, np.float32)
    values = rows.astype(np.float32) * (steps * np.float32(0.5))[:, None] + mean
    cpu.scatter(values, case.rotations, out)
    wanted = Case(wide, dtype, 1)
    wanted.fill(from_float32(out, dtype, scales))
    found, exact = (x.slots.astype(np.float32) for x in (case, wanted))
    last_place = {DType.FLOAT32: 2**-22, DType.FLOAT16: 2**-10, DType.BFLOAT16: 2**-7}.get(dtype, 0)
    np.testing.assert_allclose(found, exact, rtol=last_place, atol=0 if dtype.is_fp8 else 1e-6)
    assert not overflow[0]
    rows[GONE - 1, 3] = np.inf
    case.run(layout.scatter(dtype, wide), arguments)
    assert overflow[0]


@pytest.mark.parametrize(
    ("dtype", "out", "wide"),
    [
        (DType.FLOAT32, DType.BFLOAT16, False),
        (DType.BFLOAT16, DType.BFLOAT16, True),
        *((dtype, dtype, False) for dtype in FP8),
    ],
)
def test_errors_are_those_of_what_scatter_writes(dtype: DType, out: DType, wide: bool) -> None:
    case = Case(wide, dtype, 1)
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((TOKENS, case.width)).astype(np.float16)
    case.fill(rng.standard_normal(case.shape).astype(case.slots.dtype))
    mean = np.zeros(case.width, np.float32)
    steps, scales = np.ones(TOKENS, np.float32), np.ones((3, HEADS), np.float32)
    values = np.zeros(256, np.float32)
    if dtype.is_fp8:
        scales[:] = [[0.5, 0.01], [3, 1], [1, 0.001]]
        values = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
    lost, energy = np.full((2, 3, TOKENS), -1, np.float32)
    arguments = [values, scales, steps, 1.0, mean.ctypes.data]
    arguments += [rows.ctypes.data, case.width, lost, energy, TOKENS]
    case.run(layout.errors(dtype, out, wide), arguments)

    expected = np.empty(case.shape, np.float32)
    cpu.scatter(rows.astype(np.float32), case.rotations, expected)
    rounded = from_float32(expected, out, scales).astype(np.float32)
    if out.is_fp8:
        rounded *= scales[:, :, None, None]
    for token, slot in enumerate(PLACES):
        if slot >= 0:
            exact = case.slots[:, slot].astype(np.float32) * scales[:, :, None]
            error = rounded[:, :, token] - exact
            np.testing.assert_allclose(lost[:, token], (error**2).sum((1, 2)), rtol=1e-3)
            np.testing.assert_allclose(energy[:, token], (exact**2).sum((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.FLOAT8_E4M3FN])
def test_elements_are_copied_to_their_slots(dtype: DType) -> None:
    case = Case(False, dtype, 1)
    rng = np.random.default_rng(8)
    source = rng.integers(-16, 16, case.shape).astype(case.slots.dtype)
    firsts = np.array([0, 1, 3, TOKENS])
    runs = np.repeat(np.arange(3), np.diff(firsts))
    parts = [np.ascontiguousarray(source[:, :, a:b]) for a, b in pairwise(firsts)]
    sources = np.array([[x.ctypes.data for x in part] for part in parts], np.int64)
    kernel = layout.move(source.itemsize, back=False)
    simulate(kernel, (TOKENS, 3), 4, [case.entries, PLACES, runs, firsts, sources])
    expected = Case(False, dtype, 1)
    expected.fill(source)
    np.testing.assert_array_equal(case.slots.view(np.uint8), expected.slots.view(np.uint8))
