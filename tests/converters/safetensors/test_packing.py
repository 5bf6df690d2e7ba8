"""The bytes: against hand-written words, a slow reader of single bits, compressed-tensors itself, and round trips."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepress.converters.safetensors.packing import (
    pack_bits,
    pack_compressed,
    pack_gptq_rows,
    pack_gptq_zeros,
    to_signed,
    to_unsigned,
    unpack_bits,
    unpack_compressed,
    unpack_gptq_rows,
    unpack_gptq_zeros,
)
from moepress.errors import InvalidInputError, UnsupportedError

ALL_BITS = [2, 3, 4, 8]


def signed_codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def words(*values: int) -> Tensor:
    """Hexadecimal words as the int32 that they are on disk."""
    return torch.tensor(values, dtype=torch.int64).to(torch.int32)


def code_from_bit_stream(row: Tensor, bits: int, index: int) -> int:
    """Code `index` of a row of int32 words, one bit at a time, from the description of the layout."""
    code = 0
    for bit in range(bits):
        position = index * bits + bit
        word = int(row[position // 32]) & 0xFFFFFFFF
        code |= (word >> (position % 32) & 1) << bit
    return code


def test_golden_word_of_4_bits_has_the_first_code_in_the_lowest_nibble() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]], dtype=torch.int8)  # stored 0 1 2 3 4 5 6 15
    assert torch.equal(pack_compressed(codes, 4), words(0xF6543210)[None])


def test_golden_word_of_8_bits_has_the_first_code_in_the_lowest_byte() -> None:
    codes = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)  # stored 00 7F 80 FF
    assert torch.equal(pack_compressed(codes, 8), words(0xFF807F00)[None])


def test_golden_word_of_2_bits_has_the_first_code_in_the_lowest_pair() -> None:
    codes = torch.tensor([[-2, -1, 0, 1] * 4], dtype=torch.int8)  # stored 0 1 2 3: byte 0b11_10_01_00
    assert torch.equal(pack_compressed(codes, 2), words(0xE4E4E4E4)[None])


def test_golden_words_of_3_bits_let_codes_10_and_21_straddle() -> None:
    codes = torch.full((1, 32), -4, dtype=torch.int8)  # stored 0
    codes[0, 10] = 1  # stored 5 = 0b101: 01 ends word 0, 1 begins word 1
    codes[0, 21] = 2  # stored 6 = 0b110: 0 ends word 1, 11 begins word 2
    codes[0, 31] = 3  # stored 7: the top of word 2
    assert torch.equal(pack_compressed(codes, 3), words(0x40000000, 0x00000001, 0xE0000003)[None])


def test_a_row_that_ends_inside_a_word_is_filled_with_zero_bits() -> None:
    codes = torch.full((1, 5), 7, dtype=torch.int8)
    assert torch.equal(pack_compressed(codes, 4), words(0x000FFFFF)[None])


def test_golden_qweight_runs_down_the_rows() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).repeat(2, 1)
    codes[1] = 15 - codes[1]
    column_0, column_1 = (0x76543210, 0xFEDCBA98) * 2, (0x89ABCDEF, 0x01234567) * 2
    assert torch.equal(pack_gptq_rows(codes, 4), torch.stack([words(*column_0), words(*column_1)], dim=1))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, [0x55555555] * 2),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (4, [0x77777777] * 4),
        (8, [0x7F7F7F7F] * 8),
    ],
)
def test_golden_symmetric_zeros_are_stored_less_one(bits: int, expected: list[int]) -> None:
    qzeros = pack_gptq_zeros(1 << (bits - 1), groups=2, out_features=32, bits=bits)
    assert torch.equal(qzeros, words(*expected).repeat(2, 1))
    assert torch.equal(unpack_gptq_zeros(qzeros, bits), torch.full((2, 32), 1 << (bits - 1), dtype=torch.int16))


def test_a_zero_of_the_largest_code_plus_one_can_be_read() -> None:
    assert int(unpack_gptq_zeros(words(*[-1] * 8)[None], 8).max()) == 256


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(1, 32), (5, 37), (3, 128), (2, 7, 40), (4, 1), (64, 96)])
def test_packing_is_bit_for_bit_that_of_compressed_tensors(bits: int, shape: tuple[int, ...]) -> None:
    codes = signed_codes(*shape, bits=bits)
    theirs = pack_to_int32(codes, bits)
    assert torch.equal(pack_compressed(codes, bits), theirs)
    assert torch.equal(unpack_compressed(theirs, bits, shape[-1]), codes)
    assert torch.equal(unpack_from_int32(pack_compressed(codes, bits), bits, codes.shape), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_slow_reader_of_bits_finds_every_code(bits: int) -> None:
    stored = to_unsigned(signed_codes(3, 64, bits=bits), bits)
    by_row, by_column = pack_bits(stored, bits), pack_gptq_rows(stored, bits)
    for output in range(3):
        for column in range(64):
            want = int(stored[output, column])
            assert code_from_bit_stream(by_row[output], bits, column) == want
            assert code_from_bit_stream(by_column[:, output], bits, column) == want


@given(bits=st.sampled_from(ALL_BITS), rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_unpacking_a_compressed_tensor_gives_back_its_codes(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = signed_codes(rows, columns, bits=bits, seed=seed)
    packed = pack_compressed(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert packed.is_contiguous()
    assert torch.equal(unpack_compressed(packed, bits, columns), codes)


@given(bits=st.sampled_from(ALL_BITS), rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_unpacking_gptq_rows_gives_back_their_codes(bits: int, rows: int, blocks: int, seed: int) -> None:
    codes = signed_codes(rows, 32 * blocks, bits=bits, seed=seed)
    qweight = pack_gptq_rows(to_unsigned(codes, bits), bits)
    assert qweight.shape == (blocks * bits, rows)
    assert torch.equal(to_signed(unpack_gptq_rows(qweight, bits), bits), codes)


@given(bits=st.sampled_from(ALL_BITS), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_zero_that_v1_can_store_comes_back(bits: int, data: st.DataObject) -> None:
    zero = data.draw(st.integers(1, (1 << bits) - 1))
    qzeros = pack_gptq_zeros(zero, groups=3, out_features=64, bits=bits)
    assert qzeros.shape == (3, 64 * bits // 32)
    assert bool((unpack_gptq_zeros(qzeros, bits) == zero).all())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_transposed_and_offset_views_pack_like_their_copies(bits: int) -> None:
    codes = signed_codes(64, 97, bits=bits)
    transposed, shifted = codes.mT, codes.flatten()[3 : 3 + 64 * 32].view(64, 32)
    assert torch.equal(pack_compressed(transposed, bits), pack_compressed(transposed.clone().contiguous(), bits))
    assert torch.equal(pack_compressed(shifted, bits), pack_compressed(shifted.clone(), bits))
    packed = pack_compressed(codes, bits)
    wide = torch.cat([packed[:, :1], packed], dim=1)
    assert torch.equal(unpack_compressed(wide[:, 1:], bits, 97), codes)


def test_packing_leaves_its_input_as_it_was() -> None:
    codes = signed_codes(4, 32, bits=4)
    before = codes.clone()
    unpack_compressed(pack_compressed(codes, 4), 4, 32)
    assert torch.equal(codes, before)


@pytest.mark.parametrize(("bits", "code"), [(2, 2), (3, -5), (4, 8), (4, -9)])
def test_a_code_that_does_not_fit_is_refused(bits: int, code: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits hold"):
        pack_compressed(torch.tensor([[0, code]], dtype=torch.int8), bits)


def test_codes_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="want int8"):
        pack_compressed(torch.zeros(1, 8, dtype=torch.int32), 4)


def test_a_width_without_a_layout_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="5-bit"):
        pack_compressed(torch.zeros(1, 8, dtype=torch.int8), 5)


def test_words_that_do_not_hold_that_many_codes_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="cannot hold 64 codes"):
        unpack_bits(torch.zeros(2, 7, dtype=torch.int32), 4, 64)
    with pytest.raises(InvalidInputError, match="not int32"):
        unpack_bits(torch.zeros(2, 8, dtype=torch.int64), 4, 64)


def test_3_bit_words_of_compressed_tensors_before_0_18_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"before 0\.18 wrote 10 codes in a word"):
        unpack_compressed(torch.zeros(2, 7, dtype=torch.int32), 3, 64)
    assert unpack_compressed(torch.zeros(2, 1, dtype=torch.int32), 3, 10).shape == (2, 10)


def test_gptq_refuses_axes_that_its_readers_cannot_allocate() -> None:
    with pytest.raises(UnsupportedError, match="40 input features"):
        pack_gptq_rows(torch.zeros(32, 40, dtype=torch.uint8), 4)
    with pytest.raises(UnsupportedError, match="40 output features"):
        pack_gptq_zeros(8, 1, 40, 4)


@pytest.mark.parametrize("zero", [0, 16])
def test_a_zero_that_v1_cannot_store_is_refused(zero: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack_gptq_zeros(zero, 1, 32, 4)
