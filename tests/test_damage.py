"""Damage to whole streams, through the decoder: an error, or the very same tokens; nothing else."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from damage import Cache, is_prefix, mutate, restore
from formats_samples import records, reseal

import kvtc_stream as kvtc
from kvtc_stream.formats import StreamFile

#: Mutations of each stream, by profile; ``benchmarks/damage.py`` does 100,000.
MUTATIONS = {"dev": 150, "ci": 400, "expensive": 20_000}[
    os.environ.get("HYPOTHESIS_PROFILE", "dev")
]

pytestmark = pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")


def coded(codec: kvtc.Codec, tokens: int, **options: Any) -> bytes:
    cache = kvtc.testing.drawn_cache(codec.calibration.geometry, tokens)
    return kvtc.encode(*cache, codec=codec, **options)


def continued(codec: kvtc.Codec) -> bytes:
    k, v = kvtc.testing.drawn_cache(codec.calibration.geometry, 60)
    file = io.BytesIO()
    for start in (0, 25, 50):
        with kvtc.open(file, "ab" if start else "wb", codec=codec) as writer:
            writer.write(k[:, :, start : start + 25], v[:, :, start : start + 25])
    return file.getvalue()


def shortened(codec: kvtc.Codec) -> bytes:
    out = io.BytesIO()
    kvtc.cut(io.BytesIO(coded(codec, 60)), out, tokens=slice(7, 41))
    return out.getvalue()


def paper(codec: kvtc.Codec, coder: str) -> bytes:
    changed = kvtc.Codec(
        codec.calibration, "paper", ratio=4, window=4, block_tokens=16, coder=coder
    )
    positions = np.arange(60) * 3
    return coded(changed, 60, positions=positions)


STREAMS: dict[str, Callable[[kvtc.Codec], bytes]] = {
    "default": lambda codec: coded(replace(codec, window=4), 60),
    "continued": lambda codec: continued(replace(codec, window=4)),
    "shortened": lambda codec: shortened(replace(codec, window=4)),
    "deflate": lambda codec: paper(codec, "deflate"),
    "zstd": lambda codec: paper(codec, "zstd"),
    "lz4": lambda codec: paper(codec, "lz4"),
    "stored": lambda codec: paper(codec, "stored"),
}


@pytest.fixture(scope="module", params=STREAMS)
def sample(request: pytest.FixtureRequest, codec: kvtc.Codec) -> tuple[bytes, list[Cache]]:
    data = STREAMS[request.param](codec)
    return data, restore(data, codec.calibration)


def test_mutations(sample: tuple[bytes, list[Cache]], codec: kvtc.Codec) -> None:
    """From a file, from a pipe, and in recovery, which may give less but nothing else."""
    data, expected = sample
    rng = random.Random(1)
    found = 0
    for i in range(MUTATIONS):
        changed = mutate(data, rng)
        try:
            way = {"pipe": i % 3 == 0, "whole": i % 3 == 1}
            assert restore(changed, codec.calibration, **way) == expected
        except kvtc.KVTCError:
            found += 1
        try:
            got = restore(changed, codec.calibration, recover=True)
            # A tail that would have been superseded is exact where its successor is coded.
            assert is_prefix(got, expected) or b"KVTEND" in data[:-8]
        except kvtc.KVTCError:
            pass
    assert found > MUTATIONS * 0.5


def test_nonsense_behind_right_checksums(
    sample: tuple[bytes, list[Cache]], codec: kvtc.Codec
) -> None:
    """As a writer at fault would make it: any tokens or a KVTCError, and nothing else."""
    data, _ = sample
    rng = random.Random(2)
    starts = records(data)
    opening = starts[0]
    refused = 0
    for _ in range(MUTATIONS):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            begin = rng.choice([40, *(s + 32 for s in starts)])
            end = opening if begin == 40 else len(data) - 48
            at = rng.randrange(begin, min(end, begin + rng.choice((96, 2000))))
            changed[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        if any(changed[s : s + 4] != b"KVTR" for s in starts) or any(
            changed[s + 16 : s + 24] != data[s + 16 : s + 24] for s in starts
        ):
            continue
        for way in ({}, {"pipe": True}, {"whole": True}):
            try:
                restore(reseal(changed), codec.calibration, **way)
            except kvtc.KVTCError:
                refused += 1
    assert refused > MUTATIONS * 0.3


def test_every_bit_and_every_length_of_a_small_stream() -> None:
    """One token of one layer, coded: 100 % of flipped bits and missing ends are found."""
    geometry = kvtc.Geometry.uniform(layers=1, kv_heads=1, head_dim=2)
    calibrator = kvtc.Calibrator(geometry)
    calibrator.update(*kvtc.testing.drawn_cache(geometry, 64))
    calibration = calibrator.finish()
    codec = kvtc.Codec(calibration, ratio=2, sinks=1, window=0, block_tokens=2)
    data = coded(codec, 3)
    expected = restore(data, calibration)
    assert len(expected[0].k) == 24
    # Readers of a file do not look at the record that is there for encoders.
    file = StreamFile(io.BytesIO(data))
    encoder = file.records[-2]
    unread = range(encoder.offset, encoder.offset + encoder.length)
    for i in range(len(data)):
        with pytest.raises(kvtc.FormatError):
            restore(data[:i], calibration)
        for bit in range(8):
            changed = bytearray(data)
            changed[i] ^= 1 << bit
            with pytest.raises((kvtc.FormatError, kvtc.CalibrationMismatchError)):
                restore(bytes(changed), calibration, pipe=True)
            if i in unread:
                assert restore(bytes(changed), calibration) == expected
                with pytest.raises(kvtc.FormatError):
                    kvtc.open(io.BytesIO(changed), "ab", codec=codec)
            else:
                with pytest.raises((kvtc.FormatError, kvtc.CalibrationMismatchError)):
                    restore(bytes(changed), calibration)
