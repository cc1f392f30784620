"""Who a model is, and which prompt: fingerprints, token digests, and their comparison."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.errors import CalibrationMismatchError, UnsupportedError, warn
from kvtc_stream.formats import ModelIdentity
from kvtc_stream.integrations.transformers.model import (
    decoder_of,
    found_once,
    modules_of,
    plain_model,
    tensors_of,
)

TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]] | Tensor"

#: Values of a parameter that enter the fingerprint.
_FINGERPRINT_SAMPLES = 64
#: Configuration entries that do not enter the fingerprint: none of them can change keys or values.
NOT_IN_FINGERPRINT = frozenset(
    {
        # what the model is called, and how its weights are stored
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        # what a run gives back
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
        # what follows the decoder
        "final_logit_softcapping",
        "id2label",
        "label2id",
        "logit_scale",
        "logits_scaling",
        "problem_type",
        "tie_word_embeddings",
        # training (and every name with "dropout" or "pdrop")
        "gradient_checkpointing",
        "initializer_factor",
        "initializer_range",
        "router_aux_loss_coef",
        # which tokens begin and end a text
        "bos_token_id",
        "eos_token_id",
    }
)
#: Configuration entries that entered the first fingerprint, which old calibrations have.
_FIRST_CONFIG = (
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

    1. The line ``kvtc fingerprint 2`` and a line feed.
    2. The text decoder's whole configuration as UTF-8 JSON, without what is off (null, false and
       empty entries, those of objects within too), ``NOT_IN_FINGERPRINT``, names that begin with an
       underscore or have ``dropout`` or ``pdrop`` in them, and, if there are ``rope_parameters``,
       ``pad_token_id`` (learned positions may be counted from it). Keys are sorted, without white
       space, non-ASCII characters escaped; a number that is whole is an integer, any other the
       string that Python's ``float.hex`` gives. A line feed.
    3. For each parameter and each buffer that checkpoints store, of the text decoder (without the
       output head, under its name in the decoder, a shared one once, under its first), in order
       of the names' UTF-8 bytes: the line ``NAME [DIM,DIM,...]`` and a line feed, then its sample.
       Of ``n`` values, ``m = min(n, 64)`` are sampled, at row-major indices
       ``i * (n - 1) // (m - 1)`` for ``i`` from 0 (index 0 if ``m`` is 1). Each is rounded to
       bfloat16, ties to even, and written as two bytes, little-endian; integers (quantised
       weights) as int64, eight bytes.
    4. If adapters (PEFT) are loaded and not merged, as JSON like the configuration: an object that
       has per name of a layer with adapters the list of those that are switched on, each as
       ``[NAME, SCALE]``, an empty one if they are disabled.

    Hence the fingerprint does not depend on whether weights are loaded as float32, bfloat16 or
    their own dtype (loading as float16 rounds them first, and may change it), on their device, on
    ``torch.compile``, or on the head. It changes with training, with quantisation, and with any
    option of the architecture.

    Raises
    ------
    UnsupportedError
        Some weights are not loaded (meta device).
    """
    model = plain_model(model)
    source = getattr(model.config, "_name_or_path", None) or ""
    if name is None:
        name = os.path.basename(os.path.abspath(source)) if os.path.isdir(source) else source
    if revision is None:
        revision = getattr(model.config, "_commit_hash", None) or ""
    return ModelIdentity(name, revision, _fingerprints(decoder_of(model))[0])


def token_digest(token_ids: TokenIds) -> bytes:
    """SHA-256 of token ids, each as eight bytes, little-endian: which prompt a cache is of.

    ``token_ids`` is [tokens] or [1, tokens].
    """
    return hashlib.sha256(as_ids(token_ids).astype("<i8").tobytes()).digest()


def check_fingerprint(model: PreTrainedModel, calibration: Calibration) -> None:
    """Raise if the model is not the calibration's; pass if the calibration names none."""
    expected = calibration.model
    if not expected.fingerprint:
        return
    current, first = _fingerprints(decoder_of(model))
    if expected.fingerprint == first:
        warn(
            "the calibration was made by an early version, whose fingerprint leaves out parts of "
            "the model's configuration: calibrate again to be sure that the model is the same"
        )
    elif expected.fingerprint != current:
        raise CalibrationMismatchError(
            f"the model is {_label(model_identity(model))}, the calibration was made with "
            f"{_label(expected)}: use the model it was made with, configured alike, or calibrate "
            f"this one"
        )


