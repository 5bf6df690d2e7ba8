"""Model folders that are broken, incomplete or hostile are refused, and the message says where."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepress.errors import InvalidInputError, MoepressError, UnsupportedError
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import read_expert
from moepress.models.storage.folder import INDEX, SINGLE, load_config, read_json
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import read_tensor

Factory = Callable[..., Path]
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.fixture
def folder(tiny_copy: Factory) -> Path:
    """A sharded per-expert Qwen3-MoE that a test may spoil."""
    return tiny_copy("qwen3_moe")


@pytest.fixture
def olmoe(tiny_copy: Factory) -> Path:
    return tiny_copy("olmoe")


def check(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    check_tensors(checkpoint.family, checkpoint.config, checkpoint.outline.shape, checkpoint.shapes, folder=folder)
    return checkpoint


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidInputError) as caught:
        check(folder)
    assert caught.value.exit_code == 4
    return str(caught.value)


def shard_of(folder: Path, tensor: str = EXPERT) -> Path:
    name: str = json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    return folder / name


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def set_header(file: Path, change: Callable[[str], str]) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + length].decode()).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def test_a_sound_folder_is_accepted(folder: Path) -> None:
    checkpoint = check(folder)
    assert checkpoint.stored.keys() == checkpoint.shapes.keys() == tiny_models.load_tensors(folder).keys()
    assert checkpoint.total_bytes == json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
    for name, tensor in tiny_models.load_tensors(folder).items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_a_single_file_needs_no_index(folder: Path) -> None:
    tiny_models.rewrite(folder, lambda _tensors: None, shards=1)
    assert check(folder).shards == (SINGLE,)


# 1 and 2: damaged files


@pytest.mark.parametrize("size", [0, 3, 8, 100, -1, -1000])
def test_a_truncated_or_empty_shard_is_refused(folder: Path, size: int) -> None:
    file = shard_of(folder)
    file.write_bytes(file.read_bytes()[:size])
    message = refusal(folder)
    assert str(file) in message
    assert "download or copy it again" in message


@pytest.mark.parametrize("length", [1 << 22, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_an_oversized_header_is_refused(folder: Path, length: int) -> None:
    file = shard_of(folder)
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    assert f"its header claims {length} bytes" in refusal(folder)


def test_a_header_beyond_the_limit_of_the_library_is_refused(folder: Path) -> None:
    file = shard_of(folder)
    with file.open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)  # sparse
    assert "its header claims 200000000 bytes" in refusal(folder)


def test_trailing_bytes_are_refused(folder: Path) -> None:
    file = shard_of(folder)
    with file.open("ab") as stream:
        stream.write(b"\0")
    message = refusal(folder)
    assert str(file) in message
    assert f"has {file.stat().st_size} bytes and its header describes {file.stat().st_size - 1}" in message


OVERLAP = json.dumps({name: {"dtype": "U8", "shape": [2], "data_offsets": [n, n + 2]} for n, name in enumerate("ab")})


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("[]", "not a JSON object"),
        ("{", "header is not valid"),
        ('{"a":', "header is not valid"),
        ("[" * 100_000, "header is not valid"),
        ('{"a": 3}', "lacks dtype"),
        ('{"a": {"dtype": "F32", "shape": [1]}}', "lacks dtype"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "lacks dtype"),
        ('{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype"),
        ('{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype"),
        ('{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}', "other than sizes"),
        ('{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "other than sizes"),
        ('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "other than sizes"),
        ('{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}', "other than sizes"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "claims 4 bytes"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "claims -4 bytes"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "does not follow"),
        (OVERLAP, "b does not follow"),
        ('{"a": {"dtype": "F32", "shape": [9999999999], "data_offsets": [0, 39999999996]}}', "header describes"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: str, why: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(InvalidInputError, match=why) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


# 6


def test_duplicate_keys_in_a_header_are_refused(folder: Path) -> None:
    file = shard_of(folder)
    set_header(file, lambda text: text[:-1].rstrip().rstrip("}") + "}," + text[text.index('"model') :])
    message = refusal(folder)
    assert str(file) in message
    assert "appears twice" in message
    assert "'model." in message


def test_duplicate_keys_inside_an_entry_are_refused(folder: Path) -> None:
    set_header(shard_of(folder), lambda text: text.replace('"dtype":"F32"', '"dtype":"F32","dtype":"F32"', 1))
    assert "'dtype' appears twice" in refusal(folder)


# 3, 4, 5: the index


def test_a_missing_shard_is_named(folder: Path) -> None:
    file = shard_of(folder)
    file.unlink()
    assert f"names {file.name}, which is missing" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "C:\\model.safetensors",
        "..\\outside.safetensors",
        "sub/../../outside.safetensors",
    ],
)
def test_a_shard_name_that_leads_out_is_refused(folder: Path, name: str) -> None:
    shutil.copy(shard_of(folder), folder.parent / "outside.safetensors")
    edit_index(folder, lambda weight_map: weight_map.update({EXPERT: name}))
    message = refusal(folder)
    assert repr(name) in message
    assert "leads out of the folder" in message


@pytest.mark.parametrize("name", ["x" * 300, "nul\0.safetensors", "\ud800.safetensors", "config.json"])
def test_a_shard_name_that_is_no_shard_is_refused(folder: Path, name: str) -> None:
    edit_index(folder, lambda weight_map: weight_map.update({EXPERT: name}))
    refusal(folder)


def test_a_link_that_leads_out_is_refused(folder: Path) -> None:
    file = shard_of(folder)
    outside = folder.parent / "outside.safetensors"
    file.rename(outside)
    file.symlink_to(outside)
    message = refusal(folder)
    assert str(file) in message
    assert str(outside.resolve()) in message


def test_a_single_file_that_leads_out_is_refused(folder: Path) -> None:
    tiny_models.rewrite(folder, lambda _tensors: None, shards=1)
    (folder / SINGLE).rename(folder.parent / "outside.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "outside.safetensors")
    assert "leads out of the folder" in refusal(folder)


def test_a_dangling_link_is_missing(folder: Path) -> None:
    file = shard_of(folder)
    file.unlink()
    file.symlink_to(folder / "nowhere")
    assert "which is missing" in refusal(folder)


def test_a_link_inside_the_folder_is_accepted(folder: Path) -> None:
    file = shard_of(folder)
    file.rename(folder / "renamed.safetensors")
    file.symlink_to("renamed.safetensors")
    check(folder)


def hub_cache(folder: Path) -> Path:
    """The layout of the hub's cache: snapshots/<revision>/* are links into blobs/; returns the snapshot."""
    root = folder.parent / "models--org--name"
    snapshot, blobs = root / "snapshots" / "abc123", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    return snapshot


