"""Rules about the model: each violation is planted in a real output, and found by its rule with its effect."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from check_folders import Copies, Outputs, edit_json, edit_quantization, found
from torch import Tensor

from moepress.validation.rules.findings import Effect, Runtime

REFUSES, WRONG, SLOWER = Effect.REFUSES, Effect.WRONG, Effect.SLOWER
VLLM, SGLANG, TRANSFORMERS = Runtime.VLLM, Runtime.SGLANG, Runtime.TRANSFORMERS
FOLDERS = (VLLM, SGLANG, TRANSFORMERS, Runtime.GPTQMODEL, Runtime.LLAMA_CPP)


def drop(folder: Path, part: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        gone = [name for name in tensors if part in name]
        assert gone
        for name in gone:
            del tensors[name]

    tiny_models.rewrite(folder, change)


def shard_of(folder: Path) -> str:
    return sorted(folder.glob("*.safetensors"))[0].name


def index_of(folder: Path) -> Path:
    return folder / tiny_models.INDEX


def test_a_shard_that_the_index_names_and_that_is_missing(copy: Copies) -> None:
    folder = copy("compressed")
    (folder / shard_of(folder)).unlink()
    assert found(folder, "index") == dict.fromkeys(FOLDERS, REFUSES) | {SGLANG: WRONG}


def test_a_tensor_that_the_index_names_and_no_shard_has(copy: Copies) -> None:
    folder = copy("compressed")
    edit_json(index_of(folder), lambda index: index["weight_map"].update({"model.more.weight": shard_of(folder)}))
    assert found(folder, "index") == dict.fromkeys(FOLDERS, WRONG) | {Runtime.LLAMA_CPP: REFUSES}


def test_a_tensor_that_the_index_does_not_name(copy: Copies) -> None:
    folder = copy("compressed")
    edit_json(index_of(folder), lambda index: index["weight_map"].pop("model.norm.weight"))
    assert found(folder, "index") == {Runtime.LLAMA_CPP: REFUSES}  # others read all that the shard has


def test_a_shard_that_the_index_does_not_name(copy: Copies) -> None:
    folder = copy("compressed")
    shard = shard_of(folder)

    def forget(index: dict[str, Any]) -> None:
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard}

    edit_json(index_of(folder), forget)
    assert found(folder, "index") == dict.fromkeys(FOLDERS, WRONG) | {Runtime.LLAMA_CPP: REFUSES}


def test_several_shards_without_an_index(copy: Copies) -> None:
    folder = copy("compressed")
    index_of(folder).unlink()
    assert found(folder, "index") == {TRANSFORMERS: REFUSES, Runtime.GPTQMODEL: REFUSES}


def test_an_expert_that_lacks_a_matrix(copy: Copies) -> None:
    folder = copy("compressed")
    drop(folder, "layers.1.mlp.experts.3.down_proj")
    assert found(folder, "experts-complete") == {
        VLLM: WRONG,
        SGLANG: WRONG,
        TRANSFORMERS: REFUSES,
        Runtime.GPTQMODEL: WRONG,
        Runtime.LLAMA_CPP: REFUSES,
    }


def test_an_expert_that_lacks_a_part_of_its_codes(copy: Copies) -> None:
    folder = copy("gptq")
    drop(folder, "layers.1.mlp.experts.3.down_proj.scales")
    assert found(folder, "experts-complete")[VLLM] is WRONG


def test_a_matrix_that_all_experts_of_a_layer_lack_starts_at_random_in_transformers(copy: Copies) -> None:
    folder = copy("pruned", "mixtral")
    drop(folder, ".w2.weight")
    assert found(folder, "experts-complete")[TRANSFORMERS] is WRONG


def test_experts_under_the_names_of_the_modules(copy: Copies) -> None:
    folder = copy("pruned", "mixtral")

    def rename(tensors: dict[str, Tensor]) -> None:
        for old in [name for name in tensors if ".block_sparse_moe." in name]:
            new = old.replace(".block_sparse_moe.", ".mlp.")
            for letter, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                new = new.replace(f".{letter}.", f".{name}.")
            tensors[new] = tensors.pop(old)

    tiny_models.rewrite(folder, rename)
    assert found(folder, "expert-names") == {VLLM: REFUSES, TRANSFORMERS: WRONG}


@pytest.mark.parametrize("layout", ["pruned", "compressed", "gptq"])
def test_a_missing_tensor_besides_the_experts(copy: Copies, layout: str) -> None:
    folder = copy(layout)
    drop(folder, "layers.1.input_layernorm.weight")
    assert found(folder, "tensors-complete")[TRANSFORMERS] is WRONG


def test_the_expert_count_of_before_in_the_config(copy: Copies) -> None:
    folder = copy("compressed", "deepseek_v3")
    tiny_models.edit_config(folder, n_routed_experts=16)
    assert found(folder, "expert-count-in-config") == dict.fromkeys(FOLDERS, REFUSES)


def cut(folder: Path, layer: int, count: int) -> None:
    """Only so many experts in one layer, and a router to match."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if f"layers.{layer}.mlp." in n]:
            expert = name.partition(".experts.")[2].partition(".")[0]
            if expert and int(expert) >= count:
                del tensors[name]
            elif ".mlp.gate." in name:
                tensors[name] = tensors[name][:count].clone()

    tiny_models.rewrite(folder, change)


