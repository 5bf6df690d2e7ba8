import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepress.validation.quality.divergence import (
    Compared,
    common_top5,
    paired,
    same_top1,
    stratified_share,
    tail_of,
    token_kl,
)


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


def compared(before: Tensor, after: Tensor, kl: Tensor | None = None) -> Compared:
    """All tokens alike, but for these."""
    return Compared(
        before=before,
        after=after,
        kl=(after - before).abs() if kl is None else kl,
        reverse=2 * (after - before).abs(),
        same=torch.ones(before.shape, dtype=torch.bool),
        common=torch.full(before.shape, 4, dtype=torch.uint8),
        top=5,
    )


def test_pairing_removes_what_windows_have_in_common() -> None:
    generator = torch.Generator().manual_seed(0)
    before = (5 + torch.randn(40, 1, generator=generator)).double().expand(-1, 3)
    delta = 0.1 + 0.01 * torch.randn(40, 1, generator=generator).double()
    found = paired(compared(before, before + delta), torch.zeros(40, dtype=torch.int64), [1.0])
    assert found.delta_nll.value == pytest.approx(0.1, abs=0.01)
    assert (found.delta_nll.error or 1) < 0.003  # unpaired it would be about 0.2
    assert found.perplexity_ratio.value == pytest.approx(math.exp(found.delta_nll.value))
    assert found.same_top1.value == 1
    assert found.same_top5 is not None
    assert found.same_top5.value == pytest.approx(0.8)
    assert found.reverse_kl is not None
    assert found.reverse_kl.value == pytest.approx(2 * found.kl.value)


def test_probabilities_of_the_text_s_own_tokens_are_compared_by_the_root_of_their_squares() -> None:
    before = torch.tensor([[0.5, 0.25], [0.8, 0.1]]).log().neg()
    after = torch.tensor([[0.4, 0.25], [0.5, 0.5]]).log().neg()
    found = paired(compared(before, after), torch.zeros(2, dtype=torch.int64), [1.0]).rms_delta_p
    assert found is not None
    assert found.value == pytest.approx(math.sqrt((0.1**2 + 0 + 0.3**2 + 0.4**2) / 4), rel=1e-5)
    assert found.error is not None


def test_the_likeliest_five_are_counted_whatever_their_order() -> None:
    before = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0], [6.0, 5, 4, 3, 2, 1, 0]])
    after = torch.tensor([[2.0, 3, 4, 5, 6, 1, 0], [0.0, 1, 2, 3, 4, 5, 6]])
    assert common_top5(before, after).tolist() == [5, 3]
    assert common_top5(before[:, :3], after[:, :3]).tolist() == [3, 3]


def test_percentiles_are_those_of_all_positions() -> None:
    kl = torch.arange(1000.0).view(10, 100)
    tail = tail_of(kl[torch.randperm(10, generator=torch.Generator().manual_seed(0))], torch.zeros(10).long(), [1.0])
    assert [e.value for e in (tail.median, tail.p90, tail.p99, tail.p999)] == [499.0, 899.0, 989.0, 998.0]
    assert tail.largest == 999
    assert tail.median.error is not None
    assert 50 < tail.median.error < 200  # of ten windows, each a tenth of the range


def test_every_domain_weighs_what_it_is_to_weigh() -> None:
    kl = torch.cat([torch.full((8, 4), 1.0), torch.full((2, 4), 9.0)])
    index = torch.tensor([0] * 8 + [1] * 2)
    assert tail_of(kl, index, [0.8, 0.2]).median.value == 1
    assert tail_of(kl, index, [0.4, 0.6]).median.value == 9
    only = tail_of(kl, index, [1.0, 0.0])
    assert only.largest == only.p999.value == 1
    assert only.p999.error == 0


def test_a_single_window_has_no_error() -> None:
    tail = tail_of(torch.arange(8.0).view(1, 8), torch.zeros(1).long(), [1.0])
    assert (tail.median.error, tail.p999.error) == (None, None)
