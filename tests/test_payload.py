"""Payloads of uniform bands: many at a time are what they are one by one."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtc_stream.coding.payload import (
    TILE_COMPONENTS,
    UniformPayload,
    UniformPayloads,
    head,
    nibbles,
    tile_size,
    tiles,
)
from kvtc_stream.errors import FormatError
from kvtc_stream.formats import Block, BlockTable, Coder, Role
from kvtc_stream.formats.coders import compress

_NO_VALUES = compress(Coder.DEFLATE, b"")


@given(st.lists(st.integers(0, 5000), max_size=6))
def test_tiles_are_no_more_than_needed_and_no_larger(coded: list[int]) -> None:
    size = tile_size(coded)
    assert size <= TILE_COMPONENTS
    for count in coded:
        assert len(tiles(count, size)) == len(tiles(count, TILE_COMPONENTS))
    if max(coded, default=0) > TILE_COMPONENTS:
        smaller = [len(tiles(count, size - 1)) for count in coded]
        assert smaller != [len(tiles(count, size)) for count in coded]


@st.composite
def blocks(draw: st.DrawFn, coded: list[int]) -> Block:
    """One with a payload, and sometimes a bit or the end of it that is not as it was."""
    tokens = draw(st.integers(1, 5))
    size = draw(st.sampled_from([1, 3, 1024, 65535]))
    count = sum(len(tiles(c, size)) for c in coded)
    lengths = [2 * x for x in draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))]
    step = draw(st.sampled_from([1e-40, 0.5, 3e38]))
    classes = bytearray(draw(st.binary(min_size=nibbles(tokens), max_size=nibbles(tokens))))
    if tokens % 2:
        classes[-1] &= 15
    payload = bytearray(head(step, draw(st.integers(-128, 127)), lengths, size))
    payload += bytes(sum(lengths)) + bytes(classes) * len(coded)
    match draw(st.sampled_from(["", "", "bit", "end", "step", "symbols", "coder"])):
        case "bit":
            bit = draw(st.integers(0, 8 * len(payload) - 1))
            payload[bit // 8] ^= 1 << bit % 8
        case "end":
            del payload[draw(st.integers(0, len(payload))) :]
        case "step":
            step = draw(st.sampled_from([0.0, -1.0, np.inf, np.nan]))
            payload[:4] = np.float32(step).tobytes()
        case "symbols":
            return _block(payload, tokens, tokens * sum(coded) + 1)
        case "coder":
            return _block(payload, tokens, len(payload), Coder.STORED)
    return _block(payload, tokens, tokens * sum(coded))


def _block(payload: bytearray, tokens: int, symbols: int, coder: Coder = Coder.RANS) -> Block:
    # As a view into more: what lies beside must not be read.
    whole = memoryview(b"\xff" * 16 + bytes(payload) + b"\xff" * 16)
    return Block(
        section=0,
        role=Role.DATA,
        start=0,
        tokens=tokens,
        positions=range(tokens),
        verbatim_tokens=(),
        coder=coder,
        coded=whole[16 : 16 + len(payload)],
        coded_size=symbols,
        verbatim_coder=_NO_VALUES[0],
        verbatim=_NO_VALUES[1],
    )


@given(st.data())
def test_as_one_by_one(data: st.DataObject) -> None:
    coded = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    own = data.draw(st.lists(blocks(coded), min_size=1, max_size=4))
    table = BlockTable.of(own)
    try:
        expected = [UniformPayload.parse(block, coded) for block in own]
    except FormatError as error:
        message = re.escape(str(error))
        with pytest.raises(FormatError, match=f"^{message}$"):
            UniformPayloads.parse(table, coded)
        return
    found = UniformPayloads.parse(table, coded)
    for i, one in enumerate(expected):
        assert (found.steps[i], found.levels[i]) == (np.float32(one.step), one.level)
        assert (found.sizes[i], found.tiles[i]) == (one.tile_components, one.tiles)
        assert found.classes[i] == one.classes
        lengths = found.lengths[i].tolist()
        assert lengths[: len(one.lengths)] == one.lengths.tolist()
        assert not any(lengths[len(one.lengths) :])
