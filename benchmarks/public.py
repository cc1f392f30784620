"""What users get of the CUDA backend, beside its kernels in the same run.

    python benchmarks/public.py [-o benchmarks/results/h200.json] [--no-adapter]

Mistral-NeMo-12B's shape, 8,192 tokens, caches drawn as those of ``gpu.py``, bfloat16. Speeds are
GB of K and V a second, medians, until the device is done; tensors are on the device, bytes in
pinned memory where they are read, and new ``bytes`` where they are written. ``cpu_s_per_gb`` is
the host's time on all its threads.

``small`` is SmolLM2-135M's shape, with one basis and with one for each of six groups of layers, of
which as many components are coded as at 64 times: eight streams in pinned memory to new tensors,
against copying the raw caches from there.

The adapter's model has drawn weights. Its calibration is drawn too, and so is the cache that is
stored, so ``encode_cache`` gets no ``token_ids``: those of another cache would be refused.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cupy as cp
import ml_dtypes
import numpy as np
from _common import write_result
from rich.console import Console

import kvtc_stream as kvtc
from gpu import GEOMETRIES, RATIO, Model, Restored, Streams, device_result, seconds

TOKENS, MANY = 8192, 8
NAME, SMALL = "Mistral-NeMo-12B", "SmolLM2-135M"
#: Groups of layers of the small model, and components of all of them.
GROUPS = {1: None, 6: 7466}


def timed(task: Callable[[], Any], repeats: int = 5) -> tuple[Any, float, float]:
    """Result, median time until the device is done, and median time of all threads of the host."""
    result, times = task(), []
    task()
    for _ in range(repeats):
        cp.cuda.Device().synchronize()
        begin, used = time.perf_counter(), time.process_time()
        task()
        cp.cuda.Device().synchronize()
        times.append((time.perf_counter() - begin, time.process_time() - used))
    elapsed, cpu = (sorted(x)[repeats // 2] for x in zip(*times, strict=True))
    return result, elapsed, cpu


def pinned(data: bytes) -> memoryview:
    """A read-only copy in pinned memory."""
    copy = np.frombuffer(cp.cuda.alloc_pinned_memory(len(data)), np.uint8, len(data))
    copy[:] = np.frombuffer(data, np.uint8)
    return copy.data.toreadonly()


def kernels(model: Model, streams: int) -> dict[str, float]:
    """Speeds from device to device, as ``gpu.py`` measures them."""
    source = Streams(model, streams, TOKENS, RATIO, frontier=False)
    encoder = source.encoder(measure=False)
    encoding, _ = seconds(partial(source.encode, encoder))
    size = source.size
    del source.tensors[1:], source.caches[1:]
    decoding, _ = seconds(Restored(source).decode)
    return {"decode_gbps": size / decoding / 1e9, "encode_gbps": size / encoding / 1e9}


def public(model: Model) -> dict[str, Any]:
    """The one-shot functions, with sinks and window as they are by default, and without."""
    caches = [
        tuple(x.view(ml_dtypes.bfloat16) for x in model.cache(TOKENS, seed)) for seed in range(MANY)
    ]
    k, v = caches[0]
    size = k.nbytes + v.nbytes
    out = cp.empty_like(k), cp.empty_like(v)
    result: dict[str, Any] = {"many": MANY, "tokens": TOKENS}
    for name, options in (("default", {}), ("without_window", {"window": 0, "sinks": 0})):
        codec = kvtc.Codec(model.calibration, ratio=RATIO, backend="cuda", **options)
        plain = replace(codec, measure=False)
        found: dict[str, float] = {}

        def note(
            what: str, count: int, task: Callable[[], Any], found: dict[str, float] = found
        ) -> Any:
            done, elapsed, cpu = timed(task)
            found[f"{what}_gbps"] = count * size / elapsed / 1e9
            found[f"{what}_cpu_s_per_gb"] = cpu / (count * size / 1e9)
            return done

        data = note("encode_measured", 1, partial(kvtc.encode, k, v, codec))
        found["ratio"] = size / len(data)
        note("encode", 1, partial(kvtc.encode, k, v, plain))
        decode = partial(kvtc.decode, calibration=model.calibration, out=out, backend="cuda")
        note("decode", 1, partial(decode, pinned(data)))
        note("decode_pageable", 1, partial(decode, data))
        # Of the stream's bytes alone: the least that a decoder of ordinary memory could take.
        note("copy_pageable", 1, partial(cp.asarray, np.frombuffer(data, np.uint8)))
        streams = note("encode_many", MANY, partial(kvtc.encode_many, caches, plain))
        held = [pinned(x) for x in streams]
        decode_all = partial(kvtc.decode_many, held, model.calibration, backend="cuda")
        note("decode_many", MANY, decode_all)
        batch = list(zip(rows_of(k, MANY), rows_of(v, MANY), strict=True))
        note("decode_batch", MANY, partial(decode_all, out=batch))
        del batch
        note("copy_pinned", 1, partial(cp.asarray, np.frombuffer(held[0], np.uint8)))
        result[name] = found
    names = ("decode_gbps", "encode_gbps", "decode_many_gbps", "encode_many_gbps")
    return result | {key: result["default"][key] for key in names}


def copies(here: Any, raw: Any) -> None:
    """As many caches to the device."""
    for _ in range(MANY):
        here.set(raw)


def small() -> dict[str, Any]:
    """Restoring caches of a small model, against copying them."""
    layers, heads, dim, _ = GEOMETRIES[SMALL]
    result = {}
    for groups, components in GROUPS.items():
        model = Model(layers, heads, dim, groups, components=components)
        codec = kvtc.Codec(model.calibration, ratio=RATIO, backend="cuda", measure=False)
        caches = [
            tuple(x.view(ml_dtypes.bfloat16) for x in model.cache(TOKENS, seed))
            for seed in range(MANY)
        ]
        size = sum(x.nbytes for pair in caches for x in pair)
        held = [pinned(data) for data in kvtc.encode_many(caches, codec)]
        del caches
        raw = pinned(bytes(size // MANY))
        here = cp.empty(size // MANY, np.uint8)
        _, copied, _ = timed(partial(copies, here, np.frombuffer(raw, np.uint8)))
        decode = partial(kvtc.decode_many, held, model.calibration, backend="cuda")
        _, elapsed, cpu = timed(decode)
        result[f"{groups} of layers"] = {
            "decode_many_gbps": size / elapsed / 1e9,
            "decode_many_cpu_s_per_gb": cpu / (size / 1e9),
            "raw_copy_gbps": size / copied / 1e9,
            "over_raw_copy": copied / elapsed,
        } | {f"kernels_{key}": value for key, value in kernels(model, MANY).items()}
        cp.get_default_memory_pool().free_all_blocks()
    return result


def rows_of(k: Any, many: int) -> list[list[Any]]:
    """Of each of ``many`` caches, a tensor a layer: rows of a batch, like ``k`` of all layers."""
    batch = [cp.empty((many, *layer.shape), layer.dtype) for layer in k]
    return [[layer[i] for layer in batch] for i in range(many)]


def adapter_tasks(model: Model) -> tuple[dict[str, Callable[[], Any]], float]:
    """The transformers adapter, of a model of that shape, and the stream's ratio."""
    import torch
    from transformers import DynamicCache, MistralConfig, MistralForCausalLM

    from kvtc_stream.integrations import transformers as host

    layers, heads, dim = model.shape
    config = MistralConfig(
        vocab_size=131_072,
        hidden_size=5120,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=heads,
        head_dim=dim,
        sliding_window=None,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        network = MistralForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, config.vocab_size, (1, TOKENS), device="cuda")

    @torch.inference_mode()
    def prefill() -> None:
        network(ids, past_key_values=DynamicCache(config=config), logits_to_keep=1)
        torch.cuda.synchronize()

    calibration = replace(
        model.calibration,
        geometry=host.geometry_of(network),
        model=host.model_identity(network),
        _memo={},
    )
    cache = DynamicCache(config=config)
    for number, pair in enumerate(zip(*model.cache(TOKENS, 0), strict=True)):
        cache.update(*(torch.from_dlpack(x[None]).view(torch.bfloat16) for x in pair), number)
    codec = kvtc.Codec(calibration, ratio=RATIO)
    encode = partial(host.encode_cache, cache, model=network)
    data = encode(codec)
    assert data is not None
    tasks: dict[str, Callable[[], Any]] = {
        "prefill": prefill,
        "decode_cache": partial(host.decode_cache, data, calibration, model=network),
        "encode_cache": partial(encode, codec),
        "encode_cache_unmeasured": partial(encode, replace(codec, measure=False)),
    }
    return tasks, float(cache.layers[0].keys.nbytes * 2 * layers / len(data))


def adapter(tasks: dict[str, Callable[[], Any]], ratio: float) -> dict[str, float]:
    """What those of :func:`adapter_tasks` take."""
    found = {f"{name}_s": timed(task)[1] for name, task in tasks.items()}
    return found | {
        "prefill_over_decode_cache": found["prefill_s"] / found["decode_cache_s"],
        "ratio": ratio,
    }


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/h200.json"))
    parser.add_argument("--no-adapter", action="store_true", help="without transformers")
    args = parser.parse_args()
    console = Console(highlight=False)
    model = Model(*GEOMETRIES[NAME])
    result = device_result() | {"geometry": NAME}
    result["public"] = public(model)
    console.print(result["public"])
    cp.get_default_memory_pool().free_all_blocks()
    result["kernels"] = {f"{n} × 8K": kernels(model, n) for n in (1, MANY)}
    console.print(result["kernels"])
    cp.get_default_memory_pool().free_all_blocks()
    result["small"] = small()
    console.print(result["small"])
    if not args.no_adapter:
        result["adapter"] = adapter(*adapter_tasks(model))
        console.print(result["adapter"])
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
