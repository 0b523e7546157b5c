"""The portable target says in standard ONNX exactly what the oracle says in torch."""

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from qcompile.backends.onnx.emit import emit
from qcompile.errors import QcompileError, UnsupportedError
from qcompile.formats import FORMATS, CodeBook, Integer, code_values
from qcompile.numerics import QParams, dequantize, fake_quantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.onnx.canonical import Canonical, linear_model, run_onnxruntime, run_reference

# types that onnxruntime 1.32 has no CPU kernel for
ORT_LACKS = {ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E8M0, ir.DataType.FLOAT8E5M2FNUZ}

INTEGERS = [
    f"int{bits}/{granularity}{asym}"
    for bits in range(2, 9)
    for granularity in ("tensor", "channel", "g32", "b16x32")
    for asym in ("", "/asym")
]
SCALED = [
    f"{format_}/g16/{scale}" for format_ in ("int4", "fp4_e2m1") for scale in ("fp16", "bf16", "fp8_e4m3", "dq256")
]
OTHERS = [f"{name}/g16" for name, fmt in FORMATS.items() if not isinstance(fmt, Integer)]
WEIGHTS = [
    *INTEGERS,
    *SCALED,
    *OTHERS,
    "fp4_e2m1/b32/e8m0",
    "fp8_e4m3/channel",
    "nf4/channel",
    "fp6_e3m2/b16x32",
    "e3m2/g8",
]


def runs(model: ir.Model) -> bool:
    """Whether onnxruntime's CPU has kernels for the types in the file."""
    proto = ir.to_proto(model)
    types = {t.data_type for t in proto.graph.initializer}
    types |= {a.i for node in proto.graph.node for a in node.attribute if a.name == "to"}
    return not types & {int(t) for t in ORT_LACKS}


