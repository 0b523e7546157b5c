"""The kernels of 8-bit codes without a GPU: every configuration becomes a binary; the interpreter runs integers."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from qcompile.backends.triton import eight_bit, eight_bit_ring, fp8_matmul, int8_matmul
from qcompile.backends.triton.eight_bit_table import FP8 as FP8_TABLE
from qcompile.backends.triton.eight_bit_table import INT8 as INT8_TABLE
from qcompile.backends.triton.eight_bit_table import Config, HopperTiles, Library, RingTiles, Tiles
from qcompile.backends.triton.table import configs_of, fitting
from tests.triton.compiled import name_of
from tests.triton.eight_bit_cubins import cubin
from tests.triton.needs import run_interpreted

INT8, FP8 = torch.int8, torch.float8_e4m3fn


CASES = [
    pytest.param(config, capability, codes, id=f"{codes}-sm_{capability}-{name_of(config)}")
    for codes, entries, capabilities in ((INT8, INT8_TABLE, (80, 90, 100)), (FP8, FP8_TABLE, (90, 100)))
    for capability in capabilities
    for config in configs_of(entries, capability)
    if not isinstance(config, Library)
]


@pytest.mark.parametrize(("config", "capability", "codes"), CASES)
def test_configuration_compiles(config: Config, capability: int, codes: torch.dtype) -> None:
    with_all = codes is INT8
    assert cubin(config, capability, codes, torch.bfloat16, full=with_all, tail=with_all)[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize(("config", "capability", "codes"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("full", "tail"), [(False, False), (True, False), (False, True)])
def test_every_variant_compiles(
    config: Config, capability: int, codes: torch.dtype, dtype: torch.dtype, full: bool, tail: bool
) -> None:
    if dtype is torch.float32 and tail and isinstance(config, HopperTiles | RingTiles):
        return
    # fp8 codes have no zero
    full = full and codes is INT8
    assert cubin(config, capability, codes, dtype, full=full, tail=tail)[:4] == b"\x7fELF"


@pytest.mark.parametrize("entries", [INT8_TABLE, FP8_TABLE], ids=["int8", "fp8"])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("M", [1, 16, 17, 64, 65, 257, 100_000])
@pytest.mark.parametrize("N", [8, 4096, 28672])
def test_every_problem_finds_a_configuration(entries: tuple, capability: int, M: int, N: int) -> None:
    found = list(fitting(entries, M, N, 4096, capability))
    # the last can run what kernels of few shapes and the library refuse
    assert isinstance(found[-1], Tiles)
    assert capability == 90 or not any(isinstance(config, HopperTiles | RingTiles) for config in found)


@pytest.mark.parametrize(
    ("N", "K", "capability", "words"),
    [
        (4096, 4096, (9, 0), None),
        (4096, 4096, (8, 0), "this is sm_80"),
        (4096, 4096, (10, 0), "this is sm_100"),
        (4096, 4104, (9, 0), "K=4104"),
        (4092, 4096, (9, 0), "N=4092"),
    ],
)
def test_int8_says_why_not(N: int, K: int, capability: tuple[int, int], words: str | None) -> None:
    reason = int8_matmul.why_not(N, K, capability)
    assert reason is None if words is None else words in str(reason)


@pytest.mark.parametrize(
    ("capability", "words"), [((9, 0), None), ((8, 0), "begin with sm_89"), ((8, 9), "measured on sm_90")]
)
def test_fp8_says_why_not(capability: tuple[int, int], words: str | None) -> None:
    reason = fp8_matmul.why_not(4096, 4096, capability)
    assert reason is None if words is None else words in str(reason)


def test_a_ring_reads_no_weight_before_it_is_made() -> None:
    x, w = (torch.zeros(rows, 64, dtype=torch.int8) for rows in (1, 128))
    o = eight_bit.Operands(x=x, w=w, scale_x=torch.ones(1, 1), scale_w=torch.ones(128, 1), dtype=torch.bfloat16)
    assert eight_bit_ring.why_not(o) is None
    assert "made by the kernel before" in str(eight_bit_ring.why_not(replace(o, is_made=True)))
    assert "multiples of 16 bytes, at K=63" in str(eight_bit_ring.why_not(replace(o, x=x[:, :63], w=w[:, 1:])))


INTERPRETED = """
import torch
from qcompile.backends.triton import eight_bit
from qcompile.backends.triton.eight_bit_table import Tiles

torch.manual_seed(0)
tiles = Tiles(tokens=16, channels=32, depth=64, stages=1, warps=1)
for M, N, K in ((1, 32, 64), (3, 48, 72), (17, 33, 100)):
    x, w = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((M, K + 8), (N, K)))
    x = x[:, 4:-4]
    zero, bias = torch.randint(0, 256, (M, 1)).float(), torch.randn(N)
    scale_x, scale_w, residual = torch.rand(M, 1), torch.rand(N, 1), torch.randn(M, N)
    sums = x.long() @ w.long().T - (zero.long() - 128) * w.sum(1)
    expected = sums.float() * (scale_x * scale_w.T) + bias + residual
    given = dict(zero=zero, sum_w=w.sum(1, dtype=torch.int32), bias=bias, residual=residual)
    o = eight_bit.Operands(x=x, w=w, scale_x=scale_x, scale_w=scale_w, dtype=torch.float32, **given)
    assert torch.equal(eight_bit.matmul(o, tiles), expected), (M, N, K)
print("equal")
"""


def test_integers_in_the_interpreter() -> None:
    run_interpreted(INTERPRETED, loops=True)
