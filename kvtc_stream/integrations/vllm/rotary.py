"""The rotary table that a served model uses, from the modules that vLLM made."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtc_stream.errors import CalibrationMismatchError, UnsupportedError
from kvtc_stream.formats import Rope

#: Positions at which a table is compared with the cosines that the model uses, beside the last; and
#: how much these may differ: they may have eight bits, and angles of far positions are rounded.
_POSITIONS, _ATOL = (0, 1, 7, 63, 500, 4000), 0.03


def served_rope(head_dim: int) -> Rope | None:
    """The table that all layers share; ``None`` if vLLM made none.

    Raises
    ------
    UnsupportedError
        There are several, or it is not one of inverse frequencies and a scale.
    """
    from vllm.model_executor.layers import rotary_embedding

    modules = list(rotary_embedding._ROPE_DICT.values())
    found = list(dict.fromkeys(_rope(module) for module in modules))
    if len(found) > 1:
        raise UnsupportedError(
            f"the model has {len(found)} rotary tables, KvtcConnector serves models with one"
        )
    if found and found[0].rotary_dim > head_dim:
        raise UnsupportedError(
            f"the rotary table has {found[0].rotary_dim} channels, a head has {head_dim}"
        )
    return found[0] if found else None


def _rope(module: Any) -> Rope:
    """Inverse frequencies and scale of a module, if they explain its cosines and sines."""
    name = type(module).__name__
    try:
        # As it was made, in float32: what the model uses may be rounded to eight bits.
        table = module._compute_cos_sin_cache().float().cpu().numpy()
    except (AttributeError, TypeError):
        raise UnsupportedError(
            f"the model's RoPE is {name}, whose table is not known to KvtcConnector"
        ) from None
    used = module.cos_sin_cache.float().cpu().numpy()
    cosines, sines = np.split(table[1].astype(np.float64), 2)
    frequencies = np.arctan2(sines, cosines)
    scale = float(table[0, 0])
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    rope = Rope(tuple(frequencies.tolist()), not module.is_neox_style, scale)
    positions = [p for p in (*_POSITIONS, len(table) - 1) if p < len(table)]
    angles = np.outer(positions, frequencies)
    expected = scale * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    if used.shape != table.shape or not np.allclose(used[positions], expected, atol=_ATOL):
        raise UnsupportedError(
            f"the model's RoPE is {name}, whose table inverse frequencies and a scale do "
            f"not explain: KvtcConnector does not serve it"
        )
    return rope


def check_rope(found: Rope | None, expected: Rope | None) -> None:
    """Raise ``CalibrationMismatchError`` unless the calibration has the served model's table."""
    alike = found is None or (
        (expected is not None)
        and found.interleaved == expected.interleaved
        and found.rotary_dim == expected.rotary_dim
        and np.allclose(found.inv_freq, expected.inv_freq, rtol=1e-4, atol=0)
        and abs(found.scale - expected.scale) < 1e-2
    )
    if not alike:
        raise CalibrationMismatchError(
            f"the served model turns keys by {_shown(found)}, the calibration by "
            f"{_shown(expected)}: calibrate this model as it is served"
        )


def _shown(rope: Rope | None) -> str:
    if rope is None:
        return "no RoPE"
    return (
        f"RoPE over {rope.rotary_dim} channels, frequencies {rope.inv_freq[0]:.4g} to "
        f"{rope.inv_freq[-1]:.4g}, scale {rope.scale:.4g}"
    )
