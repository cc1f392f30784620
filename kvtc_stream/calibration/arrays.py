"""Where calibration's arrays live: the few operations that differ from one device to another.

Everything else of calibration is written for an array module ``xp``, that of :class:`HostArrays` or
of its subclass for CUDA devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtc_stream.calibration.families import SymbolCounter
from kvtc_stream.coding.rope import Rotations, gather
from kvtc_stream.coding.values import to_float32
from kvtc_stream.errors import BackendUnavailableError
from kvtc_stream.formats import Section
from kvtc_stream.io.dlpack import BackendName, layer_list

#: An array of ``xp``.
Array = Any


class HostArrays:
    """NumPy arrays. Has no state; safe across threads.

    Attributes
    ----------
    name
        The backend's.
    xp
        The array module.
    leading
        Whether separate bases of few components come from the leading eigenvectors alone, as
        joint ones do.
    widest
        Columns of the largest matrix that is solved for all its eigenvectors; ``None``: any.
    counter
        Counts symbols for :func:`kvtc_stream.calibration.families.fit_families`.
    """

    name = "cpu"
    xp: Any = np
    leading = False
    widest: int | None = None
    counter: SymbolCounter

    def __init__(self) -> None:
        self.counter = SymbolCounter()

    def layers(self, x: Any, name: str, layers: int, kv_heads: int, dim: int) -> list[Array]:
        """K or V as arrays [kv_heads, tokens, dim] per layer: see :func:`layer_list`."""
        return list(layer_list(x, name, layers, kv_heads, dim)[0])

    def rows(
        self,
        section: Section,
        held: tuple[Sequence[Array], Sequence[Array]],
        positions: NDArray[np.int64],
        scales: Sequence[NDArray[np.float32] | None],
    ) -> Array:
        """float32 [tokens, k_width + v_width] of K and V per layer: one row per token, no RoPE.

        ``scales`` are [layers, kv_heads] of K and of V, or ``None``.
        """
        k, v = (to_float32(np.stack(x), s) for x, s in zip(held, scales, strict=True))
        layers = np.arange(len(section.layers))
        rows = np.empty((len(positions), section.k_width + section.v_width), np.float32)
        gather(k, layers, Rotations.of(section, positions, inverse=True), rows)
        gather(v, layers, Rotations.none(len(layers)), rows[:, section.k_width :])
        return rows

    def hashes(self, rows: Array) -> NDArray[np.uint64]:
        """uint64 [rows], in host memory: a hash of each row's bytes."""
        return np.array([xxhash.xxh3_64_intdigest(row) for row in rows], np.uint64)

    def orthonormal(self, x: Array) -> Array:
        """float32 [n, m ≤ n]: an orthonormal basis of what the columns of ``x`` span."""
        return np.linalg.qr(x)[0]

    def put(self, x: NDArray[Any]) -> Array:
        """An array of ``xp`` with the values of one in host memory."""
        return x

    def get(self, x: Array) -> NDArray[Any]:
        """A NumPy array with the values of ``x``."""
        return x  # type: ignore[no-any-return]

    def check_memory(self, size: int) -> None:
        """Raise ``ValueError`` where so many bytes cannot be had."""

    def settle(self) -> None:
        """Wait until nothing reads the caller's arrays any more."""


#: The one on the CPU.
HOST = HostArrays()


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
