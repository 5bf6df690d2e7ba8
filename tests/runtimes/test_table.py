"""The figures of docs/runtimes.md are those that were recorded, and the dates of `check` are those of the runs."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from runtime_folders import LAYOUTS

from moepress.validation.rules import sources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made() -> Any:
    """`table.py`, which lies beside this file and is a script."""
    spec = importlib.util.spec_from_file_location("runtimes_table", Path(__file__).with_name("table.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(made: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(made.RESULTS.read_text())
    return found


def test_the_table_is_made_of_what_was_recorded(made: Any, rows: list[dict[str, Any]]) -> None:
    assert made.table(rows) in (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
    assert {row["runtime"] for row in rows} == set(made.ORDER)
    assert {row["layout"] for row in rows} <= {"original", "pruned", *LAYOUTS}


def test_a_cell_tells_right_from_rounded_wrong_and_refused(made: Any) -> None:
    row = {"runtime": "vLLM", "version": "1", "date": "2026-12-01", "layout": "CT 4"}
    assert made.table([{**row, "model": "a", "largest": 2e-5, "mean": 1e-6}]).splitlines()[2] == "| CT 4 | 2e-05 |"
    rows = [
        {**row, "model": "a", "largest": 0.5, "mean": 0.02},
        {**row, "model": "b", "largest": 9.0, "mean": 2.0},
        {**row, "model": "c", "refuses": "ValueError"},
    ]
    assert made.table(rows).splitlines()[2] == "| CT 4 | 0.5 (mean 0.02); **wrong** (b); refuses (c) |"


@pytest.mark.parametrize(
    ("runtime", "source"),
    [("vLLM", sources.VLLM_RAN), ("GPTQModel", sources.GPTQMODEL_RAN), ("mlx-lm", sources.MLX)],
)
def test_check_names_the_version_and_the_day_of_the_run(
    runtime: str, source: sources.Source, rows: list[dict[str, Any]]
) -> None:
    own = [row for row in rows if row["runtime"] == runtime]
    assert {row["date"] for row in own} == {source.on}
    assert all(row["version"] in source.release for row in own)
