"""These tests are for Numba's simulator: ``NUMBA_ENABLE_CUDASIM=1 pytest tests/simulated``."""

from __future__ import annotations

from numba import config

collect_ignore_glob = [] if config.ENABLE_CUDASIM else ["test_*.py"]
