"""The demo on a causal language model: perplexity, and divergence from the float model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from qcompile.cli.candidates import FLOAT, comparison, compile_candidates, time_candidates
from qcompile.cli.models import load_model, load_tokenizer
from qcompile.errors import CalibrationError
from qcompile.report.quality import LanguageQuality, token_windows

WINDOW = 512
# bytes of a token id, by the end of the file's name
WIDTHS = {".u32": "uint32", ".uint32": "uint32"}


def language_demo(folder: Path, text: Path, names: list[str], *, windows: int, rounds: int, console: Console) -> Table:
    """The table of the demo.  text: see `read_tokens`.  names: of recipes."""
    model = load_model(folder)
    tokens = read_tokens(text, folder, int(model.config.vocab_size))
    measured = token_windows(tokens, min(WINDOW, _longest(model)), windows)
    examples = [{"input_ids": window[None]} for window in measured]
    candidates = compile_candidates(model, names, examples[0], console)
    timings = time_candidates(candidates, examples[0], rounds, console)
    quality = {name: LanguageQuality() for name in candidates}
    for example in track(examples, "measuring quality", console=console, transient=True):
        logits = {name: candidate.run(**example).logits for name, candidate in candidates.items()}
        for name, found in logits.items():
            quality[name].add(logits[FLOAT], found, example["input_ids"])
    reference = quality[FLOAT].perplexity
    cells = {
        name: (f"{q.perplexity:.3f}", f"{q.perplexity / reference - 1:+.2%}", f"{q.kl:.2e}")
        for name, q in quality.items()
    }
    shape = f"{len(examples)} windows of {measured.shape[1]} tokens"
    title = f"{folder.name}, {shape}, {torch.get_num_threads()} threads"
    return comparison(title, cells, ("perplexity", "change", "KL, nats\na token"), candidates, timings)


def read_tokens(path: Path, folder: Path, vocabulary: int) -> Tensor:
    """Token ids of a file.  Returns int64 [T].

    .txt is read with the tokenizer in the model's folder, .npy is an array of whole numbers; all else holds
    little-endian uint16 (or, ending in .u32 or .uint32, uint32) ids.
    Raises CalibrationError if an id is outside the vocabulary, or if there is none.
    """
    if path.suffix == ".txt":
        encoded = load_tokenizer(folder)(path.read_text(), return_tensors="pt", verbose=False)
        tokens: Tensor = encoded["input_ids"][0]
        return tokens
    tokens = _array(path) if path.suffix == ".npy" else _raw(path)
    if tokens.numel() == 0:
        raise CalibrationError(f"{path} holds no token")
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if wrong.numel():
        raise CalibrationError(
            f"{path} holds token {int(wrong[0])}, the model knows {vocabulary}; these are the tokens of another "
            "model, or 32-bit ones: then end the file's name in .u32"
        )
    return tokens


def _array(path: Path) -> Tensor:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as e:
        raise CalibrationError(f"{path} cannot be read as an array: {e}; write it anew with numpy.save") from e
    if found.dtype.kind not in "iu":
        raise CalibrationError(f"{path} holds {found.dtype}, and token ids are whole numbers")
    return torch.from_numpy(found.astype(np.int64).reshape(-1))


def _raw(path: Path) -> Tensor:
    dtype = torch.uint32 if WIDTHS.get(path.suffix) else torch.uint16
    data = path.read_bytes()
    whole = bytearray(data[: len(data) // dtype.itemsize * dtype.itemsize])
    # torch reads no empty buffer
    return torch.frombuffer(whole, dtype=dtype).long() if whole else torch.empty(0, dtype=torch.int64)


def _longest(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", WINDOW))
