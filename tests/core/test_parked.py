"""What standing batches hold is away while they stand, and as it was afterwards. On the CPU, which parks alike."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import sequential
from qcompile.parked import SMALLEST, Parked
from qcompile.plan import Plan
from qcompile.recipe import Recipe, Rule
from qcompile.solvers import IN_TURN
from qcompile.spec import parse_spec
from tests.compile.test_importance import HIDDEN, WIDTH, Net, calibrated, data
from tests.families import FAMILIES, build, tokens

GPTQ = Rule(weight=parse_spec("int4/g32/asym/bf16"), solver="gptq")
RECIPE = Recipe(name="gptq", rules=(GPTQ,))


@pytest.fixture
def parked() -> Parked:
    return Parked(devices=("cpu",), smallest=0)


def is_away(x: Tensor) -> bool:
    return x.untyped_storage().nbytes() == 0


def held(x: Tensor) -> int:
    return x.untyped_storage().nbytes()


def test_storages_are_empty_while_their_batch_stands(parked: Parked) -> None:
    x, other = torch.randn(50, 4), torch.randn(3)
    values, view = x.clone(), x[3:, 1]
    parked.made(0, x, ())
    parked.made(1, [other], ())
    parked.park(0)
    assert is_away(x)
    assert is_away(view)
    assert not is_away(other)
    assert x.shape == (50, 4)
    parked.bring_back(0)
    assert torch.equal(x, values)
    assert torch.equal(view, values[3:, 1])
    # as often as it stands still
    x.add_(1)
    parked.park(0)
    assert is_away(view)
    parked.bring_back(0)
    assert torch.equal(x, values + 1)


def test_a_view_keeps_what_its_tensor_made(parked: Parked) -> None:
    x = torch.randn(50)
    view, values = x[10:], x[10:].clone()
    parked.made(0, {"x": (x,)}, ())
    del x
    parked.park(0)
    assert is_away(view)
    parked.bring_back(0)
    assert torch.equal(view, values)


def test_what_was_there_before_is_left_alone(parked: Parked) -> None:
    x = torch.randn(50)
    parked.made(0, [x[3:], x.add_(1)], {"input": [x]})
    # memory that torch cannot give up
    foreign = torch.from_numpy(np.ones(50))
    parked.made(0, (foreign, torch.empty(50, device="meta"), torch.eye(3).to_sparse(), None, "x"), ())
    parked.park(0)
    assert not is_away(x)
    assert not is_away(foreign)


def test_the_dead_are_not_kept_alive(parked: Parked) -> None:
    x = torch.randn(50)
    parked.made(0, x, ())
    parked.park(0)
    del x
    # its place may be taken by another one
    later = [torch.randn(50) for _ in range(20)]
    parked.bring_back_for(later)
    assert not any(map(is_away, later))
    with parked:
        pass
    parked.park(0)


@pytest.mark.parametrize("wrap", [lambda x: [(1, x)], lambda x: {"a": (x[2:],)}, lambda x: x.view(5, 10)])
def test_what_another_batch_reads_comes_back_for_good(parked: Parked, wrap: Callable[[Tensor], Any]) -> None:
    x = torch.randn(50)
    values, given = x.clone(), wrap(x)
    parked.made(0, x, ())
    parked.park(0)
    parked.bring_back_for(given)
    assert torch.equal(x, values)
    parked.park(0)
    assert torch.equal(x, values)


def test_inside_vmap_it_comes_back_too(parked: Parked) -> None:
    x = torch.randn(4, 5)
    expected = x.sum(1)

    def total(row: Tensor) -> Tensor:
        parked.bring_back_for(row)
        result = row.sum()
        parked.made(1, result, row)
        return result

    parked.made(0, x, ())
    parked.park(0)
    assert torch.equal(torch.vmap(total)(x), expected)


def test_lent_is_whole_and_goes_again(parked: Parked) -> None:
    x, other = torch.randn(50), torch.randn(50)
    values, view = x.clone(), x[5:]
    parked.made(0, [x, other], ())
    parked.park(0)
    with parked.lent(view):
        assert torch.equal(x, values)
        assert is_away(other)
    assert is_away(x)
    with parked.lent(values):
        pass
    assert not is_away(values)
    with parked.lent(x), parked:
        pass
    # what came back for good, as by an error, stays
    assert torch.equal(x, values)


def test_what_modules_keep_stays() -> None:
    """Code that tells nobody what it reads may read it for another batch."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    kept, listed, alone = torch.randn(5), torch.randn(6), torch.randn(7)
    model[1].table, model.caches = kept[1:], {"keys": [listed]}  # type: ignore[assignment]
    parked = Parked(model, ("cpu",), smallest=0)
    parked.made(0, (kept, listed, alone), ())
    parked.park(0)
    assert not is_away(kept)
    assert not is_away(listed)
    assert is_away(alone)
    # as long as they do
    del model[1].table
    parked.park(0)
    assert is_away(kept)
    parked.bring_back(0)
    assert not any(map(is_away, (kept, listed, alone)))


