"""How serving hosts lay out K and V of pages, and views of them in the codec's order.

A layout names the axes of a host's tensor: ``B`` pages, ``L`` layers, ``H`` KV heads, ``N`` tokens,
``D`` channels of a head, ``2`` K and V. Axes in brackets are one axis of the tensor. Views share
the tensor's memory: what is written to them is in the host's pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtc_stream.errors import UnsupportedError


@dataclass(frozen=True)
class Layout:
    """The axes of a host's tensor.

    Attributes
    ----------
    name
        What the host calls it.
    axes
        Names of the axes in order, each once. ``*`` stands for those of ``k`` in the half that
        holds K, and for those of ``v`` in the other; ``2`` comes right before it, and it is the
        last: the host may count these as several axes.
    k, v
        Axes that ``*`` stands for.
    """

    name: str
    axes: str
    k: str = ""
    v: str = ""

    def views(self, tensor: Any, sizes: Mapping[str, int]) -> tuple[Any, Any]:
        """K and V as views [pages, layers, kv_heads, tokens, head_dim] of ``tensor``.

        Axes that the layout does not have are left out of the views.

        Parameters
        ----------
        tensor
            A NumPy array or PyTorch tensor in the layout.
        sizes
            ``H``, ``N`` and ``D``; sizes of other axes are those of the tensor.

        Raises
        ------
        UnsupportedError
            The tensor has another shape, or its memory no such views.
        """
        known = {**sizes, "2": 2, "*": sizes["N"] * sizes["D"]}
        groups = _groups(self.axes)
        shape = list(tensor.shape)
        if "*" in self.axes and len(shape) > len(groups):  # the host counts its axes otherwise
            last = len(groups) - 1
            tensor = _reshaped(tensor, [*shape[:last], int(np.prod(shape[last:]))])
            shape = list(tensor.shape)
        if len(shape) != len(groups):
            raise self._refused(shape, sizes)
        split: list[int] = []
        for size, group in zip(shape, groups, strict=True):
            own = [known.get(axis, size if len(group) == 1 else 0) for axis in group]
            if int(np.prod(own)) != size:
                raise self._refused(shape, sizes)
            split += own
        names = "".join(groups)
        whole = _reshaped(tensor, split)
        found = []
        for half, inner in enumerate((self.k, self.v)):
            part = whole[(slice(None),) * names.index("2") + (half,)]
            own_names = names.replace("2", "")
            if inner:
                place = own_names.index("*")
                dims = [known[axis] for axis in inner]
                part = _reshaped(part, [*part.shape[:place], *dims, *part.shape[place + 1 :]])
                own_names = own_names.replace("*", inner)
            order = [own_names.index(axis) for axis in "BLHND" if axis in own_names]
            found.append(_permuted(part, order))
        return found[0], found[1]

    def _refused(self, shape: list[int], sizes: Mapping[str, int]) -> UnsupportedError:
        return UnsupportedError(
            f"pages have shape {shape}; layout {self.name} is [{', '.join(_groups(self.axes))}] "
            f"with {', '.join(f'{axis}={size}' for axis, size in sizes.items())}"
        )


#: Of one layer, as vLLM hands it to connectors. Physical orders are in the tensor's strides.
VLLM_LAYOUTS = (
    # From 0.26: K and V of a token side by side (FlashAttention, Triton, FlashInfer).
    Layout("vllm [B, H, N, K‖V]", "BHN(2D)"),
    # Of its CPU backend: K of a page and head transposed, then V.
    Layout("vllm CPU [B, H, Kᵀ‖V]", "BH(2*)", k="DN", v="ND"),
    # To 0.25.
    Layout("vllm [B, 2, N, H, D]", "B2NHD"),
    Layout("vllm [2, B, N, H, D]", "2BNHD"),
    Layout("vllm [B, 2, H, N, D]", "B2HND"),
)
#: Of a chunk of LMCache, all layers; with the fused one K and V of a head are side by side.
LMCACHE_LAYOUTS = (
    Layout("LMCache [2, L, T, H·D]", "2LN(HD)"),
    Layout("LMCache [L, T, H·2D]", "LN(H2D)"),
)
#: Of a page of SGLang's host pool.
SGLANG_LAYOUTS = (
    Layout("SGLang layer_first", "2LNHD"),
    Layout("SGLang page_first", "2NLHD"),
    Layout("SGLang page_first_direct", "2BLNHD"),
    Layout("SGLang page_head", "2BHNLD"),
)


def kv_views(
    tensor: Any, layouts: tuple[Layout, ...], *, kv_heads: int, tokens: int, head_dim: int
) -> tuple[Any, Any]:
    """K and V of a tensor in the one layout of ``layouts`` that its shape fits.

    Arguments are those of a page. See :meth:`Layout.views`.

    Raises
    ------
    UnsupportedError
        No layout fits, or several do and give other views; the message says which.
    """
    sizes = {"H": kv_heads, "N": tokens, "D": head_dim}
    fitting, reasons = [], []
    for layout in layouts:
        try:
            fitting.append((layout, layout.views(tensor, sizes)))
        except UnsupportedError as error:
            reasons.append(str(error))
    if len(fitting) == 1:
        return fitting[0][1]
    if fitting:
        raise UnsupportedError(
            f"pages of shape {list(tensor.shape)} may be {' or '.join(x.name for x, _ in fitting)}:"
            f" name the layout"
        )
    if latent(tensor.shape, tokens, head_dim):
        raise UnsupportedError(
            f"pages of shape {list(tensor.shape)} hold one vector for each token, as of multi-head "
            f"latent attention; supported are keys and values"
        )
    raise UnsupportedError("; ".join(reasons))


def latent(shape: tuple[int, ...], tokens: int, head_dim: int) -> bool:
    """Whether pages look like those of multi-head latent attention: no heads, and no V."""
    rest = [size for size in shape if size != 1]
    return len(rest) <= 3 and tokens in rest and shape[-1] % (2 * head_dim) != 0


def _groups(axes: str) -> list[str]:
    """``"BHN(2D)"`` as ``["B", "H", "N", "2D"]``."""
    found: list[str] = []
    inside = False
    for letter in axes:
        if letter in "()":
            inside = letter == "("
            if inside:
                found.append("")
        elif inside:
            found[-1] += letter
        else:
            found.append(letter)
    return found


def _reshaped(x: Any, shape: list[int]) -> Any:
    """A view of another shape.

    Raises
    ------
    UnsupportedError
        The strides allow none.
    """
    try:
        return x.reshape(shape, copy=False) if isinstance(x, np.ndarray) else x.view(shape)
    except (ValueError, RuntimeError) as error:
        raise UnsupportedError(f"pages of shape {list(x.shape)} are not dense: {error}") from error


def _permuted(x: Any, order: list[int]) -> Any:
    return x.transpose(order) if isinstance(x, np.ndarray) else x.permute(order)
