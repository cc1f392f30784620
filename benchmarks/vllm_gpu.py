"""Time to the first token of a long prompt in vLLM on a GPU: computed, and restored each way.

    python benchmarks/vllm_gpu.py                   # Llama-3.1-8B's shape, one CUDA device
    python benchmarks/vllm_gpu.py --shape tiny      # on a CPU, to see that all of it works
    python benchmarks/vllm_gpu.py --tensor-parallel 2   # two CUDA devices

Four arms: ``recompute``; ``gpu_hit``, vLLM's own prefix cache on the device; ``raw_offload``,
vLLM's ``OffloadingConnector``, which copies the cache from host memory as it is; and ``kvtc``,
``KvtcConnector`` with compressed pages in the memory of the host. Each engine is a process of its
own; ``recompute`` and ``gpu_hit`` share one. Before each repeat of the others what the device has
cached is forgotten. What was measured is written after each engine, beside what the file has.
Over several devices each rank has a calibration of its own heads, and pages are in a folder in the
host's memory. All ranks compare restored pages with those that they stored.

Weights are drawn: vLLM's own dummy ones, but those that make K and V, which give caches of the
spectrum that the calibration has, that of SmolLM2-135M's joint basis stretched to the rank. So the
ratio is what the rate control keeps to, as on caches of a real model; what such a ratio costs in
quality this cannot tell.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.metadata
import io
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _common import environment, write_result
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.calibration.components import Components
from kvtc_stream.calibration.families import fit_families
from kvtc_stream.calibration.parts import Part, SectionCalibration, UniformTables
from kvtc_stream.calibration.split import part_path, with_heads
from kvtc_stream.coding.rans import MIDDLE

RESULTS = Path(__file__).parent / "results"
#: Arms of each engine.
ENGINES = {"kvtc": ("kvtc",), "raw": ("raw_offload",), "plain": ("recompute", "gpu_hit")}
ARMS = [arm for arms in ENGINES.values() for arm in arms]
PAGE, THETA = 128, 1e6
#: Variance of components relative to the first, at shares of the rank, of SmolLM2-135M.
SPECTRUM = {
    0: 1.0, 0.002: 0.2194, 0.008: 0.07965, 0.03: 0.01594, 0.1: 0.002899, 0.3: 0.0003969,
    0.6: 8.874e-05, 1: 2.114e-05,
}  # fmt: skip
#: Share of a group's width that its rank is, as on SmolLM2-135M.
RANK_SHARE = 0.25
#: Components that tables are fitted to; the others have those of their nearest neighbour.
TABLES = 512


class Shape(NamedTuple):
    """A network; ``groups`` of layers are transformed together."""

    layers: int
    kv_heads: int
    dim: int
    groups: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    tokens: int  #: of the prompt


SHAPES = {
    "Llama-3.1-8B": Shape(32, 8, 128, 16, 4096, 14_336, 32, 128_256, 8192),
    "tiny": Shape(4, 2, 32, 2, 256, 512, 4, 1024, 1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="Llama-3.1-8B")
    parser.add_argument("--layers", type=int, help="instead of the shape's: a multiple of groups")
    parser.add_argument("--tokens", type=int, help="of the prompt, instead of the shape's")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="devices of each engine")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"some of {', '.join(ARMS)}")
    parser.add_argument("--warm-ups", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="of one more request of kvtc")
    parser.add_argument("--engine", choices=list(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    ranks = arguments.tensor_parallel
    if arguments.profile and ranks > 1:
        parser.error("--profile is of one process: leave out --tensor-parallel")
    if arguments.output is None:
        name = "vllm_h200.json" if ranks == 1 else f"vllm_h200_tp{ranks}.json"
        arguments.output = RESULTS / name
    if arguments.engine:
        found = Engine(arguments).measured()
        (arguments.folder / "found.json").write_text(json.dumps(found))
        return
    arms = arguments.arms.split(",")
    if not set(arms) <= set(ARMS):
        parser.error(f"--arms {arguments.arms}: expected some of {', '.join(ARMS)}")
    console = Console(highlight=False)
    result: dict[str, Any] = {}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
    result |= environment() | {"shape": arguments.shape, "asked_ratio": arguments.ratio}
    result["tensor_parallel"] = ranks
    # Of the host's memory, where ranks share pages.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if ranks > 1 else None) as name:
        folder = Path(name)
        shape = shape_of(arguments)
        save_model(shape, folder / "model")
        if "kvtc" in arms:
            begin = time.perf_counter()
            save_calibrations(shape, ranks, folder / "calibration.safetensors")
            console.print(f"calibration drawn in {time.perf_counter() - begin:.1f} s")
        for engine, own in ENGINES.items():
            if set(own) & set(arms):
                run_engine(engine, arguments, folder, result, console)
    show(result, console)


def run_engine(
    engine: str,
    arguments: argparse.Namespace,
    folder: Path,
    result: dict[str, Any],
    console: Console,
) -> None:
    """Measure the arms of an engine, in a process, and write what there is."""
    settings = {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
    }
    if arguments.tensor_parallel > 1:
        settings |= {
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
            "NCCL_NVLS_ENABLE": "0",
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
            "NVSHMEM_DISABLE_NVLS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a NUMA node for each is not everywhere
        }
    found = folder / "found.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, *sys.argv, "--engine", engine, "--folder", str(folder)]
    begin = time.perf_counter()
    with open(folder / "log", "w+b") as log:
        run = subprocess.run(
            command, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    text = (folder / "log").read_text(errors="replace")
    if run.returncode or not found.exists():
        print(text[-6000:])
        console.print(f"the engine of {engine} failed: its arms are left out")
        return
    own = json.loads(found.read_text())
    print(own.pop("profile", ""))
    result.setdefault("arms", {}).update(own.pop("arms"))
    result |= own
    console.print(f"engine {engine}: {time.perf_counter() - begin:.0f} s, start included")
    write_result(arguments.output, result, console)
    for name in ("loaded ", "codec takes", "layout", "FlashAttention", "failed", "WARNING kvtc"):
        for line in [x for x in text.splitlines() if name in x][:3]:
            print(line)


def show(result: dict[str, Any], console: Console) -> None:
    """The arms that there are."""
    table = Table("", "seconds to the first token", "quickest", "slowest", "cached tokens")
    for name, own in result.get("arms", {}).items():
        numbers = [f"{x:.4f}" for x in (own["median"], min(own["seconds"]), max(own["seconds"]))]
        table.add_row(name, *numbers, str(own["cached"]))
    console.print(table)
    names = ("ratio", "breakdown", "device_bytes", "restored_error")
    console.print({x: result[x] for x in names if x in result})


def shape_of(arguments: argparse.Namespace) -> Shape:
    shape = SHAPES[arguments.shape]
    layers, tokens = arguments.layers or shape.layers, arguments.tokens or shape.tokens
    per_group = shape.layers // shape.groups
    return shape._replace(layers=layers, tokens=tokens, groups=layers // per_group)


# What is drawn.


def save_model(shape: Shape, folder: Path) -> None:
    """A folder that vLLM loads with dummy weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        architectures=["LlamaForCausalLM"],
        kvtc_groups=shape.groups,
        torch_dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=None,
    ).save_pretrained(folder)


