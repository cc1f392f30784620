"""Calibration: merging, files, what is left out, the options of the basis."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from strategies import cuts, geometries

import kvtc_stream as kvtc
from kvtc_stream.calibration import arrays

Array = NDArray[Any]
Document = tuple[Array, Array, Array | None]

KEY = "kvtc_calibration"
few_tokens = pytest.mark.filterwarnings("ignore:calibrated on:kvtc_stream.KVTCWarning")


def documents(geometry: kvtc.Geometry, count: int, tokens: int = 60) -> list[list[Document]]:
    """Per section, documents of different lengths."""
    return [
        [
            (
                *kvtc.testing.drawn_cache(geometry, tokens + 7 * seed, seed=seed, section=section),
                None,
            )
            for seed in range(count)
        ]
        for section in range(len(geometry.sections))
    ]


def moments(calibrator: kvtc.Calibrator) -> list[Any]:
    """The running moments of every part: the public surface rounds them."""
    return [m for s in calibrator._sections for m in s.moments.values()]


def samples(calibrator: kvtc.Calibrator) -> list[tuple[bytes, bytes]]:
    return [(s.sample.hashes.tobytes(), s.sample.rows.tobytes()) for s in calibrator._sections]


@few_tokens
@given(geometries(), st.data())
def test_merging_equals_one_pass(geometry: kvtc.Geometry, data: st.DataObject) -> None:
    """In any order, in any pieces: moments to 1e-6, the same sample, the same calibration."""
    options = {
        "bases": data.draw(st.sampled_from([("separate",), ("joint",), ("separate", "joint")])),
        "layer_groups": data.draw(st.integers(1, 3)),
        "sample_rows": data.draw(st.sampled_from([1, 50, 1000])),
    }
    if "joint" in options["bases"] and options["layer_groups"] > 1:
        options["second_level"] = data.draw(st.sampled_from([0, 3, 50]))
    texts = documents(geometry, 4)
    whole = kvtc.Calibrator(geometry, **options)
    for section, texts_of in enumerate(texts):
        for k, v, _ in texts_of:
            whole.update(k, v, section=section)
    parts = [kvtc.Calibrator(geometry, **options) for _ in range(3)]
    for section, texts_of in enumerate(texts):
        for k, v, _ in data.draw(st.permutations(texts_of)):
            part = parts[data.draw(st.integers(0, 2))]
            where = np.arange(k.shape[2])
            for piece in data.draw(cuts(k.shape[2])):
                part.update(k[:, :, piece], v[:, :, piece], positions=where[piece], section=section)
    first, *others = data.draw(st.permutations(parts))
    for other in others:
        first.merge(other)
    assert samples(first) == samples(whole)
    one, two = first.finish(), whole.finish()
    for a, b in zip(moments(first), moments(whole), strict=True):
        assert a.count == b.count
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-6, atol=1e-7)
        scale = np.sqrt(np.outer(np.diag(b.scatter), np.diag(b.scatter)))
        assert (np.abs(a.scatter - b.scatter) <= 1e-6 * scale + 1e-12).all()
    for mine, theirs in zip(one.sections, two.sections, strict=True):
        assert mine.tokens == theirs.tokens
        for name, parts_of in mine.bases.items():
            for p, q in zip(parts_of, theirs.basis(name), strict=True):
                assert (p.errors and p.errors.rows) == (q.errors and q.errors.rows)
                np.testing.assert_allclose(p.spectrum, q.spectrum, rtol=1e-4, atol=1e-6)
                assert p.energy == pytest.approx(q.energy, rel=1e-6)


def test_wide_rows_merge_too() -> None:
    """Rows of more than 512 values go through binary32 products."""
    geometry = kvtc.Geometry.uniform(layers=3, kv_heads=3, head_dim=64, v_head_dim=1)
    rng = np.random.default_rng(0)
    section = geometry.sections[0]
    texts = [
        (
            rng.standard_normal(section.k_shape(500), np.float32) * 3 + 10,
            rng.standard_normal(section.v_shape(500), np.float32),
        )
        for _ in range(3)
    ]
    whole, a, b = (kvtc.Calibrator(geometry, bases=("separate",), sinks=0) for _ in range(3))
    for k, v in texts:
        whole.update(k, v)
    a.update(*texts[2])
    b.update(*texts[0])
    b.update(*texts[1])
    a.merge(b)
    for one in (a, whole):
        one._sections[0]._flush()
    rows = np.concatenate([k.transpose(2, 0, 1, 3).reshape(500, -1) for k, _ in texts])
    exact = np.cov(rows.T.astype(np.float64), bias=True) * len(rows)
    limit = 1e-6 * np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    for one in (a, whole):
        assert (np.abs(moments(one)[0].scatter - exact) <= limit).all()
    np.testing.assert_allclose(moments(a)[0].mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_what_memory_does_not_hold_is_refused_before_it_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system would end the process later, after hours of reading."""
    monkeypatch.setattr(arrays, "machine_bytes", lambda: 16e9)
    large = kvtc.Geometry.uniform(layers=40, kv_heads=8, head_dim=128)
    with pytest.raises(ValueError, match=r"about \d+ GB of memory, .* 16: .* layer_groups"):
        kvtc.Calibrator(large)
    kvtc.Calibrator(large, layer_groups=10, sample_rows=64)


