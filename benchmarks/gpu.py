"""Speed of the CUDA backend, beside what the device can do at all.

    python benchmarks/gpu.py [-o benchmarks/results/h100.json] [--quick]
    python benchmarks/gpu.py --frontier benchmarks/results/bases.json -o FILE

Caches are drawn on the device in the layout of well-known models, from bases of drawn orthonormal
directions for every group of layers. Coefficients are Laplacian, with the spectrum of the joint
basis of SmolLM2-135M (stretched to the rank), and a scale for each token, from which its class is
predicted as on real caches; so that symbols, escapes and classes are about as frequent as there.
Speeds are GB of bfloat16 K and V a second; decoding and encoding go from device to device, entropy
coding included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cupy as cp
import ml_dtypes
import numpy as np
from _common import environment, write_result
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import kvtc_stream as kvtc
from kvtc_stream.calibration.components import Components, columns_of_layers
from kvtc_stream.calibration.families import fit_families
from kvtc_stream.calibration.importance import TokenImportance, classes_of, group_edges
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.parts import Part, SectionCalibration, UniformTables
from kvtc_stream.coding.rans import MIDDLE
from kvtc_stream.formats import (
    Block,
    BlockErrors,
    BlockTable,
    Coder,
    DType,
    Limits,
    Role,
    StreamParser,
)
from kvtc_stream.formats.coders import decompress
from kvtc_stream.gpu.coder import encoding
from kvtc_stream.gpu.coder.decoding import UniformDecoder
from kvtc_stream.gpu.coder.plan import DevicePlan
from kvtc_stream.gpu.coder.products import analyse, synthesise
from kvtc_stream.gpu.coder.rope import DeviceRopes
from kvtc_stream.gpu.kernels import layout, rans
from kvtc_stream.gpu.runtime.tensors import Tensors, entries

#: layers, KV heads, channels of a head, and groups of layers, see docs.
GEOMETRIES = {
    "Mistral-NeMo-12B": (40, 8, 128, 20),
    "Llama-3.1-8B": (32, 8, 128, 16),
    "SmolLM2-135M": (30, 3, 64, 1),
}
#: Of the first two: hidden size, that of the MLP, query heads, and vocabulary.
NETWORKS = {
    "Mistral-NeMo-12B": (5120, 14_336, 32, 131_072),
    "Llama-3.1-8B": (4096, 14_336, 32, 128_256),
}
THETA = 1e6
BATCHES = {"8 × 8K": (8, 8192), "1 × 8K": (1, 8192), "1 × 128K": (1, 131_072)}
BLOCK, RATIO = 128, 16
#: Share of a row's width that the rank is, as on SmolLM2-135M; and a cap, about the paper's.
RANK_SHARE, MOST_RANK = 0.25, 10_240
#: Variance of SmolLM2-135M's joint components, relative to the first, at shares of the rank.
SPECTRUM = {
    0: 1.0, 0.001: 0.4619, 0.002: 0.2194, 0.004: 0.1489, 0.008: 0.07965, 0.016: 0.03714,
    0.03: 0.01594, 0.06: 0.006331, 0.1: 0.002899, 0.15: 0.001469, 0.2: 0.0008685, 0.3: 0.0003969,
    0.4: 0.0002208, 0.5: 0.0001357, 0.6: 8.874e-05, 0.7: 6.091e-05, 0.8: 4.301e-05,
    0.9: 3.074e-05, 1: 2.114e-05,
}  # fmt: skip
RANK = 3072
#: How the logarithm falls behind, per share.
BEHIND = 3.7
#: Most components that tables are fitted to.
TABLES = 512
#: Deviation of the logarithm of a token's scale, and what it says about the token's importance.
TOKEN_SCALE, IMPORTANCE = 0.3, 1.3


def llama_config(name: str, **options: Any) -> Any:
    """A transformers configuration of that shape."""
    from transformers import LlamaConfig

    layers, heads, dim, _ = GEOMETRIES[name]
    hidden, inner, queries, vocabulary = NETWORKS[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=queries,
        num_key_value_heads=heads,
        head_dim=dim,
        max_position_embeddings=1 << 18,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        **options,
    )


def seconds(task: Callable[[], Any], repeats: int = 5) -> tuple[float, float]:
    """Median time on the device, and of the host, of a task that was run before."""
    task()
    cp.cuda.Device().synchronize()
    found = []
    for _ in range(repeats):
        first, last = cp.cuda.Event(), cp.cuda.Event()
        begin = time.perf_counter()
        first.record()
        task()
        last.record()
        host = time.perf_counter() - begin
        last.synchronize()
        found.append((cp.cuda.get_elapsed_time(first, last) / 1e3, host))
    return sorted(found)[repeats // 2]


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> Any:
    """float16 [rows, columns]: rows of a cosine transform, columns in another order, with signs."""
    if not rows:
        return np.zeros((0, columns), np.float16)
    which = cp.asarray(rng.choice(columns, rows, replace=False))
    where = cp.asarray(rng.permutation(columns))
    signs = cp.asarray(rng.choice([-1.0, 1.0], columns).astype(np.float32))
    out = np.empty((rows, columns), np.float16)
    for first in range(0, rows, 1024):
        some = which[first : first + 1024, None]
        # An integer, so that the angle is exact however large it is.
        turns = ((2 * where + 1) * some) % (4 * columns)
        matrix = cp.cos(turns.astype(np.float32) * np.float32(np.pi / (2 * columns)))
        matrix *= cp.where(some == 0, np.sqrt(1 / columns), np.sqrt(2 / columns)) * signs
        out[first : first + 1024] = cp.asnumpy(matrix.astype(np.float16))
    return out


class Model:
    """A drawn model: its calibration, and caches of it.

    Parameters
    ----------
    layers, heads, dim, groups
        Its shape, and groups of layers.
    components, leading, of_second
        Coded components of all groups, ``None`` for a share of the width; leading coefficients of
        all groups if there is a second level, and how many of the components are of that.
    reach
        How far the spectrum goes, in that of SmolLM2-135M; with 0 all components are alike.
    deviation
        Of the first component's coefficients.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        dim: int,
        groups: int,
        *,
        components: int | None = None,
        leading: int = 0,
        of_second: int = 0,
        reach: float = 1.0,
        deviation: float = 1.0,
    ) -> None:
        self.shape = (layers, heads, dim)
        rope = kvtc.Rope.from_theta(THETA, dim)
        self.geometry = kvtc.Geometry.uniform(
            layers=layers, kv_heads=heads, head_dim=dim, rope=rope
        )
        size = heads * dim
        runs = list(map(len, np.array_split(np.arange(layers), groups)))
        spans = columns_of_layers(runs, size, size)
        if components is None:
            components = groups * min(int(RANK_SHARE * 2 * size * runs[0]), MOST_RANK)
        rng = np.random.default_rng(0)
        if leading:
            each = [leading // groups] * groups
            of_second = min(of_second, sum(each))
            others = np.diff(np.linspace(0, components - of_second, groups + 1).astype(int))
            local = tuple(
                orthonormal(rng, n + m, 2 * run * size)
                for n, m, run in zip(each, others, runs, strict=True)
            )
            # The second level's among the others, evenly.
            order = np.argsort(
                np.concatenate([np.linspace(0, 1, n) for n in (of_second, *others)]), kind="stable"
            )
            second = orthonormal(rng, of_second, sum(each))
            whole = Components(spans, local, tuple(each), second, order.astype(np.int32))
            found = [(tuple(range(layers)), whole)]
        else:
            firsts = np.cumsum([0, *runs])
            found = [
                (
                    tuple(range(first, first + run)),
                    Components.dense(orthonormal(rng, components // groups, 2 * run * size)),
                )
                for first, run in zip(firsts.tolist(), runs, strict=False)
            ]
        rank = found[0][1].rank
        shares = reach * np.arange(rank) / max(rank - 1, 1)
        logarithms = np.interp(shares, list(SPECTRUM), np.log(list(SPECTRUM.values())))
        logarithms -= np.maximum(shares - 1, 0) * BEHIND
        self.spectrum = (deviation**2 * np.exp(logarithms)).astype(np.float32)
        tables = self._tables(rank)
        parts = []
        for own, matrices in found:
            mean = (0.1 * deviation * rng.standard_normal(2 * len(own) * size)).astype(np.float32)
            energy = float(self.spectrum.sum() + (mean**2).sum())
            parts.append(Part(own, own, mean, matrices, self.spectrum, energy, uniform=tables))
        section = SectionCalibration({"joint": tuple(parts)}, 100_000)
        self.calibration = Calibration(self.geometry, (section,), 4)
        cp.get_default_memory_pool().free_all_blocks()

    def _tables(self, rank: int) -> UniformTables:
        """Tables fitted to some components; the others get those of their nearest neighbour."""
        some = np.unique(np.linspace(0, rank - 1, min(rank, TABLES)).astype(int))
        rng = np.random.default_rng(0)
        scale = np.exp(TOKEN_SCALE * rng.standard_normal((4096, 1)))
        x = rng.laplace(size=(4096, rank)) / np.sqrt(2) * np.sqrt(self.spectrum) * scale
        edges = group_edges(rank)
        features = 2 * min(rank, 300) + len(edges) - 1
        weights = np.zeros(features + 1, np.float32)
        weights[-2] = IMPORTANCE  # of the energy in the last group
        predictor = TokenImportance(
            (1 / np.sqrt(self.spectrum)).astype(np.float32),
            weights,
            np.zeros(features, np.float32),
            np.ones(features, np.float32),
        )
        rows = x.astype(np.float32)
        classes = classes_of(predictor.predict(rows))
        unit = 2 * float(np.sqrt(self.spectrum[0])) / 2 ** ((55 + MIDDLE) / 4)
        families = fit_families(np.ascontiguousarray(rows[:, some]), classes, unit=unit, steps=56)
        nearest = np.searchsorted(some, np.arange(rank)).clip(0, len(some) - 1)
        families = replace(
            families,
            ids=np.ascontiguousarray(families.ids[:, :, nearest]),
            rate=np.ascontiguousarray(families.rate[:, nearest]),
            distortion=np.ascontiguousarray(families.distortion[:, nearest]),
            energy=families.energy[nearest],
        )
        errors = np.linspace(0.01, 0.5, 56, dtype=np.float32)
        return UniformTables(unit, families, errors, errors, predictor)

    def cache(self, tokens: int, seed: int) -> tuple[Any, Any]:
        """K after RoPE and V, bits of bfloat16 [layers, heads, tokens, dim]."""
        layers, heads, dim = self.shape
        k, v = (cp.empty((layers, heads, tokens, dim), np.uint16) for _ in range(2))
        tensors = [Tensors.of_layers(list(x), DType.BFLOAT16) for x in (k, v)]
        ropes = DeviceRopes(self.geometry.sections[0])
        rng = cp.random.default_rng(seed)
        scale = cp.exp(TOKEN_SCALE * rng.standard_normal((tokens, 1), dtype=cp.float32))
        deviations = cp.asarray(np.sqrt(self.spectrum / 2))
        overflow = cp.zeros(1, np.int32)
        for part in self.calibration.sections[0].bases["joint"]:
            size = heads * dim
            columns = [(0, x, i * size) for i, x in enumerate(part.k_layers)]
            split = len(columns) * size
            columns += [(1, x, split + i * size) for i, x in enumerate(part.v_layers)]
            own = cp.asarray(entries(tensors[0], tensors[1], columns, ropes))
            matrices, mean = part.components.mapped(cp.asarray, cp), cp.asarray(part.mean)
            for first in range(0, tokens, 8192):
                count = min(8192, tokens - first)
                u = rng.random((count, part.rank), dtype=cp.float32) - 0.5
                x = -cp.sign(u) * cp.log1p(-1.99998 * cp.abs(u))
                x *= deviations * scale[first : first + count]
                [rows] = matrices.expand(x.astype(cp.float16), [slice(0, part.width)])
                rotations = ropes.at(cp.arange(first, first + count), sign=1)
                layout.scatter(DType.BFLOAT16, True)(
                    (-(-count // layout.TOKENS), len(columns)),
                    layout.THREADS,
                    (
                        own,
                        cp.arange(first, first + count),
                        count,
                        rotations.cosines.data.ptr,
                        rotations.sines.data.ptr,
                        ropes.pairs,
                        ropes.interleaved,
                        ropes.most,
                        count,
                        0,
                        cp.ones(count, np.float32),
                        1.0,
                        mean.data.ptr,
                        rows.data.ptr,
                        rows.shape[1],
                        overflow,
                        cp.ones(1, np.float32),
                    ),
                )
        return k, v


def ceilings() -> dict[str, float]:
    """What the device does at best."""
    size = 1 << 30
    a, b = cp.empty(size, np.uint8), cp.empty(size, np.uint8)
    device, _ = seconds(lambda: cp.copyto(b, a))
    memory = cp.cuda.alloc_pinned_memory(size)
    pinned, _ = seconds(
        lambda: cp.cuda.runtime.memcpyAsync(
            a.data.ptr, memory.ptr, size, 1, cp.cuda.get_current_stream().ptr
        )
    )
    return {"device_copy_gbps": 2 * size / device / 1e9, "pinned_copy_gbps": size / pinned / 1e9}


def block_of(payload: Any, start: int, coded: int) -> Block:
    return Block(
        section=0,
        role=Role.DATA,
        start=start,
        tokens=BLOCK,
        positions=range(start, start + BLOCK),
        verbatim_tokens=(),
        coder=Coder.RANS,
        coded=payload,
        coded_size=BLOCK * coded,
        verbatim_coder=Coder.STORED,
        verbatim=b"",
        errors=BlockErrors(),
    )


class Streams:
    """Caches of a drawn model on the device, and the plan that they are coded with.

    With ``frontier``, all components are coded.
    """

    def __init__(
        self, model: Model, streams: int, tokens: int, ratio: float, *, frontier: bool
    ) -> None:
        codec = kvtc.Codec(model.calibration, ratio=ratio, window=0, sinks=0, block_tokens=BLOCK)
        dealt = codec.plan.sections[0]
        if frontier:
            rank = model.calibration.sections[0].bases["joint"][0].rank
            bands = (replace(dealt.parts[0].bands[0], size=rank),)
            dealt = replace(dealt, parts=tuple(replace(p, bands=bands) for p in dealt.parts))
        self.model, self.streams, self.tokens = model, streams, tokens
        self.plan = DevicePlan(model.calibration, 0, dealt)
        self.section = model.geometry.sections[0]
        per_token = 2 * (self.section.k_width + self.section.v_width)
        #: Bytes of all caches, and of a token once it is coded.
        self.size, self.share = per_token * streams * tokens, per_token / ratio
        self.caches = [model.cache(tokens, seed) for seed in range(streams)]
        self.tensors = [
            [Tensors.of_layers(list(x), DType.BFLOAT16) for x in kv] for kv in self.caches
        ]
        #: For each batch: stream, first token, payloads, and where each block's payload begins.
        self.encoded: list[Any] = []
        self._offset = 0.0

    def encoder(self, *, measure: bool) -> encoding.BatchEncoder:
        """An encoder, with or without errors."""
        return encoding.BatchEncoder(
            self.section, self.plan, DType.BFLOAT16, None, measure=measure, bound=2.0
        )

    def encode(self, encoder: encoding.BatchEncoder) -> None:
        """Encode everything with one step size per batch that meets the target.

        The search begins at the step of the batch before, as the rate control's does. Payloads stay
        on the device.
        """
        self.encoded.clear()
        together = encoding.BATCH_TOKENS
        for i in range(self.streams):
            for first in range(0, self.tokens, together):
                slots = np.arange(first, min(first + together, self.tokens))
                starts = np.append(np.arange(0, len(slots), BLOCK), len(slots))
                batch = encoder.prepare(*self.tensors[i], slots, slots, starts)
                sizes = encoder.sizes(batch)
                for _ in range(10):  # Newton's, with about the slope of all streams
                    coded = sizes.at(slice(None), self._offset).sum()
                    excess = np.log(coded / (self.share * len(slots)))
                    self._offset += excess / 0.09
                    if abs(excess) < 1e-4:
                        break
                done = encoder.encode_on_device(batch, np.full(len(starts) - 1, self._offset))
                # Copied, as a caller would, so that the coefficients' memory is free again.
                used = int(done.places[-1].sum())
                payloads = done.payloads[:used].copy()
                self.encoded.append((i, slots[0], payloads, cp.asnumpy(done.places)))

    def take_blocks(self) -> tuple[BlockTable, NDArray[np.int64]]:
        """The encoded blocks in pinned memory, and the slots of their tokens; payloads on the
        device are dropped."""
        room = sum(data.size + 512 for _, _, data, _ in self.encoded)
        pinned = np.frombuffer(cp.cuda.alloc_pinned_memory(room), np.uint8)
        blocks: list[Block] = []
        slots = []
        at = 0
        for i, first, data, places in self.encoded:
            own = pinned[at : at + data.size]
            own[:] = cp.asnumpy(data)
            at += -(-data.size // 256) * 256
            for j, (begin, count) in enumerate(places.tolist()):
                start = first + j * BLOCK
                slots.append(i * self.tokens + np.arange(start, start + BLOCK))
                payload = own[begin : begin + count].data
                blocks.append(block_of(payload, start, self.plan.components))
        self.encoded.clear()
        return BlockTable.of(blocks), np.concatenate(slots)


class Restored:
    """One cache that all streams are decoded into, as ``decode_many`` makes it."""

    def __init__(self, streams: Streams) -> None:
        layers, heads, dim = streams.model.shape
        shape = layers, heads, streams.streams * streams.tokens, dim
        self.cache = [cp.empty(shape, np.uint16) for _ in "kv"]
        self.decoder = UniformDecoder(streams.section, streams.plan)
        self.destination = self.decoder.destination(
            range(layers), *(Tensors.of_layers(list(x), DType.BFLOAT16) for x in self.cache)
        )
        self.stored = streams.take_blocks()
        #: Batches whose payloads are parsed, and uploaded.
        blocks = self.decoder.load(*self.stored).blocks
        self.work = list(blocks.batches(self.decoder.batch_tokens))
        self.batches: list[Any] = []

    def symbols(self, item: Any) -> Any:
        """Symbols of a batch whose payloads are on the device."""
        return self.decoder.symbols(item)

    def decode(self) -> None:
        """Decode payloads that are on the device."""
        self.batches.clear()
        for item in self.work:
            self.batches.append(self.symbols(item))
            self.decoder.values(self.batches[-1], self.destination)

    def restore(self) -> None:
        """Decode payloads that are in pinned memory."""
        self.batches.clear()
        for item in self.decoder.load(*self.stored).blocks.batches(self.decoder.batch_tokens):
            self.batches.append(self.symbols(item))
            self.decoder.values(self.batches[-1], self.destination)

    def scratch(self) -> int:
        """Bytes of device memory that decoding needs besides its results."""
        pool = cp.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        for item in self.work:
            self.decoder.values(self.symbols(item), self.destination)
        cp.cuda.Device().synchronize()
        return int(pool.total_bytes() - before)


def measure(
    model: Model,
    streams: int,
    tokens: int,
    pinned_gbps: float,
    ratio: float = RATIO,
    *,
    frontier: bool = False,
) -> dict[str, Any]:
    """All figures of a geometry and a batch; for the ``frontier`` speeds only, with all components
    coded."""
    source = Streams(model, streams, tokens, ratio, frontier=frontier)
    plan, size = source.plan, source.size
    result: dict[str, Any] = {
        "kv_bytes": size,
        "components": plan.components,
        "parts": len(plan.parts),
        "multiply_adds_per_token": sum(p.count * p.width for p in plan.leaves)
        + sum(s.analysis.size for s in plan.seconds),
    }
    for name, with_errors in (("encode", False), ("encode_measured", True)):
        encoder = source.encoder(measure=with_errors)
        if with_errors and (frontier or tokens > 100_000):
            continue
        device, host = seconds(lambda encoder=encoder: source.encode(encoder), 3)
        result[f"{name}_gbps"] = size / device / 1e9
        result[f"{name}_host_s"] = host
    coded_bytes = sum(int(places[:, 1].sum()) for *_, places in source.encoded)
    result["ratio"] = size / coded_bytes
    result["bits_per_symbol"] = 8 * coded_bytes / (streams * tokens * plan.components)

    del source.tensors[1:], source.caches[1:]
    restored = Restored(source)
    result["scratch_fraction"] = restored.scratch() / size
    device, host = seconds(restored.decode)
    result["decode_gbps"], result["decode_host_s"] = size / device / 1e9, host
    assert not any(int(b.faults.any()) for b in restored.batches)
    if frontier:
        decoded = restored.symbols(restored.work[0])
        tasks = {
            "symbols": lambda: restored.symbols(restored.work[0]),
            "second level": lambda: plan.stacked(decoded.symbols[: plan.components]),
            "synthesis and scatter": lambda: restored.decoder.values(decoded, restored.destination),
        }
        result["stages_s"] = {name: seconds(task)[0] for name, task in tasks.items()}
        result["stage_tokens"] = decoded.tokens
        return result
    device, _ = seconds(restored.restore, 3)
    result["restore_s"] = device
    result["restore_vs_raw_copy"] = (size / pinned_gbps / 1e9) / device
    encoder = source.encoder(measure=False)
    result |= stages(source, encoder, restored, result["multiply_adds_per_token"])
    return result | coder_speed(
        encoder, restored.decoder, plan, restored.work, model, source.tensors, source.share
    )


def stages(
    source: Streams, encoder: encoding.BatchEncoder, restored: Restored, multiply_adds: int
) -> dict[str, Any]:
    """Seconds of each stage, on one batch, and TFLOP/s of the products."""
    plan = source.plan
    count = min(source.tokens, encoding.BATCH_TOKENS)
    slots = np.arange(count)
    starts = np.append(np.arange(0, count, BLOCK), count)
    batch = encoder.prepare(*source.tensors[0], slots, slots, starts)
    rows = cp.zeros((count, max(p.width for p in plan.leaves)), np.uint16)
    c = batch.coefficients
    decoded = restored.symbols(restored.work[0])
    out = cp.zeros((decoded.tokens, rows.shape[1]), np.uint16)

    def analysis() -> None:
        for p in plan.leaves:
            own = rows.ravel()[: count * p.width].reshape(count, p.width)
            analyse(own, p.analysis, 1.0, c.data.ptr, batch.stride)

    def synthesis() -> None:
        for p in plan.leaves:
            synthesise(
                decoded.symbols.data.ptr + 2 * p.first * decoded.stride,
                decoded.stride,
                p.synthesis,
                slice(0, p.width),
                decoded.tokens,
                out.data.ptr,
                p.width,
            )

    tasks: dict[str, Callable[[], Any]] = {
        "gather and analysis": lambda: encoder._coefficients(batch.source, batch.stride),
        "analysis alone": analysis,
        "symbols": lambda: restored.symbols(restored.work[0]),
        "synthesis and scatter": lambda: restored.decoder.values(decoded, restored.destination),
        "synthesis alone": synthesis,
    }
    found = {name: seconds(task)[0] for name, task in tasks.items()}
    flops = 2 * multiply_adds
    return {
        "stages_s": found,
        "stage_tokens": {"encode": count, "decode": decoded.tokens},
        "analysis_tflops": flops * count / found["analysis alone"] / 1e12,
        "synthesis_tflops": flops * decoded.tokens / found["synthesis alone"] / 1e12,
    }


def coder_speed(
    encoder: encoding.BatchEncoder,
    decoder: UniformDecoder,
    plan: DevicePlan,
    work: list[Any],
    model: Model,
    tensors: list[Any],
    share: float,
) -> dict[str, float]:
    """Symbols a second of the two kernels alone, launched as they are in use."""
    launches: dict[str, tuple[Any, ...]] = {}
    originals = rans.decode, rans.encode

    def keep(name: str, kernel: Any) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            launches[name] = (kernel, arguments, named)
            kernel(*arguments, **named)

        return launch

    rans.decode, rans.encode = keep("decode", rans.decode), keep("encode", rans.encode)
    try:
        batch = decoder.symbols(work[0])
        count = min(batch.tokens, encoding.BATCH_TOKENS)
        slots = np.arange(count)
        starts = np.append(np.arange(0, count, BLOCK), count)
        prepared = encoder.prepare(*tensors[0], slots, slots, starts)
        steps = work[0].payloads.steps[: count // BLOCK].astype(np.float64)
        done = encoder.encode_on_device(prepared, 4 * np.log2(steps / plan.unit))
    finally:
        rans.decode, rans.encode = originals
    out = {}
    kernel, arguments, named = launches["decode"]
    device, _ = seconds(lambda: kernel(*arguments, **named))
    out["rans_decode_gsym"] = batch.tokens * plan.components / device / 1e9
    kernel, arguments, named = launches["encode"]
    # The payloads took the place of the coefficients: give it some again.
    prepared = encoder.prepare(*tensors[0], slots, slots, starts)
    values = list(arguments[2])
    values[7] = prepared.coefficients
    grid, block = arguments[:2]
    device, _ = seconds(lambda: kernel(grid, block, values, **named))
    out["rans_encode_gsym"] = count * plan.components / device / 1e9
    del done
    return out


def nvcomp_speed(model: Model, plan: DevicePlan) -> dict[str, Any]:
    """nvCOMP's coders on the same symbols, a byte each, component by component, in its own chunks.

    Bits a symbol, and Gsymbol/s by the host's clock; of data on the device.
    """
    try:
        from nvidia import nvcomp
    except ImportError:
        return {}
    codec = kvtc.Codec(model.calibration, ratio=RATIO, window=0, sinks=0, block_tokens=BLOCK)
    section = model.geometry.sections[0]
    k, v = (x.view(ml_dtypes.bfloat16) for x in model.cache(8192, 0))
    _, *blocks = StreamParser(Limits()).feed(
        kvtc.encode(k, v, replace(codec, backend="cuda", measure=False))
    )
    table = BlockTable.of([b for b in blocks if b.coded_tokens])
    decoder = UniformDecoder(section, plan)
    batch = decoder.symbols(decoder.load(table, table.ordinals()).blocks)
    values = batch.symbols[:, : batch.tokens].view(np.float16) / plan.down[:, None]
    codes = cp.ascontiguousarray(cp.rint(values).clip(-128, 127).astype(np.int8))
    coded = int(table.rows["coded_length"].sum())
    found: dict[str, Any] = {"ours": {"bits_per_symbol": 8 * coded / codes.size}}
    for name in ("ANS", "Deflate", "GDeflate", "Zstd", "LZ4"):
        coder = nvcomp.Codec(algorithm=name)
        array = nvcomp.as_array(codes.view(np.uint8).ravel())
        packed = coder.encode(array)
        if not (cp.asarray(coder.decode(packed)).view(np.int8).ravel() == codes.ravel()).all():
            raise AssertionError(f"nvCOMP's {name} does not give back what it was given")
        _, encoding_s = by_clock(lambda coder=coder, array=array: coder.encode(array))
        _, decoding_s = by_clock(lambda coder=coder, packed=packed: coder.decode(packed))
        found[name] = {
            "bits_per_symbol": 8 * packed.buffer_size / codes.size,
            "encode_gsym": codes.size / encoding_s / 1e9,
            "decode_gsym": codes.size / decoding_s / 1e9,
        }
    return found


def by_clock(task: Callable[[], Any], repeats: int = 5) -> tuple[Any, float]:
    """Result, and median time until the device is done, of a task that was run before."""
    result, times = task(), []
    for _ in range(repeats):
        cp.cuda.Device().synchronize()
        begin = time.perf_counter()
        result = task()
        cp.cuda.Device().synchronize()
        times.append(time.perf_counter() - begin)
    return result, sorted(times)[repeats // 2]


def paper_speed() -> dict[str, Any]:
    """The preset ``paper`` by the public functions, whose coder of bytes is on the host: of
    SmolLM2-135M's geometry, on caches that the calibration is of."""
    model = Model(*GEOMETRIES["SmolLM2-135M"])
    calibrator = kvtc.Calibrator(model.geometry, bases=("separate",), backend="cuda")
    caches = [[x.view(ml_dtypes.bfloat16) for x in model.cache(8192, seed)] for seed in range(3)]
    for k, v in caches[1:]:
        calibrator.update(k, v)
    codec = kvtc.Codec(calibrator.finish(), "paper", ratio=RATIO, window=0, sinks=0, backend="cuda")
    k, v = caches[0]
    data, encoding_s = by_clock(lambda: kvtc.encode(k, v, codec), 3)
    _, decoding_s = by_clock(lambda: kvtc.decode(data, codec.calibration, backend="cuda"), 3)
    blocks = [b for b in StreamParser(Limits()).feed(data)[1:] if b.coded_tokens]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        task = partial(decompress_all, pool, blocks)
        plain, inflating_s = by_clock(task, 3)
    size = k.nbytes + v.nbytes
    return {
        "threads": os.cpu_count(),
        "ratio": size / len(data),
        "encode_gbps": size / encoding_s / 1e9,
        "decode_gbps": size / decoding_s / 1e9,
        "inflate_share_of_decode": inflating_s / decoding_s,
        "nvcomp_inflate": nvcomp_inflate(blocks, plain, inflating_s),
    }


def decompress_all(pool: ThreadPoolExecutor, blocks: list[Block]) -> list[bytes]:
    """Payloads of blocks, on threads, before the coder of bytes."""
    return list(pool.map(lambda b: decompress(b.coder, b.coded, b.coded_size), blocks))


def nvcomp_inflate(blocks: list[Block], plain: list[bytes], host_s: float) -> dict[str, Any]:
    """nvCOMP on the same DEFLATE payloads, copies to the device included."""
    try:
        from nvidia import nvcomp
    except ImportError:
        return {}
    coder = nvcomp.Codec(algorithm="Deflate", bitstream_kind=nvcomp.BitstreamKind.RAW)
    coded = [b for b in blocks if b.coder is Coder.DEFLATE]

    def inflate() -> Any:
        arrays = [cp.asarray(np.frombuffer(b.coded, np.uint8)) for b in coded]
        return coder.decode(nvcomp.as_arrays(arrays))

    try:
        found, device_s = by_clock(inflate, 3)
        expected = [x for b, x in zip(blocks, plain, strict=True) if b.coder is Coder.DEFLATE]
        same = all(
            cp.asnumpy(cp.asarray(a)).tobytes() == b for a, b in zip(found, expected, strict=True)
        )
    except (RuntimeError, TypeError, ValueError) as error:
        return {"error": str(error)}
    return {"same_bytes": same, "against_threads_of_the_host": host_s / device_s}


def device_result() -> dict[str, Any]:
    """What a result says of where it was measured."""
    properties = cp.cuda.runtime.getDeviceProperties(0)
    return environment() | {
        "gpu": properties["name"].decode(),
        "cuda": {
            "runtime": cp.cuda.runtime.runtimeGetVersion(),
            "driver": cp.cuda.runtime.driverGetVersion(),
            "cupy": cp.__version__,
        },
    }


def frontier(args: argparse.Namespace, limits: dict[str, float], console: Console) -> None:
    """Speed of Mistral-NeMo-12B's geometry with bases that were compared on a small model: the
    same groups, and as many components and leading coefficients for each column. Bits are those
    of the small model, relative to one basis for everything."""
    layers, heads, dim, _ = GEOMETRIES["Mistral-NeMo-12B"]
    small = json.loads(args.frontier.read_text())
    scale = 2 * layers * heads * dim / small["width"]
    result = device_result() | {"ceilings": limits, "points": []}
    if args.output.exists():
        result["points"] = json.loads(args.output.read_text())["points"]
    done = {(p["basis"], p["ratio"]) for p in result["points"]}
    rows = [
        (ratio, row)
        for ratio in args.ratios
        for row in sorted(small["rows"], key=lambda row: row.get("multiply_adds", 0))
        if row["ratio"] == ratio and "multiply_adds" in row
    ]
    for ratio, row in rows:
        shape = small["bases"][row["basis"]]
        if row["basis"] == "K and V apart" or (row["basis"], ratio) in done:
            continue
        components = round(row["components"] * scale)
        begin = time.perf_counter()
        model = Model(
            layers,
            heads,
            dim,
            shape["groups"],
            components=components,
            leading=round(shape["leading"] * scale),
            of_second=round(row["of_second_level"] * scale),
            reach=row["components"] / RANK,
        )
        found = measure(model, 2, 8192, limits["pinned_copy_gbps"], ratio, frontier=True)
        del model
        cp.get_default_memory_pool().free_all_blocks()
        point = {"basis": row["basis"], "ratio": ratio}
        point["bits"] = row["bits_at_equal_error"] / row["bits"]
        point |= {
            name: x for name, x in found.items() if name not in ("kv_bytes", "parts", "ratio")
        }
        result["points"].append(point)
        result["best_within_5_percent"] = {
            str(r): max(
                (p for p in result["points"] if p["ratio"] == r and p["bits"] <= 1.05),
                key=lambda p: p["decode_gbps"],
                default=None,
            )
            for r in sorted({p["ratio"] for p in result["points"]})
        }
        console.print(point, f"{time.perf_counter() - begin:.0f} s")
        args.output.write_text(json.dumps(result))  # what there is, should the rest fail
    write_result(args.output, result, console)


def runs(args: argparse.Namespace, limits: dict[str, float], console: Console) -> dict[str, Any]:
    """All geometries and batches."""
    result = device_result() | {"ceilings": limits, "runs": {}}
    table = Table("geometry", "batch", "ratio", "decode", "encode", "measured", "restore × copy")
    first = True
    for geometry, shape in GEOMETRIES.items():
        if args.quick and not first:
            break
        model = Model(*shape)
        for batch, (streams, tokens) in BATCHES.items():
            if args.quick and not first:
                continue
            start = time.perf_counter()
            found = measure(model, streams, tokens, limits["pinned_copy_gbps"])
            if first:
                result["first_call_s"] = time.perf_counter() - start
            result["runs"].setdefault(geometry, {})[batch] = found
            console.print(geometry, batch, found)
            table.add_row(
                geometry,
                batch,
                f"{found['ratio']:.2f}",
                f"{found['decode_gbps']:.0f}",
                f"{found['encode_gbps']:.0f}",
                f"{found.get('encode_measured_gbps', float('nan')):.0f}",
                f"{found['restore_vs_raw_copy']:.1f}",
            )
            first = False
            args.output.write_text(json.dumps(result))  # what there is, should the rest fail
            cp.get_default_memory_pool().free_all_blocks()
    console.print(table)
    return result


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/h100.json"))
    parser.add_argument("--quick", action="store_true", help="the first geometry and batch only")
    parser.add_argument(
        "--frontier",
        type=Path,
        metavar="BASES",
        help="only that: NeMo with the bases of a result of bases.py, scaled to its rows",
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[64.0, 32.0, 16.0])
    args = parser.parse_args()
    console = Console(highlight=False)
    begin = time.perf_counter()
    limits = ceilings()
    console.print(limits)
    if args.frontier:
        frontier(args, limits, console)
        return
    result = runs(args, limits, console)
    model = Model(*GEOMETRIES["Mistral-NeMo-12B"])
    codec = kvtc.Codec(model.calibration, ratio=RATIO, window=0, sinks=0)
    plan = DevicePlan(model.calibration, 0, codec.plan.sections[0])
    result["nvcomp"] = nvcomp_speed(model, plan)
    console.print(result["nvcomp"])
    del model, plan
    cp.get_default_memory_pool().free_all_blocks()
    result["paper"] = paper_speed()
    console.print(result["paper"])
    nemo = result["runs"]["Mistral-NeMo-12B"]["8 × 8K"]
    result |= {
        name: nemo[name]
        for name in (
            "decode_gbps",
            "encode_gbps",
            "encode_measured_gbps",
            "restore_vs_raw_copy",
            "rans_decode_gsym",
            "rans_encode_gsym",
            "scratch_fraction",
        )
    }
    result["seconds"] = time.perf_counter() - begin
    write_result(args.output, result, console)


if __name__ == "__main__":
    main()
