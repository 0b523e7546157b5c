"""Compile the kernels of 8-bit codes for a device that need not be there."""

import torch
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from qcompile.backends.triton import eight_bit, eight_bit_ring, hopper
from qcompile.backends.triton.eight_bit_table import HopperTiles, RingTiles, Tiles
from tests.triton.compiled import NAMES, compiled, described

OPTIONAL = ("zero", "sum_w", "bias", "residual", "x_tail", "w_tail")


def cubin(
    config: Tiles | RingTiles | HopperTiles,
    capability: int,
    codes: torch.dtype,
    dtype: torch.dtype,
    *,
    full: bool,
    tail: bool,
) -> bytes:
    """The binary of the configuration's kernel, as its launcher would have it compiled.

    full: with zero, bias and residual.
    """
    name = NAMES[dtype]
    optional = {"zero": "*fp32", "sum_w": "*i32", "bias": f"*{name}", "residual": f"*{name}"} if full else {}
    if isinstance(config, HopperTiles):
        return _hopper(config, capability, name, optional, tail)
    if isinstance(config, RingTiles):
        return _ring(config, capability, NAMES[codes], name, optional, tail)
    optional |= dict.fromkeys(("x_tail", "w_tail"), f"*{name}") if tail else {}
    return _eight_bit(config, capability, NAMES[codes], name, optional)


def _eight_bit(config: Tiles, capability: int, codes: str, name: str, optional: dict[str, str]) -> bytes:
    if config.described:
        given = {
            "x": f"tensordesc<{codes}[{config.tokens},{config.depth}]>",
            "w": f"tensordesc<{codes}[{config.channels},{config.depth}]>",
        }
    else:
        given = {"x": f"*{codes}", "w": f"*{codes}"}
    given |= {"weights": f"*{codes}", "y": f"*{name}", "scale_x": "*fp32", "scale_w": "*fp32"}
    constants = {
        "TOKENS": config.tokens,
        "CHANNELS": config.channels,
        "DEPTH": config.depth,
        "TAIL": eight_bit.TAIL_DEPTH,
        "INTEGER": codes == "i8",
        "DESCRIBED": config.described,
        "EVEN": False,
        "DEPENDENT": capability >= 90,
    }
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return _compiled(ASTSource, eight_bit.eight_bit_kernel, given | optional, constants, capability, options)


def _hopper(config: HopperTiles, capability: int, name: str, optional: dict[str, str], tail: bool) -> bytes:
    bytes_each = 4 if name == "fp32" else 2
    store = min(config.channels, hopper.STORE // config.tokens // bytes_each)
    given = {
        "x": described("i8", [config.tokens, hopper.ROW]),
        "w": described("i8", [config.channels, hopper.ROW]),
        "y": described(name, [config.tokens, store]),
        "scale_x": "*fp32",
        "scale_w": "*fp32",
    }
    if tail:
        optional |= {
            "x_tail": described(name, [config.tokens, hopper.ROW // 2]),
            "w_tail": described(name, [hopper.ROW // 2, config.channels]),
        }
    constants = {"GROUPS": hopper.GROUPS, "STAGES": config.stages, "ROWS": hopper.ROWS_OF_TILES}
    return _compiled(GluonASTSource, hopper.hopper_kernel, given | optional, constants, capability, {"num_warps": 4})


def _ring(config: RingTiles, capability: int, codes: str, name: str, optional: dict[str, str], tail: bool) -> bytes:
    row = eight_bit_ring.ROW
    given = {
        "x": described(codes, [config.tokens, row]),
        "w": described(codes, [config.channels, row]),
        "y": f"*{name}",
        "scale_x": "*fp32",
        "scale_w": "*fp32",
    }
    if tail:
        optional |= {
            "x_tail": described(name, [config.tokens, row // 2]),
            "w_tail": described(name, [row // 2, config.channels]),
        }
    constants = {"STAGES": config.stages, "COPYING": eight_bit_ring.COPYING}
    options = eight_bit_ring.options(config)
    return _compiled(GluonASTSource, eight_bit_ring.ring_kernel, given | optional, constants, capability, options)


def _compiled(
    source: type, kernel: object, given: dict[str, str], constants: dict[str, object], capability: int, options: dict
) -> bytes:
    constants = dict.fromkeys((n for n in OPTIONAL if n not in given), None) | constants
    return compiled(source, kernel, given, constants, capability, options | {"enable_fp_fusion": False}).asm["cubin"]
