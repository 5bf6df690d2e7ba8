"""A folder as an ONNX decoder: ONNX Runtime's logits are the folder's own, for all families and kinds of folders."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_runs
import pytest
import tiny_models
import torch
from onnx_runs import (
    DECODE,
    G16,
    PREFILL,
    Models,
    attributes_of,
    coded_folder,
    dequantized,
    drop_experts,
    graph_of,
    initializers_of,
    onnx_logits,
    own_logits,
    padded_run,
    relative_error,
    to_onnx,
    token_errors,
    tokens_of,
)
from stage_runs import keep_of, logits_of, masked, pruned_folder
from torch import Tensor

from moepress.converters.onnx.decoder import build_decoder
from moepress.converters.onnx.folder import open_onnx
from moepress.converters.safetensors.artifact import open_artifact, open_source
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.family import Part
from moepress.stages.export import export_stage
from moepress.stages.places import Output

EXACT = 1e-4  # relative, of fp32 with fp32 activations; 1e-6 is what was seen


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    return onnx_runs.models_of(tiny_model, tmp_path_factory)


def require_equal(wanted: Tensor, out: Path, length: int = PREFILL + 4) -> None:
    """A prefill of 24 tokens for a batch of 2, and token by token from there, are these logits."""
    assert relative_error(onnx_logits(out, tokens_of(out, length), PREFILL), wanted[:, :length]) < EXACT


def fresh_logits(folder: Path) -> Tensor:
    """The folder's own logits, of a folder that only this test has."""
    return own_logits(folder, tokens_of(folder, PREFILL + 4))


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_prefill_and_decode_give_the_logits_of_the_quantized_folder(models: Models, key: str) -> None:
    folder = models.quantized(key)
    require_equal(models.own_logits(folder), models.onnx(folder), length=PREFILL + DECODE)


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_a_graph_is_valid_and_asks_for_what_every_runtime_reads_alike(models: Models, key: str) -> None:
    out = models.onnx(models.quantized(key))
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    model = graph_of(out)
    assert model.ir_version == 11
    assert {o.domain: o.version for o in model.opset_import} == {"": 23, "com.microsoft": 1}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "g_idx" not in str(model)
    fused = {node.name: attributes_of(node) for node in model.graph.node if node.op_type == "QMoE"}
    source = open_artifact(models.quantized(key))
    assert list(fused) == [f"/model/layers.{layer}/mlp/QMoE" for layer in source.outline.moe_layers]
    for facts in fused.values():
        wanted = {"swiglu_fusion": 1, "weights_prepacked": 0, "normalize_routing_weights": 1, "accuracy_level": 0}
        assert {name: facts[name] for name in wanted} == wanted


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_plain_fp32_folders_run_as_dense_experts(models: Models, key: str) -> None:
    folder = models.tiny(key)
    out = models.onnx(folder)
    assert "MoE" in {node.op_type for node in graph_of(out).graph.node}
    require_equal(models.own_logits(folder), out)


@pytest.mark.parametrize("key", ["deepseek_v3", "qwen2_moe", "olmoe"])
def test_a_loop_of_experts_equals_the_fused_node(models: Models, key: str) -> None:
    for folder in (models.quantized(key), models.tiny(key)):
        fused, loop = models.onnx(folder), models.onnx(folder, kernel="loop")
        assert not {"QMoE", "MoE"} & {node.op_type for node in graph_of(loop).graph.node}
        tokens = tokens_of(folder, PREFILL + 4)
        assert relative_error(onnx_logits(loop, tokens, PREFILL), onnx_logits(fused, tokens, PREFILL)) < 1e-5


def test_plain_bf16_folders_are_widened_but_for_the_embedding(models: Models) -> None:
    folder = models.tiny("deepseek_v3", dtype=torch.bfloat16)
    out = models.onnx(folder)
    kinds = {t.name: t.data_type for t in graph_of(out).graph.initializer}
    assert kinds["model.embed_tokens.weight"] == onnx.TensorProto.BFLOAT16
    assert kinds["model.layers.0.self_attn.o_proj.weight"] == onnx.TensorProto.FLOAT
    require_equal(models.own_logits(folder), out)


@pytest.mark.parametrize("key", ["deepseek_v2", "mixtral"])
def test_pruned_folders_run(models: Models, tmp_path: Path, key: str) -> None:
    source = open_source(models.tiny(key))
    count = source.shape.experts // 2
    pruned_folder(models.tiny(key), keep_of(source, count), tmp_path / "pruned")
    out = to_onnx(tmp_path / "pruned", tmp_path / "onnx")
    assert initializers_of(out)["model.layers.2.mlp.experts.fc1"].shape[0] == count
    require_equal(fresh_logits(tmp_path / "pruned"), out)


