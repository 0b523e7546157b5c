"""A written file is whole or not there, and no file that something else needs is ever replaced."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from qcompile.backends.onnx import files
from qcompile.backends.onnx.files import read_model, strip_sources, write_model
from qcompile.errors import ModelError
from tests.onnx.files import WEIGHT, external, matmul, model, save, snapshot, weight

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def run(path: Path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def big(scale: float = 1.0) -> ir.Model:
    """y = x @ w, then through a weight that is large enough for a data file."""
    wide = np.full((4, 400), scale, np.float32)
    nodes = [matmul(outputs=["z"]), matmul(inputs=["z", "v"], name="wide")]
    return ir.from_proto(model(nodes, [weight(), weight("v", wide)]))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with external data, in a folder of its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    return save(model(initializers=[external("w.bin")]), folder / "m.onnx")


def test_what_is_written_runs_and_is_read_back(tmp_path: Path) -> None:
    write_model(ir.from_proto(model()), tmp_path / "out.onnx")
    assert list(snapshot(tmp_path)) == ["out.onnx"]
    np.testing.assert_allclose(run(tmp_path / "out.onnx"), X @ WEIGHT, rtol=1e-6)
    np.testing.assert_array_equal(read_model(tmp_path / "out.onnx").graph.initializers["w"].const_value.numpy(), WEIGHT)


def test_external_data_is_taken_in_and_the_source_stays(source: Path, tmp_path: Path) -> None:
    before = snapshot(source.parent)
    read = read_model(source)
    write_model(read, tmp_path / "out.onnx", source=source)
    assert snapshot(source.parent) == before
    # the model still reads its own data, and the file needs none
    assert isinstance(read.graph.initializers["w"].const_value, ir.ExternalTensor)
    (tmp_path / "alone").mkdir()
    os.replace(tmp_path / "out.onnx", tmp_path / "alone" / "out.onnx")
    np.testing.assert_allclose(run(tmp_path / "alone" / "out.onnx"), X @ WEIGHT, rtol=1e-6)


def test_an_external_attribute_is_taken_in(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "w.bin").write_bytes(WEIGHT.tobytes())
    constant = helper.make_node("Constant", [], ["w"], value=external("w.bin"))
    source = save(model([constant, matmul()], []), tmp_path / "in" / "m.onnx")
    write_model(read_model(source), tmp_path / "out.onnx", source=source)
    np.testing.assert_allclose(run(tmp_path / "out.onnx"), X @ WEIGHT, rtol=1e-6)


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT2", "FLOAT4E2M1", "FLOAT8E4M3FN", "BFLOAT16", "BOOL", "INT64"])
def test_every_type_keeps_its_bytes(tmp_path: Path, kind: str) -> None:
    number = getattr(onnx.TensorProto, kind)
    values = (np.arange(9) % 2).astype(helper.tensor_dtype_to_np_dtype(number)).reshape(3, 3)
    tensor = numpy_helper.from_array(values, "odd")
    assert tensor.data_type == number
    (tmp_path / "odd.bin").write_bytes(tensor.raw_data)
    outside = external("odd.bin", length=len(tensor.raw_data), shape=(3, 3))
    outside.name, outside.data_type = "odd", number
    keep = helper.make_node("Identity", ["odd"], ["kept"])
    source = save(model([matmul(), keep], [weight(), outside], opset=25, ir_version=13), tmp_path / "m.onnx")
    write_model(read_model(source), tmp_path / "out.onnx", source=source)
    written = onnx.load(tmp_path / "out.onnx")
    assert next(t for t in written.graph.initializer if t.name == "odd").raw_data == tensor.raw_data


def test_data_goes_to_a_file_where_asked_for(tmp_path: Path) -> None:
    write_model(big(), tmp_path / "out.onnx", external=True)
    assert sorted(snapshot(tmp_path)) == ["out.onnx", "out.onnx.data"]
    assert (tmp_path / "out.onnx.data").stat().st_size == 6400
    np.testing.assert_allclose(run(tmp_path / "out.onnx")[:, 0], (X @ WEIGHT).sum(1), rtol=1e-5)
    read_model(tmp_path / "out.onnx")


def test_data_goes_to_a_file_where_one_file_cannot_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LIMIT", files._ROOM + 6000)
    write_model(big(), tmp_path / "out.onnx")
    assert sorted(snapshot(tmp_path)) == ["out.onnx", "out.onnx.data"]
    with pytest.raises(ModelError, match=r"6464 bytes, more than one \.onnx file can hold"):
        write_model(big(), tmp_path / "one.onnx", external=False)
    assert sorted(snapshot(tmp_path)) == ["out.onnx", "out.onnx.data"]


@pytest.mark.slow
def test_a_model_over_two_gigabytes_is_written_with_little_memory(tmp_path: Path) -> None:
    n = 24_000
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(n * n * 4)
    proto = model(initializers=[external("w.bin", length=n * n * 4, shape=(n, n))])
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = n
    source = save(proto, tmp_path / "m.onnx")
    write_model(read_model(source), tmp_path / "out.onnx", source=source)
    assert (tmp_path / "out.onnx.data").stat().st_size == n * n * 4
    assert (tmp_path / "out.onnx").stat().st_size < 1000
    read_model(tmp_path / "out.onnx")


def test_writing_again_replaces_both_files_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    for i in range(4):
        write_model(big(i), path, external=True)
        assert len(snapshot(tmp_path)) == 2
        np.testing.assert_allclose(run(path)[:, 0], (X @ WEIGHT).sum(1) * i, rtol=1e-5, atol=1e-6)
    write_model(big(), path)
    assert list(snapshot(tmp_path)) == ["out.onnx"]


def test_a_stranger_with_the_data_s_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.onnx.data").write_bytes(b"mine")
    write_model(big(), tmp_path / "out.onnx", external=True)
    assert (tmp_path / "out.onnx.data").read_bytes() == b"mine"
    assert sorted(snapshot(tmp_path)) == ["out.onnx", "out.onnx.1.data", "out.onnx.data"]
    np.testing.assert_allclose(run(tmp_path / "out.onnx")[:, 0], (X @ WEIGHT).sum(1), rtol=1e-5)


def test_a_file_that_is_no_model_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"\xff\xff no model")
    write_model(ir.from_proto(model()), tmp_path / "out.onnx")
    read_model(tmp_path / "out.onnx")


def same(source: Path) -> Path:
    return source


def roundabout(source: Path) -> Path:
    return source.parent / ".." / source.parent.name / source.name


def symlinked(source: Path) -> Path:
    (source.parent / "link.onnx").symlink_to(source)
    return source.parent / "link.onnx"


def hard_linked(source: Path) -> Path:
    os.link(source, source.parent / "hard.onnx")
    return source.parent / "hard.onnx"


def linked_folder(source: Path) -> Path:
    (source.parent.parent / "linked").symlink_to(source.parent)
    return source.parent.parent / "linked" / source.name


def its_data(source: Path) -> Path:
    return source.parent / "w.bin"


@pytest.mark.parametrize("target", [same, roundabout, symlinked, hard_linked, linked_folder, its_data])
@pytest.mark.parametrize("told", [True, False])
def test_the_source_is_never_overwritten(source: Path, target: Callable[[Path], Path], told: bool) -> None:
    read = read_model(source)
    path = target(source)
    before = snapshot(source.parent)
    # not told of it, the model still knows whose data it reads
    with pytest.raises(ModelError, match=r"choose another name|is a link to"):
        write_model(read, path, source=source if told else None)
    assert snapshot(source.parent) == before


def test_the_source_is_kept_though_the_model_no_longer_reads_its_data(source: Path) -> None:
    before = snapshot(source.parent)
    for path in (source, source.parent / "w.bin"):
        with pytest.raises(ModelError, match="choose another name"):
            write_model(ir.from_proto(model()), path, source=source)
    assert snapshot(source.parent) == before


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "to.onnx").symlink_to(tmp_path / "other.onnx")
    for path, part in (
        (tmp_path / "none" / "out.onnx", "there is no folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "to.onnx", "is a link to"),
    ):
        with pytest.raises(ModelError, match=part):
            write_model(ir.from_proto(model()), path)
    assert snapshot(tmp_path) == {}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [full, interrupted])
@pytest.mark.parametrize("moment", ["save", "first replace", "second replace", "data written"])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("to_file", [True, False])
def test_a_write_that_fails_leaves_all_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[..., None],
    moment: str,
    old: bool,
    to_file: bool,
) -> None:
    path = tmp_path / "out.onnx"
    if old:
        write_model(big(3.0), path, external=to_file)
    before = snapshot(tmp_path)
    replace, calls = os.replace, 0

    def counted(a: Any, b: Any) -> None:
        nonlocal calls
        # onnx_ir, too, replaces a file of its own, within the folder of temporary files
        calls += Path(b).parent == tmp_path
        if Path(b).parent == tmp_path and calls == (2 if moment == "second replace" and to_file else 1):
            failure()
        replace(a, b)

    if moment == "save":
        monkeypatch.setattr(ir, "save", failure)
    elif moment == "data written":
        monkeypatch.setattr(onnx, "save", failure)
    else:
        monkeypatch.setattr(os, "replace", counted)
    with pytest.raises(KeyboardInterrupt if failure is interrupted else ModelError):
        write_model(big(5.0), path, external=to_file)
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    if old:
        np.testing.assert_allclose(run(path)[:, 0], (X @ WEIGHT).sum(1) * 3, rtol=1e-5)


def test_data_that_is_gone_stops_the_write(source: Path, tmp_path: Path) -> None:
    read = read_model(source)
    (source.parent / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"cannot write .*out\.onnx"):
        write_model(read, tmp_path / "out.onnx", source=source)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_local_paths_are_not_written(tmp_path: Path) -> None:
    path = "home/someone/project/net.py"
    made = ir.from_proto(model())
    node = made.graph.node(0)
    node.metadata_props["pkg.torch.onnx.stack_trace"] = f'File "/{path}", line 3, in forward'
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'encoder.fc', 'linear']"
    node.doc_string = f"/{path}(3): forward"
    node.outputs[0].metadata_props["seen"] = f"at /{path}:3"
    made.doc_string = "a model of y = x @ w"
    write_model(made, tmp_path / "out.onnx")
    data = (tmp_path / "out.onnx").read_bytes()
    assert b"someone" not in data
    assert b"encoder.fc" in data
    assert b"a model of" in data
    # the model in memory is as it was
    assert len(node.metadata_props) == 2
    assert strip_sources(made) == 3
    assert dict(node.metadata_props) == {"pkg.torch.onnx.name_scopes": "['', 'encoder.fc', 'linear']"}
