import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import SpecError
from qcompile.formats import FORMATS
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.packing import pack, packed_length, unpack
from qcompile.sizes import qparams_bytes, stored_bytes
from qcompile.spec import Zero, parse_spec


def bit_string(row: list[int], bits: int) -> list[int]:
    """The layout of the module's docstring, bit by bit in Python."""
    stream = [(code >> i) & 1 for code in row for i in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << i for i, bit in enumerate(stream[j : j + 8])) for j in range(0, len(stream), 8)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 9, 31, 64, 65])
def test_layout_is_one_stream_of_bits_a_row_low_bits_first(bits, length):
    codes = torch.randint(0, 2**bits, (3, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(length))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [bit_string(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits, length, signed=False), codes)


def test_four_bits_keep_the_even_code_in_the_low_nibble():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([1, -1], dtype=torch.int8), 4).tolist() == [0xF1]


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_signed_code_survives(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    restored = unpack(pack(codes, bits), bits, len(codes), signed=True)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, codes)


@given(st.integers(2, 8), st.lists(st.integers(0, 4), max_size=2), st.integers(1, 40), st.integers(0, 99))
def test_any_shape_survives(bits, batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*batch, length), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (*batch, packed_length(length, bits))
    assert torch.equal(unpack(packed, bits, length, signed=False), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_transposed_codes_pack_as_their_copy(bits):
    codes = torch.randint(0, 2**bits, (24, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_compiler_traces_both_whole(bits):
    def there_and_back(codes):
        return unpack(pack(codes, bits), bits, codes.shape[-1], signed=True)

    codes = torch.arange(26, dtype=torch.int8).reshape(2, 13) % (2 ** (bits - 1))
    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codes), codes)


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(SpecError, match="formats have 2 to 8 bits"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(SpecError, match="formats have 2 to 8 bits"):
        unpack(torch.zeros(8, dtype=torch.uint8), bits, 8, signed=False)


def test_a_wrong_length_is_refused():
    packed = pack(torch.zeros(2, 9, dtype=torch.uint8), 4)
    with pytest.raises(SpecError, match=r"11 codes of 4 bits fill 6 bytes a row, got shape \[2, 5\]"):
        unpack(packed, 4, 11, signed=False)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_weights_survive_packing(name):
    spec = parse_spec(f"{name}/channel")
    x = torch.randn(4, 37, generator=torch.Generator().manual_seed(0))
    qparams = find_qparams(x, spec)
    codes = quantize(x, qparams)
    restored = unpack(pack(codes, spec.format.bits), spec.format.bits, 37, signed=codes.dtype == torch.int8)
    assert torch.equal(dequantize(restored, qparams), dequantize(codes, qparams))


@pytest.mark.parametrize(
    "text",
    [
        *("int8/channel", "int4/g32/asym/fp16", "int3/g32/bf16", "fp4_e2m1/b32/e8m0", "fp4_e2m1/b16/fp8_e4m3"),
        *("nf4/g32/dq256", "lloyd4/g32", "int8/tensor", "fp8_e4m3/b2x32", "int5/token"),
        *("int4/b32/full/fp16", "int5/b32/min/fp16", "int4/b32/min/u6x8", "int6/b16/full/i8x16", "int4/g32/asym/u4row"),
    ],
)
def test_stored_bytes_count_what_is_stored(text):
    spec = parse_spec(text)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    qparams = find_qparams(x, spec)
    codes = pack(quantize(x, qparams), spec.format.bits)
    kept = [*qparams.stored.values(), *([] if qparams.levels is None else [qparams.levels])]
    zero = [] if spec.zero is not Zero.CODE else [qparams.zero.to(torch.uint8)]
    assert stored_bytes(spec, 6, 96) == sum(t.nbytes for t in [codes, *kept, *zero])
    assert qparams_bytes(qparams) == sum(t.nbytes for t in [*kept, *zero])


def test_stored_bytes_agree_with_bits_per_element_up_to_what_a_tensor_stores_once():
    texts = ("int4/g128/asym/fp16", "fp4_e2m1/b16/fp8_e4m3", "int8/channel", "nf4/g64/dq256", "int5/b32/min/fp16")
    texts += ("int4/g128/asym/u4row",)
    for text in (*texts, "int2/b16/min/u4x16", "int3/b16/full/i6x16", "int4/b32/min/u6x8", "iq4_nl/b32/i6x8"):
        spec = parse_spec(text)
        assert 0 <= stored_bytes(spec, 256, 512) - spec.bits_per_element(256, 512) * 256 * 512 / 8 <= 4
