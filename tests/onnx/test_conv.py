"""Convolutions of every shape: the planned kernel, the numbers of the plan, and what each target cannot do."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.onnx.emit import emit
from qcompile.backends.onnx.fusion import check_fusion, fused
from qcompile.errors import UnsupportedError
from tests.onnx.canonical import run_onnxruntime, run_reference
from tests.onnx.convolved import Convolved, convolved

CASES = {
    "3x3": (nn.Conv2d(5, 7, 3), (2, 5, 9, 11)),
    "stride": (nn.Conv2d(5, 7, 3, stride=2, padding=1), (2, 5, 9, 11)),
    "strides": (nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(0, 1)), (2, 5, 9, 11)),
    "same": (nn.Conv2d(5, 7, 3, padding="same"), (2, 5, 9, 11)),
    "dilation": (nn.Conv2d(5, 7, 3, padding=2, dilation=2), (2, 5, 9, 11)),
    "groups": (nn.Conv2d(6, 9, 3, groups=3), (2, 6, 9, 11)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 9, 11)),
    "multiplied": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 9, 11)),
    "1x1": (nn.Conv2d(5, 7, 1), (2, 5, 9, 11)),
    "no bias": (nn.Conv2d(5, 7, 3, bias=False), (2, 5, 9, 11)),
    "one channel": (nn.Conv2d(1, 1, 3), (1, 1, 3, 3)),
    "1d": (nn.Conv1d(5, 7, 3, padding=1), (2, 5, 11)),
    "1d depthwise": (nn.Conv1d(6, 6, 5, padding=2, groups=6, bias=False), (2, 6, 11)),
    "3d": (nn.Conv3d(3, 4, 3, padding=1), (1, 3, 4, 5, 6)),
}


def assert_rounded(found: Tensor, case: Convolved) -> None:
    """The result's own numbers, where the last bit of the sum decides its neighbour, and rarely."""
    difference = (found.double() - case.rounded().double()).abs() / case.step
    assert float(difference.max()) < 1.01
    # biases are rounded to the step of a product, and sums to float32: few results lie so near to a tie
    assert float((difference > 0.5).double().mean()) < 0.02 + case.product / case.step


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("given", ["int8/tensor/asym", "int8/tensor"])
@pytest.mark.parametrize("name", CASES)
def test_a_convolution_becomes_one_kernel(name: str, given: str, relu: bool) -> None:
    case = convolved(*CASES[name], given=given, output=given, relu=relu)
    emitted = emit(case.model, "ort-cpu")
    kernels = check_fusion(emitted).counts
    assert kernels["QLinearConv"] == 1
    assert not {"Conv", "FusedConv", "Relu"} & kernels.keys()
    assert emitted.notes == ()
    assert_rounded(run_onnxruntime(emitted.model, case.x)[0], case)


@pytest.mark.parametrize("name", CASES)
def test_a_portable_file_computes_what_the_plan_says(name: str) -> None:
    case = convolved(*CASES[name], relu=True)
    emitted = emit(case.model, "portable")
    (planned,) = emitted.planned
    assert (planned.site, planned.kernel) == ("block.conv", None)
    assert_rounded(run_onnxruntime(emitted.model, case.x)[0], case)
    if name != "same":
        # the reference evaluator pads SAME_UPPER in its own way
        assert_rounded(run_reference(emitted.model, case.x)[0], case)


