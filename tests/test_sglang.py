"""The storage backend for SGLang, with a host pool that needs no device."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from real_sample import RealSample
from sglang_host import Config, Pool, sglang_is_there, stand_in

import kvtc_stream as kvtc
from kvtc_stream.integrations.hosts.pages import PageCounts

#: What users name in SGLang's configuration.
NAMED = {
    "backend_name": "kvtc",
    "module_path": "kvtc_stream.integrations.sglang",
    "class_name": "KvtcStorage",
    "interface_v1": 1,
}
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
SIZE, PAGES = 16, 8


@pytest.fixture(scope="module")
def calibration_path(real_sample: RealSample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    calibrator = kvtc.Calibrator(real_sample.geometry, bases=["joint"], sinks=0)
    calibrator.update(real_sample.k, real_sample.v)
    path = tmp_path_factory.mktemp("sglang") / "real.safetensors"
    calibrator.finish().save(path)
    return path


@pytest.fixture(params=["stand-in", "sglang"])
def storage_class(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend's class, on the base class that stands in, and on SGLang's own."""
    if request.param == "stand-in":
        if sglang_is_there():
            pytest.skip("SGLang itself is there")
        stand_in(monkeypatch)
    elif not sglang_is_there():
        pytest.skip("needs SGLang: see CONTRIBUTING.md")
    return importlib.import_module(NAMED["module_path"]).KvtcStorage  # type: ignore[arg-type]


@pytest.fixture
def make(storage_class: Any, calibration_path: Path, tmp_path: Path) -> Any:
    """A backend on a pool, with settings of the test's own beside those that are needed."""

    def made(pool: Any, **given: Any) -> Any:
        config = {"calibration": str(calibration_path), "store": str(tmp_path / "pages")}
        storage = storage_class(Config({**NAMED, **config, "ratio": 4, **given}), {})
        storage.register_mem_pool_host(pool)
        return storage

    return made


def pool_of(sample: RealSample, layout: str = "layer_first", pages: int = PAGES) -> Pool:
    layers, heads, _, dim = sample.k.shape
    return Pool(layout, (pages, layers, heads, SIZE, dim))


