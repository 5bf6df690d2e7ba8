"""What a graph can not express is refused in one sentence, before any work."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import every_family
import pytest
import tiny_models

from moepress.converters.onnx.export import OnnxRequest, plan_onnx
from moepress.converters.onnx.expressible import onnx_refusal, router_tensors
from moepress.converters.safetensors.artifact import open_source
from moepress.errors import UnsupportedError
from moepress.models.families.family import RouterRule
from moepress.models.families.held import HELD_AGAINST_TRANSFORMERS
from moepress.models.storage.checkpoint import Source
from moepress.stages.export import onnx_stage
from moepress.stages.places import Output

SOFTMAX = RouterRule(scoring="softmax", renormalise=True)
_STATE = "the graph keeps keys and values between tokens, and has no inputs for the state of ONNX Runtime's"
_DELTA = rf"Layer \d is linear attention \(a gated delta rule\), .*: {_STATE} LinearAttention and CausalConvWithState\."
_NOT = "can not be exported to ONNX"
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("qwen3_next", {}, _DELTA),
    ("qwen3_5_moe_text", {}, _DELTA),
    ("qwen3_5_moe", {}, _DELTA),
    ("kimi_linear", {}, _DELTA),
    ("minimax", {}, r"Layer 1 is linear attention \(with a decay\), .* LinearAttention\."),
    ("jamba", {}, r"Layer 0 is a state-space layer \(Mamba\), .* CPU provider has no operator of a selective scan\."),
    ("lfm2_moe", {}, r"Layer 0 is a short convolution, .* CausalConvWithState\."),
    ("deepseek_v32", {}, r"Layer 0 is attention that chooses tokens by an indexer, .* no SparseAttentionIndexer\."),
    (
        "gemma4_text",
        {},
        rf"Models of type gemma4_text {_NOT}: the graph has no nodes for their embed_tokens_per_layer\.",
    ),
    ("glm4v_moe", {}, rf"The decoder of glm4v_moe models is a part of a larger model, .* {_NOT}: .* of tokens alone\."),
    ("afmoe", {}, rf"Layer 0, with post_mlp_layernorm.weight, {_NOT}: .* each behind a norm\."),
    ("cohere2_moe", {}, rf"Layer 0, without post_attention_layernorm, {_NOT}: "),
    ("hunyuan_v1_moe", {}, rf"The attention of layer 0, which has key_layernorm.weight, {_NOT}: "),
    ("mellum", {}, rf"Layers with rotary embeddings of their own {_NOT}: the graph has one table for all\."),
    ("phimoe", {}, rf"The input_layernorm of layer 0 {_NOT}: LayerNorm does not compute ONNX's RMSNormalization\."),
    (
        "ernie4_5_moe",
        {"head_dim": 16},
        rf"Models of type ernie4_5_moe {_NOT}: their graphs have not been held against ",
    ),
    ("exaone_moe", {"head_dim": 32}, rf"Models of type exaone_moe {_NOT}: their graphs have not been held against "),
    ("mistral4", {}, rf"Models of type mistral4 {_NOT}: their graphs have not been held against transformers, "),
    (
        "glm4_moe",
        {},
        rf"8 rotated values of 16 {_NOT}: ONNX Runtime's GroupQueryAttention takes multiples of 16 there; ",
    ),
    (
        "glm4_moe",
        {"head_dim": 32, "hidden_act": "gelu"},
        "MLPs with the activation 'gelu' have no ONNX kernel; use silu",
    ),
    (
        "gpt_oss",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        r"The rotary embedding of type 'dynamic' changes with the length of the text and can not be exported to ONNX; ",
    ),
)


def folder_of(model_type: str, folder: Path, **changes: Any) -> Path:
    """A tiny model's folder."""
    return every_family.save(every_family.build(model_type, **changes), folder)


