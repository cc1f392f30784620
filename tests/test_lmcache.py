"""The serde for LMCache, with its own classes and its own adapter for folders, and our adapter in
its server.

Needs LMCache, in an environment of its own: see CONTRIBUTING.md.
"""

from __future__ import annotations

import itertools
import json
import pickle
import select
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_sample import RealSample

import kvtc_stream as kvtc

pytest.importorskip("lmcache.v1.distributed.serde", exc_type=ImportError)

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import (
    L2AdapterConfigBase,
    get_l2_adapter_config_class,
)
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter
from lmcache.v1.distributed.serde import create_serde_processor
from lmcache.v1.memory_management import (
    MemoryFormat,
    MemoryObjMetadata,
    TensorMemoryObj,
)
from lmcache.v1.multiprocess.custom_types import (
    IPCCacheServerKey,
    RegisterEngineDrivenContextPayload,
)
from lmcache.v1.multiprocess.transfer_context.base import (
    gather_paged_kv_to_cpu,
    scatter_cpu_to_paged_kv,
)
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

from kvtc_stream.integrations.hosts.layouts import VLLM_LAYOUTS
from kvtc_stream.integrations.lmcache import SerdeSettings
from kvtc_stream.integrations.lmcache.serde import (
    Chunks,
    KvtcDeserializer,
    KvtcPlugin,
    KvtcSerializer,
)

SIZE = 32


