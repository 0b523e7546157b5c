"""Weights as compressed-tensors checkpoints hold them (llm-compressor, vLLM), without quantizing them again.

pack-quantized: weight_packed int32 [N, ceil(K * bits / 32)], codes from 0 along K, a stream of low bits first, with
weight_scale [N, G], weight_shape [2], and weight_zero_point int32 [ceil(N * bits / 32), G], packed alike along N, less
nothing: codes and zero points are those of two's complement plus 2**(bits - 1). int-quantized: weight int8 [N, K].
float-quantized: weight float8_e4m3fn [N, K]. naive-quantized: either. weight_scale [N, 1], [1], or [N / r, K / c].
mxfp4-pack-quantized and nvfp4-pack-quantized: weight_packed uint8 [N, K / 2], codes of E2M1 from 0 along K, low nibbles
first, with weight_scale [N, G] of E8M0, or of E4M3 and a weight_global_scale [1] that divides it.
Source: compressed-tensors 0.20, compressors/pack_quantized, naive_quantized, mxfp4 and nvfp4.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import UnsupportedError
from qcompile.packing import as_bytes, pack, packed_length, unpack
from qcompile.readers.integers import evened, kind, signed, unsigned, widths_of
from qcompile.solved import Solved, stored_as
from qcompile.spec import Spec, parse_spec


def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Solved:
    """What one module's tensors, by their last names, say of its weight.

    config: the scheme of the module, see `scheme_of`.  Raises UnsupportedError for layouts that are not read.
    """
    layout = str(config["format"])
    if layout not in _LAYOUTS:
        raise UnsupportedError(
            f"compressed-tensors of format {layout!r} are not read; known: {', '.join(_LAYOUTS)}. Quantize the float "
            "model"
        )
    return _LAYOUTS[layout](tensors, config["weights"])


def scheme_of(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of a checkpoint's configuration that a module belongs to, with its format."""
    groups = [{"format": config.get("format"), **group} for group in config["config_groups"].values()]
    named = [g for g in groups if any(_names(target, module) for target in g["targets"])]
    # a target that is a class is not asked: only linears are compressed
    found = named or [g for g in groups if "Linear" in g["targets"]] or groups
    scheme: dict[str, Any] = found[0]
    # a group without a format of its own says so by null
    return scheme if scheme["format"] else scheme | {"format": config.get("format")}


def input_of(scheme: Mapping[str, Any], module: str) -> Spec | None:
    """The spec of a module's input; None if it stays float.  Raises UnsupportedError for inputs that are not read."""
    given = scheme.get("input_activations")
    if given is None:
        return None
    wanted = (given["type"], given["num_bits"], given["strategy"], given.get("dynamic"))
    spec = INPUTS.get(wanted) or _BLOCKS.get((*wanted, given.get("group_size")))
    if spec is None:
        raise UnsupportedError(
            f"the input of {module!r} is {wanted[0]} of {wanted[1]} bits by {wanted[2]}"
            f"{'' if wanted[3] else ', with a calibrated scale'}, which is not read; known: 8 bits by token, dynamic, "
            "and MXFP4 and NVFP4"
        )
    return parse_spec(spec + ("" if given.get("symmetric", True) else "/asym"))


