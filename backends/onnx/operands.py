"""What a linear or an embedding of a canonical graph reads, as the emitters want to know it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx.writer import DOMAIN, array_of
from qcompile.errors import GraphError
from qcompile.formats import CodeBook, Format, code_values
from qcompile.spec import ALL, Spec, Zero, parse_spec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A constant of codes under its Dequantize.

    codes: int8 or uint8 [N, K].  scale, zero: float32, shaped as `QParams` says.  levels: [2**bits], else None.
    value: the initializer of the codes.  dtype: of the dequantized weight.
    """

    value: ir.Value
    spec: Spec
    codes: Array
    scale: Array
    zero: Array | None
    levels: Array | None
    dtype: ir.DataType

    @property
    def name(self) -> str:
        return self.value.name or "weight"

    @property
    def steps(self) -> tuple[tuple[str, str, Array], ...]:
        """What is done to the numbers of codes, in order: name and op of ONNX, and what it takes."""
        scaled = ("scale", "Mul", self.scale)
        if self.zero is None:
            return (scaled,)
        if self.spec.zero is Zero.MINIMUM:
            return (scaled, ("zero", "Add", self.zero))
        return (("zero", "Sub", self.zero), scaled)


@dataclass(frozen=True, kw_only=True, eq=False)
class Input:
    """An activation that a Dequantize gives back.

    x: what is quantized.  dequantized: what its readers read.  scale, zero: of a static one, None if dynamic.
    """

    x: ir.Value
    dequantized: ir.Value
    spec: Spec
    dtype: ir.DataType
    scale: Array | None
    zero: Array | None

    @property
    def static(self) -> bool:
        return self.scale is not None


def is_ours(node: ir.Node | None, kind: str) -> bool:
    """Whether node is the op of the canonical form called `kind`."""
    return node is not None and node.domain == DOMAIN and node.op_type == kind


def spec_of(node: ir.Node) -> Spec:
    """The spec that a node of the canonical form carries."""
    if "spec" not in node.attributes:
        raise GraphError(f"node {node.name!r} ({node.op_type}) carries no attribute 'spec'")
    return parse_spec(node.attributes["spec"].as_string())


def dtype_of(dequantize: ir.Node) -> ir.DataType:
    """What a Dequantize returns; float32 where it does not say."""
    attribute = dequantize.attributes.get("dtype")
    return ir.DataType.FLOAT if attribute is None else ir.DataType(attribute.as_int())


def float_type(value: ir.Value) -> ir.DataType | None:
    """The dtype of a float value where the graph says it."""
    node = value.producer()
    if value.dtype is None and node is not None and is_ours(node, "Dequantize"):
        return dtype_of(node)
    return value.dtype


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """Input number `index`, None if it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def required(node: ir.Node, index: int) -> ir.Value:
    """Input number `index`.  Raises GraphError if it is absent."""
    value = optional(node, index)
    if value is None:
        raise GraphError(f"node {node.name!r} ({node.op_type}) lacks input {index}")
    return value


def _optional_array(node: ir.Node, index: int) -> Array | None:
    value = optional(node, index)
    return None if value is None else array_of(value)


def weight_of(value: ir.Value) -> Weight | None:
    """The quantized constant that `value` is; None if it is anything else."""
    node = value.producer()
    if node is None or not is_ours(node, "Dequantize"):
        return None
    codes = required(node, 0)
    if codes.const_value is None:
        return None
    return Weight(
        value=codes,
        spec=spec_of(node),
        codes=array_of(codes),
        scale=array_of(required(node, 1)).astype(np.float32),
        zero=_optional_array(node, 2),
        levels=_optional_array(node, 3),
        dtype=dtype_of(node),
    )


def input_of(value: ir.Value) -> Input | None:
    """The quantized activation that `value` is; None if it is anything else."""
    node = value.producer()
    if node is None or not is_ours(node, "Dequantize"):
        return None
    quantize = required(node, 0).producer()
    dynamic = is_ours(quantize, "QuantizeDynamic")
    if quantize is None or not (dynamic or is_ours(quantize, "Quantize")):
        return None
    return Input(
        x=required(quantize, 0),
        dequantized=value,
        spec=spec_of(node),
        dtype=dtype_of(node),
        scale=None if dynamic else array_of(required(quantize, 1)).astype(np.float32),
        zero=None if dynamic else _optional_array(quantize, 2),
    )


def by_row(parameter: Array, weight: Weight) -> Array:
    """A scale or zero point of a weight [N, K] as [N, G]: each row's own, G blocks along K.

    G is 1 where the whole row shares one.
    """
    granularity = weight.spec.granularity
    rows = weight.codes.shape[0]
    if granularity.columns == ALL:
        return np.broadcast_to(parameter.reshape(-1, 1), (rows, 1))
    return parameter if granularity.rows == 1 else np.repeat(parameter, granularity.rows, 0)


def levels_of(fmt: Format, levels: Array | None) -> Array:
    """The float32 number of each code [2**bits], learned ones included."""
    if isinstance(fmt, CodeBook) and fmt.levels is None:
        if levels is None:
            raise GraphError(f"{fmt.name} is learned from each tensor, but its levels are not in the file")
        return levels.astype(np.float32)
    return code_values(fmt).numpy()
