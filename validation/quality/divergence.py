"""How far a model has moved from the one it was made of, token by token on the same text.

Shapes: R rows (positions) in a chunk, V vocabulary, N windows, T tokens in a window. Everything here is pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.validation.quality.perplexity import exponential, stratified_mean, window_means
from moepress.validation.quality.results import Estimate, Paired, Tail

_SHARES = (0.5, 0.9, 0.99, 0.999)
_RESAMPLES = 200


def token_kl(reference_RV: Tensor, subject_RV: Tensor) -> Tensor:
    """KL(reference || subject) of each position, nats; fp32 rounding makes it uncertain by about 1e-6.

    Args:
        reference_RV: log-probabilities, fp32 [R, V]; -inf is a probability of zero.
        subject_RV: log-probabilities, fp32 [R, V].

    Returns:
        fp32 [R]; exactly zero for equal arguments.
    """
    gap = (reference_RV - subject_RV).masked_fill_(reference_RV == -torch.inf, 0.0)
    return gap.mul_(reference_RV.exp()).sum(dim=1)


def same_top1(reference_RV: Tensor, subject_RV: Tensor) -> Tensor:
    """Whether both hold the same token for the most likely one (the first of equals), bool [R]."""
    return likeliest(reference_RV) == likeliest(subject_RV)


def likeliest(log_probabilities_RV: Tensor) -> Tensor:
    """The most likely token of each position (the first of equals), int64 [R]."""
    return log_probabilities_RV.argmax(dim=1)


def five_likeliest(log_probabilities_RV: Tensor) -> Tensor:
    """The five likeliest tokens (of fewer all), int64 [R, 5]."""
    return log_probabilities_RV.topk(min(5, log_probabilities_RV.shape[1]), dim=1).indices


def common_top5(reference_RV: Tensor, subject_RV: Tensor) -> Tensor:
    """How many of the reference's five likeliest tokens (of fewer all) are among the subject's five, uint8 [R]."""
    return in_five(five_likeliest(reference_RV), subject_RV)


def in_five(tokens_R5: Tensor, subject_RV: Tensor) -> Tensor:
    """How many of these tokens, [R, 5], are among the subject's five likeliest, uint8 [R]."""
    return (tokens_R5[:, :, None] == five_likeliest(subject_RV)[:, None]).any(dim=2).sum(dim=1).to(torch.uint8)


def tail_of(kl_NT: Tensor, domain_index_N: Tensor, weights: Sequence[float]) -> Tail:
    """Percentiles over positions, each position weighing as much as its domain's others.

    Errors are the standard deviations over 200 resamples of the windows of each domain (bootstrap, seeded); None where
    a domain of weight has a single window.

    Args:
        kl_NT: fp32 [N, T - 1], nats.
        domain_index_N: int64 [N].
        weights: of the domains, summing to 1.
    """
    counts = torch.bincount(domain_index_N, minlength=len(weights))
    each = [weight / int(count) if weight else 0.0 for weight, count in zip(weights, counts, strict=True)]
    weight_N = torch.tensor(each, dtype=torch.float64)[domain_index_N] / kl_NT.shape[1]
    sorted_P, order_P = kl_NT.flatten().sort()
    window_P = order_P // kl_NT.shape[1]
    shares = torch.tensor(_SHARES, dtype=torch.float64)

    def found(window_weight_N: Tensor) -> Tensor:
        reached_P = window_weight_N[window_P].cumsum(0)
        at = torch.searchsorted(reached_P, shares * reached_P[-1]).clamp(max=len(sorted_P) - 1)
        return sorted_P[at].double()

    values, alone = found(weight_N), any(w and int(c) < 2 for w, c in zip(weights, counts, strict=True))
    errors: list[float | None] = [None] * len(_SHARES)
    if not alone:
        drawn = torch.Generator().manual_seed(0)
        again = torch.stack([found(weight_N * _resampled(domain_index_N, drawn)) for _ in range(_RESAMPLES)])
        errors = again.std(dim=0).tolist()
    median, p90, p99, p999 = (
        Estimate(value=value, error=error) for value, error in zip(values.tolist(), errors, strict=True)
    )
    largest = float(kl_NT[weight_N > 0].max())
    return Tail(median=median, p90=p90, p99=p99, p999=p999, largest=largest)


def _resampled(domain_index_N: Tensor, drawn: torch.Generator) -> Tensor:
    """How often each window is drawn, with replacement, from its domain's: fp64 [N]."""
    times_N = torch.zeros(len(domain_index_N), dtype=torch.float64)
    for domain in domain_index_N.unique():
        own = (domain_index_N == domain).nonzero()[:, 0]
        picked = own[torch.randint(len(own), (len(own),), generator=drawn)]
        times_N.index_add_(0, picked, torch.ones(len(own), dtype=torch.float64))
    return times_N


def root(estimate: Estimate) -> Estimate:
    """The square root of an estimate that is not negative, the error by the delta method."""
    value = math.sqrt(max(estimate.value, 0.0))
    return Estimate(value=value, error=None if estimate.error is None or not value else estimate.error / (2 * value))


def stratified_share(hits_NT: Tensor, domain_index_N: Tensor, weights: Sequence[float]) -> Estimate:
    """Weighted mean of the domains' shares, with the binomial sigma sqrt(p (1 - p) / n) of each.

    Args:
        hits_NT: bool [N, T - 1].
        domain_index_N: int64 [N].
        weights: of the domains, summing to 1.
    """
    share, variance = 0.0, 0.0
    for domain, weight in enumerate(weights):
        if weight == 0:
            continue
        hits = hits_NT[domain_index_N == domain]
        inside = float(hits.double().mean())
        share += weight * inside
        variance += weight**2 * inside * (1 - inside) / hits.numel()
    return Estimate(value=share, error=math.sqrt(variance))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What two models give for each predicted token.

    Attributes:
        before, after: fp32 [N, T - 1], NLL of the reference and of the subject, nats.
        kl: fp32 [N, T - 1], KL(reference || subject), nats.
        reverse: fp32 [N, T - 1], KL(subject || reference), nats.
        same: bool [N, T - 1], same most likely token.
        common: uint8 [N, T - 1], of `common_top5`.
        top: how many tokens `common` is out of: five, of a smaller vocabulary all.
    """

    before: Tensor
    after: Tensor
    kl: Tensor
    reverse: Tensor
    same: Tensor
    common: Tensor
    top: int


def paired(found: Compared, domain_index_N: Tensor, weights: Sequence[float]) -> Paired:
    """All paired measures of one row of the report.

    Args:
        found: of all tokens.
        domain_index_N: int64 [N].
        weights: of the domains, summing to 1.
    """

    def mean(values_NT: Tensor) -> Estimate:
        return stratified_mean(window_means(values_NT), domain_index_N, weights)

    delta = mean(found.after.double() - found.before.double())
    moved = (-found.after.double()).exp() - (-found.before.double()).exp()
    return Paired(
        delta_nll=delta,
        perplexity_ratio=exponential(delta),
        kl=mean(found.kl),
        same_top1=stratified_share(found.same, domain_index_N, weights),
        same_top5=mean(found.common / found.top),
        reverse_kl=mean(found.reverse),
        rms_delta_p=root(mean(moved.square())),
        tail=tail_of(found.kl, domain_index_N, weights),
    )
