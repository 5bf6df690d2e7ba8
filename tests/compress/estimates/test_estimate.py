"""Estimates against real runs, and the terms they are made of against figures worked out by hand."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from r1_models import small_r1
from stage_runs import keep_of, pruned_folder

from moepress.calibration.hessian import gram, gram_flops
from moepress.calibration.observe import _open_buffers, blocks_of
from moepress.compress.budget.sizes import part_sizes
from moepress.compress.estimates import repair
from moepress.compress.estimates.estimate import Estimate
from moepress.compress.estimates.figures import Figures, figures_of, included_matrices, pressed_sizes
from moepress.compress.estimates.footprint import (
    Workload,
    buffer_bytes,
    kept_outputs,
    least_memory,
    limits_of,
    resident,
)
from moepress.compress.estimates.profile import estimate_profile
from moepress.compress.estimates.prune import estimate_prune
from moepress.compress.estimates.quantize import estimate_quantize
from moepress.compress.estimates.rates import ASSUMED_READ, Rates, matmul_rate, measure_rates, read_rate
from moepress.compress.gptq.include import Include
from moepress.compress.pruning import refit
from moepress.compress.pruning.plan import estimate_sizes
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import MoepressError
from moepress.models.families.family import Part
from moepress.models.forward.inventory import inventory
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, open_stream
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.profile import profile_stage

CPU = torch.device("cpu")
G128 = Scheme(bits=4, group_size=128)
STAGES = ("profile", "quantize", "original", "everything", "max")
# The last three: --match original, every Linear, --effort max.
# hidden 512, so that matrices weigh more than what every process needs.
MIDDLING = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "v_head_dim": 32,
    "vocab_size": 2048,
}
RATES = Rates(
    device="cpu",
    forward_flops=1e11,
    solver_flops=1e11,
    search_seconds=5e-8,
    load_seconds=1e-8,
    read_bytes_per_second=1e9,
    read_measured=True,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("estimate") / "model"
    return open_checkpoint(small_r1(folder, moe_layers=1, experts=16, **MIDDLING))


@pytest.fixture(scope="module")
def figures(model: Checkpoint) -> Figures:
    return figures_of(model)


def workload(**changes: Any) -> Workload:
    return Workload(
        **{"tokens": 8192, "window": 256, "device": CPU, "dtype": torch.float32, "memory_bytes": 1 << 30, **changes}
    )


def quantizing(model: Checkpoint, figures: Figures, *include: Include, count: int = 16, **changes: Any) -> Estimate:
    return estimate_quantize(model, figures, count, G128, workload(**changes), RATES, include=include)


@pytest.fixture(scope="module")
def runs(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Estimate and what was measured, of profile and quantize, in a process of their own."""
    script, work = Path(__file__).with_name("estimated_run.py"), tmp_path_factory.mktemp("runs") / "work"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    arguments = [sys.executable, str(script), str(model.folder), str(work)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_time_is_projected_within_a_factor_of_five(runs: dict[str, Any], stage: str) -> None:
    estimate, measured = runs[stage]
    assert measured["seconds"] / 5 < estimate["seconds"] < 5 * measured["seconds"]


@pytest.mark.parametrize("stage", STAGES)
def test_peak_memory_is_never_above_the_estimate(runs: dict[str, Any], stage: str) -> None:
    estimate, measured = runs[stage]
    assert measured["memory"] <= estimate["peak_memory_bytes"]
    assert estimate["peak_memory_bytes"] < 2 * measured["memory"]


def test_disk_is_estimated_within_a_fifth(runs: dict[str, Any]) -> None:
    for stage in STAGES:
        estimate, measured = runs[stage]
        assert estimate["disk_bytes"] == pytest.approx(measured["disk"], rel=0.2)
    estimate, measured = runs["quantize"]
    assert estimate["output_bytes"] == pytest.approx(measured["output"], rel=0.05)


def test_the_original_beside_doubles_what_goes_with_tokens(model: Checkpoint, figures: Figures) -> None:
    for include in ((), (Include.ATTENTION,)):
        work = workload(memory_bytes=1 << 31)
        own, original = (
            estimate_quantize(model, figures, 16, G128, work, RATES, include=include, original_targets=both)
            for both in (False, True)
        )
        assert original.memory["token buffers"] == 2 * own.memory["token buffers"]
        assert original.disk["hidden states"] == 2 * own.disk["hidden states"]
        assert original.time["forward"] == 2 * own.time["forward"]
        assert original.time["targets"] > 0
        assert original.memory["solver"] > own.memory["solver"]
        # Where nothing but experts is quantized, both streams share what is loaded of a layer.
        assert (original.memory["layer"] > own.memory["layer"]) == bool(include)
        assert original.output_bytes == own.output_bytes
    small = workload(memory_bytes=1 << 20)
    own, original = (buffer_bytes(figures, small, limits_of(figures, small), observe=False, streams=n) for n in (1, 2))
    assert sum(original) == 2 * sum(own)


def test_sizes_by_part_add_up_to_the_plan_s(model: Checkpoint, figures: Figures) -> None:
    for count, scheme in ((16, None), (8, None), (16, G128), (8, G128)):
        expected = estimate_sizes(inventory(model), model.shape, count, scheme).after_bytes
        assert sum(pressed_sizes(model, figures, count, scheme).values()) == pytest.approx(expected, abs=10)
    assert Part.MTP not in part_sizes(inventory(model), model.shape, 16, None)


def test_included_parts_are_counted_with_their_bits(model: Checkpoint, figures: Figures) -> None:
    plain, packed = (pressed_sizes(model, figures, 16, G128, include) for include in ((), (Include.SHARED,)))
    shared = figures.parameters(Part.SHARED)
    assert plain[Part.SHARED] == 2 * shared
    assert packed[Part.SHARED] == pytest.approx(shared * 4.125 / 8)
    assert {part: size for part, size in packed.items() if part is not Part.SHARED} == {
        part: size for part, size in plain.items() if part is not Part.SHARED
    }
    (gate_up, down) = sorted(included_matrices(model, (Include.SHARED,)), key=lambda m: -m.rows * m.columns)
    assert (gate_up.rows, gate_up.columns, gate_up.count) == (512, 512, 1)
    assert (down.rows, down.columns, down.count) == (512, 256, 1)


def test_prune_is_what_it_writes(model: Checkpoint, tmp_path: Path) -> None:
    result = pruned_folder(model.folder, keep_of(model, 8 * 2), tmp_path / "out")
    found = estimate_prune(result["bytes_after"], RATES)
    assert found.disk_bytes == found.output_bytes == result["bytes_after"]
    assert found.seconds == pytest.approx(sum(found.time.values()))
    assert found.time["read"] == result["bytes_after"] / 1e9
    assert estimate_prune(100).seconds is None


def test_the_buffers_are_those_that_a_walk_allocates(figures: Figures, tmp_path: Path) -> None:
    work = workload(memory_bytes=40 << 20)
    limits = limits_of(figures, work)
    inside, outside = buffer_bytes(figures, work, limits, observe=True)
    scratch = Scratch(tmp_path, limits.memory_bytes)
    hidden, k, e = figures.shape.hidden, figures.shape.top_k, figures.shape.experts
    rows = (("hidden", hidden, torch.float32), ("inputs", hidden, torch.float32), ("chosen", k, torch.int64))
    rows += (("weights", k, torch.float32), ("residual", hidden, torch.float32), ("logits", e, torch.float32))
    total = sum(scratch.tensor(name, (work.tokens, width), dtype).nbytes for name, width, dtype in rows)
    in_files = sum(path.stat().st_size for path in scratch.files.values())
    scratch.close()
    assert (inside, outside) == (total - in_files, in_files)
    assert in_files > 0


def test_large_embedding_tables_are_read_by_rows_just_as_the_forward_pass_does() -> None:
    from moepress.compress.estimates import footprint
    from moepress.models.forward import streamed

    assert footprint._TABLE_BYTES == streamed._TABLE_BYTES


def test_scores_are_only_held_where_values_are_wider_than_keys(figures: Figures) -> None:
    """Narrower values are padded (models/forward/attention.py), and the fused kernel holds no scores."""
    limits, attention = Limits(memory_bytes=1, batch_windows=1), figures.attention
    narrow, wide = (replace(attention, key_width=key, value_width=value) for key, value in ((48, 32), (32, 48)))
    for found, linear in ((narrow, True), (wide, False), (replace(wide, key_width=48), True)):
        changed = replace(figures, attention=found)
        few, many = (
            resident(changed, workload(window=window), limits, (0, 0))["activations"] for window in (1024, 4096)
        )
        assert (many == 4 * few) is linear


def test_no_rates_no_seconds(model: Checkpoint, figures: Figures) -> None:
    found = estimate_quantize(model, figures, 16, G128, workload())
    assert found.seconds is None
    assert found.time == {}
    assert found.disk_bytes > found.output_bytes > 0


def test_every_term_grows_with_what_it_stands_for(model: Checkpoint, figures: Figures) -> None:
    base, longer = quantizing(model, figures), quantizing(model, figures, tokens=16_384)
    for term in ("forward", "attention scores", "Hessians", "hidden states"):
        assert longer.time[term] > 1.5 * base.time[term]
    for term in ("read", "load", "factor", "solve", "rounding", "write"):
        assert longer.time[term] == base.time[term]
    fewer = quantizing(model, figures, count=8)
    for term in ("factor", "solve"):
        assert fewer.time[term] == pytest.approx(base.time[term] / 2)
    assert fewer.time["rounding"] < base.time["rounding"]
    assert fewer.tokens_per_expert == 2 * (base.tokens_per_expert or 0)


def test_included_linears_cost_time_and_memory(model: Checkpoint, figures: Figures) -> None:
    base, more = (
        quantizing(model, figures, *include, memory_bytes=64 << 20)
        for include in ((), (Include.ATTENTION, Include.LM_HEAD))
    )
    for term in ("forward", "Hessians", "factor", "solve", "rounding"):
        assert more.time[term] > base.time[term]
    assert more.output_bytes < base.output_bytes
    assert base.memory["other Linears"] == base.memory["waiting tokens"] == more.memory["waiting tokens"] == 0
    assert more.memory["other Linears"] > more.memory["solver"]  # lm_head is the widest matrix of all


def test_tokens_wait_where_memory_is_enough_and_save_forward_passes(model: Checkpoint, figures: Figures) -> None:
    waits, again = (
        quantizing(model, figures, Include.ATTENTION, memory_bytes=memory) for memory in (1 << 30, 64 << 20)
    )
    assert waits.memory["waiting tokens"] > 0 == again.memory["waiting tokens"]
    assert waits.peak_memory_bytes > again.peak_memory_bytes
    assert waits.time["forward"] < again.time["forward"]
    assert waits.time["Hessians"] == again.time["Hessians"]


def test_the_cost_of_a_hessian_is_the_triangle_that_is_formed() -> None:
    def formed(columns: int, strip: int) -> float:
        return sum(2.0 * (columns - start) * min(strip, columns - start) for start in range(0, columns, strip))

    assert gram_flops(1, 128) == 2 * 128**2
    for columns, strip in ((512, 128), (768, 128), (1024, 256), (7168, 256)):
        assert gram_flops(1, columns) == formed(columns, strip)
    ones = gram(torch.ones(2, 1500))  # and the other triangle is filled in
    assert torch.equal(ones, torch.full((1500, 1500), 2.0))


def test_little_memory_sends_the_experts_outputs_to_a_file(figures: Figures) -> None:
    inside = estimate_profile(figures, workload(memory_bytes=4 << 30), RATES)
    outside = estimate_profile(figures, workload(memory_bytes=64 << 20), RATES)
    assert inside.time["read"] == outside.time["read"]
    table = 8192 * (figures.shape.top_k + 1) * figures.shape.hidden * 4
    assert (inside.disk["experts' outputs"], outside.disk["experts' outputs"]) == (0, table)
    assert outside.disk_bytes >= inside.disk_bytes + table
    assert outside.time["experts' outputs"] == 2 * figures.moe_layers * table / 1e9
    assert inside.memory["token buffers"] - outside.memory["token buffers"] >= table
    assert not any("every expert is read" in note for found in (inside, outside) for note in found.notes)
    without = estimate_profile(figures, workload(memory_bytes=64 << 20), RATES, leave_one_out=False)
    assert without.disk["experts' outputs"] == 0
    assert without.disk_bytes < outside.disk_bytes


def test_little_disk_as_well_makes_a_profile_read_its_experts_again(figures: Figures) -> None:
    work = {"tokens": 1 << 16, "memory_bytes": 64 << 20}
    once, often = (estimate_profile(figures, workload(**work, free_bytes=n), RATES) for n in (1 << 40, 1 << 20))
    assert often.time["read"] - once.time["read"] == pytest.approx(7 * figures.parts[Part.ROUTED].bytes / 1e9)
    assert any("every expert is read 8 times" in note for note in often.notes)
    assert often.disk["experts' outputs"] == once.disk["experts' outputs"] / 8
    assert often.time["experts' outputs"] == once.time["experts' outputs"]


def test_a_profile_that_the_disk_cannot_hold_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: there._replace(free=1000))
    place, text = Output(folder=tmp_path / "profile"), Calibration(tokens=1024, window=64)
    with pytest.raises(MoepressError, match=r"free and the output .* needs about .* MiB"):
        profile_stage("demo", place, text, Machine())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("memory", [1 << 20, 24 << 20, 1 << 30])
