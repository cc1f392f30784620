"""Make the golden streams of a version. Run once per version, by hand; it never overwrites.

    python tests/golden/make.py tests/golden/1.0
    python tests/golden/make.py tests/golden/1.0-two-levels --two-levels
    python tests/golden/make.py tests/golden/1.1 --later
    python tests/golden/make.py tests/golden/1.1-eight-bits --two-levels --eight-bits
    python tests/golden/make.py tests/golden/1.1-planes --planes
    python tests/golden/make.py tests/golden/1.1-sealed --sealed

``manifest.json`` says what each file must give: for a stream or page, the SHA-256 of the symbols
of each block, and a file with K and V as float32 [layers, heads, tokens, dim], little-endian; for
a bad one, the kind of fault. "symbols" of a block are the payload before compression or, of
uniform bands, for each part the symbols as int32 [tokens, components] and the classes as uint8.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import warnings
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
import second_reader
from formats_samples import records, reseal
from symbols import block_symbols

import kvtc_stream as kvtc
from kvtc_stream.coding import verbatim
from kvtc_stream.formats import (
    Block,
    Coder,
    DType,
    Feature,
    LayerErrors,
    StreamFile,
    StreamHeader,
    StreamWriter,
)
from kvtc_stream.formats.page import pack_page, unpack_page
from kvtc_stream.stream.encoder import page_header

warnings.simplefilter("ignore")
KEY = b"golden key"


def main(folder: Path, two_levels: bool, eight_bits: bool) -> None:
    """Write every file; fails if one is there. Of two levels, one stream."""
    folder.mkdir(parents=True)
    cases: list[dict[str, Any]] = []
    geometry = kvtc.Geometry(
        (
            kvtc.Section((0, 2), 2, 4, 2, (kvtc.Rope.from_theta(10_000, 4), None)),
            kvtc.Section((1,), 1, 4, 4, (kvtc.Rope.from_theta(500, 2, interleaved=True),)),
        )
    )
    options: dict[str, Any] = {"layer_groups": 2, "second_level": 9} if two_levels else {}
    if eight_bits:
        options["basis_dtype"] = "float8_e4m3"
    model = kvtc.ModelIdentity("golden", "1")
    calibrator = kvtc.Calibrator(geometry, model=model, **options)
    for section in range(2):
        calibrator.update(
            *kvtc.testing.drawn_cache(geometry, 200, seed=1, section=section), section=section
        )
    calibration = calibrator.finish()
    calibration.save(folder / "calibration.safetensors")

    def add(name: str, data: bytes) -> bytes:
        (folder / name).write_bytes(data)
        file = StreamFile(io.BytesIO(data))
        blocks = [
            {
                "section": e.section,
                "role": e.role.name,
                "start": e.start,
                "tokens": e.tokens,
                "symbols": hashlib.sha256(
                    block_symbols(file.header, file.read_block(e), calibration)
                ).hexdigest(),
            }
            | described(file.read_block(e))
            for e in file.index
        ]
        values = b""
        with kvtc.open(data, calibration=calibration) as reader:
            for section in range(2):
                for x in reader.read(section=section):
                    values += np.asarray(x).astype("<f4").tobytes()
        (folder / f"{name}.f32").write_bytes(values)
        cases.append({"file": name, "blocks": blocks, "values": f"{name}.f32"})
        return data

    def cache(dtype: DType, section: int, tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        k, v = kvtc.testing.drawn_cache(geometry, tokens, seed=7, section=section, dtype=dtype)
        return k.copy(), v.copy()

    def stream(codec: kvtc.Codec, dtype: DType, **options: Any) -> bytes:
        encoder = kvtc.Encoder(codec, **options)
        data = b""
        for section, tokens in ((0, 44), (1, 60)):
            k, v = cache(dtype, section, tokens)
            if dtype is not DType.FLOAT8_E4M3FN:
                k[0, 0, 9, 0] = np.nan  # a token that is verbatim
                v[0, 0, 11] *= 30  # one beyond the tables
            positions = np.arange(tokens) * 3 if section else None
            data += encoder.encode(k, v, positions=positions, section=section)
        return data + encoder.finish()

    common = {"sinks": 2, "window": 3, "block_tokens": 36}
    default = kvtc.Codec(calibration, ratio=3, **common)
    whole = add("default.kvtc", stream(default, DType.BFLOAT16, metadata={"n": 1}))

    def manifest() -> None:
        text = json.dumps({"version": folder.name, "key": KEY.hex(), "cases": cases}, indent=1)
        (folder / "manifest.json").write_text(text + "\n")

    if two_levels:
        manifest()
        return
    add("default-float32.kvtc", stream(default, DType.FLOAT32, token_digest=bytes(range(32))))
    add("authenticated.kvtc", stream(default, DType.FLOAT16, key=KEY))
    for coder in ("deflate", "zstd", "lz4", "stored"):
        paper = kvtc.Codec(calibration, "paper", ratio=3, coder=coder, **common)
        add(f"paper-{coder}.kvtc", stream(paper, DType.BFLOAT16))
    scales = [np.full((2, 2), 0.5, np.float32), np.full((1, 1), 2.0, np.float32)]
    add("fp8.kvtc", stream(paper, DType.FLOAT8_E4M3FN, k_scale=scales, v_scale=scales))
    add("empty.kvtc", kvtc.Encoder(default).finish())
    file = io.BytesIO(whole)
    with kvtc.open(file, "ab", codec=default) as writer:
        writer.write(*cache(DType.BFLOAT16, 0, 50))
    continued = add("continued.kvtc", file.getvalue())
    out = io.BytesIO()
    kvtc.cut(continued, out, positions=slice(5, 70))
    add("cut.kvtc", out.getvalue())
    opened = StreamFile(io.BytesIO(whole))
    writer = StreamWriter(opened.header)
    data = writer.start() + writer.user(b"a user's own")
    data += b"".join(writer.block(opened.read_block(e)) for e in opened.index) + writer.finish()
    add("user.kvtc", data)

    pages = kvtc.PageCodec(default, dtype="bfloat16")
    k, v = cache(DType.BFLOAT16, 0, 34)
    page = pages.encode(k, v, positions=100)
    (folder / "page.kvp").write_bytes(page)
    header = page_header(default, DType.BFLOAT16, None, None, None)
    (folder / "page.header").write_bytes(header.pack())
    block = pages.block(page)
    values = b"".join(np.asarray(x).astype("<f4").tobytes() for x in (block.k, block.v))
    (folder / "page.kvp.f32").write_bytes(values)
    symbols = hashlib.sha256(block_symbols(header, unpack_page(page, header), calibration))
    cases.append(
        {
            "file": "page.kvp",
            "header": "page.header",
            "symbols": symbols.hexdigest(),
            "values": "page.kvp.f32",
        }
    )

    def bad(name: str, data: bytes, error: str) -> None:
        (folder / name).write_bytes(data)
        cases.append({"file": name, "error": error})

    def patched(offset: int, layout: str, *values: int) -> bytes:
        changed = bytearray(whole)
        struct.pack_into("<" + layout, changed, offset, *values)
        return reseal(changed)

    starts = records(whole)
    flipped = bytearray(whole)
    flipped[starts[2] + 200] ^= 16
    bad("bad-flipped-bit.kvtc", bytes(flipped), "checksum")
    bad("bad-cut-off.kvtc", whole[: len(whole) // 2], "truncated")
    bad("bad-no-trailer.kvtc", whole[:-40], "truncated")
    bad("bad-version.kvtc", patched(8, "H", 2), "version")
    bad("bad-feature.kvtc", patched(12, "I", 1), "version")
    bad("bad-record-type.kvtc", patched(starts[1] + 4, "B", 9), "version")
    bad("bad-order.kvtc", patched(starts[1] + 8, "I", 5), "format")
    bad("bad-start.kvtc", patched(starts[1] + 32 + 8, "Q", 3), "format")
    bad("bad-index.kvtc", patched(starts[-1] + 36 + 24, "I", 1), "format")
    bad("bad-calibration.kvtc", patched(40 + 16, "B", whole[56] ^ 1), "calibration")
    bad("bad-superseding.kvtc", patched(starts[1] + 4, "B", 4), "format")
    manifest()


def later(folder: Path) -> None:
    """What format 1.1 added: errors by layer in a stream and in a page, positions on axes.

    Keys that turn with several axes have values by the second reader.
    """
    folder.mkdir(parents=True)
    cases: list[dict[str, Any]] = []
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=2, head_dim=8, v_head_dim=4)
    calibrator = kvtc.Calibrator(geometry, model=kvtc.ModelIdentity("golden", "1"))
    calibrator.update(*kvtc.testing.drawn_cache(geometry, 200, seed=1))
    calibration = calibrator.finish()
    calibration.save(folder / "calibration.safetensors")
    other = second_reader.read_calibration(folder / "calibration.safetensors")
    codec = kvtc.Codec(calibration, ratio=3, sinks=0, window=0, block_tokens=36)
    k, v = kvtc.testing.drawn_cache(geometry, 90, seed=7, dtype=DType.BFLOAT16)

    def errors(block: Block) -> LayerErrors:
        """Measured on the values of the second reader; every token is coded."""
        kept = slice(block.start, block.start + block.tokens)
        found = second_reader.Decoder(second_reader.read_header(header.pack(), 0), other).values(
            second_reader.read_block(b"".join(block.pack()), 0, plain, 0)[0]
        )
        rows = []
        for x, y in zip((k, v), found, strict=True):
            exact = x[:, :, kept].astype(np.float64)
            relative = np.sqrt(((y - exact) ** 2).sum(axis=(1, 3)) / (exact**2).sum(axis=(1, 3)))
            rows += [relative.mean(axis=1), relative.max(axis=1)]
        return LayerErrors.of(*rows)

    def add(name: str, header: StreamHeader, blocks: list[Block]) -> bytes:
        writer = StreamWriter(header)
        data = writer.start() + b"".join(map(writer.block, blocks)) + writer.finish()
        (folder / name).write_bytes(data)
        found = []
        for block in blocks:
            symbols = block_symbols(header, block, calibration)
            found.append(
                {
                    "section": 0,
                    "role": block.role.name,
                    "start": block.start,
                    "tokens": block.tokens,
                    "symbols": hashlib.sha256(symbols).hexdigest(),
                }
                | described(block)
            )
        stream = second_reader.read_stream(data)
        decoder = second_reader.Decoder(stream.header, other)
        values = [decoder.values(block) for block in stream.blocks]
        (folder / f"{name}.f32").write_bytes(
            b"".join(
                np.concatenate(x, axis=2).astype("<f4").tobytes() for x in zip(*values, strict=True)
            )
        )
        case = {"file": name, "blocks": found, "values": f"{name}.f32"}
        cases.append(case | ({"axes": True} if header.features & Feature.AXES else {}))
        return data

    coded = StreamFile(io.BytesIO(kvtc.encode(k, v, codec)))
    header, plain = coded.header, second_reader.read_header(coded.header.pack(), 0)
    blocks = [coded.read_block(entry) for entry in coded.index]
    measured = [replace(block, layer_errors=errors(block)) for block in blocks]
    add("layer-errors.kvtc", replace(header, features=Feature.LAYER_ERRORS), measured)

    # Ten tokens of text, a picture of four by six, text.
    grid = np.indices((1, 4, 6)).reshape(3, -1) + 10
    text = np.tile(np.arange(90 - 34) + 16, (3, 1))
    axes = np.concatenate([np.tile(np.arange(10), (3, 1)), grid, text], axis=1)
    rope = kvtc.Rope((1.0, 0.3, 0.1, 0.03), axes=(0, 1, 2, 2))
    turned = replace(geometry.sections[0], rope=(rope, kvtc.Rope((1.0, 0.5), axes=(2, 0))))
    whole = add(
        "axes.kvtc",
        replace(header, geometry=kvtc.Geometry((turned,)), features=Feature.LAYER_ERRORS),
        [
            replace(
                block,
                layer_errors=block.layer_errors if i < 2 else None,
                axes=tuple(array("q", a[block.start : block.start + block.tokens]) for a in axes),
            )
            for i, block in enumerate(measured)
        ],
    )

    page = pack_page(measured[0], header)
    (folder / "page.kvp").write_bytes(page)
    (folder / "page.header").write_bytes(header.pack())
    found, block = second_reader.read_page(page, header.pack())
    values = second_reader.Decoder(found, other).values(block)
    (folder / "page.kvp.f32").write_bytes(b"".join(x.astype("<f4").tobytes() for x in values))
    cases.append(
        {
            "file": "page.kvp",
            "header": "page.header",
            "symbols": hashlib.sha256(block_symbols(header, measured[0], calibration)).hexdigest(),
            "values": "page.kvp.f32",
        }
        | described(measured[0])
    )

    def bad(name: str, offset: int, layout: str, value: int, error: str) -> None:
        changed = bytearray(whole)
        struct.pack_into("<" + layout, changed, offset, value)
        (folder / name).write_bytes(reseal(changed))
        cases.append({"file": name, "error": error})

    bad("bad-minor.kvtc", 10, "H", 0, "version")
    bad("bad-feature.kvtc", 12, "I", 7, "version")
    bad("bad-no-axes.kvtc", 12, "I", 1, "format")
    payload = records(whole)[0] + 32
    bad("bad-contents.kvtc", payload + 29, "B", 7, "format")
    bad("bad-axes-kind.kvtc", payload + 80, "B", 6, "version")
    bad("bad-axes-count.kvtc", payload + 81, "B", 2, "format")
    # After the kind and the number of axes, first positions, and steps of a byte.
    bad("bad-layer-errors.kvtc", payload + 80 + 2 + 3 * (8 + 35), "B", 255, "format")
    text = json.dumps({"version": folder.name, "key": KEY.hex(), "cases": cases}, indent=1)
    (folder / "manifest.json").write_text(text + "\n")


def planes(folder: Path) -> None:
    """Verbatim values that a device decodes: tokens of a block, and a tail of two tiles."""
    folder.mkdir(parents=True)
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=2, head_dim=8, v_head_dim=4)
    calibrator = kvtc.Calibrator(geometry, model=kvtc.ModelIdentity("golden", "1"))
    calibrator.update(*kvtc.testing.drawn_cache(geometry, 200, seed=1))
    calibration = calibrator.finish()
    calibration.save(folder / "calibration.safetensors")
    codec = kvtc.Codec(calibration, ratio=3, sinks=2, window=200, block_tokens=200)
    k, v = (x.copy() for x in kvtc.testing.drawn_cache(geometry, 440, seed=7, dtype=DType.BFLOAT16))
    k[0, 0, 9:40:2, 0] = np.nan  # tokens that are verbatim
    coded = StreamFile(io.BytesIO(kvtc.encode(k, v, codec)))
    blocks = []
    for entry in coded.index:
        block = coded.read_block(entry)
        own = block.start + np.array(block.verbatim_tokens)
        bits = np.concatenate([x[:, :, own].reshape(-1).view(np.uint16) for x in (k, v)])
        payload = verbatim.encode(bits).tobytes()
        if len(payload) < bits.nbytes:
            block = replace(block, verbatim_coder=Coder.PLANES, verbatim=payload)
        blocks.append(block)
    writer = StreamWriter(coded.header)
    whole = writer.start() + b"".join(map(writer.block, blocks)) + writer.finish()
    (folder / "planes.kvtc").write_bytes(whole)
    (folder / "planes.kvtc.f32").write_bytes(
        b"".join(np.asarray(x).astype("<f4").tobytes() for x in kvtc.decode(whole, calibration))
    )
    rows = [
        {
            "section": 0,
            "role": block.role.name,
            "start": block.start,
            "tokens": block.tokens,
            "symbols": hashlib.sha256(block_symbols(coded.header, block, calibration)).hexdigest(),
        }
        | described(block)
        for block in blocks
    ]
    cases: list[dict[str, Any]] = [
        {"file": "planes.kvtc", "blocks": rows, "values": "planes.kvtc.f32"}
    ]
    payload = records(whole)[2] + 32
    at = payload + 80

    def bad(name: str, offset: int, layout: str, value: int, error: str) -> None:
        changed = bytearray(whole)
        struct.pack_into("<" + layout, changed, offset, value)
        (folder / name).write_bytes(reseal(changed))
        cases.append({"file": name, "error": error})

    bad("bad-feature.kvtc", 12, "I", 1, "format")
    bad("bad-symbols.kvtc", payload + 27, "B", 5, "format")
    bad("bad-count.kvtc", at, "H", 8193, "format")
    bad("bad-table.kvtc", at + 7, "B", whole[at + 6], "format")
    bad("bad-reserved.kvtc", at + 15, "B", 1, "format")
    bad("bad-digits.kvtc", at + 32, "Q", 2**64 - 1, "format")
    text = json.dumps({"version": folder.name, "key": KEY.hex(), "cases": cases}, indent=1)
    (folder / "manifest.json").write_text(text + "\n")


def sealed(folder: Path) -> None:
    """A sealed page; values are the second reader's."""
    folder.mkdir(parents=True)
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=2, head_dim=4)
    calibrator = kvtc.Calibrator(geometry, model=kvtc.ModelIdentity("golden", "1"))
    calibrator.update(*kvtc.testing.drawn_cache(geometry, 200, seed=1))
    calibration = calibrator.finish()
    calibration.save(folder / "calibration.safetensors")
    codec = kvtc.Codec(calibration, ratio=3, block_tokens=36)
    identity = b"a tenant and a hash"
    page = kvtc.PageCodec(codec, dtype="bfloat16", key=KEY).encode(
        *kvtc.testing.drawn_cache(geometry, 34, seed=7, dtype=DType.BFLOAT16),
        positions=100,
        identity=identity,
    )
    (folder / "page.kvp").write_bytes(page)
    header = page_header(codec, DType.BFLOAT16, None, None, None)
    (folder / "page.header").write_bytes(header.pack())
    found, block = second_reader.read_page(page, header.pack(), KEY, identity)
    other = second_reader.read_calibration(folder / "calibration.safetensors")
    values = second_reader.Decoder(found, other).values(block)
    (folder / "page.kvp.f32").write_bytes(b"".join(x.astype("<f4").tobytes() for x in values))
    symbols = block_symbols(header, unpack_page(page, header), calibration)
    case = {
        "file": "page.kvp",
        "header": "page.header",
        "identity": identity.hex(),
        "symbols": hashlib.sha256(symbols).hexdigest(),
        "values": "page.kvp.f32",
    }
    text = json.dumps({"version": folder.name, "key": KEY.hex(), "cases": [case]}, indent=1)
    (folder / "manifest.json").write_text(text + "\n")


def described(block: Block) -> dict[str, Any]:
    """What a block has beyond format 1.0, for the manifest."""
    found: dict[str, Any] = {}
    if block.axes:
        found["axes"] = [list(axis) for axis in block.axes]
    if block.layer_errors is not None:
        found["layer_errors"] = block.layer_errors.codes.hex()
    return found


if __name__ == "__main__":
    if "--later" in sys.argv[2:]:
        later(Path(sys.argv[1]))
    elif "--sealed" in sys.argv[2:]:
        sealed(Path(sys.argv[1]))
    elif "--planes" in sys.argv[2:]:
        planes(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), "--two-levels" in sys.argv[2:], "--eight-bits" in sys.argv[2:])
