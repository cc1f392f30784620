"""The tier of vLLM's offloading, with rows and stores of our own; ``test_vllm_tier.py`` has a real
engine."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import kvtc_stream as kvtc
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.hosts.layouts import VLLM_LAYOUTS
from kvtc_stream.integrations.hosts.store import FileStore, MemoryStore, Store
from kvtc_stream.integrations.vllm.settings import TierSettings
from kvtc_stream.integrations.vllm.tier_link import Finished, TierLink
from kvtc_stream.integrations.vllm.tier_worker import (
    Rows,
    TierWorker,
    WorkerConfig,
    worker_of,
)

BLOCK, BLOCKS, COUNT = 4, 2, 24
PAGE = BLOCK * BLOCKS
NAMESPACE = Namespace({"test": "tier"})
BF16 = kvtc.DType.BFLOAT16
GEOMETRY = kvtc.Geometry.uniform(
    layers=2, kv_heads=2, head_dim=8, rope=kvtc.Rope.from_theta(1e4, 8)
)
#: Blocks of two heads of eight channels, as shapes and strides without the axis of blocks.
SHAPES = {
    "side by side": (VLLM_LAYOUTS[0], (2, BLOCK, 16), (BLOCK * 16, 16, 1)),
    "tokens first": (VLLM_LAYOUTS[0], (2, BLOCK, 16), (16, 32, 1)),
    "CPU": (VLLM_LAYOUTS[1], (2, BLOCK, 16), (BLOCK * 16, 16, 1)),
    "halves": (VLLM_LAYOUTS[2], (2, BLOCK, 2, 8), (BLOCK * 16, 16, 8, 1)),
    "halves, heads first": (VLLM_LAYOUTS[4], (2, 2, BLOCK, 8), (BLOCK * 16, BLOCK * 8, 8, 1)),
}


def rows_of(
    name: str = "side by side", order: tuple[int, ...] = (0, 1), blocks: int = BLOCKS
) -> Rows:
    layout, shape, strides = SHAPES[name]
    used = len(order) * blocks * BLOCK * 32 * 2
    return Rows(layout, shape, strides, "bfloat16", 2, 8, BLOCK, blocks, order, used + 64, COUNT)


def drawn(seed: int = 0, tokens: int = PAGE) -> tuple[NDArray[Any], NDArray[Any]]:
    return kvtc.testing.drawn_cache(GEOMETRY, tokens, seed=seed, dtype=BF16)


def key(i: int) -> bytes:
    """What vLLM calls a chunk: a hash, and the number of its group."""
    return i.to_bytes(32, "big") + bytes(4)


def position(own: bytes) -> int:
    return int.from_bytes(own[:32], "big") * PAGE


# Rows.


@given(
    name=st.sampled_from(sorted(SHAPES)),
    order=st.permutations(range(3)),
    blocks=st.integers(1, 3),
    row=st.integers(0, COUNT - 1),
)
def test_rows_read_what_was_written(name: str, order: list[int], blocks: int, row: int) -> None:
    rows = rows_of(name, tuple(order), blocks)
    rng = np.random.default_rng(row)
    memory = rng.integers(0, 255, (COUNT, rows.row_bytes), np.uint8)
    before = memory.copy()
    k, v = (
        rng.standard_normal((3, 2, rows.tokens, 8)).astype(kvtc.io.dlpack.numpy_dtype(BF16))
        for _ in range(2)
    )
    rows.write(memory, row, k, v)
    for found, expected in zip(rows.read(memory, row), (k, v), strict=True):
        assert found.tobytes() == expected.tobytes()
    others = np.arange(COUNT) != row
    assert (memory[others] == before[others]).all()
    assert (memory[row, -64:] == before[row, -64:]).all()  # no layer's
    assert (memory[row] != before[row]).any()


def test_a_row_is_the_engines_blocks() -> None:
    """Of the first layer, then of the next; keys of vLLM's CPU backend are transposed."""
    rows = rows_of("CPU", order=(1, 0))
    memory = np.zeros((COUNT, rows.row_bytes), np.uint8)
    k, v = drawn()
    rows.write(memory, 5, k, v)
    values = memory[5, :-64].view(k.dtype).reshape(2, BLOCKS, 2, 2, BLOCK * 8)
    for layer, place in ((0, 1), (1, 0)):
        for block in range(BLOCKS):
            tokens = slice(block * BLOCK, (block + 1) * BLOCK)
            for head in range(2):
                own = values[place, block, head]
                assert (own[0].reshape(8, BLOCK) == k[layer, head, tokens].T).all()
                assert (own[1].reshape(BLOCK, 8) == v[layer, head, tokens]).all()
    with pytest.raises(IndexError):
        rows.read(memory, COUNT)


