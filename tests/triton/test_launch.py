"""A kernel is launched through Triton once for each kind of arguments, and by its binary from then on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from triton.tools.tensor_descriptor import TensorDescriptor

from qcompile.backends.triton import (
    add_parts,
    eight_bit,
    hopper,
    int4_int8_linear,
    int4_int8_table,
    int4_int8_unpack,
    quantize_rows,
    width_few_rows,
    width_many_rows,
    width_unpack,
)
from qcompile.backends.triton import launch as module
from qcompile.backends.triton.eight_bit import Operands
from qcompile.backends.triton.eight_bit_table import FEW_ROWS, MANY_ROWS, SAFE
from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.width_table import TABLES, FewRows, ManyRows, Member, Unpack
from qcompile.backends.triton.widths import Packed
from qcompile.spec import parse_spec

GRID = (4, 1, 1)


@dataclass
class Kernel:
    """Notes its launches: those by Triton with options, those of a binary without."""

    arg_names: tuple[str, ...] = ("x", "N", "BLOCK")
    by_triton: list[tuple[Any, ...]] = field(default_factory=list)
    by_binary: list[tuple[Any, ...]] = field(default_factory=list)
    compiles: bool = True

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            self.by_triton.append((grid, args, named))
            return Binary(self) if self.compiles else None

        return run


@dataclass
class Binary:
    kernel: Kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.kernel.by_binary.append((grid, args))


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    module._kept.clear()
    yield
    module._kept.clear()


def counts(kernel: Kernel) -> tuple[int, int]:
    return len(kernel.by_triton), len(kernel.by_binary)


def test_the_second_launch_is_the_binarys() -> None:
    kernel, x = Kernel(), torch.ones(32)
    for grid in (GRID, (9, 2, 1)):
        launch(kernel, grid, (x, 32), {"BLOCK": 16}, num_warps=4)
    assert kernel.by_triton == [(GRID, (x, 32), {"BLOCK": 16, "num_warps": 4})]
    # constants follow by their place
    assert kernel.by_binary == [((9, 2, 1), (x, 32, 16))]
    # other values at an address that divides as before
    launch(kernel, GRID, (torch.zeros(32), 32), {"BLOCK": 16}, num_warps=4)
    assert counts(kernel) == (1, 2)


OTHERS = {
    "a type": (torch.ones(32).bfloat16(), 32, 16, 4),
    "an address": (torch.ones(33)[1:], 32, 16, 4),
    "a length": (torch.ones(32), 31, 16, 4),
    "none": (None, 32, 16, 4),
    "a constant": (torch.ones(32), 32, 32, 4),
    "an option": (torch.ones(32), 32, 16, 8),
    "a descriptor": (TensorDescriptor.from_tensor(torch.ones(32, 32), [16, 16]), 32, 16, 4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_may_need_another_binary_goes_through_triton(name: str) -> None:
    kernel = Kernel()
    x, N, block, warps = OTHERS[name]
    for _ in range(2):
        launch(kernel, GRID, (torch.ones(32), 32), {"BLOCK": 16}, num_warps=4)
        launch(kernel, GRID, (x, N), {"BLOCK": block}, num_warps=warps)
    assert counts(kernel) == (2, 2)


def test_floats_are_one_kind_whatever_their_value() -> None:
    kernel = Kernel(arg_names=("x", "eps", "BLOCK"))
    for eps in (1e-5, 1.0, 0.0):
        launch(kernel, GRID, (torch.ones(32), eps), {"BLOCK": 16})
    # Triton has a constant for the length 1
    launch(kernel, GRID, (torch.ones(32), 1), {"BLOCK": 16})
    assert counts(kernel) == (2, 2)


def test_descriptors_of_other_blocks_are_other_kinds() -> None:
    kernel = Kernel()
    for block in ([16, 16], [16, 32], [16, 16]):
        launch(kernel, GRID, (TensorDescriptor.from_tensor(torch.ones(32, 32), block), 32), {"BLOCK": 16})
    assert counts(kernel) == (2, 1)


def test_constants_out_of_order_are_an_error() -> None:
    kernel = Kernel(arg_names=("x", "A", "B"))
    x: Tensor = torch.ones(1)
    with pytest.raises(AssertionError, match="constants are"):
        launch(kernel, GRID, (x,), {"B": 1, "A": 2})


def test_the_interpreter_has_no_binary() -> None:
    kernel = Kernel(compiles=False)
    for _ in range(2):
        launch(kernel, GRID, (torch.ones(32), 32), {"BLOCK": 16})
    assert counts(kernel) == (2, 0)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    kernel = Kernel()
    for N in range(10):
        launch(kernel, GRID, (torch.ones(1), N), {"BLOCK": 16})
        assert len(module._kept) <= 3


def operands() -> Operands:
    x, w = torch.ones(2, 64, dtype=torch.int8), torch.ones(32, 64, dtype=torch.int8)
    return Operands(x=x, w=w, scale_x=torch.ones(2, 1), scale_w=torch.ones(32, 1), dtype=torch.bfloat16)


def int4(kind: type) -> tuple[Any, ...]:
    words, scales = torch.ones(4, 3, 1024, dtype=torch.int32), torch.ones(4, 3, 64, dtype=torch.int32)
    weight = Packed(words=words, scales=scales, width="int4")
    config = next(e.config for e in TABLES["int4"] if isinstance(e.config, kind))
    if kind is Unpack:
        return weight, torch.empty(256, 384, dtype=torch.bfloat16), config
    member = Member(weight=weight, N=256, config=config)
    x, y = torch.ones(2, 384).bfloat16(), torch.empty(2, 256, dtype=torch.bfloat16)
    return x, [member, member] if kind is FewRows else member, None, y.repeat(1, 2) if kind is FewRows else y


def w4a8() -> int4_int8_linear.Operands:
    return int4_int8_linear.Operands(
        x=torch.ones(2, 384, dtype=torch.int8),
        scale_x=torch.ones(2, 1),
        zero=None,
        words=torch.ones(4, 3, 1024, dtype=torch.int32),
        scales=torch.ones(4, 3, 64, dtype=torch.int32),
        sums=torch.ones(256),
        bias=None,
    )


LAUNCHERS = {
    "eight_bit": lambda: eight_bit.matmul(operands(), SAFE[0].config),
    "eight_bit by descriptors": lambda: eight_bit.matmul(operands(), FEW_ROWS[0].config),
    "hopper": lambda: hopper.matmul(operands(), MANY_ROWS[0].config),
    "few_rows": lambda: width_few_rows.few_rows(*int4(FewRows)),
    "many_rows": lambda: width_many_rows.many_rows(*int4(ManyRows)),
    "unpack": lambda: width_unpack.unpack(*int4(Unpack)),
    "w4a8": lambda: int4_int8_linear._multiply(w4a8(), torch.bfloat16, int4_int8_table.TABLE[0].config),
    "w4a8 as int8": lambda: int4_int8_unpack.unpack(w4a8().words, w4a8().scales, torch.ones(256, 1), 384, 4),
    "quantize_rows": lambda: quantize_rows.quantize_rows(torch.ones(2, 384), parse_spec("int8/token/asym"), eps=1e-5),
    "add_parts": lambda: add_parts.add_parts(torch.ones(2, 3, 4), None, torch.ones(3, 4)),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_give_what_their_kernel_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []
    for launcher in (
        add_parts,
        eight_bit,
        hopper,
        width_many_rows,
        int4_int8_linear,
        int4_int8_unpack,
        width_few_rows,
        width_unpack,
        quantize_rows,
    ):
        monkeypatch.setattr(launcher, "launch", lambda *args, **options: given.append(args))
        monkeypatch.setattr(launcher, "processors_of", lambda device: 132, raising=False)
    LAUNCHERS[name]()
    for kernel, grid, args, constants in given:
        assert len(grid) == 3
        assert kernel.arg_names[len(args) :] == list(constants)
    assert given
