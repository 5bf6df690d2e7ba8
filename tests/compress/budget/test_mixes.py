"""Mixes of GGUF's types under a budget: nothing exceeds it, more is never worse, and files are as large as was said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_runs import command

from moepress.calibration.profile import load_profile, merge_profiles
from moepress.compress.budget.mixes import ROUNDING, Item, MixSpace, best_mix, curve, mix_space, smallest_mix
from moepress.compress.budget.rounding import rounded
from moepress.compress.gptq.block_choice import MIX_TYPES
from moepress.compress.gptq.block_solver import rounded_blocks
from moepress.compress.gptq.grid_rows import GridRow
from moepress.compress.gptq.kinds import Kind
from moepress.models.storage.block_types import TYPES

SIZES = {"Q2_K": 84, "Q3_K": 110, "IQ4_XS": 136, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q8_0": 272}


def test_errors_of_rounding_by_type_are_what_they_are() -> None:
    weight_OI = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    coarse = (rounded(weight_OI) - weight_OI).square().sum()
    for name, ratio in ROUNDING.items():
        error = (rounded_blocks(TYPES[name], weight_OI).dense().float() - weight_OI).square().sum()
        assert float(error / coarse) == pytest.approx(ratio, rel=0.03)


def space_of(losses: list[float], pruned: float) -> MixSpace:
    keys = [(Kind.EXPERTS, (0, 0)), (Kind.DOWN, (0, 3)), (Kind.ATTENTION, (0, 3)), (Kind.HEAD, None)]
    items = {
        key: Item(
            sizes={name: (place + 1) * size for name, size in SIZES.items()},
            losses={name: loss * ROUNDING[name] for name in MIX_TYPES},
            each=place < 2,
        )
        for place, (key, loss) in enumerate(zip(keys, losses, strict=True))
    }
    counts = (4, 8, 16)
    return MixSpace(
        items=items,
        rest=dict.fromkeys(counts, 100),
        parameters={n: 1000 * n for n in counts},
        pruned={4: 4 * pruned, 8: pruned, 16: 0.0},
    )


@settings(max_examples=200, deadline=None)
@given(
    losses=st.lists(st.floats(1e-9, 1.0), min_size=4, max_size=4),
    pruned=st.floats(0, 1.0),
    limits=st.tuples(st.integers(1_500, 20_000), st.integers(0, 5_000)),
)
def test_more_room_is_never_worse_and_never_exceeded(
    losses: list[float], pruned: float, limits: tuple[int, int]
) -> None:
    space = space_of(losses, pruned)
    less, more = best_mix(space, limits[0]), best_mix(space, sum(limits))
    least = smallest_mix(space).size
    assert (less is None) == (limits[0] < least)
    if less is not None:
        assert more is not None
        assert less.size <= limits[0]
        assert more.size <= sum(limits)
        assert more.kl <= less.kl * (1 + 1e-9)
        points = curve(space, less)
        assert [p.weight_bytes for p in points] == sorted(p.weight_bytes for p in points)
        assert sum(p.chosen for p in points) == 1


def test_what_is_sensitive_gets_bits_and_neighbours_of_one_type_are_one_row() -> None:
    space = space_of([1e-9, 1e-9, 1.0, 1e-9], 1.0)
    mix = best_mix(space, smallest_mix(space).size + 12 * sum(SIZES.values()))
    assert mix is not None
    assert mix.types[Kind.ATTENTION, (0, 3)] == "Q8_0"
    joined = mix.__class__(
        count=1,
        size=1,
        kl=0,
        types={(Kind.DOWN, (0, 0)): "Q4_K", (Kind.DOWN, (1, 6)): "Q4_K", (Kind.DOWN, (7, 7)): "Q6_K"},
    )
    assert joined.rows() == (
        GridRow(kind=Kind.DOWN, layers=(0, 6), type="Q4_K"),
        GridRow(kind=Kind.DOWN, layers=(7, 7), type="Q6_K"),
    )


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix") / "profile"
    code, _, said = command("profile", "demo", "-o", folder, "--grid-losses", "--tokens", "4096")
    assert code == 0, said
    return folder


def planned(profile: Path, out: Path, *options: str) -> dict[str, Any]:
    code, _, said = command("plan", profile, "--to", "gguf", "-o", out, "--force", *options)
    assert code == 0, said
    return json.loads(out.read_text())


@pytest.mark.parametrize("limit", ["3.5MiB", "2.2MiB"])
def test_a_file_has_the_types_that_were_planned_and_fits(limit: str, profile: Path, tmp_path: Path) -> None:
    plan = planned(profile, tmp_path / "plan.json", "--budget", limit)
    assert {row["kind"] for row in plan["grids"]} == set(Kind)
    assert (plan["experts"] < plan["experts_before"]) == (limit == "2.2MiB")
    code, _, said = command(
        "quantize", "demo", "--plan", tmp_path / "plan.json", "-o", tmp_path / "q", "--tokens", "2048"
    )
    assert code == 0, said
    code, _, said = command("export", tmp_path / "q", "--to", "gguf", "-o", tmp_path / "x.gguf")
    assert code == 0, said
    size = (tmp_path / "x.gguf").stat().st_size
    assert 0.95 * plan["sizes"]["after_bytes"] <= size <= plan["sizes"]["after_bytes"]
    narrow = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
    seen = set()
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        if tensor.tensor_type.name in ("F32", "F16", "BF16"):  # norms, routers, and the halves of kv_b_proj
            continue
        kind, layer = kind_in_file(tensor.name)
        seen.add(kind)
        (name,) = (
            row["type"]
            for row in plan["grids"]
            if row["kind"] == kind and (layer is None or row["layers"][0] <= layer <= row["layers"][1])
        )
        assert tensor.tensor_type.name == (narrow.get(name, name) if tensor.shape[0] % 256 else name), tensor.name
    assert seen == set(Kind)


def kind_in_file(name: str) -> tuple[str, int | None]:
    """The kind of a tensor by llama.cpp's name, and its layer."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "embeddings", "output.weight": "head"}[name], None
    _, layer, place, _ = name.split(".")
    if place.startswith("attn_"):
        return "attention", int(layer)
    if place.endswith("_shexp"):
        return "shared", int(layer)
    if place.endswith("_exps"):
        return ("down" if "down" in place else "experts"), int(layer)
    return "dense", int(layer)


