"""What a stream took and what it lost; every byte is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.formats import (
    Block,
    BlockRun,
    Geometry,
    IndexEntry,
    Measure,
    Plan,
    Role,
    StreamFile,
)
from kvtc_stream.formats.block_errors import layer_means
from kvtc_stream.planning.rate_control import Target

#: A mean error this many times what the plan expects says that the calibration does not fit.
_SURPRISE = 2.0
#: A mean error from which on next to nothing is kept: above it, one that nobody expected.
_USELESS = 0.75
#: Fewer coded tokens than this say nothing about it.
_SURPRISE_TOKENS = 16


#: A layer is lost that loses so many times what all do together, and so much of its norm; or so
#: many times a target for the mean error.
_LOST_FACTOR, _LOST = 5.0, 0.25

#: The share of a ratio that is far from it: a target is met within some hundredths.
_SHORT = 0.8


@dataclass
class RoleStatistics:
    """Blocks of one role."""

    blocks: int = 0
    tokens: int = 0
    verbatim_tokens: int = 0
    #: Bytes of the uncompressed cache, in the stream's element type.
    cache_bytes: int = 0
    #: Bytes of the records, headers and checksums included.
    stream_bytes: int = 0

    def count(self, blocks: int, tokens: int, verbatim: int, cache: int, stream: int) -> None:
        """Add to each of the numbers."""
        self.blocks += blocks
        self.tokens += tokens
        self.verbatim_tokens += verbatim
        self.cache_bytes += cache
        self.stream_bytes += stream


@dataclass
class _ErrorSums:
    """Coded tokens of one section and the sums of their errors."""

    tokens: int = 0
    k: float = 0.0
    v: float = 0.0
    #: float64 [2, layers]: of K and of V, where blocks tell them.
    layers: NDArray[np.float64] | None = None
    layer_tokens: int = 0


@dataclass
class StreamStatistics:
    """Sizes, ratios and errors of a stream, filled in while it is written or read."""

    header_bytes: int = 0
    index_bytes: int = 0
    #: Records that are not blocks, superseded ones, and kinds that this version does not know.
    other_bytes: int = 0
    roles: dict[Role, RoleStatistics] = field(
        default_factory=lambda: {role: RoleStatistics() for role in Role}
    )
    #: How errors were measured; ``NONE`` while no token was coded.
    measure: Measure = Measure.NONE
    k_error_worst: float = 0.0
    v_error_worst: float = 0.0
    _sections: dict[int, _ErrorSums] = field(default_factory=dict, repr=False)

    def add(self, blocks: Block | BlockRun, record_bytes: int, token_bytes: int) -> None:
        """Count a block, or many; ``token_bytes`` is what each token took uncompressed."""
        if isinstance(blocks, Block):
            verbatim = len(blocks.verbatim_tokens)
            self._add(blocks, verbatim, record_bytes, token_bytes * blocks.tokens)
            return
        coded, tokens = blocks.tokens, blocks.tokens * len(blocks)
        self.roles[Role.DATA].count(len(blocks), tokens, 0, token_bytes * tokens, record_bytes)
        errors = blocks.errors.astype(np.float64)
        sums = self._measured(blocks.section, blocks.measure, *errors[:, 1::2].max(axis=0).tolist())
        sums.tokens += tokens
        sums.k, sums.v = _added([sums.k, sums.v], errors[:, ::2] * coded).tolist()
        if blocks.layer_codes.size:
            means = layer_means(blocks.layer_codes) * coded
            before = np.zeros_like(means[0]) if sums.layers is None else sums.layers
            sums.layers = _added(before, means)
            sums.layer_tokens += tokens

    @classmethod
    def of(cls, stream: StreamFile, *, superseded: bool = False) -> StreamStatistics:
        """Those of a stream in a file; its index suffices, no block is read.

        ``superseded``: as what follows the stream finds it, without its tail and its end.
        """
        statistics = cls(header_bytes=stream.sizes.header)
        if not superseded:
            statistics.index_bytes = stream.sizes.index
        header = stream.header
        for e in stream.index:
            if superseded and e.role is Role.TAIL:
                continue
            cache_bytes = header.verbatim_size(e.section, e.tokens)
            statistics._add(e, e.verbatim_tokens, e.length, cache_bytes)
        statistics.other_bytes = stream.sizes.total - statistics.stream_bytes
        return statistics

    def _add(
        self,
        block: Block | IndexEntry,
        verbatim_tokens: int,
        record_bytes: int,
        cache_bytes: int,
    ) -> None:
        amounts = 1, block.tokens, verbatim_tokens, cache_bytes, record_bytes
        self.roles[block.role].count(*amounts)
        coded = block.tokens - verbatim_tokens
        if coded:
            errors = block.errors
            sums = self._measured(block.section, errors.measure, errors.k_worst, errors.v_worst)
            sums.tokens += coded
            sums.k += errors.k_mean * coded
            sums.v += errors.v_mean * coded
            if isinstance(block, Block) and (by_layer := block.layer_errors) is not None:
                means = layer_means(np.frombuffer(by_layer.codes, np.uint8)) * coded
                sums.layers = means if sums.layers is None else sums.layers + means
                sums.layer_tokens += coded

    def _measured(
        self, section: int, measure: Measure, k_worst: float, v_worst: float
    ) -> _ErrorSums:
        """The sums of a section of which tokens are coded."""
        self.measure = measure
        self.k_error_worst = max(self.k_error_worst, k_worst)
        self.v_error_worst = max(self.v_error_worst, v_worst)
        return self._sections.setdefault(section, _ErrorSums())

    def surprises(self, plan: Plan) -> list[str]:
        """Where errors are far above what the plan expects: a cache unlike the calibration's."""
        return [
            f"section {i}: the mean error of {name} is {total / sums.tokens:.3f} where the "
            f"calibration expects {expected:.3f}: the cache is unlike those it learnt from, or its "
            f"keys are at other positions than was said (padding, evicted tokens)"
            for i, sums in sorted(self._sections.items())
            for name, total, expected in (
                ("K", sums.k, plan.sections[i].expected_k_error),
                ("V", sums.v, plan.sections[i].expected_v_error),
            )
            if sums.tokens >= _SURPRISE_TOKENS and total > _surprising(expected) * sums.tokens
        ]

    def beyond(self, ratio: float) -> list[str]:
        """Of a stream with :meth:`surprises`: that it is far from so many times smaller, and no
        exact token is to blame."""
        data = self.roles[Role.DATA]
        reached = data.cache_bytes / data.stream_bytes
        if math.isinf(ratio) or reached > _SHORT * ratio or data.verbatim_tokens:
            return []
        return [
            f"coded tokens are {reached:.3g} times smaller, and ratio={ratio:g} was asked for: "
            f"headers and the scales of tokens take more than that, and next to nothing is kept of "
            f"values; ask for less"
        ]

    def lost_kinds(self) -> list[str]:
        """Where next to nothing is kept of K, or of V, and the other loses little: to squared
        errors it is nothing beside that, and the calibration expects it."""
        return [
            f"section {i}: {name} loses {lost:.2f} of its norm, {other} {kept:.3f}: it is small "
            f"beside that. Calibrate with importance='gradients', or choose a lower ratio"
            for i, sums in sorted(self._sections.items())
            for k, v in [(sums.k / sums.tokens, sums.v / sums.tokens)]
            for name, lost, other, kept in (("K", k, "V", v), ("V", v, "K", k))
            if sums.tokens >= _SURPRISE_TOKENS and lost > _USELESS and lost > _LOST_FACTOR * kept
        ]

    def layer_errors(self, section: int = 0) -> NDArray[np.float64] | None:
        """float64 [2, layers]: mean error of K and of V in each layer of a section.

        Rounded up by 1/16 at most. ``None`` where no block tells: of a stream written without
        measuring, in format 1.0, or of one of which the index alone was read.
        """
        sums = self._sections.get(section, _ErrorSums())
        return None if sums.layers is None else sums.layers / sums.layer_tokens

    def lost_layers(self, geometry: Geometry, target: Target | None) -> list[str]:
        """Where single layers lose far more than all together, and more than was asked for."""
        found = []
        for index, sums in sorted(self._sections.items()):
            errors = self.layer_errors(index)
            if errors is None or sums.tokens < _SURPRISE_TOKENS:
                continue
            for name, total, own in (("K", sums.k, errors[0]), ("V", sums.v, errors[1])):
                usual = total / sums.tokens
                bound = max(_LOST_FACTOR * usual, _LOST)
                if target is not None and target.name == "mean_error":
                    bound = _LOST_FACTOR * target.value
                lost = np.flatnonzero(own > bound)
                if lost.size:
                    layers = ", ".join(str(geometry.sections[index].layers[i]) for i in lost[:8])
                    found.append(
                        f"section {index}: {name} of layers {layers} loses up to "
                        f"{own[lost].max():.2f} of its norm, where all layers together lose "
                        f"{usual:.3f}: these layers are small beside others. Bound them with "
                        f"layer_error_bound=, or calibrate with importance='gradients'"
                    )
        return found

    @property
    def tokens(self) -> int:
        """Tokens, summed over sections."""
        return sum(r.tokens for r in self.roles.values())

    @property
    def coded_tokens(self) -> int:
        """Tokens that were transform-coded."""
        return self.tokens - sum(r.verbatim_tokens for r in self.roles.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the uncompressed cache."""
        return sum(r.cache_bytes for r in self.roles.values())

    @property
    def stream_bytes(self) -> int:
        """Every byte of the stream."""
        return self.stream_bytes_of_blocks + self.index_bytes + self.other_bytes

    @property
    def stream_bytes_of_blocks(self) -> int:
        """Those of the header and of blocks."""
        return self.header_bytes + sum(r.stream_bytes for r in self.roles.values())

    @property
    def ratio(self) -> float:
        """Cache bytes over every byte of the stream, sinks and window included."""
        return self.cache_bytes / self.stream_bytes if self.stream_bytes else 0.0

    @property
    def coded_ratio(self) -> float:
        """The same over data blocks alone: without sinks, window, header and index."""
        data = self.roles[Role.DATA]
        return data.cache_bytes / data.stream_bytes if data.stream_bytes else 0.0

    @property
    def k_error_mean(self) -> float:
        """Mean over coded tokens of ‖k̂−k‖/‖k‖."""
        return sum(s.k for s in self._sections.values()) / max(self.coded_tokens, 1)

    @property
    def v_error_mean(self) -> float:
        """Mean over coded tokens of ‖v̂−v‖/‖v‖."""
        return sum(s.v for s in self._sections.values()) / max(self.coded_tokens, 1)


def _added(total: Any, amounts: NDArray[np.float64]) -> NDArray[np.float64]:
    """``total`` with [blocks, ...] amounts added one after the other: as of single blocks."""
    found: NDArray[np.float64] = np.cumsum(np.concatenate([[total], amounts]), axis=0)[-1]
    return found


def _surprising(expected: float) -> float:
    """A mean error above which the cache is unlike those of the calibration.

    One that learnt from nothing, zeros or one token repeated, expects no error at all.
    """
    useless = max(_USELESS, 1.1 * expected)
    return min(_SURPRISE * expected, useless) if expected else useless
