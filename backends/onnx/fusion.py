"""Which kernels onnxruntime makes of a file, and whether they are those that the emitter planned."""

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime

from qcompile.backends.onnx.planned import Emitted
from qcompile.errors import UnsupportedError

# a message's sites; the rest is counted
_SHOWN = 5

# linears that share their input quantize it once, and each multiplies by itself
_AS_GOOD = {"DynamicQuantizeMatMul": "MatMulIntegerToFloat"}


def fused(model: Path | str | onnx.ModelProto) -> Counter[str]:
    """How many kernels of each op type a CPU session of onnxruntime runs, after its own optimization.

    model: a path, or a model of less than 2 GB.  Raises what onnxruntime raises for a file that it cannot load.
    """
    return Counter(node.op_type for node in _optimized(model).graph.node)


def check_fusion(emitted: Emitted, model: Path | str | onnx.ModelProto | None = None) -> Counter[str]:
    """The kernels as `fused` counts them, all planned ones among them.

    model: the file that was written of emitted.model, where it is on disk already.
    Raises UnsupportedError that names the sites whose planned kernel did not appear.
    """
    nodes = _optimized(ir.to_proto(emitted.model) if model is None else model).graph.node
    makers = {output: node.op_type for node in nodes for output in node.output}
    missing = [
        f"{site.site!r} (planned {site.kernel}, got {_maker(site.outputs, makers)})"
        for site in emitted.planned
        if site.kernel is not None and not _is_there(site.kernel, site.outputs, makers)
    ]
    if not missing:
        return Counter(node.op_type for node in nodes)
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    raise UnsupportedError(
        f"onnxruntime {onnxruntime.__version__} did not fuse {len(missing)} of {len(emitted.planned)} sites for target "
        f"{emitted.target!r}: {', '.join(missing[:_SHOWN])}{more}; the file is right, but slow there: "
        f"update onnxruntime, or leave these sites out with a rule"
    )


def _is_there(kernel: str, outputs: tuple[str, ...], makers: dict[str, str]) -> bool:
    return any(makers.get(name) in (kernel, _AS_GOOD.get(kernel, kernel)) for name in outputs)


def _maker(outputs: tuple[str, ...], makers: dict[str, str]) -> str:
    return " and ".join(dict.fromkeys(makers[name] for name in outputs if name in makers)) or "another form"


def _optimized(model: Path | str | onnx.ModelProto) -> onnx.ModelProto:
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    options = onnxruntime.SessionOptions()
    # it warns of each model that is written for this machine only, which is what is wanted here
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath, load_external_data=False)
