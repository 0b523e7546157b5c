"""Small models in the canonical form between the ONNX door and the emitters, and two runtimes for what is emitted."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qcompile.backends.onnx.runtime import keep_sums_exact
from qcompile.numerics import QParams, dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
}


def to_tensor(tensor: Tensor) -> ir.Tensor:
    """The torch tensor as ONNX holds it."""
    if tensor.dtype == torch.bfloat16:
        return ir.Tensor(tensor.float().numpy().astype(ir.DataType.BFLOAT16.numpy()), ir.DataType.BFLOAT16)
    return ir.Tensor(tensor.contiguous().numpy())


def _code_type(spec: str) -> ir.DataType:
    """Of codes as `numerics.quantize` returns them."""
    signed = spec.startswith("int") and "asym" not in spec
    return ir.DataType.INT8 if signed else ir.DataType.UINT8


class Canonical:
    """A model being written by hand: `x` goes in, what `finish` is given comes out."""

    def __init__(self, shape: Sequence[int | str], dtype: torch.dtype = torch.float32, opset: int = 21) -> None:
        self.dtype = dtype
        self.x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(DTYPES[dtype]))
        imports = {"": opset, "qcompile": 1}
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports=imports, name="canonical")

    def constant(self, name: str, tensor: Tensor) -> ir.Value:
        value = ir.val(name, const_value=to_tensor(tensor))
        value.name = name
        assert value.const_value is not None
        value.const_value.name = name
        self.graph.register_initializer(value)
        return value

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        path: str = "",
        outputs: int = 1,
        like: ir.Value | None = None,
        domain: str = "qcompile",
        **attributes: Any,
    ) -> Any:
        """The value that a new node makes, all of them if it makes several; `like` gives shape and dtype."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=f"node_{len(self.graph)}")
        if path:
            node.metadata_props["qcompile.module_path"] = path
        for i, value in enumerate(node.outputs):
            value.name = f"{kind.lower()}_{len(self.graph)}_{i}"
            if like is not None:
                value.shape, value.type = like.shape, like.type
        self.graph.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def quantized(self, x: ir.Value, qparams: QParams | str) -> ir.Value:
        """x through a pair: static under qparams, dynamic under the text of a spec."""
        dtype = int(x.dtype or 1)
        if isinstance(qparams, str):
            codes, scale, zero = self.op("QuantizeDynamic", x, outputs=3, spec=qparams)
            codes.type, codes.shape = ir.TensorType(_code_type(qparams)), x.shape
            scale.type = zero.type = ir.TensorType(ir.DataType.FLOAT)
            return self.op("Dequantize", codes, scale, zero, like=x, spec=qparams, dtype=dtype)
        name = f"{x.name}_{len(self.graph)}"
        parameters = self._parameters(name, qparams)
        codes = self.op("Quantize", x, *parameters, spec=str(qparams.spec))
        codes.type, codes.shape = ir.TensorType(_code_type(str(qparams.spec))), x.shape
        return self.op("Dequantize", codes, *parameters, like=x, spec=str(qparams.spec), dtype=dtype)

    def weight(self, name: str, weight: Tensor, spec: str | None) -> tuple[ir.Value, Tensor]:
        """A weight as the graph holds it, and its numbers."""
        if spec is None:
            return self.constant(name, weight), weight
        qparams = find_qparams(weight, parse_spec(spec))
        codes = quantize(weight, qparams)
        stored = self.constant(f"{name}_codes", codes)
        like = ir.Value(shape=ir.Shape(weight.shape), type=ir.TensorType(DTYPES[weight.dtype]))
        parameters = self._parameters(name, qparams)
        dtype = int(DTYPES[weight.dtype])
        value = self.op("Dequantize", stored, *parameters, like=like, spec=spec, dtype=dtype)
        return value, dequantize(codes, qparams, weight.dtype)

    def _parameters(self, name: str, qparams: QParams) -> list[ir.Value | None]:
        parts = {"scale": qparams.scale, "zero": qparams.zero, "levels": qparams.levels}
        return [None if t is None else self.constant(f"{name}_{part}", t) for part, t in parts.items()]

    def finish(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        for i, value in enumerate(outputs):
            value.name = f"y{i}"
            value.type = value.type or ir.TensorType(DTYPES[self.dtype])
        return ir.Model(self.graph, ir_version=10)


def linear_model(
    *,
    weight: str | None,
    given: QParams | str | None = None,
    shape: Sequence[int | str] = ("M", 64),
    rows: int = 48,
    bias: bool = True,
    linears: int = 1,
    dtype: torch.dtype = torch.float32,
    opset: int = 21,
) -> tuple[ir.Model, list[tuple[Tensor, Tensor | None]]]:
    """Linears that read one (quantized) x, and the weight and bias of each as numbers."""
    torch.manual_seed(0)
    made = Canonical(shape, dtype, opset)
    x = made.x if given is None else made.quantized(made.x, given)
    outputs, numbers = [], []
    for i in range(linears):
        name = f"block.{'qkvo'[i]}"
        value, w = made.weight(f"{name}.weight", torch.randn(rows, int(shape[-1])).to(dtype) * 0.3, weight)
        b = torch.randn(rows).to(dtype) if bias else None
        stored = None if b is None else made.constant(f"{name}.bias", b)
        like = ir.Value(shape=ir.Shape([*shape[:-1], rows]), type=ir.TensorType(DTYPES[dtype]))
        outputs.append(made.op("Linear", x, value, stored, path=name, like=like))
        numbers.append((w, b))
    return made.finish(*outputs), numbers


def run_reference(model: ir.Model, *inputs: Tensor) -> list[Tensor]:
    """What the onnx reference evaluator makes of it."""
    feeds = {value.name: to_tensor(x).numpy() for value, x in zip(model.graph.inputs, inputs, strict=True)}
    with warnings.catch_warnings():
        # numpy warns of the NaN and Inf that some tests are about
        warnings.simplefilter("ignore", RuntimeWarning)
        return [_from_array(y) for y in ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)]


def run_onnxruntime(model: ir.Model, *inputs: Tensor, optimize: bool = True) -> list[Tensor]:
    """What onnxruntime's CPU makes of it; without optimization it runs each node as it is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    keep_sums_exact(options)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for value, x in zip(model.graph.inputs, inputs, strict=True):
        # numpy has no bfloat16: it crosses as bits
        array = x.contiguous().view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.contiguous().numpy()
        made = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(to_tensor(x).dtype))
        binding.bind_ortvalue_input(value.name, made)
    for value in model.graph.outputs:
        binding.bind_output(value.name)
    session.run_with_iobinding(binding)
    return [torch.from_dlpack(y._ortvalue.to_dlpack()).clone() for y in binding.get_outputs()]


def _from_array(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype == ir.DataType.BFLOAT16.numpy():
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.asarray(array))
