"""Choosing codes while the model runs: each weight is solved on what the quantized weights before it make of the data.

All batches go through the model side by side, each in a thread of its own, of which one runs at a time. A batch stops
where it reaches a weight that is not solved yet; when all stand still, the second moments of what the first of these
weights is about to multiply are summed up, it is solved together with those that read the same, and its batches go on
with the quantized weight. So the model runs once, whatever it is made of; only one matrix of moments [K, K] is in
memory at a time, and of each batch what lies between two layers: on a GPU that of one batch, and of those that stand
still in host memory.
"""

import logging
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qcompile.binding import Binding
from qcompile.calls import Calls
from qcompile.errors import CalibrationError
from qcompile.folds import rescaled, scale_before
from qcompile.graph import Op
from qcompile.numerics import QParams, dequantize, find_qparams, quantize
from qcompile.parked import Parked
from qcompile.plan import Decision, Plan
from qcompile.progress import most_memory, shown
from qcompile.sites import Site
from qcompile.solved import Solved, solved
from qcompile.solvers import IN_TURN, SOLVERS
from qcompile.solvers.moments import Moments
from qcompile.watch import Call, Seen, evaluating, find_call, mask_of, real_rows, run_batch

_LOG = logging.getLogger(__name__)

# sites that a note names
NAMED = 3


class Kept(Protocol):
    """Where what was solved is kept, so that a run that was interrupted goes on."""

    def known(self, names: Sequence[str]) -> Mapping[str, Solved]:
        """What an earlier run found for these sites, which read the same; empty if it did not come so far."""

    def keep(self, decisions: Sequence[Decision]) -> None:
        """These are solved, together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """What is known of a model's weights before they are solved; no statistics, which would fill a GPU meanwhile.

    sites: by name.  read: by name, a number of the activation that a site reads; sites that share one are alike.
    again: see `Seen`.
    """

    sites: Mapping[str, Site]
    read: Mapping[str, int]
    again: Collection[str] = ()

    @classmethod
    def of(cls, seen: Seen) -> "Weights":
        """Those that running the float model on the batches showed."""
        numbers = {id(stats): number for number, stats in enumerate(seen.stats.values())}
        read = {name: numbers[id(stats)] for name, stats in seen.stats.items()}
        return cls(sites=seen.sites, read=read, again=seen.again)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Sites that were solved together, on so many rows.  output_db: signal-to-noise ratio of their outputs there."""

    names: Sequence[str]
    rows: int
    output_db: Mapping[str, float]

    def __str__(self) -> str:
        if not self.output_db:
            return f"{self.names[0]}: known"
        return ", ".join(f"{name} {db:.1f} dB" for name, db in self.output_db.items())


def solve_in_turn(
    model: nn.Module,
    batches: Sequence[Any],
    plan: Plan,
    weights: Weights,
    *,
    divided: Mapping[str, Tensor] | None = None,
    kept: Kept | None = None,
    progress: bool = True,
) -> Plan:
    """The plan, with the codes of all weights whose solver is run in turn.

    batches: see `qcompile.calibrate`; one thread each.  plan: says which weights these are, and what else is quantized.
    weights: see there.  divided: by site, what the plan's folds divide the rows of its weight by, float64 [N].
    kept: what an earlier run solved is taken from there, and what this one solves is put there.
    Whatever the plan quantizes is quantized on the way, inputs too, behind its folds. A site that is called several
    times is solved on its first call, as later ones read what its codes made, and is noted. So are sites with fewer
    rows of data than channels: what they show of the channels is not all. The log has the error of each site.
    Raises CalibrationError if a site is not reached, or its moments are NaN or Inf; and what the model raises.
    """
    run = _Run(model, plan, weights, divided or {}, kept)
    # whatever ends this, no batch is left standing
    with evaluating(model), closing(run.steps(batches)) as steps:
        for step in shown(steps, progress=progress, what="solve", total=run.groups, tell=str):
            _LOG.info("%d rows: %s; %s held at most", step.rows, step, most_memory())
    if run.left:
        raise CalibrationError(
            f"with the weights before them quantized, no batch reached {', '.join(map(repr, list(run.left)[:NAMED]))}, "
            "which batches of the float model did: give more batches, or a rule with solver 'imatrix' to these sites"
        )
    decisions = {name: replace(d, solved=run.solved.get(name)) for name, d in plan.decisions.items()}
    notes = (*plan.notes, *_scarce(run.rows, decisions), *_again([name for name in run.rows if name in weights.again]))
    return replace(plan, decisions=decisions, notes=notes)


def _scarce(rows: Mapping[str, int], decisions: Mapping[str, Decision]) -> Iterator[str]:
    few = [name for name, count in rows.items() if count < decisions[name].shape[-1]]
    if few:
        most = max(decisions[name].shape[-1] for name in few)
        yield (
            f"{len(few)} sites were solved on fewer rows of data than they have channels, such as {few[0]!r} on "
            f"{rows[few[0]]}: codes may follow chance; calibrate with {most} rows or more, several times as many if "
            "there are"
        )


