import math

import pytest
import torch

from moepress.validation.quality.perplexity import (
    bits_per_byte,
    equal_weights,
    exponential,
    one_domain,
    pooled_weights,
    stratified_mean,
    token_nll,
    window_means,
)
from moepress.validation.quality.results import Estimate

INDEX = torch.tensor([0, 0, 0, 1, 1])
VALUES = torch.tensor([1.0, 2.0, 4.0, 10.0, 12.0], dtype=torch.float64)


def test_nll_is_minus_the_log_probability_of_the_target() -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(7) % 11
    nll = token_nll(torch.log_softmax(logits, dim=1), targets)
    for row, target, value in zip(logits.tolist(), targets.tolist(), nll.tolist(), strict=True):
        assert value == pytest.approx(math.log(sum(math.exp(z) for z in row)) - row[target], rel=1e-5)


def test_a_uniform_prediction_has_the_vocabulary_as_its_perplexity() -> None:
    nll = token_nll(torch.log_softmax(torch.zeros(6, 50), dim=1), torch.arange(6))
    assert exponential(
        stratified_mean(window_means(nll.view(2, 3)), torch.zeros(2).long(), [1.0])
    ).value == pytest.approx(50, rel=1e-5)


def test_pooled_weights_give_the_plain_mean_over_windows() -> None:
    assert stratified_mean(VALUES, INDEX, pooled_weights(INDEX, 2)).value == pytest.approx(float(VALUES.mean()))


def test_one_domain_gives_its_mean_and_its_standard_error() -> None:
    found = stratified_mean(VALUES, INDEX, one_domain(0, 2))
    mean = 7 / 3
    error = math.sqrt(((1 - mean) ** 2 + (2 - mean) ** 2 + (4 - mean) ** 2) / 2 / 3)
    assert found.value == pytest.approx(mean)
    assert found.error == pytest.approx(error)


def test_the_error_of_the_mean_over_domains_is_that_of_independent_domains() -> None:
    found = stratified_mean(VALUES, INDEX, equal_weights(2))
    parts = [stratified_mean(VALUES, INDEX, one_domain(d, 2)) for d in range(2)]
    assert found.value == pytest.approx(sum(p.value for p in parts) / 2)
    assert found.error == pytest.approx(math.hypot(*(p.error or 0 for p in parts)) / 2)


def test_the_error_is_the_spread_that_repeated_sampling_shows() -> None:
    generator = torch.Generator().manual_seed(1)
    index = torch.tensor([0] * 20 + [1] * 10)
    offsets = torch.where(index == 0, 0.0, 50.0)  # domains far apart: not noise
    draws = [torch.randn(30, generator=generator).double() + offsets for _ in range(2000)]
    estimates = [stratified_mean(draw, index, pooled_weights(index, 2)) for draw in draws]
    spread = float(torch.tensor([e.value for e in estimates]).std())
    claimed = sum(e.error or 0 for e in estimates) / len(estimates)
    assert claimed == pytest.approx(spread, rel=0.06)


def test_one_window_has_no_error() -> None:
    assert stratified_mean(VALUES[:1], INDEX[:1], [1.0]).error is None
    assert exponential(Estimate(value=1.0)).error is None


def test_the_mean_over_domains_is_the_geometric_mean_of_perplexities() -> None:
    parts = [exponential(stratified_mean(VALUES, INDEX, one_domain(d, 2))).value for d in range(2)]
    assert exponential(stratified_mean(VALUES, INDEX, equal_weights(2))).value == pytest.approx(
        math.sqrt(math.prod(parts))
    )


def test_the_delta_method_matches_a_small_difference() -> None:
    found = exponential(Estimate(value=2.0, error=1e-4))
    assert found.error == pytest.approx(math.exp(2.0 + 1e-4) - math.exp(2.0), rel=1e-3)


def test_a_hopeless_model_has_infinite_perplexity_instead_of_an_error() -> None:
    assert exponential(Estimate(value=1e4)).value == math.inf


def test_bits_per_byte_is_all_bits_over_all_bytes() -> None:
    nll, text_bytes, index = torch.tensor([1.0, 3.0]).double(), torch.tensor([10, 30]), torch.tensor([0, 1])
    assert bits_per_byte(nll, 8, text_bytes, index, None) == pytest.approx((8 + 24) / math.log(2) / 40)
    assert bits_per_byte(nll, 8, text_bytes, index, [0.0, 1.0]) == pytest.approx(24 / math.log(2) / 30)
    assert bits_per_byte(nll, 8, text_bytes, index, [0.5, 0.5]) == pytest.approx((8 / 10 + 24 / 30) / math.log(2) / 2)


def test_text_without_bytes_has_no_bits_per_byte() -> None:
    nll, index = torch.tensor([1.0, 3.0]).double(), torch.tensor([0, 1])
    assert bits_per_byte(nll, 8, torch.tensor([0, 30]), index, [0.5, 0.5]) is None
    assert bits_per_byte(nll, 8, torch.tensor([0, 0]), index, None) is None