@pytest.fixture(scope="module")
def calibration_path(real_sample: RealSample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    calibrator = kvtc.Calibrator(real_sample.geometry, bases=["joint"], sinks=0)
    calibrator.update(real_sample.k, real_sample.v)
    path = tmp_path_factory.mktemp("lmcache") / "real.safetensors"
    calibrator.finish().save(path)
    return path


def chunk(shape: Any, dtype: torch.dtype) -> TensorMemoryObj:
    """Memory as LMCache gives it."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.zeros(size, dtype=torch.uint8)
    metadata = MemoryObjMetadata(
        shape=torch.Size(shape),
        dtype=dtype,
        address=0,
        phy_size=size,
        ref_count=1,
        fmt=MemoryFormat.KV_2LTD,
        shapes=[torch.Size(shape)],
        dtypes=[dtype],
    )
    return TensorMemoryObj(raw, metadata, None)


def filled(sample: RealSample, start: int, fused: bool, size: int = SIZE) -> TensorMemoryObj:
    """The chunk of some tokens, value by value."""
    k, v = (
        torch.from_numpy(x[:, :, start : start + size].astype(np.float32)).bfloat16()
        for x in (sample.k, sample.v)
    )
    layers, heads, tokens, dim = k.shape
    if fused:
        own = chunk((layers, tokens, heads * 2 * dim), torch.bfloat16)
        both = torch.cat([k, v], dim=-1).permute(0, 2, 1, 3)
        own.tensor.copy_(both.reshape(layers, tokens, heads * 2 * dim))
    else:
        own = chunk((2, layers, tokens, heads * dim), torch.bfloat16)
        for half, x in enumerate((k, v)):
            own.tensor[half].copy_(x.permute(0, 2, 1, 3).reshape(layers, tokens, heads * dim))
    return own


def key_of(i: int, salt: str = "", model: str = "a/model") -> ObjectKey:
    return ObjectKey(
        chunk_hash=bytes([i]) * 32, model_name=model, kv_rank=0x01000100, cache_salt=salt
    )


def layout_of(obj: TensorMemoryObj) -> MemoryLayoutDesc:
    return MemoryLayoutDesc(shapes=obj.get_shapes(), dtypes=obj.get_dtypes())


def error_of(found: TensorMemoryObj, expected: TensorMemoryObj) -> float:
    a, b = found.tensor.float(), expected.tensor.float()
    return float((a - b).norm() / b.norm())


@pytest.fixture
def chunks(calibration_path: Path) -> Chunks:
    return Chunks(SerdeSettings.read({"calibration": str(calibration_path), "ratio": 3}))


def coded(chunks: Chunks, obj: TensorMemoryObj, key: ObjectKey) -> TensorMemoryObj:
    serializer = KvtcSerializer(chunks)
    slot = chunk((serializer.estimate_serialized_size(layout_of(obj)),), torch.uint8)
    slot.tensor.fill_(7)
    assert serializer.serialize(obj, slot, key) == slot.get_size()
    return slot


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_chunks_come_back(chunks: Chunks, real_sample: RealSample, fused: bool) -> None:
    """At positions that were found, and as the library decodes them there."""
    for i, start in enumerate((0, SIZE, 3 * SIZE)):
        own = filled(real_sample, start, fused)
        slot = coded(chunks, own, key_of(i))
        assert slot.get_size() < own.get_size() / 2.5
        found = chunk(own.tensor.shape, torch.bfloat16)
        KvtcDeserializer(chunks).deserialize(slot, found, key_of(i))
        assert 0 < error_of(found, own) < 0.35
        calibration = kvtc.Calibration.load(chunks.settings.calibration)
        codec = kvtc.Codec(calibration, block_tokens=SIZE, ratio=3, error_bound=0.5)
        pages = kvtc.PageCodec(codec, dtype="bfloat16")
        k, v = chunks.read(own)
        expected = pages.decode(pages.encode(k, v, positions=start))
        for a, b in zip(chunks.read(found), expected, strict=True):
            assert torch.equal(a, torch.from_dlpack(b))
    assert chunks.counts.coded == chunks.counts.decoded == 3


def test_equal_chunks_give_equal_bytes(chunks: Chunks, real_sample: RealSample) -> None:
    own = filled(real_sample, SIZE, fused=True)
    first, second = (coded(chunks, own, key_of(1)).tensor for _ in range(2))
    assert torch.equal(first, second)


def test_damaged_swapped_and_foreign_chunks_are_refused(
    chunks: Chunks, real_sample: RealSample, calibration_path: Path
) -> None:
    """Another chunk's, another tenant's, another model's, another codec's."""
    own = filled(real_sample, 0, fused=True)
    slot = coded(chunks, own, key_of(0, "tenant a"))
    found = chunk(own.tensor.shape, torch.bfloat16)
    found.tensor.fill_(1)
    others = (key_of(1, "tenant a"), key_of(0, "tenant b"), key_of(0, "tenant a", "b/model"))
    for other in others:
        with pytest.raises(kvtc.AuthenticationError):
            KvtcDeserializer(chunks).deserialize(slot, found, other)
    options = {"calibration": str(calibration_path), "ratio": 6, "max_bytes": slot.get_size()}
    with pytest.raises(kvtc.CalibrationMismatchError):
        KvtcDeserializer(Chunks(SerdeSettings.read(options))).deserialize(
            slot, found, key_of(0, "tenant a")
        )
    used = int(slot.tensor.nonzero().max()) + 1
    for place in range(0, used, used // 40):
        slot.tensor[place] ^= 16
        with pytest.raises(kvtc.KVTCError):
            KvtcDeserializer(chunks).deserialize(slot, found, key_of(0, "tenant a"))
        slot.tensor[place] ^= 16
    assert torch.equal(found.tensor, torch.ones_like(found.tensor))
    KvtcDeserializer(chunks).deserialize(slot, found, key_of(0, "tenant a"))
    assert error_of(found, own) < 0.35


def test_unsure_positions(chunks: Chunks, real_sample: RealSample, calibration_path: Path) -> None:
    """Not stored where every chunk has its slot; bit for bit where there is room."""
    own = filled(real_sample, 5, fused=False)
    with pytest.raises(kvtc.UnsupportedError, match="it is not stored"):
        coded(chunks, own, key_of(0))
    assert chunks.counts.lossless == 1
    options = {"calibration": str(calibration_path), "ratio": 3}
    room = Chunks(SerdeSettings.read({**options, "max_bytes": own.get_size() + 1000}))
    found = chunk(own.tensor.shape, torch.bfloat16)
    KvtcDeserializer(room).deserialize(coded(room, own, key_of(0)), found, key_of(0))
    assert torch.equal(found.tensor, own.tensor)
    # It was not read as chunks of vLLM's CPU backend, and is not to be written as one.
    blocks = SerdeSettings.read(
        {**options, "max_bytes": own.get_size() + 1000, "cpu_block_tokens": 16}
    )
    with pytest.raises(kvtc.AuthenticationError):
        KvtcDeserializer(Chunks(blocks)).deserialize(
            coded(room, filled(real_sample, 5, fused=True), key_of(0)),
            chunk(filled(real_sample, 5, fused=True).tensor.shape, torch.bfloat16),
            key_of(0),
        )
    # A position beyond those that are looked for is none, too.
    near = Chunks(SerdeSettings.read({**options, "max_tokens": SIZE}))
    coded(near, filled(real_sample, 0, fused=True), key_of(0))
    with pytest.raises(kvtc.UnsupportedError, match="max_tokens says how long"):
        coded(near, filled(real_sample, 2 * SIZE, fused=True), key_of(0))


def test_what_is_not_served_is_refused(chunks: Chunks, calibration_path: Path) -> None:
    with pytest.raises(kvtc.UnsupportedError, match="LMCache"):
        chunks.read(chunk((4, 3, SIZE, 128), torch.bfloat16))
    layers, heads, dim = 30, 3, 64
    section = chunks._section
    layers, heads, dim = len(section.layers), section.kv_heads, section.k_dim
    with pytest.raises(kvtc.CalibrationMismatchError, match="the chunk has layers"):
        chunks.read(chunk((2, layers + 1, SIZE, heads * dim), torch.bfloat16))
    half = chunk((2, layers, SIZE, heads * dim), torch.float8_e4m3fn)
    with pytest.raises(kvtc.UnsupportedError, match="cache is float8_e4m3fn"):
        coded(chunks, half, key_of(0))
    with pytest.raises(ValueError, match="serde lacks 'ratio'"):
        SerdeSettings.read({"calibration": str(calibration_path)})
    with pytest.raises(ValueError, match="serde has 'store'; the serde kvtc knows"):
        SerdeSettings.read({"calibration": "c", "ratio": 8, "store": "/x"})
    for params in ({}, {"type": "plugin"}):
        with pytest.raises(ValueError, match="name one of LMCache's own adapters"):
            KvtcPlugin(params)


def test_chunks_of_vllm_on_cpus(real_sample: RealSample, calibration_path: Path) -> None:
    """Copied from and into blocks of its CPU backend by LMCache's own code."""
    block, layers, (heads, dim) = 16, len(real_sample.k), real_sample.k.shape[1::2]

    def caches() -> tuple[dict[str, torch.Tensor], list[Any]]:
        own = {
            f"layer.{i}": torch.zeros(6, heads, block, 2 * dim).bfloat16() for i in range(layers)
        }
        sizes = {"H": heads, "N": block, "D": dim}
        return own, [VLLM_LAYOUTS[1].views(x, sizes) for x in own.values()]

    ids = [4, 1, 3, 5]  # two chunks of two blocks
    before, views = caches()
    for layer, own in enumerate(views):
        for i, place in enumerate(ids):
            for view, x in zip(own, (real_sample.k, real_sample.v), strict=True):
                part = x[layer, :, i * block : (i + 1) * block].astype(np.float32)
                view[place] = torch.from_numpy(part).bfloat16()
    copied = gather_paged_kv_to_cpu(before, ids, 2)
    options = {"calibration": str(calibration_path), "ratio": 3}
    chunks = Chunks(SerdeSettings.read({**options, "cpu_block_tokens": block}))
    restored = []
    for i, x in enumerate(copied):
        own = chunk(x.shape, torch.bfloat16)
        own.tensor.copy_(x)
        with pytest.raises(kvtc.UnsupportedError, match="not stored"):
            coded(Chunks(SerdeSettings.read(options)), own, key_of(i))
        found = chunk(x.shape, torch.bfloat16)
        KvtcDeserializer(chunks).deserialize(coded(chunks, own, key_of(i)), found, key_of(i))
        restored.append(found.tensor)
    assert chunks.counts.coded == 2
    after, own_views = caches()
    scatter_cpu_to_paged_kv(after, ids, restored, 2)
    for expected, found in zip(views, own_views, strict=True):
        for a, b in zip(expected, found, strict=True):
            assert float((a.float() - b.float()).norm() / a.float().norm()) < 0.5


# With LMCache's own adapter and processor.


def until(condition: Callable[[], Any], descriptor: int, seconds: float = 60) -> Any:
    """What a task gives, when it is done."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := condition()) is not None:
            return found
        select.select([descriptor], [], [], 0.05)
    raise TimeoutError


@pytest.fixture
def stacked(calibration_path: Path, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """Adapter and serde, from the JSON of the command line alone."""
    config = json.loads(
        json.dumps(
            {
                "type": "plugin",
                "module_path": "kvtc_stream.integrations.lmcache",
                "class_name": "KvtcPlugin",
                "adapter_params": {"type": "fs", "base_path": str(tmp_path / "chunks")},
                "serde": {"type": "kvtc", "calibration": str(calibration_path), "ratio": 3},
            }
        )
    )
    own = get_l2_adapter_config_class("plugin").from_dict(config)
    adapter = create_l2_adapter(own, None)
    serde = create_serde_processor(L2AdapterConfigBase._parse_serde_config(config))
    yield adapter, serde
    serde.close()
    adapter.close()


def test_a_folder_of_lmcache(
    stacked: tuple[Any, Any], real_sample: RealSample, tmp_path: Path
) -> None:
    adapter, serde = stacked
    assert isinstance(adapter, FSL2Adapter)
    chunks = [filled(real_sample, i * SIZE, fused=True) for i in range(3)]
    keys = [key_of(i) for i in range(3)]
    size = serde.estimate_serialized_size(layout_of(chunks[0]))

    def slots() -> list[TensorMemoryObj]:
        return [chunk((size,), torch.uint8) for _ in keys]

    stored = slots()
    task = serde.submit_serialize(chunks, stored, keys)
    done = until(lambda: serde.query_serialize_result(task), serde.get_serialize_event_fd())
    assert done is True
    task = adapter.submit_store_task(keys, stored)
    result = until(
        lambda: adapter.pop_completed_store_tasks() or None, adapter.get_store_event_fd()
    )
    assert result[task].is_successful()
    files = sorted((tmp_path / "chunks").glob("*.data"))
    assert [f.stat().st_size for f in files] == [size] * 3

    def load(count: int) -> tuple[Any, Any, list[TensorMemoryObj]]:
        """Which chunks came from the folder, whether they are whole, and they themselves."""
        temporary = slots()[:count]
        task = adapter.submit_load_task(keys[:count], temporary)
        loaded = until(lambda: adapter.query_load_result(task), adapter.get_load_event_fd())
        out = [chunk(chunks[0].tensor.shape, torch.bfloat16) for _ in range(count)]
        task = serde.submit_deserialize(temporary, out, keys[:count])
        whole = until(
            lambda: serde.query_deserialize_result(task), serde.get_deserialize_event_fd()
        )
        return loaded, whole, out

    loaded, whole, out = load(3)
    assert [loaded.test(i) for i in range(3)] == [True] * 3
    assert whole is True
    for a, b in zip(out, chunks, strict=True):
        assert error_of(a, b) < 0.35
    damaged = bytearray(files[1].read_bytes())
    damaged[100] ^= 1
    files[1].write_bytes(damaged)
    assert load(3)[1] is False  # LMCache takes a load that failed for misses
    assert load(1)[1] is True


# With LMCache's server, a process of its own, asked as an engine's worker asks it.


class Server:
    """LMCache's server with our adapter, by its command line, and a worker beside it."""

    def __init__(self, params: dict[str, Any], log: Path, like: torch.Tensor) -> None:
        with socket.socket() as a, socket.socket() as b:
            for own in (a, b):
                own.bind(("localhost", 0))
            port, self._http = a.getsockname()[1], b.getsockname()[1]
        adapter = {
            "type": "plugin",
            "module_path": "kvtc_stream.integrations.lmcache",
            "class_name": "KvtcAdapter",
            "adapter_params": params,
        }
        command = (
            f"server --port {port} --http-port {self._http} --chunk-size {SIZE} --l1-size-gb 0.1 "
            "--no-l1-use-lazy --eviction-policy LRU --supported-transfer-mode engine_driven "
            "--disable-metrics --l2-adapter"
        ).split()
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [str(Path(sys.executable).with_name("lmcache")), *command, json.dumps(adapter)],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._wait(lambda: self._get("healthcheck"))
        self._client = RequestClientFactory.create(f"localhost:{port}")
        layers, tokens, width = like.shape
        self._client.register_kv_cache_engine_driven_context(
            RegisterEngineDrivenContextPayload(
                instance_id=1,
                model_name="a/model",
                world_size=1,
                block_size=SIZE,
                num_layers=layers,
                hidden_dim_size=width,
                dtype_str="bfloat16",
                use_mla=True,  # which means that K and V are side by side
                num_physical_slots=tokens,
            )
        ).result(timeout=60)
        self._requests = itertools.count()

    def store(self, chunks: list[torch.Tensor]) -> None:
        """Store a prompt, and wait until its chunks are on the disk."""
        key = self._key(len(chunks))
        self._client.prepare_store(key, 1).result(timeout=60)
        assert self._client.commit_store(key, 1, pickle.dumps(chunks)).result(timeout=60)

    def load(self, count: int) -> list[torch.Tensor]:
        """What the server has of a prompt of so many chunks."""
        key = self._key(count)
        self._client.lookup(key.no_worker_id_version(), 1).result(timeout=60)
        found = self._client.wait_prefetch_status(key.request_id, 60.0).result(timeout=90)
        if not found:
            return []
        response = self._client.prepare_retrieve(self._key(found, key.request_id), 1)
        chunks: list[torch.Tensor] = pickle.loads(response.result(timeout=60).data)
        self._client.commit_retrieve(key, 1).result(timeout=60)
        return chunks

    def adapter(self) -> dict[str, Any]:
        """What the server says of the adapter."""
        (found,) = json.loads(self._get("status") or b"")["storage_manager"]["l2_adapters"]
        return found  # type: ignore[no-any-return]

    def kill(self) -> None:
        """As a machine does that loses power."""
        self._client.close()
        self._process.kill()
        self._process.wait(60)

    def _key(self, count: int, request: str | None = None) -> Any:
        return IPCCacheServerKey(
            model_name="a/model",
            world_size=1,
            worker_id=0,
            token_ids=tuple(range(count * SIZE)),
            start=0,
            end=count * SIZE,
            request_id=request or f"request {next(self._requests)}",
            num_kv_readers=1,
        )

    def _get(self, path: str) -> bytes | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/{path}") as answer:
                found: bytes = answer.read()
                return found
        except OSError:
            return None

    def _wait(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.2)


def test_a_server_that_is_killed(
    real_sample: RealSample, calibration_path: Path, tmp_path: Path
) -> None:
    """Another one finds what it stored; what was damaged meanwhile is computed and stored again."""
    folder, names = tmp_path / "pages", itertools.count()
    params = {"calibration": str(calibration_path), "store": str(folder), "ratio": 3}
    own = [filled(real_sample, i * SIZE, fused=True).tensor for i in range(4)]

    def started() -> Server:
        return Server({**params, "budget_gb": 1}, tmp_path / f"log {next(names)}", own[0])

    def files() -> list[Path]:
        return sorted(path for path in folder.rglob("*/*/*") if not path.name.startswith("."))

    def until_stored(server: Server, count: int) -> None:
        server._wait(lambda: server.adapter()["coded"] == count and len(files()) == 4)

    server = started()
    try:
        assert server.load(4) == []
        server.store(own)
        until_stored(server, 4)
    finally:
        server.kill()
    second = sorted(files(), key=lambda path: path.stat().st_mtime_ns)[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    server = started()
    try:
        assert len(server.load(4)) == 1
        assert server.adapter()["refused"] == 1
        assert not second.exists()
        server.store(own)  # as an engine that has computed what was not there
        until_stored(server, 1)
        assert second.read_bytes() == whole
    finally:
        server.kill()
    server = started()
    try:
        found = server.load(4)
        assert len(found) == 4
        for a, b in zip(found, own, strict=True):
            assert float((a.float() - b.float()).norm() / b.float().norm()) < 0.05
        status = server.adapter()
        assert (status["decoded"], status["refused"]) == (4, 0)
    finally:
        server.kill()
