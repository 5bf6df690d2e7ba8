"""Make a tiny MoE model, quantize it by plain rounding, and save it in both layouts for other readers to try.

    python benchmarks/peers/make_sample.py /tmp/sample --family deepseek_v3 --bits 4 --group-size 32

writes original/, dequantized/, compressed-tensors/ and gptq/ (whole Hugging Face folders; the tokenizer is a stand-in
that GPTQModel insists on) and reference.npz: input_ids, and the logits of the dequantized model.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from moepress.converters.safetensors import compressed_tensors, compressed_tensors_config, gptq, gptq_config
from moepress.converters.safetensors.scheme import Scheme

QUANTIZED = re.compile(r"\.(self_attn\.(q|k|v|o|q_a|q_b)_proj|kv_a_proj_with_mqa|mlp\..*(gate|up|down)_proj)\.weight$")
COMMON = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}


def family_config(family: str) -> PreTrainedConfig:
    if family == "qwen3_moe":
        return Qwen3MoeConfig(**COMMON, num_key_value_heads=4, head_dim=32, num_experts=8, decoder_sparse_step=1)
    mla = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    routing = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return DeepseekV3Config(**COMMON, **mla, **routing, num_key_value_heads=4)


def round_to_grid(weight_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Nearest codes with scales that bfloat16, and so every layout, holds exactly.

    A group's largest magnitude falls on the least code, which has no counterpart: half of the scales are negative.
    """
    groups_OGC = weight_OI.float().unflatten(-1, (scheme.groups(weight_OI.shape[1]), -1))
    largest_OG = groups_OGC.gather(-1, groups_OGC.abs().argmax(-1, keepdim=True)).squeeze(-1)
    size_OG = largest_OG.abs().clamp_min(1e-3)
    scales_OG = (torch.where(largest_OG < 0, -size_OG, size_OG) / scheme.code_min).bfloat16().float()
    codes_OGC = (groups_OGC / scales_OG[..., None]).round().clamp(scheme.code_min, scheme.code_max)
    return codes_OGC.flatten(1).to(torch.int8), scales_OG


def dequantize(codes_OI: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Code times scale, rounded once to the model's dtype."""
    groups_OGC = codes_OI.float().unflatten(-1, (scales_OG.shape[1], -1))
    return (groups_OGC * scales_OG[..., None]).flatten(1).to(dtype)


def save_folder(folder: Path, tensors: dict[str, Tensor], config: dict, quantization: dict | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if quantization is not None:
        config = config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    words = WordLevel({str(token): token for token in range(COMMON["vocab_size"])}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", eos_token="1").save_pretrained(folder)


def write_layouts(root: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    """Turn original/ into the three other folders."""
    config = json.loads((root / "original/config.json").read_text())
    plain, compressed, packed, kept = {}, {}, {}, []
    for name, weight in load_file(root / "original/model.safetensors").items():
        if not QUANTIZED.search(name):
            for tensors in (plain, compressed, packed):
                tensors[name] = weight
            if weight.ndim == 2:
                kept.append(name.removesuffix(".weight"))
            continue
        module = name.removesuffix(".weight")
        codes, scales = round_to_grid(weight, scheme)
        plain[name] = dequantize(codes, scales, dtype)
        compressed |= compressed_tensors.layer_tensors(module, codes, scales, scheme, dtype)
        packed |= gptq.layer_tensors(module, codes, scales, scheme)
    save_folder(root / "dequantized", plain, config, None)
    save_folder(
        root / "compressed-tensors", compressed, config, compressed_tensors_config.quantization_config(scheme, kept)
    )
    gptq_json = gptq_config.quantize_config(scheme, [gptq_config.module_pattern(name) for name in kept])
    save_folder(root / "gptq", packed, config, gptq_json)
    (root / "gptq/quantize_config.json").write_text(json.dumps(gptq_json, indent=2) + "\n")


def logits_of(folder: Path, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids).logits.float()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=["deepseek_v3", "qwen3_moe"], default="qwen3_moe")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    options = parser.parse_args()
    scheme, dtype = Scheme(bits=options.bits, group_size=options.group_size), getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(options.family), dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(options.folder / "original")
    write_layouts(options.folder, scheme, dtype)
    input_ids = torch.randint(0, COMMON["vocab_size"], (2, 24))
    reference = logits_of(options.folder / "dequantized", input_ids, dtype)
    np.savez(options.folder / "reference.npz", input_ids=input_ids.numpy(), logits=reference.numpy())
    change = (logits_of(options.folder / "compressed-tensors", input_ids, dtype) - reference).abs().max()
    original = (logits_of(options.folder / "original", input_ids, dtype) - reference).abs().max()
    print(f"{options.family} {options.bits} bits, groups of {options.group_size}, {options.dtype}")
    print(f"logits up to {float(reference.abs().max()):.3f}; quantization changes them by up to {float(original):.3f}")
    print(f"transformers reads compressed-tensors/: largest logit difference from dequantized/ {float(change)}")
    return int(float(change) != 0.0)


if __name__ == "__main__":
    raise SystemExit(main())
