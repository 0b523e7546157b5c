"""On whole models: the edges that each family has, none lost, and results that stay when every one is folded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from qcompile.calibrate import calibrate
from qcompile.channels import tied
from qcompile.edges import Edge, find_edges
from qcompile.folds import Fold
from qcompile.graph import Op
from qcompile.passes.fold_smooth import count_multiplications, fold_smooth
from tests.families import FAMILIES, VOCABULARY, build, tokens
from tests.fx.capture import Opened, dynamo_graphs, ops_of, result
from tests.variants import variants

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2, "head_dim": 16}
_FALCON = {k: v for k, v in _SMALL.items() if "intermediate" not in k and "position" not in k}

MORE: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama, eager": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, attn_implementation="eager")),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GROUPED)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SMALL)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SMALL, num_key_value_heads=2)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SMALL)),
}

# for two layers: edges that fold, those that leave a multiplication, and those that are refused
# q|k|v, o, gate|up and down of each layer, and the head
GATED = (9, 0, 0)
# without down, which stands behind a GELU
PLAIN = (7, 0, 2)
EXPECTED: dict[str, tuple[int, int, int]] = {
    "llama": GATED,
    "opt": GATED,
    "gpt2": PLAIN,
    # both norms of a layer are read by a residual, o folds, the GELU refuses
    "bert": (2, 4, 2),
    # the norm of the experts is read by them, too
    "mixtral": (5, 2, 0),
    "qwen2-moe": (7, 2, 0),
    "llama, eager": GATED,
    "gemma": GATED,
    "gemma2": GATED,
    "gemma3": GATED,
    "qwen3": GATED,
    # attention and MLP read one norm
    "phi": (5, 0, 2),
    "phi3": GATED,
    "falcon": (5, 0, 2),
    "gpt-neox": PLAIN,
}


def trained_alike(family: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = build(family) if family in FAMILIES else MORE[family]().eval()
    for name, p in model.named_parameters():
        # trained norms and biases are neither ones nor zeros
        if p.dim() == 1:
            torch.nn.init.normal_(p, 0.5 if "norm" in name.lower() or "ln_" in name else 0.0, 0.2)
    return model


def opened(family: str) -> Opened:
    cache: dict[str, Any] = {} if family == "bert" else {"use_cache": False}
    (found,) = dynamo_graphs(trained_alike(family), tokens(2, 8), **cache)
    return found


def folds(edges: list[Edge]) -> list[Fold]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for edge in edges:
        scale = torch.exp2(12 * torch.rand(len(edge.channels), generator=generator) - 6)
        sites = tuple(f.site.name for f in edge.consumers)
        found.append(Fold(sites=sites, scale=tied(scale, edge.channels), into=edge.into))
    return found


@pytest.mark.parametrize("family", EXPECTED)
def test_every_edge_is_found_and_folds(family: str) -> None:
    found = opened(family)
    graph = found.graph
    edges = find_edges(graph)
    legal, multiplied = [e for e in edges if not e.reason], [e for e in edges if e.multiply]
    assert (len(legal), len(multiplied), len(edges) - len(legal) - len(multiplied)) == EXPECTED[family]
    assert all(f.into for f in folds(legal))
    before = result(graph, *found.inputs)
    count = sum(graph.op(v) is not Op.CONSTANT for v in graph.values())
    apply = folds([*legal, *multiplied])
    assert count_multiplications(graph, apply) == len(multiplied)
    fold_smooth(graph, apply)
    graph.prune()
    assert sum(graph.op(v) is not Op.CONSTANT for v in graph.values()) <= count + len(multiplied)
    after = result(graph, *found.inputs)
    # float32 through two layers, each product rounded once more
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())
    assert not torch.equal(after, before)


def test_values_that_go_to_a_cache_are_not_scaled() -> None:
    (found,) = dynamo_graphs(build("llama"), tokens(2, 8), use_cache=True)
    reasons = {e.consumers[0].site.name: e.reason for e in find_edges(found.graph)}
    assert sum(not reason for reason in reasons.values()) == 7
    assert all("self_attn.o_proj" in name for name, reason in reasons.items() if reason)


@pytest.mark.parametrize(("family", "each"), [("gemma2", 4), ("gemma3", 6), ("qwen3", 4)])
def test_norms_written_by_hand_are_one_op_with_a_known_weight(family: str, each: int) -> None:
    graph = opened(family).graph
    norms = ops_of(graph, Op.RMS_NORM)
    assert len(norms) == 2 * each + 1
    assert {graph.name(norm).rpartition(".")[2] for norm in norms} >= {"input_layernorm", "norm"}
    assert all(graph.constant(graph.inputs(norm)[1]) is not None for norm in norms)


@pytest.mark.parametrize("family", variants(FAMILIES, quick=("llama", "bert")))
def test_what_calibration_folds_leaves_the_logits_and_costs_nothing_before_norms(family: str) -> None:
    model, ids = trained_alike(family), tokens(2, 8)
    cache: dict[str, Any] = {} if family == "bert" else {"use_cache": False}
    expected = next(iter(model(ids, **cache).values())).detach()
    plan = calibrate(model, [{"input_ids": ids, **cache}], "int8-smooth", progress=False)
    assert plan.notes == ()
    (found,) = dynamo_graphs(model, ids, **cache)
    graph = found.graph
    count = sum(graph.op(v) is not Op.CONSTANT for v in graph.values())
    fold_smooth(graph, plan.folds)
    graph.prune()
    # post-norm models make the residual itself with a norm, which only a multiplication leaves alone
    multiplications = sum(not fold.into for fold in plan.folds)
    assert (multiplications > 0) is (family == "bert")
    assert sum(graph.op(v) is not Op.CONSTANT for v in graph.values()) <= count + multiplications
    assert len(plan.folds) - multiplications >= 2
    logits = result(graph, *found.inputs)
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
