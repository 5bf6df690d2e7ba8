"""Made checkpoints: true tensor names and dtypes, random weights, any number of layers and experts."""

import json
import shutil
from pathlib import Path

import torch

from moepress.models.writer import tensor_entry, write_index, write_shard
from moepress.stages import model_folder


def make_qwen3_moe(
    folder: Path, *, layers: int, experts: int, hidden: int = 256, width: int = 256, top_k: int = 4
) -> int:
    """Write a Qwen3-MoE checkpoint in bf16, one shard a layer, with the demo's tokenizer; returns its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    heads, head, vocabulary = 4, 64, 2048
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 2048,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder("demo") / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for shard, shapes in enumerate(_shards(layers, experts, hidden, width, heads * head, head, vocabulary)):
        name = f"model-{shard + 1:05d}-of-{layers + 1:05d}.safetensors"
        entries = [
            tensor_entry(tensor, _weight(tensor, shape, generator).to(torch.bfloat16))
            for tensor, shape in shapes.items()
        ]
        write_shard(folder / name, entries)
        weight_map |= dict.fromkeys(shapes, name)
        total += sum(entry.bytes for entry in entries)
    write_index(folder, weight_map, total)
    return total


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    scale = 1.0 if "embed" in name else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * scale


def _shards(
    layers: int, experts: int, hidden: int, width: int, inner: int, head: int, vocabulary: int
) -> list[dict[str, tuple[int, ...]]]:
    outer = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    shards: list[dict[str, tuple[int, ...]]] = [outer]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors: dict[str, tuple[int, ...]] = {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_norm.weight": (head,),
            f"{prefix}self_attn.k_norm.weight": (head,),
            f"{prefix}self_attn.o_proj.weight": (hidden, inner),
            f"{prefix}mlp.gate.weight": (experts, hidden),
        }
        tensors |= {f"{prefix}self_attn.{part}_proj.weight": (inner, hidden) for part in "qkv"}
        for expert in range(experts):
            for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                tensors[f"{prefix}mlp.experts.{expert}.{part}_proj.weight"] = shape
        shards.append(tensors)
    return shards
