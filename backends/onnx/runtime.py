"""Running ONNX models with onnxruntime, on the CPU where nothing else is asked for."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as states

from qcompile.backends.devices import this_device
from qcompile.backends.onnx.files import write_model
from qcompile.errors import CalibrationError, UnsupportedError

# of onnxruntime's log: warnings of its optimizer are not the user's business, nor is what an exception says anyway
_ERRORS_ONLY, _FATAL_ONLY = 3, 4
# x86 without VNNI adds pairs of products of unsigned and signed bytes in 16 bits, which overflow
_OVERFLOWING = ("cpu", "cpu_avx2", "cpu_avx512")
# there, the first has onnxruntime make signed weights of integer kernels unsigned, whose products it adds in 32 bits.
# It fails at weights of pairs of QuantizeLinear and DequantizeLinear of which it makes no kernel: the second leaves all
# pairs as they are written
_UNSIGNED, _AS_WRITTEN = {"session.x64quantprecision": "1"}, {"session.disable_quant_qdq": "1"}
_QUANTIZES = ("QuantizeLinear", "DynamicQuantizeLinear")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# what it raises: each class stands alone, beneath Exception
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    states.Fail,
    states.InvalidArgument,
    states.InvalidGraph,
    states.InvalidProtobuf,
    states.NotImplemented,
    states.RuntimeException,
)


@contextmanager
def session(model: ir.Model, name: str, *, settings: Mapping[str, str] | None = None) -> Iterator[ort.InferenceSession]:
    """A session that runs the model, as it is, with as many threads as torch uses.  name: of it, for messages.

    settings: see `start`.  The model goes through a temporary file, so that it may be of any size, and its data may
    lie anywhere.  Raises UnsupportedError if onnxruntime cannot run it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_model(model, path)
        yield start(path, name, settings=settings)


def start(
    path: Path,
    name: str,
    *,
    quiet: bool = False,
    sums: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    provider: str = CPU,
    provider_settings: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """A session that runs a file.  name: see `session`.  quiet: nothing is logged of what it cannot run.

    sums: the settings that keep them exact, `exact_sums` on the CPU if not given.  settings, provider_settings: more of
    onnxruntime's session, and of its provider, by their keys.  provider: that runs all of the file.
    Raises UnsupportedError if it cannot.
    """
    if provider not in ort.get_available_providers():
        raise UnsupportedError(
            f"onnxruntime {ort.__version__} has no {provider} here, only {', '.join(ort.get_available_providers())}: "
            "install the package that has it"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _FATAL_ONLY if quiet else _ERRORS_ONLY
    # threads that wait for a next run keep the cores busy for whoever else computes: torch, and other sessions
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if sums is None:
        sums = exact_sums() if provider == CPU else {}
    for key, value in (*sums.items(), *(settings or {}).items()):
        options.add_session_config_entry(key, value)
    if provider != CPU:
        # else nodes that the provider lacks run on the CPU without a word
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        started = ort.InferenceSession(path, options, providers=[(provider, dict(provider_settings or {}))])
    except RUNTIME_ERRORS as e:
        raise UnsupportedError(
            f"onnxruntime {ort.__version__} cannot run {name} on {provider}: {str(e).strip()}; {_remedy(provider)}"
        ) from e
    # onnxruntime may also leave a provider out without an exception
    if started.get_providers()[:1] != [provider]:
        raise UnsupportedError(
            f"onnxruntime {ort.__version__} runs {name} on {started.get_providers()}, not on {provider}; "
            f"{_remedy(provider)}"
        )
    return started


def _remedy(provider: str) -> str:
    if provider == CPU:
        # it has kernels for few of the types that `portable` files hold
        return "export it at another opset or in float32, or write it for target 'ort-cpu'"
    return f"see that the libraries of {provider} can be loaded, and that the file was written for it"


def overflows() -> bool:
    """Whether sums of onnxruntime's integer kernels overflow on this CPU."""
    return this_device("cpu").name in _OVERFLOWING


def exact_sums() -> dict[str, str]:
    """What a session of any model needs for integer kernels on this CPU to give what they give elsewhere."""
    return _UNSIGNED | _AS_WRITTEN if overflows() else {}


def exact_sums_of(model: ir.Model, target: str) -> dict[str, str]:
    """What a session of a file that was written for a target needs for that, its kernels being those that it has."""
    nodes = [node for node in model.graph if node.op_type in (*_QUANTIZES, "DequantizeLinear")]
    if not any(node.op_type in _QUANTIZES for node in nodes) or not overflows():
        return {}
    by_blocks = any("block_size" in node.attributes for node in nodes)
    return _UNSIGNED if target == "ort-cpu" and not by_blocks else _UNSIGNED | _AS_WRITTEN


def keep_sums_exact(options: ort.SessionOptions) -> None:
    """Give the options what `exact_sums` says."""
    for key, value in exact_sums().items():
        options.add_session_config_entry(key, value)


def results_of(
    running: ort.InferenceSession, names: Sequence[str], feed: Mapping[str, np.ndarray[Any, Any]], where: str
) -> list[Any]:
    """These outputs of a session for a feed.  Raises CalibrationError if it fails; where: the feed, for the message."""
    try:
        found: list[Any] = running.run(list(names), dict(feed))
    except RUNTIME_ERRORS as e:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in feed.items())
        raise CalibrationError(
            f"onnxruntime fails on {where} ({shapes}): {str(e).strip()}; check its sizes and values against what the "
            "model takes"
        ) from e
    return found
