"""The benchmark of routers refitted: its table by hand, and one small seed from end to end on the embedded model."""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from r1_models import make_r1

FOLDER = Path(make_r1.__file__).parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prune_router")


def row(seed: int, repair: str, kl: float) -> dict[str, Any]:
    return {"keep": 0.5, "repair": repair, "seed": seed, "change": 0.06, "kl": kl, "same_top1": 0.8}


def test_what_is_given_back_is_paired_by_seed(benchmark: ModuleType) -> None:
    seeds = {
        "0": {"rows": [row(0, "none", 0.1), row(0, "router", 0.08), row(0, "gain", 0.1)]},
        "1": {"rows": [row(1, "none", 0.2), row(1, "router", 0.18), row(1, "gain", 0.22)]},
    }
    _, _, none, gain, router = benchmark.markdown({"bench": seeds})
    assert none == "| bench | 50% | none | +6.00 ± 0.00 % | 0.1500 ± 0.0500 | 80.00% |  |  |"
    assert gain.endswith("| -5.0 ± 5.0 % | 0 of 2 |")
    assert router.endswith("| 15.0 ± 5.0 % | 2 of 2 |")


def test_rows_of_both_parts_come_together_by_seed(benchmark: ModuleType) -> None:
    held = {
        "router bench": {"seeds": {"0": {"rows": [row(0, "none", 0.1), row(0, "router", 0.08)]}}},
        "down bench": {"seeds": {"0": {"rows": [row(0, "none", 0.1), row(0, "down", 0.06)]}}},
    }
    seeds = benchmark.joined("bench", held)
    assert [r["repair"] for r in seeds["0"]["rows"]] == ["none", "router", "down"]
    assert benchmark.joined("wide", held) == {}
    *_, down = benchmark.markdown({"bench": seeds})
    assert down.endswith("| 40.0 | 1 of 1 |")


def test_a_seed_is_measured_on_the_embedded_model(benchmark: ModuleType, tmp_path: Path) -> None:
    setting = dataclasses.replace(
        benchmark.QUICK, tokens=2048, repair_tokens=4096, windows=1, ways=("router", "router+down")
    )
    found = benchmark.router_seed("demo", 0, setting, tmp_path)
    assert [r["repair"] for r in found["rows"]] == ["none", "router", "router+down"]
    for r in found["rows"]:
        assert r["kl"] > 0
        assert 0 < r["same_top1"] < 1
    layers = found["rows"][1]["layers"].values()
    assert all(after <= before for layer in layers for before, after in [layer["held_out"]])
    downs = [layer["down"] for layer in found["rows"][2]["layers"].values()]
    assert all((after < before) == (taken > 0) for before, after, taken in downs)
    assert any(taken for *_, taken in downs)
    assert list(tmp_path.iterdir()) == []
