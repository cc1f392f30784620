"""The layout kernels against the CPU's: pages of each dtype, with RoPE of several kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvtc_stream as kvtc
from kvtc_stream.cpu import layout as cpu
from kvtc_stream.gpu import layout
from kvtc_stream.gpu.simulator import simulate
from kvtc_stream.interop import numpy_dtype

Array = npt.NDArray[Any]

HEADS, DIM, SLOTS = 2, 7, 9
_ROPE = kvtc.Rope.from_theta(1e4, 4)
SECTION = kvtc.Section(
    (0, 1, 2),
    HEADS,
    DIM,
    DIM,
    (_ROPE, kvtc.Rope((0.7, 0.3, 0.1), True, 1.2), None),
)
LAYERS = len(SECTION.layers)
WIDTH = LAYERS * HEADS * DIM
#: Where tokens are; one of them is nowhere.
PLACES = np.array([7, 0, -1, 3, 8], np.int64)
TOKENS, GONE = len(PLACES), 2
POSITIONS = np.array([0, 3, 100, 7000, 7001], np.int64)
_GRID = (1, LAYERS * HEADS)
_LAYERS = np.arange(LAYERS, dtype=np.int32)


def _pages(dtype: kvtc.DType, values: Array) -> tuple[list[Array], Array]:
    """[SLOTS, HEADS, DIM] a layer, of [layers, heads, tokens, dim]; and their addresses."""
    pages = [np.ones((SLOTS, HEADS, DIM), numpy_dtype(dtype)) for _ in range(LAYERS)]
    for page, layer in zip(pages, values, strict=True):
        for place, token in zip(PLACES, layer.transpose(1, 0, 2), strict=True):
            if place >= 0:
                page[place] = token.astype(page.dtype)
    return pages, np.array([page.ctypes.data for page in pages], np.uint64)


def _ropes(sign: int) -> list[Array]:
    """Cosines, sines, tables, pairs and interleaved."""
    ropes = [r for r in SECTION.rope if r is not None]
    pairs = np.array([len(r.inv_freq) for r in ropes], np.int32)
    frequencies = np.zeros((len(ropes), pairs.max()))
    for row, rope in zip(frequencies, ropes, strict=True):
        row[: len(rope.inv_freq)] = rope.inv_freq
    cosines, sines = np.zeros((2, len(ropes), TOKENS, pairs.max()), np.float32)
    scales = np.array([r.scale for r in ropes])
    arguments = [POSITIONS, frequencies, pairs, scales, TOKENS, pairs.max(), sign, cosines, sines]
    simulate(layout.rotations, (1, len(ropes)), layout.THREADS, arguments)
    expected = cpu.Rotations.of(SECTION, POSITIONS, inverse=sign < 0)
    np.testing.assert_array_equal(cosines, expected.cos)
    np.testing.assert_array_equal(sines, expected.sin)
    tables = np.array([0, 1, -1], np.int32)
    return [cosines, sines, tables, pairs, np.array([0, 1], np.int32)]


@pytest.mark.parametrize(
    "dtype",
    [
        kvtc.DType.FLOAT32,
        kvtc.DType.FLOAT16,
        kvtc.DType.BFLOAT16,
        kvtc.DType.FLOAT8_E4M3FN,
    ],
)
def test_rows_are_those_of_the_cpu(dtype: kvtc.DType) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((LAYERS, HEADS, TOKENS, DIM)).astype(numpy_dtype(dtype))
    pages, addresses = _pages(dtype, x)
    cosines, sines, tables, pairs, interleaved = _ropes(-1)
    values = np.zeros(256, np.float32)
    if pages[0].itemsize == 1:
        values = np.arange(256, dtype=np.uint8).view(pages[0].dtype).astype(np.float32)
    scales = rng.uniform(0.5, 2, (LAYERS, HEADS)).astype(np.float32)
    mean = rng.standard_normal(WIDTH).astype(np.float32)
    rows = np.full((TOKENS, WIDTH), np.nan, np.float16).view(np.uint16)
    strides = [HEADS * DIM, DIM]
    arguments = [addresses, _LAYERS, HEADS, PLACES, *strides, DIM, TOKENS, pairs.max()]
    arguments += [
        cosines,
        sines,
        tables,
        pairs,
        interleaved,
        TOKENS,
        0,
        values,
        scales,
        mean,
        rows,
        WIDTH,
    ]
    simulate(layout.gather(dtype), _GRID, layout.THREADS, arguments)

    expected = np.empty((TOKENS, WIDTH), np.float32)
    scaled = x.astype(np.float32) * scales[:, :, None, None]
    rotations = cpu.Rotations.of(SECTION, POSITIONS, inverse=True)
    cpu.gather(scaled, np.arange(LAYERS), rotations, expected)
    found = rows.view(np.float16)
    assert np.isnan(found[GONE]).all()
    np.testing.assert_allclose(
        np.delete(found, GONE, 0).astype(np.float32),
        np.delete(expected - mean, GONE, 0).astype(np.float16).astype(np.float32),
        rtol=2**-10,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [kvtc.DType.FLOAT32, kvtc.DType.FLOAT16, kvtc.DType.BFLOAT16])
def test_tensors_are_those_of_the_cpu(dtype: kvtc.DType) -> None:
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((TOKENS, WIDTH)).astype(np.float16)
    mean = rng.standard_normal(WIDTH).astype(np.float32)
    steps = rng.uniform(0.5, 2, TOKENS).astype(np.float32)
    pages, addresses = _pages(dtype, np.zeros((LAYERS, HEADS, TOKENS, DIM)))
    cosines, sines, tables, pairs, interleaved = _ropes(1)
    columns = _LAYERS * np.int32(HEADS * DIM)
    overflow = np.zeros(1, np.int32)
    strides = [HEADS * DIM, DIM]
    arguments = [addresses, _LAYERS, HEADS, PLACES, *strides, DIM, TOKENS, pairs.max()]
    arguments += [cosines, sines, tables, pairs, interleaved, TOKENS, 0, columns, steps, 0.5, mean]
    arguments += [rows.view(np.uint16), WIDTH, overflow]
    simulate(layout.scatter(dtype), _GRID, layout.THREADS, arguments)

    expected = np.empty((LAYERS, HEADS, TOKENS, DIM), np.float32)
    values = rows.astype(np.float32) * (steps * np.float32(0.5))[:, None] + mean
    cpu.scatter(values, cpu.Rotations.of(SECTION, POSITIONS, inverse=False), expected)
    wanted, _ = _pages(dtype, expected)
    tolerance = np.finfo(np.float32).eps if dtype is kvtc.DType.FLOAT32 else 0
    for page, of_cpu in zip(pages, wanted, strict=True):
        found, exact = page.astype(np.float32), of_cpu.astype(np.float32)
        np.testing.assert_allclose(found, exact, rtol=tolerance)
    assert not overflow[0]


def test_errors_are_those_of_what_scatter_writes() -> None:
    rng = np.random.default_rng(7)
    shape = (LAYERS, HEADS, TOKENS, DIM)
    rows = rng.standard_normal((TOKENS, WIDTH)).astype(np.float16)
    mean = np.zeros(WIDTH, np.float32)
    steps, scales = np.ones(TOKENS, np.float32), np.ones((LAYERS, HEADS), np.float32)
    pages, addresses = _pages(kvtc.DType.FLOAT32, rng.standard_normal(shape))
    cosines, sines, tables, pairs, interleaved = _ropes(1)
    lost, energy = np.full((2, LAYERS * HEADS, TOKENS), -1, np.float32)
    strides = [HEADS * DIM, DIM]
    arguments = [addresses, _LAYERS, HEADS, PLACES, *strides, DIM, TOKENS, pairs.max()]
    arguments += [cosines, sines, tables, pairs, interleaved, TOKENS, 0, np.zeros(256, np.float32)]
    arguments += [scales, steps, 1.0, mean, rows.view(np.uint16), WIDTH, lost, energy, TOKENS]
    kernel = layout.errors(kvtc.DType.FLOAT32, kvtc.DType.BFLOAT16)
    simulate(kernel, _GRID, layout.THREADS, arguments)

    expected = np.empty(shape, np.float32)
    cpu.scatter(
        rows.astype(np.float32), cpu.Rotations.of(SECTION, POSITIONS, inverse=False), expected
    )
    rounded = expected.astype(numpy_dtype(kvtc.DType.BFLOAT16)).astype(np.float32)
    for token, slot in enumerate(PLACES):
        exact = np.stack([page[slot] for page in pages]) * (slot >= 0)
        error = (rounded[:, :, token] - exact) * (slot >= 0)
        np.testing.assert_allclose(lost[:, token], (error**2).sum(-1).ravel(), rtol=1e-4)
        np.testing.assert_allclose(energy[:, token], (exact**2).sum(-1).ravel(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_elements_are_copied_to_their_slots(dtype: type) -> None:
    rng = np.random.default_rng(8)
    source = rng.integers(2, 200, (LAYERS, HEADS, TOKENS, DIM)).astype(dtype)
    pages = np.ones((LAYERS, SLOTS, HEADS, DIM), dtype)
    addresses = np.array([page.ctypes.data for page in pages], np.uint64)
    arguments = [addresses, HEADS, PLACES, HEADS * DIM, DIM, DIM, TOKENS, source.ctypes.data]
    kernel = layout.place(source.itemsize)
    simulate(kernel, (TOKENS, LAYERS * HEADS), 4, arguments)
    expected = np.ones_like(pages)
    for token, slot in enumerate(PLACES):
        if slot >= 0:
            expected[:, slot] = source[:, :, token]
    np.testing.assert_array_equal(pages, expected)
