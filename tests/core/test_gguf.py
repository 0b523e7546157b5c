"""GGUF files that the package gguf writes are read, and those that are written it reads."""

import pytest
import torch
from torch import nn

import qcompile
from qcompile import artifact
from qcompile.errors import PlanError, SpecError, UnsupportedError
from qcompile.ggml import TYPES
from qcompile.graph import Op
from qcompile.numerics import dequantize, quantize
from qcompile.plan import Decision, Plan
from qcompile.presets import parse_recipe
from qcompile.solvers import SOLVERS

library = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")
np = pytest.importorskip("numpy")
files = pytest.importorskip("qcompile.gguf")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 256)
        self.first = nn.Linear(256, 512)
        self.norm = nn.LayerNorm(512)
        self.second = nn.Linear(512, 256, bias=False)
        self.head = nn.Linear(256, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(x + self.second(torch.relu(self.norm(self.first(x)))))


def blocks(name: str, rows: int, columns: int) -> np.ndarray:
    """Random blocks of finite numbers."""
    kind = TYPES[name]
    data = torch.randint(0, 256, (rows, columns // kind.elements, kind.size), dtype=torch.uint8)
    at = 0
    for field, count in kind.fields:
        if field in ("d", "m"):
            half = (torch.rand(rows, columns // kind.elements) * 1e-3).half()
            data[..., at : at + count] = half[..., None].view(torch.uint8)
        at += count
    return data.flatten(1).numpy()


def write(path, arrays: dict) -> None:
    writer = library.GGUFWriter(path, "qcompile")
    for name, (array, kind) in arrays.items():
        writer.add_tensor(name, array, raw_dtype=None if kind is None else library.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def arrays(first: str, second: str, embed: str) -> dict:
    floats = np.random.default_rng().standard_normal
    return {
        "embed.weight": (blocks(embed, 50, 256), embed),
        "first.weight": (blocks(first, 512, 256), first),
        "first.bias": (floats(512, np.float32), None),
        "norm.weight": (floats(512, np.float32), None),
        "norm.bias": (floats(512, np.float32).astype(np.float16), None),
        "second.weight": (blocks(second, 256, 512), second),
    }


@pytest.mark.parametrize(
    ("first", "second", "embed"),
    [("Q4_K", "Q6_K", "Q8_0"), ("Q2_K", "Q3_K", "Q5_1"), ("Q4_0", "Q4_1", "Q6_K"), ("Q5_K", "Q5_0", "IQ4_NL")],
)
def test_a_file_of_the_other_library_runs_without_quantizing_anew(tmp_path, first, second, embed):
    given = arrays(first, second, embed)
    write(tmp_path / "net.gguf", given)
    model = Net()
    plan = files.load_gguf(tmp_path / "net.gguf", model)
    for name, (array, kind) in given.items():
        expected = array if kind is None else quants.dequantize(array, library.GGMLQuantizationType[kind])
        assert torch.equal(model.get_parameter(name), torch.from_numpy(expected.astype(np.float32)))
    assert {name: str(d.weight) for name, d in plan.decisions.items()} == {
        "embed": str(TYPES[embed].spec),
        "first": str(TYPES[first].spec),
        "second": str(TYPES[second].spec),
        "head": str(TYPES[embed].spec),
    }
    tokens = torch.randint(0, 50, (3, 7))
    expected = model(tokens)
    for lower in (True, False):
        fast = torch.compile(model, backend="qcompile", options={"plan": plan, "lower": lower})
        with torch.no_grad():
            torch.testing.assert_close(fast(tokens), expected, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()


def test_a_plan_of_a_file_is_saved_and_loaded(tmp_path):
    write(tmp_path / "net.gguf", arrays("Q4_K", "Q3_K", "Q6_K"))
    model = Net()
    plan = files.load_gguf(tmp_path / "net.gguf", model)
    artifact.save(plan, tmp_path / "plan")
    again = artifact.load(tmp_path / "plan", model)
    assert again == plan
    weight = model.first.weight.detach()
    qparams = again.decisions["first"].qparams_of(weight)
    assert torch.equal(dequantize(quantize(weight, qparams), qparams), weight)


@pytest.mark.parametrize("name", TYPES)
def test_the_other_library_reads_what_is_written(tmp_path, name):
    model = Net()
    spec = TYPES[name].spec
    solver = "round" if spec.scale == "e8m0" else "kquant"
    shapes = {"first": (512, 256), "second": (256, 512), "embed": (50, 256)}
    decisions = {
        site: Decision(name=site, op=Op.LINEAR, shape=shape, weight=spec, solver=solver)
        for site, shape in shapes.items()
    }
    plan = Plan(recipe=parse_recipe({"rules": [{"weight": str(spec)}]}), decisions=decisions).bind(model)
    files.save_gguf(plan, model, tmp_path / "net.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["net.gguf"]
    tensors = {one.name: one for one in library.GGUFReader(tmp_path / "net.gguf").tensors}
    assert set(tensors) == {"embed.weight", "first.weight", "first.bias", "norm.weight", "norm.bias", "second.weight"}
    for site in shapes:
        found = tensors[f"{site}.weight"]
        assert found.tensor_type.name == name
        weight = model.get_parameter(f"{site}.weight").detach()
        qparams = SOLVERS[solver](weight, spec)
        expected = dequantize(quantize(weight, qparams), qparams)
        assert torch.equal(torch.from_numpy(quants.dequantize(found.data, found.tensor_type)), expected)
    # and what it wrote is read back
    other = Net()
    again = files.load_gguf(tmp_path / "net.gguf", other)
    assert {d.weight for d in again.decisions.values()} == {spec}
    assert torch.equal(other.first.bias, model.first.bias)


def test_load_reads_files_of_the_other_library(tmp_path):
    write(tmp_path / "net.gguf", arrays("Q4_K", "Q6_K", "Q8_0"))
    model, other = Net(), Net()
    plan = qcompile.load(tmp_path / "net.gguf", model)
    assert plan == files.load_gguf(tmp_path / "net.gguf", other)
    assert torch.equal(model.second.weight, other.second.weight)
    compiled = torch.compile(Net(), backend="qcompile")
    assert qcompile.load(tmp_path / "net.gguf", compiled) == plan


def test_a_model_that_a_file_does_not_fit_is_as_it_was(tmp_path):
    given = arrays("Q4_K", "Q6_K", "Q8_0")
    write(tmp_path / "net.gguf", given | {"second.weight": (blocks("Q6_K", 256, 256), "Q6_K")})
    model = Net()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PlanError, match="in the file"):
        qcompile.load(tmp_path / "net.gguf", model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(PlanError, match="not on meta"):
        qcompile.load(tmp_path / "net.gguf", empty)
    with pytest.raises(PlanError, match="go into a model: give one"):
        qcompile.load(tmp_path / "net.gguf")


def test_what_does_not_fit_is_refused(tmp_path):
    given = arrays("Q4_K", "Q6_K", "Q8_0")
    path = tmp_path / "net.gguf"
    write(path, {name: array for name, array in given.items() if name != "second.weight"})
    with pytest.raises(PlanError, match=r"has no tensor for 'second.weight' \(nearest: .*'first.weight'"):
        files.load_gguf(path, Net())
    write(path, given | {"third.weight": given["second.weight"]})
    with pytest.raises(PlanError, match=r"has a tensor .third.weight. that the model lacks"):
        files.load_gguf(path, Net())
    write(path, given | {"second.weight": (blocks("Q6_K", 256, 256), "Q6_K")})
    with pytest.raises(PlanError, match=r"'second.weight' is \[256, 512\] in the model and \[256, 256\] in the file"):
        files.load_gguf(path, Net())
    odd = np.zeros((256, 512 // 256 * 50), dtype=np.uint8)
    write(path, given | {"second.weight": (odd, "IQ1_S")})
    with pytest.raises(SpecError, match=r"'second.weight': blocks of type 'IQ1_S' are not read"):
        files.load_gguf(path, Net())
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(PlanError, match="is no GGUF file"):
        files.load_gguf(path, Net())
    with pytest.raises(PlanError, match="is no GGUF file"):
        files.load_gguf(tmp_path / "missing.gguf", Net())
    writer = library.GGUFWriter(path, "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="architecture 'gemma' may not be those of a torch model"):
        files.load_gguf(path, Net())


def test_one_parameter_takes_no_two_tensors_that_differ(tmp_path):
    given, path, model = arrays("Q4_K", "Q6_K", "Q8_0"), tmp_path / "net.gguf", Net()
    # a tensor is one with itself, NaN too
    given["norm.bias"][0][3] = np.nan
    write(path, given | {"head.weight": given["embed.weight"]})
    assert files.load_gguf(path, model).decisions.keys() >= {"embed", "head"}
    before = model.embed.weight.clone()
    write(path, given | {"head.weight": (blocks("Q6_K", 50, 256), "Q6_K")})
    with pytest.raises(PlanError, match=r"'embed.weight' and 'head.weight' are one parameter .* without tying them"):
        files.load_gguf(path, model)
    assert torch.equal(before, model.embed.weight)


@pytest.mark.parametrize(
    ("table", "head", "said"),
    [("Q6_K", "Q4_K", "it is written as int6"), (None, "Q4_K", "it is written as float"), ("Q4_K", "Q4_K", None)],
)
def test_a_tied_head_is_written_as_the_table_and_that_is_said(tmp_path, caplog, table, head, said):
    torch.manual_seed(0)
    model, path = Net().eval(), tmp_path / "net.gguf"
    given = {"embed": (Op.EMBEDDING, table), "head": (Op.LINEAR, head)}
    decisions = {
        name: Decision(name=name, op=op, shape=(50, 256), weight=kind and TYPES[kind].spec, solver="kquant")
        for name, (op, kind) in given.items()
    }
    plan = Plan(recipe=parse_recipe("int8"), decisions=decisions)
    files.save_gguf(plan, model, path)
    kinds = {one.name: one.tensor_type.name for one in library.GGUFReader(path).tensors}
    assert kinds["embed.weight"] == (table or "F32")
    assert "head.weight" not in kinds
    if said is None:
        assert caplog.messages == []
    else:
        (message,) = caplog.messages
        assert message.startswith(f"'head' shares the weight of 'embed', and files hold it once: {said}")
        assert message.endswith(f"not as {TYPES[head].spec}; give both one spec")


def llama(**more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        }
        | more
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_llamas_are_named_and_ordered_as_by_llama_cpp(tmp_path, tied):
    model, path = llama(tie_word_embeddings=tied), tmp_path / "llama.gguf"
    plan = Plan(recipe=parse_recipe("int8"), decisions={})
    files.save_gguf(plan, model, path, architecture="llama")
    tensors = {one.name: one for one in library.GGUFReader(path).tensors}
    assert "blk.1.ffn_down.weight" in tensors
    assert ("output.weight" in tensors) is not tied
    # convert_hf_to_gguf.py, LlamaModel.permute
    weight, heads = model.model.layers[1].self_attn.k_proj.weight, 4
    permuted = weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    assert torch.equal(torch.from_numpy(np.array(tensors["blk.1.attn_k.weight"].data)), permuted)
    other = llama(tie_word_embeddings=tied)
    for parameter in other.parameters():
        parameter.data.zero_()
    files.load_gguf(path, other)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_transformers_reads_what_is_written(tmp_path):
    reading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    model, path = llama(), tmp_path / "llama.gguf"
    decisions = {
        name: Decision(
            name=name,
            op=Op.LINEAR,
            shape=tuple(module.weight.shape),
            weight=TYPES["Q6_K" if "down" in name else "Q4_K"].spec,
            solver="kquant",
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    plan = Plan(recipe=parse_recipe("int8"), decisions=decisions).bind(model)
    files.save_gguf(plan, model, path, architecture="llama")
    theirs = reading.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    ours = llama()
    assert len(files.load_gguf(path, ours).decisions) == len(decisions)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    config = reading.load_gguf_checkpoint(str(path))["config"]
    assert config["rope_theta"] == pytest.approx(model.config.rope_parameters["rope_theta"])


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
@pytest.mark.parametrize("solver", ["round", "kquant"])
def test_ranges_far_from_zero_err_no_more_than_the_librarys(name: str, solver: str) -> None:
    x = torch.rand(4, 512, generator=torch.Generator().manual_seed(0)) + 5
    spec = TYPES[name].spec
    qparams = SOLVERS[solver](x, spec)
    kind = library.GGMLQuantizationType[name]
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(x.numpy(), kind), kind))
    ours = dequantize(quantize(x, qparams), qparams)
    assert (ours - x).norm() <= 1.01 * (theirs - x).norm()
