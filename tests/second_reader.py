"""A second reader of kvtc streams, written from SPEC.md alone; it shares no code with the package.

It needs the standard library, numpy, lz4 and zstandard, is slow, and reads from the front.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lz4.block
import numpy as np
import zstandard
from numpy.typing import NDArray

# --- XXH3, 64 bits (section 2) ---

_M = (1 << 64) - 1
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8"
    "fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb17"
    "0ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_P32 = (0, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_P64 = (
    *(0, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9),
    *(0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5),
)


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _fold(a: int, b: int) -> int:
    product = (a & _M) * (b & _M)
    return product & _M ^ product >> 64


def _avalanche(h: int) -> int:
    h &= _M
    h ^= h >> 37
    h = h * 0x165667919E3779F9 & _M
    return h ^ h >> 32


def _avalanche64(h: int) -> int:
    h &= _M
    h ^= h >> 33
    h = h * _P64[2] & _M
    h ^= h >> 29
    h = h * _P64[3] & _M
    return h ^ h >> 32


def xxh3(data: bytes, seed: int = 0) -> int:
    """XXH3 with 64 bits."""
    size, s = len(data), _SECRET
    if size == 0:
        return _avalanche64(seed ^ _u64(s, 56) ^ _u64(s, 64))
    if size <= 3:
        combined = data[0] << 16 | data[size >> 1] << 24 | data[-1] | size << 8
        return _avalanche64(combined ^ ((_u32(s, 0) ^ _u32(s, 4)) + seed))
    if size <= 8:
        seed ^= int.from_bytes((seed & 0xFFFFFFFF).to_bytes(4, "big"), "little") << 32
        h = (_u32(data, size - 4) + (_u32(data, 0) << 32)) & _M
        h ^= ((_u64(s, 8) ^ _u64(s, 16)) - seed) & _M
        h ^= (h << 49 | h >> 15) & _M ^ (h << 24 | h >> 40) & _M
        h = h * 0x9FB21C651E98DF25 & _M
        h ^= (h >> 35) + size
        h = h * 0x9FB21C651E98DF25 & _M
        return h ^ h >> 28
    if size <= 16:
        low = _u64(data, 0) ^ ((_u64(s, 24) ^ _u64(s, 32)) + seed) & _M
        high = _u64(data, size - 8) ^ ((_u64(s, 40) ^ _u64(s, 48)) - seed) & _M
        swapped = int.from_bytes(low.to_bytes(8, "little"), "big")
        return _avalanche(size + swapped + high + _fold(low, high))

    def mix(at: int, secret: int) -> int:
        return _fold(
            _u64(data, at) ^ (_u64(s, secret) + seed) & _M,
            _u64(data, at + 8) ^ (_u64(s, secret + 8) - seed) & _M,
        )

    if size <= 128:
        total = size * _P64[1]
        for i in range((size - 1) // 32, -1, -1):
            total += mix(16 * i, 32 * i) + mix(size - 16 * (i + 1), 32 * i + 16)
        return _avalanche(total)
    if size <= 240:
        total = _avalanche(size * _P64[1] + sum(mix(16 * i, 16 * i) for i in range(8)))
        total += sum(mix(16 * i, 16 * (i - 8) + 3) for i in range(8, size // 16))
        return _avalanche(total + mix(size - 16, 136 - 17))
    return _long(data, seed)


def _long(data: bytes, seed: int) -> int:
    pairs = [
        ((_u64(_SECRET, 16 * i) + seed) & _M, (_u64(_SECRET, 16 * i + 8) - seed) & _M)
        for i in range(12)
    ]
    secret = b"".join(struct.pack("<QQ", *pair) for pair in pairs)
    keys = [np.frombuffer(secret, "<u8", 8, 8 * i) for i in range(17)]
    last_key = np.frombuffer(secret, "<u8", 8, 192 - 64 - 7)
    acc = np.array(
        [_P32[3], _P64[1], _P64[2], _P64[3], _P64[4], _P32[2], _P64[5], _P32[1]], np.uint64
    )
    low, half, shift = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(47)
    swap = np.arange(8) ^ 1

    def accumulate(stripe: bytes, key: NDArray[np.uint64]) -> None:
        nonlocal acc
        values = np.frombuffer(stripe, "<u8")
        mixed = values ^ key
        acc = acc + values[swap] + (mixed & low) * (mixed >> half)

    blocks = (len(data) - 1) // 1024
    for i in range(0, len(data) - 1 - (len(data) - 1) % 64, 64):
        accumulate(data[i : i + 64], keys[i // 64 % 16])
        if i % 1024 == 960 and i // 1024 < blocks:
            acc = (acc ^ acc >> shift ^ keys[16]) * np.uint64(_P32[1])
    accumulate(data[-64:], last_key)
    lanes = [int(a) for a in acc]
    total = len(data) * _P64[1]
    for i in range(4):
        total += _fold(
            lanes[2 * i] ^ _u64(secret, 11 + 16 * i), lanes[2 * i + 1] ^ _u64(secret, 19 + 16 * i)
        )
    return _avalanche(total)


# --- Values ---


class ReadError(Exception):
    """What is wrong: ``kind`` is one of format, checksum, truncated, version, calibration."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def need(condition: Any, message: str, kind: str = "format") -> None:
    """Raise unless the condition holds."""
    if not condition:
        raise ReadError(kind, message)


