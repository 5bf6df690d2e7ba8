"""Dense arithmetic in the place of vLLM's int4 kernels, which a CPU without AMX does not have.

vLLM has a backend that dequantizes codes at load time (`--moe-backend emulation`); it is of 4 bits, in bf16, and its
matrix products are for GPUs. Here the class of that backend becomes vLLM's own unquantized experts for the CPU, filled
with code * scale in fp32 for any width; and Linears get a kernel of the same kind. All before that stays vLLM's:
config, schemes, `ignore` and `dynamic`, names, shapes, shards, how experts are stacked, routing, attention.

Letters: E experts, O out, I in, G groups, W words of 32 bits.
"""

import torch
from torch import Tensor

BACKEND = "emulation"


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Numbers of `bits` bits, int64 [..., count], of little-endian streams of int32 words [..., W]."""
    stream = (words.to(torch.int64).unsqueeze(-1) >> torch.arange(32)) & 1
    each = stream.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    return (each << torch.arange(bits)).sum(-1)


def weights(words_OW: Tensor, scales_OG: Tensor, bits: int, columns: int, zeros_OG: Tensor | None = None) -> Tensor:
    """(code - zero) * scale in fp32, [..., O, I]; without zeros code - 2**(bits-1)."""
    groups = scales_OG.shape[-1]
    codes = unpacked(words_OW, bits, columns).unflatten(-1, (groups, -1))
    zeros = 1 << (bits - 1) if zeros_OG is None else zeros_OG.unsqueeze(-1)
    return ((codes - zeros).float() * scales_OG.float().unsqueeze(-1)).flatten(-2)


def zero_points(words: Tensor | None, bits: int, rows: int, stored_less: int) -> Tensor | None:
    """Zero points [..., O, G] of words [..., W, G] packed along O; GPTQ v1 stores them less 1."""
    if words is None:
        return None
    return unpacked(words.transpose(-1, -2), bits, rows).transpose(-1, -2) + stored_less


def floats(packed: Tensor, scales: Tensor) -> Tensor:
    """E2M1 * scale in fp32, [..., O, I], of bytes [..., O, I / 2] with the even column in the low half."""
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    values = torch.cat((sizes, -sizes))[codes.int()]
    return (values.unflatten(-1, (scales.shape[-1], -1)) * scales.float().unsqueeze(-1)).flatten(-2)


def install() -> None:
    """Put all of it into vLLM, before a model is loaded."""
    _experts()
    _float_experts()
    _linears()
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    for config in (AutoGPTQConfig, CompressedTensorsConfig):
        config.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32])


def _experts() -> None:
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe import config as moe_config
    from vllm.model_executor.layers.fused_moe.experts import int4_emulation_moe
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.quantization import auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as compressed,
    )

    class DenseExperts(CPUUnquantizedExperts):
        @staticmethod
        def _supports_quant_scheme(weight_key, activation_key) -> bool:
            return activation_key is None

    def convert(backend, layer, quant_config, input_dtype, w13, w2, w13_scale, w2_scale, **parts):
        is_gptq = isinstance(quant_config, auto_gptq.AutoGPTQConfig)
        bits = quant_config.weight_bits if is_gptq else quant_config.num_bits
        columns = layer.moe_config.hidden_dim, layer.moe_config.intermediate_size_per_partition
        made = []
        for words, scales, width, key in ((w13, w13_scale, columns[0], "w13"), (w2, w2_scale, columns[1], "w2")):
            zeros = zero_points(parts.get(f"{key}_qzeros"), bits, scales.shape[1], int(is_gptq))
            dense = weights(words.data, scales.data, bits, width, zeros)
            made.append(cpu_prepack_moe_weight(dense, DenseExperts.isa))
        nothing = torch.ones(1)
        return (*made, nothing, nothing, None, None, None, None, None, None)

    int4_emulation_moe.Int4EmulationTritonExperts = DenseExperts
    for module in (auto_gptq, compressed):
        module.convert_to_wna16_moe_kernel_format = convert
    # The codes are gone when these are asked for.
    compressed.make_wna16_moe_quant_config = lambda **_: moe_config.FUSED_MOE_UNQUANTIZED_CONFIG
    moe_config.gptq_marlin_moe_quant_config = lambda **_: moe_config.FUSED_MOE_UNQUANTIZED_CONFIG


def _float_experts() -> None:
    """NVFP4 and MXFP4, whose weights vLLM's unquantized experts take over once they are dense."""
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_mxfp4 as mxfp4,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as nvfp4,
    )
    from vllm.model_executor.utils import replace_parameter

    class DenseExperts(CPUUnquantizedExperts):
        @staticmethod
        def _supports_quant_scheme(weight_key, activation_key) -> bool:
            return activation_key is None

    def convert(w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2, **_others):
        dense = [
            floats(words.data, scales.data) * whole[:, None, None]
            for words, scales, whole in ((w13, w13_scale, w13_scale_2), (w2, w2_scale, w2_scale_2))
        ]
        one = torch.ones(1)
        return dense[0], one, one, None, dense[1], one, one, None

    def prepare(layer) -> None:
        for key in ("w13", "w2"):
            powers = torch.exp2(getattr(layer, f"{key}_weight_scale").data.float() - 127)
            replace_parameter(layer, f"{key}_weight", floats(getattr(layer, f"{key}_weight").data, powers))

    nvfp4.select_nvfp4_moe_backend = lambda **_: (nvfp4.NvFp4MoeBackend.EMULATION, DenseExperts)
    nvfp4.convert_to_nvfp4_moe_kernel_format = convert
    nvfp4.make_nvfp4_moe_quant_config = lambda **_: FUSED_MOE_UNQUANTIZED_CONFIG
    mxfp4.MarlinExperts = DenseExperts
    mxfp4.prepare_moe_fp4_layer_for_marlin = prepare
    mxfp4.make_mxfp4_moe_quant_config = lambda **_: FUSED_MOE_UNQUANTIZED_CONFIG


def _linears() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
    from vllm.model_executor.layers.quantization import auto_gptq
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.model_executor.parameter import permute_param_layout_
    from vllm.platforms import PlatformEnum
    from vllm.scalar_type import scalar_types

    class DenseLinear(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer) -> None:
            words, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
            is_gptq = self.w_zp_name == "qzeros"
            permute_param_layout_(words, input_dim=1, output_dim=0, packed_dim=1)
            permute_param_layout_(scales, input_dim=1, output_dim=0)
            bits, zeros = self.config.weight_type.size_bits, None
            if self.config.zero_points:
                packed = getattr(layer, self.w_zp_name)
                permute_param_layout_(packed, input_dim=1, output_dim=0, packed_dim=0)
                zeros = zero_points(packed.data, bits, scales.shape[0], int(is_gptq))
            columns = self.config.partition_weight_shape[0]
            layer.dense_weight = weights(words.data, scales.data, bits, columns, zeros)

        def apply_weights(self, layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return torch.nn.functional.linear(x, layer.dense_weight, bias)

    def verify(quant_type, group_size, has_zp=False) -> None:
        """vLLM's own question, of 8 bits asked as of 4: on a CPU it knows no other kernel."""
        taken, why = marlin_utils._check_marlin_supported(scalar_types.uint4b8, group_size, has_zp)
        if not taken:
            raise ValueError(why)

    linear._POSSIBLE_KERNELS[PlatformEnum.CPU] = [DenseLinear]
    auto_gptq.verify_marlin_supported = verify
