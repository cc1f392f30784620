"""The CUDA backend. This version only says whether one could run; the kernels are yet to come."""

from __future__ import annotations

from importlib.util import find_spec

from kvtc_stream.errors import BackendUnavailableError


def require_cuda() -> None:
    """Raise ``BackendUnavailableError`` that names what the CUDA backend lacks here."""
    missing = [name for name in ("numba_cuda", "cupy") if find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"the CUDA backend needs {' and '.join(missing)}: pip install 'kvtc-stream[cuda]', "
            f"or use backend='cpu'"
        )
    raise BackendUnavailableError(
        "this version of kvtc-stream has no CUDA kernels yet: use backend='cpu', which reads and "
        "writes the same streams"
    )
