"""Chunks of LMCache as pages of one fixed size."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from kvtc_stream.integrations.lmcache.chunks import Chunks, chunk_name
from kvtc_stream.integrations.lmcache.settings import SerdeSettings

SERDE = "kvtc"
#: What a slot has beyond the ratio: some tokens are kept bit for bit, and pages have their seal.
_SLACK = 1.1


class KvtcSerializer(Serializer):  # type: ignore[misc]
    """Codes chunks.

    A chunk that does not fit its slot is not stored, nor are those that LMCache stores with it:
    one whose position cannot be found, which would have to be kept bit for bit.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Bytes that every chunk of this layout takes, all of which are stored."""
        settings = self._chunks.settings
        assert isinstance(settings, SerdeSettings)
        if settings.max_bytes is not None:
            return settings.max_bytes
        assert settings.ratio is not None
        sizes = (
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(layout_desc.shapes, layout_desc.dtypes, strict=True)
        )
        return math.ceil(int(sum(sizes)) * _SLACK / settings.ratio)

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Write a chunk as a page into the slot, and zeros behind it.

        Raises
        ------
        UnsupportedError
            It does not fit, or is in a layout that is not served.
        """
        pages = self._chunks.pages_of(src)
        page = pages.encode(chunk_name(pages, key), *self._chunks.read(src))
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
        name = chunk_name(self._chunks.pages_of(dst), key)
        self._chunks.writer(dst)(name, _bytes(src).numpy().data)


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
