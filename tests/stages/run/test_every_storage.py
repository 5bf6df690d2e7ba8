"""The whole job on models that people press: `run --keep --bits 4 --to gptq`, in the form that their folders have."""

import json
from pathlib import Path

import every_family
import pytest
import tiny_models
import tiny_storages
import torch
from byte_tokenizer import byte_tokenizer
from family_criteria import assert_same, loaded, logits
from stage_runs import AsTransformers, command, streamed_logits

from moepress.converters.safetensors.artifact import open_artifact
from moepress.models.forward.dense import load_dense
from moepress.models.storage.checkpoint import open_checkpoint

STORAGES = {
    "mxfp4": tiny_storages.to_mxfp4,
    "fp8": tiny_storages.to_fp8,
    "tensor": lambda folder: tiny_storages.to_fp8(folder, block=None),
    "ue8m0": lambda folder: tiny_storages.to_fp8(folder, power_of_two=True),
    "int4": tiny_storages.to_int4,
}
JOBS = (
    *("glm4_moe", "glm4_moe_lite", "qwen3_next", "qwen3_5_moe", "gpt_oss+mxfp4", "gemma4", "minimax_m2+fp8"),
    *("nemotron_h", "ernie4_5_moe", "deepseek_v3+ue8m0", "deepseek_v3+int4", "deepseek_v3+tensor", "llama4"),
    "lfm2_moe",
)
QUICK = ("qwen3_5_moe", "gpt_oss+mxfp4")
TOKENS = tiny_models.windows(every_family.TEXT_VOCAB, count=2, length=20)


def job(name: str) -> object:
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


def made(name: str, folder: Path) -> Path:
    model_type, _, storage = name.partition("+")
    changes = {"n_routed_experts": 16} if model_type == "deepseek_v3" else {}  # in four groups
    every_family.save(every_family.build(model_type, **changes), folder, dtype=torch.bfloat16)
    if storage:
        STORAGES[storage](folder)
    byte_tokenizer(folder)
    return folder


SMALL = ("--tokens", "2048", "--window", "64", "--max-windows", "1", "--no-throughput")


@pytest.mark.parametrize("name", [job(name) for name in JOBS])
def test_the_whole_job(name: str, tmp_path: Path) -> None:
    folder, out = made(name, tmp_path / "model"), tmp_path / "out"
    code, _, told = command(
        *("run", folder, "-o", out, "--keep", "0.75", "--bits", "4", "--group-size", "32", "--to", "gptq", *SMALL)
    )
    assert code == 0, told
    report = json.loads((out / "report.json").read_text())
    assert [subject["label"] for subject in report["subjects"]] == ["original", "pruned", "pruned + 4 bit"]
    artifact, gptq = open_artifact(out / "model"), open_artifact(out / "exports" / "gptq")
    ours = streamed_logits(artifact, TOKENS, tmp_path)
    if artifact.family.loads_single:
        model, found = loaded(out / "model")
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        theirs = streamed_logits(AsTransformers.of(artifact), TOKENS, tmp_path)
        assert_same(theirs, logits(model, TOKENS), 1e-4)
    else:  # transformers has no loader of single quantized experts: its own model, filled with what the codes stand for
        dense = load_dense(artifact, device=torch.device("cpu"), dtype=torch.float32)
        assert_same(ours, logits(dense, TOKENS), 1e-4)
    layer = artifact.outline.moe_layers[0]
    for matrix in artifact.family.expert_names(layer, 2):
        assert torch.equal(artifact.codes(matrix)[0], gptq.codes(matrix)[0])


@pytest.mark.parametrize("name", ["gpt_oss+mxfp4", pytest.param("deepseek_v3+int4", marks=pytest.mark.slow)])
def test_what_has_four_bits_already_is_only_pruned(name: str, tmp_path: Path) -> None:
    folder, out = made(name, tmp_path / "model"), tmp_path / "out"
    code, _, told = command("run", folder, "-o", out, "--keep", "0.75", *SMALL)
    assert code == 0, told
    assert "keep every byte" in told
    assert "costs quality" in told
    before, after = open_checkpoint(folder), open_checkpoint(out / "model")
    assert after.shape.experts == before.shape.experts * 3 // 4
    assert after.pressed_as == before.pressed_as
    model, found = loaded(out / "model")
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    # transformers multiplies codes and scales out in the scales' bf16, and we do in fp32.
    assert_same(streamed_logits(after, TOKENS, tmp_path), logits(model, TOKENS), 1e-3 if "mxfp4" in name else 1e-2)
    code, _, told = command("run", folder, "-o", tmp_path / "again", "--keep", "0.75", "--to", "gptq", *SMALL)
    assert code == 2
    assert "--bits 4" in told
