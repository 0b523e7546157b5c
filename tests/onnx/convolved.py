"""Convolutions in canonical form between pairs, and what each must give."""

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qcompile.numerics import QParams, dequantize, find_qparams, over_dimensions, quantize
from qcompile.spec import parse_spec
from tests.onnx.canonical import DTYPES, Canonical

ASYM = "int8/tensor/asym"


@dataclass(frozen=True, kw_only=True)
class Convolved:
    """The model, its input, and in float64 what it gives when only what the plan says is rounded, before the result is.

    output: qparams of the result.  product: the step of the sums, to which an integer bias is rounded.
    """

    model: ir.Model
    x: Tensor
    exact: Tensor
    output: QParams
    product: float

    @property
    def step(self) -> float:
        return float(self.output.scale)

    def rounded(self) -> Tensor:
        return dequantize(quantize(self.exact.float(), self.output), self.output)


def convolved(
    conv: nn.Module,
    shape: tuple[int, ...],
    *,
    weight: str = "int8/channel",
    given: str = ASYM,
    output: str = ASYM,
    relu: bool = False,
    result: str = "quantized",
    dtype: torch.dtype = torch.float32,
) -> Convolved:
    """A convolution whose input, weight and result are rounded.

    result: "quantized", "float" (no pair behind it), or "twice" (quantized, and returned as it is, too).
    """
    torch.manual_seed(0)
    conv = conv.to(dtype).eval()
    x = torch.randn(shape).to(dtype)
    made = Canonical(["B", *shape[1:]], dtype)
    seen = find_qparams(x.float(), parse_spec(given))
    qparams = over_dimensions(find_qparams(conv.weight.detach().flatten(1), parse_spec(weight)), conv.weight.dim())
    codes = quantize(conv.weight.detach(), qparams)
    numbers = dequantize(codes, qparams).double()
    copy = type(conv)(
        *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups),
        bias=conv.bias is not None,
    ).double()
    with torch.no_grad():
        copy.weight.copy_(numbers)
        if conv.bias is not None:
            copy.bias.copy_(conv.bias)
        exact = copy(dequantize(quantize(x, seen), seen, dtype).double())
        exact = exact.relu() if relu else exact
    stored = made.constant("block.conv.weight_codes", codes)
    parameters = made._parameters("block.conv.weight", qparams)
    like = ir.Value(shape=ir.Shape(conv.weight.shape), type=ir.TensorType(DTYPES[dtype]))
    held = made.op("Dequantize", stored, *parameters, like=like, spec=weight, dtype=int(DTYPES[dtype]))
    bias = None if conv.bias is None else made.constant("block.conv.bias", conv.bias.detach())
    y = ir.Value(shape=ir.Shape(["B", *exact.shape[1:]]), type=ir.TensorType(DTYPES[dtype]))
    value = made.op(
        "Conv", made.quantized(made.x, seen), held, bias, path="block.conv", like=y, domain="", **_attributes(conv)
    )
    value = made.op("Relu", value, like=y, domain="") if relu else value
    wanted = find_qparams(exact.float(), parse_spec(output))
    returned = [] if result == "quantized" else [value]
    if result != "float":
        # a graph returns what it computes under another name
        returned.insert(0, made.op("Identity", made.quantized(value, wanted), like=y, domain=""))
    product = float((seen.scale * qparams.scale).max())
    return Convolved(model=made.finish(*returned), x=x, exact=exact, output=wanted, product=product)


def _attributes(conv: nn.Module) -> dict[str, object]:
    padding = conv.padding if isinstance(conv.padding, tuple) else None
    pads = {"auto_pad": "SAME_UPPER"} if padding is None else {"pads": [*padding, *padding]}
    return {
        "kernel_shape": list(conv.kernel_size),
        "strides": list(conv.stride),
        "dilations": list(conv.dilation),
        "group": conv.groups,
        **pads,
    }
