"""Byte coders and byte planes."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
import zlib

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvtc_stream.errors import FormatError
from kvtc_stream.formats import Coder, compress, decompress
from kvtc_stream.formats.coders import BYTE_CODERS, compress_beside

BYTES = BYTE_CODERS
CODED = [c for c in BYTES if c is not Coder.STORED]
SKEWED = bytes(random.Random(1).choices(range(256), [2 ** -(i % 9) for i in range(256)], k=5000))


@pytest.mark.parametrize("coder", BYTES)
@given(st.binary(max_size=200), st.integers(1, 40))
def test_round_trip(coder, piece, repeats):
    data = piece * repeats
    used, coded = compress(coder, data)
    assert used in (coder, Coder.STORED)
    assert len(coded) < len(data) or (used is Coder.STORED and coded == data)
    assert decompress(used, coded, len(data)) == data


@pytest.mark.parametrize("coder", CODED)
def test_noise_is_stored(coder):
    noise = random.Random(0).randbytes(1000)
    assert compress(coder, noise) == (Coder.STORED, noise)
    assert compress(coder, b"") == (Coder.STORED, b"")


@pytest.mark.parametrize(
    ("coder", "size", "expected"),
    [
        (Coder.RANS, 1 << 17, Coder.DEFLATE),
        (Coder.RANS, 1 << 18, Coder.ZSTD),
        *((coder, 1 << 18, coder) for coder in CODED),
    ],
)
def test_bytes_beside_another_coder(coder, size, expected):
    data = (SKEWED * (size // len(SKEWED) + 1))[:size]
    used, coded = compress_beside(coder, data[: size // 2], b"", data[size // 2 :])
    assert used is expected
    assert decompress(used, coded, size) == data
    assert compress_beside(coder) == (Coder.STORED, b"")


def test_what_is_written_is_the_public_format():
    data = SKEWED + bytes(3000)
    assert zlib.decompress(compress(Coder.DEFLATE, data)[1], -15) == data
    assert zstandard.decompress(compress(Coder.ZSTD, data)[1]) == data
    assert lz4.block.decompress(compress(Coder.LZ4, data)[1], uncompressed_size=len(data)) == data


def test_what_others_write_is_read():
    data = SKEWED * 2
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert decompress(Coder.DEFLATE, deflate.compress(data) + deflate.flush(), len(data)) == data
    coded = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(data)
    assert decompress(Coder.ZSTD, coded, len(data)) == data
    coded = lz4.block.compress(data, mode="high_compression", store_size=False)
    assert decompress(Coder.LZ4, coded, len(data)) == data


def test_deflate_gains_what_the_statistics_offer():
    """Two-bit symbols with probabilities 0.6, 0.24, 0.096, 0.064 have 1.5 bits each."""
    random_state = random.Random(2)
    symbols = random_state.choices(range(4), (0.6, 0.24, 0.096, 0.064), k=200_000)
    packed = bytes(
        a | b << 2 | c << 4 | d << 6
        for a, b, c, d in zip(*(symbols[i::4] for i in range(4)), strict=True)
    )
    _, coded = compress(Coder.DEFLATE, packed)
    assert 0.75 <= len(coded) / len(packed) <= 0.78


@pytest.mark.parametrize("coder", BYTES)
def test_any_other_size_is_an_error(coder):
    data = SKEWED + bytes(3000)
    used, coded = compress(coder, data)
    assert used is coder
    for size in (0, 1, len(data) - 1, len(data) + 1, 2 * len(data), 1 << 26):
        with pytest.raises(FormatError, match=r"corrupt"):
            decompress(coder, coded, size)


@pytest.mark.parametrize("coder", BYTES)
def test_missing_and_added_bytes_are_errors(coder):
    data = SKEWED + bytes(3000)
    coded = compress(coder, data)[1]
    for wrong in (b"", coded[:-1], coded[:-4], coded[: len(coded) // 2], coded + b"\0"):
        with pytest.raises(FormatError, match=coder.name):
            decompress(coder, wrong, len(data))


@pytest.mark.parametrize("coder", CODED)
@given(st.data())
def test_damage_is_an_error_or_data_of_the_right_size(coder, data):
    coded = bytearray(compress(coder, SKEWED + bytes(300))[1])
    size = len(SKEWED) + 300
    for _ in range(data.draw(st.integers(1, 4))):
        coded[data.draw(st.integers(0, len(coded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        assert len(decompress(coder, bytes(coded), size)) == size


@pytest.mark.parametrize("coder", CODED)
@given(st.binary(max_size=99), st.integers(0, 999))
def test_random_bytes(coder, coded, size):
    with contextlib.suppress(FormatError):
        assert len(decompress(coder, coded, size)) == size


@pytest.mark.parametrize("coder", CODED)
def test_a_bomb_takes_no_memory(coder):
    _, bomb = compress(coder, bytes(1 << 26))
    tracemalloc.start()
    with pytest.raises(FormatError):
        decompress(coder, bomb, 1 << 20)
    with pytest.raises(FormatError):
        decompress(coder, bomb[:1000], 1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 20


def test_a_frame_that_lies_about_its_size():
    coded = bytearray(compress(Coder.ZSTD, bytes(70_000))[1])
    place = coded.index(struct.pack("<I", 70_000))
    coded[place : place + 4] = struct.pack("<I", 1 << 30)
    for size in (70_000, 1 << 30):
        with pytest.raises(FormatError, match="corrupt"):
            decompress(Coder.ZSTD, bytes(coded), size)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(99))
    with pytest.raises(FormatError, match="frame claims"):
        decompress(Coder.ZSTD, unsized, 99)


@pytest.mark.parametrize("coder", BYTES)
def test_segments_decode_to_their_concatenation(coder: Coder) -> None:
    segments = [bytes(3000), b"", b"ab" * 800, b"x"]
    used, coded = compress(coder, *segments)
    assert used is coder
    assert decompress(used, coded, 4601) == b"".join(segments)
