"""Streams to test the container with, and hypothesis strategies for its values."""

from __future__ import annotations

import itertools
import struct
from array import array
from dataclasses import replace

import xxhash
from hypothesis import strategies as st

from kvtc_stream.formats import (
    Band,
    Block,
    BlockErrors,
    Coder,
    DType,
    Feature,
    Geometry,
    LayerErrors,
    Measure,
    ModelIdentity,
    PartPlan,
    Plan,
    Quantiser,
    Role,
    Rope,
    Section,
    SectionPlan,
    SectionScales,
    StreamHeader,
    StreamWriter,
    compress,
)
from kvtc_stream.formats.coders import BYTE_CODERS

PREAMBLE = 40
RECORD_HEADER = 32
TRAILER = 40


def small_header() -> StreamHeader:
    """One layer with one KV head of two channels."""
    geometry = Geometry.uniform(layers=1, kv_heads=1, head_dim=2, rope=Rope((1.0,)))
    parts = (
        PartPlan((0,), (), (Band(1, Quantiser.INT4),)),
        PartPlan((), (0,), (Band(2, Quantiser.INT2),)),
    )
    return StreamHeader(
        geometry=geometry,
        dtype=DType.FLOAT16,
        out_dtype=DType.FLOAT16,
        sinks=1,
        window=1,
        block_tokens=4,
        plan=Plan("p", (SectionPlan("b", parts),)),
        coder=Coder.DEFLATE,
        calibration=bytes(range(32)),
    )


def make_block(
    header: StreamHeader,
    start: int,
    positions: range | array[int],
    *,
    section: int = 0,
    role: Role = Role.DATA,
    verbatim_tokens: tuple[int, ...] = (),
    symbols: bytes = b"",
    coder: Coder = Coder.STORED,
    errors: BlockErrors | None = None,
    cut: tuple[int, int] = (0, 0),
    layer_errors: LayerErrors | None = None,
    axes: tuple[range | array[int], ...] = (),
) -> Block:
    """A block whose verbatim values are zero bytes."""
    values = bytes(header.verbatim_size(section, len(verbatim_tokens)))
    verbatim_coder, verbatim = compress(coder, values)
    symbol_coder, coded = compress(coder, symbols)
    return Block(
        section=section,
        role=role,
        start=start,
        tokens=len(positions),
        positions=positions,
        verbatim_tokens=verbatim_tokens,
        coder=symbol_coder,
        coded=coded,
        coded_size=len(symbols),
        verbatim_coder=verbatim_coder,
        verbatim=verbatim,
        errors=errors or BlockErrors(),
        cut=cut,
        layer_errors=layer_errors,
        axes=axes,
    )


def small_blocks(header: StreamHeader) -> list[Block]:
    """Sinks, data with listed positions and one verbatim token, tail."""
    errors = BlockErrors(Measure.RECONSTRUCTION, 0.25, 0.5, 0.125, 1.0)
    return [
        make_block(header, 0, range(1), role=Role.SINKS, verbatim_tokens=(0,)),
        make_block(
            header,
            1,
            array("q", (1, 2, 5)),
            verbatim_tokens=(1,),
            symbols=b"\xa5\x3c",
            errors=errors,
        ),
        make_block(header, 4, range(7, 9), role=Role.TAIL, verbatim_tokens=(0, 1)),
    ]


def write(header: StreamHeader, blocks: list[Block]) -> bytes:
    """The whole stream."""
    writer = StreamWriter(header)
    return b"".join((writer.start(), *map(writer.block, blocks), writer.finish()))


def small_stream() -> tuple[bytes, StreamHeader, list[Block]]:
    """About a kilobyte with everything in it."""
    header = small_header()
    blocks = small_blocks(header)
    return write(header, blocks), header, blocks


def later_header() -> StreamHeader:
    """The small one with everything of format 1.1: two axes, errors by layer."""
    rope = Rope((1.0, 0.5), axes=(0, 1))
    geometry = Geometry.uniform(layers=1, kv_heads=1, head_dim=4, rope=rope)
    return replace(small_header(), geometry=geometry, features=Feature.LAYER_ERRORS)


def later_stream() -> tuple[bytes, StreamHeader, list[Block]]:
    """The small stream, with positions on axes of every kind but the widest, errors by layer."""
    header = later_header()
    errors = LayerErrors.of([0.25], [0.5], [0], [20])
    blocks = [
        make_block(header, 0, range(1), role=Role.SINKS, verbatim_tokens=(0,)),
        make_block(
            header,
            1,
            array("q", (1, 2, 5)),
            verbatim_tokens=(1,),
            symbols=b"\xa5\x3c",
            axes=(array("q", (1, 1, 1)), array("q", (1, 2, 1))),
            layer_errors=errors,
        ),
        make_block(header, 4, range(7, 9), symbols=b"a", axes=(range(3, 5), range(3, 5))),
        make_block(
            header,
            6,
            range(9, 11),
            role=Role.TAIL,
            verbatim_tokens=(0, 1),
            axes=(array("q", (4, 204)), range(5, 7)),
        ),
    ]
    return write(header, blocks), header, blocks


