"""What coding cost: relative errors of a block's tokens, over all layers and of each layer."""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats.geometry import binary32


class Measure(enum.IntEnum):
    """What a block's errors were measured on. The numbers are those of the stream."""

    NONE = 0
    COEFFICIENTS = 1
    RECONSTRUCTION = 2


@dataclass(frozen=True, slots=True)
class BlockErrors:
    """Relative errors of a block's tokens, mean and worst, finite, rounded to binary32."""

    measure: Measure = Measure.NONE
    k_mean: float = 0.0
    k_worst: float = 0.0
    v_mean: float = 0.0
    v_worst: float = 0.0

    def __post_init__(self) -> None:
        for name in ("k_mean", "k_worst", "v_mean", "v_worst"):
            if not getattr(self, name):
                continue  # needs no rounding; a whole index of these is quick
            value = binary32(getattr(self, name))
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, found {value}")
            object.__setattr__(self, name, value)
        if self.measure is Measure.NONE and any(self.values):
            raise ValueError(f"errors that were not measured must be 0, found {self.values}")

    @property
    def values(self) -> tuple[float, float, float, float]:
        """The four errors in the order of the stream."""
        return (self.k_mean, self.k_worst, self.v_mean, self.v_worst)


NO_ERRORS = BlockErrors()

#: The error that each code of one layer's error stands for: 0, then numbers with 4 bits of exponent
#: and 4 of mantissa, 2**-12 * 17/16 to 15, and infinity.
LEVELS = (
    0.0,
    *(2.0 ** ((code >> 4) - 12) * (1 + (code & 15) / 16) for code in range(1, 255)),
    float("inf"),
)
_LEVELS = np.array(LEVELS)
#: That of 2**-12 in binary64.
_LEAST_EXPONENT = 1023 - 12


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Relative errors of each layer of a block's section, rounded up to a byte each.

    The error of a token in K of a layer is ‖k̂ − k‖ / ‖k‖ over the layer's heads and channels, after
    the cast to the output dtype (0 where both are 0); likewise in V. Mean and worst are over the
    block's coded tokens. Rounding up adds at most 1/16, and gives at least 2.6e-4; above 15 it
    gives infinity.

    Make them with :meth:`of`. The four properties are tuples with a float per layer, in the order
    of the section's layers.

    Parameters
    ----------
    codes
        The bytes of the stream: an index into ``LEVELS`` for the mean of K of each layer, then for
        the worst of K, the mean of V, the worst of V.

    Examples
    --------
    >>> errors = LayerErrors.of([0.125, 0.1], [0.25, 0.3], [0, 0], [0, 1e-9])
    >>> errors.k_mean
    (0.125, 0.1015625)
    >>> len(errors.codes)
    8
    """

    codes: bytes

    def __post_init__(self) -> None:
        layers, left = divmod(len(self.codes), 4)
        if left or not layers:
            raise ValueError(f"errors by layer need four bytes a layer, found {len(self.codes)}")
        k_mean, k_worst, v_mean, v_worst = self._rows
        for name, mean, worst in (("K", k_mean, k_worst), ("V", v_mean, v_worst)):
            if any(map(operator.gt, mean, worst)):
                layer = next(i for i, (a, b) in enumerate(zip(mean, worst, strict=True)) if a > b)
                raise ValueError(
                    f"the mean error of {name} of layer {layer} exceeds the worst token's, codes "
                    f"{mean[layer]} and {worst[layer]}"
                )

    @classmethod
    def of(
        cls,
        k_mean: Iterable[float],
        k_worst: Iterable[float],
        v_mean: Iterable[float],
        v_worst: Iterable[float],
    ) -> LayerErrors:
        """Round measured errors, a float per layer each; NumPy arrays will do.

        Raises
        ------
        ValueError
            A value is negative or NaN, or the four differ in length.
        """
        k, worst_k, v, worst_v = (
            _codes(np.array([*errors], np.float64)) for errors in (k_mean, k_worst, v_mean, v_worst)
        )
        if not len(k) == len(worst_k) == len(v) == len(worst_v):
            raise ValueError(
                f"errors must have one length, found {len(k)}, {len(worst_k)}, {len(v)} and "
                f"{len(worst_v)} layers"
            )
        # A mean of equal values may be rounded above them.
        rows = k, np.maximum(k, worst_k), v, np.maximum(v, worst_v)
        return cls(b"".join(row.tobytes() for row in rows))

    @property
    def layers(self) -> int:
        """How many layers."""
        return len(self.codes) // 4

    @property
    def k_mean(self) -> tuple[float, ...]:
        """Mean error of K of each layer."""
        return _errors(self._rows[0])

    @property
    def k_worst(self) -> tuple[float, ...]:
        """Error of the worst token in K of each layer."""
        return _errors(self._rows[1])

    @property
    def v_mean(self) -> tuple[float, ...]:
        """Mean error of V of each layer."""
        return _errors(self._rows[2])

    @property
    def v_worst(self) -> tuple[float, ...]:
        """Error of the worst token in V of each layer."""
        return _errors(self._rows[3])

    @classmethod
    def gathered(cls, sources: Sequence[tuple[LayerErrors, int]]) -> LayerErrors:
        """The errors of some layers: of each, whose errors it is in and its index there."""
        return cls(bytes(e._rows[kind][i] for kind in range(4) for e, i in sources))

    @property
    def _rows(self) -> tuple[bytes, ...]:
        n = self.layers
        return tuple(self.codes[i * n : (i + 1) * n] for i in range(4))


def layer_codes(
    means: NDArray[np.floating[Any]], worst: NDArray[np.floating[Any]]
) -> NDArray[np.uint8]:
    """Codes as of :meth:`LayerErrors.of`, [blocks, 4 · layers], of many blocks: both
    [2, layers, blocks], of K and V."""
    codes = _codes(np.stack([means, worst], axis=1))
    codes[:, 1] = np.maximum(codes[:, 0], codes[:, 1])
    return np.ascontiguousarray(np.moveaxis(codes, 3, 0)).reshape(codes.shape[3], -1)


def layer_means(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean errors [..., 2, layers] of K and V that codes [..., 4 · layers] stand for."""
    found: NDArray[np.float64] = _LEVELS[codes.reshape(*codes.shape[:-1], 2, 2, -1)[..., 0, :]]
    return found


def _codes(errors: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    if not (errors >= 0).all():
        raise ValueError(f"an error must not be negative, found {errors[~(errors >= 0)][0]}")
    # As a level's, four bits of the mantissa, rounded up; quicker than to search among levels.
    bits = errors.astype(np.float64).view(np.int64)
    codes = ((bits + ((1 << 48) - 1)) >> 48) - (_LEAST_EXPONENT << 4)
    return np.where(errors > 0, codes.clip(1, 255), 0).astype(np.uint8)


def _errors(codes: bytes) -> tuple[float, ...]:
    return tuple(map(LEVELS.__getitem__, codes))
