"""The benchmark of pruning and repair: seeds put together, rows held against each other, rounds, what a rerun takes."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from r1_models import make_r1
from stage_runs import in_torch

from moepress.calibration.profile import load_profile
from moepress.models.families.family import require_legal
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.places import Calibration, Machine, Output, model_folder
from moepress.stages.profile import profile_stage

FOLDER = Path(make_r1.__file__).parent


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prune_tables")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prune_quality")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prune_setting")


def seed_row(seed: int, perplexity: float, kl: float, paired: float = 0.003, **key: Any) -> dict[str, Any]:
    change = perplexity / 10 - 1
    domains = {"a": perplexity - 1, "b": perplexity + 1}
    row = {"seed": seed, "perplexity": perplexity, "change": change, "paired_error": paired, "kl": kl}
    return row | {"domains": domains, "kl_by_domain": {"a": kl, "b": kl}} | key


def cell(criterion: str, repair: str = "none") -> dict[str, Any]:
    return {"criterion": criterion, "keep": 0.5, "repair": repair}


def test_seeds_give_a_mean_and_both_errors(tables: ModuleType) -> None:
    rows = [seed_row(0, 11, 0.1, 0.003, bits=4), seed_row(1, 12, 0.2, 0.004, bits=4), seed_row(2, 13, 0.3, 0.0, bits=4)]
    (found,) = tables.means(rows, ("bits",))
    assert found["bits"] == 4
    assert found["perplexity"] == pytest.approx(12)
    assert found["change"] == pytest.approx(0.2)
    assert found["seed_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["kl_seed_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["paired_error"] == pytest.approx(math.sqrt((9 + 16) / 3) * 1e-3)
    assert found["domains"] == {"a": pytest.approx(11), "b": pytest.approx(13)}
    alone = tables.means([seed_row(0, 11, 0.1, bits=4), seed_row(0, 11, 0.1, bits=3)], ("bits",))
    assert [(row["bits"], row["seed_error"]) for row in alone] == [(4, None), (3, None)]


def test_rows_are_held_against_those_of_the_same_seed(tables: ModuleType) -> None:
    rows = [
        seed_row(0, 12, 0.2, **cell("reap")),
        seed_row(1, 14, 0.4, **cell("reap")),
        seed_row(0, 11, 0.1, **cell("reap", "gain")),
        seed_row(1, 14, 0.5, **cell("reap", "gain")),
        seed_row(0, 13, 0.3, **cell("random")),
        seed_row(0, 15, 0.3, **cell("random")),
        seed_row(1, 14, 0.2, **cell("reap, 2 rounds")),
    ]
    (repair,) = tables.repair_effect(rows)
    assert (repair["keep"], repair["name"], repair["cells"], repair["better"]) == (0.5, "gain", 2, 1)
    assert repair["perplexity"] == pytest.approx(math.log(11 / 12) / 2)
    assert repair["kl"] == pytest.approx((-0.5 + 0.25) / 2)
    assert repair["kl_error"] == pytest.approx(0.75 / 2)
    chance, rounds = tables.criterion_effect(rows)
    assert (chance["name"], chance["cells"], chance["better"]) == ("random", 2, 0)
    assert chance["perplexity"] == pytest.approx((math.log(13 / 12) + math.log(15 / 12)) / 2)
    assert (rounds["name"], rounds["cells"], rounds["kl"]) == ("reap, 2 rounds", 1, pytest.approx(-0.5))
    assert tables.rounds_effect(rows) == [rounds]
    original = {"perplexity": 10.0, "domains": {"a": 9.0, "b": 11.0}}
    lines = list(tables.markdown({"pruning": {"0": {"original": original, "rows": rows}}}))
    assert "| 50% | gain | -4.35 ± 4.35 % | -12.5 ± 37.5 % | 1 of 2 |" in lines
    assert len({line.count("|") for line in lines[: lines.index("")]}) == 1


def test_counts_are_legal_for_groups(settings: ModuleType) -> None:
    base = open_checkpoint(model_folder("demo"))
    assert [settings.count_of(base, share) for share in (0.75, 0.5, 0.3)] == [12, 8, 4]


def test_two_rounds_give_a_legal_keep_set_of_the_first_one(
    benchmark: ModuleType, settings: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "bench_model", lambda: model_folder("demo"))
    monkeypatch.setattr(
        benchmark, "calibration", lambda seed, tokens: Calibration(tokens=tokens, window=128, seed=seed)
    )
    base, setting = open_checkpoint(model_folder("demo")), settings.Setting(tokens=2048)
    profile_stage("demo", Output(folder=tmp_path / "p"), benchmark.calibration(0, 2048), Machine(), bit_losses=False)
    profile = load_profile(tmp_path / "p")
    keep = benchmark.two_rounds(base, profile, "reap", 8, 0, setting, tmp_path / "work")
    first = benchmark.keep_sets(profile, benchmark.selection(profile, "reap", 12))
    assert set(keep) == set(first)
    require_legal(base.shape, 8, degroup=False)
    size = base.shape.experts // base.shape.groups
    for layer, kept in keep.items():
        assert kept == sorted(kept)
        assert set(kept) < set(first[layer])
        assert [sum(e // size == g for e in kept) for g in range(base.shape.groups)] == [8 // base.shape.groups] * (
            base.shape.groups
        )
    again = benchmark.profile_again(base, profile, first, 0, setting, tmp_path / "work")
    assert all(found["count"].shape[2] == 12 for found in in_torch(again).values())
    tokens = {float(found["count"].sum()) for found in in_torch(again).values()}
    assert tokens == {float(found["count"].sum()) for found in in_torch(profile).values()}  # all are routed anew
    assert list((tmp_path / "work").iterdir()) == []


def tokens_of(seed: int, setting: Any, work: Path) -> dict[str, Any]:
    """Stands for a measurement: leaves a file, and what it was given."""
    (work / f"ran-{seed}").touch()
    return {"rows": [{"seed": seed, "tokens": setting.tokens}]}


def test_a_rerun_takes_finished_seeds_of_the_same_setting(settings: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results" / "prune.json"

    def run(part: str, seeds: tuple[int, ...], tokens: int = 7) -> tuple[Any, set[str]]:
        for old in tmp_path.glob("ran-*"):
            old.unlink()
        setting = settings.Setting(seeds=seeds, tokens=tokens)
        found = settings.over_seeds(part, tokens_of, setting, tmp_path, file, 1)
        return found, {done.name for done in tmp_path.glob("ran-*")}

    found, ran = run("a", (0, 1))
    assert ran == {"ran-0", "ran-1"}
    held = json.loads(file.read_text())
    del held["parts"]["a"]["seeds"]["1"]  # as a run leaves it that was killed in its second seed
    file.write_text(json.dumps(held))
    assert run("a", (0, 1)) == (found, {"ran-1"})
    assert run("a", (0, 1)) == (found, set())
    other, ran = run("a", (0, 1), tokens=8)
    assert ran == {"ran-0", "ran-1"}
    assert other["0"]["rows"] == [{"seed": 0, "tokens": 8}]
    run("b", (5,))
    assert {part: list(held["seeds"]) for part, held in settings.read_results(file).items()} == {
        "a": ["0", "1"],
        "b": ["5"],
    }
