"""Pages: alone, deterministic, of bounded size, layer by layer."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import FEWER, Case, cases
from test_formats_spec import values

import kvtc_stream as kvtc
from kvtc_stream.formats.page import PAGE_MAGIC

Cache = tuple[NDArray[Any], NDArray[Any]]


def page_codec(codec: kvtc.Codec, **options: Any) -> kvtc.PageCodec:
    return kvtc.PageCodec(codec, dtype="float32", **options)


@FEWER
@given(cases(), st.integers(0, 10**9))
def test_pages_of_anything(case: Case, first: int) -> None:
    """Every dtype, preset, section; bounded size; equal bytes; hostile tokens are exact."""
    for i, tokens in enumerate(case.sections):
        pages = kvtc.PageCodec(case.codec, dtype=case.dtype.label, section=i, **case.options)
        size = case.codec.block_tokens
        for start in range(0, min(tokens.count, 2 * size), size):
            span = slice(start, start + size)
            k, v = tokens.k[:, :, span], tokens.v[:, :, span]
            positions = first if tokens.positions is None else tokens.positions[span]
            page = pages.encode(k, v, positions=positions)
            assert len(page) <= pages.max_encoded_size(k.shape[2]) <= pages.raw_size(k.shape[2])
            raw = pages.encode_raw(k, v, positions=positions)
            assert len(raw) <= pages.raw_size(k.shape[2])
            assert page == pages.encode(k, v, positions=positions)
            block = pages.block(page + b"padding of a slot")
            expected = np.arange(k.shape[2]) + first if tokens.positions is None else positions
            np.testing.assert_array_equal(block.positions, expected)
            assert block.k.dtype == pages.block(raw).k.dtype
            if not case.dtype.is_fp8:
                exact = pages.block(raw)
                assert exact.k.tobytes() == k.tobytes()
                assert exact.v.tobytes() == v.tobytes()
            for layer, (a, b) in enumerate(pages.layers(page)):
                # One layer is another product than all: rounding may differ.
                for x, y in ((a, block.k), (b, block.v)):
                    np.testing.assert_allclose(
                        x.astype(np.float32), y[layer].astype(np.float32), rtol=0.02, atol=1e-4
                    )


def test_what_a_page_is_told(calibration: kvtc.Calibration) -> None:
    """Integers of any kind are a position; an empty secret is none."""
    import torch

    codec = kvtc.Codec(calibration, ratio=4, block_tokens=16)
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 32, seed=3)
    pages = kvtc.PageCodec(codec, dtype="float32")
    first, second = (k[:, :, :16], v[:, :, :16]), (k[:, :, 16:], v[:, :, 16:])
    expected = [pages.encode(*first, positions=7), pages.encode(*second, positions=40)]
    for kind in (np.int64, np.uint8, torch.tensor):
        assert pages.encode(*first, positions=kind(7)) == expected[0]
    for several in (np.array([7, 40]), torch.tensor([7, 40]), [np.int64(7), 40]):
        assert pages.encode_many(k, v, positions=several) == expected
    for wrong in (True, 7.0, 2**63 - 4):
        with pytest.raises((ValueError, TypeError), match="positions"):
            pages.encode(*first, positions=wrong)
    for key in (b"", "secret"):
        with pytest.raises(ValueError, match="key must be a secret of some bytes, found"):
            kvtc.PageCodec(codec, dtype="float32", key=key)  # type: ignore[arg-type]
    sealed = kvtc.PageCodec(codec, dtype="float32", key=b"a secret")
    with pytest.raises(TypeError, match="identity must be bytes, found str"):
        sealed.encode(*first, positions=0, identity="a name")  # type: ignore[arg-type]


def test_a_page_depends_on_its_tokens_only(codec: kvtc.Codec, cache: Cache) -> None:
    k, v = cache
    pages = page_codec(codec)
    page = pages.encode(k[:, :, :16], v[:, :, :16], positions=32)
    pages.encode(k[:, :, 16:32], v[:, :, 16:32], positions=48)
    assert pages.encode(k[:, :, :16], v[:, :, :16], positions=32) == page
    assert page_codec(codec).encode(k[:, :, :16], v[:, :, :16], positions=32) == page
    assert pages.encode(k[:, :, :16], v[:, :, :16], positions=33) != page
    moved = pages.block(pages.encode(k[:, :, :16], v[:, :, :16], positions=33))
    assert moved.positions.tolist() == list(range(33, 49))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: pages.encode(k[:, :, :16], v[:, :, :16], positions=32), range(9))
        assert set(found) == {page}


def test_layers_come_one_by_one(
    codec: kvtc.Codec, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symbols are decoded once, and other pages may come in between."""
    k, v = cache
    pages = page_codec(codec)
    first = pages.encode(k[:, :, :16], v[:, :, :16], positions=0)
    second = pages.encode(k[:, :, 16:32], v[:, :, 16:32], positions=16)
    expected = pages.block(first)
    calls = []
    unpack = pages._coder._coding.unpack  # type: ignore[attr-defined]
    monkeypatch.setattr(
        pages._coder._coding,  # type: ignore[attr-defined]
        "unpack",
        lambda *a: (calls.append(1), unpack(*a)),
    )
    layers = pages.layers(first)
    assert calls == [1]
    for i, (a, b) in enumerate(layers):
        pages.block(second)
        np.testing.assert_allclose(a, expected.k[i], atol=1e-5)
        np.testing.assert_allclose(b, expected.v[i], atol=1e-5)
        assert len(calls) == i + 2