def test_domains_weigh_what_pruning_costs(profile: Path, tmp_path: Path) -> None:
    every = planned(profile, tmp_path / "every.json", "--budget", "2.2MiB")
    one = planned(profile, tmp_path / "one.json", "--budget", "2.2MiB", *_only("python"))
    assert one["keep"] != every["keep"]


def _only(domain: str) -> list[str]:
    others = [name for name in ("german", "math", "wiki", "python") if name != domain]
    return [word for name in others for word in ("--domain-weight", f"{name}=0")]


def test_merged_profiles_keep_their_losses(profile: Path) -> None:
    one = load_profile(profile)
    merged = merge_profiles([one, one])
    assert merged.grids == one.grids
    assert [row["kl"] for row in merged.kind_losses] == pytest.approx([row["kl"] for row in one.kind_losses])
    kept = {16: {n: list(range(16)) for n in one.layers}}
    weights = dict.fromkeys(one.domains, 1.0)
    alike = [best_mix(mix_space(p, kept, weights), 3_500_000) for p in (one, merged)]
    assert alike[0] is not None
    assert alike[1] is not None
    assert alike[0].types == alike[1].types
    bare = merge_profiles([one, replace(one, grids=(), kind_losses=())])
    assert bare.grids == ()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give --budget or --target too"),
        (("--budget", "3MiB", "--bits", "4"), "leave out --bits"),
        (("--budget", "3MiB", "--mixed-bits"), "leave out --bits"),
        (("--budget", "3MiB", "--no-quantization"), "leave out --bits"),
        (("--budget", "3MiB", "--include", "attention"), "leave out --include"),
        (("--budget", "1MiB"), "The smallest possible result, 8 experts in types of GGUF, takes"),
    ],
)
def test_what_does_not_go_with_a_mix_is_refused(options: tuple[str, ...], says: str, profile: Path) -> None:
    code, _, said = command("plan", profile, "--to", "gguf", *options)
    assert (code, said.count("\n")) == (2, 1), said
    assert says in said


