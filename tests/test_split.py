"""Calibrations of parts of the KV heads, as ranks of tensor parallelism hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtc_stream as kvtc
from kvtc_stream.calibration import file
from kvtc_stream.calibration.split import head_parts, part_path, with_heads
from kvtc_stream.cli import main

GEOMETRY = kvtc.Geometry.uniform(
    layers=3, kv_heads=4, head_dim=8, rope=kvtc.Rope.from_theta(1e4, 8)
)


def of_heads(geometry: kvtc.Geometry, heads: int) -> kvtc.Geometry:
    [section] = geometry.sections
    return kvtc.Geometry.uniform(
        layers=len(section.layers), kv_heads=heads, head_dim=8, rope=kvtc.Rope.from_theta(1e4, 8)
    )


def drawn(seed: int, tokens: int = 300) -> tuple[Any, Any]:
    return kvtc.testing.drawn_cache(GEOMETRY, tokens, seed=seed)


def test_heads_are_dealt_as_vllm_does() -> None:
    assert head_parts(8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert head_parts(3, 1) == [range(3)]
    for heads, parts in ((4, 3), (4, 0), (2, 3)):
        with pytest.raises(ValueError, match=f"{heads} KV heads cannot be split into {parts}"):
            head_parts(heads, parts)
    with pytest.raises(ValueError, match="share a calibration; ask for 4 parts"):
        head_parts(4, 8)


def test_names_of_files() -> None:
    assert part_path("a/model.safetensors", 0, 1) == Path("a/model.safetensors")
    assert part_path("a/model.safetensors", 1, 4) == Path("a/model.tp4-1.safetensors")


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_part_is_what_a_calibrator_of_its_heads_learns(parts: int) -> None:
    """With gradients, and with scales of heads."""
    rng = np.random.default_rng(0)
    split = kvtc.SplitCalibrator(GEOMETRY, parts, sample_rows=256)
    size = 4 // parts
    spans = [slice(i * size, (i + 1) * size) for i in range(parts)]
    own = [kvtc.Calibrator(of_heads(GEOMETRY, size), sample_rows=256) for _ in spans]
    scale = rng.uniform(0.5, 2, (3, 4)).astype(np.float32)
    for seed in range(3):
        k, v = drawn(seed)
        gk, gv = (rng.standard_normal(x.shape, dtype=np.float32) for x in (k, v))
        split.update(list(k), v, positions=np.arange(7, 307), k_scale=scale)
        split.update_gradients(k, v, gk, gv, v_scale=2.0)
        for calibrator, h in zip(own, spans, strict=True):
            calibrator.update(k[:, h], v[:, h], positions=np.arange(7, 307), k_scale=scale[:, h])
            calibrator.update_gradients(k[:, h], v[:, h], gk[:, h], gv[:, h], v_scale=2.0)
    steps: list[tuple[int, int]] = []
    found = split.finish(lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    for i, (calibration, calibrator) in enumerate(zip(found, own, strict=True)):
        expected = calibrator.finish()
        assert calibration.sections[0].heads == (None if parts == 1 else (i * size, 4))
        assert with_heads(calibration, [(0, size)]) == expected
        assert (calibration == expected) == (parts == 1)


def test_weights_are_of_all_heads() -> None:
    rng = np.random.default_rng(0)
    weights = tuple(rng.uniform(0.1, 1, (3, 4, 8)) for _ in range(2))
    split = kvtc.SplitCalibrator(GEOMETRY, 2, weights=weights)
    split.update(*drawn(0))
    for i, calibration in enumerate(split.finish()):
        own = slice(2 * i, 2 * i + 2)
        expected = kvtc.Calibrator(
            of_heads(GEOMETRY, 2), weights=(weights[0][:, own], weights[1][:, own])
        )
        k, v = drawn(0)
        expected.update(k[:, own], v[:, own])
        assert with_heads(calibration, [(0, 2)]) == expected.finish()


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="4 KV heads cannot be split into 3"):
        kvtc.SplitCalibrator(GEOMETRY, 3)
    split = kvtc.SplitCalibrator(GEOMETRY, 2)
    k, v = drawn(0)
    with pytest.raises(ValueError, match=r"k has shape .*expected .*kv_heads=4"):
        split.update(k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match="section must be from 0 to 0"):
        split.update(k, v, section=1)


def test_the_file_says_which_heads(tmp_path: Path) -> None:
    split = kvtc.SplitCalibrator(GEOMETRY, 2)
    split.update(*drawn(0))
    part = split.finish()[1]
    part.save(tmp_path / "p.safetensors")
    found = kvtc.Calibration.load(tmp_path / "p.safetensors")
    assert found == part
    assert found.sections[0].heads == (2, 4)
    description = json.loads(file.description(part))
    assert (description["version"], description["sections"][0]["heads"]) == (6, [2, 4])
    assert json.loads(file.description(with_heads(part, [(0, 2)])))["version"] == 3
    for wrong in ([3, 4], [2], [-1, 4], "24", None):
        description["sections"][0]["heads"] = wrong
        arrays = {name: a.copy() for name, a in file.arrays_of(part)}
        with pytest.raises((ValueError, TypeError)):
            file._parse(description, arrays)


def test_the_command_writes_a_file_for_each_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    k, v = drawn(0)
    np.savez(tmp_path / "cache.npz", k=k, v=v)
    given = ["calibrate", str(tmp_path / "cache.npz"), "--rope-theta", "10000"]
    target = str(tmp_path / "model.safetensors")
    given += ["-o", target, "--tensor-parallel", "2"]
    assert main([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    split = kvtc.SplitCalibrator(GEOMETRY, 2)
    split.update(k, v)
    for i, expected in enumerate(split.finish()):
        own = part_path(target, i, 2)
        assert kvtc.Calibration.load(own) == expected
        assert told["parts"][i]["output"] == str(own)
        assert told["parts"][i]["sections"][0]["heads"] == {"first": 2 * i, "of": 4}
    assert not Path(target).exists()
    assert main(["info", str(part_path(target, 1, 2))]) == 0
    assert "KV heads 2–3 of 4" in " ".join(capsys.readouterr().out.split())
    assert main([*given[:-1], "3"]) == 1
    assert "4 KV heads cannot be split into 3" in capsys.readouterr().err
    assert main([*given[:-1], "0"]) == 2
