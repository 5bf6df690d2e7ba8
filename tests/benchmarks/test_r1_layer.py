"""The benchmark of R1's width and its projection, on a tiny R1; and the rules by which phases are scaled."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from r1_models import SMALL, make_r1

FOLDER = Path(make_r1.__file__).parent
RATES = {"forward_flops": 1e9, "fp32_flops": 1e9, "read_bytes_per_second": None, "write_bytes_per_second": 1e9}


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("r1_scaling")


def row(phase: str, seconds: float, *, flops: float = 0.0, size: int = 0, background: bool = False) -> dict[str, Any]:
    return {"layer": 1, "phase": phase, "seconds": seconds, "flops": flops, "bytes": size, "background": background}


def layer_and_work(scaling: ModuleType, tokens: int, experts: int) -> tuple[Any, Any]:
    config = make_r1.r1_config(dense_layers=1, moe_layers=1, experts=32, mtp=False, **SMALL)
    work = scaling.Work(tokens=tokens, window=64, experts=experts, routed=tokens * 8 * experts / 24)
    return scaling.layer_of(config, 1), work


def project(scaling: ModuleType, rows: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    layer, measured = layer_and_work(scaling, 1024, 6)
    _, wanted = layer_and_work(scaling, tokens, 24)
    found = scaling.project_quantize({r["phase"]: r for r in rows}, layer, measured, wanted, RATES)
    return {term.name: term for term in found}


def test_what_an_expert_costs_grows_with_experts_and_what_a_token_costs_with_tokens(scaling: ModuleType) -> None:
    rows = [row("factor", 2.0), row("hidden states", 3.0), row("read beside", 9.0, background=True)]
    terms = project(scaling, rows, 4096)
    assert terms.keys() == {"factor", "hidden states"}
    assert (terms["factor"].low, terms["factor"].high) == (8.0, 8.0)
    assert (terms["hidden states"].low, terms["hidden states"].high) == (12.0, 12.0)


def test_hessians_of_more_tokens_are_an_interval_and_of_as_many_almost_a_number(scaling: ModuleType) -> None:
    layer, measured = layer_and_work(scaling, 1024, 6)
    pooled, own, sample = scaling.hessian_parts(layer, measured)
    seconds = 3 * (pooled + own + sample) / RATES["fp32_flops"]  # at a third of the matmul rate
    terms = project(scaling, [row("Hessian", seconds)], 1024)
    expected = seconds * (pooled + 4 * own + 4 * sample) / (pooled + own + sample)
    assert terms["Hessian"].low == pytest.approx(expected)
    assert terms["Hessian"].high == pytest.approx(expected)
    # With four times the tokens an expert has more of its own, and is shown less of the sample.
    terms = project(scaling, [row("Hessian", seconds)], 4096)
    parts, less = pooled + own + sample, scaling.hessian_parts(*layer_and_work(scaling, 4096, 24))[2]
    assert less < 4 * sample
    most = seconds * (4 * pooled + 16 * own + 2 / 3 * 4 * sample) / parts + less / RATES["fp32_flops"]
    assert terms["Hessian"].high == pytest.approx(most)
    least = seconds * (2 / 3 * (pooled + 4 * own) + less) / parts + (4 * pooled + 16 * own) / RATES["fp32_flops"]
    assert terms["Hessian"].low == pytest.approx(least)
    assert terms["Hessian"].low < 0.9 * terms["Hessian"].high


def test_reading_grows_with_bytes_and_is_no_faster_than_the_disk(scaling: ModuleType) -> None:
    layer, measured = layer_and_work(scaling, 1024, 6)
    size = layer.rest_bytes + 6 * layer.expert_bytes
    rows = {
        "read": row("read", 1.0, size=layer.rest_bytes),
        "read beside": row("read beside", 2.0, size=6 * layer.expert_bytes, background=True),
    }
    _, wanted = layer_and_work(scaling, 1024, 24)
    (term,) = scaling.project_quantize(rows, layer, measured, wanted, RATES)
    projected = layer.rest_bytes + 24 * layer.expert_bytes
    assert term.low == pytest.approx(projected / size)
    slow = RATES | {"read_bytes_per_second": 1000.0}
    (term,) = scaling.project_quantize(rows, layer, measured, wanted, slow)
    assert (term.low, term.high) == (pytest.approx(projected / size), pytest.approx(projected / 1000))


def test_experts_that_were_read_for_every_chunk_of_tokens_are_read_more_often_with_more_tokens(
    scaling: ModuleType,
) -> None:
    layer, measured = layer_and_work(scaling, 1024, 32)
    _, wanted = layer_and_work(scaling, 4096, 32)
    whole = 32 * layer.expert_bytes
    for times, expected in ((1, (1.0, 1.0)), (3, (3.0, 4.0))):
        rows = {"read beside": row("read beside", 1.0, size=layer.rest_bytes + times * whole, background=True)}
        assert scaling.reading_passes(rows, layer, measured, wanted) == pytest.approx(expected)


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, FOLDER / script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_tiny_r1_is_measured_resumed_and_projected(tmp_path: Path, scaling: ModuleType) -> None:
    before = sorted((FOLDER / "results").iterdir())
    work, file = tmp_path / "r1", tmp_path / "r1-runs" / "r1_layer.json"
    said = run("r1_layer.py", "--work", str(work), "--small")
    assert "24 of 24 experts" in said
    report = json.loads(file.read_text())
    stages = {r["stage"]: r for r in report["rows"]}
    assert list(stages) == ["profile", "plan 24", "plan 16", "prune 24", "prune 16", "quantize", "quantize --resume"]
    assert all(r["peak_rss_mib"] > r["peak_anonymous_mib"] > 50 for r in report["rows"])
    assert stages["prune 16"]["output_bytes"] < stages["prune 24"]["output_bytes"] < report["checkpoint_bytes"]
    first, second = stages["quantize"], stages["quantize --resume"]
    assert (first["result"]["pieces_done"], second["result"]["pieces_done"]) == (1, 2)
    assert (second["solved_experts"], second["solved_tokens"], second["pieces_kept"]) == (24, 1024 * 8, 1)

    # What moepress counts is what the projection scales by.
    layer = scaling.layer_of(report["config"], 1)
    measured = scaling.Work(tokens=1024, window=64, experts=24, routed=1024 * 8)
    rows = scaling.by_phase(second["timings"]["rows"], 1)
    assert rows["Hessian"]["flops"] == pytest.approx(sum(scaling.hessian_parts(layer, measured)), rel=1e-6)
    # But for the router's rows of 8 experts that are pruned: of R1's width they are a few thousandths of the layer.
    forward = scaling.first_step_flops(layer, measured) + measured.routed * scaling.expert_forward(layer)
    forward -= 2.0 * measured.tokens * 8 * layer.hidden
    assert rows["forward"]["flops"] == pytest.approx(forward, rel=1e-6)
    assert rows["read beside"]["bytes"] == 24 * layer.expert_bytes

    run("r1_layer.py", "--work", str(work), "--small", "--stages", "prune")  # the other stages keep their figures
    again = {r["stage"]: r for r in json.loads(file.read_text())["rows"]}
    assert list(again) == list(stages)
    assert again["profile"] == stages["profile"]
    assert again["prune 24"]["wall_seconds"] != stages["prune 24"]["wall_seconds"]

    said = run("r1_projection.py", "--measured", str(file), "--tokens", "4096")
    projection = json.loads((tmp_path / "r1-runs" / "r1_projection.json").read_text())
    assert len(projection["rows"]) == 10
    for found in projection["rows"]:
        assert found["projected"]
        low, high = found["seconds"]
        assert 0 < low <= high
        assert low == pytest.approx(sum(term["low"] for term in found["terms"]))
        assert found["estimate"]["peak_memory_bytes"] > 0
    here = next(r for r in projection["rows"] if r["stage"] == "quantize" and r["experts"] == 24)
    factor = next(term for term in here["terms"] if term["name"] == "factor, 58 MoE")
    assert factor["low"] == pytest.approx(58 * rows["factor"]["seconds"])
    assert said.count("(projected)") == 11
    assert sorted((FOLDER / "results").iterdir()) == before
