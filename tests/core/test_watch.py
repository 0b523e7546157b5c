"""How a batch is given to a model, and the part of it that one is looked at with."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.watch import first_rows, real_rows, run_batch

IDS, MASK = torch.arange(12).view(4, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"ids": IDS, "mask": MASK, "use_cache": False}, {"ids": IDS[:2], "mask": MASK[:2], "use_cache": False}),
        ((IDS, MASK, None), (IDS[:2], MASK[:2], None)),
        (IDS, IDS[:2]),
    ],
)
def test_the_first_rows_of_every_tensor_are_taken(batch: Any, expected: Any) -> None:
    torch.testing.assert_close(first_rows(batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "batch",
    [{"ids": IDS, "other": IDS[:3]}, {"ids": IDS, "scale": torch.tensor(2.0)}, (IDS, torch.ones(4)), torch.ones(4), {}],
)
def test_a_batch_whose_tensors_have_no_common_rows_stays_whole(batch: Any) -> None:
    assert first_rows(batch) is batch


def test_a_batch_of_fewer_rows_stays_as_it_is() -> None:
    assert first_rows(IDS[:1]).shape == (1, 3)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0), (0, 3), (2, 0, 3), (2, 4, 3)])
def test_rows_of_every_shape(shape: tuple[int, ...]) -> None:
    rows, told = real_rows(torch.ones(shape), None)
    expected = (math.prod(shape[:-1]), shape[-1] if shape else 1)
    assert (tuple(rows.shape), told) == (expected, True)


class Devices(nn.Module):
    """Where its inputs are."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.ones(2, device=device) for device in devices)

    def forward(self, x: Tensor, more: Any = None) -> list[str]:
        return [x.device.type, *(y.device.type for y in more or [])]


@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [
        (["cuda"], ["cpu", "cpu"], ["cuda", "cuda"]),
        # lengths, say, that the model wants there
        (["cuda"], ["cuda", "cpu"], ["cuda", "cpu"]),
        # it moves them itself
        (["cuda", "cpu"], ["cpu", "cpu"], ["cpu", "cpu"]),
        (["cpu"], ["cpu", "cpu"], ["cpu", "cpu"]),
        (["cpu"], ["cuda", "cpu"], ["cuda", "cpu"]),
        (["meta"], ["cpu", "cpu"], ["cpu", "cpu"]),
        ([], ["cpu", "cpu"], ["cpu", "cpu"]),
    ],
)
def test_a_batch_in_host_memory_goes_to_the_model(model: list[str], batch: list[str], expected: list[str]) -> None:
    # devices that this machine does not have, too
    with FakeTensorMode():
        net = Devices(*model)
        x, y = (torch.ones(2, 2, device=device) for device in batch)
        assert run_batch(net, (x, [y]), 0) == expected
        assert run_batch(net, {"x": x, "more": [y]}, 0) == expected
        assert run_batch(net, x, 0) == expected[:1]
