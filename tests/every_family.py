"""A tiny random model of every MoE model type of the installed transformers, its config shrunk by key name.

`tiny_models` writes a recipe per family; here the class's default config is taken and every size in it made small, so a
new transformers release brings its new types along. `python tests/every_family.py` tries all of them.
"""

import functools
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import windows
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
)

HIDDEN, EXPERTS, TOP_K, LAYERS, CONTEXT = 64, 12, 4, 4, 256
TEXT_VOCAB = 256  # random windows below it meet no special token
VOCAB = TEXT_VOCAB + 32  # the special ids are the last 32

_COUNT = "num_experts|num_local_experts|n_routed_experts|moe_num_experts"
_TOP_K = "num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|moe_top_k|top_k_experts"
_HEADS = "num_attention_heads|num_heads|n_heads|encoder_attention_heads|attention_heads"

# Whole key -> size; the first that fits counts. All widths are multiples of 32, as groups of 32 weights ask.
_SIZES: tuple[tuple[str, int], ...] = (
    (_COUNT, EXPERTS),
    ("zero_expert_num", 4),
    ("num_hidden_layers|n_layers", LAYERS),
    ("num_layers", LAYERS // 2),  # longcat_flash: a layer has two sub-layers, which num_hidden_layers counts
    ("num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers", 0),
    (f"{_HEADS}|num_sliding_attention_heads|swa_num_attention_heads|index_n_heads|indexer_n_heads|o_groups", 4),
    ("linear_num_heads|linear_num_value_heads", 4),
    ("linear_num_key_heads|swa_num_key_value_heads|num_global_key_value_heads|kv_n_heads", 2),
    ("mamba_num_heads|mamba_n_heads|mamba_dt_rank", 8),
    ("hidden_size|d_model|emb_dim|moe_hidden_size|.*_hidden_size|.*_hidden_dim|.*hidden_size_per_layer_input", HIDDEN),
    (r"adapter_(in_dim|out_dim|input_size)|projector_(in|out)put_dim|vision_output_dim|output_dim", HIDDEN),
    ("(moe|expert)_intermediate_size|expert_ffn_hidden_size", 64),
    (r"shared?_expert\w*_(intermediate_size|dim)|moe_shared_expert_intermediate_size|shared_intermediate_size", 96),
    (r"(\w+_)?intermediate_size(_mlp)?|ffn_hidden_size|encoder_ffn_dim|mlp_dim", 128),
    (r"(index|indexer)_head_dim", 32),
    (r"(\w+_)?head_dim|mamba_d_head|kv_channels|rotary_dim|ssm_state_size|mamba_d_state", 16),
    (r"[qkvo]+_lora_rank|\w+_lowrank|gated_norm_rank|router_hidden_size|kv_lora_rank", 32),
    ("n_groups", 2),
    ("vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|padded_vocab_size", VOCAB),
    (r"(original_)?max_position_embeddings|max_seq_len|model_max_length", CONTEXT),
    (r"index_topk|indexer_budget", CONTEXT),  # all tokens: which are chosen would hang on the last bit of a score
    (r"(sliding_window|attention_chunk)(_size)?|chunk_size|mamba_chunk_size", 8),
    ("heavily_compressed_attention", 8),  # tokens that become one; 128 would not show in a short window
    ("image_size|max_img_size", 32),
    ("patch_size", 8),
    ("num_position_embeddings|position_embedding_size", 16),
    ("pos_emb_height|pos_emb_width|posemb_grid_size", 4),
)
_SPECIAL = re.compile(r"\w*(_token_id|_token_index|_(bos|pad|nothink|eos)_id)")
# Wanted even where the class's default has none of it.
_ALWAYS: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_intermediate_size": 96,
    "mlp_only_layers": [0],
    "num_nextn_predict_layers": 0,
    "deepstack_visual_indexes": [0, 1],
    "global_attn_indexes": [1],
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_NEMOTRON: dict[str, Any] = {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]}
_DEEPSEEK_V2: dict[str, Any] = {"num_experts_per_tok": TOP_K}
_GEMMA4: dict[str, Any] = {
    "num_experts": EXPERTS,
    "top_k_experts": TOP_K,
    "moe_intermediate_size": 64,
}
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": CONTEXT,
    "indexer_compress_ratio": 4,
}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 64, "qk_nope_head_dim": 48}
_DOTS3: dict[str, Any] = {  # a quarter of head_dim is rotated; sliding layers have fewer and wider heads
    "head_dim": 64,
    "qk_nope_head_dim": 32,
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "sliding_attention"],
    "per_layer_config": {2: _SLIDING, 3: _SLIDING},
}
# What the rules by key name do not get right; the keys are those of the text config.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {**_DEEPSEEK_V2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "deepseek_v2": {**_DEEPSEEK_V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "diffusion_gemma": _GEMMA4,
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    "dots3_note": _DOTS3,
    "ernie4_5_vl_moe": {"moe_intermediate_size": [64, 32], "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "gemma4": {**_GEMMA4, "enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 16},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": {"layer_types": _ALTERNATING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mellum": {"layer_types": _ALTERNATING},
    "nemo_speechlm": _NEMOTRON,
    "nemotron_h": _NEMOTRON,
    "nemotron_h_omni": _NEMOTRON,
    "qwen4_exp": _QWEN4,
    "step3p7": {"layer_types": _ALTERNATING, "sliding_window": 8},
}
# Types that can not be built, run or saved and loaded, and why; `python tests/every_family.py` verifies it.
REFUSED: dict[str, str] = {
    "inkling_mm_model": "imports scipy for its vision tower, which moepress does not ask for",
    "qwen3_omni_moe": "has no forward pass of its own, and its talker's default config lacks a size",
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default config of that type with every size made small."""
    cls = CONFIG_MAPPING[model_type]
    values = cls().to_dict()
    text_keys = _text_keys(values)
    _shrink(values, iter(range(TEXT_VOCAB, VOCAB)))
    for family, changes in _OVERRIDES.items():
        if model_type in (family, f"{family}_text"):
            text_keys |= {k: text_keys[k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    return cls.from_dict(values)


def _text_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that speaks of the text model."""
    inner = values.get("thinker_config", values).get("text_config")
    return values if inner is None else inner


def _shrink(values: dict[str, Any], special: Iterator[int], layers: int = LAYERS) -> None:
    """Make the sizes of a config small, in place, those of its sub-configs too."""
    before = dict(values)
    for key in ("dtype", "transformers_version", "per_layer_config"):
        values.pop(key, None)
    depth = next((before[k] for k in ("num_hidden_layers", "num_layers", "depth") if before.get(k)), None)
    for key, value in list(values.items()):
        if key in ("id2label", "label2id") or not isinstance(key, str):
            continue
        if isinstance(value, dict):
            _shrink(value, special, LAYERS if "text" in key else 2)
        elif isinstance(value, list):
            values[key] = _list(key, value, depth, layers)
        elif key in _ALWAYS:
            values[key] = _ALWAYS[key]
        elif isinstance(value, int) and not isinstance(value, bool):
            values[key] = _number(key, value, layers, special)
    _fit(before, values)


def _list(key: str, value: list[Any], depth: int | None, layers: int) -> list[Any]:
    """A list of `layers` entries where the default has one per layer, else the list as it is."""
    if key in _ALWAYS:
        return list(_ALWAYS[key])
    if len(value) != depth:
        return value
    if value == sorted(set(value)) and isinstance(value[0], int):  # numbers of layers
        return value[:layers]
    if key == "num_attention_heads_per_layer":
        return [4] * layers
    kinds = Counter(value)
    most = kinds.most_common(1)[0][0]
    if key == "mlp_layer_types":
        first = "dense" if "sparse" in kinds else next(iter(kinds))
        return [first] + [most] * (layers - 1)
    if set(value[:layers]) == set(kinds) and value[:layers].count(most) > 1:
        return value[:layers]
    return ([most] * layers + [kind for kind in kinds if kind != most])[-layers:]  # gemma4 asks for the rare kind last


def _number(key: str, value: int, layers: int, special: Iterator[int]) -> int:
    """The small number in place of a default; 0 and -1 say that there is none of it, and 1 is as small as can be."""
    if key in ("bos_token_id", "eos_token_id"):
        return int(key == "eos_token_id")
    if _SPECIAL.fullmatch(key):
        return next(special)
    if re.fullmatch(_TOP_K, key):
        return min(value, TOP_K)
    if value < 1 or key in ("n_group", "num_expert_group", "topk_group"):
        return value
    if key in ("num_hidden_layers", "n_layers", "depth", "encoder_layers"):
        return layers
    return next((size for names, size in _SIZES if re.fullmatch(names, key)), value)


def _fit(before: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Set the sizes that hang on others of the same config."""
    for key in ("n_group", "num_expert_group"):
        if (before.get(key) or 1) > 1:
            values[key], values["topk_group"] = 4, 2
    heads, shared = before.get("num_attention_heads"), before.get("num_key_value_heads")
    if heads and shared:
        values["num_key_value_heads"] = 4 if shared == heads else min(shared, 2)
    if before.get("qk_head_dim"):
        values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
        if before.get("head_dim") == before["qk_head_dim"] != before["qk_rope_head_dim"]:
            values["head_dim"] = values["qk_head_dim"]
    names = [key for key in before if isinstance(key, str)]
    own_width = any(re.fullmatch(r"moe_intermediate_size|\w*expert\w*_size", key) for key in names)
    if any(re.fullmatch(_COUNT, key) for key in names) and not own_width:
        values["intermediate_size"] = 64  # it is the experts' width
    _fit_layers(before, values)


def _fit_layers(before: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Sizes that differ from layer to layer: each kind of layer keeps how it stands to the others."""
    if not before.get("per_layer_config") or "layer_types" not in before:
        return
    by_kind = {before["layer_types"][int(layer)]: sizes for layer, sizes in before["per_layer_config"].items()}
    values["per_layer_config"] = {
        layer: {key: values[key] * size // before[key] for key, size in by_kind[kind].items()}
        for layer, kind in enumerate(values["layer_types"])
        if kind in by_kind
    }


@functools.cache
def moe_types() -> tuple[str, ...]:
    """Every model type with routed experts that an auto class of text or of text and images takes."""
    return tuple(t for t in CONFIG_MAPPING if _states_experts(t) and _has_experts(t))


def _states_experts(model_type: str) -> bool:
    if auto_class(model_type) is None:
        return False
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:  # a default that its own class refuses: whatever it raises, there is no model
        return False
    values = _text_keys(config.to_dict())
    return any(re.fullmatch(_COUNT, key) for key in values | values.get("ffn_config", {}))


def _has_experts(model_type: str) -> bool:
    try:
        with torch.device("meta"):
            return bool(experts_of(_empty(tiny_config(model_type))))
    except Exception:  # of those REFUSED, and of a new type, which `main` is to show
        return True


def experts_of(model: nn.Module) -> list[str]:
    """The names of the modules that hold the routed experts."""
    return [n for n, m in model.named_modules() if _is_experts(m)]


def _is_experts(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    fused = isinstance(down, nn.Parameter) and down.ndim == 3
    return fused or type(module).__name__.endswith(("ParallelExperts", "ExpertGLU"))  # jetmoe, dbrx


def auto_class(model_type: str) -> Any:
    """The auto class of a type: that of the whole model where it has several parts, None where there is none."""
    cls = CONFIG_MAPPING[model_type]
    whole = "text_config" in cls.sub_configs or "thinker_config" in cls.sub_configs
    several = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    for auto in (*several, AutoModelForCausalLM) if whole else (AutoModelForCausalLM, *several):
        if cls in auto._model_mapping:
            return auto
    return None


def _empty(config: PretrainedConfig) -> Any:
    auto = auto_class(config.model_type)
    return auto.from_config(config, dtype=torch.float32, **_implementations(config))


def _implementations(config: PretrainedConfig) -> dict[str, str]:
    """Plain experts, and sdpa where the class has it."""
    cls = auto_class(config.model_type)._model_mapping[type(config)]
    return {"attn_implementation": "sdpa" if cls._supports_sdpa else "eager", "experts_implementation": "eager"}


def build(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """The tiny model of that type in fp32, in memory, in eval mode.

    Args:
        model_type: one of `moe_types()`.
        seed: of the weights.
        changes: keys of the text config that differ from `tiny_config`.
    """
    values = tiny_config(model_type).to_dict()
    _text_keys(values).update(changes)
    config = CONFIG_MAPPING[model_type].from_dict(values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # what transformers itself fills
        model = _empty(config).eval()
    generator = torch.Generator().manual_seed(seed)
    experts = _text_keys(values)
    count = next(v for k, v in (experts | experts.get("ffn_config", {})).items() if re.fullmatch(_COUNT, k))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # the order is fixed, so the weights are
            tensor.copy_(_weight(name, tensor, count, generator))
    return model


def _weight(name: str, like: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """The values of one parameter or buffer, which still holds what transformers filled it with."""
    if name.endswith("tid2eid"):  # [vocabulary, top-k] numbers of experts, different ones in a row
        return torch.rand(len(like), experts, generator=generator).argsort(dim=1)[:, : like.shape[1]]
    if not like.is_floating_point():
        return like.clone()
    values = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if name.endswith("running_var"):
        return like + 0.1 * values.abs()
    if is_correction_bias(name):
        return torch.where(like < 0, like, values * 0.2)  # zaya: -1 of the class that skips; its loader sets it again
    if like.ndim < 2:
        return like + 0.1 * values  # norms near 1, or near 0 where the class adds the 1; biases near 0
    if re.search("gate|router", name) and experts <= len(like) <= experts + 4:
        return values * 0.3
    if re.search("embed_tokens|lm_head|wte", name):
        return values * 0.5
    fan_in = like[0].numel() if "conv" in name else like.shape[-1]
    return values * fan_in**-0.5  # keeps the scale of what passes through


def is_correction_bias(name: str) -> bool:
    """Whether a tensor shifts the choice of experts and not their weights."""
    return name.endswith(("e_score_correction_bias", "expert_bias", "balancing_biases"))


def save(model: Any, folder: Path, *, dtype: torch.dtype = torch.float32, fused: bool = False, shards: int = 2) -> Path:
    """Save a model of `build`; it is cast in place, but for the bias of the router's choice.

    Args:
        model: of `build`.
        folder: made here.
        dtype: of the weights on disk.
        fused: tensors as the modules hold them instead of as the published models do.
        shards: about that many files; 1 gives a single `model.safetensors`.
    """
    transformers.utils.logging.disable_progress_bar()
    biases = {n: t for n, t in model.state_dict().items() if is_correction_bias(n)}
    biases = {n: t.clone() for n, t in biases.items()}
    _cast(model, dtype)
    for name, bias in biases.items():
        parent, leaf = name.rsplit(".", 1)
        owner = model.get_submodule(parent)
        wrap = nn.Parameter if leaf in owner._parameters else nn.Buffer
        setattr(owner, leaf, wrap(bias))
    model.config.dtype = dtype
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    limit = size * 2 if shards == 1 else size // shards + 1
    model.save_pretrained(folder, max_shard_size=limit, save_original_format=not fused)
    return folder


def load(folder: Path) -> Any:
    """transformers' own model of a folder, fp32, eval mode."""
    return load_report(folder)[0]


def load_report(folder: Path) -> tuple[Any, dict[str, Any]]:
    """As `load`, with what the loader says of keys that are missing, unexpected or of another shape."""
    config = AutoConfig.from_pretrained(folder)
    auto = auto_class(config.model_type)
    options = {"dtype": torch.float32, "output_loading_info": True, **_implementations(config)}
    model, report = auto.from_pretrained(folder, **options)
    _cast(model, torch.float32)  # inkling2's parts keep the dtype of their own config
    return model.eval(), report


def _cast(model: Any, dtype: torch.dtype) -> None:
    model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # `to` drops half of a complex table


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of token windows [B, T]."""
    canvas = {"decoder_input_ids": tokens} if hasattr(model.config, "canvas_length") else {}  # else it draws one
    return model(input_ids=tokens, **canvas).logits


def trial(model_type: str) -> str:
    """What is wrong with a type, in one line.

    Nothing if it builds, runs, is saved, loads to the same logits, and its routed experts show in them.
    """
    tokens = windows(TEXT_VOCAB, count=2)
    model = build(model_type)
    want = logits(model, tokens)
    if not want.isfinite().all():
        return "logits are not finite"
    with tempfile.TemporaryDirectory() as folder:
        again, report = load_report(save(model, Path(folder)))
        bad = {k: sorted(report[k])[:2] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[k]}
        if bad:
            return f"loads with {bad}"
        error = (logits(again, tokens) - want).abs().max() / want.abs().max()
        if error > 1e-5:  # not 0: where a tensor lies in memory decides how some kernels sum
            return f"reloaded logits differ by {error:.1e} of the largest"
    names = experts_of(model)
    if not names:
        return "no experts"
    with torch.no_grad():
        for name in names:
            for parameter in model.get_submodule(name).parameters():
                parameter.zero_()
    share = ((logits(model, tokens) - want).norm() / want.norm()).item()
    return "" if share > 0.1 else f"experts change the logits by {share:.0%} only"


def main() -> int:
    """Try the types named on the command line, or all, print what came of each, and count the surprises."""
    failed = 0
    for model_type in sys.argv[1:] or moe_types():
        start = time.perf_counter()
        try:
            reason = trial(model_type)
        except Exception as error:  # whatever transformers raises: the table is to show it
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:150]
        seconds = time.perf_counter() - start
        expected = REFUSED.get(model_type)
        failed += bool(reason) != bool(expected)
        if reason and expected:
            reason = f"refused, as it {expected}: {reason}"
        print(f"{model_type:24} {auto_class(model_type).__name__:28} {seconds:5.1f} s  {reason or 'ok'}", flush=True)
    return failed


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.exit(main())
