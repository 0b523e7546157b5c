"""Checkpoints of others run as they are, and what is written for others is what they load."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompile
from qcompile.errors import PlanError, UnsupportedError
from qcompile.numerics import dequantize
from tests.core.test_readers import along_n, expected, fields, integers, interleaved
from tests.families import build, tokens
from tests.variants import variants

pytestmark = pytest.mark.usefixtures("graphs_only")
GROUP = 32


def gptq_tensors(N: int, K: int, bits: int, ordered: bool) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, zero = integers(N, K, GROUP, bits)
    scale = scale / 8
    groups = torch.arange(K) // GROUP
    groups = groups[torch.randperm(K)] if ordered else groups
    tensors = {
        "qweight": fields(codes.t(), bits),
        "qzeros": along_n(zero, bits, "gptq"),
        "scales": scale.t().contiguous(),
        "g_idx": groups.int(),
    }
    return tensors, expected(codes, scale, zero, groups)


def awq_tensors(N: int, K: int, bits: int, ordered: bool) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, zero = integers(N, K, GROUP, bits)
    scale = scale / 8
    tensors = {"qweight": interleaved(codes.t()), "qzeros": interleaved(zero.t()), "scales": scale.t().contiguous()}
    return tensors, expected(codes, scale, zero, torch.arange(K) // GROUP)


def checkpoint(model: nn.Module, folder: Path, method: str, bits: int = 4, ordered: bool = False) -> None:
    """Writes a checkpoint in two files, of random weights that the model gets, too."""
    make = {"gptq": gptq_tensors, "awq": awq_tensors}[method]
    tensors = dict(model.state_dict())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for name, linear in linears.items():
        held, values = make(*linear.weight.shape, bits, ordered)
        with torch.no_grad():
            linear.weight.copy_(values)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in held.items()}
    folder.mkdir()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file({name: tensor.clone() for name, tensor in half.items()}, folder / f"part{i}.safetensors")
    index = {"weight_map": {name: f"part{i}.safetensors" for i, half in enumerate(halves) for name in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"quant_method": method, "bits": bits, "group_size": GROUP, "desc_act": ordered, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


def fresh() -> nn.Module:
    torch.manual_seed(99)
    return build("llama")


@pytest.mark.parametrize(
    ("method", "bits", "ordered"),
    variants((("gptq", 4, False), ("gptq", 3, True), ("awq", 4, False)), quick=(("gptq", 3, True),)),
)
def test_a_checkpoint_runs_as_it_is(method: str, bits: int, ordered: bool, tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(2, 9)
    checkpoint(model, tmp_path / "c", method, bits, ordered)
    other = fresh()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    plan = qcompile.load(tmp_path / "c", other)
    fast = torch.compile(other, backend="qcompile", options={"plan": plan})
    # sums of the same products, in another order
    torch.testing.assert_close(fast(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    report = {site.name: site for site in qcompile.report(fast).sites}
    assert report["model.layers.0.mlp.up_proj"].weight == f"int{bits}/g{GROUP}/asym/fp16"
    assert report["lm_head"].reason == "not in the plan"
    # from now on in our own layout
    qcompile.save(fast, tmp_path / "m")
    third = fresh()
    again = torch.compile(third, backend="qcompile", options={"plan": qcompile.load(tmp_path / "m", third)})
    assert torch.equal(again(ids).logits, fast(ids).logits)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint(build("llama"), tmp_path / "c", "gptq")
    with pytest.raises(PlanError, match=r"the model has 'transformer\.w[tp]e\.weight' .* which .* does not hold"):
        qcompile.load(tmp_path / "c", build("gpt2"))
    with torch.device("meta"):
        empty = fresh()
    with pytest.raises(PlanError, match=r"inv_freq.*build the model with its buffers, outside of torch\.device"):
        qcompile.load(tmp_path / "c", empty)
    (tmp_path / "c" / "part1.safetensors").unlink()
    with pytest.raises(PlanError, match=r"cannot read .*part1\.safetensors.*download the checkpoint again"):
        qcompile.load(tmp_path / "c", fresh())
    config = tmp_path / "c" / "config.json"
    config.write_text(json.dumps({"quantization_config": {"quant_method": "vptq"}}))
    with pytest.raises(UnsupportedError, match=r"quantized by 'vptq', which is not read; known: gptq, awq"):
        qcompile.load(tmp_path / "c", fresh())


def test_one_tensor_of_a_model_takes_no_two_that_differ(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
        model["head"].weight = model["table"].weight
        return model

    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    table, model = torch.rand(9, 4), tied()
    # a tensor is one with itself, NaN too
    bias = {"head.bias": torch.full((9,), torch.nan)}
    save_file({"table.weight": table, "head.weight": table.clone(), **bias}, tmp_path / "model.safetensors")
    assert qcompile.load(tmp_path, model).notes == ()
    assert torch.equal(model["head"].weight, table)
    save_file({"table.weight": table, "head.weight": table + 1, **bias}, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match=r"'table.weight' and 'head.weight' are one tensor .* without tying them"):
        qcompile.load(tmp_path, tied())


RECIPES = {
    "int4": {"weight": "int4/g32/asym/bf16", "solver": "hqq"},
    "int3": {"weight": "int3/g32"},
    "int8-asym": {"weight": "int8/channel/asym"},
    "w8a8": {"weight": "int8/channel", "input": "int8/token"},
    "w8a8-asym": {"weight": "int8/channel", "input": "int8/token/asym"},
    "fp8": {"weight": "fp8_e4m3/channel", "input": "fp8_e4m3/token"},
    "fp8-blocks": {"weight": "fp8_e4m3/b64x32"},
}


def written(rules: list[dict[str, Any]], folder: Path, family: str = "llama") -> tuple[Any, Tensor]:
    model, ids = build(family), tokens(2, 9)
    plan = qcompile.calibrate(model, [tokens(4, 16, seed=5)], {"rules": rules}, progress=False)
    fast = torch.compile(model, backend="qcompile", options={"plan": plan})
    y = fast(ids).logits
    qcompile.save(fast, folder, layout="compressed-tensors")
    return fast, y


def weights_of(fast: Any) -> dict[str, Tensor]:
    """What the plan of a saved model makes of its linears."""
    folder = Path(fast)
    plan = qcompile.readers.read_checkpoint(folder)[0]
    found = {}
    for name, decision in plan.decisions.items():
        assert decision.solved is not None
        qparams = decision.solved.qparams
        found[name] = dequantize(qparams.codes, qparams)
    return found


@pytest.mark.parametrize("name", variants(RECIPES, quick=("int8-asym",)))
def test_compressed_tensors_are_read_back(name: str, tmp_path: Path) -> None:
    fast, y = written([RECIPES[name]], tmp_path / "c")
    other = fresh()
    again = torch.compile(other, backend="qcompile", options={"plan": qcompile.load(tmp_path / "c", other)})
    assert torch.equal(again(tokens(2, 9)).logits, y)
    # scales take the dtype of a float32 model
    specs = [
        [(s.name, str(s.weight).removesuffix("/bf16"), s.input) for s in qcompile.report(m).sites]
        for m in (fast, again)
    ]
    assert specs[0] == specs[1]


@pytest.mark.parametrize("name", variants(RECIPES, quick=("int4",)))
def test_the_library_loads_the_same_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    written([{"match": "lm_head"}, RECIPES[name]], tmp_path / "c")
    ours = weights_of(tmp_path / "c")
    assert len(ours) == 14
    code = (
        "import sys, torch, transformers as hf\n"
        "from transformers.utils.quantization_config import CompressedTensorsConfig as C\n"
        "m = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=C(run_compressed=False))\n"
        "from safetensors.torch import save_file\n"
        "save_file({n: p.detach().clone() for n, p in m.state_dict().items()}, sys.argv[1] + '/theirs')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "c"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "c" / "theirs")
    for site, values in ours.items():
        assert torch.equal(theirs[f"{site}.weight"].float(), values), site
    for site, tensor in build("llama").state_dict().items():
        if site.removesuffix(".weight") not in ours:
            assert torch.equal(theirs[site], tensor)


def test_the_library_knows_the_groups_of_mixed_weights(tmp_path: Path) -> None:
    """Module by module, as transformers' loader takes one scheme for all that is dense."""
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    rules = [{"match": "*down_proj", "weight": "int8/channel"}, {"match": "lm_head"}, RECIPES["int4"]]
    written([*rules], tmp_path / "c")
    config = library.QuantizationConfig.model_validate(
        json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    )
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    held, ours = load_file(tmp_path / "c" / "model.safetensors"), weights_of(tmp_path / "c")
    assert schemes.keys() == ours.keys()
    for site, values in ours.items():
        state = {n.removeprefix(f"{site}."): t for n, t in held.items() if n.startswith(f"{site}.weight")}
        compressor = compressors.BaseCompressor.get_value_from_registry(schemes[site].format)
        assert torch.equal(compressor.decompress(state, schemes[site])["weight"].float(), values), site


