"""What the FX host makes of linears for a device that need not be there, where Triton is installed."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from qcompile.backends.fx.kernels import KERNELS, Problem, choose
from qcompile.backends.fx.lower import Target, lower
from qcompile.graph import graph_text
from qcompile.pipeline import quantize
from qcompile.spec import parse_spec
from tests.hosts import FX
from tests.passes.test_permute_outliers import PlainPacks
from tests.passes.test_split_outliers import plan_for, with_outliers

HOPPER = Target(device="cuda", capability=(9, 0))


class Layer(nn.Module):
    def __init__(self, K: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(K, 16, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def lowered(K: int, dtype: torch.dtype, outliers: tuple[int, ...], given: str) -> tuple[str, str, dict[str, str]]:
    """The graph's text, the kernel, and why others refused."""
    x = torch.randn(3, K, dtype=dtype)
    graph = FX.open(Layer(K, dtype), x)
    plan = plan_for(graph, given)
    quantize(graph, with_outliers(plan, {"fc": outliers}) if outliers else plan)
    (run,) = lower(graph, HOPPER, PlainPacks())
    return graph_text(graph), run.kernel, dict(run.refused)


@pytest.mark.parametrize("given", ["int8/token", "int8/token/asym"])
def test_outliers_are_multiplied_by_the_same_op(given: str) -> None:
    text, kernel, _ = lowered(32, torch.bfloat16, (3, 7, 20), given)
    assert kernel == "int8-triton"
    assert text.count("linear_int8_triton") == 1
    assert "linear_tail" not in text
    assert "aten.add" not in text


def test_float32_outliers_are_multiplied_apart() -> None:
    text, kernel, _ = lowered(32, torch.float32, (3, 7, 20), "int8/token")
    assert kernel == "int8-triton"
    assert text.count("linear_int8_triton") == text.count("linear_tail") == 1


def test_what_does_not_fit_runs_in_the_library() -> None:
    text, kernel, refused = lowered(40, torch.bfloat16, (3, 7, 20), "int8/token")
    assert kernel == "int8"
    assert "K=40" in refused["int8-triton"]
    assert text.count("linear_tail") == 1


@pytest.mark.parametrize(
    ("weight", "given", "dtype", "capability", "kernel", "words"),
    [
        ("int8/channel", "int8/token", torch.float16, (9, 0), "int8-triton", None),
        ("int8/channel", "int8/token", torch.float16, (8, 0), "int8", "measured on sm_90"),
        ("fp8_e4m3/channel", "fp8_e4m3/token", torch.bfloat16, (9, 0), "fp8-triton", None),
        ("fp8_e4m3/channel", "fp8_e4m3/token", torch.float16, (9, 0), "fp8", "bfloat16"),
        ("fp8_e4m3/channel", "fp8_e5m2/token", torch.bfloat16, (9, 0), "fp8", "not both e4m3"),
        ("fp8_e4m3/channel", "fp8_e4m3/token", torch.bfloat16, (8, 9), "fp8", "measured on sm_90"),
        ("int4/g32/asym/bf16", "int8/token/asym", torch.bfloat16, (9, 0), "int4-int8", None),
    ],
)
def test_choice_and_reason(
    weight: str, given: str, dtype: torch.dtype, capability: tuple[int, int], kernel: str, words: str | None
) -> None:
    p = Problem(
        N=64,
        K=64,
        weight=parse_spec(weight),
        input=parse_spec(given),
        dtype=dtype,
        device="cuda",
        capability=capability,
    )
    chosen, refused = choose(p)
    assert chosen.name == kernel
    assert words is None or words in refused[f"{kernel}-triton"]


@pytest.mark.parametrize(
    "weight",
    [
        *("int8/channel", "int4/g128/asym/bf16", "nf4/g64", "int3/g128/asym/bf16", "int2/g64/asym/bf16", "lloyd4/g32"),
        *("int5/g128/asym/bf16", "int6/g64/asym/bf16"),
        *("nf4/g64/dq256", "int4/b32/min/u6x8", "int6/b16/full/i8x16", "int5/b32/full/fp16", "iq4_nl/b32/fp16"),
    ],
)
def test_weights_alone(weight: str) -> None:
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    graph = FX.open(Layer(128, torch.bfloat16), x)
    quantize(graph, plan_for(graph, None, weight))
    (run,) = lower(graph, HOPPER, PlainPacks())
    assert run.kernel == "weight-triton"
    assert graph_text(graph).count("linear_weight") == 1


@pytest.mark.parametrize("given", ["int8/token", "int8/token/asym"])
def test_narrow_weights_and_inputs_are_multiplied_by_one_op(given: str) -> None:
    graph = FX.open(Layer(64, torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16))
    quantize(graph, plan_for(graph, given, weight="int4/g32/asym/bf16"))
    (run,) = lower(graph, HOPPER, PlainPacks())
    text = graph_text(graph)
    assert run.kernel == "int4-int8"
    assert text.count("linear_int4_int8") == 1
    assert "dequantize" not in text
    assert "aten.linear" not in text


def test_kernels_of_a_device_are_no_candidates_elsewhere() -> None:
    p = Problem(
        N=64, K=64, weight=parse_spec("int8/channel"), input=parse_spec("int8/token"), dtype=torch.float32, device="cpu"
    )
    chosen, refused = choose(p)
    assert chosen.name == "int8"
    assert refused == {}
    assert {kernel.name for kernel in KERNELS if kernel.device == "cuda"} == {
        "int8-triton",
        "fp4",
        "fp4-lowered",
        "fp8-triton",
        "weight-lowered",
        "weight-triton",
        "book-triton",
        "int4-int8",
    }