def served_shape(config: Any) -> Shape:
    """The shape of a model that :func:`save_model` made."""
    return Shape(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        config.kvtc_groups,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.vocab_size,
        0,
    )


def part_of(shape: Shape, ranks: int) -> Shape:
    """What each rank has."""
    return shape._replace(kv_heads=shape.kv_heads // ranks, heads=shape.heads // ranks)


def save_calibrations(shape: Shape, ranks: int, path: Path) -> None:
    """One for each rank's heads; they differ in nothing else."""
    part = part_of(shape, ranks)
    drawn = drawn_calibration(part)
    for rank in range(ranks):
        own = with_heads(drawn, [(rank * part.kv_heads, shape.kv_heads)])
        own.save(str(part_path(path, rank, ranks)))


def spectrum(rank: int) -> NDArray[np.float32]:
    shares = np.arange(rank) / max(rank - 1, 1)
    found = np.exp(np.interp(shares, list(SPECTRUM), np.log(list(SPECTRUM.values()))))
    return found.astype(np.float32)


def basis(shape: Shape) -> NDArray[np.float32]:
    """Orthonormal rows [rank, width of a group's K and V], of every group: rows of a cosine
    transform, columns in another order, with signs."""
    width = 2 * shape.layers // shape.groups * shape.kv_heads * shape.dim
    rng = np.random.default_rng(0)
    which = rng.choice(np.arange(1, width), int(RANK_SHARE * width), replace=False)
    turns = ((2 * rng.permutation(width) + 1) * which[:, None]) % (4 * width)
    signs = rng.choice([-1.0, 1.0], width) * np.sqrt(2 / width)
    return (np.cos(turns * (np.pi / (2 * width))) * signs).astype(np.float32)


def drawn_calibration(shape: Shape) -> kvtc.Calibration:
    """Of the caches that :func:`draw_weights` gives."""
    geometry = kvtc.Geometry.uniform(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        rope=kvtc.Rope.from_theta(THETA, shape.dim),
    )
    matrix = basis(shape)
    variances = spectrum(len(matrix))
    tables = uniform_tables(variances)
    parts = []
    for layers in np.array_split(np.arange(shape.layers), shape.groups):
        own = tuple(layers.tolist())
        components = Components.dense(matrix.astype(np.float16))
        mean = np.zeros(matrix.shape[1], np.float32)
        energy = float(variances.sum())
        parts.append(Part(own, own, mean, components, variances, energy, uniform=tables))
    return kvtc.Calibration(geometry, (SectionCalibration({"joint": tuple(parts)}, 100_000),), 4)


def uniform_tables(variances: NDArray[np.float32]) -> UniformTables:
    """Tables fitted to some components."""
    rank = len(variances)
    some = np.unique(np.linspace(0, rank - 1, min(rank, TABLES)).astype(int))
    rows = np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, (4096, len(some)))
    rows *= np.sqrt(variances[some])
    classes = np.full(len(rows), MIDDLE, np.uint8)
    unit = 2 * float(np.sqrt(variances[0])) / 2 ** ((55 + MIDDLE) / 4)
    families = fit_families(
        np.ascontiguousarray(rows.astype(np.float32)), classes, unit=unit, steps=56
    )
    nearest = np.searchsorted(some, np.arange(rank)).clip(0, len(some) - 1)
    families = replace(
        families,
        ids=np.ascontiguousarray(families.ids[:, :, nearest]),
        rate=np.ascontiguousarray(families.rate[:, nearest]),
        distortion=np.ascontiguousarray(families.distortion[:, nearest]),
        energy=families.energy[nearest],
    )
    errors = np.linspace(0.01, 0.5, 56, dtype=np.float32)
    return UniformTables(unit, families, errors, errors)


