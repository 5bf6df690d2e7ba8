"""The benchmark of domain losses: what it calls agreement, on cuts made by hand."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from r1_models import make_r1


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(make_r1.__file__).parent))
    return importlib.import_module("domain_losses")


def cut(kl: dict[str, float], losses: dict[str, float]) -> dict[str, Any]:
    return {"model": "demo", "keep": 0.5, "cut": "reap", "kl": kl, "losses": {"reap-sum mass": losses}}


def test_a_figure_in_proportion_to_the_divergence_agrees_wholly(benchmark: ModuleType) -> None:
    damages = [{"a": 0.5, "b": 0.1, "c": 0.2}, {"a": 0.1, "b": 0.2, "c": 0.9}, {"a": 0.3, "b": 0.31, "c": 0.29}]
    rows = [cut({d: 0.2 * x for d, x in one.items()}, {d: x / (1 + x) for d, x in one.items()}) for one in damages]
    found = benchmark.agreement(rows, "reap-sum mass", benchmark.FORMS["m / (1 - m)"])
    assert found["all"] == pytest.approx(1)
    assert found["relative"] == pytest.approx(1)
    assert found["slope"] == pytest.approx(1)
    assert (found["worst"], found["lost"], found["found"], found["wrongly"]) == (1, 2, 2, 0)
    plain = benchmark.agreement(rows, "reap-sum mass", benchmark.FORMS["m"])
    assert plain["all"] == pytest.approx(1)
    assert plain["slope"] > 1


def test_wrong_alarms_and_wrong_worst_domains_are_counted(benchmark: ModuleType) -> None:
    rows = [cut({"a": 0.1, "b": 0.3, "c": 0.1}, {"a": 0.6, "b": 0.1, "c": 0.1})]
    found = benchmark.agreement(rows, "reap-sum mass", benchmark.FORMS["m"])
    assert (found["worst"], found["lost"], found["found"], found["wrongly"]) == (0, 1, 0, 1)


def test_ranks_of_equal_values_are_their_mean(benchmark: ModuleType) -> None:
    assert benchmark.ranks([3.0, 1.0, 3.0]).tolist() == [1.5, 0.0, 1.5]
    assert benchmark.spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
