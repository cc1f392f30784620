"""The connector in a real vLLM, on the CPU: ``pytest -m vllm``, in an environment of its own.

CONTRIBUTING.md says how to make it. A small model with drawn weights; three engines, one after the
other: one makes a calibration of what it serves, one stores pages, one loads them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kvtc_stream as kvtc

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="needs vLLM, in an environment of its own"
    ),
]

PAGE, BLOCK, VOCABULARY = 64, 32, 384
ENGINE = {
    "block_size": BLOCK,
    "max_model_len": 1536,
    "max_num_batched_tokens": 512,  # prompts come in chunks
    "max_logprobs": VOCABULARY,
}


def save_model(folder: Path) -> None:
    """Three layers of two KV heads, with weights that make attention matter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def prompt(seed: int, tokens: int) -> list[int]:
    """Words of a small language, so that tokens have something to do with those before."""
    own, words = random.Random(seed), random.Random(7)
    book = [[words.randrange(VOCABULARY) for _ in range(words.randint(2, 6))] for _ in range(60)]
    found: list[int] = []
    while len(found) < tokens:
        found += own.choice(book)
    return found[:tokens]


LONG, TWIN, SHORT = prompt(1, 1000), prompt(1, 500) + prompt(2, 300), prompt(3, 40)
FAULTY, BLANK, SALTED = prompt(4, 600), prompt(5, 1000), prompt(6, 300)
#: Two that do not fit the loading engine's blocks together, when they have grown.
PAIR, GROWTH, BLOCKS = [prompt(8, 700), prompt(9, 700)], 300, 56
#: Pages of which requests are restored whose following tokens are scored.
KEPT = 8


def serve(place: Path, name: str, **given: Any) -> list[dict[str, Any]]:
    """Outputs of one engine, which is a process."""
    source, target = place / f"{name}.in.json", place / f"{name}.out.json"
    given = {"model": str(place / "model"), "engine": ENGINE, "skip_tokenizer": True} | given
    source.write_text(json.dumps(given))
    script = Path(__file__).with_name("vllm_engine.py")
    # Ranks would have a NUMA node each, which not every machine has.
    ranks = given["engine"].get("tensor_parallel_size", 1)
    alone = {} if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script), str(source), str(target)],
        env=os.environ | alone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    (place / f"{name}.log").write_text(run.stdout)
    # On some CPUs vLLM 0.32 aborts at its end now and then, by itself: all is written then.
    ended = run.returncode == -signal.SIGABRT and "without an active exception" in run.stdout
    assert run.returncode == 0 or (ended and target.exists()), run.stdout[-4000:]
    found: list[dict[str, Any]] = json.loads(target.read_text())
    return found


