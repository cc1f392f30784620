"""Coders of verbatim values: what they leave, and how quickly, on real caches.

    python benchmarks/verbatim.py --cache FILES... [--output benchmarks/results/verbatim.json]

Files are plain caches, as `kvtc bench` and `benchmarks/bases.py` read and capture them. Of each,
in bfloat16, the first tokens and a window from its middle, as byte planes; on one thread, the best
of seven.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from _common import environment, load_cache, write_result
from rich.console import Console
from rich.table import Table

from kvtc_stream.coding.values import verbatim_planes
from kvtc_stream.formats import Coder, compress, decompress
from kvtc_stream.formats.coders import compress_beside

#: What codes bytes; the last as streams with rANS do.
CODERS: dict[str, Callable[..., tuple[Coder, bytes]]] = {
    "DEFLATE": lambda *planes: compress(Coder.DEFLATE, *planes),
    "Zstandard, level 3": lambda *planes: compress(Coder.ZSTD, *planes),
    "LZ4": lambda *planes: compress(Coder.LZ4, *planes),
    "beside rANS": lambda *planes: compress_beside(Coder.RANS, *planes),
}
TOKENS = {"sinks": 4, "window": 128}


def best(action: Callable[[], Any], repeats: int = 7) -> tuple[Any, float]:
    """Result, and seconds of the quickest run."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = action()
        times.append(time.perf_counter() - start)
    return result, min(times)


def measure(samples: list[list[memoryview]], coder: Callable[..., Any]) -> dict[str, Any]:
    """Measure a coder on samples' byte planes: compressed fraction, and MB/s in both directions."""
    sizes = [sum(map(len, planes)) for planes in samples]
    coded, encoding = best(lambda: [coder(*planes) for planes in samples])
    found, decoding = best(
        lambda: [decompress(*own, size) for own, size in zip(coded, sizes, strict=True)]
    )
    assert found == [b"".join(planes) for planes in samples]
    return {
        "coder": coded[0][0].name,
        "share": sum(len(data) for _, data in coded) / sum(sizes),
        "encode_mbps": sum(sizes) / encoding / 1e6,
        "decode_mbps": sum(sizes) / decoding / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    console = Console(highlight=False)
    caches = [[x.astype(ml_dtypes.bfloat16) for x in load_cache(path)] for path in args.cache]
    result: dict[str, Any] = environment() | {"caches": len(caches), "samples": {}}
    for name, count in TOKENS.items():
        firsts = [0 if name == "sinks" else k.shape[2] // 2 for k, _ in caches]
        samples = [
            verbatim_planes(*(np.asarray(x[:, :, at : at + count]) for x in kv))
            for kv, at in zip(caches, firsts, strict=True)
        ]
        found = {own: measure(samples, coder) for own, coder in CODERS.items()}
        size = sum(map(len, samples[0]))
        result["samples"][name] = {"bytes": size, "coders": found}
        table = Table(f"{name}, {size:,} bytes", "left", "encode, MB/s", "decode, MB/s")
        for own, row in found.items():
            speeds = (f"{row[key]:.0f}" for key in ("encode_mbps", "decode_mbps"))
            table.add_row(own, f"{row['share']:.2%}", *speeds)
        console.print(table)
    if args.output:
        write_result(args.output, result, console)


if __name__ == "__main__":
    main()
