"""Rules about codes: each violation is planted in a real output, and found by its rule with its effect."""

from collections.abc import Callable
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
GPTQMODEL, LLAMA_CPP = Runtime.GPTQMODEL, Runtime.LLAMA_CPP
FOLDERS = (VLLM, SGLANG, TRANSFORMERS, GPTQMODEL, LLAMA_CPP)


def weights_of(quantization: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = quantization["config_groups"]["group_0"]["weights"]
    return settings


def become_codes(folder: Path, module: str) -> None:
    """Give a module with plain weights the parts of a quantized one, out of another's of that layout."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{module}.weight"]
        like = next(name.rpartition(".")[0] for name in tensors if name.endswith((".weight_packed", ".qweight")))
        for name in [n for n in tensors if n.startswith(f"{like}.")]:
            tensors[module + name.removeprefix(like)] = tensors[name].clone()

    tiny_models.rewrite(folder, change)


def become_plain(folder: Path, module: str) -> None:
    """Take a quantized module's codes away and give it plain weights."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(f"{module}.")]:
            del tensors[name]
        tensors[f"{module}.weight"] = torch.zeros(64, 128)

    tiny_models.rewrite(folder, change)


def test_each_layout_is_refused_where_nothing_reads_it(outputs: Outputs) -> None:
    assert found(outputs.pruned("qwen3_moe"), "layout") == {Runtime.ONNXRUNTIME: REFUSES, GPTQMODEL: REFUSES}
    assert found(outputs.compressed("qwen3_moe"), "layout") == {Runtime.ONNXRUNTIME: REFUSES, GPTQMODEL: REFUSES}
    assert found(outputs.gptq("qwen3_moe"), "layout") == {Runtime.ONNXRUNTIME: REFUSES}
    assert found(outputs.onnx("qwen3_moe"), "layout") == dict.fromkeys(FOLDERS, REFUSES)


def test_another_way_of_quantization(copy: Copies) -> None:
    folder = copy("compressed")
    edit_quantization(folder, lambda q: q.update(quant_method="awq"))
    assert found(folder, "layout") == dict.fromkeys((*FOLDERS, Runtime.ONNXRUNTIME), REFUSES)


def test_gptq_experts_in_transformers(outputs: Outputs) -> None:
    assert found(outputs.gptq("qwen3_moe"), "gptq-in-transformers") == {TRANSFORMERS: WRONG}


def test_mixtrals_names_in_gptqmodel(outputs: Outputs) -> None:
    assert found(outputs.gptq("mixtral"), "gptqmodel-names") == {GPTQMODEL: REFUSES}
    assert found(outputs.gptq("qwen3_moe"), "gptqmodel-names") == {}


@pytest.mark.parametrize("layout", ["compressed", "gptq"])
def test_three_bits(copy: Copies, layout: str) -> None:
    folder = copy(layout)
    edit_quantization(folder, lambda q: (q if layout == "gptq" else weights_of(q)).update(bits=3, num_bits=3))
    assert found(folder, "bits") == {VLLM: REFUSES, SGLANG: REFUSES}


def test_groups_of_sixteen_columns_in_gptq(copy: Copies) -> None:
    folder = copy("gptq")
    edit_quantization(folder, lambda q: q.update(group_size=16))
    assert found(folder, "group-size") == {VLLM: REFUSES}


def test_groups_that_do_not_divide_a_devices_share_of_an_expert(copy: Copies) -> None:
    folder = copy("compressed")
    assert found(folder, "group-size-in-width", tensor_parallel=2) == {}
    assert found(folder, "group-size-in-width", tensor_parallel=4) == {VLLM: REFUSES}
    edit_quantization(folder, lambda q: weights_of(q).update(group_size=128))
    assert found(folder, "group-size-in-width") == {VLLM: REFUSES}


def test_a_hidden_size_that_marlin_does_not_take(copy: Copies) -> None:
    folder = copy("compressed")
    tiny_models.edit_config(folder, hidden_size=96)
    assert found(folder, "marlin-shapes") == {VLLM: SLOWER}


def test_asymmetric_codes(copy: Copies) -> None:
    compressed, gptq = copy("compressed"), copy("gptq")
    edit_quantization(compressed, lambda q: weights_of(q).update(symmetric=False))
    edit_quantization(gptq, lambda q: q.update(sym=False))
    assert found(compressed, "symmetric") == {TRANSFORMERS: REFUSES}
    assert found(gptq, "symmetric") == {VLLM: REFUSES, SGLANG: REFUSES, GPTQMODEL: REFUSES}


def test_zero_points_that_the_config_does_not_speak_of(copy: Copies) -> None:
    folder, name = copy("compressed"), "model.layers.1.mlp.experts.0.up_proj.weight_zero_point"
    tiny_models.rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(1, 1, dtype=torch.int32)}))
    assert found(folder, "symmetric") == {TRANSFORMERS: REFUSES}


