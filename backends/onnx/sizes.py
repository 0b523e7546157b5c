"""Sizes of values with dynamic axes: each axis of a name that is not known is one large prime number.

Two shapes hold the same number of elements, whatever the dynamic sizes are, if they do for these: so a reshape can
be followed over batches and lengths that nobody knows. What computes shapes is computed with the same numbers.
"""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from operator import add, mul, sub

import onnx_ir as ir

from qcompile.backends.onnx.ops import attribute, standard
from qcompile.backends.onnx.values import constant

# large, so that sizes of a model are hardly multiples of one; small enough to write out the numbers of one axis
_SMALLEST = 10_007
_OPERATORS: Mapping[type, Callable[[int, int], int]] = {ast.Add: add, ast.Sub: sub, ast.Mult: mul}
# shapes are short: what is longer is data
_LONGEST = 64
_DEEPEST = 200


def sizes(value: ir.Value) -> list[int] | None:
    """Sizes of the value, primes where they are dynamic; None if its rank is not known."""
    if value.shape is None:
        return None
    node = value.producer()
    # shape inference gives the sizes that a reshape makes names of their own
    dynamic = any(not isinstance(d, int) for d in value.shape)
    if dynamic and node is not None and node.op_type == "Reshape" and (found := sizes_of_reshape(node)) is not None:
        return found
    return _stated(value)


def _stated(value: ir.Value) -> list[int] | None:
    """What the file says, if it says anything."""
    if value.shape is None:
        return None
    return [d if isinstance(d, int) else _size(value, axis, d) for axis, d in enumerate(value.shape)]


def sizes_of_reshape(node: ir.Node) -> list[int] | None:
    """Sizes of what a Reshape, Flatten, Squeeze or Unsqueeze makes; None if they are not certain."""
    source, made = node.inputs[0], node.outputs[0]
    assert source is not None
    before = sizes(source)
    if before is None:
        return None
    if node.op_type == "Reshape":
        wanted = computed(node.inputs[1], 0)
        # what the shape is computed from is certain; what the file states about it is the next best
        return _stated(made) if wanted is None else _reshaped(before, wanted, bool(attribute(node, "allowzero", 0)))
    if node.op_type == "Flatten":
        axis = attribute(node, "axis", 1)
        return [math.prod(before[:axis]), math.prod(before[axis:])]
    axes = computed(node.inputs[1], 0) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if axes is None:
        axes = attribute(node, "axes")
    if node.op_type == "Squeeze":
        kept = [i for i, d in enumerate(before) if (d != 1 if axes is None else i not in _wrapped(axes, len(before)))]
        return [before[i] for i in kept]
    if axes is None:
        return None
    rank = len(before) + len(axes)
    left = iter(before)
    return [1 if i in _wrapped(axes, rank) else next(left) for i in range(rank)]


def computed(value: ir.Value | None, depth: int) -> list[int] | None:
    """The numbers of a short integer vector or scalar that is computed from shapes; None if it depends on data."""
    if value is None or depth > _DEEPEST:
        return None
    held = constant(value)
    if held is not None:
        small = held.numel() <= _LONGEST and not held.is_floating_point()
        return [int(n) for n in held.flatten()] if small else None
    node = value.producer()
    if node is None or standard(node.domain) != "":
        return None
    if node.op_type == "Shape":
        found = None if node.inputs[0] is None else sizes(node.inputs[0])
        return None if found is None else found[attribute(node, "start", 0) : attribute(node, "end", len(found))]
    compute = _COMPUTED.get(node.op_type)
    read = [computed(v, depth + 1) for v in node.inputs if v is not None]
    if compute is None or any(numbers is None for numbers in read):
        return None
    try:
        return compute(node, [numbers for numbers in read if numbers is not None])
    except (IndexError, ZeroDivisionError):
        return None


