"""The CUDA backend. This version only says whether one could run; the kernels are yet to come."""

from __future__ import annotations

from importlib.util import find_spec

from kvtc_stream.errors import BackendUnavailableError


def require_cuda() -> None:
    """Raise ``BackendUnavailableError`` that says what the CUDA backend lacks."""
    missing = [name for name in ("numba_cuda", "cupy") if find_spec(name) is None]
    also = f", and {' and '.join(missing)} (needed then) cannot be found" if missing else ""
    raise BackendUnavailableError(
        f"this version of kvtc-stream has no CUDA kernels yet{also}: use backend='cpu', which "
        f"reads and writes the same streams"
    )
