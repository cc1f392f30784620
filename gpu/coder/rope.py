"""Rotary tables of a section's layers, on the device."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from kvtc_stream.coding.rope import check_axes
from kvtc_stream.formats import Rope, Section
from kvtc_stream.gpu.kernels import layout


@dataclass(frozen=True)
class DeviceRotations:
    """Cosines and sines of some tokens, each float32 [rotations, tokens, max pairs]."""

    cosines: Any
    sines: Any
    tokens: int


#: Of the sections that were met last, by :func:`ropes_of`.
_KEPT = 16
_made: dict[Any, DeviceRopes] = {}
_lock = threading.Lock()


def ropes_of(section: Section) -> DeviceRopes:
    """The rotations of a section on the current device; those met last are kept."""
    # Tables are long to hash; those of many layers are one object.
    distinct = {id(r): r for r in section.rope if r is not None}
    order = {key: i for i, key in enumerate(distinct)}
    layers = tuple(order.get(id(r), -1) for r in section.rope)
    key = (
        cupy.cuda.runtime.getDevice(),
        section.k_dim,
        len(section.layers),
        layers,
        tuple(distinct.values()),
    )
    with _lock:
        found = _made.pop(key, None)
        if found is None:
            found = DeviceRopes(section)
            # Others use it in streams of their own.
            cupy.cuda.get_current_stream().synchronize()
        _made[key] = found
        for old in list(_made)[:-_KEPT]:
            del _made[old]
    return found


class DeviceRopes:
    """The distinct rotations of a section. Immutable.

    Attributes
    ----------
    tables
        int64 [layers]: index of each layer's rotation, or -1 for none.
    pairs, interleaved
        int32 [rotations] on the device.
    most
        Maximum number of pairs.
    halves
        Whether every rotation pairs the halves of a key.
    """

    def __init__(self, section: Section) -> None:
        check_axes(section)
        ropes: list[Rope] = list(dict.fromkeys(r for r in section.rope if r is not None))
        per_layer = section.rope or (None,) * len(section.layers)
        tables = [-1 if r is None else ropes.index(r) for r in per_layer]
        self.tables = np.array(tables, np.int64)
        pairs = np.array([len(r.inv_freq) for r in ropes] or [0], np.int32)
        self.most = int(pairs.max())
        self.halves = all(not r.interleaved and 2 * len(r.inv_freq) == section.k_dim for r in ropes)
        frequencies = np.zeros((max(len(ropes), 1), max(self.most, 1)))
        for i, rope in enumerate(ropes):
            frequencies[i, : pairs[i]] = rope.inv_freq
        self._count = len(ropes)
        self._frequencies = cupy.asarray(frequencies)
        self._scales = cupy.asarray(np.array([r.scale for r in ropes] or [1.0]))
        self.pairs = cupy.asarray(pairs)
        self.interleaved = cupy.asarray(
            np.array([int(r.interleaved) for r in ropes] or [0], np.int32)
        )

    def at(self, positions: Any, *, sign: int) -> DeviceRotations:
        """Rotations for int64 positions on the device; ``sign`` 1 applies RoPE, -1 removes it."""
        tokens = len(positions)
        shape = (self._count, tokens, self.most)
        found = DeviceRotations(
            cupy.empty(shape, np.float32), cupy.empty(shape, np.float32), tokens
        )
        layout.rotations(
            (-(-tokens * self.most // layout.THREADS), self._count),
            layout.THREADS,
            (
                positions,
                self._frequencies,
                self.pairs,
                self._scales,
                tokens,
                self.most,
                sign,
                found.cosines,
                found.sines,
            ),
        )
        return found
