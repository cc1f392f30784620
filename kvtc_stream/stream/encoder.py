"""The streaming encoder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.select import get_backend
from kvtc_stream.coding.values import (
    scale_grid,
    verbatim_tokens,
)
from kvtc_stream.errors import StateError, UnsupportedError, warn
from kvtc_stream.formats import (
    Block,
    BlockRun,
    Coder,
    DType,
    Feature,
    Geometry,
    RecordType,
    Role,
    Rope,
    SectionScales,
    StreamFile,
    StreamHeader,
    StreamWriter,
)
from kvtc_stream.formats.wire import located
from kvtc_stream.io.dlpack import check_positions
from kvtc_stream.io.memory import LARGE, Joining, Piece, Room, joined
from kvtc_stream.io.sources import Source
from kvtc_stream.io.steps import Steps, begun, run
from kvtc_stream.planning.rate_control import SectionControl, Target
from kvtc_stream.stream.base import Base
from kvtc_stream.stream.codec import Codec, expect_codec
from kvtc_stream.stream.decoder import check_calibration
from kvtc_stream.stream.pending import Chunk, SectionState
from kvtc_stream.stream.statistics import StreamStatistics

_log = logging.getLogger(__name__)

#: A finished stream whose ratio is below this has gained little: worth a warning.
_POOR_RATIO = 2.0
#: The share of a ratio that a stream has with its sinks, its latest tokens and its end.
_NEARLY = 0.8
#: Records that mark an end of a stream.
_ENDS = (RecordType.ENCODER, RecordType.AUTH, RecordType.INDEX, RecordType.SUPERSEDE)
#: Part of verbatim values that their codes take, about; and by how much coded tokens may take more
#: than they should for memory that was set aside to hold them.
_EXACT, _MORE = 2 / 3, 1.1


class Encoder:
    """Takes a cache in chunks, in token order, and gives back the bytes of a stream.

    Single use, one thread at a time; memory is bounded by twice ``window`` and a few blocks of
    tokens, whatever the length. The bytes do not depend on how the input is cut.

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
        A whole stream, or what was recovered of one, to write the continuation of; the bytes
        belong at :attr:`begins_at`. The blocks are those of one uninterrupted run with the same
        codec. RoPE and scales must be those of the stream, if they are given, and there is no
        ``metadata``; ``token_digest`` is then that of all tokens.
    base
        An earlier stream of this cache (a path, memory, or a file object that can seek), which
        stays as it is. A cache that was restored from it, and has grown or forked since, is not
        coded again: blocks are taken over, in each section, as long as the tokens that come are
        bit for bit what they decode to, and the rest is coded. Blocks that end before the first
        token, which a sliding window left behind, are passed over. So what was lost once is all
        that is lost, however often a cache is stored and restored. A warning says why if nothing
        could be taken over. With a ``key`` the base must have been written with it too.
    key
        Shared secret of an HMAC: readers with the same key reject streams written without it.

    Examples
    --------
    >>> import kvtc_stream as kvtc
    >>> calibration = kvtc.testing.tiny_calibration()
    >>> k, v = kvtc.testing.drawn_cache(calibration.geometry, tokens=300)
    >>> encoder = kvtc.Encoder(kvtc.Codec(calibration, ratio=8, window=32))
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
        base: Source | None = None,
        key: bytes = b"",
    ) -> None:
        expect_codec(codec)
        self._codec, self._key = codec, key
        self._geometry = _with_rope(codec.calibration.geometry, rope)
        self._scales = _scales(self._geometry, k_scale, v_scale)
        self._metadata = json.dumps(dict(metadata or {}), separators=(",", ":"), allow_nan=False)
        self._token_digest = token_digest
        self._backend = get_backend(codec.backend)
        self._lock = threading.Lock()
        self._state = "open"
        self._writer: StreamWriter | None = None
        self._controls: _Controls | None = None
        self._begins_at = 0
        self._sections: list[SectionState] = []
        self._statistics = StreamStatistics()
        #: What continues the stream; ``None`` before its own first bytes.
        self._opening: bytes | None = b""
        self._room: Room | None = None
        self._base: Base | None = None
        if base is not None:
            if continues is not None:
                raise TypeError("base= is for new streams: a continued one keeps its blocks")
            self._base = Base(base, key)
        self._learnt: dict[int, Any] = {}
        if continues is not None:
            if metadata is not None:
                raise TypeError("metadata is in the stream already")
            if rope is not None and self._geometry != continues.header.geometry:
                raise ValueError("the stream has another RoPE: continue it with the one it has")
            if self._scales and self._scales != continues.header.scales:
                raise ValueError(
                    "the stream has other k_scale and v_scale: scale the cache with those"
                )
            self._check_codec(continues.header)
            self._geometry, self._scales = continues.header.geometry, continues.header.scales
            self._metadata = continues.header.metadata
            if continues.index or any(e.type not in _ENDS for e in continues.records):
                self._begins_at = continues.end
                self._continue(continues)

    @property
    def begins_at(self) -> int:
        """Where the bytes belong in the file: behind the stream that is continued.

        One without tokens says nothing about their type: it is written anew, from byte 0.
        """
        return self._begins_at

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
        self, k: Any, v: Any, *, positions: Any = None, section: int = 0, last: bool = False
    ) -> list[bytes | memoryview]:
        """As :meth:`encode`, the bytes in pieces, for those who join or write them anyway.

        After the ``last`` tokens of a section nothing comes but :meth:`finish`.
        """
        return run(self.encode_steps(k, v, positions=positions, section=section, last=last))

    def encode_steps(
        self, k: Any, v: Any, *, positions: Any = None, section: int = 0, last: bool = False
    ) -> Steps[list[bytes | memoryview]]:
        """As :meth:`encode_pieces`, for those who do something else while a device works."""
        begun = _Records()
        yield from self._begin(begun, k, v, positions=positions, section=section, last=last)
        with self._failing():
            assert self._writer is not None
            return begun.finish(self._writer)

    def _begin(
        self,
        records: _Records,
        k: Any,
        v: Any,
        *,
        positions: Any = None,
        section: int = 0,
        last: bool = False,
    ) -> Steps[None]:
        """As :meth:`encode_steps`, but for what is left to do once payloads are there."""
        with self._exclusive("encode"):
            dtype, chunk = self._check(k, v, positions, section)
            self._open(dtype)
            with self._failing():
                if self._base is not None:
                    records.pieces.append(self._start())
                    self._pack(self._blocks(section, chunk), records)
                    return
                state = self._sections[section]
                # First what a device waits for.
                steps = begun(state.take_steps(*chunk, last=last))
                records.pieces.append(self._start())
                if last:
                    self._expect(section, chunk[2])
                blocks = yield from steps
                records.arriving.append(state.arrived)
                self._pack(blocks, records)

    def whole(self, chunks: Iterable[Mapping[str, Any]]) -> Steps[bytes]:
        """All bytes of the stream of chunks: keywords of :meth:`encode_steps` for each."""
        records = _Records()
        for chunk in chunks:
            yield from self._begin(records, **chunk)
        pieces = records.pieces
        if self._writer is not None and (self._key or self._base is not None):
            pieces = [*records.finish(self._writer)]
        # All else is done while payloads are on their way.
        joining = Joining([*pieces, *self.finish_pieces()], self._room)
        yield
        with self._failing():
            records.arrived()
        joining.begin()
        yield
        return joining.finish()

    def _expect(self, index: int, positions: NDArray[np.int64]) -> None:
        """Make room for the bytes of a stream that is coded at once, where its size is known."""
        target, state = self._codec.adapts, self._sections[index]
        if target is None or target.name != "ratio" or len(self._sections) > 1:
            return
        _, coded = state.split(positions)
        size = _token_values(self._geometry, index) * state.dtype.itemsize
        exact, rest = (len(positions) - coded) * size, coded * size / target.value
        # Exact values take two thirds as a rule; the rate control keeps to the rest.
        likely = int(_EXACT * exact + rest)
        if likely >= LARGE:
            self._room = Room(int(exact + _MORE * rest) + LARGE, likely)

    def _blocks(self, index: int, chunk: Chunk) -> Iterator[Block | BlockRun]:
        """The blocks that are complete with a section's next tokens, some of them the base's."""
        state = self._sections[index]
        assert self._base is not None
        chunk = yield from self._base.take(index, chunk, state)
        self._go_on(index)
        yield from state.take(*chunk)

    def _last_blocks(self, index: int) -> Iterator[Block | BlockRun]:
        """The last blocks, of the tokens that are pending."""
        if self._base is not None:
            yield from self._base.end(index, self._sections[index])
            self._go_on(index)
        yield from self._sections[index].last_blocks()

    def _go_on(self, index: int) -> None:
        """Where all of the base was taken over, let the rate control be where it was."""
        if self._base is not None and self._base.used(index) and index in self._learnt:
            assert self._controls is not None
            self._controls.restore(index, self._learnt.pop(index))

    def finish_pieces(self) -> list[bytes | memoryview]:
        """As :meth:`finish`, the bytes in pieces."""
        with self._exclusive("finish"), self._failing():
            # A stream without a chunk has no element type of its own.
            self._open(DType.FLOAT8_E4M3FN if self._scales else DType.BFLOAT16)
            assert self._writer is not None
            out: list[bytes | memoryview] = [self._start()]
            for index in range(len(self._sections)):
                records = _Records()
                self._pack(self._last_blocks(index), records)
                out += records.finish(self._writer)
            if self._controls is not None:
                out.append(self._writer.encoder(self._controls.state()))
                self._statistics.other_bytes += len(out[-1])
            out.append(self._writer.finish())
            self._statistics.index_bytes = len(out[-1])
            self._state = "finished"
        self._warn()
        if self._base is not None:
            self._base.close()
        return out

    def _warn(self) -> None:
        """Tell what is odd about the stream; Python shows a warning once, the log has each."""
        s, target = self._statistics, self._codec.adapts
        asked = target.value if target is not None and target.name == "ratio" else math.inf
        found = s.surprises(self._codec.plan)
        # Of a target that cannot be met, errors say nothing about the cache.
        found = found and (s.beyond(asked) or found)
        found += s.lost_kinds() + s.lost_layers(self._geometry, self._codec.target)
        if self._base is not None and (complaint := self._base.complaint()):
            found.insert(0, complaint)
        if 0 < s.ratio < min(_POOR_RATIO, _NEARLY * asked):
            verbatim = s.tokens - s.coded_tokens
            found.append(
                f"the stream is only {s.ratio:.2f} times smaller than the cache: {verbatim} of "
                f"{s.tokens} tokens are verbatim (sinks {self._codec.sinks}, window "
                f"{self._codec.window}, tokens beyond error_bound); the context is too short to "
                f"gain, unlike the calibration, or its keys are at other positions than was said"
            )
        for text in found:
            _log.warning(text)
            warn(text)
        _log.debug("encoded %d tokens in %d bytes", s.tokens, s.stream_bytes)

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

    def _check(self, k: Any, v: Any, positions: Any, index: int) -> tuple[DType, Chunk]:
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
        if self._scales:
            check_scaled(k_dtype)
        check_range(self._codec, k_dtype, k=k_layers, v=v_layers)
        tokens = k_layers[0].shape[1]
        if v_layers[0].shape[1] != tokens:
            raise ValueError(f"k has {tokens} tokens, v has {v_layers[0].shape[1]}")
        last = self._sections[index].last_position if self._sections else -1
        return k_dtype, (k_layers, v_layers, check_positions(positions, tokens, last))

    def _start(self) -> bytes:
        """The header, or what continues a stream, once."""
        if self._opening is None:
            assert self._writer is not None
            self._opening = self._writer.start()
            self._statistics.header_bytes = len(self._opening)
        opening, self._opening = self._opening, b""
        return opening

    def _open(self, dtype: DType) -> None:
        """Begin a stream, once the element type is known."""
        if self._sections:
            return
        header = _header(
            self._codec,
            dtype,
            self._geometry,
            self._scales,
            token_digest=self._token_digest,
            metadata=self._metadata,
        )
        base = self._base
        if base is not None and base.begin(header, self._codec.calibration, self._backend):
            header = replace(header, features=header.features | base.stream.header.features)
            self._learnt = dict(enumerate(_control_states(base.stream, self._codec) or ()))
        self._writer = StreamWriter(header, self._key)
        self._open_sections(header, None)
        self._opening = None

    def _open_sections(self, header: StreamHeader, states: Sequence[Any] | None) -> None:
        target = self._codec.adapts
        self._controls = None if target is None else _Controls(target, states)
        self._sections = [
            SectionState(header, i, self._codec, self._backend, self._controls)
            for i in range(len(header.geometry.sections))
        ]

    def _check_codec(self, header: StreamHeader) -> None:
        """Refuse to continue what another codec wrote."""
        codec = self._codec
        check_calibration(header, codec.calibration)
        for name, found, expected in (
            ("plan", header.plan, codec.plan),
            ("sinks", header.sinks, codec.sinks),
            ("window", header.window, codec.window),
            ("block_tokens", header.block_tokens, codec.block_tokens),
            ("coder", header.coder, codec.byte_coder),
            ("out_dtype", header.out_dtype.label, codec.out_dtype or header.out_dtype.label),
        ):
            if found != expected:
                shown = "another" if name == "plan" else f"{found!r}, not {expected!r},"
                raise ValueError(
                    f"the stream was written with {shown} {name}: continue it with the codec that "
                    "it was written with"
                )

    def _continue(self, stream: StreamFile) -> None:
        """Take the state that the encoder of ``stream`` had before it wrote the tail."""
        header, codec = stream.header, self._codec
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
                state.coded_before(entry.role, entry.tokens, entry.last_position)
        self._opening = self._writer.start()
        self._statistics.other_bytes = (
            stream.end + len(self._opening) - self._statistics.stream_bytes_of_blocks
        )

    def _pack(self, blocks: Iterable[Block | BlockRun], records: _Records) -> None:
        """Add the records of blocks, whose payloads need not be there yet."""
        assert self._writer is not None
        for block in blocks:
            found = self._writer.begin_blocks(block)
            records.pieces += found
            itemsize = self._sections[block.section].dtype.itemsize
            token_bytes = _token_values(self._geometry, block.section) * itemsize
            self._statistics.add(block, sum(record.size for record in found), token_bytes)


