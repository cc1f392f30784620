"""What all commands share on a screen: progress, JSON and tables."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

#: Columns of a table when the output is not a terminal.
_WIDTH = 120
#: How often a log hears of long work.
_SECONDS_PER_LINE = 15.0


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Bars on standard error that vanish when done; where that is no terminal, a line at times."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        if console.is_terminal:
            yield bars
        else:
            with _lines(bars):
                yield bars


@contextlib.contextmanager
def _lines(bars: Progress) -> Iterator[None]:
    """What is under way, every now and then: for logs."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(_SECONDS_PER_LINE):
            for task in bars.tasks[-1:]:
                share = f" {task.percentage:.0f} %," if task.total else ""
                note(f"{task.description}:{share} {task.elapsed or 0:.0f} s so far")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def note(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def bar(bars: Progress, description: str, then: str | None = None) -> Callable[[int, int], None]:
    """A bar that moves when it is called with work done and work in all; when all is done it
    pulses, described by ``then``: what follows may take long, and a full bar would seem to hang."""
    task = bars.add_task(description, total=None)

    def update(done: int, total: int) -> None:
        if done < total:
            bars.update(task, completed=done, total=total)
            return
        if then is not None:
            bars.reset(task, description=then)
        for own in bars.tasks:
            if own.id == task:
                own.total = None

    return update


@contextlib.contextmanager
def step(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a step under way, and a line when it is done, on standard error."""
    start = time.perf_counter()
    with progress() as bars:
        yield bar(bars, description)
    note(f"{description}: {time.perf_counter() - start:.1f} s")


def print_json(value: Mapping[str, Any]) -> None:
    """The one object on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def show(tables: Iterable[Table], *, stderr: bool = False) -> None:
    """Print tables, an empty line between them."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    for i, made in enumerate(tables):
        console.print(made, new_line_start=i > 0)


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, side by side; a value that is empty is left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            table.add_row(name, Text(printable(value)))
    return table


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table whose first column is text and whose others are aligned to the right."""
    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def printable(text: str) -> str:
    """``text`` without what could steer a terminal: streams come from anywhere."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
