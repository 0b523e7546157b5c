"""What an emitter hands back: the file's model, and what it expects of the runtime at each site."""

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One linear or embedding as written.

    site: its module path.  node: the name of the node that multiplies.  outputs: names of the values of which the
    fused kernel makes one.  kernel: the op type expected in onnxruntime's optimized model, None if none is expected.
    reason: why none is.
    """

    site: str
    node: str
    outputs: tuple[str, ...]
    kernel: str | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """A model of standard nodes (and those of the target's own domain), and its record.

    notes: where it deviates from the plan, a sentence each, the site first.
    """

    model: ir.Model
    target: str
    planned: tuple[Planned, ...]
    notes: tuple[str, ...]
