"""Which vLLM settings the connector serves, and who the served model is."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtc_stream.calibration.model import Calibration
from kvtc_stream.calibration.split import part_path
from kvtc_stream.errors import CalibrationMismatchError, UnsupportedError
from kvtc_stream.formats import Section
from kvtc_stream.integrations.hosts.keys import Namespace

#: The first version of vLLM whose connectors are made as this one is.
FIRST_VERSION = 0, 25, 1
#: Element types of a KV cache that are those of the model, as ``--kv-cache-dtype`` names them.
_PLAIN_DTYPES = frozenset({"auto", "bfloat16", "float16", "half", "float32", "float"})
#: Samples of a file of weights that enter the model's identity, and bytes of each.
_SAMPLES, _SAMPLE_BYTES = 256, 1024
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def version_of(text: str) -> tuple[int, ...]:
    """``"0.32.0+cpu"`` as (0, 32, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def check_version(
    text: str, first: tuple[int, ...] = FIRST_VERSION, who: str = "KvtcConnector"
) -> None:
    """Raise ``UnsupportedError`` for a vLLM older than the first that makes ``who`` as it is."""
    if version_of(text) < first:
        raise UnsupportedError(
            f"vLLM {text} is older than {'.'.join(map(str, first))}, the first that "
            f"{who} serves: upgrade vLLM"
        )


def refusals(vllm_config: Any, kv_cache_config: Any) -> list[str]:
    """What of vLLM's configuration the connector does not serve, each with a way out."""
    found = []
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1) or 1
        if size > 1:
            found.append(f"{name} is {size}: spread the model by tensor_parallel_size")
    backend = getattr(parallel, "distributed_executor_backend", None)
    if parallel.tensor_parallel_size > 1 and backend == "external_launcher":
        found.append(
            "distributed_executor_backend is 'external_launcher', whose ranks have a scheduler "
            "each and do not wait for one another's pages: use 'mp' or 'ray'"
        )
    dtype = vllm_config.cache_config.cache_dtype
    if dtype not in _PLAIN_DTYPES:
        found.append(
            f"kv_cache_dtype is {dtype!r}: leave it at 'auto'; pages are compressed anyway"
        )
    if vllm_config.speculative_config is not None:
        found.append("speculative decoding is on: switch it off")
    if getattr(vllm_config.model_config, "uses_mrope", False):
        found.append("the model places tokens in three dimensions (M-RoPE)")
    groups = kv_cache_config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if kinds != ["FullAttentionSpec"] or len(groups) != 1:
        found.append(
            f"the KV cache has {len(groups)} groups of layers ({', '.join(kinds)}), expected 1 of "
            f"FullAttentionSpec: MLA, sliding windows and recurrent layers are not served"
            + (
                "; --disable-hybrid-kv-cache-manager makes one group of full and sliding layers"
                if kinds == ["FullAttentionSpec", "SlidingWindowSpec"]
                else ""
            )
        )
    return found


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise ``UnsupportedError`` that names all that is not served."""
    refuse(refusals(vllm_config, kv_cache_config), "KvtcConnector")


def refuse(reasons: list[str], who: str) -> None:
    """Raise ``UnsupportedError`` if there are reasons."""
    if reasons:
        raise UnsupportedError(f"{who} does not serve this: {'; '.join(reasons)}")


def layer_number(name: str) -> int:
    """``"model.layers.3.self_attn.attn"`` is 3.

    Raises
    ------
    UnsupportedError
        There is no number in it, or more than one.
    """
    numbers = [part for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise UnsupportedError(f"layer {name!r} has {len(numbers)} numbers in its name, expected 1")
    return int(numbers[0])


def ordered_layers(kv_cache_config: Any) -> list[str]:
    """Names of the layers that have a cache, in the model's order."""
    return sorted(kv_cache_config.kv_cache_groups[0].layer_names, key=layer_number)


def served_section(vllm_config: Any, kv_cache_config: Any) -> Section:
    """The shape of what the engine caches; without RoPE, which the configuration does not tell."""
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    value_dim = getattr(spec, "head_size_v", None) or spec.head_size
    numbers = tuple(map(layer_number, ordered_layers(kv_cache_config)))
    return Section(numbers, spec.num_kv_heads, spec.head_size, value_dim)