def test_small_storages_and_those_of_other_devices_stay() -> None:
    small, large = torch.zeros(SMALLEST - 1, dtype=torch.uint8), torch.zeros(SMALLEST, dtype=torch.uint8)
    here, elsewhere = Parked(devices=("cpu",)), Parked()
    for parked in (elsewhere, here):
        parked.made(0, [small, large], ())
        parked.park(0)
        assert not is_away(small)
        assert is_away(large) is (parked is here)
        parked.bring_back(0)


@pytest.fixture
def parks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on the CPU park all that they can."""
    monkeypatch.setattr(sequential, "Parked", partial(Parked, devices=("cpu",), smallest=0))


def assert_same(model: Callable[[], nn.Module], batches: list[Any], recipe: Any = RECIPE) -> None:
    """Parking changes no code."""
    plans: list[Plan] = []
    for devices in ((), ("cpu",)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sequential, "Parked", partial(Parked, devices=devices, smallest=0))
            plans.append(qcompile.calibrate(model(), batches, recipe, progress=False))
    first, second = plans
    # of codes, plans compare digests
    assert first == second
    assert any(d.solved is not None for d in first.decisions.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", [None, "int8/token/asym"])
def test_codes_are_the_same_in_every_family(family: str, given: str | None) -> None:
    rule = replace(GPTQ, input=None if given is None else parse_spec(given))
    batches = [tokens(4, 16, seed=3), tokens(2, 24, seed=4), tokens(3, 16, seed=5)]
    assert_same(partial(build, family), batches, Recipe(name="r", rules=(rule,)))


@pytest.mark.parametrize("preset", ["awq4", "gptq4"])
def test_codes_are_the_same_behind_folds_and_padding(preset: str) -> None:
    ids = tokens(3, 16, seed=3)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    assert_same(partial(build, "llama"), [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}], preset)


@dataclass
class Notes:
    last: Tensor | None = None
    kept: list[Tensor] = field(default_factory=list)
    seen: list[tuple[Tensor, ...]] = field(default_factory=list)


class Keeping(Net):
    """Keeps tensors wherever models do, and notes what each batch makes. Its tables are the first batch's of a run.

    Notes lie where no module has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_turn: bool | None = None
        self.table = torch.empty(0)
        self.notes = Notes()

    @property
    def kept(self) -> list[Tensor]:
        return self.notes.kept

    @property
    def seen(self) -> list[tuple[Tensor, ...]]:
        return self.notes.seen

    @property
    def last(self) -> Tensor | None:
        return self.notes.last

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        in_turn = threading.current_thread().name.startswith("qcompile batch")
        if in_turn is not self.in_turn:
            self.in_turn, self.table = in_turn, torch.linspace(0.5, 1.5, WIDTH)
            cached.cache_clear()
        y = self.norm(x if shift is None else x + shift) * self.table * cached(WIDTH)
        self.notes.last = y[1:]
        hidden = self.up(y)
        self.kept.append(hidden)
        # in place, and views of it
        hidden.relu_()
        left, right = hidden.chunk(2, -1)
        self.seen.append((y, hidden, left))
        return torch.cat([self.down(torch.cat([left, right], -1)), self.side(y)], -1)


@lru_cache
def cached(width: int) -> Tensor:
    return torch.linspace(1.0, 2.0, width)


def keeping() -> Keeping:
    torch.manual_seed(0)
    return Keeping().eval()


