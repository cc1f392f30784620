"""The CUDA backend: kernels in Numba-CUDA, arrays and matrix products by CuPy.

Nothing here is imported before a CUDA backend is asked for.
"""

from __future__ import annotations

from importlib.util import find_spec

from kvtc_stream.errors import BackendUnavailableError

_REMEDY = (
    "pip install 'kvtc-stream[cuda]', or use backend='cpu': it reads and writes the same streams"
)


def require_cuda() -> None:
    """Raise ``BackendUnavailableError`` if the CUDA backend cannot run; it says what is missing."""
    missing = [
        package
        for name, package in (("numba_cuda", "numba-cuda"), ("cupy", "cupy-cuda13x"))
        if find_spec(name) is None
    ]
    if missing:
        raise BackendUnavailableError(
            f"the CUDA backend needs {' and '.join(missing)}, not found here: {_REMEDY}"
        )
    from kvtc_stream.gpu.arrays import require_cupy

    require_cupy()
