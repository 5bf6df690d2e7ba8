"""GGUF's block types: what a row's bytes mean, as data, and the way from codes and scales to bytes and back.

Letters: O rows, I columns, B blocks of a row, G groups of a row (columns that share a scale). A weight is

    (d * (s - scale_zero)) * (q - zero) - dmin * m        or, with a table,        (d * (s - scale_zero)) * table[q]

multiplied in fp32 from left to right, as ggml does. d and dmin are fp16 numbers of a block, s and m small integers of
a group; where a type has no s, d is the group's scale (and dmin, of Q4_1 and Q5_1, is what is added).

| type | block | its bytes in order (n = bytes) |
|---|---|---|
| Q4_0, IQ4_NL | 32 | d, qs 16 |
| Q4_1 | 32 | d, m, qs 16 |
| Q5_0, Q5_1 | 32 | d, (m,) qh 4, qs 16 |
| Q8_0 | 32 | d, int8 32 |
| MXFP4 | 32 | e 1, qs 16 |
| Q2_K | 256 | (s and m) 16, qs 64, d, dmin |
| Q3_K | 256 | hmask 32, qs 64, s 12, d |
| Q4_K | 256 | d, dmin, (s and m) 12, qs 128 |
| Q5_K | 256 | d, dmin, (s and m) 12, qh 32, qs 128 |
| Q6_K | 256 | ql 128, qh 64, s int8 16, d |
| IQ4_XS | 256 | d, s high 2, s low 4, qs 128 |

Source: llama.cpp's ggml-common.h and the `gguf` package's dequantizers, which the tests hold every type against.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.models.storage.block_types import BlockType


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A matrix in a block type, taken apart.

    Attributes:
        codes: [O, I] uint8, as stored: from 0 on.
        d: [O, B] fp16 (of MXFP4 the exponents, uint8).
        scales: [O, G] uint8, as stored: from 0 on; None where the type has none.
        dmin: [O, B] fp16, or None.
        minima: [O, G] uint8, or None.
    """

    codes: Tensor
    d: Tensor
    scales: Tensor | None = None
    dmin: Tensor | None = None
    minima: Tensor | None = None


def pack(kind: BlockType, blocks: Blocks) -> Tensor:
    """The bytes of a matrix, [O, B * size] uint8."""
    codes = blocks.codes.unflatten(1, (-1, kind.columns))
    fields = _FIELDS[kind.name](kind, blocks, codes)
    return torch.cat([field.reshape(*codes.shape[:2], -1) for field in fields], dim=2).flatten(1)


def unpack(kind: BlockType, data: Tensor) -> Blocks:
    """The inverse of `pack`; data is [O, B * size] uint8."""
    return _APART[kind.name](kind, data.unflatten(1, (-1, kind.size)))


def values(kind: BlockType, blocks: Blocks) -> Tensor:
    """The weights that a matrix stands for, [O, I] fp32, as ggml computes them."""
    grouped = blocks.codes.unflatten(1, (-1, kind.group))
    levels = grouped.float() - kind.zero if kind.table is None else _looked_up(kind.table, grouped)
    scale, minimum = group_scales(kind, blocks)
    weights = scale[:, :, None] * levels
    if minimum is not None:
        weights = weights + minimum[:, :, None]
    return weights.flatten(1)


def group_scales(kind: BlockType, blocks: Blocks) -> tuple[Tensor, Tensor | None]:
    """What each group's levels are multiplied by, and what is added then: [O, G] fp32 each."""
    if kind.name == "MXFP4":
        return torch.ldexp(torch.full(blocks.d.shape, 0.5), blocks.d.int() - 127), None
    of_block = kind.columns // kind.group
    scale = blocks.d.float().repeat_interleave(of_block, dim=1)
    if blocks.scales is not None:
        scale = scale * (blocks.scales.float() - kind.scale_zero)
    if blocks.dmin is None:
        return scale, None
    minimum = blocks.dmin.float().repeat_interleave(of_block, dim=1)
    return scale, minimum if blocks.minima is None else -(minimum * blocks.minima.float())


def _looked_up(table: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.float32)[codes.int()]


def _halves(half: Tensor) -> Tensor:
    """fp16 [O, B] as bytes [O, B, 2]."""
    return half.to(torch.float16).contiguous()[:, :, None].view(torch.uint8)


def _half(data: Tensor) -> Tensor:
    """Bytes [O, B, 2] as fp16 [O, B]."""
    return data.contiguous().view(torch.float16)[:, :, 0]


def _pairs(low: Tensor, high: Tensor) -> Tensor:
    return (low & 15) | (high & 15) << 4


def _bits(parts: Tensor, width: int) -> Tensor:
    """Numbers along the axis before the last, one above the other in the bits of a byte: [.., n, m] to [.., m]."""
    out = torch.zeros_like(parts[..., 0, :])
    for place in range(parts.shape[-2]):
        out |= parts[..., place, :] << (place * width)
    return out


