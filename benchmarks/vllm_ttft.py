"""Time to the first token of a long prompt in vLLM: computed, and from stores.

    python benchmarks/vllm_ttft.py --model FOLDER --calibration m.safetensors --text t.txt

In an environment with vLLM (CONTRIBUTING.md); engines run one after the other, each in a process.
Beside the time it prints the ratio, and what the restored prefix does to predictions of the tokens
that follow: the KL divergence, from the most likely tokens of the exact one and all others
together, and the rise of the loss. Texts should be others than those of the calibration.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment, write_result
from rich.console import Console
from rich.table import Table

import kvtc_stream as kvtc

RESULT = Path(__file__).parent / "results" / "vllm_ttft.json"
ENGINE = Path(__file__).parents[1] / "tests" / "vllm_engine.py"
#: Most likely tokens whose log-probabilities are compared one by one.
LIKELY = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder that vLLM loads")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt")
    parser.add_argument("--following", type=int, default=512, help="tokens that are scored")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the model and its cache: CPUs without instructions for bfloat16 are slow in it",
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = environment()
    folder = Path(tempfile.mkdtemp(prefix="kvtc-ttft-"))
    try:
        run = Run(arguments, folder, console)
        result |= run.measured()
    finally:
        shutil.rmtree(folder)
    table = Table("", "seconds to the first token", "of computing it", "cached tokens")
    for name in ("recompute", "kvtc", "example"):
        own = result[name]
        share = f"{own['seconds'] / result['recompute']['seconds']:.3f}"
        table.add_row(name, f"{own['seconds']:.3f}", share, str(own["cached"]))
    console.print(table)
    console.print({x: result[x] for x in ("ratio", "kl", "kl_worst", "loss", "loss_restored")})
    write_result(arguments.output, result, console)


class Run:
    """Engines, and what they gave."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, console: Console) -> None:
        self._arguments, self._folder, self._console = arguments, folder, console
        self._prompts = prompts(arguments)
        #: Read first, so that nothing is compiled or allocated while time is taken.
        self._warm_up = [{"ids": [self._prompts[-1][-200:]]}]
        # Half a page more: vLLM's example stores and looks up whole pages of unequal prompts.
        self._timed = [{"ids": [ids[: arguments.tokens + 64]]} for ids in self._prompts]
        self._scored = [{"ids": [self._prompts[0]], "score": LIKELY}]

    def measured(self) -> dict[str, Any]:
        """Everything that goes into the result."""
        arguments, folder = self._arguments, self._folder
        pages = arguments.tokens // 128 * arguments.prompts
        connector = {
            "calibration": str(Path(arguments.calibration).absolute()),
            "store": str(folder / "pages"),
            "ratio": arguments.ratio,
        }
        exact = self._serve("recompute", self._warm_up + self._timed + self._scored, None)
        # The warm-up's page too.
        stored = {"folder": str(folder / "pages"), "pages": pages + 1}
        self._serve("kvtc store", self._warm_up + self._timed, connector, **stored)
        files = [x.stat().st_size for x in (folder / "pages").rglob("*") if x.is_file()]
        found = self._serve("kvtc", self._warm_up + self._timed + self._scored, connector)
        example = {"shared_storage_path": str(folder / "example")}
        own = {"connector_name": "ExampleConnector"}
        self._serve("example store", self._warm_up + self._timed, example, **own)
        raw = sum(x.stat().st_size for x in (folder / "example").rglob("*") if x.is_file())
        other = self._serve("example", self._warm_up + self._timed, example, **own)
        return {
            "dtype": arguments.dtype,
            "prompt_tokens": arguments.tokens + 64,
            "following": arguments.following,
            "recompute": timed(exact, arguments.prompts),
            "kvtc": timed(found, arguments.prompts),
            "example": timed(other, arguments.prompts),
            "ratio": cache_bytes(arguments, 128) * len(files) / sum(files),
            "page_tokens": 128,
            "page_bytes": statistics.mean(files),
            "example_bytes": raw,
            "scored_cached": found[-1]["cached"],
            **divergence(exact[-1], found[-1], self._prompts[0][-arguments.following :]),
        }

    def _serve(
        self,
        name: str,
        requests: list[dict[str, Any]],
        connector: dict[str, Any] | None,
        **given: Any,
    ) -> list[dict[str, Any]]:
        source, target = self._folder / "in.json", self._folder / "out.json"
        length = self._arguments.tokens + self._arguments.following + 64
        given = {
            "model": self._arguments.model,
            "engine": {
                "max_model_len": length,
                "max_num_batched_tokens": length,
                "max_logprobs": LIKELY,
                "dtype": self._arguments.dtype,
            },
            "connector": connector,
            "requests": requests,
        } | given
        source.write_text(json.dumps(given))
        command = [sys.executable, str(ENGINE), str(source), str(target)]
        target.unlink(missing_ok=True)
        with open(self._folder / "log", "wb") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        # vLLM for CPUs aborts in some runs when it ends, with and without a connector.
        if not target.exists():
            self._console.print((self._folder / "log").read_text()[-4000:])
            raise SystemExit(f"the engine of {name} failed")
        found: list[dict[str, Any]] = json.loads(target.read_text())
        self._console.print(name, [(round(x["seconds"], 3), x["cached"]) for x in found])
        return found


def prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Token ids from the middle of texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    length, found = arguments.tokens + arguments.following, []
    for i in range(arguments.prompts):
        text = Path(arguments.text[i % len(arguments.text)]).read_text(encoding="utf-8")
        start = len(text) * (i + 1) // (arguments.prompts + 2)
        ids = tokenizer(text[start : start + 12 * length])["input_ids"]
        found.append(ids[:length])
    return found


def timed(outputs: list[dict[str, Any]], prompts: int) -> dict[str, Any]:
    """The median of the prompts that come after the warm-up."""
    own = outputs[1 : 1 + prompts]
    return {
        "seconds": statistics.median(x["seconds"] for x in own),
        "all_seconds": [x["seconds"] for x in own],
        "cached": min(x["cached"] for x in own),
    }


def cache_bytes(arguments: argparse.Namespace, tokens: int) -> int:
    """Bytes of a page in the model's dtype."""
    [section] = kvtc.Calibration.load(arguments.calibration).geometry.sections
    size = {"bfloat16": 2, "float32": 4}[arguments.dtype]
    return size * tokens * (section.k_width + section.v_width)


def divergence(
    exact: dict[str, Any], found: dict[str, Any], following: list[int]
) -> dict[str, float]:
    """KL divergence and losses over the tokens that follow the restored prefix, nats."""
    last = len(following) - 1
    divergences, losses = [], []
    for token, p_row, q_row in zip(
        following[1:], exact["logprobs"][-last:], found["logprobs"][-last:], strict=True
    ):
        p_log, q_log = ({int(i): x for i, x in row.items()} for row in (p_row, q_row))
        least = min(q_log.values())  # at most what tokens have that are not listed
        p = np.exp(list(p_log.values()))
        q = np.exp([q_log.get(i, least) for i in p_log])
        rest = [max(1 - float(x.sum()), 1e-9) for x in (p, q)]
        own = float((p * np.log(p / q)).sum() + rest[0] * np.log(rest[0] / rest[1]))
        divergences.append(max(own, 0.0))
        losses.append((-p_log[token], -q_log[token]))
    loss, restored = np.mean(losses, axis=0)
    return {
        "kl": float(np.mean(divergences)),
        "kl_worst": max(divergences),
        "loss": float(loss),
        "loss_restored": float(restored),
    }


if __name__ == "__main__":
    main()
