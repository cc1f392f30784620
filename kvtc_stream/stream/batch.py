"""Many caches at a time, and caches in pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import Backend
from kvtc_stream.backends.select import get_backend
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.errors import KVTCError
from kvtc_stream.formats import BlockTable, Limits, StreamHeader
from kvtc_stream.io.dlpack import BackendName, check_memory, check_writable, dtype_of
from kvtc_stream.io.paged import PagedCache, indexable
from kvtc_stream.io.steps import Steps, run
from kvtc_stream.stream.codec import Codec
from kvtc_stream.stream.decoder import BlockDecoder
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
        with about("caches", i, len(caches)):
            if isinstance(cache, PagedCache):
                results[i] = yield from _encoding_pages(cache, codec, **options)
            else:
                results[i] = yield from encoding(*cache, codec, **options)

    if caches:
        backend = get_backend(codec.backend, *_tensors(caches[0]))
        run(backend.interleaving([one(i, _held(c, backend)) for i, c in enumerate(caches)]))
    return results


@contextmanager
def about(name: str, index: int, count: int) -> Iterator[None]:
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
    """One stream of a batch.

    Attributes
    ----------
    reader, index, count
        Of the stream, its place, and how many there are.
    target, slot
        Arrays of each layer's K and V that are written, and where in those of others that share
        launches they begin; see :meth:`kvtc_stream.backends.base.Backend.alike`.
    """

    reader: Reader
    index: int
    count: int
    target: tuple[Any, Any] | None = None
    slot: int = 0

    def about(self) -> AbstractContextManager[None]:
        return about("streams", self.index, self.count)

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
    out: Sequence[PagedCache | tuple[Any, Any] | None] | None = None,
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
        :meth:`kvtc_stream.Reader.read`, of the streams' ``out_dtype``, in the backend's memory; or
        ``None`` for new arrays.
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
    given = next((x for x in out or () if x is not None), None)
    coding = get_backend(backend, *(() if given is None else _tensors(given)))
    results: list[Any] = [None] * len(streams) if out is None else list(out)

    def tasks() -> Iterator[Iterator[None]]:
        """The next streams are opened while a device decodes those before."""
        kinds: defaultdict[Any, _Kind] = defaultdict(_Kind)
        for i, data in enumerate(streams):
            with about("streams", i, len(streams)):
                reader = open(data, calibration=calibration, backend=coding.name, limits=limits)
                tokens = reader.tokens(section)
            member, cache, h = _Member(reader, i, len(results)), results[i], reader.header
            where: tuple[Any, ...] = ()
            if isinstance(cache, PagedCache):
                where = id(cache.k), id(cache.v)
            elif cache is not None:
                member = _aimed(member, section, cache)
                assert member.target is not None
                if (found := coding.alike(*member.target)) is None:
                    yield _decoding_apart(member, section)
                    continue
                where, member = found[:1], replace(member, slot=found[1])
            kind = kinds[*kind_of(h), *where]
            batch = most = coding.batch_tokens(h.geometry.sections[section])
            if kind.blocks is None and tokens * len(streams) > 2 * most:
                most //= 2  # of the first ones: a device has nothing to do until they are there
            if kind.members and kind.tokens + tokens > most:
                yield _together(kind, section, coding, results)
                most = batch
            kind.members.append(member)
            kind.tokens += tokens
            # One more like this would not fit: a device need not wait until the next is opened.
            if kind.tokens >= 0.75 * most and kind.tokens + tokens > most:
                yield _together(kind, section, coding, results)
        for kind in kinds.values():
            if kind.members:
                yield _together(kind, section, coding, results)

    with coding.sending(streams):
        run(coding.interleaving(tasks() if len(results) > 1 else list(tasks())))
    return results


def kind_of(header: StreamHeader) -> tuple[Any, ...]:
    """What streams have in common that can share launches."""
    h = header
    return h.plan.digest, h.geometry, h.dtype, h.out_dtype, h.scales, h.block_tokens


@dataclass
class _Kind:
    """Streams that share launches, as many as wait.

    Attributes
    ----------
    members, tokens
        Those that wait.
    blocks
        What decodes those of all of them.
    """

    members: list[_Member] = field(default_factory=list)
    tokens: int = 0
    blocks: BlockDecoder | None = None


def _tensors(cache: PagedCache | tuple[Any, Any]) -> tuple[Any, ...]:
    return (cache.k, cache.v) if isinstance(cache, PagedCache) else tuple(cache)


def _together(
    kind: _Kind, section: int, backend: Backend, results: MutableSequence[Any]
) -> Iterator[None]:
    """The task that decodes those that wait, to tensors or pages that ``results`` has, or to new
    tensors that it gets."""
    members, kind.members, kind.tokens = kind.members, [], 0
    counts = [member.reader.tokens(section) for member in members]
    blocks = kind.blocks = kind.blocks or members[0].reader.block_decoder
    layers = len(members[0].reader.header.geometry.sections[section].layers)
    unseen = results[members[0].index] is None
    if unseen:
        edges = np.cumsum([0, *counts]).tolist()
        slots = [np.arange(first, last) for first, last in pairwise(edges)]
        k, v = blocks.empty(section, layers, edges[-1])
        for member, (first, last) in zip(members, pairwise(edges), strict=True):
            pair = k[:, :, first:last], v[:, :, first:last]
            results[member.index] = blocks.output(pair[0]), blocks.output(pair[1])
    elif members[0].target is not None:
        first = min(members, key=lambda member: member.slot)
        slots = [
            np.arange(tokens) + member.slot - first.slot
            for member, tokens in zip(members, counts, strict=True)
        ]
        assert first.target is not None
        k, v = first.target
    else:
        pages = [results[member.index] for member in members]
        slots = _places(members, counts, pages, section, backend)
        k, v = map(backend.pool, (pages[0].k, pages[0].v))

    def steps() -> Iterator[None]:
        tables = [member.stored(section) for member in members]
        own = [table.slots(places) for table, places in zip(tables, slots, strict=True)]
        with blocks.lent(section) as coder:
            yield from coder.decoding(
                BlockTable.concat(tables),
                np.concatenate(own),
                range(layers),
                k,
                v,
                unseen=unseen,
            )

    return steps()


def _aimed(member: _Member, section: int, out: tuple[Any, Any]) -> _Member:
    """The member with the caller's tensors, which are looked at now: only in the caller's stream do
    frameworks know what their tensors wait for."""
    reader = member.reader
    with member.about():
        layers = len(reader.header.geometry.sections[section].layers)
        k, v = reader.block_decoder.buffers(section, layers, reader.tokens(section), out)
    return replace(member, target=(k, v))


def _decoding_apart(member: _Member, section: int) -> Iterator[None]:
    """A task that decodes one stream into the caller's tensors."""
    reader = member.reader
    assert member.target is not None
    k, v = member.target

    def steps() -> Iterator[None]:
        table, layers = reader.stored(section), range(len(k))
        slots = table.slots(np.arange(reader.tokens(section)))
        coder = reader.block_decoder.coder(section)
        yield from coder.decoding(table, slots, layers, k, v)

    def named() -> Iterator[None]:
        task, ended = steps(), object()
        while True:
            with member.about():
                if next(task, ended) is ended:
                    return
            yield

    return named()


