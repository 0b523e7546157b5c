"""Tiny models of six Hugging Face families, with random weights, in eval mode."""

from collections.abc import Callable

import torch
import transformers as hf

VOCABULARY = 128
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 128,
    "max_position_embeddings": 64,
    "eos_token_id": None,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": None}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_BERT), add_pooling_layer=False),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **_DECODER,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=128,
        )
    ),
}
DECODERS = tuple(name for name in FAMILIES if name != "bert")


def build(family: str) -> hf.PreTrainedModel:
    """A model of the family, the same at every call."""
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
