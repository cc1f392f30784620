"""One block: a run of tokens of one section that decodes alone."""

from __future__ import annotations

import enum
import itertools
from array import array
from dataclasses import dataclass

from kvtc_stream.errors import FormatError
from kvtc_stream.formats.coders import Coder, check_coded
from kvtc_stream.formats.geometry import binary32
from kvtc_stream.formats.header import StreamHeader
from kvtc_stream.formats.limits import Limits
from kvtc_stream.formats.wire import ByteReader, ByteWriter, known, located

_POSITION_END = 1 << 63
_CONTIGUOUS, _EXPLICIT = 0, 1
#: What every block begins with, in the order of :meth:`Block.pack`. In one go, because readers
#: meet many blocks.
_FIELDS, _RESERVED = "IIQqBBBBB3sQQQ4fII", bytes(3)


class Role(enum.IntEnum):
    """Why tokens are in this block. The numbers are those of the stream."""

    DATA = 0
    SINKS = 1
    TAIL = 2


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


@dataclass(frozen=True, slots=True)
class Block:
    """Compressed tokens of one section, with what is needed to decode them.

    Parameters
    ----------
    section
        Index into the header's sections.
    role
        Sinks and tail are wholly verbatim.
    start
        Ordinal of the first token that was not cut, among all tokens of the section.
    tokens
        How many are stored, from 1.
    positions
        Their positions, rising, from 0 to 2**63 - 1. Neighbours become a ``range``.
    verbatim_tokens
        Indices in the block, rising, of tokens that are not coded.
    coder, coded, coded_size
        Symbols of the other tokens: compressed with ``coder``, their size before that; the number
        of symbols if it is ``RANS``.
    verbatim_coder, verbatim
        Compressed byte planes of the verbatim values, K as [layers, kv_heads, n, k_dim] and then
        V as [layers, kv_heads, n, v_dim] in the header's dtype, in C order.
    errors
        What coding cost, over all tokens that are coded here.
    cut
        How many tokens at the front and at the end do not belong to the stream any more: they
        stay because the block decodes as a whole.
    """

    section: int
    role: Role
    start: int
    tokens: int
    positions: range | array[int]
    verbatim_tokens: tuple[int, ...]
    coder: Coder
    coded: bytes | memoryview
    coded_size: int
    verbatim_coder: Coder
    verbatim: bytes | memoryview
    errors: BlockErrors = BlockErrors()
    cut: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.tokens < 1 or len(self.positions) != self.tokens:
            raise ValueError(
                f"a block needs tokens, and as many positions, "
                f"found {self.tokens} and {len(self.positions)}"
            )
        if self.section < 0 or self.start < 0:
            raise ValueError(
                f"section and start must not be negative, found {self.section}, {self.start}"
            )
        object.__setattr__(self, "positions", _normal(self.positions))
        last = -1
        for index in self.verbatim_tokens:
            if not last < index < self.tokens:
                raise ValueError(
                    f"verbatim tokens must rise from 0 to {self.tokens - 1}, "
                    f"found {index} after {last}"
                )
            last = index
        if min(self.cut) < 0 or sum(self.cut) >= self.tokens:
            raise ValueError(f"{self.cut} of {self.tokens} tokens are cut, expected some to stay")
        if self.role is not Role.DATA and self.coded_tokens:
            raise ValueError(f"{self.role.name} must be verbatim, found {self.coded_tokens} coded")
        if self.coded_size and not self.coded_tokens:
            raise ValueError(f"no token is coded, yet there are {self.coded_size} bytes of symbols")
        if self.coder is not Coder.RANS:
            check_coded(self.coder, len(self.coded), self.coded_size, "symbols")
        elif not self.coded_size:
            raise ValueError("RANS codes at least one symbol, found none")

    @property
    def coded_tokens(self) -> int:
        """Tokens that are not verbatim."""
        return self.tokens - len(self.verbatim_tokens)

    @property
    def kept(self) -> range:
        """Indices of the tokens that were not cut."""
        return range(self.cut[0], self.tokens - self.cut[1])

    def check(self, header: StreamHeader) -> None:
        """Raise ``ValueError`` unless the block fits the stream."""
        sections = len(header.geometry.sections)
        if self.section >= sections:
            raise ValueError(f"section {self.section} is not one of {sections}")
        if self.role is Role.DATA and self.tokens > header.block_tokens:
            raise ValueError(
                f"a data block may have {header.block_tokens} tokens, found {self.tokens}"
            )
        size = header.verbatim_size(self.section, len(self.verbatim_tokens))
        check_coded(self.verbatim_coder, len(self.verbatim), size, "verbatim values")

    def pack(self) -> list[bytes | memoryview]:
        """The payload of a block record, in pieces."""
        explicit = not isinstance(self.positions, range)
        writer = ByteWriter()
        writer.pack(
            _FIELDS,
            self.tokens,
            len(self.verbatim_tokens),
            self.start,
            self.positions[0],
            self.role,
            _EXPLICIT if explicit else _CONTIGUOUS,
            self.errors.measure,
            self.coder,
            self.verbatim_coder,
            _RESERVED,
            self.coded_size,
            len(self.coded),
            len(self.verbatim),
            *self.errors.values,
            *self.cut,
        )
        if explicit:
            writer.array("q", self.positions[1:])
        if 0 < len(self.verbatim_tokens) < self.tokens:
            bitmap = bytearray(_bitmap_size(self.tokens))
            for index in self.verbatim_tokens:
                bitmap[index >> 3] |= 1 << (index & 7)
            writer.raw(bitmap)
        return [writer.getvalue(), self.coded, self.verbatim]

    @classmethod
    def unpack(
        cls, reader: ByteReader, section: int, header: StreamHeader, limits: Limits
    ) -> Block:
        """Undo :meth:`pack`; raises ``FormatError`` for a payload that is not a block.

        The block's bytes are views of the reader's.
        """
        (
            tokens,
            count,
            start,
            first,
            role,
            explicit,
            measure,
            coder,
            verbatim_coder,
            reserved,
            coded_size,
            coded_length,
            verbatim_length,
            *errors,
            cut_front,
            cut_end,
        ) = reader.unpack(_FIELDS, "fields of a block")
        where = reader.where
        limits.check("max_block_tokens", tokens, f"{where}, tokens")
        limits.check("max_block_bytes", coded_size, f"{where}, size of symbols")
        if not tokens or count > tokens:
            raise FormatError(
                f"{where}: {count} of {tokens} tokens are verbatim: the writer is at fault"
            )
        role = known(Role, role, f"{where}, role")
        measure = known(Measure, measure, f"{where}, measure")
        coder = known(Coder, coder, f"{where}, coder")
        verbatim_coder = known(Coder, verbatim_coder, f"{where}, verbatim coder")
        if reserved != _RESERVED:
            raise FormatError(
                f"{where}, reserved must be zero, found {reserved.hex()}: the writer is at fault"
            )
        positions = _read_positions(reader, explicit, first, tokens)
        verbatim_tokens = _read_bitmap(reader, count, tokens)
        coded = reader.view(coded_length, "symbols")
        verbatim = reader.view(verbatim_length, "verbatim values")
        reader.expect_end()
        with located(where):
            block = cls(
                section=section,
                role=role,
                start=start,
                tokens=tokens,
                positions=positions,
                verbatim_tokens=verbatim_tokens,
                coder=coder,
                coded=coded,
                coded_size=coded_size,
                verbatim_coder=verbatim_coder,
                verbatim=verbatim,
                errors=BlockErrors(measure, *errors),
                cut=(cut_front, cut_end),
            )
            block.check(header)
        if explicit and isinstance(block.positions, range):
            raise FormatError(f"{where}: contiguous positions are listed: the writer is at fault")
        size = header.verbatim_size(section, count)
        limits.check("max_block_bytes", size, f"{where}, size of verbatim values")
        return block


def _normal(positions: range | array[int]) -> range | array[int]:
    """Check positions; a contiguous list becomes a range."""
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


def _read_positions(
    reader: ByteReader, explicit: int, first: int, tokens: int
) -> range | array[int]:
    if explicit == _CONTIGUOUS:
        return range(first, first + tokens)
    if explicit == _EXPLICIT:
        return array("q", (first, *reader.array("q", tokens - 1, "positions")))
    raise FormatError(f"{reader.where}: kind of positions must be 0 or 1, found {explicit}")


def _bitmap_size(tokens: int) -> int:
    return -(-tokens // 8)


def _read_bitmap(reader: ByteReader, count: int, tokens: int) -> tuple[int, ...]:
    if count in (0, tokens):
        return tuple(range(count))
    place = reader.place("verbatim tokens")
    bitmap = reader.raw(_bitmap_size(tokens), "verbatim tokens")
    found = tuple(i for i in range(8 * len(bitmap)) if bitmap[i >> 3] >> (i & 7) & 1)
    if len(found) != count or found[-1] >= tokens:
        raise FormatError(
            f"{place}: expected {count} bits among {tokens} set, found {len(found)}, "
            f"the last {found[-1] if found else None}: the writer is at fault"
        )
    return found
