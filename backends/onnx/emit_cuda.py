"""Linears as onnxruntime multiplies them on CUDA: weights stay narrow, inputs are the model's own floats.

    integers, and what is lifted to them   com.microsoft::MatMulNBits, 4 or 8 bits
    fp8_e4m3                               com.microsoft::MatMulBlockQuantizedFp8Weight; static fp8 inputs, too
    fp4_e2m1 under E4M3 or E8M0 scales     com.microsoft::MatMulBlockQuantizedFp4Weight

The last two multiply float16 or bfloat16: in a float32 model, bfloat16, which has its range.
Source: onnxruntime's schemas; its CUDA provider has all three since 1.31.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx.emit_ort import MOST_BLOCK, emit_narrow, whole
from qcompile.backends.onnx.emit_portable import finish_linear, one_number
from qcompile.backends.onnx.operands import Input, Weight, by_row, input_of, optional, required, weight_of
from qcompile.backends.onnx.planned import Planned
from qcompile.backends.onnx.storage import code_constant, pack_bytes, scale_constant, split_scale
from qcompile.backends.onnx.weights import dequantized_weight, float_weight
from qcompile.backends.onnx.writer import Writer
from qcompile.spec import ALL

_D = ir.DataType
_CONTRIB = "com.microsoft"
_FP8, _FP4 = "MatMulBlockQuantizedFp8Weight", "MatMulBlockQuantizedFp4Weight"
# no kernel for narrow weights has float64
_NARROWER = {_D.DOUBLE: _D.FLOAT}
# the kernels for few tokens read so many codes at a time, and want as many under one scale
_VECTOR = 16


def emit_cuda_linear(w: Writer, node: ir.Node) -> Planned:
    """The narrowest matmul that has the weight's numbers; a float one where there is none."""
    weight, given = weight_of(required(node, 1)), input_of(required(node, 0))
    if weight is None:
        product = w.op("MatMul", required(node, 0), float_weight(w, required(node, 1)))
        return finish_linear(w, node, product, reason="the weight is not quantized")
    narrow = weight.spec.format.name
    if narrow == "fp8_e4m3" and weight.codes.ndim == 2:
        return _emit_fp8(w, node, weight, given)
    _note_input(w, given)
    x = required(node, 0) if given is None else given.x
    if narrow == "fp4_e2m1" and (constants := _fp4_constants(w, weight)) is not None:
        return _finish(w, node, weight, _FP4, x, constants)
    integers = whole(weight)
    if integers is None or integers.block == 0:
        reason = f"no kernel multiplies {weight.spec}: the weight becomes float when the file is loaded"
        restored = dequantized_weight(w, weight, transposed=True, fold=True)
        return finish_linear(w, node, w.op("MatMul", x, restored), reason=reason)
    # the CUDA kernels have 4 and 8 bits
    compute = _NARROWER.get(weight.dtype, weight.dtype)
    if compute != weight.dtype:
        w.note(f"inputs and results are {compute.name.lower()} inside MatMulNBits, which has no float64")
    return emit_narrow(w, node, replace(integers, least_bits=4, most_block=MOST_BLOCK), given, compute, 0)


def _note_input(w: Writer, given: Input | None) -> None:
    if given is not None:
        w.note(
            f"inputs stay {given.dtype.name.lower()} (planned: {given.spec}): no CUDA kernel of onnxruntime reads them"
        )


def _emit_fp8(w: Writer, node: ir.Node, weight: Weight, given: Input | None) -> Planned:
    """Codes [N, K], scales [N, blocks], and the one scale of a static fp8 input."""

    def make() -> list[ir.Value]:
        scale = np.ascontiguousarray(by_row(weight.scale, weight))
        stored = scale_constant(w, f"{weight.name}_scale", scale, weight.spec)
        return [code_constant(w, weight.name, weight.codes, weight.spec)[0], stored]

    constants: list[ir.Value | None] = [*w.many(("fp8", weight.value, weight.spec), make)]
    if given is not None and given.scale is not None and given.scale.size == 1 and given.spec.format.name == "fp8_e4m3":
        constants.append(one_number(w, given.scale))
    else:
        _note_input(w, given)
        constants.append(None)
    return _finish(w, node, weight, _FP8, required(node, 0) if given is None else given.x, constants)


def _fp4_constants(w: Writer, weight: Weight) -> list[ir.Value | None] | None:
    """Codes [N, K / 2], two a byte, E4M3 scales [N, blocks] as bytes, the scale of all, and no scale of the input.

    None if the scales are no E4M3 numbers times one float32, or K is odd.
    """
    n, k = weight.codes.shape[0], weight.codes.shape[-1]
    if weight.codes.ndim != 2 or k % 2:
        return None
    scales = split_scale(np.ascontiguousarray(by_row(weight.scale, weight)))
    if scales is None:
        return None
    inner, outer = scales

    def make() -> list[ir.Value]:
        packed = pack_bytes(weight.codes.astype(np.uint8), 4).reshape(n, k // 2)
        return [
            w.constant(weight.name, ir.Tensor(packed)),
            w.constant(f"{weight.name}_scale", ir.Tensor(inner.view(np.uint8))),
            w.number(float(outer)),
        ]

    return [*w.many(("fp4", weight.value, weight.spec), make), None]


def _finish(
    w: Writer, node: ir.Node, weight: Weight, kernel: str, x: ir.Value, constants: list[ir.Value | None]
) -> Planned:
    """The kernel's node in 16 bits, with the bias if the model has 16 bits itself."""
    w.note(f"{kernel} is in onnxruntime since 1.31, and faster than a float16 matmul for few tokens only")
    dtype = _D.BFLOAT16 if weight.dtype in (_D.FLOAT, _D.DOUBLE) else weight.dtype
    if dtype != weight.dtype:
        w.note(f"inputs and results are bfloat16 inside {kernel}, which has no {weight.dtype.numpy()}")
    columns, k = weight.spec.granularity.columns, weight.codes.shape[1]
    block = -(-k // _VECTOR) * _VECTOR if columns == ALL else columns
    biased = dtype == weight.dtype
    bias = optional(node, 2) if biased else None
    addend = None if bias is None else w.cast(bias, dtype)
    product = w.op(kernel, w.cast(x, dtype), *constants, addend, domain=_CONTRIB, makes=dtype, block_size=block)
    if not biased:
        product = w.cast(product, weight.dtype)
    return finish_linear(w, node, product, kernel=kernel, biased=biased)