def test_codes_are_the_same_where_batches_share_tensors() -> None:
    shift = torch.randn(WIDTH)
    assert_same(keeping, [(data(rows=90), shift), (data(seed=5, rows=40), shift), (data(seed=6, rows=70), shift)])


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What is called whenever a weight is solved, while all batches stand still."""
    checks: list[Callable[[], None]] = []
    solver = IN_TURN["gptq"]

    def checked(*args: Any) -> Any:
        for check in checks:
            check()
        return solver(*args)

    monkeypatch.setitem(IN_TURN, "gptq", checked)
    return checks


@pytest.mark.usefixtures("parks")
@pytest.mark.parametrize("given", [None, "int8/token/asym"])
def test_the_memory_of_standing_batches_is_free(given: str | None, standing: list[Callable[[], None]]) -> None:
    model, shift, held_at = keeping(), torch.randn(WIDTH), []
    rule = replace(GPTQ, input=None if given is None else parse_spec(given))
    batches = [(data(rows=rows, seed=rows), shift) for rows in (90, 40, 70)]

    def check() -> None:
        # three batches were watched before
        made = model.kept[3:] + [x for seen in model.seen[3:] for x in seen]
        # with what they are about to multiply
        threads = [t for t in threading.enumerate() if isinstance(t, sequential._BatchThread)]
        made += [t._x for t in threads if t._x is not None]
        held_at.append((len(made), sum(map(held, made))))
        assert model.last is not None
        assert is_away(model.last)
        assert all(map(held, (shift, *model.parameters(), *(x for x, _ in batches))))

    standing.append(check)
    qcompile.calibrate(model, batches, Recipe(name="r", rules=(rule,)), progress=False)
    # up and side are solved before anything behind them is there
    assert held_at == [(3, 0), (3, 0), (15, 0)]
    # all that the model kept is whole
    assert all(x.isfinite().all() and len(x) in (90, 40, 70) for x in model.kept)
    for (x, _), seen, hidden in zip(batches, model.seen[3:], model.kept[3:], strict=True):
        y = model.norm(x + shift) * model.table * cached(WIDTH)
        assert torch.equal(seen[0], y)
        assert torch.equal(seen[2], hidden[:, : HIDDEN // 2])


@pytest.mark.usefixtures("parks")
def test_a_batch_that_the_first_linear_reads_stays(standing: list[Callable[[], None]]) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).eval(), [data(), data(seed=5)]
    stayed: list[bool] = []
    standing.append(lambda: stayed.append(all(map(held, batches))))
    calibrated(model, RECIPE, *batches)
    assert stayed == [True, True]


@pytest.mark.usefixtures("parks")
@pytest.mark.parametrize("error", ["model", "solver"])
def test_all_is_whole_after_an_error(error: str, standing: list[Callable[[], None]]) -> None:
    model, threads = keeping(), threading.active_count()
    # both batches were watched, and one or both stood still behind `up`
    count = 3 if error == "model" else 4

    def fail(*_: Any) -> None:
        if len(model.kept) == count:
            raise ValueError(error)

    if error == "model":
        model.up.register_forward_hook(fail)
    else:
        standing.append(fail)
    with pytest.raises(ValueError, match=error):
        calibrated(model, RECIPE, data(rows=90), data(rows=40))
    assert threading.active_count() == threads
    assert len(model.kept) == count
    everything = [*model.kept, *(x for seen in model.seen for x in seen), model.last, model.table, cached(WIDTH)]
    assert all(x is not None and held(x) and x.isfinite().all() for x in everything)


@pytest.mark.usefixtures("parks")
def test_all_is_whole_when_nobody_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = keeping()

    def one(items: Any, **_: Any) -> Any:
        yield next(iter(items))
        raise KeyboardInterrupt

    monkeypatch.setattr(sequential, "shown", one)
    with pytest.raises(KeyboardInterrupt) as caught:
        calibrated(model, RECIPE, data(rows=90), data(rows=40))
    assert caught.value.__traceback__ is not None
    assert model.last is not None
    assert held(model.last)
    assert all(map(held, model.kept))


@pytest.mark.gpu
def test_one_batch_at_a_time_is_on_the_gpu(standing: list[Callable[[], None]]) -> None:
    rows, width, size = 8192, 1024, 32 * 2**20
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(3)]).cuda().eval()
    # moved there when they run, and then as any other
    batches = [torch.randn(rows, width) for _ in range(8)]
    plans, most, at = [], [], []
    standing.append(lambda: at.append(torch.cuda.memory_allocated()))
    for devices in (("cuda",), ()):
        at.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sequential, "Parked", partial(Parked, devices=devices))
            plans.append(qcompile.calibrate(model, batches, RECIPE, progress=False))
        most.append(max(at))
    assert plans[0] == plans[1]
    # each batch holds the input of one linear
    assert most[1] - most[0] > (len(batches) - 1) * size
