"""Integer codes packed into int32 words, and back, for the two layouts that runtimes read.

Both layouts are the same little-endian bit stream: code i of a row occupies bits `i * bits` to `i * bits + bits - 1` of
that row, counted from the least significant bit of the first word, and a code may straddle two words (3 bits only; 2, 4
and 8 divide 32). They differ in the axis that is packed, in the offset that makes a code unsigned, and in padding:

| layout | shape of the words | packed along | stored value |
|---|---|---|---|
| compressed-tensors `pack-quantized` | (out, ceil(in * bits / 32)) | in | q + 2**(bits - 1) |
| GPTQ `qweight` | (in * bits / 32, out) | in | q + zero, here zero = 2**(bits - 1) |
| GPTQ v1 `qzeros` | (groups, out * bits / 32) | out | zero - 1 |
| compressed-tensors `weight_zero_point` | (ceil(out * bits / 32), groups) | out | zero + 2**(bits - 1) |

Letters: O out, I in, G groups, W words.

Sources: compressed-tensors 0.20 `pack_to_int32` (versions before 0.18 put 10 codes of 3 bits in a word), and AutoGPTQ
0.7.1 `qlinear_cuda_old.QuantLinear.pack`, whose 3-bit branch (10 codes, a code split 2 + 1, 10 codes, a code split
1 + 2, 10 codes) is this same stream written out.
"""

import math
import sys

import torch
from torch import Tensor

from moepress.converters.safetensors.scheme import SUPPORTED_BITS
from moepress.errors import InvalidInputError, UnsupportedError

# Eight codes, one a byte, make an int64; packed they take `bits` bytes. 32 of them take `bits` whole words.
CODES_PER_STEP = 8
CODES_PER_BLOCK = 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last axis into a little-endian bit stream of int32 words.

    Eight codes are read as one int64 with a code per byte, then neighbours are moved together three times: 2 codes in
    each 16 bits, 4 in each 32, 8 in the low `8 * bits` of 64. The last word of a row is filled up with zero bits.

    Args:
        codes: uint8 [..., I], each below 2**bits.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [..., ceil(I * bits / 32)], contiguous.

    Raises:
        UnsupportedError: another width.
    """
    _check_bits(bits)
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -count % CODES_PER_BLOCK)).contiguous()  # pad copies: aligned
    # Flat, since an axis of one row may have any stride, which no wider number divides.
    eights = padded.flatten().view(torch.int64).view(*padded.shape[:-1], padded.shape[-1] // CODES_PER_STEP)
    for field in (8, 16, 32):
        used = field * bits // 8
        eights = (eights | eights >> (field - used)) & _field_mask(2 * field, 2 * used)
    stream = _rows_of(eights.view(torch.uint8), CODES_PER_STEP)[..., :bits]
    words = stream.flatten(-2).contiguous().view(torch.int32)
    return words[..., : math.ceil(count * bits / 32)].contiguous()


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Read `count` unsigned codes along the last axis; the inverse of `pack_bits`.

    Args:
        words: int32 [..., W].
        bits: 2, 3, 4 or 8.
        count: codes per row, I.

    Returns:
        uint8 [..., I].

    Raises:
        UnsupportedError: another width.
        InvalidInputError: the words are not int32, or their number is not that of so many codes.
    """
    _check_bits(bits)
    if words.dtype != torch.int32:
        raise InvalidInputError(f"packed codes are stored as {words.dtype}, not int32; the file is not in this layout.")
    if words.shape[-1] != math.ceil(count * bits / 32):
        raise InvalidInputError(
            f"{words.shape[-1]} packed words per row cannot hold {count} codes of {bits} bits exactly "
            f"({math.ceil(count * bits / 32)} are needed); the shape, the bits or the tensor is wrong."
        )
    padded = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits))
    stream = _rows_of(padded.contiguous().view(torch.uint8), bits)
    widened = torch.nn.functional.pad(stream, (0, CODES_PER_STEP - bits))
    eights = widened.flatten(-2).view(torch.int64)
    for field in (32, 16, 8):
        used = field * bits // 8
        eights = (eights | eights << (field - used)) & _field_mask(field, used)
    return eights.view(torch.uint8)[..., :count].contiguous()


