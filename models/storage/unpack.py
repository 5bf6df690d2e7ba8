"""What `packed` finds, read as dense fp32: codes of bytes and words, their scales and zeros.

Letters: E experts, O out, I in, G groups along in, B bytes, W words.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moepress.errors import InvalidInputError
from moepress.models.storage.blocks import unpack, values
from moepress.models.storage.finite import nonfinite
from moepress.models.storage.fp8 import dequantize_blocks, is_finite
from moepress.models.storage.packed import EXPONENTS, Packed, Packing, grid_of, misfit, true_shape
from moepress.models.storage.placed import place
from moepress.models.storage.safetensors_file import Stored
from moepress.models.storage.tensors import read_row, read_tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float; bit 3 is the sign. Source: OCP Microscaling Formats 1.0, table of FP4."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble n of an AWQ word, from the least significant, is of output AWQ_ORDER[n] of eight (AutoAWQ `WQLinear_GEMM`)."""

_VALUES = np.array([*E2M1, *(-value for value in E2M1)], dtype=np.float32)
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=1).view(np.float64).reshape(256)
_AT_ONCE = 1 << 20  # elements of what is only needed for a moment: chunks, so that one matrix is all that is held


def dequantize(packed: Packed, index: int | None = None, *, allow_nonfinite: bool = False) -> Tensor:
    """A packed weight, or one row of axis 0 of a fused one, in the memory of what is given back and a little more.

    Args:
        packed: one of `find_packed`.
        index: the expert of a weight [E, O, I]: only its bytes are read.
        allow_nonfinite: NaN and Inf are given back as they are.

    Returns:
        float32 of `packed.shape`, or that without its first axis. A fused weight comes as its rows are stored: gpt-oss'
        is [E, O, I], of which transformers' module holds the transpose [E, I, O].

    Raises:
        InvalidInputError: a scale is NaN or Inf, a code is NaN, or a part does not hold what it should.
        ValueError: an index for a matrix.
    """
    if len(packed.shape) == 2:
        if index is not None:
            raise ValueError(f"{packed.name} is a matrix, which has no experts")
        return _matrix(packed, None, allow_nonfinite=allow_nonfinite)
    if index is not None:
        return _matrix(packed, index, allow_nonfinite=allow_nonfinite)
    first = _matrix(packed, 0, allow_nonfinite=allow_nonfinite)
    out = first.new_empty(packed.shape)
    out[0] = first
    for row in range(1, packed.shape[0]):
        out[row] = _matrix(packed, row, allow_nonfinite=allow_nonfinite)
    return out


def _matrix(packed: Packed, index: int | None, *, allow_nonfinite: bool) -> Tensor:
    if packed.packing is Packing.GGUF:
        return _gguf_matrix(packed, allow_nonfinite=allow_nonfinite)
    scales, codes = _scales(packed, index), packed.parts["codes"]
    if not allow_nonfinite and not bool(torch.isfinite(scales * _LARGEST[packed.packing]).all()):
        raise nonfinite(packed.parts["scales"], index)
    if packed.packing is Packing.FP8:
        values = read_stored(codes, index)
        if not allow_nonfinite and not is_finite(values, scales):
            raise nonfinite(codes, index)
        return dequantize_blocks(place(values), place(scales), packed.block)
    if packed.packing in (Packing.MXFP4, Packing.NVFP4):
        return scale_groups(fp4_values(place(read_stored(codes, index).flatten(1))), place(scales))
    return (_rows_of if packed.packing is Packing.INT4 else _columns_of)(packed, scales)


def _gguf_matrix(packed: Packed, *, allow_nonfinite: bool) -> Tensor:
    assert packed.kind is not None
    codes = packed.parts["codes"]
    dense = values(packed.kind, unpack(packed.kind, read_tensor(codes)))
    if not allow_nonfinite and not bool(torch.isfinite(dense).all()):
        raise nonfinite(codes, None)
    return place(dense)


_LARGEST = {  # the largest code: scaled by it, nothing may overflow
    Packing.FP8: 448.0,
    Packing.MXFP4: 6.0,
    Packing.NVFP4: 6.0,
    Packing.INT4: 255.0,
    Packing.GPTQ: 255.0,
    Packing.AWQ: 15.0,
}


