"""The tier under vLLM's own tiering manager: ``pytest -m vllm``, as ``test_vllm.py``.

One engine stores more pages than the rows of its host memory hold, another loads them from disk.
vLLM's copies between device and host do not run on a CPU; there ``vllm_tiering.py`` has others, and
all else is vLLM's.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_vllm import (
    BLANK,
    ENGINE,
    FAULTY,
    LONG,
    SALTED,
    SHORT,
    VOCABULARY,
    divergence,
    prompt,
    pytestmark,
    rows,
    save_model,
    serve,
)

import kvtc_stream as kvtc

__all__ = ["pytestmark"]

PAGE, KEPT = 64, 8
#: Bytes of host memory: 42 pages.
HOST = 2 << 20
SWAPPED = prompt(7, 600)
#: A request whose steps carry the copies of the one before, and that has no page of its own.
LAST: dict[str, Any] = {"ids": [SHORT]}


def on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def calibrate(model: Path, path: Path) -> kvtc.Calibration:
    """From what transformers caches, with what the tests' model has for RoPE."""
    import torch
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    geometry = kvtc.Geometry.uniform(
        layers=3, kv_heads=2, head_dim=32, rope=kvtc.Rope.from_theta(1e4, 32)
    )
    calibrator = kvtc.Calibrator(geometry, bases=("joint",))
    for i in range(9):
        with torch.inference_mode():
            layers = llama(torch.tensor([prompt(100 + i, 1000)])).past_key_values.layers
        calibrator.update([x.keys[0] for x in layers], [x.values[0] for x in layers])
    found = calibrator.finish()
    found.save(path)
    return found


class Tiered:
    """What the engines gave, and the store between them."""

    def __init__(self, folder: Path) -> None:
        save_model(folder / "model")
        calibration = calibrate(folder / "model", folder / "calibration.safetensors")
        codec = kvtc.Codec(calibration, ratio=4, block_tokens=PAGE)
        self.codec = kvtc.PageCodec(codec, dtype="bfloat16", key=calibration.digest)
        self.store = folder / "store"
        common = {
            "connector_name": "OffloadingConnector",
            "connector": {
                **(
                    {"spec_name": "TieringOffloadingSpec"}
                    if on_cuda()
                    else {"spec_name": "CpuTieringSpec", "spec_module_path": "vllm_tiering"}
                ),
                "cpu_bytes_to_use": HOST,
                "block_size": PAGE,
                "secondary_tiers": [
                    {
                        "type": "KvtcTier",
                        "module_path": "kvtc_stream.integrations.vllm",
                        "calibration": str(folder / "calibration.safetensors"),
                        "store": str(self.store),
                        "ratio": 4,
                        "error_bound": None,
                        "timeout": 120,
                    }
                ],
            },
            "engine": ENGINE | {"disable_log_stats": False},
            "folder": str(self.store),
            "metrics": True,
        }
        requests: list[dict[str, Any]] = [
            {"ids": [LONG], "score": VOCABULARY},
            LAST | {"pages": 15},
            {"ids": [BLANK], "score": VOCABULARY},
            LAST | {"pages": 30},
            {"ids": [FAULTY], "next": VOCABULARY},
            LAST | {"pages": 39},
            {"ids": [SWAPPED], "next": VOCABULARY},
            LAST | {"pages": 48},
            {"ids": [SALTED], "next": VOCABULARY, "salt": "tenant"},
            LAST | {"pages": 52},
            {"ids": [LONG], "next": VOCABULARY, "forget": True},
        ]
        found = serve(folder, "store", requests=requests, **common)
        self.exact = found[::2]
        #: Of each request, by number.
        self.files = [self.in_order(x["files"]) for x in found[1::2]]
        self.sizes = [path.stat().st_size for files in self.files for path in files]
        long, blank, faulty, swapped, _ = self.files
        for path in (*long[KEPT:], *blank[KEPT:]):
            path.unlink()  # what followed is computed, and can be scored
        k, v = kvtc.testing.drawn_cache(calibration.geometry, PAGE, dtype=kvtc.DType.BFLOAT16)
        for i, path in enumerate(blank[:KEPT]):
            zeros = k * 0, v * 0
            path.write_bytes(
                self.codec.encode_raw(*zeros, positions=i * PAGE, identity=self.identity(path, i))
            )
        faulty[4].write_bytes(faulty[4].read_bytes()[:-40] + bytes(40))
        swapped[1].write_bytes(faulty[1].read_bytes())
        again = [requests[i] for i in (0, 2, 4, 6)]
        again += [{"ids": [SALTED], "next": VOCABULARY}, requests[8], LAST | {"pages": 56}]
        self.restored = serve(folder, "load", requests=again, **common)
        self.log = (folder / "load.log").read_text()

    def identity(self, path: Path, number: int) -> bytes:
        """What a page is sealed as."""
        return f"{path.relative_to(self.store)}@{number * PAGE}".encode()

    def opens(self, path: Path, number: int) -> bool:
        """Whether a file is the page of this number."""
        try:
            identity = self.identity(path, number)
            self.codec.block(path.read_bytes(), slice(0, 1), identity=identity)
        except kvtc.KVTCError:
            return False
        return True

    def in_order(self, files: list[str]) -> list[Path]:
        """Pages of a prompt, which are stored in any order."""
        paths = [Path(file) for file in files]
        found = [[path for path in paths if self.opens(path, i)] for i in range(len(paths))]
        assert [len(x) for x in found] == [1] * len(paths)
        return [x for [x] in found]

    def count(self, name: str) -> float:
        """A metric of the loading engine."""
        [value] = re.findall(rf"vllm:kvtc_tier_{name} (\S+)", self.log)
        return float(value)


