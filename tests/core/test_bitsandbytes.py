"""Code books and double quantization against bitsandbytes itself, on the CPU, where it is installed."""

import warnings

import pytest
import torch
from torch import Tensor

from qcompile.formats import code_values, parse_format
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

with warnings.catch_warnings():
    # what it says of a machine without a GPU
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional")


def nibbles(packed: Tensor, shape: torch.Size) -> Tensor:
    """Codes of bytes whose high half comes first."""
    flat = packed.flatten().view(torch.uint8)
    return torch.stack([flat >> 4, flat & 15], 1).reshape(shape)


@pytest.mark.parametrize(("name", "theirs"), [("nf4", "nf4"), ("bnb_fp4", "fp4")])
@pytest.mark.parametrize("block", [64, 128])
def test_4_bit_codes_and_scales_are_the_same(name, theirs, block):
    weight = torch.randn(96, 512) * 0.02
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=theirs)
    qparams = find_qparams(weight, parse_spec(f"{name}/g{block}"))
    assert torch.equal(qparams.scale.flatten(), state.absmax.flatten())
    codes, expected = quantize(weight, qparams), nibbles(packed, weight.shape)
    # a quotient next to a midpoint may be rounded to the other side
    other = codes != expected
    # +0 and -0
    values = code_values(parse_format(name))
    other &= values[codes.long()] != values[expected.long()]
    assert other.float().mean() < 1e-3
    restored = functional.dequantize_4bit(packed, state)
    same = ~other
    torch.testing.assert_close(dequantize(codes, qparams)[same], restored[same], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "theirs"), [("nf4", "nf4"), ("bnb_fp4", "fp4")])
def test_double_quantization_is_the_same(name, theirs):
    weight = torch.randn(128, 512) * 0.02
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=theirs, compress_statistics=True)
    qparams = find_qparams(weight, parse_spec(f"{name}/g64/dq256"))
    torch.testing.assert_close(qparams.stored["offset"], state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(qparams.stored["outer"], state.state2.absmax, rtol=1e-5, atol=0)
    different = qparams.stored["code"].flatten() != state.absmax.flatten()
    # the means differ in the last bit
    assert different.float().mean() < 0.01
    theirs_restored = functional.dequantize_4bit(packed, state)
    ours = dequantize(nibbles(packed, weight.shape), qparams)
    near = ~different.reshape(qparams.scale.shape).repeat_interleave(64, 1)
    torch.testing.assert_close(ours[near], theirs_restored[near], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "levels"), [("dynamic8", functional.create_dynamic_map), ("linear8", functional.create_linear_map)]
)
def test_8_bit_books_are_the_same(name, levels):
    book = levels().float()
    torch.testing.assert_close(code_values(parse_format(name)), book, rtol=0, atol=1e-6)
    weight = torch.randn(64, 512)
    codes, state = functional.quantize_blockwise(weight, code=book, blocksize=256)
    qparams = find_qparams(weight, parse_spec(f"{name}/g256"))
    assert torch.equal(qparams.scale.flatten(), state.absmax.flatten())
    restored = functional.dequantize_blockwise(codes, state)
    # their codes stand for the same numbers
    torch.testing.assert_close(dequantize(codes.reshape(weight.shape), qparams), restored, rtol=0, atol=1e-5)
    # and ours, which are the nearest, lose no more
    error = (dequantize(quantize(weight, qparams), qparams) - weight).abs()
    assert error.mean() <= (restored - weight).abs().mean() * 1.0001
