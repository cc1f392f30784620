"""Layouts of hosts, stores of pages, and who a page belongs to."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from real_sample import RealSample
from strategies import FEWER

import kvtc_stream as kvtc
from kvtc_stream.integrations.hosts import layouts
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.hosts.layouts import (
    LMCACHE_LAYOUTS,
    SGLANG_LAYOUTS,
    VLLM_LAYOUTS,
    Layout,
    kv_views,
)
from kvtc_stream.integrations.hosts.pages import HostPages
from kvtc_stream.integrations.hosts.positions import PositionFinder
from kvtc_stream.integrations.hosts.store import (
    FileStore,
    MemoryStore,
    RemoteStore,
    Store,
    open_store,
)
from kvtc_stream.integrations.vllm.settings import TierSettings

ALL = (*VLLM_LAYOUTS, *LMCACHE_LAYOUTS, *SGLANG_LAYOUTS)
SIZES = {"B": 5, "L": 3, "H": 2, "N": 7, "D": 4}


def shape_of(layout: Layout) -> list[int]:
    sizes = {**SIZES, "2": 2, "*": SIZES["N"] * SIZES["D"]}
    return [int(np.prod([sizes[x] for x in group])) for group in layouts._groups(layout.axes)]


@pytest.mark.parametrize("layout", ALL, ids=lambda x: x.name)
@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_views_are_the_memory(layout: Layout, make: Any) -> None:
    """What is written to views is in the tensor, each value in a place of its own."""
    tensor = make(shape_of(layout))
    k, v = layout.views(tensor, {x: SIZES[x] for x in "HND"})
    expected = tuple(SIZES[x] for x in "BLHND" if x in layout.axes + layout.k)
    assert tuple(k.shape) == tuple(v.shape) == expected
    count = int(np.prod(expected))
    numbers = np.arange(1, count + 1).reshape(expected)
    k[:] = numbers if make is np.zeros else torch.from_numpy(numbers)
    v[:] = -k
    found = np.sort(np.asarray(tensor).ravel())
    assert found.tolist() == [*range(-count, 0), *range(1, count + 1)]


def test_orders_by_hand() -> None:
    """A value that is known to be somewhere."""
    cpu = VLLM_LAYOUTS[1]
    pages = np.arange(2 * 2 * 3 * 8).reshape(2, 2, 3, 8)  # 2 pages, 2 heads, 3 tokens, 4 channels
    k, v = cpu.views(pages, {"H": 2, "N": 3, "D": 4})
    first = pages[1, 0].ravel()
    assert k[1, 0, 2, 1] == first[1 * 3 + 2]
    assert v[1, 0, 2, 1] == first[12 + 2 * 4 + 1]
    fused = VLLM_LAYOUTS[0].views(pages, {"H": 2, "N": 3, "D": 4})
    assert fused[1][1, 0, 2, 1] == pages[1, 0, 2, 4 + 1]
    chunk = np.arange(3 * 7 * 16).reshape(3, 7, 16)  # [L, T, H·2D]
    k, v = LMCACHE_LAYOUTS[1].views(chunk, {"H": 2, "N": 7, "D": 4})
    assert v[2, 1, 5, 3] == chunk[2, 5, 8 + 4 + 3]


def test_strided_pages_and_refusals() -> None:
    whole = torch.zeros(3, 5, 2, 7, 8)  # layers lie between blocks
    k, _ = VLLM_LAYOUTS[0].views(whole.transpose(0, 1)[:, 1], {"H": 2, "N": 7, "D": 4})
    k[2] = 1
    assert whole[1, 2, :, :, :4].eq(1).all()
    with pytest.raises(kvtc.UnsupportedError, match="not dense"):
        VLLM_LAYOUTS[1].views(torch.zeros(5, 2, 8, 7).transpose(2, 3), {"H": 2, "N": 7, "D": 4})
    with pytest.raises(kvtc.UnsupportedError, match=r"shape \[5, 9\].*\[B, H, N, 2D\] with H=2"):
        VLLM_LAYOUTS[0].views(torch.zeros(5, 9), {"H": 2, "N": 7, "D": 4})
    sizes = {"kv_heads": 2, "tokens": 7, "head_dim": 4}
    with pytest.raises(kvtc.UnsupportedError, match="name the layout"):
        kv_views(np.zeros((5, 2, 7, 8)), VLLM_LAYOUTS[:2], **sizes)
    with pytest.raises(kvtc.UnsupportedError, match="latent attention"):
        kv_views(np.zeros((5, 7, 11)), VLLM_LAYOUTS, **sizes)
    with pytest.raises(kvtc.UnsupportedError, match="LMCache"):
        kv_views(np.zeros((3, 7, 15)), LMCACHE_LAYOUTS, kv_heads=2, tokens=8, head_dim=4)
    k, v = kv_views(np.zeros((2, 3, 7, 8)), LMCACHE_LAYOUTS, **sizes)
    assert k.shape == v.shape == (3, 2, 7, 4)


def test_pages_of_views_are_coded() -> None:
    """The codec takes the views, and they take what it gives."""
    calibration = kvtc.testing.tiny_calibration()
    pages = kvtc.PageCodec(kvtc.Codec(calibration, ratio=4, block_tokens=16), dtype="bfloat16")
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 16, dtype=kvtc.DType.BFLOAT16)
    pool = torch.zeros(2, 4, 2, 16, 16, dtype=torch.bfloat16)  # layers, blocks
    sizes = {"H": 2, "N": 16, "D": 8}
    own = [VLLM_LAYOUTS[1].views(layer, sizes) for layer in pool]
    for layer, (a, b) in enumerate(own):
        a[3] = torch.from_numpy(k[layer].astype(np.float32))
        b[3] = torch.from_numpy(v[layer].astype(np.float32))
    page = pages.encode([a[3] for a, _ in own], [b[3] for _, b in own], positions=32)
    assert page == pages.encode(k, v, positions=32)


# Stores.


def remote(folder: Path, budget: int | None) -> Store:
    return RemoteStore(f"file://{folder}", budget)


def memory_filesystem(folder: Path, budget: int | None) -> Store:
    return RemoteStore(f"memory://{folder}", budget)


KINDS: list[Callable[[Path, int | None], Store]] = [
    lambda _, budget: MemoryStore(budget),
    FileStore,
    remote,
    memory_filesystem,
]
stores = pytest.mark.parametrize("make", KINDS, ids=["memory", "file", "remote", "object"])


@stores
def test_a_store(make: Any, tmp_path: Path) -> None:
    store = make(tmp_path / "pages", None)
    assert store.get("ab/01") is None
    assert not store.exists("ab/01")
    assert list(store.list()) == []
    store.delete("ab/01")
    assert store.put("ab/01", b"one")
    assert store.put("ab/02", b"two")
    assert store.put("cd/02", b"three")
    assert store.put("ab/01", b"ones")
    assert store.get("ab/01") == b"ones"
    assert store.exists("ab/02")
    assert sorted((e.name, e.size) for e in store.list("ab/")) == [("ab/01", 4), ("ab/02", 3)]
    assert len(list(store.list())) == 3
    store.delete("ab/02")
    assert not store.exists("ab/02")
    assert len(list(store.list())) == 2
    store.put("cd/03.0", b"a part")
    assert [e.name for e in store.list("cd/03")] == ["cd/03.0"]
    assert store.get("cd/03.0") == b"a part"
    for name in (
        "",
        "../ab",
        "/ab",
        "ab/",
        "AB",
        "a b",
        "ab/../cd",
        "ab//cd",
        "a",
        "ab.",
        "ab.0.1",
        "ab.f",
    ):
        with pytest.raises(ValueError, match="hex digits"):
            store.put(name, b"")


@stores
def test_what_was_used_longest_ago_goes(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path / "pages", 1000)
    now = 1_700_000_000.0

    def later(path: Any, *_: Any, **__: Any) -> None:
        real(path, (now, now))

    real = os.utime
    monkeypatch.setattr(os, "utime", later)
    monkeypatch.setattr("time.time", lambda: now)
    assert not store.put("00", b"x" * 1001)
    for i in range(9):
        now += 10
        store.put(f"{i:02x}", b"x" * 100)
        if isinstance(store, FileStore):
            real(tmp_path / "pages" / f"{i:02x}", (now, now))
    now += 10
    assert store.get("00") is not None
    for i in range(9, 12):
        now += 10
        store.put(f"{i:02x}", b"x" * 100)
        if isinstance(store, FileStore):
            real(tmp_path / "pages" / f"{i:02x}", (now, now))
    left = {e.name for e in store.list()}
    assert sum(e.size for e in store.list()) <= 1000
    assert "0b" in left
    assert "00" in left  # it was read
    assert "01" not in left


@stores
def test_what_is_held_goes_last(make: Any, tmp_path: Path) -> None:
    """As often as it was held; watchers are told what goes."""
    store, gone = make(tmp_path / "pages", 1000), []
    store.watchers.append(gone.append)
    assert not store.hold("00")
    assert not store.held("00")
    for i in range(3):
        store.put(f"{i:02x}", b"x" * 300)
        time.sleep(0.01)  # uses are told apart by time
    assert store.hold("00")
    assert store.hold("00")
    store.put("03", b"x" * 500)
    assert gone == ["01", "02"]  # "00" was used before them
    store.release("00")
    assert store.held("00")
    store.put("04", b"x" * 550)
    assert gone == ["01", "02", "03"]
    assert sorted(entry.name for entry in store.list()) == ["00", "04"]
    assert store.hold("04")
    store.put("05", b"x" * 200)  # the budget holds, whatever is held
    assert gone[3:] == ["05"]
    store.put("04", b"x" * 800)
    assert gone[4:] == ["00"]
    assert [entry.name for entry in store.list()] == ["04"]
    store.release("00")
    store.release("00")
    assert not store.held("00")
    for name in ("../ab", "AB"):
        with pytest.raises(ValueError, match="hex digits"):
            store.hold(name)


@stores
def test_parts_of_a_page_go_together(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was read lately: without the others it is of no use."""
    now = 1_700_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    store, folder = make(tmp_path / "pages", 1000), tmp_path / "pages"
    for i in range(5):
        for part in range(2):
            now += 10
            store.put(f"{i:02x}.{part}", b"x" * 100)
            if isinstance(store, FileStore):
                os.utime(folder / f"{i:02x}.{part}", (now, now))
    now += 10
    store.get("00.1")
    if isinstance(store, FileStore):
        os.utime(folder / "00.1", (now, now))
    now += 10
    store.put("05.0", b"x" * 100)
    left = {e.name for e in store.list()}
    assert {"00.0", "00.1", "05.0"} <= left
    assert not {"01.0", "01.1"} & left
    assert all(f"{i:02x}.0" in left and f"{i:02x}.1" in left for i in (2, 3, 4))


