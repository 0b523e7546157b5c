"""4-bit floats whose columns are lowered, under 8-bit ones, without a GPU: packs, what PTX makes of them, choices."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import qcompile
from qcompile.backends.fx.kernels import choose as choose_kernel
from qcompile.backends.fx.kernels import fp4_lowered
from qcompile.backends.fx.kernels.narrow_floats import lowered
from qcompile.backends.triton.fp4_ptx import lowered_ptx, narrowed_ptx, raised_over, whole_ptx
from qcompile.backends.triton.fp4_table import TABLE, Config, Tiles, choose
from qcompile.backends.triton.fp4_words import lowered_words, packed_octaves, unpacked_octaves
from qcompile.backends.triton.groups import UNITS
from qcompile.backends.triton.pairs import APART, MOST_ROWS
from qcompile.backends.triton.table import configs_of
from qcompile.formats import code_values, parse_format
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.recipe import MOST_SHIFTED
from qcompile.shifts import lowered_codes, raised, room
from qcompile.spec import parse_spec
from tests.passes.test_split_outliers import with_outliers
from tests.triton.compiled import name_of
from tests.triton.fp4_cubins import kernel
from tests.triton.fp4_on_cpu import FORMATS, OPS, bytes_of
from tests.triton.on_cpu import Heads, lowered_for_hopper, on_cpu
from tests.triton.ptx import run
from tests.triton.test_fp4_cpu import CASES, container, lowered_by, problem

FP8 = {"input": parse_spec("fp8_e4m3/token")}


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_code_is_lowered_by_every_octave(fmt: str) -> None:
    form = parse_format(fmt)
    # each byte of a register has all pairs of codes and octaves once, beside others of its register
    codes, octaves = torch.meshgrid(torch.arange(16), torch.arange(MOST_SHIFTED + 2), indexing="ij")
    pairs = torch.stack([codes.flatten(), octaves.flatten()])
    bytes_ = torch.stack([pairs[:, torch.randperm(pairs.shape[1])] for _ in range(8)])  # h b, pair, n
    words = torch.zeros(pairs.shape[1], dtype=torch.int64)
    amounts = torch.zeros(2, pairs.shape[1], dtype=torch.int64)
    for i in range(8):
        h, b = divmod(i, 4)
        words |= (bytes_[i, 0] & 7) << (4 * i) | (bytes_[i, 0] >> 3) << (8 * b + 7 - 4 * h)
        amounts[h] |= 4 * bytes_[i, 1] << (8 * b)
    given: list[Tensor | None] = [None, None, words, amounts[0], amounts[1]]
    run(lowered_ptx(parse_format(fmt).mantissa), given)
    # where the input takes the octaves
    whole: list[Tensor | None] = [None, None, words]
    run(whole_ptx(form.mantissa), whole)
    for i in range(8):
        register = whole[i // 4]
        assert register is not None
        made = (register >> (8 * (i % 4)) & 255).to(torch.uint8).view(torch.float8_e4m3fn).double()
        expected = code_values(form)[bytes_[i, 0]].double() * 2.0 ** (raised(form) - raised_over(form.mantissa))
        assert torch.equal(made, expected)
    for i in range(8):
        register = given[i // 4]
        assert register is not None
        made = (register >> (8 * (i % 4)) & 255).to(torch.uint8).view(torch.float8_e5m2).double()
        expected = code_values(form)[bytes_[i, 0]].double() * 2.0 ** (raised(form) - bytes_[i, 1])
        assert torch.equal(made, expected)
    # what the library multiplies
    narrow: list[Tensor | None] = [None, given[0]]
    run(narrowed_ptx(), narrow)
    assert narrow[0] is not None
    for b in range(4):
        held = bytes_[b, 1] <= room(form)
        bits = lowered(bytes_[b, 0].to(torch.uint8)[:, None], form, bytes_[b, 1].to(torch.int8)[:, None])[:, 0]
        assert torch.equal((narrow[0] >> (8 * b) & 255)[held], bits[held].long())


def test_words_hold_codes_and_octaves_where_columns_are() -> None:
    codes, shift = torch.randint(0, 16, (64, 256), dtype=torch.uint8), torch.randint(0, 15, (256,), dtype=torch.int8)
    words, octaves = lowered_words(codes), packed_octaves(shift)
    assert octaves.shape == (1, 2, 32)
    assert torch.equal(unpacked_octaves(octaves, 250), shift[None, :250])
    for row, column in torch.cartesian_prod(torch.arange(64), torch.arange(256)).tolist():
        block, inside = divmod(column, 128)
        s, h, j, b = inside // 32, inside // 16 % 2, inside // 4 % 4, inside % 4
        part, q, i = row // 16, row // 8 % 2, row % 8
        word = int(words[0, block, part * 256 + q * 128 + i * 16 + j * 4 + s])
        code = (word >> (16 * h + 4 * b) & 7) | (word >> (8 * b + 7 - 4 * h) & 1) << 3
        assert code == int(codes[row, column])
        assert int(octaves[0, block, 8 * j + 4 * h + s]) >> (8 * b) & 255 == 4 * int(shift[column])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("given", ["channel", "tensor"])
def test_packs_are_the_weight(fmt: str, given: str) -> None:
    shift = (0, room(parse_format(fmt)), *torch.randint(0, room(parse_format(fmt)) + 1, (206,)).tolist())
    codes, qparams, _ = container(fmt, 80, shift, given)
    packed = fp4_lowered.pack(codes, qparams, torch.bfloat16)
    assert packed["scale"].shape == (80, 1)
    values = (
        bytes_of(packed["words"], packed["octaves"], parse_format(fmt).mantissa)[:80, :208].float() * packed["scale"]
    )
    assert torch.equal(values, dequantize(codes, qparams))
    # 4 bits a number of whole blocks, a byte a column, and scales
    assert sum(t.nbytes for t in packed.values()) == 128 * 256 // 2 + 256 + 80 * 4


@pytest.mark.parametrize(("config", "capability"), CASES)
@pytest.mark.parametrize("mantissa", [0, 1, 2])
def test_configuration_compiles(config: Config, capability: int, mantissa: int) -> None:
    made = kernel(config, capability, torch.bfloat16, mantissa, lowered=True)
    assert made.asm["cubin"][:4] == b"\x7fELF"
    assert made.metadata.shared <= 232448
    if isinstance(config, Tiles):
        assert ".f32.e5m2.e4m3" in made.asm["ptx"]
        # of a lane, all octaves of a block come in two loads, in three places: an item's first block, two an iteration
        assert made.asm["ptx"].count("ld.global.v4.b32") == 3 * UNITS * 2


@pytest.mark.parametrize("tiles", [c for c in configs_of(TABLE, 90) if isinstance(c, Tiles)], ids=name_of)
def test_slices_compile(tiles: Tiles) -> None:
    assert kernel(tiles, 90, torch.float16, 1, whole=False, lowered=True).asm["cubin"][:4] == b"\x7fELF"


@pytest.mark.parametrize("rows", [2, 16, 32, 2 * MOST_ROWS])
@pytest.mark.parametrize("whole", [False, True])
def test_pairs_compile(rows: int, whole: bool) -> None:
    tiles = next(choose(rows, 4096, 4096, 90))
    assert isinstance(tiles, Tiles)
    made = kernel(tiles, 90, torch.float16, 1, whole=whole, paired=True)
    assert ".f32.e4m3.e4m3" in made.asm["ptx"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (lowered_by(14) | FP8, None),
        (lowered_by(14) | {"input": parse_spec("fp8_e4m3/tensor"), "dtype": torch.float16}, None),
        (lowered_by(11, "fp4_e3m0") | FP8, None),
        (lowered_by(12, "fp4_e3m0") | FP8, "fp4_e3m0 can be by 0 to 11"),
        (lowered_by(-1) | FP8, "lowered by -1 to 0 octaves"),
        (lowered_by(14) | {"input": parse_spec("fp4_e3m0/token")}, None),
        (lowered_by(3, "fp6_e3m2") | FP8, "not 4-bit floats"),
        (lowered_by(3) | {"input": None}, "not quantized"),
        (lowered_by(3) | FP8 | {"capability": (10, 0)}, "is for sm_90, this is sm_100"),
        (lowered_by(3) | FP8 | {"capability": (10, 0), "small": True}, None),
        (FP8, "no columns of the weight are lowered"),
    ],
)
def test_refusals_say_why(more: dict[str, Any], reason: str | None) -> None:
    found = fp4_lowered.why_not(problem(**more))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (lowered_by(3) | FP8, "fp4-lowered"),
        # the input takes the octaves where it has room for them
        (lowered_by(3), "fp4"),
        (lowered_by(14) | {"input": parse_spec("fp4_e3m0/token")}, "fp4-lowered"),
        (FP8, "fp4"),
        # elsewhere the library multiplies E4M3, which holds the lowered weight
        (lowered_by(3) | FP8 | {"capability": (8, 9)}, "fp8"),
    ],
)
def test_who_lowers_columns(more: dict[str, Any], name: str) -> None:
    assert choose_kernel(problem(**more))[0].name == name


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("given", ["fp8_e4m3/token", "fp8_e4m3/tensor"])
@pytest.mark.parametrize("T", [3, MOST_ROWS])
def test_a_graph_lowered_for_hopper_computes_what_was_planned(fmt: str, given: str, T: int) -> None:
    torch.manual_seed(0)
    model, x = Heads(160).bfloat16().eval(), torch.randn(2, T, 160).bfloat16()
    rule = {"weight": f"{fmt}/channel", "input": given, "solver": "mse"}
    plan = qcompile.calibrate(model, [x], recipe={"rules": [rule]}, progress=False)
    most = min(room(parse_format(fmt)), APART)
    decisions = {
        name: replace(d, shift=tuple((k * 5 + (name == "v")) % (most + 1) for k in range(160)))
        for name, d in plan.decisions.items()
    }
    with on_cpu(**OPS):
        text, error = lowered_for_hopper(replace(plan, decisions=decisions), model, x)
    # q and k are one matmul, v has other octaves
    assert text.count("linear_fp4_lowered") == 2
    # one of both reads pairs of their rows, where scales are those of rows
    assert len(re.findall(r'octaves", %\d+', text)) == (1 if given == "fp8_e4m3/token" else 0)
    assert text.count(f": [{2 * MOST_ROWS}, 160]") == (1 if given == "fp8_e4m3/token" else 0)
    assert error < 5e-3


class Residual(nn.Module):
    """Heads that read the norm of a sum that is read besides."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.heads = Heads(K)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.heads(total := x + x), total], -1)


