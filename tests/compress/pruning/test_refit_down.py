"""The refit of one down projection, against dense least squares."""

import torch

from moepress.compress.pruning.refit_down import RIDGE, no_down_equations, solve_step

CPU = torch.device("cpu")


def test_a_step_is_the_least_squares_solution_with_its_pull() -> None:
    torch.manual_seed(0)
    scaled, lacking = torch.randn(40, 6) * torch.tensor([1, 2, 0.1, 1, 0, 3]), torch.randn(40, 5)
    equations = no_down_equations(6, 5, CPU)
    for part in (slice(0, 17), slice(17, 40)):
        equations.add(scaled[part], lacking[part])
    step = solve_step(equations)
    assert step is not None
    h, r = scaled.double(), lacking.double()
    squares = h.square().sum(dim=0)
    pull = torch.diag((RIDGE * (squares + squares.mean())).sqrt())
    stacked = torch.cat((r, torch.zeros(6, 5, dtype=torch.float64)))
    expected = torch.linalg.lstsq(torch.cat((h, pull)), stacked).solution.T
    torch.testing.assert_close(step.double(), expected, rtol=1e-4, atol=1e-6)
    assert not step[:, 4].any()  # what never reaches the projection moves nothing
    assert (r - h @ step.double().T).square().sum() < r.square().sum()


def test_an_expert_whose_intermediates_are_zero_takes_no_step() -> None:
    equations = no_down_equations(3, 2, CPU)
    assert solve_step(equations) is None
    equations.add(torch.zeros(4, 3), torch.ones(4, 2))
    assert solve_step(equations) is None


def test_with_little_pull_what_can_be_reached_is_reached() -> None:
    torch.manual_seed(1)
    scaled, wanted = torch.randn(50, 4), torch.randn(3, 4)
    equations = no_down_equations(4, 3, CPU)
    equations.add(scaled, scaled @ wanted.T)
    step = solve_step(equations, ridge=1e-9)
    assert step is not None
    torch.testing.assert_close(step, wanted, rtol=1e-4, atol=1e-5)
