"""Folders of derived families that are not sound, or that are and look strange; and runs that are killed."""

from collections.abc import Callable
from pathlib import Path

import every_family
import pytest
import tiny_models
import torch
from stage_runs import command, keep_of, pruned_folder, quantized_folder
from torch import Tensor

from moepress.compress.pruning.rewrite import _renamed
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.table import DEEPSEEK_V3
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.validation.rules.check import check_folder
from moepress.validation.rules.findings import Runtime

Tensors = dict[str, Tensor]
WINDOWS = tiny_models.windows(every_family.TEXT_VOCAB, count=4, length=16)


def made(model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, fused: bool = False) -> Path:
    return every_family.save(every_family.build(model_type), folder / model_type, dtype=dtype, fused=fused)


def refusal(folder: Path) -> str:
    def look() -> None:
        source = open_checkpoint(folder)
        check_tensors(source.family, source.config, source.shape, source.shapes, folder=folder)

    with pytest.raises(InvalidInputError) as caught:
        look()
    return str(caught.value)


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_tensor_outside_of_the_layers_that_is_missing_is_refused(tmp_path: Path, name: str) -> None:
    folder = made("glm4_moe", tmp_path)
    tiny_models.rewrite(folder, without(name))
    assert f"{name} is missing" in refusal(folder)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    source = open_checkpoint(made("gemma4", tmp_path))
    assert source.family.head not in source.shapes
    check_tensors(source.family, source.config, source.shape, source.shapes, folder=source.folder)


@pytest.mark.parametrize(("leaf", "cut"), [("down_proj", (1, 0)), ("down_proj", (0, 1)), ("gate_up_proj", (0, 2))])
def test_fused_experts_of_another_size_are_refused(tmp_path: Path, leaf: str, cut: tuple[int, int]) -> None:
    folder, name = made("gpt_oss", tmp_path), f"model.layers.0.mlp.experts.{leaf}"

    def change(tensors: Tensors) -> None:
        weight = tensors[name]
        tensors[name] = weight[:, : weight.shape[1] - cut[0], : weight.shape[2] - cut[1]].contiguous()

    tiny_models.rewrite(folder, change)
    assert f"{name} has shape" in refusal(folder)


def test_experts_that_are_stored_in_both_forms_are_refused(tmp_path: Path) -> None:
    folder, fused = made("glm4_moe", tmp_path / "a"), made("glm4_moe", tmp_path / "b", fused=True)
    more = {n: t for n, t in tiny_models.load_tensors(fused).items() if n.startswith("model.layers.2.mlp.experts.")}
    assert more
    tiny_models.rewrite(folder, lambda tensors: tensors.update(more))
    assert "is there twice" in refusal(folder)


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "zaya"])
def test_what_layers_hand_on_is_there_again_after_a_resume(tmp_path: Path, model_type: str) -> None:
    """Their layers return more than hidden states: indices of tokens, states of routers."""
    folder = made(model_type, tmp_path)
    quantized_folder(folder, WINDOWS, tmp_path / "whole")
    for _ in range(12):
        if quantized_folder(folder, WINDOWS, tmp_path / "sittings", max_pieces=1)["finished"]:
            break
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "sittings" / file.name).read_bytes()


@pytest.mark.parametrize("model_type", ["gpt_oss", "ernie4_5_moe", "nemotron_h", "deepseek_v4"])
def test_nothing_is_found_in_a_sound_folder(tmp_path: Path, model_type: str) -> None:
    """Norms in bf16 are no correction biases, and a table of embeddings is no Linear."""
    folder = made(model_type, tmp_path, dtype=torch.bfloat16)
    pruned_folder(folder, keep_of(open_checkpoint(folder), 8), tmp_path / "pruned")
    quantized_folder(folder, WINDOWS, tmp_path / "quantized")
    for out in ("pruned", "quantized"):
        checked = check_folder(tmp_path / out, [Runtime.TRANSFORMERS])
        rules = {found.rule for found in checked.findings if found.fails}
        assert rules <= {"experts-in-transformers"}, out


def test_experts_of_another_width_than_the_model_s_are_refused(tmp_path: Path) -> None:
    folder = every_family.save(every_family.build("muse_spark", moe_hidden_size=32), tmp_path / "muse")
    source = open_checkpoint(folder)
    with pytest.raises(UnsupportedError, match="work on 32 columns and the model on 64"):
        StreamedModel(source, device=torch.device("cpu"), dtype=torch.float32)


def test_text_comes_from_a_composite_model(tmp_path: Path) -> None:
    from byte_tokenizer import byte_tokenizer

    folder = made("qwen3_5_moe", tmp_path)
    byte_tokenizer(folder)
    code, out, told = command("generate", folder, "abc", "--max-new-tokens", "3")
    assert code == 0, told
    assert out


def test_experts_in_lists_of_a_quantization_get_their_new_numbers() -> None:
    keep = {1: [0, 2, 3]}
    assert (
        _renamed(DEEPSEEK_V3, "model.layers.1.mlp.experts.3.gate_proj", keep)
        == "model.layers.1.mlp.experts.2.gate_proj"
    )
    assert _renamed(DEEPSEEK_V3, "model.layers.1.mlp.experts.1", keep) is None
    assert _renamed(DEEPSEEK_V3, "re:.*self_attn.*", keep) == "re:.*self_attn.*"
    with pytest.raises(UnsupportedError, match="numbers of experts"):
        _renamed(DEEPSEEK_V3, r"re:.*experts\.3\..*", keep)
