"""The parts of the vLLM connector, with an engine that is a stand-in; ``test_vllm.py`` has a real
one."""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvtc_stream as kvtc
from kvtc_stream.integrations.hosts import layouts
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.hosts.layouts import VLLM_LAYOUTS
from kvtc_stream.integrations.hosts.store import MemoryStore, Store
from kvtc_stream.integrations.vllm import rotary, support
from kvtc_stream.integrations.vllm.blocks import Blocks, proven_layout, slotted
from kvtc_stream.integrations.vllm.counts import Counter
from kvtc_stream.integrations.vllm.learning import LearnSink, calibrator_of
from kvtc_stream.integrations.vllm.scheduling import PageJob, PageScheduler, StepPlan
from kvtc_stream.integrations.vllm.settings import Settings
from kvtc_stream.integrations.vllm.sink import StoreSink
from kvtc_stream.integrations.vllm.transfer import PageTransfer, one_blas_thread
from kvtc_stream.io import threads

BLOCK, PAGE = 4, 8


class Rotary:
    """A rotary module as vLLM makes them: a table in float32, used in the model's dtype."""

    is_neox_style = True

    def __init__(self, frequencies: Any, scale: float, dtype: Any, bend: float = 0.0) -> None:
        self.frequencies, self.scale, self.bend = np.asarray(frequencies), scale, bend
        self.cos_sin_cache = self._compute_cos_sin_cache().to(dtype)

    def _compute_cos_sin_cache(self) -> Any:
        places = np.arange(8192)[:, None]
        angles = places * (self.frequencies + self.bend * (places > 4096))
        table = self.scale * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return torch.from_numpy(table.astype(np.float32))


class LongRotary(Rotary):
    """One that asks for more before it makes its table."""

    def _compute_cos_sin_cache(self, factor: float | None = None) -> Any:
        if factor is None and hasattr(self, "cos_sin_cache"):
            raise TypeError("missing a required argument: 'factor'")
        return super()._compute_cos_sin_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1.0049, 1.138])
def test_the_rotary_table_that_a_model_uses(dtype: Any, scale: float) -> None:
    frequencies = [1.0, 0.31, 0.004, 2e-6]
    rope = rotary._rope(Rotary(frequencies, scale, dtype))
    np.testing.assert_allclose(rope.inv_freq, frequencies, rtol=1e-6)
    assert rope.scale == pytest.approx(scale, abs=1e-6)
    rotary.check_rope(rope, kvtc.Rope(tuple(frequencies), scale=scale))
    others = [kvtc.Rope((1.0, 0.31, 0.004, 3e-6), scale=scale), kvtc.Rope((1.0,), scale=scale)]
    for other in [*others, kvtc.Rope(tuple(frequencies), scale=2 * scale), None]:
        with pytest.raises(kvtc.CalibrationMismatchError, match="the served model turns keys by"):
            rotary.check_rope(rope, other)


def test_rotary_tables_that_are_not_known_are_refused() -> None:
    with pytest.raises(kvtc.UnsupportedError, match="Rotary, whose table inverse frequencies"):
        rotary._rope(Rotary([1.0, 0.01], 1.0, torch.float32, bend=1e-4))
    with pytest.raises(kvtc.UnsupportedError, match="LongRotary, whose table is not known"):
        rotary._rope(LongRotary([1.0, 0.01], 1.0, torch.float32))
    with pytest.raises(kvtc.UnsupportedError, match="SimpleNamespace, whose table is not known"):
        rotary._rope(SimpleNamespace())


NAMESPACE = Namespace({"test": 1})