def f8(bits: NDArray[np.uint8], exponent_bits: int) -> NDArray[np.float32]:
    """E4M3 without infinity, or E5M2."""
    mantissa_bits = 7 - exponent_bits
    bias = (1 << (exponent_bits - 1)) - 1
    table = np.empty(256, np.float32)
    for code in range(256):
        exponent, mantissa = (
            code >> mantissa_bits & (1 << exponent_bits) - 1,
            code & (1 << mantissa_bits) - 1,
        )
        top = (1 << exponent_bits) - 1
        if exponent_bits == 5 and exponent == top:
            value = float("nan") if mantissa else float("inf")
        elif exponent_bits == 4 and code & 127 == 127:
            value = float("nan")
        elif exponent:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        else:
            value = mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias)
        table[code] = -value if code >> 7 else value
    return table[bits]


def to_f32(raw: NDArray[Any], dtype: int) -> NDArray[np.float32]:
    """Stored elements as binary32."""
    match dtype:
        case 3:
            return (raw.astype(np.uint32) << 16).view(np.float32)
        case 4 | 5:
            return f8(raw, 4 if dtype == 4 else 5)
    return raw.astype(np.float32)


def rounded(x: NDArray[np.float32], dtype: int) -> NDArray[np.float32]:
    """To the output dtype, to nearest even, as binary32."""
    if dtype == 2:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    if dtype == 3:
        bits = x.view(np.uint32).astype(np.uint64)
        bits += 0x7FFF + (bits >> 16 & 1)
        return np.where(np.isnan(x), x, (bits >> 16 << 16).astype(np.uint32).view(np.float32))
    need(dtype == 1, "8-bit output is left out of this reader")
    return x


ELEMENTS = {1: "<f4", 2: "<f2", 3: "<u2", 4: "u1", 5: "u1"}


