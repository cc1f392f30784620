"""Little-endian bytes, written and read with bounds checked."""

from __future__ import annotations

import contextlib
import enum
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

from kvtc_stream.errors import FormatError, VersionError

E = TypeVar("E", bound=enum.IntEnum)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Turn a ``ValueError`` about a value that was read into a ``FormatError``."""
    try:
        yield
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


class ByteWriter:
    """Writes fields one after the other; :class:`ByteReader` reads them."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def pack(self, layout: str, *values: int | float | bytes) -> None:
        """Append ``values`` in a :mod:`struct` layout without byte order."""
        try:
            self._data += struct.pack("<" + layout, *values)
        except struct.error as error:
            raise ValueError(f"{values} do not fit their fields: {error}") from None

    def array(self, code: str, values: Iterable[int] | Iterable[float]) -> None:
        """Append ``values`` of one struct code, without a count."""
        items = tuple(values)
        self.pack(f"{len(items)}{code}", *items)

    def raw(self, data: bytes | bytearray) -> None:
        """Append bytes as they are."""
        self._data += data

    def text(self, value: str) -> None:
        """Append UTF-8 after its length in bytes, u16."""
        data = value.encode()
        self.pack("H", len(data))
        self._data += data

    def digest(self, value: bytes) -> None:
        """Append an optional digest after its length, u8."""
        self.pack("B", len(value))
        self._data += value

    def getvalue(self) -> bytes:
        """All bytes so far."""
        return bytes(self._data)


class ByteReader:
    """Reads the fields of ``data``; an error names ``where``, the field and its offset.

    Nothing is allocated for a field before the bytes that fill it are known to be there.
    ``offset`` is where ``data`` lies in the stream, for messages.
    """

    __slots__ = ("_data", "_offset", "_position", "where")

    def __init__(self, data: bytes | memoryview, where: str, offset: int = 0) -> None:
        self._data = data
        self._offset = offset
        self._position = 0
        self.where = where

    @property
    def position(self) -> int:
        """Offset of the next field in the stream."""
        return self._offset + self._position

    def skip(self, data: bytes) -> bool:
        """Whether ``data`` is what follows; then it is read."""
        end = self._position + len(data)
        found = bytes(self._data[self._position : end]) == data
        if found:
            self._position = end
        return found

    def place(self, field: str, read: int = 0) -> str:
        """``field`` and its byte offset, for messages; ``read`` of its bytes were read already."""
        return f"{self.where}, {field} at byte {self.position - read}"

    def view(self, size: int, field: str) -> memoryview:
        """A view of the next ``size`` bytes, without a copy."""
        start = self._position
        self._skip(size, field)
        return memoryview(self._data)[start : self._position]

    def raw(self, size: int, field: str) -> bytes:
        """A copy of the next ``size`` bytes."""
        return bytes(self.view(size, field))

    def unpack(self, layout: str, field: str) -> tuple[Any, ...]:
        """Values of a :mod:`struct` layout without byte order."""
        packed, start = _struct(layout), self._position
        self._skip(packed.size, field)
        return packed.unpack_from(self._data, start)

    def integer(self, code: str, field: str) -> int:
        """One integer of a struct code."""
        return int(self.unpack(code, field)[0])

    def array(self, code: str, count: int, field: str) -> tuple[Any, ...]:
        """``count`` values of one struct code."""
        data = self.raw(count * _struct(code).size, field)
        return struct.unpack(f"<{count}{code}", data)

    def enum(self, registry: type[E], field: str) -> E:
        """One u8 of a registry; an unknown number is a ``VersionError``."""
        place = self.place(field)
        return known(registry, self.integer("B", field), place)

    def zero(self, size: int, field: str) -> None:
        """Reserved bytes, which must be zero."""
        data = self.raw(size, field)
        if any(data):
            raise FormatError(
                f"{self.place(field, size)} must be zero, found {data.hex()}: the writer is at "
                f"fault"
            )

    def text(self, field: str) -> str:
        """UTF-8 after its length in bytes, u16."""
        place = self.place(field)
        with located(place):
            return self.raw(self.integer("H", field), field).decode()

    def digest(self, field: str) -> bytes:
        """A digest of 32 bytes, or none, after its length, u8."""
        return self.raw(self.integer("B", field), field)

    def expect_end(self) -> None:
        """Raise unless everything was read."""
        left = len(self._data) - self._position
        if left:
            raise FormatError(
                f"{self.place('end')}: expected no more bytes, found {left}: the writer is at fault"
            )

    def _skip(self, size: int, field: str) -> None:
        left = len(self._data) - self._position
        if size > left:
            raise FormatError(
                f"{self.place(field)} needs {size} bytes, found {left}: the writer is at fault"
            )
        self._position += size


def known(registry: type[E], number: int, place: str) -> E:
    """The registry's member with a number read at ``place``, or ``VersionError``."""
    try:
        return registry(number)
    except ValueError:
        names = ", ".join(f"{m.value} ({m.name})" for m in registry)
        raise VersionError(
            f"{place} is {number}, this reader knows {names}; read with a newer kvtc-stream"
        ) from None


@cache
def _struct(layout: str) -> struct.Struct:
    return struct.Struct("<" + layout)