def _scales(packed: Packed, index: int | None) -> Tensor:
    """Scales as fp32: [ceil(O / block[0]), ceil(I / block[1])], of GPTQ and AWQ as they lie, [G, O]."""
    entry = packed.parts["scales"]
    raw = read_stored(entry, None if entry.shape in ((), (1,)) else index)  # one scale is all experts'
    scales = exponents(raw) if entry.dtype in EXPONENTS else raw.float()
    if (top := packed.parts.get("global")) is not None:
        factor = read_tensor(top).float().reshape(())
        scales = scales / factor if top.name.endswith("weight_global_scale") else scales * factor
    if packed.packing in (Packing.GPTQ, Packing.AWQ):
        return scales
    rows, columns = grid_of(packed.shape[-2:], packed.block)
    return scales.reshape(rows, columns)


def _rows_of(packed: Packed, scales: Tensor) -> Tensor:
    shape, zeros = packed.parts["shape"], packed.parts.get("zeros")
    if true_shape(shape) != packed.shape:
        raise misfit(packed.parts["codes"], shape)
    lowest, count = torch.full((1, 1), float(1 << (packed.bits - 1))), packed.shape[0]
    if zeros is not None and zeros.dtype == "I8":
        lowest = lowest + read_tensor(zeros)
    elif zeros is not None:
        lowest = word_codes(read_tensor(zeros).mT, packed.bits)[:, :count].mT.float()
    words = place(read_tensor(packed.parts["codes"]))
    dense = rows_packed(words, place(lowest), place(scales), packed.block[1], packed.bits)
    return dense[:, : packed.shape[1]].contiguous()


def _columns_of(packed: Packed, scales: Tensor) -> Tensor:
    awq, order = packed.packing is Packing.AWQ, packed.parts.get("order")
    groups = torch.arange(packed.shape[1]).div(packed.block[1], rounding_mode="floor")
    if order is not None:
        groups = read_tensor(order).long()
        if int(groups.min()) < 0 or int(groups.max()) >= scales.shape[0]:
            raise InvalidInputError(
                f"{order.file}: {order.name} names groups that have no scales; download the folder again."
            )
    words = read_tensor(packed.parts["zeros"])
    words = one_more(words, packed.bits) if packed.zeros_less_one else words
    zeros = (awq_codes(words) if awq else word_codes(words, packed.bits)).float()
    codes = place(read_tensor(packed.parts["codes"]))
    return columns_packed(codes, place(zeros), place(scales), place(groups), packed.bits, awq=awq)


def read_stored(entry: Stored, index: int | None) -> Tensor:
    """A tensor or a row of it; what torch has no dtype for everywhere comes as its bytes."""
    if entry.dtype == "F4":
        entry = replace(entry, dtype="U8", shape=(*entry.shape[:-1], entry.shape[-1] // 2))
    elif entry.dtype in ("F8_E8M0", "I8"):
        entry = replace(entry, dtype="U8")
    return read_tensor(entry) if index is None else read_row(entry, index)


def exponents(scales: Tensor) -> Tensor:
    """E8M0 scales, each the exponent of a power of two, as fp32.

    Args:
        scales: uint8, any shape: the bytes of F8_E8M0.

    Returns:
        float32, same shape: 2**(byte - 127), and NaN for 255.

    Source: OCP Microscaling Formats 1.0, E8M0.
    """
    powers = torch.ldexp(torch.ones(256), torch.arange(256, dtype=torch.int32) - 127)
    powers[255] = torch.nan
    return powers[scales.int()]


def fp4_values(codes: Tensor) -> Tensor:
    """Two 4-bit floats of every byte, the low nibble first.

    Args:
        codes: uint8 [..., B], contiguous.

    Returns:
        float32 [..., 2B], without scales.
    """
    if codes.device.type != "cpu":
        return fp4_looked_up(codes)
    out = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1])
    pairs, flat = out.numpy().reshape(-1).view(np.float64), codes.numpy().reshape(-1)
    for begin in range(0, flat.size, _AT_ONCE):  # numpy makes eight bytes of every index
        part = slice(begin, begin + _AT_ONCE)
        np.take(_PAIRS, flat[part], out=pairs[part], mode="clip")
    return out


