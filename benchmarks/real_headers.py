"""Published models as folders of headers alone: config.json, tensor names, dtypes and shapes, and holes for the data.

    python benchmarks/real_headers.py FOLDER [NAMES...]
    python benchmarks/real_headers.py FOLDER --try [NAMES...]

A folder of a 700 GB model takes some MB on the disk. `--try` runs `inspect`, `plan --keep 0.75`, `prune --dry-run` and
`quantize --dry-run` on each and says how long they took, how they ended and the first line that they said; plans come
from a made profile, for nothing can be run over holes. NAMES are parts of the models' names.

Shapes come from transformers' own modules, built from the published config on the meta device; what the hub has
otherwise (names, experts one by one, multi-token-prediction tensors, packed formats) is written out here. So a total
that meets the published one to the last parameter holds the config and this file against each other. DeepSeek and Kimi
are written out whole, in make_r1.py. Every published number says where it was found; `assumed` lists what was not.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_r1 import BYTES, CONFIG, SHARD_BYTES, Row, r1_tensors
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moepress.calibration.accumulators import ACCUMULATORS, TOTALS
from moepress.calibration.profile import SHARDS, Profile, fingerprint, save_profile
from moepress.errors import MoepressError
from moepress.models.forward.inventory import inventory
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import mtp_layers
from moepress.models.storage.writer import write_index, write_json
from moepress.stages.places import model_folder

Config = dict[str, Any]
SIZES = BYTES | {"U8": 1, "I32": 4, "I64": 8}
# Beside the weights. The hub's counts of DeepSeek have them as parameters, its counts of MiniMax and Kimi have not.
_SCALES = ("_scales", ".weight_scale", ".weight_scale_inv", ".weight_shape")
_PACKED = {"_blocks": 2, ".weight_packed": 8}  # values in an element
_PROJECTIONS, _MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A published model.

    Attributes:
        name: on the hub.
        config: its config.json.
        config_from: where that was found.
        rows: its tensors.
        parameters: as the hub counts them.
        parameters_from: where that was found.
        size_bytes: of all tensors, where it is known.
        size_from: where that was found.
        scales_counted: the hub's count has the block scales.
        assumed: what was not found.
    """

    name: str
    config: Config
    config_from: str
    rows: Callable[[Config], Iterator[Row]]
    parameters: int
    parameters_from: str
    size_bytes: int | None = None
    size_from: str = ""
    scales_counted: bool = False
    assumed: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return self.name.split("/")[1]


# Tensors.


def modules(config: Config, float32: Sequence[str] = ()) -> Iterator[Row]:
    """The state of transformers' model of that config, by its modules' names; `float32` are ends of names."""
    plain = {key: value for key, value in deepcopy(config).items() if key != "quantization_config"}
    kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(plain))
    tied = model.config.get_text_config().tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, "F32" if name.endswith(tuple(float32)) else "BF16", tuple(tensor.shape)


def renamed(rows: Iterable[Row], *changes: tuple[str, str]) -> Iterator[Row]:
    """The hub's names: regular expressions and what takes their place, one after the other."""
    for name, dtype, shape in rows:
        for before, after in changes:
            name = re.sub(before, after, name)
        yield name, dtype, shape


