"""A tiny random model of every MoE model type of the installed transformers, its config shrunk by key name.

`tiny_models` writes a recipe per family; here the class's default config is taken and every size in it made small, so a
new transformers release brings its new types along. `python tests/every_family.py` tries all of them.
"""

import copy
import functools
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import windows
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from moepress.models.families import skeleton
from moepress.models.families.hf_config import hf_config
from moepress.models.families.shrunk import (
    CONTEXT,
    COUNT,
    EXPERTS,
    TEXT_VOCABULARY,
    TOP_K,
    depth_of,
    implementations,
    is_correction_bias,
    plain,
    random_model,
    shrunk,
    text_keys,
)

TEXT_VOCAB = TEXT_VOCABULARY

# Wanted even where the class's default has none of it, wherever in the config the key is.
_ALWAYS: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_intermediate_size": 96,
    "mlp_only_layers": [0],
}
_PATTERNS = ("layer_types", "layers_block_type", "mlp_layer_types")  # repeated over all layers
_ALTERNATING = ["sliding_attention", "full_attention"]
_NEMOTRON: dict[str, Any] = {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA4: dict[str, Any] = {
    "num_experts": EXPERTS,
    "top_k_experts": TOP_K,
    "moe_intermediate_size": 64,
}
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": CONTEXT,
    "indexer_compress_ratio": 4,
}
# What a class's default lacks; the keys are those of the text config.
_GIVEN: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"num_experts_per_tok": TOP_K, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": TOP_K, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "diffusion_gemma": _GEMMA4,
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    "gemma4": {**_GEMMA4, "enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 16},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": {"layer_types": _ALTERNATING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mellum": {"layer_types": _ALTERNATING},
    "nemo_speechlm": _NEMOTRON,
    "nemotron_h": _NEMOTRON,
    "nemotron_h_omni": _NEMOTRON,
    "qwen4_exp": _QWEN4,
    "step3p7": {"layer_types": _ALTERNATING, "sliding_window": 8},
}
# What `shrunk` does not get right.
_MENDED: dict[str, dict[str, Any]] = {
    "ernie4_5_vl_moe": {"moe_intermediate_size": [64, 32], "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
}
# Types that can not be built, run or saved and loaded, and why; `python tests/every_family.py` verifies it.
REFUSED: dict[str, str] = {
    "inkling_mm_model": "imports scipy for its vision tower, which moepress does not ask for",
    "qwen3_omni_moe": "has no forward pass of its own, and its talker's default config lacks a size",
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default config of that type with every size made small."""
    values = plain(CONFIG_MAPPING[model_type]())
    _always(values)
    _change(text_keys(values), _GIVEN, model_type)
    values = shrunk(values)
    _change(text_keys(values), _MENDED, model_type)
    return hf_config(values)


def _always(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in _ALWAYS:
            values[key] = copy.copy(_ALWAYS[key])
        elif isinstance(value, dict):
            _always(value)


def _change(values: dict[str, Any], table: Mapping[str, dict[str, Any]], model_type: str) -> None:
    """Changes of a type, in place; those of layers are a pattern."""
    for family, changes in table.items():
        if model_type not in (family, f"{family}_text"):
            continue
        depth = depth_of(values)
        for key, value in changes.items():
            if key in _PATTERNS:
                values[key] = (value * depth)[: max(depth, len(value))]
            else:
                values[key] = values[key] | value if isinstance(value, dict) and key in values else value


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
    values = text_keys(config.to_dict())
    return any(re.fullmatch(COUNT, key) for key in values | values.get("ffn_config", {}))


def _has_experts(model_type: str) -> bool:
    try:
        return bool(experts_of(skeleton.build_skeleton(plain(tiny_config(model_type)), attention="eager")))
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
    try:
        return skeleton.auto_class(CONFIG_MAPPING[model_type]())
    except Exception:  # of a default that its own class refuses: whatever it raises, there is no model
        return None


def build(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """The tiny model of that type in fp32, in memory, in eval mode.

    Args:
        model_type: one of `moe_types()`.
        seed: of the weights.
        changes: keys of the text config that differ from `tiny_config`.
    """
    values = plain(tiny_config(model_type))
    text_keys(values).update(changes)
    return random_model(values, seed)


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
    options = {"dtype": torch.float32, "output_loading_info": True, **implementations(auto, config)}
    model, report = auto.from_pretrained(folder, **options)
    _cast(model, torch.float32)  # inkling2's parts keep the dtype of their own config
    return model.eval(), report


def _cast(model: Any, dtype: torch.dtype) -> None:
    model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # `to` drops half of a complex table


def plain_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of token windows [B, T]; with what autograd wants, where it is on."""
    canvas = {"decoder_input_ids": tokens} if hasattr(model.config, "canvas_length") else {}  # else it draws one
    logits: Tensor = model(input_ids=tokens, **canvas).logits
    return logits


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """`plain_logits`, without."""
    return plain_logits(model, tokens)


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