# (type, bits, strategy, whether found while running) -> spec
INPUTS = {
    ("int", 8, "token", True): "int8/token",
    ("float", 8, "token", True): "fp8_e4m3/token",
}
# and columns of a group: NVFP4's scale above the groups, which a checkpoint has calibrated, is found while running, too
_BLOCKS = {
    ("float", 4, "group", True, 32): "fp4_e2m1/b32/e8m0",
    ("float", 4, "tensor_group", "local", 16): "fp4_e2m1/b16/fp8_e4m3",
}


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _packed(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Solved:
    bits, (N, K) = int(weights["num_bits"]), (int(size) for size in tensors["weight_shape"])
    rows = _stream(tensors["weight_packed"], bits, K)
    # one scale is that of all rows
    scale = tensors["weight_scale"].reshape(-1, tensors["weight_scale"].shape[-1]).expand(N, -1).contiguous()
    order = _order(tensors)
    half = 2 ** (bits - 1)
    if order is not None:
        rows = pack(unpack(rows, bits, K, signed=False).index_select(1, order), bits)
    if "weight_zero_point" not in tensors:
        return signed(pack(unpack(rows, bits, K, signed=False) ^ half, bits), bits, K, scale, order=order)
    held = tensors["weight_zero_point"]
    if held.dtype is torch.int32:
        zeros = unpack(_stream(held.t(), bits, N), bits, N, signed=False).t()
    else:
        zeros = held.to(torch.int16) + half
    zeros = zeros.reshape(-1, zeros.shape[-1]).expand(N, -1).contiguous()
    return unsigned(rows, bits, K, scale, zeros, order=order)


def _stream(words: Tensor, bits: int, length: int) -> Tensor:
    """int32 [N, words] as bytes, less those that only fill up the last word."""
    return as_bytes(words)[:, : packed_length(length, bits)].contiguous()


def _order(tensors: Mapping[str, Tensor]) -> Tensor | None:
    groups = tensors.get("weight_g_idx")
    unset = groups is None or bool((groups < 0).any()) or bool((groups.diff() >= 0).all())
    return None if unset or groups is None else groups.argsort(stable=True)


def _integers(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Solved:
    bits, codes = int(weights["num_bits"]), tensors["weight"]
    N, K = codes.shape
    scale = (
        tensors["weight_scale"].reshape(-1, 1) if tensors["weight_scale"].numel() in (1, N) else tensors["weight_scale"]
    )
    scale = scale.expand(N, -1).contiguous()
    if "weight_zero_point" not in tensors:
        return signed(pack(codes, bits), bits, K, scale)
    half = 2 ** (bits - 1)
    zeros = (tensors["weight_zero_point"].to(torch.int16) + half).reshape(-1, scale.shape[1]).expand(N, -1).contiguous()
    return unsigned(pack((codes.to(torch.int16) + half).to(torch.uint8), bits), bits, K, scale, zeros)


def _floats(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Solved:
    codes, scale = tensors["weight"], tensors["weight_scale"]
    if codes.dtype is not torch.float8_e4m3fn:
        raise UnsupportedError(f"weights of {codes.dtype} are no 8-bit floats of format E4M3, which are read")
    N, K = codes.shape
    if scale.numel() == 1:
        name, scale = "tensor", scale.reshape(())
    elif tuple(scale.shape) == (N, 1):
        name = "channel"
    elif scale.dim() == 2 and N % (scale := _evened(scale, N, K, weights)).shape[0] == 0 and K % scale.shape[1] == 0:
        name = f"b{N // scale.shape[0]}x{K // scale.shape[1]}"
    else:
        raise UnsupportedError(
            f"scales {list(scale.shape)} of a weight {list(codes.shape)} are blocks that do not divide it, which are "
            "not read"
        )
    spec = parse_spec(f"fp8_e4m3/{name}{kind(scale)}")
    return stored_as({"weight": codes.view(torch.uint8), "scale_scale": scale.contiguous()}, spec, (N, K))


def _evened(scale: Tensor, N: int, K: int, weights: Mapping[str, Any]) -> Tensor:
    """Scales of blocks, of which the last ones need not be whole, as those of smaller blocks that are alike."""
    if not (size := weights.get("block_structure")):
        return scale
    # a list, and in older files text
    rows, columns = map(int, re.findall(r"\d+", str(size)))
    return evened(widths_of(K, columns), evened(widths_of(N, rows), scale.t()).t())


def _fours(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Solved:
    codes, scale = tensors["weight_packed"], tensors["weight_scale"]
    N, K = codes.shape[0], 2 * codes.shape[1]
    stored = {"weight": codes, "scale_code": scale.view(torch.uint8)}
    kept = "e8m0"
    if scale.dtype is torch.float8_e4m3fn:
        kept, above = "fp8_e4m3", tensors["weight_global_scale"]
        stored["scale_outer"] = above.float().reshape(()).reciprocal()
    return stored_as(stored, parse_spec(f"fp4_e2m1/b{K // scale.shape[1]}/{kept}"), (N, K))


def _naive(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Solved:
    return (_floats if weights["type"] == "float" else _integers)(tensors, weights)


_LAYOUTS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], Solved]] = {
    "pack-quantized": _packed,
    "int-quantized": _integers,
    "float-quantized": _floats,
    "naive-quantized": _naive,
    "mxfp4-pack-quantized": _fours,
    "nvfp4-pack-quantized": _fours,
}