def records(stream: bytes) -> list[int]:
    """Offsets of the records."""
    offset = PREAMBLE + struct.unpack_from("<Q", stream, 24)[0]
    found = []
    while stream[offset : offset + 4] == b"KVTR":
        found.append(offset)
        kind = stream[offset + 4]
        offset += RECORD_HEADER + struct.unpack_from("<Q", stream, offset + 16)[0] + 8
        offset += TRAILER if kind == 2 else 0
    return found


def reseal(stream: bytes | bytearray) -> bytes:
    """Make every checksum right again, as a writer at fault would have."""
    data = bytearray(stream)

    def seal(start: int, end: int, seed: int, at: int) -> int:
        value = xxhash.xxh3_64_intdigest(bytes(data[start:end]), seed)
        struct.pack_into("<Q", data, at, value)
        return value

    size = struct.unpack_from("<Q", data, 24)[0]
    seed = xxhash.xxh3_64_intdigest(bytes(data[:32] + data[PREAMBLE : PREAMBLE + size]))
    struct.pack_into("<Q", data, 32, seed)
    for offset in records(bytes(data)):
        own = seal(offset, offset + 24, seed, offset + 24)
        payload = offset + RECORD_HEADER
        end = payload + struct.unpack_from("<Q", data, offset + 16)[0]
        seal(payload, end, own, end)
        if data[offset + 4] == 2:
            seal(end + 8, end + 32, seed, end + 32)
    return bytes(data)


def patched(stream: bytes, offset: int, layout: str, *values: int | float | bytes) -> bytes:
    """``stream`` with one field changed and every checksum right."""
    data = bytearray(stream)
    struct.pack_into("<" + layout, data, offset, *values)
    return reseal(data)


binary32 = st.floats(min_value=0, max_value=2.0**100, width=32)
scales = st.floats(min_value=0.0078125, max_value=2.0**100, width=32)
names = st.text(st.characters(codec="utf-8"), max_size=12)
digests = st.binary(min_size=32, max_size=32)