def tokens(sample: RealSample, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = slice(page * SIZE, (page + 1) * SIZE)
    return tuple(  # type: ignore[return-value]
        torch.from_numpy(x[:, :, own].astype(np.float32)).bfloat16() for x in (sample.k, sample.v)
    )


def filled(sample: RealSample, pool: Pool, count: int) -> tuple[list[str], torch.Tensor]:
    """Pages of a prompt, in places of the pool that are not in order; their keys and places."""
    places = [3, 1, 6, 0, 5][:count]
    for page, place in enumerate(places):
        pool.fill(place, *tokens(sample, page))
    keys = [hashlib.sha256(f"page {i}".encode()).hexdigest() for i in range(count)]
    indices = torch.cat([torch.arange(SIZE) + p * SIZE for p in places])
    return keys, indices


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def told(count: int) -> SimpleNamespace:
    return SimpleNamespace(prefix_keys=["x"] * count, extra_info=None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("extra", [told(0), None], ids=["told", "searched"])
def test_pages_come_back(make: Any, real_sample: RealSample, layout: str, extra: Any) -> None:
    """In every layout, by another process's backend, told positions or not."""
    pool = pool_of(real_sample, layout)
    keys, indices = filled(real_sample, pool, 4)
    storage = make(pool)
    assert storage.batch_exists(keys) == 0
    assert storage.batch_set_v1(keys, indices, extra) == [True] * 4
    assert storage.counts.coded + storage.counts.lossless == 4
    assert storage.counts.lossless == 0
    assert storage.counts.page_bytes < 0.5 * storage.counts.cache_bytes
    before = pool.kv_buffer.clone()
    pool.kv_buffer.zero_()
    other = make(pool)
    assert other.batch_exists([*keys, "missing"]) == 4
    assert other.batch_get_v1(keys, indices, extra) == [True] * 4
    error = relative_error(pool.kv_buffer, before)
    assert 0 < error < 0.35
    # The pages are those of the tokens' own positions: what the library gives for these.
    k, _ = tokens(real_sample, 2)
    expected = pool_of(real_sample, layout)
    codec = kvtc.Codec(
        kvtc.Calibration.load(other._settings.calibration),
        block_tokens=SIZE,
        ratio=4,
        error_bound=0.5,
    )
    pages = kvtc.PageCodec(codec, dtype="bfloat16")
    k, v = pages.decode(pages.encode(*tokens(real_sample, 2), positions=2 * SIZE))
    expected.fill(6, torch.from_dlpack(k), torch.from_dlpack(v))
    own = [x.get_data_page(6 * SIZE) for x in (pool, expected)]
    assert torch.equal(*own)


def test_the_position_is_that_of_the_prefix(make: Any, real_sample: RealSample) -> None:
    """A wrong position loses far more; so the right one was taken."""
    pool = pool_of(real_sample)
    pool.fill(0, *tokens(real_sample, 3))
    indices, before = torch.arange(SIZE), pool.get_data_page(0).clone()
    errors = []
    for prefix in (3, 0):
        storage = make(pool, store=f"memory://prefix{prefix}", error_bound=None)
        assert storage.batch_set_v1(["key"], indices, told(prefix)) == [True]
        assert storage.batch_get_v1(["key"], indices, told(prefix)) == [True]
        errors.append(relative_error(pool.get_data_page(0), before))
        pool.fill(0, *tokens(real_sample, 3))
        # Whoever says another position is not given it.
        assert storage.batch_get_v1(["key"], indices, told(prefix + 1)) == [False]
        assert not storage.exists("key")
    assert errors[1] > 2 * errors[0]


def test_unsure_positions_lose_nothing(make: Any, real_sample: RealSample) -> None:
    """Tokens that begin within a page, and noise: bit for bit, and they are counted."""
    pool = pool_of(real_sample)
    k, v = (
        torch.from_numpy(x[:, :, 5 : 5 + SIZE].astype(np.float32)).bfloat16()
        for x in (real_sample.k, real_sample.v)
    )
    pool.fill(0, k, v)
    pool.fill(1, torch.randn(k.shape).bfloat16(), v)
    pool.fill(2, torch.full(k.shape, float("nan")).bfloat16(), v)
    indices, keys = torch.arange(3 * SIZE), ["a", "b", "c"]
    storage, before = make(pool), pool.kv_buffer.clone()
    assert storage.batch_set_v1(keys, indices) == [True] * 3
    assert storage.counts.lossless == 3
    pool.kv_buffer.zero_()
    assert make(pool).batch_get_v1(keys, indices) == [True] * 3
    assert torch.equal(pool.kv_buffer.view(torch.int16), before.view(torch.int16))


def test_flat_pages(make: Any, real_sample: RealSample) -> None:
    """What SGLang calls without ``interface_v1``."""
    for layout in LAYOUTS:
        pool = pool_of(real_sample, layout)
        keys, _ = filled(real_sample, pool, 3)
        data = [pool.get_data_page(place * SIZE) for place in (3, 1, 6)]
        storage = make(pool, store=f"memory://flat-{layout}")
        assert storage.batch_set(keys, data)
        found = storage.batch_get(
            [*keys, "missing"], [pool.get_dummy_flat_data_page() for _ in range(4)]
        )
        assert found[3] is None
        for a, b in zip(found, data, strict=False):
            assert relative_error(a, b) < 0.35
        assert storage.get(keys[0]) is not None
        assert storage.counts == PageCounts(
            3, 0, storage.counts.cache_bytes, storage.counts.page_bytes, 4, 0
        )


def test_pages_that_are_not_what_they_should_be_are_missed(
    make: Any, real_sample: RealSample, tmp_path: Path
) -> None:
    """Damaged, cut off, swapped, of another codec: the pool stays as it was, the page goes."""
    pool = pool_of(real_sample)
    keys, indices = filled(real_sample, pool, 5)
    storage = make(pool)
    assert all(storage.batch_set_v1(keys, indices, told(0)))
    files = [tmp_path / "pages" / storage._name(key) for key in keys]
    page = bytearray(files[0].read_bytes())
    page[len(page) // 2] ^= 1
    files[0].write_bytes(page)
    files[1].write_bytes(files[1].read_bytes()[:-20])
    a, b = files[2].read_bytes(), files[3].read_bytes()
    files[2].write_bytes(b)
    files[3].write_bytes(a)
    before = pool.kv_buffer.clone()
    for i in range(4):
        own = indices[i * SIZE : (i + 1) * SIZE]
        assert storage.batch_get_v1(keys[i : i + 1], own, told(i)) == [False]
        assert not storage.exists(keys[i])
    assert torch.equal(pool.kv_buffer, before)
    assert storage.counts.refused == 4
    assert storage.batch_get_v1(keys[4:], indices[4 * SIZE :], told(4)) == [True]
    # After a page that is missing none is loaded.
    assert storage.batch_get_v1(keys[3:], indices[3 * SIZE :], told(3)) == [False, False]
    # Another codec, or another model, has other pages.
    assert make(pool, ratio=8).batch_exists(keys[4:]) == 0
    other = make(pool)
    assert other.batch_exists(keys[4:]) == 1
    other.clear()
    assert other.batch_exists(keys[4:]) == 0


def test_a_foreign_page_in_a_page_s_place(
    make: Any, real_sample: RealSample, tmp_path: Path
) -> None:
    """Written by one who has the calibration, and not the key."""
    secrets = []
    for i in range(2):
        secrets.append(tmp_path / f"secret{i}")
        secrets[i].write_text(f"{i}" * 32)
    pool = pool_of(real_sample)
    keys, indices = filled(real_sample, pool, 1)
    own, foreign = (make(pool, key_file=str(path)) for path in secrets)
    assert own.batch_set_v1(keys, indices, told(0)) == [True]
    (page,) = (path for path in (tmp_path / "pages").rglob("*") if path.is_file())
    assert foreign.batch_exists(keys) == 0
    assert foreign.batch_set_v1(keys, indices, told(0)) == [True]
    (another,) = (p for p in (tmp_path / "pages").rglob("*") if p.is_file() and p != page)
    page.write_bytes(another.read_bytes())
    assert own.batch_exists(keys) == 1
    assert own.batch_get_v1(keys, indices, told(0)) == [False]


def test_what_is_not_served_is_refused_by_name(
    storage_class: Any, make: Any, real_sample: RealSample, calibration_path: Path
) -> None:
    settings = {**NAMED, "calibration": str(calibration_path), "store": "memory://refused"}
    for name, value, message in (
        ("tp_size", 2, "tp_size is 2"),
        ("pp_size", 4, "pp_size is 4"),
        ("is_mla_model", True, "latent attention"),
        ("should_split_heads", True, "splits pages by heads"),
    ):
        config = Config(settings)
        setattr(config, name, value)
        with pytest.raises(kvtc.UnsupportedError, match=message):
            storage_class(config, {})
    with pytest.raises(ValueError, match="extra-config has 'ration'; KvtcStorage knows"):
        storage_class(Config({**settings, "ration": 4}), {})
    with pytest.raises(ValueError, match="lacks 'store'; give it calibration and store"):
        storage_class(Config({"calibration": str(calibration_path)}), {})
    pool = pool_of(real_sample)
    pool.layout = "page_unified"
    with pytest.raises(kvtc.UnsupportedError, match="'page_unified'; served are layer_first"):
        make(pool)
    pool = pool_of(real_sample)
    pool.dtype = torch.float8_e4m3fn
    with pytest.raises(kvtc.UnsupportedError, match="cache is float8_e4m3fn"):
        make(pool)
    pool = pool_of(real_sample)
    pool.layer_num += 1
    with pytest.raises(kvtc.CalibrationMismatchError, match="the host pool has layers"):
        make(pool)
    storage = make(pool_of(real_sample))
    with pytest.raises(kvtc.UnsupportedError, match="has a pool mamba"):
        storage.register_mem_host_pool_v2(None, "mamba")


def test_a_store_that_fails_is_no_error(
    make: Any, real_sample: RealSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(real_sample)
    keys, indices = filled(real_sample, pool, 2)
    storage = make(pool)
    assert storage.batch_set_v1(keys[:1], indices[:SIZE], told(0)) == [True]

    def fail(*_: Any) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(storage._store, "_get", fail)
    monkeypatch.setattr(storage._store, "_put", fail)
    assert storage.batch_get_v1(keys, indices, told(0)) == [False, False]
    assert storage.batch_set_v1(keys, indices, told(0)) == [True, False]


@pytest.mark.skipif(not sglang_is_there(), reason="needs SGLang: see CONTRIBUTING.md")
def test_sglang_s_factory(real_sample: RealSample, calibration_path: Path, tmp_path: Path) -> None:
    """Its own factory and configuration, from the JSON that users write."""
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorage,
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
    )
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    own = {"calibration": str(calibration_path), "store": str(tmp_path / "pages"), "ratio": 4}
    config = HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        is_page_first_layout=False,
        model_name="a-model",
        extra_config=json.loads(json.dumps({**NAMED, **own})),
    )
    pool = pool_of(real_sample)
    storage = StorageBackendFactory.create_backend("dynamic", config, pool)
    assert isinstance(storage, HiCacheStorage)
    storage.register_mem_pool_host(pool)
    storage.on_host_pools_registered()
    keys, indices = filled(real_sample, pool, 4)
    extra = HiCacheStorageExtraInfo(prefix_keys=[])
    assert all(storage.batch_set_v1(keys, indices, extra))
    assert storage.batch_exists(keys, extra) == 4
    assert all(storage.batch_get_v1(keys, indices, extra))
    storage.close()