def _again(called: Sequence[str]) -> Iterator[str]:
    if called:
        yield (
            f"{len(called)} sites are called several times in one run, such as {called[0]!r}, and were solved on what "
            "their first call reads: a rule with solver 'imatrix' to these sites goes by all of it"
        )


class _StoppedError(BaseException):
    """Takes a batch out of the model; no error for the model to handle."""


class _Run:
    """One run of all batches, and what it has solved so far.

    left: sites that are to be solved, each with those that read the same; groups: how many such groups there are.
    rows: that each was solved on.  parked: what batches that stand still hold.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, weights: Weights, divided: Mapping[str, Tensor], kept: Kept | None
    ) -> None:
        wanted = [d.name for d in plan.decisions.values() if d.weight is not None and d.solver in IN_TURN]
        members: dict[int, list[str]] = {}
        for name in wanted:
            members.setdefault(weights.read[name], []).append(name)
        self.left = {name: members[weights.read[name]] for name in wanted}
        self.groups = len(members)
        self.solved: dict[str, Solved] = {}
        self.rows: dict[str, int] = {}
        self._order = {name: number for number, name in enumerate(wanted)}
        self._model, self._plan, self._binding = model, plan, Binding(model)
        self._divided, self._kept, self._sites = divided, kept, weights.sites
        scales = {name: scale_before(name, plan.folds) for name in plan.decisions}
        self._scales = {name: scale for name, scale in scales.items() if scale is not None}
        self.parked = Parked(model)
        # of weights that are solved alone: scales, and no codes, as those of all weights are half as large as the model
        self._alone: dict[str, QParams] = {}
        # of sites between two that are solved: all batches pass them one after the other
        self._values: dict[str, Tensor] = {}

    def steps(self, batches: Sequence[Any]) -> Generator[Step, None, None]:
        """Solve group after group."""
        # left last: most of what was parked dies with its batch
        with self.parked:
            yield from self._steps([_BatchThread(self, number, batch) for number, batch in enumerate(batches)])

    def _steps(self, threads: Sequence["_BatchThread"]) -> Iterator[Step]:
        try:
            for thread in threads:
                thread.go_on()
            while self.left and (waiting := [t for t in threads if t.call is not None]):
                first = min((t.call.name for t in waiting if t.call is not None), key=self._order.__getitem__)
                names = self.left[first]
                here = [t for t in waiting if t.call is not None and t.call.name in names]
                yield self._solve(names, here)
                if self.left:
                    for thread in here:
                        thread.go_on()
        finally:
            for thread in threads:
                thread.stop()

    def run(self, batch: Any, number: int) -> None:
        """The model on one batch; called in its thread."""
        run_batch(self._model, batch, number)

    def find(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """The site that this call is, if the plan quantizes anything of it."""
        call = find_call(self._binding, func, args, kwargs)
        decision = None if call is None else self._plan.decisions.get(call.name)
        if call is None or decision is None or (decision.weight is None and decision.input is None):
            return None
        return call

    def quantized_input(self, call: Call) -> Tensor:
        """What the site's weight multiplies."""
        decision, x = self._plan.decisions[call.name], call.x
        if call.name in self._scales:
            x = x / self._scales[call.name].to(x)
        if decision.input is None or call.op is not Op.LINEAR:
            return x
        qparams = decision.input_qparams or find_qparams(x, decision.input)
        return dequantize(quantize(x, qparams), qparams, x.dtype)

    def quantized_weight(self, call: Call) -> Tensor:
        """The weight as the plan quantizes it; what folds divide its rows by is given back, as no others follow."""
        name = call.name
        if name not in self._values:
            values, decision = self._folded(name, call.weight), self._plan.decisions[name]
            if decision.weight is not None:
                qparams = self._qparams(decision, values)
                values = dequantize(quantize(values, qparams), qparams, call.weight.dtype)
            rows = self._divided.get(name)
            self._values[name] = values if rows is None else (values * rows.to(values.device)[:, None]).to(values.dtype)
        return self._values[name]

    def _qparams(self, decision: Decision, weight: Tensor) -> QParams:
        if decision.name in self.solved:
            return self.solved[decision.name].read(weight.device)
        if decision.name not in self._alone:
            assert decision.weight is not None
            qparams = SOLVERS[decision.solver](weight, decision.weight, decision.importance)
            if qparams.codes is not None:
                return qparams
            self._alone[decision.name] = qparams
        return self._alone[decision.name]

    def _folded(self, name: str, weight: Tensor) -> Tensor:
        """The weight as `fold_smooth` leaves it."""
        columns, rows = self._scales.get(name), self._divided.get(name)
        return weight.detach() if columns is None and rows is None else rescaled(name, weight.detach(), columns, rows)

    def _solve(self, names: Sequence[str], waiting: Sequence["_BatchThread"]) -> Step:
        self._values.clear()
        known = {} if self._kept is None else dict(self._kept.known(names))
        # without padding, a batch at a time
        rows = _rows(waiting)
        count = sum(len(part) for part in rows) if known else 0
        output_db = {}
        if not known:
            moments = Moments.over(rows, self._sites[names[0]].weight.shape[1])
            count = moments.rows
            for name in names:
                known[name], output_db[name] = self._solve_one(name, moments, last=name == names[-1])
            if self._kept is not None:
                self._kept.keep([replace(self._plan.decisions[name], solved=known[name]) for name in names])
        for name in names:
            self.solved[name], self.rows[name] = known[name], count
            del self.left[name]
        return Step(names=names, rows=count, output_db=output_db)

    def _solve_one(self, name: str, moments: Moments, *, last: bool) -> tuple[Solved, float]:
        decision, weight = self._plan.decisions[name], self._folded(name, self._sites[name].weight)
        assert decision.weight is not None
        try:
            # whatever the caller runs the model under
            with torch.autocast(weight.device.type, enabled=False):
                qparams = IN_TURN[decision.solver](weight, decision.weight, moments)
        except CalibrationError as e:
            e.add_note(f"while solving the weight of {name!r}")
            raise
        assert qparams.codes is not None
        if last:
            moments.forget()
        return solved(weight, qparams), moments.snr_db(weight, dequantize(qparams.codes, qparams))


