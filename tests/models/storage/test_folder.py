"""Which files of a folder are the model: two sets of weights, files that nobody reads, other formats, pointers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from moepress.errors import InvalidInputError, MoepressError, UnsupportedError
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.folder import INDEX, SINGLE, load_config
from moepress.stages.places import model_folder

Factory = Callable[..., Path]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def folder(tiny_copy: Factory) -> Path:
    return tiny_copy("qwen3_moe")


def refusal(folder: Path, error: type[MoepressError] = InvalidInputError) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(folder)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_single_file_beside_an_index_is_refused_naming_both(folder: Path, tiny_model: Factory) -> None:
    shutil.copy(tiny_model("qwen3_moe", shards=1, seed=7) / SINGLE, folder / SINGLE)
    message = refusal(folder)
    assert "two sets of weights" in message
    assert SINGLE in message
    assert INDEX in message


def test_an_index_of_the_single_file_is_one_set(folder: Path) -> None:
    tiny_models.rewrite(folder, lambda _tensors: None, shards=1)
    names = tiny_models.load_tensors(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert open_checkpoint(folder).notes == ()


@pytest.mark.parametrize("name", ["model-00001-of-00009.safetensors", "model.fp16.safetensors", "extra.safetensors"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_second_copy_of_a_tensor_in_another_file_is_refused(folder: Path, name: str, shards: int) -> None:
    tiny_models.rewrite(folder, lambda _tensors: None, shards=shards)
    save_file({"model.norm.weight": torch.ones(128)}, folder / name)
    message = refusal(folder)
    assert "model.norm.weight twice" in message
    assert name in message


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "consolidated.00.pt", "a.gguf"]
)
def test_weights_that_nobody_reads_are_noted(folder: Path, name: str) -> None:
    save_file({"norm.weight": torch.ones(128)}, folder / name)
    (note,) = open_checkpoint(folder).notes
    assert f"not read: {name} (" in note


def test_what_a_training_leaves_behind_is_no_news(folder: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"x")
    (folder / "original").mkdir()
    save_file({"model.norm.weight": torch.ones(128)}, folder / "original" / "model.safetensors")
    assert open_checkpoint(folder).notes == ()


def test_an_adapter_beside_a_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in refusal(folder, UnsupportedError)


@pytest.mark.parametrize(
    ("name", "said", "error"),
    [
        ("model-q4_k_m.gguf", "GGUF", UnsupportedError),
        ("tf_model.h5", "TensorFlow", UnsupportedError),
        ("weights.npz", "MLX", UnsupportedError),
        ("adapter_config.json", "LoRA adapter", UnsupportedError),
        ("consolidated.safetensors", "Mistral's own format", UnsupportedError),
        ("model-00001-of-00002.safetensors", f"no {INDEX}", InvalidInputError),
        ("pytorch_model.bin", "pickle weights", InvalidInputError),
        ("notes.txt", f"neither {SINGLE} nor {INDEX}", InvalidInputError),
    ],
)
def test_a_folder_of_other_weights_says_what_it_holds(
    folder: Path, name: str, said: str, error: type[MoepressError]
) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / name).write_bytes(b"{}")
    assert said in refusal(folder, error)


def test_a_git_lfs_pointer_is_told_from_a_broken_file(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(POINTER)
    message = refusal(folder)
    assert str(shard) in message
    assert "Git LFS pointer" in message
    assert "git lfs pull" in message
    (folder / "config.json").write_bytes(POINTER)
    with pytest.raises(InvalidInputError, match=r"config\.json is a Git LFS pointer"):
        load_config(folder)


@pytest.mark.parametrize(
    ("head", "said"),
    [(b"GGUF\x03\0\0\0" + bytes(64), "GGUF"), (b"<!DOCTYPE html><html>", "web page"), (b"PK\3\4", "zip")],
)
def test_a_shard_that_is_something_else_is_named_for_what_it_is(folder: Path, head: bytes, said: str) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(head + bytes(100))
    assert said in refusal(folder)


def test_a_file_in_place_of_a_folder_is_named_for_what_it_is(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(UnsupportedError, match="is a GGUF file"):
        model_folder(str(tmp_path / "m.gguf"))
    with pytest.raises(InvalidInputError, match="give the folder that it lies in"):
        model_folder(str(sorted(folder.glob("*.safetensors"))[0]))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("model.", "", "no `model.` before"), ("model.", "language_model.model.", "prefix `language_model.model.`")],
)
def test_names_with_another_prefix_are_named(folder: Path, old: str, new: str, said: str) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new, 1)] = tensors.pop(name)

    tiny_models.rewrite(folder, rename)
    message = refusal(folder)
    assert said in message
    assert "restore" not in message