def test_what_is_kept_of_the_outputs_is_what_a_profile_allocates(
    model: Checkpoint, figures: Figures, tmp_path: Path, memory: int, leave_one_out: bool
) -> None:
    work = workload(tokens=1024, memory_bytes=memory)
    limits = limits_of(figures, work)
    inside, outside = buffer_bytes(figures, work, limits, observe=True)
    kept = kept_outputs(figures, work, limits, inside, leave_one_out=leave_one_out)
    scratch, windows = Scratch(tmp_path, memory), torch.zeros(4, 256, dtype=torch.int64)
    stream = open_stream(StreamedModel(model, device=CPU, dtype=torch.float32), windows, scratch, limits, observe=True)
    assert _open_buffers(stream, blocks_of(stream), leave_one_out=leave_one_out) == kept.tokens == 1024
    assert memory // 2 - scratch.left_bytes == inside + kept.memory
    in_files = sum(path.stat().st_size for path in scratch.files.values())
    scratch.close()
    assert in_files == outside + kept.mapped + kept.table


def test_a_refitted_router_costs_time_memory_and_disk(figures: Figures) -> None:
    assert (repair.ROUNDS, repair.PART_TOKENS) == (refit.ROUNDS, refit.PART_TOKENS)
    work = Workload(tokens=4096, window=64, device=CPU, dtype=torch.float32)
    plain, more = (repair.estimate_repair(figures, work, RATES, router=router) for router in (False, True))
    shape, slots = figures.shape, 2 * figures.shape.top_k
    assert more.memory["inner products"] == 4 * 4096 * slots * (slots + 1)
    assert more.memory["router"] > 3 * 8 * shape.hidden**2
    assert more.peak_memory_bytes == plain.peak_memory_bytes + more.memory["inner products"] + more.memory["router"]
    assert more.disk_bytes - plain.disk_bytes == 4 * shape.experts * shape.hidden * figures.moe_layers
    assert plain.seconds is not None
    assert more.seconds is not None
    assert more.time["router"] > 0
    assert more.seconds > plain.seconds + more.time["router"]
    small = repair.estimate_repair(figures, replace(work, memory_bytes=1 << 20), RATES, router=True)
    assert small.memory["inner products"] == 0
    assert small.disk["inner products"] == more.memory["inner products"]


