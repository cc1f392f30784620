"""Large pieces of memory, and threads that work on them."""

from __future__ import annotations

import os
import sys
import threading
from functools import partial

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtc_stream.io.assembly import assemble
from kvtc_stream.io.memory import LARGE, Joining, Piece, Room, Sealed, SealedRows, copied, joined
from kvtc_stream.io.threads import SHARE, beside, copy, in_spans, in_turn, spread, threads
from kvtc_stream.io.xxh3 import BLOCK, LEAST

#: Around what decides how something is done.
SIZES = st.sampled_from([0, 1, 7, 1 << 16, (1 << 16) - 1, SHARE, SHARE + 1, LARGE, LARGE + 5])


def drawn(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@given(st.lists(SIZES, max_size=5))
def test_joined_and_copied(sizes: list[int]) -> None:
    pieces = [drawn(size, i) for i, size in enumerate(sizes)]
    found = joined([memoryview(x) if i % 2 else x for i, x in enumerate(pieces)])
    assert type(found) is bytes
    assert found == b"".join(pieces)
    assert hash(found) == hash(b"".join(pieces))
    for piece in pieces:
        view = copied(memoryview(piece))
        assert view == piece
        assert view.readonly


@pytest.mark.parametrize("likely", [0, LARGE - 1, LARGE, 3 * LARGE, 9 * LARGE])
@pytest.mark.parametrize("size", [LARGE, 2 * LARGE + 1, 3 * LARGE, 4 * LARGE])
def test_joined_in_room_that_was_made_before(size: int, likely: int) -> None:
    """Where they do not fit, elsewhere; room that nobody takes is given back."""
    Room(3 * LARGE, likely)
    pieces = [drawn(size - 9, 1), b"9 bytes, "]
    plain, found = b"".join(pieces), joined(pieces, Room(3 * LARGE, likely))
    assert type(found) is bytes
    assert found == plain
    assert sys.getsizeof(found) == sys.getsizeof(plain)
    assert sys.getrefcount(found) == sys.getrefcount(plain)
    assert hash(found) == hash(plain)
    assert found + b"more" == plain + b"more"


@pytest.mark.parametrize("before", [0, LARGE])
@pytest.mark.parametrize(
    "records",
    [
        [[]],
        [[0], [140], [141, 0], [1]],
        [[SHARE, 7], [], [LARGE + 5, 0, 1 << 16], [30]],
        [[1 << 16, SHARE + 1]] * 5,
    ],
)
def test_joined_with_checksums(records: list[list[int]], before: int) -> None:
    """Each behind what it is of; nothing else is."""
    pieces: list[Piece] = [drawn(before, 9)]
    expected = [drawn(before, 9)]
    for number, sizes in enumerate(records):
        head, *payload = (drawn(size, i) for i, size in enumerate((5, 100, *sizes)))
        seed = 2**64 - 1 - number
        pieces.append(Sealed([head, *payload], seed))
        found = xxhash.xxh3_64_intdigest(b"".join(payload), seed)
        expected += [head, *payload, found.to_bytes(8, "little")]
    same = joined(pieces) == b"".join(expected)
    assert same


@pytest.mark.parametrize("sizes", [[5, 0, 9], [300, 0, LARGE, 1], [LARGE] * 3, [0]])
@pytest.mark.parametrize(("width", "apart"), [(300, 32), (LEAST + 31, 32), (40, 7)])
def test_joined_rows_with_checksums(sizes: list[int], width: int, apart: int) -> None:
    rng = np.random.default_rng(width)
    rows = rng.integers(0, 256, (len(sizes), width), np.uint8)
    lengths = np.array(sizes)
    places = np.stack([np.cumsum(lengths) - lengths + 3, lengths], axis=1)
    seeds = rng.integers(0, 1 << 63, len(sizes), np.uint64)
    own = SealedRows(rows, apart, memoryview(drawn(sum(sizes) + 3, 1)), places, seeds)
    pieces: list[Piece] = [b"before", own, drawn(LARGE, 2), own, b"behind"]
    expected: list[bytes | memoryview] = []
    for one in own.each():
        expected += [*one.pieces, one.checksum()]
    once = b"".join(expected)
    assert own.size == len(once)
    same = joined([own]) == once
    assert same
    same = joined(pieces) == b"before" + once + drawn(LARGE, 2) + once + b"behind"
    assert same


def test_checksums_of_every_length() -> None:
    """In compiled code, wherever the bytes begin and however they are cut."""
    rng = np.random.default_rng(0)
    lengths = [
        *range(LEAST, 2 * BLOCK + 200),
        *(k * BLOCK + i for k in (16, 33) for i in (-1, 0, 1)),
    ]
    for length in lengths:
        data, seed = rng.bytes(length), int(rng.integers(1 << 63)) * 2 + length % 2
        source, out = np.frombuffer(data, np.uint8), np.zeros(length + 24, np.uint8)
        begin = out.ctypes.data + length % 16
        cuts = np.sort(rng.integers(0, length + 1, length % 4))
        edges = np.concatenate([[0], cuts, [length]])
        pieces = np.stack([source.ctypes.data + edges[:-1], begin + edges[:-1], np.diff(edges)], 1)
        units = np.array([[0, len(pieces), begin, length]])
        assemble(np.zeros(2, np.int64), 1, units, np.array([seed], np.uint64), pieces)
        found = out[length % 16 :].tobytes()
        assert found[:length] == data
        assert int.from_bytes(found[length : length + 8], "little") == xxhash.xxh3_64_intdigest(
            data, seed
        ), length


@pytest.mark.parametrize("sizes", [(100, 7), (LARGE, 300, 5), (3, LARGE + 1)])
def test_bytes_that_come_later(sizes: tuple[int, ...]) -> None:
    """Where they go is known before; also small ones, and those of a checksum."""
    payloads = [drawn(size, i) for i, size in enumerate(sizes)]
    rooms = [bytearray(size) for size in sizes]
    joining = Joining([Sealed([b"head", memoryview(room)], 5) for room in rooms])
    for room, payload in zip(rooms, payloads, strict=True):
        room[:] = payload
    joining.begin()
    expected = b""
    for payload in payloads:
        expected += b"head" + payload + xxhash.xxh3_64_intdigest(payload, 5).to_bytes(8, "little")
    same = joining.finish() == expected
    assert same


def test_what_is_dropped_is_not_written_to_any_more() -> None:
    """Neither threads that join pieces, nor those that map memory, outlive what they work on."""
    pieces = [drawn(LARGE, i) for i in range(9)]
    for _ in range(20):
        Joining(pieces).begin()
        Room(9 * LARGE, 9 * LARGE)
    same = joined(pieces) == b"".join(pieces)
    assert same


@given(st.lists(SIZES, max_size=5))
def test_copy(sizes: list[int]) -> None:
    sources = [np.frombuffer(drawn(size, i), np.uint8) for i, size in enumerate(sizes)]
    targets = [np.zeros_like(x) for x in sources]
    copy(sources, targets)
    for source, target in zip(sources, targets, strict=True):
        np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("size", [0, 100 * SHARE])
def test_results_come_in_order(size: int) -> None:
    names = set()

    def double(x: int, y: int) -> int:
        names.add(threading.current_thread().name)
        return x + y

    arguments = [(i, i) for i in range(100)]
    assert spread(double, arguments, size) == [2 * i for i in range(100)]
    on_threads = size and (os.cpu_count() or 1) > 1
    assert all(name.startswith("kvtc-bytes") for name in names) == bool(on_threads)
    assert list(in_turn(double, iter(arguments))) == [2 * i for i in range(100)]


def test_an_exception_comes_where_its_result_would() -> None:
    def inverse(x: int) -> float:
        return 1 / x

    found = in_turn(inverse, ((x,) for x in (2, 1, 0, 4)))
    assert [next(found), next(found)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
    with pytest.raises(ZeroDivisionError):
        spread(inverse, [(x,) for x in (2, 1, 0, 4)], 100 * SHARE)


@pytest.mark.parametrize("values", [0, 1 << 40])
def test_all_that_was_begun_beside_a_failure_is_over(
    values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTC_THREADS", "3")
    gate, ended = threading.Barrier(2 if values else 1), []

    def task(i: int) -> int:
        if i < 2:
            gate.wait(30)  # two are at work at the same time
        if i in (1, 3):
            raise ValueError(str(i))
        ended.append(i)
        return i * i

    assert beside([partial(int, i) for i in range(9)], values) == list(range(9))
    with pytest.raises(ValueError, match="1"):
        beside([partial(task, i) for i in range(6)], values)
    assert sorted(ended) == ([0, 2, 4, 5] if values else [0])


@given(st.integers(0, 40), st.sampled_from([0, 1 << 40]))
def test_spans_make_up_all_rows(rows: int, values: int) -> None:
    counts = np.zeros(rows, np.int64)

    def some(own: slice) -> None:
        counts[own] += 1

    in_spans(some, rows, values)
    assert (counts == 1).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_has_threads_of_its_own() -> None:
    before = threads()
    before.submit(int).result()
    child = os.fork()
    if not child:  # whatever happens here must not come back to pytest
        right = threads() is not before and threads().submit(int).result(timeout=30) == 0
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
