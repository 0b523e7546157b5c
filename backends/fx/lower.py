"""Lowering on torch.fx: each quantized linear becomes one op of the kernel that runs it best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from qcompile.backends.fx.fuse import fuse
from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.kernels import Kernel, Problem, choose, embedding, llm_int8, tail
from qcompile.backends.fx.runs import Codes, Run, Weight, side_by_side, together, whole
from qcompile.backends.fx.targets import aten
from qcompile.graph import Op
from qcompile.numerics import QParams
from qcompile.sites import constant_name, tail_owner
from qcompile.spec import Spec


class PackSource(Protocol):
    """Where the tensors come from that ops read instead of a weight. constant: name of what they are made from."""

    def quantized(
        self, site: str, constant: str, kernel: Kernel, problem: Problem, weight: Codes
    ) -> Mapping[str, Tensor]:
        """The tensors that the kernel's op reads."""

    def joined(self, members: Sequence[tuple[str, str]], kernel: Kernel, problem: Problem) -> Mapping[str, Tensor]:
        """The tensors of several sites, one behind the other along their first dimension.

        members: site and constant of each, as they were given to `quantized` before.  problem: of one of them.
        """

    def tail(self, site: str, constant: str, weight: Tensor) -> Mapping[str, Tensor]:
        """The tensors for the outlier channels of a site, whose columns `weight` [N, n] are."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the graph will run on. capability: of a CUDA device; small: small weights matter more than speed."""

    device: str
    capability: tuple[int, int] | None = None
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The kernel that runs one site, and why each one preferred to it does not."""

    site: str
    kernel: str
    refused: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Split:
    """total = linear + `thin`, the linear of outlier channels beside it.

    outliers: what the thin one reads: channels that calibration chose (SELECT), or found while running (OUTLIERS).
    """

    total: Node
    linear: Node
    thin: Node
    outliers: Node
    weight: Weight


def lower(graph: FxGraph, target: Target, packs: PackSource) -> list[Lowered]:
    """Replace each linear or embedding with a quantized weight, and the thin one beside it, by a kernel's op.

    Returns what runs the sites. Q/DQ that no kernel takes stays: it is plain torch, and right as it stands.
    """
    lowered = _lower_sums(graph, target, packs)
    graph.prune()
    runs = []
    for value in list(graph.values()):
        if graph.op(value) is Op.LINEAR and (weight := _quantized_weight(graph, value)) is not None:
            runs.append(_run(graph, value, weight, target))
        elif graph.op(value) is Op.LINEAR:
            _lower_tail(graph, value, packs)
        elif graph.op(value) is Op.EMBEDDING:
            lowered += _lower_embedding(graph, value, target, packs)
    for groups in side_by_side(graph, together(graph, runs)):
        lowered += _lower_linears(graph, groups, packs)
    for value in list(graph.values()):
        if graph.op(value) is Op.SELECT:
            _lower_select(graph, value)
    graph.prune()
    if target.capability is not None:
        fuse(graph, target.capability)
    _wait_for_packs(target)
    return lowered


def _lower_sums(graph: FxGraph, target: Target, packs: PackSource) -> list[Lowered]:
    """Replace linears and the thin ones beside them whose sum is one op."""
    lowered = []
    for value in list(graph.values()):
        split = _split(graph, value) if graph.op(value) is Op.ADD else None
        if split is not None and graph.op(split.outliers) is Op.OUTLIERS:
            lowered += _lower_found(graph, split, target, packs)
        elif split is not None and graph.op(split.outliers) is Op.SELECT:
            lowered += _lower_calibrated(graph, split, target, packs)
    return lowered


def _wait_for_packs(target: Target) -> None:
    """Kernels may read packs before what was launched ahead of them has ended (programmatic dependent launch)."""
    if target.device == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize()


def _quantized_weight(graph: FxGraph, linear: Node) -> Weight | None:
    weight = graph.inputs(linear)[1]
    if weight is None or graph.op(weight) is not Op.DEQUANTIZE:
        return None
    codes = graph.inputs(weight)[0]
    qparams = graph.qparams(weight)
    if codes is None or isinstance(qparams, Spec):
        return None
    made_of = graph.inputs(codes)[0] if graph.op(codes) is Op.QUANTIZE else codes
    source = None if made_of is None else graph.constant(made_of)
    return None if source is None else Weight(codes=codes, source=source, qparams=qparams)


def _codes_name(graph: FxGraph, weight: Weight) -> str:
    """As `freeze_weights` names them."""
    name = constant_name(graph, weight.codes)
    return f"{name}_codes" if graph.op(weight.codes) is Op.QUANTIZE else name


def _problem(graph: FxGraph, linear: Node, weight: Weight, target: Target) -> Problem:
    x = graph.inputs(linear)[0]
    assert x is not None
    return Problem(
        N=weight.source.shape[0],
        K=weight.source.shape[1],
        weight=weight.qparams.spec,
        input=_spec(graph, x) if graph.op(x) is Op.DEQUANTIZE else None,
        dtype=_dtype(linear),
        device=target.device,
        capability=target.capability,
        small=target.small,
        lowered=weight.qparams.lowered,
    )


def _run(graph: FxGraph, linear: Node, weight: Weight, target: Target) -> Run:
    problem = _problem(graph, linear, weight, target)
    kernel, refused = choose(problem)
    x = graph.inputs(linear)[0]
    # the linear of outliers that are found while running reads the weight of the site beside it
    owner = tail_owner(graph.name(linear)) if x is not None and graph.op(x) is Op.OUTLIERS else None
    return Run(
        linear=linear,
        site=graph.name(linear) if owner is None else owner,
        beside=owner is not None,
        weight=weight,
        problem=problem,
        kernel=kernel,
        refused=refused,
    )


def _lower_linears(graph: FxGraph, groups: Sequence[Sequence[Run]], packs: PackSource) -> list[Lowered]:
    """One op for linears that read one input; those of a group have joined packs."""
    runs = [run for group in groups for run in group]
    first = runs[0]
    x = graph.inputs(first.linear)[0]
    assert x is not None
    packed = [_packed_group(graph, group, packs) for group in groups]
    taken = tuple(x.args[:3]) if first.kernel.takes_codes else (x,)
    if len(groups) == 1:
        bias = _joined_bias(graph, groups[0])
        op, arguments = first.kernel.op, first.kernel.arguments(whole(groups[0]), taken, packed[0], bias)
    else:
        assert first.kernel.several is not None
        op = first.kernel.several.op
        arguments = first.kernel.several.arguments([whole(group) for group in groups], taken, packed)
    if len(runs) == 1:
        _replace(graph, first.linear, op, arguments)
    else:
        with first.linear.graph.inserting_before(first.linear):
            made = first.linear.graph.call_function(op, arguments)
        start = 0
        for run in runs:
            _replace_by_columns(graph, run.linear, made, start, start + run.problem.N)
            start += run.problem.N
    return [Lowered(site=run.site, kernel=run.kernel.name, refused=run.refused) for run in runs if not run.beside]


def _joined_bias(graph: FxGraph, group: Sequence[Run]) -> Node | None:
    """The biases of a group one behind the other, zeros where there is none; None if there is none at all."""
    biases = [graph.inputs(run.linear)[2] for run in group]
    given = next((bias for bias in biases if bias is not None), None)
    if given is None or len(group) == 1:
        return given
    held = [None if bias is None else graph.constant(bias) for bias in biases]
    like = next(tensor for tensor in held if tensor is not None)
    parts = [like.new_zeros(run.problem.N) if own is None else own for run, own in zip(group, held, strict=True)]
    return graph.add_constant(f"{graph.name(given)}.joined", torch.cat(parts))


def _packed_group(graph: FxGraph, group: Sequence[Run], packs: PackSource) -> dict[str, Node]:
    """The pack of a group's weights, those of several one behind the other."""
    first = group[0]
    names = [_codes_name(graph, run.weight) for run in group]
    tensors = [
        packs.quantized(run.site, name, run.kernel, run.problem, run.weight.read())
        for run, name in zip(group, names, strict=True)
    ]
    if len(group) == 1:
        return _constants(graph, first.weight, first.kernel, tensors[0])
    sites = [run.site for run in group]
    whole = packs.joined(list(zip(sites, names, strict=True)), first.kernel, first.problem)
    return _constants(graph, first.weight, first.kernel, whole)


