"""One frame of torch.compile: code and packs for whatever weights it is called with."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qcompile.backends.fx.dynamo import Parameter, parameters
from qcompile.backends.fx.inductor import Compiled, Inductor, structure
from qcompile.backends.fx.packs import PackMissingError, Stamp, weight_stamp
from qcompile.errors import CoverageError
from qcompile.options import Options
from qcompile.quantized import PACKS, Quantized
from qcompile.report import Report

# code, names of the frame's inputs it takes, names of the module's tensors it takes after them
_Code = tuple[Compiled, list[str], list[str]]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Compiled code together with what one set of weights gives it.

    sources: for each argument of the code, a position among the frame's inputs, or a tensor.
    parameters: every parameter of the frame: position, identity, and its stamp if its values were quantized.
    weights: the weight of each site.
    freeable: weights whose float values may be given up once the code has run.
    """

    code: Compiled
    sources: tuple[int | Tensor, ...]
    parameters: tuple[tuple[int, "weakref.ref[Tensor]", Stamp | None], ...]
    weights: Mapping[str, "weakref.ref[Tensor]"]
    freeable: tuple["weakref.ref[Tensor]", ...]
    report: Report

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether this was made for the parameters among `args`, and packs from their present values."""
        return all(
            ref() is args[i] and (stamp is None or weight_stamp(args[i]) == stamp) for i, ref, stamp in self.parameters
        )

    def alive(self) -> bool:
        """Whether all the parameters still exist."""
        return all(ref() is not None for _, ref, _ in self.parameters)

    def reads(self, names: Mapping[int, str]) -> bool:
        """Whether any of its parameters is among those names, by identity."""
        return any(id(ref()) in names for _, ref, _ in self.parameters)

    def named_report(self, names: Mapping[int, str]) -> Report:
        """The report, with sites named as seen from the whole model, for a frame that is only a part of it."""
        sites = []
        for site in self.report.sites:
            ref = self.weights.get(site.name)
            path = names.get(id(ref()), "").rpartition(".")[0] if ref is not None else ""
            sites.append(replace(site, name=path) if path.endswith(f".{site.name}") else site)
        return replace(self.report, sites=tuple(sites))


class Frame:
    """What torch.compile calls in place of one piece of bytecode.

    It may be called with the weights of several module instances, and with weights that changed. Each unseen set
    of weights goes through the passes; where that gives a graph of known structure, the code compiled for it is
    used again with other packs.
    """

    # Dynamo wraps what a backend returns, and would copy a __dict__, which kept packs of dead weights alive
    __slots__ = (
        "__weakref__",
        "_bounds",
        "_code",
        "_gm",
        "_inductor",
        "_last",
        "_options",
        "_parameters",
        "_positions",
        "asked",
    )

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self.asked = options
        self._options = options
        self._gm = gm
        self._parameters = parameters(gm, example_inputs)
        self._positions = {n.name: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self._inductor = Inductor(gm, example_inputs, options.mode)
        self._code: dict[str, _Code] = {}
        self._bounds: dict[tuple[int, ...], Bound] = {}
        self._last: Bound | None = None

    def __call__(self, *args: Any) -> Any:
        bound = self._last
        with torch.no_grad():
            if bound is None or not bound.fits(args):
                bound = self.bind(args)
            result = bound.code(*[args[s] if type(s) is int else s for s in bound.sources])
        if bound.freeable:
            self._free(bound)
        return result

    @property
    def traced(self) -> GraphModule:
        """What Dynamo gave, not to be changed."""
        return self._gm

    def weights(self, bound: Bound) -> dict[Parameter, Tensor]:
        """The parameters of the frame, as it was bound to them; they must be alive."""
        held = {position: ref() for position, ref, _ in bound.parameters}
        found = {slot: held[slot.position] for slot in self._parameters}
        return {slot: weight for slot, weight in found.items() if weight is not None}

    def bounds(self) -> list[Bound]:
        """What the frame was bound to and still could be called with."""
        return [bound for bound in self._bounds.values() if bound.alive()]

    def bind(self, args: Sequence[Any]) -> Bound:
        """Code and packs for the weights among `args`, from before or made now."""
        key = tuple(id(args[p.position]) for p in self._parameters)
        bound = self._bounds.get(key)
        if bound is None or not bound.fits(args):
            bound = self._quantized(args)
            self._bounds = {k: b for k, b in self._bounds.items() if b.alive()} | {key: bound}
        self._last = bound
        return bound

    def _free(self, bound: Bound) -> None:
        """Give up float weights. Dynamo's guards see another stride then, and its next frame starts from the packs.

        It cannot be done while compiling: Dynamo checks its new guards against the weights it traced.
        """
        for ref in bound.freeable:
            if (weight := ref()) is not None:
                PACKS.free(weight)
        self._bounds = {
            key: replace(other, freeable=()) if other is bound else other for key, other in self._bounds.items()
        }
        self._last = None

    def _quantized(self, args: Sequence[Any]) -> Bound:
        try:
            # of weights that are packed already, only the shape is needed
            return self._bound(Quantized(self._gm, self._parameters, args, self._options, reuse=self._options.lower))
        except PackMissingError:
            return self._bound(Quantized(self._gm, self._parameters, args, self._options, reuse=False))

    def _bound(self, quantized: Quantized) -> Bound:
        report = quantized.report()
        _require_coverage(report, self._options.min_coverage)
        module, constants = quantized.module, quantized.constants()
        code, inputs, names = self._compiled(module)
        sources = (*(self._positions[name] for name in inputs), *(constants[name] for name in names))
        _write_report(report, self._options)
        return Bound(
            code=code,
            sources=sources,
            parameters=quantized.parameters(),
            weights=quantized.weights(),
            freeable=quantized.packed() if self._options.free_weights else (),
            report=report,
        )

    def _compiled(self, module: GraphModule) -> _Code:
        if not self._options.lower:
            return module, [n.name for n in module.graph.find_nodes(op="placeholder")], []
        text = structure(module)
        if text not in self._code:
            self._code[text] = self._inductor.compile(module)
        return self._code[text]


def _require_coverage(report: Report, least: float) -> None:
    if report.coverage >= least:
        return
    left = sorted((s for s in report.sites if s.weight is None), key=lambda s: -s.bytes_before)
    listed = "; ".join(f"{s.name!r} {list(s.shape)}: {s.reason}" for s in left[:5])
    raise CoverageError(
        f"recipe {report.recipe!r} quantized {report.coverage:.1%} of the weight bytes, less than min_coverage="
        f"{least:.1%}. Left alone, largest first: {listed}. Add rules for them, or lower min_coverage"
    )


def _write_report(report: Report, options: Options) -> None:
    if isinstance(options.report, str | Path):
        report.to_json(options.report)
    elif options.report is not None:
        options.report(report)
