"""What a backend must do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.calibration.parts import CalibratedBases
from kvtc_stream.formats import (
    Block,
    BlockErrors,
    BlockRun,
    BlockTable,
    Coder,
    DType,
    Feature,
    LayerErrors,
    Measure,
    Section,
    StreamHeader,
)
from kvtc_stream.io.dlpack import BackendName
from kvtc_stream.io.steps import Steps
from kvtc_stream.planning.rate_control import Controls

#: A token whose relative error is beyond this is stored verbatim whatever was asked for: what
#: would come back has nothing to do with it (a vanishing token, say, would become the mean).
HOPELESS = 2.0


#: Coder and payload, when it is called; by any thread.
Coded: TypeAlias = Callable[[], tuple[Coder, bytes | memoryview]]


@dataclass(frozen=True)
class Given:
    """A :data:`Coded` that is coded already."""

    coder: Coder
    payload: memoryview

    def __call__(self) -> tuple[Coder, memoryview]:
        """The coder and the payload."""
        return self.coder, self.payload


class SectionCoder(ABC):
    """Codes the blocks of one section of one stream. Used by one thread at a time.

    Parameters
    ----------
    header
        Describes the stream.
    section
        Index of the section.
    calibration
        The bases that the header's plan names.
    error_bound, layer_error_bound
        A token is stored verbatim if its relative error of K or of V over all layers, or in one
        layer, is larger. ``None``: :data:`HOPELESS` over all layers, anything in one.
    measure
        Whether to measure errors of what would be restored; without, no bound is kept.
    target
        What an encoder with uniform bands keeps to; ``None``: the plan's step.
    """

    def __init__(
        self,
        header: StreamHeader,
        section: int,
        calibration: CalibratedBases,
        *,
        error_bound: float | None = None,
        layer_error_bound: float | None = None,
        measure: bool = True,
        target: Controls | None = None,
    ) -> None:
        self._header, self._index = header, section
        self._section = header.geometry.sections[section]
        self._calibration, self._measure = calibration, measure
        self._bound = HOPELESS if error_bound is None else min(HOPELESS, error_bound)
        self._layer_bound = math.inf if layer_error_bound is None else layer_error_bound
        self._by_layer = Feature.LAYER_ERRORS in header.features
        self._control = None if target is None else target.control(header, section)

    @abstractmethod
    def encode(
        self, k: Any, v: Any, positions: NDArray[np.int64], start: int
    ) -> Sequence[Block | BlockRun]:
        """Data blocks from k, v [layers, kv_heads, tokens, head_dim] in the stream's dtype.

        All but the last have the header's ``block_tokens``; ``start`` is the ordinal of the first
        token in the section. The arrays are the backend's.
        """

    def source(self, k: list[Any], v: list[Any]) -> Any | None:
        """What :meth:`encode_from` and :meth:`verbatim_from` read: the backend's arrays of layers,
        [kv_heads, tokens, head_dim], where they are. ``None`` if they must be copied first."""
        return None

    def encode_from(
        self, source: Any, span: slice, positions: NDArray[np.int64], start: int
    ) -> Steps[Sequence[Block | BlockRun]]:
        """As :meth:`encode`, of the tokens ``span`` of a source, whose positions are given.

        The payloads' bytes may be on their way: see :meth:`arrived`.
        """
        raise NotImplementedError

    @abstractmethod
    def arrived(self) -> None:
        """Wait until the bytes of the blocks of :meth:`encode_from` are there."""

    def verbatim_from(self, source: Any, spans: Sequence[slice]) -> Steps[list[Coded]]:
        """As :meth:`Backend.verbatim`, of spans of the tokens of a source."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, block: Block, layers: Sequence[int]) -> tuple[Any, Any]:
        """K and V of some layers (indices into the section's), in the header's ``out_dtype``."""

    def decode_into(
        self,
        table: BlockTable,
        slots: NDArray[np.int64],
        layers: Sequence[int],
        k: Any,
        v: Any,
    ) -> None:
        """Decode blocks into k, v [layers, kv_heads, tokens, head_dim], the backend's arrays.

        ``slots`` say where each token of the blocks goes; -1 is nowhere. Payloads that are not
        verified yet are, before the first value is written: ``ChecksumError`` if one is damaged.
        """
        for _ in self.decoding(table, slots, layers, k, v):
            pass

    @abstractmethod
    def decoding(
        self,
        table: BlockTable,
        slots: NDArray[np.int64],
        layers: Sequence[int],
        k: Any,
        v: Any,
        *,
        unseen: bool = False,
    ) -> Iterator[None]:
        """:meth:`decode_into` in steps, for :meth:`Backend.interleaving`; done at the last one.

        What is ``unseen``, because nobody gets k and v if this fails, may be written before
        payloads are verified.
        """

    def arriving(
        self,
        portions: Iterable[tuple[BlockTable, NDArray[np.int64]]],
        early: int,
        groups: Sequence[Sequence[int]],
        out: Callable[[], tuple[Any, Any]],
    ) -> Steps[None]:
        """:meth:`decode_into` memory that nobody sees yet, groups of layers one after the other.

        Of a backend with a device. Portions are blocks and their slots, taken as they come; so many
        ``early`` ones are decoded at once, all layers of them, while the others are on their way. K
        and V, as :meth:`Backend.layers_in` gives them, are asked of ``out`` once they are needed.
        After the first step the device has the first portion, after the second all of its work;
        after the third all blocks are known to be whole; after each further one a group of layers,
        by their indices, is there. Steps may be made by other threads than the first; whoever drops
        this waits until the device is done.
        """
        raise NotImplementedError

    @abstractmethod
    def decode_layers(self, block: Block) -> Callable[[int], tuple[Any, Any]]:
        """Decode the symbols once; the result gives K and V [1, …] of a layer when it is called.

        Other blocks may be decoded in between.
        """

    @abstractmethod
    def layers_of(
        self, table: BlockTable, slots: NDArray[np.int64], tokens: int
    ) -> Callable[[int], tuple[Any, Any]]:
        """As :meth:`decode_layers` of many blocks: K and V [1, kv_heads, tokens, head_dim].

        Blocks come with slots, as for :meth:`decode_into`.
        """