@dataclass
class Request:
    """What the connector asks of vLLM's request."""

    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    lora_request: Any = None
    cache_salt: str | None = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    skip_reading_prefix_cache: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def output(
    new: dict[str, tuple[list[int], int]] | None = None,
    cached: dict[str, tuple[list[int] | None, int]] | None = None,
    scheduled: dict[str, int] | None = None,
    resumed: set[str] | None = None,
    preempted: set[str] | None = None,
) -> Any:
    """A ``SchedulerOutput``: blocks and computed tokens of requests."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=r, block_ids=(b,), num_computed_tokens=n)
            for r, (b, n) in (new or {}).items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached or {}),
            resumed_req_ids=resumed or set(),
            new_block_ids=[None if b is None else (b,) for b, _ in (cached or {}).values()],
            num_computed_tokens=[n for _, n in (cached or {}).values()],
        ),
        num_scheduled_tokens=scheduled or {},
        preempted_req_ids=preempted,
    )


def scheduler(store: Store | None, **options: Any) -> PageScheduler:
    return PageScheduler(NAMESPACE, store, PAGE, BLOCK, **options)


def keys_of(tokens: list[int], root: Any = (None, None)) -> list[str]:
    return [k.name for k in NAMESPACE.chain(list(root), PAGE).extend(tokens)]


def filled(tokens: list[int], **options: Any) -> MemoryStore:
    store = MemoryStore()
    for name in keys_of(tokens, **options):
        store.put(name, b"page")
    return store


def answer(own: PageScheduler, request: Request, computed: int = 0) -> tuple[int | None, bool]:
    for _ in range(500):
        found = own.matched(request, computed)
        if found[0] is not None:
            return found
        time.sleep(0.01)
    raise AssertionError("no answer")


def test_pages_that_a_host_names() -> None:
    """By its own digests, apart from those of other configurations and of chains."""
    page = NAMESPACE.page(b"block hash", 8)
    assert page == NAMESPACE.page(b"block hash", 8)
    assert page.position == 8
    assert page.name.startswith(NAMESPACE.prefix + "/")
    others = [NAMESPACE.page(b"another", 8), Namespace({"test": 2}).page(b"block hash", 8)]
    names = {page.name, *(x.name for x in others), *keys_of(list(range(PAGE)))}
    assert len(names) == 4
    MemoryStore().put(page.name, b"page")  # it is a name that stores take


# The scheduler.


@pytest.mark.parametrize(
    ("tokens", "stored", "computed", "expected"),
    [
        (30, 30, 0, 24),
        (30, 17, 0, 16),
        (30, 7, 0, 0),
        (24, 24, 0, 16),  # one token at least is computed
        (25, 24, 0, 24),
        (7, 7, 0, 0),
        (30, 30, 8, 16),
        (30, 30, 12, 12),  # half a page is in the engine
        (30, 30, 24, 0),
        (30, 16, 20, 0),
    ],
)
def test_whole_pages_are_matched(tokens: int, stored: int, computed: int, expected: int) -> None:
    prompt = list(range(tokens))
    own = scheduler(filled(prompt[:stored]))
    assert answer(own, Request("a", prompt), computed) == (expected, expected > 0)


def test_a_gap_ends_the_match() -> None:
    prompt = list(range(40))
    store = filled(prompt)
    store.delete(keys_of(prompt)[1])
    assert answer(scheduler(store), Request("a", prompt)) == (8, True)


def test_nobody_gets_anothers_pages() -> None:
    prompt = list(range(30))
    store = filled(prompt)
    lora = SimpleNamespace(lora_name="l", lora_path="/nowhere")
    feature = SimpleNamespace(mm_position=SimpleNamespace(offset=2, length=3), identifier="picture")
    for i, other in enumerate(
        (
            Request("a", prompt, cache_salt="tenant"),
            Request("a", prompt, lora_request=lora),
            Request("a", prompt, mm_features=[feature]),
            Request("a", prompt, prompt_embeds=object()),
            Request("a", prompt, skip_reading_prefix_cache=True),
        )
    ):
        assert answer(scheduler(store), other) == (0, False), i
    own = filled(prompt, root=(None, "tenant"))
    assert answer(scheduler(own), Request("a", prompt, cache_salt="tenant")) == (24, True)


class SlowStore(MemoryStore):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def exists(self, name: str) -> bool:
        assert self.go.wait(20)
        return super().exists(name)

    def _get(self, name: str) -> bytes | None:
        assert self.go.wait(20)
        return super()._get(name)


def test_the_scheduler_never_waits() -> None:
    prompt = list(range(30))
    store = SlowStore()
    for name in keys_of(prompt):
        store.put(name, b"page")
    own, request = scheduler(store), Request("a", prompt)
    started = time.perf_counter()
    for _ in range(20):
        assert own.matched(request, 0) == (None, False)
    assert time.perf_counter() - started < 1  # 1 ms each, and a loaded machine
    store.go.set()
    assert answer(own, request) == (24, True)


def test_a_store_that_fails_is_a_miss() -> None:
    class Broken(MemoryStore):
        def exists(self, name: str) -> bool:
            raise OSError("the network is down")

    assert answer(scheduler(Broken()), Request("a", list(range(30)))) == (0, False)


def test_loads_go_into_the_blocks_that_lack_them() -> None:
    prompt = list(range(30))
    own, request = scheduler(filled(prompt)), Request("a", prompt)
    assert answer(own, request, 12) == (12, True)
    own.allocated(request, [5, 3, 9, 7, 2, 8], 12)
    plan = own.step(output())
    assert [(j.blocks, j.first, j.key.position) for j in plan.loads] == [
        ([7], 1, 8),
        ([2, 8], 0, 16),
    ]
    assert [j.key.name for j in plan.loads] == keys_of(prompt)[1:3]
    assert own.step(output()) == StepPlan()  # once
    assert answer(own, request, 0) == (24, True)
    own.allocated(request, [5, 3, 9], 12)  # vLLM may take less
    assert [(j.blocks, j.first) for j in own.step(output()).loads] == [([5, 3], 0), ([9], 0)]
    own.allocated(request, [], 0)
    assert own.step(output()).loads == []


def stored(plan: StepPlan) -> list[tuple[str, int, list[int]]]:
    return [(j.request, j.key.position, j.blocks) for j in plan.stores]


def test_pages_are_stored_as_they_fill() -> None:
    """Chunks of a prompt, then tokens one by one; blocks come in between."""
    own, request = scheduler(MemoryStore()), Request("a", list(range(21)))
    answer(own, request)
    own.allocated(request, [], 0)
    plan = own.step(output(new={"a": ([1, 2, 3], 0)}, scheduled={"a": 10}))
    assert stored(plan) == [("a", 0, [1, 2])]
    plan = own.step(output(cached={"a": ([4, 5, 6], 10)}, scheduled={"a": 11}))
    assert stored(plan) == [("a", 8, [3, 4])]
    for computed in range(21, 24):
        request.all_token_ids.append(computed)
        plan = own.step(output(cached={"a": (None, computed)}, scheduled={"a": 1}))
        assert stored(plan) == ([("a", 16, [5, 6])] if computed == 23 else [])
    request.num_computed_tokens = 24
    assert own.finished(request, [1, 2, 3, 4, 5, 6])
    plan = own.step(output())
    assert plan.held == {"a"}
    assert plan.stores == []
    assert not own.finished(request, [])


def test_tokens_that_are_not_known_yet_wait() -> None:
    """With asynchronous scheduling a step runs before its last token is known."""
    own, request = scheduler(MemoryStore()), Request("a", list(range(7)))
    answer(own, request)
    own.allocated(request, [], 0)
    own.step(output(new={"a": ([1, 2], 0)}, scheduled={"a": 7}))
    plan = own.step(output(cached={"a": (None, 7)}, scheduled={"a": 1}))
    assert stored(plan) == []
    request.all_token_ids.append(7)
    request.num_computed_tokens = 8
    assert own.finished(request, [1, 2])
    assert stored(own.step(output())) == [("a", 0, [1, 2])]


def test_preemption_begins_again() -> None:
    prompt = list(range(20))
    own, request = scheduler(MemoryStore()), Request("a", prompt)
    answer(own, request)
    own.allocated(request, [], 0)
    own.step(output(new={"a": ([1, 2, 3, 4], 0)}, scheduled={"a": 16}))
    plan = own.step(output(preempted={"a"}))
    assert plan.preempted == {"a"}
    answer(own, request)
    own.allocated(request, [], 0)
    plan = own.step(output(cached={"a": ([7, 8, 9], 0)}, resumed={"a"}, scheduled={"a": 12}))
    assert stored(plan) == [("a", 0, [7, 8])]


def test_a_request_that_ends_while_it_loads_stores_nothing() -> None:
    """Its blocks do not hold yet what the engine counts as computed."""
    prompt = list(range(20))
    own, request = scheduler(filled(prompt)), Request("a", prompt)
    assert answer(own, request) == (16, True)
    own.allocated(request, [1, 2, 3, 4], 16)
    own.step(output())
    request.num_computed_tokens = 16
    assert not own.finished(request, [1, 2, 3, 4])
    assert own.step(output()).stores == []


def test_who_only_loads_stores_nothing() -> None:
    own, request = scheduler(MemoryStore(), stores=False), Request("a", list(range(20)))
    answer(own, request)
    own.allocated(request, [], 0)
    assert own.step(output(new={"a": ([1, 2, 3, 4], 0)}, scheduled={"a": 20})).stores == []


# Pages in blocks.


def engine_blocks(device: str = "cpu") -> tuple[Blocks, Tensor]:
    pool = torch.zeros(2, 16, 2, BLOCK, 16, dtype=torch.bfloat16, device=device)
    sizes = {"H": 2, "N": BLOCK, "D": 8}
    return Blocks([VLLM_LAYOUTS[0].views(layer, sizes) for layer in pool]), pool


def drawn(tokens: int = PAGE, seed: int = 0) -> tuple[Tensor, Tensor]:
    geometry = kvtc.testing.tiny_calibration().geometry
    k, v = kvtc.testing.drawn_cache(geometry, tokens, seed=seed, dtype=kvtc.DType.BFLOAT16)
    return tuple(torch.from_dlpack(x.view(kvtc.KVArray)) for x in (k, v))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def codec() -> kvtc.PageCodec:
    own = kvtc.Codec(kvtc.testing.tiny_calibration(), ratio=2, block_tokens=PAGE, backend="cpu")
    return kvtc.PageCodec(own, dtype="bfloat16", key=b"secret")


@dataclass
class Engine:
    """Blocks, a store, and what moves pages between them."""

    blocks: Blocks
    pool: Tensor
    store: Store
    transfer: PageTransfer
    counter: Counter
    codec: kvtc.PageCodec

    def wait(self) -> tuple[set[str], set[str], set[int]]:
        """What is stored and loaded, and which blocks failed, when something is."""
        for _ in range(5000):  # the first page compiles
            saved, loaded = self.transfer.results()
            if saved or loaded:
                return saved, loaded, self.transfer.errors()
            self.transfer.rest(0.02)
        raise AssertionError("nothing happens")


def engine(
    codec: kvtc.PageCodec, store: Store | None = None, timeout: float = 20.0, device: str = "cpu"
) -> Engine:
    store = MemoryStore() if store is None else store
    blocks, pool = engine_blocks(device)
    counter = Counter()
    transfer = PageTransfer(
        blocks,
        StoreSink(store, codec, counter),
        store,
        [codec],
        counter,
        timeout=timeout,
        queue_pages=8,
    )
    return Engine(blocks, pool, store, transfer, counter, codec)


KEYS = NAMESPACE.chain(None, PAGE).extend(list(range(64)))


def jobs(request: str, *blocks: list[int]) -> list[PageJob]:
    return [PageJob(request, KEYS[i], own) for i, own in enumerate(blocks)]


def put(pool: Tensor, blocks: list[int], k: Tensor, v: Tensor) -> None:
    """K and V into some blocks, as the engine would."""
    for i, block in enumerate(blocks):
        own = slice(i * BLOCK, (i + 1) * BLOCK)
        pool[:, block, :, :, :8], pool[:, block, :, :, 8:] = k[:, :, own], v[:, :, own]


def test_blocks_read_what_was_written() -> None:
    blocks, pool = engine_blocks()
    k, v = drawn()
    put(pool, [5, 3], k, v)
    for x, y in zip(blocks.read([5, 3]), (k, v), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(pool[1, 3, :, :, 8:], v[1, :, 4:])
    assert pool[:, [i for i in range(16) if i not in (3, 5)]].eq(0).all()


@pytest.fixture(
    params=[
        "cpu",
        *(
            pytest.param(
                f"cuda:{i}",
                marks=[
                    pytest.mark.gpu,
                    pytest.mark.skipif(
                        torch.cuda.device_count() <= i, reason=f"there is no CUDA device {i}"
                    ),
                ],
            )
            for i in range(2)
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """One that is PyTorch's current one, as a rank's of vLLM is, and not yet CuPy's."""
    if request.param == "cpu":
        yield request.param
        return
    from kvtc_stream.gpu.runtime.streams import on_device

    with torch.cuda.device(request.param):
        yield request.param
    on_device(torch.cuda.current_device())


