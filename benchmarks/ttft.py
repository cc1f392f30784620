"""Time to the first token of a prompt: reading it, and restoring its cache.

    python benchmarks/ttft.py --model m.gguf --calibration m.safetensors --text t.txt --tokens 2048
    python benchmarks/ttft.py --shape Llama-3.1-8B          # drawn weights, on a CUDA device

Both end with the likeliest next token, until the device is done. ``restore`` takes the bytes of all
streams of a batch from where they are: pinned memory (with CUDA), ordinary memory, or files, which
are dropped from the system's cache before each run; then one forward pass of the last token goes
over the restored caches. ``copy`` is the same with caches that are on the device as they are, in
two bytes a value: the least that restoring anything could take.

With ``--shape`` weights, calibration and caches are drawn, as those of ``gpu.py``: times do not
depend on them. With ``--model`` the caches are those of the text. What does not fit is left out,
with the reason.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import environment, write_result
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import kvtc_stream as kvtc
from kvtc_stream.evaluation import quality
from kvtc_stream.integrations import transformers as host
from kvtc_stream.io.dlpack import to_numpy

RESULT = Path(__file__).parent / "results" / "ttft.json"
TOKENS = [2048, 8192, 32_768, 131_072]
#: Beside layers, heads and dim: hidden size, of the MLP, query heads, vocabulary.
NETWORKS = {
    "Llama-3.1-8B": (4096, 14_336, 32, 128_256),
    "Mistral-NeMo-12B": (5120, 14_336, 32, 131_072),
}
Pair = tuple[torch.Tensor, torch.Tensor]


class Drawn:
    """A network of that shape on a CUDA device, and what ``gpu.py`` draws for it."""

    def __init__(self, name: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from gpu import GEOMETRIES, Model

        self._model = Model(*GEOMETRIES[name])
        layers, heads, dim = self._model.shape
        hidden, inner, queries, vocabulary = NETWORKS[name]
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=queries,
            num_key_value_heads=heads,
            head_dim=dim,
            max_position_embeddings=max(TOKENS),
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
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
        """Token ids [tokens]."""
        torch.manual_seed(which)
        return torch.randint(0, self.network.config.vocab_size, (tokens,))

    def cache(self, tokens: int, which: int) -> Pair:
        """K and V [layers, heads, tokens, dim], bfloat16."""
        k, v = (torch.from_dlpack(x) for x in self._model.cache(tokens, which))
        return k.view(torch.bfloat16), v.view(torch.bfloat16)


class Real:
    """A model that is given, on the CPU or a CUDA device, and a text."""

    def __init__(self, model: str, calibration: str, texts: Sequence[str]) -> None:
        self.network, tokenizer = host.load_model(model, dtype="bfloat16")
        if torch.cuda.is_available():
            self.network = self.network.to("cuda")
        self.calibration = kvtc.Calibration.load(calibration)
        whole = "".join(Path(path).read_text(encoding="utf-8") for path in texts)
        self._ids = torch.from_numpy(quality.token_ids(tokenizer, whole))

    def ids(self, tokens: int, which: int) -> torch.Tensor:
        """Token ids [tokens]; texts overlap where they must."""
        start = which * (len(self._ids) - tokens) // 8
        if start < 0 or len(self._ids) < tokens:
            raise ValueError(f"the text has {len(self._ids)} tokens, expected {tokens} or more")
        return self._ids[start : start + tokens]

    def cache(self, tokens: int, which: int) -> Pair:
        """K and V [layers, heads, tokens, dim], bfloat16."""
        layers = quality.prefill(self.network, self.ids(tokens, which).numpy()).layers
        k, v = (torch.cat([getattr(x, name) for x in layers]) for name in ("keys", "values"))
        return k, v


class Measured:
    """One length and batch."""

    def __init__(self, source: Drawn | Real, codec: kvtc.Codec, tokens: int, batch: int) -> None:
        self._network, self._codec = source.network, codec
        self._device = source.network.device
        self._cuda = self._device.type == "cuda"
        rows = [source.ids(tokens, which) for which in range(batch)]
        self._ids = torch.stack(rows).to(self._device)
        self._pairs, self._streams = [], []
        for which in range(batch):
            k, v = source.cache(tokens, which)
            own = (k, v) if self._cuda else tuple(map(to_numpy, (k, v)))
            self._pairs.append((k, v))
            self._streams.append(kvtc.encode(*own, codec))
        self.raw_bytes = sum(x.nbytes for pair in self._pairs for x in pair)
        self.stream_bytes = sum(map(len, self._streams))

    def seconds(self, task: Callable[[], Any], before: Callable[[], None], repeats: int) -> float:
        """The median, after a run that compiles and allocates."""
        found = []
        for _ in range(repeats + 1):
            before()
            self._wait()
            begin = time.perf_counter()
            task()
            self._wait()
            found.append(time.perf_counter() - begin)
        return statistics.median(found[1:])

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """The next tokens [batch], of prompts that are read."""
        cache = DynamicCache(config=self._network.config)
        logits = self._network(self._ids, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1)

    @torch.inference_mode()
    def go_on(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """The next tokens [batch], of caches that are there."""
        cache = DynamicCache(config=self._network.config)
        for layer in range(len(pairs[0][0])):
            k, v = (torch.stack([pair[i][layer, :, :-1] for pair in pairs]) for i in range(2))
            cache.update(k, v, layer)
        # The last token is computed, and its keys and values with it.
        logits = self._network(self._ids[:, -1:], past_key_values=cache).logits
        return logits[:, -1].argmax(-1)

    def copy(self) -> torch.Tensor:
        """The next tokens, of caches that are on the device."""
        return self.go_on(self._pairs)

    def restore(self, streams: Sequence[Any]) -> torch.Tensor:
        """The next tokens, of streams."""
        backend = "cuda" if self._cuda else "cpu"
        found = kvtc.decode_many(streams, self._codec.calibration, backend=backend)
        return self.go_on([tuple(map(_as_torch, pair)) for pair in found])  # type: ignore[misc]

    def places(self, folder: Path) -> dict[str, tuple[Callable[[], Any], Callable[[], None]]]:
        """Tasks that restore from each place, and what is done before each run."""
        files = [folder / f"{i}.kvtc" for i in range(len(self._streams))]
        for path, data in zip(files, self._streams, strict=True):
            path.write_bytes(data)
            with open(path, "rb") as file:
                os.fsync(file.fileno())

        def drop() -> None:
            for path in files:
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        found: dict[str, tuple[Callable[[], Any], Callable[[], None]]] = {
            "memory": (lambda: self.restore(self._streams), lambda: None),
            "disk": (lambda: self.restore([path.read_bytes() for path in files]), drop),
        }
        if self._cuda:
            from public import pinned

            held = [pinned(data) for data in self._streams]
            found = {"pinned": (lambda: self.restore(held), lambda: None)} | found
        return found


def _as_torch(x: Any) -> torch.Tensor:
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_dlpack(x).view(torch.bfloat16)


def measure(
    source: Drawn | Real, codec: kvtc.Codec, tokens: int, batch: int, repeats: int
) -> dict[str, Any]:
    """Seconds to the first token, each way."""
    found: dict[str, Any] = {"tokens": tokens, "batch": batch}
    try:
        own = Measured(source, codec, tokens, batch)
        found["prefill_s"] = own.seconds(own.prefill, lambda: None, repeats)
        found["copy_s"] = own.seconds(own.copy, lambda: None, repeats)
        with tempfile.TemporaryDirectory() as folder:
            for name, (task, before) in own.places(Path(folder)).items():
                found[f"{name}_s"] = own.seconds(task, before, repeats)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return found | {"left_out": str(error).splitlines()[0]}
    finally:
        if source.network.device.type == "cuda":
            torch.cuda.empty_cache()
    return found | {"ratio": own.raw_bytes / own.stream_bytes, "raw_bytes": own.raw_bytes}


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--shape", choices=list(NETWORKS), help="drawn, needs CUDA")
    given.add_argument("--model", help="folder or .gguf; with --calibration and --text")
    parser.add_argument("--calibration")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    args = parser.parse_args()
    console = Console(highlight=False)
    source = Drawn(args.shape) if args.shape else Real(args.model, args.calibration, args.text)
    backend = "cuda" if source.network.device.type == "cuda" else "cpu"
    codec = kvtc.Codec(source.calibration, ratio=args.ratio, backend=backend)
    result: dict[str, Any] = environment() | {
        "model": args.shape or Path(args.model).name,
        "on": str(source.network.device),
        "rows": [],
    }
    names = ("prefill", "copy", "pinned", "memory", "disk")
    table = Table("tokens", "batch", *names, "ratio", title="seconds to the first token")
    for tokens in args.tokens:
        for batch in args.batch:
            row = measure(source, codec, tokens, batch, args.repeats)
            console.print(row)
            result["rows"].append(row)
            cells = [f"{row[f'{name}_s']:.3f}" if f"{name}_s" in row else "" for name in names]
            ratio = f"{row['ratio']:.1f}" if "ratio" in row else row["left_out"]
            table.add_row(f"{tokens:,}", str(batch), *cells, ratio)
    result["device"]["load_after"] = os.getloadavg()[0]
    console.print(table)
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
