"""Many streams at a time, pages, and layer by layer."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

import kvtc_stream as kvtc

TOKENS = [70, 1, 200]
pytestmark = pytest.mark.filterwarnings("ignore:the stream is only")


@pytest.fixture
def caches(calibration: kvtc.Calibration) -> list[tuple[Any, Any]]:
    return [kvtc.testing.drawn_cache(calibration.geometry, n, seed=n) for n in TOKENS]


@pytest.fixture
def streams(codec: kvtc.Codec, caches: list[tuple[Any, Any]]) -> list[bytes]:
    return kvtc.encode_many(caches, codec)


def pages(caches: list[tuple[Any, Any]], size: int) -> tuple[Any, Any, list[list[int]]]:
    """Room for all, and page tables that mix them."""
    layers, heads, _, dim = caches[0][0].shape
    counts = [-(-k.shape[2] // size) for k, _ in caches]
    order = np.random.default_rng(0).permutation(sum(counts) + 2).tolist()
    tables = []
    for count in counts:
        tables.append([order.pop() for _ in range(count)])
    shape = (layers, sum(counts) + 2, size, heads, dim)
    return np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32), tables


def test_each_stream_is_that_of_its_cache_alone(
    codec: kvtc.Codec, caches: list[tuple[Any, Any]], streams: list[bytes]
) -> None:
    assert streams == [kvtc.encode(k, v, codec) for k, v in caches]


def test_decode_many_is_decode(calibration: kvtc.Calibration, streams: list[bytes]) -> None:
    found = kvtc.decode_many(streams, calibration)
    for pair, data in zip(found, streams, strict=True):
        for a, b in zip(pair, kvtc.decode(data, calibration), strict=True):
            np.testing.assert_array_equal(a, b)


def test_streams_that_were_cut(calibration: kvtc.Calibration, streams: list[bytes]) -> None:
    target = io.BytesIO()
    kvtc.cut(streams[2], target, tokens=slice(10, 150))
    part = target.getvalue()
    expected = kvtc.decode(part, calibration)
    [found] = kvtc.decode_many([part], calibration)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for layer, pair in enumerate(kvtc.decode_layers(part, calibration)):
        for a, b in zip(pair, expected, strict=True):
            np.testing.assert_allclose(a, b[layer], atol=1e-5)


def test_pages_in_and_out(
    calibration: kvtc.Calibration,
    codec: kvtc.Codec,
    caches: list[tuple[Any, Any]],
    streams: list[bytes],
) -> None:
    k, v, tables = pages(caches, 16)
    held = [
        kvtc.PagedCache(k, v, table, tokens) for table, tokens in zip(tables, TOKENS, strict=True)
    ]
    assert kvtc.decode_many(streams, calibration, out=held) == []
    for cache, data in zip(held, streams, strict=True):
        for own, b in zip(cache.contiguous(), kvtc.decode(data, calibration), strict=True):
            np.testing.assert_array_equal(np.stack(own), b)
    again = [kvtc.decode(d, calibration)[0] for d in kvtc.encode_many(held, codec)]
    assert [x.shape[2] for x in again] == TOKENS
    untouched = set(range(k.shape[1])) - {page for table in tables for page in table}
    assert np.isnan(k[:, sorted(untouched)]).all()


def test_pages_that_do_not_fit(calibration: kvtc.Calibration, streams: list[bytes]) -> None:
    k = np.zeros((2, 3, 16, 2, 8), np.float32)
    for table, tokens, match in (([0], 17, "page table for all"), ([7], 3, "names page 7 of 3")):
        with pytest.raises(ValueError, match=match):
            kvtc.PagedCache(k, k, table, tokens).slots()
    with pytest.raises(ValueError, match="the pages are for 5"):
        kvtc.decode_many(streams[:1], calibration, out=[kvtc.PagedCache(k, k, [0], 5)])
    half = k.astype(np.float16)
    with pytest.raises(TypeError, match="pages are float16, the stream decodes to float32"):
        kvtc.decode_many(streams[1:2], calibration, out=[kvtc.PagedCache(half, half, [0], 1)])
    with pytest.raises(ValueError, match="pages of 1 layers, the stream has 2"):
        kvtc.decode_many(streams[1:2], calibration, out=[kvtc.PagedCache(k[:1], k[:1], [0], 1)])
    with pytest.raises(ValueError, match="3 streams and 1"):
        kvtc.decode_many(streams, calibration, out=[kvtc.PagedCache(k, k, [0], 5)])


def test_pages_that_are_a_view_of_something_else(
    calibration: kvtc.Calibration, streams: list[bytes]
) -> None:
    room = np.zeros((2, 16, 10, 2, 8), np.float32)
    k = v = room.swapaxes(1, 2)[:, ::2]  # [layers, pages, page size, heads, dim]
    kvtc.decode_many(streams[:1], calibration, out=[kvtc.PagedCache(k, v, [4, 0, 1, 2, 3], 70)])
    expected = kvtc.decode(streams[0], calibration)[1]
    np.testing.assert_array_equal(v[:, 4].swapaxes(1, 2), expected[:, :, :16])


def test_layer_by_layer(calibration: kvtc.Calibration, streams: list[bytes]) -> None:
    k, v = kvtc.decode(streams[2], calibration)
    found = list(kvtc.decode_layers(streams[2], calibration))
    assert len(found) == len(k)
    for layer, (a, b) in enumerate(found):
        np.testing.assert_allclose(a, k[layer], atol=1e-5)
        np.testing.assert_allclose(b, v[layer], atol=1e-5)