def test_a_profile_without_such_losses_is_told_how_to_get_them(tmp_path: Path) -> None:
    assert command("profile", "demo", "-o", tmp_path / "p", "--tokens", "2048")[0] == 0
    code, _, said = command("plan", tmp_path / "p", "--to", "gguf", "--budget", "3MiB")
    assert code == 4
    assert "--grid-losses" in said
    code, _, said = command("profile", "demo", "-o", tmp_path / "q", "--grid-losses", "--no-bit-losses")
    assert code == 2
    assert "leave out --no-bit-losses" in said
    code, _, said = command("profile", "demo", "-o", tmp_path / "q", "--grid-losses", "--no-loo")
    assert code == 2
    assert "leave-one-out losses too" in said
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (0, {"kl": "much"}),
        (0, {"kl": -1.0}),
        (0, {"kl": float("nan")}),
        (0, {"layers": None}),
        (0, {"layers": [2, 1]}),
        (0, {"layers": [0, 1]}),
        (0, {"kind": "router"}),
        (0, None),
        (-1, {"kl": 0.0}),
        (-1, {"kind": "head"}),
        (-1, None),
    ],
)
def test_losses_that_are_not_those_of_the_model_are_refused(
    row: int, change: dict[str, Any] | None, profile: Path, tmp_path: Path
) -> None:
    shutil.copytree(profile, tmp_path / "p")
    found = json.loads((tmp_path / "p" / "profile.json").read_text())
    taken = found["kind_losses"].pop(row)
    if change is not None:
        found["kind_losses"].append(taken | change)
    (tmp_path / "p" / "profile.json").write_text(json.dumps(found))
    merged = [(tmp_path / "p", profile)] if change != {"kl": 0.0} else []  # whose mean is not 0
    for profiles in [(tmp_path / "p",), *merged]:
        code, _, said = command("plan", *profiles, "--to", "gguf", "--budget", "3MiB")
        assert (code, said.count("\n")) == (4, 1), said
        assert "rofile" in said


def test_a_file_of_another_model_is_refused(profile: Path, tmp_path: Path) -> None:
    for name, value in (("experts", 8), ("matrices", []), ("rest_bytes", "many")):
        shutil.copytree(profile, tmp_path / name)
        found = json.loads((tmp_path / name / "profile.json").read_text())
        found["file"][name] = value
        (tmp_path / name / "profile.json").write_text(json.dumps(found))
        code, _, said = command("plan", tmp_path / name, "--to", "gguf", "--budget", "3MiB")
        assert (code, said.count("\n")) == (4, 1), said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"type": "Q9_K"}, "grids has the type Q9_K; give one of Q2_K"),
        ({"layers": None}, "must be ranges"),
        ({"layers": [3, 1]}, "must be ranges"),
        ({"kind": "router"}, "is not a valid plan: grids.0.kind"),
    ],
)
def test_a_plan_that_was_edited_wrongly_is_refused(
    change: dict[str, Any], says: str, profile: Path, tmp_path: Path
) -> None:
    plan = planned(profile, tmp_path / "plan.json", "--budget", "3MiB")
    plan["grids"][0] |= change
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code, _, said = command("quantize", "demo", "--plan", tmp_path / "plan.json", "-o", tmp_path / "q")
    assert (code, said.count("\n")) == (4, 1), said
    assert says in said


def test_a_plan_that_lost_its_types_is_refused_before_any_work(profile: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan = planned(profile, file, "--budget", "3MiB")
    assert any("there Q" in note or "there IQ" in note for note in plan["notes"])  # the demo's rows are narrow
    file.write_text(json.dumps(plan | {"grids": []}))
    code, _, said = command("quantize", "demo", "--plan", file, "-o", tmp_path / "q", "--dry-run")
    assert code == 4
    assert "has a curve and no grids" in said
    file.write_text(json.dumps(plan | {"grids": [row for row in plan["grids"] if row["kind"] != "attention"]}))
    code, _, said = command("quantize", "demo", "--plan", file, "-o", tmp_path / "q", "--dry-run")
    assert code == 2
    assert "grids give attention in layer 0 no type" in said


def test_a_planned_mix_goes_with_no_other_bits(profile: Path, tmp_path: Path) -> None:
    planned(profile, tmp_path / "plan.json", "--budget", "3MiB")
    for options, says in (
        (("--bits", "8"), "do not go with this plan"),
        (("--include", "attention"), "does not go with this plan"),
        (("--grid", "q4_k"), "plan again"),
    ):
        code, _, said = command("quantize", "demo", "--plan", tmp_path / "plan.json", "-o", tmp_path / "q", *options)
        assert code == 2
        assert says in said
