"""Legal expert counts, names, and the numbers read from a config."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import InvalidInputError, UnsupportedError, UsageError
from moepress.models.families.family import (
    Part,
    Shape,
    experts_key,
    illegal_count,
    legal_counts,
    part_of,
    require_legal,
    shape_of,
)
from moepress.models.families.table import DEEPSEEK_V3, FAMILIES, MIXTRAL, OLMOE, QWEN3_MOE, family_of


def shape(experts: int = 256, top_k: int = 8, groups: int = 8, top_groups: int = 4) -> Shape:
    return Shape(
        layers=61,
        hidden=7168,
        experts=experts,
        top_k=top_k,
        expert_width=2048,
        groups=groups,
        top_groups=top_groups,
        vocabulary=129280,
        context=4096,
    )


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (257, "has only 256"),
        (7, "chooses 8 experts"),
        (100, "multiple of 8"),
        (8, "needs 2 experts"),
    ],
)
def test_an_illegal_count_is_refused_with_its_reason(count: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        require_legal(shape(), count)
    assert caught.value.exit_code == 2
    assert "nearest legal counts" in str(caught.value)
    assert "--groups degroup" in str(caught.value)


def test_the_groups_that_a_token_may_use_must_hold_top_k_experts() -> None:
    assert "fewer than 8" in str(illegal_count(shape(top_groups=2), 24))
    assert illegal_count(shape(top_groups=2), 32) is None


def test_the_nearest_legal_counts_are_named() -> None:
    with pytest.raises(UsageError, match="88, 96, 104, 112"):
        require_legal(shape(), 100)


def test_degrouping_allows_any_count_from_top_k_on() -> None:
    assert legal_counts(shape(), degroup=True) == tuple(range(8, 257))
    require_legal(shape(), 100, degroup=True)


@given(
    size=st.integers(2, 8), groups=st.integers(1, 6), top_groups=st.integers(1, 6), top_k=st.integers(1, 8), n=st.data()
)
def test_legal_counts_obey_the_rules(size: int, groups: int, top_groups: int, top_k: int, n: Any) -> None:
    whole = shape(experts=size * groups, top_k=top_k, groups=groups, top_groups=top_groups)
    count = n.draw(st.integers(1, size * groups + 1))
    legal = top_k <= count <= size * groups and (
        groups == 1 or (count % groups == 0 and count // groups >= 2 and top_groups * (count // groups) >= top_k)
    )
    assert (count in legal_counts(whole)) == legal == (illegal_count(whole, count) is None)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_names_of_experts_can_be_taken_apart_and_put_together(family: Any) -> None:
    for name in family.expert_names(12, 345):
        layer, expert, rest = family.expert_of(name)
        assert (layer, expert) == (12, 345)
        assert family.renumber(layer, expert, rest) == name
        assert family.renumber(layer, 7, rest) == name.replace(".345.", ".7.")
        assert family.layer_of(name) == 12
        assert part_of(family, name, 13) is Part.ROUTED
    scaled = f"{family.expert_names(1, 2)[0]}_scale_inv"
    assert family.expert_of(scaled)[:2] == (1, 2)
    for other in (*family.router_names(1), family.fused_gate_up.format(layer=1), "model.norm.weight", "lm_head.weight"):
        assert family.expert_of(other) is None


def test_w1_is_the_gate_w3_the_up_and_w2_the_down_projection_of_mixtral() -> None:
    assert [n.split(".")[-2] for n in MIXTRAL.expert_names(0, 0)] == ["w1", "w3", "w2"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", Part.EMBEDDINGS),
        ("lm_head.weight", Part.LM_HEAD),
        ("model.norm.weight", Part.NORMS),
        ("model.layers.3.input_layernorm.weight", Part.NORMS),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", Part.NORMS),
        ("model.layers.3.self_attn.q_norm.weight", Part.NORMS),
        ("model.layers.3.self_attn.kv_b_proj.weight", Part.ATTENTION),
        ("model.layers.3.mlp.gate.e_score_correction_bias", Part.ROUTER),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", Part.SHARED),
        ("model.layers.3.mlp.experts.9.up_proj.weight_scale_inv", Part.ROUTED),
        ("model.layers.0.mlp.gate_proj.weight", Part.DENSE),
        ("model.layers.61.mlp.experts.9.up_proj.weight", Part.MTP),
        ("model.layers.61.eh_proj.weight", Part.MTP),
    ],
)
def test_every_tensor_belongs_to_a_part(name: str, part: Part) -> None:
    assert part_of(DEEPSEEK_V3, name, 61) is part


def test_a_dense_model_is_refused_by_its_type() -> None:
    with pytest.raises(UnsupportedError, match="llama") as caught:
        family_of({"model_type": "llama"})
    assert caught.value.exit_code == 5
    with pytest.raises(InvalidInputError, match="model_type"):
        family_of({})


def test_the_key_of_the_expert_count_is_the_one_that_is_there() -> None:
    assert experts_key(QWEN3_MOE, {"num_experts": 8}) == "num_experts"
    assert experts_key(QWEN3_MOE, {"num_local_experts": 8}) == "num_local_experts"
    with pytest.raises(InvalidInputError, match="num_experts"):
        experts_key(OLMOE, {"n_routed_experts": 8})


@pytest.mark.parametrize("value", [0, -3, 1.5, "8", None, True, [8], 1 << 40])
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok", "vocab_size"]
)
def test_a_config_number_that_makes_no_sense_is_refused_by_name(key: str, value: object) -> None:
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 8,
        "vocab_size": 16,
    }
    assert shape_of(OLMOE, config).experts == 4
    with pytest.raises(InvalidInputError, match=f"config.json: {key} is"):
        shape_of(OLMOE, {**config, key: value})
