"""What an annealed sweep may cost; that codes follow is in test_native.py and test_solver.py."""

import math

import pytest
import torch

from moepress.compress.gptq.annealing import allowances


def test_what_moves_may_cost_is_exponential_and_falls_from_sweep_to_sweep() -> None:
    allowed_SI = allowances(9, 20_000)
    mean_S = allowed_SI.mean(dim=1)
    assert bool((allowed_SI >= 0).all())
    assert bool((mean_S.diff() < 0).all())
    ratios = mean_S[1:] / mean_S[:-1]
    torch.testing.assert_close(ratios, ratios.mean().expand(8), rtol=0.05, atol=0)
    assert float((allowed_SI[0] > mean_S[0]).double().mean()) == pytest.approx(math.exp(-1), abs=0.02)


def test_it_is_drawn_anew_as_before_and_leaves_torchs_own_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    first = allowances(3, 50).clone()
    allowances.cache_clear()
    assert torch.equal(allowances(3, 50), first)
    assert torch.equal(torch.random.get_rng_state(), before)
