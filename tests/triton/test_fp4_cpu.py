"""4-bit floats under 8-bit ones without a GPU: their weight and input, their table, binaries, and what is refused."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import triton

import qcompile
from qcompile.backends.fx.kernels import choose as choose_kernel
from qcompile.backends.fx.kernels import fp4, fp8
from qcompile.backends.fx.kernels.narrow_floats import factor, lowered, widened
from qcompile.backends.fx.kernels.problem import Problem
from qcompile.backends.triton.fp4_ptx import unpack_ptx
from qcompile.backends.triton.fp4_table import TABLE, Config, Tiles, Unpack, choose
from qcompile.backends.triton.int4_int8_words import unpack_words
from qcompile.backends.triton.table import configs_of
from qcompile.formats import code_values, parse_format
from qcompile.numerics import Lowered, QParams, dequantize, find_qparams, quantize
from qcompile.shifts import raised, room
from qcompile.spec import parse_spec
from tests.triton.compiled import name_of
from tests.triton.fp4_cubins import kernel
from tests.triton.fp4_on_cpu import FORMATS, OPS
from tests.triton.on_cpu import Heads, lowered_for_hopper, on_cpu
from tests.triton.ptx import run

# sm_80 has no fp8, and Hopper's kernel is for Hopper
CASES = [
    pytest.param(config, capability, id=f"sm_{capability}-{name_of(config)}")
    for capability in (90, 100)
    for config in configs_of(TABLE, capability)
]


def container(fmt: str, N: int, shift: tuple[int, ...], given: str = "channel") -> tuple[Tensor, QParams, Tensor]:
    """Codes and qparams of a lowered weight in E4M3, as `fold_exponent_bias` makes them, and its 4-bit codes."""
    narrow = find_qparams(torch.randn(N, len(shift)), parse_spec(f"{fmt}/{given}"))
    codes = torch.randint(0, 16, (N, len(shift)), dtype=torch.uint8)
    values = dequantize(codes, narrow) * (2.0 ** -torch.tensor(shift).float())
    up = raised(narrow.spec.format)
    e4m3 = QParams(
        spec=parse_spec(f"fp8_e4m3/{given}"),
        scale=narrow.scale * 2.0**-up,
        lowered=Lowered(narrow=narrow, shift=shift),
    )
    made = quantize(values, e4m3)
    assert torch.equal(dequantize(made, e4m3), values)
    return made, e4m3, codes


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("given", ["channel", "tensor"])
def test_packs_of_lowered_weights_hold_the_codes_before(fmt: str, given: str) -> None:
    shift = tuple(torch.randint(0, room(parse_format(fmt)) + 1, (96,)).tolist())
    codes, qparams, before = container(fmt, 80, shift, given)
    packed = fp4.pack(codes, qparams, torch.bfloat16)
    values = code_values(parse_format(fmt))
    # the two codes of 0 are one number
    assert torch.equal(values[unpack_words(packed["words"], 80, 96).long()], values[before.long()])
    assert packed["shift"].tolist() == [list(shift)]
    assert packed["scale"].shape == (80, 1)
    # E4M3 that `widened` makes, under the pack's scale and shift, is the weight
    bits = widened(unpack_words(packed["words"], 80, 96), parse_format(fmt)).view(torch.float8_e4m3fn).float()
    restored = bits * packed["scale"] * 2.0 ** -packed["shift"].float()
    assert torch.equal(restored, dequantize(codes, qparams))
    assert sum(t.nbytes for t in packed.values()) <= 96 * 128 / 2 + 80 * 4 + 96 + 32 * 128


@pytest.mark.parametrize("fmt", FORMATS)
def test_packs_of_plain_weights_hold_their_codes(fmt: str) -> None:
    qparams = find_qparams(torch.randn(70, 160), parse_spec(f"{fmt}/channel"))
    codes = torch.randint(0, 16, (70, 160), dtype=torch.uint8)
    packed = fp4.pack(codes, qparams, torch.bfloat16)
    assert set(packed) == {"words", "scale"}
    assert torch.equal(unpack_words(packed["words"], 70, 160), codes)
    assert torch.equal(packed["scale"], qparams.scale * factor(parse_format(fmt)))


@pytest.mark.parametrize("fmt", [*FORMATS, "fp6_e3m2", "fp6_e2m3", "e2m2"])
def test_every_code_is_lowered_exactly(fmt: str) -> None:
    form = parse_format(fmt)
    codes = torch.arange(2**form.bits, dtype=torch.uint8)
    for shift in range(room(form) + 1):
        made = lowered(codes[:, None], form, torch.tensor([shift], dtype=torch.int8)).view(torch.float8_e4m3fn)
        assert torch.equal(made.float()[:, 0], code_values(form) * 2.0 ** (raised(form) - shift))
    beyond = lowered(codes[:, None], form, torch.tensor([room(form) + 1], dtype=torch.int8))
    exact = code_values(form) * 2.0 ** (raised(form) - room(form) - 1)
    assert not torch.equal(beyond.view(torch.float8_e4m3fn).float()[:, 0], exact)


@pytest.mark.parametrize("fmt", FORMATS)
def test_lowering_the_input_is_lowering_the_weight(fmt: str) -> None:
    """Both products are the same numbers, code by code."""
    shift = tuple(torch.randint(0, room(parse_format(fmt)) + 1, (64,)).tolist())
    codes, qparams, _ = container(fmt, 16, shift)
    packed = fp4.pack(codes, qparams, torch.bfloat16)
    x = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    scale = torch.rand(5, 1) + 0.5
    bits, row_scale = fp4._as_e4m3(x, scale, packed["shift"], fmt)
    given = bits.view(torch.float8_e4m3fn).double() * row_scale.double()
    words = widened(unpack_words(packed["words"], 16, 64), parse_format(fmt)).view(torch.float8_e4m3fn).double()
    products = given[:, None] * (words * packed["scale"].double())[None]
    weight = dequantize(codes, qparams).double()
    expected = (code_values(parse_format(fmt))[x.long()].double() * scale.double())[:, None] * weight[None]
    torch.testing.assert_close(products, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", FORMATS)
def test_pieces_move_bits(fmt: str) -> None:
    words = torch.randint(-(2**31), 2**31, (500,), dtype=torch.int64) & 0xFFFFFFFF
    operands: list[Tensor | None] = [None, None, words]
    run(unpack_ptx(parse_format(fmt).mantissa), operands)
    for made, start in zip(operands[:2], (0, 4), strict=True):
        for b in range(4):
            codes = ((words >> (8 * b + start)) & 15).to(torch.uint8)
            assert torch.equal((made >> (8 * b)) & 255, widened(codes, parse_format(fmt)).long())


@pytest.mark.parametrize(("config", "capability"), CASES)
@pytest.mark.parametrize("mantissa", [0, 1, 2])
def test_configuration_compiles(config: Config, capability: int, mantissa: int) -> None:
    made = kernel(config, capability, torch.bfloat16, mantissa)
    assert made.asm["cubin"][:4] == b"\x7fELF"
    # of a multiprocessor of Hopper, the most that one program may have
    assert made.metadata.shared <= 232448


@pytest.mark.parametrize("tiles", [c for c in configs_of(TABLE, 90) if isinstance(c, Tiles)], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slices_compile(tiles: Tiles, dtype: torch.dtype) -> None:
    assert kernel(tiles, 90, dtype, 1, whole=False).asm["cubin"][:4] == b"\x7fELF"


@pytest.mark.parametrize("tiles", [c for c in configs_of(TABLE, 90) if isinstance(c, Tiles)], ids=name_of)
@pytest.mark.parametrize("columns_lowered", [False, True])
def test_products_run_while_the_next_block_is_unpacked(tiles: Tiles, columns_lowered: bool, tmp_path: Path) -> None:
    (tmp_path / "kernel.ptx").write_text(kernel(tiles, 90, torch.bfloat16, 1, lowered=columns_lowered).asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    # C7510 to C7514: the products wait for each other
    assert "serialized" not in said


def test_the_table_takes_every_problem() -> None:
    for M in (1, 8, 9, 16, 17, 64, 65, 257, 2048, 1 << 20):
        for N in (8, 4096, 28672, 12345):
            # what the library does not take, tiles do
            assert any(isinstance(config, Tiles) for config in choose(M, N, 4096, 90))
            assert all(isinstance(config, Unpack) for config in choose(M, N, 4096, 100))


def problem(**more: object) -> Problem:
    fields = {"N": 64, "K": 256, "dtype": torch.bfloat16, "device": "cuda", "capability": (9, 0)}
    fields |= {"weight": parse_spec("fp4_e2m1/channel"), "input": parse_spec("fp4_e2m1/token")}
    return Problem(**(fields | more))  # type: ignore[arg-type]


def lowered_by(octaves: int, fmt: str = "fp4_e2m1") -> dict[str, object]:
    narrow = find_qparams(torch.randn(4, 256), parse_spec(f"{fmt}/channel"))
    shift = (octaves, *[0] * 255)
    return {"weight": parse_spec("fp8_e4m3/channel"), "lowered": Lowered(narrow=narrow, shift=shift)}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, None),
        ({"weight": parse_spec("fp4_e3m0/tensor")}, None),
        ({"input": parse_spec("fp8_e4m3/tensor"), "dtype": torch.float16}, None),
        ({"input": parse_spec("fp6_e3m2/token")}, None),
        (lowered_by(14), None),
        (lowered_by(14, "fp4_e3m0"), None),
        (lowered_by(14) | {"input": parse_spec("fp4_e3m0/token")}, "room for 11"),
        (lowered_by(11) | {"input": parse_spec("fp4_e3m0/token")}, None),
        (lowered_by(1) | {"input": parse_spec("fp8_e4m3/token")}, "room for 0 below fp8_e4m3"),
        (lowered_by(3, "fp6_e3m2"), "not 4-bit floats"),
        ({"input": None}, "not quantized"),
        ({"input": parse_spec("int8/token")}, "not floats that E4M3 holds"),
        ({"input": parse_spec("fp8_e5m2/token")}, "not floats that E4M3 holds"),
        ({"input": parse_spec("fp4_e2m1/b32/e8m0")}, "one scale a token or tensor"),
        ({"weight": parse_spec("fp4_e2m1/b32/e8m0")}, "one scale a channel"),
        ({"weight": parse_spec("int4/channel")}, "not 4-bit floats"),
        ({"weight": parse_spec("fp8_e4m3/channel")}, "not 4-bit floats"),
        ({"dtype": torch.float32}, "y is float32"),
        ({"device": "cpu", "capability": None}, "CUDA"),
        ({"capability": (8, 0)}, "begin with sm_89, this is sm_80"),
        ({"capability": (10, 0)}, "is for sm_90, this is sm_100"),
        ({"capability": (10, 0), "small": True}, None),
        ({"capability": (8, 9), "small": True, "N": 72}, "N a multiple of 16, got N=72"),
        ({"K": 120}, "K=120"),
    ],
)
def test_refusals_say_why(more: dict[str, object], reason: str | None) -> None:
    found = fp4.why_not(problem(**more))
    assert found is None if reason is None else reason in str(found)


def test_what_has_no_kernel_runs_in_the_container() -> None:
    p = problem(**lowered_by(3) | {"input": parse_spec("fp8_e4m3/token"), "capability": (8, 9)})
    chosen, refused = choose_kernel(p)
    assert chosen is fp8.KERNEL
    assert "the weight is lowered instead" in refused["fp4"]
    assert "is for sm_90" in refused["fp4-lowered"]


def test_only_weights_that_were_lowered_alike_are_joined() -> None:
    assert fp4.KERNEL.joins is not None
    assert fp4.KERNEL.joins(problem(N=128))
    assert not fp4.KERNEL.joins(problem(N=72))


@pytest.fixture
def emulated() -> Iterator[None]:
    with on_cpu(**OPS):
        yield


@pytest.mark.parametrize("recipe", ["fp4", "fp4-token", "fp4-a8"])
@pytest.mark.usefixtures("emulated")
def test_a_graph_lowered_for_hopper_computes_what_was_planned(recipe: str) -> None:
    torch.manual_seed(0)
    model = Heads(160).bfloat16().eval()
    x = torch.randn(2, 30, 160).bfloat16()
    plan = qcompile.calibrate(model, [x], recipe=recipe, progress=False)
    text, error = lowered_for_hopper(plan, model, x)
    assert text.count("linear_fp4") == 2
    assert recipe == "fp4-a8" or all(decision.shift for decision in plan.decisions.values())
    # numbers that the planned graph rounds to bfloat16, and results
    assert error < 5e-3


@pytest.mark.usefixtures("emulated")
def test_weights_of_different_formats_are_not_joined() -> None:
    torch.manual_seed(0)
    model = Heads(160).bfloat16().eval()
    x = torch.randn(2, 30, 160).bfloat16()
    plan = qcompile.calibrate(model, [x], recipe="fp4-token", progress=False)
    formats = {"q": "fp4_e2m1", "k": "fp4_e3m0", "v": "fp4_e1m2"}
    decisions = {n: replace(d, weight=parse_spec(f"{formats[n]}/channel")) for n, d in plan.decisions.items()}
    text, error = lowered_for_hopper(replace(plan, decisions=decisions), model, x)
    assert text.count("linear_fp4") == 3
    assert error < 5e-3
