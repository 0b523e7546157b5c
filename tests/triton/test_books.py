"""Tables of up to 256 numbers in Triton: interpreted, as binaries, and on a GPU against the oracle in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, library

pytest.importorskip("triton")

from triton.compiler import ASTSource

from qcompile.backends.fx.kernels import book_triton, choose, weight_triton
from qcompile.backends.fx.kernels.problem import Problem
from qcompile.backends.triton import book_matmul
from qcompile.backends.triton.width_packs import pack_weight
from qcompile.formats import parse_format
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.triton.compiled import CAPABILITIES, NAMES, compiled
from tests.triton.needs import run_interpreted

SPECS = ["dynamic8/g64", "quantile8/g128", "linear8/g32/i6x8", "dynamic8/channel", "lloyd8/g256", "dynamic8/g64/dq256"]
SPECS += ["e6m0/channel", "e6m1/g64", "e7m0/channel", "e5m2/g128/bf16", "lloyd5/g64", "quantile7/channel"]

INTERPRETED = """
import torch
from qcompile.backends.fx.kernels import book_triton
from qcompile.backends.triton.book_matmul import book_matmul
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

torch.manual_seed(0)
BOOKS = ("dynamic8/g64", "quantile8/g128", "dynamic8/channel", "lloyd8/g32", "lloyd6/g64")
for text in (*BOOKS, "e6m0/channel", "e6m1/g64", "e7m0/channel", "e5m2/g32", "e5m0/g64"):
    for M, N, K in ((1, 50, 256), (17, 33, 384), (40, 12, 128)):
        floats, x = torch.randn(N, K), torch.randn(M, K, dtype=torch.float16)
        qparams = find_qparams(floats, parse_spec(text))
        codes = quantize(floats, qparams)
        packed = book_triton.pack(codes, qparams, torch.float16)
        bias = torch.randn(N, dtype=torch.float16)
        y = book_matmul(x, packed["codes"], packed["levels"], packed["scale"], bias)
        weight = dequantize(codes, qparams, torch.float16).double()
        expected = x.double() @ weight.T + bias.double()
        magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
        # y is rounded once, its sum in float32
        assert ((y.double() - expected).abs() <= 2.0**-11 * expected.abs() + 2.0**-20 * magnitude).all(), text
