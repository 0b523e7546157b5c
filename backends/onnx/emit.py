"""From the canonical form to a file that a runtime reads: one entry of `TARGETS` for each kind of runtime.

First the sites, which know their operands and may swallow the Q/DQ around them; then what is left, in standard ops.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import version_converter

from qcompile.backends.onnx import emit_conv, emit_cuda, emit_lifted, emit_ort, emit_portable, emit_tensorrt, pairs
from qcompile.backends.onnx.planned import Emitted, Planned
from qcompile.backends.onnx.writer import BASE_OPSET, DOMAIN, Writer, site_name
from qcompile.errors import GraphError, UnsupportedError, nearest
from qcompile.recipe import Recipe

_D = ir.DataType
OLDEST_OPSET = 18
_Emit = Callable[[Writer, ir.Node], Planned | None]
_Kind = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Target:
    """How one kind of runtime wants its files.

    linear, conv: write a linear and a convolution.  newest: the last opset that it reads.  lacks: types that it cannot
    hold.  prepare: changes the pairs around convolutions first.  rest: writes what it wants otherwise than standard.
    """

    name: str
    linear: _Emit
    conv: _Emit
    newest: int
    lacks: frozenset[ir.DataType] = field(default_factory=frozenset)
    prepare: Callable[[ir.Model], None] | None = None
    rest: Mapping[_Kind, _Emit] = field(default_factory=dict)
    adapt: Callable[[Recipe], Recipe] | None = None


# onnxruntime 1.32 has no kernel that casts or dequantizes fp4; TensorRT 11's parser reads opsets 9 to 25
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="portable", linear=emit_portable.emit_linear, conv=emit_conv.emit_portable_conv, newest=25),
        Target(
            name="ort-cpu",
            linear=emit_lifted.emit_linear,
            conv=emit_conv.emit_cpu_conv,
            newest=25,
            lacks=frozenset({_D.FLOAT4E2M1}),
            prepare=pairs.make_unsigned,
            rest={("", "LayerNormalization"): emit_ort.keep_norm_alone},
        ),
        Target(
            name="ort-cuda",
            linear=emit_cuda.emit_cuda_linear,
            conv=emit_conv.emit_cuda_conv,
            newest=25,
            lacks=frozenset({_D.FLOAT4E2M1}),
            prepare=pairs.drop_pairs,
        ),
        Target(
            name="tensorrt",
            linear=emit_tensorrt.emit_linear,
            conv=emit_conv.emit_tensorrt_conv,
            newest=25,
            prepare=pairs.free_results,
            rest={
                (DOMAIN, "Quantize"): emit_tensorrt.keep_quantize,
                (DOMAIN, "Dequantize"): emit_tensorrt.emit_dequantize,
            },
            adapt=emit_tensorrt.without_zero_points,
        ),
    )
}

# in this order, because a quantization that all its sites swallow is not written
_REST: dict[_Kind, _Emit] = {
    (DOMAIN, "RMSNorm"): emit_portable.emit_rms_norm,
    (DOMAIN, "Silu"): emit_portable.emit_silu,
    (DOMAIN, "Gelu"): emit_portable.emit_gelu,
    (DOMAIN, "Outliers"): emit_portable.emit_outliers,
    (DOMAIN, "Quantize"): emit_portable.emit_quantize,
    (DOMAIN, "QuantizeDynamic"): emit_portable.emit_quantize_dynamic,
    (DOMAIN, "Dequantize"): emit_portable.emit_dequantize,
}


def emit(model: ir.Model, target: str) -> Emitted:
    """A new model for `target`, and what is expected of it there.  `model` stays as it is.

    model: in canonical form.  Raises UnsupportedError for an unknown target, and for what the target cannot run with
    the site, the spec and what to use instead; GraphError for a graph that is not in canonical form.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"unknown target {target!r}; nearest: {nearest(target, TARGETS)}")
    chosen = TARGETS[target]
    result = model.clone()
    _raise_opset(result)
    if chosen.prepare is not None:
        chosen.prepare(result)
    writer = Writer(result, target, chosen.lacks)
    sites: Mapping[_Kind, _Emit] = {
        (DOMAIN, "Linear"): chosen.linear,
        ("", "Conv"): chosen.conv,
        ("", "Gather"): emit_portable.emit_embedding,
    }
    planned = [*_rewrite(writer, sites), *_rewrite(writer, {**_REST, **chosen.rest})]
    _finish(result, writer, chosen)
    return Emitted(model=result, target=target, planned=tuple(planned), notes=tuple(writer.notes))


def _raise_opset(model: ir.Model) -> None:
    # below, the operators change in ways that its converter does not know: see qcompile.backends.onnx.opsets
    if OLDEST_OPSET <= model.opset_imports.get("", BASE_OPSET) < BASE_OPSET:
        version_converter.convert_version(model, BASE_OPSET)
    opset = model.opset_imports.get("", 0)
    if opset < BASE_OPSET:
        raise UnsupportedError(
            f"the model has opset {opset} and could not be brought to {BASE_OPSET}; export it with opset {BASE_OPSET}"
        )


def _rewrite(writer: Writer, table: Mapping[_Kind, _Emit]) -> list[Planned]:
    """Write every node that the table knows, and drop what nothing reads any more."""
    planned = []
    for node in list(writer.model.graph.all_nodes()):
        write = table.get((node.domain, node.op_type))
        if write is None:
            continue
        writer.anchor, writer.held = node, {}
        if (site := write(writer, node)) is not None:
            planned.append(replace(site, stored=tuple(str(value.name) for value in writer.held)))
    RemoveUnusedNodesPass()(writer.model)
    return planned


def _finish(model: ir.Model, writer: Writer, target: Target) -> None:
    left = next((node for node in model.graph.all_nodes() if node.domain == DOMAIN), None)
    if left is not None:
        raise GraphError(f"no emitter writes {left.op_type!r} of {site_name(left)!r}; it is not of the canonical form")
    opset = max(model.opset_imports[""], writer.opset)
    if opset > target.newest:
        raise UnsupportedError(
            f"the model needs opset {opset}, and target {target.name!r} reads none above {target.newest}; "
            f"export it with an older opset"
        )
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[""] = opset
    for domain in {node.domain for node in model.graph.all_nodes()} - {""}:
        model.opset_imports.setdefault(domain, 1)
    versions = [onnx.helper.make_opsetid("", opset)]
    model.ir_version = max(model.ir_version or 0, onnx.helper.find_min_ir_version_for(versions))
