"""Random damage to larger streams, decoded: how much is found, and that nothing else happens.

    python benchmarks/damage.py [--mutations 100000] [--first-seed N] [--backend cuda]
        [--processes N] [-o FILE]

Streams of 400 tokens, of both presets and every coder, one that was appended to, one that was cut,
one with errors by layer; each mutation is one to three changed, lost, repeated, moved or added
pieces. Read in turn from a file and from a pipe. A mutation is found when the reader raises
``KVTCError``; harmless when the tokens are the same all the same. Anything else ends the program.
With CUDA, beyond those mutations, as many of the payloads alone, as if a writer had made every
checksum right: an error if it is one on the CPU, and the CPU's tokens otherwise.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from _common import environment, write_result
from damage import mutate, restore, tokens_first
from rich.console import Console
from rich.progress import track

import kvtc_stream as kvtc
from kvtc_stream.formats import Feature, LayerErrors, Limits, StreamParser, StreamWriter
from kvtc_stream.io.dlpack import BackendName
from kvtc_stream.stream.decoder import BlockDecoder

#: Mutations that a process makes before it takes the next ones.
TOGETHER = 500


def streams(calibration: kvtc.Calibration) -> dict[str, bytes]:
    """What to damage."""
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 400)
    codec = kvtc.Codec(calibration, ratio=4, window=24, block_tokens=32)
    found = {"default": kvtc.encode(k, v, codec)}
    file = io.BytesIO()
    for start in (0, 150, 300):
        with kvtc.open(file, "ab" if start else "wb", codec=codec) as writer:
            writer.write(k[:, :, start : start + 150], v[:, :, start : start + 150])
    found["continued"] = file.getvalue()
    out = io.BytesIO()
    kvtc.cut(found["default"], out, tokens=slice(37, 301))
    found["cut"] = out.getvalue()
    found["layer errors"] = with_layer_errors(found["default"])
    paper = kvtc.Codec(calibration, "paper", ratio=4, window=24, block_tokens=32)
    for coder in ("deflate", "zstd", "lz4", "stored"):
        found[coder] = kvtc.encode(k, v, replace(paper, coder=coder))
    return found


def with_layer_errors(data: bytes) -> bytes:
    """The stream in format 1.1."""
    header, *blocks = StreamParser(Limits()).feed(data)
    writer = StreamWriter(replace(header, features=Feature.LAYER_ERRORS))
    errors = LayerErrors.of([0.03, 0.05], [0.1, 0.2], [0.04, 0.06], [0.1, 0.3])
    out = writer.start()
    for block in blocks:
        out += writer.block(replace(block, layer_errors=errors if block.coded_tokens else None))
    return out + writer.finish()


def damage_stream(data: bytes, backend: BackendName, seed: int) -> Counter[str]:
    """What comes of some mutations: names of errors, or "harmless"."""
    warnings.simplefilter("ignore")
    calibration = kvtc.testing.tiny_calibration()
    ways: list[dict[str, bool]] = [{}, {"pipe": True}, {"whole": True}]
    expected = [restore(data, calibration, backend=backend, **way) for way in ways]
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for i in range(TOGETHER):
        changed = mutate(data, rng)
        try:
            found = restore(changed, calibration, backend=backend, **ways[i % 3])
        except kvtc.KVTCError as error:
            outcomes[type(error).__name__] += 1
            continue
        if found != expected[i % 3]:
            raise AssertionError(f"other tokens, mutation {i} of seed {seed}")
        outcomes["harmless"] += 1
    return outcomes


def damage_payload(data: bytes, backend: BackendName, seed: int) -> Counter[str]:
    """What comes of a block whose payload is damaged: "harmless" where it decodes on both."""
    warnings.simplefilter("ignore")
    calibration = kvtc.testing.tiny_calibration()
    header, *blocks = StreamParser(Limits()).feed(data)
    blocks = [block for block in blocks if block.coded_tokens]
    decoders = [BlockDecoder(header, calibration, name) for name in ("cpu", backend)]
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for i in range(TOGETHER):
        block = rng.choice(blocks)
        changed = replace(block, coded=mutate(bytes(block.coded), rng))
        both: list[Any] = []
        for decoder in decoders:
            try:
                part = decoder.decode(changed)
                both.append([np.frombuffer(tokens_first(x), np.float32) for x in (part.k, part.v)])
            except kvtc.KVTCError as error:
                both.append(type(error).__name__)
        expected, found = both
        if isinstance(expected, str) or isinstance(found, str):
            if isinstance(expected, str) != isinstance(found, str):
                raise AssertionError(f"{both}, mutation {i} of seed {seed}")
            outcomes[found] += 1
            continue
        for x, y in zip(found, expected, strict=True):
            if np.linalg.norm(x - y) > 1e-2 * np.linalg.norm(y):
                raise AssertionError(f"other tokens, mutation {i} of seed {seed}")
        outcomes["harmless"] += 1
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--first-seed", type=int, default=0, help="one more each 500 mutations")
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    samples = streams(kvtc.testing.tiny_calibration())
    tasks = [(damage_stream, name, data) for name, data in samples.items()]
    if args.backend == "cuda":
        tasks.append((damage_payload, "payloads alone", samples["default"]))
    results: dict[str, Any] = {}
    began = time.perf_counter()
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for task, name, data in tasks:
            share = args.mutations if task is damage_payload else args.mutations / len(samples)
            runs = range(args.first_seed, args.first_seed - (-int(share) // TOGETHER))
            waiting = [pool.submit(task, data, args.backend, seed) for seed in runs]
            outcomes: Counter[str] = Counter()
            for done in track(waiting, name):
                outcomes += done.result()
            harmless = outcomes.pop("harmless", 0)
            results[name] = {
                "bytes": len(data),
                "mutations": TOGETHER * len(runs),
                "found": outcomes.total(),
                "harmless": harmless,
                "other_tokens": 0,
                "errors": dict(outcomes),
            }
            print(name, results[name], flush=True)
    if args.output:
        seconds = time.perf_counter() - began
        result = {**environment(), "seconds": seconds, "streams": results}
        write_result(args.output, result, Console())


if __name__ == "__main__":
    main()
