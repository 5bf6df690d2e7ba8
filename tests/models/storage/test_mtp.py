"""Multi-token-prediction layers: kept, with the model's expert count, by their own statistics or by their router."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from r1_models import DIVISIBLE, SMALL, small_r1
from safetensors.torch import save_file
from stage_runs import (
    assert_near,
    command,
    content,
    keep_of,
    logits_of,
    masked,
    plan_of,
    streamed_logits,
)

from moepress.compress.pruning.plan import plan_text
from moepress.compress.pruning.scoring import Groups
from moepress.errors import InvalidInputError, UnsupportedError, UsageError
from moepress.models.forward.tensor_check import check_mtp, check_tensors
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import mtp_layers
from moepress.models.storage.mtp import Mtp, mtp_keep_sets
from moepress.models.storage.safetensors_file import read_bytes
from moepress.runs.output import partial_folder
from moepress.stages.places import Output
from moepress.stages.prune import prune_stage

BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.fixture
def predicting(tiny_copy: Callable[..., Path]) -> Path:
    """A tiny DeepSeek-V3 of 3 layers with an MTP layer whose router has a bias of its own."""
    folder = tiny_copy("deepseek_v3")
    tiny_models.add_mtp(folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[BIAS.format(3)] = torch.randn(16, generator=torch.Generator().manual_seed(9))

    tiny_models.rewrite(folder, change)
    return folder


def raw(source: Checkpoint, name: str) -> bytes:
    return bytes(read_bytes(source.stored[name]))


def kept(folder: Path, out: Path, count: int, **options: Any) -> tuple[Checkpoint, dict[str, Any]]:
    source = open_checkpoint(folder)
    plan = plan_of(source, keep_of(source, count), **options)
    result = prune_stage(str(folder), Output(folder=out), plan, mtp=Mtp.KEEP)
    return open_checkpoint(out), result


def test_only_a_layer_that_joins_state_and_embedding_counts(predicting: Path, tiny_model: Callable[..., Path]) -> None:
    assert mtp_layers(open_checkpoint(predicting)) == (3,)
    assert mtp_layers(open_checkpoint(tiny_model("deepseek_v3"))) == ()
    assert mtp_layers(open_checkpoint(tiny_model("mixtral"))) == ()


@pytest.mark.parametrize(("count", "degroup"), [(8, False), (12, False), (16, False), (5, True), (8, True)])
def test_the_experts_with_the_lowest_bias_stay(predicting: Path, count: int, degroup: bool) -> None:
    source = open_checkpoint(predicting)
    bias = source.read(BIAS.format(3))
    found = mtp_keep_sets(source, count, {}, degroup=degroup)
    assert found.keys() == {3}
    groups = bias.reshape(1 if degroup else 4, -1)
    for number, group in enumerate(groups):
        size, each = len(group), count // len(groups)
        mine = [e - number * size for e in found[3] if e // size == number]
        assert len(mine) == each
        assert sorted(mine) == sorted(group.argsort()[:each].tolist())
    assert found[3] == sorted(found[3])


def test_equal_biases_keep_the_first_experts(predicting: Path) -> None:
    tiny_models.rewrite(predicting, lambda tensors: tensors[BIAS.format(3)].zero_())
    assert mtp_keep_sets(open_checkpoint(predicting), 8, {}) == {3: [0, 1, 4, 5, 8, 9, 12, 13]}


def test_a_kept_layer_has_the_models_expert_count_and_its_own_choice(predicting: Path, tmp_path: Path) -> None:
    source = open_checkpoint(predicting)
    found, result = kept(predicting, tmp_path / "out", 8)
    chosen = mtp_keep_sets(source, 8, {})[3]
    assert result["mtp_keep"] == {"3": chosen}
    assert chosen != keep_of(source, 8)[2]
    assert found.config["num_nextn_predict_layers"] == 1
    assert found.config["n_routed_experts"] == 8
    check_tensors(found.family, found.config, found.outline.shape, found.shapes, folder=found.folder)
    check_mtp(found, 3, folder=found.folder)
    for new, old in enumerate(chosen):
        for target, origin in zip(found.family.expert_names(3, new), found.family.expert_names(3, old), strict=True):
            assert raw(found, target) == raw(source, origin)
    assert found.family.expert_names(3, 8)[0] not in found.stored
    assert torch.equal(found.read(BIAS.format(3)), source.read(BIAS.format(3))[chosen])
    assert found.read(BIAS.format(3)).dtype == torch.float32
    gate = "model.layers.3.mlp.gate.weight"
    assert torch.equal(found.read(gate), source.read(gate)[chosen])
    for name in ("eh_proj", "enorm", "hnorm", "self_attn.o_proj"):
        assert raw(found, f"model.layers.3.{name}.weight") == raw(source, f"model.layers.3.{name}.weight")
    (note,) = result["notes"]
    assert note == (
        "The multi-token-prediction layer was kept with 8 of 16 experts, those with the lowest correction bias (the "
        "plan's profile did not run this layer); drafts may be accepted less often, and no output changes."
    )
    assert json.loads((tmp_path / "out" / "moepress.json").read_text())["mtp_keep"] == {"3": chosen}


def test_the_layer_changes_nothing_in_the_model_itself(predicting: Path, tmp_path: Path) -> None:
    source, windows = open_checkpoint(predicting), tiny_models.windows(256)
    kept(predicting, tmp_path / "out", 8)
    original = tiny_models.reference(predicting)
    with masked(original, keep_of(source, 8)):
        expected = logits_of(original, windows)
    assert_near(logits_of(tiny_models.reference(tmp_path / "out"), windows), expected, 1e-5)


def test_keeping_every_expert_and_the_layer_keeps_every_byte(predicting: Path, tmp_path: Path) -> None:
    source = open_checkpoint(predicting)
    found, result = kept(predicting, tmp_path / "out", 16)
    assert {n: raw(found, n) for n in found.stored} == {n: raw(source, n) for n in source.stored}
    assert found.config == source.config
    assert result["notes"] == ["The multi-token-prediction layer was kept."]


def test_degrouping_takes_any_experts_of_the_layer(predicting: Path, tmp_path: Path) -> None:
    source = open_checkpoint(predicting)
    plan = plan_of(source, {1: [0, 1, 2, 3, 4], 2: [3, 7, 8, 9, 15]}, groups=Groups.DEGROUP)
    prune_stage(str(predicting), Output(folder=tmp_path / "out"), plan, mtp=Mtp.KEEP)
    found = open_checkpoint(tmp_path / "out")
    check_mtp(found, 3, folder=found.folder)
    assert found.shapes["model.layers.3.mlp.gate.weight"] == (5, 64)


def test_a_dry_run_knows_the_size_with_and_without_the_layer(predicting: Path, tmp_path: Path) -> None:
    source = open_checkpoint(predicting)
    plan = plan_of(source, keep_of(source, 8))
    for mtp in Mtp:
        out = Output(folder=tmp_path / mtp)
        projected = prune_stage(str(predicting), out, plan, mtp=mtp, dry_run=True)
        assert not (tmp_path / mtp).exists()
        result = prune_stage(str(predicting), out, plan, mtp=mtp)
        assert projected["output_bytes"] == projected["disk_bytes"] == result["bytes_after"]
        assert result["bytes_after"] == open_checkpoint(tmp_path / mtp).total_bytes


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.pop("model.layers.3.mlp.experts.7.up_proj.weight"),
            "layers.3.mlp.experts.7.up_proj.weight is missing",
        ),
        (lambda t: t.pop("model.layers.3.hnorm.weight"), "layers.3.hnorm.weight is missing"),
        (
            lambda t: t.update({BIAS.format(3): torch.zeros(8)}),
            r"bias has shape \[8\] and the other layers have \[16\]",
        ),
        (lambda t: t.update({"model.layers.3.mlp.extra": torch.zeros(8)}), "extra belongs to no part"),
    ],
)
def test_a_layer_that_is_not_whole_is_refused_before_any_work(
    predicting: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    tiny_models.rewrite(predicting, spoil)
    source = open_checkpoint(predicting)
    plan = plan_of(source, keep_of(source, 8))
    with pytest.raises(InvalidInputError, match=message):
        prune_stage(str(predicting), Output(folder=tmp_path / "out"), plan, mtp=Mtp.KEEP)
    assert not partial_folder(tmp_path / "out").exists()
    prune_stage(str(predicting), Output(folder=tmp_path / "out"), plan, mtp=Mtp.DROP)  # it need not be whole then


def test_a_router_without_a_bias_is_refused(predicting: Path) -> None:
    tiny_models.rewrite(predicting, lambda tensors: tensors.pop(BIAS.format(3)))
    source = open_checkpoint(predicting)
    with pytest.raises(UnsupportedError, match="profile the model again and plan anew, or use --mtp drop"):
        mtp_keep_sets(source, 8, {})
    assert mtp_keep_sets(source, 8, {3: list(range(8))}) == {3: list(range(8))}
    assert mtp_keep_sets(source, 16, {}) == {3: list(range(16))}


def test_a_plan_of_a_layer_that_is_not_there_is_refused(predicting: Path) -> None:
    with pytest.raises(UsageError, match="layer 4, which this model has not"):
        mtp_keep_sets(open_checkpoint(predicting), 8, {4: list(range(8))})


def test_the_commands_keep_it_or_drop_it_as_told(predicting: Path, tmp_path: Path) -> None:
    source = open_checkpoint(predicting)
    (tmp_path / "plan.json").write_text(plan_text(plan_of(source, keep_of(source, 8))))
    prune = ("prune", predicting, "--plan", tmp_path / "plan.json", "-o")
    code, _, errors = command(*prune, tmp_path / "kept")
    assert (code, "was kept with 8 of 16" in errors) == (0, True)
    code, _, errors = command(*prune, tmp_path / "dropped", "--mtp", "drop")
    assert (code, "was dropped" in errors) == (0, True)
    assert "model.layers.3.eh_proj.weight" in open_checkpoint(tmp_path / "kept").stored
    assert mtp_layers(open_checkpoint(tmp_path / "dropped")) == ()


def test_keep_means_nothing_for_a_model_without_the_layer(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("mixtral")
    found, result = kept(folder, tmp_path / "keep", 4)
    assert result["notes"] == []
    source = open_checkpoint(folder)
    prune_stage(str(folder), Output(folder=tmp_path / "drop"), plan_of(source, keep_of(source, 4)), mtp=Mtp.DROP)
    one, two = content(tmp_path / "keep"), content(tmp_path / "drop")
    assert one == two
    assert found.shape.experts == 4


def dense(folder: Path, out: Path) -> Path:
    """A folder's weights as we read them, fp32, without quantization_config."""
    source = open_checkpoint(folder)
    out.mkdir()
    config = {k: v for k, v in source.config.items() if k not in {"quantization_config", "auto_map"}}
    (out / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    names = [n for n in source.shapes if not n.startswith("model.layers.3.")]  # transformers has no MTP layer
    save_file({n: source.read(n).float().contiguous() for n in names}, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("count", [16, 24])
@pytest.mark.parametrize("widths", [SMALL, DIVISIBLE], ids=["cut-off blocks", "whole blocks"])
def test_a_pruned_fp8_r1_gives_the_logits_of_the_masked_original(
    tmp_path: Path, widths: dict[str, Any], count: int
) -> None:
    folder = small_r1(tmp_path / "r1", mtp=True, **widths)
    source, windows = open_checkpoint(folder), tiny_models.windows(256)
    keep = keep_of(source, count)
    found, _ = kept(folder, tmp_path / "out", count)
    check_mtp(found, 3, folder=found.folder)
    assert found.config == {**source.config, "n_routed_experts": count}
    original = tiny_models.reference(dense(folder, tmp_path / "dense"))
    before = logits_of(original, windows)
    with masked(original, keep):
        expected = logits_of(original, windows)
    assert (expected - before).abs().max() > 0.01 * before.abs().max()
    assert_near(logits_of(tiny_models.reference(dense(tmp_path / "out", tmp_path / "less")), windows), expected, 1e-5)
    assert_near(streamed_logits(found, windows, tmp_path), expected, 1e-4)


def test_transformers_own_fp8_loader_takes_the_pruned_r1(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder, windows = small_r1(tmp_path / "r1", **DIVISIBLE), tiny_models.windows(256)
    source = open_checkpoint(folder)
    prune_stage(str(folder), Output(folder=tmp_path / "out"), plan_of(source, keep_of(source, 16)))
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        quantization_config=FineGrainedFP8Config(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = tiny_models.reference(dense(folder, tmp_path / "dense"))
    with masked(original, keep_of(source, 16)):
        expected = logits_of(original, windows)
    assert_near(logits_of(torch.nn.Module.float(model).eval(), windows), expected, 1e-5)
