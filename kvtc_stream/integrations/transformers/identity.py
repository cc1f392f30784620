"""Who a model is, and which prompt: fingerprints, token digests, and their comparison."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.errors import CalibrationMismatchError, UnsupportedError
from kvtc_stream.formats import ModelIdentity
from kvtc_stream.integrations.transformers.geometry import check_geometry, geometry_of
from kvtc_stream.integrations.transformers.model import decoder_of

TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]] | Tensor"

#: Values of a parameter that enter the fingerprint.
_FINGERPRINT_SAMPLES = 64
#: Configuration entries that enter the fingerprint.
FINGERPRINT_CONFIG = (
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "model_type",
    "no_rope_layers",
    "norm_eps",
    "norm_epsilon",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "vocab_size",
)


def model_identity(
    model: PreTrainedModel, *, name: str | None = None, revision: str | None = None
) -> ModelIdentity:
    """Name, revision and fingerprint of what determines a model's cache.

    ``name`` and ``revision`` default to what the model was loaded from (of a local folder, its
    last part) and to the commit it was loaded at, if known.

    The fingerprint is the SHA-256 of, in this order:

    1. The configuration as UTF-8 JSON: an object of those entries of the text decoder's
       configuration that are named in ``FINGERPRINT_CONFIG`` and are not null (entries of
       objects within too), keys sorted, no white space, non-ASCII characters escaped; a number
       that is whole as an integer, any other as the string that Python's ``float.hex`` gives.
       A line feed.
    2. For each parameter of the text decoder (without the output head, under its name in the
       decoder, a shared one once, under its first), in order of the names' UTF-8 bytes: the line
       ``NAME [DIM,DIM,...]`` and a line feed, then its sample. Of a parameter with ``n`` values,
       ``m = min(n, 64)`` are sampled, at row-major indices ``i * (n - 1) // (m - 1)`` for ``i``
       from 0 (index 0 if ``m`` is 1). Each is rounded to bfloat16, ties to even, and written as
       two bytes, little-endian; a parameter of integers (quantised weights) as int64, eight bytes.

    Hence the fingerprint does not depend on whether weights are loaded as float32, bfloat16 or
    their own dtype (loading as float16 rounds them first, and may change it), on their device, or
    on the head. It changes with training and with quantisation.

    Raises
    ------
    UnsupportedError
        Some weights are not loaded (meta device).
    """
    decoder = decoder_of(model)
    source = getattr(model.config, "_name_or_path", None) or ""
    if name is None:
        name = os.path.basename(os.path.abspath(source)) if os.path.isdir(source) else source
    if revision is None:
        revision = getattr(model.config, "_commit_hash", None) or ""
    return ModelIdentity(name, revision, _fingerprint(decoder))


def token_digest(token_ids: TokenIds) -> bytes:
    """SHA-256 of token ids, each as eight bytes, little-endian: which prompt a cache is of.

    ``token_ids`` is [tokens] or [1, tokens].
    """
    return hashlib.sha256(as_ids(token_ids).astype("<i8").tobytes()).digest()


def check_model(model: PreTrainedModel, calibration: Calibration) -> None:
    expected = calibration.model
    found = model_identity(model)
    if expected.fingerprint and found.fingerprint != expected.fingerprint:
        raise CalibrationMismatchError(
            f"the model is {_label(found)}, the calibration was made with {_label(expected)}: use "
            f"the model it was made with, or calibrate this one"
        )
    check_geometry(geometry_of(model), calibration.geometry)


def _label(identity: ModelIdentity) -> str:
    name = f"{identity.name or 'unnamed'}{'@' if identity.revision else ''}{identity.revision}"
    return f"{name} (fingerprint {identity.fingerprint.hex()[:16]}…)"


def as_ids(token_ids: TokenIds) -> NDArray[np.int64]:
    ids = token_ids.cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(
            f"token_ids must be integers [tokens] or [1, tokens], found {ids.dtype} "
            f"{list(ids.shape)}"
        )
    return ids.astype(np.int64)


def _fingerprint(decoder: PreTrainedModel) -> bytes:
    config = decoder.config.to_dict()
    entries = {k: _canonical(config[k]) for k in FINGERPRINT_CONFIG if config.get(k) is not None}
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())
    digest.update(b"\n")
    for name, sample in sorted(_samples(decoder).items(), key=lambda item: item[0].encode()):
        digest.update(name.encode() + b"\n" + sample)
    return digest.digest()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else value.hex()
    return value


def _samples(decoder: PreTrainedModel) -> dict[str, bytes]:
    """Per ``NAME [DIM,...]`` the sampled values, in one transfer per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, parameter in decoder.named_parameters():
        if parameter.is_meta:
            raise UnsupportedError(
                f"parameter {name} is not loaded (meta device): load the model without offloading"
            )
        n = parameter.numel()
        m = min(n, _FINGERPRINT_SAMPLES)
        index = torch.arange(m, device=parameter.device) * (n - 1) // max(m - 1, 1)
        values = parameter.detach().flatten()[index]
        dtype = torch.bfloat16 if values.is_floating_point() else torch.int64
        title = f"{name} [{','.join(map(str, parameter.shape))}]"
        groups.setdefault((values.device, dtype), []).append((title, values.to(dtype)))
    samples = {}
    for group in groups.values():
        flat = torch.cat([values for _, values in group]).cpu()
        raw = flat.view(torch.int16 if flat.dtype == torch.bfloat16 else torch.int64).numpy()
        pieces = np.split(raw, np.cumsum([len(values) for _, values in group])[:-1])
        for (title, _), piece in zip(group, pieces, strict=True):
            samples[title] = piece.astype(piece.dtype.newbyteorder("<")).tobytes()
    return samples