def test_the_links_of_the_hub_cache_are_accepted(folder: Path) -> None:
    snapshot = hub_cache(folder)
    check(snapshot)
    link = folder.parent / "link-to-snapshot"
    link.symlink_to(snapshot)
    check(link)


def test_other_links_in_the_hub_cache_are_refused(folder: Path) -> None:
    snapshot = hub_cache(folder)
    file = shard_of(snapshot)
    file.resolve().rename(folder.parent / "outside")
    file.unlink()
    file.symlink_to(folder.parent / "outside")
    assert "leads out of the folder" in refusal(snapshot)


def test_a_tensor_that_the_index_lacks_is_named(folder: Path) -> None:
    edit_index(folder, lambda weight_map: weight_map.pop(EXPERT))
    message = refusal(folder)
    assert INDEX in message
    assert f"disagree about 1 tensors, first {EXPERT}" in message


def test_a_tensor_that_no_shard_has_is_named(folder: Path) -> None:
    other = shard_of(folder).name
    edit_index(folder, lambda weight_map: weight_map.update({"model.ghost.weight": other}))
    assert "model.ghost.weight" in refusal(folder)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(folder: Path) -> None:
    other = next(f.name for f in sorted(folder.glob("*.safetensors")) if f != shard_of(folder))
    edit_index(folder, lambda weight_map: weight_map.update({EXPERT: other}))
    assert EXPERT in refusal(folder)


def test_only_the_first_ten_disagreements_are_listed(folder: Path) -> None:
    edit_index(folder, lambda weight_map: [weight_map.pop(n) for n in list(weight_map) if ".experts." in n])
    message = refusal(folder)
    assert "disagree about 144 tensors" in message
    assert message.count(".experts.") == 10


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    double = "model-double.safetensors"
    shutil.copy(first, folder / double)
    one = next(iter(read_header(first)))
    edit_index(folder, lambda weight_map: weight_map.update({one: double}))
    message = refusal(folder)
    assert "lies in both" in message
    assert first.name in message or double in message
    assert second.name not in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\udcff"])
