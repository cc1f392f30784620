"""Pages: tokens coded by themselves, one opaque object each, for stores of cache pages."""

from __future__ import annotations

import contextlib
import hmac
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.backends.base import SectionCoder
from kvtc_stream.backends.select import get_backend
from kvtc_stream.coding.page_sums import PageBytes, page_sums
from kvtc_stream.errors import KVTCError, UnsupportedError
from kvtc_stream.formats import Block, BlockTable, DType, Limits, Role, Rope, StreamHeader
from kvtc_stream.formats.block_run import each_block
from kvtc_stream.formats.page import (
    PAGE_OVERHEAD,
    SEAL_SIZE,
    outline,
    own_bytes,
    pack_page,
    seal_prefix,
    unpack_page,
)
from kvtc_stream.formats.page_table import read_pages
from kvtc_stream.io.dlpack import (
    KVArray,
    as_kv_array,
    check_positions,
    check_writable,
    layer_list,
)
from kvtc_stream.io.steps import run
from kvtc_stream.planning.rate_control import (
    Controls,
    FittingControl,
    IndependentControl,
    SectionControl,
)
from kvtc_stream.stream.codec import Codec, expect_codec
from kvtc_stream.stream.decoder import KVBlock
from kvtc_stream.stream.encoder import check_range, check_scaled, page_header
from kvtc_stream.stream.pending import verbatim_block

#: How often a page is coded because the estimate of its size was too low: with other tables, if it
#: is of restored tokens, and then with coarser steps.
_ATTEMPTS = 25
#: No slots.
_NONE = np.empty(0, np.int64)
#: Maximum bytes of a block's record without positions, payload and verbatim values.
_BLOCK_BYTES = 80


class _Seal(TypedDict):
    """Arguments of :func:`pack_page` and :func:`unpack_page`."""

    key: bytes | None
    identity: bytes