def _replace_by_columns(graph: FxGraph, value: Node, whole: Node, start: int, end: int) -> None:
    with value.graph.inserting_before(value):
        columns = value.graph.call_function(aten.slice.Tensor, (whole, -1, start, end))
    # as contiguous as it was, for views that follow; Inductor fuses the copy with what reads it
    _replace(graph, value, aten.clone.default, (columns,), memory_format=torch.contiguous_format)


def _lower_embedding(graph: FxGraph, value: Node, target: Target, packs: PackSource) -> list[Lowered]:
    """Read rows of a quantized table alone, where they have scales of their own."""
    weight = _quantized_weight(graph, value)
    problem = None if weight is None else _problem(graph, value, weight, target)
    if weight is None or problem is None or embedding.why_not(problem) is not None:
        return []
    site, kernel = graph.name(value), embedding.KERNEL
    packed = _packed(graph, site, weight, kernel, problem, packs)
    _replace(graph, value, kernel.op, kernel.arguments(problem, (graph.inputs(value)[0],), packed, None))
    return [Lowered(site=site, kernel=kernel.name, refused={})]


def _split(graph: FxGraph, total: Node) -> _Split | None:
    """The parts of a sum that `split_outliers` made."""
    linear, thin = graph.inputs(total)
    if any(v is None or graph.op(v) is not Op.LINEAR or graph.users(v) != [total] for v in (linear, thin)):
        return None
    assert linear is not None
    assert thin is not None
    outliers, weight = graph.inputs(thin)[0], _quantized_weight(graph, linear)
    if tail_owner(graph.name(thin)) != graph.name(linear) or outliers is None or weight is None:
        return None
    return _Split(total=total, linear=linear, thin=thin, outliers=outliers, weight=weight)


