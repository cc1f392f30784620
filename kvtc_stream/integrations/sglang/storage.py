"""The storage backend that SGLang makes, one in each worker."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from kvtc_stream.errors import KVTCError, UnsupportedError
from kvtc_stream.integrations.hosts.layouts import SGLANG_LAYOUTS, Layout
from kvtc_stream.integrations.hosts.pages import (
    HostPages,
    PageCounts,
    check_shape,
    loaded_calibration,
    torch_label,
)
from kvtc_stream.integrations.hosts.store import open_store
from kvtc_stream.integrations.sglang.settings import SGLANG_SETTINGS, StorageSettings

_log = logging.getLogger(__name__)
_LAYOUTS = {layout.name.removeprefix("SGLang "): layout for layout in SGLANG_LAYOUTS}
#: What SGLang's configuration may split a model over, and the size that is served.
_SIZES = ("tp_size", "pp_size", "attn_cp_size", "dcp_size")


class KvtcStorage(HiCacheStorage):  # type: ignore[misc]
    """Keeps pages of SGLang's host pool, compressed, in a store.

    SGLang makes it, from ``--hicache-storage-backend dynamic``; settings are in
    ``--hicache-storage-backend-extra-config``, see
    :class:`kvtc_stream.integrations.sglang.StorageSettings`. A page that is missing, damaged or
    another's is computed, and never an error of a request.

    Raises
    ------
    UnsupportedError
        The model, its cache or how it is split is not served; the message names what.
    CalibrationMismatchError
        The calibration is for another model.
    ValueError
        Settings are unknown, missing or wrong.
    """

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        given = storage_config.extra_config or {}
        own = {name: value for name, value in given.items() if name not in SGLANG_SETTINGS}
        settings = StorageSettings.read(own)
        found = [
            f"{name} is {size}"
            for name in _SIZES
            if (size := getattr(storage_config, name, 1) or 1) > 1
        ]
        if storage_config.is_mla_model:
            found.append("the model has multi-head latent attention")
        if storage_config.should_split_heads:
            found.append("tp_lcm_size splits pages by heads")
        if found:
            raise UnsupportedError(f"KvtcStorage does not serve this: {'; '.join(found)}")
        self._settings, self._model = settings, storage_config.model_name
        self._calibration = loaded_calibration(settings)
        assert settings.store is not None
        self._store = open_store(settings.store, settings.budget)
        self._pages: HostPages | None = None
        self._layout: Layout | None = None

    @property
    def counts(self) -> PageCounts:
        """What became of pages until now."""
        return PageCounts() if self._pages is None else self._pages.counts

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Learn how the host pool lays out pages, and make the codec.

        Raises
        ------
        UnsupportedError
            They are in a layout, or of an element type, that is not served.
        CalibrationMismatchError
            They are of another model than the calibration.
        """
        super().register_mem_pool_host(mem_pool_host)
        name = mem_pool_host.layout
        if name not in _LAYOUTS:
            raise UnsupportedError(
                f"pages of the host pool have layout {name!r}; served are {', '.join(_LAYOUTS)}: "
                f"choose one with --hicache-mem-layout"
            )
        section = self._calibration.geometry.sections[0]
        names = {"layers": "layer_num", "kv_heads": "head_num", "head_dim": "head_dim"}
        found = {ours: getattr(mem_pool_host, theirs) for ours, theirs in names.items()}
        check_shape(section, found, "the host pool")
        tokens = int(mem_pool_host.page_size)
        self._sizes = {"H": section.kv_heads, "N": tokens, "D": section.k_dim}
        self._layout = _LAYOUTS[name]
        self._pages = HostPages(
            self._settings,
            self._calibration,
            dtype=torch_label(mem_pool_host.dtype),
            tokens=tokens,
            most=self._settings.max_tokens,
            facts={"host": "sglang", "model": self._model},
        )

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refused: pools beside that of K and V are of hybrid models."""
        raise UnsupportedError(
            f"the model has a pool {host_pool_name}: KvtcStorage serves models whose layers all "
            f"keep K and V of every token"
        )

    # Pages by their places in the host pool: interface_v1.

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Store pages of the host pool; whether each is in the store now."""
        return [
            self._put(key, page, position)
            for key, page, position in self._places(keys, host_indices, extra_info)
        ]

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Load pages into the host pool; whether each is there now.

        Those after one that is missing are of no use, and are not loaded.
        """
        found = [False] * len(keys)
        for i, (key, page, position) in enumerate(self._places(keys, host_indices, extra_info)):
            if not self._get(key, page, position):
                break
            found[i] = True
        return found

    def _places(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any
    ) -> list[tuple[str, torch.Tensor, int | None]]:
        """Keys, pages in the host pool, and positions if SGLang tells those."""
        size = self.mem_pool_host.page_size
        prefix = getattr(extra_info, "prefix_keys", None)
        starts = host_indices[::size].tolist()
        return [
            (
                key,
                self.mem_pool_host.get_data_page(start, flat=False),
                None if prefix is None else (len(prefix) + i) * size,
            )
            for i, (key, start) in enumerate(zip(keys, starts, strict=True))
        ]

    # Pages as flat tensors: what SGLang does without interface_v1.

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Store a page, a flat tensor in the host pool's layout; whether it is in the store now."""
        return value is not None and self._put(key, self._shaped(value), None)

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """A page in ``target_location``, a flat tensor; ``None`` if there is none."""
        if target_location is None:
            target_location = self.mem_pool_host.get_dummy_flat_data_page()
        loaded = self._get(key, self._shaped(target_location), None)
        return target_location if loaded else None

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """As :meth:`set`, of several; whether all are in the store now."""
        stored = [self.set(key, value) for key, value in zip(keys, values or [], strict=True)]
        return all(stored)

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """As :meth:`get`, of several."""
        return [
            self.get(key, target)
            for key, target in zip(keys, target_locations or [None] * len(keys), strict=True)
        ]

    def exists(self, key: str) -> bool:
        """Whether the store has a page."""
        return self._store.exists(self._name(key))

    def clear(self) -> None:
        """Delete the pages of this model, calibration and codec; others stay."""
        if self._pages is not None:
            for entry in list(self._store.list(f"{self._pages.namespace.prefix}/")):
                self._store.delete(entry.name)

    def close(self) -> None:
        """Say what became of pages."""
        _log.info("%s", self.counts)

    def _name(self, key: str) -> str:
        """The name in the store of SGLang's key: a digest of the tokens and of all before them, of
        the adapter and of the tenant."""
        assert self._pages is not None
        return self._pages.namespace.page(key.encode(), 0).name

    def _shaped(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat page as the host pool lays it out."""
        assert self._layout is not None
        sizes = {**self._sizes, "2": 2, "B": 1, "L": self.mem_pool_host.layer_num}
        return flat.view([sizes[axis] for axis in self._layout.axes])

    def _views(self, page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [layers, kv_heads, tokens, head_dim] in the memory of a page."""
        assert self._layout is not None
        k, v = self._layout.views(page, self._sizes)
        return (k[0], v[0]) if "B" in self._layout.axes else (k, v)

    def _put(self, key: str, page: torch.Tensor, position: int | None) -> bool:
        assert self._pages is not None
        name = self._name(key)
        try:
            return self._store.exists(name) or self._store.put(
                name, self._pages.encode(name, *self._views(page), position)
            )
        except Exception:
            _log.exception("page %s is not stored", name)
            return False

    def _get(self, key: str, page: torch.Tensor, position: int | None) -> bool:
        assert self._pages is not None
        name = self._name(key)
        try:
            data = self._store.get(name)
            if data is None:
                return False
            self._pages.decode(name, data, *self._views(page), position)
        except KVTCError as error:
            _log.warning("page %s is of no use and is deleted: %s", name, error)
            self._store.delete(name)
            return False
        except Exception:
            _log.exception("page %s cannot be read", name)
            return False
        return True