@dataclass(frozen=True)
class HeadParts:
    """How vLLM spreads the KV heads of a model over the ranks of tensor parallelism.

    Attributes
    ----------
    ranks
        ``tensor_parallel_size``.
    kv_heads
        Of the model.
    """

    ranks: int
    kv_heads: int

    @property
    def count(self) -> int:
        """How many parts there are; with more ranks than heads, several ranks have the same."""
        return min(self.ranks, self.kv_heads)

    def of(self, rank: int) -> int:
        """The part that a rank has."""
        return rank // (self.ranks // self.count)

    def writes(self, rank: int) -> bool:
        """Whether a rank stores its part: one of those that have the same."""
        return rank % (self.ranks // self.count) == 0

    def heads(self, part: int) -> tuple[int, int]:
        """The first head of a part, and how many heads the model has."""
        return part * (self.kv_heads // self.count), self.kv_heads

    def calibration(self, path: str, part: int) -> Calibration:
        """The calibration of a part.

        Raises
        ------
        FileNotFoundError
            There is none.
        """
        own = part_path(path, part, self.count)
        if self.count > 1 and not own.is_file():
            raise FileNotFoundError(
                f"no calibration at {own}: with tensor_parallel_size {self.ranks} each part of the "
                f"KV heads needs its own, as kvtc calibrate --tensor-parallel {self.count} -o "
                f'{path} makes them, or "calibrate" in kv_connector_extra_config'
            )
        return Calibration.load(own)


def head_parts_of(vllm_config: Any, section: Section) -> HeadParts:
    """How the engine's KV heads are spread.

    Raises
    ------
    UnsupportedError
        A rank has other heads than these.
    """
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks == 1:
        return HeadParts(1, section.kv_heads)
    parts = HeadParts(ranks, vllm_config.model_config.get_total_num_kv_heads())
    if section.kv_heads * parts.count != parts.kv_heads or ranks % parts.count:
        raise UnsupportedError(
            f"each of {ranks} ranks caches {section.kv_heads} of {parts.kv_heads} KV heads: "
            f"KvtcConnector serves those that vLLM deals evenly"
        )
    return parts


def check_calibration(
    calibration: Calibration, section: Section, heads: tuple[int, int] | None = None
) -> None:
    """Raise ``CalibrationMismatchError`` unless the calibration is for such a cache, of KV heads
    from the first of ``heads`` on, and of so many in all; by default of all of them."""
    sections = calibration.geometry.sections
    expected = sections[0]
    first, of = heads or (0, section.kv_heads)
    own_first, own_of = calibration.sections[0].heads or (0, expected.kv_heads)
    names = ("layers", "kv_heads", "k_dim", "v_dim")
    differing = [
        f"{name} {getattr(section, name)}, the calibration's are {getattr(expected, name)}"
        for name in names
        if getattr(section, name) != getattr(expected, name)
    ]
    if not differing and (first, of) != (own_first, own_of):
        differing.append(
            f"KV heads from {first} on of {of}, the calibration's are those from {own_first} on "
            f"of {own_of}"
        )
    if len(sections) != 1:
        differing.append(f"1 kind of layers, the calibration has {len(sections)}")
    if differing:
        raise CalibrationMismatchError(
            f"the served model has {'; '.join(differing)}: use the calibration of this model"
        )


def dtype_label(dtype: Any) -> str:
    """``torch.bfloat16`` as ``"bfloat16"``."""
    return str(dtype).rpartition(".")[2]


def model_facts(vllm_config: Any) -> dict[str, Any]:
    """Who the served model is, as JSON: its configuration and samples of its weights.

    Weights are those of local files, of a Hugging Face snapshot in the cache too; otherwise the
    model's name and revision stand for them.
    """
    model = vllm_config.model_config
    config = {
        name: value
        for name, value in model.hf_config.to_dict().items()
        if not name.startswith("_") and name not in ("transformers_version", "architectures")
    }
    facts: dict[str, Any] = {
        "config": hashlib.sha256(
            json.dumps(config, sort_keys=True, default=str).encode()
        ).hexdigest(),
        "dtype": dtype_label(model.dtype),
        "quantization": str(model.quantization) if model.quantization else None,
    }
    load_format = str(getattr(vllm_config.load_config, "load_format", "auto"))
    if load_format == "dummy":
        return facts | {"weights": "dummy", "seed": model.seed}
    folder = _snapshot(model.model, model.revision)
    if folder is not None and (files := sorted(_weight_files(folder))):
        return facts | {"weights": _sampled(files)}
    commit = getattr(model.hf_config, "_commit_hash", None)
    return facts | {"weights": [model.model, model.revision, commit]}


def namespace_of(
    host: str,
    model: dict[str, Any],
    dtype: str,
    page_tokens: int,
    calibrations: Sequence[Calibration],
    options: dict[str, Any],
    tensor_parallel: int = 1,
) -> Namespace:
    """What pages depend on beside tokens, adapter and tenant.

    Parameters
    ----------
    host
        Who names the pages.
    model
        See :func:`model_facts`.
    dtype
        Element type of the cache.
    page_tokens
        Tokens of a page.
    calibrations, options
        What codes the parts of pages, and the codec's settings; none if nothing does.
    tensor_parallel
        Ranks that the model's heads are spread over.
    """
    facts: dict[str, Any] = {
        "format": "1.1",
        "host": host,
        "model": model,
        "layout": {"tensor_parallel": tensor_parallel, "pipeline_parallel": 1},
        "dtype": dtype,
        "page_tokens": page_tokens,
    }
    if calibrations:
        digests = [calibration.digest.hex() for calibration in calibrations]
        facts["calibration"] = digests[0] if len(digests) == 1 else digests
        facts["fingerprint"] = calibrations[0].model.fingerprint.hex()
        facts["codec"] = options
    return Namespace(facts)


def adapter_facts(lora_request: Any) -> list[Any] | None:
    """Who a LoRA adapter is: its name, place, and the state of its files."""
    if lora_request is None:
        return None
    path = Path(lora_request.lora_path)
    states = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(path.glob("adapter_*"))
        if file.is_file()
    ]
    return [lora_request.lora_name, str(lora_request.lora_path), states]


def _snapshot(model: str, revision: str | None) -> Path | None:
    """The folder or file that a model was loaded from, if it is on this machine."""
    if os.path.exists(model):
        return Path(model)
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except (ModuleNotFoundError, ValueError):  # of what is no name on the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def _weight_files(folder: Path) -> Iterator[Path]:
    if folder.is_file():
        yield folder
        return
    for path in folder.iterdir():
        if path.suffix in _WEIGHTS and path.is_file():
            yield path


def _sampled(files: list[Path]) -> str:
    """SHA-256 of the sizes of files, and of samples spread over them."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