assert book_matmul(x[:0], packed["codes"], packed["levels"], packed["scale"], None).shape == (0, 12)
print("equal")
"""


def test_the_interpreter_multiplies_the_oracles_weight() -> None:
    run_interpreted(INTERPRETED, loops=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step", book_matmul.STEPS)
def test_the_kernel_compiles(capability: int, dtype: torch.dtype, step: int) -> None:
    name = NAMES[dtype]
    pointers = {"x_ptr": name, "codes_ptr": "u8", "levels_ptr": "fp32", "scale_ptr": "fp32"}
    given = {key: f"*{kind}" for key, kind in (pointers | {"bias_ptr": name, "y_ptr": name}).items()}
    constants = {"ROWS": book_matmul.ROWS, "COLUMNS": book_matmul.COLUMNS, "STEP": step, "BIAS": True}
    options = {"num_warps": book_matmul.WARPS}
    made = compiled(ASTSource, book_matmul.book_kernel, given, constants, capability, options)
    assert made.asm["cubin"][:4] == b"\x7fELF"


def problem(text: str, **more: object) -> Problem:
    fields = {"N": 64, "K": 256, "input": None, "dtype": torch.bfloat16, "device": "cuda", "capability": (9, 0)}
    return Problem(weight=parse_spec(text), **(fields | {"small": True} | more))


@pytest.mark.parametrize(
    ("text", "more", "reason"),
    [
        ("dynamic8/g64", {"small": False}, "takes longer than a float matmul"),
        ("dynamic8/b2x64", {"input": parse_spec("int8/token")}, "by channel or group"),
        ("dynamic8/g64", {"capability": (7, 5)}, "sm_75"),
        ("dynamic8/g64", {"dtype": torch.float32}, "float32"),
        ("dynamic8/g48", {}, "multiples of 32"),
        ("e6m1/g64", {"small": False}, "e6m1 up takes longer than a float matmul: free_weights=True"),
        ("nf4/g64", {}, "table of 32 to 256"),
        ("int8/channel", {}, "table of 32 to 256"),
        ("e6m1/b64x64", {}, "by channel or group"),
    ],
)
def test_refusals_say_why(text: str, more: dict[str, object], reason: str) -> None:
    assert reason in str(book_triton.why_not(problem(text, **more)))


@pytest.mark.parametrize(
    "text", ["dynamic8/g64", "quantile8/channel", "lloyd8/g32", "lloyd5/g64", "e6m0/g32", "e7m0/g32"]
)
def test_small_weights_are_multiplied_as_they_are_read(text: str) -> None:
    assert choose(problem(text))[0].name == "book-triton"
    assert choose(problem(text, small=False))[0].name == "dense"


@pytest.mark.parametrize("text", ["e1m6/channel", "e1m6/g64", "e1m6/b32/e8m0", "e1m6/g128/bf16"])
def test_a_table_of_equal_steps_is_packed_as_integers(text: str) -> None:
    p = problem(text, small=False)
    assert choose(p)[0] is weight_triton.KERNEL
    given = weight_triton.KERNEL.arguments(p, (None,), {"words": 0, "scales": 0}, None)
    assert given[-3:] == ("int8", False, 0)
    qparams = find_qparams(torch.randn(70, 384), p.weight)
    codes = torch.arange(70 * 384).to(torch.uint8).reshape(70, 384)
    # 64 is 1 in the format
    numbers = torch.where(codes < 128, codes.int(), 128 - codes.int()).to(torch.int8)
    spec = replace(p.weight, format=parse_format("int8"))
    integers = replace(qparams, spec=spec, scale=qparams.scale / 64)
    assert torch.equal(dequantize(numbers, integers), dequantize(codes, qparams))
    expected = pack_weight(numbers, integers, p.dtype)
    found = weight_triton.KERNEL.pack(codes, qparams, p.dtype)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def packed(text: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
    floats = torch.randn(N, K, device="cuda")
    qparams = find_qparams(floats, parse_spec(text))
    codes = quantize(floats, qparams)
    return book_triton.pack(codes, qparams, torch.bfloat16), dequantize(codes, qparams, torch.bfloat16).double()


@pytest.mark.gpu
@pytest.mark.parametrize("M", [0, 1, 17, 64, 65, 300])
@pytest.mark.parametrize(("N", "K"), [(50, 256), (1024, 4096), (33, 768)])
@pytest.mark.parametrize("text", SPECS)
def test_products_are_those_of_the_oracle(M: int, N: int, K: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # many rows are multiplied by the library, which adds parts of a sum in bfloat16 unless it is told not to
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    tensors, weight = packed(text, N, K)
    x = torch.randn(M, K, device="cuda").bfloat16()
    bias = torch.randn(N, device="cuda").bfloat16()
    y = torch.ops.qcompile.linear_book(x, tensors["codes"], tensors["levels"], tensors["scale"], bias)
    product = x.double() @ weight.T
    expected = product + bias.double()
    magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
    # where columns are no multiple of 8 the library, which multiplies many rows, rounds the product and then the sum
    rounded = expected.abs() + (product.abs() if M > book_triton.MOST_ROWS else 0)
    assert ((y.double() - expected).abs() <= 2.0**-8 * rounded + 2.0**-18 * magnitude).all()


@pytest.mark.gpu
@pytest.mark.parametrize("M", [0, 3, 80])
def test_the_op_is_clean(M: int) -> None:
    tensors, _ = packed("dynamic8/g64", 64, 256)
    x = torch.randn(M, 256, device="cuda").bfloat16()
    given = (x, tensors["codes"], tensors["levels"], tensors["scale"], None)
    library.opcheck(torch.ops.qcompile.book_mm.default, given)
