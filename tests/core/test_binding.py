"""Names of a model's parameters by identity: aliases, views, and which name a site takes."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.binding import Binding
from qcompile.graph import Op


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.lonely = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.head(self.embed(x)), self.lonely.weight)


@pytest.fixture
def model() -> Tied:
    return Tied()


def test_a_shared_parameter_has_all_its_names(model: Tied) -> None:
    binding = Binding(model)
    assert binding.name_of(model.embed.weight) == ("embed.weight", "head.weight")
    assert binding.name_of(model.lonely.weight) == ("lonely.weight",)
    assert set(binding.parameters) == {"embed.weight", "head.weight", "experts", "lonely.weight"}


def test_views_go_by_their_parameter(model: Tied) -> None:
    binding = Binding(model)
    weight = model.lonely.weight
    with torch.no_grad():
        views = [weight.t(), weight.t().t(), weight.view(-1), weight[1:3], weight.detach(), weight.data, weight.T]
        assert [binding.name_of(v) for v in views] == [("lonely.weight",)] * len(views)
        assert binding.name_of(model.experts[1]) == ("experts",)


def test_other_tensors_have_no_name(model: Tied) -> None:
    binding = Binding(model)
    assert binding.name_of(model.lonely.weight.detach().clone()) == ()
    assert binding.name_of(torch.empty(6, 4, device="meta")) == ()
    assert binding.name_of(torch.empty(0)) == ()
    assert binding.site_name(torch.zeros(6, 4), Op.LINEAR) is None


def test_a_tied_weight_is_called_by_the_module_that_the_op_belongs_to(model: Tied) -> None:
    binding = Binding(model)
    assert binding.site_name(model.embed.weight, Op.LINEAR) == "head"
    assert binding.site_name(model.embed.weight, Op.EMBEDDING) == "embed"


def test_a_linear_that_reads_a_table_is_not_called_like_the_table(model: Tied) -> None:
    binding = Binding(model)
    assert binding.site_name(model.lonely.weight, Op.LINEAR) == "lonely.weight"
    assert binding.site_name(model.lonely.weight, Op.EMBEDDING) == "lonely"


def test_a_parameter_not_called_weight_keeps_its_full_name(model: Tied) -> None:
    assert Binding(model).site_name(model.experts, Op.LINEAR) == "experts"


def test_parameters_are_held_weakly(model: Tied) -> None:
    binding = Binding(model)
    del model.experts
    gc.collect()
    assert "experts" not in binding.parameters


def test_a_dead_parameter_lends_its_name_to_nobody(model: Tied) -> None:
    binding = Binding(model)
    address = model.experts.data_ptr()
    del model.experts
    gc.collect()
    reused = [t for t in (torch.empty(3, 4, 5) for _ in range(50)) if t.data_ptr() == address]
    assert all(binding.name_of(t) == () for t in reused)
    assert binding.name_of(nn.Parameter(torch.empty(3, 4, 5))) == ()


def test_a_parameter_that_moved_keeps_its_name(model: Tied) -> None:
    binding = Binding(model)
    model.double()
    assert binding.name_of(model.embed.weight) == ("embed.weight", "head.weight")


def test_a_compiled_model_has_the_names_of_the_model(model: Tied) -> None:
    compiled = torch.compile(model, backend="eager")
    assert Binding(compiled).name_of(model.lonely.weight) == ("lonely.weight",)  # type: ignore[arg-type]
