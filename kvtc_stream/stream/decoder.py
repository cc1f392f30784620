"""The streaming decoder."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import Backend, SectionCoder
from kvtc_stream.backends.select import get_backend
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.parts import CalibratedBases
from kvtc_stream.errors import (
    CalibrationMismatchError,
    FormatError,
    KVTCError,
    StateError,
    UnsupportedError,
)
from kvtc_stream.formats import (
    Block,
    BlockErrors,
    Geometry,
    Limits,
    Plan,
    Role,
    Section,
    StreamHeader,
    StreamParser,
)
from kvtc_stream.io.dlpack import (
    BackendName,
    KVArray,
    as_kv_array,
    check_apart,
    check_memory,
    check_writable,
)
from kvtc_stream.stream.codec import expect_calibration


@dataclass(frozen=True, eq=False)
class KVBlock:
    """Consecutive tokens of one section.

    Attributes
    ----------
    section
        Index of the section in the stream's geometry.
    role
        How the tokens were stored: ``DATA`` (coded), ``SINKS`` or ``TAIL`` (verbatim).
    start
        Ordinal of the first token in the section.
    positions
        int64 [tokens].
    k, v
        [layers, kv_heads, tokens, head_dim] in the stream's ``out_dtype``: numpy arrays that
        export DLPack in every dtype.
    errors
        What the encoder measured on this block, with tokens that were cut from it since.
    """

    section: int
    role: Role
    start: int
    positions: NDArray[np.int64]
    k: KVArray
    v: KVArray
    errors: BlockErrors

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.positions)


def check_calibration(header: StreamHeader, calibration: Calibration) -> CalibratedBases:
    """The bases of the stream's layers; ``CalibrationMismatchError`` if they are another's."""
    if header.calibration != calibration.digest:
        raise CalibrationMismatchError(
            f"the stream was written with calibration {header.calibration.hex()} (model "
            f"{header.model.name or 'unnamed'!r}), found {calibration.digest.hex()} (model "
            f"{calibration.model.name or 'unnamed'!r}): open it with the calibration it names"
        )
    made = header.geometry, header.plan
    # Headers of one kind share both. They are kept, so that nothing else gets their numbers.
    kept: tuple[bool, CalibratedBases, Any] = calibration.memo(
        ("checked", *map(id, made)), lambda: (*_bases_of(calibration, *made), made)
    )
    same, bases, _ = kept
    for name, found, expected in zip(
        ("layers, heads and channels", "model fingerprint"),
        (same or _shapes(header.geometry), header.model.fingerprint),
        (same or _shapes(bases.geometry), bases.model.fingerprint),
        strict=True,
    ):
        if found != expected:
            raise FormatError(
                f"the stream has {name} {found!r}, the calibration that it names has {expected!r}: "
                "the writer is at fault"
            )
    return bases


def _bases_of(
    calibration: Calibration, geometry: Geometry, plan: Plan
) -> tuple[bool, CalibratedBases]:
    """Whether the geometry is that of the bases of a stream's layers, and these."""
    bases = calibration.for_stream(geometry, plan)
    return geometry == bases.geometry, bases


def _shapes(geometry: Geometry) -> list[Section]:
    """Sections without RoPE, which may be the stream's own."""
    return [replace(section, rope=()) for section in geometry.sections]