def draw_weights(model: Any, shape: Shape, tp_rank: int) -> None:
    """K and V of a token that a rank has, as drawn linear functions of its embedding.

    Embeddings are large beside what layers add to them, so that all layers see the same.
    """
    import torch

    # vLLM has set a default type and device.
    embedding = model.model.embed_tokens.weight.data
    device = embedding.device
    matrix = torch.from_numpy(basis(shape)).to(device)
    rank, width = matrix.shape
    deviations = torch.from_numpy(np.sqrt(spectrum(rank))).to(device)
    embedding.uniform_(-1, 1)
    groups = np.array_split(np.arange(shape.layers), shape.groups)
    size = shape.kv_heads * shape.dim
    for group, layers in enumerate(groups):
        rng = np.random.default_rng([group, tp_rank])
        chosen = rng.permutation(shape.hidden)[:rank]
        rows = torch.zeros(width, shape.hidden, dtype=torch.float32, device=device)
        rows[:, torch.from_numpy(chosen).to(device)] = matrix.T * deviations
        for i, layer in enumerate(layers.tolist()):
            block = model.model.layers[layer]
            block.input_layernorm.weight.data.fill_(1)
            own = block.self_attn.qkv_proj.weight.data
            k, v = (rows[(i + j) * size : (i + j + 1) * size] for j in (0, len(layers)))
            own[-2 * size :] = torch.cat([k, v]).to(own.dtype)


