"""Routing keys: what transformers' forward pass takes, what it cannot honour, and what contradicts itself."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from transformers import CONFIG_MAPPING

from moepress.errors import InvalidInputError, MoepressError, UnsupportedError
from moepress.models.families.family import experts_key, shape_of
from moepress.models.families.hf_config import ALIASES
from moepress.models.families.routing_keys import COUNT_NAMES, is_moe_layer, require_routing
from moepress.models.families.skeleton import build_skeleton
from moepress.models.families.table import FAMILIES, family_of
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import pruned_config
from moepress.validation.rules.facts import read_facts


def config_of(key: str, **changes: Any) -> dict[str, Any]:
    recipe = tiny_models.TINY[key]
    config = {"model_type": recipe.family, **recipe.config, **changes}
    return {name: value for name, value in config.items() if value is not ...}


def refusal(key: str, **changes: Any) -> MoepressError:
    config = config_of(key, **changes)
    with pytest.raises(MoepressError) as caught:
        shape_of(family_of(config), config)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", FAMILIES)
def test_the_defaults_of_the_table_are_those_of_transformers(name: str) -> None:
    config = CONFIG_MAPPING[ALIASES.get(name, name)]()
    for key in FAMILIES[name].keys:
        if key.name not in {"mlp_only_layers", "num_nextn_predict_layers"}:  # [] for null; no part of the forward pass
            assert getattr(config, key.name) == key.default, key.name


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_the_tiny_models_pass_as_they_are(key: str) -> None:
    config = config_of(key)
    family = family_of(config)
    require_routing(family, config, experts_key(family, config))


WRONG: list[tuple[str, str, list[Any]]] = [
    ("deepseek_v3", "n_group", [None, 0, -1, 2.0, True, "4", [4], 1 << 40]),
    ("deepseek_v3", "topk_group", [None, 0, 5, "2"]),  # 5 of 4 groups
    ("deepseek_v3", "norm_topk_prob", [None, 1, "true"]),
    ("deepseek_v3", "routed_scaling_factor", [None, 0, -1.0, "2.5", True, float("nan"), float("inf")]),
    ("deepseek_v3", "n_shared_experts", [None, -1, 1.5]),
    ("deepseek_v3", "first_k_dense_replace", [None, -1, "1"]),
    ("deepseek_v3", "num_experts_per_tok", [None, 0, "4", 4.0]),
    ("deepseek_v3", "n_routed_experts", [None, 0, True]),
    ("deepseek_v3", "num_local_experts", [15]),  # which transformers takes for n_routed_experts
    ("deepseek_v3", "num_nextn_predict_layers", [-1, "1", True]),
    ("deepseek_v2", "topk_method", [None, 3]),
    ("deepseek_v2", "n_group", [None, 0, ...]),  # its method has groups
    ("deepseek_v2", "topk_group", [None, 9]),
    ("deepseek_v2_lite", "n_group", [4]),  # and its method has none
    ("deepseek_v2", "routed_scaling_factor", [None, float("nan")]),
    ("qwen3_moe", "norm_topk_prob", [None, 0]),
    ("qwen3_moe", "decoder_sparse_step", [None, 0, -1]),
    ("qwen3_moe", "mlp_only_layers", [3, ["1"], [-1]]),
    ("qwen3_moe", "num_local_experts", [8]),
    ("qwen2_moe", "shared_expert_intermediate_size", [None, -1]),
    ("mixtral", "num_experts", [4]),
    ("olmoe", "norm_topk_prob", [None, "no"]),
]


@pytest.mark.parametrize(("key", "name", "value"), [(k, n, v) for k, n, values in WRONG for v in values])
def test_a_routing_number_that_the_forward_pass_cannot_take_is_invalid(key: str, name: str, value: Any) -> None:
    error = refusal(key, **{name: value})
    assert isinstance(error, InvalidInputError)
    assert name in str(error)


UNHONOURED: list[tuple[str, str, list[Any]]] = [
    ("deepseek_v3", "scoring_func", ["softmax"]),
    ("deepseek_v3", "topk_method", ["greedy", "group_limited_greedy"]),
    ("deepseek_v3", "moe_layer_freq", [2]),
    ("deepseek_v2", "topk_method", ["noaux_tc"]),
    ("deepseek_v2", "scoring_func", ["sigmoid"]),
    ("deepseek_v2", "norm_topk_prob", [True]),
    ("deepseek_v2_lite", "moe_layer_freq", [2, [0, 1, 1]]),
    ("qwen3_moe", "scoring_func", ["sigmoid"]),
    ("qwen3_moe", "routed_scaling_factor", [2.5]),
    ("qwen2_moe", "n_group", [4]),
    ("mixtral", "norm_topk_prob", [False]),
    ("mixtral", "decoder_sparse_step", [2]),
    ("olmoe", "topk_method", ["noaux_tc"]),
    ("olmoe", "mlp_only_layers", [[0]]),
]


@pytest.mark.parametrize(("key", "name", "value"), [(k, n, v) for k, n, values in UNHONOURED for v in values])
def test_a_routing_that_transformers_does_not_compute_is_unsupported(key: str, name: str, value: Any) -> None:
    error = refusal(key, **{name: value})
    assert isinstance(error, UnsupportedError)
    assert name in str(error)


@pytest.mark.parametrize(
    ("key", "stated"),
    [
        ("deepseek_v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}),
        ("deepseek_v3", {"scoring_func": None, "topk_method": ..., "num_nextn_predict_layers": None}),
        ("deepseek_v2_lite", {"n_group": None, "topk_group": None, "norm_topk_prob": False, "scoring_func": "softmax"}),
        ("deepseek_v2_lite", {"topk_method": ...}),
        ("qwen3_moe", {"n_group": 1, "topk_group": 1, "mlp_only_layers": None, "decoder_sparse_step": ...}),
        ("mixtral", {"norm_topk_prob": True, "num_experts": 8}),
        ("olmoe", {"routed_scaling_factor": 1.0, "norm_topk_prob": ...}),
    ],
)
def test_keys_that_say_what_is_computed_anyway_are_fine(key: str, stated: dict[str, Any]) -> None:
    config = config_of(key, **stated)
    shape_of(family_of(config), config)


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_layers_of_experts_are_those_that_transformers_builds(key: str) -> None:
    for changes in ({}, {"first_k_dense_replace": 2}, {"decoder_sparse_step": 2, "mlp_only_layers": []}):
        config = config_of(key, **changes)
        family = family_of(config)
        model = build_skeleton(config).model
        built = [hasattr(getattr(layer, family.moe_module), "experts") for layer in model.layers]
        ours = [is_moe_layer(family, config, n) for n in range(len(built))]
        read = {k.name for k in family.keys}
        if set(changes) <= read:
            assert ours == built


def test_layers_that_the_config_makes_dense_have_no_router_on_disk(tiny_copy: Any) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.edit_config(folder, first_k_dense_replace=2)
    with pytest.raises(InvalidInputError, match=r"by config\.json layer 1 is dense \(first_k_dense_replace = 2\)"):
        open_checkpoint(folder)
    tiny_models.edit_config(folder, first_k_dense_replace=0)
    with pytest.raises(InvalidInputError, match=r"layer 0 is a layer of experts .* no router"):
        open_checkpoint(folder)


def test_check_refuses_what_opening_refuses(tiny_copy: Any) -> None:
    folder: Path = tiny_copy("deepseek_v2")
    tiny_models.edit_config(folder, norm_topk_prob=True)
    for read in (open_checkpoint, read_facts):
        with pytest.raises(UnsupportedError, match="norm_topk_prob is True"):
            read(folder)  # type: ignore[operator]


@pytest.mark.parametrize(("key", "names"), [("mixtral", ["num_experts"]), ("qwen3_moe", ["num_local_experts"])])
def test_a_pruned_config_states_one_number_under_all_of_its_names(key: str, names: list[str]) -> None:
    config = config_of(key)
    family = family_of(config)
    count = config[experts_key(family, config)]
    config |= dict.fromkeys(names, count)
    pruned = pruned_config(family, config, count // 2)
    assert {pruned[name] for name in COUNT_NAMES if name in pruned} == {count // 2}


def test_a_dense_model_a_larger_model_and_an_unknown_one_have_sentences_of_their_own() -> None:
    for config, said in (
        ({"model_type": "llama", "hidden_size": 64}, "'llama' is dense"),
        ({"model_type": "llama", "num_experts": 8}, "'llama' has no routed experts"),
        ({"model_type": "vl", "text_config": {"num_experts": 8}}, "transformers does not know model type 'vl'"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            family_of(config)
