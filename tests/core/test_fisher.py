"""What errors of output features cost, against closed forms and finite differences; and choices that go by it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.cases import joined
from qcompile.errors import CalibrationError, RecipeError
from qcompile.fisher import output_fisher
from qcompile.noise import Probe, Treatment, own_db
from qcompile.numerics import fake_quantize, snr_db
from qcompile.recipe import recipe_from_table, recipe_to_table
from qcompile.spec import parse_spec


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Logits(Two):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


def test_outputs_are_means_of_unit_normals() -> None:
    model = Two()
    found = output_fisher(model, [torch.randn(500, 4, 8) for _ in range(4)])
    tokens = 500 * 4 * 4
    # expected: the identity behind the last linear, and W.T @ W's diagonal behind the one before
    torch.testing.assert_close(found["second"], torch.full((4,), float(tokens)), rtol=0.1, atol=0)
    expected = tokens * model.second.weight.detach().square().sum(0)
    torch.testing.assert_close(found["first"], expected, rtol=0.15, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("trains", [True, False])
def test_logits_cost_what_the_divergence_does(trains: bool) -> None:
    model = Logits().requires_grad_(trains)
    x = torch.randn(20_000, 8)
    found = output_fisher(model, [{"x": x}])
    p = (logits := model(x)["logits"].detach().double()).softmax(-1)
    torch.testing.assert_close(found["second"].double(), (p * (1 - p)).sum(0), rtol=0.1, atol=0)
    # half of it times a small error squared is the divergence, feature by feature
    for n in range(4):
        moved = logits.clone()
        moved[:, n] += 1e-3
        divergence = (p * (p.log() - moved.log_softmax(-1))).sum()
        assert divergence == pytest.approx(0.5e-6 * float(found["second"][n]), rel=0.1)


def test_what_a_mask_hides_says_nothing() -> None:
    model, x = Logits(), torch.randn(2, 500, 8)
    mask = torch.ones(2, 500, dtype=torch.int64)
    mask[:, 300:] = 0
    found = output_fisher(model, [{"x": x, "attention_mask": mask}])
    p = model(x[:, :300])["logits"].detach().double().softmax(-1).flatten(0, 1)
    torch.testing.assert_close(found["second"].double(), (p * (1 - p)).sum(0), rtol=0.2, atol=0)
    x[:, 300:] = torch.nan
    again = output_fisher(model, [{"x": x, "attention_mask": mask}])
    assert torch.equal(found["second"], again["second"])


def test_a_mask_as_large_as_a_pooled_output_is_not_of_its_features() -> None:
    class Pooled(Two):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x.mean(1))

    mask = torch.tensor([[1, 1, 0, 0]] * 200)
    found = output_fisher(Pooled(), [{"x": torch.randn(200, 4, 8), "attention_mask": mask}])
    torch.testing.assert_close(found["second"], torch.full((4,), 200.0), rtol=0.5, atol=0)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_inputs_of_any_dimensions(shape: tuple[int, ...]) -> None:
    for model in (Two(), Logits()):
        assert output_fisher(model, [torch.randn(shape)])["first"].shape == (6,)


def test_one_logit_is_a_mean() -> None:
    class Score(Two):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    assert output_fisher(Score(), [torch.randn(300, 8)])["second"].item() == pytest.approx(300, rel=0.5)


def test_writing_into_an_output_breaks_nothing() -> None:
    class Writes(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y += 1
            return self.second(y)

    assert set(output_fisher(Writes().requires_grad_(False), [torch.randn(5, 8)])) == {"first", "second"}


class Cut(Two):
    """The gradient ends behind one linear, or before the outputs."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y.detach() if self.where == "between" else y)
        return z.detach() if self.where == "behind" else z * (torch.inf if self.where == "inf" else 1)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("behind", "the outputs of Cut have no gradient"),
        ("between", "no gradient of the model's outputs reaches 'first'"),
        ("inf", "batch 0 gives NaN or Inf in the gradient of 'first'"),
    ],
)
def test_gradients_that_are_missing_are_named(where: str, reason: str) -> None:
    rule = {"weight": "fp4_e2m1/channel", "format": "float", "objective": "fisher", "input": "fp4_e2m1/token"}
    with pytest.raises(CalibrationError, match=reason):
        qcompile.calibrate(Cut(where), [torch.randn(5, 8)], recipe_from_table({"rules": [rule]}), progress=False)


