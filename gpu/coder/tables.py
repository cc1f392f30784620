"""Makes the tables of the rANS kernels from frequency tables."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtc_stream.coding.rans import ESCAPE, TOTAL

#: Slots of a bucket.
BUCKET = 16
_ESCAPED = np.uint32(1 << 31)

Frequencies = npt.NDArray[np.uint16]


def decode_tables(
    frequencies: Frequencies,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Tables that find the column of a slot without a search.

    Returns
    -------
    buckets
        uint32 [families, 256], an entry per 16 slots: index << 16 | mask. Slot s has the column of
        the symbol ``index + popc(mask & ((2 << s % 16) - 1))``: a bit is set where a column begins,
        but for that of the bucket's first slot.
    symbols
        uint32 [n], the columns that have a frequency, family after family:
        ``start | frequency - 1 << 12 | column << 24``.
    """
    wide = frequencies.astype(np.uint32)
    starts = np.cumsum(wide, axis=1, dtype=np.uint32) - wide
    family, column = np.nonzero(wide)
    start = starts[family, column]
    frequency = wide[family, column]
    symbols = start | frequency - 1 << 12 | column.astype(np.uint32) << 24
    begins = np.zeros((len(wide), TOTAL), np.uint32)
    begins[family, start] = 1
    index = begins.ravel().cumsum(dtype=np.uint32).reshape(len(wide), -1, BUCKET)[:, :, 0] - 1
    bits = begins.reshape(len(wide), -1, BUCKET)
    bits[:, :, 0] = 0
    masks = bits @ (np.uint32(1) << np.arange(BUCKET, dtype=np.uint32))
    return index << np.uint32(16) | masks, symbols.astype(np.uint32)


def encode_entries(frequencies: Frequencies) -> npt.NDArray[np.uint32]:
    """Entry of each column, uint32 [families, 256]: ``start | frequency << 12 | escaped << 31``.

    Columns without a frequency have the entry of the escape.
    """
    wide = frequencies.astype(np.uint32)
    entries = np.cumsum(wide, axis=1, dtype=np.uint32) - wide | wide << np.uint32(12)
    entries[:, ESCAPE] |= _ESCAPED
    return np.where(frequencies > 0, entries, entries[:, ESCAPE:])
