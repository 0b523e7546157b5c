"""Whole models of six families through torch.compile: one graph, right results, few compilations, same tokens."""

from itertools import product

import pytest
import torch

import qcompile
from tests.families import DECODERS, FAMILIES, build, tokens
from tests.variants import variants

# the compiled graph and the Q/DQ graph round in different places: almost everywhere they differ by float32 rounding,
# and where a value lies on the edge between two codes by a step of one code in 256, or by another choice of expert
MEDIAN, NORM = 1e-5, 1e-2


def compiled(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    return torch.compile(model, backend="qcompile", fullgraph=True, options=options)


def assert_close(y: torch.Tensor, reference: torch.Tensor) -> None:
    assert float((y - reference).abs().median() / reference.abs().mean()) < MEDIAN
    assert float((y - reference).norm() / reference.norm()) < NORM


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("family", variants(FAMILIES, quick=("llama",)))
def test_one_graph_and_at_most_one_more(family: str) -> None:
    model = build(family)
    fast, reference = compiled(model), compiled(model, lower=False)
    before = graphs()
    shapes = [(2, 8), (3, 9), (5, 16)]
    outputs = [fast(tokens(*shape))[0] for shape in shapes]
    assert graphs() - before <= 2
    for shape, y in zip(shapes, outputs, strict=True):
        assert_close(y, reference(tokens(*shape))[0])
        assert 1e-4 < float((y - model(tokens(*shape))[0]).norm() / y.norm()) < 0.05 or family == "bert"


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize(
    "recipe",
    variants(
        ("int8-weight", "int4-weight", "fp8", "nf4", "int4-token", "w4a8", "mxfp4", "nvfp4"),
        quick=("int4-weight", "fp8"),
    ),
)
def test_presets_equal_their_reference(recipe: str) -> None:
    model = build("llama")
    assert_close(
        compiled(model, recipe=recipe)(tokens(2, 8))[0], compiled(model, recipe=recipe, lower=False)(tokens(2, 8))[0]
    )


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("family", variants(["mixtral", "qwen2-moe"], quick=["mixtral"]))
def test_expert_weights_are_in_the_report(family: str) -> None:
    fast = compiled(build(family))
    fast(tokens(2, 8))
    sites = {site.name: site for site in qcompile.report(fast).sites}
    experts = [site for name, site in sites.items() if "experts" in name and "shared" not in name]
    assert len(experts) == 4
    assert all("grouped_mm" in site.reason for site in experts)


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize(
    ("family", "cache"),
    variants(
        product(DECODERS, ("dynamic", "static")),
        quick=(("llama", "dynamic"),),
    ),
)
def test_generate_gives_the_tokens_of_the_quantized_model(family: str, cache: str) -> None:
    def generate(**options: object) -> torch.Tensor:
        torch._dynamo.reset()
        model = build(family)
        model.forward = torch.compile(model.forward, backend="qcompile", options=options)
        more = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
        return model.generate(tokens(1, 6), max_new_tokens=8, do_sample=False, use_cache=True, **more)

    assert torch.equal(generate(), generate(lower=False))


@pytest.mark.parametrize("family", variants(FAMILIES, quick=()))
def test_generated_code(family: str) -> None:
    model = build(family)
    fast, reference = compiled(model), compiled(model, lower=False)
    for shape in ((2, 8), (3, 9)):
        assert_close(fast(tokens(*shape))[0], reference(tokens(*shape))[0])
