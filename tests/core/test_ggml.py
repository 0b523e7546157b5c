"""Blocks of ggml against its own dequantizer and quantizer, which the package gguf has in numpy."""

import warnings

import pytest
import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.ggml import TYPES, from_blocks, to_blocks, type_of
from qcompile.numerics import dequantize, find_qparams, quantize, snr_db
from qcompile.solvers.kquant import solve_kquant
from qcompile.spec import parse_spec

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")
np = pytest.importorskip("numpy")
ENCODED = [name for name in TYPES if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")]


def theirs(data: Tensor, name: str) -> Tensor:
    with warnings.catch_warnings():
        # random bytes are NaN and Inf among others
        warnings.simplefilter("ignore")
        return torch.from_numpy(quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))


def ours(data: Tensor, name: str) -> Tensor:
    qparams = from_blocks(data, name)
    return dequantize(qparams.codes, qparams)


@pytest.mark.parametrize("name", TYPES)
def test_sizes_and_bits_are_those_of_ggml(name):
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    kind = TYPES[name]
    assert (kind.elements, kind.size) == (elements, size)
    assert kind.spec.bits_per_element(8, 4 * elements) == 8 * size / elements
    assert type_of(kind.spec) is kind


@pytest.mark.parametrize("name", TYPES)
def test_random_bytes_are_the_numbers_that_ggml_reads(name):
    kind = TYPES[name]
    data = torch.randint(0, 256, (33, 5 * kind.size), dtype=torch.uint8)
    if name == "MXFP4":
        # of an exponent of all ones the standard makes NaN, and ggml a number
        data.view(33, 5, kind.size)[..., 0].clamp_(max=254)
    assert torch.equal(ours(data, name).nan_to_num(nan=-1e30), theirs(data, name).nan_to_num(nan=-1e30))


@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_written_as_they_were_read(name):
    data = torch.randint(0, 256, (7, 3 * TYPES[name].size), dtype=torch.uint8)
    qparams = from_blocks(data, name)
    assert torch.equal(to_blocks(qparams.codes, qparams), data)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("solver", [find_qparams, solve_kquant])
def test_ggml_reads_what_is_written(name, solver):
    spec = TYPES[name].spec
    if solver is solve_kquant and spec.scale == "e8m0":
        return
    weight = torch.randn(40, 2 * TYPES[name].elements) * 0.03
    weight[3] = 0
    weight[4, :32] *= 1e-4
    qparams = solver(weight, spec)
    codes = quantize(weight, qparams)
    assert torch.equal(theirs(to_blocks(codes, qparams), name), dequantize(codes, qparams))


@pytest.mark.parametrize("name", ENCODED)
def test_weights_lose_no_more_than_by_ggmls_own_quantizer(name):
    weight = torch.randn(64, 512)
    data = torch.from_numpy(quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))
    qparams = find_qparams(weight, TYPES[name].spec)
    found = snr_db(weight, dequantize(quantize(weight, qparams), qparams))
    assert found >= snr_db(weight, ours(data, name)) - 0.01
    if name != "MXFP4":
        fitted = solve_kquant(weight, TYPES[name].spec)
        # where codes are few, scales that fit them gain most
        assert snr_db(weight, dequantize(quantize(weight, fitted), fitted)) > found


# numerics.md 1.5, of normal weights: what the reference's own searches leave
@pytest.mark.parametrize(
    ("name", "rmse"),
    [("Q4_0", 0.0860), ("Q4_K", 0.0717), ("Q5_K", 0.0362), ("Q6_K", 0.0177), ("Q2_K", 0.299), ("Q8_0", 0.0054)],
)
def test_errors_are_those_of_the_reference_or_less(name, rmse):
    weight = torch.randn(128, 1024)
    qparams = solve_kquant(weight, TYPES[name].spec)
    found = 10 ** (-snr_db(weight, dequantize(quantize(weight, qparams), qparams)) / 20)
    assert 0.7 * rmse < found < 1.01 * rmse


def test_errors_are_ordered_by_bits():
    weight = torch.randn(64, 1024)
    order = ["Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0"]
    found = []
    for name in order:
        qparams = solve_kquant(weight, TYPES[name].spec)
        found.append(snr_db(weight, dequantize(quantize(weight, qparams), qparams)))
    assert found == sorted(found)


def test_what_no_block_holds_is_refused():
    weight = torch.randn(4, 384)
    qparams = find_qparams(weight, parse_spec("int4/g128/asym"))
    with pytest.raises(SpecError, match="no kind of block holds int4/g128/asym; those that do: Q4_0"):
        to_blocks(quantize(weight, qparams), qparams)
    qparams = find_qparams(weight, TYPES["Q4_K"].spec)
    with pytest.raises(SpecError, match=r"Q4_K has blocks of 256 elements along the rows of a matrix, got \[4, 384\]"):
        to_blocks(quantize(weight, qparams), qparams)
    with pytest.raises(SpecError, match="blocks of type 'IQ1_S' are not read; known: Q4_0"):
        from_blocks(torch.zeros(2, 50, dtype=torch.uint8), "IQ1_S")
    with pytest.raises(
        SpecError, match=r"Q4_K has blocks of 144 bytes along the rows of a matrix, got shape \[2, 50\]"
    ):
        from_blocks(torch.zeros(2, 50, dtype=torch.uint8), "Q4_K")
