import time

import pytest
import torch
from torch import Tensor

from moepress.compress.gptq import factor as factors
from moepress.compress.gptq.annealing import anneal
from moepress.compress.gptq.batch import _better_rows, _compensated
from moepress.compress.gptq.descent import Descent, improve_codes, refit
from moepress.compress.gptq.factor import Factor
from moepress.compress.gptq.levels import Grid
from moepress.compress.gptq.options import SolverOptions, Task

INTEGERS = Grid(levels=tuple(map(float, range(-4, 4))))
TABLE = Grid(levels=(-1.0, 0.0, 0.5, 1.0))


def positive(experts: int, columns: int) -> Tensor:
    inputs = torch.randn(experts, 2 * columns, columns, generator=torch.Generator().manual_seed(columns))
    return inputs.mT @ inputs


def test_factors_one_by_one_are_those_of_a_batch_and_tell_which_failed() -> None:
    matrices = positive(3, 20)
    matrices[1, 4, 4] = -1
    (lower, info), (expected, told) = factors.one_by_one(matrices), factors.at_once(matrices)
    torch.testing.assert_close(lower[[0, 2]], expected[[0, 2]])
    assert info.tolist() == told.tolist() == [0, 5, 0]


def test_the_faster_way_is_found_by_trying_both() -> None:
    def slow(matrices: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(0.3)
        return factors.at_once(matrices)

    matrices = positive(2, 8)
    assert factors.faster((slow, factors.at_once), matrices) is factors.at_once
    assert factors.faster((factors.at_once, slow), matrices) is factors.at_once


@pytest.mark.parametrize("grid", [INTEGERS, TABLE])
def test_nothing_between_the_factor_and_the_result_asks_a_device_that_is_not_the_cpu(grid: Grid) -> None:
    """The meta device has no numbers, so that whatever asks for one fails: on a GPU it would wait for all before it."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    experts, columns, rows, group = 2, 160, 5, 32
    task = Task(grid=grid, group=group, dtype=torch.bfloat16, options=SolverOptions())
    found = Factor(
        unit=meta(experts, columns, columns),
        square=meta(experts, columns),
        damping=meta(experts, dtype=torch.float64),
    )
    turned, scales, hessian = meta(experts, columns, rows), meta(experts, 5, rows), meta(experts, columns, columns)
    values, slope = _compensated(turned, scales, found, meta(experts, columns, dtype=torch.int64), task)
    problem = Descent(
        hessian=hessian, ridge=meta(experts, columns), grid=grid, group=group, dtype=torch.bfloat16, sweeps=2
    )
    improve_codes(problem, slope, scales, values)
    refit(problem, slope, scales, values)
    anneal(problem, 2, turned, slope, scales, values)
    done = _better_rows(turned, hessian, (values, scales), (values, scales), found, grid)
    assert (done.codes.shape, done.codes.dtype) == ((experts, rows, columns), torch.int8)
