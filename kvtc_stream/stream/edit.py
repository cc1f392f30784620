"""Cutting and joining streams without decoding them, at the speed of copying bytes."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from typing import BinaryIO, Unpack

from kvtc_stream.errors import UnsupportedError
from kvtc_stream.formats import (
    Block,
    Role,
    StreamFile,
    StreamHeader,
    StreamWriter,
)
from kvtc_stream.io.sources import Source, open_source
from kvtc_stream.io.storage import File, atomic_write, write_all
from kvtc_stream.stream.layers import Selection, Union
from kvtc_stream.stream.options import SourceOptions

#: Fields of a header in which streams that are joined may differ: the first's are kept.
_OWN = ("sinks", "window", "coder", "metadata", "token_digest", "features")


@dataclass(frozen=True)
class Piece:
    """Some tokens of a stream.

    Parameters
    ----------
    source
        A path, a URL, memory, or a binary file object that can seek.
    tokens
        Ordinals to keep, a slice of step 1; all by default.
    positions
        Positions to keep, likewise, but none from the end; for streams whose sections hold
        different tokens.
    """

    source: Source
    tokens: slice | None = None
    positions: slice | None = None


def concat(
    pieces: Sequence[Piece | Source],
    target: File,
    *,
    token_digest: bytes | None = None,
    **options: Unpack[SourceOptions],
) -> None:
    """Join token ranges of streams into a new one; nothing is decoded, so it is as fast as a copy.

    A range that ends inside a block keeps the whole block and notes how many of its tokens count:
    the others can still be decoded by anybody who looks for them.

    Parameters
    ----------
    pieces
        What to join, in order: positions must rise. Calibration, plan, geometry, element types
        and block size of all must be the same; other fields of the header are the first's.
    target
        A path, written atomically (it may be one of the sources), or a binary file object.
    token_digest
        Of the result. By default that of a stream that is kept whole, otherwise unknown.
    options
        ``recover``, ``limits`` and ``key``, as in :func:`kvtc_stream.open`; the key is that of the
        sources and of the result.

    Raises
    ------
    FormatError
        A source is damaged, or cut off and ``recover`` is false.
    UnsupportedError
        The streams do not go together.
    """
    _write(pieces, target, None, token_digest, options)


def _write(
    pieces: Sequence[Piece | Source],
    target: File,
    layers: slice | None,
    token_digest: bytes | None,
    options: SourceOptions,
) -> None:
    key = options.get("key", b"")
    parts = [p if isinstance(p, Piece) else Piece(p) for p in pieces]
    if not parts:
        raise ValueError("give at least one stream to join")
    with ExitStack() as cleanup:
        files = [cleanup.enter_context(open_source(part.source)) for part in parts]
        _check_apart(files, target)
        streams = [StreamFile(file, **options) for file in files]
        spans = [_span(s, p) for s, p in zip(streams, parts, strict=True)]
        header = streams[0].header
        for stream in streams[1:]:
            _check_alike(header, stream.header)
            header = replace(header, features=header.features | stream.header.features)
        whole = len(parts) == 1 and parts[0].tokens is None and parts[0].positions is None
        if token_digest is None:
            token_digest = header.token_digest if whole else b""
        selection = None
        if layers is not None:
            selection = Selection(header, layers)
            header, whole = selection.header, False
        writer = StreamWriter(replace(header, token_digest=token_digest), key)
        out = cleanup.enter_context(_opened(target))
        write_all(out, writer.start())
        begun: set[int] = set()  # sections that have more than sinks
        for i, (stream, part) in enumerate(zip(streams, parts, strict=True)):
            for data in stream.user_records():
                write_all(out, writer.user(data))
            for found in _blocks(stream, part, spans[i]):
                block = found if selection is None else selection.block(found)
                if block is None:
                    continue
                role = block.role
                late = role is Role.SINKS and block.section in begun
                if late or (role is Role.TAIL and i < len(streams) - 1):
                    role = Role.DATA  # of verbatim tokens: sinks and tails are at the ends
                if role is not Role.SINKS:
                    begun.add(block.section)
                start = writer.tokens[block.section]
                try:
                    record = writer.block(replace(block, role=role, start=start))
                except ValueError as error:
                    raise UnsupportedError(
                        f"stream {i + 1} cannot follow those before it: {error}"
                    ) from error
                write_all(out, record)
        if whole and (state := streams[0].encoder_state()):
            write_all(out, writer.encoder(state))
        write_all(out, writer.finish())


def compact(source: Source, target: File | None = None, **options: Unpack[SourceOptions]) -> None:
    """Write a stream without what was superseded by appends; with ``recover``, what is left of one.

    ``target`` is the source's path by default. Equivalent to :func:`concat` of one stream.
    """
    concat([source], _in_place(source) if target is None else target, **options)


def cut(
    source: Source,
    target: File,
    *,
    tokens: slice | None = None,
    positions: slice | None = None,
    token_digest: bytes | None = None,
    **options: Unpack[SourceOptions],
) -> None:
    """Keep a range of tokens, by ordinals or by positions.

    Equivalent to :func:`concat` of one piece.
    """
    concat([Piece(source, tokens, positions)], target, token_digest=token_digest, **options)


def truncate(
    source: Source,
    tokens: int,
    target: File | None = None,
    *,
    token_digest: bytes | None = None,
    **options: Unpack[SourceOptions],
) -> None:
    """Keep the first ``tokens`` tokens, of a path in place if no ``target`` is given."""
    if tokens < 0:
        raise ValueError(f"tokens to keep must be at least 0, found {tokens}")
    target = _in_place(source) if target is None else target
    cut(source, target, tokens=slice(None, tokens), token_digest=token_digest, **options)


def _in_place(source: Source) -> str | os.PathLike[str]:
    if isinstance(source, str | os.PathLike):
        return source
    raise TypeError(f"give a target: only a path can be rewritten, found {type(source).__name__}")


def split_layers(
    source: Source, target: File, layers: slice, **options: Unpack[SourceOptions]
) -> None:
    """Keep some layers of a stream, without decoding; :func:`merge_layers` undoes it.

    Parameters
    ----------
    source, target, options
        As in :func:`concat`.
    layers
        Which layers to keep, by the model's numbers. They must be whole groups
        (``Calibrator(layer_groups=…)``). Errors of the blocks are not known then.

    Raises
    ------
    UnsupportedError
        Some of the layers are coded together with others.
    """
    _write([source], target, layers, None, options)


def merge_layers(sources: Sequence[Source], target: File, **options: Unpack[SourceOptions]) -> None:
    """Put layers of a stream together again that :func:`split_layers` took apart.

    Parameters
    ----------
    sources
        Streams of the same tokens, with different layers of the same sections.
    target, options
        As in :func:`concat`. What is neither blocks nor layers is the first stream's.

    Raises
    ------
    FormatError
        A source is damaged.
    UnsupportedError
        The streams do not go together: tokens, blocks or steps are others.
    """
    if not sources:
        raise ValueError("give at least one stream to join")
    with ExitStack() as cleanup:
        files = [cleanup.enter_context(open_source(source)) for source in sources]
        _check_apart(files, target)
        streams = [StreamFile(file, **options) for file in files]
        headers = [stream.header for stream in streams]
        for header in headers[1:]:
            _check_alike(headers[0], header, Union.MADE)
        union = Union(headers)
        writer = StreamWriter(union.header, options.get("key", b""))
        out = cleanup.enter_context(_opened(target))
        write_all(out, writer.start())
        for data in streams[0].user_records():
            write_all(out, writer.user(data))
        counts = [len(stream.index) for stream in streams]
        if len(set(counts)) > 1:
            raise UnsupportedError(
                f"the streams have {', '.join(map(str, counts))} blocks: only layers of one "
                "stream can be joined"
            )
        for blocks in zip(*(s.read_blocks(s.index) for s in streams), strict=True):
            write_all(out, writer.block(union.block(blocks)))
        write_all(out, writer.finish())


def _check_apart(files: Sequence[BinaryIO], target: File) -> None:
    """Refuse a file object that would be written while it is read."""
    if not isinstance(target, str | os.PathLike) and any(_same_file(x, target) for x in files):
        raise ValueError(
            "the target is one of the sources, and would be written while it is read: give its "
            "path, which is replaced at the end, or another file object"
        )


def _same_file(a: BinaryIO, b: BinaryIO) -> bool:
    try:
        return a is b or os.path.sameopenfile(a.fileno(), b.fileno())
    except (AttributeError, OSError):  # what is in memory has no number
        return False


def _opened(target: File) -> AbstractContextManager[BinaryIO]:
    if isinstance(target, str | os.PathLike):
        return atomic_write(target)
    return nullcontext(target)


def differences(first: StreamHeader, other: StreamHeader, free: Sequence[str] = ()) -> list[str]:
    """Fields that keep blocks of one stream out of another."""
    return [
        f.name
        for f in fields(first)
        if f.name not in (*_OWN, *free) and getattr(first, f.name) != getattr(other, f.name)
    ]


def _check_alike(first: StreamHeader, other: StreamHeader, free: Sequence[str] = ()) -> None:
    if different := differences(first, other, free):
        raise UnsupportedError(
            f"streams to join differ in {', '.join(different)}: decode one, and encode it with "
            "the codec of the other"
        )


def _span(stream: StreamFile, piece: Piece) -> slice | None:
    """The ordinals or positions to keep, whichever the piece is about; everything if ``None``."""
    if piece.positions is not None:
        if piece.tokens is not None:
            raise ValueError("give tokens or positions, not both")
        kept = _checked(piece.positions, 2**63)
        first = min(piece.positions.start or 0, piece.positions.stop or 0)
        if first < 0:
            raise ValueError(
                f"positions to keep must be from 0, found {first}: they do not count from the end, "
                "as tokens do"
            )
        return kept
    if piece.tokens is None:
        return None
    counts = [0] * len(stream.header.geometry.sections)
    for entry in stream.index:
        counts[entry.section] = entry.start + entry.tokens
    if len(set(counts)) > 1:
        raise UnsupportedError(
            f"sections have {', '.join(map(str, counts))} tokens: say which to keep by positions, "
            "which mean the same in all of them"
        )
    first = min((entry.first_position for entry in stream.index), default=0)
    if first and piece.tokens.stop is not None and piece.tokens.stop > counts[0]:
        last = max(entry.last_position for entry in stream.index)
        raise UnsupportedError(
            f"tokens up to {piece.tokens.stop} are asked for, the stream holds {counts[0]}, at "
            f"positions {first} to {last}, as a sliding window leaves them: say which to keep by "
            "positions"
        )
    return _checked(piece.tokens, counts[0])


def _checked(chosen: slice, count: int) -> slice:
    if not isinstance(chosen, slice):
        raise TypeError(f"what to keep must be a slice, found {type(chosen).__name__}")
    start, stop, step = chosen.indices(count)
    if step != 1:
        raise ValueError(f"what to keep must be a slice of step 1, found step {step}")
    return slice(start, max(start, stop))


def _blocks(stream: StreamFile, piece: Piece, span: slice | None) -> Iterator[Block]:
    """The blocks of a piece, those at its ends cut."""
    wanted = []
    for entry in stream.index:
        numbers: Sequence[int] = range(entry.start, entry.start + entry.tokens)
        if piece.positions is not None:
            numbers = range(entry.first_position, entry.last_position + 1)
        if span is not None and (numbers[-1] < span.start or numbers[0] >= span.stop):
            continue
        wanted.append(entry)
    for block in stream.read_blocks(wanted):
        if span is not None:
            numbers = range(block.start, block.start + len(block.kept))
            if piece.positions is not None:
                numbers = block.positions[block.kept.start : block.kept.stop]
            first, last = bisect_left(numbers, span.start), bisect_left(numbers, span.stop)
            if first == last:
                continue  # the span lies in a gap
            front, end = block.cut
            block = replace(block, cut=(front + first, end + len(numbers) - last))
        yield block
