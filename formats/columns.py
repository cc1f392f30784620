"""The fields of entries, records and blocks as columns: structured types of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtc_stream.formats.record import RECORD_HEADER_SIZE


def layout(itemsize: int, /, **fields: tuple[int, Any]) -> np.dtype[Any]:
    """A structured dtype of ``itemsize`` bytes, from offset and type of each field."""
    return np.dtype(
        {
            "names": list(fields),
            "offsets": [offset for offset, _ in fields.values()],
            "formats": [form for _, form in fields.values()],
            "itemsize": itemsize,
        }
    )


#: An entry of the index. Errors are compared as bits.
ENTRY = layout(
    88,
    offset=(0, "<u8"),
    length=(8, "<u8"),
    type=(16, "u1"),
    role=(17, "u1"),
    measure=(18, "u1"),
    reserved=(19, "u1"),
    section=(20, "<u2"),
    reserved_too=(22, "<u2"),
    tokens=(24, "<u4"),
    verbatim_tokens=(28, "<u4"),
    start=(32, "<u8"),
    first_position=(40, "<i8"),
    last_position=(48, "<i8"),
    coded_bytes=(56, "<u8"),
    verbatim_bytes=(64, "<u8"),
    errors=(72, ("<u4", (4,))),
)
#: Bytes of a block's fields.
BLOCK_SIZE = 80


def block_fields(at: int) -> dict[str, tuple[int, Any]]:
    """The fields that every block begins with, ``at`` bytes from where a head does."""
    return {
        "tokens": (at, "<u4"),
        "verbatim": (at + 4, "<u4"),
        "start": (at + 8, "<u8"),
        "first": (at + 16, "<i8"),
        "role": (at + 24, "u1"),
        "listed": (at + 25, "u1"),
        "measure": (at + 26, "u1"),
        "coder": (at + 27, "u1"),
        "verbatim_coder": (at + 28, "u1"),
        "contents": (at + 29, "u1"),
        "reserved_too": (at + 30, "<u2"),
        "coded_size": (at + 32, "<u8"),
        "coded_length": (at + 40, "<u8"),
        "verbatim_length": (at + 48, "<u8"),
        "errors": (at + 56, ("<u4", (4,))),
        "cut": (at + 72, "<u8"),
    }


#: What a block's record begins with: the record's header, and the fields of the block.
HEAD = layout(
    RECORD_HEADER_SIZE + BLOCK_SIZE,
    magic=(0, "<u4"),
    type=(4, "u1"),
    flags=(5, "u1"),
    section=(6, "<u2"),
    sequence=(8, "<u4"),
    reserved=(12, "<u4"),
    size=(16, "<u8"),
    seed=(24, "<u8"),
    **block_fields(RECORD_HEADER_SIZE),
)
#: A row of :class:`~kvtc_stream.formats.table.BlockTable`.
ROW = np.dtype(
    [
        (name, np.int64)
        for name in (
            "piece",  # which of the buffers holds the block
            "start",  # ordinal of the first token that was not cut
            "tokens",
            "first",  # position of the first token
            "front",  # tokens that are cut at the front
            "end",  # and at the end
            "verbatim",  # how many tokens are verbatim
            "coder",
            "coded",  # where the symbols begin
            "coded_length",
            "coded_size",
            "verbatim_coder",
            "exact",  # where the verbatim values begin
            "exact_length",
            "payload",  # where what the checksum covers begins
            "size",  # and its bytes
        )
    ]
    + [("seed", np.uint64), ("checksum", np.uint64)]
)