class Backend(Protocol):
    """A way to run the codec, and the arrays that it works on."""

    name: BackendName

    def layer_list(
        self, x: Any, name: str, layers: int, kv_heads: int, head_dim: int
    ) -> tuple[list[Any], DType]:
        """See :func:`kvtc_stream.io.dlpack.layer_list`; the arrays are the backend's."""
        ...

    def array(self, x: NDArray[Any]) -> Any:
        """The backend's array of a host array."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Any:
        """An uninitialised array."""
        ...

    def room(self, size: int) -> memoryview:
        """Host memory for bytes that will be decoded."""
        ...

    def verbatim(self, header: StreamHeader, pieces: Sequence[tuple[Any, Any]]) -> list[Coded]:
        """See :func:`kvtc_stream.coding.values.code_verbatim`; of pieces of K and V."""
        ...

    def pool(self, tensors: Sequence[Any]) -> Any:
        """A server's pages [pages, page_size, kv_heads, head_dim] of each layer, as what
        :meth:`SectionCoder.decode_into` writes to: a token's slot is page · page_size + place."""
        ...

    def layers_in(self, pieces: Sequence[Any]) -> Any:
        """Memory of some layers each [layers, kv_heads, tokens, head_dim], alike, as what
        :meth:`SectionCoder.decode_into` writes to."""
        ...

    def held(self, x: Any) -> Any:
        """Tensors, lists of them in lists, ready to be read in other streams."""
        ...

    def sending(self, streams: Iterable[Any]) -> AbstractContextManager[None]:
        """Begin to copy streams' bytes to where blocks are decoded, if that is somewhere else and
        takes no work of the host. Their blocks are decoded in this context."""
        ...

    def batch_tokens(self, section: Section) -> int:
        """Tokens of streams that are worth decoding beside others."""
        ...

    def alike(self, k: Sequence[Any], v: Sequence[Any]) -> tuple[Hashable, int] | None:
        """Whether K and V, arrays of each layer, can be written by those who write others.

        Those with the same first result differ by one offset only, as rows of a batch do: the
        second is the slot at which their tokens begin, counted from anywhere. ``None``: none can.
        """
        ...

    def interleaving(self, tasks: Iterable[Iterator[None]]) -> Steps[None]:
        """Take tasks to their ends, several at a time where that serves the device: each step
        begins what the next one waits for. All are over at its end, or when it raises."""
        ...

    def output(self, x: Any, dtype: DType) -> Any:
        """What users get of an array: with an element type, and DLPack."""
        ...

    @property
    def section_coder(self) -> type[SectionCoder]:
        """The class of its section coders."""
        ...


def layer_errors(errors: NDArray[np.floating[Any]], kept: NDArray[np.int64]) -> LayerErrors | None:
    """Mean and worst of [2, layers, tokens] errors of K and V over the coded tokens."""
    if not len(kept):
        return None
    own = errors[:, :, kept]
    (k_mean, v_mean), (k_worst, v_worst) = own.mean(axis=2), own.max(axis=2)
    return LayerErrors.of(k_mean, k_worst, v_mean, v_worst)


def block_errors(errors: NDArray[np.floating[Any]] | None, kept: NDArray[np.int64]) -> BlockErrors:
    """Mean and worst of [2, tokens] errors of K and V over the coded tokens, rounded up."""
    if errors is None:
        return BlockErrors()
    found = []
    for own in errors[:, kept]:
        for value in (own.mean(), own.max()) if len(kept) else (0.0, 0.0):
            rounded = np.float32(value)
            found.append(
                float(np.nextafter(rounded, np.float32(np.inf)) if rounded < value else rounded)
            )
    return BlockErrors(Measure.RECONSTRUCTION, *found)


def errors_of_alike(errors: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """:func:`block_errors` of blocks of ``size`` tokens each, all of them coded, from [2, tokens]:
    [blocks, 4]."""
    own = errors.reshape(2, -1, size)
    return np.stack([own.mean(axis=2), own.max(axis=2)], axis=1).reshape(4, -1).T.copy()
