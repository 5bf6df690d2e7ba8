"""A budget over experts and all else: by measured divergence where the profile has it, as ever where it has not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stage_runs import command

from moepress.calibration.profile import Profile, load_profile
from moepress.compress.budget.damage import space_of
from moepress.compress.budget.divergences import divergences_of
from moepress.compress.budget.search import Alternative, Unit
from moepress.compress.budget.sizes import linears_bytes, planned_linears
from moepress.compress.gptq.include import AUTO_BITS, IN_LAYERS, Include
from moepress.compress.gptq.kinds import Kind
from moepress.compress.pruning.plan import Plan, load_plan, plan_text
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import SUPPORTED_BITS, Scheme
from moepress.errors import InvalidInputError, UsageError
from moepress.stages.export import onnx_bits
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.plan import INCLUDE_NOTE, PARTS_NOTE, BudgetRequest, Wish, loadable, plan_within
from moepress.stages.profile import profile_stage
from moepress.validation.rules.bits import RUNTIME_BITS, bits_for
from moepress.validation.rules.findings import Runtime
from moepress.validation.speed.targets import RESERVE

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plan") / "profile"
    profile_stage("demo", Output(folder=out), Calibration(tokens=2048, window=128), Machine(), grid_losses=True)
    return out


@pytest.fixture(scope="module")
def made(folder: Path) -> Profile:
    return load_profile(folder)


def losing(profile: Profile, change: Callable[[dict[str, Any]], float]) -> Profile:
    """With other losses by kind."""
    rows = tuple({**row, "kl": change(dict(row))} for row in profile.kind_losses)
    return replace(profile, kind_losses=rows)


def with_attention(profile: Profile, kl: float) -> Profile:
    """With all kinds alike, but for attention."""
    return losing(profile, lambda row: 0.01 if row["kind"] is None else kl if row["kind"] == Kind.ATTENTION else 1e-3)


def planned(profile: Profile, mib: float, **wish: Any) -> Plan:
    ask = Wish(**{"weights": {}, "auto": True, **wish})
    return plan_within(profile, BudgetRequest(limit_bytes=int(mib * MIB)), ask)


def chosen(plan: Plan) -> Alternative:
    (row,) = [row for row in plan.alternatives if row.chosen]
    return row


@pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "mixed"])
def test_bytes_of_costless_attention_go_to_the_experts(made: Profile, *, mixed: bool) -> None:
    """3.5 MiB hold experts at 4 bits only where other parts give some of theirs."""
    costless, costly = with_attention(made, 0.0), with_attention(made, 1.0)
    cheap, dear = planned(costless, 3.5, mixed=mixed), planned(costly, 3.5, mixed=mixed)
    assert cheap.part_bits[Include.ATTENTION] == 4
    assert dear.part_bits[Include.ATTENTION] == 8
    fixed = planned(costless, 3.5, mixed=mixed, auto=False, include=dict.fromkeys(IN_LAYERS, AUTO_BITS))
    assert (chosen(cheap).bits or 0) > (chosen(fixed).bits or 0)
    assert chosen(cheap).loss < chosen(fixed).loss
    assert chosen(cheap).unit is chosen(fixed).unit is Unit.NATS
    assert chosen(fixed).part_bits == {}


@pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "mixed"])
def test_more_room_is_never_worse_and_never_exceeded(made: Profile, *, mixed: bool) -> None:
    before = float("inf")
    for step in range(24):
        plan = planned(made, 2.4 + step / 8, mixed=mixed)
        row = chosen(plan)
        assert row.loss <= before
        assert row.weight_bytes == plan.sizes.after_bytes <= int((2.4 + step / 8) * MIB)
        assert row.part_bits == plan.part_bits
        assert all(other.loss >= row.loss for other in plan.alternatives if other.fits)
        before = row.loss


def test_losses_add_up_by_hand(made: Profile) -> None:
    found = divergences_of(made)
    assert found is not None
    kept = {16: {n: list(range(16)) for n in made.layers}}
    linears = planned_linears(made, dict.fromkeys(IN_LAYERS, AUTO_BITS))
    space = space_of(
        made, kept, weights={}, widths=(3,), group_size=128, linears=linears, free={Include.ATTENTION, Include.SHARED}
    )
    sums = dict.fromkeys(Kind, 0.0)
    for row in made.kind_losses:
        if row["kind"] is not None:
            at = tuple(row["layers"]) if row["layers"] else None
            code = {Kind.DENSE: 8, Kind.ATTENTION: 4, Kind.SHARED: 8}.get(row["kind"], 3)
            sums[Kind(row["kind"])] += found.whole * row["kl"] * found.ratio(code, at)
    (way,) = [b for b in space.besides if b.include == {Include.ATTENTION: 4, Include.SHARED: 8}]
    assert way.loss == pytest.approx(sums[Kind.ATTENTION] + sums[Kind.SHARED])
    experts = sum(losses[3] for losses in space.quantized.values())
    assert experts == pytest.approx(sums[Kind.EXPERTS] + sums[Kind.DOWN])
    assert space.outside_losses == {3: pytest.approx(sums[Kind.DENSE])}
    assert space.pruned == {16: 0.0}
    attention = [linear for linear in linears if linear.part.value == "attention"]
    four = linears_bytes(made.inventory, [replace(n, bits=4) for n in attention], Scheme(bits=4, group_size=128))
    other = next(b for b in space.besides if b.include == {Include.ATTENTION: 8, Include.SHARED: 8})
    assert other.size - way.size == linears_bytes(made.inventory, attention, Scheme(bits=8, group_size=128)) - four


@pytest.mark.parametrize("include", [{Include.ATTENTION: 8}, {Include.ATTENTION: 3}, {Include.ATTENTION: None}])
def test_a_named_part_keeps_what_was_asked(made: Profile, include: dict[Include, int | None]) -> None:
    costless = with_attention(made, 0.0)
    for mib in (2.9, 3.2, 3.5):
        plan = planned(costless, mib, include=include)
        assert plan.part_bits[Include.ATTENTION] == (include[Include.ATTENTION] or AUTO_BITS)
        assert set(chosen(plan).part_bits) == {Include.DENSE, Include.SHARED}
    alone = planned(costless, 3.5, auto=False, include=include)
    assert alone.include == (Include.ATTENTION,)
    assert alone.part_bits == {part: bits for part, bits in include.items() if bits is not None}


def test_a_part_with_the_experts_bits_loses_with_them(made: Profile) -> None:
    ask = {"auto": False, "include": {Include.ATTENTION: None, Include.DENSE: None}, "experts": 16}
    few = {bits: chosen(planned(made, 9, widths=(bits,), **ask)).loss for bits in (3, 4)}
    bare = {bits: chosen(planned(made, 9, widths=(bits,), auto=False, experts=16)).loss for bits in (3, 4)}
    assert few[3] - bare[3] > 2 * (few[4] - bare[4]) > 0


def test_without_losses_by_kind_a_plan_is_as_it_was(made: Profile) -> None:
    bare = replace(made, grids=(), kind_losses=(), file=None)
    plan = planned(bare, 3.5)
    assert plan.part_bits == dict.fromkeys(sorted(IN_LAYERS), AUTO_BITS)
    text = plan_text(plan)
    rows = json.loads(text)["alternatives"]
    assert {tuple(row) for row in rows} == {("experts", "bits", "mixed", "weight_bytes", "loss", "fits", "chosen")}
    assert INCLUDE_NOTE in plan.notes
    named = planned(bare, 3.5, auto=False, include=dict.fromkeys(IN_LAYERS, AUTO_BITS))
    assert plan_text(named) == text
    assert PARTS_NOTE in planned(made, 3.5).notes


@pytest.mark.parametrize("take", [slice(1, None), slice(0, -1)])
def test_losses_that_are_not_all_there_are_refused(made: Profile, take: slice) -> None:
    with pytest.raises(InvalidInputError, match="not those of its model"):
        planned(replace(made, kind_losses=made.kind_losses[take]), 3.5)


def test_from_a_budget_to_a_folder_with_the_bits_that_were_chosen(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    code, printed, errors = command("plan", folder, "--budget", "3.5MiB", "-o", file)
    assert code == 0, errors
    assert "estimated KL" in printed
    (line,) = [line for line in printed.splitlines() if line.endswith("chosen")]
    plan = load_plan(file)
    assert 4 in plan.part_bits.values()
    assert all(f"{part.value} {bits}" in line for part, bits in plan.part_bits.items())
    assert plan_text(plan) == file.read_text()
    code, _, errors = command(
        "quantize", "demo", "--plan", file, "-o", tmp_path / "q", "--tokens", "2048", "--window", "128"
    )
    assert code == 0, errors
    written = open_artifact(tmp_path / "q")
    assert written.total_bytes == plan.sizes.after_bytes == chosen(plan).weight_bytes <= 3.5 * MIB


def test_who_has_no_losses_by_kind_is_told_how_to_get_them(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "statistics.safetensors", bare)
    found = json.loads((folder / "profile.json").read_text())
    (bare / "profile.json").write_text(json.dumps(found | {"kind_losses": []}))
    code, printed, errors = command("plan", bare, "--budget", "3.5MiB")
    assert code == 0, errors
    assert "estimated loss" in printed
    assert "`profile --grid-losses` measures" in printed
    code, printed, _ = command("plan", folder, "--budget", "3.5MiB")
    assert "`profile --grid-losses` measures" not in printed


def with_target(profile: Profile, folder: Path, mib: float, runtime: Runtime | None = None, **wish: Any) -> Plan:
    """Within a GPU of so much memory beside its reserve and the smallest cache."""
    file = folder / "gpus.toml"
    gib = (mib + 0.1) * MIB / (1 - RESERVE) / (1 << 30)
    file.write_text(
        f'[[target]]\nid = "tiny"\nname = "Tiny"\nkind = "gaming"\nmemory_gib = {gib}\n'
        "bandwidth_gb_per_second = 1\nfp16_tflops = 1\n"
    )
    request = BudgetRequest(target="tiny", targets_file=file, context=1)
    return plan_within(profile, request, Wish(weights={}, auto=True, **loadable(request, runtime), **wish))


def test_a_gpu_gets_bits_that_its_usual_runtimes_load(made: Profile, tmp_path: Path) -> None:
    """Pruned to few experts at 4 bits, though more of them at 3 lose less; the plan says so."""
    usual = with_target(made, tmp_path, 2.9)
    assert chosen(usual).bits == 4
    any_bits = with_target(made, tmp_path, 2.9, Runtime.TRANSFORMERS)
    assert chosen(any_bits).bits in (2, 3)
    assert chosen(any_bits).loss < chosen(usual).loss
    assert {row.bits for row in usual.alternatives} == {4, 8}
    (note,) = [note for note in usual.notes if note.startswith("Fewer bits would lose less")]
    assert f"{chosen(any_bits).experts} experts at {chosen(any_bits).bits:g} bits" in note
    assert f"{chosen(any_bits).loss:.2e} in place of {chosen(usual).loss:.2e}" in note
    assert "load in transformers" in note
    assert "--runtime transformers" in note
    assert not [note for note in any_bits.notes if note.startswith("Fewer bits would lose less")]


def test_a_plain_size_has_all_bits_unless_a_runtime_is_named(made: Profile) -> None:
    request = BudgetRequest(limit_bytes=int(2.9 * MIB))
    assert loadable(request, None) == {"widths": SUPPORTED_BITS, "beyond": ()}
    assert loadable(request, Runtime.VLLM) == {"widths": (4, 8), "beyond": (2, 3)}
    assert loadable(request, Runtime.VLLM, among=(2, 4, 8)) == {"widths": (4, 8), "beyond": (2,)}
    named = plan_within(made, request, Wish(weights={}, auto=True, **loadable(request, Runtime.VLLM)))
    assert chosen(named).bits == 4


def test_what_fits_with_fewer_bits_alone_is_said(made: Profile, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"choose a larger GPU\. Or take fewer bits: \d+ experts at [23] bits, which"):
        with_target(made, tmp_path, 2.9, experts=16)
    with pytest.raises(UsageError, match=r"choose a larger GPU\.$"):
        with_target(made, tmp_path, 1.0, experts=16)


def test_bits_of_runtimes_are_those_of_the_exports() -> None:
    assert RUNTIME_BITS[Runtime.ONNXRUNTIME] == onnx_bits()
    assert RUNTIME_BITS[Runtime.TRANSFORMERS] == SUPPORTED_BITS
    assert bits_for() == (4, 8)
    assert set(RUNTIME_BITS) == set(Runtime)


def test_a_runtime_goes_with_a_size(folder: Path) -> None:
    code, _, errors = command("plan", folder, "--keep", "0.5", "--runtime", "vllm")
    assert code == 2
    assert "--runtime go with --budget or --target only" in errors
    code, _, errors = command("plan", folder, "--budget", "3MiB", "--to", "gguf", "--runtime", "vllm")
    assert code == 2
    assert "leave out --runtime" in errors
    code, printed, _ = command("plan", folder, "--budget", "3MiB", "--runtime", "vllm", "--json")
    assert code == 0
    assert json.loads(printed)["quantization"]["bits"] == 4
