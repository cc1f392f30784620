"""Blocks with uniform bands to tensors, many at a time.

Blocks go through in batches of some thousand tokens: payloads to the device, tiles to symbols, and
for each part of the basis a product and a scatter, in pieces whose rows stay in the cache between
the two. Nothing waits for the device before the end, when faults are looked at: a block with one is
decoded on the CPU, which says what is wrong with it, or copes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats import Block, Section
from kvtc_stream.gpu import layout, rans
from kvtc_stream.gpu.plan import DevicePart, DevicePlan
from kvtc_stream.gpu.products import synthesise
from kvtc_stream.gpu.rope import DeviceRopes
from kvtc_stream.gpu.tensors import Tensors
from kvtc_stream.payload import UniformPayload, nibbles, tiles

#: Tokens of a batch, and bytes of rows between a product and its scatter (half an H100's cache).
BATCH_TOKENS, PIECE_BYTES = 16_384, 24 << 20
_ALIGNMENT = 16


@dataclass(frozen=True)
class Placed:
    """A block, and where its tokens go: int64 [tokens], -1 for those that nobody wants."""

    block: Block
    slots: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Symbols of some blocks on the device, and what turns them into values.

    Attributes
    ----------
    symbols, scales
        Bits of binary16 [components, stride], float32 [parts, stride].
    tokens, stride
        Tokens in all, and from component to component.
    slots, ropes
        Of the tokens.
    """

    blocks: Sequence[Placed]
    symbols: Any
    scales: Any
    tokens: int
    stride: int
    slots: Any
    ropes: DeviceRopes
    faults: Any
    overflow: Any


def batches(blocks: Sequence[Placed]) -> Iterator[Sequence[Placed]]:
    """Blocks of about ``BATCH_TOKENS`` tokens together, alike in the size of their tiles."""
    batch: list[Placed] = []
    tokens = 0
    for placed in blocks:
        if batch and tokens + placed.block.tokens > BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(placed)
        tokens += placed.block.tokens
    if batch:
        yield batch