# The worker, in threads of this process.


class Worker:
    """A worker, its rows, and what it answers."""

    def __init__(self, store: Store, timeout: float = 60.0, coders: int = 2) -> None:
        self.rows, self.store = rows_of(), store
        self.memory = np.zeros((COUNT, self.rows.row_bytes), np.uint8)
        self.codec = page_codec()
        self.pipe, other = Pipe()
        self.worker = TierWorker(
            other,
            self.memory,
            self.rows,
            NAMESPACE,
            store,
            [self.codec] * coders,
            timeout,
        )
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        if self.worker.serve():
            self.worker.close()

    def ask(self, *message: Any) -> None:
        self.pipe.send(message)

    def answers(self, count: int) -> list[Any]:
        found = []
        for _ in range(count):
            assert self.pipe.poll(60), f"{found}, and no more"
            found.append(self.pipe.recv())
        return found

    def outcomes(self, count: int) -> dict[int, str]:
        """By the page's number."""
        return {index: outcome for _, _, index, outcome, *_ in self.answers(count)}

    def end(self) -> None:
        self.ask("close")
        self.thread.join(60)
        assert not self.thread.is_alive()


@cache
def page_codec(secret: bytes = b"secret") -> kvtc.PageCodec:
    codec = kvtc.Codec(kvtc.testing.tiny_calibration(), ratio=2, block_tokens=PAGE, backend="cpu")
    return kvtc.PageCodec(codec, dtype="bfloat16", key=secret)


def page(i: int, seed: int | None = None, codec: kvtc.PageCodec | None = None) -> bytes:
    """The page of :func:`key` ``i``."""
    own = NAMESPACE.page(key(i), i * PAGE)
    k, v = drawn(i if seed is None else seed)
    return (codec or page_codec()).encode(k, v, positions=i * PAGE, identity=own.identity)


def name(i: int) -> str:
    return NAMESPACE.page(key(i), 0).name


def pages(*numbers: int) -> list[tuple[int, bytes, int, int]]:
    """For messages: page i belongs into row i."""
    return [(n, key(i), i * PAGE, i) for n, i in enumerate(numbers)]


def test_pages_go_and_come() -> None:
    own = Worker(MemoryStore())
    for i in range(3):
        own.rows.write(own.memory, i, *drawn(i))
    own.ask("look", 7, [key(0), key(1)])
    assert own.answers(1) == [("found", 7, [False, False])]
    own.ask("store", 1, pages(0, 1, 2))
    assert own.outcomes(3) == {0: "stored", 1: "stored", 2: "stored"}
    assert [own.store.get(name(i)) for i in range(3)] == [page(i) for i in range(3)]
    own.ask("store", 2, pages(1))
    assert own.outcomes(1) == {0: "known"}
    own.ask("look", 8, [key(0), key(9), key(2)])
    assert own.answers(1) == [("found", 8, [True, False, True])]
    own.memory[:] = 7
    own.ask("load", 3, pages(2, 0))
    assert own.outcomes(2) == {0: "loaded", 1: "loaded"}
    for i in (0, 2):
        identity = NAMESPACE.page(key(i), i * PAGE).identity
        expected = own.codec.decode(page(i), identity=identity)
        for found, values in zip(own.rows.read(own.memory, i), expected, strict=True):
            assert found.tobytes() == values.tobytes()
    assert (own.memory[1] == 7).all()
    own.end()


