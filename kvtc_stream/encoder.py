"""The streaming encoder."""

from __future__ import annotations

import contextlib
import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, starmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backend import Backend, get_backend
from kvtc_stream.codec import Codec
from kvtc_stream.control import Controls, SectionControl
from kvtc_stream.cpu.values import (
    scale_grid,
    stored_positions,
    verbatim_tokens,
)
from kvtc_stream.decoder import check_calibration
from kvtc_stream.errors import KVTCWarning, StateError
from kvtc_stream.formats import (
    Block,
    BlockErrors,
    Coder,
    DType,
    Geometry,
    IndexEntry,
    Role,
    Rope,
    SectionScales,
    StreamFile,
    StreamHeader,
    StreamWriter,
)
from kvtc_stream.formats.coders import compress_beside
from kvtc_stream.formats.wire import located
from kvtc_stream.interop import check_positions
from kvtc_stream.memory import joined
from kvtc_stream.statistics import StreamStatistics
from kvtc_stream.threads import in_turn

#: A finished stream whose ratio is below this has gained little: worth a warning.
_POOR_RATIO = 2.0
#: Bytes of values of a verbatim block, if a token has not more.
_VERBATIM_BYTES = 4 << 20
#: Verbatim blocks whose values are fetched together.
_PIECES = 16
#: Blocks whose records are made together.
_BLOCKS_AT_A_TIME = 64