@pytest.mark.parametrize("most", [700, 1500, 3000])
def test_the_fixed_rate_is_kept(codec: kvtc.Codec, most: int) -> None:
    """Every page fits, and uses what there is: more bytes, smaller errors."""
    pages = page_codec(codec, max_bytes=most)
    assert pages.max_encoded_size(16) == most
    for seed in range(10):
        k, v = kvtc.testing.drawn_cache(codec.calibration.geometry, 16, seed=seed)
        page = pages.encode(k * (1 + seed / 10), v, positions=0)
        assert most * 0.9 < len(page) <= most
        errors = pages.block(page).errors
        better = page_codec(codec, max_bytes=2 * most).encode(k * (1 + seed / 10), v, positions=0)
        assert pages_error(codec, better, 2 * most) < errors.k_worst or errors.k_worst < 1e-3


def pages_error(codec: kvtc.Codec, page: bytes, most: int) -> float:
    return page_codec(codec, max_bytes=most).block(page).errors.k_worst


def test_what_does_not_fit_raises_and_goes_raw(codec: kvtc.Codec, cache: Cache) -> None:
    k, v = (x[:, :, :16].copy() for x in cache)
    pages = page_codec(codec, max_bytes=1500)
    k[0, 0, :8, 0] = np.nan
    with pytest.raises(kvtc.UnsupportedError, match=r"fit the 1500 bytes.*encode_raw"):
        pages.encode(k, v, positions=0)
    raw = pages.encode_raw(k, v, positions=0)
    assert 1500 < len(raw) <= pages.raw_size(16)
    assert pages.block(raw).k.tobytes() == k.tobytes()
    with pytest.raises(kvtc.UnsupportedError, match="the 1000 bytes"):  # not worse and worse
        page_codec(codec, max_bytes=1000).encode(k * 0 + 1, v * 30, positions=0)
    k[0, 0, :8, 0] = 0
    k[0, 0, 0, 0] = np.inf  # one verbatim token: the others become coarser
    page = pages.encode(k, v, positions=0)
    assert len(page) <= 1500
    assert np.isposinf(pages.block(page).k[0, 0, 0, 0])
    paper = kvtc.Codec(codec.calibration, "paper", ratio=8, block_tokens=16)
    fixed = page_codec(paper, max_bytes=800)
    assert len(fixed.encode(*cache_part(cache), positions=0)) <= 800
    with pytest.raises(kvtc.UnsupportedError, match="the 300 bytes"):
        page_codec(paper, max_bytes=300).encode(*cache_part(cache), positions=0)


