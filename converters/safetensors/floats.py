"""The compressed-tensors `nvfp4-pack-quantized` and `mxfp4-pack-quantized` layouts: the tensors of one matrix.

| tensor | dtype | shape | content |
|---|---|---|---|
| `.weight_packed` | uint8 | (out, in / 2) | two E2M1 floats a byte, the even column in the low half |
| `.weight_scale`, of NVFP4 | float8_e4m3fn | (out, in / 16) | the scale of a group |
| `.weight_scale`, of MXFP4 | uint8 | (out, in / 32) | the exponent of two + 127 |
| `.weight_global_scale` | float32, of NVFP4 alone | (1,) | what scales are divided by |

NVFP4's weight is float * (scale / divisor), MXFP4's float * 2**(byte - 127). What runtimes join to one matrix (gate and
up; query, key and value) has one divisor: vLLM takes that of the first, or the largest, for all of it.

Letters: O out, I in, G groups, E matrices. Sources: compressed-tensors 0.20 `NVFP4PackedCompressor`,
`MXFP4PackedCompressor`, `generate_gparam`; vLLM's `CompressedTensorsW4A16Fp4` and its NVFP4 method for experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moepress.converters.safetensors.compressed_tensors_config import FLOAT_SUFFIXES
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.errors import InvalidInputError
from moepress.models.storage.unpack import E2M1, exponents

LARGEST_FLOAT = E2M1[-1]
LARGEST_SCALE = 448.0  # of E4M3
_SCALE_DTYPES = {Codes.NVFP4: torch.float8_e4m3fn, Codes.MXFP4: torch.uint8}
_LEAST_MAGNITUDE = 1e-30  # whose divisor fp32 still holds


def divisors(largest_E: Tensor) -> Tensor:
    """The divisor of each matrix by its largest magnitude: the scale of the group that holds that becomes the largest
    of E4M3. 1 where a matrix holds nothing.

    Args:
        largest_E: fp32, >= 0.

    Returns:
        fp32 [E].
    """
    safe_E = largest_E.clamp(min=_LEAST_MAGNITUDE)
    return torch.where(largest_E > _LEAST_MAGNITUDE, LARGEST_SCALE * LARGEST_FLOAT / safe_E, 1.0).float()


def from_levels(numbers: Tensor) -> Tensor:
    """Numbers of the levels of E2M1 in ascending order, 0 to 14, as codes: magnitudes with the sign in bit 3; int8."""
    return torch.where(numbers < 7, 15 - numbers, numbers - 7).to(torch.int8)


def values(codes: Tensor) -> Tensor:
    """What codes stand for before their scale: fp32, of int8 from 0 to 15."""
    table = torch.tensor([*E2M1, *(-size for size in E2M1)], device=codes.device)
    return table[codes.int()]


def power_bytes(scales: Tensor) -> Tensor:
    """Powers of two in fp32 as bytes of E8M0, the inverse of `exponents`: the exponent that fp32 stores, which of its
    one subnormal power here, 2^-127, is 0."""
    return (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def pack(codes_OI: Tensor) -> Tensor:
    """Two codes a byte: uint8 [O, I / 2] of int8 [O, I]."""
    bytes_OI = codes_OI.view(torch.uint8)
    return bytes_OI[:, 0::2] | bytes_OI[:, 1::2] << 4


def unpack(packed_OB: Tensor) -> Tensor:
    """The inverse of `pack`: int8 [O, 2B]."""
    return torch.stack((packed_OB & 15, packed_OB >> 4), dim=-1).flatten(-2).view(torch.int8)


def layer_tensors(
    module_name: str, codes: Tensor, scales: Tensor, divisor: Tensor | None, scheme: Scheme
) -> dict[str, Tensor]:
    """The tensors that stand for one quantized Linear.

    Args:
        module_name: the Linear's name in the checkpoint, without `.weight`.
        codes: int8 [O, I], 0 to 15.
        scales: fp32 [O, G], each exactly what the format holds, without the divisor.
        divisor: of NVFP4, fp32 of one element.
        scheme: which format.

    Raises:
        ValueError: shapes disagree with the scheme, or a scale is not exact.
    """
    want = (codes.shape[0], scheme.groups(codes.shape[1]))
    if codes.dtype != torch.int8 or tuple(scales.shape) != want:
        raise ValueError(f"{module_name}: {codes.dtype} codes and scales {tuple(scales.shape)}, want int8 and {want}")
    if scheme.codes is Codes.MXFP4:
        stored = power_bytes(scales)
        back = exponents(stored)
    else:
        stored = scales.to(torch.float8_e4m3fn)
        back = stored.float()
    if not torch.equal(back, scales):
        raise ValueError(f"{module_name}: scales are not exact in {scheme.codes}; round them before choosing the codes")
    tensors = {f"{module_name}.weight_packed": pack(codes), f"{module_name}.weight_scale": stored.contiguous()}
    if scheme.codes is Codes.NVFP4:
        assert divisor is not None, "NVFP4 has one"
        tensors[f"{module_name}.weight_global_scale"] = divisor.float().reshape(1)
    return tensors


def read_layer(module_name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and scales of one quantized Linear, whose scales have been divided.

    Returns:
        codes int8 [O, I], 0 to 15, and scales fp32 [O, G].

    Raises:
        InvalidInputError: a tensor is missing, does not fit the others, or holds no number.
    """
    missing = [module_name + suffix for suffix in FLOAT_SUFFIXES[scheme.codes] if module_name + suffix not in tensors]
    if missing:
        raise InvalidInputError(f"{', '.join(missing)} missing from the checkpoint; download or write it again.")
    packed, stored = tensors[f"{module_name}.weight_packed"], tensors[f"{module_name}.weight_scale"]
    want = (packed.shape[0], scheme.groups(2 * packed.shape[1]))
    if packed.dtype != torch.uint8 or tuple(stored.shape) != want:
        raise InvalidInputError(
            f"{module_name}: {packed.dtype} codes {tuple(packed.shape)} have scales {tuple(stored.shape)}, want "
            f"{want}; the files are not of one model."
        )
    return unpack(packed), read_scales(module_name, tensors, scheme)