class Encoder:
    """Takes a cache in chunks, in token order, and gives back the bytes of a stream.

    Single use, one thread at a time; memory is bounded by twice ``window`` and a few blocks of
    tokens, whatever the length. The bytes do not depend on how the input is cut. Make one with
    :meth:`kvtc_stream.Codec.encoder`.

    Parameters
    ----------
    codec
        How to code.
    rope
        The rotary tables of this cache's keys where they differ from the calibration's (dynamic
        scaling, or keys captured at another stage): one for all layers, or one entry a layer,
        over all sections. An empty sequence: keys come before RoPE.
    k_scale, v_scale
        For fp8 caches: float32, a scalar or [layers] or [layers, kv_heads] (for several sections,
        a list of these): value = fp8 × scale.
    metadata
        Anything JSON can hold, kept in the header.
    token_digest
        SHA-256 of the token ids, checked by whoever restores the cache.
    continues
        A whole stream, or what was recovered of one, to write the continuation of: the bytes are
        to follow it. The blocks are those of one uninterrupted run with the same codec. RoPE and
        scales must be those of the stream, if they are given, and there is no ``metadata``;
        ``token_digest`` is then that of all tokens.
    key
        A secret: who has it can tell that the stream was written by somebody who has it.

    Examples
    --------
    >>> import kvtc_stream as kvtc
    >>> calibration = kvtc.testing.tiny_calibration()
    >>> k, v = kvtc.testing.drawn_cache(calibration.geometry, tokens=300)
    >>> encoder = kvtc.Codec(calibration, ratio=8, window=32).encoder()
    >>> data = encoder.encode(k[:, :, :200], v[:, :, :200])
    >>> data += encoder.encode(k[:, :, 200:], v[:, :, 200:])
    >>> data += encoder.finish()
    >>> kvtc.decode(data, calibration)[0].shape
    (2, 2, 300, 8)
    """

    def __init__(
        self,
        codec: Codec,
        *,
        rope: Sequence[Rope | None] | Rope | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        metadata: Mapping[str, Any] | None = None,
        token_digest: bytes = b"",
        continues: StreamFile | None = None,
        key: bytes = b"",
    ) -> None:
        self._codec, self._key = codec, key
        self._geometry = _with_rope(codec.calibration.geometry, rope)
        self._scales = _scales(self._geometry, k_scale, v_scale)
        self._metadata = json.dumps(dict(metadata or {}), separators=(",", ":"), allow_nan=False)
        self._token_digest = token_digest
        self._backend = get_backend(codec.backend)
        self._lock = threading.Lock()
        self._state = "open"
        self._writer: StreamWriter | None = None
        self._sections: list[_SectionState] = []
        self._statistics = StreamStatistics()
        self._opening = b""
        if continues is not None:
            if metadata is not None:
                raise TypeError("metadata is in the stream already")
            if rope is not None and self._geometry != continues.header.geometry:
                raise ValueError("the stream has another RoPE: continue it with the one it has")
            if self._scales and self._scales != continues.header.scales:
                raise ValueError(
                    "the stream has other k_scale and v_scale: scale the cache with those"
                )
            self._continue(continues)

    @property
    def statistics(self) -> StreamStatistics:
        """Sizes, ratios and errors so far."""
        return self._statistics

    def encode(self, k: Any, v: Any, *, positions: Any = None, section: int = 0) -> bytes:
        """Take a chunk; return the bytes that became ready, possibly none.

        Parameters
        ----------
        k, v
            [layers, kv_heads, tokens, head_dim], the same with a batch of 1 after layers, or a
            list with a tensor [kv_heads, tokens, head_dim] or [1, kv_heads, tokens, head_dim] per
            layer; float32, float16, bfloat16 or fp8, from anything that speaks DLPack.
        positions
            int64 [tokens], rising; by default they go on from the chunk before.
        section
            Which section of the geometry the layers belong to.

        Raises
        ------
        TypeError, ValueError, BufferError
            Wrong dtype, shape, order of tokens, device. The encoder is as it was: go on.
        StateError
            After ``finish``, after a failure, or while another thread encodes.
        """
        return joined(self.encode_pieces(k, v, positions=positions, section=section))

    def finish(self) -> bytes:
        """Code what is pending, and end the stream; return its last bytes."""
        return joined(self.finish_pieces())

    def encode_pieces(
        self, k: Any, v: Any, *, positions: Any = None, section: int = 0
    ) -> list[bytes | memoryview]:
        """As :meth:`encode`, the bytes in pieces: for who joins or writes them anyway."""
        with self._exclusive("encode"):
            dtype, chunk = self._check(k, v, positions, section)
            start = self._start(dtype)
            with self._failing():
                return [*start, *self._records(self._sections[section].take(*chunk))]

    def finish_pieces(self) -> list[bytes | memoryview]:
        """As :meth:`finish`, the bytes in pieces."""
        with self._exclusive("finish"), self._failing():
            # A stream without a chunk has no element type of its own.
            out = self._start(DType.FLOAT8_E4M3FN if self._scales else DType.BFLOAT16)
            for state in self._sections:
                out += self._records(state.last_blocks())
            assert self._writer is not None
            if self._controls is not None:
                out.append(self._writer.encoder(self._controls.state()))
                self._statistics.other_bytes += len(out[-1])
            out.append(self._writer.finish())
            self._statistics.index_bytes = len(out[-1])
            self._state = "finished"
        self._warn()
        return out

    def _warn(self) -> None:
        s = self._statistics
        for surprise in s.surprises(self._codec.plan):
            warnings.warn(surprise, KVTCWarning, stacklevel=3)
        if 0 < s.ratio < _POOR_RATIO:
            verbatim = s.tokens - s.coded_tokens
            warnings.warn(
                f"the stream is only {s.ratio:.2f} times smaller than the cache: {verbatim} of "
                f"{s.tokens} tokens are verbatim (sinks {self._codec.sinks}, window "
                f"{self._codec.window}, tokens beyond max_error); the context is too short to "
                f"gain, or unlike the calibration",
                KVTCWarning,
                stacklevel=3,
            )

    @contextlib.contextmanager
    def _exclusive(self, action: str) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise StateError(f"cannot {action}: another thread is using this encoder")
        try:
            if self._state != "open":
                raise StateError(f"cannot {action}: the encoder is {self._state}; make a new one")
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A failure past the checks may have lost tokens: nothing may follow it."""
        try:
            yield
        except BaseException:
            self._state = "failed by an earlier exception"
            raise

    def _check(self, k: Any, v: Any, positions: Any, index: int) -> tuple[DType, _Chunk]:
        sections = self._geometry.sections
        if not 0 <= index < len(sections):
            raise ValueError(f"section must be from 0 to {len(sections) - 1}, found {index}")
        section = sections[index]
        layers = len(section.layers)
        if not self._sections:
            self._backend = get_backend(self._codec.backend, k, v)
        arrays = self._backend.layer_list
        k_layers, k_dtype = arrays(k, "k", layers, section.kv_heads, section.k_dim)
        v_layers, v_dtype = arrays(v, "v", layers, section.kv_heads, section.v_dim)
        expected = self._sections[index].dtype if self._sections else k_dtype
        for name, dtype in (("k", k_dtype), ("v", v_dtype)):
            if dtype != expected:
                raise TypeError(
                    f"{name} is {dtype.label}, expected {expected.label} as the "
                    f"{'stream so far' if self._sections else 'k beside it'}: cast it"
                )
        if self._scales and not k_dtype.is_fp8:
            raise TypeError(f"k_scale and v_scale are for fp8 caches, found {k_dtype.label}")
        tokens = k_layers[0].shape[1]
        if v_layers[0].shape[1] != tokens:
            raise ValueError(f"k has {tokens} tokens, v has {v_layers[0].shape[1]}")
        last = self._sections[index].last_position if self._sections else -1
        return k_dtype, (k_layers, v_layers, check_positions(positions, tokens, last))

    def _start(self, dtype: DType) -> list[bytes | memoryview]:
        """The header, once the element type is known."""
        if self._sections:
            opening, self._opening = self._opening, b""
            return [opening]
        header = replace(
            _header(self._codec, dtype, self._geometry, self._scales),
            token_digest=self._token_digest,
            metadata=self._metadata,
        )
        self._writer = StreamWriter(header, self._key)
        self._open_sections(header, None)
        start = self._writer.start()
        self._statistics.header_bytes = len(start)
        return [start]

    def _open_sections(self, header: StreamHeader, states: Sequence[Any] | None) -> None:
        self._controls = None if self._codec.target is None else _Controls(self._codec, states)
        self._sections = [
            _SectionState(header, i, self._codec, self._backend, self._controls)
            for i in range(len(header.geometry.sections))
        ]

    def _continue(self, stream: StreamFile) -> None:
        """Be where the encoder that wrote ``stream`` was before it wrote the tail."""
        header, codec = stream.header, self._codec
        check_calibration(header, codec.calibration)
        assert codec.coder is not None
        for name, found, expected in (
            ("plan", header.plan, codec.plan),
            ("sinks", header.sinks, codec.sinks),
            ("window", header.window, codec.window),
            ("block_tokens", header.block_tokens, codec.block_tokens),
            ("coder", header.coder.name.lower(), codec.coder),
            ("out_dtype", header.out_dtype.label, codec.out_dtype or header.out_dtype.label),
        ):
            if found != expected:
                shown = "another" if name == "plan" else f"{found!r}, not {expected!r},"
                raise ValueError(
                    f"the stream was written with {shown} {name}: continue it with the codec that "
                    "it was written with"
                )
        self._geometry, self._scales = header.geometry, header.scales
        self._statistics = StreamStatistics.of(stream, superseded=True)
        self._writer = stream.continued(self._token_digest)
        self._open_sections(header, _control_states(stream, codec))
        for entry in stream.index:
            state = self._sections[entry.section]
            if entry.role is Role.TAIL:
                k, v, positions = verbatim_tokens(stream.read_block(entry), header)
                own = [list(map(self._backend.array, x)) for x in (k, v)]
                state.hold(own[0], own[1], positions)
            else:
                state.coded_before(entry)
        self._opening = self._writer.start()
        self._statistics.other_bytes = (
            stream.end + len(self._opening) - self._statistics.stream_bytes_of_blocks
        )

    def _records(self, blocks: Iterator[Block]) -> list[bytes | memoryview]:
        """Pieces of the records of blocks."""
        assert self._writer is not None
        pieces: list[bytes | memoryview] = []
        while some := list(islice(blocks, _BLOCKS_AT_A_TIME)):
            for block, record in zip(some, self._writer.blocks(some), strict=True):
                pieces += record
                section = self._geometry.sections[block.section]
                values = (section.k_width + section.v_width) * block.tokens
                cache_bytes = values * self._sections[block.section].dtype.itemsize
                self._statistics.add_block(block, sum(map(len, record)), cache_bytes)
        return pieces


#: K and V per layer [kv_heads, tokens, head_dim], and positions.
_Chunk = tuple[list[Any], list[Any], NDArray[np.int64]]


class _SectionState:
    """One section's pending tokens, and the blocks they become.

    Leading tokens at sink positions leave verbatim as soon as they are complete. A block leaves
    when as many tokens as the window follow it; what is left at the end is the verbatim tail.
    Each rule looks at tokens alone, so the way the input is cut does not show.
    """

    def __init__(
        self,
        header: StreamHeader,
        index: int,
        codec: Codec,
        backend: Backend,
        controls: Controls | None,
    ) -> None:
        section = header.geometry.sections[index]
        self.dtype = header.dtype
        self.last_position = -1
        self._only_sinks = True
        self._header, self._index, self._backend = header, index, backend
        self._coder = backend.section_coder(
            header,
            index,
            codec.calibration,
            max_error=codec.max_error,
            measure=codec.measure,
            target=controls,
        )
        self._section = section
        self._allocate(min(4, header.window // header.block_tokens + 2) * header.block_tokens)
        self._begin = self._end = 0
        self._coded = 0

    def take(
        self, k_layers: list[Any], v_layers: list[Any], positions: NDArray[np.int64]
    ) -> Iterator[Block]:
        """Take some tokens; yield the blocks that no later token can change."""
        taken, total = 0, len(positions)
        straight = total >= self._header.block_tokens and self._coder.reads(k_layers, v_layers)
        while taken < total:
            if straight and (count := self._at_once(positions[taken:])):
                span = slice(taken, taken + count)
                k, v = ([x[:, span] for x in layers] for layers in (k_layers, v_layers))
                start, self._coded = self._coded, self._coded + count
                self.last_position = int(positions[span.stop - 1])
                taken += count
                yield from self._coder.encode(k, v, positions[span], start)
                continue
            most = self._until_then(positions[taken:]) if straight else total
            taken += self._append(k_layers, v_layers, positions, taken, most)
            yield from self.ready_blocks(total - taken)

    def hold(self, k_layers: list[Any], v_layers: list[Any], positions: NDArray[np.int64]) -> None:
        """Take some tokens that become no block yet."""
        taken = 0
        while taken < len(positions):
            taken += self._append(k_layers, v_layers, positions, taken, len(positions))

    def _at_once(self, positions: NDArray[np.int64]) -> int:
        """How many of the tokens that come can be coded where they are: whole blocks."""
        if self._end > self._begin or (self._only_sinks and positions[0] < self._header.sinks):
            return 0
        size = self._header.block_tokens
        return max((len(positions) - self._header.window) // size, 0) * size

    def _until_then(self, positions: NDArray[np.int64]) -> int:
        """How many tokens to copy until others can be coded where they are."""
        size, pending = self._header.block_tokens, self._end - self._begin
        if self._only_sinks and (sinks := int(np.searchsorted(positions, self._header.sinks))):
            return sinks
        short = -pending % size
        if len(positions) - short >= self._header.window + size:
            return short
        return len(positions)

    def _append(
        self,
        k_layers: list[Any],
        v_layers: list[Any],
        positions: NDArray[np.int64],
        first: int,
        most: int,
    ) -> int:
        """Copy up to ``most`` tokens from ``first`` on, as many as fit; return how many."""
        if most and self._end == len(self._positions):
            self._make_room()
        count = min(len(self._positions) - self._end, len(positions) - first, most)
        source, target = slice(first, first + count), slice(self._end, self._end + count)
        for layer, (k, v) in enumerate(zip(k_layers, v_layers, strict=True)):
            self._k[layer, :, target] = k[:, source]
            self._v[layer, :, target] = v[:, source]
        self._positions[target] = positions[source]
        self._end += count
        self.last_position = int(self._positions[self._end - 1])
        return count

    def coded_before(self, entry: IndexEntry) -> None:
        """Count a block that another encoder wrote."""
        self._coded = entry.start + entry.tokens
        self.last_position = entry.last_position
        self._only_sinks &= entry.role is Role.SINKS

    def _make_room(self) -> None:
        """Move pending tokens to the front, of larger buffers if a block cannot fit behind them.

        Large windows may never fill, so buffers grow with what is pending; twice that at most.
        """
        pending, count = slice(self._begin, self._end), self._end - self._begin
        k, v, positions = self._k, self._v, self._positions
        if count + self._header.block_tokens > len(positions):
            self._allocate(2 * len(positions))
        self._k[:, :, :count] = k[:, :, pending].copy()
        self._v[:, :, :count] = v[:, :, pending].copy()
        self._positions[:count] = positions[pending].copy()
        self._begin, self._end = 0, count

    def _allocate(self, tokens: int) -> None:
        self._k = self._backend.empty(self._section.k_shape(tokens), self.dtype)
        self._v = self._backend.empty(self._section.v_shape(tokens), self.dtype)
        self._positions = np.empty(tokens, np.int64)

    def ready_blocks(self, following: int = 0) -> Iterator[Block]:
        """Blocks that no later token can change, when so many are known to follow."""
        size = self._header.block_tokens
        yield from self._sinks(complete=self.last_position >= self._header.sinks - 1)
        pending = self._end - self._begin
        whole = min(pending, pending + following - self._header.window) // size
        if whole > 0:
            yield from self._data(whole * size)

    def last_blocks(self) -> Iterator[Block]:
        """Everything that is pending, at the end of the stream."""
        yield from self._sinks(complete=True)
        yield from self.ready_blocks()
        if self._header.window:
            yield from self._verbatim(Role.TAIL, self._end - self._begin)
        while self._end > self._begin:
            yield from self._data(min(self._end - self._begin, self._header.block_tokens))

    def _leading_sinks(self) -> int:
        if not self._only_sinks:  # joined streams may have coded such positions already
            return 0
        pending = self._positions[self._begin : self._end]
        return int(np.searchsorted(pending, self._header.sinks))

    def _sinks(self, *, complete: bool) -> Iterator[Block]:
        size = self._header.block_tokens
        while (sinks := self._leading_sinks()) >= (1 if complete else size):
            yield from self._verbatim(Role.SINKS, min(sinks, size))

    def _pop(self, tokens: int) -> tuple[Any, Any, NDArray[np.int64], int]:
        span = slice(self._begin, self._begin + tokens)
        start = self._coded
        self._begin += tokens
        self._coded += tokens
        return self._k[:, :, span], self._v[:, :, span], self._positions[span], start

    def _data(self, tokens: int) -> list[Block]:
        return self._coder.encode(*self._pop(tokens))

    def _verbatim(self, role: Role, tokens: int) -> Iterator[Block]:
        """Blocks of moderate size, which are compressed, and restored, on several threads."""
        per_token = self._header.verbatim_size(self._index, 1)
        most = max(1, min(self._header.block_tokens, _VERBATIM_BYTES // per_token))

        def pieces() -> Iterator[tuple[list[memoryview], NDArray[np.int64], int]]:
            counts = iter([min(most, tokens - first) for first in range(0, tokens, most)])
            while some := [self._pop(count) for count in islice(counts, _PIECES)]:
                planes = self._backend.planes([(k, v) for k, v, _, _ in some])
                for own, (_, _, positions, start) in zip(planes, some, strict=True):
                    yield own, positions, start

        block = partial(verbatim_block, self._header, self._index, role)
        return (in_turn if tokens > most else starmap)(block, pieces())


def verbatim_block(
    header: StreamHeader,
    section: int,
    role: Role,
    planes: Sequence[memoryview],
    positions: NDArray[np.int64],
    start: int,
) -> Block:
    """A block that holds tokens bit for bit; see :meth:`kvtc_stream.backend.Backend.planes`."""
    coder, verbatim = compress_beside(header.coder, *planes)
    return Block(
        section=section,
        role=role,
        start=start,
        tokens=len(positions),
        positions=stored_positions(positions),
        verbatim_tokens=tuple(range(len(positions))),
        coder=Coder.STORED,
        coded=b"",
        coded_size=0,
        verbatim_coder=coder,
        verbatim=verbatim,
        errors=BlockErrors(),
    )


def page_header(
    codec: Codec,
    dtype: DType,
    rope: Sequence[Rope | None] | Rope | None,
    k_scale: Any,
    v_scale: Any,
) -> StreamHeader:
    """The header that pages belong under; arguments as those of :class:`Encoder`."""
    geometry = _with_rope(codec.calibration.geometry, rope)
    header = _header(codec, dtype, geometry, _scales(geometry, k_scale, v_scale))
    return replace(header, sinks=0, window=0)


def _header(
    codec: Codec, dtype: DType, geometry: Geometry, scales: tuple[SectionScales, ...]
) -> StreamHeader:
    if scales and not dtype.is_fp8:
        raise TypeError(f"k_scale and v_scale are for fp8 caches, found {dtype.label}")
    if dtype.is_fp8 and not scales:
        scales = _scales(geometry, 1.0, 1.0)
    out_dtype = DType.BFLOAT16 if dtype.is_fp8 else dtype
    if codec.out_dtype is not None:
        out_dtype = DType[codec.out_dtype.upper()]
    if out_dtype.is_fp8 and not scales:
        raise TypeError(f"out_dtype={out_dtype.label} needs fp8 input, found {dtype.label}")
    assert codec.coder is not None
    return StreamHeader(
        geometry=geometry,
        dtype=dtype,
        out_dtype=out_dtype,
        scales=scales,
        sinks=codec.sinks,
        window=codec.window,
        block_tokens=codec.block_tokens,
        plan=codec.plan,
        coder=Coder[codec.coder.upper()],
        calibration=codec.calibration.digest,
        model=codec.calibration.model,
    )


class _Controls:
    """The rate controls of a stream's sections, to be saved for who continues it."""

    def __init__(self, codec: Codec, states: Sequence[Any] | None) -> None:
        assert codec.target is not None
        self._target, self._states = codec.target, states
        self._controls: list[SectionControl] = []

    def control(self, header: StreamHeader, section: int) -> SectionControl:
        """See :class:`kvtc_stream.control.Controls`; sections come in order."""
        control = self._target.control(header, section)
        if self._states is not None:
            with located("the stream's ENCODER record"):
                control.restore(self._states[section])
        self._controls.append(control)
        return control

    def state(self) -> bytes:
        """The payload of the ENCODER record."""
        control = [control.state() for control in self._controls]
        target = [self._target.name, self._target.value]
        return json.dumps({"target": target, "control": control}, separators=(",", ":")).encode()


