"""prune: bytes are copied, renamed and sliced, never computed; the result loads and equals the masked original."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import (
    assert_near,
    content,
    keep_of,
    logits_of,
    masked,
    plan_of,
    pruned_folder,
    streamed_logits,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepress.compress.pruning.scoring import Groups
from moepress.errors import InvalidInputError, UsageError
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import is_fused, router_disk_names
from moepress.models.storage.mtp import Mtp
from moepress.models.storage.safetensors_file import read_bytes
from moepress.stages.places import Output
from moepress.stages.prune import prune_stage

every_key = pytest.mark.parametrize("key", tiny_models.KEYS)
every_form = pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def raw(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor as it lies on disk: dtype, shape, bytes."""
    return {n: (e.dtype, e.shape, bytes(read_bytes(e))) for n, e in checkpoint.stored.items()}


def fp8_model(tiny_copy: Callable[..., Path], **options: Any) -> Path:
    folder = tiny_copy("deepseek_v3", dtype=torch.bfloat16, **options)
    tiny_models.to_fp8(folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@every_key
@pytest.mark.parametrize(("dtype", "fused"), [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True)], ids=str)
def test_keeping_every_expert_keeps_every_byte(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, fused: bool, dtype: torch.dtype
) -> None:
    folder = tiny_model(key, dtype=dtype, fused=fused)
    source = open_checkpoint(folder)
    result = pruned_folder(folder, keep_of(source, source.shape.experts), tmp_path / "out")
    assert raw(open_checkpoint(tmp_path / "out")) == raw(source)
    assert config_of(tmp_path / "out") == source.config
    assert result["bytes_before"] == result["bytes_after"] == source.total_bytes
    assert result["tensors"] == len(source.stored)


