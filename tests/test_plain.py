"""Plain caches in files."""

from __future__ import annotations

import io
import itertools
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from kvtc_stream.errors import FormatError
from kvtc_stream.formats import DType
from kvtc_stream.io import plain
from kvtc_stream.io.dlpack import numpy_dtype
from kvtc_stream.io.plain import PlainSection

FORMATS = ("npz", "safetensors")
PLAIN_DTYPES = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def random_bits(dtype: DType, *shape: int, seed: int = 0) -> np.ndarray:
    """Every bit pattern may come up: NaN of all kinds, infinities, denormals."""
    rng = np.random.default_rng(seed)
    size = dtype.itemsize
    raw = rng.integers(0, 1 << 8 * size, shape, dtype=np.dtype(f"u{size}"))
    return raw.view(numpy_dtype(dtype))


def section(dtype: DType = DType.FLOAT32, tokens: int = 5, **others: Any) -> PlainSection:
    return PlainSection(
        random_bits(dtype, 2, 3, tokens, 4), random_bits(dtype, 2, 3, tokens, 6, seed=1), **others
    )


def assert_equal(found: PlainSection, expected: PlainSection) -> None:
    for name in ("k", "v", "positions", "k_scale", "v_scale"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(bits(a), bits(b))


@given(
    dtype=st.sampled_from(PLAIN_DTYPES),
    shape=st.tuples(*[st.integers(1, 3)] * 2, st.integers(0, 4), st.integers(1, 5)),
    v_dim=st.integers(1, 5),
    format=st.sampled_from(FORMATS),
    seed=st.integers(0, 1000),
    positioned=st.booleans(),
    sections=st.integers(1, 3),
)
def test_round_trip_through_memory_is_bit_exact(
    dtype, shape, v_dim, format, seed, positioned, sections
):
    written = [
        PlainSection(
            random_bits(dtype, *shape, seed=seed + i),
            random_bits(dtype, *shape[:3], v_dim, seed=seed + 100 + i),
            np.arange(shape[2]) * 3 + i if positioned else None,
        )
        for i in range(sections)
    ]
    file = io.BytesIO()
    plain.write(file, written, format)
    file.seek(0)
    found = plain.read(file, format)
    assert len(found) == sections
    for a, b in zip(found, written, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_through_a_path(tmp_path: Path, format: str):
    written = section(DType.BFLOAT16, positions=np.array([0, 2, 3, 7, 9]))
    path = tmp_path / f"cache.{format}"
    plain.write(path, [written])
    assert_equal(plain.read(path)[0], written)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [DType.FLOAT8_E4M3FN, DType.FLOAT8_E5M2])
def test_fp8_round_trip_with_scales(tmp_path: Path, dtype: DType):
    scale = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    written = section(dtype, k_scale=scale, v_scale=scale * 2)
    plain.write(tmp_path / "x.safetensors", [written])
    [found] = plain.read(tmp_path / "x.safetensors")
    assert found.dtype is dtype
    assert_equal(found, written)
    with pytest.raises(ValueError, match=r"cannot hold float8.*\.safetensors"):
        plain.write(tmp_path / "x.npz", [written])


def test_the_safetensors_package_reads_what_we_write_and_the_other_way_round(tmp_path: Path):
    written = section(DType.BFLOAT16, positions=np.arange(5))
    plain.write(tmp_path / "ours.safetensors", [written])
    with safetensors.safe_open(tmp_path / "ours.safetensors", "np") as file:
        assert set(file.keys()) == {"k", "v", "positions"}
        np.testing.assert_array_equal(bits(file.get_tensor("v")), bits(written.v))
    arrays = {"k": written.k, "v": written.v, "something": np.zeros(3)}
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    assert_equal(plain.read(tmp_path / "theirs.safetensors")[0], PlainSection(written.k, written.v))


def test_numpy_users_read_bfloat16_as_values(tmp_path: Path):
    k = np.linspace(-3, 3, 24).reshape(1, 2, 3, 4).astype(ml_dtypes.bfloat16)
    plain.write(tmp_path / "x.npz", [PlainSection(k, k)])
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["k"].dtype == np.float32
        assert str(archive["dtype"]) == "bfloat16"
        np.testing.assert_array_equal(archive["k"], k.astype(np.float32))


@pytest.mark.parametrize("raw", ["u2", "V2"])
def test_bits_of_bfloat16_are_taken_too(tmp_path: Path, raw: str):
    k = random_bits(DType.BFLOAT16, 1, 2, 3, 4)
    np.savez(tmp_path / "x.npz", k=k.view(raw), v=k.view(raw), dtype="bfloat16")
    assert_equal(plain.read(tmp_path / "x.npz")[0], PlainSection(k, k))


def test_bits_of_fp8_are_taken_too(tmp_path: Path):
    k = random_bits(DType.FLOAT8_E4M3FN, 2, 2, 3, 4)
    arrays = {"k": k.view(np.uint8), "v": k.view(np.uint8), "k_scale": np.array([1.0, 2.0])}
    np.savez(tmp_path / "x.npz", **arrays, dtype="float8_e4m3fn")
    [found] = plain.read(tmp_path / "x.npz")
    np.testing.assert_array_equal(bits(found.k), bits(k))
    assert found.k_scale is not None
    assert found.k_scale.tolist() == [[1, 1], [2, 2]]


def test_a_batch_of_one_is_taken_out(tmp_path: Path):
    k = np.ones((2, 1, 3, 5, 4), np.float32)
    np.savez(tmp_path / "x.npz", k=k, v=k)
    assert plain.read(tmp_path / "x.npz")[0].k.shape == (2, 3, 5, 4)


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": ones(1)}, "holds no cache: expected arrays k and v.*found a"),
        ({"k": ones(1, 1, 1, 2)}, "lacks the array v"),
        ({"k.0": ones(1, 1, 1, 2), "v.1": ones(1, 1, 1, 2)}, r"lacks the array v\.0"),
        ({"k.1": ones(1, 1, 1, 2), "v.1": ones(1, 1, 1, 2)}, "holds no cache"),
        ({"k": ones(1), "v": ones(1), "k.0": ones(1)}, r"both k and k\.0"),
        ({"k": ones(2, 3), "v": ones(2, 3)}, r"k has shape \[2, 3\]; expected \[layers"),
        ({"k": ones(2, 0, 1, 3), "v": ones(2, 0, 1, 3)}, r"k has shape \[2, 0, 1, 3\]"),
        ({"k": ones(1, 1, 2, 2), "v": ones(1, 1, 3, 2)}, "expected one dtype and the same layers"),
        ({"k": ones(1, 1, 2, 2), "v": ones(1, 1, 2, 2, dtype=np.float16)}, "expected one dtype"),
        ({"k": ones(1, 1, 2, 2, dtype=np.float64), "v": ones(1, 1, 2, 2)}, "k has dtype float64"),
        ({"k": ones(1, 1, 2, 2).astype("V2"), "v": ones(1)}, "what numpy makes of bfloat16"),
        (
            {"k": ones(1, 1, 2, 2), "v": ones(1, 1, 2, 2), "positions": ones(2)},
            r"positions is float32 \[2\], expected integers \[2\]",
        ),
        (
            {"k": ones(1, 1, 2, 2), "v": ones(1, 1, 2, 2), "positions": np.arange(3)},
            r"positions is int64 \[3\], expected integers \[2\]",
        ),
        (
            {"k": ones(1, 1, 2, 2), "v": ones(1, 1, 2, 2), "k_scale": ones()},
            "k_scale is for fp8 caches",
        ),
        (
            {"k": ones(1, 1, 2, 2) / 3, "v": ones(1, 1, 2, 2), "dtype": "bfloat16"},
            "says bfloat16, but some float32 values are not",
        ),
        (
            {"k": ones(1, 1, 2, 2), "v": ones(1, 1, 2, 2), "dtype": "float16"},
            "k is float32, but the file says float16",
        ),
        ({"k": ones(1), "v": ones(1), "dtype": "int4"}, "dtype is 'int4', expected one of float32"),
        (
            {
                "k": ones(2, 1, 2, 2, dtype=np.uint8),
                "v": ones(2, 1, 2, 2, dtype=np.uint8),
                "v_scale": ones(3),
                "dtype": "float8_e5m2",
            },
            r"v_scale is float32 \[3\], expected floats \[\], \[2\] or \[2, 1\]",
        ),
    ],
)
def test_what_is_no_cache_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        plain.read(tmp_path / "x.npz")


