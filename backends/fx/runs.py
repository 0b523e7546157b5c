"""Quantized linears between the choice of their kernels and the ops that they become, and which become one op."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Node

from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.kernels import Kernel, Problem
from qcompile.numerics import QParams, quantize


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A weight's codes, made when they are asked for: those of a whole model at once would take half its memory.

    at_hand: its values are, not their shape alone.
    """

    make: Callable[[], Tensor]
    qparams: QParams
    at_hand: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A quantized weight [N, K]: what makes its codes, a constant or the quantize of one."""

    codes: Node
    source: Tensor
    qparams: QParams

    def read(self) -> Codes:
        """For packs."""
        floats = self.source.is_floating_point()
        return Codes(
            make=lambda: quantize(self.source, self.qparams) if floats else self.source,
            qparams=self.qparams,
            at_hand=not self.source.is_meta,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A linear and the kernel that will run it.

    site: whose weight it reads.  beside: it is the linear of outliers beside that site's own.
    """

    linear: Node
    site: str
    beside: bool
    weight: Weight
    problem: Problem
    kernel: Kernel
    refused: Mapping[str, str]


def together(graph: FxGraph, runs: Sequence[Run]) -> list[list[Run]]:
    """The linears in groups, each to be one matmul of joined packs; groups and linears in the order of the graph."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        problem = run.problem
        before = None if problem.lowered is None else (problem.lowered.narrow.spec, problem.lowered.shift)
        alike = (problem.weight, before, _one_op(graph, run))
        groups.setdefault(alike if run.kernel.joins is not None and _bias_joins(graph, run) else run, []).append(run)
    found: list[list[Run]] = []
    for group in groups.values():
        fit = [run for run in group if run.kernel.joins is not None and run.kernel.joins(run.problem)]
        different = len({run.weight.codes for run in fit}) == len(fit)
        joined = fit if different else []
        found += [joined] if joined else []
        found += [[run] for run in group if run not in joined]
    # the rest of a group that was taken apart comes behind what stands between
    order = {run: number for number, run in enumerate(runs)}
    return sorted(found, key=lambda group: order[group[0]])


def side_by_side(graph: FxGraph, groups: Sequence[list[Run]]) -> list[list[list[Run]]]:
    """The matmuls by op: several are one although their weights differ in kind, what `together` cannot join."""
    ops: dict[object, list[list[Run]]] = {}
    for group in groups:
        several = group[0].kernel.several
        # a bias would have to be added behind, where it is rounded twice
        biased = any(graph.inputs(run.linear)[2] is not None for run in group)
        alone = several is None or biased or not several.takes(whole(group))
        ops.setdefault(id(group) if alone else _one_op(graph, group[0]), []).append(group)
    return list(ops.values())


def _one_op(graph: FxGraph, run: Run) -> object:
    """Equal for linears that may be one op: of one module and kernel, that read one input.

    What several modules read, as all cross-attention reads an encoder's output, would have to be kept for the last of
    them.
    """
    if run.beside:
        return run
    x, owner = graph.inputs(run.linear)[0], run.site.rpartition(".")[0]
    return x, owner, run.kernel.name, run.problem.input, run.problem.dtype


def _bias_joins(graph: FxGraph, run: Run) -> bool:
    """Whether it has none, or one whose values are known, a number for each row of the weight."""
    bias = graph.inputs(run.linear)[2]
    held = None if bias is None else graph.constant(bias)
    return bias is None or (held is not None and not held.is_meta and held.shape == (run.problem.N,))


def whole(group: Sequence[Run]) -> Problem:
    """The problem that joined packs are."""
    return replace(group[0].problem, N=sum(run.problem.N for run in group))
