"""Criteria on small numbers by hand, tie-breaking, groups, protection, and laws that every keep set obeys."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepress.calibration.accumulators import ACCUMULATORS
from moepress.calibration.profile import Profile, Statistic
from moepress.compress.pruning.plan import COLLAPSE_NOTE, make_plan
from moepress.compress.pruning.scoring import (
    Criterion,
    Groups,
    Selection,
    default_criterion,
    domain_weights,
    keep_set,
    keep_sets,
    layer_scores,
    random_keep_sets,
    removed_share,
    stability,
    super_experts,
    token_counts,
    unsupported,
)
from moepress.errors import InvalidInputError, UsageError
from moepress.models.families.family import Shape, legal_counts

ALL = range(8)


def shape(experts: int = 4, *, top_k: int = 1, groups: int = 1, top_groups: int = 1, layers: int = 4) -> Shape:
    return Shape(
        layers=layers,
        hidden=64,
        experts=experts,
        top_k=top_k,
        expert_width=64,
        groups=groups,
        top_groups=top_groups,
        vocabulary=256,
        context=256,
    )


def statistics(domains: int = 1, experts: int = 4, **rows: Any) -> dict[str, Statistic]:
    """Accumulators [S, 8, E]: each row (or one per domain) is spread over the shards so that it is their sum."""
    out = {name: torch.zeros(domains, 8, experts, dtype=torch.float64) for name in ACCUMULATORS}
    out["count"] += 100 / 8
    out["routed_squared"] = torch.ones(domains, 8, dtype=torch.float64)
    for name, row in rows.items():
        value = torch.tensor(row, dtype=torch.float64).reshape(-1, experts).expand(domains, experts)
        share = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.float64) / 36
        out[name] = value[:, None, :] * (share[:, None] if ACCUMULATORS[name] == "sum" else torch.ones(8, 1))
    return {name: value.numpy() for name, value in out.items()}


def profile(
    found: dict[int, dict[str, Statistic]], form: Shape | None = None, domains: tuple[str, ...] = ("all",)
) -> Profile:
    form = form or shape(next(iter(found.values()))["count"].shape[2])
    return Profile(
        model="m",
        model_name="m",
        family="mixtral",
        config={},
        shape=form,
        domains=domains,
        layers=tuple(found),
        calibration={"embedded": False, "tokens": 100},
        inventory={"routed experts": {"bytes": 800, "parameters": 400}},
        statistics=found,
    )


def selection(count: int, criterion: Criterion = Criterion.REAP, **options: Any) -> Selection:
    return Selection(criterion=criterion, count=count, **{"weights": {"all": 1.0}, **options})


ROWS = {
    "count": [10.0, 20.0, 0.0, 70.0],
    "gate": [2.0, 5.0, 0.0, 13.0],
    "norm": [30.0, 10.0, 0.0, 60.0],
    "weighted_norm": [6.0, 4.0, 0.0, 10.0],
    "turned_norm": [1.0, 3.0, 0.0, 4.0],
    "leave_one_out": [2.0, 2.0, 0.0, 4.0],
    # never in a criterion: must not leak into one
    "norm_squared": [99.0, 1.0, 99.0, 1.0],
    "weighted_norm_squared": [1.0, 99.0, 1.0, 99.0],
    "peak": [7.0, 7.0, 7.0, 7.0],
}


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Criterion.FREQUENCY, [10 / 100, 20 / 100, 0, 70 / 100]),
        (Criterion.GATE, [2 / 20, 5 / 20, 0, 13 / 20]),
        (Criterion.EAN, [30 / 100, 10 / 100, 0, 60 / 100]),
        (Criterion.MAN, [3 / (3 + 1 / 2 + 6 / 7), 0.5 / (3 + 1 / 2 + 6 / 7), 0, (6 / 7) / (3 + 1 / 2 + 6 / 7)]),
        (Criterion.REAP, [0.6 / (0.8 + 1 / 7), 0.2 / (0.8 + 1 / 7), 0, (1 / 7) / (0.8 + 1 / 7)]),
        (Criterion.REAP_SUM, [6 / 20, 4 / 20, 0, 10 / 20]),
        (Criterion.EASY_EP, [1 / 8, 3 / 8, 0, 4 / 8]),
        (Criterion.LOO, [2 / 8, 2 / 8, 0, 4 / 8]),
    ],
)
def test_each_criterion_is_its_formula(criterion: Criterion, expected: list[float]) -> None:
    found = layer_scores(statistics(**ROWS), criterion, np.ones(1), ALL)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_all_criteria_are_tested() -> None:
    marks = test_each_criterion_is_its_formula.pytestmark  # type: ignore[attr-defined]
    assert {row[0] for row in marks[0].args[1]} == set(Criterion)


def test_each_domain_counts_by_its_weight_and_not_by_its_size() -> None:
    """The second domain has a hundred times the mass; normalised, both have a say."""
    found = statistics(domains=2, weighted_norm=[[3.0, 1.0, 0.0, 0.0], [0.0, 100.0, 300.0, 0.0]])

    def scored(one: float, two: float) -> list[float]:
        weights = np.array([one, two])
        return layer_scores(found, Criterion.REAP_SUM, weights, ALL).tolist()

    assert scored(1, 1) == pytest.approx([0.75, 0.5, 0.75, 0.0])
    assert scored(3, 1) == pytest.approx([2.25, 1.0, 0.75, 0.0])
    assert scored(0, 1) == pytest.approx([0.0, 0.25, 0.75, 0.0])


def test_only_the_shards_asked_for_are_used() -> None:
    found = statistics(weighted_norm=ROWS["weighted_norm"])
    found["weighted_norm"][:, 2] = [0.0, 0.0, 5.0, 0.0]
    only = layer_scores(found, Criterion.REAP_SUM, np.ones(1), [2])
    assert only.tolist() == [0.0, 0.0, 1.0, 0.0]


def kept(scores: list[float], tokens: list[float], count: int, safe: list[int] | None = None, **form: Any) -> list[int]:
    groups = form.pop("rule", Groups.BALANCED)
    return keep_set(
        np.array(scores),
        np.array(tokens),
        safe or [],
        shape(len(scores), **form),
        selection(count, groups=groups),
    )


def test_ties_break_by_tokens_then_by_the_lower_number() -> None:
    assert kept([1, 1, 1, 1], [5, 9, 5, 7], 1) == [1]
    assert kept([1, 1, 1, 1], [5, 9, 5, 7], 2) == [1, 3]
    assert kept([1, 1, 1, 1], [5, 9, 5, 7], 3) == [0, 1, 3]
    assert kept([0, 0, 0, 2], [0, 0, 0, 0], 2) == [0, 3]
    assert kept([1, 2, 3, 4], [9, 9, 9, 0], 2) == [2, 3]  # the score comes first


def test_balanced_groups_keep_the_best_of_each_group() -> None:
    scores = [9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]
    assert kept(scores, [1] * 8, 4, groups=2) == [0, 1, 6, 7]
    assert kept(scores, [1] * 8, 4, groups=4, top_groups=2) == [0, 2, 5, 7]
    assert kept(scores, [1] * 8, 4, groups=2, rule=Groups.DEGROUP) == [0, 1, 2, 3]


def test_protected_experts_come_first() -> None:
    assert kept([9, 8, 7, 0], [1] * 4, 2, safe=[3]) == [0, 3]
    assert kept([9, 8, 7, 6, 5, 4, 3, 0], [1] * 8, 4, safe=[7, 4], groups=2) == [0, 1, 4, 7]


def test_super_experts_stand_out_above_percentile_and_tenth_of_the_largest() -> None:
    quiet = [1.0] * 64
    layers = {n: statistics(experts=64, peak=quiet) for n in range(8)}
    layers[2]["peak"][0, 3, 17] = 500.0
    layers[5]["peak"][0, 0, 40] = 51.0
    layers[6]["peak"][0, 0, 3] = 400.0  # the last quarter of the layers has outliers of its own kind
    layers[1]["peak"][0, 0, 9] = 49.0  # less than a tenth of the largest
    found = super_experts(profile(layers, shape(64, layers=8)))
    assert {layer: experts for layer, experts in found.items() if experts} == {2: [17], 5: [40]}


def test_a_super_expert_survives_whatever_its_score() -> None:
    layers = {n: statistics(experts=64, weighted_norm=[float(e) for e in range(64)], peak=[1.0] * 64) for n in range(4)}
    layers[1]["peak"][0, 0, 5] = 100.0
    made = profile(layers, shape(64))
    chosen = keep_sets(made, selection(8))
    assert chosen[1] == [5, *range(57, 64)]
    assert chosen[2] == list(range(56, 64))
    assert make_plan(made, count=8).protected == {1: [5]}


DOMAIN_ROWS = {
    "weighted_norm": [[9.0, 5.0, 1.0, 1.0], [1.0, 5.0, 1.0, 9.0]],
    "turned_norm": [[9.0, 5.0, 1.0, 1.0], [1.0, 5.0, 1.0, 9.0]],
    "count": [[100.0] * 4, [100.0] * 4],
}


def two_domains() -> Profile:
    return profile({1: statistics(domains=2, **DOMAIN_ROWS)}, domains=("german", "python"))


def test_domain_weights_change_what_stays() -> None:
    made = two_domains()
    assert make_plan(made, count=2, weights={"german": 1, "python": 0}).keep == {1: [0, 1]}
    assert make_plan(made, count=2, weights={"german": 0, "python": 1}).keep == {1: [1, 3]}
    assert make_plan(made, count=2, weights={"german": 3}).keep == {1: [0, 1]}


def test_domain_weights_that_differ_make_easy_ep_the_default() -> None:
    made = two_domains()
    assert make_plan(made, count=2).criterion is Criterion.REAP
    assert make_plan(made, count=2, weights={"german": 2, "python": 2}).criterion is Criterion.REAP
    assert make_plan(made, count=2, weights={"python": 2}).criterion is Criterion.EASY_EP
    asked = make_plan(made, count=2, weights={"python": 2}, criterion=Criterion.GATE)
    assert asked.criterion is Criterion.GATE
    assert default_criterion({"only": 7.0}) is Criterion.REAP


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dutch": 1.0}, "no domain 'dutch'; it has german, python"),
        ({"german": -1.0}, "zero or positive"),
        ({"german": float("nan")}, "zero or positive"),
        ({"german": float("inf")}, "zero or positive"),
        ({"german": 0.0, "python": 0.0}, "one of them positive"),
    ],
)
def test_impossible_domain_weights_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        domain_weights(("german", "python"), given)


def test_frequency_comes_with_a_warning() -> None:
    made = profile({1: statistics(**ROWS)})
    assert COLLAPSE_NOTE in make_plan(made, count=2, criterion=Criterion.FREQUENCY).notes
    assert COLLAPSE_NOTE not in make_plan(made, count=2).notes
    assert COLLAPSE_NOTE not in make_plan(made, count=4, criterion=Criterion.FREQUENCY).notes  # nothing is pruned


def test_experts_with_few_tokens_are_marked_unsupported() -> None:
    made = profile({1: statistics(count=[31.0, 32.0, 0.0, 500.0]), 2: statistics()})
    assert unsupported(made) == {1: [0, 2]}
    plan = make_plan(made, count=2)
    assert plan.unsupported == {1: [0, 2]}
    assert any("2 experts in 1 layers saw fewer than 32 tokens" in note for note in plan.notes)
    assert token_counts(made.statistics[1]).tolist() == pytest.approx([31, 32, 0, 500])


def test_loo_is_refused_where_it_was_not_observed() -> None:
    made = profile({1: statistics(weighted_norm=ROWS["weighted_norm"])})
    with pytest.raises(InvalidInputError, match="--no-loo"):
        keep_sets(made, selection(2, Criterion.LOO))


def test_stability_is_one_where_all_halves_agree_and_low_where_they_do_not() -> None:
    firm = profile({1: statistics(weighted_norm=ROWS["weighted_norm"], count=[100.0] * 4)})
    assert stability(firm, selection(2)) == 1.0
    torn = statistics(experts=8, count=[100.0] * 8)
    torn["weighted_norm"] = np.eye(8)[None]  # each shard has a favourite of its own
    assert stability(profile({1: torn}), selection(4)) == 0.0
    assert stability(profile({1: torn}), selection(8)) == 1.0


def test_stability_is_the_mean_over_all_35_splits() -> None:
    found = statistics(experts=2, count=[100.0] * 2)
    found["weighted_norm"] = np.zeros((1, 8, 2))
    found["weighted_norm"][0, :, 0] = [10.0, 0, 0, 0, 0, 0, 0, 0]
    found["weighted_norm"][0, :, 1] = 1.0
    # The half with shard 0 keeps expert 0 (10 against 4), the other one expert 1: they never agree.
    assert stability(profile({1: found}), selection(1)) == 0.0
    found["weighted_norm"][0, 1, 0] = 10.0
    # Now shards 0 and 1 favour expert 0: halves agree (both keep 0) where they are in different ones, 20 of 35 splits.
    assert stability(profile({1: found}), selection(1)) == pytest.approx(20 / 35)


def test_the_removed_share_is_the_mass_of_what_goes() -> None:
    made = profile({1: statistics(gate=[1.0, 2.0, 3.0, 4.0]), 2: statistics(gate=[1.0, 1.0, 1.0, 1.0])})
    assert removed_share(made, {1: [2, 3], 2: [0, 3]}, "gate") == {"all": pytest.approx((0.3 + 0.5) / 2)}
    assert removed_share(made, {1: [0, 1, 2, 3], 2: [0, 1, 2, 3]}, "gate") == {"all": pytest.approx(0)}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Profile, Selection]:
    groups = draw(st.sampled_from([1, 2, 4]))
    experts = groups * draw(st.integers(2, 6))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(4, top_groups * (experts // groups))))
    form = shape(experts, top_k=top_k, groups=groups, top_groups=top_groups)
    seed, layers, domains = draw(st.integers(0, 2**31)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([1, 2, 1000]))  # few levels: many ties

    def values() -> Tensor:
        return torch.randint(0, levels, (domains, 8, experts), generator=generator).double().numpy()

    found = {n: {name: values() for name in ACCUMULATORS} for n in range(layers)}
    for row in found.values():
        row["leave_one_out"][0, 0, 0] = 1.0  # otherwise it would count as not observed
    rule = draw(st.sampled_from(list(Groups)))
    count = draw(st.sampled_from(legal_counts(form, degroup=rule is Groups.DEGROUP)))
    names = tuple(f"d{n}" for n in range(domains))
    weights = {name: draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])) for name in names}
    chosen = Selection(criterion=draw(st.sampled_from(list(Criterion))), count=count, weights=weights, groups=rule)
    return profile(found, form, names), chosen


def assert_legal(made: Profile, chosen: Selection, sets: dict[int, list[int]]) -> None:
    assert set(sets) == set(made.layers)
    for experts in sets.values():
        assert experts == sorted(set(experts))
        assert len(experts) == chosen.count
        assert 0 <= experts[0] <= experts[-1] < made.shape.experts
        if chosen.groups is Groups.BALANCED:
            size = made.shape.experts // made.shape.groups
            held = [sum(e // size == g for e in experts) for g in range(made.shape.groups)]
            assert len(set(held)) == 1


@settings(max_examples=150, deadline=None)
@given(cases())
def test_keep_sets_are_always_legal(case: tuple[Profile, Selection]) -> None:
    made, chosen = case
    sets = keep_sets(made, chosen)
    assert_legal(made, chosen, sets)
    assert sets == keep_sets(made, chosen)
    assert_legal(made, chosen, random_keep_sets(made, chosen, seed=chosen.count))


@settings(max_examples=15, deadline=None)
@given(cases())
def test_stability_is_a_share(case: tuple[Profile, Selection]) -> None:
    assert 0.0 <= stability(*case) <= 1.0


def test_random_keep_sets_depend_on_the_seed_alone() -> None:
    made = profile({n: statistics(experts=16) for n in range(3)})
    chosen = selection(8)
    assert random_keep_sets(made, chosen, 1) == random_keep_sets(made, chosen, 1)
    assert random_keep_sets(made, chosen, 1) != random_keep_sets(made, chosen, 2)
    assert (
        random_keep_sets(replace(made, statistics={n: statistics(experts=16) for n in range(3)}), chosen, 1)[0]
        != (random_keep_sets(made, chosen, 1)[1])
    )