def cache_part(cache: Cache) -> Cache:
    return cache[0][:, :, :16], cache[1][:, :, :16]


def test_arguments(codec: kvtc.Codec, cache: Cache) -> None:
    pages = page_codec(codec)
    k, v = cache_part(cache)
    with pytest.raises(TypeError, match="k is float16, expected float32"):
        pages.encode(k.astype(np.float16), v, positions=0)
    with pytest.raises(ValueError, match="1 to 16 tokens, found 200"):
        pages.encode(*cache, positions=0)
    with pytest.raises(ValueError, match="1 to 16 tokens, found 0"):
        pages.encode(k[:, :, :0], v[:, :, :0], positions=0)
    with pytest.raises(ValueError, match="k has 16 tokens, v has 15"):
        pages.encode(k, v[:, :, 1:], positions=0)
    with pytest.raises(ValueError, match="dtype must be one of"):
        kvtc.PageCodec(codec, dtype="int8")
    with pytest.raises(ValueError, match="section must be from 0 to 0"):
        page_codec(codec, section=1)
    with pytest.raises(ValueError, match="no fixed size allows"):
        page_codec(replace(codec, error_bound=0.1), max_bytes=99)
    with pytest.raises(TypeError, match="are for fp8 caches"):
        page_codec(codec, k_scale=2.0)


@pytest.fixture(scope="module")
def page(codec: kvtc.Codec, cache: Cache) -> bytes:
    return page_codec(codec).encode(cache[0][:, :, :3], cache[1][:, :, :3], positions=7)


def test_every_flipped_bit_and_missing_end(codec: kvtc.Codec, page: bytes) -> None:
    pages = page_codec(codec)
    for i in range(len(page)):
        for bit in range(8):
            data = bytearray(page)
            data[i] ^= 1 << bit
            with pytest.raises((kvtc.FormatError, kvtc.CalibrationMismatchError)):
                pages.block(data)
        with pytest.raises(kvtc.FormatError):
            pages.block(page[:i])


def test_limits_hold_for_pages(codec: kvtc.Codec, page: bytes) -> None:
    pages = page_codec(codec, limits=kvtc.Limits(max_record_bytes=100))
    for read in (pages.block, pages.layers):
        with pytest.raises(kvtc.LimitError, match="max_record_bytes"):
            read(page)


def test_the_table_of_the_specification(codec: kvtc.Codec, page: bytes) -> None:
    found = values("23. Page", page, 0)
    assert found["magic"] == PAGE_MAGIC
    assert found["section"] == 0
    end = 72 + found["payload length"]
    assert end + 8 == len(page)
    assert found["header checksum"] == xxhash.xxh3_64_intdigest(page[:64])
    (own,) = struct.unpack_from("<Q", page, end)
    assert own == xxhash.xxh3_64_intdigest(page[72:end], found["header checksum"])


@pytest.mark.parametrize(
    ("offset", "layout", "value", "kind", "message"),
    [
        (0, "B", 0, kvtc.FormatError, "this is no page"),
        (8, "H", 2, kvtc.VersionError, r"page, version at byte 8 is 2\.0"),
        (12, "I", 1, kvtc.VersionError, "required features at byte 12 are 0x1, but"),
        (12, "I", 4, kvtc.VersionError, "and not ROTARY_TABLES"),
        (10, "HI", (1, 1), kvtc.FormatError, "features are 0x1, its block needs 0x0"),
        (10, "HI", (1, 2), kvtc.FormatError, "features are 0x2, its block needs 0x0"),
        (16, "B", 0, kvtc.CalibrationMismatchError, "made under header 00"),
        (48, "H", 1, kvtc.FormatError, "section 1 of 1"),
        (50, "H", 1, kvtc.FormatError, "reserved 1"),
        (52, "I", 2, kvtc.VersionError, "checksum algorithm 2"),
        (56, "Q", 1 << 40, kvtc.LimitError, "max_record_bytes"),
        (56, "Q", 1 << 20, kvtc.TruncatedError, "expected 1048656"),
        (72 + 8, "Q", 1, kvtc.FormatError, "starts at 1"),
        (72 + 72, "I", 1, kvtc.FormatError, r"lacks \(1, 0\) tokens"),
    ],
)
def test_a_page_at_fault(
    codec: kvtc.Codec, page: bytes, offset: int, layout: str, value: int, kind: Any, message: str
) -> None:
    data = bytearray(page)
    struct.pack_into("<" + layout, data, offset, *np.atleast_1d(value))
    own = xxhash.xxh3_64_intdigest(bytes(data[:64]))
    struct.pack_into("<Q", data, 64, own)
    struct.pack_into("<Q", data, len(data) - 8, xxhash.xxh3_64_intdigest(bytes(data[72:-8]), own))
    with pytest.raises(kind, match=message):
        page_codec(codec).decode(data)


