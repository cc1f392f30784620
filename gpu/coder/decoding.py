"""Blocks to tensors, many at a time.

Blocks are decoded in batches of some thousand tokens. Payloads are copied to the device and decoded
to symbols. Then each part of the basis takes a matrix product and a scatter, in pieces small enough
for the product's rows to stay in the cache. The host waits for the device only at the end, to look
at faults: a block with a fault is decoded on the CPU, which raises the error or succeeds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeAlias

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.coding.payload import UniformPayloads, tiles
from kvtc_stream.formats import Block, BlockTable, Coder, DType, Section
from kvtc_stream.gpu.coder.checksums import checksums
from kvtc_stream.gpu.coder.plan import Basis, DevicePlan
from kvtc_stream.gpu.coder.products import synthesis
from kvtc_stream.gpu.coder.rope import DeviceRotations, ropes_of
from kvtc_stream.gpu.kernels import checksum, layout, rans
from kvtc_stream.gpu.runtime.driver import in_turn
from kvtc_stream.gpu.runtime.staging import Staging, recorded
from kvtc_stream.gpu.runtime.streams import TURNS, beside, stream
from kvtc_stream.gpu.runtime.tensors import Column, Tensors, entries

#: Maximum bytes of a batch's symbols, stacked ones included.
SYMBOL_BYTES = 1 << 30
#: Tokens of a batch, of narrow caches more: as many as have so many values, up to a limit. Below,
#: their tiles are too few for the device, and batches too many for the host.
BATCH_TOKENS, BATCH_VALUES, MOST_TOKENS = 16_384, 16_384 * 81_920, 32_768
#: Bytes of rows between a product and its scatter. An H200 caches 60 MB; less takes more launches.
PIECE_BYTES = 64 << 20
#: Thread blocks of the coder that a multiprocessor runs at a time, limited by their tables.
_BLOCKS_OF_THREADS = 2
#: What payloads that tiles are decoded from begin at multiples of, in bytes.
_ALIGNMENT = 16
#: Arrangements of tiles, and choices of layers, that are kept.
_ORDERS, _SPANS = 64, 64
#: cudaDevAttrMultiProcessorCount
_MULTIPROCESSORS = 16
#: Steps of the classes of tokens, in steps of their block.
_CLASSES = np.exp2(np.arange(16) / 4)


@dataclass(frozen=True)
class CodedBlocks:
    """Blocks with coded tokens, whose payloads are on the device, or on their way.

    Attributes
    ----------
    table
        The blocks.
    edges
        int64 [blocks + 1]: first tokens of blocks, among the tokens of all.
    positions, slots
        int64 [tokens]; slots are where values are written to, -1 for none.
    kept
        bool [tokens]: which are coded; ``None``: all.
    data, begins
        uint8 on the device, and int64 [blocks]: where each block's symbols begin in it.
    payloads
        The fields of the payloads, if they have any.
    """

    table: BlockTable
    edges: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    kept: NDArray[np.bool_] | None = None
    data: Any = None
    begins: NDArray[np.int64] | None = None
    payloads: UniformPayloads | None = None

    @classmethod
    def of(cls, table: BlockTable, slots: NDArray[np.int64]) -> CodedBlocks:
        """The blocks of a table that have coded tokens; ``slots`` of all tokens of all blocks."""
        coded = np.flatnonzero(table.rows["verbatim"] < table.rows["tokens"])
        chosen, own, kept = table.taken(coded), table.chosen(slots, coded), None
        edges = np.concatenate([[0], np.cumsum(chosen.rows["tokens"])])
        if chosen.special:
            kept = ~chosen.verbatim()
            own = np.where(kept, own, -1)
        return cls(chosen, edges, chosen.positions(), own, kept)

    def __len__(self) -> int:
        return len(self.table)

    def columns(self, staging: Staging) -> Any:
        """int32 [coded tokens] on the device: their numbers among all tokens."""
        if self.kept is not None:
            return staging.arrays(np.flatnonzero(self.kept).astype(np.int32))[0]
        size = 1 << len(self.positions).bit_length()
        return _numbers(cupy.cuda.runtime.getDevice(), size)[: len(self.positions)]

    @property
    def coded_tokens(self) -> NDArray[np.int64]:
        """int64 [blocks]."""
        found: NDArray[np.int64] = self.table.rows["tokens"] - self.table.rows["verbatim"]
        return found

    def __getitem__(self, some: slice) -> CodedBlocks:
        """Some blocks that follow one another."""
        edges = self.edges[some.start : some.stop + 1]
        own = slice(int(edges[0]), int(edges[-1]))
        return CodedBlocks(
            self.table.taken(np.arange(some.start, some.stop)),
            edges - edges[0],
            self.positions[own],
            self.slots[own],
            None if self.kept is None else self.kept[own],
            self.data,
            None if self.begins is None else self.begins[some],
            None if self.payloads is None else self.payloads[some],
        )

    def batches(self, tokens: int) -> Iterator[CodedBlocks]:
        """Blocks of about so many tokens together, a quarter more at the most: a few that are left
        over would take as many launches."""
        number = math.ceil(int(self.edges[-1]) / tokens - 0.25)
        if number < 2:
            if len(self):
                yield self
            return
        ends = np.searchsorted(self.edges, np.linspace(0, self.edges[-1], number + 1))
        for first, last in pairwise(np.unique(ends).tolist()):
            yield self[first:last]


@dataclass(frozen=True)
class Batch:
    """Symbols of some blocks on the device, and what is needed to turn them into values.

    Attributes
    ----------
    symbols, scales
        Bits of binary16 [rows, stride], see :meth:`Basis.stacked`, and float32 [parts, stride].
    tokens, stride
        Number of tokens, and elements from one component to the next.
    slots, rotations
        Slot and RoPE of each token.
    faults
        int32 [blocks + 1]: errors that kernels found, 0 if none; the last of values that are not
        finite, in any block.
    """

    symbols: Any
    scales: Any
    tokens: int
    stride: int
    slots: Any
    rotations: DeviceRotations
    faults: Any


class BlockLoad(NamedTuple):
    """Blocks whose payloads are on their way to the device.

    Attributes
    ----------
    blocks
        Those with coded tokens.
    verifying
        Begins to look whether all blocks are whole, beside what the stream does after the upload;
        what it returns waits for it, and raises ``ChecksumError`` if one is not.
    data, exact
        uint8 on the device; and int64 [blocks of the table], where verbatim values begin in it, at
        a multiple of 16; -1 of those that are not there.
    """

    blocks: CodedBlocks
    verifying: Callable[[], Callable[[], None]]
    data: Any
    exact: NDArray[np.int64]

    def exact_address(self, row: int) -> int:
        """Of a block's verbatim values on the device; 0 if they are not there."""
        at = int(self.exact[row])
        return 0 if at < 0 else int(self.data.data.ptr) + at


