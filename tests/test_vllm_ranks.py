"""Ranks of tensor parallelism over one store, each with KV heads of its own; the engine is a
stand-in, ``test_vllm_parallel.py`` has a real one."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vllm_parts import BLOCK, PAGE, Engine, Request, answer, configs, drawn, output
from torch import Tensor

import kvtc_stream as kvtc
from kvtc_stream.calibration.split import part_path, with_heads
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.hosts.layouts import VLLM_LAYOUTS
from kvtc_stream.integrations.hosts.store import FileStore, MemoryStore, Store
from kvtc_stream.integrations.vllm import support
from kvtc_stream.integrations.vllm.blocks import Blocks
from kvtc_stream.integrations.vllm.counts import Counter
from kvtc_stream.integrations.vllm.learning import LearnSink, calibrator_of
from kvtc_stream.integrations.vllm.scheduling import PageJob, PageScheduler, own_jobs
from kvtc_stream.integrations.vllm.sink import StoreSink
from kvtc_stream.integrations.vllm.transfer import PageTransfer

RANKS, LENGTH = 2, 3 * PAGE + 1
PROMPT = list(range(LENGTH))
#: Blocks of the pages of PROMPT.
BLOCKS = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def calibrations() -> list[kvtc.Calibration]:
    """Of one head of two each."""
    split = kvtc.SplitCalibrator(kvtc.testing.tiny_calibration().geometry, RANKS)
    split.update(*(x.float().numpy() for x in drawn(512, seed=1)))
    return split.finish()


def rank_engine(calibration: kvtc.Calibration, store: Store) -> Engine:
    pool = torch.zeros(2, 16, 1, BLOCK, 16, dtype=torch.bfloat16)
    sizes = {"H": 1, "N": BLOCK, "D": 8}
    blocks = Blocks([VLLM_LAYOUTS[0].views(layer, sizes) for layer in pool])
    own = kvtc.Codec(calibration, ratio=2, block_tokens=PAGE, backend="cpu")
    # A secret, so that nothing but a page's name keeps ranks apart.
    codec, counter = kvtc.PageCodec(own, dtype="bfloat16", key=b"secret of all"), Counter()
    transfer = PageTransfer(
        blocks,
        StoreSink(store, codec, counter),
        store,
        [codec],
        counter,
        timeout=120.0,
        queue_pages=8,
    )
    return Engine(blocks, pool, store, transfer, counter, codec)


class Server:
    """A scheduler and its ranks, with what vLLM does between them."""

    def __init__(self, store: Store, calibrations: list[kvtc.Calibration]) -> None:
        self.store, self.parts = store, len(calibrations)
        self.namespace = support.namespace_of(
            "vllm", {"m": 1}, "bfloat16", PAGE, calibrations, {"ratio": 2}, self.parts
        )
        self.scheduler = PageScheduler(self.namespace, store, PAGE, BLOCK, parts=self.parts)
        self.ranks = [rank_engine(calibration, store) for calibration in calibrations]

    def keys(self, part: int) -> list[Any]:
        chain = self.namespace.chain([None, None], PAGE)
        return [key.part(part, self.parts) for key in chain.extend(PROMPT)]

    def hit(self, name: str) -> int:
        """Tokens that a new request gets from the store."""
        return answer(self.scheduler, Request(name, PROMPT))[0] or 0

    def fill(self, k: Tensor, v: Tensor) -> None:
        for rank, own in enumerate(self.ranks):
            for i, block in enumerate(BLOCKS[:-1]):
                span = slice(i * BLOCK, (i + 1) * BLOCK)
                own.pool[:, block, 0, :, :8] = k[:, rank, span]
                own.pool[:, block, 0, :, 8:] = v[:, rank, span]

    def compute(self, name: str, ranks: Any = None) -> None:
        """A request whose pages are stored, on all ranks or on some."""
        request = Request(name, PROMPT)
        assert self.scheduler.matched(request, 0) is not None
        self.scheduler.allocated(request, [], 0)
        new = {name: (BLOCKS, 0)}
        plan = self.scheduler.step(output(new=new, scheduled={name: LENGTH}))
        request.num_computed_tokens = LENGTH
        assert self.scheduler.finished(request, BLOCKS)
        for rank in range(self.parts) if ranks is None else ranks:
            own = self.ranks[rank]
            own.transfer.store(own_jobs(plan.stores, rank, self.parts))
            own.transfer.hold({name})
            assert own.wait() == ({name}, set(), set())
        assert self.scheduler.step(output()).held == {name}

    def load(self, name: str) -> tuple[int, set[int]]:
        """A request that is loaded on all ranks: tokens that it has, of ranks one by one; and
        blocks that failed on any, as vLLM puts them together."""
        request = Request(name, PROMPT)
        tokens, loads = answer(self.scheduler, request)
        assert loads == bool(tokens)
        blocks = BLOCKS[: (tokens or 0) // BLOCK]
        self.scheduler.allocated(request, blocks, tokens or 0)
        plan = pickle.loads(pickle.dumps(self.scheduler.step(output())))  # to other processes
        failed: set[int] = set()
        for rank, own in enumerate(self.ranks):
            own.pool.zero_()
            own.transfer.load(own_jobs(plan.loads, rank, self.parts))
            _, loaded, errors = own.wait()
            assert loaded == {name}
            failed |= errors
        return tokens or 0, failed

    def close(self) -> None:
        self.scheduler.close()
        for own in self.ranks:
            own.transfer.close()


def counts(server: Server, name: str) -> list[int]:
    return [getattr(own.counter.take(), name) for own in server.ranks]


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "pages")


@pytest.fixture
def server(store: Store, calibrations: list[kvtc.Calibration]) -> Any:
    own = Server(store, calibrations)
    own.fill(*drawn(3 * PAGE))
    yield own
    own.close()


def test_a_page_is_there_when_all_ranks_have_it(server: Server) -> None:
    assert server.hit("before") == 0
    server.compute("half", ranks=[0])
    assert len(list(server.store.list())) == 3
    assert server.hit("half there") == 0
    server.compute("whole")
    assert counts(server, "known_pages") == [3, 0]
    assert server.hit("there") == 3 * PAGE
    server.store.delete(server.keys(0)[1].name)
    assert server.hit("a part evicted") == PAGE


def test_ranks_load_their_own_heads(server: Server) -> None:
    k, v = drawn(3 * PAGE)
    server.compute("a")
    assert server.load("b") == (3 * PAGE, set())
    for rank, own in enumerate(server.ranks):
        found = own.blocks.read(BLOCKS[:-1])
        for x, exact in zip(found, (k, v), strict=True):
            error = (x[:, 0] - exact[:, rank]).float().norm() / exact[:, rank].float().norm()
            assert error < 0.3
        for i, key in enumerate(server.keys(rank)):
            page = server.store.get(key.name)
            assert page is not None
            decoded = torch.from_dlpack(own.codec.decode(page, identity=key.identity)[0])  # type: ignore[arg-type]
            assert torch.equal(found[0][:, :, i * PAGE : (i + 1) * PAGE], decoded)


def test_damage_of_one_rank_is_computed_by_all_and_stored_again(server: Server) -> None:
    server.compute("a")
    name = server.keys(1)[1].name
    page = server.store.get(name)
    assert page is not None
    server.store.put(name, page[:-9] + bytes(9))
    assert server.load("b") == (3 * PAGE, set(BLOCKS[2:6]))
    assert counts(server, "damaged_pages") == [0, 1]
    assert server.hit("c") == PAGE
    server.fill(*drawn(3 * PAGE))  # vLLM computes them, on all ranks
    server.compute("c")
    assert counts(server, "known_pages") == [3, 2]
    assert server.store.get(name) == page
    assert server.load("d") == (3 * PAGE, set())


def test_a_rank_refuses_what_another_has_written(
    store: Store, calibrations: list[kvtc.Calibration]
) -> None:
    """Even where key and calibration are the same."""
    server = Server(store, [calibrations[0]] * RANKS)
    server.fill(*drawn(3 * PAGE))
    server.compute("a")
    assert server.load("b") == (3 * PAGE, set())
    for rank in range(RANKS):
        own, other = server.keys(rank)[0], server.keys(1 - rank)[0]
        kept, page = server.store.get(own.name), server.store.get(other.name)
        assert kept is not None
        assert page is not None
        server.store.put(own.name, page)
        assert server.load(f"c{rank}") == (3 * PAGE, set(BLOCKS[:6]))
        assert counts(server, "damaged_pages") == [rank == 0, rank == 1]
        server.store.put(own.name, kept)
    with pytest.raises(kvtc.AuthenticationError):
        server.ranks[0].codec.decode(page, identity=own.identity)
    server.close()


def test_pages_of_other_numbers_of_ranks_are_others(
    calibrations: list[kvtc.Calibration],
) -> None:
    whole = kvtc.testing.tiny_calibration()

    def keys(own: list[kvtc.Calibration], ranks: int) -> list[Any]:
        given = "vllm", {"m": 1}, "bfloat16", PAGE, own, {"ratio": 2}
        [key] = support.namespace_of(*given, ranks).chain(None, PAGE).extend(PROMPT[:PAGE])
        return [key.part(i, len(own)) for i in range(len(own))]

    found = [
        *keys([whole], 1),
        *keys(calibrations, 2),
        *keys(calibrations[::-1], 2),
        *keys(calibrations, 4),  # with copies
        *keys(calibrations * 2, 4),
        *keys([calibrations[0], whole], 2),
    ]
    assert len({key.name for key in found}) == len({key.identity for key in found}) == 13
    for key in found:
        MemoryStore().put(key.name, b"page")  # a name that stores take


def test_one_rank_has_the_names_that_it_always_had() -> None:
    """So that stores from before tensor parallelism are not cold."""
    whole = kvtc.testing.tiny_calibration()
    facts = {
        "format": "1.1",
        "host": "vllm",
        "model": {"m": 1},
        "layout": {"tensor_parallel": 1, "pipeline_parallel": 1},
        "dtype": "bfloat16",
        "page_tokens": PAGE,
        "calibration": whole.digest.hex(),
        "fingerprint": "",
        "codec": {"ratio": 2},
    }
    own = support.namespace_of("vllm", {"m": 1}, "bfloat16", PAGE, [whole], {"ratio": 2})
    assert own.digest == Namespace(facts).digest
    [key] = own.chain(None, PAGE).extend(PROMPT[:PAGE])
    assert key.part(0, 1) is key
    jobs = [PageJob("a", key, [1])]
    assert own_jobs(jobs, 0, 1) is jobs


def test_parts_of_a_page_are_looked_up_side_by_side() -> None:
    """Nobody looks far beyond a gap that another has found, and a fault is a miss."""
    asked: list[str] = []

    class Watched(MemoryStore):
        def exists(self, name: str) -> bool:
            asked.append(name)
            if name.endswith(".3"):
                raise OSError("the network is down")
            return super().exists(name)

    own, prompt = Watched(), list(range(64))
    namespace = Namespace({"test": 1})
    for parts, missing, expected in ((3, (1, 4), 4), (3, (0, 0), 0), (4, (1, 4), 0)):
        scheduler = PageScheduler(namespace, own, PAGE, BLOCK, parts=parts)
        keys = namespace.chain([None, None], PAGE).extend(prompt)
        for key in keys:
            for part in range(parts):
                own.put(key.part(part, parts).name, b"page")
        own.delete(keys[missing[1]].part(missing[0], parts).name)
        found, _ = answer(scheduler, Request("a", prompt))
        assert found == expected * PAGE
        scheduler.close()
    assert asked


# Who has which heads.


@pytest.mark.parametrize(
    ("ranks", "heads", "parts", "writers"),
    [
        (1, 8, [0], [0]),
        (2, 8, [0, 1], [0, 1]),
        (4, 4, [0, 1, 2, 3], [0, 1, 2, 3]),
        (4, 2, [0, 0, 1, 1], [0, 2]),
        (4, 1, [0, 0, 0, 0], [0]),
    ],
)
def test_heads_of_ranks(ranks: int, heads: int, parts: list[int], writers: list[int]) -> None:
    own = support.HeadParts(ranks, heads)
    assert [own.of(rank) for rank in range(ranks)] == parts
    assert [rank for rank in range(ranks) if own.writes(rank)] == writers
    assert own.count == len(set(parts))
    assert [own.heads(i) for i in range(own.count)] == [
        (i * heads // own.count, heads) for i in range(own.count)
    ]


def test_heads_that_are_not_dealt_evenly_are_refused() -> None:
    section = kvtc.Section((0, 1), 2, 8, 8)
    assert support.head_parts_of(configs()[0], section) == support.HeadParts(1, 2)
    for ranks, heads in ((2, 4), (3, 6)):
        own = support.head_parts_of(configs(tp=ranks, heads=heads)[0], section)
        assert own == support.HeadParts(ranks, heads)
    one = dataclasses.replace(section, kv_heads=1)
    assert support.head_parts_of(configs(tp=4, heads=2)[0], one).count == 2
    for ranks, heads in ((2, 2), (2, 6), (4, 4)):
        message = f"each of {ranks} ranks caches 2 of {heads} KV heads"
        with pytest.raises(kvtc.UnsupportedError, match=message):
            support.head_parts_of(configs(tp=ranks, heads=heads)[0], section)
    with pytest.raises(kvtc.UnsupportedError, match="each of 3 ranks caches 1 of 2"):
        support.head_parts_of(configs(tp=3, heads=2)[0], one)


def test_each_part_has_its_calibration(
    calibrations: list[kvtc.Calibration], tmp_path: Path
) -> None:
    parts, path = support.HeadParts(4, 2), str(tmp_path / "model.safetensors")
    calibrations[0].save(part_path(path, 0, 2))
    assert parts.calibration(path, parts.of(1)) == calibrations[0]
    with pytest.raises(FileNotFoundError, match=r"model\.tp2-1\.safetensors.*--tensor-parallel 2"):
        parts.calibration(path, parts.of(2))
    section = calibrations[0].geometry.sections[0]
    support.check_calibration(calibrations[1], section, parts.heads(1))
    for wrong, heads, message in (
        (calibrations[0], parts.heads(1), "KV heads from 1 on of 2, the calibration's .* from 0 "),
        (calibrations[1], None, "KV heads from 0 on of 1, the calibration's .* from 1 on of 2"),
        (kvtc.testing.tiny_calibration(), parts.heads(1), "kv_heads 1, the calibration's are 2"),
    ):
        with pytest.raises(kvtc.CalibrationMismatchError, match=message):
            support.check_calibration(wrong, section, heads)


def test_a_rank_learns_its_heads(tmp_path: Path) -> None:
    [section] = kvtc.testing.tiny_calibration().geometry.sections
    geometry = kvtc.Geometry((dataclasses.replace(section, kv_heads=1),))
    path = tmp_path / "c"
    identity = kvtc.ModelIdentity("m")
    sink = LearnSink(calibrator_of(geometry, identity, None), str(path), 256, (1, 2))
    split = kvtc.SplitCalibrator(
        kvtc.testing.tiny_calibration().geometry, 2, bases=("joint",), model=identity
    )
    k, v = drawn(256)
    split.update(k, v)
    keys = Namespace({"test": 1}).chain("x", PAGE).extend(list(range(256)))
    jobs = own_jobs([PageJob("a", key, []) for key in keys], 1, 2)
    for i, job in enumerate(jobs):
        own = slice(i * PAGE, (i + 1) * PAGE)
        assert sink.wanted(job)
        sink.take([job], k[:, 1:, own], v[:, 1:, own], lambda _: True)
    found, expected = kvtc.Calibration.load(path), split.finish()[1]
    assert found.sections[0].heads == expected.sections[0].heads == (1, 2)
    assert with_heads(found, [(0, 1)]).geometry == geometry
    assert found.tokens == expected.tokens == 252