@pytest.mark.parametrize("outliers", [(), (3, 77)])
@pytest.mark.parametrize("most", [APART, APART + 1])
def test_pairs_stand_behind_all_else_that_a_quantization_gives(most: int, outliers: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Residual(160).bfloat16().eval(), torch.randn(5, 160).bfloat16()
    rule = {"weight": "fp4_e1m2/channel", "input": "fp8_e4m3/token", "solver": "mse"}
    plan = qcompile.calibrate(model, [x], recipe={"rules": [rule]}, progress=False)
    shift = tuple(k % (most + 1) for k in range(160))
    decisions = {name: replace(d, shift=shift) for name, d in plan.decisions.items()}
    plan = with_outliers(replace(plan, decisions=decisions), dict.fromkeys(decisions, outliers) if outliers else {})
    with on_cpu(**OPS):
        text, error = lowered_for_hopper(plan, model, x)
    # pairs hold no column that is lowered further
    assert text.count(f": [{2 * MOST_ROWS}, 160]") == (2 if most == APART else 0)
    assert text.count("linear_fp4_lowered") == 2
    assert error < 5e-3


def test_what_calibration_lowers_runs_from_codes() -> None:
    torch.manual_seed(0)
    model, x = Heads(160).bfloat16().eval(), torch.randn(2, 30, 160).bfloat16()
    # columns that are far from each other
    for linear in (model.q, model.k, model.v):
        linear.weight.data *= torch.exp2(torch.arange(160) % 7 - 3.0)
    rule = {"weight": "fp4_e2m1/channel", "input": "fp8_e4m3/token", "shift": MOST_SHIFTED, "solver": "mse"}
    plan = qcompile.calibrate(model, [x], recipe={"rules": [rule]}, progress=False)
    assert all(max(decision.shift) >= 2 for decision in plan.decisions.values())
    with on_cpu(**OPS):
        text, error = lowered_for_hopper(plan, model, x)
    assert "linear_fp4_lowered" in text
    assert "linear_fp8" not in text
    assert error < 5e-3


@pytest.mark.parametrize("fmt", FORMATS)
def test_stored_codes_are_packed_as_they_are(fmt: str) -> None:
    """What a plan holds of a weight becomes the same pack."""
    w = torch.randn(64, 128)
    qparams = find_qparams(w, parse_spec(f"{fmt}/channel"))
    codes, shift = quantize(w, qparams), tuple(torch.randint(0, 9, (128,)).tolist())
    made, held = lowered_codes(codes, qparams, shift)
    packed = fp4_lowered.pack(made, held, torch.bfloat16)
    numbers = (
        bytes_of(packed["words"], torch.zeros_like(packed["octaves"]), parse_format(fmt).mantissa).float()
        * packed["scale"]
    )
    assert torch.equal(numbers, dequantize(codes, qparams))
