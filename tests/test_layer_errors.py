"""Errors of single layers: recorded, bounded, and told of where a layer is lost among others."""

from __future__ import annotations

import io
import math
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvtc_stream as kvtc
from kvtc_stream.formats import StreamFile

LAYERS = 5
GEOMETRY = kvtc.Geometry.uniform(layers=LAYERS, kv_heads=2, head_dim=8)
unlike = pytest.mark.filterwarnings("ignore:section .* the mean error:kvtc_stream.KVTCWarning")
poor = pytest.mark.filterwarnings("ignore:the stream is only:kvtc_stream.KVTCWarning")
lost = pytest.mark.filterwarnings("ignore:section .* of its norm:kvtc_stream.KVTCWarning")


def cache(scales: tuple[float, ...], tokens: int = 400, seed: int = 1) -> list[np.ndarray]:
    """K and V whose layers differ in size."""
    size = np.array(scales, np.float32)[:, None, None, None]
    return [x * size for x in kvtc.testing.drawn_cache(GEOMETRY, tokens, seed=seed)]


@lru_cache(maxsize=8)
def calibrated(scales: tuple[float, ...]) -> kvtc.Calibration:
    calibrator = kvtc.Calibrator(GEOMETRY)
    calibrator.update(*cache(scales, 1024, seed=2))
    return calibrator.finish()


def errors_of_layers(x: Any, y: Any) -> np.ndarray:
    """[layers, tokens]: ‖y − x‖ / ‖x‖."""
    a, b = (np.asarray(z, np.float64).swapaxes(1, 2).reshape(LAYERS, -1, 16) for z in (x, y))
    return np.linalg.norm(b - a, axis=2) / np.linalg.norm(a, axis=2)


def blocks_of(data: bytes) -> list[Any]:
    stream = StreamFile(io.BytesIO(data))
    return list(stream.read_blocks(stream.index))


UNEQUAL = (1.0, 900.0, 1.0, 30.0, 1.0)


@lost
@unlike
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_errors_of_layers_are_recorded(preset: str) -> None:
    calibration = calibrated(UNEQUAL)
    k, v = cache(UNEQUAL)
    data = kvtc.encode(k, v, kvtc.Codec(calibration, preset, ratio=4, sinks=0, window=0))
    back = kvtc.decode(data, calibration)
    exact = [errors_of_layers(x, y) for x, y in zip((k, v), back, strict=True)]
    first = 0
    for block in blocks_of(data):
        own = slice(first, first := first + block.tokens)
        kept = np.delete(np.arange(400)[own], block.verbatim_tokens)
        for name, errors in zip("kv", exact, strict=True):
            for recorded, measured in (
                (getattr(block.layer_errors, f"{name}_mean"), errors[:, kept].mean(axis=1)),
                (getattr(block.layer_errors, f"{name}_worst"), errors[:, kept].max(axis=1)),
            ):
                assert (np.array(recorded) >= measured * (1 - 1e-4)).all()
                assert (np.array(recorded) <= np.maximum(measured * 1.07, 3e-4)).all()


@lost
@poor
@unlike
def test_a_bound_holds_in_every_layer() -> None:
    """Five times the bound, unless another is given."""
    calibration = calibrated(UNEQUAL)
    k, v = cache(UNEQUAL)
    options: dict[str, Any] = {"ratio": 4, "sinks": 0, "window": 0}

    def worst(**bounds: float) -> float:
        codec = kvtc.Codec(calibration, **options, **bounds)
        back = kvtc.decode(kvtc.encode(k, v, codec), calibration)
        return max(errors_of_layers(x, y).max() for x, y in zip((k, v), back, strict=True))

    assert worst(error_bound=0.02, layer_error_bound=math.inf) > 0.1
    assert worst(error_bound=0.02) <= 0.1 * 1.001
    assert worst(error_bound=0.02, layer_error_bound=0.05) <= 0.05 * 1.001
    assert worst(layer_error_bound=0.3) <= 0.3 * 1.001


@lost
@poor
@unlike
@given(
    scales=st.tuples(*[st.sampled_from([1e-3, 0.1, 1.0, 20.0, 1e3])] * LAYERS),
    preset=st.sampled_from(["default", "paper"]),
    ratio=st.sampled_from([2.0, 8.0, 40.0]),
    bound=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    block=st.sampled_from([16, 128]),
)
def test_no_layer_breaks_five_times_the_bound(
    scales: tuple[float, ...], preset: str, ratio: float, bound: float, block: int
) -> None:
    calibration = calibrated(scales)
    k, v = cache(scales, 70)
    codec = kvtc.Codec(
        calibration, preset, ratio=ratio, error_bound=bound, window=0, block_tokens=block
    )
    back = kvtc.decode(kvtc.encode(k, v, codec), calibration)
    for x, y in zip((k, v), back, strict=True):
        assert errors_of_layers(x, y).max() <= 5 * bound * 1.001


@lost
def test_a_lost_layer_is_told_of() -> None:
    calibration = calibrated(UNEQUAL)
    k, v = cache(UNEQUAL)
    encoder = kvtc.Encoder(kvtc.Codec(calibration, mean_error=0.05, window=0))
    encoder.encode(k, v)
    with pytest.warns(kvtc.KVTCWarning, match=r"K of layers 0, 2, 3, 4 loses up to .* its norm"):
        encoder.finish()
    found = encoder.statistics.layer_errors()
    assert found is not None
    assert found.shape == (2, LAYERS)
    assert found[0, 0] > 0.25 > 0.1 > found[0, 1]
    huge = (1.0, 1e4, 1.0, 1.0, 1.0)
    with pytest.warns(kvtc.KVTCWarning, match=r"K of layers 0, 2, 3, 4 loses"):
        kvtc.encode(*cache(huge), kvtc.Codec(calibrated(huge), ratio=24, window=0))


def test_layers_alike_are_not_told_of() -> None:
    even = (1.0,) * LAYERS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ratio in (4, 64):
            kvtc.encode(*cache(even, 2000), kvtc.Codec(calibrated(even), ratio=ratio, window=0))


def test_without_measuring_nothing_is_said() -> None:
    """Then a stream is one of format 1.0."""
    even = (1.0,) * LAYERS
    data = kvtc.encode(*cache(even), kvtc.Codec(calibrated(even), measure=False, window=0))
    assert all(block.layer_errors is None for block in blocks_of(data))
    assert data[10:12] == b"\0\0"
    for name in ("error_bound", "layer_error_bound"):
        with pytest.raises(ValueError, match=f"{name} bounds the measured error"):
            kvtc.Codec(calibrated(even), measure=False, **{name: 0.1})