@pytest.fixture(scope="module")
def tiered(tmp_path_factory: pytest.TempPathFactory) -> Tiered:
    with pytest.MonkeyPatch.context() as patch:
        # On a CPU, scheduler and worker are one process only so.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        return Tiered(tmp_path_factory.mktemp("tier"))


def test_cached_tokens_are_counted(tiered: Tiered) -> None:
    """Whole pages up to one that is of no use; none of another tenant's."""
    assert [x["cached"] for x in tiered.exact] == [0] * 5 + [15 * PAGE]
    expected = [KEPT * PAGE, KEPT * PAGE, 4 * PAGE, PAGE, 0, 4 * PAGE, 0]
    assert [x["cached"] for x in tiered.restored] == expected
    assert all(x["reason"] == "length" for x in tiered.restored)


def test_a_restored_prefix_predicts_as_the_exact_one(tiered: Tiered) -> None:
    """By its KL divergence over the tokens that follow, beside pages of zeros."""
    last = len(LONG) - KEPT * PAGE - 1
    long, blank = (
        divergence(*(rows(x[i]["logprobs"], last) for x in (tiered.exact, tiered.restored)))
        for i in range(2)
    )
    print(f"KL {long:.5f}, of zeros {blank:.5f}")
    assert 0 < long < 0.05 * blank
    assert blank > 0.1


def test_what_host_memory_had_no_room_for_comes_back(tiered: Tiered) -> None:
    """To the engine that stored it, when host and device have forgotten it."""
    first, again = (rows([tiered.exact[i]["next"]], 1) for i in (0, 5))
    assert 0 < divergence(first, again) < 0.05


@pytest.mark.parametrize(("request_number", "bad"), [(2, 4), (3, 1)], ids=["damaged", "swapped"])
def test_a_bad_page_is_computed_and_stored_again(
    tiered: Tiered, request_number: int, bad: int
) -> None:
    pair = (x[request_number]["next"] for x in (tiered.exact, tiered.restored))
    assert divergence(*(rows([x], 1) for x in pair)) < 0.05
    assert tiered.opens(tiered.files[request_number][bad], bad)
    assert tiered.log.count("is of no use and is deleted") == 2


def test_pages_are_small(tiered: Tiered) -> None:
    values = 2 * PAGE * 3 * 2 * 32
    assert sum(tiered.sizes) / len(tiered.sizes) < 2 * values / 3.5


def test_metrics_and_the_log(tiered: Tiered) -> None:
    """Of LONG and BLANK eight each, of FAULTY and SWAPPED all but one, of SALTED four."""
    assert tiered.count("damaged_pages") == 2
    assert tiered.count("loaded_pages") == 8 + 8 + 8 + 8 + 4
    assert tiered.count("loaded_cache_bytes") > 1.5 * tiered.count("loaded_bytes") > 0
    assert ("layout vllm CPU" in tiered.log) is not on_cuda()


@pytest.mark.filterwarnings("ignore")  # of what vLLM imports
def test_what_is_not_served_is_named() -> None:
    """At the start; here no engine has a worker in this process."""
    from kvtc_stream.integrations.vllm import tier

    view = memoryview(np.zeros((2, 8), np.uint8))
    with pytest.raises(ValueError, match="the secondary tier lacks 'calibration'"):
        tier.KvtcTier(None, view, "KvtcTier")
    with pytest.raises(kvtc.UnsupportedError, match="scheduler and worker are one process"):
        tier.KvtcTier(None, view, "KvtcTier", calibration="c", store="s")

    def found(**changes: Any) -> list[str]:
        vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=changes.get("ranks", 1)),
            cache_config=SimpleNamespace(prefix_caching_hash_algo=changes.get("hash", "sha256")),
            lora_config=changes.get("lora"),
        )
        spec = SimpleNamespace(
            config=SimpleNamespace(canonical_layout=changes.get("canonical", False)),
            _scheduler_mmap=SimpleNamespace(fd=changes.get("file", 3)),
        )
        return tier.refusals(vllm_config, spec)

    assert found() == []
    assert found(file=None) == ["vLLM's host memory is no file that another process can open"]
    [reason] = found(ranks=2)
    assert "use KvtcConnector" in reason
    [reason] = found(hash="xxhash")
    assert "use sha256" in reason
    assert len(found(lora=object(), canonical=True)) == 2
