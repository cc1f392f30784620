"""Servers of vLLM that keep caches in different ways, and what they tell of themselves."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

#: Seconds that a server may take to start.
_STARTING = 900.0
#: What /metrics says of prompts' tokens, and of pages.
_COUNTED = ("vllm:prefix_cache_", "vllm:external_prefix_cache_", "vllm:kvtc_")
ARMS = ("recompute", "raw", "fp8", "kvtc")


@dataclass(frozen=True)
class Arm:
    """A way to keep caches.

    Attributes
    ----------
    name
        Of the arm.
    about
        What it is, in words.
    words
        Arguments of ``vllm serve``.
    store
        The folder where it keeps pages, if it has one.
    reserved
        Bytes of host memory that it takes at the start.
    """

    name: str
    about: str
    words: tuple[str, ...] = ()
    store: Path | None = None
    reserved: int = 0


def make_arm(
    name: str,
    budget: int,
    *,
    gpu: bool,
    calibration: str | None = None,
    ratio: float | None = None,
    settings: Mapping[str, Any] | None = None,
    folder: Path,
) -> Arm:
    """One of :data:`ARMS`, with ``budget`` bytes of host memory; ``folder`` is for its pages.

    ``settings`` are more of ``KvtcConnector``, and go before those of this function.

    Raises
    ------
    ValueError
        There is no such arm, or it needs a calibration.
    """
    if name == "recompute":
        return Arm(name, "no cache but the engine's own")
    if name in ("raw", "fp8"):
        copies = (
            {}
            if gpu
            else {
                "spec_name": "HostCopiesSpec",
                "spec_module_path": "kvtc_stream.integrations.vllm.cpu_copies",
            }
        )
        words = _transfer("OffloadingConnector", {"cpu_bytes_to_use": budget, **copies})
        about = "vLLM's offloading to host memory" + ("" if gpu else ", with our copies on a CPU")
        if name == "fp8":
            words += ("--kv-cache-dtype", "fp8")
            about += "; the engine's cache is fp8 too"
        return Arm(name, about, words, reserved=budget)
    if name != "kvtc":
        raise ValueError(f"arms are {', '.join(ARMS)}, found {name!r}")
    if calibration is None:
        raise ValueError("the arm kvtc needs --calibration")
    store = folder / "pages"
    config = {
        "calibration": str(Path(calibration).absolute()),
        "store": str(store),
        "budget_gb": budget / 1e9,
        **({} if ratio is None else {"ratio": ratio}),
        **(settings or {}),
    }
    words = _transfer("KvtcConnector", config, "kvtc_stream.integrations.vllm")
    about = "KvtcConnector" + ("" if ratio is None else f" at {ratio:g} times")
    about += "".join(f", {key} {json.dumps(value)}" for key, value in (settings or {}).items())
    return Arm(name, f"{about}, pages in {_kind(folder)}", words, store)


def _transfer(connector: str, config: dict[str, Any], module: str = "") -> tuple[str, ...]:
    found = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": config}
    if module:
        found["kv_connector_module_path"] = module
    return "--kv-transfer-config", json.dumps(found)


def _kind(folder: Path) -> str:
    return "host memory" if folder.is_relative_to("/dev/shm") else "a folder"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in host memory, or where temporary files go; it is gone afterwards."""
    root = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="kvtc-serve-", dir=root if root.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Server:
    """A server by its URL, and its process if it is known.

    Parameters
    ----------
    url
        Without ``/v1``.
    process
        What serves, with all its children.
    arm
        How it keeps caches.
    """

    def __init__(self, url: str, arm: Arm, process: psutil.Process | None = None) -> None:
        self.url, self.arm, self._process = url.rstrip("/"), arm, process

    @property
    def model(self) -> str:
        """The name of the first model that it serves."""
        return str(json.loads(self._get("/v1/models"))["data"][0]["id"])

    @property
    def version(self) -> str:
        """As vLLM tells it; empty for servers that do not."""
        try:
            return str(json.loads(self._get("/version"))["version"])
        except (OSError, ValueError, KeyError):
            return ""

    def counters(self) -> dict[str, float]:
        """Counters of prompts' tokens and of pages; empty for servers that have none."""
        try:
            text = self._get("/metrics")
        except OSError:
            return {}
        return dict(read_counters(text, _COUNTED))

    def cpu_seconds(self) -> float | None:
        """Seconds of all cores that its processes used until now."""
        if self._process is None:
            return None
        total = 0.0
        for each in [self._process, *self._process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = each.cpu_times()
                total += times.user + times.system
        return total

    def held_bytes(self) -> int | None:
        """Bytes of host memory that its pages take, or that it set aside for them."""
        if self.arm.store is None:
            return self.arm.reserved if self._process is not None else None
        sizes = []
        for path in self.arm.store.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size if path.is_file() else 0)
        return sum(sizes)

    def forget(self) -> None:
        """Delete the pages that it keeps in a folder."""
        for path in self.arm.store.rglob("*") if self.arm.store else ():
            if path.is_file():
                path.unlink(missing_ok=True)

    def settle(self, seconds: float = 120.0) -> None:
        """Wait until it has stored what it is storing."""
        deadline, before = time.monotonic() + seconds, -1
        while self.arm.store and (held := self.held_bytes()) != before:
            assert held is not None
            before = held
            if time.monotonic() > deadline:
                return
            time.sleep(2.0)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return bytes(answer.read()).decode()


def read_counters(text: str, prefixes: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Counters of Prometheus' text format whose names begin so; those of several labels are added.

    Names come without ``_total``.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name.startswith(tuple(prefixes)) and name.endswith("_total"):
            short = name.removesuffix("_total")
            found[short] = found.get(short, 0.0) + float(line.rpartition(" ")[2])
    yield from found.items()


@contextlib.contextmanager
def started(
    command: str,
    model: str,
    arm: Arm,
    words: Sequence[str],
    log: IO[bytes],
    tell: Callable[[], None] = lambda: None,
) -> Iterator[Server]:
    """``vllm serve`` in a process of its own, ready to answer; ended afterwards.

    Parameters
    ----------
    command
        What starts vLLM, as a shell would read it, up to the name of the model: ``vllm serve``.
    model, words
        What it serves, and further arguments.
    arm
        How it keeps caches.
    log
        Takes what it prints.
    tell
        Called while it starts.

    Raises
    ------
    OSError
        It ended, or did not start in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = ["--host", "127.0.0.1", "--port", str(port), "--enable-prompt-tokens-details"]
    line = [*shlex.split(command), model, *ours, *words, *arm.words]
    with subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT) as process:
        server = Server(f"http://127.0.0.1:{port}", arm, psutil.Process(process.pid))
        try:
            _await(server, process, tell)
            yield server
        finally:
            _end(process)


def _await(server: Server, process: subprocess.Popen[bytes], tell: Callable[[], None]) -> None:
    deadline = time.monotonic() + _STARTING
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise OSError(
                f"the server of {server.arm.name} ended with {process.returncode}: --log FILE "
                f"keeps what it says"
            )
        with contextlib.suppress(OSError):
            server._get("/health")
            return
        tell()
        time.sleep(0.5)
    raise OSError(f"the server of {server.arm.name} did not start in {_STARTING:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, with all that it started; then make it."""
    family = [psutil.Process(process.pid)] if process.poll() is None else []
    family += [child for each in family for child in each.children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=40)
    for each in left:
        with contextlib.suppress(psutil.Error):
            each.kill()