@pytest.mark.parametrize(
    "fault", ["missing", "flipped", "truncated", "swapped", "moved", "foreign", "empty"]
)
def test_a_bad_page_leaves_its_row_alone(fault: str) -> None:
    """Those before and after it are loaded."""
    good = page(1)
    bad = {
        "flipped": bytes([*good[:200], good[200] ^ 4, *good[201:]]),
        "truncated": good[:-1],
        "swapped": page(2),
        "moved": page_codec().encode(
            *drawn(1), positions=64, identity=NAMESPACE.page(key(1), 64).identity
        ),
        "foreign": page(1, codec=page_codec(b"another's")),
        "empty": b"",
    }
    own = Worker(MemoryStore())
    for i in range(3):
        own.store.put(name(i), page(i))
    own.store.delete(name(1))
    if fault in bad:
        own.store.put(name(1), bad[fault])
    own.memory[:] = 7
    own.ask("load", 1, pages(0, 1, 2))
    expected = "missing" if fault == "missing" else "damaged"
    assert own.outcomes(3) == {0: "loaded", 1: expected, 2: "loaded"}
    assert (own.memory[1] == 7).all()
    assert not own.store.exists(name(1))  # so that it is stored again
    assert own.store.exists(name(0))
    own.end()


class SlowStore(MemoryStore):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def exists(self, name: str) -> bool:
        self._wait()
        return super().exists(name)

    def _get(self, name: str) -> bytes | None:
        self._wait()
        return super()._get(name)

    def _wait(self) -> None:
        assert self.go.wait(60)


def test_what_does_not_come_is_given_up() -> None:
    """And is written nowhere when it comes after all: the row may be another's by then."""
    store = SlowStore()
    own = Worker(store, timeout=0.05)
    for i in range(8):
        store.put(name(i), page(i))
    own.ask("load", 1, pages(*range(8)))  # more than are fetched at a time
    assert set(own.outcomes(8).values()) == {"failed"}
    own.ask("look", 5, [key(0), key(1)])
    assert own.answers(1) == [("found", 5, [False, False])]
    store.go.set()
    own.end()
    for threads in (own.worker._fetches, own.worker._lookups):
        threads.shutdown()
    assert not own.pipe.poll(0)
    assert not own.memory.any()


def test_a_store_that_fails_is_a_miss() -> None:
    class Broken(MemoryStore):
        def exists(self, name: str) -> bool:
            raise OSError("the network is down")

        def _get(self, name: str) -> bytes | None:
            raise MemoryError

    own = Worker(Broken())
    own.ask("look", 1, [key(0)])
    assert own.answers(1) == [("found", 1, [False])]
    own.ask("load", 1, pages(0))
    assert own.outcomes(1) == {0: "failed"}
    own.ask("store", 2, pages(0))
    assert own.outcomes(1) == {0: "dropped"}
    own.end()


def test_loads_go_first_and_what_is_cancelled_is_not_stored() -> None:
    class Gate(MemoryStore):
        """Answers whether it has a page when it is told to."""

        go, asked = threading.Event(), threading.Event()

        def exists(self, name: str) -> bool:
            self.asked.set()
            return self.go.wait(60) and super().exists(name)

    store = Gate()
    own = Worker(store, coders=1)
    for i in range(4):
        own.rows.write(own.memory, i, *drawn(i))
    store.put(name(9), page(9))
    own.ask("store", 1, pages(0, 1, 2, 3))
    assert store.asked.wait(60)  # the first has begun
    own.ask("load", 2, [(0, key(9), 9 * PAGE, 9)])
    own.ask("cancel")
    until(lambda: own.worker._cancelled > 0 and own.worker._work.qsize() == 4)
    store.go.set()
    moved = [(job, index, outcome) for _, job, index, outcome, *_ in own.answers(5)]
    assert moved[:2] == [(1, 0, "stored"), (2, 0, "loaded")]
    assert moved[2:] == [(1, i, "dropped") for i in (1, 2, 3)]
    own.end()