def unfused(rows: Iterable[Row], names: tuple[str, str, str] = _PROJECTIONS) -> Iterator[Row]:
    """Experts one by one. Without a gate there is an `up_proj` of all experts in place of `gate_up_proj`."""
    gate, up, down = names
    parts = {"gate_up_proj": (gate, up), "up_proj": (up,), "down_proj": (down,)}
    for name, dtype, shape in rows:
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".experts"):
            yield name, dtype, shape
            continue
        each = (shape[1] // len(parts[last]), shape[2])
        for expert in range(shape[0]):
            for part in parts[last]:
                yield f"{stem}.{expert}.{part}.weight", dtype, each


def again(rows: Sequence[Row], before: str, after: str) -> Iterator[Row]:
    """A layer's tensors once more under another prefix: a multi-token-prediction layer is built like one of them."""
    for name, dtype, shape in rows:
        if name.startswith(before):
            yield after + name.removeprefix(before), dtype, shape


def fp8(rows: Iterable[Row], block: Sequence[int], keep: str) -> Iterator[Row]:
    """Linear weights in fp8 with scales of blocks, but for those whose names the expression `keep` finds."""
    for name, dtype, shape in rows:
        if not re.search(r"(_proj|\.w[123])\.weight$", name) or re.search(keep, name):
            yield name, dtype, shape
            continue
        yield name, "F8_E4M3", shape
        yield f"{name}_scale_inv", "F32", tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


def mxfp4(rows: Iterable[Row]) -> Iterator[Row]:
    """gpt-oss' experts: [experts, in, out] in memory, [experts, out, in / 32, 16 bytes] on the disk."""
    for name, dtype, shape in rows:
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            yield name, dtype, shape
            continue
        experts, inputs, outputs = shape
        yield f"{name}_blocks", "U8", (experts, outputs, inputs // 32, 16)
        yield f"{name}_scales", "U8", (experts, outputs, inputs // 32)


def int4(rows: Iterable[Row], group: int) -> Iterator[Row]:
    """Routed experts in compressed-tensors' pack-quantized, all else in bf16; from rows with fp8 and its scales."""
    for name, dtype, shape in rows:
        if name.endswith("_scale_inv"):
            continue
        if ".mlp.experts." not in name:
            yield name, "BF16" if dtype == "F8_E4M3" else dtype, shape
            continue
        yield f"{name}_packed", "I32", (shape[0], shape[1] // 8)
        yield f"{name}_scale", "BF16", (shape[0], shape[1] // group)
        yield f"{name}_shape", "I64", (2,)


# Families.


def glm(config: Config) -> Iterator[Row]:
    """Glm4Moe and Glm4MoeLite: the layer behind the last is DeepSeek's, with embeddings and head of its own."""
    rows = list(unfused(modules(config, ["e_score_correction_bias"])))
    yield from rows
    hidden, last = config["hidden_size"], config["num_hidden_layers"]
    vocabulary, prefix = (config["vocab_size"], hidden), f"model.layers.{last}."
    yield from again(rows, f"model.layers.{last - 1}.", prefix)
    yield f"{prefix}embed_tokens.weight", "BF16", vocabulary
    yield f"{prefix}shared_head.head.weight", "BF16", vocabulary
    yield f"{prefix}eh_proj.weight", "BF16", (hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}{norm}.weight", "BF16", (hidden,)


def qwen_mtp(rows: Sequence[Row], layer: str, hidden: int) -> Iterator[Row]:
    """Qwen's: a layer of full attention, beside the model; it shares the embeddings and the head."""
    yield "mtp.fc.weight", "BF16", (hidden, 2 * hidden)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{norm}.weight", "BF16", (hidden,)
    yield from again(rows, layer, "mtp.layers.0.")


def qwen3_next(config: Config) -> Iterator[Row]:
    rows = list(unfused(modules(config)))
    yield from rows
    yield from qwen_mtp(rows, "model.layers.3.", config["hidden_size"])


def qwen3_5(config: Config) -> Iterator[Row]:
    rows = list(modules(config))
    yield from rows
    yield from qwen_mtp(rows, "model.language_model.layers.3.", config["text_config"]["hidden_size"])


def gpt_oss(config: Config) -> Iterator[Row]:
    return mxfp4(modules(config))


def minimax(config: Config) -> Iterator[Row]:
    """`use_mtp` is true in its config, and there are no tensors for it."""
    rows = modules(config, ["mlp.gate.weight", "e_score_correction_bias"])
    named = unfused(renamed(rows, (r"\.mlp\.", ".block_sparse_moe.")), _MIXTRAL)
    return fp8(named, config["quantization_config"]["weight_block_size"], "lm_head|gate")


def nemotron(config: Config) -> Iterator[Row]:
    return unfused(renamed(modules(config, ["e_score_correction_bias"]), (r"^model\.", "backbone.")))


def ernie(config: Config) -> Iterator[Row]:
    """Its multi-token-prediction layer is a dense one."""
    rows = modules(config, ["mlp.gate.weight", "e_score_correction_bias"])
    named = list(unfused(renamed(rows, (r"\.gate\.moe_statics\.", ".moe_statics."))))
    yield from named
    hidden = config["hidden_size"]
    yield from again(named, "model.layers.0.", "model.mtp_block.0.")
    yield "model.mtp_emb_norm.0.weight", "BF16", (hidden,)
    yield "model.mtp_hidden_norm.0.weight", "BF16", (hidden,)
    yield "model.mtp_linear_proj.0.weight", "BF16", (hidden, 2 * hidden)


def kimi(config: Config) -> Iterator[Row]:
    return int4(r1_tensors(config | {"quantization_config": CONFIG["quantization_config"]}), 32)


def lfm(config: Config) -> Iterator[Row]:
    return unfused(modules(config, ["expert_bias"]), _MIXTRAL)


# Configs.

_BF16 = {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True}
_GLM: Config = _BF16 | {
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "topk_group": 1,
}
GLM_AIR: Config = _GLM | {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 1.0,
    "transformers_version": "4.54.0",
    "use_qk_norm": False,
    "vocab_size": 151552,
}
GLM_FLASH: Config = _GLM | {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [154820, 154827, 154829],
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "pad_token_id": 154820,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 1.8,
    "topk_method": "noaux_tc",
    "transformers_version": "5.0.0rc0",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
_QWEN_LINEAR: Config = {
    "attention_dropout": 0.0,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "use_cache": True,
}
QWEN3_NEXT: Config = _QWEN_LINEAR | {
    "architectures": ["Qwen3NextForCausalLM"],
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "intermediate_size": 5120,
    "model_type": "qwen3_next",
    "norm_topk_prob": True,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_5: Config = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5_moe",
    "text_config": _QWEN_LINEAR
    | {
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
        "mamba_ssm_dtype": "float32",
        "model_type": "qwen3_5_moe_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "vocab_size": 248320,
    },
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 248057,
    "vision_config": {
        "deepstack_visual_indexes": [],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4304,
        "model_type": "qwen3_5_moe",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}


def gpt_oss_config(layers: int, experts: int) -> Config:
    """The two differ in nothing else."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": 201088,
    }


GEMMA4: Config = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "boi_token_id": 255999,
    "dtype": "bfloat16",
    "eoi_token_id": 258882,
    "eos_token_id": [1, 106],
    "image_token_id": 258880,
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": True,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2816,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": 2112,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        "max_position_embeddings": 262144,
        "model_type": "gemma4_text",
        "moe_intermediate_size": 704,
        "num_attention_heads": 16,
        "num_experts": 128,
        "num_global_key_value_heads": 2,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "top_k_experts": 8,
        "use_bidirectional_attention": "vision",
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
    },
    "tie_word_embeddings": True,
    "vision_config": {
        "head_dim": 72,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "gemma4_vision",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 10240,
        "rms_norm_eps": 1e-06,
        "standardize": True,
        "use_clipped_linears": False,
    },
    "vision_soft_tokens_per_image": 280,
}
MINIMAX: Config = _BF16 | {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [1] * 62,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "output_router_logits": False,
    "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
NEMOTRON: Config = _BF16 | {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModel": "modeling_nemotron_h.NemotronHForCausalLM",
        "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
    },
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "initializer_range": 0.02,
    "intermediate_size": 1856,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 64,
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "n_groups": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "ssm_state_size": 128,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "transformers_version": "4.55.4",
    "use_bias": False,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}
ERNIE: Config = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5_moe",
    "moe_capacity": [64, 64, 64],
    "moe_gate": "topk",
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_use_aux_free": True,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": False,
    "vocab_size": 103424,
}
DEEPSEEK_V3: Config = CONFIG | {"transformers_version": "4.33.1"}
DEEPSEEK_V3_1: Config = CONFIG | {
    "quantization_config": CONFIG["quantization_config"] | {"scale_fmt": "ue8m0"},
    "transformers_version": "4.44.2",
}
KIMI: Config = CONFIG | {
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 262144,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "quantization_config": {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": 32,
                    "num_bits": 4,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    },
    "rope_scaling": CONFIG["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
LLAMA4: Config = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "text_config": _BF16
    | {
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 262144,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "vision_config": {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 336,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "rope_theta": 10000,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 4096,
    },
}
LFM2: Config = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": 7,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 7168,
    "layer_types": ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)],
    "max_position_embeddings": 128000,
    "model_type": "lfm2_moe",
    "moe_intermediate_size": 1792,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "routed_scaling_factor": 1.0,
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_expert_bias": True,
    "vocab_size": 65536,
}

# Put together: what has a shape is held by the total, the rest of the keys is as its author remembers the file.
_KEYS = "config: which keys it has, and values without a shape, such as token ids, rope_theta, transformers_version"
_API = "the hub's API (safetensors.total), as quoted in public repositories"
MODELS = (
    Model(
        name="zai-org/GLM-4.5-Air",
        config=GLM_AIR,
        config_from="default of transformers; heads, experts, context as quoted in public repositories",
        rows=glm,
        parameters=110_468_824_832,
        parameters_from=_API,
        assumed=(_KEYS, "F32 of e_score_correction_bias"),
    ),
    Model(
        name="zai-org/GLM-4.7-Flash",
        config=GLM_FLASH,
        config_from="default of transformers; a trimmed copy in ai-dynamo/aiconfigurator",
        rows=glm,
        parameters=31_221_488_576,
        parameters_from=_API,
        assumed=(_KEYS, "F32 of e_score_correction_bias"),
    ),
    Model(
        name="Qwen/Qwen3-Next-80B-A3B-Instruct",
        config=QWEN3_NEXT,
        config_from="copy of -Thinking's in ai-dynamo/aiconfigurator",
        rows=qwen3_next,
        parameters=81_324_862_720,
        parameters_from=_API,
        assumed=("config: the same as -Thinking's", "BF16 of A_log and dt_bias"),
    ),
    Model(
        name="Qwen/Qwen3.5-35B-A3B",
        config=QWEN3_5,
        config_from="copies of 397B-A17B's and 27B's; the numbers of 35B-A3B as quoted in public repositories",
        rows=qwen3_5,
        parameters=35_951_822_704,
        parameters_from=_API,
        size_bytes=2 * 35_951_822_704,
        size_from="the hub's API gives BF16 for all parameters",
        assumed=(_KEYS, "mtp's experts fused, as the layers' are"),
    ),
    Model(
        name="openai/gpt-oss-20b",
        config=gpt_oss_config(24, 32),
        config_from="whole copy in a public repository",
        rows=gpt_oss,
        parameters=20_914_757_184,
        parameters_from=_API,
        size_bytes=13_761_264_768,
        size_from="total_size of its index, quoted in a public repository",
    ),
    Model(
        name="openai/gpt-oss-120b",
        config=gpt_oss_config(36, 128),
        config_from="default of transformers; the other keys are 20b's",
        rows=gpt_oss,
        parameters=116_829_156_672,
        parameters_from=_API,
        size_bytes=65_248_815_744,
        size_from="bytes of its tensors, quoted in a public repository",
    ),
    Model(
        name="google/gemma-4-26B-A4B",
        config=GEMMA4,
        config_from="text_config quoted in public repositories; vision_config: default of transformers",
        rows=modules,
        parameters=25_805_936_206,
        parameters_from=f"{_API}; for -it",
        size_bytes=2 * 25_805_936_206,
        size_from="the hub's API gives BF16 for all parameters",
        assumed=(_KEYS, "names of the vision tower: those of transformers' modules"),
    ),
    Model(
        name="MiniMaxAI/MiniMax-M2",
        config=MINIMAX,
        config_from="default of transformers; copies of M2.7's and of quantization_config in public repositories",
        rows=minimax,
        parameters=228_689_764_864,
        parameters_from=_API,
        size_bytes=230_121_630_720,
        size_from="hf-mem's README, which reads the published headers",
        assumed=(_KEYS,),
    ),
    Model(
        name="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        config=NEMOTRON,
        config_from="whole copy in jax's nemotron3 tests",
        rows=nemotron,
        parameters=31_577_937_344,
        parameters_from=f"{_API}; 2,944 fewer, as many as e_score_correction_bias has",
        assumed=("F32 of e_score_correction_bias", "BF16 of A_log, D and dt_bias"),
    ),
    Model(
        name="baidu/ERNIE-4.5-21B-A3B-PT",
        config=ERNIE,
        config_from="default of transformers; keys of its siblings in public repositories",
        rows=ernie,
        parameters=21_950_000_000,
        parameters_from="rounded, quoted in a public repository",
        assumed=("F32 of the router and its bias", _KEYS, "shapes of the MTP tensors"),
    ),
    Model(
        name="deepseek-ai/DeepSeek-V3",
        config=DEEPSEEK_V3,
        config_from="make_r1.py; R1's but for transformers_version",
        rows=r1_tensors,
        parameters=684_531_386_000,
        parameters_from=_API,
        size_bytes=688_574_839_360,
        size_from="the hub's API: BF16 3,918,786,560, F8_E4M3 680,571,043,840, F32 41,555,600",
        scales_counted=True,
        assumed=("config: transformers_version",),
    ),
    Model(
        name="deepseek-ai/DeepSeek-V3.1",
        config=DEEPSEEK_V3_1,
        config_from="make_r1.py; scale_fmt as quoted in public repositories",
        rows=r1_tensors,
        parameters=684_531_386_000,
        parameters_from=_API,
        scales_counted=True,
        assumed=("scales stored as F32, with values that are powers of two", "config: transformers_version"),
    ),
    Model(
        name="moonshotai/Kimi-K2-Thinking",
        config=KIMI,
        config_from="a trimmed copy in ai-dynamo/aiconfigurator; K2's rope and quantization_config quoted elsewhere",
        rows=kimi,
        parameters=1_026_408_240_256,
        parameters_from=_API,
        assumed=(
            _KEYS,
            "F32 of e_score_correction_bias",
            "I64 of weight_shape",
            "no more tensors: the hub counts 7,808 parameters more, 128 a layer, and what they are was not found",
        ),
    ),
    Model(
        name="meta-llama/Llama-4-Scout-17B-16E",
        config=LLAMA4,
        config_from="as transformers 4.51 prints it, in a public repository",
        rows=modules,
        parameters=108_641_793_536,
        parameters_from=f"{_API}; for -Instruct",
        assumed=(
            "config: not in the file what its class computes or adds (moe_layers, attn_scale ...)",
            "BF16 for all",
        ),
    ),
    Model(
        name="LiquidAI/LFM2-8B-A1B",
        config=LFM2,
        config_from="audit of the published file in a public repository; default of transformers",
        rows=lfm,
        parameters=8_339_930_560,
        parameters_from="the hub's API: BF16 8,339,929,856, F32 704",
        size_bytes=2 * 8_339_929_856 + 4 * 704,
        size_from="the same",
        assumed=(_KEYS,),
    ),
)


# Folders.


def size_of(row: Row) -> int:
    return math.prod(row[2]) * SIZES[row[1]]


def parameters_of(rows: Iterable[Row], *, scales: bool = False) -> int:
    """Weights, packed ones unpacked; with `scales` every element of those."""
    total = 0
    for name, _dtype, shape in rows:
        if scales or not name.endswith(_SCALES):
            total += math.prod(shape) * next((n for end, n in _PACKED.items() if name.endswith(end)), 1)
    return total


def shards_of(rows: Iterable[Row], shard_bytes: int) -> list[list[Row]]:
    """Tensors in their order, a file's up to that size, a larger tensor in a file alone."""
    shards: list[list[Row]] = [[]]
    filled = 0
    for row in rows:
        if shards[-1] and filled + size_of(row) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += size_of(row)
    return shards


def write_hollow(file: Path, rows: Sequence[Row]) -> None:
    """A safetensors file whose data is a hole, but for `weight_shape` of first experts, which is read."""
    header, position, places = dict[str, Any](), 0, dict[int, tuple[int, int]]()
    packed = {row[0]: row[2] for row in rows if row[0].endswith(".weight_packed")}
    for row in rows:
        name, dtype, shape = row
        if name.endswith(".weight_shape") and ".experts.0." in name:
            out, words = packed[f"{name.removesuffix('shape')}packed"]
            places[position] = (out, words * 8)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size_of(row)]}
        position += size_of(row)
    raw = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + position)
        for place, (out, columns) in places.items():
            stream.seek(8 + len(raw) + place)
            stream.write(out.to_bytes(8, "little") + columns.to_bytes(8, "little"))


def model_of(name: str) -> Model:
    """By the hub's name, or the part behind its slash."""
    return next(model for model in MODELS if name in (model.name, model.folder))


def make(name: str, folder: Path) -> list[Row]:
    """Write a model's folder; returns its tensors. The tokenizer is the demo's, so that commands run."""
    model = model_of(name)
    rows = list(model.rows(model.config))
    folder.mkdir(parents=True, exist_ok=True)
    shards, weight_map = shards_of(rows, SHARD_BYTES), dict[str, str]()
    for number, entries in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_hollow(folder / file, entries)
        weight_map |= dict.fromkeys((row[0] for row in entries), file)
    write_index(folder, weight_map, sum(map(size_of, rows)))
    write_json(folder / "config.json", model.config)
    for companion in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder("demo") / companion, folder / companion)
    return rows


def on_disk(folder: Path) -> int:
    """Bytes that a folder really takes."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def report(model: Model, folder: Path) -> None:
    start = time.perf_counter()
    rows = make(model.name, folder)
    seconds, size = time.perf_counter() - start, sum(map(size_of, rows))
    found = parameters_of(rows, scales=model.scales_counted)
    print(f"{model.name}: {len(rows):,} tensors, made in {seconds:.1f} s, {on_disk(folder) / 1e6:.1f} MB on the disk")
    print(f"  parameters {found:,}, published {model.parameters:,} ({difference(found, model.parameters)})")
    print(f"    from {model.parameters_from}")
    published = "not found"
    if model.size_bytes is not None:
        published = f"{model.size_bytes:,} ({difference(size, model.size_bytes)}); from {model.size_from}"
    print(f"  bytes {size:,}, published {published}")
    print(f"  config from {model.config_from}")
    for fact in model.assumed:
        print(f"  assumed: {fact}")


def difference(found: int, published: int) -> str:
    return "equal" if found == published else f"{100 * (found / published - 1):+.5f} %"


# Commands.


def made_profile(folder: Path, target: Path) -> None:
    """A profile as `moepress profile` writes it, with made statistics: no two experts are alike.

    Raises:
        MoepressError: the model is not supported.
    """
    checkpoint = open_checkpoint(folder)
    draws, shape = np.random.default_rng(0), (1, SHARDS, checkpoint.shape.experts)
    statistics = {
        layer: {name: 1000 * (1 + draws.random(shape)) for name in ACCUMULATORS}
        | {name: np.full(shape[:2], 1e6) for name in TOTALS}
        for layer in (*checkpoint.outline.moe_layers, *mtp_layers(checkpoint))
    }
    profile = Profile(
        model=fingerprint(checkpoint),
        model_name=folder.name,
        family=checkpoint.family.name,
        config=checkpoint.config,
        shape=checkpoint.shape,
        domains=("made",),
        layers=checkpoint.outline.moe_layers,
        calibration={"tokens": 8_000_000, "notes": ["made by benchmarks/real_headers.py"]},
        inventory=inventory(checkpoint),
        statistics={layer: statistics[layer] for layer in checkpoint.outline.moe_layers},
        mtp={layer: statistics[layer] for layer in mtp_layers(checkpoint)},
    )
    target.mkdir()
    save_profile(profile, target)


def command(*arguments: str | Path) -> dict[str, Any]:
    """Run moepress; seconds, exit code, the first line of stderr, and its JSON."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "moepress", *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    try:
        result = json.loads(done.stdout)
    except json.JSONDecodeError:
        result = None
    first = next(iter(done.stderr.splitlines()), "")
    return {"seconds": time.perf_counter() - start, "rc": done.returncode, "stderr": first, "result": result}


def attempts(folder: Path, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each command and how it went; what needs a plan is left out where there is none."""
    yield "inspect", command("inspect", folder)
    start, profile, plan, never = time.perf_counter(), work / "profile", work / "plan.json", work / "never"
    try:
        made_profile(folder, profile)
    except MoepressError as error:
        first = str(error).splitlines()[0]
        yield "made profile", {"seconds": time.perf_counter() - start, "rc": None, "stderr": first, "result": None}
        return
    planned = command("plan", profile, "--keep", "0.75", "-o", plan)
    yield "plan --keep 0.75", planned
    named = re.search(r"(--group-size) (\d+) is the largest", planned["stderr"])
    if planned["rc"] and named:  # as it says
        planned = command("plan", profile, "--keep", "0.75", "-o", plan, *named.groups())
        yield f"plan --keep 0.75 --group-size {named[2]}", planned
    if planned["rc"] == 0:
        yield "prune --dry-run", command("prune", folder, "--plan", plan, "-o", never, "--dry-run")
        yield "quantize --dry-run", command("quantize", folder, "--plan", plan, "-o", never, "--dry-run")


def try_all(model: Model, folder: Path) -> dict[str, Any]:
    """Try the commands on a model, and print a line for each."""
    with tempfile.TemporaryDirectory() as work:
        rows = dict(attempts(folder, Path(work)))
    print(model.name)
    for name, row in rows.items():
        rc = "" if row["rc"] is None else f" rc {row['rc']}"
        print(f"  {name}: {row['seconds']:.1f} s{rc}{'  ' + row['stderr'] if row['stderr'] else ''}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the models' folders are made in it")
    parser.add_argument("names", nargs="*", metavar="NAMES", help="parts of models' names; all without")
    parser.add_argument("--try", action="store_true", dest="trying", help="run moepress on them; makes what lacks")
    given = parser.parse_intermixed_args()  # names may stand behind --try
    chosen = [m for m in MODELS if not given.names or any(n.lower() in m.name.lower() for n in given.names)]
    if not chosen:
        parser.error(f"no such model; there are {', '.join(model.name for model in MODELS)}")
    tried = {}
    for model in chosen:
        folder = given.folder / model.folder
        if not given.trying or not (folder / "config.json").is_file():
            report(model, folder)
        if given.trying:
            tried[model.name] = try_all(model, folder)
    if given.trying:
        file = given.folder / "tried.json"
        file.write_text(json.dumps(tried, indent=2) + "\n")
        print(f"written to {file}")


if __name__ == "__main__":
    main()
