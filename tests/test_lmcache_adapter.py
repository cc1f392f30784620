"""The L2 adapter for LMCache, asked as LMCache's controllers ask it."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from lmcache_host import Driver, Memory, filled, lmcache_host, woken
from real_sample import RealSample, load_real_sample

import kvtc_stream as kvtc
from kvtc_stream.integrations.lmcache.settings import AdapterSettings
from kvtc_stream.integrations.lmcache.tasks import Tasks

SIZE = 32


@pytest.fixture(scope="module")
def host() -> Iterator[Any]:
    with lmcache_host() as found:
        yield found


@pytest.fixture(scope="module")
def calibration_path(real_sample: RealSample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(real_sample, tmp_path_factory.mktemp("lmcache") / "real.safetensors")


def calibrated(sample: RealSample, path: Path, tokens: int | None = None) -> Path:
    calibrator = kvtc.Calibrator(sample.geometry, bases=["joint"], sinks=0)
    calibrator.update(sample.k[:, :, :tokens], sample.v[:, :, :tokens])
    calibrator.finish().save(path)
    return path


@pytest.fixture
def make(host: Any, calibration_path: Path, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """An adapter, with settings of the test's own beside those that are needed."""
    made: list[Driver] = []

    def new(**given: Any) -> Driver:
        params = {"calibration": str(calibration_path), "store": str(tmp_path / "pages")}
        made.append(Driver(host, {**params, "ratio": 3, **given}))
        return made[-1]

    yield new
    for driver in made:
        driver.adapter.close()


@pytest.fixture
def keys(host: Any) -> Callable[..., list[Any]]:
    def of(*numbers: int, **given: Any) -> list[Any]:
        own = {"model_name": "a/model", "kv_rank": 0x01000100, **given}
        return [host.ObjectKey(chunk_hash=bytes([i]) * 32, **own) for i in numbers]

    return of


def chunks(sample: RealSample, count: int, **given: Any) -> list[Memory]:
    return [filled(sample, i * SIZE, SIZE, **given) for i in range(count)]


def empty(like: Memory, count: int) -> list[Memory]:
    return [Memory(torch.full_like(like.tensor, 7)) for _ in range(count)]


def untouched(memory: Memory) -> bool:
    return bool((memory.tensor == 7).all())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def error_of(found: Memory, expected: Memory) -> float:
    a, b = found.tensor.float(), expected.tensor.float()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_chunks_come_back(
    make: Any, keys: Any, real_sample: RealSample, tmp_path: Path, fused: bool
) -> None:
    """As the library codes them at their positions, which were found."""
    driver, own = make(), chunks(real_sample, 3, fused=fused)
    result = driver.store(keys(0, 1, 2), own)
    sizes = [path.stat().st_size for path in files(tmp_path / "pages")]
    assert result.is_successful()
    assert result.bytes_transferred() == sum(sizes)
    assert sum(sizes) < 3 * own[0].tensor.nbytes / 2.5
    assert driver.lookup(keys(0, 1, 2, 3), own[0]) == [True, True, True, False]
    found = empty(own[0], 4)
    assert driver.load(keys(2, 0, 1, 3), found) == [True, True, True, False]
    assert untouched(found[3])
    pages = kvtc.PageCodec(
        kvtc.Codec(
            kvtc.Calibration.load(driver.adapter._settings.calibration),
            block_tokens=SIZE,
            ratio=3,
            error_bound=0.5,
        ),
        dtype="bfloat16",
    )
    for i, memory in zip((2, 0, 1), found, strict=False):
        assert 0 < error_of(memory, own[i]) < 0.35
        k, v = driver.adapter._chunks.read(own[i])
        expected = pages.decode(pages.encode(k, v, positions=i * SIZE))
        for a, b in zip(driver.adapter._chunks.read(memory), expected, strict=True):
            assert torch.equal(a, torch.from_dlpack(b))
    assert driver.store(keys(0, 1), own[:2]).bytes_transferred() == 0  # they are there
    status = driver.adapter.report_status()
    assert status["is_healthy"]
    assert (status["coded"], status["decoded"]) == (3, 3)