@pytest.mark.slow
def test_smoothed_norms_are_written_as_they_became(tmp_path: Path) -> None:
    rule = {"weight": "int8/channel", "input": "int8/token", "smooth": 0.7}
    rules = [{"match": "*q_proj|*k_proj|*v_proj|*up_proj|*gate_proj", **rule}, {"weight": "int8/channel"}]
    _, y = written(rules, tmp_path / "c")
    held = load_file(tmp_path / "c" / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(held[norm], build("llama").state_dict()[norm])
    other = fresh()
    again = torch.compile(other, backend="qcompile", options={"plan": qcompile.load(tmp_path / "c", other)})
    assert torch.equal(again(tokens(2, 9)).logits, y)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"weight": "nf4/g64"}], r"'.*q_proj' cannot be written .* its weight is nf4/g64, which has no layout there"),
        ([{"weight": "int4/b32/min/fp16"}], r"its weight is int4/b32/min/fp16, which has no layout there"),
        ([{"weight": "int8/channel", "input": "int8/token", "threshold": 6.0}], r"its outliers are kept apart"),
        ([{"weight": "int8/channel", "input": "int8/tensor"}], r"its input is int8/tensor; known: int8/token"),
        ([{"ops": ["embedding"], "weight": "int8/channel"}], r"'model\.embed_tokens' .* it is an embedding"),
    ],
)
def test_what_has_no_place_there_is_refused(rules: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        written(rules, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_conv1d_is_refused_and_layouts_are_known(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'transformer\.h\.0\.attn\.c_attn' .* it is no torch\.nn\.Linear"):
        written([{"match": "transformer.*", "weight": "int8/channel"}], tmp_path / "c", "gpt2")
    with pytest.raises(qcompile.QcompileError, match="unknown layout 'gguf'"):
        qcompile.save(build("llama"), tmp_path / "c", layout="gguf")
