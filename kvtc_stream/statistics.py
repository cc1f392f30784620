"""What a stream took and what it lost; every byte is counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtc_stream.formats import Block, Measure, Role


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


@dataclass
class StreamStatistics:
    """Sizes, ratios and errors of a stream, filled in while it is written or read."""

    header_bytes: int = 0
    index_bytes: int = 0
    roles: dict[Role, RoleStatistics] = field(
        default_factory=lambda: {role: RoleStatistics() for role in Role}
    )
    #: How errors were measured; ``NONE`` while no token was coded.
    measure: Measure = Measure.NONE
    k_error_worst: float = 0.0
    v_error_worst: float = 0.0
    _k_error_sum: float = field(default=0.0, repr=False)
    _v_error_sum: float = field(default=0.0, repr=False)

    def add_block(self, block: Block, record_bytes: int, cache_bytes: int) -> None:
        """Count a block; ``cache_bytes`` is what its tokens took uncompressed."""
        role = self.roles[block.role]
        role.blocks += 1
        role.tokens += block.tokens
        role.verbatim_tokens += len(block.verbatim_tokens)
        role.cache_bytes += cache_bytes
        role.stream_bytes += record_bytes
        if block.coded_tokens:
            errors = block.errors
            self.measure = errors.measure
            self.k_error_worst = max(self.k_error_worst, errors.k_worst)
            self.v_error_worst = max(self.v_error_worst, errors.v_worst)
            self._k_error_sum += errors.k_mean * block.coded_tokens
            self._v_error_sum += errors.v_mean * block.coded_tokens

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
        return (
            self.header_bytes
            + self.index_bytes
            + sum(r.stream_bytes for r in self.roles.values())
        )

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
        return self._k_error_sum / self.coded_tokens if self.coded_tokens else 0.0

    @property
    def v_error_mean(self) -> float:
        """Mean over coded tokens of ‖v̂−v‖/‖v‖."""
        return self._v_error_sum / self.coded_tokens if self.coded_tokens else 0.0
