"""Quantization that a model has already: whether it has any, and whether its scales and zero-points can be.

No checker looks at their values: a scale of zero gives zeros, of NaN gives NaN, and a negative one is accepted.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from qcompile.backends.onnx.scales import check_integer, check_narrow, check_scale
from qcompile.errors import ModelError

# QuantizeLinear, MatMulInteger, QLinearMatMul; of onnxruntime QGemm, QAttention, MatMulNBits, GatherBlockQuantized
_QUANTIZED = re.compile(r"Q[A-Z]\w*|\w*[Qq]uantize\w*|MatMul(Integer|NBits|Bnb4|FpQ4)\w*|ConvInteger|GemmFloat8")


def require_float(model: ir.Model, name: str) -> None:
    """Raise ModelError if the model is quantized already.  name: of its file, for the message."""
    for node in _nodes(model):
        if _QUANTIZED.fullmatch(node.op_type):
            raise ModelError(
                f"{name!r} is quantized already: the first such node is {place(node)}; give the float model that it "
                "was made from"
            )


def check_qparams(model: ir.Model) -> None:
    """Raise ModelError for a constant scale or zero-point that cannot be.

    Scales are finite and positive, a number, one for each slice of the axis, or one a block; zero-points have their
    scale's shape and the type of the codes; the parts of a MatMulNBits fit its attributes.
    """
    for node in _nodes(model):
        if node.op_type in _CHECKS:
            _CHECKS[node.op_type](node, place(node))


def place(node: ir.Node) -> str:
    """How a message calls a node: by its name, or by what it makes if it has none."""
    return (
        f"node {node.name!r} ({node.op_type})"
        if node.name
        else f"the {node.op_type} that makes {node.outputs[0].name!r}"
    )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *model.functions.values()):
        yield from ir.traversal.RecursiveGraphIterator(graph)


def _check_pair(node: ir.Node, where: str) -> None:
    if len(node.inputs) < 2:
        return
    x, scale = node.inputs[:2]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or x is None:
        return
    check_scale(scale, where)
    scales = ir.convenience.get_const_tensor(scale)
    if scales is None:
        return
    shape = tuple(scales.shape.numpy())
    if problem := _shape_problem(node, x, shape):
        raise ModelError(f"scale {scale.name!r} {list(shape)} of {where} {problem}; quantize the model again")
    if zero is not None and (problem := _zero_problem(node, x, zero, shape)):
        raise ModelError(f"zero-point {zero.name!r} of {where} {problem}; quantize the model again")


_CHECKS: Mapping[str, Callable[[ir.Node, str], None]] = {
    "QuantizeLinear": _check_pair,
    "DequantizeLinear": _check_pair,
    "MatMulNBits": check_narrow,
    "MatMulIntegerToFloat": check_integer,
}


def _shape_problem(node: ir.Node, x: ir.Value, shape: tuple[int, ...]) -> str | None:
    """None if a scale of this shape fits what the node reads, else why not."""
    sizes = None if x.shape is None else list(x.shape)
    if shape == () or sizes is None or (shape == (1,) and not sizes):
        return None
    axis, block = (_attribute(node, name, default) for name, default in (("axis", 1), ("block_size", 0)))
    if not -len(sizes) <= axis < len(sizes):
        # one scale has no axis to follow
        return None if shape == (1,) else f"is for axis {axis} of {x.name!r} {sizes}, which has none"
    axis %= len(sizes)
    size = sizes[axis]
    if block == 0:
        fits = shape == (1,) or (len(shape) == 1 and (shape[0] == size or not isinstance(size, int)))
        return None if fits else f"does not fit axis {axis} of {x.name!r} {_text(sizes)}: it needs [{size}]"
    needed = [-(-size // block) if i == axis and isinstance(size, int) else size for i, size in enumerate(sizes)]
    fits = len(shape) == len(needed) and all(
        not isinstance(n, int) or n == s for n, s in zip(needed, shape, strict=True)
    )
    return None if fits else f"does not fit blocks of {block} of {x.name!r} {_text(sizes)}: it needs {_text(needed)}"


def _zero_problem(node: ir.Node, x: ir.Value, zero: ir.Value, shape: tuple[int, ...]) -> str | None:
    """None if the zero-point fits the scale's shape and the codes, else why not."""
    one = ((), (1,))
    known = None if zero.shape is None or not zero.shape.is_static() else tuple(zero.shape.numpy())
    if known is not None and known != shape and not (known in one and shape in one):
        return f"is {_text(list(zero.shape))} where its scale is {list(shape)}"
    codes = x.dtype if node.op_type == "DequantizeLinear" else None
    declared = _attribute(node, "output_dtype", 0) if node.op_type == "QuantizeLinear" else 0
    codes = ir.DataType(declared) if declared else codes
    if codes is not None and zero.dtype is not None and zero.dtype != codes:
        return f"is of {zero.dtype} where the codes are of {codes}"
    return None


def _attribute(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())


def _text(sizes: list[object]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"