@pytest.mark.parametrize(
    "weight", ["int8/tensor", "int4/channel", "int2/tensor", "fp4_e2m1/channel", "int8/channel/bf16"]
)
def test_weights_that_are_integers_by_row_become_the_kernel_too(weight: str) -> None:
    case = convolved(*CASES["stride"], weight=weight)
    emitted = emit(case.model, "ort-cpu")
    assert check_fusion(emitted).counts["QLinearConv"] == 1
    assert_rounded(run_onnxruntime(emitted.model, case.x)[0], case)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"weight": "int8/channel/asym"}, "no kernel convolves int8/channel/asym"),
        ({"weight": "fp8_e4m3/channel"}, "no kernel convolves fp8_e4m3/channel"),
        ({"given": "int4/tensor/asym"}, "no kernel convolves inputs int4/tensor/asym"),
        ({"output": "int4/tensor/asym"}, "its result is not quantized alone"),
        ({"result": "float"}, "its result is not quantized alone"),
        ({"result": "twice"}, "its result is not quantized alone"),
        ({"dtype": torch.float16}, "the model computes in float16"),
    ],
)
def test_what_no_kernel_convolves_is_right_and_says_why(more: dict[str, object], reason: str) -> None:
    case = convolved(*CASES["stride"], **more)
    emitted = emit(case.model, "ort-cpu")
    (planned,) = emitted.planned
    assert (planned.kernel, planned.reason) == (None, f"{reason}: the weight becomes float when the file is loaded")
    assert [note.partition(": ")[2].endswith(reason) for note in emitted.notes] == [True]
    found = run_onnxruntime(emitted.model, case.x)
    if "dtype" in more:
        # a number near 2 has steps of 2**-10, and sums have more
        assert float((found[0].double() - case.exact).abs().max()) < case.step + 2**-8
    elif more.get("result") != "float":
        assert_rounded(found[0], case)
    if "result" in more:
        torch.testing.assert_close(found[-1].double(), case.exact, rtol=1e-5, atol=1e-5)
    # the weight is restored once, and not rounded anew by onnxruntime
    kernels = check_fusion(emitted).counts
    assert kernels["Conv"] + kernels["FusedConv"] == 1


def _convs(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Conv"]


def test_a_bias_beyond_the_reach_of_its_weights_is_kept() -> None:
    conv, shape = nn.Conv2d(5, 7, 3), (2, 5, 9, 11)
    with torch.no_grad():
        # as a batch norm leaves a channel that it switched off
        conv.weight[2] *= 1e-12
        conv.bias[2] = 3.0
    case = convolved(conv, shape)
    emitted = emit(case.model, "ort-cpu")
    assert check_fusion(emitted).counts["QLinearConv"] == 1
    assert_rounded(run_onnxruntime(emitted.model, case.x)[0], case)


def test_cuda_files_keep_codes_of_weights_and_no_pairs() -> None:
    case = convolved(*CASES["stride"], relu=True)
    emitted = emit(case.model, "ort-cuda")
    kinds = {node.op_type for node in emitted.model.graph}
    assert not {"QuantizeLinear", "DequantizeLinear"} & kinds
    assert [v.shape for v in emitted.model.graph.initializers.values() if v.dtype == ir.DataType.INT8] == [[7, 5, 3, 3]]
    (found,) = run_onnxruntime(emitted.model, case.x)
    bound = 3 * case.step * np.sqrt(case.exact[0, 0].numel())
    assert float((found.double() - case.exact).abs().max()) < bound
    assert fused(ir.to_proto(emitted.model))["Conv"] == 1


def test_tensorrt_gets_symmetric_pairs_where_it_reads_and_scales_along_axis_0() -> None:
    case = convolved(*CASES["stride"], given="int8/tensor", output="int8/tensor", relu=True)
    emitted = emit(case.model, "tensorrt")
    (conv,) = _convs(emitted.model)
    x, weight = (value.producer() for value in conv.inputs[:2])
    assert {x.op_type, weight.op_type} == {"DequantizeLinear"}
    assert (weight.attributes["axis"].as_int(), list(weight.inputs[1].shape)) == (0, [7])
    assert x.inputs[0].producer().op_type == "QuantizeLinear"
    # nothing that it multiplies reads the result: its pair is left out
    assert sum(node.op_type == "QuantizeLinear" for node in emitted.model.graph) == 1
    torch.testing.assert_close(run_reference(emitted.model, case.x)[0].double(), case.exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({}, "TensorRT takes no input int8/tensor/asym here: it has a zero point; use a calibrated recipe"),
        ({"weight": "int8/channel/asym"}, "TensorRT takes no weight int8/channel/asym: it has a zero point; use"),
        ({"given": "int8/tensor", "weight": "int4/channel"}, "int4 is for weights alone; use weight"),
        ({"given": "fp8_e4m3/tensor"}, "TensorRT multiplies no fp8_e4m3/tensor by int8/channel; give"),
    ],
)
def test_what_tensorrt_does_not_convolve_is_refused(more: dict[str, str], remedy: str) -> None:
    case = convolved(*CASES["3x3"], **more)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=f"'block.conv' cannot be written for target 'tensorrt': .*{remedy}"):
        emit(case.model, "tensorrt")
