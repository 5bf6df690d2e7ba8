"""A derived family proves itself by a tiny model, which also tells its router's rule and the order of its Linears."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import every_family
import pytest
import torch
from torch import Tensor

from moepress.errors import UnsupportedError
from moepress.models.families import remembered
from moepress.models.families.derive import derive
from moepress.models.families.family import RouterRule, shape_of
from moepress.models.families.router import router_of
from moepress.models.families.routing import scores
from moepress.models.families.shrunk import depth_of, plain, shrunk, text_keys
from moepress.models.families.table import FAMILIES, family_of
from moepress.models.forward import probe, proof, streamed
from moepress.models.forward.gating import Gating
from moepress.models.forward.proof import Proven, prove, proven_family
from moepress.models.storage.checkpoint import open_checkpoint

ATTENTION = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
GATED = (("gate_proj", "up_proj"), ("down_proj",))
GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.8}

# Type -> keys of its text config that differ from its tiny default, its rule, the tensor of its choice's bias.
RULES: dict[str, tuple[dict[str, Any], RouterRule | None, str]] = {
    "glm4_moe": (
        GROUPED,
        RouterRule(scoring="sigmoid", bias=True, group_score="top2", renormalise=True, scale=1.8),
        "mlp.gate.e_score_correction_bias",
    ),
    "gpt_oss": ({}, RouterRule(scoring="softmax", renormalise=True), ""),
    "qwen3_5_moe": ({}, RouterRule(scoring="softmax", renormalise=True), ""),
    "nemotron_h": (
        {"routed_scaling_factor": 2.5},
        RouterRule(scoring="sigmoid", bias=True, renormalise=True, scale=2.5),
        "mixer.gate.e_score_correction_bias",
    ),
    "ernie4_5_moe": (
        {},
        RouterRule(scoring="softmax", bias=True, renormalise=True),
        "mlp.gate.moe_statics.e_score_correction_bias",
    ),
    "minimax_m2": ({}, RouterRule(scoring="sigmoid", bias=True, renormalise=True), "mlp.e_score_correction_bias"),
    "llama4": ({}, None, ""),  # weighs the experts' inputs
    "lfm2_moe": ({}, RouterRule(scoring="sigmoid", bias=True, renormalise=True), "feed_forward.expert_bias"),
    "deepseek_v4": ({}, None, ""),  # its first layers choose by a table
    "afmoe": ({}, RouterRule(scoring="sigmoid", bias=True, renormalise=True), "mlp.expert_bias"),
}
GROUPS: dict[str, tuple[probe.Groups, probe.Groups]] = {
    "glm4_moe": (ATTENTION, GATED),
    "gpt_oss": (ATTENTION, ()),
    "qwen3_5_moe": (
        (
            ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
            ("q_proj", "k_proj", "v_proj"),
            ("out_proj",),
            ("o_proj",),
        ),
        GATED,
    ),
    "nemotron_h": (
        (("in_proj",), ("q_proj", "k_proj", "v_proj"), ("out_proj",), ("o_proj",)),
        (("up_proj",), ("down_proj",)),
    ),
    "lfm2_moe": ((("in_proj",), ("q_proj", "k_proj", "v_proj"), ("out_proj",)), (("w1", "w3"), ("w2",))),
    "afmoe": ((("q_proj", "k_proj", "v_proj", "gate_proj"), ("o_proj",)), GATED),
}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    config = plain(every_family.tiny_config(model_type))
    text_keys(config).update(changes)
    return config


@pytest.fixture(scope="module")
def proven() -> Callable[[str], Proven]:
    return lambda model_type: prove(config_of(model_type, **RULES[model_type][0]))


@pytest.mark.parametrize("model_type", RULES)
def test_the_proof_finds_the_routers_rule(proven: Callable[[str], Proven], model_type: str) -> None:
    _, rule, correction = RULES[model_type]
    found = proven(model_type)
    assert found.rule == rule
    assert found.correction.partition("#.")[2] == correction


@pytest.mark.parametrize("model_type", GROUPS)
def test_linears_come_in_the_order_of_the_data(proven: Callable[[str], Proven], model_type: str) -> None:
    found = proven(model_type)
    assert (found.attention_groups, found.mlp_groups) == GROUPS[model_type]


def test_experts_outputs_are_added_where_nothing_follows_them(proven: Callable[[str], Proven]) -> None:
    assert proven("glm4_moe").additive
    assert not proven("afmoe").additive  # a norm follows
    assert not proven("deepseek_v4").additive  # several streams


def test_the_residual_stream_is_found_behind_a_norm(proven: Callable[[str], Proven]) -> None:
    assert proven("glm4_moe").residual
    assert not proven("llama4").residual


def test_a_wrong_gating_is_refused_and_its_layer_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = streamed.gating_of

    def doubled(module: Any, activation: Any) -> Gating:
        found = plainly(module, activation)
        return replace(found, between=lambda gate, up: 2 * found.between(gate, up))

    monkeypatch.setattr(streamed, "gating_of", doubled)
    with pytest.raises(UnsupportedError, match=r"'glm4_moe'.* from layer 1 on; please"):
        prove(config_of("glm4_moe", rope_parameters={"rope_type": "default", "rope_theta": 9000.0}))


def test_a_model_that_stays_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_MOST_PARAMETERS", 1000)
    with pytest.raises(UnsupportedError, match=r"'glm4_moe'.*parameters"):
        prove(config_of("glm4_moe", rope_parameters={"rope_type": "default", "rope_theta": 7000.0}))


def test_an_exception_is_a_refusal_that_names_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Gating:
        raise ValueError("no such gate")

    monkeypatch.setattr(streamed, "gating_of", broken)
    with pytest.raises(UnsupportedError, match=r"'glm4_moe'.*no such gate"):
        prove(config_of("glm4_moe", rope_parameters={"rope_type": "default", "rope_theta": 8000.0}))


def test_a_proof_is_remembered_for_all_sizes(monkeypatch: pytest.MonkeyPatch, proven: Callable[[str], Proven]) -> None:
    found = proven("glm4_moe")

    def unwanted(*_: Any) -> Any:
        raise AssertionError("built again")

    monkeypatch.setattr(proof, "random_model", unwanted)
    assert proven("glm4_moe") == found
    assert prove(config_of("glm4_moe", **GROUPED, hidden_size=4096, moe_intermediate_size=1408)) == found


def test_a_proof_that_is_not_sound_is_done_again() -> None:
    config = config_of("glm4_moe", **GROUPED)
    found, file = prove(config), remembered.place_of("proofs", shrunk(config))
    file.write_text('{"additive": true}', encoding="utf-8")
    assert prove(config) == found


def test_a_derived_family_gets_what_was_told() -> None:
    config = config_of("minimax_m2")
    family = derive(config)
    found = proven_family(family, config)
    assert found.rule == RULES["minimax_m2"][1]
    assert found.correction == "model.layers.{layer}.mlp.e_score_correction_bias"
    assert (found.additive, found.attention_groups) == (True, ATTENTION)
    assert replace(found, rule=None, correction="", additive=False, attention_groups=(), mlp_groups=()) == family
    assert not proven_family(derive(other := config_of("llama4")), other).residual
    assert proven_family(family, config) == found


def test_a_row_of_the_table_stays_as_it_is() -> None:
    assert proven_family(FAMILIES["mixtral"], {"model_type": "mixtral"}) is FAMILIES["mixtral"]


def test_leaves_are_those_on_disk(tmp_path: Path) -> None:
    config = config_of("minimax_m2")
    every_family.save(every_family.build("minimax_m2"), tmp_path)
    family = proven_family(open_checkpoint(tmp_path).family, config)
    assert family.correction == "model.layers.{layer}.block_sparse_moe.e_score_correction_bias"


def test_the_bias_is_read_of_the_tensor_that_was_found(tmp_path: Path) -> None:
    model = every_family.build("ernie4_5_moe")
    checkpoint = open_checkpoint(every_family.save(model, tmp_path))
    known = replace(checkpoint, family=proven_family(checkpoint.family, config_of("ernie4_5_moe")))
    bias = streamed.StreamedModel(known, device=torch.device("cpu"), dtype=torch.float32).router_bias(1)
    assert bias is not None
    assert torch.equal(bias, model.model.layers[1].mlp.gate.moe_statics.e_score_correction_bias.reshape(-1))


def test_the_rule_of_a_proof_is_computed_by_its_own_numbers() -> None:
    config = config_of("glm4_moe", **GROUPED)
    family = proven_family(family_of(config), config)
    router = router_of(family, config, shape_of(family, config))
    assert (router.scoring, router.group_score, router.groups, router.top_groups) == ("sigmoid", "top2", 4, 2)
    assert (router.renormalise, router.scale) == (True, 1.8)


def test_the_root_of_softplus_is_a_scoring() -> None:
    config = config_of("glm4_moe")
    family = proven_family(family_of(config), config)
    assert family.rule is not None
    other = replace(family, rule=replace(family.rule, scoring="sqrtsoftplus"))
    found = scores(router_of(other, config, shape_of(other, config)), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, 1 + torch.e]]).log().sqrt())


def call(path: str, inputs: Tensor, part: probe.Part = probe.Part.ATTENTION) -> probe.Call:
    return probe.Call(path=path, part=part, inputs=inputs)


def layer(*calls: probe.Call, late: frozenset[str] = frozenset()) -> probe.Layer:
    return probe.Layer(hidden=torch.zeros(1), calls=calls, late=late, routed=None, biases={}, weighs_inputs=False)


ONE, TWO, THREE = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)


def test_groups_of_all_kinds_of_layers_make_one_order() -> None:
    first = layer(call("a.q", ONE), call("a.k", ONE), call("a.v", ONE), call("a.o", TWO))
    second = layer(call("a.q", ONE), call("a.k", ONE), call("b.x", TWO), call("a.o", THREE))
    assert probe.groups_of([first, second])[0] == (("q", "k", "v"), ("x",), ("o",))


def test_linears_in_no_one_order_are_left_out() -> None:
    forth, back = layer(call("p", ONE), call("q", TWO)), layer(call("q", ONE), call("p", TWO))
    assert probe.groups_of([forth, back])[0] == ()


def test_linears_that_share_their_input_in_some_layers_only_are_left_out() -> None:
    together, apart = layer(call("p", ONE), call("q", ONE)), layer(call("p", ONE), call("q", TWO))
    assert probe.groups_of([together, apart, layer(call("r", ONE))])[0] == (("r",),)


def test_linears_that_run_twice_or_behind_the_experts_are_left_out() -> None:
    found = layer(call("p", ONE), call("p", TWO), call("a.q", ONE), call("b.q", TWO), call("r", ONE), call("s", THREE))
    assert probe.groups_of([replace(found, late=frozenset({"s"}))])[0] == (("r",),)


def test_an_mlp_before_attention_is_left_out() -> None:
    found = layer(call("m.up", ONE, probe.Part.DENSE), call("a.q", ONE), call("n.down", TWO, probe.Part.DENSE))
    assert probe.groups_of([found]) == ((("q",),), (("down",),))


def test_a_config_is_shrunk_with_its_kinds_of_layers() -> None:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 10
    large = config_of("qwen3_5_moe", num_hidden_layers=40, layer_types=kinds, num_experts=256, hidden_size=2048)
    tiny = text_keys(shrunk(large))
    assert tiny["layer_types"] == kinds[:4]
    assert (tiny["num_hidden_layers"], tiny["num_experts"], tiny["hidden_size"]) == (4, 12, 64)


def test_a_shrunk_config_is_shrunk_to_itself() -> None:
    for model_type in RULES:
        tiny = shrunk(config_of(model_type))
        assert shrunk(tiny) == tiny


def test_dense_layers_and_groups_stay() -> None:
    large = {"model_type": "deepseek_v3", "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3}
    tiny = shrunk(large)
    assert (tiny["n_group"], tiny["topk_group"], tiny["first_k_dense_replace"]) == (4, 2, 3)
    assert depth_of(tiny) == 5
    assert shrunk(large | {"n_group": 1, "topk_group": 1})["n_group"] == 1
