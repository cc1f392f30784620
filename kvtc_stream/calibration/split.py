"""Calibrations of parts of a model's KV heads, for engines that spread heads over processes.

In tensor parallelism each process holds some KV heads of all layers. A basis mixes all heads that
it is made of, so each process needs one of its own heads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvtc_stream.calibration.calibrator import Calibrator
from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.weights import importance_matrices
from kvtc_stream.coding.values import scale_grid
from kvtc_stream.formats import Geometry, Section
from kvtc_stream.progress import Progress


def head_parts(kv_heads: int, parts: int) -> list[range]:
    """The KV heads of each part: as many each, in order, as vLLM deals them to its ranks.

    Raises
    ------
    ValueError
        They cannot be dealt so.
    """
    if parts < 1 or kv_heads % parts:
        raise ValueError(
            f"{kv_heads} KV heads cannot be split into {parts} parts of as many each"
            + (
                f": ranks beyond {kv_heads} have copies of heads, and share a calibration; ask for "
                f"{kv_heads} parts"
                if parts > kv_heads and parts % kv_heads == 0
                else ""
            )
        )
    size = kv_heads // parts
    return [range(i * size, (i + 1) * size) for i in range(parts)]


def part_path(path: str | os.PathLike[str], part: int, parts: int) -> Path:
    """Where the calibration of a part is: ``model.tp2-0.safetensors`` is the first of two of
    ``model.safetensors``, and this itself is the one of all heads."""
    whole = Path(path)
    return whole if parts == 1 else whole.with_name(f"{whole.stem}.tp{parts}-{part}{whole.suffix}")


def with_heads(calibration: Calibration, heads: Sequence[tuple[int, int]]) -> Calibration:
    """A calibration that says which heads of the model its sections are of: for each the first one,
    and how many the model has."""
    sections = tuple(
        replace(section, heads=None if (first, of) == (0, shape.kv_heads) else (first, of))
        for section, shape, (first, of) in zip(
            calibration.sections, calibration.geometry.sections, heads, strict=True
        )
    )
    return Calibration(calibration.geometry, sections, calibration.sinks, calibration.model)


class SplitCalibrator:
    """Learns a calibration for each of several parts of a model's KV heads, in one pass.

    Takes what :class:`Calibrator` takes, of all heads. Covariances of all parts together are as
    many times smaller than one of all heads as there are parts. Not thread-safe.

    Parameters
    ----------
    geometry
        The whole cache.
    parts
        How many. Each section's KV heads are dealt in order, as many to each.
    options
        Of :class:`Calibrator`. ``weights`` are of all heads.

    Raises
    ------
    ValueError
        The KV heads of a section cannot be dealt so, or the options are not as for a calibrator.

    Examples
    --------
    >>> import kvtc_stream as kvtc
    >>> geometry = kvtc.Geometry.uniform(layers=2, kv_heads=4, head_dim=4)
    >>> calibrator = kvtc.SplitCalibrator(geometry, 2)
    >>> calibrator.update(*kvtc.testing.drawn_cache(geometry, tokens=128))
    >>> [c.sections[0].heads for c in calibrator.finish()]
    [(0, 4), (2, 4)]
    """

    def __init__(self, geometry: Geometry, parts: int, **options: Any) -> None:
        self._geometry = geometry
        self._heads = [head_parts(section.kv_heads, parts) for section in geometry.sections]
        weights = options.pop("weights", None)
        matrices = None if weights is None else importance_matrices(weights, geometry.sections)
        self._parts = []
        for i in range(parts):
            own = [_slice(heads[i]) for heads in self._heads]
            sections = tuple(
                replace(section, kv_heads=len(heads[i]))
                for section, heads in zip(geometry.sections, self._heads, strict=True)
            )
            cut = matrices and [
                (k[:, span], v[:, span]) for (k, v), span in zip(matrices, own, strict=True)
            ]
            self._parts.append(Calibrator(Geometry(sections), weights=cut, **options))

    @property
    def backend(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self._parts[0].backend

    def update(
        self,
        k: Any,
        v: Any,
        *,
        positions: Any = None,
        section: int = 0,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> None:
        """Learn from a document; see :meth:`Calibrator.update`."""
        self._each("update", section, (k, v), positions, k_scale, v_scale)

    def update_gradients(
        self,
        k: Any,
        v: Any,
        grad_k: Any,
        grad_v: Any,
        *,
        positions: Any = None,
        section: int = 0,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> None:
        """Learn what errors cost; see :meth:`Calibrator.update_gradients`."""
        tensors = k, v, grad_k, grad_v
        self._each("update_gradients", section, tensors, positions, k_scale, v_scale)

    def _each(
        self,
        method: str,
        section: int,
        tensors: tuple[Any, ...],
        positions: Any,
        k_scale: Any,
        v_scale: Any,
    ) -> None:
        shape = self._shape(section)
        whole = [
            self._parts[0]._arrays.layers(x, name, len(shape.layers), shape.kv_heads, dim)
            for x, name, dim in zip(
                tensors,
                ("k", "v", "grad_k", "grad_v"),
                (shape.k_dim, shape.v_dim) * 2,
                strict=False,
            )
        ]
        scales = {
            name: scale_grid(scale, name, len(shape.layers), shape.kv_heads)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
            if scale is not None
        }
        for part, heads in zip(self._parts, self._heads[section], strict=True):
            own = _slice(heads)
            getattr(part, method)(
                *([layer[own] for layer in layers] for layers in whole),
                positions=positions,
                section=section,
                **{name: grid[:, own] for name, grid in scales.items()},
            )

    def _shape(self, section: int) -> Section:
        self._parts[0]._section(section)  # says if there is none
        return self._geometry.sections[section]

    def finish(self, progress: Progress | None = None) -> list[Calibration]:
        """A calibration for each part; see :meth:`Calibrator.finish`."""
        count = len(self._parts)

        def advance(part: int, done: int, total: int) -> None:
            if progress is not None:
                progress(part * total + done, count * total)

        found = []
        for i, part in enumerate(self._parts):
            calibration = part.finish(lambda done, total, i=i: advance(i, done, total))  # type: ignore[misc]
            of = [
                (heads[i].start, section.kv_heads)
                for heads, section in zip(self._heads, self._geometry.sections, strict=True)
            ]
            found.append(with_heads(calibration, of))
        return found


def _slice(heads: range) -> slice:
    return slice(heads.start, heads.stop)
