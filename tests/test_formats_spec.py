"""SPEC.md and the code say the same: its tables read what the writer wrote."""

from __future__ import annotations

import functools
import io
import itertools
import operator
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import second_reader
import xxhash
from formats_samples import records, small_stream, streams, write
from hypothesis import given, settings

import kvtc_stream.formats
from kvtc_stream.formats import (
    FORMAT_VERSION,
    MAGIC,
    Checksum,
    Coder,
    DType,
    Feature,
    Measure,
    Quantiser,
    RecordType,
    Role,
    StreamFile,
)
from kvtc_stream.formats.block_errors import LEVELS
from kvtc_stream.formats.features import PAGE_FEATURES
from kvtc_stream.formats.positions import AxesKind

SPEC = Path(kvtc_stream.formats.__file__).with_name("SPEC.md").read_text(encoding="utf-8")
AXES = {int(kind): kind.name for kind in AxesKind}
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i64": "q", "f32": "f"}


def tables(heading: str) -> list[list[list[str]]]:
    """Cells of every table under a heading, without the tables' first two rows."""
    section = re.split(r"\n##+ ", SPEC.split(f" {heading}\n", 1)[1], maxsplit=1)[0]
    found = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        for table in found
    ]


def layout(heading: str, number: int = 0) -> dict[str, tuple[int, str]]:
    """Fields at fixed offsets: name to offset and struct code."""
    fields: dict[str, tuple[int, str]] = {}
    for offset, kind, name, *_ in tables(heading)[number]:
        fixed = re.fullmatch(r"(\d+) bytes", kind)
        several = re.fullmatch(r"f32\[(\d)\]", kind)
        if not offset.isdigit() or not (fixed or several or kind in CODES):
            break
        code = f"{fixed[1]}s" if fixed else f"{several[1]}f" if several else CODES[kind]
        fields[f"{name} {offset}" if name in fields else name] = (int(offset), code)
    return fields


def values(heading: str, data: bytes, start: int, number: int = 0) -> dict[str, object]:
    """What SPEC's table reads at ``start``."""
    found = {}
    for name, (offset, code) in layout(heading, number).items():
        value = struct.unpack_from("<" + code, data, start + offset)
        found[name] = value if len(value) > 1 else value[0]
    return found


@pytest.mark.parametrize(
    ("heading", "number", "fields", "size"),
    [
        ("4. Preamble", 0, 8, 40),
        ("5. Header", 0, 8, 48),
        ("5. Header", 1, 3, 7),
        ("5. Header", 2, 4, 14),
        ("7. Records", 0, 8, 32),
        ("8. Block", 0, 21, 80),
        ("8.1 Positions on axes", 0, 3, 10),
        ("13. Index", 1, 16, 88),
        ("14. Trailer", 0, 6, 40),
        ("23. Page", 0, 10, 72),
    ],
)
def test_fixed_fields_follow_one_another(heading, number, fields, size):
    found = list(layout(heading, number).values())
    assert len(found) == fields
    ends = [offset + struct.calcsize("<" + code) for offset, code in found]
    assert [offset for offset, _ in found] == [0, *ends[:-1]]
    assert ends[-1] == size


@pytest.mark.parametrize(
    ("heading", "registry"),
    [
        ("18.1 Element types", DType),
        ("18.2 Quantisers", Quantiser),
        ("18.3 Coders", Coder),
        ("18.4 Record types", RecordType),
        ("18.5 Roles", Role),
        ("18.6 Checksum algorithms", Checksum),
        ("18.7 Measures", Measure),
        ("18.9 Kinds of positions on axes", AxesKind),
    ],
)
def test_registries(heading, registry):
    rows = tables(heading)[0]
    assert {row[1]: int(row[0]) for row in rows if row[1]} == {m.name: m.value for m in registry}
    extra = {DType: "itemsize", Quantiser: "bits"}.get(registry)
    if extra:
        assert [int(row[2]) for row in rows] == [getattr(m, extra) for m in registry]