@st.composite
def ropes(draw: st.DrawFn, k_dim: int, axes: int) -> Rope | None:
    """A table that fits, or none."""
    pairs = draw(st.integers(0, k_dim // 2))
    if not pairs:
        return None
    frequencies = draw(st.lists(binary32, min_size=pairs, max_size=pairs))
    own = [*range(axes), *(draw(st.integers(0, axes - 1)) for _ in range(pairs - axes))]
    dealt = draw(st.permutations(own)) if axes <= pairs else ()
    return Rope(tuple(frequencies), draw(st.booleans()), draw(scales), tuple(dealt))


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Up to three sections that share out up to six layers."""
    layers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
    cuts = sorted(draw(st.sets(st.integers(1, len(layers)), max_size=2)) | {0, len(layers)})
    sections = []
    for a, b in itertools.pairwise(cuts):
        k_dim, v_dim, heads = (draw(st.integers(1, 6)) for _ in range(3))
        axes = draw(st.integers(1, 3))
        few = draw(st.lists(ropes(k_dim, axes), min_size=1, max_size=2))
        rope = tuple(draw(st.sampled_from(few)) for _ in range(b - a))
        sections.append(Section(tuple(sorted(layers[a:b])), heads, k_dim, v_dim, rope))
    return Geometry(tuple(sections))


@st.composite
def section_plans(draw: st.DrawFn, section: Section) -> SectionPlan:
    """K and V of every layer in one of up to three parts."""
    count = draw(st.integers(1, 3))
    deal = st.integers(0, count - 1)
    k = [draw(deal) for _ in section.layers]
    v = [draw(deal) for _ in section.layers]
    scaled = [q for q in Quantiser if q is not Quantiser.UNIFORM]
    kinds = draw(st.sampled_from([scaled, [Quantiser.NONE, Quantiser.UNIFORM]]))
    parts = []
    for i in range(count):
        part = PartPlan(
            tuple(n for n, p in enumerate(k) if p == i),
            tuple(n for n, p in enumerate(v) if p == i),
            (),
        )
        left = part.width(section)
        if not left:
            continue
        bands = []
        while left and draw(st.booleans()):
            size, quantiser = draw(st.integers(1, left)), draw(st.sampled_from(kinds))
            step = draw(st.integers(0, 255)) if quantiser is Quantiser.UNIFORM else 0
            bands.append(Band(size, quantiser, step))
            left -= size
        parts.append(replace(part, bands=tuple(bands)))
    expected = st.floats(0, width=32, allow_nan=False, allow_infinity=False)
    return SectionPlan(draw(names), tuple(parts), *(draw(expected) for _ in range(3)))


@st.composite
def headers(draw: st.DrawFn) -> StreamHeader:
    """Any header of a small geometry."""
    geometry = draw(geometries())
    dtype = draw(st.sampled_from(DType))
    plain = [d for d in DType if not d.is_fp8 or d is dtype]

    def factors(section: Section) -> tuple[float, ...]:
        count = len(section.layers) * section.kv_heads
        return tuple(draw(st.lists(scales, min_size=count, max_size=count)))

    return StreamHeader(
        geometry=geometry,
        dtype=dtype,
        out_dtype=draw(st.sampled_from(plain)),
        sinks=draw(st.integers(0, 9)),
        window=draw(st.integers(0, 2**32 - 1)),
        block_tokens=draw(st.integers(1, 40)),
        plan=Plan(draw(names), tuple(draw(section_plans(s)) for s in geometry.sections)),
        coder=draw(st.sampled_from((*BYTE_CODERS, Coder.RANS))),
        calibration=draw(digests),
        scales=tuple(
            SectionScales(factors(s), factors(s)) for s in geometry.sections if dtype.is_fp8
        ),
        model=ModelIdentity(draw(names), draw(names), draw(st.just(b"") | digests)),
        token_digest=draw(st.just(b"") | digests),
        metadata=draw(st.sampled_from(("{}", '{"a": [1, "é"]}', ' {"b": null}'))),
        features=draw(st.sampled_from((Feature(0), Feature.LAYER_ERRORS, Feature.PLANES))),
    )


@st.composite
def layer_errors(draw: st.DrawFn, layers: int) -> LayerErrors:
    """Any errors of so many layers."""
    error = st.floats(0, allow_nan=False)
    pairs = [
        draw(st.lists(st.tuples(error, error), min_size=layers, max_size=layers)) for _ in "KV"
    ]
    k, v = ([sorted(pair) for pair in own] for own in pairs)
    kinds = ([pair[i] for pair in own] for own in (k, v) for i in (0, 1))
    return LayerErrors.of(*kinds)


@st.composite
def axes_of(draw: st.DrawFn, positions: array[int], count: int) -> tuple[array[int], ...]:
    """Positions on axes: the tokens' own, shifted, near one another, or any."""
    kind = draw(st.integers(0, 3)) if count else 0
    if kind == 0:
        return ()
    if kind == 1:
        shift = draw(st.integers(-positions[0], 2**63 - 1 - positions[-1]))
        return tuple(array("q", (p + shift for p in positions)) for _ in range(count))
    most = draw(st.sampled_from((50, 20_000, 2**31, 2**63 - 1)))
    some = st.lists(st.integers(0, most), min_size=len(positions), max_size=len(positions))
    return tuple(array("q", draw(some)) for _ in range(count))


@st.composite
def streams(draw: st.DrawFn) -> tuple[StreamHeader, list[Block]]:
    """A header and blocks that follow one another, sections mixed."""
    header = draw(headers())
    count = len(header.geometry.sections)
    start, position, stage = [0] * count, [0] * count, [0] * count
    order = (Role.SINKS, Role.DATA, Role.TAIL)
    blocks = []
    for section in draw(st.lists(st.integers(0, count - 1), max_size=6)):
        stage[section] = draw(st.integers(stage[section], 2))
        role = order[stage[section]]
        tokens = draw(st.integers(1, min(header.block_tokens, 12)))
        cut = draw(st.integers(0, tokens - 1))
        front = draw(st.integers(0, cut))
        gaps = draw(
            st.just([1] * tokens) | st.lists(st.integers(1, 9), min_size=tokens, max_size=tokens)
        )
        listed = array("q")
        for gap in gaps:
            listed.append(position[section] + gap - 1)
            position[section] += gap
        everything = set(range(tokens))
        verbatim = everything
        if role is Role.DATA:
            verbatim = draw(st.just(everything) | st.sets(st.sampled_from(sorted(everything))))
        coded = verbatim != everything
        shape = header.geometry.sections[section]
        measured = coded and header.features & Feature.LAYER_ERRORS and draw(st.booleans())
        blocks.append(
            make_block(
                header,
                start[section],
                listed,
                section=section,
                role=role,
                verbatim_tokens=tuple(sorted(verbatim)),
                symbols=draw(st.binary(max_size=60)) * draw(st.integers(1, 9)) if coded else b"",
                coder=draw(st.sampled_from(BYTE_CODERS)),
                errors=BlockErrors(Measure.COEFFICIENTS, *(draw(binary32) for _ in range(4))),
                cut=(front, cut - front),
                layer_errors=draw(layer_errors(len(shape.layers))) if measured else None,
                axes=draw(axes_of(listed, shape.axes)),
            )
        )
        start[section] += tokens - cut
    return header, blocks
