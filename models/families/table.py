"""The families that are written down, and the way to all others."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families import remembered
from moepress.models.families.family import Config, Family, RouterRule, numbered
from moepress.models.families.routing_keys import COUNT_NAMES, RoutingKey, Sort


def _key(name: str, sort: Sort, default: Any, neutral: Any = ..., **more: Any) -> RoutingKey:
    return RoutingKey(name=name, sort=sort, default=default, neutral=default if neutral is ... else neutral, **more)


_RENORMALISE = _key("norm_topk_prob", Sort.FLAG, default=False)
_DENSE_BY_LIST = (
    _key("decoder_sparse_step", Sort.COUNT, 1),
    _key("mlp_only_layers", Sort.LAYERS, None, nullable=True),
)
_MTP_LAYERS = _key("num_nextn_predict_layers", Sort.NUMBER, None, nullable=True)

_MLA_ATTENTION = (("q_proj", "q_a_proj", "kv_a_proj_with_mqa"), ("q_b_proj",), ("kv_b_proj",), ("o_proj",))

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    experts_keys=("n_routed_experts",),
    rule=RouterRule(
        scoring="sigmoid",
        bias=True,
        group_score="top2",
        renormalise_key="norm_topk_prob",
        scale_key="routed_scaling_factor",
    ),
    expert_width_key="moe_intermediate_size",
    router=("model.layers.{layer}.mlp.gate.weight", "model.layers.{layer}.mlp.gate.e_score_correction_bias"),
    groups_key="n_group",
    top_groups_key="topk_group",
    attention_groups=_MLA_ATTENTION,
    never_quantize=("kv_b_proj",),
    float32=("e_score_correction_bias",),
    mtp=True,
    keys=(
        _key("n_group", Sort.COUNT, 8, neutral=1),
        _key("topk_group", Sort.COUNT, 4, neutral=1),
        _key("norm_topk_prob", Sort.FLAG, default=True, neutral=False),
        _key("routed_scaling_factor", Sort.SCALE, 2.5, neutral=1.0),
        _key("n_shared_experts", Sort.NUMBER, 1),
        _key("first_k_dense_replace", Sort.NUMBER, 3),
        _MTP_LAYERS,
    ),
)

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    experts_keys=("n_routed_experts",),
    rule=RouterRule(scoring="softmax", group_score="max", scale_key="routed_scaling_factor"),
    expert_width_key="moe_intermediate_size",
    groups_key="n_group",
    top_groups_key="topk_group",
    attention_groups=_MLA_ATTENTION,
    never_quantize=("kv_b_proj",),
    keys=(
        _key("topk_method", Sort.CHOICE, "greedy", choices=("greedy", "group_limited_greedy")),
        _key("n_group", Sort.COUNT, None, nullable=True),
        _key("topk_group", Sort.COUNT, None, nullable=True),
        _key("routed_scaling_factor", Sort.SCALE, 1.0),
        _key("n_shared_experts", Sort.NUMBER, 2),
        _key("first_k_dense_replace", Sort.NUMBER, 0),
    ),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    experts_keys=("num_experts", "num_local_experts"),  # transformers 5 saves the second
    rule=RouterRule(scoring="softmax", renormalise_key="norm_topk_prob"),
    expert_width_key="moe_intermediate_size",
    keys=(_RENORMALISE, *_DENSE_BY_LIST),
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    experts_keys=("num_experts",),
    rule=RouterRule(scoring="softmax", renormalise_key="norm_topk_prob"),
    expert_width_key="moe_intermediate_size",
    keys=(_RENORMALISE, *_DENSE_BY_LIST, _key("shared_expert_intermediate_size", Sort.NUMBER, 5632)),
)

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    experts_keys=("num_local_experts",),
    rule=RouterRule(scoring="softmax", renormalise=True),
    expert_width_key="intermediate_size",
    # w1 is the gate, w3 the up and w2 the down projection.
    gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    router=("model.layers.{layer}.block_sparse_moe.gate.weight",),
    renames=((".block_sparse_moe.", ".mlp."),),
)

OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    experts_keys=("num_experts",),
    rule=RouterRule(scoring="softmax", renormalise_key="norm_topk_prob"),
    expert_width_key="intermediate_size",
    keys=(_RENORMALISE,),
)

# Kimi-K2 is DeepSeek-V3 under another name, which transformers does not have (`hf_config.ALIASES`).
KIMI_K2 = replace(DEEPSEEK_V3, name="kimi_k2")

FAMILIES = {row.name: row for row in (DEEPSEEK_V3, KIMI_K2, DEEPSEEK_V2, QWEN3_MOE, QWEN2_MOE, MIXTRAL, OLMOE)}


def is_row(config: Config) -> bool:
    """Whether a config's family is written down here, and known without asking transformers."""
    name = config.get("model_type")
    return isinstance(name, str) and name in FAMILIES


def family_of(config: Config, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Family:
    """The row for a model's config, or what is derived for it.

    Args:
        config: config.json.
        shapes: names and shapes of its dense tensors; None where only the config is there, and names do not matter.

    Raises:
        InvalidInputError: config.json names no model type, or describes no model.
        UnsupportedError: the model has no experts, or transformers does not know it.
    """
    name = config.get("model_type")
    if not isinstance(name, str):
        raise InvalidInputError("config.json has no model_type; point moepress at the folder of a Hugging Face model.")
    if name in FAMILIES:
        return FAMILIES[name]
    inner = [value for value in config.values() if isinstance(value, dict)]
    if not set(config).union(*inner) & {*COUNT_NAMES, *_OTHER_COUNTS}:
        raise UnsupportedError(
            f"Model type {name[:80]!r} is dense: config.json states no experts, and moepress presses "
            "mixture-of-experts models."
        )
    # Of fused experts the shape tells how they lie; of others the number of axes is enough.
    kinds = (
        None
        if shapes is None
        else sorted({(numbered(n)[0], shape if len(shape) == 3 else (len(shape),)) for n, shape in shapes.items()})
    )
    file = remembered.place_of("families", config, [kinds])
    found = _recalled(remembered.recall(file))
    if found is None:
        from moepress.models.families.derive import derive

        found = derive(config, shapes)
        remembered.keep(file, asdict(found))
    return found


def _recalled(found: Mapping[str, Any] | None) -> Family | None:
    """A derived family as it was remembered; None where that is not sound."""
    if found is None:
        return None
    try:
        plain = {key: _tuples(value) for key, value in found.items() if key not in ("rule", "keys")}
        rule = found.get("rule")
        return Family(**plain, rule=None if rule is None else RouterRule(**rule))
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


_OTHER_COUNTS = ("moe_num_experts", "num_moe_experts", "n_experts", "ffn_config", "num_experts_per_tok")
