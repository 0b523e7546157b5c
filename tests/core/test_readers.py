"""Checkpoints of others are read to the bit.

tests/golden holds layers that auto_gptq and AutoAWQ packed and made floats of, outside of this repository, since both
want packages that are no longer kept; compressed-tensors writes and reads its own while the tests run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from qcompile.errors import UnsupportedError
from qcompile.numerics import dequantize
from qcompile.readers import awq, compressed, gptq
from qcompile.solved import Solved

GOLDEN = Path(__file__).parents[1] / "golden"


def numbers(weight: Solved) -> Tensor:
    """What a weight stands for, its columns in the order of the model."""
    qparams = weight.qparams
    assert qparams.codes is not None
    values = dequantize(qparams.codes, qparams)
    return values if weight.order is None else torch.empty_like(values).index_copy_(1, weight.order, values)


def fields(numbers: Tensor, bits: int) -> Tensor:
    """int32 words along the first dimension, bit by bit: bit i of number k is bit k * bits + i of its column."""
    count = numbers.shape[0] * bits
    ones = ((numbers.long()[:, None] >> torch.arange(bits)[:, None]) & 1).flatten(0, 1)  # [K * bits, N]
    words = torch.zeros(-(-count // 32) * 32, numbers.shape[1], dtype=torch.int64)
    words[:count] = ones
    packed = (words.unflatten(0, (-1, 32)) << torch.arange(32)[:, None]).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def integers(N: int, K: int, group: int, bits: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    """Codes [N, K], and scales and zero points [N, G]."""
    G = K // group
    codes = torch.randint(2**bits, (N, K))
    # of a zero point 0, words of the first format are not defined alike by all who write them
    return codes, (torch.rand(N, G) / 7 + 0.01).to(dtype), torch.randint(1, 2**bits, (N, G))


def expected(codes: Tensor, scale: Tensor, zero: Tensor, groups: Tensor) -> Tensor:
    return (codes - zero[:, groups]).float() * scale.float()[:, groups]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [False, True], ids=["static", "act-order"])
def test_gptq(bits: int, version: str, ordered: bool) -> None:
    N, K, group = 64, 160, 32
    codes, scale, zero = integers(N, K, group, bits)
    groups = torch.arange(K) // group
    groups = groups[torch.randperm(K)] if ordered else groups
    tensors = {
        "qweight": fields(codes.t(), bits),
        "qzeros": along_n(zero, bits, version),
        "scales": scale.t().contiguous(),
        "g_idx": groups.int(),
    }
    found = gptq.read(tensors, {"bits": bits, "group_size": group, "checkpoint_format": version})
    assert str(found.spec) == f"int{bits}/g{group}/asym/fp16"
    assert (found.order is not None) is ordered
    assert torch.equal(numbers(found), expected(codes, scale, zero, groups))


def along_n(zero: Tensor, bits: int, version: str) -> Tensor:
    kept = (zero - 1) & (2**bits - 1) if version == "gptq" else zero
    return fields(kept, bits).t().contiguous()


def test_gptq_without_zero_points_is_symmetric() -> None:
    codes, scale, _ = integers(32, 64, 64, 4)
    middle = torch.full((32, 1), 8)
    tensors = {"qweight": fields(codes.t(), 4), "qzeros": along_n(middle, 4, "gptq"), "scales": scale.t()}
    found = gptq.read(tensors, {"bits": 4})
    assert str(found.spec) == "int4/channel/fp16"
    assert torch.equal(numbers(found), expected(codes, scale, middle, torch.zeros(64, dtype=torch.int64)))


@pytest.mark.parametrize("told", ["size", "g_idx", "act-order"])
@pytest.mark.parametrize(("K", "group"), [(96, 64), (64, 96), (160, 64)])
def test_gptq_of_groups_that_do_not_divide_the_columns(K: int, group: int, told: str) -> None:
    """The last group is narrower; two groups of 96 columns are 64 and 32 of them, not 48 each."""
    G = -(-K // group)
    codes, (_, scale, zero) = torch.randint(16, (32, K)), integers(32, G, 1, 4)
    groups = torch.arange(K) // group
    groups = groups[torch.randperm(K)] if told == "act-order" else groups
    tensors = {
        "qweight": fields(codes.t(), 4),
        "qzeros": along_n(zero, 4, "gptq"),
        "scales": scale.t().contiguous(),
        **({"g_idx": groups.int()} if told != "size" else {}),
    }
    found = gptq.read(tensors, {"bits": 4, "group_size": group})
    assert torch.equal(numbers(found), expected(codes, scale, zero, groups))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_as_auto_gptq_packs_and_multiplies(bits: int) -> None:
    """Golden: QuantLinear of qlinear_cuda_old, and its product with the identity, in float16."""
    tensors = load_file(GOLDEN / f"auto_gptq-{bits}.safetensors")
    found = gptq.read(tensors, {"bits": bits, "group_size": 32})
    assert torch.equal(numbers(found).half(), tensors["weight"])


def test_awq_as_autoawq_packs_and_dequantizes() -> None:
    """Golden: WQLinear_GEMM.from_linear, and dequantize_gemm, in float16."""
    tensors = load_file(GOLDEN / "autoawq-4.safetensors")
    found = awq.read(tensors, {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True})
    assert torch.equal(numbers(found).half(), tensors["weight"])


def test_gptq_words_written_by_hand() -> None:
    """Golden: eight codes of one column in a word, lowest bits first; zero points 3 and 9 less one."""
    tensors = {
        "qweight": torch.tensor([[0x76543210, -0x1234568]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x82]], dtype=torch.int32),
        "scales": torch.tensor([[0.5, 2.0]]),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    found = numbers(gptq.read(tensors, {"bits": 4, "group_size": 8}))
    # 0xfedcba98 is -0x1234568
    assert found.tolist() == [[(k - 3) * 0.5 for k in range(8)], [(k - 9) * 2.0 for k in range(8, 16)]]


@pytest.mark.parametrize("group", [32, 96])
def test_awq(group: int) -> None:
    N, K = 40, 96
    codes, scale, zero = integers(N, K, group, 4)
    tensors = {"qweight": interleaved(codes.t()), "qzeros": interleaved(zero.t()), "scales": scale.t().contiguous()}
    found = awq.read(tensors, {"bits": 4, "group_size": group, "version": "gemm", "zero_point": True})
    assert str(found.spec) == ("int4/g32/asym/fp16" if group == 32 else "int4/channel/asym/fp16")
    assert torch.equal(numbers(found), expected(codes, scale, zero, torch.arange(K) // group))


def interleaved(numbers: Tensor) -> Tensor:
    """As AutoAWQ packs: number order[i] of each eight goes to bits 4 i of their word."""
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
    for column in range(words.shape[1]):
        for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, column] |= numbers[:, column * 8 + place] << (4 * i)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def test_awq_words_written_by_hand() -> None:
    """Golden: the word 0x75316420 holds 0 to 7 in order."""
    tensors = {
        "qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
        "qzeros": torch.tensor([[0]], dtype=torch.int32),
        "scales": torch.ones(1, 8),
    }
    assert numbers(awq.read(tensors, {"bits": 4})).tolist() == [[float(n)] for n in range(8)]


def test_other_versions_of_awq_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"version 'gemv' with 4 bits.*convert it"):
        awq.read({}, {"bits": 4, "version": "GEMV"})


WEIGHTS: tuple[dict[str, Any], ...] = (
    {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
    {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 48},
    {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"},
    {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"},
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [16, 32]},
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [32, 32]},
    {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "tensor"},
    {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "tensor"},
)
LAYOUTS = {
    "int": ("pack-quantized", "int-quantized", "naive-quantized"),
    "float": ("float-quantized", "naive-quantized"),
}


@pytest.mark.parametrize(
    "weights", WEIGHTS, ids=lambda w: f"{w['type']}{w['num_bits']}-{w['strategy']}-{w['symmetric']}"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compressed_tensors(weights: dict[str, Any], dtype: torch.dtype) -> None:
    """Compressed by the library itself, and decompressed by it."""
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    args = library.QuantizationArgs(**weights)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(48, 96, dtype=dtype)
    state = {"weight": weight, **_qparams(weight, weights)}
    for layout in LAYOUTS[weights["type"]]:
        compressor = compressors.BaseCompressor.get_value_from_registry(layout)
        held = compressor.compress(state, scheme)
        found = compressed.read(held, {"format": layout, "weights": weights})
        theirs = compressor.decompress(held, scheme)["weight"]
        assert torch.equal(numbers(found).to(dtype), theirs)


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("mxfp4-pack-quantized", {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
        ("nvfp4-pack-quantized", {"strategy": "tensor_group", "group_size": 16}),
    ],
)
def test_compressed_tensors_of_four_bit_floats(layout: str, weights: dict[str, Any]) -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    args = library.QuantizationArgs(num_bits=4, type="float", symmetric=True, **weights)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(48, 96)
    amax = weight.abs().unflatten(1, (-1, weights["group_size"])).amax(-1)
    if layout.startswith("mx"):
        scales = {"weight_scale": 2.0 ** (amax / 6).log2().ceil()}
    else:
        above = 448 * 6 / weight.abs().max()
        rounded = (amax / 6 * above).to(torch.float8_e4m3fn).float()
        scales = {"weight_scale": rounded, "weight_global_scale": above.reshape(1)}
    compressor = compressors.BaseCompressor.get_value_from_registry(layout)
    held = compressor.compress({"weight": weight, **scales}, scheme)
    found = numbers(compressed.read(held, {"format": layout, "weights": weights}))
    # a quotient there is a product with the inverse here; and it decompresses to bfloat16
    theirs = compressor.decompress(held, scheme)["weight"].float()
    assert ((found - theirs).abs() <= 2**-8 * theirs.abs()).all()
    assert (found - weight).norm() < 0.2 * weight.norm()


def _qparams(weight: Tensor, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Scales and zero points in the shapes of the library; the codes may reach both ends."""
    N, K = weight.shape
    rows, columns = {
        "group": (1, weights.get("group_size")),
        "channel": (1, K),
        "tensor": (N, K),
        "block": weights.get("block_structure", (None, None)),
    }[weights["strategy"]]
    # the last rows of blocks need not be whole
    tiles = (
        F.pad(weight.float().abs(), (0, 0, 0, -N % rows))
        .unflatten(1, (-1, columns))
        .unflatten(0, (-1, rows))
        .amax((1, 3))
    )
    top = 448 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 1
    scale = (tiles / top * 0.9).to(weight.dtype)
    scale = scale.reshape(1) if weights["strategy"] == "tensor" else scale
    if weights["symmetric"]:
        return {"weight_scale": scale}
    return {"weight_scale": scale, "weight_zero_point": torch.randint(-4, 4, scale.shape).to(torch.int8)}


