"""Models from Hugging Face folders. The only place that imports transformers."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qcompile.errors import UnsupportedError


def quiet_transformers() -> ModuleType:
    """The library, saying nothing and asking no network.  Raises UnsupportedError if it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as e:
        raise UnsupportedError("models in Hugging Face folders need transformers: pip install 'qcompile[hf]'") from e
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a Hugging Face folder with the head it was saved with, in that dtype, for inference.

    What a model wants in float32 whatever its dtype, as the frequencies of rotary embeddings, stays so.
    Raises UnsupportedError if the folder holds no such model.
    """
    transformers = quiet_transformers()
    config = _from_folder(transformers.AutoConfig, folder)
    name = next(iter(config.architectures or ()), "AutoModel")
    return _from_folder(getattr(transformers, name, transformers.AutoModel), folder, dtype=dtype).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder.  Raises UnsupportedError if it has none."""
    return _from_folder(quiet_transformers().AutoTokenizer, folder)


def _from_folder(kind: Any, folder: Path, **options: Any) -> Any:
    if not folder.is_dir():
        raise UnsupportedError(f"{folder} is no folder: give the one that holds the model's config.json")
    try:
        return kind.from_pretrained(folder, **options)
    except (OSError, ValueError) as e:
        raise UnsupportedError(f"{kind.__name__} cannot be read from {folder}: {str(e).splitlines()[0]}") from e
