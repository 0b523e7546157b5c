"""Which problems the kernels for weights of 2 to 8 bits run, which are left to others, and why."""

import pytest
import torch

from qcompile.backends.fx.kernels import choose, weight_triton
from qcompile.backends.fx.kernels.problem import Problem
from qcompile.spec import parse_spec


@pytest.mark.parametrize(
    ("weight", "more", "reason"),
    [
        ("int4/g16", {}, "multiples of 128"),
        ("fp4_e2m1/g8", {}, "16, 32, 64 or multiples of 128"),
        ("int3/g16", {}, "group of 32, 64 or multiples of 128"),
        ("e6m1/channel", {}, "of exponent and mantissa"),
        ("e1m6/b32/i6x8", {}, "of exponent and mantissa"),
        ("quantile5/g64", {}, "table of 16"),
        ("e5m1/channel", {"dtype": torch.float16}, "no number"),
        ("int5/channel/min", {}, "minima by channel"),
        ("int5/b16/full/fp16", {}, "multiples of 128"),
        ("int5/g8", {}, "multiples of 128"),
        ("int8/b64x48", {}, "by tensor, channel or group"),
        ("nf4/g64", {"device": "cpu"}, "NVIDIA"),
        ("nf4/g64", {"dtype": torch.float32}, "float32"),
        ("int3/g128", {"capability": (7, 5)}, "sm_75"),
        ("int3/g128", {"capability": (8, 0)}, "measured on sm_90, this is sm_80"),
        ("int2/channel", {"K": 100}, "multiple of 8"),
    ],
)
def test_refusals_say_why(weight: str, more: dict[str, object], reason: str) -> None:
    fields = {"N": 64, "K": 256, "input": None, "dtype": torch.bfloat16, "device": "cuda", "capability": (9, 0)}
    assert reason in str(weight_triton.why_not(Problem(weight=parse_spec(weight), **(fields | more))))


@pytest.mark.parametrize(
    ("weight", "given"),
    [
        ("fp4_e2m1/b32/e8m0", "fp4_e2m1/b32/e8m0"),
        ("fp4_e2m1/b16/fp8_e4m3", "fp4_e2m1/b16/fp8_e4m3"),
        # what no kernel multiplies code by code
        ("fp4_e2m1/b32/e8m0", "fp8_e4m3/token"),
        ("fp4_e2m1/b16/fp8_e4m3", "fp4_e2m1/token"),
        ("int4/g128/asym/bf16", "fp8_e4m3/token"),
        ("nf4/g64", "int8/token"),
        ("int8/g64", "int8/tensor"),
        ("fp8_e4m3/b64x128", "fp8_e4m3/token"),
        ("e2m5/tensor", "fp8_e4m3/token"),
    ],
)
def test_inputs_are_multiplied_as_numbers(weight: str, given: str) -> None:
    pytest.importorskip("triton")
    fields = {"N": 64, "K": 256, "dtype": torch.bfloat16, "device": "cuda", "capability": (9, 0)}
    p = Problem(weight=parse_spec(weight), input=parse_spec(given), **fields)  # type: ignore[arg-type]
    assert choose(p)[0] is weight_triton.KERNEL


@pytest.mark.parametrize(
    ("weight", "given", "kernel"),
    [
        ("int8/channel", "int8/token", "int8-triton"),
        ("int4/g128/asym/bf16", "int8/token/asym", "int4-int8"),
        ("fp4_e2m1/channel", "fp4_e2m1/token", "fp4"),
        ("fp6_e3m2/channel", "fp8_e4m3/token", "fp8-triton"),
    ],
)
def test_codes_are_multiplied_where_a_kernel_does(weight: str, given: str, kernel: str) -> None:
    pytest.importorskip("triton")
    fields = {"N": 64, "K": 256, "dtype": torch.bfloat16, "device": "cuda", "capability": (9, 0)}
    p = Problem(weight=parse_spec(weight), input=parse_spec(given), **fields)  # type: ignore[arg-type]
    assert choose(p)[0].name == kernel


def test_learned_tables_are_not_joined() -> None:
    def joins(text: str, N: int) -> bool:
        p = Problem(N=N, K=64, weight=parse_spec(text), input=None, dtype=torch.bfloat16, device="cuda")
        assert weight_triton.KERNEL.joins is not None
        return weight_triton.KERNEL.joins(p)

    assert joins("nf4/g64", 128)
    assert joins("int8/channel", 128)
    assert not joins("nf4/g64", 100)
    assert not joins("lloyd4/g64", 128)
