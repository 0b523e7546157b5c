"""Recipes with a budget: each linear gets a width of its own, and all together what was asked for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import qcompile
from qcompile import mixed
from qcompile.artifact import load, save
from qcompile.errors import RecipeError
from qcompile.numerics import snr_db
from qcompile.plan import Plan
from qcompile.recipe import Recipe, recipe_from_table, recipe_to_table
from qcompile.sizes import stored_bytes
from tests.variants import variants

SPEC = "int4/g32/asym/bf16"


class Net(nn.Module):
    """The middle layer has a few large weights in each row, which make every step of it coarse."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.wide = nn.Linear(128, 256), nn.Linear(256, 128), nn.Linear(128, 1024)
        with torch.no_grad():
            self.second.weight[:, ::64] *= 30

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.second(torch.relu(self.first(x)))))


def recipe(budget: str, **more: str) -> Recipe:
    return recipe_from_table({"name": "mine", "rules": [{"weight": SPEC, "solver": "mse", "budget": budget, **more}]})


def bits_of(plan: Plan) -> float:
    sites = [d for d in plan.decisions.values() if d.weight is not None]
    held = sum(8 * stored_bytes(d.weight, *d.shape) for d in sites if d.weight is not None)
    return held / sum(d.shape[0] * d.shape[1] for d in sites)


def batches() -> list[Tensor]:
    return [torch.randn(64, 128) for _ in range(4)]


@pytest.mark.parametrize("bits", variants([2.8, 3.6, 4.75, 6.0], quick=[2.8]))
def test_the_budget_is_kept_and_better_spent_than_evenly(bits: float) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(200, 128)
    plan = qcompile.calibrate(model, batches(), recipe(f"{bits} bits"), progress=False)
    assert bits - 0.4 < bits_of(plan) <= bits
    assert len({str(d.weight) for d in plan.decisions.values()}) > 1
    assert f"{bits_of(plan):.3f} bits a weight" in plan.notes[0]
    uniform = max(width for width in (2, 3, 4, 5, 6) if width + 0.75 <= bits)
    even = recipe_from_table({"name": "even", "rules": [{"weight": f"int{uniform}/g32/asym/bf16", "solver": "mse"}]})
    errors = []
    for chosen in (plan, qcompile.calibrate(model, batches(), even, progress=False)):
        torch._dynamo.reset()
        with torch.no_grad():
            y = torch.compile(model, backend="qcompile", options={"plan": chosen})(x)
            errors.append(snr_db(model(x), y))
    assert errors[0] > errors[1]


def test_more_bits_than_integers_of_a_row_have_take_scales_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 512)).eval()
    table = {"weight": "int4/g64/asym/u4row", "solver": "mse", "budget": "5 bits"}
    given = [torch.randn(64, 256) for _ in range(4)]
    plan = qcompile.calibrate(model, given, recipe_from_table({"rules": [table]}), progress=False)
    specs = [str(d.weight) for d in plan.decisions.values()]
    assert all(spec.endswith("u4row") == (spec[:4] in ("int2", "int3", "int4")) for spec in specs)
    assert bits_of(plan) <= 5


def test_blocks_stay_blocks_and_keep_more_of_heavy_tails_in_as_many_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 512)).eval()
    for linear in (model[0], model[2]):
        linear.weight.data = 0.03 * torch.distributions.StudentT(4.0).sample(linear.weight.shape)
    given, x = [torch.randn(64, 256) for _ in range(4)], torch.randn(200, 256)
    errors = []
    for weight in ("int4/b32/min/u6x8", SPEC):
        table = {"weight": weight, "solver": "mse", "budget": "3.5 bits"}
        plan = qcompile.calibrate(model, given, recipe_from_table({"rules": [table]}), progress=False)
        assert bits_of(plan) <= 3.5
        specs = {str(d.weight) for d in plan.decisions.values()}
        assert all(spec.endswith("/b32/min/u6x8") for spec in specs) is (weight != SPEC)
        torch._dynamo.reset()
        with torch.no_grad():
            y = torch.compile(model, backend="qcompile", options={"plan": plan})(x)
            errors.append(snr_db(model(x), y))
    assert errors[0] > errors[1]


