"""`qcompile study formats` on distributions and on small models: the table, the picture and the JSON."""

import importlib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qcompile.cli import app
from qcompile.study import BOUNDS, DENSITIES, FAMILIES, Study, study_density
from tests.cli.conftest import LOUD
from tests.trained import MODEL, TOKENS, needs_model

RESULT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "results" / "format_study.json"
NAMES = [name for names in FAMILIES.values() for name in names]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["study", "formats", *(str(a) for a in arguments)], env={"COLUMNS": "240"})


def found(path: Path, *arguments: object) -> Study:
    result = run(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    return Study.from_json(path.read_text())


def test_distributions_need_no_model(tmp_path: Path) -> None:
    result = run("--json", tmp_path / "study.json")
    assert result.exit_code == 0, result.output
    study = Study.from_json((tmp_path / "study.json").read_text())
    assert [s.name for s in study.subjects] == list(DENSITIES)
    assert set(study.formats) == {*NAMES, *BOUNDS}
    assert study.command == "qcompile study formats"
    e2m5 = next(line for line in result.output.splitlines() if line.split()[:1] == ["e2m5"])
    assert e2m5.split()[1:] == [f"{s.bits('e2m5'):.2f}" for s in study.subjects]


def test_the_result_in_the_repository_is_what_is_found_now() -> None:
    for subject in Study.from_json(RESULT.read_text()).of("distribution"):
        expected = study_density(subject.name, [fit.format for fit in subject.fits])
        assert [f.bits for f in subject.fits] == pytest.approx([f.bits for f in expected.fits], abs=1e-3)
        assert subject.best == expected.best


def test_the_result_in_the_repository_has_the_tensors_of_a_model() -> None:
    study = Study.from_json(RESULT.read_text())
    assert study.command.startswith("qcompile study formats llama28m ")
    assert "/" not in study.command
    assert len(study.of("weight")) > len(study.of("input")) > 0


def test_the_picture_is_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("--png", tmp_path / "study.png", "--formats", "int8,e4m3,int4")
    assert result.exit_code == 0, result.output
    data = (tmp_path / "study.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    # two panels side by side, in pixels
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width > 1.5 * height
    assert [p.name for p in tmp_path.iterdir()] == ["study.png"]


def test_weights_of_a_model_without_data(tiny_llama: Path, tmp_path: Path) -> None:
    study = found(tmp_path / "s.json", tiny_llama, "--formats", "int8,e2m5,e4m3,int4,e2m1")
    assert study.of("input") == ()
    names = [s.name for s in study.of("weight")]
    assert len(names) == len(set(names)) == 16
    assert {"model.embed_tokens", "model.layers.1.mlp.down_proj", "lm_head"} <= set(names)
    # as it was initialized: normal, and in rows of 64 hardly a value is beyond 3 rms
    plain = next(s for s in study.subjects if s.name == "model.layers.1.mlp.up_proj")
    assert plain.granularity == "channel"
    assert plain.best[8] == "int8"
    assert plain.peak < 3
    assert plain.kurtosis == pytest.approx(3, abs=0.3)


def test_inputs_of_a_model_with_data(tiny_llama: Path, tokens: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = (tiny_llama, "--data", tokens, "--windows", 2, "--formats", "int8,e2m5,e3m4,e4m3,e5m2")
    result = run(*arguments, "--json", tmp_path / "s.json", "--png", tmp_path / "s.png")
    assert result.exit_code == 0, result.output
    study = Study.from_json((tmp_path / "s.json").read_text())
    # one for q, k and v, one for gate and up, of each layer
    assert len(study.of("input")) == 2 * 4 + 1
    first = study.of("input")[0]
    assert first.name == "model.layers.0.self_attn.q_proj"
    assert first.granularity == "tensor"
    assert first.best == {8: "e3m4"}
    assert f"channel {LOUD} reaches" in first.reason
    assert "without it e2m5 would be best" in first.reason
    assert first.reason in result.output
    assert "mean accuracy: int8" in result.output
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    token = found(tmp_path / "t.json", *arguments, "--inputs", "token", "--weights", "g32")
    assert {s.granularity for s in token.of("input")} == {"token"}
    assert {s.granularity for s in token.of("weight")} == {"g32"}
    # files by their names, and nothing of where they or the results lie
    assert token.command == (
        f"qcompile study formats {tiny_llama.name} --formats int8,e2m5,e3m4,e4m3,e5m2 --weights g32 --inputs token "
        f"--data {tokens.name} --windows 2"
    )


def test_a_picture_without_matplotlib_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # the package has a function of its part's name
    drawing = importlib.import_module("qcompile.report.formats")
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    result = run("--png", tmp_path / "study.png", "--json", tmp_path / "study.json")
    assert result.exit_code == 2
    assert "pip install 'qcompile[plots]'" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "{tokens}"), "--data is of no use without a model"),
        (("--formats", "int8,int9"), "unknown format 'int9'"),
        (("--formats", "quantile8"), "take lloyd8"),
        (("{model}", "--weights", "b16x16"), "take tensor, channel"),
        (("{model}", "--inputs", "row"), "unknown granularity 'row'"),
        (("--png", "{tokens}/absent/x.png"), "there is no folder"),
        (("absent",), "absent is no folder"),
        (("{model}", "--weights", "g48"), "at the weight of 'model.embed_tokens'; int8/g16 fits"),
        (("{model}", "--data", "{tokens}", "--inputs", "g48"), "at the input of 'model.layers.0.self_attn.q_proj'"),
    ],
    ids=["data", "format", "learned", "blocks", "granularity", "folder", "model", "weight groups", "input groups"],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: str, tiny_llama: Path, tokens: Path
) -> None:
    result = run(*(a.format(model=tiny_llama, tokens=tokens) for a in arguments))
    assert result.exit_code == 2
    assert words in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1


@needs_model
@pytest.mark.slow
def test_a_trained_language_model_is_as_the_article_says(tmp_path: Path) -> None:
    study = found(tmp_path / "s.json", MODEL, "--data", TOKENS, "--windows", 2, "--formats", ",".join(FAMILIES[8]))
    weights, inputs = study.of("weight"), study.of("input")
    # weights are nearly normal: two exponent bits, then integers; four and five waste mantissa
    assert sum(s.best[8] == "e2m5" for s in weights) > 0.8 * len(weights)
    assert all(s.bits("int8") > s.bits("e4m3") > s.bits("e5m2") for s in weights)
    # inputs with tails want more exponent bits than weights
    assert any(s.best[8] == "e3m4" for s in inputs)
