import pytest

from qcompile.backends.fx.names import frame_of, in_model, module_path
from qcompile.sites import op_path


@pytest.mark.parametrize(
    ("spelled", "path"),
    [
        ("L['self'].model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("L['self']", ""),
        ('G["model"].head', "head"),
        ("L['s']._modules['layers']._modules['0']._parameters['weight']", "layers.0.weight"),
        ("L['self'].layers[3].fc", "layers.3.fc"),
        ("L__self___layers", "layers"),
        ("layers.0.fc", "layers.0.fc"),
        ("", ""),
    ],
)
def test_module_path_is_dotted_and_relative_to_the_root(spelled, path):
    assert module_path(spelled) == path


@pytest.mark.parametrize(
    ("running", "weight", "name"),
    [
        ("layers.0.fc", "layers.0.fc.weight", "layers.0.fc"),
        ("attention", "attention.out_proj.weight", "attention.out_proj"),
        ("attention", "attention.in_proj_weight", "attention.in_proj_weight"),
        ("", "fc.weight", "fc"),
        ("", "w", "w"),
        ("lm_head", "embed_tokens.weight", "lm_head"),
        ("model.proj", "model.kernel", "model.proj"),
        ("layers.1", "layers.10.weight", "layers.1"),
        ("layers.0", None, "layers.0"),
    ],
)
def test_an_op_is_named_by_its_own_weight_or_else_by_the_module_that_runs_it(running, weight, name):
    assert op_path(running, weight) == name


@pytest.mark.parametrize(
    ("tensors", "path", "expected"),
    [
        ([("fc.weight", "fc.weight")], "fc", "fc"),
        # one layer was compiled
        ([("fc.weight", "layers.3.fc.weight"), ("w", "layers.3.w")], "act", "layers.3.act"),
        ([("fc.weight", "layers.3.fc.weight")], "", "layers.3"),
        # an object that holds the model
        ([("net.fc.weight", "fc.weight")], "net.act", "act"),
        ([("net.fc.weight", "fc.weight")], "net", ""),
        ([("net.fc.weight", "fc.weight")], "other", "other"),
        # a tied weight goes by another module's name
        ([("head.weight", "embed.weight")], "head", "head"),
        ([("lower.weight", "er.weight")], "lower", "lower"),
    ],
)
def test_paths_in_a_frame_become_paths_in_the_model(tensors, path, expected):
    assert in_model(path, frame_of(tensors)) == expected
