"""What domains lose, by hand; limits; and keep sets under which no protected domain loses too much, or a refusal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stage_runs import command

from moepress.calibration.accumulators import ACCUMULATORS
from moepress.calibration.profile import Profile, Statistic, load_profile
from moepress.compress.pruning.domains import (
    LEAST,
    Limit,
    Protection,
    damage,
    domain_losses,
    lost_domains,
    parse_limit,
    protected_selection,
    protection,
    times_others,
)
from moepress.compress.pruning.plan import load_plan, make_plan, plan_text
from moepress.compress.pruning.scoring import Criterion, Selection, keep_sets
from moepress.errors import InvalidInputError, ThresholdMissedError, UsageError
from moepress.models.families.family import Shape
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.profile import profile_stage

SHAPE = Shape(
    layers=4, hidden=64, experts=4, top_k=1, expert_width=64, groups=1, top_groups=1, vocabulary=256, context=256
)


def statistics(losses: Sequence[Sequence[float]], output: Sequence[float]) -> dict[str, Statistic]:
    """One layer: leave-one-out losses of every domain and expert, which all other sums follow; and |y|² of domains."""
    found = np.zeros((len(losses), 8, 4))
    found[:, 0] = losses
    totals = np.zeros((len(losses), 8))
    totals[:, 0] = output
    every = dict.fromkeys(ACCUMULATORS, found)
    return every | {"count": np.full_like(found, 100.0), "routed_squared": totals, "peak": np.ones_like(found)}


def profile(found: Mapping[int, dict[str, Statistic]], domains: Sequence[str] = ("cs", "de")) -> Profile:
    return Profile(
        model="m",
        model_name="m",
        family="mixtral",
        config={},
        shape=SHAPE,
        domains=tuple(domains),
        layers=tuple(found),
        calibration={},
        inventory={"routed experts": {"bytes": 800, "parameters": 400}},
        statistics=found,
    )


def select(count: int, **weights: float) -> Selection:
    return Selection(criterion=Criterion.LOO, count=count, weights=weights)


# cs lives in expert 3 alone, de in the other three: of three experts, equal weights give up one of de's.
APART = profile({0: statistics([[0.0, 0.0, 1.0, 9.0], [4.0, 4.0, 2.0, 0.0]], [20.0, 20.0])})


@pytest.mark.parametrize(
    ("text", "limit"), [("2x", Limit(factor=2.0)), (" 1.5x ", Limit(factor=1.5)), ("10%", Limit(share=0.1))]
)
def test_a_limit_is_a_multiple_or_a_share(text: str, limit: Limit) -> None:
    assert parse_limit(text) == limit
    assert parse_limit(limit.text) == limit


@pytest.mark.parametrize("text", ["2", "x", "0.5x", "120%", "-1x", "2x 3x", "", "nanx"])
def test_anything_else_is_no_limit(text: str) -> None:
    with pytest.raises(UsageError, match="is no limit; write 2x"):
        parse_limit(text)


def test_a_limit_alone_protects_nobody() -> None:
    with pytest.raises(UsageError, match="name them"):
        protection((), "2x")


def test_the_loss_is_the_share_of_the_weighted_output_mean_over_layers() -> None:
    two = profile({0: APART.statistics[0], 1: statistics([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 8.0]], [4.0, 0.0])})
    found = domain_losses(two, {0: [0, 1, 3], 1: [0, 1]})
    assert found == pytest.approx({"cs": (1 / 10 + 2 / 4) / 2, "de": (2 / 10 + 1) / 2})
    assert damage(0.2) == pytest.approx(0.25)
    assert damage(1.0) == pytest.approx(1000)


def test_keeping_all_experts_loses_nothing() -> None:
    assert domain_losses(APART, {0: [0, 1, 2, 3]}) == {"cs": 0.0, "de": 0.0}


def test_a_domain_is_lost_beyond_twice_the_mean_of_the_others_and_not_where_it_was_given_up() -> None:
    losses = {"cs": 0.5, "de": 0.2, "python": 0.2}
    assert times_others(losses, "cs") == pytest.approx(1 / 0.25)
    assert times_others(losses, "de") == pytest.approx(0.25 / ((1 + 0.25) / 2))
    assert lost_domains(losses, {}) == ("cs",)
    assert lost_domains(losses, {"cs": 0.0}) == ()
    assert lost_domains(losses, {}, factor=4.1) == ()


def test_next_to_nothing_is_not_lost_because_others_lose_still_less() -> None:
    assert lost_domains({"cs": 1.9 * LEAST, "de": 0.0}, {}) == ()
    assert lost_domains({"cs": 2.1 * LEAST, "de": 0.0}, {}) == ("cs",)


def test_a_single_domain_has_no_others_to_be_compared_with() -> None:
    alone = profile({0: statistics([[1.0, 2.0, 3.0, 4.0]], [10.0])}, ("cs",))
    assert lost_domains(domain_losses(alone, {0: [3]}), {}) == ()
    with pytest.raises(UsageError, match="the profile has one alone; give a share"):
        protected_selection(alone, select(2), Protection(domains=("cs",)))


def test_weights_are_raised_no_further_than_the_limit_asks() -> None:
    """Two of four stay: as cs weighs, its two experts, of which de has a fifth."""
    plain = select(2, cs=20.0, de=1.0)
    before = domain_losses(APART, keep_sets(APART, plain))
    asked = Protection(domains=("de",), limit=Limit(share=0.65))
    assert before["de"] == pytest.approx(0.8)
    found = protected_selection(APART, plain, asked)
    losses = domain_losses(APART, keep_sets(APART, found))
    assert losses["de"] <= 0.65
    assert found.weights["cs"] == 20.0
    assert 1.0 < found.weights["de"] < 64
    less = replace(found, weights={**found.weights, "de": found.weights["de"] / 2})
    assert domain_losses(APART, keep_sets(APART, less))["de"] > 0.65
    assert protected_selection(APART, plain, asked) == found


def test_within_the_limit_nothing_is_changed() -> None:
    plain = select(3, cs=1.0, de=1.0)
    assert protected_selection(APART, plain, Protection(domains=("cs", "de"), limit=Limit(share=0.5))) is plain


def test_a_limit_that_can_not_be_kept_is_refused_with_a_count_that_would_do() -> None:
    asked = Protection(domains=("cs", "de"), limit=Limit(share=0.06))
    with pytest.raises(ThresholdMissedError) as refused:
        protected_selection(APART, select(2, cs=1.0, de=1.0), asked)
    text = str(refused.value)
    assert "With 2 of 4 experts de loses" in text
    assert "--max-domain-loss is 6%" in text
    assert "4 experts would do (--experts 4)" in text
    assert refused.value.exit_code == 3


def test_unknown_and_given_up_domains_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--protect fr: the profile has no such domain; it has cs, de\."):
        protected_selection(APART, select(2), Protection(domains=("fr",)))
    with pytest.raises(UsageError, match="exclude each other"):
        protected_selection(APART, select(2, cs=0.0), Protection(domains=("cs",)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("domains") / "profile"
    profile_stage("demo", Output(folder=out), Calibration(tokens=4096, window=128), Machine())
    return out


def test_a_plan_that_gives_up_a_domain_nobody_named_says_so(folder: Path) -> None:
    seen = load_profile(folder)
    weights = {"math": 1e3, "wiki": 1e3, "python": 1e3}
    plan = make_plan(seen, count=12, criterion=Criterion.LOO, weights=weights)
    assert plan.lost_domains == ("german",)
    assert any("german loses" in note and "--protect german would keep" in note for note in plan.notes)
    assert json.loads(plan_text(plan))["lost_domains"] == ["german"]
    given_up = make_plan(seen, count=12, criterion=Criterion.LOO, weights={"german": 0.0})
    assert given_up.keep == plan.keep
    assert given_up.lost_domains == ()


def test_a_protected_domain_stays_within_its_limit_and_the_file_says_all_of_it(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plain = make_plan(load_profile(folder), count=8)
    worst = max(plain.loss, key=lambda d: plain.loss[d].reap_sum_mass)
    limit = 100 * 0.9 * plain.loss[worst].reap_sum_mass
    asked = ("--protect", worst, "--max-domain-loss", f"{limit:.4f}%")
    code, out, err = command("plan", folder, "--experts", 8, "--group-size", 64, *asked, "-o", file)
    assert code == 0, err
    assert f"protected domains: {worst}, within" in out
    plan = load_plan(file)
    assert plan.protected_domains == (worst,)
    assert 100 * plan.loss[worst].reap_sum_mass <= limit
    assert plan.domain_weights[worst] > 1
    assert plan.keep != plain.keep
    again = make_plan(load_profile(folder), count=8, criterion=plan.criterion, weights=plan.domain_weights)
    assert again.keep == plan.keep


def test_plans_without_these_fields_are_read(folder: Path, tmp_path: Path) -> None:
    data = json.loads(plan_text(make_plan(load_profile(folder), count=12)))
    assert "protected_domains" not in data
    for name in ("lost_domains", "slack"):
        data.pop(name, None)
    (tmp_path / "old.json").write_text(json.dumps(data))
    old = load_plan(tmp_path / "old.json")
    assert (old.protected_domains, old.max_domain_loss, old.lost_domains, old.slack) == ((), None, (), None)


@pytest.mark.parametrize("more", [{"max_domain_loss": "2"}, {"max_domain_loss": "2x", "protected_domains": []}])
def test_a_plan_with_a_limit_that_is_none_is_refused(folder: Path, tmp_path: Path, more: dict[str, object]) -> None:
    data = json.loads(plan_text(make_plan(load_profile(folder), count=12)))
    (tmp_path / "plan.json").write_text(json.dumps(data | {"protected_domains": ["python"]} | more))
    with pytest.raises(InvalidInputError, match="it must be 2x or 10%, beside protected_domains"):
        load_plan(tmp_path / "plan.json")


def test_a_refused_plan_is_not_written_and_ends_with_3(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    asked = ("--protect", "german,math,python,wiki", "--max-domain-loss", "0.01%")
    code, _, err = command("plan", folder, "--experts", 8, "--group-size", 64, *asked, "-o", file)
    assert code == 3
    assert "With 8 of 16 experts" in err
    assert "16 experts would do" in err
    assert not file.exists()


def test_a_budget_chooses_no_count_that_breaks_the_limit(folder: Path) -> None:
    base = ("plan", folder, "--budget", "3.2MiB", "--group-size", 64, "--json")
    plain = json.loads(command(*base)[1])
    names = ("--protect", "python", "--max-domain-loss")
    code, out, err = command(*base, *names, "5%")
    assert code == 0, err
    found = json.loads(out)
    counts = {row["experts"] for row in found["alternatives"]}
    assert counts < {row["experts"] for row in plain["alternatives"]}
    assert any("no choice: a protected domain would lose more than 5%" in note for note in found["notes"])
    assert found["loss"]["python"]["reap_sum_mass"] <= 0.05
    code, _, err = command(*base[:2], "--budget", "2.6MiB", "--group-size", 64, *names, "0.001%")
    assert code == 2
    assert "no choice: a protected domain would lose more than 0.001%" in err


def test_domains_are_known_before_any_work_of_a_run(tmp_path: Path) -> None:
    code, _, err = command("run", "demo", "-o", tmp_path / "out", "--protect", "czech", "--dry-run")
    assert code == 2
    assert "--protect czech: the profile has no such domain; it has german, math, wiki, python." in err