def fp4_looked_up(codes: Tensor) -> Tensor:
    """`fp4_values` in torch, for whatever device."""
    table = torch.from_numpy(_VALUES).to(codes.device)
    return table[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()]


def word_codes(words: Tensor, bits: int) -> Tensor:
    """Unsigned codes of words, the least significant bits first.

    Args:
        words: int32 [..., W].
        bits: 2, 4 or 8, which never straddle a byte.

    Returns:
        uint8 [..., W * 32 / bits].
    """
    packed = words.contiguous().flatten().view(torch.uint8).reshape(*words.shape[:-1], -1)
    if bits == 8:
        return packed
    shifted = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(shifted, dim=-1).flatten(-2)


def awq_codes(words: Tensor) -> Tensor:
    """Unsigned 4-bit codes in the order of the outputs they belong to.

    Args:
        words: int32 [..., W].

    Returns:
        uint8 [..., 8W].
    """
    nibble_of = torch.tensor(AWQ_ORDER).argsort().to(words.device)
    codes = word_codes(words, 4)
    return codes.reshape(*words.shape, 8)[..., nibble_of].reshape(codes.shape)


def one_more(words: Tensor, bits: int) -> Tensor:
    """GPTQ v1 zeros, which are stored one too low, as v2 has them: a one is added to every code of a word.

    The sum is one of whole words, as GPTQModel's: what v1 took from a code of 0 it borrowed from the next.

    Args:
        words: int32.
        bits: 2, 4 or 8.

    Returns:
        int32, same shape.
    """
    return words + sum(1 << shift for shift in range(0, 32, bits))  # wraps, as the borrow did


def scale_groups(values: Tensor, scales: Tensor) -> Tensor:
    """Multiply every group of columns by its scale, in place.

    Args:
        values: float32 [O, I].
        scales: float32 [O, G], G a divisor of I.

    Returns:
        `values`.
    """
    values.unflatten(1, (scales.shape[1], -1)).mul_(scales[:, :, None])
    return values


def rows_packed(words: Tensor, zeros: Tensor, scales: Tensor, group: int, bits: int) -> Tensor:
    """A matrix whose codes are packed along its columns: (code - zero) * scale.

    Args:
        words: int32 [O, W]; the last word of a row may be filled up.
        zeros: float32 [O, G], the codes that stand for 0, or [1, 1].
        scales: float32 [O, G].
        group: columns of a group; the last one may be cut off.
        bits: 2, 4 or 8.

    Returns:
        float32 [O, W * 32 / bits].
    """
    rows, columns = words.shape[0], words.shape[1] * 32 // bits
    out = torch.empty(rows, columns, device=words.device)
    groups = (
        torch.arange(columns, device=words.device).div(group, rounding_mode="floor").clamp_(max=scales.shape[1] - 1)
    )
    zeros = zeros.expand(scales.shape)
    for part in _chunks(rows, columns):
        codes = word_codes(words[part], bits)
        torch.sub(codes, zeros[part][:, groups], out=out[part])
        out[part].mul_(scales[part][:, groups])
    return out


def columns_packed(
    words: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, bits: int, *, awq: bool = False
) -> Tensor:
    """A matrix that is stored with the input axis first, as GPTQ and AWQ do: (code - zero) * scale.

    Args:
        words: int32 [I * bits / 32, O], packed along I (GPTQ), or [I, O * bits / 32], packed along O (AWQ).
        zeros: float32 [G, O], the codes that stand for 0.
        scales: float32 [G, O].
        groups: int64 [I], the group of every input.
        bits: 2, 4 or 8.
        awq: which of the two.

    Returns:
        float32 [O, I].
    """
    inputs, outputs = groups.shape[0], scales.shape[1]
    out, per_word = torch.empty(outputs, inputs, device=words.device), 1 if awq else 32 // bits
    for part in _chunks(words.shape[0], outputs * per_word):
        codes = awq_codes(words[part]) if awq else word_codes(words[part].mT, bits).mT
        where = groups[part.start * per_word : part.stop * per_word]
        out[:, part.start * per_word : part.stop * per_word] = (codes.sub(zeros[where]) * scales[where]).mT
    return out


def _chunks(rows: int, row_elements: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // max(1, row_elements))
    for begin in range(0, rows, step):
        yield slice(begin, min(rows, begin + step))
