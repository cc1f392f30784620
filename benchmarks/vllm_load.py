"""What a load of the vLLM connector takes: fetching, checking and decoding pages, without vLLM.

    python benchmarks/vllm_load.py --model m.gguf --calibration m.safetensors --text t.txt

Pages of a text are coded and put into a folder; the connector's own transfer brings them into
blocks as vLLM's CPU backend lays them out, two at a time. Once with one thread for each product of
matrices, as the connector sets it, and once with one for each core. On a busy machine seconds tell
little; processor time does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from _common import environment, write_result
from rich.console import Console

import kvtc_stream as kvtc
from kvtc_stream.evaluation import quality
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.hosts.layouts import VLLM_LAYOUTS
from kvtc_stream.integrations.hosts.store import FileStore
from kvtc_stream.integrations.transformers.loading import load_model
from kvtc_stream.integrations.vllm.blocks import Blocks
from kvtc_stream.integrations.vllm.counts import Counter
from kvtc_stream.integrations.vllm.scheduling import PageJob
from kvtc_stream.integrations.vllm.sink import StoreSink
from kvtc_stream.integrations.vllm.transfer import PageTransfer

RESULT = Path(__file__).parent / "results" / "vllm_load.json"
PAGE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--pages", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.store:
        print(json.dumps(loads(arguments)))
        return
    console = Console()
    result: dict[str, Any] = environment()
    with tempfile.TemporaryDirectory() as folder:
        result["page_bytes"] = fill(arguments, folder)
        for threads in (1, os.cpu_count() or 1):
            run = subprocess.run(
                [sys.executable, *sys.argv, "--store", folder],
                env=os.environ | {"OPENBLAS_NUM_THREADS": str(threads)},
                stdout=subprocess.PIPE,
                check=True,
            )
            result[f"threads of a product: {threads}"] = json.loads(run.stdout.splitlines()[-1])
    console.print({name: x for name, x in result.items() if name not in ("device", "versions")})
    write_result(arguments.output, result, console)


def codec_of(arguments: argparse.Namespace) -> kvtc.PageCodec:
    calibration = kvtc.Calibration.load(arguments.calibration)
    codec = kvtc.Codec(
        calibration, ratio=arguments.ratio, block_tokens=PAGE, error_bound=0.5, backend="cpu"
    )
    return kvtc.PageCodec(codec, dtype="bfloat16", key=calibration.digest)


def keys_of(pages: int) -> Any:
    return Namespace({}).chain(None, PAGE).extend(list(range(PAGE * pages)))


def fill(arguments: argparse.Namespace, folder: str) -> float:
    """Put pages of a text into a store; bytes of each, mean."""
    model, tokenizer = load_model(arguments.model)
    ids = quality.token_ids(tokenizer, Path(arguments.text).read_text(encoding="utf-8"))
    start, tokens = len(ids) // 2, PAGE * arguments.pages
    layers = quality.prefill(model, ids[start : start + tokens], torch.bfloat16).layers
    k, v = (torch.cat(x) for x in ([y.keys for y in layers], [y.values for y in layers]))
    codec, store = codec_of(arguments), FileStore(folder)
    for i, key in enumerate(keys_of(arguments.pages)):
        own = slice(i * PAGE, (i + 1) * PAGE)
        page = codec.encode(
            k[:, :, own], v[:, :, own], positions=key.position, identity=key.identity
        )
        store.put(key.name, page)
    return sum(entry.size for entry in store.list()) / arguments.pages


def loads(arguments: argparse.Namespace) -> dict[str, Any]:
    """Three loads, after one that warms up; the quickest by processor time."""
    [section] = kvtc.Calibration.load(arguments.calibration).geometry.sections
    sizes = {"H": section.kv_heads, "N": PAGE, "D": section.k_dim}
    shape = (len(section.layers), arguments.pages, sizes["H"], PAGE, 2 * sizes["D"])
    layout = next(x for x in VLLM_LAYOUTS if x.name.startswith("vllm CPU"))
    pool = torch.zeros(shape, dtype=torch.bfloat16)
    blocks = Blocks([layout.views(layer, sizes) for layer in pool])
    store, codecs, counter = FileStore(arguments.store), [], Counter()
    spent: dict[str, float] = {}
    for _ in range(min(2, os.cpu_count() or 1)):
        codecs.append(codec_of(arguments))
    codecs[0].checked_many = timed(  # type: ignore[method-assign]
        codecs[0].checked_many, "check", spent
    )
    store.get = timed(store.get, "fetch", spent)  # type: ignore[method-assign]
    sink = StoreSink(store, codecs[0], counter)
    transfer = PageTransfer(blocks, sink, store, codecs, counter, timeout=600, queue_pages=8)
    transfer._load_groups = timed(  # type: ignore[method-assign]
        transfer._load_groups, "check, decode and write", spent
    )
    jobs = [PageJob("request", key, [i]) for i, key in enumerate(keys_of(arguments.pages))]
    found = []
    for _ in range(4):
        spent.clear()
        cpu, wall = time.process_time(), time.perf_counter()
        transfer.load(jobs)
        while not transfer.results()[1]:
            transfer.rest(0.01)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if transfer.errors():
            raise SystemExit("a page was not loaded")
        found.append({"cpu_seconds": cpu, "seconds": wall, "cpu_seconds_of_calls": dict(spent)})
    transfer.close()
    return min(found[1:], key=lambda x: x["cpu_seconds"])


def timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """The same function, which adds up the processor time of its threads."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.thread_time() - started

    return call


if __name__ == "__main__":
    main()