def _control_states(stream: StreamFile, codec: Codec) -> Sequence[Any] | None:
    """Where the rate controls were, if the stream tells and the target is the same."""
    data = stream.encoder_state()
    if not data or codec.target is None:
        return None
    with located("the stream's ENCODER record"):
        try:
            state = json.loads(data)
            target, states = state["target"], state["control"]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"expected an object with target and control: {error!r}") from None
        if not isinstance(states, list) or len(states) != len(stream.header.geometry.sections):
            raise ValueError("expected a control for each section")
    return states if target == [codec.target.name, codec.target.value] else None


def _with_rope(geometry: Geometry, rope: Sequence[Rope | None] | Rope | None) -> Geometry:
    if rope is None:
        return geometry
    count = sum(len(s.layers) for s in geometry.sections)
    tables = (rope,) * count if isinstance(rope, Rope) else tuple(rope) or (None,) * count
    if len(tables) != count:
        raise ValueError(f"rope must have an entry for each of {count} layers, found {len(tables)}")
    remaining = iter(tables)
    return Geometry(
        tuple(
            replace(section, rope=tuple(next(remaining) for _ in section.layers))
            for section in geometry.sections
        )
    )


def _scales(geometry: Geometry, k_scale: Any, v_scale: Any) -> tuple[SectionScales, ...]:
    if k_scale is None and v_scale is None:
        return ()
    sections = geometry.sections

    def of(scale: Any, name: str, index: int) -> tuple[float, ...]:
        section = sections[index]
        value = scale[index] if isinstance(scale, list) and len(sections) > 1 else scale
        grid = scale_grid(value, name, len(section.layers), section.kv_heads)
        return tuple(grid.ravel().tolist())

    return tuple(
        SectionScales(of(k_scale, "k_scale", i), of(v_scale, "v_scale", i))
        for i in range(len(sections))
    )
