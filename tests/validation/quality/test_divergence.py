import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.validation.quality.divergence import paired, same_top1, stratified_share, token_kl


def log_probabilities(seed: int, rows: int = 5, vocabulary: int = 13) -> torch.Tensor:
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    return torch.log_softmax(logits, dim=1)


def test_kl_is_the_slow_sum_over_the_vocabulary() -> None:
    before, after = log_probabilities(0), log_probabilities(1)
    for row, value in enumerate(token_kl(before, after).tolist()):
        p, q = before[row].double().tolist(), after[row].double().tolist()
        assert value == pytest.approx(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)), rel=1e-5)


def test_kl_of_two_coins_has_its_closed_form() -> None:
    before, after = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert token_kl(before, after).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)


def test_a_token_that_the_reference_rules_out_adds_nothing() -> None:
    before, after = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert token_kl(before, after).item() == pytest.approx(math.log(2))


def test_a_token_that_only_the_subject_rules_out_makes_it_infinite() -> None:
    before, after = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert token_kl(before, after).item() == math.inf


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_kl_is_not_negative_and_zero_only_for_equals(one: int, other: int) -> None:
    divergence = token_kl(log_probabilities(one), log_probabilities(other))
    assert bool((divergence == 0).all()) if one == other else bool((divergence > -1e-5).all())


def test_arguments_are_left_as_they_were() -> None:
    before, after = log_probabilities(0), log_probabilities(1)
    token_kl(before, after)
    assert torch.equal(before, log_probabilities(0))
    assert torch.equal(after, log_probabilities(1))


def test_same_top1_takes_the_first_of_equals() -> None:
    before, after = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    assert same_top1(before, after).tolist() == [True, False]


def test_the_share_has_the_binomial_sigma() -> None:
    hits = torch.tensor([[True, True, False, True]])
    share = stratified_share(hits, torch.tensor([0]), [1.0])
    assert share.value == 0.75
    assert share.error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_the_share_over_domains_weighs_them() -> None:
    hits = torch.tensor([[True, True], [True, False], [False, False]])
    share = stratified_share(hits, torch.tensor([0, 0, 1]), [0.5, 0.5])
    assert share.value == pytest.approx(0.5 * 0.75)
    assert share.error == pytest.approx(0.5 * math.sqrt(0.75 * 0.25 / 4))


def test_pairing_removes_what_windows_have_in_common() -> None:
    generator = torch.Generator().manual_seed(0)
    before = 5 + torch.randn(40, generator=generator).double()
    delta = 0.1 + 0.01 * torch.randn(40, generator=generator).double()
    kl, same, index = delta.abs(), torch.ones(40, 3, dtype=torch.bool), torch.zeros(40, dtype=torch.int64)
    found = paired((before + delta) - before, kl, same, index, [1.0])
    assert found.delta_nll.value == pytest.approx(0.1, abs=0.01)
    assert (found.delta_nll.error or 1) < 0.003  # unpaired it would be about 0.2
    assert found.perplexity_ratio.value == pytest.approx(math.exp(found.delta_nll.value))
    assert found.same_top1.value == 1
