"""The entropy coder on the CPU: static rANS with 32 interleaved lanes.

A tile is the symbols of some components of some tokens. A symbol is coded with the frequencies of
its family, which the token's class and the component choose. All frequencies are of 4096.

Range asymmetric numeral systems are J. Duda's (arXiv 1311.2540), here with states of 32 bits in
[2¹⁶, 2³²) that take in words of 16 bits, so that a symbol needs one word at most. Lane ``j`` of 32
has a state of its own and codes tokens ``j``, ``j`` + 32, …. The lanes decode in lockstep, one
symbol each a step, and take their words from one sequence in the order of the lanes (F. Giesen,
arXiv 1402.3392), as the threads of a warp can do.

A tile is ``u32`` states of the min(32, tokens) lanes, then ``u16`` words, little-endian. For every
32 tokens there is a step for each component. The lanes beyond the last token sit out. In a step

1. every lane splits its state ``x`` into ``x >> 12`` and the slot ``x & 4095``, finds the symbol
   whose range of slots, from ``start`` on, has it, and goes on with the state
   ``frequency · (x >> 12) + slot - start``,
2. every lane whose state is now below 2¹⁶ takes a word: ``x = x << 16 | word``,
3. every lane that found the escape takes a word, the value in two's complement,
4. every lane whose value is now -32768 takes two words, the lower half of the value first, instead.

The ranges of slots follow one another in the order of the columns of :class:`Families`. All lanes
end with 2¹⁶, where the encoder began, at the end of the words. A value has no escape when its
family gives it a frequency, and no more words than it needs: a tile has one encoding.

The kernels release the GIL and keep no state: all functions may run on many threads at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import numpy.typing as npt

from kvtc_stream.errors import FormatError

#: Lanes of a tile.
LANES = 32
#: Most tokens of a tile.
MAX_TOKENS = 65_536
#: Number of classes, and bits of one.
CLASSES, CLASS_BITS = 16, 4
#: What the frequencies of a family sum to.
TOTAL = 4096
#: Columns of a family are the values -ZERO…ZERO, then the escape.
ZERO = 127
ESCAPE = 255

_LEAST_STATE = 1 << 16
#: A value after step 3 that stands for two more words.
_WIDE = -0x8000
#: Components that go through a buffer together: a cache line of each token.
_CHUNK = 16
#: Words that a step takes at most.
_STEP_WORDS = 4 * LANES

_I32 = np.int32
_U32 = np.uint32
_U64 = np.uint64

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")

_FAULTS = {
    1: "its words end before its last symbol",
    2: "a value is escaped that its family or a shorter escape codes",
    3: "its lanes do not begin with 2¹⁶ or more, or do not end with 2¹⁶ and the last word",
}


@dataclass(frozen=True, eq=False)
class Families:
    """Frequencies of symbols.

    Attributes
    ----------
    frequencies
        uint16 [families, 256], 1 to 256 families. Column ``v + 127`` is the value ``v`` of
        -127…127, column 255 the escape, which stands for every value without a frequency and is
        at least 1. Rows sum to 4096.
    """

    frequencies: npt.NDArray[np.uint16]

    def __post_init__(self) -> None:
        f = self.frequencies
        if f.dtype != np.uint16 or f.ndim != 2 or f.shape[1] != 256 or not 1 <= len(f) <= 256:
            raise ValueError(
                f"frequencies must be uint16 [1…256, 256], found {f.dtype} {list(f.shape)}"
            )
        sums = f.sum(axis=1)
        if (sums != TOTAL).any() or not f[:, ESCAPE].all():
            raise ValueError(
                f"frequencies of a family must sum to {TOTAL}, those of escapes must be at least "
                f"1; found sums {sums.min()}…{sums.max()}, least escape {f[:, ESCAPE].min()}"
            )
        f = f.copy()
        f.flags.writeable = False
        object.__setattr__(self, "frequencies", f)

    @cached_property
    def bits(self) -> npt.NDArray[np.float32]:
        """float32 [families, 256]: ideal code length of each column, escapes with their 16 bits."""
        with np.errstate(divide="ignore"):
            bits = -np.log2(self.frequencies / np.float32(TOTAL))
        bits[:, ESCAPE] += 16
        return np.where(self.frequencies > 0, bits, bits[:, ESCAPE:])

    @cached_property
    def _rows(self) -> npt.NDArray[np.uint32]:
        """uint32 [families + 1, 256]: the frequencies; then of idle lanes.

        An idle lane has a symbol that is certain, which leaves its state as it is.
        """
        rows = np.zeros((len(self.frequencies) + 1, 256), np.uint32)
        rows[:-1] = self.frequencies
        rows[-1, 0] = TOTAL
        return rows

    @cached_property
    def _starts(self) -> npt.NDArray[np.uint32]:
        return np.cumsum(self._rows, axis=1, dtype=np.uint32) - self._rows

    @cached_property
    def _encoder(self) -> npt.NDArray[np.uint32]:
        """uint32 [rows, 256]: start | frequency << 12 | escapes << 31."""
        entries = self._starts | self._rows << 12
        entries[:, ESCAPE] |= 1 << 31
        return np.where(self._rows > 0, entries, entries[:, ESCAPE:])

    @cached_property
    def _decoder(self) -> npt.NDArray[np.uint32]:
        """uint32 [rows · 4096]: column | (frequency - 1) << 8 | (slot - start) << 20."""
        rows = self._rows.ravel()
        columns = np.tile(np.arange(256, dtype=np.uint32), len(self._rows))
        slots = np.tile(np.arange(TOTAL, dtype=np.uint32), len(self._rows))
        offsets = slots - np.repeat(self._starts.ravel(), rows)
        entries: npt.NDArray[np.uint32] = offsets << _U32(20)
        entries |= np.repeat(columns | (rows - _U32(1)) << _U32(8), rows)
        return entries


def ideal_bits(
    symbols: npt.NDArray[np.int32],
    classes: npt.NDArray[np.uint8],
    ids: npt.NDArray[np.uint8],
    families: Families,
) -> float:
    """Bits of a tile by the frequencies alone; arguments as in :func:`encode`."""
    _check_tile(symbols, classes, ids, families)
    columns = np.where((symbols < -ZERO) | (symbols > ZERO), ESCAPE - ZERO, symbols) + ZERO
    wide = np.count_nonzero((symbols <= _WIDE) | (symbols > -_WIDE - 1))
    return float(families.bits[ids[classes], columns].sum(dtype=np.float64) + 32 * wide)


def encode(
    symbols: npt.NDArray[np.int32],
    classes: npt.NDArray[np.uint8],
    ids: npt.NDArray[np.uint8],
    families: Families,
) -> bytes:
    """Encode a tile.

    Parameters
    ----------
    symbols
        int32 [tokens, components], any values; at most 65,536 tokens.
    classes
        uint8 [tokens], 0…15.
    ids
        uint8 [16, components]: the family of each class and component.
    families
        The frequencies.
    """
    _check_tile(symbols, classes, ids, families)
    tokens, components = symbols.shape
    # Filled from the end, and only as far as needed. One more word: see _push.
    words = np.empty(4 * tokens * components + 1, np.uint16)
    states = np.full(LANES, _LEAST_STATE, np.uint32)
    start = _encode(symbols, classes, ids, families._encoder, states, words)
    return states[:tokens].astype("<u4").tobytes() + words[start:].astype("<u2").tobytes()


def decode(
    data: bytes | memoryview | npt.NDArray[np.uint8],
    classes: npt.NDArray[np.uint8],
    ids: npt.NDArray[np.uint8],
    families: Families,
    out: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.int32]:
    """The inverse of :func:`encode`.

    Parameters
    ----------
    data
        The tile.
    classes, ids, families
        Those that it was encoded with.
    out
        int32 [tokens, components]: where the symbols go; a new array by default.

    Returns
    -------
    int32 [tokens, components]
        The symbols: ``out``.

    Raises
    ------
    FormatError
        If no tile encodes to these bytes; ``out`` is then undefined.
    """
    _check_ids(ids, families)
    _check_classes(classes, len(classes))
    tokens, shape = len(classes), (len(classes), ids.shape[1])
    if out is None:
        out = np.empty(shape, np.int32)
    elif out.shape != shape or out.dtype != np.int32 or not out.flags.writeable:
        raise ValueError(
            f"out must be writable int32 {list(shape)}, found {out.dtype} {list(out.shape)}"
        )
    packed = np.frombuffer(data, np.uint8)
    head = 4 * min(LANES, tokens)
    if packed.size < head or packed.size % 2:
        raise FormatError(
            f"a tile has {packed.size} bytes; expected {head} for the states of its lanes and 2 "
            "for each word; the stream is damaged"
        )
    states = np.full(LANES, _LEAST_STATE, np.uint32)
    states[:tokens] = packed[:head].view("<u4")
    # Words after the last let the kernel check once a step that there were enough.
    words = np.zeros((packed.size - head) // 2 + _STEP_WORDS, np.uint16)
    words[:-_STEP_WORDS] = packed[head:].view("<u2")
    fault = _decode(words, states, classes, ids, families._decoder, families._encoder, out)
    if fault:
        raise FormatError(
            f"a tile of {tokens} tokens and {shape[1]} components is damaged: {_FAULTS[fault]}"
        )
    return out


def _check_ids(ids: npt.NDArray[np.uint8], families: Families) -> None:
    if ids.dtype != np.uint8 or ids.ndim != 2 or len(ids) != CLASSES:
        raise ValueError(
            f"ids must be uint8 [{CLASSES}, components], found {ids.dtype} {list(ids.shape)}"
        )
    if ids.size and ids.max() >= len(families.frequencies):
        raise ValueError(f"found family {ids.max()}, expected 0…{len(families.frequencies) - 1}")


def _check_tile(
    symbols: npt.NDArray[np.int32],
    classes: npt.NDArray[np.uint8],
    ids: npt.NDArray[np.uint8],
    families: Families,
) -> None:
    _check_ids(ids, families)
    if symbols.dtype != np.int32 or symbols.ndim != 2 or symbols.shape[1] != ids.shape[1]:
        raise ValueError(
            f"symbols must be int32 [tokens, {ids.shape[1]}], found {symbols.dtype} "
            f"{list(symbols.shape)}"
        )
    _check_classes(classes, len(symbols))


def _check_classes(classes: npt.NDArray[np.uint8], tokens: int) -> None:
    if tokens > MAX_TOKENS:
        raise ValueError(f"a tile has 0…{MAX_TOKENS} tokens, found {tokens}")
    if classes.dtype != np.uint8 or classes.shape != (tokens,) or (classes >= CLASSES).any():
        raise ValueError(
            f"classes must be uint8 [{tokens}] of 0…{CLASSES - 1}, found {classes.dtype} "
            f"{list(classes.shape)}"
        )


# --- kernels ------------------------------------------------------------------------------------
# Indices are unsigned where it matters: a signed one costs a test for wraparound.


@_jit
def _encode(symbols, classes, ids, table, states, words):  # type: ignore[no-untyped-def]
    """Fill ``words`` from the end, everything in the reverse of the decoder's order.

    The first word's index; ``states`` become those that the decoder starts from.
    """
    tokens, components = symbols.shape
    position = _U64(words.size)
    values = np.empty((_CHUNK, LANES), np.int32)
    entries = np.empty(LANES, np.uint32)
    for first in range((tokens - 1) // LANES * LANES, -1, -LANES):
        active = min(LANES, tokens - first)
        group = classes[first : first + active]
        entries[:] = table[len(table) - 1, 0]
        for chunk in range((components - 1) // _CHUNK * _CHUNK, -1, -_CHUNK):
            size = min(_CHUNK, components - chunk)
            for j in range(active):
                for i in range(size):
                    values[i, j] = symbols[first + j, chunk + i]
            for i in range(size - 1, -1, -1):
                any_entry = _U32(0)
                for j in range(active):
                    column = min(_U32(values[i, j] + ZERO), _U32(ESCAPE))
                    entries[j] = table[ids[group[j], _U64(chunk + i)], column]
                    any_entry |= entries[j]
                if any_entry >> _U32(31):
                    position = _push_escapes(words, position, entries, values[i])
                position = _push(words, position, states, entries)
    return position


@_jit
def _push(words, position, states, entries):  # type: ignore[no-untyped-def]
    """Steps 2 and 1."""
    for k in range(LANES):
        j = _U64(LANES - 1 - k)
        frequency = (entries[j] >> _U32(12)) & _U32(0x1FFF)
        x = states[j]
        spills = x >= _U64(frequency) << _U64(20)
        # Written always, since a branch would often be mispredicted, and counted if it spills.
        words[position - _U64(1)] = x
        position -= _U64(spills)
        x = x >> _U32(16) if spills else x
        states[j] = x + x // frequency * (_U32(TOTAL) - frequency) + (entries[j] & _U32(0xFFF))
    return position


@_jit
def _push_escapes(words, position, entries, values):  # type: ignore[no-untyped-def]
    """Steps 4 and 3."""
    for j in range(LANES - 1, -1, -1):
        if entries[j] >> _U32(31) and not -_WIDE > values[j] > _WIDE:
            position -= _U64(2)
            words[position] = values[j]
            words[position + _U64(1)] = values[j] >> 16
    for j in range(LANES - 1, -1, -1):
        if entries[j] >> _U32(31):
            position -= _U64(1)
            words[position] = values[j] if -_WIDE > values[j] > _WIDE else _WIDE
    return position


@_jit
def _decode(words, states, classes, ids, table, encoder, out):  # type: ignore[no-untyped-def]
    """Fill ``out``; 0, or what is wrong."""
    tokens, components = out.shape
    end = _U64(words.size - _STEP_WORDS)
    position = _U64(0)
    values = np.empty((_CHUNK, LANES), np.int32)
    rows = np.empty(LANES, np.uint16)
    if (states < _LEAST_STATE).any():
        return 3
    for first in range(0, tokens, LANES):
        active = min(LANES, tokens - first)
        group = classes[first : first + active]
        rows[:] = len(encoder) - 1
        for chunk in range(0, components, _CHUNK):
            size = min(_CHUNK, components - chunk)
            for i in range(size):
                for j in range(active):
                    rows[j] = ids[group[j], _U64(chunk + i)]
                position, escapes = _step(words, position, states, rows, table, values[i])
                if escapes:
                    position, shortest = _escapes(words, position, rows, encoder, values[i])
                    if not shortest:
                        return 2
                if position > end:
                    return 1
            for j in range(active):
                for i in range(size):
                    out[first + j, chunk + i] = values[i, j]
    return 3 if position != end or (states != _LEAST_STATE).any() else 0


@_jit
def _step(words, position, states, rows, table, values):  # type: ignore[no-untyped-def]
    """Steps 1 and 2; whether a lane found an escape. No branch depends on the data."""
    greatest = _U32(0)
    for j in range(LANES):
        x = states[j]
        entry = table[_U32(rows[j]) << _U32(12) | x & _U32(0xFFF)]
        frequency = (entry >> _U32(8) & _U32(0xFFF)) + _U32(1)
        x = _U32(frequency * (x >> _U32(12)) + (entry >> _U32(20)))
        longer = _U32(x << _U32(16) | words[position])
        needs = x < _LEAST_STATE
        states[j] = longer if needs else x
        position += _U64(needs)
        column = _U32(entry & _U32(0xFF))
        values[j] = _I32(column) - ZERO
        greatest = max(greatest, column)
    return position, greatest == ESCAPE


@_jit
def _escapes(words, position, rows, encoder, values):  # type: ignore[no-untyped-def]
    """Steps 3 and 4; whether every value takes as few words as it can."""
    shortest = True
    for j in range(LANES):
        if values[j] == ESCAPE - ZERO:
            values[j] = np.int16(words[position])
            position += _U64(1)
            if -ZERO <= values[j] <= ZERO:
                shortest &= encoder[rows[j], values[j] + ZERO] >> _U32(31) != 0
    for j in range(LANES):
        if values[j] == _WIDE:
            values[j] = _U32(words[position]) | _U32(words[position + _U64(1)]) << _U32(16)
            position += _U64(2)
            shortest &= not -_WIDE > values[j] > _WIDE
    return position, shortest