def test_tasks_beside_one_another(make: Any, keys: Any, real_sample: RealSample) -> None:
    """Descriptors are three, numbers are unique, results are given once and to whom they belong."""
    driver, own = make(), chunks(real_sample, 4)
    adapter = driver.adapter
    descriptors = {
        adapter.get_store_event_fd(),
        adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    }
    assert len(descriptors) == 3
    tasks = [adapter.submit_store_task(keys(i), [own[i]]) for i in range(4)]
    results: dict[int, Any] = {}
    while len(results) < 4:
        woken(adapter.get_store_event_fd())
        results |= adapter.pop_completed_store_tasks()
    assert set(results) == set(tasks)
    targets = empty(own[0], 5)
    loads = [adapter.submit_load_task(keys(i), [targets[i]]) for i in range(5)]
    assert len({*tasks, *loads}) == 9
    found: dict[int, bool] = {}
    while len(found) < 5:
        woken(adapter.get_load_event_fd())
        for i, task in enumerate(loads):
            if (bitmap := adapter.query_load_result(task)) is not None:
                found[i] = bitmap.test(0)
    assert found == {0: True, 1: True, 2: True, 3: True, 4: False}
    assert driver.load([], []) == []
    assert driver.store([], []).is_successful()


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_a_restarted_server_finds_what_was_stored(
    make: Any, keys: Any, real_sample: RealSample, tmp_path: Path, scheme: str
) -> None:
    """In a folder, and by whatever fsspec reaches."""
    own, store = chunks(real_sample, 3), f"{scheme}{tmp_path}/pages"
    make(store=store).store(keys(0, 1, 2), own)
    assert len(files(tmp_path / "pages")) == 3
    driver, found = make(store=store), empty(own[0], 3)
    assert driver.lookup(keys(0, 1, 2), own[0]) == [True] * 3
    assert driver.load(keys(0, 1, 2), found) == [True] * 3
    for a, b in zip(found, own, strict=True):
        assert error_of(a, b) < 0.35