def _unbits(data: Tensor, count: int, width: int) -> Tensor:
    """The inverse of `_bits`: [.., m] to [.., count, m]."""
    return torch.stack([data >> (place * width) & (1 << width) - 1 for place in range(count)], dim=-2)


# Blocks of 32 -------------------------------------------------------------------------------------------------------


def _low32(codes: Tensor) -> Tensor:
    """Code j in the low half of byte j, code j + 16 in the high one."""
    return _pairs(codes[..., :16], codes[..., 16:])


def _unlow32(data: Tensor) -> Tensor:
    return torch.cat((data & 15, data >> 4), dim=-1)


def _fifth(codes: Tensor) -> Tensor:
    """The fifth bits of 32 codes, 4 bytes."""
    return _bits((codes >> 4).unflatten(-1, (4, 8)).mT, 1)


def _simple(kind: BlockType, blocks: Blocks, codes: Tensor) -> list[Tensor]:
    fields = [blocks.d if kind.name == "MXFP4" else _halves(blocks.d)]
    if blocks.dmin is not None:
        fields.append(_halves(blocks.dmin))
    if kind.bits == 8:
        return [*fields, (codes.int() - kind.zero).to(torch.int8).view(torch.uint8)]
    return [*fields, *([_fifth(codes)] if kind.bits == 5 else []), _low32(codes)]


def _simple_apart(kind: BlockType, data: Tensor) -> Blocks:
    head = 1 if kind.name == "MXFP4" else 2
    d = data[..., 0] if head == 1 else _half(data[..., :2])
    dmin = _half(data[..., 2:4]) if kind.minimum else None
    rest = data[..., 4 if kind.minimum else head :]
    if kind.bits == 8:
        codes = (rest.contiguous().view(torch.int8).int() + kind.zero).to(torch.uint8)
    elif kind.bits == 5:
        codes = _unlow32(rest[..., 4:]) | _unbits(rest[..., :4], 8, 1).mT.flatten(-2) << 4
    else:
        codes = _unlow32(rest)
    return Blocks(codes=codes.flatten(1), d=d, dmin=dmin)


# Blocks of 256 ------------------------------------------------------------------------------------------------------


def _low_runs(codes: Tensor) -> Tensor:
    """The low 4 bits of 8 runs of 32: runs 2k and 2k + 1 share 32 bytes."""
    runs = codes.unflatten(-1, (4, 2, 32))
    return _pairs(runs[..., 0, :], runs[..., 1, :]).flatten(-2)


def _unlow_runs(data: Tensor) -> Tensor:
    pairs = data.unflatten(-1, (4, 32))
    return torch.stack((pairs & 15, pairs >> 4), dim=-2).flatten(-3)


def _quarters(codes: Tensor) -> Tensor:
    """2 bits of each code: per half of 128 four runs of 32, one above the other in 32 bytes."""
    return _bits(codes.unflatten(-1, (2, 4, 32)), 2).flatten(-2)


