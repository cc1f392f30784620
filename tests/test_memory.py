"""Large pieces of memory, and threads that work on them."""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtc_stream.io.memory import LARGE, Room, copied, joined
from kvtc_stream.io.threads import SHARE, copy, in_turn, spread, threads

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
