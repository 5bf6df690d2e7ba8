"""The compressed-tensors `pack-quantized` layout: the tensors of one matrix.

| tensor | dtype | shape | content |
|---|---|---|---|
| `.weight_packed` | int32 | (out, ceil(in * bits / 32)) | q + 2**(bits-1) along in, least significant bits first |
| `.weight_scale` | the model's | (out, groups) | weight = q * scale |
| `.weight_shape` | int64 | (2,) | [out, in] |
| `.weight_zero_point` | int32 | (ceil(out * bits / 32), groups) | zero + 2**(bits-1) along out |

The last is there where codes are asymmetric, and then weight = (q - zero) * scale.

Letters: O out, I in, G groups. Source: compressed-tensors 0.20 `PackedQuantizationCompressor`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moepress.converters.safetensors.compressed_tensors_config import ZERO_SUFFIX, suffixes_of
from moepress.converters.safetensors.packing import pack_bits, pack_compressed, unpack_bits, unpack_compressed
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, UnsupportedError

# What a matrix has besides when it is quantized in a way that we do not read.
_FOREIGN_SUFFIXES = {
    ".weight_g_idx": "columns grouped out of order (actorder group)",
    ".weight_global_scale": "a two-level scale",
}


def layer_tensors(
    module_name: str,
    codes: Tensor,
    scales: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    zeros: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors that stand for one quantized Linear.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        codes: int8 [O, I].
        scales: floating [O, G], each value representable in `scale_dtype`: the solver must have rounded them before it
            chose the codes.
        scheme: bits, group size and whether there are zero points.
        scale_dtype: dtype of the stored scales, the model's.
        zeros: int16 [O, G], of an asymmetric scheme: signed as codes are.

    Returns:
        `.weight_packed`, `.weight_scale`, `.weight_shape` and perhaps `.weight_zero_point` under the module's name.

    Raises:
        ValueError: shapes disagree with the scheme, a code is out of range, or a scale is not representable.
        UnsupportedError: a zero point is no code.
    """
    check_layer(module_name, codes, scales, scheme, zeros)
    stored_scales = scales.to(scale_dtype)
    if not torch.equal(stored_scales.to(scales.dtype), scales):
        raise ValueError(f"{module_name}: scales are not exact in {scale_dtype}; round them before choosing the codes")
    tensors = {
        f"{module_name}.weight_packed": pack_compressed(codes, scheme.bits),
        f"{module_name}.weight_scale": stored_scales.contiguous(),
        f"{module_name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zeros is not None:
        try:
            unsigned = unsigned_zeros(zeros, scheme)
        except UnsupportedError as error:
            raise UnsupportedError(f"{module_name}: {error}") from error
        tensors[module_name + ZERO_SUFFIX] = pack_bits(unsigned.mT, scheme.bits).mT.contiguous()
    return tensors


def read_layer(module_name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and scales of one quantized Linear; the inverse of `layer_tensors`.

    The bits must be told: a row of few columns has the same number of words at several widths.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        tensors: at least the three tensors of that module, under their full names.
        scheme: bits and group size, from `parse_config`.

    Returns:
        codes int8 [O, I] and scales [O, G] in their stored dtype.

    Raises:
        InvalidInputError: a tensor is missing, or its shape or dtype is not what `.weight_shape` says.
        UnsupportedError: the matrix has an activation order, or zero points and the scheme none.
    """
    for suffix, meaning in _FOREIGN_SUFFIXES.items():
        if module_name + suffix in tensors:
            raise UnsupportedError(f"{module_name}{suffix} means {meaning}, which moepress does not read.")
    suffixes = suffixes_of(scheme)
    missing = [module_name + suffix for suffix in suffixes if module_name + suffix not in tensors]
    if missing:
        raise InvalidInputError(f"{', '.join(missing)} missing from the checkpoint; download or write it again.")
    if scheme.symmetric and module_name + ZERO_SUFFIX in tensors:
        raise UnsupportedError(f"{module_name}{ZERO_SUFFIX} is there, and config.json says that codes are symmetric.")
    packed, scales, shape = (tensors[module_name + suffix] for suffix in suffixes[:3])
    out_features, in_features = (int(size) for size in shape.tolist())
    want_scales = (out_features, scheme.groups(in_features))
    if packed.shape[0] != out_features or tuple(scales.shape) != want_scales:
        raise InvalidInputError(
            f"{module_name}: weight_shape says {out_features} x {in_features}, but {packed.shape[0]} rows are packed "
            f"and the scales are {tuple(scales.shape)}, want {want_scales}; the files are not of one model."
        )
    return unpack_compressed(packed, scheme.bits, in_features), scales


def read_zeros(module_name: str, tensors: Mapping[str, Tensor], scheme: Scheme, rows: int) -> Tensor | None:
    """Zero points of one quantized Linear, int16 [O, G], signed as codes are; None of a symmetric scheme.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        tensors: at least its `.weight_zero_point`, where the scheme has one, under its full name.
        scheme: bits and group size, from `parse_config`.
        rows: O.

    Raises:
        InvalidInputError: the tensor is missing, is not int32, or does not hold so many rows.
    """
    if scheme.symmetric:
        return None
    name = module_name + ZERO_SUFFIX
    if name not in tensors:
        raise InvalidInputError(f"{name} missing from the checkpoint; download or write it again.")
    try:
        stored = unpack_bits(tensors[name].mT, scheme.bits, rows).mT.contiguous()
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: {error}") from error
    return stored.to(torch.int16) + scheme.code_min


def unsigned_zeros(zeros: Tensor, scheme: Scheme) -> Tensor:
    """Zero points as unsigned codes, uint8: zero + 2**(bits-1).

    Raises:
        UnsupportedError: one is no code; the GPTQ layout can hold one step more than others.
    """
    unsigned = zeros.to(torch.int16) - scheme.code_min
    if unsigned.numel() and (int(unsigned.min()) < 0 or int(unsigned.max()) >= 1 << scheme.bits):
        raise UnsupportedError(
            f"a zero point lies beyond the codes of {scheme.bits} bits, which the GPTQ layout alone can hold."
        )
    return unsigned.to(torch.uint8)


def check_layer(module_name: str, codes: Tensor, scales: Tensor, scheme: Scheme, zeros: Tensor | None = None) -> None:
    """Shapes that belong together: one scale, and perhaps one zero point, per output row and group.

    Raises:
        ValueError: they do not.
    """
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"{module_name}: codes are {codes.dtype} {tuple(codes.shape)}, want int8 [out, in]")
    want = (codes.shape[0], scheme.groups(codes.shape[1]))
    if tuple(scales.shape) != want or not scales.is_floating_point():
        raise ValueError(f"{module_name}: scales are {scales.dtype} {tuple(scales.shape)}, want floating {want}")
    if (zeros is None) != scheme.symmetric or (zeros is not None and tuple(zeros.shape) != want):
        raise ValueError(f"{module_name}: zero points do not fit the scheme, which wants {want} or none")
