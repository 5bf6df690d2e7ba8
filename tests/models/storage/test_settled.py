"""What config.json states and the tensors do not: settled once, noted, and right in what is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import keep_of, pruned_folder, quantized_folder
from torch import Tensor

from moepress.compress.gptq.include import Include
from moepress.converters.safetensors.artifact import open_artifact, open_source
from moepress.errors import InvalidInputError, UnsupportedError, UsageError
from moepress.models.forward.dense import load_dense
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.settled import same_data

Factory = Callable[..., Path]
CPU = torch.device("cpu")
SCALES = [f"model.layers.{n}.self_attn.{leaf}" for n in range(3) for leaf in ("k_scale", "v_scale")]


@pytest.fixture
def folder(tiny_copy: Factory) -> Path:
    return tiny_copy("qwen3_moe")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def pruned(folder: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    result = pruned_folder(folder, keep_of(open_checkpoint(folder), open_checkpoint(folder).shape.experts // 2), out)
    return out, result


def test_a_sound_folder_has_nothing_to_be_said_of(folder: Path) -> None:
    found = open_checkpoint(folder)
    assert found.notes == ()
    assert found.config == config_of(folder)


@pytest.mark.parametrize(
    "stated",
    [
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization_config": {"load_in_4bit": True}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}},
    ],
)
def test_a_quantization_that_no_tensor_has_is_dropped_and_said(
    folder: Path, tmp_path: Path, stated: dict[str, Any]
) -> None:
    tiny_models.edit_config(folder, **stated)
    source = open_source(folder)
    assert isinstance(source, Checkpoint)
    assert source.block is None
    assert len(source.notes) == len(stated)
    assert "no tensor is quantized" in source.notes[0]
    out, result = pruned(folder, tmp_path / "out")
    assert not stated.keys() & config_of(out).keys()
    assert list(source.notes) == result["notes"] == json.loads((out / "moepress.json").read_text())["notes"]


def test_an_export_of_codes_that_are_not_there_is_refused(folder: Path) -> None:
    tiny_models.edit_config(
        folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
    )
    with pytest.raises(UnsupportedError, match="no tensor is quantized"):
        open_artifact(folder)


def test_an_fp8_folder_keeps_what_its_config_states(tiny_copy: Factory) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    found = open_checkpoint(folder)
    assert (found.block, found.notes) == ((48, 40), ())
    assert "quantization_config" in found.config


@pytest.mark.parametrize("stated", [..., None, [], "Qwen3MoeForCausalLM", [None]])
def test_missing_architectures_are_written(folder: Path, tmp_path: Path, stated: Any) -> None:
    tiny_models.edit_config(folder, architectures=stated)
    out, result = pruned(folder, tmp_path / "out")
    assert config_of(out)["architectures"] == ["Qwen3MoeForCausalLM"]
    assert "names no architectures" in result["notes"][0]
    words = tiny_models.windows(300, count=2, length=16)
    quantized_folder(folder, words, tmp_path / "codes")
    assert config_of(tmp_path / "codes")["architectures"] == ["Qwen3MoeForCausalLM"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("stated", "plain"),
    [("torch.bfloat16", "bfloat16"), ("auto", "float32"), ("half", "float16"), ("bf16", "bfloat16")],
)
def test_every_spelling_of_a_dtype_is_read(folder: Path, tmp_path: Path, key: str, stated: str, plain: str) -> None:
    tiny_models.edit_config(folder, **{"dtype": ..., key: stated})
    out, result = pruned(folder, tmp_path / "out")
    assert config_of(out)[key] == plain
    assert f"{key} '{stated}' is read, and written, as {plain}" in result["notes"][0]


@pytest.mark.parametrize("stated", ["int8", "torch.nothing", 16, ["bfloat16"]])
def test_what_is_no_dtype_of_weights_is_named_with_its_key(folder: Path, stated: Any) -> None:
    tiny_models.edit_config(folder, dtype=stated)
    with pytest.raises(InvalidInputError, match=r"config\.json: dtype is"):
        open_checkpoint(folder)


def test_scales_of_a_kv_cache_are_dropped_and_said(folder: Path, tmp_path: Path) -> None:
    tiny_models.rewrite(folder, lambda tensors: tensors.update({name: torch.tensor(1.0) for name in SCALES}))
    found = open_checkpoint(folder)
    assert not set(SCALES) & (found.stored.keys() | found.shapes.keys())
    out, result = pruned(folder, tmp_path / "out")
    assert not set(SCALES) & tiny_models.load_tensors(out).keys()
    assert "6 scales of an fp8 KV cache" in result["notes"][0]


def own_head(factor: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor

    return change


def test_a_copy_of_the_embeddings_is_no_head_of_its_own(tiny_copy: Factory, tmp_path: Path) -> None:
    folder = tiny_copy("qwen2_moe")
    tiny_models.rewrite(folder, own_head(1.0))
    found = open_checkpoint(folder)
    assert "lm_head.weight" not in found.shapes
    assert "a copy of the embeddings" in found.notes[0]
    words = tiny_models.windows(256, count=2, length=16)
    with pytest.raises(UsageError, match="--include lm_head: this model ties"):
        quantized_folder(folder, words, tmp_path / "codes", include=[Include.LM_HEAD])


def test_a_head_that_differs_is_used_and_written_as_its_own(tiny_copy: Factory, tmp_path: Path) -> None:
    """As transformers does; vLLM goes by the config, so that must say it."""
    folder = tiny_copy("qwen2_moe")
    tiny_models.rewrite(folder, own_head(-0.5))
    words = tiny_models.windows(256, count=2, length=16)
    with torch.inference_mode():
        wanted = tiny_models.reference(folder)(words).logits
        ours = load_dense(open_checkpoint(folder), device=CPU, dtype=torch.float32)(words).logits
    torch.testing.assert_close(ours, wanted)
    out, result = pruned(folder, tmp_path / "out")
    assert config_of(out)["tie_word_embeddings"] is False
    assert "lm_head.weight differs from them" in result["notes"][0]
    quantized_folder(folder, words, tmp_path / "codes", include=[Include.LM_HEAD])
    assert config_of(tmp_path / "codes")["tie_word_embeddings"] is False
    assert open_artifact(tmp_path / "codes").is_quantized("lm_head.weight")


def test_data_is_compared_to_the_last_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepress.models.storage.settled._AT_ONCE", 1000)
    tiny_models.rewrite(folder, own_head(1.0))
    stored = open_checkpoint(folder).stored
    head, table = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
    assert same_data(head, table)
    raw = bytearray(head.file.read_bytes())
    raw[head.end - 1] ^= 1
    head.file.write_bytes(raw)
    assert not same_data(head, table)


def test_further_chat_templates_go_along(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"{{ tools }}\r\n")
    shutil.copy(folder / "config.json", folder / "quantize_config.json")  # of another copy
    out, result = pruned(folder, tmp_path / "out")
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_bytes() == b"{{ tools }}\r\n"
    assert "additional_chat_templates/tool_use.jinja" in result["copied"]
    assert not (out / "quantize_config.json").exists()