def test_writers_share_a_budget(tmp_path: Path) -> None:
    """Ranks write as much each, and none looks at the folder for each page."""
    handles = [FileStore(tmp_path, 20_000, writers=4) for _ in range(4)]
    most, listed = 0, 0
    for handle in handles:
        real = handle.list

        def counted(prefix: str = "", real: Any = real) -> Any:
            nonlocal listed
            listed += 1
            return real(prefix)

        handle.list = counted  # type: ignore[method-assign]
    for i in range(100):
        for part, handle in enumerate(handles):
            handle.put(f"{i:04x}.{part}", b"x" * 100)
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*")))
    assert 16_000 < most <= 20_400
    assert listed < 100


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 byte, found 0"):
        MemoryStore(0)


def test_files_are_whole_for_every_reader(tmp_path: Path) -> None:
    """Writers of the same name beside readers; nobody sees a part, nothing is left over."""
    store, stop = FileStore(tmp_path), threading.Event()
    texts = [bytes([i]) * 20_000 for i in range(4)]

    def write(text: bytes) -> None:
        for _ in range(50):
            store.put("ab/cd", text)

    def read() -> int:
        seen = 0
        while not stop.is_set():
            found = FileStore(tmp_path).get("ab/cd")
            assert found is None or found in texts
            seen += found is not None
        return seen

    with ThreadPoolExecutor(6) as pool:
        reader = pool.submit(read)
        list(pool.map(write, texts))
        stop.set()
        assert reader.result() > 0
    assert [e.name for e in store.list()] == ["ab/cd"]
    assert [f for f in os.listdir(tmp_path / "ab") if f.startswith(".")] == []


