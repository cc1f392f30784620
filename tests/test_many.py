"""Many streams at a time, pages, and layer by layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import kvtc_stream as kvtc
from kvtc_stream.formats import Role, StreamFile

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
    assert kvtc.decode_many(streams, calibration, out=held) == held
    for cache, data in zip(held, streams, strict=True):
        for own, b in zip(cache.contiguous(), kvtc.decode(data, calibration), strict=True):
            np.testing.assert_array_equal(np.stack(own), b)
    again = [kvtc.decode(d, calibration)[0] for d in kvtc.encode_many(held, codec)]
    assert [x.shape[2] for x in again] == TOKENS
    untouched = set(range(k.shape[1])) - {page for table in tables for page in table}
    assert np.isnan(k[:, sorted(untouched)]).all()


@pytest.mark.parametrize("together", [1, 33, 8192])
def test_pages_are_copied_a_few_tokens_at_a_time(
    codec: kvtc.Codec,
    caches: list[tuple[Any, Any]],
    streams: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    together: int,
) -> None:
    monkeypatch.setattr("kvtc_stream.stream.batch._TOKENS_AT_A_TIME", together)
    k, v, tables = pages(caches, 16)
    held = []
    for (own_k, own_v), table, tokens in zip(caches, tables, TOKENS, strict=True):
        held.append(kvtc.PagedCache(k, v, table, tokens))
        for pool, own in ((k, own_k), (v, own_v)):
            slots = pool.reshape(pool.shape[0], -1, *pool.shape[3:])
            slots[:, held[-1].slots()] = own.swapaxes(1, 2)
    assert kvtc.encode_many(held, codec) == streams


def test_pages_that_do_not_fit(calibration: kvtc.Calibration, streams: list[bytes]) -> None:
    k = np.zeros((2, 3, 16, 2, 8), np.float32)
    for table, tokens, match in (([0], 17, "page table for all"), ([7], 3, "names page 7 of 3")):
        with pytest.raises(ValueError, match=match):
            kvtc.PagedCache(k, k, table, tokens).slots()
    with pytest.raises(ValueError, match="the pages are for 5"):
        kvtc.decode_many(streams[:1], calibration, out=[kvtc.PagedCache(k, k, [0], 5)])
    half = k.astype(np.float16)
    with pytest.raises(TypeError, match="found float16, decoding gives float32"):
        kvtc.decode_many(streams[1:2], calibration, out=[kvtc.PagedCache(half, half, [0], 1)])
    with pytest.raises(ValueError, match="pages of 1 layers, the stream has 2"):
        kvtc.decode_many(streams[1:2], calibration, out=[kvtc.PagedCache(k[:1], k[:1], [0], 1)])
    with pytest.raises(ValueError, match="3 streams and 1"):
        kvtc.decode_many(streams, calibration, out=[kvtc.PagedCache(k, k, [0], 5)])


def test_pages_of_other_shapes(calibration: kvtc.Calibration, streams: list[bytes]) -> None:
    """NumPy would take one head for all. Nothing is written before all are looked at."""
    k = np.full((2, 6, 16, 2, 8), 7, np.float32)
    frozen = k.copy()
    frozen.flags.writeable = False
    for own_k, own_v, error, message in (
        (
            k[:, :, :, :1],
            k,
            ValueError,
            r"pages of K .*, expected \[pages, page_size, 2",
        ),
        (k, np.repeat(k, 2, axis=3), ValueError, "pages of V have shape"),
        (k, k[:, :5], ValueError, "other numbers of pages"),
        ([k[0], k[1, :5]], k, ValueError, "other numbers of pages"),
        (k, frozen, BufferError, "pages cannot be written"),
        ([], k, ValueError, "found pages of 0 layers, the stream has 2"),
    ):
        cache = kvtc.PagedCache(own_k, own_v, range(5), 70)
        with pytest.raises(error, match=message) as raised:
            kvtc.decode_many(streams[:1], calibration, out=[cache])
        assert raised.value.__notes__ == ["streams[0] of 1"]
    assert (k == 7).all()
    with pytest.raises(TypeError, match="page table has float64, expected integers"):
        kvtc.PagedCache(k, k, [0.5, 1.0], 20).slots()  # type: ignore[list-item]


def test_pools_that_share_one_of_their_tensors(
    calibration: kvtc.Calibration, streams: list[bytes]
) -> None:
    """Whether K or V is shared, or none: each cache has its own values where it says."""
    data = [streams[0], streams[0]]
    expected = kvtc.decode(data[0], calibration)

    def pool() -> Any:
        return np.zeros((2, 10, 16, 2, 8), np.float32)

    for shared in ("k", "v", ""):
        one, other = {"k": pool(), "v": pool()}, {"k": pool(), "v": pool()}
        if shared:
            other[shared] = one[shared]
        held = [
            kvtc.PagedCache(**tensors, page_table=table, tokens=70)
            for tensors, table in ((one, [0, 1, 2, 3, 4]), (other, [9, 8, 7, 6, 5]))
        ]
        kvtc.decode_many(data, calibration, out=held)
        for cache in held:
            for own, wanted in zip(cache.contiguous(), expected, strict=True):
                np.testing.assert_array_equal(np.stack(own), wanted)


def damaged(data: bytes) -> bytes:
    """With one bit of its last coded block flipped."""
    entry = [e for e in StreamFile(io.BytesIO(data)).index if e.role is Role.DATA][-1]
    changed = bytearray(data)
    changed[entry.offset + entry.length // 2] ^= 1
    return bytes(changed)


def test_errors_of_a_batch_say_which_it_is(
    calibration: kvtc.Calibration, codec: kvtc.Codec, caches: list[tuple[Any, Any]]
) -> None:
    k, v = caches[2]
    whole = kvtc.encode(k, v, codec)
    batch = [whole, whole, damaged(whole), whole]
    k_pages, v_pages, tables = pages([caches[2]] * 4, 16)
    into_pages = [kvtc.PagedCache(k_pages, v_pages, table, 200) for table in tables]
    into_arrays = [tuple(np.empty_like(x) for x in caches[2]) for _ in batch]
    for out in (None, into_pages, into_arrays):
        with pytest.raises(kvtc.ChecksumError) as raised:
            kvtc.decode_many(batch, calibration, out=out)
        assert raised.value.__notes__ == ["streams[2] of 4"]
        assert raised.value.index == 2
    with pytest.raises(kvtc.TruncatedError) as raised:
        kvtc.decode_many([whole, whole[:-1]], calibration)
    assert raised.value.index == 1
    into_pages[1] = kvtc.PagedCache(k_pages, v_pages, tables[1], 5)
    with pytest.raises(ValueError, match="pages are for 5") as wrong:
        kvtc.decode_many([whole] * 4, calibration, out=into_pages)
    assert wrong.value.__notes__ == ["streams[1] of 4"]
    with pytest.raises(ValueError, match="v has 10") as wrong:
        kvtc.encode_many([(k, v), (k, v[:, :, :10])], codec)
    assert wrong.value.__notes__ == ["caches[1] of 2"]


@pytest.mark.parametrize("source", ["bytes", "file", "mapped"])
def test_buffers_stay_as_they_are_when_a_stream_is_damaged(
    tmp_path: Path, calibration: kvtc.Calibration, streams: list[bytes], source: str
) -> None:
    """Also where it is larger than what is read in one go."""
    path = tmp_path / "a.kvtc"
    path.write_bytes(damaged(streams[2]))
    shape = calibration.geometry.sections[0].k_shape(200)
    k, v = (np.full(shape, 7, np.float32) for _ in "kv")
    with (
        kvtc.open(
            path.read_bytes() if source == "bytes" else path,
            calibration=calibration,
            mmap=source == "mapped",
        ) as reader,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("kvtc_stream.formats.file_reader._READ_AHEAD", 1)
        patch.setattr("kvtc_stream.stream.reader._BLOCKS_AT_A_TIME", 1)
        with pytest.raises(kvtc.ChecksumError):
            reader.read(out=(k, v))
        assert (k == 7).all()
        assert (v == 7).all()
        own = tuple(x[:, :, :32] for x in (k, v))  # what is whole can still be read
        reader.read(slice(32), out=own)
        assert not (k[:, :, :32] == 7).any()
    k_pages, v_pages = (np.full((2, 13, 16, 2, 8), 7, np.float32) for _ in "kv")
    with pytest.raises(kvtc.ChecksumError):
        kvtc.decode_many(
            [path.read_bytes()],
            calibration,
            out=[kvtc.PagedCache(k_pages, v_pages, range(13), 200)],
        )
    assert (k_pages == 7).all()


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


@pytest.mark.parametrize("form", ["one", "layers", "part of more", "batch of 1"])
def test_into_buffers(calibration: kvtc.Calibration, streams: list[bytes], form: str) -> None:
    """Values go where the caller wants them, and nowhere else."""
    data = streams[2]
    expected = kvtc.decode(data, calibration)
    room = [np.full((*x.shape[:2], x.shape[2] + 9, x.shape[3]), -1, np.float32) for x in expected]
    own: list[Any] = [x[:, :, 5:-4] for x in room]
    if form == "one":
        own = [np.ascontiguousarray(x) for x in own]
    elif form == "layers":
        own = [list(x) for x in own]
    elif form == "batch of 1":
        own = [x[:, None] for x in own]
    k, v = kvtc.decode(data, calibration, out=(own[0], own[1]))
    assert k is own[0]
    assert v is own[1]
    for found, wanted in zip(own, expected, strict=True):
        np.testing.assert_array_equal(np.array(found).reshape(wanted.shape), wanted)
    if form != "one":
        assert all((x[:, :, :5] == -1).all() and (x[:, :, -4:] == -1).all() for x in room)
    with kvtc.open(io.BytesIO(data), calibration=calibration) as reader:
        some = tuple(np.empty((1, *x.shape[1:2], 40, x.shape[3]), np.float32) for x in expected)
        reader.read(tokens=slice(100, 140), layers=slice(1, 2), out=some)
        for found, wanted in zip(some, expected, strict=True):
            np.testing.assert_allclose(found, wanted[1:2, :, 100:140], rtol=1e-5, atol=1e-5)


def test_many_into_buffers_and_pages(
    calibration: kvtc.Calibration, streams: list[bytes], caches: list[tuple[Any, Any]]
) -> None:
    k_pages, v_pages, tables = pages(caches[:1], 16)
    pair = tuple(np.empty_like(x) for x in caches[2])
    paged = kvtc.PagedCache(k_pages, v_pages, tables[0], TOKENS[0])
    kvtc.decode_many([streams[0], streams[2]], calibration, out=[paged, pair])
    for found, data in ((paged.contiguous(), streams[0]), (pair, streams[2])):
        for a, b in zip(found, kvtc.decode(data, calibration), strict=True):
            np.testing.assert_array_equal(np.array(a), b)


def test_into_torch_tensors(calibration: kvtc.Calibration, caches: list[tuple[Any, Any]]) -> None:
    torch = pytest.importorskip("torch")
    k, v = (torch.from_numpy(x).bfloat16() for x in caches[0])
    data = kvtc.encode(k, v, kvtc.Codec(calibration, ratio=4, window=8))
    expected = kvtc.decode(data, calibration)
    found = kvtc.decode(data, calibration, out=(torch.empty_like(k), list(torch.empty_like(v))))
    assert torch.equal(found[0], torch.from_dlpack(expected[0]))
    assert torch.equal(torch.stack(found[1]), torch.from_dlpack(expected[1]))


def test_buffers_that_do_not_fit(calibration: kvtc.Calibration, streams: list[bytes]) -> None:
    k, v = kvtc.decode(streams[0], calibration)
    frozen = np.empty_like(v)
    frozen.flags.writeable = False
    for out, error, message in (
        ((k, v.astype(np.float16)), TypeError, "out V: found float16, decoding gives float32"),
        ((k[:, :, 1:], v), ValueError, "room for 69 tokens, found 70"),
        ((k, v[1:]), ValueError, "out V has shape"),
        ((k, frozen), BufferError, "out V cannot be written"),
        ((k, k), BufferError, "K and V, are the same memory"),
        (([*k[:1]] * len(k), v), BufferError, "two layers, or K and V, are the same memory"),
        (
            (k, as_strided(v, v.shape, (v.strides[0], 0, 32, 4))),
            BufferError,
            "stride of 0",
        ),
    ):
        with pytest.raises(error, match=message):
            kvtc.decode(streams[0], calibration, out=out)


def test_some_of_the_tensors_may_be_given(
    calibration: kvtc.Calibration, streams: list[bytes]
) -> None:
    expected = kvtc.decode(streams[1], calibration)
    own = tuple(np.empty_like(x) for x in expected)
    found = kvtc.decode_many(streams[:2], calibration, out=[None, own])
    assert found[0][0].shape[2] == TOKENS[0]
    for a, b, c in zip(found[1], own, expected, strict=True):
        assert a is b
        np.testing.assert_array_equal(b, c)
    with kvtc.open(streams[0], calibration=calibration) as reader:
        assert reader.read(layers=slice(1, 1), out=own) == own
    for wrong in (own[:1], (*own, own[0]), own[0]):
        with pytest.raises(TypeError, match="out must be a pair, K and V, found"):
            kvtc.decode(streams[1], calibration, out=wrong)  # type: ignore[arg-type]


def test_streams_without_tokens(calibration: kvtc.Calibration, codec: kvtc.Codec) -> None:
    data = kvtc.Encoder(codec).finish()
    layers, heads, dim = (
        len(calibration.geometry.sections[0].layers),
        calibration.geometry.sections[0].kv_heads,
        calibration.geometry.sections[0].k_dim,
    )
    pairs = [kvtc.decode(data, calibration), *kvtc.decode_many([data] * 2, calibration)]
    assert all(x.shape == (layers, heads, 0, dim) for pair in pairs for x in pair)
    found = list(kvtc.decode_layers(data, calibration))
    assert [x.shape for pair in found for x in pair] == [(heads, 0, dim)] * 2 * layers
