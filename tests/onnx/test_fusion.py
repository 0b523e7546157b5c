"""What onnxruntime makes of a file: counted, compared with what was planned, and named by site."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from qcompile.backends.onnx.emit import emit
from qcompile.backends.onnx.fusion import check_fusion, fused
from qcompile.backends.onnx.planned import Emitted, Planned
from qcompile.errors import UnsupportedError
from qcompile.numerics import find_qparams
from qcompile.spec import parse_spec
from tests.onnx.canonical import Canonical, linear_model, run_onnxruntime
from tests.onnx.test_emit_ort import assert_near, int8_step


def test_a_kernel_that_does_not_appear_is_an_error_that_names_the_sites() -> None:
    model, _ = linear_model(weight="int8/channel", given="int8/tensor/asym", linears=3)
    emitted = emit(model, "ort-cpu")
    proto = ir.to_proto(emitted.model)
    # the first linear as a file would have it that computes in float
    at, first = next((i, n) for i, n in enumerate(proto.graph.node) if n.op_type == "MatMulIntegerToFloat")
    casts = [onnx.helper.make_node("Cast", [v], [f"{v}_float"], to=onnx.TensorProto.FLOAT) for v in first.input[:2]]
    product = onnx.helper.make_node("MatMul", [cast.output[0] for cast in casts], list(first.output))
    proto.graph.node.remove(first)
    for node in (product, *casts):
        proto.graph.node.insert(at, node)
    with pytest.raises(
        UnsupportedError,
        match=r"did not fuse 1 of 3 sites for target 'ort-cpu': 'block.q' \(planned Dyn.*, got MatMul\)",
    ):
        check_fusion(emitted, proto)


@pytest.mark.parametrize("given", ["static", "int8/tensor/asym", "int8/token", None])
@pytest.mark.parametrize("behind", ["nothing", "x", "a constant"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(64,), (1, 64), (5, 64), ("M", 64), (1, 1, 64), (2, 3, 64), ("B", "T", 64), (1, 2, 3, 64)]
)
def test_kernels_appear_whatever_the_rank_and_whatever_is_added(
    shape: tuple[int | str, ...], bias: bool, behind: str, given: str | None
) -> None:
    torch.manual_seed(2)
    x = torch.randn([d if isinstance(d, int) else 4 for d in shape])
    made = Canonical(shape)
    weight, numbers = made.weight("fc.weight", torch.randn(64, 64), "int8/channel")
    vector = torch.randn(64) if bias else None
    stored = None if vector is None else made.constant("fc.bias", vector)
    qparams = find_qparams(x, parse_spec("int8/tensor/asym")) if given == "static" else given
    read = made.x if qparams is None else made.quantized(made.x, qparams)
    y = made.op("Linear", read, weight, stored, path="fc", like=made.x)
    added = {"nothing": torch.zeros_like(x), "x": x, "a constant": torch.randn(x.shape)}[behind]
    if behind != "nothing":
        other = made.x if behind == "x" else made.constant("c", added)
        y = made.op("Add", y, other, like=made.x, domain="")
    emitted = emit(made.finish(y), "ort-cpu")
    (kernel,) = check_fusion(emitted).by_site["fc"]
    assert kernel == emitted.planned[0].kernel
    (found,) = run_onnxruntime(emitted.model, x)
    assert found.shape == x.shape
    step = int8_step(x) if given is None else 0.51 * 2 * float(x.abs().max()) / 255
    assert_near([found - added], x, [(numbers, vector)], step + 1e-6, torch.float32)


def test_a_linear_that_vanished_in_another_kernel_is_missing() -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[M, 4] x, float[4] b) => (float[M, 4] y)
        <float[4, 4] w = {{{", ".join("1" * 16)}}}>
        {{ p = MatMul(x, w) s = Add(p, b) y = Relu(s) }}"""
    model = ir.from_onnx_text(text)
    site = Planned(site="a", node="makes p", outputs=("p", "s"), kernel="MatMulIntegerToFloat")
    emitted = Emitted(model=model, target="ort-cpu", planned=(site,), notes=())
    with pytest.raises(UnsupportedError, match=r"did not fuse 1 of 1 sites .* got (another|Gemm)"):
        check_fusion(emitted)


def test_kernels_are_counted_of_files_too(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    emitted: Emitted = emit(linear_model(weight="int4/g32", linears=2)[0], "ort-cpu")
    ir.save(emitted.model, path)
    assert fused(path)["MatMulNBits"] == 2
    assert check_fusion(emitted, path).counts == fused(path)


@pytest.mark.slow
def test_kernels_are_counted_of_models_of_more_than_2_gb(tmp_path: Path) -> None:
    count, n = 3, 14000
    with (tmp_path / "model.data").open("wb") as data:
        # a hole in a file takes no room on disk
        data.truncate(4 * n * n * count)
    head = f'<ir_version: 10, opset_import: ["" : 21]> g (float[M, {n}] x0) => (float[M, {n}] x{count})'
    body = "\n".join(f"t{i} = Transpose(w{i}) x{i + 1} = MatMul(x{i}, t{i})" for i in range(count))
    proto = onnx.parser.parse_model(f"{head} {{ {body} }}")
    for i in range(count):
        held = proto.graph.initializer.add(name=f"w{i}", data_type=onnx.TensorProto.FLOAT, dims=[n, n])
        held.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "model.data"), ("offset", 4 * n * n * i), ("length", 4 * n * n)):
            held.external_data.add(key=key, value=str(value))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    # onnxruntime turns the weights while it loads them, so that the model which it optimized holds them itself
    assert fused(tmp_path / "model.onnx") == {"MatMul": count}


def test_what_onnxruntime_cannot_load_is_an_error_that_says_what_to_do() -> None:
    model, _ = linear_model(weight=None, dtype=torch.bfloat16)
    with pytest.raises(
        UnsupportedError, match=r"cannot load .* NOT_IMPLEMENTED .*; convert the float model to float32"
    ):
        check_fusion(emit(model, "ort-cpu"))
