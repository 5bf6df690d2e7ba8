"""Profiles: what is on disk comes back, profiles of parts add up to that of the whole, what is broken is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from stage_runs import content, corpus_of, in_torch, profile_of

from moepress.calibration.accumulators import ACCUMULATORS, TOTALS
from moepress.calibration.profile import (
    DESCRIPTION,
    SHARDS,
    STATISTICS,
    Profile,
    fingerprint,
    load_profile,
    merge_profiles,
    save_profile,
)
from moepress.errors import InvalidInputError
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.profile import profile_stage

WINDOWS = tiny_models.windows(256, count=12, length=8, seed=4)
DOMAINS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0])
PAIR = ("one", "two")


@pytest.fixture(scope="module")
def parts(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Profile, Profile, Profile]:
    """The first half of the windows, the second half, and all of them."""
    work, folder = tmp_path_factory.mktemp("work"), tiny_model("qwen2_moe")
    halves = (slice(0, 5), slice(5, None), slice(None))
    return tuple(  # type: ignore[return-value]
        profile_of(folder, corpus_of(WINDOWS[half], DOMAINS[half], PAIR), work / str(n))
        for n, half in enumerate(halves)
    )


def assert_same_statistics(ours: Profile, other: Profile, rtol: float) -> None:
    assert ours.domains == other.domains
    assert set(in_torch(ours)) == set(in_torch(other)) == set(other.layers)
    for layer, found in in_torch(ours).items():
        assert set(found) == set(ACCUMULATORS) | set(TOTALS)
        for name, value in found.items():
            expected = in_torch(other)[layer][name]
            torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol * float(expected.max()), msg=name)


def test_profiles_of_two_halves_merge_to_the_profile_of_the_whole(parts: tuple[Profile, ...]) -> None:
    first, second, whole = parts
    merged = merge_profiles([first, second])
    assert_same_statistics(merged, whole, 1e-5)
    assert merged.calibration["tokens"] == whole.calibration["tokens"] == WINDOWS.numel()
    for layer in whole.layers:  # counts are exact, and every cell of each half has found its place
        assert torch.equal(in_torch(merged)[layer]["count"], in_torch(whole)[layer]["count"])
        peaks = [in_torch(p)[layer]["peak"] for p in (first, second)]
        assert torch.equal(in_torch(merged)[layer]["peak"], torch.maximum(*peaks))


def test_domains_of_other_names_stand_side_by_side(parts: tuple[Profile, ...]) -> None:
    first, second, _ = parts
    other = replace(second, domains=("two", "three"))
    merged = merge_profiles([first, other])
    assert merged.domains == ("one", "two", "three")
    for layer in merged.layers:
        count = in_torch(merged)[layer]["count"]
        assert torch.equal(count[0], in_torch(first)[layer]["count"][0])
        assert torch.equal(count[1], in_torch(first)[layer]["count"][1] + in_torch(second)[layer]["count"][0])
        assert torch.equal(count[2], in_torch(second)[layer]["count"][1])


def test_merging_does_not_depend_on_the_order(parts: tuple[Profile, ...]) -> None:
    first, second, _ = parts
    assert_same_statistics(merge_profiles([first, second]), merge_profiles([second, first]), 1e-15)
    assert merge_profiles([first]) is first


def test_profiles_of_different_models_are_not_merged(parts: tuple[Profile, ...]) -> None:
    with pytest.raises(InvalidInputError, match="different models"):
        merge_profiles([parts[0], replace(parts[1], model="another")])


def test_a_profile_without_leave_one_out_takes_it_from_the_merged_one(parts: tuple[Profile, ...]) -> None:
    """Losses over a part of the text would rank experts by who was seen there; `loo` must be refused instead."""
    bare = {
        layer: {**found, "leave_one_out": np.zeros_like(found["leave_one_out"])}
        for layer, found in parts[1].statistics.items()
    }
    merged = merge_profiles([parts[0], replace(parts[1], statistics=bare)])
    for layer in merged.layers:
        assert not in_torch(merged)[layer]["leave_one_out"].any()
        assert torch.equal(in_torch(merged)[layer]["count"], in_torch(parts[2])[layer]["count"])


def test_a_profile_is_read_as_it_was_written(parts: tuple[Profile, ...], tmp_path: Path) -> None:
    save_profile(parts[2], tmp_path)
    found = load_profile(tmp_path)
    assert_same_statistics(found, parts[2], 0.0)
    for name in ("model", "model_name", "family", "config", "shape", "domains", "layers", "calibration", "inventory"):
        assert getattr(found, name) == getattr(parts[2], name), name
    assert sorted(p.name for p in tmp_path.iterdir()) == [DESCRIPTION, STATISTICS]


def broken(change: Callable[[Path], Any]) -> Any:
    return pytest.param(change, id=change.__name__)


def description_missing(folder: Path) -> str:
    (folder / DESCRIPTION).unlink()
    return "has no profile.json"


def statistics_missing(folder: Path) -> str:
    (folder / STATISTICS).unlink()
    return "Cannot read .*statistics.safetensors"


def statistics_truncated(folder: Path) -> str:
    raw = (folder / STATISTICS).read_bytes()
    (folder / STATISTICS).write_bytes(raw[:-8])
    return "not a sound safetensors file"


def an_accumulator_missing(folder: Path) -> str:
    tensors = load_file(folder / STATISTICS)
    del tensors["layers.2.gate"]
    save_file(tensors, folder / STATISTICS)
    return "lacks layers.2.gate; profile the model again"


def an_accumulator_of_another_shape(folder: Path) -> str:
    tensors = load_file(folder / STATISTICS)
    tensors["layers.2.gate"] = tensors["layers.2.gate"][:, :, 1:].contiguous()
    save_file(tensors, folder / STATISTICS)
    return r"layers.2.gate is F64 .* is wanted"


def a_later_schema(folder: Path) -> str:
    found = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(found | {"schema_version": "9.0"}))
    return "schema version '9.0'"


def a_key_missing(folder: Path) -> str:
    found = json.loads((folder / DESCRIPTION).read_text())
    del found["domains"]
    (folder / DESCRIPTION).write_text(json.dumps(found))
    return "profile.json is not sound: domains: Field required"


def layers_that_are_no_list(folder: Path) -> str:
    found = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(found | {"layers": 3}))
    return "profile.json is not sound: layers: "


@pytest.mark.parametrize(
    "change",
    [
        broken(description_missing),
        broken(statistics_missing),
        broken(statistics_truncated),
        broken(an_accumulator_missing),
        broken(an_accumulator_of_another_shape),
        broken(a_later_schema),
        broken(a_key_missing),
        broken(layers_that_are_no_list),
    ],
)
def test_a_broken_profile_is_refused(parts: tuple[Profile, ...], tmp_path: Path, change: Callable[[Path], str]) -> None:
    save_profile(parts[2], tmp_path)
    with pytest.raises(InvalidInputError, match=change(tmp_path)):
        load_profile(tmp_path)


def test_the_fingerprint_tells_models_apart(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("mixtral")
    before = fingerprint(open_checkpoint(folder))
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert fingerprint(open_checkpoint(moved)) == before
    tiny_models.edit_config(moved, rms_norm_eps=1e-3)
    assert fingerprint(open_checkpoint(moved)) != before
    shard = sorted(folder.glob("*.safetensors"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert fingerprint(open_checkpoint(folder)) != before


@pytest.fixture(scope="module")
def demo_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "profile"
    profile_stage("demo", Output(folder=out), Calibration(tokens=1024, window=64), Machine())
    return out


def test_the_stage_leaves_a_profile_and_nothing_else(demo_profile: Path) -> None:
    assert sorted(content(demo_profile)) == [DESCRIPTION, STATISTICS]
    assert not demo_profile.with_name("profile.partial").exists()
    found = load_profile(demo_profile)
    assert found.layers == (1, 2, 3, 4)
    assert found.calibration["tokens"] == 1024
    assert found.calibration["embedded"]
    assert sum(found.calibration["tokens_per_domain"].values()) == 1024
    assert set(found.calibration["tokens_per_domain"]) == set(found.domains)
    for layer in found.layers:
        counts = in_torch(found)[layer]["tokens"].sum(dim=1)
        assert counts.tolist() == [found.calibration["tokens_per_domain"][d] for d in found.domains]
        assert in_torch(found)[layer]["count"].shape == (len(found.domains), SHARDS, 16)


def test_the_same_text_gives_the_same_bytes(demo_profile: Path, tmp_path: Path) -> None:
    profile_stage("demo", Output(folder=tmp_path / "again"), Calibration(tokens=1024, window=64), Machine())
    assert content(tmp_path / "again") == content(demo_profile)


def test_another_seed_chooses_other_windows(demo_profile: Path, tmp_path: Path) -> None:
    profile_stage("demo", Output(folder=tmp_path / "other"), Calibration(tokens=1024, window=64, seed=1), Machine())
    other, first = load_profile(tmp_path / "other"), load_profile(demo_profile)
    assert other.calibration["digest"] != first.calibration["digest"]
    assert not torch.equal(in_torch(other)[1]["count"], in_torch(first)[1]["count"])


def test_activations_that_overflow_are_refused_naming_the_layer(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("mixtral")

    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
        for expert in range(8):
            for matrix in ("w1", "w2", "w3"):
                tensors[name.format(expert, matrix)].fill_(1e30)

    tiny_models.rewrite(folder, blow_up)
    with pytest.raises(InvalidInputError, match="Layer 1 gives NaN or Inf"):
        profile_of(folder, corpus_of(WINDOWS), tmp_path / "work")
