"""The trained language model that lies beside the checkout of its developers: what needs it is skipped elsewhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile.cli.language import read_tokens
from qcompile.cli.models import load_model
from qcompile.report.quality import token_windows

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL, TOKENS = SHARED / "models" / "llama28m", SHARED / "data" / "wikitext2-valid.bin"
WINDOW = 512

needs_model = pytest.mark.skipif(not MODEL.exists(), reason="the model lies beside the checkout of its developers only")


def language_model() -> nn.Module:
    """In float32."""
    return load_model(MODEL)


def first_windows(count: int) -> Tensor:
    """To calibrate on, int64 [count, WINDOW]."""
    return _tokens()[: count * WINDOW].view(count, WINDOW).long()


def other_windows(count: int) -> Tensor:
    """To measure on, int64 [count, WINDOW]."""
    return token_windows(_tokens(), WINDOW, count)


def inject(
    model: nn.Module, factors: tuple[float, float] = (20.0, 60.0), seed: int = 0
) -> Iterator[tuple[str, set[int]]]:
    """Makes six channels of every norm loud without changing the function; yields a reader of each and the channels."""
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(model.model.layers):
        readers = (
            (layer.input_layernorm, f"model.layers.{i}.self_attn", ("q_proj", "k_proj", "v_proj")),
            (layer.post_attention_layernorm, f"model.layers.{i}.mlp", ("gate_proj", "up_proj")),
        )
        for norm, path, names in readers:
            channels = torch.randperm(512, generator=generator)[:6]
            factor = factors[0] + (factors[1] - factors[0]) * torch.rand(6, generator=generator)
            with torch.no_grad():
                norm.weight[channels] *= factor
                for name in names:
                    model.get_submodule(f"{path}.{name}").weight[:, channels] /= factor
            yield f"{path}.{names[0]}", set(channels.tolist())


def _tokens() -> Tensor:
    # ids of uint16: the model itself refuses those beyond its vocabulary
    return read_tokens(TOKENS, MODEL, 2**16)
