"""These tests are for Numba's simulator: ``NUMBA_ENABLE_CUDASIM=1 pytest tests/simulated``."""

from __future__ import annotations

from numba import config

collect_ignore_glob = [] if config.ENABLE_CUDASIM else ["test_*.py"]

if config.ENABLE_CUDASIM:
    import lanes
    import numpy_as_cupy
    from launch import launch

    from kvtc_stream.gpu.runtime.compile import Kernel

    numpy_as_cupy.install()
    lanes.install()
    Kernel.__call__ = launch