@dataclass
class _Records:
    """Bytes of a stream in pieces, while payloads are on their way.

    Attributes
    ----------
    pieces
        The bytes, and records without checksums.
    arriving
        Each waits until payloads are there.
    """

    pieces: list[Piece] = field(default_factory=list)
    arriving: list[Callable[[], None]] = field(default_factory=list)

    def arrived(self) -> None:
        """Wait until all payloads are there."""
        while self.arriving:
            self.arriving.pop()()

    def finish(self, writer: StreamWriter) -> list[bytes | memoryview]:
        """Wait for payloads; the bytes, with all checksums."""
        self.arrived()
        return writer.sealed(self.pieces)


def _token_values(geometry: Geometry, index: int) -> int:
    section = geometry.sections[index]
    return section.k_width + section.v_width


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
    # A page of few tokens has no room for errors by layer.
    return replace(header, sinks=0, window=0, features=header.features & ~Feature.LAYER_ERRORS)


#: Bits of the least values that float16 rounds to infinity, and of infinity itself.
_BEYOND_FLOAT16 = {DType.BFLOAT16: (0x4780, 0x7F80), DType.FLOAT32: (0x477FF000, 0x7F800000)}


def check_range(codec: Codec, dtype: DType, **values: Sequence[Any]) -> None:
    """Raise ``UnsupportedError`` if finite values, arrays of each layer, would be restored as
    infinities, because ``out_dtype`` is float16."""
    if codec.out_dtype != DType.FLOAT16.label or dtype not in _BEYOND_FLOAT16:
        return
    least, infinity = _BEYOND_FLOAT16[dtype]
    for name, layers in values.items():
        for i, layer in enumerate(layers):
            bits = layer.view(f"u{dtype.itemsize}") & (2 ** (8 * dtype.itemsize - 1) - 1)
            if bool(((bits >= least) & (bits < infinity)).any()):
                raise UnsupportedError(
                    f"{name} of layer {i} has values beyond 65504, the largest of float16: choose "
                    f"another out_dtype than float16, as {dtype.label}"
                )


