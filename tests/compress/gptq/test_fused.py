"""The Triton kernels against the torch loops that they stand for, in Triton's interpreter where there is no GPU."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fused_solves
import pytest
import torch

from moepress.compress.gptq import columns, fused
from moepress.compress.gptq.columns import FUSED_LOOPS, PLAIN_LOOPS

CUDA = torch.cuda.is_available()
HELPERS = Path(fused_solves.__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def lines_of(script: str, **environment: str) -> dict[str, dict[str, Any]]:
    """What a script prints, by name."""
    command = [sys.executable, str(HELPERS / script)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    return lines_of("fused_solves.py", **({} if CUDA else {"TRITON_INTERPRET": "1"}))


@needs_triton
@pytest.mark.parametrize("name", fused_solves.EXACT)
def test_a_solve_with_the_kernels_gives_the_bits_of_the_torch_loops(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    assert (found[name]["codes"], found[name]["scales"], found[name]["loss"]) == (0, 0, 0)
    assert found[name]["moved"] > 0.01
    assert found[name]["damped"] == 1


@needs_triton
@pytest.mark.parametrize("name", fused_solves.USUAL)
def test_with_usual_numbers_hardly_a_code_differs(found: dict[str, dict[str, Any]], name: str) -> None:
    assert found[name]["codes"] < 0.005
    assert found[name]["loss"] < 1e-4


@needs_triton
@pytest.mark.parametrize("name", fused_solves.SEARCHES)
def test_the_search_of_scales_gives_the_bits_of_torch(found: dict[str, dict[str, Any]], name: str) -> None:
    assert found[f"scales, {name}"]["scales"] == 0
    assert found[f"scales, {name}"]["clipped"] > 0.1


@needs_triton
def test_the_kernels_are_used_where_they_agree(found: dict[str, dict[str, Any]]) -> None:
    assert found["cuda" if CUDA else "cpu"]["agrees"]


@needs_triton
def test_the_compiler_takes_the_kernels_and_their_columns_stay_in_registers(tmp_path: Path) -> None:
    builds = lines_of("fused_builds.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert len(builds) == 6
    for build in builds.values():
        assert build["spilled"] == 0, build
        assert build["divisions"] == ["div.rn.f32"], build


def test_several_sweeps_in_one_call_are_as_many_calls_with_a_true_slope() -> None:
    case = dataclasses.replace(fused_solves.EXACT["2 bits"], experts=2)
    weight, hessian, scales = fused_solves.exact_problem(case)
    hessian.diagonal(dim1=1, dim2=2).add_(0.5)
    scales = scales.mT.repeat_interleave(case.group, dim=1)
    start = case.grid.nearest(weight.mT / scales)
    slope = hessian @ (weight.mT - start * scales)
    values, moves = start.clone(), torch.empty_like(start)
    columns.improve_columns(hessian, slope.clone(), scales, case.grid, values, moves, 3)
    each, moved = start.clone(), torch.zeros_like(start)
    for _ in range(3):
        given = hessian @ (weight.mT - each * scales)
        columns.improve_columns(hessian, given, scales, case.grid, each, step := torch.empty_like(start))
        moved += step
    assert torch.equal(values, each)
    assert torch.equal(moves, moved)
    assert not torch.equal(values, start)


def test_kernels_that_cannot_run_or_give_other_codes_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")

    def wrong(*given: object) -> None:
        columns.round_columns(*given)  # type: ignore[arg-type]
        given[-1][0, 0, 0] += 2**-12  # type: ignore[index]

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(fused, "available", lambda _device: True)
    monkeypatch.setattr(fused, "improve_columns", columns.improve_columns)
    monkeypatch.setattr(fused, "search_scales", PLAIN_LOOPS.search_scales)
    for kernel, reason in ((wrong, "differ"), (broken, r"\(no compiler\)")):
        monkeypatch.setattr(fused, "round_columns", kernel)
        columns.inner_loops.cache_clear()
        with pytest.warns(UserWarning, match=reason):
            assert columns.inner_loops(device) == PLAIN_LOOPS
    monkeypatch.setattr(fused, "round_columns", columns.round_columns)
    columns.inner_loops.cache_clear()
    assert columns.inner_loops(device) == FUSED_LOOPS
    columns.inner_loops.cache_clear()