# The scheduler's side, with a process.


@pytest.fixture(scope="module")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tier") / "calibration.safetensors"
    kvtc.testing.tiny_calibration().save(path)
    return path


class Tier:
    """A link, the rows that it shares with its process, and the store."""

    def __init__(self, calibration: Path, folder: Path, most: int = 64) -> None:
        settings = TierSettings.read(
            {"calibration": str(calibration), "store": str(folder), "ratio": 2, "timeout": 60}
        )
        self.rows = rows_of("CPU")
        file = os.memfd_create("rows")
        os.ftruncate(file, COUNT * self.rows.row_bytes)
        digest = kvtc.Calibration.load(calibration).digest
        config = WorkerConfig(settings, digest, self.rows, NAMESPACE, threads=2)
        self.memory = np.frombuffer(mmap.mmap(file, 0), np.uint8).reshape(COUNT, -1)
        self.link = TierLink(config, file, most)
        os.close(file)
        self.store = FileStore(folder)

    def looked_up(self, request: str, own: bytes) -> bool:
        """The answer, some steps later."""
        found: list[bool] = []

        def ask() -> bool:
            answer = self.link.lookup(request, own)
            self.link.flush()
            found.extend([] if answer is None else [answer])
            return answer is not None

        until(ask)
        return found[0]

    def submit(self, kind: str, job: int, *numbers: int, request: str = "a") -> None:
        keys = [key(i) for i in numbers]
        self.link.submit(kind, job, request, keys, np.array(numbers, np.int32), position)

    def done(self, count: int) -> dict[int, Finished]:
        found: dict[int, Finished] = {}
        until(lambda: found.update({x.job: x for x in self.link.finished()}) or len(found) == count)
        return found


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def tier(calibration_file: Path, tmp_path: Path) -> Iterator[Tier]:
    own = Tier(calibration_file, tmp_path / "store")
    yield own
    own.link.close()


def test_through_a_process(tier: Tier) -> None:
    for i in range(4):
        tier.rows.write(tier.memory, i, *drawn(i))
    tier.link.begin("a")
    assert tier.link.lookup("a", key(0)) is None
    assert not tier.looked_up("a", key(0))
    tier.submit("store", 1, 0, 1, 2)
    assert tier.done(1)[1].whole
    assert len(list(tier.store.list(NAMESPACE.prefix))) == 3
    assert tier.link.lookup("a", key(0)) is False  # as it was for this request
    assert tier.looked_up("b", key(0))
    tier.memory[:] = 0
    bad = tier.store.get(name(1))
    assert bad is not None
    tier.store.put(name(1), bad[:-40] + bytes(40))
    assert tier.looked_up("b", key(1))
    tier.submit("load", 2, 0, 1, 2, request="b")
    found = tier.done(1)[2]
    assert not found.whole
    assert sorted(found.keys) == [key(0), key(2)]
    assert not tier.memory[1].any()
    for i in (0, 2):
        k, _ = tier.rows.read(tier.memory, i)
        exact = drawn(i)[0].astype(np.float32)
        assert np.linalg.norm(k.astype(np.float32) - exact) < 0.5 * np.linalg.norm(exact)
    assert tier.link.lookup("b", key(1)) is False  # no second try of what failed
    tier.link.end("b")
    assert not tier.looked_up("c", key(1))  # it was deleted
    counts = tier.link.counts()
    assert {n: counts[f"{n}_pages"] for n in ("stored", "loaded", "damaged")} == {
        "stored": 3,
        "loaded": 2,
        "damaged": 1,
    }
    assert counts["stored_bytes"] > counts["loaded_bytes"] > 0
    assert not tier.link.counts()


def test_a_page_whose_position_is_not_known_is_not_moved(tier: Tier) -> None:
    for kind in ("store", "load"):
        tier.link.submit(kind, 1, "a", [key(0), key(1)], [0, 1], lambda own: None)
        assert tier.done(1)[1] == replace(
            Finished(1, (), False, 0.0), seconds=pytest.approx(0, abs=60)
        )


