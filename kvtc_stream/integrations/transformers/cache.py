"""A ``DynamicCache`` into a stream and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache, partial
from itertools import accumulate, pairwise, takewhile
from typing import Any, BinaryIO, Literal, TypeAlias, TypeVar, overload
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

import kvtc_stream as kvtc
from kvtc_stream.backends.select import cuda_runs, get_backend
from kvtc_stream.errors import (
    BackendUnavailableError,
    CalibrationMismatchError,
    UnsupportedError,
)
from kvtc_stream.formats import Geometry, Section
from kvtc_stream.integrations.transformers.arriving import Arrivals, Coming, Room, expect
from kvtc_stream.integrations.transformers.geometry import (
    check_geometry,
    check_vocabulary,
    geometry_of,
    key_errors,
)
from kvtc_stream.integrations.transformers.identity import (
    TokenIds,
    as_ids,
    check_fingerprint,
    config_text,
    look_at,
    token_digest,
)
from kvtc_stream.integrations.transformers.images import (
    check_no_images,
    forget_images,
    placeholders,
)
from kvtc_stream.integrations.transformers.model import (
    SUPPORTED_CACHES,
    ahead_of_what_comes,
    attention_layers,
    decoder_of,
    layer_devices,
    one_walk,
)
from kvtc_stream.io.dlpack import BackendName
from kvtc_stream.io.steps import R, Steps, begun, run
from kvtc_stream.stream.batch import about
from kvtc_stream.stream.codec import expect_calibration, expect_codec
from kvtc_stream.stream.options import EncoderOptions
from kvtc_stream.stream.rows import Rows

T = TypeVar("T")
Source: TypeAlias = "str | os.PathLike[str] | BinaryIO | bytes | bytearray | memoryview"

#: Tokens whose keys are computed again, how many of those that differ are looked for, and at how
#: many positions.
_CHECKED, _SOUGHT, _CANDIDATES = 256, 8, 1 << 17
#: Relative errors of keys: what rounding makes, in any dtype; and what no codec leaves, so that
#: the token is another.
_ROUNDING, _ANOTHER = 0.03, 0.7

#: Types that a model computes in; those of quantised weights are others.
_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16)

#: Layers whose tensors share memory: fewer to allocate and hand over, and little that is held
#: until the last of them has grown.
_TOGETHER = 8
#: Layers of the first group that arrives, for which everybody waits, and how many more the next
#: ones have: models take longer for layers than they take to be decoded.
_FIRST = 4
#: The most tokens that layers on their way have room for behind those that come: the first new ones
#: need no copy of all of them then.
_SPARE = 256

#: Tokens per piece handed to the encoder: bounds the copies from the model's device.
_CHUNK = 1024


def encode_cache(
    cache: DynamicCache,
    codec: kvtc.Codec,
    file: str | os.PathLike[str] | BinaryIO | None = None,
    *,
    model: PreTrainedModel | None = None,
    token_ids: TokenIds | None = None,
    sequence: int | None = None,
    attention_mask: TokenIds | None = None,
    positions: TokenIds | None = None,
    metadata: Mapping[str, Any] | None = None,
    base: Source | None = None,
) -> bytes | None:
    """Write one sequence of a cache as a stream.

    The cache is only read. Sliding-window layers are written as they are held: the latest tokens,
    with their positions.

    Parameters
    ----------
    cache
        A ``DynamicCache``.
    codec
        Made from a calibration of the cache's model.
    file
        Path or binary file to write; ``None`` returns the bytes.
    model
        The cache's model: its geometry and fingerprint are checked against the calibration, and
        whether the prompt can be stored at all. Without it nothing of this is checked.
    token_ids
        The ids of the tokens to write, [tokens] or [1, tokens]; their digest is recorded, and
        :func:`decode_cache` can refuse another prompt. With ``model``, some keys are computed
        again to see that the cache is of these tokens at these positions. After ``generate`` the
        cache lacks the last token of the returned sequence. With an ``attention_mask``, those of
        padding may be among them. Images are not in the ids: two prompts that differ in an image
        have one digest.
    sequence
        Which one of a batch, from 0; needed if there are several.
    attention_mask
        [tokens] or [batch, tokens], of all tokens that the cache has seen: those where it is 0,
        padding, are left out.
    positions
        [tokens], rising: the positions at which the model has computed the keys of the tokens to
        write. From 0 without gaps by default, which is right for a prompt, padded or not, and
        wrong for a cache that some tokens were evicted from.
    metadata
        The user's, recorded in the stream.
    base
        The stream that the cache was restored from before it grew or forked: its blocks are taken
        over, see :class:`kvtc_stream.Encoder`.

    Raises
    ------
    UnsupportedError
        Another kind of cache or layer, several sequences, an offloaded cache, padding within a
        sliding window, or a prompt with images of a model that gives them positions in three
        dimensions (M-RoPE).
    CalibrationMismatchError
        The cache or the model is not what was calibrated, or the cache not of ``token_ids``.
    ValueError
        The cache is empty, or ``token_ids``, ``attention_mask`` or ``positions`` are not as many
        as it holds, or the model has no such token.
    """
    expect_codec(codec)
    with one_walk():
        with _first_about(model, codec.calibration):
            layers, seen, sequence = _check_cache(cache, codec.calibration.geometry, sequence)
        kept = _kept(attention_mask, layers, seen, sequence)
        where = _given_positions(positions, int(kept.sum()))
        ids = None if token_ids is None else _kept_ids(token_ids, kept)
        if model is not None:
            check_no_images(model, ids)
            if ids is not None:
                _check_shape(model, codec.calibration)
                _check_prompt(model, layers, sequence, kept, ids, where)
        chunks = _chunks(codec, layers, sequence, kept, where)
        options: EncoderOptions = {
            "metadata": metadata,
            "token_digest": b"" if ids is None else token_digest(ids),
            "base": base,
        }
        if file is None:
            steps = kvtc.Encoder(codec, **options).whole(chunks)
            return run(_begun(steps, model, codec.calibration))
        _check_model(model, codec.calibration)
        with kvtc.open(file, "wb", codec=codec, **options) as writer:
            for chunk in chunks:
                del chunk["last"]
                writer.write(**chunk)
    return None


def _check_shape(model: PreTrainedModel, calibration: kvtc.Calibration) -> None:
    """Refuse a model whose caches are of another shape."""
    try:
        check_geometry(geometry_of(model), calibration.geometry)
    except kvtc.KVTCError:
        check_fingerprint(model, calibration)  # says which model was expected
        raise


def _check_model(model: PreTrainedModel | None, calibration: kvtc.Calibration) -> None:
    """Refuse another model than the calibration's."""
    if model is not None:
        _check_shape(model, calibration)
        check_fingerprint(model, calibration)