def test_features():
    rows = tables("18.8 Required features")[0]
    assert {row[1]: 1 << int(row[0]) for row in rows} == {f.name: f.value for f in Feature}
    known = [Feature[row[1]] for row in rows if not row[3].startswith("reserved")]
    assert functools.reduce(operator.or_, known) == PAGE_FEATURES


def test_magic_and_version():
    row = tables("4. Preamble")[0][0]
    assert bytes.fromhex(row[3].strip("`")) == MAGIC
    assert f"# The kvtc stream, format {FORMAT_VERSION[0]}.{FORMAT_VERSION[1]}\n" in SPEC
    assert tables("25. Changes")[0][-1][0] == "{}.{}".format(*FORMAT_VERSION)


def test_the_example():
    """It is a stream, the one that its words tell of, and the second reader reads it too."""
    text = SPEC.split("## 24. Example")[1].split("```")[1]
    lines = re.findall(r"^ *(\d+)  ((?:[0-9a-f]{2} ?)+)", text, re.MULTILINE)
    data = b""
    for offset, digits in lines:
        assert int(offset) == len(data)
        data += bytes.fromhex(digits)
    file = StreamFile(io.BytesIO(data))
    block = file.read_block(file.index[0])
    assert block.role is Role.SINKS
    assert file.header.dtype is DType.BFLOAT16
    (found,) = second_reader.read_stream(data).blocks
    assert found.verbatim_bytes == block.verbatim == bytes.fromhex("800040403f3f3f3f")
    planes = np.frombuffer(block.verbatim, np.uint8).reshape(2, 4)
    values = second_reader.to_f32(np.frombuffer(planes.T.tobytes(), "<u2"), 3)
    assert values.tolist() == [1.0, 0.5, 0.75, 0.75]


def blocks_by_the_book(data: bytes) -> Iterator[tuple[dict[str, object], dict[str, object], int]]:
    """Record header, block fields and offset of every block, with SPEC's tables alone."""
    preamble = values("4. Preamble", data, 0)
    assert preamble["magic"] == MAGIC
    opening = data[:32] + data[40 : 40 + preamble["header length"]]
    assert preamble["seed"] == xxhash.xxh3_64_intdigest(opening)
    offset = 40 + preamble["header length"]
    for sequence in itertools.count():
        record = values("7. Records", data, offset)
        assert (record["magic"], record["sequence"]) == (b"KVTR", sequence)
        head = xxhash.xxh3_64_intdigest(data[offset : offset + 24], preamble["seed"])
        assert record["header checksum"] == head
        end = offset + 32 + record["payload length"]
        (stored,) = struct.unpack_from("<Q", data, end)
        assert stored == xxhash.xxh3_64_intdigest(data[offset + 32 : end], head)
        if record["type"] == RecordType.INDEX:
            break
        yield record, values("8. Block", data, offset + 32), offset
        offset = end + 8
    trailer = values("14. Trailer", data, end + 8)
    assert trailer["index offset"] == offset
    assert trailer["total length"] == len(data) == end + 8 + 40
    assert trailer["records"] == sequence + 1
    assert trailer["checksum"] == xxhash.xxh3_64_intdigest(
        data[end + 8 : end + 8 + 24], preamble["seed"]
    )
    assert trailer["end magic"] == b"KVTEND\r\n"


def axes_by_the_book(
    data: bytes, at: int, kind: int, axes: int, positions: list[int]
) -> tuple[list[tuple[int, ...]], int]:
    """Positions on axes, token by token, and where they end."""
    if kind == 1:
        (shift,) = struct.unpack_from("<q", data, at)
        return [(p + shift,) * axes for p in positions], at + 8
    found = [struct.unpack_from(f"<{axes}q", data, at)]
    at += 8 * axes
    code = {"8": "b", "16": "h", "32": "i", "64": "q"}[AXES[kind].removeprefix("LISTED")]
    for _ in positions[1:]:
        steps = struct.unpack_from(f"<{axes}{code}", data, at)
        found.append(tuple(a + b for a, b in zip(found[-1], steps, strict=True)))
        at += struct.calcsize(f"<{axes}{code}")
    return found, at


