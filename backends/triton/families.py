"""The formats that `qcompile tune` measures: how each packs a weight, and which kernels with which table run it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.triton import fp8_matmul, int4_int8_linear, int4_int8_table, int4_int8_words, int8_matmul
from qcompile.backends.triton.eight_bit import Operands
from qcompile.backends.triton.eight_bit_table import FP8, INT8
from qcompile.backends.triton.table import EVERY, HOPPER, Entry
from qcompile.backends.triton.width_linear import width_linear
from qcompile.backends.triton.width_packs import pack_weight
from qcompile.backends.triton.width_table import TABLES, can_run, tuned_name
from qcompile.backends.triton.widths import Packed
from qcompile.numerics import QParams, fake_quantize, find_qparams, quantize
from qcompile.spec import parse_spec

DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Family:
    """The kernels of a format. weight, input: specs; capabilities: first and last that multiply it.

    pack: what `run` reads in place of the weight; run: from x (codes with qparams, or floats), the pack and N to y.
    """

    weight: str
    input: str | None
    capabilities: tuple[int, int]
    # what N and K must divide by for the kernels, and the library beside them
    multiples: tuple[int, int]
    table: Sequence[Entry[Any]]
    pack: Callable[[Tensor, QParams], dict[str, Tensor]]
    run: Callable[[Tensor, QParams | None, Mapping[str, Tensor], int, Any], Tensor]
    can_run: Callable[[Any, int, int], bool] = lambda config, M, N: True


def _of_width(width: str, weight: str, multiple: int) -> Family:
    """Weights alone. weight: the spec of a preset; multiple: what K must divide by."""

    def run(x: Tensor, given: QParams | None, pack: Mapping[str, Tensor], N: int, config: Any) -> Tensor:
        packed = Packed(words=pack["words"], scales=pack["scales"], levels=pack.get("levels"), width=width)
        return width_linear(x, packed, None, N, config)

    return Family(
        weight=weight,
        input=None,
        capabilities=EVERY,
        multiples=(1, multiple),
        table=TABLES[width],
        pack=lambda codes, qparams: pack_weight(codes, qparams, DTYPE),
        run=run,
        can_run=lambda config, M, N: can_run(config, M, N, exact=True),
    )


def _pack_eight_bit(codes: Tensor, qparams: QParams) -> dict[str, Tensor]:
    return {"codes": codes, "scale": qparams.scale}


def _operands(x: Tensor, given: QParams | None, pack: Mapping[str, Tensor], dtype: torch.dtype) -> Operands:
    assert given is not None
    return Operands(
        x=x.view(dtype), w=pack["codes"].view(dtype), scale_x=given.scale, scale_w=pack["scale"], dtype=DTYPE
    )


def _int8(x: Tensor, given: QParams | None, pack: Mapping[str, Tensor], N: int, config: Any) -> Tensor:
    return int8_matmul.int8_matmul(_operands(x, given, pack, torch.int8), config)


def _fp8(x: Tensor, given: QParams | None, pack: Mapping[str, Tensor], N: int, config: Any) -> Tensor:
    return fp8_matmul.fp8_matmul(_operands(x, given, pack, torch.float8_e4m3fn), config)


def _can_run_w4a8(config: Any, M: int, N: int) -> bool:
    return not isinstance(config, int4_int8_table.AsInt8) or N % int8_matmul.N_MULTIPLE == 0


def _w4a8(x: Tensor, given: QParams | None, pack: Mapping[str, Tensor], N: int, config: Any) -> Tensor:
    assert given is not None
    o = int4_int8_linear.Operands(x=x, scale_x=given.scale, zero=given.zero, bias=None, **pack)
    return int4_int8_linear.int4_int8_linear(o, DTYPE, config)


FAMILIES: Mapping[str, Family] = {
    tuned_name("int8"): _of_width("int8", "int8/channel", 8),
    tuned_name("int6"): _of_width("int6", "int6/g128/asym/bf16", 128),
    tuned_name("int5"): _of_width("int5", "int5/g128/asym/bf16", 128),
    tuned_name("int4"): _of_width("int4", "int4/g128/asym/bf16", 128),
    tuned_name("book"): _of_width("book", "nf4/g64", 64),
    tuned_name("int3"): _of_width("int3", "int3/g128/asym/bf16", 128),
    tuned_name("int2"): _of_width("int2", "int2/g64/asym/bf16", 64),
    "int8": Family(
        weight="int8/channel",
        input="int8/token",
        capabilities=EVERY,
        multiples=(int8_matmul.N_MULTIPLE, int8_matmul.K_MULTIPLE),
        table=INT8,
        pack=_pack_eight_bit,
        run=_int8,
    ),
    "fp8": Family(
        weight="fp8_e4m3/channel",
        input="fp8_e4m3/token",
        capabilities=(89, EVERY[1]),
        multiples=(16, 16),
        table=FP8,
        pack=_pack_eight_bit,
        run=_fp8,
    ),
    int4_int8_linear.TUNED: Family(
        weight="int4/g128/asym/u4row",
        input="int8/token/asym",
        capabilities=HOPPER,
        multiples=(1, 128),
        table=int4_int8_table.TABLE,
        pack=lambda codes, qparams: int4_int8_words.pack_weight(codes, qparams, DTYPE),
        run=_w4a8,
        can_run=_can_run_w4a8,
    ),
}


def families_on(capability: int) -> list[str]:
    """The formats that a device multiplies.  capability: 90 for 9.0."""
    return [name for name, f in FAMILIES.items() if f.capabilities[0] <= capability <= f.capabilities[1]]


def why_not(fmt: str, N: int, K: int) -> str | None:
    """None if a weight [N, K] can be tuned in this format, else the reason."""
    of_n, of_k = FAMILIES[fmt].multiples
    return f"N and K must divide by {of_n} and {of_k}" if N % of_n or K % of_k else None


def reference(family: Family, x: Tensor) -> Tensor:
    """x as float32 numbers of the format."""
    return x.float() if family.input is None else fake_quantize(x.float(), parse_spec(family.input))


def given(family: Family, x: Tensor) -> tuple[Tensor, QParams | None]:
    """x as the kernels take it: floats, or codes and their qparams. Codes with zeros are int8, less 128."""
    if family.input is None:
        return x, None
    qparams = find_qparams(x, parse_spec(family.input))
    codes = quantize(x, qparams)
    return codes if qparams.zero is None else (codes.short() - 128).to(torch.int8), qparams
