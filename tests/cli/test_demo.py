"""The demo on small models: every candidate in the table, honest numbers for the float one."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qcompile.cli.embedding import nearest_other, sentences
from qcompile.cli.language import language_demo, read_tokens
from qcompile.errors import CalibrationError

transformers = pytest.importorskip("transformers")


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.bin"
    generator = torch.Generator().manual_seed(0)
    path.write_bytes(torch.randint(0, 128, (256,), generator=generator).to(torch.uint16).numpy().tobytes())
    return path


def test_sentences_fill_whole_batches_in_pairs() -> None:
    texts = sentences()
    assert len(texts) == 64
    assert len(set(texts)) == 64
    assert max(len(t.split()) for t in texts) < 30


def test_nearest_other_is_never_itself() -> None:
    embeddings = torch.eye(4)[[0, 0, 1, 1]]
    assert nearest_other(embeddings).tolist() == [1, 0, 3, 2]


@pytest.mark.slow
def test_language_demo_measures_every_candidate(tiny_llama: Path, token_file: Path) -> None:
    console = Console(width=120, record=True)
    with torch.no_grad():
        table = language_demo(tiny_llama, token_file, ["int8", "nf4"], windows=2, rounds=1, console=console)
    console.print(table)
    rows = [line.split() for line in console.export_text().splitlines()]
    found = {row[0]: row for row in rows if row and row[0] in ("fp32", "int8", "nf4")}
    assert list(found) == ["fp32", "int8", "nf4"]
    assert found["fp32"][2:4] == ["+0.00%", "0.00e+00"]
    # random weights: the divergence of 8 bits is small, of 4 bits larger, and neither is nothing
    assert 0 < float(found["int8"][3]) < float(found["nf4"][3]) < 0.1


def test_tokens_are_read_by_the_width_that_the_name_tells(tmp_path: Path) -> None:
    ids = [0, 1, 127, 5]
    for name, dtype in (("a.bin", torch.uint16), ("a.u32", torch.uint32)):
        (tmp_path / name).write_bytes(torch.tensor(ids).to(dtype).numpy().tobytes())
        assert read_tokens(tmp_path / name, tmp_path, 128).tolist() == ids


def test_tokens_of_another_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(torch.tensor([5, 300]).to(torch.uint16).numpy().tobytes())
    with pytest.raises(CalibrationError, match="token 300, the model knows 128"):
        read_tokens(tmp_path / "a.bin", tmp_path, 128)


def test_text_is_read_with_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "a": 1, "b": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    head = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(head))
    (tmp_path / "text.txt").write_text("b a b c")
    assert read_tokens(tmp_path / "text.txt", tmp_path, 3).tolist() == [2, 1, 2, 0]
