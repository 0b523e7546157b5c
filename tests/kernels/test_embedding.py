"""Rows of a quantized embedding equal those of the dequantized table, and nothing else of it is read."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

import qcompile
from qcompile.backends.fx.kernels.embedding import KERNEL
from qcompile.backends.fx.kernels.problem import Problem
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.families import build, tokens
from tests.variants import variants

SPECS = ("int8/channel", "int4/channel/asym", "int4/g32/asym/bf16", "int3/g32", "nf4/g64", "fp8_e4m3/channel")
SPECS += ("int4/g32/asym/u4row",)


def problem(spec: str, dtype: torch.dtype = torch.float32, V: int = 50, D: int = 64) -> Problem:
    return Problem(N=V, K=D, weight=parse_spec(spec), input=None, dtype=dtype, device="cpu")


@pytest.mark.parametrize("spec", [*SPECS, "fp4_e2m1/b32/e8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_of_the_oracle(spec: str, dtype: torch.dtype) -> None:
    p = problem(spec, dtype)
    assert KERNEL.why_not(p) is None
    table = torch.randn(p.N, p.K)
    qparams = find_qparams(table, p.weight)
    codes = quantize(table, qparams)
    packed = KERNEL.pack(codes, qparams, dtype)
    for indices in (torch.tensor([[0, 49, 3], [7, 7, 0]]), torch.tensor(5), torch.empty(2, 0, dtype=torch.int64)):
        y = KERNEL.op(*KERNEL.arguments(p, (indices,), packed, None))
        assert torch.equal(y, embedding(indices, dequantize(codes, qparams, dtype)))


@pytest.mark.parametrize(
    ("spec", "words"),
    [("int8/tensor", "share scales"), ("nf4/g64/dq256", "not kept row by row"), ("lloyd4/g64", "levels")],
)
def test_tables_that_must_be_read_whole(spec: str, words: str) -> None:
    assert words in str(KERNEL.why_not(problem(spec)))


@torch.no_grad()
@pytest.mark.parametrize("family", variants(("llama", "gpt2"), quick=()))
def test_a_model_reads_its_embedding_by_rows(family: str) -> None:
    model, ids = build(family), tokens(2, 8)
    options = {"recipe": "int8+embeddings"}
    fast = torch.compile(model, backend="qcompile", options=options)
    y = fast(ids).logits
    slow = torch.compile(model, backend="qcompile", options=options | {"lower": False})(ids).logits
    assert float((y - slow).norm() / slow.norm()) < 1e-2
    sites = {site.name: site for site in qcompile.report(fast).sites}
    tables = [site for name, site in sites.items() if isinstance(model.get_submodule(name), nn.Embedding)]
    assert tables
    assert {site.kernel for site in tables} == {"embedding"}


@torch.no_grad()
def test_the_table_is_freed() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(300, 32), nn.Linear(32, 32)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(self.table(ids))

    model, ids = Words(), torch.tensor([[1, 299, 4]])
    fast = torch.compile(model, backend="qcompile", options={"recipe": "int8+embeddings", "free_weights": True})
    first = fast(ids)
    assert model.table.weight.isnan().all()
    assert torch.equal(fast(ids), first)