def to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes to what is stored: q + 2**(bits - 1).

    Args:
        codes: int8, each in [-2**(bits-1), 2**(bits-1) - 1].
        bits: 2, 3, 4 or 8.

    Returns:
        uint8, same shape.

    Raises:
        ValueError: the codes are not int8, or one is out of range.
    """
    _check_bits(bits)
    if codes.dtype != torch.int8:
        raise ValueError(f"codes are {codes.dtype}, want int8")
    half = 1 << (bits - 1)
    if bits < 8 and codes.numel():
        low, high = (int(edge) for edge in torch.aminmax(codes))
        if low < -half or high >= half:
            raise ValueError(f"codes run from {low} to {high}; {bits} bits hold {-half} to {half - 1}")
    return codes.view(torch.uint8) + half  # modulo 256, where -1 is 255


def to_signed(stored: Tensor, bits: int) -> Tensor:
    """What is stored to signed codes; the inverse of `to_unsigned`.

    Args:
        stored: uint8, each below 2**bits.
        bits: 2, 3, 4 or 8.

    Returns:
        int8, same shape.
    """
    return (stored - (1 << (bits - 1))).view(torch.int8)


def pack_compressed(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes as compressed-tensors `pack-quantized` stores them in `.weight_packed`.

    Args:
        codes: int8 [..., O, I], each in [-2**(bits-1), 2**(bits-1) - 1].
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [..., O, ceil(I * bits / 32)]: q + 2**(bits-1) along I, least significant bits first, zero bits after
        the last code of a row. 3-bit codes run across words without gaps (32 codes in 3 words).

    Raises:
        ValueError: a code is out of range or not int8.
        UnsupportedError: another width.
    """
    return pack_bits(to_unsigned(codes, bits), bits)