def test_nothing_is_unpickled(tmp_path: Path):
    np.savez(tmp_path / "x.npz", k=np.array([{"a": 1}], object), v=ones(1))
    with pytest.raises(FormatError, match=r"not a readable \.npz file"):
        plain.read(tmp_path / "x.npz")


def bare_array() -> bytes:
    file = io.BytesIO()
    np.save(file, ones(3))
    return file.getvalue()


def zip_of(member: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, content)
    return file.getvalue()


def with_header(header: Any, data: bytes = bytes(16), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1, 1, 2, 2], "data_offsets": [0, 16]} | changes


@pytest.mark.parametrize(
    ("format", "content"),
    [
        ("npz", b""),
        ("npz", b"no archive at all"),
        ("npz", bare_array()),
        ("npz", zip_of("k.npy", b"\x93NUMPY\x01\x00\x10\x00not a header here")),
        ("safetensors", b""),
        ("safetensors", b"1234567"),
        ("safetensors", b"no safetensors file at all"),
        ("safetensors", with_header({}, length=1 << 40)),
        ("safetensors", with_header(b"[1, 2]")),
        ("safetensors", with_header(b"{")),
        ("safetensors", with_header(b"[" * 100_000)),
        ("safetensors", with_header({"k": 3})),
        ("safetensors", with_header({"k": {}})),
        ("safetensors", with_header({"k": tensor(dtype="F4")})),
        ("safetensors", with_header({"k": tensor(dtype=["F32"])})),
        ("safetensors", with_header({"k": tensor(data_offsets=[0, 20], shape=[5])})),
        ("safetensors", with_header({"k": tensor(data_offsets=[-4, 12])})),
        ("safetensors", with_header({"k": tensor(data_offsets=[0])})),
        ("safetensors", with_header({"k": tensor(shape=[1, 1, 2, 3])})),
        ("safetensors", with_header({"k": tensor(shape=[-1, -4])})),
        ("safetensors", with_header({"k": tensor(shape=[1.0, 4])})),
        ("safetensors", with_header({"k": tensor(shape=4)})),
        ("safetensors", with_header({"k": tensor(shape=[1 << 62, 1 << 62])})),
    ],
    ids=itertools.count(),  # a zip file holds the time it was made
)
def test_damaged_files_are_format_errors(tmp_path: Path, format: str, content: bytes):
    path = tmp_path / f"x.{format}"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"x\.{format} is not a readable \.{format} file"):
        plain.read(path)
    with pytest.raises(FormatError, match="the input is not a readable"):
        plain.read(io.BytesIO(content), format)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files_are_format_errors(tmp_path: Path, format: str):
    file = io.BytesIO()
    plain.write(file, [section()], format)
    for size in range(0, len(file.getvalue()), 41):
        with pytest.raises(FormatError):
            plain.read(io.BytesIO(file.getvalue()[:size]), format)


