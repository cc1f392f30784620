"""Pages that are checked many at a time: what one page gives, or raises, by itself."""

from __future__ import annotations

import hmac
import random
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xxhash
from test_formats_table import check_columns

import kvtc_stream as kvtc
from kvtc_stream.coding import page_sums
from kvtc_stream.formats import Block, BlockTable
from kvtc_stream.formats.page import seal_prefix

KEY, TOKENS = b"secret", 16
KINDS = ("coded", "exact", "mixed", "listed", "plain", "tiles", "short")
HEADER, FIELDS = 72, 80


def made(kind: str, *, key: bytes | None = KEY) -> tuple[kvtc.PageCodec, bytes]:
    """A page of some kind, sealed as ``b"name"``, and its codec."""
    calibration = kvtc.testing.tiny_calibration()
    dtype = kvtc.DType.BFLOAT16 if kind == "tiles" else kvtc.DType.FLOAT32
    k, v = kvtc.testing.drawn_cache(calibration.geometry, TOKENS, dtype=dtype)
    codec = kvtc.Codec(calibration, ratio=2, block_tokens=TOKENS, backend="cpu")
    if kind == "plain":
        codec = replace(codec, measure=False)
    pages = kvtc.PageCodec(codec, dtype=dtype.label, key=key)
    positions: Any = 1024
    if kind == "mixed":
        k[0, 0, 5, 0] = np.nan
    if kind == "listed":
        positions = np.arange(TOKENS) * 2
    if kind == "short":
        k, v, positions = k[:, :, :1], v[:, :, :1], 7
    encode = pages.encode_raw if kind in ("exact", "tiles") else pages.encode
    return pages, encode(k, v, positions=positions, identity=None if key is None else b"name")


def resealed(page: bytearray, key: bytes | None) -> bytes:
    """The same lies behind right checksums and a right seal."""
    end = len(page) - 8 - (0 if key is None else 32)
    own = xxhash.xxh3_64_intdigest(bytes(page[:64]))
    struct.pack_into("<Q", page, 64, own)
    struct.pack_into("<Q", page, end, xxhash.xxh3_64_intdigest(bytes(page[HEADER:end]), own))
    if key is not None:
        message = seal_prefix(b"name") + bytes(page[: end + 8])
        page[end + 8 :] = hmac.digest(key, message, "sha256")
    return bytes(page)


def alone(pages: kvtc.PageCodec, page: Any, identity: bytes | None) -> Block | tuple[type, str]:
    try:
        return pages.checked(page, identity=identity)
    except kvtc.KVTCError as error:
        return type(error), str(error)


def together(pages: kvtc.PageCodec, page: Any, identity: bytes | None) -> Block | tuple[type, str]:
    names = None if identity is None else [identity]
    table, error = pages.checked_many([page], identities=names)
    if error is not None:
        assert not len(table)
        return type(error), str(error)
    check_columns(table, [table.block(0)])
    return table.block(0)


@pytest.mark.parametrize("key", [KEY, None], ids=["sealed", "open"])
@pytest.mark.parametrize("kind", KINDS)
def test_lies_and_damage_are_told_as_of_one_page(kind: str, key: bytes | None) -> None:
    """Every byte of header and fields behind right sums, others here and there, and without."""
    pages, page = made(kind, key=key)
    name = None if key is None else b"name"
    assert isinstance(together(pages, page, name), Block)
    assert together(pages, page, name) == alone(pages, page, name)
    rng = random.Random(kind)
    places = list(range(min(HEADER + FIELDS + 70, len(page) - 40)))
    places += [rng.randrange(len(page)) for _ in range(20)]
    for at in places:
        changed = bytearray(page)
        changed[at] = rng.choice((0, 1, 2, 255, (page[at] + 1) % 256))
        for data in (bytes(changed), resealed(changed, key)):
            assert together(pages, data, name) == alone(pages, data, name), at
    for size in (0, 1, 8, 63, 64, 71, 72, 100, 152, len(page) - 33, len(page) - 1):
        assert together(pages, page[:size], name) == alone(pages, page[:size], name)
    assert together(pages, page + b"padding of a slot", name) == alone(pages, page, name)


def test_a_seal_that_is_right_excuses_no_checksum_and_no_checksum_a_seal() -> None:
    pages, page = made("coded")
    wrong = bytearray(page)
    wrong[-40] ^= 1
    wrong[-32:] = hmac.digest(KEY, seal_prefix(b"name") + bytes(wrong[:-32]), "sha256")
    assert together(pages, bytes(wrong), b"name") == alone(pages, bytes(wrong), b"name")
    _, error = pages.checked_many([bytes(wrong)], identities=[b"name"])
    assert isinstance(error, kvtc.ChecksumError)
    for data, name in ((page, b"another"), (page[:-1] + bytes([page[-1] ^ 1]), b"name")):
        _, error = pages.checked_many([data], identities=[name])
        assert isinstance(error, kvtc.AuthenticationError)
    _, unsealed = made("coded", key=None)
    _, error = pages.checked_many([unsealed], identities=[b"name"])
    assert isinstance(error, kvtc.AuthenticationError)
    others, _ = made("plain")
    _, error = others.checked_many([made("tiles")[1]], identities=[b"name"])
    assert isinstance(error, kvtc.CalibrationMismatchError)


