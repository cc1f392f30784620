"""Tasks in turn, and nobody goes on once there is an outcome."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import cupy
import numpy as np
import pytest

from kvtc_stream.gpu.runtime.staging import Staging, sending
from kvtc_stream.gpu.runtime.streams import IN_FLIGHT, interleaving
from kvtc_stream.io.steps import run


def test_tasks_are_taken_in_turn() -> None:
    """A new one begins before older ones go on, and few are under way."""
    waits, happened = cupy.cuda.Stream.waits, list[tuple[int, int]]()

    def task(number: int) -> Iterator[None]:
        for step in range(3):
            happened.append((number, step))
            yield

    run(interleaving(map(task, range(8))))
    assert sorted(happened) == [(n, s) for n in range(8) for s in range(3)]
    assert happened[:6] == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    for number in range(IN_FLIGHT, 8):  # those before it have come to their ends
        earlier = happened[: happened.index((number, 0))]
        assert len({n for n, _ in earlier} - {n for n, s in earlier if s == 2}) < IN_FLIGHT
    assert cupy.cuda.Stream.waits == waits + IN_FLIGHT


def test_a_failed_task_ends_them_all() -> None:
    waits, begun = cupy.cuda.Stream.waits, list[int]()

    def task(number: int) -> Iterator[None]:
        begun.append(number)
        yield
        if number == 1:
            raise ValueError("of the second")

    with pytest.raises(ValueError, match="of the second"):
        run(interleaving(map(task, range(20))))
    assert begun == [0, 1, 2]
    assert cupy.cuda.Stream.waits == waits + IN_FLIGHT


def test_bytes_that_were_sent_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of them come from there, wherever they begin; others are copied as ever."""
    monkeypatch.setattr("kvtc_stream.gpu.runtime.staging._LEAST_AHEAD", 1)
    monkeypatch.setattr("kvtc_stream.gpu.runtime.staging._MOST_AHEAD", 9000)
    monkeypatch.setattr("kvtc_stream.gpu.runtime.staging._TOGETHER", 1000)
    rng = np.random.default_rng(0)
    held = np.frombuffer(cupy.cuda.alloc_pinned_memory(5000), np.uint8)
    held[:] = rng.integers(0, 256, 5000, np.uint8)
    begins = np.array([0, 1, 18, 1235, 4999, 77])
    ends = np.array([5, 1234, 34, 4999, 5000, 77])
    owners = np.zeros(len(begins), np.int64)
    expected = [held[a:b].tobytes() for a, b in zip(begins, ends, strict=True)]
    view = held.data.toreadonly()
    # What is not pinned, and what is too much with the first one, is not sent.
    with sending([bytes(100), memoryview(bytes(100)), view, view]):
        held[:] = 0
        data, places = Staging().upload_parts([held], owners, begins, ends)
        part, _ = Staging().upload_parts([held[18:34]], owners[:1], begins[:1], np.array([16]))
    assert not (places % 16).any()
    for own, at in zip(expected, places.tolist(), strict=True):
        assert np.array(data)[at : at + len(own)].tobytes() == own
    assert np.array(part)[:16].tobytes() == expected[2]
    data, places = Staging().upload_parts([held], owners, begins, ends)
    assert not np.array(data)[places[1] : places[1] + 1233].any()


def test_uploads_begin_where_they_are_said_to() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 40):
        pieces = [rng.bytes(int(n)) for n in rng.integers(0, 90, count)]
        data, begins = Staging().upload(pieces)
        for piece, begin in zip(pieces, begins.tolist(), strict=True):
            assert np.array(data)[begin : begin + len(piece)].tobytes() == piece
            assert begin % 16 == 0


def test_memory_is_kept_until_a_copy_to_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a failed call nobody asks for the result."""
    happened: list[str] = []

    class Memory(bytearray):
        def __del__(self) -> None:
            happened.append("freed")

    event = SimpleNamespace(
        record=lambda: happened.append("begun"), synchronize=lambda: happened.append("done")
    )
    monkeypatch.setattr(cupy.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", Memory)
    fetch = Staging().begin_fetch(cupy.asarray(np.arange(3)))
    assert happened == ["begun"]
    del fetch
    assert happened == ["begun", "done", "freed"]
