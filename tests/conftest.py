"""Hypothesis profiles and what many tests share.

``HYPOTHESIS_PROFILE`` picks how hard the property tests look: ``dev`` (the default) is quick,
``ci`` is repeatable, ``expensive`` is for a night.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from real_sample import RealSample, load_real_sample

import kvtc_stream as kvtc
from kvtc_stream.cli import terminal

# The first example of a test compiles kernels: no example has a deadline.
settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile(
    "ci",
    max_examples=50,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("expensive", settings.get_profile("ci"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True, scope="session")
def _no_lines_of_progress() -> None:
    """On a slow machine commands say where they are; tests compare what they say."""
    terminal._SECONDS_PER_LINE = 3600.0


@pytest.fixture(scope="session")
def calibration() -> kvtc.Calibration:
    """2 layers with 2 heads of 8 channels, keys after RoPE."""
    return kvtc.testing.tiny_calibration()


@pytest.fixture(scope="session")
def codec(calibration: kvtc.Calibration) -> kvtc.Codec:
    """Small blocks, sinks and window, so that few tokens reach every branch."""
    return kvtc.Codec(calibration, ratio=4, sinks=4, window=24, block_tokens=16)


@pytest.fixture(scope="session")
def cache(calibration: kvtc.Calibration) -> tuple[np.ndarray, np.ndarray]:
    """K and V that the calibration fits, 200 tokens."""
    return kvtc.testing.drawn_cache(calibration.geometry, tokens=200)


@pytest.fixture(scope="session")
def stream(codec: kvtc.Codec, cache: tuple[np.ndarray, np.ndarray]) -> bytes:
    """``cache`` coded with ``codec``."""
    return kvtc.encode(*cache, codec=codec)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, saved with its tokenizer: see ``tiny_model``."""
    pytest.importorskip("transformers")
    from tiny_model import save_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads only cost time on models that small."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_sample() -> RealSample:
    """A piece of a real model's cache."""
    return load_real_sample()
