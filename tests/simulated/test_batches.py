"""Batches of blocks through the kernels, with NumPy for CuPy: against the CPU backend."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvtc_stream as kvtc
from kvtc_stream.backend import get_backend
from kvtc_stream.formats import Block, Geometry, Role, Rope, StreamFile

Array = npt.NDArray[Any]

# Few tokens gain little, and one is unlike the calibration: the encoder says so.
pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")

GEOMETRY = Geometry.uniform(layers=2, kv_heads=1, head_dim=16, rope=Rope.from_theta(1e4, 16))
FLOAT16 = kvtc.DType.FLOAT16
TOKENS, BLOCK, RATIO = 35, 24, 4.0
#: A token that no quantiser takes.
HOSTILE = 30


@pytest.fixture(scope="module")
def calibration() -> kvtc.Calibration:
    """With gradients, so that tokens have classes."""
    calibrator = kvtc.Calibrator(GEOMETRY)
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 1500, seed=1)
    calibrator.update(k, v)
    rng = np.random.default_rng(3)
    size = np.where(v[:1, :1, :, :1] > 0, 3.0, 0.3) * 1e-4
    of_both = [(rng.standard_normal(x.shape) * size).astype(np.float32) for x in (k, v)]
    calibrator.update_gradients(k, v, *of_both)
    return calibrator.finish()


@pytest.fixture(scope="module")
def cache() -> tuple[Array, Array]:
    k, v = kvtc.testing.drawn_cache(GEOMETRY, TOKENS, seed=5, dtype=FLOAT16)
    k[0, 0, HOSTILE, 0] = np.nan
    return k, v


@pytest.fixture(scope="module")
def stream(calibration: kvtc.Calibration, cache: tuple[Array, Array]) -> bytes:
    """Of the CPU backend."""
    codec = kvtc.Codec(calibration, ratio=RATIO, sinks=0, window=0, block_tokens=BLOCK)
    return kvtc.encode(*cache, codec=codec)


def _blocks(file: StreamFile) -> list[Block]:
    return [file.read_block(entry) for entry in file.index if entry.role is Role.DATA]


def _tensors(array: Array) -> Any:
    import cupy

    from kvtc_stream.gpu.tensors import Tensors

    return Tensors.of_layers([cupy.asarray(layer) for layer in array], FLOAT16)


def test_values_are_those_of_the_cpu(calibration: kvtc.Calibration, stream: bytes) -> None:
    from kvtc_stream.gpu.decoding import BlockDecoder, Placed, decode
    from kvtc_stream.gpu.plan import DevicePlan

    file = StreamFile(io.BytesIO(stream))
    section, plan = file.header.geometry.sections[0], file.header.plan.sections[0]
    decoder = BlockDecoder(section, DevicePlan(calibration, 0, plan))
    outs = [_tensors(np.zeros((2, 1, TOKENS, 16), np.float16)) for _ in range(2)]
    ends = np.cumsum([0, *[block.tokens for block in _blocks(file)]])
    placed = [Placed(b, ends[i] + np.arange(b.tokens)) for i, b in enumerate(_blocks(file))]
    refused: list[Placed] = []
    decode(decoder, placed, [0, 1], *outs, refused.append)
    assert not refused
    for out, expected in zip(outs, kvtc.decode(stream, calibration), strict=True):
        found = np.stack(out._owners).astype(np.float32)
        exact = np.array(expected, np.float32)
        found[:, :, HOSTILE] = exact[:, :, HOSTILE] = 0
        np.testing.assert_allclose(found, exact, atol=2e-3 * np.abs(exact).max())


def test_payloads_are_what_the_cpu_reads(
    calibration: kvtc.Calibration, cache: tuple[Array, Array], stream: bytes
) -> None:
    from kvtc_stream.gpu.encoding import BatchEncoder, RateStates
    from kvtc_stream.gpu.plan import DevicePlan

    file = StreamFile(io.BytesIO(stream))
    header, blocks = file.header, _blocks(file)
    section, plan = header.geometry.sections[0], header.plan.sections[0]
    plan_there = DevicePlan(calibration, 0, plan)
    encoder = BatchEncoder(section, plan_there, FLOAT16, None, measure=True, bound=1.0)
    states = RateStates(1, header.verbatim_size(0, 1) / RATIO, -30.0)
    starts = np.array([0, BLOCK, TOKENS])
    tokens, one_stream = np.arange(TOKENS), np.array([0, 2])
    tensors = [_tensors(array) for array in cache]
    found = encoder.encode(*tensors, tokens, tokens, starts, one_stream, states)
    assert found.errors is not None
    assert np.flatnonzero(found.verbatim).tolist() == [HOSTILE]

    reader = get_backend("cpu").section_coder(header, 0, calibration)
    for i, (block, payload) in enumerate(zip(blocks, found.payloads, strict=True)):
        assert payload
        decoded = reader.decode(replace(block, coded=payload), [0, 1])
        of_block = slice(starts[i], starts[i + 1])
        assert np.flatnonzero(found.verbatim[of_block]).tolist() == list(block.verbatim_tokens)
        for of_kind, values, exact in zip(found.errors, decoded, cache, strict=True):
            fits = ~found.verbatim[of_block]
            expected = exact[:, :, of_block][:, :, fits].astype(np.float32)
            lost = values[:, :, fits].astype(np.float32) - expected
            errors = np.sqrt((lost**2).sum((0, 1, 3)) / (expected**2).sum((0, 1, 3)))
            np.testing.assert_allclose(of_kind[of_block][fits], errors, rtol=0.02)
            assert errors.mean() < 0.3
    size = sum(len(payload or b"") for payload in found.payloads)
    assert size == pytest.approx(TOKENS * header.verbatim_size(0, 1) / RATIO, rel=0.2)
