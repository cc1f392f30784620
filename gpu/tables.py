"""Tables of the rANS kernels, made of frequencies."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtc_stream.cpu.rans import ESCAPE, TOTAL

#: Slots of a bucket.
_BUCKET = 16
_ESCAPED = np.uint32(1 << 31)

Frequencies = npt.NDArray[np.uint16]


def decode_entries(frequencies: Frequencies) -> npt.NDArray[np.uint32]:
    """uint32 [families, 256]: ``start | frequency << 12`` of each column.

    ``frequencies`` are those of :class:`~kvtc_stream.cpu.rans.Families`.
    """
    wide = frequencies.astype(np.uint32)
    starts = np.cumsum(wide, axis=1, dtype=np.uint32) - wide
    return starts | wide << np.uint32(12)


def buckets(frequencies: Frequencies) -> npt.NDArray[np.uint8]:
    """uint8 [families, 256]: the column that slot 16 · i is of."""
    ends = np.cumsum(frequencies, axis=1, dtype=np.uint32)
    slots = np.arange(0, TOTAL, _BUCKET)
    columns = [np.searchsorted(of_family, slots, side="right") for of_family in ends]
    return np.array(columns, np.uint8).reshape(frequencies.shape)


def encode_entries(frequencies: Frequencies) -> npt.NDArray[np.uint32]:
    """uint32 [families, 256]: as for decoding; bit 31 says that a value is escaped.

    Columns without a frequency have the entry of the escape.
    """
    entries = decode_entries(frequencies)
    entries[:, ESCAPE] |= _ESCAPED
    return np.where(frequencies > 0, entries, entries[:, ESCAPE:])


def packed_ids(ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 [steps, components, 16] of uint8 [steps, 16, components]: classes side by side."""
    return np.ascontiguousarray(ids.transpose(0, 2, 1))
