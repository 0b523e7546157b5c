"""A frame's graph, quantized with one set of weights, and the packs that it reads in their place."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qcompile import pipeline
from qcompile.backends.fx.door import open_dynamo
from qcompile.backends.fx.dynamo import Parameter, is_whole
from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.kernels import Kernel, Problem, packed, tail
from qcompile.backends.fx.lower import Lowered, Target, lower
from qcompile.backends.fx.packs import Key, Pack, PackMissingError, PackStore, Stamp, freed_error, weight_stamp
from qcompile.backends.fx.runs import Codes
from qcompile.backends.fx.sources import weight_source, without_parameter
from qcompile.binding import require_values
from qcompile.errors import OptionsError, PlanError
from qcompile.folds import fold_notes
from qcompile.graph import Op
from qcompile.numerics import QParams, dequantize, exact_exp2, snr_db
from qcompile.options import Options
from qcompile.outliers import outlier_notes
from qcompile.plan import Decision, Plan
from qcompile.presets import default_recipe, parse_recipe
from qcompile.recipe import Recipe
from qcompile.report import Report, SiteReport
from qcompile.sharing import kept_apart
from qcompile.shifts import lowered_codes
from qcompile.sites import find_sites, left_over
from qcompile.solved import Solved, require_source

PACKS = PackStore()


class Quantized:
    """The frame's graph, quantized with one set of weights."""

    def __init__(
        self, gm: GraphModule, slots: Sequence[Parameter], args: Sequence[Any], options: Options, *, reuse: bool
    ) -> None:
        slots = _named(slots, args, options.plan)
        self._slots = {slot.name: slot for slot in slots}
        self._weights: dict[str, Tensor] = {slot.name: args[slot.position] for slot in slots}
        target = target_of(self._weights.values(), options)
        decide = decided(options, target)
        # what is chosen by a weight's values is chosen from them each time; a plan has chosen
        reuse = reuse and not (isinstance(decide, Recipe) and decide.chooses)
        self._given = {name: _stand_in(name, w, reuse) for name, w in self._weights.items()}
        graph = open_dynamo(gm, {slot.placeholder: (slot.name, self._given[slot.name]) for slot in slots})
        self._canonical = {f.site.name: f.site.weight for f in find_sites(graph)} | {
            left.name: left.weight for left in left_over(graph)
        }
        self._prepared: dict[tuple[str, str], Tensor] = {}
        self._weight_of = {f.site.name: weight_source(graph, f.value) for f in find_sites(graph)}
        self._reuse = reuse
        self._notes = [*without_parameter(graph)]
        if isinstance(decide, Plan):
            self._notes += [
                *decide.notes,
                *fold_notes(decide.folds, decide.decisions),
                *pipeline.multiplications(graph, decide),
            ]
            self._notes += outlier_notes(decide.outliers) if decide.outliers is not None else ()
        self._packs: dict[str, dict[Key, Pack]] = {}
        self._runs: list[Lowered] = []
        lowering = partial(self._lower, target) if options.lower else None
        self.plan = pipeline.quantize(
            graph, decide, whole=is_whole(gm), dump=options.dump, prepared=self._prepared, lower=lowering
        )
        self._graph, self._device = graph, target.device
        self.module = graph.module

    def _lower(self, target: Target, graph: FxGraph, *, plan: Plan) -> int:
        self.plan = plan
        self._runs = lower(graph, target, self)
        return len(self._runs)

    def constants(self) -> dict[str, int | Tensor]:
        """The module's tensors by attribute: the position of a weight among the frame's inputs, or a pack.

        Weights that were only shapes so far are put in place.  Raises WeightError if one was freed.
        """
        positions = {id(self._given[name]): (name, slot.position) for name, slot in self._slots.items()}
        found: dict[str, int | Tensor] = {}
        for attribute, tensor in self._graph.constants().items():
            if id(tensor) in positions:
                name, found[attribute] = positions[id(tensor)]
                self._require_float(name)
                setattr(self.module, attribute, self._weights[name])
                continue
            if tensor.is_meta:
                self._refuse_shapes_only()
            found[attribute] = tensor
        for name in self._quantized() - {self._weight_of[run.site].name for run in self._runs}:
            PACKS.keep_float(self._weights[name])
        return found

    def _require_float(self, name: str) -> None:
        if PACKS.freed(self._weights[name]):
            raise freed_error(name)
        PACKS.keep_float(self._weights[name])

    def _refuse_shapes_only(self) -> None:
        """What no kernel packs was quantized from a weight of which only the shape was taken."""
        if self._reuse:
            raise PackMissingError
        raise freed_error(next(name for name, weight in self._weights.items() if PACKS.freed(weight)))

    def _quantized(self) -> set[str]:
        """The weights of which codes were made."""
        decided = (d.name for d in self.plan.decisions.values() if d.weight is not None)
        return {self._weight_of[site].name for site in decided if site in self._weight_of}

    def packed(self) -> tuple["weakref.ref[Tensor]", ...]:
        """The weights that packs stand for and that still have float values."""
        weights = {id(w): w for run in self._runs if not PACKS.freed(w := self._weight(run.site))}
        return tuple(weakref.ref(weight) for weight in weights.values())

    def parameters(self) -> tuple[tuple[int, "weakref.ref[Tensor]", Stamp | None], ...]:
        """Position and identity of every parameter, and the stamp of those of which something was made."""
        prepared = bool(self.plan.folds) or any(d.outliers for d in self.plan.decisions.values())
        # norms that took a factor, and biases of linears whose channels were numbered anew, are copies, too
        stamped = set(self._weights) if prepared else self._quantized() | self._copied()
        return tuple(
            (self._slots[name].position, weakref.ref(weight), weight_stamp(weight) if name in stamped else None)
            for name, weight in self._weights.items()
        )

    def _copied(self) -> set[str]:
        """The weights that the graph does not read itself, as biases that were joined."""
        read = {id(tensor) for tensor in self._graph.constants().values()}
        return {name for name, w in self._weights.items() if not {id(w), id(self._given[name])} & read}

    def weights(self) -> dict[str, "weakref.ref[Tensor]"]:
        """The weight of each site."""
        return {site: weakref.ref(self._weight(site)) for site in self._weight_of}

    def _weight(self, site: str) -> Tensor:
        return self._weights[self._weight_of[site].name]

    def report(self) -> Report:
        """Every site and every weight left alone."""
        runs = {run.site: run for run in self._runs}
        # a weight of several sites counts where it is quantized, or else at the first
        ordered = sorted(self.plan.decisions.values(), key=lambda d: d.weight is None)
        source = {d.name: self._weight_of[d.name].name if d.name in self._weight_of else d.name for d in ordered}
        owners = {source[d.name]: d.name for d in reversed(ordered)}
        packs = {id(pack): d.name for d in reversed(ordered) for pack in self._packs.get(d.name, {}).values()}
        sites = tuple(
            self._site_report(d, runs.get(d.name), owners[source[d.name]], packs) for d in self.plan.decisions.values()
        )
        notes = (*self._notes, *self._storage(), *kept_apart(self.plan.decisions.values(), source))
        return Report(recipe=self.plan.recipe.name, device=self._device, sites=sites, notes=notes)

    def _storage(self) -> Iterator[str]:
        """Notes on how weights with lowered columns are stored: as codes and octaves, or lowered, in more bits."""
        kernels: dict[str, list[str]] = {}
        for run in self._runs:
            if self.plan.decisions[run.site].shift:
                kernels.setdefault(run.kernel, []).append(run.site)
        for kernel, sites in kernels.items():
            nbytes = sum(pack.nbytes for site in sites for pack in self._packs.get(site, {}).values())
            bits = 8 * nbytes / sum(self._canonical[site].numel() for site in sites)
            yield f"{len(sites)} weights with lowered columns are stored in {bits:.1f} bits a number ({kernel})"

    def _site_report(
        self, decision: Decision, run: Lowered | None, owner: str, counted: Mapping[int, str]
    ) -> SiteReport:
        """counted: by identity of a pack, at which site it counts."""
        weight = self._canonical[decision.name]
        packs, owned = list(self._packs.get(decision.name, {}).values()), decision.name == owner
        float_bytes = weight.nbytes if owned or owner in self._packs else 0
        # what sites of one weight read under several specs are several packs
        packed_bytes = sum(pack.nbytes for pack in packs if counted[id(pack)] == decision.name)
        return SiteReport(
            name=decision.name,
            op=decision.op.value,
            shape=tuple(decision.shape),
            weight=None if decision.weight is None else str(decision.weight),
            input=None if decision.input is None else str(decision.input),
            kernel=_kernel(decision, run),
            refused={} if run is None else run.refused,
            snr_db=min((pack.snr_db for pack in packs if pack.snr_db is not None), default=None),
            bytes_before=weight.nbytes if owned else 0,
            bytes_after=packed_bytes if packs else float_bytes,
            macs=0 if decision.op is Op.EMBEDDING else weight.numel(),
            reason=decision.reason,
            outliers=0 if decision.weight is None else len(decision.outliers),
        )

    def quantized(
        self, site: str, constant: str, kernel: Kernel, problem: Problem, weight: Codes
    ) -> Mapping[str, Tensor]:
        """The pack of a site's kernel, from before or made now: from what the plan stores if only a shape is there."""
        key, stored = self._key(site, constant, kernel, problem), self.plan.decisions[site].solved
        if stored is not None and not weight.at_hand:
            make_stored = partial(self._stored_pack, site, constant, kernel, problem, stored)
            return self._pack(site, key, make_stored, at_hand=True)

        def make() -> Pack:
            codes = weight.make()
            held = self._prepared[site, constant.rpartition("_codes")[0]]
            snr = _snr_db(held, codes, weight.qparams)
            return Pack(tensors=kernel.pack(codes, weight.qparams, problem.dtype), snr_db=snr)

        return self._pack(site, key, make, at_hand=weight.at_hand)

    def _stored_pack(self, site: str, constant: str, kernel: Kernel, problem: Problem, stored: Solved) -> Pack:
        require_source(site, constant.rpartition("_codes")[0], stored)
        device, shift = self._weight(site).device, self.plan.decisions[site].shift
        # what lowers its columns is folded into a weight of another spec
        is_stored = problem.weight == stored.spec
        if kernel.pack is packed.pack and is_stored:
            return Pack(tensors=stored.tensors(device, site), snr_db=stored.snr_db)
        qparams = stored.read(device, site)
        assert qparams.codes is not None
        codes, qparams = (qparams.codes, qparams) if is_stored else lowered_codes(qparams.codes, qparams, shift)
        return Pack(tensors=kernel.pack(codes, qparams, problem.dtype), snr_db=stored.snr_db)

    def joined(self, members: Sequence[tuple[str, str]], kernel: Kernel, problem: Problem) -> Mapping[str, Tensor]:
        """The packs of several sites as one, of which theirs are views from now on."""
        keys = [(site, self._key(site, constant, kernel, problem)) for site, constant in members]
        whole, views = PACKS.joined([(self._weight(site), key) for site, key in keys])
        for (site, key), view in zip(keys, views, strict=True):
            self._packs[site][key] = view
        return whole

    def _key(self, site: str, constant: str, kernel: Kernel, problem: Problem) -> Key:
        decision = self.plan.decisions[site]
        how = f"{decision.weight} {decision.solver} {decision.data_digest} {decision.shift}"
        return f"{how} {problem.dtype} {self._variant(site, constant)}", kernel.name

    def tail(self, site: str, constant: str, weight: Tensor) -> Mapping[str, Tensor]:
        """The pack of a site's outlier channels, from before or made now."""

        stored = self.plan.decisions[site].solved
        columns = stored.columns if stored is not None and weight.is_meta else weight
        at_hand = columns is not None and not columns.is_meta

        def make() -> Pack:
            assert columns is not None
            return Pack(tensors=tail.pack(columns.to(self._weight(site).device)), snr_db=float("inf"))

        return self._pack(site, (self._variant(site, constant), "tail"), make, at_hand=at_hand)

    def _variant(self, site: str, constant: str) -> str:
        source = self._weight_of[site]
        return f"{source.view} {source.variant(constant)}"

    def _pack(self, site: str, key: Key, make: Callable[[], Pack], *, at_hand: bool) -> Mapping[str, Tensor]:
        weight = self._weight(site)
        if not at_hand and PACKS.freed(weight) and not PACKS.has(weight, key):
            raise freed_error(self._weight_of[site].name)
        pack = PACKS.get(weight, key, make, at_hand=at_hand)
        self._packs.setdefault(site, {})[key] = pack
        return pack.tensors


