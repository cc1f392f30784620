"""The CUDA backend: kernels in Numba-CUDA, arrays and matrix products by CuPy.

Nothing here is imported before a CUDA backend is asked for.
"""

from __future__ import annotations

from functools import cache

from kvtc_stream.errors import BackendUnavailableError
from kvtc_stream.io import environment

_REMEDY = (
    "pip install 'kvtc-stream[cuda]', or use backend='cpu': it reads and writes the same streams"
)


@cache  # what was there once is not looked for again
def require_cuda() -> None:
    """Raise ``BackendUnavailableError`` if the CUDA backend cannot run; it says what is missing."""
    from kvtc_stream.gpu.runtime.dialect import compiler

    missing = [] if compiler() else [environment.cuda_compiler() or "numba-cuda"]
    if not environment.installed("cupy"):
        missing.append("cupy-cuda13x")
    if missing:
        raise BackendUnavailableError(
            f"the CUDA backend needs {' and '.join(missing)}, not found here: {_REMEDY}"
        )
    from kvtc_stream.gpu.arrays import require_cupy

    require_cupy()
