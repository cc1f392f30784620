"""The connector in a real vLLM that spreads KV heads over two processes: ``pytest -m vllm``.

As ``test_vllm.py``: one engine makes calibrations of what it serves, one stores, one loads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_vllm import (
    ENGINE,
    KEPT,
    LONG,
    PAGE,
    SHORT,
    VOCABULARY,
    divergence,
    prompt,
    pytestmark,  # noqa: F401
    rows,
    save_model,
    serve,
)

import kvtc_stream as kvtc
from kvtc_stream.calibration.split import part_path

RANKS, RATIO = 2, 4
PARALLEL = ENGINE | {"tensor_parallel_size": RANKS}
FAULTY, BLANK = prompt(4, 600), prompt(5, 1000)
#: Pages of FAULTY of which a rank's part is damaged, is missing, and is another rank's.
DAMAGED, MISSING, SWAPPED = 4, 7, 2
COUNTS = [15, 9, 15]


class Served:
    """What the engines gave, and the store between them."""

    def __init__(self, folder: Path) -> None:
        save_model(folder / "model")
        self.folder, self.store = folder, folder / "store"
        (folder / "learnt").mkdir()
        path = str(folder / "learnt" / "model.safetensors")
        serve(
            folder,
            "learn",
            engine=PARALLEL,
            connector={"calibrate": path, "calibrate_tokens": 9000},
            requests=[{"ids": [prompt(100 + i, 1000) for i in range(12)]}],
            folder=str(folder / "learnt"),
            pages=RANKS,
        )
        self.calibrations = [kvtc.Calibration.load(part_path(path, i, RANKS)) for i in range(RANKS)]
        self.codecs = [
            kvtc.PageCodec(
                kvtc.Codec(own, ratio=RATIO, block_tokens=PAGE), dtype="bfloat16", key=own.digest
            )
            for own in self.calibrations
        ]
        connector = {
            "calibration": path,
            "store": str(self.store),
            "ratio": RATIO,
            "error_bound": None,
            "page_tokens": PAGE,
        }
        common = {"engine": PARALLEL, "connector": connector, "folder": str(self.store)}
        requests = [{"ids": [x], "score": VOCABULARY} for x in (LONG, FAULTY, BLANK, SHORT)]
        for request, count in zip(requests, np.cumsum(RANKS * np.array(COUNTS)), strict=False):
            request["pages"] = int(count)
        self.exact = serve(folder, "store", requests=requests, **common)
        # Pages of each request in order, of each rank: their files are as old as their positions.
        self.files = []
        for found in self.exact[: len(COUNTS)]:
            paths = sorted(map(Path, found["files"]), key=lambda x: x.stat().st_mtime_ns)
            own = [[x for x in paths if x.suffix == f".{i}"] for i in range(RANKS)]
            self.files.append(own)
        self.pages = [[path.read_bytes() for path in own] for own in self.files[0]]
        for parts in (self.files[0], self.files[2]):
            for path in [x for own in parts for x in own[KEPT:]]:
                path.unlink()  # what followed is computed, and can be scored
        faulty = self.files[1]
        self.bad = [faulty[1][DAMAGED], faulty[0][MISSING], faulty[1][SWAPPED]]
        self.bad[0].write_bytes(self.bad[0].read_bytes()[:-40] + bytes(40))
        self.bad[1].unlink()
        for i, own in enumerate(self.files[2]):
            self.blank(own[:KEPT], i)
        requests = [{"ids": [x], "score": VOCABULARY} for x in (LONG, BLANK, SHORT)]
        requests += [{"ids": [FAULTY], "next": VOCABULARY, "pages": RANKS * sum(COUNTS)}]
        self.restored = serve(folder, "load", requests=requests, **common)
        # And again, by one that is alike, with a page that is its neighbour's.
        self.bad[2].write_bytes(faulty[0][SWAPPED].read_bytes())
        requests = [{"ids": [FAULTY], "next": VOCABULARY, "pages": RANKS * sum(COUNTS)}]
        self.again = serve(folder, "again", requests=requests, **common)
        self.logs = [(folder / f"{name}.log").read_text() for name in ("load", "again")]

    def identity(self, path: Path, number: int) -> bytes:
        """What a rank's page is sealed as."""
        return f"{path.relative_to(self.store)}@{number * PAGE}".encode()

    def blank(self, paths: list[Path], rank: int) -> None:
        """Zeros in place of pages."""
        geometry = self.calibrations[rank].geometry
        k, v = kvtc.testing.drawn_cache(geometry, PAGE, dtype=kvtc.DType.BFLOAT16)
        for i, path in enumerate(paths):
            page = self.codecs[rank].encode_raw(
                k * 0, v * 0, positions=i * PAGE, identity=self.identity(path, i)
            )
            path.write_bytes(page)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("vllm"))


