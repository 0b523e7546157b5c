"""Compile the kernel that quantizes rows for a device that need not be there."""

import torch
from triton.compiler import ASTSource

from qcompile.backends.triton import quantize_rows as rows
from qcompile.backends.triton.before_rows import BEFORE
from qcompile.formats import Float
from tests.triton.compiled import NAMES, compiled


def cubin(
    K: int,
    capability: int,
    dtype: torch.dtype,
    before: str,
    *,
    integer: bool,
    zeros: bool = False,
    second: bool = False,
    narrow: Float | None = None,
    split: bool = False,
    factor: bool = False,
    early: bool = False,
    pairs: bool = False,
) -> bytes:
    """The binary for rows of K elements, as the launcher would have it compiled.

    second: and what is made with it.  narrow: a format of fewer than 8 bits, with channels lowered.
    split: outlier channels go to a tail.  factor: channels are multiplied with numbers of their own, without a norm.
    early: of few rows.  pairs: of E4M3, with channels lowered.
    """
    name = NAMES[dtype]
    norm = "norm" in before
    given = {"x": name, "codes": "u8" if zeros or not integer else "i8", "scales": "fp32"}
    given |= {"second": name} if second else {}
    given |= {"total": name} if second and norm else {}
    given |= {"zeros": "fp32"} if zeros else {}
    given |= {"weight": name} if norm or factor else {}
    given |= {"bias": name} if before == "layer_norm" else {}
    given |= {"shift": "i8"} if narrow or pairs else {}
    given |= {"pairs": "u8"} if pairs else {}
    given |= {"keep": name, "channels": "i32", "tail": name} if split else {}
    constants = {
        "BEFORE": BEFORE.index(before),
        "MOST": (255.0 if zeros else 127.0) if integer else narrow.max if narrow else 448.0,
        "INTEGER": integer,
        "OFFSET": 0.0,
        "MANTISSA": narrow.mantissa if narrow else -1,
        "LOWEST": 1 - narrow.bias if narrow else 0,
        "RAISED": 6 if narrow else 0,
        "INLINE": True,
        "DEPENDENT": capability >= 90,
        "EARLY": early,
        "BLOCK": rows.block_for(K),
        "TAIL": rows.tail_block_for(K // 100 if split else 0),
    }
    optional = ("second", "weight", "bias", "shift", "keep", "channels", "zeros", "total", "tail", "pairs")
    constants |= dict.fromkeys((n for n in optional if n not in given), None)
    kinds = {n: f"*{kind}" for n, kind in given.items()} | {"eps": "fp32"}
    options = {"num_warps": rows.warps_for(K), "enable_fp_fusion": False}
    lengths = ("K", "stride_x", "stride_second") if K % 16 == 0 else ()
    return compiled(ASTSource, rows.quantize_rows_kernel, kinds, constants, capability, options, lengths).asm["cubin"]