def read_scales(module_name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """What codes are multiplied by, fp32 [O, G], from the parts that hold scales.

    Raises:
        InvalidInputError: a part has another dtype, or holds no number.
    """
    stored = tensors[f"{module_name}.weight_scale"]
    if stored.dtype != _SCALE_DTYPES[scheme.codes]:
        raise InvalidInputError(
            f"{module_name}.weight_scale is {stored.dtype}, and {scheme.codes} has {_SCALE_DTYPES[scheme.codes]}; "
            "the folder is not in this layout."
        )
    if scheme.codes is Codes.MXFP4:
        scales = exponents(stored)
    else:
        divisor = tensors[f"{module_name}.weight_global_scale"]
        if divisor.numel() != 1 or not float(divisor) > 0:
            raise InvalidInputError(f"{module_name}.weight_global_scale is no positive number; download it again.")
        scales = stored.float() / divisor.float().reshape(())
    if not bool(torch.isfinite(scales).all()):
        raise InvalidInputError(f"{module_name}.weight_scale holds NaN or Inf; download the folder again.")
    return scales


def dense(codes_OI: Tensor, scales_OG: Tensor, *, exact: bool = False) -> Tensor:
    """The weights that codes stand for, [O, I]: products in fp32, which compressed-tensors rounds to bf16.

    Args:
        codes_OI: int8, 0 to 15.
        scales_OG: fp32, as `read_layer` gives them.
        exact: leave the products as they are.
    """
    grouped = values(codes_OI).unflatten(1, (scales_OG.shape[1], -1))
    weight: Tensor = grouped.mul_(scales_OG[:, :, None]).flatten(1)
    return weight if exact else weight.to(torch.bfloat16)