def unpack_compressed(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Signed codes of a `.weight_packed` tensor; the inverse of `pack_compressed`.

    Args:
        packed: int32 [..., O, ceil(I * bits / 32)].
        bits: 2, 3, 4 or 8.
        in_features: I; `.weight_shape` holds it.

    Returns:
        int8 [..., O, I].

    Raises:
        InvalidInputError: the words are not int32, or do not hold I codes.
        UnsupportedError: another width, or 3-bit codes as compressed-tensors wrote them before 0.18 (10 in a word).
    """
    padded_words, dense_words = math.ceil(in_features / 10), math.ceil(in_features * 3 / 32)
    if bits == 3 and packed.shape[-1] == padded_words != dense_words:
        raise UnsupportedError(
            f"{packed.shape[-1]} words for {in_features} codes of 3 bits: compressed-tensors before 0.18 wrote 10 "
            "codes in a word; save the model again with a newer one."
        )
    return to_signed(unpack_bits(packed, bits, in_features), bits)


def pack_gptq_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes as GPTQ stores them in `.qweight`: along the input axis, which is the rows' axis there.

    Args:
        codes: uint8 [O, I], each below 2**bits (q + zero).
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [I * bits / 32, O]: word w of column o holds bits 32w to 32w + 31 of the codes of output row o, least
        significant first. At 3 bits, codes 10 and 21 of each 32 straddle words (2 + 1 and 1 + 2 bits).

    Raises:
        UnsupportedError: another width, or I is not a multiple of 32.
    """
    _check_gptq_axis("input", codes.shape[-1])
    return pack_bits(codes, bits).mT.contiguous()


def unpack_gptq_rows(qweight: Tensor, bits: int) -> Tensor:
    """Unsigned codes of a `.qweight` tensor; the inverse of `pack_gptq_rows`.

    Args:
        qweight: int32 [I * bits / 32, O].
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [O, I].

    Raises:
        InvalidInputError: not int32, or the number of rows is no whole number of codes.
        UnsupportedError: another width.
    """
    _check_bits(bits)
    return unpack_bits(qweight.mT, bits, qweight.shape[0] * 32 // bits)


def pack_gptq_zeros(zero: int, groups: int, out_features: int, bits: int) -> Tensor:
    """The `.qzeros` of a symmetric matrix in GPTQ v1, which stores zero - 1 (a reader adds 1 before it subtracts).

    At 4 bits and zero 8 every word is 0x77777777, at 8 bits 0x7F7F7F7F, at 2 bits 0x55555555; at 3 bits the words are
    0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D in turn.

    Args:
        zero: the code that stands for weight 0, in 1 .. 2**bits - 1 (v1 cannot store 0).
        groups: G.
        out_features: O.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [G, O * bits / 32], packed along O, least significant bits first.

    Raises:
        UnsupportedError: another width, or O is not a multiple of 32.
    """
    _check_bits(bits)
    _check_gptq_axis("output", out_features)
    if not 1 <= zero < 1 << bits:
        raise ValueError(f"zero {zero} does not fit {bits} bits less one")
    return pack_gptq_zero_points(torch.full((groups, out_features), zero, dtype=torch.int16), bits)


def pack_gptq_zero_points(zeros_GO: Tensor, bits: int) -> Tensor:
    """The `.qzeros` of an asymmetric matrix in GPTQ v1, which stores each zero less 1.

    Args:
        zeros_GO: int16 [G, O], unsigned as `qweight` is: the code that stands for weight 0.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [G, O * bits / 32], packed along O, least significant bits first.

    Raises:
        UnsupportedError: another width, O is not a multiple of 32, or a zero is not in 1 .. 2**bits.
    """
    _check_bits(bits)
    _check_gptq_axis("output", zeros_GO.shape[1])
    if zeros_GO.numel() and (int(zeros_GO.min()) < 1 or int(zeros_GO.max()) > 1 << bits):
        raise UnsupportedError(
            f"zero points run from {int(zeros_GO.min())} to {int(zeros_GO.max())}, and the GPTQ layout, which stores "
            f"one less, holds 1 to {1 << bits}."
        )
    return pack_bits((zeros_GO - 1).to(torch.uint8), bits)


def unpack_gptq_zeros(qzeros: Tensor, bits: int) -> Tensor:
    """Zeros of a GPTQ v1 `.qzeros` tensor; the inverse of `pack_gptq_zeros`.

    Args:
        qzeros: int32 [G, O * bits / 32].
        bits: 2, 3, 4 or 8.

    Returns:
        int16 [G, O]: the stored value plus 1, so 1 .. 2**bits.

    Raises:
        InvalidInputError: not int32, or the number of columns is no whole number of codes.
        UnsupportedError: another width.
    """
    _check_bits(bits)
    return unpack_bits(qzeros, bits, qzeros.shape[1] * 32 // bits).to(torch.int16) + 1


def _field_mask(field: int, used: int) -> int:
    """The int64 whose lowest `used` bits of every `field` bits are set, as a signed number."""
    ones = sum(((1 << used) - 1) << start for start in range(0, 64, field))
    return ones - (1 << 64) if ones >> 63 else ones


def _rows_of(values: Tensor, length: int) -> Tensor:
    """The last axis cut into rows of that length: [..., N] to [..., N / length, length]."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // length, length)


def _check_bits(bits: int) -> None:
    """Refuse a width that has no layout here, and a machine whose words are the other way round."""
    if bits not in SUPPORTED_BITS:
        raise UnsupportedError(f"{bits}-bit codes have no packed layout here; use {SUPPORTED_BITS}.")
    assert sys.byteorder == "little", "the byte view of an int32 word is little-endian"


def _check_gptq_axis(axis: str, size: int) -> None:
    """GPTQ readers allocate `size // 32 * bits` words, so a remainder cannot be loaded."""
    if size % CODES_PER_BLOCK:
        raise UnsupportedError(
            f"the GPTQ layout packs whole blocks of 32, and a matrix has {size} {axis} features; "
            "keep the compressed-tensors layout for this model."
        )
