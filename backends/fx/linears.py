"""Linear in all its spellings becomes aten.linear(x, weight [N, K], bias)."""

from torch import Tensor, fx

from qcompile.backends.fx.targets import ADDMM, aten, operands, spelling
from qcompile.backends.fx.values import constant, dtype, example, fake_mode, infer
from qcompile.graph import Op

LINEAR = aten.linear.default


def make_linears(graph: fx.Graph) -> int:
    """Rewrite F.linear, and addmm and matmul with a constant [K, N], in place; returns how many."""
    count = 0
    for node in list(graph.nodes):
        found = _linear(node)
        if found is None:
            continue
        x, weight, bias = found
        node.op, node.target = "call_function", LINEAR
        node.args, node.kwargs = (x, weight, bias), {}
        count += 1
    return count


def fold_biases(graph: fx.Graph) -> int:
    """Make the constant [N] that is added to a linear its bias, if nothing else reads the linear; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.target is not LINEAR or node.args[2] is not None or len(node.users) != 1:
            continue
        total = next(iter(node.users))
        bias = _added_bias(total, node)
        if bias is None:
            continue
        node.update_arg(2, bias)
        total.replace_all_uses_with(node)
        graph.erase_node(total)
        count += 1
    return count


def _linear(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """x, weight [N, K] and bias, if the call is a linear."""
    found = spelling(node) or spelling(node, ADDMM)
    if found is None or found.op not in (Op.LINEAR, Op.MATMUL):
        return None
    x, weight, *rest = operands(node, found)
    bias = rest[0] if rest else None
    if x is None or weight is None:
        return None
    if spelling(node) is not None and found.op is Op.LINEAR:
        return x, weight, bias
    held = constant(weight)
    if held is None or held.dim() != 2:
        return None
    if rest and (bias is None or not _is_bias(bias, held.shape[1])):
        return None
    return x, _transposed(weight, held), bias


def _is_bias(value: fx.Node, size: int) -> bool:
    held = constant(value)
    return held is not None and held.shape == (size,)


def _transposed(weight: fx.Node, held: Tensor) -> fx.Node:
    """A node that makes the transpose of `weight` [K, N]: what it is itself a transpose of, or a new one."""
    found = spelling(weight)
    if found is not None and found.op is Op.TRANSPOSE:
        below = weight.all_input_nodes[0]
        original = constant(below)
        if original is not None and original.shape == held.shape[::-1] and original.stride() == held.stride()[::-1]:
            return below
    existing = (user for user in weight.users if user.target is aten.t.default)
    if node := next(existing, None):
        return node
    with weight.graph.inserting_after(weight):
        node = weight.graph.call_function(aten.t.default, (weight,))
    node.meta["example_value"] = infer(aten.t.default, (weight,), fake_mode(weight.graph))
    return node


def _added_bias(total: fx.Node, linear: fx.Node) -> fx.Node | None:
    found = spelling(total)
    if found is None or found.op is not Op.ADD:
        return None
    bias = next((v for v in operands(total, found) if v is not linear), None)
    known = example(linear)
    if bias is None or not isinstance(known, Tensor) or not bias < linear:
        return None
    same = dtype(bias) == dtype(linear)
    return bias if same and isinstance(known.shape[-1], int) and _is_bias(bias, known.shape[-1]) else None