class Bytes:
    """Fields one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def raw(self, size: int) -> bytes:
        need(size <= len(self.data) - self.at, "a field runs over the end")
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.raw(struct.calcsize("<" + layout)))

    def one(self, layout: str) -> Any:
        return self.unpack(layout)[0]

    def text(self) -> str:
        return self.raw(self.one("H")).decode()

    def digest(self) -> bytes:
        size = self.one("B")
        need(size in (0, 32), "a digest has 0 or 32 bytes")
        return self.raw(size)

    def end(self) -> None:
        need(self.at == len(self.data), "bytes are left over")


# --- Calibration file (section 22) ---


@dataclass
class Calibration:
    """Arrays by name, and the description."""

    digest: bytes
    description: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def read_calibration(path: Path) -> Calibration:
    """A safetensors file, with its digest checked."""
    data = path.read_bytes()
    size = _u64(data, 0)
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    kinds = {
        "F16": ("<f2", "float16"),
        "F32": ("<f4", "float32"),
        "F64": ("<f8", "float64"),
        "U8": ("u1", "uint8"),
        "U16": ("<u2", "uint16"),
        "I32": ("<i4", "int32"),
        "F8_E4M3": ("u1", "float8_e4m3fn"),  # made numbers of where they are needed
    }
    text = metadata["kvtc_calibration"]
    sha = hashlib.sha256(text.encode())
    arrays = {}
    for name in sorted(header):
        entry = header[name]
        kind, of_digest = kinds[entry["dtype"]]
        begin, end = entry["data_offsets"]
        raw = data[8 + size + begin : 8 + size + end]
        arrays[name] = np.frombuffer(raw, kind).reshape(entry["shape"])
        sha.update(f"\n{name} {of_digest} {list(entry['shape'])}\n".encode() + raw)
    need(sha.hexdigest() == metadata["sha256"], "the calibration was changed", "checksum")
    return Calibration(sha.digest(), json.loads(text), arrays)


# --- Opening (sections 4 to 6) ---

#: Required features, and bits of a block's contents.
LAYER_ERRORS, AXES, PLANES, SEALED_PAGES = 1, 2, 16, 64


@dataclass
class Table:
    frequencies: NDArray[np.float32]
    interleaved: bool
    scale: float
    #: The axis of each pair; empty without axes.
    axes: list[int]


@dataclass
class Section:
    layers: list[int]
    heads: int
    k_dim: int
    v_dim: int
    tables: list[Table | None]
    axes: int


@dataclass
class Part:
    k_layers: list[int]
    v_layers: list[int]
    #: Size, quantiser, step.
    bands: list[tuple[int, int, int]]


@dataclass
class Header:
    dtype: int
    out_dtype: int
    block_tokens: int
    calibration: bytes
    sections: list[Section]
    plans: list[tuple[str, list[Part]]]
    scales: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    metadata: Any


def read_header(data: bytes, features: int) -> Header:
    b = Bytes(data)
    dtype, out_dtype, _coder, reserved, _sinks, _window, block_tokens = b.unpack("BBBBIII")
    need(dtype in ELEMENTS and out_dtype in ELEMENTS, "unknown element type", "version")
    need(reserved == 0 and block_tokens >= 1, "reserved bytes, or no tokens in a block")
    calibration = b.raw(32)
    b.digest()
    b.text(), b.text(), b.digest()
    tables: list[Table] = []
    for _ in range(b.one("H")):
        pairs, flags, scale = b.unpack("HBf")
        need(flags < 4 and (flags < 2 or features & AXES), "flags of a rotary table")
        frequencies = np.array(b.unpack(f"{pairs}f"), np.float32)
        axes = list(b.unpack(f"{pairs}B")) if flags & 2 else []
        need(flags < 2 or 0 < max(axes) < 8, "axes of a rotary table")
        tables.append(Table(frequencies, bool(flags & 1), scale, axes))
    need(any(t.axes for t in tables) == bool(features & AXES), "axes in spite of the features")
    sections = []
    for _ in range(b.one("H")):
        count, heads, k_dim, v_dim = b.unpack("HIII")
        layers = list(b.unpack(f"{count}I"))
        own = [None if n == 65535 else tables[n] for n in b.unpack(f"{count}H")]
        counts = {max(t.axes) + 1 for t in own if t and t.axes}
        need(len(counts) <= 1, "tables of a section with other numbers of axes")
        sections.append(Section(layers, heads, k_dim, v_dim, own, max(counts, default=0)))
    plans = read_plan(b.raw(b.one("I")), sections)
    scales = []
    if dtype in (4, 5):
        for s in sections:
            grid = [np.array(b.unpack(f"{len(s.layers) * s.heads}f"), np.float32) for _ in range(2)]
            scales.append(tuple(g.reshape(len(s.layers), s.heads, 1, 1) for g in grid))
    metadata = json.loads(b.raw(b.one("I")))
    b.end()
    return Header(
        dtype,
        out_dtype,
        block_tokens,
        calibration,
        sections,
        plans,
        scales,
        metadata,  # type: ignore[arg-type]
    )


def read_plan(data: bytes, sections: list[Section]) -> list[tuple[str, list[Part]]]:
    b = Bytes(data)
    need(b.raw(4) == b"KVTP" and b.one("H") == 2, "no plan of version 2", "version")
    b.text()
    need(b.one("H") == len(sections), "a plan for other sections")
    plans = []
    for section in sections:
        basis = b.text()
        b.unpack("fff")
        parts = []
        for _ in range(b.one("H")):
            k_layers = list(b.unpack(f"{b.one('H')}H"))
            v_layers = list(b.unpack(f"{b.one('H')}H"))
            bands = []
            for _ in range(b.one("I")):
                size, quantiser = b.unpack("IB")
                need(quantiser <= 4, "unknown quantiser", "version")
                bands.append((size, quantiser, b.one("B") if quantiser == 4 else 0))
            width = section.heads * (len(k_layers) * section.k_dim + len(v_layers) * section.v_dim)
            need(sum(band[0] for band in bands) <= width, "bands cover more than there is")
            parts.append(Part(k_layers, v_layers, bands))
        plans.append((basis, parts))
    b.end()
    return plans


# --- Records and blocks (sections 7, 8, 12 to 16) ---


@dataclass
class Block:
    section: int
    start: int
    role: int
    positions: NDArray[np.int64]
    verbatim: NDArray[np.int64]
    coder: int
    verbatim_coder: int
    coded_size: int
    coded: bytes
    verbatim_bytes: bytes
    cut: tuple[int, int]
    #: [tokens, axes], with no axes if keys have none.
    axes: NDArray[np.int64]
    #: [4, layers]: K mean and worst, V mean and worst; ``None`` where they are not stored.
    layer_errors: NDArray[np.float64] | None


@dataclass
class Stream:
    header: Header
    blocks: list[Block] = field(default_factory=list)
    users: list[bytes] = field(default_factory=list)


def read_stream(data: bytes) -> Stream:
    """All of it, every checksum and rule verified."""

    def take(at: int, size: int) -> bytes:
        need(at + size <= len(data), "the stream ends early", "truncated")
        return data[at : at + size]

    need(data[:8] == b"\x8bKVT\r\n\x1a\n"[: len(data)], "this is no stream")
    opening = take(0, 40)
    major, minor, must, _may, algorithm, size, seed = struct.unpack_from("<HHIIIQQ", opening, 8)
    need(major == 1 and algorithm == 1, "another version", "version")
    need(must & ~(LAYER_ERRORS | AXES | PLANES) == 0 and (minor or not must), "features", "version")
    body = take(40, size)
    need(xxh3(opening[:32] + body) == seed, "preamble and header", "checksum")
    stream = Stream(read_header(body, must))
    count = len(stream.header.sections)
    tokens, position, stage = [0] * count, [-1] * count, [0] * count
    before_tail: dict[int, tuple[int, int, int]] = {}
    entries: list[bytes] = []
    at, ended = 40 + size, False
    while True:
        if ended and data[at : at + 4] != b"KVTR":
            need(at == len(data), "bytes follow the stream")
            return stream
        head = take(at, 32)
        magic, kind, flags, section, sequence, reserved, length, own = struct.unpack(
            "<4sBBHIIQQ", head
        )
        need(magic == b"KVTR", "no record")
        need(xxh3(head[:24], seed) == own, "record header", "checksum")
        need(sequence == len(entries), "records are out of order")
        need(kind in (1, 2, 4) or flags == 1, "unknown record", "version")
        need(reserved == 0 and flags == (kind >= 64), "flags or reserved bytes")
        need((kind == 4) == ended, "SUPERSEDE follows a trailer, and nothing else")
        payload = take(at + 32, length)
        need(xxh3(payload, own) == _u64(take(at + 32 + length, 8), 0), "payload", "checksum")
        entry = struct.pack("<QQB71x", at, length + 40, kind)
        if kind == 1:
            block, rest = read_block(payload, section, stream.header, must)
            kept = slice(block.cut[0], len(block.positions) - block.cut[1])
            own_positions = block.positions[kept]
            order = {1: 0, 0: 1, 2: 2}[block.role]
            need(block.start == tokens[section], "tokens are missing")
            need(own_positions[0] > position[section], "positions do not rise")
            need(order >= stage[section], "a role comes too late")
            if block.role == 2:
                before = tokens[section], position[section], stage[section]
                before_tail.setdefault(section, before)
            tokens[section] += len(own_positions)
            position[section], stage[section] = int(own_positions[-1]), order
            exact = int(((block.verbatim >= kept.start) & (block.verbatim < kept.stop)).sum())
            entry = struct.pack(
                "<QQBBBxHxxIIQqqQQ16s",
                *(at, length + 40, kind, block.role, rest[0], section),
                *(len(own_positions), exact, block.start),
                *(int(own_positions[0]), int(own_positions[-1])),
                *(len(block.coded), len(block.verbatim_bytes), rest[1]),
            )
            stream.blocks.append(block)
        elif kind == 2:
            need(payload == struct.pack("<I", len(entries)) + b"".join(entries), "the index lies")
            trailer = take(at + 40 + length, 40)
            index, total, records, zero, check = struct.unpack_from("<QQIIQ", trailer)
            need(trailer[32:] == b"KVTEND\r\n", "no trailer")
            need(xxh3(trailer[:24], seed) == check, "trailer", "checksum")
            expected = (at, at + 80 + length, len(entries) + 1, 0)
            need((index, total, records, zero) == expected, "the trailer lies")
            at += 40
        elif kind == 4:
            b = Bytes(payload)
            b.digest()
            b.end()
            stream.blocks = [x for x in stream.blocks if x.role != 2]
            for number, before in before_tail.items():
                tokens[number], position[number], stage[number] = before
            before_tail.clear()
        elif kind == 64:
            stream.users.append(payload)
        ended = kind == 2
        entries.append(entry)
        at += 40 + length


def read_block(
    payload: bytes, section: int, header: Header, features: int
) -> tuple[Block, tuple[int, bytes]]:
    b = Bytes(payload)
    need(section < len(header.sections), "no such section")
    n, v, start, first, role, listed, measure, coder, verbatim_coder = b.unpack("IIQqBBBBB")
    contents = b.one("B")
    allowed = features & (LAYER_ERRORS | AXES)
    need(contents & ~allowed == 0 and b.raw(2) == bytes(2), "contents or reserved bytes")
    need(role <= 2 and measure <= 2 and max(coder, verbatim_coder) <= 5, "unknown", "version")
    need(coder != 5, "PLANES does not code symbols")
    if verbatim_coder == 5:
        need(features & PLANES and header.dtype == 3, "PLANES without its feature, or dtype")
    coded_size, coded_length, verbatim_length = b.unpack("QQQ")
    errors = b.raw(16)
    front, end = b.unpack("II")
    need(n >= 1 and v <= n and front + end < n and listed <= 1, "counts")
    need(role != 0 or n <= header.block_tokens, "too many tokens")
    need(role == 0 or v == n, "sinks and tails are verbatim")
    positions = np.arange(first, first + n)
    if listed:
        positions = np.array((first, *b.unpack(f"{n - 1}q")), np.int64)
        need((np.diff(positions) > 0).all() and positions[-1] - first != n - 1, "positions")
    need(first >= 0, "positions")
    verbatim = np.arange(n if v == n else 0)
    if 0 < v < n:
        bits = np.unpackbits(np.frombuffer(b.raw(-(-n // 8)), np.uint8), bitorder="little")
        verbatim = np.flatnonzero(bits)
        need(len(verbatim) == v and verbatim[-1] < n, "bitmap")
    shape = header.sections[section]
    axes = np.repeat(positions[:, None], shape.axes, axis=1)
    if contents & AXES:
        axes = read_axes(b, positions, shape.axes)
    layer_errors = None
    if contents & LAYER_ERRORS:
        need(v < n, "errors by layer of no coded token")
        codes = np.frombuffer(b.raw(4 * len(shape.layers)), np.uint8).reshape(4, -1)
        need((codes[::2] <= codes[1::2]).all(), "a mean above the worst")
        layer_errors = np.ldexp(1 + codes % 16 / 16, codes.astype(np.int64) // 16 - 12)
        layer_errors[codes == 0], layer_errors[codes == 255] = 0, np.inf
    coded, exact = b.raw(coded_length), b.raw(verbatim_length)
    b.end()
    values = np.frombuffer(errors, "<f4")
    need((np.isfinite(values) & (values >= 0)).all() and (measure or not values.any()), "errors")
    block = Block(
        *(section, start, role, positions, verbatim, coder, verbatim_coder),
        *(coded_size, coded, exact, (front, end), axes, layer_errors),
    )
    return block, (measure, errors)


def read_axes(b: Bytes, positions: NDArray[np.int64], expected: int) -> NDArray[np.int64]:
    """Positions on axes, [tokens, axes]."""
    kind, count = b.unpack("BB")
    need(1 <= kind <= 5, "unknown kind of positions on axes", "version")
    need(count == expected and count, "another number of axes")
    own = [int(p) for p in positions]
    if kind == 1:
        shift = b.one("q")
        need(shift, "a shift of nothing")
        found = [[p + shift] * count for p in own]
    else:
        found = [list(b.unpack(f"{count}q"))]
        steps = []
        for _ in own[1:]:
            step = b.unpack(f"{count}{'bhiq'[kind - 2]}")
            steps += step
            found.append([a + d for a, d in zip(found[-1], step, strict=True)])
        shifts = {a - p for p, row in zip(own, found, strict=True) for a in row}
        need(len(shifts) > 1, "listed, where they are shifted")
        if kind > 2:
            half = 1 << (8 << kind - 3) - 1
            need(not all(-half <= d < half for d in steps), "steps that fewer bits can hold")
    need(all(0 <= a < 1 << 63 for row in found for a in row), "a position on an axis")
    return np.array(found, np.int64)


# --- Coders (section 11) ---


def decompress(coder: int, data: bytes, size: int) -> bytes:
    """Exactly ``size`` bytes."""
    need(coder == 0 or len(data) < size, "coded data that are not shorter")
    try:
        match coder:
            case 0:
                found = data
            case 1:
                inflate = zlib.decompressobj(-15)
                found = inflate.decompress(data, size + 1)
                need(inflate.eof and not inflate.unused_data, "DEFLATE data")
            case 2:
                need(zstandard.frame_content_size(data) == size, "ZSTD size")
                found = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
            case 3:
                found = lz4.block.decompress(data, uncompressed_size=size)
            case 5:
                found = decode_planes(data, size // 2)
            case _:
                raise ReadError("format", "RANS does not code bytes")
    except (zlib.error, zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise ReadError("format", str(error)) from None
    need(len(found) == size, "another size")
    return found


def decode_planes(data: bytes, count: int) -> bytes:
    """Low bytes, then high bytes, of ``count`` elements (section 11.2)."""
    b = Bytes(data)
    tiles = [min(8192, count - first) for first in range(0, count, 8192)]
    heads = [b.unpack("3H9BB") for _ in tiles]
    exponents, open_ends = [], []
    for size, (*head, reserved) in zip(tiles, heads, strict=True):
        table = head[3:]
        need(reserved == 0 and len(set(table)) == 9, "the head of a tile")
        found = np.full(size, -1)
        left = np.arange(size)
        for level in range(3):
            need(head[level] <= len(left), "more go on than there are")
            pairs = [b.unpack("II") for _ in range(-(-len(left) // 32))]
            low, high = (
                np.unpackbits(
                    np.array([p[i] for p in pairs], "<u4").view(np.uint8), bitorder="little"
                )
                for i in (0, 1)
            )
            digits = low.astype(int) + 2 * high
            need(not digits[len(left) :].any(), "bits beyond the last element")
            digits = digits[: len(left)]
            named = digits < 3
            found[left[named]] = np.array(table)[3 * level + digits[named]]
            left = left[~named]
            need(len(left) == head[level], "another number goes on")
        exponents.append(found)
        open_ends.append((left, table))
    rests = np.frombuffer(b.raw(count), np.uint8).astype(int)
    for found, (left, table) in zip(exponents, open_ends, strict=True):
        spelt = np.frombuffer(b.raw(len(left)), np.uint8)
        need(not np.isin(spelt, table).any(), "an exponent that the table has")
        found[left] = spelt
    b.end()
    exponent = np.concatenate([np.empty(0, int), *exponents])
    element = (rests & 0x7F) | (rests & 0x80) << 8 | exponent << 7
    return element.astype(np.uint8).tobytes() + (element >> 8).astype(np.uint8).tobytes()


def decode_tile(
    data: bytes, classes: NDArray[np.uint8], ids: NDArray[np.uint8], families: NDArray[np.uint16]
) -> NDArray[np.int64]:
    """Symbols [tokens, components]; ``ids`` [classes, components]."""
    count, components = len(classes), ids.shape[1]
    out = np.zeros((count, components), np.int64)
    if not count:
        need(not data, "a tile of no tokens has no bytes")
        return out
    lanes = min(32, count)
    need(len(data) >= 4 * lanes and len(data) % 2 == 0, "a tile is too short")
    states = list(struct.unpack_from(f"<{lanes}I", data))
    need(min(states) >= 1 << 16, "a state is too small")
    words = list(struct.unpack_from(f"<{(len(data) - 4 * lanes) // 2}H", data, 4 * lanes))[::-1]
    slots = [np.repeat(np.arange(256), f) for f in families]
    starts = np.cumsum(families, axis=1, dtype=np.int64) - families

    def word() -> int:
        need(words, "words are missing")
        return words.pop()

    def signed(value: int, bits: int) -> int:
        return value - (1 << bits) if value >> (bits - 1) else value

    for first in range(0, count, 32):
        tokens = range(first, min(first + 32, count))
        for c in range(components):
            columns = []
            for lane, token in enumerate(tokens):
                family = ids[classes[token], c]
                slot = states[lane] % 4096
                column = int(slots[family][slot])
                states[lane] = (
                    int(families[family][column]) * (states[lane] // 4096)
                    + slot
                    - int(starts[family][column])
                )
                columns.append(column)
            for lane in range(len(columns)):
                if states[lane] < 1 << 16:
                    states[lane] = states[lane] << 16 | word()
            wide = []
            for lane, token in enumerate(tokens):
                out[token, c] = columns[lane] - 127
                if columns[lane] == 255:
                    out[token, c] = value = signed(word(), 16)
                    family = families[ids[classes[token], c]]
                    need(abs(value) > 127 or not family[value + 127], "an escape in vain")
                    if value == -32768:
                        wide.append(token)
            for token in wide:
                out[token, c] = value = signed(word() | word() << 16, 32)
                need(abs(value) > 32767, "a long escape in vain")
    need(not words and all(s == 1 << 16 for s in states), "a tile does not end as it should")
    return out


# --- Coefficients (section 9) ---

QUARTERS = [
    float.fromhex(x)
    for x in ("0x1p0", "0x1.306fe0a31b715p0", "0x1.6a09e667f3bcdp0", "0x1.ae89f995ad3adp0")
]


class Decoder:
    """Blocks of a stream to values, with its calibration."""

    def __init__(self, header: Header, calibration: Calibration) -> None:
        need(header.calibration == calibration.digest, "another calibration", "calibration")
        self.header, self.calibration = header, calibration
        self.prefixes = [self._prefixes(i) for i in range(len(header.sections))]

    def _prefixes(self, section: int) -> list[str]:
        """What the names of the calibration's arrays begin with, for each part of the plan."""
        layers = self.header.sections[section].layers
        basis, parts = self.header.plans[section]
        sections = self.calibration.description["sections"]
        of = [i for i, s in enumerate(sections) if {*layers} <= {*s["layers"]}]
        need(of, "layers that the calibration has in no one section")
        numbers = sections[of[0]]["layers"]
        stored = [
            [[numbers[j] for j in p[name]] for name in ("k_layers", "v_layers")]
            for p in sections[of[0]]["bases"][basis]
        ]
        wanted = [[[layers[j] for j in x] for x in (p.k_layers, p.v_layers)] for p in parts]
        need(all(x in stored for x in wanted), "a part that the calibration has not")
        return [f"{of[0]}.{basis}.{stored.index(x)}." for x in wanted]

    def components(self, section: Section, prefix: str) -> NDArray[np.float64]:
        """[rank, width], from one matrix or from those of two levels."""
        arrays = self.calibration.arrays
        if prefix + "components" in arrays:
            return self.matrix(prefix + "components")
        of, basis, part = prefix.split(".")[:3]
        levels = self.calibration.description["sections"][int(of)]["bases"][basis][int(part)]
        counts, leading = levels["levels"]["layers"], levels["levels"]["leading"]
        need(levels["k_layers"] == levels["v_layers"], "two levels of other K and V layers")
        layers, k, v = sum(counts), section.heads * section.k_dim, section.heads * section.v_dim
        above, below, first = [], [], 0
        for g, (count, n) in enumerate(zip(counts, leading, strict=True)):
            columns = [*range(first * k, (first + count) * k)]
            columns += range(layers * k + first * v, layers * k + (first + count) * v)
            whole = np.zeros((len(arrays[f"{prefix}local.{g}"]), layers * (k + v)))
            whole[:, columns] = self.matrix(f"{prefix}local.{g}")
            above.append(whole[:n])
            below.append(whole[n:])
            first += count
        second = self.matrix(prefix + "second") @ np.concatenate(above)
        return np.concatenate([second, *below])[arrays[prefix + "order"]]

    def matrix(self, name: str) -> NDArray[np.float64]:
        """A matrix of components, in 16 bits or in 8."""
        arrays = self.calibration.arrays
        if arrays[name].dtype != np.uint8:
            return arrays[name].astype(np.float64)
        found = f8(arrays[name], 4).astype(np.float64)
        residuals = f8(arrays[f"{name}.residuals"], 4).astype(np.float64)
        found[: len(residuals)] += residuals / 16
        factors = arrays[f"{name}.rows"][:, None].astype(np.float64) * arrays[f"{name}.columns"]
        return found * factors

    def symbols(self, block: Block) -> tuple[bytes, list[NDArray[np.float32]]]:
        """What the golden manifest has the SHA-256 of, and coefficients [tokens, components]."""
        _, parts = self.header.plans[block.section]
        count = len(block.positions) - len(block.verbatim)
        if not count:
            need(not block.coded and not block.coded_size, "symbols of no token")
            return b"", [np.zeros((0, sum(b[0] for b in p.bands)), np.float32) for p in parts]
        if any(b[1] == 4 for p in parts for b in p.bands):
            return self._uniform(block, parts, count)
        need(block.coder != 4, "RANS codes uniform bands")
        return self._bands(block, parts, count)

    def _bands(
        self, block: Block, parts: list[Part], n: int
    ) -> tuple[bytes, list[NDArray[np.float32]]]:
        data = decompress(block.coder, block.coded, block.coded_size)
        b = Bytes(data)
        coded = [[band for band in p.bands if band[1]] for p in parts]
        low = [b.raw(2 * len(c) * n) for c in coded]
        high = [b.raw(2 * len(c) * n) for c in coded]
        codes: list[dict[int, Any]] = [{} for _ in parts]
        for quantiser, per_byte in ((1, 4), (2, 2), (3, 1)):
            for j, c in enumerate(coded):
                rows = sum(size for size, q, _ in c if q == quantiser)
                width = -(-n // per_byte)
                raw = np.frombuffer(b.raw(rows * width), np.uint8).reshape(rows, width)
                bits = 8 // per_byte
                shifts = np.arange(per_byte, dtype=np.uint8) * bits
                spread = (raw[:, :, None] >> shifts & (1 << bits) - 1).reshape(
                    rows, width * per_byte
                )
                need(not spread[:, n:].any(), "filling bits")
                codes[j][quantiser] = f8(raw, 4) if quantiser == 3 else spread[:, :n]
        b.end()
        out = []
        for j, part in enumerate(parts):
            count = len(coded[j])
            halves = np.stack([np.frombuffer(x, np.uint8) for x in (low[j], high[j])], axis=1)
            parameters = halves.tobytes()
            scale, shift = np.frombuffer(parameters, "<f2").reshape(2, count, n)
            need(np.isfinite(scale).all() and np.isfinite(shift).all(), "scale or shift")
            values = np.zeros((n, sum(b[0] for b in part.bands)), np.float32)
            at, band, used = 0, 0, {1: 0, 2: 0, 3: 0}
            for size, quantiser, _ in part.bands:
                if quantiser:
                    first = used[quantiser]
                    rows = codes[j][quantiser][first : first + size].astype(np.float32)
                    need(np.isfinite(rows).all(), "an FP8 code that is no number")
                    used[quantiser] += size
                    values[:, at : at + size] = (
                        shift[band].astype(np.float32) + rows * scale[band].astype(np.float32)
                    ).T
                    band += 1
                at += size
            out.append(values)
        return data, out

    def _uniform(
        self, block: Block, parts: list[Part], n: int
    ) -> tuple[bytes, list[NDArray[np.float32]]]:
        need(block.coder == 4, "uniform bands are coded with RANS")
        b = Bytes(block.coded)
        step, level, reserved, per_tile = b.unpack("fbBH")
        need(np.isfinite(step) and step > 0 and not reserved and per_tile, "head of the payload")
        counts = [sum(size for size, q, _ in p.bands if q == 4) for p in parts]
        need(block.coded_size == n * sum(counts), "number of symbols")
        tiles = [-(-c // per_tile) for c in counts]
        lengths = list(b.unpack(f"{sum(tiles)}I"))
        data = [b.raw(length) for length in lengths]
        classes = []
        for _ in parts:
            raw = np.frombuffer(b.raw(-(-n // 2)), np.uint8)
            both = np.stack([raw & 15, raw >> 4], axis=1).ravel()
            need(not both[n:].any(), "bits after the last class")
            classes.append(both[:n])
        b.end()
        listed, out, all_symbols = iter(data), [], b""
        for j, part in enumerate(parts):
            prefix = self.prefixes[block.section][j] + "uniform."
            ids = self.calibration.arrays[prefix + "ids"]
            families = self.calibration.arrays[prefix + "frequencies"]
            bases, components, at = [], [], 0
            for size, quantiser, base in part.bands:
                if quantiser == 4:
                    components += range(at, at + size)
                    bases += [base] * size
                at += size
            rows = np.clip(np.array(bases, np.int64) + level, 0, len(ids) - 1)
            own = np.array([ids[r, :, c] for r, c in zip(rows, components, strict=True)])
            own = own.reshape(-1, 16).T
            pieces = [
                decode_tile(next(listed), classes[j], own[:, i : i + per_tile], families)
                for i in range(0, len(components), per_tile)
            ]
            symbols = np.concatenate([np.zeros((n, 0), np.int64), *pieces], axis=1)
            need((abs(symbols) <= 1 << 24).all(), "a symbol beyond 2^24")
            exponents = np.array(bases, np.int64)[None] + classes[j][:, None]
            with np.errstate(over="ignore"):
                steps = np.ldexp(step * np.array(QUARTERS)[exponents % 4], exponents // 4)
                values = symbols.astype(np.float32) * steps.astype(np.float32)
            need(np.isfinite(values).all(), "a value that is not finite")
            whole = np.zeros((n, at), np.float32)
            whole[:, components] = values
            out.append(whole)
            all_symbols += symbols.astype("<i4").tobytes() + classes[j].tobytes()
        return all_symbols, out

    # --- Values (sections 10, 20 and 22) ---

    def values(self, block: Block) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """K and V [layers, heads, tokens, dim] as binary32, of the tokens that were not cut."""
        header, s = self.header, self.header.sections[block.section]
        n = len(block.positions)
        shape = (len(s.layers), s.heads, n)
        k = np.zeros((*shape, s.k_dim), np.float32)
        v = np.zeros((*shape, s.v_dim), np.float32)
        kept = np.setdiff1d(np.arange(n), block.verbatim)
        _, parts = header.plans[block.section]
        _, coefficients = self.symbols(block)
        for j, part in enumerate(parts):
            prefix = self.prefixes[block.section][j]
            arrays = self.calibration.arrays
            components = self.components(s, prefix)
            rows = coefficients[j].astype(np.float64) @ components[: coefficients[j].shape[1]]
            at = 0
            mean = arrays[prefix + "mean"]
            for target, layers, dim, name in (
                (k, part.k_layers, s.k_dim, "k_weights"),
                (v, part.v_layers, s.v_dim, "v_weights"),
            ):
                for i, layer in enumerate(layers):
                    for head in range(s.heads):
                        piece = rows[:, at : at + dim]
                        if prefix + name in arrays:
                            weights = arrays[prefix + name][i, head].astype(np.float64)
                            piece = np.linalg.solve(weights.T, piece.T).T
                        target[layer, head, kept] = piece + mean[at : at + dim]
                        at += dim
        for layer, table in enumerate(s.tables):
            if table is not None:
                turned = block.axes[:, table.axes] if table.axes else block.positions[:, None]
                k[layer][:, kept] = rotate(k[layer][:, kept], turned[kept], table)
        k, v = rounded(k, header.out_dtype), rounded(v, header.out_dtype)
        if len(block.verbatim):
            for x, exact in zip((k, v), self.verbatim(block), strict=True):
                x[:, :, block.verbatim] = exact
        span = slice(block.cut[0], n - block.cut[1])
        return k[:, :, span], v[:, :, span]

    def verbatim(self, block: Block) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        header, s = self.header, self.header.sections[block.section]
        kind = np.dtype(ELEMENTS[header.dtype])
        count = len(block.verbatim) * len(s.layers) * s.heads
        size = count * (s.k_dim + s.v_dim) * kind.itemsize
        data = decompress(block.verbatim_coder, block.verbatim_bytes, size)
        planes = np.frombuffer(data, np.uint8).reshape(kind.itemsize, -1)
        raw = np.frombuffer(planes.T.tobytes(), kind)
        out = []
        for i, (part, dim) in enumerate(
            ((raw[: count * s.k_dim], s.k_dim), (raw[count * s.k_dim :], s.v_dim))
        ):
            x = to_f32(part, header.dtype).reshape(len(s.layers), s.heads, -1, dim)
            if header.scales:
                x = rounded(x * header.scales[block.section][i], header.out_dtype)
            out.append(x)
        return out[0], out[1]


def rotate(
    x: NDArray[np.float32], positions: NDArray[np.int64], table: Table
) -> NDArray[np.float32]:
    """Put RoPE on x [heads, tokens, dim]; positions [tokens, pairs], or [tokens, 1]."""
    angles = positions.astype(np.float64) * table.frequencies.astype(np.float64)
    c = (np.cos(angles) * table.scale).astype(np.float32)
    s = (np.sin(angles) * table.scale).astype(np.float32)
    n = len(table.frequencies)
    first = np.arange(0, 2 * n, 2) if table.interleaved else np.arange(n)
    second = first + 1 if table.interleaved else first + n
    out = x.copy()
    out[..., first] = x[..., first] * c - x[..., second] * s
    out[..., second] = x[..., second] * c + x[..., first] * s
    return out


def read_page(
    data: bytes, header: bytes, key: bytes | None = None, identity: bytes = b""
) -> tuple[Header, Block]:
    """A page, under a header's bytes (section 23), and its seal, if there is a key (23.1)."""
    need(len(data) >= 72, "a page ends early", "truncated")
    magic, major, minor, must = struct.unpack_from("<8sHHI", data)
    context, section, reserved, algorithm, size, own = struct.unpack_from("<32sHHIQQ", data, 16)
    need(magic == b"\x8bKVP\r\n\x1a\n", "this is no page")
    need(major == 1 and algorithm == 1, "another version", "version")
    known = LAYER_ERRORS | AXES | PLANES | SEALED_PAGES
    need(must & ~known == 0 and (minor or not must), "features", "version")
    need(xxh3(data[:64]) == own and not reserved, "page header", "checksum")
    need(context == hashlib.sha256(header).digest(), "another header", "calibration")
    end = 80 + size
    need(len(data) >= end + 32 * bool(must & SEALED_PAGES), "a page ends early", "truncated")
    need(xxh3(data[72 : 72 + size], own) == _u64(data, 72 + size), "page payload", "checksum")
    if key is not None:
        text = b"kvtc page seal 1\0" + hashlib.sha256(identity).digest() + data[:end]
        need(bool(must & SEALED_PAGES), "a page without a seal", "authentication")
        need(hmac.digest(key, text, "sha256") == data[end : end + 32], "seal", "authentication")
    found = read_header(header, must)
    block, _ = read_block(data[72 : 72 + size], section, found, must)
    used = block.layer_errors is not None, block.verbatim_coder == 5
    stated = bool(must & LAYER_ERRORS), bool(must & PLANES)
    need(used == stated, "a feature that the page does not use")
    need(block.role == 0 and not block.start and block.cut == (0, 0), "block of a page")
    return found, block


if __name__ == "__main__":
    stream = read_stream(Path(sys.argv[1]).read_bytes())
    decoder = Decoder(stream.header, read_calibration(Path(sys.argv[2])))
    for block in stream.blocks:
        k, v = decoder.values(block)
        print(block.section, block.start, k.shape, v.shape, float(abs(k).max()))