@pytest.mark.parametrize(
    ("given", "solver"),
    variants([(None, "mse"), (None, "hqq"), ("int8/token", "mse")], quick=[(None, "mse"), ("int8/token", "mse")]),
)
def test_weights_on_a_gpu_may_have_code_books(given: str | None, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were on one: normal weights lose least under tables made for them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 512)).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.05 if "weight" in name else 0.0)
    table = {"weight": SPEC, "solver": solver, "budget": "4.5 bits", **({} if given is None else {"input": given})}
    data, takes_books = [torch.randn(64, 256) for _ in range(4)], mixed.takes_books

    def formats() -> set[str]:
        plan = qcompile.calibrate(model, data, recipe_from_table({"rules": [table]}), progress=False)
        found = {d.weight.format.name for d in plan.decisions.values() if d.weight is not None}
        assert ", ".join(sorted(found)) in plan.notes[0]
        return found

    assert not formats() & {"nf4", "iq4_nl"}
    monkeypatch.setattr(mixed, "takes_books", lambda rule, _: takes_books(rule, "cuda"))
    assert bool(formats() & {"nf4", "iq4_nl"}) is (given is None)


def test_a_target_in_decibels_is_met_in_few_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    x, last = torch.randn(400, 128), 0.0
    for db in (15, 20, 30):
        plan = qcompile.calibrate(model, batches(), recipe(f"{db} dB"), progress=False)
        assert last < bits_of(plan) < 8.75
        last = bits_of(plan)
        torch._dynamo.reset()
        with torch.no_grad():
            y = torch.compile(model, backend="qcompile", options={"plan": plan, "lower": False})(x)
            # errors of sites are taken to be independent; a step of bits is up to 6 dB of a site
            assert db - 1.5 < snr_db(model(x), y) < db + 5


def test_it_goes_with_gptq_and_the_plan_survives_the_disk(tmp_path: Path) -> None:
    model = Net().eval()
    plan = qcompile.calibrate(model, batches(), recipe("3.5 bits", solver="gptq"), progress=False)
    assert all(d.solved is not None for d in plan.decisions.values())
    save(plan, tmp_path / "plan")
    again = load(tmp_path / "plan")
    assert {n: str(d.weight) for n, d in again.decisions.items()} == {
        n: str(d.weight) for n, d in plan.decisions.items()
    }


def test_it_is_written_as_a_table() -> None:
    assert recipe_from_table(recipe_to_table(recipe("3.5 bits"))) == recipe("3.5 bits")


def test_a_preset_takes_its_bits_from_its_name() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).eval()
    assert bits_of(qcompile.calibrate(model, batches(), "mixed/3", progress=False)) <= 3
    with pytest.raises(RecipeError, match="whose bits its specs fix"):
        qcompile.calibrate(model, batches(), "int8/3", progress=False)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"weight": SPEC, "budget": "1 bits"}, "the smallest specs come to"),
        ({"weight": SPEC, "budget": "300 dB"}, "not even the largest"),
        ({"input": "int8/token", "budget": "4 bits"}, "no spec of integers by channel or group"),
        ({"weight": SPEC, "budget": "4 bits", "smooth": "search"}, "chosen for one spec"),
        ({"weight": SPEC, "budget": "4 bits", "ops": ["linear", "embedding"]}, "of linears only"),
        ({"weight": SPEC, "budget": "4 bits", "match": "*nothing"}, "matches no site"),
    ],
)
def test_what_cannot_be_met_says_why(table: dict[str, object], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        qcompile.calibrate(Net().eval(), batches(), recipe_from_table({"rules": [table]}), progress=False)


def test_without_data_it_is_refused() -> None:
    with pytest.raises(BackendCompilerFailed, match="has a budget, which takes data"):
        torch.compile(Net().eval(), backend="qcompile", options={"recipe": recipe("4 bits")})(torch.randn(2, 128))