class BlockDecoder:
    """Blocks of one stream to tokens, once the calibration is known to be the right one.

    Raises ``CalibrationMismatchError`` if it is not. Used by one thread at a time.
    """

    def __init__(
        self, header: StreamHeader, calibration: Calibration, backend: BackendName
    ) -> None:
        expect_calibration(calibration)
        self._header, self._calibration = header, check_calibration(header, calibration)
        self._backend = get_backend(backend)
        self._coders: dict[int, SectionCoder] = {}
        self._idle: defaultdict[int, list[SectionCoder]] = defaultdict(list)

    @property
    def header(self) -> StreamHeader:
        """The stream's header."""
        return self._header

    def coder(self, section: int) -> SectionCoder:
        """That of a section."""
        if section not in self._coders:
            self._coders[section] = self._coder(section)
        return self._coders[section]

    @contextmanager
    def lent(self, section: int) -> Iterator[SectionCoder]:
        """A coder of a section, for one of several tasks under way. They keep buffers, so there are
        as few as work at a time."""
        idle = self._idle[section]
        coder = idle.pop() if idle else self._coder(section)
        yield coder
        idle.append(coder)

    def _coder(self, section: int) -> SectionCoder:
        return self._backend.section_coder(self._header, section, self._calibration)

    @property
    def backend(self) -> Backend:
        """What the coders run on."""
        return self._backend

    def room(self, size: int) -> memoryview:
        """Host memory that the backend reads quickly."""
        return self._backend.room(size)

    def empty(self, section: int, layers: int, tokens: int) -> tuple[Any, Any]:
        """The backend's arrays for K and V of so many layers and tokens."""
        s, dtype = self._header.geometry.sections[section], self._header.out_dtype
        return (
            self._backend.empty((layers, *s.k_shape(tokens)[1:]), dtype),
            self._backend.empty((layers, *s.v_shape(tokens)[1:]), dtype),
        )

    def buffers(self, section: int, layers: int, tokens: int, out: tuple[Any, Any]) -> Any:
        """Validate the caller's output tensors; return views of K and V, per layer
        [kv_heads, tokens, head_dim]."""
        if not isinstance(out, list | tuple) or len(out) != 2:
            raise TypeError(f"out must be a pair, K and V, found {type(out).__name__}")
        s, dtype = self._header.geometry.sections[section], self._header.out_dtype
        found = []
        for tensors, name, dim in zip(out, ("out K", "out V"), (s.k_dim, s.v_dim), strict=True):
            for tensor in tensors if isinstance(tensors, list | tuple) else [tensors]:
                check_memory(tensor, name, self._backend.name)
            arrays, own = self._backend.layer_list(tensors, name, layers, s.kv_heads, dim)
            check_writable(arrays, name, own, dtype)
            if arrays[0].shape[1] != tokens:
                raise ValueError(
                    f"{name} has room for {arrays[0].shape[1]} tokens, found {tokens} to decode"
                )
            found.append(arrays)
        check_apart([*found[0], *found[1]], "out")
        return found

    def output(self, x: Any) -> Any:
        """What users get of such an array."""
        return self._backend.output(x, self._header.out_dtype)

    def decode(self, block: Block, layers: Sequence[int] | None = None) -> KVBlock:
        """One block, all layers or some (indices into the section's)."""
        if layers is None:
            layers = range(len(self._header.geometry.sections[block.section].layers))
        k, v = self.coder(block.section).decode(block, layers)
        positions = np.array(block.positions, np.int64)
        if block.cut != (0, 0):
            kept = slice(block.kept.start, block.kept.stop)
            k, v = (as_kv_array(x[:, :, kept]) for x in (k, v))
            positions = positions[kept]
        return KVBlock(block.section, block.role, block.start, positions, k, v, block.errors)


class Decoder:
    """Takes the bytes of a stream in pieces and gives back blocks of tokens.

    Single use, one thread at a time. Memory is bounded by one record. The plan is in the
    stream: a decoder needs the calibration only.

    Examples
    --------
    >>> import kvtc_stream as kvtc
    >>> calibration = kvtc.testing.tiny_calibration()
    >>> k, v = kvtc.testing.drawn_cache(calibration.geometry, tokens=300)
    >>> data = kvtc.encode(k, v, codec=kvtc.Codec(calibration, ratio=8, window=32))
    >>> decoder = kvtc.Decoder(calibration)
    >>> blocks = decoder.decode(data[:5000]) + decoder.decode(data[5000:])
    >>> sum(block.tokens for block in blocks), decoder.eof
    (300, True)
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        backend: BackendName = "auto",
        limits: Limits | None = None,
    ) -> None:
        expect_calibration(calibration)
        self._calibration, self._backend = calibration, backend
        self._parser = StreamParser(limits or Limits())
        self._blocks: BlockDecoder | None = None
        self._header: StreamHeader | None = None
        self._tail_given = False
        self._failure: KVTCError | None = None
        self._lock = threading.Lock()

    @property
    def header(self) -> StreamHeader | None:
        """The stream's header, once it has arrived."""
        return self._header

    @property
    def eof(self) -> bool:
        """Whether the whole stream has arrived."""
        return self._parser.eof

    @property
    def unused_data(self) -> bytes:
        """Bytes after the end of the stream."""
        return self._parser.unused_data

    def decode(self, data: bytes | bytearray | memoryview) -> list[KVBlock]:
        """Take some bytes; return the blocks they completed, in token order.

        Raises
        ------
        FormatError
            The bytes are not a valid stream, see its subclasses. The decoder stays failed; whole
            blocks that came with the damage are not returned.
        CalibrationMismatchError
            The stream was written with another calibration.
        UnsupportedError
            The stream goes on after an end whose tail was given out: it was appended to.
        StateError
            After an error, or while another thread decodes.
        """
        if not self._lock.acquire(blocking=False):
            raise StateError("another thread is using this decoder")
        try:
            if self._failure is not None:
                raise StateError(f"the decoder failed before: {self._failure}")
            items = self._parser.feed(data)
            if self._parser.error is not None:
                raise self._parser.error
            return [block for item in items if (block := self._take(item))]
        except KVTCError as error:
            self._failure = self._failure or error
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """Declare the end of the input: ``TruncatedError`` unless the stream is whole."""
        self._parser.close()

    def _take(self, item: StreamHeader | Block) -> KVBlock | None:
        if isinstance(item, StreamHeader):
            if self._tail_given:
                raise UnsupportedError(
                    "the stream was appended to, and what follows supersedes tokens that were "
                    "given out: open the file or pipe with kvtc_stream.open, or rewrite it first "
                    "with `kvtc cat FILE -o OUT`"
                )
            self._header = item
            self._blocks = BlockDecoder(item, self._calibration, self._backend)
            return None
        assert self._blocks is not None
        self._tail_given |= item.role is Role.TAIL
        return self._blocks.decode(item)