def test_merge_refuses_other_options(calibration: kvtc.Calibration) -> None:
    a = kvtc.Calibrator(calibration.geometry)
    with pytest.raises(ValueError, match="differ in rank, sinks: cannot merge"):
        a.merge(kvtc.Calibrator(calibration.geometry, rank=3, sinks=0))


@few_tokens
@settings(max_examples=10)
@given(
    geometries(),
    st.integers(1, 3),
    st.sampled_from([("separate",), ("joint",), ("joint", "separate")]),
    st.none() | st.integers(1, 20),
)
def test_parts_are_principal_components(
    geometry: kvtc.Geometry, groups: int, bases: tuple[str, ...], rank: int | None
) -> None:
    """Against an eigendecomposition of the test's own, in float64."""
    options: dict[str, Any] = {"layer_groups": groups, "bases": bases, "rank": rank, "sinks": 0}
    plain = kvtc.Geometry(
        tuple(kvtc.Section(s.layers, s.kv_heads, s.k_dim, s.v_dim) for s in geometry.sections)
    )
    calibrator = kvtc.Calibrator(plain, **options)
    for i in range(len(plain.sections)):
        calibrator.update(*kvtc.testing.drawn_cache(plain, 200, section=i), section=i)
    calibration = calibrator.finish()
    for i, (section, learnt) in enumerate(zip(plain.sections, calibration.sections, strict=True)):
        k, v = kvtc.testing.drawn_cache(plain, 200, section=i)
        assert set(learnt.bases) == set(bases)
        for name, parts in learnt.bases.items():
            assert len(parts) <= groups * (1 if name == "joint" else 2)
            for kind in ("k_layers", "v_layers"):
                dealt = [layer for p in parts for layer in getattr(p, kind)]
                assert dealt == list(range(len(section.layers)))
            for part in parts:
                rows = np.concatenate(
                    [
                        x[list(layers)].transpose(2, 0, 1, 3).reshape(200, -1)
                        for x, layers in ((k, part.k_layers), (v, part.v_layers))
                    ],
                    axis=1,
                ).astype(np.float64)
                assert part.width == rows.shape[1]
                assert part.rank == min(rank or part.width, part.width)
                np.testing.assert_allclose(part.mean, rows.mean(axis=0), atol=1e-5)
                variance = np.linalg.eigvalsh(np.cov(rows.T, bias=True).reshape([part.width] * 2))
                np.testing.assert_allclose(
                    part.spectrum, variance[::-1][: part.rank], rtol=1e-3, atol=1e-5
                )
                components = part.components.matrix().astype(np.float64)
                gram = components @ components.T
                np.testing.assert_allclose(gram, np.eye(part.rank), atol=4e-3)
                projected = (rows - rows.mean(axis=0)) @ components.T
                np.testing.assert_allclose(
                    projected.var(axis=0), part.spectrum, rtol=2e-2, atol=1e-4
                )
                assert part.energy == pytest.approx(np.square(rows).sum(axis=1).mean(), rel=1e-5)
                assert (part.errors is None) is (part.uniform is not None) is (name == "joint")
                if part.errors is not None:
                    assert part.errors.dropped == pytest.approx(
                        variance[::-1][part.rank :].sum(), rel=1e-4, abs=1e-5
                    )