def test_an_unsound_index_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    assert INDEX in refusal(folder)


def test_an_index_without_tensors_is_refused(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')
    refusal(folder)


# 7 and 8: what the config wants


def test_a_missing_expert_tensor_is_named(folder: Path) -> None:
    tiny_models.rewrite(folder, lambda tensors: tensors.pop(EXPERT))
    assert f"{EXPERT} is missing" in refusal(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    tiny_models.rewrite(folder, lambda tensors: tensors.update({EXPERT: torch.zeros(64, 64)}))
    assert f"{EXPERT} has shape [64, 64] and the config wants [64, 128]" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2])
def test_a_weight_of_a_dtype_that_is_no_weight_is_named(folder: Path, dtype: torch.dtype) -> None:
    tiny_models.rewrite(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(dtype)}))
    message = refusal(folder)
    assert EXPERT in message
    assert shard_of(folder).name in message


def test_experts_half_fused_are_refused(tiny_copy: Factory) -> None:
    folder = tiny_copy("olmoe")
    block = "model.layers.1.mlp.experts"

    def fuse_down(tensors: dict[str, Tensor]) -> None:
        tensors[f"{block}.down_proj"] = torch.stack([tensors.pop(f"{block}.{e}.down_proj.weight") for e in range(8)])

    tiny_models.rewrite(folder, fuse_down)
    assert f"{block}.gate_up_proj is missing" in refusal(folder)


def test_a_tensor_under_both_of_its_names_is_refused(tiny_copy: Factory) -> None:
    folder = tiny_copy("mixtral")
    disk_name = "model.layers.1.block_sparse_moe.gate.weight"
    double = disk_name.replace("block_sparse_moe", "mlp")
    tiny_models.rewrite(folder, lambda tensors: tensors.update({double: tensors[disk_name].clone()}))
    assert "is there twice" in refusal(folder)


def test_a_missing_expert_of_mixtral_is_named_as_on_disk(tiny_copy: Factory) -> None:
    folder = tiny_copy("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tiny_models.rewrite(folder, lambda tensors: tensors.pop(name))
    assert f"{name} is missing" in refusal(folder)


def test_a_missing_tied_head_is_fine_and_a_missing_untied_one_is_not(folder: Path, tiny_copy: Factory) -> None:
    tied = tiny_copy("qwen2_moe")
    assert "lm_head.weight" not in check(tied).shapes
    tiny_models.edit_config(tied, tie_word_embeddings=False)
    assert "lm_head.weight is missing" in refusal(tied)


def test_fp8_without_its_scale_is_refused(tiny_copy: Factory) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    scale = f"{EXPERT}_scale_inv"
    assert scale in check(folder).stored
    tiny_models.rewrite(folder, lambda tensors: tensors.pop(scale))
    message = refusal(folder)
    assert scale in message
    assert shard_of(folder).name in message


def test_fp8_without_a_block_size_is_refused(tiny_copy: Factory) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    tiny_models.edit_config(folder, quantization_config=...)
    assert "block size in config.json is missing" in refusal(folder)


@pytest.mark.parametrize("scale", [torch.ones(1, 1), torch.ones(2), torch.ones(2, 2, dtype=torch.int32)])
def test_scales_that_do_not_fit_their_weight_are_refused(tiny_copy: Factory, scale: Tensor) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    tiny_models.rewrite(folder, lambda tensors: tensors.update({f"{EXPERT}_scale_inv": scale}))
    assert f"{EXPERT}_scale_inv is" in refusal(folder)


def test_a_scale_without_an_fp8_weight_is_refused(tiny_copy: Factory) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    tiny_models.rewrite(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].float()}))
    assert f"{EXPERT}_scale_inv belongs to no fp8 weight" in refusal(folder)


def test_fp8_of_another_kind_than_blocks_is_unsupported(tiny_copy: Factory) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    for quantization in ({"quant_method": "fp8"}, "fp8", {"weight_block_size": [128, 128]}):
        tiny_models.edit_config(folder, quantization_config=quantization)
        with pytest.raises(UnsupportedError, match="start from its original") as caught:
            open_checkpoint(folder)
        assert caught.value.exit_code == 5