def _places(
    members: Sequence[_Member],
    counts: Sequence[int],
    pages: Sequence[PagedCache],
    section: int,
    backend: Backend,
) -> list[NDArray[np.int64]]:
    """The slots of each stream's tokens in pages of one pool, which can hold them."""
    header, slots = members[0].reader.header, []
    with members[0].about():
        _check_pages(header, section, pages[0], backend)
    for member, tokens, cache in zip(members, counts, pages, strict=True):
        with member.about():
            if tokens != cache.tokens:
                raise ValueError(
                    f"the stream has {tokens} tokens, the pages are for {cache.tokens}"
                )
            slots.append(cache.slots())
    return slots


def _check_pages(header: StreamHeader, section: int, cache: PagedCache, backend: Backend) -> None:
    """Raise unless pages can take a stream's tokens."""
    of, expected = header.geometry.sections[section], header.out_dtype
    counts: set[tuple[int, ...]] = set()
    for tensors, name, dim in ((cache.k, "K", of.k_dim), (cache.v, "V", of.v_dim)):
        if len(tensors) != len(of.layers):
            raise ValueError(
                f"found pages of {len(tensors)} layers, the stream has {len(of.layers)}"
            )
        for tensor in tensors:
            check_memory(tensor, "pages", backend.name)
            array = indexable(tensor)
            check_writable([array], "pages", dtype_of(np.dtype(array.dtype), "pages"), expected)
            shape = tuple(array.shape)
            counts.add(shape[:2])
            if len(shape) != 4 or shape[2:] != (of.kv_heads, dim):
                raise ValueError(
                    f"pages of {name} have shape {list(shape)}, expected [pages, page_size, "
                    f"{of.kv_heads}, {dim}]"
                )
    if len(counts) > 1:
        raise ValueError(
            f"layers have other numbers of pages, or tokens in each: {sorted(counts)}; expected "
            "the same in all, K's and V's"
        )


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
