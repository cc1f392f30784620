"""Tokens that wait for their block, and the blocks they become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice, starmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import Backend, Coded, Given
from kvtc_stream.coding.values import (
    stored_positions,
)
from kvtc_stream.formats import (
    Block,
    BlockErrors,
    BlockRun,
    Coder,
    Role,
    StreamHeader,
)
from kvtc_stream.io.steps import Steps, run, together
from kvtc_stream.io.threads import in_turn
from kvtc_stream.planning.rate_control import Controls
from kvtc_stream.stream.codec import Codec

#: Target size of a verbatim block's values, in bytes; a single larger token still gets its own.
_VERBATIM_BYTES = 4 << 20


#: Verbatim blocks whose values are fetched together.
_PIECES = 16


#: K and V per layer [kv_heads, tokens, head_dim], and positions.
Chunk = tuple[list[Any], list[Any], NDArray[np.int64]]


class SectionState:
    """One section's pending tokens, and the blocks they become.

    Leading tokens at sink positions leave verbatim as soon as they are complete. A block leaves
    when as many tokens as the window follow it; what is left at the end is the verbatim tail.
    Each rule looks at tokens alone, so the way the input is cut does not show.
    """

    def __init__(
        self,
        header: StreamHeader,
        index: int,
        codec: Codec,
        backend: Backend,
        controls: Controls | None,
    ) -> None:
        section = header.geometry.sections[index]
        self.dtype = header.dtype
        self.last_position = -1
        self._only_sinks = True
        self._header, self._index, self._backend = header, index, backend
        self._coder = backend.section_coder(
            header,
            index,
            codec.calibration,
            error_bound=codec.bounds[0],
            layer_error_bound=codec.bounds[1],
            measure=codec.measure,
            target=controls,
        )
        self._section = section
        self._token_bytes = header.verbatim_size(index, 1)
        # Room for pending tokens comes with the first of them.
        self._room = min(4, header.window // header.block_tokens + 2) * header.block_tokens
        self._positions = np.empty(0, np.int64)
        self._begin = self._end = 0
        self._coded = 0

    def take(
        self, k_layers: list[Any], v_layers: list[Any], positions: NDArray[np.int64]
    ) -> list[Block | BlockRun]:
        """Take some tokens; the blocks that no later token can change."""
        blocks = run(self.take_steps(k_layers, v_layers, positions))
        self.arrived()
        return blocks

    def arrived(self) -> None:
        """Wait until the bytes of the blocks of :meth:`take_steps` are there."""
        self._coder.arrived()

    def take_steps(
        self,
        k_layers: list[Any],
        v_layers: list[Any],
        positions: NDArray[np.int64],
        *,
        last: bool = False,
    ) -> Steps[list[Block | BlockRun]]:
        """As :meth:`take`. The ``last`` tokens of the section may become blocks too.

        Payloads' bytes may be on their way, see :meth:`arrived`.
        """
        taken, total = 0, len(positions)
        worth = last or total >= self._header.block_tokens
        source = self._coder.source(k_layers, v_layers) if total and worth else None
        blocks: list[Block | BlockRun] = []
        if source is not None and last and self._end == self._begin:
            return (yield from self._whole(source, positions))
        while taken < total:
            if source is not None and (count := self._at_once(positions[taken:])):
                span = slice(taken, taken + count)
                start, self._coded = self._coded, self._coded + count
                self.last_position = int(positions[span.stop - 1])
                taken += count
                blocks += yield from self._coder.encode_from(source, span, positions[span], start)
                continue
            most = self._until_then(positions[taken:]) if source is not None else total
            taken += self._append(k_layers, v_layers, positions, taken, most)
            blocks += self.ready_blocks(total - taken)
        return blocks

    def split(self, positions: NDArray[np.int64]) -> tuple[int, int]:
        """How many tokens are sinks, and how many coded after them, if none follow these."""
        window, size = self._header.window, self._header.block_tokens
        sinks = int(np.searchsorted(positions, self._header.sinks)) if self._only_sinks else 0
        rest = len(positions) - sinks
        return sinks, max(rest - window, 0) // size * size if window else rest

    def _whole(self, source: Any, positions: NDArray[np.int64]) -> Steps[list[Block | BlockRun]]:
        """All that is left of a section, and nothing is pending: none of it is copied first."""
        total, size = len(positions), self._header.block_tokens
        sinks, coded = self.split(positions)
        data = slice(sinks, sinks + coded)
        spans = [
            (Role.SINKS, span)
            for first in range(0, sinks, size)
            for span in self._pieces(slice(first, min(first + size, sinks)))
        ]
        spans += [(Role.TAIL, span) for span in self._pieces(slice(data.stop, total))]
        start, self._coded = self._coded, self._coded + total
        self.last_position = int(positions[-1])
        tasks: list[Steps[Any]] = []
        if coded:  # first: it is most of a device's work, beside which the host does the rest
            where = positions[data]
            tasks.append(self._coder.encode_from(source, data, where, start + data.start))
        if spans:
            tasks.append(self._coder.verbatim_from(source, [span for _, span in spans]))
        results = yield from together(tasks)
        found = results.pop(0) if coded else []
        exact = [
            (self._index, role, own, positions[span], start + span.start)
            for (role, span), own in zip(spans, results[0] if spans else [], strict=True)
        ]
        before = sum(role is Role.SINKS for role, _ in spans)
        quick = len(exact) < 2 or all(isinstance(own, Given) for _, _, own, _, _ in exact)
        blocks = list((starmap if quick else in_turn)(verbatim_block, exact))
        return [*blocks[:before], *found, *blocks[before:]]

    def _pieces(self, span: slice) -> list[slice]:
        """Verbatim blocks of moderate size, which are compressed, and restored, on several
        threads."""
        most = max(1, min(self._header.block_tokens, _VERBATIM_BYTES // self._token_bytes))
        return [
            slice(first, min(first + most, span.stop))
            for first in range(span.start, span.stop, most)
        ]

    def hold(self, k_layers: list[Any], v_layers: list[Any], positions: NDArray[np.int64]) -> None:
        """Take some tokens that become no block yet."""
        taken = 0
        while taken < len(positions):
            taken += self._append(k_layers, v_layers, positions, taken, len(positions))

    def _at_once(self, positions: NDArray[np.int64]) -> int:
        """How many of the tokens that come can be coded where they are: whole blocks."""
        if self._end > self._begin or (self._only_sinks and positions[0] < self._header.sinks):
            return 0
        size = self._header.block_tokens
        return max((len(positions) - self._header.window) // size, 0) * size

    def _until_then(self, positions: NDArray[np.int64]) -> int:
        """How many tokens to copy until others can be coded where they are."""
        size, pending = self._header.block_tokens, self._end - self._begin
        if self._only_sinks and (sinks := int(np.searchsorted(positions, self._header.sinks))):
            return sinks
        short = -pending % size
        if len(positions) - short >= self._header.window + size:
            return short
        return len(positions)

    def _append(
        self,
        k_layers: list[Any],
        v_layers: list[Any],
        positions: NDArray[np.int64],
        first: int,
        most: int,
    ) -> int:
        """Copy up to ``most`` tokens from ``first`` on, as many as fit; return how many."""
        if most and self._end == len(self._positions):
            self._make_room()
        count = min(len(self._positions) - self._end, len(positions) - first, most)
        source, target = slice(first, first + count), slice(self._end, self._end + count)
        for layer, (k, v) in enumerate(zip(k_layers, v_layers, strict=True)):
            self._k[layer, :, target] = k[:, source]
            self._v[layer, :, target] = v[:, source]
        self._positions[target] = positions[source]
        self._end += count
        self.last_position = int(self._positions[self._end - 1])
        return count

    def coded_before(self, role: Role, tokens: int, last_position: int) -> None:
        """Count a block that another encoder wrote."""
        self._coded += tokens
        self.last_position = last_position
        self._only_sinks &= role is Role.SINKS

    def _make_room(self) -> None:
        """Move pending tokens to the front, of larger buffers if a block cannot fit behind them.

        Large windows may never fill, so buffers grow with what is pending; twice that at most.
        """
        pending, count = slice(self._begin, self._end), self._end - self._begin
        if not len(self._positions):
            self._allocate(self._room)
            return
        k, v, positions = self._k, self._v, self._positions
        if count + self._header.block_tokens > len(positions):
            self._allocate(2 * len(positions))
        self._k[:, :, :count] = k[:, :, pending].copy()
        self._v[:, :, :count] = v[:, :, pending].copy()
        self._positions[:count] = positions[pending].copy()
        self._begin, self._end = 0, count

    def _allocate(self, tokens: int) -> None:
        self._k = self._backend.empty(self._section.k_shape(tokens), self.dtype)
        self._v = self._backend.empty(self._section.v_shape(tokens), self.dtype)
        self._positions = np.empty(tokens, np.int64)

    def ready_blocks(self, following: int = 0) -> Iterator[Block | BlockRun]:
        """Blocks that no later token can change, when so many are known to follow."""
        size = self._header.block_tokens
        yield from self._sinks(complete=self.last_position >= self._header.sinks - 1)
        pending = self._end - self._begin
        whole = min(pending, pending + following - self._header.window) // size
        if whole > 0:
            yield from self._data(whole * size)

    def last_blocks(self) -> Iterator[Block | BlockRun]:
        """Everything that is pending, at the end of the stream."""
        yield from self._sinks(complete=True)
        yield from self.ready_blocks()
        if self._header.window:
            yield from self._verbatim(Role.TAIL, self._end - self._begin)
        while self._end > self._begin:
            yield from self._data(min(self._end - self._begin, self._header.block_tokens))

    def _leading_sinks(self) -> int:
        if not self._only_sinks:  # joined streams may have coded such positions already
            return 0
        pending = self._positions[self._begin : self._end]
        return int(np.searchsorted(pending, self._header.sinks))

    def _sinks(self, *, complete: bool) -> Iterator[Block]:
        size = self._header.block_tokens
        while (sinks := self._leading_sinks()) >= (1 if complete else size):
            yield from self._verbatim(Role.SINKS, min(sinks, size))

    def _pop(self, tokens: int) -> tuple[Any, Any, NDArray[np.int64], int]:
        span = slice(self._begin, self._begin + tokens)
        start = self._coded
        self._begin += tokens
        self._coded += tokens
        return self._k[:, :, span], self._v[:, :, span], self._positions[span], start

    def _data(self, tokens: int) -> Sequence[Block | BlockRun]:
        return self._coder.encode(*self._pop(tokens))

    def _verbatim(self, role: Role, tokens: int) -> Iterator[Block]:
        """Blocks of verbatim tokens; see :meth:`_pieces`."""
        counts = iter([span.stop - span.start for span in self._pieces(slice(0, tokens))])

        def pieces() -> Iterator[tuple[Coded, NDArray[np.int64], int]]:
            while some := [self._pop(count) for count in islice(counts, _PIECES)]:
                coded = self._backend.verbatim(self._header, [(k, v) for k, v, _, _ in some])
                for own, (_, _, positions, start) in zip(coded, some, strict=True):
                    yield own, positions, start

        block = partial(verbatim_block, self._index, role)
        return (in_turn if len(self._pieces(slice(0, tokens))) > 1 else starmap)(block, pieces())


def verbatim_block(
    section: int,
    role: Role,
    coded: Coded,
    positions: NDArray[np.int64],
    start: int,
) -> Block:
    """A block that holds tokens bit for bit.

    ``coded``: see :meth:`kvtc_stream.backends.base.Backend.verbatim`.
    """
    coder, verbatim = coded()
    return Block(
        section=section,
        role=role,
        start=start,
        tokens=len(positions),
        positions=stored_positions(positions),
        verbatim_tokens=tuple(range(len(positions))),
        coder=Coder.STORED,
        coded=b"",
        coded_size=0,
        verbatim_coder=coder,
        verbatim=verbatim,
        errors=BlockErrors(),
    )
