"""The entropy coder on the CPU: static rANS with 32 interleaved lanes.

A tile holds the symbols of some components of some tokens. The token's step class and the component
choose the frequency table (family) that a symbol is coded with. Frequencies of a table sum to 4096.

The coder is a range asymmetric numeral system (J. Duda, arXiv 1311.2540) with 32-bit states in
[2¹⁶, 2³²) that are refilled with 16-bit words, so a symbol needs at most one word. Each of 32 lanes
has its own state: lane ``j`` codes tokens ``j``, ``j`` + 32, …. Lanes decode in lockstep, one
symbol per step, and take words from one shared sequence in lane order (F. Giesen, arXiv 1402.3392),
as the threads of a warp can do.

A tile is stored as the ``u32`` states of the min(32, tokens) lanes, then ``u16`` words,
little-endian. Each group of 32 tokens takes one step per component. Lanes beyond the last token are
idle. In a step

1. every lane splits its state ``x`` into ``x >> 12`` and the slot ``x & 4095``, finds the symbol
   whose range of slots, beginning at ``start``, contains it, and sets its state to
   ``frequency · (x >> 12) + slot - start``,
2. every lane whose state is now below 2¹⁶ takes a word: ``x = x << 16 | word``,
3. every lane whose symbol is the escape takes a word, the value in two's complement,
4. every lane whose value is now -32768 takes two more words that replace the value, lower half
   first.

Ranges of slots follow one another in the order of the columns of :class:`Families`. All lanes end
with 2¹⁶, the encoder's initial state, at the end of the words. A value is escaped only if its table
gives it no frequency, and takes no more words than it needs: a tile has exactly one encoding.

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
#: Maximum number of tokens in a tile.
MAX_TOKENS = 65_536
#: Number of step classes, and bits to store one.
CLASSES, CLASS_BITS = 16, 4
#: The step class of a token of average importance, and of all tokens if nothing predicts theirs.
MIDDLE = 8
#: The sum of the frequencies of a table.
TOTAL = 4096
#: Columns of a table are the values -ZERO…ZERO, then the escape.
ZERO = 127
ESCAPE = 255

_MIN_STATE = 1 << 16
#: A value of step 3 that announces the two words of step 4.
_WIDE = -0x8000
#: Components that are buffered together: a cache line of each token.
_CHUNK = 16
#: Maximum number of words taken in a step.
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
    """Frequency tables of symbols; each is called a family.

    Attributes
    ----------
    frequencies
        uint16 [families, 256], 1 to 256 families. Column ``v + 127`` is the frequency of the value
        ``v``, -127…127. Column 255 is that of the escape, at least 1, which stands for every value
        without a frequency. Rows sum to 4096.
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
        """Ideal code length of each column in bits, float32 [families, 256].

        That of the escape includes its 16 bits; values without a frequency take an escape.
        """
        with np.errstate(divide="ignore"):
            bits = -np.log2(self.frequencies / np.float32(TOTAL))
        bits[:, ESCAPE] += 16
        return np.where(self.frequencies > 0, bits, bits[:, ESCAPE:])

    @cached_property
    def _rows(self) -> npt.NDArray[np.uint32]:
        """The frequencies and, as the last row, a table for idle lanes: uint32 [families + 1, 256].

        Idle lanes have one symbol of frequency 4096, which does not change their state.
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
        uint8 [tokens]: step classes, 0…15.
    ids
        uint8 [16, components]: the family for each step class and component.
    families
        The frequency tables.
    """
    _check_tile(symbols, classes, ids, families)
    tokens, components = symbols.shape
    # Filled from the end, only as far as needed. _push may write one word more than it counts.
    words = np.empty(4 * tokens * components + 1, np.uint16)
    states = np.full(LANES, _MIN_STATE, np.uint32)
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
        As they were given to :func:`encode`.
    out
        int32 [tokens, components]: an array to write to; a new one by default.

    Returns
    -------
    int32 [tokens, components]
        The symbols: ``out``.

    Raises
    ------
    FormatError
        No tile encodes to these bytes; the contents of ``out`` are then undefined.
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
    states = np.full(LANES, _MIN_STATE, np.uint32)
    states[:tokens] = packed[:head].view("<u4")
    # Padding lets the kernel check once per step whether there were enough words.
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
    """Encode a tile backwards, filling ``words`` from the end; return the first word's index.

    ``states`` become those that the decoder starts from.
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
    """Undo step 2, then step 1, for all lanes; return the new position."""
    for k in range(LANES):
        j = _U64(LANES - 1 - k)
        frequency = (entries[j] >> _U32(12)) & _U32(0x1FFF)
        x = states[j]
        spills = x >= _U64(frequency) << _U64(20)
        # Always written, but only counted if it spills: a branch would often be mispredicted.
        words[position - _U64(1)] = x
        position -= _U64(spills)
        x = x >> _U32(16) if spills else x
        states[j] = x + x // frequency * (_U32(TOTAL) - frequency) + (entries[j] & _U32(0xFFF))
    return position


@_jit
def _push_escapes(words, position, entries, values):  # type: ignore[no-untyped-def]
    """Undo step 4, then step 3, for all lanes; return the new position."""
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
    """Fill ``out``; return 0, or a key of ``_FAULTS``."""
    tokens, components = out.shape
    end = _U64(words.size - _STEP_WORDS)
    position = _U64(0)
    values = np.empty((_CHUNK, LANES), np.int32)
    rows = np.empty(LANES, np.uint16)
    if (states < _MIN_STATE).any():
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
    return 3 if position != end or (states != _MIN_STATE).any() else 0


@_jit
def _step(words, position, states, rows, table, values):  # type: ignore[no-untyped-def]
    """Steps 1 and 2; return the position, and whether a lane has an escape.

    No branch depends on the data.
    """
    greatest = _U32(0)
    for j in range(LANES):
        x = states[j]
        entry = table[_U32(rows[j]) << _U32(12) | x & _U32(0xFFF)]
        frequency = (entry >> _U32(8) & _U32(0xFFF)) + _U32(1)
        x = _U32(frequency * (x >> _U32(12)) + (entry >> _U32(20)))
        longer = _U32(x << _U32(16) | words[position])
        needs = x < _MIN_STATE
        states[j] = longer if needs else x
        position += _U64(needs)
        column = _U32(entry & _U32(0xFF))
        values[j] = _I32(column) - ZERO
        greatest = max(greatest, column)
    return position, greatest == ESCAPE


@_jit
def _escapes(words, position, rows, encoder, values):  # type: ignore[no-untyped-def]
    """Steps 3 and 4; return the position, and whether every value takes as few words as it can."""
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
