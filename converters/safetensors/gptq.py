"""The GPTQ v1 layout (AutoGPTQ, GPTQModel): the tensors of one matrix.

| tensor | dtype | shape | content |
|---|---|---|---|
| `.qweight` | int32 | (in * bits / 32, out) | q + zero along in, least significant bits first |
| `.qzeros` | int32 | (groups, out * bits / 32) | zero - 1 along out; zero = 2**(bits-1) where codes are symmetric |
| `.scales` | float16 | (groups, out) | |
| `.g_idx` | int32 | (in,) | column // group size |

A reader computes W[o, i] = (stored[i, o] - zero[g_idx[i], o]) * scales[g_idx[i], o]. Groups are static and in the order
of the columns (`desc_act` false), whatever order the codes were solved in.

Letters: O out, I in, G groups. Sources: AutoGPTQ 0.7.1 `qlinear_cuda_old.py`, GPTQModel 7.7.0 `QuantizeConfig`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moepress.converters.safetensors.compressed_tensors import check_layer
from moepress.converters.safetensors.gptq_config import SUFFIXES
from moepress.converters.safetensors.packing import (
    pack_gptq_rows,
    pack_gptq_zero_points,
    pack_gptq_zeros,
    to_signed,
    to_unsigned,
    unpack_gptq_rows,
    unpack_gptq_zeros,
)
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, UnsupportedError


def layer_tensors(
    module_name: str, codes: Tensor, scales: Tensor, scheme: Scheme, zeros: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that stand for one quantized Linear.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        codes: int8 [O, I], O and I multiples of 32.
        scales: floating [O, G]; see `half_scales` for what happens to them.
        scheme: bits, group size and whether there are zero points.
        zeros: int16 [O, G], of an asymmetric scheme: signed as codes are.

    Returns:
        `.qweight`, `.qzeros`, `.scales` and `.g_idx` under the module's name.

    Raises:
        ValueError: shapes disagree with the scheme, or a code is out of range.
        UnsupportedError: O or I is not a multiple of 32, a scale is lost in float16, or a zero point the lowest code.
    """
    check_layer(module_name, codes, scales, scheme, zeros)
    out_features, in_features = codes.shape
    try:
        qweight = pack_gptq_rows(to_unsigned(codes, scheme.bits), scheme.bits)
        if zeros is None:
            qzeros = pack_gptq_zeros(-scheme.code_min, scheme.groups(in_features), out_features, scheme.bits)
        else:
            qzeros = pack_gptq_zero_points((zeros.to(torch.int16) - scheme.code_min).mT, scheme.bits)
        half = half_scales(scales)
    except UnsupportedError as error:
        raise UnsupportedError(f"{module_name}: {error}") from error
    return {
        f"{module_name}.qweight": qweight,
        f"{module_name}.qzeros": qzeros.to(codes.device),
        f"{module_name}.scales": half.mT.contiguous(),
        f"{module_name}.g_idx": trivial_g_idx(scheme, in_features).to(codes.device),
    }


def read_layer(module_name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and scales of one quantized Linear; the inverse of `layer_tensors`.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        tensors: at least the four tensors of that module, under their full names.
        scheme: bits and group size, from `parse_config`.

    Returns:
        codes int8 [O, I] and scales float16 [O, G].

    Raises:
        InvalidInputError: a tensor is missing, or the shapes disagree.
        UnsupportedError: a zero is not the one of a symmetric scheme, or the columns are not grouped in order.
    """
    missing = [module_name + suffix for suffix in SUFFIXES if module_name + suffix not in tensors]
    if missing:
        raise InvalidInputError(f"{', '.join(missing)} missing from the checkpoint; download or write it again.")
    qweight, qzeros, scales, g_idx = (tensors[module_name + suffix] for suffix in SUFFIXES)
    stored = unpack_gptq_rows(qweight, scheme.bits)
    out_features, in_features = stored.shape
    want = (scheme.groups(in_features), out_features)
    zeros = unpack_gptq_zeros(qzeros, scheme.bits)
    if tuple(scales.shape) != want or tuple(zeros.shape) != want or g_idx.shape != (in_features,):
        raise InvalidInputError(
            f"{module_name}: qweight is {out_features} x {in_features}, but scales are {tuple(scales.shape)}, zeros "
            f"{tuple(zeros.shape)}, want {want}, and g_idx {tuple(g_idx.shape)}; the files are not of one model."
        )
    if scheme.symmetric and not bool((zeros == -scheme.code_min).all()):
        raise UnsupportedError(
            f"{module_name}.qzeros are not all {-scheme.code_min} (stored less 1), and the config says that codes are "
            "symmetric: the v2 layout, which moepress does not read, or a wrong config."
        )
    if not torch.equal(g_idx.to(torch.int32).cpu(), trivial_g_idx(scheme, in_features)):
        raise UnsupportedError(f"{module_name}.g_idx puts columns in groups out of order (desc_act); not read here.")
    return to_signed(stored, scheme.bits), scales.mT.contiguous()


def read_zeros(module_name: str, tensors: Mapping[str, Tensor], scheme: Scheme, rows: int) -> Tensor | None:
    """Zero points of one quantized Linear, int16 [O, G], signed as codes are; None of a symmetric scheme.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        tensors: at least its `.qzeros` under its full name.
        scheme: bits and group size, from `parse_config`.
        rows: O.

    Raises:
        InvalidInputError: the tensor is not int32, or holds another number of rows.
    """
    if scheme.symmetric:
        return None
    unsigned_GO = unpack_gptq_zeros(tensors[f"{module_name}.qzeros"], scheme.bits)
    if unsigned_GO.shape[1] != rows:
        raise InvalidInputError(
            f"{module_name}.qzeros are for {unsigned_GO.shape[1]} rows of {rows}; the files are not of one model."
        )
    return unsigned_GO.mT.contiguous() + scheme.code_min


def trivial_g_idx(scheme: Scheme, in_features: int) -> Tensor:
    """The group of every column when groups are in order.

    Returns:
        int32 [I], column // columns per group.
    """
    return torch.arange(in_features, dtype=torch.int32) // scheme.columns_per_group(in_features)


def half_scales(scales: Tensor) -> Tensor:
    """Scales as float16, the only dtype that this layout stores.

    A bfloat16 scale between 2**-14 and 65504 is exact in float16 (8 bits of mantissa in 11); below, it is rounded to
    a multiple of 2**-24: `half_scale_error` tells by how much.

    Args:
        scales: floating, any shape.

    Returns:
        float16, same shape.

    Raises:
        UnsupportedError: a scale overflows to infinity, or a nonzero scale becomes zero.
    """
    half = scales.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        largest = float(scales.abs().max())
        raise UnsupportedError(
            f"a scale of {largest:.3g} does not fit float16, the dtype of scales in the GPTQ layout."
        )
    vanished = (half == 0) & (scales != 0)
    if bool(vanished.any()):
        smallest = float(scales[vanished].abs().min())
        raise UnsupportedError(
            f"a scale of {smallest:.3g} becomes 0 in float16, the dtype of scales in the GPTQ layout."
        )
    return half


def half_scale_error(scales: Tensor) -> float:
    """The largest relative change of a scale when it is stored as float16; 0.0 when the conversion is exact.

    Args:
        scales: floating, any shape.

    Returns:
        max |half - scale| / |scale|, zero scales left out.

    Raises:
        UnsupportedError: as `half_scales`.
    """
    half, exact = half_scales(scales).to(torch.float64), scales.to(torch.float64)
    change = torch.where(exact == 0, 0.0, (half - exact).abs() / exact.abs())
    return float(change.max()) if change.numel() else 0.0