def test_refitted_down_projections_cost_time_memory_and_disk(figures: Figures) -> None:
    work = Workload(tokens=4096, window=64, device=CPU, dtype=torch.float32)
    plain, more, twice = (repair.estimate_repair(figures, work, RATES, down=kept) for kept in (0, 4, 8))
    shape, routed = figures.shape, figures.parts[Part.ROUTED]
    size = 4 * figures.moe_layers * shape.expert_width * shape.hidden * routed.bytes // routed.parameters
    assert more.disk_bytes - plain.disk_bytes == size
    assert twice.disk_bytes - plain.disk_bytes == 2 * size
    assert more.memory["what is lacking"] == 4 * 4096 * shape.hidden
    assert more.peak_memory_bytes == (
        plain.peak_memory_bytes + more.memory["what is lacking"] + more.memory["down projections"]
    )
    assert plain.seconds is not None
    assert more.seconds is not None
    assert twice.seconds is not None
    assert plain.seconds < more.seconds < twice.seconds
    small = repair.estimate_repair(figures, replace(work, memory_bytes=1 << 20), RATES, down=4)
    assert small.memory["what is lacking"] == 0
    assert small.disk["what is lacking"] == more.memory["what is lacking"]


def test_too_little_memory_is_said_with_the_least(model: Checkpoint, figures: Figures) -> None:
    small = quantizing(model, figures, memory_bytes=64 << 20)
    assert any("--max-memory 64.0 MiB is too little" in note for note in small.notes)
    assert len(quantizing(model, figures, memory_bytes=8 << 30).notes) == 1
    assert least_memory(figures, workload(), None) < small.peak_memory_bytes


