"""Pages of hosts that hand over all layers of some tokens at once, under names of their own."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.errors import CalibrationMismatchError, FormatError, UnsupportedError
from kvtc_stream.formats import Section
from kvtc_stream.integrations.hosts.keys import Namespace
from kvtc_stream.integrations.hosts.positions import PositionFinder
from kvtc_stream.integrations.hosts.settings import PageSettings
from kvtc_stream.stream.codec import Codec
from kvtc_stream.stream.pages import PageCodec

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PageCounts:
    """What became of pages.

    Attributes
    ----------
    coded, lossless
        Pages that were coded, and those that were kept bit for bit because nobody knew their
        position.
    cache_bytes, page_bytes
        What both took in the host's memory, and as pages.
    decoded, refused
        Pages that were given back, and those that were damaged or another's.
    """

    coded: int = 0
    lossless: int = 0
    cache_bytes: int = 0
    page_bytes: int = 0
    decoded: int = 0
    refused: int = 0


def loaded_calibration(settings: PageSettings) -> Calibration:
    """The calibration that settings name, of layers of one kind."""
    assert settings.calibration is not None
    calibration = Calibration.load(settings.calibration)
    sections = calibration.geometry.sections
    if len(sections) != 1 or sections[0].k_dim != sections[0].v_dim:
        raise UnsupportedError(
            f"{settings.calibration} has {len(sections)} kinds of layers, with "
            f"{sections[0].k_dim} channels of K and {sections[0].v_dim} of V; {settings.reader} "
            f"serves one kind, with as many of both"
        )
    return calibration


def check_shape(section: Section, found: Mapping[str, int], who: str) -> None:
    """Raise ``CalibrationMismatchError`` unless a host's pages are those of the calibration.

    ``found`` has ``layers``, ``kv_heads`` and ``head_dim``, or some of them.
    """
    expected = {
        "layers": len(section.layers),
        "kv_heads": section.kv_heads,
        "head_dim": section.k_dim,
    }
    differing = [
        f"{name} {size}, the calibration's are {expected[name]}"
        for name, size in found.items()
        if size != expected[name]
    ]
    if differing:
        raise CalibrationMismatchError(
            f"{who} has {'; '.join(differing)}: use the calibration of this model, and no tensor "
            f"or pipeline parallelism"
        )


class HostPages:
    """Codes a host's pages of one size. Safe to share between threads.

    Parameters
    ----------
    settings, calibration
        How pages are coded and sealed.
    dtype
        Of the cache, e.g. ``"bfloat16"``.
    tokens
        Of a page. Pages begin at multiples of it.
    most
        Pages whose position is to be found begin before this one.
    facts
        What pages depend on beside the calibration, the codec, the dtype and the host's own names
        for them, as JSON.
    """

    def __init__(
        self,
        settings: PageSettings,
        calibration: Calibration,
        *,
        dtype: str,
        tokens: int,
        most: int,
        facts: Mapping[str, Any],
    ) -> None:
        codec = Codec(calibration, block_tokens=tokens, backend="cpu", **settings.codec_options())
        key = settings.key(calibration.digest)
        # Two, so that no load waits for a page that is being stored.
        self._encoder, self._decoder = (PageCodec(codec, dtype=dtype, key=key) for _ in range(2))
        #: Codes pages that are not a prompt's first.
        self._others = self._encoder
        if settings.bounded == "first":
            self._others = PageCodec(replace(codec, error_bound=None), dtype=dtype, key=key)
        #: Pages that are bound otherwise are others, also where the host alone names them.
        self._kind = "" if settings.bounded == "all" else f" bounded: {settings.bounded}"
        # Whoever has another secret is not to find pages, only to delete them as refused.
        secret = {} if settings.key_file is None else {"key": hashlib.sha256(key).hexdigest()}
        self.namespace = Namespace(
            {
                **facts,
                **secret,
                "format": "1.1",
                "calibration": calibration.digest.hex(),
                "codec": settings.page_options(),
                "dtype": dtype,
                "page_tokens": tokens,
            }
        )
        self._finder = _finder(calibration, tokens, most)
        self._lock, self._counts = threading.Lock(), PageCounts()

    @property
    def counts(self) -> PageCounts:
        """What became of pages until now."""
        return self._counts

    def encode(self, name: str, k: Any, v: Any, position: int | None = None) -> bytes:
        """A page, sealed as ``name``.

        Parameters
        ----------
        name
            What it is stored as.
        k, v
            Views [layers, kv_heads, tokens, head_dim] of host memory.
        position
            Of its first token, if the host tells; otherwise it is looked for, and a page that does
            not tell it surely is kept bit for bit: what restores its keys needs no position.
        """
        identity = self._identity(name)
        position = self.find(k) if position is None else position
        if position is None:
            page = self._encoder.encode_raw(k, v, positions=0, identity=identity)
            _log.info("page %s does not tell its position: it is kept bit for bit", name)
        else:
            encoder = self._others if position else self._encoder
            page = encoder.encode(k, v, positions=position, identity=identity)
        whole = position is None
        size = k.nbytes + v.nbytes
        self._count(coded=not whole, lossless=whole, cache_bytes=size, page_bytes=len(page))
        return page

    def decode(self, name: str, page: Any, k: Any, v: Any, position: int | None = None) -> None:
        """Write a page into views of host memory; they are as they were if it is refused.

        Raises
        ------
        KVTCError
            The page is damaged, another's, or at another position than the host says.
        """
        from torch.utils.dlpack import from_dlpack

        try:
            block = self._decoder.block(page, identity=self._identity(name))
            own = int(block.positions[0])
            if position not in (None, own):
                raise FormatError(f"page {name} is at position {own}, expected {position}")
            if tuple(block.k.shape) != tuple(k.shape):
                raise FormatError(
                    f"page {name} has shape {tuple(block.k.shape)}, expected {tuple(k.shape)}"
                )
        except Exception:
            self._count(refused=1)
            raise
        k.copy_(from_dlpack(block.k))
        v.copy_(from_dlpack(block.v))
        self._count(decoded=1)

    def find(self, k: Any) -> int | None:
        """Where keys [layers, kv_heads, tokens, head_dim] begin, if they tell it surely."""
        if not isinstance(self._finder, PositionFinder):
            return self._finder
        found = self._finder.find(k)
        return found.position if found.sure else None

    def _identity(self, name: str) -> bytes:
        return (name + self._kind).encode()

    def _count(self, **added: int) -> None:
        with self._lock:
            own = self._counts
            self._counts = replace(own, **{n: getattr(own, n) + x for n, x in added.items()})


def _finder(calibration: Calibration, tokens: int, most: int) -> PositionFinder | int | None:
    """What finds positions; a position if any will do, and ``None`` if none can be found."""
    if set(calibration.geometry.sections[0].rope or (None,)) == {None}:
        return 0  # keys without RoPE are the same everywhere
    try:
        return PositionFinder(calibration, tokens, most)
    except UnsupportedError:
        return None


def torch_label(dtype: Any) -> str:
    """``torch.bfloat16`` as ``"bfloat16"``.

    Raises
    ------
    UnsupportedError
        The codec has no such elements.
    """
    label = str(dtype).rpartition(".")[2]
    if label not in ("bfloat16", "float16", "float32"):
        raise UnsupportedError(
            f"the KV cache is {label}; served are bfloat16, float16 and float32: pages are "
            f"compressed anyway, so leave the cache's type as the model has it"
        )
    return label
