"""Random damage to larger streams, decoded: how much is found, and that nothing else happens.

    python benchmarks/damage.py [--mutations 100000] [--backend cuda] [--output FILE]

Streams of 400 tokens, of both presets and every coder, one that was appended to and one that was
cut; each mutation is one to three changed, lost, repeated, moved or added pieces. Read in turn from
a file and from a pipe. A mutation is found when the reader raises ``KVTCError``; harmless when the
tokens are the same all the same. Anything else ends the program.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from _common import environment, write_result
from damage import mutate, restore
from rich.console import Console

import kvtc_stream as kvtc


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
    paper = kvtc.Codec(calibration, "paper", ratio=4, window=24, block_tokens=32)
    for coder in ("deflate", "zstd", "lz4", "stored"):
        found[coder] = kvtc.encode(k, v, replace(paper, coder=coder))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    calibration = kvtc.testing.tiny_calibration()
    samples = streams(calibration)
    rng = random.Random(0)
    results: dict[str, Any] = {}
    began = time.perf_counter()
    for name, data in samples.items():
        expected = restore(data, calibration, backend=args.backend)
        count = -(-args.mutations // len(samples))
        errors: dict[str, int] = {}
        harmless = 0
        for i in range(count):
            changed = mutate(data, rng)
            try:
                found = restore(changed, calibration, pipe=i % 2 == 0, backend=args.backend)
                if found != expected:
                    raise SystemExit(f"{name}: other tokens, mutation {i}")
                harmless += 1
            except kvtc.KVTCError as error:
                errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1
        results[name] = {
            "bytes": len(data),
            "mutations": count,
            "found": sum(errors.values()),
            "harmless": harmless,
            "other_tokens": 0,
            "errors": errors,
        }
        print(name, results[name], flush=True)
    if args.output:
        seconds = time.perf_counter() - began
        result = {**environment(), "seconds": seconds, "streams": results}
        write_result(args.output, result, Console())


if __name__ == "__main__":
    main()