def test_what_does_not_fit_the_queue_is_left_out(calibration_file: Path, tmp_path: Path) -> None:
    own = Tier(calibration_file, tmp_path / "store", most=4)
    os.kill(own.link._process.pid, signal.SIGSTOP)
    own.submit("store", 1, 0, 1, 2)
    own.submit("store", 2, 3, 4, 5)
    own.submit("store", 3, 6)
    assert [x.job for x in own.link.finished()] == [3]
    os.kill(own.link._process.pid, signal.SIGCONT)
    found = own.done(2)
    assert found[1].whole
    assert found[2].keys == (key(3),)
    own.submit("store", 4, 6)  # there is room again
    assert own.done(1)[4].whole
    assert own.link.counts()["dropped_pages"] == 3
    own.link.close()
    assert sorted(x.name for x in own.store.list()) == sorted(name(i) for i in (0, 1, 2, 3, 6))


def test_to_drain_leaves_no_job(tier: Tier) -> None:
    for job in range(12):
        tier.submit("store", job, *range(job, job + 4))
    tier.link.drain()
    assert len(tier.link.finished()) == 12
    tier.submit("store", 20, 0)
    assert tier.done(1)[20].whole


def test_pages_from_before_a_reset_are_not_found(tier: Tier) -> None:
    tier.submit("store", 1, 0)
    assert tier.done(1)[1].whole
    assert tier.looked_up("a", key(0))
    tier.link.drain()
    tier.link.rename(Namespace({"another": 1}))
    assert not tier.looked_up("b", key(0))
    tier.submit("load", 2, 0)  # what was known before is of no use
    assert not tier.done(1)[2].whole
    tier.submit("store", 3, 0)
    assert tier.done(1)[3].whole
    assert tier.looked_up("c", key(0))


def test_the_process_ends_with_the_schedulers(calibration_file: Path, tmp_path: Path) -> None:
    """However that ends."""
    script = (
        "import os, sys, test_vllm_tier_parts as own; from pathlib import Path\n"
        "tier = own.Tier(*map(Path, sys.argv[1:]))\n"
        "print(tier.link._process.pid, flush=True)\n"
        "os._exit(9)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(calibration_file), str(tmp_path / "store")],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path])),
    )
    assert run.returncode == 9
    until(lambda: not is_running(int(run.stdout)))


def is_running(process: int) -> bool:
    """Nobody waits for it: what has ended may be there as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_waits_is_stored_at_the_end(tier: Tier) -> None:
    tier.submit("store", 1, *range(8))
    tier.link.close()
    assert len(list(tier.store.list())) == 8
    assert tier.link._process.returncode == 0


def test_a_process_that_dies_is_a_miss(tier: Tier, caplog: pytest.LogCaptureFixture) -> None:
    os.kill(tier.link._process.pid, signal.SIGSTOP)
    assert tier.link.lookup("a", key(0)) is None
    tier.link.flush()
    tier.submit("load", 1, 0, 1)
    tier.submit("store", 2, 2)
    os.kill(tier.link._process.pid, signal.SIGKILL)
    found = tier.done(2)
    assert not found[1].whole
    assert not found[2].whole
    until(lambda: tier.link.lookup("a", key(0)) is False)
    assert tier.link.lookup("b", key(5)) is False
    tier.submit("store", 3, 3)
    tier.submit("load", 4, 3)
    assert sorted(x.job for x in tier.link.finished()) == [3, 4]
    tier.link.drain()
    assert "has ended (signal 9)" in caplog.text


def test_a_process_that_does_not_start_says_why(calibration_file: Path, tmp_path: Path) -> None:
    settings = TierSettings.read({"calibration": str(calibration_file), "store": str(tmp_path)})
    config = WorkerConfig(settings, b"another", rows_of(), NAMESPACE, threads=1)
    file = os.memfd_create("rows")
    with pytest.raises(kvtc.UnsupportedError, match="changed while vLLM started"):
        TierLink(config, file, 1)
    os.close(file)


def events(call: Callable[[], Any]) -> int:
    """How much a call does in this thread: functions that it calls, of Python and of C."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # others' callbacks of the collector would be counted
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_calls_take_notes_only(calibration_file: Path, tmp_path: Path) -> None:
    """None waits for the process, which stands still, and none does work for each page."""
    own = Tier(calibration_file, tmp_path / "store", most=10_000)
    os.kill(own.link._process.pid, signal.SIGSTOP)
    counts = []
    for job, size in ((10, 2), (20, 4000)):
        keys, rows = [key(i) for i in range(size)], np.arange(size) % COUNT
        request = f"request {size}"
        for n in range(size - 1):
            own.link.lookup(request, keys[n])
        calls: list[Callable[[], Any]] = [
            partial(own.link.lookup, request, keys[-1]),
            own.link.flush,
            partial(own.link.lookup, request, keys[0]),
            partial(own.link.submit, "load", job, request, keys, rows, position),
            partial(own.link.submit, "store", job + 1, request, keys, rows, position),
            own.link.finished,
            own.link.counts,
            partial(own.link.end, request),
            partial(own.link.begin, request),
        ]
        counts.append([events(call) for call in calls])
    os.kill(own.link._process.pid, signal.SIGCONT)
    assert counts[0] == counts[1]
    assert max(counts[0]) < 40
    own.link.drain()
    assert len(own.link.finished()) == 4
    own.link.close()