def test_pages_go_and_come(codec: kvtc.PageCodec, device: str) -> None:
    if device != "cpu":
        own_codec = kvtc.Codec(
            kvtc.testing.tiny_calibration(), ratio=2, block_tokens=PAGE, backend="cuda"
        )
        codec = kvtc.PageCodec(own_codec, dtype="bfloat16", key=b"secret")
    own = engine(codec, device=device)
    k, v = (x.to(device) for x in drawn(2 * PAGE))
    put(own.pool, [1, 2, 3, 4], k, v)
    own.transfer.store(jobs("a", [1, 2], [3, 4]))
    own.transfer.hold({"a"})
    assert own.wait() == ({"a"}, set(), set())
    pages = [own.store.get(key.name) for key in KEYS[:2]]
    assert pages[0] == codec.encode(
        k[:, :, :PAGE], v[:, :, :PAGE], positions=0, identity=KEYS[0].identity
    )
    own.transfer.load([*jobs("b", [9, 8], [7, 6]), PageJob("c", KEYS[1], [11], 1)])
    done: set[str] = set()
    while done != {"b", "c"}:
        _, loaded, errors = own.wait()
        done |= loaded
        assert not errors
    found_k, _ = own.blocks.read([9, 8, 7, 6])
    expected = torch.cat(
        [
            torch.from_dlpack(codec.decode(p, identity=key.identity)[0])
            for p, key in zip(pages, KEYS, strict=False)
        ],  # type: ignore[arg-type]
        dim=2,
    )
    assert torch.equal(found_k, expected)
    assert torch.equal(own.blocks.read([11])[0], expected[:, :, 12:])
    counts = own.counter.take()
    assert (counts.stored_pages, counts.loaded_pages) == (2, 3)
    assert counts.stored_cache_bytes == k.nbytes + v.nbytes
    own.transfer.store(jobs("d", [1, 2]))  # it is there already
    own.transfer.hold({"d"})
    own.wait()
    assert own.counter.take().known_pages == 1
    own.transfer.close()