def test_fp8_folders_run(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    require_equal(fresh_logits(folder), to_onnx(folder, tmp_path / "onnx"))


@pytest.mark.parametrize("key", ["qwen2_moe", "mixtral"])
def test_folders_with_fused_experts_run(models: Models, key: str) -> None:
    folder = models.tiny(key, fused=True)
    for kernel in ("qmoe", "loop"):
        require_equal(models.own_logits(folder), models.onnx(folder, kernel=kernel))


def test_a_layer_for_multi_token_prediction_is_left_out(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("deepseek_v3")
    plain = to_onnx(folder, tmp_path / "plain")
    tiny_models.add_mtp(folder)
    out = to_onnx(folder, tmp_path / "onnx")
    assert not list(out.glob("model.layer-003*"))
    for file in plain.glob("model*"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    before, after = open_onnx(plain), open_onnx(out)
    assert before.parameters == after.parameters > 0
    assert before.summary["notes"] == []
    dropped = sum(name.startswith("model.layers.3.") for name in open_source(folder).shapes)
    assert after.summary["notes"] == [f"The multi-token-prediction layer was dropped ({dropped} tensors)."]
    assert after.config["num_nextn_predict_layers"] == 0


def test_tied_embeddings_become_a_head(models: Models) -> None:
    weights = initializers_of(models.onnx(models.tiny("qwen2_moe")))
    assert "lm_head.weight" not in open_source(models.tiny("qwen2_moe")).shapes
    assert np.array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_a_quantized_head_runs(models: Models) -> None:
    folder = models.coded("mixtral", G16, parts=[Part.ROUTED, Part.LM_HEAD])
    out = models.onnx(folder)
    assert "/lm_head/MatMulNBits" in {node.name for node in graph_of(out).graph.node}
    require_equal(models.own_logits(folder), out)


@pytest.mark.parametrize("key", ["deepseek_v2_lite", "moonlight"])
def test_a_quantized_key_and_value_projection_is_multiplied_out(models: Models, key: str) -> None:
    folder = models.coded(key, G16)
    assert open_artifact(folder).is_quantized("model.layers.0.self_attn.kv_b_proj.weight")
    require_equal(models.own_logits(folder), models.onnx(folder))


def test_biases_of_attention_are_added(models: Models, tmp_path: Path) -> None:
    for key in ("deepseek_v3", "qwen3_moe"):
        folder = tiny_models.make(key, tmp_path / key, attention_bias=True)
        require_equal(fresh_logits(folder), to_onnx(folder, tmp_path / f"{key}-onnx"))
    assert any(".q_proj.bias" in name for name in open_source(models.tiny("qwen2_moe")).shapes)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_that_do_not_depend_on_the_length_run(tmp_path: Path, rope: dict[str, Any]) -> None:
    folder = tiny_models.make("olmoe", tmp_path / "model", rope_parameters=rope, clip_qkv=0.5)
    require_equal(fresh_logits(folder), to_onnx(folder, tmp_path / "onnx"))


def test_rotary_embeddings_that_depend_on_the_length_are_refused(tiny_copy: Callable[..., Path]) -> None:
    folder = tiny_copy("qwen3_moe")
    tiny_models.edit_config(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(UnsupportedError, match="'dynamic' changes with the length"):
        build_decoder(open_source(folder), dtype=torch.float32, kernel="qmoe")


def test_other_activations_are_refused(tiny_copy: Callable[..., Path]) -> None:
    folder = tiny_copy("mixtral")
    tiny_models.edit_config(folder, hidden_act="gelu")
    with pytest.raises(UnsupportedError, match="activation 'gelu'"):
        build_decoder(open_source(folder), dtype=torch.float32, kernel="qmoe")


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral"])
def test_the_gptq_layout_gives_the_same_codes(models: Models, tmp_path: Path, key: str) -> None:
    folder = models.coded(key, Scheme(bits=4, group_size=32), parts=[Part.ROUTED, Part.SHARED], dtype=torch.float16)
    export_stage(str(folder), Output(folder=tmp_path / "gptq"), "gptq")
    out = to_onnx(tmp_path / "gptq", tmp_path / "onnx")
    assert {f.name for f in out.iterdir()} == {f.name for f in models.onnx(folder).iterdir()}
    ours, theirs = initializers_of(models.onnx(folder)), initializers_of(out)
    assert any(".fc1_codes" in name for name in ours)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert (values.dtype, values.tobytes()) == (theirs[name].dtype, theirs[name].tobytes()), name
    require_equal(fresh_logits(tmp_path / "gptq"), out)


def uneven(source: Any) -> dict[int, list[int]]:
    """Other experts in every layer, and another number of them, as many in each router group."""
    layers = source.outline.moe_layers
    per_layer = [keep_of(source, source.shape.experts * part // 8, seed=part) for part in (8, 4, 6)]
    grouped = source.shape.groups > 1
    return {layer: per_layer[n % 2 if grouped else n % 3][layer] for n, layer in enumerate(layers)}


@pytest.mark.parametrize("kernel", ["qmoe", "loop"])
@pytest.mark.parametrize("key", ["deepseek_v3", "deepseek_v2", "qwen3_moe", "olmoe"])
def test_every_layer_may_have_its_own_number_of_experts(models: Models, tmp_path: Path, key: str, kernel: str) -> None:
    folder = models.coded(key, G16)
    keep = uneven(open_source(models.tiny(key)))
    drop_experts(folder, tmp_path / "uneven", keep)
    out = to_onnx(tmp_path / "uneven", tmp_path / "onnx", kernel=kernel)
    if kernel == "qmoe":
        counts = {t.name: t.dims[0] for t in graph_of(out).graph.initializer if t.name.endswith("fc1_codes")}
        assert counts == {f"model.layers.{n}.mlp.experts.fc1_codes": len(kept) for n, kept in keep.items()}
        assert len(set(counts.values())) > 1
    tokens = tokens_of(folder, PREFILL + 4)
    model = tiny_models.reference(dequantized(folder, tmp_path / "dense"))
    with masked(model, keep):
        wanted = logits_of(model, tokens)
    assert relative_error(onnx_logits(out, tokens, PREFILL), wanted) < EXACT
    assert relative_error(logits_of(model, tokens), wanted) > 0.01  # the experts that went are missed


def test_a_group_with_one_expert_is_scored_by_that_one(models: Models, tmp_path: Path) -> None:
    """Four groups of which all may be used; transformers, which adds two scores a group, gives the same choice."""
    folder = shutil.copytree(models.coded("deepseek_v3", G16, parts=[Part.ROUTED]), tmp_path / "all")
    tiny_models.edit_config(folder, topk_group=4)
    keep = {1: keep_of(open_source(folder), 4)[1]}
    out = to_onnx(drop_experts(folder, tmp_path / "few", keep), tmp_path / "onnx")
    model = tiny_models.reference(dequantized(folder, tmp_path / "dense"))
    with masked(model, keep):
        wanted = logits_of(model, tokens_of(folder))
    require_equal(wanted, out)


def test_groups_that_cannot_be_routed_are_refused(models: Models, tmp_path: Path) -> None:
    folder = models.coded("deepseek_v3", G16, parts=[Part.ROUTED])
    for kept in (list(range(7)), [0, 4, 8, 12]):  # the latter: two groups of one expert each, and a token wants four
        few = drop_experts(folder, tmp_path / str(len(kept)), {2: kept})
        with pytest.raises(UnsupportedError, match=f"{len(kept)} experts in 4 router groups can not be routed"):
            build_decoder(open_source(few), dtype=torch.float32, kernel="qmoe")


def test_experts_beyond_the_routers_rows_are_refused(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.coded("olmoe", G16, parts=[Part.ROUTED]), tmp_path / "copy")
    name = "model.layers.1.mlp.gate.weight"
    tiny_models.rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    with pytest.raises(InvalidInputError, match="layer 1 has more experts than the 5 rows"):
        build_decoder(open_source(folder), dtype=torch.float32, kernel="qmoe")


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v3"])
def test_layers_of_different_widths_run(models: Models, tmp_path: Path, key: str) -> None:
    def scheme(module: str) -> Scheme:
        return Scheme(bits=8, group_size=32) if ".layers.1." in module else G16

    folder = coded_folder(models.tiny(key), tmp_path / "mixed", scheme, [Part.ROUTED, Part.SHARED])
    assert len(open_artifact(folder).schemes) == 2
    require_equal(fresh_logits(folder), to_onnx(folder, tmp_path / "onnx"))


def test_layers_without_codes_run_beside_layers_with_codes(models: Models, tmp_path: Path) -> None:
    folder = coded_folder(
        models.tiny("olmoe"), tmp_path / "half", lambda n: G16 if ".layers.1." in n else None, [Part.ROUTED]
    )
    out = to_onnx(folder, tmp_path / "onnx")
    kinds = [node.op_type for node in graph_of(out).graph.node if "MoE" in node.op_type]
    assert kinds == ["MoE", "QMoE", "MoE"]
    require_equal(models.own_logits(folder), out)


def test_several_widths_in_one_layer_need_the_loop(models: Models, tmp_path: Path) -> None:
    def scheme(module: str) -> Scheme:
        return Scheme(bits=8, group_size=16) if "down_proj" in module else G16

    folder = coded_folder(models.tiny("olmoe"), tmp_path / "mixed", scheme, [Part.ROUTED])
    with pytest.raises(UnsupportedError, match="Layer 0 has experts of 4 and 8 bits"):
        build_decoder(open_artifact(folder), dtype=torch.float32, kernel="qmoe")
    require_equal(fresh_logits(folder), to_onnx(folder, tmp_path / "onnx", kernel="loop"))


@pytest.mark.parametrize("dense", ["experts.0.", "experts.3.up_proj"])
def test_a_layer_of_codes_and_dense_experts_needs_the_loop(models: Models, tmp_path: Path, dense: str) -> None:
    folder = coded_folder(
        models.tiny("olmoe"),
        tmp_path / "mixed",
        lambda n: None if ".layers.1." in n and dense in n else G16,
        [Part.ROUTED],
    )
    with pytest.raises(
        UnsupportedError, match=r"Layer 1 has 2[13] expert matrices in codes and [13] dense .* --experts"
    ):
        build_decoder(open_artifact(folder), dtype=torch.float32, kernel="qmoe")
    require_equal(fresh_logits(folder), to_onnx(folder, tmp_path / "onnx", kernel="loop"))


@pytest.mark.parametrize("key", ["deepseek_v2", "qwen3_moe", "olmoe"])
def test_8_bits_are_exact_where_activations_stay_fp32(models: Models, key: str) -> None:
    folder = models.coded(key, Scheme(bits=8, group_size=32), parts=[Part.ROUTED, Part.SHARED])
    out, tokens = models.onnx(folder), tokens_of(folder, PREFILL)
    require_equal(models.own_logits(folder), out)
    rounded = token_errors(onnx_logits(out, tokens, exact=False), models.own_logits(folder)[:, : tokens.shape[1]])
    assert 1e-3 < float(rounded.median()) < 0.1  # int8 activations: a step is 1/127 of a token's largest value


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral"])
def test_2_bits_are_exact_in_a_loop_and_rounded_in_qmoe(models: Models, key: str) -> None:
    folder = models.coded(key, Scheme(bits=2, group_size=32), parts=[Part.ROUTED])
    require_equal(models.own_logits(folder), models.onnx(folder, kernel="loop"))
    tokens = tokens_of(folder, PREFILL + 4)
    rounded = token_errors(onnx_logits(models.onnx(folder), tokens), models.own_logits(folder)[:, : tokens.shape[1]])
    assert 1e-4 < float(rounded.median()) < 0.1  # that kernel makes activations int8 from blocks of 32 on


def test_int8_activations_by_choice_are_near(models: Models) -> None:
    folder = models.quantized("mixtral")
    tokens = tokens_of(folder, PREFILL + 4)
    rounded = token_errors(
        onnx_logits(models.onnx(folder, accuracy_level=4), tokens), models.own_logits(folder)[:, : tokens.shape[1]]
    )
    assert 1e-4 < float(rounded.median()) < 0.05


@pytest.mark.parametrize("key", ["deepseek_v3", "deepseek_v2", "qwen3_moe", "qwen2_moe", "mixtral_window", "olmoe"])
def test_an_fp16_graph_is_near_in_every_token(models: Models, key: str) -> None:
    folder = models.quantized(key)
    out, tokens = models.onnx(folder, preset="cuda"), tokens_of(folder, PREFILL + 4)
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in [*graph_of(out).graph.input, *graph_of(out).graph.output]
    }
    assert kinds.pop("logits") == onnx.TensorProto.FLOAT
    assert {kinds.pop("input_ids"), kinds.pop("attention_mask")} == {onnx.TensorProto.INT64}
    assert set(kinds.values()) == {onnx.TensorProto.FLOAT16}
    errors = token_errors(onnx_logits(out, tokens, PREFILL), models.own_logits(folder)[:, : tokens.shape[1]])
    assert float(errors.median()) < 0.01  # fp16 has 11 bits; a token whose experts change may be further off


def test_values_that_overflow_fp16_are_refused_by_name(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("mixtral")
    name = "model.layers.1.self_attn.o_proj.weight"
    tiny_models.rewrite(folder, lambda tensors: tensors[name].view(-1)[7].fill_(7e4))
    with pytest.raises(UnsupportedError, match=f"{name} holds values that fp16 can not; export with --for cpu"):
        to_onnx(folder, tmp_path / "onnx", preset="cuda")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_rows_of_a_batch_that_is_padded_on_the_right_are_those_alone(models: Models, key: str) -> None:
    folder = models.quantized(key)
    tokens = tokens_of(folder, 21)
    lengths = (20, 11)
    rows = [tokens[n, :length] for n, length in enumerate(lengths)]
    after = [int(tokens[n, length]) for n, length in enumerate(lengths)]
    first, then = padded_run(models.onnx(folder), rows, after)
    wanted = models.own_logits(folder)
    for n, length in enumerate(lengths):
        assert relative_error(first[n], wanted[n, :length]) < EXACT
        assert relative_error(then[n], wanted[n, length]) < EXACT
