"""Many caches at a time, and caches in pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import Backend
from kvtc_stream.backends.select import get_backend
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.errors import KVTCError
from kvtc_stream.formats import BlockTable, Limits
from kvtc_stream.io.dlpack import BackendName, check_memory, dtype_of
from kvtc_stream.io.paged import PagedCache, indexable
from kvtc_stream.io.steps import Steps
from kvtc_stream.stream.codec import Codec
from kvtc_stream.stream.encoder import Encoder
from kvtc_stream.stream.opening import encoding, open
from kvtc_stream.stream.options import EncoderOptions
from kvtc_stream.stream.reader import Reader

Stream = bytes | bytearray | memoryview

#: Tokens of a paged cache that are copied and encoded at a time.
_TOKENS_AT_A_TIME = 8192


def encode_many(
    caches: Sequence[tuple[Any, Any] | PagedCache], codec: Codec, **options: Unpack[EncoderOptions]
) -> list[bytes]:
    """Whole caches to whole streams, in order.

    The stream of a cache does not depend on the others. On a CUDA device the blocks of a cache
    share launches, and a few caches take turns, each with scratch of its own. Of pages,
    8,192 tokens at a time are copied. A note on an error, and ``index`` of a
    :class:`kvtc_stream.KVTCError`, say which cache it is about.

    Parameters
    ----------
    caches
        Pairs of k and v, each as :meth:`kvtc_stream.Encoder.encode` takes them, or pages.
    codec
        How to code all of them.
    options
        Keywords of :class:`kvtc_stream.Encoder`, for all of them.
    """

    results = [b""] * len(caches)

    def one(i: int, cache: tuple[Any, Any] | PagedCache) -> Steps[None]:
        with _about("caches", i, len(caches)):
            if isinstance(cache, PagedCache):
                results[i] = yield from _encoding_pages(cache, codec, **options)
            else:
                results[i] = yield from encoding(*cache, codec, **options)

    if caches:
        backend = get_backend(codec.backend, *_tensors(caches[0]))
        backend.interleave([one(i, _held(c, backend)) for i, c in enumerate(caches)])
    return results


@contextmanager
def _about(name: str, index: int, count: int) -> Iterator[None]:
    """Errors say which of a batch they are about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{name}[{index}] of {count}")
        if isinstance(error, KVTCError):
            error.index = index
        raise


def _held(cache: Any, backend: Backend) -> Any:
    """The same cache of tensors that may be read in other streams; see :meth:`Backend.held`."""
    k, v = map(backend.held, _tensors(cache))
    return replace(cache, k=k, v=v) if isinstance(cache, PagedCache) else (k, v)


@dataclass(frozen=True)
class _Member:
    """One stream of a batch."""

    reader: Reader
    index: int
    count: int

    def about(self) -> AbstractContextManager[None]:
        return _about("streams", self.index, self.count)

    def stored(self, section: int) -> BlockTable:
        """The blocks of a section; their errors are about this stream."""
        with self.about():
            return self.reader.stored(section).within(self.about)


def _encoding_pages(cache: PagedCache, codec: Codec, **options: Any) -> Steps[bytes]:
    """Encode a cache in pages to a stream, copying some thousand tokens at a time."""

    def chunks() -> Iterator[dict[str, Any]]:
        for first in range(0, max(cache.tokens, 1), _TOKENS_AT_A_TIME):
            end = first + _TOKENS_AT_A_TIME
            k, v = cache.contiguous(slice(first, end))
            yield {"k": k, "v": v, "last": end >= cache.tokens}

    return (yield from Encoder(codec, **options).whole(chunks()))


