"""What a backend must do, and the one place that picks one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.arrays import HOST, HostArrays
from kvtc_stream.calibration import Calibration
from kvtc_stream.control import Target
from kvtc_stream.errors import BackendUnavailableError
from kvtc_stream.formats import Block, StreamHeader

BackendName = Literal["auto", "cpu", "cuda"]
Measure = Literal["full", "coefficients"]


class SectionCoder(Protocol):
    """Codes the blocks of one section of one stream. Used by one thread at a time."""

    def encode(
        self, k: NDArray[Any], v: NDArray[Any], positions: NDArray[np.int64], start: int
    ) -> Block:
        """A data block from k, v [layers, kv_heads, tokens, head_dim] in the stream's dtype.

        ``tokens`` is at most the header's ``block_tokens``; ``start`` is the ordinal of the first
        token in the section.
        """
        ...

    def decode(self, block: Block, layers: Sequence[int]) -> tuple[Any, Any]:
        """K and V of some layers (indices into the section's), in the header's ``out_dtype``."""
        ...


class Backend(Protocol):
    """A way to run the codec."""

    name: str

    def section_coder(
        self,
        header: StreamHeader,
        section: int,
        calibration: Calibration,
        *,
        max_error: float | None = None,
        measure: Measure = "full",
        target: Target | None = None,
    ) -> SectionCoder:
        """A coder for one section of the stream that ``header`` describes.

        ``target`` is what an encoder with uniform bands keeps to.
        """
        ...


def get_backend(name: BackendName) -> Backend:
    """The backend of that name; ``"auto"`` is the fastest that can run here.

    Raises
    ------
    BackendUnavailableError
        ``"cuda"`` was asked for and cannot run here; the message says what is missing.
    """
    if name == "cuda":
        from kvtc_stream.gpu import require_cuda

        require_cuda()
    if name in ("cpu", "auto"):
        from kvtc_stream.cpu.backend import CpuBackend

        return CpuBackend()
    raise ValueError(f"backend must be 'auto', 'cpu' or 'cuda', found {name!r}")


def get_arrays(name: BackendName) -> HostArrays:
    """Where calibration of that backend keeps its arrays; ``"auto"`` is CUDA if it can run here.

    Raises
    ------
    BackendUnavailableError
        ``"cuda"`` was asked for and cannot run here; the message says what is missing.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"backend must be 'auto', 'cpu' or 'cuda', found {name!r}")
    if name == "cpu":
        return HOST
    from kvtc_stream.gpu.arrays import DeviceArrays

    try:
        return DeviceArrays()
    except BackendUnavailableError:
        if name == "cuda":
            raise
        return HOST