def ruled(source: Any, rule: RouterRule | None = SOFTMAX) -> Source:
    """A source whose family has that rule."""
    out: Source = dataclasses.replace(source, family=dataclasses.replace(source.family, rule=rule))
    return out


def with_rule(source: Any) -> Source:
    """A source whose family has a rule that fits its router's tensors, where none was found out."""
    if source.family.rule is not None:
        return source  # type: ignore[no-any-return]
    biased = any("e_score_correction_bias" in name for name in source.family.router)
    return ruled(source, dataclasses.replace(SOFTMAX, bias=biased))


@pytest.mark.parametrize(("model_type", "changes", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_the_first_thing_that_a_graph_can_not_express_is_named(
    tmp_path: Path, model_type: str, changes: dict[str, Any], sentence: str
) -> None:
    found = onnx_refusal(with_rule(open_source(folder_of(model_type, tmp_path / "model", **changes))))
    assert found is not None
    assert re.match(sentence, found), found
    assert found.endswith(".")
    assert "\n" not in found


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_all_rows_can_be_exported(tiny_model: Callable[..., Path], key: str) -> None:
    source = open_source(tiny_model(key))
    assert onnx_refusal(source) is None
    assert source.family.name in HELD_AGAINST_TRANSFORMERS


def test_a_router_whose_rule_is_not_known_is_refused(tmp_path: Path) -> None:
    source = open_source(folder_of("gpt_oss", tmp_path / "model"))
    assert onnx_refusal(ruled(source)) is None
    found = onnx_refusal(ruled(source, None))
    assert found == (
        "Models of type gpt_oss can not be exported to ONNX: how their router chooses was not found out, and a graph "
        "routes by itself; use compressed-tensors or gptq."
    )
    other = onnx_refusal(ruled(source, RouterRule(scoring="sparsemixer")))
    assert other == (
        "The router of gpt_oss models can not be exported to ONNX: the graph's router does not compute sparsemixer."
    )


def test_a_rule_with_more_than_the_graph_knows_is_refused(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Later(RouterRule):
        per_expert_scale: bool = False

    source = open_source(folder_of("gpt_oss", tmp_path / "model"))
    assert onnx_refusal(ruled(source, Later(scoring="softmax", renormalise=True))) is None
    found = onnx_refusal(ruled(source, Later(scoring="softmax", renormalise=True, per_expert_scale=True)))
    assert found is not None
    assert found.endswith("does not compute per_expert_scale.")


def test_a_correction_bias_that_no_rule_speaks_of_is_refused(tmp_path: Path) -> None:
    source = open_source(folder_of("glm4_moe", tmp_path / "model", head_dim=32))
    spoken = ruled(source, RouterRule(scoring="sigmoid", bias=True))
    found = router_tensors(spoken, 1)
    assert (found.bias, found.correction) == (None, "model.layers.1.mlp.gate.e_score_correction_bias")
    with pytest.raises(UnsupportedError, match="the rule of glm4_moe models does not speak of it"):
        router_tensors(ruled(source), 1)
    gpt_oss = router_tensors(ruled(open_source(folder_of("gpt_oss", tmp_path / "other"))), 0)
    assert (gpt_oss.bias, gpt_oss.correction) == ("model.layers.0.mlp.router.bias", None)


def test_export_refuses_with_exit_code_5_and_leaves_nothing(tmp_path: Path) -> None:
    folder, out = folder_of("qwen3_next", tmp_path / "model"), Output(folder=tmp_path / "out")
    for work in (
        lambda: onnx_stage(str(folder), out, OnnxRequest()),
        lambda: plan_onnx(open_source(folder), OnnxRequest()),
    ):
        with pytest.raises(UnsupportedError, match=_DELTA) as caught:
            work()
        assert caught.value.exit_code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_refusal_needs_neither_onnx_nor_onnxruntime() -> None:
    code = (
        "import sys, moepress.converters.onnx.expressible as found; "
        "print(sorted({'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
