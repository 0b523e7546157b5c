import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile.backends.fx import ops
from qcompile.graph import Op
from tests.fx.capture import dynamo_graph, dynamo_graphs, exported_graph, ops_of
from tests.fx.nets import H, K, N


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 3, K)


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (lambda w: w.t(), (H, N)),
        (lambda w: w.T.contiguous(), (H, N)),
        (lambda w: w.permute(1, 0).reshape(2, 5, N), (2, 5, N)),
        (lambda w: w.view(N, 2, 5).transpose(1, 2), (N, 5, 2)),
        (lambda w: w.detach().to(torch.float32), (N, H)),
    ],
)
@pytest.mark.parametrize("meta", [False, True])
def test_a_constant_is_seen_through_views(view, shape, meta):
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(N, H))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sub(view(self.w), x)

    model = Viewed()
    graph = dynamo_graph(model, torch.randn(()), meta=meta)
    (sub,) = ops_of(graph, Op.OTHER)
    constant = graph.constant(graph.inputs(sub)[0])
    assert constant.shape == shape
    assert meta or torch.equal(constant, view(model.w))


def test_a_cast_to_another_dtype_is_no_constant():
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.fc.weight.to(torch.bfloat16))

    graph = dynamo_graph(Cast(), torch.randn(2, K, dtype=torch.bfloat16))
    assert graph.constant(graph.inputs(ops_of(graph, Op.LINEAR)[0])[1]) is None


def test_sizes_that_are_added_are_no_tensors(x):
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(x.shape[0] + x.shape[1])

    (opened,) = dynamo_graphs(Sizes(), x, dynamic=True)
    assert not ops_of(opened.graph, Op.ADD)


LABELS = [
    (lambda x: torch.cumsum(x, 0), "torch.cumsum", "aten.cumsum"),
    (lambda x: x.cos(), "method cos", "aten.cos"),
    (lambda x: F.softplus(x), "torch.nn.functional.softplus", "aten.softplus"),
    (lambda x: x - 1, "operator.sub", "aten.sub"),
    (lambda x: torch.ops.qcompile.quantize_dynamic(x, "int8/token")[0].view(torch.uint8), "method view", "aten.view"),
]


@pytest.mark.parametrize(("function", "dynamo", "exported"), LABELS)
def test_other_ops_are_called_what_torch_calls_them(function, dynamo, exported, x):
    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    for opened, label in ((dynamo_graph, dynamo), (exported_graph, exported)):
        graph = opened(Function(), x)
        assert graph.label(ops_of(graph, Op.OTHER)[-1]) == label


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x.view(torch.int32),
        lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True),
        lambda x: F.embedding(torch.tensor([0]), x[0], max_norm=1.0),
        lambda x: F.silu(x, inplace=True),
        lambda x: F.leaky_relu(x, 0.2, inplace=True),
    ],
)
def test_an_argument_that_changes_the_meaning_makes_another_op(function, x):
    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x.cos())

    graph = dynamo_graph(Function(), x)
    assert graph.op(graph.outputs()[0]) is Op.OTHER


SPELLED = [
    (Op.ADD, lambda x: torch.add(input=x, other=x)),
    (Op.MUL, lambda x: x * 2),
    (Op.SOFTMAX, lambda x: x.softmax(-1)),
    (Op.RELU, lambda x: F.relu(x)),
    (Op.LEAKY_RELU, lambda x: F.leaky_relu(x, negative_slope=0.2)),
    (Op.LEAKY_RELU, lambda x: F.prelu(x, x[0, :, 0])),
    (Op.GELU, lambda x: F.gelu(x, approximate="tanh")),
    (Op.MATMUL, lambda x: x @ x.transpose(1, 2)),
    (Op.ATTENTION, lambda x: F.scaled_dot_product_attention(x, x, value=x)),
    (Op.RESHAPE, lambda x: x.flatten(1)),
    (Op.TRANSPOSE, lambda x: x.permute(2, 0, 1)),
    (Op.CONV, lambda x: F.conv1d(x, x[:, :, :2])),
    (Op.BATCH_NORM, lambda x: F.batch_norm(x, x[0, :, 0], x[0, :, 1])),
]


@pytest.mark.parametrize(("op", "function"), SPELLED)
def test_both_dialects_spell_the_same_op(op, function, x):
    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    seen = []
    for opened in (dynamo_graph, exported_graph):
        graph = opened(Function(), x)
        (value,) = graph.outputs()
        assert graph.op(value) is op
        seen.append([None if v is None else graph.shape(v) for v in graph.inputs(value)])
    assert seen[0] == seen[1]


def test_the_ops_of_the_table_are_registered():
    assert {op.name() for op in (ops.QUANTIZE, ops.QUANTIZE_DYNAMIC, ops.DEQUANTIZE, ops.RMS_NORM)} == {
        "qcompile::quantize",
        "qcompile::quantize_dynamic",
        "qcompile::dequantize",
        "qcompile::rms_norm",
    }
