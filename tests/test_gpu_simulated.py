"""The CUDA kernels without a GPU: the tests in ``simulated/``, in Numba's simulator.

Numba chooses the simulator when it is imported, so these run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "simulated"


@pytest.mark.skipif(find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_kernels_in_the_simulator() -> None:
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(run.stdout, run.stderr)
    assert run.returncode == 0, "see the output"