def check_scaled(dtype: DType) -> None:
    """Raise ``TypeError`` unless values of this type have scales."""
    if not dtype.is_fp8:
        raise TypeError(f"k_scale and v_scale are for fp8 caches, found {dtype.label}")


def _header(
    codec: Codec,
    dtype: DType,
    geometry: Geometry,
    scales: tuple[SectionScales, ...],
    **others: Any,
) -> StreamHeader:
    if scales:
        check_scaled(dtype)
    if dtype.is_fp8 and not scales:
        scales = _scales(geometry, 1.0, 1.0)
    out_dtype = DType.BFLOAT16 if dtype.is_fp8 else dtype
    if codec.out_dtype is not None:
        out_dtype = DType[codec.out_dtype.upper()]
    features = Feature.LAYER_ERRORS if codec.measure else Feature(0)
    if codec.byte_coder is Coder.RANS and dtype is DType.BFLOAT16:
        features |= Feature.PLANES
    if out_dtype.is_fp8 and not scales:
        raise TypeError(f"out_dtype={out_dtype.label} needs fp8 input, found {dtype.label}")
    return StreamHeader(
        geometry=geometry,
        dtype=dtype,
        out_dtype=out_dtype,
        scales=scales,
        sinks=codec.sinks,
        window=codec.window,
        block_tokens=codec.block_tokens,
        plan=codec.plan,
        coder=codec.byte_coder,
        calibration=codec.calibration.digest,
        model=codec.calibration.model,
        features=features,
        **others,
    )


