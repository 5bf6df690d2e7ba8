"""What a cut is likely to cost: effective experts and cuts by hand, published results and which of them are alike."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stage_runs import command

from moepress.calibration.profile import load_profile
from moepress.compress.pruning import slack
from moepress.compress.pruning.domains import domain_losses
from moepress.compress.pruning.plan import load_plan, make_plan
from moepress.compress.pruning.scoring import Criterion, Selection
from moepress.compress.pruning.slack import (
    cut_counts,
    effective_experts,
    kept_text,
    like_models,
    measured_cuts,
    published,
    slack_of,
)
from moepress.models.families.family import Shape
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.profile import profile_stage

FILE = Path(slack.__file__).with_name("published.toml")


def shape(experts: int, top_k: int, *, groups: int = 1) -> Shape:
    return Shape(
        layers=4,
        hidden=64,
        experts=experts,
        top_k=top_k,
        expert_width=64,
        groups=groups,
        top_groups=groups,
        vocabulary=256,
        context=256,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slack") / "profile"
    profile_stage("demo", Output(folder=out), Calibration(tokens=2048, window=128), Machine(), bit_losses=False)
    return out


def test_every_published_result_is_a_share_with_its_source() -> None:
    for row in published():
        assert row.source.startswith("https://")
        assert row.kept
        assert all(0 < cut < 100 and 0 <= kept <= 1.05 for cut, kept in row.kept.items())
        assert 0 < row.top_k < row.experts
    for cut in measured_cuts():
        assert cut.experts < cut.before
        assert 1 <= cut.effective <= cut.before
    assert set(tomllib.loads(FILE.read_text())) == {"result", "measured"}


@pytest.mark.parametrize(
    ("family", "form", "first", "not_there"),
    [
        ("deepseek_v3", shape(64, 6), "Moonlight-16B-A3B-Instruct", "MiniMax-M2"),
        ("deepseek_v3", shape(256, 8), "Moonlight-16B-A3B-Instruct", "GLM-4.7-Flash"),
        ("qwen3_moe", shape(128, 8), "Qwen3-30B-A3B-Instruct-2507", "MiniMax-M2"),
        ("olmoe", shape(64, 8), "Moonlight-16B-A3B-Instruct", "MiniMax-M2"),
        ("glm4_moe", shape(128, 8), "Qwen3-30B-A3B-Instruct-2507", "MiniMax-M2"),
    ],
)
def test_like_models_are_of_the_family_or_alike_in_experts(
    family: str, form: Shape, first: str, not_there: str
) -> None:
    names = [row.model for row in like_models(family, form)]
    assert names[0] == first
    assert not_there not in names


def test_nothing_is_like_a_model_of_few_large_experts() -> None:
    assert like_models("mixtral", shape(8, 2)) == ()
    assert kept_text(()) == []


def test_a_model_is_told_in_one_sentence_with_all_its_tasks() -> None:
    (line, *others) = kept_text(like_models("deepseek_v3", shape(64, 6)))
    assert line.startswith(
        "Moonlight-16B-A3B-Instruct (64 experts, top-6) is reported to keep GSM8K 80 % at 25 % pruned"
    )
    assert "; MATH-500 37 % at 25 % pruned" in line
    assert all("Moonlight" not in other for other in others)


def test_cuts_are_to_the_legal_counts_nearest_to_three_quarters_and_half() -> None:
    assert cut_counts(shape(64, 6)) == (48, 32)
    assert cut_counts(shape(10, 2)) == (7, 5)
    assert cut_counts(shape(16, 4, groups=8)) == ()
    assert cut_counts(shape(8, 6)) == (6,)


def test_effective_experts_are_all_that_are_used_alike_and_one_that_does_all(folder: Path) -> None:
    made = load_profile(folder)

    def spread(row: list[float]) -> float:
        mass = np.zeros((len(made.domains), 8, 16))
        mass[:, 0, : len(row)] = row
        return effective_experts(replace(made, statistics={n: {"weighted_norm": mass} for n in made.layers}))

    assert spread([3.0] * 16) == pytest.approx(16)
    assert spread([5.0]) == pytest.approx(1)
    assert spread([1.0] * 4) == pytest.approx(4)
    assert 1 < effective_experts(made) < 16


def test_slack_is_what_plans_of_these_counts_lose(folder: Path) -> None:
    made = load_profile(folder)
    weights = {"python": 3.0, "german": 0.0, "math": 1.0, "wiki": 1.0}
    found = slack_of(made, Selection(criterion=Criterion.LOO, count=16, weights=weights))
    assert [cut.experts for cut in found.cuts] == [12, 8]
    for cut in found.cuts:
        plan = make_plan(made, count=cut.experts, criterion=Criterion.LOO, weights=weights)
        losses = domain_losses(made, plan.keep)
        assert cut.reap_sum_mass == pytest.approx(sum(weights[d] * losses[d] for d in losses) / 5)
        assert cut.damage == pytest.approx(sum(weights[d] * losses[d] / (1 - losses[d]) for d in losses) / 5)
        assert cut.worst_mass >= cut.reap_sum_mass
        assert cut.worst_layer in made.layers
        assert 0 < cut.kl[0] < cut.kl[1]
        assert cut.leave_one_out is not None
        assert 0 < cut.leave_one_out < 1
    assert found.cuts[0].damage < found.cuts[1].damage


def test_the_projected_range_holds_what_was_measured(folder: Path) -> None:
    """Of the demo itself, with its embedded text and a tenth of the tokens, it is no more than near."""
    made = load_profile(folder)
    weights = dict.fromkeys(made.domains, 1.0)
    (quarter, half) = slack_of(made, Selection(criterion=Criterion.REAP, count=16, weights=weights)).cuts
    for cut in (quarter, half):
        (row,) = [row for row in measured_cuts() if row.model == "demo" and row.experts == cut.experts]
        assert cut.kl[0] * 0.7 < row.kl < cut.kl[1] * 1.4


def test_a_profile_without_leave_one_out_losses_has_its_slack_too(folder: Path) -> None:
    made = load_profile(folder)
    bare = replace(
        made,
        statistics={n: {**row, "leave_one_out": np.zeros_like(row["count"])} for n, row in made.statistics.items()},
    )
    cuts = slack_of(bare, Selection(criterion=Criterion.REAP, count=16, weights={})).cuts
    assert [cut.leave_one_out for cut in cuts] == [None, None]


def test_a_plan_that_prunes_shows_the_slack_and_keeps_it(folder: Path, tmp_path: Path) -> None:
    asked = ("plan", folder, "--group-size", 64)
    code, out, err = command(*asked, "--experts", 12, "-o", tmp_path / "plan.json")
    assert code == 0, err
    assert "slack (projected): " in out
    assert "12 of 16" in out
    assert "Moonlight-16B-A3B-Instruct" in out
    stored = load_plan(tmp_path / "plan.json").slack
    assert stored is not None
    assert stored.label == "projected"
    whole = command(*asked, "--keep", 1, "-o", tmp_path / "whole.json")[1]
    assert "slack" not in whole
    assert "slack" not in json.loads((tmp_path / "whole.json").read_text())


def test_inspect_of_a_profile_tells_the_slack_and_of_a_model_like_results(folder: Path) -> None:
    code, out, err = command("inspect", folder)
    assert code == 0, err
    assert "slack (projected): " in out
    found = json.loads(command("inspect", folder, "--json")[1])
    assert (
        found["slack"] == json.loads(command("plan", folder, "--experts", 8, "--group-size", 64, "--json")[1])["slack"]
    )
    model = json.loads(command("inspect", "demo", "--json")[1])
    assert {row["model"] for row in model["published"]} == {"Moonlight-16B-A3B-Instruct"}
    assert any("Moonlight-16B-A3B-Instruct (64 experts, top-6)" in line for line in model["targets"]["answer"])