def test_errors_by_layer() -> None:
    """The formula in SPEC gives what bytes stand for."""
    for code in range(1, 255):
        assert LEVELS[code] == 2 ** (code // 16 - 12) * (1 + code % 16 / 16)
    assert (LEVELS[0], LEVELS[255]) == (0, float("inf"))


@given(streams())
@settings(max_examples=25, deadline=None)
def test_a_reader_made_of_the_tables_agrees(stream):
    header, blocks = stream
    data = write(header, blocks)
    fixed = values("5. Header", data, 40)
    assert fixed["dtype"] == header.dtype
    assert fixed["output dtype"] == header.out_dtype
    assert fixed["coder"] == header.coder
    assert (fixed["sinks"], fixed["window"]) == (header.sinks, header.window)
    assert fixed["block tokens"] == header.block_tokens
    assert fixed["calibration"] == header.calibration
    found = list(blocks_by_the_book(data))
    assert len(found) == len(blocks)
    for (record, fields, offset), block in zip(found, blocks, strict=True):
        assert record["section"] == block.section
        assert fields["tokens"] == block.tokens
        assert fields["verbatim tokens"] == len(block.verbatim_tokens)
        assert fields["start"] == block.start
        assert fields["first position"] == block.positions[0]
        assert (fields["cut at the front"], fields["cut at the end"]) == block.cut
        assert (fields["role"], fields["measure"]) == (block.role, block.errors.measure)
        assert (fields["coder"], fields["verbatim coder"]) == (block.coder, block.verbatim_coder)
        assert fields["coded size"] == block.coded_size
        names = ("K mean error", "K worst error", "V mean error", "V worst error")
        assert tuple(fields[name] for name in names) == block.errors.values
        at = offset + 32 + 80
        listed = fields["kind of positions"]
        if listed:
            rest = struct.unpack_from(f"<{block.tokens - 1}q", data, at)
            assert (block.positions[0], *rest) == tuple(block.positions)
            at += 8 * len(rest)
        assert bool(listed) is not isinstance(block.positions, range)
        if 0 < fields["verbatim tokens"] < block.tokens:
            bits = [data[at + i // 8] >> i % 8 & 1 for i in range(block.tokens)]
            assert tuple(i for i, bit in enumerate(bits) if bit) == block.verbatim_tokens
            at += -(-block.tokens // 8)
        contents = fields["contents"]
        assert bool(contents & 2) is bool(block.axes)
        if contents & 2:
            kind, axes = data[at : at + 2]
            assert axes == len(block.axes)
            found, at = axes_by_the_book(data, at + 2, kind, axes, list(block.positions))
            assert found == list(zip(*block.axes, strict=True))
        assert bool(contents & 1) is (block.layer_errors is not None)
        if contents & 1:
            layers = header.geometry.sections[block.section].layers
            size = 4 * len(layers)
            assert data[at : at + size] == block.layer_errors.codes
            at += size
        assert data[at : at + fields["coded length"]] == block.coded
        at += fields["coded length"]
        assert data[at : at + fields["verbatim length"]] == block.verbatim
        at += fields["verbatim length"]
        assert at == offset + 32 + record["payload length"]


def test_the_index_table():
    data, _, _ = small_stream()
    payload = records(data)[-1] + 32
    file = StreamFile(io.BytesIO(data))
    assert values("13. Index", data, payload)["entries"] == len(file.index)
    for i, entry in enumerate(file.index):
        fields = values("13. Index", data, payload + 4 + 88 * i, 1)
        assert fields.pop("errors") == entry.errors.values
        assert list(fields.values()) == [
            entry.offset,
            entry.length,
            entry.type,
            entry.role,
            entry.errors.measure,
            0,
            entry.section,
            0,
            entry.tokens,
            entry.verbatim_tokens,
            entry.start,
            entry.first_position,
            entry.last_position,
            entry.coded_bytes,
            entry.verbatim_bytes,
        ]
