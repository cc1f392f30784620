"""Chunks of LMCache as pages of one fixed size."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
from lmcache.v1.distributed.serde.base import Deserializer, Serializer
from lmcache.v1.distributed.serde.factory import (
    get_registered_serde_types,
    register_serde_factory,
)
from lmcache.v1.memory_management import MemoryObj

from kvtc_stream.errors import UnsupportedError
from kvtc_stream.integrations.hosts.layouts import LMCACHE_LAYOUTS, VLLM_LAYOUTS, kv_views
from kvtc_stream.integrations.hosts.pages import (
    HostPages,
    PageCounts,
    check_shape,
    loaded_calibration,
    torch_label,
)
from kvtc_stream.integrations.lmcache.settings import SerdeSettings

SERDE = "kvtc"
#: What a slot has beyond the ratio: some tokens are kept bit for bit, and pages have their seal.
_SLACK = 1.1
_CPU_LAYOUT = VLLM_LAYOUTS[1]


class Chunks:
    """The codecs of chunks, one for each of their sizes and element types.

    Raises
    ------
    UnsupportedError
        The calibration has several kinds of layers.
    """

    def __init__(self, settings: SerdeSettings) -> None:
        self.settings = settings
        self._calibration = loaded_calibration(settings)
        self._section = self._calibration.geometry.sections[0]
        self._pages: dict[tuple[int, str], HostPages] = {}
        self._lock = threading.Lock()

    @property
    def counts(self) -> PageCounts:
        """What became of chunks until now."""
        found = PageCounts()
        for pages in self._pages.values():
            own = vars(pages.counts)
            found = replace(found, **{n: getattr(found, n) + x for n, x in own.items()})
        return found

    def pages(self, tokens: int, dtype: str) -> HostPages:
        """Those of chunks of so many tokens."""
        kind = tokens, dtype
        with self._lock:
            if kind not in self._pages:
                self._pages[kind] = HostPages(
                    self.settings,
                    self._calibration,
                    dtype=dtype,
                    tokens=tokens,
                    most=self.settings.max_tokens,
                    facts={"host": "lmcache"},
                )
            return self._pages[kind]

    def read(self, obj: MemoryObj) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [layers, kv_heads, tokens, head_dim] of a chunk; views of its memory, but of a
        chunk of vLLM's CPU backend."""
        k, v = self._views(obj)
        block = self.settings.cpu_block_tokens
        return (k, v) if block is None else CPUBlocks(obj.tensor, block, k.shape).read()

    def write(self, obj: MemoryObj, key: ObjectKey, page: Any) -> None:
        """Write a page into a chunk."""
        k, v = self._views(obj)
        block, pages = self.settings.cpu_block_tokens, self.pages(k.shape[2], torch_label(k.dtype))
        if block is None:
            pages.decode(_name(key), page, k, v)
            return
        parts = torch.empty_like(k, memory_format=torch.contiguous_format), torch.empty_like(v)
        pages.decode(_name(key), page, *parts)
        CPUBlocks(obj.tensor, block, k.shape).write(*parts)

    def _views(self, obj: MemoryObj) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = obj.tensor
        if tensor is None or len(obj.get_shapes()) != 1:
            raise UnsupportedError(
                f"a chunk has {len(obj.get_shapes())} tensors; the serde kvtc serves chunks of one "
                f"kind of layers"
            )
        section = self._section
        sizes = {"kv_heads": section.kv_heads, "head_dim": section.k_dim}
        k, v = kv_views(tensor, LMCACHE_LAYOUTS, tokens=tensor.shape[-2], **sizes)
        check_shape(section, {"layers": k.shape[0]}, "the chunk")
        return k, v

    def slot(self, layout: MemoryLayoutDesc) -> int:
        """Bytes that every chunk of a layout takes."""
        if self.settings.max_bytes is not None:
            return self.settings.max_bytes
        assert self.settings.ratio is not None
        sizes = (
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
        )
        return math.ceil(int(sum(sizes)) * _SLACK / self.settings.ratio)


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


def _name(key: ObjectKey) -> str:
    """What a chunk is sealed as: all that LMCache tells it by, and its tenant."""
    return "@".join(
        (
            key.model_name,
            f"{key.kv_rank:x}",
            f"{key.object_group_id:x}",
            key.chunk_hash.hex(),
            key.cache_salt,
        )
    )


class KvtcSerializer(Serializer):  # type: ignore[misc]
    """Codes chunks.

    A chunk that does not fit its slot is not stored, nor are those that LMCache stores with it:
    one whose position cannot be found, which would have to be kept bit for bit.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Bytes that every chunk of this layout takes, all of which are stored."""
        return self._chunks.slot(layout_desc)

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Write a chunk as a page into the slot, and zeros behind it.

        Raises
        ------
        UnsupportedError
            It does not fit, or is in a layout that is not served.
        """
        k, v = self._chunks.read(src)
        page = self._chunks.pages(k.shape[2], torch_label(k.dtype)).encode(_name(key), k, v)
        slot = _bytes(dst)
        if len(page) > len(slot):
            raise UnsupportedError(
                f"chunk {key.chunk_hash.hex()} takes {len(page)} bytes and has {len(slot)}: it is "
                f"not stored; max_bytes of serde allows more, max_tokens says how long prompts are"
            )
        slot[: len(page)] = torch.frombuffer(bytearray(page), dtype=torch.uint8)
        slot[len(page) :] = 0
        return len(slot)


class KvtcDeserializer(Deserializer):  # type: ignore[misc]
    """Restores chunks; what is damaged or another's is refused, and LMCache misses it."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Write K and V of a page into a chunk.

        Raises
        ------
        KVTCError
            The page is damaged or another's; the chunk is as it was.
        """
        self._chunks.write(dst, key, _bytes(src).numpy().data)


def _bytes(obj: MemoryObj) -> torch.Tensor:
    tensor: torch.Tensor | None = obj.tensor
    assert tensor is not None
    return tensor.view(torch.uint8).flatten()


class KvtcPlugin(L2AdapterInterface):  # type: ignore[misc]
    """The L2 adapter that ``adapter_params`` name, one of LMCache's own.

    Naming this class in ``--l2-adapter`` imports this module, which is how LMCache comes to know
    the serde.
    """

    def __new__(cls, params: Mapping[str, Any], l1_memory_desc: Any = None) -> L2AdapterInterface:
        kind = params.get("type")
        if not isinstance(kind, str) or kind == "plugin":
            raise ValueError(
                f"adapter_params has type {kind!r}; name one of LMCache's own adapters, such as "
                f'{{"type": "fs", "base_path": "/var/cache/lmcache"}}'
            )
        return create_l2_adapter(
            get_l2_adapter_config_class(kind).from_dict(dict(params)), l1_memory_desc
        )


def _serde(options: dict[str, Any]) -> AsyncSerdeProcessor:
    settings = SerdeSettings.read(options)
    chunks = Chunks(settings)
    return AsyncSerdeProcessor(
        KvtcSerializer(chunks), KvtcDeserializer(chunks), max_workers=settings.max_workers
    )


if SERDE not in get_registered_serde_types():
    register_serde_factory(SERDE, _serde)