class PageCodec:
    """Codes pages of a cache: opaque bytes that stand alone, given the codec.

    A page has no sinks and no window, and what is in it depends on its own tokens only: equal
    tokens at equal positions give equal bytes. Pages can be decoded layer by layer. A target of
    the codec holds for every page by itself. Safe to share between threads, which take turns.

    Parameters
    ----------
    codec
        How to code; ``block_tokens`` is the most a page holds, ``sinks`` and ``window`` do not
        matter.
    dtype
        Element type of the cache, e.g. ``"bfloat16"``.
    section
        Which section of the geometry the pages are of.
    max_bytes
        The fixed-rate mode: no page is larger, and within that every page is as close to the
        cache as steps allow (with preset ``paper`` there is nothing to adapt). Tokens that must be
        verbatim, or a size that is too small, may make it impossible: then :meth:`encode` raises,
        and :meth:`encode_raw` is the way out. Not with a codec that has ``error_bound``.
    rope, k_scale, v_scale
        As for :class:`kvtc_stream.Encoder`.
    limits
        What to refuse in pages.
    key
        Pages are sealed with this secret, each as the one that ``identity`` names, and only such
        pages are decoded: so nobody without the key can make or change one, and none can take the
        place of another, not even of one with the same key. 32 bytes more in each.

    Examples
    --------
    >>> import kvtc_stream as kvtc
    >>> calibration = kvtc.testing.tiny_calibration()
    >>> k, v = kvtc.testing.drawn_cache(calibration.geometry, tokens=64)
    >>> pages = kvtc.PageCodec(kvtc.Codec(calibration, ratio=4, block_tokens=64), dtype="float32")
    >>> page = pages.encode(k, v, positions=1024)
    >>> len(page) <= pages.max_encoded_size(64)
    True
    >>> pages.decode(page)[0].shape
    (2, 2, 64, 8)
    """

    def __init__(
        self,
        codec: Codec,
        *,
        dtype: str,
        section: int = 0,
        max_bytes: int | None = None,
        rope: Sequence[Rope | None] | Rope | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        limits: Limits | None = None,
        key: bytes | None = None,
    ) -> None:
        if dtype not in (d.label for d in DType):
            raise ValueError(f"dtype must be one of {', '.join(d.label for d in DType)}")
        expect_codec(codec)
        sections = len(codec.calibration.geometry.sections)
        if not 0 <= section < sections:
            raise ValueError(f"section must be from 0 to {sections - 1}, found {section}")
        if max_bytes is not None and codec.error_bound is not None:
            raise ValueError("error_bound stores tokens verbatim, which no fixed size allows")
        if k_scale is not None or v_scale is not None:
            check_scaled(DType[dtype.upper()])
        if key is not None and not (isinstance(key, bytes) and key):
            found = "an empty one" if isinstance(key, bytes) else type(key).__name__
            raise ValueError(f"key must be a secret of some bytes, found {found}")
        self._codec, self._limits, self._key = codec, limits, key
        self._overhead = PAGE_OVERHEAD + _BLOCK_BYTES + (0 if key is None else SEAL_SIZE)
        self._options = DType[dtype.upper()], rope, k_scale, v_scale
        self._section, self._max_bytes = section, max_bytes
        self._fitting: FittingControl | None = None
        self._backend = get_backend(codec.backend)
        self._lock = threading.RLock()

    @property
    def codec(self) -> Codec:
        """How pages are coded."""
        return self._codec

    @cached_property
    def _header(self) -> StreamHeader:
        return page_header(self._codec, *self._options)

    @cached_property
    def _coder(self) -> SectionCoder:
        codec = self._codec
        control: SectionControl | None = None
        if self._max_bytes is not None and codec.plan.sections[self._section].uniform:
            control = self._fitting = FittingControl(self._header, self._section)
        elif codec.adapts is not None:
            control = IndependentControl(codec.adapts, self._header, self._section)
        return self._backend.section_coder(
            self._header,
            self._section,
            codec.calibration,
            error_bound=codec.bounds[0],
            layer_error_bound=codec.bounds[1],
            measure=codec.measure,
            target=None if control is None else _Only(control),
        )

    def raw_size(self, tokens: int) -> int:
        """The most bytes that :meth:`encode_raw` gives for so many tokens."""
        listed = 8 * max(tokens - 1, 0)
        values = self._header.verbatim_size(self._section, tokens)
        return self._overhead + listed + values

    def max_encoded_size(self, tokens: int) -> int:
        """The most bytes that :meth:`encode` gives for so many tokens; from the layout alone."""
        raw = self.raw_size(tokens)
        return raw if self._max_bytes is None else min(raw, self._max_bytes)

    def encode(self, k: Any, v: Any, *, positions: Any, identity: bytes | None = None) -> bytes:
        """A page of some tokens.

        Parameters
        ----------
        k, v
            As :meth:`kvtc_stream.Encoder.encode` takes them, 1 to ``block_tokens`` tokens.
        positions
            Of the first token if they are contiguous, or int64 [tokens].
        identity
            With ``key``: what the page is sealed as, such as the key that the store has for it.
            :meth:`decode` must be given the same bytes; they are not in the page.

        Raises
        ------
        UnsupportedError
            The tokens do not fit ``max_bytes``.
        """
        return self._page(self._chunk(self._layers(k, v), positions), self._seal(identity))

    def encode_many(
        self,
        k: Any,
        v: Any,
        *,
        positions: Sequence[int],
        identities: Sequence[bytes] | None = None,
    ) -> list[bytes]:
        """Pages of ``block_tokens`` tokens each, on a CUDA device in the same launches.

        As :meth:`encode` of each, but for what a device rounds otherwise.

        Parameters
        ----------
        k, v
            The tokens of all pages, one page after the other.
        positions
            Of the first token of each page; its others follow.
        identities
            With ``key``: what each page is sealed as.
        """
        size = self._header.block_tokens
        names = [None] * len(positions) if identities is None else list(identities)
        seals = [self._seal(name) for name in names]
        k_layers, v_layers = values = self._layers(k, v)
        counts = {int(x.shape[1]) for x in (*k_layers, *v_layers)}
        if counts != {size * len(positions)} or len(seals) != len(positions):
            raise ValueError(
                f"{len(positions)} pages of {size} tokens have {size * len(positions)}, found "
                f"{', '.join(map(str, sorted(counts)))}, and {len(seals)} identities"
            )
        source = None if self._max_bytes is not None else self._coder.source(*values)
        if source is None:
            parts = [slice(i * size, (i + 1) * size) for i in range(len(positions))]
            chunks = [
                self._chunk(([x[:, own] for x in k_layers], [x[:, own] for x in v_layers]), first)
                for own, first in zip(parts, positions, strict=True)
            ]
            return list(map(self._page, chunks, seals))
        own_positions = np.add.outer(np.array(positions, np.int64), np.arange(size)).reshape(-1)
        with self._lock:
            whole = slice(0, len(own_positions))
            blocks = run(self._coder.encode_from(source, whole, own_positions, 0))
            self._coder.arrived()
        return [
            pack_page(replace(block, start=0), self._header, **seal)
            for block, seal in zip(each_block(blocks), seals, strict=True)
        ]

    def encode_raw(self, k: Any, v: Any, *, positions: Any, identity: bytes | None = None) -> bytes:
        """A page whose tokens are all verbatim: bit-exact, at most :meth:`raw_size` bytes."""
        return self._raw(self._chunk(self._layers(k, v), positions), self._seal(identity))

    def decode(
        self,
        page: bytes | bytearray | memoryview,
        layers: slice | None = None,
        *,
        identity: bytes | None = None,
    ) -> tuple[KVArray, KVArray]:
        """K and V [layers, kv_heads, tokens, head_dim] of a page, of all layers or a slice of them.

        Bytes behind the page are ignored.

        Raises
        ------
        FormatError
            The bytes are no page, or were changed.
        CalibrationMismatchError
            The page was made with another codec.
        AuthenticationError
            With ``key``: the page was not sealed with it, or as another page than ``identity``.
        """
        block = self.block(page, layers, identity=identity)
        return block.k, block.v

    def block(
        self,
        page: bytes | bytearray | memoryview,
        layers: slice | None = None,
        *,
        identity: bytes | None = None,
    ) -> KVBlock:
        """As :meth:`decode`, with the positions of the tokens and the errors recorded."""
        block = self._unpack(page, identity)
        count = len(self._header.geometry.sections[self._section].layers)
        with self._lock:
            k, v = self._coder.decode(block, range(count)[layers or slice(None)])
        positions = np.array(block.positions, np.int64)
        return KVBlock(block.section, block.role, block.start, positions, k, v, block.errors)

    def checked(
        self, page: bytes | bytearray | memoryview, *, identity: bytes | None = None
    ) -> Block:
        """The block of a page that is whole and this one, for :meth:`decode_into`.

        Raises as :meth:`decode`. Threads take no turns here.
        """
        return self._unpack(page, identity)

    def checked_many(
        self,
        pages: Sequence[bytes | bytearray | memoryview],
        *,
        identities: Sequence[bytes] | None = None,
    ) -> tuple[BlockTable, KVTCError | None]:
        """:meth:`checked` of many pages, for :meth:`decode_into`: the blocks up to the first page
        that is not whole or another, and what is wrong with that one, ``None`` if all are good.

        Python's lock is held for some microseconds a page, not for each step of each: checksums and
        seals are computed without it, of large pages on several threads.
        """
        names = [None] * len(pages) if identities is None else list(identities)
        seals = [self._seal(name) for name in names]
        own = [own_bytes(page) for page in pages]
        if len(names) != len(own):
            raise ValueError(f"{len(own)} pages need as many identities, found {len(names)}")
        proven = self._proven(own, seals)

        def parse(row: int) -> Block:
            return self._unpack(own[row], names[row], proven=proven[row])

        limits = self._limits or Limits()
        return read_pages(own, proven, self._section, self._header, limits, parse)

    def _proven(self, pages: Sequence[bytes], seals: Sequence[_Seal]) -> list[bool]:
        """Of which pages checksum and seal are right; of others nothing is known."""
        found = [outline(page, sealed=self._key is not None) for page in pages]
        there = [i for i, x in enumerate(found) if x is not None]
        outlines = [x for x in found if x is not None]
        sealed_bytes = [
            PageBytes(
                pages[i], x.begin, x.size, x.seed, x.sealed, seal_prefix(seals[i]["identity"])
            )
            for i, x in zip(there, outlines, strict=True)
        ]
        checksums, computed = page_sums(sealed_bytes, self._key)
        proven = [False] * len(pages)
        for i, x, checksum, seal in zip(there, outlines, checksums.tolist(), computed, strict=True):
            # Without a key there is no seal to compare.
            right = self._key is None or hmac.compare_digest(seal.tobytes(), x.seal)
            proven[i] = right and checksum == x.checksum
        return proven

    def decode_into(
        self,
        blocks: Sequence[Block] | BlockTable,
        slots: Sequence[NDArray[np.int64]],
        k: Any,
        v: Any,
    ) -> None:
        """Decode many pages at once, on a CUDA device in the same launches.

        Parameters
        ----------
        blocks
            Of pages, as :meth:`checked` or :meth:`checked_many` gives them.
        slots
            int64 [tokens] of each page: where its tokens go; -1 is nowhere.
        k, v
            What takes them: [layers, kv_heads, slots, head_dim] or a list of a tensor a layer, in
            the pages' ``out_dtype`` and the backend's memory; or what the backend made of a
            server's pages.

        Raises
        ------
        ValueError, TypeError, BufferError
            There are not as many slots as tokens, or not there; or the tensors are of another shape
            or type, or cannot be written.
        FormatError
            A page's payload cannot be what an encoder wrote; what is in the slots is undefined.
        """
        table = blocks if isinstance(blocks, BlockTable) else BlockTable.of(blocks)
        tokens, own = int(table.rows["tokens"].sum()), np.concatenate([_NONE, *slots])
        k, v = self._target(k, "k"), self._target(v, "v")
        room = min(_room(k), _room(v))
        if len(own) != tokens or (tokens and not (own.min() >= -1 and own.max() < room)):
            found = f" from {own.min()} to {own.max()}" if len(own) else ""
            raise ValueError(
                f"{len(table)} pages have {tokens} tokens, which take slots from -1 to {room - 1}, "
                f"found {len(own)}{found}"
            )
        with self._lock:
            for _ in self.decoding(table, own, k, v):
                pass

    def _target(self, x: Any, name: str) -> Any:
        """What takes K or V; arrays of the host as a list of a layer each."""
        own = x if isinstance(x, list | tuple) else [x]
        if self._backend.name != "cpu" or not all(isinstance(t, np.ndarray) for t in own):
            return x
        section = self._header.geometry.sections[self._section]
        dim = section.k_dim if name == "k" else section.v_dim
        arrays, dtype = layer_list(x, name, len(section.layers), section.kv_heads, dim)
        check_writable(arrays, name, dtype, self._header.out_dtype)
        return arrays

    def decoding(
        self, table: BlockTable, slots: NDArray[np.int64], k: Any, v: Any
    ) -> Iterator[None]:
        """:meth:`decode_into` in steps, for :meth:`kvtc_stream.backends.base.Backend.interleaving`;
        ``slots`` are those of all pages.

        Until it is done nobody else may decode: threads take no turns here.
        """
        layers = range(len(self._header.geometry.sections[self._section].layers))
        yield from self._coder.decoding(table, slots, layers, k, v)

    def layers(
        self, page: bytes | bytearray | memoryview, *, identity: bytes | None = None
    ) -> Iterator[tuple[KVArray, KVArray]]:
        """K and V [kv_heads, tokens, head_dim] of each layer, in order; each comes when asked for.

        The symbols are decoded once. The page is checked before this returns.
        """
        block = self._unpack(page, identity)
        with self._lock:
            decoded = self._coder.decode_layers(block)
        return self._in_turn(decoded)

    def _in_turn(
        self, decoded: Callable[[int], tuple[Any, Any]]
    ) -> Iterator[tuple[KVArray, KVArray]]:
        for layer in range(len(self._header.geometry.sections[self._section].layers)):
            with self._lock:
                k, v = decoded(layer)
            yield as_kv_array(k[0]), as_kv_array(v[0])

    def _seal(self, identity: bytes | None) -> _Seal:
        if identity is not None and not isinstance(identity, bytes):
            raise TypeError(f"identity must be bytes, found {type(identity).__name__}")
        if identity is not None and self._key is None:
            raise ValueError("identity is sealed with a key: make the PageCodec with key=")
        return {"key": self._key, "identity": identity or b""}

    def _unpack(
        self,
        page: bytes | bytearray | memoryview,
        identity: bytes | None,
        *,
        proven: bool = False,
    ) -> Block:
        block = unpack_page(page, self._header, self._limits, **self._seal(identity), proven=proven)
        if block.section != self._section:
            raise UnsupportedError(
                f"the page is of section {block.section}, expected {self._section}: decode it with "
                f"a PageCodec of that section"
            )
        return block

    def _layers(self, k: Any, v: Any) -> tuple[list[Any], list[Any]]:
        """The backend's arrays [kv_heads, tokens, head_dim] of each layer."""
        section = self._header.geometry.sections[self._section]
        layers, dtype = len(section.layers), self._header.dtype
        found = []
        for name, x, dim in (("k", k, section.k_dim), ("v", v, section.v_dim)):
            values, own = self._backend.layer_list(x, name, layers, section.kv_heads, dim)
            if own is not dtype:
                raise TypeError(f"{name} is {own.label}, expected {dtype.label}: cast it")
            found.append(values)
        check_range(self._codec, dtype, k=found[0], v=found[1])
        return found[0], found[1]

    def _chunk(
        self, layers: tuple[list[Any], list[Any]], positions: Any
    ) -> tuple[Any, Any, NDArray[np.int64]]:
        found = []
        for values in layers:
            whole = self._backend.empty((len(values), *values[0].shape), self._header.dtype)
            for layer, value in zip(whole, values, strict=True):
                layer[:] = value
            found.append(whole)
        tokens = found[0].shape[2]
        if found[1].shape[2] != tokens:
            raise ValueError(f"k has {tokens} tokens, v has {found[1].shape[2]}")
        if not 1 <= tokens <= self._header.block_tokens:
            raise ValueError(
                f"a page holds 1 to {self._header.block_tokens} tokens, found {tokens}"
            )
        if not isinstance(positions, bool) and hasattr(positions, "__index__"):
            with contextlib.suppress(TypeError):  # arrays of several have it too
                first = operator.index(positions)
                positions = [first + i for i in range(tokens)]
        return found[0], found[1], check_positions(positions, tokens, -1)

    def _page(self, chunk: tuple[Any, Any, NDArray[np.int64]], seal: _Seal) -> bytes:
        most = self.max_encoded_size(len(chunk[2]))
        with self._lock:
            page = self._code(chunk, most, seal)
        if page is None:
            page = self._raw(chunk, seal)
        if len(page) <= most:
            return page
        raise UnsupportedError(
            f"{len(chunk[2])} tokens do not fit the {most} bytes that are allowed: store them with "
            f"encode_raw (at most {self.raw_size(len(chunk[2]))} bytes), or allow more"
        )

    def _code(
        self, chunk: tuple[Any, Any, NDArray[np.int64]], most: int, seal: _Seal
    ) -> bytes | None:
        """The page, if it has at most ``most`` bytes."""
        coder, fitting = self._coder, self._fitting
        if fitting is not None:
            fitting.start(float(most - self._overhead))
        for _ in range(_ATTEMPTS if fitting is not None else 1):
            [block] = each_block(coder.encode(*chunk, 0))
            page = pack_page(block, self._header, **seal)
            if fitting is not None and not fitting.fits:
                if fitting.goes_on():
                    continue
                break
            if len(page) <= most:
                return page
            if fitting is not None:  # the estimate was too low, or some tokens are verbatim
                fitting.exceeded(len(page) - most)
        return None

    def _raw(self, chunk: tuple[Any, Any, NDArray[np.int64]], seal: _Seal) -> bytes:
        k, v, positions = chunk
        [coded] = self._backend.verbatim(self._header, [(k, v)])
        block = verbatim_block(self._section, Role.DATA, coded, positions, 0)
        return pack_page(block, self._header, **seal)


def _room(x: Any) -> int:
    """How many slots something that decoded tokens go to has."""
    of_layer = x if hasattr(x, "slots") else x[0]
    return int(of_layer.slots if hasattr(of_layer, "slots") else of_layer.shape[-2])


class _Only(Controls):
    """One section's control."""

    def __init__(self, control: SectionControl) -> None:
        self._control = control

    def control(self, header: StreamHeader, section: int) -> SectionControl:
        """See :class:`kvtc_stream.planning.rate_control.Controls`."""
        return self._control
