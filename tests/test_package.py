"""The package as a whole: what it imports, what it installs, and that docstrings' examples run."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import kvtc_stream as kvtc
from kvtc_stream.backends.select import cuda_runs

ROOT = Path(__file__).parents[1]

#: Modules that need what the package's core does not depend on.
OPTIONAL = ("torch", "transformers", "cupy", "matplotlib", "gguf", "rich", "shtab")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_is_quick() -> None:
    code = """
import sys, json, time
start = time.perf_counter()
import kvtc_stream
took = time.perf_counter() - start
print(json.dumps([took, sorted(sys.modules)]))
"""
    took, modules = json.loads(python(code))
    heavy = {"numba", "torch", "cupy", "numpy", "transformers", "jax", "rich", "ml_dtypes"}
    assert not heavy & set(modules)
    assert took < 0.5


def test_core_needs_no_framework() -> None:
    """Calibrating, encoding and decoding import nothing optional."""
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import kvtc_stream as kvtc
calibration = kvtc.testing.tiny_calibration()
k, v = kvtc.testing.drawn_cache(calibration.geometry, tokens=300)
data = kvtc.encode(k, v, codec=kvtc.Codec(calibration, ratio=4, window=16))
print(kvtc.decode(data, calibration)[0].shape)
"""
    assert python(code) == "(2, 2, 300, 8)\n"


def test_public_names() -> None:
    assert kvtc.__all__ == sorted(kvtc.__all__, key=lambda n: (n.islower(), not n.isupper(), n))
    for name in kvtc.__all__:
        assert getattr(kvtc, name) is not None
    assert set(kvtc.__all__) <= set(dir(kvtc))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        kvtc.nothing  # noqa: B018


def test_every_module_imports() -> None:
    """Those of a host only where the host is."""
    for module in pkgutil.walk_packages(kvtc.__path__, "kvtc_stream."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            hosts = ("vllm", "lmcache", "sglang")
            if missing not in hosts or f".integrations.{missing}." not in module.name:
                raise


@pytest.mark.skipif(cuda_runs(), reason="there is a CUDA device")
def test_without_cuda(calibration: kvtc.Calibration) -> None:
    """``auto`` works, and ``cuda`` says what is missing and what to do."""
    assert kvtc.Encoder(kvtc.Codec(calibration, backend="auto")).finish()
    codec = kvtc.Codec(calibration, backend="cuda")
    packages = {"numba_cuda": "numba-cuda", "cupy": "cupy-cuda13x"}
    missing = [package for name, package in packages.items() if find_spec(name) is None]
    with pytest.raises(kvtc.BackendUnavailableError, match="backend='cpu'") as refusal:
        kvtc.Encoder(codec)
    for name in missing:
        assert name in str(refusal.value)
    data = kvtc.Encoder(kvtc.Codec(calibration)).finish()
    with pytest.raises(kvtc.BackendUnavailableError):
        kvtc.decode(data, calibration, backend="cuda")


def copied_source(folder: Path) -> Path:
    """A copy of the source, because a build leaves its traces."""
    source = folder / "source"
    ignored = (".*", "build", "*.egg-info", "tests", "benchmarks", "__pycache__", "*.kvtc")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ignored))
    return source


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    """One top-level name, with everything under it."""
    source = copied_source(tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"kvtc_stream"}
    for name in ("py.typed", "formats/SPEC.md", "formats/parser.py", "gpu/__init__.py"):
        assert f"kvtc_stream/{name}" in names
    packages = {p.parent for p in (ROOT / "kvtc_stream").rglob("__init__.py")}
    for package in packages:
        assert f"{package.relative_to(ROOT)}/__init__.py" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.slow
def test_plain_install_from_the_source_folder(tmp_path: Path) -> None:
    """Python finds the source before the installed package; both are whole."""
    source, installed = copied_source(tmp_path), tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*install, "--quiet", "--target", str(installed), str(source)], check=True, timeout=120
    )
    code = """
from importlib.util import find_spec
import kvtc_stream as kvtc
calibration = kvtc.testing.tiny_calibration()
k, v = kvtc.testing.drawn_cache(calibration.geometry, tokens=64)
data = kvtc.encode(k, v, kvtc.Codec(calibration))
assert kvtc.decode(data, calibration)[0].shape == k.shape
for name in ("kvtc_stream", "kvtc_stream.formats", "kvtc_stream.gpu"):
    print(find_spec(name).origin)
"""
    # -S: no .pth file, so that the editable install under test is out of the way.
    path = os.pathsep.join([str(installed), *filter(None, sys.path)])
    package = installed / "kvtc_stream"
    for started_in, folders in (
        (source, (source / "kvtc_stream", source / "formats", source / "gpu")),
        (tmp_path, (package, package / "formats", package / "gpu")),
    ):
        run = subprocess.run(
            [sys.executable, "-S", "-c", code],
            cwd=started_in,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == [str(folder / "__init__.py") for folder in folders]


MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(kvtc.__path__, "kvtc_stream.")
    if not m.name.startswith("kvtc_stream.integrations")
)


def test_examples_in_docstrings() -> None:
    attempted = 0
    for name in MODULES:
        result = doctest.testmod(importlib.import_module(name))
        assert result.failed == 0, name
        attempted += result.attempted
    assert attempted > 20
