"""Weights as packs of `widths`: which formats and groups they hold, and how."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.backends.triton.width_integers import groups_of_integers, pack_integers
from qcompile.backends.triton.widths import (
    COLUMNS,
    LEVELS,
    ROWS,
    SMALL_GROUPS,
    SMALLEST_GROUP,
    WIDTHS,
    Width,
    group_of_spans,
    is_narrow,
    pack_codes,
    pack_levels,
    pack_scales,
)
from qcompile.formats import FORMATS, Float, Format, Integer, code_values
from qcompile.numerics import QParams
from qcompile.spec import ALL, Spec, Zero

# its numbers are integers over 127, by code from -127 to 0 and from 0 on
LINEAR, LINEAR_MOST = FORMATS["linear8"], 127


def width_of(fmt: Format) -> str | None:
    """The name in `WIDTHS` of what holds a format's codes, None if nothing does.

    Up to 16 numbers are a table. Floats of 5 bits and more fill bytes, with no fewer bits of exponent and mantissa, and
    integers of 7 do.
    """
    match fmt:
        case Integer():
            return fmt.name if fmt.name in WIDTHS else "int8"
        case Float() if fmt.bits > WIDTHS["book"].bits:
            fitting = (width for width in WIDTHS.values() if _holds(width, fmt))
            return next((width.name for width in fitting), None)
        case _:
            return "book" if 2**fmt.bits <= LEVELS else None


def _holds(width: Width, fmt: Float) -> bool:
    """Whether bytes have the bits of exponent and mantissa of a float."""
    mantissa = width.mantissa
    return mantissa is not None and mantissa >= fmt.mantissa and width.bits - 1 - mantissa >= fmt.exponent


def _in_bytes(codes: Tensor, fmt: Float, width: Width) -> Tensor:
    """Codes with sign, exponent and mantissa where bytes have them: 2**(bias - bias of the width) of what they were."""
    assert width.mantissa is not None
    magnitude = codes & (2 ** (fmt.bits - 1) - 1)
    return ((codes >> (fmt.bits - 1)) << 7) | (magnitude << (width.mantissa - fmt.mantissa))


def kind_of(spec: Spec) -> tuple[str | None, bool, int]:
    """Of a pack of this spec: width, which is None if nothing holds its codes, minimum and integers, as of `Packed`."""
    integers = groups_of_integers(spec, COLUMNS)
    width = ("int8" if not integers else None) if spec.format == LINEAR else width_of(spec.format)
    return width, spec.zero is Zero.MINIMUM, integers


def no_groups(spec: Spec) -> str | None:
    """None if scales of a weight are for groups of columns that blocks have, else the reason."""
    columns = spec.granularity.columns
    small = (SMALLEST_GROUP, *SMALL_GROUPS) if width_of(spec.format) == "book" else SMALL_GROUPS
    if columns in (ALL, *small) or columns % COLUMNS == 0:
        return None
    sizes = ", ".join(map(str, small))
    return f"weight {spec} is not by tensor, channel or group of {sizes} or multiples of {COLUMNS} columns"


def of_each_row(qparams: QParams, N: int) -> QParams:
    """Those of a weight [N, K], with a scale and a zero for each row where a tensor or a block of rows has one."""
    rows = qparams.spec.granularity.rows

    def of_rows(values: Tensor) -> Tensor:
        return values.reshape(1, 1).expand(N, 1) if rows == ALL else values.repeat_interleave(rows, 0)

    if rows == 1:
        return qparams
    zero = None if qparams.zero is None else of_rows(qparams.zero)
    return replace(qparams, scale=of_rows(qparams.scale), zero=zero)


def pack_weight(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Words, scales and, of code books, levels; groups of more columns than a block are several groups.

    codes [N, K], of a spec that `kind_of` and `no_groups` let pass.  dtype: of x.
    """
    fmt, qparams = qparams.spec.format, of_each_row(qparams, len(codes))
    name, minimum, integers = kind_of(qparams.spec)
    assert name is not None
    width = WIDTHS[name]
    if isinstance(fmt, Float) and width.mantissa is not None:
        codes = _in_bytes(codes, fmt, width)
        qparams = replace(qparams, scale=qparams.scale * 2.0 ** (width.bias - fmt.bias))
    scale, zero, narrow = qparams.scale, qparams.zero, is_narrow(qparams, dtype) and not minimum and fmt != LINEAR
    if fmt == LINEAR:
        codes = (codes.to(torch.int16) - LINEAR_MOST - (codes > LINEAR_MOST).to(torch.int16)).to(torch.int8)
        fmt, scale = Integer(bits=8), scale / LINEAR_MOST
    if isinstance(fmt, Integer) and zero is None:
        codes = codes.view(torch.uint8) + width.center
        zero = torch.full_like(scale, width.center) if narrow else None
    columns = qparams.spec.granularity.columns
    if columns != ALL and not integers:
        group = group_of_spans(columns, codes.shape[1], scale.shape[1]).to(codes.device)
        scale, zero = scale[:, group], None if zero is None else zero[:, group]
    scales = (
        pack_integers(qparams, codes.shape[1], ROWS, COLUMNS)
        if integers
        else pack_scales(scale, zero, narrow=narrow, minimum=minimum)
    )
    packed = {"words": pack_codes(codes, width), "scales": scales}
    if not width.book:
        return packed
    levels = code_values(fmt).to(codes.device) if qparams.levels is None else qparams.levels
    return packed | {"levels": pack_levels(pad(levels, (0, LEVELS - len(levels))), dtype)}