def _lower_found(graph: FxGraph, split: _Split, target: Target, packs: PackSource) -> list[Lowered]:
    """Let one op find the outliers and make both products of one weight, under a scale found for each input."""
    quantized, held, bias = graph.inputs(split.linear)
    if quantized is None or held is not graph.inputs(split.thin)[1]:
        return []
    problem, kernel = _problem(graph, split.linear, split.weight, target), llm_int8.KERNEL
    by_input = graph.op(quantized) is Op.DEQUANTIZE and not isinstance(graph.qparams(quantized), QParams)
    if not by_input or kernel.why_not(problem) is not None:
        return []
    site = graph.name(split.linear)
    packed = _packed(graph, site, split.weight, kernel, problem, packs)
    x, threshold = graph.inputs(split.outliers)
    _replace(graph, split.total, kernel.op, kernel.arguments(problem, (x, threshold), packed, bias))
    return [Lowered(site=site, kernel=kernel.name, refused={})]


def _lower_calibrated(graph: FxGraph, split: _Split, target: Target, packs: PackSource) -> list[Lowered]:
    """Let one op make both products, if a kernel does; else leave them."""
    problem = _problem(graph, split.linear, split.weight, target)
    kernel, refused = choose(problem)
    x, _, bias = graph.inputs(split.linear)
    columns = None if kernel.with_tail is None else _packed_tail(graph, split.thin, packs)
    if kernel.with_tail is None or x is None or columns is None:
        return []
    site = graph.name(split.linear)
    packed = _packed(graph, site, split.weight, kernel, problem, packs)
    plain = kernel.arguments(problem, tuple(x.args[:3]) if kernel.takes_codes else (x,), packed, bias)
    arguments = kernel.with_tail(problem, plain, split.outliers, columns)
    if arguments is None:
        return []
    _replace(graph, split.total, kernel.op, arguments)
    return [Lowered(site=site, kernel=kernel.name, refused=refused)]


def _lower_tail(graph: FxGraph, linear: Node, packs: PackSource) -> None:
    """Make the thin linear of calibrated outliers read its columns as a pack."""
    x = graph.inputs(linear)[0]
    if tail_owner(graph.name(linear)) is None or x is None or graph.op(x) is not Op.SELECT:
        return
    columns = _packed_tail(graph, linear, packs)
    if columns is not None:
        _replace(graph, linear, tail.OP, (x, columns))


def _packed_tail(graph: FxGraph, linear: Node, packs: PackSource) -> Node | None:
    """The pack of the columns that a thin linear multiplies, None if their values are not known."""
    columns, site = graph.inputs(linear)[1], tail_owner(graph.name(linear))
    weight = None if columns is None else graph.constant(columns)
    if columns is None or weight is None or site is None:
        return None
    name = graph.name(columns)
    return graph.add_constant(f"{name}.weight", packs.tail(site, name, weight)["weight"])


def _lower_select(graph: FxGraph, selected: Node) -> None:
    """Make a selection of neighbours a view, which costs nothing.

    One channel alone stays an index, so that layers with different ones share their code; but the last one.
    """
    x, channels = graph.inputs(selected)
    index = None if channels is None else graph.constant(channels)
    size = None if x is None else graph.shape(x)[-1]
    if x is None or index is None or index.is_meta or index.numel() == 0:
        return
    first, last = int(index[0]), int(index[-1])
    if index.tolist() == list(range(first, last + 1)) and (first < last or last + 1 == size):
        _replace(graph, selected, aten.slice.Tensor, (x, -1, first, last + 1))


def _packed(
    graph: FxGraph, site: str, weight: Weight, kernel: Kernel, problem: Problem, packs: PackSource
) -> dict[str, Node]:
    tensors = packs.quantized(site, _codes_name(graph, weight), kernel, problem, weight.read())
    return _constants(graph, weight, kernel, tensors)


def _constants(graph: FxGraph, weight: Weight, kernel: Kernel, tensors: Mapping[str, Tensor]) -> dict[str, Node]:
    """A pack in the graph, by the names of its tensors."""
    constant = _codes_name(graph, weight)
    return {name: graph.add_constant(f"{constant}.{kernel.name}.{name}", tensor) for name, tensor in tensors.items()}


def _replace(graph: FxGraph, value: Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> None:
    with value.graph.inserting_before(value):
        new = value.graph.call_function(target, args, kwargs)
    new.meta = dict(value.meta)
    graph.replace_uses(value, new)


def _spec(graph: FxGraph, value: Node) -> Spec:
    qparams = graph.qparams(value)
    return qparams.spec if isinstance(qparams, QParams) else qparams


def _dtype(value: Node) -> torch.dtype:
    example = value.meta.get("example_value", value.meta.get("val"))
    return example.dtype if isinstance(example, Tensor) else torch.get_default_dtype()