# 9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nonfinite_weight_is_refused_naming_layer_and_expert(folder: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT].to(dtype)
        tensors[EXPERT][3, 4] = value

    tiny_models.rewrite(folder, spoil)
    checkpoint = check(folder)
    read_expert(checkpoint, 2, 4)
    with pytest.raises(InvalidInputError, match=r"layers\.2\.mlp\.experts\.5\.up_proj.* holds NaN or Inf") as caught:
        read_expert(checkpoint, 2, 5)
    assert shard_of(folder).name in str(caught.value)
    allowed = open_checkpoint(folder, allow_nonfinite=True)
    assert not torch.isfinite(read_expert(allowed, 2, 5).up).all()


def test_a_nan_in_fp8_or_in_its_scale_is_refused(tiny_copy: Factory) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    down = EXPERT.replace("up_proj", "down_proj")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[EXPERT].view(torch.uint8)[0, 0] = 0x7F
        tensors[f"{down}_scale_inv"][0, 0] = float("inf")

    tiny_models.rewrite(folder, spoil)
    checkpoint = check(folder)
    for name in (EXPERT, down):
        with pytest.raises(InvalidInputError, match=name):
            checkpoint.read(name)


def test_a_nan_in_a_fused_expert_is_refused_naming_the_expert(tiny_copy: Factory) -> None:
    folder = tiny_copy("qwen3_moe", fused=True)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    tiny_models.rewrite(folder, lambda tensors: tensors[name][5, 0].fill_(float("nan")))
    checkpoint = check(folder)
    read_expert(checkpoint, 2, 4)
    with pytest.raises(InvalidInputError, match=rf"{name} \(expert 5\)"):
        read_expert(checkpoint, 2, 5)


# 23, unsupported families, folders that are none


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickle_weights_are_refused_with_the_way_to_convert(folder: Path, name: str) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = refusal(folder)
    assert name in message
    assert "save_pretrained" in message


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path, folder: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refusal(empty)
    shutil.copy(folder / "config.json", empty)
    assert "neither model.safetensors nor" in refusal(empty)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "NaN", "{'a': 1}", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder / "config.json") in refusal(folder)


def test_unreadable_files_are_refused(folder: Path) -> None:
    file = shard_of(folder)
    file.unlink()
    file.mkdir()
    assert str(file) in refusal(folder)
    with pytest.raises(InvalidInputError, match=r"gone\.json"):
        read_json(folder / "gone.json")


@pytest.mark.parametrize(("name", "said"), [("llama", "has no routed experts"), ("of_tomorrow", "does not know")])
def test_a_type_without_experts_or_that_nobody_knows_is_refused(folder: Path, name: str, said: str) -> None:
    tiny_models.edit_config(folder, model_type=name)
    with pytest.raises(UnsupportedError, match=f"{name}.*{said}|{said}.*{name}") as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code == 5


# 28: absurd numbers


@pytest.mark.parametrize("value", [4, 1000, (1 << 31) - 1])
def test_more_layers_than_there_are_tensors_are_refused_at_once(folder: Path, value: int) -> None:
    tiny_models.edit_config(folder, num_hidden_layers=value)
    assert f"states {value} layers and the shards hold 3" in refusal(folder)


@pytest.mark.parametrize("key", ["num_local_experts", "hidden_size"])
@pytest.mark.parametrize("value", [8, 17, (1 << 31) - 1])
def test_sizes_that_the_routers_do_not_have_are_refused_at_once(folder: Path, key: str, value: int) -> None:
    tiny_models.edit_config(folder, **{key: value})
    message = refusal(folder)
    assert "model.layers.0.mlp.gate.weight has shape [16, 128]" in message
    assert str(value) in message


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_experts_per_tok", "moe_intermediate_size"])
@pytest.mark.parametrize("value", [0, -1, 1 << 70, 2.5, "many", None, True, ...])
def test_numbers_that_make_no_sense_are_refused_by_name(folder: Path, key: str, value: object) -> None:
    tiny_models.edit_config(folder, **{key: value})
    assert f"config.json: {key} is" in refusal(folder)


