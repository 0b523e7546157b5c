"""Channels are followed through calls that only move elements: exactly where torch itself would put them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.fx.door import open_exported
from qcompile.backends.fx.graph import FxGraph
from qcompile.channels import numbered
from qcompile.graph import Op
from tests.fx.capture import dynamo_graph, dynamo_graphs, exported_graph

# sizes that shapes alone cannot tell apart
SHAPE = (4, 4, 2, 4)

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(16, 8),
    "view as": lambda x: x.view_as(torch.ones(4, 4, 8)),
    "reshape": lambda x: x.reshape(2, 8, -1, 2),
    "flatten": lambda x: x.flatten(1, 2),
    "unflatten": lambda x: x.unflatten(-1, (2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "contiguous": lambda x: x.transpose(1, 3).contiguous().view(4, -1),
    "transpose": lambda x: x.transpose(1, 3),
    "permute": lambda x: x.permute(3, 0, 2, 1),
    "movedim": lambda x: torch.movedim(x, -1, 0),
    "T": lambda x: x.flatten(0, 2).T,
    "slice": lambda x: x[:, -1:],
    "slice of channels": lambda x: x[..., 1::2],
    "index": lambda x: x[:, 2],
    "new axis": lambda x: x[:, None, :, :1],
    "list of indices": lambda x: x[..., [2, 0]],
    "select": lambda x: x.select(-1, 3),
    "narrow": lambda x: torch.narrow(x, 3, 1, 2),
    "split": lambda x: x.split([1, 3], dim=-1)[1],
    "split evenly": lambda x: torch.split(x, 2, dim=3)[1],
    "chunk": lambda x: x.chunk(2, dim=-1)[1],
    "unbind": lambda x: x.unbind(2)[1],
    "expand": lambda x: x[:, :, None].expand(4, 4, 3, 2, 4),
    "expand, then merge": lambda x: x[:, :, :, None].expand(4, 4, 2, 3, 4).reshape(4, 4, 6, 4),
    "repeat": lambda x: x.repeat(1, 2, 3, 1),
    "repeat of channels": lambda x: x.repeat(1, 1, 1, 2),
    "interleave": lambda x: x.repeat_interleave(3, dim=-1),
    "interleave heads": lambda x: torch.repeat_interleave(x.transpose(1, 3), 2, dim=1),
    "casts": lambda x: x.double().to(torch.float16).float(),
    "heads last": lambda x: x.reshape(4, 4, 4, 2).transpose(2, 3).flatten(2),
    "tokens among channels": lambda x: x.transpose(0, 3).reshape(4, 4, 8),
}


class Net(nn.Module):
    def __init__(self, run: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(x)


def followed(graph: FxGraph) -> Tensor | tuple[Tensor, ...] | None:
    """The channels of the graph's output, if its input carries its own."""
    (value,) = graph.outputs()
    path = []
    while graph.op(value) is not Op.INPUT:
        path.append(value)
        value = graph.inputs(value)[0]
    channels = numbered(4, 4)
    for step in reversed(path):
        channels = graph.moved(step, channels)
        if channels is None:
            return None
    return channels


@pytest.mark.parametrize("opened", [dynamo_graph, exported_graph])
@pytest.mark.parametrize("name", MOVES)
def test_channels_go_where_torch_puts_them(name: str, opened: Callable[..., FxGraph]) -> None:
    expected = MOVES[name](numbered(4, 4).expand(SHAPE).float()).long()
    found = followed(opened(Net(MOVES[name]), torch.randn(SHAPE)))
    assert torch.equal(found.expand(expected.shape), expected)
    # of size 1 wherever nothing changes
    for d in range(expected.dim()):
        assert (found.shape[d] == 1) == bool((expected == expected.narrow(d, 0, 1)).all())


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x + 0,
        lambda x: x.sin(),
        lambda x: x.int().float(),
        lambda x: x.flip(-1),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x.view(torch.int32),
        lambda x: x.cumsum(-1),
        lambda x: x[:0].reshape(0, 8),
    ],
)
def test_anything_else_is_not_followed(run: Callable[[Tensor], Tensor]) -> None:
    assert followed(dynamo_graph(Net(run), torch.randn(SHAPE))) is None


def test_what_is_written_to_is_not_followed() -> None:
    def run(x: Tensor) -> Tensor:
        y = x.view(16, 8)
        x[0].mul_(2)
        return y.view(SHAPE)

    assert followed(dynamo_graph(Net(run), torch.randn(SHAPE))) is None


def test_dynamic_sizes_are_followed_too() -> None:
    def run(x: Tensor) -> Tensor:
        b, t, h, d = x.shape
        return x.transpose(1, 2).reshape(b * h, t, d).view(-1, h, t, d).transpose(1, 2).reshape(b, t, h * d)

    (opened,) = dynamo_graphs(Net(run), torch.randn(6, 5, 2, 4), dynamic=True)
    assert followed(opened.graph).flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_look_at_the_shape_carries_nothing() -> None:
    x = torch.randn(SHAPE)
    net = Net(lambda x: x.reshape(x.shape[0] * 2, -1) * x.shape[0])
    graph = open_exported(torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)))
    looks = [v for v in graph.values() if graph.label(v) == "aten.sym_size"]
    assert looks
    assert all(graph.moved(v, numbered(4, 4)).numel() == 0 for v in looks)
