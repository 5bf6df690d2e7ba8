"""The compressed-tensors `pack-quantized` layout: the tensors of one matrix.

| tensor | dtype | shape | content |
|---|---|---|---|
| `.weight_packed` | int32 | (out, ceil(in * bits / 32)) | q + 2**(bits-1) along in, least significant bits first |
| `.weight_scale` | the model's | (out, groups) | weight = q * scale |
| `.weight_shape` | int64 | (2,) | [out, in] |

Letters: O out, I in, G groups. Source: compressed-tensors 0.20 `PackedQuantizationCompressor`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moepress.converters.safetensors.compressed_tensors_config import SUFFIXES
from moepress.converters.safetensors.packing import pack_compressed, unpack_compressed
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, UnsupportedError

# What a matrix has beside those three when it is quantized in a way that we do not read.
_FOREIGN_SUFFIXES = {
    ".weight_zero_point": "asymmetric codes",
    ".weight_g_idx": "columns grouped out of order (actorder group)",
    ".weight_global_scale": "a two-level scale",
}


def layer_tensors(
    module_name: str, codes: Tensor, scales: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors that stand for one quantized Linear.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        codes: int8 [O, I].
        scales: floating [O, G], each value representable in `scale_dtype`: the solver must have rounded them before it
            chose the codes.
        scheme: bits and group size.
        scale_dtype: dtype of the stored scales, the model's.

    Returns:
        `.weight_packed`, `.weight_scale` and `.weight_shape` under the module's name.

    Raises:
        ValueError: shapes disagree with the scheme, a code is out of range, or a scale is not representable.
    """
    check_layer(module_name, codes, scales, scheme)
    stored_scales = scales.to(scale_dtype)
    if not torch.equal(stored_scales.to(scales.dtype), scales):
        raise ValueError(f"{module_name}: scales are not exact in {scale_dtype}; round them before choosing the codes")
    return {
        f"{module_name}.weight_packed": pack_compressed(codes, scheme.bits),
        f"{module_name}.weight_scale": stored_scales.contiguous(),
        f"{module_name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


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
        UnsupportedError: the matrix has zero points or an activation order.
    """
    for suffix, meaning in _FOREIGN_SUFFIXES.items():
        if module_name + suffix in tensors:
            raise UnsupportedError(f"{module_name}{suffix} means {meaning}, which moepress does not read.")
    missing = [module_name + suffix for suffix in SUFFIXES if module_name + suffix not in tensors]
    if missing:
        raise InvalidInputError(f"{', '.join(missing)} missing from the checkpoint; download or write it again.")
    packed, scales, shape = (tensors[module_name + suffix] for suffix in SUFFIXES)
    out_features, in_features = (int(size) for size in shape.tolist())
    want_scales = (out_features, scheme.groups(in_features))
    if packed.shape[0] != out_features or tuple(scales.shape) != want_scales:
        raise InvalidInputError(
            f"{module_name}: weight_shape says {out_features} x {in_features}, but {packed.shape[0]} rows are packed "
            f"and the scales are {tuple(scales.shape)}, want {want_scales}; the files are not of one model."
        )
    return unpack_compressed(packed, scheme.bits, in_features), scales


def check_layer(module_name: str, codes: Tensor, scales: Tensor, scheme: Scheme) -> None:
    """Shapes that belong together: one scale per output row and group.

    Raises:
        ValueError: they do not.
    """
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"{module_name}: codes are {codes.dtype} {tuple(codes.shape)}, want int8 [out, in]")
    want = (codes.shape[0], scheme.groups(codes.shape[1]))
    if tuple(scales.shape) != want or not scales.is_floating_point():
        raise ValueError(f"{module_name}: scales are {scales.dtype} {tuple(scales.shape)}, want floating {want}")
