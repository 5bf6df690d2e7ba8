"""Multi-token-prediction layers from profile to artifact: measured, kept, pruned and quantized like the others."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mtp_models
import pytest
import tiny_models
import torch
from stage_runs import (
    G32,
    add_tokenizer,
    command,
    content,
    corpus_of,
    profile_of,
    quantized_folder,
    streamed_logits,
)

from moepress.calibration import collect
from moepress.calibration.profile import Profile, load_profile, merge_profiles, save_profile
from moepress.compress.pruning.plan import Plan, load_plan, make_plan, plan_text
from moepress.compress.pruning.scoring import Criterion
from moepress.converters.safetensors.artifact import open_artifact
from moepress.models.forward.tensor_check import check_mtp, check_tensors
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import mtp_layers, prune_source, read_expert
from moepress.models.storage.mtp import Mtp
from moepress.models.storage.safetensors_file import read_bytes
from moepress.stages.places import Output
from moepress.stages.prune import prune_stage

WINDOWS = tiny_models.windows(256, count=6)
TEXT = "the river runs from 1847 to the sea, und größer als x = y; why? " * 40


def profiled(folder: Path, work: Path, *, resume: bool = False) -> Profile:
    """A profile by WINDOWS; without leave-one-out losses, which not every family's router is known well enough for."""
    return profile_of(folder, corpus_of(WINDOWS), work, leave_one_out=False, resume=resume)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model of that kind with an MTP layer, made once."""

    @functools.cache
    def make(kind: str, fused: bool = False) -> Path:
        return mtp_models.make(kind, tmp_path_factory.mktemp("mtp") / kind, fused=fused)

    return make


@pytest.fixture(scope="module")
def planned(made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Plan]:
    """The plan that keeps half of the experts of `made`, by a profile of WINDOWS."""

    @functools.cache
    def plan(kind: str, fused: bool = False) -> Plan:
        profile = profiled(made(kind, fused), tmp_path_factory.mktemp("profile") / "p")
        return make_plan(profile, count=profile.shape.experts // 2, criterion=Criterion.REAP_SUM)

    return plan


@pytest.mark.parametrize("kind", mtp_models.KINDS)
def test_the_profile_measures_the_layer_by_its_own_forward(
    kind: str, made: Callable[..., Path], planned: Callable[..., Plan], tmp_path: Path
) -> None:
    folder = made(kind)
    profile = profiled(folder, tmp_path / "p")
    (layer,) = profile.mtp
    assert layer == profile.shape.layers
    assert layer not in profile.statistics
    _, chosen, weights, experts = mtp_models.predicted(folder, WINDOWS)
    expected = mtp_models.weighted_norms(chosen, weights, experts)
    found = torch.from_numpy(profile.mtp[layer]["weighted_norm"].sum(axis=(0, 1)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    groups, count = profile.shape.groups, profile.shape.experts // 2
    size = profile.shape.experts // groups
    best = [
        g * size + e for g in range(groups) for e in expected[g * size :][:size].argsort()[-count // groups :].tolist()
    ]
    assert planned(kind).mtp_keep == {layer: sorted(best)}


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("kind", mtp_models.KINDS)
def test_pruning_keeps_the_layer_with_the_experts_that_the_plan_names(
    kind: str, fused: bool, made: Callable[..., Path], planned: Callable[..., Plan], tmp_path: Path
) -> None:
    folder, plan = made(kind, fused), planned(kind, fused)
    result = prune_stage(str(folder), Output(folder=tmp_path / "out"), plan)
    source, found = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    (layer,) = mtp_layers(found)
    assert result["mtp_keep"] == {str(layer): plan.mtp_keep[layer]}
    check_tensors(found.family, found.config, found.outline.shape, found.shapes, folder=found.folder)
    check_mtp(found, layer, folder=found.folder)
    for new, old in enumerate(plan.mtp_keep[layer]):
        for ours, theirs in zip(
            read_expert(found, layer, new).matrices, read_expert(source, layer, old).matrices, strict=True
        ):
            assert torch.equal(ours, theirs)
    gate = source.family.router_names(layer)[0]
    assert torch.equal(found.read(gate), source.read(gate)[plan.mtp_keep[layer]])
    (note,) = (note for note in result["notes"] if "multi-token" in note)
    assert f"{plan.experts} of {plan.experts_before} experts, chosen by its own router's statistics" in note
    text, before = found.family.text(found.config), source.family.text(source.config)
    keys = [key for key in before if key in ("num_nextn_predict_layers", "mtp_num_hidden_layers")]
    assert {key: text[key] for key in keys} == {key: before[key] for key in keys}


@pytest.mark.parametrize("kind", mtp_models.KINDS)
def test_keeping_all_experts_changes_no_byte(kind: str, made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(kind)
    source = open_checkpoint(folder)
    profile = profiled(folder, tmp_path / "p")
    prune_stage(str(folder), Output(folder=tmp_path / "out"), make_plan(profile, count=profile.shape.experts))
    found = open_checkpoint(tmp_path / "out")
    assert found.config == source.config
    assert found.stored.keys() == source.stored.keys()
    assert all(bytes(read_bytes(found.stored[n])) == bytes(read_bytes(source.stored[n])) for n in source.stored)


@pytest.mark.parametrize("kind", mtp_models.KINDS)
def test_dropping_leaves_nothing_of_it(
    kind: str, made: Callable[..., Path], planned: Callable[..., Plan], tmp_path: Path
) -> None:
    result = prune_stage(str(made(kind)), Output(folder=tmp_path / "out"), planned(kind), mtp=Mtp.DROP)
    found = open_checkpoint(tmp_path / "out")
    assert mtp_layers(found) == ()
    assert not any(n.startswith("mtp.") or "eh_proj" in n or "enorm" in n for n in found.stored)
    text = found.family.text(found.config)
    assert not any(text.get(key) for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"))
    assert any("was dropped" in note for note in result["notes"])


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_5_moe"])
def test_a_profile_and_a_plan_are_read_as_they_were_written(
    kind: str, made: Callable[..., Path], planned: Callable[..., Plan], tmp_path: Path
) -> None:
    profile = profiled(made(kind), tmp_path / "p")
    (tmp_path / "profile").mkdir()
    save_profile(profile, tmp_path / "profile")
    if kind == "deepseek_v3":
        again = load_profile(tmp_path / "profile")
        assert again.mtp.keys() == profile.mtp.keys()
        for name, value in profile.mtp[3].items():
            assert (again.mtp[3][name] == value).all()
        twice = merge_profiles([profile, again])
        assert (twice.mtp[3]["count"] == 2 * profile.mtp[3]["count"]).all()
    (tmp_path / "plan.json").write_text(plan_text(planned(kind)))
    assert load_plan(tmp_path / "plan.json") == planned(kind)


def test_a_model_without_the_layer_has_profile_and_plan_as_ever(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    profile = profiled(tiny_model("deepseek_v3"), tmp_path / "p")
    (tmp_path / "profile").mkdir()
    save_profile(profile, tmp_path / "profile")
    assert "mtp_layers" not in json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert "mtp" not in plan_text(make_plan(profile, count=8))


def test_what_is_known_of_the_decoder_layers_is_as_without_it(
    tiny_copy: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.add_mtp(folder, seed=5)
    one = profiled(folder, tmp_path / "a")
    two = profiled(tiny_model("deepseek_v3"), tmp_path / "b")
    assert two.mtp == {}
    for layer, found in two.statistics.items():
        assert all((one.statistics[layer][name] == value).all() for name, value in found.items())
    assert make_plan(one, count=8).keep == make_plan(two, count=8).keep


class StopError(Exception):
    """Ends a run where a test wants it."""


@pytest.mark.parametrize("at", ["enter", "observe_layer"])
def test_a_profile_that_was_stopped_in_the_layer_ends_the_same(
    at: str, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("deepseek_v3")
    whole = profiled(folder, tmp_path / "whole")
    inner = getattr(collect, at)

    def stop(stream: Any, layer: int, *rest: Any, **options: Any) -> Any:
        if layer >= 3:
            raise StopError
        return inner(stream, layer, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(collect, at, stop)
        with pytest.raises(StopError):
            profiled(folder, tmp_path / "p")
    again = profiled(folder, tmp_path / "p", resume=True)
    for found, expected in ((again.mtp[3], whole.mtp[3]), (again.statistics[2], whole.statistics[2])):
        assert all((found[name] == value).all() for name, value in expected.items())


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("kind", mtp_models.KINDS)
def test_a_quantized_model_keeps_the_layer(kind: str, fused: bool, made: Callable[..., Path], tmp_path: Path) -> None:
    folder, source = made(kind, fused), open_checkpoint(made(kind, fused))
    layer = source.shape.layers
    result = quantized_folder(folder, WINDOWS, tmp_path / "q", mtp_notes=["kept"])
    assert result["notes"][0] == "kept"
    found = open_artifact(tmp_path / "q")
    assert mtp_layers(found) == (layer,)
    assert found.family.text(found.config) == source.family.text(source.config) | {
        key: value for key, value in found.family.text(found.config).items() if key == "quantization_config"
    }
    for expert in (0, source.shape.experts - 1):
        for ours, theirs in zip(
            read_expert(found, layer, expert).matrices, read_expert(source, layer, expert).matrices, strict=True
        ):
            assert 0.01 < (ours - theirs).norm() / theirs.norm() < 0.2
    rest = [n for n in source.outline.names_by_layer[layer] if ".experts" not in n]
    assert rest
    assert all(torch.equal(found.read(name), source.read(name)) for name in rest)
    ignored = set(found.config["quantization_config"]["ignore"])
    linears = {n.removesuffix(".weight") for n in rest if len(source.shapes[n]) == 2 and n.endswith(".weight")}
    assert linears <= ignored
    assert not any(".experts." in name for name in ignored)
    assert set(result["layer_error"]) >= {str(layer)}
    assert result["layer_error"][str(layer)] < 0.05
    streamed_logits(found, WINDOWS, tmp_path)  # the model itself opens again


def test_its_experts_are_solved_on_what_reaches_them_there(made: Callable[..., Path], tmp_path: Path) -> None:
    """GPTQ beats rounding to nearest on the inputs of the MTP forward; on others it would not."""

    folder = made("glm4_moe")
    quantized_folder(folder, WINDOWS, tmp_path / "q", mtp_notes=["kept"])
    found, source = open_artifact(tmp_path / "q"), open_checkpoint(folder)
    _, chosen, _, experts = mtp_models.predicted(folder, WINDOWS)
    busiest = int(chosen.flatten().bincount().argmax())
    inputs = experts.inputs[(chosen == busiest).any(dim=1)]
    ours, theirs = (read_expert(s, source.shape.layers, busiest).up.float() for s in (found, source))
    scale = theirs.unflatten(1, (-1, 32)).abs().amax(dim=2, keepdim=True) / 7.5
    nearest = ((theirs.unflatten(1, (-1, 32)) / scale).round().clamp(-8, 7) * scale).flatten(1)
    assert ((ours - theirs) @ inputs.T).norm() < ((nearest - theirs) @ inputs.T).norm()


def test_a_pruned_and_quantized_model_has_the_plans_experts_there(
    made: Callable[..., Path], planned: Callable[..., Plan], tmp_path: Path
) -> None:
    for kind in ("deepseek_v3", "qwen3_5_moe"):
        folder, plan = made(kind), planned(kind)
        keep = {**plan.keep, **plan.mtp_keep}
        quantized_folder(folder, WINDOWS, tmp_path / kind, keep=keep, mtp_notes=["kept"])
        found, wanted = open_artifact(tmp_path / kind), prune_source(open_checkpoint(folder), keep)
        (layer,) = mtp_layers(found)
        assert found.outline.shape.experts == plan.experts
        for expert in range(plan.experts):
            ours, theirs = read_expert(found, layer, expert).up, read_expert(wanted, layer, expert).up
            assert (ours - theirs).norm() < 0.2 * theirs.norm()


@pytest.mark.parametrize("pieces", [1, 2])
def test_quantizing_in_sittings_ends_with_the_same_bytes(
    pieces: int, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made("deepseek_v3")
    quantized_folder(folder, WINDOWS, tmp_path / "whole", mtp_notes=["kept"])
    while not quantized_folder(folder, WINDOWS, tmp_path / "q", mtp_notes=["kept"], max_pieces=pieces)["finished"]:
        pass
    assert content(tmp_path / "q") == content(tmp_path / "whole")


def test_the_commands_keep_it_all_the_way(
    made: Callable[..., Path], tiny_copy: Callable[..., Path], tmp_path: Path
) -> None:
    folder, text = tiny_copy("deepseek_v3"), tmp_path / "text.txt"
    tiny_models.add_mtp(folder, seed=5)
    add_tokenizer(folder)
    text.write_text(TEXT)
    given = ("--calibration", text, "--tokens", "1024", "--window", "64")
    code, _, errors = command("profile", folder, "-o", tmp_path / "profile", *given)
    assert code == 0, errors
    plan, chosen = tmp_path / "plan.json", make_plan(load_profile(tmp_path / "profile"), count=8, scheme=G32)
    plan.write_text(plan_text(chosen))
    assert chosen.mtp_keep.keys() == {3}
    code, _, errors = command("prune", folder, "--plan", plan, "-o", tmp_path / "pruned")
    assert (code, "chosen by its own router's statistics" in errors) == (0, True)
    for name, more in (("own", ()), ("original", ("--match", "original"))):
        code, _, errors = command("quantize", folder, "--plan", plan, "-o", tmp_path / name, *given, *more)
        assert (code, "Its experts are quantized like the others" in errors) == (0, True), errors
        assert mtp_layers(open_artifact(tmp_path / name)) == (3,)
        assert open_artifact(tmp_path / name).config["num_nextn_predict_layers"] == 1
        code, out, errors = command("check", tmp_path / name)
        assert "multi-token" not in out
    code, _, errors = command("quantize", folder, "--plan", plan, "-o", tmp_path / "dropped", *given, "--mtp", "drop")
    assert (code, "was dropped" in errors) == (0, True)
    assert mtp_layers(open_artifact(tmp_path / "dropped")) == ()


def test_the_quantized_layer_changes_nothing_in_the_model(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made("deepseek_v3")
    quantized_folder(folder, WINDOWS, tmp_path / "kept", mtp_notes=["kept"])
    quantized_folder(folder, WINDOWS, tmp_path / "dropped")
    one, two = (streamed_logits(open_artifact(tmp_path / name), WINDOWS, tmp_path) for name in ("kept", "dropped"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_5_moe"])
def test_where_bits_differ_by_layer_it_has_those_of_most(kind: str, made: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(made(kind))
    moe_layers = source.outline.moe_layers
    bits = {layer: 8 if layer == moe_layers[-1] else 4 for layer in moe_layers}
    quantized_folder(made(kind), WINDOWS, tmp_path / "q", layer_bits=bits, mtp_notes=["kept"])
    found, layer = open_artifact(tmp_path / "q"), source.shape.layers
    errors = {}
    for number in (moe_layers[-1], layer):
        ours, theirs = read_expert(found, number, 0).up, read_expert(source, number, 0).up
        errors[number] = float((ours - theirs).norm() / theirs.norm())
    assert errors[moe_layers[-1]] < 0.02 < errors[layer] < 0.2


def test_a_whole_run_keeps_it(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder, text = tiny_copy("deepseek_v3"), tmp_path / "text.txt"
    tiny_models.add_mtp(folder, seed=5)
    add_tokenizer(folder)
    text.write_text(TEXT)
    given = ("--calibration", text, "--tokens", "512", "--window", "64", "--keep", "0.5", "--group-size", "32")
    rest = ("--data", text, "--max-windows", "1", "--no-throughput")
    code, _, errors = command("run", folder, "-o", tmp_path / "out", *given, *rest)
    assert code == 0, errors
    assert "was kept with 8 of 16 experts, chosen by its own router's statistics" in errors
    assert mtp_layers(open_artifact(tmp_path / "out" / "model")) == (3,)
    assert "mtp: keep" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_the_estimate_of_the_disk_counts_it(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder, text = tiny_copy("deepseek_v3"), tmp_path / "text.txt"
    tiny_models.add_mtp(folder, seed=5)
    add_tokenizer(folder)
    text.write_text(TEXT)
    given = ("quantize", folder, "-o", tmp_path / "q", "--calibration", text, "--tokens", "512", "--window", "64")
    code, out, errors = command(*given, "--group-size", "32", "--dry-run", "--json")
    assert code == 0, errors
    assert command(*given, "--group-size", "32")[0] == 0
    size = open_artifact(tmp_path / "q").total_bytes
    assert abs(json.loads(out)["output_bytes"] - size) < 0.02 * size


def test_a_layer_that_is_not_whole_is_not_profiled(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder, text = tiny_copy("deepseek_v3"), tmp_path / "text.txt"
    tiny_models.add_mtp(folder, seed=5)
    tiny_models.rewrite(folder, lambda tensors: tensors.pop("model.layers.3.hnorm.weight"))
    add_tokenizer(folder)
    text.write_text(TEXT)
    given = ("--calibration", text, "--tokens", "512", "--window", "64")
    code, _, errors = command("profile", folder, "-o", tmp_path / "profile", *given)
    assert (code, "layer 3 is not profiled, for model.layers.3.hnorm.weight is missing" in errors) == (0, True)
    assert load_profile(tmp_path / "profile").mtp == {}


def test_of_an_fp8_layer_the_rest_becomes_what_the_model_is_stored_in(
    tiny_copy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_copy("deepseek_v3", dtype=torch.bfloat16)
    tiny_models.add_mtp(folder, seed=5)
    tiny_models.to_fp8(folder)
    source = open_checkpoint(folder)
    quantized_folder(folder, WINDOWS, tmp_path / "q", mtp_notes=["kept"])
    tensors = tiny_models.load_tensors(tmp_path / "q")
    assert not [n for n, t in tensors.items() if "scale_inv" in n or t.dtype == torch.float8_e4m3fn]
    for name in ("eh_proj", "self_attn.o_proj", "mlp.shared_experts.up_proj"):
        name = f"model.layers.3.{name}.weight"
        assert torch.equal(tensors[name], source.read(name).bfloat16())
    bias = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert tensors[bias].dtype == source.read(bias).dtype
