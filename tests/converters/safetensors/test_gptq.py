"""The GPTQ v1 layout, read back by a slow reader written from the layout's description and not from our packer."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepress.converters.safetensors.gptq import half_scale_error, half_scales, layer_tensors, read_layer, read_zeros
from moepress.converters.safetensors.gptq_config import module_pattern, parse_config, quantize_config
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, UnsupportedError

SCHEMES = [Scheme(bits=bits, group_size=group_size) for bits in (2, 3, 4, 8) for group_size in (32, -1)]
NAME = "model.layers.0.mlp.experts.3.up_proj"


def matrix(scheme: Scheme, out_features: int = 32, in_features: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes [O, I] and bfloat16 scales [O, G] that float16 holds too."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (out_features, in_features), generator=generator)
    scales = torch.rand(out_features, scheme.groups(in_features), generator=generator).bfloat16() + 0.01
    return codes.to(torch.int8), scales


def slow_codes(words_WN: Tensor, bits: int) -> list[list[int]]:
    """Codes [count, N] of columns of int32 words: every column is one stream of bits, lowest first."""
    count = words_WN.shape[0] * 32 // bits
    codes = [[0] * words_WN.shape[1] for _ in range(count)]
    for column, stream in enumerate(words_WN.T.tolist()):
        for position in range(count * bits):
            bit = ((stream[position // 32] & 0xFFFFFFFF) >> (position % 32)) & 1
            codes[position // bits][column] |= bit << (position % bits)
    return codes


def slow_weight(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """W[o, i] = (q[i, o] - zero[g_idx[i], o]) * scales[g_idx[i], o], one weight at a time; v1 stores zero - 1."""
    stored = slow_codes(tensors[f"{NAME}.qweight"], bits)
    zeros = slow_codes(tensors[f"{NAME}.qzeros"].T, bits)
    scales, g_idx = tensors[f"{NAME}.scales"].double().tolist(), tensors[f"{NAME}.g_idx"].tolist()
    weight = [
        [(stored[i][o] - (zeros[o][g_idx[i]] + 1)) * scales[g_idx[i]][o] for i in range(len(stored))]
        for o in range(len(zeros))
    ]
    return torch.tensor(weight, dtype=torch.float64)


def test_one_small_matrix_has_the_tensors_written_out_by_hand() -> None:
    codes = torch.zeros(32, 32, dtype=torch.int8)
    codes[0, :8] = torch.tensor([-8, -7, -6, -5, -4, -3, -2, 7])
    scales = torch.full((32, 2), 0.5)
    scales[0, 1] = 0.25
    tensors = layer_tensors("a.b", codes, scales, Scheme(bits=4, group_size=16))
    assert sorted(tensors) == ["a.b.g_idx", "a.b.qweight", "a.b.qzeros", "a.b.scales"]
    qweight = tensors["a.b.qweight"]
    assert qweight.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in qweight[:, 0].tolist()] == [0xF6543210] + [0x88888888] * 3
    assert bool((qweight[:, 1:] == qweight[1, 0]).all())
    assert torch.equal(tensors["a.b.qzeros"], torch.full((2, 4), 0x77777777, dtype=torch.int32))
    assert tensors["a.b.scales"].dtype == torch.float16
    assert tensors["a.b.scales"][:, :2].tolist() == [[0.5, 0.5], [0.25, 0.5]]
    assert torch.equal(tensors["a.b.g_idx"], torch.tensor([0] * 16 + [1] * 16, dtype=torch.int32))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_slow_reader_finds_code_times_scale(scheme: Scheme) -> None:
    codes, scales = matrix(scheme)
    expected = codes.double() * scales.double().repeat_interleave(scheme.columns_per_group(64), dim=1)
    assert torch.equal(slow_weight(layer_tensors(NAME, codes, scales, scheme), scheme.bits), expected)


@given(scheme=st.sampled_from(SCHEMES), rows=st.integers(1, 3), groups=st.integers(1, 3), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_reading_a_layer_gives_back_its_codes_and_scales(scheme: Scheme, rows: int, groups: int, seed: int) -> None:
    codes, scales = matrix(scheme, 32 * rows, 32 * groups, seed)
    read_codes, read_scales = read_layer(NAME, layer_tensors(NAME, codes, scales, scheme), scheme)
    assert torch.equal(read_codes, codes)
    assert read_scales.dtype == torch.float16
    assert torch.equal(read_scales.float(), scales.float())


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F), (3, 0xDB6DB6DB)])
def test_the_zeros_are_the_middle_less_one(bits: int, word: int) -> None:
    scheme = Scheme(bits=bits, group_size=32)
    qzeros = layer_tensors(NAME, *matrix(scheme), scheme)[f"{NAME}.qzeros"]
    assert int(qzeros[0, 0]) & 0xFFFFFFFF == word
    assert qzeros.shape == (2, bits)


@given(exponent=st.integers(-14, 15), mantissa=st.integers(128, 255))
def test_every_bfloat16_in_the_normal_range_of_float16_is_exact(exponent: int, mantissa: int) -> None:
    scale = torch.tensor([mantissa / 128 * 2.0**exponent]).bfloat16()
    assert half_scale_error(scale) == 0.0
    assert float(half_scales(scale)) == float(scale)


def test_a_scale_below_the_normal_range_is_rounded_and_its_change_is_told() -> None:
    scales = torch.tensor([0.5, 1.5 * 2.0**-24, 0.0], dtype=torch.bfloat16)
    assert half_scales(scales).tolist() == [0.5, 2.0**-23, 0.0]
    assert half_scale_error(scales) == pytest.approx(1 / 3)


@pytest.mark.parametrize("scale", [65536.0, 1e-9])
def test_a_scale_that_float16_loses_is_refused_by_the_matrix_name(scale: float) -> None:
    scheme = Scheme(group_size=-1)
    codes, scales = matrix(scheme)
    scales[3] = scale
    with pytest.raises(UnsupportedError, match=r"experts\.3\.up_proj: a scale of"):
        layer_tensors(NAME, codes, scales, scheme)
    with pytest.raises(UnsupportedError, match="float16"):
        half_scale_error(scales)


def test_a_matrix_that_is_no_multiple_of_32_is_refused_by_name() -> None:
    scheme = Scheme(group_size=-1)
    with pytest.raises(UnsupportedError, match=r"up_proj: .* 40 input features"):
        layer_tensors(NAME, *matrix(scheme, 32, 40), scheme)


def tensors_with(**changed: Tensor) -> dict[str, Tensor]:
    scheme = Scheme(group_size=32)
    return layer_tensors(NAME, *matrix(scheme), scheme) | {f"{NAME}.{key}": value for key, value in changed.items()}


@pytest.mark.parametrize("scheme", [replace(scheme, symmetric=False) for scheme in SCHEMES], ids=str)
def test_a_slow_reader_finds_code_less_zero_times_scale(scheme: Scheme) -> None:
    codes, scales = matrix(scheme, 64)
    groups, generator = scheme.groups(64), torch.Generator().manual_seed(2)
    zeros = torch.randint(scheme.code_min + 1, scheme.code_max + 2, (64, groups), generator=generator).to(torch.int16)
    tensors = layer_tensors(NAME, codes, scales, scheme, zeros)
    wide = scales.double().repeat_interleave(64 // groups, dim=1)
    expected = (codes.double() - zeros.double().repeat_interleave(64 // groups, dim=1)) * wide
    assert torch.equal(slow_weight(tensors, scheme.bits), expected)
    again = read_zeros(NAME, tensors, scheme, 64)
    assert again is not None
    assert torch.equal(again, zeros)
    assert torch.equal(read_layer(NAME, tensors, scheme)[0], codes)
    with pytest.raises(InvalidInputError, match="for 64 rows of 32"):
        read_zeros(NAME, tensors, scheme, 32)


def test_a_zero_point_that_the_layout_stores_one_below_nothing_is_refused_by_name() -> None:
    scheme = Scheme(group_size=32, symmetric=False)
    codes, scales = matrix(scheme)
    for zero in (-8, 9):
        with pytest.raises(UnsupportedError, match=r"up_proj: zero points run from .* holds 1 to 16"):
            layer_tensors(NAME, codes, scales, scheme, torch.full((32, 2), zero, dtype=torch.int16))


def test_an_asymmetric_scheme_is_said_and_read() -> None:
    scheme = Scheme(bits=4, group_size=128, symmetric=False)
    config = quantize_config(scheme)
    assert config["sym"] is False
    assert parse_config(config) == (scheme, ())


def test_other_zeros_where_the_config_says_symmetric_are_refused() -> None:
    v2 = torch.full((2, 4), 0x88888888 - (1 << 32), dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="v2 layout"):
        read_layer(NAME, tensors_with(qzeros=v2), Scheme(group_size=32))


def test_columns_grouped_out_of_order_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="desc_act"):
        read_layer(NAME, tensors_with(g_idx=torch.arange(64, dtype=torch.int32) % 2), Scheme(group_size=32))


def test_scales_of_another_matrix_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"want \(2, 32\)"):
        read_layer(NAME, tensors_with(scales=torch.ones(1, 32).half()), Scheme(group_size=32))


def test_a_missing_tensor_is_named() -> None:
    tensors = tensors_with()
    del tensors[f"{NAME}.g_idx"]
    with pytest.raises(InvalidInputError, match=r"up_proj\.g_idx missing"):
        read_layer(NAME, tensors, Scheme(group_size=32))


def test_the_config_is_the_one_of_the_documentation() -> None:
    config = quantize_config(Scheme(bits=4, group_size=128), [module_pattern("lm_head")])
    assert config.pop("meta")["quantizer"][0].startswith("moepress:")
    assert config == {
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "dynamic": {"-:^lm_head$": {}},
    }
    assert "dynamic" not in quantize_config(Scheme())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_config_survives_json_and_our_parser(scheme: Scheme) -> None:
    patterns = (module_pattern("model.layers.0.mlp.gate"), r".*\.kv_b_proj$")
    config = json.loads(json.dumps(quantize_config(scheme, patterns)))
    assert parse_config(config) == (scheme, patterns)


def test_a_module_pattern_matches_that_module_alone() -> None:
    pattern = module_pattern("model.layers.1.mlp.gate")
    assert re.match(pattern, "model.layers.1.mlp.gate")
    assert not re.match(pattern, "model.layers.1.mlp.gate_proj")
    assert not re.match(pattern, "model.layers.11mlp.gate")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'; moepress reads 'gptq'"),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format is 'gptq_v2'"),
        ({"bits": 5}, "bits is 5"),
        ({"bits": 4.0}, r"bits is 4\.0"),
        ({"sym": 1}, "sym is 1"),
        ({"desc_act": True}, "desc_act is True"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({"lm_head": True}, "lm_head is True"),
        ({"dynamic": {r"model\.layers\.0\..*": {"bits": 8}}}, "settings of its own"),
    ],
)
def test_a_config_that_means_other_bytes_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parse_config(quantize_config(Scheme()) | changed)


@pytest.mark.parametrize("changed", [{"dynamic": ["-:a"]}, {"dynamic": 3}, {"group_size": True}, {"group_size": 7}])
def test_a_config_of_other_types_is_invalid(changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"dynamic is|group_size is"):
        parse_config(quantize_config(Scheme()) | changed)


def test_a_config_without_a_group_size_is_invalid() -> None:
    config = quantize_config(Scheme())
    del config["group_size"]
    with pytest.raises(InvalidInputError, match="group_size is None"):
        parse_config(config)
