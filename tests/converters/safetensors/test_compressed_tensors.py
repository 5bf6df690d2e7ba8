"""The compressed-tensors layout: tensors by hand, the config as the library reads it, and a folder that loads."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors import QuantizationConfig
from compressed_tensors.compressors import PackedQuantizationCompressor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config

from moepress.converters.safetensors.artifact import dense
from moepress.converters.safetensors.compressed_tensors import layer_tensors, read_layer, read_zeros
from moepress.converters.safetensors.compressed_tensors_config import (
    parse_config,
    parse_groups,
    quantization_config,
    scheme_for,
)
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, UnsupportedError

SCHEMES = [Scheme(bits=bits, group_size=group_size) for bits in (2, 3, 4, 8) for group_size in (32, -1)]
ASYMMETRIC = [replace(scheme, symmetric=False) for scheme in SCHEMES]
NAME = "model.layers.0.mlp.experts.3.up_proj"


def matrix(scheme: Scheme, out_features: int = 6, in_features: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes [O, I] and scales [O, G] that bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (out_features, in_features), generator=generator)
    scales = torch.rand(out_features, scheme.groups(in_features), generator=generator).bfloat16() + 0.01
    return codes.to(torch.int8), scales


def test_one_small_matrix_has_the_tensors_written_out_by_hand() -> None:
    scheme = Scheme(bits=4, group_size=8)
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int8)
    tensors = layer_tensors("a.b", codes, torch.tensor([[0.5, 0.25]]), scheme, torch.bfloat16)
    assert sorted(tensors) == ["a.b.weight_packed", "a.b.weight_scale", "a.b.weight_shape"]
    assert [word & 0xFFFFFFFF for word in tensors["a.b.weight_packed"][0].tolist()] == [0x76543210, 0xFEDCBA98]
    assert torch.equal(tensors["a.b.weight_scale"], torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16))
    assert torch.equal(tensors["a.b.weight_shape"], torch.tensor([1, 16], dtype=torch.int64))


@given(scheme=st.sampled_from(SCHEMES), rows=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_reading_a_layer_gives_back_its_codes_and_scales(scheme: Scheme, rows: int, groups: int, seed: int) -> None:
    codes, scales = matrix(scheme, rows, 32 * groups, seed)
    read_codes, read_scales = read_layer(NAME, layer_tensors(NAME, codes, scales, scheme, scales.dtype), scheme)
    assert torch.equal(read_codes, codes)
    assert torch.equal(read_scales, scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_library_decompresses_our_tensors_to_code_times_scale(scheme: Scheme) -> None:
    codes, scales = matrix(scheme)
    tensors = layer_tensors(NAME, codes, scales, scheme, torch.bfloat16)
    local = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}
    theirs = QuantizationConfig.model_validate(quantization_config(scheme, [])).config_groups["group_0"]
    weight = PackedQuantizationCompressor.decompress(local, theirs)["weight"]
    by_hand = codes.to(torch.bfloat16) * scales.repeat_interleave(scheme.columns_per_group(64), dim=1)
    assert torch.equal(weight, by_hand)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_library_compresses_the_weights_to_our_very_bytes(scheme: Scheme) -> None:
    codes, scales = matrix(scheme)
    scales = torch.exp2(scales.float().log2().round()).bfloat16()  # powers of two: code * scale is exact
    weight = codes.to(torch.bfloat16) * scales.repeat_interleave(scheme.columns_per_group(64), dim=1)
    theirs = QuantizationConfig.model_validate(quantization_config(scheme, [])).config_groups["group_0"]
    compressed = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scales}, theirs)
    ours = layer_tensors(NAME, codes, scales, scheme, torch.bfloat16)
    assert {f"{NAME}.{name}" for name in compressed} == set(ours)
    assert all(torch.equal(tensor, ours[f"{NAME}.{name}"]) for name, tensor in compressed.items())


def zeros_of(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random zero points [O, G] over the whole range of codes."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = rows, scheme.groups(columns)
    return torch.randint(scheme.code_min, scheme.code_max + 1, shape, generator=generator).to(torch.int16)


@pytest.mark.parametrize("rows", [6, 45, 64])
@pytest.mark.parametrize("scheme", ASYMMETRIC, ids=str)
def test_the_library_takes_zero_points_as_we_do(scheme: Scheme, rows: int) -> None:
    codes, scales = matrix(scheme, rows)
    zeros = zeros_of(scheme, rows, 64)
    tensors = layer_tensors(NAME, codes, scales, scheme, torch.bfloat16, zeros)
    local = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}
    theirs = QuantizationConfig.model_validate(quantization_config(scheme, [])).config_groups["group_0"]
    found = PackedQuantizationCompressor.decompress(local, theirs)
    assert torch.equal(found["weight_zero_point"].to(torch.int16), zeros)
    wide = zeros.repeat_interleave(scheme.columns_per_group(64), dim=1)
    steps = (codes.to(torch.int16) - wide).to(torch.bfloat16)
    by_hand = steps * scales.repeat_interleave(scheme.columns_per_group(64), dim=1)
    assert torch.equal(found["weight"], by_hand)
    assert torch.equal(dense(codes, scales, zeros), by_hand)
    assert torch.equal(read_layer(NAME, tensors, scheme)[0], codes)
    again = read_zeros(NAME, tensors, scheme, rows)
    assert again is not None
    assert torch.equal(again, zeros)
    compressed = PackedQuantizationCompressor.compress(
        {"weight": by_hand.float(), "weight_scale": scales.float(), "weight_zero_point": zeros.to(torch.int8)}, theirs
    )
    assert torch.equal(compressed["weight_zero_point"], local["weight_zero_point"])


def test_one_small_row_of_zero_points_is_written_out_by_hand() -> None:
    scheme = Scheme(bits=4, group_size=8, symmetric=False)
    codes, scales = torch.zeros(9, 16, dtype=torch.int8), torch.ones(9, 2)
    zeros = torch.tensor([[n - 8, 7] for n in range(8)] + [[1, -8]], dtype=torch.int16)
    found = layer_tensors("a.b", codes, scales, scheme, torch.bfloat16, zeros)["a.b.weight_zero_point"]
    words = [[word & 0xFFFFFFFF for word in row] for row in found.tolist()]
    assert words == [[0x76543210, 0xFFFFFFFF], [0x9, 0x0]]  # along the rows of the matrix, a column a group


def test_zero_points_and_schemes_that_do_not_go_together_are_refused() -> None:
    symmetric, other = Scheme(group_size=32), Scheme(group_size=32, symmetric=False)
    codes, scales = matrix(symmetric)
    zeros = zeros_of(other, 6, 64)
    for scheme, given_zeros in ((symmetric, zeros), (other, None), (other, zeros.mT)):
        with pytest.raises(ValueError, match="zero points do not fit"):
            layer_tensors(NAME, codes, scales, scheme, torch.bfloat16, given_zeros)
    with pytest.raises(UnsupportedError, match="up_proj: a zero point lies beyond"):
        layer_tensors(NAME, codes, scales, other, torch.bfloat16, torch.full_like(zeros, 8))
    tensors = layer_tensors(NAME, codes, scales, other, torch.bfloat16, zeros)
    with pytest.raises(UnsupportedError, match=r"weight_zero_point is there"):
        read_layer(NAME, tensors, symmetric)
    with pytest.raises(InvalidInputError, match="cannot hold 40 codes"):
        read_zeros(NAME, tensors, other, 40)
    del tensors[f"{NAME}.weight_zero_point"]
    with pytest.raises(InvalidInputError, match=r"weight_zero_point missing"):
        read_layer(NAME, tensors, other)
    assert read_zeros(NAME, tensors, symmetric, 6) is None


def test_scales_that_the_stored_dtype_would_round_are_refused() -> None:
    codes, _ = matrix(Scheme(group_size=-1))
    with pytest.raises(ValueError, match="round them before"):
        layer_tensors(NAME, codes, torch.full((6, 1), 0.1), Scheme(group_size=-1), torch.bfloat16)


def test_scales_of_the_wrong_shape_are_refused() -> None:
    codes, scales = matrix(Scheme(group_size=32))
    with pytest.raises(ValueError, match=r"want floating \(6, 2\)"):
        layer_tensors(NAME, codes, scales.mT, Scheme(group_size=32), torch.bfloat16)


def test_a_missing_tensor_is_named() -> None:
    tensors = layer_tensors(NAME, *matrix(Scheme(group_size=32)), Scheme(group_size=32), torch.bfloat16)
    del tensors[f"{NAME}.weight_scale"]
    with pytest.raises(InvalidInputError, match=r"up_proj\.weight_scale missing"):
        read_layer(NAME, tensors, Scheme(group_size=32))


def test_tensors_of_another_group_size_or_width_are_refused() -> None:
    tensors = layer_tensors(NAME, *matrix(Scheme(group_size=32)), Scheme(group_size=32), torch.bfloat16)
    with pytest.raises(InvalidInputError, match=r"want \(6, 4\)"):
        read_layer(NAME, tensors, Scheme(group_size=16))
    with pytest.raises(InvalidInputError, match="cannot hold 64 codes of 8 bits"):
        read_layer(NAME, tensors, Scheme(bits=8, group_size=32))


@pytest.mark.parametrize("scheme", [*SCHEMES, *ASYMMETRIC], ids=str)
def test_the_config_survives_json_the_library_and_our_parser(scheme: Scheme) -> None:
    ignore = ["lm_head", "model.layers.1.mlp.gate", "re:.*kv_b_proj"]
    config = json.loads(json.dumps(quantization_config(scheme, ignore)))
    theirs = QuantizationConfig.model_validate(config).model_dump(mode="json")
    assert parse_config(config) == parse_config(theirs) == (scheme, tuple(ignore))
    assert theirs["format"] == "pack-quantized"
    assert theirs["quantization_status"] == "compressed"


def test_the_config_of_the_documentation_is_read() -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    model = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    assert parse_config(model | {"config_groups": {"group_0": group}}) == (Scheme(bits=4, group_size=128), ())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "marlin-24", r"quantization_config\.format is 'marlin-24'"),
        (("quant_method",), "gptq", "quant_method is 'gptq'; moepress reads 'compressed-tensors'"),
        (("quantization_status",), "frozen", "quantization_status is 'frozen'"),
        (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
        (("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config"),
        (("config_groups", "group_0", "targets"), ["re:.*experts.*"], "targets"),
        (("config_groups", "group_0", "input_activations"), {"num_bits": 8}, "input_activations"),
        (("config_groups", "group_0", "weights", "type"), "float", "type is 'float'"),
        (("config_groups", "group_0", "weights", "num_bits"), 6, "num_bits is 6"),
        (("config_groups", "group_0", "weights", "num_bits"), 4.0, "num_bits is 4.0"),
        (("config_groups", "group_0", "weights", "symmetric"), 1, "symmetric is 1"),
        (("config_groups", "group_0", "weights", "actorder"), "group", "actorder is 'group'"),
        (("config_groups", "group_0", "weights", "strategy"), "block", "strategy is 'block'"),
        (("config_groups", "group_0", "weights", "dynamic"), True, "dynamic is True"),
        (("config_groups", "group_0", "weights"), None, "does not spell out"),
    ],
)
def test_a_config_that_means_other_bytes_is_refused(path: tuple[str, ...], value: object, message: str) -> None:
    config: dict[str, Any] = copy.deepcopy(quantization_config(Scheme(), []))
    settings_at = config
    for key in path[:-1]:
        settings_at = settings_at[key]
    settings_at[path[-1]] = value
    with pytest.raises(UnsupportedError, match=message):
        parse_config(config)


def mixed_config() -> dict[str, Any]:
    """8 bits in layer 0 and in one Linear that is named, 4 bits elsewhere."""
    config = quantization_config(Scheme(), [])
    eight = copy.deepcopy(config["config_groups"]["group_0"])
    eight["targets"] = [r"re:model\.layers\.0\..*", "model.layers.1.self_attn.q_proj"]
    eight["weights"] |= {"num_bits": 8, "group_size": 32}
    config["config_groups"]["group_1"] = eight
    return config


def test_two_groups_where_one_is_wanted_or_for_the_same_modules_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="2 config groups"):
        parse_config(mixed_config())
    config = quantization_config(Scheme(), [])
    config["config_groups"]["group_1"] = config["config_groups"]["group_0"]
    with pytest.raises(UnsupportedError, match="2 config groups for the same modules"):
        parse_groups(config)


def test_the_group_of_a_module_is_the_one_that_names_it_then_the_one_for_all() -> None:
    groups, _ignored = parse_groups(mixed_config())
    eight, four = Scheme(bits=8, group_size=32), Scheme()
    found = {
        name: scheme_for(name, groups)
        for name in (
            "model.layers.0.mlp.experts.3.up_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.k_proj",
            "model.layers.10.mlp.experts.3.up_proj",
        )
    }
    assert list(found.values()) == [eight, eight, four, four]


def test_a_module_of_no_group_and_a_broken_pattern_are_refused() -> None:
    config = mixed_config()
    config["config_groups"]["group_0"]["targets"] = ["re:model[.layers"]
    groups, _ignored = parse_groups(config)
    with pytest.raises(InvalidInputError, match="which is none"):
        scheme_for("lm_head", groups)
    with pytest.raises(InvalidInputError, match=r"says nothing of how lm_head"):
        scheme_for("lm_head", groups[1:])


@pytest.mark.parametrize("targets", [None, [], "Linear", [3]])
def test_targets_that_are_no_list_of_names_are_refused(targets: object) -> None:
    config = mixed_config()
    config["config_groups"]["group_1"]["targets"] = targets
    with pytest.raises(InvalidInputError, match=r"group_1\.targets"):
        parse_groups(config)


@pytest.mark.parametrize("ignore", ["lm_head", [3], {"a": 1}, 7])
def test_an_ignore_list_that_is_none_is_refused(ignore: object) -> None:
    with pytest.raises(InvalidInputError, match=r"quantization_config\.ignore is"):
        parse_config(quantization_config(Scheme(), []) | {"ignore": ignore})


@pytest.mark.parametrize("group_size", [None, True, "128", 128.0, 0, 7, -2, 12])
def test_a_group_size_that_is_none_is_refused(group_size: object) -> None:
    config: dict[str, Any] = copy.deepcopy(quantization_config(Scheme(), []))
    config["config_groups"]["group_0"]["weights"]["group_size"] = group_size
    with pytest.raises(InvalidInputError, match=r"group_size is .*; the strategy"):
        parse_config(config)


def test_a_config_without_groups_is_invalid() -> None:
    with pytest.raises(InvalidInputError, match="config_groups is missing"):
        parse_config(quantization_config(Scheme(), []) | {"config_groups": {}})


def tiny_deepseek() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32}
    mla = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_hidden_layers": 2}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    config = DeepseekV3Config(**sizes, **heads, **mla, **experts, first_k_dense_replace=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model


def logits_of(folder: Path, **kwargs: object) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs).eval()
    with torch.no_grad():
        return model(torch.arange(48).view(2, 24)).logits


@pytest.mark.parametrize("scheme", [Scheme(bits=4, group_size=32), Scheme(bits=3, group_size=-1)], ids=str)
def test_transformers_loads_the_folder_and_gives_the_logits_of_the_dequantized_model(
    scheme: Scheme, tmp_path: Path
) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    tiny_deepseek().save_pretrained(plain)
    tensors, dequantized, ignore = {}, {}, []
    for name, weight in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or "kv_b_proj" in name:
            tensors[name] = dequantized[name] = weight
            ignore += [module] if weight.ndim == 2 else []
            continue
        codes, scales = matrix(scheme, *weight.shape)
        tensors |= layer_tensors(module, codes, scales, scheme, torch.bfloat16)
        columns = scheme.columns_per_group(weight.shape[1])
        dequantized[name] = codes.to(torch.bfloat16) * scales.repeat_interleave(columns, dim=1)
    save_file(dequantized, plain / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = quantization_config(scheme, ignore)
    (packed / "config.json").write_text(json.dumps(config))

    want = logits_of(plain)
    assert float((logits_of(packed) - want).abs().max()) == 0.0
    assert float(want.abs().max()) > 0.1
