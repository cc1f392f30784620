"""Time to the first token of a prompt: reading it, and restoring its cache.

    python benchmarks/ttft.py --model m.gguf --calibration m.safetensors --text t.txt --tokens 2048
    python benchmarks/ttft.py --shape Llama-3.1-8B Mistral-NeMo-12B     # drawn, on a CUDA device

A prompt is so many tokens and one more. ``prefill`` reads all of it. The others have the cache of
the tokens, and read the last one: ``there`` has it on the model's device as it is, in two bytes a
value, which no way to restore it can beat; the others restore it from a stream in pinned memory
(with CUDA), ordinary memory, or a file that was dropped from the system's cache, by
``decode_batch``. All end with the likeliest next token, when the device is done; ``restore`` of a
place is its part until the cache is there, and with ``arriving`` the model begins while its last
layers are decoded (``wait=False``). ``returns`` is when the cache was handed over. Streams on the
device are no place of their own: the host parses them.

With ``--shape`` weights, calibration and caches are drawn, as those of ``gpu.py``: times do not
depend on them. With ``--model`` the caches are those of the text. Times are medians of
``--repeats`` runs after one that compiles and allocates; that one alone where it takes longer than
two seconds. All but ``prefill`` take turns, and ``more_than_there`` is a median of differences to
the run of ``there`` just before: a host that others use may be half as fast for some seconds. What
does not fit, or takes longer than is left of ``--seconds``, is left out, with the reason. The
result is written after each row.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import environment, write_result
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import kvtc_stream as kvtc
from kvtc_stream.evaluation import quality
from kvtc_stream.integrations import transformers as host
from kvtc_stream.integrations.transformers.model import growing

RESULT = Path(__file__).parent / "results" / "ttft.json"
TOKENS = [2048, 8192, 32_768, 65_536, 131_072]
PLACES = ("pinned", "memory", "disk")
#: Seconds from which on a task is not run again.
LONG = 2.0
SHAPES = ["Llama-3.1-8B", "Mistral-NeMo-12B"]
Tensors = list[torch.Tensor]
#: By name, what takes streams from a place, and what is done before.
Places = dict[str, tuple[Callable[[], Sequence[Any]], Callable[[], None]]]


class Source:
    """A network, and prompts with their caches."""

    network: Any
    calibration: kvtc.Calibration

    def ids(self, tokens: int, which: int) -> torch.Tensor:
        """Token ids [tokens]."""
        raise NotImplementedError

    def cache(self, ids: torch.Tensor, which: int) -> tuple[Sequence[Any], Sequence[Any]]:
        """K and V, for each layer [heads, tokens, dim], bfloat16, of ids [tokens]."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return self.network.device  # type: ignore[no-any-return]

    def free(self) -> None:
        """Give memory that nothing uses back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            import cupy as cp

            cp.get_default_memory_pool().free_all_blocks()
            torch.cuda.empty_cache()


class Drawn(Source):
    """A network of that shape on a CUDA device, and what ``gpu.py`` draws for it."""

    def __init__(self, name: str) -> None:
        from transformers import LlamaForCausalLM

        from gpu import GEOMETRIES, Model, llama_config

        self._model = Model(*GEOMETRIES[name])
        config = llama_config(name)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            self.network = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self.calibration = replace(
            self._model.calibration,
            geometry=host.geometry_of(self.network),
            model=host.model_identity(self.network),
            _memo={},
        )

    def ids(self, tokens: int, which: int) -> torch.Tensor:
        torch.manual_seed(which)
        return torch.randint(0, self.network.config.vocab_size, (tokens,))

    def cache(self, ids: torch.Tensor, which: int) -> tuple[Sequence[Any], Sequence[Any]]:
        k, v = (torch.from_dlpack(x) for x in self._model.cache(len(ids), which))
        return k.view(torch.bfloat16), v.view(torch.bfloat16)


class Real(Source):
    """A model that is given, on the CPU or a CUDA device, and a text."""

    def __init__(self, model: str, calibration: str, texts: Sequence[str]) -> None:
        self.network, tokenizer = host.load_model(model, dtype="bfloat16")
        if torch.cuda.is_available():
            self.network = self.network.to("cuda")
        self.calibration = kvtc.Calibration.load(calibration)
        whole = "".join(Path(path).read_text(encoding="utf-8") for path in texts)
        self._ids = torch.from_numpy(quality.token_ids(tokenizer, whole))

    def ids(self, tokens: int, which: int) -> torch.Tensor:
        if len(self._ids) < tokens:
            raise SystemExit(f"the text has {len(self._ids)} tokens, expected {tokens} or more")
        start = which * (len(self._ids) - tokens) // 8  # texts overlap where they must
        return self._ids[start : start + tokens]

    def cache(self, ids: torch.Tensor, which: int) -> tuple[Sequence[Any], Sequence[Any]]:
        layers = quality.prefill(self.network, ids.numpy()).layers
        return [x.keys[0] for x in layers], [x.values[0] for x in layers]


class Row:
    """One length and batch."""

    def __init__(
        self, source: Source, codec: kvtc.Codec, tokens: int, batch: int, repeats: int
    ) -> None:
        self._source, self._codec, self._repeats = source, codec, repeats
        self._network, self._device = source.network, source.device
        rows = [source.ids(tokens + 1, which) for which in range(batch)]
        self._ids = torch.stack(rows).to(self._device)
        [section] = codec.calibration.geometry.sections
        #: Of a layer's K or V, and how many of both there are.
        self._shape = (batch, section.kv_heads, tokens, section.k_dim)
        self._layers = len(section.layers)
        self._streams: list[bytes] = []

    def measured(self) -> dict[str, float]:
        """Seconds, each way, and the ratio of all bytes."""
        found = self._medians(lambda: {"prefill_s": self._seconds(self._prefill)})
        self._source.free()
        k, v = self._caches()
        self._source.free()
        found["ratio"] = sum(x.nbytes for x in (*k, *v)) / sum(map(len, self._streams))
        self._restore(self._streams)  # compiles kernels, and makes the tables of a plan
        with tempfile.TemporaryDirectory() as folder:
            places = self._places(Path(folder))
            return found | self._medians(lambda: self._in_turn(k, v, places))

    def _in_turn(self, k: Tensors, v: Tensors, places: Places) -> dict[str, float]:
        """Seconds of a cache that is there, and of the ways to restore it."""
        found: dict[str, float] = {}
        for name, (take, before) in places.items():
            there = self._seconds(lambda: self._go_on(self._cache(k, v)))
            found.setdefault("there_s", there)
            before()
            found[f"{name}_restore_s"] = self._seconds(partial(self._restore, take()))
            ways = {name: True, f"{name}_arriving": False}
            for way, wait in ways.items() if self._device.type == "cuda" else [(name, True)]:
                before()
                found[f"{way}_s"], found[f"{way}_returns_s"] = self._restored(take(), wait)
                found[f"{way}_more_than_there_s"] = found[f"{way}_s"] - there
        return found

    def _restored(self, streams: Sequence[Any], wait: bool) -> tuple[float, float]:
        """Seconds until the next token is there, and until the cache was."""
        self._wait()
        begin = time.perf_counter()
        cache = self._restore(streams, wait)
        returned = time.perf_counter()
        self._go_on(cache)
        self._wait()
        return time.perf_counter() - begin, returned - begin

    def _medians(self, task: Callable[[], dict[str, float]]) -> dict[str, float]:
        rounds: list[dict[str, float]] = []
        while len(rounds) <= self._repeats and not (rounds and max(rounds[0].values()) > LONG):
            rounds.append(task())
        rounds = rounds[1:] or rounds
        return {key: statistics.median(x[key] for x in rounds) for key in rounds[0]}

    def _seconds(self, task: Callable[[], Any]) -> float:
        self._wait()
        begin = time.perf_counter()
        task()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _caches(self) -> tuple[Tensors, Tensors]:
        """K and V of each layer [batch, heads, tokens, dim]; their streams are made meanwhile."""
        k, v = self._empty()
        for which, ids in enumerate(self._ids):
            given = self._source.cache(ids[:-1].cpu(), which)
            own = [[x[which] for x in tensors] for tensors in (k, v)]
            for target, values in zip((*own[0], *own[1]), (*given[0], *given[1]), strict=True):
                target.copy_(values)
            del given
            self._streams.append(kvtc.encode(own[0], own[1], self._codec))
        return k, v

    def _empty(self) -> tuple[Tensors, Tensors]:
        k, v = (
            [
                torch.empty(self._shape, dtype=torch.bfloat16, device=self._device)
                for _ in range(self._layers)
            ]
            for _ in "kv"
        )
        return k, v

    def _cache(self, k: Tensors, v: Tensors) -> DynamicCache:
        """Of these tensors, without a copy."""
        cache = DynamicCache(config=self._network.config)
        for layer, keys, values in zip(cache.layers, k, v, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache

    @torch.inference_mode()
    def _prefill(self) -> Any:
        """The next tokens [batch] of prompts that are read."""
        cache = DynamicCache(config=self._network.config)
        found = self._network(self._ids, logits_to_keep=1, **growing(self._network, cache))
        return found.logits[:, -1].argmax(-1)

    @torch.inference_mode()
    def _go_on(self, cache: DynamicCache) -> Any:
        """The next tokens [batch] of caches that are there."""
        found = self._network(self._ids[:, -1:], **growing(self._network, cache))
        return found.logits[:, -1].argmax(-1)

    def _restore(self, streams: Sequence[Any], wait: bool = True) -> DynamicCache:
        """The cache of all streams, on the device."""
        return host.decode_batch(streams, self._codec.calibration, model=self._network, wait=wait)

    def _places(self, folder: Path) -> Places:
        """Where the streams are: what takes them from there, and what is done before a run."""
        files = [folder / f"{i}.kvtc" for i in range(len(self._streams))]
        for path, data in zip(files, self._streams, strict=True):
            path.write_bytes(data)
            with open(path, "rb") as file:
                os.fsync(file.fileno())

        def drop() -> None:
            for path in files:
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        found: Places = {
            "memory": (lambda: self._streams, lambda: None),
            "disk": (lambda: files, drop),
        }
        if self._device.type == "cuda":
            from public import pinned

            held = [pinned(data) for data in self._streams]
            found = {"pinned": (lambda: held, lambda: None)} | found
        return found


def operations(source: Source, tokens: int, batch: int) -> float:
    """Floating-point operations of a prefill: weights, and causal attention."""
    config = source.network.config
    weights = sum(x.numel() for x in source.network.parameters())
    width = config.num_attention_heads * source.calibration.geometry.sections[0].k_dim
    return batch * (2 * weights * tokens + 2 * config.num_hidden_layers * width * tokens**2)


def too_large(source: Source, tokens: int, batch: int) -> str:
    """Why a row does not fit the device; empty if it does."""
    if source.device.type != "cuda":
        return ""
    config = source.network.config
    [section] = source.calibration.geometry.sections
    cache = 2 * batch * tokens * (section.k_width + section.v_width)  # of all layers
    # A layer's activations: gate, up and product; hidden states, half of them in binary32.
    activations = 2 * batch * tokens * (3 * config.intermediate_size + 8 * config.hidden_size)
    # One is there, one is restored or copied by going on, with symbols and what layers share.
    needed, (free, _) = max(2.5 * cache, cache + activations), torch.cuda.mem_get_info()
    if 1.05 * needed < free:
        return ""
    return f"needs {needed / 1e9:.0f} GB beside the weights, {free / 1e9:.0f} are free"


def rows(source: Source, args: argparse.Namespace, console: Console, note: Callable[[Any], None]):  # type: ignore[no-untyped-def]
    """Measure each length and batch, the least work first; ``note`` takes each as it is done."""
    codec = kvtc.Codec(source.calibration, ratio=args.ratio, backend=_backend(source))
    end, speed = time.monotonic() + args.seconds, 0.0
    pairs = [(tokens, batch) for tokens in args.tokens for batch in args.batch]
    for tokens, batch in sorted(pairs, key=lambda pair: operations(source, *pair)):
        row: dict[str, Any] = {"tokens": tokens, "batch": batch}
        work, left = operations(source, tokens, batch), max(end - time.monotonic(), 0)
        reason = too_large(source, tokens, batch)
        if speed and work / speed > left:
            reason = reason or f"prefill takes {work / speed:.0f} s, {left:.0f} are left"
        begin = time.monotonic()
        try:
            if not reason:
                row |= Row(source, codec, tokens, batch, args.repeats).measured()
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = str(error).splitlines()[0]
        finally:
            source.free()
        if reason:
            row["left_out"] = reason
        else:
            speed = work / row["prefill_s"]
            place = "pinned" if "pinned_s" in row else "memory"
            row["prefill_over_restore"] = row["prefill_s"] / row[f"{place}_restore_s"]
        console.print(row, f"{time.monotonic() - begin:.1f} s in all")
        note(row)


def _backend(source: Source) -> Any:
    return "cuda" if source.device.type == "cuda" else "cpu"


def shown(result: dict[str, Any]) -> Table:
    """Times of a result."""
    ways = ("prefill", "there", *PLACES)
    table = Table(
        *(
            "model",
            "tokens",
            "batch",
            *ways,
            "prefill / restore",
            "more than there, arriving",
            "ratio",
        ),
        title="seconds to the first token",
    )
    for row in result["rows"]:
        cells = [row["model"], f"{row['tokens']:,}", str(row["batch"])]
        if "left_out" in row:
            table.add_row(*cells, row["left_out"])
            continue
        times = [f"{row[f'{way}_s']:.3f}" if f"{way}_s" in row else "" for way in ways]
        place = "pinned" if "pinned_s" in row else "memory"
        names = (f"{place}_{x}more_than_there_s" for x in ("", "arriving_"))
        more = [row[name] for name in names if name in row]
        compared = (
            f"{row['prefill_over_restore']:.1f}",
            ", ".join(f"{1e3 * x:.0f} ms" for x in more),
        )
        table.add_row(*cells, *times, *compared, f"{row['ratio']:.1f}")
    return table


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--shape", nargs="+", choices=SHAPES, help="drawn, needs CUDA")
    given.add_argument("--model", help="folder or .gguf; with --calibration and --text")
    parser.add_argument("--calibration")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of a model's rows")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    args = parser.parse_args()
    console = Console(highlight=False, width=130)
    result: dict[str, Any] = environment() | {"rows": []}
    if torch.cuda.is_available():
        from gpu import device_result

        result |= device_result()
    quiet = Console(quiet=True)
    for name in args.shape or [Path(args.model).name]:
        begin = time.monotonic()
        source: Source = (
            Drawn(name) if args.shape else Real(args.model, args.calibration, args.text)
        )
        console.print(f"{name}: drawn or loaded in {time.monotonic() - begin:.1f} s")

        def note(row: dict[str, Any], name: str = name) -> None:
            result["rows"].append({"model": name} | row)
            result["device"]["load_after"] = os.getloadavg()[0]
            write_result(args.output, result, quiet)

        rows(source, args, console, note)
        del source
    console.print(shown(result))
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