@pytest.mark.parametrize(
    "options",
    [
        {"layer_groups": 2},
        {"layer_groups": 9},
        {"rank": 5},
        {"layer_groups": 2, "rank": 3},
        {"layer_groups": 2, "second_level": 20},
        {"layer_groups": 9, "second_level": 1000, "rank": 30},
    ],
)
def test_options_of_the_basis_serve_a_stream(options: dict[str, int]) -> None:
    rope = kvtc.Rope.from_theta(1e4, 6)
    geometry = kvtc.Geometry.uniform(layers=3, kv_heads=2, head_dim=6, v_head_dim=4, rope=rope)
    calibrator = kvtc.Calibrator(geometry, **options)
    calibrator.update(*kvtc.testing.drawn_cache(geometry, 500, seed=1))
    calibration = calibrator.finish()
    codec = kvtc.Codec(calibration, ratio=4, window=0, sinks=0)
    k, v = kvtc.testing.drawn_cache(geometry, 100)
    encoder = kvtc.Encoder(codec)
    stream = encoder.encode(k, v) + encoder.finish()
    back = kvtc.decode(stream, calibration)
    for x, y, worst in (
        (k, back[0], encoder.statistics.k_error_worst),
        (v, back[1], encoder.statistics.v_error_worst),
    ):
        difference = np.square(x.astype(np.float64) - np.asarray(y)).sum(axis=(0, 1, 3))
        true = np.sqrt(difference / np.square(x.astype(np.float64)).sum(axis=(0, 1, 3)))
        assert true.max() == pytest.approx(worst, rel=1e-5)
        assert true.mean() < 0.85


def test_a_joint_basis_serves_a_stream(calibration: kvtc.Calibration) -> None:
    calibrator = kvtc.Calibrator(calibration.geometry, bases=("joint",), layer_groups=2)
    calibrator.update(*kvtc.testing.drawn_cache(calibration.geometry, 500, seed=1))
    joint = calibrator.finish()
    with pytest.raises(kvtc.UnsupportedError, match="no basis 'separate', only joint"):
        kvtc.Codec(joint, "paper")
    codec = kvtc.Codec(joint, ratio=4, window=0, sinks=0)
    assert len(codec.plan.sections[0].parts) == 2
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 100)
    encoder = kvtc.Encoder(codec)
    back = kvtc.decode(encoder.encode(k, v) + encoder.finish(), joint)
    for x, y in ((k, back[0]), (v, back[1])):
        assert np.linalg.norm(x - np.asarray(y)) < 0.3 * np.linalg.norm(x)


def same(a: kvtc.Calibration, b: kvtc.Calibration) -> bool:
    """The same bases to rounding."""
    return all(
        np.allclose(p.mean, q.mean, atol=1e-6) and np.allclose(p.spectrum, q.spectrum, rtol=1e-4)
        for s, t in zip(a.sections, b.sections, strict=True)
        for name, parts in s.bases.items()
        for p, q in zip(parts, t.basis(name), strict=True)
    )


def test_sinks_and_spoilt_tokens_are_left_out() -> None:
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=1, head_dim=4)
    k, v = kvtc.testing.drawn_cache(geometry, 200)
    clean = kvtc.Calibrator(geometry, sinks=0)
    clean.update(k[:, :, 4:], v[:, :, 4:])
    spoilt_k, spoilt_v = k.copy(), v.copy()
    spoilt_k[:, :, :4] = 1e4
    spoilt = kvtc.Calibrator(geometry, sinks=4)
    spoilt.update(spoilt_k, spoilt_v)
    # Later pieces of a document hold no sinks.
    spoilt.update(spoilt_k[:, :, :3], spoilt_v[:, :, :3], positions=np.arange(3))
    assert spoilt.finish().tokens == clean.finish().tokens == 196
    assert same(spoilt.finish(), clean.finish())
    assert spoilt.finish().sinks == 4
    for value in (np.nan, np.inf, -np.inf):
        broken = k[:, :, 4:].copy()
        broken[1, 0, 7, 2] = value
        one = kvtc.Calibrator(geometry, sinks=0)
        one.update(broken, v[:, :, 4:])
        assert one.finish().tokens == 195
        assert all(np.isfinite(p.mean).all() for p in one.finish().sections[0].basis("separate"))