@pytest.mark.parametrize("library", [True, False], ids=["with libcrypto", "without"])
def test_the_first_page_that_is_bad_ends_the_table(
    monkeypatch: pytest.MonkeyPatch, library: bool
) -> None:
    if not library:
        monkeypatch.setattr(page_sums, "_library", lambda: None)
    own = [made(kind) for kind in ("coded", "mixed", "listed", "exact")]
    pages = own[0][0]
    data: list[Any] = [page for _, page in own]
    data[1], data[2] = bytearray(data[1]), memoryview(data[2] + b"padding")
    names = [b"name"] * len(data)
    table, error = pages.checked_many(data, identities=names)
    assert error is None
    blocks = [pages.checked(page, identity=b"name") for page in data]
    check_columns(table, blocks)
    data[1][:] = bytes(len(data[1]))  # what was checked is a copy
    assert [table.block(i) for i in range(4)] == blocks
    assert set(table.special) == {1, 2}
    data[1][:] = own[1][1]
    for bad in range(4):
        names[bad] = b"another"
        table, error = pages.checked_many(data, identities=names)
        assert isinstance(error, kvtc.AuthenticationError)
        assert len(table) == bad
        check_columns(table, blocks[:bad]) if bad else None
        names[bad] = b"name"
    table, error = pages.checked_many([], identities=[])
    assert (len(table), error) == (0, None)
    with pytest.raises(ValueError, match="4 pages need as many identities, found 1"):
        pages.checked_many(data, identities=names[:1])


def test_usual_pages_are_parsed_as_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing would be gained."""
    for kind in ("coded", "exact", "plain", "tiles", "short"):
        pages, page = made(kind)
        with monkeypatch.context() as patch:
            patch.setattr(kvtc.PageCodec, "_unpack", None)
            table, error = pages.checked_many([page] * 2, identities=[b"name"] * 2)
        assert error is None
        assert len(table) == 2


def test_tokens_go_where_arrays_have_room_for_them() -> None:
    """In any layout; and to nowhere else."""
    pages, page = made("mixed")
    expected = pages.decode(page, identity=b"name")
    blocks, slots = [pages.checked(page, identity=b"name")], [np.arange(TOKENS) + 3]
    shape, room = (2, 2, TOKENS + 5, 8), slice(3, TOKENS + 3)
    layouts = {
        "plain": np.zeros(shape, np.float32),
        "strided": np.zeros((*shape, 2), np.float32)[..., 0],
        "reversed": np.zeros(shape, np.float32)[::-1, :, ::-1],
        "transposed": np.zeros(shape[::-1], np.float32).T,
    }
    for k in layouts.values():
        v = np.zeros(shape, np.float32)
        pages.decode_into(blocks, slots, k, list(v))
        for found, own in zip((k, v), expected, strict=True):
            np.testing.assert_array_equal(found[:, :, room], own)
            assert not found[:, :, :3].any()
            assert not found[:, :, TOKENS + 3 :].any()
    k, v = (np.zeros(shape, np.float32) for _ in "kv")
    frozen = k.copy()
    frozen.flags.writeable = False
    for own_slots, own_k, error, message in (
        (slots[0][1:], k, ValueError, "which take slots from -1 to"),
        (slots[0] + 3, k, ValueError, f"found {TOKENS} from 6 to {TOKENS + 5}"),
        (slots[0] - 5, k, ValueError, f"found {TOKENS} from -2"),
        (slots[0], k.astype(np.float16), TypeError, "k: found float16, decoding gives float32"),
        (slots[0], k[:, :1], ValueError, "kv_heads"),
        (slots[0], k[:1], ValueError, "layers"),
        (slots[0], frozen, BufferError, "k cannot be written"),
    ):
        with pytest.raises(error, match=message):
            pages.decode_into(blocks, [own_slots], own_k, v)
    assert not v.any()


def test_decoding_from_a_table_is_decoding() -> None:
    pages, page = made("mixed")
    k, v = pages.decode(page, identity=b"name")
    table, _ = pages.checked_many([page, page], identities=[b"name"] * 2)
    backend = pages._backend
    outs = []
    for blocks in (table, [pages.checked(page, identity=b"name")] * 2, BlockTable.concat([table])):
        own = [np.zeros((2, 2 * TOKENS, 2, 8), np.float32) for _ in range(2)]
        pools = [backend.pool([layer[:, None] for layer in x]) for x in own]
        slots = [np.arange(TOKENS), np.arange(TOKENS) + TOKENS]
        pages.decode_into(blocks, slots, *pools)
        outs.append(own)
    for own_k, own_v in outs:
        for found, expected in ((own_k, k), (own_v, v)):
            twice = np.concatenate([np.asarray(expected)] * 2, axis=2)
            np.testing.assert_array_equal(found.transpose(0, 2, 1, 3), twice)