def test_what_crashed_writers_left_goes(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for name, age in (("old", 7200), ("new", 10)):
        path = tmp_path / f".{name}.partial"
        path.write_bytes(b"")
        os.utime(path, (os.path.getmtime(path) - age,) * 2)
    assert list(store.list()) == []
    assert [p.name for p in tmp_path.iterdir()] == [".new.partial"]


def test_urls(tmp_path: Path) -> None:
    assert open_store("memory://a") is open_store("memory://a")
    assert open_store("memory://a") is not open_store("memory://b")
    open_store(f"file://{tmp_path}/x").put("ab", b"1")
    assert open_store(str(tmp_path / "x")).get("ab") == b"1"
    assert (tmp_path / "x").stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="needs a name"):
        open_store("shm://")
    with pytest.raises(ValueError, match="needs a name"):
        open_store("shm://../../etc")
    assert isinstance(open_store(f"local://{tmp_path}/y"), RemoteStore)
    with pytest.raises(ValueError, match="nosuchthing"):
        open_store("nosuchthing://x")


# Keys.

FACTS = {"model": "m", "calibration": "c", "dtype": "bfloat16"}


def names(tokens: list[int], root: Any = None, extras: Any = (), **facts: Any) -> list[str]:
    chain = Namespace(FACTS | facts).chain(root, 4)
    return [key.name for key in chain.extend(tokens, extras)]


