"""The uniform quantiser on the CPU: coefficients to integers, and back.

A coefficient ``x`` is coded as ``rint(x / step)`` and decoded as that integer times ``step``, both
in binary32. There is no dead zone, and values are reconstructed at the middle of their interval.
That is not what loses the least squared error: on SmolLM2-135M dead zones, centroids and
rate-distortion-optimised rounding did, and took the cache further from what the model needs. They
shrink coefficients all in one direction, which attention over many tokens does not average out.

The step of a component is that of its band, times that of its token's class:
``step · 2^((band's step + class) / 4)``, rounded to binary32.

The kernels release the GIL and keep no state: all functions may run on many threads at once.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from kvtc_stream.coding import lattice
from kvtc_stream.coding.rans import CLASSES, ESCAPE, ZERO, Families
from kvtc_stream.errors import FormatError
from kvtc_stream.formats.plan import Band, Quantiser
from kvtc_stream.io.threads import in_spans

#: Integers up to here are exact in binary32; a token with a larger one is stored verbatim.
MAX_SYMBOL = 1 << 24

#: 2^(i/4), rounded to binary64.
_QUARTERS = np.array(
    [
        float.fromhex(x)
        for x in ("0x1p0", "0x1.306fe0a31b715p0", "0x1.6a09e667f3bcdp0", "0x1.ae89f995ad3adp0")
    ]
)
_STEPS = np.arange(256 + CLASSES)
#: Levels whose families are kept: blocks take few, and encoders ask for some of them many times.
_LEVELS = 16

_F32 = np.float32
_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


def steps(step: float) -> npt.NDArray[np.float32]:
    """float32 [272]: the step of each sum of a band's step and a class."""
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(step * _QUARTERS[_STEPS % 4], _STEPS // 4).astype(np.float32)


class UniformBands:
    """The bands of a part with its frequency tables; immutable.

    Attributes
    ----------
    components
        int64 [coded]: those in uniform bands.
    base
        uint8 [coded]: their bands' steps.
    """

    def __init__(
        self, bands: tuple[Band, ...], families: Families, ids: npt.NDArray[np.uint8]
    ) -> None:
        sizes = [b.size for b in bands]
        coded = np.repeat([b.quantiser is Quantiser.UNIFORM for b in bands], sizes)
        self.components = np.flatnonzero(coded)
        self._others = np.flatnonzero(~coded)
        self.base = np.repeat(np.array([b.step for b in bands], np.uint8), sizes)[coded]
        self.families = families
        self._ids = ids
        self._of_level: dict[int, npt.NDArray[np.uint8]] = {}

    def ids(self, level: int) -> npt.NDArray[np.uint8]:
        """uint8 [16, coded]: families at ``level`` quarter octaves above the bands' steps."""
        found = self._of_level.get(level)
        if found is None:
            rows = (self.base.astype(np.int64) + level).clip(0, len(self._ids) - 1)
            found = np.ascontiguousarray(self._ids[rows, :, self.components].T)
            if len(self._of_level) == _LEVELS:
                self._of_level.clear()
            self._of_level[level] = found
        return found

    def grids(
        self,
        coefficients: npt.NDArray[np.float32],
        unit: float,
        wishes: npt.NDArray[np.float32],
    ) -> lattice.TokenGrids:
        """What decides the steps of float32 [tokens, at least the bands' components].

        ``unit`` is the step of base step 0 and class 0.
        """
        leading = self.components[: lattice.LEADING]
        scale = np.exp2(self.base[: len(leading)] / -4) / unit
        # Seldom are there others before them.
        own = slice(0, len(leading)) if leading[-1:] < len(leading) else leading
        return lattice.recognise(coefficients[:, own], scale.astype(np.float32), wishes)

    def quantise(
        self,
        coefficients: npt.NDArray[np.float32],
        classes: npt.NDArray[np.uint8],
        step: float,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Symbols of float32 [tokens, at least the bands' components].

        Returns
        -------
        symbols
            int32 [tokens, coded]; 0 where they have no meaning.
        representable
            bool [tokens]: false where a coefficient is no number, or beyond 2²⁴ steps.
        """
        symbols = np.empty((len(coefficients), len(self.components)), np.int32)
        representable = np.empty(len(coefficients), np.bool_)
        shared = self.components, self.base, steps(step)

        def some(own: slice) -> None:
            _quantise(coefficients[own], classes[own], *shared, symbols[own], representable[own])

        in_spans(some, len(coefficients), symbols.size)
        return symbols, representable

    def bits(
        self,
        coefficients: npt.NDArray[np.float32],
        classes: npt.NDArray[np.uint8],
        step: float,
        level: int,
    ) -> float:
        """What these tokens would take; arguments as for :meth:`quantise`."""
        shared = self.components, self.base, steps(step), self.ids(level), self.families.bits
        found = np.empty(len(coefficients), np.float32)

        def some(own: slice) -> None:
            _measure(coefficients[own], classes[own], *shared, found[own])

        in_spans(some, len(coefficients), len(coefficients) * len(self.components))
        # One after the other: the sum does not depend on the threads.
        return float(np.cumsum(found, dtype=np.float64)[-1]) if len(found) else 0.0

    def dequantise(
        self,
        symbols: npt.NDArray[np.int32],
        classes: npt.NDArray[np.uint8],
        step: float,
        out: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int64],
        tile: slice = slice(None),
    ) -> None:
        """Values of ``symbols``, of a tile of the coded components, into ``rows`` of ``out``; those
        that are not coded become 0.

        Raises
        ------
        FormatError
            A symbol is beyond 2²⁴, or a value is not finite.
        """
        if len(self._others):
            out[np.ix_(rows, self._others)] = 0
        own = self.components[tile], self.base[tile]
        if not _dequantise(symbols, classes, *own, steps(step), rows, out):
            raise FormatError(
                f"a symbol is beyond ±{MAX_SYMBOL}, or its value is not finite: the writer is at "
                f"fault"
            )


@_jit
def _quantise(x, classes, components, base, deltas, symbols, representable):  # type: ignore[no-untyped-def]
    for t in range(len(x)):
        fits = True
        for i in range(components.size):
            quotient = x[t, components[i]] / deltas[base[i] + classes[t]]
            inside = abs(quotient) <= _F32(MAX_SYMBOL)  # false for NaN
            fits &= inside
            symbols[t, i] = np.int32(np.rint(quotient)) if inside else np.int32(0)
        representable[t] = fits


@_jit
def _measure(x, classes, components, base, deltas, ids, bits, out):  # type: ignore[no-untyped-def]
    for t in range(len(x)):
        own = ids[classes[t]]
        token = _F32(0)
        for i in range(components.size):
            magnitude = abs(x[t, components[i]] / deltas[base[i] + classes[t]])
            if magnitude < _F32(ZERO + 0.5):
                quotient = x[t, components[i]] / deltas[base[i] + classes[t]]
                token += bits[own[i], np.int64(np.rint(quotient)) + ZERO]
            else:
                token += bits[own[i], ESCAPE]
                if not magnitude < _F32(32767.5):
                    token += _F32(32)
        out[t] = token


@_jit
def _dequantise(symbols, classes, components, base, deltas, rows, out):  # type: ignore[no-untyped-def]
    sound = True
    for t in range(len(symbols)):
        row = out[rows[t]]
        for i in range(components.size):
            symbol = symbols[t, i]
            value = _F32(symbol) * deltas[base[i] + classes[t]]
            sound &= -MAX_SYMBOL <= symbol <= MAX_SYMBOL and np.isfinite(value)
            row[components[i]] = value
    return sound