@contextmanager
def _first_about(model: PreTrainedModel | None, calibration: kvtc.Calibration) -> Iterator[None]:
    """Errors are about the model if its caches are of another shape: then nothing fits."""
    try:
        yield
    except (kvtc.KVTCError, LookupError):
        if model is not None:
            _check_shape(model, calibration)
        raise


def _begun(
    steps: Steps[R], model: PreTrainedModel | None, calibration: kvtc.Calibration, count: int = 1
) -> Steps[R]:
    """Take the first steps; look at the model while a device does what it was asked."""
    if model is None:
        return begun(steps, count)
    ahead, looks = ahead_of_what_comes(model.device), [partial(look_at, decoder_of(model))]

    def looking() -> Steps[R]:
        rest = begun(steps)
        with ahead():
            looks.pop()()  # steps that wait must not keep the model
        return (yield from rest)

    try:
        return begun(looking(), count)
    finally:
        with ahead():
            _check_model(model, calibration)


def _chunks(
    codec: kvtc.Codec,
    layers: Mapping[int, Any],
    sequence: int,
    kept: NDArray[np.bool_],
    where: NDArray[np.int64],
) -> Iterator[dict[str, Any]]:
    """What :meth:`kvtc_stream.Encoder.encode_steps` takes, one call after the other.

    ``kept`` says which of the seen tokens to write, ``where`` the positions of those.
    """
    on_device = codec.backend == "cuda" or (codec.backend == "auto" and cuda_runs())
    for i, section in enumerate(codec.calibration.geometry.sections):
        chosen = [layers[number] for number in section.layers]
        held = chosen[0].keys.shape[2]
        slots = np.flatnonzero(kept[len(kept) - held :])
        if len(slots) != min(held, len(where)):
            raise UnsupportedError(
                f"{held - len(slots)} of the {held} tokens that layer {section.layers[0]} "
                f"holds are padding, and earlier tokens are not in its window any more: "
                f"prompts of sliding-window models must be padded on the left only"
            )
        devices = {layer.keys.device for layer in chosen}
        there = len(devices) == 1 and devices.pop().type in ("cpu", "cuda" if on_device else "")
        # Tensors that can be read where they are need no pieces.
        step = len(slots) if there else _CHUNK
        for start in range(0, len(slots), step):
            piece = slots[start : start + step]
            first = len(where) - len(slots) + start
            yield {
                "k": [_some_tokens(layer.keys[sequence], piece, there) for layer in chosen],
                "v": [_some_tokens(layer.values[sequence], piece, there) for layer in chosen],
                "positions": where[first : first + len(piece)],
                "section": i,
                "last": start + step >= len(slots),
            }


