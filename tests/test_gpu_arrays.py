"""Calibration on a device: the same bodies with NumPy in CuPy's place, and with CuPy."""

from __future__ import annotations

import pickle
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from device_stand_in import NumpyDevice
from real_sample import RealSample

import kvtc_stream as kvtc
from kvtc_stream.calibration import calibrator as module
from kvtc_stream.calibration import principal
from kvtc_stream.calibration.arrays import HOST
from kvtc_stream.calibration.calibrator import BasisDType
from kvtc_stream.calibration.families import SymbolCounter, fit_families
from kvtc_stream.calibration.principal import Moments, leading_eigenvectors
from kvtc_stream.formats import DType, Geometry, Rope, Section
from kvtc_stream.gpu.arrays import DeviceArrays, require_cupy
from kvtc_stream.io.dlpack import numpy_dtype

GB = 10**9
HALVES = Rope.from_theta(1e4, 8)
PAIRS = Rope.from_theta(1e4, 8, interleaved=True)
PARTIAL = Rope.from_theta(5e5, 4)


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def arrays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DeviceArrays:
    """What ``backend="cuda"`` stands for in the test."""
    if request.param == "numpy":
        found = DeviceArrays(NumpyDevice())
    else:
        try:
            found = DeviceArrays()
        except kvtc.BackendUnavailableError as error:
            pytest.skip(str(error))
    monkeypatch.setattr(module, "get_arrays", lambda name: HOST if name == "cpu" else found)
    return found


def calibrators(geometry: Geometry, **options: Any) -> list[kvtc.Calibrator]:
    """One on the CPU, one on the device."""
    return [kvtc.Calibrator(geometry, backend=b, **options) for b in ("cpu", "cuda")]


