"""A small language model on disk, and tokens for it."""

from pathlib import Path

import pytest
import torch

LOUD = 9


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    """A folder with a random language model of 128 tokens, one channel of its first norm loud."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config)
    first = model.model.layers[0]
    with torch.no_grad():
        first.input_layernorm.weight[LOUD] *= 40
        for reader in (first.self_attn.q_proj, first.self_attn.k_proj, first.self_attn.v_proj):
            reader.weight[:, LOUD] /= 40
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in ("a.bin", "b.bin"):
        ids = torch.randint(0, 128, (160,), generator=generator).to(torch.uint16)
        (folder / name).write_bytes(ids.numpy().tobytes())
    return folder
