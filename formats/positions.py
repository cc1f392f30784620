"""Positions of a block's tokens: their order, and those on several axes (M-RoPE)."""

from __future__ import annotations

import enum
import itertools
import operator
from array import array
from collections.abc import Sequence
from typing import TypeAlias

from kvtc_stream.errors import FormatError
from kvtc_stream.formats.wire import ByteReader, ByteWriter, known, located

#: int64 positions; neighbours as a range.
Positions: TypeAlias = "range | array[int]"

_POSITION_END = 1 << 63
_CONTIGUOUS, _LISTED = 0, 1


class AxesKind(enum.IntEnum):
    """How positions on axes are written. The numbers are those of the stream."""

    SHIFTED = 1
    LISTED8 = 2
    LISTED16 = 3
    LISTED32 = 4
    LISTED64 = 5


#: Struct codes of differences, by kind.
_CODES = {
    AxesKind.LISTED8: "b",
    AxesKind.LISTED16: "h",
    AxesKind.LISTED32: "i",
    AxesKind.LISTED64: "q",
}


def normal_positions(positions: Positions) -> Positions:
    """Check the positions that tokens are ordered by; neighbours become a range."""
    first, last = positions[0], positions[-1]
    rising = (
        positions.step == 1 or len(positions) == 1
        if isinstance(positions, range)
        else all(a < b for a, b in itertools.pairwise(positions))
    )
    if not rising or first < 0 or last >= _POSITION_END:
        raise ValueError(
            f"positions must rise from 0 to {_POSITION_END - 1}, found {first} to {last}"
            f"{'' if rising else ', not rising by one in a range or by any step in a list'}"
        )
    if last - first == len(positions) - 1:
        return range(first, last + 1)
    return positions


def read_positions(reader: ByteReader, kind: int, first: int, tokens: int) -> Positions:
    """Positions of ``tokens``, the first of which is ``first``."""
    if kind == _CONTIGUOUS:
        return range(first, first + tokens)
    if kind == _LISTED:
        return array("q", (first, *reader.array("q", tokens - 1, "positions")))
    raise FormatError(f"{reader.where}: kind of positions must be 0 or 1, found {kind}")


def normal_axes(axes: Sequence[Sequence[int]], positions: Positions) -> tuple[Positions, ...]:
    """Check positions on axes; none are left if all are the tokens' own."""
    found: list[Positions] = []
    for axis in axes:
        if len(axis) != len(positions):
            raise ValueError(
                f"an axis needs a position for each of {len(positions)} tokens, found {len(axis)}"
            )
        ends = (axis[0], axis[-1]) if isinstance(axis, range) else (min(axis), max(axis))
        if min(ends) < 0 or max(ends) >= _POSITION_END:
            raise ValueError(
                f"positions on an axis must be from 0 to {_POSITION_END - 1}, found {min(ends)} "
                f"to {max(ends)}"
            )
        own = isinstance(axis, range) and axis.step == 1
        neighbours = own or set(_steps(axis)) <= {1}
        found.append(range(axis[0], axis[0] + len(axis)) if neighbours else array("q", axis))
    return () if all(_shift(axis, positions) == 0 for axis in found) else tuple(found)


def pack_axes(axes: Sequence[Positions], positions: Positions, writer: ByteWriter) -> None:
    """Append positions on axes, in the first kind that can hold them."""
    kind = _kind(axes, positions)
    writer.pack("BB", kind, len(axes))
    if kind is AxesKind.SHIFTED:
        writer.pack("q", axes[0][0] - positions[0])
        return
    writer.array("q", (axis[0] for axis in axes))
    steps = zip(*map(_steps, axes), strict=True)
    writer.array(_CODES[kind], itertools.chain.from_iterable(steps))


def read_axes(reader: ByteReader, positions: Positions, expected: int) -> tuple[Positions, ...]:
    """Undo :func:`pack_axes`, in a section with so many axes."""
    place = reader.place("axes")
    number, count = reader.unpack("BB", "axes")
    kind = known(AxesKind, number, f"{place}, kind")
    if count != expected:
        raise FormatError(
            f"{place}: positions on {count} axes, the section's keys have {expected}: the writer "
            "is at fault"
        )
    values: list[Sequence[int]]
    if kind is AxesKind.SHIFTED:
        shift = reader.integer("q", "shift of axes")
        values = [_shifted(positions, shift)] * count
    else:
        first = reader.array("q", count, "first positions on axes")
        steps = reader.array(_CODES[kind], (len(positions) - 1) * count, "steps of axes")
        values = [
            list(itertools.accumulate(steps[i::count], initial=a)) for i, a in enumerate(first)
        ]
    with located(place):
        axes = normal_axes(values, positions)
        if not axes or _kind(axes, positions) is not kind:
            shorter = _kind(axes, positions).name if axes else "leaving them out"
            raise ValueError(
                f"{kind.name} positions on axes say what {shorter} says: the writer is at fault"
            )
    return axes


def _kind(axes: Sequence[Positions], positions: Positions) -> AxesKind:
    shifts = {_shift(axis, positions) for axis in axes}
    if len(shifts) == 1 and None not in shifts:
        return AxesKind.SHIFTED
    steps = [0, *itertools.chain.from_iterable(map(_steps, axes))]
    bits = max((~step if step < 0 else step).bit_length() for step in (min(steps), max(steps))) + 1
    return next(k for k, code in _CODES.items() if bits <= 8 * array(code).itemsize)


def _shifted(positions: Positions, shift: int) -> Sequence[int]:
    if isinstance(positions, range):
        return range(positions[0] + shift, positions[0] + shift + len(positions))
    return [p + shift for p in positions]


def _steps(axis: Sequence[int]) -> list[int]:
    return list(map(operator.sub, axis[1:], axis))


def _shift(axis: Positions, positions: Positions) -> int | None:
    """How far all positions on the axis are beyond the tokens' own, if that is one number."""
    shift = axis[0] - positions[0]
    if isinstance(axis, range) and isinstance(positions, range):
        return shift
    return shift if set(map(operator.sub, axis, positions)) == {shift} else None