def gradients(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    size = np.exp(rng.standard_normal((shape[2], 1))) * 1e-5
    return (rng.standard_normal(shape) * size).astype(np.float32)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = np.linalg.norm(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    return float(difference / np.linalg.norm(np.asarray(expected, np.float64)))


# Rows and samples.


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize(
    "rope",
    [
        (),
        (HALVES,) * 3,
        (PAIRS,) * 3,
        (PARTIAL,) * 3,
        (None, HALVES, HALVES),
        (PAIRS, None, PARTIAL),
    ],
)
def test_rows_are_those_of_the_cpu(
    arrays: DeviceArrays, rope: tuple[Any, ...], dtype: DType
) -> None:
    section = Section(layers=(0, 1, 2), kv_heads=2, k_dim=8, v_dim=4, rope=rope)
    rng = np.random.default_rng(1)
    k, v = (rng.standard_normal((3, 2, 30, dim)).astype(numpy_dtype(dtype)) for dim in (8, 4))
    positions = np.sort(rng.choice(10**6, 30, replace=False))
    scales = [None, rng.random((3, 2), np.float32) + 1] if dtype.is_fp8 else [None, None]
    found = []
    for where in (HOST, arrays):
        held = (where.layers(k, "k", 3, 2, 8), where.layers(list(v), "v", 3, 2, 4))
        held = tuple([x[:, 3:] for x in layers] for layers in held)
        found.append(where.get(where.rows(section, held, positions[3:], scales)))
    np.testing.assert_array_equal(found[1], found[0])
    assert found[1].dtype == np.float32


def test_hashes_depend_on_the_row_alone(arrays: DeviceArrays) -> None:
    rows = np.random.default_rng(0).standard_normal((200, 33)).astype(np.float32)
    hashes = arrays.hashes(arrays.put(rows))
    assert hashes.dtype == np.uint64
    assert len(set(hashes.tolist())) == 200
    np.testing.assert_array_equal(arrays.hashes(arrays.put(rows[50:60].copy())), hashes[50:60])
    changed = rows.copy()
    changed[:, 7] = np.nextafter(changed[:, 7], np.float32(9))
    assert not np.isin(arrays.hashes(arrays.put(changed)), hashes).any()
    # Every bit is as often set as not: the rows with the smallest are a fair sample.
    narrow = np.arange(4096, dtype=np.uint16).view(np.float16).reshape(-1, 1)
    bits = arrays.hashes(arrays.put(narrow))[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(
        1
    )
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.05


def test_hashes_are_the_same_everywhere(arrays: DeviceArrays) -> None:
    def mixed(x: int) -> int:
        x = x * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    rows = np.array([[0, 1, -2.5, 3e-9], [7, 7, 7, 7]], np.float32)
    sums = [sum((mixed(i + 1) | 1) * w for i, w in enumerate(r)) for r in rows.view("u4").tolist()]
    assert arrays.hashes(arrays.put(rows)).tolist() == [mixed(s % 2**64) for s in sums]


def test_the_sample_does_not_depend_on_order(arrays: DeviceArrays) -> None:
    geometry = Geometry.uniform(layers=2, kv_heads=2, head_dim=8, rope=HALVES)
    documents = [kvtc.testing.drawn_cache(geometry, 700, seed=i) for i in range(3)]
    one, *apart = (kvtc.Calibrator(geometry, backend="cuda", sample_rows=100) for _ in range(4))
    for document, other in zip(documents, apart, strict=True):
        one.update(*document)
        other.update(*document)
    for other in apart[1:][::-1]:
        apart[0].merge(other)
    samples = [c._sections[0].sample for c in (one, apart[0])]
    np.testing.assert_array_equal(samples[0].hashes, samples[1].hashes)
    np.testing.assert_array_equal(*(arrays.get(s.rows) for s in samples))
    moments = [next(iter(c._sections[0].moments.values())) for c in (one, apart[0])]
    assert relative(*(arrays.get(m.scatter) for m in moments)) < 1e-6


# Moments and bases.


@pytest.mark.parametrize("wide", [False, True])
def test_moments_against_float64(
    arrays: DeviceArrays, monkeypatch: pytest.MonkeyPatch, wide: bool
) -> None:
    """Binary32 products of rows less their mean, even where the mean is large."""
    if wide:
        monkeypatch.setattr(principal, "_WIDE", 500)
        monkeypatch.setattr(principal, "_TALL", 250)
    rng = np.random.default_rng(0)
    deviation = np.exp2(-np.arange(600) / 60)
    rows = (rng.standard_normal((5000, 600)) * deviation + 30 * deviation[::-1]).astype(np.float32)
    moments, others = Moments(600, arrays), Moments(600, arrays)
    for first in range(0, 4500, 900):
        moments.add(arrays.put(rows[first : first + 900]))
        found = arrays.get(moments.scatter)
        assert not wide or (found == found.T).all()
    others.add(arrays.put(rows[4500:]))
    moments.merge(others)
    exact = rows - rows.mean(axis=0, dtype=np.float64)
    expected = exact.T @ exact
    scale = np.sqrt(np.multiply.outer(np.diagonal(expected), np.diagonal(expected)))
    assert (abs(arrays.get(moments.scatter) - expected) / scale).max() < 2e-6


@pytest.mark.parametrize(
    ("with_gradients", "dtype", "second_level", "basis_dtype"),
    [
        (False, DType.FLOAT32, 0, "float16"),
        (True, DType.BFLOAT16, 0, "float16"),
        (True, DType.FLOAT32, 25, "float16"),
        (True, DType.FLOAT32, 25, "float8_e4m3"),
    ],
)
def test_calibrations_agree(
    arrays: DeviceArrays,
    with_gradients: bool,
    dtype: DType,
    second_level: int,
    basis_dtype: BasisDType,
) -> None:
    """With all rows in the sample, everything agrees to rounding."""
    geometry = Geometry.uniform(layers=4, kv_heads=2, head_dim=8, rope=HALVES)
    options = {"layer_groups": 2, "rank": 20, "second_level": second_level}
    both = calibrators(geometry, basis_dtype=basis_dtype, **options)
    for seed in range(3):
        k, v = kvtc.testing.drawn_cache(geometry, 650, seed=seed, dtype=dtype)
        for calibrator in both:
            calibrator.update(k, v)
            if with_gradients:
                grads = (gradients(x.shape, seed + i) for i, x in enumerate((k, v)))
                calibrator.update_gradients(k, v, *grads)
    expected, found = (c.finish() for c in both)
    assert found.tokens == expected.tokens
    for name in ("separate", "joint"):
        pairs = zip(found.sections[0].basis(name), expected.sections[0].basis(name), strict=True)
        for f, e in pairs:
            assert (f.k_layers, f.v_layers, f.rank) == (e.k_layers, e.v_layers, e.rank)
            assert relative(f.mean, e.mean) < 1e-6
            assert relative(f.spectrum, e.spectrum) < 1e-5
            assert f.energy == pytest.approx(e.energy, rel=1e-6)
            matrices = (x.transforms().synthesis.matrix() for x in (f, e))
            assert relative(*matrices) < (1e-2 if basis_dtype == "float16" else 3e-2)
            if name == "separate":
                assert relative(f.errors.energy, e.errors.energy) < 1e-3
                continue
            assert f.weighted == e.weighted == with_gradients
            assert f.uniform.unit == pytest.approx(e.uniform.unit, rel=1e-5)
            assert relative(f.uniform.families.rate, e.uniform.families.rate) < 1e-2
            # Of 256 rows, which differ.
            assert relative(f.uniform.k_errors, e.uniform.k_errors) < 0.1
            assert (f.uniform.importance is None) == (e.uniform.importance is None)
    for preset in kvtc.PRESETS:
        kvtc.Codec(found, preset, ratio=4)


def test_a_real_cache_codes_as_well(arrays: DeviceArrays, real_sample: RealSample) -> None:
    """Streams of both calibrations take the same bytes and have the same errors, within 1 %."""
    k, v = real_sample.k, real_sample.v
    found = []
    for calibrator in calibrators(real_sample.geometry):
        calibrator.update(k, v)
        codec = kvtc.Codec(calibrator.finish(), ratio=8, window=0)
        data = kvtc.encode(k, v, codec=codec)
        decoded = kvtc.decode(data, codec.calibration)
        errors = [
            relative(x.astype(np.float32), y.astype(np.float32))
            for x, y in zip(decoded, (k, v), strict=True)
        ]
        found.append([len(data), *errors])
    np.testing.assert_allclose(found[1], found[0], rtol=0.01)


def test_leading_eigenvectors(arrays: DeviceArrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few eigenvectors of a large matrix, by subspace iteration."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(principal, "_DENSE", 256)
    spectrum = np.arange(1, 401, dtype=np.float32) ** -1.5
    vectors, _ = np.linalg.qr(rng.standard_normal((400, 400), np.float32))
    matrix = (vectors * spectrum) @ vectors.T
    values, found = leading_eigenvectors(arrays.put(matrix), 50, arrays)
    values, found = arrays.get(values), arrays.get(found)
    assert found.shape == (400, 50)
    np.testing.assert_allclose(values, spectrum[:50], rtol=2e-3)
    np.testing.assert_allclose(abs(found.T @ vectors[:, :50])[:10, :10], np.eye(10), atol=2e-2)
    np.testing.assert_allclose(found.T @ found, np.eye(50), atol=1e-4)


def test_a_separate_basis_of_few_components(
    arrays: DeviceArrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the leading eigenvectors on a device, from all on the CPU."""
    monkeypatch.setattr(principal, "_DENSE", 256)
    geometry = Geometry.uniform(layers=3, kv_heads=2, head_dim=64)
    both = calibrators(geometry, bases=("separate",), rank=64)
    k, v = kvtc.testing.drawn_cache(geometry, 900)
    for calibrator in both:
        calibrator.update(k, v)
    expected, found = (c.finish().sections[0].basis("separate") for c in both)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f.spectrum[:40], e.spectrum[:40], rtol=1e-3)
        assert f.errors.dropped == pytest.approx(e.errors.dropped, rel=1e-2)
        assert f.energy == pytest.approx(e.energy, rel=1e-5)


@pytest.mark.parametrize("condition", [1, 1e3, 1e7])
def test_orthonormal_bases(arrays: DeviceArrays, condition: float) -> None:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 60)))[0] for n in (400, 60))
    x = ((u * np.geomspace(condition, 1, 60)) @ v.T).astype(np.float32)
    found = arrays.get(arrays.orthonormal(arrays.put(x)))
    assert found.dtype == np.float32
    assert abs(found.T @ found - np.eye(60)).max() < 2e-6
    strong = u[:, : 30 if condition == 1e7 else 60]
    assert abs(found @ (found.T @ strong) - strong).max() < 1e-3


def test_orthonormal_bases_of_dependent_columns(arrays: DeviceArrays) -> None:
    x = np.zeros((50, 20), np.float32)
    x[:, :5] = np.random.default_rng(0).standard_normal((50, 5))
    found = arrays.get(arrays.orthonormal(arrays.put(x)))
    assert abs(found.T @ found - np.eye(20)).max() < 2e-6
    assert abs(found @ (found.T @ x) - x).max() < 1e-5


def test_calibrators_travel_between_processes(arrays: DeviceArrays) -> None:
    """Pickled, as those are that were filled in parallel."""
    geometry = Geometry.uniform(layers=2, kv_heads=2, head_dim=8)
    for backend in ("cpu", "cuda") if isinstance(arrays.xp, ModuleType) else ("cpu",):
        calibrator = kvtc.Calibrator(geometry, backend=backend)
        calibrator.update(*kvtc.testing.drawn_cache(geometry, 300))
        assert pickle.loads(pickle.dumps(calibrator)).finish() == calibrator.finish()


# Families.


@pytest.mark.parametrize("present", [[8], [0, 3, 8, 15]])
def test_symbols_are_counted_as_on_the_cpu(arrays: DeviceArrays, present: list[int]) -> None:
    rng = np.random.default_rng(2)
    rows = np.array([60, 1, 100, 39][: len(present)])
    x = (rng.standard_normal((rows.sum(), 24)) * np.exp2(-np.arange(24))).astype(np.float32)
    x[3, :5] = [0, 1e30, -1e30, 127.5, -128.5]
    weights = rng.random(len(x))
    deltas = 0.01 * np.exp2(np.arange(12 + 15) / 4)
    arguments = (x, weights, deltas, np.array(present), np.append(0, np.cumsum(rows)), 12)
    (counts, sums), (found_counts, found_sums) = (
        count(*arguments) for count in (SymbolCounter(), arrays.counter)
    )
    np.testing.assert_array_equal(arrays.get(found_counts), counts)
    np.testing.assert_allclose(found_sums, sums, rtol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_families_agree(
    arrays: DeviceArrays, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays.counter, "components", 10, raising=False)
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((500, 25)) * np.exp2(-np.arange(25) / 3)).astype(np.float32)
    classes = rng.integers(6, 10, 500).astype(np.uint8)
    weights = rng.random(500).astype(np.float32) if weighted else None
    options = {"unit": 0.02, "steps": 20, "families": 8, "weights": weights}
    expected = fit_families(x, classes, **options)
    found = fit_families(x, classes, **options, counter=arrays.counter)
    np.testing.assert_array_equal(found.frequencies, expected.frequencies)
    assert (found.ids == expected.ids).mean() > 0.999
    np.testing.assert_allclose(found.rate, expected.rate, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.distortion, expected.distortion, rtol=1e-4)
    np.testing.assert_array_equal(found.energy, expected.energy)


# What is refused.


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.uniform(layers=40, kv_heads=8, head_dim=128)
    small = DeviceArrays(NumpyDevice(40 * GB))
    monkeypatch.setattr(module, "get_arrays", lambda _: small)
    with pytest.raises(ValueError, match=r"needs about 141 GB on the device, which has 40: choose"):
        kvtc.Calibrator(geometry, backend="cuda", bases=("joint",))
    with pytest.raises(ValueError, match=r"separate basis of 40960 components for 40960 columns"):
        kvtc.Calibrator(geometry, backend="cuda", bases=("separate",))
    levels = {"bases": ("joint",), "layer_groups": 6, "backend": "cuda"}
    with pytest.raises(ValueError, match=r"needs about 6[0-9] GB on the device, which has 40"):
        kvtc.Calibrator(geometry, second_level=16_384, **levels)
    with pytest.raises(ValueError, match=r"second_level=20480 .* up to 16384: choose that or less"):
        kvtc.Calibrator(geometry, second_level=20_480, **levels)


def test_backends_are_not_merged(arrays: DeviceArrays) -> None:
    one, other = calibrators(Geometry.uniform(layers=1, kv_heads=1, head_dim=4))
    with pytest.raises(ValueError, match="calibrators differ in backend: cannot merge them"):
        one.merge(other)


def test_tokens_that_are_no_numbers_are_left_out(arrays: DeviceArrays) -> None:
    geometry = Geometry.uniform(layers=2, kv_heads=2, head_dim=8)
    k, v = kvtc.testing.drawn_cache(geometry, 300, dtype=DType.BFLOAT16)
    k[0, 0, 100] = ml_dtypes.bfloat16("nan")
    v[1, 1, 200, 3] = ml_dtypes.bfloat16("inf")
    calibrator = kvtc.Calibrator(geometry, backend="cuda", bases=("joint",))
    calibrator.update(np.full_like(k, np.nan), v)
    calibrator.update(k, v)
    assert calibrator.finish().tokens == 300 - 4 - 2


def test_without_cupy_or_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.uniform(layers=1, kv_heads=1, head_dim=4)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(kvtc.BackendUnavailableError, match=r"pip install 'kvtc-stream\[cuda\]'"):
        kvtc.Calibrator(geometry, backend="cuda")
    none = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=lambda: 0)))
    monkeypatch.setitem(sys.modules, "cupy", none)
    with pytest.raises(kvtc.BackendUnavailableError, match="finds none: run where nvidia-smi"):
        require_cupy()
    assert kvtc.Calibrator(geometry, backend="auto")._options["backend"] == "cpu"
    with pytest.raises(ValueError, match="backend must be 'auto', 'cpu' or 'cuda', found 'tpu'"):
        kvtc.Calibrator(geometry, backend="tpu")


def test_the_cpu_needs_no_cupy() -> None:
    code = (
        "import sys, kvtc_stream; kvtc_stream.testing.tiny_calibration();"
        "assert 'cupy' not in sys.modules and 'kvtc_stream.gpu' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Tensors of other frameworks.


def test_torch_tensors_of_the_host(arrays: DeviceArrays) -> None:
    torch = pytest.importorskip("torch")
    geometry = Geometry.uniform(layers=2, kv_heads=2, head_dim=8)
    k, v = kvtc.testing.drawn_cache(geometry, 300)
    given = [torch.from_numpy(x).to(torch.bfloat16) for x in (k, v)]
    found = [
        c.finish()
        for c, tensors in (
            (kvtc.Calibrator(geometry, backend="cuda"), given),
            (
                kvtc.Calibrator(geometry, backend="cuda"),
                [x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) for x in given],
            ),
        )
        if c.update(*tensors) is None
    ]
    assert found[0] == found[1]


@pytest.mark.gpu
def test_torch_tensors_of_the_device(arrays: DeviceArrays) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or isinstance(arrays.xp, NumpyDevice):
        pytest.skip("PyTorch finds no CUDA device, or NumPy stands in for CuPy")
    geometry = Geometry.uniform(layers=2, kv_heads=2, head_dim=8)
    k, v = kvtc.testing.drawn_cache(geometry, 300)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = [torch.from_numpy(x).to(dtype) for x in (k, v)]
        one, other = (kvtc.Calibrator(geometry, backend="cuda") for _ in range(2))
        one.update(*tensors)
        other.update(*([layer.cuda() for layer in x] for x in tensors))
        assert one.finish() == other.finish()