class Served:
    """What the engines gave, and the store between them."""

    def __init__(self, folder: Path) -> None:
        save_model(folder / "model")
        self.store = folder / "store"
        (folder / "learnt").mkdir()
        calibration = folder / "learnt" / "calibration.safetensors"
        serve(
            folder,
            "learn",
            connector={"calibrate": str(calibration), "calibrate_tokens": 9000},
            requests=[{"ids": [prompt(100 + i, 1000) for i in range(12)]}],
            folder=str(folder / "learnt"),
            pages=1,
        )
        self.calibration = kvtc.Calibration.load(calibration)
        codec = kvtc.Codec(self.calibration, ratio=4, block_tokens=PAGE)
        self.codec = kvtc.PageCodec(codec, dtype="bfloat16", key=self.calibration.digest)
        connector = {
            "calibration": str(calibration),
            "store": str(self.store),
            "ratio": 4,
            "error_bound": None,
            "page_tokens": PAGE,
        }
        requests = [{"ids": [x], "score": VOCABULARY} for x in (LONG, TWIN, SHORT, FAULTY, BLANK)]
        requests.append({"ids": [SALTED], "salt": "tenant"})
        counts = [15, 5, 0, 9, 15, 4]  # of whole pages that no other has
        common = {"connector": connector, "folder": str(self.store)}
        self.exact = serve(folder, "store", requests=requests, pages=sum(counts), **common)
        files = sorted(
            (path for path in self.store.rglob("*") if path.is_file()),
            key=lambda path: path.stat().st_mtime_ns,
        )
        assert len(files) == sum(counts)
        ends = np.cumsum(counts)
        self.files = [files[end - n : end] for end, n in zip(ends, counts, strict=True)]
        self.cached_bytes = [path.stat().st_size for path in files]
        long, twin, _, faulty, blank, _ = self.files
        self.pages = [path.read_bytes() for path in long[:KEPT]]
        for path in (*long[KEPT:], *blank[KEPT:]):
            path.unlink()  # what followed is computed, and can be scored
        faulty[4].write_bytes(faulty[4].read_bytes()[:-40] + bytes(40))
        twin[1].write_bytes(faulty[0].read_bytes())
        k, v = kvtc.testing.drawn_cache(self.calibration.geometry, PAGE, dtype=kvtc.DType.BFLOAT16)
        for i, path in enumerate(blank[:KEPT]):
            zeros = k * 0, v * 0
            page = self.codec.encode_raw(
                *zeros, positions=i * PAGE, identity=self.identity(path, i)
            )
            path.write_bytes(page)
        requests = [{"ids": [x], "score": VOCABULARY} for x in (LONG, BLANK, SHORT)]
        requests += [{"ids": [x], "next": VOCABULARY} for x in (FAULTY, TWIN, SALTED)]
        requests += [{"ids": [SALTED], "salt": "another"}, {"ids": [SALTED], "salt": "tenant"}]
        requests.append({"ids": PAIR, "tokens": GROWTH})
        # All pages again, those of SALTED for two more tenants, and those of the pair.
        pages = sum(counts) + 8 + 2 * ((700 + GROWTH - 1) // PAGE)
        engine = ENGINE | {"num_gpu_blocks_override": BLOCKS}
        self.restored = serve(
            folder, "load", requests=requests, pages=pages, **common | {"engine": engine}
        )
        self.log = (folder / "load.log").read_text()

    def identity(self, path: Path, number: int) -> bytes:
        """What a page is sealed as."""
        return f"{path.relative_to(self.store)}@{number * PAGE}".encode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("vllm"))


def rows(scores: list[dict[str, float]], last: int) -> NDArray[np.float64]:
    """Log-probabilities [tokens, vocabulary] of the last tokens."""
    found = np.full((last, VOCABULARY), -50.0)
    for row, own in zip(found, scores[-last:], strict=True):
        row[[int(token) for token in own]] = list(own.values())
    return found


