"""A cache in the pages of a server's pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtc_stream.io.dlpack import numpy_dtype, on_cuda, to_numpy


@dataclass(frozen=True, eq=False)
class PagedCache:
    """Where one sequence's tokens are in pages that many share, as vLLM and SGLang hold them.

    Attributes
    ----------
    k, v
        A tensor [pages, page_size, kv_heads, head_dim] for each layer, or one of all layers.
    page_table
        The sequence's pages, in order.
    tokens
        How many tokens it has, from the first page on.
    """

    k: Any
    v: Any
    page_table: Sequence[int]
    tokens: int

    def slots(self) -> NDArray[np.int64]:
        """int64 [tokens]: page · page_size + place in the page, of every token."""
        page = int(self.k[0].shape[1])
        table = np.asarray(self.page_table)
        if len(table) and table.dtype.kind not in "iu":
            raise TypeError(f"the page table has {table.dtype}, expected integers")
        table = table.astype(np.int64)
        if not 0 <= self.tokens <= len(table) * page:
            raise ValueError(
                f"{len(table)} pages of {page} tokens hold {len(table) * page}, found "
                f"{self.tokens}: give a page table for all of them"
            )
        pages = int(self.k[0].shape[0])
        if len(table) and not (table.min() >= 0 and table.max() < pages):
            raise ValueError(f"the page table names page {table.max()} of {pages}")
        token = np.arange(self.tokens)
        return table[token // page] * page + token % page

    def contiguous(self, tokens: slice = slice(None)) -> tuple[list[Any], list[Any]]:
        """K and V of some tokens, of each layer, as [kv_heads, tokens, head_dim]; copies."""
        found = []
        slots = self.slots()[tokens]
        for pages in (self.k, self.v):
            layers = []
            for layer in pages:
                array = indexable(layer)
                rows = array.reshape(-1, *array.shape[2:])[like(array, slots)]
                layers.append(rows.swapaxes(0, 1))
            found.append(layers)
        return found[0], found[1]


def indexable(x: Any, name: str = "pages") -> Any:
    """An array that can be indexed by an array: CuPy's on a CUDA device, else NumPy's."""
    if on_cuda(x):
        from kvtc_stream.gpu.runtime.tensors import to_device

        bits, dtype = to_device(x, name)
        return bits.view(numpy_dtype(dtype))
    return to_numpy(x, name)


def like(array: Any, index: NDArray[np.int64]) -> Any:
    if isinstance(array, np.ndarray):
        return index
    import cupy

    return cupy.asarray(index)
