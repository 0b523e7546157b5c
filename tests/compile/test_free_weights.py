"""free_weights=True: the float weights go, the packs stay, and what still needs them says so."""

import gc

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import quantized
from qcompile.numerics import dequantize, fake_quantize, find_qparams, quantize, snr_db
from qcompile.packing import packed_length
from qcompile.recipe import Recipe, Rule
from qcompile.spec import parse_spec
from tests.families import build, tokens
from tests.variants import variants

pytestmark = pytest.mark.usefixtures("graphs_only")


def live_sizes(dtype: torch.dtype) -> list[int]:
    """Bytes of each living storage of tensors of that dtype with at least 1024 elements."""
    gc.collect()
    storages = {}
    for o in gc.get_objects():
        if issubclass(type(o), Tensor) and type(o).__name__ in ("Tensor", "Parameter") and o.dtype is dtype:
            storage = o.untyped_storage()
            if o.layout is torch.strided and not o.is_meta and storage.nbytes() >= 1024:
                storages[storage.data_ptr()] = storage.nbytes()
    return list(storages.values())


def live_bytes(dtype: torch.dtype) -> int:
    return sum(live_sizes(dtype))


def freed(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, backend="qcompile", options={"free_weights": True, **options})


@pytest.mark.parametrize("recipe", variants(("int8", "int4-weight", "nf4"), quick=("int8",)))
def test_memory_drops_to_the_packed_size(recipe: str) -> None:
    model, ids = build("llama"), tokens(2, 8)
    torch.manual_seed(0)
    before = live_bytes(torch.float32)
    linears = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear) and m.weight.nbytes >= 1024)
    fast = freed(model, recipe=recipe)
    first = fast(ids).logits
    report = qcompile.report(fast)
    after = live_bytes(torch.float32)
    # scales are float32 too, and small
    assert before - after > 0.85 * linears
    packed = sum(site.bytes_after for site in report.sites if site.weight)
    assert packed < 0.45 * linears
    # a second shape compiles again, from the packs alone
    torch.testing.assert_close(fast(ids[:, :5]).logits, first[:, :5], atol=2e-2, rtol=0)
    assert live_bytes(torch.float32) <= after + 4096
    assert torch.equal(fast(ids).logits, first)


def test_weights_are_packed_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    width = 384
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(6)))
    codes = []

    def counted(*args: object) -> float:
        codes.append(live_sizes(torch.uint8).count(width * width))
        return snr_db(*args)

    monkeypatch.setattr(quantized, "snr_db", counted)
    freed(model, recipe="int4-weight")(torch.randn(3, width))
    assert codes == [1] * 6


def test_a_weight_that_is_also_read_in_float_is_kept() -> None:
    model, ids = build("gpt2"), tokens(2, 8)
    fast = freed(model)
    fast(ids)
    assert model.transformer.wte.weight.isfinite().all()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.h[0].mlp.c_fc.weight.isnan().all()


def test_misuse_gives_nan_or_an_error_that_says_what_to_do() -> None:
    model, ids = build("llama"), tokens(2, 8)
    freed(model)(ids)
    assert model(ids).logits.isnan().all()
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?s)WeightError.*was freed by free_weights=True.*load it again"):
        torch.compile(model, backend="qcompile", options={"recipe": "int8-weight"})(ids)


def test_loading_again_brings_the_model_back() -> None:
    model, ids = build("llama"), tokens(2, 8)
    fast = freed(model)
    first = fast(ids).logits
    model.load_state_dict(build("llama").state_dict(), assign=True)
    torch.testing.assert_close(fast(ids).logits, first)
    assert model.model.layers[0].mlp.up_proj.weight.isnan().all()


FLOATS = [f"e{e}m{m}" for e in range(1, 8) for m in range(7) if 2 <= e + m <= 7]


@pytest.mark.parametrize("given", [None, "int8/token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_float_of_3_to_8_bits_is_stored_in_its_bits_and_multiplied(given: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    N, K = 24, 40
    model = nn.ModuleDict({name: nn.Linear(K, N) for name in FLOATS}).to(dtype).eval()
    weights = {name: linear.weight.detach().clone() for name, linear in model.items()}
    x = torch.randn(5, K).to(dtype)
    spec = None if given is None else parse_spec(given)
    rules = tuple(Rule(match=f"*{name}", weight=parse_spec(f"{name}/channel"), input=spec) for name in FLOATS)

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = model

        def forward(self, x: Tensor) -> list[Tensor]:
            return [linear(x) for linear in self.linears.values()]

    fast = freed(All(), recipe=Recipe(name="all", rules=rules))
    results = fast(x)
    seen = (x if spec is None else fake_quantize(x, spec)).double()
    sites = {site.name.split(".")[-1]: site for site in qcompile.report(fast).sites}
    for y, name in zip(results, FLOATS, strict=True):
        qparams = find_qparams(weights[name].float(), parse_spec(f"{name}/channel"))
        weight = dequantize(quantize(weights[name].float(), qparams), qparams).double()
        # the sum and, on the way, the weight are each rounded to the dtype
        size = seen.abs() @ weight.abs().T + model[name].bias.double().abs()
        assert (
            (y.double() - seen @ weight.T - model[name].bias.double()).abs() <= 4 * size * torch.finfo(dtype).eps
        ).all()
        assert model[name].weight.isnan().all()
        one_byte = sites[name].kernel == "lifted"
        assert one_byte or sites[name].kernel == "packed"
        assert not (one_byte and given is None)
        bits = 8 if one_byte else qparams.spec.format.bits
        sums = 4 * N if one_byte else 0
        assert sites[name].bytes_after == N * packed_length(K, bits) + 4 * N + sums