def _label(identity: ModelIdentity) -> str:
    name = f"{identity.name or 'unnamed'}{'@' if identity.revision else ''}{identity.revision}"
    return f"{name} (fingerprint {identity.fingerprint.hex()[:16]}…)"


def as_ids(token_ids: TokenIds, name: str = "token_ids") -> NDArray[np.int64]:
    ids = token_ids.cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(
            f"{name} must be integers [tokens] or [1, tokens], found {ids.dtype} {list(ids.shape)}"
        )
    return ids.astype(np.int64)


@found_once
def config_text(config: PreTrainedConfig) -> str:
    """The fields of a configuration that may change keys and values, as JSON."""
    entries = {
        name: value
        for name, value in config.to_dict().items()
        if not name.startswith("_")
        and name not in NOT_IN_FINGERPRINT
        and "dropout" not in name
        and "pdrop" not in name
    }
    if entries.get("rope_parameters"):
        entries.pop("pad_token_id", None)
    return _json(_switched_on(_canonical(entries)))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _switched_on(value: Any) -> Any:
    """Without null, false and empty entries, so that a new option changes nothing until used."""
    if isinstance(value, dict):
        pairs = ((k, _switched_on(v)) for k, v in value.items())
        return {k: v for k, v in pairs if v is not None and v is not False and v not in ({}, [])}
    return value


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else value.hex()
    return value if value is None or isinstance(value, bool | int | str) else str(value)


#: What else changes when a model gets other weights.
_OF_TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    Tensor.data_ptr,
    Tensor.stride,
    *map(attrgetter, ("shape", "dtype", "device")),
)


@dataclass(frozen=True)
class _Known:
    """What has been found out about a decoder, and :func:`_state` and glimpse of it then.

    ``views`` are valid as long as the state is the same; empty where they would keep memory.
    """

    state: Any
    views: list[list[Tensor]]
    glimpse: list[bytes]
    found: dict[str, Any]


_known: weakref.WeakKeyDictionary[PreTrainedModel, _Known] = weakref.WeakKeyDictionary()


def found_of(decoder: PreTrainedModel) -> dict[str, Any]:
    """What has been found out, by names, and may be added to: it is kept for as long as the model
    lives and neither its configuration, nor its adapters, nor its weights change."""
    return look_at(decoder)()


@found_once
def look_at(decoder: PreTrainedModel) -> Callable[[], dict[str, Any]]:
    """Begin :func:`found_of`, which then waits for the device."""
    tensors, known = [x for x in tensors_of(decoder) if not x.is_meta], _known.get(decoder)
    state = config_text(decoder.config), *_state(modules_of(decoder), tensors)
    if known is not None and known.state != state:
        known = None
    views = (known and known.views) or _views(tensors)
    fetched = list(map(_fetching, views))

    @cache
    def found() -> dict[str, Any]:
        nonlocal known
        glimpse = [values() for values in fetched]
        if known is None or known.glimpse != glimpse:
            kept = views if all(map(_has_address, tensors)) else []
            known = _known[decoder] = _Known(state, kept, glimpse, {})
        return known.found

    return found


def _fingerprints(decoder: PreTrainedModel) -> tuple[bytes, bytes]:
    """The fingerprint, and the first one, which old calibrations have."""
    found = found_of(decoder)
    if "fingerprints" not in found:
        found["fingerprints"] = _compute_fingerprints(decoder)
    fingerprints: tuple[bytes, bytes] = found["fingerprints"]
    return fingerprints


def _state(modules: list[Any], tensors: list[Tensor]) -> tuple[Any, Any, Any]:
    """What changes when a model's adapters, rotary embeddings or weights do, found quickly."""
    adapters = [
        (layer.disable_adapters, list(layer.active_adapters), dict(layer.scaling))
        for layer in modules
        if "scaling" in vars(layer)
        and isinstance(layer.scaling, dict)
        and hasattr(layer, "disable_adapters")
    ]
    ropes = [
        (
            copy(getattr(module, "rope_type", None)),
            float(getattr(module, f"{name.removesuffix('inv_freq')}attention_scaling", 1.0)),
        )
        for module in modules
        for name in module._buffers
        if name.endswith("inv_freq")
    ]
    try:
        versions: list[int | None] = [x._version for x in tensors]
    except RuntimeError:  # tensors of inference mode do not count their changes
        versions = [None if x.is_inference() else x._version for x in tensors]
    return adapters, ropes, (versions, *([*map(of, tensors)] for of in _OF_TENSORS))


