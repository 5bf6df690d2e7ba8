"""Budgets: nothing exceeds them, more is never worse, counts are legal; and a whole way on the demo model."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_runs import add_tokenizer, command

from moepress.calibration.profile import BIT_LOSSES, BIT_TOKENS, Profile, load_profile, merge_profiles
from moepress.compress.budget.damage import space_of
from moepress.compress.budget.search import (
    Beside,
    Budget,
    Candidate,
    Space,
    best,
    by_layer,
    candidate,
    choose,
    uniform,
    verdict,
)
from moepress.compress.gptq.include import Include
from moepress.compress.pruning.plan import load_plan, plan_text
from moepress.compress.pruning.scoring import Criterion, Groups, Selection, keep_sets
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import SUPPORTED_BITS
from moepress.errors import InvalidInputError, UsageError
from moepress.models.families.family import legal_counts
from moepress.models.forward.inventory import cache_bytes
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.plan import BudgetRequest, Wish, budget_of, plan_within
from moepress.stages.profile import profile_stage
from moepress.stages.quantize import QuantizeRequest, quantize_stage
from moepress.validation.speed.targets import Verdict, fit, load_targets

SMALL = Calibration(tokens=4096, window=128)


@st.composite
def spaces(draw: st.DrawFn, *, outside: int | None = None) -> Space:
    """Any bytes and losses: more experts or bits take more bytes, and more experts never lose more."""
    counts = sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=5)))
    widths = sorted(draw(st.sets(st.sampled_from(SUPPORTED_BITS), min_size=1)))
    layers = draw(st.integers(1, 6))
    loss = st.floats(0, 1, allow_nan=False)
    each = draw(st.integers(1, 1000))
    apart = dict.fromkeys(widths, 0) | {width: draw(st.integers(0, 500)) * width for width in widths[:outside]}
    ways = draw(st.lists(st.tuples(st.integers(0, 2000), loss), min_size=1, max_size=4))
    return Space(
        rest={count: draw(st.integers(0, 100)) + count for count in counts},
        layer={count: {width: count * each * width for width in widths} for count in counts},
        pruned=dict(zip(counts, sorted((draw(loss) for _ in counts), reverse=True), strict=True)),
        quantized={layer: {width: draw(loss) for width in widths} for layer in range(layers)},
        outside=apart,
        outside_losses={width: draw(loss) if size else 0.0 for width, size in apart.items()},
        besides=[
            Beside(include={Include.SHARED: place}, size=size, loss=lost) for place, (size, lost) in enumerate(ways)
        ],
    )


def limits_of(space: Space) -> st.SearchStrategy[int]:
    sizes = [c.size for c in uniform(space)]
    return st.integers(min(sizes), 2 * max(sizes))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_choice_never_exceeds_its_budget_and_counts_are_those_offered(data: st.DataObject) -> None:
    space = data.draw(spaces())
    limit, mixed = data.draw(limits_of(space)), data.draw(st.booleans())
    chosen, rows = choose(space, Budget(limit_bytes=limit), mixed=mixed)
    assert chosen.size <= limit
    (way,) = [beside for beside in space.besides if beside.include == chosen.part_bits]
    assert chosen == candidate(space, chosen.count, chosen.widths, way)
    assert [row.part_bits for row in rows if row.chosen] == [way.include]
    assert chosen.count in space.layer
    assert set(chosen.widths) == set(space.quantized)
    assert [row.weight_bytes for row in rows if row.chosen] == [chosen.size]
    assert all(row.fits == (row.weight_bytes <= limit) for row in rows)
    assert all(row.loss >= chosen.loss for row in rows if row.fits)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_more_budget_never_gives_a_worse_estimate(data: st.DataObject) -> None:
    space = data.draw(spaces())
    small, large = sorted((data.draw(limits_of(space)), data.draw(limits_of(space))))
    for mixed in (False, True):
        before, after = best(space, small, mixed=mixed), best(space, large, mixed=mixed)
        assert before is not None
        assert after is not None
        assert after.loss <= before.loss


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_bits_by_layer_are_never_worse_than_the_same_bits_everywhere(data: st.DataObject) -> None:
    space = data.draw(spaces())
    for same in uniform(space):
        own = best(space, same.size, mixed=True)
        assert own is not None
        assert own.loss <= same.loss


def every_choice(space: Space, count: int) -> list[Candidate]:
    """All bits by layer, tried one after the other."""
    found: list[dict[int, Any]] = [{}]
    for layer in space.quantized:
        found = [widths | {layer: width} for widths in found for width in space.layer[count]]
    return [candidate(space, count, widths) for widths in found]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_what_the_multiplier_finds_is_the_best_of_all_for_its_own_bytes(data: st.DataObject) -> None:
    space = data.draw(spaces(outside=0))  # else the bits of most layers change what the others may take
    count = min(space.layer)
    found = by_layer(space, count, data.draw(limits_of(space)))
    if found is not None and len(space.quantized) <= 4:
        best_of_all = min(c.loss for c in every_choice(space, count) if c.size <= found.size)
        assert found.loss <= best_of_all + 1e-9


def test_a_budget_below_everything_is_refused_with_the_smallest_size() -> None:
    space = Space(
        rest={4: 1 << 20}, layer={4: {2: 1 << 20, 4: 2 << 20}}, pruned={4: 0.1}, quantized={0: {2: 0.1, 4: 0.0}}
    )
    with pytest.raises(UsageError, match=r"result, 4 experts at 2 bits, takes 2\.00 MiB, and the budget is 1\.00 MiB"):
        choose(space, Budget(limit_bytes=1 << 20))
    with pytest.raises(UsageError, match=r"takes 2\.00 MiB beside 1\.00 MiB of KV cache, and gpu has 2\.00 MiB beside"):
        choose(space, Budget(limit_bytes=3 << 20, reserve_bytes=1 << 20, cache_bytes=1 << 20, target="gpu"))


def test_the_verdict_says_which_way_the_same_bytes_go_further() -> None:
    layer = {4: {2: 8, 4: 16}, 8: {2: 16, 4: 32}}
    rest, losses = {4: 0, 8: 0}, {0: {2: 0.10, 4: 0.01}}
    flat = Space(rest=rest, layer=layer, pruned={4: 0.5, 8: 0.0}, quantized=losses)
    chosen, _ = choose(flat, Budget(limit_bytes=16))
    (note,) = verdict(flat, 16, chosen)
    assert note == (
        "Quantizing further beats pruning at equal bytes: an estimated loss of 10.00% with 8 experts at 2 bits, of "
        "51.00% with 4 experts at 4 bits."
    )
    idle = replace(flat, pruned={4: 0.01, 8: 0.0})
    chosen, _ = choose(idle, Budget(limit_bytes=16))
    assert verdict(idle, 16, chosen)[0].startswith(
        "Pruning beats quantizing further at equal bytes: an estimated loss of "
    )
    chosen, _ = choose(flat, Budget(limit_bytes=32))
    assert verdict(flat, 32, chosen) == []  # all experts at the most bits: nothing was given up


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("budget") / "profile"
    profile_stage("demo", Output(folder=out), SMALL, Machine())
    return out


@pytest.fixture(scope="module")
def made(demo: Path) -> Profile:
    return load_profile(demo)


def wish(**changes: Any) -> Wish:
    return Wish(**{"weights": {}, **changes})


def test_the_probe_s_errors_fall_with_the_bits(made: Profile) -> None:
    for layer in made.layers:
        losses = made.statistics[layer][BIT_LOSSES].tolist()
        assert losses == sorted(losses, reverse=True)
        assert 0 < losses[3] < losses[2] < losses[0] < 1
        assert losses[0] > 10 * losses[2]  # two bits more: about sixteen times less
        assert made.statistics[layer][BIT_TOKENS] > 0


def test_losses_add_up_by_hand(made: Profile) -> None:
    selection = Selection(criterion=Criterion.LOO, count=8, weights={"python": 3.0, "german": 0.0})
    kept = {count: keep_sets(made, replace(selection, count=count)) for count in (8, 16)}
    space = space_of(made, kept, weights=selection.weights, widths=(2, 4), group_size=128)
    weights = np.array([{"python": 3.0, "german": 0.0}.get(d, 1.0) for d in made.domains])
    layer = made.layers[0]
    found = made.statistics[layer]
    share = weights / weights.sum() / found["routed_squared"].sum(axis=1)
    bits = (share * found["weighted_norm_squared"].sum(axis=(1, 2))).sum() * found[BIT_LOSSES][0] / len(made.layers)
    assert space.quantized[layer][2] == pytest.approx(float(bits), rel=1e-12)
    assert space.pruned[16] == pytest.approx(0.0, abs=1e-15)
    by_hand = 0.0
    for n, kept in keep_sets(made, selection).items():
        found = made.statistics[n]
        share = weights / weights.sum() / found["routed_squared"].sum(axis=1)
        losses = (share[:, None] * found["leave_one_out"].sum(axis=1)).sum(axis=0)
        by_hand += 2 * sum(float(losses[e]) for e in range(16) if e not in kept) / len(made.layers)
    assert space.pruned[8] == pytest.approx(by_hand, rel=1e-9)


@given(mib=st.floats(3.3, 12), mixed=st.booleans(), degroup=st.booleans())
@settings(max_examples=25, deadline=None)
def test_plans_of_a_profile_fit_are_legal_and_say_so(made: Profile, mib: float, *, mixed: bool, degroup: bool) -> None:
    limit = int(mib * 2**20)
    groups = Groups.DEGROUP if degroup else Groups.BALANCED
    plan = plan_within(made, BudgetRequest(limit_bytes=limit), wish(mixed=mixed, groups=groups))
    assert plan.experts in legal_counts(made.shape, degroup=degroup)
    assert plan.sizes.after_bytes <= limit
    chosen = next(row for row in plan.alternatives if row.chosen)
    assert (chosen.experts, chosen.weight_bytes) == (plan.experts, plan.sizes.after_bytes)
    assert chosen.mixed == bool(plan.layer_bits)
    assert plan.budget == Budget(limit_bytes=limit)


def test_what_is_given_is_not_chosen(made: Profile) -> None:
    request = BudgetRequest(limit_bytes=4 << 20)
    assert plan_within(made, request, wish(experts=8)).experts == 8
    assert plan_within(made, request, wish(keep=0.5)).experts == 8
    plan = plan_within(made, request, wish(widths=(4,)))
    assert plan.quantization is not None
    assert plan.quantization.bits == 4
    assert {row.bits for row in plan.alternatives} == {4}
    pruned = plan_within(made, BudgetRequest(limit_bytes=8 << 20), wish(widths=(None,)))
    assert pruned.quantization is None
    assert pruned.sizes.after_bytes <= 8 << 20
    with pytest.raises(UsageError, match="Cannot keep 5 of 16"):
        plan_within(made, request, wish(experts=5))
    with pytest.raises(UsageError, match="--group-size 96 does not divide the 128"):
        plan_within(made, request, wish(group_size=96))
    with pytest.raises(UsageError, match="The smallest possible result, 8 experts at 2 bits, takes"):
        plan_within(made, BudgetRequest(limit_bytes=1 << 20), wish())


def test_a_target_leaves_room_for_reserve_and_cache(made: Profile) -> None:
    budget = budget_of(BudgetRequest(target="rtx-4060-ti-16gb", context=100), made.config, made.shape)
    assert budget.cache_bytes == cache_bytes(made.config, 100)
    target = next(t for t in load_targets() if t.id == "rtx-4060-ti-16gb")
    assert fit(target, budget.weight_bytes + budget.cache_bytes).verdict is Verdict.FITS
    assert fit(target, budget.weight_bytes + budget.cache_bytes + 2).verdict is Verdict.TIGHT
    assert budget_of(BudgetRequest(target="rtx-3090"), made.config, made.shape).context == made.shape.context
    assert budget_of(BudgetRequest(limit_bytes=100), made.config, made.shape).weight_bytes == 100
    with pytest.raises(UsageError, match=r"--target rtx-1 is not in the table; it has .*rtx-3090"):
        budget_of(BudgetRequest(target="rtx-1"), made.config, made.shape)
    for request in (BudgetRequest(), BudgetRequest(limit_bytes=1, target="rtx-3090")):
        with pytest.raises(UsageError, match="Give either --budget"):
            budget_of(request, made.config, made.shape)


def without(profile: Profile, *names: str) -> Profile:
    statistics = {n: {k: v for k, v in row.items() if k not in names} for n, row in profile.statistics.items()}
    return replace(profile, statistics=statistics)


def test_a_profile_without_the_losses_is_refused(made: Profile) -> None:
    request = BudgetRequest(limit_bytes=4 << 20)
    bare = without(made, BIT_LOSSES, BIT_TOKENS)
    with pytest.raises(InvalidInputError, match="profile again"):
        plan_within(bare, request, wish())
    assert plan_within(bare, BudgetRequest(limit_bytes=8 << 20), wish(widths=(None,))).quantization is None
    zero = {n: {**row, "leave_one_out": np.zeros_like(row["leave_one_out"])} for n, row in made.statistics.items()}
    with pytest.raises(InvalidInputError, match="profile again without --no-loo"):
        plan_within(replace(made, statistics=zero), request, wish())


def test_bit_losses_are_merged_by_tokens_and_only_where_all_have_them(made: Profile) -> None:
    layer = made.layers[0]
    row = made.statistics[layer]
    other = {**row, BIT_LOSSES: 3 * row[BIT_LOSSES], BIT_TOKENS: 3 * row[BIT_TOKENS]}
    merged = merge_profiles([made, replace(made, statistics={**made.statistics, layer: other})])
    np.testing.assert_allclose(merged.statistics[layer][BIT_LOSSES], 2.5 * row[BIT_LOSSES])
    assert merged.statistics[layer][BIT_TOKENS] == 4 * row[BIT_TOKENS]
    assert BIT_LOSSES not in merge_profiles([made, without(made, BIT_LOSSES, BIT_TOKENS)]).statistics[layer]


def test_a_plan_with_its_alternatives_survives_its_text(made: Profile, tmp_path: Path) -> None:
    plan = plan_within(made, BudgetRequest(limit_bytes=int(3.3 * 2**20)), wish(mixed=True))
    file = tmp_path / "plan.json"
    file.write_text(plan_text(plan))
    assert load_plan(file) == plan
    old = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("layer_bits", "budget", "alternatives")}
    file.write_text(json.dumps(old))
    assert load_plan(file).layer_bits == {}
    for bits, message in (
        ({"1": 4}, "layer_bits must name each layer"),
        (dict.fromkeys("1234", 5), "layer_bits holds 5"),
    ):
        file.write_text(json.dumps(old | {"layer_bits": bits}))
        with pytest.raises(InvalidInputError, match=message):
            load_plan(file)


def test_from_profile_to_a_folder_that_fits(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    code, printed, errors = command("plan", demo, "--budget", "3.5MiB", "-o", file)
    assert code == 0, errors
    lines = printed.splitlines()
    assert "budget: 3.50 MiB for the weights" in lines
    head = next(line for line in lines if line.startswith("experts"))
    assert re.split(r"\s{2,}", head.strip()) == ["experts", "bits", "weights", "estimated loss", "fits"]
    assert len([line for line in lines if line.endswith("chosen")]) == 1
    assert {line.split()[-1] for line in lines if re.match(r"\d+ +\d ", line)} == {"yes", "no", "chosen"}
    assert "at equal bytes" in printed
    plan = load_plan(file)
    assert plan.quantization is not None
    request = QuantizeRequest(scheme=plan.quantization.scheme(), include=plan.included)
    quantize_stage("demo", Output(folder=tmp_path / "out"), plan, request, SMALL, Machine())
    written = open_artifact(tmp_path / "out").total_bytes
    assert written <= plan.sizes.after_bytes <= 3.5 * 2**20
    assert written == pytest.approx(plan.sizes.after_bytes, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "lots"], "--budget 'lots' is not a size"),
        (["--budget", "1MiB"], "The smallest possible result, 8 experts at 2 bits, takes"),
        (["--budget", "4MiB", "--target", "rtx-3090"], "Give either --budget"),
        (["--keep", "0.5", "--context", "100"], "--context, --mixed-bits and --runtime go with --budget"),
        (["--budget", "4MiB", "--mixed-bits", "--bits", "4"], "leave out --bits"),
        (["--keep", "0.5", "--no-quantization", "--include", "attention"], "leave it out with --no-quantization"),
        (["--budget", "4MiB", "--keep", "0.5", "--experts", "8"], "both --keep and --experts"),
    ],
)
def test_wrong_use_is_refused_in_a_sentence(demo: Path, arguments: list[str], message: str) -> None:
    code, printed, errors = command("plan", demo, *arguments)
    assert (code, printed) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("key", ["qwen2_moe", "deepseek_v3", "mixtral"])
def test_written_bytes_are_those_foretold(tiny_copy: Callable[..., Path], tmp_path: Path, key: str) -> None:
    folder = tiny_copy(key, dtype=torch.bfloat16)
    add_tokenizer(folder)
    profile = tmp_path / "profile"
    text = Calibration(tokens=1024, window=64)
    profile_stage(str(folder), Output(folder=profile), text, Machine())
    made = load_profile(profile)
    sizes = [row.weight_bytes for row in plan_within(made, BudgetRequest(limit_bytes=1 << 30), wish()).alternatives]
    plan = plan_within(made, BudgetRequest(limit_bytes=sum(sizes) // len(sizes)), wish())
    assert plan.quantization is not None
    request = QuantizeRequest(scheme=plan.quantization.scheme())
    quantize_stage(str(folder), Output(folder=tmp_path / "out"), plan, request, text, Machine())
    assert open_artifact(tmp_path / "out").total_bytes == plan.sizes.after_bytes


@pytest.fixture(scope="module")
def deepseek(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Profile, Calibration]:
    out = tmp_path_factory.mktemp("included")
    folder, text = out / "model", Calibration(tokens=1024, window=64)
    shutil.copytree(tiny_model("deepseek_v3", dtype=torch.bfloat16), folder)
    add_tokenizer(folder)
    profile_stage(str(folder), Output(folder=out / "profile"), text, Machine())
    return folder, load_profile(out / "profile"), text


@pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "mixed"])
@pytest.mark.parametrize("include", [(), (Include.ATTENTION,), tuple(Include)], ids=["experts", "attention", "all"])
def test_the_chosen_row_states_the_bytes_of_the_artifact(
    deepseek: tuple[Path, Profile, Calibration], tmp_path: Path, include: tuple[Include, ...], *, mixed: bool
) -> None:
    """Pruned and quantized for real: the same number, to the byte."""
    folder, profile, text = deepseek
    ask = wish(experts=8, include=frozenset(include), mixed=mixed, group_size=16)
    every = plan_within(profile, BudgetRequest(limit_bytes=1 << 30), ask).alternatives
    low, high = min(row.weight_bytes for row in every), max(row.weight_bytes for row in every)
    limits = [low + (high - low) * step // 16 for step in range(1, 16)]
    plans = [plan_within(profile, BudgetRequest(limit_bytes=limit), ask) for limit in limits]
    plan = next(p for p in plans if bool(p.layer_bits) == mixed)
    assert plan.prunes
    (chosen,) = [row for row in plan.alternatives if row.chosen]
    assert plan.quantization is not None
    assert frozenset(plan.include) == frozenset(include)
    request = QuantizeRequest(scheme=plan.quantization.scheme(), layer_bits=plan.layer_bits, include=plan.included)
    quantize_stage(str(folder), Output(folder=tmp_path / "out"), plan, request, text, Machine())
    written = open_artifact(tmp_path / "out").total_bytes
    assert written == chosen.weight_bytes == plan.sizes.after_bytes
    assert plan.budget is not None
    assert written <= plan.budget.weight_bytes


def test_quantize_takes_the_plan_s_includes_and_holds_others_against_it(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    code, printed, errors = command("plan", demo, "--budget", "3.5MiB", "--include", "attention", "-o", file)
    assert code == 0, errors
    assert "its loss is not in it" in printed
    assert load_plan(file).include == (Include.ATTENTION,)
    out = ["quantize", "demo", "--plan", file, "-o", tmp_path / "out", "--tokens", "2048", "--window", "128"]
    code, _, errors = command(*out, "--include", "lm_head")
    assert (code, errors.count("\n")) == (2, 1)
    assert "The plan fits its budget with --include attention" in errors
    code, _, errors = command(*out)
    assert code == 0, errors
    assert open_artifact(tmp_path / "out").total_bytes == load_plan(file).sizes.after_bytes
    more = [*out, "--include", "attention", "--include", "lm_head", "--dry-run", "--force"]
    code, _, errors = command(*more)
    assert code == 0, errors
    assert "The plan was made for --include attention" in errors
