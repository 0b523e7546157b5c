"""`qcompile tune` without a GPU: which weights it would measure, and what it says to mistakes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile.cli.models import load_model
from qcompile.cli.tune import linear_shapes
from tests.cli.test_commands import run


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.k(x).repeat(1, 1, 2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(8, 32), Attention()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.attention(self.embed(input_ids))


def test_readers_of_one_input_are_one_weight() -> None:
    model = Model()
    # q and k together; o has an input of its own
    assert linear_shapes(model) == [(48, 32), (32, 32), (16, 32)]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_linears_of_a_language_model(tiny_llama: Path) -> None:
    assert linear_shapes(load_model(tiny_llama, torch.bfloat16))[:2] == [(128, 64), (256, 64)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to tune"),
        (("--shape", "4096"), "'4096' is no weight"),
        (("--shape", "0x4096"), "'0x4096' is no weight"),
        (("--shape", "64x64"), "there is none"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("tune", *arguments)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert words in result.output