@overload
def decode_cache(
    source: Source,
    calibration: kvtc.Calibration,
    *,
    model: PreTrainedModel | None = None,
    token_ids: TokenIds | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    wait: bool = True,
    return_positions: Literal[False] = False,
) -> DynamicCache: ...


@overload
def decode_cache(
    source: Source,
    calibration: kvtc.Calibration,
    *,
    model: PreTrainedModel | None = None,
    token_ids: TokenIds | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    wait: bool = True,
    return_positions: Literal[True],
) -> tuple[DynamicCache, NDArray[np.int64]]: ...


def decode_cache(
    source: Source,
    calibration: kvtc.Calibration,
    *,
    model: PreTrainedModel | None = None,
    token_ids: TokenIds | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    wait: bool = True,
    return_positions: bool = False,
) -> DynamicCache | tuple[DynamicCache, NDArray[np.int64]]:
    """Read a stream as a cache that ``model.generate(input_ids, cache=...)`` continues.

    ``input_ids`` are those of the cached tokens and at least one more.

    Parameters
    ----------
    source
        Path, binary file (a pipe too) or the bytes.
    calibration
        The stream's.
    model
        The model that will continue: it is checked against the calibration, and the cache gets
        the layers its configuration asks for. It forgets the images of an earlier prompt
        (``rope_deltas``), as when it reads a new one. Without it all layers are plain; streams of
        sliding-window layers that do not hold all tokens need it.
    token_ids
        Ids that begin with those of the cached tokens, as a prompt does; checked against the
        digest if the stream has one.
    device
        By default that of the model, or of each of its layers if they are on several, else CPU.
    dtype
        By default that of the model, which its attention needs, or without it the stream's.
    backend
        ``"auto"`` is CUDA where the cache goes to a CUDA device and the backend can run there.
    wait
        ``False``: return once all blocks are known to be whole and the device has its work. Layers
        are waited for when their keys or values are first read, so that the model computes with
        some while the next are decoded; until the last one has been read, that takes a quarter to
        a half of the cache's memory more. Behind a layer's tokens there is room for more (256, but
        a sixteenth at most): the first that are added go there, and keys and values are views that
        are not contiguous. What a block that is whole can still have wrong, because its writer was
        at fault, is raised when a layer is read. On a CPU everything is waited for.
    return_positions
        Take streams whose tokens are not at positions 0, 1, 2, … (left-out tokens of an evicted
        cache) too, and return the positions, int64 [tokens], beside the cache. Such a cache goes on
        only with ``position_ids`` from ``positions[-1] + 1``, given to the model's ``forward``:
        by itself transformers counts the tokens in the cache.

    Raises
    ------
    CalibrationMismatchError
        Stream, calibration, model or token ids do not belong together.
    UnsupportedError
        A ``DynamicCache`` cannot hold the stream's tokens, or could not go on from them; or there
        are none.
    FormatError
        The bytes are not a stream, or damaged.
    """
    check = None if token_ids is None else as_ids(token_ids)
    cache, positions = _restored(
        [source], calibration, model, [check], device, dtype, backend, wait, gaps=return_positions
    )
    return (cache, positions) if return_positions else cache