def decode_many(
    streams: Sequence[Stream],
    calibration: Calibration,
    *,
    out: Sequence[PagedCache | tuple[Any, Any]] | None = None,
    section: int = 0,
    backend: BackendName = "auto",
    limits: Limits | None = None,
) -> list[Any]:
    """Whole streams to whole caches.

    On a CUDA device streams of one kind (plan, geometry, types) share launches, and where they are
    many three batches are decoded at a time, each with scratch of its own. A note on an error, and
    ``index`` of a :class:`kvtc_stream.KVTCError`, say which stream it is about.

    Parameters
    ----------
    streams
        Bytes of each. Copies to a CUDA device are quickest from read-only views of pinned memory,
        which may not change until the device is done.
    calibration
        That of all of them.
    out
        What takes the tokens, one for each stream: pages, or K and V as for
        :meth:`kvtc_stream.Reader.read`; of the streams' ``out_dtype``, in the backend's memory.
        A damaged stream leaves its own as they are; those of the others are then undefined.
    section, backend, limits
        As for :func:`kvtc_stream.decode`; ``"auto"`` is CUDA for ``out`` on a CUDA device.

    Returns
    -------
    list of (k, v)
        [layers, kv_heads, tokens, head_dim] of each stream; on a CUDA device views of arrays that
        streams of one kind share. What ``out`` holds, where it is given.
    """
    if out is not None and len(out) != len(streams):
        raise ValueError(f"found {len(streams)} streams and {len(out)} caches for them")
    coding = get_backend(backend, *(_tensors(out[0]) if out else ()))
    members = []
    for i, data in enumerate(streams):
        with _about("streams", i, len(streams)):
            reader = open(data, calibration=calibration, backend=coding.name, limits=limits)
        members.append(_Member(reader, i, len(streams)))
    kinds: dict[Any, list[int]] = {}
    tasks: list[Iterator[None]] = []
    for i, member in enumerate(members):
        h = member.reader.header
        key = (h.plan, h.geometry, h.dtype, h.out_dtype, h.scales, h.block_tokens)
        cache = None if out is None else out[i]
        if isinstance(cache, PagedCache):
            kinds.setdefault((*key, id(cache.k), id(cache.v)), []).append(i)
        elif cache is None:
            kinds.setdefault(key, []).append(i)
        else:
            tasks.append(_decoding_apart(member, section, cache))
    results: list[tuple[Any, Any]] = [(None, None)] * len(streams)
    for chosen in kinds.values():
        group = [members[i] for i in chosen]
        if out is None:
            pairs, own = _together(group, section, coding)
            for i, pair in zip(chosen, pairs, strict=True):
                results[i] = pair
        else:
            pages = [cache for i in chosen if isinstance(cache := out[i], PagedCache)]
            own = _into_pages(group, pages, section, coding)
        tasks += own
    coding.interleave(tasks)
    return results if out is None else list(out)


def _tensors(cache: PagedCache | tuple[Any, Any]) -> tuple[Any, Any]:
    return (cache.k, cache.v) if isinstance(cache, PagedCache) else cache


def _together(
    members: list[_Member], section: int, backend: Backend
) -> tuple[list[tuple[Any, Any]], list[Iterator[None]]]:
    """New K and V of each stream, and the tasks that fill them."""
    counts = [member.reader.tokens(section) for member in members]
    ends = np.cumsum([0, *counts]).tolist()
    first_reader = members[0].reader
    blocks = first_reader.block_decoder
    layers = len(first_reader.header.geometry.sections[section].layers)
    k, v = blocks.empty(section, layers, ends[-1])
    spans = list(pairwise(ends))
    slots = [np.arange(first, last) for first, last in spans]
    pairs = [
        (blocks.output(k[:, :, first:last]), blocks.output(v[:, :, first:last]))
        for first, last in spans
    ]
    return pairs, _decoding(list(zip(members, slots, strict=True)), section, backend, k, v)