def _rows(waiting: Iterable["_BatchThread"]) -> Iterator[Tensor]:
    """What the site of each batch is about to multiply [rows, K], there until the next one is asked for."""
    for thread in waiting:
        with thread.rows() as rows:
            yield rows


class _BatchThread(threading.Thread):
    """One batch on its way through the model; it moves only while `go_on` waits for it.

    call: the site at which it stands still, None when it has not begun or is through.
    """

    def __init__(self, run: _Run, number: int, batch: Any) -> None:
        super().__init__(name=f"qcompile batch {number}", daemon=True)
        self.call: Call | None = None
        self.owner, self.number = run, number
        self._batch, self._mask = batch, mask_of(batch)
        # as the caller has them
        self._settings: list[AbstractContextManager[Any]] = [
            torch.autocast(device, dtype=torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ]
        self._settings.append(torch.get_default_device())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            # and its device; what one stream does is in order, whoever reads it next
            self._settings.append(torch.cuda.stream(torch.cuda.current_stream()))
        self._x: Tensor | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def go_on(self) -> None:
        """Run on to the next site that is to be solved, or to the end.  Raises what the model raises."""
        self.owner.parked.bring_back(self.number)
        if self.ident is None:
            self.start()
        else:
            self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        if self.call is not None:
            self.owner.parked.park(self.number)

    def stop(self) -> None:
        """Take the batch out of the model, wherever it is."""
        self._stopping = True
        self._turn.release()
        if self.ident is not None:
            self.join()

    @contextmanager
    def rows(self) -> Iterator[Tensor]:
        """What the weight of the site is about to multiply, without padding, [rows, K]."""
        assert self._x is not None
        with self.owner.parked.lent(self._x):
            yield real_rows(self._x, self._mask)[0]

    def wait(self, call: Call, x: Tensor) -> None:
        """Stand still at a site, about to multiply x; called in the thread itself."""
        if self._stopping:
            # the model handled what took the batch out of it, and went on
            raise _StoppedError
        self.call, self._x = call, x
        self._back.release()
        self._turn.acquire()
        self.call, self._x = None, None
        if self._stopping:
            raise _StoppedError

    def run(self) -> None:
        """The thread's own; see `go_on`."""
        try:
            # all of these are settings of a thread
            with torch.no_grad(), ExitStack() as settings, _Quantizing(self):
                for setting in self._settings:
                    settings.enter_context(setting)
                if torch.cuda.is_initialized():
                    # cuBLAS warns in threads that have used the device for nothing else yet
                    torch.cuda.synchronize()
                self.owner.run(self._batch, self.number)
        except _StoppedError:
            pass
        except BaseException as e:
            self._error = e
        finally:
            self.call, self._x = None, None
            self._back.release()


class _Quantizing(Calls):
    """Runs the sites of a model as the plan quantizes them, and stands still at those that are not solved yet."""

    def __init__(self, thread: _BatchThread) -> None:
        super().__init__()
        self._thread = thread

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        run, thread = self._thread.owner, self._thread
        given = (args, kwargs)
        # another batch may have made them, and stand still
        run.parked.bring_back_for(given)
        call = run.find(func, args, kwargs)
        if call is None:
            result = func(*args, **kwargs)
        else:
            x = run.quantized_input(call)
            if call.name in run.left:
                run.parked.made(thread.number, x, given)
                thread.wait(call, x)
            positional, named = call.arguments(args, kwargs, x, run.quantized_weight(call))
            result = func(*positional, **named)
        run.parked.made(thread.number, result, given)
        return result
