"""The lens: one small view of a live graph, the same for every host, and its text form.

A host's graph (torch.fx, ONNX) is read and edited in place through `Graph`; nothing is copied and nothing is
stored here. Values are the host's own handles. `Op` names only what quantization must tell apart.
"""

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol, TypeVar

from torch import Tensor

from qcompile.channels import Channels
from qcompile.numerics import QParams
from qcompile.spec import Spec

V = TypeVar("V")
Shape = tuple[int | None, ...]


class Op(Enum):
    """What a value is made by. Inputs in the order of `Graph.inputs`, optional ones may be None."""

    INPUT = "input"
    CONSTANT = "constant"
    LINEAR = "linear"  # x [..., K], weight [N, K], bias [N]
    MATMUL = "matmul"  # two activations
    CONV = "conv"  # x, weight, bias
    EMBEDDING = "embedding"  # indices, weight [V, D]
    RMS_NORM = "rms_norm"  # x [..., K], weight [K]
    LAYER_NORM = "layer_norm"  # x [..., K], weight [K], bias [K]
    BATCH_NORM = "batch_norm"  # x, weight, bias, mean, variance
    ADD = "add"
    MUL = "mul"
    SILU = "silu"
    GELU = "gelu"
    RELU = "relu"
    LEAKY_RELU = "leaky_relu"  # x, slopes of a PReLU
    SOFTMAX = "softmax"
    ATTENTION = "attention"  # q, k, v
    RESHAPE = "reshape"  # same elements in the same order
    TRANSPOSE = "transpose"
    SELECT = "select"  # x [..., K], channels int64 [n]: those of the last dimension
    OUTLIERS = "outliers"  # x [..., K], threshold []: the columns that reach it anywhere, zeros elsewhere
    QUANTIZE = "quantize"  # x
    DEQUANTIZE = "dequantize"  # codes: a QUANTIZE, or a CONSTANT of codes
    OTHER = "other"


class Graph(Protocol[V]):
    """View of a host's live graph. An op is named by the value it makes (its first output)."""

    def values(self) -> Sequence[V]:
        """All values, each after what it reads."""

    def outputs(self) -> Sequence[V]:
        """The values that the graph returns."""

    def op(self, value: V) -> Op:
        """The kind of op that makes `value`."""

    def inputs(self, value: V) -> Sequence[V | None]:
        """The values that the op reads, in the order that `Op` states."""

    def users(self, value: V) -> Sequence[V]:
        """The values whose ops read `value`; graph outputs are not among them."""

    def shape(self, value: V) -> Shape:
        """Dimensions, None where one is dynamic; () if the value is no tensor."""

    def name(self, value: V) -> str:
        """Module path of an op ("layers.0.q_proj"), qualified name of a constant ("layers.0.q_proj.weight")."""

    def label(self, value: V) -> str:
        """What the host calls the op, for messages about ops that are left alone."""

    def constant(self, value: V) -> Tensor | None:
        """The tensor, if it is known before the graph runs, else None.

        Seen through transposes and reshapes, and for vectors through casts, sums and products of constants.
        """

    def moved(self, value: V, channels: Channels) -> Channels | None:
        """The channels that `value` carries if its op only moves, repeats, drops or casts elements of its first input.

        channels: those of that input, as in qcompile.channels.  Empty if the op looks at the shape alone; None if it
        does anything else, or if something writes to the input in place.
        """

    def qparams(self, value: V) -> QParams | Spec:
        """Of a QUANTIZE or DEQUANTIZE: its qparams, or only the spec where they are found while running.

        Raises GraphError for any other op.
        """

    def epsilon(self, value: V) -> float:
        """Of a BATCH_NORM: what is added to the variance before the root.  Raises GraphError for any other op."""

    def add_constant(self, name: str, tensor: Tensor, like: V | None = None) -> V:
        """A new constant of that qualified name.

        like: a value whose dtype and device it takes.  Raises GraphError if they are not known.
        """

    def add_op(self, op: Op, inputs: Sequence[V | None], name: str = "") -> V:
        """A new op of one of the kinds LINEAR, MUL, ADD, SELECT, OUTLIERS, right after the last of its inputs.

        name: its module path.  Raises GraphError for any other kind.
        """

    def add_qdq(self, value: V, qparams: QParams | Spec) -> V:
        """quantize(value) and dequantize of it, inserted right after `value`; returns the dequantized value.

        A Spec alone makes the quantization dynamic: qparams are found from each input.
        """

    def set_input(self, value: V, index: int, new: V) -> None:
        """Make the op of `value` read `new` as its input number `index`."""

    def replace_uses(self, old: V, new: V) -> None:
        """Make everything that reads `old`, graph outputs included, read `new`."""

    def prune(self) -> int:
        """Remove ops and constants that nothing reads; returns how many."""

    def run(self, args: Sequence[Any], watch: Sequence[V]) -> tuple[Any, Mapping[V, Tensor]]:
        """The graph's result for these inputs, and the tensors seen at `watch`."""


def graph_text(graph: Graph[V], part: Collection[V] | None = None) -> str:
    """The graph as text, a line for each value: number, op, operands, module path, shape. Constants stand inline.

    part: the values to show, all by default; numbers are those of the whole.
    """
    numbers: dict[V, int] = {}
    lines = []
    for value in graph.values():
        if graph.op(value) is Op.CONSTANT:
            continue
        numbers[value] = len(numbers)
        if part is None or value in part:
            lines.append(f"%{numbers[value]} = {_line(graph, value, numbers)}")
    if part is not None:
        return "\n".join(lines)
    returned = ", ".join(_operand(graph, value, numbers) for value in graph.outputs())
    return "\n".join([*lines, f"return {returned}"])


def _line(graph: Graph[V], value: V, numbers: Mapping[V, int]) -> str:
    op = graph.op(value)
    words = [graph.label(value) if op is Op.OTHER else op.value]
    if operands := ", ".join(_operand(graph, v, numbers) for v in graph.inputs(value)):
        words.append(operands)
    if op in (Op.QUANTIZE, Op.DEQUANTIZE):
        qparams = graph.qparams(value)
        words.append(f"{qparams.spec} static" if isinstance(qparams, QParams) else f"{qparams} dynamic")
    if name := graph.name(value):
        words.append(f'"{name}"')
    return " ".join(words) + f" : {_shape(graph.shape(value))}"


def _operand(graph: Graph[V], value: V | None, numbers: Mapping[V, int]) -> str:
    if value is None:
        return "none"
    if value in numbers:
        return f"%{numbers[value]}"
    return f'const{_shape(graph.shape(value))} "{graph.name(value)}"'


def _shape(shape: Shape) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"
