"""Values that are kept as they are: from tensors to contiguous memory and back, and verbatim tokens
of blocks to their slots."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias

import cupy
import numpy as np
from numpy.typing import NDArray

from kvtc_stream.coding.values import verbatim_output, verbatim_planes
from kvtc_stream.errors import FormatError
from kvtc_stream.formats import BlockTable, Coder, StreamHeader
from kvtc_stream.formats.coders import decompress
from kvtc_stream.gpu.coder import verbatim
from kvtc_stream.gpu.coder.decoding import BlockLoad
from kvtc_stream.gpu.kernels import layout
from kvtc_stream.gpu.runtime.staging import Staging
from kvtc_stream.io.threads import threads

#: About the most bytes of verbatim tokens that wait to be uploaded; and of those of several tables,
#: where the host has more to do than the device.
_MOST, MOST_JOINED = 64 << 20, 256 << 20

#: Slots of tokens, memory on the device that has their values, and the address of these.
Values: TypeAlias = tuple[NDArray[np.int64], Any, int]


def move(
    staging: Staging,
    moves: Sequence[tuple[NDArray[np.int64], NDArray[np.int64] | Sequence[int]]],
    columns: Any,
    itemsize: int,
    *,
    back: bool,
) -> None:
    """Copy values at addresses, one an entry of ``columns``, to slots; or from them with
    ``back``."""
    if not moves:
        return
    counts = [len(slots) for slots, _ in moves]
    found = staging.arrays(
        np.concatenate([np.asarray(slots, np.int64) for slots, _ in moves]),
        np.repeat(np.arange(len(counts)), counts),
        np.cumsum([0, *counts]),
        np.array([dense for _, dense in moves], np.int64),
    )
    layout.move(itemsize, back=back)((sum(counts), len(columns)), 128, (columns, *found))


class Exact(NamedTuple):
    """Verbatim tokens of a block: its row and first ordinal, the tokens' slots, and their byte
    planes; or, if the device decodes them, their payload, and its address there if it has one."""

    row: int
    start: int
    slots: NDArray[np.int64]
    planes: bytes | None
    payload: memoryview
    address: int


class ExactTokens:
    """Verbatim tokens of blocks of a section on their way to their slots, for one task. One thread
    and one CUDA stream at a time.

    Attributes
    ----------
    tiles
        Whether the device decodes tiles of verbatim values: they are of the output's type.
    """

    def __init__(self, header: StreamHeader, index: int, staging: Staging) -> None:
        self.tiles = header.dtype is header.out_dtype
        self._header, self._staging = header, staging
        self._token_bytes = header.verbatim_size(index, 1)
        self._section, self._itemsize = header.geometry.sections[index], header.out_dtype.itemsize
        #: First ordinals of blocks that the device decodes, and what waits for int32 [blocks],
        #: whether each had a fault.
        self._unchecked: list[tuple[list[int], Callable[[], NDArray[np.int32]]]] = []

    def there(self, table: BlockTable, slots: NDArray[np.int64], loaded: BlockLoad) -> list[Exact]:
        """Those whose payloads are on the device, unless they are many."""
        rows, own = table.rows, np.flatnonzero(loaded.exact >= 0)
        if self.size(int(rows["tokens"][own].sum())) > _MOST:
            return []
        ends = np.cumsum(rows["tokens"])
        begins = (ends - rows["tokens"]).tolist()
        return [
            self._of_block(table, row, slots[begins[row] : ends[row]], loaded)
            for row in own.tolist()
        ]

    def of(
        self,
        table: BlockTable,
        slots: NDArray[np.int64],
        loaded: BlockLoad,
        but: Container[int] = (),
    ) -> Iterator[Sequence[Exact]]:
        """All ``but`` those of some rows, of some blocks at a time; threads begin with those that
        the device does not decode at once. To be taken when the blocks are known to be whole: what
        comes of others tells less of them than their checksums do."""
        rows, some = table.rows, table.verbatim() if table.special else None
        edges = np.concatenate([[0], np.cumsum(rows["tokens"])]).tolist()
        groups: list[list[tuple[int, NDArray[np.int64], Future[bytes] | None]]] = []
        waiting = 0
        for row in np.flatnonzero(rows["verbatim"]).tolist():
            if row in but:
                continue
            own = slice(edges[row], edges[row + 1])
            if not groups or waiting > _MOST:
                groups.append([])
                waiting = 0
            tiles = self.tiles and rows["verbatim_coder"][row] == Coder.PLANES
            planes = None if tiles else threads().submit(self._planes, table, row)
            places = slots[own] if some is None else slots[own][some[own]]
            groups[-1].append((row, places, planes))
            waiting += self.size(len(places))
        return (
            [self._of_block(table, row, own, loaded, found) for row, own, found in group]
            for group in groups
        )

    def joined(self, groups: Iterable[Sequence[Exact]]) -> Iterator[Sequence[Exact]]:
        """Of several tables, up to :data:`MOST_JOINED` bytes at a time."""
        waiting, held = list[Exact](), 0
        for some in groups:
            size = sum(self.size(len(x.slots)) for x in some)
            if waiting and held + size > MOST_JOINED:
                yield waiting
                waiting, held = [], 0
            waiting += some
            held += size
        if waiting:
            yield waiting

    def size(self, tokens: int) -> int:
        """Bytes of so many tokens, as the stream has them."""
        return tokens * self._token_bytes

    def _planes(self, table: BlockTable, row: int) -> bytes:
        if not self.tiles:
            block = table.block(row, verified=True)
            return b"".join(verbatim_planes(*verbatim_output(block, self._header)))
        data, rows = table.bytes_of(row, "exact", "exact_length"), table.rows
        size = self.size(int(rows["verbatim"][row]))
        return decompress(Coder(rows["verbatim_coder"][row]), data, size)

    def _of_block(
        self,
        table: BlockTable,
        row: int,
        slots: NDArray[np.int64],
        loaded: BlockLoad,
        planes: Future[bytes] | None = None,
    ) -> Exact:
        payload, start = table.bytes_of(row, "exact", "exact_length"), int(table.rows["start"][row])
        found = None if planes is None else planes.result()
        return Exact(row, start, slots, found, payload, loaded.exact_address(row))

    def uploaded(self, found: Sequence[Exact]) -> list[Values]:
        """Values [K and then V: layers, heads, tokens, dim] on the device, to be checked."""
        there = [x for x in found if x.planes is None and x.address]
        rest = [x for x in found if x.planes is None and not x.address]
        plain = [x for x in found if x.planes is not None]
        out: list[Values] = []
        if plain:
            data, begins = self._staging.upload([x.planes for x in plain])
            for x, at in zip(plain, begins.tolist(), strict=True):
                assert x.planes is not None
                planes = data[at : at + len(x.planes)].reshape(self._itemsize, -1)
                values = cupy.ascontiguousarray(planes.T)
                out.append((x.slots, values, values.data.ptr))
        if rest:
            data, begins = self._staging.upload([x.payload for x in rest])
            addresses = (data.data.ptr + begins).tolist()
            rest = [x._replace(address=at) for x, at in zip(rest, addresses, strict=True)]
        return out + self._decoded(rest) + self._decoded(there)

    def _decoded(self, found: Sequence[Exact]) -> list[Values]:
        """Of payloads on the device."""
        if not found:
            return []
        sizes = [self.size(len(x.slots)) // self._itemsize for x in found]
        payloads, addresses = [x.payload for x in found], [x.address for x in found]
        values, begins, faults = verbatim.decode(payloads, sizes, addresses, self._staging)
        self._unchecked.append(([x.start for x in found], self._staging.begin_fetch(faults)))
        return [(x.slots, values, at) for x, at in zip(found, begins, strict=True)]

    def place(self, found: Sequence[Values], layers: Sequence[int], columns: Any) -> None:
        """Write ``layers`` of values to their slots in ``columns``, entries of these layers' K and
        then V."""
        s, own = self._section, np.array(layers)
        ks, vs = s.kv_heads * s.k_dim, s.kv_heads * s.v_dim
        units = self._itemsize * np.concatenate([own * ks, len(s.layers) * ks + own * vs])
        moves = [(slots, begin + len(slots) * units) for slots, _, begin in found]
        move(self._staging, moves, columns, self._itemsize, back=False)

    def check(self) -> None:
        """Wait for the device; ``FormatError`` if a block's values are damaged."""
        for starts, faults in self._unchecked:
            for i in np.flatnonzero(faults()).tolist():
                raise FormatError(f"block at token {starts[i]}: its verbatim values are damaged")
