"""Models and tokenizers from files, without the noise. PyTorch is imported when first used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtc_stream.errors import KVTCError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(source: str | os.PathLike[str], **options: Any) -> tuple[PreTrainedModel, Any]:
    """A causal model, ready for inference, and its tokenizer.

    Parameters
    ----------
    source
        A ``.gguf`` file, a folder, or a name that transformers knows.
    options
        Of ``from_pretrained``: ``dtype``, ...

    Raises
    ------
    KVTCError
        The ``transformers`` extra, or a part of it that this file needs, is not installed.
    """
    # transformers' bar for GGUF files heeds nothing else, and this only before its first import.
    os.environ.setdefault("TQDM_DISABLE", "1")
    path, name, file = Path(source), os.fspath(source), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no model at {name}")
        name, file = str(path.parent), {"gguf_file": path.name}
    try:
        import torch  # noqa: F401  (transformers would go on without)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, **file)
            model = AutoModelForCausalLM.from_pretrained(name, **file, **options)
    except ImportError as error:  # transformers asks for gguf and accelerate when it needs them
        raise KVTCError(
            f"loading {source} needs more packages: pip install 'kvtc-stream[transformers]' "
            f"({error})"
        ) from error
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


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
