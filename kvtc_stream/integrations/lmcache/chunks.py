"""Chunks of LMCache: where K and V lie in them, whose they are, and their codecs.

Nothing here imports LMCache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvtc_stream.errors import UnsupportedError
from kvtc_stream.integrations.hosts.layouts import LMCACHE_LAYOUTS, VLLM_LAYOUTS, kv_views
from kvtc_stream.integrations.hosts.pages import (
    HostPages,
    PageCounts,
    check_shape,
    loaded_calibration,
    torch_label,
)
from kvtc_stream.integrations.lmcache.settings import ChunkSettings

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.memory_management import MemoryObj

_CPU_LAYOUT = VLLM_LAYOUTS[1]


class Chunks:
    """The codecs of chunks, one for each of their sizes and element types.

    Raises
    ------
    UnsupportedError
        The calibration has several kinds of layers.
    """

    def __init__(self, settings: ChunkSettings) -> None:
        self.settings = settings
        self._calibration = loaded_calibration(settings)
        self._section = self._calibration.geometry.sections[0]
        self._pages: dict[tuple[int, str], HostPages] = {}
        self._lock = threading.Lock()

    @property
    def kinds(self) -> tuple[HostPages, ...]:
        """The codecs that were needed until now."""
        return tuple(self._pages.values())

    @property
    def counts(self) -> PageCounts:
        """What became of chunks until now."""
        found = PageCounts()
        for pages in self.kinds:
            own = vars(pages.counts)
            found = replace(found, **{n: getattr(found, n) + x for n, x in own.items()})
        return found

    def pages(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> HostPages:
        """The codec of chunks whose tensors have these shapes and element types.

        Raises
        ------
        UnsupportedError
            A chunk has several tensors, or one that holds no K and V of tokens.
        """
        if len(shapes) != 1 or len(shapes[0]) < 3:
            raise UnsupportedError(
                f"a chunk has tensors of shapes {[list(shape) for shape in shapes]}; expected one, "
                f"of 3 or 4 axes, with K and V of one kind of layers. KvtcAdapter codes chunks "
                f"itself: leave out its serde"
            )
        kind = int(shapes[0][-2]), torch_label(dtypes[0])
        with self._lock:
            if kind not in self._pages:
                block = self.settings.cpu_block_tokens
                self._pages[kind] = HostPages(
                    self.settings,
                    self._calibration,
                    dtype=kind[1],
                    tokens=kind[0],
                    most=self.settings.max_tokens,
                    # A chunk that was read without them is another.
                    facts={"host": "lmcache"} | ({} if block is None else {"cpu block": block}),
                )
            return self._pages[kind]

    def pages_of(self, obj: MemoryObj) -> HostPages:
        """The codec of a chunk."""
        return self.pages(obj.get_shapes(), obj.get_dtypes())

    def read(self, obj: MemoryObj) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [layers, kv_heads, tokens, head_dim] of a chunk; views of its memory, but of a
        chunk of vLLM's CPU backend."""
        k, v = self._views(obj)
        block = self.settings.cpu_block_tokens
        return (k, v) if block is None else CPUBlocks(obj.tensor, block, k.shape).read()

    def writer(self, obj: MemoryObj) -> Callable[[str, Any], None]:
        """What writes a page, by the name that it is sealed as, into a chunk, which is as it was if
        the page is refused."""
        pages, block = self.pages_of(obj), self.settings.cpu_block_tokens
        k, v = self._views(obj)
        if block is None:
            return lambda name, page: pages.decode(name, page, k, v)
        blocks = CPUBlocks(obj.tensor, block, k.shape)

        def write(name: str, page: Any) -> None:
            parts = torch.empty_like(k, memory_format=torch.contiguous_format), torch.empty_like(v)
            pages.decode(name, page, *parts)
            blocks.write(*parts)

        return write

    def _views(self, obj: MemoryObj) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = obj.tensor
        assert tensor is not None
        section = self._section
        sizes = {"kv_heads": section.kv_heads, "head_dim": section.k_dim}
        k, v = kv_views(tensor, LMCACHE_LAYOUTS, tokens=tensor.shape[-2], **sizes)
        check_shape(section, {"layers": k.shape[0]}, "the chunk")
        return k, v


class CPUBlocks:
    """A chunk of vLLM's CPU backend, [layers, tokens, heads × 2 head_dim] as LMCache copies it.

    The backend keeps K of a block and head transposed, and V behind it, where others keep K and V
    of a token side by side. LMCache takes it for that and cuts it into rows.

    Parameters
    ----------
    tensor
        Of the chunk.
    block
        Tokens of vLLM's blocks.
    shape
        Of K: [layers, kv_heads, tokens, head_dim].
    """

    def __init__(self, tensor: torch.Tensor, block: int, shape: Sequence[int]) -> None:
        layers, heads, tokens, dim = shape
        if tensor.ndim != 3 or tokens % block:
            raise UnsupportedError(
                f"a chunk of shape {list(tensor.shape)} is none of vLLM's CPU backend with blocks "
                f"of {block} tokens: cpu_block_tokens is for that backend alone"
            )
        self._shape, self._sizes = tuple(shape), {"H": heads, "N": block, "D": dim}
        rows = tensor.view(layers, tokens // block, block, heads, 2 * dim)
        self._blocks = rows.permute(0, 1, 3, 2, 4)  # each [N, 2 D], rows apart

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of K and V [layers, kv_heads, tokens, head_dim]."""
        k, v = self._parts(self._blocks.contiguous())
        return k.reshape(self._shape), v.reshape(self._shape)

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K and V [layers, kv_heads, tokens, head_dim] into the chunk."""
        dense = torch.empty_like(self._blocks, memory_format=torch.contiguous_format)
        for part, x in zip(self._parts(dense), (k, v), strict=True):
            part.copy_(x.reshape(part.shape))
        self._blocks.copy_(dense)

    def _parts(self, dense: torch.Tensor) -> list[torch.Tensor]:
        """K and V [layers, kv_heads, blocks, tokens, head_dim] in dense blocks."""
        layers, count, heads = dense.shape[:3]
        own = _CPU_LAYOUT.views(dense.view(layers * count, heads, -1), self._sizes)
        return [x.unflatten(0, (layers, count)).transpose(1, 2) for x in own]


def chunk_name(pages: HostPages, key: ObjectKey) -> str:
    """What a chunk is sealed, and stored, as: a digest of all that LMCache tells it by (model, rank
    among parallel ones, group of layers, hash, tenant) and of all that ``pages`` depends on."""
    own = "@".join(
        (
            key.model_name,
            f"{key.kv_rank:x}",
            f"{key.object_group_id:x}",
            key.chunk_hash.hex(),
            key.cache_salt,
        )
    )
    return pages.namespace.page(own.encode(), 0).name
