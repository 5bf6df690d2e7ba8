"""Tiny random models, one or two per family, made by transformers itself and saved as it saves them.

Weights are seeded and large enough that routing is decisive and that every part of the model shows in the logits.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

INDEX = "model.safetensors.index.json"

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MLA: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 64,
}
_MIXTRAL: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A recipe: `family` is a row of moepress's table, `config` what differs from the defaults of the config class."""

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)


# key -> recipe. The keys are what tests are parametrised with.
TINY: dict[str, Tiny] = {
    "deepseek_v3": Tiny(
        family="deepseek_v3",
        config={
            **_MLA,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
            "scoring_func": "sigmoid",
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "moonlight": Tiny(
        family="deepseek_v3",
        config={
            **_MLA,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.446,
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
            "scoring_func": "sigmoid",
        },
    ),
    "deepseek_v2": Tiny(
        family="deepseek_v2",
        config={
            **_MLA,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 4.0,
            "topk_method": "group_limited_greedy",
        },
    ),
    "deepseek_v2_lite": Tiny(
        family="deepseek_v2",
        config={
            **_MLA,
            "q_lora_rank": None,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
            "rope_parameters": _YARN,
        },
    ),
    "qwen3_moe": Tiny(
        family="qwen3_moe",
        config={
            **_COMMON,
            "vocab_size": 300,
            "hidden_size": 128,
            "head_dim": 32,
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        },
    ),
    "qwen2_moe": Tiny(
        family="qwen2_moe",
        config={
            **_COMMON,
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": Tiny(
        family="mixtral",
        config={
            **_COMMON,
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
    "mixtral_window": Tiny(
        family="mixtral",
        config={
            **_COMMON,
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
    ),
    "olmoe": Tiny(
        family="olmoe",
        config={
            **_COMMON,
            "num_key_value_heads": 4,
            "intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
        },
    ),
}
KEYS = tuple(TINY)


def build(key: str, *, seed: int = 0, **changes: Any) -> Any:
    """The transformers model of that key in fp32, in memory, in eval mode; `changes` go into its config."""
    recipe = TINY[key]
    config = CONFIG_MAPPING[recipe.family](**{**recipe.config, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # the order is fixed, so the weights are
            tensor.copy_(_weight(name, tensor, generator))
    return model


def _weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if name.endswith("e_score_correction_bias"):
        return values * 0.2
    if name.endswith("norm.weight"):
        return 1.0 + 0.1 * values
    if ".mlp.gate." in name:
        return values * 0.3
    if name.endswith("bias"):
        return values * 0.1
    if "embed_tokens" in name or "lm_head" in name:
        return values * 0.5
    return values * max(like.shape[-1], 1) ** -0.5  # keeps the scale of what passes through


def make(
    key: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
    shards: int = 3,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Save the tiny model of that key with `save_pretrained`.

    Args:
        key: one of `KEYS`.
        folder: made here.
        dtype: of the weights on disk; the router's correction bias stays fp32, as in the published models.
        fused: experts as the two three-dimensional tensors of transformers 5 instead of one tensor per matrix.
        shards: about that many files; 1 gives a single `model.safetensors`.
        seed: of the weights.
        changes: config keys that differ from the recipe.
    """
    model = build(key, seed=seed, **changes)
    return save(model, folder, dtype=dtype, fused=fused, shards=shards)


def save(model: Any, folder: Path, *, dtype: torch.dtype = torch.float32, fused: bool = False, shards: int = 3) -> Path:
    """Save a model of `build`; it is cast in place."""
    transformers.utils.logging.disable_progress_bar()
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    model.to(dtype)
    model.config.dtype = dtype
    for name, bias in biases.items():
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, nn.Buffer(bias))
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    limit = size if shards == 1 else size // shards + 1
    model.save_pretrained(folder, max_shard_size=limit * 2 if shards == 1 else limit, save_original_format=not fused)
    return folder


def reference(folder: Path, dtype: torch.dtype = torch.float32, *, attention: str = "sdpa") -> Any:
    """transformers' own model of a folder, eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def windows(vocabulary: int, count: int = 5, length: int = 24, seed: int = 1) -> Tensor:
    """Random token windows, int64 [count, length]."""
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], *, shards: int = 2) -> None:
    """Let `change` edit the tensors of a folder, and save them again with a fitting index."""
    tensors = load_tensors(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    change(tensors)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        part, file = names[number::shards], f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; a value of `...` removes the key."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}, indent=2))


def add_mtp(folder: Path, *, seed: int | None = None) -> None:
    """Append a multi-token-prediction layer behind the last decoder layer, as DeepSeek-V3's folder has one.

    It is the last layer once more; with a seed its matrices are its own.
    """
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    last, mtp = f"model.layers.{layers - 1}.", f"model.layers.{layers}."

    def append(tensors: dict[str, Tensor]) -> None:
        hidden = tensors["model.norm.weight"].shape[0]
        tensors |= {mtp + n.removeprefix(last): t.clone() for n, t in tensors.items() if n.startswith(last)}
        tensors[f"{mtp}enorm.weight"] = tensors["model.norm.weight"].clone()
        tensors[f"{mtp}hnorm.weight"] = tensors["model.norm.weight"].clone()
        tensors[f"{mtp}eh_proj.weight"] = torch.ones(hidden, 2 * hidden, dtype=tensors["model.norm.weight"].dtype)
        if seed is not None:
            tensors[f"{mtp}shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
            _draw({n: t for n, t in tensors.items() if n.startswith(mtp)}, seed)

    rewrite(folder, append)
    edit_config(folder, num_nextn_predict_layers=1)


def add_mtp_apart(folder: Path, twin: int, *, layers_at: str = "model.layers.", seed: int = 0) -> None:
    """Add a multi-token-prediction layer under the prefix `mtp.`, as Qwen3-Next's and Qwen3.5's folders have it.

    Args:
        folder: a model's.
        twin: the decoder layer, of full attention, whose tensors it has, with values of its own.
        layers_at: the prefix of the decoder layers' names.
        seed: of the values.
    """
    like = f"{layers_at}{twin}."

    def append(tensors: dict[str, Tensor]) -> None:
        added = {f"mtp.layers.0.{n.removeprefix(like)}": t.clone() for n, t in tensors.items() if n.startswith(like)}
        norm = tensors[f"{like}input_layernorm.weight"]
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            added[f"mtp.{name}.weight"] = norm.clone()
        added["mtp.fc.weight"] = torch.empty(len(norm), 2 * len(norm), dtype=norm.dtype)
        _draw(added, seed)
        tensors |= added

    rewrite(folder, append)
    config = json.loads((folder / "config.json").read_text())
    if "text_config" in config:
        edit_config(folder, text_config=config["text_config"] | {"mtp_num_hidden_layers": 1})


def _draw(tensors: Mapping[str, Tensor], seed: int) -> None:
    """Other values in place, of about the same size as `_weight` has."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        values = torch.randn(tensor.shape, generator=generator)
        if "bias" in name:
            values *= 0.2
        elif tensor.ndim == 1:
            values = tensor.float() + 0.1 * values
        elif name.endswith(".gate.weight"):
            values *= 0.3
        else:
            values *= tensor.shape[-1] ** -0.5
        tensor.copy_(values)


def to_fp8(folder: Path, block: tuple[int, int] = (48, 40)) -> None:
    """Turn the Linears of a per-expert folder into fp8 with block scales, as DeepSeek-V3 stores them.

    The default block does not divide the tiny widths, so that cut-off edge blocks occur.
    """

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("_proj.weight", "_with_mqa.weight"))]:
            tensors[name], tensors[f"{name}_scale_inv"] = fp8_blocks(tensors[name], block)

    rewrite(folder, quantize)
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    edit_config(folder, quantization_config={**quantization, "weight_block_size": list(block)})


def fp8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to float8_e4m3fn with one fp32 scale per block (slow loop)."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            part = weight[here].float()
            scales[i, j] = part.abs().max().clamp(min=1e-6) / 448
            out[here] = (part / scales[i, j]).to(torch.float8_e4m3fn)
    return out, scales