def test_sealed_pages(codec: kvtc.Codec, cache: Cache, page: bytes) -> None:
    """A seal names a page: no other key, no other page, no page without one."""
    k, v = cache[0][:, :, :3], cache[1][:, :, :3]
    sealed = page_codec(codec, key=b"secret")
    for encode in (sealed.encode, sealed.encode_raw):
        own = encode(k, v, positions=7, identity=b"one")
        assert len(own) <= sealed.raw_size(3)
        for found in (own, own + b"padding of a slot"):
            a, _ = sealed.decode(found, identity=b"one")
            assert a.shape == k.shape
        page_codec(codec).decode(own)  # without a key the seal is left alone
        assert len(list(sealed.layers(own, identity=b"one"))) == 2
        for reader, identity in (
            (sealed, b"two"),
            (sealed, None),
            (page_codec(codec, key=b"other"), b"one"),
        ):
            with pytest.raises(kvtc.AuthenticationError, match="another key or as another page"):
                reader.decode(own, identity=identity)
            with pytest.raises(kvtc.AuthenticationError):
                reader.layers(own, identity=identity)
        for i in range(0, len(own), 3):
            data = bytearray(own)
            data[i] ^= 1
            with pytest.raises(kvtc.KVTCError):
                sealed.decode(data, identity=b"one")
            with pytest.raises(kvtc.FormatError):
                sealed.decode(own[:i], identity=b"one")
    with pytest.raises(kvtc.AuthenticationError, match="it is not sealed"):
        sealed.decode(page, identity=b"one")
    with pytest.raises(ValueError, match="identity is sealed with a key"):
        page_codec(codec).encode(k, v, positions=7, identity=b"one")
    small = page_codec(codec, key=b"secret", max_bytes=1000)
    fitted = small.encode(*cache_part(cache), positions=0, identity=b"one")
    assert 900 < len(fitted) <= 1000


def test_a_page_of_another_codec(codec: kvtc.Codec, page: bytes) -> None:
    for other in (
        kvtc.PageCodec(codec, dtype="float16"),
        page_codec(replace(codec, ratio=8)),
        page_codec(codec, rope=kvtc.Rope.from_theta(5e5, 8)),
    ):
        with pytest.raises(kvtc.CalibrationMismatchError, match="use the codec that made it"):
            other.block(page)


def test_many_pages_are_those_of_one_call_each() -> None:
    calibration = kvtc.testing.tiny_calibration()
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 32)
    codec = kvtc.Codec(calibration, ratio=4, block_tokens=8, backend="cpu")
    for options in ({}, {"max_bytes": 900}):
        pages = kvtc.PageCodec(codec, dtype="float32", key=b"secret", **options)
        positions, names = [16, 0, 96, 8], [b"a", b"b", b"c", b"d"]
        parts = [slice(i, i + 8) for i in range(0, 32, 8)]
        assert pages.encode_many(k, v, positions=positions, identities=names) == [
            pages.encode(k[:, :, own], v[:, :, own], positions=first, identity=name)
            for own, first, name in zip(parts, positions, names, strict=True)
        ]
        with pytest.raises(ValueError, match="3 pages of 8 tokens have 24, found 32"):
            pages.encode_many(k, v, positions=positions[:3])