def divergence(exact: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Mean KL divergence, nats."""
    return float((np.exp(exact) * (exact - found)).sum(axis=1).mean())


def test_cached_tokens_are_counted(served: Served) -> None:
    """A whole number of pages: of a prefix, of one that two share, of none."""
    own = 500 // BLOCK * BLOCK  # what two prompts share, from vLLM's own prefix cache
    assert [x["cached"] for x in served.exact] == [0, own, 0, 0, 0, 0]
    long, blank, short = served.restored[:3]
    assert long["cached"] == blank["cached"] == KEPT * PAGE
    assert short["cached"] == 0
    assert all(x["reason"] == "length" for x in served.restored)


def test_a_restored_prefix_predicts_as_the_exact_one(served: Served) -> None:
    """By its KL divergence over the tokens that follow, beside pages of zeros."""
    last = len(LONG) - KEPT * PAGE - 1
    long, blank = (
        divergence(*(rows(x["logprobs"], last) for x in pair))
        for pair in (
            (served.exact[0], served.restored[0]),
            (served.exact[4], served.restored[1]),
        )
    )
    print(f"KL {long:.5f}, of zeros {blank:.5f}")
    assert long < 0.05 * blank
    assert blank > 0.1
    short = divergence(*(rows(x["logprobs"], 39) for x in (served.exact[2], served.restored[2])))
    assert abs(short) < 1e-3


def test_the_engine_has_what_the_library_decodes(served: Served) -> None:
    """The same pages, decoded here and given to the model by transformers, diverge as much."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(served.store.parent / "model", dtype=torch.bfloat16)
    ids, last = torch.tensor([LONG]), len(LONG) - KEPT * PAGE - 1
    long = served.files[0]
    decoded = [
        served.codec.decode(page, identity=served.identity(path, i))
        for i, (page, path) in enumerate(zip(served.pages, long, strict=False))
    ]
    k, v = (torch.cat([torch.from_dlpack(p[i]) for p in decoded], dim=2) for i in range(2))
    with torch.inference_mode():
        exact = model(ids).logits[0].float().log_softmax(-1).double().numpy()
        cache = DynamicCache()
        for layer in range(len(k)):
            cache.update(k[layer][None], v[layer][None], layer)
        output = model(ids[:, KEPT * PAGE :], past_key_values=cache)
        found = output.logits[0].float().log_softmax(-1).double().numpy()
    library = divergence(exact[-last - 1 : -1], found[-last - 1 : -1])
    engine = rows(served.exact[0]["logprobs"], last)
    noise = divergence(engine, exact[-last - 1 : -1])
    own = divergence(engine, rows(served.restored[0]["logprobs"], last))
    print(f"KL in the engine {own:.5f}, by the library {library:.5f}, of exact ones {noise:.5f}")
    assert own < 1.1 * library + noise
    assert noise < 0.02


def test_pages_are_small(served: Served) -> None:
    values = 2 * PAGE * 3 * 2 * 32
    assert np.mean(served.cached_bytes) < 2 * values / 3.5


@pytest.mark.parametrize(("number", "place"), [(3, 3), (1, 4)], ids=["damaged", "swapped"])
def test_a_bad_page_is_computed_and_stored_again(served: Served, number: int, place: int) -> None:
    """The request notices nothing, and the next one has the page."""
    exact, found = served.exact[number], served.restored[place]
    assert found["reason"] == "length"
    next_token = [rows([x["next"]], 1) for x in (exact, found)]
    assert divergence(*next_token) < 0.05
    first = 0 if number == 3 else 7
    bad = 4 if number == 3 else 1
    path = served.files[number][bad]
    k, _ = served.codec.decode(path.read_bytes(), identity=served.identity(path, first + bad))
    assert k.shape[2] == PAGE
    assert served.log.count("is of no use and is deleted") == 2


def test_tenants_do_not_share(served: Served) -> None:
    assert [x["cached"] for x in served.restored[5:8]] == [0, 0, 4 * PAGE]


def test_preempted_requests_go_on(served: Served) -> None:
    """One of two has to wait while its blocks are the other's; pages of both are stored, whole."""
    assert BLOCKS * BLOCK < 2 * (700 + GROWTH)
    assert [len(x["ids"]) for x in served.restored[8:]] == [GROWTH] * 2
    for path in served.store.rglob("*"):
        if path.is_file():
            assert [opens(served, path, i) for i in range(16)].count(True) == 1


def opens(served: Served, path: Path, number: int) -> bool:
    """Whether a file is the page of this number."""
    try:
        served.codec.block(path.read_bytes(), slice(0, 1), identity=served.identity(path, number))
    except kvtc.AuthenticationError:
        return False
    return True


def test_the_log_tells_of_pages(served: Served) -> None:
    assert "layout vllm CPU" in served.log


def test_what_is_not_served_is_named(served: Served, tmp_path: Path) -> None:
    """At the start, before any request."""
    given = {
        "model": str(served.store.parent / "model"),
        "engine": ENGINE | {"kv_cache_dtype": "fp8"},
        "skip_tokenizer": True,
        "connector": {"calibration": "none", "store": str(tmp_path / "s")},
        "requests": [],
    }
    (tmp_path / "in.json").write_text(json.dumps(given))
    script = Path(__file__).with_name("vllm_engine.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "in.json"), str(tmp_path / "out.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode != 0
    assert "kv_cache_dtype is 'fp8'" in run.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_steps_that_compute_nothing_hold_blocks_and_store() -> None:
    """vLLM 0.25 does not wait for saves in them: its runners ask for what is finished only."""
    from kvtc_stream.integrations.vllm.connector import KvtcConnector, KvtcMetadata
    from kvtc_stream.integrations.vllm.scheduling import StepPlan
    from kvtc_stream.integrations.vllm.support import HeadParts

    called = []

    class Transfer:
        def __getattr__(self, name: str) -> Any:
            def call(*given: Any) -> Any:
                called.append((name, *given))
                return {"a"}, set()

            return call

    connector = KvtcConnector.__new__(KvtcConnector)
    connector._transfer = Transfer()
    connector._rank, connector._part, connector._parts = 0, 0, HeadParts(1, 3)
    stores: list[Any] = [object()]
    metadata = KvtcMetadata(StepPlan(stores=stores, held={"a"}), idle=True)
    connector.bind_connector_metadata(metadata)
    connector.start_load_kv(None)
    assert connector.get_finished({"a"}) == ({"a"}, None)
    names = [name for name, *_ in called]
    assert names == ["load", "store", "hold", "rest", "results"]
    assert (called[1][1], called[2][1]) == (stores, {"a"})