def test_a_module_finds_its_scheme() -> None:
    config = {
        "format": "mixed-precision",
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": {"num_bits": 4}, "format": "pack-quantized"},
            "b": {"targets": [r"re:.*down_proj$"], "weights": {"num_bits": 8}, "format": "int-quantized"},
            "c": {"targets": ["layers.0.up"], "weights": {"num_bits": 3}, "format": None},
        },
    }
    schemes = [compressed.scheme_of(name, config) for name in ("layers.0.q", "layers.1.down_proj", "layers.0.up")]
    assert [scheme["weights"]["num_bits"] for scheme in schemes] == [4, 8, 3]
    assert [scheme["format"] for scheme in schemes] == ["pack-quantized", "int-quantized", "mixed-precision"]


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        ({"strategy": "group", "group_size": 32, "dynamic": True}, "fp4_e2m1/b32/e8m0"),
        ({"strategy": "tensor_group", "group_size": 16, "dynamic": "local"}, "fp4_e2m1/b16/fp8_e4m3"),
    ],
)
def test_inputs_of_four_bit_floats(given: dict[str, Any], spec: str) -> None:
    found = compressed.input_of({"input_activations": {"type": "float", "num_bits": 4, **given}}, "fc")
    assert str(found) == spec


def test_what_is_not_read_says_so() -> None:
    with pytest.raises(UnsupportedError, match="format 'marlin-24' are not read; known: pack-quantized"):
        compressed.read({}, {"format": "marlin-24", "weights": {}})
    static = {"input_activations": {"type": "int", "num_bits": 8, "strategy": "tensor", "dynamic": False}}
    with pytest.raises(UnsupportedError, match="input of 'fc' is int of 8 bits by tensor, with a calibrated scale"):
        compressed.input_of(static, "fc")