def test_each_rank_learns_and_stores_its_heads(served: Served) -> None:
    """A part for each, of which the second is of the second head."""
    assert [own.sections[0].heads for own in served.calibrations] == [(0, 2), (1, 2)]
    assert [[len(own) for own in x] for x in served.files] == [[n] * RANKS for n in COUNTS]


def test_pages_are_the_models_own_heads(served: Served) -> None:
    """As transformers computes them."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(served.folder / "model", dtype=torch.bfloat16)
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([LONG]), past_key_values=cache)
    exact = [
        torch.stack([getattr(x, name)[0].float() for x in cache.layers])
        for name in ("keys", "values")
    ]
    for rank, (pages, paths) in enumerate(zip(served.pages, served.files[0], strict=True)):
        decoded = [
            served.codecs[rank].decode(page, identity=served.identity(path, i))
            for i, (page, path) in enumerate(zip(pages, paths, strict=True))
        ]
        for which in range(2):
            found = torch.cat([torch.from_dlpack(x[which]) for x in decoded], dim=2).float()
            whole = exact[which][:, :, : found.shape[2]]
            errors = [
                float((found[:, 0] - whole[:, head]).norm() / whole[:, head].norm())
                for head in range(2)
            ]
            assert errors[rank] < 0.3 < 0.8 < errors[1 - rank], (rank, which, errors)


def test_cached_tokens_are_counted(served: Served) -> None:
    assert [x["cached"] for x in served.exact] == [0] * 4
    long, blank, short, faulty = served.restored
    assert long["cached"] == blank["cached"] == KEPT * PAGE
    assert (short["cached"], faulty["reason"]) == (0, "length")


def test_a_restored_prefix_predicts_as_the_exact_one(served: Served) -> None:
    """By its KL divergence over the tokens that follow, beside pages of zeros."""
    last = len(LONG) - KEPT * PAGE - 1
    long, blank = (
        divergence(*(rows(x["logprobs"], last) for x in pair))
        for pair in (
            (served.exact[0], served.restored[0]),
            (served.exact[2], served.restored[1]),
        )
    )
    print(f"KL {long:.5f}, of zeros {blank:.5f}")
    assert long < 0.1 * blank
    assert blank > 0.1


def test_a_bad_page_of_one_rank_is_computed_by_all(served: Served) -> None:
    """What is before it on both is loaded; the request notices nothing, and the next one has it."""
    exact = rows([served.exact[1]["next"]], 1)
    for found in (served.restored[3], served.again[0]):
        assert divergence(exact, rows([found["next"]], 1)) < 0.2  # of zeros, 2
    for log, number in zip(served.logs, (DAMAGED, SWAPPED), strict=True):
        assert log.count("is of no use and is deleted") == 1
        lost = (MISSING if number == DAMAGED else 9) - number
        assert f"request(s) rescheduled ({lost * PAGE} tokens affected)" in log
    for path, (rank, number) in zip(
        served.bad, ((1, DAMAGED), (0, MISSING), (1, SWAPPED)), strict=True
    ):
        page = path.read_bytes()
        k, _ = served.codecs[rank].decode(page, identity=served.identity(path, number))
        assert k.shape[2] == PAGE
