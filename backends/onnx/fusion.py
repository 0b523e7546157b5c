"""Which kernels onnxruntime makes of a file, and whether they are those that the emitter planned."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime

from qcompile.backends.onnx.planned import Emitted, Kernels, Planned
from qcompile.backends.onnx.runtime import RUNTIME_ERRORS
from qcompile.errors import UnsupportedError

# a message's sites; the rest is counted
_SHOWN = 5

# bytes of a tensor that may stand in the optimized model itself, as onnxruntime takes it: text
_SMALL = "1024"

# linears that share their input quantize it once, and each multiplies by itself
_AS_GOOD = {"DynamicQuantizeMatMul": "MatMulIntegerToFloat"}


def fused(model: Path | str | onnx.ModelProto) -> Counter[str]:
    """How many kernels of each op type a CPU session of onnxruntime runs, after its own optimization.

    model: a path, or a model of less than 2 GB.  Raises UnsupportedError if onnxruntime cannot load it.
    """
    return Counter(node.op_type for node in _optimized(model).graph.node)


def check_fusion(emitted: Emitted, model: Path | str | onnx.ModelProto | None = None) -> Kernels:
    """What a CPU session of onnxruntime runs, after its own optimization.

    model: the file that was written of emitted.model, where it is on disk already.
    Raises UnsupportedError that names the sites whose planned kernel did not appear, and if onnxruntime cannot load it.
    """
    nodes = _optimized(ir.to_proto(emitted.model) if model is None else model).graph.node
    makers = {output: node.op_type for node in nodes for output in node.output}
    behind = _behind(emitted.model.graph)
    planned = [site for site in emitted.planned if site.kernel is not None]
    found = {site.node: _kernel(site, behind, makers) for site in planned}
    missing = [site for site in planned if found[site.node] is None]
    if not missing:
        return Kernels(counts=Counter(node.op_type for node in nodes), by_site=_by_site(planned, found))
    named = [f"{s.site!r} (planned {s.kernel}, got {_maker(s.outputs, makers)})" for s in missing[:_SHOWN]]
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    raise UnsupportedError(
        f"onnxruntime {onnxruntime.__version__} did not fuse {len(missing)} of {len(emitted.planned)} sites for target "
        f"{emitted.target!r}: {', '.join(named)}{more}; the file is right, but slow there: "
        f"update onnxruntime, or leave these sites out with a rule"
    )


def _behind(graph: ir.Graph) -> dict[str, list[str]]:
    """By name of a node's result, the sums that read it: a kernel that takes in what is added makes the sum instead."""
    return {
        str(value.name): [str(use.node.outputs[0].name) for use in value.uses() if use.node.op_type == "Add"]
        for node in graph
        for value in node.outputs
    }


def _kernel(site: Planned, behind: Mapping[str, Sequence[str]], makers: Mapping[str, str]) -> str | None:
    """What runs a site, None if it is not what was planned."""
    good = (site.kernel, _AS_GOOD.get(str(site.kernel), site.kernel))
    names = [*site.outputs, *(name for output in site.outputs for name in behind.get(output, ()))]
    return next((makers[name] for name in names if makers.get(name) in good), None)


def _by_site(planned: Iterable[Planned], by_node: Mapping[str, str | None]) -> dict[str, tuple[str, ...]]:
    """What runs each site; one that is called several times may have several."""
    found: dict[str, dict[str, None]] = {}
    for site in planned:
        found.setdefault(site.site, {})[str(by_node[site.node])] = None
    return {site: tuple(kernels) for site, kernels in found.items()}


def _maker(outputs: tuple[str, ...], makers: Mapping[str, str]) -> str:
    return " and ".join(dict.fromkeys(makers[name] for name in outputs if name in makers)) or "another form"


def _optimized(model: Path | str | onnx.ModelProto) -> onnx.ModelProto:
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    options = onnxruntime.SessionOptions()
    # it warns of each model that is written for this machine only, which is what is wanted here
    options.log_severity_level = 3
    # one file holds 2 GB at most, and of tensors nothing is read
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", _SMALL)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except RUNTIME_ERRORS as e:
            raise UnsupportedError(
                f"onnxruntime {onnxruntime.__version__} cannot load the quantized file on the CPU: {str(e).strip()}; "
                "convert the float model to float32, or write for another target"
            ) from e
        return onnx.load(options.optimized_model_filepath, load_external_data=False)
