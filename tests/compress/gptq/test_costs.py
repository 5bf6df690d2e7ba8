"""The solver's FLOP: the closed forms against sums over columns and groups."""

import pytest

from moepress.compress.gptq.costs import SKETCHED, solve_flops
from moepress.compress.gptq.options import PLAIN, SolverOptions

ROWS, COLUMNS, GROUP = 96, 256, 32


def test_each_phase_is_the_sum_of_its_steps() -> None:
    found = solve_flops(ROWS, COLUMNS, GROUP)
    triangle = sum(2 * ROWS * before for before in range(COLUMNS))  # a column meets the residuals of those before it
    assert found["columns"] == found["slope"] == pytest.approx(triangle, rel=2 / COLUMNS)
    # Column j of a factor: one root or division each for itself and those below, and their update by all before it.
    factor = sum((COLUMNS - j) * (1 + 2 * j) for j in range(COLUMNS))
    assert found["factor"] == pytest.approx(factor, rel=4 / COLUMNS)
    groups = COLUMNS // GROUP
    response, others = groups * 2 * ROWS * GROUP**2, groups * 2 * ROWS * GROUP * COLUMNS
    assert found["refit"] == response + others
    assert found["losses"] == pytest.approx(triangle + 2 * SKETCHED * ROWS * COLUMNS, rel=2 / COLUMNS)
    assert found["scales"] == 0


def test_options_change_what_hangs_on_them() -> None:
    one, three = (solve_flops(ROWS, COLUMNS, GROUP, SolverOptions(refits=refits)) for refits in (1, 3))
    assert three["refit"] == 3 * one["refit"]
    plain = solve_flops(ROWS, COLUMNS, GROUP, PLAIN)
    assert plain["slope"] == plain["refit"] == 0 < plain["columns"] == one["columns"]


def test_the_solver_of_r1_takes_two_fifths_of_what_three_sweeps_and_three_losses_took() -> None:
    hidden, width, group, experts = 7168, 2048, 128, 58 * 192
    lean = experts * sum(sum(solve_flops(*shape, group).values()) for shape in ((2 * width, hidden), (hidden, width)))
    squares, cubes = 2 * width * hidden**2 + hidden * width**2, hidden**3 + width**3
    before = experts * (13 * squares + 2 / 3 * cubes)
    assert lean == pytest.approx(before * 0.4, rel=0.01)