class _Controls:
    """The rate controls of a stream's sections, saved so that the stream can be continued."""

    def __init__(self, target: Target, states: Sequence[Any] | None) -> None:
        self._target, self._states = target, states
        self._controls: list[SectionControl] = []

    def control(self, header: StreamHeader, section: int) -> SectionControl:
        """See :class:`kvtc_stream.planning.rate_control.Controls`; sections come in order."""
        control = self._target.control(header, section)
        self._controls.append(control)
        if self._states is not None:
            self.restore(section, self._states[section])
        return control

    def restore(self, section: int, state: Any) -> None:
        """Let a section's control be where another was."""
        with located("the stream's ENCODER record"):
            self._controls[section].restore(state)

    def state(self) -> bytes:
        """The payload of the ENCODER record."""
        control = [control.state() for control in self._controls]
        target = _stored_target(self._target)
        return json.dumps({"target": target, "control": control}, separators=(",", ":")).encode()


def _control_states(stream: StreamFile, codec: Codec) -> Sequence[Any] | None:
    """Where the rate controls were, if the stream tells and the target is the same."""
    data = stream.encoder_state()
    if not data or codec.adapts is None:
        return None
    with located("the stream's ENCODER record"):
        try:
            state = json.loads(data)
            target, states = state["target"], state["control"]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"expected an object with target and control: {error!r}") from None
        if not isinstance(states, list) or len(states) != len(stream.header.geometry.sections):
            raise ValueError("expected a control for each section")
    return states if target == _stored_target(codec.adapts) else None


def _stored_target(target: Target) -> list[Any]:
    """How an ENCODER record names a target; streams were written before it had its name."""
    return ["max_relative_error" if target.name == "mean_error" else target.name, target.value]


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
