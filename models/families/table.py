"""The table of supported families. A new model is a row here and a line in tests/tiny_models.py."""

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.family import Config, Family, RouterRule

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
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    experts_keys=("num_experts", "num_local_experts"),  # transformers 5 saves the second
    rule=RouterRule(scoring="softmax", renormalise_key="norm_topk_prob"),
    expert_width_key="moe_intermediate_size",
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    experts_keys=("num_experts",),
    rule=RouterRule(scoring="softmax", renormalise_key="norm_topk_prob"),
    expert_width_key="moe_intermediate_size",
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
)

FAMILIES = {row.name: row for row in (DEEPSEEK_V3, DEEPSEEK_V2, QWEN3_MOE, QWEN2_MOE, MIXTRAL, OLMOE)}


def family_of(config: Config) -> Family:
    """The row for a model's config.

    Raises:
        InvalidInputError: config.json names no model type.
        UnsupportedError: the model type is not in the table.
    """
    name = config.get("model_type")
    if not isinstance(name, str):
        raise InvalidInputError("config.json has no model_type; point moepress at the folder of a Hugging Face model.")
    if name not in FAMILIES:
        raise UnsupportedError(f"Model type {name!r} is not supported; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[name]
