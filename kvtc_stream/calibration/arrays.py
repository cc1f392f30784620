"""Where calibration's arrays live: the few operations that differ from one device to another.

The rest of calibration is written for an array module ``xp``: that of :class:`HostArrays`, or of
its subclass for CUDA devices.
"""

from __future__ import annotations

import math
import os
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
        Name of the backend.
    xp
        The array module.
    leading
        Whether a separate basis with few components is solved for its leading eigenvectors only,
        as a joint one always is.
    widest
        Columns of the largest matrix that can be solved for all its eigenvectors; ``None``: no
        limit.
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
        """Token vectors, float32 [tokens, k_width + v_width]: K of all layers without RoPE, then V.

        ``held`` is K and V, each an array per layer; ``scales`` are those of K and of V,
        [layers, kv_heads], or ``None``.
        """
        k, v = (to_float32(np.stack(x), s) for x, s in zip(held, scales, strict=True))
        layers = np.arange(len(section.layers))
        rows = np.empty((len(positions), section.k_width + section.v_width), np.float32)
        gather(k, layers, Rotations.of(section, positions, inverse=True), rows)
        gather(v, layers, Rotations.none(len(layers)), rows[:, section.k_width :])
        return rows

    def hashes(self, rows: Array) -> NDArray[np.uint64]:
        """uint64 [rows], in host memory: hash of the bytes of each row."""
        return np.array([xxhash.xxh3_64_intdigest(row) for row in rows], np.uint64)

    def orthonormal(self, x: Array) -> Array:
        """An orthonormal basis, float32 [n, m ≤ n], of the space that the columns of ``x`` span."""
        return np.linalg.qr(x)[0]

    def put(self, x: NDArray[Any]) -> Array:
        """Copy an array from host memory to an array of ``xp``."""
        return x

    def get(self, x: Array) -> NDArray[Any]:
        """Copy ``x`` to a NumPy array."""
        return x  # type: ignore[no-any-return]

    def check_memory(self, size: int) -> None:
        """Raise ``ValueError`` if ``size`` bytes cannot be allocated."""
        total = machine_bytes()
        if size > total:
            raise ValueError(
                f"calibration needs about {size / 1e9:.0f} GB of memory, this machine has "
                f"{total / 1e9:.0f}: choose more layer_groups, or one of the bases"
            )

    def settle(self) -> None:
        """Wait until all work that reads the caller's arrays has finished."""


def machine_bytes() -> float:
    """Bytes of host memory; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


#: One instance for all: it has no state.
HOST = HostArrays()


def get_arrays(name: BackendName) -> HostArrays:
    """The arrays of a calibration backend; ``"auto"`` is CUDA if it can run here, else the CPU.

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
