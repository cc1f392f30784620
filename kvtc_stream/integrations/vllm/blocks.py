"""The engine's blocks: how they lie in memory, and pages read from them and written to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtc_stream.backends.select import get_backend
from kvtc_stream.errors import UnsupportedError
from kvtc_stream.integrations.hosts.layouts import VLLM_LAYOUTS, Layout

#: Pages that are decoded at once on a CUDA device: enough to keep it busy, few enough that the
#: first are decoded while the next are checked.
TOGETHER = 32
#: Pages that are coded at once there: enough to keep it busy, few enough for their copy and what
#: coding them takes to be small beside the engine's memory.
_STORED_TOGETHER = 8


class Blocks:
    """The engine's blocks, all layers.

    Parameters
    ----------
    layers
        Views of K and V of each layer, [blocks, kv_heads, tokens, head_dim].
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._layers = layers
        self.device = layers[0][0].device
        self.tokens = int(layers[0][0].shape[2])
        #: Bytes of a token in all layers.
        self.token_bytes = sum(
            x.shape[1] * x.shape[3] * x.element_size() for pair in layers for x in pair
        )

        self._written = _targets(layers)

    @property
    def together(self) -> int:
        """Pages that are best decoded at once."""
        return TOGETHER if self.device.type == "cuda" else 1

    @property
    def stored_together(self) -> int:
        """Pages that are best coded at once."""
        return _STORED_TOGETHER if self.device.type == "cuda" else 1

    @property
    def target(self) -> tuple[Any, Any]:
        """All blocks as what :meth:`kvtc_stream.PageCodec.decode_into` writes to."""
        return self._written[0], self._written[1]

    def slots(self, blocks: Sequence[int]) -> NDArray[np.int64]:
        """Where the tokens of some blocks are in :attr:`target`."""
        own = np.array(blocks, np.int64)[:, None] * self._written[2] + np.arange(self.tokens)
        return own.reshape(-1)

    def read(self, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """K and V [layers, kv_heads, tokens, head_dim] of some blocks, in order; copies."""
        index = torch.tensor(blocks, device=self.device)
        pairs = [
            [x.index_select(0, index).transpose(0, 1).flatten(1, 2) for x in pair]
            for pair in self._layers
        ]
        k, v = (torch.stack(layers) for layers in zip(*pairs, strict=True))
        return k, v


def _targets(layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[Any, Any, int]:
    """K and V of all blocks as what backends decode into, and slots from a block to the next."""
    kinds = list(zip(*layers, strict=True))
    if layers[0][0].device.type != "cuda":
        pools = [get_backend("cpu").pool([x.permute(0, 2, 1, 3) for x in kind]) for kind in kinds]
        return pools[0], pools[1], int(layers[0][0].shape[2])
    backend = get_backend("cuda")
    from kvtc_stream.gpu.runtime.streams import on_device

    on_device(layers[0][0].device.index)  # of a rank, not the first of the machine
    views, step = slotted([x for kind in kinds for x in kind])
    found = []
    for name, own in zip("kv", (views[: len(layers)], views[len(layers) :]), strict=True):
        heads, _, dim = own[0].shape
        arrays, _ = backend.layer_list(own, name, len(own), heads, dim)
        found.append(arrays)
    return found[0], found[1], step


def slotted(tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Views [kv_heads, slots, head_dim] of tensors [blocks, kv_heads, tokens, head_dim], and how
    many slots a block is after the one before.

    A slot is a place for a token: blocks lie a whole number of tokens apart, and what is between
    them, such as V between K, is slots that nobody uses.

    Raises
    ------
    UnsupportedError
        They do not, or not all alike.
    """
    steps = {divmod(x.stride(0), x.stride(2)) for x in tensors}
    step, rest = steps.pop()
    if steps or rest:
        raise UnsupportedError(
            f"the engine's blocks have strides {list(tensors[0].stride())}, and are no whole "
            f"number of tokens apart: choose another attention backend"
        )
    found = []
    for x in tensors:
        blocks, heads, tokens, dim = x.shape
        size = (heads, (blocks - 1) * step + tokens, dim)
        found.append(x.as_strided(size, x.stride()[1:]))
    return found, step


def proven_layout(
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    cache: Tensor,
    num_blocks: int,
    sizes: dict[str, int],
) -> Layout:
    """The layout in which the engine itself writes to its blocks.

    Keys and values are drawn, written by the engine's own kernel into a cache of two blocks, and
    looked for.

    Parameters
    ----------
    write
        Called with keys and values [tokens, kv_heads, head_dim], a cache, and int64 [tokens], the
        places in it.
    cache
        The cache of a layer, of which the shape and dtype are taken.
    num_blocks
        Its blocks.
    sizes
        As for :meth:`kvtc_stream.integrations.hosts.Layout.views`.

    Raises
    ------
    UnsupportedError
        No known layout explains what was written.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = 2 * sizes["N"]
    k, v = (
        torch.randn(tokens, sizes["H"], sizes["D"], generator=generator)
        .to(cache.dtype)
        .to(cache.device)
        for _ in range(2)
    )
    places = torch.arange(tokens, device=cache.device)
    for layout in VLLM_LAYOUTS:
        axis = layout.axes.index("B")  # brackets come later
        if cache.ndim <= axis or cache.shape[axis] != num_blocks:
            continue
        scratch = _scratch(cache, axis)
        try:
            found = layout.views(scratch, sizes)
        except UnsupportedError:
            continue
        write(k, v, scratch, places)
        if all(
            torch.equal(view.transpose(1, 2).flatten(0, 1), x)
            for view, x in zip(found, (k, v), strict=True)
        ):
            return layout
    raise UnsupportedError(
        f"the engine's blocks have shape {list(cache.shape)}, strides {list(cache.stride())}, and "
        f"no layout that KvtcConnector knows explains what its attention writes there "
        f"({', '.join(layout.name for layout in VLLM_LAYOUTS)}): choose another attention backend"
    )


def _scratch(cache: Tensor, axis: int) -> Tensor:
    """Two blocks of zeros whose axes lie in memory in the order of the cache's."""
    shape = list(cache.shape)
    shape[axis] = 2
    order = sorted(range(cache.ndim), key=lambda i: (-int(cache.stride()[i]), i))
    order.remove(axis)
    order.insert(0, axis)  # blocks of one layer may lie among those of others
    dense = cache.new_zeros([shape[i] for i in order])
    return dense.permute([order.index(i) for i in range(cache.ndim)])