def _snr_db(weight: Tensor, codes: Tensor, qparams: QParams) -> float:
    """Signal-to-noise ratio of codes, before their columns were lowered, if they were: as a plan keeps it of them."""
    held = dequantize(codes, qparams)
    if qparams.lowered is None:
        return snr_db(weight, held)
    raised = exact_exp2(torch.tensor(qparams.lowered.shift, device=weight.device))
    return snr_db(weight * raised, held * raised)


def _stand_in(name: str, weight: Tensor, reuse: bool) -> Tensor:
    """The weight, or only its shape where packs hold its values.  Raises WeightError if it has no values."""
    require_values(name, weight)
    gone = PACKS.freed(weight) or (reuse and PACKS.known(weight))
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta") if gone else weight


def _named(slots: Sequence[Parameter], args: Sequence[Any], plan: Plan | None) -> list[Parameter]:
    """The parameters by the names that the plan knows, which sees the whole model; else by those seen from the frame.

    Raises PlanError if neither it nor an equal one was bound to a model that owns one of them.
    """
    if plan is None or plan.binding is None:
        return list(slots)
    binding = plan.binding_of([args[slot.position] for slot in slots]) if slots else plan.binding
    if binding is None:
        raise PlanError(
            f"the plan was bound to another model: none of this one's parameters, such as {slots[-1].name!r}, is known "
            "to it. Bind it to this model, plan.bind(model), or calibrate this one with qcompile.calibrate"
        )
    return [replace(slot, name=next(iter(binding.name_of(args[slot.position])), slot.name)) for slot in slots]


def target_of(weights: Iterable[Tensor], options: Options) -> Target:
    """Where the weights are."""
    device = next((w.device.type for w in weights), "cpu")
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    return Target(device=device, capability=capability, small=options.free_weights)


def decided(options: Options, target: Target) -> Recipe | Plan:
    """What the options ask for: their plan, or their recipe, or that of the device."""
    if options.plan is not None:
        return options.plan
    if options.recipe is None:
        return default_recipe(target.device, target.capability)
    recipe = parse_recipe(options.recipe)
    if recipe.chooses and options.free_weights:
        raise OptionsError(
            f"recipe {recipe.name!r} chooses formats by the values of weights, and free_weights gives those up, while "
            "every new shape asks for them: let qcompile.calibrate(model, batches, recipe) choose once, and compile "
            "with options={'plan': plan}"
        )
    return recipe


def _kernel(decision: Decision, run: Lowered | None) -> str:
    """What runs a site; quantized ops that no kernel takes run as the oracle has it, in plain torch."""
    if run is not None:
        return f"{run.kernel} + tail" if decision.outliers else run.kernel
    return "" if decision.weight is None else "plain torch"