def test_positions_take_rope_off() -> None:
    """A piece far into a document needs its positions."""
    rope = kvtc.Rope.from_theta(100.0, 4)
    geometry = kvtc.Geometry.uniform(layers=1, kv_heads=1, head_dim=4, rope=rope)
    k, v = kvtc.testing.drawn_cache(geometry, 200)
    whole, pieces, wrong = (kvtc.Calibrator(geometry) for _ in range(3))
    whole.update(k, v)
    for piece in (slice(0, 90), slice(90, 200)):
        pieces.update(k[:, :, piece], v[:, :, piece], positions=np.arange(200)[piece])
        wrong.update(k[:, :, piece], v[:, :, piece])
    assert same(whole.finish(), pieces.finish())
    assert not same(whole.finish(), wrong.finish())


def test_wrong_updates() -> None:
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=1, head_dim=4)
    calibrator = kvtc.Calibrator(geometry)
    k, v = kvtc.testing.drawn_cache(geometry, 30)
    with pytest.raises(ValueError, match="k has 30 tokens, v has 29"):
        calibrator.update(k, v[:, :, 1:])
    with pytest.raises(ValueError, match="shape"):
        calibrator.update(k[:1], v)
    with pytest.raises(TypeError, match="float64"):
        calibrator.update(k.astype(np.float64), v)
    with pytest.raises(ValueError, match="rising"):
        calibrator.update(k, v, positions=np.zeros(30, int))
    for section in (1, -1):
        with pytest.raises(ValueError, match="section must be from 0 to 0"):
            calibrator.update(k, v, section=section)
    for option, value in (("bases", ("other",)), ("bases", ()), ("rank", 0), ("sinks", -1)):
        with pytest.raises(ValueError, match=option):
            kvtc.Calibrator(geometry, **{option: value})


def test_few_tokens_warn_and_none_raise() -> None:
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=1, head_dim=8)
    calibrator = kvtc.Calibrator(geometry)
    with pytest.raises(ValueError, match="no tokens to calibrate on"):
        calibrator.finish()
    k, v = kvtc.testing.drawn_cache(geometry, 35)
    calibrator.update(k[:, :, :4], v[:, :, :4])
    with pytest.raises(ValueError, match="sink positions"):
        calibrator.finish()
    calibrator.update(k, v)
    with pytest.warns(kvtc.KVTCWarning, match="31 tokens for rows of 16 values: below 32"):
        calibrator.finish()
    calibrator.update(k[:, :, :5], v[:, :, :5])
    calibrator.finish()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda k, v: (0 * k, 0 * v), "the same in K of layers 0, 1, V of layers 0, 1:"),
        (lambda k, v: (k, v[:, :, :1].repeat(200, axis=2)), "the same in V of layers 0, 1:"),
        (lambda k, v: (k, np.stack([0 * v[0], v[1]])), "the same in V of layer 0:"),
    ],
)
def test_calibrated_on_nothing(spoil: Callable[..., Any], match: str) -> None:
    """Calibration says so, and so does a stream that has lost nearly everything."""
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=1, head_dim=8)
    k, v = kvtc.testing.drawn_cache(geometry, 200)
    calibrator = kvtc.Calibrator(geometry)
    calibrator.update(*spoil(k, v))
    with pytest.warns(kvtc.KVTCWarning, match=match):
        calibration = calibrator.finish()
    codec = kvtc.Codec(calibration, "paper", ratio=4, window=0)
    if "layers" in match:
        with pytest.warns(kvtc.KVTCWarning, match="the cache is unlike those it learnt from"):
            kvtc.encode(k, v, codec)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("bases", [("joint",), ("separate",)])