def test_whoever_differs_finds_nothing(
    make: Any,
    keys: Any,
    real_sample: RealSample,
    calibration_path: Path,
    tmp_path: Path,
) -> None:
    """Hash, model, rank, group of layers, tenant; element type, size; calibration, codec, key,
    vLLM's CPU backend. Nobody touches what others have stored."""
    driver, own = make(), chunks(real_sample, 1)
    driver.store(keys(0), own)
    there = files(tmp_path / "pages")

    def misses(driver: Driver, key: list[Any], like: Memory) -> None:
        assert driver.lookup(key, like) == [False]
        target = empty(like, 1)
        assert driver.load(key, target) == [False]
        assert untouched(target[0])

    for given in (
        {"model_name": "b/model"},
        {"kv_rank": 0x02000200},
        {"kv_rank": 0x02010201},
        {"object_group_id": 1},
        {"cache_salt": "tenant"},
    ):
        misses(driver, keys(0, **given), own[0])
    misses(driver, keys(1), own[0])
    misses(driver, keys(0), filled(real_sample, 0, SIZE, dtype=torch.float16))
    misses(driver, keys(0), filled(real_sample, 0, SIZE // 2))
    secret, other = tmp_path / "secret", tmp_path / "other.safetensors"
    secret.write_bytes(b"a secret of 16 or more")
    calibrated(real_sample, other, -SIZE)
    for given in (
        {"ratio": 4},
        {"bounded": "first"},
        {"error_bound": 0.4},
        {"calibration": str(other)},
        {"key_file": str(secret)},
        {"cpu_block_tokens": 16},
    ):
        misses(make(**given), keys(0), own[0])
    assert files(tmp_path / "pages") == there
    assert driver.find(keys(0), own[0]) == [True]


def test_damaged_chunks_are_missed_and_stored_again(
    make: Any, keys: Any, real_sample: RealSample, tmp_path: Path
) -> None:
    """Whatever was done to a file: others of the load come, and no memory is touched."""
    driver, own = make(), chunks(real_sample, 3)
    folder = tmp_path / "pages"
    driver.store(keys(0), own[:1])
    (first,) = files(folder)
    driver.store(keys(1, 2), own[1:])
    whole, another = first.read_bytes(), files(folder)[-1 if files(folder)[0] == first else 0]
    step = max(1, len(whole) // 12)
    damages = [
        b"",
        whole[:-1],
        whole[: len(whole) // 2],
        another.read_bytes(),
        bytes(len(whole)),
        *(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :] for i in range(0, len(whole), step)),
    ]
    for damaged in damages:
        first.write_bytes(damaged)
        assert driver.lookup(keys(0, 1, 2), own[0]) == [True] * 3
        found = empty(own[0], 3)
        assert driver.load(keys(0, 1, 2), found) == [False, True, True]
        driver.adapter.submit_unlock(keys(0, 1, 2))
        assert untouched(found[0])
        assert not first.exists()
        assert driver.store(keys(0, 1, 2), own).bytes_transferred() == len(whole)
        assert first.read_bytes() == whole
    assert driver.adapter.report_status()["refused"] == len(damages)


def test_unsure_chunks_are_left_out(
    make: Any, keys: Any, real_sample: RealSample, caplog: pytest.LogCaptureFixture
) -> None:
    """Others of the task are stored; the log says what to do, once aloud."""
    caplog.set_level(logging.INFO, "kvtc_stream.integrations.lmcache.adapter")
    driver, own = make(), chunks(real_sample, 2)
    between = [filled(real_sample, i, SIZE) for i in (5, 7)]
    result = driver.store(keys(0, 8, 9, 1), [own[0], *between, own[1]])
    assert result.is_successful()
    assert driver.find(keys(0, 8, 9, 1), own[0]) == [True, False, False, True]
    assert driver.adapter.report_status()["left_out_unsure"] == 2
    said = [r.levelno for r in caplog.records if "does not tell its position" in r.message]
    assert said == [logging.WARNING, logging.INFO]
    near = make(store="memory://near", max_tokens=SIZE)
    near.store(keys(0, 1), own)
    assert near.find(keys(0, 1), own[0]) == [True, False]


class Listener:
    """What LMCache knows of the store."""

    def __init__(self) -> None:
        self.there: dict[Any, int] = {}
        self.accessed: Counter[Any] = Counter()

    def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        assert not set(keys) & set(self.there), "stored twice"
        self.there.update(zip(keys, sizes, strict=True))

    def on_l2_keys_accessed(self, keys: list[Any]) -> None:
        self.accessed.update(keys)

    def on_l2_keys_deleted(self, keys: list[Any]) -> None:
        for key in keys:
            del self.there[key]


def test_budget(make: Any, keys: Any, real_sample: RealSample, tmp_path: Path) -> None:
    """What was used longest ago goes, what is locked goes last, and LMCache is told."""
    own = chunks(real_sample, 4)
    sizes = [make(store=f"memory://size {i}").store(keys(i), [own[i]]).bytes_transferred()
             for i in range(4)]  # fmt: skip
    budget = sum(sizes[:3]) + sizes[3] // 2
    driver, listener = make(budget_gb=budget / 1e9), Listener()
    driver.adapter.register_listener(listener)

    def age() -> None:
        for path in files(tmp_path / "pages"):
            status = path.stat()
            os.utime(path, (status.st_atime, status.st_mtime - 100))

    for i in range(3):
        driver.store(keys(i, cache_salt=f"tenant {i}"), [own[i]])
        age()
    zero, one, two = (keys(i, cache_salt=f"tenant {i}")[0] for i in range(3))
    assert list(listener.there) == [zero, one, two]
    assert driver.lookup([zero], own[0]) == [True]  # locked, and used now
    age()
    assert driver.find([one], own[0]) == [True]  # used now
    age()
    driver.store(keys(3), [own[3]])
    assert set(listener.there) == {zero, one, *keys(3)}
    assert driver.find([zero, one, two, *keys(3)], own[0]) == [True, True, False, True]
    assert sum(listener.there.values()) == sum(p.stat().st_size for p in files(tmp_path / "pages"))
    assert driver.adapter.get_usage().total_bytes_used == sum(listener.there.values())
    assert dict(driver.adapter.get_usage().bytes_by_cache_salt) == {
        key.cache_salt: size for key, size in listener.there.items()
    }
    # Only what is locked is left at the end, for as long as the budget has room for it.
    age()
    for i in (4, 5, 6, 7):
        driver.store(keys(i), [own[1]])
        age()
        assert sum(p.stat().st_size for p in files(tmp_path / "pages")) <= budget
    assert driver.find([zero], own[0]) == [True]
    found = empty(own[0], 1)
    assert driver.load([zero], found) == [True]
    assert listener.accessed == {zero: 1}
    driver.adapter.submit_unlock([zero])
    age()
    for i in (8, 9, 10):
        driver.store(keys(i), [own[1]])
        age()
    assert driver.find([zero], own[0]) == [False]
    small = make(budget_gb=1e-6, store="memory://small")
    assert small.store(keys(0), own[:1]).is_successful()
    assert small.adapter.report_status()["left_out_large"] == 1
    assert small.find(keys(0), own[0]) == [False]


def test_delete(make: Any, keys: Any, real_sample: RealSample) -> None:
    """What is locked stays; what was deleted is told of once."""
    driver, own, listener = make(), chunks(real_sample, 2), Listener()
    driver.adapter.register_listener(listener)
    driver.store(keys(0, 1), own)
    assert driver.lookup(keys(0), own[0]) == [True]
    driver.adapter.delete(keys(0, 1, 2))
    assert list(listener.there) == keys(0)
    assert driver.find(keys(0, 1), own[0]) == [True, False]
    driver.adapter.submit_unlock(keys(0, 1))
    driver.adapter.delete(keys(0, 1))
    assert listener.there == {}
    assert driver.find(keys(0), own[0]) == [False]


def test_two_adapters_over_one_folder(
    make: Any, keys: Any, real_sample: RealSample, tmp_path: Path
) -> None:
    one, two, own = make(), make(), chunks(real_sample, 2)
    listener = Listener()
    one.adapter.register_listener(listener)
    threads = [threading.Thread(target=d.store, args=(keys(0, 1), own)) for d in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files(tmp_path / "pages")) == 2
    for driver in (one, two):
        found = empty(own[0], 2)
        assert driver.lookup(keys(0, 1), own[0]) == [True] * 2
        assert driver.load(keys(0, 1), found) == [True] * 2
    two.adapter.submit_unlock(keys(0, 1))
    two.adapter.delete(keys(0))  # the other's lock holds in its process alone
    assert one.load(keys(0, 1), empty(own[0], 2)) == [False, True]
    assert not set(keys(0)) & set(listener.there)
    one.adapter.submit_unlock(keys(0, 1))
    assert one.find(keys(0, 1), own[0]) == [False, True]
    assert one.store(keys(0, 1), own).bytes_transferred() > 0
    two.adapter.delete(keys(0))
    assert one.store(keys(0), own[:1]).is_successful()  # which its listener hears of once
    assert two.find(keys(0, 1), own[0]) == [True, True]


def test_a_store_that_fails(
    make: Any, keys: Any, real_sample: RealSample, caplog: pytest.LogCaptureFixture
) -> None:
    """Is a task that failed, and misses; never an error, and said once for each task."""
    driver, own = make(), chunks(real_sample, 2)
    driver.store(keys(0), own[:1])
    store = driver.adapter._store
    with pytest.MonkeyPatch.context() as patched:
        for name in ("get", "put", "exists"):
            patched.setattr(store, name, lambda *_: (_ for _ in ()).throw(OSError("broken")))
        assert not driver.store(keys(0, 1), own).is_successful()
        assert driver.lookup(keys(0, 1), own[0]) == [False, False]
        found = empty(own[0], 2)
        assert driver.load(keys(0, 1), found) == [False, False]
        assert untouched(found[0])
    assert [r.getMessage() for r in caplog.records if r.exc_info] == ["2 of 2 chunks failed"] * 3
    assert not store.held(files_name(driver))
    assert driver.find(keys(0, 1), own[0]) == [True, False]


def files_name(driver: Driver) -> str:
    return next(entry.name for entry in driver.adapter._store.list())


def test_late_chunks(make: Any, keys: Any, real_sample: RealSample) -> None:
    """Whose memory LMCache may have given to others are not stored; nor is any written late."""
    own = chunks(real_sample, 2)
    make().store(keys(0), own[:1])
    late = make(timeout=0)
    assert late.store(keys(1), own[1:]).is_successful()
    assert late.lookup(keys(0, 1), own[0]) == [True, False]
    found = empty(own[0], 1)
    assert late.load(keys(0), found) == [False]
    assert untouched(found[0])
    assert late.adapter.report_status()["left_out_late"] == 2
    slow = make(timeout=0.5)
    pages = slow.adapter._chunks.pages_of(own[1])
    encode = pages.encode

    def waits(*args: Any) -> bytes:
        page: bytes = encode(*args)
        time.sleep(0.6)
        return page

    pages.encode = waits
    slow.store(keys(1), own[1:])
    assert slow.find(keys(1), own[1]) == [False]


def test_close_waits_for_what_is_coded(
    host: Any, calibration_path: Path, keys: Any, real_sample: RealSample, tmp_path: Path
) -> None:
    """And leaves out what waits: LMCache gives the memory to others then."""
    params = {"calibration": str(calibration_path), "store": str(tmp_path / "pages"), "ratio": 3}
    driver, own = Driver(host, params), chunks(real_sample, 3)
    pages = driver.adapter._chunks.pages_of(own[0])
    encode, begun, go = pages.encode, threading.Event(), threading.Event()

    def waits(*args: Any) -> bytes:
        begun.set()
        assert go.wait(60)
        page: bytes = encode(*args)
        return page

    pages.encode = waits
    driver.adapter.submit_store_task(keys(0, 1, 2), own)
    assert begun.wait(60)
    closing = threading.Thread(target=driver.adapter.close)
    closing.start()
    time.sleep(0.1)
    assert closing.is_alive()
    go.set()
    closing.join(60)
    assert not closing.is_alive()
    assert files(tmp_path / "pages") == []
    assert driver.adapter._store.watchers == []


def test_a_chunk_that_was_read_otherwise_is_another(
    make: Any, keys: Any, real_sample: RealSample, tmp_path: Path
) -> None:
    """vLLM's CPU backend keeps K transposed, which its chunks do not show."""
    own = filled(real_sample, 0, SIZE)
    layers, heads, dim = real_sample.k.shape[0], *real_sample.k.shape[1::2]
    scrambled = Memory(torch.empty_like(own.tensor))
    parts = own.tensor.view(layers, SIZE // 16, 16, heads, 2, dim).permute(4, 0, 1, 3, 2, 5)
    blocks = torch.cat(
        [parts[0].transpose(-1, -2).reshape(layers, SIZE // 16, heads, -1),
         parts[1].reshape(layers, SIZE // 16, heads, -1)], dim=-1
    )  # fmt: skip
    rows = blocks.view(layers, SIZE // 16, heads, 16, 2 * dim).transpose(2, 3)
    scrambled.tensor.copy_(rows.reshape(scrambled.tensor.shape))
    plain, cpu = make(), make(cpu_block_tokens=16)
    plain.store(keys(0), [scrambled])
    assert files(tmp_path / "pages") == []
    cpu.store(keys(0), [scrambled])
    assert plain.find(keys(0), own) == [False]
    found = empty(own, 1)
    assert cpu.load(keys(0), found) == [True]
    assert error_of(found[0], scrambled) < 0.35


def test_what_is_not_served(
    make: Any, host: Any, keys: Any, real_sample: RealSample, caplog: pytest.LogCaptureFixture
) -> None:
    driver, own = make(), filled(real_sample, 0, SIZE)
    others = {
        "leave out its serde": Memory(torch.zeros(100, dtype=torch.uint8)),
        "the chunk has layers": Memory(torch.cat([own.tensor, own.tensor[:1]])),
        "cache is float8": Memory(own.tensor.to(torch.float8_e4m3fn)),
        "LMCache": Memory(torch.zeros(4, 3, SIZE, 7, dtype=torch.bfloat16)),
    }
    for said, memory in others.items():
        caplog.clear()
        assert not driver.store(keys(0), [memory]).is_successful()
        assert said in caplog.text
        assert driver.lookup(keys(0), memory) == [False]
        assert driver.load(keys(0), [memory]) == [False]
    task = driver.adapter.submit_lookup_and_lock_task(keys(0), {})
    woken(driver.adapter.get_lookup_and_lock_event_fd())
    assert not driver.adapter.query_lookup_and_lock_result(task).test(0)
    for params, said in (
        ({}, "adapter_params lacks 'calibration'"),
        ({"calibration": "c"}, "adapter_params lacks 'store'"),
        ({"calibration": "c", "store": "s", "max_bytes": 1}, "has 'max_bytes'; KvtcAdapter knows"),
        ({"calibration": "c", "store": "s", "timeout": "x"}, "timeout is 'x', expected float"),
    ):
        with pytest.raises(ValueError, match=said):
            host.KvtcAdapter(params)


def test_tasks_end_in_order() -> None:
    """With whatever their parts gave, and none for those that raised."""

    class Notifier:
        signs = 0

        def fileno(self) -> int:
            return 5

        def notify(self) -> None:
            self.signs += 1

        def close(self) -> None:
            self.signs = -1

    notifier = Notifier()
    tasks: Tasks[list[Any]] = Tasks("test", 3, notifier)
    ended: list[int] = []

    def part(x: float) -> float:
        time.sleep(0.02 * x)
        return 1 / x

    def end(task: int) -> Callable[[list[Any]], list[Any]]:
        return lambda outcomes: [ended.append(task), *outcomes][1:]

    for task, xs in enumerate([[5.0, 0.0, 1.0], [1.0], [], [0.5, 2.0]]):
        tasks.begin(task, part, [(x,) for x in xs], end(task))
    deadline = time.monotonic() + 30
    while len(ended) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == [0, 1, 2, 3]
    while notifier.signs < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tasks.fileno() == 5
    assert tasks.take(0) == [0.2, None, 1.0]
    assert tasks.take(0) is None
    assert tasks.take_all() == {1: [1.0], 2: [], 3: [2.0, 0.5]}
    tasks.close()
    assert notifier.signs == -1


def test_settings() -> None:
    given = {"calibration": "c", "store": "s", "budget_gb": 2, "max_tokens": 8, "timeout": 5}
    found = AdapterSettings.read(given)
    assert (found.budget, found.max_tokens, found.timeout) == (2_000_000_000, 8, 5)


class Server(RuleBasedStateMachine):
    """Whatever happens to a folder, a chunk that is loaded has its own values, and what is locked,
    whole and within the budget is loaded."""

    NUMBERS = st.integers(0, 3)
    SALTS = st.sampled_from(["", "tenant"])

    @initialize(room=st.sampled_from([1.2, 2.5, 4.0, None]))
    def start(self, room: float | None) -> None:
        self._host = _of_machine["host"]
        self._own = _of_machine["chunks"]
        self._decoded: dict[int, torch.Tensor] = _of_machine["decoded"]
        largest = max(_of_machine["sizes"])
        self._budget = None if room is None else int(room * largest)
        self._folder = _of_machine["folders"] / str(next(_of_machine["numbers"]))
        self._locked: Counter[Any] = Counter()
        self._damaged: set[Path] = set()
        self._open()

    def _open(self) -> None:
        params = {"calibration": _of_machine["calibration"], "store": str(self._folder), "ratio": 3}
        if self._budget is not None:
            params["budget_gb"] = self._budget / 1e9
        self._driver, self._listener = Driver(self._host, params), Listener()
        self._driver.adapter.register_listener(self._listener)

    def _key(self, number: int, salt: str) -> Any:
        return self._host.ObjectKey(bytes([number]) * 32, "a/model", 0x01000100, 0, salt)

    @rule(number=NUMBERS, salt=SALTS)
    def store(self, number: int, salt: str) -> None:
        assert self._driver.store([self._key(number, salt)], [self._own[number]]).is_successful()

    @rule(number=NUMBERS, salt=SALTS)
    def lock(self, number: int, salt: str) -> None:
        key = self._key(number, salt)
        if self._driver.lookup([key], self._own[0]) == [True]:
            self._locked[key] += 1

    @rule(number=NUMBERS, salt=SALTS)
    def unlock(self, number: int, salt: str) -> None:
        key = self._key(number, salt)
        if self._locked[key]:
            self._driver.adapter.submit_unlock([key])
            self._locked[key] -= 1

    @rule(number=NUMBERS, salt=SALTS)
    def load(self, number: int, salt: str) -> None:
        key, target = self._key(number, salt), empty(self._own[0], 1)
        if self._driver.load([key], target) == [True]:
            assert torch.equal(target[0].tensor, self._decoded[number])
        else:
            assert untouched(target[0])
            assert self._driver.find([key], self._own[0]) == [False]

    @rule(number=NUMBERS, salt=SALTS)
    def forget(self, number: int, salt: str) -> None:
        key = self._key(number, salt)
        self._driver.find([key], self._own[0])  # by which a new server meets the layout
        self._driver.adapter.delete([key])
        if not self._locked[key]:
            assert self._driver.find([key], self._own[0]) == [False]

    @rule(which=st.integers(0, 7), place=st.floats(0, 1, exclude_max=True), cut=st.booleans())
    def damage(self, which: int, place: float, cut: bool) -> None:
        if there := files(self._folder):
            path = there[which % len(there)]
            data = bytearray(path.read_bytes())
            if data:
                i = int(place * len(data))
                data[i] ^= 1
                path.write_bytes(data[:i] if cut else data)

    @rule(one=st.integers(0, 7), two=st.integers(0, 7))
    def swap(self, one: int, two: int) -> None:
        if there := files(self._folder):
            a, b = there[one % len(there)], there[two % len(there)]
            x, y = a.read_bytes(), b.read_bytes()
            a.write_bytes(y)
            b.write_bytes(x)

    @rule()
    def restart(self) -> None:
        self._driver.adapter.close()
        self._locked.clear()
        self._open()

    @invariant()
    def within_the_budget(self) -> None:
        held = sum(path.stat().st_size for path in files(self._folder))
        assert self._budget is None or held <= self._budget

    @invariant()
    def lmcache_knows_no_more_than_is_there(self) -> None:
        there = list(self._listener.there)
        assert self._driver.find(there, self._own[0]) == [True] * len(there)

    def teardown(self) -> None:
        if hasattr(self, "_driver"):
            self._driver.adapter.close()


#: What the machine's runs share.
_of_machine: dict[str, Any] = {}


def test_whatever_happens(host: Any, calibration_path: Path, tmp_path: Path) -> None:
    own = chunks(load_real_sample(), 4)
    params = {"calibration": str(calibration_path), "store": str(tmp_path / "first"), "ratio": 3}
    driver, decoded, sizes = Driver(host, params), {}, []
    for i, memory in enumerate(own):
        key = host.ObjectKey(bytes([i]) * 32, "a/model", 0x01000100)
        sizes.append(driver.store([key], [memory]).bytes_transferred())
        target = empty(memory, 1)
        assert driver.load([key], target) == [True]
        decoded[i] = target[0].tensor
    driver.adapter.close()
    _of_machine.update(
        host=host,
        chunks=own,
        decoded=decoded,
        sizes=sizes,
        calibration=str(calibration_path),
        folders=tmp_path,
        numbers=itertools.count(),
    )
    run_state_machine_as_test(Server, settings=settings(stateful_step_count=30))
