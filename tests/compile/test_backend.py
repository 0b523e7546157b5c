"""The backend as a user meets it: found by name, options checked, uses that it cannot serve refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.backends.fx import inductor
from qcompile.compile import backend
from qcompile.report import Report


def net(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)).eval()


def run(model: nn.Module, x: Tensor | None = None, **options: object) -> Tensor:
    return torch.compile(model, backend="qcompile", options=options)(torch.randn(3, 32) if x is None else x)


def test_found_by_name_without_importing_us() -> None:
    code = (
        "import torch, sys; m = torch.nn.Linear(8, 8).eval(); x = torch.randn(2, 8)\n"
        "with torch.no_grad(): y = torch.compile(m, backend='qcompile')(x); e = (y - m(x)).abs().max()\n"
        "assert 0 < e < 0.1, e; assert 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipee": "int8"}, r"unknown option 'recipee'.*nearest: 'recipe'.*known: recipe, plan, report"),
        ({"recipe": "int9"}, r"unknown recipe 'int9'.*'int8'.*TOML"),
        ({"recipe": 8}, r"option 'recipe' takes .*got 8"),
        ({"min_coverage": 2}, r"share from 0 to 1, got 2"),
        ({"free_weights": "yes"}, r"'free_weights' takes bool, got 'yes'"),
        ({"plan": "int8"}, r"option 'plan' takes Plan.*got 'int8'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=f"(?s){message}"):
        run(net(), **options)


def test_recipe_that_matches_nothing_names_the_nearest_sites(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[rules]]\nmatch = "*.down_prj"\nweight = "int8/channel"\n')
    model = nn.ModuleDict({"down_proj": nn.Linear(32, 8), "up_proj": nn.Linear(32, 8)})
    model.forward = lambda x: model["down_proj"](x) + model["up_proj"](x)
    with pytest.raises(Exception, match=r"(?s)rule 1 \('\*\.down_prj'\).*matches no linear.*down_proj"):
        torch.compile(model.forward, backend="qcompile", options={"recipe": str(recipe)})(torch.randn(2, 32))


@pytest.mark.usefixtures("graphs_only")
def test_minimum_coverage() -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 16)).eval()
    ids = torch.randint(0, 64, (2, 3))
    with pytest.raises(Exception, match=r"(?s)CoverageError.*quantized 20\.0%.*min_coverage=90\.0%.*'0' \[64, 32\]"):
        run(model, ids, min_coverage=0.9)
    assert run(model, ids, min_coverage=0.2).shape == (2, 3, 16)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = net()
    model[2].weight[3, 5] = bad
    with pytest.raises(Exception, match=r"(?s)WeightError.*weight of '2' \[32, 48\] holds 1 NaN or Inf.*checkpoint"):
        run(model)


def test_half_loaded_checkpoint() -> None:
    model = net()
    model[0].weight = nn.Parameter(torch.empty(48, 32, device="meta"))
    with pytest.raises(qcompile.QcompileError, match=r"'0.weight' \[48, 32\] is on the meta device.*load it"):
        qcompile.calibrate(model, [torch.randn(3, 32)], recipe="int8", progress=False)
    with pytest.raises(Exception, match=r"(?s)WeightError.*'0.weight' \[48, 32\] is on the meta device.*load it"):
        run(model.to("meta"), torch.randn(3, 32, device="meta"))


def test_report_goes_to_a_file_and_to_a_function(tmp_path: Path) -> None:
    seen: list[Report] = []
    model, path = net(), tmp_path / "report.json"
    run(model, report=seen.append)
    torch._dynamo.reset()
    run(model, report=path)
    assert [site["name"] for site in json.loads(path.read_text())["sites"]] == ["0", "2"]
    assert len(seen) == 1
    assert seen[0].coverage == 1.0
    assert all(site.kernel == "int8" and site.snr_db > 35 for site in seen[0].sites)


def test_report_before_the_first_call_says_what_to_do() -> None:
    with pytest.raises(qcompile.QcompileError, match="call it once"):
        qcompile.report(torch.compile(net(), backend="qcompile"))


@pytest.mark.usefixtures("graphs_only")
def test_dump_writes_the_graph_after_every_pass(tmp_path: Path) -> None:
    run(net(), dump=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    passes = ("opened", "fold_smooth", "split_outliers", "order_channels", "insert_qdq", "fold_exponent_bias")
    passes = (*passes, "merge_qdq", "lower", "freeze_weights")
    assert names == [f"{number:02d}_{name}.txt" for number, name in enumerate(passes)]
    assert "quantize" not in (tmp_path / names[2]).read_text()
    assert "dequantize" in (tmp_path / names[4]).read_text()
    assert "linear_int8" in (tmp_path / names[-1]).read_text()


def test_training_uses_are_refused_or_told() -> None:
    with torch.enable_grad():
        with pytest.raises(Exception, match=r"(?s)dropout.*training mode.*model\.eval\(\)"):
            run(nn.Sequential(nn.Linear(32, 8), nn.Dropout(0.1)).train())
        with pytest.raises(Exception, match=r"(?s)input .* \[3, 32\] requires grad.*no_grad"):
            run(net(), torch.randn(3, 32, requires_grad=True))
        torch._dynamo.reset()
        with pytest.warns(UserWarning, match="outputs carry no gradient"):
            y = run(net())
        assert not y.requires_grad


def test_mode_is_passed_to_inductor() -> None:
    x = torch.randn(3, 32)
    model, mode = net(), "max-autotune-no-cudagraphs"
    y = torch.compile(model, backend="qcompile", mode=mode)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(y, torch.compile(model, backend="qcompile")(x), atol=2e-2, rtol=0)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no-such-mode"):
        torch.compile(net(), backend="qcompile", mode="no-such-mode")(x)


def test_mode_stands_beside_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself takes a mode or options."""
    asked: list[str] = []

    def options_of(mode: str) -> dict[str, object]:
        asked.append(mode)
        return {}

    monkeypatch.setattr(inductor, "list_mode_options", options_of)
    options = {"recipe": "int8-weight", "mode": "reduce-overhead"}
    model, x = net(), torch.randn(3, 32)
    compiled = torch.compile(model, backend="qcompile", options=options)
    compiled(x)
    assert asked == ["reduce-overhead"]
    assert qcompile.report(compiled).recipe == "int8-weight"
    torch._dynamo.reset()
    with pytest.raises(Exception, match="option 'mode' takes str"):
        torch.compile(net(), backend="qcompile", options={"mode": 3})(x)