def decode_batch(
    streams: Sequence[Source],
    calibration: kvtc.Calibration,
    *,
    model: PreTrainedModel | None = None,
    token_ids: TokenIds | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    wait: bool = True,
) -> DynamicCache:
    """Read streams of equally many tokens as the rows of one cache.

    Each row is what :func:`decode_cache` restores of its stream; on a CUDA device they share
    launches.

    Parameters
    ----------
    streams
        Paths, binary files or bytes, a row each.
    token_ids
        [rows, tokens] that begin with those of the rows.
    calibration, model, device, dtype, backend, wait
        As for :func:`decode_cache`.

    Raises
    ------
    CalibrationMismatchError, UnsupportedError, FormatError
        As :func:`decode_cache`; a note, and ``index``, say which stream it is about.
    ValueError
        There are no streams, they hold different numbers of tokens, or ``token_ids`` has other
        rows.
    TypeError
        ``streams`` is one of them, and no list.
    """
    if isinstance(streams, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(
        streams, "read"
    ):
        raise TypeError(
            f"streams must be a list of paths, files or bytes, a row each, found one "
            f"{type(streams).__name__}: decode_cache restores that"
        )
    streams = list(streams)
    ids: list[NDArray[np.int64] | None] = [None] * len(streams)
    if token_ids is not None:
        rows = token_ids if isinstance(token_ids, Tensor) else np.asarray(token_ids)
        if rows.ndim != 2 or len(rows) != len(streams):
            raise ValueError(
                f"token_ids must be [{len(streams)}, tokens], a row for each stream, found "
                f"{list(rows.shape)}"
            )
        ids = [as_ids(row) for row in rows]
    if not streams:
        raise ValueError("found no streams: a cache has a row or more")
    return _restored(streams, calibration, model, ids, device, dtype, backend, wait)[0]


def _restored(
    sources: Sequence[Source],
    calibration: kvtc.Calibration,
    model: PreTrainedModel | None,
    token_ids: Sequence[NDArray[np.int64] | None],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    backend: BackendName,
    wait: bool,
    *,
    gaps: bool = False,
) -> tuple[DynamicCache, NDArray[np.int64]]:
    """The cache whose rows the sources hold, and the positions of its tokens, which may have
    ``gaps``."""
    expect_calibration(calibration)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, found {dtype!r}")
    with one_walk(), ExitStack() as opened:
        spread = model if device is None else None
        if model is not None:
            device = model.device if device is None else device
            if dtype is None and model.dtype in _COMPUTED_IN:
                dtype = model.dtype
        device = torch.device("cpu" if device is None else device)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        if device.type == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"the cache should go to {device}, and PyTorch finds no CUDA device: choose another"
            )
        if backend == "auto":
            backend = "cuda" if device.type == "cuda" and cuda_runs() else "cpu"
        sections = calibration.geometry.sections
        opened.enter_context(get_backend(backend).sending(sources))
        cache = _empty_cache(model, sections)
        layers = attention_layers(cache, "the model")
        readers: list[kvtc.Reader] = []
        lengths: list[int] = []

        def read(i: int) -> NDArray[np.int64]:
            """Open the next row; positions of the cache's tokens."""
            with about("streams", i, len(sources)) if len(sources) > 1 else nullcontext():
                file = kvtc.open(_seekable(sources[i]), calibration=calibration, backend=backend)
                readers.append(opened.enter_context(file))
                _check_layers(readers[i], sections)
                held = [readers[i].positions(j) for j in range(len(sections))]
                positions = _cache_positions(sections, held, layers)
                if not gaps:
                    _check_gapless(positions)
                if (ids := token_ids[i]) is not None:
                    _check_tokens(ids, len(positions), readers[i].header.token_digest)
                lengths.append(len(positions))
                if lengths[i] != lengths[0]:
                    raise ValueError(
                        f"found a cache of {lengths[i]} tokens, the first stream's is of "
                        f"{lengths[0]}: rows of one cache are equally long; restore them one by one"
                    )
                _check_alike(readers[0], readers[i])
            return positions

        def row(i: int) -> kvtc.Reader:
            """The next row is opened while a device decodes those before."""
            if i == len(readers):
                read(i)
            return readers[i]

        with _first_about(model, calibration):
            positions = read(0)
        memory = device if backend == "cuda" else torch.device("cpu")
        wait = wait or backend == "cpu"
        places: dict[int, torch.device] = {}
        restored: list[tuple[_Tensors, Steps[None]]] = []
        for i, section in enumerate(sections):
            needed = _needed(layers[section.layers[0]], len(positions))
            grows = not wait and type(layers[section.layers[0]]) is DynamicLayer
            grows = grows and dtype in (None, getattr(torch, readers[0].header.out_dtype.label))
            spare = min(_SPARE, needed // 16) if grows else 0
            tensors = _Tensors(row, len(sources), i, needed, memory, spare)
            steps = tensors.restoring() if wait else tensors.arriving()
            # Of several tasks a second one has then begun: a device has enough to do.
            steps = begun(steps, 1 if wait else 2) if i else _begun(steps, model, calibration, 2)
            if not i and spread is not None:
                places = layer_devices(spread)
            if wait:
                run(steps)
            restored.append((tensors, steps))
        for section, (tensors, steps) in zip(sections, restored, strict=True):
            arrivals = None if wait else Arrivals(steps)
            for j, number in enumerate(section.layers):
                place = places.get(number, device)
                _fill(layers[number], tensors, j, place, dtype, len(positions), arrivals)
        for _, steps in restored if not wait else ():
            next(steps)
            next(steps)  # all blocks are known to be whole
        if model is not None:
            forget_images(model)
    return cache, positions


def _check_layers(reader: kvtc.Reader, sections: Sequence[Section]) -> None:
    """Refuse a stream of some of the layers."""
    held = [section.layers for section in reader.header.geometry.sections]
    if held != [section.layers for section in sections]:
        raise UnsupportedError(
            f"the stream holds layers {sorted(n for s in held for n in s)} only: join "
            "it with the others (kvtc join), or read it with kvtc_stream.open"
        )


def _check_gapless(positions: NDArray[np.int64]) -> None:
    """Refuse positions at which transformers would not go on by itself."""
    if positions[-1] + 1 != len(positions):
        raise UnsupportedError(
            f"the stream holds {len(positions)} tokens, at positions up to {positions[-1]}: "
            f"transformers would go on at {len(positions)}. Pass return_positions=True, and "
            f"position_ids from {positions[-1] + 1} to the model's forward"
        )


def _check_alike(first: kvtc.Reader, other: kvtc.Reader) -> None:
    """Refuse what cannot be the row of a cache beside the first."""
    for i in range(len(first.header.geometry.sections)):
        if (found := other.tokens(i)) != (expected := first.tokens(i)):
            number = first.header.geometry.sections[i].layers[0]
            raise ValueError(
                f"the stream holds {found} tokens of layer {number}, the first {expected}: restore "
                "them one by one"
            )
    if (dtype := other.header.out_dtype) is not (expected_dtype := first.header.out_dtype):
        raise ValueError(
            f"the stream decodes to {dtype.label}, the first to {expected_dtype.label}: rows of "
            "one cache are of one type; restore them one by one"
        )


class _Tensors:
    """Memory for the latest tokens of a section, in the rows of a cache, and how they get there.

    Parameters
    ----------
    row
        The reader of a row.
    rows, index, tokens
        How many rows there are, the section's index, and how many tokens.
    memory
        Where the backend decodes to.
    spare
        For how many more tokens there is room behind each row's.
    """

    def __init__(
        self,
        row: Callable[[int], kvtc.Reader],
        rows: int,
        index: int,
        tokens: int,
        memory: torch.device,
        spare: int,
    ) -> None:
        header = row(0).header
        section = header.geometry.sections[index]
        self.dtype: torch.dtype = getattr(torch, header.out_dtype.label)
        layers = range(len(section.layers))
        sizes = range(_FIRST, _FIRST + len(layers) + 1, _FIRST)
        cuts = [0, *takewhile(lambda x: x < len(layers), accumulate(sizes)), len(layers)]
        self._groups = [layers[first:last] for first, last in pairwise(cuts)]
        shape = rows, section.kv_heads, tokens + spare

        def empty(count: int, dim: int) -> Tensor:
            return torch.empty((count, *shape, dim), dtype=self.dtype, device=memory)

        self._rooms = [
            Room(empty(count, section.k_dim), empty(count, section.v_dim), tokens)
            for count in (len(layers[i : i + _TOGETHER]) for i in layers[::_TOGETHER])
        ]
        self._row, self._rows, self._index, self.tokens = row, rows, index, tokens
        self.memory = memory
        self._step = section.kv_heads * (tokens + spare)

    def place(self, index: int) -> tuple[Room, int]:
        """Where a layer of the section is: in which room, and which of its layers."""
        which, own = divmod(index, _TOGETHER)
        return self._rooms[which], own

    def group(self, index: int) -> int:
        """Of the groups that arrive, that of a layer of the section."""
        return next(i for i, group in enumerate(self._groups) if index in group)

    def restoring(self) -> Steps[None]:
        """Decode all of it."""
        if self.memory.type == "cuda":
            yield from self._on_the_device().restoring()
            return
        for i in range(self._rows):
            reader, own = self._row(i), self._of(i)
            latest = slice(reader.tokens(self._index) - self.tokens, None)
            with about("streams", i, self._rows) if self._rows > 1 else nullcontext():
                yield from reader._reading(latest, section=self._index, out=own, unseen=True)

    def arriving(self) -> Steps[None]:
        """Decode it beside what else the device does, see
        :meth:`kvtc_stream.backends.base.SectionCoder.arriving`."""
        yield from self._on_the_device().arriving(self._groups)

    def _of(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        rooms = ((x.k for x in self._rooms), (x.v for x in self._rooms))
        k, v = ([x[:, row, :, : self.tokens] for x in part] for part in rooms)
        return k, v

    def _on_the_device(self) -> Rows:
        out = self._of(0)
        return Rows(self._row, self._rows, self._index, self.tokens, out, self._step)


def _fill(
    layer: Any,
    tensors: _Tensors,
    index: int,
    place: torch.device,
    dtype: torch.dtype | None,
    seen: int,
    arrivals: Arrivals | None,
) -> None:
    """What ``layer.update`` would do, which copies; with ``arrivals`` when it is read first."""
    like = _nothing(dtype or tensors.dtype, place)
    if type(layer) is DynamicLayer:
        vars(layer).update(_begun_with(like.dtype, place))
    else:
        layer.lazy_initialization(like, like)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = seen
    moved, (room, own) = partial(_moved, place=place, dtype=like.dtype), tensors.place(index)
    if arrivals is None:
        layer.keys, layer.values = map(moved, room.layer(own))
        return
    stays = (tensors.dtype, tensors.memory) == (like.dtype, place)
    wait = partial(arrivals.wait, tensors.group(index))
    expect(layer, Coming(room, own, wait, moved, stays))


@lru_cache
def _nothing(dtype: torch.dtype, place: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=place)


@lru_cache
def _begun_with(dtype: torch.dtype, place: torch.device) -> dict[str, Any]:
    """What ``lazy_initialization`` gives a plain layer, which makes tensors each time."""
    like, layer = _nothing(dtype, place), DynamicLayer()  # type: ignore[no-untyped-call]
    before = dict(vars(layer))
    layer.lazy_initialization(like, like)
    return {k: x for k, x in vars(layer).items() if k not in before or x is not before[k]}


def _moved(x: Tensor, *, place: torch.device, dtype: torch.dtype) -> Tensor:
    """``UnsupportedError`` if a type has no room for some values: they would become infinite."""
    if x.dtype == dtype and x.device == place:
        return x
    most = torch.finfo(dtype).max
    if most < torch.finfo(x.dtype).max:
        own = x.float() if x.itemsize == 1 else x  # PyTorch does not compare fp8
        if bool((own.isfinite() & (own.abs() > most)).any()):
            raise UnsupportedError(
                f"the cache has values beyond {most:g}, the largest of {dtype}: choose another "
                "dtype"
            )
    return x.to(place, dtype)


def _some_tokens(x: Tensor, slots: NDArray[np.int64], there: bool) -> Tensor:
    """Some tokens of a layer [heads, tokens, dim]: a view if possible, else a copy.

    On the device of ``x`` if ``there``, else on the host.
    """
    if slots[-1] - slots[0] + 1 == len(slots):
        x = x[:, slots[0] : slots[-1] + 1]
    else:
        x = x[:, torch.from_numpy(slots).to(x.device)]
    return x.detach() if there else x.detach().cpu()


def _check_cache(
    cache: DynamicCache, geometry: Geometry, sequence: int | None
) -> tuple[dict[int, Any], int, int]:
    """The layers that can be encoded, how many tokens they have seen, and the sequence."""
    if type(cache) is not DynamicCache:
        raise UnsupportedError(f"found a {type(cache).__name__}; {SUPPORTED_CACHES}")
    if cache.offloading:
        raise UnsupportedError(f"found an offloaded DynamicCache; {SUPPORTED_CACHES}")
    layers = {n: x for n, x in attention_layers(cache, "the cache").items() if x.is_initialized}
    seen: int = max((layer.get_seq_length() for layer in layers.values()), default=0)
    if seen == 0:
        raise ValueError("the cache holds no tokens")
    expected = {number for section in geometry.sections for number in section.layers}
    if layers.keys() != expected:
        raise CalibrationMismatchError(
            f"the cache has layers {sorted(layers)}, the calibration is for {sorted(expected)}"
        )
    batch = layers[min(layers)].keys.shape[0]
    if sequence is None and batch != 1:
        raise UnsupportedError(
            f"the cache holds {batch} sequences, a stream is of one: say which with sequence=, and "
            f"pass its attention_mask if it is padded"
        )
    if not 0 <= (sequence or 0) < batch:
        raise ValueError(f"sequence must be from 0 to {batch - 1}, found {sequence}")
    for section in geometry.sections:
        held = layers[section.layers[0]].keys.shape[2]
        wanted = (
            [batch, section.kv_heads, held, section.k_dim],
            [batch, section.kv_heads, held, section.v_dim],
            seen,
        )
        for number in section.layers:
            layer = layers[number]
            found = (list(layer.keys.shape), list(layer.values.shape), layer.get_seq_length())
            if found != wanted:
                raise CalibrationMismatchError(
                    f"layer {number} of the cache has K {found[0]} and V {found[1]} after "
                    f"{found[2]} tokens, the calibration is for {wanted[0]} and {wanted[1]}, "
                    f"and other layers have seen {seen} tokens"
                )
    return layers, seen, sequence or 0


def _kept(
    attention_mask: TokenIds | None, layers: Mapping[int, Any], seen: int, sequence: int
) -> NDArray[np.bool_]:
    """Which of the tokens that a cache has seen are none of padding."""
    if attention_mask is None:
        return np.ones(seen, np.bool_)
    mask = attention_mask.cpu() if isinstance(attention_mask, Tensor) else attention_mask
    array = np.asarray(mask)
    if array.ndim == 2:
        batch = layers[min(layers)].keys.shape[0]
        if len(array) != batch:
            # The first row of a larger batch is that of another prompt.
            raise ValueError(
                f"attention_mask must have a row for each of the cache's batch of {batch} "
                f"sequence{'s' * (batch > 1)}, found {list(array.shape)}: pass the mask of the "
                f"batch, or the row [tokens] of the sequence"
            )
        array = array[sequence]
    if array.shape != (seen,) or not np.isin(array, (0, 1)).all() or not array.any():
        raise ValueError(
            f"attention_mask must be 0 or 1 for each of the {seen} tokens that the cache has seen, "
            f"and 1 for some, found {list(np.shape(mask))}"
        )
    return array.astype(np.bool_)


def _kept_ids(token_ids: TokenIds, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    ids = as_ids(token_ids)
    if len(ids) == len(kept):
        return ids[kept]
    if len(ids) != kept.sum():
        raise ValueError(
            f"the cache holds {kept.sum()} tokens, found {len(ids)} token_ids: pass the ids of the "
            f"cached tokens"
        )
    return ids


def _given_positions(positions: TokenIds | None, tokens: int) -> NDArray[np.int64]:
    if positions is None:
        return np.arange(tokens)
    where = as_ids(positions, "positions")
    if len(where) != tokens or where[0] < 0 or (np.diff(where) < 1).any():
        raise ValueError(
            f"positions must rise, and be as many as the {tokens} tokens to write, found "
            f"{len(where)}: {where[:4].tolist()} …"
        )
    return where


def _check_prompt(
    model: PreTrainedModel,
    layers: Mapping[int, Any],
    sequence: int,
    kept: NDArray[np.bool_],
    ids: NDArray[np.int64],
    where: NDArray[np.int64],
) -> None:
    """Whether the first layer's keys are of these tokens at these positions, by a few of them."""
    number = min(layers)
    held = layers[number].keys.shape[2]
    slots = np.flatnonzero(kept[-held:])
    words = np.flatnonzero(~np.isin(ids[-len(slots) :], list(placeholders(model))))
    chosen = words[np.linspace(0, len(words) - 1, min(len(words), _CHECKED)).astype(np.int64)]
    tokens, positions = (x[-len(slots) :][chosen] for x in (ids, where))
    if not len(chosen):
        return
    check_vocabulary(model, ids[words])
    keys = layers[number].keys.detach()[sequence][:, slots[chosen]].float()
    errors = key_errors(model, number, tokens, keys, positions)
    if errors is None or (errors.diagonal() <= _ROUNDING).all():
        return
    own = np.nan_to_num(errors.diagonal(), nan=np.inf)
    # Of a cache that nothing was lost of, one token tells; what is no number tells nothing.
    exact = 2 * (own <= _ROUNDING).sum() >= len(own)
    others = exact and ((own > _ANOTHER) & np.isfinite(own)).any()
    others = others or 2 * (own > _ANOTHER).sum() >= len(own)
    differ = np.flatnonzero(own > _ROUNDING)
    differ = differ[np.linspace(0, len(differ) - 1, min(len(differ), _SOUGHT)).astype(np.int64)]
    own, tokens, positions, keys = own[differ], tokens[differ], positions[differ], keys[:, differ]
    # What was left out or evicted may have stood anywhere before or between.
    candidates = np.arange(min(4 * int(positions[-1]) + 1024, _CANDIDATES))
    errors = key_errors(model, number, tokens, keys, candidates)
    assert errors is not None
    errors = np.nan_to_num(errors, nan=np.inf)
    best = errors.min(axis=1)
    # A restored cache has lost something, but no other position explains its keys better, and none
    # exactly.
    elsewhere = (best < own / 2).sum()
    exactly = ((own > 4 * _ROUNDING) & (best <= _ROUNDING)).any()
    if others or exactly or 4 * elsewhere >= _SOUGHT:
        raise CalibrationMismatchError(
            f"the keys of layer {number} are not those of token_ids at positions "
            f"{positions.tolist()} (relative errors {own.round(2).tolist()}); the likeliest are "
            f"{errors.argmin(axis=1).tolist()} (errors {best.round(2).tolist()}): pass the ids "
            f"that the model has read, attention_mask if it read padding, and positions if tokens "
            f"were evicted"
        )


def _seekable(source: Source) -> Any:
    """What is not, as a pipe, is read to its end."""
    read = getattr(source, "read", None)
    if read is None or isinstance(source, str | os.PathLike) or source.seekable():  # type: ignore[union-attr]
        return source
    return read()


#: Per decoder, the text of its configuration, and the cache that transformers makes for it: that
#: takes a millisecond.
_empty: WeakKeyDictionary[PreTrainedModel, tuple[str, DynamicCache]] = WeakKeyDictionary()


def _empty_cache(model: PreTrainedModel | None, sections: Sequence[Section]) -> DynamicCache:
    """With the layers that a model's configuration asks for, or plain ones."""
    if model is not None:
        decoder = decoder_of(model)
        text = config_text(decoder.config)
        if (known := _empty.get(decoder)) is None or known[0] != text:
            known = _empty[decoder] = text, DynamicCache(config=decoder.config)
        cache = _copied(known[1])
        cache.layers = list(map(_copied, cache.layers))
        return cache
    cache = DynamicCache()
    held = {number for section in sections for number in section.layers}
    cache.layers.extend(
        DynamicLayer() if n in held else DummyLayer()  # type: ignore[no-untyped-call]
        for n in range(max(held) + 1)
    )
    return cache


def _copied(x: T) -> T:
    """``copy.copy`` of a plain object, at a third of its time."""
    found = object.__new__(type(x))
    vars(found).update(vars(x))
    return found


def _needed(layer: Any, tokens: int) -> int:
    """How many of the tokens that a cache has seen a layer must hold to go on."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        # The next token completes the window.
        return max(min(layer.sliding_window - 1, tokens), 1)
    return tokens


def _cache_positions(
    sections: Sequence[Section], held: Sequence[NDArray[np.int64]], layers: Mapping[int, Any]
) -> NDArray[np.int64]:
    """Positions, int64, of all tokens that a cache of the stream's sections has seen.

    Each section holds the latest tokens. If all of them slide, the earlier tokens are known only if
    positions have no gaps. ``UnsupportedError`` if sections do not end at the same token.
    """
    positions = max(held, key=len)
    if not len(positions):
        raise UnsupportedError(
            "the stream holds no tokens: there is nothing to go on from, begin with a new cache"
        )
    if any(not len(x) or not np.array_equal(x, positions[-len(x) :]) for x in held):
        spans = [(int(x[0]), int(x[-1])) if len(x) else () for x in held]
        raise UnsupportedError(
            f"the sections hold tokens {spans}, expected all to end at the same one: "
            f"read the stream with kvtc_stream.open"
        )
    sliding = all(isinstance(layers[s.layers[0]], DynamicSlidingWindowLayer) for s in sections)
    if sliding and positions[-1] - positions[0] + 1 == len(positions):
        positions = np.arange(positions[-1] + 1)
    for section, own in zip(sections, held, strict=True):
        layer = layers[section.layers[0]]
        needed = _needed(layer, len(positions))
        if len(own) < needed:
            lacking = (
                f"the stream holds the tokens from {own[0]} to {own[-1]} of layer "
                f"{section.layers[0]}, which needs those from {positions[-needed]} on"
            )
            if isinstance(layer, DynamicSlidingWindowLayer):
                raise UnsupportedError(
                    f"{lacking} for its window of {layer.sliding_window}: they had left the cache "
                    f"when it was written. To cut streams back, write a cache that keeps them: "
                    f"DynamicCache() without a configuration"
                )
            raise UnsupportedError(f"{lacking}: pass model=, which knows whether it has a window")
    return positions


def _check_tokens(ids: NDArray[np.int64], total: int, recorded: bytes) -> None:
    if len(ids) < total:
        raise CalibrationMismatchError(
            f"the cache is of {total} tokens, found only {len(ids)} token_ids: pass the prompt "
            f"that begins with them"
        )
    digest = token_digest(ids[:total])
    if recorded and digest != recorded:
        raise CalibrationMismatchError(
            f"the first {total} token_ids have digest {digest.hex()[:16]}…, the stream's tokens "
            f"have {recorded.hex()[:16]}…: this is the cache of another prompt"
        )
