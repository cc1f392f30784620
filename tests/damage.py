"""Ways to damage bytes, and what must come of them."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

import kvtc_stream as kvtc
from kvtc_stream.io.dlpack import BackendName


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes: bits, bytes, pieces lost, repeated, moved, cut off, added."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = len(out)
        at = rng.randrange(size) if size else 0
        length = min(rng.choice((1, 2, 4, 8, 32, 200)), size - at)
        match rng.randrange(8):
            case 0 if size:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + length] = rng.randbytes(length)
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = rng.randbytes(length)
            case 4:
                out[at:at] = out[at : at + length]
            case 5:
                del out[at:]
            case 6:
                other = rng.randrange(size + 1)
                piece = bytes(out[at : at + length])
                out[other : other + length] = piece
            case _:
                out[at : at + length] = bytes(length) if rng.random() < 0.5 else b"\xff" * length
    return bytes(out)


class Pipe(io.RawIOBase):
    """A file object that cannot seek."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self._data.readinto(buffer)


@dataclass(frozen=True)
class Cache:
    """Bits of a decoded section."""

    k: bytes
    v: bytes
    positions: bytes


def restore(
    data: bytes,
    calibration: kvtc.Calibration,
    *,
    pipe: bool = False,
    recover: bool = False,
    whole: bool = False,
    backend: BackendName = "cpu",
) -> list[Cache]:
    """What a reader gives, per section, block by block or the ``whole`` at once; raises what it
    raises."""
    file = Pipe(data) if pipe else io.BytesIO(data)
    with kvtc.open(file, calibration=calibration, recover=recover, backend=backend) as reader:
        sections = range(len(reader.header.geometry.sections))
        if whole:
            return [
                Cache(*map(tokens_first, reader.read(section=i)), reader.positions(i).tobytes())
                for i in sections
            ]
        blocks = list(reader)
    parts = [[b for b in blocks if b.section == i] for i in sections]
    return [
        Cache(
            b"".join(tokens_first(b.k) for b in own),
            b"".join(tokens_first(b.v) for b in own),
            b"".join(b.positions.tobytes() for b in own),
        )
        for own in parts
    ]


def tokens_first(x: Any) -> bytes:
    """Bytes of [layers, heads, tokens, dim], token by token."""
    if not isinstance(x, np.ndarray):  # on a device
        import torch

        x = torch.from_dlpack(x).cpu().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(np.moveaxis(x, 2, 0)).tobytes()


def is_prefix(part: list[Cache], whole: list[Cache]) -> bool:
    """Whether each section's tokens are the first of those in ``whole``."""
    return len(part) == len(whole) and all(
        b.k.startswith(a.k) and b.v.startswith(a.v) and b.positions.startswith(a.positions)
        for a, b in zip(part, whole, strict=True)
    )