@pytest.mark.parametrize(
    "fault", ["missing", "flipped", "truncated", "swapped", "foreign", "empty"]
)
@pytest.mark.parametrize("store", ["at once", "alone", "slow"])
def test_a_bad_page_and_those_after_it_are_computed(
    codec: kvtc.PageCodec, fault: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether threads fetch pages or not, and whether the one that decodes them does it all."""
    monkeypatch.setattr(MemoryStore, "at_once", store != "slow")
    own = engine(codec)
    own.transfer._alone = store == "alone"
    k, v = drawn(3 * PAGE)
    pages = [
        codec.encode(
            k[:, :, i * PAGE : (i + 1) * PAGE],
            v[:, :, i * PAGE : (i + 1) * PAGE],
            positions=i * PAGE,
            identity=KEYS[i].identity,
        )
        for i in range(3)
    ]
    bad = {
        "flipped": bytes([*pages[1][:200], pages[1][200] ^ 4, *pages[1][201:]]),
        "truncated": pages[1][:-1],
        "swapped": pages[2],
        "foreign": kvtc.PageCodec(
            kvtc.Codec(kvtc.testing.tiny_calibration(), ratio=2, block_tokens=PAGE),
            dtype="bfloat16",
            key=b"another's",
        ).encode(k[:, :, 8:16], v[:, :, 8:16], positions=8, identity=KEYS[1].identity),
        "empty": b"",
    }
    for key, page in zip(KEYS, [pages[0], bad.get(fault, b""), pages[2]], strict=False):
        own.store.put(key.name, page)
    if fault == "missing":
        own.store.delete(KEYS[1].name)
    own.transfer.load(jobs("a", [1, 2], [3, 4], [5, 6]))
    assert own.wait() == (set(), {"a"}, {3, 4, 5, 6})
    assert not own.store.exists(KEYS[1].name)  # so that it is stored again
    assert own.store.exists(KEYS[2].name)
    assert own.pool[:, 3:7].eq(0).all()
    counts = own.counter.take()
    assert counts.loaded_pages == 1
    assert counts.missing_pages + counts.damaged_pages == 1
    own.transfer.close()


def test_pages_of_a_request_are_decoded_beside_one_another(codec: kvtc.PageCodec) -> None:
    own = engine(codec)
    k, v = drawn(6 * PAGE)
    for i in range(6):
        part = slice(i * PAGE, (i + 1) * PAGE)
        page = codec.encode(
            k[:, :, part], v[:, :, part], positions=part.start, identity=KEYS[i].identity
        )
        own.store.put(KEYS[i].name, page)
    own.transfer.load(jobs("a", *([2 * i, 2 * i + 1] for i in range(6))))
    assert own.wait() == (set(), {"a"}, set())
    alone = own.blocks.read(range(12))
    own.pool.zero_()
    more = [kvtc.PageCodec(codec._codec, dtype="bfloat16", key=b"secret") for _ in range(3)]
    parallel = PageTransfer(
        own.blocks,
        StoreSink(own.store, codec, own.counter),
        own.store,
        more,
        own.counter,
        timeout=20.0,
        queue_pages=8,
    )
    own.transfer.close()
    own.transfer = parallel
    for missing in (None, 3):
        if missing is not None:
            own.store.delete(KEYS[missing].name)
        parallel.load(jobs("a", *([2 * i, 2 * i + 1] for i in range(6))))
        failed = set() if missing is None else set(range(2 * missing, 12))
        assert own.wait() == (set(), {"a"}, failed)
        good = 12 if missing is None else 2 * missing
        for x, y in zip(own.blocks.read(range(12)), alone, strict=True):
            assert torch.equal(x[:, :, : good * BLOCK], y[:, :, : good * BLOCK])
    parallel.close()


@pytest.mark.parametrize("fault", [kvtc.FormatError, RuntimeError])
def test_of_pages_decoded_together_those_before_a_bad_one_are_good(
    codec: kvtc.PageCodec, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    """It is whole, and yet nothing that a coder writes; or something unforeseen happens."""
    monkeypatch.setattr(Blocks, "together", 3)
    own = engine(codec)
    k, v = drawn(6 * PAGE)
    for i in range(6):
        part = slice(i * PAGE, (i + 1) * PAGE)
        page = codec.encode(
            k[:, :, part], v[:, :, part], positions=part.start, identity=KEYS[i].identity
        )
        own.store.put(KEYS[i].name, page)
    decoding = kvtc.PageCodec.decoding

    def failing(self: kvtc.PageCodec, table: Any, *given: Any) -> Any:
        if 4 * PAGE in table.rows["first"]:
            raise fault("page 4")
        yield from decoding(self, table, *given)

    monkeypatch.setattr(kvtc.PageCodec, "decoding", failing)
    own.transfer.load(jobs("a", *([2 * i, 2 * i + 1] for i in range(6))))
    good = 4 if fault is kvtc.FormatError else 3
    assert own.wait() == (set(), {"a"}, set(range(2 * good, 12)))
    counts = own.counter.take()
    assert counts.loaded_pages == good
    assert (counts.damaged_pages, counts.failed_pages) == ((1, 0) if good == 4 else (0, 1))
    assert own.store.exists(KEYS[4].name) == (good == 3)
    assert own.pool[:, : 2 * good].ne(0).any()
    own.transfer.close()


def test_pages_are_stored_together(codec: kvtc.PageCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, as it would be alone, and none that the engine has taken away meanwhile."""
    monkeypatch.setattr(Blocks, "stored_together", 8)
    own = engine(codec)
    k, v = drawn(3 * PAGE)
    put(own.pool, list(range(6)), k, v)
    encode, calls = kvtc.PageCodec.encode_many, []

    def watched(self: kvtc.PageCodec, *given: Any, **named: Any) -> list[bytes]:
        calls.append(named["positions"])
        own.transfer.preempted({"c"})
        return encode(self, *given, **named)

    monkeypatch.setattr(kvtc.PageCodec, "encode_many", watched)
    twice = [PageJob("b", KEYS[0], [0, 1]), PageJob("c", KEYS[2], [4, 5])]
    own.transfer.store([*jobs("a", [0, 1], [2, 3]), *twice])
    own.transfer.hold({"a", "b", "c"})
    done: set[str] = set()
    while done != {"a", "b", "c"}:
        done |= own.wait()[0]
    assert calls == [[0, PAGE, 2 * PAGE]]
    for i in range(2):
        part = slice(i * PAGE, (i + 1) * PAGE)
        assert own.store.get(KEYS[i].name) == codec.encode(
            k[:, :, part], v[:, :, part], positions=part.start, identity=KEYS[i].identity
        )
    assert not own.store.exists(KEYS[2].name)
    counts = own.counter.take()
    assert (counts.stored_pages, counts.dropped_pages) == (2, 1)
    assert counts.stored_cache_bytes == (k.nbytes + v.nbytes) * 2 // 3
    own.transfer.close()


def test_only_the_first_page_is_bounded(
    codec: kvtc.PageCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blocks, "stored_together", 8)
    own = engine(codec)
    strict = kvtc.PageCodec(
        dataclasses.replace(codec.codec, error_bound=1e-6), dtype="bfloat16", key=b"secret"
    )
    own.transfer._sink = StoreSink(own.store, strict, own.counter, codec)
    k, v = drawn(3 * PAGE)
    put(own.pool, list(range(6)), k, v)
    own.transfer.store(jobs("a", [0, 1], [2, 3], [4, 5]))
    own.transfer.hold({"a"})
    assert own.wait() == ({"a"}, set(), set())
    pages = [own.store.get(key.name) for key in KEYS[:3]]
    blocks = [
        codec.checked(page or b"", identity=key.identity)
        for page, key in zip(pages, KEYS, strict=False)
    ]
    assert [len(block.verbatim_tokens) for block in blocks] == [PAGE, 0, 0]
    assert [block.positions[0] for block in blocks] == [0, PAGE, 2 * PAGE]
    found = codec.decode(pages[2] or b"", identity=KEYS[2].identity)
    exact = codec.encode(
        k[:, :, 2 * PAGE :], v[:, :, 2 * PAGE :], positions=2 * PAGE, identity=KEYS[2].identity
    )
    assert pages[2] == exact
    assert found[0].shape[2] == PAGE
    own.transfer.close()


def test_whose_tokens_are_bounded_is_part_of_what_pages_are() -> None:
    given = {"calibration": "c", "store": "s"}
    every = Settings.read(given)
    first = Settings.read({**given, "bounded": "first"})
    assert every.page_options() == every.codec_options()
    assert first.page_options() != every.page_options()
    with pytest.raises(ValueError, match="'all' or 'first', found 'none'"):
        Settings.read({**given, "bounded": "none"})


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
@pytest.mark.parametrize("layout", VLLM_LAYOUTS, ids=lambda x: x.name)
def test_slots_are_the_tokens_of_blocks(layout: Any, order: tuple[int, ...]) -> None:
    """However blocks lie in memory, also those of a layer among others'."""
    sizes = {"H": 2, "N": BLOCK, "D": 8}
    axes = {"B": 5, "2": 2, **sizes, "*": BLOCK * 8}
    groups = [[axes[x] for x in group] for group in layouts._groups(layout.axes)]
    shape = [math.prod(group) for group in groups]
    own = [i for i in order if i < len(shape)] + list(range(4, len(shape)))
    whole = torch.arange(2 * math.prod(shape)).reshape(2, *(shape[i] for i in own))
    cache = whole[1].permute([own.index(i) for i in range(len(shape))])
    try:
        pair = layout.views(cache, sizes)
        views, step = slotted(pair)
    except kvtc.UnsupportedError:
        assert "CPU" in layout.name or order != (0, 1, 2, 3)
        return
    for view, blocks in zip(views, pair, strict=True):
        for block in range(5):
            places = slice(block * step, block * step + BLOCK)
            assert torch.equal(view[:, places], blocks[block])


def test_products_do_not_compete_for_cores(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(threads, "_alone", threading.Event())
    names: set[str] = set()
    tasks = [lambda: names.add(threading.current_thread().name) for _ in range(9)]
    with threadpoolctl.threadpool_limits(2, "blas"):
        one_blas_thread()
        threads.beside(tasks, 1 << 40)
        assert names == {threading.current_thread().name}
        found = threadpoolctl.threadpool_info()
        assert {x["num_threads"] for x in found if x["user_api"] == "blas"} == {1}
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    one_blas_thread()
    assert "OPENBLAS_NUM_THREADS=1" in caplog.text


def test_a_load_that_does_not_come_is_given_up(codec: kvtc.PageCodec) -> None:
    """And writes nothing when it comes after all."""
    store = SlowStore()
    own = engine(codec, store, timeout=0.05)
    k, v = drawn()
    page = codec.encode(k, v, positions=0, identity=KEYS[0].identity)
    store.put(KEYS[0].name, page)
    own.transfer.load(jobs("a", [1, 2]))
    assert own.wait() == (set(), {"a"}, {1, 2})
    store.go.set()
    time.sleep(0.2)
    assert own.pool.eq(0).all()
    assert own.counter.take().failed_pages == 1
    own.transfer.close()


def test_an_unforeseen_fault_is_a_miss(codec: kvtc.PageCodec) -> None:
    class Broken(MemoryStore):
        def _get(self, name: str) -> bytes | None:
            raise MemoryError

        def _put(self, name: str, data: bytes) -> None:
            raise OSError("full")

    own = engine(codec, Broken())
    own.transfer.load(jobs("a", [1, 2]))
    assert own.wait() == (set(), {"a"}, {1, 2})
    own.transfer.store(jobs("b", [1, 2]))
    own.transfer.hold({"b"})
    assert own.wait() == ({"b"}, set(), set())
    assert own.counter.take().dropped_pages == 1
    own.transfer.close()


def test_preempted_pages_are_not_stored(codec: kvtc.PageCodec) -> None:
    """Neither those that wait, nor one that is read while its blocks get another's tokens."""
    own, begun, go = engine(codec), threading.Event(), threading.Event()
    read = own.blocks.read

    def slow(blocks: Any) -> Any:
        begun.set()
        assert go.wait(20)
        return read(blocks)

    own.blocks.read = slow  # type: ignore[method-assign]
    own.transfer.store([*jobs("a", [1, 2], [3, 4]), PageJob("b", KEYS[5], [5, 6])])
    own.transfer.hold({"a", "b"})
    assert begun.wait(20)
    assert own.transfer.results() == (set(), set())
    own.transfer.preempted({"a"})
    go.set()
    done: set[str] = set()
    while done != {"a", "b"}:
        done |= own.wait()[0]
    assert [e.name for e in own.store.list()] == [KEYS[5].name]
    own.transfer.close()


def test_what_does_not_fit_the_queue_is_left_out(codec: kvtc.PageCodec) -> None:
    own, go = engine(codec), threading.Event()
    read = own.blocks.read
    own.blocks.read = lambda blocks: (go.wait(20), read(blocks))[1]  # type: ignore[method-assign]
    many = [PageJob("a", KEYS[i % 8], [1, 2]) for i in range(12)]
    own.transfer.store(many)
    own.transfer.store(many)
    go.set()
    own.transfer.close()
    assert own.counter.take().dropped_pages >= 12
    assert len(list(own.store.list())) == 8


def test_the_layout_is_what_the_engine_writes() -> None:
    sizes = {"H": 2, "N": BLOCK, "D": 8}
    shapes = {
        0: (9, 2, BLOCK, 16),
        1: (9, 2, BLOCK, 16),
        2: (9, 2, BLOCK, 2, 8),
        4: (9, 2, 2, BLOCK, 8),
    }
    for number, shape in shapes.items():
        layout = VLLM_LAYOUTS[number]

        def write(k: Tensor, v: Tensor, to: Tensor, places: Tensor, layout: Any = layout) -> None:
            for view, new in zip(layout.views(to, sizes), (k, v), strict=True):
                view[places // BLOCK, :, places % BLOCK] = new

        cache = torch.zeros(shape, dtype=torch.bfloat16)
        assert proven_layout(write, cache, 9, sizes) is layout
        assert cache.eq(0).all()

    def strange(k: Tensor, v: Tensor, to: Tensor, places: Tensor) -> None:
        to.view(-1)[: k.numel()] = k.flip(0).reshape(-1)

    with pytest.raises(kvtc.UnsupportedError, match="no layout that KvtcConnector knows"):
        proven_layout(strange, torch.zeros(9, 2, BLOCK, 16), 9, sizes)


def test_a_calibration_from_pages(tmp_path: Path) -> None:
    """What the sink learns is what a calibrator learns from the same tokens."""
    geometry = kvtc.testing.tiny_calibration().geometry
    sink = LearnSink(
        calibrator_of(geometry, kvtc.ModelIdentity("m"), None), str(tmp_path / "c"), 512, (0, 2)
    )
    expected = calibrator_of(geometry, kvtc.ModelIdentity("m"), None)
    keys = NAMESPACE.chain("x", PAGE).extend(list(range(512)))
    for i, key in enumerate(keys):
        job = PageJob("a", key, [])
        k, v = drawn(seed=i)
        assert sink.wanted(job)
        sink.take([job], k, v, lambda job: True)
        assert not sink.wanted(job)
        expected.update(k, v, positions=list(range(i * PAGE, (i + 1) * PAGE)))
    found = kvtc.Calibration.load(tmp_path / "c")
    assert found == expected.finish()
    assert found.tokens == 508


# Settings, and what is refused.


def test_settings() -> None:
    given = {"calibration": "c", "store": "s", "ratio": 8, "budget_gb": 2}
    found = Settings.read(given)
    assert found.codec_options() == {"preset": "default", "ratio": 8, "error_bound": 0.5}
    unbounded = Settings.read(given | {"error_bound": None})
    assert unbounded.codec_options() == {"preset": "default", "ratio": 8}
    assert found.budget == 2_000_000_000
    assert found.key(b"digest") == b"digest"
    assert Settings.read({"calibrate": "c"}).calibrate_tokens == 160_000
    for wrong, message in (
        ({}, "lacks 'calibration'"),
        ({"calibration": "c"}, "lacks 'store'"),
        (given | {"rato": 8}, "has 'rato'; KvtcConnector knows calibration, store"),
        (given | {"ratio": "8"}, "ratio is '8', expected float"),
        (given | {"page_tokens": 1.5}, r"page_tokens is 1\.5, expected int"),
        (given | {"page_tokens": True}, "page_tokens is True"),
        (given | {"store": 3}, "store is 3, expected str"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings.read(wrong)


def test_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "key"
    settings = Settings.read({"calibration": "c", "store": "s", "key_file": str(path)})
    path.write_text("0123456789abcdef\n")
    assert settings.key(b"d") == b"0123456789abcdef"
    path.write_text("short\n")
    with pytest.raises(ValueError, match="holds 5 bytes"):
        settings.key(b"d")


class FullAttentionSpec(SimpleNamespace):
    """vLLM's name."""


class SlidingWindowSpec(SimpleNamespace):
    """vLLM's name."""


def configs(**changes: Any) -> tuple[Any, Any]:
    spec = changes.get("spec", FullAttentionSpec(sliding_window=None, num_kv_heads=2, head_size=8))
    names = [f"model.layers.{i}.self_attn.attn" for i in (10, 2)]
    specs = changes.get("specs", [spec] * changes.get("groups", 1))
    groups = [SimpleNamespace(kv_cache_spec=x, layer_names=names) for x in specs]
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=changes.get("tp", 1),
            pipeline_parallel_size=changes.get("pp", 1),
            distributed_executor_backend=changes.get("backend"),
        ),
        cache_config=SimpleNamespace(cache_dtype=changes.get("dtype", "auto")),
        speculative_config=changes.get("speculative"),
        model_config=SimpleNamespace(
            uses_mrope=changes.get("mrope", False),
            get_total_num_kv_heads=lambda: changes.get("heads", 2),
        ),
    )
    return vllm_config, SimpleNamespace(kv_cache_groups=groups)


def test_what_is_refused_is_named() -> None:
    support.check_supported(*configs())
    # vLLM's one group of full and sliding layers: blocks are kept for all tokens.
    support.check_supported(*configs(spec=FullAttentionSpec(sliding_window=64)))
    support.check_supported(*configs(tp=2))
    for changes, message in (
        ({"pp": 2}, "pipeline_parallel_size is 2"),
        ({"tp": 2, "backend": "external_launcher"}, "'external_launcher', whose ranks"),
        ({"dtype": "fp8"}, "kv_cache_dtype is 'fp8'"),
        ({"speculative": object()}, "speculative decoding"),
        ({"mrope": True}, "M-RoPE"),
        ({"groups": 2}, "2 groups of layers"),
        ({"specs": [SlidingWindowSpec(), FullAttentionSpec()]}, "disable-hybrid-kv-cache-manager"),
        ({"spec": SlidingWindowSpec()}, "recurrent layers are not served$"),
        ({"pp": 2, "mrope": True}, "pipeline_parallel_size is 2.*; .*M-RoPE"),
    ):
        with pytest.raises(kvtc.UnsupportedError, match=message):
            support.check_supported(*configs(**changes))
    for version in ("0.25.1", "0.32.0+cpu", "1.0", "0.32.0rc1"):
        support.check_version(version)
    for version in ("0.25.0", "0.9.2", "0.24"):
        with pytest.raises(kvtc.UnsupportedError, match=f"vLLM {version} is older than 0.25.1"):
            support.check_version(version)


def test_layers_are_in_order_and_those_of_the_calibration() -> None:
    vllm_config, cache = configs()
    assert [support.layer_number(n) for n in support.ordered_layers(cache)] == [2, 10]
    section = support.served_section(vllm_config, cache)
    with pytest.raises(kvtc.CalibrationMismatchError, match=r"layers \(2, 10\), the calibration's"):
        support.check_calibration(kvtc.testing.tiny_calibration(), section)
    fitting = kvtc.testing.tiny_calibration().geometry.sections[0]
    support.check_calibration(kvtc.testing.tiny_calibration(), fitting)
    with pytest.raises(kvtc.UnsupportedError, match="has 2 numbers"):
        support.layer_number("blocks.0.attn.1")


def test_a_model_is_its_weights(tmp_path: Path) -> None:
    """Where it lies does not count; what it is does."""

    def facts(folder: Path, **changes: Any) -> Any:
        config = {"hidden_size": 8, "_name_or_path": str(folder)} | changes.pop("config", {})
        model = SimpleNamespace(
            model=str(folder),
            revision=None,
            hf_config=SimpleNamespace(to_dict=lambda: config),
            dtype=torch.bfloat16,
            quantization=None,
            seed=0,
        )
        load = SimpleNamespace(load_format=changes.pop("load_format", "auto"))
        for name, value in changes.items():
            setattr(model, name, value)
        return support.model_facts(SimpleNamespace(model_config=model, load_config=load))

    folders = []
    for name in ("a", "b"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    same = facts(folders[0])
    assert facts(folders[1]) == same
    others = [
        facts(folders[0], dtype=torch.float16),
        facts(folders[0], quantization="awq"),
        facts(folders[0], config={"hidden_size": 9}),
        facts(folders[0], load_format="dummy"),
        facts(folders[0], load_format="dummy", seed=1),
        facts(tmp_path / "nowhere"),
    ]
    weights = bytearray((folders[1] / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folders[1] / "model.safetensors").write_bytes(weights)
    others.append(facts(folders[1]))
    assert all(x != y for i, x in enumerate([same, *others]) for y in others[i:])
