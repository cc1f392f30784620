"""What comes back has one shape, whichever way it comes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kvtc_stream as kvtc

Cache = tuple[NDArray[Any], NDArray[Any]]
GEOMETRY = kvtc.Geometry.uniform(layers=3, kv_heads=2, head_dim=8, v_head_dim=6)


@pytest.fixture(scope="module")
def coded() -> tuple[bytes, kvtc.Codec, Cache]:
    """A stream of 100 tokens, and what it decodes to; K and V have other widths."""
    calibrator = kvtc.Calibrator(GEOMETRY)
    calibrator.update(*kvtc.testing.drawn_cache(GEOMETRY, 600, seed=1))
    codec = kvtc.Codec(calibrator.finish(), ratio=8, window=8, block_tokens=16)
    data = kvtc.encode(*kvtc.testing.drawn_cache(GEOMETRY, 100), codec)
    k, v = kvtc.decode(data, codec.calibration)
    assert (k.shape, v.shape) == ((3, 2, 100, 8), (3, 2, 100, 6))
    return data, codec, (np.asarray(k), np.asarray(v))


def buffers(tokens: int = 100) -> Cache:
    section = GEOMETRY.sections[0]
    return np.zeros(section.k_shape(tokens), "f4"), np.zeros(section.v_shape(tokens), "f4")


def joined(parts: Any, axis: int = 2) -> Cache:
    """Blocks one after the other, or layers one above the other."""
    pairs = [(x.k, x.v) if isinstance(x, kvtc.KVBlock) else x for x in parts]
    join = np.stack if axis < 0 else np.concatenate
    k, v = (join(x, axis=max(axis, 0)) for x in zip(*pairs, strict=True))
    return k, v


def opened(data: bytes, calibration: kvtc.Calibration) -> kvtc.Reader:
    return kvtc.open(io.BytesIO(data), calibration=calibration)


WAYS: dict[str, Callable[[bytes, kvtc.Calibration], Any]] = {
    "decode out": lambda d, c: kvtc.decode(d, c, out=buffers()),
    "read": lambda d, c: opened(d, c).read(),
    "read out": lambda d, c: opened(d, c).read(out=buffers()),
    "decode_many": lambda d, c: kvtc.decode_many([d, d], c)[1],
    "decode_many out": lambda d, c: kvtc.decode_many([d, d], c, out=[buffers(), buffers()])[1],
    "blocks": lambda d, c: joined(opened(d, c)),
    "some blocks": lambda d, c: joined(opened(d, c).blocks(slice(0, 100), slice(0, 3))),
    "decoder": lambda d, c: joined(kvtc.Decoder(c).decode(d)),
    "decode_layers": lambda d, c: joined(kvtc.decode_layers(d, c), axis=-1),
}


@pytest.mark.parametrize("way", WAYS)
def test_k_and_v_of_a_stream(way: str, coded: tuple[bytes, kvtc.Codec, Cache]) -> None:
    """A pair, [layers, kv_heads, tokens, head_dim]; a layer's lacks the first axis."""
    data, codec, expected = coded
    found = WAYS[way](data, codec.calibration)
    assert isinstance(found, tuple)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_out_comes_back_as_it_is(coded: tuple[bytes, kvtc.Codec, Cache]) -> None:
    """Tensors, lists of layers and pages, in every function that takes them."""
    data, codec, expected = coded
    calibration = codec.calibration
    k, v = buffers()
    pages = [np.zeros((3, 7, 16, 2, dim), "f4") for dim in (8, 6)]
    cache = kvtc.PagedCache(*pages, page_table=range(7), tokens=100)
    for out in ((k, v), (list(k), list(v))):
        assert kvtc.decode(data, calibration, out=out) is out
        assert opened(data, calibration).read(out=out) is out
        [found] = kvtc.decode_many([data], calibration, out=[out])
        assert found is out
    [found] = kvtc.decode_many([data], calibration, out=[cache])
    assert found is cache
    for x, y in zip(cache.contiguous(), expected, strict=True):
        np.testing.assert_allclose(np.stack(x), y, rtol=1e-5, atol=1e-5)


def test_k_and_v_of_a_page(coded: tuple[bytes, kvtc.Codec, Cache]) -> None:
    _, codec, _ = coded
    pages = kvtc.PageCodec(codec, dtype="float32")
    page = pages.encode(*kvtc.testing.drawn_cache(GEOMETRY, 16), positions=5)
    k, v = pages.decode(page)
    assert (k.shape, v.shape) == ((3, 2, 16, 8), (3, 2, 16, 6))
    for x, y in zip(joined(pages.layers(page), axis=-1), (k, v), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_no_tokens_have_the_same_shape(coded: tuple[bytes, kvtc.Codec, Cache]) -> None:
    _, codec, _ = coded
    empty = kvtc.Encoder(codec).finish()
    for k, v in (
        kvtc.decode(empty, codec.calibration),
        kvtc.decode_many([empty], codec.calibration)[0],
        opened(empty, codec.calibration).read(),
    ):
        assert (k.shape, v.shape) == ((3, 2, 0, 8), (3, 2, 0, 6))