def _size(value: ir.Value, axis: int, dimension: ir.SymbolicDim) -> int:
    """The number that stands for a dynamic axis: a prime for each name, and sums and products of those."""
    primes: dict[str, int] = value.graph.meta.setdefault("primes", {}) if value.graph is not None else {}
    name = f"{value.name}[{axis}]" if dimension.value is None else dimension.value
    found = None if dimension.value is None else _evaluated(name, primes)
    return _prime(name, primes) if found is None or found < 0 else found


def _evaluated(expression: str, primes: dict[str, int]) -> int | None:
    """Of names and numbers, added, subtracted and multiplied, as torch writes them: "s0*s1"; None for all else."""
    try:
        parsed = ast.parse(expression, mode="eval").body
    except SyntaxError:
        return None

    def evaluate(part: ast.expr) -> int | None:
        if isinstance(part, ast.Name):
            return _prime(part.id, primes)
        if isinstance(part, ast.Constant) and isinstance(part.value, int):
            return part.value
        if not isinstance(part, ast.BinOp) or type(part.op) not in _OPERATORS:
            return None
        left, right = evaluate(part.left), evaluate(part.right)
        return None if left is None or right is None else _OPERATORS[type(part.op)](left, right)

    return evaluate(parsed)


def _prime(name: str, primes: dict[str, int]) -> int:
    if name not in primes:
        candidate = max(primes.values(), default=_SMALLEST - 2) + 2
        while any(candidate % d == 0 for d in range(3, math.isqrt(candidate) + 1, 2)):
            candidate += 2
        primes[name] = candidate
    return primes[name]


def _reshaped(before: Sequence[int], wanted: Sequence[int], allow_zero: bool) -> list[int] | None:
    if not allow_zero:
        if any(d == 0 and i >= len(before) for i, d in enumerate(wanted)):
            return None
        wanted = [before[i] if d == 0 else d for i, d in enumerate(wanted)]
    rest = math.prod(d for d in wanted if d != -1)
    if -1 not in wanted:
        return list(wanted)
    if rest == 0 or math.prod(before) % rest:
        return None
    return [math.prod(before) // rest if d == -1 else d for d in wanted]


def _wrapped(axes: Sequence[int], rank: int) -> set[int]:
    return {axis % rank for axis in axes}


def _concat(node: ir.Node, read: Sequence[Sequence[int]]) -> list[int]:
    return [n for numbers in read for n in numbers]


def _first(node: ir.Node, read: Sequence[Sequence[int]]) -> list[int]:
    return list(read[0])


def _gather(node: ir.Node, read: Sequence[Sequence[int]]) -> list[int]:
    return [read[0][i] for i in read[1]]


def _slice(node: ir.Node, read: Sequence[Sequence[int]]) -> list[int]:
    step = read[4][0] if len(read) > 4 else 1
    return list(read[0][read[1][0] : read[2][0] : step])


def _elementwise(compute: Callable[[int, int], int]) -> Callable[[ir.Node, Sequence[Sequence[int]]], list[int]]:
    def run(node: ir.Node, read: Sequence[Sequence[int]]) -> list[int]:
        a, b = read
        length = max(len(a), len(b))
        return [compute(x, y) for x, y in zip(list(a) * (length // len(a)), list(b) * (length // len(b)), strict=True)]

    return run


def _quotient(a: int, b: int) -> int:
    # a prime that is divided has no size that is certain
    if a % b:
        raise ZeroDivisionError
    return a // b


_COMPUTED: Mapping[str, Callable[[ir.Node, Sequence[Sequence[int]]], list[int]]] = {
    "Concat": _concat,
    "Cast": _first,
    "Identity": _first,
    "Squeeze": _first,
    "Unsqueeze": _first,
    "Reshape": _first,
    "Gather": _gather,
    "Slice": _slice,
    "Mul": _elementwise(lambda a, b: a * b),
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Div": _elementwise(_quotient),
    "ReduceProd": lambda node, read: [math.prod(read[0])],
}