@FEWER
@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), max_size=30))
def test_equal_prefixes_share_pages_and_no_others(a: list[int], b: list[int]) -> None:
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    x, y = names(a), names(b)
    assert len(x) == len(a) // 4
    assert [p == q for p, q in zip(x, y, strict=False)] == [
        i < shared // 4 for i in range(min(len(x), len(y)))
    ]
    grown = Namespace(FACTS).chain(None, 4)
    for end in range(len(a) + 1):
        grown.extend(a, (), end)
    assert [key.name for key in grown.keys] == x
    assert [key.position for key in grown.keys] == [4 * i for i in range(len(x))]


def test_whoever_differs_shares_nothing() -> None:
    """Model, dtype, adapter, tenant, images."""
    tokens = list(range(12))
    images = [(5, 7, "picture")]
    others = [
        names(tokens),
        names(tokens, dtype="float16"),
        names(tokens, model="n"),
        names(tokens, root=[["lora", "/a", []], None]),
        names(tokens, root=[["lora", "/b", []], None]),
        names(tokens, root=[None, "tenant"]),
        names(tokens, extras=[(0, 2, "picture")]),
        names(tokens, extras=[(0, 2, "another")]),
        names(tokens, extras=[(1, 3, "picture")]),
    ]
    for page in range(3):
        assert len({x[page] for x in others}) == len(others)
    plain, seen = names(tokens), names(tokens, extras=images)
    assert [a == b for a, b in zip(plain, seen, strict=True)] == [True, False, False]
    key = Namespace(FACTS).chain(None, 4).extend(tokens)[2]
    assert key.identity == f"{key.name}@8".encode()
    assert key.name.startswith(Namespace(FACTS).prefix + "/")