def _decoding(
    streams: Sequence[tuple[_Member, NDArray[np.int64]]],
    section: int,
    backend: Backend,
    k: Any,
    v: Any,
) -> list[Iterator[None]]:
    """Tasks that decode streams of one kind, with the slots of their tokens, into arrays of the
    backend."""
    layers = range(len(streams[0][0].reader.header.geometry.sections[section].layers))
    # Coders keep buffers: as few as work at a time.
    idle: deque[Any] = deque()

    def one(group: Sequence[tuple[_Member, NDArray[np.int64]]]) -> Iterator[None]:
        tables = [member.stored(section) for member, _ in group]
        slots = [_slots(table, own) for table, (_, own) in zip(tables, group, strict=True)]
        try:
            coder = idle.pop()
        except IndexError:
            coder = group[0][0].reader.block_decoder.coder(section)
        yield from coder.decoding(BlockTable.concat(tables), np.concatenate(slots), layers, k, v)
        idle.append(coder)

    tokens = np.cumsum([len(slots) for _, slots in streams])
    edges = np.searchsorted(tokens, np.arange(0, tokens[-1], backend.batch_tokens), side="right")
    groups = [streams[i:j] for i, j in pairwise([*np.unique(edges).tolist(), len(streams)])]
    return list(map(one, groups))


def _decoding_apart(member: _Member, section: int, out: tuple[Any, Any]) -> Iterator[None]:
    """A task that decodes one stream into the caller's tensors, which are looked at now: only in
    the caller's stream do frameworks know what their tensors wait for."""
    reader, blocks = member.reader, member.reader.block_decoder
    with member.about():
        tokens = reader.tokens(section)
        layers = len(reader.header.geometry.sections[section].layers)
        k, v = blocks.buffers(section, layers, tokens, out)

    def steps() -> Iterator[None]:
        table, coder = reader.stored(section), blocks.coder(section)
        slots = _slots(table, np.arange(tokens))
        yield from coder.decoding(table, slots, range(layers), k, v)

    def named() -> Iterator[None]:
        task, ended = steps(), object()
        while True:
            with member.about():
                if next(task, ended) is ended:
                    return
            yield

    return named()


def _into_pages(
    members: list[_Member], pages: list[PagedCache], section: int, backend: Backend
) -> list[Iterator[None]]:
    header = members[0].reader.header
    layers, expected = len(header.geometry.sections[section].layers), header.out_dtype
    slots = []
    for member, cache in zip(members, pages, strict=True):
        with member.about():
            tokens = member.reader.tokens(section)
            if tokens != cache.tokens:
                raise ValueError(
                    f"the stream has {tokens} tokens, the pages are for {cache.tokens}"
                )
            slots.append(cache.slots())
    for tensors in (pages[0].k, pages[0].v):
        if len(tensors) != layers:
            raise ValueError(f"found pages of {len(tensors)} layers, the stream has {layers}")
        for tensor in tensors:
            check_memory(tensor, "pages", backend.name)
            found = dtype_of(np.dtype(indexable(tensor).dtype), "pages")
            if found is not expected:
                raise TypeError(
                    f"pages are {found.label}, the stream decodes to {expected.label}: make pages "
                    f"of that, or choose another out_dtype when encoding"
                )
    streams = list(zip(members, slots, strict=True))
    return _decoding(streams, section, backend, *map(backend.pool, (pages[0].k, pages[0].v)))


def _slots(table: BlockTable, of_section: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the tokens of blocks go, given that for each token of the section; -1: nowhere."""
    return np.append(of_section, -1)[table.ordinals()]


def decode_layers(
    data: Stream,
    calibration: Calibration,
    *,
    section: int = 0,
    backend: BackendName = "auto",
    limits: Limits | None = None,
) -> Iterator[tuple[Any, Any]]:
    """A whole stream, layer by layer, in order: K and V [kv_heads, tokens, head_dim] of each.

    The symbols of all layers are decoded at the first; a layer comes when it is asked for, so that
    a model can compute with one while the next is on its way. On a CUDA device a layer is ready in
    the order of the current stream.
    """
    reader = open(data, calibration=calibration, backend=backend, limits=limits)
    blocks = reader.block_decoder
    table = reader.stored(section)
    layer = blocks.coder(section).layers_of(table, table.ordinals(), reader.tokens(section))
    for index in range(len(reader.header.geometry.sections[section].layers)):
        k, v = layer(index)
        yield blocks.output(k)[0], blocks.output(v)[0]