@pytest.mark.parametrize("format", FORMATS)
def test_joined_files_are_format_errors(format: str):
    """One of the two would be lost silently."""
    parts = []
    for tokens in (5, 7):
        file = io.BytesIO()
        plain.write(file, [section(tokens=tokens)], format)
        parts.append(file.getvalue())
    with pytest.raises(FormatError, match="pass them one by one"):
        plain.read(io.BytesIO(b"".join(parts)), format)
    behind = io.BytesIO(b"PK" + parts[0])
    behind.seek(2)
    [found] = plain.read(behind, format)
    assert found.k.shape[2] == 5


def test_format_comes_from_the_suffix_unless_given():
    assert plain.format_of("a.NPZ") == "npz"
    assert plain.format_of(Path("a.safetensors")) == "safetensors"
    assert plain.format_of("a.bin", "npz") == "npz"
    for file, given_format in (("a.bin", None), (io.BytesIO(), None), ("a.npz", "pt")):
        with pytest.raises(ValueError, match="the format must be one of npz, safetensors"):
            plain.format_of(file, given_format)


def test_a_missing_file_is_an_os_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        plain.read(tmp_path / "x.npz")


def test_sections_of_different_dtypes_are_refused():
    with pytest.raises(ValueError, match="all of one dtype"):
        plain.write(io.BytesIO(), [section(), section(DType.FLOAT16)], "npz")