def _unquarters(data: Tensor) -> Tensor:
    return _unbits(data.unflatten(-1, (2, 32)), 4, 2).flatten(-3)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits in 12 bytes, as Q4_K and Q5_K have them."""
    s, m = scales.unflatten(1, (-1, 8)), minima.unflatten(1, (-1, 8))
    first = s[..., :4] | (s[..., 4:] >> 4) << 6
    second = m[..., :4] | (m[..., 4:] >> 4) << 6
    return torch.cat((first, second, _pairs(s[..., 4:], m[..., 4:])), dim=-1)


def _unsix_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = data[..., :4], data[..., 4:8], data[..., 8:12]
    scales = torch.cat((first & 63, third & 15 | (first >> 6) << 4), dim=-1)
    minima = torch.cat((second & 63, third >> 4 | (second >> 6) << 4), dim=-1)
    return scales.flatten(1), minima.flatten(1)


def _q4_k(_kind: BlockType, blocks: Blocks, codes: Tensor) -> list[Tensor]:
    assert blocks.scales is not None
    assert blocks.minima is not None
    assert blocks.dmin is not None
    return [_halves(blocks.d), _halves(blocks.dmin), _six_bits(blocks.scales, blocks.minima), _low_runs(codes)]


def _q4_k_apart(_kind: BlockType, data: Tensor) -> Blocks:
    scales, minima = _unsix_bits(data[..., 4:16])
    codes = _unlow_runs(data[..., 16:])
    return Blocks(
        codes=codes.flatten(1), d=_half(data[..., :2]), dmin=_half(data[..., 2:4]), scales=scales, minima=minima
    )


def _q5_k(kind: BlockType, blocks: Blocks, codes: Tensor) -> list[Tensor]:
    *head, low = _q4_k(kind, blocks, codes)
    return [*head, _bits((codes >> 4).unflatten(-1, (8, 32)), 1), low]


def _q5_k_apart(_kind: BlockType, data: Tensor) -> Blocks:
    scales, minima = _unsix_bits(data[..., 4:16])
    codes = _unlow_runs(data[..., 48:]) | _unbits(data[..., 16:48], 8, 1).flatten(-2) << 4
    return Blocks(
        codes=codes.flatten(1), d=_half(data[..., :2]), dmin=_half(data[..., 2:4]), scales=scales, minima=minima
    )


def _q6_k(kind: BlockType, blocks: Blocks, codes: Tensor) -> list[Tensor]:
    assert blocks.scales is not None
    runs = codes.unflatten(-1, (2, 4, 32))
    low = _pairs(runs[..., :2, :], runs[..., 2:, :]).flatten(-3)
    signed = (blocks.scales.int() - kind.scale_zero).to(torch.int8).view(torch.uint8)
    return [low, _quarters(codes >> 4), signed.unflatten(1, (-1, 16)), _halves(blocks.d)]


def _q6_k_apart(kind: BlockType, data: Tensor) -> Blocks:
    pairs = data[..., :128].unflatten(-1, (2, 2, 32))
    codes = torch.cat((pairs & 15, pairs >> 4), dim=-2).flatten(-3) | _unquarters(data[..., 128:192]) << 4
    signed = data[..., 192:208].contiguous().view(torch.int8).int()
    scales = (signed + kind.scale_zero).to(torch.uint8).flatten(1)
    return Blocks(codes=codes.flatten(1), d=_half(data[..., 208:]), scales=scales)


def _q3_k(_kind: BlockType, blocks: Blocks, codes: Tensor) -> list[Tensor]:
    assert blocks.scales is not None
    s = blocks.scales.unflatten(1, (-1, 16))
    scales = torch.cat((_pairs(s[..., :8], s[..., 8:]), _bits((s >> 4).unflatten(-1, (4, 4)), 2)), dim=-1)
    mask = _bits((codes >> 2).unflatten(-1, (8, 32)), 1)
    return [mask, _quarters(codes & 3), scales, _halves(blocks.d)]


def _q3_k_apart(_kind: BlockType, data: Tensor) -> Blocks:
    codes = _unquarters(data[..., 32:96]) | _unbits(data[..., :32], 8, 1).flatten(-2) << 2
    low, high = data[..., 96:104], data[..., 104:108]
    scales = torch.cat((low & 15, low >> 4), dim=-1) | _unbits(high, 4, 2).flatten(-2) << 4
    return Blocks(codes=codes.flatten(1), d=_half(data[..., 108:]), scales=scales.flatten(1))


def _q2_k(_kind: BlockType, blocks: Blocks, codes: Tensor) -> list[Tensor]:
    assert blocks.scales is not None
    assert blocks.minima is not None
    assert blocks.dmin is not None
    both = _pairs(blocks.scales, blocks.minima).unflatten(1, (-1, 16))
    return [both, _quarters(codes), _halves(blocks.d), _halves(blocks.dmin)]


def _q2_k_apart(_kind: BlockType, data: Tensor) -> Blocks:
    both = data[..., :16].flatten(1)
    return Blocks(
        codes=_unquarters(data[..., 16:80]).flatten(1),
        d=_half(data[..., 80:82]),
        dmin=_half(data[..., 82:]),
        scales=both & 15,
        minima=both >> 4,
    )


def _iq4_xs(_kind: BlockType, blocks: Blocks, codes: Tensor) -> list[Tensor]:
    assert blocks.scales is not None
    s = blocks.scales.unflatten(1, (-1, 8))
    high = _bits((s >> 4).unflatten(-1, (2, 4)).mT, 2)
    low = _pairs(s[..., 0::2], s[..., 1::2])
    return [_halves(blocks.d), high, low, _low32(codes.unflatten(-1, (8, 32)))]


def _iq4_xs_apart(_kind: BlockType, data: Tensor) -> Blocks:
    high, low = _unbits(data[..., 2:4], 4, 2).mT.flatten(-2), data[..., 4:8]
    scales = torch.stack((low & 15, low >> 4), dim=-1).flatten(-2) | high << 4
    codes = _unlow32(data[..., 8:].unflatten(-1, (8, 16)))
    return Blocks(codes=codes.flatten(1), d=_half(data[..., :2]), scales=scales.flatten(1))


_FIELDS: dict[str, Callable[[BlockType, Blocks, Tensor], list[Tensor]]] = dict.fromkeys(
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"), _simple
) | {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_XS": _iq4_xs}
_APART: dict[str, Callable[[BlockType, Tensor], Blocks]] = dict.fromkeys(
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"), _simple_apart
) | {
    "Q2_K": _q2_k_apart,
    "Q3_K": _q3_k_apart,
    "Q4_K": _q4_k_apart,
    "Q5_K": _q5_k_apart,
    "Q6_K": _q6_k_apart,
    "IQ4_XS": _iq4_xs_apart,
}
