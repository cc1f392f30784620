"""Environment variables that set something for a whole process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import kvtc_stream as kvtc
from kvtc_stream.backends.select import get_backend
from kvtc_stream.io import environment, threads


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVTC_THREADS", raising=False)
    assert environment.threads() >= 1
    monkeypatch.setenv("KVTC_THREADS", "3")
    assert environment.threads() == 3
    threads.threads.cache_clear()
    try:
        assert threads.threads()._max_workers == 3
    finally:
        threads.threads.cache_clear()
    for wrong in ("0", "-1", "many", "²"):
        monkeypatch.setenv("KVTC_THREADS", wrong)
        with pytest.raises(ValueError, match="KVTC_THREADS must be a positive whole number"):
            environment.threads()


def test_backend(monkeypatch: pytest.MonkeyPatch, calibration: kvtc.Calibration) -> None:
    from kvtc_stream.backends.cpu import CpuBackend

    monkeypatch.setenv("KVTC_BACKEND", "cpu")
    assert isinstance(get_backend("auto"), CpuBackend)
    monkeypatch.setenv("KVTC_BACKEND", "tpu")
    with pytest.raises(ValueError, match="KVTC_BACKEND must be one of auto, cpu, cuda"):
        get_backend("auto")
    assert isinstance(get_backend("cpu"), CpuBackend)  # what was asked for by name stays


def test_cuda_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVTC_CUDA_COMPILER", raising=False)
    assert environment.cuda_compiler() is None
    monkeypatch.setenv("KVTC_CUDA_COMPILER", "numba-cuda-mlir")
    assert environment.cuda_compiler() == "numba-cuda-mlir"
    monkeypatch.setenv("KVTC_CUDA_COMPILER", "nvcc")
    with pytest.raises(ValueError, match="one of numba-cuda, numba-cuda-mlir, found 'nvcc'"):
        environment.cuda_compiler()


@pytest.mark.skipif(sys.platform != "linux", reason="each system has its own place")
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVTC_CACHE", str(tmp_path))
    assert environment.cache_folder() == tmp_path
    monkeypatch.delenv("KVTC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_folder() == tmp_path / "kvtc-stream"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment.cache_folder() == Path.home() / ".cache" / "kvtc-stream"


def test_odd_streams_are_logged_each_time(
    calibration: kvtc.Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    k, v = kvtc.testing.drawn_cache(calibration.geometry, tokens=100)
    codec = kvtc.Codec(calibration, ratio=4, window=200)
    for _ in range(2):
        with pytest.warns(kvtc.KVTCWarning, match="only"):
            kvtc.encode(k, v, codec)
    found = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert [r.name for r in found] == ["kvtc_stream.stream.encoder"] * 2
    handlers = logging.getLogger("kvtc_stream").handlers
    assert [type(handler) for handler in handlers] == [logging.NullHandler]