def test_only_the_first_page_is_bounded(calibration_file: Path, tmp_path: Path) -> None:
    """By a worker as it is made from settings."""
    options = {"calibration": str(calibration_file), "store": str(tmp_path), "ratio": 2}
    options |= {"error_bound": 1e-6, "bounded": "first"}
    settings, rows = TierSettings.read(options), rows_of()
    assert settings.page_options() != TierSettings.read(options | {"bounded": "all"}).page_options()
    digest = kvtc.Calibration.load(calibration_file).digest
    config = WorkerConfig(settings, digest, rows, NAMESPACE, threads=2)
    file = os.memfd_create("rows")
    os.ftruncate(file, COUNT * rows.row_bytes)
    memory = np.frombuffer(mmap.mmap(file, 0), np.uint8).reshape(COUNT, -1)
    for i in range(3):
        rows.write(memory, i, *drawn(i))
    pipe, other = Pipe()
    worker = worker_of(config, other, file)
    os.close(file)
    thread = threading.Thread(target=lambda: worker.serve() and worker.close())
    thread.start()
    pipe.send(("store", 1, pages(0, 1, 2)))
    pipe.send(("close",))
    thread.join(60)
    assert not thread.is_alive()
    codec = kvtc.Codec(kvtc.testing.tiny_calibration(), ratio=2, block_tokens=PAGE, backend="cpu")
    reader = kvtc.PageCodec(codec, dtype="bfloat16", key=digest)
    found = []
    for i in range(3):
        data = FileStore(tmp_path).get(name(i))
        assert data is not None
        own = NAMESPACE.page(key(i), i * PAGE)
        found.append(len(reader.checked(data, identity=own.identity).verbatim_tokens))
    assert found == [PAGE, 0, 0]


def test_settings() -> None:
    found = TierSettings.read({"calibration": "c", "store": "s", "ratio": 8, "threads": 2})
    assert found.codec_options() == {"preset": "default", "ratio": 8, "error_bound": 0.5}
    assert (found.threads, found.locality) == (2, None)
    for wrong, message in (
        ({}, "the secondary tier lacks 'calibration'; give it calibration and store$"),
        ({"calibration": "c", "store": "s", "page_tokens": 8}, "KvtcTier knows calibration"),
        ({"calibrate": "c"}, "the secondary tier has 'calibrate'"),
        ({"calibration": "c", "store": "s", "bounded": "last"}, "'all' or 'first', found 'last'"),
        ({"calibration": "c", "store": "s", "threads": "2"}, "tier: threads is '2', expected int"),
    ):
        with pytest.raises(ValueError, match=message):
            TierSettings.read(wrong)
