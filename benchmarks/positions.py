"""How often the position of a page is found from its keys alone, and how often wrongly.

    python benchmarks/positions.py --model m.gguf --calibration m.safetensors --text a.txt b.txt
    python benchmarks/positions.py --calibration m.safetensors --cache a.safetensors b.safetensors

Documents are cut from texts and read by the model, or their caches are plain files; they are cut
into pages of several sizes, and each page is looked for among all multiples of its size up to
``--most``. Pages that begin a third of a page later are looked for too: their position is no
candidate, and the finder is to be sure of none. So are all pages where ``--most`` is too small for
them, as of a prompt that is longer than was said. Texts that the calibration was made of tell less.

``--theta`` gives the same keys other rotary tables: the model's own is taken off, and one of
another base put on. They are a real model's keys as a model with that table might have them, and
no second model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
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
    parser.add_argument("--theta", type=float, nargs="*", default=[], help="bases of other tables")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = environment()
    calibration = kvtc.Calibration.load(arguments.calibration)
    tables = [Table(calibration, None, arguments)]
    tables += [Table(calibration, theta, arguments) for theta in arguments.theta]
    for name, k in documents(arguments):
        for table in tables:
            table.look(k)
        console.print(f"{name}: {[len(x) for x in tables[0].found.values()]} pages")
    result["calibration_tokens"] = calibration.tokens
    result["documents"] = [Path(path).name for path in [*arguments.text, *arguments.cache]]
    result["thresholds"] = {"margin": positions.MARGIN, "distance": positions.DISTANCE}
    result["tables"] = [table.judged() for table in tables]
    for row in result["tables"]:
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


class Table:
    """What was found of pages whose keys have one rotary table."""

    def __init__(
        self, calibration: kvtc.Calibration, theta: float | None, arguments: argparse.Namespace
    ) -> None:
        section = calibration.geometry.sections[0]
        own = section.rope[0] if section.rope else None
        assert own is not None
        self._old, self._theta, self._most = own, theta, arguments.most
        self._new = own if theta is None else kvtc.Rope.from_theta(theta, own.rotary_dim)
        if theta is not None:
            ropes = (self._new,) * len(section.layers)
            geometry = kvtc.Geometry((replace(section, rope=ropes),))
            calibration = replace(calibration, geometry=geometry)
        sizes = arguments.sizes
        self._finders = {n: PositionFinder(calibration, n, arguments.most) for n in sizes}
        # Half of the positions of the document are beyond these.
        self._near = {
            n: PositionFinder(calibration, n, arguments.tokens // 2 // n * n) for n in sizes
        }
        self.found: dict[int, list[tuple[int, FoundPosition]]] = {n: [] for n in sizes}
        self._strange: dict[int, list[FoundPosition]] = {n: [] for n in sizes}

    def look(self, k: NDArray[np.float32]) -> None:
        """Look for all pages of a document, keys [layers, kv_heads, tokens, head_dim]."""
        k, tokens = self._turned(k), k.shape[2]
        for size, pages in self.found.items():
            finder, near = self._finders[size], self._near[size]
            for start in range(0, tokens - size + 1, size):
                page = k[:, :, start : start + size]
                pages.append((start, finder.find(page)))
                if start >= self._limit(size):
                    self._strange[size].append(near.find(page))
            for start in range(size // 3, tokens - size + 1, size):
                self._strange[size].append(finder.find(k[:, :, start : start + size]))

    def _limit(self, size: int) -> int:
        return int(self._near[size]._starts[-1]) + size

    def _turned(self, k: NDArray[np.float32]) -> NDArray[np.float32]:
        """Keys with this table in place of the model's own."""
        if self._theta is None:
            return k
        old, new = (np.array(table.inv_freq) for table in (self._old, self._new))
        turn = np.exp(1j * np.outer(np.arange(k.shape[2]), new - old)).astype(np.complex64)
        half = self._old.rotary_dim // 2
        pairs = (k[..., :half] + 1j * k[..., half : 2 * half]) * turn
        return np.concatenate([pairs.real, pairs.imag, k[..., 2 * half :]], axis=-1)

    def judged(self) -> dict[str, Any]:
        """Counts, of each page size and of all."""
        pages = [page for own in self.found.values() for page in own]
        strange = [x for own in self._strange.values() for x in own]
        return {
            "theta": self._theta or "the model's own",
            "all_sizes": judged(pages) | judged_strange(strange),
            "sizes": [
                {"tokens": size, "candidates": -(-self._most // size)}
                | judged(own)
                | judged_strange(self._strange[size])
                for size, own in self.found.items()
            ],
        }


def at_most(count: int, pages: int) -> float:
    """A rate that gives no more than so many in 95 % of runs."""
    return (3.0 if not count else count + 2 * count**0.5 + 2) / pages


def judged_strange(pages: list[FoundPosition]) -> dict[str, Any]:
    """Of pages whose position is no candidate, how many are taken for others."""
    false = sum(x.sure for x in pages)
    return {
        "strange_pages": len(pages),
        "strange_false_accepts": false,
        "strange_false_accept_rate_at_most": at_most(false, len(pages)),
        "strange_largest_margin": max(x.margin for x in pages),
    }


def judged(pages: list[tuple[int, FoundPosition]]) -> dict[str, Any]:
    """Counts; a false accept is a wrong position that the finder is sure of."""
    right = [start == x.position for start, x in pages]
    wrong = [x for ok, (_, x) in zip(right, pages, strict=True) if not ok]
    first = [x for start, x in pages if start == 0]
    false = sum(x.sure for x in wrong)
    return {
        "pages": len(pages),
        "right": sum(right) / len(pages),
        "sure": sum(x.sure for _, x in pages) / len(pages),
        "false_accepts": false,
        "false_accept_rate_at_most": at_most(false, len(pages)),
        "first_pages": len(first),
        "first_pages_sure": sum(x.sure for x in first),
        "first_pages_right": sum(x.position == 0 for x in first),
        "largest_margin_of_a_wrong_one": max((x.margin for x in wrong), default=None),
        "smallest_margin": min(x.margin for _, x in pages),
        "margin_1st_percentile": float(np.percentile([x.margin for _, x in pages], 1)),
        "median_distance": float(np.median([x.distance for _, x in pages])),
        "largest_distance": float(max(x.distance for _, x in pages)),
    }


if __name__ == "__main__":
    main()