def check(model: ir.Model, *inputs: Tensor) -> list[Tensor]:
    """The reference's outputs; onnxruntime's are the same bits wherever it has kernels."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    found = run_reference(model, *inputs)
    if runs(model):
        for mine, other in zip(found, run_onnxruntime(model, *inputs, optimize=False), strict=True):
            torch.testing.assert_close(other, mine, rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("spec", WEIGHTS)
def test_a_weight_is_stored_bit_for_bit(spec: str) -> None:
    torch.manual_seed(0)
    made = Canonical(("M", 1))
    value, numbers = made.weight("w", torch.randn(32, 96), spec)
    model = emit(made.finish(value), "portable").model
    assert torch.equal(check(model, torch.zeros(1, 1))[0], numbers)


@pytest.mark.parametrize("spec", WEIGHTS)
def test_a_linear_reads_the_transposed_weight_bit_for_bit(spec: str) -> None:
    model, numbers = linear_model(weight=spec, shape=("M", 96), rows=32, bias=False)
    # each result is one weight: the other products are zeros
    assert torch.equal(check(emit(model, "portable").model, torch.eye(96))[0], numbers[0][0].T)


def quantized(spec: str, x: Tensor, static: bool = False) -> ir.Model:
    shape = [f"d{i}" for i in range(x.dim() - 1)] + [x.shape[-1]]
    made = Canonical(shape, x.dtype)
    parsed = parse_spec(spec)
    return emit(made.finish(made.quantized(made.x, find_qparams(x, parsed) if static else spec)), "portable").model


DYNAMIC = [
    *(f"int{bits}/{g}{asym}" for bits in (2, 3, 4, 8) for g in ("tensor", "token", "g16") for asym in ("", "/asym")),
    *(f"{name}/token" for name, fmt in FORMATS.items() if not (isinstance(fmt, CodeBook) and fmt.levels is None)),
    *(f"fp8_e4m3/{g}" for g in ("tensor", "g16")),
    *(f"{name}/b16/{scale}" for name in ("fp4_e2m1", "int8", "nf4") for scale in ("fp16", "bf16", "e8m0", "fp8_e4m3")),
]


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (1, 48)])
@pytest.mark.parametrize("spec", DYNAMIC)
def test_an_input_quantized_while_running_is_that_of_the_oracle(spec: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape)
    assert torch.equal(check(quantized(spec, x), x)[0], fake_quantize(x, parse_spec(spec)))


STATIC = [
    *(f"int{bits}/tensor{asym}" for bits in range(2, 9) for asym in ("", "/asym")),
    *(f"{name}/tensor" for name, fmt in FORMATS.items() if not isinstance(fmt, Integer)),
]


@pytest.mark.parametrize("spec", STATIC)
def test_a_calibrated_input_is_that_of_the_oracle_beyond_its_range_too(spec: str) -> None:
    torch.manual_seed(1)
    seen, x = torch.randn(7, 48), 3 * torch.randn(7, 48)
    qparams = find_qparams(seen, parse_spec(spec))
    made = Canonical(("M", 48))
    model = emit(made.finish(made.quantized(made.x, qparams)), "portable").model
    assert torch.equal(check(model, x)[0], dequantize(quantize(x, qparams), qparams))


@pytest.mark.parametrize(
    "spec", ["int8/token/asym", "int8/tensor", "fp8_e4m3/token", "fp4_e2m1/b16/fp8_e4m3", "nf4/g16"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_rounded_once(spec: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 48).to(dtype)
    found = check(quantized(spec, x), x)[0]
    assert found.dtype == dtype
    assert torch.equal(found, fake_quantize(x, parse_spec(spec)))


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if not isinstance(f, CodeBook) or f.levels])
def test_ties_go_where_the_oracle_sends_them(name: str) -> None:
    levels = code_values(FORMATS[name])
    levels = levels[levels.isfinite()].unique()
    ties = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([levels, ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf))])
    qparams = QParams(spec=parse_spec(f"{name}/tensor"), scale=torch.tensor(1.0))
    made = Canonical(("M",))
    model = emit(made.finish(made.quantized(made.x, qparams)), "portable").model
    assert torch.equal(check(model, x)[0], dequantize(quantize(x, qparams), qparams))


@pytest.mark.parametrize("spec", DYNAMIC)
def test_zeros_and_tiny_numbers_are_those_of_the_oracle(spec: str) -> None:
    x = torch.cat([torch.zeros(1, 32), torch.full((1, 32), 1e-30), torch.full((1, 32), -3e-39), torch.ones(1, 32)])
    expected = fake_quantize(x, parse_spec(spec))
    # scales of powers of two go through a logarithm, whose correction does not reach subnormal numbers
    atol = 1e-38 if spec.endswith("e8m0") else 0.0
    torch.testing.assert_close(check(quantized(spec, x), x)[0], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 31])
@pytest.mark.parametrize(
    "spec", ["int8/token/asym", "int8/token", "fp8_e4m3/token", "fp4_e2m1/b16/e8m0", "nf4/g16/bf16"]
)
def test_nan_and_inf_are_not_hidden(spec: str, poison: float, place: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 32)
    x[1, place] = poison
    model = quantized(spec, x)
    found = [run_reference(model, x)[0]] + ([run_onnxruntime(model, x)[0]] if runs(model) else [])
    for y in found:
        assert not y[1, place].isfinite()
        assert torch.equal(y[[0, 2]], fake_quantize(x, parse_spec(spec))[[0, 2]])


@pytest.mark.parametrize("spec", ["int8/token/asym", "fp8_e4m3/token", "fp4_e2m1/g16"])
def test_no_tokens_are_no_error(spec: str) -> None:
    model = quantized(spec, torch.ones(1, 32))
    assert run_reference(model, torch.zeros(0, 32))[0].shape == (0, 32)
    assert not runs(model) or run_onnxruntime(model, torch.zeros(0, 32))[0].shape == (0, 32)


@pytest.mark.parametrize(
    ("spec", "words"),
    [("lloyd4/token", "learns its levels"), ("int4/g16/dq256", "dq256"), ("int8/b4x16", "between rows")],
)
def test_what_no_file_can_find_while_running_is_refused_with_a_remedy(spec: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"(?s)target 'portable'.*{words}.*; use "):
        quantized(spec, torch.randn(8, 32))


@pytest.mark.parametrize(("spec", "opset", "ir_version"), [
    ("int8/channel", 21, 10), ("int4/g32", 21, 10), ("nf4/g32", 21, 10), ("fp8_e4m3/channel", 21, 10),
    ("fp4_e2m1/g32", 23, 11), ("fp4_e2m1/b32/e8m0", 24, 12), ("int2/channel", 25, 13),
])  # fmt: skip
def test_the_opset_is_the_lowest_that_knows_the_types(spec: str, opset: int, ir_version: int) -> None:
    model = emit(linear_model(weight=spec)[0], "portable").model
    assert (dict(model.opset_imports), model.ir_version) == ({"": opset}, ir_version)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        ("int8/channel", 8),
        ("int4/g128/asym/bf16", 4 + 16 / 128 + 4 / 128),
        # ONNX has no such scales: they are bfloat16 there
        ("int4/g128/asym/u4row", 4 + 16 / 128 + 4 / 128),
        ("int2/g128/fp16", 2 + 16 / 128),
        ("int3/channel", 4),
        ("nf4/g64", 4 + 32 / 64),
        ("fp4_e2m1/b32/e8m0", 4 + 8 / 32),
        ("fp4_e2m1/b16/fp8_e4m3", 4 + 8 / 16),
        ("fp8_e4m3/channel", 8),
    ],
)
def test_the_file_is_as_small_as_its_codes_and_scales(spec: str, bits: float) -> None:
    n, k = 256, 512
    model, _ = linear_model(weight=spec, shape=("M", k), rows=n, bias=False)
    size = len(ir.to_proto(emit(model, "portable").model).SerializeToString())
    # a scale a channel, and a graph of a few nodes
    assert size < n * k * bits / 8 + 4 * n + 2000


def test_what_is_emitted_names_no_op_of_ours_and_leaves_the_model_alone() -> None:
    model, _ = linear_model(weight="int4/g32", given="int8/token/asym", linears=3)
    before = ir.to_proto(model).SerializeToString()
    emitted = emit(model, "portable")
    assert ir.to_proto(model).SerializeToString() == before
    assert {node.domain for node in emitted.model.graph.all_nodes()} == {""}
    assert [site.site for site in emitted.planned] == ["block.q", "block.k", "block.v"]
    assert [value.name for value in emitted.model.graph.outputs] == ["y0", "y1", "y2"]
    paths = {node.metadata_props.get("qcompile.module_path") for node in emitted.model.graph.all_nodes()}
    assert {"block.q", "block.k", "block.v"} <= paths


def test_an_unknown_target_is_named_with_those_near_it() -> None:
    with pytest.raises(QcompileError, match="unknown target 'ort_cpu'; nearest: 'ort-cpu'"):
        emit(linear_model(weight=None)[0], "ort_cpu")