# Positions.


def test_positions_are_found(real_sample: RealSample) -> None:
    """Of pages of a real model, at many positions; with a calibration on a part of them."""
    calibrator = kvtc.Calibrator(real_sample.geometry, bases=["joint"], sinks=0)
    calibrator.update(real_sample.k, real_sample.v)
    calibration = calibrator.finish()
    rope = real_sample.geometry.sections[0].rope[0]
    assert rope is not None
    k = real_sample.k.astype(np.float32)
    half = rope.rotary_dim // 2
    for size in (16, 32):
        finder = PositionFinder(calibration, size, 4096)
        for start in range(0, k.shape[2] - size + 1, size):
            for shift in (0, 16 * size, 100 * size):
                turn = np.exp(1j * shift * np.array(rope.inv_freq))
                page = k[:, :, start : start + size]
                pairs = (page[..., :half] + 1j * page[..., half:]) * turn
                found = finder.find(np.concatenate([pairs.real, pairs.imag], -1).astype("f4"))
                assert found.position == start + shift
                assert found.sure
        for strange in (k[:, :, 5 : 5 + size], np.zeros_like(k[:, :, :size]), k[:, :, :size] * 9):
            assert not finder.find(strange).sure
        noise = np.random.default_rng(0).standard_normal(k[:, :, :size].shape)
        assert not finder.find(noise.astype("f4")).sure
        k_bad = k[:, :, :size].copy()
        k_bad[0, 0, 0, 0] = np.nan
        assert not finder.find(k_bad).sure


def test_without_rope_no_position_is_found() -> None:
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=2, head_dim=8)
    calibrator = kvtc.Calibrator(geometry)
    calibrator.update(*kvtc.testing.drawn_cache(geometry, 512))
    with pytest.raises(kvtc.UnsupportedError, match="positions are found by RoPE"):
        PositionFinder(calibrator.finish(), 16, 4096)


TOKENS = 8


def test_only_the_first_page_of_a_prompt_is_bounded(tmp_path: Path) -> None:
    """And pages that are bound so are others than those that are bound otherwise."""
    calibration = kvtc.testing.tiny_calibration()
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    k, v = (
        torch.from_numpy(np.asarray(x))
        for x in kvtc.testing.drawn_cache(calibration.geometry, 2 * TOKENS)
    )
    given = {"calibration": str(path), "store": "memory://bounded", "error_bound": 1e-6}
    every, first = (
        HostPages(
            TierSettings.read(given | own),
            calibration,
            dtype="float32",
            tokens=TOKENS,
            most=4 * TOKENS,
            facts={},
        )
        for own in ({}, {"bounded": "first"})
    )
    assert every.namespace.digest != first.namespace.digest
    exact = [
        [
            _kept(pages, k[:, :, own : own + TOKENS], v[:, :, own : own + TOKENS], own)
            for own in (0, TOKENS)
        ]
        for pages in (every, first)
    ]
    assert exact == [[True, True], [True, False]]
    part = k[:, :, :TOKENS], v[:, :, :TOKENS]
    page = first.encode("name", *part, 0)
    with pytest.raises(kvtc.AuthenticationError):
        every.decode("name", page, *part)
    with pytest.raises(ValueError, match="'all' or 'first', found 'last'"):
        TierSettings.read(given | {"bounded": "last"})


def _kept(pages: HostPages, k: Any, v: Any, position: int) -> bool:
    """Whether a page comes back bit for bit."""
    out = torch.empty_like(k), torch.empty_like(v)
    pages.decode("name", pages.encode("name", k, v, position), *out, position)
    return torch.equal(out[0], k) and torch.equal(out[1], v)
