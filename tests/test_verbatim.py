"""Verbatim bfloat16 values in tiles: what comes back, and what no encoder writes."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_sample import load_real_sample

import kvtc_stream as kvtc
from kvtc_stream.coding import verbatim
from kvtc_stream.coding.values import code_verbatim, verbatim_planes
from kvtc_stream.errors import FormatError, KVTCError
from kvtc_stream.formats import (
    Block,
    Coder,
    Feature,
    Role,
    StreamFile,
    StreamHeader,
    StreamWriter,
    compress,
)
from kvtc_stream.formats.coders import LARGE

Values = npt.NDArray[np.uint16]
Payload = npt.NDArray[np.uint8]


def drawn(n: int, seed: int, spread: float = 1.0) -> Values:
    """Bits of values of a few scales; some are 0, infinite or no numbers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * np.exp(spread * rng.standard_normal(n))
    with np.errstate(over="ignore"):
        bits = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    odd = rng.random(n) < 0.01
    bits[odd] = rng.integers(0, 1 << 16, np.count_nonzero(odd))
    return bits


def damaged(payload: Payload, rng: np.random.Generator) -> Payload:
    """With a few bits changed, mostly those of heads and digits."""
    payload = payload.copy()
    for _ in range(rng.integers(1, 4)):
        end = int(rng.choice([verbatim.HEAD, len(payload) // 3, len(payload)]))
        payload[rng.integers(end)] ^= 1 << rng.integers(8)
    return payload


@given(
    st.one_of(st.integers(0, 100), st.integers(0, 20_000)),
    st.integers(0, 99),
    st.sampled_from([0.0, 1.0, 20.0]),
)
def test_values_come_back(n: int, seed: int, spread: float) -> None:
    values = drawn(n, seed, spread)
    np.testing.assert_array_equal(verbatim.decode(verbatim.encode(values), n), values)


@given(st.lists(st.integers(0, (1 << 16) - 1), max_size=200))
def test_any_bits_come_back(bits: list[int]) -> None:
    values = np.array(bits, np.uint16)
    np.testing.assert_array_equal(verbatim.decode(verbatim.encode(values), len(bits)), values)


@given(st.integers(1, 9_000), st.integers(0, 999))
def test_damage_is_refused_or_has_one_encoding(n: int, seed: int) -> None:
    """Whatever decodes is what an encoder with that table writes."""
    rng = np.random.default_rng(seed)
    payload = damaged(verbatim.encode(drawn(n, seed)), rng)
    payload = payload[: len(payload) - int(rng.integers(3) == 0)]
    try:
        values = verbatim.decode(payload, n)
    except FormatError:
        return
    heads = payload[: -(-n // verbatim.TILE) * verbatim.HEAD].reshape(-1, verbatim.HEAD)
    assert written(values, heads) == payload.tobytes()


def written(values: Values, heads: Payload) -> bytes:
    """The payload with given tables, as SPEC describes it."""
    out, digits, others = b"", b"", b""
    for i, head in enumerate(heads):
        exponents = [int(x) >> 7 & 255 for x in values[i * 8192 : i * 8192 + 8192]]
        table = head[6:15].tolist()
        counts = []
        for level in range(3):
            own = table[3 * level : 3 * level + 3]
            codes = [own.index(e) if e in own else 3 for e in exponents]
            for j in range(0, len(codes), 32):
                for bit in (0, 1):
                    word = sum((c >> bit & 1) << k for k, c in enumerate(codes[j : j + 32]))
                    digits += word.to_bytes(4, "little")
            exponents = [e for e in exponents if e not in own]
            counts.append(len(exponents))
        others += bytes(exponents)
        out += b"".join(n.to_bytes(2, "little") for n in counts) + bytes(table) + b"\0"
    rest = bytes((int(x) & 127) | (int(x) >> 8 & 128) for x in values)
    return out + digits + rest + others


@pytest.mark.parametrize("n", [0, 1, 33, 8192, 8200])
def test_bytes_are_those_of_the_specification(n: int) -> None:
    values = drawn(n, seed=n)
    payload = verbatim.encode(values)
    heads = payload[: -(-n // verbatim.TILE) * verbatim.HEAD].reshape(-1, verbatim.HEAD)
    assert payload.tobytes() == written(values, heads)


def test_the_example_of_the_specification() -> None:
    values = np.array([0x3F80, 0x3F00, 0x3F40, 0x3F40], np.uint16)
    head = "00 00 00 00 00 00 7e 7f 00 01 02 03 04 05 06 00"
    payload = bytes.fromhex(f"{head} 01 00 00 00 00 00 00 00 00 00 40 40")
    assert verbatim.encode(values).tobytes() == payload


def test_a_table_has_the_most_frequent_first() -> None:
    values = np.array([0x4000, 0x3F80, 0x3F80, 0x3F00, 0x3F00], np.uint16)
    assert verbatim.encode(values)[6:15].tolist() == [126, 127, 128, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (0, 255, "head"),  # more go on than there are
        (6, 127, "head"),  # twice in the table
        (15, 1, "head"),
        (0, 1, "expected"),  # another length
        (19, 0x80, "beyond the last value"),
        (16, 0xFF, "go on"),
    ],
)
def test_lies(at: int, value: int, match: str) -> None:
    values = np.array([0x4000, 0x3F80, 0x3F80, 0x3F00, 0x3F00] * 6, np.uint16)
    payload = verbatim.encode(values)
    payload[at] = value
    with pytest.raises(FormatError, match=match):
        verbatim.decode(payload, len(values))


def test_an_exponent_that_the_table_has_is_not_spelt_out() -> None:
    values = np.arange(12, dtype=np.uint16) << 7
    payload = verbatim.encode(values)
    assert payload[-3:].tolist() == [9, 10, 11]
    payload[-1] = 3
    with pytest.raises(FormatError, match="the table has"):
        verbatim.decode(payload, len(values))


def test_payloads_may_lie_anywhere() -> None:
    values = drawn(100, seed=0)
    payload = b"\0" + verbatim.encode(values).tobytes()
    np.testing.assert_array_equal(verbatim.decode(memoryview(payload)[1:], 100), values)


def test_smaller_than_zstandard_on_a_real_cache() -> None:
    sample = load_real_sample()
    k, v = (x[:, :, 192:320] for x in (sample.k, sample.v))
    bits = np.concatenate([x.reshape(-1).view(np.uint16) for x in (k, v)])
    size = verbatim.encode(bits).size
    assert size < len(compress(Coder.ZSTD, *verbatim_planes(k, v))[1])
    assert size < 0.688 * bits.nbytes


# --- in streams ---------------------------------------------------------------------------------


#: Of the streams here: more than 256 KiB are verbatim in one block.
TOKENS, BLOCK = 2300, 2048
CODEC: dict[str, Any] = {"ratio": 8, "window": BLOCK, "block_tokens": BLOCK}


def large(dtype: kvtc.DType = kvtc.DType.BFLOAT16) -> tuple[kvtc.Calibration, bytes]:
    """A stream whose tail is large enough."""
    calibration = kvtc.testing.tiny_calibration()
    k, v = kvtc.testing.drawn_cache(calibration.geometry, TOKENS, seed=2, dtype=dtype)
    with pytest.warns(kvtc.KVTCWarning, match="verbatim"):
        return calibration, kvtc.encode(k, v, kvtc.Codec(calibration, **CODEC))


def stored(data: bytes) -> tuple[StreamHeader, list[Block]]:
    """A stream's header and blocks."""
    file = StreamFile(io.BytesIO(data))
    return file.header, [file.read_block(entry) for entry in file.index]


@pytest.fixture(scope="module")
def stream() -> tuple[kvtc.Calibration, bytes]:
    return large()


def test_large_tails_are_coded_so(stream: tuple[kvtc.Calibration, bytes]) -> None:
    calibration, data = stream
    header, blocks = stored(data)
    assert Feature.PLANES in header.features
    assert [(b.role, b.tokens, b.verbatim_coder) for b in blocks] == [
        (Role.SINKS, 4, Coder.DEFLATE),
        (Role.TAIL, BLOCK, Coder.PLANES),
        (Role.TAIL, TOKENS - 4 - BLOCK, Coder.DEFLATE),
    ]
    original = kvtc.testing.drawn_cache(
        calibration.geometry, TOKENS, seed=2, dtype=kvtc.DType.BFLOAT16
    )
    for x, y in zip(original, kvtc.decode(data, calibration), strict=True):
        np.testing.assert_array_equal(x.view(np.uint16), np.asarray(y).view(np.uint16))


def test_other_types_have_byte_coders() -> None:
    _, data = large(kvtc.DType.FLOAT16)
    header, blocks = stored(data)
    assert Feature.PLANES not in header.features
    assert blocks[1].verbatim_coder is Coder.ZSTD


def test_what_it_would_not_shrink_has_a_byte_coder(stream: tuple[kvtc.Calibration, bytes]) -> None:
    header, _ = stored(stream[1])
    rng = np.random.default_rng(0)
    shape = (8, 4, LARGE // 2048, 32)
    k, v = (rng.integers(0, 1 << 16, shape, np.uint16).view(ml_dtypes.bfloat16) for _ in range(2))
    assert code_verbatim(header, k, v)[0] is Coder.STORED
    assert code_verbatim(header, *(np.ones_like(x) for x in (k, v)))[0] is Coder.PLANES


def test_damaged_tails_are_refused(stream: tuple[kvtc.Calibration, bytes]) -> None:
    """Under right checksums, as a faulty writer may write them."""
    calibration, data = stream
    header, blocks = stored(data)
    payload = bytearray(blocks[1].verbatim)
    payload[0] ^= 1
    writer = StreamWriter(header)
    changed = [blocks[0], replace(blocks[1], verbatim=bytes(payload)), blocks[2]]
    bad = writer.start() + b"".join(map(writer.block, changed)) + writer.finish()
    with pytest.raises(KVTCError, match="verbatim values"):
        kvtc.decode(bad, calibration)


def test_streams_without_the_feature_are_continued_without(
    stream: tuple[kvtc.Calibration, bytes],
) -> None:
    calibration, data = stream
    header, blocks = stored(data)
    old = replace(header, features=Feature.LAYER_ERRORS)
    writer = StreamWriter(old)
    with pytest.raises(ValueError, match="PLANES"):
        writer.block(replace(blocks[1], start=0))
    k, v = kvtc.testing.drawn_cache(calibration.geometry, TOKENS, seed=2, dtype=header.dtype)
    own = slice(4, 4 + BLOCK)
    coder, values = code_verbatim(old, k[:, :, own], v[:, :, own])
    assert coder is Coder.ZSTD
    writer = StreamWriter(old)
    tail = replace(blocks[1], verbatim_coder=coder, verbatim=values)
    data = writer.start() + b"".join(map(writer.block, [blocks[0], tail, blocks[2]]))
    file = io.BytesIO(data + writer.finish())
    with (
        pytest.warns(kvtc.KVTCWarning, match="verbatim"),
        kvtc.open(file, "ab", codec=kvtc.Codec(calibration, **CODEC)) as appender,
    ):
        appender.write(k[:, :, :1], v[:, :, :1])
    opened = StreamFile(file)
    assert opened.header.features == Feature.LAYER_ERRORS
    found = [opened.read_block(entry) for entry in opened.index]
    assert [b.verbatim_coder for b in found] == [Coder.DEFLATE, Coder.ZSTD, Coder.DEFLATE]
