"""Published models at full size, as folders of headers alone: names, shapes and dtypes are true, the data is a hole."""

import json
import math
from pathlib import Path
from typing import Any

from r1_models import make_r1

from moepress.models.families.skeleton import build_skeleton
from moepress.models.families.table import family_of
from moepress.models.storage.writer import write_index, write_json

CONFIGS: dict[str, dict[str, Any]] = {
    "DeepSeek-R1": make_r1.CONFIG,
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 163840,
        "vocab_size": 102400,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "vocab_size": 32000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
_SHARD_BYTES = 5 << 30


def full_model(name: str, folder: Path) -> Path:
    """The folder of a model of `CONFIGS`, made here; takes a few MB of the disk."""
    config = CONFIGS[name]
    rows = list(make_r1.r1_tensors(config)) if name == "DeepSeek-R1" else bf16_tensors(config)
    folder.mkdir()
    shards: list[dict[str, Any]] = [{}]
    ends, weight_map = [0], {}
    for tensor, dtype, shape in rows:
        size = math.prod(shape) * make_r1.BYTES[dtype]
        if ends[-1] and ends[-1] + size > _SHARD_BYTES:
            shards.append({})
            ends.append(0)
        shards[-1][tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [ends[-1], ends[-1] + size]}
        ends[-1] += size
    for number, (header, end) in enumerate(zip(shards, ends, strict=True), start=1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + end)
        weight_map |= dict.fromkeys(header, file)
    write_index(folder, weight_map, sum(ends))
    write_json(folder / "config.json", config)
    return folder


def bf16_tensors(config: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names and shapes of transformers' own model, the experts one by one as they are published."""
    family, rows = family_of(config), list[tuple[str, str, tuple[int, ...]]]()
    for name, tensor in build_skeleton(config).state_dict().items():
        assert tensor.is_meta or tensor.numel() < 1 << 15
        for old, new in family.renames:
            name = name.replace(new, old)
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            rows.append((name, "BF16", tuple(tensor.shape)))
            continue
        layer, (experts, outputs, inputs) = int(name.split(".")[2]), tensor.shape
        for expert in range(experts):
            gate, up, down = family.expert_names(layer, expert)
            if name.endswith("gate_up_proj"):
                rows += [(gate, "BF16", (outputs // 2, inputs)), (up, "BF16", (outputs // 2, inputs))]
            else:
                rows.append((down, "BF16", (outputs, inputs)))
    return rows