def upload(blocks: Sequence[Block]) -> tuple[Any, NDArray[np.int64]]:
    """Payloads on the device, and where each begins; asynchronous where host memory is pinned."""
    sizes = np.array([len(b.coded) for b in blocks], np.int64)
    ends = np.cumsum(-(-sizes // _ALIGNMENT) * _ALIGNMENT)
    begins = np.concatenate([[0], ends[:-1]])
    data = cupy.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    stream = cupy.cuda.get_current_stream().ptr
    for block, begin, size in zip(blocks, begins.tolist(), sizes.tolist(), strict=True):
        if size:
            source = np.frombuffer(block.coded, np.uint8)
            cupy.cuda.runtime.memcpyAsync(
                data.data.ptr + begin,
                source.ctypes.data,
                size,
                cupy.cuda.runtime.memcpyHostToDevice,
                stream,
            )
    return data, begins


def tile_tasks(
    plan: DevicePlan, payloads: Sequence[UniformPayload], tokens: NDArray[np.int64],
    firsts: NDArray[np.int64], begins: NDArray[np.int64],
) -> NDArray[np.int64]:  # fmt: skip
    """int64 [tiles, FIELDS]: see :mod:`kvtc_stream.gpu.rans`.

    ``tokens`` and ``firsts`` [blocks]: coded tokens, and the first one among all; ``begins`` where
    payloads begin.
    """
    rows = []
    number = np.arange(len(payloads))
    for size in sorted({p.tile_components for p in payloads}):
        own = number[[p.tile_components == size for p in payloads]]
        of_parts = [tiles(count, size) for count in plan.coded]
        parts = np.repeat(np.arange(len(of_parts)), list(map(len, of_parts)))
        first = [plan.parts[i].first + t.start for i, ts in enumerate(of_parts) for t in ts]
        count = [t.stop - t.start for ts in of_parts for t in ts]
        leading = np.array([t.start == 0 for ts in of_parts for t in ts], np.bool_)
        lengths = np.array([payloads[b].lengths for b in own], np.int64).reshape(len(own), -1)
        ends = np.cumsum(lengths, axis=1)
        task = np.zeros((len(own), len(parts), rans.FIELDS), np.int64)
        task[:, :, rans.PART] = parts
        task[:, :, rans.TOKENS] = tokens[own, None]
        task[:, :, rans.TOKEN] = firsts[own, None]
        task[:, :, rans.FIRST] = first
        task[:, :, rans.COUNT] = count
        task[:, :, rans.BLOCK] = own[:, None]
        of_tiles = np.array([payloads[b].tiles for b in own])
        task[:, :, rans.WORDS] = (begins[own, None] + of_tiles[:, None] + ends - lengths) // 2
        task[:, :, rans.LENGTH] = lengths // 2
        of_classes = np.array([payloads[b].classes for b in own])
        halves = np.array([nibbles(int(n)) for n in tokens[own]])
        classes = begins[own, None] + of_classes[:, None] + halves[:, None] * parts
        task[:, :, rans.CLASSES] = np.where(leading, classes, -1 - classes)
        task[:, :, rans.LEVEL] = np.array([payloads[b].level for b in own])[:, None]
        rows.append(task.reshape(-1, rans.FIELDS))
    return by_part(np.concatenate(rows), len(plan.parts))


def by_part(tasks: NDArray[np.int64], parts: int) -> NDArray[np.int64]:
    """Tasks of a part side by side, filled up to whole blocks of threads."""
    sorted_tasks = []
    for part in range(parts):
        own = tasks[tasks[:, rans.PART] == part]
        filled = np.zeros((-(-len(own) // rans.TILES) * rans.TILES, rans.FIELDS), np.int64)
        filled[:, rans.PART] = part
        filled[: len(own)] = own
        sorted_tasks.append(filled)
    return np.concatenate(sorted_tasks) if sorted_tasks else np.zeros((0, rans.FIELDS), np.int64)


@dataclass(frozen=True)
class _Columns:
    """Columns of a part's rows that are wanted, from the first to the last.

    ``k`` and ``v`` are int32 arrays: layers, and where each begins among these columns.
    """

    begin: int
    end: int
    k: tuple[Any, Any]
    v: tuple[Any, Any]


class BlockDecoder:
    """Decodes data blocks of one kind of stream. One thread and one CUDA stream at a time."""

    def __init__(self, section: Section, plan: DevicePlan) -> None:
        self._section, self._plan = section, plan
        self._columns: dict[Any, list[_Columns | None]] = {}

    def symbols(self, blocks: Sequence[Placed]) -> Batch:
        """Payloads of a batch of blocks, all of which have coded tokens, to symbols.

        Raises ``FormatError`` for payloads that no writer makes.
        """
        payloads = [UniformPayload.parse(p.block, self._plan.coded) for p in blocks]
        data, begins = upload([p.block for p in blocks])
        return self.symbols_on_device(blocks, payloads, data, begins)

    def symbols_on_device(
        self,
        blocks: Sequence[Placed],
        payloads: Sequence[UniformPayload],
        data: Any,
        begins: NDArray[np.int64],
    ) -> Batch:
        """As :meth:`symbols`, of payloads that are on the device already."""
        plan = self._plan
        counts = np.array([p.block.tokens for p in blocks])
        starts = np.concatenate([[0], np.cumsum(counts)])
        tokens = int(starts[-1])
        stride = -(-tokens // 64) * 64
        coded = np.array([p.block.coded_tokens for p in blocks])
        firsts = np.concatenate([[0], np.cumsum(coded)[:-1]])
        columns = np.concatenate(
            [
                first + np.delete(np.arange(p.block.tokens), p.block.verbatim_tokens)
                for first, p in zip(starts.tolist(), blocks, strict=False)
            ]
        ).astype(np.int32)
        steps = np.array([p.step for p in payloads])[:, None] * np.exp2(np.arange(16) / 4)
        tasks = cupy.asarray(tile_tasks(plan, payloads, coded, firsts, begins))
        symbols = cupy.empty((plan.components, stride), np.uint16)
        scales = cupy.zeros((len(plan.parts), stride), np.float32)
        faults = cupy.zeros(len(blocks), np.int32)
        rans.decode(
            len(tasks) // rans.TILES,
            rans.TILES * 32,
            (
                tasks,
                data,
                data,
                plan.entries,
                plan.buckets,
                plan.families,
                plan.ids,
                plan.base,
                plan.rows,
                plan.components,
                cupy.asarray(columns),
                cupy.asarray(steps.astype(np.float32)),
                scales,
                symbols,
                stride,
                faults,
            ),
            shared=plan.most_families * 256 * 5,
        )
        positions = np.concatenate([np.array(p.block.positions, np.int64) for p in blocks])
        return Batch(
            blocks, symbols, scales, tokens, stride,
            cupy.asarray(np.concatenate([p.slots for p in blocks])),
            DeviceRopes(self._section, positions, sign=1), faults, cupy.zeros(1, np.int32),
        )  # fmt: skip

    def values(
        self, batch: Batch, layers: Sequence[int], k_out: Tensors | None, v_out: Tensors | None
    ) -> None:
        """Symbols to K and V of ``layers`` (indices into the section's, as those of the tensors'
        addresses are); ``None`` is not wanted."""
        wanted = tuple(layers), k_out is not None, v_out is not None
        if wanted not in self._columns:
            self._columns[wanted] = [self._columns_of(part, *wanted) for part in self._plan.parts]
        for i, columns in enumerate(self._columns[wanted]):
            if columns is not None:
                self._part(batch, i, columns, k_out, v_out)

    def _columns_of(
        self, part: DevicePart, layers: tuple[int, ...], with_k: bool, with_v: bool
    ) -> _Columns | None:
        """Where the wanted layers lie in a part's rows."""
        s = self._section
        k_size, v_size = s.kv_heads * s.k_dim, s.kv_heads * s.v_dim
        chosen = frozenset(layers)
        k = [(x, i * k_size) for i, x in enumerate(part.k_layers) if with_k and x in chosen]
        split = len(part.k_layers) * k_size
        v = [(x, split + i * v_size) for i, x in enumerate(part.v_layers) if with_v and x in chosen]
        if not k and not v:
            return None
        begin = min(at for _, at in (*k, *v))
        end = max([*(at + k_size for _, at in k), *(at + v_size for _, at in v)])

        def on_device(found: list[tuple[int, int]]) -> tuple[Any, Any]:
            pairs = np.array(found, np.int32).reshape(-1, 2)
            return cupy.asarray(pairs[:, 0].copy()), cupy.asarray(pairs[:, 1] - np.int32(begin))

        return _Columns(begin, end, on_device(k), on_device(v))

    def _part(
        self,
        batch: Batch,
        index: int,
        columns: _Columns,
        k_out: Tensors | None,
        v_out: Tensors | None,
    ) -> None:
        part, r = self._plan.parts[index], batch.ropes
        width = columns.end - columns.begin
        piece = min(max(64, PIECE_BYTES // (2 * width) // 64 * 64), batch.tokens)
        rows = cupy.empty((piece, width), np.uint16)
        if part.count == 0:
            rows[...] = 0
        first_symbol = batch.symbols.data.ptr + 2 * part.first * batch.stride
        scales = batch.scales.data.ptr + 4 * index * batch.stride
        for at in range(0, batch.tokens, piece):
            count = min(piece, batch.tokens - at)
            synthesise(
                first_symbol + 2 * at,
                batch.stride,
                part.synthesis,
                slice(columns.begin, columns.end),
                count,
                rows.data.ptr,
                width,
            )
            for out, (layers, places), tables in (
                (k_out, columns.k, r.tables),
                (v_out, columns.v, r.none),
            ):
                if out is None or not len(layers):
                    continue
                layout.scatter(out.dtype)(
                    (-(-count // layout.TOKENS), len(layers) * out.heads),
                    layout.THREADS,
                    (
                        out.addresses,
                        layers,
                        out.heads,
                        batch.slots.data.ptr + 8 * at,
                        out.token_stride,
                        out.head_stride,
                        out.dim,
                        count,
                        r.most,
                        r.cosines,
                        r.sines,
                        tables,
                        r.pairs,
                        r.interleaved,
                        r.tokens,
                        at,
                        places,
                        scales + 4 * at,
                        part.synthesis_scale,
                        part.mean.data.ptr + 4 * columns.begin,
                        rows,
                        width,
                        batch.overflow,
                    ),
                )


def decode(
    decoder: BlockDecoder,
    blocks: Sequence[Placed],
    layers: Sequence[int],
    k_out: Tensors,
    v_out: Tensors,
    on_cpu: Callable[[Placed], None],
) -> None:
    """Decode blocks, all of which have coded tokens, into tensors; waits for the device at the end.

    ``on_cpu`` decodes and places a block that the device could not.
    """
    done = []
    for some in batches(blocks):
        batch = decoder.symbols(some)
        decoder.values(batch, layers, k_out, v_out)
        done.append((some, batch.faults, batch.overflow))
    for some, faults, overflow in done:
        found = cupy.asnumpy(faults)
        if int(overflow[0]):
            found[:] = rans.LARGE
        for i in np.flatnonzero(found):
            on_cpu(some[i])
