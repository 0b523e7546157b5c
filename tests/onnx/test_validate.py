"""Every bad file is refused with its place and a remedy, and is left as it was."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.backends.onnx.files import read_model
from qcompile.errors import ModelError
from tests.onnx.files import FLOAT, INT8, UINT8, WEIGHT, external, matmul, model, save, snapshot, weight

node = helper.make_node


def refused(path: Path, *parts: str, quantized: bool = False) -> str:
    """The message of the refusal; it has these parts, and nothing on disk changed."""
    before = snapshot(path.parent)
    with pytest.raises(ModelError) as caught:
        read_model(path, quantized=quantized)
    assert snapshot(path.parent) == before
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    return text


def test_a_sound_model_is_read(tmp_path: Path) -> None:
    read = read_model(save(model(), tmp_path / "m.onnx"))
    assert [n.op_type for n in read.graph] == ["MatMul"]
    np.testing.assert_array_equal(read.graph.initializers["w"].const_value.numpy(), WEIGHT)


GOOD = model().SerializeToString()


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "is empty"),
        (b"no protobuf at all \xff\xff", "is no ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is no ONNX model"),
        (bytes(100), "is no ONNX model"),
        (GOOD[: len(GOOD) // 2], "is no ONNX model"),
        (GOOD[:2], "holds no graph"),
    ],
)
def test_what_is_no_model(tmp_path: Path, data: bytes, part: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    refused(path, part, "m.onnx", "export or copy" if data else "empty")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for size in range(len(GOOD)):
        path.write_bytes(GOOD[:size])
        refused(path)


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "none.onnx", "No such file", "check the path")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "is a folder")


BROKEN: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]] = {
    "undefined input": (
        model([matmul(inputs=["x", "weight"])]),
        ("node 'mm' (MatMul)", "'weight'", "no input, initializer or result", "nearest names: 'w'"),
    ),
    "undefined input of a node without a name": (
        model([matmul(inputs=["x", "nope"], name="")]),
        ("the MatMul that makes 'y'", "'nope'"),
    ),
    "not sorted": (
        model([matmul(inputs=["z", "w"]), node("Relu", ["x"], ["z"], name="act")]),
        ("node 'mm' (MatMul) reads 'z' before node 'act' (Relu)", "topologically sorted"),
    ),
    "a node that reads itself": (model([matmul(inputs=["y", "w"])]), ("reads 'y' before node 'mm'",)),
    "output made twice": (
        model([matmul(), node("Relu", ["x"], ["y"], name="act")]),
        ("node 'act' (Relu) makes 'y'", "made once"),
    ),
    "output with an initializer's name": (
        model([node("Relu", ["x"], ["w"], name="act"), matmul()]),
        ("node 'act' (Relu) makes 'w'",),
    ),
    "two outputs of one name": (
        model([node("Split", ["x"], ["y", "y"], name="split", axis=0, num_outputs=2)]),
        ("node 'split' (Split) makes 'y'",),
    ),
    "initializer twice": (model(initializers=[weight(), weight()]), ("initializer 'w' stands twice",)),
    "graph output that nobody makes": (model([matmul(outputs=["z"])]), ("output 'y'", "'z'")),
    "unknown op": (
        model([matmul(op_type="MatMull")]),
        ("node 'mm' (MatMull) is no op of 'ai.onnx' at opset 21", "nearest names: 'MatMul'"),
    ),
    "op of a newer opset": (
        model([node("Swish", ["x"], ["y"], name="act")]),
        ("node 'act' (Swish)", "exists only after opset 21"),
    ),
    "domain that is not imported": (
        model([matmul(domain="acme")]),
        ("node 'mm' (MatMul) is of domain 'acme'", "does not import"),
    ),
    "domain that nobody knows": (
        model([matmul(domain="acme")], opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("acme", 1)]),
        ("node 'mm' (MatMul)", "unknown domain 'acme'", "com.microsoft"),
    ),
    "op that onnxruntime does not have": (
        model(
            [matmul(op_type="FusedMatMull", domain="com.microsoft")],
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ),
        ("no op of 'com.microsoft'", "'FusedMatMul'"),
    ),
    "opset 99": (model(opset=99), ("opset 99 of 'ai.onnx'", "known are 1 to", "export it at opset 21")),
    "opset 28": (model(opset=28), ("opset 28 of 'ai.onnx'", "known are 1 to 27")),
    "opset 0": (model(opset=0), ("opset 0 of 'ai.onnx'",)),
    "no opset": (model(opset_imports=[]), ("opset",)),
    "newest opset of another domain": (
        model(opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 99)]),
        ("opset 99 of 'ai.onnx.ml'", "known are 1 to 5"),
    ),
    "IR 99": (model(ir_version=99), ("IR version 99", f"known are 3 to {onnx.IR_VERSION}")),
    "shape mismatch": (
        model(initializers=[weight(values=np.ones((3, 4), np.float32))]),
        ("node 'mm' (MatMul)", "Incompatible dimensions", "'w' [3, 4]", "'x' ['B', 4]"),
    ),
    "attribute that is none": (model([matmul(bogus=3)]), ("Unrecognized attribute: bogus", "mm")),
    "too few inputs": (model([matmul(inputs=["x"])]), ("mm", "input size 1")),
    "unknown type": (
        model(initializers=[TensorProto(name="w", data_type=99, dims=[4, 4], raw_data=bytes(64))]),
        ("tensor 'w' [4, 4]", "unknown data type 99"),
    ),
    "negative size": (
        model(initializers=[TensorProto(name="w", data_type=FLOAT, dims=[-4, 4], raw_data=bytes(64))]),
        ("tensor 'w' [-4, 4]", "negative size"),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_graph(tmp_path: Path, case: str) -> None:
    proto, parts = BROKEN[case]
    refused(save(proto, tmp_path / "m.onnx"), *parts)


@pytest.mark.parametrize("size", [0, 60, 63, 65, 128])
def test_raw_data_of_a_wrong_size(tmp_path: Path, size: int) -> None:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[4, 4], raw_data=bytes(size))
    path = save(model(initializers=[tensor]), tmp_path / "m.onnx")
    refused(path, "tensor 'w' [4, 4] of FLOAT", f"{size} bytes", "needs 64")


def test_defects_within_a_subgraph(tmp_path: Path) -> None:
    def branch(*reads: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("z", FLOAT, ["B", None])
        return helper.make_graph([matmul(inputs=list(reads), outputs=["z"], name="within")], "g", [], [out])

    condition = numpy_helper.from_array(np.array(True), "c")

    def choice(*reads: str) -> onnx.ModelProto:
        chosen = node("If", ["c"], ["y"], name="if", then_branch=branch("x", "w"), else_branch=branch(*reads))
        return model([chosen], [weight(), condition])

    read_model(save(choice("x", "w"), tmp_path / "good.onnx"))
    refused(save(choice("x", "nope"), tmp_path / "m.onnx"), "node 'within' (MatMul)", "'nope'")
    bad = choice("x", "w")
    bad.graph.node[0].attribute[0].g.initializer.append(external("../w.bin"))
    bad.graph.node[0].attribute[0].g.initializer[0].name = "v"
    refused(save(bad, tmp_path / "m.onnx"), "tensor 'v'", "outside the model's folder")


def test_a_function_is_checked_and_may_be_called(tmp_path: Path) -> None:
    def with_body(body: onnx.NodeProto) -> onnx.ModelProto:
        imports = [helper.make_opsetid("", 21)]
        function = helper.make_function("own", "F", ["a"], ["b"], [body], imports)
        return model(
            [node("F", ["x"], ["y"], domain="own", name="call")],
            [],
            opset_imports=[*imports, helper.make_opsetid("own", 1)],
            functions=[function],
        )

    read_model(save(with_body(node("Relu", ["a"], ["b"])), tmp_path / "good.onnx"))
    refused(save(with_body(node("Relu", ["c"], ["b"])), tmp_path / "m.onnx"), "the Relu that makes 'b' reads 'c'")


def data(folder: Path, name: str = "w.bin") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(WEIGHT.tobytes())
    return path


def test_external_data_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data(tmp_path, "sub/w.bin")
    save(model(initializers=[external("sub/w.bin", length=None)]), tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    read = read_model("m.onnx")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(read.graph.initializers["w"].const_value.numpy(), WEIGHT)


def link(make: Callable[[Path, Path], None]) -> Callable[[Path], str]:
    def case(folder: Path) -> str:
        (folder.parent / "elsewhere").mkdir()
        make(data(folder.parent / "elsewhere"), folder / "w.bin")
        return "w.bin"

    return case


def linked_folder(folder: Path) -> str:
    data(folder.parent / "elsewhere")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    return "sub/w.bin"


OUTSIDE: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda folder: "w.bin", "is missing"),
    "parent": (lambda folder: f"../{data(folder.parent).name}", "outside the model's folder"),
    "parent behind a folder": (lambda folder: f"sub/../../{data(folder.parent).name}", "outside the model's folder"),
    "absolute": (lambda folder: str(data(folder)), "outside the model's folder"),
    "no location": (lambda folder: "", "outside the model's folder"),
    "symlink": (link(lambda file, name: name.symlink_to(file)), "is a link or no file"),
    "dangling symlink": (link(lambda file, name: name.symlink_to("nothing")), "is a link or no file"),
    "hard link": (link(lambda file, name: os.link(file, name)), "is a link or no file"),
    "linked folder": (linked_folder, "is a link or no file"),
    "folder": (lambda folder: str((folder / "w.bin").mkdir() or "w.bin"), "is a link or no file"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_external_data_that_is_not_a_file_of_the_folder(tmp_path: Path, case: str) -> None:
    place, part = OUTSIDE[case]
    folder = tmp_path / "model"
    folder.mkdir()
    path = save(model(initializers=[external(place(folder))]), folder / "m.onnx")
    refused(path, "tensor 'w' [4, 4]", part)


@pytest.mark.parametrize(("offset", "length"), [(1, 64), (64, 64), (0, 63), (0, 65), (-4, 64), (0, None)])
def test_external_data_of_a_wrong_size(tmp_path: Path, offset: int, length: int | None) -> None:
    data(tmp_path).write_bytes(bytes(64 if length else 63))
    path = save(model(initializers=[external("w.bin", offset=offset, length=length)]), tmp_path / "m.onnx")
    refused(path, "tensor 'w' [4, 4]", "'w.bin'", "bytes")


def test_a_model_of_three_gigabytes_opens_at_once(tmp_path: Path) -> None:
    n = 28_000
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(n * n * 4)  # a hole, which takes no place on disk
    tensor = external("w.bin", length=n * n * 4, shape=(n, n))
    proto = model(initializers=[tensor])
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = n
    path = save(proto, tmp_path / "m.onnx")
    read_model(path)
    before, start = resident(), time.perf_counter()
    read = read_model(path)
    # reading it takes seconds and 3 GB
    assert time.perf_counter() - start < 1.0
    assert resident() - before < 2**25
    assert read.graph.initializers["w"].const_value.nbytes == n * n * 4


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def dequantized(
    scale: np.ndarray, zero: np.ndarray | None = None, *, shape: tuple[int, ...] = (4, 4), **attributes: int
) -> onnx.ModelProto:
    codes = numpy_helper.from_array(np.ones(shape, np.int8), "q")
    held = [codes, numpy_helper.from_array(scale, "s")]
    held += [] if zero is None else [numpy_helper.from_array(zero, "z")]
    reads = [t.name for t in held]
    return model([node("DequantizeLinear", reads, ["w"], name="dq", **attributes), matmul()], held)


ONES = np.ones(4, np.float32)


def at(index: int, value: float) -> np.ndarray:
    return np.where(np.arange(4) == index, value, ONES).astype(np.float32)


BAD_QPARAMS: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]] = {
    "NaN": (dequantized(at(2, np.nan)), ("scale 's' [4] of node 'dq' (DequantizeLinear)", "nan at [2]")),
    "Inf": (dequantized(at(0, np.inf)), ("inf at [0]",)),
    "zero": (dequantized(at(3, 0.0)), ("0.0 at [3]", "greater than zero")),
    "negative": (dequantized(np.float32(-0.5)), ("-0.5 at []",)),
    "wrong length": (dequantized(ONES[:3]), ("scale 's' [3]", "does not fit axis 1 of 'q' [4, 4]", "needs [4]")),
    "wrong length on axis 0": (dequantized(ONES[:3], axis=0, shape=(4, 3)), ("does not fit axis 0", "needs [4]")),
    "wrong rank": (dequantized(np.ones((4, 4), np.float32)), ("does not fit axis 1",)),
    "no such axis": (dequantized(ONES, axis=2), ("is for axis 2", "has none")),
    "blocks": (dequantized(np.ones((4, 3), np.float32), block_size=2), ("blocks of 2", "needs [4, 2]")),
    "zero-point's type": (dequantized(ONES, np.zeros(4, np.uint8)), ("dq", "x_zero_point has inconsistent type")),
    "zero-point's shape": (dequantized(ONES, np.zeros(3, np.int8)), ("zero-point 'z'", "[3] where its scale is [4]")),
}


@pytest.mark.parametrize("case", BAD_QPARAMS)
def test_scales_and_zero_points_that_cannot_be(tmp_path: Path, case: str) -> None:
    proto, parts = BAD_QPARAMS[case]
    refused(save(proto, tmp_path / "m.onnx"), *parts, quantized=True)


@pytest.mark.parametrize(
    "proto",
    [
        dequantized(ONES, np.zeros(4, np.int8)),
        dequantized(np.float32(0.5), np.int8(3)),
        dequantized(ONES[:1], axis=-1),
        dequantized(np.ones((4, 2), np.float32), np.zeros((4, 2), np.int8), block_size=2),
        dequantized(np.ones((2, 4), np.float32), block_size=3, axis=0),
    ],
)
def test_sound_qparams_are_read_where_asked_for(tmp_path: Path, proto: onnx.ModelProto) -> None:
    path = save(proto, tmp_path / "m.onnx")
    assert next(iter(read_model(path, quantized=True).graph)).op_type == "DequantizeLinear"
    refused(path, "quantized already", "node 'dq' (DequantizeLinear)", "give the float model")


def test_a_scale_in_external_data_is_looked_at(tmp_path: Path) -> None:
    proto = dequantized(ONES)
    (tmp_path / "s.bin").write_bytes(at(1, np.nan).tobytes())
    scale = external("s.bin", length=16, shape=(4,))
    scale.name = "s"
    proto.graph.initializer[1].CopyFrom(scale)
    refused(save(proto, tmp_path / "m.onnx"), "nan at [1]", quantized=True)


def zero_point(kind: int) -> onnx.TensorProto:
    return helper.make_tensor("z", kind, [], [0])


QUANTIZED: dict[str, tuple[onnx.NodeProto, ...]] = {
    "QuantizeLinear": (
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="first"),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ),
    "DynamicQuantizeLinear": (
        node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"], name="first"),
        node("DequantizeLinear", ["q", "qs", "qz"], ["y"]),
    ),
    "MatMulInteger": (
        node("Cast", ["x"], ["c"], to=UINT8),
        node("MatMulInteger", ["c", "codes"], ["i"], name="first"),
        node("Cast", ["i"], ["y"], to=FLOAT),
    ),
    "DynamicQuantizeMatMul": (
        node("DynamicQuantizeMatMul", ["x", "codes", "s"], ["y"], name="first", domain="com.microsoft"),
    ),
    "MatMulNBits": (
        node("MatMulNBits", ["x", "packed", "blocks"], ["y"], name="first", domain="com.microsoft", K=4, N=4, bits=4),
    ),
}


@pytest.mark.parametrize("op", QUANTIZED)
def test_a_quantized_model_is_refused(tmp_path: Path, op: str) -> None:
    held = [
        weight("s", np.float32(0.5)),
        zero_point(UINT8),
        helper.make_tensor("codes", INT8, [4, 4], [1] * 16),
        helper.make_tensor("packed", UINT8, [4, 1, 8], [1] * 32),
        weight("blocks", np.ones(4, np.float32)),
    ]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = save(model(QUANTIZED[op], held, opset_imports=imports), tmp_path / "m.onnx")
    refused(path, "quantized already", f"the first such node is node 'first' ({op})")


@pytest.mark.parametrize("op", ["QuickGelu", "Gelu"])
def test_a_float_op_of_onnxruntime_is_not_taken_for_a_quantized_one(tmp_path: Path, op: str) -> None:
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = save(model([node(op, ["x"], ["y"], domain="com.microsoft")], opset_imports=imports), tmp_path / "m.onnx")
    assert len(list(read_model(path).graph)) == 1
