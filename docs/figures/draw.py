"""Draws the documentation's figures: `python docs/figures/draw.py` writes the .svg files beside it.

The house has the floors that tests/test_house.py enforces.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
INK, PAPER, GREY = "#1f2430", "#ffffff", "#6b7280"
BLUE, RED, GREEN, SAND = "#dbe7f5", "#f6d9d9", "#dcefdc", "#f3ead6"

#: What each floor is for, and its colour, by one of its rooms.
ROOMS = {
    "errors": ("what can go wrong, how far work has come, settings", SAND),
    "io.environment": ("threads, memory, atomic files", SAND),
    "formats": ("the container's bytes: parser, records, index, SPEC", BLUE),
    "io.dlpack": ("tensors of any framework", BLUE),
    "coding": ("what SPEC fixes: RoPE, quantisers, rANS, payloads", GREEN),
    "calibration": ("what is learnt from a model: moments, bases, tables", GREEN),
    "planning": ("targets, dynamic programming, rate control", GREEN),
    "backends": ("NumPy and Numba; CUDA kernels", GREEN),
    "io.sources": ("memory, files, URLs, pages of servers", BLUE),
    "stream": ("codec, encoder, decoder, files, pages, editing", RED),
    "testing": ("public names", RED),
    "integrations": ("a host each: transformers", RED),
    "evaluation": ("quality on a model and texts; demo", RED),
    "cli": ("the command kvtc", RED),
}


def floors() -> tuple[tuple[str, ...], ...]:
    """``FLOORS`` of the test, from the ground up."""
    tree = ast.parse((HERE.parents[1] / "tests/test_house.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return ast.literal_eval(node.value)  # type: ignore[no-any-return]
    raise LookupError("tests/test_house.py has no FLOORS")


class Drawing:
    """Boxes, words and arrows, as SVG."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="system-ui, sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A rectangle with its upper left corner at x, y."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{colour}" '
            f'stroke="{INK}" stroke-width="1"/>'
        )

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        colour: str = INK,
        middle: bool = True,
    ) -> None:
        """A line of text, around x or from x on."""
        anchor = "middle" if middle else "start"
        self._parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """Through points, level or upright; the last stretch to the right or down."""
        (before, _), (x, y) = points[-2:]
        right = x > before
        tails = (x - 8, y - 4, x - 8, y + 4) if right else (x - 4, y - 8, x + 4, y - 8)
        line = " ".join(f"{a},{b}" for a, b in [*points[:-1], (x - 5 * right, y - 5 * (not right))])
        self._parts.append(
            f'<polyline points="{line}" stroke="{INK}" fill="none"/>'
            f'<polygon points="{x},{y} {" ".join(map(str, tails))}" fill="{INK}"/>'
        )

    def save(self, name: str) -> None:
        """Beside this script."""
        text = "\n".join([*self._parts, "</svg>", ""])
        (HERE / name).write_text(text, encoding="utf-8")


def pipeline() -> None:
    """From cache to stream."""
    drawing = Drawing(1000, 290, "A cache goes through four stages into blocks of a stream")
    stages = (
        ("keys and values", "all layers, all heads", SAND),
        ("take RoPE off", "and the mean", BLUE),
        ("weights × basis", "learnt once per model", GREEN),
        ("quantise", "bits dealt out by a plan", GREEN),
        ("entropy code", "rANS", RED),
    )
    width, gap = 170, 30
    for i, (first, second, colour) in enumerate(stages):
        x = 15 + i * (width + gap)
        drawing.box(x, 20, width, 64, colour)
        drawing.words(x + width / 2, 47, first, size=15)
        drawing.words(x + width / 2, 68, second, size=12, colour=GREY)
        if i:
            drawing.arrow((x - gap, 52), (x, 52))
    drawing.words(755, 112, "a block of 128 tokens", size=12, colour=GREY)
    drawing.arrow((900, 84), (900, 120), (609, 120), (609, 153))

    pieces = (
        ("header", 105, SAND),
        ("first 4 tokens", 120, BLUE),
        ("block", 92, RED),
        ("block", 92, RED),
        ("…", 60, RED),
        ("block", 92, RED),
        ("latest tokens", 160, BLUE),
        ("index, trailer", 139, SAND),
    )
    x = 15.0
    for name, wide, colour in pieces:
        drawing.box(x, 155, wide, 46, colour)
        drawing.words(x + wide / 2, 183, name)
        x += wide + 15.7
    drawing.words(213, 222, "as they are", size=12, colour=GREY)
    drawing.words(500, 222, "each decodable alone, with its own checksum", size=12, colour=GREY)
    drawing.words(760, 222, "as they are", size=12, colour=GREY)
    drawing.words(
        500, 262, "one stream: written front to back, read from anywhere, appended to", size=15
    )
    drawing.save("pipeline.svg")


def _shortened(rooms: list[str]) -> list[str]:
    """A room after one of the same package by its own name alone."""
    packages = [room.rpartition(".")[0] for room in rooms]
    return [
        room.rpartition(".")[2] if i and packages[i] and packages[i] == packages[i - 1] else room
        for i, room in enumerate(rooms)
    ]


def house() -> None:
    """The package's floors, the top one first."""
    storeys = floors()
    height = 40
    drawing = Drawing(860, height * len(storeys) + 60, "The floors of the package")
    drawing.words(430, 28, "Imports go down, never up", size=15)
    for i, floor in enumerate(reversed(storeys)):
        y = 42 + i * height
        [(purpose, colour)] = [ROOMS[room] for room in floor if room in ROOMS]
        drawing.box(20, y, 820, height - 6, colour)
        rooms = " · ".join(_shortened([room or "kvtc_stream" for room in floor]))
        drawing.words(36, y + 22, rooms, size=15, middle=False)
        beside = max(370, 56 + int(7.3 * len(rooms)))
        drawing.words(beside, y + 22, purpose, size=13, colour=GREY, middle=False)
    drawing.save("house.svg")


if __name__ == "__main__":
    pipeline()
    house()
