"""What modules compute is found by trying them, and not by their names."""

import json
from typing import Any

import every_family
import pytest
from torch import nn

from moepress.converters.onnx.modules import Activation, activation_of, is_rms_norm, is_silu
from moepress.models.families.skeleton import build_skeleton


@pytest.mark.parametrize(
    ("model_type", "changes", "wanted"),
    [
        ("glm4_moe", {}, Activation()),
        ("gpt_oss", {}, Activation(alpha=1.702, beta=1.0, limit=7.0)),
        ("gpt_oss", {"swiglu_alpha": 1.0, "swiglu_limit": 0.25}, Activation(alpha=1.0, beta=1.0, limit=0.25)),
        ("nemotron_h", {}, None),
        ("gemma4_text", {}, None),  # gelu
        ("muse_spark", {}, None),  # a norm behind each expert
    ],
)
def test_what_experts_do_is_found_by_trying(
    model_type: str, changes: dict[str, Any], wanted: Activation | None
) -> None:
    model = build_skeleton(config_of(model_type, changes))
    module = model.get_submodule(every_family.experts_of(model)[0])
    assert activation_of(module, model.config) == wanted


def config_of(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The tiny config of a type with other values; plain JSON."""
    values: dict[str, Any] = json.loads(json.dumps(every_family.tiny_config(model_type).to_dict()))
    return values | changes


def test_norms_are_known_by_what_they_compute() -> None:
    def norm_of(model_type: str) -> nn.Module:
        found = build_skeleton(config_of(model_type, {})).model.layers[0].input_layernorm
        assert isinstance(found, nn.Module)
        return found

    assert is_rms_norm(norm_of("glm4_moe"))
    assert is_rms_norm(norm_of("gpt_oss"))
    assert not is_rms_norm(norm_of("qwen3_next"))  # its factor is weight + 1
    assert not is_rms_norm(nn.LayerNorm(8))
    assert not is_rms_norm(nn.RMSNorm(8))  # its eps has another name


def test_silu_is_known_by_what_it_computes() -> None:
    assert is_silu(nn.SiLU())
    assert not is_silu(nn.GELU())
    assert not is_silu(None)
