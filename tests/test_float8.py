"""Bases in 8 bits: what rounding does to a matrix, the file, and what it costs in a stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import second_reader
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

import kvtc_stream as kvtc
from kvtc_stream.calibration import file
from kvtc_stream.calibration.calibrator import BasisDType
from kvtc_stream.calibration.float8 import E4M3, Float8Matrix, dual

GEOMETRY = kvtc.Geometry.uniform(
    layers=4, kv_heads=2, head_dim=8, rope=kvtc.Rope.from_theta(1e4, 8)
)
SHAPES: dict[str, dict[str, Any]] = {
    "one level": {},
    "groups": {"layer_groups": 2},
    "two levels": {"layer_groups": 2, "second_level": 40},
}


def calibrated(dtype: str, **options: Any) -> kvtc.Calibration:
    calibrator = kvtc.Calibrator(GEOMETRY, basis_dtype=dtype, **options)
    rng = np.random.default_rng(0)
    for seed in range(4):
        k, v = kvtc.testing.drawn_cache(GEOMETRY, 512, seed=seed)
        calibrator.update(k, v)
        gradients = (rng.standard_normal(x.shape, dtype=np.float32) for x in (k, v))
        calibrator.update_gradients(k, v, *gradients)
    return calibrator.finish()


@pytest.fixture(scope="module", params=SHAPES)
def small(request: pytest.FixtureRequest) -> kvtc.Calibration:
    return calibrated("float8_e4m3", **SHAPES[request.param])


@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.floats(-30, 30),
    st.integers(0, 2**32 - 1),
)
def test_elements_are_rounded(rows: int, columns: int, exponent: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_normal((rows, columns)) * 2.0**exponent).astype(np.float32)
    matrix[rng.random(matrix.shape) < 0.1] = 0
    found = Float8Matrix.of(matrix)
    peaks = np.abs(matrix).max(axis=1, keepdims=True)
    lost = np.abs(found.values() - matrix)
    # Half of the last of four bits; below the smallest normal number, of that one's.
    assert (lost <= np.maximum(np.abs(matrix) / 16, peaks * 2.0**-17)).all()
    two = len(found.residuals)
    assert two == -(-rows // 16)
    assert (lost[:two] <= np.maximum(np.abs(matrix) / 256, peaks * 2.0**-20)[:two]).all()
    assert (np.exp2(np.rint(np.log2(found.rows))) == found.rows).all()


def test_a_dual_finds_coefficients() -> None:
    """What it projects with, against what the matrix expands: the identity, to second order."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((300, 120)))
    matrix = Float8Matrix.of(q.T).values()
    off, better = (np.linalg.norm(m @ matrix.T - np.eye(120), 2) for m in (matrix, dual(matrix)))
    assert 0.02 < off < 0.2
    assert better < 1.5 * off**2


def test_the_file(tmp_path: Path, small: kvtc.Calibration) -> None:
    path = tmp_path / "small.safetensors"
    small.save(path)
    loaded = kvtc.Calibration.load(path)
    assert loaded == small
    description = json.loads(file.description(loaded))
    assert description["version"] == 5
    for name, parts in loaded.sections[0].bases.items():
        for entry, part in zip(description["sections"][0]["bases"][name], parts, strict=True):
            assert entry["component_type"] == "float8_e4m3fn"
            assert part.eight_bits
            for a in part.components.local:
                assert a.codes.dtype == E4M3
    own = second_reader.read_calibration(path)
    assert own.digest == small.digest


def test_matrices_take_half_of_the_bytes() -> None:
    matrix = np.zeros((1024, 2048), np.float16)
    assert Float8Matrix.of(matrix).nbytes < 0.54 * matrix.nbytes


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_streams(tmp_path: Path, small: kvtc.Calibration, preset: str) -> None:
    """Of every preset; another reader finds the same values."""
    small.save(tmp_path / "small.safetensors")
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 200, seed=9)
    data = kvtc.encode(k, v, kvtc.Codec(small, preset, ratio=4, window=20, block_tokens=64))
    stream = second_reader.read_stream(data)
    calibration = second_reader.read_calibration(tmp_path / "small.safetensors")
    decoder = second_reader.Decoder(stream.header, calibration)
    blocks = [decoder.values(block) for block in stream.blocks]
    for found, theirs in zip(kvtc.decode(data, small), zip(*blocks, strict=True), strict=True):
        np.testing.assert_allclose(found, np.concatenate(theirs, axis=2), atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"layer_groups": 2, "second_level": 128}])
