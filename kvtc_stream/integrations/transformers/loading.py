"""Models and tokenizers from files, without the noise. PyTorch is imported when first used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtc_stream.errors import KVTCError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(source: str | os.PathLike[str], **options: Any) -> tuple[PreTrainedModel, Any]:
    """A causal model, ready for inference, and its tokenizer.

    Parameters
    ----------
    source
        A ``.gguf`` file, a folder, or a name that transformers knows.
    options
        Of ``from_pretrained``: ``dtype``, ``device_map``, ... Without ``dtype`` it is that of the
        file, but float32 on a CPU that has no instructions for the file's: models compute many
        times as long in such a type.

    Raises
    ------
    KVTCError
        The ``transformers`` extra, or a part of it that this file needs, is not installed.
    UnsupportedError
        The model fits no device whole, nor all of them together: ``device_map`` left some of it on
        disk or in host memory.
    """
    # transformers' bar for GGUF files heeds nothing else, and this only before its first import.
    os.environ.setdefault("TQDM_DISABLE", "1")
    path, name, file = Path(source), os.fspath(source), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no model at {name}")
        name, file = str(path.parent), {"gguf_file": path.name}
    try:
        import torch  # transformers would go on without
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, **file)
            model = AutoModelForCausalLM.from_pretrained(name, **file, **options)
    except ImportError as error:  # transformers asks for gguf and accelerate when it needs them
        raise KVTCError(
            f"loading {source} needs more packages: pip install 'kvtc-stream[transformers]' "
            f"({error})"
        ) from error
    if left := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise UnsupportedError(
            f"{source} has {len(left)} weights for which the devices of device_map have no room, "
            f"such as {left[0]}: a model whose weights come and go cannot be told from others; "
            f"give it a smaller dtype, more devices, or device_map='cpu' and the memory it needs"
        )
    # Without a device_map, the caller moves it to the GPU if there is one.
    stays = "device_map" in options or not torch.cuda.is_available()
    on_cpu = stays and model.device.type == "cpu"
    if on_cpu and "dtype" not in options and not _computes(model.dtype):
        model = model.float()  # type: ignore[no-untyped-call]
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


def _computes(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in a type."""
    import torch

    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    known: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if dtype not in kinds or not known:
        return True
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{kinds[dtype]}_supported")())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and advice."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
