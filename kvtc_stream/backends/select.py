"""The one place that picks a backend."""

from __future__ import annotations

from typing import Any

from kvtc_stream.backends.base import Backend
from kvtc_stream.errors import BackendUnavailableError
from kvtc_stream.io import environment
from kvtc_stream.io.dlpack import BackendName, on_cuda


def cuda_runs() -> bool:
    """Whether the CUDA backend can run here."""
    from kvtc_stream.gpu import require_cuda

    try:
        require_cuda()
    except BackendUnavailableError:
        return False
    return True


def get_backend(name: BackendName, *inputs: Any) -> Backend:
    """The backend of that name.

    ``"auto"`` is what ``KVTC_BACKEND`` says, otherwise CUDA for inputs on a CUDA device, and the
    CPU for others.

    Raises
    ------
    BackendUnavailableError
        ``"cuda"`` was asked for and cannot run here; the message says what is missing.
    """
    chosen = environment.backend() if name == "auto" else name
    if chosen == "auto":
        chosen = "cuda" if any(map(on_cuda, inputs)) else "cpu"
    if chosen == "cuda":
        from kvtc_stream.gpu import require_cuda

        require_cuda()
        from kvtc_stream.gpu.backend import CudaBackend

        return CudaBackend()
    if chosen == "cpu":
        from kvtc_stream.backends.cpu import CpuBackend

        return CpuBackend()
    raise ValueError(f"backend must be 'auto', 'cpu' or 'cuda', found {name!r}")
