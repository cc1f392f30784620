"""Bytes copied, and their checksums beside them, in compiled code.

A thread takes the GIL once for all that it does: work is a list of units, which threads take one
after the other until none is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import raw_memcpy

from kvtc_stream.io.xxh3 import BLOCK, add_blocks, begin, end, intrinsic, jit

#: Bytes that are copied before they are read again: they are still in the nearest cache.
_AT_ONCE = 16 << 10
#: At most the smallest page that systems have.
_PAGE = 4096


@intrinsic
def add_shared(_context: Any, address: Any, number: Any) -> Any:
    """Add to the int64 at an address, as one step for all threads; what it was before. What a
    thread wrote until then is seen by those that add later."""

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _copy(_context: Any, target: Any, source: Any, size: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        to, of = (builder.inttoptr(x, ir.IntType(8).as_pointer()) for x in arguments[:2])
        raw_memcpy(builder, to, of, arguments[2], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


@intrinsic
def _put_word(_context: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store(arguments[1], place).align = 1
        return context.get_dummy_value()

    return types.none(types.int64, types.uint64), generate


@intrinsic
def _put_zero(_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        builder.store(ir.Constant(ir.IntType(8), 0), place)
        return context.get_dummy_value()

    return types.none(types.int64), generate


@jit
def assemble(counts, polls, units, seeds, pieces):  # type: ignore[no-untyped-def]
    """Copy the pieces of units, and put their checksums behind them.

    Parameters
    ----------
    counts
        int64 [2], 0 at first, of all threads that share the work: units that were begun with, and
        units that are done.
    polls
        How often to look, at the most, whether others are done with theirs.
    units
        int64 [units, 4]: first piece, the one after the last; and the address and size of what has
        a checksum, at least ``xxh3.LEAST`` bytes, or 0: the last ones that the unit's pieces
        are copied to. It is written behind them, little-endian.
    seeds
        uint64 [units]: of the checksums.
    pieces
        int64 [pieces, 3]: addresses that they are copied from and to, and their bytes.
    """
    secret, state = np.empty(24, np.uint64), np.empty(8, np.uint64)
    one = np.int64(1)
    begun, done = counts[0:].ctypes.data, counts[1:].ctypes.data
    while True:
        unit = add_shared(begun, one)
        if unit >= len(units):
            break
        at, size = units[unit, 2], units[unit, 3]
        left = max(size - 1, 0) // BLOCK
        if size:
            begin(seeds[unit], secret, state)
        added = at
        for i in range(units[unit, 0], units[unit, 1]):
            source, target, rest = pieces[i, 0], pieces[i, 1], pieces[i, 2]
            while rest > 0:
                count = min(rest, _AT_ONCE)
                _copy(target, source, count)
                source, target, rest = source + count, target + count, rest - count
                whole = min((target - added) // BLOCK, left)
                if whole > 0:
                    add_blocks(added, whole, secret, state)
                    added, left = added + whole * BLOCK, left - whole
        if size:
            _put_word(at + size, end(at, size, secret, state))
        add_shared(done, one)
    _wait(done, len(units), polls)


@jit
def touch(counts, polls, address, size, share):  # type: ignore[no-untyped-def]
    """Write to every page of ``size`` bytes from an address on, in units of ``share`` bytes;
    ``counts`` and ``polls`` as for :func:`assemble`."""
    one = np.int64(1)
    begun, done = counts[0:].ctypes.data, counts[1:].ctypes.data
    while True:
        first = add_shared(begun, one) * share
        if first >= size:
            break
        for at in range(address + first, address + min(first + share, size), _PAGE):
            _put_zero(at)
        add_shared(done, one)
    _wait(done, (size + share - 1) // share, polls)


@jit
def _wait(done, units, polls):  # type: ignore[no-untyped-def]
    for _ in range(polls):
        if add_shared(done, np.int64(0)) >= units:
            return
