"""Whether the kernels of this folder run with the Triton that is at hand."""

import importlib
import importlib.util
from functools import cache

import torch

# Gluon is experimental: what another version changes may show at the first call only
TESTED = ("3.6",)


@cache
def missing(kernel: str) -> str | None:
    """None if the module `kernel` of this folder can be used, else the reason.  Needs no GPU."""
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.import_module("triton").__version__
    if ".".join(version.split(".")[:2]) not in TESTED:
        return f"the Triton kernels are tested with {', '.join(TESTED)}, this is triton {version}"
    try:
        importlib.import_module(f"qcompile.backends.triton.{kernel}")
    except Exception as error:
        return f"the Triton kernel {kernel} cannot be loaded: {error}"
    return None
