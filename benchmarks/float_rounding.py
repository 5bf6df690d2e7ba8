"""4-bit floats rounded to nearest by compressed-tensors, with the scales that llm-compressor takes: absmax."""

from dataclasses import dataclass

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

from moepress.converters.safetensors.scheme import FLOAT_GROUPS, Codes
from moepress.models.storage.checkpoint import SourceView

_PRESETS = {Codes.NVFP4: "NVFP4A16", Codes.MXFP4: "MXFP4A16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedFloats(SourceView):
    """A checkpoint some of whose matrices are rounded, without calibration."""

    codes: Codes
    names: frozenset[str]

    def read(self, name: str) -> torch.Tensor:
        weight = self.base.read(name)
        return rounded(weight.float(), self.codes).to(weight.dtype) if name in self.names else weight

    def read_row(self, name: str, row: int) -> torch.Tensor:
        return self.read(name)[row] if name in self.names else self.base.read_row(name, row)


def rounded(weight_OI: torch.Tensor, codes: Codes) -> torch.Tensor:
    """What is left of a matrix, fp32."""
    args = preset_name_to_scheme(_PRESETS[codes], ["Linear"]).weights
    assert args is not None
    grouped_OGg = weight_OI.unflatten(1, (-1, FLOAT_GROUPS[codes]))
    least, largest = grouped_OGg.amin(dim=-1), grouped_OGg.amax(dim=-1)
    divisor = generate_gparam(least.amin(), largest.amax()) if codes is Codes.NVFP4 else None
    scales_OG, zeros_OG = calculate_qparams(least, largest, args, global_scale=divisor)
    return fake_quantize(weight_OI, scales_OG, zeros_OG, args, global_scale=divisor)
