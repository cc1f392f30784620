"""Kill a writing process many times; every file must open up to its last whole block.

    python benchmarks/kills.py [--kills 200] [--output benchmarks/results/kills.json]

Runs the test of that, which kills 30 times otherwise: a third of the processes write a new file,
the others append to one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from _common import environment, write_result
from rich.console import Console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    test = "tests/test_append.py::test_killed_writers_leave_what_can_be_recovered"
    command = [sys.executable, "-m", "pytest", "-q", test]
    subprocess.run(command, env={**os.environ, "KVTC_KILLS": str(args.kills)}, check=True)
    seconds = time.perf_counter() - began
    result = {**environment(), "kills": args.kills, "recovered": args.kills, "seconds": seconds}
    if args.output:
        write_result(args.output, result, Console())


if __name__ == "__main__":
    main()
