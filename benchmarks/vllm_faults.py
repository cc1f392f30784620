"""Random faults of pages in a real vLLM: what requests notice of them.

    python benchmarks/vllm_faults.py [--faults 1000] [--seed 0] [-o FILE]

In an environment with vLLM (CONTRIBUTING.md), with the small drawn model of its tests. The prompts
of a round are computed, and their pages stored; some pages are then flipped, cut, exchanged,
replaced by others, by such of another key, calibration, dtype or codec, or deleted, one to three
in a prompt. The prompts are read again, together and in a random order, some behind the same first
pages. The predictions are compared with those where the same pages are absent; two more runs with
these absent, one as it was and one batched otherwise, tell how much predictions differ by batching
alone. A control has pages of other prompts, sealed so that nothing can find it: it must stand out.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __name__ != "__mp_main__":  # vLLM's workers read this file too, and bear no Numba before them
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from _common import environment, write_result
    from rich.console import Console
    from test_vllm import ENGINE, VOCABULARY, prompt, save_model, serve

    import kvtc_stream as kvtc
    from kvtc_stream.integrations.hosts.keys import PageKey
    from kvtc_stream.integrations.vllm import support

RESULT = Path(__file__).parent / "results" / "vllm_faults.json"
PAGE, PAGES, TAIL, TOGETHER = 64, 5, 9, 24
#: Tokens whose distributions are compared; later ones only while the tokens before are equal.
STEPS = 3
#: Log-probabilities below this are compared as this.
LEAST = -20.0
#: Settings of the codec.
OPTIONS: dict[str, Any] = {"preset": "default", "ratio": 4, "error_bound": 0.5}
KINDS = ("flipped", "cut", "exchanged", "replaced", "foreign", "deleted")
FOREIGN = ("key", "calibration", "dtype", "codec", "tenant", "position", "unsealed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="pages, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", type=Path, help="of an earlier run; made if not given")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    console = Console()
    measured = environment()
    folder = Path(tempfile.mkdtemp(prefix="kvtc-faults-"))
    try:
        bench = Bench(folder, arguments.calibration, arguments.seed)
        for result in bench.run(arguments.faults):  # written each time: a run takes a while
            write_result(arguments.output, measured | result, console)
    finally:
        shutil.rmtree(folder)
    console.print(result)
    if result["failed_requests"] or result["wrong_requests"]:
        raise SystemExit("some requests noticed a fault")


@dataclass
class Answer:
    """What a request got: tokens, and log-probabilities [steps, vocabulary]."""

    reason: str | None
    tokens: list[int]
    rows: NDArray[np.float64]


def learnt(folder: Path) -> Path:
    """The calibration that a server makes of some prompts."""
    (folder / "learnt").mkdir()
    path = folder / "learnt" / "calibration.safetensors"
    serve(
        folder,
        "learn",
        connector={"calibrate": str(path), "calibrate_tokens": 9000},
        requests=[{"ids": [prompt(10_000 + i, 1000) for i in range(12)]}],
        folder=str(folder / "learnt"),
        pages=1,
    )
    return path


class Bench:
    """An engine, its store, and what was found."""

    def __init__(self, folder: Path, path: Path | None, seed: int) -> None:
        save_model(folder / "model")
        path = path or learnt(folder)
        calibration = kvtc.Calibration.load(path)
        calibrator = kvtc.Calibrator(calibration.geometry)
        calibrator.update(*kvtc.testing.drawn_cache(calibration.geometry, 2000))
        other = calibrator.finish()
        self._rng, self._store = random.Random(seed), folder / "store"
        self._engine = engine(folder, path)
        config = self._engine.llm_engine.vllm_config
        facts = support.model_facts(config)
        codec = kvtc.Codec(calibration, block_tokens=PAGE, **OPTIONS)
        self._namespace = support.namespace_of(
            "vllm", facts, "bfloat16", PAGE, [codec.calibration], OPTIONS
        )
        key = calibration.digest
        self._codec = kvtc.PageCodec(codec, dtype="bfloat16", key=key)
        foreign = kvtc.Codec(other, block_tokens=PAGE, **OPTIONS)
        coarser = kvtc.Codec(calibration, block_tokens=PAGE, **OPTIONS | {"ratio": 8})
        self._foreign = {
            "key": kvtc.PageCodec(codec, dtype="bfloat16", key=b"another secret"),
            "calibration": kvtc.PageCodec(foreign, dtype="bfloat16", key=key),
            "dtype": kvtc.PageCodec(codec, dtype="float16", key=key),
            "codec": kvtc.PageCodec(coarser, dtype="bfloat16", key=key),
            "unsealed": kvtc.PageCodec(codec, dtype="bfloat16"),
        }
        self._number = 0
        self._kinds: Counter[str] = Counter()
        self._found: dict[str, list[float]] = {x: [] for x in ("faults", "again", "batched")}
        self._control: list[float] = []
        self._requests = self._failed = self._several = self._first_good = 0

    def run(self, faults: int) -> Iterator[dict[str, Any]]:
        """Rounds, until there were so many faults; what was found so far, after each."""
        self._run_control()
        started = time.perf_counter()
        while self._kinds.total() < faults:
            self._round()
            yield self.result() | {"seconds": time.perf_counter() - started}

    def _round(self) -> None:
        prompts = self._prompts()
        chains = [self._keys(ids) for ids in prompts]
        self._fill(prompts, chains)
        clean = {x.name: self._read(x) for chain in chains for x in chain}
        bad = self._damage(chains, clean)
        order = self._rng.sample(range(len(prompts)), len(prompts))
        got = self._serve(prompts, chains, order)
        runs = []
        for own in (order, order, self._rng.sample(order, len(order))):
            self._lay({Path(x): y for x, y in clean.items() if x not in bad})
            parts = [own] if len(runs) < 2 else [own[i : i + 5] for i in range(0, len(own), 5)]
            answers: dict[int, Answer] = {}
            for part in parts:
                answers |= self._serve(prompts, chains, part)
            runs.append(answers)
        exact, again, batched = runs
        for i in got:
            self._requests += 1
            self._failed += got[i].reason != "length"
            self._several += sum(x.name in bad for x in chains[i]) > 1
            self._first_good += chains[i][0].name not in bad
        for name, answers in (("faults", got), ("again", again), ("batched", batched)):
            self._found[name] += [difference(exact[i], answers[i]) for i in exact]

    def _run_control(self) -> None:
        """Pages of others, sealed as the right ones: they are not found, and change much."""
        prompts = self._prompts()
        chains = [self._keys(ids) for ids in prompts]
        self._fill(prompts, chains)
        clean = {x.name: self._read(x) for chain in chains for x in chain}
        right = self._serve(prompts, chains, list(range(len(prompts))))
        self._lay({Path(x): y for x, y in clean.items()})
        for chain, donor in zip(chains, [*chains[3:], *chains[:3]], strict=True):
            own, other = chain[PAGES - 2], donor[PAGES - 2]
            k, v = self._codec.decode(clean[other.name], identity=other.identity)
            page = self._codec.encode(k, v, positions=own.position, identity=own.identity)
            (self._store / own.name).write_bytes(page)
        wrong = self._serve(prompts, chains, list(range(len(prompts))))
        self._control = [difference(right[i], wrong[i]) for i in right]

    # The engine and its store.

    def _prompts(self) -> list[list[int]]:
        """Some of them begin as the one before."""
        found: list[list[int]] = []
        for i in range(TOGETHER):
            self._number += 1
            ids = prompt(self._number, PAGES * PAGE + TAIL)
            if i % 4 == 3:
                shared = self._rng.randint(1, PAGES) * PAGE
                ids = found[-1][:shared] + ids[shared:]
            found.append(ids)
        return found

    def _keys(self, ids: Sequence[int]) -> list[PageKey]:
        return list(self._namespace.chain([None, None], PAGE).extend(ids))

    def _fill(self, prompts: list[list[int]], chains: list[list[PageKey]]) -> None:
        """A store with the pages of these prompts, and no others."""
        self._lay({})
        self._serve(prompts, chains, list(range(len(prompts))))

    def _files(self) -> list[Path]:
        return [path for path in self._store.rglob("*") if path.is_file()]

    def _read(self, key: PageKey) -> bytes:
        return (self._store / key.name).read_bytes()

    def _lay(self, pages: dict[Path, bytes]) -> None:
        for path in self._files():
            path.unlink()
        for name, page in pages.items():
            (self._store / name).parent.mkdir(parents=True, exist_ok=True)
            (self._store / name).write_bytes(page)

    def _serve(
        self, prompts: list[list[int]], chains: list[list[PageKey]], order: Sequence[int]
    ) -> dict[int, Answer]:
        """Answers of an engine that has computed nothing yet; all pages are stored at the end."""
        from vllm import SamplingParams

        deadline = time.monotonic() + 60
        while not self._engine.reset_prefix_cache():  # blocks that are being stored are in use
            if time.monotonic() > deadline:
                raise TimeoutError("vLLM does not give up its blocks")
            time.sleep(0.02)
        parameters = SamplingParams(
            max_tokens=STEPS, temperature=0, logprobs=VOCABULARY, detokenize=False, ignore_eos=True
        )
        ids = [{"prompt_token_ids": prompts[i]} for i in order]
        outputs = self._engine.generate(ids, parameters, use_tqdm=False)
        names = {key.name for i in order for key in chains[i]}
        while missing := [x for x in names if not (self._store / x).is_file()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(missing)} pages are not stored again")
            time.sleep(0.02)
        return {i: answer(output.outputs[0]) for i, output in zip(order, outputs, strict=True)}

    # Faults.

    def _damage(self, chains: list[list[PageKey]], clean: dict[str, bytes]) -> set[str]:
        """Make one to three pages of each prompt useless; names of those that are."""
        bad: set[str] = set()
        rng = self._rng
        for chain in chains:
            for key in rng.sample(chain, rng.choice((1, 1, 2, 3))):
                if key.name in bad:
                    continue
                kind = rng.choice(KINDS)
                for name, page in self._fault(kind, key, chains, clean).items():
                    if name in bad:
                        continue
                    if page is None:
                        (self._store / name).unlink()
                    else:
                        (self._store / name).write_bytes(page)
                    bad.add(name)
                    self._kinds[kind] += 1
        return bad

    def _fault(
        self, kind: str, key: PageKey, chains: list[list[PageKey]], clean: dict[str, bytes]
    ) -> dict[str, bytes | None]:
        rng, page = self._rng, clean[key.name]
        others = [x for chain in chains for x in chain if x.name != key.name]
        match kind:
            case "flipped":
                changed = bytearray(page)
                for _ in range(rng.choice((1, 1, 2, 8))):
                    changed[rng.randrange(len(page))] ^= 1 << rng.randrange(8)
                return {key.name: None if changed == page else bytes(changed)}
            case "cut":
                return {key.name: page[: rng.randrange(len(page))]}
            case "exchanged":
                other = rng.choice(others)
                return {key.name: clean[other.name], other.name: page}
            case "replaced":
                near = [x for x in others if x.position == key.position]
                if rng.random() < 0.5:
                    near = others
                return {key.name: clean[rng.choice(near).name]}
            case "foreign":
                return {key.name: self._foreign_page(rng.choice(FOREIGN), key, page)}
        return {key.name: None}

    def _foreign_page(self, whose: str, key: PageKey, page: bytes) -> bytes:
        """The same tokens, as somebody else would have stored them."""
        k, v = self._codec.decode(page, identity=key.identity)
        if whose == "dtype":
            k, v = (x.view(np.ndarray).astype(np.float32).astype(np.float16) for x in (k, v))
        codec, position, identity = self._codec, key.position, key.identity
        if whose in self._foreign:
            codec = self._foreign[whose]
        elif whose == "tenant":
            chain = self._namespace.chain([None, "another"], PAGE)
            identity = chain.extend(range(PAGE))[0].identity
        else:
            position += PAGE
            identity = PageKey(key.name, position).identity
        seal = {} if whose == "unsealed" else {"identity": identity}
        return codec.encode(k, v, positions=position, **seal)

    def result(self) -> dict[str, Any]:
        """What goes into the file."""
        noise = max(self._found["again"] + self._found["batched"])
        metrics = {
            x.name.removeprefix("vllm:kvtc_").removesuffix("_total"): x.value
            for x in self._engine.get_metrics()
            if x.name.startswith("vllm:kvtc_")
        }
        return {
            "faults": self._kinds.total(),
            "kinds": dict(sorted(self._kinds.items())),
            "requests": self._requests,
            "with_several_faults": self._several,
            "with_first_page_restored": self._first_good,
            "failed_requests": self._failed,
            "wrong_requests": sum(x > noise for x in self._found["faults"]),
            "largest_difference_of_log_probability": {
                "with faults": spread(self._found["faults"]),
                "absent, again": spread(self._found["again"]),
                "absent, batched otherwise": spread(self._found["batched"]),
                "control, a wrong page": spread(self._control),
            },
            "control_beyond_noise": sum(x > noise for x in self._control),
            "control_requests": len(self._control),
            "counted": metrics,
        }


def engine(folder: Path, calibration: Path) -> Any:
    """vLLM with the connector, which stores and loads."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    store = folder / "store"
    store.mkdir()
    return LLM(
        model=str(folder / "model"),
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": "KvtcConnector",
            "kv_connector_module_path": "kvtc_stream.integrations.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "calibration": str(calibration),
                "store": str(store),
                "page_tokens": PAGE,
                **OPTIONS,
            },
        },
        **ENGINE,
    )


def answer(output: Any) -> Answer:
    """One of vLLM's outputs."""
    rows = np.full((len(output.token_ids), VOCABULARY), LEAST)
    for row, own in zip(rows, output.logprobs or (), strict=True):
        for token, found in own.items():
            row[token] = max(found.logprob, LEAST)
    return Answer(output.finish_reason, list(output.token_ids), rows)


def difference(one: Answer, other: Answer) -> float:
    """The largest between log-probabilities, of all tokens that the vocabulary has."""
    same = next(
        (i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b), STEPS
    )
    steps = slice(0, min(same + 1, STEPS))
    return float(np.abs(one.rows[steps] - other.rows[steps]).max())


def spread(differences: list[float]) -> dict[str, float]:
    """Nats; and the share of requests without any."""
    return {
        "mean": float(np.mean(differences)),
        "median": float(np.median(differences)),
        "99 %": float(np.quantile(differences, 0.99)),
        "largest": max(differences),
        "none at all": sum(x == 0 for x in differences) / len(differences),
    }


if __name__ == "__main__":
    main()
