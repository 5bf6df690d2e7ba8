"""The GPTQ benchmarks on the demo: moepress alone, and beside the peers where their environments are."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moepress.calibration.hessian import HessianOptions
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.options import SolverOptions
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.quantize import QuantizeRequest, quantize_stage

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
PEERS = ("gptqmodel", "llmcompressor", "autoround")
MODES = ("gptqmodel", "llmcompressor", "llmcompressor-routed", "autoround-rtn")
ENVIRONMENTS = Path.home() / ".cache" / "moepress-peers"
needs_peers = pytest.mark.skipif(
    not all((ENVIRONMENTS / peer / "bin" / "python").exists() for peer in PEERS),
    reason="benchmarks/peers/setup.sh gptqmodel, llmcompressor and autoround",
)


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gptq_quality")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gptq_speed")


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, FOLDER / script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_variant_differs_from_the_default_in_what_it_names(quality: ModuleType) -> None:
    default = (SolverOptions(), HessianOptions(), Scheme(), {}, None)
    made = [
        (SolverOptions(**v.solver), HessianOptions(**v.hessian), Scheme(**v.scheme), v.request, v.rounded)
        for v in quality.VARIANTS
    ]
    assert all(options != default for options in made)
    assert len({repr(options) for options in made}) == len(made)


def test_a_difference_from_the_default_is_taken_within_each_seed(quality: ModuleType) -> None:
    same = {"perplexity": 20.0, "log_change_error": 0.1, "kl_error": 0.1, "bytes": 10, "bits": 4}
    runs = [
        {"option": option, "seed": seed, "log_change": change + seed, "kl": 0.5, **same}
        for option, change in (("default", 1.0), ("other", 1.25))
        for seed in (0, 1)
    ]
    first, second = quality.summary(runs, "option", "default")
    assert first["log_change"]["mean"] == pytest.approx(1.5)
    assert second["log_change"]["spread"] == pytest.approx(0.5**0.5)
    assert second["log_change_over_default"] == {"mean": 0.25, "spread": 0.0}
    assert "| 4 | other | +175.000 ± 70.711 |" in quality.table([second], "option", "default")


def test_another_models_figures_lie_beside_those_of_the_default_one(quality: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    same = {"perplexity": 20.0, "log_change_error": 0.1, "kl_error": 0.1, "bytes": 10}

    def put(under: str | None, section: str, key: str, kl: float, seed: int = 0) -> dict[str, Any]:
        run = {key: "moepress", "bits": 4, "seed": seed, "log_change": 0.1, "kl": kl, **same}
        quality.write(file, under, section, [run], "moepress", key, {"model": under or "bench"})
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    put(None, "peers", "tool", 0.25)
    before = put(None, "options", "option", 0.5)
    put("wide", "peers", "tool", 0.125)
    after = put("wide", "peers", "tool", 0.375, seed=1)
    assert {name: after[name] for name in before} == before  # all of it, rows and runs
    assert set(after) == {"peers", "options", "wide"}
    own = after["wide"]["peers"]
    assert (own["model"], own["machine"]["model"]) == ("wide", "wide")
    assert [run["kl"] for run in own["runs"]] == [0.125, 0.375]
    assert own["rows"][0]["kl"]["mean"] == pytest.approx(0.25)


def test_a_trained_model_that_is_not_here_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    setting = importlib.import_module("setting")
    monkeypatch.setattr(setting, "SHARED", tmp_path)
    assert (setting.trained_model("demo") / "config.json").exists()
    with pytest.raises(SystemExit, match="the model wide is not here: it belongs to"):
        setting.trained_model("wide")


def test_weights_that_are_not_codes_times_scales_are_noticed(quality: ModuleType, tmp_path: Path) -> None:
    request = QuantizeRequest(
        scheme=Scheme(bits=3, group_size=32), include=frozenset({Include.SHARED}), solver=SolverOptions(sweeps=0)
    )
    folder = tmp_path / "out"
    quantize_stage("demo", Output(folder=folder), None, request, Calibration(tokens=512, window=128), Machine())
    artifact = quality.open_exact(folder)
    assert quality.check_reading(artifact) == len(quality.quantized_names(artifact)) > 100
    with pytest.raises(SystemExit, match="is not its codes times its scales"):
        quality.check_reading(open_artifact(folder))  # products rounded to bf16
    shapes = {**artifact.shapes, "more.weight": (4, 4)}
    with pytest.raises(SystemExit, match="quantized matrices are stored"):
        quality.check_reading(replace(artifact, shapes=shapes))


def test_a_tool_that_did_less_or_something_else_is_noticed(speed: ModuleType, tmp_path: Path) -> None:
    model, scheme, plain = speed.model_folder("demo"), Scheme(bits=4, group_size=32), SolverOptions(sweeps=0)

    def quantized(name: str, *include: Include, bits: int = 4) -> Path:
        folder, chosen = tmp_path / name, replace(scheme, bits=bits)
        request = QuantizeRequest(scheme=chosen, include=frozenset(include), solver=plain)
        quantize_stage("demo", Output(folder=folder), None, request, Calibration(tokens=512, window=128), Machine())
        return folder

    everything = (Include.ATTENTION, Include.SHARED, Include.DENSE)
    whole = quantized("whole", *everything)
    found = speed.require_quantized(whole, model, scheme)
    assert found["linears"] > 200
    assert 0.01 < found["weight_error"] < 0.2
    with pytest.raises(SystemExit, match=r"matrices are quantized, \d+ were to be"):
        speed.require_quantized(quantized("less", Include.SHARED), model, scheme)
    with pytest.raises(SystemExit, match="wanted was"):
        speed.require_quantized(whole, model, replace(scheme, bits=8))
    shard = sorted(whole.glob("*.safetensors"))[2]  # one layer of many
    tensors = load_file(shard)
    for name in tensors:
        if name.endswith("weight_packed"):
            tensors[name] = tensors[name].flip(0)  # rows of another matrix, in effect
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="differs from the model's by"):
        speed.require_quantized(whole, model, scheme)


def test_each_round_begins_with_the_next_tool_and_one_that_takes_long_is_in_the_first(speed: ModuleType) -> None:
    rounds = [speed.in_turn(["a", "b", "long"], ["long"], number) for number in range(3)]
    assert rounds == [["a", "b", "long"], ["b", "a"], ["a", "b"]]


def test_phases_are_summed_over_layers_and_held_against_the_matmul_rate_of_their_round(speed: ModuleType) -> None:
    tables = importlib.import_module("speed_tables")
    by_phase = importlib.import_module("quantizers").by_phase
    common = {"phase": "Hessian", "bytes": 0, "background": False}
    rows = [
        {**common, "layer": 0, "seconds": 1.0, "flops": 4e9},
        {**common, "layer": 1, "seconds": 3.0, "flops": 4e9},
        {**common, "layer": 1, "phase": "read beside", "seconds": 9.0, "flops": 0.0, "background": True},
    ]
    one = {"tool": "moepress", "phases": by_phase(rows), "fp32_flops": 4e9}
    other = {"tool": "moepress", "phases": by_phase(rows[:1] + rows[2:]), "fp32_flops": 8e9}
    hessian, beside, whole = tables.phases_of([one, other])
    assert (hessian["seconds"], hessian["flops_per_second"]) == (2.5, 3e9)  # of 4 s and 1 s; of 2 and 4 GFLOP/s
    assert hessian["of_matmul"] == pytest.approx(0.5)
    assert (beside["background"], whole["seconds"]) == (True, 2.5)
    assert "| Hessian | 2.50 | 100% |" in tables.phases_table([hessian, beside, whole])


def test_the_launcher_reports_the_command_and_not_itself(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code = "import sys, time; held = bytearray(200 << 20); time.sleep(0.2); sys.exit(3)"
    done = subprocess.run([sys.executable, FOLDER / "timed.py", report, sys.executable, "-c", code], check=False)
    found = json.loads(report.read_text())
    assert done.returncode == found["exit_status"] == 3
    assert 200 << 20 < found["peak_rss_bytes"] < 260 << 20
    assert 0.2 < found["wall_seconds"] < 30


def test_the_solver_is_timed_in_batches_and_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "cuda.json"
    options = ["--device", "cpu", "--small", "--repeat", "1", "--experts", "4"]
    assert "layer of 4 experts on cpu" in run("gptq_cuda.py", *options, "--json", str(file))
    found = json.loads(file.read_text())
    assert [row["solve"] for row in found["rows"]] == ["gate and up", "down"]
    for row in found["rows"]:
        assert row["codes_that_differ"] < 0.01  # sums in another order may tip a code
        assert row["losses"][0] == pytest.approx(row["losses"][1], rel=0.01)
        assert row["ratio"] > 0


def speed_rows(file: Path, *tools: str) -> dict[str, dict[str, Any]]:
    run("gptq_speed.py", "--quick", "--threads", "1", "--json", str(file), "--tools", *tools)
    found = json.loads(file.read_text())
    assert found["models"]["demo"]["tokens"] == 1024
    assert {sample["windows"] for sample in found["samples"]} == {found["samples"][0]["windows"]}
    return {row["tool"]: row for row in found["rows"]}


@pytest.mark.slow
def test_moepress_is_timed_on_the_demo(tmp_path: Path) -> None:
    row = speed_rows(tmp_path / "speed.json", "moepress")["moepress"]
    assert 0 < row["seconds_quantize"]["median"] < row["wall_seconds"]["median"]
    assert 150e6 < row["peak_rss_bytes"]["median"] < 2e9
    assert all(row[figure]["ratio"] == 1 for figure in ("wall_seconds", "cpu_seconds", "peak_rss_bytes"))


@pytest.mark.slow
def test_a_benchmark_that_was_stopped_goes_on_and_not_with_other_code(tmp_path: Path) -> None:
    file, work = tmp_path / "speed.json", tmp_path / "work"
    options = ["--quick", "--threads", "1", "--tools", "moepress", "--work", str(work), "--json", str(file)]
    run("gptq_speed.py", *options)
    first = json.loads(file.read_text())["samples"]
    run("gptq_speed.py", *options, "--repeat", "2")
    again = json.loads(file.read_text())["samples"]
    assert again[0] == first[0]
    assert [sample["round"] for sample in again] == [0, 1]
    about = json.loads((work / "about.json").read_text())
    (work / "about.json").write_text(json.dumps(about | {"code": "other"}))
    with pytest.raises(AssertionError, match="was begun with other code; give another --work"):
        run("gptq_speed.py", *options)


@pytest.mark.slow
def test_moepress_and_its_options_are_measured_on_the_demo(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    # The command takes the original's targets, and the default of the table of options its own.
    few = ["--quick", "--threads", "1", "--bits", "4", "--seeds", "0", "--json", str(file)]
    said = run("gptq_quality.py", *few, "--tools", "moepress", "--options", "sweeps 0", "match original")
    assert "| 4 | sweeps 0 |" in said
    run("gptq_quality.py", *few, "--model", "demo", "--only", "peers", "--tools", "moepress")
    found = json.loads(file.read_text())
    (alone,) = found["peers"]["runs"]
    assert found["demo"]["peers"]["runs"][0]["kl"] == pytest.approx(alone["kl"])  # --quick is of the demo anyway
    default, other, matched = found["options"]["runs"]
    assert default["option"] == "default"
    for figure in ("log_change", "kl", "bytes"):  # the command and the function do the same
        assert matched[figure] == pytest.approx(alone[figure], rel=1e-6)
    assert other["kl"] != default["kl"]
    assert 0 < alone["kl"] < 1
    assert found["options"]["rows"][1]["log_change_over_default"]["mean"] == pytest.approx(
        other["log_change"] - default["log_change"]
    )


@needs_peers
@pytest.mark.slow
def test_the_peers_quantize_the_same_matrices_and_are_timed(tmp_path: Path) -> None:
    rows = speed_rows(tmp_path / "speed.json", "moepress", *MODES)
    assert set(rows) == {"moepress", *MODES}
    assert rows["gptqmodel"]["wall_seconds"]["ratio"] > 1
    file, work = tmp_path / "quality.json", tmp_path / "work"
    few = ["--quick", "--threads", "1", "--bits", "4", "--seeds", "0", "--json", str(file), "--work", str(work)]
    run("gptq_quality.py", *few, "--only", "peers")
    runs = {r["tool"]: r for r in json.loads(file.read_text())["peers"]["runs"]}
    assert all(0 < r["kl"] < 0.5 for r in runs.values())
    assert len({r["windows"] for r in runs.values()}) == 1
    over = runs["gptqmodel"]["log_change"] - runs["moepress"]["log_change"]
    assert runs["gptqmodel"]["log_over_moepress"] == pytest.approx(over, abs=1e-6)
    written = {done: done.stat().st_mtime_ns for done in work.glob("*/DONE.json")}
    run("gptq_quality.py", *few, "--only", "peers")  # the peers' outputs are taken again, ours is made anew
    changed = {done.parent.name.split("-")[0] for done, time in written.items() if done.stat().st_mtime_ns != time}
    assert changed == {"moepress"}
