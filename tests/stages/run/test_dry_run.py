"""`run --dry-run` against the run itself: sizes of what it leaves, bits by layer under a budget, a resume's plan."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from stage_runs import command

from moepress.compress.pruning.plan import plan_text
from moepress.converters.onnx.folder import open_onnx
from moepress.converters.safetensors.artifact import open_artifact
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages import validate
from moepress.stages.places import Calibration, Machine, Output, model_folder
from moepress.stages.plan import plan_within
from moepress.stages.profile import profile_stage
from moepress.stages.run import run
from moepress.stages.run.dry_run import BUDGET_NOTE, estimate_recipe
from moepress.stages.run.recipe import budget_request, make_recipe, wish_of
from moepress.validation.speed.timing import Bench

SMALL = ["--tokens", "1024", "--window", "64", "--max-windows", "1", "--max-memory", "1GiB", "--group-size", "32"]
EXPORTS = ["--include", "attention", "--repair", "gain", "--to", "gptq,onnx"]
STAGES = ["profile", "repair", "quantize", "export-gptq", "export-onnx", "export-onnx-before"]


def dry(out: Path, *arguments: str) -> Any:
    """What `moepress run demo --dry-run --json` prints."""
    code, printed, errors = command("run", "demo", "-o", out, *SMALL, *arguments, "--dry-run", "--json")
    assert code == 0, errors
    return json.loads(printed)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Throughput on few tokens."""
    monkeypatch.setattr(validate, "Bench", functools.partial(Bench, prompt=16, decode=4, repetitions=2))


def onnx_files_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in [*folder.glob("*.onnx"), *folder.glob("*.data")])


@pytest.mark.usefixtures("quick")
def test_every_stage_is_foretold_and_sizes_are_those_of_the_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = dry(out, *EXPORTS)
    assert list(tmp_path.iterdir()) == []
    assert [name for name in found if isinstance(found[name], dict) and "disk_bytes" in found[name]] == [*STAGES, "all"]
    code, _, errors = command("run", "demo", "-o", out, *SMALL, *EXPORTS)
    assert code == 0, errors
    artifact, exports = open_artifact(out / "model"), out / "exports"
    assert found["sizes"]["after_bytes"] == artifact.total_bytes
    assert found["quantize"]["output_bytes"] == pytest.approx(artifact.total_bytes, rel=0.002)
    assert found["export-gptq"]["output_bytes"] == open_artifact(exports / "gptq").total_bytes
    for name in ("onnx", "onnx-before"):  # gaps between pages: little, but so are these files
        row = found[f"export-{name}"]
        assert row["output_bytes"] == pytest.approx(onnx_files_bytes(exports / name), rel=0.02)
        assert row["disk"] == {"output": row["output_bytes"]}
    assert found["export-onnx-before"]["output_bytes"] == open_onnx(exports / "onnx-before").total_bytes
    whole = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert found["all"]["disk_bytes"] == pytest.approx(whole, rel=0.1)


def test_all_adds_times_and_outputs_and_takes_the_largest_memory(tmp_path: Path) -> None:
    found = dry(tmp_path / "out", *EXPORTS)
    rows = [found[name] for name in STAGES]
    assert found["all"]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert found["all"]["output_bytes"] == sum(row["output_bytes"] for row in rows)
    assert found["all"]["peak_memory_bytes"] == max(row["peak_memory_bytes"] for row in rows)
    assert found["all"]["disk_bytes"] >= found["all"]["output_bytes"]
    assert "bit losses" not in found["repair"]["time"] or not found["repair"]["time"]["bit losses"]


def test_the_table_shows_every_stage(tmp_path: Path) -> None:
    code, printed, errors = command("run", "demo", "-o", tmp_path / "out", *SMALL, *EXPORTS, "--dry-run")
    assert code == 0, errors
    assert all(f"{name}, memory: " in printed for name in [*STAGES, "all"])
    assert "What the report takes" in printed


def test_an_original_without_room_is_left_out_and_the_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_free_memory", lambda: 30 << 20)  # the demo has 18 MB
    found = dry(tmp_path / "out", "--to", "onnx")
    assert "export-onnx" in found
    assert "export-onnx-before" not in found
    assert any(note.startswith("The original has no throughput in ONNX Runtime") for note in found["all"]["notes"])


def test_a_budget_is_filled_with_bits_by_layer(tmp_path: Path) -> None:
    limit = 19 << 18
    asked = ["--budget", str(limit), "--mixed-bits", "--experts", "16", "--include", "attention"]
    found = dry(tmp_path / "out", *asked)
    assert list(found["layer_bits"]) == [
        str(layer) for layer in open_checkpoint(model_folder("demo")).outline.moe_layers
    ]
    assert len(set(found["layer_bits"].values())) > 1
    assert found["sizes"]["after_bytes"] <= limit
    assert found["quantize"]["output_bytes"] == pytest.approx(found["sizes"]["after_bytes"], rel=0.002)
    smallest = dry(tmp_path / "out", "--experts", "16", "--bits", "2", "--include", "attention")
    assert smallest["layer_bits"] == {}
    assert found["quantize"]["output_bytes"] > 1.1 * smallest["quantize"]["output_bytes"]
    assert BUDGET_NOTE in found["all"]["notes"]
    assert BUDGET_NOTE not in smallest["all"]["notes"]


def test_a_resume_is_estimated_by_the_plan_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    values = {"model": "demo", "tokens": 1024, "window": 64, "budget": 20 << 18, "mixed_bits": True}
    profile = profile_stage("demo", Output(folder=tmp_path / "profile"), Calibration(tokens=1024, window=64), Machine())
    asked = make_recipe(values)
    request = budget_request(asked)
    assert request is not None
    plan = plan_within(profile, request, wish_of(asked))
    before = estimate_recipe(asked, out, resume=True)
    (out / "plan.json").write_text(plan_text(plan), encoding="utf-8")
    after, ignored = estimate_recipe(asked, out, resume=True), estimate_recipe(asked, out)
    assert (after.settled.count, after.sizes) == (plan.experts, plan.sizes.model_dump())
    assert after.settled.layer_bits == plan.layer_bits
    assert BUDGET_NOTE not in after.stages["all"]["notes"]
    assert before.settled == ignored.settled != after.settled
    assert BUDGET_NOTE in before.stages["all"]["notes"]