def test_without_a_limit_this_machine_is_the_limit(
    model: Checkpoint, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = psutil.virtual_memory()
    assert len(quantizing(model, figures, memory_bytes=None).notes) == 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there._replace(available=-(1 << 31)))
    assert "the peak is above that" in quantizing(model, figures, memory_bytes=None, tokens=1 << 20).notes[1]


def test_a_gpu_holds_no_token_buffers(model: Checkpoint, figures: Figures) -> None:
    assert quantizing(model, figures).device_memory_bytes is None
    few, many = (quantizing(model, figures, device=torch.device("meta"), tokens=n) for n in (1 << 19, 1 << 20))
    assert few.device_memory_bytes == many.device_memory_bytes
    assert many.peak_memory_bytes > few.peak_memory_bytes


def test_rates_are_measured(model: Checkpoint) -> None:
    rates = measure_rates(model, CPU, torch.float32)
    assert 1e8 < rates.solver_flops < 1e14
    assert 1e-11 < rates.search_seconds < 1e-5
    assert 1e-11 < rates.load_seconds < 1e-5
    assert (rates.read_bytes_per_second, rates.read_measured) == (ASSUMED_READ, False)  # too small to tell
    assert matmul_rate(CPU) > 1e8


def test_the_disk_is_read_past_the_cache_and_holes_tell_nothing(tmp_path: Path) -> None:
    full, hollow = tmp_path / "full", tmp_path / "hollow"
    full.write_bytes(os.urandom(80 << 20))
    os.sync()
    with hollow.open("wb") as stream:
        stream.truncate(1 << 33)
    assert read_rate([hollow]) is None
    assert read_rate([]) is None
    found = read_rate([hollow, full])
    assert found is None or 1e6 < found < 1e11  # None: a disk so slow that half a second does not reach 64 MiB


Models = Callable[..., Path]


@pytest.mark.parametrize("key", ["mixtral", "qwen2_moe", "deepseek_v2_lite"])
def test_every_family_can_be_estimated(tiny_model: Models, key: str) -> None:
    checkpoint = open_checkpoint(tiny_model(key))
    found = figures_of(checkpoint)
    scheme = Scheme(bits=4, group_size=32)
    for estimate in (
        estimate_profile(found, workload(), RATES),
        estimate_quantize(checkpoint, found, checkpoint.shape.experts, scheme, workload(), RATES),
    ):
        assert estimate.seconds == pytest.approx(sum(estimate.time.values()))
        assert all(value >= 0 for value in (*estimate.time.values(), *estimate.memory.values()))
        assert estimate.peak_memory_bytes > 0
