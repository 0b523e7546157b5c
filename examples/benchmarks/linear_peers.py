"""Linears of other libraries for the benchmarks on CUDA, under the conditions of `linears`, each if it is installed.

To add one, add a line to PEERS.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from linears import DTYPE, ROTATED, Linear, Weight, copies_of, ours, random_weight
from torch import nn

from qcompile.backends.fx.kernels import KERNELS

# relative error that they may have to the float linear, or to what they made of their weight
PEER_LIMIT = 6e-2
# rows that kernels for 4-bit weights and those of gemlite are measured with
FEW = range(1, 129)
# of an activation, from which bitsandbytes multiplies in 16 bits
THRESHOLD = 6.0


def inductor(name: str, weight: Weight) -> Linear:
    """The product of the library, everything around it written by Inductor."""
    return ours(weight, next(kernel for kernel in KERNELS if kernel.name == name))


def without_split(weight: Weight) -> Linear:
    """What the split is measured by: plain int8 of a weight of that shape."""
    return ours(random_weight("int8", *weight.floats.shape))


def tinygemm(weight: Weight) -> Linear:
    """The 4-bit kernel that comes with torch, and that torchao calls."""
    codes, scale, zero = weight.codes.to(torch.int32), weight.qparams.scale, weight.qparams.zero
    assert zero is not None
    nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    # it computes (code - 8) * scale + zero
    zeros = (8 - zero) * scale
    groups = torch.stack([scale, zeros], -1).transpose(0, 1).contiguous().to(DTYPE)
    copies, nbytes = copies_of({"words": torch._convert_weight_to_int4pack(nibbles, 8), "groups": groups})
    return Linear(
        kernel="tinygemm",
        call=lambda x, i: torch._weight_int4pack_mm(x, copies[i]["words"], 128, copies[i]["groups"]),
        reference=weight.oracle,
        copies=len(copies),
        nbytes=nbytes,
        limit=PEER_LIMIT,
    )


def gemlite(processor: str, weight: Weight) -> Linear:
    """A linear of gemlite, which quantizes for itself what is not a 4-bit weight."""
    helper = importlib.import_module("gemlite.helper")
    make = getattr(helper, processor)(device="cuda", dtype=DTYPE)
    qparams = weight.qparams

    def one() -> Any:
        if processor == "A16Wn":
            assert qparams.zero is not None
            parts = (weight.codes.clone(), qparams.scale.to(DTYPE).clone(), qparams.zero.to(DTYPE).clone())
            return make.from_weights(*parts, 4, 128)
        return make.from_weights(weight.floats.to(DTYPE))

    nbytes = weight.codes.nbytes // (2 if processor == "A16Wn" else 1)
    copies = [one() for _ in range(max(2, round(ROTATED / nbytes)))]
    exact = weight.oracle if processor == "A16Wn" else (lambda x: x.float() @ weight.floats.T)
    return Linear(
        kernel=f"gemlite {processor}",
        call=lambda x, i: copies[i](x),
        reference=exact,
        copies=len(copies),
        nbytes=nbytes,
        limit=PEER_LIMIT,
    )


def bitsandbytes_nf4(weight: Weight) -> Linear:
    """NF4 in blocks of 64, with the scales of blocks in float32."""
    library = importlib.import_module("bitsandbytes")
    codes, state = library.functional.quantize_4bit(weight.floats.to(DTYPE), blocksize=64, quant_type="nf4")
    exact = library.functional.dequantize_4bit(codes, state).float()
    copies, nbytes = copies_of({"codes": codes})
    return Linear(
        kernel="bitsandbytes nf4",
        call=lambda x, i: library.matmul_4bit(x, copies[i]["codes"].t(), quant_state=state),
        reference=lambda x: x.float() @ exact.T,
        copies=len(copies),
        nbytes=nbytes + state.absmax.nbytes,
        limit=PEER_LIMIT,
    )


def bitsandbytes_int8(threshold: float, weight: Weight) -> Linear:
    """LLM.int8, whose columns beyond the threshold are found at each call; of 0, none."""
    library = importlib.import_module("bitsandbytes")
    N, K = weight.floats.shape

    def one() -> nn.Module:
        made = library.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=threshold)
        made.weight = library.nn.Int8Params(
            weight.floats.to(torch.float16).cpu(), requires_grad=False, has_fp16_weights=False
        )
        return made.cuda().eval()

    copies = [one() for _ in range(max(2, round(ROTATED / weight.floats.numel())))]
    return Linear(
        kernel=f"bitsandbytes int8, threshold {threshold:g}",
        call=lambda x, i: copies[i](x),
        reference=lambda x: x.float() @ weight.floats.T,
        copies=len(copies),
        nbytes=weight.floats.numel(),
        limit=PEER_LIMIT,
        graphed=threshold == 0,
    )


def torchao(config: str, weight: Weight) -> Linear:
    """A linear that torchao quantized, compiled."""
    library = importlib.import_module("torchao.quantization")
    N, K = weight.floats.shape
    made = nn.Linear(K, N, bias=False, device="cuda", dtype=DTYPE)
    made.weight.data.copy_(weight.floats)
    given = {"granularity": library.PerRow()} if config.startswith("Float8") else {}
    library.quantize_(made, getattr(library, config)(**given))
    copies = [made.weight.clone() for _ in range(max(2, round(ROTATED / weight.floats.numel())))]
    torch._dynamo.reset()
    run = torch.compile(nn.functional.linear, dynamic=False, fullgraph=True)
    return Linear(
        kernel=f"torchao {config}",
        call=lambda x, i: run(x, copies[i]),
        reference=lambda x: x.float() @ weight.floats.T,
        copies=len(copies),
        nbytes=weight.floats.numel(),
        limit=PEER_LIMIT,
    )


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another way to run a format. rows: M that it is for; needs: a package beside torch."""

    make: Callable[[Weight], Linear]
    rows: range = range(1, 8193)
    needs: str | None = None


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "int4": {
        "tinygemm": Peer(make=tinygemm, rows=FEW),
        "gemlite A16W4": Peer(make=partial(gemlite, "A16Wn"), rows=FEW, needs="gemlite"),
    },
    "nf4": {"bitsandbytes nf4": Peer(make=bitsandbytes_nf4, needs="bitsandbytes")},
    "int8": {
        "Inductor, _int_mm": Peer(make=partial(inductor, "int8")),
        "gemlite A8W8 int8": Peer(make=partial(gemlite, "A8W8_int8_dynamic"), rows=FEW, needs="gemlite"),
        "torchao int8": Peer(
            # the library's product that it calls is for more than 16 rows
            make=partial(torchao, "Int8DynamicActivationInt8WeightConfig"),
            rows=range(17, 8193),
            needs="torchao",
        ),
        "bitsandbytes int8": Peer(make=partial(bitsandbytes_int8, 0.0), needs="bitsandbytes"),
    },
    "int8 split": {
        "int8": Peer(make=without_split),
        "Inductor, _int_mm": Peer(make=partial(inductor, "int8")),
        "bitsandbytes LLM.int8": Peer(make=partial(bitsandbytes_int8, THRESHOLD), needs="bitsandbytes"),
    },
    "fp8": {
        "Inductor, _scaled_mm": Peer(make=partial(inductor, "fp8")),
        "gemlite A8W8 fp8": Peer(make=partial(gemlite, "A8W8_fp8_dynamic"), rows=FEW, needs="gemlite"),
        "torchao fp8": Peer(make=partial(torchao, "Float8DynamicActivationFloat8WeightConfig"), needs="torchao"),
    },
}


def peers(name: str) -> Iterator[tuple[str, Peer]]:
    """The peers of a format that are installed."""
    for title, peer in PEERS.get(name, {}).items():
        if peer.needs is None or importlib.util.find_spec(peer.needs) is not None:
            yield title, peer


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    names = {peer.needs for listed in PEERS.values() for peer in listed.values() if peer.needs is not None}
    return {n: importlib.metadata.version(n) for n in sorted(names) if importlib.util.find_spec(n) is not None}
