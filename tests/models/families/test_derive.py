"""Families derived from transformers: what they find where names, shapes and numbers could mislead."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import every_family
import pytest
import tiny_models
import torch

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families import remembered
from moepress.models.families.derive import derive
from moepress.models.families.family import Part, numbered, part_of, with_experts
from moepress.models.families.table import family_of
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import read_expert

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folders: dict[str, Path] = {}

    def make(model_type: str, *, fused: bool = False, **changes: Any) -> Path:
        key = f"{model_type}{fused}{changes}"
        if key not in folders:
            folder = tmp_path_factory.mktemp(model_type) / "model"
            folders[key] = every_family.save(every_family.build(model_type, **changes), folder, fused=fused)
        return folders[key]

    return make


def test_the_key_that_counts_experts_is_found_among_equal_numbers(made: Make) -> None:
    """12 experts, and 12 of something else that also changes the model."""
    folder = made("glm4_moe", vocab_size=288)
    config = json.loads((folder / "config.json").read_text()) | {"num_something_expert": 12}
    assert derive(config).experts_keys == ("n_routed_experts",)


def test_all_names_of_the_count_are_changed_together(made: Make) -> None:
    config = json.loads((made("minimax_m2") / "config.json").read_text()) | {"num_experts": 12}
    family = derive(config)
    assert set(family.experts_keys) == {"num_local_experts", "num_experts"}
    changed = with_experts(family, config, 8)
    assert changed["num_local_experts"] == changed["num_experts"] == 8


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
def test_an_expert_is_the_same_however_it_is_stored(made: Make, fused: bool) -> None:
    """gpt-oss' is transposed and interleaved and has biases, Llama 4's is transposed, Nemotron's has no gate."""
    for model_type, gated, biased in (("gpt_oss", True, True), ("llama4", True, False), ("nemotron_h", False, False)):
        folder = made(model_type, fused=fused)
        source, model = open_checkpoint(folder), every_family.load(folder)
        layer = source.outline.moe_layers[0]
        module = model.get_submodule(f"{source.family.module_layers_at}{layer}.{source.family.experts_module}")
        expert = read_expert(source, layer, 5)
        first = module.gate_up_proj[5] if gated else module.up_proj[5]
        first = first.mT if model_type != "nemotron_h" else first
        if model_type == "gpt_oss":
            first = torch.cat((first[0::2], first[1::2]))
        assert torch.equal(expert.first, first), model_type
        down = module.down_proj[5]
        assert torch.equal(expert.down, down if model_type == "nemotron_h" else down.mT), model_type
        assert (expert.gate is not None) == gated
        assert (expert.down_bias is not None) == biased


def test_squares_are_told_apart_by_the_other_matrix(made: Make) -> None:
    """D = 2F: gate and up are a square, and how it lies shows in the shape of down."""
    folder = made("gpt_oss", fused=True, hidden_size=64, intermediate_size=32, head_dim=16)
    source = open_checkpoint(folder)
    assert source.family.fused_transposed
    shapes = {
        name: (shape[0], shape[2], shape[1]) if "experts" in name and len(shape) == 3 else shape
        for name, shape in source.shapes.items()
    }
    assert not derive(source.config, shapes).fused_transposed  # as MXFP4 blocks lie


def test_parts_of_a_composite_model(made: Make) -> None:
    source = open_checkpoint(made("qwen3_5_moe"))
    family = source.family
    assert family.text_key == "text_config"
    parts = {part_of(family, name, source.shape.layers) for name in source.shapes}
    wanted = {Part.ROUTED, Part.ROUTER, Part.SHARED, Part.ATTENTION, Part.EMBEDDINGS, Part.NORMS, Part.TOWERS}
    assert wanted <= parts
    towers = [n for n in source.shapes if part_of(family, n, source.shape.layers) is Part.TOWERS]
    assert all("visual" in name for name in towers)


def test_what_transformers_does_not_know_or_has_no_experts_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"does not know model type .of_tomorrow.*own code"):
        family_of({"model_type": "of_tomorrow", "num_experts": 4})
    with pytest.raises(UnsupportedError, match="'llama' has no routed experts"):
        family_of({"model_type": "llama", "num_experts": 4, "num_hidden_layers": 2})


def test_a_folder_without_experts_is_refused(made: Make) -> None:
    source = open_checkpoint(made("glm4_moe"))
    shapes = {name: shape for name, shape in source.shapes.items() if ".experts." not in name}
    with pytest.raises(InvalidInputError, match="None of the folder's tensors is one of the routed experts"):
        derive(source.config, shapes)


def test_what_is_remembered_is_what_was_derived(made: Make) -> None:
    source = open_checkpoint(made("minimax_m2"))
    assert family_of(source.config, source.shapes) == derive(source.config, source.shapes)


@pytest.mark.parametrize("spoilt", ["", "[]", "{}", '{"name": 3}', '{"name": "x", "templates": [["a"]]}'])
def test_a_spoilt_memory_is_asked_anew(
    made: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoilt: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = open_checkpoint(made("ernie4_5_moe"))
    files = list((tmp_path / "moepress" / "families").glob("*.json"))
    assert files
    for file in files:
        file.write_text(spoilt)
    again = family_of(source.config, source.shapes)
    assert again.router_axes == (0, 1)
    assert again.part_of(source.family.router_names(source.outline.moe_layers[0])[0]) is Part.ROUTER


def test_a_memory_that_can_not_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remembered.keep(remembered.place_of("families", {"model_type": "x"}), {"a": 1})
    assert remembered.recall(remembered.place_of("families", {"model_type": "x"})) is None


def test_numbers_in_names_are_taken_out() -> None:
    assert numbered("model.layers.12.mlp.experts.3.w1.weight") == (
        "model.layers.#.mlp.experts.#.w1.weight",
        ("12", "3"),
    )
    assert numbered("lm_head.weight") == ("lm_head.weight", ())


def test_a_correction_bias_of_two_axes_and_a_table_of_expert_numbers_are_found(made: Make) -> None:
    assert open_checkpoint(made("ernie4_5_moe")).family.router_axes == (0, 1)
    family = open_checkpoint(made("deepseek_v4")).family
    assert [name.rpartition(".")[2] for name in family.tables] == ["tid2eid"]
    assert tiny_models.TINY  # the rows' own models are tried in test_family_rows.py


def test_what_other_sources_answered_is_not_recalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = {"model_type": "y"}
    remembered.keep(remembered.place_of("families", config), {"a": 1})
    assert remembered.recall(remembered.place_of("families", config)) == {"a": 1}
    monkeypatch.setattr(remembered, "_code", lambda: "of another commit")
    assert remembered.recall(remembered.place_of("families", config)) is None


def test_a_composite_that_says_of_no_head_has_the_one_of_that_name(tmp_path: Path) -> None:
    every_family.save(every_family.build("nemotron_h_omni"), tmp_path / "model")
    family = open_checkpoint(tmp_path / "model").family
    assert family.part_of(family.head) is Part.LM_HEAD