@pytest.mark.parametrize("spoilt", [slice(None), slice(50, 52)])
def test_values_that_no_stream_can_hold(bases: tuple[str, ...], spoilt: slice) -> None:
    """A few tokens are enough: they move the mean away from all others."""
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=1, head_dim=8)
    k, v = kvtc.testing.drawn_cache(geometry, 200)
    k[:, :, spoilt] = 3e38 * np.sign(k[:, :, spoilt])
    calibrator = kvtc.Calibrator(geometry, bases=bases)
    calibrator.update(k, v)
    with pytest.raises(ValueError, match="values far beyond 65504; leave these tokens out"):
        calibrator.finish()


@few_tokens
@pytest.mark.filterwarnings("ignore:calibrated on tokens that are all the same")
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_tokens_without_variance(tokens: int) -> None:
    """Constant caches calibrate, and code without error."""
    geometry = kvtc.Geometry.uniform(layers=1, kv_heads=1, head_dim=4)
    calibrator = kvtc.Calibrator(geometry, sinks=0)
    k, v = np.full((1, 1, tokens, 4), 2.5, np.float32), np.zeros((1, 1, tokens, 4), np.float32)
    calibrator.update(k, v)
    calibration = calibrator.finish()
    for target in ({"ratio": 8}, {"mean_error": 0.01}):
        codec = kvtc.Codec(calibration, sinks=0, window=0, **target)
        encoder = kvtc.Encoder(codec)
        k2, v2 = k.repeat(100 // tokens, axis=2), v.repeat(100 // tokens, axis=2)
        back = kvtc.decode(encoder.encode(k2, v2) + encoder.finish(), calibration)
        assert encoder.statistics.k_error_worst < 1e-3
        np.testing.assert_allclose(back[0], k2, rtol=1e-3)
        np.testing.assert_array_equal(back[1], v2)


# --- files ---


@pytest.fixture
def saved(calibration: kvtc.Calibration, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    calibration.save(path)
    return path


def test_save_and_load(tmp_path: Path) -> None:
    rope = kvtc.Rope((1.0, 0.01), interleaved=True, scale=1.25)
    geometry = kvtc.Geometry(
        (
            kvtc.Section((0, 2), 2, 5, 3, (rope, None)),
            kvtc.Section((1,), 1, 4, 4, (kvtc.Rope((0.5,)),)),
        )
    )
    model = kvtc.ModelIdentity("a model: größer", "main", bytes(range(32)))
    calibrator = kvtc.Calibrator(geometry, bases=("separate", "joint"), sinks=1, model=model)
    for i in range(2):
        calibrator.update(*kvtc.testing.drawn_cache(geometry, 100, section=i), section=i)
    calibration = calibrator.finish()
    path = tmp_path / "a.safetensors"
    calibration.save(path)
    loaded = kvtc.Calibration.load(str(path))
    assert loaded == calibration
    assert hash(loaded) == hash(calibration)
    assert loaded.digest == calibration.digest
    assert len(loaded.digest) == 32
    assert (loaded.geometry, loaded.sinks, loaded.model) == (geometry, 1, model)
    assert [s.tokens for s in loaded.sections] == [99, 99]
    again = tmp_path / "b.safetensors"
    loaded.save(again)
    assert kvtc.Calibration.load(again) == calibration
    k, v = kvtc.testing.drawn_cache(geometry, 300)
    one, two = (kvtc.Codec(c, ratio=4, window=16) for c in (calibration, loaded))
    assert one == two
    assert kvtc.encode(k, v, codec=one) == kvtc.encode(k, v, codec=two)


def test_rotary_tables_with_axes_are_version_5(
    tmp_path: Path, calibration: kvtc.Calibration
) -> None:
    rope = kvtc.Rope((1.0, 0.5), axes=(0, 1))
    section = replace(calibration.geometry.sections[0], rope=(rope, None))
    turned = kvtc.Calibration(
        kvtc.Geometry((section,)), calibration.sections, calibration.sinks, calibration.model
    )
    for saved, version in ((calibration, 3), (turned, 5)):
        path = tmp_path / f"{version}.safetensors"
        saved.save(path)
        assert f'"version":{version}'.encode() in path.read_bytes().replace(b"\\", b"")
        assert kvtc.Calibration.load(path) == saved
    assert turned.digest != calibration.digest


def test_digests_differ(calibration: kvtc.Calibration) -> None:
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 512, seed=1)
    digests = {calibration.digest}
    for options in ({}, {"sinks": 3}, {"model": kvtc.ModelIdentity("x")}):
        calibrator = kvtc.Calibrator(calibration.geometry, **options)
        calibrator.update(k, v)
        if not options:
            assert calibrator.finish() == calibration
        digests.add(calibrator.finish().digest)
    assert len(digests) == 3


def test_every_changed_byte_is_noticed(saved: Path) -> None:
    """No byte of the file can change without an error, whatever it is."""
    data = saved.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    places = [*rng.integers(0, header, 150), *rng.integers(header, len(data), 50)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.integers(0, 7)
        saved.write_bytes(changed)
        try:
            loaded = kvtc.Calibration.load(saved)
        except kvtc.FormatError:
            continue
        # White space and escapes of the outer JSON are no content.
        assert loaded == kvtc.testing.tiny_calibration()
        assert place < header


def test_truncated_files(saved: Path) -> None:
    data = saved.read_bytes()
    for size in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:size])
        with pytest.raises(kvtc.FormatError, match="not a readable safetensors file"):
            kvtc.Calibration.load(saved)