# Engines.


class Engine:
    """An engine of vLLM in this process, and what it took."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments, self._shape = arguments, shape_of(arguments)
        self._spans = Spans()
        #: Ranks of other processes have calls that this one does not see.
        self._alone = arguments.tensor_parallel == 1
        if arguments.engine == "kvtc" and self._alone:
            self._watch()
        self._llm = self._started()
        rng = np.random.default_rng(0)
        self._ids = rng.integers(0, self._shape.vocabulary, self._shape.tokens).tolist()

    def _started(self) -> Any:
        import torch
        from vllm import LLM

        arguments, shape, ranks = self._arguments, self._shape, self._arguments.tensor_parallel
        cuda = torch.cuda.is_available()
        spare_numba()
        more: dict[str, Any] = {"gpu_memory_utilization": 0.5} if cuda else {}
        if ranks > 1:
            more |= {
                "tensor_parallel_size": ranks,
                "distributed_executor_backend": "mp",
                "disable_custom_all_reduce": True,
            }
        return LLM(
            model=str(arguments.folder / "model"),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=max(40_000, shape.tokens + 64) if cuda else shape.tokens + 64,
            max_num_batched_tokens=max(shape.tokens, 2048),
            enable_prefix_caching=True,
            kv_transfer_config=self._connector(),
            worker_extension_cls="_vllm_worker.Extension",
            **more,
        )

    @property
    def _store(self) -> str:
        return "memory://bench" if self._alone else str(self._arguments.folder / "pages")

    def _connector(self) -> dict[str, Any] | None:
        if self._arguments.engine == "plain":
            return None
        if self._arguments.engine == "raw":
            return {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"cpu_bytes_to_use": 8 << 30},
            }
        return {
            "kv_connector": "KvtcConnector",
            "kv_connector_module_path": "kvtc_stream.integrations.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "calibration": str(self._arguments.folder / "calibration.safetensors"),
                "store": self._store,
                "ratio": self._arguments.ratio,
                "timeout": 60.0,
            },
        }

    def _watch(self) -> None:
        """Take the time of the connector's parts."""
        import torch

        from kvtc_stream.integrations.vllm import scheduling, transfer

        watched = [
            (scheduling.PageScheduler, "_look_up", "find"),
            (transfer.PageTransfer, "_load", "load"),
            (transfer.PageTransfer, "_fetch", "fetch"),
            (kvtc.PageCodec, "checked_many", "check"),
            (transfer.PageTransfer, "_load_groups", "check and decode"),
        ]
        if torch.cuda.is_available():
            from kvtc_stream.gpu.runtime.staging import Staging

            watched.append((Staging, "upload", "copy to the device"))
        for owner, name, label in watched:
            setattr(owner, name, self._spans.timed(getattr(owner, name), label))

    def measured(self) -> dict[str, Any]:
        """What goes into the result."""
        arguments = self._arguments
        versions = {
            name: importlib.metadata.version(name)
            for name in ("vllm", "vllm-cpu", "cupy-cuda13x", "cupy-cuda12x", "numba-cuda")
            if installed(name)
        }
        found: dict[str, Any] = {
            "arms": {},
            "engine_versions": versions,
            "prompt_tokens": len(self._ids),
        }
        for arm in ENGINES[arguments.engine]:
            if arm not in arguments.arms.split(","):
                continue
            own = self._arm(arm)
            found["arms"][arm] = own
            found[f"{arm}_s"] = own["median"]
        if arguments.engine == "kvtc":
            workers = self._llm.collective_rpc("codec_bytes")
            found |= {name: max(x[name] for x in workers) for name in workers[0]}
            found |= self._stored()
            if self._alone:
                found["breakdown"] = self._spans.medians()
            errors = self._llm.collective_rpc("restored_errors")
            if not all(own and max(own.values()) < 0.5 for own in errors):
                raise SystemExit(f"pages are not what was stored: errors {errors} of ranks")
            found["restored_error"] = errors[0] if self._alone else errors
            if arguments.profile:
                found["profile"] = self._profile()
        return found

    def _arm(self, arm: str) -> dict[str, Any]:
        arguments, keeps = self._arguments, arm == "gpu_hit"
        if arm != "recompute":
            self._request()  # what is restored later
        found, cached = [], []
        for i in range(arguments.warm_ups + arguments.repeats):
            self._drain(forget=not keeps)
            self._llm.collective_rpc("check_restored", args=(i < arguments.warm_ups,))
            if i == arguments.warm_ups:
                self._spans.clear()
            self._spans.begin()
            seconds, hit = self._request()
            found.append(seconds)
            cached.append(hit)
        self._drain(forget=True)
        cached, found = cached[arguments.warm_ups :], found[arguments.warm_ups :]
        expected = 0 if arm == "recompute" else (len(self._ids) - 1) // PAGE * PAGE
        if min(cached) < expected or (arm == "recompute" and max(cached)):
            raise SystemExit(f"{arm}: {cached} tokens were cached, expected {expected}")
        return {"median": statistics.median(found), "seconds": found, "cached": min(cached)}

    def _request(self) -> tuple[float, int]:
        """Seconds to the first token, and how many of the prompt's were cached."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0, detokenize=False, ignore_eos=True)
        prompt = {"prompt_token_ids": self._ids}
        begin = time.perf_counter()
        [output] = self._llm.generate([prompt], parameters, use_tqdm=False)
        return time.perf_counter() - begin, int(output.num_cached_tokens or 0)

    def _drain(self, *, forget: bool) -> None:
        """Let the engine end what it does after a request; what the device has is forgotten."""
        engine = self._llm.llm_engine
        core = engine.engine_core.engine_core
        deadline = time.monotonic() + 120
        while core.scheduler.has_requests() or getattr(core, "batch_queue", None):
            engine.step()
            if time.monotonic() > deadline:
                raise SystemExit("the engine does not come to rest")
        if forget and not self._llm.reset_prefix_cache():
            raise SystemExit("the device's prefix cache was not forgotten: blocks are in use")

    def _stored(self) -> dict[str, Any]:
        from kvtc_stream.integrations.hosts.store import open_store

        sizes = [entry.size for entry in open_store(self._store).list()]
        s = self._shape
        raw = 2 * 2 * PAGE * s.layers * s.kv_heads * s.dim // self._arguments.tensor_parallel
        return {
            "ratio": raw * len(sizes) / sum(sizes),
            "pages": len(sizes),
            "page_bytes": statistics.mean(sizes),
            "raw_page_bytes": raw,
        }

    def _profile(self) -> str:
        """Where the time of one restored prompt goes: kernels, and Python of one decode."""
        import torch

        from kvtc_stream.integrations.vllm.transfer import PageTransfer

        parts = []
        cuda = torch.cuda.is_available()
        own, profile = PageTransfer._load_groups, cProfile.Profile()
        busy = threading.Lock()

        def load_groups(*arguments: Any) -> None:
            if busy.acquire(blocking=False):
                with profile:
                    own(*arguments)
            else:
                own(*arguments)

        PageTransfer._load_groups = load_groups  # type: ignore[method-assign]
        self._drain(forget=True)
        self._request()
        PageTransfer._load_groups = own  # type: ignore[method-assign]
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(45)
        parts.append("decoding, one thread:\n" + text.getvalue())
        self._drain(forget=True)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as kernels:
            self._request()
        by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        parts.append(kernels.key_averages().table(sort_by=by, row_limit=30))
        return "\n".join(parts)


def spare_numba() -> None:
    """On a CPU vLLM looks for kernels in all modules, and fails at Numba's functions of
    libraries."""
    if installed("vllm-cpu"):
        from vllm.triton_utils import dispatcher

        dispatcher.vars = lambda x: own if isinstance(own := vars(x), dict) else {}


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Spans:
    """When functions ran, by request."""

    def __init__(self) -> None:
        self._requests: list[list[tuple[str, float, float]]] = [[]]
        self._begins = [0.0]

    def clear(self) -> None:
        """Forget all requests."""
        self._requests, self._begins = [], []

    def begin(self) -> None:
        """The next request begins."""
        self._requests.append([])
        self._begins.append(time.perf_counter())

    def timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """The same function, whose calls are noted."""

        @wraps(function)
        def call(*arguments: Any, **names: Any) -> Any:
            own, begin = self._requests[-1], time.perf_counter()
            try:
                return function(*arguments, **names)
            finally:
                own.append((label, begin, time.perf_counter()))

        return call

    def medians(self) -> dict[str, dict[str, float]]:
        """Of each function, medians over requests: milliseconds from the request to the first
        call's begin and to the last one's end, of all calls together, and how many."""
        found: dict[str, list[tuple[float, ...]]] = {}
        for begin, calls in zip(self._begins, self._requests, strict=True):
            for label in {x[0] for x in calls}:
                own = [x for x in calls if x[0] == label]
                first, last = min(x[1] for x in own), max(x[2] for x in own)
                spent = sum(x[2] - x[1] for x in own)
                row = (first - begin, last - begin, spent, len(own) / 1e3)
                found.setdefault(label, []).append(tuple(1e3 * x for x in row))
        names = ("first_begins_ms", "last_ends_ms", "together_ms", "calls")
        return {
            label: dict(zip(names, np.median(rows, axis=0).round(3).tolist(), strict=True))
            for label, rows in found.items()
        }


class Check:
    """Whether restored pages are near those that were stored."""

    def __init__(self) -> None:
        self.on = False
        self.errors: dict[str, float] = {}
        self._kept: dict[int, tuple[Any, Any]] = {}

    def watch(self) -> None:
        """Keep the first pages that are stored, and compare them with what is restored."""
        from kvtc_stream.integrations.vllm import sink, transfer

        take, load = sink.StoreSink.take, transfer.PageTransfer._load_groups

        def taken(own: Any, jobs: Any, k: Any, v: Any, valid: Any) -> None:
            for i, job in enumerate(jobs):
                if job.key.position % (8 * PAGE) == 0:
                    tokens = slice(i * PAGE, (i + 1) * PAGE)
                    pair = [x[:, :, tokens].float().cpu() for x in (k, v)]
                    self._kept[job.key.position] = pair[0], pair[1]
            take(own, jobs, k, v, valid)

        def loaded(own: Any, request: Any, groups: Any) -> None:
            load(own, request, groups)
            for group in groups if self.on else ():
                for job in group.jobs[: group.done]:
                    self._compare(job.key.position, own._blocks.read(job.blocks))

        sink.StoreSink.take, transfer.PageTransfer._load_groups = taken, loaded

    def _compare(self, position: int, pair: tuple[Any, Any]) -> None:
        if position in self._kept:
            for name, exact, own in zip("kv", self._kept[position], pair, strict=True):
                error = float((own.float().cpu() - exact).norm() / exact.norm())
                self.errors[name] = max(self.errors.get(name, 0.0), error)


if __name__ == "__mp_main__":  # a rank's process
    spare_numba()
if __name__ == "__main__":
    main()