def test_keeping_every_expert_of_an_fp8_model_keeps_every_byte(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = fp8_model(tiny_copy)
    source = open_checkpoint(folder)
    assert {e.dtype for e in source.stored.values()} == {"F8_E4M3", "F32", "BF16"}
    pruned_folder(folder, keep_of(source, 16), tmp_path / "out")
    assert raw(open_checkpoint(tmp_path / "out")) == raw(source)
    assert config_of(tmp_path / "out") == source.config


def rows_of(found: tuple[str, tuple[int, ...], bytes], kept: list[int]) -> tuple[str, tuple[int, ...], bytes]:
    dtype, shape, data = found
    size = len(data) // shape[0]
    return dtype, (len(kept), *shape[1:]), b"".join(data[e * size : (e + 1) * size] for e in kept)


def expected_tensors(source: Checkpoint, keep: dict[int, list[int]]) -> dict[str, Any]:
    """What a pruned folder must hold, by a plain loop over the original's bytes."""
    before, after = raw(source), dict[str, Any]()
    routers = {name: layer for layer in keep for name in router_disk_names(source, layer)}
    for name, found in before.items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        if name in routers:
            after[name] = rows_of(found, keep[routers[name]])
        elif layer in keep and "experts" in parts:
            number = parts.index("experts") + 1
            if not parts[number].isdigit():
                after[name] = rows_of(found, keep[layer])
            elif int(parts[number]) in keep[layer]:
                parts[number] = str(keep[layer].index(int(parts[number])))
                after[".".join(parts)] = found
        else:
            after[name] = found
    return after


@every_key
@every_form
def test_kept_experts_keep_their_bytes_under_new_numbers(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, fused: bool
) -> None:
    folder = tiny_model(key, dtype=torch.bfloat16, fused=fused)
    source = open_checkpoint(folder)
    count = source.shape.experts // 2
    keep = keep_of(source, count)
    assert is_fused(source, max(keep)) == fused
    assert any(kept != list(range(count)) for kept in keep.values())
    result = pruned_folder(folder, keep, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert raw(found) == expected_tensors(source, keep)
    assert result["bytes_after"] == found.total_bytes < source.total_bytes
    assert found.shape.experts == count
    changed = {k: v for k, v in found.config.items() if source.config.get(k) != v}
    assert changed == {k: count for k in source.family.experts_keys if k in source.config}
    assert changed
    assert found.config.keys() == source.config.keys()


def test_an_fp8_model_is_pruned_with_its_scales(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = fp8_model(tiny_copy)
    source = open_checkpoint(folder)
    keep = keep_of(source, 8)
    pruned_folder(folder, keep, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert raw(found) == expected_tensors(source, keep)
    scales = [n for n in found.stored if n.endswith("weight_scale_inv") and ".mlp.experts." in n]
    assert len(scales) == 2 * 8 * 3
    name = "model.layers.2.mlp.experts.{}.down_proj.weight"
    assert torch.equal(found.read(name.format(1)), source.read(name.format(keep[2][1])))


@every_key
@every_form
def test_transformers_loads_the_result_and_it_equals_the_masked_original(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, fused: bool
) -> None:
    folder = tiny_model(key, fused=fused)
    source = open_checkpoint(folder)
    keep = keep_of(source, source.shape.experts // 2, seed=5)
    pruned_folder(folder, keep, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original, windows = tiny_models.reference(folder), tiny_models.windows(source.shape.vocabulary)
    before = logits_of(original, windows)
    with masked(original, keep):
        expected = logits_of(original, windows)
    assert_near(logits_of(model.eval(), windows), expected, 1e-5)
    assert (expected - before).abs().max() > 0.01 * before.abs().max()
    assert_near(streamed_logits(open_checkpoint(tmp_path / "out"), windows, tmp_path), expected, 1e-4)


def test_degrouping_drops_the_groups_and_takes_any_choice(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("deepseek_v3")
    source = open_checkpoint(folder)
    keep = {1: [0, 1, 2, 3, 4], 2: [3, 7, 8, 9, 15]}
    with pytest.raises(UsageError, match="Cannot keep 5 of 16"):
        prune_stage(str(folder), Output(folder=tmp_path / "no"), plan_of(source, keep))
    prune_stage(str(folder), Output(folder=tmp_path / "out"), plan_of(source, keep, groups=Groups.DEGROUP))
    found = open_checkpoint(tmp_path / "out")
    changed = {k: v for k, v in found.config.items() if source.config[k] != v}
    assert changed == {"n_routed_experts": 5, "n_group": 1, "topk_group": 1}
    assert raw(found) == expected_tensors(source, keep)
    windows = tiny_models.windows(256)
    ours = logits_of(tiny_models.reference(tmp_path / "out"), windows)
    assert_near(streamed_logits(found, windows, tmp_path), ours, 1e-4)
    plain = tiny_models.reference(folder)  # the same without groups: every group may be used
    for layer in (1, 2):
        plain.model.layers[layer].mlp.gate.topk_group = plain.config.n_group
        plain.model.layers[layer].mlp.topk_group = plain.config.n_group
    with masked(plain, keep):
        assert_near(ours, logits_of(plain, windows), 1e-5)


COMPANIONS = {
    "tokenizer.json": b'{"model": "\xc3\xa4"}\r\n',
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{ }",
    "chat_template.jinja": b"{% if x %}\r\n{% endif %}",
    "tokenizer.model": bytes(range(256)),
    "merges.txt": b"a b\n",
    "generation_config.json": b'{"do_sample":true}',
    "LICENSE": b"licence\xff",
    "NOTICE": b"notice",
}
LEFT = {"pytorch_model.bin": b"pickle", "README.md": b"# old", "x.onnx": b"1"}


def test_tokenizer_template_and_licence_are_copied_as_bytes(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("mixtral")
    for name, data in (COMPANIONS | LEFT).items():
        (folder / name).write_bytes(data)
    (folder / "figures").mkdir()
    result = pruned_folder(folder, keep_of(open_checkpoint(folder), 4), tmp_path / "out")
    found = content(tmp_path / "out")
    assert {name: found.get(name) for name in COMPANIONS} == COMPANIONS
    assert not LEFT.keys() & found.keys()
    assert set(result["copied"]) == set(COMPANIONS)
    weights = {name for name in found if name.endswith(".safetensors")}
    assert set(found) == {
        *COMPANIONS,
        *weights,
        "config.json",
        "model.safetensors.index.json",
        "moepress.json",
    }


def test_a_prediction_layer_is_dropped_and_that_is_said(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.add_mtp(folder)
    source = open_checkpoint(folder)
    extra = [name for name in source.stored if name.startswith("model.layers.3.")]
    result = pruned_folder(folder, keep_of(source, 8), tmp_path / "out", mtp=Mtp.DROP)
    found = open_checkpoint(tmp_path / "out")
    assert len(extra) > 50
    assert not [name for name in found.stored if name.startswith("model.layers.3.")]
    assert found.config["num_nextn_predict_layers"] == 0
    assert result["notes"] == [f"The multi-token-prediction layer was dropped ({len(extra)} tensors)."]
    report = json.loads((tmp_path / "out" / "moepress.json").read_text())
    assert report["notes"] == result["notes"]
    logits_of(tiny_models.reference(tmp_path / "out"), tiny_models.windows(256, count=1))


def test_a_model_in_one_file_stays_in_one_file(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("olmoe", shards=1)
    source = open_checkpoint(folder)
    keep = keep_of(source, 4)
    pruned_folder(folder, keep, tmp_path / "out")
    names = content(tmp_path / "out").keys()
    assert "model.safetensors" in names
    assert "model.safetensors.index.json" not in names
    assert raw(open_checkpoint(tmp_path / "out")) == expected_tensors(source, keep)


def test_a_shard_of_pruned_experts_alone_disappears(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("mixtral")
    marker = "model.layers.1.block_sparse_moe.experts.7."
    moved = {n: t for n, t in tiny_models.load_tensors(folder).items() if n.startswith(marker)}
    tiny_models.rewrite(folder, lambda tensors: [tensors.__delitem__(name) for name in moved].clear())
    from safetensors.torch import save_file

    save_file(moved, folder / "model-00009-of-00009.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / tiny_models.INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(moved, "model-00009-of-00009.safetensors")
    (folder / tiny_models.INDEX).write_text(json.dumps(index))
    keep = {key: [0, 1, 2, 3] for key in range(3)}
    pruned_folder(folder, keep, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert raw(open_checkpoint(tmp_path / "out")) == expected_tensors(open_checkpoint(folder), keep)
    logits_of(tiny_models.reference(tmp_path / "out"), tiny_models.windows(256, count=1))


def spoil(folder: Path, name: str, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    tiny_models.rewrite(folder, change)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    tiny_copy: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    folder = tiny_copy("mixtral", dtype=dtype)
    name = "model.layers.1.block_sparse_moe.experts.6.w2.weight"
    spoil(folder, name, value)
    source = open_checkpoint(folder)
    bad = plan_of(source, {key: [0, 2, 4, 6] for key in range(3)})
    with pytest.raises(InvalidInputError, match=name):
        prune_stage(str(folder), Output(folder=tmp_path / "out"), bad)
    assert not (tmp_path / "out").exists()
    prune_stage(str(folder), Output(folder=tmp_path / "out", force=True), bad, allow_nonfinite=True)
    assert raw(open_checkpoint(tmp_path / "out")) == expected_tensors(source, bad.keep)
    good = plan_of(source, {key: [0, 2, 4, 5] for key in range(3)})  # without the broken expert
    prune_stage(str(folder), Output(folder=tmp_path / "good"), good)
    assert (tmp_path / "good" / "config.json").exists()


def test_nan_in_fp8_weights_and_scales_is_refused(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = fp8_model(tiny_copy)
    source = open_checkpoint(folder)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    plan = plan_of(source, {key: [0, 1, 4, 5, 8, 9, 12, 13] for key in (1, 2)})
    for broken in (name, f"{name}_scale_inv"):
        entry = open_checkpoint(folder).stored[broken]
        data = bytearray(entry.file.read_bytes())
        before = bytes(data[entry.begin : entry.begin + 4])
        data[entry.begin : entry.begin + 4] = b"\xff\xff\xff\xff"  # NaN in E4M3 and in fp32
        entry.file.write_bytes(data)
        with pytest.raises(InvalidInputError, match=broken):
            pruned_folder(folder, plan.keep, tmp_path / broken)
        data[entry.begin : entry.begin + 4] = before
        entry.file.write_bytes(data)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.6.w2.weight"
    tiny_models.rewrite(folder, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(InvalidInputError, match=f"{name} is missing"):
        pruned_folder(folder, {key: [0, 1] for key in range(3)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_input_or_in_use_is_refused(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("mixtral")
    before = content(folder)
    source = open_checkpoint(folder)
    plan = plan_of(source, {layer: [0, 1, 2, 5] for layer in source.outline.moe_layers})
    for inside in (folder, folder / "out", folder / "deep" / "out"):
        for force in (False, True):
            with pytest.raises(UsageError, match="lies inside the input"):
                prune_stage(str(folder), Output(folder=inside, force=force), plan)
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    for force, message in ((False, "is not empty"), (True, "does not look like a model")):
        with pytest.raises(UsageError, match=message):
            prune_stage(str(folder), Output(folder=used, force=force), plan)
    assert content(used) == {"thesis.txt": b"mine"}
    assert content(folder) == before


def test_force_replaces_a_model_that_moepress_wrote(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("mixtral")
    source = open_checkpoint(folder)
    out = tmp_path / "out"
    for kept in ([0, 1, 2, 5], [3, 4]):
        keep = dict.fromkeys(range(3), kept)
        prune_stage(str(folder), Output(folder=out, force=True), plan_of(source, keep))
        assert raw(open_checkpoint(out)) == expected_tensors(source, keep)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_dry_run_writes_nothing(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("mixtral", dtype=torch.bfloat16)
    source = open_checkpoint(folder)
    keep = {key: [0, 1, 2, 5] for key in range(3)}
    projected = prune_stage(str(folder), Output(folder=tmp_path / "out"), plan_of(source, keep), dry_run=True)
    assert list(tmp_path.iterdir()) == []
    result = pruned_folder(folder, keep, tmp_path / "out")
    assert projected["output_bytes"] == pytest.approx(result["bytes_after"], rel=0.01)


def test_the_plan_is_kept_beside_the_model(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("mixtral")
    keep = {key: [0, 1, 2, 5] for key in range(3)}
    pruned_folder(folder, keep, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "moepress.json").read_text())
    assert report["stage"] == "prune"
    assert report["plan"]["keep"] == {str(layer): kept for layer, kept in keep.items()}
