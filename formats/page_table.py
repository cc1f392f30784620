"""Many pages at a time, as columns. See :mod:`kvtc_stream.formats.table`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtc_stream.errors import KVTCError
from kvtc_stream.formats.block import Block, Role
from kvtc_stream.formats.checksum import Checksum
from kvtc_stream.formats.coders import Coder
from kvtc_stream.formats.columns import BLOCK_SIZE, ROW, block_fields, layout
from kvtc_stream.formats.features import NO_FEATURES, Feature, version_for
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.page import PAGE_MAGIC
from kvtc_stream.formats.preamble import FORMAT_VERSION
from kvtc_stream.formats.table import BlockTable, fill, is_special
from kvtc_stream.formats.usual import fill_rows, layers_can_be, usual_blocks

#: Bytes of a page before its block, and those of them that the header's checksum is over.
_BLOCK, _COVERED = 72, 64
# Plain integers: to look up a member of a registry takes longer than to compare a column.
_LAYER_ERRORS, _PLANES = np.uint32(Feature.LAYER_ERRORS), np.uint32(Feature.PLANES)
_SEALED, _PLANES_CODER = np.uint32(Feature.SEALED_PAGES), int(Coder.PLANES)
_DATA, _XXH3 = int(Role.DATA), int(Checksum.XXH3_64)
#: Versions without required features, and with some.
_PLAIN, _OTHER = version_for(NO_FEATURES), version_for(Feature.LAYER_ERRORS)
#: What a page begins with: its header, and the fields of the block.
_HEAD = layout(
    _BLOCK + BLOCK_SIZE,
    magic=(0, "S8"),
    major=(8, "<u2"),
    minor=(10, "<u2"),
    features=(12, "<u4"),
    context=(16, "S32"),
    section=(48, "<u2"),
    reserved=(50, "<u2"),
    algorithm=(52, "<u4"),
    size=(56, "<u8"),
    seed=(_COVERED, "<u8"),
    **block_fields(_BLOCK),
)


def read_pages(
    pages: Sequence[bytes],
    proven: Sequence[bool],
    section: int,
    header: StreamHeader,
    limits: Limits,
    parse: Callable[[int], Block],
) -> tuple[BlockTable, KVTCError | None]:
    """The blocks of pages of a section, up to the first page that is none, and what it raises.

    Parameters
    ----------
    pages
        Whole pages, and whatever follows them.
    proven
        Of which of them checksum and seal are known to be right. Of others nothing is.
    parse
        Reads a page by itself, with all checks; raises what is wrong with it.
    """
    heads = np.frombuffer(
        b"".join(page[: _HEAD.itemsize].ljust(_HEAD.itemsize, b"\0") for page in pages), _HEAD
    )
    usual = np.array(proven, np.bool_) & _usual_pages(heads, section, header, limits)
    usual &= usual_blocks(heads, section, header, limits)
    count = len(header.geometry.sections[section].layers)
    for i in np.flatnonzero(usual & (heads["contents"] == 1)).tolist():
        usual[i] = layers_can_be(np.frombuffer(pages[i], np.uint8), _HEAD.itemsize, count)
    rows = np.zeros(len(heads), ROW)
    fill_rows(rows, heads, _BLOCK)
    special: dict[int, Block] = {}
    good, error = len(pages), None
    for i in np.flatnonzero(~usual).tolist():
        try:
            block = parse(i)
        except KVTCError as found:
            good, error = i, found
            break
        fill(rows[i], block)
        if is_special(block):
            special[i] = block
    rows = rows[:good]
    rows["piece"] = np.arange(good)
    rows["exact"] = rows["payload"] + rows["size"] - rows["exact_length"]
    rows["coded"] = rows["exact"] - rows["coded_length"]
    pieces = tuple(memoryview(page) for page in pages[:good])
    return BlockTable(pieces, rows, special, False, lambda i, _: parse(i)), error


def _usual_pages(
    heads: NDArray[Any], section: int, header: StreamHeader, limits: Limits
) -> NDArray[np.bool_]:
    """Which pages have the header that a writer gives them, and one of a whole block."""
    h = heads
    fields = h.tobytes()
    seeds = [
        xxhash.xxh3_64_intdigest(fields[i : i + _COVERED], 0)
        for i in range(0, len(fields), h.itemsize)
    ]
    features = h["features"]
    needed = h["contents"] * _LAYER_ERRORS
    needed |= (h["verbatim_coder"] == _PLANES_CODER) * _PLANES
    needed |= features & _SEALED
    found: NDArray[np.bool_] = (
        (h["seed"] == np.array(seeds, np.uint64))
        & (h["magic"] == PAGE_MAGIC)
        & (h["major"] == FORMAT_VERSION[0])
        & (h["minor"] == np.where(features == 0, _PLAIN[1], _OTHER[1]))
        & (features == needed)
        & (h["context"] == header.digest)
        & (h["section"] == section)
        & (h["reserved"] == 0)
        & (h["algorithm"] == _XXH3)
        & (h["size"] <= limits.max_record_bytes)
        & (h["role"] == _DATA)
        & (h["start"] == 0)
        & (Feature.AXES not in header.features)
    )
    return found
