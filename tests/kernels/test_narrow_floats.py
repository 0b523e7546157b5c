"""Floats of few bits in E4M3: every code stands for what it stood for."""

import pytest
import torch

from qcompile.backends.fx.kernels.fp8 import as_e4m3, pack
from qcompile.backends.fx.kernels.narrow_floats import factor, is_narrow, widened
from qcompile.formats import code_values, parse_format
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

NARROW = ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp6_e3m2", "fp6_e2m3", "e4m2", "e2m2", "e4m0", "e1m3")


@pytest.mark.parametrize("name", NARROW)
def test_every_code_keeps_its_value(name: str) -> None:
    fmt = parse_format(name)
    assert is_narrow(fmt)
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    held = widened(codes, fmt).view(torch.float8_e4m3fn).float() * factor(fmt)
    assert torch.equal(held, code_values(fmt))
    assert torch.equal(torch.signbit(held), torch.signbit(code_values(fmt)))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e3m4", "fp8_e2m5", "e5m1", "e2m4", "int4", "nf4"])
def test_what_is_not_held(name: str) -> None:
    assert not is_narrow(parse_format(name))


@pytest.mark.parametrize("name", NARROW[:3])
def test_packs_and_inputs_are_those_of_the_oracle(name: str) -> None:
    weight, x = torch.randn(16, 32), torch.randn(5, 32)
    qparams, given = find_qparams(weight, parse_spec(f"{name}/channel")), find_qparams(x, parse_spec(f"{name}/token"))
    packed = pack(quantize(weight, qparams), qparams, torch.bfloat16)
    held = packed["weight"].view(torch.float8_e4m3fn).float() * packed["scale"]
    assert torch.equal(held, dequantize(quantize(weight, qparams), qparams))
    codes, scale = as_e4m3(quantize(x, given), given.scale, name)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float() * scale, dequantize(quantize(x, given), given))
