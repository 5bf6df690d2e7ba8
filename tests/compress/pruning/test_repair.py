"""Gains against a dense least-squares problem; a bias that evens loads out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepress.compress.pruning.repair import Equations, balanced_bias, loads, no_equations, solve_gains
from moepress.models.families.router import Router
from moepress.models.families.routing import choice_scores, combine_weights

GROUPED = Router(scoring="sigmoid", group_score="top2", groups=4, top_groups=2, top_k=4, renormalise=True, scale=2.5)


def made(seed: int, *, tokens: int = 40, experts: int = 6, top_k: int = 2, width: int = 5) -> tuple[Tensor, ...]:
    """chosen [T, K], weights [T, K], outputs [T, K, D], target [T, D]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    weights = torch.rand(tokens, top_k, generator=generator)
    outputs = torch.randn(tokens, top_k, width, generator=generator) + 1
    return chosen, weights, outputs, torch.randn(tokens, width, generator=generator) + 1


def design(chosen: Tensor, weights: Tensor, outputs: Tensor, experts: int) -> Tensor:
    """One column for each expert: its weighted outputs of all tokens, zero where it was not chosen; fp64 [T * D, E]."""
    tokens, _, width = outputs.shape
    columns = torch.zeros(tokens, width, experts, dtype=torch.float64)
    for token in range(tokens):
        for slot, expert in enumerate(chosen[token].tolist()):
            columns[token, :, expert] += (weights[token, slot] * outputs[token, slot]).double()
    return columns.reshape(tokens * width, experts)


def least_squares(columns: Tensor, target: Tensor, ridge: float) -> Tensor:
    """The gains by one dense problem, the ridge as further rows."""
    experts = columns.shape[1]
    rows = torch.diag((ridge * columns.square().sum(dim=0)).sqrt())
    right = torch.cat((target.double().reshape(-1), rows @ torch.ones(experts, dtype=torch.float64)))
    return torch.linalg.lstsq(torch.cat((columns, rows)), right[:, None]).solution.flatten()


def equations_of(chosen: Tensor, weights: Tensor, outputs: Tensor, target: Tensor, experts: int) -> Equations:
    """Summed up in three unequal parts."""
    found = no_equations(experts)
    for part in (slice(0, 7), slice(7, 8), slice(8, None)):
        found.add(chosen[part], weights[part], outputs[part], target[part])
    return found


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0])
def test_gains_are_the_least_squares_solution(ridge: float) -> None:
    chosen, weights, outputs, target = made(0)
    found = equations_of(chosen, weights, outputs, target, 6)
    columns = design(chosen, weights, outputs, 6)
    expected = least_squares(columns, target, ridge)
    gains = solve_gains(found, ridge)
    torch.testing.assert_close(gains.double(), expected, rtol=1e-5, atol=1e-6)
    flat = target.double().reshape(-1)
    for some in (torch.ones(6), gains):
        error = (flat - columns @ some.double()).square().sum() / flat.square().sum()
        assert found.error(some) == pytest.approx(float(error), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), ridge=st.floats(1e-6, 100.0), tokens=st.integers(8, 30))
def test_gains_never_raise_the_error(seed: int, ridge: float, tokens: int) -> None:
    found = equations_of(*made(seed, tokens=tokens, experts=12, top_k=3), 12)
    assert found.error(solve_gains(found, ridge)) <= found.error(torch.ones(12)) * (1 + 1e-9)


def test_an_expert_without_tokens_has_gain_one() -> None:
    chosen, weights, outputs, target = made(1, experts=4)
    found = equations_of(chosen, weights, outputs, target, 6)
    gains = solve_gains(found)
    assert gains[4:].tolist() == [1.0, 1.0]
    assert (gains[:4] != 1).all()


def test_where_the_target_is_met_all_gains_are_one() -> None:
    chosen, weights, outputs, _ = made(2)
    target = (weights[:, :, None] * outputs).sum(dim=1)
    found = equations_of(chosen, weights, outputs, target, 6)
    torch.testing.assert_close(solve_gains(found), torch.ones(6), rtol=0, atol=1e-5)
    assert found.error(torch.ones(6)) < 1e-6
    nothing = no_equations(3)
    assert nothing.error(torch.ones(3)) == 0.0
    assert solve_gains(nothing).tolist() == [1.0, 1.0, 1.0]


def distance(router: Router, scores: Tensor, bias: Tensor, wanted: Tensor) -> float:
    chosen = choice_scores(router, scores, bias).topk(router.top_k, dim=-1).indices
    return float((loads(chosen, len(bias)) - wanted).abs().sum())


def test_a_balanced_bias_brings_the_loads_near_to_those_wanted() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.sigmoid(torch.randn(600, 16, generator=generator) + torch.linspace(-1, 1, 16))
    bias = 0.05 * torch.randn(16, generator=generator)
    wanted = torch.rand(16, generator=generator).double() + 1
    wanted /= wanted.sum()
    found = balanced_bias(GROUPED, scores, bias, wanted)
    assert found.dtype == torch.float32
    before, after = (distance(GROUPED, scores, b, wanted) for b in (bias, found))
    assert after < 0.3 * before
    weights = combine_weights(GROUPED, scores, torch.arange(4).expand(600, 4))
    assert float(weights.sum(dim=1).mean()) == pytest.approx(2.5)  # the bias is in no weight


def test_a_bias_that_gives_the_wanted_loads_stays() -> None:
    scores = torch.sigmoid(torch.randn(300, 16, generator=torch.Generator().manual_seed(4)))
    bias = torch.linspace(-0.1, 0.1, 16)
    chosen = choice_scores(GROUPED, scores, bias).topk(4, dim=-1).indices
    assert torch.equal(balanced_bias(GROUPED, scores, bias, loads(chosen, 16)), bias)
