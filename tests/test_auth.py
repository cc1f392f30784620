"""Streams that were written with a key."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from formats_samples import records, reseal
from numpy.typing import NDArray

import kvtc_stream as kvtc
from kvtc_stream.formats import StreamFile, StreamWriter

KEY = b"a secret of some length"
pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")


@pytest.fixture(scope="module")
def signed(codec: kvtc.Codec) -> bytes:
    cache = kvtc.testing.drawn_cache(codec.calibration.geometry, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is short
        return kvtc.encode(*cache, codec, key=KEY)


def read(data: bytes, codec: kvtc.Codec, key: bytes = KEY) -> NDArray[Any]:
    with kvtc.open(io.BytesIO(data), calibration=codec.calibration, key=key) as reader:
        return np.asarray(reader.read()[0])


def test_with_and_without_the_key(codec: kvtc.Codec, signed: bytes, stream: bytes) -> None:
    np.testing.assert_array_equal(read(signed, codec), read(signed, codec, b""))
    with pytest.raises(kvtc.AuthenticationError, match="not made with this key"):
        read(signed, codec, b"another")
    with pytest.raises(kvtc.AuthenticationError, match="written without a key"):
        read(stream, codec)
    assert sum(b.tokens for b in kvtc.Decoder(codec.calibration).decode(signed)) == 60


def test_what_cannot_be_authenticated(codec: kvtc.Codec, signed: bytes) -> None:
    with pytest.raises(kvtc.UnsupportedError, match="recover without key"):
        kvtc.open(signed, calibration=codec.calibration, recover=True, key=KEY)

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    with pytest.raises(kvtc.UnsupportedError, match="only the end of a stream tells"):
        kvtc.open(Pipe(signed), calibration=codec.calibration, key=KEY)


def test_every_byte_is_authenticated(codec: kvtc.Codec, signed: bytes) -> None:
    """Changed by who makes all checksums right: an error, whatever it is, and no other values."""
    expected = read(signed, codec)
    forged = 0
    skip = {*range(24, 40)} | {o + i for o in records(signed) for i in range(16, 32)}
    for at in range(40, len(signed) - 40, 7):
        if at in skip:
            continue
        data = bytearray(signed)
        data[at] ^= 1
        try:
            changed = reseal(data)
        except Exception:
            continue
        try:
            found = read(changed, codec)
        except kvtc.AuthenticationError:
            forged += 1
        except kvtc.KVTCError:
            pass
        else:  # the record for encoders, which readers do not look at
            np.testing.assert_array_equal(found, expected)
    assert forged > 100


def test_blocks_of_another_stream_with_the_same_key(codec: kvtc.Codec, signed: bytes) -> None:
    """An index and blocks that fit each other, but not what was authenticated."""
    other = kvtc.encode(*kvtc.testing.drawn_cache(codec.calibration.geometry, 60, seed=9), codec)
    file, second = StreamFile(io.BytesIO(signed)), StreamFile(io.BytesIO(other))
    writer = StreamWriter(file.header)
    out = writer.start()
    for a, b in zip(file.index, second.index, strict=True):
        out += writer.block((second if a.start > 30 else file).read_block(b if a.start > 30 else a))
    auth = file.records[-2]
    record, data = file._read_record(auth)
    out += writer.user(record.open(data, auth.offset)) + writer.finish()
    changed = bytearray(out)
    at = records(out)
    changed[at[-2] + 4] = changed[at[-1] + 32 + 4 + 88 * (len(at) - 2) + 16] = 66
    with pytest.raises(kvtc.AuthenticationError):
        read(reseal(changed), codec)


def test_appending_and_editing_keep_it(codec: kvtc.Codec, signed: bytes) -> None:
    file = io.BytesIO(signed)
    k, v = kvtc.testing.drawn_cache(codec.calibration.geometry, 90)
    for key, message in ((b"", None), (b"wrong", "not made with this key")):
        if message:
            with pytest.raises(kvtc.AuthenticationError, match=message):
                kvtc.open(file, "ab", codec=codec, key=key)
    for start in (60, 75):
        with kvtc.open(file, "ab", codec=codec, key=KEY) as writer:
            writer.write(k[:, :, start : start + 15], v[:, :, start : start + 15])
    assert read(file.getvalue(), codec).shape[2] == 90
    out = io.BytesIO()
    kvtc.cut(file, out, tokens=slice(33), key=KEY)
    assert read(out.getvalue(), codec).shape[2] == 33
    with kvtc.open(file, "ab", codec=codec) as writer:  # without: it has no key any more
        writer.write(k[:, :, :1], v[:, :, :1])
    with pytest.raises(kvtc.AuthenticationError, match="written without a key"):
        read(file.getvalue(), codec)