def test_another_number_of_experts_in_one_layer(copy: Copies) -> None:
    folder = copy("pruned")
    cut(folder, 2, 6)
    assert found(folder, "expert-count-by-layer") == dict.fromkeys(FOLDERS, REFUSES)


def test_groups_of_unequal_size(copy: Copies) -> None:
    folder = copy("pruned", "deepseek_v3")
    for layer in (1, 2):
        cut(folder, layer, 6)
    tiny_models.edit_config(folder, n_routed_experts=6)
    assert found(folder, "router-groups") == dict.fromkeys(FOLDERS, REFUSES) | {
        VLLM: WRONG,
        TRANSFORMERS: WRONG,
        Runtime.GPTQMODEL: WRONG,
    }


def test_fewer_experts_than_the_router_chooses(copy: Copies) -> None:
    folder = copy("pruned")
    tiny_models.edit_config(folder, num_experts_per_tok=9)
    assert found(folder, "expert-count-legal") == dict.fromkeys(FOLDERS, REFUSES)


def test_groups_that_hold_fewer_experts_than_the_router_chooses_of_them(copy: Copies) -> None:
    folder = copy("pruned", "deepseek_v3")
    tiny_models.edit_config(folder, num_experts_per_tok=5)
    assert found(folder, "expert-count-legal") == dict.fromkeys(FOLDERS, WRONG)


def test_more_experts_than_llama_cpp_takes(copy: Copies) -> None:
    folder = copy("pruned")
    tiny_models.edit_config(folder, **dict.fromkeys(("num_experts", "num_local_experts"), 1025))
    assert found(folder, "expert-limit") == {Runtime.LLAMA_CPP: REFUSES}


def test_counts_that_sglangs_fast_paths_do_not_take(copy: Copies) -> None:
    folder = copy("pruned", "deepseek_v3")
    tiny_models.edit_config(folder, n_routed_experts=12)
    assert found(folder, "expert-power-of-two") == {SGLANG: SLOWER}
    assert found(folder, "shared-expert-fusion") == {SGLANG: SLOWER}


def test_more_devices_than_experts(outputs: Outputs) -> None:
    assert found(outputs.pruned("qwen3_moe"), "parallel-experts", tensor_parallel=8, expert_parallel=4) == {}
    assert found(outputs.pruned("qwen3_moe"), "parallel-experts", tensor_parallel=16) == {SGLANG: REFUSES}
    assert found(outputs.pruned("qwen3_moe"), "parallel-experts", expert_parallel=3) == {VLLM: REFUSES}


def test_a_multi_token_prediction_layer_that_is_stated_and_not_there(copy: Copies) -> None:
    folder = copy("compressed", "deepseek_v3")
    tiny_models.edit_config(folder, num_nextn_predict_layers=1)
    assert found(folder, "mtp") == {VLLM: REFUSES, SGLANG: REFUSES}


def test_a_multi_token_prediction_layer_with_other_experts(copy: Copies) -> None:
    folder = copy("pruned", "deepseek_v3")
    tiny_models.add_mtp(folder)
    assert found(folder, "mtp") == {}
    cut(folder, 3, 4)
    assert found(folder, "mtp") == {VLLM: REFUSES, SGLANG: REFUSES}


def test_a_correction_bias_in_the_models_dtype(copy: Copies) -> None:
    folder = copy("gptq", "deepseek_v3")

    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        tensors[name] = tensors[name].to(torch.bfloat16)

    tiny_models.rewrite(folder, change)
    assert found(folder, "correction-bias-fp32") == dict.fromkeys(FOLDERS, WRONG)


def test_a_router_that_the_config_does_not_leave_out(copy: Copies) -> None:
    compressed, gptq = copy("compressed"), copy("gptq")
    edit_quantization(compressed, lambda q: q["ignore"].remove("model.layers.1.mlp.gate"))
    edit_quantization(gptq, lambda q: q["dynamic"].pop(r"-:^model\.layers\.1\.mlp\.gate$"))
    assert found(compressed, "router-excluded") == {VLLM: REFUSES}
    assert found(gptq, "router-excluded") == {}
