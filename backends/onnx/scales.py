"""Scales wherever a quantized file keeps them: of Q/DQ, and of onnxruntime's integer and narrow matmuls.

A scale may be stored in a narrow type, or once for several blocks, and be brought to its form by nodes that a runtime
computes when it loads the file: what is stored is looked at.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError

# what may stand between a stored scale and its reader
_FORMS = ("Cast", "Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

# attributes of MatMulNBits, and the one that it has a default for
_NARROW, _BITS = ("K", "N", "bits", "block_size"), {"bits": 4}
_LEAST_BLOCK = 16


def check_scale(scale: ir.Value, where: str) -> None:
    """Raise ModelError if a constant that this scale is made of is not finite and greater than zero.

    where: who reads it, for the message.
    """
    for stored in _stored(scale):
        tensor = ir.convenience.get_const_tensor(stored)
        assert tensor is not None
        values = np.asarray(tensor.numpy()).astype(np.float64)
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            first = tuple(np.argwhere(wrong)[0].tolist())
            raise ModelError(
                f"scale {stored.name!r} {list(tensor.shape)} of {where} is {values[first]} at {list(first)}: scales "
                "are finite and greater than zero; quantize the model again"
            )


def check_narrow(node: ir.Node, where: str) -> None:
    """Raise ModelError if the parts of a com.microsoft::MatMulNBits do not fit its attributes, or a scale cannot be.

    Codes [N, blocks, bytes], scales [N, blocks], zero-points [N, bytes of all blocks] or in float; each may be flat.
    Source: ContribOperators.md of onnxruntime.
    """
    known = _BITS | {name: found.as_int() for name in _NARROW if (found := node.attributes.get(name)) is not None}
    if absent := next((name for name in _NARROW if name not in known), None):
        raise ModelError(f"{where} lacks the attribute {absent!r}; quantize the model again")
    if known["block_size"] < _LEAST_BLOCK or known["block_size"].bit_count() != 1:
        raise ModelError(
            f"{where} has blocks of {known['block_size']}: a power of two from {_LEAST_BLOCK} on is needed; quantize "
            "the model again"
        )
    blocks = -(-known["K"] // known["block_size"])
    sizes = _sizes(known, blocks)
    for index, (what, accepted) in enumerate(sizes.items(), start=1):
        value = node.inputs[index] if index < len(node.inputs) else None
        shape = None if value is None else _shape(value)
        if value is None or shape is None:
            continue
        if math.prod(shape) not in accepted:
            raise ModelError(
                f"the {what} {value.name!r} {list(shape)} of {where} do not fit K={known['K']}, "
                f"N={known['N']}, {known['bits']} bits in blocks of {known['block_size']}, which need {accepted[0]} "
                "elements; quantize the model again"
            )
    if node.inputs[2] is not None:
        check_scale(node.inputs[2], where)


def check_integer(node: ir.Node, where: str) -> None:
    """Raise ModelError if a scale of a com.microsoft::MatMulIntegerToFloat cannot be, or does not fit its weight.

    Codes [..., K] and [K, N], their scales, of which the second may have N numbers, and zero-points like the scales.
    Source: ContribOperators.md of onnxruntime.
    """
    _, weight, *rest = node.inputs
    for scale in rest[:2]:
        if scale is not None:
            check_scale(scale, where)
    shape = None if weight is None else _shape(weight)
    if weight is None or shape is None or len(shape) != 2:
        return
    n = shape[1]
    for what, index in (("scale", 1), ("zero-point", 3)):
        value = rest[index] if index < len(rest) else None
        found = None if value is None else _shape(value)
        if value is not None and found is not None and math.prod(found) not in (1, n):
            raise ModelError(
                f"{what} {value.name!r} {list(found)} of {where} does not fit {weight.name!r} "
                f"{list(shape)}: it needs [{n}]; quantize the model again"
            )


def _sizes(known: Mapping[str, int], blocks: int) -> dict[str, tuple[int, ...]]:
    """How many elements each constant input may have, by what it is, in the order of the inputs."""
    n, bits = known["N"], known["bits"]
    return {
        "codes": (n * blocks * (known["block_size"] * bits // 8),),
        "scales": (n * blocks,),
        "zero-points": (n * -(-blocks * bits // 8), n * blocks),
    }


def _shape(value: ir.Value) -> tuple[int, ...] | None:
    """Of a value where it is known, that of what it is cast from included."""
    if value.shape is not None and value.shape.is_static():
        return tuple(value.shape.numpy())
    node = value.producer()
    cast = node is not None and node.op_type == "Cast"
    source = node.inputs[0] if node is not None and cast else None
    return None if source is None else _shape(source)


def _stored(scale: ir.Value) -> Iterator[ir.Value]:
    """The constants that a scale is made of; what is computed from inputs is none."""
    if ir.convenience.get_const_tensor(scale) is not None:
        yield scale
        return
    node = scale.producer()
    if node is None or node.op_type not in _FORMS:
        return
    if node.inputs[0] is not None:
        yield from _stored(node.inputs[0])
