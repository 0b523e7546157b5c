"""Models with data to look at: a causal language model with tokens, an encoder with sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.cli.embedding import minilm_folder, sentences
from qcompile.cli.language import WIDTHS, WINDOW, read_tokens
from qcompile.cli.models import load_model, load_tokenizer
from qcompile.errors import CalibrationError, OptionsError

DEMO = "minilm"
# sentences of a batch, tokens of a sentence
SENTENCES, LONGEST = 8, 128
# batches to measure on
MEASURED = 4
# ends of names that data has in a folder, where tokenizers and notes may lie beside it
ENDINGS = (".txt", ".bin", ".npy", ".u16", ".uint16", *WIDTHS)

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with data: batches to calibrate on, and others to measure on."""

    name: str
    model: nn.Module
    calibrate: Sequence[Batch]
    measure: Sequence[Batch]


def open_subject(name: str, data: Path | None, windows: int, dtype: torch.dtype = torch.float32) -> Subject:
    """The model of a Hugging Face folder, or the demo's, with the first half of the data to calibrate on.

    data: a file or a folder of files (see `ENDINGS`): tokens or .txt for a causal language model, .txt with a sentence
    a line for any other; only the demo brings its own. windows: most batches to calibrate on. dtype: of the model.
    Raises OptionsError without data, UnsupportedError if there is no such model, CalibrationError if data is short.
    """
    folder = minilm_folder() if name == DEMO else Path(name)
    if data is None and name != DEMO:
        raise OptionsError("--data is missing: give tokens or text that the model is used on")
    model = load_model(folder, dtype)
    if is_causal(model):
        if data is None:
            raise OptionsError("--data is missing: give tokens or text that the model is used on")
        tokens = torch.cat([read_tokens(f, folder, int(model.config.vocab_size)) for f in _files(data)])
        first, second = _windows(tokens, model)
        calibrate, measure = ([{"input_ids": w[None]} for w in half] for half in (first, second))
    else:
        lines = sentences() if data is None else _lines(data)
        batches = _encoded(lines, folder, model.config)
        # neighbours may be alike, so that halves would differ
        calibrate, measure = batches[::2], batches[1::2]
    label = name if name == DEMO else folder.resolve().name
    return Subject(name=label, model=model, calibrate=calibrate[:windows], measure=measure[:MEASURED])


def is_causal(model: Any) -> bool:
    """Whether the model predicts the next token, by its class."""
    return any(part in type(model).__name__ for part in ("CausalLM", "LMHead"))


def _files(data: Path) -> list[Path]:
    """The file, or the data of a folder in the order of names.  Raises CalibrationError if there is none."""
    files = sorted(f for f in data.iterdir() if f.suffix in ENDINGS and f.is_file()) if data.is_dir() else [data]
    if not files or not files[0].is_file():
        raise CalibrationError(
            f"no data in {data}: give a file of tokens or text, or a folder of files that end in {', '.join(ENDINGS)}"
        )
    return files


def _windows(tokens: Tensor, model: Any) -> tuple[Tensor, Tensor]:
    """Whole windows of the first and of the second half, int64 [windows, T]."""
    size = min(WINDOW, int(getattr(model.config, "max_position_embeddings", WINDOW)))
    half = tokens.numel() // 2
    count = half // size
    if count == 0:
        raise CalibrationError(f"{tokens.numel()} tokens hold no two windows of {size}: give at least {2 * size}")
    first, second = (part[: count * size].view(count, size).long() for part in (tokens[:half], tokens[half:]))
    return first, second


def _lines(data: Path) -> list[str]:
    try:
        lines = [line for f in _files(data) for line in f.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{data} is no text: an encoder is given .txt with a sentence a line") from e
    if len(lines) < 2 * SENTENCES:
        raise CalibrationError(f"{data} holds {len(lines)} sentences: give at least {2 * SENTENCES}, one a line")
    return lines


def _encoded(lines: Sequence[str], folder: Path, config: Any) -> list[Batch]:
    """Whole batches of sentences, padded to one length.  config: of the model; a decoder is given what it would write.

    That is, for want of better, what the encoder reads.
    """
    whole = list(lines[: len(lines) // SENTENCES * SENTENCES])
    encoded = load_tokenizer(folder)(whole, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    names = [name for name in ("input_ids", "attention_mask") if name in encoded]
    if getattr(config, "is_encoder_decoder", False):
        first = torch.full_like(encoded["input_ids"][:, :1], getattr(config, "decoder_start_token_id", None) or 0)
        encoded["decoder_input_ids"] = torch.cat([first, encoded["input_ids"][:, :-1]], dim=1)
        names.append("decoder_input_ids")
    return [{name: encoded[name][i : i + SENTENCES] for name in names} for i in range(0, len(whole), SENTENCES)]