def _views(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Some values of each weight, for each device and size of elements."""
    found: dict[tuple[torch.device, int], list[Tensor]] = {}
    for x in tensors:
        if x.numel():
            # As they lie in memory, whose order need not be that of the dimensions.
            held = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            step = held // 128 | 1
            found.setdefault((x.device, x.itemsize), []).append(_every(x, step, -(-held // step)))
    return list(found.values())


def _every(x: Tensor, step: int, count: int) -> Tensor:
    """Some values, ``step`` apart, as integers if they have an address: a view that does not keep
    the memory of a model that goes elsewhere."""
    if not _has_address(x):
        return x.detach().as_strided((count,), (step,))
    size = min(x.itemsize, 8)
    described = {
        "data": (x.data_ptr(), False),
        "shape": (count,),
        "strides": (step * x.itemsize,),
        "typestr": f"<i{size}",
        "version": 3,
    }
    if x.is_cuda:
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=described), device=x.device)
    return torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=described)))


def _has_address(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and x.data_ptr() != 0


def _fetching(views: list[Tensor]) -> Callable[[], bytes]:
    """Begin to copy their values to the host, as bytes; PyTorch does not count changes of
    ``weight.data``."""
    values = torch.cat(views).view(torch.uint8)
    copied = values.to("cpu", non_blocking=values.is_cuda)
    done = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def fetched() -> bytes:
        if done is not None:
            done.synchronize()
        return copied.numpy().tobytes()

    return fetched


def _compute_fingerprints(decoder: PreTrainedModel) -> tuple[bytes, bytes]:
    parameters = dict(decoder.named_parameters())
    samples = _samples({**parameters, **_stored_buffers(decoder)})
    adapters = _adapters(decoder)
    config = decoder.config.to_dict()
    first = {k: _canonical(config[k]) for k in _FIRST_CONFIG if config.get(k) is not None}
    return (
        _digest(
            f"kvtc fingerprint 2\n{config_text(decoder.config)}",
            samples,
            _json(_canonical(adapters)) if adapters else "",
        ),
        _digest(_json(first), {name: samples[name] for name in parameters}),
    )


def _adapters(decoder: PreTrainedModel) -> dict[str, list[tuple[str, Any]]]:
    """Which of a layer's adapters are on, and how strong: other ones have weights too."""
    return {
        name.replace("_orig_mod.", ""): []
        if layer.disable_adapters
        else [(x, layer.scaling.get(x)) for x in layer.active_adapters]
        for name, layer in decoder.named_modules()
        if hasattr(layer, "disable_adapters") and isinstance(getattr(layer, "scaling", 0), dict)
    }


def _digest(text: str, samples: dict[str, bytes], after: str = "") -> bytes:
    digest = hashlib.sha256(text.encode() + b"\n")
    for sample in sorted(samples.values(), key=lambda x: x.split(b" ", 1)[0]):
        digest.update(sample)
    digest.update(after.encode())
    return digest.digest()


def _stored_buffers(decoder: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers that checkpoints store; tables that are computed when a model is made are none."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in decoder.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _samples(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """Per name its ``NAME [DIM,...]`` and sampled values, in one transfer per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    indices: dict[tuple[int, torch.device], Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UnsupportedError(
                f"parameter {name} is not loaded (meta device): load the model without offloading"
            )
        place = (tensor.numel(), tensor.device)
        if place not in indices:
            n, m = place[0], min(place[0], _FINGERPRINT_SAMPLES)
            indices[place] = (torch.arange(m) * (n - 1) // max(m - 1, 1)).to(tensor.device)
        values = tensor.detach().flatten()[indices[place]]
        groups.setdefault((values.device, values.dtype), []).append((name, values))
    samples = {}
    for (_, dtype), group in groups.items():
        flat = torch.cat([values for _, values in group])
        flat = flat.to(torch.bfloat16 if dtype.is_floating_point else torch.int64).cpu()
        raw = flat.view(torch.int16 if dtype.is_floating_point else torch.int64).numpy()
        pieces = np.split(raw, np.cumsum([len(values) for _, values in group])[:-1])
        for (name, _), piece in zip(group, pieces, strict=True):
            shape = ",".join(map(str, tensors[name].shape))
            title = f"{name.replace('_orig_mod.', '')} [{shape}]\n"
            little = piece.astype(piece.dtype.newbyteorder("<"))
            samples[name] = title.encode() + little.tobytes()
    return samples
