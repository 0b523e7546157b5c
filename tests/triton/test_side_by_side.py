"""Weights of several kinds under one x are one op, with the results of each alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, library, nn

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import qcompile
from qcompile.backends.triton import width_linear as module
from qcompile.backends.triton.table import Entry
from qcompile.backends.triton.width_linear import width_linears
from qcompile.backends.triton.width_table import FewRows, ManyRows, Unpack
from qcompile.backends.triton.widths import WIDTHS, Packed, unpack_codes
from qcompile.spec import parse_spec
from tests.triton.on_cpu import lowered_for_hopper, on_cpu
from tests.triton.test_weight_linear import check, packed

K = 256
SPECS = {
    "q": "int4/g64/asym/bf16",
    "k": "int2/g64/asym/bf16",
    "v": "int4/g64/asym/bf16",
    "o": "nf4/g64",
    "biased": "int3/g64/asym/bf16",
    "narrow": "int3/g64/asym/bf16",
}


class Block(nn.Module):
    """Linears of one input; one has a bias, one a number of rows that fills no unit of a pack."""

    def __init__(self, narrow: int = 40) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(K, n, bias=False) for n in (128, 64, 192, 64))
        self.biased, self.narrow = nn.Linear(K, 64), nn.Linear(K, narrow, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in (self.q, self.k, self.narrow, self.v, self.biased, self.o)], -1)


def floats(words: Tensor, scales: Tensor, levels: Tensor | None, width: str, dtype: torch.dtype) -> Tensor:
    """The weight that a pack with groups of 64 holds."""
    N = 64 * len(words)
    codes = unpack_codes(words, WIDTHS[width], N, K)
    by_row = scales if scales.dim() == 4 else torch.stack([scales & ~0xFFFF, scales & 0xFFFF], 2)
    scale, *zero = (by_row[:, :, i].mT.reshape(N, -1).repeat_interleave(64, 1) for i in range(by_row.shape[2]))
    numbers = codes - zero[0] if levels is None else levels.view(dtype)[:32:2][codes.long()]
    return numbers.double() * scale.contiguous().view(torch.float32).double()


def one(x: Tensor, words: Tensor, scales: Tensor, levels: Tensor | None, bias: Tensor | None, N: int, width: str, *_):
    y = x.double() @ floats(words, scales, levels, width, x.dtype)[:N].T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def several(
    x: Tensor, words: Sequence[Tensor], scales: Sequence[Tensor], levels: Sequence[Tensor | None], N: Sequence[int],
    width: Sequence[str], *_: object,
) -> Tensor:  # fmt: skip
    each = zip(words, scales, levels, [None] * len(N), N, width, strict=True)
    return torch.cat([one(x, *weight) for weight in each], -1)


@pytest.fixture
def ops_on_cpu() -> Iterator[None]:
    with on_cpu(weight_mm=one, weights_mm=several):
        yield


@pytest.mark.usefixtures("ops_on_cpu")
def test_a_graph_lowered_for_hopper_has_one_op_for_all_that_fit() -> None:
    model, x = Block().bfloat16().eval(), torch.randn(3, 5, K).bfloat16()
    plan = qcompile.calibrate(model, [x], recipe={"rules": [{"weight": SPECS["q"]}]}, progress=False)
    decisions = {name: replace(d, weight=parse_spec(SPECS[name])) for name, d in plan.decisions.items()}
    text, error = lowered_for_hopper(replace(plan, decisions=decisions), model, x)
    # q with v, k and o; the others have a bias, or rows that something stands behind in packs
    assert text.count("linear_weights") == 1
    assert text.count("linear_weight ") == 2
    assert error < 1e-2


@pytest.mark.usefixtures("ops_on_cpu")
def test_linears_of_one_kind_need_no_op_for_several() -> None:
    model, x = Block(narrow=64).bfloat16().eval(), torch.randn(3, 5, K).bfloat16()
    plan = qcompile.calibrate(model, [x], recipe={"rules": [{"weight": SPECS["q"]}]}, progress=False)
    text, error = lowered_for_hopper(plan, model, x)
    assert text.count("linear_weights") == 0
    # the others have zeros for a bias
    assert text.count("linear_weight ") == 1
    assert error < 1e-2


@pytest.mark.usefixtures("ops_on_cpu")
def test_the_op_stands_before_the_first_linear_of_its_kinds() -> None:
    """q fills no unit of a pack, so that v, of its kind, is left behind k, of another."""
    model, x = Block().bfloat16().eval(), torch.randn(3, 5, K).bfloat16()
    model.q = nn.Linear(K, 40, bias=False).bfloat16()
    plan = qcompile.calibrate(model, [x], recipe={"rules": [{"weight": SPECS["q"]}]}, progress=False)
    decisions = {name: replace(d, weight=parse_spec(SPECS[name])) for name, d in plan.decisions.items()}
    text, error = lowered_for_hopper(replace(plan, decisions=decisions), model, x)
    assert text.count("linear_weights") == 1
    assert text.count("linear_weight ") == 3
    assert error < 1e-2


@pytest.mark.parametrize(("tuned", "found"), [({64, 192}, 192), ({64}, 64), (set(), None)])
def test_what_was_tuned_for_all_comes_before_what_was_for_one(
    tuned: set[int], found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries(name: str, N: int, K: int, device: torch.device) -> tuple[Entry[FewRows], ...]:
        config = FewRows(rows=8, units=1, warps=4, depth=1, blocks=2, resident=N)
        return (Entry(config=config, rows=8),) if N in tuned else ()

    monkeypatch.setattr(module, "tuned_entries", entries)
    monkeypatch.setattr(module, "capability_of", lambda device: 80)
    config = module._known_config.__wrapped__("int4", 1, 64, 192, K, torch.device("cpu"), exact=True)
    assert isinstance(config, FewRows)
    assert (config.resident if config.depth == 1 else None) == found


TEXTS = ["int4/g128/asym/bf16", "nf4/g64", "int2/g64/asym/bf16", "int6/g128/asym/bf16", "int4/b32/min/u6x8"]
TEXTS += ["int3/g128/asym/bf16", "int8/channel", "int5/g128/asym/bf16"]
ROWS = [128, 64, 320, 64, 192, 64, 256, 64]


def weights(columns: int) -> tuple[list[Packed], list[Tensor]]:
    made = [packed(text, n, columns, torch.bfloat16) for text, n in zip(TEXTS, ROWS, strict=True)]
    return [weight for weight, _ in made], [oracle for _, oracle in made]


@pytest.mark.gpu
@pytest.mark.parametrize("M", [0, 1, 3, 8, 9, 16, 17, 33, 257, 600, 3000])
@pytest.mark.parametrize("columns", [256, 1152, 4096])
def test_all_kinds_together(M: int, columns: int) -> None:
    x = torch.randn(M, columns, device="cuda").bfloat16()
    kinds, oracles = weights(columns)
    torch.full((max(M, 1) * sum(ROWS) * 8,), torch.nan, device="cuda")
    y = width_linears(x, kinds, ROWS)
    check(y, x, torch.cat(oracles), None)
    assert torch.equal(y, width_linears(x, kinds, ROWS)), "the result is not deterministic"


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 12])
@pytest.mark.parametrize("order", [1, -1])
def test_who_reads_the_results_waits_for_all(M: int, order: int) -> None:
    """The longest first: those behind it have ended long before.  Last: most find no cache that the first cleared."""
    columns = 4096
    x = torch.randn(M, columns, device="cuda").bfloat16()
    pairs = [packed(text, n, columns, torch.bfloat16) for text, n in ((TEXTS[0], 28672), (TEXTS[2], 64))]
    pairs, rows = pairs[::order], [28672, 64][::order]
    kinds = [weight for weight, _ in pairs]
    whole = torch.cat([oracle for _, oracle in pairs])
    width_linears(x, kinds, rows)
    graph, between, outputs = torch.cuda.CUDAGraph(), [], []
    with torch.cuda.graph(graph):
        given = x
        for _ in range(20):
            between.append(width_linears(given, kinds, rows))
            # the next kernel reads what both have made
            given = between[-1][:, -columns:] / 256
            outputs.append(width_linears(given, kinds, rows))
            between.append(given)
    for _ in range(3):
        x.normal_()
        for y in (*between, *outputs):
            y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        given = x
        for i, y in enumerate(outputs):
            check(between[2 * i], given, whole, None)
            given = between[2 * i + 1]
            assert torch.equal(given, between[2 * i][:, -columns:] / 256)
            check(y, given, whole, None)


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "kinds"), [(1, {FewRows}), (20, {FewRows, ManyRows}), (3000, {Unpack})])
def test_each_has_the_kernel_of_its_width(M: int, kinds: set[type], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[type] = set()
    run = module._run
    monkeypatch.setattr(
        module, "_run", lambda x, ms, *more: seen.update(type(m.config) for m in ms) or run(x, ms, *more)
    )
    width_linears(torch.randn(M, K, device="cuda").bfloat16(), weights(K)[0], ROWS)
    assert kinds <= seen


@pytest.mark.gpu
@pytest.mark.parametrize("M", [0, 3, 40])
def test_the_op_is_clean(M: int) -> None:
    found, _ = weights(K)
    names = ("words", "scales", "levels")
    tensors = [[getattr(weight, name) for weight in found] for name in names]
    kinds = [[getattr(weight, name) for weight in found] for name in ("width", "minimum", "integers")]
    x = torch.randn(M, K, device="cuda").bfloat16()
    library.opcheck(torch.ops.qcompile.weights_mm.default, (x, *tensors, ROWS, *kinds))
