"""The benchmark of tasks after pruning: its table by hand, and one small seed from end to end on the embedded model."""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from r1_models import make_r1

FOLDER = Path(make_r1.__file__).parent
CHOICE, SUMS = "moepress_continuation", "moepress_sums"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prune_tasks")


def row(repair: str, choice: str, sums: str) -> dict[str, Any]:
    return {"keep": 1.0 if repair == "original" else 0.5, "repair": repair, "right": {CHOICE: choice, SUMS: sums}}


def test_items_count_by_their_mean_over_seeds_and_those_that_were_seen_do_not(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {CHOICE: "00001", SUMS: "0000"}
    seeds = {
        "0": {"seen": seen, "rows": [row("original", "11001", "1111"), row("none", "10001", "1100")]},
        "1": {"seen": seen, "rows": [row("original", "11001", "1111"), row("none", "00001", "1100")]},
    }
    for found, right in zip(seeds.values(), ("1110", "1101"), strict=True):
        found["rows"].append(row("down", "11001", right))
    *_, few = benchmark.markdown({"bench": seeds})
    assert few.endswith("| 75.0% ± 0.0% |  | +25.0 ± 14.4 |")  # a share of four right answers
    monkeypatch.setattr(benchmark, "LEAST_RIGHT", 2)
    _, _, original, none, down = benchmark.markdown({"bench": seeds})
    assert original == "| bench | all | original | 50.0% |  |  | 100.0% |  |  |"
    # Continuation: 1/2, 0, 0, 0 against 1, 1, 0, 0 of the items not seen; r = 1/4, y - r x = 1/4, -1/4, 0, 0.
    assert none.startswith("| bench | 50% | none | 12.5% ± 12.5% | 25% ± 20% |  | 50.0% ± 0.0% | 50% ± 29% |  |")
    # Sums: 1, 1, 1/2, 1/2 against 1, 1, 0, 0; differences 0, 0, 1/2, 1/2 have a standard error of sqrt(1/12) / 2.
    assert down.endswith("| 75.0% ± 0.0% | 75% ± 14% | +25.0 ± 14.4 |")


def test_a_seed_is_measured_on_the_embedded_model(benchmark: ModuleType, tmp_path: Path) -> None:
    setting = benchmark.TasksSetting(shares=(0.5,), tokens=2048, repair_tokens=4096, limit=6)
    found = benchmark.tasks_seed("demo", 0, dataclasses.replace(setting, ways=("down",)), tmp_path)
    assert [r["repair"] for r in found["rows"]] == ["original", "none", "down"]
    for r in found["rows"]:
        assert {task: set(right) <= {"0", "1"} and len(right) for task, right in r["right"].items()} == {
            CHOICE: 6,
            SUMS: 6,
        }
    assert {task: len(marks) for task, marks in found["seen"].items()} == {CHOICE: 6, SUMS: 6}
    assert list(tmp_path.iterdir()) == []


def test_an_item_is_seen_where_its_text_is_in_the_training_text(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = benchmark.own_items(CHOICE)
    text = tmp_path / "train.txt"
    text.write_text(f"before {items[2]['context']} behind", encoding="utf-8")
    monkeypatch.setattr(benchmark, "texts", lambda _split: (f"wiki={text}",))
    assert benchmark.seen(CHOICE, benchmark.TasksSetting(limit=5)) == "00100"
    monkeypatch.setattr(benchmark, "texts", lambda _split: ())
    assert benchmark.seen(CHOICE, benchmark.TasksSetting(limit=5)) == "00000"
