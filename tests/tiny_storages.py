"""Tiny folders stored as the published ones are: MXFP4, fp8 in blocks with E8M0 scales, per tensor, int4."""

from pathlib import Path

import tiny_models
import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LINEARS = ("_proj.weight", "_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")


def to_mxfp4(folder: Path) -> None:
    """Turn the fused experts of a gpt-oss folder into blocks and scales, as OpenAI stores them: [E, O, I/32, 16]."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensors.pop(name).mT.contiguous())

    tiny_models.rewrite(folder, change)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    tiny_models.edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped})


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks uint8 [.., I/32, 16] and exponents uint8 [.., I/32] of a weight [.., I]; the low nibble comes first."""
    groups = weight.float().unflatten(-1, (-1, 32))
    peak = groups.abs().amax(dim=-1).clamp(min=2.0**-100)
    exponent = (peak.log2().floor() - 2).clamp(-127, 127)
    scaled = groups / exponent.exp2()[..., None]
    codes = (scaled.abs()[..., None] - torch.tensor(E2M1)).abs().argmin(dim=-1) + 8 * (scaled < 0)
    pairs = codes.unflatten(-1, (16, 2)).to(torch.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4, (exponent + 127).to(torch.uint8)


def to_fp8(folder: Path, *, block: tuple[int, int] | None = (32, 32), power_of_two: bool = False) -> None:
    """Turn the Linears of a per-expert folder into fp8: in blocks, or with one scale per tensor.

    Args:
        folder: changed.
        block: rows and columns of a block; None for one scale per tensor.
        power_of_two: scales are powers of two, stored as E8M0 (`scale_fmt: ue8m0`).
    """

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(_LINEARS) and tensors[n].ndim == 2]:
            if block is None:
                weight = tensors[name].float()
                scale = weight.abs().max() / 448
                tensors[name], tensors[f"{name}_scale_inv"] = (weight / scale).to(torch.float8_e4m3fn), scale
                continue
            tensors[name], scales = _blocks(tensors[name], block, power_of_two=power_of_two)
            tensors[f"{name}_scale_inv"] = scales.to(torch.float8_e8m0fnu) if power_of_two else scales

    tiny_models.rewrite(folder, change)
    stated = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    stated |= {"weight_block_size": None if block is None else list(block)}
    if power_of_two:
        stated["scale_fmt"] = "ue8m0"
    tiny_models.edit_config(folder, quantization_config=stated)


def _blocks(weight: Tensor, block: tuple[int, int], *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if not power_of_two:
        return tiny_models.fp8_blocks(weight, block)
    _codes, scales = tiny_models.fp8_blocks(weight, block)
    scales = scales.log2().ceil().exp2()
    wide = scales.repeat_interleave(block[0], 0)[: len(weight)].repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    return (weight.float() / wide).to(torch.float8_e4m3fn), scales


def to_int4(folder: Path, group: int = 32) -> None:
    """Turn routed experts into compressed-tensors int4, as Kimi-K2-Thinking stores them: symmetric, in groups."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n and n.endswith("_proj.weight")]:
            weight, module = tensors.pop(name), name.removesuffix(".weight")
            groups = weight.float().unflatten(1, (-1, group))
            scales = (groups.abs().amax(dim=2) / 7.5).clamp(min=1e-8).bfloat16()
            codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int64) + 8
            shifts = torch.arange(0, 32, 4)
            words = (codes.unflatten(1, (-1, 8)) << shifts).sum(dim=2)
            tensors[f"{module}.weight_packed"] = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
            tensors[f"{module}.weight_scale"] = scales
            tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)

    tiny_models.rewrite(folder, change)
    weights = {"num_bits": 4, "group_size": group, "type": "int", "strategy": "group", "symmetric": True}
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
    tiny_models.edit_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group_0},
            "ignore": ignore,
        },
    )
