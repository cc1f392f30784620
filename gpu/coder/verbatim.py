"""Verbatim bfloat16 values: those of many blocks on the device to payloads, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.coding.verbatim import HEAD, TILE, Places, places, split
from kvtc_stream.gpu.kernels import verbatim
from kvtc_stream.gpu.runtime.staging import Staging, recorded
from kvtc_stream.gpu.runtime.streams import beside
from kvtc_stream.io.steps import Steps, run
from kvtc_stream.io.xxh3 import jit

#: Values of a piece, and bytes of a payload, begin at multiples of so many bytes.
_ALIGNMENT = 16


def tasks_of(
    sizes: Sequence[int],
    firsts: NDArray[np.int64],
    found: Places | None = None,
    begins: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """int64 [tiles, FIELDS] of pieces of so many values, the first of which are ``firsts``.

    ``found`` are the places in the payloads, which begin at ``begins``, multiples of 16 bytes.
    """
    tiles = sum(-(-n // TILE) for n in sizes)
    tasks = np.zeros((tiles, verbatim.FIELDS), np.int64)
    if found is None or begins is None:
        nowhere = np.zeros(max(tiles, len(sizes)), np.int64)
        found, begins = Places(nowhere, nowhere, nowhere, nowhere), nowhere
    digits, others, rests, _ = found
    _fill_tasks(tasks, np.array(sizes, np.int64), firsts, begins, digits, others, rests)
    return tasks


@jit
def _fill_tasks(tasks, sizes, firsts, begins, digits, others, rests):  # type: ignore[no-untyped-def]
    tile = 0
    for piece in range(len(sizes)):
        begin = begins[piece]
        for i in range((sizes[piece] + TILE - 1) // TILE):
            before = i * TILE
            tasks[tile, verbatim.VALUES] = firsts[piece] + before
            tasks[tile, verbatim.COUNT] = min(sizes[piece] - before, TILE)
            tasks[tile, verbatim.BLOCK] = piece
            tasks[tile, verbatim.PLACE] = begin + i * HEAD
            tasks[tile, verbatim.DIGITS] = begin // 4 + digits[tile]
            tasks[tile, verbatim.REST] = begin + rests[piece] + before
            tasks[tile, verbatim.OTHERS] = begin + others[tile]
            tile += 1


def starts(sizes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where pieces of so many bytes begin, one after the other, and where the last ends."""
    room = -(-np.array(sizes, np.int64) // _ALIGNMENT) * _ALIGNMENT
    return np.concatenate([[0], np.cumsum(room)])


def encode(pieces: Sequence[tuple[Any, Any]]) -> list[NDArray[np.uint8]]:
    """Payloads of bits of K and V on the device, uint8 on the host; see
    :func:`kvtc_stream.coding.verbatim.encode`."""
    sizes = [k.size + v.size for k, v in pieces]
    firsts = starts([2 * n for n in sizes]) // 2
    values = cupy.empty(int(firsts[-1]), np.uint16)
    for (k, v), first in zip(pieces, firsts.tolist(), strict=False):
        values[first : first + k.size].reshape(k.shape)[...] = k
        values[first + k.size : first + k.size + v.size].reshape(v.shape)[...] = v
    return run(encode_values(Staging(), values, sizes))


def encode_values(
    staging: Staging, values: Any, sizes: Sequence[int]
) -> Steps[list[NDArray[np.uint8]]]:
    """As :func:`encode` of bits that lie side by side, uint16 on the device: so many of each piece,
    which begin where :func:`starts` says of their bytes."""
    firsts = starts([2 * n for n in sizes]) // 2
    tasks = tasks_of(sizes, firsts)
    heads = cupy.empty((len(tasks), HEAD), np.uint8)
    [tasks_d] = staging.arrays(tasks)
    verbatim.survey(len(tasks), verbatim.THREADS, (tasks_d, values, heads))
    on_host, surveyed = staging.begin_fetch(heads), recorded()
    yield
    found = places(on_host(), sizes)
    begins = starts(found.lengths)
    with beside(surveyed):  # whatever else the stream has to do meanwhile
        data = cupy.empty(int(begins[-1]), np.uint8)
        [tasks_d] = staging.arrays(tasks_of(sizes, firsts, found, begins))
        verbatim.encode(len(tasks), verbatim.THREADS, (tasks_d, values, heads, data, data))
        memory, ready = staging.begin_large(data)
    yield
    ready()
    host = np.frombuffer(memory, np.uint8)
    spans = zip(begins.tolist(), found.lengths.tolist(), strict=False)
    return [host[begin : begin + length] for begin, length in spans]


def decode(
    payloads: Sequence[Any],
    sizes: Sequence[int],
    addresses: Sequence[int],
    staging: Staging,
) -> tuple[Any, list[int], Any]:
    """Bits of values on the device, of payloads that are there too: at addresses that are multiples
    of 16.

    Returns
    -------
    uint16 [values of all], addresses, int32 [payloads]
        The values, where those of each payload begin, and on the device which payloads no encoder
        wrote: not 0.

    Raises
    ------
    FormatError
        The heads of tiles show that already.
    """
    firsts, tiles = starts([2 * n for n in sizes]) // 2, sum(-(-n // TILE) for n in sizes)
    held = [memoryview(x)[: -(-n // TILE) * HEAD] for x, n in zip(payloads, sizes, strict=True)]
    heads = np.frombuffer(b"".join(held), np.uint8)
    found = places(heads.reshape(-1, HEAD), sizes) if len(heads) == HEAD * tiles else None
    if found is None or found.lengths.tolist() != [len(x) for x in payloads]:
        for payload, n in zip(payloads, sizes, strict=True):
            split(payload, n)
        raise AssertionError("what a payload is not has an error")
    base = min(addresses)
    tasks = tasks_of(sizes, firsts, found, np.array(addresses, np.int64) - base)
    values = cupy.empty(int(firsts[-1]), np.uint16)
    faults = cupy.zeros(len(payloads), np.int32)
    [tasks_d] = staging.arrays(tasks)
    arguments = tasks_d, base, base, values.data.ptr, faults
    verbatim.decode(len(tasks), verbatim.THREADS, arguments)
    return values, (values.data.ptr + 2 * firsts[:-1]).tolist(), faults