def test_desc_act_with_groups(copy: Copies) -> None:
    folder = copy("gptq")
    edit_quantization(folder, lambda q: q.update(desc_act=True))
    assert found(folder, "desc-act") == {VLLM: REFUSES}
    edit_quantization(folder, lambda q: q.update(group_size=-1))
    assert found(folder, "desc-act") == {}


def mix(folder: Path, target: str) -> None:
    """A second config group of 8 bits, for modules of that pattern."""

    def change(quantization: dict[str, Any]) -> None:
        groups = quantization["config_groups"]
        groups["group_1"] = {**groups["group_0"], "weights": {**weights_of(quantization), "num_bits": 8}}
        groups["group_1"]["targets"] = [target]

    edit_quantization(folder, change)


def test_bits_that_differ_by_layer(copy: Copies) -> None:
    compressed, gptq = copy("compressed"), copy("gptq")
    mix(compressed, r"re:model\.layers\.1\..*")
    edit_quantization(gptq, lambda q: q["dynamic"].update({r"+:^model\.layers\.1\..*": {"bits": 8}}))
    assert found(compressed, "mixed-bits-by-layer") == {TRANSFORMERS: WRONG, LLAMA_CPP: REFUSES}
    assert found(gptq, "mixed-bits-by-layer") == {TRANSFORMERS: WRONG, SGLANG: WRONG}
    assert found(compressed, "mixed-bits-in-layer") == {}


def test_bits_that_differ_in_a_layer(copy: Copies) -> None:
    folder = copy("compressed")
    mix(folder, r"re:.*layers\.1\..*\.down_proj")
    assert found(folder, "mixed-bits-in-layer") == {
        VLLM: REFUSES,
        SGLANG: REFUSES,
        TRANSFORMERS: WRONG,
        LLAMA_CPP: REFUSES,
    }


def test_a_quantized_router(copy: Copies) -> None:
    folder = copy("compressed")
    become_codes(folder, "model.layers.1.mlp.gate")
    expected = {VLLM: REFUSES, SGLANG: REFUSES, TRANSFORMERS: WRONG, LLAMA_CPP: REFUSES}
    assert found(folder, "router-unquantized") == expected


def test_a_plain_linear_that_the_config_does_not_leave_out(copy: Copies) -> None:
    folder = copy("compressed")
    edit_quantization(folder, lambda q: q["ignore"].remove("lm_head"))
    assert found(folder, "linears-excluded") == {TRANSFORMERS: REFUSES}
    become_plain(folder, "model.layers.1.self_attn.o_proj")
    assert found(folder, "linears-excluded") == {TRANSFORMERS: REFUSES, VLLM: REFUSES}


def test_codes_that_the_config_leaves_out(copy: Copies) -> None:
    folder = copy("compressed")
    edit_quantization(folder, lambda q: q["ignore"].append(r"re:.*\.o_proj$"))
    assert found(folder, "linears-excluded") == {TRANSFORMERS: WRONG, VLLM: REFUSES}


def test_a_quantized_kv_b_proj(copy: Copies) -> None:
    folder = copy("compressed", "deepseek_v3")
    become_codes(folder, "model.layers.1.self_attn.kv_b_proj")
    assert found(folder, "kv-b-proj-unquantized") == {SGLANG: WRONG}


