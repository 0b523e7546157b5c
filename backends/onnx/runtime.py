"""Running ONNX models with onnxruntime on the CPU."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as states

from qcompile.backends.onnx.files import write_model
from qcompile.errors import UnsupportedError

# of onnxruntime's log: warnings of its optimizer are not the user's business
_ERRORS_ONLY = 3
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
def session(model: ir.Model, name: str) -> Iterator[ort.InferenceSession]:
    """A session that runs the model, as it is, with as many threads as torch uses.  name: of it, for messages.

    The model goes through a temporary file, so that it may be of any size, and its data may lie anywhere.
    Raises UnsupportedError if onnxruntime cannot run it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _ERRORS_ONLY
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_model(model, path)
        try:
            running = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except RUNTIME_ERRORS as e:
            raise UnsupportedError(
                f"onnxruntime {ort.__version__} cannot run {name}: {str(e).strip()}; export it at another opset, or "
                "in float32"
            ) from e
        yield running