class RunningBatch(NamedTuple):
    """A batch that the device is at work on: its blocks, and what waits for ``faults`` as of
    :class:`Batch`."""

    blocks: CodedBlocks
    faults: Callable[[], NDArray[np.int32]]


#: A span of columns of a leaf's rows, and where they go.
_SPAN = np.dtype(
    [
        (name, np.int64)
        for name in (
            "first",  # row of the stacked symbols that the leaf begins with
            "components",  # and how many of them it takes
            "part",
            "width",  # of the span
            "matrix",  # address of the leaf's matrix at the span's first column
            "stride",  # elements from one of its rows to the next
            "mean",  # address
            "scale",  # bits of binary32
            "row",  # number of the first entry that values go to
            "entries",  # and how many of them
        )
    ]
)

_Pieces: TypeAlias = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Spans:
    """Which columns of the leaves' rows some layers take; a plan keeps them.

    Attributes
    ----------
    columns
        int64 [entries, 3]: K (0) or V (1), layer, and column in the span's rows.
    rows
        :data:`_SPAN` [spans].
    """

    columns: NDArray[np.int64]
    rows: NDArray[Any]
    _pieces: dict[int, _Pieces] = field(default_factory=dict)

    @classmethod
    def of(
        cls, basis: Basis, sizes: tuple[int, int], layers: Sequence[int], kinds: tuple[bool, bool]
    ) -> Spans:
        """Of ``layers``, for K and V, or one of these (``kinds``), which have so many channels a
        layer."""
        key = (*layers, *kinds)
        found: Spans | None = basis.spans.get(key)
        if found is None:
            if len(basis.spans) >= _SPANS:
                basis.spans.clear()
            found = basis.spans[key] = cls._made(basis, sizes, frozenset(layers), kinds)
        return found

    @classmethod
    def _made(
        cls,
        basis: Basis,
        sizes: tuple[int, int],
        chosen: frozenset[int],
        kinds: tuple[bool, bool],
    ) -> Spans:
        spans: list[tuple[int, ...]] = []
        rows: list[Column] = []
        for leaf in basis.leaves:
            first = 0
            found: list[list[Column]] = []
            for kind, own in enumerate((leaf.k_layers, leaf.v_layers)):
                columns = [
                    (kind, x, first + i * sizes[kind])
                    for i, x in enumerate(own)
                    if x in chosen and kinds[kind]
                ]
                first += len(own) * sizes[kind]
                found.append(columns)
            # If only some layers are wanted, columns between their K and V are not computed.
            together = sum(map(len, found)) == len(leaf.k_layers) + len(leaf.v_layers)
            for columns in [found[0] + found[1]] if together else found:
                if columns:
                    begin = columns[0][2]
                    end = columns[-1][2] + sizes[columns[-1][0]]
                    matrix, mean = leaf.synthesis.data.ptr + 2 * begin, leaf.mean.data.ptr
                    scale = int(np.float32(leaf.synthesis_scale).view(np.int32))
                    spans.append(
                        (
                            leaf.first,
                            leaf.count,
                            leaf.part,
                            end - begin,
                            matrix,
                            leaf.width,
                            mean + 4 * begin,
                            scale,
                            len(rows),
                            len(columns),
                        )
                    )
                    rows += [(kind, x, c - begin) for kind, x, c in columns]
        return cls(np.array(rows, np.int64).reshape(-1, 3), np.array(spans, _SPAN))

    def pieces(self, tokens: int) -> _Pieces:
        """Divide the products of so many tokens, see :func:`piece_tokens`: spans, and the first and
        the number of tokens, of each piece."""
        if tokens not in self._pieces:
            each = piece_tokens(self.rows["width"], self.rows["components"], tokens)
            number = -(-tokens // each)
            own = np.repeat(np.arange(len(each)), number)
            at = (np.arange(len(own)) - (np.cumsum(number) - number)[own]) * each[own]
            if len(self._pieces) >= _SPANS:
                self._pieces.clear()
            self._pieces[tokens] = self.rows[own], at, np.minimum(each[own], tokens - at)
        return self._pieces[tokens]


@dataclass(frozen=True)
class Destination:
    """Tensors that values are written to.

    Attributes
    ----------
    entries
        int64 [entries, layout.FIELDS] on the device.
    spans
        Which columns of the leaves' rows they take.
    dtype, wide
        Element type, and whether the wide kernel can be used.
    """

    entries: Any
    spans: Spans
    dtype: DType
    wide: bool
    _owners: tuple[Any, ...]


def piece_tokens(width: Any, count: Any, tokens: int) -> Any:
    """How many of ``tokens`` take a product of ``count`` components and its scatter at a time.

    Few enough for their rows to stay in the cache; for large matrices, enough to make reading the
    matrix for each piece cheap.
    """
    most = np.maximum(np.maximum(PIECE_BYTES // (2 * width), count // 4), 64)
    return np.minimum(most // 64 * 64, tokens)


def tile_tasks(plan: DevicePlan) -> TileTasks:
    """A plan's, which is kept with it."""
    if plan.tile_tasks is None:
        plan.tile_tasks = TileTasks(plan)
    found: TileTasks = plan.tile_tasks
    return found


class TileTasks:
    """Makes the tasks of tiles, see :mod:`kvtc_stream.gpu.kernels.rans`; caches what repeats."""

    def __init__(self, plan: DevicePlan) -> None:
        self._parts, self._coded = plan.parts, plan.coded
        self._lowest, self._highest = plan.lowest, plan.highest
        self._of_sizes: dict[int, tuple[NDArray[np.int64], NDArray[np.bool_]]] = {}
        self._orders: dict[tuple[int, int, int], NDArray[np.int64]] = {}
        runtime = cupy.cuda.runtime
        processors: int = runtime.deviceGetAttribute(_MULTIPROCESSORS, runtime.getDevice())
        self._resident = _BLOCKS_OF_THREADS * processors

    def together(self, tiles_of_all: int) -> int:
        """How many of so many tiles share a block of threads: as few as let all blocks run at
        once, so that no processor waits for a last one."""
        return min(max(-(-tiles_of_all // self._resident), 4), rans.MOST_TILES)

    def template(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """int64 [tiles, FIELDS] of a block whose tiles have ``size`` components, and whether each
        is its part's first one."""
        if size not in self._of_sizes:
            found = [
                (part, self._parts[part].start + t.start, t.stop - t.start, t.start == 0)
                for part, coded in enumerate(self._coded)
                for t in tiles(coded, size)
            ]
            columns = np.array(found, np.int64).reshape(-1, 4)
            task = np.zeros((len(found), rans.FIELDS), np.int64)
            task[:, [rans.PART, rans.FIRST, rans.COUNT]] = columns[:, :3]
            self._of_sizes[size] = task, columns[:, 3] != 0
        return self._of_sizes[size]

    def order(self, size: int, blocks: int, together: int) -> NDArray[np.int64]:
        """Sort tiles of several blocks by part, so that a block of threads has one part's tables.

        Returns int64: the index, block after block, of the tile at each place. Each part is filled
        up to a multiple of ``together`` with ``-1 - part``.
        """
        found = self._orders.get((size, blocks, together))
        if found is None:
            parts = np.tile(self.template(size)[0][:, rans.PART], blocks)
            places = []
            for part in range(len(self._parts)):
                own = np.flatnonzero(parts == part)
                filled = np.full(-(-len(own) // together) * together, -1 - part, np.int64)
                filled[: len(own)] = own
                places.append(filled)
            found = np.concatenate(places)
            if len(self._orders) >= _ORDERS:
                self._orders.clear()
            self._orders[size, blocks, together] = found
        return found

    def arranged(
        self, tasks: NDArray[np.int64], size: int, blocks: int, together: int
    ) -> NDArray[np.int64]:
        """``tasks`` [blocks, tiles, FIELDS] in the order of :meth:`order`."""
        order = self.order(size, blocks, together)
        flat = tasks.reshape(-1, rans.FIELDS)
        out = np.zeros((len(order), rans.FIELDS), np.int64)
        real = order >= 0
        out[real] = flat[order[real]]
        out[~real, rans.PART] = -1 - order[~real]
        return out

    def decoding(
        self,
        payloads: UniformPayloads,
        tokens: NDArray[np.int64],
        firsts: NDArray[np.int64],
        begins: NDArray[np.int64],
    ) -> tuple[list[_Tiles], int]:
        """The tiles of payloads, for each size of tiles, and how many share a block of threads.

        Payloads begin at ``begins``; ``tokens`` and ``firsts`` [blocks] are coded tokens, and the
        first one among all.
        """
        sizes, coded = payloads.sizes, np.array(self._coded, np.int64)
        kinds = sorted(set(sizes.tolist()))  # mostly one, which that finds quicker than NumPy
        counts = [(size, int((sizes == size).sum()), -(-coded // size)) for size in kinds]
        together = self.together(sum(count * int(each.sum()) for _, count, each in counts))
        blocks = np.empty((len(tokens), rans.BLOCK_FIELDS), np.int64)
        blocks[:, rans.NUMBER] = np.arange(len(tokens))
        blocks[:, rans.HELD], blocks[:, rans.BEFORE] = tokens, firsts
        blocks[:, rans.TILES] = begins + payloads.tiles
        blocks[:, rans.NIBBLES] = begins + payloads.classes
        levels = payloads.levels.clip(self._lowest, self._highest) - self._lowest
        blocks[:, rans.OWN_LEVEL] = levels
        starts = np.array([part.start for part in self._parts], np.int64)
        found = []
        for size, count, each in counts:
            # Each part is filled up.
            ends = np.cumsum(-(-count * each // together) * together)
            parts = np.stack([_before(ends), _before(np.cumsum(each)), starts, coded], axis=1)
            own = blocks if count == len(blocks) else blocks[sizes == size]
            found.append(_Tiles(size, parts, own, int(ends[-1])))
        return found, together


def _before(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where things begin that end there, one after the other."""
    return np.concatenate([[0], ends[:-1]])


class _Tiles(NamedTuple):
    """What the device makes tasks of, see :func:`kvtc_stream.gpu.kernels.rans.tasks`.

    Attributes
    ----------
    size
        Maximum number of components in a tile.
    parts, blocks
        int64 [parts, rans.PART_FIELDS] and [blocks, rans.BLOCK_FIELDS].
    tasks
        How many there are.
    """

    size: int
    parts: NDArray[np.int64]
    blocks: NDArray[np.int64]
    tasks: int


def _tasks(found: Sequence[_Tiles], there: Sequence[Any], lengths: Any) -> Any:
    """int64 [tasks, rans.FIELDS] on the device, given what else is there: parts and blocks of all,
    and lengths."""
    out = cupy.empty((sum(x.tasks for x in found), rans.FIELDS), np.int64)
    to = out.data.ptr
    for x, parts, blocks in zip(found, there[::2], there[1::2], strict=True):
        rans.tasks(
            -(-x.tasks // rans.THREADS),
            rans.THREADS,
            (
                parts,
                len(parts),
                x.size,
                blocks,
                len(blocks),
                lengths,
                lengths.shape[1],
                to,
                x.tasks,
            ),
        )
        to += 8 * rans.FIELDS * x.tasks
    return out


def batch_tokens(section: Section) -> int:
    """Tokens that are worth a batch of their own."""
    width = len(section.layers) * section.kv_heads * (section.k_dim + section.v_dim)
    return max(BATCH_TOKENS, min(BATCH_VALUES // width, MOST_TOKENS))


class BatchDecoder(ABC):
    """Decodes data blocks of one kind of stream. One thread and one CUDA stream at a time.

    ``scales`` are those of fp8 output, float32 [2 · layers, heads], K then V; ``None``: 1.
    """

    def __init__(
        self, section: Section, basis: Basis, scales: NDArray[np.float32] | None = None
    ) -> None:
        self._section, self._basis = section, basis
        self._scales = device_scales(section, scales)
        held = basis.components + (basis.rows if basis.seconds else 0)
        most = max(SYMBOL_BYTES // (2 * max(held, 1)), 1024)
        #: Tokens of a batch.
        self.batch_tokens = min(self._most_tokens(), most)
        self._ropes = ropes_of(section)
        self.staging = Staging()

    def _most_tokens(self) -> int:
        return batch_tokens(self._section)

    @abstractmethod
    def load(
        self, table: BlockTable, slots: NDArray[np.int64], *, tiles: bool = False
    ) -> BlockLoad:
        """Begin to copy payloads of blocks to the device: of those with coded tokens, and of those
        whose verbatim values are ``tiles`` that it decodes.

        Payloads of symbols that no writer makes raise ``FormatError``.
        """

    @abstractmethod
    def symbols(self, blocks: CodedBlocks) -> Batch:
        """Payloads of a batch of blocks to symbols."""

    def _batch(
        self,
        blocks: CodedBlocks,
        symbols: Any,
        scales: Any,
        stride: int,
        faults: Any,
        positions: Any,
        slots: Any,
    ) -> Batch:
        return Batch(
            self._basis.stacked(symbols),
            scales,
            len(blocks.positions),
            stride,
            slots,
            self._ropes.at(positions, sign=1),
            faults,
        )

    def destination(
        self, layers: Sequence[int], k_out: Tensors | None, v_out: Tensors | None
    ) -> Destination:
        """Describe where values of ``layers`` go.

        ``layers`` are indices into the section's, as the tensors' addresses are by. ``None``
        instead of tensors: K, or V, is not wanted.
        """
        return self.destinations([layers], k_out, v_out)[0]

    def destinations(
        self, groups: Sequence[Sequence[int]], k_out: Tensors | None, v_out: Tensors | None
    ) -> list[Destination]:
        """:meth:`destination` of several groups of layers."""
        s = self._section
        wanted = [t for t in (k_out, v_out) if t is not None]
        sizes = s.kv_heads * s.k_dim, s.kv_heads * s.v_dim
        kinds = k_out is not None, v_out is not None
        spans = [Spans.of(self._basis, sizes, layers, kinds) for layers in groups]
        there = self.staging.arrays(
            *(entries(k_out, v_out, own.columns, self._ropes) for own in spans)
        )
        wide = all(t.wide for t in wanted) and self._ropes.halves
        return [
            Destination(x, own, wanted[0].dtype, wide, (k_out, v_out))
            for x, own in zip(there, spans, strict=True)
        ]

    def batches(self, blocks: CodedBlocks) -> Iterator[tuple[CodedBlocks, Batch]]:
        """Decode blocks to symbols, a batch whenever the next one is asked for."""
        for some in blocks.batches(self.batch_tokens):
            yield some, self.symbols(some)

    def start(
        self,
        batches: Iterable[tuple[CodedBlocks, Batch]],
        destination: Destination,
    ) -> list[RunningBatch]:
        """Turn batches into values in tensors, without waiting for the device. See
        :func:`faulty`."""
        started = []
        for some, batch in batches:
            self.values(batch, destination)
            started.append(RunningBatch(some, self.staging.begin_fetch(batch.faults)))
        return started

    def values(self, batch: Batch, destination: Destination) -> None:
        """Turn symbols into K and V."""
        ropes, found = self._ropes, batch.rotations
        spans, at, tokens = destination.spans.pieces(batch.tokens)
        if not len(spans):
            return
        kernel = layout.scatter(destination.dtype, destination.wide)
        most, other = int((tokens * spans["width"]).max()), stream(TURNS)
        rows = cupy.empty(most, np.uint16)
        with other:
            others = cupy.empty(most if len(spans) > 1 else 0, np.uint16)
        targets = np.full(len(spans), rows.data.ptr)
        targets[1::2] = others.data.ptr
        sources = targets.copy()
        if (empty := spans["components"] == 0).any():
            zeros = cupy.zeros(most, np.uint16)
            sources[empty] = zeros.data.ptr
        products = synthesis(
            batch.symbols.data.ptr + 2 * (spans["first"] * batch.stride + at),
            batch.stride,
            spans["matrix"],
            spans["stride"],
            (spans["width"], tokens, spans["components"]),
            targets,
        )
        arguments = np.empty((len(spans), len(kernel.signature)), np.int64)
        for i, values in enumerate(
            (
                destination.entries.data.ptr + 8 * layout.FIELDS * spans["row"],
                batch.slots.data.ptr + 8 * at,
                tokens,
                found.cosines.data.ptr,
                found.sines.data.ptr,
                ropes.pairs.data.ptr,
                ropes.interleaved.data.ptr,
                ropes.most,
                found.tokens,
                at,
                batch.scales.data.ptr + 4 * (spans["part"] * batch.stride + at),
                spans["scale"],
                spans["mean"],
                sources,
                spans["width"],
                batch.faults.data.ptr + 4 * (len(batch.faults) - 1),
                self._scales.data.ptr,
            )
        ):
            arguments[:, i] = values
        grids = np.stack([-(-tokens // layout.TOKENS), spans["entries"]], axis=1)
        turns = other if len(spans) > 1 else None
        in_turn(products, kernel, grids, layout.THREADS, arguments, other=turns)


class UniformDecoder(BatchDecoder):
    """Decodes blocks of uniform bands."""

    def __init__(
        self, section: Section, plan: DevicePlan, scales: NDArray[np.float32] | None = None
    ) -> None:
        super().__init__(section, plan, scales)
        self._plan = plan
        self._tasks = tile_tasks(plan)

    def load(
        self, table: BlockTable, slots: NDArray[np.int64], *, tiles: bool = False
    ) -> BlockLoad:
        """See :meth:`BatchDecoder.load`. The device computes the checksums of blocks that it has
        whole, threads of the host those of others."""
        rows = table.rows
        coded, there = rows["verbatim"] < rows["tokens"], on_device(table, tiles)
        begins = np.where(there, rows["payload"], rows["coded"])
        ends = np.where(there, rows["payload"] + rows["size"], begins + rows["coded_length"])
        sent = np.flatnonzero(coded | there)
        data, places = self.staging.upload_parts(
            table.pieces, rows["piece"][sent], begins[sent], ends[sent]
        )
        #: From a piece of a block to the device.
        shift = np.zeros(len(table), np.int64)
        shift[sent] = places - begins[sent]
        own, uploaded = np.flatnonzero(there), recorded()
        others = table.verifying(np.flatnonzero(~there))

        def verifying() -> Callable[[], None]:
            with beside(uploaded):
                sums = checksums(
                    self.staging,
                    data,
                    (rows["payload"] + shift)[own],
                    rows["size"][own],
                    rows["seed"][own],
                )

            def whole() -> None:
                table.compare(sums(), own)
                others()

            return whole

        blocks = CodedBlocks.of(table, slots)
        found = replace(
            blocks,
            data=data,
            begins=(rows["coded"] + shift)[coded],
            payloads=UniformPayloads.parse(blocks.table, self._plan.coded),
        )
        exact = np.where(there & ~coded, rows["exact"] + shift, -1)
        return BlockLoad(found, verifying, data, exact)

    def symbols(self, blocks: CodedBlocks) -> Batch:
        """See :meth:`BatchDecoder.symbols`."""
        plan, data, payloads, coded = self._plan, blocks.data, blocks.payloads, blocks.coded_tokens
        assert payloads is not None
        assert blocks.begins is not None
        powers = payloads.steps.astype(np.float64)[:, None] * _CLASSES
        with np.errstate(over="ignore"):
            steps_of_classes = powers.astype(np.float32)
        firsts = np.cumsum(coded) - coded
        tiles, together = self._tasks.decoding(payloads, coded, firsts, blocks.begins)
        steps, positions, slots, lengths, *there = self.staging.arrays(
            steps_of_classes,
            blocks.positions,
            blocks.slots,
            payloads.lengths,
            *chain.from_iterable((x.parts, x.blocks) for x in tiles),
        )
        tasks, columns = _tasks(tiles, there, lengths), blocks.columns(self.staging)
        stride = -(-int(blocks.edges[-1]) // 64) * 64
        # No tile writes these columns, but products read them, so they must be finite.
        new = cupy.empty if len(columns) == stride else cupy.zeros
        symbols = new((plan.components, stride), np.uint16)
        scales = cupy.zeros((len(plan.parts), stride), np.float32)
        faults = cupy.zeros(len(blocks) + 1, np.int32)
        rans.decode(
            len(tasks) // together,
            together * 32,
            (
                tasks,
                data,
                data,
                plan.buckets,
                plan.symbols,
                plan.codes,
                plan.families,
                len(plan.parts),
                plan.ids,
                plan.components,
                columns,
                steps,
                scales,
                plan.down,
                symbols,
                stride,
                faults,
            ),
            shared=plan.decode_shared,
        )
        return self._batch(blocks, symbols, scales, stride, faults, positions, slots)


def on_device(table: BlockTable, tiles: bool) -> NDArray[np.bool_]:
    """Which blocks' checksums the device computes: of those that it gets whole."""
    rows = table.rows
    symbols = (rows["verbatim"] == 0) & ((rows["coded"] - rows["payload"]) % 2 == 0)
    values = (rows["verbatim"] == rows["tokens"]) & (rows["verbatim_coder"] == Coder.PLANES)
    values &= (rows["exact"] - rows["payload"]) % _ALIGNMENT == 0
    found: NDArray[np.bool_] = (symbols | values & tiles) & table.unverified
    return found & (rows["size"] >= checksum.LEAST) & (rows["size"] <= checksum.MOST)


def device_scales(section: Section, scales: NDArray[np.float32] | None) -> Any:
    """fp8 scales of K, then V, on the device, float32 [2 · layers, heads]; ``None``: 1."""
    if scales is None:
        return _ones(cupy.cuda.runtime.getDevice(), 2 * len(section.layers), section.kv_heads)
    return cupy.asarray(scales)


@cache
def _numbers(device: int, count: int) -> Any:
    """int32 [count] from 0 on, on a device, for all streams of it."""
    return kept(np.arange(count, dtype=np.int32))


@cache
def _ones(device: int, rows: int, columns: int) -> Any:
    """float32 [rows, columns] on a device, for all streams of it."""
    return kept(np.ones((rows, columns), np.float32))


def kept(x: NDArray[Any]) -> Any:
    """On the current device, to be kept there."""
    found = cupy.asarray(x)
    # Others use it in streams of their own.
    cupy.cuda.get_current_stream().synchronize()
    return found


def faulty(started: Iterable[RunningBatch]) -> Iterator[tuple[Block, NDArray[np.int64]]]:
    """Wait for the device; return the blocks that it could not decode, with their slots."""
    for blocks, faults in started:
        if not (of_blocks := faults()).any():
            continue
        *found, overflow = of_blocks.tolist()
        for i in (i for i, fault in enumerate(found) if fault or overflow):
            own = slice(int(blocks.edges[i]), int(blocks.edges[i + 1]))
            yield blocks.table.block(i, verified=True), blocks.slots[own]