def test_functional_weights_and_plain_functions() -> None:
    weight, x = nn.Parameter(torch.randn(16, 32)), torch.randn(3, 32)

    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight) + x @ weight.t()

    y = torch.compile(f, backend="qcompile")(x)
    assert 0 < float((y - f(x)).norm() / f(x).norm()) < 0.02


def test_a_weight_that_is_an_input_is_left_alone_and_said_so() -> None:
    x, w = torch.randn(3, 32), torch.randn(16, 32)
    seen: list[Report] = []
    y = torch.compile(torch.nn.functional.linear, backend="qcompile", options={"report": seen.append})(x, w)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w))
    assert len(seen[0].notes) == 1
    assert "left alone: its weight is no parameter" in seen[0].notes[0]


def test_the_entry_point_is_the_backend() -> None:
    assert torch._dynamo.lookup_backend("qcompile") is backend


@pytest.mark.usefixtures("graphs_only")
def test_caches_do_not_outlive_our_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    tags: list[str] = []
    from qcompile.backends.fx import inductor

    compile_fx = inductor.compile_fx

    def spy(*args: object, **kwargs: object) -> object:
        tags.append(torch.compiler.config.cache_key_tag)
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    run(net())
    torch._dynamo.reset()
    monkeypatch.setattr(inductor, "_source_hash", lambda: "other sources")
    run(net())
    assert tags[0].startswith("qcompile ")
    assert tags[0] != tags[1]
    assert torch.compiler.config.cache_key_tag == ""


@pytest.mark.usefixtures("graphs_only")
def test_batch_norm_without_statistics_is_no_training() -> None:
    model = nn.Sequential(nn.BatchNorm1d(32, track_running_stats=False), nn.Linear(32, 8)).eval()
    x = torch.randn(6, 32)
    torch.testing.assert_close(run(model, x), model(x), atol=0.05, rtol=0)


@pytest.mark.usefixtures("graphs_only")
def test_two_models_in_one_function_keep_their_weights() -> None:
    first, second = nn.Sequential(nn.Linear(32, 32)).eval(), nn.Sequential(nn.Linear(32, 32)).eval()
    reports: list[Report] = []
    x = torch.randn(4, 32)
    options = {"report": reports.append}
    y = torch.compile(lambda x: second(first(x)), backend="qcompile", options=options)(x)
    torch.testing.assert_close(y, second(first(x)), atol=0.05, rtol=0)
    assert [site.name for site in reports[0].quantized] == ["first.0", "second.0"]


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("recipe", ["int8", "int8-weight", "fp8"])
def test_a_linear_on_one_row_without_a_batch(recipe: str) -> None:
    model, x = nn.Linear(32, 8).eval(), torch.randn(32)
    torch.testing.assert_close(run(model, x, recipe=recipe), model(x), atol=0.2, rtol=0)


@pytest.mark.usefixtures("graphs_only")
def test_a_plan_of_a_bare_linear() -> None:
    model, x = nn.Linear(32, 8).eval(), torch.randn(5, 32)
    plan = qcompile.calibrate(model, [x], progress=False)
    torch.testing.assert_close(run(model, x, plan=plan), model(x), atol=0.1, rtol=0)


@pytest.mark.usefixtures("graphs_only")
def test_a_square_weight_read_both_ways_stays_float() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) @ self.fc.weight

    model, x = Net().eval(), torch.randn(5, 16)
    torch.testing.assert_close(run(model, x), model(x))


@pytest.mark.usefixtures("graphs_only")
def test_a_head_that_reads_the_table_itself_is_a_site_of_its_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 32)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) @ self.table.weight.t()

    model, ids = Net().eval(), torch.arange(6)
    fast = torch.compile(model, backend="qcompile", options={"recipe": "int8"})
    torch.testing.assert_close(fast(ids), model(ids), atol=1.0, rtol=0)
    weights = {site.name: site.weight for site in qcompile.report(fast).sites}
    assert weights == {"table": None, "table.weight": "int8/channel"}
    assert set(qcompile.calibrate(model, [ids], progress=False).decisions) == set(weights)


@pytest.mark.usefixtures("graphs_only")
def test_a_dump_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"(?s)cannot dump to .*choose a folder"):
        run(net(), dump=tmp_path / "file" / "folder")


@pytest.mark.usefixtures("graphs_only")
def test_under_vmap() -> None:
    model, x = net(), torch.randn(3, 4, 32)
    fast = torch.compile(lambda x: torch.vmap(model)(x), backend="qcompile", options={"recipe": "int8-weight"})
    torch.testing.assert_close(fast(x), model(x), atol=0.1, rtol=0)