@pytest.mark.parametrize("key", ["moe_intermediate_size", "vocab_size", "num_attention_heads", "head_dim"])
def test_other_absurd_sizes_are_refused(folder: Path, key: str) -> None:
    tiny_models.edit_config(folder, **{key: (1 << 31) - 1})
    refusal(folder)


@pytest.mark.parametrize("changes", [{"num_experts_per_tok": 17}, {"n_group": 3}, {"n_group": 16}, {"topk_group": 0}])
def test_a_router_that_cannot_work_is_refused(tiny_copy: Factory, changes: dict[str, int]) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.edit_config(folder, **changes)
    assert "config.json" in refusal(folder)


def test_numbers_that_do_not_matter_are_not_looked_at(folder: Path) -> None:
    tiny_models.edit_config(folder, num_labels=1 << 70)  # transformers would fill the memory with their names
    check(folder)


def test_fewer_layers_than_there_are_tensors_are_refused(tiny_copy: Factory) -> None:
    for key in ("qwen3_moe", "deepseek_v3"):
        folder = tiny_copy(key)
        tiny_models.edit_config(folder, num_hidden_layers=2)
        message = refusal(folder)
        assert "model.layers.2." in message
        assert "belongs to no part of the model" in message


def test_a_dense_model_is_refused(tiny_copy: Factory) -> None:
    folder = tiny_copy("qwen2_moe")
    tiny_models.rewrite(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".mlp.gate." in n])
    assert "has no router" in refusal(folder)


@pytest.mark.parametrize("key", ["n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"])
def test_a_routing_number_that_would_be_guessed_must_be_stated(tiny_copy: Factory, key: str) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.edit_config(folder, **{"norm_topk_prob": False, "routed_scaling_factor": 1.0, key: ...})
    assert f"config.json does not state {key}" in refusal(folder)


def test_a_shard_that_shrinks_after_it_was_opened_is_refused(folder: Path) -> None:
    checkpoint = check(folder)
    entry = checkpoint.stored[EXPERT]
    os.truncate(entry.file, entry.end - 1)
    with pytest.raises(InvalidInputError, match=f"ends inside {EXPERT}"):
        read_tensor(entry)
    entry.file.unlink()
    with pytest.raises(InvalidInputError, match=entry.file.name):
        read_tensor(entry)
    with pytest.raises(InvalidInputError, match=r"has no tensor model\.ghost"):
        checkpoint.read("model.ghost")


# 27: fuzz

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def only_our_errors(folder: Path) -> None:
    with contextlib.suppress(MoepressError):
        check(folder)


@FUZZ
@given(at=st.integers(0, 12_000), junk=st.binary(min_size=1, max_size=8), whole=st.booleans())
def test_fuzzed_shards_give_only_our_errors(folder: Path, at: int, junk: bytes, whole: bool) -> None:
    file = shard_of(folder)
    before = file.read_bytes()
    file.write_bytes(junk if whole else before[:at] + junk + before[at + len(junk) :])
    only_our_errors(folder)
    file.write_bytes(before)


@FUZZ
@given(entry=JSON | st.fixed_dictionaries({"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON}))
def test_fuzzed_headers_give_only_our_errors(tmp_path: Path, entry: object) -> None:
    raw = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with contextlib.suppress(InvalidInputError):
        read_header(tmp_path / "x.safetensors")


@FUZZ
@given(data=st.data())
def test_fuzzed_configs_give_only_our_errors(olmoe: Path, data: st.DataObject) -> None:
    before = (olmoe / "config.json").read_text()
    keys = sorted(load_config(olmoe))
    changes = data.draw(st.dictionaries(st.sampled_from([*keys, "quantization_config"]), JSON, min_size=1, max_size=3))
    (olmoe / "config.json").write_text(json.dumps(json.loads(before) | changes))
    only_our_errors(olmoe)
    (olmoe / "config.json").write_text(before)


@FUZZ
@given(name=st.text(max_size=8), value=JSON, key=st.sampled_from(["weight_map", "metadata", "other"]))
def test_fuzzed_indexes_give_only_our_errors(folder: Path, name: str, value: object, key: str) -> None:
    before = (folder / INDEX).read_text()
    index = json.loads(before)
    if key == "other":
        index["weight_map"][name] = value
    else:
        index[key] = value
    (folder / INDEX).write_text(json.dumps(index))
    only_our_errors(folder)
    (folder / INDEX).write_text(before)
