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
    Geometry,
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
def ropes(draw: st.DrawFn, k_dim: int) -> Rope | None:
    """A table that fits, or none."""
    pairs = draw(st.integers(0, k_dim // 2))
    if not pairs:
        return None
    frequencies = draw(st.lists(binary32, min_size=pairs, max_size=pairs))
    return Rope(tuple(frequencies), draw(st.booleans()), draw(scales))


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Up to three sections that share out up to six layers."""
    layers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
    cuts = sorted(draw(st.sets(st.integers(1, len(layers)), max_size=2)) | {0, len(layers)})
    sections = []
    for a, b in itertools.pairwise(cuts):
        k_dim, v_dim, heads = (draw(st.integers(1, 5)) for _ in range(3))
        few = draw(st.lists(ropes(k_dim), min_size=1, max_size=2))
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
        coder=draw(st.sampled_from(Coder)),
        calibration=draw(digests),
        scales=tuple(
            SectionScales(factors(s), factors(s)) for s in geometry.sections if dtype.is_fp8
        ),
        model=ModelIdentity(draw(names), draw(names), draw(st.just(b"") | digests)),
        token_digest=draw(st.just(b"") | digests),
        metadata=draw(st.sampled_from(("{}", '{"a": [1, "é"]}', ' {"b": null}'))),
    )


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
        blocks.append(
            make_block(
                header,
                start[section],
                listed,
                section=section,
                role=role,
                verbatim_tokens=tuple(sorted(verbatim)),
                symbols=draw(st.binary(max_size=60)) * draw(st.integers(1, 9)) if coded else b"",
                coder=draw(st.sampled_from([c for c in Coder if c is not Coder.RANS])),
                errors=BlockErrors(Measure.COEFFICIENTS, *(draw(binary32) for _ in range(4))),
                cut=(front, cut - front),
            )
        )
        start[section] += tokens - cut
    return header, blocks
