"""Rotary tables of a section's layers at some tokens, on the device."""

from __future__ import annotations

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats import Rope, Section
from kvtc_stream.gpu import layout


class DeviceRopes:
    """Cosines and sines of the section's distinct rotations.

    Attributes
    ----------
    cosines, sines
        float32 [rotations, tokens, most].
    tables
        int32 [layers]: the rotation of each layer, or -1.
    none
        The same without rotations: for V.
    pairs, interleaved
        int32 [rotations].
    tokens, most
        Tokens, and most pairs.
    """

    def __init__(self, section: Section, positions: NDArray[np.int64], *, sign: int) -> None:
        ropes: list[Rope] = list(dict.fromkeys(r for r in section.rope if r is not None))
        per_layer = section.rope or (None,) * len(section.layers)
        pairs = np.array([len(r.inv_freq) for r in ropes] or [0], np.int32)
        self.tokens, self.most = len(positions), int(pairs.max())
        frequencies = np.zeros((max(len(ropes), 1), max(self.most, 1)))
        for i, rope in enumerate(ropes):
            frequencies[i, : pairs[i]] = rope.inv_freq
        shape = (len(ropes), self.tokens, self.most)
        self.cosines = cupy.empty(shape, np.float32)
        self.sines = cupy.empty(shape, np.float32)
        self.tables = cupy.asarray(
            np.array([-1 if r is None else ropes.index(r) for r in per_layer], np.int32)
        )
        self.none = cupy.full(len(per_layer), -1, np.int32)
        self.pairs = cupy.asarray(pairs)
        self.interleaved = cupy.asarray(np.array([r.interleaved for r in ropes] or [0], np.int32))
        layout.rotations(
            (-(-self.tokens * self.most // layout.THREADS), len(ropes)),
            layout.THREADS,
            (
                cupy.asarray(positions),
                cupy.asarray(frequencies),
                self.pairs,
                cupy.asarray(np.array([r.scale for r in ropes] or [1.0])),
                self.tokens,
                self.most,
                sign,
                self.cosines,
                self.sines,
            ),
        )