def test_changed_array(saved: Path) -> None:
    rewrite(saved, lambda description, arrays: arrays["0.separate.0.mean"].__iadd__(1))
    with pytest.raises(kvtc.ChecksumError, match="the file was changed"):
        kvtc.Calibration.load(saved)


def test_not_a_calibration(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no calibration file"):
        kvtc.Calibration.load(path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(kvtc.FormatError, match="not a calibration"):
        kvtc.Calibration.load(path)
    calibration = kvtc.testing.tiny_calibration()
    k, v = kvtc.testing.drawn_cache(calibration.geometry, 300)
    path.write_bytes(kvtc.encode(k, v, kvtc.Codec(calibration)))
    with pytest.raises(kvtc.FormatError, match="is a kvtc stream, where a calibration belongs"):
        kvtc.Calibration.load(path)
    path.write_bytes(b"PK\x03\x04 something else entirely")
    with pytest.raises(kvtc.FormatError, match="not a readable safetensors file"):
        kvtc.Calibration.load(path)


def rewrite(path: Path, change: Any) -> None:
    """Change a file's description or arrays, and keep its digest as it was."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    description, arrays = json.loads(metadata[KEY]), load_file(path)
    changed = change(description, arrays)
    text = changed if isinstance(changed, str) else json.dumps(description)
    save_file(arrays, path, {**metadata, KEY: text})


def test_another_version(saved: Path) -> None:
    rewrite(saved, lambda description, _: description.update(version=99))
    with pytest.raises(kvtc.VersionError, match="version 99, expected 3"):
        kvtc.Calibration.load(saved)


def put(*keys: Any, value: Any) -> Any:
    """A change that sets one entry of the description."""

    def change(description: Any, _: Any) -> None:
        for key in keys[:-1]:
            description = description[key]
        description[keys[-1]] = value

    return change


SECTION = ("sections", 0)
PART = (*SECTION, "bases", "separate", 0)
JOINT = (*SECTION, "bases", "joint", 0)
HOSTILE = {
    "not json": lambda *_: "{",
    "a list": lambda *_: "[]",
    "a number": lambda *_: "3",
    "null": lambda *_: "null",
    "empty": lambda *_: "{}",
    "deep": lambda *_: "[" * 10**5,
    "endless number": lambda *_: '{"version":' + "9" * 5000 + "}",
    "no sections": put("sections", value=[]),
    "sections of text": put("sections", value="abc"),
    "section of text": put(*SECTION, value="abc"),
    "huge heads": put(*SECTION, "kv_heads", value=10**30),
    "fractional heads": put(*SECTION, "kv_heads", value=2.0),
    "true heads": put(*SECTION, "layers", value=[False, True]),
    "negative dim": put(*SECTION, "k_dim", value=-8),
    "text layers": put(*SECTION, "layers", value="01"),
    "layers fall": put(*SECTION, "layers", value=[1, 0]),
    "rope of text": put(*SECTION, "rope", value=["a", "b"]),
    "rope without table": put(*SECTION, "rope", value=[{}, {}]),
    "rope not finite": put(
        *SECTION, "rope", value=[{"inv_freq": [math.inf], "interleaved": False, "scale": 1}] * 2
    ),
    "interleaved maybe": put(
        *SECTION, "rope", value=[{"inv_freq": [1], "interleaved": "no", "scale": 1}] * 2
    ),
    "wide rope": put(
        *SECTION, "rope", value=[{"inv_freq": [1] * 99, "interleaved": False, "scale": 1}] * 2
    ),
    "no bases": put(*SECTION, "bases", value={}),
    "bases a list": put(*SECTION, "bases", value=[]),
    "basis with no parts": put(*SECTION, "bases", "separate", value=[]),
    "foreign layers": put(*PART, "k_layers", value=[0, 7]),
    "missing layers": put(*PART, "k_layers", value=[0]),
    "fractional layers": put(*PART, "k_layers", value=[0.0, 1.0]),
    "energy of text": put(*PART, "energy", value="much"),
    "energy not finite": put(*PART, "energy", value=math.nan),
    "negative energy": put(*PART, "energy", value=-1.0),
    "negative rows": put(*PART, "errors", "rows", value=-5),
    "dropped not finite": put(*PART, "errors", "dropped", value=math.inf),
    "negative tokens": put(*SECTION, "tokens", value=-1),
    "sinks of text": put("sinks", value="four"),
    "negative sinks": put("sinks", value=-4),
    "fingerprint": put("model", "fingerprint", value="xyz"),
    "long fingerprint": put("model", "fingerprint", value="00" * 10**5),
    "name": put("model", "name", value=3),
    "missing array": lambda _, arrays: arrays.pop("0.separate.0.mean"),
    "extra array": lambda _, arrays: arrays.update(more=np.zeros(1)),
    "short mean": lambda _, a: a.update({"0.separate.0.mean": np.zeros(3, np.float32)}),
    "double mean": lambda _, a: a.update({"0.separate.0.mean": np.zeros(32)}),
    "scalar components": lambda _, a: a.update(
        {"0.separate.0.components": np.zeros((), np.float16)}
    ),
    "basis not finite": lambda _, a: a["0.separate.0.components"].__setitem__(0, np.nan),
    "mean not finite": lambda _, a: a["0.separate.1.mean"].__setitem__(0, np.inf),
    "unit of zero": put(*JOINT, "uniform", "unit", value=0.0),
    "unit not finite": put(*JOINT, "uniform", "unit", value=math.inf),
    "importance maybe": put(*JOINT, "uniform", "importance", value=1),
    "importance that lacks": put(*JOINT, "uniform", "importance", value=True),
    "weighted maybe": put(*JOINT, "weighted", value=1),
    "weights that lack": put(*JOINT, "weighted", value=True),
    "frequencies that do not sum": lambda _, a: a["0.joint.0.uniform.frequencies"].__iadd__(1),
    "families that are not there": lambda _, a: a["0.joint.0.uniform.ids"].__ior__(255),
    "short ids": lambda _, a: a.update({"0.joint.0.uniform.ids": np.zeros((56, 16, 3), np.uint8)}),
    "no steps": lambda _, a: a.update({"0.joint.0.uniform.ids": np.zeros((0, 16, 32), np.uint8)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptions(saved: Path, name: str) -> None:
    """Refused for what they are, even if whoever made them has put the digest right."""
    rewrite(saved, HOSTILE[name])
    with pytest.raises(kvtc.FormatError) as refusal:
        kvtc.Calibration.load(saved)
    assert not isinstance(refusal.value, kvtc.ChecksumError), refusal.value


LEVELS = (*JOINT, "levels")
HOSTILE_LEVELS = {
    "levels of text": put(*LEVELS, value="two"),
    "no groups": put(*LEVELS, "layers", value=[]),
    "empty group": put(*LEVELS, "layers", value=[2, 0]),
    "missing layer": put(*LEVELS, "layers", value=[1]),
    "negative leading": put(*LEVELS, "leading", value=[-1, 5]),
    "nothing leads": put(*LEVELS, "leading", value=[0, 0]),
    "more than there are": put(*LEVELS, "leading", value=[99, 1]),
    "other leading": put(*LEVELS, "leading", value=[1, 1]),
    "other layers of V": put(*JOINT, "v_layers", value=[0]),
    "twice in order": lambda _, a: a["0.joint.0.order"].__setitem__(0, 1),
    "not in order": lambda _, a: a["0.joint.0.order"].__setitem__(0, 10**6),
    "short order": lambda _, a: a.update({"0.joint.0.order": np.zeros(1, np.int32)}),
    "no second": lambda _, a: a.pop("0.joint.0.second"),
    "narrow local": lambda _, a: a.update({"0.joint.0.local.1": np.zeros((3, 2), np.float16)}),
    "flat local": lambda _, a: a.update({"0.joint.0.local.0": np.zeros(9, np.float16)}),
    "second not finite": lambda _, a: a["0.joint.0.second"].__setitem__(0, np.inf),
    "components too": lambda _, a: a.update({"0.joint.0.components": np.zeros((3, 3), np.float16)}),
}


@pytest.mark.parametrize("name", HOSTILE_LEVELS)
def test_hostile_levels(tmp_path: Path, calibration: kvtc.Calibration, name: str) -> None:
    calibrator = kvtc.Calibrator(calibration.geometry, layer_groups=2, second_level=12)
    calibrator.update(*kvtc.testing.drawn_cache(calibration.geometry, 512, seed=1))
    path = tmp_path / "levels.safetensors"
    calibrator.finish().save(path)
    assert kvtc.Calibration.load(path) == calibrator.finish()
    rewrite(path, HOSTILE_LEVELS[name])
    with pytest.raises(kvtc.FormatError) as refusal:
        kvtc.Calibration.load(path)
    assert not isinstance(refusal.value, kvtc.ChecksumError), refusal.value


def test_the_wrong_calibration(stream: bytes, calibration: kvtc.Calibration) -> None:
    calibrator = kvtc.Calibrator(calibration.geometry, model=kvtc.ModelIdentity("other"))
    calibrator.update(*kvtc.testing.drawn_cache(calibration.geometry, 512, seed=1))
    other = calibrator.finish()
    with pytest.raises(kvtc.CalibrationMismatchError) as refusal:
        kvtc.decode(stream, other)
    for part in (calibration.digest.hex(), other.digest.hex(), "'other'", "open it with"):
        assert part in str(refusal.value)
    decoder = kvtc.Decoder(other)
    with pytest.raises(kvtc.CalibrationMismatchError):
        decoder.decode(stream)
    with pytest.raises(kvtc.StateError, match="failed before"):
        decoder.decode(b"")


def test_fp8_with_scales_calibrates_as_its_values() -> None:
    geometry = kvtc.Geometry.uniform(layers=2, kv_heads=2, head_dim=4)
    k, v = kvtc.testing.drawn_cache(geometry, 200, dtype=kvtc.DType.FLOAT8_E4M3FN)
    scale = np.array([0.5, 2.0], np.float32)
    scaled, plain = kvtc.Calibrator(geometry), kvtc.Calibrator(geometry)
    scaled.update(k, v, k_scale=scale, v_scale=3.0)
    plain.update(
        k.astype(np.float32) * scale[:, None, None, None], v.astype(np.float32) * np.float32(3)
    )
    assert scaled.finish() == plain.finish()
    with pytest.raises(ValueError, match=r"k_scale must be a scalar, \[layers\] or"):
        scaled.update(k, v, k_scale=np.ones(3))
