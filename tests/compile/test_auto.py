"""A recipe that leaves the format open, on a model whose layers want different ones."""

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.numerics import snr_db
from qcompile.recipe import recipe_from_table

LOUD = [3, 40]


class Net(nn.Module):
    """The second layer reads channels that are far louder than others, and hardly uses them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.first.weight[LOUD] *= 300
            self.second.weight[:, LOUD] /= 300

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(x) + self.first(x))


def recipe(name: str, **more: str) -> qcompile.Recipe:
    rule = {"weight": f"{name}/channel", "input": f"{name}/tensor", **more}
    return recipe_from_table({"name": "mine", "rules": [rule]})


def test_each_layer_gets_its_format_and_the_model_gains() -> None:
    model = Net().eval()
    batches = [torch.randn(64, 64) for _ in range(4)]
    x = torch.randn(64, 64)
    found = {}
    for name, chosen in (
        ("int8", recipe("int8")),
        ("fp8", recipe("fp8_e4m3")),
        ("auto", recipe("int8", format="auto")),
    ):
        plan = qcompile.calibrate(model, batches, chosen)
        torch._dynamo.reset()
        with torch.no_grad():
            fast = torch.compile(model, backend="qcompile", options={"plan": plan})  # type: ignore[arg-type]
            found[name] = snr_db(model(x), fast(x))
        if name == "auto":
            specs = {d.name: (str(d.weight), str(d.input)) for d in plan.decisions.values()}
    assert specs == {"first": ("int8/channel", "int8/tensor"), "second": ("fp8_e4m3/channel", "fp8_e4m3/tensor")}
    assert found["auto"] > max(found["int8"], found["fp8"])


def test_without_data_weights_decide() -> None:
    # the first layer's weights are evenly spread, those of the second normal
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    found = {}
    with torch.no_grad():
        model[2].weight.normal_(generator=torch.Generator().manual_seed(0)).div_(8)
        x = torch.randn(64, 64)
        for name in ("int4", "nf4", "auto"):
            rule = {"weight": "int4/g32", "format": "auto"} if name == "auto" else {"weight": f"{name}/g32"}
            chosen = recipe_from_table({"name": name, "rules": [rule]})
            torch._dynamo.reset()
            fast = torch.compile(model, backend="qcompile", options={"recipe": chosen})  # type: ignore[arg-type]
            found[name] = snr_db(model(x), fast(x))
    assert found["auto"] > max(found["int4"], found["nf4"])
    text = qcompile.report(fast).to_json()
    assert "int4/g32" in text
    assert "nf4/g32" in text


def test_a_second_shape_chooses_alike() -> None:
    model = nn.Linear(64, 64).eval()
    chosen = recipe_from_table({"name": "mine", "rules": [{"weight": "nf4/g32", "format": "auto"}]})
    torch._dynamo.reset()
    with torch.no_grad():
        fast = torch.compile(model, backend="qcompile", dynamic=False, options={"recipe": chosen})  # type: ignore[arg-type]
        x = torch.randn(9, 64)
        assert torch.allclose(fast(x)[:4], fast(x[:4]), atol=1e-5)
    assert qcompile.report(fast).to_json().count('"int4/g32"') == 1


def test_a_choice_needs_values_that_free_weights_gives_up() -> None:
    chosen = recipe_from_table({"name": "mine", "rules": [{"weight": "nf4/g32", "format": "auto"}]})
    options = {"recipe": chosen, "free_weights": True}
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"let qcompile\.calibrate"):
        torch.compile(nn.Linear(64, 64).eval(), backend="qcompile", options=options)(torch.randn(2, 64))  # type: ignore[arg-type]
