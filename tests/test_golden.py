"""Golden streams: every version decodes them to the same symbols, and so does a second reader."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_reader
import xxhash
from symbols import block_symbols

import kvtc_stream as kvtc
from kvtc_stream.coding import rans
from kvtc_stream.formats import Block, Limits, StreamFile, StreamHeader, StreamParser
from kvtc_stream.formats.block_errors import LEVELS
from kvtc_stream.formats.page import unpack_page

GOLDEN = Path(__file__).parent / "golden"
MANIFESTS = {m.parent.name: json.loads(m.read_text()) for m in GOLDEN.glob("*/manifest.json")}
CASES = [(v, c) for v, manifest in MANIFESTS.items() for c in manifest["cases"]]
GOOD = [(v, c) for v, c in CASES if "error" not in c and "header" not in c]
PAGES = [(v, c) for v, c in CASES if "header" in c]
BAD = [(v, c) for v, c in CASES if "error" in c]
KINDS = {
    "checksum": kvtc.ChecksumError,
    "truncated": kvtc.TruncatedError,
    "version": kvtc.VersionError,
    "format": kvtc.FormatError,
    "calibration": kvtc.CalibrationMismatchError,
}


def names(cases: list[tuple[str, Any]]) -> list[str]:
    return [f"{version}/{case['file']}" for version, case in cases]


def calibration(version: str) -> kvtc.Calibration:
    return kvtc.Calibration.load(GOLDEN / version / "calibration.safetensors")


def second(version: str) -> second_reader.Calibration:
    return second_reader.read_calibration(GOLDEN / version / "calibration.safetensors")


def described(block: Block) -> dict[str, Any]:
    """What a block has beyond format 1.0, as the manifest says it."""
    found: dict[str, Any] = {}
    if block.axes:
        found["axes"] = [list(axis) for axis in block.axes]
    if block.layer_errors is not None:
        found["layer_errors"] = block.layer_errors.codes.hex()
    return found


def close(found: bytes, expected: bytes, *, coarse: bool) -> bool:
    """Verbatim values are exact; coded ones may differ by rounding, coarser in 16 bits."""
    x, y = (np.frombuffer(b, "<f4") for b in (found, expected))
    tolerance = 0.01 if coarse else 1e-5
    return np.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_there_are_golden_streams() -> None:
    """An empty folder would make every test here pass."""
    assert {"1.0", "1.1", "1.1-planes"} <= set(MANIFESTS)
    assert len(GOOD) >= 11
    assert len(PAGES) >= 1
    assert {c["error"] for _, c in BAD} == set(KINDS)


@pytest.mark.parametrize(("version", "case"), GOOD, ids=names(GOOD))
def test_streams(version: str, case: dict[str, Any]) -> None:
    data = (GOLDEN / version / case["file"]).read_bytes()
    own = calibration(version)
    file = StreamFile(io.BytesIO(data))
    found = []
    for entry in file.index:
        symbols = block_symbols(file.header, file.read_block(entry), own)
        found.append(
            {
                "section": entry.section,
                "role": entry.role.name,
                "start": entry.start,
                "tokens": entry.tokens,
                "symbols": hashlib.sha256(symbols).hexdigest(),
            }
            | described(file.read_block(entry))
        )
    assert found == case["blocks"]
    if "axes" in case:  # the backends do not know axes
        with pytest.raises(kvtc.UnsupportedError, match="3 axes"):
            kvtc.open(data, calibration=own).read()
        return
    values = b""
    with kvtc.open(data, calibration=own) as reader:
        for section in range(len(file.header.geometry.sections)):
            values += b"".join(
                np.asarray(x).astype("<f4").tobytes() for x in reader.read(section=section)
            )
    expected = (GOLDEN / version / case["values"]).read_bytes()
    assert close(values, expected, coarse=file.header.out_dtype.itemsize == 2)
    parser = StreamParser()
    parser.feed(data)
    parser.close()
    key = bytes.fromhex(MANIFESTS[version]["key"])
    if case["file"].startswith("authenticated"):
        kvtc.open(data, calibration=own, key=key).read()
    else:
        with pytest.raises(kvtc.AuthenticationError):
            kvtc.open(data, calibration=own, key=key)


def read_second(data: bytes, version: str) -> None:
    stream = second_reader.read_stream(data)
    decoder = second_reader.Decoder(stream.header, second(version))
    for block in stream.blocks:
        decoder.values(block)


@pytest.mark.parametrize(("version", "case"), BAD, ids=names(BAD))
def test_bad_streams(version: str, case: dict[str, Any]) -> None:
    data = (GOLDEN / version / case["file"]).read_bytes()
    with pytest.raises(KINDS[case["error"]]):
        list(kvtc.open(data, calibration=calibration(version)))
    with pytest.raises(second_reader.ReadError) as caught:
        read_second(data, version)
    assert caught.value.kind == case["error"]


@pytest.mark.parametrize(("version", "case"), GOOD, ids=names(GOOD))
def test_the_second_reader_agrees(version: str, case: dict[str, Any]) -> None:
    data = (GOLDEN / version / case["file"]).read_bytes()
    stream = second_reader.read_stream(data)
    decoder = second_reader.Decoder(stream.header, second(version))
    found, values = [], [[], []]
    for block in stream.blocks:
        symbols, _ = decoder.symbols(block)
        found.append(hashlib.sha256(symbols).hexdigest())
        values[block.section].append(decoder.values(block))
        stored = case["blocks"][len(found) - 1]
        errors = bytes.fromhex(stored.get("layer_errors", ""))
        assert (block.layer_errors is None) is (not errors)
        if errors:
            levels = [LEVELS[code] for code in errors]
            assert block.layer_errors.ravel().tolist() == levels
        if "axes" in stored:
            assert block.axes.T.tolist() == stored["axes"]
    assert found == [b["symbols"] for b in case["blocks"]]
    out = b"".join(
        np.ascontiguousarray(np.concatenate(x, axis=2)).astype("<f4").tobytes()
        for own in values
        for x in zip(*own, strict=True)
    )
    expected = (GOLDEN / version / case["values"]).read_bytes()
    assert close(out, expected, coarse=stream.header.out_dtype != 1)


@pytest.mark.parametrize(("version", "case"), PAGES, ids=names(PAGES))
def test_pages(version: str, case: dict[str, Any]) -> None:
    folder = GOLDEN / version
    data, header = ((folder / case[name]).read_bytes() for name in ("file", "header"))
    own = StreamHeader.unpack(header, Limits())
    block = unpack_page(data, own)
    assert described(block) == {x: case[x] for x in ("axes", "layer_errors") if x in case}
    symbols = block_symbols(own, block, calibration(version))
    assert hashlib.sha256(symbols).hexdigest() == case["symbols"]
    if "identity" in case:
        key, identity = (bytes.fromhex(x) for x in (MANIFESTS[version]["key"], case["identity"]))
        assert unpack_page(data, own, key=key, identity=identity) == block
        second_reader.read_page(data, header, key, identity)
        for sealed in ({"key": key}, {"key": b"another", "identity": identity}):
            with pytest.raises(kvtc.AuthenticationError):
                unpack_page(data, own, **sealed)
            with pytest.raises(second_reader.ReadError, match="seal"):
                second_reader.read_page(data, header, **sealed)
    found, other = second_reader.read_page(data, header)
    decoder = second_reader.Decoder(found, second(version))
    assert hashlib.sha256(decoder.symbols(other)[0]).hexdigest() == case["symbols"]
    values = b"".join(x.astype("<f4").tobytes() for x in decoder.values(other))
    assert close(values, (folder / case["values"]).read_bytes(), coarse=True)


@pytest.mark.skipif("KVTC_KAITAI" not in os.environ, reason="KVTC_KAITAI names no node_modules")
def test_the_kaitai_description_agrees() -> None:
    """It compiles and reads every good stream; see ``tests/kaitai/check.js``."""
    paths = [GOLDEN / version / case["file"] for version, case in GOOD if "two" not in version]
    run = subprocess.run(
        ["node", str(GOLDEN.parent / "kaitai" / "check.js"), *map(str, paths)],
        env={**os.environ, "NODE_PATH": os.environ["KVTC_KAITAI"]},
        capture_output=True,
        check=True,
    )
    found = json.loads(run.stdout)
    for path in paths:
        file = StreamFile(io.BytesIO(path.read_bytes()))
        items = found[path.name]
        assert [(i["type"], i["length"], i["tokens"]) for i in items] == [
            (e.type, e.length, e.tokens) for e in file.records
        ]
        assert items[-1]["total"] == file.sizes.total


def test_the_second_reader_shares_nothing() -> None:
    """Only what SPEC and its licence to use libraries allow."""
    tree = ast.parse(Path(second_reader.__file__).read_text())
    imports = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imports - set(sys.stdlib_module_names) == {"numpy", "lz4", "zstandard"}


def test_the_second_reader_has_xxh3() -> None:
    rng = random.Random(0)
    for size in [*range(260), 1000, 1024, 1025, 1088, 2048, 2049, 5000]:
        data, seed = rng.randbytes(size), rng.getrandbits(64)
        assert second_reader.xxh3(data, seed) == xxhash.xxh3_64_intdigest(data, seed)


def test_the_second_reader_decodes_escapes() -> None:
    """Symbols of every size, in tiles of any number of tokens."""
    rng = np.random.default_rng(0)
    tables = second("1.0").arrays["0.joint.0.uniform.frequencies"]
    families = rans.Families(tables)
    for tokens in (1, 5, 32, 33, 70):
        size = rng.integers(1, 24, (tokens, 6))
        symbols = (rng.integers(-(2**30), 2**30, (tokens, 6)) >> size).astype(np.int32)
        classes = rng.integers(0, 16, tokens).astype(np.uint8)
        ids = rng.integers(0, len(tables), (16, 6)).astype(np.uint8)
        tile = rans.encode(symbols, classes, ids, families)
        np.testing.assert_array_equal(
            second_reader.decode_tile(tile, classes, ids, tables), symbols
        )


def test_every_flipped_bit_is_an_error_for_the_second_reader() -> None:
    data = (GOLDEN / "1.0" / "empty.kvtc").read_bytes()
    for i in range(0, len(data), 3):
        changed = bytearray(data)
        changed[i] ^= 1 << i % 8
        with pytest.raises(second_reader.ReadError):
            second_reader.read_stream(bytes(changed))