def test_features_weigh_errors() -> None:
    probe = Probe(
        weight=torch.randn(3, 16),
        rows=torch.randn(5, 16),
        counts=torch.ones(5).double(),
        features=torch.tensor([1, 0, 4.0]),
    )
    treatment = Treatment(weight=parse_spec("int4/channel"))
    doubled = Probe(weight=probe.weight[[0, 2, 2, 2, 2]], rows=probe.rows, counts=probe.counts)
    assert probe.after(treatment) == pytest.approx(doubled.after(treatment))
    assert probe.scaled(torch.full((16,), 2.0)).features is probe.features
    assert joined([probe, probe]).features is not None
    assert joined([probe, replace(probe, features=None)]).features is None


def test_a_weights_own_error_is_the_weights() -> None:
    weight, spec = torch.randn(20, 32), parse_spec("fp4_e2m1/channel")
    assert own_db(weight, Treatment(weight=spec)) == snr_db(weight, fake_quantize(weight, spec))


class Uneven(nn.Module):
    """A weight of which a part is powers of two, as E3M0 has them, and the rest is evenly spread, as E1M2 has them.

    by: "rows", of which only the spread ones reach the logits; "columns", of which the spread ones have small inputs.
    """

    def __init__(self, by: str) -> None:
        super().__init__()
        self.norm, self.hidden, self.out = nn.RMSNorm(64), nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)
        powers = torch.exp2(torch.randint(-3, 3, (64, 64)).float()) * torch.randn(64, 64).sign()
        spread = torch.rand(64, 64) * 8 - 4
        with torch.no_grad():
            if by == "rows":
                self.hidden.weight[:32], self.hidden.weight[32:] = spread[:32] / 4, powers[32:]
                self.out.weight[:, 32:] *= 1e-3
            else:
                self.hidden.weight[:, :16], self.hidden.weight[:, 16:] = powers[:, :16], spread[:, 16:]
                self.norm.weight[16:] *= 0.05

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.hidden(self.norm(x)))}


def recipe(objective: str, others: str = "") -> qcompile.Recipe:
    rule = {"weight": "fp4_e2m1/channel", "input": "fp8_e4m3/token", "format": "float", "solver": "mse"}
    rest = rule | {"objective": others} if others else {}
    return recipe_from_table({"rules": [rule | {"match": "hidden", "objective": objective}, {"match": "*", **rest}]})


def format_of(model: nn.Module, chosen: qcompile.Recipe) -> str:
    batches = [torch.randn(64, 64) for _ in range(4)]
    spec = qcompile.calibrate(model, batches, chosen, progress=False).decisions["hidden"].weight
    assert spec is not None
    return spec.format.name


@pytest.mark.parametrize("others", ["", "output", "fisher"])
def test_fisher_looks_at_what_reaches_the_logits(others: str) -> None:
    torch.manual_seed(0)
    model = Uneven("rows").eval()
    assert format_of(model, recipe("output", others)) == "fp4_e3m0"
    assert format_of(model, recipe("fisher", others)) == "fp4_e1m2"


def test_a_weights_own_error_does_not_look_at_inputs() -> None:
    torch.manual_seed(0)
    model = Uneven("columns").eval()
    assert format_of(model, recipe("output")) != "fp4_e1m2"
    assert format_of(model, recipe("weight")) == "fp4_e1m2"


def test_how_large_gradients_are_changes_nothing() -> None:
    class Loud(Uneven):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)["logits"] * 1000

    class Soft(Uneven):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)["logits"] / 1000

    rule = {
        "weight": "fp4_e2m1/channel",
        "input": "fp4_e2m1/tensor",
        "format": "float",
        "shift": 3,
        "objective": "fisher",
    }
    chosen = []
    for kind in (Loud, Soft):
        torch.manual_seed(0)
        model, batches = kind("rows").eval(), [torch.randn(64, 64) for _ in range(4)]
        chosen.append(qcompile.calibrate(model, batches, recipe_from_table({"rules": [rule]}), progress=False))
    assert chosen[0].decisions == chosen[1].decisions


def test_it_is_written_as_a_table_and_checked() -> None:
    assert recipe_from_table(recipe_to_table(recipe("fisher"))) == recipe("fisher")
    assert "objective" not in recipe_to_table(recipe("output"))["rules"][0]
    for table, reason in (
        ({"weight": "int8/channel", "objective": "fisher"}, "it is formats that are chosen by it"),
        ({"weight": "fp4_e2m1/channel", "format": "float", "objective": "hessian"}, "none such; nearest"),
    ):
        with pytest.raises(RecipeError, match=reason):
            qcompile.calibrate(Two(), [torch.randn(4, 8)], recipe_from_table({"rules": [table]}), progress=False)