def test_quantized_embeddings_and_a_quantized_head_in_gptq(copy: Copies) -> None:
    compressed, gptq = copy("compressed"), copy("gptq")
    become_codes(compressed, "model.embed_tokens")
    become_codes(gptq, "lm_head")
    expected = dict.fromkeys(FOLDERS, REFUSES) | {TRANSFORMERS: WRONG}
    assert found(compressed, "embeddings-unquantized") == found(gptq, "embeddings-unquantized") == expected


def test_one_of_query_key_and_value_is_plain(copy: Copies) -> None:
    folder = copy("compressed")
    become_plain(folder, "model.layers.1.self_attn.k_proj")
    assert found(folder, "fused-linears") == {VLLM: REFUSES}


def test_fp8_beside_gptq(copy: Copies) -> None:
    folder = copy("gptq")
    tiny_models.rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))
    assert found(folder, "fp8-beside-gptq") == {VLLM: REFUSES}


@pytest.mark.parametrize(("layout", "key"), [("compressed", "format"), ("gptq", "desc_act"), ("gptq", "bits")])
def test_a_key_that_the_config_lacks(copy: Copies, layout: str, key: str) -> None:
    folder = copy(layout)
    edit_quantization(folder, lambda q: q.pop(key))
    assert found(folder, "config-keys") == dict.fromkeys(FOLDERS, REFUSES)


def test_two_configs_that_disagree(copy: Copies) -> None:
    folder = copy("gptq")
    edit_json(folder / "quantize_config.json", lambda values: values.update(desc_act=True))
    assert found(folder, "gptq-configs") == dict.fromkeys((VLLM, SGLANG, GPTQMODEL), WRONG)


def replace(folder: Path, part: str, change: Callable[[Tensor], Tensor]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(part))
        tensors[name] = change(tensors[name]).contiguous()

    tiny_models.rewrite(folder, edit)


@pytest.mark.parametrize(
    ("layout", "part", "change"),
    [
        ("compressed", ".3.down_proj.weight_scale", lambda t: t[:, :1]),
        ("compressed", ".3.down_proj.weight_packed", lambda t: t[:, :-1]),
        ("gptq", ".3.down_proj.qzeros", lambda t: t[:1]),
        ("gptq", ".3.down_proj.scales", lambda t: t.to(torch.bfloat16)),
        ("gptq", ".3.down_proj.qweight", lambda t: t.reshape(-1)),
        ("gptq", ".3.down_proj.g_idx", lambda t: t[None]),
        ("compressed", ".3.down_proj.weight_packed", lambda t: t[None]),
        ("compressed", ".3.down_proj.weight_scale", lambda t: t.reshape(-1)),
    ],
)
def test_codes_that_do_not_fit_their_scales(copy: Copies, layout: str, part: str, change: Any) -> None:
    folder = copy(layout)
    replace(folder, part, change)
    assert found(folder, "codes-complete") == dict.fromkeys(FOLDERS, REFUSES) | {VLLM: WRONG, TRANSFORMERS: WRONG}


@pytest.mark.parametrize("bits", [None, 0, -4, 1 << 40, 4.0])
@pytest.mark.parametrize("part", [".3.down_proj.weight_packed", ".3.down_proj.weight_scale"])
def test_codes_of_no_matrix_are_found_whatever_the_config_says_of_their_bits(
    copy: Copies, part: str, bits: object
) -> None:
    folder = copy("compressed")
    replace(folder, part, lambda t: t.reshape(-1))
    edit_quantization(folder, lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=bits))
    assert found(folder, "codes-complete")[VLLM] is WRONG


def test_codes_that_no_group_of_the_config_is_for(copy: Copies) -> None:
    folder = copy("compressed")
    edit_quantization(folder, lambda q: q["config_groups"]["group_0"].update(targets=["re:.*none"]))
    assert found(folder, "codes-complete")[VLLM] is WRONG


def test_a_part_of_codes_besides_the_experts_that_is_missing(copy: Copies) -> None:
    folder = copy("compressed")
    tiny_models.rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight_shape"))
    assert found(folder, "codes-complete")[VLLM] is WRONG