def test_what_it_costs(options: dict[str, Any]) -> None:
    """Streams of the same size have hardly larger errors. Rows without a second term, or those of
    the rounded matrix itself in the place of a dual, cost several times as much."""
    geometry = kvtc.Geometry.uniform(layers=4, kv_heads=2, head_dim=16)
    rng = np.random.default_rng(0)
    # Variance falls as in a model's cache, with directions that all layers share.
    q, _ = np.linalg.qr(rng.standard_normal((256, 256)))
    deviations = np.arange(1, 257) ** -0.9

    def drawn(tokens: int) -> list[Any]:
        rows = (rng.laplace(size=(tokens, 256)) * deviations) @ q
        x = rows.astype(np.float32).reshape(tokens, 2, 4, 2, 16)
        return [x[:, i].transpose(1, 2, 0, 3) for i in range(2)]

    learnt, tested = drawn(3000), drawn(1000)
    lost = []
    for dtype in get_args(BasisDType):
        calibrator = kvtc.Calibrator(
            geometry, basis_dtype=dtype, bases=("joint",), rank=128, **options
        )
        calibrator.update(*learnt)
        calibration = calibrator.finish()
        data = kvtc.encode(*tested, kvtc.Codec(calibration, ratio=12, window=0, sinks=0))
        back = kvtc.decode(data, calibration)
        squares = sum(np.square(a - b).sum() for a, b in zip(back, tested, strict=True))
        lost.append(float(squares) * len(data) ** 2)
    assert lost[1] < 1.02 * lost[0]


def rewrite(path: Path, change: Callable[[Any, Any], None]) -> None:
    """Change a file's description or arrays, with the digest put right."""
    content = kvtc.Calibration.load(path)
    arrays = dict(file.arrays_of(content))
    description = json.loads(file.description(content))
    change(description["sections"][0]["bases"]["joint"][0], arrays)
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    metadata = {"kvtc_calibration": text, "sha256": "0" * 64}
    path.write_bytes(save({n: np.ascontiguousarray(a) for n, a in arrays.items()}, metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, _: d.update(component_type="float4"), "of type 'float4'"),
        (lambda d, _: d.pop("component_type"), "expected float16"),
        (lambda _, a: a.pop("0.joint.0.components.rows"), "malformed"),
        (lambda _, a: a.pop("0.joint.0.components.residuals"), "malformed"),
        (
            lambda _, a: a.update({"0.joint.0.components.columns": np.ones(3, np.float32)}),
            "columns: found float32",
        ),
        (
            lambda _, a: a.update({"0.joint.0.components.rows": np.full(64, np.nan, np.float32)}),
            "rows",
        ),
        (
            lambda _, a: a.update(
                {"0.joint.0.components": np.full((64, 64), np.nan, np.float32).astype(E4M3)}
            ),
            "components",
        ),
        (
            lambda _, a: a.update(
                {"0.joint.0.components.residuals": np.zeros((999, 128), np.float32).astype(E4M3)}
            ),
            "999 residuals",
        ),
    ],
)
def test_hostile_files(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "small.safetensors"
    calibrated("float8_e4m3", bases=("joint",)).save(path)
    rewrite(path, change)
    with pytest.raises(kvtc.FormatError, match=message) as refusal:
        kvtc.Calibration.load(path)
    assert not isinstance(refusal.value, kvtc.ChecksumError)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="basis_dtype must be one of float16, float8_e4m3"):
        kvtc.Calibrator(GEOMETRY, basis_dtype="int8")  # type: ignore[arg-type]
