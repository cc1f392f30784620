"""Coverage-guided fuzzing: whatever the bytes, only ``KVTCError``.

    pip install atheris
    python tests/fuzz/fuzz.py stream -max_total_time=3600 tests/fuzz/corpus/stream

Targets: ``stream`` (file, pipe and recovery, with checksums as they are and made right, decoded),
``container`` (its structure, by three readers that must agree), ``page``, ``coders`` (each coder of
bytes, and rANS) and ``calibration``. ``--seeds`` writes the corpus anew. What is found becomes a
test.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import struct
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import atheris
import numpy as np
import xxhash

sys.path.insert(0, str(Path(__file__).parents[1]))
FOLDER = Path(__file__).parent

import second_reader  # noqa: E402
from damage import restore  # noqa: E402
from formats_samples import later_stream, reseal, small_stream, write  # noqa: E402

import kvtc_stream as kvtc  # noqa: E402
from kvtc_stream.coding import rans, verbatim  # noqa: E402
from kvtc_stream.formats import (  # noqa: E402
    Block,
    Coder,
    Feature,
    LayerErrors,
    Role,
    StreamFile,
    StreamParser,
    decompress,
)
from kvtc_stream.formats.page import pack_page, unpack_page  # noqa: E402

#: Modules whose coverage guides; compiled kernels cannot.
GUIDES = (
    *("block", "block_errors", "coders", "features", "file_reader", "geometry", "header", "index"),
    *("page", "parser", "plan", "positions", "preamble", "record", "wire", "writer"),
)


def instrument() -> None:
    """Count branches of the functions and methods that read bytes."""
    modules = [f"kvtc_stream.formats.{name}" for name in GUIDES]
    modules += [
        f"kvtc_stream.{name}"
        for name in (
            "backends.cpu_payloads",
            "calibration.file",
            "coding.payload",
            "stream.encoder",
        )
    ]
    for name in modules:
        module = importlib.import_module(name)
        for owner in (module, *(c for c in vars(module).values() if isinstance(c, type))):
            if getattr(owner, "__module__", name) != name:
                continue
            for value in list(vars(owner).values()):
                function = getattr(value, "__func__", value)
                if isinstance(function, types.FunctionType) and function.__module__ == name:
                    atheris.instrument_func(function)


warnings.simplefilter("ignore")
LIMITS = kvtc.Limits(max_block_bytes=1 << 20, max_record_bytes=1 << 20)
GEOMETRY = kvtc.Geometry.uniform(
    layers=2, kv_heads=1, head_dim=2, rope=kvtc.Rope.from_theta(10_000, 2)
)


def small_calibration() -> kvtc.Calibration:
    calibrator = kvtc.Calibrator(GEOMETRY)
    calibrator.update(*kvtc.testing.drawn_cache(GEOMETRY, 128, seed=1))
    return calibrator.finish()


CALIBRATION = small_calibration()
CODEC = kvtc.Codec(CALIBRATION, ratio=3, sinks=1, window=2, block_tokens=4)
PAGES = kvtc.PageCodec(CODEC, dtype="float32")
FAMILIES = rans.Families(CALIBRATION.sections[0].bases["joint"][0].uniform.families.frequencies)


def stream(data: bytes) -> None:
    """A reader of a file, block by block and whole, of a pipe, in recovery; then again behind
    right checksums."""
    for way in ({}, {"whole": True}, {"pipe": True}, {"recover": True}):
        with contextlib.suppress(kvtc.KVTCError):
            restore(data, CALIBRATION, **way)
    try:
        right = reseal(data)
    except Exception:  # nothing that has checksums
        return
    for way in ({}, {"whole": True}, {"pipe": True}):
        with contextlib.suppress(kvtc.KVTCError):
            restore(right, CALIBRATION, **way)
    file = io.BytesIO(right)
    try:
        with kvtc.open(file, "ab", codec=CODEC, recover=True) as writer:
            writer.write(*kvtc.testing.drawn_cache(GEOMETRY, 1))
    except (kvtc.KVTCError, TypeError, ValueError):  # another codec's, dtype's or position's
        pass


def container(data: bytes) -> None:
    """The structure alone, as it is and behind right checksums, by three readers.

    What the file's reader takes, the pipe's and the second reader take too, to the same content.
    """
    streams = [data]
    with contextlib.suppress(Exception):  # nothing that has checksums
        streams.append(reseal(data))
    for one in streams:
        try:
            file = StreamFile(io.BytesIO(one), LIMITS)
            blocks = [file.read_block(entry) for entry in file.index]
        except kvtc.KVTCError:
            with contextlib.suppress(kvtc.KVTCError):
                parser = StreamParser(LIMITS)
                parser.feed(one)
                parser.close()
            continue
        parser = StreamParser(LIMITS)
        live: list[Block] = []
        for item in parser.feed(one):
            if isinstance(item, Block):
                live.append(item)
            elif live:  # the stream goes on: its tail is superseded
                live = [block for block in live if block.role is not Role.TAIL]
        parser.close()
        assert live == blocks
        for section in range(len(file.header.geometry.sections)):
            numbers = file.live[file.entries["section"][file.live] == section]
            table = file.read_table(numbers)
            table.verify()
            own = [block for block in blocks if block.section == section]
            assert [table.block(i, verified=True) for i in range(len(table))] == own
        second = second_reader.read_stream(one).blocks
        for block, other in zip(blocks, second, strict=True):
            assert list(block.positions) == other.positions.tolist()
            if block.axes:
                assert [list(axis) for axis in block.axes] == other.axes.T.tolist()
            codes = None if block.layer_errors is None else block.layer_errors.codes
            assert (codes is None) is (other.layer_errors is None)


def page(data: bytes) -> None:
    """A page, and one with right checksums."""
    right = bytearray(data)
    if len(right) > 80:
        struct.pack_into("<Q", right, 64, own := xxhash.xxh3_64_intdigest(bytes(right[:64])))
        (size,) = struct.unpack_from("<Q", right, 56)
        if 80 + size <= len(right):
            value = xxhash.xxh3_64_intdigest(bytes(right[72 : 72 + size]), own)
            struct.pack_into("<Q", right, 72 + size, value)
    for one in (data, bytes(right)):
        try:
            PAGES.decode(one)
            list(PAGES.layers(one))
        except kvtc.KVTCError:
            pass


def coders(data: bytes) -> None:
    """The first bytes choose; the rest is what the coder gets."""
    if len(data) < 4:
        return
    kind, tokens, components, rest = data[0] % 6, data[1] % 40, data[2] % 5, data[3:]
    try:
        if kind < 4:
            decompress(Coder(kind), rest, data[1] * 8 + data[2])
        elif kind == 5:
            verbatim.decode(rest, data[1] * 64 + data[2])
        else:
            ids = np.full((16, components), data[0] % len(FAMILIES.frequencies), np.uint8)
            rans.decode(rest, np.zeros(tokens, np.uint8), ids, FAMILIES)
    except kvtc.KVTCError:
        pass


def calibration(data: bytes) -> None:
    """A calibration file, and again with the digest that its content has."""
    for _ in range(2):
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(data)
            file.flush()
            try:
                kvtc.Calibration.load(file.name)
            except kvtc.ChecksumError as error:
                found = re.search(r"SHA-256 (\w{64}), expected (\w{64})", str(error))
                if not found:
                    return
                data = data.replace(found[2].encode(), found[1].encode())
            except kvtc.KVTCError:
                return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "stream": stream,
    "container": container,
    "page": page,
    "coders": coders,
    "calibration": calibration,
}


def write_seeds() -> None:
    """A few small files a target."""
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 15)
    found: dict[str, list[bytes]] = {name: [] for name in TARGETS}
    file = io.BytesIO()
    for start in (0, 9):
        with kvtc.open(file, "ab" if start else "wb", codec=CODEC) as writer:
            writer.write(k[:, :, start : start + 9], v[:, :, start : start + 9])
    out = io.BytesIO()
    kvtc.cut(file, out, tokens=slice(3, 12))
    found["stream"] = [kvtc.encode(k, v, CODEC), file.getvalue(), out.getvalue()]
    found["stream"].append(kvtc.encode(k, v, CODEC, key=b"a key"))
    for coder in ("deflate", "zstd", "lz4"):
        paper = kvtc.Codec(CALIBRATION, "paper", ratio=3, window=0, block_tokens=8, coder=coder)
        found["stream"].append(kvtc.encode(k, v, paper, positions=np.arange(15) * 2))
    errors = LayerErrors.of([0.1, 0.2], [0.3, 0.4], [0, 0], [1, 20])
    header, *blocks = StreamParser().feed(found["stream"][0])
    blocks = [replace(b, layer_errors=errors if b.coded_tokens else None) for b in blocks]
    found["stream"].append(write(replace(header, features=Feature.LAYER_ERRORS), blocks))
    found["container"] = [small_stream()[0], later_stream()[0]]
    page = PAGES.encode(k[:, :, :4], v[:, :, :4], positions=3)
    measured = replace(unpack_page(page, PAGES._header), layer_errors=errors)
    found["page"] = [page, pack_page(measured, PAGES._header)]
    data = bytes(range(64)) + bytes(136)
    for kind in (Coder.DEFLATE, Coder.ZSTD, Coder.LZ4):
        found["coders"].append(bytes([kind, 25, 0]) + kvtc.formats.compress(kind, data)[1])
    symbols = np.arange(40, dtype=np.int32).reshape(20, 2)
    ids = np.zeros((16, 2), np.uint8)
    tile = rans.encode(symbols, np.zeros(20, np.uint8), ids, FAMILIES)
    found["coders"].append(bytes([4, 20, 2]) + tile)
    values = np.arange(200, dtype=np.uint16) * 331
    found["coders"].append(bytes([5, 3, 8]) + verbatim.encode(values).tobytes())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cal.safetensors"
        CALIBRATION.save(path)
        found["calibration"] = [path.read_bytes()]
    for name, seeds in found.items():
        target = FOLDER / "corpus" / name
        target.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(seeds):
            (target / f"seed{i}").write_bytes(seed)


if __name__ == "__main__":
    if sys.argv[1:] == ["--seeds"]:
        write_seeds()
    else:
        target = TARGETS[sys.argv.pop(1)]
        instrument()
        atheris.Setup(sys.argv, target)
        atheris.Fuzz()
