"""How often the position of a page is found from its keys alone, and how often wrongly.

    python benchmarks/positions.py --model m.gguf --calibration m.safetensors --text a.txt b.txt
    python benchmarks/positions.py --calibration m.safetensors --cache a.safetensors b.safetensors

Documents are cut from texts and read by the model, or their caches are plain files; they are cut
into pages of several sizes, and each page is looked for among all multiples of its size up to
``--most``. Pages that begin a third of a page later are looked for too: their position is no
candidate, and the finder is to be sure of none. Texts that the calibration was made of tell less.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment, load_cache, write_result
from numpy.typing import NDArray
from rich.console import Console

import kvtc_stream as kvtc
from kvtc_stream.evaluation import quality
from kvtc_stream.integrations.hosts import positions
from kvtc_stream.integrations.hosts.positions import FoundPosition, PositionFinder
from kvtc_stream.integrations.transformers.loading import load_model
from kvtc_stream.io.dlpack import to_numpy

RESULT = Path(__file__).parent / "results" / "positions.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--cache", nargs="+", default=[])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--documents", type=int, default=4, help="of each text")
    parser.add_argument("--tokens", type=int, default=2048, help="of each document")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--most", type=int, default=8192, help="positions that are candidates")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = environment()
    calibration = kvtc.Calibration.load(arguments.calibration)
    finders = {n: PositionFinder(calibration, n, arguments.most) for n in arguments.sizes}
    found: dict[int, list[tuple[int, FoundPosition]]] = {n: [] for n in arguments.sizes}
    between: dict[int, list[FoundPosition]] = {n: [] for n in arguments.sizes}
    for name, k in documents(arguments):
        for size, pages in found.items():
            for start in range(0, k.shape[2] - size + 1, size):
                pages.append((start, finders[size].find(k[:, :, start : start + size])))
            for start in range(size // 3, k.shape[2] - size + 1, size):
                between[size].append(finders[size].find(k[:, :, start : start + size]))
        console.print(f"{name}: {[len(x) for x in found.values()]} pages")
    result["calibration_tokens"] = calibration.tokens
    result["documents"] = [Path(path).name for path in [*arguments.text, *arguments.cache]]
    result["thresholds"] = {"margin": positions.MARGIN, "distance": positions.DISTANCE}
    result["sizes"] = [
        judged(size, pages, arguments.most) | judged_between(between[size])
        for size, pages in found.items()
    ]
    for row in result["sizes"]:
        console.print(row)
    write_result(arguments.output, result, console)


def documents(arguments: argparse.Namespace) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names of texts or caches, and keys [layers, kv_heads, tokens, head_dim] of each document."""
    for path in arguments.cache:
        yield Path(path).name, load_cache(path)[0].astype(np.float32)
    if not arguments.text:
        return
    model, tokenizer = load_model(arguments.model)[:2]
    for path in arguments.text:
        ids = quality.token_ids(tokenizer, Path(path).read_text(encoding="utf-8"))
        total = arguments.documents * arguments.tokens
        for document in quality.spread_documents(ids, total, arguments.tokens):
            layers = quality.prefill(model, document).layers
            yield (
                Path(path).name,
                np.stack([to_numpy(layer.keys[0].float()) for layer in layers]),
            )


def judged_between(pages: list[FoundPosition]) -> dict[str, Any]:
    """Of pages whose position is no candidate, how many are taken for others."""
    return {
        "pages_between": len(pages),
        "false_accepts_between": sum(x.sure for x in pages),
        "largest_margin_between": max(x.margin for x in pages),
    }


def judged(size: int, pages: list[tuple[int, FoundPosition]], most: int) -> dict[str, Any]:
    """Counts of one page size; a false accept is a wrong position that the finder is sure of."""
    right = [start == x.position for start, x in pages]
    wrong = [x for ok, (_, x) in zip(right, pages, strict=True) if not ok]
    first = [x for start, x in pages if start == 0]
    false = sum(x.sure for x in wrong)
    return {
        "tokens": size,
        "pages": len(pages),
        "candidates": -(-most // size),
        "right": sum(right) / len(pages),
        "sure": sum(x.sure for _, x in pages) / len(pages),
        "false_accepts": false,
        # Of a rate that gives no more than these in 95 % of runs.
        "false_accept_rate_at_most": (3.0 if not false else false + 2 * false**0.5 + 2)
        / len(pages),
        "first_pages": len(first),
        "first_pages_sure": sum(x.sure for x in first),
        "first_pages_right": sum(x.position == 0 for x in first),
        "largest_margin_of_a_wrong_one": max((x.margin for x in wrong), default=None),
        "margin_1st_percentile": float(np.percentile([x.margin for _, x in pages], 1)),
        "median_distance": float(np.median([x.distance for _, x in pages])),
        "largest_distance": float(max(x.distance for _, x in pages)),
    }


if __name__ == "__main__":
    main()
