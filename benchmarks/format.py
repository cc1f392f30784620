"""Speed and size of the container: verify, edit, open, random access; overhead of its bytes.

    python benchmarks/format.py [--output benchmarks/results/format.json]

Streams have the geometry of SmolLM2-135M in bfloat16 and payloads of random bytes, a sixteenth of
the cache. Times are the best of seven, of a file in the page cache: of the clock, and of all cores
together, which other programs on the machine do not lengthen.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from _common import environment, write_result
from rich.console import Console

import kvtc_stream as kvtc
from kvtc_stream.cli import terminal
from kvtc_stream.cli.verify import check_bytes
from kvtc_stream.formats import (
    Band,
    Block,
    Coder,
    DType,
    Geometry,
    PartPlan,
    Plan,
    Quantiser,
    Role,
    Rope,
    SectionPlan,
    StreamFile,
    StreamHeader,
    StreamWriter,
)

BLOCK = 128
RATIO = 16


def make_header() -> StreamHeader:
    geometry = Geometry.uniform(
        layers=30, kv_heads=3, head_dim=64, rope=Rope.from_theta(100_000, 64)
    )
    layers = tuple(range(30))
    bands = tuple(Band(10, Quantiser.UNIFORM, i % 20) for i in range(100))
    plan = Plan("default", (SectionPlan("joint", (PartPlan(layers, layers, bands),)),))
    return StreamHeader(
        geometry=geometry,
        dtype=DType.BFLOAT16,
        out_dtype=DType.BFLOAT16,
        sinks=4,
        window=0,
        block_tokens=BLOCK,
        plan=plan,
        coder=Coder.RANS,
        calibration=bytes(32),
    )


def make_stream(tokens: int) -> bytes:
    """A stream of so many tokens."""
    header = make_header()
    rng = np.random.default_rng(0)
    size = header.verbatim_size(0, BLOCK) // RATIO
    writer = StreamWriter(header)
    out = [writer.start()]
    for start in range(0, tokens, BLOCK):
        out.append(
            writer.block(
                Block(
                    section=0,
                    role=Role.DATA,
                    start=start,
                    tokens=BLOCK,
                    positions=range(start, start + BLOCK),
                    verbatim_tokens=(),
                    coder=Coder.RANS,
                    coded=rng.bytes(size),
                    coded_size=1000 * BLOCK,
                    verbatim_coder=Coder.STORED,
                    verbatim=b"",
                )
            )
        )
    return b"".join([*out, writer.finish()])


def best(action: Callable[[], Any], repeats: int = 7) -> dict[str, float]:
    """Seconds of the quickest run: of the clock, and of all cores."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        action()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    clock, core = map(min, zip(*times, strict=True))
    return {"clock": clock, "core": core}


def overhead() -> dict[str, Any]:
    """What a 4K-token stream has beside payloads."""
    data = make_stream(4096)
    file = StreamFile(io.BytesIO(data))
    payload = sum(e.coded_bytes + e.verbatim_bytes for e in file.index)
    return {
        "tokens": 4096,
        "bytes": len(data),
        "payload_bytes": payload,
        "header_bytes": file.sizes.header,
        "index_bytes": file.sizes.index,
        "header_and_index_percent": 100 * (file.sizes.header + file.sizes.index) / len(data),
        "all_overhead_percent": 100 * (len(data) - payload) / len(data),
    }


class Counting(io.FileIO):
    """A file that notes what is read."""

    reads = 0
    read_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size) or b""
        self.reads += 1
        self.read_bytes += len(data)
        return data


def random_access(path: Path) -> dict[str, Any]:
    """Reading 128 tokens that lie across two blocks of a stream of 128K."""
    with Counting(path) as file:
        opened = StreamFile(file)
        opening = {"reads": file.reads, "bytes": file.read_bytes}
        file.reads = file.read_bytes = 0
        wanted = [e for e in opened.index if e.start < 60_128 and e.start + e.tokens > 60_000]
        for block in opened.read_blocks(wanted):
            assert block.tokens == BLOCK
        return {
            "stream_bytes": opened.sizes.total,
            "stream_blocks": len(opened.index),
            "header_bytes": opened.sizes.header,
            "index_bytes": opened.sizes.index,
            "opening": opening,
            "blocks": len(wanted),
            "reading": {"reads": file.reads, "bytes": file.read_bytes},
            "block_bytes": sum(e.length for e in wanted),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tokens", type=int, default=1 << 17)
    args = parser.parse_args()
    data = make_stream(args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "a.kvtc", Path(folder) / "b.kvtc"
        path.write_bytes(data)

        def verify() -> None:
            with path.open("rb") as file, terminal.progress() as bars:
                check_bytes(file, bars)

        def copy() -> None:
            with path.open("rb") as source, out.open("wb") as target:
                while piece := source.read(1 << 20):
                    target.write(piece)
                target.flush()
                os.fsync(target.fileno())

        gigabytes = len(data) / 1e9
        seconds = {
            "checksum_alone": best(lambda: xxhash.xxh3_64_intdigest(data)),
            "verify": best(verify),
            "copy_and_sync": best(copy),
            "cat": best(lambda: kvtc.concat([path], out)),
            "truncate_to_half": best(
                lambda: kvtc.cut(path, out, tokens=slice(None, args.tokens // 2 + 5))
            ),
            "open": best(lambda: StreamFile(io.BytesIO(data))),
        }
        result = {
            **environment(),
            "stream_bytes": len(data),
            "seconds": seconds,
            "gigabytes_per_second": {
                name: {
                    of: gigabytes * (0.5 if "half" in name else 1) / value
                    for of, value in times.items()
                }
                for name, times in seconds.items()
                if name != "open"
            },
            "overhead": overhead(),
            "random_access": random_access(path),
        }
    print(json.dumps(result, indent=2))
    if args.output:
        write_result(args.output, result, Console())


if __name__ == "__main__":
    main()
